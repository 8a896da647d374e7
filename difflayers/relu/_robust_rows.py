"""Named rows of a cone program, the norms of blocks of unknowns, and the widths of cells."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Array = np.ndarray
Norm = Literal["l1", "l2"]  # the dual norm
NARROW = 1e-8  # width of a cell, relative to the points around it, that counts as none


@dataclass
class Program:
    """Rows ``b + G x`` in a cone, named, for named variables."""

    sizes: dict[str, int]
    start: dict[str, int] = field(default_factory=dict)
    rows: dict[str, slice] = field(default_factory=dict)
    cones: list[Any] = field(default_factory=list)
    entries: list[tuple[Array, Array, Array]] = field(default_factory=list)
    b: list[Array] = field(default_factory=list)
    height: int = 0

    def __post_init__(self) -> None:
        total = 0
        for name, size in self.sizes.items():
            self.start[name] = total
            total += size
        self.width = total

    def add(self, name: str, cones: list[Any], count: int, *terms: tuple[Any, str, Any, Any], b: Any = 0.0) -> None:
        """Rows of terms ``(row, variable, index in it, coefficient)``, arrays that broadcast."""
        for row, variable, index, value in terms:
            r, c, x = np.broadcast_arrays(row, index, np.asarray(value, dtype=float))
            self.entries.append((self.height + r.ravel(), self.start[variable] + c.ravel(), x.ravel()))
        self.rows[name] = slice(self.height, self.height + count)
        self.b.append(np.broadcast_to(np.asarray(b, dtype=float), count))
        self.cones += cones
        self.height += count

    def objective(self, **parts: Any) -> Array:
        """A vector over all variables."""
        out = np.zeros(self.width)
        for name, value in parts.items():
            out[self.start[name] : self.start[name] + self.sizes[name]] = value
        return out

    def solve(
        self, q: Array, P: Array, tol: float, max_steps: int, settle: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Array], int]:
        """Unknowns, multipliers by name of the rows, steps; as good as it got."""
        import clarabel  # type: ignore[import-untyped]
        from scipy import sparse

        rows, columns, values = (np.concatenate(part) for part in zip(*self.entries, strict=True))
        A = sparse.csc_matrix((-values, (rows, columns)), shape=(self.height, self.width))
        settings = clarabel.DefaultSettings()
        settings.verbose, settings.max_iter = False, max_steps
        for name in ("tol_gap_abs", "tol_gap_rel", "tol_feas"):
            setattr(settings, name, tol)
        for name, value in (settle or {}).items():
            setattr(settings, name, value)
        solver = clarabel.DefaultSolver(
            sparse.diags(P, format="csc"), q, A, np.concatenate(self.b), self.cones, settings
        )
        found = solver.solve()
        z = np.array(found.z)
        return np.array(found.x), {name: z[at] for name, at in self.rows.items()}, found.iterations

    def value(self, x: Array, name: str, *shape: int) -> Array:
        """A variable by name."""
        return x[self.start[name] : self.start[name] + self.sizes[name]].reshape(shape)


def widths(X: Array, M: Array, epsilon: float, columns: Array, norm: Norm) -> tuple[Array, Array]:
    """The largest t with ``e_ki x_k^T u - epsilon ||u||_* >= t max|x_k|``, -1 <= u <= 1, and that u, of every cell."""
    import clarabel

    n, P = M.shape
    d = X.shape[1]
    rows = (X != 0).any(1) | (epsilon > 0)  # a zero row bounds nothing, unless it is perturbed
    X, M = X[rows], M[rows]
    n = len(X)
    if n:  # rows of length one, so that a point far from the others does not make all cells look narrow
        size = np.maximum(np.abs(X).max(1), epsilon)
        X, radius = X / size[:, None], epsilon / size
    if not n:
        return np.ones(P), np.zeros((P, d))
    program = Program({"u": P * d, "t": P, **norm_sizes("", P, columns, norm, epsilon)})
    E = np.where(M, 1.0, -1.0).T
    i, k, j = np.arange(P)[:, None, None], np.arange(n)[None, :, None], np.arange(d)
    terms = [(i * n + k, "u", i * d + j, E[:, :, None] * X), ((i * n + k)[..., 0], "t", i[..., 0], -1.0)]
    if epsilon > 0:
        terms.append(((i * n + k)[..., 0], "norm", i[..., 0], -np.broadcast_to(radius, (P, n))))
    program.add("cells", [clarabel.NonnegativeConeT(P * n)], P * n, *terms)
    every = np.arange(P * d)
    for sign in (1.0, -1.0):
        program.add(f"box{sign}", [clarabel.NonnegativeConeT(P * d)], P * d, (every, "u", every, sign), b=1.0)
    norm_rows(program, "", "u", P, d, columns, norm, epsilon)
    x, _, _ = program.solve(program.objective(t=-1.0), np.zeros(program.width), 1e-10, 100)
    u = np.clip(program.value(x, "u", P, d), -1, 1)
    room = (E[:, :, None] * X * u[:, None, :]).sum(-1) - radius * dual_norm(u[:, columns], norm)[:, None]
    return room.min(1), u


def norm_sizes(name: str, count: int, columns: Array, norm: Norm, epsilon: float) -> dict[str, int]:
    if epsilon == 0:
        return {}
    return {f"{name}norm": count} | ({f"{name}abs": count * len(columns)} if norm == "l1" else {})


def norm_rows(
    program: Program, name: str, of: str, count: int, d: int, columns: Array, norm: Norm, epsilon: float
) -> None:
    """Rows for ``norm >= ||of||_*`` of every block of d numbers."""
    import clarabel

    if epsilon == 0:
        return
    m = len(columns)
    every, blocks = np.arange(count), np.arange(count)[:, None]
    if norm == "l2":
        cones = [clarabel.SecondOrderConeT(1 + m)] * count
        rows = blocks * (1 + m) + 1 + np.arange(m)
        terms = (every * (1 + m), f"{name}norm", every, 1.0), (rows, of, blocks * d + columns, 1.0)
        program.add(f"{name}ball", cones, count * (1 + m), *terms)
        return
    flat, entries = np.arange(count * m), (blocks * d + columns).ravel()
    for sign, label in ((1.0, "above"), (-1.0, "below")):
        terms = (flat, f"{name}abs", flat, 1.0), (flat, of, entries, sign)
        program.add(name + label, [clarabel.NonnegativeConeT(count * m)], count * m, *terms)
    terms = (every, f"{name}norm", every, 1.0), (blocks, f"{name}abs", flat.reshape(count, m), -1.0)
    program.add(f"{name}ball", [clarabel.NonnegativeConeT(count)], count, *terms)


def dual_norm(t: Array, norm: Norm) -> Array:
    return np.abs(t).sum(-1) if norm == "l1" else np.linalg.norm(t, axis=-1)


def or_one(t: Any) -> Any:
    """What may be divided by."""
    out = np.where(np.asarray(t) > 0, t, 1.0)
    return float(out) if out.ndim == 0 else out

"""A quadratic program as a module: some of its data held or learned, the rest passed in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difflayers._checks import check_tensor
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.linalg._autodiff import autocast_off
from difflayers.linalg._sparse_matrix import Matrix, SparseMatrix, check_layout, is_sparse, take_apart
from difflayers.linalg._system import times

from ._moreau import Moreau
from ._program_problem import ProgramSolver
from ._quadratic_program import ProgramPoint, default_solver, quadratic_program, quadratic_program_ex
from ._smoothing import check_smoothing

SHAPES = {"P": "nn", "factor": "nk", "G": "mn", "h": "m", "A": "pn", "b": "p", "x0": "n", "s0": "m"}
NAMES = tuple(SHAPES)


class QuadraticProgram(nn.Module):
    r"""A layer ``q -> argmin_x 1/2 x^T P x + q^T x s.t. A x = b, G x <= h``.

    Data given here are held by the module: tensors as buffers, an ``nn.Parameter`` as a parameter to be learned. All
    other data are passed to ``forward``, which takes each argument once, here or there. A :class:`SparseMatrix` stays
    sparse, and learns where its values are a parameter.

    A learned matrix must stay positive semidefinite, so P is learned by a factor: :math:`P = F F^T + r I` with
    `factor` F and `ridge` r > 0, which keeps the solution unique. A learned program must stay feasible, so bounds may
    be learned by a point: with `x0` and `s0`,

    .. math:: h = G x_0 + \mathrm{softplus}(s_0), \qquad b = A x_0,

    and :math:`x_0` is strictly feasible whatever is learned.

    Args:
        P: ``(n, n)`` positive semidefinite matrix; not a parameter.
        factor: ``(n, k)`` factor of P instead of `P`.
        G: ``(m, n)`` inequalities.
        h: ``(m)`` their bounds.
        A: ``(p, n)`` equalities.
        b: ``(p)`` their right-hand sides.
        x0: ``(n)`` feasible point, instead of `h` and `b`.
        s0: ``(m)`` its slacks before softplus; needed with `x0` where there are inequalities.
        ridge: r, at least 0.
        solver: As for :func:`quadratic_program`; None: by device, as ``repr`` says.
        smoothing: As for :func:`quadratic_program`.
        on_failure: ``"raise"``, ``"nan"`` or ``"ignore"``.

    Raises:
        ValueError: For data given twice, or a parameter `P`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from difflayers.conic import QuadraticProgram
        >>> simplex = {"G": -torch.eye(3), "h": torch.zeros(3), "A": torch.ones(1, 3), "b": torch.ones(1)}
        >>> model = nn.Sequential(nn.Linear(5, 3), QuadraticProgram(P=torch.eye(3), **simplex))
        >>> model(torch.randn(8, 5)).sum(-1)
        tensor([1., 1., 1., 1., 1., 1., 1., 1.], grad_fn=<SumBackward1>)
        >>> QuadraticProgram(factor=nn.Parameter(torch.eye(3)), A=torch.ones(1, 3))
        QuadraticProgram(factor=(3, 3) learned, A=(1, 3), ridge=0.0001, solver=Moreau(atol=1e-10, max_steps=200,
        active_set_limit=500) by device)

    Source: B. Amos, J. Z. Kolter, OptNet: Differentiable Optimization as a Layer in Neural Networks, 2017, sections 3
    and 4.4.
    Departure: slacks go through softplus; in the paper's experiments they may turn negative.
    """

    P: Tensor | None
    factor: Tensor | None
    G: Tensor | None
    h: Tensor | None
    A: Tensor | None
    b: Tensor | None
    x0: Tensor | None
    s0: Tensor | None

    def __init__(
        self,
        P: Matrix | None = None,
        G: Matrix | None = None,
        h: Tensor | None = None,
        A: Matrix | None = None,
        b: Tensor | None = None,
        *,
        factor: Tensor | None = None,
        x0: Tensor | None = None,
        s0: Tensor | None = None,
        ridge: float = 1e-4,
        solver: ProgramSolver | None = None,
        smoothing: float | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if isinstance(P, nn.Parameter) or (isinstance(P, SparseMatrix) and isinstance(P.values, nn.Parameter)):
            raise ValueError(
                "P: expected a tensor, got a Parameter; pass `factor`, which keeps P positive semidefinite"
            )
        if P is not None and factor is not None:
            raise ValueError("P, factor: expected one of them, got both")
        if x0 is not None and (h is not None or b is not None):
            raise ValueError("x0: expected instead of h and b, got both")
        if s0 is not None and x0 is None:
            raise ValueError("s0: expected together with x0, got it alone")
        check_smoothing(smoothing)
        check_policy(on_failure)
        if not ridge >= 0:
            raise ValueError(f"ridge: expected a number of at least 0, got {ridge}")
        self.shapes: dict[str, tuple[int, int]] = {}
        given = dict(zip(NAMES, (P, factor, G, h, A, b, x0, s0), strict=True))
        _check_shapes({name: M for name, M in given.items() if M is not None})
        for name, M in given.items():
            t: Any = M if M is None or not is_sparse(M) else self._hold_pattern(name, M)
            if isinstance(t, nn.Parameter):
                self.register_parameter(name, t)
            else:
                self.register_buffer(name, None if t is None else t.detach().clone())
        self.ridge, self.solver, self.smoothing, self.on_failure = ridge, solver, smoothing, on_failure

    def _hold_pattern(self, name: str, M: Matrix) -> Tensor:
        """Indices as buffers; returns the values. torch can neither copy nor save modules that hold CSR tensors."""
        if isinstance(M, Tensor):
            check_layout(name, M)
        if isinstance(M, nn.Parameter):
            raise ValueError(f"{name}: expected a SparseMatrix with a Parameter as values, got a sparse Parameter")
        parts = (M.crow_indices(), M.col_indices(), M.values(), M.shape) if isinstance(M, Tensor) else M
        crow, cols, values, (rows, columns) = parts
        self.register_buffer(f"{name}_crow_indices", crow.clone())
        self.register_buffer(f"{name}_col_indices", cols.clone())
        self.shapes[name] = rows, columns
        return values

    def _held(self, name: str) -> Any:
        t = getattr(self, name)
        if name not in self.shapes:
            return t
        crow, cols = (getattr(self, f"{name}_{which}_indices") for which in ("crow", "col"))
        return SparseMatrix(crow, cols, t, self.shapes[name])

    def data(
        self,
        P: Matrix | None = None,
        G: Matrix | None = None,
        h: Tensor | None = None,
        A: Matrix | None = None,
        b: Tensor | None = None,
    ) -> tuple[Matrix, Matrix | None, Tensor | None, Matrix | None, Tensor | None]:
        """``P, G, h, A, b`` as the program has them now: what is held, joined with what is passed.

        Args:
            P: Data not held by the module.
            G: The same.
            h: The same.
            A: The same.
            b: The same.
        """
        passed: dict[str, Any] = {"P": P, "G": G, "h": h, "A": A, "b": b}
        implied = {"P": self.factor, "h": self.x0, "b": self.x0}
        for name, t in passed.items():
            held = self._held(name)
            if t is not None and (held is not None or implied.get(name) is not None):
                raise ValueError(f"{name}: expected once, got it here and at construction")
            passed[name] = held if t is None else t
        if self.factor is not None:
            eye = torch.eye(len(self.factor), dtype=self.factor.dtype, device=self.factor.device)
            with autocast_off(eye):
                passed["P"] = self.factor @ self.factor.mT + self.ridge * eye
        if passed["P"] is None:
            raise ValueError("P: expected at construction (or `factor`), or here, got None")
        G, A = passed["G"], passed["A"]
        if self.x0 is not None and G is not None:
            if self.s0 is None:
                raise ValueError("s0: expected together with x0 where there are inequalities, got None")
            with autocast_off(self.x0):
                passed["h"] = _product(G, self.x0) + F.softplus(self.s0)
        if self.x0 is not None and A is not None:
            with autocast_off(self.x0):
                passed["b"] = _product(A, self.x0)
        return passed["P"], passed["G"], passed["h"], passed["A"], passed["b"]

    def forward(
        self,
        q: Tensor,
        P: Matrix | None = None,
        G: Matrix | None = None,
        h: Tensor | None = None,
        A: Matrix | None = None,
        b: Tensor | None = None,
        *,
        warm_start: Solution[ProgramPoint] | ProgramPoint | None = None,
    ) -> Tensor:
        """The minimisers; arguments as of :func:`quadratic_program`, those that are held excepted.

        Args:
            q: ``(*batch, n)`` linear part.
            P: Data not held by the module.
            G: The same.
            h: The same.
            A: The same.
            b: The same.
            warm_start: An earlier result of :meth:`solve`.

        Returns:
            ``(*batch, n)`` minimisers.
        """
        P, G, h, A, b = self.data(P, G, h, A, b)
        options: dict[str, Any] = {"solver": self.solver, "smoothing": self.smoothing, "on_failure": self.on_failure}
        return quadratic_program(P, q, G, h, A, b, warm_start=warm_start, **options)

    def solve(
        self,
        q: Tensor,
        P: Matrix | None = None,
        G: Matrix | None = None,
        h: Tensor | None = None,
        A: Matrix | None = None,
        b: Tensor | None = None,
        *,
        warm_start: Solution[ProgramPoint] | ProgramPoint | None = None,
    ) -> Solution[ProgramPoint]:
        """As ``forward``, with multipliers, slacks and status, unchecked: :func:`quadratic_program_ex`.

        Args:
            q: ``(*batch, n)`` linear part.
            P: Data not held by the module.
            G: The same.
            h: The same.
            A: The same.
            b: The same.
            warm_start: An earlier result.

        Returns:
            The unchecked solution.
        """
        P, G, h, A, b = self.data(P, G, h, A, b)
        options: dict[str, Any] = {"solver": self.solver, "smoothing": self.smoothing}
        return quadratic_program_ex(P, q, G, h, A, b, warm_start=warm_start, **options)

    def extra_repr(self) -> str:
        held = [(name, getattr(self, name)) for name in NAMES]
        parts = [
            f"{name}={self.shapes.get(name, tuple(t.shape))}"
            + " sparse" * (name in self.shapes)
            + " learned" * isinstance(t, nn.Parameter)
            for name, t in held
            if t is not None
        ]
        if self.factor is not None:
            parts.append(f"ridge={self.ridge:g}")
        if self.solver is not None:
            parts.append(f"solver={self.solver!r}")
        else:
            like = next((t for _, t in held if t is not None), None)
            by = "data" if self.shapes else "device"
            parts.append(
                "solver=by device"
                if like is None
                else f"solver={Moreau() if self.shapes else default_solver(like)!r} by {by}"
            )
        if self.smoothing is not None:
            parts.append(f"smoothing={self.smoothing:g}")
        if self.on_failure != "raise":
            parts.append(f"on_failure={self.on_failure!r}")
        return ", ".join(parts)


def _check_shapes(given: dict[str, Any]) -> None:
    """Refuses what is no tensor, and sizes that do not fit each other."""
    sizes: dict[str, tuple[int, str]] = {}
    for name, M in given.items():
        if not isinstance(M, SparseMatrix):
            check_tensor(name, M, min_ndim=len(SHAPES[name]))
        for letter, size in zip(SHAPES[name], M.shape[-len(SHAPES[name]) :], strict=True):
            expected, first = sizes.setdefault(letter, (size, name))
            if size != expected:
                shape = ", ".join(SHAPES[name])
                raise ValueError(
                    f"{name}: expected shape ({shape}) with {letter} = {expected} as of {first}, got {tuple(M.shape)}"
                )


def _product(M: Matrix, v: Tensor) -> Tensor:
    if not is_sparse(M):
        return times(M, v)  # type: ignore[arg-type]
    pattern, values = take_apart("M", M)
    return pattern.times(values, v)

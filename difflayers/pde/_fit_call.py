"""The arguments of :func:`~difflayers.pde.residual_least_squares`: checked, and as the tensors of its problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from difflayers._checks import broadcast_batch, check_same, check_shape, check_tensor, compute_dtype
from difflayers.implicit import Exact, GaussNewton, LevenbergMarquardt
from difflayers.linalg._autodiff import autocast_off, lifted_under_autocast, physical, sample, transforms_active
from difflayers.linalg._captured import Seen, gradients_wanted, refuse_held, refuse_probed, refuse_seen

from ._fit_problem import NAMES, NDIMS, FitProblem
from ._pointwise import Pointwise, flat_params, stacked

_pointwise = Seen()


class FitCall:
    """The arguments of a call, checked: one tensor for each of `NAMES` or None, and the parameters."""

    def __init__(
        self,
        basis_terms: Any,
        residual: Any,
        params: Any,
        offset: Any,
        weights: Any,
        rows: Any,
        equality: Any,
        ridge: Any,
        center: Any,
        init: Any,
        param_ndims: Any,
    ) -> None:
        if not callable(residual):
            raise ValueError(f"residual: expected a callable, got {type(residual).__name__}")
        B, names = stacked(basis_terms, "basis_terms", 2)
        T0, offset_names = stacked(offset, "offset", 1)
        if offset is not None and (names is None) != (offset_names is None):
            raise ValueError("offset: expected terms in the form of basis_terms, both stacked or both by name")
        if names is not None and offset_names is not None:
            if set(names) != set(offset_names):
                raise ValueError(
                    f"offset: expected the terms {', '.join(names)} as of basis_terms, got {', '.join(offset_names)}"
                )
            T0, _ = stacked({n: offset[n] for n in names}, "offset", 1)
        B = check_tensor("basis_terms", B, min_ndim=3)
        self.dtype = B.dtype
        N, T, K = B.shape[-3:]
        if 0 in (N, T, K):
            raise ValueError(f"basis_terms: expected at least one point, term and basis function, got {tuple(B.shape)}")
        A, y, row_weights = self._rows(rows, K)
        C, d = self._equality(equality, K)
        if isinstance(ridge, Tensor):
            check_tensor("ridge", ridge)
        elif not isinstance(ridge, int | float) or not ridge >= 0:
            raise ValueError(f"ridge: expected a tensor or a number of at least 0, got {ridge}")
        else:
            ridge = None if ridge == 0 else torch.full((), float(ridge), dtype=B.dtype, device=B.device)
        if center is not None and ridge is None:
            raise ValueError("center: expected None without a ridge (it would have no effect), got a tensor")
        for name, t, end, why in (
            ("offset", T0, (N, T), " in its last dimensions as basis_terms has points and terms"),
            ("weights", weights, (N,), " in its last dimension as basis_terms has points"),
            ("center", center, (K,), " in its last dimension as there are basis functions"),
            ("init", init, (K,), " in its last dimension as there are basis functions"),
        ):
            if t is not None:
                check_shape(name, check_tensor(name, t, min_ndim=len(end)).shape[-len(end) :], end, why)
        spec, leaves, tensors, events, kept = flat_params(params, param_ndims, N)
        if init is not None:
            init = init.detach()
        given = (B, T0, weights, A, y, row_weights, ridge, center, C, d, init)
        lifted = [lifted_under_autocast(t) for t in given]
        pairs = [(n, t) for n, t in zip(NAMES, lifted, strict=True) if t is not None]
        tensors = [lifted_under_autocast(t) for t in tensors]
        check_same([*pairs, *((n, t) for n, t in zip(kept, tensors, strict=True) if t.is_floating_point())])
        sizes = dict(zip(NAMES, NDIMS, strict=True))
        self.batch = broadcast_batch(
            [(n, tuple(t.shape[: t.ndim - sizes[n]])) for n, t in pairs]
            + [(n, tuple(t.shape[: t.ndim - k])) for n, t, k in zip(kept, tensors, events, strict=True)]
        )
        work = compute_dtype(self.dtype)
        named = {n: t.to(work) for n, t in pairs}
        tensors = [t.to(work) if t.is_floating_point() else t for t in tensors]
        if "weights" in named:
            kinds = {"basis_terms": 3, "offset": 2}
            _spare(named, {n: k for n, k in kinds.items() if n in named}, named["weights"])
            own = {i: t for i, t in enumerate(tensors) if events[i] == 1 and t.shape[-1] == N and N > 1}
            _spare(own, dict.fromkeys(own, 1), named["weights"])
            tensors = [own.get(i, t) for i, t in enumerate(tensors)]
        if "row_weights" in named:
            _spare(named, {"A": 2, "y": 1}, named["row_weights"])
        self.args = [*named.values(), *tensors]
        self.F = Pointwise(residual, names, spec, leaves)
        self.K = K
        self.events = tuple(events)
        self.kept = tuple(kept)
        self.present = tuple(t is not None for t in given)
        self._check_residual()

    @staticmethod
    def _rows(rows: Any, K: int) -> tuple[Any, Any, Any]:
        if rows is None:
            return None, None, None
        if not isinstance(rows, tuple | list) or len(rows) not in (2, 3):
            raise ValueError(f"rows: expected (A, y) or (A, y, row_weights), got {type(rows).__name__}")
        A, y = check_tensor("A", rows[0], min_ndim=2), check_tensor("y", rows[1], min_ndim=1)
        check_shape("A", A.shape[-1:], (K,), " in its last dimension as there are basis functions")
        check_shape("y", y.shape[-1:], A.shape[-2:-1], " in its last dimension as A has rows")
        weights = rows[2] if len(rows) == 3 else None
        if weights is not None:
            weights = check_tensor("row_weights", weights, min_ndim=1)
            check_shape("row_weights", weights.shape[-1:], A.shape[-2:-1], " in its last dimension as A has rows")
        return A, y, weights

    @staticmethod
    def _equality(equality: Any, K: int) -> tuple[Any, Any]:
        if equality is None:
            return None, None
        if not isinstance(equality, tuple | list) or len(equality) != 2:
            raise ValueError(f"equality: expected a pair (C, d), got {type(equality).__name__}")
        C, d = check_tensor("C", equality[0], min_ndim=2), check_tensor("d", equality[1], min_ndim=1)
        p = C.shape[-2]
        check_shape("C", C.shape[-1:], (K,), " in its last dimension as there are basis functions")
        check_shape("d", d.shape[-1:], (p,), " in its last dimension as C has rows")
        if not 0 < p < K:
            raise ValueError(f"C: expected between 1 and {K - 1} rows for {K} basis functions, got {p}")
        return C, d

    def _check_residual(self) -> None:
        """Refuses captured tensors, and once for a function, points that see each other."""
        if not gradients_wanted():
            return
        remedy = "Pass it in `params`"
        refuse_held(self.F.function, "residual", remedy)
        problem = self.problem(LevenbergMarquardt(), Exact())
        x = self.args[0].new_zeros(self._width())
        if transforms_active():
            refuse_probed(problem.lagrangian, (x, *self.args), "residual", remedy)
        if _pointwise.knows(self.F.function):
            return
        with torch.no_grad(), autocast_off(x):
            args = tuple(sample(t) for t in self.args)
            data, params = problem.unpack(args)
            w = args[0].new_ones(*torch.broadcast_shapes(*(self._own_batch(args))), self.K)
            T = problem.terms(w, data)
        if not transforms_active():
            with torch.enable_grad(), autocast_off(x):  # on constants: a result with a gradient captured something
                refuse_seen([self.F(T, tuple(p.detach() for p in params))], "residual", remedy)
        with autocast_off(x):
            if not T.is_meta and self.F.refuse_coupled_points(T, params):
                _pointwise.remember(self.F.function)

    def _own_batch(self, args: Any) -> list[Any]:
        ndims = [k for k, here in zip(NDIMS, self.present, strict=True) if here] + list(self.events)
        return [a.shape[: a.ndim - k] for a, k in zip(args, ndims, strict=True)]

    def _width(self) -> tuple[int, ...]:
        index = NAMES.index("d")
        d = self.args[sum(self.present[:index])] if self.present[index] else None
        return (*self.batch, self.K + (0 if d is None else d.shape[-1]))

    def problem(self, solver: Any, curvature: Any) -> FitProblem:
        """The problem without its tensors."""
        if not isinstance(solver, LevenbergMarquardt):
            raise ValueError(f"solver: expected LevenbergMarquardt(), got {solver!r}")
        if not isinstance(curvature, Exact | GaussNewton):
            raise ValueError(f"curvature: expected Exact() or GaussNewton(), got {curvature!r}")
        return FitProblem(self.F, self.present, self.events, self.kept, solver, isinstance(curvature, GaussNewton))


def _spare(named: dict[Any, Tensor], ndims: dict[Any, int], weights: Tensor) -> None:
    """Puts the data of the first row that counts where those of a row of weight 0 are not finite.

    The product with the weight would be NaN, and so would its derivatives be. Data that are finite stay: the second
    derivative by a weight of 0 depends on them. `ndims` are the trailing dimensions of a tensor from that of rows on.
    """
    zero = weights == 0
    if physical(zero).is_meta or not bool(physical(zero).any()):
        return
    first = (~zero).to(torch.uint8).argmax(-1, keepdim=True)
    for name, k in ndims.items():
        t = named[name]
        if not t.is_floating_point():
            continue
        finite = torch.isfinite(t) if k == 1 else torch.isfinite(t).flatten(t.ndim - k + 1).all(-1)
        bad = zero & ~finite
        if bool(physical(bad).any()):
            behind = (...,) + (None,) * (k - 1)
            t = t.expand(*bad.shape[:-1], *t.shape[t.ndim - k :])
            other = torch.take_along_dim(t, first.expand(*bad.shape[:-1], 1)[behind], -k)
            other = torch.where(torch.isfinite(other), other, 0)  # where no row counts
            named[name] = torch.where(bad[behind], other, t)

r"""UPGrad: one descent direction for many objectives, which none of them resists.

Every gradient is projected on the cone of directions that no objective resists, the dual cone of the rows of the
Jacobian J, and the projections are averaged:

.. math:: \mathrm{UPGrad}(J) = \sum_i c_i \, \pi_J(J^T e_i) = J^T w, \qquad
    \pi_J(x) = \arg\min_{g :\, J g \ge 0} \tfrac12 \|g - x\|^2 .

P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, equations 3 and 4 and proposition 1. All
that is solved is in terms of the Gramian :math:`G = J J^T`, with rows scaled to length 1: since the projection of a
scaled row is the scaled projection, nothing else changes, and objectives of very different size do no harm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from difflayers._checks import broadcast_batch, check_same, check_tensor, compute_dtype
from difflayers._solution import OnFailure, Solution, check_policy
from difflayers.implicit import solution_map, solution_map_ex
from difflayers.linalg._autodiff import autocast_off, transforms_active
from difflayers.proximal._operands import Operand, check_range, check_that, shown

from ._dual_cone import BlockPivoting, dual_cone_problem


def dual_cone_weights(
    u: Tensor,
    gramian: Tensor,
    *,
    ridge: float = 0.0,
    solver: BlockPivoting | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """The weights of rows that project a combination of them on their dual cone.

    Solves ``argmin_w 1/2 w^T G w s.t. w >= u``: with ``G = J J^T``, the vector nearest to ``J^T u`` that has no
    negative product with a row of J is ``J^T w``.

    Args:
        u: ``(*batch, m)``; several vectors for one Gramian go in front, ``(k, *batch, m)``, and share its products.
        gramian: ``(*batch, m, m)`` positive semidefinite; of a matrix that is not symmetric the symmetric part counts.
        ridge: What is added to the diagonal, as a share of the trace, at least 0. With 0 products are non-negative to
            rounding; TorchJD uses 1e-4.
        solver: How the entries above their bound are found; None: ``BlockPivoting()``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        Weights w, shaped like `u`.

    Raises:
        ValueError: For shapes that do not fit, NaN or Inf, or a negative `ridge`.
        SolveError: For a matrix that cannot be a Gramian (products larger than lengths allow), or turns out not to be
            one; not every indefinite matrix is noticed.

    Differentiable in `u` and `gramian`, to any order. An entry at its bound with a zero multiplier counts as fixed.
    Where rows that count are linearly dependent, w is not unique (``J^T w`` is): one close to the smallest is returned,
    and its derivative is that of the smallest solution of the equations that hold.

    Example:
        >>> import torch
        >>> from difflayers.conic import dual_cone_weights
        >>> J = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> w = dual_cone_weights(torch.tensor([1.0, 0.0]), J @ J.T)
        >>> w @ J
        tensor([0.5000, 0.5000])

    Source: P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, proposition 1.
    """
    U, M, back = _scaled_rows(u, gramian, ridge, on_failure)
    problem = dual_cone_problem(solver or BlockPivoting(), ("gramian", "u"), _differentiated(M, U))
    with autocast_off(u):
        return back(solution_map(problem, (M, U), on_failure=on_failure))


def dual_cone_weights_ex(
    u: Tensor, gramian: Tensor, *, ridge: float = 0.0, solver: BlockPivoting | None = None
) -> Solution[Tensor]:
    """As :func:`dual_cone_weights`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        u: As there.
        gramian: As there.
        ridge: As there.
        solver: As there.

    Returns:
        The weights; of every Gramian (all its vectors together) the status, the most pivots, and the largest violation
        of an optimality condition with rows and u scaled to 1.
    """
    U, M, back = _scaled_rows(u, gramian, ridge, "ignore")
    problem = dual_cone_problem(solver or BlockPivoting(), ("gramian", "u"), _differentiated(M, U))
    with autocast_off(u):
        found = solution_map_ex(problem, (M, U))
        return Solution(back(found.value), found.status, found.steps, found.residual)


def upgrad_weights(
    gramian: Tensor,
    preference: Tensor | Sequence[float] | None = None,
    *,
    ridge: float = 0.0,
    solver: BlockPivoting | None = None,
    on_failure: OnFailure = "raise",
) -> Tensor:
    """Weights of objectives whose combined gradient no objective resists, from the Gramian of their gradients.

    Solves ``w = sum_i c_i argmin_v {1/2 v^T G v : v >= e_i}`` with the preference c, for all i at once.

    Args:
        gramian: ``(*batch, m, m)``, the products of the gradients of m objectives.
        preference: How much each objective counts, at least 0: ``(m,)`` or ``(*batch, m)``. None: ``1 / m`` each.
        ridge: What is added to the diagonal, as a share of the trace, at least 0. With 0 the combined gradient has no
            negative product with any gradient (to rounding), and weights do not depend on the scale of a gradient but
            for that scale itself; TorchJD uses 1e-4.
        solver: How the projections are found; None: ``BlockPivoting()``.
        on_failure: ``"raise"``, ``"nan"`` (NaN for failed elements alone) or ``"ignore"``.

    Returns:
        ``(*batch, m)`` weights w, each at least its preference: the direction is ``w @ J``.

    Raises:
        ValueError: For shapes that do not fit, NaN or Inf, or a negative `preference` or `ridge`.
        SolveError: For a matrix that cannot be a Gramian (products larger than lengths allow), or turns out not to be
            one; not every indefinite matrix is noticed.

    Differentiable in `gramian` and `preference`, to any order; kinks and dependent rows as in
    :func:`dual_cone_weights`.

    Example:
        >>> import torch
        >>> from difflayers.conic import upgrad_weights
        >>> J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> w = upgrad_weights(J @ J.T)
        >>> w
        tensor([1.1111, 0.7895])
        >>> w @ J
        tensor([0.2924, 1.9006, 1.9006])

    Source: P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, equation 4 and proposition 1.
    Departure: no ridge by default, so that the direction is exactly non-conflicting.
    """
    check_tensor("gramian", gramian, min_ndim=2)
    return _combined(gramian, preference, ridge, solver, on_failure, "gramian")[0]


def upgrad_weights_ex(
    gramian: Tensor,
    preference: Tensor | Sequence[float] | None = None,
    *,
    ridge: float = 0.0,
    solver: BlockPivoting | None = None,
) -> Solution[Tensor]:
    """As :func:`upgrad_weights`, returning an unchecked :class:`~difflayers.Solution`.

    Args:
        gramian: As there.
        preference: As there.
        ridge: As there.
        solver: As there.

    Returns:
        The weights, with status, the most pivots of a projection, and the largest violation of an optimality condition
        with rows scaled to 1.
    """
    check_tensor("gramian", gramian, min_ndim=2)
    w, found = _combined(gramian, preference, ridge, solver, "ignore", "gramian")
    return Solution(w, found.status, found.steps, found.residual)


class UPGrad(nn.Module):
    """Combines the gradients of several objectives into a direction that increases none of them, to first order.

    Solves ``sum_i c_i argmin_g {1/2 ||g - J_i||^2 : J g >= 0}``. It is the mean of the gradients (with the default
    preference) where no two of them conflict, and linear in the scale of each.

    Args:
        preference: As in :func:`upgrad_weights`. A tensor becomes a buffer, a parameter stays one.
        ridge: As in :func:`upgrad_weights`.
        solver: As in :func:`upgrad_weights`.
        on_failure: As in :func:`upgrad_weights`.

    Shape:
        Jacobian ``(*batch, m, d)``, one gradient a row; output ``(*batch, d)``.

    Differentiable in the Jacobian and the preference, to any order. The direction is unique also where rows are
    linearly dependent; there, unless it is zero, its derivative may be one-sided, and that of the smallest weights is
    meant. A row of zeros, where it jumps, counts as absent: its derivative is zero.

    Example:
        >>> import torch
        >>> from difflayers.conic import UPGrad
        >>> UPGrad()(torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]))
        tensor([0.2924, 1.9006, 1.9006])

    Source: P. Quinton, V. Rey, Jacobian Descent For Multi-Objective Optimization, 2024, equation 4.
    Departure: no ridge by default, so that the direction is exactly non-conflicting.
    """

    preference: Tensor | None

    def __init__(
        self,
        preference: Tensor | Sequence[float] | None = None,
        *,
        ridge: float = 0.0,
        solver: BlockPivoting | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        check_policy(on_failure)
        check_range(Operand("ridge", ridge, 0, at_least=0))
        if isinstance(preference, nn.Parameter):
            self.preference = preference
        else:
            if preference is not None and not isinstance(preference, Tensor):
                preference = torch.tensor(preference, dtype=torch.get_default_dtype(), device="cpu")
            self.register_buffer("preference", preference)
        if self.preference is not None:
            _check_preference(self.preference)
        self.ridge, self.solver = ridge, solver
        self.on_failure: OnFailure = on_failure

    def extra_repr(self) -> str:
        """The options."""
        shown = None if self.preference is None else tuple(self.preference.shape)
        return f"preference={shown}, ridge={self.ridge}, solver={self.solver}, on_failure={self.on_failure!r}"

    def forward(self, jacobian: Tensor) -> Tensor:
        """The direction."""
        check_tensor("jacobian", jacobian, min_ndim=2)
        with autocast_off(jacobian):
            J = jacobian.to(compute_dtype(jacobian.dtype))
            lost = None
            if self.on_failure == "nan":
                given, lost = J, ~torch.isfinite(J.detach()).flatten(-2).all(-1)[..., None, None]
                J = torch.where(lost, 1, J)
            G = J @ J.mT
            if lost is not None:
                G = torch.where(lost, given.sum((-2, -1), keepdim=True), G)
            w = _combined(G, self.preference, self.ridge, self.solver, self.on_failure, "jacobian")[0]
            present = G.detach().diagonal(dim1=-2, dim2=-1) != 0
            return (torch.where(present, w, 0).unsqueeze(-2) @ J).squeeze(-2).to(jacobian.dtype)


def _combined(
    gramian: Tensor,
    preference: Tensor | Sequence[float] | None,
    ridge: float,
    solver: BlockPivoting | None,
    on_failure: OnFailure,
    name: str,
) -> tuple[Tensor, Solution[Tensor]]:
    """The weights, and the projections of the unit vectors: those of ``c_i e_i`` are multiples of them."""
    dtype, m = gramian.dtype, gramian.shape[-1]
    M, size = _unit_diagonal(gramian, ridge, on_failure, name)
    unit = torch.eye(m, dtype=M.dtype, device=M.device)
    if preference is not None:
        preference = preference if isinstance(preference, Tensor) else gramian.new_tensor(preference)
        check_tensor("preference", preference, min_ndim=1)
        check_same([(name, gramian), ("preference", preference)])
        if preference.shape[-1] != m:
            raise ValueError(f"preference: expected {m} entries as of {name}, got shape {tuple(preference.shape)}")
        _check_preference(preference)
        broadcast_batch([(name, tuple(M.shape[:-2])), ("preference", tuple(preference.shape[:-1]))])
    problem = dual_cone_problem(solver or BlockPivoting(), (name, "u"), _differentiated(M))
    with autocast_off(M):
        found = solution_map_ex(problem, (M, unit)) if on_failure == "ignore" else None
        V = solution_map(problem, (M, unit), on_failure=on_failure) if found is None else found.value
        counts = size / max(1, m) if preference is None else preference.to(M.dtype) * size
        lost = torch.isnan(V.detach()).flatten(-2).any(-1, keepdim=True) if on_failure == "nan" else None
        used = V if lost is None else torch.where(lost.unsqueeze(-1), 0, V)  # no NaN may meet what others share
        w = (counts.unsqueeze(-1) * used).sum(-2) / size
        w = w if lost is None else torch.where(lost, V[..., 0, :], w)
    return w.to(dtype), found or Solution(V, V, V, V)


def _unit_diagonal(gramian: Tensor, ridge: float, on_failure: OnFailure, name: str) -> tuple[Tensor, Tensor]:
    """The Gramian of rows scaled to length 1, and their lengths ``(*batch, m)``; 1 for a row of zeros."""
    check_policy(on_failure)
    check_range(Operand("ridge", ridge, 0, at_least=0))
    m = gramian.shape[-1]
    if gramian.shape[-2] != m:
        raise ValueError(f"{name}: expected a square matrix, got shape {tuple(gramian.shape)}")
    with autocast_off(gramian):
        G = gramian.to(compute_dtype(gramian.dtype))
        G = (G + G.mT) / 2
        eye = torch.eye(m, dtype=G.dtype, device=G.device)
        lost = ~torch.isfinite(G.detach()).flatten(-2).all(-1)[..., None, None] if on_failure == "nan" else None
        given, G = G, G if lost is None else torch.where(lost, eye, G)
        diagonal = G.diagonal(dim1=-2, dim2=-1)
        if ridge:
            diagonal = diagonal + ridge * diagonal.sum(-1, keepdim=True)
        usable = (diagonal.detach() != 0) & torch.isfinite(diagonal.detach())
        size = torch.where(usable, diagonal, 1).abs().sqrt()
        M = G / size.unsqueeze(-1) / size.unsqueeze(-2)
        on_diagonal = torch.where(usable, diagonal / size**2, torch.where(diagonal == 0, 1, diagonal))
        M = M.diagonal_scatter(on_diagonal, dim1=-2, dim2=-1)
        # an element that is lost goes as it came: it fails, and only who asks for its gradient gets NaN
        return M if lost is None else torch.where(lost, given, M), size


def _scaled_rows(
    u: Tensor, gramian: Tensor, ridge: float, on_failure: OnFailure
) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Vectors in terms of rows of length 1 and of size 1 themselves, as rows of one matrix, and the way back."""
    check_tensor("u", u, min_ndim=1)
    check_tensor("gramian", gramian, min_ndim=2)
    check_same([("u", u), ("gramian", gramian)])
    M, size = _unit_diagonal(gramian, ridge, on_failure, "gramian")
    if u.shape[-1] != M.shape[-1]:
        raise ValueError(f"u: expected {M.shape[-1]} entries as of gramian, got shape {tuple(u.shape)}")
    extra = max(0, u.ndim - M.ndim + 1)
    lead = u.shape[:extra]
    wide = u.to(M.dtype)
    U = wide.flatten(0, extra - 1).movedim(0, -2) if extra else wide.unsqueeze(-2)
    broadcast_batch([("gramian", tuple(M.shape[:-2])), ("u", tuple(U.shape[:-2]))])
    size = size.unsqueeze(-2)
    masked = on_failure == "nan"
    U = (
        torch.where(torch.isfinite(U.detach()), torch.where(torch.isfinite(U.detach()), U, 0) * size, U)
        if masked
        else U * size
    )
    largest = U.detach().abs().amax(-1, keepdim=True) if U.numel() else U.detach().sum(-1, keepdim=True)
    largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)

    def back(W: Tensor) -> Tensor:
        lost = torch.isnan(W.detach()) if masked else None
        w = (W if lost is None else torch.where(lost, 0, W)) * largest / size
        w = w if lost is None else torch.where(lost, W, w)
        w = w.movedim(-2, 0).unflatten(0, lead) if extra else w.squeeze(-2)
        return w.to(u.dtype)

    return U / largest, M, back


def _check_preference(preference: Tensor) -> None:
    """Reads one flag."""
    check_that(
        (preference >= 0) & torch.isfinite(preference),
        lambda: f"preference: expected finite numbers of at least 0, got {shown(preference)}",
    )


def _differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative may be asked for."""
    return transforms_active() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))

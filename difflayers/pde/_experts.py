"""A mixture of experts: a domain in parts, each with coefficients of its own for the basis that they share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from difflayers._checks import check_tensor
from difflayers._solution import Info, OnFailure, SolveWarning
from difflayers.linalg._autodiff import opaque

from ._assembly import Given, assemble, dtype_and_device
from ._constraint import PDEConstraint, fitted
from ._derivatives import Basis
from ._divided import Divided
from ._expert_mesh import copied, gathered_all, settled, share, together
from ._field import Evaluator, ExpertField
from ._gates import Gate, HardBoxes
from ._interface import Continuity, Seams, joint_call
from ._residual_least_squares import ResidualSolution
from ._samplers import Grid, Place

Solved = tuple[Place, ResidualSolution, Callable[[], Tensor], dict[str, Tensor], dict[str, Tensor]]


class DomainExperts(nn.Module):
    r"""A constraint on every part of a domain for itself: smaller problems, solved at once.

    The field on box e is ``offset + basis . w_e``, with the coefficients that :class:`PDEConstraint` finds on that box
    alone: its own points, and the conditions on the part of the boundary that it touches. All experts share the basis,
    so one network serves all of them.

    Args:
        constraint: Equation, derivatives, sampler, solver and weights. :class:`Sobol` draws its number of points in
            every box; the points of :class:`Grid` and :class:`Fixed` are divided.
        gate: :class:`HardBoxes` or :class:`PartitionOfUnity`.
        conditions: ``"touching"``, or ``"all"``: every expert gets the conditions on all of the boundary, also far from
            its box, as in the paper.
        continuity: :class:`Continuity` couples neighbours, also across the ends of a periodic coordinate of a grid.
            None: the experts are independent.
        mesh: A one-dimensional ``DeviceMesh`` of torch.distributed whose ranks share the experts, None: all of them
            here. Every rank calls the layer with the same arguments, gets the whole field, and the gradients of a loss
            that every rank computes alike: those of one process, no averaging. What needs a gradient has to be a tensor
            or in a module then, not in a closure.

    Shape:
        As :class:`PDEConstraint`, with an :class:`ExpertField` as result. Tensors in `params` and `values` are
        ``(*batch, 1)``, or have a number for each point of the undivided grid or face; functions of points see the
        points of all experts. `init` is ``(*batch, E, K)``.

    Raises:
        ValueError: As :class:`PDEConstraint`; for an expert without points, and a :class:`Periodic` condition on a
            coordinate that is divided among experts which only have what they touch.
        SolveError: For an expert that diverged or whose minimiser is not unique, with its index.

    Differentiable as :class:`PDEConstraint`, to any order, also under a mesh (where an adjoint that fails gives NaN
    instead of an error). A failed expert leaves the others as they are, to the last bit. An expert that touches no
    condition gives a :class:`~difflayers.SolveWarning` when the layer is made: its problem is most likely ill-posed.

    Example:
        >>> import math, torch
        >>> from difflayers.pde import Box, Continuity, Dirichlet, DomainExperts, HardBoxes, Helmholtz, PDEConstraint
        >>> ends = (Dirichlet("x=0"), Dirichlet("x=2", 1.0))
        >>> wave = Helmholtz(domain=Box(x=(0.0, 2.0)), conditions=ends, k=1.0, f=0.0)
        >>> layer = DomainExperts(PDEConstraint(wave), HardBoxes(x=2), continuity=Continuity(1, exact=True)).double()
        >>> field = layer(lambda point: point ** torch.arange(8, dtype=torch.float64))
        >>> value = field(torch.tensor([[1.5]], dtype=torch.float64))
        >>> print(f"{value.item():.4f}, {math.sin(1.5) / math.sin(2.0):.4f}")
        1.0970, 1.0970

    Source: N. Chalapathi, Y. Du, A. S. Krishnapriyan, Scaling physics-informed hard constraints with
    mixture-of-experts, 2024.

    Departure: the paper's experts take all conditions, and nothing ties neighbours; here both can be chosen.
    """

    def __init__(
        self,
        constraint: PDEConstraint,
        gate: Gate,
        *,
        conditions: Literal["touching", "all"] = "touching",
        continuity: Continuity | None = None,
        mesh: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(constraint, PDEConstraint):
            raise ValueError(f"constraint: expected a PDEConstraint, got {type(constraint).__name__}")
        if not isinstance(gate, HardBoxes):
            raise ValueError(f"gate: expected HardBoxes or PartitionOfUnity, got {type(gate).__name__}")
        if conditions not in ("touching", "all"):
            raise ValueError(f'conditions: expected "touching" or "all", got {conditions!r}')
        if continuity is not None and not isinstance(continuity, Continuity):
            raise ValueError(f"continuity: expected None or Continuity(), got {continuity!r}")
        if continuity is not None and mesh is not None:
            raise ValueError("continuity: expected None under a mesh (it makes one problem of all experts), got one")
        self.constraint, self.gate, self.conditions = constraint, gate, conditions
        self.continuity, self.mesh = continuity, mesh
        pde = constraint.pde
        self.tiling = gate.tiling(pde.domain)
        closed = {b.axis for b in pde.blocks if b.paired}
        if isinstance(constraint.sampler, Grid):
            closed |= {i for i, circle in enumerate(constraint.sampler.periodic) if circle}
        self.seams = self.tiling.seams(tuple(i in closed for i in range(len(pde.coords))))
        cut = [pde.coords[b.axis] for b in pde.blocks if b.paired and self.tiling.shape[b.axis] > 1]
        if cut and conditions == "touching":
            raise ValueError(
                f"gate: expected no division of {cut[0]}, on which there is a periodic condition between experts, got "
                f'{gate}; leave the condition away and take a periodic basis, or conditions="all"'
            )
        self._warn_of_lone_experts()

    def _warn_of_lone_experts(self) -> None:
        """Experts that see nothing of the conditions."""
        blocks = self.constraint.pde.blocks
        if not blocks or self.conditions == "all" or self.continuity is not None:
            return
        touching = [any(here) for here in zip(*(self.tiling.touches(b.axis, b.upper) for b in blocks), strict=True)]
        lone = [e for e, here in enumerate(touching) if not here]
        if lone:
            warnings.warn(
                f"DomainExperts: experts {', '.join(map(str, lone[:8]))} touch no condition: their problems are most "
                'likely ill-posed. Divide another coordinate, tie neighbours by `continuity`, or set conditions="all".',
                SolveWarning,
                stacklevel=3,
            )

    @property
    def boxes(self) -> Any:
        """The box of every expert, see :class:`Box`."""
        return self.tiling.boxes()

    def extra_repr(self) -> str:
        """Gate, conditions, continuity."""
        return f"{self.gate}, conditions={self.conditions!r}, continuity={self.continuity}"

    def forward(
        self,
        basis: Basis,
        params: Given | None = None,
        values: Given | None = None,
        *,
        offset: Basis | None = None,
        init: Tensor | None = None,
    ) -> ExpertField:
        """The field that the equation makes of a basis on every box."""
        if init is not None:
            init, E = check_tensor("init", init, min_ndim=2).detach(), self.tiling.count
            if init.shape[-2] != E:
                raise ValueError(f"init: expected a tensor (*batch, {E}, K), got {tuple(init.shape)}")
        return _solved(self, basis, params, values, offset, init)


@opaque
def _solved(
    layer: DomainExperts,
    basis: Basis,
    params: Given | None,
    values: Given | None,
    offset: Basis | None,
    init: Tensor | None,
) -> ExpertField:
    given = basis, params, values, offset, init
    if layer.mesh is None:
        inside, found, objective, terms, norms = _part(
            layer, range(layer.tiling.count), given, layer.constraint.on_failure
        )
    else:
        inside, found, objective, terms, norms = _over_mesh(layer, given)
    inner = layer.constraint
    recipe = inner.recipe(inner.sampler)
    report = found.status, found.steps, found.residual, found.multipliers, found.linear
    evaluate = Evaluator(recipe, basis, offset, layer.tiling)
    sampler = Divided(inner.sampler, layer.tiling, False, range(layer.tiling.count))
    jumps = Seams(recipe, sampler, layer.seams).jumps(basis, offset, found.value)
    more = inside.present, layer.boxes, layer.seams, jumps
    return ExpertField(found.value, *report, inside.points, terms, norms, evaluate, objective, *more)


def _part(layer: DomainExperts, experts: Sequence[int], given: tuple[Any, ...], on_failure: OnFailure) -> Solved:
    """Some of the experts: their points, coefficients with a report, what computes the objective, terms and norms."""
    inner = layer.constraint
    sampler = Divided(inner.sampler, layer.tiling, layer.conditions == "all", experts)
    basis, params, values, offset, init = given
    like = dtype_and_device(basis, inner._like)
    parts = assemble(inner.recipe(sampler), basis, params, values, offset, like)
    if layer.continuity is None or not layer.seams:
        here = None if init is None else init[..., list(experts), :]
        found, objective = fitted(inner, parts.call(inner.ridge, here), on_failure, "DomainExperts")
    else:
        seams = Seams(parts.recipe, sampler, layer.seams)
        rows = seams.rows(basis, offset, layer.continuity, parts.inside.points)
        whole = joint_call(parts, inner.ridge, init, rows, layer.continuity)
        joint, objective = fitted(inner, whole, on_failure, "DomainExperts")
        E = layer.tiling.count
        status, steps, residual, linear = (
            t.unsqueeze(-1).expand(*t.shape, E) for t in (joint.status, joint.steps, joint.residual, joint.linear)
        )
        w = joint.value.unflatten(-1, (E, -1))
        found = ResidualSolution(w, status, steps, residual, joint.multipliers, linear)
    terms = parts.terms(found.value)
    return parts.inside, found, objective, terms, parts.norms(found.value, terms)


def _over_mesh(layer: DomainExperts, given: tuple[Any, ...]) -> Solved:
    """All experts, of which this process solves its own."""
    inner, mesh, E = layer.constraint, layer.mesh, layer.tiling.count
    mine = share(E, mesh)
    basis, params, values, offset, init = given
    tree = {
        "basis": basis,
        "params": {**inner.pde.params, **(params or {})},
        "values": dict(values or {}),
        "offset": offset,
    }
    tree = copied(tree, mesh)
    # a failure is raised once everybody knows of it: nobody waits for a process that has left; if an adjoint fails
    # later, the gradient is NaN in all of them
    quiet: OnFailure = "nan" if inner.on_failure == "raise" else inner.on_failure

    def work() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SolveWarning)  # of all experts below
            inside, found, objective, terms, norms = _part(layer, mine, (*tree.values(), init), quiet)
        return inside, found, objective(), terms, norms

    inside, found, optimum, terms, norms = together(mesh, work)
    own = found.multipliers
    if any(block.exact for block in inner.pde.blocks):  # which rows depend on others may differ between processes
        here = torch.full((len(mine),), own.shape[-1], dtype=torch.int64, device=own.device)
        (widths,) = gathered_all([here], E, mesh, [0])
        own = torch.nn.functional.pad(own, (0, int(widths.max()) - own.shape[-1]))
    wide = [found.value, own, *terms.values()]
    narrow = [found.status, found.steps, found.residual, found.linear, optimum, *norms.values()]
    dims = [-2] * len(wide) + [-1] * len(narrow)
    value, nu, *rest = gathered_all([*wide, *narrow], E, mesh, dims, tied=tree)
    terms = dict(zip(terms, rest, strict=False))
    status, steps, residual, linear, optimum, *rest = rest[len(terms) :]
    norms = dict(zip(norms, rest, strict=True))
    settled(value, Info(status, steps, residual), inner.on_failure, "DomainExperts")
    sampler = Divided(inner.sampler, layer.tiling, layer.conditions == "all", range(E))
    whole = sampler.interior(inner.pde, inside.points)
    solution = ResidualSolution(value, status, steps, residual, nu, linear)
    return whole, solution, lambda: optimum, terms, norms

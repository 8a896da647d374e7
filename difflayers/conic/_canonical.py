r"""From a CVXPY problem to a cone program whose data are affine functions of the parameters.

CVXPY's own canonicalisation, for a solver without variable bounds and without cones directly on variables, so that each
constraint becomes rows. What is kept of it is where each parameter enters,

.. math:: q_i = q^0_i + \sum_k c_k\,\theta_{j_k}, \qquad \text{and so for } A, b, P,

in plain tensors: nothing of CVXPY is needed, or pickled, after that. A. Agrawal, B. Amos, S. Barratt, S. Boyd,
S. Diamond, J. Z. Kolter, Differentiable Convex Optimization Layers, 2019, section 4.1.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._cones import Cone, NonNegative, Zero
from ._conic_layout import Layout, grouped
from ._exponential import Exponential
from ._positive_semidefinite import PositiveSemidefinite
from ._power import Power
from ._second_order import SecondOrder

SOLVER = "SCS"  # whose conventions are taken: all constraints are rows, powers in cones of three


@dataclass(frozen=True, eq=False)
class Affine:
    """A tensor of `shape` that is an affine function of parameters."""

    shape: tuple[int, ...]
    constant: Tensor
    terms: tuple[tuple[int, Tensor, Tensor, Tensor], ...]  # parameter, its entries, where they go, coefficients

    def at(self, parameters: Sequence[Tensor], like: Tensor) -> Tensor:
        """Its value; with batch dimensions where a parameter that enters has some."""
        value = self.constant.to(like)
        for k, entries, places, coefficients in self.terms:
            device = like.device
            part = parameters[k][..., entries.to(device)] * coefficients.to(like)
            zero = part.new_zeros((*part.shape[:-1], math.prod(self.shape)))
            value = value + zero.index_add(-1, places.to(device), part)
        return value.unflatten(-1, self.shape) if len(self.shape) > 1 else value


@dataclass(frozen=True, eq=False)
class Entries:
    """Where a parameter's or a variable's entries are: gathered by two indices, or scattered with a weight."""

    name: str
    shape: tuple[int, ...]
    first: Tensor
    second: Tensor
    sign: Literal["any", "nonneg", "nonpos"] = "any"
    weight: Tensor | None = None
    dual: bool = False


@dataclass(frozen=True, eq=False)
class Canonical:
    """A cone program with parameters.

    Attributes:
        q: Objective.
        A: Rows.
        b: Right-hand sides.
        P: Quadratic part, or None.
        layout: Cones of the rows.
        parameters: How each of them becomes a vector.
        variables: Where each of them is in the solution.
        logarithmic: Parameters of a geometric program that enter by their logarithm; None for other programs.
    """

    q: Affine
    A: Affine
    b: Affine
    P: Affine | None
    layout: Layout
    parameters: tuple[Entries, ...]
    variables: tuple[Entries, ...]
    logarithmic: tuple[bool, ...] | None


def canonicalise(problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool) -> Canonical:
    """Refuses what is no program of this kind, and takes the others apart."""
    from cvxpy.error import SolverError
    from cvxpy.utilities import scopes

    _check(problem, parameters, variables, gp)
    with scopes.quad_form_dpp_scope():
        logs: dict[Any, Any] = {}
        var_ids: dict[int, int] = {}
        convex = problem
        if gp:
            from cvxpy.reductions import Dgp2Dcp

            reduction = Dgp2Dcp(problem)
            convex, _ = reduction.apply(problem)
            logs = dict(reduction.canon_methods._parameters)
            var_ids = {old: new[0] for old, new in reduction.var_id_map.items()}
        with warnings.catch_warnings():  # CVXPY warns of how it reads sparse parameters
            warnings.simplefilter("ignore")
            try:
                data, chain, _ = convex.get_problem_data(SOLVER)
            except SolverError as error:  # a linear or constant objective with no constraint at all
                raise ValueError(f"problem: expected one with a constraint or a curved objective: {error}") from None
    program = data["param_prob"]
    inner_vars = {old: new[0] for old, new in chain.compose_var_id_map().items()}
    inner_params = {old: new[0] for old, new in chain.compose_param_id_map().items()}
    inner_rows = chain.compose_constr_id_map()

    def column(p: Any) -> int:
        own = logs.get(p, p).id
        return int(program.param_id_to_col[inner_params.get(own, own)])

    def start(v: Any) -> int:
        own = var_ids.get(v.id, v.id)
        return int(program.var_id_to_col[inner_vars.get(own, own)])

    layout, order = _rows_of(program)
    reduced = [_vector_of(p) for p in parameters]
    columns = {column(p): k for k, p in enumerate(parameters)}
    split = _Split(columns, [len(e.first) for e in reduced])
    n, m = int(program.x.size), len(order)
    offsets, place = {}, 0
    for c in program.constraints:
        offsets[c.id] = (place, type(c).__name__)
        place += int(c.size)
    primal = {v.id for v in problem.variables()}
    return Canonical(
        q=split(program.q, (n,), lambda i: np.where(i < n, i, -1)),
        A=split(-program.A, (m, n), lambda i: np.where(i // m < n, order[i % m] * n + i // m, -1)),
        b=split(program.A, (m,), lambda i: np.where(i // m == n, order[i % m], -1)),
        P=None if program.P is None else split(program.P, (n, n), lambda i: i),
        layout=layout,
        parameters=tuple(reduced),
        variables=tuple(
            _variable(v, start(v)) if v.id in primal else _multiplier(problem, v, offsets, inner_rows, order)
            for v in variables
        ),
        logarithmic=tuple(p in logs for p in parameters) if gp else None,
    )


class _Split:
    """Sorts the entries of a sparse map from all parameters by parameter."""

    def __init__(self, columns: dict[int, int], sizes: list[int]) -> None:
        self.starts = sorted(columns)
        self.owners = [columns[c] for c in self.starts]
        self.total = sum(sizes)

    def __call__(self, matrix: Any, shape: tuple[int, ...], place: Any) -> Affine:
        coo = matrix.tocoo()
        where = place(coo.row.astype(np.int64))
        kept = (where >= 0) & (coo.data != 0)
        where, column, value = where[kept], coo.col[kept].astype(np.int64), coo.data[kept]
        constant = np.zeros(math.prod(shape))
        fixed = column == self.total
        np.add.at(constant, where[fixed], value[fixed])
        owner = np.searchsorted(self.starts, column, side="right") - 1
        terms = []
        for k, first in enumerate(self.starts):
            own = ~fixed & (owner == k)
            if own.any():
                entries, places, weights = column[own] - first, where[own], value[own]
                tensor = torch.from_numpy
                terms.append((self.owners[k], tensor(entries), tensor(places), tensor(weights)))
        return Affine(shape, torch.from_numpy(constant), tuple(terms))


def _rows_of(program: Any) -> tuple[Layout, np.ndarray]:
    """The cones, and the place of each of CVXPY's rows among ours: of matrices it has the lower half by columns."""
    parts: list[tuple[Cone, int]] = []
    order: list[int] = []
    for c in program.constraints:
        kind = type(c).__name__
        match kind:
            case "Zero":
                parts += [(Zero(), 1)] * c.size
            case "NonNeg":
                parts += [(NonNegative(), 1)] * c.size
            case "SOC":
                parts += [(SecondOrder(), int(dim)) for dim in c.cone_sizes()]
            case "SvecPSD":
                parts += [(PositiveSemidefinite(), k * (k + 1) // 2) for k in map(int, c.cone_sizes())]
            case "ExpCone":
                parts += [(Exponential(), 3)] * c.num_cones()
            case "PowCone3D":
                parts += [(Power(float(alpha)), 3) for alpha in np.ravel(c.alpha.value)]
            case _:
                raise ValueError(f"problem: expected cones that this layer knows, got {kind}")
        if kind == "SvecPSD":
            for k in map(int, c.cone_sizes()):
                start = len(order)
                order += [start + i * (i + 1) // 2 + j for j in range(k) for i in range(j, k)]
        else:
            order += range(len(order), len(order) + int(c.size))
    return grouped(parts), np.array(order, dtype=np.int64)


# -------------------------------------------------------------------------------------------- parameters and variables


def _vector_of(p: Any) -> Entries:
    """The entries of a parameter that CVXPY's vector has, by columns; of symmetric ones, of both halves the mean."""
    index = np.arange(math.prod(p.shape)).reshape(p.shape)
    other = index
    if any(p.attributes[a] for a in ("symmetric", "PSD", "NSD")):
        upper = np.triu_indices(p.shape[-1])
        index, other = index[upper], index.T[upper]
    elif p.attributes["diag"]:
        index = other = np.diag(index)
    elif p.attributes["sparsity"]:
        index = other = index[p.sparse_idx]
    below = p.attributes["nonneg"] or p.attributes["pos"]
    above = p.attributes["nonpos"] or p.attributes["neg"]
    flat = lambda i: torch.from_numpy(np.ascontiguousarray(i.ravel(order="F")))  # noqa: E731
    sign: Any = "nonneg" if below else "nonpos" if above else "any"
    return Entries(p.name(), tuple(p.shape), flat(index), flat(other), sign)


def _variable(v: Any, start: int) -> Entries:
    """Where each entry of a variable is among the unknowns; a weight of zero where it is none."""
    shape = tuple(v.shape)
    weight = np.ones(shape)
    if any(v.attributes[a] for a in ("symmetric", "PSD", "NSD")):
        k = shape[-1]
        upper = np.zeros(shape, dtype=np.int64)
        upper[np.triu_indices(k)] = np.arange(k * (k + 1) // 2)
        place = np.maximum(upper, upper.T)
    elif v.attributes["diag"]:
        place, weight = np.diag(np.arange(shape[0])), np.eye(shape[0])
    elif v.attributes["sparsity"]:
        place, weight = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        place[v.sparse_idx], weight[v.sparse_idx] = np.arange(len(v.sparse_idx[0])), 1
    else:
        place = np.arange(math.prod(shape)).reshape(shape, order="F")
    return _entries(v, shape, start + place, weight)


def _entries(v: Any, shape: tuple[int, ...], place: np.ndarray, weight: np.ndarray, dual: bool = False) -> Entries:
    index = torch.from_numpy(np.ascontiguousarray(place.ravel()).astype(np.int64))
    return Entries(v.name(), shape, index, index, weight=torch.from_numpy(weight.ravel().astype(float)), dual=dual)


def _multiplier(problem: Any, v: Any, offsets: dict[int, Any], ids: dict[int, int], order: np.ndarray) -> Entries:
    """Where the multipliers of a constraint are among the rows."""
    owner = next(c for c in problem.constraints if any(d.id == v.id for d in c.dual_variables))
    start, kind = offsets[ids.get(owner.id, owner.id)]
    shape = tuple(v.shape)
    if kind in ("Zero", "NonNeg"):
        place = order[start + np.arange(math.prod(shape)).reshape(shape, order="F")]
        return _entries(v, shape, place, np.ones(shape), dual=True)
    if kind == "SvecPSD" and len(shape) == 2:
        k = shape[0]
        place = np.array([[start + max(i, j) * (max(i, j) + 1) // 2 + min(i, j) for j in range(k)] for i in range(k)])
        return _entries(v, shape, place, np.where(np.eye(k, dtype=bool), 1.0, math.sqrt(0.5)), dual=True)
    raise ValueError(
        f"variables: expected duals of equalities, inequalities or semidefinite constraints, got one of {owner}"
    )


# -------------------------------------------------------------------------------------------------------------- checks


def _check(problem: Any, parameters: Sequence[Any], variables: Sequence[Any], gp: bool) -> None:
    import cvxpy as cp

    if not isinstance(problem, cp.Problem):
        raise ValueError(f"problem: expected a cvxpy Problem, got {type(problem).__name__}")
    for name, given in (("parameters", parameters), ("variables", variables)):
        if not isinstance(given, list | tuple):
            raise ValueError(f"{name}: expected a list or tuple, got {type(given).__name__}")
    for leaf in (*problem.variables(), *problem.parameters()):
        kind = next((a for a in ("boolean", "integer", "complex", "hermitian", "imag") if leaf.attributes[a]), None)
        if kind:
            raise ValueError(f"problem: expected real continuous variables and parameters, got {leaf.name()} ({kind})")
        if len(leaf.shape) > 2:
            raise ValueError(f"problem: expected at most 2 dimensions, got {leaf.name()} of shape {leaf.shape}")
    _check_rules(problem, gp)
    for p in parameters:
        if not isinstance(p, cp.Parameter):
            raise ValueError(f"parameters: expected cvxpy Parameters, got {type(p).__name__}")
    own = {p.id: p.name() for p in problem.parameters()}
    given = [p.id for p in parameters]
    for p in parameters:
        if p.id not in own:
            raise ValueError(f"parameters: expected parameters of the problem, got {p.name()}, which is none")
    if len(set(given)) < len(given):
        raise ValueError("parameters: expected each of them once, got one of them twice")
    missing = [name for i, name in own.items() if i not in given]
    if missing:
        raise ValueError(f"parameters: expected all parameters of the problem, {', '.join(missing)} missing")
    known = {v.id for v in problem.variables()} | {d.id for c in problem.constraints for d in c.dual_variables}
    for v in variables:
        if getattr(v, "id", None) not in known:
            raise ValueError(f"variables: expected variables of the problem, or dual variables of it, got {v}")


def _check_rules(problem: Any, gp: bool) -> None:
    """Says which part breaks the rules of disciplined parametrised programming."""
    from cvxpy.utilities import scopes

    kind = "dgp" if gp else "dcp"
    if problem.is_dpp("dgp") if gp else problem.is_dpp(quad_form_dpp="qp"):
        return
    parts = [("objective", problem.objective), *((f"constraint {i}", c) for i, c in enumerate(problem.constraints))]

    def follows(part: Any, dpp: bool) -> bool:
        with scopes.quad_form_dpp_scope():
            return bool(part.is_dgp(dpp) if gp else part.is_dcp(dpp))

    for dpp, rules in ((False, f"disciplined convex ({kind.upper()})"), (True, "disciplined parametrised (DPP)")):
        wrong = [f"{name}: {part}" for name, part in parts if not follows(part, dpp)]
        if wrong:
            hint = "; products of parameters, for example, need a new parameter for the product" if dpp else ""
            raise ValueError(f"problem: expected one by the rules of {rules} programming{hint}, got {'; '.join(wrong)}")
    raise ValueError("problem: expected one by the rules of disciplined parametrised (DPP) programming")

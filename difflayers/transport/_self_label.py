r"""Self-labelling: clusters of given size from the predictions of a network.

.. math:: \min_Q \; -\langle Q, \log p \rangle + \epsilon \, \mathrm{KL}(Q \,|\, b a^T) \quad \text{s.t.} \quad
    Q 1 = b, \; Q^T 1 = a

for N rows of mass b = 1/N and K clusters of mass a, 1/K each if nothing else is said.

Y. M. Asano, C. Rupprecht, A. Vedaldi, Self-labelling via simultaneous clustering and representation learning, 2020.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from difflayers._checks import check_same, check_shape, check_tensor, renamed
from difflayers._solution import Info, OnFailure, Solution, check_policy, settle
from difflayers.linalg import LinearSolver

from ._coupling import Coupling, of_total_one
from ._label_chunks import Chunk, matrices
from ._self_label_stream import SelfLabelState, SemiDualNewton, stream, stream_labels
from ._sinkhorn import sinkhorn, sinkhorn_ex
from ._solvers import TransportSolver

IGNORED = -100  # a label that torch.nn.functional.cross_entropy leaves out

Prior = Tensor | Sequence[Tensor | None] | None
Solver = TransportSolver | SemiDualNewton


class SelfLabels(NamedTuple):
    """Labels, and what gives labels to other rows.

    Attributes:
        labels: ``(*heads, N)`` integers, or ``(*heads, N, K)`` soft labels; a list of them for a list of heads.
        state: Potentials of the clusters.
    """

    labels: Any
    state: SelfLabelState


def self_label(
    log_probs: Any,
    prior: Prior = None,
    *,
    eps: float | Tensor = 0.04,
    soft: bool = False,
    solver: Solver | None = None,
    adjoint: LinearSolver | None = None,
    state: SelfLabelState | None = None,
    on_failure: OnFailure = "raise",
) -> Any:
    """Labels of a data set in clusters of given size: the targets of self-supervised training by clustering.

    Solves ``argmin_Q -<Q, log_probs> + eps KL(Q | b a^T) s.t. Q 1 = b, Q^T 1 = a`` with ``b = 1 / N``; soft labels are
    ``N Q``, hard ones its largest entries. Those are balanced as far as `eps` is small and rows differ: rows that are
    all equal get one label.

    Args:
        log_probs: ``(*heads, N, K)`` log-probabilities of N rows in K clusters, by ``log_softmax``; what is added to a
            row changes nothing, and -inf forbids a cluster. A list of ``(N, K)`` gives heads of different K. A data set
            larger than memory is given as a numpy array (a ``memmap``), a loader, or a function that returns an
            iterator over chunks ``(*heads, n, K)``, or lists of ``(n, K)``; chunks come anew in each pass, in the
            same order, and are lifted to float64 one at a time.
        prior: ``(*heads, K)`` masses a of the clusters, at least 0, scaled to sum to one; a list for a list of heads.
            None: equal ones.
        eps: Strength of the entropy, above 0: ``1 / lambda`` of the paper, where it is 25. A number, or ``(*heads)``.
        soft: Returns soft labels. Not for streams, whose soft labels are larger than memory: use
            :meth:`SelfLabelState.soft` on chunks.
        solver: Of tensors, :class:`KernelSinkhorn` (None) or :class:`LogSinkhorn`. Of streams,
            :class:`SemiDualNewton`, under which tensors are streamed too.
        adjoint: As for :func:`sinkhorn`; tensors only.
        state: An earlier state, with `prior` and `eps` of its own, from which a stream goes on.
        on_failure: ``"raise"``, ``"nan"`` (soft labels NaN, hard labels -100 for failed heads alone) or ``"ignore"``.

    Returns:
        ``(*heads, N)`` integers, or ``(*heads, N, K)`` soft labels; a list for a list of heads.

    Raises:
        ValueError: For bad input, naming the argument; for NaN in a stream, with the number of the chunk.
        SolveError: For heads without a solution, such as a cluster that is forbidden to all rows.

    Soft labels of a tensor are differentiable in `log_probs`, `prior` and `eps`, to any order, forward and reverse.
    Hard labels and streams have no derivative.

    Example:
        >>> import torch
        >>> from difflayers.transport import self_label
        >>> log_probs = torch.tensor([[2.0, 0.0], [1.5, 0.0], [1.0, 0.0], [0.2, 0.0]]).log_softmax(-1)
        >>> log_probs.argmax(-1)  # the network sees one cluster
        tensor([0, 0, 0, 0])
        >>> self_label(log_probs)
        tensor([0, 0, 1, 1])
        >>> self_label(lambda: log_probs.split(3))  # from chunks
        tensor([0, 0, 1, 1])

    Source: Y. M. Asano et al., Self-labelling via simultaneous clustering and representation learning, 2020, equations
    6 to 8.
    Departure: in the logarithm, where ``p ** 25`` is not below the smallest number; to a tolerance on the sizes of the
    clusters that is reported where it is not met, instead of a change of less than 0.1 in which NaN is skipped; streams
    by Newton's method, with few passes, and without a number for each row.
    """
    check_policy(on_failure)
    if not _streams(log_probs, solver, state):
        if isinstance(log_probs, list | tuple):
            each = zip(log_probs, _per_head(prior, len(log_probs)), _eps_per_head(eps, len(log_probs)), strict=True)
            options: dict[str, Any] = {"soft": soft, "solver": solver, "adjoint": adjoint, "on_failure": on_failure}
            return [self_label(x, a, eps=e, **options) for x, a, e in each]
        cost, a, b = _prepared(log_probs, prior)
        if cost.shape[-2] == 0:
            return _no_labels(cost, soft)
        if not soft:
            cost, a, b = (t.detach() for t in (cost, a, b))
            eps = eps.detach() if isinstance(eps, Tensor) else eps
        with renamed(cost="log_probs", b="prior"):
            plan = sinkhorn(cost, a, b, eps=eps, solver=_dense(solver), adjoint=adjoint, on_failure=on_failure)
        if soft:
            return plan * cost.shape[-2]
        failed = torch.isnan(plan).any(-1) & (on_failure != "ignore")
        return torch.where(failed, IGNORED, plan.argmax(-1))
    found = self_label_ex(log_probs, prior, eps=eps, soft=soft, solver=solver, state=state)
    flat = Info(*(t.reshape(-1) for t in (found.status, found.steps, found.residual)))
    value = settle(flat.residual, flat, on_failure, name="self_label", present=lambda _: found.value)
    labels, lost = found.value.labels, torch.isnan(value).tolist()
    if on_failure == "ignore" or not any(lost):
        return labels
    if isinstance(labels, list):
        return [torch.full_like(x, IGNORED) if bad else x for x, bad in zip(labels, lost, strict=True)]
    heads = torch.isnan(value).reshape(found.status.shape).to(labels.device)
    return torch.where(heads.unsqueeze(-1), IGNORED, labels)


def self_label_ex(
    log_probs: Any,
    prior: Prior = None,
    *,
    eps: float | Tensor = 0.04,
    soft: bool = False,
    solver: Solver | None = None,
    adjoint: LinearSolver | None = None,
    state: SelfLabelState | None = None,
) -> Solution[SelfLabels]:
    """As :func:`self_label`, with the state, as an unchecked :class:`~difflayers.Solution`.

    Args:
        log_probs: Log-probabilities.
        prior: Masses of the clusters.
        eps: Strength of the entropy.
        soft: Whether labels are soft.
        solver: Solver.
        adjoint: Solver of the derivative's linear system.
        state: Earlier state.

    Returns:
        :class:`SelfLabels`, with the status, the steps and the L1 error of the masses for every head; the steps of a
        stream are its passes, and those of earlier calls count.
    """
    if _streams(log_probs, solver, state):
        return _streamed(log_probs, prior, eps, soft, solver, state)
    if isinstance(log_probs, list | tuple):
        priors, strengths = _per_head(prior, len(log_probs)), _eps_per_head(eps, len(log_probs))
        each = [
            self_label_ex(x, a, eps=e, soft=soft, solver=solver, adjoint=adjoint)
            for x, a, e in zip(log_probs, priors, strengths, strict=True)
        ]
        heads = tuple(head for one in each for head in one.value.state.heads)
        value = SelfLabels([one.value.labels for one in each], SelfLabelState(heads, each[0].value.state.rows))
        return Solution(value, *(torch.stack([getattr(one, k) for one in each]) for k in Info._fields))
    cost, a, b = _prepared(log_probs, prior)
    n, lead = cost.shape[-2], cost.shape[:-2]
    if n == 0:
        raise ValueError(f"log_probs: expected at least one row, got shape {tuple(cost.shape)}")
    with renamed(cost="log_probs", b="prior"):
        found: Solution[Coupling] = sinkhorn_ex(cost, a, b, eps=eps, solver=_dense(solver), adjoint=adjoint)
    plan, _, g = found.value
    K, count = cost.shape[-1], math.prod(lead)
    strengths = _eps_per_head(eps if not isinstance(eps, Tensor) else eps.expand(lead).reshape(-1), count)
    potentials = g.expand(*lead, K).reshape(count, K)
    start = SelfLabelState.at(list(potentials), list(b.expand(*lead, K).reshape(count, K)), strengths)
    labels = plan * n if soft else plan.argmax(-1)
    return Solution(SelfLabels(labels, start), found.status, found.steps, found.residual)


def _streams(log_probs: Any, solver: Solver | None, state: SelfLabelState | None) -> bool:
    """Whether data comes in chunks."""
    if isinstance(solver, SemiDualNewton) or state is not None:
        return True
    heads = log_probs if isinstance(log_probs, list | tuple) else [log_probs]
    if not heads:
        raise ValueError("log_probs: expected at least one head, got an empty list")
    return not all(isinstance(head, Tensor) for head in heads)


def _streamed(
    log_probs: Any, prior: Prior, eps: Any, soft: bool, solver: Solver | None, state: SelfLabelState | None
) -> Solution[SelfLabels]:
    if soft:
        raise ValueError("soft: expected False for a stream; use the state's soft() on its chunks")
    if not (solver is None or isinstance(solver, SemiDualNewton)):
        raise ValueError(f"solver: expected SemiDualNewton() or None for a stream, got {solver!r}")
    if not (state is None or isinstance(state, SelfLabelState)):
        raise ValueError(f"state: expected a SelfLabelState, got {type(state).__name__}")
    if isinstance(log_probs, np.ndarray) and log_probs.dtype.kind != "f":
        raise ValueError(f"log_probs: expected floating-point numbers, got {log_probs.dtype}")

    def start(chunk: Chunk) -> SelfLabelState:
        heads, lead = matrices(chunk)
        strengths = _eps_per_head(eps, len(heads))
        if isinstance(prior, Tensor) and lead is not None:
            size = heads[0].shape[-1]
            check_shape("prior", prior.shape[-1:], (size,), " as log_probs has clusters")
            priors = list(prior.expand(*lead, size).reshape(-1, size))
        else:
            priors = _per_head(prior, len(heads))
        masses = [_masses(a, x) for a, x in zip(priors, heads, strict=True)]
        return SelfLabelState.at([torch.zeros_like(a) for a in masses], masses, strengths)

    solver = solver or SemiDualNewton()
    with torch.no_grad():
        state = stream(log_probs, state, start, solver)
        labels, errors = stream_labels(log_probs, state, solver)
    shape = labels.shape[:-1] if isinstance(labels, Tensor) else (len(labels),)
    info = (
        torch.tensor([head.status for head in state.heads], device="cpu"),
        torch.full((len(state.heads),), state.passes, device="cpu"),
        errors,
    )
    return Solution(SelfLabels(labels, state), *(t.reshape(shape) for t in info))


def _prepared(log_probs: Any, prior: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Cost and masses of the transport problem."""
    n, K = check_tensor("log_probs", log_probs, min_ndim=2).shape[-2:]
    if K == 0:
        raise ValueError(f"log_probs: expected at least one cluster, got shape {tuple(log_probs.shape)}")
    masses = _masses(prior, log_probs)
    check_same([("log_probs", log_probs), ("prior", masses)])
    return -log_probs, log_probs.new_full((n,), 1 / max(n, 1)), masses


def _masses(prior: Any, log_probs: Tensor) -> Tensor:
    """Masses of the clusters that sum to one."""
    K = log_probs.shape[-1]
    if prior is None:
        return log_probs.new_full((K,), 1 / K)
    check_shape("prior", check_tensor("prior", prior, min_ndim=1).shape[-1:], (K,), " as log_probs has clusters")
    if prior.device != log_probs.device:
        raise ValueError(f"prior: expected device {log_probs.device} as of log_probs, got {prior.device}")
    return of_total_one("prior", prior)


def _no_labels(cost: Tensor, soft: bool) -> Tensor:
    return torch.zeros_like(cost) if soft else torch.zeros(cost.shape[:-1], dtype=torch.int64, device=cost.device)


def _dense(solver: Solver | None) -> TransportSolver | None:
    assert not isinstance(solver, SemiDualNewton)
    return solver


def _per_head(prior: Prior, count: int) -> list[Tensor | None]:
    if prior is None or (isinstance(prior, Tensor) and prior.ndim == 1):
        return [prior] * count
    if len(prior) != count:
        raise ValueError(f"prior: expected None, or masses for each of {count} heads, got {len(prior)}")
    return list(prior)


def _eps_per_head(eps: Any, count: int) -> list[Any]:
    """One number a head, above 0."""
    if isinstance(eps, Tensor):
        each: tuple[Any, ...] = eps.reshape(-1).expand(count).unbind() if eps.numel() in (1, count) else ()
    elif isinstance(eps, bool) or not isinstance(eps, int | float):
        raise ValueError(f"eps: expected a number or a tensor, got {type(eps).__name__}")
    else:
        each = (eps,) * count
    if len(each) != count:
        raise ValueError(f"eps: expected a number, or one for each of {count} heads, got shape {tuple(eps.shape)}")
    return list(each)

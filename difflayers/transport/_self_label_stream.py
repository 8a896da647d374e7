r"""Self-labelling of more rows than fit into memory: one pass over the data for each step, K numbers in between.

For potentials f of the clusters the best soft labels of a row are
:math:`q_{jk} \propto a_k \exp((f_k + \log p_{jk}) / \epsilon)`: no other row is needed. What is left is to maximise

.. math:: D(f) = \langle a, f / \epsilon \rangle
    - \frac1N \sum_j \log \sum_k a_k e^{(f_k + \log p_{jk}) / \epsilon},

concave, with gradient :math:`(a - m) / \epsilon` for the masses :math:`m_k = \frac1N \sum_j q_{jk}` of the clusters.
Sinkhorn's step is :math:`f \leftarrow f + \epsilon \log(a / m)`, and Newton's takes one matrix of K x K more,
:math:`\mathrm{diag}(m) - \frac1N \sum_j q_j q_j^T`. A pass at a trial point gives value, masses and matrix there, so
that a step that is accepted at once costs one pass.

M. Cuturi, G. Peyre, Semidual Regularized Optimal Transport, 2018.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from difflayers._checks import check_options, default_rtol
from difflayers._solution import Status

from ._label_chunks import Chunk, checked, chunks_of, dtype_of, joined

_CLOSE = 0.5  # L1 error of the masses from which Newton's method may be tried
_HANDOVER = 1e-2  # error at which a larger eps has served
_FACTOR = 8.0  # between one such eps and the next, at first
_HIGHEST = 1e9  # such eps, in multiples of the wanted one
_FINEST = 1.05  # the least such factor
_NOISE = 1e-9  # promised growth of the dual below which rounding hides it
_SHORTEST = 1 / 16  # step of Newton's method below which Sinkhorn's is taken


@dataclass(frozen=True)
class _Head:
    """The search of one head: where it stands, and the point that the next pass looks at."""

    potential: Tensor
    prior: Tensor
    eps: float
    direction: Tensor
    sinkhorn: Tensor  # its step at the potential, which always grows the dual
    length: float = 0.0
    value: float = -math.inf
    promise: float = 0.0  # growth of the dual along the direction
    error: float = math.inf
    status: int = int(Status.MAX_STEPS)
    newton: bool = False
    raised: float = 1.0  # the strength of the entropy on the way, in multiples of the wanted one
    factor: float = _FACTOR  # between one such strength and the next; less where it was too much
    solved: float = 0.0  # the last of them that has served
    climbing: bool = True

    @property
    def trial(self) -> Tensor:
        return self.potential + self.length * self.direction

    def scores(self, x: Tensor, potential: Tensor, raised: float = 1.0) -> Tensor:
        return self.prior.log() + (potential + x) / (self.eps * raised)


class _Sums(NamedTuple):
    """What one pass, or a part of it, adds up for one head."""

    log_masses: Tensor
    normalisers: Tensor
    gram: Tensor | None

    def plus(self, scores: Tensor) -> _Sums:
        normalisers = scores.logsumexp(-1)
        logs = scores - normalisers.unsqueeze(-1)
        gram = self.gram
        if gram is not None:
            q = logs.exp()
            gram = gram + q.mT @ q
        return _Sums(torch.logaddexp(self.log_masses, logs.logsumexp(0)), self.normalisers + normalisers.sum(), gram)


@dataclass(frozen=True)
class SelfLabelState:
    """Where a self-labelling stands between two passes over the data: a few vectors of one number a cluster.

    ``torch.save`` and ``torch.load`` keep it; handed to :func:`self_label` it goes on as if nothing had happened, to
    the bit. For other data, such as those of the next epoch, hand over :meth:`restarted`.

    Attributes:
        heads: One search a head.
        rows: Number of rows; 0 before the first pass.
        passes: Passes so far.

    Example:
        >>> import torch
        >>> from difflayers.transport import self_label_ex
        >>> log_probs = torch.tensor([[2.0, 0.0], [1.5, 0.0], [1.0, 0.0], [0.2, 0.0]]).log_softmax(-1)
        >>> state = self_label_ex(log_probs).value.state
        >>> state.labels(torch.tensor([[1.8, 0.0], [0.0, 0.0]]).log_softmax(-1))  # rows that were not there
        tensor([0, 1])
    """

    heads: tuple[_Head, ...]
    rows: int = 0
    passes: int = 0

    @staticmethod
    def at(potentials: Sequence[Tensor], priors: Sequence[Tensor], eps: Sequence[float]) -> SelfLabelState:
        """A start at given potentials."""
        heads = []
        for f, a, e in zip(potentials, priors, eps, strict=True):
            if not float(e) > 0:
                raise ValueError(f"eps: expected a number above 0, got {float(e)}")
            if not (bool((a >= 0).all()) and 0 < float(a.sum()) < math.inf):
                raise ValueError(f"prior: expected finite masses of at least 0 and not all 0, got {a.tolist()}")
            f, a = f.detach().to(torch.float64), a.detach().to(torch.float64)
            heads.append(_Head(f, a / a.sum(), float(e), torch.zeros_like(f), torch.zeros_like(f)))
        return SelfLabelState(tuple(heads))

    def restarted(self) -> SelfLabelState:
        """The potentials as a start for other data."""
        return SelfLabelState.at(self.potentials, self.priors, [h.eps for h in self.heads])

    @property
    def potentials(self) -> tuple[Tensor, ...]:
        """``(K,)`` a head, in the unit of the log-probabilities: what is added to them to balance the clusters."""
        return tuple(head.potential for head in self.heads)

    @property
    def priors(self) -> list[Tensor]:
        """``(K,)`` a head: the masses that the clusters should have."""
        return [head.prior for head in self.heads]

    @property
    def errors(self) -> Tensor:
        """``(heads,)`` L1 distances of the clusters' masses from the prior, at the eps that the search has reached."""
        return torch.tensor([head.error for head in self.heads], dtype=torch.float64, device="cpu")

    def soft(self, log_probs: Chunk) -> Any:
        """Soft labels of any rows, also of new ones.

        Args:
            log_probs: ``(*heads, n, K)``, or a list of ``(n, K)``, one for every head.

        Returns:
            The same shape or a list, with rows that sum to one.
        """
        parts, lead = checked(log_probs, self.priors, "")
        dtype = next((t.dtype for t in (log_probs if lead is None else [log_probs]) if isinstance(t, Tensor)), None)
        soft = [head.scores(x, head.potential).softmax(-1) for head, x in zip(self.heads, parts, strict=True)]
        return joined([s if dtype is None else s.to(dtype) for s in soft], lead)

    def labels(self, log_probs: Chunk) -> Any:
        """Hard labels of any rows: the largest soft ones, of equal ones the first.

        Args:
            log_probs: As for :meth:`soft`.

        Returns:
            ``(*heads, n)`` integers, or a list.
        """
        parts, lead = checked(log_probs, self.priors, "")
        best = [head.scores(x, head.potential).argmax(-1) for head, x in zip(self.heads, parts, strict=True)]
        return joined(best, lead)


# a state is numbers and tensors alone: torch.load may read it without weights_only=False
torch.serialization.add_safe_globals([SelfLabelState, _Head])


@dataclass(frozen=True, kw_only=True)
class SemiDualNewton:
    """How a stream is labelled: Newton's method on the potentials of the clusters, one pass over the data a step.

    Args:
        rtol: L1 error of the clusters' masses, which sum to one. None: 1e-10 for float64 chunks, 1e-5 for others.
        max_steps: Passes of one call; the hard labels take one more.
        newton_limit: Clusters up to which Newton's method is used, which keeps K x K numbers. Beyond: Sinkhorn.
        chunk_rows: Rows of one chunk, where an array is given and not chunks.
        on_pass: Is shown the state after every pass, to save it or to report.
    """

    rtol: float | None = None
    max_steps: int = 200
    newton_limit: int = 1024
    chunk_rows: int = 8192
    on_pass: Callable[[SelfLabelState], None] | None = None

    def __post_init__(self) -> None:
        check_options(self, max_steps=1, newton_limit=0, chunk_rows=1)


def stream(
    source: Any, state: SelfLabelState | None, start: Callable[[Chunk], SelfLabelState], solver: SemiDualNewton
) -> SelfLabelState:
    """Passes over the data until every head is balanced, or `solver` has no more."""
    if state is not None:
        state = dataclasses.replace(state, heads=tuple(_looked_at_again(head) for head in state.heads))
    for _ in range(solver.max_steps):
        state = _one_pass(source, state, start, solver)
        if solver.on_pass is not None:
            solver.on_pass(state)
        if all(head.status != Status.MAX_STEPS for head in state.heads):
            break
    assert state is not None
    return state


def _looked_at_again(head: _Head) -> _Head:
    """A head that converged starts from there, since the data may be others."""
    if head.status == Status.MAX_STEPS:
        return head
    return SelfLabelState.at([head.potential], [head.prior], [head.eps]).heads[0]


def stream_labels(source: Any, state: SelfLabelState, solver: SemiDualNewton) -> tuple[Any, Tensor]:
    """One more pass, for the hard labels, and for the errors of the masses at the eps that was asked for."""
    found: list[list[Tensor]] = [[] for _ in state.heads]
    masses = [torch.zeros_like(head.potential) for head in state.heads]
    lead: tuple[int, ...] | None = ()
    for number, chunk in enumerate(chunks_of(source, solver.chunk_rows)):
        parts, lead = checked(chunk, state.priors, f" in chunk {number} of the pass for the labels")
        for i, (head, x) in enumerate(zip(state.heads, parts, strict=True)):
            scores = head.scores(x, head.potential)
            found[i].append(scores.argmax(-1))
            masses[i] += scores.softmax(-1).sum(0)
    rows = sum(len(x) for x in found[0])
    _check_rows(rows, state)
    errors = [(m / rows - head.prior).abs().sum().cpu() for m, head in zip(masses, state.heads, strict=True)]
    return joined([torch.cat(kept) for kept in found], lead), torch.stack(errors)


def _one_pass(
    source: Any, state: SelfLabelState | None, start: Callable[[Chunk], SelfLabelState], solver: SemiDualNewton
) -> SelfLabelState:
    sums: list[_Sums | None] = []
    trials: list[Tensor] = []
    count, dtype = 0, torch.float64
    for number, chunk in enumerate(chunks_of(source, solver.chunk_rows)):
        if state is None:
            state = start(chunk)
        where = f" in chunk {number} of pass {state.passes}"
        parts, _ = checked(chunk, state.priors, where)
        if not sums:
            sums = [_nothing(head, solver) for head in state.heads]
            trials = [head.trial for head in state.heads]
            dtype = dtype_of(chunk)
        count += len(parts[0])
        for i, (head, x) in enumerate(zip(state.heads, parts, strict=True)):
            done = sums[i]
            if done is not None and len(x):
                sums[i] = done.plus(head.scores(x, trials[i], head.raised))
    if state is None or count == 0:
        raise ValueError("log_probs: expected at least one row, got none: chunks must be given anew in every pass")
    _check_rows(count, state)
    tol = default_rtol(solver.rtol, dtype)
    heads = [h if s is None else _advanced(h, s, count, tol) for h, s in zip(state.heads, sums, strict=True)]
    return SelfLabelState(tuple(heads), count, state.passes + 1)


def _nothing(head: _Head, solver: SemiDualNewton) -> _Sums | None:
    """Sums of no rows; None for a head that is done."""
    if head.status != Status.MAX_STEPS:
        return None
    f, K = head.potential, len(head.potential)
    gram = f.new_zeros(K, K) if solver.newton_limit >= K else None
    return _Sums(torch.full_like(f, -math.inf), f.new_zeros(()), gram)


def _check_rows(count: int, state: SelfLabelState) -> None:
    if state.rows not in (0, count):
        raise ValueError(f"log_probs: expected {state.rows} rows in every pass, got {count}")


def _advanced(head: _Head, sums: _Sums, count: int, tol: float) -> _Head:
    """The search after a pass at its trial point."""
    some, log_count = head.prior > 0, math.log(count)
    log_masses = sums.log_masses - log_count
    masses, potential = log_masses.exp(), head.trial
    eps = head.eps * head.raised
    value = float((head.prior * potential).sum() / eps - sums.normalisers / count)
    error = float((masses - head.prior).abs().sum())
    if head.newton and head.length > 0:
        rises = value >= head.value + 1e-4 * head.length * head.promise
        visible = head.promise > _NOISE * max(1.0, abs(value) / 1e3)
        if not (rises if visible else error < head.error):
            if head.length > _SHORTEST:
                return dataclasses.replace(head, length=head.length / 2)
            if head.raised >= head.solved and head.raised < _HIGHEST:  # nothing to come from
                return dataclasses.replace(head, length=0.0, newton=False, raised=head.raised * head.factor)
            if head.factor > _FINEST:  # too far from the last eps: one in between
                factor = math.sqrt(head.factor)
                return dataclasses.replace(head, length=0.0, newton=False, factor=factor, raised=head.raised * factor)
            return dataclasses.replace(head, direction=head.sinkhorn, length=1.0, newton=False)
    step = eps * torch.where(some, head.prior.log() - log_masses, 0)
    if not bool(torch.isfinite(step).all()):  # no row is allowed in a cluster that must have some
        return dataclasses.replace(head, potential=potential, length=0.0, error=error, status=int(Status.INFEASIBLE))
    found: dict[str, Any] = {
        "potential": potential,
        "sinkhorn": step,
        "direction": step,
        "value": value,
        "error": error,
    }
    if head.climbing and error > _CLOSE and head.raised < _HIGHEST:
        return dataclasses.replace(head, **found, length=0.0, raised=head.raised * head.factor)
    found["climbing"] = False
    if head.raised > 1 and error <= _HANDOVER * (math.log(head.factor) / math.log(_FACTOR)) ** 4:
        return dataclasses.replace(
            head, **found, length=0.0, newton=False, solved=head.raised, raised=max(1.0, head.raised / head.factor)
        )
    if error <= tol:
        return dataclasses.replace(head, **found, length=0.0, newton=False, status=int(Status.CONVERGED))
    newton = None
    if sums.gram is not None and error <= _CLOSE:
        newton = _newton_step(masses, sums.gram / count, head.prior - masses)
    if newton is None:
        return dataclasses.replace(head, **found, length=1.0, newton=False)
    promise = float((head.prior - masses) @ newton)
    found["direction"] = eps * newton
    return dataclasses.replace(head, **found, length=1.0, newton=True, promise=promise)


def _newton_step(masses: Tensor, gram: Tensor, missing: Tensor) -> Tensor | None:
    """``(diag(m) - gram)^-1 missing``, without a constant; None where rounding forbids it.

    Scaled by the roots of the masses the matrix has eigenvalues in [0, 1]; its null vector, the roots, is deflated.
    """
    root = masses.sqrt()
    inverse = torch.where(root > 0, 1 / root, 0)
    A = torch.diag(torch.ones_like(root)) - inverse.unsqueeze(-1) * gram * inverse + root.unsqueeze(-1) * root
    L, info = torch.linalg.cholesky_ex(A)
    if int(info) != 0:
        return None
    step = inverse * torch.cholesky_solve((inverse * missing).unsqueeze(-1), L).squeeze(-1)
    return step if bool(torch.isfinite(step).all()) and float(missing @ step) > 0 else None

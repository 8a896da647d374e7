r"""Bloop: an auxiliary loss moves the parameters only where the main one does not care.

.. math:: d = g_{main} + \lambda \Bigl(g_{aux} - \frac{\langle g_{aux}, \bar g\rangle}{\lVert\bar g\rVert^2} \bar g
    \Bigr), \qquad \bar g \leftarrow (1 - \rho) \bar g + \rho\, g_{main}

With noisy gradients the projection has to be along an average that does not know the noise of this step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn

from difflayers._checks import check_shape, check_tensor, compute_dtype

from ._options import check_number
from ._problem import check_group
from ._schedules import Schedule, as_schedule

_Gradient = Sequence[Tensor | None]
_State = tuple[_Gradient, _Gradient, int]


@dataclass(frozen=True)
class BloopStats:
    """What a call of :meth:`Bloop.backward` saw; 0-dim tensors, read by nobody until you do.

    Attributes:
        step: Updates of the average so far, one of this call counted.
        main: The main loss, of this process.
        aux: The auxiliary loss alike.
        cosine: Of the angle between the gradient of the auxiliary loss and the average; 0 where one of them is zero.
            Above 0 the losses agree, and Bloop leaves it to the main one; below 0 they are in conflict.
    """

    step: int
    main: Tensor
    aux: Tensor
    cosine: Tensor


class Bloop:
    r"""Gradient surgery as bilevel optimisation: a second loss among the minimisers of the first.

    Solves ``min aux(w)  over  w in argmin main``, for ordinary models and any torch optimiser. The optimiser gets
    ``d = g_main + weight (g_aux - <g_aux, m> / |m|^2 m)``, where m is the moving average of the gradients of main
    (without projection while m is zero, and before it hears of the gradients of this step): of main it is the whole
    gradient, of aux the part that leaves main alone to first order. A weighted sum ends where the two losses balance;
    here the weight says how fast aux is followed, not how much of main is given up for it.

    A constant weight leaves main within a distance proportional to it where the minimisers of main are reached from
    more than one direction; it may fall.

    Args:
        variables: What is trained: a module (its parameters that require a gradient), an iterable of parameters, a
            list of groups ``{"params": ..., "weight": ...}`` such as ``optimizer.param_groups`` (other keys are
            ignored), or a pytree of tensors.
        weight: lambda, a number or a schedule; a group may have a number of its own, at 0 main alone trains it. The
            projection is then that of the geometry of these weights, ``weight (g_aux - s m)`` with the s for which what
            aux adds is orthogonal to m.
        rho: How much the average takes of a new gradient, in (0, 1], a number or a schedule.
        group: None, or a process group of ``torch.distributed`` among which batches are divided: both gradients of
            :meth:`backward` are then means over its processes, and so is the direction, the same everywhere. Losses of
            a module in ``DistributedDataParallel`` are to be computed by the module inside, or under ``no_sync()``.

    Attributes:
        steps: Updates of the average so far.

    Raises:
        ValueError: For bad input, naming the argument.

    Differentiable in nothing.

    Example:
        >>> import torch
        >>> from difflayers.bilevel import Bloop
        >>> w, goal = torch.nn.Parameter(torch.zeros(2)), torch.tensor([3.0, 0.0])
        >>> optimizer, bloop = torch.optim.SGD([w], lr=0.5), Bloop([w], weight=0.5)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     stats = bloop.backward(main=(w.sum() - 1).square() / 2, aux=(w - goal).square().sum())
        ...     optimizer.step()
        >>> w.detach()  # of the points with sum 1 that next to (3, 0)
        tensor([ 2., -1.])

    Source: Y.-G. Hsieh, J. Thornton, E. Ndiaye, M. Klein, M. Cuturi, P. Ablin, Careful with that Scalpel: Improving
    Gradient Surgery with an EMA, 2024, algorithm 1.

    Departure: weights of groups, and processes; a gradient of main that is not finite goes to ``.grad`` as it is (a
    gradient scaler skips such a step), but not into the average.
    """

    def __init__(
        self, variables: Any, *, weight: float | Schedule = 1.0, rho: float | Schedule = 0.01, group: Any = None
    ) -> None:
        if group is not None:
            check_group(group)
        self.group = group
        self._names: list[str] | None = None
        factors: list[float | None] | None = None
        if isinstance(variables, Iterator):
            variables = list(variables)
        if isinstance(variables, nn.Module):
            named = {name: p for name, p in variables.named_parameters() if p.requires_grad}
            self._names, variables = list(named), list(named.values())
        elif (
            isinstance(variables, list) and variables and all(isinstance(g, dict) and "params" in g for g in variables)
        ):
            groups = [([g["params"]] if isinstance(g["params"], Tensor) else list(g["params"]), g) for g in variables]
            factors = [
                check_number("weight", g["weight"], ends="[)") if "weight" in g else None
                for ps, g in groups
                for _ in ps
            ]
            variables = [p for params, _ in groups for p in params]
        self._leaves, self._spec = optree.tree_flatten(variables, none_is_leaf=True)
        if not self._leaves:
            raise ValueError("variables: expected parameters, a pytree of tensors or a module with some, got none")
        labels = self._names or [f"variables[{i}]" for i in range(len(self._leaves))]
        for label, leaf in zip(labels, self._leaves, strict=True):
            check_tensor(label, leaf)
        if len({id(leaf) for leaf in self._leaves}) < len(self._leaves):
            raise ValueError("variables: expected every parameter once, got one twice")
        self._flat = isinstance(variables, list | tuple) and len(variables) == len(self._leaves)
        self._weight, self._rho = as_schedule("weight", weight), as_schedule("rho", rho)
        self._factors = factors or [None] * len(self._leaves)
        check_number("weight", self._weight(0), ends="[)")
        check_number("rho", self._rho(0), high=1.0, ends="(]")
        self.steps = 0
        self._average: _Gradient = [None] * len(self._leaves)
        self._pending: _Gradient = [None] * len(self._leaves)

    @property
    def average(self) -> Any:
        """The moving average of the gradients of main, with the structure of the variables; a dict for a module."""
        return self._tree([_or_zeros(a, leaf).to(leaf) for a, leaf in zip(self._average, self._leaves, strict=True)])

    def backward(
        self, main: Tensor, aux: Tensor, *, update: bool = True, retain_graph: bool | None = None
    ) -> BloopStats:
        """Adds the direction to the ``.grad`` of all parameters, as ``(main + aux).backward()`` would add the sum.

        Parameters that neither loss uses and the average does not know either keep their ``.grad``, None too.

        Args:
            main: The loss that comes first, one number.
            aux: The loss that comes second.
            update: False while further micro-batches of the same step follow: their gradients of main go into the
                average together, with the last.
            retain_graph: As in ``torch.Tensor.backward``.

        Returns:
            :class:`BloopStats`.

        Raises:
            ValueError: For losses that are not one number, or do not depend on any of the parameters.
        """
        wanted = [i for i, leaf in enumerate(self._leaves) if leaf.requires_grad]
        if not wanted:
            raise ValueError("variables: expected parameters that require a gradient, got none")
        for name, loss in (("main", main), ("aux", aux)):
            check_shape(name, check_tensor(name, loss).shape, (), ", one number")
            if not loss.requires_grad:
                raise ValueError(f"{name}: expected a loss that depends on the parameters, got one without a graph")
        leaves = [self._leaves[i] for i in wanted]
        pair = []
        for loss, retain in ((main, True), (aux, retain_graph)):
            found: list[Tensor | None] = [None] * len(self._leaves)
            parts = torch.autograd.grad(loss, leaves, retain_graph=retain, allow_unused=True)
            for i, part in zip(wanted, parts, strict=True):
                found[i] = part
            pair.append(found if self.group is None else self._over_processes(found, wanted))
        direction, cosine, state = self._combine(pair[0], pair[1], update)
        with torch.no_grad():
            for i in wanted:
                leaf, d = self._leaves[i], direction[i]
                if d is not None:
                    leaf.grad = d if leaf.grad is None else leaf.grad.add_(d)
        self._average, self._pending, self.steps = state
        return BloopStats(self.steps, main.detach(), aux.detach(), cosine)

    def direction(self, main: Any, aux: Any, *, update: bool = True) -> Any:
        """The direction for gradients that are already there.

        Args:
            main: Gradient of the loss that comes first, with the structure of the variables (a dict from names to
                tensors for a module); None for zeros.
            aux: Gradient of the loss that comes second.
            update: As in :meth:`backward`.

        Returns:
            The direction, in the same structure.

        Raises:
            ValueError: For another structure or other shapes.
        """
        pair = [self._read(name, tree) for name, tree in (("main", main), ("aux", aux))]
        found, _, (self._average, self._pending, self.steps) = self._combine(pair[0], pair[1], update)
        return self._tree([_or_zeros(d, leaf).to(leaf) for d, leaf in zip(found, self._leaves, strict=True)])

    def state_dict(self) -> dict[str, Any]:
        """All that the next direction depends on but the gradients, copied."""
        return {
            "steps": self.steps,
            "average": [None if a is None else a.clone() for a in self._average],
            "pending": [None if a is None else a.clone() for a in self._pending],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken, to the last bit.

        Args:
            state_dict: Of variables of the same shapes.

        Raises:
            ValueError: For other shapes; nothing has changed then.
        """
        read = {}
        for key in ("average", "pending"):
            found = state_dict[key]
            if len(found) != len(self._leaves):
                raise ValueError(f"state_dict: expected {len(self._leaves)} averages, got {len(found)}")
            for value, leaf in zip(found, self._leaves, strict=True):
                if value is not None:
                    check_shape("state_dict", value.shape, leaf.shape)
            read[key] = [
                None if v is None else v.detach().to(leaf.device, compute_dtype(leaf.dtype), copy=True)
                for v, leaf in zip(found, self._leaves, strict=True)
            ]
        self._average, self._pending, self.steps = read["average"], read["pending"], int(state_dict["steps"])

    def _over_processes(self, gradient: list[Tensor | None], wanted: Sequence[int]) -> list[Tensor | None]:
        """The mean over the processes of the group, in one message for each dtype and device."""
        kinds: dict[Any, list[int]] = {}
        for i in wanted:
            kinds.setdefault((self._leaves[i].dtype, self._leaves[i].device), []).append(i)
        for places in kinds.values():
            parts = [_or_zeros(gradient[i], self._leaves[i]).to(compute_dtype(self._leaves[i].dtype)) for i in places]
            flat = torch.cat([part.reshape(-1) for part in parts])
            torch.distributed.all_reduce(flat, group=self.group)
            pieces = (flat / torch.distributed.get_world_size(self.group)).split([part.numel() for part in parts])
            for i, piece in zip(places, pieces, strict=True):
                gradient[i] = piece.reshape(self._leaves[i].shape)
        return gradient

    @torch.no_grad()
    def _combine(self, main: _Gradient, aux: _Gradient, update: bool) -> tuple[_Gradient, Tensor, _State]:
        """The direction, the cosine, and what to remember."""
        weight = check_number("weight", self._weight(self.steps), ends="[)")
        rho = check_number("rho", self._rho(self.steps), high=1.0, ends="(]")
        weights = [weight if factor is None else factor for factor in self._factors]
        # in units of the largest numbers: squares of small gradients would be zero
        (_, m_unit), (h_size, h_unit) = self._scaled(self._average), self._scaled(aux)
        cross, mean = self._product(h_unit, m_unit, weights), self._product(m_unit, m_unit, weights)
        share = torch.where(mean > 0, cross / torch.where(mean > 0, mean, 1), 0) * h_size
        length = (mean * self._product(h_unit, h_unit, weights)).sqrt()
        cosine = torch.where(length > 0, cross / torch.where(length > 0, length, 1), 0)
        direction: list[Tensor | None] = []
        for leaf, g, h, m, w in zip(self._leaves, main, aux, m_unit, weights, strict=True):
            parts = [] if g is None else [g]
            if w != 0:
                parts += [] if h is None else [w * h]
                parts += [] if m is None else [-w * share.to(m) * m]
            direction.append(sum(parts[1:], parts[0]).to(leaf.dtype) if parts else None)
        pending = [_sum(p, g, leaf) for p, g, leaf in zip(self._pending, main, self._leaves, strict=True)]
        if not update:
            return direction, cosine, (self._average, pending, self.steps)
        known = [p for p in pending if p is not None]
        finite = torch.stack([p.isfinite().all().to(self._leaves[0].device) for p in known] or [mean >= 0]).all()
        average = [
            None if m is None and p is None else _mix(_or_zeros(m, leaf), _or_zeros(p, leaf), rho, finite)
            for m, p, leaf in zip(self._average, pending, self._leaves, strict=True)
        ]
        return direction, cosine, (average, [None] * len(main), self.steps + 1)

    def _scaled(self, vector: _Gradient) -> tuple[Tensor, _Gradient]:
        """The largest number (1 for zero), and the vector divided by it."""
        total = self._zero()
        for v in vector:
            if v is not None and v.numel():
                total = torch.maximum(total, v.abs().amax().to(total))
        size = torch.where(total == 0, 1, total)
        return size, [None if v is None else v / size.to(v.device) for v in vector]

    def _zero(self) -> Tensor:
        first = self._leaves[0]
        return first.new_zeros((), dtype=compute_dtype(first.dtype))

    def _product(self, a: _Gradient, b: _Gradient, weights: Sequence[float]) -> Tensor:
        """The inner product in the geometry of the weights."""
        total = self._zero()
        for v, w, weight in zip(a, b, weights, strict=True):
            if v is not None and w is not None:
                total = total + weight * (v * w).sum().to(total)
        return total

    def _read(self, name: str, tree: Any) -> list[Tensor | None]:
        if self._names is not None:
            if not isinstance(tree, dict) or set(tree) != set(self._names):
                raise ValueError(f"{name}: expected a dict of gradients named {self._names}")
            leaves = [tree[key] for key in self._names]
        elif self._flat and isinstance(tree, list | tuple) and len(tree) == len(self._leaves):
            leaves = list(tree)
        else:
            leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
            if spec != self._spec:
                raise ValueError(f"{name}: expected the structure of the variables, {self._spec}, got {spec}")
        for found, leaf in zip(leaves, self._leaves, strict=True):
            if found is not None:
                check_shape(name, check_tensor(name, found).shape, leaf.shape, " as the variable has")
        return leaves

    def _tree(self, leaves: Sequence[Tensor]) -> Any:
        return self._spec.unflatten(leaves) if self._names is None else dict(zip(self._names, leaves, strict=True))


def _or_zeros(value: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=compute_dtype(leaf.dtype)) if value is None else value


def _sum(pending: Tensor | None, gradient: Tensor | None, leaf: Tensor) -> Tensor | None:
    if gradient is None:
        return pending
    gradient = gradient.detach().to(compute_dtype(leaf.dtype))
    return gradient if pending is None else pending + gradient


def _mix(average: Tensor, gradient: Tensor, rho: float, finite: Tensor) -> Tensor:
    return torch.where(finite.to(average.device), (1 - rho) * average + rho * gradient, average)

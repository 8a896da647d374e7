"""Steps of all methods for test_distributed.py, and what goes wrong in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from difflayers.bilevel import (
    BAMM,
    BOME,
    BOREP,
    BSVRB,
    F2SA,
    GPBGD,
    HOAG,
    LVHBA,
    MAID,
    MEHA,
    MFAC,
    SABA,
    SOBA,
    VPBGD,
    ArgminLayer,
    Bilevel,
    Constant,
    ImplicitSGD,
    PenaltyMethod,
    hypergradient,
    minimize,
)
from difflayers.implicit import Neumann
from tests.bilevel import distributed_problems as d
from tests.bilevel.distributed_problems import data, part, problem, rank_of, size_of, start

Case = Callable[[Any], list[Tensor]]
STEPS = 2


def box(x: Tensor) -> Tensor:
    return x.clamp(-0.35, 0.35)


def seen(algo: Any, stats: Any) -> list[Tensor]:
    numbers = [stats.upper, stats.lower, stats.stationarity, stats.infeasibility]
    return [*algo.state.values(), *numbers, torch.tensor([stats.gradients, stats.products])]


def batches(level: int, group: Any, n: int = d.SAMPLES) -> list[d.Batch]:
    return [part(data(10 * k + level, n), group) for k in range(STEPS)]


def steps(method: Any, parts: dict[str, Any] | None = None, count: int = STEPS, **options: Any) -> Case:
    def run(group: Any) -> list[Tensor]:
        algo = method(problem(group, **(parts or {"project_upper": box})), *start(), **options)
        history = minimize(
            algo, count, upper_batches=batches(1, group), lower_batches=batches(2, group), progress=False
        )
        return seen(algo, history.stats[-1])

    return run


def flat(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y.sum() - x.sum(), y[0] + 2 * y[1] + x[2]])


def saba(group: Any) -> list[Tensor]:
    """Block i of the data is that of all processes together."""
    algo = SABA(problem(group), *start(), upper_blocks=2, lower_blocks=2)
    for k in (0, 1, 0):
        stats = algo.step((k, part(data(k), group)), (1 - k, part(data(5 + k), group)))
    return seen(algo, stats)


def polished(group: Any) -> list[Tensor]:
    algo = F2SA(problem(group), *start())
    return [algo.polish(part(data(2), group))]


def refined(group: Any) -> list[Tensor]:
    algo = BOREP(problem(group), *start())
    return [algo.refine(batches(2, group), epochs=1)]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def networks(group: Any) -> list[Tensor]:
    """Modules, wrapped, whose own reducer has nothing to do; uneven batches."""
    x, y = d.Net(seed=10), d.Net(seed=20)
    whole = x if group is None else DistributedDataParallel(x)
    p = Bilevel(d.module_upper, d.module_lower, samples=d.count)
    algo = SOBA(p, whole, y, step=Constant(0.1), step_lower=Constant(0.1))
    stats = minimize(
        algo, STEPS, upper_batches=batches(1, group, 25), lower_batches=batches(2, group, 26), progress=False
    ).stats[-1]
    assert algo.x is x and all(p.grad is None for p in x.parameters())
    return [*seen(algo, stats), *(p.detach() for p in (*x.parameters(), *y.parameters()))]


def rows(m: int, **options: Any) -> Case:
    """A hypergradient with blocks of each process, as many or not."""

    def run(group: Any) -> list[Tensor]:
        own = d.share(m, group)
        y, targets = 0.3 * d.randn(m, 5, seed=5), d.randn(m, 5, seed=6)
        p = d.rows_problem(m, group, **options)
        found = hypergradient(p, start()[0], y[own], (targets[own], targets[own] + 0.1))
        return [found.grad, d.whole(found.adjoint, m, group), found.value]

    return run


def rows_layer(m: int, **options: Any) -> Case:
    """Blocks solved by each process; the mean of the losses behind is that of all blocks."""

    def run(group: Any) -> list[Tensor]:
        own = d.share(m, group)
        targets, weights = d.randn(m, 5, seed=6)[own], d.randn(m, 5, seed=7)[own]
        x = start()[0].requires_grad_()
        y = ArgminLayer(d.rows_problem(m, group, **options), init=torch.zeros_like(targets))(x, targets)
        part = size_of(group) / m
        loss = (weights * y.sin()).sum() * part + x.square().sum()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (again,) = torch.autograd.grad((first.sin() * weights.sum(0)).sum() * part, x)
        return [d.whole(y.detach(), m, group), *d.averaged([first, again], group)]

    return run


def sampled(method: Any, m: int, **options: Any) -> Case:
    """Two thirds of the blocks in each step, in each process."""

    def run(group: Any) -> list[Tensor]:
        own = d.share(m, group)
        y, targets = 0.3 * d.randn(m, 5, seed=5), d.randn(m, 5, seed=6)
        algo = method(d.rows_problem(m, group, project_upper=box), start()[0], y[own], **options)
        count = own.stop - own.start
        for k in range(STEPS):
            index = torch.tensor([i for i in range(count) if (i + own.start + k) % 3])
            batch = targets[own][index]
            stats = algo.step(batch, batch + 0.1, blocks=index)
        return [algo.x, d.whole(algo.y, m, group), stats.upper, stats.lower, stats.stationarity]

    return run


def one_bad_block(on_failure: str) -> Case:
    """A saddle among the blocks of the last process."""

    def run(group: Any) -> list[Tensor]:
        m, own = 6, d.share(6, group)
        bend = torch.tensor([1.0] * 5 + [-1.0], dtype=d.F64)[own]
        problem = Bilevel(
            lambda x, y, batch: y.square().sum(-1),
            lambda x, y, batch: bend * (y - x).square().sum(-1),
            blocks=own.stop - own.start,
            group=group,
        )
        found = hypergradient(problem, start()[0], d.randn(m, 5, seed=5)[own], on_failure=on_failure)
        return [found.grad.nan_to_num(7.0)]

    return run


def one_unsolved_block(group: Any) -> list[Tensor]:
    """The layer's lower problem of the last process has no minimum."""
    own = d.share(6, group)
    bend = torch.tensor([1.0] * 5 + [-1.0], dtype=d.F64)[own]
    p = Bilevel(
        lambda x, y, batch: y.square().sum(-1),
        lambda x, y, batch: bend * (y - x).square().sum(-1),
        blocks=own.stop - own.start,
        group=group,
    )
    return [ArgminLayer(p, init=d.randn(6, 5, seed=5)[own])(start()[0])]


class Trouble(KeyError):
    """Not an error that any library raises."""


def last_raises(group: Any) -> Callable[..., Tensor]:
    def lower(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        if rank_of(group) == size_of(group) - 1:
            raise Trouble("Grüße")
        return d.lower(x, y, batch)

    return lower


def failing_gradient(group: Any) -> list[Tensor]:
    p = Bilevel(d.upper, last_raises(group), group=group)
    return [hypergradient(p, *start(), (part(data(1), group), part(data(2), group))).grad]


def failing_layer(group: Any) -> list[Tensor]:
    p = Bilevel(d.upper, last_raises(group), group=group)
    return [ArgminLayer(p, init=start()[1])(start()[0], part(data(2), group))]


def failing_step(group: Any) -> list[Tensor]:
    """In the second step, after which all are as before it."""
    algo = F2SA(problem(group), *start())
    good = part(data(1), group), part(data(2), group)
    algo.step(*good)
    before = {k: v.clone() for k, v in algo.state.items()}
    bad = good[0] if rank_of(group) < size_of(group) - 1 else (good[0][0][:, :2], good[0][1])
    try:
        algo.step(bad, good[1])
    finally:
        assert algo.steps == 1 and all(torch.equal(before[k], v) for k, v in algo.state.items())
    return []


def other(name: str) -> Case:
    """Variables that differ in one process, in the last bit."""

    def run(group: Any) -> list[Tensor]:
        x, y = start()
        if rank_of(group) == size_of(group) - 1:
            v = {"x": x, "y": y}[name]
            v[1] = torch.nextafter(v[1], v[1] + 1)
        algo = F2SA(problem(group), x, y)
        algo.step(part(data(1), group), part(data(2), group))
        return []

    return run


def other_init(group: Any) -> list[Tensor]:
    init = torch.ones(5, dtype=d.F64) + rank_of(group) // max(1, size_of(group) - 1)
    return [hypergradient(problem(group), *start(), (part(data(1), group), part(data(2), group)), init=init).grad]


def other_rows(group: Any) -> list[Tensor]:
    adjoint = MFAC(1)
    adjoint.update(d.randn(5, seed=rank_of(group) // max(1, size_of(group) - 1)))
    return [hypergradient(problem(group), *start(), (part(data(1), group), part(data(2), group)), adjoint=adjoint).grad]


def shapes(group: Any) -> list[Tensor]:
    def upper(x: Tensor, y: Tensor, batch: Any) -> Tensor:
        return d.upper(x, y, batch).to(torch.float32 if rank_of(group) else d.F64)

    p = Bilevel(upper, d.lower, group=group)
    return [hypergradient(p, *start(), (part(data(1), group), part(data(2), group))).grad]


def no_samples(group: Any) -> list[Tensor]:
    p = problem(group, samples=lambda batch: 0.0)
    return [hypergradient(p, *start(), (part(data(1), group), part(data(2), group))).grad]


def bad_samples(group: Any) -> list[Tensor]:
    p = problem(group, samples=lambda batch: size_of(group) - 2 - rank_of(group))
    return [hypergradient(p, *start(), (part(data(1), group), part(data(2), group))).grad]


def captured(group: Any) -> list[Tensor]:
    """In one process alone."""
    free = torch.ones((), dtype=d.F64, requires_grad=rank_of(group) == size_of(group) - 1)
    p = Bilevel(d.upper, lambda x, y, batch: d.lower(x, y, batch) * free, group=group)
    return [hypergradient(p, *start(), (part(data(1), group), part(data(2), group))).grad]


def two_groups(group: Any) -> list[Tensor]:
    second = d.dist.new_group(list(range(size_of(group)))) if group else None
    x, y = d.Net(seed=10), d.Net(seed=20)
    whole = DistributedDataParallel(x, process_group=second) if group else x
    p = Bilevel(d.module_upper, d.module_lower, group=group)
    return [*hypergradient(p, whole, y, (part(data(1), group), part(data(2), group))).grad.values()]


def odd_batch(group: Any) -> list[Tensor]:
    """Something that is found before anything is evaluated."""
    pair = (part(data(1), group), part(data(2), group))
    bad = rank_of(group) == size_of(group) - 1
    return [hypergradient(problem(group), *start(), pair[:1] if bad else pair).grad]


plane = {"constraint": flat, "equality": True}
STEP_CASES: dict[str, Case] = {
    "SOBA": steps(SOBA),
    "SABA": saba,
    "F2SA": steps(F2SA, inner_steps=2),
    "F2SA, momentum": steps(F2SA, momentum=0.3),
    "PenaltyMethod": steps(PenaltyMethod),
    "VPBGD": steps(VPBGD),
    "GPBGD": steps(GPBGD),
    "BOME": steps(BOME, inner_steps=3),
    "BAMM": steps(BAMM),
    "MEHA": steps(MEHA, {"prox_lower": d.soft_threshold}),
    "LVHBA": steps(LVHBA, plane),
    "BOREP": steps(BOREP, epochs=2, inner_steps=2),
    "BOREP, refine": refined,
    "HOAG": steps(HOAG),
    "ImplicitSGD": steps(ImplicitSGD, step=0.1, step_lower=0.2, inner_steps=2),
    "ImplicitSGD, Adam": steps(ImplicitSGD, optimizer=adam, optimizer_lower=adam, inner_steps=2, adjoint=Neumann(3)),
    "MAID": steps(MAID, count=1),
    "polish": polished,
    "networks": networks,
    "rows": rows(6),
    "rows, uneven": rows(7, prox_lower=d.soft_threshold),
    "layer, rows": rows_layer(6),
    "layer, rows, prox": rows_layer(7, prox_lower=d.soft_threshold),
    "one bad block, nan": one_bad_block("nan"),
    "BSVRB": sampled(BSVRB, 18),
}
ERRORS: dict[str, Case] = {
    "failing gradient": failing_gradient,
    "failing layer": failing_layer,
    "failing step": failing_step,
    "other x": other("x"),
    "other y": other("y"),
    "shapes": shapes,
    "no samples": no_samples,
    "bad samples": bad_samples,
    "captured": captured,
    "one bad block": one_bad_block("raise"),
    "one unsolved block": one_unsolved_block,
    "other init": other_init,
    "other rows": other_rows,
    "odd batch": odd_batch,
    "two groups": two_groups,
}

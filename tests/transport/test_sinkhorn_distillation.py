"""Distillation by transport: the loss of the paper, its full derivative, padding and reductions.

Oracles, written down before the code: the paper's loss by alternate normalisations of exp(-W / eps) in the logarithm,
so many of them, and under autograd, that twice as many change nothing; fourth-order differences of it; the same problem
without the padding.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from difflayers.transport import (
    Cosine,
    Euclidean,
    KernelSinkhorn,
    Manhattan,
    SinkhornDistillation,
    sinkhorn,
    sinkhorn_distillation,
)

D = torch.float64


def rand(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def unrolled(
    student: Tensor, teacher: Tensor, steps: int, temperature: float = 2.0, eps: float | Tensor = 0.1
) -> Tensor:
    """The paper's loss: rows, then columns, divided by their sums; mass 1 in every row."""
    p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    W = (p.unsqueeze(-2) - q.unsqueeze(-3)).abs().sum(-1)
    log_K = -W / eps
    v = torch.zeros_like(log_K[..., :1, :])
    for _ in range(steps):  # factors of rows and columns, instead of the plan itself, on which rounding would pile up
        u = -(log_K + v).logsumexp(-1, keepdim=True)
        v = -(log_K + u).logsumexp(-2, keepdim=True)
    return ((log_K + u + v).exp() * W).sum((-2, -1))


def slope(fn, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(fn(x).sum(), x)[0]


# ---------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize(("temperature", "eps"), [(2.0, 0.1), (1.0, 0.3), (4.0, 0.05)])
def test_gradient_is_the_full_derivative_at_convergence(temperature, eps):
    student, teacher = rand(8, 5), rand(8, 5, seed=1)
    loss = SinkhornDistillation(temperature, eps, reduction="sum")
    expected, long = (slope(lambda x, k=k: unrolled(x, teacher, k, temperature, eps), student) for k in (1500, 3000))
    assert float((long - expected).abs().max()) < 1e-11  # the oracle has converged
    assert float((slope(lambda x: loss(x, teacher), student) - long).abs().max()) < 1e-8
    value = unrolled(student, teacher, 3000, temperature, eps)
    assert abs(float(loss(student, teacher) - value)) < 1e-8


def test_gradient_is_neither_that_of_twenty_steps_nor_the_plan_alone():
    """At a temperature of 1, a batch of 32 and ten classes: what is differentiated matters."""
    student, teacher = rand(32, 10, scale=4), rand(32, 10, seed=1, scale=4)
    loss = SinkhornDistillation(1.0, 0.05, reduction="sum")
    found = slope(lambda x: loss(x, teacher), student)
    few = slope(lambda x: unrolled(x, teacher, 20, 1.0, 0.05), student)
    assert float((found - few).norm() / found.norm()) > 1e-2

    def plan_alone(x: Tensor) -> Tensor:
        W = Manhattan()(x.softmax(-1), teacher.softmax(-1))
        return 32 * (W * sinkhorn(W, eps=0.05).detach()).sum()

    envelope = slope(plan_alone, student)
    assert float((found - envelope).norm() / found.norm()) > 1e-2


def test_gradient_is_that_of_differences():
    student, teacher, move = rand(4, 6, 5), rand(4, 6, 5, seed=1), rand(4, 6, 5, seed=2, scale=1.0)
    loss = SinkhornDistillation(solver=KernelSinkhorn(rtol=1e-14))
    h, expected = 1e-4, 0.0
    for k, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        expected += weight * float(loss(student + k * h * move, teacher)) / (12 * h)
    got = float((slope(lambda x: loss(x, teacher), student) * move).sum())
    assert abs(got - expected) < 1e-8 * max(1, abs(expected))


def test_second_derivative_is_that_of_the_unrolled_iteration():
    student, teacher, move = rand(5, 4), rand(5, 4, seed=1), rand(5, 4, seed=2)

    def twice(fn) -> Tensor:
        x = student.clone().requires_grad_()
        (first,) = torch.autograd.grad(fn(x), x, create_graph=True)
        return torch.autograd.grad((first * move).sum() + first.square().sum(), x)[0]

    loss = SinkhornDistillation(reduction="sum")
    expected = twice(lambda x: unrolled(x, teacher, 1000))
    assert float((twice(lambda x: loss(x, teacher)) - expected).abs().max()) < 1e-8 * float(expected.abs().max())


@pytest.mark.parametrize("name", ["temperature", "eps"])
def test_derivatives_in_eps_and_in_the_temperature(name):
    """The latter by the function on probabilities, as the docstring of the module says."""
    student, target = rand(6, 4), rand(6, 4, seed=1)
    at, expected, h = {"temperature": 2.0, "eps": 0.1}, 0.0, 1e-4
    for k, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        moved = at | {name: at[name] + k * h}
        teacher = target * moved["temperature"]  # so that the teacher's probabilities do not move
        expected += weight * float(unrolled(student, teacher, 1000, **moved)) / (12 * h)
    x = {key: torch.tensor(v, dtype=D, requires_grad=True) for key, v in at.items()}
    p, q = (student / x["temperature"]).softmax(-1), target.softmax(-1)
    loss = 6 * sinkhorn_distillation(p, q, eps=x["eps"], cost=Manhattan())
    (got,) = torch.autograd.grad(loss, x[name])
    assert abs(float(got) - expected) < 1e-8 * max(1, abs(expected))


def test_where_probabilities_coincide_their_distance_has_derivative_zero():
    """By symmetry nothing may come from the pairs that coincide; what the other pairs say is the oracle's too."""
    x = rand(6, 4, scale=1.0)  # farther apart, the alternate normalisations take 100,000 steps
    loss = SinkhornDistillation(reduction="sum")
    expected = slope(lambda s: unrolled(s, x, 2000), x)  # torch's own sign(0) = 0
    assert float((slope(lambda s: loss(s, x), x) - expected).abs().max()) < 1e-8
    same = x[:1].expand(6, 4)
    assert bool((slope(lambda s: loss(s, same), same) == 0).all())
    assert float(loss(same, same)) == 0


def test_teacher_is_a_constant():
    student, teacher = rand(4, 3).requires_grad_(), rand(4, 3, seed=1).requires_grad_()
    loss = SinkhornDistillation()
    (loss(student, teacher) + loss.states(student, teacher)).backward()
    assert student.grad is not None and teacher.grad is None


def test_transforms():
    student, teacher = rand(3, 4, 5), rand(3, 4, 5, seed=1)
    loss = SinkhornDistillation()
    each = vmap(grad(loss))(student, teacher)
    for k in range(3):
        assert torch.allclose(each[k], slope(lambda x, k=k: loss(x, teacher[k]), student[k]), atol=1e-12)


# ------------------------------------------------------------------------------------------- what counts, and how much


def test_reductions():
    student, teacher = rand(3, 6, 4), rand(3, 6, 4, seed=1)
    alone = torch.stack([unrolled(s, t, 1000) for s, t in zip(student, teacher, strict=True)])
    found = {r: SinkhornDistillation(reduction=r)(student, teacher) for r in ("none", "mean", "sum")}
    assert torch.allclose(found["none"], alone / 6, atol=1e-9)
    assert torch.allclose(found["mean"], alone.mean() / 6, atol=1e-9)
    assert torch.allclose(found["sum"], alone.sum(), atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_padding_is_as_good_as_absent(reduction):
    student, teacher = rand(2, 6, 4), rand(2, 6, 4, seed=1)
    mask = torch.tensor([[True] * 6, [True, False, True, True, False, False]])
    loss = SinkhornDistillation(reduction=reduction)
    first, second = loss(student[0], teacher[0]), loss(student[1][mask[1]], teacher[1][mask[1]])
    expected = first + second if reduction == "sum" else (6 * first + 3 * second) / 9
    spoilt = student.clone()
    spoilt[~mask] = torch.nan  # whatever stands there
    spoilt.requires_grad_()
    value = loss(spoilt, teacher, mask)
    assert torch.allclose(value, expected, atol=1e-9)
    (found,) = torch.autograd.grad(value, spoilt)
    assert bool((found[~mask] == 0).all()) and bool((found[mask] != 0).all())
    value = loss.states(spoilt, teacher, mask)
    first, second = loss.states(student[0], teacher[0]), loss.states(student[1][mask[1]], teacher[1][mask[1]])
    assert torch.allclose(value, first + second if reduction == "sum" else (6 * first + 3 * second) / 9, atol=1e-9)


def test_nothing_that_counts_costs_nothing():
    student = rand(2, 3, 4).requires_grad_()
    mask = torch.tensor([[True] * 3, [False] * 3])
    loss = SinkhornDistillation(reduction="none")(student, rand(2, 3, 4, seed=1), mask)
    assert float(loss[1].detach()) == 0 < float(loss[0].detach())
    assert bool((torch.autograd.grad(loss.sum(), student)[0][1] == 0).all())


def test_a_masked_class_has_probability_zero():
    student, teacher = rand(5, 4), rand(5, 4, seed=1)
    loss = SinkhornDistillation()
    expected = loss(student[:, :3], teacher[:, :3])
    student[:, 3] = teacher[:, 3] = -torch.inf
    assert torch.allclose(loss(student, teacher), expected, atol=1e-12)
    found = slope(lambda x: loss(x, teacher), student)
    assert bool((found[:, 3] == 0).all()) and bool(torch.isfinite(found).all())


def test_states_of_tokens():
    student, teacher = rand(3, 5, 2), rand(3, 7, 2, seed=1)
    for cost in (Cosine(), Euclidean(), Manhattan()):
        each = sinkhorn_distillation(student, teacher, cost=cost)
        alone = [sinkhorn_distillation(s, t, cost=cost) for s, t in zip(student, teacher, strict=True)]
        assert each.shape == (3,) and torch.allclose(each, torch.stack(alone), atol=1e-9)
    a, b = torch.tensor([0.5, 0.5, 0, 0, 0], dtype=D), torch.tensor([0.2] * 5 + [0.0] * 2, dtype=D)
    padded = sinkhorn_distillation(student, teacher, a, b)
    assert torch.allclose(padded, sinkhorn_distillation(student[:, :2], teacher[:, :5]), atol=1e-9)


def test_one_bad_batch_is_nan_alone():
    student, teacher = rand(3, 4, 5), rand(3, 4, 5, seed=1)
    student[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="student_logits, teacher_logits: expected finite numbers"):
        SinkhornDistillation()(student, teacher)
    value = SinkhornDistillation(reduction="none", on_failure="nan")(student, teacher)
    assert torch.isnan(value).tolist() == [False, True, False]


# -------------------------------------------------------------------------------------------------------- as a module


def test_module():
    loss = SinkhornDistillation(4.0, 0.2, reduction="sum", cost=Euclidean(), solver=KernelSinkhorn(rtol=1e-9))
    student, teacher = rand(4, 3), rand(4, 3, seed=1)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert repr(other) == repr(loss) and torch.equal(other(student, teacher), loss(student, teacher))
    assert not loss.state_dict()
    assert torch.equal(functional_call(loss, {}, (student, teacher)), loss(student, teacher))
    assert "cost=Euclidean()" in repr(loss) and "rtol=1e-09" in repr(loss)
    assert loss(student.float(), teacher.float()).dtype == torch.float32
    half = loss(student.bfloat16(), teacher.bfloat16())
    assert half.dtype == torch.bfloat16
    assert abs(float(half) - float(loss(student.bfloat16().double(), teacher.bfloat16().double()))) < 1e-2 * float(half)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: SinkhornDistillation(0.0), "temperature: expected a finite number above 0, got 0.0"),
        (lambda: SinkhornDistillation(eps=-1.0), "eps: expected a finite number above 0"),
        (lambda: SinkhornDistillation(reduction="batchmean"), "reduction: expected"),
        (lambda: SinkhornDistillation(cost=2), "cost: expected"),
        (lambda: SinkhornDistillation(on_failure="what"), "on_failure: expected"),
        (lambda: SinkhornDistillation()(rand(4, 3), rand(4, 2)), r"teacher_logits: expected shape \(4, 3\)"),
        (lambda: SinkhornDistillation()(rand(4, 3), rand(4, 3).float()), "teacher_logits: expected dtype"),
        (lambda: SinkhornDistillation()(rand(4, 3), rand(4, 3), torch.ones(4)), "mask: expected a tensor of booleans"),
        (lambda: SinkhornDistillation()(rand(4, 3), rand(4, 3), torch.ones(3).bool()), r"mask: expected shape \(4,\)"),
        (lambda: SinkhornDistillation().states(rand(4, 3), rand(3, 3)), r"teacher: expected shape \(4, 3\)"),
        (lambda: sinkhorn_distillation(rand(4, 3), rand(4, 2)), "teacher: expected shape"),
        (lambda: SinkhornDistillation()(rand(0, 3), rand(0, 3)), "student_logits, teacher_logits: expected at least"),
        (
            lambda: SinkhornDistillation()(rand(2, 3) * torch.nan, rand(2, 3)),
            "student_logits, teacher_logits: expected",
        ),
        (lambda: sinkhorn_distillation(rand(0, 3), rand(0, 3)), "student, teacher: expected at least one"),
        (lambda: sinkhorn_distillation(rand(4, 3), rand(4, 3), cost="l1"), "cost: expected"),
        (lambda: sinkhorn_distillation(rand(4, 3), rand(4, 3), eps=0.0), "eps: expected a number above 0"),
    ],
)
def test_wrong_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call()

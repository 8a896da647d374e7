"""Routing: brute force over assignments, the linear program's dual, gradients of what was chosen, padding, states.

Oracles: all balanced assignments of a few tokens; scipy's linear program for the best balanced choice of K experts,
whose value the dual of the bias approaches; softmax at fixed indices for gradients.
"""

import copy
import io
import itertools

import numpy as np
import pytest
import torch

import difflayers
from difflayers.transport import AuxLossFreeBalancer, SinkhornRouter, sinkhorn_routing


def skewed(seed: int, tokens: int, experts: int, skew: float = 2.0) -> torch.Tensor:
    """Logits that favour the last experts."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    return noise + torch.linspace(0, skew, experts, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ Sinkhorn router


def test_small_eps_gives_the_best_balanced_assignment():
    for seed in range(4):
        logits = skewed(seed, 6, 3)
        best = max(
            (c for c in itertools.product(range(3), repeat=6) if np.bincount(c, minlength=3).tolist() == [2, 2, 2]),
            key=lambda c: sum(float(logits[i, j]) for i, j in enumerate(c)),
        )
        routing = sinkhorn_routing(logits, eps=0.02, plan_weights=True)
        assert routing.experts.squeeze(-1).tolist() == list(best)
        assert routing.load.tolist() == [2, 2, 2]
        assert float(routing.imbalance) == 0


def test_load_and_shares():
    logits = skewed(5, 400, 8, 4.0)
    plain = logits.argmax(-1).bincount(minlength=8)
    assert plain.max() > 3 * 50
    routing = sinkhorn_routing(logits, eps=0.05)
    assert float(routing.imbalance) < 0.1
    assert torch.equal(routing.load, routing.experts.flatten().bincount(minlength=8))
    shares = torch.tensor([4.0, 1, 1, 1, 1, 0, 0, 0], dtype=torch.float64)
    load = sinkhorn_routing(logits, None, shares, eps=0.05).load
    assert load[5:].sum() == 0
    assert (load - 400 * shares / 8).abs().max() <= 8


def test_weights_of_gates_and_their_gradient():
    logits = skewed(6, 10, 4).requires_grad_()
    weights, experts, _ = sinkhorn_routing(logits, top_k=2)
    expected = logits.softmax(-1)[torch.arange(10).unsqueeze(-1), experts]
    assert torch.equal(weights, expected)
    cotangent = skewed(7, 10, 2)
    (grad,) = torch.autograd.grad(weights, logits, cotangent)
    (other,) = torch.autograd.grad(expected, logits, cotangent)
    torch.testing.assert_close(grad, other)
    normal = sinkhorn_routing(logits, top_k=2, normalize=True).weights
    torch.testing.assert_close(normal, expected / expected.sum(-1, keepdim=True))


def test_gradient_through_the_plan_by_differences():
    logits, cotangent = skewed(8, 5, 3), skewed(9, 5, 2)

    def value(x: torch.Tensor) -> torch.Tensor:
        return (sinkhorn_routing(x, eps=0.4, top_k=2, plan_weights=True).weights * cotangent).sum()

    x = logits.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(x), x)
    basis = 1e-5 * torch.eye(15, dtype=torch.float64).reshape(15, 5, 3)
    expected = torch.stack([(value(logits + e) - value(logits - e)) / 2e-5 for e in basis]).reshape(5, 3)
    torch.testing.assert_close(grad, expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("plan_weights", [False, True])
def test_padding_is_as_if_it_were_not_there(plan_weights: bool):
    logits = torch.stack([skewed(10, 12, 4), skewed(11, 12, 4), skewed(12, 12, 4)])
    mask = torch.zeros(3, 12, dtype=torch.bool)
    mask[0, :7], mask[1] = True, True
    logits[0, 7:] = 50.0
    x = logits.clone().requires_grad_()
    options = {"top_k": 2, "eps": 0.2, "plan_weights": plan_weights}
    found = sinkhorn_routing(x, mask, **options)
    for i, count in ((0, 7), (1, 12)):
        alone = sinkhorn_routing(logits[i, :count], **options)
        torch.testing.assert_close(found.weights[i, :count].detach(), alone.weights, atol=1e-9, rtol=0)
        assert torch.equal(found.experts[i, :count], alone.experts)
        assert torch.equal(found.load[i], alone.load)
    assert found.weights[0, 7:].abs().sum() == 0
    assert found.weights[2].abs().sum() == 0
    assert found.load[2].sum() == 0
    assert float(found.imbalance[2]) == 0
    found.weights.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad[~mask].abs().sum() == 0


def test_empty_and_few_tokens():
    for shape in ((0, 4), (2, 0, 4), (0, 5, 4)):
        for router in (sinkhorn_routing, SinkhornRouter(4), AuxLossFreeBalancer(4)):
            weights, experts, load = router(torch.ones(shape))
            assert weights.shape == experts.shape == (*shape[:-1], 1)
            assert load.shape == (*shape[:-2], 4)
            assert load.sum() == 0
    few = sinkhorn_routing(skewed(13, 3, 8, 6.0), eps=0.05)
    assert few.load.sum() == 3
    assert few.load.max() == 1  # three tokens, three experts
    one = sinkhorn_routing(torch.randn(5, 1), plan_weights=True)
    torch.testing.assert_close(one.weights, torch.ones(5, 1))


def test_a_bad_element_does_not_reach_the_others():
    logits = torch.stack([skewed(14, 6, 3), skewed(15, 6, 3)])
    bad = logits.clone()
    bad[0, 2, 1] = torch.nan
    found = sinkhorn_routing(bad, on_failure="nan", top_k=2)
    assert torch.isnan(found.weights[0]).all()
    assert torch.equal(found.weights[1], sinkhorn_routing(logits, top_k=2).weights[1])
    with pytest.raises(ValueError, match="logits: expected finite"):
        sinkhorn_routing(bad)


def test_evaluation_depends_on_the_token_alone():
    router = SinkhornRouter(8, eps=0.05, momentum=0.2)
    for seed in range(30):
        assert float(router(skewed(seed, 128, 8, 4.0).float()).imbalance) < 0.3
    assert int(router.steps) == 30
    router.eval()
    test = skewed(100, 512, 8, 4.0).float()
    routing = router(test)
    assert float(routing.imbalance) < 0.5 < float(SinkhornRouter(8).eval()(test).imbalance)
    torch.testing.assert_close(router(test[:5]).weights, routing.weights[:5])
    assert int(router.steps) == 30
    before = router.potential.clone()
    router.train()
    router(test[:3], torch.zeros(3, dtype=torch.bool))  # nothing but padding: nothing to learn
    router(test[:0])
    assert torch.equal(router.potential, before)
    assert int(router.steps) == 30
    file = io.BytesIO()
    torch.save(router.state_dict(), file)
    file.seek(0)
    fresh = SinkhornRouter(8, eps=0.05)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh.eval()(test).experts, routing.experts)
    assert torch.equal(copy.deepcopy(router).potential, before)


def test_first_batch_counts_in_full():
    router, logits = SinkhornRouter(4, eps=0.1).double(), skewed(16, 64, 4)
    trained = router(logits)
    assert torch.equal(router.eval()(logits).experts, trained.experts)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(256, 8, 2), (64, 8, 3), (512, 16, 4)])
def test_all_choices_together_are_balanced(tokens: int, experts: int, top_k: int):
    logits = skewed(22, tokens, experts, 3.0)
    by_logits = logits.topk(top_k, -1).indices.flatten().bincount(minlength=experts)
    assert by_logits.max() > 2 * tokens * top_k / experts
    routing = sinkhorn_routing(logits, eps=0.05, top_k=top_k)
    assert float(routing.imbalance) < 0.1
    assert all(len(set(row)) == top_k for row in routing.experts.tolist())
    router = SinkhornRouter(experts, top_k=top_k, eps=0.05, plan_weights=True).double()
    trained = router(logits)
    assert torch.equal(trained.experts, routing.experts)
    found = router.eval()(logits)  # by the bias of the first batch, which counts in full
    assert torch.equal(found.experts, trained.experts)
    torch.testing.assert_close(found.weights, trained.weights, atol=1e-8, rtol=0)


def test_a_second_plan_by_linear_programming():
    """For a small eps: of all second choices, those of the largest logits with the loads that are left to have."""
    from scipy.optimize import linprog

    T, E = 24, 4
    logits = skewed(23, T, E)
    routing = sinkhorn_routing(logits, eps=0.01, top_k=2, plan_weights=True)
    first = routing.experts[:, 0]
    forbidden = torch.nn.functional.one_hot(first, E).bool()
    rows, columns = np.kron(np.eye(T), np.ones(E)), np.kron(np.ones(T), np.eye(E))
    sums = np.r_[np.ones(T), 2 * T / E - first.bincount(minlength=E).numpy()]
    cost = torch.where(forbidden, 1e3, -logits).numpy().ravel()
    best = linprog(cost, A_eq=np.r_[rows, columns], b_eq=sums, bounds=(0, 1)).x.reshape(T, E)
    assert routing.experts[:, 1].tolist() == best.argmax(-1).tolist()
    assert routing.load.tolist() == [2 * T // E] * E


def test_later_choices_make_up_for_earlier_ones():
    """A large eps leaves the first loads off, by 0.09 to 0.28; plans with the same sums keep a part of it."""
    imbalances = [sinkhorn_routing(skewed(seed, 256, 8, 3.0), eps=0.5, top_k=3).imbalance for seed in (29, 30, 31)]
    assert sum(map(float, imbalances)) / 3 < 0.1


def test_weights_of_further_plans_are_of_what_is_left():
    logits = skewed(24, 12, 4)
    weights, experts, _ = sinkhorn_routing(logits, eps=1.0, top_k=4, plan_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(12, dtype=torch.float64))
    assert experts.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 12
    torch.testing.assert_close(weights[:, 0], sinkhorn_routing(logits, eps=1.0, plan_weights=True).weights[:, 0])


@pytest.mark.filterwarnings("error")
def test_whatever_shares_are_asked_for_there_are_further_plans():
    generator = torch.Generator().manual_seed(25)
    for trial in range(40):
        E, T = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((2, 7), (1, 20)))
        top_k = int(torch.randint(1, E + 1, (), generator=generator))
        shares = torch.rand(E, generator=generator, dtype=torch.float64) ** (trial % 5) + 1e-9
        shares[0] *= trial % 3
        routing = sinkhorn_routing(skewed(trial, T, E, 4.0), None, shares, eps=0.1, top_k=top_k, plan_weights=True)
        assert all(len(set(row)) == top_k for row in routing.experts.tolist())
        assert routing.weights.min() >= -1e-9
        assert routing.weights.sum(-1).max() <= 1 + 1e-6
    much = torch.tensor([0.8, 0.1, 0.1, 0.0], dtype=torch.float64)  # more than all tokens at two choices
    load = sinkhorn_routing(skewed(26, 100, 4), None, much, eps=0.05, top_k=2).load
    assert load[0] >= 97
    assert load[3] == 0


def test_the_same_logits_under_several_shares():
    logits = skewed(28, 12, 4)
    shares = torch.tensor([[1.0, 1, 1, 1], [4, 2, 1, 1]], dtype=torch.float64)
    for plan_weights in (False, True):
        options = {"top_k": 2, "eps": 0.3, "plan_weights": plan_weights}
        found = sinkhorn_routing(logits, None, shares, **options)
        router = SinkhornRouter(4, **options).double().eval()
        moved = router(logits, None, shares)
        for i in range(2):
            alone = sinkhorn_routing(logits, None, shares[i], **options)
            assert torch.equal(found.experts[i], alone.experts)
            torch.testing.assert_close(found.weights[i], alone.weights)
            assert torch.equal(moved.experts[i], router(logits, None, shares[i]).experts)


def test_tokens_with_fewer_open_experts_than_choices():
    logits = skewed(27, 20, 4)
    logits[:3, 1:] = -torch.inf
    logits[3:6, 2:] = -torch.inf
    for plan_weights in (False, True):
        x = logits.clone().requires_grad_()
        weights, experts, load = sinkhorn_routing(x, top_k=2, plan_weights=plan_weights)
        assert experts[:3, 0].tolist() == [0, 0, 0]
        assert weights[:3, 1].abs().max() == 0
        assert experts[3:6].sort(-1).values.tolist() == [[0, 1]] * 3
        assert load.sum() == 40
        weights.square().sum().backward()
        assert torch.isfinite(x.grad).all()


def test_many_tokens_in_half_precision():
    """Their number is above the largest of the dtype."""
    weights = sinkhorn_routing(torch.zeros(70_000, 2, dtype=torch.float16), plan_weights=True).weights
    assert torch.equal(weights, torch.full_like(weights, 0.5))


# ------------------------------------------------------------------------------------------------- loss-free balancer


def dual(gates: torch.Tensor, bias: torch.Tensor, top_k: int) -> float:
    """Value of the Lagrangian at its best choice."""
    T, E = gates.shape
    return float((gates + bias).topk(top_k, -1).values.sum() - top_k * T / E * bias.sum())


@pytest.mark.parametrize(("top_k", "signed"), [(1, True), (2, True), (1, False), (3, False)])
def test_lagrangian_falls_by_what_convexity_promises(top_k: int, signed: bool):
    """D(p') <= D(p) + <A' - L, p' - p>, so that D falls while a step leaves the overloaded experts overloaded."""
    gates = skewed(17, 240, 6).softmax(-1)
    balancer = AuxLossFreeBalancer(6, top_k=top_k, rate=2e-3 if signed else 5e-5, signed=signed).double()
    values, loads, biases = [], [], []
    for _ in range(400):
        biases.append(balancer.bias.clone())
        values.append(dual(gates, balancer.bias, top_k))
        loads.append(balancer(gates).load.double())
        balancer.update()
    L, monotone = top_k * 240 / 6, 0
    for i in range(399):
        bound = values[i] + float((loads[i + 1] - L) @ (biases[i + 1] - biases[i]))
        assert values[i + 1] <= bound + 1e-9
        if (loads[i] - L).abs().max() > 0.15 * L:
            assert values[i + 1] < values[i]
            monotone += 1
    assert monotone > 20
    assert (loads[-1] - L).abs().max() < 0.1 * L < (loads[0] - L).abs().max()


@pytest.mark.parametrize("top_k", [1, 2])
def test_decreasing_steps_reach_the_linear_program(top_k: int):
    from scipy.optimize import linprog

    T, E = 30, 5
    gates = skewed(18, T, E, 1.0).softmax(-1)
    rows, columns = np.kron(np.eye(T), np.ones(E)), np.kron(np.ones(T), np.eye(E))
    sums = np.r_[np.full(T, float(top_k)), np.full(E, top_k * T / E)]
    best = -linprog(-gates.numpy().ravel(), A_eq=np.r_[rows, columns], b_eq=sums, bounds=(0, 1)).fun
    gaps = {}
    for decay, rate in ((True, 0.3), (False, 0.05)):
        balancer = AuxLossFreeBalancer(E, top_k=top_k, rate=rate, decay=decay).double()
        values = []
        for _ in range(2000):
            values.append(dual(gates, balancer.bias, top_k))
            balancer(gates)
            balancer.update()
        assert min(values) >= best - 1e-9  # weak duality
        gaps[decay] = float(np.mean(values[-100:])) - best
    assert gaps[True] < 2e-3 * best
    assert gaps[True] < 0.2 * gaps[False]


def test_choice_by_bias_weights_by_gates():
    gates = skewed(19, 9, 4).softmax(-1).requires_grad_()
    balancer = AuxLossFreeBalancer(4, top_k=2).double()
    balancer.bias.copy_(torch.tensor([0.5, 0.2, -0.1, -0.6]))
    weights, experts, _ = balancer(gates)
    for i, row in enumerate((gates + balancer.bias).tolist()):
        best = max(itertools.permutations(range(4), 2), key=lambda pair: 2 * row[pair[0]] + row[pair[1]])
        assert experts[i].tolist() == list(best)
    (grad,) = torch.autograd.grad(weights.sum(), gates)
    assert torch.equal(grad, torch.zeros_like(gates).scatter(-1, experts, 1.0))


def test_one_update_a_step_whatever_was_called_before():
    gates = skewed(20, 40, 4).softmax(-1)
    whole, parts = (AuxLossFreeBalancer(4, rate=0.1, signed=False).double() for _ in range(2))
    whole(gates)
    for part in gates.split(10):
        parts(part)
    mask = torch.zeros(40, dtype=torch.bool)
    parts(gates, mask)
    parts.eval()
    parts(gates)  # not counted
    assert torch.equal(whole.load, parts.load)
    given = AuxLossFreeBalancer(4, rate=0.1, signed=False).double()
    given.update(whole.load)  # as summed over processes
    whole.update()
    parts.train()
    parts.update()
    for one in (parts, given):
        assert torch.equal(one.bias, whole.bias)
    counts = gates.argmax(-1).bincount(minlength=4)
    torch.testing.assert_close(whole.bias, 0.1 * (10 - counts).double())
    before = whole.bias.clone()
    whole.update()  # nothing was counted
    assert torch.equal(whole.bias, before)
    assert (int(whole.steps), int(whole.load.sum())) == (1, 0)


def test_bias_stays_in_single_precision():
    balancer = AuxLossFreeBalancer(4, rate=1e-4)
    balancer.bias.fill_(1.0)
    balancer.bfloat16()
    assert balancer.bias.dtype == torch.float32
    routing = balancer(torch.tensor([[0.9, 0.1, 0.1, 0.1]], dtype=torch.bfloat16))
    assert routing.weights.dtype == torch.bfloat16
    balancer.update()
    assert float(balancer.bias[0]) == pytest.approx(1 - 1e-4, abs=1e-7)
    fresh = AuxLossFreeBalancer(4)
    fresh.load_state_dict(balancer.state_dict())
    assert torch.equal(fresh.bias, balancer.bias)
    assert balancer.double().bias.dtype == torch.float64


def test_nan_in_a_token_stays_there():
    gates = skewed(21, 6, 3).softmax(-1)
    gates[2, 1] = torch.nan
    routing = AuxLossFreeBalancer(3).double()(gates)
    assert torch.isnan(routing.weights).flatten().tolist() == [i == 2 for i in range(6)]


def test_ties_go_to_the_first():
    for router in (SinkhornRouter(5, top_k=2).eval(), AuxLossFreeBalancer(5, top_k=2)):
        assert router(torch.zeros(3, 5)).experts.tolist() == [[0, 1]] * 3


def test_bad_input():
    x = torch.ones(4, 3)
    calls = {
        "top_k": lambda: sinkhorn_routing(x, top_k=4),
        "logits": lambda: sinkhorn_routing(x.long()),
        "mask": lambda: sinkhorn_routing(x, torch.ones(4)),
        "shares": lambda: sinkhorn_routing(x, None, -torch.ones(3)),
        "eps": lambda: sinkhorn_routing(x, eps=0.0),
        "momentum": lambda: SinkhornRouter(3, momentum=0.0),
        "rate": lambda: AuxLossFreeBalancer(3, rate=0.0),
        "experts": lambda: AuxLossFreeBalancer(0),
        "gates": lambda: AuxLossFreeBalancer(4)(x),
        "load": lambda: AuxLossFreeBalancer(3).update(torch.ones(4)),
    }
    others = {
        "experts": lambda: SinkhornRouter(2.5),
        "top_k": lambda: sinkhorn_routing(x, top_k=1.5),
        "momentum": lambda: SinkhornRouter(3, momentum="all"),
        "load": lambda: AuxLossFreeBalancer(3).update([1, 2, 3]),
    }
    for name, call in (*calls.items(), *others.items()):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            call()
    with pytest.raises(ValueError, match=r"mask: expected shape \(4,\)"):
        sinkhorn_routing(x, torch.ones(5, dtype=torch.bool))
    with pytest.raises(ValueError, match="top_k: expected"):
        SinkhornRouter(3, top_k=5)


def test_failures_follow_the_policy():
    hopeless = torch.full((4, 3), -torch.inf)
    hopeless[:, 0] = 0.0  # all tokens are allowed to one expert alone
    with pytest.raises((difflayers.SolveError, ValueError)):
        sinkhorn_routing(hopeless)


def test_masses_that_are_all_zero_are_named():
    with pytest.raises(ValueError, match="shares: expected masses that are not all 0, got 0"):
        sinkhorn_routing(torch.zeros(4, 2), shares=torch.zeros(2))

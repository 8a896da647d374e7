"""Networks and the head. Oracles: the decayed loss of the network itself, descent on it, closed-form predictions."""

import copy
import pickle

import pytest
import torch
from torch import Tensor

from difflayers.relu import (
    ConvexReLUHead,
    ConvexReLUSolution,
    GatedReLU,
    Logistic,
    TwoLayerReLU,
    convex_gated_relu,
    enumerate_gates,
    from_network,
    minimal_network,
    predict,
    sample_gates,
    to_network,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


X, Y = normal(1, 12, 2), normal(2, 12)
GATES = enumerate_gates(X)
BETA = 0.2


def decayed_loss(network: torch.nn.Module, beta: float = BETA) -> Tensor:
    decay = sum((p**2).sum() for p in network.parameters())
    return ((network(X) - Y) ** 2).sum() / 2 + beta / 2 * decay


def test_gated_network_predicts_and_costs_the_same():
    best = convex_gated_relu(X, Y, BETA, GATES)
    network = to_network(best)
    assert isinstance(network, GatedReLU)
    query = normal(3, 50, 2)
    assert torch.allclose(network(query), predict(best, query), atol=1e-12)
    assert torch.isclose(decayed_loss(network), best.objective, rtol=1e-12)
    back = from_network(network, X, Y, BETA)
    assert torch.isclose(back.objective, best.objective, rtol=1e-12)
    assert float(back.gap) < 1e-9


def test_no_descent_from_any_start_is_better():
    best = float(convex_gated_relu(X, Y, BETA, GATES).objective)
    found = []
    for seed in range(5):
        network = GatedReLU(
            GATES.vectors, 0.5 * normal(seed, len(GATES.vectors), 2), normal(9 + seed, len(GATES.vectors))
        )
        optimiser = torch.optim.LBFGS(network.parameters(), max_iter=300, line_search_fn="strong_wolfe")

        def closure(network: GatedReLU = network, optimiser: torch.optim.Optimizer = optimiser) -> Tensor:
            optimiser.zero_grad()
            loss = decayed_loss(network)
            loss.backward()
            return loss

        optimiser.step(closure)
        found.append(float(decayed_loss(network).detach()))
    assert min(found) >= best * (1 - 1e-9)
    assert min(found) <= best * 1.01


def relu_solution() -> ConvexReLUSolution:
    """Neurons inside cells of all patterns, some positive and some negative."""
    v, w = (
        GATES.vectors * normal(5, len(GATES.vectors), 1).relu(),
        GATES.vectors * normal(6, len(GATES.vectors), 1).relu(),
    )
    zero = X.new_zeros(())
    return ConvexReLUSolution(v, w, zero, zero, GATES)


def test_relu_network_and_back():
    given = relu_solution()
    network = to_network(given)
    assert isinstance(network, TwoLayerReLU)
    query = normal(3, 50, 2)
    assert torch.allclose(network(query), predict(given, query), atol=1e-12)
    back = from_network(network, X, Y, BETA)
    assert back.w is not None
    assert torch.allclose(predict(back, query), network(query), atol=1e-12)
    assert torch.isclose(back.objective, decayed_loss(network), rtol=1e-12)
    # nothing over these patterns, gated or not, is better than what the gap says
    gated = convex_gated_relu(X, Y, BETA, back.gates).objective
    assert float(back.objective - back.gap) <= float(gated) * (1 + 1e-12)


def test_unbalanced_units_cost_less_in_convex_form():
    network = TwoLayerReLU(3 * normal(1, 4, 2), normal(2, 4) / 3)
    assert from_network(network, X, Y, BETA).objective < decayed_loss(network)


def test_minimal_relu_network_has_the_same_fit_and_no_more_neurons_than_samples():
    network = TwoLayerReLU(normal(1, 40, 2), normal(2, 40))
    given = from_network(network, X, Y, BETA)
    pruned = minimal_network(given, X)
    assert pruned.w is not None and given.w is not None
    count = int((torch.cat([pruned.v, pruned.w]) != 0).any(-1).sum())
    assert count <= len(X)
    assert torch.allclose(predict(pruned, X), predict(given, X), atol=1e-8)
    norms = lambda s: float(s.v.norm(dim=-1).sum() + s.w.norm(dim=-1).sum())  # noqa: E731
    assert norms(pruned) < norms(given)


def test_collinear_neurons_are_merged():
    network = TwoLayerReLU(torch.stack([X[0], 2 * X[0], -X[0]]), torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64))
    pruned = minimal_network(from_network(network, X, Y, BETA), X)
    assert int((pruned.v != 0).any(-1).sum()) == 2
    assert torch.allclose(predict(pruned, X), network(X), atol=1e-10)


def test_networks_survive_copies():
    for network in (to_network(convex_gated_relu(X, Y, BETA, GATES)), to_network(relu_solution())):
        for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
            assert torch.equal(twin(X), network(X))
        assert "units=" in repr(network)
        assert set(dict(network.named_parameters())) == {"weight", "output"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TwoLayerReLU(normal(0, 3), normal(0, 3)), r"weight: expected shape \(m, d\)"),
        (lambda: TwoLayerReLU(normal(0, 3, 2), normal(0, 2)), r"output: expected shape \(3,\)"),
        (lambda: GatedReLU(normal(0, 2, 2), normal(0, 3, 2), normal(0, 3)), r"gates: expected shape \(3, 2\)"),
        (lambda: to_network(convex_gated_relu(X, Y.expand(2, 12), BETA, GATES)), "solution: expected one network"),
        (lambda: predict(convex_gated_relu(X, Y, BETA, GATES), normal(0, 3, 5)), "X: expected 2 columns"),
        (lambda: minimal_network(relu_solution(), X[:4]), r"X: expected shape \(12, 2\)"),
        (lambda: TwoLayerReLU(normal(0, 3, 2), normal(0, 3))(normal(0, 4)), "x: expected 2 entries"),
        (lambda: ConvexReLUHead(0.0, GATES), "beta: expected more than 0, got 0"),
        (lambda: ConvexReLUHead(0.1, normal(0, 3)), "gates: expected vectors"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------------------- head


def test_head_trains_and_predicts():
    head = ConvexReLUHead(BETA, GATES)
    query = normal(3, 5, 2)
    assert torch.equal(head(X, Y, query), predict(convex_gated_relu(X, Y, BETA, GATES), query))
    assert not list(head.parameters())
    twin = ConvexReLUHead(1.0, torch.zeros_like(GATES.vectors))
    twin.load_state_dict(head.state_dict())
    assert torch.equal(twin.gates, head.gates)


def test_head_of_several_outputs_is_several_heads():
    gates = sample_gates(torch.nn.functional.pad(X, (0, 1), value=1.0), 10, generator=torch.Generator().manual_seed(0))
    head = ConvexReLUHead(BETA, gates, bias=True, multi_output=True, loss=Logistic())
    single = ConvexReLUHead(BETA, gates, bias=True, loss=Logistic())
    labels = torch.stack([Y.sign(), -Y.sign(), torch.ones_like(Y)], -1)
    weights, query = 0.5 + normal(4, 12).abs(), normal(3, 5, 2)
    together = head(X, labels, query, weights)
    assert together.shape == (5, 3)
    for c in range(3):
        assert torch.allclose(together[:, c], single(X, labels[:, c], query, weights), atol=1e-9)
    batch = head(X.expand(2, 12, 2), labels.expand(2, 12, 3), query.expand(2, 5, 2), weights)
    assert torch.allclose(batch, together.expand(2, 5, 3), atol=1e-9)


def test_head_learns_beta_and_features():
    """Gradients of a validation loss in beta and in a feature map are central differences."""
    head = ConvexReLUHead(BETA, normal(7, 8, 2), learn_beta=True)
    raw, query, target = normal(1, 12, 3), normal(2, 6, 3), normal(3, 6)
    A = normal(4, 3, 2).requires_grad_()

    def loss() -> Tensor:
        return ((head(raw @ A, Y, query @ A) - target) ** 2).sum()

    assert head.log_beta is not None
    g_beta, g_A = torch.autograd.grad(loss(), [head.log_beta, A])
    h = 1e-6
    for p, g in ((head.log_beta, g_beta), (A, g_A)):
        way, ends = normal(5, *p.shape), []
        for sign in (1, -2):
            with torch.no_grad():
                p += sign * h * way
                ends.append(loss())
        with torch.no_grad():
            p += h * way
        assert torch.isclose((g * way).sum(), (ends[0] - ends[1]) / (2 * h), rtol=1e-5)


def test_what_is_no_such_network_is_refused():
    with pytest.raises(ValueError, match="network: expected a TwoLayerReLU or a GatedReLU, got Linear"):
        from_network(torch.nn.Linear(2, 1), X, Y, BETA)  # type: ignore[arg-type]

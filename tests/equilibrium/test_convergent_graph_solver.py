"""Graph equilibria against dense solves in numpy, on graphs that are easy to get wrong."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import difflayers
from difflayers import SolveError
from difflayers.equilibrium import (
    ConvergentGraphSolver,
    disjoint_union,
    edge_sigmoid,
    edge_softmax,
    graph_equilibrium,
    graph_equilibrium_ex,
)
from difflayers.implicit import Newton, Picard
from difflayers.linalg import GMRES, LU

F64 = torch.float64
DENSE, EDGES = LU(), GMRES(rtol=1e-13)


def random_graph(n=5, e=9, batch=(), d=2, dtype=F64):
    """Logits, edges and node terms; some nodes read nobody, some edges are listed twice."""
    edge_index = torch.randint(n, (2, e))
    edge_index[:, -1] = edge_index[:, 0]
    return torch.randn(*batch, e, dtype=dtype), edge_index, torch.randn(*batch, n, d, dtype=dtype)


def oracle(weights, edge_index, B, kappa):
    """(I - kappa A)^-1 B by numpy, one batch element at a time."""
    w, B = weights.detach().numpy(), B.detach().numpy()
    n, out = B.shape[-2], np.zeros_like(B)
    for index in np.ndindex(B.shape[:-2]):
        A = np.zeros((n, n))
        for e, (i, j) in enumerate(edge_index.T.tolist()):
            A[i, j] += w[index][e]
        k = kappa if isinstance(kappa, float) else kappa[index].item()
        out[index] = np.linalg.solve(np.eye(n) - k * A, B[index])
    return torch.from_numpy(out)


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


# -------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("solver", [DENSE, EDGES], ids=["dense", "edges"])
@pytest.mark.parametrize("weigh", [edge_sigmoid, edge_softmax])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_equals_a_dense_solve(solver, weigh, batch):
    logits, edge_index, B = random_graph(batch=batch)
    kappa = torch.rand(batch, dtype=F64)
    weights = weigh(logits, edge_index, 5)
    close(graph_equilibrium(weights, edge_index, B, kappa, solver=solver), oracle(weights, edge_index, B, kappa))


@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.9, 0.999, 0.999999])
@pytest.mark.parametrize("solver", [DENSE, EDGES], ids=["dense", "edges"])
def test_kappa_near_one(kappa, solver):
    logits, edge_index, B = random_graph(n=30, e=120)
    weights = edge_softmax(logits, edge_index, 30)
    H = graph_equilibrium(weights, edge_index, B, kappa, solver=solver)
    want = oracle(weights, edge_index, B, kappa)
    assert (H - want).abs().max() <= 1e-8 * want.abs().max()
    assert H.abs().max() <= B.abs().max() / (1 - kappa) * (1 + 1e-9)


def test_a_large_graph_takes_the_edges_and_forms_no_matrix():
    n, e = 3000, 15000
    logits, edge_index, B = random_graph(n=n, e=e, batch=(2,), d=1)
    weights = edge_softmax(logits, edge_index, n).requires_grad_()
    largest = 0

    def pack(t):
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        H = graph_equilibrium(weights, edge_index, B, 0.9)
    assert largest <= 2 * e

    def product(v, transpose=False):
        i, j = edge_index.flip(0) if transpose else edge_index
        return torch.zeros_like(v).index_add(0, i, weights[0].detach()[:, None] * v[j])

    close(H[0] - 0.9 * product(H[0]), B[0], 1e-8)
    H.sum().backward()
    assert torch.isfinite(weights.grad).all()
    # d/dB of sum(H): the transposed system, checked by its own equation
    b = B.clone().requires_grad_()
    (v,) = torch.autograd.grad(graph_equilibrium(weights.detach(), edge_index, b, 0.9).sum(), b)
    close(v[0] - 0.9 * product(v[0], transpose=True), torch.ones(n, 1, dtype=F64), 1e-8)


def test_the_default_changes_with_the_size_and_both_agree():
    logits, edge_index, B = random_graph(n=257, e=900, d=1)
    weights = edge_sigmoid(logits, edge_index, 257)
    H = graph_equilibrium(weights, edge_index, B, 0.9)
    close(H, graph_equilibrium(weights, edge_index, B, 0.9, solver=LU()), 1e-8)
    with difflayers.trace() as solves:
        graph_equilibrium(weights, edge_index, B, 0.9)
        graph_equilibrium(weights, edge_index.clamp_max(255), B[:-1], 0.9)
    assert solves[0].steps.max() > 1 >= solves[1].steps.max()


@pytest.mark.parametrize("solver", [DENSE, EDGES], ids=["dense", "edges"])
def test_isolated_nodes_no_edges_and_no_nodes(solver):
    B = torch.randn(3, 4, 2, dtype=F64)
    none = torch.zeros(2, 0, dtype=torch.int64)
    for weigh in (edge_sigmoid, edge_softmax):
        empty = weigh(torch.zeros(3, 0, dtype=F64), none, 4)
        assert empty.shape == (3, 0)
        close(graph_equilibrium(empty, none, B, 0.9, solver=solver), B)
    one = torch.tensor([[1], [2]])
    H = graph_equilibrium(torch.ones(1, dtype=F64), one, B, 0.5, solver=solver)
    close(H[:, [0, 2, 3]], B[:, [0, 2, 3]])
    close(H[:, 1], B[:, 1] + 0.5 * B[:, 2])
    assert graph_equilibrium(empty, none, B[:, :0], 0.9, solver=solver).shape == (3, 0, 2)
    assert graph_equilibrium(empty[:0], none, B[:0], 0.9, solver=solver).shape == (0, 4, 2)


def test_an_edge_listed_twice_counts_twice():
    twice = torch.tensor([[0, 0], [1, 1]])
    B = torch.tensor([[0.0], [1.0]], dtype=F64)
    half = torch.full((2,), 0.5, dtype=F64)
    for solver in (DENSE, EDGES):
        close(graph_equilibrium(half, twice, B, 0.8, solver=solver), torch.tensor([[0.8], [1.0]], dtype=F64))
    close(edge_softmax(torch.zeros(2, dtype=F64), twice, 2), half)
    close(edge_sigmoid(torch.zeros(2, dtype=F64), twice, 2), half / 2)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_edge_weights_contract(scale):
    logits, edge_index, _ = random_graph(n=6, e=20, batch=(2,))
    for weigh in (edge_sigmoid, edge_softmax):
        w = weigh(scale * logits, edge_index, 6)
        sums = torch.zeros(2, 6, dtype=F64).index_add(-1, edge_index[0], w)
        assert w.min() >= 0 and sums.max() <= 1 + 1e-12
    read = torch.zeros(6, dtype=torch.bool).index_fill(0, edge_index[0], True)
    close(sums[:, read], torch.ones_like(sums[:, read]))


def test_disjoint_union_equals_graph_by_graph():
    graphs = []
    for n, e in ((4, 7), (1, 0), (6, 11)):
        graphs.append((torch.randn(n, 3, dtype=F64), torch.randn(e, 2, dtype=F64), torch.randint(n, (2, e))))
    model = ConvergentGraphSolver(3, 2, 1, hidden=8, heads=3, kappa=0.8).double()
    nodes, edges, edge_index, graph = disjoint_union(*zip(*graphs, strict=True))
    together = model(nodes, edges, edge_index)
    for g, (x, e, index) in enumerate(graphs):
        close(together[graph == g], model(x, e, index))


# --------------------------------------------------------------------------------------------------------- derivatives


@pytest.mark.parametrize("solver", [DENSE, EDGES], ids=["dense", "edges"])
def test_gradcheck_without_activation(solver):
    logits, edge_index, B = random_graph(n=3, e=5, batch=(2,), d=1)
    kappa = torch.tensor([0.5, 0.9], dtype=F64)
    inputs = [t.requires_grad_() for t in (edge_softmax(logits, edge_index, 3), B, kappa)]

    def solve(w, B, kappa):
        return graph_equilibrium(w, edge_index, B, kappa, solver=solver)

    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(solve, inputs)


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
def test_activation(activation):
    logits, edge_index, B = random_graph(n=3, e=5, batch=(2,), d=1)
    kappa = torch.tensor([0.5, 0.8], dtype=F64)
    inputs = [t.requires_grad_() for t in (edge_softmax(logits, edge_index, 3), B, kappa)]

    def solve(w, B, kappa):
        return graph_equilibrium(w, edge_index, B, kappa, activation=activation)

    H, want = solve(*inputs), torch.zeros_like(B)
    for _ in range(300):
        messages = inputs[0].unsqueeze(-1) * want[:, edge_index[1]]
        want = activation(kappa[:, None, None] * torch.zeros_like(B).index_add(1, edge_index[0], messages) + B)
    close(H, want)
    for got, expected in zip(
        *(torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (H, want)), strict=True
    ):
        close(got, expected)
    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)


@pytest.mark.parametrize("weigh", [edge_sigmoid, edge_softmax])
def test_gradcheck_of_edge_weights(weigh):
    logits, edge_index, _ = random_graph(n=3, e=6, batch=(2,))
    inputs = [logits.requires_grad_()]

    def solve(logits):
        return weigh(logits, edge_index, 3)

    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, inputs)


@pytest.mark.parametrize(
    "options", [{"solver": DENSE}, {"solver": EDGES}, {"activation": torch.tanh}], ids=["dense", "edges", "tanh"]
)
def test_torch_func(options):
    logits, edge_index, B = random_graph(n=3, e=5, batch=(4,), d=1)

    def loss(logits, B, kappa):
        w = edge_softmax(logits, edge_index, 3)
        return graph_equilibrium(w, edge_index, B, kappa, **options).square().sum()

    kappa = torch.tensor([0.3, 0.5, 0.7, 0.9], dtype=F64)
    per_sample = vmap(grad(loss, (0, 1, 2)))(logits, B, kappa)
    second = vmap(jacrev(jacfwd(loss, 2), 2))(logits, B, kappa)
    for i in range(4):
        for got, want in zip(per_sample, grad(loss, (0, 1, 2))(logits[i], B[i], kappa[i]), strict=True):
            close(got[i], want, 1e-8)
        close(second[i], hessian(loss, 2)(logits[i], B[i], kappa[i]), 1e-7)
    shared = vmap(grad(loss, 1), in_dims=(None, 0, None))(logits[0], B, kappa[0])
    close(shared[2], grad(loss, 1)(logits[0], B[2], kappa[0]), 1e-8)
    close(jacrev(loss)(logits[0], B[0], kappa[0]), jacfwd(loss)(logits[0], B[0], kappa[0]), 1e-8)


def test_one_factorisation_serves_all_columns_and_orders():
    logits, edge_index, B = random_graph(d=4)
    w = edge_softmax(logits, edge_index, 5).requires_grad_()
    count, lu = 0, torch.linalg.lu_factor_ex

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return lu(*args, **kwargs)

    torch.linalg.lu_factor_ex = counted
    try:
        (g,) = torch.autograd.grad(graph_equilibrium(w, edge_index, B, 0.9).square().sum(), w, create_graph=True)
        g.square().sum().backward()
    finally:
        torch.linalg.lu_factor_ex = lu
    assert count == 1


# ------------------------------------------------------------------------------------------------------ dtype, failure


@pytest.mark.parametrize("activation", [None, torch.tanh])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype, activation):
    logits, edge_index, B = random_graph(dtype=dtype)
    w = edge_softmax(logits, edge_index, 5).detach().requires_grad_()
    H = graph_equilibrium(w, edge_index, B, 0.5, activation=activation)
    assert H.dtype == dtype
    H.sum().backward()
    assert w.grad.dtype == dtype
    if activation is None:
        tol = 1e-5 if dtype == torch.float32 else 2e-2
        close(H.double(), oracle(w.double(), edge_index, B.double(), 0.5), tol)


def test_other_default_device_and_dtype():
    model, graph = model_and_graph(learn_kappa=True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            for options in ({"solver": DENSE}, {"solver": EDGES}, {"activation": torch.tanh, "solver": None}):
                for name, value in options.items():
                    setattr(model, name, value)
                y = model(*graph)
                y.sum().backward()
                assert y.dtype == F64 and y.device.type == "cpu"
    finally:
        torch.set_default_dtype(before)


def test_an_edge_index_made_inside_a_transform():
    logits, edge_index, B = random_graph()

    def loss(logits):
        index = edge_index.flip(1).flip(1)
        weights = edge_softmax(logits, index, 5)
        options = ({"solver": DENSE}, {"solver": EDGES}, {"activation": torch.tanh})
        return sum(graph_equilibrium(weights, index, B, 0.9, **o).square().sum() for o in options)

    close(vmap(grad(loss))(torch.stack([logits, 2 * logits]))[1], grad(loss)(2 * logits), 1e-8)


def test_reports():
    logits, edge_index, B = random_graph(batch=(3,))
    w = edge_softmax(logits, edge_index, 5)
    s = graph_equilibrium_ex(w, edge_index, B, 0.9, solver=EDGES)
    assert s.converged.all() and s.status.shape == (2, 3) and s.residual.max() < 1e-10
    s = graph_equilibrium_ex(w, edge_index, B, 0.9, activation=torch.tanh)
    assert s.converged.all() and s.status.shape == (3,)
    with difflayers.trace() as solves:
        graph_equilibrium(w, edge_index, B, 0.9, activation=torch.relu, solver=Picard())
    assert solves[0].steps.max() > 1
    with pytest.warns(difflayers.SolveWarning):
        graph_equilibrium(w, edge_index, B, 0.9, activation=torch.relu, solver=Picard(max_steps=3))


def test_a_map_that_does_not_contract_fails_alone():
    loop = torch.tensor([[0], [0]])
    weights = torch.tensor([[0.5], [1.0]], dtype=F64, requires_grad=True)
    B, one = torch.ones(2, 1, 1, dtype=F64), torch.tensor(1.0, dtype=F64)
    with pytest.raises(SolveError, match="elements"):
        graph_equilibrium(weights, loop, B, one)
    H = graph_equilibrium(weights, loop, B, one, on_failure="nan")
    assert H.flatten().isnan().tolist() == [False, True]
    H[0].sum().backward()
    close(weights.grad, torch.tensor([[4.0], [0.0]], dtype=F64))


def bad_calls():
    w, index, B = torch.full((2,), 0.5), torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 1)
    return {
        "edge_index: expected an integer": (w, index.float(), B, 0.5),
        r"edge_index: expected shape \(2, E\)": (w, index[0], B, 0.5),
        "edge_index: expected nodes in 0..1, got 0..2": (w, index * 2, B, 0.5),
        "edge_index: expected nodes in 0..1, got -1..0": (w, -index, B, 0.5),
        r"edge_index: expected \(3,\) edges": (torch.zeros(3), index, B, 0.5),
        "edge_index: expected a tensor": (w, [[0], [1]], B, 0.5),
        "edge_weights: expected dtype": (w.double(), index, B, 0.5),
        "edge_weights: expected a floating": (index[0], index, B, 0.5),
        "edge_weights: expected batch": (torch.zeros(3, 2), index, torch.zeros(2, 2, 1), 0.5),
        "B: expected at least 2": (w, index, B[0], 0.5),
        r"kappa: expected a number in \[0, 1\)": (w, index, B, 1.0),
    }


@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_named(message):
    with pytest.raises(ValueError, match=message):
        graph_equilibrium(*bad_calls()[message])


def test_a_solver_of_the_wrong_kind_is_refused():
    w, index, B, kappa = torch.full((2,), 0.5), torch.tensor([[0, 1], [1, 0]]), torch.zeros(2, 1), 0.5
    with pytest.raises(ValueError, match="LinearSolver without an activation"):
        graph_equilibrium(w, index, B, kappa, solver=Newton())
    with pytest.raises(ValueError, match="IterativeSolver with an activation"):
        graph_equilibrium(w, index, B, kappa, activation=torch.tanh, solver=LU())
    with pytest.raises(ValueError, match="captures"):
        graph_equilibrium(w, index, B, kappa, activation=nn.PReLU())
    with pytest.raises(ValueError, match="NaN"):
        graph_equilibrium(w, index, B.fill_(torch.nan), kappa)


# -------------------------------------------------------------------------------------------------------------- module


def model_and_graph(batch=(), **options):
    model = ConvergentGraphSolver(3, 2, 1, hidden=6, heads=2, **options).double()
    return model, (torch.randn(*batch, 5, 3, dtype=F64), torch.randn(*batch, 9, 2, dtype=F64), random_graph()[1])


@pytest.mark.parametrize(
    "options",
    [{}, {"activation": torch.tanh}, {"learn_kappa": True, "head_features": 3}, {"edge_weights": edge_softmax}],
    ids=lambda o: ",".join(o) or "plain",
)
def test_module(options):
    model, (nodes, edges, edge_index) = model_and_graph((4,), **options)
    y = model(nodes, edges, edge_index)
    assert y.shape == (4, 5, 1)
    close(y[1], model(nodes[1], edges[1], edge_index))
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_module_gradcheck():
    model, (nodes, edges, edge_index) = model_and_graph(learn_kappa=True)
    names = ["kappa_logit", "edge_head.weight"]
    inputs = [t.detach().requires_grad_() for t in (nodes, edges, *(model.get_parameter(n) for n in names))]

    def solve(nodes, edges, *parameters):
        return functional_call(model, dict(zip(names, parameters, strict=True)), (nodes, edges, edge_index))

    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)


def test_module_round_trips():
    model, graph = model_and_graph(learn_kappa=True)
    y = model(*graph)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = ConvergentGraphSolver(3, 2, 1, hidden=6, heads=2, learn_kappa=True).double()
    other.load_state_dict(torch.load(buffer))
    for twin in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(twin(*graph), y, 0)
    with torch.no_grad():
        assert not model.eval()(*graph).requires_grad
    assert "kappa=0.5" in repr(model) and "edge_sigmoid" in repr(model)


def test_module_refuses_bad_input():
    model, (nodes, edges, edge_index) = model_and_graph()
    with pytest.raises(ValueError, match="nodes: expected shape"):
        model(nodes[:, :2], edges, edge_index)
    with pytest.raises(ValueError, match="edges: expected shape"):
        model(nodes, edges[:, :1], edge_index)
    with pytest.raises(ValueError, match="edge_index: expected nodes"):
        model(nodes, edges, edge_index + 5)
    for options in ({"kappa": 1.0}, {"heads": 0}, {"on_failure": "pass"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            ConvergentGraphSolver(3, 2, 1, **options)


def test_it_hears_from_afar_where_few_rounds_do_not():
    n = 12
    path = torch.stack([torch.arange(n - 1), torch.arange(1, n)])  # every node reads the next
    model = ConvergentGraphSolver(1, 1, 1, hidden=8, heads=2, kappa=0.9).double()
    nodes = torch.zeros(n, 1, dtype=F64, requires_grad=True)
    y = model(nodes, torch.zeros(n - 1, 1, dtype=F64), path)
    (g,) = torch.autograd.grad(y[0].sum(), nodes)
    assert g[-1].abs() > 0

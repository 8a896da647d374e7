"""The module of quadratic programs. Oracle: Clarabel on the program that the parameters mean."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from difflayers import trace
from difflayers.conic import InteriorPoint, Moreau, QuadraticProgram, SparseMatrix, quadratic_program

F64 = torch.float64


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def learned() -> QuadraticProgram:
    parameters = {"factor": draw(0, 5, 5), "G": draw(1, 6, 5), "A": draw(2, 2, 5), "x0": draw(3, 5), "s0": draw(4, 6)}
    return QuadraticProgram(**{name: nn.Parameter(t) for name, t in parameters.items()}, ridge=0.1)


def test_learned_data_mean_what_the_docstring_says():
    import cvxpy as cp

    module, q = learned(), draw(5, 3, 5)
    L, G, A, x0, s0 = (getattr(module, name).detach().numpy() for name in ("factor", "G", "A", "x0", "s0"))
    found = module(q)
    for i in range(3):
        x = cp.Variable(5)
        energy = cp.sum_squares(L.T @ x) / 2 + 0.05 * cp.sum_squares(x) + q[i].numpy() @ x
        rows = [G @ x <= G @ x0 + np.log1p(np.exp(s0)), A @ x == A @ x0]
        cp.Problem(cp.Minimize(energy), rows).solve(
            solver=cp.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10
        )
        np.testing.assert_allclose(found[i].detach().numpy(), x.value, atol=1e-6)


def test_parameters_learn_and_the_program_stays_one():
    """A program is learned from solutions of another one; P stays positive definite and the program feasible."""
    truth, module, q = learned(), learned(), 2 * draw(6, 64, 5)
    with torch.no_grad():
        target = truth(q)
        for p in module.parameters():
            p.add_(0.3 * torch.cos(torch.arange(p.numel(), dtype=F64)).reshape(p.shape))
    optimiser = torch.optim.Adam(module.parameters(), lr=0.02)
    losses = []
    for _ in range(120):
        optimiser.zero_grad()
        loss = (module(q) - target).square().mean()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.02 * losses[0]
    P, G, h, _, _ = module.data()
    assert float(torch.linalg.eigvalsh(P.detach()).min()) >= 0.1 - 1e-12
    assert bool((G @ module.x0 < h).all())


def test_tensors_are_buffers_and_parameters_are_parameters():
    module = QuadraticProgram(P=torch.eye(3), G=nn.Parameter(torch.eye(3)), h=torch.ones(3))
    assert [name for name, _ in module.named_parameters()] == ["G"]
    assert sorted(name for name, _ in module.named_buffers()) == ["P", "h"]
    assert sorted(module.state_dict()) == ["G", "P", "h"]
    clone = copy.deepcopy(module)
    clone.load_state_dict(module.state_dict())
    assert torch.equal(clone(-2 * torch.ones(3)), torch.ones(3))


def test_data_are_given_here_or_there():
    P, G, h, q = torch.eye(3, dtype=F64), torch.eye(3, dtype=F64), torch.ones(4, 3, dtype=F64), draw(0, 4, 3)
    expected = quadratic_program(P, q, G, h)
    torch.testing.assert_close(QuadraticProgram(P, G)(q, h=h), expected)
    torch.testing.assert_close(QuadraticProgram()(q, P, G, h), expected)
    with pytest.raises(ValueError, match="G: expected once, got it here and at construction"):
        QuadraticProgram(P, G)(q, G=G, h=h)
    with pytest.raises(ValueError, match="P: expected once"):
        QuadraticProgram(factor=P)(q, P)
    with pytest.raises(ValueError, match="h: expected once"):
        QuadraticProgram(P, G, x0=q[0], s0=q[0])(q, h=h)
    with pytest.raises(ValueError, match=r"P: expected at construction \(or `factor`\), or here, got None"):
        QuadraticProgram()(q, G=G, h=h)
    with pytest.raises(ValueError, match="s0: expected together with x0 where there are inequalities"):
        QuadraticProgram(P, G, x0=q[0])(q)


def test_a_point_that_is_feasible_follows_the_rows_that_are_passed():
    P, x0, s0, q = torch.eye(3, dtype=F64), draw(1, 3), draw(2, 2), draw(3, 4, 3)
    G, A = draw(4, 4, 2, 3), draw(5, 4, 1, 3)
    found = QuadraticProgram(P, x0=x0, s0=s0)(q, G=G, A=A)
    torch.testing.assert_close(found, quadratic_program(P, q, G, G @ x0 + F.softplus(s0), A, A @ x0))


def test_wrong_construction():
    eye = torch.eye(2)
    with pytest.raises(ValueError, match=r"P: expected a tensor, got a Parameter; pass `factor`"):
        QuadraticProgram(nn.Parameter(eye))
    with pytest.raises(ValueError, match=r"P, factor: expected one of them, got both"):
        QuadraticProgram(eye, factor=eye)
    with pytest.raises(ValueError, match=r"x0: expected instead of h and b, got both"):
        QuadraticProgram(eye, G=eye, h=eye[0], x0=eye[0])
    with pytest.raises(ValueError, match=r"s0: expected together with x0, got it alone"):
        QuadraticProgram(eye, G=eye, s0=eye[0])
    with pytest.raises(ValueError, match=r"ridge: expected a number of at least 0, got -1"):
        QuadraticProgram(factor=eye, ridge=-1)
    with pytest.raises(ValueError, match=r"smoothing: expected a positive number or None"):
        QuadraticProgram(eye, smoothing=-1)
    with pytest.raises(ValueError, match=r"on_failure: expected"):
        QuadraticProgram(eye, on_failure="explode")
    with pytest.raises(ValueError, match=r"factor: expected at least 2 dimensions"):
        QuadraticProgram(factor=eye[0])
    with pytest.raises(ValueError, match=r"s0: expected shape \(m\) with m = 2 as of G, got \(3,\)"):
        QuadraticProgram(eye, G=eye, x0=eye[0], s0=torch.zeros(3))
    with pytest.raises(ValueError, match=r"P: expected a SparseMatrix or a tensor of layout torch.sparse_csr"):
        QuadraticProgram(eye.to_sparse())


def test_says_which_solver_runs():
    module, q = learned(), draw(0, 5)
    assert f"solver={Moreau()!r} by device" in repr(module)
    with trace() as solves:
        module(q)
    assert repr(Moreau()) in solves[0].name
    module = QuadraticProgram(torch.eye(5, dtype=F64), solver=InteriorPoint(), smoothing=0.1, on_failure="nan")
    assert f"solver={InteriorPoint()!r}, smoothing=0.1, on_failure='nan'" in repr(module)
    assert f"solver={InteriorPoint()!r} by device" in repr(learned().to("meta"))
    assert "solver=by device" in repr(QuadraticProgram())


def test_multipliers_smoothing_and_warm_start():
    module, q = learned(), draw(7, 3, 5)
    earlier = module.solve(q)
    assert bool((module.solve(q, warm_start=earlier).steps == 0).all())
    torch.testing.assert_close(module(q, warm_start=earlier), module(q))
    slopes = []
    for smoothing in (None, 1.0):
        module.smoothing = smoothing
        module.zero_grad()
        x = module(q)
        x.sum().backward()
        slopes.append(module.s0.grad.clone())
    assert torch.equal(x, earlier.value.x) and not torch.allclose(*slopes)


def test_in_a_sequential_under_autocast():
    torch.manual_seed(0)
    simplex = {"G": -torch.eye(3), "h": torch.zeros(3), "A": torch.ones(1, 3), "b": torch.ones(1)}
    model = nn.Sequential(nn.Linear(4, 3), QuadraticProgram(torch.eye(3), **simplex))
    x = torch.randn(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    found.float().square().sum().backward()
    torch.testing.assert_close(found.float(), model(x), rtol=0.02, atol=0.02)
    assert bool(torch.isfinite(model[0].weight.grad).all())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
def test_sparse_data_are_held_copied_saved_and_learned():
    P, G, x0, s0 = torch.diag(draw(0, 4).abs() + 1), draw(1, 3, 4) * (draw(2, 3, 4) > 0), draw(3, 4), draw(4, 3)
    index = G.to_sparse_csr()
    values = nn.Parameter(index.values().clone())
    sparse = SparseMatrix(index.crow_indices(), index.col_indices(), values, (3, 4))
    module = QuadraticProgram(P.to_sparse_csr(), sparse, x0=x0, s0=s0)
    assert "P=(4, 4) sparse, G=(3, 4) sparse learned" in repr(module) and "by data" in repr(module)
    dense, q = QuadraticProgram(P, nn.Parameter(G), x0=x0, s0=s0), 3 * draw(5, 6, 4)
    loss = [model(q).sin().sum() for model in (module, dense)]
    torch.testing.assert_close(*loss)
    for one in loss:
        one.backward()
    rows = torch.repeat_interleave(torch.arange(3), index.crow_indices().diff())
    torch.testing.assert_close(module.G.grad, dense.G.grad[rows, index.col_indices()], rtol=1e-9, atol=1e-9)
    assert bool((module.G.grad != 0).any())
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(q), module(q))
        copied.G.data.mul_(0.5)
        copied.load_state_dict(module.state_dict())
        assert torch.equal(copied(q), module(q))
    with pytest.raises(ValueError, match="G: expected a SparseMatrix with a Parameter as values"):
        QuadraticProgram(P, nn.Parameter(G.to_sparse_csr()), torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="P: expected a tensor, got a Parameter"):
        QuadraticProgram(SparseMatrix(torch.tensor([0, 1]), torch.tensor([0]), nn.Parameter(draw(0, 1)), (1, 1)))

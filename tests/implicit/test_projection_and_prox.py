"""``argmin`` with a projection or a prox.

Oracles: for ``||z - x||^2 / 2 + t |z|`` soft thresholding in plain torch; for the lasso the linear system of its
support, ``A_S^T A_S z_S = A_S^T b - t sign(z_S)``, with the support and signs of scikit-learn's coordinate descent; for
boxes the clamp; for nonnegative least squares scipy's nnls. Derivatives by autograd through these formulas.
"""

from __future__ import annotations

import pytest
import torch
from torch.func import jacfwd, jacrev, vmap

from difflayers import SolveError, SolveWarning, Status
from difflayers.implicit import (
    LBFGS,
    AcceleratedProximalGradient,
    Anderson,
    Implicit,
    Inequality,
    Neumann,
    Newton,
    OneStep,
    Picard,
    Projection,
    Prox,
    Unrolled,
    argmin,
    argmin_ex,
)
from difflayers.linalg import GMRES, Cholesky

generator = torch.Generator().manual_seed(7)
A = torch.randn(12, 6, dtype=torch.float64, generator=generator)
B = torch.randn(3, 12, dtype=torch.float64, generator=generator)
T = torch.tensor(2.0, dtype=torch.float64)


def soft(v, t):
    return v.sign() * (v.abs() - t).relu()


def squares(z, b, *_):
    return (z @ A.to(z).mT - b).square().sum(-1) / 2


L1 = Prox(lambda z, step, b, t: soft(z, (step * t).unsqueeze(-1)))
ORTHANT = Projection(lambda z, b: z.relu())


def lasso(b, t, **options):
    return argmin(squares, b.new_zeros(*b.shape[:-1], 6), (b, t), constraint=L1, **options)


def lasso_on_support(b, t):
    from sklearn.linear_model import Lasso

    out = []
    for row in b:
        fit = Lasso(alpha=float(t.detach()) / len(row), fit_intercept=False, tol=1e-14, max_iter=100_000)
        z = torch.from_numpy(fit.fit(A.numpy(), row.detach().numpy()).coef_)
        S = A[:, z != 0]
        full = torch.zeros(6, dtype=torch.float64)
        full[z != 0] = 1.0
        z_S = torch.linalg.solve(S.mT @ S, S.mT @ row - t * z[z != 0].sign())
        out.append(torch.zeros(6, dtype=torch.float64).masked_scatter(full.bool(), z_S))
    return torch.stack(out)


@pytest.mark.parametrize("declared", [None, (1, 0)])
@pytest.mark.parametrize("solver", [None, Anderson(max_steps=500), Picard(max_steps=5000), Newton()])
def test_lasso_to_second_order(solver, declared):
    b, t = B.clone().requires_grad_(), T.clone().requires_grad_()
    got, want = lasso(b, t, solver=solver, arg_ndims=declared), lasso_on_support(b, t)
    assert torch.equal(got == 0, want == 0) or solver is not None
    assert (got - want).abs().max() < 1e-8
    first = [torch.autograd.grad(v.square().sum(), (b, t), create_graph=True) for v in (got, want)]
    second = [torch.autograd.grad(g[0].square().sum() + g[1] ** 2, (b, t)) for g in first]
    for mine, theirs in (first, second):
        for g, w in zip(mine, theirs, strict=True):
            assert (g - w).abs().max() < 1e-7 * w.abs().max()


@pytest.mark.parametrize("declared", [None, (1, 0)])
def test_transforms(declared):
    layer = lambda b, t: lasso(b, t, arg_ndims=declared)  # noqa: E731
    assert (vmap(layer, (0, None))(B, T) - layer(B, T)).abs().max() < 1e-12
    assert (jacrev(layer, 1)(B, T) - jacfwd(layer, 1)(B, T)).abs().max() < 1e-12


def test_a_prox_alone():
    x = torch.tensor([3.0, -0.5, 0.7], dtype=torch.float64, requires_grad=True)
    t = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    z = argmin(
        lambda z, x, t: (z - x).square().sum(-1) / 2,
        torch.zeros(3).double(),
        (x, t),
        constraint=Prox(lambda z, step, x, t: soft(z, step * t)),
    )
    assert (z - soft(x, t)).abs().max() < 1e-14
    assert [g.tolist() for g in torch.autograd.grad(z.sum(), (x, t))] == [[1.0, 0.0, 0.0], -1.0]


def test_nonnegative_least_squares():
    from scipy.optimize import nnls

    b = B.clone().requires_grad_()
    z = argmin(squares, torch.full((3, 6), -5.0).double(), (b,), constraint=ORTHANT)
    want = torch.stack([torch.from_numpy(nnls(A.numpy(), row.numpy())[0]) for row in B])
    assert (z - want).abs().max() < 1e-10 and (z >= 0).all()
    by_kkt = argmin(squares, torch.zeros(3, 6).double(), (b,), constraint=Inequality(lambda z, b: -z))
    g, h = (torch.autograd.grad(v.square().sum(), b)[0] for v in (z, by_kkt))
    assert (g - h).abs().max() < 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scales(scale):
    """Unknown and data in other units; then the objective alone."""
    want = lasso(B, T)
    assert (lasso(scale * B, scale * T) / scale - want).abs().max() < 1e-10
    scaled = lambda z, b, t: scale * squares(z, b)  # noqa: E731
    start = torch.zeros(3, 6).double()
    assert (argmin(scaled, start, (B, scale * T), constraint=L1) - want).abs().max() < 1e-10


def test_float32():
    z = lasso(B.float(), T.float())
    assert z.dtype == torch.float32 and (z - lasso(B, T)).abs().max() < 1e-5


def test_a_tree():
    x = torch.tensor([2.0, -3.0], dtype=torch.float64, requires_grad=True)
    f = lambda z, x: (z["a"] - x).square().sum(-1) + (z["b"] - 5).square().sum(-1)  # noqa: E731
    box = Projection(lambda z, x: {"a": z["a"].clamp(-1, 3), "b": z["b"].clamp(max=4)})
    start = {"a": torch.zeros(2).double(), "b": torch.zeros(1).double()}
    z = argmin(f, start, (x,), constraint=box)
    assert z["a"].tolist() == [2.0, -1.0] and z["b"].tolist() == [4.0]
    assert torch.autograd.grad(z["a"].sum(), x)[0].tolist() == [1.0, 0.0]


def test_other_adjoints():
    b, t = B.clone().requires_grad_(), T.clone().requires_grad_()
    want = torch.autograd.grad(lasso(b, t).sum(), (b, t))
    for adjoint, tol in ((Neumann(2000), 1e-6), (Unrolled(400), 1e-6), (Implicit(GMRES()), 1e-8)):
        got = torch.autograd.grad(lasso(b, t, adjoint=adjoint).sum(), (b, t))
        for g, w in zip(got, want, strict=True):
            assert (g - w).abs().max() < tol, adjoint
    # one step differentiates the update at the solution alone: right where the support is empty, biased elsewhere
    one = torch.autograd.grad(lasso(b, t, adjoint=OneStep()).sum(), (b, t))
    assert torch.isfinite(one[0]).all() and (one[0] - want[0]).abs().max() > 1e-3


def test_status():
    down = lambda z, b: -z.square().sum(-1)  # noqa: E731
    start = torch.ones(3, 6).double()
    assert (argmin_ex(down, start, (B,), constraint=ORTHANT).status == Status.UNBOUNDED).all()
    with pytest.raises(SolveError, match="UNBOUNDED"):
        argmin(down, start, (B,), constraint=ORTHANT)
    with pytest.warns(SolveWarning):
        argmin(squares, start, (B,), constraint=ORTHANT, solver=AcceleratedProximalGradient(max_steps=1))
    b = B.clone()
    b[1, 0] = torch.nan
    healthy, found = (
        argmin_ex(squares, start, (B,), constraint=ORTHANT),
        argmin_ex(squares, start, (b,), constraint=ORTHANT),
    )
    assert found.failed.tolist() == [False, True, False]
    assert torch.equal(found.value[[0, 2]], healthy.value[[0, 2]])


def test_bad_input():
    start = torch.zeros(3, 6).double()
    with pytest.raises(ValueError, match="constraint output: expected shape"):
        argmin(squares, start, (B,), constraint=Projection(lambda z, b: z[..., :2]))
    with pytest.raises(ValueError, match="solver: expected one that finds a composite or fixed_point or root"):
        argmin(squares, start, (B,), constraint=ORTHANT, solver=LBFGS())
    t = T.clone().requires_grad_()
    with pytest.raises(ValueError, match="constraint: expected a function of its arguments alone"):
        argmin(squares, start, (B,), constraint=Prox(lambda z, step, b: soft(z, step.unsqueeze(-1) * t)))
    with pytest.raises(ValueError, match="constraint: expected batch elements that do not see each other"):
        argmin(squares, start, (B,), constraint=Projection(lambda z, b: z.relu() + 1e-9 * z.mean(0)))


def test_cholesky_is_refused_where_the_jacobian_is_no_hessian():
    """The Jacobian of a projected step is not symmetric: one triangle of it gave a gradient 20 per cent off."""
    x = torch.tensor([1.0, 0.2], dtype=torch.float64, requires_grad=True)
    A = torch.tensor([[2.0, 0.7], [0.7, 1.0]], dtype=torch.float64)

    def objective(z, x):
        return (z * (z @ A)).sum(-1) / 2 - (z * x).sum(-1)

    with pytest.raises(ValueError, match=r"adjoint: .*LU\(\)"):
        box = Projection(lambda z, x: z.clamp(-0.3, 0.3))
        argmin(objective, torch.zeros_like(x), (x,), constraint=box, adjoint=Implicit(Cholesky())).sum().backward()

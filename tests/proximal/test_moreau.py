"""Moreau envelopes against closed forms, and MoreauGrad against its optimality condition and the paper's claims."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, vmap

import difflayers
from difflayers import SolveError, SolveWarning
from difflayers._solution import Status
from difflayers.proximal import (
    L1,
    GroupL2,
    MoreauGrad,
    moreau_envelope,
    moreau_envelope_ex,
    prox_l1,
    prox_of,
    prox_of_ex,
)

F64 = torch.float64


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# --------------------------------------------------------------------------------------------- envelopes in closed form


def test_the_envelope_of_the_absolute_value_is_huber():
    x, t = draw(50, 3), draw(50, seed=1).exp()
    x[0] = t[0]  # the kink of the prox, where the envelope is still smooth
    x.requires_grad_()
    t.requires_grad_()
    delta = t.unsqueeze(-1)
    huber = torch.where(x.abs() <= delta, x.square() / (2 * delta), x.abs() - delta / 2).sum(-1)
    value = moreau_envelope(lambda z: z.abs().sum(-1), x, t, prox=prox_l1)
    torch.testing.assert_close(value, huber)
    w = draw(50, seed=2)
    expected = torch.autograd.grad((huber * w).sum(), (x, t))
    torch.testing.assert_close(torch.autograd.grad((value * w).sum(), (x, t)), expected)


def test_a_kink_without_its_prox_is_not_passed_over_in_silence():
    with pytest.warns(SolveWarning, match="stopped after"):
        moreau_envelope(lambda z: z.abs().sum(-1), torch.tensor([[0.3, -0.2]], dtype=F64), 1.0)


@pytest.mark.parametrize("c", [0.5, 2.0])
def test_a_concave_function_has_an_envelope_for_short_steps_only(c):
    x, objective = draw(5, 3), lambda z: -c / 2 * z.square().sum(-1)
    t = 0.6 / c
    torch.testing.assert_close(moreau_envelope(objective, x, t), -c / (2 * (1 - c * t)) * x.square().sum(-1))
    x[0] = 0  # a maximum: where the solve would start, and stay
    solution = moreau_envelope_ex(objective, x, 1.5 / c)
    assert (solution.status == Status.UNBOUNDED).all()
    with pytest.raises(SolveError, match="UNBOUNDED"):
        moreau_envelope(objective, x, 1.5 / c)
    kept = moreau_envelope(objective, x, torch.tensor([t, t, 1.5 / c, t, t], dtype=F64), on_failure="nan")
    assert kept.isnan().tolist() == [False, False, True, False, False]


def quadratic(z, Q, q):
    return ((z @ Q) * z).sum(-1) / 2 + z @ q


def quadratic_prox(x, t, Q, q):
    eye = torch.eye(len(q), dtype=x.dtype)
    return torch.linalg.solve(eye + t[:, None, None] * (Q + Q.mT) / 2, x - t[:, None] * q)


def quadratic_envelope(x, t, Q, q):
    z = quadratic_prox(x, t, Q, q)
    return quadratic(z, Q, q) + (z - x).square().sum(-1) / (2 * t)


def test_a_quadratic_to_second_order():
    B = draw(3, 3)
    args = (draw(4, 3, seed=1), draw(4, seed=2).exp(), B @ B.mT, draw(3, seed=3))
    found = lambda x, t, Q, q: moreau_envelope(quadratic, x, t, (Q, q), arg_ndims=(2, 1))  # noqa: E731
    torch.testing.assert_close(found(*args), quadratic_envelope(*args))
    w = draw(4, seed=4)
    for i in range(4):
        mine = hessian(lambda *a: (found(*a) * w).sum(), argnums=i)(*args)
        expected = hessian(lambda *a: (quadratic_envelope(*a) * w).sum(), argnums=i)(*args)
        torch.testing.assert_close(mine, expected, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(
        prox_of(quadratic, *args[:2], args[2:]), quadratic_prox(*args), atol=1e-9, rtol=1e-9
    )  # without declared dimensions
    leaves = [a.clone().requires_grad_() for a in args]
    prox = lambda x, t, Q, q: prox_of(quadratic, x, t, (Q, q), arg_ndims=(2, 1))  # noqa: E731
    assert gradcheck(prox, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(prox, leaves, fast_mode=True)


def test_first_order_solves_nothing():
    x, t, theta = draw(3, 4).requires_grad_(), torch.tensor([0.3, 0.8, 1.0], dtype=F64).requires_grad_(), draw(4)
    theta.requires_grad_()
    objective = lambda z, theta: (theta * z).cos().sum(-1) / 4  # noqa: E731
    with difflayers.trace() as solves:
        solution = moreau_envelope_ex(objective, x, t, (theta,))
        value, z = solution.value.envelope, solution.value.prox.detach()
        grads = torch.autograd.grad(value.sum(), (x, t, theta), create_graph=True)
        assert [s.phase for s in solves] == ["forward"]
        torch.autograd.grad(grads[0].sum(), x)
        assert [s.phase for s in solves][1:] == ["adjoint"]
    torch.testing.assert_close(grads[0], (x - z) / t[:, None], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(grads[1], -(z - x).square().sum(-1) / (2 * t.square()), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(grads[2], torch.autograd.grad(objective(z, theta).sum(), theta)[0], atol=1e-9, rtol=1e-9)


def test_shapes_pytrees_and_dtypes():
    matrices, scale = draw(2, 3, 2, 2), {"a": draw(()).abs(), "b": [2.0, draw(2, 2, seed=1)]}
    objective = lambda z, p: p["a"] * (z - p["b"][0] * p["b"][1]).square().sum((-1, -2))  # noqa: E731
    z = prox_of(objective, matrices, 0.5, (scale,), event_ndim=2)
    expected = (matrices + scale["a"] * 2 * scale["b"][1]) / (1 + scale["a"])
    torch.testing.assert_close(z, expected)
    assert moreau_envelope(objective, matrices, 0.5, (scale,), event_ndim=2).shape == (2, 3)
    numbers = moreau_envelope(lambda z: z.square() / 2, draw(5), 1.0, event_ndim=0)
    torch.testing.assert_close(numbers, draw(5).square() / 4)
    one_point = moreau_envelope(lambda z: z.square().sum(-1) / 2, draw(3), torch.tensor([1.0, 3.0], dtype=F64))
    torch.testing.assert_close(one_point, draw(3).square().sum() / torch.tensor([4.0, 8.0], dtype=F64))
    for dtype in (torch.float32, torch.float16):
        assert prox_of(lambda z: z.square().sum(-1), torch.ones(2, 3, dtype=dtype)).dtype == dtype
        assert moreau_envelope(lambda z: z.square().sum(-1), torch.ones(2, 3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: moreau_envelope(lambda z: z.square(), x), "objective output: expected shape"),
        (lambda x: moreau_envelope(lambda z: z.square().sum(), x), "objective output: expected shape"),
        (lambda x: moreau_envelope(lambda z: 1.0, x), "objective output: expected a tensor"),
        (lambda x: moreau_envelope("f", x), "objective: expected a callable"),
        (lambda x: moreau_envelope(lambda z: z.sum(-1), x, 0.0), "t: expected more than 0"),
        (lambda x: prox_of(lambda z: z.sum(-1), x, -1.0), "t: expected at least 0"),
        (lambda x: prox_of(lambda z: z.sum(-1), x.to(torch.int64)), "x: expected a floating-point"),
        (lambda x: prox_of(lambda z, a: z.sum(-1), x, 1.0, (x.float(),)), r"args\[0\]: expected dtype"),
        (lambda x: prox_of(lambda z, a: z.sum(-1), x, 1.0, x), "args: expected a tuple"),
        (lambda x: prox_of(lambda z: z.sum(-1), x, 1.0, event_ndim=-1), "event_ndim: expected"),
        (lambda x: prox_of(lambda z: z.sum(-1), x / 0), "x: expected finite"),
        (lambda x: moreau_envelope(lambda z: z.abs().sum(-1), x, prox=lambda x, t: x[0]), "prox output: expected"),
        (lambda x: prox_of(lambda z: (z * x.requires_grad_()).sum(-1), x.detach()), "captures"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(draw(2, 3))


# ----------------------------------------------------------------------------------------------------------- MoreauGrad


class Waves(nn.Module):
    """Scores ``a . sin(W x)`` whose gradients are Lipschitz with a constant that is known."""

    def __init__(self, n, classes=3, seed=0):
        super().__init__()
        self.W = nn.Parameter(draw(6, n, seed=seed) / math.sqrt(n))
        self.a = nn.Parameter(draw(classes, 6, seed=seed + 1))

    def forward(self, x):
        return torch.sin(x.flatten(1) @ self.W.mT) @ self.a.mT

    def lipschitz(self, target):
        return float(torch.linalg.matrix_norm(self.W.mT * self.a[target].abs() @ self.W, 2).detach())


def fixed_noise(samples, *event):
    return draw(samples, *event, seed=9)


def soft(v, by):
    return v.sign() * (v.abs() - by).clamp_min(0)


def mean_score(model, x, d, target, noise, sigma=0.1):
    spread = sigma * (x.flatten(-3).amax(-1) - x.flatten(-3).amin(-1))
    copies = x + d + spread * noise
    return model(copies)[:, target].mean()


def gradient_at(model, x, d, target, noise):
    d = d.clone().requires_grad_()
    return torch.autograd.grad(mean_score(model, x, d, target, noise), d)[0].detach()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sparse_maps_solve_their_equation(channels, dtype):
    event = (channels, 4, 5)
    model, x, noise = Waves(channels * 20).to(dtype), draw(3, *event).to(dtype), fixed_noise(8, *event).to(dtype)
    target, t, eta = torch.tensor([0, 2, 1]), 0.7, 0.06
    explain = MoreauGrad(model, L1(eta), t=t, samples=8)
    solution = explain.forward_ex(x, target, noise=noise)
    assert solution.converged.all() and solution.value.dtype == dtype and solution.value.shape == x.shape
    for i in range(3):
        g = gradient_at(model, x[i], -t * solution.value[i], int(target[i]), noise)
        expected = soft(g, eta)
        tol = 1e-8 if dtype == F64 else 1e-4
        torch.testing.assert_close(solution.value[i], expected, atol=tol, rtol=0)
        off = g.abs() < eta - tol
        assert off.any() and not off.all()
        assert (solution.value[i][off] == 0).all()


def test_patches_are_switched_off_as_a_whole():
    event, t, eta = (3, 5, 6), 0.5, 0.6
    model, x, noise = Waves(90), draw(2, *event), fixed_noise(4, *event)
    explain = MoreauGrad(model, GroupL2(eta, patch=(2, 4)), t=t, samples=4)
    salient = explain(x, 1, noise=noise)
    switched_off = 0
    for i in range(2):
        g = gradient_at(model, x[i], -t * salient[i], 1, noise)
        for rows in (slice(0, 2), slice(2, 4), slice(4, 5)):  # the last ones are cut
            for columns in (slice(0, 4), slice(4, 6)):
                v = g[:, rows, columns]
                expected = v * max(0.0, 1 - eta / float(v.norm()))
                torch.testing.assert_close(salient[i, :, rows, columns], expected, atol=1e-8, rtol=0)
                switched_off += int((salient[i, :, rows, columns] == 0).all())
    assert 0 < switched_off < 12


def test_the_published_iteration_ends_at_the_same_point():
    event, t, eta, rate = (1, 3, 4), 1.0, 0.05, 0.05
    model, x, noise = Waves(12), draw(1, *event), fixed_noise(4, *event)
    d = torch.zeros(event, dtype=F64)
    for _ in range(2000):
        d = soft(d - rate * (gradient_at(model, x[0], d, 2, noise) + d / t), eta * rate)
    salient = MoreauGrad(model, L1(eta), t=t, samples=4)(x, 2, noise=noise)[0]
    torch.testing.assert_close(salient, -d / t, atol=1e-8, rtol=0)


def test_derivatives_follow_the_formulas_on_the_support():
    """Notes: (H_AA + I/t) w = v_A; x gets -H_{:,A} w, the weight -sign(d_A) . w, t gets d_A . w / t^2."""
    n, t, eta = 12, torch.tensor(0.8, dtype=F64).requires_grad_(), torch.tensor(0.2, dtype=F64).requires_grad_()
    model, x, v = Waves(n), draw(n).requires_grad_(), draw(n, seed=5)
    salient = MoreauGrad(model, L1(eta), t=t, noise=0.0, event_ndim=1)(x, 0)
    d = -(salient * t)  # with its derivative, undone: the formulas are those of d
    found = torch.autograd.grad(d, (x, eta, t, model.W), v)
    A = salient != 0
    assert 0 < A.sum() < n
    z = (x + d).detach()
    score = lambda z, W: functional_call(model, {"W": W}, (z[None],))[0, 0]  # noqa: E731
    H = hessian(score)(z, model.W.detach())
    w = torch.zeros(n, dtype=F64)
    w[A] = torch.linalg.solve(H[A][:, A] + torch.eye(int(A.sum()), dtype=F64) / 0.8, v[A])
    torch.testing.assert_close(found[0], -H @ w)
    torch.testing.assert_close(found[1], -(d.sign() * w).sum().detach())
    torch.testing.assert_close(found[2], ((d * w).sum() / t.square()).detach())
    W = model.W.detach().requires_grad_()
    z.requires_grad_()
    (slope,) = torch.autograd.grad(score(z, W), z, create_graph=True)
    torch.testing.assert_close(found[3], -torch.autograd.grad((slope * w).sum(), W)[0])


@pytest.mark.parametrize("penalty", [None, L1(0.05), GroupL2(0.1, 2)])
def test_derivatives_equal_finite_differences(penalty):
    """In the image, the noise following its range, and in the parameters; to second order in the image."""
    event = (2, 2, 2)
    model, noise, target = Waves(8), fixed_noise(3, *event), torch.tensor([0, 2])
    explain = MoreauGrad(model, penalty, t=0.6, samples=3)

    def fn(x, W):
        return functional_call(explain, {"model.W": W}, (x, target), {"noise": noise})

    x, W = draw(2, *event).requires_grad_(), model.W.detach().clone().requires_grad_()
    assert gradcheck(fn, (x, W), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(lambda x: fn(x, model.W.detach()), (x,), fast_mode=True)
    with torch.no_grad():
        mapped = vmap(lambda x, c: explain(x, c, noise=noise))(x, target)
        torch.testing.assert_close(mapped, fn(x, model.W))
        several = vmap(fn, in_dims=(None, 0))(x, torch.stack([W, 1.1 * W]))
        torch.testing.assert_close(several[1], fn(x, 1.1 * W), atol=1e-9, rtol=1e-9)


def test_the_map_is_as_lipschitz_as_the_paper_says():
    n, target = 8, 1
    model = Waves(n)
    L = model.lipschitz(target)
    for share in (0.2, 0.5, 0.9):
        t = share / L
        bound = max(1 / t, L / (1 - t * L))
        explain = MoreauGrad(model, t=t, noise=0.0, event_ndim=1)
        x = draw(200, n, seed=3)
        y = x + draw(200, n, seed=4) * torch.logspace(-4, 1, 200, dtype=F64)[:, None]
        with torch.no_grad():
            change = (explain(x, target) - explain(y, target)).norm(dim=-1) / (x - y).norm(dim=-1)
        assert change.max() <= bound * (1 + 1e-6)
        assert change.max() > L / 50  # not a map that hardly moves


def test_short_steps_give_the_thresholded_gradient():
    event = (1, 3, 3)
    model, x, noise = Waves(9), draw(2, *event), fixed_noise(4, *event)
    salient = MoreauGrad(model, L1(0.1), t=1e-7, samples=4)(x, 0, noise=noise)
    for i in range(2):
        g = gradient_at(model, x[i], torch.zeros(event, dtype=F64), 0, noise)
        torch.testing.assert_close(salient[i], soft(g, 0.1), atol=1e-5, rtol=0)


def test_noise_is_fixed_by_the_generator_and_images_do_not_see_each_other():
    explain = MoreauGrad(Waves(9), L1(0.02), samples=4, t=0.5)
    x = draw(2, 3, 1, 3, 3)
    maps = [explain(x, 1, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])
    alone = explain(x[1, 2], 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(alone, maps[0][1, 2], atol=1e-9, rtol=0)
    assert explain(x[:, :0], 1).shape == (2, 0, 1, 3, 3)
    best = explain(x, generator=torch.Generator().manual_seed(1))
    chosen = explain.model(x.reshape(6, 9)).argmax(-1).reshape(2, 3)
    torch.testing.assert_close(best, explain(x, chosen, generator=torch.Generator().manual_seed(1)))


def test_a_score_of_one_number_and_a_penalty_that_leaves_nothing():
    class One(nn.Module):
        def forward(self, x):
            return torch.sin(x).flatten(1).sum(-1)

    x = draw(2, 1, 2, 2).requires_grad_()
    salient = MoreauGrad(One(), L1(10.0), noise=0.0)(x)
    assert (salient == 0).all()
    (slope,) = torch.autograd.grad(salient.sum(), x)
    assert (slope == 0).all()
    with pytest.raises(ValueError, match="target: expected None"):
        MoreauGrad(One(), noise=0.0)(x, 1)


def test_kinks_of_the_score_warn_and_a_bad_image_stays_alone():
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Flatten(), nn.Linear(9, 20), nn.ReLU(), nn.Linear(20, 3)).double()
    x = draw(20, 1, 3, 3)
    explain = MoreauGrad(relu, L1(0.01), noise=0.0, t=5.0, max_steps=50)
    with pytest.warns(SolveWarning, match="MoreauGrad"):
        explain(x, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (explain.forward_ex(x, 0).status == Status.MAX_STEPS).any()
    smooth = MoreauGrad(Waves(9), L1(0.01), noise=0.0, t=0.5, on_failure="nan")
    good = smooth(x, 0)
    spoilt = x.clone()
    spoilt[3, 0, 0, 0] = math.nan
    found = smooth(spoilt, 0)
    assert found[3].isnan().all()
    keep = torch.arange(20) != 3
    assert torch.equal(found[keep], good[keep])
    with pytest.raises(ValueError, match="x: expected finite"):
        MoreauGrad(Waves(9), L1(0.01), noise=0.0)(spoilt, 0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MoreauGrad(lambda x: x), "model: expected an nn.Module"),
        (lambda: MoreauGrad(Waves(4), 0.1), "penalty: expected"),
        (lambda: MoreauGrad(Waves(4), L1(-0.1)), "weight: expected at least 0"),
        (lambda: MoreauGrad(Waves(4), t=0.0), "t: expected more than 0"),
        (lambda: MoreauGrad(Waves(4), noise=-1.0), "noise: expected at least 0"),
        (lambda: MoreauGrad(Waves(4), samples=0), "samples: expected at least 1"),
        (lambda: GroupL2(0.1, patch=0), "patch: expected at least 1"),
        (lambda: MoreauGrad(Waves(4))(draw(1, 2, 2)[0]), "x: expected at least 3 dimensions"),
        (lambda: MoreauGrad(Waves(4))(draw(1, 1, 2, 2), 3), r"target: expected classes in 0\.\.2, got 3"),
        (lambda: MoreauGrad(Waves(4))(draw(1, 1, 2, 2), 0.5), "target: expected integers"),
        (lambda: MoreauGrad(Waves(4))(draw(2, 1, 2, 2), torch.zeros(3, dtype=torch.long)), "target: expected shape"),
        (lambda: MoreauGrad(Waves(4))(draw(1, 1, 2, 2), noise=draw(4, 2, 2)), "noise: expected shape"),
        (lambda: MoreauGrad(Waves(4))(draw(1, 1, 2, 2).float()), "expected dtype"),
        (lambda: MoreauGrad(nn.Sequential(nn.Dropout(0.5), Waves(4)))(draw(1, 1, 2, 2)), "module.0: expected eval"),
        (lambda: MoreauGrad(nn.Sequential(nn.BatchNorm2d(1), Waves(4)))(draw(1, 1, 2, 2)), "module.0: expected eval"),
    ],
)
def test_what_cannot_be_explained_is_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_prox_reports_every_element():
    solution = prox_of_ex(lambda z: z.square().sum(-1), draw(4, 3), 0.5)
    assert solution.converged.all() and solution.status.shape == solution.steps.shape == (4,)
    torch.testing.assert_close(solution.value, draw(4, 3) / 2)

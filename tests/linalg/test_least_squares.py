"""Least squares against numpy: KKT systems written out, derivatives to second order, and memory."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from difflayers import SolveError
from difflayers.linalg import least_squares, least_squares_ex, linear_solve

F64 = torch.float64


def draw(*batch, N=7, K=3, p=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    new = lambda *s: torch.randn((*batch, *s), generator=g, dtype=F64)  # noqa: E731
    return {
        "A": new(N, K),
        "y": new(N),
        "weights": new(N).abs() + 0.5,
        "ridge": torch.rand(batch, generator=g, dtype=F64) + 0.3,
        "center": new(K),
        "C": new(p, K),
        "d": new(p),
    }


def kkt(A, y, weights=None, ridge=None, center=None, C=None, d=None):
    """The optimality conditions as one square system, through torch.linalg.solve: the oracle for every derivative."""
    S = A if weights is None else weights[..., None] * A
    t = y if weights is None else weights * y
    lam = torch.zeros((), dtype=A.dtype) if ridge is None else ridge
    K = A.shape[-1]
    H = S.mT @ S + lam[..., None, None] * torch.eye(K, dtype=A.dtype)
    q = (S.mT @ t[..., None])[..., 0]
    if center is not None:
        q = q + lam[..., None] * center
    if C is not None:
        p = C.shape[-2]
        zero = torch.zeros(*C.shape[:-2], p, p, dtype=A.dtype)
        H = torch.cat([torch.cat([H, C.mT], -1), torch.cat([C, zero], -1)], -2)
        q = torch.cat([q, d], -1)
    return torch.linalg.solve(H, q)[..., :K]


def ours(A, y, weights=None, ridge=0.0, center=None, C=None, d=None, **kwargs):
    equality = None if C is None else (C, d)
    return least_squares(A, y, weights=weights, ridge=ridge, center=center, equality=equality, **kwargs)


CHOICES = [
    names
    for names in itertools.chain.from_iterable(
        itertools.combinations(("weights", "ridge", "center", "equality"), k) for k in range(5)
    )
    if "center" not in names or "ridge" in names
]
choices = pytest.mark.parametrize("names", CHOICES, ids=lambda names: "+".join(names) or "plain")


def pick(data, names):
    keys = ["A", "y", *(n for n in names if n != "equality"), *(("C", "d") if "equality" in names else ())]
    return keys, [data[k] for k in keys]


def test_plain_equals_lstsq():
    for N, K in ((3, 3), (7, 1), (40, 10), (500, 30)):
        data = draw(N=N, K=K)
        want = np.linalg.lstsq(data["A"].numpy(), data["y"].numpy(), rcond=None)[0]
        torch.testing.assert_close(least_squares(data["A"], data["y"]), torch.tensor(want), rtol=1e-9, atol=1e-10)


@choices
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_values_equal_the_kkt_system(names, batch):
    keys, xs = pick(draw(*batch), names)
    w = ours(**dict(zip(keys, xs, strict=True)))
    torch.testing.assert_close(w, kkt(**dict(zip(keys, xs, strict=True))), rtol=1e-9, atol=1e-10)


@choices
def test_derivatives_in_every_argument(names):
    keys, xs = pick(draw(), names)
    f = lambda *xs: ours(**dict(zip(keys, xs, strict=True)))  # noqa: E731
    oracle = lambda *xs: kkt(**dict(zip(keys, xs, strict=True)))  # noqa: E731
    every = tuple(range(len(xs)))
    for got, want in zip(jacrev(f, every)(*xs), jacrev(oracle, every)(*xs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    for got, want in zip(jacfwd(f, every)(*xs), jacrev(oracle, every)(*xs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)
    weight = torch.tensor([1.0, -2.0, 0.5], dtype=F64)

    def first(f):
        return lambda *xs: sum(g.sin().sum() for g in grad(lambda *xs: (f(*xs) * weight).sin().sum(), every)(*xs))

    for got, want in zip(grad(first(f), every)(*xs), grad(first(oracle), every)(*xs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


@choices
def test_gradgradcheck(names):
    keys, xs = pick(draw(2), names)
    xs = [x.requires_grad_() for x in xs]
    f = lambda *xs: ours(**dict(zip(keys, xs, strict=True)))  # noqa: E731
    gradcheck(f, xs, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    gradgradcheck(f, xs, fast_mode=True)


def test_transforms():
    data = draw(3)
    keys, xs = pick(data, ("weights", "ridge", "center", "equality"))
    f = lambda *xs: ours(**dict(zip(keys, xs, strict=True)))  # noqa: E731
    want = kkt(**dict(zip(keys, xs, strict=True)))
    torch.testing.assert_close(vmap(f)(*xs), want)
    for i in range(len(xs)):  # vmap over one argument, the rest shared
        dims = tuple(0 if i == j else None for j in range(len(xs)))
        args = [x if i == j else x[0] for j, x in enumerate(xs)]
        loop = torch.stack([f(*(a[k] if i == j else a for j, a in enumerate(args))) for k in range(3)])
        torch.testing.assert_close(vmap(f, in_dims=dims)(*args), loop)
    ridge = data["ridge"][0]
    g = lambda r, A, y: least_squares(A, y, ridge=r).square().sum()  # noqa: E731
    k = lambda r, A, y: kkt(A, y, ridge=r).square().sum()  # noqa: E731
    # a loop, since vmap over hessian of torch.linalg.solve itself returns wrong numbers in torch 2.13
    got = vmap(hessian(g), in_dims=(None, 0, 0))(ridge, data["A"], data["y"])
    pairs = list(zip(data["A"], data["y"], strict=True))
    torch.testing.assert_close(got, torch.stack([jacrev(jacrev(k))(ridge, a, y) for a, y in pairs]))
    H = vmap(hessian(g, 1), in_dims=(None, 0, 0))(ridge, data["A"], data["y"])
    torch.testing.assert_close(H, torch.stack([jacrev(jacrev(k, 1), 1)(ridge, a, y) for a, y in pairs]))


def test_gradients_reach_shared_arguments_as_sums():
    data = draw(4)
    for key in ("A", "y", "weights", "ridge", "center", "C", "d"):
        shared = {k: (v[0] if k == key else v) for k, v in data.items()}
        x = shared[key].clone().requires_grad_()
        (g,) = torch.autograd.grad(ours(**{**shared, key: x}).square().sum(), x)
        total = torch.zeros_like(g)
        for i in range(4):
            alone = {k: (x if k == key else v[i]) for k, v in data.items()}
            total = total + torch.autograd.grad(ours(**alone).square().sum(), x)[0]
        torch.testing.assert_close(g, total, msg=key)


# ----------------------------------------------------------------------------------------------- rank and conditioning


def test_rank_deficient_without_a_ridge_is_refused_by_name():
    data = draw(4)
    data["A"][2, :, 1] = data["A"][2, :, 0]
    with pytest.raises(SolveError, match=r"1 of 4.*elements 2\).*SINGULAR"):
        least_squares(data["A"], data["y"])
    x = least_squares(data["A"], data["y"], on_failure="nan")
    assert x[2].isnan().all() and x[[0, 1, 3]].isfinite().all()
    harmless = data["A"].clone()
    harmless[2] = torch.eye(7, 3, dtype=F64)
    results = []
    for A in (data["A"], harmless):
        A, s = A.clone().requires_grad_(), torch.tensor(1.0, dtype=F64, requires_grad=True)
        x = least_squares(A, s * data["y"], on_failure="nan")
        gA, gs = torch.autograd.grad(x[[0, 1, 3]].square().sum(), (A, s), create_graph=True)
        hA, hs = torch.autograd.grad(gA[[0, 1, 3]].square().sum() + gs, (A, s))
        results.append((x[[0, 1, 3]], gA[[0, 1, 3]], gs, hA[[0, 1, 3]], hs))
    for got, want in zip(*results, strict=True):
        assert got.isfinite().all() and torch.equal(got, want)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5)], ids=["dependent columns", "wide"])
def test_rank_deficient_with_a_ridge(shape):
    N, K = shape
    data = draw(2, N=N, K=K)
    data["A"][..., 1] = data["A"][..., 0]
    keys, xs = pick(data, ("ridge", "center"))
    f = lambda *xs: ours(**dict(zip(keys, xs, strict=True)))  # noqa: E731
    torch.testing.assert_close(f(*xs), kkt(**dict(zip(keys, xs, strict=True))), rtol=1e-9, atol=1e-10)
    xs = [x.requires_grad_() for x in xs]
    gradcheck(f, xs, fast_mode=True)
    gradgradcheck(f, xs, fast_mode=True)


def test_wide_without_a_ridge_is_refused():
    data = draw(N=2, K=5)
    with pytest.raises((SolveError, ValueError)):
        least_squares(data["A"], data["y"])


def test_dependent_equalities_are_refused():
    data = draw(p=2)
    data["C"][1] = 2 * data["C"][0]
    with pytest.raises(SolveError):
        least_squares(data["A"], data["y"], equality=(data["C"], data["d"]))


def test_equalities_repair_a_rank_deficient_matrix():
    """A has no information on w0 - w1; the equality does."""
    data = draw()
    data["A"][:, 1] = data["A"][:, 0]
    C, d = torch.tensor([[1.0, -1.0, 0.0]], dtype=F64), torch.tensor([0.5], dtype=F64)
    got = least_squares(data["A"], data["y"], equality=(C, d))
    torch.testing.assert_close(got, kkt(data["A"], data["y"], C=C, d=d), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("exponent", [4, 7, 9])
def test_ill_conditioned_matrices_are_solved_as_well_as_by_qr(exponent):
    """The normal equations square the condition number: at 1e9 they have no correct digit."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((50, 6)))[0]
    V = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    A = Q * np.logspace(0, -exponent, 6) @ V
    y = A @ np.ones(6) + 1e-3 * rng.standard_normal(50)
    want = np.linalg.lstsq(A, y, rcond=None)[0]
    got = least_squares(torch.tensor(A), torch.tensor(y)).numpy()
    cond = 10.0**exponent
    assert np.linalg.norm(got - want) <= 100 * 2.2e-16 * (cond * np.linalg.norm(want) + cond**2 * 1e-2)
    assert np.linalg.norm(A.T @ (A @ got - y)) <= 1e-14 * max(1.0, np.linalg.norm(got))


def test_scales_of_rows_and_columns():
    data = draw()
    columns = torch.tensor([1e-12, 1.0, 1e9], dtype=F64)
    want = kkt(data["A"], data["y"]) / columns
    torch.testing.assert_close(least_squares(data["A"] * columns, data["y"]), want, rtol=1e-9, atol=0)
    for scale in (1e-100, 1e100):
        torch.testing.assert_close(least_squares(scale * data["A"], data["y"]) * scale, kkt(data["A"], data["y"]))
        torch.testing.assert_close(least_squares(data["A"], scale * data["y"]) / scale, kkt(data["A"], data["y"]))


def test_zero_weights_drop_rows():
    data = draw()
    s = torch.tensor([1.0, 1, 0, 1, 0, 1, 1], dtype=F64)
    keep = s > 0
    torch.testing.assert_close(least_squares(data["A"], data["y"], weights=s), kkt(data["A"][keep], data["y"][keep]))
    x = s.clone().requires_grad_()
    (g,) = torch.autograd.grad(least_squares(data["A"], data["y"], weights=x).sum(), x)
    assert torch.equal(g[~keep], torch.zeros(2, dtype=F64)) and (g[keep] != 0).all()
    negative = torch.where(keep, -s, s)
    torch.testing.assert_close(
        least_squares(data["A"], data["y"], weights=negative), kkt(data["A"][keep], data["y"][keep])
    )
    with pytest.raises(SolveError):
        least_squares(data["A"], data["y"], weights=torch.zeros(7, dtype=F64))


def test_ridge_of_zero_as_a_tensor_and_as_a_number():
    data = draw()
    want = kkt(data["A"], data["y"])
    for ridge in (0, 0.0, torch.tensor(0.0, dtype=F64)):
        torch.testing.assert_close(least_squares(data["A"], data["y"], ridge=ridge), want)
    torch.testing.assert_close(
        least_squares(data["A"], data["y"], ridge=2), kkt(data["A"], data["y"], ridge=torch.tensor(2.0, dtype=F64))
    )


def test_many_targets_in_front_broadcast():
    data = draw()
    y = torch.randn(5, 2, 7, dtype=F64)
    want = torch.stack([torch.stack([kkt(data["A"], v) for v in row]) for row in y])
    torch.testing.assert_close(least_squares(data["A"], y), want)


def test_empty_batch():
    A = torch.randn(0, 5, 3, dtype=F64, requires_grad=True)
    y = torch.randn(0, 5, dtype=F64, requires_grad=True)
    w = least_squares(A, y, ridge=1.0)
    assert w.shape == (0, 3)
    ga, gy = torch.autograd.grad(w.sum(), (A, y))
    assert ga.shape == A.shape and gy.shape == y.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept(dtype):
    data = draw(2)
    w = least_squares(data["A"].to(dtype), data["y"].to(dtype), ridge=0.5)
    assert w.dtype == dtype
    want = kkt(data["A"].to(dtype).double(), data["y"].to(dtype).double(), ridge=torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(w.double(), want, rtol=0.05, atol=4 * torch.finfo(dtype).eps)


# -------------------------------------------------------------------------------------------------------- bad input


def test_bad_input_is_named():
    x = draw(2)
    A, y = x["A"], x["y"]
    cases = [
        ("A", lambda: least_squares(A[0, 0], y)),
        ("y", lambda: least_squares(A, y[:, :5])),
        ("weights", lambda: least_squares(A, y, weights=x["weights"][:, :2])),
        ("center", lambda: least_squares(A, y, ridge=1.0, center=x["center"][:, :2])),
        ("ridge", lambda: least_squares(A, y, ridge=torch.ones(3, dtype=F64))),
        ("equality|C", lambda: least_squares(A, y, equality=(x["C"][..., :2], x["d"]))),
        ("equality", lambda: least_squares(A, y, equality=x["C"])),
        ("y", lambda: least_squares(A, y.long())),
        ("y|A", lambda: least_squares(A, y.float())),
        ("weights|A", lambda: least_squares(A, y, weights=x["weights"].to("meta"))),
        ("ridge", lambda: least_squares(A, y, ridge=-1.0)),
        ("ridge", lambda: least_squares(A, y, ridge=torch.tensor(-1.0, dtype=F64))),
    ]
    for name, call in cases:
        with pytest.raises(ValueError, match=rf"({name}).*expected.*got"):
            call()
    for name in ("A", "y", "weights", "center", "C", "d", "ridge"):
        bad = {k: v.clone() for k, v in x.items()}
        bad[name].view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=r"finite|ridge"):
            ours(**bad)


# ------------------------------------------------------------------------------------------------------------ cost


def test_never_quadratic_in_the_rows():
    """N = 200000, K = 3: an N x N matrix would take 320 GB, its thin relatives take megabytes."""
    N = 200_000
    A = torch.randn(N, 3, dtype=F64, requires_grad=True)
    y = torch.randn(N, dtype=F64, requires_grad=True)
    s = (torch.rand(N, dtype=F64) + 0.5).requires_grad_()
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for leaf in torch.utils._pytree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    biggest = max(biggest, leaf.untyped_storage().nbytes())
            return out

    with Watch():
        w = least_squares(A, y, weights=s, ridge=0.1)
        first = torch.autograd.grad(w.square().sum(), (A, y, s), create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), (A, y, s))
    assert biggest <= 8 * N * 16
    want = np.linalg.solve(
        (A * s[:, None] ** 2).detach().numpy().T @ A.detach().numpy() + 0.1 * np.eye(3),
        (A * s[:, None] ** 2).detach().numpy().T @ y.detach().numpy(),
    )
    torch.testing.assert_close(w.detach(), torch.tensor(want), rtol=1e-9, atol=1e-10)


def test_one_factorisation_for_all_orders(monkeypatch):
    calls = {}
    for key in (
        "cholesky_ex",
        "cholesky",
        "qr",
        "lu_factor_ex",
        "lu_factor",
        "solve",
        "solve_ex",
        "lstsq",
        "inv",
        "svd",
    ):
        real = getattr(torch.linalg, key)

        def counted(*args, _real=real, _key=key, **kwargs):
            calls[_key] = calls.get(_key, 0) + 1
            return _real(*args, **kwargs)

        monkeypatch.setattr(torch.linalg, key, counted)
    data = draw(2)
    keys, xs = pick(data, ("weights", "ridge", "center"))
    xs = [x.requires_grad_() for x in xs]
    w = ours(**dict(zip(keys, xs, strict=True)))
    forward = dict(calls)
    first = torch.autograd.grad(w.square().sum(), xs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), xs, create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in second), xs)
    assert calls == forward and sum(forward.values()) == 1


def test_ex_never_raises():
    data = draw(2)
    data["A"][1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = least_squares_ex(data["A"], data["y"])
    assert s.failed.tolist() == [False, True]
    assert s.status.shape == s.residual.shape == (2,)


def test_half_precision_targets_under_autocast():
    A, y = torch.randn(6, 3, requires_grad=True), torch.randn(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = least_squares(A, y.bfloat16())
        x = linear_solve(torch.eye(3) * 2, y[:3].bfloat16())
    assert w.dtype == x.dtype == torch.bfloat16
    torch.testing.assert_close(w.float(), least_squares(A, y.bfloat16().float()), rtol=1e-2, atol=1e-2)
    assert torch.autograd.grad(w.sum(), A)[0].isfinite().all()

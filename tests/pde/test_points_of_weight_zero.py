"""Points and rows of weight 0, whose data may be anything.

Oracle: the same problem with finite data in those places, of which nothing may depend on.
"""

import pytest
import torch
from torch import Tensor
from torch.func import jacfwd, jacrev, vmap

from difflayers.pde import residual_least_squares, residual_least_squares_ex, residual_least_squares_value

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)
B, T0, f, A, y = (
    torch.randn(s, generator=GENERATOR, dtype=F64) for s in ((3, 10, 3, 4), (10, 3), (3, 10), (2, 4), (3, 2))
)
NU = torch.tensor([[0.2], [0.3], [0.4]], dtype=F64)
WEIGHTS = torch.ones(3, 10, dtype=F64)
WEIGHTS[0, 0] = WEIGHTS[1, 3] = WEIGHTS[2, 9] = 0
ROW_WEIGHTS = torch.tensor([1.0, 0.0], dtype=F64)


def heat(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return u[..., 1] - p["nu"] * u[..., 2] - p["f"]


def burgers(u: Tensor, p: dict[str, Tensor]) -> Tensor:
    return u[..., 1] + u[..., 0] * u[..., 2] - p["nu"] * u[..., 2] - p["f"]


def good() -> dict[str, Tensor]:
    return {"B": B.clone(), "T0": T0.clone(), "f": f.clone(), "A": A.clone(), "y": y.clone(), "s": WEIGHTS.clone()}


def missing() -> dict[str, Tensor]:
    d = good()
    d["B"][0, 0, 1, 2] = float("nan")
    d["f"][1, 3] = float("inf")
    d["f"][2, 9] = float("nan")
    d["A"][1, 0] = float("nan")
    d["y"][1, 1] = float("-inf")
    return d


def layer(F, d: dict[str, Tensor], solve=residual_least_squares, **options):
    params, rows = {"nu": NU, "f": d["f"]}, (d["A"], d["y"], ROW_WEIGHTS)
    return solve(d["B"], F, params, offset=d["T0"], weights=d["s"], rows=rows, ridge=0.1, **options)


@pytest.mark.parametrize("F", [heat, burgers])
def test_values_and_two_derivatives_do_not_see_missing_data(F):
    found = []
    for d in (good(), missing()):
        d = {k: v.requires_grad_() for k, v in d.items()}
        w, value = layer(F, d), layer(F, d, residual_least_squares_value)
        slopes = torch.autograd.grad(w.square().sum(), list(d.values()), create_graph=True)
        bends = torch.autograd.grad(
            sum(g.square().sum() for g in slopes[:3]), [d["B"], d["T0"], d["f"], d["A"], d["y"]]
        )
        envelope = torch.autograd.grad(value.sum(), list(d.values()))
        found.append([w, value, *slopes, *bends, *envelope])
        by_B, _, by_f, by_A, by_y, _ = slopes
        gone = [by_B[0, 0], by_f[1, 3], by_f[2, 9], by_A[1], by_y[:, 1], envelope[2][1, 3]]
        assert all((g == 0).all() for g in gone)
    for expected, got in zip(*found, strict=True):
        assert torch.isfinite(got).all() and torch.allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("F", [heat, burgers])
def test_transforms_do_not_see_missing_data_either(F):
    d = missing()
    one = lambda B, f, y, s, nu: residual_least_squares(  # noqa: E731
        B, F, {"nu": nu, "f": f}, offset=T0, weights=s, rows=(d["A"], y, ROW_WEIGHTS), ridge=0.1
    )
    assert torch.allclose(vmap(one)(d["B"], d["f"], d["y"], d["s"], NU), layer(F, good()), rtol=0, atol=1e-12)
    of_f = lambda f: layer(F, d | {"f": f})  # noqa: E731
    expected = jacrev(lambda f: layer(F, good() | {"f": f}))(f)
    for jacobian in (jacrev, jacfwd):
        assert torch.allclose(jacobian(of_f)(d["f"]), expected, rtol=0, atol=1e-12)


def test_a_point_that_counts_fails_its_element_alone():
    d = missing()
    d["s"][1, 3] = 1e-3
    found = layer(burgers, d, residual_least_squares_ex)
    assert found.converged.tolist() == [True, False, True]
    assert not found.linear.any()


def test_an_element_in_which_no_point_counts_is_determined_by_its_rows():
    d = missing() | {"s": torch.zeros(3, 10, dtype=F64)}
    found = layer(burgers, d, residual_least_squares_ex)
    w = torch.linalg.solve(A[:1].mT @ A[:1] + 0.1 * torch.eye(4, dtype=F64), (A[:1].mT @ y[:, :1].mT)).mT
    assert found.converged.all() and torch.allclose(found.value, w, rtol=0, atol=1e-10)


def test_the_second_derivative_by_a_weight_of_zero_is_that_of_the_data():
    """``w(s^2)``: half the second derivative by s at 0 is the first by ``s^2``, a difference quotient."""
    last = lambda s: layer(burgers, good() | {"s": torch.cat([torch.ones(3, 9, dtype=F64), s.expand(3, 1)], -1)})  # noqa: E731
    zero = torch.zeros(1, dtype=F64)
    bend = jacrev(jacrev(last))(zero)[..., 0, 0] / 2
    h = torch.tensor([1e-3], dtype=F64)
    assert torch.allclose(bend, (last(h) - last(zero)) / h**2, rtol=0, atol=1e-4)

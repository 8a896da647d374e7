"""Data consistency: dense solves, both derivatives, and operators of every kind."""

import copy

import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from difflayers import SolveError, trace
from difflayers.proximal import DataConsistency, data_consistency, data_consistency_ex
from difflayers.testing import saved_bytes

F64 = torch.float64


def close(got, want, tol=1e-8):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def problem(batch=3, m=5, n=8):
    A = torch.randn(m, n, dtype=F64)
    x, b = torch.randn(batch, n, dtype=F64), torch.randn(batch, m, dtype=F64)
    weight = torch.tensor([0.1, 1.0, 20.0], dtype=F64)
    return A, x, b, weight


def dense(A, x, b, weight):
    H = torch.eye(A.shape[-1], dtype=F64) + weight[:, None, None] * (A.mT @ A)
    return torch.linalg.solve(H, x + weight[:, None] * (b @ A))


def test_value_and_derivatives_equal_a_dense_solve():
    leaves = [t.requires_grad_() for t in problem()]
    A, x, b, weight = leaves
    found = data_consistency(lambda z, A: z @ A.mT, x, b, weight, params=(A,))
    close(found, dense(*leaves))
    g = torch.randn_like(x)
    for got, want in zip(
        torch.autograd.grad(found, leaves, g), torch.autograd.grad(dense(*leaves), leaves, g), strict=True
    ):
        close(got, want)


def test_rank_plus_one_steps_are_exact():
    A, x, b, weight = problem(m=3)
    exact = dense(A, x, b, weight)
    steps = lambda k: data_consistency(lambda z: z @ A.mT, x, b, weight, max_steps=k)  # noqa: E731
    errors = [float((steps(k) - exact).abs().max()) for k in range(1, 6)]
    assert errors[1] > 1e-3 and errors[3] < 1e-9 and errors[4] < 1e-9


def test_the_two_derivatives_differ_as_the_values_do():
    """After 2 steps: that of the iterate agrees with differences of the iterate, and not with that of the solution."""
    A, x, b, weight = problem()
    x.requires_grad_()
    after = lambda x, k: data_consistency(lambda z: z @ A.mT, x, b, weight, max_steps=k)  # noqa: E731
    move, g = torch.randn_like(x), torch.randn_like(x)
    h = 1e-6
    difference = ((after(x.detach() + h * move, 2) - after(x.detach() - h * move, 2)) * g).sum() / (2 * h)
    slopes = {k: (torch.autograd.grad(after(x, k), x, g)[0] * move).sum() for k in (2, 8)}
    solution = (torch.autograd.grad(data_consistency(lambda z: z @ A.mT, x, b, weight), x, g)[0] * move).sum()
    close(slopes[2], difference, 1e-6)
    close(slopes[8], solution, 1e-6)
    assert abs(slopes[2] - solution) > 1e-2 * abs(solution)


@pytest.mark.parametrize("max_steps", [None, 3])
def test_elements_are_never_coupled(max_steps):
    A, x, b, weight = problem()
    alone = torch.stack(
        [data_consistency(lambda z: z @ A.mT, *row, max_steps=max_steps) for row in zip(x, b, weight, strict=True)]
    )
    close(data_consistency(lambda z: z @ A.mT, x, b, weight, max_steps=max_steps), alone, 1e-9)
    x = x * torch.tensor([1.0, 1e6, 1e-6], dtype=F64)[:, None]
    together = data_consistency(lambda z: z @ A.mT, x, 0 * b, weight, max_steps=max_steps)
    scale = x.abs().amax(-1, keepdim=True)
    one = data_consistency(lambda z: z @ A.mT, x[2:], 0 * b[2:], weight[2:], max_steps=max_steps)
    close(together[2:] / scale[2:], one / scale[2:], 1e-9)


def test_module_operator_learns():
    blur = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    layer = DataConsistency(blur, weight=5.0, learn_weight=True, event_ndim=3, dtype=F64)
    assert {name for name, _ in layer.named_parameters()} == {"operator.weight", "log_weight"}
    x, b = torch.randn(2, 1, 6, 6, dtype=F64), torch.randn(2, 1, 6, 6, dtype=F64)
    columns = torch.eye(36, dtype=F64).reshape(36, 1, 6, 6)
    A = blur(columns).reshape(36, 36).mT
    H = torch.eye(36, dtype=F64) + layer.log_weight.exp() * A.mT @ A
    rhs = x.reshape(2, 36) + layer.log_weight.exp() * b.reshape(2, 36) @ A
    wanted = torch.linalg.solve(H, rhs.mT).mT
    found = layer(x, b)
    close(found.reshape(2, 36), wanted)
    g = torch.randn(2, 36, dtype=F64)
    parameters = list(layer.parameters())
    for got, want in zip(
        torch.autograd.grad(found, parameters, g.reshape_as(x)),
        torch.autograd.grad(wanted, parameters, g),
        strict=True,
    ):
        close(got, want)
    twin = copy.deepcopy(layer)
    close(twin(x, b), found)


def test_adjoint_module_and_strided_images():
    down = nn.Conv2d(1, 2, 3, stride=2, padding=1, bias=False).double()
    up = nn.ConvTranspose2d(2, 1, 3, stride=2, padding=1, output_padding=1, bias=False).double()
    with torch.no_grad():
        up.weight.copy_(down.weight)
    x = torch.randn(2, 6, 6, 1, dtype=F64).movedim(-1, 1)
    b = torch.randn(2, 2, 3, 3, dtype=F64)
    close(DataConsistency(down, up, event_ndim=3)(x, b), DataConsistency(down, event_ndim=3)(x, b))
    with pytest.raises(ValueError, match="adjoint: expected the transpose of operator"):
        DataConsistency(down, lambda y: 2 * up(y), event_ndim=3)(x, b)


def test_complex_measurements():
    """Some rows of a Fourier transform, as in magnetic resonance imaging."""
    keep = torch.tensor([True, False, True, True, False, True, False, False])
    fourier = lambda z: torch.fft.fft(z, norm="ortho")[..., keep]  # noqa: E731
    x, truth = torch.randn(2, 8, dtype=F64), torch.randn(2, 8, dtype=F64)
    found = data_consistency(fourier, x, fourier(truth), 1e6)
    assert (fourier(found) - fourier(truth)).abs().max() < 1e-5
    H = torch.fft.fft(torch.eye(8, dtype=torch.complex128), norm="ortho")[:, keep]
    M = torch.eye(8, dtype=F64) + (H @ H.mH).real
    rhs = x + (fourier(truth) @ H.mH).real
    close(data_consistency(fourier, x, fourier(truth)), torch.linalg.solve(M, rhs.mT).mT)


def test_memory_is_independent_of_the_steps_unless_they_are_recorded():
    A, x, b, weight = problem(n=8)
    x.requires_grad_()

    def saved(**options):
        return saved_bytes(lambda: data_consistency(lambda z: z @ A.mT, x, b, weight, **options))[1]

    assert saved(rtol=1e-2) == saved(rtol=1e-12)
    assert saved(max_steps=6) > saved(max_steps=2) > saved(rtol=1e-12)


@pytest.mark.parametrize("transform", [lambda f: f, grad, vmap, lambda f: vmap(grad(f))])
def test_failure_is_the_same_error_inside_a_transform(transform):
    x = torch.ones(3, 2, dtype=F64)
    run = transform(lambda x: data_consistency(lambda z: 1e200 * z, x, 1e200 * x, 1e200, max_steps=3).sum())
    with pytest.raises(SolveError, match=r"data_consistency .* batch elements failed .*DIVERGED"):
        run(x)


def test_status_and_captured_tensors():
    A, x, b, weight = problem()
    solution = data_consistency_ex(lambda z: z @ A.mT, x, b, weight)
    assert solution.converged.all() and (solution.steps > 0).all()
    few = data_consistency_ex(lambda z: z @ A.mT, x, b, weight, max_steps=1)
    assert not few.converged[2] and few.steps.tolist() == [1, 1, 1]
    with trace() as solves:
        data_consistency(lambda z: z @ A.mT, x, b, weight)
    assert solves[0].phase == "forward"
    A.requires_grad_()
    with pytest.raises(ValueError, match="captur"):
        data_consistency(lambda z: z @ A.mT, x, b, weight)
    with pytest.raises(ValueError, match="max_steps: expected at least 1"):
        data_consistency(lambda z, A: z @ A.mT, x, b, weight, params=(A,), max_steps=0)


def test_steps_beyond_the_solution_do_not_spoil_the_derivative():
    """Few distinct eigenvalues: conjugate gradients end early, but not for other parameters."""
    x, b, c = (torch.randn(4, dtype=F64) for _ in range(3))
    w = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64, requires_grad=True)

    def value(w, steps=6):
        return data_consistency(lambda z, w: z * w, x, b, 2.0, params=(w,), max_steps=steps) @ c

    h = 1e-4 * torch.eye(4, dtype=F64)
    close(torch.autograd.grad(value(w), w)[0], torch.stack([value(w + e) - value(w - e) for e in h]) / 2e-4, 1e-6)
    Q = torch.linalg.qr(torch.randn(50, 50, dtype=F64))[0]
    A = ((Q * (1.0 + torch.arange(50) % 4)) @ Q.mT).requires_grad_()
    x, b = torch.randn(2, 2, 50, dtype=F64)
    few, all_ = (
        torch.autograd.grad(data_consistency(lambda z, A: z @ A.mT, x, b, params=(A,), max_steps=k).sum(), A)[0]
        for k in (8, None)
    )
    close(few, all_)


@pytest.mark.parametrize("steps", [None, 4])
def test_failures_with_and_without_a_number_of_steps(steps):
    A, x, b, weight = problem()
    A.requires_grad_()
    for bad in (x, b, weight):
        kept = bad.clone()
        bad[1] = torch.nan
        with pytest.raises(ValueError, match="finite"):
            data_consistency(lambda z, A: z @ A.mT, x, b, weight, params=(A,), max_steps=steps)
        found = data_consistency(lambda z, A: z @ A.mT, x, b, weight, params=(A,), max_steps=steps, on_failure="nan")
        assert found.isnan().all(-1).tolist() == [False, True, False]
        assert torch.isfinite(torch.autograd.grad(found[[0, 2]].sum(), A)[0]).all()
        bad.copy_(kept)


def test_wrong_adjoint_is_seen_from_zero_too():
    A, x, b, _ = problem()
    with pytest.raises(ValueError, match="adjoint"):
        data_consistency(lambda z: z @ A.mT, torch.zeros_like(x), b, adjoint=lambda y: y @ A.flip(0), max_steps=3)


@pytest.mark.parametrize("steps", [None, 8])
def test_derivative_in_complex_parameters(steps):
    A = torch.randn(3, 6, dtype=torch.complex128, requires_grad=True)
    b, x = torch.randn(2, 3, dtype=torch.complex128), torch.randn(2, 6, dtype=F64)
    found = data_consistency(lambda z, A: z.to(A.dtype) @ A.mT, x, b, params=(A,), max_steps=steps)
    want = torch.linalg.solve(torch.eye(6, dtype=F64) + (A.mH @ A).real, (x + (b @ A.conj()).real).mT).mT
    close(found, want)
    g = torch.randn_like(x)
    close(torch.autograd.grad(found, A, g)[0], torch.autograd.grad(want, A, g)[0])

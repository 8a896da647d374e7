"""What a first look can miss: globals, attributes, inference mode, another event_ndim, replaced modules, threads."""

import sys
import threading

import pytest
import torch
from torch import nn

import difflayers
from difflayers.implicit import FixedPoint, ImplicitProblem, argmin, envelope, fixed_point, solution_map

F64 = torch.float64
SHARED = torch.tensor(2.0, dtype=F64, requires_grad=True)


def energy(z, a):
    return (z - a).square().sum(-1)


def test_envelope_refuses_a_captured_global():
    a = torch.tensor([2.0, 4.0], dtype=F64, requires_grad=True)
    z = argmin(energy, torch.zeros(2, dtype=F64), (a,))
    with pytest.raises(ValueError, match=r"objective: expected .* captures"):
        envelope(lambda z, a: SHARED * energy(z, a), z, (a,))
    with pytest.raises(ValueError, match=r"objective: expected .* captures"):
        torch.func.grad(lambda w: envelope(lambda z, a: energy(z, a) * w, z.detach(), (a.detach(),)))(SHARED.detach())


def test_solution_map_refuses_a_captured_global():
    def solve(a):
        zero = torch.zeros(a.shape, dtype=torch.int64)
        return (2 * a).sqrt(), difflayers.Info(zero, zero, torch.zeros_like(a)), ()

    problem = ImplicitProblem(solve=solve, residual=lambda z, a: z * z - a * SHARED, value_ndim=0, arg_ndims=(0,))
    with pytest.raises(ValueError, match=r"residual: expected .* captures"):
        solution_map(problem, (torch.ones(3, dtype=F64, requires_grad=True),))


def test_a_solve_that_returns_its_argument():
    """Projecting an inside point: the value is the argument itself."""

    def solve(a):
        zero = torch.zeros(a.shape[:-1], dtype=torch.int64)
        return a, difflayers.Info(zero, zero, a.sum(-1) * 0), ()

    problem = ImplicitProblem(solve=solve, residual=lambda z, a: z - a, value_ndim=1, arg_ndims=(1,))
    a = torch.randn(2, 3, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(solution_map(problem, (a,)).square().sum(), a)
    torch.testing.assert_close(g, 2 * a.detach())


def test_inference_mode_does_not_switch_the_coupling_check_off():
    def coupled(z, a):
        return 0.3 * z.mean(0, keepdim=True) + 0.1 * z + a

    with torch.inference_mode():
        fixed_point(coupled, torch.zeros(3, 2, dtype=F64), (torch.randn(3, 2, dtype=F64),))
    with pytest.raises(ValueError, match="do not see each other"):
        fixed_point(coupled, torch.zeros(3, 2, dtype=F64), (torch.randn(3, 2, dtype=F64),))


def test_the_coupling_check_asks_again_for_another_event_ndim():
    def update(z, a):
        return 0.3 * z.flip(-1) + a

    a = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    fixed_point(update, torch.zeros(2, 2, dtype=F64), (a,))
    with pytest.raises(ValueError, match="do not see each other"):
        fixed_point(update, torch.zeros(2, 2, dtype=F64), (a,), event_ndim=0)


def test_a_number_of_a_module_may_be_read():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.W, self.scale = nn.Parameter(torch.eye(2, dtype=F64)), 0.3

        def forward(self, x):
            return fixed_point(lambda z, W, x: self.scale * torch.tanh(z @ W) + x, torch.zeros_like(x), (self.W, x))

        def captured(self, x):
            return fixed_point(lambda z, x: 0.3 * torch.tanh(z @ self.W) + x, torch.zeros_like(x), (x,))

    layer, x = Layer(), torch.randn(3, 2, dtype=F64)
    assert torch.autograd.grad(layer(x).sum(), layer.W)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="captures"):
        layer.captured(x)


def test_the_result_is_never_an_alias_of_init():
    a = torch.tensor([2.0, 4.0], dtype=F64)
    start = a.clone()
    fixed_point(lambda z, a: 0 * z + a, start, (a,)).add_(1)
    assert torch.equal(start, a)


class Cell(nn.Module):
    def __init__(self, slope):
        super().__init__()
        self.linear, self.slope = nn.Linear(4, 4), slope

    def forward(self, z, x):
        return self.slope * torch.tanh(self.linear(z)) + x


def test_a_replaced_module_is_used():
    layer, x = FixedPoint(Cell(0.3)), torch.randn(2, 4)
    layer(x)
    layer.module = Cell(-0.5)
    torch.testing.assert_close(layer(x), FixedPoint(layer.module)(x))


def test_threads_leave_the_parameters_alone():
    layer = FixedPoint(Cell(0.3))
    before = [id(p) for p in layer.parameters()]
    errors: list[BaseException] = []

    def work():
        try:
            for _ in range(10):
                layer(torch.randn(3, 4)).sum().backward()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    assert not errors
    assert before == [id(p) for p in layer.parameters()]


def test_trace_around_backward_alone_hears_the_adjoint():
    a = torch.tensor([2.0], dtype=F64, requires_grad=True)
    z = fixed_point(lambda z, a: 0.3 * torch.tanh(z) + a, torch.zeros(1, dtype=F64), (a,))
    with difflayers.trace() as solves:
        z.sum().backward()
    assert [s.phase for s in solves] == ["adjoint"]

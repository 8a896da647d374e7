"""torch.compile with its real backend; the contract runs every layer with aot_eager."""

import shutil

import pytest
import torch

from difflayers.implicit import Anderson, argmin, fixed_point, root_find

F64 = torch.float64


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at every tensor at a graph break
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU and there is no g++")
@pytest.mark.parametrize("name", ["Newton", "Anderson", "LBFGS"])
def test_inductor_gives_the_same_numbers(name):
    def model(x, W):
        x = torch.sin(x) * 2
        if name == "Newton":
            z = root_find(lambda z, x, W: z + z**3 + z @ W.mT - x, torch.zeros_like(x), (x, W))
        elif name == "Anderson":
            z = fixed_point(lambda z, x, W: torch.tanh(z @ W.mT + x), torch.zeros_like(x), (x, W), solver=Anderson())
        else:
            z = argmin(lambda z, x, W: ((z - x) ** 2).sum(-1) + (z @ W.mT).cos().sum(-1), torch.zeros_like(x), (x, W))
        return torch.cos(z).sum()

    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    W = (torch.randn(4, 4, dtype=F64) / 8).requires_grad_()
    want = (model(x, W), *torch.autograd.grad(model(x, W), (x, W)))
    compiled = torch.compile(model)
    y = compiled(x, W)
    for got, expected in zip((y, *torch.autograd.grad(y, (x, W))), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

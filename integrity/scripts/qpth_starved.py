"""qpth: too few iterations, and neither an error nor a warning although verbose=0 asks for them."""

import torch
from qpth.qp import QPFunction

F64 = torch.float64
v = torch.tensor([[0.3, -0.9, 1.2, 0.1, -0.4]], dtype=F64, requires_grad=True)
eye, one = torch.eye(5, dtype=F64), torch.ones(1, dtype=F64)


def project(**options: int) -> torch.Tensor:
    """On the simplex."""
    return QPFunction(verbose=0, **options)(eye, -v, -eye, torch.zeros(5, dtype=F64), one.expand(1, 5), one)


few = project(maxIter=3)
print("expected", torch.tensor([[0.05, 0.0, 0.95, 0.0, 0.0]], dtype=F64), "or a warning")
print("got     ", few.detach(), "with the gradient", torch.autograd.grad(few[0, 0], v)[0])

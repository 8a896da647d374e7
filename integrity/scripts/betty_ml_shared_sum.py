"""betty: the same conjugate gradients for upper variables that two lower problems share."""

import torch
from betty.configs import Config, EngineConfig
from betty.engine import Engine
from betty.hypergradient import get_grads
from betty.problems import ImplicitProblem

H, options = torch.tensor([1.0, 0.2]), {"type": "cg", "cg_iterations": 2, "cg_alpha": 1.0}
Inner = type("Inner", (ImplicitProblem,), {"training_step": lambda s, _: lower(s.module.weight, s.outer.module.weight)})
Outer = type("Outer", (ImplicitProblem,), {"training_step": lambda s, _: s.inner.module.weight.sum()})


def lower(w, x):  # its minimiser is x / H
    return (H * w.square() / 2 - x * w).sum()


def problem(kind, name, weight):
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.data = weight
    sgd, loader = torch.optim.SGD(module.parameters(), lr=1.0), [torch.zeros(1)]
    return kind(name=name, config=Config(**options), module=module, optimizer=sgd, train_data_loader=loader)


x = torch.tensor([[1.0, 2.0]])
outer, inner = problem(Outer, "outer", x), problem(Inner, "inner", x / H)
links = {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}}
Engine(config=EngineConfig(train_iters=1), problems=[outer, inner], dependencies=links)
print("expected", (2 / H).tolist())
print("got     ", 2 * get_grads(outer.training_step(None), outer.paths[0], False, False)[0][0], "(both give the same)")

"""Clauses on ``nn.Module`` layers."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import Tensor, nn

from ._case import LayerCase, close, finite, weighted
from ._clauses import clause, requires


def _built(case: LayerCase, device: torch.device) -> tuple[nn.Module, tuple[Tensor, ...]]:
    assert case.make_module is not None
    return case.make_module().to(device), tuple(t.to(device) for t in case.module_inputs)


def _parameter_gradients(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    module.zero_grad()
    weighted(module(*inputs)).backward()
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


@clause(needs=requires("make_module"))
def module_survives(case: LayerCase, device: torch.device) -> None:
    """state_dict, deepcopy, pickle and torch.save keep the module's numbers; copies share nothing."""
    module, inputs = _built(case, device)
    module.eval()
    expected = module(*inputs)
    copied = copy.deepcopy(module)
    close(copied(*inputs), expected, "deepcopy", case.tol)
    shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in copied.parameters()}
    assert not shared, f"deepcopy: expected copies of all parameters, got {len(shared)} shared"
    close(pickle.loads(pickle.dumps(module))(*inputs), expected, "pickle", case.tol)
    stream = io.BytesIO()
    torch.save(module.state_dict(), stream)
    stream.seek(0)
    fresh, _ = _built(case, device)
    with torch.no_grad():
        for p in fresh.parameters():
            p.mul_(0.5)
    fresh.eval()
    fresh.load_state_dict(torch.load(stream, weights_only=True))
    close(fresh(*inputs), expected, "state_dict", case.tol)
    close(copy.deepcopy(module).train().eval()(*inputs), expected, "train and eval", case.tol)


@clause(needs=requires("make_module"))
def module_learns(case: LayerCase, device: torch.device) -> None:
    """Every parameter gets a finite gradient that is not zero throughout, and the module says its options."""
    module, inputs = _built(case, device)
    found = _parameter_gradients(module, inputs)
    for name, _ in module.named_parameters():
        assert name in found, f"{name}: expected a gradient, got None"
        finite(found[name], f"gradient of {name}")
        assert bool((found[name] != 0).any()), f"gradient of {name}: zero throughout"
    assert module.extra_repr() or any(True for _ in module.children()), "extra_repr: expected options, got nothing"


@clause(needs=requires("make_module"))
def module_moves(case: LayerCase, device: torch.device) -> None:
    """.to(float32) moves parameters, buffers and result; the numbers stay."""
    module, inputs = _built(case, device)
    module.eval()
    expected = module(*inputs).float()
    module.to(torch.float32)
    value = module(*(t.float() if t.is_floating_point() else t for t in inputs))
    close(value, expected, "value", case.single_tol)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        assert not t.is_floating_point() or t.dtype == torch.float32, f"{name}: expected torch.float32, got {t.dtype}"

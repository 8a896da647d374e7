"""Cases of the applications: layers whose weights a bilevel method sets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from difflayers.bilevel import BilevelPruning, SelfTuning
from difflayers.testing._case import LayerCase, Wrong

from ._common import normal, numbers

# ------------------------------------------------------------------------------------------------------- BilevelPruning

WEIGHT = numbers([[0.6, 0.1, 0.5], [0.2, 0.4, 0.3]])
KEPT = numbers([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])  # the larger half
AUTOCAST = "the operations are those of the module, which autocast lowers as ever"


def _pruning() -> BilevelPruning:
    linear = nn.Linear(3, 2, dtype=torch.float64, device=WEIGHT.device)
    with torch.no_grad():
        linear.weight.copy_(WEIGHT)
    return BilevelPruning(linear, 0.5)


PRUNING = _pruning()


def _pruned(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    kept = {f"kept.{name}": mask.to(u.device) for name, mask in PRUNING.masks.items()}
    return functional_call(PRUNING, {"module.weight": weight, "module.bias": bias, **kept}, (u,))


def _masked(u: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> Tensor:
    return torch.from_numpy(np.asarray(u) @ (KEPT.numpy() * np.asarray(weight)).T + np.asarray(bias))


# ----------------------------------------------------------------------------------------------------------- SelfTuning


def _tuning() -> SelfTuning:
    linear = nn.Linear(3, 2, dtype=torch.float64, device=WEIGHT.device)
    tuned = SelfTuning(linear, {"a": 1.0, "b": 1.0})  # both start from zero
    with torch.no_grad():
        for k, p in enumerate(tuned.response_parameters()):
            p.copy_(normal(40 + k, *p.shape))
    return tuned


TUNING = _tuning()
FIXED = {name: value.detach() for name, value in (*TUNING.named_parameters(), *TUNING.named_buffers())}


def _tuned(u: Tensor, x: Tensor) -> Tensor:
    """One sample, one point a call."""
    batch = torch.broadcast_shapes(u.shape[:-1], x.shape[:-1])
    rows, points = (t.expand(*batch, t.shape[-1]).reshape(-1, t.shape[-1]) for t in (u, x))
    fixed = {name: value.to(u) for name, value in FIXED.items()}
    return functional_call(TUNING, fixed, (rows, points)).reshape(*batch, 2)


def _moved(u: np.ndarray, x: np.ndarray) -> Tensor:
    W0, b0, W1, b1, V = (FIXED[f"module.{n}"].numpy() for n in (
        "base.weight", "base.bias", "response.weight", "response.bias", "scale"
    ))  # fmt: skip
    s = np.asarray(x) @ V.T
    return torch.from_numpy(np.asarray(u) @ W0.T + b0 + s * (np.asarray(u) @ W1.T + b1))


CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "BilevelPruning",
        _pruned,
        (normal(31, 3, 3), normal(32, 2, 3), normal(33, 2)),
        _masked,
        (),
        (1, 2, 1),
        names=(None, None, None),
        source="Advancing Model Pruning via Bi-level Optimization, 2022",
        representative=True,
        make_module=_pruning,
        module_inputs=(normal(31, 3, 3),),
        half=False,
        exempt={"autocast_of_forward": AUTOCAST, "autocast_of_backward": AUTOCAST},
        wrong=(
            Wrong(
                "everything pruned",
                (WEIGHT,),
                "sparsity: expected a share of at least 0 and below 1",
                lambda w: BilevelPruning(nn.Linear(3, 2), 1.0)(w),
            ),
        ),
    ),
    LayerCase(
        "SelfTuning",
        _tuned,
        (normal(34, 2, 3), normal(35, 2, 2)),
        _moved,
        (),
        (1, 1),
        names=(None, "x"),
        source="Self-Tuning Networks: Bilevel Optimization of Hyperparameters, 2019",
        representative=True,
        make_module=_tuning,
        module_inputs=(normal(34, 2, 3),),
        half=False,
        exempt={
            "autocast_of_forward": AUTOCAST,
            "autocast_of_backward": AUTOCAST,
            "module_learns": "how far hyperparameters are perturbed is seen by its losses alone",
        },
        wrong=(
            Wrong("three hyperparameters for two", (WEIGHT,), r"x: expected shape \(2,\)", lambda w: TUNING(w, w[0])),
        ),
    ),
)

"""Cases of flow through a porous medium by finite volumes: numpy adds resistances in series, and solves."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from difflayers.pde import Box, darcy_reference
from difflayers.testing._case import Hostile, LayerCase, Wrong

from ._common import normal, per_element

__all__ = ["CASES"]

CELLS = (2, 2)
BOX = Box(x=(0.0, 1.0), y=(-1.0, 1.0))
WIDTHS = (1 / 2, 1.0)


def _faces() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells on both sides of every face (n beyond the boundary), and the width of a cell across."""
    index = np.pad(np.arange(CELLS[0] * CELLS[1]).reshape(CELLS), 1, constant_values=CELLS[0] * CELLS[1])
    pairs = [(index[:-1, 1:-1], index[1:, 1:-1]), (index[1:-1, :-1], index[1:-1, 1:])]
    low, high = (np.concatenate([pair[side].ravel() for pair in pairs]) for side in (0, 1))
    return low, high, np.concatenate([np.full(pair[0].size, w) for pair, w in zip(pairs, WIDTHS, strict=True)])


LOW, HIGH, ACROSS = _faces()
N = CELLS[0] * CELLS[1]
INCIDENCE = (np.eye(N + 1)[LOW] - np.eye(N + 1)[HIGH])[:, :N]


def _numpy(a: np.ndarray, f: np.ndarray) -> np.ndarray:
    resistance = np.append(0.5 / a.ravel(), 0.0)  # from the centre of a cell to its face; none beyond the boundary
    face = 1 / (resistance[LOW] + resistance[HIGH]) / ACROSS**2
    return np.linalg.solve(INCIDENCE.T * face @ INCIDENCE, f.ravel()).reshape(a.shape)


def _dense(a: Tensor, f: Tensor) -> Tensor:
    """The same in torch."""
    B, low, high, across = (torch.as_tensor(t, device=a.device) for t in (INCIDENCE, LOW, HIGH, ACROSS))
    half = torch.nn.functional.pad(0.5 / a.flatten(-2), (0, 1))
    face = 1 / (half[..., low] + half[..., high]) / across**2
    A = B.mT * face.unsqueeze(-2) @ B
    return torch.linalg.solve(A, f.flatten(-2).unsqueeze(-1)).squeeze(-1).unflatten(-1, CELLS)


MEDIUM, SOURCE = normal(91, *CELLS).exp(), normal(92, 2, *CELLS)

CASES: tuple[LayerCase, ...] = (
    LayerCase(
        "darcy_reference",
        lambda a, f: darcy_reference(a, f, domain=BOX),
        (MEDIUM, SOURCE),
        layer="darcy_reference",
        source="S. V. Patankar, Numerical Heat Transfer and Fluid Flow, 1980",
        event_ndims=(2, 2),
        names=("a", "f"),
        oracle=per_element(_numpy, (2, 2)),
        unrolled=_dense,
        representative=True,
        hostile=(
            Hostile("tiny", (1e-150 * MEDIUM, 1e-150 * SOURCE)),
            Hostile("huge", (1e150 * MEDIUM, SOURCE)),
            Hostile("contrast", (MEDIUM**8, SOURCE)),
            Hostile("no source", (MEDIUM, 0 * SOURCE)),
        ),
        wrong=(
            Wrong("a negative permeability", (-MEDIUM, SOURCE), "a: expected a permeability above 0"),
            Wrong("another grid", (MEDIUM, SOURCE[..., :1]), "f: expected shape"),
            Wrong("a vector", (MEDIUM[0], SOURCE), "a: expected at least 2 dimensions"),
        ),
    ),
)

"""The README: its snippet is run by tests/test_house.py, here every line of its table, and the names it promises."""

import re
from pathlib import Path

import cvxpy
import pytest
import torch
from torch import Tensor, nn

import difflayers
from difflayers import bilevel, conic, relu

ROOT = Path(__file__).resolve().parents[1]


def lines() -> list[str]:
    """The code in the last column of the table."""
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ")]
    return [code for row in rows[1:] for code in re.findall(r"`([^`]+)`", row.rsplit(" | ", 1)[1])]


class Convex(nn.Module):
    """A strongly convex potential."""

    def forward(self, z: Tensor) -> Tensor:
        return z.square().sum(-1) + nn.functional.softplus(z).sum(-1)


class Cell(nn.Module):
    """A contraction in z."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z / 2 + x)


def basis(point: Tensor) -> Tensor:
    """Functions of time and place."""
    t, x = point.unbind()
    return t ** torch.arange(4, dtype=t.dtype) * torch.sin(x)


def scope() -> dict[str, object]:
    """What the lines of the table call x, C and so on."""
    torch.manual_seed(0)
    x = torch.rand(3, 5)
    variable, parameter = cvxpy.Variable(5), cvxpy.Parameter(5)
    X = torch.randn(20, 3)
    return {
        **{name: getattr(difflayers, name) for name in difflayers.__all__ if not name.startswith("_")},
        **{"x": x, "P": torch.eye(5), "G": torch.eye(5), "h": torch.ones(5), "J": torch.randn(2, 6)},
        **{"cell": Cell(), "convex": Convex(), "network": nn.Linear(4, 3), "cone": conic.SecondOrder()},
        "problem": cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(variable - parameter)), [variable >= 0]),
        **{"parameter": parameter, "variable": variable, "losses": torch.rand(8)},
        **{"C": torch.rand(2, 4, 5), "points": torch.rand(6, 2), "targets": torch.rand(7, 2)},
        **{"pictures": torch.rand(2, 8, 4, 4), "logits": torch.randn(12, 4)},
        **{"X": X, "y": torch.randn(20), "gates": relu.sample_gates(X, 8)},
        **{"basis": basis, "start": lambda points: points[:, 1].sin()},
        **{
            "nodes": torch.rand(4, 3),
            "edges": torch.rand(4, 2),
            "edge_index": torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]]),
        },
    }


def bilevel_scope() -> dict[str, object]:
    """Ridge regression with a learned penalty."""
    problem = bilevel.Bilevel(
        lambda x, y, batch: (y - 1).square().sum(), lambda x, y, batch: (y - 2).square().sum() + x * y.square().sum()
    )
    return {"problem": problem, "x": torch.tensor(1.0), "y": torch.ones(3)}


def test_the_table_has_a_use_in_every_line():
    assert len(lines()) >= 20


@pytest.mark.parametrize("line", lines())
def test_every_line_of_the_table_runs(line):
    names = {**scope(), **(bilevel_scope() if line.startswith("bilevel.") else {})}
    assert eval(line, names) is not None

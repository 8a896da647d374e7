"""The Sudoku example runs in a few seconds and writes what it promises."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    import plot_quadratic_program_layer

    yield plot_quadratic_program_layer
    torch.set_num_threads(threads)
    del sys.modules["plot_quadratic_program_layer"]


def test_sudoku_example(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["example", "--steps", "25", "--out", str(tmp_path)])
    monkeypatch.setattr(example, "LABELS", (1, 100))
    example.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["photographs"]["no labels, program"] > 0.8
    assert results["puzzles"]["no labels, program"] > results["puzzles"]["no labels, dense layers"]
    assert (tmp_path / "sudoku.png").stat().st_size > 10_000
    assert "two stages, 100 labels a digit" in capsys.readouterr().out


def test_rules_allow_the_solved_boards_alone(example):
    """All 288 of them, and of the corners of the cube no other that differs in one exchange of two digits."""
    boards = example.boards()
    assert boards.shape == (288, 16)
    A, b = example.rules()
    x = torch.nn.functional.one_hot(torch.from_numpy(boards), 4).double().flatten(1)
    assert torch.equal(x @ A.T, b.expand(288, -1))
    swapped = boards.copy()
    swapped[:, [0, 5]] = swapped[:, [5, 0]]
    differs = (swapped != boards).any(1)
    x = torch.nn.functional.one_hot(torch.from_numpy(swapped[differs]), 4).double().flatten(1)
    assert bool(((x @ A.T - b).abs().amax(-1) > 0.5).all())


def test_puzzles_have_one_solution(example):
    puzzles = example.Puzzles(example.photographs()[0], 3)
    for _ in range(5):
        board, blank = puzzles.one()
        fits = (puzzles.solved[:, ~blank] == board[~blank]).all(1)
        assert fits.sum() == 1 and blank.sum() == example.BLANKS

"""The integrity table: its clauses find planted faults, its page is what was stored, and red cells have scripts."""

import ast
import dataclasses
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from integrity import render, runner
from integrity.clauses import CLAUSES, run_clause
from integrity.harness import NONE, RAISES, RIGHT, WRONG, Calls, Cell, Contender, Problem

RESULTS = runner.load()
ROWS = [(problem["name"], row) for problem in RESULTS["problems"] for row in problem["contenders"]]
RED = [(row["package"], clause) for _, row in ROWS for clause, c in row["cells"].items() if c["outcome"] == WRONG]
MODULES = {"POT": "ot", "betty-ml": "betty", "boat-torch": "boat_torch", "pyscnn": "scnn"}  # where the name is another
HELPERS = {"torch", "cvxpy", "math", "warnings", "numpy"}

# ------------------------------------------------------------------------------------------- toys with planted faults


def toy() -> Problem:
    """argmin a x^2 / 2 - b x + x^3 / 3 for positive data, a shared: the positive root of x^2 + a x = b."""
    a = torch.tensor([1.0, 0.7], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0], [3.0, 0.5], [0.3, 1.5]], dtype=torch.float64)
    bad = b.clone()
    bad[1, 0] = torch.nan
    return Problem("toy", "", (a, b), (True, False), root, (a, bad))


def root(a: Tensor, b: Tensor) -> Tensor:
    return ((a.square() + 4 * b).sqrt() - a) / 2


class Rule(torch.autograd.Function):
    """The root with a derivative rule that does not know its second derivative."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        x = root(a, b)
        ctx.save_for_backward(a, x)
        return x

    @staticmethod
    def backward(ctx, g: Tensor):
        a, x = (t.detach() for t in ctx.saved_tensors)
        u = g / (2 * x + a)
        return (-u * x).sum(0), u


def twice_too_large(a: Tensor, b: Tensor) -> Tensor:
    x = root(a, b)
    return 2 * x - x.detach()


def isolated(a: Tensor, b: Tensor) -> Tensor:
    finite = b.isfinite().all(-1, keepdim=True)
    return torch.where(finite, root(a, torch.where(finite, b, 1.0)), torch.nan)


def few_steps(a: Tensor, b: Tensor, word: str = "") -> Tensor | tuple[Tensor, str]:
    if word == "warns":
        warnings.warn("stopped early", UserWarning, stacklevel=2)
    if word == "prints":
        print("the solver did not converge")
    if word == "raises":
        raise RuntimeError("stopped early")
    x = root(a, b) + 0.1
    return (x, "MAX_STEPS") if word == "status" else x


def raising(*inputs: Tensor) -> Tensor:
    raise RuntimeError("not supported")


def averaged(a: Tensor, b: Tensor) -> Tensor:
    return root(a / len(b) + a.detach() * (1 - 1 / len(b)), b)


def cell(clause: str, calls: Calls) -> Cell:
    return run_clause(clause, toy(), Contender("toy", "toy", "", lambda: calls, 0))


GOOD = Calls(isolated, lambda a, b: few_steps(a, b, "warns"))
PLANTED = {
    "first order": [Calls(twice_too_large), Calls(lambda a, b: root(a, b) + 0.01)],
    "second order": [Calls(lambda a, b: Rule.apply(a, b))],
    "forward mode": [
        Calls(twice_too_large),
        Calls(lambda a, b: torch.tensor(root(a, b).tolist(), dtype=a.dtype)),  # the tangent is dropped
    ],
    "vmap": [Calls(root, one=lambda a, b: 2 * root(a, b)), Calls(root, one=twice_too_large)],
    "dtype": [Calls(lambda a, b: root(a, b).double()), Calls(lambda a, b: root(a.float(), b.float()).to(a.dtype))],
    "shared sum": [Calls(averaged)],
    "starved": [Calls(root, few_steps), Calls(root, twice_too_large)],
    "bad element": [
        Calls(root),  # 0 * NaN in the shared gradient
        Calls(lambda a, b: root(a, b) + 0 * b.sum()),
        Calls(lambda a, b: root(a, b.nan_to_num(1.0))),  # a number like any other
    ],
}


@pytest.mark.parametrize("clause", CLAUSES)
def test_what_is_right_is_found_right(clause: str):
    found = cell(clause, GOOD)
    assert found.outcome == RIGHT, found
    assert found.error is None or found.error < 1e-6


@pytest.mark.parametrize(("clause", "calls"), [(c, calls) for c, all_calls in PLANTED.items() for calls in all_calls])
def test_planted_faults_are_found(clause: str, calls: Calls):
    assert cell(clause, calls).outcome == WRONG


def test_every_clause_has_a_planted_fault():
    assert list(PLANTED) == list(CLAUSES)


@pytest.mark.parametrize("clause", CLAUSES)
def test_errors_are_raises_and_not_wrong(clause: str):
    found = cell(clause, Calls(raising, raising))
    assert found.outcome == RAISES
    assert found.note == "RuntimeError: not supported"


@pytest.mark.parametrize("word", ["warns", "prints", "status"])
def test_any_word_counts_as_a_report(word: str):
    found = cell("starved", Calls(root, lambda a, b: few_steps(a, b, word)))
    assert found.outcome == RIGHT
    assert found.note.startswith(word)


def test_starved_but_right_is_no_finding():
    assert cell("starved", Calls(root, root)).outcome == NONE
    assert cell("starved", Calls(root)).outcome == NONE
    assert cell("starved", Calls(root, lambda a, b: few_steps(a, b, "raises"))).outcome == RAISES


def test_a_double_backward_that_raises_is_no_fault():
    class Once(Rule):
        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g: Tensor):
            return Rule.backward(ctx, g)

    assert cell("second order", Calls(lambda a, b: Once.apply(a, b))).outcome == RAISES


def test_missing_clauses_are_dashes():
    contender = Contender("toy", "toy", "", lambda: GOOD, 0, missing={"vmap": "reason"})
    assert run_clause("vmap", toy(), contender) == Cell(NONE, None, "reason")


def test_limits_follow_the_tolerance():
    limits = [Contender("", "", "", lambda: GOOD, t).limit for t in (0, 1e-10, 1e-8, 1e-7, 1e-6, 1e-3)]
    assert limits == pytest.approx([1e-4, 1e-4, 1e-4, 1e-3, 1e-2, 0.1])


def test_a_crash_and_a_hang_cost_one_clause_each(monkeypatch: pytest.MonkeyPatch):
    calls: list[list[str]] = []

    def run(command: list[str], **options: object) -> types.SimpleNamespace:
        calls.append(command)
        left = command[6:]
        if len(calls) == 2:
            raise subprocess.TimeoutExpired(command, 1.0)
        done = left[:1] if len(calls) == 1 else left
        lines = [json.dumps({"clause": name, **dataclasses.asdict(Cell(RIGHT, 0.0))}) for name in done]
        return types.SimpleNamespace(stdout="\n".join(lines), returncode=-11)

    monkeypatch.setattr(runner.subprocess, "run", run)
    found = runner.cells(toy(), Contender("toy", "toy", "", lambda: GOOD, 0), 1.0)
    names = list(CLAUSES)
    assert found[names[0]].outcome == RIGHT
    assert "code -11" in found[names[1]].note
    assert "no answer" in found[names[2]].note
    assert all(found[name].outcome == RIGHT for name in names[3:])


# --------------------------------------------------------------------------------------------------- what is stored


def test_the_page_is_what_was_stored():
    assert render.PAGE.read_text() == render.page(RESULTS)


def test_the_page_puts_what_is_not_right_of_ours_first():
    results = json.loads(json.dumps(RESULTS))
    problem = results["problems"][-1]
    ours = next(row for row in problem["contenders"] if row["ours"])
    ours["cells"]["vmap"] = {"outcome": WRONG, "error": 0.5, "note": "planted"}
    page = render.page(results)
    named = f"- {problem['name'].replace('-', ' ')}, {ours['name']}: vmap, silently wrong: planted"
    assert page.index(named) < page.index("## All cells, counted")
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles[titles.index("## All cells, counted") + 1].lower() == f"## {problem['name'].replace('-', ' ')}"


@pytest.mark.parametrize(("package", "clause"), sorted(set(RED)))
def test_every_red_cell_has_its_script(package: str, clause: str):
    path = render.script(package, clause)
    assert path.exists()
    text = path.read_text()
    assert len(text.splitlines()) <= 30
    assert 'print("expected' in text and 'print("got' in text
    nodes = list(ast.walk(ast.parse(text)))
    imported = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module).partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    module = MODULES.get(package, package.replace("-", "_").lower().removeprefix("torch_"))
    assert module in imported
    assert imported <= HELPERS | {module}


def test_no_script_is_left_over():
    wanted = {render.script(package, clause) for package, clause in RED}
    assert set(render.SCRIPTS.glob("*.py")) == wanted


def test_subjects_need_no_peer_and_rows_are_those_stored():
    code = (
        "import json, sys, integrity.runner as r; s = r.all_subjects(); print(json.dumps([sorted({m.partition('.')[0] "
        "for m in sys.modules}), [[p.name, c.name, c.call] for p, cs in s for c in cs]]))"
    )
    root_folder = Path(__file__).resolve().parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root_folder, capture_output=True, text=True, check=True)
    loaded, rows = json.loads(run.stdout)
    packages = {row["package"] for _, row in ROWS if not row["ours"]}
    peers = {MODULES.get(package, package.replace("-", "_").lower()) for package in packages}
    assert not peers & set(loaded)
    assert len({(problem, name) for problem, name, _ in rows}) == len(rows)
    assert rows == [[problem, row["name"], row["call"]] for problem, row in ROWS]

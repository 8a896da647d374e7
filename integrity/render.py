"""The page docs/integrity.md, written from results.json alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from integrity.clauses import CLAUSES
from integrity.harness import NONE, RAISES, RIGHT, WRONG

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "integrity.md"
SCRIPTS = ROOT / "integrity" / "scripts"
OUTCOMES = (RIGHT, RAISES, WRONG, NONE)
HEADS = {
    "first order": "1st",
    "second order": "2nd",
    "forward mode": "jvp",
    "vmap": "vmap",
    "dtype": "dtype",
    "shared sum": "shared",
    "starved": "starved",
    "bad element": "bad",
}

INTRODUCTION = """\
---
html_theme.sidebar_secondary.remove: true
---
<!-- Written by `python -m integrity`; change integrity/render.py instead. -->
# What derivatives and failures are worth

A derivative that is wrong does not look wrong. This page asks difflayers and other packages the same questions about
the same problems, and writes down what came back: **right**, **raises** (an error says that this is not possible),
**wrong** (a number came back, without a word, and it is not the right one), or a dash (the question makes no sense
here). Raising is honest. The number beside an outcome is the measured relative error.

## The questions

| column | question |
| --- | --- |
| 1st | Each element alone: is the solution right, and the gradient of a loss in every input? |
| 2nd | Each element alone: is the gradient of a projection of this gradient right? |
| jvp | Is the derivative along one direction, by dual numbers (`torch.autograd.forward_ad`), right? |
| vmap | Are solution and gradient right when `torch.vmap` maps over single elements? |
| dtype | Does float32 in give float32 out, with a right solution, and float64 in give float64 out? |
| shared | Is the gradient of an input that a batch shares the sum of the elements' gradients? |
| starved | With too few iterations, of the solver or of the adjoint: is there an error, a warning, a status or NaN? \
A wrong number and no word is wrong. |
| bad | One element of the batch is NaN or infeasible: are the others' solutions and gradients right, that of \
shared inputs too, and is the bad one marked? |

The loss is the same everywhere: a fixed linear function of the solution plus half its squared norm. What is expected
comes from a reference in plain torch in double precision: a closed form, or a dense computation to rounding. It shares
no code with any contender. Errors are in the maximum norm; each tensor's is relative to its own size, or to a hundredth
of the largest tensor's size where it is smaller than that, and the largest counts.

## What makes it fair

- Every package is called as its own documentation says, with a tolerance at least as tight as any that this shows. The
  call stands below each table. Where a package has no batches, a loop over the elements stands in for them.
- What counts as right follows from that tolerance: a relative error of 1e-4 where the tolerance is at most 1e-8 or the
  package solves in closed form, and ten thousand times the tolerance where it is looser (at most 0.1). Second order may
  miss by ten times as much (at most 0.3), and a solution in float32 by 1e-3.
- A warning, a printed line or a status that the documented call returns counts as a word said. So does NaN, in the
  solution of a starved solver or of the bad element. NaN in the others, or in the gradient that the others send to a
  shared input, is wrong whatever else was said: that the bad element stays alone is the question.
- Rows called *approximate* show derivatives that their documentation calls an approximation. They are here to say how
  far they are off, and are not counted.
- In the column *dtype*, another type than the one that came in is wrong, also where the numbers are right; the notes
  say which it is.
- Every contender runs in a process of its own. A crash of the interpreter, or no answer within two minutes, counts as
  *raises*.
- Every cell that says wrong links to a short script, which needs the package and torch and prints what was expected
  and what it got.
- These are small problems chosen to have a known answer. A package that is right here may fail elsewhere, and so may
  ours. Speed is on [another page](benchmarks.md).

## Run it again

```sh
make integrity
```

sets up `.venv` with the packages that install, runs everything and writes `integrity/results.json` and this page. With
`.venv/bin/python -m integrity`, `--peer cvxpylayers` runs one package, `--scripts` runs the scripts of all wrong cells,
`--page` writes the page alone, and `--try PROBLEM CONTENDER` prints the cells of one row.
"""


def script(package: str, clause: str) -> Path:
    """The script that shows a wrong cell."""
    return SCRIPTS / f"{package.replace('-', '_').lower()}_{clause.replace(' ', '_')}.py"


def troubled(row: dict[str, Any]) -> int:
    """How many cells of ours are neither right nor without meaning."""
    return sum(cell["outcome"] in (RAISES, WRONG) for cell in row["cells"].values()) if row["ours"] else 0


def written(row: dict[str, Any], clause: str) -> str:
    cell = row["cells"][clause]
    shown = cell["error"] is not None and not (cell["outcome"] == WRONG and cell["error"] <= row["limit"])
    error = f"<br>{unbroken(cell['error'])}" if shown else "<br>NaN" if cell["note"].startswith("NaN") else ""
    if cell["outcome"] == NONE:
        return "—"
    if cell["outcome"] == WRONG:
        return f"[**wrong**](../integrity/scripts/{script(row['package'], clause).name}){error}"
    return cell["outcome"] + error


def number(x: float) -> str:
    """In scientific notation, short."""
    return f"{x:.0e}".replace("e-0", "e-").replace("e+00", "") if x else "0"


def unbroken(x: float) -> str:
    """The same with a hyphen where no browser breaks the line."""
    return number(x).replace("-", "\N{NON-BREAKING HYPHEN}")


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| | " + " | ".join(HEADS.values()) + " |"
    yield "| --- |" + " --- |" * len(HEADS)
    for row in rows:
        yield f"| {row['name']} | " + " | ".join(written(row, clause) for clause in CLAUSES) + " |"


def plain(text: str) -> str:
    """Text of an error message, safe inside Markdown."""
    for sign in "\\`*_[]<>#|$":
        text = text.replace(sign, "\\" + sign)
    return text


def notes(row: dict[str, Any]) -> Iterator[str]:
    asked = "closed form" if not row["tolerance"] else f"tolerance {number(row['tolerance'])}"
    yield f"- **{row['name']}** ({row['package']} {row['version']}; {asked}, right up to {number(row['limit'])})"
    yield f"  `{row['call']}`"
    for clause, cell in row["cells"].items():
        if cell["note"]:
            outcome = cell["outcome"].removeprefix("silently ")
            yield f"  - {HEADS[clause]}, {outcome}: {plain(cell['note'])}"


def summary(problems: list[dict[str, Any]]) -> Iterator[str]:
    counts: dict[tuple[str, str], dict[str, int]] = {}
    rows = (row for problem in problems for row in problem["contenders"] if "approximate" not in row["name"])
    for row in rows:
        count = counts.setdefault((row["package"], row["version"]), dict.fromkeys(OUTCOMES, 0))
        for cell in row["cells"].values():
            count[cell["outcome"]] += 1
    yield "| package | version | right | raises | wrong | — |"
    yield "| --- | --- | --- | --- | --- | --- |"
    ours_first = sorted(counts.items(), key=lambda item: (item[0][0] != "torch-difflayers", item[0][0].lower()))
    for (package, version), count in ours_first:
        yield f"| {package} | {version} | " + " | ".join(str(count[outcome]) for outcome in OUTCOMES) + " |"


def page(results: dict[str, Any]) -> str:
    problems = sorted(results["problems"], key=lambda p: -sum(map(troubled, p["contenders"])))
    rows = [(problem, row) for problem in problems for row in problem["contenders"]]
    ours = [(problem, row) for problem, row in rows if troubled(row)]
    lines = [INTRODUCTION, "## Where difflayers is not right", ""]
    for problem, row in ours:
        for clause, cell in row["cells"].items():
            if cell["outcome"] in (RAISES, WRONG):
                text = f"{HEADS[clause]}, {cell['outcome']}: {plain(cell['note'])}"
                lines.append(f"- {problem['name'].replace('-', ' ')}, {row['name']}: {text}")
    lines += (
        []
        if ours
        else ["No cell of difflayers on this page raises or is wrong. Dashes are explained below each table."]
    )
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    lines += ["", "## All cells, counted", "", f"Run with {versions}.", "", *summary(problems)]
    for problem in problems:
        contenders = sorted(problem["contenders"], key=lambda row: -troubled(row))
        lines += ["", f"## {problem['name'].replace('-', ' ').capitalize()}", "", problem["text"]]
        lines += [f"The bad element: {problem['bad_text']}."] if problem["bad_text"] else []
        lines += ["", *table(contenders), "", "<details><summary>Calls and notes</summary>", ""]
        lines += [line for row in contenders for line in notes(row)]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"

"""docs/migration/: what the pages quote from benchmarks/results is there, and losses come first.

That both sides of a page give the same is asserted by its own snippets, which test_snippets.py runs.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import difflayers

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs" / "migration").glob("*.md") if path.name != "index.md")
TABLE = re.compile(r"\| case \| contender \| time \| error \|\n\| --- \| --- \| --- \| --- \|\n((?:\|.*\n)+)")


def quotations(text: str) -> list[tuple[str, list[str]]]:
    """Name of the results, and the cells, of every row of every table of times."""
    found = []
    for table in TABLE.finditer(text):
        (*_, name) = re.findall(r"`benchmarks/results/(\w+)\.json`", text[: table.start()])
        found += [(name, [cell.strip() for cell in row.strip("|").split("|")]) for row in table[1].splitlines()]
    return found


def wrong(name: str, cells: list[str]) -> list[str]:
    """What a row quotes that is not in the results: times to a quarter, errors to a factor of three."""
    case, contender, time, error = cells
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]
    (row,) = (row for row in rows if (row["case"], row["contender"]) == (case, contender))
    faults = []
    if float(time) != pytest.approx(row["ratio_to_ours"], rel=0.25):
        faults.append(f"{cells}: time {row['ratio_to_ours']:.2g}")
    if not 1 / 3 < float(error) / row["relative_error"] < 3 and max(float(error), row["relative_error"]) > 1e-12:
        faults.append(f"{cells}: error {row['relative_error']:.0e}")
    return faults


def public(name: str) -> list[object]:
    """What the families call so: `InteriorPoint` is in two of them."""
    families = [getattr(difflayers, each) for each in difflayers.__all__]
    modules = [difflayers, *(family for family in families if inspect.ismodule(family))]
    return [getattr(module, name) for module in modules if name in module.__all__]


def calls(text: str) -> Iterator[ast.Call]:
    """The calls of our names in the right column of the table of names."""
    table = text.partition("## Names and options")[2].partition("## ")[0]
    for row in re.findall(r"^\|.*\|$", table, flags=re.MULTILINE)[2:]:
        for code in re.findall(r"`([^`]+)`", row.strip("|").split(" | ")[1]):
            for shape in (code, f"_({code})"):
                try:
                    tree = ast.parse(shape, mode="eval")
                except SyntaxError:
                    continue
                yield from (node for node in ast.walk(tree) if isinstance(node, ast.Call) and name_of(node) != "_")
                break


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "_")


def unknown(text: str) -> list[str]:
    """Calls of names that we do not have, and keywords that they do not take."""
    faults = []
    for call in calls(text):
        found, name = public(name_of(call)), name_of(call)
        if not found:
            faults += [name] if isinstance(call.func, ast.Name) and name != "layer" else []  # else a method
            continue
        taken = {parameter for each in found for parameter in inspect.signature(each).parameters}
        faults += [f"{name}({keyword.arg}=)" for keyword in call.keywords if keyword.arg not in taken]
    return faults


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_our_names_and_options_exist(path: Path):
    assert list(calls(path.read_text()))
    assert not unknown(path.read_text())


@pytest.mark.parametrize("code", ["sinkhorn(C, reg=1)", "solver=Broyden()", "solver=Anderson(tol=1)"])
def test_names_that_do_not_exist_are_found(code: str):
    assert unknown(f"## Names and options\n| a | b |\n| --- | --- |\n| x | `{code}` |\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_quoted_times_are_those_of_the_benchmarks(path: Path):
    found = quotations(path.read_text())
    assert found
    assert not [fault for name, cells in found for fault in wrong(name, cells)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_begins_with_losses_and_ends_with_a_comparison(path: Path):
    text = path.read_text()
    sections = ["What you lose", "The same problem in both", "Names and options", "What changes in meaning"]
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == [*sections, "What you gain", "Both give the same"]
    last = text.rpartition("```python\n")[2]
    assert last.count("assert_close(theirs, ours, ") == 1
    assert re.search(r"assert_close\((\d \* )?theirs_|_by|ift\[0\]", last)  # gradients
    assert text.endswith("```\n")


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "migration" / "index.md").read_text()
    assert [path.stem for path in PAGES] == sorted(re.findall(r"\((\w+)\.md\)", index))


def test_a_wrong_quotation_is_found():
    text = "`benchmarks/results/deq.json`\n\n| case | contender | time | error |\n| --- | --- | --- | --- |\n"
    text += "| 64x256 radius 0.9 float64 | torchdeq defaults | {} | 9e-01 |\n"
    assert not [fault for row in quotations(text.format("0.12")) for fault in wrong(*row)]
    assert [fault for row in quotations(text.format("0.24")) for fault in wrong(*row)]

"""``python -m difflayers list | check | demo``."""

from __future__ import annotations

import argparse
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

from difflayers.testing import CLAUSES, LayerCase, Result, check_layer
from difflayers.testing.cases import all_cases

WIDTH = 80  # columns of a terminal
NAME = 45  # of them for the name of a case
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program; None: that of the process.

    Returns:
        The exit code: 0; 1 if a clause of the contract is broken or a chapter of the demo fails; 2 if there is nothing
        to run.
    """
    parser = argparse.ArgumentParser(prog="python -m difflayers", description="Layers that solve inner problems.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the layers, their family and where they come from")
    check = commands.add_parser("check", help="run the contract of every layer on this machine")
    check.add_argument("--full", action="store_true", help="every clause of every case (tens of minutes)")
    check.add_argument("--device", default="cpu", help="where to run, for example cuda (default: cpu)")
    check.add_argument("--family", choices=sorted(all_cases()), help="one family only")
    check.add_argument("--case", default="", metavar="TEXT", help="all cases whose name contains this, all clauses")
    check.add_argument(
        "--clause", choices=list(CLAUSES), metavar="NAME", action="append", help="this clause only, of all cases"
    )
    check.add_argument("--verbose", action="store_true", help="every clause in a line of its own")
    demo = commands.add_parser("demo", help="run the main example; needs a checkout of the repository")
    demo.add_argument("--family", action="append", metavar="NAME", help="only this chapter (may be repeated)")
    options = parser.parse_args(arguments)
    if options.command == "list":
        return _list()
    if options.command == "demo":
        return _demo(options.family or [])
    asked = bool(options.full or options.case or options.clause)
    chosen = {
        family: [c for c in cases if options.case in c.name and (asked or c.representative)]
        for family, cases in all_cases().items()
        if options.family in (None, family)
    }
    clauses = options.clause or [name for name, c in CLAUSES.items() if asked or c.quick]
    return _check({f: c for f, c in chosen.items() if c}, clauses, options.device, options.verbose)


def _list() -> int:
    rows: list[tuple[str, ...]] = []
    for family, cases in all_cases().items():
        sources: dict[str, str] = {}
        for case in cases:
            sources.setdefault(case.of, case.source)
        rows += [(family, layer, source) for layer, source in sources.items()]
    rows = [("family", "layer", "source"), *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    rows.insert(1, tuple("-" * w for w in widths))
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return 0


# ------------------------------------------------------------------------------------------------------------ demo


def _demo(chapters: list[str]) -> int:
    quickstart = ROOT / "examples" / "quickstart.py"
    # beside an installed package a folder called examples would be somebody else's
    if not (quickstart.exists() and (ROOT / "pyproject.toml").exists()):
        message = (
            "The examples are not part of the installed package: they are in the folder examples/ of the repository and"
            f" of the source distribution of torch-difflayers. There, run `{' '.join(_command(chapters))}`, or"
            " `make demo` for all chapters."
        )
        print(textwrap.fill(message, WIDTH), file=sys.stderr)
        return 2
    missing = [m for m in ("matplotlib", "sklearn") if find_spec(m) is None]
    if missing:
        print(f"The demo needs {' and '.join(missing)}: pip install -e '.[examples]' in {ROOT}", file=sys.stderr)
        return 2
    return subprocess.run([sys.executable, str(quickstart), *_command(chapters)[2:]], check=False).returncode


def _command(chapters: list[str]) -> list[str]:
    return ["python", "examples/quickstart.py", *(word for name in chapters for word in ("--chapter", name))]


# ----------------------------------------------------------------------------------------------------------- check


def _check(chosen: Mapping[str, Sequence[LayerCase]], clauses: Sequence[str], device: str, verbose: bool) -> int:
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"device {device!r} cannot be used here: {error}", file=sys.stderr)
        return 2
    if not chosen:
        print("no case has that name", file=sys.stderr)
        return 2
    torch.set_num_threads(1)  # small tensors: threads would only wait for each other
    start = time.perf_counter()
    print(f"torch {torch.__version__}, device {device}, one thread\n")
    print(_row("case", "passed", "failed", "exempt", "seconds"))
    failures: list[Result] = []
    count = sum(map(len, chosen.values()))
    # on stderr, and only where that is a terminal
    with tqdm(total=count, disable=None, unit="case", ncols=WIDTH, leave=False) as bar:
        for family, cases in chosen.items():
            bar.write(f"{family} ".ljust(WIDTH, "-"), file=sys.stdout)
            for case in cases:
                bar.set_postfix_str(_short(case.name, 24))
                results = _run(case, device, clauses)
                failures += [r for r in results if r.outcome == "failed"]
                bar.write(_summary(case, results), file=sys.stdout)
                for r in results if verbose else ():
                    bar.write(_line(r), file=sys.stdout)
                bar.update()
    for r in failures:
        print(f"\n{r.case} breaks {r.clause} ({CLAUSES[r.clause].promise}):\n  {r.message}")
    print(f"\n{count} cases, {len(failures)} broken clauses, {time.perf_counter() - start:.0f} s")
    _say_what_was_left_out(count, clauses)
    return 1 if failures else 0


def _run(case: LayerCase, device: str, clauses: Sequence[str]) -> list[Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at the first use of forward mode
        return check_layer(case, device=device, clauses=clauses, stop=False)


def _summary(case: LayerCase, results: list[Result]) -> str:
    outcomes = [r.outcome for r in results]
    passed, failed, exempt = (str(outcomes.count(o)) for o in ("passed", "failed", "exempt"))
    return _row(case.name, passed, failed, exempt, f"{sum(r.seconds for r in results):.1f}")


def _row(name: str, passed: str, failed: str, exempt: str, seconds: str) -> str:
    return f"  {_short(name, NAME):<{NAME}}  {passed:>6}  {failed:>6}  {exempt:>6}  {seconds:>7}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _line(r: Result) -> str:
    """One clause; what is said about it goes on below itself."""
    head = f"    {r.clause:<26} {r.outcome:<7} "
    said = r.message.splitlines()[0] if r.message else ""
    return textwrap.fill(head + said, WIDTH, subsequent_indent=" " * len(head), drop_whitespace=True)


def _say_what_was_left_out(count: int, clauses: Sequence[str]) -> None:
    total = sum(map(len, all_cases().values()))
    left_out = [name for name in CLAUSES if name not in clauses]
    if count == total and not left_out:
        return
    print(f"{count} of {total} cases, {len(clauses)} of {len(CLAUSES)} clauses; --full runs all of them.")
    if left_out and not any(CLAUSES[name].quick for name in left_out):
        print(textwrap.fill(f"Clauses left out: {', '.join(left_out)}.", WIDTH))


if __name__ == "__main__":
    sys.exit(main())

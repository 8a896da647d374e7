"""``python -m difflayers list | check | demo``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from difflayers.testing import CLAUSES, LayerCase, Result, check_layer
from difflayers.testing.cases import all_cases


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The command line without the program; None: that of the process.

    Returns:
        The exit code: 0, or 1 if a clause of the contract is broken.
    """
    parser = argparse.ArgumentParser(prog="python -m difflayers", description="Layers that solve inner problems.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the layers, their family and where they come from")
    check = commands.add_parser("check", help="run the contract of every layer on this machine")
    check.add_argument("--device", default="cpu", help="where to run, for example cuda (default: cpu)")
    check.add_argument("--family", choices=sorted(all_cases()), help="one family only")
    check.add_argument("--case", default="", metavar="TEXT", help="only cases whose name contains this")
    check.add_argument("--clause", choices=list(CLAUSES), action="append", help="one clause only (may be repeated)")
    check.add_argument("--verbose", action="store_true", help="every clause in a line of its own")
    commands.add_parser("demo", help="say how to run the examples")
    options = parser.parse_args(arguments)
    if options.command == "list":
        return _list()
    if options.command == "demo":
        return _demo()
    return _check(options.device, options.family, options.case, options.clause, options.verbose)


def _list() -> int:
    rows: list[tuple[str, ...]] = []
    for family, cases in all_cases().items():
        sources: dict[str, str] = {}
        for case in cases:
            sources.setdefault(case.of, case.source)
        rows += [(family, layer, source) for layer, source in sources.items()]
    _table(("family", "layer", "source"), rows)
    return 0


def _demo() -> int:
    quickstart = Path(__file__).resolve().parents[1] / "examples" / "quickstart.py"
    if quickstart.exists():
        print(f"make demo            or: {sys.executable} {quickstart}")
    else:
        print("The examples are not part of the installed package. In a checkout of the repository: make demo")
    return 0


def _check(device: str, family: str | None, text: str, clauses: list[str] | None, verbose: bool) -> int:
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        print(f"device {device!r} cannot be used here: {error}", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}, device {device}")
    failures: list[Result] = []
    rows: list[tuple[str, ...]] = []
    for name, cases in all_cases().items():
        for case in cases:
            if family not in (None, name) or text not in case.name:
                continue
            results = _run(case, device, clauses)
            failures += [r for r in results if r.outcome == "failed"]
            rows.append((name, case.name, *_counts(results), f"{sum(r.seconds for r in results):.1f}"))
            print(f"{case.name}: {'FAILED' if any(r.outcome == 'failed' for r in results) else 'ok'}", file=sys.stderr)
            if verbose:
                for r in results:
                    print(f"  {r.clause:<28} {r.outcome:<7} {r.message.splitlines()[0] if r.message else ''}")
    if not rows:
        print("no case has that name", file=sys.stderr)
        return 2
    _table(("family", "case", "passed", "failed", "exempt", "seconds"), rows)
    for r in failures:
        print(f"\n{r.case} breaks {r.clause} ({CLAUSES[r.clause].promise}):\n  {r.message}")
    print(f"\n{len(rows)} cases, {len(failures)} broken clauses")
    return 1 if failures else 0


def _run(case: LayerCase, device: str, clauses: list[str] | None) -> list[Result]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, at the first use of forward mode
        return check_layer(case, device=device, clauses=clauses, stop=False)


def _counts(results: list[Result]) -> tuple[str, str, str]:
    outcomes = [r.outcome for r in results]
    return (str(outcomes.count("passed")), str(outcomes.count("failed")), str(outcomes.count("exempt")))


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as their widest entry; numbers to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    right = [all(row[i].replace(".", "").isdigit() for row in rows) for i in range(len(head))]
    for row in (head, tuple("-" * w for w in widths), *rows):
        cells = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True))
        print("  ".join(cells).rstrip())


if __name__ == "__main__":
    sys.exit(main())

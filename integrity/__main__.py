"""`python -m integrity` runs every contender, writes results.json and docs/integrity.md."""

import argparse
import subprocess
import sys

from integrity.clauses import CLAUSES, run_clause


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integrity", description="Ask difflayers and its peers the same.")
    parser.add_argument("--peer", action="append", default=[], metavar="PACKAGE", help="only this package; repeatable")
    parser.add_argument("--page", action="store_true", help="write the page from the stored results, run nothing")
    parser.add_argument("--scripts", action="store_true", help="run the short script of every wrong cell")
    parser.add_argument("--try", nargs=2, dest="tried", metavar=("PROBLEM", "CONTENDER"), help="print cells, keep none")
    parser.add_argument("--cells", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()

    from integrity import render, runner

    if arguments.cells:
        runner.child(*arguments.cells[:2], arguments.cells[2:])
        return 0
    if arguments.tried:
        problem, contender = runner.find(*arguments.tried)
        for name in CLAUSES:
            cell = run_clause(name, problem, contender)
            size = "" if cell.error is None else f"{cell.error:.1e}"
            print(f"{name:14} {cell.outcome:15} {size:8} {cell.note}", flush=True)
        return 0
    if arguments.scripts:
        for script in sorted((runner.HERE / "scripts").glob("*.py")):
            print(f"\n{script.name}", flush=True)
            subprocess.run([sys.executable, str(script)], check=False)
        return 0
    if not arguments.page:
        subjects = runner.all_subjects()
        packages = {contender.package.lower() for _, contenders in subjects for contender in contenders}
        if unknown := {name.lower() for name in arguments.peer} - packages:
            parser.error(f"no package called {', '.join(sorted(unknown))}; there are {', '.join(sorted(packages))}")
        fresh = runner.run(subjects, arguments.peer)
        runner.save(runner.merged(runner.load(), subjects, fresh))
    render.PAGE.write_text(render.page(runner.load()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

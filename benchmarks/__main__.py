"""`python -m benchmarks [name ...]` runs every `bench_<name>.py` beside this file, or those named.

`python -m benchmarks --page` measures nothing: it writes `docs/benchmarks.md` and its figures from the stored results.
"""

import argparse
import importlib
import sys
import traceback
from pathlib import Path

from benchmarks import figures, page
from benchmarks.harness import Options

HERE = Path(__file__).parent
NAMES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Compare difflayers with its peers.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, the same for every contender")
    parser.add_argument("--repetitions", type=int, default=9, help="samples per contender, at least 5")
    parser.add_argument("--scratch", action="store_true", help="write to results/scratch/, which is not tracked")
    parser.add_argument(
        "--page", action="store_true", help="write docs/benchmarks.md from the stored results; run none"
    )
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark called {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    if arguments.page:
        figures.draw_all()
        page.PAGE.write_text(page.page(), encoding="utf-8")
        print(page.PAGE)
        return 0
    options = Options(
        device=arguments.device,
        threads=arguments.threads,
        repetitions=arguments.repetitions,
        results=HERE / "results" / "scratch" if arguments.scratch else HERE / "results",
        memory_of=tuple(arguments.memory_of) if arguments.memory_of else None,
    )
    failed = []
    for name in arguments.names or NAMES:
        try:
            importlib.import_module(f"benchmarks.bench_{name}").main(options)
        except Exception:  # an hour of other benchmarks should not be lost to one
            if options.memory_of is not None:
                raise
            traceback.print_exc()
            failed.append(name)
    if failed:
        print(f"failed, their stored results are as before: {' '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())

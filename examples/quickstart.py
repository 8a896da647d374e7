"""The main example: what layers that solve inner problems do, chapter by chapter.

    python examples/quickstart.py                      all chapters, in under two minutes on two cores
    python examples/quickstart.py --chapter implicit   one of them
    python examples/quickstart.py --list

Numbers are printed; figures and one self-contained page, index.html, go to out/quickstart/.
"""

import argparse
import platform
import time
import warnings
from pathlib import Path

import torch
from chapters import Block, Chapter, Settings, all_chapters
from chapters._page import render

import difflayers

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> Path:
    """Runs the chapters and writes the page; returns its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chapter", action="append", help="only this chapter; may be given several times")
    parser.add_argument("--list", action="store_true", help="name the chapters and stop")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "quickstart")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, to see that it runs; numbers mean nothing")
    options = parser.parse_args(arguments)
    chapters = all_chapters()
    if options.list:
        for c in chapters.values():
            print(f"{c.name:<12} {c.title}")
        return options.out
    unknown = set(options.chapter or ()) - set(chapters)
    if unknown:
        parser.error(f"no chapter {', '.join(sorted(unknown))}; there are: {', '.join(chapters)}")

    torch.set_num_threads(1)  # small tensors: threads would only wait for each other
    warnings.simplefilter("error", difflayers.SolveWarning)  # no chapter may pass over a solve that stopped early
    start, done = time.perf_counter(), {}
    for name, c in chapters.items():
        if options.chapter and name not in options.chapter:
            continue
        print(f"\n{c.title}\n{'-' * len(c.title)}")
        settings = Settings(options.out / name, options.tiny)
        settings.out.mkdir(parents=True, exist_ok=True)
        done[name] = c, c.run(settings)
    page = write_page(done, options.out / "index.html", time.perf_counter() - start, options.tiny)
    print(f"\n{time.perf_counter() - start:.0f} s. Page: {page}")
    return page


def write_page(done: dict[str, tuple[Chapter, list[Block]]], path: Path, seconds: float, tiny: bool) -> Path:
    """The page of the chapters that ran."""
    footer = (
        f"difflayers {difflayers.__version__}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, one thread; {seconds:.0f} seconds."
    )
    if tiny:
        footer += " A tiny run: its numbers mean nothing."
    path.write_text(render(done, footer), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()

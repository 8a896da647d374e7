"""Chapters of the quickstart: each file of this folder that does not start with `_` adds one.

    @chapter("implicit", title="A layer that is a fixed point", order=10)
    def run(settings: Settings) -> list[Block]: ...

A chapter prints its numbers, asserts bounds that it would be ashamed to miss, saves its figures under `settings.out`
and returns what the page shows. It should take a minute at the most, and a few seconds with `settings.tiny`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """What a run of the quickstart fixes for all chapters.

    Attributes:
        out: Folder for figures.
        tiny: Only show that everything runs; numbers mean nothing and are not asserted.
    """

    out: Path
    tiny: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Heading:
    """A heading inside a chapter."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines of Python."""

    code: str


@dataclass(frozen=True)
class Figure:
    """One image or several side by side (on a phone below each other), a caption, and words for who cannot see them."""

    paths: tuple[Path, ...]
    caption: str
    alt: str


@dataclass(frozen=True)
class Table:
    """Rows of text; all columns but the first are aligned to the right."""

    header: tuple[str, ...]
    rows: list[tuple[str, ...]]
    caption: str = ""


Block = Text | Heading | Code | Figure | Table


@dataclass(frozen=True)
class Chapter:
    """A part of the quickstart."""

    name: str
    title: str
    order: int
    run: Callable[[Settings], list[Block]]


_chapters: dict[str, Chapter] = {}


def chapter(name: str, *, title: str, order: int) -> Callable[[Callable[[Settings], list[Block]]], Chapter]:
    """Registers a function as a chapter."""

    def register(run: Callable[[Settings], list[Block]]) -> Chapter:
        _chapters[name] = Chapter(name, title, order, run)
        return _chapters[name]

    return register


def all_chapters() -> dict[str, Chapter]:
    """Every chapter by name, in the order of the page."""
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return {c.name: c for c in sorted(_chapters.values(), key=lambda c: c.order)}

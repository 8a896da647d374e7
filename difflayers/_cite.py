"""BibTeX of the sources that a model's layers follow."""

import re
import sys
from collections.abc import Collection, Iterator
from importlib.resources import files
from types import ModuleType
from typing import Any

from torch import nn

from ._solution import Record

_OWN = "difflayers"  # the key of the library's entry, and the field that lists public names
_FIELD = re.compile(r"[\s,]*(\w+)\s*=\s*\{")


def cite(*what: object) -> str:
    """BibTeX of the layers that are used: each source once, in the order met, the library's own entry last.

    Args:
        *what: Any number of

            - modules: every layer inside counts, and the solvers it was given,
            - lists of :func:`~difflayers.trace`: every solve counts,
            - functions, classes, optimisers and solvers of the library,
            - ``difflayers`` itself or one of its families, for everything in it.

    Returns:
        The entries. Without any layer of the library that is its own entry alone.

    Note:
        A walk through modules does not see a function that is called in ``forward``. A trace does, where something is
        solved, by the name of the solve: :func:`~difflayers.conic.upgrad_weights` solves ``dual_cone_weights``, whose
        source is the same, but :func:`~difflayers.equilibrium.graph_equilibrium` solves ``linear_solve``, which has
        none. Closed forms, such as :func:`~difflayers.proximal.prox_l1`, solve nothing. Name such functions.

    Example:
        >>> import torch, difflayers
        >>> from difflayers.conic import UPGrad
        >>> print(difflayers.cite(torch.nn.Sequential(torch.nn.Linear(2, 2), UPGrad())))
        @misc{quinton2024jacobian,
          author = {P. Quinton and V. Rey},
          title = {Jacobian Descent For Multi-Objective Optimization},
          year = {2024},
          eprint = {2406.16232},
          archiveprefix = {arXiv},
        }
        <BLANKLINE>
        @misc{difflayers,
          author = {{The difflayers authors}},
          title = {difflayers: Inner optimisation problems as {PyTorch} layers},
          note = {Version ...},
        }
        >>> with difflayers.trace() as solves:
        ...     _ = difflayers.transport.sinkhorn(torch.rand(3, 3), eps=0.1)
        >>> "eisenberger2022unified" in difflayers.cite(solves)
        True
    """
    entries = references()
    sources: dict[str, list[str]] = {}  # the keys of a public name
    for key, fields in entries.items():
        for name in public_names(fields):
            sources.setdefault(name, []).append(key)
    used = dict.fromkeys(key for one in what for name in _names(one, sources) for key in sources.get(name, ()))
    texts = [_text(key, entries[key]) for key in used]
    version = sys.modules[__package__].__version__  # not imported: the package stands above this module
    return "\n\n".join([*texts, _text(_OWN, {**entries[_OWN], "note": f"Version {version}"})])


# ------------------------------------------------------------------------------------------------------------- names


def _names(one: object, listed: Collection[str]) -> Iterator[str]:
    """Public names, such as ``conic.UPGrad``, that `one` stands for."""
    if isinstance(one, nn.Module):
        seen: set[int] = set()
        for module in one.modules():
            yield from _parts(module, listed, seen)
    elif isinstance(one, ModuleType) and one.__name__.split(".")[0] == __package__:
        family = one.__name__.split(".")[1:2]
        yield from (name for name in listed if not family or name.split(".")[0] == family[0])
    elif isinstance(one, list | tuple) and all(isinstance(record, Record) for record in one):
        for record in one:
            yield from _solved(record.name, listed)
    elif isinstance(one, type) and any(_of_library(base) for base in one.__mro__):
        yield from _nearest(one, listed)
    elif not isinstance(one, type) and any(_of_library(base) for base in type(one).__mro__):
        yield from _parts(one, listed, set())
    elif _of_library(one):
        yield _name(one)
    else:
        raise TypeError(f"what: expected modules, traces, or functions and classes of difflayers, got {one!r}")


def _parts(part: object, listed: Collection[str], seen: set[int]) -> Iterator[str]:
    """The name of an object, and of the solvers and other objects of the library that it holds."""
    if id(part) in seen:
        return
    seen.add(id(part))
    yield from _nearest(type(part), listed)
    for held in getattr(part, "__dict__", {}).values():
        if not isinstance(held, nn.Module) and _of_library(type(held)):  # modules are walked through anyway
            yield from _parts(held, listed, seen)


def _nearest(kind: type, listed: Collection[str]) -> list[str]:
    """The class itself or the first it is derived from that has a source: what a user's subclass stands for."""
    return [name for name in map(_name, kind.__mro__) if name in listed][:1]


def _of_library(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith(f"{__package__}.") and hasattr(thing, "__qualname__")


def _name(thing: Any) -> str:
    """``conic.UPGrad``, whatever file it stands in; the `_ex` form of a function has the name of the function."""
    path = [part for part in thing.__module__.split(".")[1:] if not part.startswith("_")]
    return ".".join([*path, thing.__qualname__.removesuffix("_ex")]) if _of_library(thing) else ""


def _solved(record: str, listed: Collection[str]) -> Iterator[str]:
    """Names in ``layer[Solver(...)]`` of a record; the solver is one of the layer's family."""
    words = dict.fromkeys(re.findall(r"[^\W\d]\w*", record))
    layer = next(iter(words), "")
    for family in dict.fromkeys(name.split(".")[0] for name in listed if name.split(".")[-1] == layer):
        yield from (f"{family}.{word}" for word in words)


# -------------------------------------------------------------------------------------------------------------- file


def references() -> dict[str, dict[str, str]]:
    """The entries of ``references.bib``: their fields by key, the kind of entry as ``ENTRYTYPE``."""
    return parse(files(__package__).joinpath("references.bib").read_text(encoding="utf-8"))


def public_names(fields: dict[str, str]) -> list[str]:
    """The public names that an entry is the source of."""
    return [name for name in re.split(r"[,\s]+", fields.get(_OWN, "")) if name]


def parse(text: str) -> dict[str, dict[str, str]]:
    """Reads entries whose values stand in braces, one field after the other, which is all that our file needs."""
    entries = {}
    for head in re.finditer(r"^@(\w+)\{([^,\s]+),", text, flags=re.MULTILINE):
        fields, at = {"ENTRYTYPE": head[1]}, head.end()
        while field := _FIELD.match(text, at):
            at = _closing(text, field.end())
            fields[field[1]] = " ".join(text[field.end() : at - 1].split())
        if head[2] in entries:
            raise ValueError(f"references.bib: expected every key once, got {head[2]} twice")
        entries[head[2]] = fields
    return entries


def _closing(text: str, at: int) -> int:
    """The position behind the brace that closes the one before `at`."""
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at


def _text(key: str, fields: dict[str, str]) -> str:
    lines = [f"  {name} = {{{value}}}," for name, value in fields.items() if name not in ("ENTRYTYPE", _OWN)]
    return "\n".join([f"@{fields['ENTRYTYPE']}{{{key},", *lines, "}"])

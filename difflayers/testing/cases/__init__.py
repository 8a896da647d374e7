"""The cases of every layer in the library, by family.

>>> from difflayers.testing.cases import all_cases
>>> sorted(all_cases())[:2]
['bilevel', 'conic']
"""

from __future__ import annotations

import importlib
import pkgutil

from difflayers.testing._case import LayerCase

__all__ = ["all_cases"]


def all_cases() -> dict[str, tuple[LayerCase, ...]]:
    """The cases of every family that has some.

    Returns:
        Family name to its cases.
    """
    found = {}
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            found[module.name] = tuple(importlib.import_module(f"{__name__}.{module.name}").CASES)
    return found

"""The registry of clauses and the loop that runs them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from difflayers._solution import SolveWarning

from ._case import LayerCase

Check = Callable[[LayerCase, torch.device], None]


@dataclass(frozen=True)
class Clause:
    """One promise of the contract.

    Attributes:
        name: Short, with underscores, as it stands in reports and in ``LayerCase.exempt``.
        promise: What holds, in one line.
        check: ``check(case, device)``; raises where the promise is broken.
        needs: The field of a case without which there is nothing to check, with the reason; or None.
        quick: Part of the quick profile of ``python -m difflayers check``. The others take most of the time (full
            gradcheck, ``torch.compile``, all hostile input) or look at the same rules from another side.
    """

    name: str
    promise: str
    check: Check
    needs: Callable[[LayerCase], str | None]
    quick: bool = True


@dataclass(frozen=True)
class Result:
    """What came of one clause for one case.

    Attributes:
        case: Name of the case.
        clause: Name of the clause.
        outcome: ``"passed"``, ``"failed"``, ``"exempt"`` (does not hold by design) or ``"absent"`` (nothing to check).
        message: Why it failed, is exempt, or does not apply.
        seconds: Wall-clock time.
        error: The exception, where it failed.
    """

    case: str
    clause: str
    outcome: str
    message: str = ""
    seconds: float = 0.0
    error: Exception | None = None


CLAUSES: dict[str, Clause] = {}


def _always(case: LayerCase) -> str | None:
    return None


def clause(*, needs: Callable[[LayerCase], str | None] = _always, quick: bool = True) -> Callable[[Check], Check]:
    """Registers a check under its name; the first line of its docstring is the promise."""

    def register(check: Check) -> Check:
        name = check.__name__
        CLAUSES[name] = Clause(name, (check.__doc__ or name).splitlines()[0].rstrip("."), check, needs, quick)
        return check

    return register


def requires(*fields: str) -> Callable[[LayerCase], str | None]:
    """For `needs`: every field must be given."""

    def missing(case: LayerCase) -> str | None:
        absent = [f for f in fields if getattr(case, f) in (None, (), False, 0)]
        return f"the case has no {', '.join(absent)}" if absent else None

    return missing


def absent(case: LayerCase, clause: Clause) -> str | None:
    """Why `clause` has nothing to check in `case`, or None."""
    return clause.needs(case)


def run_clause(case: LayerCase, clause: Clause, device: torch.device) -> Result:
    """Runs one clause on one case and says what came of it; never raises for a broken promise."""
    if clause.name in case.exempt:
        return Result(case.name, clause.name, "exempt", case.exempt[clause.name])
    reason = clause.needs(case)
    if reason is not None:
        return Result(case.name, clause.name, "absent", reason)
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SolveWarning)
            clause.check(case, device)
    except Exception as error:
        seconds = time.perf_counter() - start
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        return Result(case.name, clause.name, "failed", f"{kind}{error}", seconds, error)
    return Result(case.name, clause.name, "passed", "", time.perf_counter() - start)


def check_layer(
    case: LayerCase,
    *,
    device: torch.device | str = "cpu",
    clauses: Iterable[str] | None = None,
    stop: bool = True,
) -> list[Result]:
    """Runs the contract on one layer.

    Args:
        case: The layer, its inputs and what is known about them.
        device: Where to run.
        clauses: Names from :data:`CLAUSES`; None: all of them.
        stop: Raise at the first broken clause. False: go on, and leave failures in the results.

    Returns:
        One :class:`Result` a clause, in the order of :data:`CLAUSES`.

    Raises:
        AssertionError: Naming layer and clause, if a clause is broken and `stop` is set.
        ValueError: For a clause that does not exist, also among the exemptions of the case.

    Example:
        >>> import torch
        >>> from difflayers.testing import LayerCase, check_layer
        >>> case = LayerCase("sine", torch.sin, (torch.tensor([[0.1], [0.7]], dtype=torch.float64),))
        >>> results = check_layer(case, clauses=["gradcheck", "vmap_equals_loop"])
        >>> [result.outcome for result in results]
        ['passed', 'passed']
    """
    wanted = set(CLAUSES if clauses is None else clauses)
    unknown = sorted((wanted | set(case.exempt)) - set(CLAUSES))
    if unknown:
        raise ValueError(f"clauses: expected names from {', '.join(CLAUSES)}, got {', '.join(unknown)}")
    results = []
    for name, entry in CLAUSES.items():
        if name not in wanted:
            continue
        result = run_clause(case, entry, torch.device(device))
        results.append(result)
        if stop and result.outcome == "failed":
            raise AssertionError(f"{case.name} breaks {name} ({entry.promise}): {result.message}") from result.error
    return results

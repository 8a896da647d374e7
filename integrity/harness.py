"""What the integrity table is made of: problems, contenders and cells.

A problem is an inner problem with inputs in double precision and a reference in plain torch, which knows the solution
in closed form or from a tight dense computation and shares no code with any contender. A contender is one way to call
one package. A clause asks one question and returns a cell: right, raises, silently wrong, or no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

RIGHT, RAISES, WRONG, NONE = "right", "raises", "silently wrong", "no such thing"

Inputs = tuple[Tensor, ...]
Answer = Tensor | tuple[Tensor, str]  # the solution, and what the solver's own status said if it was not content
Solve = Callable[..., Answer]


@dataclass(frozen=True)
class Problem:
    """An inner problem and its reference.

    Attributes:
        name: Short, lower case with hyphens.
        text: What is solved, with its sizes, in Markdown.
        inputs: In float64; with one leading batch dimension, except where shared.
        shared: For each input whether the elements of the batch share it.
        reference: From one element's inputs to its solution, in plain torch, twice differentiable.
        bad: The inputs with one bad element, or None if there is no way to spoil one element alone.
        bad_element: Which one.
        bad_text: What is bad about it.
    """

    name: str
    text: str
    inputs: Inputs
    shared: tuple[bool, ...]
    reference: Callable[..., Tensor]
    bad: Inputs | None = None
    bad_element: int = 1
    bad_text: str = ""

    @property
    def batch(self) -> int:
        return next(len(t) for t, shared in zip(self.inputs, self.shared, strict=True) if not shared)

    def element(self, inputs: Sequence[Tensor], i: int) -> Inputs:
        return tuple(t if shared else t[i] for t, shared in zip(inputs, self.shared, strict=True))

    def alone(self, inputs: Sequence[Tensor], i: int) -> Inputs:
        """Element i as a batch of one."""
        return tuple(t if shared else t[i : i + 1] for t, shared in zip(inputs, self.shared, strict=True))

    def expected(self, inputs: Sequence[Tensor], elements: Sequence[int] | None = None) -> Tensor:
        which = range(self.batch) if elements is None else elements
        return torch.stack([self.reference(*self.element(inputs, i)) for i in which])


@dataclass(frozen=True)
class Calls:
    """How a contender is called.

    Every function takes the problem's inputs and returns the batch of solutions, or the pair of it and what the
    solver's status said, empty if it was content. A package without batches loops over the elements here.

    Attributes:
        solve: With the tightest documented tolerance.
        starved: The same with so few iterations that the solution cannot be reached.
        one: From one element's inputs to its solution, for `vmap`; None: `solve` on a batch of one.
        bad: As `solve`, for the batch with a bad element, where the package documents a special call for it.
        single: As `solve`, in float32, where the tolerance must be another one.
    """

    solve: Solve
    starved: Solve | None = None
    one: Solve | None = None
    bad: Solve | None = None
    single: Solve | None = None


@dataclass(frozen=True)
class Contender:
    """One way to call one package.

    Attributes:
        name: As it appears in the table.
        package: Name of the distribution, of which the version is looked up.
        call: The call as its documentation has it, with the options that make it tight, in one line of Python.
        build: Imports the package and returns the calls.
        tolerance: The documented tolerance that is asked for; 0 for closed forms.
        missing: Reasons why clauses do not apply, by the clause's name.
        remarks: What the reader should know about cells, by the clause's name; added to their notes.
    """

    name: str
    package: str
    call: str
    build: Callable[[], Calls]
    tolerance: float
    missing: Mapping[str, str] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.package == "torch-difflayers"

    @property
    def limit(self) -> float:
        """Largest relative error that counts as right, except at second order."""
        return max(1e-4, min(0.1, 1e4 * self.tolerance)) if self.tolerance > 1e-8 else 1e-4

    @property
    def second_limit(self) -> float:
        return min(10 * self.limit, 0.3)


@dataclass(frozen=True)
class Cell:
    outcome: str
    error: float | None = None  # relative, None if nothing was measured or it is not finite
    note: str = ""

"""The clauses of the integrity table. Each asks one question of one contender and returns a cell."""

from __future__ import annotations

import contextlib
import io
import math
import re
import site
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from integrity.harness import NONE, RAISES, RIGHT, WRONG, Answer, Calls, Cell, Contender, Inputs, Problem, Solve

LOUD_WORDS = re.compile(r"warn|converge|inaccura|fail|error|maximum|infeasib|stagna|diverg", re.IGNORECASE)
NOT_A_REPORT = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
SOLUTION = "the solution itself"

Clause = Callable[[Problem, Contender, Calls], Cell]

# ------------------------------------------------------------------------------------------------------- measuring


def weights(like: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(like.numel())
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)


def loss(x: Tensor) -> Tensor:
    """Its gradient depends on the solution, so a second derivative needs both of its terms."""
    return (weights(x) * x).sum() + x.square().sum() / 2


def leaves(inputs: Sequence[Tensor]) -> Inputs:
    return tuple(t.detach().clone().requires_grad_() for t in inputs)


def gradients(value: Tensor, inputs: Sequence[Tensor]) -> Inputs:
    """What `backward` leaves in `.grad` of fresh leaves, zeros for None.

    `torch.autograd.grad` would skip what some packages put into the graph to raise at second order.
    """
    value.backward()
    return tuple(torch.zeros_like(t) if t.grad is None else t.grad for t in inputs)


def relative_errors(got: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of each tensor, in the maximum norm; NaN and Inf count as infinite.

    Each is relative to its own size, or to a hundredth of the largest one's where it is smaller than that or zero.
    """
    sizes = [float(e.detach().abs().max()) for e in expected]
    errors = []
    for g, e, size in zip(got, expected, sizes, strict=True):
        if g.shape != e.shape:
            raise ValueError(f"shape {tuple(g.shape)} where {tuple(e.shape)} was expected")
        distance = float((g.detach().double() - e.detach()).abs().max())
        errors.append(distance / max(size, 1e-2 * max(sizes)) if math.isfinite(distance) else math.inf)
    return errors


def relative_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of them."""
    return max(relative_errors(got, expected))


def judged(error: float, limit: float, note: str = "") -> Cell:
    if not math.isfinite(error):
        return Cell(WRONG, None, "; ".join(filter(None, ["NaN or Inf", note])))
    return Cell(RIGHT if error <= limit else WRONG, error, note)


def value_of(answer: Answer) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer


@contextlib.contextmanager
def heard(said: list[str]) -> Iterator[None]:
    """Collects what is warned and printed."""
    printed = io.StringIO()
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        warnings.simplefilter("always")
        yield
    said += [
        f"warns: {w.category.__name__}: {short(str(w.message))}"
        for w in caught
        if not issubclass(w.category, NOT_A_REPORT)
    ]
    said += [f"prints: {short(line)}" for line in printed.getvalue().splitlines() if LOUD_WORDS.search(line)]


def short(message: str, length: int = 140) -> str:
    """One line, without anybody's folders."""
    for folder in (*site.getsitepackages(), site.getusersitepackages()):
        message = message.replace(folder + "/", "")
    message = re.sub(r"0x[0-9a-f]+", "0x...", " ".join(message.split()))
    return message if len(message) <= length else message[:length].rsplit(" ", 1)[0] + " ..."


# --------------------------------------------------------------------------------------------------------- clauses


def first_order(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """Every element alone: its solution, and the gradient of a loss in every input."""
    got, expected, values = [], [], []
    for i in range(problem.batch):
        ours, theirs = leaves(problem.alone(problem.inputs, i)), leaves(problem.element(problem.inputs, i))
        x, y = value_of(calls.solve(*ours)), problem.reference(*theirs)[None]
        values.append(relative_error([x], [y]))
        got += [g.reshape(t.shape) for g, t in zip(gradients(loss(x), ours), theirs, strict=True)]
        expected += gradients(loss(y), theirs)
    if not max(values) <= contender.limit:
        return judged(max(values), contender.limit, SOLUTION)
    return judged(relative_error(got, expected), contender.limit)


def second_order(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """Every element alone: the gradient of a projection of the gradient."""

    def twice(solve: Callable[[Inputs], Tensor], inputs: Inputs) -> Inputs:
        options = {"create_graph": True, "allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(loss(solve(inputs)), inputs, **options)
        return gradients(sum((weights(g) * g).sum() for g in first), inputs)

    got, expected = [], []
    for i in range(problem.batch):
        ours, theirs = leaves(problem.alone(problem.inputs, i)), leaves(problem.element(problem.inputs, i))
        found = twice(lambda t: value_of(calls.solve(*t)), ours)
        got += [g.reshape(t.shape) for g, t in zip(found, theirs, strict=True)]
        expected += twice(lambda t: problem.reference(*t)[None], theirs)
    return judged(relative_error(got, expected), contender.second_limit)


def forward_mode(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """The derivative along one direction, by dual numbers."""
    tangents = tuple(weights(t) for t in problem.inputs)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t.clone(), v) for t, v in zip(problem.inputs, tangents, strict=True)]
        x, tangent = forward_ad.unpack_dual(value_of(calls.solve(*duals)))
    note = "the tangent is dropped without a word" if tangent is None else ""
    # the double-backward trick, since the reference needs no forward mode of its own
    ours = leaves(problem.inputs)
    y = problem.expected(ours)
    v = torch.zeros_like(y, requires_grad=True)
    pulled = torch.autograd.grad(y, ours, v, create_graph=True, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True)), v)[0]
    return judged(
        relative_error([torch.zeros_like(x) if tangent is None else tangent], [expected]), contender.limit, note
    )


def vmap(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """`torch.vmap` over single elements, and the gradient through it."""

    def batch_of_one(*element: Tensor) -> Tensor:
        given = (t if shared else t[None] for t, shared in zip(element, problem.shared, strict=True))
        return value_of(calls.solve(*given))[0]

    one = calls.one or batch_of_one
    ours, theirs = leaves(problem.inputs), leaves(problem.inputs)
    in_dims = tuple(None if shared else 0 for shared in problem.shared)
    x, y = torch.vmap(lambda *e: value_of(one(*e)), in_dims=in_dims)(*ours), problem.expected(theirs)
    found = [x, *gradients(loss(x), ours)]
    return judged(relative_error(found, [y, *gradients(loss(y), theirs)]), contender.limit)


def dtype(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """float32 in gives float32 out, in the solution and in the gradients; float64 gives float64."""
    solve, limit = calls.single or calls.solve, max(1e-3, contender.limit)
    inputs = leaves([t.float() for t in problem.inputs])
    x, double = value_of(solve(*inputs)), value_of(calls.solve(*problem.inputs)).detach()
    error = relative_error([x], [problem.expected([t.detach().double() for t in inputs])])
    if x.requires_grad:  # packages without a gradient are asked for the solution alone
        gradients(loss(x), inputs)
    kinds = ((x.dtype, torch.float32), (double.dtype, torch.float64))
    wrong = [f"{str(got)[6:]} out of {str(wanted)[6:]}" for got, wanted in kinds if got != wanted]
    expected = problem.expected(problem.inputs)
    if torch.equal(double, double.float().double()) and not torch.equal(expected, expected.float().double()):
        wrong.append("float64 is rounded to float32 on the way")
    if wrong and error <= limit:
        return Cell(WRONG, error, "; ".join([*wrong, "the numbers are right"]))
    return judged(error, limit, "; ".join([SOLUTION, *wrong]) if error > limit else "")


def shared_sum(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """The gradient of what a batch shares is the sum of the elements' gradients."""
    if not any(problem.shared):
        return Cell(NONE, None, "nothing is shared in this problem")
    ours, theirs = leaves(problem.inputs), leaves(problem.inputs)
    kept = [i for i, shared in enumerate(problem.shared) if shared]
    x, y = value_of(calls.solve(*ours)), problem.expected(theirs)
    value = relative_error([x], [y])
    if not value <= contender.limit:
        return judged(value, contender.limit, SOLUTION)
    found, expected = gradients(loss(x), ours), gradients(loss(y), theirs)
    return judged(relative_error([found[i] for i in kept], [expected[i] for i in kept]), contender.limit)


def starved(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """Too few iterations: an error, a warning, a status or NaN; not a number with a gradient and no word.

    Gradients that are wrong with all iterations are left out: another column says so.
    """
    if calls.starved is None:
        return Cell(NONE, None, "no limit on iterations that could starve it")
    theirs = leaves(problem.inputs)
    y = problem.expected(theirs)
    expected = [y, *gradients(loss(y), theirs)]

    def solved(solve: Solve, said: list[str]) -> tuple[Answer, list[float]]:
        inputs = leaves(problem.inputs)
        with heard(said):
            answer = solve(*inputs)
            x = value_of(answer)
            found = [x, *(gradients(loss(x), inputs) if x.requires_grad else expected[1:])]
        return answer, relative_errors(found, expected)

    usual: list[str] = []
    said: list[str] = []
    full = solved(calls.solve, usual)[1]
    if not full[0] <= contender.limit:
        return Cell(NONE, None, "the solution is wrong with all its iterations")
    answer, errors = solved(calls.starved, said)
    error = max(few for few, all_steps in zip(errors, full, strict=True) if all_steps <= contender.limit)
    if error <= contender.limit:
        return Cell(NONE, error, "right after the fewest iterations that can be asked for")
    new = [text for text in dict.fromkeys(said) if text not in usual]
    if isinstance(answer, tuple) and answer[1]:
        new.insert(0, f"status: {answer[1]}")
    if math.isinf(error):
        new.append("returns NaN or Inf")
    if new:
        return Cell(RIGHT, None, new[0])
    silent = "an unfinished gradient, no word" if errors[0] <= contender.limit else "an unfinished solution, no word"
    return Cell(WRONG, error, silent)


def bad_element(problem: Problem, contender: Contender, calls: Calls) -> Cell:
    """One bad element in a batch: the others' solutions and gradients are right, and the bad one is marked."""
    if problem.bad is None:
        return Cell(NONE, None, "no element of this problem can be spoiled alone")
    good = [i for i in range(problem.batch) if i != problem.bad_element]
    ours, theirs = leaves(problem.bad), leaves(problem.bad)
    said: list[str] = []
    usual: list[str] = []
    with heard(usual):
        (calls.bad or calls.solve)(*problem.inputs)
    with heard(said):
        answer = (calls.bad or calls.solve)(*ours)
        x = value_of(answer)
        found = gradients(loss(x[good]), ours) if x.requires_grad else ()
    y = problem.expected(theirs, good)
    expected = gradients(loss(y), theirs)
    errors = {"the others' solutions": relative_error([x[good]], [y])}
    if found:
        elements = [(f[good], e[good]) for f, e, s in zip(found, expected, problem.shared, strict=True) if not s]
        together = [(f, e) for f, e, s in zip(found, expected, problem.shared, strict=True) if s]
        errors["the others' gradients"] = relative_error(*zip(*elements, strict=True))
        errors |= {"the shared gradient": relative_error(*zip(*together, strict=True))} if together else {}
    error = max(errors.values())
    cell = judged(error, contender.limit, ", ".join(k for k, e in errors.items() if not e <= contender.limit))
    new = [text for text in dict.fromkeys(said) if text not in usual]
    if isinstance(answer, tuple) and answer[1]:
        new.insert(0, f"status: {answer[1]}")
    if not bool(torch.isfinite(x[problem.bad_element].detach()).all()):
        new.append("the bad element is NaN or Inf")
    if cell.outcome == RIGHT and not new:
        return Cell(WRONG, error, "the others are right, but the bad element is a number like any other, no word")
    return Cell(cell.outcome, cell.error, "; ".join(filter(None, [cell.note, *new[:1]])))


CLAUSES: dict[str, Clause] = {
    "first order": first_order,
    "second order": second_order,
    "forward mode": forward_mode,
    "vmap": vmap,
    "dtype": dtype,
    "shared sum": shared_sum,
    "starved": starved,
    "bad element": bad_element,
}


def run_clause(name: str, problem: Problem, contender: Contender) -> Cell:
    """One cell. Every exception is caught; a crash of the interpreter is the runner's business."""
    if name in contender.missing:
        return Cell(NONE, None, contender.missing[name])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            calls = contender.build()
            cell = CLAUSES[name](problem, contender, calls)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as e:  # panics of Rust are no Exception
        cell = Cell(RAISES, None, f"{type(e).__name__}: {short(str(e))}")
    remark = contender.remarks.get(name)
    return Cell(cell.outcome, cell.error, f"{cell.note}; {remark}".removeprefix("; ")) if remark else cell

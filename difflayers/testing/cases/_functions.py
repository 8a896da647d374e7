"""Cases of layers that take a user's function: what they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from difflayers.testing._case import LayerCase, Wrong

from ._common import batch_shape, normal, numbers

W = normal(12, 3, 3)
C = numbers(1.5)
UNROLLED = {
    "autocast_of_backward": "plain autograd through the steps: torch leaves backward under autocast to the user",
    "solves_are_traced": "there is no adjoint solve",
}
DERIVATIVES = (
    *("gradcheck", "gradcheck_full", "gradgradcheck", "implicit_equals_unrolled", "hessians_agree", "vmapped_hessian"),
)


def act(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrix times vector, batch dimensions broadcast."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def zeros(args: tuple[Tensor, ...], ndims: tuple[int, ...], event: tuple[int, ...], value: float = 0.0) -> Tensor:
    """A start for every element of the batch."""
    like = next((a for a in args if a.is_floating_point()), args[0])
    return like.new_full((*batch_shape(args, ndims), *event), value)


def function_case(
    name: str,
    pair: tuple[Callable[..., Any], Callable[..., Any]],
    function: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    *,
    ndims: tuple[int, ...],
    event: tuple[int, ...],
    solver: Any,
    starved: Any = None,
    start: float = 0.0,
    declared: bool = True,
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> LayerCase:
    """A user's function solved by one of the engine's four functions."""
    plain, ex = pair
    event_options = {"event_ndim": len(event), "arg_ndims": ndims if declared else None, **(options or {})}

    def run(layer: Callable[..., Any], **more: Any) -> Callable[..., Any]:
        return lambda *args: layer(function, zeros(args, ndims, event, start), args, **{**event_options, **more})

    def captured(t: Tensor) -> Tensor:
        rest = tuple(x[0] if x.ndim > k else x for x, k in zip(inputs[1:], ndims[1:], strict=True))
        rest = tuple(x.to(t) for x in rest)
        batch = zeros((t, *rest), ndims, event, start)
        more = {**event_options, "arg_ndims": ndims[1:] if declared else None}
        return plain(lambda z, *args: function(z, t, *args), batch.detach(), rest, solver=solver, **more)

    common: dict[str, Any] = {
        "layer": plain.__name__,
        "event_ndims": ndims,
        "names": tuple(f"args[{i}]" for i in range(len(inputs))),
        "tolerant": run(plain, solver=solver, on_failure="nan"),
        "solution": run(ex, solver=solver),
        "captured": captured,
        "source": "the implicit function theorem",
    }
    if starved is not None:
        common["starved"] = run(plain, solver=starved)
        common["starved_solution"] = run(ex, solver=starved)
    return LayerCase(name, run(plain, solver=solver), inputs, **(common | fields))


def fsolve(residual: Callable[..., Tensor], n: int, start: float = 0.0) -> Callable[..., np.ndarray]:
    def solve(*args: np.ndarray) -> np.ndarray:
        from scipy import optimize

        tensors = [torch.from_numpy(np.array(a)) for a in args]
        f = lambda z: residual(torch.from_numpy(z), *tensors).numpy()  # noqa: E731
        z = np.full(n, start)
        for _ in range(3):  # a restart gains the digits that one run leaves
            z = optimize.root(f, z, tol=1e-14).x
        return z

    return solve


def wrong_calls(layer: Callable[..., Any], argument: str, good: Callable[..., Any]) -> tuple[Wrong, ...]:
    """Mistakes in a call, whatever the function."""
    three, two = normal(1, 3), normal(1, 2)
    integers = torch.ones(3, dtype=torch.int64, device="cpu")
    doubled = (normal(1, 2, 3), normal(1, 4, 3))

    def call(function: Any, **options: Any) -> Callable[..., Any]:
        return lambda z, a=None: layer(function, z, (z if a is None else a,), **options)

    return (
        Wrong("another shape", (three,), f"{argument} output: expected shape .* got", call(lambda z, a: z[..., :2])),
        Wrong("another dtype", (three,), f"{argument} output: expected", call(lambda z, a: good(z, a).float())),
        Wrong("init too flat", (three,), "init: expected at least 2 dimensions", call(good, event_ndim=2)),
        Wrong("init no tensor", (three,), "init: expected a tensor", lambda a: layer(good, "start", (a,))),
        Wrong("args no tuple", (three,), "args: expected a tuple", lambda a: layer(good, a, a)),
        Wrong("batches", doubled, "args.0.: expected batch dimensions", call(good, arg_ndims=(1,))),
        Wrong("too few dimensions", (three, two), "args.0.: expected at least 2 dim", call(good, arg_ndims=(2,))),
        Wrong("another policy", (three,), "on_failure: expected", call(good, on_failure="zero")),
        Wrong("integers", (integers,), "init: expected a floating-point", call(good)),
        Wrong("no function", (three,), f"{argument}: expected a callable", call("good")),
    )

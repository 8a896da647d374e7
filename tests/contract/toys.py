"""Toy layers, right and deliberately wrong: for each clause of the contract one layer that breaks it."""

import copy
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from difflayers import Solution, SolveError
from difflayers.implicit import Newton, root_find, root_find_ex
from difflayers.testing import Hostile, LayerCase, Wrong

X = torch.tensor([[0.3, -0.8], [1.2, 0.5], [-0.4, 0.9]], dtype=torch.float64)
W = torch.tensor([0.7, 1.3], dtype=torch.float64)


def product(x: Tensor, w: Tensor) -> Tensor:
    """Plain torch, right in every way."""
    return torch.sin(x) * w + 0.1 * x.square() * w.square()


def toy(name: str, fn, **fields) -> LayerCase:
    return LayerCase(name, fn, (X, W), **({"event_ndims": (1, 1)} | fields))


# ------------------------------------------------------------------------------- a layer that keeps every promise


def cubic(z: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return z + w.square() * z**3 - x


def cardano(x: Tensor, w: Tensor) -> Tensor:
    p, q = 1 / w.square(), x / w.square()
    root = (q.square() / 4 + p**3 / 27).sqrt()
    return (root + q / 2) ** (1 / 3) - (root - q / 2) ** (1 / 3)


def solved(layer, **options):
    def fn(x: Tensor, w: Tensor):
        like = x if x.is_floating_point() else w
        start = like.new_zeros((*torch.broadcast_shapes(x.shape[:-1], w.shape[:-1]), 2))
        return layer(cubic, start, (x, w), arg_ndims=(1, 1), **options)

    return fn


class Cubic(nn.Module):
    """The layer with its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(W.clone())

    def forward(self, x: Tensor) -> Tensor:
        return solved(root_find)(x, self.w)

    def extra_repr(self) -> str:
        return f"{len(self.w)}"


def captured(x: Tensor) -> Tensor:
    return root_find(lambda z: z + z**3 - x, torch.zeros_like(x).detach())


GOOD = toy(
    "good",
    solved(root_find),
    oracle=cardano,
    invariants=(cubic,),
    names=("args[0]", "args[1]"),
    representative=True,
    unrolled=cardano,
    tolerant=solved(root_find, on_failure="nan"),
    solution=solved(root_find_ex),
    starved=solved(root_find, solver=Newton(max_steps=1)),
    starved_solution=solved(root_find_ex, solver=Newton(max_steps=1)),
    captured=captured,
    hostile=(Hostile("zero", (0 * X, W)), Hostile("not a number", (math.nan * X, W), ValueError, "finite")),
    wrong=(Wrong("starts at a word", (X, W), "init: expected a tensor", lambda x, w: root_find(cubic, "0", (x, w))),),
    make_module=Cubic,
    module_inputs=(X,),
)


# ------------------------------------------------------------------------------------------------- ways to be wrong


def wrappers(t: Tensor) -> tuple[int, int]:
    """How many vmap and how many derivative levels of torch.func follow a tensor."""
    functorch, mapped, tracked = torch._C._functorch, 0, 0
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            mapped += 1
        elif functorch.is_gradtrackingtensor(t):
            tracked += 1
        t = functorch.get_unwrapped(t)
    return mapped, tracked


def wrong_where(condition):
    """10 % off where a condition on the torch.func levels of both inputs holds."""

    def fn(x: Tensor, w: Tensor) -> Tensor:
        (xm, xt), (wm, wt) = wrappers(x), wrappers(w)
        return product(x, w) * (1.1 if condition(xm, wm, max(xt, wt)) else 1.0)

    return fn


def scaled_slope(x: Tensor, w: Tensor) -> Tensor:
    """The right value; every derivative 1 % off."""
    value = product(x, w)
    return value + 0.01 * (value - value.detach())


def detached_second(x: Tensor, w: Tensor) -> Tensor:
    """The right value and first derivative; the second is lost, as in a backward that detaches."""
    a, b = x.detach(), w.detach()
    slope_x = torch.cos(a) * b + 0.2 * a * b.square()
    slope_w = torch.sin(a) + 0.2 * a.square() * b
    return product(a, b) + slope_x * (x - a) + slope_w * (w - b)


class Naive(torch.autograd.Function):
    """What the tutorial says; torch loses the derivative of `jvp` along an outer forward level without a word."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w):
        return product(x, w)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def slopes(ctx):
        x, w = ctx.saved_tensors
        return torch.cos(x) * w + 0.2 * x * w.square(), torch.sin(x) + 0.2 * x.square() * w

    @staticmethod
    def backward(ctx, g):
        slope_x, slope_w = Naive.slopes(ctx)
        w = ctx.saved_tensors[1]
        return g * slope_x, (g * slope_w).sum_to_size(w.shape)

    @staticmethod
    def jvp(ctx, tx, tw):
        slope_x, slope_w = Naive.slopes(ctx)
        return (0 if tx is None else slope_x * tx) + (0 if tw is None else slope_w * tw)


class WrongSign(Naive):
    """Forward mode with the wrong sign."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tx, tw):
        return -Naive.jvp(ctx, tx, tw)


class Mixing(Naive):
    """A vmap rule that hands every element its neighbour's result."""

    generate_vmap_rule = False

    @staticmethod
    def vmap(info, in_dims, x, w):
        moved = [t.unsqueeze(0) if d is None else t.movedim(d, 0) for t, d in zip((x, w), in_dims, strict=True)]
        return product(*moved).expand(info.batch_size, *x.shape[-1:]).roll(1, 0), 0


def averaged(x: Tensor, w: Tensor) -> Tensor:
    """The gradient of the shared parameter averaged over the batch instead of summed."""
    count = math.prod(x.shape[:-1])
    if w.ndim == 1 and count > 1:
        w = w / count + (w * (1 - 1 / count)).detach()
    return product(x, w)


def lost_at_third(x: Tensor, w: Tensor) -> Tensor:
    """Nobody can follow a tangent through detach: jvp cannot be differentiated in its tangent."""
    return WrongTangent.apply(x, w)


class WrongTangent(Naive):
    """Forward mode that detaches its tangent."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, tx, tw):
        return Naive.jvp(ctx, None if tx is None else tx.detach(), None if tw is None else tw.detach())


def guarded(x: Tensor, w: Tensor) -> Tensor:
    """Autocast is off in the forward pass and forgotten in the backward pass."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.unsqueeze(-2) @ torch.diag_embed(w)).squeeze(-2)


def coupled_stopping(x: Tensor, w: Tensor) -> Tensor:
    """Iterates all elements until the last one has converged: a bad one keeps the others going."""
    z = 0.5 * x
    for _ in range(300):
        new = z - 0.2 * cubic(z, x, w)
        done = bool(((new - z).abs() < 1e-10).all())
        z = new
        if done:
            break
    return z


def leaking(x: Tensor, w: Tensor) -> Tensor:
    """NaN for the bad element alone, in the value; its zero cotangent times NaN reaches what is shared."""
    bad = torch.isnan(x).any(-1, keepdim=True)
    return torch.where(bad, math.nan, cardano(x, w))


def unnamed(x: Tensor, w: Tensor) -> Tensor:
    """An error that does not say which argument is at fault."""
    try:
        return GOOD.fn(x, w)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        raise SolveError("the solve failed", None) from error


def strided(x: Tensor, w: Tensor) -> Tensor:
    """Reads memory as if it were contiguous."""
    if x.ndim == 2 and x.stride(-1) == 2 and not torch._C._functorch.is_functorch_wrapped_tensor(x):
        return product(x.as_strided(x.shape, (x.shape[-1], 1)), w)
    return product(x, w)


def only_two_dimensions(x: Tensor, w: Tensor) -> Tensor:
    return product(x.flatten(0, -2) if x.ndim > 2 else x, w)


def squeezing(x: Tensor, w: Tensor) -> Tensor:
    value = product(x, w)
    return value.squeeze(0) if value.ndim > 1 else value


def reshaping(x: Tensor, w: Tensor) -> Tensor:
    value = product(x, w)
    return value.reshape(*value.shape[:-1], -1)


def no_cast_back(x: Tensor, w: Tensor) -> Tensor:
    return product(x.float(), w.float()) if x.dtype == torch.bfloat16 else product(x, w)


def promoting(x: Tensor, w: Tensor) -> Tensor:
    return product(x, w) * torch.ones(2, dtype=torch.float64, device=x.device)


def autocasting(x: Tensor, w: Tensor) -> Tensor:
    return (x.unsqueeze(-2) @ torch.diag_embed(w)).squeeze(-2)


def stray_device(x: Tensor, w: Tensor) -> Tensor:
    return product(x, w) * torch.ones(2, dtype=x.dtype)


def stray_dtype(x: Tensor, w: Tensor) -> Tensor:
    return product(x, w) * torch.tensor(0.1, device=x.device)


def by_position(x: Tensor, w: Tensor) -> Tensor:
    """An initial guess that depends on the place in the batch, and a solver that does not forget it."""
    if x.ndim < 2:
        return product(x, w)
    ramp = torch.arange(x.shape[-2], dtype=x.dtype, device=x.device)
    return product(x + 1e-10 * ramp.unsqueeze(-1), w)


def kinked(x: Tensor, w: Tensor) -> Tensor:
    return x.square().sqrt() * w


def hidden_status(x: Tensor, w: Tensor) -> Solution:
    starved = GOOD.starved_solution(x, w)
    return Solution(starved.value, torch.zeros_like(starved.status), starved.steps, starved.residual)


class Unpicklable(Cubic):
    def __init__(self) -> None:
        super().__init__()
        self.activation = lambda x: x


class Sharing(Cubic):
    def __deepcopy__(self, memo):
        return copy.copy(self)


class Forgetful(Cubic):
    """A parameter that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float64, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.detach()


class Stuck(Cubic):
    """A constant that is no buffer, so ``.to`` does not move it."""

    def __init__(self) -> None:
        super().__init__()
        self.constant = torch.ones(2, dtype=torch.float64, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.constant


_ONE_PERCENT = {"gradcheck": "the toy is made to pass the cheap check only"}

# clause -> a layer that breaks it and nothing else
BROKEN: dict[str, LayerCase] = {
    "oracle": toy("value off", lambda x, w: 1.001 * product(x, w), oracle=product),
    "invariants": toy("not optimal", product, invariants=(lambda z, x, w: z - 1.001 * product(x, w),)),
    "gradcheck": toy("scaled slope", scaled_slope),
    "gradcheck_full": toy("scaled slope", scaled_slope, representative=True, exempt=_ONE_PERCENT),
    "gradgradcheck": toy("detached second derivative", detached_second),
    "implicit_equals_unrolled": toy("biased adjoint", scaled_slope, unrolled=product, exempt=_ONE_PERCENT),
    "jacfwd_equals_jacrev": toy("wrong sign in jvp", lambda x, w: WrongSign.apply(x, w)),
    "hessians_agree": toy("tutorial Function", lambda x, w: Naive.apply(x, w)),
    "shared_gradient_is_a_sum": toy("averaged shared gradient", averaged),
    "vmap_equals_loop": toy("vmap alone", wrong_where(lambda x, w, t: (x, w, t) == (1, 0, 0))),
    "vmap_over_shared": toy("vmap over shared", wrong_where(lambda x, w, t: (x, w, t) == (0, 1, 0))),
    "nested_vmap": toy("two vmaps", wrong_where(lambda x, w, t: (x + w, t) == (2, 0))),
    "per_sample_gradients": toy("vmap of grad", wrong_where(lambda x, w, t: (x, w, t) == (1, 0, 1))),
    "vmapped_hessian": toy("vmap of hessian", wrong_where(lambda x, w, t: (x, w, t) == (1, 0, 2))),
    "products_agree": toy("detached tangent", lost_at_third),
    "compiled": toy(
        "another branch under compile",
        lambda x, w: product(x, w) * (1.1 if torch.compiler.is_compiling() else 1.0),
        representative=True,
    ),
    "empty_batch": toy("reshape to -1", reshaping),
    "one_element_batch": toy("squeeze", squeezing),
    "several_batch_dimensions": toy("flattened batch", only_two_dimensions),
    "not_contiguous": toy("memory as if contiguous", strided),
    "float32_is_kept": toy("promotion to float64", promoting, half=False),
    "half_is_lifted": toy("not cast back", no_cast_back),
    "autocast_of_forward": toy("matmul under autocast", autocasting),
    "autocast_of_backward": toy("backward under autocast", guarded),
    "no_stray_device": toy("stray factory call", stray_device),
    "no_stray_dtype": toy("stray constant", stray_dtype),
    "wrong_input_is_refused": toy(
        "takes anything", product, wrong=(Wrong("one number", (X[:, :1], W), "x: expected"),)
    ),
    "wrong_dtype_is_refused": toy("takes integers", product, names=("x", "w")),
    "nan_and_inf_are_refused": replace(GOOD, name="unnamed argument", fn=unnamed, hostile=(), representative=False),
    "failure_is_raised": toy("silent NaN", GOOD.tolerant, tolerant=GOOD.tolerant),
    "tolerance_changes_nothing": toy(
        "detached second derivative under nan", product, tolerant=lambda x, w: detached_second(x, w)
    ),
    "one_bad_element": toy("batch-coupled stopping", GOOD.fn, tolerant=coupled_stopping),
    "duplicates_stay_equal": toy("start by position", by_position),
    "hostile_input": toy("NaN slope at zero", kinked, hostile=(Hostile("zero", (0 * X, W)),)),
    "starved_solver_warns": toy("silent non-convergence", GOOD.fn, starved=coupled_stopping),
    "status_is_reported": toy("hidden status", GOOD.fn, solution=GOOD.solution, starved_solution=hidden_status),
    "solves_are_traced": toy("closed form without a record", cardano, solution=GOOD.solution),
    "captured_tensor_is_refused": toy("captures silently", product, captured=lambda p: product(p.detach(), p.detach())),
    "module_survives": toy("shares its copy", product, make_module=Sharing, module_inputs=(X,)),
    "module_learns": toy("unused parameter", product, make_module=Forgetful, module_inputs=(X,)),
    "module_moves": toy("constant that stays", product, make_module=Stuck, module_inputs=(X,)),
}

# what else is wrong when this is: a wrong rule is seen from several sides
ALSO: dict[str, set[str]] = {
    "jacfwd_equals_jacrev": {"gradcheck", "hessians_agree", "vmapped_hessian", "products_agree"},
    "shared_gradient_is_a_sum": {"gradcheck", "gradgradcheck", "several_batch_dimensions"},
    "products_agree": {"hessians_agree"},
    # a plain function knows no failure at all
    "tolerance_changes_nothing": {"failure_is_raised", "one_bad_element"},
    "one_bad_element": {"tolerance_changes_nothing"},
    "autocast_of_forward": {"autocast_of_backward"},
}

MORE: list[tuple[LayerCase, set[str]]] = [
    (
        toy("vmap that mixes elements", lambda x, w: Mixing.apply(x, w)),
        # a Function by the tutorial, so its second forward derivative is lost too
        {
            *("vmap_equals_loop", "vmap_over_shared", "nested_vmap"),
            *("per_sample_gradients", "vmapped_hessian", "hessians_agree"),
        },
    ),
    (toy("NaN leaks into shared gradients", GOOD.fn, tolerant=leaking), {"one_bad_element"}),
    (toy("cannot be pickled", product, make_module=Unpicklable, module_inputs=(X,)), {"module_survives"}),
]

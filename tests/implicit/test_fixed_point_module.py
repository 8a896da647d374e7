"""FixedPoint against functions of explicit parameters, in every mode a module can be in."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

import difflayers
from difflayers import SolveError, SolveWarning
from difflayers.implicit import Anderson, FixedPoint, Implicit, Newton, OneStep, Picard, Unrolled, fixed_point
from difflayers.linalg import GMRES
from difflayers.testing import saved_bytes

F64 = torch.float64
N = 4


class Cell(nn.Module):
    """tanh(W z + x), contracting."""

    def __init__(self, n=N, extra=None, scale=0.4):
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.extra = nn.Identity() if extra is None else extra
        with torch.no_grad():
            self.linear.weight.mul_(scale)

    def forward(self, z, x):
        return torch.tanh(self.extra(self.linear(z)) + x)


def make(n=N, extra=None, scale=0.4, **options):
    """A layer in float64."""
    return FixedPoint(Cell(n, extra, scale), **options).double()


def close(got, want, tol=1e-8):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def explicit(W, b, x):
    """The same layer by `fixed_point` on explicit parameters."""
    return fixed_point(lambda z, W, b, x: torch.tanh(z @ W.mT + b + x), torch.zeros_like(x), (W, b, x))


# ------------------------------------------------------------------------------------------------- value and gradient


def test_value_solves_the_equation():
    layer, x = make(), torch.randn(3, N, dtype=F64)
    z = layer(x)
    close(z, layer.module(z, x))


def test_gradients_equal_the_function_of_explicit_parameters():
    layer, x = make(), torch.randn(3, N, dtype=F64, requires_grad=True)
    W, b = layer.module.linear.weight, layer.module.linear.bias
    g = torch.randn(3, N, dtype=F64)
    got = torch.autograd.grad(layer(x), (W, b, x), g)
    want = torch.autograd.grad(explicit(W, b, x), (W, b, x), g)
    for a, e in zip(got, want, strict=True):
        close(a, e)


@pytest.mark.parametrize("adjoint", [Implicit(), Implicit(GMRES()), Unrolled(60)], ids=str)
@pytest.mark.parametrize("solver", [Anderson(), Picard(), Newton()], ids=lambda s: type(s).__name__)
def test_gradcheck(solver, adjoint):
    if isinstance(solver, Newton) and isinstance(adjoint, Unrolled):
        pytest.skip("sixty unrolled Newton steps are slow and add nothing")
    layer, x = make(2, solver=solver, adjoint=adjoint), torch.randn(2, 2, dtype=F64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def solve(x, *parameters):
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x, *(p.detach().requires_grad_() for p in parameters))
    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, inputs, fast_mode=True)


def test_second_derivatives_through_parameters_that_require_grad():
    layer, x = make(3), torch.randn(2, 3, dtype=F64, requires_grad=True)
    (g,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    W, b = (p.detach().clone().requires_grad_() for p in (layer.module.linear.weight, layer.module.linear.bias))
    (h,) = torch.autograd.grad(explicit(W, b, x).square().sum(), x, create_graph=True)
    want = torch.autograd.grad(h.square().sum(), (W, b))
    close(layer.module.linear.weight.grad, want[0])
    close(layer.module.linear.bias.grad, want[1])


def test_torch_func():
    layer, x = make(2), torch.randn(3, 2, dtype=F64)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        for k, g in grad(loss)(parameters, x[i]).items():
            close(per_sample[k][i], g)
    close(jacrev(lambda x: layer(x))(x), jacfwd(lambda x: layer(x))(x))
    hessians = vmap(lambda x: hessian(lambda x: layer(x).square().sum())(x))(x)
    close(hessians[1], hessian(lambda x: layer(x).square().sum())(x[1]))
    ensemble = {k: torch.stack([p, 0.5 * p]) for k, p in parameters.items()}
    both = vmap(lambda p: functional_call(layer, p, (x,)))(ensemble)
    close(both[1], functional_call(layer, {k: 0.5 * p for k, p in parameters.items()}, (x,)))


# ------------------------------------------------------------------------------------------------------------- inputs


def test_convolution_with_event_ndim():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.GroupNorm(1, 2)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.norm(self.conv(z)) + x)

    layer = FixedPoint(Conv(), event_ndim=3).double()
    x = torch.randn(2, 2, 4, 3, dtype=F64, requires_grad=True)
    z = layer(x)
    close(z, layer.module(z, x))
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_pytree_state_several_inputs_and_none():
    class Pair(nn.Module):
        def forward(self, z, x, options, mask=None):
            a, b = z
            assert mask is None
            return torch.tanh(0.3 * b + x), options["scale"] * a + options["shift"]

    layer = FixedPoint(Pair(), init=lambda x, *_: (torch.zeros_like(x), torch.zeros_like(x)))
    x = torch.randn(3, 2, dtype=F64, requires_grad=True)
    shift = torch.randn(2, dtype=F64, requires_grad=True)
    a, b = layer(x, {"scale": 0.5, "shift": shift}, None)
    close(a, torch.tanh(0.3 * b + x))
    close(b, 0.5 * a + shift)
    b.sum().backward()
    assert x.grad.abs().min() > 0 and shift.grad.abs().min() > 0


def test_integer_inputs_and_buffers_are_constants():
    class Gather(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("order", torch.tensor([2, 0, 1]))
            self.weight = nn.Parameter(torch.tensor([0.1, 0.2, 0.3], dtype=F64))

        def forward(self, z, x, index):
            return self.weight * torch.tanh(z[..., self.order]) + x[..., index]

    layer = FixedPoint(Gather())
    x = torch.randn(2, 3, dtype=F64, requires_grad=True)
    for index in (torch.tensor([0, 1, 2]), torch.tensor([1, 1, 0])):
        z = layer(x, index)
        close(z, layer.module(z, x, index))
    z.sum().backward()
    assert x.grad[:, 2].abs().max() == 0  # entry 2 is not read by the second index
    assert layer.module.weight.grad.abs().min() > 0


def test_integer_inputs_made_inside_a_transform():
    class Pick(nn.Module):
        def forward(self, z, x, index):
            return 0.5 * torch.tanh(z) + x[..., index]

    layer, x, index = FixedPoint(Pick()), torch.randn(2, 3, dtype=F64), torch.tensor([0, 1, 2])

    def loss(x):
        return layer(x, index.flip(0) + 0).sum()

    close(grad(loss)(x).flip(-1), grad(lambda x: layer(x.flip(-1), index).sum())(x.flip(-1)))
    with pytest.raises(ValueError, match="vmap does not batch"):
        vmap(layer)(x, torch.stack([index, index]))


def test_other_default_device_and_dtype():
    layer, x = frozen(spectral_normalization=0.9), torch.randn(2, 3, dtype=F64, requires_grad=True)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            z = layer(x)
            (z.sum() + layer.jacobian_penalty(z, x).sum()).backward()
    finally:
        torch.set_default_dtype(before)
    assert z.dtype == x.grad.dtype == F64 and z.device.type == "cpu"


def test_init_is_used_and_optional():
    layer, x = make(), torch.randn(3, N, dtype=F64)
    with difflayers.trace() as solves:
        z = layer(x)
        again = layer(x, init=z)
    close(z, again)
    assert solves[1].steps.max() <= 2 < solves[0].steps.max()
    wide = FixedPoint(nn.Sequential(nn.Identity()), init=lambda: torch.zeros(3))
    assert wide().shape == (3,)
    with pytest.raises(ValueError, match=r"inputs\[0\].*int64"):
        layer(torch.zeros(3, N, dtype=torch.int64))
    with pytest.raises(ValueError, match="module output: expected shape"):
        FixedPoint(nn.Linear(3, 2), init=lambda: torch.zeros(3))()
    with pytest.raises(ValueError, match=r"^inputs\[0\]: expected finite numbers, got 1 NaN"):
        layer(torch.tensor([math.nan] + [0.0] * (N - 1), dtype=F64))
    with pytest.raises(ValueError, match=r"^parameters\['linear\.bias'\]: expected dtype torch.float32 as of init"):
        layer(torch.zeros(3, N))


def test_default_dtype_and_half():
    layer = FixedPoint(Cell())
    x = torch.randn(3, N)
    assert layer(x).dtype == torch.float32
    half = copy.deepcopy(layer).bfloat16()
    z = half(x.bfloat16().requires_grad_())
    assert z.dtype == torch.bfloat16
    z.sum().backward()
    assert half.module.linear.weight.grad.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        head = nn.Linear(N, N)
        z = layer(head(x))
        assert z.dtype == torch.bfloat16
    z.float().sum().backward()
    assert head.weight.grad.abs().max() > 0 and layer.module.linear.weight.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------ modes, dropout


def test_batch_norm_is_refused_in_training_and_fine_in_evaluation():
    layer, x = make(extra=nn.BatchNorm1d(N)), torch.randn(5, N, dtype=F64)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"module\.extra: expected evaluation mode, got BatchNorm1d"):
        layer(x)
    layer.eval()
    layer.module.extra.running_var.fill_(2.0)
    before["module.extra.running_var"].fill_(2.0)
    z = layer(x.requires_grad_())
    close(z, layer.module(z, x))
    layer.train()  # the backward pass belongs to the modes of its forward pass
    z.sum().backward()
    after = layer.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    gradient = x.grad.clone()
    x.grad = None
    layer.eval()(x).sum().backward()
    close(gradient, x.grad)


def test_changed_buffers_and_random_numbers_are_refused():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(N, dtype=F64))

        def forward(self, x):
            self.mean.add_(1.0)
            return x

    class Noise(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5)

    x = torch.randn(2, N, dtype=F64)
    counting = make(extra=Counter())
    with pytest.raises(ValueError, match=r"module\.extra: .*changes `extra.mean`"):
        counting(x)
    assert counting.module.extra.mean.max() == 0
    with pytest.raises(ValueError, match="random numbers"):
        make(extra=Noise())(x)
    spectral = make()
    nn.utils.parametrizations.spectral_norm(spectral.module.linear)
    with pytest.raises(ValueError, match="spectral_normalization="):
        spectral(x)
    spectral.eval()(x)


@pytest.mark.parametrize(
    "module", [nn.AlphaDropout(0.5), nn.MultiheadAttention(4, 1, dropout=0.1)], ids=lambda m: type(m).__name__
)
def test_dropout_that_cannot_be_frozen_is_refused(module):
    with pytest.raises(ValueError, match=r"module\.extra"):
        make(extra=module, dropout="frozen")(torch.randn(2, N, dtype=F64))


def test_dropout_is_refused_unless_frozen():
    layer, x = make(extra=nn.Dropout(0.5)), torch.randn(5, N, dtype=F64)
    with pytest.raises(ValueError, match=r'module\.extra: .*dropout="frozen"'):
        layer(x)
    layer.eval()(x)
    with pytest.raises(ValueError, match="dropout"):
        make(dropout="always")


def frozen(p=0.5, **options):
    return make(3, extra=nn.Dropout(p), dropout="frozen", **options)


def test_frozen_dropout_is_one_mask_a_call():
    layer, x = frozen(), torch.randn(6, 3, dtype=F64)
    torch.manual_seed(1)
    z = layer(x)
    torch.manual_seed(1)
    mask = nn.functional.dropout(torch.ones(6, 3, dtype=F64), 0.5)
    assert 0 < (mask == 0).sum() < mask.numel()
    close(z, torch.tanh(mask * layer.module.linear(z) + x))
    assert not torch.equal(layer(x), z)
    assert "forward" not in layer.module.extra.__dict__


def test_frozen_dropout_derivatives():
    layer, x = frozen(), torch.randn(2, 3, dtype=F64, requires_grad=True)

    def solve(x, W):
        torch.manual_seed(3)
        return functional_call(layer, {"module.linear.weight": W}, (x,))

    inputs = (x, layer.module.linear.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(solve, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(solve, inputs)


def test_frozen_dropout_under_vmap():
    layer, x = frozen(), torch.randn(3, 4, 3, dtype=F64)
    z = vmap(layer, randomness="different")(x)
    mask = (z.atanh() - x) / layer.module.linear(z)
    close(mask * (mask - 2), torch.zeros_like(mask), 1e-6)  # only 0 and 2
    assert not torch.equal(mask[0].round(), mask[1].round())
    shared = vmap(layer, randomness="same")(x)
    mask = (shared.atanh() - x) / layer.module.linear(shared)
    assert torch.equal(mask[0].round(), mask[1].round())


def test_a_dropout_module_called_twice_gets_two_masks():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, z, x):
            return torch.tanh(0.3 * self.drop(z) + self.drop(x))

    layer, x = FixedPoint(Twice(), dropout="frozen"), torch.randn(8, 8, dtype=F64)
    torch.manual_seed(2)
    z = layer(x)
    torch.manual_seed(2)
    one, two = (nn.functional.dropout(torch.ones(8, 8, dtype=F64), 0.5) for _ in range(2))
    close(z, torch.tanh(0.3 * one * z + two * x))


# --------------------------------------------------------------------------------------------------- regularisation


def test_spectral_normalization_bounds_the_weight():
    layer, x = make(5, scale=10.0, spectral_normalization=0.8), torch.randn(3, 5, dtype=F64)
    z = layer(x)
    W = layer.module.linear.weight
    bounded = W * 0.8 / torch.linalg.svdvals(W)[0]
    close(z, torch.tanh(z @ bounded.mT + layer.module.linear.bias + x))
    assert list(layer.state_dict()) == list(make(5).state_dict())
    small = make(5, scale=0.1, spectral_normalization=0.8)
    close(small(x), FixedPoint(small.module)(x))


def test_spectral_normalization_derivatives():
    layer = make(3, scale=3.0, spectral_normalization=0.7)
    W = layer.module.linear.weight.detach().clone().requires_grad_()
    x = torch.randn(3, dtype=F64, requires_grad=True)

    def solve(W, x):
        return functional_call(layer, {"module.linear.weight": W}, (x,))

    assert torch.autograd.gradcheck(solve, (W, x))
    assert torch.autograd.gradgradcheck(solve, (W, x))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(2, 2, 3, padding=1, dilation=1, bias=False),
        nn.ConvTranspose2d(2, 2, 3, padding=1, padding_mode="zeros"),
    ],
    ids=lambda m: type(m).__name__,
)
def test_spectral_normalization_bounds_convolutions(conv):
    from difflayers.implicit._fixed_point_module import _bounded

    conv = conv.double()
    with torch.no_grad():
        conv.weight.mul_(5)
    shape = (conv.in_channels, *[5] * (conv.weight.ndim - 2))
    weight = _bounded(conv, dict(conv.named_parameters()), 0.9)["weight"]
    linear = jacrev(lambda z: functional_call(conv, {"weight": weight}, (z[None],))[0])(torch.zeros(shape, dtype=F64))
    n = torch.Size(shape).numel()
    norm = torch.linalg.matrix_norm(linear.reshape(-1, n), 2)
    assert 0.3 < norm <= 0.9


def test_jacobian_penalty():
    layer, x = make(3), torch.randn(2, 3, dtype=F64, requires_grad=True)
    z = layer(x)
    J = torch.stack([jacrev(layer.module)(zi, xi) for zi, xi in zip(z, x, strict=True)])
    exact = J.square().sum((-1, -2)) / 3
    estimate = layer.jacobian_penalty(z, x, samples=4000)
    assert estimate.shape == (2,)
    torch.testing.assert_close(estimate, exact, rtol=0.1, atol=0)

    def penalty(x):
        generator = torch.Generator().manual_seed(0)
        return layer.jacobian_penalty(layer(x), x, samples=2, generator=generator)

    assert torch.autograd.gradcheck(penalty, (x,), fast_mode=True)
    estimate.mean().backward()
    assert layer.module.linear.weight.grad.abs().max() > 0


def test_training_with_the_penalty_lowers_it():
    layer, x = make(4, scale=1.5, spectral_normalization=0.95), torch.randn(16, 4, dtype=F64)
    optimiser = torch.optim.Adam(layer.parameters(), 0.05)
    values = []
    for _ in range(20):
        optimiser.zero_grad()
        penalty = layer.jacobian_penalty(layer(x), x).mean()
        penalty.backward()
        optimiser.step()
        values.append(penalty.item())
    assert values[-1] < 0.5 * values[0]


# ------------------------------------------------------------------------------------------------- being a module


def test_state_dict_deepcopy_pickle():
    layer, x = make(), torch.randn(2, N, dtype=F64)
    z = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other = make(solver=Picard(max_steps=2000))
    other.load_state_dict(torch.load(buffer))
    close(other(x), z)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        close(twin(x), z, 0)
        with torch.no_grad():
            twin.module.linear.weight.zero_()
        assert not torch.equal(twin(x), z)
    close(layer(x), z, 0)
    assert "Anderson" in repr(layer) and "event_ndim=1" in repr(layer)


def test_no_grad_eval_and_requires_grad_false():
    layer, x = make(), torch.randn(2, N, dtype=F64)
    with torch.no_grad():
        assert not layer(x).requires_grad
    assert layer.eval()(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad


def test_shared_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3, dtype=F64)
            self.b = self.a  # the same module
            self.c = nn.Linear(3, 3, dtype=F64)
            self.c.weight = self.a.weight  # the same parameter in another module
            with torch.no_grad():
                self.a.weight.mul_(0.5)

        def forward(self, z, x):
            return torch.tanh(self.c(self.b(torch.tanh(self.a(z)))) + x)

    layer, x = FixedPoint(Tied()), torch.randn(2, 3, dtype=F64)
    W = layer.module.a.weight
    layer(x).square().sum().backward()
    assert layer.module.a.weight is W
    numeric, step = torch.zeros_like(W), 1e-6
    with torch.no_grad():
        for i in range(3):
            for sign in (1, -1):
                W[i, 0] += sign * step
                numeric[i, 0] += sign * layer(x).square().sum() / (2 * step)
                W[i, 0] -= sign * step
    torch.testing.assert_close(W.grad[:, 0], numeric[:, 0], rtol=1e-5, atol=1e-7)


def test_failure_policy_and_ex():
    class Grow(nn.Module):
        def forward(self, z, x):
            return x * z + 1

    x = torch.tensor([[0.5], [3.0]], dtype=F64, requires_grad=True)
    layer = FixedPoint(Grow(), solver=Picard(max_steps=2000))
    with pytest.raises(SolveError, match="FixedPoint"):
        layer(x)
    solution = layer.forward_ex(x)
    assert solution.converged.tolist() == [True, False]
    layer.on_failure = "nan"
    z = layer(x)
    assert z.isnan().tolist() == [[False], [True]]
    z[0].sum().backward()
    close(x.grad, torch.tensor([[4.0], [0.0]], dtype=F64))
    with pytest.warns(SolveWarning, match="FixedPoint"):
        make(scale=0.9, solver=Picard(max_steps=1))(torch.randn(2, N, dtype=F64))


def test_batch_coupling_is_refused_and_checked_once():
    class Mean(nn.Module):
        def forward(self, z, x):
            return 0.5 * torch.tanh(z + z.mean(0)) + x

    with pytest.raises(ValueError, match="do not see each other"):
        FixedPoint(Mean())(torch.randn(3, 2, dtype=F64))
    FixedPoint(Mean(), event_ndim=2)(torch.randn(3, 2, dtype=F64))
    layer, x, calls = make(), torch.randn(3, N, dtype=F64), []
    layer.module.register_forward_hook(lambda *_: calls.append(1))
    layer(x)
    first = len(calls)
    layer(x)
    assert len(calls) - first < first


def test_one_step_adjoint_is_one_evaluation():
    layer, x = make(adjoint=OneStep()), torch.randn(2, N, dtype=F64, requires_grad=True)
    z = layer(x)
    got = torch.autograd.grad(z.sum(), x)[0]
    want = torch.autograd.grad(layer.module(z.detach(), x).sum(), x)[0]
    close(got, want)


@pytest.mark.parametrize("bound", [0, -1.0, float("inf"), True])
def test_bad_options_are_refused(bound):
    with pytest.raises(ValueError, match="spectral_normalization"):
        make(spectral_normalization=bound)
    with pytest.raises(ValueError, match=r"module: expected an nn\.Module"):
        FixedPoint(torch.tanh)


def test_backward_memory_does_not_grow_with_the_steps():
    def saved(steps):
        layer = make(solver=Picard(max_steps=steps, check_every=None), on_failure="ignore")
        return saved_bytes(lambda: layer(torch.randn(3, N, dtype=F64)))[1]

    assert saved(10) == saved(300) > 0

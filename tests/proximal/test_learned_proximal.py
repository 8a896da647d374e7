"""Learned proximal networks: convex from the first forward pass on, exact priors and derivatives, training."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

from difflayers import SolveError, Status
from difflayers.proximal import (
    InputConvexNetwork,
    LearnedProximal,
    MatchingSchedule,
    MatchingStage,
    prox_l1,
    proximal_matching_loss,
    train_proximal,
)
from tests.modes import inference

F64 = torch.float64
SHAPES = [3, (2, 5, 6)]


def network(shape=3, **options) -> LearnedProximal:
    options = {"hidden": 6, "layers": 2} | options
    return LearnedProximal(InputConvexNetwork(shape, **options)).double()


def sample(shape, count: int = 4) -> torch.Tensor:
    return torch.randn(count, *((shape,) if isinstance(shape, int) else shape), dtype=F64)


class Quadratic(nn.Module):
    """``c/2 ||y||^2``."""

    def __init__(self, c: float) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))

    def forward(self, y):
        return self.c / 2 * y.square().sum(-1)


class Softplus(nn.Module):
    """``sum softplus(b y) / b``: its gradient is the logistic function."""

    def __init__(self, b: float) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.tensor(b, dtype=F64))

    def forward(self, y):
        return (torch.logaddexp(self.b * y, torch.zeros_like(y)) / self.b).sum(-1)


# ----------------------------------------------------------------------------------------------------------- potential


def off_convexity(potential: nn.Module, shape) -> float:
    """Largest amount by which the potential at a midpoint lies above the chord, relative to its size there."""
    a, b = 5 * sample(shape, 200), 5 * sample(shape, 200)
    with torch.no_grad():
        at, chord = potential((a + b) / 2), (potential(a) + potential(b)) / 2
    return float(((at - chord) / (1 + chord.abs())).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_potential_is_convex_at_once_and_after_any_step(shape):
    potential = network(shape, strong_convexity=0.0).potential
    optimiser = torch.optim.SGD(potential.parameters(), lr=30.0)
    for _ in range(3):
        assert off_convexity(potential, shape) <= 1e-12
        for name, layer in potential.named_modules():
            if hasattr(layer, "free"):
                assert bool((layer.weight >= 0).all()), name
        (-potential(sample(shape)).square().mean()).backward()  # a step that wants to make it concave
        optimiser.step()
        optimiser.zero_grad()


def test_convexity_test_can_fail():
    potential = network().potential
    with torch.no_grad():
        potential.readout.__dict__["forward"] = lambda z: -z.sum(-1, keepdim=True)
    assert off_convexity(potential, 3) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_hessian_is_positive_and_strong_convexity_is_its_smallest_eigenvalue(shape):
    mu, y = 0.3, sample(shape, 1)[0]
    weak, strong = network(shape, strong_convexity=0.0), network(shape, strong_convexity=mu)
    strong.load_state_dict(weak.state_dict())
    n = y.numel()
    at = [hessian(m.potential)(y).reshape(n, n).detach() for m in (weak, strong)]
    torch.testing.assert_close(at[1] - at[0], mu * torch.eye(n, dtype=F64))
    assert float(torch.linalg.eigvalsh(at[0]).min()) >= -1e-12


def test_images_of_any_size_and_any_batch():
    prox = network((2, 5, 6))
    for height, width in [(5, 6), (1, 1), (7, 3), (16, 9)]:
        x = torch.randn(2, 3, 2, height, width, dtype=F64)
        z = prox(x)
        assert z.shape == x.shape
        torch.testing.assert_close(z[1, 2], prox(x[1, 2]))
        assert prox.potential(x).shape == (2, 3)
    assert prox(sample((2, 5, 6), 0)).shape == (0, 2, 5, 6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shape": 0}, "shape: expected at least 1, got 0"),
        ({"shape": (3, 4)}, r"shape: expected an integer or \(channels, height, width\), got \(3, 4\)"),
        ({"shape": 2, "hidden": 0}, "hidden: expected at least 1"),
        ({"shape": 2, "layers": -1}, "layers: expected at least 0"),
        ({"shape": 2, "beta": 0.0}, "beta: expected a positive number"),
        ({"shape": 2, "strong_convexity": -1.0}, "strong_convexity: expected a number of at least 0"),
    ],
)
def test_impossible_networks_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        InputConvexNetwork(**options)


def test_impossible_inputs_are_refused():
    prox = network()
    with pytest.raises(ValueError, match=r"x: expected dtype torch\.float64 as of potential"):
        prox(torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"y: expected shape \(3,\) in its last dimension"):
        prox.prior(sample(2))
    with pytest.raises(ValueError, match="x: expected a floating-point tensor"):
        prox(torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="of channels"):
        network((2, 5, 6))(sample((3, 5, 6)))
    with pytest.raises(ValueError, match="potential output: expected shape"):
        LearnedProximal(nn.Linear(3, 1).double())(sample(3))
    with pytest.raises(ValueError, match=r"potential: expected an nn\.Module"):
        LearnedProximal(torch.sum)


# ---------------------------------------------------------------------------------------------------------------- prox


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_the_gradient_and_keeps_its_hands_off_the_input(shape):
    prox, x = network(shape), sample(shape)
    z = prox(x)
    assert z.requires_grad and not x.requires_grad
    y = x.clone().requires_grad_()
    torch.testing.assert_close(z, torch.autograd.grad(prox.potential(y).sum(), y)[0])
    for context in (torch.no_grad(), inference()):
        with context:
            silent = prox(x)
        assert not silent.requires_grad and not x.requires_grad
        torch.testing.assert_close(silent, z.detach(), rtol=0, atol=1e-15)
    frozen = network(shape).requires_grad_(False)
    assert frozen(x).grad_fn is None
    torch.testing.assert_close(vmap(prox)(x), z)
    torch.testing.assert_close(jacrev(prox)(x[0]), hessian(prox.potential)(x[0]))


def test_forward_is_the_prox_of_the_prior():
    prox = network(1, beta=5.0, strong_convexity=0.1)
    y = torch.linspace(-4, 4, 9, dtype=F64)[:, None]
    z = prox(y).detach()
    near = z + torch.linspace(-1, 1, 201, dtype=F64)  # (9, 201) candidates around
    energy = prox.prior(near.reshape(-1, 1)).reshape(near.shape) + (near - y).square() / 2
    best = near.gather(1, energy.argmin(1, keepdim=True))
    assert float((best - z).abs().max()) <= 0.01 + 1e-12  # the grid's spacing


# --------------------------------------------------------------------------------------------------------------- prior


@pytest.mark.parametrize("c", [0.3, 1.0, 2.5])  # beyond 1 the prior is concave; at 1 the start is the solution
def test_prior_of_a_quadratic(c):
    prox, x = LearnedProximal(Quadratic(c)), sample(3).requires_grad_()
    R = prox.prior(x)
    torch.testing.assert_close(R, (1 - c) / (2 * c) * x.square().sum(-1))
    of_x, of_c = torch.autograd.grad(R.sum(), (x, prox.potential.c))
    torch.testing.assert_close(of_x, (1 / c - 1) * x)
    torch.testing.assert_close(of_c, -x.square().sum() / (2 * c * c))


@pytest.mark.parametrize("b", [1.0, 8.0])
def test_prior_of_the_logistic_function(b):
    prox, x = LearnedProximal(Softplus(b)), torch.rand(5, 3, dtype=F64) * 0.96 + 0.02
    torch.testing.assert_close(prox.inverse(x), torch.logit(x) / b, rtol=1e-9, atol=1e-9)
    entropy = x * x.log() + (1 - x) * (1 - x).log()
    torch.testing.assert_close(prox.prior(x), (entropy / b - x.square() / 2).sum(-1))
    middle = torch.full((3,), 0.5, dtype=F64)
    curvature = hessian(prox.prior)(middle)
    torch.testing.assert_close(curvature, (4 / b - 1) * torch.eye(3, dtype=F64))
    assert bool(curvature[0, 0] < 0) == (b > 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_prior_is_the_inverse_less_x(shape):
    prox, y = network(shape, strong_convexity=0.1), sample(shape)
    x = prox(y).detach().requires_grad_()
    torch.testing.assert_close(prox.inverse(x), y, rtol=1e-8, atol=1e-8)
    (slope,) = torch.autograd.grad(prox.prior(x).sum(), x)
    torch.testing.assert_close(slope, (y - x).detach(), rtol=0, atol=1e-6)
    h, direction = 1e-4, torch.randn_like(y)
    with torch.no_grad():
        difference = (prox.prior(x + h * direction) - prox.prior(x - h * direction)) / (2 * h)
    torch.testing.assert_close((slope * direction).flatten(1).sum(-1), difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_of_the_prior_in_the_parameters_is_that_of_the_potential(shape):
    prox, y = network(shape, strong_convexity=0.1), sample(shape)
    parameters = list(prox.parameters())
    x = prox(y).detach()
    found = torch.autograd.grad(prox.prior(x).sum(), parameters, allow_unused=True, materialize_grads=True)
    expected = torch.autograd.grad(-prox.potential(y).sum(), parameters, allow_unused=True, materialize_grads=True)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    name, value = "potential.skips.0.bias", prox.potential.skips[0].bias.detach()
    bare, h, direction = _Prior(prox), 1e-5, torch.randn_like(value)
    with torch.no_grad():
        high, low = (functional_call(bare, {f"prox.{name}": value + s * h * direction}, (x,)).sum() for s in (1, -1))
    slope = dict(zip([n for n, _ in prox.named_parameters()], found, strict=True))[name]
    torch.testing.assert_close((slope * direction).sum(), (high - low) / (2 * h), rtol=1e-6, atol=1e-6)


class _Prior(nn.Module):
    """Lets ``functional_call`` reach the prior."""

    def __init__(self, prox: LearnedProximal) -> None:
        super().__init__()
        self.prox = prox

    def forward(self, x):
        return self.prox.prior(x)


def test_second_derivative_of_the_prior():
    prox, y = network(3, strong_convexity=0.2), sample(3, 1)[0]
    x = prox(y).detach()
    P = hessian(prox.potential)(y).detach()
    torch.testing.assert_close(hessian(prox.prior)(x).detach(), torch.linalg.inv(P) - torch.eye(3, dtype=F64))
    torch.testing.assert_close(jacrev(prox.inverse)(x).detach(), torch.linalg.inv(P))


def test_forward_and_prior_agrees_with_prior():
    prox, y = network((2, 5, 6)), sample((2, 5, 6))
    z, R = prox.forward_and_prior(y)
    torch.testing.assert_close(z, prox(y))
    torch.testing.assert_close(R, prox.prior(z))


def test_outside_the_range_there_is_no_prior():
    prox = LearnedProximal(Softplus(5.0))
    x = torch.tensor([[0.2, 0.7], [0.5, 1.3], [-0.1, 0.5]], dtype=F64)
    with pytest.raises(SolveError, match=r"2 of 3 batch elements failed \(elements 1, 2\)"):
        prox.prior(x)
    solution = prox.prior_ex(x)
    assert solution.status[0] == Status.CONVERGED and solution.failed.tolist() == [False, True, True]
    tolerant = LearnedProximal(prox.potential, on_failure="nan")
    for method in ("prior", "inverse"):
        found = getattr(tolerant, method)(x)
        torch.testing.assert_close(found[:1], getattr(prox, method)(x[:1]))
        assert bool(found[1:].isnan().all())
    assert network(2)(10 * sample(2)).shape == (4, 2)  # strongly convex: onto


def test_float32_prior_is_as_good_as_its_numbers():
    prox = network((1, 8, 8), beta=100.0)
    x = prox(3 * sample((1, 8, 8))).detach()
    expected = prox.prior(x)
    single = prox.float().prior_ex(x.float())
    assert bool(single.converged.all()) and single.value.dtype == torch.float32
    torch.testing.assert_close(single.value.double(), expected, rtol=1e-5, atol=1e-4)


def test_captured_tensors_of_a_potential_are_refused():
    hidden = torch.ones(3, dtype=F64, requires_grad=True)

    class Careless(nn.Module):
        def forward(self, y):
            return (hidden * y.square()).sum(-1)

    with pytest.raises(ValueError, match=r"potential: .*captures"):
        LearnedProximal(Careless()).prior(sample(3))


# ---------------------------------------------------------------------------------------------------- proximal matching


def test_matching_loss_is_its_formula_and_smooth_at_zero():
    a, b = sample((1, 2, 2)), sample((1, 2, 2))
    expected = (1 - torch.exp(-(a - b).square().sum((1, 2, 3)) / 1.5**2)).mean()
    torch.testing.assert_close(proximal_matching_loss(a, b, 1.5), expected)
    torch.testing.assert_close(
        proximal_matching_loss(a, b, 1.5, event_ndim=1),
        (1 - torch.exp(-(a - b).square().sum(-1) / 1.5**2)).mean(),
    )
    tiny = proximal_matching_loss(a + 1e-9, a, 1.0)  # 1 - exp(-e) would be zero
    torch.testing.assert_close(tiny, torch.tensor(4e-18, dtype=F64), rtol=1e-6, atol=0)
    x = a.clone().requires_grad_()
    (slope,) = torch.autograd.grad(proximal_matching_loss(x, a, 0.5), x, create_graph=True)
    assert bool((slope == 0).all())
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curvature, torch.full_like(a, 2 / 0.5**2 / 4))
    for bad, match in [((a, b[:2], 1.0), "target: expected shape"), ((a, b, 0.0), "gamma: expected a positive")]:
        with pytest.raises(ValueError, match=match):
            proximal_matching_loss(*bad)


def posterior(y: float, grid: torch.Tensor) -> torch.Tensor:
    """p(x | y) of Laplacian x and unit Gaussian noise, on a grid."""
    return torch.softmax(-grid.abs() - (y - grid).square() / 2, 0)


def exact_matching(y: float, gamma: float) -> float:
    """The mode of the posterior, blurred by a Gaussian of variance gamma^2 / 2: what the loss is minimised by."""
    grid = torch.linspace(-12, 12, 4801, dtype=F64)
    fine = torch.linspace(-4, 4, 1601, dtype=F64)
    kernel = torch.exp(-((fine[:, None] - grid) ** 2) / gamma**2)
    return float(fine[(kernel @ posterior(y, grid)).argmax()])


@pytest.mark.parametrize(("y", "gamma"), [(0.4, 0.5), (1.5, 0.5), (2.5, 0.3), (-3.0, 0.1)])
def test_matching_loss_has_the_exact_minimiser(y, gamma):
    grid = torch.linspace(-12, 12, 4801, dtype=F64)
    quantiles = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    x = grid[torch.searchsorted(posterior(y, grid).cumsum(0), quantiles).clamp_max(4800)][:, None]
    candidates = torch.linspace(-4, 4, 401, dtype=F64)
    losses = [proximal_matching_loss(c.expand_as(x), x, gamma) for c in candidates]
    best = float(candidates[torch.stack(losses).argmin()])
    assert abs(best - exact_matching(y, gamma)) <= 0.03
    soft = float(prox_l1(torch.tensor([y], dtype=F64), 1.0))
    assert abs(exact_matching(y, gamma) - soft) <= gamma  # the limit of narrow widths


# ------------------------------------------------------------------------------------------------------------- training


def laplacian(count: int, generator: torch.Generator) -> torch.Tensor:
    """The difference of two exponential samples."""
    return torch.log1p(-torch.rand(2, count, 1, generator=generator, device=generator.device)).diff(dim=0).squeeze(0)


SHORT = MatchingSchedule(
    (MatchingStage(steps=14, learning_rate=1e-2), MatchingStage(steps=10, learning_rate=1e-3, gamma=0.5))
)


def small(seed: int = 0) -> LearnedProximal:
    torch.manual_seed(seed)
    return LearnedProximal(InputConvexNetwork(1, hidden=8, layers=1))


def test_training_goes_on_from_a_checkpoint_to_the_bit(tmp_path):
    options = {"noise_std": (0.5, 1.0), "schedule": SHORT, "batch_size": 16, "seed": 3, "progress": False}
    whole = small().eval()
    record = train_proximal(whole, laplacian, **options)
    assert record.losses.shape == (24,) and not whole.training
    path, calls = tmp_path / "deep" / "run.pt", []

    def interrupted(count, generator):
        calls.append(count)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return laplacian(count, generator)

    with pytest.raises(KeyboardInterrupt):
        train_proximal(small(), interrupted, checkpoint=path, checkpoint_every=5, **options)
    resumed = small(seed=1)  # other numbers: they come from the checkpoint
    again = train_proximal(resumed, laplacian, checkpoint=path, checkpoint_every=5, **options)
    assert torch.equal(again.losses, record.losses)
    for a, b in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    finished = train_proximal(small(seed=2), laplacian, checkpoint=path, **options)  # nothing is left to do
    assert torch.equal(finished.losses, record.losses)
    with pytest.raises(ValueError, match="checkpoint: expected one written with seed=4, got 3"):
        train_proximal(small(), laplacian, checkpoint=path, **(options | {"seed": 4}))
    assert [p.name for p in path.parent.iterdir()] == ["run.pt"]


def test_training_refuses_what_it_would_misread(tmp_path):
    schedule = MatchingSchedule((MatchingStage(steps=2, learning_rate=1e-3),))
    flat = nn.Sequential(nn.Linear(1, 1), nn.Flatten(0))  # (count) against (count, 1) would broadcast
    with pytest.raises(ValueError, match="model output"):
        train_proximal(flat, torch.randn(9, 1), noise_std=0.1, schedule=schedule, progress=False)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="checkpoint: expected a file"):
        train_proximal(
            nn.Linear(1, 1),
            torch.randn(9, 1),
            noise_std=0.1,
            schedule=schedule,
            checkpoint=tmp_path / "other.pt",
            progress=False,
        )


def test_training_draws_from_a_tensor_and_shows_a_bar(capsys):
    data = torch.randn(30, 1)
    record = train_proximal(small(), data, noise_std=0.5, schedule=SHORT)
    assert "24/24" in capsys.readouterr().err
    assert float(record.losses[:14].mean()) > 0 and bool(record.losses.isfinite().all())


def test_training_learns():
    record = train_proximal(
        small(),
        laplacian,
        noise_std=1.0,
        batch_size=256,
        schedule=MatchingSchedule((MatchingStage(steps=200, learning_rate=1e-2),)),
        progress=False,
    )
    assert float(record.losses[-20:].mean()) < 0.9 * float(record.losses[:20].mean())


def test_training_refuses_nonsense():
    data = torch.randn(10, 1)
    with pytest.raises(FloatingPointError, match="the loss is nan after 24 steps"):
        train_proximal(small(), data * math.nan, noise_std=1.0, schedule=SHORT, progress=False)
    for options, match in [
        ({"noise_std": 0.0}, "noise_std: expected a positive number or a range"),
        ({"noise_std": (0.5, 0.1)}, "noise_std"),
        ({"noise_std": 1.0, "batch_size": 0}, "batch_size: expected at least 1"),
    ]:
        with pytest.raises(ValueError, match=match):
            train_proximal(small(), data, schedule=SHORT, progress=False, **options)
    with pytest.raises(ValueError, match="data: expected at least one sample"):
        train_proximal(small(), data[:0], noise_std=1.0, schedule=SHORT)
    with pytest.raises(ValueError, match="model: expected a module with parameters"):
        train_proximal(nn.Identity(), data, noise_std=1.0)
    with pytest.raises(ValueError, match="gamma: expected None or a positive number"):
        MatchingStage(steps=1, learning_rate=1.0, gamma=0.0)


def test_schedules_of_the_paper():
    paper = MatchingSchedule.paper(28 * 28)
    assert paper.steps == 40_000 and paper.stages[0] == MatchingStage(steps=20_000, learning_rate=1e-3)
    widths = [stage.gamma for stage in paper.stages[1:]]
    assert widths == pytest.approx([0.08 * 28 * 2**i for i in (3, 2, 1, 0)])
    assert {stage.learning_rate for stage in paper.stages[1:]} == {1e-4}
    assert MatchingSchedule.paper(1, steps=83).steps == 83
    assert MatchingSchedule.paper_scalar().steps == 44_000
    assert MatchingSchedule.fast_scalar().steps == 4_200
    prox = LearnedProximal(InputConvexNetwork(1, hidden=2, layers=0))
    with pytest.raises(KeyboardInterrupt):  # the default follows the samples' size
        train_proximal(prox, _Stop(), noise_std=1.0, progress=False)


class _Stop:
    """A sampler that gives up at the second call: the first only shows the size of a sample."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, count, generator):
        self.calls += 1
        if self.calls == 2:
            raise KeyboardInterrupt
        return laplacian(count, generator)


@pytest.mark.slow
def test_laplacian_prior_is_learned():
    torch.manual_seed(0)
    prox = LearnedProximal(InputConvexNetwork(1, hidden=32, layers=2))
    schedule = MatchingSchedule.fast_scalar()
    grid = torch.linspace(-3, 3, 601)[:, None]
    errors = {}
    for name, stages in (("l1", schedule.stages[:2]), ("matching", schedule.stages[2:])):
        train_proximal(
            prox, laplacian, noise_std=1.0, schedule=MatchingSchedule(stages), batch_size=2000, progress=False
        )
        with torch.no_grad():
            errors[name] = (prox(grid) - prox_l1(grid, 1.0)).abs()
    assert float(errors["matching"].mean()) <= 0.12 and float(errors["matching"].max()) <= 0.30
    assert float(errors["matching"].mean()) < float(errors["l1"].mean())
    prox = prox.double()
    x = torch.linspace(-2, 2, 401, dtype=F64)[:, None].requires_grad_()
    R = prox.prior(x)
    distance = (R - x.abs().squeeze(-1)).detach()
    assert float((distance - (distance.max() + distance.min()) / 2).abs().max()) <= 0.25
    (slope,) = torch.autograd.grad(R.sum(), x)
    with torch.no_grad():
        y, h = prox.inverse(x), 1e-5
        difference = (prox.prior(x + h) - prox.prior(x - h)) / (2 * h)
    torch.testing.assert_close(slope, y - x.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(slope.squeeze(-1), difference, rtol=0, atol=1e-6)
    exact = torch.tensor([exact_matching(float(v), 0.1) for v in grid[::20, 0]])
    with torch.no_grad():
        assert float((prox(grid[::20].double()).squeeze(-1) - exact).abs().mean()) <= 0.12

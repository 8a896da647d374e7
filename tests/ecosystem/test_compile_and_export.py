"""torch.compile and torch.export: the numbers of plain use, and errors where there is no way.

The contract compiles every layer alone; here layers stand inside of models, where graphs begin and end.
"""

from __future__ import annotations

import io
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from difflayers.conic import Exponential, NonNegative, Product
from difflayers.implicit import Anderson, FixedPoint, Picard, Unrolled
from difflayers.transport import PointCloud, doubly_stochastic, sinkhorn_ex
from tests.ecosystem.models import F64, NAMES, Cell, built, loss_of, numbers, same

# Dynamo looks at `.grad` of every tensor at a graph break, and torch warns of its own look
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def no_graphs() -> Iterator[None]:
    """Neither takes over graphs, nor leaves any."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Between(nn.Module):
    """A layer between networks. Not a Sequential: torch leaves that uncompiled where there is a break in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.front, (self.layer, x) = nn.Linear(4, 4), built(name)
        self.behind = nn.Linear(self.layer(x).shape[-1], 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(torch.tanh(self.layer(torch.sin(self.front(x)))))


# Warnings are errors here: one of Dynamo about our code (a cache, a builtin that it cannot follow) would fail.
@pytest.mark.parametrize("name", ["QuadraticProgram", "FixedPoint", "ConvergentGraphSolver"])
def test_compiled_models(name: str):
    model, x = Between(name).to(F64), built(name)[1]
    counter = CompileCounterWithBackend("aot_eager")
    parameters = dict(model.named_parameters())
    same(numbers(torch.compile(model, backend=counter), parameters, x), numbers(model, parameters, x), 1e-12)
    assert counter.frame_count >= 2 and counter.op_count >= 4  # what is in front of the layer, and what is behind


def test_caches_of_problems_are_no_business_of_dynamo():
    """It would look into them, and say so to every user."""
    cost = torch.rand(3, 3, dtype=F64)
    compiled = torch.compile(lambda cost: doubly_stochastic(cost.sin(), 0.5).cos(), backend="eager")
    torch.testing.assert_close(compiled(cost), doubly_stochastic(cost.sin(), 0.5).cos(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stored", [False, True])
def test_clouds_of_points_are_no_business_of_dynamo(stored: bool):
    x, y, v = (torch.rand(n, 2, dtype=F64, requires_grad=n == 4) for n in (4, 3, 3))

    def barycentres(x: Tensor) -> Tensor:
        coupling = sinkhorn_ex(PointCloud(x.sin(), y), eps=0.5).value
        moved = coupling.plan @ v if stored else coupling.apply(v)
        return (4 * moved - x).cos()

    counter = CompileCounterWithBackend("aot_eager")
    got, want = torch.compile(barycentres, backend=counter)(x), barycentres(x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    slopes = (torch.autograd.grad(value.square().sum(), x)[0] for value in (got, want))
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-12)
    # the sine, and what is behind; Dynamo cannot go on after a property that breaks the graph
    assert counter.frame_count == (1 if stored else 2)


@pytest.mark.parametrize("name", ["QuadraticProgram", "FixedPoint", "ConvergentGraphSolver"])
def test_a_whole_step_of_training_compiles(name: str):
    """Its ``backward()`` runs inside of what is compiled; Dynamo stays out of the rules of layers."""
    (model, x), slopes = (Between(name).to(F64), built(name)[1]), []

    def step(x: Tensor) -> None:
        loss_of(model(x)).backward()

    for run in (step, torch.compile(step, backend="aot_eager")):
        model.zero_grad()
        run(x)
        slopes.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
    assert slopes[0]
    torch.testing.assert_close(slopes[1], slopes[0], rtol=0, atol=1e-12)


def test_cones_that_break_the_graph_stand_in_products():
    cone = Product([(NonNegative(), 2), (Exponential(), 3), (Exponential(), 3)])
    x = torch.randn(2, 8, dtype=F64)
    project = torch.compile(lambda x: cone.project(x.sin()), backend="eager")
    torch.testing.assert_close(project(x), cone.project(x.sin()), rtol=0, atol=1e-12)


def test_a_graph_without_a_break_is_refused():
    model, x = built("FixedPoint")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_second_derivatives_of_a_compiled_model_raise():
    """torch's rule for every compiled function; the layer itself, between graphs, would have them."""
    model, x = Between("FixedPoint").to(F64), built("FixedPoint")[1].requires_grad_()
    value = torch.compile(model, backend="aot_eager")(x)
    (slope,) = torch.autograd.grad(loss_of(value), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        slope.sum().backward()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on the CPU and there is no g++")
@pytest.mark.parametrize("name", NAMES)
def test_inductor(name: str):
    model, x = built(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inductor and of whatever it brings in
        got = numbers(torch.compile(lambda x: model(x.sin()).cos()), dict(model.named_parameters()), x)
    same(got, numbers(lambda x: model(x.sin()).cos(), dict(model.named_parameters()), x), 1e-9)


# ------------------------------------------------------------------------------------------------------------ export


def exportable(steps: int, **options: object) -> nn.Module:
    """A model that may be exported: exactly `steps` steps, and no look at how they ended."""
    torch.manual_seed(1)
    solver = options.pop("solver", Picard(max_steps=steps, check_every=None))
    layer = FixedPoint(Cell(3), solver=solver, on_failure="ignore", **options)
    return nn.Sequential(nn.Linear(4, 3), layer, nn.Linear(3, 2)).to(F64).eval()


def stored(program: torch.export.ExportedProgram) -> nn.Module:
    """What a file makes of it."""
    stream = io.BytesIO()
    torch.export.save(program, stream)
    stream.seek(0)
    return torch.export.load(stream).module()


def test_export_of_a_fixed_number_of_steps():
    model, x = exportable(3, solver=Anderson(max_steps=3, check_every=None)), torch.randn(6, 4, dtype=F64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=False)
        other = torch.randn(6, 4, dtype=F64)
        assert torch.equal(stored(program)(other), model(other))


def test_export_for_any_batch():
    model, x = exportable(2, adjoint=Unrolled(2)), torch.randn(6, 4, dtype=F64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
        for count in (1, 11):
            other = torch.randn(count, 4, dtype=F64)
            torch.testing.assert_close(stored(program)(other), model(other), rtol=0, atol=1e-15)


@pytest.mark.parametrize("name", ["QuadraticProgram", "SparseCoding"])
def test_loops_that_stop_on_data_are_not_exported(name: str):
    """Loudly: torch says that it cannot guard on data, instead of recording the steps of one example."""
    model, x = built(name)
    with pytest.raises(RuntimeError), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.export.export(model, (x,), strict=False)

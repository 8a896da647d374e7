"""What is saved can be read with ``weights_only=True``: a file cannot run code. What SECURITY.md says rests on this.

Modules that have a case in the contract are saved and read there (clause ``module_survives``), states of optimisers in
the tests of each method; here are the modules without a case, and rules for whatever comes.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import difflayers
from difflayers.bilevel import ArgminLayer, Bilevel, DatasetDistillation
from difflayers.implicit import WarmStart
from difflayers.pde import DomainExperts, HardBoxes, PDEConstraint, Poisson
from difflayers.proximal import PredictiveSparseDecomposition, SupervisedDictionary
from difflayers.relu import GatedReLU, TwoLayerReLU, VectorGatedReLU
from difflayers.testing.cases import all_cases
from tests.ecosystem.models import ridge

FILES = sorted(Path(next(iter(difflayers.__path__))).rglob("*.py"))


def warm() -> WarmStart:
    """With something in it."""
    store = WarmStart(4)
    store.store(torch.tensor([1, 3]), torch.randn(2, 5))
    return store


def distillation() -> DatasetDistillation:
    """Of eight points."""
    return DatasetDistillation(lambda: nn.Linear(2, 3), torch.randn(4, 2), torch.randn(4, 1), models=2, seed=1)


OTHERS: dict[type[nn.Module], Callable[[], nn.Module]] = {
    ArgminLayer: lambda: ArgminLayer(Bilevel(upper=ridge, lower=ridge)),
    DatasetDistillation: distillation,
    DomainExperts: lambda: DomainExperts(PDEConstraint(Poisson()), HardBoxes(x=2)),
    GatedReLU: lambda: GatedReLU(torch.randn(3, 2), torch.randn(3, 2), torch.randn(3)),
    PredictiveSparseDecomposition: lambda: PredictiveSparseDecomposition(4, 6),
    SupervisedDictionary: lambda: SupervisedDictionary(4, 2),
    TwoLayerReLU: lambda: TwoLayerReLU(torch.randn(3, 2), torch.randn(3)),
    VectorGatedReLU: lambda: VectorGatedReLU(torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2)),
    WarmStart: warm,
}


def public_modules() -> Iterator[type[nn.Module]]:
    """Every ``nn.Module`` with a public name."""
    for family in pkgutil.iter_modules(difflayers.__path__):
        if family.ispkg and family.name != "testing":
            package = importlib.import_module(f"difflayers.{family.name}")
            for name in package.__all__:
                if inspect.isclass(found := getattr(package, name)) and issubclass(found, nn.Module):
                    yield found


def test_every_module_is_saved_somewhere():
    made = [case.make_module() for cases in all_cases().values() for case in cases if case.make_module is not None]
    covered = {type(part) for module in made for part in module.modules()} | set(OTHERS)
    assert not set(public_modules()) - covered


def saved(state: dict[str, object]) -> dict[str, object]:
    """Through a file, without code."""
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def tensors(state: object) -> list[Tensor]:
    """All tensors, the extra state's too."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_states_without_code(kind: type[nn.Module]):
    torch.manual_seed(0)
    first = OTHERS[kind]()
    torch.manual_seed(1)
    second = OTHERS[kind]()
    second.load_state_dict(saved(first.state_dict()))
    for got, want in zip(tensors(second.state_dict()), tensors(first.state_dict()), strict=True):
        assert torch.equal(got, want)


# -------------------------------------------------------------------------------------------------------------- rules


def unsafe(source: str) -> Iterator[str]:
    """Calls that read files which may run code."""
    if not any(word in source for word in (".load", "eval(", "exec(")):
        return  # quicker than to parse it
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: {ast.unparse(node)}"
            if name in ("pickle.load", "pickle.loads", "eval", "exec", "joblib.load", "marshal.loads"):
                yield f"line {node.lineno}: {ast.unparse(node)}"
            if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
                yield f"line {node.lineno}: {ast.unparse(node)}"


def test_unsafe_calls_are_found():
    bad = (
        "import torch\ntorch.load(p)\ntorch.load(p, weights_only=False)\npickle.loads(b)\nnp.load(p, allow_pickle=True)"
    )
    assert len(list(unsafe(bad))) == 4
    assert not list(unsafe("torch.load(p, weights_only=True)\nmodel.eval()\nnp.load(p)"))


def test_the_library_reads_no_file_that_may_run_code():
    # the contract pickles modules itself, in memory
    files = [path for path in FILES if path.parent.name != "testing"]
    assert len(files) > 100
    assert {str(path): found for path in files if (found := list(unsafe(path.read_text())))} == {}

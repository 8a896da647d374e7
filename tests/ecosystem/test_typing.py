"""Types as a user with ``mypy --strict`` has them: complete, and no Any but where the caller's structure decides."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

import difflayers

ROOT = Path(__file__).parents[2]

# These return the structure that they are given (a tensor, a tuple, a dictionary), or what the user's module returns.
STRUCTURES = {
    *("root_find", "fixed_point", "argmin", "nonlinear_least_squares", "self_label"),
    *("FixedPoint.forward", "WarmStart.forward", "ArgminLayer.forward", "BilevelPruning.forward", "SelfTuning.forward"),
    *("Method.polish", "BOREP.refine", "Bloop.direction", "SelfLabelState.labels", "SelfLabelState.soft"),
    "Heat.default_conditions",
    "torchjd_projector",  # a class of a package that is imported when it is asked for
}


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, and methods with public names that a class defines itself."""
    for family in pkgutil.iter_modules(difflayers.__path__):
        if not family.ispkg:
            continue
        package = importlib.import_module(f"difflayers.{family.name}")
        for name in package.__all__:
            found = getattr(package, name)
            if inspect.isfunction(found):
                yield name, found
            elif inspect.isclass(found) and not issubclass(found, Protocol):  # type: ignore[arg-type]
                for key, value in vars(found).items():
                    if inspect.isfunction(value) and (key in ("__init__", "__call__") or not key.startswith("_")):
                        yield f"{name}.{key}", value


def test_every_public_function_says_its_types():
    missing, loose = [], []
    for name, function in public():
        signature = inspect.signature(function)
        parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
        if any(p.annotation is p.empty for p in parameters) or signature.return_annotation is signature.empty:
            missing.append(name)
        # solvers keep any state between their steps
        if signature.return_annotation in ("Any", Any) and name not in STRUCTURES and not name.endswith(".start"):
            loose.append(name)
    assert not missing
    assert not loose


def test_the_package_says_that_it_is_typed():
    assert (Path(next(iter(difflayers.__path__))) / "py.typed").exists()


@pytest.mark.slow
def test_strict_users(tmp_path: Path):
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}"]
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from difflayers.transport import sinkhorn\nplan: str = sinkhorn(1, eps='small')\n")
    for path, errors in ((ROOT / "tests" / "typing" / "user.py", 0), (wrong, 3)):
        run = subprocess.run([*command, str(path)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.stdout.count("error:") == errors, run.stdout + run.stderr

"""Rules of the house that no linter knows: imports, sizes, factory calls, public names, the README's snippet."""

import ast
import contextlib
import importlib
import io
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import difflayers

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "difflayers"
FILES = sorted(PACKAGE.rglob("*.py"))
SUBPACKAGES = sorted(m.name for m in pkgutil.iter_modules(difflayers.__path__) if m.ispkg)

HEAVY = {"cvxpy", "cvxpylayers", "moreau", "torchopt", "scipy", "matplotlib"}
FACTORIES = {
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn"),
    *("randperm", "tensor", "tril_indices", "triu_indices", "zeros"),
}
TORCH_FACTORIES = {f"torch.{name}" for name in FACTORIES}
MAX_LINES = 400
MAX_IMPORT_SECONDS = 0.3


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def python(code: str) -> str:
    """What `code` prints when a fresh interpreter runs it."""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


# ----------------------------------------------------------------------------------------------------------- imports


def test_import_brings_in_nothing_heavy():
    loaded = python(
        "import sys, torch; before = set(sys.modules); import difflayers;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    ).split()
    assert "difflayers" in loaded
    assert not HEAVY & set(loaded)


def test_import_is_cheap():
    code = (
        # seconds of this process on a core, which a busy machine does not change
        "import time, torch; start = time.process_time(); import difflayers; print(time.process_time() - start);"
        "assert 'difflayers.implicit' in __import__('sys').modules"
    )
    best = float("inf")
    for _ in range(5):  # the best of several: caches may be cold
        best = min(best, float(python(code)))
        if best <= MAX_IMPORT_SECONDS:
            return
    pytest.fail(f"import difflayers costs {best:.2f} s over import torch, more than {MAX_IMPORT_SECONDS} s")


@pytest.mark.parametrize("name", ["", *SUBPACKAGES])
def test_public_names_resolve(name: str):
    module = importlib.import_module(f"difflayers.{name}".rstrip("."))
    assert module.__doc__
    assert len(set(module.__all__)) == len(module.__all__)
    for public in module.__all__:
        assert not public.startswith("_") or public == "__version__"
        assert getattr(module, public) is not None


# ------------------------------------------------------------------------------------------------------------- sizes


def code_lines(source: str) -> int:
    """Lines of code: neither blank, nor comment, nor docstring."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.lstrip().startswith("#") and n not in docstrings for n, line in lines)


def test_code_lines_are_counted_right():
    source = '"""Doc\n\nstring."""\n\n# comment\nx = 1  # code\n\n\ndef f():\n    """Doc."""\n    return x\n'
    assert code_lines(source) == 3


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_files_are_short(path: Path):
    assert code_lines(path.read_text()) <= MAX_LINES


# ------------------------------------------------------------------------------------------------------ static checks


def stray_factory_calls(source: str) -> Iterator[str]:
    """Calls such as `torch.zeros(3)` that leave the device to the default, also on branches that a CPU never takes."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in FACTORIES:
                    yield f"line {node.lineno}: from torch import {alias.name} (write torch.{alias.name})"
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in TORCH_FACTORIES):
            continue
        keywords = {keyword.arg for keyword in node.keywords}  # None stands for **options, taken to name a device
        if not keywords & {"device", None}:
            yield f"line {node.lineno}: {ast.unparse(node)} has no device="


def unfinished(source: str) -> Iterator[str]:
    """Places that raise NotImplementedError."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            yield f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize(
    "bad",
    [
        "import torch\nx = torch.zeros(3)",
        "import torch\nif cuda:\n    x = torch.eye(3, dtype=y.dtype) @ y",
        "def f(x):\n    return x + torch.as_tensor(1.0)",
        "from torch import arange",
    ],
)
def test_stray_factory_calls_are_found(bad: str):
    assert len(list(stray_factory_calls(bad))) == 1


def test_factory_calls_with_a_device_are_accepted():
    good = "torch.zeros(3, device=x.device)\ntorch.eye(3, **like)\nx.new_zeros(3)\ntorch.zeros_like(x)\nnp.zeros(3)"
    assert not list(stray_factory_calls(good))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_no_stray_factory_call(path: Path):
    assert not list(stray_factory_calls(path.read_text()))


def test_unfinished_code_is_found():
    assert len(list(unfinished("def f():\n    raise NotImplementedError('later')"))) == 1
    assert not list(unfinished("def f():\n    '''No NotImplementedError here.'''\n    raise ValueError"))


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_is_left_unfinished(path: Path):
    assert not list(unfinished(path.read_text()))


# ------------------------------------------------------------------------------------------------------------ README


def test_readme_snippet_prints_a_gradient():
    fence = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    assert fence, "README.md has no python fence"
    snippet = fence.group(1)
    assert len(snippet.splitlines()) <= 12, "the first snippet is meant to be about ten lines"
    printed = io.StringIO()
    scope: dict[str, object] = {"__name__": "readme"}
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), scope)
    assert "tensor(" in printed.getvalue()
    assert "nan" not in printed.getvalue()

"""Every python fence of README.md and of the pages in docs/ runs as it stands.

The fences of a page share a namespace and run in their order, in an empty folder, from the same random numbers, with
warnings as errors. What is meant for torchrun runs as one process of one. Interactive snippets (``>>>``) are left to
doctest. A comment on the line above a fence makes an exception, and says why:

    <!-- needs: qpth, ot -->      runs where these modules can be imported
    <!-- not run: the reason -->  is compiled and never runs; for what no test can do
"""

import importlib.util
import linecache
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
GENERATED = {"_build", "gallery", "auto_examples"}
FENCE = re.compile(
    r"(?:^ *<!-- (?P<mark>needs|not run): (?P<why>[^\n]+?) -->\n+)?"
    r"^(?P<indent> *)```(?:python|py|\{code-block\} python)[ \t]*\n(?P<source>.*?)^(?P=indent)```[ \t]*$",
    flags=re.MULTILINE | re.DOTALL,
)


class Snippet(NamedTuple):
    """One fence: its code, the line of the page it starts on, the modules it needs, why it never runs."""

    source: str
    line: int
    needs: tuple[str, ...] = ()
    not_run: str = ""


def snippets(text: str) -> list[Snippet]:
    found = []
    for match in FENCE.finditer(text):
        mark, why = match["mark"], match["why"]
        needs = tuple(name.strip() for name in why.split(",")) if mark == "needs" else ()
        line = text.count("\n", 0, match.start("source"))
        found.append(Snippet(textwrap.dedent(match["source"]), line, needs, why if mark == "not run" else ""))
    return [snippet for snippet in found if not snippet.source.startswith(">>>")]


def missing(snippet: Snippet) -> list[str]:
    return [name for name in snippet.needs if importlib.util.find_spec(name) is None]


def run(text: str, path: str, module: types.ModuleType) -> list[str]:
    """Runs the fences of a page; says which were left out for want of a module."""
    left_out = []
    # not the name of a file: Dynamo of torch 2.6 reads that as Python from beginning to end, and a page is none
    name = f"<{path}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    for snippet in snippets(text):
        # blank lines in front: a traceback then shows the line of the page
        code = compile("\n" * snippet.line + snippet.source, name, "exec")
        if absent := missing(snippet):
            left_out.append(f"line {snippet.line}: {', '.join(absent)} not installed")
        elif not snippet.not_run:
            exec(code, module.__dict__)
    return left_out


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A module for the names of one page, and an empty folder for its files."""
    page = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", page)  # for what looks a class or function up by its module
    monkeypatch.setenv("MPLBACKEND", "agg")
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in alone.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    dtype = torch.get_default_dtype()
    with torch.device("cpu"):  # also where the suite runs on another device: pages are tried as they are written
        yield page
    torch.set_default_dtype(dtype)
    if dist.is_initialized():
        dist.destroy_process_group()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


def pages() -> list[Path]:
    found = [path for path in sorted(ROOT.glob("docs/**/*.md")) if not GENERATED & set(path.relative_to(ROOT).parts)]
    return [path for path in [ROOT / "README.md", *found] if snippets(path.read_text())]


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_snippets_run(path: Path, module: types.ModuleType):
    left_out = run(path.read_text(), str(path), module)
    if left_out:
        pytest.skip("the rest has run; not " + "; ".join(left_out))


def test_interactive_snippets_are_where_doctest_looks():
    assert ">>>" not in (ROOT / "README.md").read_text()


# -------------------------------------------------------------------------------------------------------- the runner

PAGE = """# Title

```python
x = 1
```

:::{tip}
  ```python
  y = x + 1
  ```
:::

```python
>>> left_to_doctest
```

```bash
left to the reader
```

<!-- needs: torch, a_module_that_does_not_exist -->
```python
y = 3
```

<!-- needs: torch, sys -->
```python
z = y + 1
```

<!-- not run: it needs eight GPUs -->

```python
1 / 0
```
"""


def test_fences_share_a_namespace_and_exceptions_are_said(module: types.ModuleType):
    left_out = run(PAGE, "page.md", module)
    assert (module.x, module.y, module.z) == (1, 2, 3)
    assert left_out == ["line 22: a_module_that_does_not_exist not installed"]


def test_a_broken_fence_fails_on_its_line(module: types.ModuleType):
    with pytest.raises(ZeroDivisionError) as broken:
        run("text\n\n```python\nx = 1\ny = 1 / 0\n```\n", "page.md", module)
    assert str(broken.traceback[-1].path) == "<page.md>"
    assert broken.traceback[-1].lineno + 1 == 5


def test_a_fence_that_does_not_run_is_python_nevertheless(module: types.ModuleType):
    with pytest.raises(SyntaxError):
        run("<!-- not run: a reason -->\n```python\nx = \n```\n", "page.md", module)


def test_a_warning_fails(module: types.ModuleType):
    with pytest.raises(UserWarning, match="said"):
        run("```python\nimport warnings\nwarnings.warn('said')\n```\n", "page.md", module)

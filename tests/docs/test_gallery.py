"""Every example can be run in seconds, and has its place in the gallery."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))
HELP = "a few seconds: small data, few steps, no claims"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda script: script.stem)
def test_quick_is_the_same_everywhere(script: Path):
    source = script.read_text()
    assert source.count(f'add_argument("--quick", action="store_true", help="{HELP}")') == 1
    assert f"python examples/{script.name} [--quick]" in ast.get_docstring(ast.parse(source))


def test_every_example_is_in_the_gallery_once():
    listed = re.findall(r"examples/(plot_\w+\.py)", (ROOT / "examples/GALLERY_HEADER.rst").read_text())
    assert sorted(listed) == [script.name for script in EXAMPLES]


def test_docstrings_become_rest():
    pytest.importorskip("sphinx_gallery")
    spec = importlib.util.spec_from_file_location("gallery_extension", ROOT / "docs/_ext/gallery.py")
    gallery = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gallery)
    text = "Bars |x| and w_ are plain, `|x|` is code.\n\n    z = |x|\n\n    python examples/plot_x.py [--quick]\n"
    assert gallery.as_rest(text) == (
        "Bars \\|x\\| and w\\_ are plain, `|x|` is code.\n\n.. code-block:: text\n\n    z = |x|\n\n"
        ".. code-block:: console\n\n    python examples/plot_x.py [--quick]\n"
    )
    assert gallery.title_of("examples/plot_upgrad_digits.py") == "UPGrad on digits"
    assert gallery.title_of("examples/plot_label_noise.py") == "Label noise"

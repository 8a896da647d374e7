"""Sphinx configuration. The build is offline and treats every warning as an error: see `make docs`."""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))
os.environ["TQDM_DISABLE"] = "1"  # bars belong to terminals; read when tqdm is imported, as difflayers does

import difflayers

project = "difflayers"
author = "The difflayers authors"
copyright = "The difflayers authors, Apache-2.0"
version = release = difflayers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    "gallery",  # these two are in _ext/
    "mathml",
]
exclude_patterns = ["_build", "_ext"]
python_maximum_signature_line_length = 100
default_role = "code"  # docstrings write `x` for code
html_theme = "pydata_sphinx_theme"
html_title = "difflayers"
html_theme_options = {
    "logo": {"text": "difflayers"},
    "navbar_align": "left",
    "header_links_before_dropdown": 8,
    "show_prev_next": False,
    "show_nav_level": 1,
    "secondary_sidebar_items": {"**": ["page-toc"], "index": []},
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {"index": []}
html_static_path = ["_static"]
html_css_files = ["difflayers.css"]
html_show_sourcelink = False
html_math_renderer = "mathml"
myst_update_mathjax = False
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_inherit_docstrings = False  # an override without a docstring is described where it is declared
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source", "Departure"]

# One bibliography for the pages and for `difflayers.cite`.
bibtex_bibfiles = ["../difflayers/references.bib"]
bibtex_default_style = "plain"
bibtex_reference_style = "author_year"

# The scripts in examples/, run with --quick, or in full with DIFFLAYERS_GALLERY=full (`make gallery`). A script that
# has not changed keeps its page, so pages of a full run stay until then.
sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/plot_",
    "ignore_pattern": r"^(?!plot_|bilevel_data_parallel\.py|expert_parallel\.py)",
    "run_stale_examples": os.environ.get("DIFFLAYERS_GALLERY") == "full",
    "reset_argv": "gallery.arguments",
    "image_scrapers": ("gallery.figures",),
    "reset_modules": ("gallery.surroundings",),
    "reset_modules_order": "both",
    "within_subsection_order": "FileNameSortKey",
    "backreferences_dir": "gallery/backreferences",
    "doc_module": ("difflayers",),
    "notebook_extensions": set(),
    "download_all_examples": False,
    "write_computation_times": False,
    "show_signature": False,
    "capture_repr": (),
    "thumbnail_size": (640, 250),
    "inspect_global_variables": False,
}

# Links into other projects need the network, so they are made on request only: DIFFLAYERS_DOCS_ONLINE=1 make docs.
intersphinx_mapping = {}
if os.environ.get("DIFFLAYERS_DOCS_ONLINE"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

nitpick_ignore_regex = [
    # Without the network their inventories are out of reach; names of our own must resolve.
    (r"py:.*", r"(abc|collections|contextlib|cvxpy|enum|numpy|optree|os|torch|typing)\..*"),
    # Private types in the signatures of methods that only authors of solvers override.
    (r"py:.*", r"difflayers\.(\w+\.)*_\w+\.\w+"),
    # Types of what only the library makes, and of what is imported for type checkers alone.
    (r"py:class", r"Evaluator|Block|Seam|Figure|Earlier"),
    # Type variables and short aliases in signatures, which have no page of their own.
    (r"py:(class|obj)", r"(.*\.)?(T|Tensor|Tree|PyTree|Callable|Any|Params|OnFailure|Function|Inputs|Values)"),
]


def resolve_private(app, env, node, contnode):
    """Lead `difflayers._solution.Solution` to the page of the public name `Solution`, wherever it is re-exported."""
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py" or not target:
        return None
    domain = env.get_domain("py")
    last = target.rpartition(".")[2]
    public = [name for name in domain.objects if name.startswith("difflayers.") and name.rpartition(".")[2] == last]
    if not public or not (target == last or target.startswith("difflayers.")):
        return None
    name = max(public, key=lambda name: (name.count("."), name))  # the family's page rather than the root's
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)


def skip_aliases(app, what, name, obj, skip, options):
    """Leave out the fields of named tuples, which say "Alias for field number 0"; their class describes them."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def keep_underscores(app, what, name, obj, options, lines):
    """Attributes such as `coef_`: reStructuredText would take the underscore for a link."""
    lines[:] = [re.sub(r"^(:ivar \w+)_:", r"\1\\_:", line) for line in lines]


def setup(app):
    app.connect("missing-reference", resolve_private)
    app.connect("autodoc-skip-member", skip_aliases)
    app.connect("autodoc-process-docstring", keep_underscores, priority=600)  # after napoleon

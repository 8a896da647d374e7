"""Sphinx-Gallery over the scripts in examples/, as they are.

They are scripts of a command line: each has a `main`, writes its figures into the folder `--out`, and has a docstring
of plain text. So every script is given its arguments, its figures are taken from its folder, and its docstring gets the
title and the literal blocks that reStructuredText asks for.
"""

import ast
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

from sphinx_gallery import py_source_parser
from sphinx_gallery.scrapers import figure_rst

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
FULL = os.environ.get("DIFFLAYERS_GALLERY") == "full"
# Where the name of a file does not tell how the thing is written.
TITLES = {
    "bilevel_data_parallel": "Cleaning labels on several processes",
    "convex_relu_table": "Convex ReLU networks on four data sets",
    "diffusion_sorption": "Diffusion-sorption",
    "expert_parallel": "Experts on several processes",
    "few_shot_head": "Few-shot head",
    "few_shot_learning": "Few-shot learning",
    "generalized_sum_pool": "Generalized sum pooling",
    "hyper_cleaning": "Hyper-cleaning",
    "hyper_representation": "Hyper-representation",
    "instance_risk": "Instance-wise risk",
    "laplacian_clustering": "Laplacian clustering",
    "learned_proximal": "Learned proximal network",
    "mirror_sinkhorn": "Mirror Sinkhorn",
    "moreau_grad": "MoreauGrad",
    "navier_stokes": "Navier-Stokes",
    "net_trim": "Net-Trim",
    "plug_and_play": "Plug-and-play",
    "recycled_krylov": "Recycled Krylov subspaces",
    "self_label": "Self-labelling",
    "self_tuning": "Self-tuning",
    "sparse_newton": "Sparse Newton",
    "upgrad_digits": "UPGrad on digits",
}
QUICK_NOTE = """
.. note::

   Figure and numbers on this page are of a quick run (``--quick``), which shows that the example works and claims
   nothing. ``make gallery`` builds the page from the full run.
"""


def title_of(path):
    name = Path(path).stem.removeprefix("plot_")
    return TITLES.get(name, name.replace("_", " ").capitalize())


def as_rest(text):
    """Indented lines become blocks of code, and a bar or a final underscore means itself."""
    parts = re.split(r"\n\s*\n", text.strip("\n"))
    for k, part in enumerate(parts):
        if not part.startswith("    "):
            plain = re.split(r"(`+[^`]*`+)", part)
            plain[::2] = [re.sub(r"([|]|(?<=\w)_(?!\w))", r"\\\1", piece) for piece in plain[::2]]
            parts[k] = "".join(plain)
        else:
            language = "console" if re.match(r"\s*(python|torchrun) ", part) else "text"
            parts[k] = f".. code-block:: {language}\n\n{part}"
    return "\n\n".join(parts) + "\n"


def with_title(split):
    """`split` takes a script apart; its docstring comes back as reStructuredText with a title."""

    def titled(path):
        docstring, rest, line, node = split(path)
        title = title_of(path)
        note = "" if FULL or not Path(path).name.startswith("plot_") else QUICK_NOTE
        return f"{title}\n{'=' * len(title)}\n\n{as_rest(docstring)}{note}", rest, line, node

    return titled


def out_folder(script):
    return ROOT / "out/gallery" / Path(script).stem.removeprefix("plot_")


def arguments(gallery_conf, script_vars):
    """What stands behind the name of the script on the command line."""
    folder = out_folder(script_vars["src_file"])
    for old in folder.glob("*.png"):
        old.unlink()
    script_vars["example_globals"]["__doc__"] = ast.get_docstring(ast.parse(Path(script_vars["src_file"]).read_text()))
    return ["--out", os.path.relpath(folder, EXAMPLES)] + ["--quick"] * (not FULL)  # they run where they are


def figures(block, block_vars, gallery_conf):
    """The pictures that the script has written into its folder."""
    names = []
    for picture in sorted(out_folder(block_vars["src_file"]).glob("*.png"), key=lambda p: p.stat().st_mtime_ns):
        name = next(block_vars["image_path_iterator"])
        shutil.move(picture, name)
        names.append(name)
    return figure_rst(names, gallery_conf["src_dir"])


class Surroundings:
    """Each script starts as in a process of its own, and a warning ends it as it ends a test."""

    def __init__(self):
        self.filters = None

    def __call__(self, gallery_conf, path, when):
        import matplotlib
        import torch

        matplotlib.rcdefaults()
        matplotlib.use("agg")
        if when == "before":
            self.filters = warnings.filters[:]
            torch.manual_seed(0)
            torch.set_default_dtype(torch.float32)
            warnings.simplefilter("error")
            for message in ("`torch.jit.script", "__array__ implementation doesn't accept a copy keyword"):
                warnings.filterwarnings("ignore", message=message, category=DeprecationWarning)
        elif self.filters is not None:
            warnings.filters[:] = self.filters


surroundings = Surroundings()


def without_second_list(app, docname, source):
    """The header has the thumbnails by family, so those which Sphinx-Gallery puts behind it are left out."""
    if docname == "gallery/index":
        header, _, rest = source[0].partition(".. raw:: html\n\n  <div id='sg-tag-list'")
        source[0] = header + rest[rest.index(".. toctree::") :]


def setup(app):
    app.connect("source-read", without_second_list)
    py_source_parser._get_docstring_and_rest = with_title(py_source_parser._get_docstring_and_rest)
    sys.path.insert(0, str(ROOT))
    return {"parallel_read_safe": True}

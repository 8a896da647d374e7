"""Formulas as MathML, made when the pages are built: to read them takes no script, no font and no network.

A formula that cannot be converted is a warning, so it ends the build.
"""

from docutils import nodes
from math_core import LatexError, LatexToMathML
from sphinx.locale import _
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

LOGGER = logging.getLogger(__name__)
CONVERTER = LatexToMathML(annotation=True, fancy_error=False)


def convert(node, display):
    latex = node.astext().strip()
    if display and r"\\" in latex and not latex.startswith(r"\begin"):
        latex = rf"\begin{{aligned}}{latex}\end{{aligned}}"
    try:
        return CONVERTER.convert_with_local_state(latex, displaystyle=display)
    except LatexError as error:
        LOGGER.warning("formula %r: %s", latex, error, location=node)
        return f"<code>{nodes.unescape(latex)}</code>"


def visit_inline(translator, node):
    translator.body.append(f'<span class="math notranslate nohighlight">{convert(node, False)}</span>')
    raise nodes.SkipNode


def visit_block(translator, node):
    translator.body.append(translator.starttag(node, "div", CLASS="math notranslate nohighlight"))
    if node["number"]:
        translator.body.append(f'<span class="eqno">({get_node_equation_number(translator, node)})')
        translator.add_permalink_ref(node, _("Link to this equation"))
        translator.body.append("</span>")
    translator.body.append(convert(node, True) + "</div>\n")
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}

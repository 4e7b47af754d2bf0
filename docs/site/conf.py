"""Sphinx's settings for the website; `make docs` hands them the pages that experiments/website.py
lays out. Nothing is read from the network, neither here nor in a reader's browser."""

import importlib.util
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

project = "Unseen"
copyright = "the Unseen authors"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "Unseen"
ziamath = Path(importlib.util.find_spec("ziamath").origin).parent
html_static_path = ["style.css", str(ziamath / "fonts/STIXTwoMath-Regular.ttf")]
html_css_files = ["style.css"]
html_copy_source = False
html_math_renderer = "mathml"
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f5fa8", "color-brand-content": "#1f5fa8"},
    "dark_css_variables": {"color-brand-primary": "#7fb2ee", "color-brand-content": "#7fb2ee"},
}
pygments_style = "default"
pygments_dark_style = "github-dark"
smartquotes_action = "q"  # quotes alone: "--flag" must not get a dash
highlight_language = "none"  # most blocks are command lines and equations in plain text

# Pages are GitHub's Markdown: its anchors, its $...$, its ```math.
myst_heading_anchors = 4
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]


def write_math(writer, node, display):
    """An equation as MathML, which browsers draw themselves: no script, no fonts to fetch. What
    cannot be read as TeX is a warning, and so ends `make docs`."""
    try:
        text = tex2mathml(node.astext(), as_block=display)
        # Browsers put nothing between "log" and its argument; in "exp(x)" nothing is right.
        applied = r"<mo>&ApplyFunction;</mo>(?!\s*<mo[^>]*>\()"
        writer.body.append(re.sub(applied, '<mspace width="0.17em"></mspace>', text))
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


def write_inline(writer, node):
    write_math(writer, node, display=False)


def write_block(writer, node):
    write_math(writer, node, display=True)


def mark_sentences(app, doctree, page):
    """Mark cells of tables that hold more than a few words; style.css keeps them legible."""
    for cell in doctree.findall(nodes.entry):
        if len(cell.astext()) > 40:
            cell["classes"].append("sentence")


def let_long_words_break(app, page, template, context, doctree):
    """Paths in the text may break behind a slash or a double colon, and nowhere else."""
    if "body" in context:
        words = re.compile(r'(?<=<span class="pre">)[^<]{20,}(?=</span>)')
        context["body"] = words.sub(add_breaks, context["body"])


def add_breaks(word):
    return re.sub(r"(/|::)(?=.)", r"\1<wbr>", word[0])


def setup(app):
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(write_inline, None),
        block_renderers=(write_block, None),
    )
    app.connect("doctree-resolved", mark_sentences)
    app.connect("html-page-context", let_long_words_break)

"""The documentation site: ``make docs`` builds it from the pages as they are.

The source folder is that of the repository, so that links between ``docs`` and the pages above it
are the same here and on GitHub.
"""

import re

from sphinx.application import Sphinx

import aiohttp_smg_routing

project = "aiohttp_smg_routing"
project_copyright = "the authors of aiohttp_smg_routing"
release = version = aiohttp_smg_routing.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md"]
exclude_patterns = [".*", "build"]  # folders with many files, which Sphinx would search

html_theme = "furo"
html_title = project
# A site begins at index.html, and the first page is in a folder.
html_additional_pages = {"index": "redirect.html"}
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

myst_heading_anchors = 4  # the anchors that GitHub makes

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
add_module_names = False

# What is ours must be found. The names of others are not linked: that would need the network.
nitpicky = True
OTHERS = r"(aiohttp|asyncio|collections|contextlib|logging|os|pathlib|typing|uuid|yarl)\b.*"
nitpick_ignore_regex = [("py:.*", OTHERS)]
nitpick_ignore = [  # private names in the annotations of public ones
    ("py:class", "aiohttp_smg_routing.context.T"),
]


def add_navigation(app: Sphinx, docname: str, source: list[str]) -> None:
    """Make a table of contents of each list on the first page: GitHub shows no directive."""
    if docname == root_doc:
        for title, links in re.findall(r"^## (.+)\n\n((?:- .+\n)+)", source[0], re.MULTILINE):
            entries = re.findall(r"^- (\[.+?\])\((.+?)\)", links, re.MULTILINE)
            pages = "\n".join(f"{name[1:-1]} <{page}>" for name, page in entries)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {title}\n\n{pages}\n```\n"


def setup(app: Sphinx) -> None:
    """Join this to Sphinx."""
    app.connect("source-read", add_navigation)

"""Configuration of the documentation; build it with ``sphinx-build -W docs docs/_build``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "gn_transfer"
author = "The gn_transfer developers"
copyright = "the gn_transfer developers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "references"]
nb_execution_mode = "off"  # a test runs the notebook; the page shows its stored outputs
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_ext"]
html_theme = "furo"
html_title = "gn_transfer"
html_static_path = []
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_use_ivar = True
nitpicky = False
suppress_warnings = ["ref.python"]

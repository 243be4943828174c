"""Sphinx settings of lcq's documentation: `bash docs/build` makes docs/_build/html, and stops at any warning."""

import sys
from pathlib import Path

import lcq

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "lcq"
author = copyright = "lcq authors"
version = release = lcq.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "plain_docstrings", "face"]
exclude_patterns = ["_build", "_ext"]
templates_path: list[str] = []

html_theme = "furo"
html_title = "lcq"
html_show_sphinx = False

# Tutorials show the outputs that they were committed with; tests/test_readme.py runs them.
nb_execution_mode = "off"
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3
highlight_language = "text"

# What a namespace lists in `__all__` is what its page shows.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Attributes", "params_style"), "Source"]

"""Settings of the documentation."""

from __future__ import annotations

from importlib.metadata import version as installed

project = "annformer"
author = "the annformer developers"
copyright = "2026, the annformer developers"  # noqa: A001 - Sphinx reads this name
version = release = installed("annformer")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "jupyter_execute"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the examples
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_google_docstring = False

html_theme = "sphinx_book_theme"
html_title = "annformer"
html_theme_options = {"show_toc_level": 2}

"""The site: `pip install -e ".[docs]" && sphinx-build -W docs site`."""

import galore_jax

project = "galore_jax"
author = "the galore_jax authors"
version = release = galore_jax.__version__
html_title = "galore_jax"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3


# Names in single backquotes are code, as in the docstrings.
default_role = "code"
autodoc_typehints = "none"  # Args say what they are.
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "sphinx_book_theme"
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    # The sidebar has the search already.
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

"""The site: `sphinx-build -W -b html docs docs/_build/html`. Pages are Markdown, lessons are notebooks in Markdown."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE / "_build"
sys.path.insert(0, str(HERE / "_ext"))

# The installed package is documented; from a clone that is not installed, its source.
try:
    import spikeloom
except ModuleNotFoundError:
    sys.path.insert(0, str(HERE.parent / "src"))
    import spikeloom

project = "Spikeloom"
author = "the Spikeloom authors"
release = version = spikeloom.__version__
copyright = "the Spikeloom authors; Apache-2.0"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "docstrings",
    "lessons",
    "outside_links",
    "plots",
]
exclude_patterns = ["_build", "_ext", "pictures/*.py"]

# Markdown and notebooks


def kept_results() -> Path:
    """Where the results of notebooks are kept: a folder for each state of the library, of which only this one stays."""
    source = Path(spikeloom.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*.py")):
        digest.update(path.relative_to(source).as_posix().encode() + b"\0" + path.read_bytes())
    kept = BUILD / "jupyter_cache" / digest.hexdigest()[:16]
    kept.mkdir(parents=True, exist_ok=True)
    for other in kept.parent.iterdir():
        if other != kept:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
    return kept


myst_heading_anchors = 4  # the anchors that a repository's page has
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_dmath_allow_digits = False
nb_execution_mode = "cache"
nb_execution_cache_path = str(kept_results())
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True
math_renderer_options = {}

# reference

default_role = "literal"
autodoc_default_options = {"members": True}
autodoc_inherit_docstrings = False
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
add_module_names = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
viewcode_line_numbers = True

# HTML

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = "Spikeloom"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
templates_path = []
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True

os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")

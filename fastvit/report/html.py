"""Self-contained HTML pages, rendered by Jinja from `templates/*.html`.

All values are escaped unless they are Markup. `templates/base.html` has the style sheet and a content security policy
that forbids the browser to load anything and to run any script other than `templates/copy.js`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import re
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from PIL import Image, ImageOps

from fastvit.data.images import convert_to_rgb
from fastvit.report.classification import format_percent, replace_unprintable

MAX_NAME_LENGTH = 80


def render_template(template: str, **values: Any) -> str:
    """Render a page.

    Args:
        template: a file name in `templates/`.
        **values: the template's variables, escaped unless they are Markup.

    Returns:
        HTML that can be encoded as UTF-8.
    """
    rendered = _build_environment().get_template(template).render(**values)
    return rendered.encode("utf-8", "replace").decode()  # file names may contain lone surrogates


@functools.cache
def _build_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fastvit.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": format_percent,
        "thumbnail": encode_thumbnail,
        "shorten": shorten,
        "insert_breaks": insert_breaks,
    }
    script = (Path(__file__).parent / "templates" / "copy.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment.globals |= {"copy_script": Markup(script), "copy_script_hash": f"sha256-{digest}"}
    return environment


def shorten(text: object, length: int = MAX_NAME_LENGTH) -> str:
    """Format text as one line of at most `length` printable characters."""
    line = replace_unprintable(str(text))
    return line if len(line) <= length else line[: length - 1] + "…"


def insert_breaks(text: str) -> Markup:
    """Escape a name and allow line breaks after its underscores and hyphens."""
    return Markup(re.sub("([_-])", r"\1<wbr>", str(escape(text))))


def encode_thumbnail(image: Image.Image, side: int) -> str:
    """Encode an image as a data URI, reduced to at most `side` pixels in height and width."""
    image = convert_to_rgb(image)
    if max(image.size) > side:
        image = ImageOps.contain(image, (side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()

"""/docs: the administration's endpoints on one page, drawn from /openapi.json."""

from pathlib import Path
from typing import Any

import jinja2
from starlette.responses import Response

from gateway.page.frame import HEADERS

_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)


def documents(schema: dict[str, Any]) -> Response:
    """schema: an OpenAPI document."""
    text = _TEMPLATES.get_template("documents.html").render(schema=schema)
    return Response(text, headers=HEADERS, media_type="text/html")

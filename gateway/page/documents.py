"""/docs: the administration's endpoints on one page, drawn from /openapi.json."""

from typing import Any

from starlette.responses import Response

from gateway.page.layout import HEADERS, TEMPLATES


def documents(schema: dict[str, Any]) -> Response:
    """schema: an OpenAPI document."""
    text = TEMPLATES.get_template("documents.html").render(schema=schema)
    return Response(text, headers=HEADERS, media_type="text/html")

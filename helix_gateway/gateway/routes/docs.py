"""`/openapi.json`: what every route takes and answers, for programs.

Knows nothing about what the document says.
"""

from typing import Any

from aiohttp import web

from helix_gateway.gateway.route import JSON, Response, Route
from helix_gateway.gateway.state import API, in_worker


async def openapi(request: web.Request) -> web.Response:
    """The document; made at the first call, in a worker thread."""
    api = request.app[API]
    return web.Response(body=await in_worker(request, lambda: api.json), content_type=JSON)


ROUTES = (
    Route(
        method="GET",
        path="/openapi.json",
        handler=openapi,
        tag="Server",
        summary="This description",
        open=True,
        responses=(Response(description="An OpenAPI 3.1 document.", schema=dict[str, Any]),),
    ),
)

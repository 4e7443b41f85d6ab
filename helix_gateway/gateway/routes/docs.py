"""`/openapi.json`, and `/docs`: a page that shows it and lets people try what it describes.

The page and what it loads lie in `gateway/pages/` and come from this server alone; its policy forbids a browser to
ask anybody else.  Knows nothing about what the document says.
"""

import re
from importlib import resources
from typing import Any

from aiohttp import web

from helix_gateway.gateway.route import HTML, JSON, Response, Route
from helix_gateway.gateway.state import API, in_worker

ASSETS = {"docs.css": "text/css", "docs.js": "text/javascript", "icon.svg": "image/svg+xml"}
"""What the page loads, with media types."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}

_pages = resources.files("helix_gateway.gateway").joinpath("pages")
_files = {name: _pages.joinpath(name).read_bytes() for name in ("docs.html", *ASSETS)}


async def openapi(request: web.Request) -> web.Response:
    """The document; made at the first call, in a worker thread."""
    api = request.app[API]
    return web.Response(body=await in_worker(request, lambda: api.json), content_type=JSON)


async def docs(request: web.Request) -> web.Response:
    """The page."""
    return web.Response(body=_files["docs.html"], content_type=HTML, charset="utf-8", headers=HEADERS)


async def docs_asset(request: web.Request) -> web.Response:
    """What the page loads."""
    name = request.match_info["asset"]
    return web.Response(body=_files[name], content_type=ASSETS[name], charset="utf-8", headers=HEADERS)


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
    Route(
        method="GET",
        path="/docs",
        handler=docs,
        tag="Server",
        summary="This description as a page, to read and to try",
        open=True,
        responses=(Response(description="The page.", media_type=HTML),),
    ),
    Route(
        method="GET",
        path=f"/docs/{{asset:{'|'.join(map(re.escape, ASSETS))}}}",
        handler=docs_asset,
        tag="Server",
        summary="What the page loads",
        open=True,
        parameters={"asset": f"One of {', '.join(ASSETS)}."},
        responses=tuple(Response(description="The file.", media_type=kind) for kind in ASSETS.values()),
        errors=(404,),
    ),
)

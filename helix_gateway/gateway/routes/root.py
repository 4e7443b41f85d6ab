"""`GET /`: what this is and where things are, for people (HTML) and for programs (JSON).

Knows nothing about the routes but their names.
"""

from html import escape

from aiohttp import web

from helix_gateway.gateway.exchange import answer_json
from helix_gateway.gateway.route import HTML, Response, Route
from helix_gateway.gateway.schemas.answers import FrontPage
from helix_gateway.gateway.state import API, models_of

WHAT = "Helix, an OpenAI-compatible server for language models"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Helix</title>
<style>body{{font-family:system-ui,sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem;line-height:1.5}}
code{{background:#8882;padding:.1em .3em;border-radius:.2em}}</style></head>
<body><h1>Helix</h1><p>{what}. Point any OpenAI client at <code>{base}/v1</code>; any key will do where none is set.
<a href="/docs">What every route takes and answers</a>, to read and to try.</p>
<p>Models served: {models}</p><table>{rows}</table></body></html>
"""


async def root(request: web.Request) -> web.Response:
    """HTML where the client asks for it, JSON otherwise."""
    names = models_of(request).names
    endpoints = {f"{route.method} {route.told_path}": route.summary for route in request.app[API].routes}
    if "text/html" in request.headers.get("Accept", ""):
        return web.Response(text=_page(str(request.url.origin()), names, endpoints), content_type="text/html")
    body: FrontPage = {"name": "helix", "what": WHAT, "models": names, "endpoints": endpoints, "base_url": "/v1"}
    return answer_json(body)


def _page(base: str, names: list[str], endpoints: dict[str, str]) -> str:
    models = ", ".join(f"<code>{escape(name)}</code>" for name in names)
    rows = "".join(
        f"<tr><td><code>{escape(route)}</code></td><td>{escape(use)}</td></tr>" for route, use in endpoints.items()
    )
    return _PAGE.format(what=WHAT, base=escape(base), models=models, rows=rows)


ROUTES = (
    Route(
        method="GET",
        path="/",
        handler=root,
        tag="Server",
        open=True,
        summary="What this is and where things are",
        responses=(
            Response(description="JSON, or HTML for browsers.", schema=FrontPage),
            Response(description="The same as a page.", media_type=HTML),
        ),
    ),
)

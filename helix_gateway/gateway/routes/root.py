"""`GET /`: what this is and where things are, for people (HTML) and for programs (JSON).

Knows nothing about the routes but their names.
"""

from html import escape

from aiohttp import web

from helix_gateway.gateway.chunks import to_json
from helix_gateway.gateway.state import models_of

ENDPOINTS = {
    "POST /v1/chat/completions": "chat, streaming or not",
    "POST /v1/completions": "plain text completion",
    "POST /generate": "one text and how it was made, streaming or not",
    "POST /generate/stream": "the same as a stream",
    "GET /v1/models": "what is served",
    "GET /health": "200 while the process lives",
    "GET /ready": "200 when a request would be served now",
    "GET /metrics": "figures for Prometheus",
}
WHAT = "Helix, an OpenAI-compatible server for language models"

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Helix</title>
<style>body{{font-family:system-ui,sans-serif;max-width:42rem;margin:3rem auto;padding:0 1rem;line-height:1.5}}
code{{background:#8882;padding:.1em .3em;border-radius:.2em}}</style></head>
<body><h1>Helix</h1><p>{what}. Point any OpenAI client at <code>{base}/v1</code>; any key will do where none is set.</p>
<p>Models served: {models}</p><table>{rows}</table></body></html>
"""


async def root(request: web.Request) -> web.Response:
    """HTML where the client asks for it, JSON otherwise."""
    names = models_of(request).names
    if "text/html" in request.headers.get("Accept", ""):
        return web.Response(text=_page(str(request.url.origin()), names), content_type="text/html")
    body = {"name": "helix", "what": WHAT, "models": names, "endpoints": ENDPOINTS, "base_url": "/v1"}
    return web.Response(body=to_json(body), content_type="application/json")


def _page(base: str, names: list[str]) -> str:
    models = ", ".join(f"<code>{escape(name)}</code>" for name in names)
    rows = "".join(f"<tr><td><code>{escape(route)}</code></td><td>{use}</td></tr>" for route, use in ENDPOINTS.items())
    return _PAGE.format(what=WHAT, base=escape(base), models=models, rows=rows)

"""`/metrics`: the server's figures for Prometheus.

Needs no key: scrapers have none, and nothing of anybody's text is in it.  Knows nothing about what is counted, but for
the state of each engine, which is asked for when somebody looks.
"""

from typing import get_args

from aiohttp import hdrs, web

from helix_gateway.gateway.route import OPENMETRICS, TEXT, Response, Route
from helix_gateway.gateway.state import METRICS, models_of
from helix_gateway.service.api import ServiceState
from helix_gateway.telemetry.catalogue import ENGINE_STATE

_STATES: tuple[ServiceState, ...] = get_args(ServiceState)


async def scrape(request: web.Request) -> web.Response:
    """All metrics, in Prometheus' text format or as OpenMetrics, as the scraper prefers."""
    metrics = request.app[METRICS]
    for model in models_of(request).models:
        for state in _STATES:
            metrics.gauge(ENGINE_STATE, model.name, state).set(state == model.service.state)
    body, content_type = metrics.render(request.headers.get(hdrs.ACCEPT, ""))
    return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})


ROUTES = (
    Route(
        method="GET",
        path="/metrics",
        handler=scrape,
        tag="Server",
        summary="Figures for Prometheus",
        open=True,
        responses=(
            Response(description="All figures, in the format that the scraper prefers.", media_type=TEXT),
            Response(description="The same as OpenMetrics.", media_type=OPENMETRICS),
        ),
    ),
)

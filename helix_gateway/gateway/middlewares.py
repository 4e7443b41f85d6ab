"""What happens around every request: its id and log line, errors into OpenAI's shape, browsers, keys.

Plain functions, outermost first in `middlewares`; headers that every response carries are added as it is
prepared, so that streams have them too.  Knows nothing about what routes do.
"""

import asyncio
import re

import structlog
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from helix_gateway.gateway.drain import count_and_drain
from helix_gateway.gateway.errors import ApiError, to_api_error
from helix_gateway.gateway.limits.middleware import limit_rate, limit_time
from helix_gateway.gateway.origins import host_allowed, origin_allowed
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.gateway.state import (
    API,
    DRAIN,
    KEYS,
    METRICS,
    TRACER,
    RequestContext,
    attach_context,
    context_of,
    new_request_id,
    settings_of,
)
from helix_gateway.gateway.traces import traced
from helix_gateway.telemetry.catalogue import HTTP_REQUESTS

EXPOSED_HEADERS = (
    "x-request-id, retry-after, retry-after-ms, x-should-retry, openai-processing-ms, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens, "
    "x-helix-ignored-fields, x-helix-clamped, x-helix-seed"
)
PREFLIGHT_AGE_S = 600
PROBES = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines."""

_sane_id = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_header_names = re.compile(r"[A-Za-z0-9_, -]{0,2000}")
_log = structlog.get_logger("helix.access")


@web.middleware
async def identify_and_log(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give the request its id, and one log line when it is done, however it ends."""
    context = RequestContext(_request_id(request.headers.get("x-request-id")))
    attach_context(request, context)
    status = 499
    """What the log says where the client left before it had an answer."""
    try:
        response = await handler(request)
        status = response.status
        return response
    except asyncio.CancelledError:
        status = context.answered_status or status
        raise
    finally:
        _count_request(request, status)
        _trace_request(request, context, status)
        _log_request(request, context, status)


def _request_id(sent: str | None) -> str:
    return sent if sent is not None and _sane_id.fullmatch(sent) else new_request_id()


def _count_request(request: web.Request, status: int) -> None:
    # A series for each method and route that there is, not one for whatever somebody tries.
    method = request.method if request.method in hdrs.METH_ALL else "other"
    request.app[METRICS].counter(HTTP_REQUESTS, method, _route(request), str(status)).inc()


def _route(request: web.Request) -> str:
    resource = request.match_info.route.resource
    if resource is None:
        return "other"
    return resource.canonical.rstrip("/").removeprefix("/v1") or "/"


def _trace_request(request: web.Request, context: RequestContext, status: int) -> None:
    tracer = request.app.get(TRACER)
    if tracer is None or bare_path(request) in PROBES:
        return
    context.log["trace_id"] = tracer.record(traced(request, context, route=_route(request), status=status))


def _log_request(request: web.Request, context: RequestContext, status: int) -> None:
    # Probes come every few seconds, and a 503 while loading is what they ask for.
    quiet = bare_path(request) in PROBES and status in (200, 503)
    # A server that is loading or stopping, and an answer that took too long, are no faults.
    fault = status >= 500 and status not in (503, 504)
    log = _log.debug if quiet else _log.error if fault else _log.info
    log(
        "request",
        request_id=context.request_id,
        method=request.method,
        path=request.path[:200],
        status=status,
        duration_ms=round(context.elapsed_ms, 1),
        **context.log,
    )


def bare_path(request: web.Request) -> str:
    """A route's path without ``/v1`` before it and a slash behind it."""
    return request.path.rstrip("/").removeprefix("/v1")


@web.middleware
async def shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into OpenAI's error body."""
    try:
        return await handler(request)
    except web.HTTPNotFound:
        api_error = _no_route(request)
        context_of(request).note_error(api_error, api_error)
        return api_error.response()
    except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer and the log the rest
        context, retry_after_s = context_of(request), settings_of(request).retry_after_s
        api_error = to_api_error(error, request_id=context.request_id, retry_after_s=retry_after_s)
        context.note_error(error, api_error)
        return api_error.response()


def _no_route(request: web.Request) -> ApiError:
    served = ", ".join(f"POST {route.path}" for route in request.app[API].routes if route.method == "POST")
    return ApiError.no_route(
        f"{request.method} {request.path[:200]} is not a route of this server. Text is made by {served}; "
        "GET / lists all routes."
    )


@web.middleware
async def guard_browsers(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Check Host and Origin, and answer preflights on every route, existing or not."""
    settings = settings_of(request)
    host, origin = request.headers.get("Host"), request.headers.get("Origin")
    if not host_allowed(host, settings.host, settings.allowed_hosts):
        raise ApiError.forbidden(
            "This server listens on loopback and does not answer to that Host; see --allowed-hosts.",
            code="host_not_allowed",
        )
    if origin is None:
        return await handler(request)
    if not origin_allowed(origin, host, settings.allowed_origins, settings.allowed_hosts):
        raise ApiError.forbidden(
            f"Pages of the origin {origin[:100]} may not use this server; see --allowed-origins.",
            code="origin_not_allowed",
        )
    context_of(request).headers.update(_cors_headers(origin))
    if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
        return web.Response(status=204, headers=_preflight_headers(request))
    return await handler(request)


def _cors_headers(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": EXPOSED_HEADERS,
    }


def _preflight_headers(request: web.Request) -> dict[str, str]:
    wanted = request.headers.get("Access-Control-Request-Headers", "")
    headers = {
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": wanted if wanted and _header_names.fullmatch(wanted) else "*",
        "Access-Control-Max-Age": str(PREFLIGHT_AGE_S),
    }
    if request.headers.get("Access-Control-Request-Private-Network") == "true":
        headers["Access-Control-Allow-Private-Network"] = "true"
    return headers


@web.middleware
async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Let in whoever has a key, where any is set."""
    keys = request.app[KEYS]
    if not len(keys) or request.match_info.handler in request.app[API].open_handlers:
        return await handler(request)
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not sent.strip():
        raise ApiError.unauthorized("A key is needed: send it as `Authorization: Bearer KEY`.")
    name = keys.name_of(sent.strip())
    if name is None:
        raise ApiError.unauthorized("The key is wrong.")
    context = context_of(request)
    context.key_name = context.log["api_key"] = name
    return await handler(request)


async def add_headers(request: web.Request, response: web.StreamResponse) -> None:
    """What every response carries; a signal of aiohttp's, called before the head is sent."""
    context, headers = context_of(request), response.headers
    for name, value in context.headers.items():
        # A refusal may know better what is left.
        headers.setdefault(name, value)
    if request.app[DRAIN].draining:
        response.force_close()
        headers["Connection"] = "close"  # aiohttp has settled that header by now
    # Also where no page asked: what a browser keeps of that answer must not be handed to a page.
    headers.setdefault("Vary", "Origin")
    headers["Server"] = "helix"
    headers["x-request-id"] = context.request_id
    headers["openai-processing-ms"] = str(round(context.elapsed_ms))


def middlewares(settings: GatewaySettings) -> tuple[Middleware, ...]:
    """The middlewares of such a gateway, outermost first: what is not asked of it stands in no request's way."""
    has_keys = settings.api_keys or settings.api_key_file is not None
    limits = (settings.rate_limit, settings.token_rate_limit, settings.concurrency_limit)
    return (
        *(identify_and_log, shape_errors, guard_browsers, count_and_drain),
        *((authenticate,) if has_keys else ()),
        *((limit_rate,) if any(limit is not None for limit in limits) else ()),
        *((limit_time,) if settings.request_timeout_s is not None else ()),
    )

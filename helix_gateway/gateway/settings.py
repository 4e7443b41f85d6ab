"""Where the gateway listens and whom it serves.

Knows nothing about engines; their settings are in `service/settings.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """The HTTP side of `helix serve`."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0: any free one; what was chosen is printed."""
    api_keys: tuple[str, ...] = ()
    """Empty: any key, or none, is fine."""
    api_key_file: str | None = None
    """A file of more keys, ``name: key`` a line; read again on SIGHUP."""
    served_model_names: tuple[str, ...] = ()
    """Every name that clients may ask for where one model is served; the first is what answers say."""
    default_max_tokens: int | None = None
    """Bound on a chat answer whose request names no max_tokens; None: the end of the context."""
    max_body_bytes: int = 32 * 1024 * 1024
    rate_limit: int | None = None
    """Requests a minute for each key; where no keys are set, for all together."""
    token_rate_limit: int | None = None
    """Tokens a minute, of prompts and answers, for each key."""
    concurrency_limit: int | None = None
    """Requests at once for each key."""
    request_timeout_s: float | None = None
    """How long one request may take, from its head to the end of its answer."""
    ping_interval_s: float = 15.0
    """Silence on a stream after which a comment is sent, so that proxies keep the connection."""
    allowed_origins: tuple[str, ...] = ()
    """Besides loopback origins and the schemes of desktop apps; ``*`` allows every origin."""
    allowed_hosts: tuple[str, ...] = ()
    """Host names, besides loopback ones, that a request may carry when listening on loopback (``*``: any), and
    whose own pages may call."""
    retry_after_s: float = 2.0
    """What clients are told to wait while the engine is down."""
    drain_timeout_s: float = 30.0
    """How long running answers may go on once the server was told to stop."""
    shutdown_timeout_s: float = 5.0
    """How long those that are cut off then may take to say so."""
    log_prompts: bool = False
    """Whether the log may hold what was asked."""
    otlp_endpoint: str | None = None
    """Where spans of requests go; None: where OpenTelemetry's own variables say, if they do."""
    worker_threads: int = 2
    """Threads that parse and tokenise what is too long for the event loop."""

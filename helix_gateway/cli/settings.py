"""Every setting of `helix serve`: its name, type, bounds, help and default, in one class.

Flags, `HELIX_…` variables, the keys of a TOML file, and the tables of the documents are all read off these fields
(`options.py`, `sources.py`).  Imported for ``helix --help``, so nothing heavy is; knows nothing about where a value
comes from.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, get_args

import msgspec
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from helix_gateway.cli.sizes import parse_size
from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.gateway.settings import GatewaySettings
from helix_gateway.service.settings import (
    MAX_DEPTH,
    DeviceName,
    DTypeName,
    EngineSettings,
    KVDTypeName,
    QuantizationName,
    SpeculationName,
)
from helix_gateway.service.speculative_config import read_speculative_config
from helix_gateway.telemetry.settings import LogFormat, LogLevel, LogSettings

_ENGINE = EngineSettings(model_path="")
_GATEWAY = GatewaySettings()
_LOG = LogSettings()
_LARGEST_SEED = 2**64 - 1
_MOST_TOKENS = 2**31 - 1
_MOST_A_MINUTE = 10**9
_MOST_MEMORY_BYTES = 2**50
_LARGEST_BODY_BYTES = 2**40


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _one_or_several(value: object) -> object:
    """A single string is a list of the names in it, parted by commas: how variables hold lists."""
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


def _one_key(value: object) -> object:
    """A key may hold commas."""
    return [value] if isinstance(value, str) else value


def _url(value: str) -> str:
    if not value.startswith(("http://", "https://")):
        raise PydanticCustomError("url", "must begin with http:// or https://")
    return value


def _json(value: object) -> object:
    """A TOML file has a table where a flag has JSON."""
    return json.dumps(value) if isinstance(value, dict) else value


def _speculative_config(value: str) -> str:
    try:
        read_speculative_config(value)
    except InvalidRequestError as error:
        raise PydanticCustomError("speculative_config", "{problem}", {"problem": str(error)}) from None
    return value


Size = Annotated[int, BeforeValidator(_size)]
"""Bytes; written as a number or like 2GiB."""
Url = Annotated[str, AfterValidator(_url)]
SpeculativeObject = Annotated[str, BeforeValidator(_json), AfterValidator(_speculative_config)]
Names = Annotated[list[str], BeforeValidator(_one_or_several)]
Keys = Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(_one_key)]


def _setting(
    default: Any,
    text: str,
    *,
    metavar: str | None = None,
    unset: str | None = None,
    secret: bool = False,
    **bounds: Any,
) -> Any:
    """One setting.

    Args:
        default: its value where nobody says otherwise.
        text: what it means, for a person.
        metavar: how a value is shown in the help, where its type does not tell.
        unset: what holds where it is None or empty.
        secret: whether its value is never shown.
        bounds: pydantic's ``ge``, ``gt``, ``le``, ``lt``.
    """
    extra: dict[str, Any] = {"metavar": metavar, "unset": unset, "secret": secret}
    return Field(default, description=text, json_schema_extra=extra, **bounds)


class ServeSettings(BaseModel):
    """What `helix serve` is told."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    model: str | None = _setting(
        None,
        "A GGUF file, a folder in Hugging Face layout, or a hub id (org/name).",
        unset="SmolLM2-135M-Instruct, downloaded once",
    )
    host: str = _setting(_GATEWAY.host, "Address to listen on.")
    port: int = _setting(_GATEWAY.port, "Port to listen on; 0 picks a free one.", ge=0, le=65535)
    api_key: Keys = _setting(
        [], "Key that clients must send; may be given several times.", metavar="KEY", unset="any will do", secret=True
    )
    api_key_file: str | None = _setting(
        None,
        "File of keys, one a line, as `name: key` or `key`; logs tell the name. Read again on SIGHUP.",
        metavar="FILE",
        unset="none",
    )
    served_model_name: Names = _setting(
        [],
        "Name that clients ask for; may be given several times, answers carry the first.",
        metavar="NAME",
        unset="the model's own name",
    )
    dtype: DTypeName = _setting(
        _ENGINE.dtype,
        "What weights are computed in; auto takes the fastest: on a CPU what --quantization says, else the file's own.",
    )
    quantization: QuantizationName = _setting(
        _ENGINE.quantization,
        "What weights become on a CPU; auto keeps a GGUF's blocks, else takes int8, unless --dtype asks for another.",
    )
    device: DeviceName = _setting(_ENGINE.device, "Where to compute; auto takes the best there is.")
    max_model_len: int | None = _setting(
        None,
        "Tokens of prompt and answer together.",
        unset="what the model and memory hold",
        ge=2,
        le=_MOST_TOKENS,
    )
    max_num_seqs: int = _setting(_ENGINE.max_num_seqs, "Sequences computed in one step.", ge=1, le=4096)
    max_num_batched_tokens: int | None = _setting(
        None,
        "Tokens computed in one step; longer prompts are computed in chunks.",
        unset="what suits the device",
        ge=1,
        le=1_000_000,
    )
    block_size: int = _setting(_ENGINE.block_size, "Tokens in one block of the KV cache.", ge=1, le=1024)
    kv_cache_memory: Size | None = _setting(
        None,
        "Memory of the KV cache, like 2GiB or 512MB.",
        metavar="SIZE",
        unset="a share of what is free",
        ge=1,
        le=_MOST_MEMORY_BYTES,
    )
    kv_cache_dtype: KVDTypeName = _setting(
        _ENGINE.kv_cache_dtype,
        "What keys and values are stored in; auto takes what --dtype asks for, else int8 beside quantised weights.",
    )
    enable_prefix_caching: bool = _setting(
        _ENGINE.enable_prefix_caching, "Find the KV of prompts that begin alike instead of computing it again."
    )
    seed: int | None = _setting(
        None, "Where the seeds of requests that bring none come from.", unset="the system", ge=0, le=_LARGEST_SEED
    )
    batch_window_ms: float = _setting(
        _ENGINE.batch_window_ms,
        "How long an idle engine may wait for company before its first step.",
        ge=0.0,
        le=10_000.0,
    )
    max_queue_len: int = _setting(
        _ENGINE.max_queue_len,
        "Sequences that may wait for their turn; more are refused with a 429.",
        ge=0,
        le=1_000_000,
    )
    speculation: SpeculationName = _setting(
        _ENGINE.speculation,
        "Who drafts tokens that are then verified together: `auto` whoever pays, `suffix` only what is read off known "
        "text, `model` only the draft model, `self` only the model's own weights at fewer bits (float weights on a CPU), "
        "`off` nobody. Where kernels keep rows apart, as on a CPU, it never changes an answer.",
    )
    draft_model: str | None = _setting(
        None,
        "A smaller model that drafts where that pays; as MODEL, of any vocabulary that can be translated.",
        metavar="MODEL",
        unset="none",
    )
    max_depth: int = _setting(_ENGINE.max_depth, "Most tokens drafted for a sequence at a step.", ge=0, le=MAX_DEPTH)
    min_depth: int = _setting(
        _ENGINE.min_depth, "Drafted tokens verified at least, whether it pays or not; for tests.", ge=0, le=MAX_DEPTH
    )
    speculative_config: SpeculativeObject | None = _setting(
        None,
        "Speculation as other servers are told of it: a JSON object of method (draft_model, ngram or suffix), model and "
        "num_speculative_tokens, in place of the options above.",
        metavar="JSON",
        unset="none",
    )
    rate_limit: int | None = _setting(
        None,
        "Requests a minute for each key (for all together where no key is set).",
        unset="none",
        ge=1,
        le=_MOST_A_MINUTE,
    )
    token_rate_limit: int | None = _setting(
        None, "Tokens a minute for each key, of prompts and answers together.", unset="none", ge=1, le=_MOST_A_MINUTE
    )
    concurrency_limit: int | None = _setting(
        None, "Requests at once for each key.", unset="none", ge=1, le=_MOST_A_MINUTE
    )
    request_timeout: float | None = _setting(
        None,
        "Seconds that one request may take until the end of its answer.",
        unset="none",
        gt=0.0,
        le=86_400.0,
    )
    drain_timeout: float = _setting(
        _GATEWAY.drain_timeout_s,
        "Seconds that what is in flight may go on once the server was told to stop.",
        ge=0.0,
        le=86_400.0,
    )
    max_body_size: Size = _setting(
        _GATEWAY.max_body_bytes,
        "Largest body of a request, like 32MiB.",
        metavar="SIZE",
        ge=1024,
        le=_LARGEST_BODY_BYTES,
    )
    default_max_tokens: int | None = _setting(
        None, "Bound on chat answers that name none.", unset="the end of the context", ge=1, le=_MOST_TOKENS
    )
    allowed_origins: Names = _setting(
        [],
        "Origin of a web page that may call, or *; may be given several times.",
        metavar="ORIGIN",
        unset="pages on this machine and desktop apps",
    )
    allowed_hosts: Names = _setting(
        [],
        "Host name that clients may call this machine by while it listens on loopback; may be given several times.",
        metavar="HOST",
        unset="localhost and loopback addresses",
    )

    log_level: LogLevel = _setting(_LOG.level, "Least important lines that are logged.")
    log_format: LogFormat = _setting(
        _LOG.format, "How lines are logged; auto: for people where stderr is a terminal, else JSON."
    )
    log_file: str | None = _setting(None, "File to log to, at its end.", metavar="FILE", unset="stderr")
    log_prompts: bool = _setting(_GATEWAY.log_prompts, "Log what was asked, word for word.")
    otlp_endpoint: Url | None = _setting(
        _GATEWAY.otlp_endpoint,
        "Collector that spans of requests are sent to over HTTP, like http://localhost:4318.",
        metavar="URL",
        unset="what OTEL_EXPORTER_OTLP_ENDPOINT says, or none",
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_is_a_number(cls, value: object, info: ValidationInfo) -> object:
        """Pydantic would read ``port = true`` as port 1."""
        assert info.field_name is not None
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation is not bool:
            raise PydanticCustomError("boolean", "must not be true or false")
        return value

    @field_validator("min_depth")
    @classmethod
    def _not_beyond_the_most(cls, value: int, info: ValidationInfo) -> int:
        if value > (most := info.data.get("max_depth", value)):
            problem = f"must be at most max_depth, which is {most}; it is {value}"
            raise PydanticCustomError("depths_crossed", "{problem}", {"problem": problem})
        return value

    @field_validator("speculative_config")
    @classmethod
    def _says_it_once(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            for name, said in msgspec.structs.asdict(read_speculative_config(value)).items():
                plain = info.data.get(name)
                if said is not None and plain not in {said, cls.model_fields[name].default}:
                    problem = f"says {name} {said!r} where {name} is set to {plain!r}: leave out one of them"
                    raise PydanticCustomError("said_twice", "{problem}", {"problem": problem})
        return value

    def spoken(self) -> "ServeSettings":
        """The same, with what ``speculative_config`` says in the plain settings."""
        if self.speculative_config is None:
            return self
        said = msgspec.structs.asdict(read_speculative_config(self.speculative_config))
        return self.model_copy(
            update={name: value for name, value in said.items() if value is not None} | {"speculative_config": None}
        )

    def gateway(self, model_name: str) -> GatewaySettings:
        """The HTTP side; ``model_name`` is the model's own name."""
        names = tuple(self.served_model_name or [model_name])
        return GatewaySettings(
            **self._of(tuple(field.name for field in fields(GatewaySettings))),
            api_keys=tuple(self.api_key),
            max_body_bytes=self.max_body_size,
            request_timeout_s=self.request_timeout,
            drain_timeout_s=self.drain_timeout,
            served_model_names=names,
        )

    def engine(self, model_path: str, draft_model_path: str | None = None) -> EngineSettings:
        """The engine's side, with models that lie on this machine."""
        if self.speculative_config is not None:
            return self.spoken().engine(model_path, draft_model_path)
        return EngineSettings(
            **self._of(EngineSettings.__struct_fields__),
            model_path=model_path,
            draft_model_path=draft_model_path,
            kv_cache_memory_bytes=self.kv_cache_memory,
            log=LogSettings(level=self.log_level, format=self.log_format, file=self.log_file),
        )

    def _of(self, names: tuple[str, ...]) -> Mapping[str, Any]:
        """The settings of those names, lists as tuples."""
        shared = {name: getattr(self, name) for name in names if name in type(self).model_fields}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in shared.items()}


def note(name: str, kind: str) -> Any:
    """What a field says about itself beside pydantic's own: ``metavar``, ``unset`` or ``secret``."""
    extra = ServeSettings.model_fields[name].json_schema_extra
    return extra.get(kind) if isinstance(extra, dict) else None


def choices_of(name: str) -> tuple[str, ...]:
    """The values that a setting of few values may have; empty for the others."""
    values = get_args(ServeSettings.model_fields[name].annotation)
    return values if values and all(isinstance(value, str) for value in values) else ()

"""Which models are served, under which names.

Knows nothing about HTTP beyond the error that an unknown name becomes.
"""

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from helix_gateway import __version__
from helix_gateway.core.errors import EngineUnavailableError
from helix_gateway.gateway.errors import ApiError
from helix_gateway.gateway.token_texts import TokenTexts
from helix_gateway.service.api import ModelService


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One service with the name that answers give it."""

    name: str
    service: ModelService
    texts: TokenTexts
    created: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    @property
    def fingerprint(self) -> str:
        """OpenAI's ``system_fingerprint``: the same for as long as model and version are."""
        return _fingerprint(self.name)


@lru_cache(maxsize=64)
def _fingerprint(name: str) -> str:
    return "fp_" + hashlib.sha256(f"{name} {__version__}".encode()).hexdigest()[:12]


class ModelRegistry:
    """Names to models; several names of one service are aliases, the first of them is what answers say."""

    def __init__(self, models: Mapping[str, ModelService], names: Sequence[str] = ()) -> None:
        """``names`` stand in for the mapping's keys where one service is served."""
        services = {id(service): service for service in models.values()}
        if names and len(services) == 1:
            models = dict.fromkeys(names, next(iter(services.values())))
        served: dict[int, ServedModel] = {}
        for name, service in models.items():
            served.setdefault(id(service), ServedModel(name, service, TokenTexts(service)))
        self._by_name = {name: served[id(service)] for name, service in models.items()}

    @property
    def models(self) -> list[ServedModel]:
        """Each model once."""
        return list({id(model): model for model in self._by_name.values()}.values())

    @property
    def names(self) -> list[str]:
        """Every name that a request may give."""
        return list(self._by_name)

    @property
    def longest_context(self) -> int | None:
        """Tokens that the model with the longest context holds; None before one is ready."""
        ready = (model.service for model in self.models if model.service.state == "ready")
        return max((service.max_model_len for service in ready), default=None)

    def resolve(self, name: str) -> ServedModel:
        """The model of that name; no name means the one that is served, where it is only one.

        Raises:
            ApiError: 404 ``model_not_found``.
        """
        if model := self._by_name.get(name):
            return model
        if not name and len(models := self.models) == 1:
            return models[0]
        served = ", ".join(f"`{known}`" for known in self._by_name)
        if name:
            raise ApiError.model_not_found(f"There is no model `{name[:200]}` on this server. It serves: {served}.")
        raise ApiError.model_not_found(f"The request names no model, and this server has several: {served}.")

    def resolve_ready(self, name: str) -> ServedModel:
        """The same, of a model that would serve a call now.

        Raises:
            ApiError: 404 ``model_not_found``.
            EngineUnavailableError: it is loading, restarting or gone.
        """
        model = self.resolve(name)
        if model.service.state != "ready":
            raise EngineUnavailableError(f"The model `{model.name}` is {model.service.state}.")
        return model

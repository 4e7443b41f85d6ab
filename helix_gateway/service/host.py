"""One engine with all that its process holds for it: the model on its device, and the tokenizer for stop strings.

Knows nothing about who calls, or through what.
"""

from typing import Any

import structlog

from helix_gateway.core.errors import (
    ContextLengthError,
    InvalidRequestError,
    ModelLoadError,
    OutOfMemoryError,
    QueueFullError,
)
from helix_gateway.core.event import TokenEvent
from helix_gateway.engine.audit import BrokenInvariantError
from helix_gateway.engine.block_pool import NoFreeBlocksError
from helix_gateway.engine.drafters.chain import CostlyDrafter
from helix_gateway.engine.engine import ChoiceHooks, Engine, EngineLimits
from helix_gateway.engine.kv_cache import PagedKVCache
from helix_gateway.runtime.cpu.compile_cache import write_in_turn
from helix_gateway.runtime.factory import LoadedRunner, load_runners
from helix_gateway.runtime.fewer_bits import at_fewer_bits
from helix_gateway.runtime.paged_runner import PagedRunner
from helix_gateway.service.api import GenerationCall
from helix_gateway.service.messages import Invalid, NotTaken, PromptTooLong, QueueFull, Refused
from helix_gateway.service.self_drafting import Finish, LateDrafter
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.speculation import DraftModel, make_speculation, wants_draft_model, wants_self_drafter
from helix_gateway.service.stops import stop_condition
from helix_gateway.service.warm_up import warm_up
from helix_gateway.text.sample_text import sample_ids
from helix_gateway.text.tokenizer import Tokenizer
from helix_gateway.text.translation.choice import translate_vocabularies

log = structlog.get_logger(__name__)

_NO_SELF = "--speculation self cannot be had: {}. Leave it out."


class EngineHost:
    """Loads what the settings name, and passes calls on to the engine.

    Args:
        settings: what to load, and its bounds.
        tokenizer: the model's; loaded here where None.

    Raises:
        ModelLoadError: in one line, what is wrong with the model or the device.
    """

    def __init__(self, settings: EngineSettings, tokenizer: Tokenizer | None = None) -> None:
        write_in_turn()
        self._tokenizer = tokenizer or Tokenizer.load(settings.model_path)
        loaded, draft_model = _load(settings, self._tokenizer)
        self.vocab_size = loaded.runner.vocab_size
        limits = _limits(settings, loaded)
        runners = [loaded.runner] if draft_model is None else [loaded.runner, draft_model.runner]
        cache = PagedKVCache(
            [group for runner in runners for group in runner.kv_groups],
            loaded.runner.num_pages,
            enable_prefix_caching=settings.enable_prefix_caching,
        )
        speculation = make_speculation(
            settings,
            loaded.runner,
            limits.max_num_batched_tokens,
            cache=cache,
            draft_model=draft_model,
            remembered=loaded.runner.remembered,
        )
        self._engine = Engine(
            loaded.runner,
            limits,
            eos_token_ids=frozenset(self._tokenizer.eos_token_ids),
            cache=cache,
            drafter=speculation.drafter,
            depth_policy=speculation.depth_policy,
            costly_drafter=speculation.costly_drafter,
        )
        if self._engine.max_model_len < 2:
            raise ModelLoadError("The KV cache's memory does not hold even two tokens; raise --kv-cache-memory.")
        self._served_since_check = False
        self._late: LateDrafter | None = None
        if wants_self_drafter(settings, loaded.runner):
            self._add_self_drafter(settings, loaded.runner, speculation.finish_self)
        warm_up(self._engine)

    def _add_self_drafter(self, settings: EngineSettings, target: PagedRunner, finish: Finish | None) -> None:
        """Now, where nobody else is to draft; else later, where there is memory for drafts at all."""
        if settings.speculation == "self":
            self._engine.join(_made_now(settings.model_path, target, finish))
        elif finish is not None:
            self._late = LateDrafter(settings.model_path, target, finish)

    def close(self) -> None:
        """Let nothing be made any more for an engine that nobody will turn; may be called twice."""
        if self._late is not None:
            self._late.close()
            self._late = None

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._engine.max_model_len

    @property
    def has_work(self) -> bool:
        """Whether `step` would do anything."""
        return self._engine.has_work()

    @property
    def engine(self) -> Engine[Any]:
        """For looking into, in tests and on demand."""
        return self._engine

    def submit(self, call: GenerationCall) -> Refused | None:
        """Take a call, or say why not."""
        self._served_since_check = True
        request = call.request
        try:
            hooks = [ChoiceHooks(stop=stop_condition(self._tokenizer, call)) for _ in range(request.sampling.n)]
            self._engine.submit(request, hooks)
        except Exception as error:  # noqa: BLE001 - told apart there
            return _refusal(request.request_id, error)
        return None

    def cancel(self, request_id: str) -> None:
        """End a request; nothing happens if it has ended already."""
        self._engine.cancel(request_id)

    def join_drafter(self) -> None:
        """Let a drafter draft from now on that was made meanwhile; between two steps."""
        if self._late is not None and self._late.join(self._engine):
            self._late = None

    def step(self) -> list[TokenEvent]:
        """Compute one step."""
        return self._engine.step()

    def check_accounts(self) -> None:
        """Recount the KV cache's accounts, once for all that was served since the last time; nobody is being served.

        Should they be wrong the cache starts anew, empty: the memory that was lost comes back, and nobody gets text
        out of a block that is not theirs.
        """
        if not self._served_since_check:
            return
        self._served_since_check = False
        try:
            self._engine.check()
        except BrokenInvariantError as error:
            log.error("kv_cache_inconsistent", broken=str(error), remedy="the cache was emptied")
            self._engine.cache.reset()


def _load(settings: EngineSettings, tokenizer: Tokenizer) -> tuple[LoadedRunner, DraftModel | None]:
    """The target, and the draft model where one is wanted, over one pool of pages.

    Raises:
        ModelLoadError: what is wrong with either.
    """
    draft_path = settings.draft_model_path if wants_draft_model(settings) else None
    # Told before anything large is read.
    translation = None if draft_path is None else translate_vocabularies(tokenizer, Tokenizer.load(draft_path))
    target, *drafts = load_runners(
        [settings.model_path] if draft_path is None else [settings.model_path, draft_path],
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        kv_cache_dtype=settings.kv_cache_dtype,
        block_size=settings.block_size,
        kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
        sample_ids=sample_ids,
        max_tokens_in_use=settings.max_num_seqs * (settings.max_model_len or 2**20),
    )
    draft_models = [
        DraftModel(draft.runner, draft.context_length, translation, draft.runner.remembered) for draft in drafts
    ]
    return target, next(iter(draft_models), None)


def _made_now(path: str, target: PagedRunner, finish: Finish | None) -> CostlyDrafter:
    """The drafter that was asked for by its name.

    Raises:
        ModelLoadError: it cannot be had, and why.
    """
    if finish is None:
        raise ModelLoadError(_NO_SELF.format("there is no memory to measure what drafts are worth"))
    try:
        return finish(at_fewer_bits(path, target))
    except ModelLoadError as error:
        raise ModelLoadError(_NO_SELF.format(error)) from error
    except (NoFreeBlocksError, OutOfMemoryError, MemoryError, KeyError) as error:
        raise ModelLoadError(_NO_SELF.format(f"{type(error).__name__}: {error}")) from error


def _limits(settings: EngineSettings, loaded: LoadedRunner) -> EngineLimits:
    model_len = loaded.context_length
    wished = settings.max_model_len or model_len
    if wished > model_len:
        raise ModelLoadError(
            f"--max-model-len {wished} is more than the {model_len} tokens that this model was made for."
        )
    return EngineLimits(
        max_model_len=wished,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens or max(loaded.step_tokens, settings.max_num_seqs),
        max_queue_len=settings.max_queue_len,
    )


def _refusal(request_id: str, error: Exception) -> Refused:
    match error:
        case ContextLengthError():
            return PromptTooLong(request_id, error.prompt_tokens, error.max_model_len)
        case QueueFullError():
            return QueueFull(request_id, str(error), error.retry_after_s)
        case InvalidRequestError():
            return Invalid(request_id, str(error))
    # Whatever it was, it is this request's trouble and must not end the loop.
    log.error("submit_failed", request_id=request_id, exc_info=error)
    return NotTaken(request_id, f"The engine could not take this request: {type(error).__name__}.")

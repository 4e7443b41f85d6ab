"""Helix as a library: one model's tokenizer, engine and runner, in this process.

    engine = HelixEngine()
    print(engine.generate("The capital of France is", max_tokens=16).text)

Calls from several threads, and several prompts in one call, share one continuous batch.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeVar, overload

import msgspec

from helix_gateway.core.errors import HelixError, InvalidRequestError, OutOfMemoryError
from helix_gateway.core.event import FinishReason, SequenceMetrics, TokenLogprobs
from helix_gateway.core.request import Request, SamplingParams
from helix_gateway.engine.admission import check_request
from helix_gateway.runtime.model_source import resolve
from helix_gateway.service.api import GenerationCall, StopStrings, TextDelta
from helix_gateway.service.in_process import InProcessService
from helix_gateway.service.settings import EngineSettings
from helix_gateway.service.speculative_config import read_speculative_config
from helix_gateway.text.tokenizer import Tokenizer

T = TypeVar("T")

Prompt = str | Sequence[int]
_REQUEST_OPTIONS = ("priority", "cache_salt", "max_depth")


@dataclass(slots=True)
class Choice:
    """One answer to a prompt."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    metrics: SequenceMetrics | None = None


@dataclass(slots=True)
class GenerationResult:
    """All answers to one prompt; ``text``, ``token_ids``, ``finish_reason`` and ``metrics`` are the first one's."""

    prompt_token_ids: list[int]
    choices: list[Choice]
    prompt_logprobs: list[TokenLogprobs | None] | None = None

    @property
    def text(self) -> str:
        """The first answer's text."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first answer's tokens."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first answer ended."""
        return self.choices[0].finish_reason

    @property
    def metrics(self) -> SequenceMetrics:
        """The first answer's figures: queue time, times of tokens, cached tokens, what drafts and steps brought and took."""
        metrics = self.choices[0].metrics
        if metrics is None:
            raise HelixError("The answer has not ended, so it has no figures yet.")
        return metrics


class HelixEngine:
    """One model in this process.

    Args:
        model: as for ``helix serve``: a GGUF file, a folder, a hub id; None for the default model.
        draft_model: as ``model``, a smaller one that drafts where that pays; None for none.
        speculative_config: speculation as other servers are told of it, a dictionary of ``method``, ``model`` and
            ``num_speculative_tokens``, in place of ``draft_model``, ``speculation`` and ``max_depth``.
        settings: fields of `EngineSettings`, such as ``dtype="bfloat16"`` or ``max_num_seqs=16``.

    Raises:
        ModelLoadError: in one line, what is wrong with a model or the device.
        InvalidRequestError: what is wrong with ``speculative_config``.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        draft_model: str | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if speculative_config is not None:
            draft_model = _add_speculative_config(settings, draft_model, speculative_config)
        if draft_model is not None:
            settings["draft_model_path"] = resolve(draft_model)
        self._service = InProcessService(EngineSettings(model_path=resolve(model), **settings))

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._service.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together."""
        return self._service.max_model_len

    @overload
    def generate(self, prompt: str, /, **options: Any) -> GenerationResult: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], /, **options: Any) -> list[GenerationResult]: ...
    def generate(self, prompt: str | Sequence[Prompt], /, **options: Any) -> GenerationResult | list[GenerationResult]:
        """Answer one prompt, or many in one batch; in a notebook too, where an event loop runs already.

        Args:
            prompt: text, or a list of prompts, each text or token ids.
            options: fields of `SamplingParams` (``temperature``, ``max_tokens``, ``seed``, …), and ``stop``,
                ``include_stop_str_in_output``, ``skip_special_tokens``, ``priority``, ``cache_salt``, ``prediction``
                (text or tokens that the answer is expected to be), ``max_depth`` (of speculation; 0 for none).

        Raises:
            ContextLengthError: a prompt leaves no room for an answer.
            InvalidRequestError: an option is of the wrong type or out of range.
            TypeError: there is no such option.
            HelixError: the engine failed while answering.
        """
        many = [prompt] if isinstance(prompt, str) else list(prompt)
        results = _run(self._generate_all(many, options))
        return results[0] if isinstance(prompt, str) else results

    async def _generate_all(self, prompts: Sequence[Prompt], options: dict[str, Any]) -> list[GenerationResult]:
        return await asyncio.gather(*(self._generate_one(prompt, options) for prompt in prompts))

    async def _generate_one(self, prompt: Prompt, options: dict[str, Any]) -> GenerationResult:
        call = self._call(prompt, options)
        result = GenerationResult(call.request.prompt_token_ids, [Choice() for _ in range(call.request.sampling.n)])
        async with aclosing(self._service.generate(call)) as stream:
            async for delta in stream:
                _raise_failure(delta)
                _add(result, delta)
        return result

    async def generate_stream(self, prompt: Prompt, /, **options: Any) -> AsyncGenerator[TextDelta, None]:
        """Answer one prompt piece by piece, as tokens are accepted; options as for `generate`.

        Closing the iterator ends the request.
        """
        async with aclosing(self._service.generate(self._call(prompt, options))) as stream:
            async for delta in stream:
                _raise_failure(delta)
                yield delta

    def _call(self, prompt: Prompt, options: dict[str, Any]) -> GenerationCall:
        options = dict(options)
        stop = options.pop("stop", ())
        stop_strings = StopStrings(
            strings=(stop,) if isinstance(stop, str) else tuple(stop),
            include_in_output=options.pop("include_stop_str_in_output", False),
            skip_special_tokens=options.pop("skip_special_tokens", True),
        )
        prediction = options.pop("prediction", ())
        unknown = [name for name in options if name not in {*SamplingParams.__struct_fields__, *_REQUEST_OPTIONS}]
        if unknown:
            raise TypeError(f"generate() knows no option {unknown[0]!r}; see SamplingParams for those there are.")
        request_fields = {name: options.pop(name) for name in _REQUEST_OPTIONS if name in options}
        options.setdefault("seed", self._service.draw_seed())
        request = Request(
            request_id=uuid.uuid4().hex,
            prompt_token_ids=self._encoded(prompt, add_special_tokens=True),
            sampling=_sampling(options),
            prediction_token_ids=self._encoded(prediction, add_special_tokens=False),
            **request_fields,
        )
        check_request(request, self._service.vocab_size)
        return GenerationCall(request=request, stop=stop_strings)

    def _encoded(self, text: Prompt, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens) if isinstance(text, str) else [*text]

    def close(self) -> None:
        """Stop the engine and free its memory."""
        self._service.close()

    def __enter__(self) -> "HelixEngine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _add_speculative_config(settings: dict[str, Any], draft_model: str | None, config: Mapping[str, Any]) -> str | None:
    """Add what a configuration says to plain settings; the draft model that is meant."""
    try:
        said = msgspec.structs.asdict(read_speculative_config(config))
    except InvalidRequestError as error:
        raise InvalidRequestError(f"speculative_config {error}.") from None
    for name, value in said.items():
        plain = draft_model if name == "draft_model" else settings.get(name)
        if None not in {value, plain} and value != plain:
            message = (
                f"speculative_config says {name} {value!r}, but {name} is set to {plain!r}: leave out one of them."
            )
            raise InvalidRequestError(message)
    meant: str | None = said.pop("draft_model") or draft_model
    settings |= {name: value for name, value in said.items() if value is not None}
    return meant


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Wait for a coroutine, on a thread and a loop of its own where this thread's loop runs already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    loop = asyncio.new_event_loop()
    task = loop.create_task(coroutine)
    try:
        with ThreadPoolExecutor(1) as thread:
            running = thread.submit(loop.run_until_complete, task)
            try:
                return running.result()
            finally:  # where a notebook's user interrupts it, too
                loop.call_soon_threadsafe(task.cancel)
    finally:
        loop.close()


def _sampling(options: dict[str, Any]) -> SamplingParams:
    try:
        return msgspec.convert(options, SamplingParams)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"{error}.") from error


def _raise_failure(delta: TextDelta) -> None:
    if delta.error is not None:
        kind = OutOfMemoryError if delta.error_kind == "out_of_memory" else HelixError
        raise kind(delta.error)


def _add(result: GenerationResult, delta: TextDelta) -> None:
    choice = result.choices[delta.index]
    choice.text += delta.text
    choice.token_ids += delta.token_ids
    choice.logprobs += delta.logprobs or []
    result.prompt_logprobs = delta.prompt_logprobs or result.prompt_logprobs
    choice.finish_reason = delta.finish_reason
    choice.stop_reason = delta.stop_reason
    choice.metrics = delta.metrics

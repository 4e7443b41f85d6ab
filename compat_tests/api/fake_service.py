"""A model service of a few lines and a tokenizer of bytes, for tests of the HTTP side alone."""

import asyncio
import codecs
from collections.abc import AsyncIterator, Callable

from helix_gateway.core.errors import InvalidRequestError
from helix_gateway.core.event import SequenceMetrics, TokenLogprobs
from helix_gateway.service.api import GenerationCall, TextDelta

BOS, EOS = 256, 257
ANSWER = "Grüße, 🌍!"


class ByteTokenizer:
    """Each byte is a token; 256 begins a text and 257 ends one."""

    bos_token_id = BOS
    eos_token_ids = (EOS,)
    vocab_size = 258
    chat_template = "made of bytes"

    def __init__(self):
        self.encoded_characters = 0

    def encode(self, text, *, add_special_tokens=True):
        self.encoded_characters += len(text)
        return [BOS] * add_special_tokens + list(text.encode())

    def decode(self, token_ids, *, skip_special_tokens=True):
        return b"".join(
            self.token_bytes(token_id) for token_id in token_ids if token_id < 256 or not skip_special_tokens
        ).decode(errors="replace")

    def token_bytes(self, token_id):
        return {BOS: b"<s>", EOS: b"</s>"}.get(token_id) or bytes([token_id])

    def least_tokens(self, text):
        return len(text.encode()) // 4

    def render_chat(self, messages, *, add_generation_prompt=True):
        for message in messages:
            if "refuse me" in message["content"]:
                raise InvalidRequestError("The template does not like it.", param="messages")
        lines = [f"{m['role']}: {_plain(m['content'])}\n" for m in messages]
        return "".join(lines) + "assistant: "


def _plain(content):
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


class FakeService:
    """Answers every call with ``answer``, a token at a time, all choices in turn; remembers what it was asked."""

    def __init__(self, answer: str = ANSWER, *, max_model_len: int = 512, token_s: float | None = None):
        self.tokenizer = ByteTokenizer()
        self.max_model_len = max_model_len
        self.max_sequences = 1088
        self.vocab_size = self.tokenizer.vocab_size
        self.state = "ready"
        self.answer = answer
        self.token_s = token_s
        self.calls: list[GenerationCall] = []
        self.open = 0
        self.deltas = 0
        self.script: Callable[[GenerationCall], AsyncIterator[TextDelta]] | None = None

    def draw_seed(self) -> int:
        return 2**64 - 5

    async def generate(self, call: GenerationCall):
        self.calls.append(call)
        self.open += 1
        try:
            async for delta in (self.script or self._answer)(call):
                self.deltas += 1
                yield delta
        finally:
            self.open -= 1

    async def _answer(self, call):
        sampling = call.request.sampling
        token_ids = list(self.answer.encode())
        reason = "length" if len(token_ids) > sampling.max_tokens else "stop"
        token_ids = token_ids[: sampling.max_tokens]
        decoders = [codecs.getincrementaldecoder("utf-8")("ignore") for _ in range(sampling.n)]
        prompt_logprobs = self._prompt_logprobs(call)
        for place, token_id in enumerate(token_ids):
            if self.token_s is not None:
                await asyncio.sleep(self.token_s)
            last = place == len(token_ids) - 1
            for index in range(sampling.n):
                yield TextDelta(
                    index=index,
                    text=decoders[index].decode(bytes([token_id]), last),
                    token_ids=[token_id],
                    logprobs=[logprobs_of(token_id, sampling.logprobs)] if sampling.logprobs is not None else None,
                    prompt_logprobs=prompt_logprobs if (place, index) == (0, 0) else None,
                    finish_reason=reason if last else None,
                    metrics=metrics_of(call, len(token_ids)) if last else None,
                )

    @staticmethod
    def _prompt_logprobs(call):
        top = call.request.sampling.prompt_logprobs
        if top is None:
            return None
        return [None] + [logprobs_of(token_id, top) for token_id in call.request.prompt_token_ids[1:]]


def logprobs_of(token_id: int, top: int) -> TokenLogprobs:
    others = [other for other in range(97, 97 + 21) if other != token_id]
    ids = [token_id, *others][:top]
    return TokenLogprobs(token_id, -0.25, 1, ids, [-0.25 - 0.5 * rank for rank in range(len(ids))])


def metrics_of(call: GenerationCall, output_tokens: int) -> SequenceMetrics:
    return SequenceMetrics(
        queue_time_s=0.0,
        time_to_first_token_s=0.01,
        token_times_s=[0.01] * output_tokens,
        total_time_s=0.01,
        prompt_tokens=len(call.request.prompt_token_ids),
        output_tokens=output_tokens,
        cached_tokens=min(3, len(call.request.prompt_token_ids)),
    )

"""Random requests of every option, good and bad, and a tiny model to answer them.  Knows nothing about connections."""

import json
import random
from dataclasses import dataclass

from compat_tests.text.little_tokenizers import SPECIALS, TEMPLATE, save_folder, train_byte_level
from compat_tests.tiny_models import make_model

CONTEXT = 256
VOCAB = 420
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "123",
    "lazy",
    "dogs,",
    "naïve",
    "café",
    "你好",
    "👍🏽",
    "and\n\ndoesn't",
    "stop",
]
CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": SPECIALS[1],
    "eos_token": SPECIALS[2],
    "chat_template": TEMPLATE,
}


def save_tiny_model(folder):
    """A random Llama of a few thousand parameters with a tokenizer that it was not trained with."""
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    _, model = make_model("llama", shape, 7)
    model.save_pretrained(folder)
    return save_folder(train_byte_level(VOCAB), folder, config=CONFIG)


@dataclass(frozen=True)
class Ask:
    """One request, and what is to be expected of its answer."""

    path: str
    body: bytes
    status: int = 200
    choices: int = 1
    stream: bool = False
    known_as: int | None = None
    """Asked again and again, under this number: the answer must be the same each time."""


class Asker:
    """Makes up requests.

    Args:
        seed: the same seed asks the same.
        num_known: how many different requests come again and again.
    """

    def __init__(self, seed, num_known=60):
        self._dice = random.Random(seed)
        self._known = [(self._path(), self._body(random.Random(number))) for number in range(num_known)]

    def good(self, *, stream):
        """A request that must be answered."""
        number = self._dice.randrange(2 * len(self._known))
        if number < len(self._known):
            path, body = self._known[number]
            return self._ask(path, body, stream, number)
        return self._ask(self._path(), self._body(self._dice), stream, None)

    def bad(self):
        """A request that must be refused."""
        path, body, status = self._dice.choice(BAD)
        return Ask(path, body if isinstance(body, bytes) else json.dumps(body).encode(), status)

    def _ask(self, path, options, stream, known_as):
        options = dict(options)
        prompt = options.pop("text")
        if "chat" in path:
            body = {**options, "messages": [{"role": "user", "content": part} for part in prompt.split("|")]}
            if "logprobs" in options:
                body |= {"logprobs": True, "top_logprobs": options["logprobs"]}
        elif path == "/generate":
            body = {**options, "prompt": prompt}
            body.pop("n", None)
            path += "/stream" if stream else ""
        else:
            body = {**options, "prompt": prompt, "echo": "presence_penalty" in options}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return Ask(path, json.dumps(body).encode(), 200, body.get("n", 1), stream, known_as)

    def _path(self):
        return self._dice.choice(["/v1/chat/completions", "/v1/chat/completions", "/v1/completions", "/generate"])

    def _body(self, dice):
        """A prompt under ``text``, and some of all options."""
        words = [dice.choice(WORDS) for _ in range(dice.choice([1, 3, 10, 25]))]
        # Many begin alike, so that prefixes are found.
        common = "You are a helpful assistant. " * dice.choice([0, 1, 1])
        max_tokens = dice.choice([1, 4, 16, 16, 60, 1000])
        everything = {
            "temperature": dice.choice([0.0, 0.5, 1.0, 2.0]),
            "top_p": dice.choice([0.1, 0.9]),
            "top_k": dice.choice([-1, 1, 20]),
            "min_p": dice.choice([0.05, 0.5]),
            "presence_penalty": dice.uniform(-2, 2),
            "frequency_penalty": dice.uniform(-2, 2),
            "repetition_penalty": dice.choice([0.7, 1.2]),
            "logit_bias": {str(dice.randrange(VOCAB)): dice.choice([-100, 3.5])},
            "stop": dice.sample(["e", "the", "\n", "你", "zz"], 2),
            "include_stop_str_in_output": True,
            "stop_token_ids": [dice.randrange(VOCAB)],
            "bad_words": ["fox"],
            "min_tokens": dice.randint(0, min(max_tokens, 20)),
            "ignore_eos": True,
            "skip_special_tokens": False,
            "logprobs": dice.randrange(6),
            "n": dice.randrange(2, 5),
            "priority": dice.randrange(-2, 3),
            "cache_salt": dice.choice("ab"),
            "return_token_ids": True,
            "user": "somebody",
            "no_such_field": 1,
        }
        chosen = {name: value for name, value in everything.items() if dice.random() < 0.25}
        return {
            **chosen,
            "text": common + "|".join(" ".join(part) for part in (words[:5], words[5:]) if part),
            "max_tokens": max_tokens,
            "seed": dice.getrandbits(63),
        }


HELLO = [{"role": "user", "content": "hello"}]
BAD = [
    ("/v1/chat/completions", b"{not json", 400),
    ("/v1/chat/completions", b"", 400),
    ("/v1/chat/completions", b"\xff\xfe\x00", 400),
    ("/v1/chat/completions", {}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": "hello"}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}, 400),
    ("/v1/chat/completions", {"messages": HELLO, "temperature": 3}, 400),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "top_p": NaN}', 400),
    ("/v1/chat/completions", {"messages": HELLO, "n": 1000}, 400),
    ("/v1/chat/completions", {"messages": HELLO, "stop": ["x"] * 100}, 400),
    ("/v1/chat/completions", {"messages": HELLO, "logit_bias": {"999999": 1}}, 400),
    ("/v1/chat/completions", {"messages": HELLO, "model": "another"}, 404),
    ("/v1/completions", {"prompt": "word " * 1000}, 400),
    ("/v1/completions", {"prompt": [1, 2, 10**6]}, 400),
    ("/v1/completions", {"prompt": ["a", 1]}, 400),
    ("/generate", {"prompt": "x", "n": 2}, 400),
    ("/v1/nothing", {}, 404),
]

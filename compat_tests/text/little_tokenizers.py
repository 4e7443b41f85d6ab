"""Small tokenizers for tests, and GGUF files and model folders that hold them."""

import functools
import json
import struct

import gguf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from helix_gateway.text.token_bytes import byte_level_alphabet

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = (
    "The quick brown fox jumps over the lazy dog, and doesn't stop.  He'll say it 123 times in 2024!\n\n"
    "def f(x):\n    return x + 1  # naïve café — 你好，世界 Привет мир 👍🏽\n"
) * 4
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def train_byte_level(vocab_size=420, corpus=CORPUS):
    """A byte-level BPE with GPT-2's pre-tokenizer, its three special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(byte_level_alphabet().values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([corpus], trainer)
    return tokenizer


def save_folder(tokenizer, folder, *, config=None, generation_config=None):
    """A folder as Hugging Face lays it out, without the model."""
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config or {}))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return str(folder)


def model_of(tokenizer):
    """A BPE's tokens in the order of their ids, and its merges."""
    state = json.loads(tokenizer.model.__getstate__())
    vocab = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(vocab, key=vocab.__getitem__), [tuple(merge) for merge in state["merges"]]


def write_gguf(path, *, kind, pre=None, tokens, types, merges=None, scores=None, ids=None, template=None, **flags):
    """A GGUF file that holds a tokenizer and no tensors.

    ``ids`` maps names such as "eos" to token ids; ``flags`` are the booleans add_bos_token, add_space_prefix, ….
    """
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges([f"{left} {right}" for left, right in merges])
    if scores is not None:
        writer.add_token_scores(scores)
    for name, index in (ids or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return str(path)


def write_byte_level_gguf(path, *, pre="smollm", extra=(), ids=None, **options):
    """A GGUF file with the trained byte-level BPE; ``extra`` are further tokens with their types."""
    tokens, merges = model_of(train_byte_level())
    types = [CONTROL] * len(SPECIALS) + [NORMAL] * (len(tokens) - len(SPECIALS))
    ids = {"bos": 1, "eos": 2} if ids is None else ids
    return write_gguf(
        path,
        kind="gpt2",
        pre=pre,
        tokens=tokens + [text for text, _ in extra],
        types=types + [kind for _, kind in extra],
        merges=merges,
        ids=ids,
        **options,
    )


@functools.cache  # Training breaks ties as it likes, so the test and the file must share one.
def sentencepiece_vocabulary():
    """Tokens, types and scores as sentencepiece's BPE has them: specials, bytes, letters, then merges by score."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    learned = [text for text, _ in sorted(words.get_vocab().items(), key=lambda item: item[1])]
    learned = [text for text in learned if not set(text) & set("你好世界👍🏽")]
    head = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(learned)
    # A pair that makes a longer token was learned later, so it scores worse.
    scores = [0.0] * len(head) + [-float(rank) for rank in range(len(learned))]
    return head + learned, types, scores


def write_sentencepiece_gguf(path, *, extra=(), ids=None, **flags):
    """A GGUF file with a small sentencepiece BPE."""
    tokens, types, scores = sentencepiece_vocabulary()
    return write_gguf(
        path,
        kind="llama",
        tokens=tokens + [text for text, _ in extra],
        types=types + [kind for _, kind in extra],
        scores=scores + [0.0] * len(extra),
        ids={"bos": 1, "eos": 2, "unknown": 0} if ids is None else ids,
        **flags,
    )


def varint(number):
    groups = []
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


def message_field(number, value):
    """One field in Protocol Buffers' wire format: an int, a float, or a string or message of bytes."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def write_sentencepiece_model(path, *, model_type=2):
    """The small sentencepiece BPE as sentencepiece itself would write it."""
    pieces = [
        message_field(1, message_field(1, text.encode()) + message_field(2, score) + message_field(3, kind))
        for text, kind, score in zip(*sentencepiece_vocabulary())
    ]
    trainer, normalizer = message_field(3, model_type) + message_field(4, 500), message_field(3, 1)
    path.write_bytes(b"".join(pieces) + message_field(2, trainer) + message_field(3, normalizer))


def added(text, **flags):
    """An added token that is looked for in the text as it stands."""
    return AddedToken(text, normalized=False, **flags)

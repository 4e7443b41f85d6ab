"""Tokenizers such as draft models of other families have, made here from the standard library's text."""

import argparse
import email.message
import functools
import heapq
import inspect
import json
import textwrap

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from compat_tests.text.little_tokenizers import save_folder
from helix_gateway.text.token_bytes import byte_level_alphabet
from helix_gateway.text.tokenizer import Tokenizer as LoadedTokenizer

CORPUS = "\n".join(inspect.getsource(module) for module in (argparse, email.message, functools, heapq, json, textwrap))
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GROUPED_DIGITS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache  # training takes seconds, and breaks ties as it likes
def byte_level(vocab_size=5000):
    """A byte-level BPE that takes digits three at a time, as recent ones do."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(GROUPED_DIGITS, "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = list(byte_level_alphabet().values())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def unigram(vocab_size=2500):
    """Sentencepiece's Unigram with byte fallback, a space before every text, <s> before every prompt."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\u2581"), "merged_with_next")
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=specials + BYTES, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    state = json.loads(tokenizer.to_str())
    state["model"]["byte_fallback"] = True
    # The trainer knows no tokens that are neither learned nor special; the bytes are ordinary.
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def word_piece():
    """BERT's: words in lower case, their pieces marked by ##, spaces forgotten."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=2000, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def renumbered(tokenizer, *, by, without=()):
    """The same BPE with every id moved up, and some of its tokens gone."""
    state = json.loads(tokenizer.to_str())
    model = state["model"]
    model["vocab"] = {token: index + by for token, index in model["vocab"].items() if token not in without}
    model["merges"] = [
        pair for pair in model["merges"] if pair[0] + pair[1] not in without and not set(pair) & set(without)
    ]
    for token in state["added_tokens"]:
        token["id"] += by
    model["vocab"] |= {f"<unused{index}>": index for index in range(by)}
    return Tokenizer.from_str(json.dumps(state))


def load(tokenizer, folder, **config):
    """As a draft model's own folder has it."""
    folder.mkdir()
    return LoadedTokenizer.load(save_folder(tokenizer, folder, config=config))

"""Builds a tokenizer from the metadata of a GGUF file, as llama.cpp would read it, without transformers or torch.

Two kinds are known: byte-level BPE (``tokenizer.ggml.model = gpt2``: Llama 3, Mistral's tekken, Qwen, SmolLM) and
sentencepiece's BPE with byte fallback (``llama``: Llama 2, Mistral, Gemma, Phi-3), whose merges are found again from
the scores.  Knows nothing about chat templates beyond their text, or about how fast an encoding is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from gguf.constants import Keys
from tokenizers import Tokenizer, decoders, models, normalizers

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.text.added_tokens import add_tokens_by_type, write_around_prompts
from helix_gateway.text.definition import Merges, TokenizerDefinition, TokenType
from helix_gateway.text.gguf_metadata import read_gguf_metadata
from helix_gateway.text.pretokenizers import RULES, PreTokenizerRule, byte_level_pre_tokenizer
from helix_gateway.text.sentencepiece_bpe import SentencePieceVocabulary, SpacePrefix, build_sentencepiece

Metadata = Mapping[str, Any]


# Tokens that end a turn whatever the file says (its converter often names one of two).
_TURN_ENDS = frozenset({"<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<end_of_utterance>"})
_SPECIAL_NAMES = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
    "sep_token": Keys.Tokenizer.SEP_ID,
    "mask_token": Keys.Tokenizer.MASK_ID,
}
_SENTENCEPIECE_IDS = {Keys.Tokenizer.UNK_ID: 0, Keys.Tokenizer.BOS_ID: 1, Keys.Tokenizer.EOS_ID: 2}


def load_gguf_tokenizer(path: str) -> TokenizerDefinition:
    """Read the tokenizer of a GGUF file.

    Raises:
        ModelLoadError: the file cannot be read, holds no tokenizer, or one of another kind (named in the message).
    """
    metadata = read_gguf_metadata(path)
    kind = metadata.get(Keys.Tokenizer.MODEL)
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"{path} has a tokenizer of kind {kind!r}, which is not served; known kinds: 'gpt2' (byte-level BPE), "
            "'llama' (sentencepiece BPE)."
        )
    try:
        return _byte_level(metadata) if kind == "gpt2" else _sentencepiece(metadata)
    except KeyError as error:
        raise ModelLoadError(f"{path} lacks {error.args[0]!r}, which its tokenizer needs.") from error
    except (IndexError, TypeError, ValueError) as error:
        raise ModelLoadError(f"The tokenizer in {path} is broken: {error}") from error


def _byte_level(metadata: Metadata) -> TokenizerDefinition:
    rule = _pre_tokenizer_rule(metadata)
    tokens = _token_texts(metadata)
    merges = [_split_merge(merge) for merge in metadata[Keys.Tokenizer.MERGES]]
    vocab = {text: index for index, text in enumerate(tokens)}
    _check_merges(merges, vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole_pieces_first))
    if rule.composes:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = byte_level_pre_tokenizer(rule)
    backend.decoder = decoders.ByteLevel()
    return _finish(backend, metadata, tokens, merges, adds_bos=rule.adds_bos)


def _pre_tokenizer_rule(metadata: Metadata) -> PreTokenizerRule:
    name = metadata.get(Keys.Tokenizer.PRE, "default")
    rule = RULES.get(name)
    if rule is None:
        raise ModelLoadError(
            f"The pre-tokenizer {name!r} (tokenizer.ggml.pre) is not served; known ones: {', '.join(sorted(RULES))}."
        )
    return rule


def _check_merges(merges: Merges, vocab: Mapping[str, int]) -> None:
    """`tokenizers` panics on a merge of what is no token."""
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelLoadError(f"The merge of {left!r} and {right!r} does not fit the vocabulary of the file.")


def _split_merge(merge: str) -> tuple[str, str]:
    # A token may itself begin with a space in old files, so the first character never separates.
    separator = merge.index(" ", 1)
    return merge[:separator], merge[separator + 1 :]


def _sentencepiece(metadata: Metadata) -> TokenizerDefinition:
    tokens = _token_texts(metadata)
    metadata = {**_SENTENCEPIECE_IDS, **metadata}
    # llama.cpp puts the space before the first text and before each text that follows a special token.
    prefix = SpacePrefix.EVERY_TEXT if metadata.get(Keys.Tokenizer.ADD_PREFIX, True) else SpacePrefix.NONE
    vocabulary = SentencePieceVocabulary(
        tokens, metadata[Keys.Tokenizer.SCORES], metadata[Keys.Tokenizer.TOKEN_TYPE], metadata[Keys.Tokenizer.UNK_ID]
    )
    backend, merges = build_sentencepiece(vocabulary, prefix)
    return _finish(backend, metadata, tokens, merges, adds_bos=True)


def _token_texts(metadata: Metadata) -> list[str]:
    return [text or f"[EMPTY_{index}]" for index, text in enumerate(metadata[Keys.Tokenizer.LIST])]


def _finish(
    backend: Tokenizer, metadata: Metadata, tokens: Sequence[str], merges: Merges, *, adds_bos: bool
) -> TokenizerDefinition:
    """What both kinds share: added tokens, BOS and EOS, the chat template."""
    types = metadata.get(Keys.Tokenizer.TOKEN_TYPE) or [TokenType.NORMAL] * len(tokens)
    add_tokens_by_type(backend, tokens, types)
    special = {name: tokens[index] for name, key in _SPECIAL_NAMES.items() for index in _ids(metadata, tokens, key)}
    _write_around_prompts(backend, metadata, tokens, adds_bos=adds_bos)
    return TokenizerDefinition(
        backend=backend,
        merges=merges,
        bos_token_id=backend.token_to_id(special["bos_token"]) if "bos_token" in special else None,
        eos_token_ids=_end_ids(metadata, tokens),
        special_tokens=special,
        chat_template=metadata.get(Keys.Tokenizer.CHAT_TEMPLATE),
    )


def _ids(metadata: Metadata, tokens: Sequence[str], *keys: str) -> list[int]:
    """The ids under some keys, where there are any and they are within the vocabulary."""
    found = [metadata.get(key) for key in keys]
    return [index for index in found if isinstance(index, int) and 0 <= index < len(tokens)]


def _write_around_prompts(backend: Tokenizer, metadata: Metadata, tokens: Sequence[str], *, adds_bos: bool) -> None:
    """Have the backend write BOS and EOS where the file says so."""
    begins = metadata.get(Keys.Tokenizer.ADD_BOS, adds_bos)
    ends = metadata.get(Keys.Tokenizer.ADD_EOS, False)
    before = _ids(metadata, tokens, Keys.Tokenizer.BOS_ID) if begins else []
    after = _ids(metadata, tokens, Keys.Tokenizer.EOS_ID) if ends else []
    write_around_prompts(backend, before, after)


def _end_ids(metadata: Metadata, tokens: Sequence[str]) -> tuple[int, ...]:
    named = _ids(metadata, tokens, Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    found = [index for index, text in enumerate(tokens) if text in _TURN_ENDS]
    return tuple(dict.fromkeys([*named, *found]))

"""Reads the tokenizer of a local folder in Hugging Face layout: tokenizer.json, or an older format in its place.

Beside it the small files that say how the model ends its answers and how it chats: tokenizer_config.json,
special_tokens_map.json, generation_config.json, config.json, chat_template.jinja.  Knows nothing about the hub.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from helix_gateway.core.errors import ModelLoadError
from helix_gateway.text.added_tokens import add_tokens_by_type, write_around_prompts
from helix_gateway.text.definition import TokenizerDefinition
from helix_gateway.text.sentencepiece_bpe import SpacePrefix, build_sentencepiece
from helix_gateway.text.sentencepiece_model import SentencePieceModel, read_sentencepiece_model

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_CONVERTIBLE = ("vocab.json", "vocab.txt", "tekken.json")


def load_huggingface_tokenizer(folder: str) -> TokenizerDefinition:
    """Read the tokenizer of a model folder.

    Raises:
        ModelLoadError: there is no tokenizer, or it cannot be read.
    """
    path = Path(folder)
    config = _read_json(path / "tokenizer_config.json")
    backend = _backend(path, config)
    # Some files carry the settings of their training; a prompt is neither cut nor filled up.
    backend.no_truncation()
    backend.no_padding()
    special = _special_tokens(config, _read_json(path / "special_tokens_map.json"))
    return TokenizerDefinition(
        backend=backend,
        merges=_merges(backend),
        bos_token_id=_id_of(backend, special.get("bos_token")),
        eos_token_ids=_end_ids(path, backend, special.get("eos_token")),
        special_tokens=special,
        chat_template=_chat_template(path, config),
    )


def _backend(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    if (path / "tokenizer.json").is_file():
        return _loaded(path / "tokenizer.json")
    if (path / "tokenizer.model").is_file():
        return _from_sentencepiece(path / "tokenizer.model", config)
    if any((path / name).is_file() for name in _CONVERTIBLE):
        return _converted(path)
    raise ModelLoadError(
        f"{path} holds no tokenizer: none of tokenizer.json, tokenizer.model, {', '.join(_CONVERTIBLE)}."
    )


def _loaded(file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises Exception itself for a malformed file.
        raise ModelLoadError(f"{file} cannot be read as a tokenizer: {error}") from error


def _from_sentencepiece(file: Path, config: Mapping[str, Any]) -> Tokenizer:
    """Sentencepiece's own file, with what transformers' Llama tokenizers read from the configuration beside it."""
    try:
        model = read_sentencepiece_model(file)
        backend, _ = build_sentencepiece(model.vocabulary, _space_prefix(config, model))
    except (ValueError, IndexError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}.") from error
    add_tokens_by_type(backend, model.vocabulary.tokens, model.vocabulary.types)
    _add_later_tokens(backend, config, file)
    special = _special_tokens(config)
    begins = [_id_of(backend, special.get("bos_token", "<s>"))] if config.get("add_bos_token", True) else []
    ends = [_id_of(backend, special.get("eos_token", "</s>"))] if config.get("add_eos_token", False) else []
    write_around_prompts(backend, *([index for index in ids if index is not None] for ids in (begins, ends)))
    return backend


def _space_prefix(config: Mapping[str, Any], model: SentencePieceModel) -> SpacePrefix:
    adds = config.get("add_prefix_space")
    if not (model.adds_leading_space if adds is None else adds):
        return SpacePrefix.NONE
    return SpacePrefix.EVERY_TEXT if config.get("legacy", True) else SpacePrefix.FIRST_TEXT


def _add_later_tokens(backend: Tokenizer, config: Mapping[str, Any], file: Path) -> None:
    """Tokens that the configuration adds behind those of the sentencepiece model."""
    listed = config.get("added_tokens_decoder", {})
    for index, token in sorted((int(index), token) for index, token in listed.items()):
        backend.add_tokens([AddedToken(token["content"], special=token.get("special", False), normalized=False)])
        if backend.token_to_id(token["content"]) != index:
            raise ModelLoadError(f"The tokens added to {file} leave a gap before {index}, {token['content']!r}.")


def _converted(path: Path) -> Tokenizer:
    """What transformers makes of an older format; slow, and only where there is no tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        backend = AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    except Exception as error:  # Whatever a conversion of somebody's file can raise.
        raise ModelLoadError(f"The tokenizer in {path} cannot be converted: {error}") from error
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError(f"The tokenizer in {path} has no fast form, which is needed here.")
    return backend


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Texts of the special tokens by name; the first source that has one counts."""
    found: dict[str, str] = {}
    for source in sources:
        for name in _SPECIAL_NAMES:
            value = source.get(name)
            text = value.get("content") if isinstance(value, Mapping) else value
            if isinstance(text, str):
                found.setdefault(name, text)
    return found


def _merges(backend: Tokenizer) -> list[tuple[str, str]] | None:
    model = json.loads(backend.model.__getstate__())
    if model["type"] != "BPE":
        return None
    return [(left, right) for left, right in model["merges"]]


def _id_of(backend: Tokenizer, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def _end_ids(path: Path, backend: Tokenizer, eos_token: str | None) -> tuple[int, ...]:
    """The tokenizer's EOS, and those that the generation configuration names (the model's, where there is none)."""
    generation = _read_json(path / "generation_config.json").get("eos_token_id")
    named = generation if generation is not None else _read_json(path / "config.json").get("eos_token_id")
    several = named if isinstance(named, list) else [named]
    ids = [_id_of(backend, eos_token), *several]
    return tuple(dict.fromkeys(index for index in ids if isinstance(index, int)))


def _chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    separate = path / "chat_template.jinja"
    if separate.is_file():
        return separate.read_text(encoding="utf-8")
    named = config.get("chat_template")
    if isinstance(named, list):
        by_name = {entry.get("name"): entry.get("template") for entry in named if isinstance(entry, Mapping)}
        named = by_name.get("default")
    return named if isinstance(named, str) else None

"""Reads a ``tokenizer.model``: sentencepiece's own file, a message in Protocol Buffers' wire format.

Only what a BPE needs is read: pieces with their scores and types, the kind of model, whether texts get a leading space
(`sentencepiece_model.proto`).  A reader of the wire format is forty lines; the sentencepiece and protobuf packages would
be two more things to install.  Knows nothing about what is built from it.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from helix_gateway.text.definition import TokenType
from helix_gateway.text.sentencepiece_bpe import SentencePieceVocabulary

_SPACE = "\u2581"
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3  # of ModelProto
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of SentencePiece
_MODEL_TYPE, _ADD_DUMMY_PREFIX = 3, 3  # of TrainerSpec, of NormalizerSpec
_BPE = 2

_Message = dict[int, list[int | bytes]]


@dataclass(frozen=True, slots=True)
class SentencePieceModel:
    """What the file says."""

    vocabulary: SentencePieceVocabulary
    adds_leading_space: bool


def read_sentencepiece_model(file: Path) -> SentencePieceModel:
    """Read the file.

    Raises:
        ValueError: it is of another format, or another model than BPE.
    """
    try:
        model = _message(file.read_bytes())
        pieces = [_message(_as_bytes(piece)) for piece in model.get(_PIECES, [])]
        trainer = _message(_as_bytes(_last(model, _TRAINER, b"")))
        normalizer = _message(_as_bytes(_last(model, _NORMALIZER, b"")))
        vocabulary = _vocabulary(pieces)
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"it is not a sentencepiece model ({error})") from error
    if _last(trainer, _MODEL_TYPE, 1) != _BPE:
        raise ValueError("its sentencepiece model is not of the kind BPE")
    return SentencePieceModel(vocabulary, adds_leading_space=bool(_last(normalizer, _ADD_DUMMY_PREFIX, 1)))


def _vocabulary(pieces: list[_Message]) -> SentencePieceVocabulary:
    types = [int(_last(piece, _TYPE, TokenType.NORMAL)) for piece in pieces]
    texts = [_as_bytes(_last(piece, _TEXT, b"")).decode() for piece in pieces]
    # Symbols that users defined are looked for in the text as it stands, before spaces are marked.
    tokens = [
        text.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else text
        for text, kind in zip(texts, types, strict=True)
    ]
    scores = [struct.unpack("<f", _as_bytes(_last(piece, _SCORE, bytes(4))))[0] for piece in pieces]
    if TokenType.UNKNOWN not in types:
        raise ValueError("it is not a sentencepiece model (it has no unknown token)")
    return SentencePieceVocabulary(tokens, scores, types, unknown_id=types.index(TokenType.UNKNOWN))


def _last(message: _Message, field: int, default: int | bytes) -> int | bytes:
    return message.get(field, [default])[-1]


def _as_bytes(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return value
    raise ValueError("it is not a sentencepiece model (a number stands where a text should)")


def _message(data: bytes) -> _Message:
    """Values of each field, in their order; numbers as int, all else as bytes."""
    fields: _Message = {}
    for field, value in _fields(data):
        fields.setdefault(field, []).append(value)
    return fields


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if kind not in (_FIXED64, _BYTES, _FIXED32):
            raise ValueError(f"it is not a sentencepiece model (wire type {kind})")
        size, at = _varint(data, at) if kind == _BYTES else (8 if kind == _FIXED64 else 4, at)
        if at + size > len(data):
            raise IndexError("it ends inside a field")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if byte < 0x80:
            return value, at

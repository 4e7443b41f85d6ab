r"""How text is cut into pieces before byte-level BPE merges within each: the rules that ``tokenizer.ggml.pre`` names.

A rule is a chain of regular expressions; each cuts every piece so far into its matches and what lies between them.
The expressions are those of the models' own tokenizer.json, in Oniguruma's syntax; which name means which rule, and
in what order, follows llama.cpp's vocabulary loader, whose converters write the names.  `as_one_pattern` gives
the single expression that cuts as a whole chain does, where there is one.  Knows nothing about vocabularies.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

_CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
_ANY_CASE_CONTRACTION = f"(?i:{_CONTRACTION})"
_SPACES = r"\s+(?!\S)|\s+"
_LINES = r"\s*[\r\n]+"

NUMERAL = r"\p{N}"
GPT2 = _CONTRACTION + r"| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|" + _SPACES


def _gpt4_like(
    numbers: str, *, word: str = r"[^\r\n\p{L}\p{N}]?\p{L}+", other: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
) -> str:
    return "|".join((_ANY_CASE_CONTRACTION, word, numbers, other, _LINES, _SPACES))


LLAMA3 = _gpt4_like(r"\p{N}{1,3}")
QWEN2 = _gpt4_like(NUMERAL)
QWEN35 = _gpt4_like(NUMERAL, word=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", other=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*")

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased_words(numbers: str, *, suffix: str) -> str:
    before = r"[^\r\n\p{L}\p{N}]?"
    words = f"{before}{_UPPER}*{_LOWER}+{suffix}|{before}{_UPPER}+{_LOWER}*{suffix}"
    return "|".join((words, numbers, r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _LINES, _SPACES))


TEKKEN = _cased_words(NUMERAL, suffix="")
GPT4O = _cased_words(r"\p{N}{1,3}", suffix=_ANY_CASE_CONTRACTION + "?")

_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _LINES + "|" + _SPACES,
)
_UNNAMED = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class PreTokenizerRule:
    """The chain of cuts, and what else comes with the name."""

    patterns: tuple[str, ...]
    whole_pieces_first: bool = False
    """A piece that is a token as it stands is not merged from its bytes (tokenizers' ``ignore_merges``)."""
    adds_bos: bool = False
    """Whether a prompt begins with BOS where the file does not say."""
    composes: bool = False
    """Text is brought to Unicode's form C first (Qwen's own normalizer)."""


_BY_DIGIT_THEN_GPT2 = PreTokenizerRule((NUMERAL, GPT2))
_PLAIN_GPT2 = PreTokenizerRule((GPT2,))
_QWEN2 = PreTokenizerRule((QWEN2,), composes=True)
_LLAMA3 = PreTokenizerRule((LLAMA3,), whole_pieces_first=True, adds_bos=True)
_GPT4O = PreTokenizerRule((GPT4O,))

RULES: Mapping[str, PreTokenizerRule] = {
    "default": PreTokenizerRule(_UNNAMED),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), PreTokenizerRule((LLAMA3,))),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), _BY_DIGIT_THEN_GPT2),
    "minerva-7b": _BY_DIGIT_THEN_GPT2,
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling"), _PLAIN_GPT2),
    **dict.fromkeys(("gigachat", "a.x-4.0", "mellum", "exaone4"), _PLAIN_GPT2),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("megrez", "stablelm2", "hunyuan"), PreTokenizerRule((QWEN2,))),
    "qwen35": PreTokenizerRule((QWEN35,), composes=True),
    "tekken": PreTokenizerRule((TEKKEN,), whole_pieces_first=True, adds_bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "deepseek-v3": PreTokenizerRule(_DEEPSEEK3),
}


def byte_level_pre_tokenizer(rule: PreTokenizerRule) -> pre_tokenizers.PreTokenizer:
    """The rule as `tokenizers` runs it: the cuts, then bytes as the printable characters that stand for them."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# A digit cuts first, so white space before it is a piece that ends there, and is matched whole.
_DIGITS_THEN_GPT2_AS_ONE = NUMERAL + "|" + _CONTRACTION + r"| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|" + _SPACES
_AS_ONE: Mapping[tuple[str, ...], str] = {
    (NUMERAL, GPT2): _DIGITS_THEN_GPT2_AS_ONE,
    **{(pattern,): pattern for pattern in (GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN, GPT4O)},
}


def as_one_pattern(pre_tokenizer: pre_tokenizers.PreTokenizer | None) -> str | None:
    """One expression whose matches, in turn, are the pieces of a byte-level pre-tokenizer; None if not known."""
    if pre_tokenizer is None:
        return None
    described = json.loads(pre_tokenizer.__getstate__())
    stages = described["pretokenizers"] if described["type"] == "Sequence" else [described]
    patterns = [_stage_patterns(stage) for stage in stages]
    if not stages or stages[-1]["type"] != "ByteLevel" or None in patterns:
        return None
    return _AS_ONE.get(tuple(pattern for stage in patterns if stage is not None for pattern in stage))


def _stage_patterns(stage: Mapping[str, object]) -> tuple[str, ...] | None:
    """The cuts of one stage of a pre-tokenizer; None where it does something else as well."""
    match stage:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
            return (GPT2,) if use_regex else ()
        case {"type": "Digits", "individual_digits": True}:
            return (NUMERAL,)
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return (pattern,)
    return None


# A letter that has been assigned for decades, before a space or a mark: a piece of every pattern above ends with the
# letter, whatever came before it, and the next begins as it would at the start of a text.
_AFTER_WORD = "[A-Za-z\u0400-\u044f\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3](?=[ ,.\u3001\u3002\uff0c])"
_AFTER_DIGIT = "[0-9](?=[0-9])"
_DIGITS_ALONE = frozenset({_DIGITS_THEN_GPT2_AS_ONE, QWEN2, QWEN35, TEKKEN})


def piece_end(pattern: str) -> re.Pattern[str]:
    """Finds places at which a text can be cut in two, for one of the patterns that `as_one_pattern` gives.

    The pieces of both halves, found apart, are those of the whole.  Not every such place is found.
    """
    return re.compile(f"{_AFTER_WORD}|{_AFTER_DIGIT}" if pattern in _DIGITS_ALONE else _AFTER_WORD)

"""Texts on which two implementations of one tokenizer have been seen to differ, for checking one against another."""

_SPACES = ("\t\n\v\f\r \u0085\u00a0", "\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff")
_DIGITS = "0\u00b2\u00bd\u0663\u0967\u0e53\u2167\u2460\u3007\u3021\uff11\U0001d7d8"
_MARKS = "e\u0301a\u0308\u0327n\u0303 \u0915\u094d\u0937\u093f \u0e01\u0e33 \u05e9\u05c1 \u0649\u0670"
_LETTERS = "\u01c5\u02b0\u0345\u1e9e\u017f\u212a\u2c65\ua7c2\uab30\u10a0\u1c90\u13a0\uab70\U00010400"
_RECENT = "\u1c89\ua7cb\u0897\U00016d40\U0001e4d0\U000105c0\U0001cd00\U00031350\U0001fae9"
_EMOJI = "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f44d\U0001f3fd"
_SCRIPTS = "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155 \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627"

_RUNS = tuple(
    letter * count for letter in ("a", " ", "\n", "\r\n", "0", "!", "_", "\u00e9", "\u4e2d") for count in (2, 3, 7, 300)
)
_SHAPES = (
    "",
    "a  1",
    "a   b",
    "a \n b\n\n\nc \n",
    " \n \n x",
    "1 2  3   4\n5\t6",
    "123456789 1234.5678e-9 0x1F",
    "x1y22z333 \u00b2\u00b2",
    "I'm you'll they've he'd it's we're don't",
    "I'M YOU'LL THEY'VE HE'D IT'S 'S'T 's't''s 'sx",
    "'\u017f '\u212a \u2019s",
    "foo_bar-baz::Qux<T>(a->b[0], &c); // !?#$%^",
    "HelloWorld helloWORLD HELLOWorld hELLO",
    "def f(x):\n    return x  # done\n\n\n\tif\tx:\r\n        pass\r\n",
    "!!! ... ??\n\n---\n***\n///\n",
    "\x00\x01\x02\x03\x04\x1b[0m\x7f",
    "\u0000 \ufffd \ufffe \uffff \U0010ffff \U000f0000 \ue000",
    "trailing space ",
    "trailing spaces   ",
    "   leading",
    "\nleading line",
)
_BETWEEN = tuple(
    f"a{character}b {character}1{character} ." for character in "".join((*_SPACES, _DIGITS, _LETTERS, _RECENT))
)

AWKWARD_TEXTS: tuple[str, ...] = (
    *_SHAPES,
    *_SPACES,
    _DIGITS,
    _MARKS,
    _LETTERS,
    _RECENT,
    _EMOJI,
    _SCRIPTS,
    *_RUNS,
    *_BETWEEN,
)

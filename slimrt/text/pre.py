"""Pre-tokenizers: how text is cut into pieces before byte pairs are merged inside each piece.

GGUF names the rule in ``tokenizer.ggml.pre``; the names and the rules are those of llama.cpp's ``llama-vocab.cpp``,
where each rule is a sequence of regular expressions: every piece so far is cut into the matches of the next
expression and the gaps between them. A lookahead sees the end of its piece as the end of the text.

``tekken``, ``gpt-4o`` and their like differ from llama.cpp on purpose: they keep the letter classes of the models' own
files (upper, lower, mark), which llama.cpp approximates with ``[^a-z]`` because ``std::regex`` has no such classes. So
do ``kimi-k2`` and ``tiny_aya``; and ``afmoe`` cuts in front of a run of digits, as the models' expression does, where
llama.cpp leaves what stands before the run with its first digits. ``whitespace`` alone is left out: it comes with a
tokenizer model of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import regex

__all__ = ["CONTRACTION", "GPT2", "PRE_TOKENIZERS", "PreTokenizer", "thousands_by_boundary", "thousands_marked"]

Step = str | Callable[[str], list[str]]
"""A regular expression, or a function from a piece to the pieces that it falls into."""

# Contractions are spelt out: (?i:'s) would also match U+017F, the long s, which folds to s.
CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN35 = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED = rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"

_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?:{CONTRACTION})?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?:{CONTRACTION})?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

_DEEPSEEK_LLM = (
    r"[\r\n]",
    r"\s?["
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    r"\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    r"\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    r"\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    r"\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    r"\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    r"\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    r"\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    r"\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    r"\U0001e900-\U0001e943"
    r"]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"(?<!\s)\s+$",  # the lookbehind keeps a run of n spaces from being tried n times
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    rf"{_SPACES}",
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
_DIGITS_APART = (r"\p{N}", GPT2)

_JAIS2_SPACES = "|".join([*(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)), r"\s{1,2}(?!\S)|\s{1}"])
_JAIS2 = _LLAMA3.removesuffix(r"\s+(?!\S)|\s+") + _JAIS2_SPACES
_UFAKZEKA = _QWEN2.removeprefix(f"{CONTRACTION}|")
_MINICPM5 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}+")
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
_EXAONE_MOE = (
    rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_SPARK = (
    *_DEEPSEEK_V3[:2],
    _DEEPSEEK_V3[2].replace(rf"[\r\n]*|{_SPACES}", r"|[\r\n]|\s+(?!\S)|\s+"),
    r"\p{N}",
)
_YOUTU = (
    r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    _GPT4O.replace(r"\p{N}{1,3}", r"\p{N}"),
)
# Moonshot's tokenization_kimi.py: o200k's expression with Chinese characters apart from all other letters.
_KIMI = r"\p{Han}+|" + _GPT4O.replace(_UPPER, rf"(?:(?!\p{{Han}}){_UPPER})").replace(
    _LOWER, rf"(?:(?!\p{{Han}}){_LOWER})"
).replace(r"[\r\n/]*", r"[\r\n]*")
_BLOOM = r" ?[^(\s|.,!?…。，、।۔،)]+"
_CHAMELEON = (
    r"<sentinel:[0-9]+>",
    r"IMGIMG[A-I]{1,4}Z",
    r"[\t\n]|    |  ",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    GPT2,
)
_LINES = r"[^\n]+|\n+"
_AFMOE_SCRIPTS = (
    r"[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e00-\u0e7f"
    r"\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)


def _threes(run: str) -> list[str]:
    """``run`` in threes from the right; what is left over comes first."""
    first = len(run) % 3
    return [run[:first], *(run[at : at + 3] for at in range(first, len(run), 3))]


def _cut_runs(expression: str, cut: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    # A lookahead for the rest of the run, as the models' own files have it, takes the square of its length.
    split = regex.compile(f"({expression})").split

    def apply(text: str) -> list[str]:
        pieces: list[str] = []
        for at, piece in enumerate(split(text)):
            pieces += cut(piece) if at % 2 else [piece]
        return pieces

    return apply


_thousands = _cut_runs(r"\p{N}+", _threes)
# A word character as Oniguruma has it, which runs these expressions in the tokenizers library.
thousands_by_boundary = _cut_runs(r"\p{Nd}+(?![\p{Alphabetic}\p{M}\p{Nd}\p{Pc}²³¹¼-¾])", _threes)
r"""What ``\d{1,3}(?=(?:\d{3})*\b)`` cuts."""


def thousands_marked(text: str) -> list[str]:
    r"""``text`` cut wherever ``(?=(\d{3})+(?!\d))`` matches; the rest of a run stays with what is before it."""
    places = [0]
    for run in regex.finditer(r"\d+", text):
        first = run.start() + (run.end() - run.start()) % 3
        places += range(first, run.end(), 3)
    return [text[begin:end] for begin, end in zip(places, [*places[1:], len(text)], strict=True)]


@dataclass(frozen=True)
class PreTokenizer:
    """One rule: ``patterns`` applied in order; whether a piece that is a vocabulary entry skips merging
    (``ignore_merges``); whether BOS is put in front where the metadata does not say (``add_bos``). ``raw``: entries are
    written as they are, with a low line for a space, and not in the byte alphabet."""

    patterns: tuple[Step, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    raw: bool = False

    def split(self, text: str) -> list[str]:
        """The pieces of ``text``, in order; joined they are ``text`` again."""
        pieces = [text]
        for pattern in self.patterns:
            # A pattern in one group makes split() return gaps and matches in turn; gaps may be empty.
            split = regex.compile(f"({pattern})").split if isinstance(pattern, str) else pattern
            pieces = list(filter(None, chain.from_iterable(map(split, pieces))))
        return pieces


_RULES: list[tuple[PreTokenizer, str]] = [
    (PreTokenizer(_DEFAULT), "default"),
    (
        PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True),
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
    ),
    (PreTokenizer((_LLAMA3,), ignore_merges=True), "glm4 glm5"),
    (PreTokenizer((_LLAMA3,)), "dbrx smaug-bpe chatglm-bpe"),
    (PreTokenizer(_DIGITS_APART), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
    (
        PreTokenizer((_QWEN2,)),
        "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan grok-2 solar-open",
    ),
    (PreTokenizer((_QWEN35,)), "qwen35"),
    (
        PreTokenizer((GPT2,)),
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling gigachat a.x-4.0 mellum exaone4 modern-bert roberta-bpe "
        "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code",
    ),
    (PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True), "tekken"),
    (PreTokenizer((_GPT4O,)), "gpt-4o llama4 kanana2 talkie minimax-m2"),
    (PreTokenizer((_GPT4O,), ignore_merges=True), "granite-embed-multi-97m"),
    (PreTokenizer((_SEED,)), "seed-coder"),
    (PreTokenizer(_DEEPSEEK_LLM), "deepseek-llm"),
    (PreTokenizer(_DEEPSEEK_CODER), "deepseek-coder"),
    (PreTokenizer(_DEEPSEEK_V3), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
    (PreTokenizer(_FALCON), "falcon"),
    (PreTokenizer((_JAIS2,)), "jais-2"),
    (PreTokenizer((_UFAKZEKA,)), "ufakzeka"),
    (PreTokenizer((r"\p{N}{1,3}", _MINICPM5), ignore_merges=True), "minicpm5"),
    (PreTokenizer((_BAILING,)), "bailingmoe bailingmoe2 llada-moe"),
    (PreTokenizer((_EXAONE_MOE,)), "exaone-moe"),
    (PreTokenizer(_SPARK), "spark2_5"),
    (PreTokenizer(_YOUTU, ignore_merges=True), "youtu"),
    (PreTokenizer((_KIMI,)), "kimi-k2"),
    (PreTokenizer((_BLOOM,)), "bloom poro-chat gpt3-finnish"),
    (PreTokenizer((_BLOOM, r"\p{N}")), "viking"),
    (PreTokenizer(_CHAMELEON, add_bos=True), "chameleon"),
    (PreTokenizer((thousands_by_boundary, _GPT4O)), "tiny_aya cohere2moe"),
    (PreTokenizer((_thousands, _AFMOE_SCRIPTS, _DEEPSEEK_V3[2])), "afmoe"),
    (PreTokenizer((r"\p{N}+", thousands_marked)), "superbpe"),
    (PreTokenizer((_LINES, _QWEN2)), "laguna"),
    (PreTokenizer((_LINES,), add_bos=True, raw=True), "gemma4 granite-embed-multi-311m"),
    (PreTokenizer((_LINES,), raw=True), "sarvam-moe"),
]

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: rule for rule, names in _RULES for name in names.split()}
"""Every value of ``tokenizer.ggml.pre`` that is understood."""

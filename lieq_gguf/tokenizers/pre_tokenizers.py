"""Finds the pre-tokenizer of llama.cpp that splits text like a tokenizer.json.

llama.cpp has the rules built in, each under a name. The name is found from the rules in tokenizer.json, not from the
ids of a test text, so fine-tunes with added tokens and new vocabularies with a known rule are recognised too. If
llama.cpp has several names for one rule, added tokens that only one family has decide, as in its converter.
A new rule is one more row in the table.

Source: the regular expressions are those in the models' own tokenizer.json; names and the defaults that come with
them (adding BOS, ignoring merges) as in llama.cpp build 0.3.36 of llama-cpp-python.
"""

import difflib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, replace

import tokenizers

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers.model_files import JsonObject, steps

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN_2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN_3_5 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_START = r"[^\r\n\p{L}\p{N}]?"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_TEKKEN = rf"{_START}{_UPPER}*{_LOWER}+|{_START}{_UPPER}+{_LOWER}*|\p{{N}}|{_PUNCTUATION}|{_SPACES}"
_GPT_4O = (
    rf"{_START}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_START}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}|{_PUNCTUATION}|{_SPACES}"
)
_SEED = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_MINICPM_5 = _LLAMA_3.replace("{1,3}", "+")
_UP_TO_THREE_DIGITS = r"Split(\p{N}{1,3})"
_CHINESE_OR_JAPANESE = "Split([\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+)"
_DEEPSEEK_3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)

# spellings that split every text in the same way, as they occur in the models' files, and those used in the table
_SPELLINGS = (
    ("\r", r"\r"),  # the character itself
    ("\n", r"\n"),
    (r"'(?i:[sdmt]|ll|ve|re)", _CONTRACTIONS),
    # what follows a possessive quantifier here is nothing that it could give back
    (r"[^\r\n\p{L}\p{N}]?+\p{L}", r"[^\r\n\p{L}\p{N}]?\p{L}"),
    (r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]+[\r\n]*"),
    (r"\p{N}{1}|", r"\p{N}|"),
    # a run of blanks up to its last line break, since \s includes line breaks
    (r"|\s*[\r\n]|", r"|\s*[\r\n]+|"),
)
_LAST_BLANK = r"|\s+(?!\S)|\s"  # only one blank can be left for the last alternative

_BYTES = "ByteLevel"
_GPT_2_WORDS = "ByteLevel(words)"
_EACH_DIGIT = "Digits(each)"
# segments of the check's texts in which llama.cpp can differ because of a caveat
_MARKS = frozenset({"accents, decomposed", "arabic", "hebrew", "devanagari", "thai", "khmer"})
_DECOMPOSED = frozenset({"accents, decomposed"})
_CAPITALS = frozenset({"accents, composed", "russian", "greek"})
_CASE_CAVEAT = "llama.cpp recognises only ASCII capitals here and treats combining marks as punctuation"
_O200K_CAVEAT = (
    f"{_CASE_CAVEAT} (with --pre-tokenizer granite-embed-multi-97m it does not, but older llama.cpp lacks that name)"
)
_NFC_CAVEAT = "llama.cpp does not normalise to NFC, so decomposed accents give other tokens"


@dataclass(frozen=True)
class PreTokenizer:
    """One of llama.cpp's pre-tokenizers and the structure of tokenizer.json that it matches.

    Attributes:
        name: the value of ``tokenizer.ggml.pre``.
        steps: the pre-tokenizer in tokenizer.json, in the notation of :func:`describe_steps`.
        ignore_merges: whether llama.cpp takes words that are in the vocabulary whole.
        normalizer: the normalizer in tokenizer.json, in the same notation.
        markers: added tokens that distinguish this name from others with the same structure; all must be present.
            Empty for the name that applies if no other name's markers are present.
        adds_bos: llama.cpp's default if a file does not say whether BOS is automatic.
        caveat: where llama.cpp is known to deviate from the rule; empty if nowhere.
        caveat_segments: segments of the check's texts that the caveat explains.
    """

    name: str
    steps: tuple[str, ...]
    ignore_merges: bool = False
    normalizer: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()
    adds_bos: bool = False
    caveat: str = ""
    caveat_segments: frozenset[str] = frozenset()


_DEEPSEEK_BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
_HUNYUAN_BOS = _DEEPSEEK_BOS.replace("begin", "hy_begin")
_EXAONE_END = "[|endofturn|]"


def _with_nfc(row: PreTokenizer) -> tuple[PreTokenizer, PreTokenizer]:
    """The row, and the same with a normalizer that llama.cpp does not have."""
    return row, replace(row, normalizer=("NFC",), caveat=_NFC_CAVEAT, caveat_segments=_DECOMPOSED)


# The first matching row counts, so rows with markers come before rows without. The converter knows a name by the ids of
# one vocabulary; a marker is a token that all models with this name have and others with the same rule do not.
TABLE = (
    PreTokenizer("exaone4", (_GPT_2_WORDS,), markers=(_EXAONE_END,)),
    # mpt, jais, phi-2 and others have the same structure, and llama.cpp treats them the same way
    PreTokenizer("gpt-2", (_GPT_2_WORDS,)),
    # GPT-NeoX and OLMo 1, which uses its tokenizer
    _with_nfc(PreTokenizer("olmo", (_GPT_2_WORDS,)))[1],
    # StarCoder and its successors: Refact and Granite 3 have the tokens of StarCoder, StarCoder 2 has others
    PreTokenizer("refact", (_EACH_DIGIT, _GPT_2_WORDS), markers=("<fim_prefix>", "<reponame>")),
    PreTokenizer("starcoder", (_EACH_DIGIT, _GPT_2_WORDS), markers=("<fim_prefix>",)),
    PreTokenizer("exaone", (_EACH_DIGIT, _GPT_2_WORDS), markers=(_EXAONE_END,)),
    # codeshell and others have the same structure; SmolLM2's name stands for all
    PreTokenizer("smollm", (_EACH_DIGIT, _GPT_2_WORDS)),
    # LFM2 and LFM2.5
    PreTokenizer(
        "lfm2", (f"Split({_LLAMA_3})", _BYTES), ignore_merges=True, markers=("<|startoftext|>",), adds_bos=True
    ),
    # Mistral's vocabulary where it was converted with Llama 3's rule: Pixtral, Nemotron-H
    PreTokenizer("pixtral", (f"Split({_LLAMA_3})", _BYTES), ignore_merges=True, markers=("[INST]",), adds_bos=True),
    # GLM-4 of 2025 and GLM-4.5; the first GLM-4 does not take words whole
    PreTokenizer("glm4", (f"Split({_LLAMA_3})", _BYTES), ignore_merges=True, markers=("[gMASK]",)),
    PreTokenizer("chatglm-bpe", (f"Split({_LLAMA_3})", _BYTES), markers=("[gMASK]",)),
    # Arcee and SmolLM3 too. llama.cpp's converter takes SmolLM3 for smaug-bpe, because its hash is that of a text
    # without BOS; but smaug-bpe does not take words in the vocabulary whole. A separate key says that BOS is not
    # automatic.
    PreTokenizer("llama-bpe", (f"Split({_LLAMA_3})", _BYTES), ignore_merges=True, adds_bos=True),
    # OpenAI's cl100k, recognised by its fill-in-the-middle tokens: DBRX, Olmo 2 and 3, Phi-4, Granite 4
    PreTokenizer("dbrx", (f"Split({_LLAMA_3})", _BYTES), markers=("<|fim_prefix|>",)),
    # Llama 3's rule in a file that does not ignore merges
    PreTokenizer("smaug-bpe", (f"Split({_LLAMA_3})", _BYTES)),
    PreTokenizer("minicpm5", (_UP_TO_THREE_DIGITS, f"Split({_MINICPM_5})", _BYTES), ignore_merges=True),
    # Mistral since Nemo, Apertus
    PreTokenizer(
        "tekken",
        (f"Split({_TEKKEN})", _BYTES),
        ignore_merges=True,
        adds_bos=True,
        caveat=_CASE_CAVEAT,
        caveat_segments=_MARKS | _CAPITALS,
    ),
    # llama.cpp treats it like qwen2; DeepSeek's distillations have their own tokens
    *_with_nfc(PreTokenizer("deepseek-r1-qwen", (f"Split({_QWEN_2})", _BYTES), markers=(_DEEPSEEK_BOS,))),
    # Qwen 1.5 to 3; stablelm2, megrez and others have the same structure
    *_with_nfc(PreTokenizer("qwen2", (f"Split({_QWEN_2})", _BYTES))),
    *_with_nfc(PreTokenizer("qwen35", (f"Split({_QWEN_3_5})", _BYTES))),
    # Seed-OSS too
    PreTokenizer("seed-coder", (f"Split({_SEED})", _BYTES)),
    # OpenAI's o200k: gpt-oss, Phi-4-mini
    PreTokenizer("gpt-4o", (f"Split({_GPT_4O})", _BYTES), caveat=_O200K_CAVEAT, caveat_segments=_MARKS | _CAPITALS),
    # the same rule under two names
    PreTokenizer(
        "hunyuan-dense",
        (_UP_TO_THREE_DIGITS, _CHINESE_OR_JAPANESE, f"Split({_DEEPSEEK_3})", _BYTES),
        markers=(_HUNYUAN_BOS,),
    ),
    PreTokenizer("deepseek-v3", (_UP_TO_THREE_DIGITS, _CHINESE_OR_JAPANESE, f"Split({_DEEPSEEK_3})", _BYTES)),
)

#: other names that llama.cpp accepts for byte-level BPE, which a user may give
OTHER_NAMES = (
    "a.x-4.0", "afmoe", "bailingmoe", "bailingmoe2", "bloom", "chameleon", "codeshell", "cohere2moe", "command-r",
    "deepseek-coder", "deepseek-llm", "default", "exaone-moe", "f2llmv2", "falcon", "falcon-h1", "falcon3",
    "gigachat", "gpt3-finnish", "granite-docling", "granite-embed-multi-97m", "grok-2", "hunyuan", "hy_v4",
    "jais", "jais-2", "joyai-llm", "kanana2", "kormo", "laguna", "llada-moe", "llama-v3", "llama3", "llama4",
    "megrez", "mellum", "mellum2", "midm-2.0", "minerva-7b", "minimax-m2", "modern-bert", "mpt", "phi-2",
    "poro-chat", "solar-open", "spark2_5", "stablelm2", "superbpe", "talkie", "tiny_aya", "trillion", "ufakzeka",
    "viking", "youtu",
)  # fmt: skip

# the names outside the table that add BOS by default
_ADD_BOS = frozenset({"chameleon", "falcon-h1", "falcon3", "llama-v3", "llama3", "midm-2.0"})


def recognise(tokenizer: tokenizers.Tokenizer, source: str) -> str:
    """Name of the pre-tokenizer that matches tokenizer.json.

    Args:
        tokenizer: a byte-level BPE.
        source: name of the file, for the message.

    Raises:
        TokenizerError: if no row of the table matches.
    """
    described = describe_steps(tokenizer)
    normalizer = tuple(_describe(step) for step in steps(tokenizer.normalizer))
    ignore_merges = bool(getattr(tokenizer.model, "ignore_merges", False))
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    same = [
        row
        for row in TABLE
        if row.steps == described and row.normalizer == normalizer and added.issuperset(row.markers)
    ]
    exact = [row for row in same if row.ignore_merges == ignore_merges]
    if exact or (same and _merges_make_every_word(tokenizer, added)):
        return (exact or same)[0].name
    text = " then ".join((*normalizer, *described)) or "nothing"
    nearest = _nearest(text, ignore_merges)
    raise TokenizerError(
        f"{source}: the pre-tokenizer (ignore_merges={ignore_merges}) is {_shorten(text)!r}, which matches no known "
        f"one; the nearest are {', '.join(nearest)}; pass --pre-tokenizer NAME if you know llama.cpp's name for it"
    )


def checked_name(name: str) -> str:
    """The name itself, if llama.cpp has a pre-tokenizer of that name.

    Raises:
        TokenizerError: if llama.cpp would refuse a file with that name.
    """
    names = sorted({row.name for row in TABLE} | set(OTHER_NAMES))
    if name in names:
        return name
    nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.0)
    raise TokenizerError(
        f"llama.cpp has no pre-tokenizer {name!r}; the nearest are {', '.join(nearest)}; "
        "pass one of these with --pre-tokenizer NAME, or leave it out to have it recognised"
    )


def adds_bos_by_default(name: str) -> bool:
    """Whether llama.cpp adds BOS to a text if a file with this pre-tokenizer does not say."""
    return name in _ADD_BOS or any(row.adds_bos for row in TABLE if row.name == name)


def pre_tokenizer_caveat(name: str) -> str:
    """Where llama.cpp is known to deviate from the rule of this name; empty if nowhere."""
    return next((row.caveat for row in TABLE if row.name == name and row.caveat), "")


def explained_segments(name: str) -> frozenset[str]:
    """Segments of the check's texts where a difference comes from llama.cpp, not from the file."""
    return frozenset().union(*(row.caveat_segments for row in TABLE if row.name == name))


def _merges_make_every_word(tokenizer: tokenizers.Tokenizer, added: Collection[str]) -> bool:
    """Whether merges alone lead to each word of the vocabulary, so that it does not matter if it is taken whole."""
    model = tokenizer.model
    ignored, model.ignore_merges = model.ignore_merges, False
    try:
        words = tokenizer.get_vocab(with_added_tokens=False)
        return all(word in added or len(model.tokenize(word)) == 1 for word in words)
    finally:
        model.ignore_merges = ignored


def describe_steps(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """The pre-tokenizer's steps in a short notation, without options that do not change the words."""
    return tuple(_describe(step) for step in steps(tokenizer.pre_tokenizer))


def _describe(step: JsonObject) -> str:
    options = {key: value for key, value in step.items() if key not in ("type", "trim_offsets")}
    kind = str(step["type"])
    if kind == "ByteLevel" and not options["add_prefix_space"]:
        return _GPT_2_WORDS if options["use_regex"] else _BYTES
    if kind == "Digits" and options["individual_digits"]:
        return _EACH_DIGIT
    if kind == "Split" and "Regex" in options["pattern"]:
        # isolating the matches and removing the rest are the same when the matches cover the text
        way = (options["behavior"], options["invert"])
        if way in (("Isolated", False), ("Removed", True)):
            return f"Split({_usual_spelling(options['pattern']['Regex'])})"
    return kind + (json.dumps(options, sort_keys=True) if options else "")


def _usual_spelling(regex: str) -> str:
    for other, usual in _SPELLINGS:
        regex = regex.replace(other, usual)
    return regex + "+" if regex.endswith(_LAST_BLANK) else regex


def _nearest(text: str, ignore_merges: bool) -> list[str]:
    # compare alternatives of the expressions: by characters, any two long expressions would look alike
    def distance(row: PreTokenizer) -> tuple[float, bool, bool, str]:
        described = " then ".join((*row.normalizer, *row.steps))
        own, other = (re.split(r"[|()]|(?= then )", t) for t in (text, described))
        similarity = difflib.SequenceMatcher(None, own, other).ratio()
        return -similarity, row.ignore_merges != ignore_merges, bool(row.markers), row.name

    return list(dict.fromkeys(row.name for row in sorted(TABLE, key=distance)))[:3]


def _shorten(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

"""How a SentencePiece Unigram tokenizer prepares a text, which llama.cpp needs besides its pieces.

llama.cpp takes the likeliest pieces only in files with tokenizer model ``t5``, whatever the architecture; with
``llama`` it merges. Yet its converter writes ``llama`` for decoder-only models.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers.model_files import JsonObject, TokenizerFiles, steps
from lieq_gguf.tokenizers.sentencepiece_model import SentencePieceModel

_SEVERAL_BLANKS = {"Regex": " {2,}"}


@dataclass(frozen=True)
class Preparation:
    """What is done to a text before it is split into pieces.

    Attributes:
        adds_space_prefix: whether it gets a leading blank.
        removes_extra_whitespaces: whether blanks at the ends are removed and runs of blanks become one.
        precompiled_charsmap: SentencePiece's table of replacements, empty if there is none.
    """

    adds_space_prefix: bool
    removes_extra_whitespaces: bool
    precompiled_charsmap: bytes


def preparation_by_model(model: SentencePieceModel, path: Path) -> Preparation:
    """How a tokenizer.model prepares a text.

    Raises:
        TokenizerError: if llama.cpp does not support the tokenizer.
    """
    _check_byte_fallback(model.has_byte_fallback, path)
    return Preparation(model.adds_space_prefix, model.removes_extra_whitespaces, model.precompiled_charsmap)


def preparation_by_json(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer) -> Preparation:
    """How a tokenizer.json with a Unigram model prepares a text.

    Raises:
        TokenizerError: if llama.cpp does not support the tokenizer.
    """
    path = files.json_path
    _check_byte_fallback(bool((files.tokenizer_json or {})["model"].get("byte_fallback")), path)
    normalizers, splitters = steps(tokenizer.normalizer), steps(tokenizer.pre_tokenizer)
    blanks = [step for step in splitters if step["type"] == "Metaspace"]
    unknown = [str(step["type"]) for step in normalizers if not _is_known(step)]
    unknown += [str(step["type"]) for step in splitters if step["type"] not in ("Metaspace", "WhitespaceSplit")]
    if unknown or not blanks:
        used = " and ".join(unknown) or "no Metaspace"
        raise TokenizerError(
            f"{path}: the Unigram tokenizer prepares texts by {used}; llama.cpp supports only SentencePiece's steps "
            "(Precompiled, Strip, Replace of several blanks, Metaspace); this tokenizer cannot be converted"
        )
    charsmaps = [step["precompiled_charsmap"] for step in normalizers if step["type"] == "Precompiled"]
    return Preparation(
        adds_space_prefix=blanks[0]["prepend_scheme"] != "never",
        removes_extra_whitespaces=any(
            step["type"] in ("Replace", "WhitespaceSplit") for step in normalizers + splitters
        ),
        precompiled_charsmap=base64.b64decode(charsmaps[0]) if charsmaps else b"",
    )


def _is_known(step: JsonObject) -> bool:
    if step["type"] == "Replace":
        return bool(step["pattern"] == _SEVERAL_BLANKS and step["content"] in (" ", "\N{LOWER ONE EIGHTH BLOCK}"))
    return step["type"] in ("Precompiled", "Strip")


def _check_byte_fallback(has_byte_fallback: bool, path: Path) -> None:
    if has_byte_fallback:
        raise TokenizerError(
            f"{path}: the Unigram tokenizer writes unknown characters as bytes, but llama.cpp's Unigram tokenizer "
            "loses such characters; this tokenizer cannot be converted"
        )

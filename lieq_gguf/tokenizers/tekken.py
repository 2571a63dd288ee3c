"""tekken.json: Mistral's own format of a byte-level BPE, and the tokenizer.json that it stands for.

It holds the bytes of every token in the order in which they are merged, and no merges. Mistral's newer models come with
it, some without a tokenizer.json.

Source: the format as in mistral-common 1.13; the merges are those of transformers' conversion (version 5.24).
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lieq_gguf.errors import TokenizerError

#: roles of tokens, which the format does not name
ROLES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}

# the special tokens of files before version 11 of the format, which do not list them
_FIRST_SPECIAL = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip


def as_tokenizer_json(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The same tokenizer as a tokenizer.json, with BOS before every text, as Mistral's own library adds it.

    Args:
        content: the parsed tekken.json.
        path: its path, for messages.

    Raises:
        TokenizerError: if it is no tekken.json, or its special tokens have gaps.
    """
    try:
        config = content["config"]
        pattern = config["pattern"]
        special = _special_tokens(content, config.get("default_num_special_tokens"), path)
        tokens = [base64.b64decode(entry["token_bytes"]) for entry in content["vocab"]]
        if config.get("default_vocab_size") is not None:
            tokens = tokens[: config["default_vocab_size"] - len(special)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TokenizerError(
            f"{path}: {type(error).__name__} {error} while reading it; expected Mistral's tekken.json with config and "
            "vocab; download the file again"
        ) from error
    spelling = _spelling_of_bytes()
    texts = ["".join(spelling[byte] for byte in token) for token in tokens]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = special.index(ROLES["bos_token"])
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text, **flags} for i, text in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": _starting_with(special[bos], bos),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {text: i for i, text in enumerate([*special, *texts])},
            "merges": _merges(tokens, texts),
        },
    }


def _special_tokens(content: Mapping[str, Any], n_special: int | None, path: Path) -> list[str]:
    """Special tokens, which have the first ids; unused ones at the end have a name made of their id."""
    listed = content.get("special_tokens")
    if listed is None:
        listed = [{"rank": rank, "token_str": text} for rank, text in enumerate(_FIRST_SPECIAL)]
    by_rank = {entry["rank"]: str(entry["token_str"]) for entry in listed}
    texts = [by_rank.get(rank, f"<SPECIAL_{rank}>") for rank in range(n_special or len(listed))]
    if ROLES["bos_token"] not in texts or sorted(by_rank) != list(range(len(listed))) or len(texts) < len(listed):
        raise TokenizerError(
            f"{path}: the {len(listed)} special tokens have other ids than 0 to {len(listed) - 1}, or there is no <s>; "
            "download the file again"
        )
    return texts


def _merges(tokens: Sequence[bytes], texts: Sequence[str]) -> list[list[str]]:
    """Every way to make a token from two others, in the order of the tokens, then of their parts."""
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    merges = []
    for token in tokens:
        parts = [(rank_of.get(token[:i]), rank_of.get(token[i:])) for i in range(1, len(token))]
        for left, right in sorted((a, b) for a, b in parts if a is not None and b is not None):
            merges.append([texts[left], texts[right]])
    return merges


def _spelling_of_bytes() -> dict[int, str]:
    """How byte-level BPE spells bytes: as the character of that number if it is visible, else as one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _starting_with(text: str, token_id: int) -> dict[str, Any]:
    first, second = ({"SpecialToken": {"id": text, "type_id": i}} for i in (0, 1))
    a, b = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    known = {text: {"id": text, "ids": [token_id], "tokens": [text]}}
    return {"type": "TemplateProcessing", "single": [first, a], "pair": [first, a, second, b], "special_tokens": known}

"""Tokens with a role (BOS, EOS...) and which of them are added to a text automatically.

The rules are those of llama.cpp's converter, so that the same keys are written; they are here because the gguf package
on PyPI is older than the converter and lacks some of them.
"""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import tokenizers

from lieq_gguf.tokenizers.model_files import ROLES, JsonObject, TokenizerFiles, component
from lieq_gguf.tokenizers.vocabulary import SpecialTokens

# the architectures that llama.cpp's converter handles like Llama; it recognises some models only by these numbers
_LLAMA_FAMILY = frozenset(
    {"llama", "afmoe", "apertus", "arcee", "granite", "granite_swa", "granitemoe", "mistral3", "smollm3"}
)
_PLAIN_TEXT = "Hello"
_CODE_LLAMA_VOCAB_SIZE = 32016
_CODE_LLAMA_EOT = 32010
_GRANITE_VOCAB_SIZE = 49152
# roles by architecture, for what no file says: GLM-4 ends its turn with the token that begins the user's
_FAMILY_ROLES = {
    "glm4": {"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"},
    "chatglm": {"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>"},
}


def read_special_tokens(
    files: TokenizerFiles,
    tokenizer: tokenizers.Tokenizer | None,
    vocab_size: int,
    architecture: str,
    adds_bos_by_default: bool,
) -> SpecialTokens:
    """Ids with a role, and the automatic ones.

    Args:
        files: the model's tokenizer files.
        tokenizer: the loaded tokenizer.json, if there is one.
        vocab_size: rows of the embedding; an id beyond it is left out.
        architecture: llama.cpp's name of the architecture.
        adds_bos_by_default: what llama.cpp does if the file does not say.
    """
    texts, automatic = _texts_and_automatic(files, tokenizer)
    added = {token.content: token_id for token_id, token in reversed(files.added_tokens().items())}
    ids: dict[str, int] = {}
    for role, text in texts.items():
        token_id = added.get(text or "")
        if token_id is None and tokenizer is not None and text:
            token_id = tokenizer.token_to_id(text)
        if token_id is None:
            token_id = files.configured_id(role)
        if isinstance(token_id, list) and token_id:  # of several tokens that end a text, the first
            token_id = token_id[0]
        # config.json may hold -1 for "none"
        if isinstance(token_id, int) and 0 <= token_id < vocab_size and role != "cls":
            ids[role] = token_id
    for role, text in _FAMILY_ROLES.get(architecture, {}).items():
        if text in added:
            ids.setdefault(role, added[text])
    if architecture == "hunyuan-dense":
        ids |= _hunyuan_ends(files)

    is_llama = is_llama_family(architecture)
    if is_llama and vocab_size == _CODE_LLAMA_VOCAB_SIZE:
        ids.setdefault("eot", _CODE_LLAMA_EOT)
    if is_llama and vocab_size == _GRANITE_VOCAB_SIZE:
        automatic["bos"] = False
    elif tokenizer is not None and "bos" not in automatic and adds_bos_by_default != _starts_with(tokenizer, ids):
        # no file says it, but the tokenizer differs from llama.cpp's default
        automatic["bos"] = not adds_bos_by_default
    return SpecialTokens(tuple(ids.items()), tuple(automatic.items()))


def _hunyuan_ends(files: TokenizerFiles) -> dict[str, int]:
    """The tokens that end a text and a turn of Hunyuan, whose tokenizer_config.json names a wrong one."""
    found = {"eos": files.model_config.get("eod_token_id")}
    ends = files.generation_config.get("eos_token_id")
    if isinstance(ends, list) and len(ends) > 1:
        found["eot"] = ends[0]
    return {role: token_id for role, token_id in found.items() if isinstance(token_id, int)}


def is_llama_family(architecture: str) -> bool:
    """Whether llama.cpp's converter reads vocabularies of this architecture like Llama's."""
    return architecture in _LLAMA_FAMILY


def swallows_blanks(tokenizer: tokenizers.Tokenizer | None) -> bool:
    """Whether blanks beside an added token are part of it."""
    added = {} if tokenizer is None else tokenizer.get_added_tokens_decoder()
    return any(token.lstrip or token.rstrip for token in added.values())


def added_before(tokenizer: tokenizers.Tokenizer) -> tuple[str, ...]:
    """Texts of the tokens that are added before a text."""
    encoding = tokenizer.encode(_PLAIN_TEXT, add_special_tokens=True)
    marked = zip(encoding.tokens, encoding.special_tokens_mask, strict=True)
    return tuple(text for text, is_added in takewhile(lambda pair: pair[1], marked))


def automatic_tokens(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer | None) -> dict[str, bool]:
    """Whether ``bos``, ``eos``, ``sep`` are added automatically; a role that no file mentions is missing."""
    return _texts_and_automatic(files, tokenizer)[1]


def _texts_and_automatic(
    files: TokenizerFiles, tokenizer: tokenizers.Tokenizer | None
) -> tuple[dict[str, str | None], dict[str, bool]]:
    texts = {role: files.role_text(role) for role in ROLES}
    texts["bos"] = texts["bos"] or texts["cls"]
    texts["eos"] = texts["eos"] or texts["sep"]
    automatic = _automatic_by_post_processor(tokenizer, texts)
    for role in ("bos", "eos", "sep"):
        is_added = files.config.get(f"add_{role}_token")
        if isinstance(is_added, bool):  # transformers 5 heeds it only if there is no tokenizer.json
            automatic.setdefault(role, is_added and tokenizer is None)
    return texts, automatic


def _automatic_by_post_processor(
    tokenizer: tokenizers.Tokenizer | None, texts: dict[str, str | None]
) -> dict[str, bool]:
    state = component(tokenizer.post_processor) if tokenizer is not None else None
    automatic: dict[str, bool] = {}
    for processor in (state or {}).get("processors", [state] if state else []):
        if processor["type"] == "ByteLevel":
            automatic.setdefault("bos", False)
            automatic.setdefault("eos", False)
        elif processor["type"] == "TemplateProcessing":
            automatic.update(_automatic_by_template(processor, texts))
    return automatic


def _automatic_by_template(template: JsonObject, texts: dict[str, str | None]) -> dict[str, bool]:
    """Read a template such as ``<s> $A </s>``; roles that only the template has are added to ``texts``."""
    single, pair = template["single"], template["pair"]
    first = _special_id(single[0]) if len(single) > 1 else None
    last = _special_id(single[-1]) if len(single) > 1 else None
    automatic: dict[str, bool] = {}
    if first:
        texts["bos"] = texts["bos"] or first
        automatic["bos"] = first == texts["bos"]
    if last:
        if texts["eos"] not in (None, last):
            # the token that ends a text is EOS, the one that ends a turn EOT
            texts["eot"] = texts["eos"]
        texts["eos"] = last
        automatic["eos"] = True
    inner = pair[1 if first and _special_id(pair[0]) == first else 0 :]
    inner = inner[: -1 if last and _special_id(inner[-1]) == last else None]
    between = inner[1:-1]
    if between and "Sequence" in inner[0] and "Sequence" in inner[-1]:
        separators = {texts["sep"], texts["eos"]} - {None}
        is_sep = not last and _special_id(between[0]) in separators
        automatic["sep"] = is_sep or (len(between) == 2 and _special_id(between[1]) in separators)
    return automatic


def _special_id(piece: dict[str, Any]) -> str | None:
    special = piece.get("SpecialToken")
    return special["id"] if special else None


def _starts_with(tokenizer: tokenizers.Tokenizer, ids: dict[str, int]) -> bool:
    around: Sequence[int] = tokenizer.encode("", add_special_tokens=True).ids
    return bool(around) and around[0] == ids.get("bos")

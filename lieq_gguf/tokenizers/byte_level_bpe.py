"""Byte-level BPE (GPT-2 style): Llama 3, SmolLM, Qwen, Olmo, Granite, Phi-4... Everything is in tokenizer.json."""

import re

import gguf
import tokenizers

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers import pre_tokenizers
from lieq_gguf.tokenizers.chat_templates import read_chat_templates
from lieq_gguf.tokenizers.model_files import JsonObject, TokenizerFiles, steps
from lieq_gguf.tokenizers.special_tokens import is_llama_family, read_special_tokens, swallows_blanks
from lieq_gguf.tokenizers.vocabulary import Vocabulary

#: what separates words inside a piece of SentencePiece; byte-level BPE has it in added tokens at most
SENTENCEPIECE_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"

# tokens that models mark as ordinary although they only make sense as control tokens
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", re.DOTALL)


def looks_special(text: str) -> bool:
    """Whether a token is a control token by its looks, whatever its flags say, as llama.cpp's converter guesses."""
    return _LOOKS_SPECIAL.fullmatch(text) is not None


def read_byte_level_bpe(
    files: TokenizerFiles,
    tokenizer: tokenizers.Tokenizer,
    vocab_size: int,
    architecture: str,
    pre_tokenizer: str | None,
) -> Vocabulary:
    """Read a byte-level BPE vocabulary.

    Args:
        files: of the model, with tokenizer.json.
        tokenizer: tokenizer.json loaded.
        vocab_size: rows of the embedding; ids that no token has become unused tokens.
        architecture: llama.cpp's name of it.
        pre_tokenizer: llama.cpp's name of it; None to recognise it.

    Raises:
        TokenizerError: if this is no byte-level BPE, an id is beyond ``vocab_size``, or the pre-tokenizer is unknown.
    """
    path = files.directory / "tokenizer.json"
    model = _checked_model(files, tokenizer)
    name = pre_tokenizers.recognise(tokenizer, str(path)) if pre_tokenizer is None else pre_tokenizer
    tokens, token_types = [], []
    text_of = {token_id: text for text, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    check_ids(max(text_of, default=-1), vocab_size, text_of, str(path))
    for token_id in range(vocab_size):
        text, token_type = text_of.get(token_id, f"[PAD{token_id}]"), gguf.TokenType.NORMAL
        if token_id not in text_of:
            token_type = gguf.TokenType.UNUSED
        elif token_id in added:
            if not added[token_id].normalized:
                # llama.cpp looks added tokens up in the raw text, so they must be spelt as they come out
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            if added[token_id].special or looks_special(text):
                token_type = gguf.TokenType.CONTROL
            else:
                token_type = gguf.TokenType.USER_DEFINED
                text = text.replace(SENTENCEPIECE_BLANK, " ")
        tokens.append(text.encode())
        token_types.append(token_type)
    # llama.cpp makes nothing of it in byte-level BPE; the converter writes it for these architectures only
    add_space_prefix = files.config.get("add_prefix_space") if is_llama_family(architecture) else None
    adds_bos = pre_tokenizers.adds_bos_by_default(name)
    return Vocabulary(
        model="gpt2",
        pre_tokenizer=name,
        tokens=tuple(tokens),
        token_types=tuple(token_types),
        merges=tuple(_merge_text(merge) for merge in model["merges"]),
        special=read_special_tokens(files, tokenizer, vocab_size, architecture, adds_bos),
        add_space_prefix=add_space_prefix if isinstance(add_space_prefix, bool) else None,
        chat_templates=read_chat_templates(files),
        swallows_blanks=swallows_blanks(tokenizer),
    )


def check_ids(largest: int, vocab_size: int, text_of: dict[int, str], source: str) -> None:
    """Refuse ids that the model has no embedding for.

    Raises:
        TokenizerError: if ``largest`` is not below ``vocab_size``.
    """
    if largest >= vocab_size:
        raise TokenizerError(
            f"{source}: token {text_of.get(largest, '?')!r} has id {largest} but the model has a vocab_size of "
            f"{vocab_size}; remove the tokens beyond it from the tokenizer files, or use those of the original model"
        )


def _checked_model(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer) -> JsonObject:
    path = files.directory / "tokenizer.json"
    model: JsonObject = (files.tokenizer_json or {})["model"]
    kind = type(tokenizer.model).__name__
    if kind != "BPE":
        raise TokenizerError(
            f"{path}: the tokenizer is of type {kind}; expected BPE or Unigram; convert the model with llama.cpp's own "
            "converter and give the GGUF to lieq-gguf"
        )
    if not any(step["type"] == "ByteLevel" for step in steps(tokenizer.pre_tokenizer)):
        raise TokenizerError(
            f"{path}: the BPE tokenizer works neither on bytes (no ByteLevel pre-tokenizer) nor as SentencePiece does "
            "(no byte_fallback); llama.cpp's own converter may know this model"
        )
    marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if marks:
        raise TokenizerError(
            f"{path}: the BPE tokenizer has {' and '.join(marks)}, which llama.cpp does not know; expected none; "
            "this tokenizer cannot be carried over"
        )
    if not model["merges"]:
        raise TokenizerError(
            f"{path}: the BPE tokenizer has no merges, which llama.cpp refuses; expected at least one; "
            "download the file again"
        )
    return model


def _merge_text(merge: str | list[str]) -> str:
    if isinstance(merge, str):
        return merge
    # a blank separates the two in GGUF; byte-level BPE spells blanks inside as the byte's stand-in
    return " ".join(part.replace(" ", "Ġ") for part in merge)

"""Byte-level BPE (GPT-2 style): Llama 3, SmolLM, Qwen, Olmo, Granite, Phi-4... Everything is in one JSON file."""

import re

import gguf
import tokenizers

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers import pre_tokenizers
from lieq_gguf.tokenizers.chat_templates import read_chat_templates
from lieq_gguf.tokenizers.model_files import JsonObject, TokenizerFiles, steps
from lieq_gguf.tokenizers.special_tokens import added_before, is_llama_family, read_special_tokens, swallows_blanks
from lieq_gguf.tokenizers.vocabulary import Vocabulary

#: SentencePiece's stand-in for a blank; in byte-level BPE only added tokens may have it
SENTENCEPIECE_BLANK = "\N{LOWER ONE EIGHTH BLOCK}"

# tokens that only make sense as control tokens, even if a model marks them as ordinary
_LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", re.DOTALL)


def looks_special(text: str) -> bool:
    """Whether a token's text looks like a control token, whatever its flags say; as in llama.cpp's converter."""
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
        files: the model's tokenizer files, with tokenizer.json.
        tokenizer: the loaded tokenizer.json.
        vocab_size: rows of the embedding; ids without a token become unused tokens.
        architecture: llama.cpp's name of the architecture.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None to recognise it.

    Raises:
        TokenizerError: if this is not byte-level BPE, an id is beyond ``vocab_size``, or the pre-tokenizer is unknown.
    """
    path = files.json_path
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
                # llama.cpp searches for added tokens in the raw text, so they need the spelling of decoded text
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False)
            if added[token_id].special or looks_special(text):
                token_type = gguf.TokenType.CONTROL
            else:
                token_type = gguf.TokenType.USER_DEFINED
                text = text.replace(SENTENCEPIECE_BLANK, " ")
        tokens.append(text.encode())
        token_types.append(token_type)
    # llama.cpp ignores it in byte-level BPE; its converter writes it only for these architectures
    add_space_prefix = files.config.get("add_prefix_space") if is_llama_family(architecture) else None
    adds_bos = pre_tokenizers.adds_bos_by_default(name)
    return Vocabulary(
        model="gpt2",
        pre_tokenizer=name,
        tokens=tuple(tokens),
        token_types=tuple(token_types),
        merges=tuple(merge_text(merge) for merge in model["merges"]),
        special=read_special_tokens(files, tokenizer, vocab_size, architecture, adds_bos),
        add_space_prefix=add_space_prefix if isinstance(add_space_prefix, bool) else None,
        chat_templates=read_chat_templates(files),
        swallows_blanks=swallows_blanks(tokenizer),
        added_before=added_before(tokenizer),
    )


def check_ids(largest: int, vocab_size: int, text_of: dict[int, str], source: str) -> None:
    """Refuse ids without an embedding.

    Raises:
        TokenizerError: if ``largest`` is not below ``vocab_size``.
    """
    if largest >= vocab_size:
        raise TokenizerError(
            f"{source}: token {text_of.get(largest, '?')!r} has id {largest}, but the model has a vocab_size of "
            f"{vocab_size}; remove larger ids from the tokenizer files, or use the files of the original model"
        )


def _checked_model(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer) -> JsonObject:
    path = files.json_path
    model: JsonObject = (files.tokenizer_json or {})["model"]
    kind = type(tokenizer.model).__name__
    if kind != "BPE":
        raise TokenizerError(
            f"{path}: the tokenizer is of type {kind}; expected BPE or Unigram; convert the model with llama.cpp's own "
            "converter and give the GGUF to lieq-gguf"
        )
    if not any(step["type"] == "ByteLevel" for step in steps(tokenizer.pre_tokenizer)):
        raise TokenizerError(
            f"{path}: the BPE tokenizer works neither on bytes (no ByteLevel pre-tokenizer) nor like SentencePiece "
            "(no byte_fallback); llama.cpp's own converter may support this model"
        )
    marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    if marks:
        raise TokenizerError(
            f"{path}: the BPE tokenizer has {' and '.join(marks)}, which llama.cpp does not support; "
            "this tokenizer cannot be converted"
        )
    if not model["merges"]:
        raise TokenizerError(
            f"{path}: the BPE tokenizer has no merges, which llama.cpp refuses; expected at least one; "
            "download the file again"
        )
    return model


def merge_text(merge: str | list[str]) -> str:
    """A merge as GGUF has it, two tokens with a blank between; a blank inside a token becomes byte-level BPE's Ġ."""
    if isinstance(merge, str):
        return merge
    return " ".join(token.replace(" ", "Ġ") for token in merge)

"""SentencePiece-style BPE (characters, bytes as a fallback): Llama 2, TinyLlama, Mistral 7B.

The vocabulary is in tokenizer.model, or, for models that were published without it, in a tokenizer.json with
``byte_fallback``.
"""

import re
from pathlib import Path

import gguf
import sentencepiece
import tokenizers

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers.byte_level_bpe import SENTENCEPIECE_BLANK, check_ids, looks_special
from lieq_gguf.tokenizers.chat_templates import read_chat_templates
from lieq_gguf.tokenizers.model_files import TokenizerFiles, component, steps
from lieq_gguf.tokenizers.special_tokens import read_special_tokens
from lieq_gguf.tokenizers.vocabulary import Vocabulary

_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Pieces:
    """Tokens under construction, by id; ids never set stay unused padding."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens = [f"[PAD{i}]".encode() for i in range(vocab_size)]
        self.token_types = [gguf.TokenType.UNUSED] * vocab_size
        self.scores = [_PADDING_SCORE] * vocab_size

    def put(self, token_id: int, text: str, token_type: gguf.TokenType, score: float) -> None:
        self.tokens[token_id] = text.encode()
        self.token_types[token_id] = token_type
        self.scores[token_id] = score


def is_sentencepiece_style(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer.json without tokenizer.model is to be read here rather than as byte-level BPE."""
    decoder = component(tokenizer.decoder) or {}
    is_bpe = isinstance(tokenizer.model, tokenizers.models.BPE)
    return is_bpe and bool(tokenizer.model.byte_fallback) and decoder.get("type") == "Sequence"


def read_sentencepiece(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer | None, vocab_size: int) -> Vocabulary:
    """Read the vocabulary of a SentencePiece-style BPE.

    Args:
        files: of the model, with tokenizer.model, or else tokenizer.json.
        tokenizer: tokenizer.json loaded, if there is one.
        vocab_size: rows of the embedding; ids that no token has become unused tokens.

    Raises:
        TokenizerError: if a file is damaged, an id is beyond ``vocab_size``, or the model is not BPE.
    """
    pieces = _Pieces(vocab_size)
    added = files.added_tokens()
    largest_added = max(added, default=-1)
    if largest_added >= 0:
        texts = {token_id: token.content for token_id, token in added.items()}
        check_ids(largest_added, vocab_size, texts, str(files.directory))
    if files.sentencepiece_model is not None:
        _put_sentencepiece_model(pieces, files.sentencepiece_model)
        # in tokenizer.json <unk> and the like are also added tokens; only tokenizer_config.json overrules the model
        overruling = {int(token_id) for token_id in files.config.get("added_tokens_decoder") or {}}
        overruling |= set(files.legacy_added_tokens.values())
        new = {i: t for i, t in added.items() if i in overruling or pieces.token_types[i] == gguf.TokenType.UNUSED}
    elif tokenizer is not None:
        _put_tokenizer_json(pieces, files, tokenizer)
        new = {i: t for i, t in added.items() if pieces.token_types[i] == gguf.TokenType.UNUSED}
    # a token that tokenizer.json alone calls special is a control token too, where the converter makes it user-defined
    for token_id, token in new.items():
        if token.is_special or looks_special(token.content):
            pieces.put(token_id, token.content, gguf.TokenType.CONTROL, _ADDED_SCORE)
        else:
            text = token.content.replace(SENTENCEPIECE_BLANK, " ")
            pieces.put(token_id, text, gguf.TokenType.USER_DEFINED, _ADDED_SCORE)
    return Vocabulary(
        model="llama",
        pre_tokenizer="default",
        tokens=tuple(pieces.tokens),
        token_types=tuple(pieces.token_types),
        scores=tuple(pieces.scores),
        special=read_special_tokens(files, tokenizer, vocab_size, adds_bos_by_default=True),
        add_space_prefix=_add_space_prefix(files, tokenizer),
        chat_templates=read_chat_templates(files),
    )


def open_sentencepiece(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load tokenizer.model.

    Raises:
        TokenizerError: if it is not a SentencePiece model.
    """
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromFile(str(path))
    except (OSError, RuntimeError) as error:
        raise TokenizerError(
            f"{path}: sentencepiece cannot read it ({' '.join(str(error).split())}); expected a SentencePiece model; "
            "download the file again (a file of a few hundred bytes is a Git LFS pointer)"
        ) from error
    return processor


def _put_sentencepiece_model(pieces: _Pieces, path: Path) -> None:
    processor = open_sentencepiece(path)
    n_pieces = processor.vocab_size()
    last = {n_pieces - 1: processor.IdToPiece(n_pieces - 1)}
    check_ids(n_pieces - 1, len(pieces.tokens), last, str(path))
    for token_id in range(n_pieces):
        token_type = gguf.TokenType.NORMAL
        if processor.IsUnknown(token_id):
            token_type = gguf.TokenType.UNKNOWN
        elif processor.IsControl(token_id):
            token_type = gguf.TokenType.CONTROL
        elif processor.IsUnused(token_id):
            token_type = gguf.TokenType.UNUSED
        elif processor.IsByte(token_id):
            token_type = gguf.TokenType.BYTE
        pieces.put(token_id, processor.IdToPiece(token_id), token_type, processor.GetScore(token_id))


def _put_tokenizer_json(pieces: _Pieces, files: TokenizerFiles, tokenizer: tokenizers.Tokenizer) -> None:
    model = (files.tokenizer_json or {})["model"]
    vocabulary: dict[str, int] = model["vocab"]
    largest = max(vocabulary.values(), default=-1)
    text_of = {token_id: text for text, token_id in vocabulary.items()}
    check_ids(largest, len(pieces.tokens), text_of, str(files.directory / "tokenizer.json"))
    # llama.cpp merges by the score of the result, tokenizer.json by the merge's rank: the rank becomes the score.
    # The converter gives all tokens the same score, with which llama.cpp merges from left to right regardless.
    score_of: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        score_of.setdefault(left + right, float(-rank))
    unmerged = float(-len(model["merges"]) - 1)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for text, token_id in vocabulary.items():
        token_type = gguf.TokenType.NORMAL
        if _BYTE.fullmatch(text):
            token_type = gguf.TokenType.BYTE
        elif text in special:
            token_type = gguf.TokenType.CONTROL
        pieces.put(token_id, text, token_type, score_of.get(text, unmerged))


def _add_space_prefix(files: TokenizerFiles, tokenizer: tokenizers.Tokenizer | None) -> bool | None:
    declared = files.config.get("add_prefix_space")
    if isinstance(declared, bool):
        return declared
    if tokenizer is None:
        return None
    prefixes = [step for step in steps(tokenizer.normalizer) if step["type"] == "Prepend"]
    prefixes += [
        step
        for step in steps(tokenizer.pre_tokenizer)
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never"
    ]
    # llama.cpp adds the blank by default; the converter does not look here and leaves it so
    return None if prefixes else False

"""tokenizer.model: a SentencePiece model, and fields that its library does not expose.

The library exposes the pieces, but neither the kind of model nor its normaliser, nor which pieces are user-defined.
These six fields are read directly from the file, a protocol buffer, without another package.

Source: sentencepiece_model.proto of SentencePiece 0.2.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import sentencepiece

from lieq_gguf.errors import TokenizerError

_UNIGRAM = 1
_USER_DEFINED_PIECE = 4


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary.

    Attributes:
        text: text of the piece, with SentencePiece's stand-in for blanks.
        score: pieces with higher scores are merged first; in a Unigram model the logarithm of the probability.
        token_type: its ``gguf.TokenType``.
    """

    text: str
    score: float
    token_type: gguf.TokenType


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        processor: the library's own reader of the model.
        pieces: all pieces by id.
        is_unigram: whether it chooses the likeliest pieces instead of merging.
        has_byte_fallback: whether characters without a piece are written as bytes.
        adds_space_prefix: whether a text gets a leading blank.
        removes_extra_whitespaces: whether blanks at the ends are removed and runs of blanks become one.
        precompiled_charsmap: the normaliser's table, empty if it changes no characters.
    """

    processor: sentencepiece.SentencePieceProcessor
    pieces: tuple[Piece, ...]
    is_unigram: bool
    has_byte_fallback: bool
    adds_space_prefix: bool
    removes_extra_whitespaces: bool
    precompiled_charsmap: bytes


def open_sentencepiece(path: Path) -> SentencePieceModel:
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
    # the message is well-formed, since the library has just read it
    user_defined: set[int] = set()
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    n_pieces = 0
    for number, value in _fields(processor.serialized_model_proto()):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            if dict(_fields(value)).get(3) == _USER_DEFINED_PIECE:
                user_defined.add(n_pieces)
            n_pieces += 1
        elif number == 2:
            trainer.update(_fields(value))
        elif number == 3:
            normalizer.update(_fields(value))
    charsmap = normalizer.get(2, b"")
    return SentencePieceModel(
        processor=processor,
        pieces=tuple(_piece(processor, i, i in user_defined) for i in range(processor.vocab_size())),
        is_unigram=trainer.get(3, _UNIGRAM) == _UNIGRAM,
        has_byte_fallback=bool(trainer.get(35, 0)),
        adds_space_prefix=bool(normalizer.get(3, 1)),
        removes_extra_whitespaces=bool(normalizer.get(4, 1)),
        precompiled_charsmap=charsmap if isinstance(charsmap, bytes) else b"",
    )


def _piece(processor: sentencepiece.SentencePieceProcessor, token_id: int, is_user_defined: bool) -> Piece:
    token_type = gguf.TokenType.NORMAL
    if is_user_defined:
        token_type = gguf.TokenType.USER_DEFINED
    elif processor.IsUnknown(token_id):
        token_type = gguf.TokenType.UNKNOWN
    elif processor.IsControl(token_id):
        token_type = gguf.TokenType.CONTROL
    elif processor.IsUnused(token_id):
        token_type = gguf.TokenType.UNUSED
    elif processor.IsByte(token_id):
        token_type = gguf.TokenType.BYTE
    return Piece(processor.IdToPiece(token_id), processor.GetScore(token_id), token_type)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a message's fields: bytes for strings and messages, integers for the others."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(message, position)
            yield key >> 3, value
        else:
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, position = _varint(message, position)
                yield key >> 3, message[position : position + length]
            position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        shift += 7
        position += 1
        if byte < 0x80:
            return value, position

"""Checks that llama.cpp splits text into the same tokens as the model's own tokenizer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lieq_gguf.native.llama_cpp import LoadedModel, open_model
from lieq_gguf.tokenizers.check_texts import CHECK_TEXTS
from lieq_gguf.tokenizers.pre_tokenizers import explained_segments, pre_tokenizer_caveat
from lieq_gguf.tokenizers.source_tokenizer import SourceTokenizer
from lieq_gguf.tokenizers.vocabulary import Vocabulary

_AROUND = 2
_MAX_SPECIAL_TOKENS = 24


@dataclass(frozen=True)
class TokenizerDifference:
    """The first place where the tokens of one test text differ.

    Attributes:
        segment: name of the text, such as ``digits``.
        text: the text.
        position: index of the first token that differs.
        expected_id: the token there from the model's own tokenizer; None if its tokens end before.
        found_id: the token there from llama.cpp; None if its tokens end before.
        expected_pieces: tokens around the position from the model's own tokenizer.
        found_pieces: tokens around the position from llama.cpp.
    """

    segment: str
    text: str
    position: int
    expected_id: int | None
    found_id: int | None
    expected_pieces: tuple[str, ...]
    found_pieces: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.segment}: token {self.position} of {self.text!r}: the model's tokenizer gives {self.expected_id} "
            f"in {list(self.expected_pieces)}, llama.cpp gives {self.found_id} in {list(self.found_pieces)}"
        )


def tokenizer_differences(source: SourceTokenizer, gguf_file: Path) -> list[TokenizerDifference]:
    """Tokenise test texts with the model's own tokenizer and with llama.cpp.

    The texts are ordinary and difficult ones in several languages, and one made of the model's own special tokens. They
    are compared without automatic tokens, then a short text with them.

    Args:
        source: the model's own tokenizer.
        gguf_file: the file made from it; only its vocabulary is read.

    Returns:
        One difference for each text that is tokenised differently; an empty list if there is none.

    Raises:
        VerificationError: if llama.cpp refuses the file.
    """
    with open_model(gguf_file, vocab_only=True) as written:
        return list(_differences(source, written))


def known_deviation(vocabulary: Vocabulary, differences: Sequence[TokenizerDifference]) -> str:
    """Why llama.cpp tokenises differently although the file is right; an empty string if there is no known reason.

    Args:
        vocabulary: the vocabulary in the file.
        differences: result of :func:`tokenizer_differences` for the file.
    """
    segments = {d.segment for d in differences}
    causes: list[tuple[str, frozenset[str]]] = []
    if vocabulary.model == "gpt2":
        name = vocabulary.pre_tokenizer
        causes.append((pre_tokenizer_caveat(name), explained_segments(name)))
    elif vocabulary.model == "llama":
        blank = "llama.cpp adds a blank after special tokens and before leading blanks, but this tokenizer does not"
        causes.append((blank, frozenset({"special tokens", "blanks"})))
    if vocabulary.swallows_blanks:
        # llama.cpp swallows them too for models whose general.name has phi-3 or phi3
        swallowed = "llama.cpp keeps the blanks after special tokens, but this tokenizer swallows them"
        causes.insert(0, (swallowed, frozenset({"special tokens"})))
    if len(vocabulary.added_before) > 1:
        several = "".join(vocabulary.added_before)
        cause = f"before a text without a chat template llama.cpp adds one token at most, but this tokenizer {several}"
        causes.append((cause, frozenset({"automatic tokens"})))
    reasons = []
    for cause, explained in causes:
        if segments & explained:
            reasons.append(cause)
            segments -= explained
    return "" if segments else "; ".join(reasons)


def _differences(source: SourceTokenizer, written: LoadedModel) -> Iterator[TokenizerDifference]:
    texts = [*CHECK_TEXTS, *(("special tokens", text) for text in _special_token_texts(source))]
    cases = [(segment, text, False) for segment, text in texts]
    cases += [("automatic tokens", text, True) for text in ("", "Hello world")]
    for segment, text, is_automatic in cases:
        expected = source.encode(text, add_special_tokens=is_automatic)
        found = written.tokenize(text, add_special_tokens=is_automatic)
        if expected != found:
            yield _difference(segment, text, expected, found, source)


def _difference(
    segment: str, text: str, expected: Sequence[int], found: Sequence[int], source: SourceTokenizer
) -> TokenizerDifference:
    shorter = min(len(expected), len(found))
    position = next((i for i in range(shorter) if expected[i] != found[i]), shorter)
    around = slice(max(0, position - _AROUND), position + _AROUND + 1)
    return TokenizerDifference(
        segment=segment,
        text=text,
        position=position,
        expected_id=expected[position] if position < len(expected) else None,
        found_id=found[position] if position < len(found) else None,
        expected_pieces=tuple(source.piece(token_id) for token_id in expected[around]),
        found_pieces=tuple(source.piece(token_id) for token_id in found[around]),
    )


def _special_token_texts(source: SourceTokenizer) -> list[str]:
    """Texts with the model's added tokens alone, between words, and beside blanks."""
    tokens = [text for text, _ in sorted(source.added_tokens.items(), key=lambda item: item[1])]
    # if there are hundreds of reserved tokens, the first and the last stand for all
    half = _MAX_SPECIAL_TOKENS // 2
    tokens = tokens if len(tokens) <= _MAX_SPECIAL_TOKENS else tokens[:half] + tokens[-half:]
    return [text for token in tokens for text in (token, f"one{token}two", f"{token}user\nHi there{token}\n")] + (
        ["".join(tokens)] if tokens else []
    )

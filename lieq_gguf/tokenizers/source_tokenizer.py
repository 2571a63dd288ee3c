"""The model's own tokenizer, for calibration and as the reference of the check."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers.chat_rendering import ChatTemplate
from lieq_gguf.tokenizers.chat_templates import read_chat_templates
from lieq_gguf.tokenizers.model_files import ROLES, TokenizerFiles, open_tokenizer, read_tokenizer_files
from lieq_gguf.tokenizers.sentencepiece_model import open_sentencepiece
from lieq_gguf.tokenizers.special_tokens import automatic_tokens


@dataclass(frozen=True)
class SourceTokenizer:
    """A model's tokenizer as its files define it.

    Attributes:
        vocab_size: one more than its largest id.
        added_tokens: text to id of the tokens that are recognised in a text, such as ``<|im_start|>``.
        chat_template: the model's default template for conversations, if it has one.
    """

    vocab_size: int
    added_tokens: Mapping[str, int]
    _encode: Callable[[str, bool], list[int]]
    _piece: Callable[[int], str | None]
    chat_template: ChatTemplate | None = None

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; added tokens written in the text are recognised.

        Args:
            text: any text.
            add_special_tokens: whether to add BOS and the like, as the files say.
        """
        return self._encode(text, add_special_tokens)

    def piece(self, token_id: int) -> str:
        """Spelling of a token in the vocabulary; ``?`` for an id it does not have."""
        piece = self._piece(token_id) if 0 <= token_id < self.vocab_size else None
        return "?" if piece is None else piece


def load_source_tokenizer(model_dir: Path) -> SourceTokenizer:
    """Load a model's own tokenizer: tokenizer.json if there is one, otherwise tokenizer.model.

    Args:
        model_dir: a Hugging Face model directory.

    Raises:
        SourceError: if a file cannot be read.
        TokenizerError: if there are no tokenizer files or a library refuses them.
    """
    files = read_tokenizer_files(model_dir)
    tokenizer = _from_sentencepiece(files) if files.tokenizer_json is None else _from_tokenizer_json(files)
    template = read_chat_templates(files).default
    if template is None:
        return tokenizer
    texts = {f"{role}_token": text for role in ROLES if (text := files.role_text(role)) is not None}
    return replace(tokenizer, chat_template=ChatTemplate(template, texts))


def _from_tokenizer_json(files: TokenizerFiles) -> SourceTokenizer:
    tokenizer = open_tokenizer(files)

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        # unlike encode, a batch lets other threads run, and the fast variant skips offsets
        [encoding] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return list(encoding.ids)

    added = {token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items()}
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return SourceTokenizer(largest + 1, added, encode, tokenizer.id_to_token)


def _from_sentencepiece(files: TokenizerFiles) -> SourceTokenizer:
    path = files.directory / "tokenizer.model"
    processor = open_sentencepiece(path).processor
    n_pieces = processor.vocab_size()
    added = {processor.IdToPiece(i): i for i in range(n_pieces) if processor.IsControl(i) or processor.IsUnknown(i)}
    added |= {token.content: token_id for token_id, token in files.added_tokens().items()}
    before = _automatic_id(files, processor, "bos", default=True)
    after = _automatic_id(files, processor, "eos", default=False)
    # the longest first, since a token may begin with another, such as <s>
    pattern = re.compile("(" + "|".join(re.escape(text) for text in sorted(added, key=len, reverse=True)) + ")")
    text_of = {token_id: text for text, token_id in added.items()}

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for segment in pattern.split(text):
            ids += [added[segment]] if segment in added else processor.EncodeAsIds(segment)
        return [*before, *ids, *after] if add_special_tokens else ids

    def piece(token_id: int) -> str | None:
        added_text = text_of.get(token_id)
        return processor.IdToPiece(token_id) if added_text is None and token_id < n_pieces else added_text

    return SourceTokenizer(max(n_pieces, *(i + 1 for i in added.values())), added, encode, piece)


def _automatic_id(
    files: TokenizerFiles, processor: sentencepiece.SentencePieceProcessor, role: str, default: bool
) -> tuple[int, ...]:
    if not automatic_tokens(files, None).get(role, default):
        return ()
    token_id = processor.bos_id() if role == "bos" else processor.eos_id()
    if token_id < 0:
        raise TokenizerError(
            f"{files.directory / 'tokenizer.model'}: has no {role.upper()} token, which should be added to every text; "
            f"set add_{role}_token to false in tokenizer_config.json"
        )
    return (int(token_id),)

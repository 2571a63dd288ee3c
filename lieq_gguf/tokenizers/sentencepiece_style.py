"""SentencePiece and similar tokenizers: Unigram, or BPE of characters with bytes as a fallback.

Llama 2, Mistral 7B, Gemma and Phi-3 have such BPE. The vocabulary is in tokenizer.model or, for models published
without it, in a tokenizer.json with ``byte_fallback`` or of type Unigram.
"""

import re
from dataclasses import replace

import gguf
import tokenizers

from lieq_gguf.errors import TokenizerError
from lieq_gguf.tokenizers.byte_level_bpe import SENTENCEPIECE_BLANK, check_ids, looks_special, merge_text
from lieq_gguf.tokenizers.chat_templates import read_chat_templates
from lieq_gguf.tokenizers.model_files import AddedToken, TokenizerFiles, component, steps
from lieq_gguf.tokenizers.sentencepiece_model import SentencePieceModel, open_sentencepiece
from lieq_gguf.tokenizers.special_tokens import read_special_tokens, swallows_blanks
from lieq_gguf.tokenizers.unigram import preparation_by_json, preparation_by_model
from lieq_gguf.tokenizers.vocabulary import SpecialTokens, Vocabulary

# llama.cpp's default ids by tokenizer model, for files that do not say
_DEFAULT_IDS = {"llama": {"bos": 1, "eos": 2, "unk": 0}, "t5": {"eos": 1, "unk": 2, "pad": 0}}
_ADDED_SCORE = -1000.0
_PADDING_SCORE = -10000.0
_MERGED_BY_RANK = "gemma4"  # the architecture for which llama.cpp has such a tokenizer
#: control tokens that llama.cpp shows in its answers, because its reader of chats looks for them
_VISIBLE = frozenset(
    {b"<|channel>", b"<channel|>", b"<|tool_call>", b"<tool_call|>", b"<|tool_response>", b"<tool_response|>", b'<|"|>'}
)
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class _Pieces:
    """Tokens under construction, by id; ids that are never set stay unused padding."""

    def __init__(self, vocab_size: int) -> None:
        self.tokens = [f"[PAD{i}]".encode() for i in range(vocab_size)]
        self.token_types = [gguf.TokenType.UNUSED] * vocab_size
        self.scores = [_PADDING_SCORE] * vocab_size

    def put(self, token_id: int, text: str, token_type: gguf.TokenType, score: float) -> None:
        self.tokens[token_id] = text.encode()
        self.token_types[token_id] = token_type
        self.scores[token_id] = score


def is_sentencepiece_style(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer.json without tokenizer.model is of this kind, not byte-level BPE."""
    if isinstance(tokenizer.model, tokenizers.models.Unigram):
        return True
    decoder = component(tokenizer.decoder) or {}
    is_bpe = isinstance(tokenizer.model, tokenizers.models.BPE)
    return is_bpe and bool(tokenizer.model.byte_fallback) and decoder.get("type") == "Sequence"


def read_sentencepiece(
    files: TokenizerFiles, tokenizer: tokenizers.Tokenizer | None, vocab_size: int, architecture: str
) -> Vocabulary:
    """Read the vocabulary of SentencePiece-style BPE or Unigram.

    Args:
        files: the model's tokenizer files, with tokenizer.model or tokenizer.json.
        tokenizer: the loaded tokenizer.json, if there is one.
        vocab_size: rows of the embedding; ids without a token become unused tokens.
        architecture: llama.cpp's name of the architecture.

    Raises:
        TokenizerError: if a file is damaged, an id is beyond ``vocab_size``, or llama.cpp does not support
            the tokenizer.
    """
    merges_by_rank = tokenizer is not None and architecture == _MERGED_BY_RANK and is_sentencepiece_style(tokenizer)
    path = None if merges_by_rank else files.sentencepiece_model
    model = None if path is None else open_sentencepiece(path)
    pieces = _Pieces(vocab_size)
    added = files.added_tokens()
    largest_added = max(added, default=-1)
    if largest_added >= 0:
        texts = {token_id: token.content for token_id, token in added.items()}
        check_ids(largest_added, vocab_size, texts, str(files.directory))
    if model is not None:
        new = _put_sentencepiece_model(pieces, model, files, added)
    elif tokenizer is not None:
        new = _put_tokenizer_json(pieces, files, tokenizer, added)
    # a token that only tokenizer.json calls special is a control token too; the converter makes it user-defined
    for token_id, token in new.items():
        if token.is_special or looks_special(token.content):
            pieces.put(token_id, token.content, gguf.TokenType.CONTROL, _ADDED_SCORE)
        else:
            text = token.content.replace(SENTENCEPIECE_BLANK, " ")
            pieces.put(token_id, text, gguf.TokenType.USER_DEFINED, _ADDED_SCORE)
    vocabulary = Vocabulary(
        model="llama",
        pre_tokenizer="default",
        tokens=tuple(pieces.tokens),
        token_types=tuple(pieces.token_types),
        scores=tuple(pieces.scores),
        special=read_special_tokens(files, tokenizer, vocab_size, architecture, adds_bos_by_default=True),
        add_space_prefix=_add_space_prefix(files, tokenizer, model),
        chat_templates=read_chat_templates(files),
        swallows_blanks=swallows_blanks(tokenizer),
    )
    if path is not None and model is not None and model.is_unigram:
        preparation = preparation_by_model(model, path)
    elif model is None and tokenizer is not None and isinstance(tokenizer.model, tokenizers.models.Unigram):
        preparation = preparation_by_json(files, tokenizer)
    else:
        _check_bytes(vocabulary, files)
        vocabulary = replace(vocabulary, special=_with_ids(vocabulary.special, model, files, "llama"))
        return _merged_by_rank(vocabulary, files) if merges_by_rank else vocabulary
    return replace(
        vocabulary,
        model="t5",
        special=_with_bos_and_eos(_with_ids(vocabulary.special, model, files, "t5"), tokenizer),
        add_space_prefix=preparation.adds_space_prefix,
        remove_extra_whitespaces=preparation.removes_extra_whitespaces,
        precompiled_charsmap=preparation.precompiled_charsmap,
    )


def _merged_by_rank(vocabulary: Vocabulary, files: TokenizerFiles) -> Vocabulary:
    """The same with merges instead of scores, as llama.cpp has it for Gemma 4 alone; BOS is always automatic there."""
    return replace(
        vocabulary,
        model="gemma4",
        pre_tokenizer="",
        token_types=tuple(
            gguf.TokenType.USER_DEFINED if token in _VISIBLE else kind
            for token, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True)
        ),
        scores=(_ADDED_SCORE,) * len(vocabulary.tokens),
        merges=tuple(merge_text(merge) for merge in (files.tokenizer_json or {})["model"]["merges"]),
        special=replace(
            vocabulary.special, automatic=tuple((dict(vocabulary.special.automatic) | {"bos": True}).items())
        ),
        add_space_prefix=False,
    )


def _check_bytes(vocabulary: Vocabulary, files: TokenizerFiles) -> None:
    # llama.cpp looks for either spelling and aborts the process if there is neither
    tokens = set(vocabulary.tokens)
    missing = next((b for b in range(256) if b"<0x%02X>" % b not in tokens and bytes([b]) not in tokens), None)
    if missing is not None:
        raise TokenizerError(
            f"{files.sentencepiece_model or files.json_path}: the vocabulary has no token for byte "
            f"0x{missing:02X}; expected tokens for all bytes, which llama.cpp needs for characters outside the "
            "vocabulary; this tokenizer cannot be converted"
        )


def _put_sentencepiece_model(
    pieces: _Pieces, model: SentencePieceModel, files: TokenizerFiles, added: dict[int, AddedToken]
) -> dict[int, AddedToken]:
    """Put all pieces; returns the added tokens that are new or override a piece."""
    n_pieces = len(model.pieces)
    last = {n_pieces - 1: model.pieces[-1].text}
    check_ids(n_pieces - 1, len(pieces.tokens), last, str(files.sentencepiece_model))
    for token_id, piece in enumerate(model.pieces):
        pieces.put(token_id, piece.text, piece.token_type, piece.score)
    # in tokenizer.json <unk> and the like are also added tokens; only tokenizer_config.json overrides the model
    overriding = {int(token_id) for token_id in files.config.get("added_tokens_decoder") or {}}
    overriding |= set(files.legacy_added_tokens.values())
    new = {i: token for i, token in added.items() if i in overriding or pieces.token_types[i] == gguf.TokenType.UNUSED}
    # SentencePiece searches for user-defined pieces first. The converter makes them ordinary if only the model names
    # them, so that only merges would lead to them.
    for token_id, piece in enumerate(model.pieces):
        if piece.token_type == gguf.TokenType.USER_DEFINED:
            new.setdefault(token_id, added.get(token_id, AddedToken(piece.text, is_special=False)))
    return new


def _put_tokenizer_json(
    pieces: _Pieces, files: TokenizerFiles, tokenizer: tokenizers.Tokenizer, added: dict[int, AddedToken]
) -> dict[int, AddedToken]:
    """Put the whole vocabulary; returns the added tokens that are new or searched for first."""
    model = (files.tokenizer_json or {})["model"]
    is_unigram = isinstance(tokenizer.model, tokenizers.models.Unigram)
    ids: dict[str, int]
    ids = {text: i for i, (text, _) in enumerate(model["vocab"])} if is_unigram else model["vocab"]
    largest = max(ids.values(), default=-1)
    text_of = {token_id: text for text, token_id in ids.items()}
    check_ids(largest, len(pieces.tokens), text_of, str(files.json_path))
    score_of = dict(model["vocab"]) if is_unigram else _scores_by_rank(model["merges"])
    unmerged = float(-len(model.get("merges") or ()) - 1)  # below any merge's rank
    by_id = tokenizer.get_added_tokens_decoder()
    special = {token.content for token in by_id.values() if token.special}
    for text, token_id in ids.items():
        token_type = gguf.TokenType.NORMAL
        if is_unigram and token_id == model.get("unk_id"):
            token_type = gguf.TokenType.UNKNOWN
        elif _BYTE.fullmatch(text):
            token_type = gguf.TokenType.BYTE
        elif text in special:
            token_type = gguf.TokenType.CONTROL
        pieces.put(token_id, text, token_type, score_of.get(text, unmerged))
    # Gemma's runs of blanks contain the stand-in for blanks, so they do not occur in a text; merges lead to them
    searched_first = {
        token_id
        for token_id, token in by_id.items()
        if not token.special and (token.normalized or SENTENCEPIECE_BLANK not in token.content)
    }
    return {
        i: token for i, token in added.items() if i in searched_first or pieces.token_types[i] == gguf.TokenType.UNUSED
    }


def _scores_by_rank(merges: list[str | list[str]]) -> dict[str, float]:
    # llama.cpp merges by the score of the result, tokenizer.json by the rank of the merge: the rank becomes the score.
    # The converter gives all tokens the same score, so llama.cpp would merge from left to right.
    score_of: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        score_of.setdefault(left + right, float(-rank))
    return score_of


def _with_ids(
    special: SpecialTokens, model: SentencePieceModel | None, files: TokenizerFiles, kind: str
) -> SpecialTokens:
    """Add ids that no other file names, if llama.cpp's default would be wrong."""
    ids = dict(special.ids)
    if model is not None:
        library = model.processor
        own = {"bos": library.bos_id(), "eos": library.eos_id(), "unk": library.unk_id(), "pad": library.pad_id()}
    else:
        unk = (files.tokenizer_json or {})["model"].get("unk_id")
        own = {"unk": unk if isinstance(unk, int) else -1}
    for role, token_id in own.items():
        if token_id >= 0 and token_id != _DEFAULT_IDS[kind].get(role):
            ids.setdefault(role, token_id)
    return replace(special, ids=tuple(ids.items()))


def _with_bos_and_eos(special: SpecialTokens, tokenizer: tokenizers.Tokenizer | None) -> SpecialTokens:
    """State whether BOS and EOS are automatic, since llama.cpp's defaults for Unigram are those of T5."""
    ids, automatic = dict(special.ids), dict(special.automatic)
    if tokenizer is None:
        automatic = {"bos": True, "eos": False} | automatic
    else:
        around = tokenizer.encode("", add_special_tokens=True).ids
        automatic.setdefault("bos", bool(around) and around[0] == ids.get("bos"))
        automatic.setdefault("eos", bool(around) and around[-1] == ids.get("eos"))
    return replace(special, automatic=tuple(automatic.items()))


def _add_space_prefix(
    files: TokenizerFiles, tokenizer: tokenizers.Tokenizer | None, model: SentencePieceModel | None
) -> bool | None:
    # llama.cpp adds the blank by default; its converter reads only the configuration, and for Gemma not even that
    declared = files.config.get("add_prefix_space")
    if isinstance(declared, bool):
        return declared
    if tokenizer is None:
        return None if model is None or model.adds_space_prefix else False
    prefixes = [step for step in steps(tokenizer.normalizer) if step["type"] == "Prepend"]
    prefixes += [
        step
        for step in steps(tokenizer.pre_tokenizer)
        if step["type"] == "Metaspace" and step["prepend_scheme"] != "never"
    ]
    return None if prefixes else False

"""The tokenizer files of a model directory, read once and checked for their form."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import tokenizers

from lieq_gguf.errors import SourceError, TokenizerError
from lieq_gguf.tokenizers import tekken

JsonObject = Mapping[str, Any]

#: roles of tokens in tokenizer_config.json, as ``<role>_token``
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True)
class AddedToken:
    """A token that is searched for in a text before anything else is done to the text."""

    content: str
    is_special: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files; missing files are empty or None.

    Attributes:
        directory: the model's directory, for messages and for files that are read later.
        tokenizer_json: the whole ``tokenizer.json``, or what ``tekken.json`` stands for.
        json_path: the file that ``tokenizer_json`` was read from.
        config: ``tokenizer_config.json``.
        model_config: ``config.json``, for the ids it names.
        generation_config: ``generation_config.json``, for the ids it names.
        special_tokens_map: ``special_tokens_map.json``, which older versions of transformers write.
        legacy_added_tokens: ``added_tokens.json``, text to id.
        sentencepiece_model: path of ``tokenizer.model``.
    """

    directory: Path
    json_path: Path
    tokenizer_json: JsonObject | None = None
    config: JsonObject = field(default_factory=dict)
    model_config: JsonObject = field(default_factory=dict)
    generation_config: JsonObject = field(default_factory=dict)
    special_tokens_map: JsonObject = field(default_factory=dict)
    legacy_added_tokens: JsonObject = field(default_factory=dict)
    sentencepiece_model: Path | None = None

    def role_text(self, role: str) -> str | None:
        """Text of the token that has a role, from its string or object form; tokenizer_config.json wins."""
        key = f"{role}_token"
        return _token_text(self.config.get(key)) or _token_text(self.special_tokens_map.get(key))

    def configured_id(self, role: str) -> Any:
        """What config.json names as the id of the token that has a role; in wrappers it is in ``text_config``."""
        key, text_config = f"{role}_token_id", self.model_config.get("text_config")
        token_id = self.model_config.get(key)
        return text_config.get(key) if token_id is None and isinstance(text_config, Mapping) else token_id

    def special_texts(self) -> tuple[str, ...]:
        """Texts of all tokens that these files call special, by role or in a list."""
        texts = [self.role_text(role) for role in ROLES]
        for key in ("additional_special_tokens", "extra_special_tokens"):
            entries = self.config.get(key)
            # versions of transformers write either a list of tokens or an object of name to token
            if isinstance(entries, Mapping):
                entries = list(entries.values())
            if isinstance(entries, list):
                texts.extend(_token_text(entry) for entry in entries)
        return tuple(dict.fromkeys(text for text in texts if text))

    def added_tokens(self) -> dict[int, AddedToken]:
        """Added tokens by id; if files disagree, tokenizer_config.json wins, as in llama.cpp's converter.

        Unlike here, the converter ignores tokenizer.json if there is a tokenizer.model; but transformers 5 saves added
        tokens only in tokenizer.json.

        Raises:
            TokenizerError: if an entry has no readable id or text.
        """
        added: dict[int, AddedToken] = {}
        if self.tokenizer_json is not None:
            for entry in self.tokenizer_json.get("added_tokens", ()):
                added[entry["id"]] = AddedToken(entry["content"], bool(entry.get("special")))
        for text, token_id in self.legacy_added_tokens.items():
            if not isinstance(token_id, int) or token_id < 0:
                raise TokenizerError(
                    f"{self.directory / 'added_tokens.json'}: the id of {text!r} is {token_id!r}; expected a number; "
                    "download the file again"
                )
            added.setdefault(token_id, AddedToken(text, is_special=False))
        decoder = self.config.get("added_tokens_decoder") or {}
        for key, entry in decoder.items() if isinstance(decoder, Mapping) else ():
            content = _token_text(entry)
            if content is None or not key.isdecimal():
                raise TokenizerError(
                    f"{self.directory / 'tokenizer_config.json'}: entry {key!r} of added_tokens_decoder is unreadable; "
                    "expected an id with an object that has 'content'; download the file again"
                )
            is_special = isinstance(entry, Mapping) and bool(entry.get("special"))
            added[int(key)] = AddedToken(content, is_special)
        return dict(sorted(added.items()))


def read_tokenizer_files(model_dir: Path) -> TokenizerFiles:
    """Read the tokenizer's JSON files.

    Args:
        model_dir: a Hugging Face model directory.

    Raises:
        SourceError: if a file cannot be read or is not a JSON object.
        TokenizerError: if there is neither ``tokenizer.model`` nor ``tokenizer.json`` nor ``tekken.json``.
    """
    sentencepiece_model = model_dir / "tokenizer.model"
    files = TokenizerFiles(
        directory=model_dir,
        json_path=model_dir / "tokenizer.json",
        tokenizer_json=_read_json_object(model_dir / "tokenizer.json"),
        config=_read_json_object(model_dir / "tokenizer_config.json") or {},
        model_config=_read_json_object(model_dir / "config.json") or {},
        generation_config=_read_json_object(model_dir / "generation_config.json") or {},
        special_tokens_map=_read_json_object(model_dir / "special_tokens_map.json") or {},
        legacy_added_tokens=_read_json_object(model_dir / "added_tokens.json") or {},
        sentencepiece_model=sentencepiece_model if sentencepiece_model.is_file() else None,
    )
    if files.tokenizer_json is None:
        files = _with_tekken(files)
    if files.tokenizer_json is None and files.sentencepiece_model is None:
        found = "only vocab.json, which cannot be read alone" if (model_dir / "vocab.json").is_file() else "none"
        raise TokenizerError(
            f"{model_dir}: looked for tokenizer.model (SentencePiece), tokenizer.json (tokenizers library) and "
            f"tekken.json (Mistral), found {found}; download the tokenizer files of the model into this directory"
        )
    return files


def _with_tekken(files: TokenizerFiles) -> TokenizerFiles:
    path = files.directory / "tekken.json"
    content = _read_json_object(path)
    if content is None:
        return files
    return replace(
        files,
        json_path=path,
        tokenizer_json=tekken.as_tokenizer_json(content, path),
        config={**tekken.ROLES, **files.config},
        sentencepiece_model=None,
    )


def open_tokenizer(files: TokenizerFiles) -> tokenizers.Tokenizer:
    """Load ``tokenizer.json``, or what stands for it, with the tokenizers library.

    Tokens with a role in tokenizer_config.json are marked special, as in transformers; tokens that are missing in
    tokenizer.json are left out, since they have no reliable id.

    Raises:
        TokenizerError: if the library refuses the file.
    """
    path = files.json_path
    try:
        if path.name == "tokenizer.json":
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        else:
            tokenizer = tokenizers.Tokenizer.from_str(json.dumps(files.tokenizer_json))
    except Exception as error:  # the library raises nothing more precise than Exception
        raise TokenizerError(
            f"{path}: the tokenizers library {tokenizers.__version__} cannot read it ({_one_line(error)}); "
            "download the file again or update the library"
        ) from error
    # whoever saved the file may have set both; a calibration text must be neither cut nor padded
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = [text for text in files.special_texts() if tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])
    bos = files.role_text("bos")
    if bos is not None and tokenizer.token_to_id(bos) is not None and _needs_bos(files.model_config):
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def adds_bos_unlike_transformers(model_dir: Path) -> bool:
    """Whether BOS is added to a text here, as in llama.cpp, though transformers may add none.

    tekken.json gets it from Mistral's own library. The files of Gemma 4 leave it to the chat template, but the model
    makes little of a text without it, so llama.cpp adds it whatever a file says.
    """
    has_tekken_alone = (model_dir / "tekken.json").is_file() and not (model_dir / "tokenizer.json").is_file()
    return has_tekken_alone or _needs_bos(_read_json_object(model_dir / "config.json") or {})


def _needs_bos(model_config: JsonObject) -> bool:
    return str(model_config.get("model_type")).startswith("gemma4")


def component(part: Any) -> JsonObject | None:
    """JSON form of a tokenizer's component, with all defaults filled in, whatever version wrote the file.

    Args:
        part: normalizer, pre-tokenizer, post-processor or decoder of a ``tokenizers.Tokenizer``.
    """
    if part is None:
        return None
    # the state for pickle is the library's only documented way to a component's JSON
    return cast(JsonObject, json.loads(part.__getstate__()))


def steps(part: Any) -> list[JsonObject]:
    """The steps of a component: several for a sequence, one for any other component, none for None."""
    return _flatten(component(part))


def _flatten(state: JsonObject | None) -> list[JsonObject]:
    if state is None:
        return []
    if state["type"] != "Sequence":
        return [state]
    inner = next(value for value in state.values() if isinstance(value, list))
    return [step for part in inner for step in _flatten(part)]


def _token_text(entry: object) -> str | None:
    if isinstance(entry, Mapping):
        entry = entry.get("content")
    return entry if isinstance(entry, str) and entry else None


def _read_json_object(path: Path) -> JsonObject | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: not readable as JSON ({_one_line(error)}); download the file again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path}: found a JSON {type(content).__name__}, expected an object; download the file again")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

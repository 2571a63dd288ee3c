"""Reads a model's chat templates, from the tokenizer's configuration or from separate files."""

import json
from collections.abc import Mapping
from pathlib import Path

from lieq_gguf.errors import SourceError
from lieq_gguf.tokenizers.model_files import TokenizerFiles
from lieq_gguf.tokenizers.vocabulary import ChatTemplates


def read_chat_templates(files: TokenizerFiles) -> ChatTemplates:
    """Read the chat templates from the first place that has one.

    The order is that of transformers: ``chat_template.jinja`` with ``additional_chat_templates/*.jinja``,
    ``chat_template`` in tokenizer_config.json, and, of models that also see or hear, ``chat_template.json`` and
    ``chat_template`` in processor_config.json. llama.cpp's converter asks tokenizer_config.json first, where older
    versions of a template are left, or a line that includes the file.

    Raises:
        SourceError: if a template's file cannot be read.
    """
    content = _from_jinja_files(files.directory)
    if content is None:
        content = files.config.get("chat_template")
    for file in ("chat_template.json", "processor_config.json"):
        if content is None:
            content = _from_json_file(files.directory / file)
    if isinstance(content, str):
        return ChatTemplates(default=content)
    if not isinstance(content, list):
        return ChatTemplates()
    named: dict[str, str] = {}
    for entry in content:
        name, template = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        if isinstance(name, str) and name and isinstance(template, str):
            named[_key_name(name)] = template
    default = named.pop("default", None)
    return ChatTemplates(default, tuple(sorted(named.items())))


def _from_jinja_files(directory: Path) -> object:
    main = directory / "chat_template.jinja"
    if not main.is_file():
        return None
    others = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    named = [("default", main), *((path.stem, path) for path in others)]
    return [{"name": name, "template": _read(path)} for name, path in named]


def _from_json_file(path: Path) -> object:
    if not path.is_file():
        return None
    try:
        content = json.loads(_read(path))
    except ValueError as error:
        raise SourceError(f"{path}: not readable as JSON ({error}); download the file again") from error
    return content.get("chat_template") if isinstance(content, Mapping) else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: not readable as UTF-8 text ({error}); download the file again") from error


def _key_name(name: str) -> str:
    # the name becomes part of a GGUF key, where only letters, digits and _ are safe
    return "".join(c if c.isascii() and c.isalnum() else "_" for c in name)

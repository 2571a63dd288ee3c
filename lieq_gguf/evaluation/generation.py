"""Generates text with a file, through llama-cpp-python's own chat interface and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lieq_gguf.errors import VerificationError
from lieq_gguf.formats.gguf_file import GgufFile
from lieq_gguf.native.llama_cpp import llama_cpp
from lieq_gguf.records.options import GenerationOptions

_CONTEXT = 2048


def stream(file: Path, prompt: str, options: GenerationOptions) -> Iterator[str]:
    """Pieces of the answer as they come.

    Args:
        file: GGUF file.
        prompt: What the user says.
        options: How to answer.

    Raises:
        FormatError: if the file is not a complete GGUF file.
        VerificationError: if llama.cpp does not load it or the prompt is too long.
    """
    content = GgufFile(file)
    uses_template = content.value("tokenizer.chat_template") is not None and not options.raw
    api = llama_cpp()
    model_class = _with_one_template(api.Llama, uses_template)
    n_ctx = min(_CONTEXT, int(content.value(f"{content.architecture}.context_length", _CONTEXT)))
    model = None
    try:
        n_threads = options.n_threads
        model = model_class(
            str(file), n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, seed=options.seed, verbose=False
        )
        sampling = {"max_tokens": options.n_generate, "temperature": options.temperature, "stream": True}
        if uses_template:
            for chunk in model.create_chat_completion([{"role": "user", "content": prompt}], **sampling):
                yield chunk["choices"][0]["delta"].get("content") or ""
        else:
            for chunk in model.create_completion(prompt, **sampling):
                yield chunk["choices"][0]["text"]
    except Exception as error:
        is_too_long = isinstance(error, ValueError) and "context window" in str(error)
        if is_too_long or (isinstance(error, ValueError) and (model is None or not uses_template)):
            advice = "; shorten the prompt" if is_too_long else ""
            raise VerificationError(f"llama.cpp cannot answer with {file}: {error}{advice}") from None
        if not uses_template:
            raise
        raise VerificationError(  # a template is somebody's program, in which anything can fail
            f"the chat template of {file} fails: {type(error).__name__}: {error}; --raw continues the text without it"
        ) from None


def _with_one_template(model_class: Any, uses_template: bool) -> Any:
    """The class of models with metadata left out, whose templates it would compile, needed or not, right or wrong."""

    class Model(model_class):  # type: ignore[misc]
        @property
        def metadata(self) -> dict[str, str]:
            return self._metadata

        @metadata.setter
        def metadata(self, values: dict[str, str]) -> None:
            others = "tokenizer.chat_template."
            self._metadata = {key: values[key] for key in values if uses_template and not key.startswith(others)}

    return Model

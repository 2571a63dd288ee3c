"""Generates text with a file, through llama-cpp-python's own chat interface and sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
    has_template = content.value("tokenizer.chat_template") is not None
    api = llama_cpp()
    n_ctx = min(_CONTEXT, int(content.value(f"{content.architecture}.context_length", _CONTEXT)))
    try:
        n_threads = options.n_threads
        model = api.Llama(
            str(file), n_ctx=n_ctx, n_threads=n_threads, n_threads_batch=n_threads, seed=options.seed, verbose=False
        )
        sampling = {"max_tokens": options.n_generate, "temperature": options.temperature, "stream": True}
        if has_template and not options.raw:
            for chunk in model.create_chat_completion([{"role": "user", "content": prompt}], **sampling):
                yield chunk["choices"][0]["delta"].get("content") or ""
        else:
            for chunk in model.create_completion(prompt, **sampling):
                yield chunk["choices"][0]["text"]
    except ValueError as error:
        raise VerificationError(f"llama.cpp cannot answer with {file}: {error}") from None

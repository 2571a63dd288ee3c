"""llama.cpp itself, as llama-cpp-python ships it: the engine the user will run.

Uses the low-level interface: the high-level one prints to stderr, copies logits it does not need, and gives no reason
when it cannot load a file. The last lines of llama.cpp's log are kept, so that an error can quote them.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import VerificationError
from lieq_gguf.native.graph import Node
from lieq_gguf.quant_types import F32

_log_lines: list[str] = []


@lru_cache(maxsize=1)
def llama_cpp() -> Any:
    """The llama_cpp module, which logs to memory; imported late, since it loads every backend."""
    import llama_cpp as module

    def keep(_level: int, text: bytes, _user_data: ctypes.c_void_p) -> None:
        _log_lines.append(text.decode("utf-8", errors="replace").strip())
        del _log_lines[:-200]

    callback = module.llama_log_callback(keep)
    module.llama_log_set(callback, ctypes.c_void_p(0))
    module._lieq_gguf_log_callback = callback  # a callback must outlive its registration
    module.llama_backend_init()
    if b"AMX_INT8 = 1" in module.llama_print_system_info():
        _keep_off_amx(module)
    return module


def _keep_off_amx(module: Any) -> None:
    """Load models without llama.cpp's AMX kernels; this turns off its other repacked layouts too.

    On virtual machines that announce AMX, these kernels abort the process at the first quantised matrix
    (ggml-org/llama.cpp#20824), which no caller could catch. llama_cpp.Llama reads the same defaults, from the inner
    module.
    """
    default_params = module.llama_model_default_params

    def params() -> Any:
        result = default_params()
        result.use_extra_bufts = False
        return result

    for place in (module, module.llama_cpp):
        place.llama_model_default_params = params


class Watcher(Protocol):
    """Sees the nodes of the compute graph while llama.cpp evaluates it."""

    def wants(self, node: Node) -> bool:
        """Whether to see the values of a node; called before it is computed."""

    def see(self, node: Node) -> None:
        """Take a wanted node that was just computed."""


class _Callback:
    """A watcher for llama.cpp to call from C; an error it raises is kept until the call into llama.cpp returns."""

    def __init__(self, api: Any, watcher: Watcher) -> None:
        self._watcher = watcher
        self._error: BaseException | None = None
        self.function = api.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _user_data: object) -> bool:
        if self._error is not None:
            return False
        try:
            if ask:
                return self._watcher.wants(Node(address))
            self._watcher.see(Node(address))
        except BaseException as error:  # no error may pass through C
            self._error = error
        return self._error is None

    def reraise(self) -> None:
        """Raise the watcher's error, if any."""
        if self._error is not None:
            raise self._error


class LoadedModel:
    """A model in llama.cpp, and a context to run it in unless only its vocabulary was loaded."""

    def __init__(self, model: Any, context: Any, n_batch: int, callback: _Callback | None = None) -> None:
        self._api = llama_cpp()
        self._model = model
        self._context = context
        self._n_batch = n_batch
        self._callback = callback
        self._vocabulary = self._api.llama_model_get_vocab(model)
        self.n_vocab: int = self._api.llama_vocab_n_tokens(self._vocabulary)

    def tokenize(self, text: str, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; special tokens in the text are recognised."""
        content = text.encode()
        n_max = len(content) + 8  # at most one token per byte; a blank and special tokens may be added
        ids = (self._api.llama_token * n_max)()
        n = self._api.llama_tokenize(self._vocabulary, content, len(content), ids, n_max, add_special_tokens, True)
        if n < 0:
            raise VerificationError(
                f"llama.cpp makes {-n} tokens of a text of {len(content)} bytes; please report this"
            )
        return [int(i) for i in ids[:n]]

    def use_threads(self, n_threads: int) -> None:
        """Run with this number of threads from now on."""
        self._api.llama_set_n_threads(self._context, n_threads, n_threads)

    def text(self, ids: Sequence[int]) -> str:
        """The text that tokens stand for; special tokens are left out."""
        tokens = (self._api.llama_token * len(ids))(*ids)
        buffer = ctypes.create_string_buffer(1 << 10)
        n = self._api.llama_detokenize(self._vocabulary, tokens, len(ids), buffer, len(buffer), True, False)
        if n < 0:  # minus the bytes that are needed
            buffer = ctypes.create_string_buffer(-n)
            n = self._api.llama_detokenize(self._vocabulary, tokens, len(ids), buffer, len(buffer), True, False)
        return buffer.raw[:n].decode(errors="replace")

    def generate(self, ids: Sequence[int], n_tokens: int, pick: Callable[[npt.NDArray[np.float32]], int]) -> list[int]:
        """Continue a sequence from an empty context until the context is full or the model ends the text.

        Args:
            ids: The beginning.
            n_tokens: Largest number of tokens to add.
            pick: Chooses a token from the logits ``[n_vocab]`` of the position.

        Raises:
            VerificationError: if llama.cpp fails.
        """
        self.clear()
        self.decode(ids)
        result: list[int] = []
        for _ in range(min(n_tokens, self._n_batch - len(ids))):
            row = self._api.llama_get_logits_ith(self._context, -1)
            token = pick(np.ctypeslib.as_array(row, shape=(self.n_vocab,)))
            if self._api.llama_vocab_is_eog(self._vocabulary, token):
                break
            result.append(token)
            self.decode([token])
        return result

    def clear(self) -> None:
        """Forget all tokens decoded so far."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def decode(self, ids: Sequence[int]) -> None:
        """Run the next tokens, keep only the last one's logits, and wait until llama.cpp is done.

        Raises:
            VerificationError: if llama.cpp fails.
        """
        for start in range(0, len(ids), self._n_batch):
            batch_ids = ids[start : start + self._n_batch]
            tokens = (self._api.llama_token * len(batch_ids))(*batch_ids)  # the batch only points to it
            self._run(self._api.llama_batch_get_one(tokens, len(batch_ids)))
        self._api.llama_synchronize(self._context)

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture."""
        buffer = ctypes.create_string_buffer(64)
        self._api.llama_model_meta_val_str(self._model, b"general.architecture", buffer, len(buffer))
        return buffer.value.decode()

    @property
    def bos_token(self) -> int | None:
        """The token that starts every text, or None."""
        adds_bos = self._api.llama_vocab_get_add_bos(self._vocabulary)
        return int(self._api.llama_vocab_bos(self._vocabulary)) if adds_bos else None

    @property
    def eos_token(self) -> int:
        """The token that ends a text."""
        return int(self._api.llama_vocab_eos(self._vocabulary))

    def logits(self, ids: Sequence[int], first: int = 0) -> npt.NDArray[np.float32]:
        """Run a sequence from an empty context; logits of the positions from ``first`` on.

        Returns:
            ``[n_tokens - first, n_vocab]``.

        Raises:
            VerificationError: if llama.cpp fails.
        """
        result = np.empty((len(ids) - first, self.n_vocab), dtype=np.float32)
        for start, n_tokens in self._batches(ids, first):
            for i in range(max(0, first - start), n_tokens):
                row = self._api.llama_get_logits_ith(self._context, i)
                result[start + i - first] = np.ctypeslib.as_array(row, shape=(self.n_vocab,))
        return result

    def run(self, ids: Sequence[int]) -> None:
        """Run a sequence from an empty context through the whole graph, for a watcher.

        Raises:
            VerificationError: if llama.cpp fails.
        """
        for _ in self._batches(ids, 0):
            pass

    def _batches(self, ids: Sequence[int], first: int) -> Iterator[tuple[int, int]]:
        """Run a sequence from an empty context; yields start and length of each batch once it is done."""
        self.clear()
        for start in range(0, len(ids), self._n_batch):
            batch_ids = ids[start : start + self._n_batch]
            batch = self._api.llama_batch_init(len(batch_ids), 0, 1)
            try:
                batch.n_tokens = len(batch_ids)
                for i, token in enumerate(batch_ids):
                    batch.token[i], batch.pos[i] = token, start + i
                    batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, start + i >= first
                self._run(batch)
                yield start, len(batch_ids)
            finally:
                self._api.llama_batch_free(batch)

    def _run(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if self._callback is not None:
            self._callback.reraise()
        if status != 0:
            raise VerificationError(f"llama.cpp failed to run the model (status {status}): {_last_error()}")


@contextmanager
def open_model(
    file: Path,
    *,
    vocab_only: bool = False,
    n_ctx: int = 512,
    n_threads: int = 1,
    watcher: Watcher | None = None,
    in_float32: bool = False,
) -> Iterator[LoadedModel]:
    """Load a GGUF file into llama.cpp for the length of a ``with``.

    Args:
        file: The file.
        vocab_only: Whether to load the tokenizer alone.
        n_ctx: Number of tokens the context holds, and that run at a time.
        n_threads: Threads to run with.
        watcher: Sees the graph while it is evaluated, or None.
        in_float32: Whether attention is computed in float32, keys and values too, instead of partly in F16.

    Raises:
        VerificationError: if llama.cpp refuses the file, quoting it.
    """
    api = llama_cpp()
    _log_lines.clear()
    parameters = api.llama_model_default_params()
    parameters.vocab_only = vocab_only
    parameters.n_gpu_layers = 0
    model = api.llama_model_load_from_file(str(file).encode(), parameters)
    if not model:
        raise VerificationError(f"llama.cpp cannot load {file}: {_last_error()}")
    context = None
    callback = None if watcher is None else _Callback(api, watcher)
    try:
        if not vocab_only:
            settings = api.llama_context_default_params()
            settings.n_ctx = settings.n_batch = settings.n_ubatch = n_ctx
            settings.n_threads = settings.n_threads_batch = n_threads
            if callback is not None:
                settings.cb_eval = callback.function
            if in_float32:
                settings.type_k = settings.type_v = F32.ggml_id
                settings.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
            context = api.llama_init_from_model(model, settings)
            if not context:
                raise VerificationError(f"llama.cpp cannot create a context for {file}: {_last_error()}")
        yield LoadedModel(model, context, n_ctx, callback)
    finally:
        if context:
            api.llama_free(context)
        api.llama_model_free(model)


def load_vocabulary(file: Path) -> LoadedModel:
    """Load only the tokenizer of a file; it is freed with the last reference.

    Raises:
        VerificationError: if llama.cpp refuses the file, quoting it.
    """
    stack = ExitStack()
    model = stack.enter_context(open_model(file, vocab_only=True))
    weakref.finalize(model, stack.close)
    return model


def _last_error() -> str:
    """The most useful line of llama.cpp's log: why a model did not load, or else the last line."""
    marker = "error loading model:"
    reasons = [line.split(marker, 1)[1].strip() for line in _log_lines if marker in line]
    said = [line for line in _log_lines if line]
    return (reasons or said or ["no reason given"])[-1]

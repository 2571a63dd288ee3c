"""Measures the time to decode each type on this machine: llama.cpp runs a small model in each type.

The model has random weights, a tiny vocabulary, and the matrices of a small language model. It is run with
wide and with narrow feed-forward matrices; the time per weight is the difference in time over that in weights.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from lieq_gguf.allocation.decode_costs import DecodeCosts
from lieq_gguf.errors import VerificationError
from lieq_gguf.formats.gguf_header import HeaderWriter, TensorLayout, float_tensor, write_gguf
from lieq_gguf.native import encoders
from lieq_gguf.native.llama_cpp import LoadedModel, open_model
from lieq_gguf.quant_types import DEFAULT_LADDER, F32, QUANT_TYPES, QuantType

_N_LAYERS, _WIDTH, _WIDE, _NARROW, _N_VOCAB, _HEAD = 16, 1024, 4096, 256, 32, 64
_N_GENERATE, _RUNS = 24, 5
_ENCODED_ROWS = 16  # encoded once and repeated: speed hardly depends on the values


def measure_decode_costs(
    types: Sequence[QuantType] = DEFAULT_LADDER,
    n_threads: int = 1,
    advance: Callable[[float], None] = lambda _amount: None,
) -> DecodeCosts:
    """Time the generation with every type.

    Args:
        types: Types to measure; Q8_0 is always measured.
        n_threads: Threads of llama.cpp.
        advance: Called with 1 after each type.

    Raises:
        VerificationError: if llama.cpp does not run a model, or the noise exceeds a difference in time.
    """
    n_weights = 3 * _N_LAYERS * _WIDTH * (_WIDE - _NARROW)
    costs = {}
    for quant_type in dict.fromkeys([*types, QUANT_TYPES["Q8_0"]]):
        with tempfile.TemporaryDirectory() as scratch:
            wide, narrow = Path(scratch) / "wide.gguf", Path(scratch) / "narrow.gguf"
            _write_model(wide, quant_type, _WIDE)
            _write_model(narrow, quant_type, _NARROW)
            with _opened(wide, n_threads) as a, _opened(narrow, n_threads) as b:
                # alternating, and the minimum of each: other work on the machine only adds time
                runs = [(_token_seconds(a), _token_seconds(b)) for _ in range(_RUNS)]
        slow, fast = (min(seconds) for seconds in zip(*runs, strict=True))
        cost = round(1e12 * (slow - fast) / n_weights, 2)
        if cost <= 0:
            raise VerificationError(
                f"{quant_type.name} cannot be timed while this machine is busy with other work; try again"
            )
        costs[quant_type.name] = cost
        advance(1)
    return DecodeCosts(
        machine=f"{_processor()}, {n_threads} thread{'s' if n_threads > 1 else ''}",
        source=f"bench --types, {datetime.now(timezone.utc):%Y-%m-%d}",
        picoseconds=costs,
        is_own=True,
    )


def _opened(file: Path, n_threads: int) -> AbstractContextManager[LoadedModel]:
    return open_model(file, n_ctx=64, n_threads=n_threads)


def _processor() -> str:
    """Name of this machine's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "Model"))]
    return (names or [platform.processor() or platform.machine()])[0]


def _token_seconds(model: LoadedModel) -> float:
    """Shortest time of a generated token."""
    model.clear()
    seconds = []
    for i in range(_N_GENERATE):
        start = time.perf_counter()
        model.decode([i % _N_VOCAB])
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def _write_model(file: Path, quant_type: QuantType, n_ff: int) -> None:
    """Write a Llama without a vocabulary, with all matrices in one type."""
    numbers = np.random.default_rng(0)
    writer = HeaderWriter("llama")
    writer.add_block_count(_N_LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(_WIDTH // _HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_N_VOCAB)
    writer.add_tokenizer_model("none")
    tensors = []

    def add(name: str, n_out: int, n_in: int, kind: QuantType) -> None:
        rows = numbers.normal(0, 0.02, (_ENCODED_ROWS, n_in)).astype(np.float32)
        encoded = encoders.quantize(rows, kind, np.ones(n_in, np.float32))
        data = np.tile(encoded, (n_out // _ENCODED_ROWS, 1))
        tensors.append((TensorLayout(name, (n_out, n_in), kind.ggml_id, data.nbytes), data))

    add("token_embd.weight", _N_VOCAB, _WIDTH, F32)
    for layer in range(_N_LAYERS):
        for role in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{role}.weight", _WIDTH, _WIDTH, quant_type)
        for role in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{role}.weight", n_ff, _WIDTH, quant_type)
        add(f"blk.{layer}.ffn_down.weight", _WIDTH, n_ff, quant_type)
        norms = (f"blk.{layer}.{role}.weight" for role in ("attn_norm", "ffn_norm"))
        tensors += [float_tensor(name, np.ones(_WIDTH, np.float32)) for name in norms]
    tensors.append(float_tensor("output_norm.weight", np.ones(_WIDTH, np.float32)))
    write_gguf(file, writer.values, tensors)

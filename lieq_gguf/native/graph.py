"""The nodes of llama.cpp's compute graph, as they are computed."""

from __future__ import annotations

import ctypes
import re
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lieq_gguf.errors import QuantizationError
from lieq_gguf.native.ggml import ggml_library, library_file
from lieq_gguf.quant_types import QUANT_TYPES

N_SOURCES = 10  # that a tensor can be computed from, GGML_MAX_SRC


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * N_SOURCES),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _InitParams(ctypes.Structure):
    """``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


# in Nemotron-H, networks have l_out before the residual stream is added; the other name follows. PLaMo 2 has the third.
_LAYER_OUTPUT = re.compile(r"(?:l_out|nemotron_h_block_out|ffn_residual)-(\d+)")
_NUMBERS = {QUANT_TYPES["F32"].ggml_id: np.dtype(np.float32), 26: np.dtype(np.int32)}  # GGML_TYPE_I32


class Node:
    """A tensor of llama.cpp's compute graph, valid while the graph is evaluated.

    Attributes:
        name: Its name, for example ``l_out-3``; for a weight the name of the tensor.
    """

    def __init__(self, address: int) -> None:
        self._address = address
        self._struct = _Tensor.from_address(address)
        self.name = self._struct.name.decode(errors="replace")

    @property
    def op(self) -> str:
        """Ggml's name of the operation that computes it, such as ``MUL_MAT``; ``NONE`` for a weight."""
        return str(_graph_functions().ggml_op_name(self._struct.op).decode())

    @property
    def shape(self) -> tuple[int, ...]:
        """All four sizes, rows last."""
        return tuple(reversed(self._struct.ne))

    @property
    def output_of_layer(self) -> int | None:
        """Index of the layer whose output it is, the last of a layer if there are several; None for any other node."""
        match = _LAYER_OUTPUT.fullmatch(self.name)
        return None if match is None else int(match[1])

    def source(self, index: int) -> Node | None:
        """One of the tensors from which it is computed."""
        address = self._struct.src[index]
        return None if address is None else Node(address)

    @property
    def holds_numbers(self) -> bool:
        """Whether :meth:`read` can read it: float32, or int32 for indices."""
        return self._struct.type in _NUMBERS

    def read(self) -> npt.NDArray[np.float32] | npt.NDArray[np.int32]:
        """A copy of its values, of :attr:`shape`, from any backend; in a view, rows may lie apart."""
        library = _graph_functions()
        content = np.empty(library.ggml_nbytes(self._address), dtype=np.uint8)
        library.ggml_backend_tensor_get(self._address, content.ctypes.data, 0, content.nbytes)
        strides = tuple(reversed(self._struct.nb))
        return np.ndarray(self.shape, _NUMBERS[self._struct.type], content.data, strides=strides)

    def write(self, values: npt.NDArray[np.float32]) -> None:
        """Put other values in their place, of the same number, for what is computed from them."""
        content = np.ascontiguousarray(values, dtype=np.float32)
        library = _graph_functions()
        if library.ggml_nbytes(self._address) != content.nbytes:
            raise QuantizationError(f"node {self.name} does not hold {content.size} neighbouring numbers")
        library.ggml_backend_tensor_set(self._address, content.ctypes.data, 0, content.nbytes)

    def read_rows(self) -> npt.NDArray[np.float32]:
        """Its values as rows, such as hidden states ``[n_tokens, d_model]``."""
        return np.asarray(self.read(), dtype=np.float32).reshape(-1, self.shape[-1])


@lru_cache(maxsize=1)
def _graph_functions() -> ctypes.CDLL:
    """The library with the functions for graphs, after a check that ``_Tensor`` matches its tensors."""
    library = ggml_library()
    signatures = {
        "ggml_op_name": (ctypes.c_char_p, [ctypes.c_int]),
        "ggml_nbytes": (ctypes.c_size_t, [ctypes.c_void_p]),
        "ggml_backend_tensor_get": (
            None,
            [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
        ),
        "ggml_backend_tensor_set": (
            None,
            [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t],
        ),
        "ggml_init": (ctypes.c_void_p, [_InitParams]),
        "ggml_free": (None, [ctypes.c_void_p]),
        "ggml_new_tensor_2d": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
        "ggml_mul_mat": (ctypes.c_void_p, [ctypes.c_void_p] * 3),
        "ggml_get_name": (ctypes.c_void_p, [ctypes.c_void_p]),
        "ggml_get_data": (ctypes.c_void_p, [ctypes.c_void_p]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    context = library.ggml_init(_InitParams(1 << 16, None, False))
    try:
        weight = library.ggml_new_tensor_2d(context, QUANT_TYPES["F16"].ggml_id, 64, 3)
        x = library.ggml_new_tensor_2d(context, QUANT_TYPES["F32"].ggml_id, 64, 5)
        product = library.ggml_mul_mat(context, weight, x)
        read = _Tensor.from_address(product)
        found = (
            library.ggml_op_name(read.op), tuple(read.src[:3]), tuple(read.ne), tuple(read.nb), read.type,
            product + _Tensor.name.offset, read.data, tuple(_Tensor.from_address(weight).nb),
        )  # fmt: skip
        expected = (
            b"MUL_MAT", (weight, x, None), (3, 5, 1, 1), (4, 12, 60, 60), QUANT_TYPES["F32"].ggml_id,
            library.ggml_get_name(product), library.ggml_get_data(product), (2, 128, 384, 384),
        )  # fmt: skip
    finally:
        library.ggml_free(context)
    if found != expected:
        raise QuantizationError(
            f"{library_file()} has a tensor layout that this version does not support; "
            "install the llama-cpp-python that pyproject.toml names"
        )
    return library

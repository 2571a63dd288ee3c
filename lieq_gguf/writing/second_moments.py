"""Second moments of the inputs of a layer's matrices, for error feedback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


class SecondMoments:
    """``H = mean(x xᵀ)`` over tokens, for every distinct input in a layer.

    Query, key and value share one input, as do gate and up.
    """

    def __init__(self, modules: Collection[str], in_bfloat16: bool) -> None:
        """Begin a layer.

        Args:
            modules: Linear modules to watch.
            in_bfloat16: Whether inputs may be rounded to bfloat16, as in the layer; sums are always float32.
        """
        self._watched = modules
        self._in_bfloat16 = in_bfloat16
        self._sums: dict[str, torch.Tensor] = {}
        self._n_tokens: dict[str, int] = {}
        self._modules: dict[str, list[str]] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """Add a batch; a tensor that reaches several modules is summed once, under the name of the first."""
        if module not in self._watched:
            return
        if self._last is not None and self._last[0] is x:
            self._note(self._last[1], module)
            return
        self._last = (x, module)
        self._note(module, module)
        rows = x.reshape(-1, x.shape[-1]).float()
        if module not in self._sums:
            self._sums[module] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        with _rounding_products(self._in_bfloat16):
            self._sums[module].addmm_(rows.T, rows)
        self._n_tokens[module] = self._n_tokens.get(module, 0) + len(rows)

    def groups(self) -> list[list[str]]:
        """Groups of modules that share an input, in the order in which they run."""
        self._last = None
        return list(self._modules.values())

    def take(self, first: str) -> torch.Tensor:
        """The moments ``[n_in, n_in]`` of the input of a group's first module, on the CPU; they are not kept here."""
        return self._sums.pop(first).div_(self._n_tokens.pop(first)).cpu()

    def _note(self, first: str, module: str) -> None:
        modules = self._modules.setdefault(first, [])
        if module not in modules:
            modules.append(module)


@contextmanager
def _rounding_products(rounding: bool) -> Iterator[None]:
    """For the length of a ``with``, products of float32 matrices may round their factors to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if rounding else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

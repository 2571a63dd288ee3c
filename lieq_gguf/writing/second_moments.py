"""Second moments of the inputs of a layer's matrices, which error feedback needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


class SecondMoments:
    """``H = mean(x xᵀ)`` over tokens, of every distinct input in a layer.

    Query, key and value share theirs, as do gate and up.
    """

    def __init__(self, modules: Collection[str], in_bfloat16: bool) -> None:
        """Begin a layer.

        Args:
            modules: Linear modules to watch.
            in_bfloat16: Whether inputs may be rounded to bfloat16, as the layer rounds them; sums are float32 always.
        """
        self._watched = modules
        self._in_bfloat16 = in_bfloat16
        self._sums: dict[str, torch.Tensor] = {}
        self._n_tokens: dict[str, int] = {}
        self._modules: dict[str, list[str]] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """Add a batch; the same tensor reaching several modules is summed once, under the name of the first."""
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
        """Modules that have the same input, in the order they run in."""
        self._last = None
        return list(self._modules.values())

    def take(self, first: str) -> torch.Tensor:
        """The moments ``[n_in, n_in]`` of an input by its first module, on the CPU; nothing is kept of them."""
        return self._sums.pop(first).div_(self._n_tokens.pop(first)).cpu()

    def _note(self, first: str, module: str) -> None:
        modules = self._modules.setdefault(first, [])
        if module not in modules:
            modules.append(module)


@contextmanager
def _rounding_products(rounding: bool) -> Iterator[None]:
    """Products of float32 matrices whose factors are rounded to bfloat16, where that is fast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if rounding else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)

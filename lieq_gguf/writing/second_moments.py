"""Second moments of the inputs of a layer's matrices, for error feedback."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch


class SecondMoments:
    """``H = mean(x xᵀ)`` over tokens, for every distinct input in a layer.

    Query, key and value share one input, as do gate and up.
    """

    def __init__(self, modules: Collection[str], in_bfloat16: bool, rarely_used: Collection[str] = ()) -> None:
        """Begin a layer.

        Args:
            modules: Modules to watch.
            in_bfloat16: Whether inputs may be rounded to bfloat16, as in the layer; sums are always float32.
            rarely_used: Modules to watch whose inputs are kept until they are taken: the matrices that experts have
                alone. Each sees few tokens, so inputs take less memory than the moments of all.
        """
        self._watched = modules
        self._in_bfloat16 = in_bfloat16
        self._rarely_used = rarely_used
        self._sums: dict[str, torch.Tensor] = {}
        self._inputs: dict[str, list[torch.Tensor]] = {}
        self._n_tokens: dict[str, int] = {}
        self._modules: dict[str, list[str]] = {}
        self._last: tuple[torch.Tensor, str] | None = None

    def see_input(self, module: str, x: torch.Tensor) -> None:
        """Add a batch; a tensor that reaches several modules is summed once, under the name of the first."""
        if module in self._rarely_used:
            self._note(module, module)
            self._inputs.setdefault(module, []).append(x.to(torch.bfloat16) if self._in_bfloat16 else x)
            self._n_tokens[module] = self._n_tokens.get(module, 0) + len(x)
        if module not in self._watched:
            return
        if self._last is not None and self._last[0] is x:
            self._note(self._last[1], module)
            return
        self._last = (x, module)
        self._note(module, module)
        rows = x.reshape(-1, x.shape[-1])
        self._n_tokens[module] = self._n_tokens.get(module, 0) + len(rows)
        self._add(module, rows)

    def groups(self) -> list[list[str]]:
        """Groups of modules that share an input, in the order in which they run."""
        self._last = None
        return list(self._modules.values())

    def n_tokens(self, first: str) -> int:
        """Number of tokens that a group's first module has seen."""
        return self._n_tokens[first]

    def take(self, first: str) -> torch.Tensor:
        """The moments ``[n_in, n_in]`` of the input of a group's first module, on the CPU; they are not kept here."""
        if first in self._inputs:
            self._add(first, torch.cat(self._inputs.pop(first)))
        return self._sums.pop(first).div_(self._n_tokens[first]).cpu()

    def _add(self, module: str, rows: torch.Tensor) -> None:
        rows = rows.float()
        if module not in self._sums:
            self._sums[module] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
        with _rounding_products(self._in_bfloat16):
            self._sums[module].addmm_(rows.T, rows)

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

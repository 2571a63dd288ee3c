"""Second moments of the inputs of matrices, for error feedback, and what they lack of the intact model's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from lieq_gguf.measure.torch_setup import rounding_products


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
        self._intact: dict[str, torch.Tensor] = {}
        self._batch: dict[str, torch.Tensor] = {}
        self._lacks: dict[str, torch.Tensor] = {}

    def see_intact(self, module: str, x: torch.Tensor) -> None:
        """Remember an input in the intact model, for the same tokens as the next batch."""
        if module in self._watched:
            self._intact[module] = x

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
        self._batch[module] = rows
        self._add(module, rows)

    def end_batch(self, lacking: Mapping[str, torch.Tensor]) -> None:
        """Sum ``δ xᵀ`` over the tokens of a batch, for every distinct input ``x`` of it.

        ``δ`` is what the input lacks of the intact model's, or ``lacking`` ``[…, n]`` for the modules named there.
        """
        for module, rows in self._batch.items():
            if module in lacking:
                lack = lacking[module].reshape(len(rows), -1).to(rows.device)
            elif module in self._intact:
                lack = self._intact[module].reshape(rows.shape).float() - rows.float()
            else:
                continue
            self._add_product(self._lacks, module, lack, rows.float())
        self._intact, self._batch = {}, {}

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

    def take_lack(self, first: str) -> torch.Tensor | None:
        """``mean(δ xᵀ)`` ``[n, n_in]`` for a group's first module, on the CPU; None if there is none."""
        return self._lacks.pop(first).div_(self._n_tokens[first]).cpu() if first in self._lacks else None

    def _add(self, module: str, rows: torch.Tensor) -> None:
        rows = rows.float()
        self._add_product(self._sums, module, rows, rows)

    def _add_product(self, sums: dict[str, torch.Tensor], module: str, left: torch.Tensor, right: torch.Tensor) -> None:
        if module not in sums:
            sums[module] = torch.zeros(left.shape[1], right.shape[1], device=right.device)
        with rounding_products(self._in_bfloat16):
            sums[module].addmm_(left.T, right)

    def _note(self, first: str, module: str) -> None:
        modules = self._modules.setdefault(first, [])
        if module not in modules:
            modules.append(module)


def output_moments(
    inputs: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, intact: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The moments of the output matrix's input ``[d_model, d_model]``, and what it lacks of the intact model's.

    Args:
        inputs: From states behind the last layer to inputs of the matrix: the final norm.
        states: Behind the last layer ``[n_chunks, chunk_size, state_width]``.
        intact: The same states of the intact model; None for the same.
    """
    name = "output"
    moments = SecondMoments({name}, in_bfloat16=False)
    for row in range(len(states)):
        if intact is not None:
            moments.see_intact(name, inputs(intact[row]))
        moments.see_input(name, inputs(states[row]))
        moments.end_batch({})
    return moments.take(name), moments.take_lack(name)

"""The damage of quantising the outer matrices: the embedding, the output matrix, or the one matrix that is both.

Their damage has the same unit as that of the layers' matrices, the block error. For the embedding it is the change of
the first layer's output, for a second table of tokens the sum of the changes of all layers' outputs. No layer follows
the output matrix: its damage is the divergence of the logits, converted into block error at the rate of the whole
decoder, the divergence it causes over the sum of its block errors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.measure.observers.input_sums import InputSums
from lieq_gguf.measure.observers.quantization_damage import QuantizationDamage
from lieq_gguf.measure.output_head import OutputHead
from lieq_gguf.measure.type_errors import probe_matrix, probe_type, relative_errors
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import DEFAULT_LADDER

FloatArray = npt.NDArray[np.float32]

_N_SAMPLED_ROWS = 1024  # rows of the most frequent tokens, which are used most
_TOKEN_STEP = 2  # compares every second token of the sample, since logits cost as much as several layers


class OuterDamage(Observer):
    """Quantises each outer matrix with the probe and compares the results.

    Attributes:
        type_errors: Tensor name to type name to relative error, weighted for the output matrix alone: the embedding has
            no importance.
        sensitivities: Tensor name to block error per unit of relative error; without the output matrix if the probe is
            exact.
        kld_per_block_error: Divergence of the logits, in nats, with the whole decoder quantised with the probe, per
            block error of all its matrices; None if the probe is exact.
    """

    needs = (QuantizationDamage, InputSums)

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self.type_errors: dict[str, dict[str, float]] = {}
        self.sensitivities: dict[str, float] = {}
        self.kld_per_block_error: float | None = None
        source = setting.source
        self._output = source.spec.output_matrix
        self._source = source
        self._options = setting.options
        self._sums = others[InputSums]
        self._sample = setting.damage_sample
        self._decoder = others[QuantizationDamage]
        # the rule for outer matrices may choose types that are not offered to the layers
        self._types = tuple(dict.fromkeys([*setting.options.error_types, *DEFAULT_LADDER]))
        self._n_threads = setting.options.compute.n_threads
        ids, counts = np.unique(setting.tokens.ids, return_counts=True)
        self._frequent = ids[np.argsort(-counts, kind="stable")[:_N_SAMPLED_ROWS]].tolist()
        self._embedding_error = self._table_error = 0.0
        self._probed_table: torch.Tensor | None = None

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Quantise the embedding of the sample and run the first layer on it, and the second table for every layer."""
        if layer.index == 0:
            before = hidden[self._sample]
            probed = layer.with_hidden(before, self._probed(layer.hidden_part(before)))
            self._embedding_error = layer.relative_change(layer.forward(before), layer.forward(probed))
        if layer.token_table is not None:
            before = hidden[self._sample]
            intact = layer.forward(before)
            if self._probed_table is None:
                self._probed_table = self._probed(layer.token_table.float())
            with layer.replaced_token_table(self._probed_table):
                self._table_error += layer.relative_change(intact, layer.forward(before))

    def conclude(self, output_head: OutputHead, hidden: torch.Tensor) -> None:
        """Compare logits, and express the divergence as block error."""
        intact = hidden[self._sample][:, ::_TOKEN_STEP]
        importance = self._output_importance()
        divergence = output_head.divergence(intact, change=lambda rows: self._probed(rows, importance))
        of_decoder = sum(self._decoder.block_errors.values())
        assert self._decoder.drifted is not None
        if of_decoder > 0:
            drift = output_head.divergence(intact, self._decoder.drifted[:, ::_TOKEN_STEP])
            self.kld_per_block_error = drift / of_decoder or None
        errors = {"token_embd.weight": self._embedding_error, "per_layer_token_embd.weight": self._table_error}
        for tensor in self._source.spec.outer_matrices:
            rows = np.ascontiguousarray(self._source.read_rows(tensor, self._frequent).float().numpy())
            probe = probe_matrix(rows, importance if tensor is self._output else None, self._n_threads)
            damage = errors.get(tensor.name, 0.0)
            self.type_errors[tensor.name] = relative_errors([probe], self._types, self._n_threads)[0]
            if tensor is self._output:
                if self.kld_per_block_error is None:  # an exact probe shows no damage of the output matrix
                    continue
                damage += divergence / self.kld_per_block_error
            self.sensitivities[tensor.name] = damage / (probe.relative_error or 1.0)

    def _output_importance(self) -> FloatArray | None:
        """Weights of the squared errors of the columns of the output matrix ``[d_model]``."""
        if not self._options.weigh_errors:
            return None
        return (self._options.importance or self._sums.importance()).mean(self._output.name)

    def _probed(self, rows: torch.Tensor, importance: FloatArray | None = None) -> torch.Tensor:
        """Rows ``[…, n_in]`` encoded and decoded with the probe."""
        flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]).cpu().numpy())
        quant_type = probe_type(flat.shape[1])
        encoded = encoders.quantize(flat, quant_type, importance, self._n_threads)
        decoded = ggml.dequantize(encoded, quant_type, self._n_threads)
        return torch.from_numpy(decoded).reshape(rows.shape).to(rows.device)

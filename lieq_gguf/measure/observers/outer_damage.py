"""What quantising the matrices outside of the layers does: the embedding, the output matrix, or the one that is both.

Their damage is counted in the same unit as that of the layers' matrices, the block error. The embedding's is what its
error makes of the first layer's output. The output matrix has no layer behind it: its damage is the divergence of the
logits, changed into block error at the rate at which the block errors of the whole decoder turn into divergence.
"""

from __future__ import annotations

import numpy as np
import torch

from lieq_gguf.measure.layer_model import LayerModel
from lieq_gguf.measure.observers import Observer, Observers, PassSetting
from lieq_gguf.measure.observers.quantization_damage import QuantizationDamage, relative_change
from lieq_gguf.measure.output_head import OutputHead
from lieq_gguf.measure.type_errors import probe_matrix, probe_type, relative_errors
from lieq_gguf.native import encoders, ggml
from lieq_gguf.quant_types import DEFAULT_LADDER

_N_SAMPLED_ROWS = 1024  # of the most frequent tokens, which are what both ends of the model are used for
_TOKEN_STEP = 2  # of the sample, every second token is compared: logits are as costly as several layers


class OuterDamage(Observer):
    """Quantises each outer matrix with the probe, and compares.

    Attributes:
        type_errors: Tensor name to type name to relative error. No importance: no embedding has any.
        sensitivities: Tensor name to block error per unit of relative error; without the output matrix if the probe is
            exact.
        kld_per_block_error: Divergence of the logits, in nats, with the whole decoder quantised with the probe, per
            block error of all its matrices; None if the probe is exact.
    """

    needs = (QuantizationDamage,)

    def __init__(self, setting: PassSetting, others: Observers) -> None:
        super().__init__(setting, others)
        self.type_errors: dict[str, dict[str, float]] = {}
        self.sensitivities: dict[str, float] = {}
        self.kld_per_block_error: float | None = None
        source = setting.source
        self._matrices = [(tensor, source.read(tensor)) for tensor in source.spec.other_matrices]
        self._sample = setting.damage_sample
        self._decoder = others[QuantizationDamage]
        # by rule, embedding and output can have types that the layers are not offered
        self._types = tuple(dict.fromkeys([*setting.options.error_types, *DEFAULT_LADDER]))
        self._n_threads = setting.options.compute.n_threads
        ids, counts = np.unique(setting.tokens.ids, return_counts=True)
        self._frequent = torch.from_numpy(ids[np.argsort(-counts, kind="stable")[:_N_SAMPLED_ROWS]])
        self._embedding_error = 0.0

    def finish(self, layer: LayerModel, hidden: torch.Tensor) -> None:
        """Quantise the embedding of the sample and run the first layer on it."""
        if layer.index == 0:
            before = hidden[self._sample]
            self._embedding_error = relative_change(layer.forward(before), layer.forward(self._probed(before)))

    def conclude(self, head: OutputHead, hidden: torch.Tensor) -> None:
        """Compare logits, and express the divergence as block error."""
        intact = hidden[self._sample][:, ::_TOKEN_STEP]
        divergence = head.divergence(intact, change=self._probed)
        of_decoder = sum(self._decoder.block_errors.values())
        assert self._decoder.drifted is not None
        if of_decoder > 0:
            drift = head.divergence(intact, self._decoder.drifted[:, ::_TOKEN_STEP])
            self.kld_per_block_error = drift / of_decoder or None
        embedding, output = self._matrices[0][0], self._matrices[-1][0]  # the same if they are tied
        for tensor, matrix in self._matrices:
            rows = np.ascontiguousarray(matrix[self._frequent].float().numpy())
            probe = probe_matrix(rows, None, self._n_threads)
            damage = self._embedding_error if tensor is embedding else 0.0
            self.type_errors[tensor.name] = relative_errors([probe], self._types, self._n_threads)[0]
            if tensor is output:
                if self.kld_per_block_error is None:  # an exact probe tells nothing of the output matrix
                    continue
                damage += divergence / self.kld_per_block_error
            self.sensitivities[tensor.name] = damage / (probe.relative_error or 1.0)

    def _probed(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows ``[…, n_in]`` encoded and decoded with the probe."""
        flat = np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]).cpu().numpy())
        quant_type = probe_type(flat.shape[1])
        encoded = encoders.quantize(flat, quant_type, n_threads=self._n_threads)
        decoded = ggml.dequantize(encoded, quant_type, self._n_threads)
        return torch.from_numpy(decoded).reshape(rows.shape).to(rows.device)

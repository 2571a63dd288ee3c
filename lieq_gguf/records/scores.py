"""``LayerScores``: how much each layer matters by every scorer, and the error of each type in each matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lieq_gguf.errors import FormatError
from lieq_gguf.records.files import SCHEMA_VERSION, read_json, write_json
from lieq_gguf.records.spec import ModelSpec

# Share of a matrix's error that error feedback leaves, on text other than the calibration text. One number for all
# types: theirs are between 0.57 and 0.67, and plans that told them apart were no better (docs/experiments.md). The
# output matrix's are about as large.
_LEFT_BY_FEEDBACK = 0.62


@dataclass(frozen=True)
class LayerScores:
    """Scores and errors of a model, kept so that a new budget needs no forward pass.

    Attributes:
        model: Name of the model.
        n_tokens: Calibration tokens of the pass.
        dataset: Name of the calibration text.
        seed: Seed of the untrained twin.
        by_scorer: Scorer to one score per layer; higher means protect.
        type_errors: Tensor name to type name to ``Σ im·(W − Ŵ)² / Σ im·W²``, estimated on a sample.
        sensitivities: Tensor name to block error per unit of that error: how far the layer's output moves; empty if
            not measured.
        fingerprint: Digest of the model's files, to recognise another model of the same shape; None if unknown.
        kld_per_block_error: Divergence of the logits, in nats, per unit of block error; None if not measured.
    """

    model: str
    n_tokens: int
    dataset: str
    seed: int
    by_scorer: Mapping[str, tuple[float, ...]]
    type_errors: Mapping[str, Mapping[str, float]]
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str | None = None
    kld_per_block_error: float | None = None

    @property
    def n_layers(self) -> int:
        """Number of layers scored."""
        return len(next(iter(self.by_scorer.values())))

    def with_feedback(self, spec: ModelSpec) -> LayerScores:
        """The same scores with the errors that error feedback leaves in the layers' matrices and the output matrix."""
        corrected = [t.name for layer in spec.layer_matrices for t in layer]
        if spec.output_matrix.name in self.type_errors:
            corrected.append(spec.output_matrix.name)
        remaining = {
            tensor: {name: error * _LEFT_BY_FEEDBACK for name, error in self.type_errors[tensor].items()}
            for tensor in corrected
        }
        return replace(self, type_errors={**self.type_errors, **remaining})

    def check(self, spec: ModelSpec, fingerprint: str | None = None) -> None:
        """Require scores of exactly this model.

        Raises:
            FormatError: if layers, matrices or fingerprints differ; an unknown fingerprint matches any.
        """
        if self.n_layers != spec.n_layers:
            raise FormatError(
                f"the scores are for {self.model} with {self.n_layers} layers; {spec.name} has {spec.n_layers}: "
                "score it again"
            )
        names = {t.name for layer in spec.layer_matrices for t in layer}
        if names != set(self.type_errors) - {t.name for t in spec.outer_matrices}:
            raise FormatError(
                f"the scores are for {self.model}, whose matrices differ from those of {spec.name}: score it again"
            )
        if None not in (fingerprint, self.fingerprint) and fingerprint != self.fingerprint:
            raise FormatError(
                f"the scores are for another {self.model}, whose weights differ from those of {spec.name}; "
                "score it again"
            )

    def to_json(self, scorer: str) -> dict[str, Any]:
        """The document that ``score --json`` prints, with the values of ``scorer`` under the key ``score``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "scores",
            "model": self.model,
            "fingerprint": self.fingerprint,
            "scorer": scorer,
            "n_tokens": self.n_tokens,
            "dataset": self.dataset,
            "seed": self.seed,
            "layers": [
                {"layer": layer, "score": self.by_scorer[scorer][layer]}
                | {name: values[layer] for name, values in self.by_scorer.items()}
                for layer in range(self.n_layers)
            ],
            "scorers": list(self.by_scorer),
            "kld_per_block_error": self.kld_per_block_error,
            "sensitivities": dict(self.sensitivities),
            "type_errors": {name: dict(errors) for name, errors in self.type_errors.items()},
        }

    def save(self, target: Path, scorer: str) -> None:
        """Write ``to_json`` to a file."""
        write_json(target, self.to_json(scorer))

    @classmethod
    def load(cls, file: Path) -> LayerScores:
        """Read a file of ``save``.

        Raises:
            FormatError: if the file is not a complete scores file.
        """
        document = read_json(file, "scores")
        rate = document.get("kld_per_block_error")
        try:
            scores = cls(
                model=str(document["model"]),
                n_tokens=int(document["n_tokens"]),
                dataset=str(document["dataset"]),
                seed=int(document["seed"]),
                by_scorer={
                    str(name): tuple(float(layer[name]) for layer in document["layers"]) for name in document["scorers"]
                },
                type_errors={
                    str(name): {str(t): float(e) for t, e in errors.items()}
                    for name, errors in document["type_errors"].items()
                },
                fingerprint=None if document.get("fingerprint") is None else str(document["fingerprint"]),
                sensitivities={str(name): float(s) for name, s in document.get("sensitivities", {}).items()},
                kld_per_block_error=None if rate is None else float(rate),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{file} is not a complete scores file ({type(error).__name__}: {error}); make it again"
            ) from None
        if not scores.by_scorer or not scores.n_layers:
            raise FormatError(f"{file} holds no scores; make it again")
        for name, values in scores.by_scorer.items():
            if not all(map(math.isfinite, values)):
                raise FormatError(f"{file} holds scores of {name} that are not finite numbers; make it again")
        for name, errors in scores.type_errors.items():
            if not all(math.isfinite(e) and e >= 0 for e in errors.values()):
                raise FormatError(f"{file} holds errors of {name} that are not finite numbers; make it again")
        rates = () if scores.kld_per_block_error is None else (scores.kld_per_block_error,)
        if not all(math.isfinite(s) and s >= 0 for s in (*scores.sensitivities.values(), *rates)):
            raise FormatError(f"{file} holds sensitivities that are not finite numbers; make it again")
        return scores

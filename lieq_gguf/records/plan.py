"""``QuantPlan``: one type for every tensor of the file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from lieq_gguf.errors import FormatError
from lieq_gguf.quant_types import QUANT_TYPES
from lieq_gguf.records.bits import BitBudget, BudgetKind
from lieq_gguf.records.files import SCHEMA_VERSION, read_json, write_json
from lieq_gguf.records.spec import ModelSpec


@dataclass(frozen=True)
class QuantPlan:
    """What to write.

    Attributes:
        model: Name of the model.
        method: Name of the allocation method.
        scorer: Name of the layer score it used.
        budget: The target.
        reachable_bpw: Smallest and largest ``layer_bpw`` that the offered types can reach.
        types: Tensor name to type name, for every tensor.
        layer_scores: The score of each layer.
        profile: What the file is made for.
        error_feedback: Whether to write the file with error feedback; the types were chosen for that.
        expected_kld: Predicted divergence from the model's next-token distribution, in nats, or None.
    """

    model: str
    method: str
    scorer: str
    budget: BitBudget
    reachable_bpw: tuple[float, float]
    types: Mapping[str, str]
    layer_scores: tuple[float, ...]
    profile: str = "quality"
    error_feedback: bool = False
    expected_kld: float | None = None

    def check(self, spec: ModelSpec) -> None:
        """Require a type that fits for every tensor of the model.

        Raises:
            FormatError: naming a tensor that has no type, or whose type does not fit.
        """
        names = {t.name for t in spec.tensors}
        for name in sorted(names ^ set(self.types)):
            where = f"{spec.name} has no such tensor" if name in self.types else "the plan has no type for it"
            raise FormatError(
                f"the plan for {self.model} does not belong to {spec.name}: {name}: {where}; make a plan of {spec.name}"
            )
        if len(self.layer_scores) not in (0, spec.n_layers):
            raise FormatError(
                f"the plan for {self.model} has {len(self.layer_scores)} layer_scores; {spec.name} has {spec.n_layers} "
                "layers: make it again"
            )
        for tensor in spec.tensors:
            quant_type = QUANT_TYPES[self.types[tensor.name]]
            if quant_type.needs_imatrix and tensor.layer is None:
                raise FormatError(
                    f"the plan gives {tensor.name} the type {quant_type.name}, which needs an importance matrix; "
                    "embedding and output matrix may lack one: choose another type"
                )
            if not quant_type.fits(tensor.shape[-1]) or (
                not tensor.is_matrix and quant_type.is_quantized and quant_type.name != tensor.fixed_type
            ):
                raise FormatError(
                    f"the plan gives {tensor.name} of shape {tensor.shape} the type {quant_type.name}, which does not "
                    "fit; choose a type whose blocks divide the row, and F32 for vectors"
                )

    @property
    def needs_imatrix(self) -> bool:
        """Whether any tensor has a type that is useless without an importance matrix."""
        return any(QUANT_TYPES[name].needs_imatrix for name in self.types.values())

    def to_json(self) -> dict[str, Any]:
        """The document of a plan file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "plan",
            "model": self.model,
            "method": self.method,
            "scorer": self.scorer,
            "profile": self.profile,
            "refine": "feedback" if self.error_feedback else "none",
            "expected_kld": self.expected_kld,
            "target": {"kind": self.budget.kind, "value": self.budget.value},
            "reachable": {"min_layer_bpw": self.reachable_bpw[0], "max_layer_bpw": self.reachable_bpw[1]},
            "layer_scores": list(self.layer_scores),
            "types": dict(self.types),
        }

    def tensor_type_lines(self, spec: ModelSpec) -> str:
        """Lines for ``llama-quantize --tensor-type-file``, one per matrix.

        llama-quantize searches names for its patterns, so each is anchored and escaped. Its options
        ``--token-embedding-type`` and ``--output-tensor-type`` take precedence over these lines.
        """
        return "".join(f"^{re.escape(t.name)}$={self.types[t.name]}\n" for t in spec.tensors if t.is_matrix)

    def save(self, target: Path, figures: Mapping[str, Any]) -> None:
        """Write the plan and, for people, the bit meter's ``figures``."""
        write_json(target, self.to_json() | dict(figures))

    @classmethod
    def load(cls, file: Path) -> QuantPlan:
        """Read a file of ``save``; its types may have been edited by hand.

        Raises:
            FormatError: if the file is not a complete plan or names an unknown type.
        """
        document = read_json(file, "plan")
        try:
            kind = document["target"]["kind"]
            if kind not in get_args(BudgetKind):
                raise FormatError(f"{file} has a target of kind '{kind}'; expected {', '.join(get_args(BudgetKind))}")
            kld = document.get("expected_kld")
            plan = cls(
                model=str(document["model"]),
                method=str(document["method"]),
                scorer=str(document["scorer"]),
                budget=BitBudget(kind, float(document["target"]["value"])),
                reachable_bpw=(
                    float(document["reachable"]["min_layer_bpw"]),
                    float(document["reachable"]["max_layer_bpw"]),
                ),
                types={str(name): str(t).upper() for name, t in document["types"].items()},
                layer_scores=tuple(float(s) for s in document["layer_scores"]),
                profile=str(document.get("profile", "quality")),
                error_feedback=_error_feedback(document.get("refine", "feedback"), file),
                expected_kld=None if kld is None else float(kld),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"{file} is not a complete plan ({type(error).__name__}: {error}); make it again"
            ) from None
        for name, quant_type in plan.types.items():
            if quant_type not in QUANT_TYPES:
                raise FormatError(
                    f"{file} gives {name} the unknown type {quant_type}; the types are {', '.join(QUANT_TYPES)}"
                )
        return plan


def quantizes_layers(types: Mapping[str, str], spec: ModelSpec) -> bool:
    """Whether any matrix of the layers has a type with blocks, so that importance matters."""
    return any(QUANT_TYPES[types[t.name]].is_quantized for layer in spec.layer_matrices for t in layer)


def _error_feedback(name: object, file: Path) -> bool:
    if name not in ("feedback", "none"):
        raise FormatError(f"{file} has refine '{name}'; expected feedback or none")
    return name == "feedback"

"""How llama.cpp names the tensors of each model family. One family, one file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lieq_gguf.architectures.decoder import Decoder
from lieq_gguf.architectures.falcon_h1 import FalconH1
from lieq_gguf.architectures.gemma2 import Gemma2
from lieq_gguf.architectures.gemma3 import Gemma3
from lieq_gguf.architectures.granite import Granite
from lieq_gguf.architectures.granite_hybrid import GraniteHybrid, GraniteWithoutMamba
from lieq_gguf.architectures.lfm2 import Lfm2
from lieq_gguf.architectures.lfm2moe import Lfm2Moe
from lieq_gguf.architectures.llama import Llama
from lieq_gguf.architectures.nemotron_h import NemotronH, NemotronHMoe
from lieq_gguf.architectures.olmo2 import Olmo2
from lieq_gguf.architectures.phi3 import Phi3
from lieq_gguf.architectures.qwen2 import Qwen2
from lieq_gguf.architectures.qwen3 import Qwen3
from lieq_gguf.architectures.qwen3moe import Qwen3Moe
from lieq_gguf.architectures.qwen35 import Qwen35
from lieq_gguf.architectures.qwen35moe import Qwen35Moe
from lieq_gguf.architectures.smollm3 import SmolLM3
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.errors import ArchitectureError

__all__ = ["FAMILIES", "Decoder", "StoredParameters", "family_named", "find_family"]

FAMILIES: tuple[Decoder, ...] = (
    Llama(), Qwen2(), Qwen3(), Qwen3Moe(), Gemma2(), Gemma3(), Phi3(), SmolLM3(), Olmo2(), Granite(), Lfm2(),
    Qwen35(), GraniteHybrid(), GraniteWithoutMamba(), FalconH1(),
    NemotronH(), NemotronHMoe(), Lfm2Moe(), Qwen35Moe(),
)  # fmt: skip
_SOURCE_CLASSES = dict.fromkeys(name for family in FAMILIES for name in family.source_classes)


def find_family(config: Mapping[str, Any]) -> Decoder:
    """The family of a ``config.json``.

    Raises:
        ArchitectureError: if the architecture is not supported, naming those that are.
    """
    given = config.get("architectures") or []
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    for name in names:
        for family in FAMILIES:
            if name in family.source_classes and family.has_model(config):
                return family
    architecture = ", ".join(names) or f"model_type {config.get('model_type', 'missing')}"
    raise ArchitectureError(
        f"unsupported architecture {architecture}; supported architectures: {', '.join(_SOURCE_CLASSES)}"
    )


def family_named(gguf_name: str, keys: Collection[str] = ()) -> Decoder | None:
    """The family with llama.cpp's name of the architecture, or None if it is not supported.

    Args:
        gguf_name: The name.
        keys: Keys of the file, without the name, if it is to be told from other families of the same name.
    """
    return next((f for f in FAMILIES if f.gguf_name == gguf_name and f.has_file(keys)), None)

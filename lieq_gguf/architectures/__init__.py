"""How llama.cpp names the tensors of each model family. One family, one file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

from lieq_gguf.architectures.apertus import Apertus
from lieq_gguf.architectures.arcee import Arcee
from lieq_gguf.architectures.decoder import MTP_KEPT, Decoder
from lieq_gguf.architectures.ernie4_5 import Ernie45
from lieq_gguf.architectures.exaone4 import Exaone4
from lieq_gguf.architectures.falcon_h1 import FalconH1
from lieq_gguf.architectures.gemma2 import Gemma2
from lieq_gguf.architectures.gemma3 import Gemma3
from lieq_gguf.architectures.gemma4 import Gemma4
from lieq_gguf.architectures.gemma4moe import Gemma4Moe
from lieq_gguf.architectures.glm import Glm
from lieq_gguf.architectures.glm4 import Glm4
from lieq_gguf.architectures.gpt_oss import GptOss
from lieq_gguf.architectures.granite import Granite
from lieq_gguf.architectures.granite_hybrid import GraniteHybrid, GraniteWithoutMamba
from lieq_gguf.architectures.granite_swa import GraniteSwa
from lieq_gguf.architectures.hunyuan_dense import HunyuanDense
from lieq_gguf.architectures.lfm2 import Lfm2
from lieq_gguf.architectures.lfm2moe import Lfm2Moe
from lieq_gguf.architectures.llama import Llama
from lieq_gguf.architectures.minicpm3 import MiniCpm3
from lieq_gguf.architectures.ministral3 import Ministral3
from lieq_gguf.architectures.nemotron_h import NemotronH, NemotronHMoe
from lieq_gguf.architectures.olmo2 import Olmo2
from lieq_gguf.architectures.phi3 import Phi3
from lieq_gguf.architectures.qwen2 import Qwen2
from lieq_gguf.architectures.qwen3 import Qwen3
from lieq_gguf.architectures.qwen3moe import Qwen3Moe
from lieq_gguf.architectures.qwen3vl import Qwen3Vl
from lieq_gguf.architectures.qwen35 import Qwen35
from lieq_gguf.architectures.qwen35moe import Qwen35Moe
from lieq_gguf.architectures.seed_oss import SeedOss
from lieq_gguf.architectures.smollm3 import SmolLM3
from lieq_gguf.architectures.stored_parameters import StoredParameters
from lieq_gguf.architectures.wrappers import is_wrapper, language_model_config
from lieq_gguf.errors import ArchitectureError

__all__ = [
    "FAMILIES", "MTP_KEPT", "Decoder", "StoredParameters", "family_named", "find_family", "is_wrapper",
    "language_model_config",
]  # fmt: skip

FAMILIES: tuple[Decoder, ...] = (
    Llama(), Qwen2(), Qwen3(), Qwen3Moe(), Gemma2(), Gemma3(), Phi3(), SmolLM3(), Olmo2(), Granite(), Lfm2(),
    Qwen35(), Ministral3(), Gemma4(), Exaone4(), Ernie45(), Arcee(), SeedOss(), HunyuanDense(), Glm4(), Glm(),
    Apertus(), GraniteSwa(), MiniCpm3(), Qwen3Vl(), GraniteHybrid(), GraniteWithoutMamba(), FalconH1(), NemotronH(),
    NemotronHMoe(), Lfm2Moe(), Qwen35Moe(), GptOss(), Gemma4Moe(),
)  # fmt: skip
_SIMILAR = 0.6  # of 1: qwen2moe and qwen2 are, mamba and gemma2 are not
_SOURCE_CLASSES = dict.fromkeys(name for family in FAMILIES for name in family.source_classes)


def find_family(config: Mapping[str, Any]) -> Decoder:
    """The family of a ``config.json``.

    Raises:
        ArchitectureError: if the architecture is not supported, naming at most two that resemble it and the way out.
    """
    given = config.get("architectures") or []
    names = [str(name) for name in (given if isinstance(given, list) else [given])]
    for name in names:
        for family in FAMILIES:
            if name in family.source_classes and family.has_model(config):
                return family
    architecture = ", ".join(names) or f"model_type {config.get('model_type', 'missing')}"
    raise ArchitectureError(
        f"unsupported architecture {architecture}{_resemblance(names, config)}; make an F16 GGUF of it with "
        "llama.cpp's converter (convert_hf_to_gguf.py --outtype f16) and give that file instead of the directory; "
        "docs/models.md lists the supported architectures"
    )


def _resemblance(names: Sequence[str], config: Mapping[str, Any]) -> str:
    """The supported families with similar names, otherwise the first whose keys config.json has; empty for none."""
    given = {_stem(name) for name in (*names, config.get("model_type")) if isinstance(name, str)}
    similarity = {
        own: max((SequenceMatcher(None, name, _stem(own)).ratio() for name in given), default=0.0)
        for own in _SOURCE_CLASSES
    }
    similar = sorted((own for own in similarity if similarity[own] >= _SIMILAR), key=lambda own: -similarity[own])
    if similar:
        return f", which resembles {' and '.join(similar[:2])} by name"
    fitting = next((family for family in FAMILIES if _fits(family, config)), None)
    return "" if fitting is None else f", whose config.json has what {fitting.source_classes[0]} needs"


def _stem(name: str) -> str:
    """What of a class or model type tells the family."""
    return re.sub(r"for\w+$|lmheadmodel$|model$|[\W_]", "", name.lower())


def _fits(family: Decoder, config: Mapping[str, Any]) -> bool:
    try:
        family.check(config)
    except (ArchitectureError, AttributeError, KeyError, TypeError, ValueError):
        return False
    return True


def family_named(gguf_name: str, keys: Collection[str] = ()) -> Decoder | None:
    """The family with llama.cpp's name of the architecture, or None if it is not supported.

    Args:
        gguf_name: The name.
        keys: Keys of the file, without the name, if it is to be told from other families of the same name.
    """
    return next((f for f in FAMILIES if f.gguf_name == gguf_name and f.has_file(keys)), None)

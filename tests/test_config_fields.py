"""A field of ``config.json`` that changes what transformers computes is told by the file, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY_MODELS
from transformers import AutoConfig, AutoModelForCausalLM

from lieq_gguf.errors import LieqError
from lieq_gguf.measure.base_model import without_time_limits
from lieq_gguf.sources.model_directory import ModelDirectory

ONE_OF_EACH_FAMILY = list(
    {(tiny.family, tiny.model_type, tiny.has_experts): name for name, tiny in TINY_MODELS.items()}.values()
)
# llama.cpp computes no such window, which a warning says; of tied matrices, the files decide
TOLD_OTHERWISE = ("sliding_window", "use_sliding_window", "tie_word_embeddings", "use_cache")


def other_values(key: str, value: Any) -> Iterator[Any]:
    """Values that differ from one in ``config.json``, as another model could have them."""
    if key.endswith("token_id") or key in TOLD_OTHERWISE:  # ids are compared with the tokenizer
        return
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield value * 2 or 2
    elif isinstance(value, float):
        yield value * 1.5 + 0.25
    elif isinstance(value, str):
        yield "relu"
    elif value is None:
        yield from (2, 0.5, True)


def described(path: Path) -> Any:
    """What a file would say of the model, without its weights, but with the factors that are put into them."""
    source = ModelDirectory(path)
    computed = [source.read(t).tolist() for t in source.spec.tensors if t.source_name is None]
    names = [name for tensor in source.spec.tensors for name in tensor.source_names]
    factors = [source.family.factors(source.spec.config, name) for name in names]
    return source.read_metadata().values, source.spec.tensors, computed, factors, source.warnings


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_no_field_that_counts_is_overlooked(name: str, tmp_path: Path) -> None:
    path = TINY_MODELS[name].write(tmp_path / "model")
    file = path / "config.json"
    intact = json.loads(file.read_text(encoding="utf-8"))
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    without_time_limits(model)  # which are transformers' own
    ids = torch.arange(8, 72)[None]
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
    before = described(path)
    overlooked, n_told = [], 0
    for key, value in (config.to_dict() | intact).items():
        for other in other_values(key, value):
            file.write_text(json.dumps(intact | {key: other}), encoding="utf-8")
            try:
                if described(path) != before:
                    n_told += 1
                    continue
            except LieqError:
                n_told += 1
                continue
            try:
                settings = AutoConfig.from_pretrained(path)
                changed = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)  # type: ignore[no-untyped-call]
                changed.load_state_dict(model.state_dict())
                without_time_limits(changed)
                with torch.inference_mode():
                    found = changed.eval()(ids, use_cache=False).logits
            except Exception:  # transformers does not take the value either
                continue
            if not torch.allclose(found, expected, atol=1e-4 * float(expected.std())):
                overlooked.append((key, other))
    assert overlooked == []
    assert n_told > 10

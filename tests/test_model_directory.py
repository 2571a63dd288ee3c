import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import LLAMA_3_ROPE
from support.models import write_model
from support.requests import convert_plainly
from support.tokenizer_fixtures import write_smollm2
from support.tolerances import F16_LOGITS, assert_logits_close, distance
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lieq_gguf.architectures import FAMILIES, find_family
from lieq_gguf.errors import ArchitectureError
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.sources.model_directory import ModelDirectory

N_TEST_TOKENS = 100
SIZES = {
    "block_count": 3,
    "context_length": 1024,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 64,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


def write_mistral(path: Path) -> Path:
    """As write_model, of Mistral's class."""
    path.mkdir(parents=True)
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=write_smollm2(path),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.05,
        bos_token_id=1,
        eos_token_id=2,
    )
    MistralForCausalLM(config).bfloat16().save_pretrained(path)
    return path


def write_biased(path: Path) -> Path:
    """With biases that are not zero, as a fresh model's are, at all linear modules."""
    write_model(path, attention_bias=True, mlp_bias=True)
    weights = load_file(path / "model.safetensors")
    torch.manual_seed(4)
    for name, weight in weights.items():
        if name.endswith(".bias"):
            weight.normal_(0, 0.5)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_old_config(path: Path) -> Path:
    """Rotary parameters as transformers before 5 wrote them, no head_dim, no dtype, no key-value heads."""
    write_model(path, num_key_value_heads=4, rope_parameters=LLAMA_3_ROPE)
    config = json.loads((path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    for key in ("head_dim", "dtype", "num_key_value_heads"):
        del config[key]
    (path / "config.json").write_text(json.dumps(config))
    return path


VARIANTS: dict[str, Callable[[Path], Path]] = {
    "tied": write_model,
    "untied": lambda path: write_model(path, tie_word_embeddings=False),
    "f16": lambda path: write_model(path, dtype=torch.float16),
    "f32": lambda path: write_model(path, dtype=torch.float32),
    "shards": lambda path: write_model(path, max_shard_size="1MB"),
    "head_dim": lambda path: write_model(path, head_dim=96),
    "one key-value head": lambda path: write_model(path, num_key_value_heads=1),
    "biases": write_biased,
    "mistral": write_mistral,
    "llama3 rope": lambda path: write_model(path, rope_parameters=LLAMA_3_ROPE),
    "linear rope": lambda path: write_model(path, rope_parameters=LINEAR_ROPE),
    "yarn rope": lambda path: write_model(path, rope_parameters=YARN_ROPE),
    "old config": write_old_config,
}
EVERY_VARIANT = pytest.mark.parametrize("converted", VARIANTS, indirect=True)


def variants(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("converted", names, indirect=True)


@dataclass(frozen=True)
class Converted:
    """A model directory and the F16 GGUF made from it."""

    source: Path
    file: Path

    def metadata(self) -> dict[str, Any]:
        return {name: field.contents() for name, field in gguf.GGUFReader(self.file).fields.items()}


def convert_to_f16(source: Path) -> Path:
    return convert_plainly(source, source.parent / "f16.gguf")


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    done: dict[str, Converted] = {}

    def convert_once(name: str) -> Converted:
        if name not in done:
            source = VARIANTS[name](tmp_path_factory.mktemp("variants") / "model")
            done[name] = Converted(source, convert_to_f16(source))
        return done[name]

    return convert_once


@pytest.fixture
def converted(request: pytest.FixtureRequest, convert: Callable[[str], Converted]) -> Converted:
    return convert(request.param)


def reference_logits(source: Path, ids: list[int]) -> np.ndarray[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        logits: np.ndarray[Any, Any] = model(torch.tensor([ids])).logits[0].numpy()
    return logits


def logits_of_both(source: Path, file: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Of random tokens: llama.cpp's with the file, and transformers'."""
    config = json.loads((source / "config.json").read_text())
    ids = np.random.default_rng(5).integers(0, config["vocab_size"], N_TEST_TOKENS).tolist()
    reference = reference_logits(source, ids)
    with open_model(file, n_threads=2) as model:
        return model.logits(ids), reference


@EVERY_VARIANT
def test_logits_in_llama_cpp_are_those_of_transformers(converted: Converted) -> None:
    assert_logits_close(*logits_of_both(converted.source, converted.file), F16_LOGITS)


@pytest.mark.parametrize("name", ["llama3 rope", "linear rope", "yarn rope"])
def test_logits_differ_with_another_rotation(name: str, convert: Callable[[str], Converted]) -> None:
    # The weights are those of the model without scaling, so only the rotation tells the two apart.
    assert distance(*logits_of_both(convert("tied").source, convert(name).file)).max() > 10 * F16_LOGITS


def test_yarn_with_its_own_blending_is_refused_or_carried_over(tmp_path: Path) -> None:
    rope = YARN_ROPE | {"beta_fast": 4.0, "beta_slow": 2.0, "attention_factor": 1.5}
    source = write_model(tmp_path / "model", rope_parameters=rope)
    try:
        file = convert_to_f16(source)
    except ArchitectureError:
        return
    assert_logits_close(*logits_of_both(source, file), F16_LOGITS)


@variants("llama3 rope")
def test_rope_freqs_are_the_slowing_down_of_transformers(converted: Converted) -> None:
    config = AutoConfig.from_pretrained(converted.source, local_files_only=True)
    slowed, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    plain = 1 / config.rope_parameters["rope_theta"] ** exponents
    assert attention_factor == 1.0
    written = next(t for t in gguf.GGUFReader(converted.file).tensors if t.name == "rope_freqs.weight")
    assert written.tensor_type == gguf.GGMLQuantizationType.F32
    np.testing.assert_allclose(written.data, (plain / slowed).numpy(), rtol=1e-5)
    assert written.data[0] == 1.0
    assert written.data[-1] == np.float32(8.0)
    assert np.unique(written.data).size > 2  # some are blended


@variants("tied", "untied", "linear rope", "yarn rope", "mistral")
def test_rope_freqs_are_for_llama_3_only(converted: Converted) -> None:
    assert "rope_freqs.weight" not in {t.name for t in gguf.GGUFReader(converted.file).tensors}


@variants("linear rope")
def test_keys_of_linear_rope(converted: Converted) -> None:
    keys = converted.metadata()
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 4.0)


@variants("yarn rope")
def test_keys_of_yarn_rope(converted: Converted) -> None:
    keys = converted.metadata()
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("yarn", 4.0)
    assert keys["llama.rope.scaling.original_context_length"] == 32


@variants("tied", "llama3 rope")
def test_no_key_scales_the_rotation_otherwise(converted: Converted) -> None:
    assert not [key for key in converted.metadata() if key.startswith("llama.rope.scaling")]


@variants("llama3 rope", "old config")
def test_rope_theta_is_found_in_new_and_old_configurations(converted: Converted) -> None:
    assert converted.metadata()["llama.rope.freq_base"] == 500000.0


@variants("head_dim")
def test_keys_of_an_explicit_head_dim(converted: Converted) -> None:
    keys = converted.metadata()
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    assert [keys[f"llama.{name}"] for name in names] == [96, 96, 96]


@variants("tied")
def test_keys_of_the_sizes(converted: Converted) -> None:
    keys = converted.metadata()
    assert {name: keys[f"llama.{name}"] for name in SIZES} == SIZES
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert keys["llama.vocab_size"] == len(keys["tokenizer.ggml.tokens"])


@variants("mistral")
def test_mistral_is_a_llama_to_llama_cpp(converted: Converted) -> None:
    assert converted.metadata()["general.architecture"] == "llama"


@variants("biases")
def test_biases_are_carried_over(converted: Converted) -> None:
    biases = {t.name: t for t in gguf.GGUFReader(converted.file).tensors if t.name.endswith(".bias")}
    roles = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert set(biases) == {f"blk.{layer}.{role}.bias" for layer in range(3) for role in roles}
    assert {t.tensor_type.name for t in biases.values()} == {"F32"}


@pytest.mark.parametrize(("name", "has_output"), [("tied", False), ("untied", True)])
def test_output_matrix_is_there_when_embeddings_are_untied(
    name: str, has_output: bool, convert: Callable[[str], Converted]
) -> None:
    spec = ModelDirectory(convert(name).source).spec
    assert spec.has_tied_embeddings is not has_output
    assert ("output.weight" in {t.name for t in spec.tensors}) is has_output


def test_shards_make_the_same_spec_as_a_single_file(convert: Callable[[str], Converted]) -> None:
    sharded = convert("shards").source
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert ModelDirectory(sharded).spec == ModelDirectory(convert("tied").source).spec


def test_shards_make_the_same_file_as_a_single_file(convert: Callable[[str], Converted]) -> None:
    assert convert("shards").file.read_bytes() == convert("tied").file.read_bytes()


@pytest.mark.parametrize("name", ["f16", "f32"])
def test_dtype_does_not_change_the_tensors(name: str, convert: Callable[[str], Converted]) -> None:
    tensors = ModelDirectory(convert("tied").source).spec.tensors
    assert ModelDirectory(convert(name).source).spec.tensors == tensors


@variants("tied", "f16", "f32", "shards")
def test_tensors_are_read_as_they_are_stored(converted: Converted) -> None:
    stored = {n: w for shard in converted.source.glob("*.safetensors") for n, w in load_file(shard).items()}
    source = ModelDirectory(converted.source)
    read = {str(t.source_name): source.read(t) for t in source.spec.tensors}
    assert read.keys() == stored.keys()
    assert all(read[n].dtype == stored[n].dtype and torch.equal(read[n], stored[n]) for n in stored)


@EVERY_VARIANT
def test_weights_are_counted_as_transformers_counts_them(converted: Converted) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted.source, local_files_only=True)
    assert ModelDirectory(converted.source).spec.n_weights == sum(p.numel() for p in model.parameters())


def test_spec_needs_neither_torch_nor_transformers(convert: Callable[[str], Converted]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from lieq_gguf.sources.model_directory import ModelDirectory\n"
        "spec = ModelDirectory(Path(sys.argv[1])).spec\n"
        "print(len(spec.tensors), [m for m in ('torch', 'transformers', 'llama_cpp') if m in sys.modules])"
    )
    source = convert("llama3 rope").source
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, source], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert (done.stdout.strip(), done.stderr) == ("30 []", "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su"}}, "rope type 'su'"),
        ({"architectures": ["GPT2LMHeadModel"]}, "unsupported architecture GPT2LMHeadModel"),
        ({"architectures": None, "model_type": "qwen3"}, "model_type qwen3"),
    ],
)
def test_refuses_what_the_graph_does_not_compute(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    source = write_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArchitectureError, match=words):
        ModelDirectory(source)


LLAMA_KEYS = {
    "hidden_size": 64, "intermediate_size": 128, "max_position_embeddings": 64, "num_attention_heads": 2,
    "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "vocab_size": 100,
}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "config", "resemblance"),
    [
        (["Qwen3TurboForCausalLM"], {}, ", which resembles Qwen3"),
        (["Zz9ForCausalLM"], {"model_type": "gemma_2"}, ", which resembles Gemma2ForCausalLM and Gemma"),
        (["Zz9ForCausalLM"], {"model_type": "zz9"}, ";"),
        (["Zz9ForCausalLM"], LLAMA_KEYS, ", whose config.json has what LlamaForCausalLM needs;"),
        (["Zz9ForCausalLM"], LLAMA_KEYS | {"rms_norm_eps": []}, ";"),
        ([{}], {"model_type": []}, ";"),
    ],
)
def test_an_unknown_family(names: list[Any], config: dict[str, Any], resemblance: str) -> None:
    with pytest.raises(ArchitectureError) as caught:
        find_family({"architectures": names, **config})
    message = str(caught.value)
    assert message.startswith(f"unsupported architecture {names[0]}{resemblance}")
    assert "convert_hf_to_gguf.py --outtype f16" in message and "docs/models.md" in message
    assert "\n" not in message
    words = re.findall(r"\w+", message)
    assert sum(name in words for family in FAMILIES for name in family.source_classes) <= 2

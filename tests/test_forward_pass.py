from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import write_model
from support.tokenizer_fixtures import write_llama_3
from support.tolerances import BFLOAT16_SUMS, FLOAT32_LOGITS, FLOAT32_SUMS, assert_logits_close
from support.whole_model import MODULES, OuterReference, WholeModel, lieq_scores
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from lieq_gguf.errors import CalibrationError
from lieq_gguf.measure import layer_model
from lieq_gguf.measure.forward_pass import run_pass
from lieq_gguf.measure.output_head import OutputHead
from lieq_gguf.measure.passes import PassOptions, PassResult
from lieq_gguf.measure.text import (
    CHUNK_SIZE,
    SHIPPED_TEXT,
    CalibrationText,
    CalibrationTokens,
    read_calibration_texts,
    tokenize,
)
from lieq_gguf.measure.type_errors import probe_matrix, relative_errors
from lieq_gguf.quant_types import QUANT_TYPES, QuantType
from lieq_gguf.records.importance import ImportanceMatrix
from lieq_gguf.records.measurement import STATISTICS, measured
from lieq_gguf.records.options import ComputeOptions
from lieq_gguf.records.spec import TensorSpec
from lieq_gguf.scorers import lieq
from lieq_gguf.sources.model_directory import ModelDirectory
from lieq_gguf.tokenizers import load_source_tokenizer

N_SCORE_TOKENS = 256
EXACT = ComputeOptions(n_threads=1, in_float32=True)


def random_tokens(n_vocab: int, shape: tuple[int, int] = (5, 512)) -> CalibrationTokens:
    """By default more tokens than pass a layer at once."""
    return CalibrationTokens(np.random.default_rng(0).integers(0, n_vocab, shape), "random")


def run(model_dir: Path, tokens: CalibrationTokens | None = None, seed: int = 0) -> PassResult:
    source = ModelDirectory(model_dir)
    tokens = tokens or random_tokens(source.spec.config["vocab_size"])
    return run_pass(source, tokens, PassOptions(n_score_tokens=N_SCORE_TOKENS, seed=seed, compute=EXACT))


def errors_of(
    source: ModelDirectory, tensor: TensorSpec, mean: npt.NDArray[np.float32] | None, types: Sequence[QuantType]
) -> dict[str, float]:
    return relative_errors([probe_matrix(source.read(tensor).float().numpy(), mean)], types)[0]


def small_tokens(model_dir: Path) -> CalibrationTokens:
    return random_tokens(ModelDirectory(model_dir).spec.config["vocab_size"], (2, 64))


@pytest.fixture(scope="module")
def streamed(tiny_model: Path) -> PassResult:
    return run(tiny_model)


def write_model_with_biases(path: Path) -> Path:
    write_model(path, attention_bias=True, num_hidden_layers=2)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if name.endswith("bias"):  # transformers starts them at zero
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


def write_shards(path: Path) -> Path:
    write_model(path, max_shard_size="1MB", dtype=torch.float16, num_hidden_layers=2)
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@dataclass(frozen=True)
class Pair:
    streamed: PassResult
    whole: WholeModel


@pytest.fixture(scope="module", params=["tiny", "biases", "shards"])
def pair(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The streamed pass and the whole model on the same tokens."""
    writers = {"biases": write_model_with_biases, "shards": write_shards}
    path = writers[request.param](tmp_path_factory.mktemp("pair")) if request.param in writers else tiny_model
    ids = random_tokens(ModelDirectory(path).spec.config["vocab_size"]).ids
    return Pair(run(path), WholeModel(path, ids))


def test_cosines_are_those_of_the_whole_model(pair: Pair) -> None:
    cosines = [measured(m.cosine) for m in pair.streamed.measurements]
    np.testing.assert_allclose(cosines, [pair.whole.cosine(layer) for layer in range(pair.whole.n_layers)], atol=1e-5)


def test_importance_is_the_squared_input_of_the_whole_model(pair: Pair) -> None:
    expected = pair.whole.input_sums()
    assert pair.streamed.importance.in_sum2.keys() == expected.keys()
    for name, sums in pair.streamed.importance.in_sum2.items():
        np.testing.assert_allclose(sums, expected[name], rtol=FLOAT32_SUMS, err_msg=name)


def assert_spectra_close(found: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> None:
    """Of projections in float32: the smallest shares come from values that are rounded at the size of the largest."""
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-7)


def test_spectra_are_those_of_the_whole_models_projections(pair: Pair) -> None:
    for m in pair.streamed.measurements:
        assert measured(m.spectra).keys() == measured(m.twin_spectra).keys() == MODULES.keys()
        for role, spectrum in measured(m.spectra).items():
            expected = pair.whole.spectrum(f"blk.{m.layer}.{role}.weight")
            assert_spectra_close(spectrum, expected)


def test_z_shares_are_those_of_the_files_weights(streamed: PassResult, tiny_model: Path) -> None:
    tensors = load_file(tiny_model / "model.safetensors")
    for m in streamed.measurements:
        names = [f"model.layers.{m.layer}.{module}.weight" for module in MODULES.values()]
        pooled = np.concatenate([tensors[name].double().numpy().ravel() for name in names])
        share = float((pooled > pooled.mean() + pooled.std()).mean())
        assert m.z_share == pytest.approx(share, abs=1e-6)


def test_importance_knows_how_many_tokens_it_saw(streamed: PassResult) -> None:
    matrix = streamed.importance
    assert (matrix.n_tokens, matrix.n_chunks, matrix.chunk_size, matrix.dataset) == (2560, 5, 512, "random")


def test_same_seed_gives_the_same_twin(streamed: PassResult, tiny_model: Path) -> None:
    again = run(tiny_model)
    for first, second in zip(streamed.measurements, again.measurements, strict=True):
        for role, spectrum in measured(first.twin_spectra).items():
            np.testing.assert_array_equal(spectrum, measured(second.twin_spectra)[role])


def test_another_seed_changes_the_twin_alone(streamed: PassResult, tiny_model: Path) -> None:
    other = run(tiny_model, seed=1)
    for first, second in zip(streamed.measurements, other.measurements, strict=True):
        for role, spectrum in measured(first.twin_spectra).items():
            assert not np.allclose(spectrum, measured(second.twin_spectra)[role], rtol=1e-3)
            np.testing.assert_array_equal(measured(first.spectra)[role], measured(second.spectra)[role])


def test_the_twin_is_not_the_trained_model(streamed: PassResult) -> None:
    for m in streamed.measurements:
        for role, spectrum in measured(m.spectra).items():
            assert not np.allclose(spectrum, measured(m.twin_spectra)[role], rtol=1e-3)


@pytest.mark.parametrize("initializer_range", [0.05, 0.005])
def test_twin_has_the_initialisers_weights(tmp_path: Path, initializer_range: float) -> None:
    config = ModelDirectory(write_model(tmp_path, initializer_range=initializer_range)).transformers_config()
    twin = layer_model.LayerModel(config, torch.device("cpu"))
    twin.initialise(3, 0)
    for module in MODULES.values():
        weight = twin.weight(module)
        standard_error = initializer_range / weight.numel() ** 0.5
        assert float(weight.mean()) == pytest.approx(0, abs=5 * standard_error)
        assert float(weight.std()) == pytest.approx(initializer_range, rel=0.02)


def test_layers_of_the_twin_differ(tiny_model: Path) -> None:
    config = ModelDirectory(tiny_model).transformers_config()
    twin = layer_model.LayerModel(config, torch.device("cpu"))
    weights = []
    for seed in (1, 2, 1):
        twin.initialise(seed, 0)
        weights.append(twin.weight("mlp.up_proj").clone())
    assert not torch.allclose(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_the_callers_random_numbers_are_left_alone(tiny_model: Path) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(tiny_model, small_tokens(tiny_model))
    assert torch.equal(torch.get_rng_state(), before)


def test_result_does_not_depend_on_threads(tiny_model: Path) -> None:
    source = ModelDirectory(tiny_model)
    tokens = random_tokens(source.spec.config["vocab_size"])
    one, two = (
        run_pass(source, tokens, PassOptions(n_score_tokens=64, compute=ComputeOptions(n_threads=n, in_float32=True)))
        for n in (1, 2)
    )
    for name, sums in one.importance.in_sum2.items():
        np.testing.assert_allclose(two.importance.in_sum2[name], sums, rtol=FLOAT32_SUMS)
    for first, second in zip(one.measurements, two.measurements, strict=True):
        assert second.cosine == pytest.approx(first.cosine, rel=FLOAT32_SUMS)
        for role, spectrum in measured(first.spectra).items():
            assert_spectra_close(measured(second.spectra)[role], spectrum)


def test_importance_alone_is_the_same_and_measures_nothing(streamed: PassResult, tiny_model: Path) -> None:
    source = ModelDirectory(tiny_model)
    alone = run_pass(
        source, random_tokens(source.spec.config["vocab_size"]), PassOptions(statistics=frozenset(), compute=EXACT)
    )
    assert alone.measurements == ()
    for name, sums in streamed.importance.in_sum2.items():
        np.testing.assert_array_equal(alone.importance.in_sum2[name], sums)


def test_type_errors_are_weighted_by_the_importance_of_the_pass(tiny_model: Path) -> None:
    source, types = ModelDirectory(tiny_model), [QUANT_TYPES["Q2_K"], QUANT_TYPES["Q4_K"]]
    result = run_pass(source, small_tokens(tiny_model), PassOptions(statistics=frozenset(), error_types=tuple(types)))
    for tensor in (t for layer in source.spec.layer_matrices for t in layer):
        mean = result.importance.mean(tensor.name)
        assert result.type_errors[tensor.name] == errors_of(source, tensor, mean, types)


def test_type_errors_are_weighted_by_a_given_importance_matrix(tiny_model: Path) -> None:
    source, types = ModelDirectory(tiny_model), [QUANT_TYPES["Q2_K"]]
    matrices = [t for layer in source.spec.layer_matrices for t in layer]
    numbers = np.random.default_rng(0)
    sums = {t.name: numbers.lognormal(0, 3, t.shape[1]).astype(np.float32) for t in matrices}
    given = ImportanceMatrix(sums, 10, 10, "given")
    options = PassOptions(statistics=frozenset(), error_types=tuple(types), importance=given)
    result = run_pass(source, small_tokens(tiny_model), options)
    for tensor in matrices:
        assert result.type_errors[tensor.name] == errors_of(source, tensor, given.mean(tensor.name), types)


def test_type_errors_can_be_unweighted(tiny_model: Path) -> None:
    source, types = ModelDirectory(tiny_model), [QUANT_TYPES["Q2_K"]]
    options = PassOptions(statistics=frozenset(), error_types=tuple(types), weigh_errors=False)
    result = run_pass(source, small_tokens(tiny_model), options)
    for tensor in (t for layer in source.spec.layer_matrices for t in layer):
        assert result.type_errors[tensor.name] == errors_of(source, tensor, None, types)


def test_block_errors_are_those_of_the_whole_model(pair: Pair) -> None:
    for m in pair.streamed.measurements:
        assert measured(m.block_errors).keys() == MODULES.keys()
        for role in ("attn_v", "ffn_gate"):
            expected = pair.whole.block_error(m.layer, role, pair.streamed.importance)
            assert measured(m.block_errors)[role] == pytest.approx(expected, rel=1e-3), (m.layer, role)


def loaded_layer(path: Path) -> layer_model.LayerModel:
    layer = layer_model.LayerModel(ModelDirectory(path).transformers_config(), torch.device("cpu"))
    layer.load(ModelDirectory(path), 1)
    return layer


@torch.inference_mode()
def test_replayed_layer_gives_what_the_whole_layer_gives(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_model, "_BATCH_TOKENS", 128)  # several batches
    layer, generator = loaded_layer(tiny_model), torch.Generator().manual_seed(0)
    hidden = torch.randn((5, 64, 256), generator=generator)
    with layer.recording() as record:
        intact = layer.forward(hidden)
    for module in MODULES.values():
        weight = layer.weight(module) * 1.1
        with layer.replaced(module, weight):
            expected = layer.forward(hidden)
            with layer.replaying(record, until=module):
                replayed = layer.forward(hidden)
        assert torch.equal(replayed, expected), module
        assert not torch.equal(replayed, intact), module
    assert torch.equal(layer.forward(hidden), intact)  # nothing is left behind


@torch.inference_mode()
def test_rounded_weights_are_those_of_the_moment(tiny_model: Path) -> None:
    source, module = ModelDirectory(tiny_model), "mlp.down_proj"
    layer = layer_model.LayerModel(source.transformers_config(), torch.device("cpu"), in_bfloat16=True)
    hidden = torch.randn(2, 32, 256, generator=torch.Generator().manual_seed(0))
    layer.load(source, 0)
    first, doubled = layer.forward(hidden), 2 * layer.weight(module)
    with layer.replaced(module, doubled):
        changed = layer.forward(hidden)
    assert not torch.equal(first, changed)
    assert torch.equal(first, layer.forward(hidden))
    layer.assign(module, doubled)
    assert torch.equal(changed, layer.forward(hidden))
    layer.forget()
    layer.load(source, 0)
    for rows, output in layer.outputs(hidden):
        assert torch.equal(first[rows], output)
        assert not torch.is_autocast_enabled("cpu")  # what is done with the output is none of the layer's


@torch.inference_mode()
def test_replaying_runs_nothing_upstream(tiny_model: Path) -> None:
    layer, hidden = loaded_layer(tiny_model), torch.randn((2, 32, 256), generator=torch.Generator().manual_seed(0))
    with layer.recording() as record:
        intact = layer.forward(hidden)
    for upstream, module in pairwise(MODULES.values()):
        with layer.replaced(upstream, layer.weight(upstream) * float("nan")), layer.replaying(record, until=module):
            assert torch.equal(layer.forward(hidden), intact), module


def test_sensitivity_is_block_error_by_relative_error(streamed: PassResult, tiny_model: Path) -> None:
    source = ModelDirectory(tiny_model)
    for m, matrices in zip(streamed.measurements, source.spec.layer_matrices, strict=True):
        for tensor in matrices:
            weights = source.read(tensor).float().numpy()
            probe = probe_matrix(weights, streamed.importance.mean(tensor.name))
            expected = measured(m.block_errors)[tensor.role] / probe.relative_error
            assert streamed.sensitivities[tensor.name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_outer_sensitivities_are_those_of_whole_models(tmp_path: Path, tied: bool) -> None:
    path = write_model(tmp_path / "model", tie_word_embeddings=tied)
    tokens = random_tokens(ModelDirectory(path).spec.config["vocab_size"])
    found = run(path, tokens)
    wanted = OuterReference(path, tokens.ids, found.importance)
    of_decoder = sum(sum(measured(m.block_errors).values()) for m in found.measurements)
    assert found.kld_per_block_error == pytest.approx(wanted.decoder_kld / of_decoder, rel=1e-3)

    counts = np.bincount(tokens.ids.ravel())
    frequent = np.argsort(-counts, kind="stable")[:1024]
    assert found.kld_per_block_error is not None
    output = wanted.output_kld / found.kld_per_block_error
    damages = {"token_embd.weight": wanted.embedding_error, "output.weight": output}
    if tied:
        damages = {"token_embd.weight": wanted.embedding_error + output}
    source = ModelDirectory(path)
    for tensor in source.spec.outer_matrices:
        rows = source.read(tensor)[torch.from_numpy(frequent)].float().numpy()
        error = probe_matrix(rows, found.importance.mean(tensor.name)).relative_error
        assert found.sensitivities[tensor.name] * error == pytest.approx(damages.pop(tensor.name), rel=1e-3)
    assert not damages


def test_divergence_is_that_of_all_logits_at_once() -> None:
    numbers = torch.Generator().manual_seed(0)
    hidden, other = torch.randn(2, 3, 8, generator=numbers), torch.randn(2, 3, 8, generator=numbers)
    matrix = torch.randn(5000, 8, generator=numbers) * 4
    head = OutputHead(nn.Identity(), matrix, torch.device("cpu"))
    p, q, r = (torch.log_softmax(z.double() @ m.double().T, -1) for z, m in
               ((hidden, matrix), (other, matrix), (hidden, matrix * 0.9)))  # fmt: skip
    assert_logits_close(head.logits(hidden), hidden @ matrix.T, FLOAT32_LOGITS)
    assert head.divergence(hidden, other) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=FLOAT32_SUMS)
    changed = head.divergence(hidden, change=lambda rows: rows * 0.9)
    assert changed == pytest.approx(float((p.exp() * (p - r)).sum(-1).mean()), rel=FLOAT32_SUMS)
    assert head.divergence(hidden) == 0


def test_perplexity_drops_are_those_of_the_whole_model_without_a_layer(tiny_model: Path) -> None:
    source = ModelDirectory(tiny_model)
    tokens = random_tokens(source.spec.config["vocab_size"], (3, 64))
    result = run_pass(source, tokens, PassOptions(statistics=STATISTICS, n_damage_tokens=192, compute=EXACT))
    intact = perplexity_without(tiny_model, None, tokens.ids)
    for m in result.measurements:
        expected = perplexity_without(tiny_model, m.layer, tokens.ids) - intact
        assert m.perplexity_drop == pytest.approx(expected, rel=1e-3, abs=1e-3 * intact)


def perplexity_without(path: Path, layer: int | None, ids: npt.NDArray[np.int64]) -> float:
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32)
    if layer is not None:
        del model.model.layers[layer]
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids), use_cache=False).logits[:, :-1]
    targets = torch.from_numpy(ids[:, 1:]).reshape(-1)
    return float(nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets).exp())


def test_bfloat16_stays_within_a_percent(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelDirectory(tiny_model)
    tokens = random_tokens(source.spec.config["vocab_size"])
    options = PassOptions(n_score_tokens=N_SCORE_TOKENS)
    monkeypatch.setattr(layer_model, "has_fast_bfloat16", lambda _device: False)
    exact = run_pass(source, tokens, options)
    monkeypatch.setattr(layer_model, "has_fast_bfloat16", lambda _device: True)
    rounded = run_pass(source, tokens, options)
    assert any((exact.importance.in_sum2[n] != s).any() for n, s in rounded.importance.in_sum2.items())
    for name, sums in exact.importance.in_sum2.items():
        assert np.median(np.abs(rounded.importance.in_sum2[name] / sums - 1)) < BFLOAT16_SUMS
    for a, b in zip(exact.measurements, rounded.measurements, strict=True):
        assert b.cosine == pytest.approx(a.cosine, rel=BFLOAT16_SUMS)
        assert lieq.score([b]) == pytest.approx(lieq.score([a]), abs=5e-3)  # of random weights, so near nothing
        assert sum(measured(b.block_errors).values()) == pytest.approx(
            sum(measured(a.block_errors).values()), rel=BFLOAT16_SUMS
        )


def test_lieq_scores_are_those_of_two_whole_models(streamed: PassResult, tiny_model: Path) -> None:
    ids = random_tokens(ModelDirectory(tiny_model).spec.config["vocab_size"]).ids
    assert lieq.score(streamed.measurements) == pytest.approx(lieq_scores(tiny_model, ids, seed=0), abs=1e-4)


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_device_that_is_not_there_is_refused(tiny_model: Path, device: str) -> None:
    with pytest.raises(CalibrationError, match=device):
        run_pass(ModelDirectory(tiny_model), small_tokens(tiny_model), PassOptions(compute=ComputeOptions(device)))


def test_layer_that_gives_no_numbers_is_named(tmp_path: Path) -> None:
    path = write_model(tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CalibrationError, match="layer 1"):
        run(path, small_tokens(path))


def long_text() -> str:
    return "\n".join(f"Line {i} of the story tells of {i * i} birds and {i % 7} brown foxes." for i in range(400))


def plain_ids(model_dir: Path, text: str) -> list[int]:
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_sequences_are_spread_evenly_over_a_long_text(tiny_model: Path) -> None:
    ids = plain_ids(tiny_model, long_text())
    n_available = len(ids) // CHUNK_SIZE
    assert n_available > 8  # or there is nothing to spread over
    tokens = tokenize([CalibrationText(long_text(), "long")], load_source_tokenizer(tiny_model), 4 * CHUNK_SIZE + 100)
    chunks = [ids[i * CHUNK_SIZE : (i + 1) * CHUNK_SIZE] for i in range(n_available)]
    places = [chunks.index(row) for row in tokens.ids.tolist()]
    gaps = np.diff(places)
    assert (len(places), places[0], places[-1]) == (4, 0, n_available - 1)
    assert gaps.max() - gaps.min() <= 1


def test_whole_text_is_used_when_it_is_short(tiny_model: Path) -> None:
    ids = plain_ids(tiny_model, long_text())
    tokens = tokenize([CalibrationText(long_text(), "long")], load_source_tokenizer(tiny_model), 10**6)
    assert tokens.ids.ravel().tolist() == ids[: len(ids) // CHUNK_SIZE * CHUNK_SIZE]


def test_first_token_of_every_sequence_becomes_bos_where_the_tokenizer_adds_one(tmp_path: Path) -> None:
    path = write_model(tmp_path, write_tokenizer=write_llama_3)
    ids = plain_ids(path, long_text())
    bos = Tokenizer.from_file(str(path / "tokenizer.json")).token_to_id("<|begin_of_text|>")
    tokens = tokenize([CalibrationText(long_text(), "long")], load_source_tokenizer(path), 10**6)
    expected = np.array(ids[: tokens.ids.size]).reshape(-1, CHUNK_SIZE)
    expected[:, 0] = bos
    np.testing.assert_array_equal(tokens.ids, expected)


def test_text_shorter_than_a_sequence_shortens_it(tiny_model: Path) -> None:
    text = long_text()[:300]
    tokens = tokenize([CalibrationText(text, "short")], load_source_tokenizer(tiny_model), 10**6)
    assert tokens.ids.tolist() == [plain_ids(tiny_model, text)]


def test_fewer_tokens_than_a_sequence_shorten_it(tiny_model: Path) -> None:
    assert tokenize([CalibrationText(long_text(), "long")], load_source_tokenizer(tiny_model), 100).ids.shape == (
        1,
        100,
    )


def test_text_of_a_few_words_is_refused(tiny_model: Path) -> None:
    with pytest.raises(CalibrationError, match=r"'words' gives [1-9]"):
        tokenize([CalibrationText("A few words.", "words")], load_source_tokenizer(tiny_model), 10**6)


def test_shipped_text_is_long_enough() -> None:
    [text] = read_calibration_texts()
    assert text.dataset == SHIPPED_TEXT
    assert len(text.content.encode("utf-8")) >= 300_000


def test_calibration_file_is_read_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Ünïcode\n", encoding="utf-8")
    assert read_calibration_texts([file]) == (CalibrationText("Ünïcode\n", "text.txt"),)


def test_the_shipped_text_can_be_one_of_several(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Ünïcode\n", encoding="utf-8")
    own, shipped = read_calibration_texts([file, Path(SHIPPED_TEXT)])
    assert (own.dataset, shipped) == ("text.txt", *read_calibration_texts())


def test_several_texts_give_as_many_sequences_each_as_they_have(tiny_model: Path) -> None:
    tokenizer = load_source_tokenizer(tiny_model)
    short = CalibrationText("tail head " * 1000, "short")
    n_short = len(tokenizer.encode(short.content, add_special_tokens=False)) // CHUNK_SIZE
    both = [CalibrationText(long_text(), "long"), short]
    few, many = (tokenize(both, tokenizer, n * CHUNK_SIZE) for n in (4, 2 * n_short + 3))
    alone = tokenize(both[1:], tokenizer, 10**6).ids.tolist()
    assert [row in alone for row in few.ids.tolist()] == [False, False, True, True]
    assert [row in alone for row in many.ids.tolist()] == [False] * (n_short + 3) + [True] * n_short
    assert many.dataset == "long+short"


@pytest.mark.parametrize(
    ("words", "n_tokens", "message"), [(9, 2048, "'words' gives"), (2000, 600, "2 calibration texts")]
)
def test_several_texts_need_a_sequence_each(tiny_model: Path, words: int, n_tokens: int, message: str) -> None:
    texts = [CalibrationText(long_text(), "long"), CalibrationText("tail head " * words, "words")]
    with pytest.raises(CalibrationError, match=message):
        tokenize(texts, load_source_tokenizer(tiny_model), n_tokens)


@pytest.mark.parametrize("content", [None, b"", b" \n", b"abc\xff\xfe"], ids=["missing", "empty", "blank", "not utf-8"])
def test_calibration_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"text\.txt"):
        read_calibration_texts([file])


def test_calibration_file_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration_texts([tmp_path])

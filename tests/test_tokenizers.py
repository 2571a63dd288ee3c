import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import transformers
from sentencepiece import sentencepiece_model_pb2
from support import tokenizer_fixtures as fixtures
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram, WordPiece

from lieq_gguf.errors import LieqError, SourceError, TokenizerError, VerificationError
from lieq_gguf.native.llama_cpp import open_model
from lieq_gguf.tokenizers import (
    Vocabulary,
    adds_bos_unlike_transformers,
    known_deviation,
    load_source_tokenizer,
    pre_tokenizer_caveat,
    read_vocabulary,
    tokenizer_differences,
)
from lieq_gguf.tokenizers.model_files import open_tokenizer, read_tokenizer_files
from lieq_gguf.tokenizers.pre_tokenizers import describe_steps
from lieq_gguf.tokenizers.sentencepiece_model import open_sentencepiece

Write = Callable[[Path], int]
WRITERS: dict[str, Write] = {
    "smollm2": fixtures.write_smollm2,
    "smollm2_with_template_files": fixtures.write_smollm2_with_template_files,
    "llama_3": fixtures.write_llama_3,
    "tekken": fixtures.write_tekken,
    "llama_2": fixtures.write_llama_2,
    "llama_2_json_only": fixtures.write_llama_2_json_only,
    "llama_2_model_only": fixtures.write_llama_2_model_only,
    "qwen2": fixtures.write_qwen2,
    "qwen3": fixtures.write_qwen3,
    "deepseek_r1_qwen": fixtures.write_deepseek_r1_qwen,
    "smollm3": fixtures.write_smollm3,
    "olmo2": fixtures.write_olmo2,
    "granite": fixtures.write_granite,
    "phi_4_mini": fixtures.write_phi_4_mini,
    "phi_3": fixtures.write_phi_3,
    "qwen3_5": fixtures.write_qwen3_5,
    "lfm2": fixtures.write_lfm2,
    "ministral_3": fixtures.write_ministral_3,
    "tekken_json_only": fixtures.write_tekken_json_only,
    "apertus": fixtures.write_apertus,
    "nemotron_h": fixtures.write_nemotron_h,
    "granite_4": fixtures.write_granite_4,
    "glm_4": fixtures.write_glm_4,
    "glm_4_with_prefix": fixtures.write_glm_4_with_prefix,
    "hunyuan_dense": fixtures.write_hunyuan_dense,
    "exaone_4": fixtures.write_exaone_4,
    "seed_oss": fixtures.write_seed_oss,
    "gpt_oss": fixtures.write_gpt_oss,
    "minicpm_5": fixtures.write_minicpm_5,
    "arcee": fixtures.write_llama_3,
    "ernie_4_5": fixtures.write_ernie_4_5,
    "gemma_4": fixtures.write_gemma_4,
    "gemma": fixtures.write_gemma,
    "gemma_3n": fixtures.write_gemma,
    "gemma_json_only": fixtures.write_gemma_json_only,
    "gemma_model_only": fixtures.write_gemma_model_only,
    "unigram": fixtures.write_unigram,
    "unigram_json_only": fixtures.write_unigram_json_only,
    "unigram_model_only": fixtures.write_unigram_model_only,
}
#: llama.cpp's architecture, class and model type of transformers, where they are not Llama's
FAMILIES = {
    "qwen2": ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", "qwen3"),
    "deepseek_r1_qwen": ("qwen2", "Qwen2ForCausalLM", "qwen2"),
    "smollm3": ("smollm3", "SmolLM3ForCausalLM", "smollm3"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", "olmo2"),
    "granite": ("granite", "GraniteForCausalLM", "granite"),
    "phi_4_mini": ("phi3", "Phi3ForCausalLM", "phi3"),
    "phi_3": ("phi3", "Phi3ForCausalLM", "phi3"),
    "qwen3_5": ("qwen35", "Qwen3_5ForCausalLM", "qwen3_5"),
    "lfm2": ("lfm2", "Lfm2ForCausalLM", "lfm2"),
    "ministral_3": ("mistral3", "Ministral3ForCausalLM", "ministral3"),
    "tekken_json_only": ("mistral3", "Ministral3ForCausalLM", "ministral3"),
    "apertus": ("apertus", "ApertusForCausalLM", "apertus"),
    "nemotron_h": ("nemotron_h", "NemotronHForCausalLM", "nemotron_h"),
    "granite_4": ("granitehybrid", "GraniteMoeHybridForCausalLM", "granitemoehybrid"),
    "glm_4": ("glm4", "Glm4ForCausalLM", "glm4"),
    "glm_4_with_prefix": ("glm4", "Glm4ForCausalLM", "glm4"),
    "hunyuan_dense": ("hunyuan-dense", "HunYuanDenseV1ForCausalLM", "hunyuan_v1_dense"),
    "exaone_4": ("exaone4", "Exaone4ForCausalLM", "exaone4"),
    "seed_oss": ("seed_oss", "SeedOssForCausalLM", "seed_oss"),
    "gpt_oss": ("gpt-oss", "GptOssForCausalLM", "gpt_oss"),
    "arcee": ("arcee", "ArceeForCausalLM", "arcee"),
    "ernie_4_5": ("ernie4_5", "Ernie4_5ForCausalLM", "ernie4_5"),
    "gemma_4": ("gemma4", "Gemma4ForCausalLM", "gemma4_text"),
    "gemma": ("gemma2", "Gemma2ForCausalLM", "gemma2"),
    "gemma_3n": ("gemma3n", "Gemma3nForCausalLM", "gemma3n_text"),
    "gemma_json_only": ("gemma3", "Gemma3ForCausalLM", "gemma3_text"),
    "gemma_model_only": ("gemma2", "Gemma2ForCausalLM", "gemma2"),
}
LLAMA = ("llama", "LlamaForCausalLM", "llama")
#: llama.cpp tells from phi-3 or phi3 in general.name alone that added tokens swallow blanks
MODEL_NAMES = {"phi_3": "Phi-3 mini"}
#: texts that no file could make llama.cpp tokenise like the source
DEVIATING = {
    "qwen2": {"accents, decomposed"},
    "qwen3": {"accents, decomposed"},
    "qwen3_5": {"accents, decomposed"},
    "gpt_oss": {"devanagari"},
    "phi_4_mini": {"devanagari", "special tokens"},
    "glm_4_with_prefix": {"automatic tokens"},
}
BYTE_LEVEL = ("smollm2", "llama_3", "tekken")
PRE_TOKENIZERS = {
    "smollm2": "smollm",
    "llama_3": "llama-bpe",
    "tekken": "tekken",
    "llama_2": "default",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "deepseek_r1_qwen": "deepseek-r1-qwen",
    "smollm3": "llama-bpe",
    "olmo2": "dbrx",
    "granite": "refact",
    "phi_4_mini": "gpt-4o",
    "phi_3": "default",
    "qwen3_5": "qwen35",
    "lfm2": "lfm2",
    "ministral_3": "tekken",
    "tekken_json_only": "tekken",
    "apertus": "tekken",
    "nemotron_h": "pixtral",
    "granite_4": "dbrx",
    "glm_4": "glm4",
    "hunyuan_dense": "hunyuan-dense",
    "exaone_4": "exaone4",
    "seed_oss": "seed-coder",
    "gpt_oss": "gpt-4o",
    "minicpm_5": "minicpm5",
    "ernie_4_5": "default",
    "gemma": "default",
}


BOS_UNLIKE_TRANSFORMERS = ("gemma_4", "tekken_json_only")
SEARCHED_FIRST = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)


def write_gguf(vocabulary: Vocabulary, path: Path, model_name: str = "") -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if model_name:
        writer.add_name(model_name)
    vocabulary.add_to(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def read_keys(path: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if name.startswith("tokenizer.")}


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


def with_config(model_dir: Path, vocab_size: int, **changes: Any) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": vocab_size,
    }
    edit(model_dir / "config.json", **config, **changes)


def differing_segments(model_dir: Path, vocabulary: Vocabulary, tmp_path: Path) -> set[str]:
    found = tokenizer_differences(load_source_tokenizer(model_dir), write_gguf(vocabulary, tmp_path / "check.gguf"))
    return {difference.segment for difference in found}


@pytest.mark.parametrize("name", WRITERS)
def test_llama_cpp_gives_the_tokens_of_the_source(name: str, tmp_path: Path) -> None:
    vocab_size = WRITERS[name](tmp_path)
    vocabulary = read_vocabulary(tmp_path, vocab_size, architecture=FAMILIES.get(name, LLAMA)[0])
    assert len(vocabulary.tokens) == len(vocabulary.token_types) == vocab_size
    path = write_gguf(vocabulary, tmp_path / "vocab.gguf", MODEL_NAMES.get(name, ""))
    found = tokenizer_differences(load_source_tokenizer(tmp_path), path)
    assert {difference.segment for difference in found} == DEVIATING.get(name, set())
    assert bool(known_deviation(vocabulary, found)) == (name in DEVIATING)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizer_is_recognised(name: str, tmp_path: Path) -> None:
    vocab_size = WRITERS[name](tmp_path)
    assert read_vocabulary(tmp_path, vocab_size).pre_tokenizer == PRE_TOKENIZERS[name]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        (name, wrong)
        for name in BYTE_LEVEL
        for wrong in ("smollm", "gpt-2", "llama-bpe", "qwen2", "tekken", "falcon")
        if wrong != PRE_TOKENIZERS[name]
    ],
)
def test_a_wrong_pre_tokenizer_is_reported(name: str, wrong: str, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, WRITERS[name](tmp_path), pre_tokenizer=wrong)
    assert vocabulary.pre_tokenizer == wrong
    assert differing_segments(tmp_path, vocabulary, tmp_path)


def test_taking_words_whole_does_not_matter_if_merges_lead_to_them(tmp_path: Path) -> None:
    """As in gpt-oss, for whose rule llama.cpp has only a name that does not take words whole."""
    vocab_size = fixtures.write_gpt_oss(tmp_path)
    assert read_vocabulary(tmp_path, vocab_size).pre_tokenizer == "gpt-4o"
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert model["ignore_merges"]
    merges = [pair for pair in model["merges"] if "".join(pair) != fixtures.WORD_WITHOUT_MERGE]
    assert len(merges) < len(model["merges"])
    edit(tmp_path / "tokenizer.json", model={**model, "merges": merges})
    message = raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)
    assert "ignore_merges=True" in message and "gpt-4o" in message


def test_taking_words_whole_matters(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_llama_3(tmp_path), pre_tokenizer="smaug-bpe")
    assert fixtures.WORD_WITHOUT_MERGE.encode() in vocabulary.tokens
    # the same rule for words, but without looking them up first
    assert differing_segments(tmp_path, vocabulary, tmp_path) == {"english"}


def test_a_difference_says_where(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_smollm2(tmp_path), pre_tokenizer="gpt-2")
    found = tokenizer_differences(load_source_tokenizer(tmp_path), write_gguf(vocabulary, tmp_path / "vocab.gguf"))
    difference = next(d for d in found if d.segment == "digits")
    source = load_source_tokenizer(tmp_path)
    ids = source.encode(difference.text, add_special_tokens=False)
    assert difference.expected_id == ids[difference.position] != difference.found_id
    assert source.piece(ids[difference.position]) in difference.expected_pieces
    assert str(difference).startswith(f"digits: token {difference.position} of ") and "\n" not in str(difference)


def test_wrong_automatic_bos_is_reported(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_llama_3(tmp_path))
    special = dataclasses.replace(vocabulary.special, automatic=(("bos", False),))
    wrong = dataclasses.replace(vocabulary, special=special)
    assert differing_segments(tmp_path, wrong, tmp_path) == {"automatic tokens"}


def test_a_missing_leading_blank_is_reported(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_llama_2(tmp_path))
    assert differing_segments(tmp_path, dataclasses.replace(vocabulary, add_space_prefix=False), tmp_path)


def test_scores_come_from_merges_without_tokenizer_model(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_llama_2_json_only(tmp_path))
    # llama.cpp's converter gives all tokens this score, which makes llama.cpp merge from left to right
    equal = dataclasses.replace(vocabulary, scores=(-1000.0,) * len(vocabulary.tokens))
    assert "english" in differing_segments(tmp_path, equal, tmp_path)


def test_no_leading_blank_where_tokenizer_json_has_none(tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_2(tmp_path)
    edit(tmp_path / "tokenizer.json", normalizer={"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"})
    vocabulary = read_vocabulary(tmp_path, vocab_size)
    assert vocabulary.add_space_prefix is False
    assert differing_segments(tmp_path, vocabulary, tmp_path) == set()


def test_a_prefix_at_the_start_only_is_reported(tmp_path: Path) -> None:
    """Mistral v0.3's tokenizer.json; llama.cpp adds a blank after special tokens and blanks too, without a switch."""
    vocab_size = fixtures.write_llama_2(tmp_path)
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    edit(tmp_path / "tokenizer.json", normalizer=None, pre_tokenizer=metaspace)
    vocabulary = read_vocabulary(tmp_path, vocab_size)
    assert vocabulary.add_space_prefix is None
    assert differing_segments(tmp_path, vocabulary, tmp_path) == {"special tokens", "blanks"}


def test_tekken_of_llama_cpp_deviates_at_capitals_and_marks(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_tekken(tmp_path, all_texts=True))
    segments = differing_segments(tmp_path, vocabulary, tmp_path)
    assert segments == {"accents, composed", "accents, decomposed", "arabic", "hebrew", "devanagari", "thai", "khmer"}
    assert "combining marks" in pre_tokenizer_caveat("tekken")
    assert pre_tokenizer_caveat("smollm") == ""


def test_bos_that_no_file_declares_is_written(tmp_path: Path) -> None:
    """llama-bpe adds BOS by default; a tokenizer.json that does not must be obeyed."""
    vocab_size = fixtures.write_llama_3(tmp_path)
    edit(tmp_path / "tokenizer.json", post_processor=None)
    vocabulary = read_vocabulary(tmp_path, vocab_size)
    assert dict(vocabulary.special.automatic) == {"bos": False}
    assert differing_segments(tmp_path, vocabulary, tmp_path) == set()


@pytest.mark.parametrize("write", [fixtures.write_smollm2, fixtures.write_llama_3, fixtures.write_phi_3])
def test_tokens_are_added_as_transformers_adds_them(tmp_path: Path, write: Callable[[Path], int]) -> None:
    """It does not heed the flags of tokenizer_config.json where there is a tokenizer.json."""
    vocab_size = write(tmp_path)
    with_config(tmp_path, vocab_size)
    before = transformers.AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids
    edit(tmp_path / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path)("Hello").input_ids == before
    vocabulary = read_vocabulary(tmp_path, vocab_size)
    assert load_source_tokenizer(tmp_path).encode("Hello", add_special_tokens=True) == before
    ids, automatic = dict(vocabulary.special.ids), dict(vocabulary.special.automatic)
    assert automatic["bos"] == (before[0] == ids["bos"])
    assert automatic["eos"] == (before[-1] == ids["eos"])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"special_tokens_map.json": {"eos_token": "<|im_end|>"}}, "<|im_end|>"),
        ({"special_tokens_map.json": {"eos_token": {"content": "<|im_end|>"}}}, "<|im_end|>"),
        ({"config.json": {"eos_token_id": [2, 0]}}, "<|im_end|>"),
        ({"config.json": {"eos_token_id": 2}}, "<|im_end|>"),
        ({"tokenizer_config.json": {"eos_token": "a"}}, "a"),  # in the vocabulary, but not an added token
        ({"tokenizer_config.json": {"eos_token": "nowhere"}}, None),
        ({}, None),
    ],
)
def test_the_token_that_ends_a_text(tmp_path: Path, changes: dict[str, dict[str, Any]], expected: str | None) -> None:
    """Without one, llama.cpp stops at token 11, whatever it is."""
    vocab_size = fixtures.write_smollm2(tmp_path)
    edit(tmp_path / "tokenizer_config.json", bos_token=None, eos_token=None, unk_token=None)
    (tmp_path / "special_tokens_map.json").unlink(missing_ok=True)
    with_config(tmp_path, vocab_size)
    for name, keys in changes.items():
        edit(tmp_path / name, **keys)
    vocabulary = read_vocabulary(tmp_path, vocab_size)
    found = dict(vocabulary.special.ids).get("eos")
    assert (None if found is None else vocabulary.tokens[found].decode()) == expected
    assert bool(vocabulary.warnings) == (expected is None)


def test_special_ids_of_config_json(tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_3(tmp_path)
    with_config(tmp_path, vocab_size, bos_token_id=3, eos_token_id=[4, 5], pad_token_id=7, unk_token_id=-1)
    ids = dict(read_vocabulary(tmp_path, vocab_size).special.ids)
    # the tokenizer's own roles come first; -1 says nothing
    assert ids == {"bos": vocab_size - 7, "eos": vocab_size - 3, "pad": 7}


def test_special_ids_of_a_wrapper(tmp_path: Path) -> None:
    """A model that also sees has the ids of its language model in ``text_config``."""
    vocab_size = fixtures.write_llama_3(tmp_path)
    edit(tmp_path / "config.json", pad_token_id=7, text_config={"pad_token_id": 8, "unk_token_id": 9})
    ids = dict(read_vocabulary(tmp_path, vocab_size).special.ids)
    assert (ids["pad"], ids["unk"]) == (7, 9)


def role_texts(vocabulary: Vocabulary) -> dict[str, str]:
    return {role: vocabulary.tokens[token_id].decode() for role, token_id in vocabulary.special.ids}


def test_roles_of_glm(tmp_path: Path) -> None:
    vocab_size = fixtures.write_glm_4(tmp_path)
    end = "<|endoftext|>"
    roles = {"eos": end, "pad": end, "unk": end, "bos": end, "eot": "<|user|>"}
    assert role_texts(read_vocabulary(tmp_path, vocab_size, architecture="glm4")) == roles
    assert role_texts(read_vocabulary(tmp_path, vocab_size)) == {"eos": end, "pad": end}


def test_roles_of_hunyuan(tmp_path: Path) -> None:
    vocab_size = fixtures.write_hunyuan_dense(tmp_path)
    bos, wrong_end, *_, end, _ = fixtures.HUNYUAN_SPECIAL
    roles = {"bos": bos, "eos": end, "eot": end}
    assert role_texts(read_vocabulary(tmp_path, vocab_size, architecture="hunyuan-dense")) == roles
    edit(tmp_path / "generation_config.json", eos_token_id=1)
    edit(tmp_path / "config.json", eod_token_id=None)
    roles = {"bos": bos, "eos": wrong_end}
    assert role_texts(read_vocabulary(tmp_path, vocab_size, architecture="hunyuan-dense")) == roles


def test_tokens_beside_the_vocabulary_are_padding(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_tekken(tmp_path))
    assert vocabulary.tokens[-1] == f"[PAD{len(vocabulary.tokens) - 1}]".encode()
    assert vocabulary.token_types[-6:] == (gguf.TokenType.NORMAL, *[gguf.TokenType.UNUSED] * 5)
    assert vocabulary.token_types[0] == gguf.TokenType.CONTROL


def test_code_llama_has_an_end_of_turn(tmp_path: Path) -> None:
    fixtures.write_llama_2(tmp_path)
    assert dict(read_vocabulary(tmp_path, 32016).special.ids)["eot"] == 32010


def test_no_bos_for_granite_sized_vocabularies(tmp_path: Path) -> None:
    fixtures.write_tekken(tmp_path)
    assert dict(read_vocabulary(tmp_path, 49152).special.automatic)["bos"] is False


def test_chat_templates(tmp_path: Path) -> None:
    for name in ("smollm2", "smollm2_with_template_files", "tekken"):
        path = tmp_path / name
        written = read_keys(write_gguf(read_vocabulary(path, WRITERS[name](path)), path / "vocab.gguf"))
        if name == "tekken":
            assert written["tokenizer.chat_template"] == fixtures.INST_CHAT
            assert written["tokenizer.chat_template.tool_use"] == "tools"
        else:
            assert written["tokenizer.chat_template"] == fixtures.CHATML
        if name != "smollm2":
            assert written["tokenizer.chat_templates"] == ["tool_use"]


def test_chat_template_without_tokenizer_config(tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2_with_template_files(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert read_vocabulary(tmp_path, vocab_size).chat_templates.default == fixtures.CHATML


def test_the_chat_template_is_that_of_transformers(tmp_path: Path) -> None:
    """Of several places with different ones, as left behind by older versions of a model, and by its processor."""
    vocab_size = fixtures.write_smollm2(tmp_path)
    with_config(tmp_path, vocab_size)
    (tmp_path / "chat_template.jinja").write_text("from jinja", encoding="utf-8")
    edit(tmp_path / "tokenizer_config.json", chat_template="from the tokenizer")
    edit(tmp_path / "chat_template.json", chat_template="from json")
    edit(tmp_path / "processor_config.json", chat_template="from the processor")
    places = ("chat_template.jinja", "tokenizer_config.json", "chat_template.json", "processor_config.json")
    found = []
    for place in places:
        found.append(read_vocabulary(tmp_path, vocab_size).chat_templates.default)
        if len(found) < 3:  # the others are read by transformers' processors, of models that also see or hear
            assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == found[-1]
        (tmp_path / place).unlink()
    assert found == ["from jinja", "from the tokenizer", "from json", "from the processor"]
    assert read_vocabulary(tmp_path, vocab_size).chat_templates.default is None


def test_special_tokens_of_the_config_are_control_tokens(tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    edit(tmp_path / "tokenizer.json", added_tokens=[t for t in content["added_tokens"] if t["content"] != "<file_sep>"])
    file_sep = fixtures.SMOLLM2_SPECIAL.index("<file_sep>")
    assert read_vocabulary(tmp_path, vocab_size).token_types[file_sep] == gguf.TokenType.NORMAL
    edit(tmp_path / "tokenizer_config.json", additional_special_tokens=["<file_sep>", "not in the vocabulary"])
    assert read_vocabulary(tmp_path, vocab_size).token_types[file_sep] == gguf.TokenType.CONTROL


def test_source_tokenizer_is_the_same_with_and_without_tokenizer_json(tmp_path: Path) -> None:
    fixtures.write_llama_2(tmp_path)
    fast = load_source_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    slow = load_source_tokenizer(tmp_path)
    assert fast.vocab_size == slow.vocab_size
    assert fast.encode("", add_special_tokens=True) == slow.encode("", add_special_tokens=True) == [1]
    text = "<s>I've <tool>seen 12<|im_start|>\n  apples</s>"
    assert fast.encode(text, add_special_tokens=False) == slow.encode(text, add_special_tokens=False)
    assert slow.piece(0) == "<unk>" and slow.piece(-1) == slow.piece(slow.vocab_size) == "?"


def test_source_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    fixtures.write_smollm2(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = tokenizer.encode("one two three four five").ids
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_source_tokenizer(tmp_path).encode("one two three four five", add_special_tokens=False) == expected


def structure(pre_tokenizer: Any, normalizer: Any = None, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], **model))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def split_then_bytes(*regexes: str, behavior: str = "isolated", invert: bool = False) -> Any:
    splits = [pre_tokenizers.Split(Regex(regex), behavior, invert) for regex in regexes]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def with_added(tokenizer: Tokenizer, *texts: str) -> Tokenizer:
    tokenizer.add_special_tokens(list(texts))
    return tokenizer


EACH_DIGIT = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("tokenizer", "name"),
    [
        (structure(pre_tokenizers.ByteLevel(add_prefix_space=False)), "gpt-2"),
        (structure(split_then_bytes(fixtures.LLAMA_3_REGEX), ignore_merges=True), "llama-bpe"),
        (
            structure(split_then_bytes(fixtures.LLAMA_3_REGEX, behavior="removed", invert=True), ignore_merges=True),
            "llama-bpe",
        ),
        (structure(split_then_bytes(fixtures.LLAMA_3_REGEX)), "smaug-bpe"),
        (structure(split_then_bytes(fixtures.CL100K_REGEX), ignore_merges=True), "llama-bpe"),
        (structure(split_then_bytes(fixtures.CL100K_REGEX)), "smaug-bpe"),
        (with_added(structure(split_then_bytes(fixtures.LLAMA_3_REGEX), ignore_merges=True), "[gMASK]"), "glm4"),
        (with_added(structure(split_then_bytes(fixtures.LLAMA_3_REGEX)), "[gMASK]"), "chatglm-bpe"),
        (with_added(structure(split_then_bytes(fixtures.LLAMA_3_REGEX), ignore_merges=True), "[INST]"), "pixtral"),
        (structure(split_then_bytes(*fixtures.DEEPSEEK_3_REGEXES), normalizers.Sequence([])), "deepseek-v3"),
        (structure(split_then_bytes(*fixtures.MINICPM_5_REGEXES), ignore_merges=True), "minicpm5"),
        (structure(split_then_bytes(fixtures.SEED_REGEX)), "seed-coder"),
        (with_added(structure(EACH_DIGIT), "[|endofturn|]"), "exaone"),
        (structure(split_then_bytes(fixtures.TEKKEN_REGEX)), "tekken"),
        (structure(split_then_bytes(fixtures.QWEN_2_REGEX)), "qwen2"),
        (structure(split_then_bytes(fixtures.QWEN_2_REGEX), normalizers.NFC()), "qwen2"),
        (structure(split_then_bytes(fixtures.GPT_4O_REGEX)), "gpt-4o"),
        (structure(split_then_bytes(fixtures.QWEN_3_5_REGEX), normalizers.NFC()), "qwen35"),
        (structure(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC()), "olmo"),
        (structure(EACH_DIGIT), "smollm"),
        (with_added(structure(EACH_DIGIT), "<reponame>"), "smollm"),
        (with_added(structure(EACH_DIGIT), "<fim_prefix>", "<reponame>"), "refact"),
        (with_added(structure(EACH_DIGIT), "<fim_prefix>", "<repo_name>"), "starcoder"),
        (with_added(structure(split_then_bytes(fixtures.LLAMA_3_REGEX)), "<|fim_prefix|>"), "dbrx"),
        (with_added(structure(split_then_bytes(fixtures.QWEN_2_REGEX)), "<|im_start|>"), "qwen2"),
        (with_added(structure(split_then_bytes(fixtures.QWEN_2_REGEX)), fixtures.DEEPSEEK_BOS), "deepseek-r1-qwen"),
    ],
)
def test_structures(tokenizer: Tokenizer, name: str, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert read_vocabulary(tmp_path, 5).pre_tokenizer == name


@pytest.mark.parametrize(
    ("spellings", "usual"),
    [
        ((fixtures.CL100K_REGEX,), (fixtures.LLAMA_3_REGEX,)),
        ((fixtures.SEED_REGEX,), (fixtures.SEED_REGEX.replace("{1}", ""),)),
        (fixtures.DEEPSEEK_3_REGEXES, tuple(regex.replace("\r\n", r"\r\n") for regex in fixtures.DEEPSEEK_3_REGEXES)),
    ],
)
def test_spellings_that_split_alike(spellings: tuple[str, ...], usual: tuple[str, ...]) -> None:
    assert spellings != usual
    one, other = split_then_bytes(*spellings), split_then_bytes(*usual)
    assert describe_steps(structure(one)) == describe_steps(structure(other))
    blanks = ["".join(text) for n in range(1, 5) for text in itertools.product(" \n\r\ta'.", repeat=n)]
    for text in (*fixtures.ALL_TEXTS, *blanks):
        assert one.pre_tokenize_str(text) == other.pre_tokenize_str(text), text


def test_merges_in_both_spellings(tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2(tmp_path)
    as_pairs = read_vocabulary(tmp_path, vocab_size).merges
    model = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    edit(tmp_path / "tokenizer.json", model={**model, "merges": [" ".join(pair) for pair in model["merges"]]})
    assert read_vocabulary(tmp_path, vocab_size).merges == as_pairs


def raised(action: Callable[[], object], expected: type[LieqError]) -> str:
    with pytest.raises(expected) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_no_tokenizer_files(tmp_path: Path) -> None:
    message = raised(lambda: read_vocabulary(tmp_path, 10), TokenizerError)
    assert "tokenizer.model" in message and "tokenizer.json" in message and "found none" in message
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    assert "only vocab.json" in raised(lambda: load_source_tokenizer(tmp_path), TokenizerError)


BROKEN_FILES = (
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "generation_config.json", "chat_template.json",
    "processor_config.json",
)  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_FILES)
@pytest.mark.parametrize("content", [b'{"model": ', b"\xff\xfe"])
def test_broken_json_names_the_file(name: str, content: bytes, tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2(tmp_path)
    edit(tmp_path / "tokenizer_config.json", chat_template=None)
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in raised(lambda: read_vocabulary(tmp_path, vocab_size), SourceError)


def test_json_that_is_no_object(tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]", encoding="utf-8")
    assert "found a JSON list" in raised(lambda: read_vocabulary(tmp_path, vocab_size), SourceError)


def test_json_that_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}', encoding="utf-8")
    message = raised(lambda: read_vocabulary(tmp_path, 10), TokenizerError)
    assert str(tmp_path / "tokenizer.json") in message and "tokenizers library" in message


def test_broken_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1\n", encoding="utf-8")
    for action in (lambda: read_vocabulary(tmp_path, 10), lambda: load_source_tokenizer(tmp_path)):
        assert "Git LFS pointer" in raised(action, TokenizerError)


def test_tekken_json_is_read_as_transformers_does(tmp_path: Path) -> None:
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    fixtures.write_tekken_json_only(tmp_path)
    content = json.loads(convert_tekken_tokenizer(str(tmp_path / "tekken.json")).backend_tokenizer.to_str())
    ours = open_tokenizer(read_tokenizer_files(tmp_path))
    assert content["model"] == json.loads(ours.to_str())["model"]
    assert ours.token_to_id("<SPECIAL_15>") == 15


def test_tekken_json_counts_only_without_tokenizer_json(tmp_path: Path) -> None:
    vocab_size = fixtures.write_tekken_json_only(tmp_path)
    vocabulary = read_vocabulary(tmp_path, vocab_size)
    fixtures.write_llama_2(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.model").rename(tmp_path / "tokenizer.model")
    assert read_vocabulary(tmp_path, vocab_size) == vocabulary
    vocab_size = fixtures.write_smollm2(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    assert read_vocabulary(tmp_path, vocab_size).pre_tokenizer == "smollm"


def test_special_tokens_of_an_older_tekken_json(tmp_path: Path) -> None:
    vocab_size = fixtures.write_tekken_json_only(tmp_path)
    content = json.loads((tmp_path / "tekken.json").read_text(encoding="utf-8"))
    del content["special_tokens"]
    config = {**content["config"], "default_num_special_tokens": 24, "default_vocab_size": vocab_size + 8}
    (tmp_path / "tekken.json").write_text(json.dumps({**content, "config": config}), encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path, vocab_size + 8)
    assert vocabulary.tokens[10:13] == (b"[IMG]", b"<pad>", b"[IMG_BREAK]")
    assert vocabulary.tokens[19:24] == (b"[TOOL_CONTENT]", *(b"<SPECIAL_%d>" % i for i in range(20, 24)))
    assert role_texts(vocabulary) == {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": None}, "expected Mistral's tekken.json"),
        ({"vocab": [{"rank": 0}]}, "expected Mistral's tekken.json"),
        ({"vocab": [{"token_bytes": "A"}]}, "expected Mistral's tekken.json"),
        ({"special_tokens": [{"rank": 0, "token_str": "<unk>"}]}, "there is no <s>"),
        ({"special_tokens": [{"rank": 1, "token_str": "<s>"}]}, "other ids than 0 to 0"),
    ],
)
def test_unreadable_tekken_json(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    fixtures.write_tekken_json_only(tmp_path)
    edit(tmp_path / "tekken.json", **changes)
    message = raised(lambda: read_vocabulary(tmp_path, 5000), TokenizerError)
    assert words in message and str(tmp_path / "tekken.json") in message


@pytest.mark.parametrize("name", ["gemma_4", "tekken_json_only", "gemma_json_only", "ministral_3"])
def test_bos_that_transformers_leaves_out(name: str, tmp_path: Path) -> None:
    """Gemma 4 leaves it to the chat template; llama.cpp adds it always. Mistral's own library adds it."""
    vocab_size = WRITERS[name](tmp_path)
    edit(tmp_path / "config.json", model_type=FAMILIES[name][2], vocab_size=vocab_size)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    source = load_source_tokenizer(tmp_path)
    bos = dict(read_vocabulary(tmp_path, vocab_size, architecture=FAMILIES[name][0]).special.ids)["bos"]
    ids = source.encode("Hello", add_special_tokens=False)
    assert source.encode("Hello", add_special_tokens=True) == [bos, *ids]
    assert adds_bos_unlike_transformers(tmp_path) == (name in BOS_UNLIKE_TRANSFORMERS)
    assert (reference.encode("Hello") == ids) == adds_bos_unlike_transformers(tmp_path)


def test_tokens_that_gemma_4_shows(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_gemma_4(tmp_path), architecture="gemma4")
    type_of = dict(zip(vocabulary.tokens, vocabulary.token_types, strict=True))
    assert type_of[b"<|turn>"] == type_of[b"<turn|>"] == gguf.TokenType.CONTROL
    assert type_of[b"<|channel>"] == gguf.TokenType.USER_DEFINED


def test_unsupported_model_type(tmp_path: Path) -> None:
    Tokenizer(WordPiece({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    message = raised(lambda: read_vocabulary(tmp_path, 10), TokenizerError)
    assert "of type WordPiece" in message and "expected BPE or Unigram" in message


def test_unigram_with_bytes_for_unknown_characters_is_refused(tmp_path: Path) -> None:
    """llama.cpp would give <unk> for them: its Unigram tokenizer knows no bytes."""
    vocab_size = fixtures.write_unigram(tmp_path, byte_fallback=True)
    assert "tokenizer.model: the Unigram" in raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)
    (tmp_path / "tokenizer.model").unlink()
    assert "tokenizer.json: the Unigram" in raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)


@pytest.mark.parametrize(
    ("normalizer", "splitter", "words"),
    [
        (None, None, "no Metaspace"),
        (normalizers.Lowercase(), pre_tokenizers.Metaspace(), "by Lowercase;"),
        (normalizers.Replace("a", "b"), pre_tokenizers.Metaspace(), "by Replace;"),
        (None, pre_tokenizers.Sequence([pre_tokenizers.Digits(), pre_tokenizers.Metaspace()]), "by Digits;"),
    ],
)
def test_unigram_that_prepares_texts_otherwise(normalizer: Any, splitter: Any, words: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer(Unigram([("a", 0.0)], unk_id=0))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert words in raised(lambda: read_vocabulary(tmp_path, 3), TokenizerError)


def test_merges_without_bytes_for_unknown_characters_are_refused(tmp_path: Path) -> None:
    """llama.cpp ends the process at such a character."""
    vocab_size = fixtures.write_llama_2(tmp_path, byte_fallback=False)
    (tmp_path / "tokenizer.json").unlink()
    message = raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)
    assert "no token for byte 0x00" in message and str(tmp_path) in message


@pytest.mark.parametrize("change", [{"precompiled_charsmap": b""}, {"remove_extra_whitespaces": False}])
def test_preparation_of_texts_matters(change: dict[str, Any], tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_unigram(tmp_path))
    assert differing_segments(tmp_path, dataclasses.replace(vocabulary, **change), tmp_path)


@pytest.mark.parametrize("name", ["gemma_model_only", "unigram_model_only", "llama_2_model_only"])
def test_fields_of_the_sentencepiece_model(name: str, tmp_path: Path) -> None:
    reference = sentencepiece_model_pb2.ModelProto()
    WRITERS[name](tmp_path)
    reference.ParseFromString((tmp_path / "tokenizer.model").read_bytes())
    model = open_sentencepiece(tmp_path / "tokenizer.model")
    assert [(p.text, p.score, p.token_type) for p in model.pieces] == [
        (p.piece, p.score, p.type) for p in reference.pieces
    ]
    assert model.is_unigram == (reference.trainer_spec.model_type == 1)
    assert model.has_byte_fallback == reference.trainer_spec.byte_fallback
    assert model.adds_space_prefix == reference.normalizer_spec.add_dummy_prefix
    assert model.removes_extra_whitespaces == reference.normalizer_spec.remove_extra_whitespaces
    assert model.precompiled_charsmap == reference.normalizer_spec.precompiled_charsmap


def test_user_defined_pieces_are_found_first(tmp_path: Path) -> None:
    """llama.cpp's converter makes them ordinary tokens if no other file names them."""
    vocabulary = read_vocabulary(tmp_path, fixtures.write_gemma_model_only(tmp_path))
    ids = {text: i for i, text in enumerate(vocabulary.tokens)}
    types = vocabulary.token_types
    assert types[ids[b"<table>"]] == types[ids[b"  "]] == types[ids[b"\n\n"]] == gguf.TokenType.USER_DEFINED
    assert types[ids[b"<unused0>"]] == gguf.TokenType.CONTROL
    ordinary = tuple(gguf.TokenType.NORMAL if t == gguf.TokenType.USER_DEFINED else t for t in types)
    assert differing_segments(tmp_path, dataclasses.replace(vocabulary, token_types=ordinary), tmp_path)


def test_runs_of_blanks_longer_than_their_tokens(tmp_path: Path) -> None:
    """Without tokenizer.model, runs of blanks are merged, in llama.cpp as in the tokenizers library."""
    vocabulary = read_vocabulary(tmp_path, fixtures.write_gemma_json_only(tmp_path))
    source = load_source_tokenizer(tmp_path)
    with open_model(write_gguf(vocabulary, tmp_path / "vocab.gguf"), vocab_only=True) as written:
        for n in (31, 32, 33, 47, 64, 100):
            text = "a" + " " * n + "b"
            assert written.tokenize(text, add_special_tokens=False) == source.encode(text, add_special_tokens=False)


def test_swallowed_blanks_are_said_where_the_name_does_not_help(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_phi_3(tmp_path))
    found = tokenizer_differences(load_source_tokenizer(tmp_path), write_gguf(vocabulary, tmp_path / "vocab.gguf"))
    assert {difference.segment for difference in found} == {"special tokens"}
    assert "swallows" in known_deviation(vocabulary, found)
    kept = dataclasses.replace(vocabulary, swallows_blanks=False)
    assert "swallows" not in known_deviation(kept, found)


def test_a_difference_beside_a_known_one_is_not_excused(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_phi_4_mini(tmp_path), pre_tokenizer="qwen2")
    assert vocabulary.swallows_blanks
    found = tokenizer_differences(load_source_tokenizer(tmp_path), write_gguf(vocabulary, tmp_path / "vocab.gguf"))
    assert known_deviation(vocabulary, found) == ""


@pytest.mark.parametrize(("architecture", "written"), [("granite", False), ("olmo2", None), ("qwen2", None)])
def test_keys_of_the_llama_family(architecture: str, written: bool | None, tmp_path: Path) -> None:
    vocab_size = fixtures.write_granite(tmp_path)
    vocabulary = read_vocabulary(tmp_path, vocab_size, architecture=architecture)
    assert vocabulary.add_space_prefix is written
    ids = dict(read_vocabulary(tmp_path, 32016, architecture=architecture).special.ids)
    assert ("eot" in ids) == (architecture == "granite")


def test_transformers_gives_the_same_ids(tmp_path: Path) -> None:
    """Its own classes are built from the vocabulary and ignore most of tokenizer.json."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for name in FAMILIES:
        model_dir = tmp_path / name
        vocab_size = WRITERS[name](model_dir)
        # transformers takes every tokenizer with Qwen's model type for one with NFC, and needs tokenizer.json
        if name in ("deepseek_r1_qwen", "gemma_model_only"):
            continue
        edit(model_dir / "config.json", model_type=FAMILIES[name][2], vocab_size=vocab_size)
        reference = transformers.AutoTokenizer.from_pretrained(model_dir)
        source = load_source_tokenizer(model_dir)
        for text in (*fixtures.ALL_TEXTS, "".join(source.added_tokens), ""):
            for is_automatic in (False, True):
                expected = reference.encode(text, add_special_tokens=is_automatic)
                if is_automatic and name in BOS_UNLIKE_TRANSFORMERS:
                    expected = [*source.encode("", add_special_tokens=True), *expected]
                assert source.encode(text, add_special_tokens=is_automatic) == expected, (name, text)


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (structure(pre_tokenizers.Whitespace()), "neither on bytes"),
        (structure(pre_tokenizers.ByteLevel(add_prefix_space=False), end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ],
)
def test_unsupported_bpe(tokenizer: Tokenizer, words: str, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert words in raised(lambda: read_vocabulary(tmp_path, 3), TokenizerError)


@pytest.mark.parametrize("name", WRITERS)
def test_ids_beyond_the_vocabulary(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path)
    message = raised(lambda: read_vocabulary(tmp_path, 300), TokenizerError)
    assert "vocab_size of 300" in message and str(tmp_path) in message


def test_tokens_that_llama_cpp_cannot_tell_apart(tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_2(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    decoder = {**config["added_tokens_decoder"], str(vocab_size - 1): {"content": "<s>"}}
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=decoder)
    message = raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)
    assert f"'<s>' 2 times (ids [1, {vocab_size - 1}])" in message


@pytest.mark.parametrize("entry", [{"x": {"content": "a"}}, {"3": {}}])
def test_unreadable_added_tokens(entry: dict[str, Any], tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_2(tmp_path)
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=entry)
    assert "added_tokens_decoder is unreadable" in raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)


def test_unknown_pre_tokenizer_name(tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2(tmp_path)
    message = raised(lambda: read_vocabulary(tmp_path, vocab_size, pre_tokenizer="lama-bpe"), TokenizerError)
    assert (
        "llama.cpp has no pre-tokenizer 'lama-bpe'" in message
        and "nearest are llama-bpe" in message
        and "--pre-tokenizer" in message
    )


def test_unknown_pre_tokenizer_structure(tmp_path: Path) -> None:
    changed = fixtures.LLAMA_3_REGEX.replace("{1,3}", "{1,4}")
    structure(split_then_bytes(changed), ignore_merges=True).save(str(tmp_path / "tokenizer.json"))
    message = raised(lambda: read_vocabulary(tmp_path, 3), TokenizerError)
    assert "nearest are llama-bpe, " in message and "--pre-tokenizer NAME" in message
    assert read_vocabulary(tmp_path, 3, pre_tokenizer="llama-bpe").pre_tokenizer == "llama-bpe"


def test_sentencepiece_has_no_pre_tokenizer(tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_2(tmp_path)
    message = raised(lambda: read_vocabulary(tmp_path, vocab_size, pre_tokenizer="llama-bpe"), TokenizerError)
    assert "leave out --pre-tokenizer" in message


@pytest.mark.parametrize("token_id", ["7", -1])
def test_unreadable_legacy_added_tokens(token_id: object, tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_2(tmp_path)
    edit(tmp_path / "added_tokens.json", **{"<x>": token_id})
    assert "id of '<x>'" in raised(lambda: read_vocabulary(tmp_path, vocab_size), TokenizerError)


def test_added_tokens_that_only_tokenizer_json_has(tmp_path: Path) -> None:
    vocab_size = fixtures.write_llama_2(tmp_path)
    before = read_vocabulary(tmp_path, vocab_size)
    edit(tmp_path / "tokenizer_config.json", added_tokens_decoder=None)
    after = read_vocabulary(tmp_path, vocab_size)
    assert after.tokens == before.tokens
    assert after.token_types[3:] == before.token_types[3:] and after.token_types[0] == gguf.TokenType.UNKNOWN
    assert differing_segments(tmp_path, after, tmp_path) == set()


def test_a_file_that_llama_cpp_refuses(tmp_path: Path) -> None:
    vocabulary = read_vocabulary(tmp_path, fixtures.write_smollm2(tmp_path))
    path = write_gguf(dataclasses.replace(vocabulary, pre_tokenizer="nonsense"), tmp_path / "vocab.gguf")
    assert "unknown pre-tokenizer type: 'nonsense'" in raised(
        lambda: tokenizer_differences(load_source_tokenizer(tmp_path), path), VerificationError
    )


def test_reading_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    vocab_size = fixtures.write_smollm2(tmp_path)
    code = (
        "import sys, pathlib; from lieq_gguf.tokenizers import read_vocabulary\n"
        f"read_vocabulary(pathlib.Path({str(tmp_path)!r}), {vocab_size})\n"
        "print([name for name in ('torch', 'transformers', 'llama_cpp') if name in sys.modules])"
    )
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert result.stdout == "[]\n"


# The converter finds the pre-tokenizer by a hash of the ids of one text. It cannot know the hash of a toy vocabulary,
# so that one method is replaced, and tokenizer.ggml.pre left out of the comparison. All in one process: importing torch
# and transformers takes longer than the conversions.
CONVERTER = """
import json, sys
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "replaced"
for model_dir, out in jobs:
    sys.argv = ["convert_hf_to_gguf.py", "--vocab-only", model_dir, "--outfile", out]
    convert_hf_to_gguf.main()
"""


#: what the converter needs to know of some families before it reads the tokenizer
CONVERTER_NEEDS: dict[str, dict[str, Any]] = {
    "qwen3_5": {
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
        "linear_value_head_dim": 16, "model_type": "qwen3_5_text", "mtp_num_hidden_layers": 1,
    },
    "granite_4": {
        "layer_types": ["mamba", "attention"] * 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
        "mamba_n_groups": 1, "mamba_n_heads": 4, "n_heads": 4,
    },
    "gemma_3n": {
        "activation_sparsity_pattern": [0.5], "altup_active_idx": 0, "altup_num_inputs": 4,
        "hidden_size_per_layer_input": 8, "layer_types": ["full_attention"] * 4, "num_kv_shared_layers": 0,
    },
    "gemma_4": {
        "global_head_dim": 32, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "moe_intermediate_size": None, "num_kv_shared_layers": 0,
    },
}  # fmt: skip


def converter_config(name: str, model_dir: Path, vocab_size: int) -> None:
    """Write a config.json with which the converter of a family begins."""
    architecture, source_class, model_type = FAMILIES.get(name, LLAMA)
    path = model_dir / "config.json"
    of_fixture = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with_config(model_dir, vocab_size, bos_token_id=1, eos_token_id=2)
    edit(
        path, architectures=[source_class], num_key_value_heads=2,
        head_dim=16, num_hidden_layers=4, sliding_window=64, original_max_position_embeddings=128,
        final_logit_softcapping=30.0, attn_logit_softcapping=50.0 if architecture == "gemma2" else None,
        **{"model_type": model_type, **CONVERTER_NEEDS.get(name, {}), **of_fixture},
    )  # fmt: skip


@pytest.mark.slow
def test_same_keys_as_llama_cpps_converter(tmp_path: Path, llama_cpp: Path) -> None:
    ours, jobs = {}, []
    for name, write in WRITERS.items():
        if name == "tekken_json_only":  # for which it needs Mistral's own library
            continue
        model_dir = tmp_path / name
        vocab_size = write(model_dir)
        converter_config(name, model_dir, vocab_size)
        architecture = FAMILIES.get(name, LLAMA)[0]
        vocabulary = read_vocabulary(model_dir, vocab_size, architecture=architecture)
        ours[name] = read_keys(write_gguf(vocabulary, tmp_path / f"{name}.ours"))
        jobs.append((str(model_dir), str(tmp_path / f"{name}.theirs")))
    command = [sys.executable, "-c", CONVERTER, str(llama_cpp), json.dumps(jobs)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for name, expected in ours.items():
        found = read_keys(tmp_path / f"{name}.theirs")
        if name.startswith("unigram") or name == "gemma_json_only":
            # other kinds of tokenizer, on purpose
            assert expected["tokenizer.ggml.model"] != found["tokenizer.ggml.model"]
            continue
        if name == "gemma_model_only":
            # user-defined pieces that only the model names are ordinary tokens, and its ids are not read
            for key in ("tokens", "scores", "token_type", "unknown_token_id", "padding_token_id"):
                assert expected.pop(f"tokenizer.ggml.{key}") != found.pop(f"tokenizer.ggml.{key}", None)
        if expected["tokenizer.ggml.model"] == "gpt2":
            assert found.pop("tokenizer.ggml.pre") == "replaced"
            del expected["tokenizer.ggml.pre"]
        if name == "gemma_4":
            # added tokens without a role are ordinary for it, so that only merges lead to them
            for kind, other in zip(
                expected.pop("tokenizer.ggml.token_type"), found.pop("tokenizer.ggml.token_type"), strict=True
            ):
                assert kind == other or (kind in SEARCHED_FIRST and other == gguf.TokenType.NORMAL)
        if name == "llama_2_json_only":
            # the converter gives all tokens the score -1000, see test_scores_come_from_merges_without_tokenizer_model
            assert set(found.pop("tokenizer.ggml.scores")) == {-1000.0}
            del expected["tokenizer.ggml.scores"]
        if name == "llama_2_model_only":
            # the converter looks up tokenizer_config.json's tokens in tokenizer.json only
            assert expected.pop("tokenizer.ggml.unknown_token_id") == 0
        assert expected == found, name

"""Models by name: the real client against a hub on loopback, each command in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from support.hub_server import TOKEN, HubServer, ServedModel, serving
from support.models import write_model
from support.published import Published, fp8, write_both

import lieq_gguf
from lieq_gguf.formats.imatrix_file import load_importance
from lieq_gguf.pipeline import Conversion
from lieq_gguf.sources.hub import is_hub_name
from lieq_gguf.sources.model_directory import ModelDirectory, model_name, repository_of

ROOT = Path(lieq_gguf.__file__).parents[1]
NAME = "some-lab/Tiny-0.8M-Chat"
QUICK = ("--types", "Q4_K", "--bits", "4.5", "--no-imatrix", "--threads", "1")
CARD = "---\nlicense: mit\nlanguage:\n- en\n---\n# A tiny model\n"
NOT_NEEDED = (
    "pytorch_model.bin", "original/consolidated.00.pth", "original/tokenizer.model", "onnx/model.onnx",
    "tiny-q4_k_m.gguf", "consolidated.safetensors", "vocab.json", ".gitattributes", "figure.png",
    "tekken.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with everything else that repositories hold, in a directory of the repository's name."""
    path = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("repositories") / NAME.split("/")[1]))
    (path / "README.md").write_text(CARD)
    (path / "added_tokens.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ messages }}")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    for name in NOT_NEEDED:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(b"not needed")
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, with one that its index does not name, as Mistral's repositories have."""
    path = write_model(tmp_path_factory.mktemp("repositories") / "sharded", max_shard_size="1MB")
    (path / "consolidated.safetensors").write_bytes(b"not in the index")
    return path


@pytest.fixture
def hub(folder: Path, sharded: Path) -> Iterator[HubServer]:
    with serving() as server:
        server.models[NAME] = ServedModel(folder)
        server.models["lab/sharded"] = ServedModel(sharded)
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty cache of the client."""
    return tmp_path / "hf"


def environment(home: Path, endpoint: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    return inherited | {
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }


def run(
    home: Path, endpoint: str, *arguments: object, cwd: Path | None = None, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lieq_gguf", *(str(a) for a in arguments)]
    variables = environment(home, endpoint) | (settings or {})
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=variables)


def plan(
    home: Path, hub: HubServer, name: str = NAME, *options: object, **settings: str
) -> subprocess.CompletedProcess[str]:
    """The cheapest command that needs a whole model."""
    return run(home, hub.endpoint, "plan", name, *QUICK, "--json", *options, settings=settings)


def document(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert (done.returncode, done.stdout) == (1, "")
    *_before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert [w for w in words if w not in last] == [], last


def keys(file: Path) -> dict[str, Any]:
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def leftovers(home: Path) -> list[Path]:
    return list(home.rglob("*.incomplete"))


# Which sources are names


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M", "01-ai/Yi_1.5", "models/mistyped"])
def test_names(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "path",
    [
        "./owner/name", "../owner", "/owner/name", "owner/name/deeper", "name", "owner/", "/name", "~/name", ".h/x",
        "owner/file.gguf", "owner/model.safetensors", "owner/config.json", "owner\\name", "owner/a name", "owner/..",
        "", "own--er/name", "owner/na..me", "owner/name-", "-owner/name", "owner/name.git", "öwner/name",
        "owner/name\n",
    ],
)  # fmt: skip
def test_paths(path: str) -> None:
    assert not is_hub_name(path)


def test_a_path_that_exists_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    assert is_hub_name("owner/name")
    (tmp_path / "owner/name").mkdir()
    assert not is_hub_name("owner/name")


def test_a_directory_is_never_asked_of_the_hub(home: Path, hub: HubServer, folder: Path) -> None:
    done = run(home, hub.endpoint, "plan", f"{NAME.split('/')[1]}", *QUICK, "--json", cwd=folder.parent)
    assert "download" not in document(done)["seconds"]
    assert hub.listed == []


def test_mistyped_directory(home: Path, hub: HubServer) -> None:
    assert_refused(plan(home, hub, "./no-such"), "does not exist; expected a model directory", "owner/name")
    assert hub.listed == []


def test_revision_of_a_directory_is_wrong_usage(home: Path, hub: HubServer, folder: Path) -> None:
    done = plan(home, hub, str(folder), "--revision", "main")
    assert done.returncode == 2
    assert "--revision" in done.stderr


# What a name becomes


def test_convert_gives_the_file_of_the_directory(home: Path, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    by_hand = tmp_path / "by-hand.gguf"
    assert run(home, hub.endpoint, "convert", folder, *QUICK, "-q", "-o", by_hand).returncode == 0
    done = run(home, hub.endpoint, "convert", NAME, *QUICK, "-q", "--json", cwd=tmp_path)
    found = document(done)
    assert done.stderr == ""
    assert found["output"] == "Tiny-0.8M-Chat-4.5bpw.gguf"
    assert next(iter(found["seconds"])) == "download"
    by_name = tmp_path / found["output"]

    ours, theirs = gguf.GGUFReader(by_name), gguf.GGUFReader(by_hand)
    assert ours.data[ours.data_offset :].tobytes() == theirs.data[theirs.data_offset :].tobytes()
    ours_keys, their_keys = keys(by_name), keys(by_hand)
    differing = {k for k in ours_keys | their_keys if ours_keys.get(k) != their_keys.get(k)}
    assert differing <= {
        "general.organization", "general.source.repo_url", "lieq.command_line", "lieq.file_bpw",
    }  # fmt: skip
    assert ours_keys["general.name"] == "Tiny 0.8M Chat"
    assert ours_keys["general.basename"] == "Tiny"
    assert ours_keys["general.finetune"] == "Chat"
    assert ours_keys["general.size_label"] == "0.8M"
    assert ours_keys["general.organization"] == "Some Lab"
    assert ours_keys["general.license"] == "mit"
    assert ours_keys["general.source.repo_url"] == f"https://huggingface.co/{NAME}"


def test_a_snapshot_is_named_after_its_repository(home: Path, folder: Path) -> None:
    snapshot = home / "hub/models--some-lab--Tiny-0.8M-Chat/snapshots" / ("0123456789" * 4)
    shutil.copytree(folder, snapshot)
    assert repository_of(snapshot) == NAME
    assert ModelDirectory(snapshot).spec.name == model_name(snapshot) == "Tiny-0.8M-Chat"
    assert (repository_of(folder), model_name(folder)) == (None, "Tiny-0.8M-Chat")


def test_only_what_is_needed_is_downloaded_and_only_once(home: Path, hub: HubServer, folder: Path) -> None:
    first = document(plan(home, hub))
    asked = hub.sent_files()
    needed = {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/tool.jinja",
    }  # fmt: skip
    assert set(asked) == {f"{NAME}/{file}" for file in needed}
    assert len(asked) == len(set(asked))
    assert set(NOT_NEEDED) < {p.relative_to(folder).as_posix() for p in folder.rglob("*")}

    second = document(plan(home, hub))
    assert hub.sent_files() == asked
    assert second["types"] == first["types"]


def test_shards_are_those_of_the_index(home: Path, hub: HubServer, sharded: Path) -> None:
    document(plan(home, hub, "lab/sharded"))
    shards = {file for file in hub.sent_files() if file.endswith(".safetensors")}
    assert shards == {f"lab/sharded/{p.name}" for p in sharded.glob("model-*.safetensors")}
    assert len(shards) > 1


def test_one_file_wins_over_an_index(home: Path, hub: HubServer, folder: Path, sharded: Path, tmp_path: Path) -> None:
    """Left over from an upload in several files; transformers takes the one file."""
    path = Path(shutil.copytree(folder, tmp_path / "both"))
    for left_over in sharded.glob("model*"):
        shutil.copy(left_over, path)
    hub.models["lab/both"] = ServedModel(path)
    document(plan(home, hub, "lab/both"))
    assert weights_sent(hub) == ["lab/both/model.safetensors"]


def test_score_and_imatrix_and_eval_take_names(
    home: Path, hub: HubServer, calibration_text: Path, conversion: Conversion, tmp_path: Path
) -> None:
    cheap = ("--calibration", calibration_text, "--n-tokens", 512, "--threads", 1)
    compare = ("--text", calibration_text, "--n-ctx", 64, "--chunks", 1, "--threads", 1, "--json")
    done = [
        run(home, hub.endpoint, "score", NAME, "--types", "Q4_K", *cheap, "-o", tmp_path / "scores.json"),
        run(home, hub.endpoint, "imatrix", NAME, *cheap, "-o", tmp_path / "imatrix.gguf"),
        run(home, hub.endpoint, "eval", conversion.output, "--reference", NAME, "--revision", "v1", *compare),
    ]
    assert [d.returncode for d in done] == [0] * 3, [d.stderr for d in done]
    assert json.loads((tmp_path / "scores.json").read_text())["model"] == "Tiny-0.8M-Chat"
    assert load_importance(tmp_path / "imatrix.gguf").n_tokens == 512
    assert 0 < json.loads(done[2].stdout)["kld"]["mean"] < 1
    assert len(hub.sent) == len(set(hub.sent))


def test_what_is_downloaded_is_said_unless_quiet(home: Path, hub: HubServer) -> None:
    spoken = plan(home, hub)
    assert "note: downloading 0.00" in spoken.stderr
    assert f"GB of weights for {NAME} to {home / 'hub'}" in spoken.stderr
    assert plan(home, hub).stderr == ""


@pytest.mark.parametrize("revision", ["v1", "COMMIT"])
def test_revisions(home: Path, hub: HubServer, revision: str) -> None:
    revision = hub.models[NAME].commit if revision == "COMMIT" else revision
    hub.models[NAME].revisions = ("main", "v1")
    document(plan(home, hub, NAME, "--revision", revision))
    assert document(plan(home, hub, NAME, "--revision", revision, HF_HUB_OFFLINE="1"))
    assert_refused(plan(home, hub, NAME, HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")  # the main branch was never asked for


def test_token_of_the_environment_is_used(home: Path, hub: HubServer) -> None:
    hub.models[NAME].private = True
    document(plan(home, hub, HF_TOKEN=TOKEN))


# Without a network


def test_offline_and_unreachable_use_the_cache(home: Path, hub: HubServer) -> None:
    name = "lab/sharded"
    online = document(plan(home, hub, name))
    n_listed = len(hub.listed)
    offline = plan(home, hub, name, HF_HUB_OFFLINE="1")
    assert document(offline)["types"] == online["types"]
    assert offline.stderr == ""
    assert len(hub.listed) == n_listed

    hub.is_down = True
    down = plan(home, hub, name)
    assert document(down)["types"] == online["types"]
    assert "using the copy in its cache" in down.stderr
    hub.endpoint = "http://127.0.0.1:9"  # discard: nobody listens
    assert document(plan(home, hub, name, "-q"))["types"] == online["types"]

    shard = next(home.rglob("snapshots/*/model-00002*"))
    shard.unlink()
    assert_refused(plan(home, hub, name, HF_HUB_OFFLINE="1"), "not completely", "HF_HUB_OFFLINE is set; unset it")


def test_offline_with_an_empty_cache(home: Path, hub: HubServer) -> None:
    assert_refused(plan(home, hub, HF_HUB_OFFLINE="1"), NAME, "HF_HUB_OFFLINE is set; unset it to download")
    assert hub.listed == []


def test_no_network_with_an_empty_cache(home: Path, hub: HubServer) -> None:
    hub.endpoint = "http://127.0.0.1:9"
    assert_refused(plan(home, hub), NAME, "127.0.0.1:9 does not answer", "check the network")


def test_hub_is_down(home: Path, hub: HubServer) -> None:
    hub.is_down = True
    assert_refused(plan(home, hub), "does not answer", "503")


# What goes wrong


def test_unknown_model(home: Path, hub: HubServer) -> None:
    assert_refused(plan(home, hub, "nobody/nothing"), "neither a directory nor a model of the hub", "hf auth login")


def test_private_model(home: Path, hub: HubServer) -> None:
    hub.models[NAME].private = True
    assert_refused(plan(home, hub), NAME, "if the model is private, log in: hf auth login")


def test_gated_model(home: Path, hub: HubServer) -> None:
    hub.models[NAME].gated = True
    assert_refused(plan(home, hub), "is gated; accept its licence at", f"{hub.endpoint}/{NAME}", "hf auth login")
    assert hub.sent == []


def test_unknown_revision(home: Path, hub: HubServer) -> None:
    assert_refused(plan(home, hub, NAME, "--revision", "v2"), "has no revision v2", f"{NAME}/tree/main")


def only(hub: HubServer, folder: Path, tmp_path: Path, **files: str) -> Path:
    """Serve the model with some of its files changed, or with '' gone."""
    path = Path(shutil.copytree(folder, tmp_path / "changed"))
    hub.models["lab/changed"] = ServedModel(path)
    for file, text in files.items():
        name = file.replace("__", ".")
        (path / name).write_text(text) if text else (path / name).unlink()
    return path


def weights_sent(hub: HubServer) -> list[str]:
    return [file for file in hub.sent_files() if file.endswith((".safetensors", ".bin", ".gguf"))]


def test_model_without_safetensors(home: Path, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    only(hub, folder, tmp_path, model__safetensors="")
    assert_refused(plan(home, hub, "lab/changed"), "model.safetensors", "it has", "config.json", "more")
    assert hub.sent == []


def test_model_without_tokenizer(home: Path, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    only(hub, folder, tmp_path, tokenizer__json="", tekken__json="")
    assert_refused(plan(home, hub, "lab/changed"), "has no tokenizer.json or tokenizer.model or tekken.json")
    assert hub.sent == []


def test_unsupported_architecture(home: Path, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    only(hub, folder, tmp_path, config__json='{"architectures": ["MambaForCausalLM"]}')
    assert_refused(plan(home, hub, "lab/changed"), "unsupported architecture MambaForCausalLM")
    assert weights_sent(hub) == []


def test_quantized_model(home: Path, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "eetq"}}
    only(hub, folder, tmp_path, config__json=json.dumps(config))
    assert_refused(plan(home, hub, "lab/changed"), "is quantised with eetq, which cannot be read")
    assert weights_sent(hub) == []


def test_model_published_in_fp8(home: Path, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """Its scales are in the files of its weights, so nothing else is downloaded."""
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path, _ = write_both(folder, Published(settings, fp8((128, 128))), tmp_path)
    hub.models["lab/fp8"] = ServedModel(path)
    done = plan(home, hub, "lab/fp8")
    assert "the weights are published in fp8" in done.stderr
    assert document(done)["layer_bpw"] == 4.5
    assert weights_sent(hub) == ["lab/fp8/model.safetensors"]


def test_index_that_names_what_is_not_there(home: Path, hub: HubServer, sharded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded, tmp_path / "changed"))
    next(path.glob("model-00002*")).unlink()
    hub.models["lab/changed"] = ServedModel(path)
    assert_refused(plan(home, hub, "lab/changed"), "lacks model-00002", "model.safetensors.index.json")
    assert weights_sent(hub) == []


def test_disk_too_small(home: Path, hub: HubServer) -> None:
    hub.claimed["model.safetensors"] = 10**17
    assert_refused(plan(home, hub), "take 1e+08 GB", str(home), "left", "HF_HOME")
    assert weights_sent(hub) == []


def test_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert_refused(plan(tmp_path / "file/hf", hub), "cannot be stored in", "Not a directory", "HF_HOME")


def test_output_is_checked_before_a_download(home: Path, hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "Tiny-0.8M-Chat-4.5bpw.gguf").touch()
    done = run(home, hub.endpoint, "convert", NAME, *QUICK, cwd=tmp_path)
    assert_refused(done, "exists already")
    assert (hub.listed, hub.sent) == ([], [])


# Interruptions


def test_a_connection_that_breaks_is_taken_up_where_it_broke(home: Path, hub: HubServer, tmp_path: Path) -> None:
    # larger than what the client reads at a time
    wide = write_model(tmp_path / "wide", hidden_size=512, intermediate_size=2048)
    weights = (wide / "model.safetensors").read_bytes()
    hub.models["lab/wide"] = ServedModel(wide)
    hub.cut["model.safetensors"] = len(weights) - 1_000_000
    document(plan(home, hub, "lab/wide"))
    start, resumed = (first for file, first in hub.sent if file.endswith("model.safetensors"))
    assert start == 0 < resumed < len(weights)
    assert next(home.rglob("snapshots/*/model.safetensors")).read_bytes() == weights


def test_the_next_run_downloads_only_the_rest(home: Path, hub: HubServer, sharded: Path) -> None:
    shards = sorted(p.name for p in sharded.glob("model-*.safetensors"))
    hub.broken[shards[-1]] = 500
    assert_refused(plan(home, hub, "lab/sharded"), "does not answer", "500", "continues where it stopped")
    assert leftovers(home) == []
    assert weights_sent(hub) == [f"lab/sharded/{shard}" for shard in shards[:-1]]
    hub.broken.clear()
    hub.sent.clear()
    document(plan(home, hub, "lab/sharded"))
    assert hub.sent_files() == [f"lab/sharded/{shards[-1]}"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_nothing_broken(
    home: Path, hub: HubServer, tmp_path: Path, number: signal.Signals, exit_code: int
) -> None:
    hub.held.add("model.safetensors")
    command = [sys.executable, "-m", "lieq_gguf", "convert", NAME, *QUICK]
    before = signal.signal(number, signal.SIG_DFL)  # what a shell starts in the background ignores interrupts
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=environment(home, hub.endpoint),
    ) as process:  # fmt: skip
        signal.signal(number, before)
        try:
            assert hub.is_holding.wait(60)
            process.send_signal(number)
            _, errors = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode == exit_code
    assert "Traceback" not in errors
    assert leftovers(home) == []
    assert list(tmp_path.glob("*.gguf")) == []
    hub.held.clear()
    document(plan(home, hub))

"""Our F16 file against the one that llama.cpp's convert_hf_to_gguf.py makes, and against the model in transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lieq_gguf.evaluation.reference import open_reference
from lieq_gguf.native.llama_cpp import open_model

CACHE = Path(__file__).parent.parent.parent / "build" / "llama.cpp"
_N_TOKENS = 128  # more than the windows of the tiny models
OURS_ALONE = ("lieq.",)
# All in one process: importing torch and transformers takes longer than the conversions.
_TOLD = """
import json, sys
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import ModelBase, TextModel
recognise, load = TextModel.get_vocab_base_pre, ModelBase.load_hparams
read = lambda folder, is_mistral_format: json.loads((folder / "config.json").read_text())
for model, target, name, options, without_defaults in jobs:
    ModelBase.load_hparams = staticmethod(read if without_defaults else load)
    TextModel.get_vocab_base_pre = (lambda self, tokenizer: name) if name else recognise
    sys.argv = ["convert_hf_to_gguf.py", model, "--outtype", "f16", "--outfile", target, *options]
    convert_hf_to_gguf.main()
"""


@dataclass(frozen=True)
class Comparison:
    """Two files of the same model.

    Attributes:
        n_tensors: Tensors that are equal in name, shape, type and bytes.
        n_keys: Metadata keys that are equal.
        tensors: What differs, by name.
        keys: The same of the metadata.
    """

    n_tensors: int
    n_keys: int
    tensors: dict[str, str]
    keys: dict[str, str]

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs that should not."""
        return not self.tensors and not self.keys


@dataclass(frozen=True)
class Job:
    """A model directory that the converter is to make a file of.

    Attributes:
        model: The directory.
        ours: Our file of it, which tells the pre-tokenizer that we have recognised.
        theirs: The file to write.
        options: What the converter has to be told.
        without_defaults: Whether it reads config.json alone, without what transformers has where there is nothing.
    """

    model: Path
    ours: Path
    theirs: Path
    options: tuple[str, ...] = ()
    without_defaults: bool = False


def run_converter(jobs: Sequence[Job], source: Path) -> None:
    """Run llama.cpp's converter, told the pre-tokenizers.

    Args:
        jobs: Files to write.
        source: Folder with the converter.

    Raises:
        RuntimeError: if the converter fails, in its own words.
    """
    arguments = [
        (str(job.model), str(job.theirs), _pre_tokenizer(job.ours), job.options, job.without_defaults) for job in jobs
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", _TOLD, str(source), json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    missing = [str(job.model) for job in jobs if not job.theirs.is_file()]
    if done.returncode != 0 or missing:
        raise RuntimeError(f"llama.cpp's converter fails, first on {missing[:1]}: {done.stderr.strip()[-600:]}")


def compare_files(ours: Path, theirs: Path) -> Comparison:
    """Every tensor and every metadata key of both."""
    files = [gguf.GGUFReader(file) for file in (ours, theirs)]
    tensors, n_tensors = differences(*({t.name: _tensor(t) for t in file.tensors} for file in files))
    keys, n_keys = differences(*(_values(file) for file in files))
    return Comparison(n_tensors, n_keys, tensors, keys)


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[dict[str, str], int]:
    """What is not the same in both, in words, and the number of entries that are."""
    found = {name: f"only in the converter's file: {_short(theirs[name])}" for name in theirs.keys() - ours.keys()}
    found |= {name: f"only in ours: {_short(ours[name])}" for name in ours.keys() - theirs.keys()}
    common = ours.keys() & theirs.keys()
    other = {name for name in common if ours[name] != theirs[name]}
    found |= {name: f"{_short(ours[name])}, the converter {_short(theirs[name])}" for name in other}
    return dict(sorted(found.items())), len(common) - len(other)


def compare_logits(model: Path, file: Path) -> tuple[float, float]:
    """Top-1 agreement, and largest difference by standard deviation, of a file and its model in transformers."""
    with open_reference(model, _N_TOKENS, 1) as reference, open_model(file, n_ctx=_N_TOKENS) as written:
        ids = np.random.default_rng(0).integers(8, reference.n_vocab - 8, _N_TOKENS).tolist()
        expected, found = reference.logits(ids), written.logits(ids)
    agreement = (expected.argmax(-1) == found.argmax(-1)).mean()
    return float(agreement), float(np.abs(found - expected).max() / expected.std())


def _pre_tokenizer(file: Path) -> str:
    """The name a file has for it, or nothing where the converter needs none."""
    field = gguf.GGUFReader(file).get_field("tokenizer.ggml.pre")
    return "" if field is None or field.contents() == "default" else str(field.contents())


def _tensor(tensor: gguf.ReaderTensor) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.tensor_type.name, tuple(int(n) for n in tensor.shape), np.ascontiguousarray(tensor.data).tobytes()


def _values(file: gguf.GGUFReader) -> dict[str, Any]:
    fields = {name: field for name, field in file.fields.items() if not name.startswith(("GGUF.", *OURS_ALONE))}
    return {name: (tuple(kind.name for kind in field.types), field.contents()) for name, field in fields.items()}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:87]}..."

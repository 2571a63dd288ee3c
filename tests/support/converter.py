"""Our F16 file against the one that llama.cpp's convert_hf_to_gguf.py makes, and against the model in transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from lieq_gguf.evaluation.reference import open_reference
from lieq_gguf.native.llama_cpp import open_model
from support.requests import convert_plainly

CACHE = Path(__file__).parent.parent.parent / "build" / "llama.cpp"
_N_TOKENS = 128  # more than the windows of the tiny models
OURS_ALONE = ("lieq.",)
_TOLD = """
import sys
sys.path[:0] = [{source!r}, {source!r} + "/gguf-py"]
import convert_hf_to_gguf
from conversion.base import TextModel
if {name!r}:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: {name!r}
sys.argv = ["convert_hf_to_gguf.py", {model!r}, "--outtype", "f16", "--outfile", {target!r}]
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
        top_1: Share of positions at which our file and transformers prefer the same token.
        logit_difference: Largest difference of a logit, by the standard deviation of all logits.
    """

    n_tensors: int
    n_keys: int
    tensors: dict[str, str]
    keys: dict[str, str]
    top_1: float
    logit_difference: float

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs that should not."""
        return not self.tensors and not self.keys


def compare(model: Path, source: Path, scratch: Path) -> Comparison:
    """Convert a model directory in both ways and compare.

    Args:
        model: Model directory.
        source: Folder with llama.cpp's converter.
        scratch: Folder for the files.

    Raises:
        RuntimeError: if the converter fails, in its own words.
    """
    ours, theirs = scratch / f"{model.name}-ours.gguf", scratch / f"{model.name}-theirs.gguf"
    ours.unlink(missing_ok=True)
    convert_plainly(model, ours)
    our_file = gguf.GGUFReader(ours)
    pre = our_file.get_field("tokenizer.ggml.pre")
    name = pre.contents() if pre is not None and pre.contents() != "default" else ""
    run_converter(model, theirs, source, str(name))
    their_file = gguf.GGUFReader(theirs)
    tensors, n_tensors = differences(*({t.name: _tensor(t) for t in f.tensors} for f in (our_file, their_file)))
    keys, n_keys = differences(_values(our_file), _values(their_file))
    return Comparison(n_tensors, n_keys, tensors, keys, *compare_logits(model, ours))


def run_converter(model: Path, target: Path, source: Path, pre_tokenizer: str) -> None:
    """Run llama.cpp's converter, told the pre-tokenizer unless that is empty."""
    code = _TOLD.format(source=str(source), name=pre_tokenizer, model=str(model), target=str(target))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if done.returncode != 0 or not target.is_file():
        raise RuntimeError(f"llama.cpp's converter fails on {model}: {done.stderr.strip()[-600:]}")


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


def _tensor(tensor: gguf.ReaderTensor) -> tuple[str, tuple[int, ...], bytes]:
    return tensor.tensor_type.name, tuple(int(n) for n in tensor.shape), np.ascontiguousarray(tensor.data).tobytes()


def _values(file: gguf.GGUFReader) -> dict[str, Any]:
    fields = {name: field for name, field in file.fields.items() if not name.startswith(("GGUF.", *OURS_ALONE))}
    return {name: (tuple(kind.name for kind in field.types), field.contents()) for name, field in fields.items()}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 90 else f"{text[:87]}..."

"""Imports point one way: a module takes from its own rank or from a lower one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import lieq_gguf

PACKAGE = Path(lieq_gguf.__file__).parent
RANKS = (
    ("__init__", "errors", "quant_types", "devices"),
    ("records",),
    (
        "ggml", "encoders", "code_layouts", "engine", "gguf_file", "gguf_header", "sources", "architectures",
        "tokenizers", "progress", "native_output",
    ),
    (
        "calibration", "calibration_text", "llama_cpp_pass", "layer_model", "experts", "observers",
        "type_errors", "scorers", "cache", "allocation", "compensation", "refinement", "knapsack", "decode_costs",
        "type_speed",
        "writer", "verification", "benchmark", "generation", "inspection", "display", "reference", "evaluation",
        "tasks", "health",
    ),
    ("pipeline",),
    ("cli",),
    ("__main__",),
)  # fmt: skip
RANK_OF = {name: rank for rank, names in enumerate(RANKS) for name in names}
# the encoders; the type of llama.cpp's log callback; emptying C's own buffer
WITH_CTYPES = {"ggml.py", "engine.py", "native_output.py"}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imported(code: str) -> list[str]:
    """Full names of everything a module imports, also inside functions and for type checking alone."""
    names = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def part_of(name: str) -> str | None:
    """The part of the package that a full name belongs to; None for another package."""
    first, _, rest = name.partition(".")
    if first != "lieq_gguf":
        return None
    part = rest.split(".")[0]
    return "__init__" if part == "" or part.startswith("__") else part


def breaches(part: str, code: str) -> list[str]:
    """Imports of a module in ``part`` that point upwards or into a part without a rank."""
    top = RANK_OF[part]
    parts = [(name, part_of(name)) for name in imported(code)]
    return [name for name, other in parts if other is not None and RANK_OF.get(other, len(RANKS)) > top]


def part_of_file(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_part_of_the_package_has_a_rank() -> None:
    assert {part_of_file(file) for file in MODULES} == RANK_OF.keys()


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_do_not_point_upwards(file: Path) -> None:
    assert breaches(part_of_file(file), file.read_text(encoding="utf-8")) == []


def test_ctypes_stays_in_its_modules() -> None:
    users = {
        str(file.relative_to(PACKAGE))
        for file in MODULES
        if any(name.split(".")[0] == "ctypes" for name in imported(file.read_text(encoding="utf-8")))
    }
    assert users == WITH_CTYPES


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("errors", "from lieq_gguf.records.spec import ModelSpec"),
        ("records", "from lieq_gguf import ggml"),
        ("ggml", "import lieq_gguf.writer"),
        ("allocation", "def f():\n    from lieq_gguf.pipeline import convert"),
        ("writer", "if TYPE_CHECKING:\n    from lieq_gguf import cli"),
        ("pipeline", "from lieq_gguf.cli import app"),
        ("pipeline", "from lieq_gguf.unheard_of import x"),
    ],
)
def test_a_made_up_breach_is_found(part: str, code: str) -> None:
    assert len(breaches(part, code)) == 1


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("cli", "from lieq_gguf import __version__, pipeline"),
        ("writer", "import numpy as np\nfrom lieq_gguf import ggml\nfrom lieq_gguf.sources import model_directory"),
        ("tokenizers", "from lieq_gguf.engine import open_model"),
        ("errors", "import json"),
    ],
)
def test_imports_of_the_same_or_a_lower_rank_are_no_breach(part: str, code: str) -> None:
    assert breaches(part, code) == []

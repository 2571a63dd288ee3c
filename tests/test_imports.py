"""What may be imported where; the direction of imports is a contract in pyproject.toml."""

from __future__ import annotations

import ast
from pathlib import Path

import lieq_gguf

PACKAGE = Path(lieq_gguf.__file__).parent


def imported(code: str) -> set[str]:
    """First names of everything a module imports, also inside functions and for type checking alone."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            names.add(str(node.module).split(".")[0])
    return names


def test_ctypes_stays_in_one_room() -> None:
    users = {file for file in PACKAGE.rglob("*.py") if "ctypes" in imported(file.read_text(encoding="utf-8"))}
    assert {file.relative_to(PACKAGE).parts[0] for file in users} == {"native"}

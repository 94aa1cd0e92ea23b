"""What an error box calls the pack's own errors; ComfyUI's `full_type_name` begins with the class's module."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path

import pytest

from comfyui_server import comfyui_found, comfyui_path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("checkpoints", "families", "host", "memory", "nodes", "ops", "stream", "wan")


def own_errors() -> list[tuple[str, str]]:
    """Module and name of each exception class that the pack defines."""
    found = []
    for path in (path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("Error" in ast.unparse(base) for base in node.bases):
                module = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
                found.append((f"streamblocks.{module}", node.name))
    return found


def _class(module: str, name: str) -> type:
    found = getattr(importlib.import_module(module), name)
    assert isinstance(found, type)
    return found


@pytest.fixture(scope="module")
def full_type_name() -> Callable[[type], str]:
    """ComfyUI's own function, without the import of its server."""
    if not comfyui_found():
        pytest.skip("real ComfyUI not found: set COMFYUI_PATH")
    tree = ast.parse((comfyui_path() / "execution.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "full_type_name"]
    names: dict[str, Callable[[type], str]] = {}
    exec(compile(tree, "execution.py", "exec"), names)
    return names["full_type_name"]


def test_errors_name_no_module() -> None:
    errors = own_errors()
    assert {"CheckpointError", "HubSilentError", "EditRefusedError"} <= {name for _, name in errors}
    told = [f"{module}.{name}" for module, name in errors if _class(module, name).__module__ != "builtins"]
    assert told == []


def test_error_boxes_begin_with_no_module_path(full_type_name: Callable[[type], str]) -> None:
    errors = own_errors()
    shown = [full_type_name(_class(module, name)) for module, name in errors]
    assert shown == [name for _, name in errors]

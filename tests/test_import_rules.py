"""Which room may import which; see docs/architecture.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("nodes", "stream", "wan", "ops", "memory")
ALLOWED = {
    "nodes": {"stream", "memory", "host", "wan.tiny_model", "ops.quantization"},
    "stream": {"wan", "ops", "memory"},
    "wan": {"ops"},
    "ops": set(),
    "memory": set(),
}
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "server", "nodes", "execution"}
FILES = [path for room in ROOMS for path in sorted((ROOT / room).glob("*.py"))]


def imports(path):
    """(level, module) of each import; `from .. import host` counts as module `host`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, name) for name in names)
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


def is_allowed(module, allowed):
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_arrows_point_one_way(path):
    room = path.parent.name
    for level, module in imports(path):
        if level == 2:
            assert is_allowed(module, ALLOWED[room]), f"{room} imports {module}"
        elif level == 0:
            top = module.partition(".")[0]
            assert top != "streamblocks", "imports inside the package are relative"
            if top in HOST_MODULES:
                assert room == "nodes" and module == "comfy_api.latest", f"{room} imports {module}"


def test_only_the_node_room_and_the_host_know_comfyui():
    assert {module.partition(".")[0] for level, module in imports(ROOT / "host.py") if level == 0} >= {"comfy"}


def test_files_are_small():
    assert [str(path) for path in [*FILES, ROOT / "host.py"] if len(path.read_text().splitlines()) > 300] == []

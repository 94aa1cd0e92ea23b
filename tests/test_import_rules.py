"""Which room may import which; see docs/architecture.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A room is a folder, or a room within a room; each lists what it may import.
ALLOWED = {
    "": {"nodes"},
    "nodes": {"stream", "memory", "host", "wan.tiny_model", "families", "ops.quantization"},
    "host": {
        "memory",
        "stream.residency",
        "stream.live_control",
        "stream.live_news",
        "stream.picture_encoding",
        "stream.code_consent",
        "stream.code_files",
        "stream.shown_code",
    },
    "stream": {"wan.family", "families", "checkpoints", "ops", "memory"},
    "wan.geometry": {"families.model_family"},
    "wan.presets": {"families"},
    "wan": {
        "wan.geometry",
        "wan.presets",
        "wan.checkpoints",
        "wan.steps",
        "wan.transformer",
        "wan.vae",
        "families",
        "checkpoints",
        "ops",
        "memory",
    },
    "wan.checkpoints": {"wan.geometry", "wan.transformer", "wan.vae", "families", "checkpoints", "ops"},
    "wan.steps": {"wan.transformer", "wan.vae", "families.kv_policies", "families.step_list"},
    "wan.transformer": {"ops"},
    "wan.vae": {"ops", "memory.way_back"},
    "families": {"checkpoints", "ops", "memory.pipeline_facts"},
    "checkpoints": {"ops"},
    "ops": set(),
    "memory": set(),
    "tools": {"wan", "checkpoints", "stream", "ops", "memory"},
}
# Rooms that know no model by name; "stream" joins them with its family registry as the one exception.
NAMELESS_ROOMS = ("memory", "ops", "stream", "checkpoints", "families")
# Where families are registered.
MAY_NAME_MODELS = {"stream.known_families"}
# Not "want", but "WanTransformer".
MODEL_NAMES = re.compile(r"(?i:wan(?!t)|krea|umt5|self.?forcing)|Wan[A-Z]")
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "server", "nodes", "execution"}
MAY_NAME_HOST = {"host": HOST_MODULES, "nodes": {"comfy_api"}, "": {"comfy_api"}, "tools": HOST_MODULES}


def room_of(module):
    """The innermost room that a module, written from the pack's root, lies in."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in ALLOWED), "")


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = [
    path
    for path in (*ROOT.glob("*.py"), *(path for room in sorted(ROOT.iterdir()) for path in sorted(room.rglob("*.py"))))
    if (path.relative_to(ROOT).parts[0] in ALLOWED or path.parent == ROOT)
]


def imports(path):
    """(module from the pack's root, or None, and the module as written) of each import."""
    package = module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((".".join([*base, name]), None) for name in names)
        elif isinstance(node, ast.ImportFrom):
            yield None, node.module
        elif isinstance(node, ast.Import):
            yield from ((None, alias.name) for alias in node.names)


def is_allowed(module, allowed):
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_arrows_point_one_way(path):
    room = room_of(module_of(path))
    for inside, outside in imports(path):
        if inside is not None and room_of(inside) != room:
            assert is_allowed(inside, ALLOWED[room]), f"{room or 'the root'} imports {inside}"
        elif outside is not None:
            top = outside.partition(".")[0]
            assert top != "streamblocks", "imports inside the package are relative"
            assert top not in HOST_MODULES - MAY_NAME_HOST.get(room, set()), f"{room} imports {outside}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(module_of(path)) in NAMELESS_ROOMS], ids=module_of)
def test_a_nameless_room_names_no_model(path):
    """Not even in a comment: what holds for one model belongs in its family's room."""
    if module_of(path) not in MAY_NAME_MODELS:
        lines = enumerate(path.read_text().splitlines(), 1)
        assert [(number, line) for number, line in lines if MODEL_NAMES.search(line)] == []


def test_the_names_of_models_are_found():
    named = ("WanTransformer3DModel", "from ..wan.steps", "self-forcing", "Self Forcing", "Krea's", "UMT5EncoderModel")
    assert all(MODEL_NAMES.search(text) for text in named)
    assert not any(MODEL_NAMES.search(text) for text in ("what a user wants", "unwanted", "forcing itself"))


def test_the_rules_have_no_circle():
    inside = {room: {room_of(name) for name in names} - {room} for room, names in ALLOWED.items()}
    left = dict(inside)
    while left:
        free = [room for room, needs in left.items() if not needs & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for room in free:
            del left[room]


def test_every_file_of_the_pack_has_a_room():
    """So that every module of a new folder is covered by a rule."""
    looked_at = {module_of(path) for path in FILES}
    assert {"host.progress", "__init__", "nodes.loader", "tools.run_workflow", "tools.train_mini.scenes"} <= looked_at
    # Tests and benchmarks may import anything, and untracked files are not part of the pack.
    skipped = {"tests", "benchmarks"}
    folders = {path.parent for path in ROOT.glob("*/*.py") if not path.parent.name.startswith(".")}
    assert {folder.name for folder in folders} - skipped <= set(ALLOWED)


def test_files_are_small():
    """A habit: a longer file must be one subject that would read worse in two files."""
    assert [module_of(path) for path in FILES if len(path.read_text().splitlines()) > 350] == []

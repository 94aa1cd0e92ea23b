"""Repositories whose every Python file leaves a mark when it runs, and whose every config names such a file."""

import json
import shutil
from pathlib import Path

from foreign_repository import BLOCKS_PY, write_foreign_repository

AUTO_CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "ModularPipelineBlocks")
# Where each name stands for a class of a canary, as diffusers and transformers write it.
_NAMES = dict.fromkeys(AUTO_CLASSES, "canary.Canary") | {"AutoTokenizer": ["canary.Canary", "canary.Canary"]}


def write_canary_folder(folder: Path, tiny_folder: Path, canary: Path) -> Path:
    """The tiny model, with a canary in each folder, named by each config: built-in blocks can load it."""
    shutil.copytree(tiny_folder, folder)
    for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        for name in ("canary.py", "__init__.py", "pipeline.py"):
            (place / name).write_text(singing(canary) + "class Canary: pass\n")
        for config in place.glob("*config.json"):
            config.write_text(json.dumps(json.loads(config.read_text()) | {"auto_map": _NAMES}))
    return folder


def write_canary_repository(folder: Path, tiny_folder: Path, canary: Path, *, tokenizer: bool = False) -> Path:
    """A repository with blocks of its own that are a canary; with `tokenizer`, its tokenizer names one, too."""
    write_foreign_repository(folder, tiny_folder)
    (folder / "blocks.py").write_text(singing(canary) + BLOCKS_PY)
    if tokenizer:
        config = folder / "tokenizer" / "tokenizer_config.json"
        config.write_text(
            json.dumps(json.loads(config.read_text()) | {"auto_map": _NAMES, "tokenizer_class": "Canary"})
        )
        # transformers looks for it in the repository itself.
        for place in (folder, folder / "tokenizer"):
            (place / "canary.py").write_text(singing(canary.with_name("tokenizer_canary")))
    return folder


def singing(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()\n"

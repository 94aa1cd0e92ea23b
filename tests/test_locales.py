"""The texts in `locales/` and the nodes' pages: of all that there is, of nothing else, and Chinese in Chinese."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from chinese_texts import all_english_words, is_chinese

from streamblocks.tools.write_locales import as_file, in_order, paths_of

from embedded_program import NODES, needs_embedded_host

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
PAGES = ROOT / "web/docs"
PLACE = re.compile(r"\{(\w+)\}")
# What the page's own message format would read as a place, a link or a plural, in all texts but tooltips.
OF_MESSAGE_FORMAT = re.compile(r"[{}@|$]")
# In bold on the sampler's pages.
PARAGRAPHS = {"Steer", "Stop and keep", "Do it again", "引导", "停止并保留", "再来一次"}


def texts_of(language: str, name: str) -> dict[str, Any]:
    return dict(json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8")))


def leaves(texts: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    for keys in paths_of(texts):
        value: Any = texts
        for key in keys:
            value = value[key]
        yield keys, value


@needs_embedded_host
def test_the_english_texts_are_those_of_the_schemas() -> None:
    program = [sys.executable, str(ROOT / "tools/write_locales.py"), "--print"]
    schemas = json.loads(subprocess.run(program, capture_output=True, text=True, check=True, timeout=120).stdout)
    assert set(schemas) == set(NODES)
    assert (LOCALES / "en/nodeDefs.json").read_text(encoding="utf-8") == as_file(schemas), (
        "run python tools/write_locales.py"
    )


def test_each_text_of_a_node_is_there_in_chinese_and_no_other() -> None:
    english, chinese = texts_of("en", "nodeDefs"), texts_of("zh", "nodeDefs")
    assert list(paths_of(chinese)) == list(paths_of(english))
    for keys, text in leaves(chinese):
        assert isinstance(text, str) and text.strip() and is_chinese(text), keys
    assert all_english_words(text for _, text in leaves(chinese)) == {}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_reads_names_and_descriptions_as_they_are_written(language: str) -> None:
    for keys, text in leaves(texts_of(language, "nodeDefs")):
        assert keys[-1] == "tooltip" or "options" in keys or not OF_MESSAGE_FORMAT.search(text), keys
        # As the page looks them up.
        assert "options" in keys or not any("." in key for key in keys)


def test_texts_are_sorted_after_the_english_ones() -> None:
    assert in_order({"b": {"y": 1, "x": 2, "gone": 3}, "a": 4}, {"a": 0, "b": {"x": 0, "y": 0, "new": 0}}) == {
        "a": 4,
        "b": {"x": 2, "y": 1},
    }


def test_messages_are_there_in_chinese_with_the_same_places() -> None:
    english, chinese = (texts_of(language, "main")["streamblocks"] for language in ("en", "zh"))
    for kind in ("page", "says"):
        assert set(english[kind]) == set(chinese[kind])
        for name, text in english[kind].items():
            assert sorted(set(PLACE.findall(text))) == sorted(set(PLACE.findall(chinese[kind][name]))), name
        assert all_english_words(chinese[kind].values()) == {}


def test_titles_and_notes_of_the_examples_are_there_in_chinese() -> None:
    there = set()
    for path in (ROOT / "example_workflows").glob("*.json"):
        for node in json.loads(path.read_text())["nodes"]:
            there |= {node["title"]} if "title" in node else set()
            there |= set(node["widgets_values"]) if "Note" in node["type"] else set()
    translated = texts_of("zh", "main")["streamblocks"]["examples"]
    assert set(translated) == there
    assert all_english_words(translated.values()) == {}


def test_each_node_has_its_pages() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == set(NODES)
    assert {path.parent.name for path in PAGES.glob("*/zh.md")} == set(NODES)
    assert all_english_words(path.read_text(encoding="utf-8") for path in PAGES.glob("*/zh.md")) == {}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_pages_name_the_inputs_and_nothing_that_is_not_there(language: str) -> None:
    for node, texts in texts_of(language, "nodeDefs").items():
        page = PAGES / f"{node}.md" if language == "en" else PAGES / node / f"{language}.md"
        bold = set(re.findall(r"\*\*([^*]+)\*\*", page.read_text(encoding="utf-8")))
        inputs = {given["name"] for given in texts["inputs"].values()}
        outputs = {output["name"] for output in texts["outputs"].values()}
        assert inputs - bold == set(), page
        assert bold - inputs - outputs - PARAGRAPHS == set(), page


def test_each_refusal_of_the_server_has_a_text_in_the_page() -> None:
    files = [*(ROOT / "host").glob("*.py"), *(ROOT / "nodes").glob("*.py"), ROOT / "stream/live_control.py"]
    used = {found for file in files for found in re.findall(r'"(refused_\w+)"', file.read_text(encoding="utf-8"))}
    assert "refused_stopping" in used
    for language in ("en", "zh"):
        page = texts_of(language, "main")["streamblocks"]["page"]
        assert {name for name in page if name.startswith("refused_")} == used

"""Dates in the names of saved files, with a clock that stands, and names that are refused."""

import pytest

from embedded_program import needs_embedded_host, run_in_host

# Expected as the page's own expansion writes it for ComfyUI's nodes.
EXPANDED = {
    "video/%date:yyyy-MM-dd%/stream": "video/2026-03-04/stream",
    "%date:yy.M.d_h-m-s%": "26.3.4_5-6-7",
    "a %date:hhmmss% b %date:MM%": "a 050607 b 03",
    "%date:hh:mm%": "05_06",
    "%date:%x": "x",
    "plain 100%": "plain 100%",
    "%width%": "%width%",
    "%date:yyyy": "%date:yyyy",
}
REFUSED = (
    "../out",
    "a/../b",
    "a\\..\\b",
    "%date:../%x",
    "line\nbreak",
    "nul\0",
    "%date:yyyy\r%",
    "c1\x85",
    "\u202egpm.4",
)


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    return run_in_host(
        tmp_path_factory.mktemp("names"),
        f"""
import importlib, time
files = importlib.import_module(PACK + ".host.files_made")
clock = time.struct_time((2026, 3, 4, 5, 6, 7, 2, 63, 0))
expanded = {{text: files.expand_dates(text, clock) for text in {list(EXPANDED)!r}}}
files.time = type("time", (), {{"localtime": staticmethod(lambda: clock)}})
path, shown = files.new_output_file("d/%date:yyyy-MM-dd%_%width%", ".mp4", width=64, height=32)
refused = {{}}
for text in {list(REFUSED)!r}:
    try:
        refused[text] = str(files.new_output_file(text, ".mp4", width=1, height=1)[0])
    except ValueError as error:
        refused[text] = str(error)
on_disk = importlib.import_module(PACK + ".host.models_on_disk")
models = {{}}
for text in {list(REFUSED)!r}:
    try:
        models[text] = str(on_disk.new_transformer_file(text))
    except ValueError as error:
        models[text] = str(error)
report(models=models, expanded=expanded, path=str(path.relative_to(host.output)), shown=shown, refused=refused,
       made=sorted(path.name for path in host.output.rglob("*")))
""",
    )


@needs_embedded_host
def test_dates_are_expanded_as_the_page_does(facts):
    assert facts["expanded"] == EXPANDED
    assert facts["path"] == "d/2026-03-04_64_00001_.mp4"
    assert facts["shown"] == {"filename": "2026-03-04_64_00001_.mp4", "subfolder": "d", "type": "output"}


@needs_embedded_host
@pytest.mark.parametrize("name", REFUSED)
def test_bad_names_are_refused_in_one_sentence(facts, name):
    assert facts["refused"][name].startswith("filename_prefix is ") and "\n" not in facts["refused"][name]
    # Dates are expanded in prefixes only.
    assert "%date" in name or facts["models"][name].startswith("name is ")
    assert "\n" not in facts["models"][name]
    assert facts["made"] == ["d"]

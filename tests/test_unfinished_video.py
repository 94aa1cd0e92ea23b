"""What is left of a stream that was cancelled or failed: a video in the output folder, and a link to it on the node."""

import errno
import json
from pathlib import Path

import av
import pytest

from streamblocks.stream import unfinished_video
from streamblocks.stream.unfinished_video import move_unfinished

from embedded_program import needs_embedded_host, run_in_host

PROGRAM = """
import errno, importlib, torch
from server import PromptServer
events, spoken_to, messages = [], set(), []
server = PromptServer.instance
hear = server.send_sync
def send(event, data, sid=None):
    if event == "streamblocks.unfinished":
        events.append([data, sid])
    if event == "streamblocks.says":
        spoken_to.add(sid)
        messages.append([data["node"], data["workflow"], data["id"], data["values"], data["text"]])
    hear(event, data, sid)
server.send_sync = send
live_tensor_bytes = importlib.import_module(PACK + ".memory.tensor_bytes").live_tensor_bytes
sampler |= {"steps": 1, "keep_frames": "all"}
workflow["id"] = "of this page"
first = run()[0][1].clone()
def clear_temp():
    for finished in host.temp.glob("*.mp4"):
        finished.unlink()
clear_temp()
bytes_before = live_tensor_bytes()
folder = host.output / "streamblocks/unfinished"
scenes = {}
def play(name, **changes):
    before, heard, seen_events = set(folder.glob("*.mp4")), len(said), len(events)
    try:
        run(**changes)
        kind = ""
    except BaseException as error:
        kind = type(error).__name__
    scenes[name] = {
        "kind": kind, "new": sorted(map(str, set(folder.glob("*.mp4")) - before)),
        "temp": sorted(path.name for path in host.temp.rglob("*.mp4")),
        "said": said[heard:], "events": events[seen_events:], "stopped_at": seen[-1][0],
    }
# The progress bar shows 0 before the first step, and with one step a block 3 within block 3.
cancel_at.append(0)
play("cancelled in block 1", steps=2)
cancel_at.append(3)
play("cancelled after block 2", steps=1)
cancel_at.append(1)
play("cancelled again")
bytes_after = live_tensor_bytes()
equal = torch.equal(first, run()[0][1])
clear_temp()
names = (".host", ".stream.unfinished_video", ".nodes.node_watcher")
of_host, kept, watching = (importlib.import_module(PACK + name) for name in names)
before_pass = watching.NodeWatcher.before_pass
def fail_in_block_3(self, index):
    if self._blocks_done == 2:
        raise KeyError("of another pack")
    before_pass(self, index)
looks = 0
look = of_host.throw_if_cancelled
def cancel_in_look_150():
    global looks
    looks += 1
    if looks == 150:
        import comfy.model_management
        comfy.model_management.interrupt_current_processing()
    look()
of_host.throw_if_cancelled = cancel_in_look_150
play("cancelled within a pass", blocks=1)
of_host.throw_if_cancelled = look
sampler["blocks"] = 3
watching.NodeWatcher.before_pass = fail_in_block_3
play("failed in block 3")
watching.NodeWatcher.before_pass = before_pass
def no_room(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
remux, kept.remux_mp4 = kept.remux_mp4, no_room
cancel_at.append(1)
play("full disk")
kept.remux_mp4 = remux
make_video, of_host.video_from_file = of_host.video_from_file, no_room
play("failed after the stream", blocks=1)
of_host.video_from_file = make_video
server.client_id = None
cancel_at.append(1)
play("nobody looks on", blocks=3)
server.client_id = "embedded host"
moved = folder.rename(folder.with_name("moved"))
folder.write_text("a file in the folder's place")
cancel_at.append(1)
play("no folder")
folder.unlink()
moved.rename(folder)
report(scenes=scenes, looks=looks, messages=messages, spoken_to=sorted(spoken_to), prompt=prompt, equal=equal,
       bytes_before=bytes_before, bytes_after=bytes_after)
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """All endings in one host, whose start takes seconds."""
    return run_in_host(tmp_path_factory.mktemp("host"), PROGRAM)


def pictures(video: str) -> int:
    with av.open(video) as container:
        return sum(1 for _ in container.decode(video=0))


def metadata(video: str) -> dict:
    with av.open(video) as container:
        return dict(container.metadata)


@needs_embedded_host
@pytest.mark.parametrize(
    ("name", "kind", "made"),
    [
        ("cancelled after block 2", "InterruptProcessingException", 21),
        ("cancelled again", "InterruptProcessingException", 9),
        ("failed in block 3", "KeyError", 21),
        ("failed after the stream", "OSError", 9),
    ],
)
def test_the_pictures_are_in_the_output_folder_with_the_workflow(facts, name, kind, made):
    scene = facts["scenes"][name]
    assert scene["kind"] == kind
    (video,) = map(Path, scene["new"])
    assert video.parts[-3:-1] == ("streamblocks", "unfinished")
    assert pictures(str(video)) == made
    found = metadata(str(video))
    assert json.loads(found["workflow"]) == {"nodes": [], "id": "of this page"}
    assert json.loads(found["prompt"]).keys() == facts["prompt"].keys()
    assert scene["temp"] == []
    ((event, client),) = scene["events"]
    assert client == "embedded host"
    shown = {"filename": video.name, "subfolder": "streamblocks/unfinished", "type": "output"}
    sampler = next(key for key, node in facts["prompt"].items() if node["class_type"] == "StreamBlocksSampler")
    assert event == shown | {"node": sampler, "pictures": made, "workflow": "of this page"}
    assert f"in streamblocks/unfinished/{video.name} in the output folder" in scene["said"][-1]


@needs_embedded_host
def test_cancel_twice_then_a_new_run(facts):
    # Cancelled within a block; stopped before the next pass.
    stopped_at = {name: facts["scenes"][name]["stopped_at"] for name in ("cancelled after block 2", "cancelled again")}
    assert stopped_at == {"cancelled after block 2": 3, "cancelled again": 1}
    assert facts["bytes_after"] == facts["bytes_before"]
    assert facts["equal"]


@needs_embedded_host
def test_without_pictures_there_is_no_file(facts):
    scene = facts["scenes"]["cancelled in block 1"]
    assert (scene["kind"], scene["new"], scene["temp"], scene["events"]) == ("InterruptProcessingException", [], [], [])


@needs_embedded_host
def test_a_cancel_within_a_pass_is_seen_there_and_said(facts):
    scene = facts["scenes"]["cancelled within a pass"]
    assert facts["looks"] == 150 and scene["kind"] == "InterruptProcessingException"
    assert scene["said"][-1] == "Stopped; no picture was made."


@needs_embedded_host
def test_no_file_is_overwritten(facts):
    videos = [video for scene in facts["scenes"].values() for video in scene["new"]]
    assert len(set(videos)) == len(videos) == 6
    assert all(pictures(video) > 0 for video in videos)


@needs_embedded_host
def test_a_full_disk_costs_the_workflow_only(facts):
    scene = facts["scenes"]["full disk"]
    assert scene["kind"] == "InterruptProcessingException"
    (video,) = scene["new"]
    assert pictures(video) == 9 and "workflow" not in metadata(video)
    assert "without the workflow" in scene["said"][-1]
    assert len(scene["events"]) == 1


@needs_embedded_host
def test_a_video_that_cannot_be_moved_stays_and_the_node_says_where(facts):
    scene = facts["scenes"]["no folder"]
    assert scene["kind"] == "InterruptProcessingException"
    (name,) = scene["temp"]
    assert name in scene["said"][-1] and "copy the file" in scene["said"][-1]
    assert scene["events"] == []


@needs_embedded_host
def test_only_the_page_that_queued_it_is_told(facts):
    scene = facts["scenes"]["nobody looks on"]
    assert len(scene["new"]) == 1
    assert (scene["said"], scene["events"]) == ([], [])
    assert facts["spoken_to"] == ["embedded host"]


@needs_embedded_host
def test_what_the_node_says_is_of_its_workflow_and_goes_when_it_runs_again(facts):
    sampler = next(key for key, node in facts["prompt"].items() if node["class_type"] == "StreamBlocksSampler")
    assert {tuple(place) for *place, _, _, _ in facts["messages"]} == {(sampler, "of this page")}
    ids = [message for _, _, message, _, _ in facts["messages"]]
    # Each run takes the earlier line away before it says anything, and its own last line is how it ended.
    runs = " ".join(message or "-" for message in ids).split("-")[1:]
    assert len(runs) == len(facts["scenes"]) - 1 + 2
    assert [run.split()[-1] for run in runs[1:5]] == ["stopped_empty", "stopped_saved", "stopped_saved", "block_made"]
    values = next(values for _, _, message, values, _ in facts["messages"] if message == "stopped_saved")
    assert (values["pictures"], values["blocks"]) == (21, 2) and values["file"].startswith(
        "streamblocks/unfinished/stream_"
    )


def other_filesystem(*_):
    raise OSError(errno.EXDEV, "Invalid cross-device link")


def test_another_filesystem_gets_a_copy(tmp_path, monkeypatch):
    source, target = tmp_path / "source.mp4", tmp_path / "target.mp4"
    source.write_bytes(b"a video")
    target.touch()
    monkeypatch.setattr(Path, "replace", other_filesystem)
    assert move_unfinished(source, target, {})
    assert not source.exists() and target.read_bytes() == b"a video"


def test_a_copy_that_fails_leaves_the_source_alone(tmp_path, monkeypatch):
    source, target = tmp_path / "source.mp4", tmp_path / "target.mp4"
    source.write_bytes(b"a video")
    target.touch()

    def half_a_copy(_, to):
        to.write_bytes(b"a v")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", other_filesystem)
    monkeypatch.setattr(unfinished_video.shutil, "copyfile", half_a_copy)
    with pytest.raises(OSError, match="No space left"):
        move_unfinished(source, target, {})
    assert source.read_bytes() == b"a video" and not target.exists()

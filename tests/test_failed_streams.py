"""What a stream that fails leaves behind: nothing in memory, every picture in the sinks."""

import copy
import traceback
from dataclasses import replace

import av
import pytest
import torch

from streamblocks.memory.error_locals import clearing_error_locals
from streamblocks.memory.recorder import TimelineRecorder
from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper, KeepFrames, Mp4Sink
from streamblocks.stream.state import StreamState

from foreign_repository import write_foreign_repository

pytestmark = pytest.mark.usefixtures("no_pipeline")

SETTINGS = StreamSettings(width=32, height=32, blocks=2, steps=3, seed=7)


class Cancelled(BaseException):
    """As ComfyUI's own: not an `Exception`."""


def out_of_memory(activations):
    raise torch.OutOfMemoryError(f"no room for {activations.numel()} elements")


def wrapped(activations):
    try:
        out_of_memory(activations)
    except torch.OutOfMemoryError:
        try:
            raise ValueError("first")
        except ValueError as error:
            raise RuntimeError("a kernel gave up") from error


def missing_attribute(activations):
    # Python keeps the object without the attribute in the error.
    return activations.no_such_attribute


def cancelled(activations):
    raise Cancelled


FAILURES = [out_of_memory, wrapped, missing_attribute, cancelled]


class FailingPass:
    """Fails in a pass of block 1 and all later ones, deep inside the transformer, with activations at hand.

    Later ones follow only where the block is made again.
    """

    def __init__(self, pipeline, fail):
        self._pipeline, self._fail = pipeline, fail
        self.failed = False
        self._blocks = 0
        pipeline.pipe.text_encoder.register_forward_pre_hook(self.begin_block)
        pipeline.pipe.transformer.blocks[1].ffn.register_forward_pre_hook(self.begin_feed_forward)

    def begin_block(self, module, arguments):
        # Each block has another prompt here.
        self._blocks += 1
        self._passes = 0

    def begin_feed_forward(self, module, arguments):
        self._passes += 1
        if self._blocks == 2 and self._passes >= 2:
            self.failed = True
            self._fail(arguments[0])


@pytest.fixture(params=["built in", "foreign"])
def pipeline(request, tmp_path, tiny_folder, remote_code_allowed):
    if request.param == "built in":
        return materialise(Recipe(model=str(tiny_folder)))
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    return materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))


class Watcher:
    def __init__(self, stop_after=None):
        self.stop_after = stop_after

    def while_loading(self, component, done, total):
        pass

    def before_pass(self, index):
        pass

    def after_block(self, block):
        if block.index == self.stop_after:
            raise Cancelled


def stream(pipeline, sinks, watcher=None, recorder=None):
    return run_stream(
        pipeline, SETTINGS, Direction(lambda index: f"a cat {index}"), sinks, watcher or Watcher(), recorder
    )


def settled_bytes(pipeline):
    """Live bytes between two streams, once everything is loaded."""
    run_stream(pipeline, replace(SETTINGS, blocks=1, steps=1), Direction.constant("a cat"), [], Watcher())
    return live_tensor_bytes()


@pytest.mark.parametrize("fail", FAILURES, ids=lambda fail: fail.__name__)
def test_a_kept_error_of_a_block_holds_nothing_of_the_stream(pipeline, fail):
    before = settled_bytes(pipeline)
    hook = FailingPass(pipeline, fail)
    with pytest.raises(BaseException) as kept, Session(pipeline, SETTINGS) as session:
        session.run_block("a cat")
        assert live_tensor_bytes() > before
        session.run_block("a dog")
    assert hook.failed
    del session
    assert live_tensor_bytes() == before
    # The message stays, and so does the traceback down to the line that raised.
    text = "".join(traceback.format_exception(kept.value))
    assert "in run_block" in text and f"in {'out_of_memory' if fail is wrapped else fail.__name__}" in text
    assert ("no room for" in text) is (fail in (out_of_memory, wrapped))


def test_a_kept_error_of_a_session_that_is_closed_later_holds_nothing(pipeline):
    before = settled_bytes(pipeline)
    FailingPass(pipeline, out_of_memory)
    session = Session(pipeline, SETTINGS)
    session.run_block("a cat")
    with pytest.raises(torch.OutOfMemoryError) as kept:
        session.run_block("a dog")
    session.close()
    assert live_tensor_bytes() == before
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("fail", [out_of_memory, cancelled], ids=lambda fail: fail.__name__)
def test_the_end_of_a_recorded_stream_that_failed_holds_nothing_of_it(pipeline, fail):
    before = settled_bytes(pipeline)
    FailingPass(pipeline, fail)
    keeper = FrameKeeper(KeepFrames.ALL)
    recorder = TimelineRecorder(pipeline.device, others={"pictures": keeper.held})
    if fail is out_of_memory:
        # Behind a block that was made it is no error of the stream.
        report = stream(pipeline, [keeper], recorder=recorder)
        assert report.ran_out and any("at block 2: choose" in notice for notice in report.notices)
    else:
        with pytest.raises(Cancelled):
            stream(pipeline, [keeper], recorder=recorder)
    assert [len(frames) for frames in keeper.held()["kept"]] == [9]
    keeper.drop()
    assert live_tensor_bytes() == before


def test_a_kept_error_of_an_unusable_block_holds_nothing_of_the_stream(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    before = settled_bytes(pipeline)
    pipeline.pipe.transformer.proj_out.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="block 1 has NaN") as kept:
        stream(pipeline, [])
    assert live_tensor_bytes() == before
    assert kept.value.__traceback__ is not None


@pytest.mark.parametrize("where", ["watcher", "sink"])
def test_a_kept_error_between_blocks_holds_nothing_of_the_stream(tiny_folder, where):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    before = settled_bytes(pipeline)
    sinks = [Unwilling(write=RuntimeError("no tape"))] if where == "sink" else []
    with pytest.raises((Cancelled, RuntimeError)) as kept:
        stream(pipeline, sinks, Watcher(stop_after=1))
    assert live_tensor_bytes() == before
    assert kept.value.__traceback__ is not None


def test_a_kept_error_of_loading_holds_no_weights(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    # The text encoder comes first and stays.
    pipeline.encode_prompt(StreamState(), "a cat")
    before = live_tensor_bytes()

    class StopsLoading(Watcher):
        def while_loading(self, component, done, total):
            if component == "transformer" and done > total / 2:
                raise Cancelled

    with pytest.raises(Cancelled) as kept:
        stream(pipeline, [], StopsLoading())
    assert live_tensor_bytes() == before
    assert kept.value.__traceback__ is not None


def test_errors_that_were_known_before_keep_their_variables():
    def known():
        mine = torch.zeros(3)
        raise ValueError(f"{mine.sum()}")

    @clearing_error_locals
    def new():
        theirs = torch.zeros(5)
        raise RuntimeError(f"{theirs.sum()}")

    try:
        known()
    except ValueError as before:
        with pytest.raises(RuntimeError) as raised:
            new()
        assert raised.value.__context__ is before
        frames = {frame.f_code.co_name: frame for frame, _ in traceback.walk_tb(before.__traceback__)}
        assert "mine" in frames["known"].f_locals
    traced = [frame for frame, _ in traceback.walk_tb(raised.value.__traceback__) if frame.f_code.co_name == "new"]
    assert len(traced) == 1 and not any(isinstance(value, torch.Tensor) for value in traced[0].f_locals.values())


def test_closing_empties_copies_that_somebody_kept():
    state = StreamState()
    state.set("kv_cache", torch.zeros(3))
    twin = copy.deepcopy(state)
    grandchild = copy.deepcopy(twin)
    other = StreamState(values={"kv_cache": 1})
    del twin
    assert len(state.given_out) == 2
    state.clear()
    assert grandchild.values == state.values == {}
    assert other.values == {"kv_cache": 1}


class Unwilling:
    """A sink that raises the given errors."""

    def __init__(self, write=None, close=None):
        self._write, self._close = write, close
        self.closed = 0

    def write(self, frames):
        if self._write is not None:
            raise self._write

    def close(self):
        self.closed += 1
        if self._close is not None:
            raise self._close


def decoded(path):
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(video=0))


@pytest.mark.parametrize("error", [OSError("no room"), RuntimeError("tape torn"), Cancelled()], ids=repr)
def test_every_sink_is_closed_whatever_one_raises(tiny_folder, tmp_path, error, caplog):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    first, second = Unwilling(close=error), Unwilling(close=KeyError("late"))
    video = Mp4Sink(tmp_path / "a.mp4")
    with pytest.raises(type(error)) as raised:
        stream(pipeline, [first, second, video])
    assert raised.value is error
    assert (first.closed, second.closed) == (1, 1)
    assert "closing Unwilling failed too" in caplog.text and "late" in caplog.text
    assert decoded(tmp_path / "a.mp4") == 21 and is_plain(tmp_path / "a.mp4")


@pytest.mark.parametrize("place", [0, 1])
def test_a_sink_that_cannot_write_leaves_the_others_whole(tiny_folder, tmp_path, place, caplog):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    video, keeper = Mp4Sink(tmp_path / "a.mp4"), FrameKeeper(KeepFrames.ALL)
    sinks = [video, keeper]
    error = RuntimeError("tape torn")
    sinks.insert(place, Unwilling(write=error, close=TypeError("and does not close")))
    with pytest.raises(RuntimeError) as raised:
        stream(pipeline, sinks)
    assert raised.value is error
    assert "and does not close" in caplog.text
    # The sinks before it have the block, the sinks after it do not.
    assert video.frames_written == (9 if place else 0)
    if place:
        assert decoded(tmp_path / "a.mp4") == 9 and is_plain(tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="make a new keeper"):
        keeper.write(torch.zeros(1, 32, 32, 3, dtype=torch.uint8))


def is_plain(path):
    return b"moof" not in path.read_bytes()


def test_sinks_are_closed_when_the_stream_cannot_fit(tiny_folder, monkeypatch):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    assert isinstance(pipeline, BuiltInPipeline)
    monkeypatch.setattr(pipeline.residency, "available_bytes", lambda device: 1000, raising=False)
    sink = Unwilling()
    with pytest.raises(MemoryError, match="are free"):
        stream(pipeline, [sink])
    assert sink.closed == 1


def test_a_rewrite_that_fails_is_a_notice_of_the_stream(tiny_folder, tmp_path, monkeypatch, caplog):
    pipeline = materialise(Recipe(model=str(tiny_folder)))

    def refuse(path, target):
        raise PermissionError(13, "The process cannot access the file")

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    video, keeper = Mp4Sink(tmp_path / "a.mp4"), FrameKeeper(KeepFrames.ALL)
    try:
        raise ValueError("handled by whoever calls")
    except ValueError:
        report = stream(pipeline, [video, keeper])
    (notice,) = report.as_dict()["notices"]
    assert "a.mp4 holds all 21 pictures" in notice and "The process cannot access the file" in notice
    assert "The process cannot access the file" in caplog.text
    assert decoded(video.path) == sum(map(len, keeper.held()["kept"])) == report.pictures == 21


def test_settings_that_the_blocks_do_not_take_are_a_notice(pipeline):
    settings = replace(SETTINGS, blocks=1, steps=1, kv_policy="rolling", attention_bias=0.3)
    report = run_stream(pipeline, settings, Direction.constant("a cat"), [], Watcher())
    foreign = pipeline.recipe.blocks == REPOSITORY_BLOCKS
    sentence = "The pipeline's blocks take no kv_policy rolling, no attention_bias 0.3: these settings have no effect."
    assert report.notices == ((sentence,) if foreign else ())

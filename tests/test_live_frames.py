"""Frames on their way from a page's post to the blocks of a stream."""

from __future__ import annotations

import asyncio
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import torch
from file_streams import Nobody
from live_server import LiveServer
from PIL import Image

from streamblocks.stream.direction import Direction
from streamblocks.stream.frame_inbox import FrameInbox
from streamblocks.stream.jpeg_pictures import decode_jpeg
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.live_control import LiveControl
from streamblocks.stream.live_news import LiveNews
from streamblocks.stream.live_video import LiveVideo
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.video_input import VideoInput

from live_client import LiveClient

FPS = Fraction(16)
BLOCKS = (9, 12, 12)


def draw_jpegs(count, size=(32, 32)):
    chance = np.random.default_rng(4)
    jpegs = []
    for _ in range(count):
        with io.BytesIO() as file:
            Image.fromarray(chance.integers(0, 256, (size[1], size[0], 3), np.uint8)).save(file, "JPEG")
            jpegs.append(file.getvalue())
    return jpegs


JPEGS = draw_jpegs(sum(BLOCKS))


class Page(Nobody):
    """Puts the pictures of a block into the inbox once the one before is made."""

    def __init__(self, inbox, jpegs):
        self.inbox, self.jpegs, self.block = inbox, list(jpegs), 0
        self.after_block(None)

    def after_block(self, block):
        for jpeg in self.jpegs[: BLOCKS[self.block]]:
            self.inbox.put(jpeg)
        del self.jpegs[: BLOCKS[self.block]]
        self.block = min(self.block + 1, 2)


def stream(pipeline, video, blocks, watcher=None, go_on=None):
    keeper = FrameKeeper(KeepFrames.ALL)
    settings = StreamSettings(width=32, height=32, steps=1, seed=7, blocks=blocks, kv_policy="recompute")
    direction = Direction.of("a cat", video=video, go_on=go_on)
    report = run_stream(pipeline, settings, direction, [keeper], watcher or Nobody(), keep_stream=True)
    return report, keeper.frames()


def live_video(inbox, look=lambda: None):
    return LiveVideo(inbox, FPS, 0.5, look)


def test_a_stream_of_frames_is_the_stream_of_their_video(pipeline):
    """3 blocks of a file, and 2 of frames with one behind that goes on with the newest, are the same bits."""
    pictures = torch.stack([decode_jpeg(jpeg) for jpeg in JPEGS])
    expected = stream(pipeline, VideoInput(PictureBatch("video", pictures.float() / 255, FPS), FPS, 0.5), 3)[1]
    inbox = FrameInbox()
    report, made = stream(pipeline, live_video(inbox), 2, Page(inbox, JPEGS))
    assert torch.equal(made, expected[:21])
    assert (report.video.pictures, report.video.dropped, report.video.repeated) == (21, 0, 0)
    assert report.snapshot.input_video.source == "live"
    # What is left in this inbox came behind the last block; another stream's inbox is empty at first.
    newest = FrameInbox()
    for jpeg in JPEGS[:5] + JPEGS[21:]:
        newest.put(jpeg)
    after, made = stream(pipeline, live_video(newest), 1, go_on=report.snapshot)
    assert torch.equal(made, expected[21:]) and after.video.dropped == 5
    assert after.notices == (
        "live: 17 pictures came for 12 of the video; 5 were dropped because newer ones came, and pictures were shown "
        "again 0 times.",
    )


def test_who_cancels_before_the_first_frame_waits_no_longer(pipeline):
    looks = []

    def look():
        looks.append(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream(pipeline, live_video(FrameInbox(), look), 1)
    assert looks == [1]


@pytest.fixture(scope="module")
def server():
    with LiveServer() as server:
        yield server
    assert server.failures == []


@pytest.fixture
def opened(server):
    inbox, news = FrameInbox(), LiveNews()
    running = server.module("live_streams").running("prompt", "3", "flow", LiveControl(), news, inbox, "12:5")
    with running as token:
        yield inbox, LiveClient(server.port, "prompt", "3", token), news


def test_a_frame_that_is_posted_is_taken(opened):
    inbox, page, news = opened
    news.update(fps=16.0)
    answer = page.give(JPEGS[0])
    assert (answer.status, answer.json) == (200, {"dropped": 0, "fps": 16.0}) and inbox.counts.came == 1
    refused = page.give(JPEGS[0][:-20])
    assert (refused.status, refused.error) == (400, "The picture is broken off or damaged: send all of its JPEG.")
    assert page.give(draw_jpegs(1, (15, 15))[0]).error.startswith("The picture is 15x15: send 16 to 4096")
    assert page.give(JPEGS[0], token="x").status == 403 and inbox.counts.came == 1
    listed = page.ask("GET", "/streamblocks/streams").json["streams"]
    assert [one for one in listed if one.get("frames_from") == "12:5"] == [
        {"prompt_id": "prompt", "node": "3", "workflow": "flow", "running": True, "frames_from": "12:5"}
    ]


def test_one_is_decoded_and_of_the_others_only_the_newest(server, opened, monkeypatch):
    inbox, page, _ = opened
    begun, go_on = threading.Event(), threading.Event()
    running, most, put = [], [], inbox.put

    def slow(jpeg):
        running.append(jpeg)
        most.append(len(running))
        begun.set()
        assert go_on.wait(10)
        put(jpeg)
        running.remove(jpeg)

    monkeypatch.setattr(inbox, "put", slow)
    stream = server.module("live_routes").STREAMS
    turns = server.stub.app[stream].find("prompt", "3").turns
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(page.give, JPEGS[0])
        assert begun.wait(10)
        others = []
        for jpeg in JPEGS[1:6]:
            waiting = turns._next
            others.append(pool.submit(page.give, jpeg))
            while turns._next is waiting:
                server.run(asyncio.sleep(0.005))
        # Those that gave way are answered at once.
        assert [one.result(10).json["dropped"] for one in others[:-1]] == [1, 1, 1, 1]
        assert not first.done() and not others[-1].done()
        go_on.set()
        assert [one.result(10).json["dropped"] for one in (first, others[-1])] == [0, 0]
    assert most == [1, 1] and inbox.counts.came == 2
    assert page.give(JPEGS[0]).json["dropped"] == 0


def test_a_page_that_goes_leaves_the_turn_to_others(server):
    turns = server.module("frame_turns").FrameTurns()
    go_on = threading.Event()

    async def check():
        first = asyncio.create_task(turns.run(lambda: go_on.wait(10) and None))
        gone = asyncio.create_task(turns.run(lambda: None))
        await asyncio.sleep(0)
        waiting = turns._next
        go_on.set()
        assert await first
        # It is its turn now, and it does not know yet.
        assert waiting.result() and not gone.done()
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await turns.run(lambda: None)

    server.run(check())

"""What pages are told about a running stream, without a server."""

from __future__ import annotations

import gc
import io
import itertools
import random
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from streamblocks.stream import picture_encoding
from streamblocks.stream.live_control import Allowed, Edit, LiveControl
from streamblocks.stream.live_news import LiveNews
from streamblocks.stream.memory_points import MOST_COLUMNS


def grey_frames(count, height=24, width=32):
    """Pictures that get lighter one after the other."""
    levels = torch.linspace(0, 255, count).round().to(torch.uint8)
    return levels[:, None, None, None].expand(count, height, width, 3).contiguous()


def opened(jpegs):
    return [Image.open(io.BytesIO(jpeg)) for jpeg in jpegs]


def test_each_change_is_a_version_and_unknown_fields_are_none():
    news = LiveNews()
    before = news.version
    assert [news.update(blocks_made=1), news.update(), news.add_memory({"block": 0})] == [before + n for n in (1, 2, 3)]
    with pytest.raises(TypeError, match="blocks_maid"):
        news.update(blocks_maid=2)
    header = news.since().header
    assert (header["version"], header["blocks_made"]) == (before + 3, 1)
    assert news.update(rate=float("nan"), seconds=float("inf")) == before + 4
    assert news.since().header["rate"] is None


def test_a_page_is_told_a_long_track_once():
    news = LiveNews()
    news.update(track="0: a sea\n" * 10_000)
    first = news.since().header
    assert len(first["track"]) == 90_000
    news.update(track="0: a sea\n" * 10_000, blocks_made=3)
    second = news.since(version=first["version"]).header
    assert second["track"] is None and second["blocks_made"] == 3
    news.update(track="0: a storm")
    assert news.since(version=second["version"]).header["track"] == "0: a storm"
    # A page that was told of another stream's version knows nothing.
    assert news.since(version=99).header["track"] == "0: a storm"


def test_listeners_may_read_and_change_the_news():
    """They would wait for ever inside of its lock."""
    news, told = LiveNews(), []

    def listener():
        told.append(news.since().header["version"])
        if len(told) == 1:
            news.update(edited=True)

    news.add_listener(listener)
    thread = threading.Thread(target=news.update, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and told == [1, 2]
    news.remove_listener(listener)
    news.remove_listener(listener)
    news.update()
    assert told == [1, 2]


def test_no_change_is_lost_between_threads():
    news = LiveNews()
    seen: list[None] = []
    news.add_listener(lambda: seen.append(None))
    with ThreadPoolExecutor(4) as threads:
        versions = list(threads.map(lambda _: news.update(), range(400)))
    assert sorted(versions) == list(range(1, 401)) and len(seen) == 400


def test_what_was_asked_is_told_as_it_is():
    news, control = LiveNews(), LiveControl()
    control.allow(Allowed(strength="No video is connected."))

    def told():
        header = news.since().header
        return header["state"], header["pending"]

    assert told() == ("loading", None)
    news.follow(control)
    assert news.since().header["allowed"]["strength"] == "No video is connected."
    control.pause()
    assert told() == ("pausing", None)
    control.resume()
    assert told() == ("loading", None)
    news.update(state="running")
    control.edit(Edit(prompt="rain"))
    control.edit(Edit(attention_bias=0.5))
    assert told() == ("running", {"prompt": "rain", "attention_bias": 0.5})
    control.take_edit()
    control.pause()
    assert told() == ("pausing", None)
    news.update(state="paused")
    assert told() == ("paused", None)
    control.resume()
    assert told() == ("running", None)
    control.edit(Edit(prompt="late"))
    control.stop()
    assert told() == ("stopping", {"prompt": "late"})
    news.update(state="stopped")
    news.end("failed")
    assert told() == ("stopped", None)
    assert news.since().header["allowed"]["strength"] == "No video is connected."


def test_pictures_are_encoded_when_asked_once_for_all(encodings):
    news = LiveNews()
    news.show_block(grey_frames(3), block=0, blocks_made=1)
    news.show_block(grey_frames(12), block=1, blocks_made=2)
    assert encodings == []
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait(10)
        pictures = news.since(block=0).pictures
        assert pictures is not None
        return pictures.encoded()

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(ask, range(8)))
    assert encodings == [12] and len({id(one) for one in answers}) == 1
    assert news.since(block=1).pictures is None
    assert news.since(block=1).header["blocks_made"] == 2


@pytest.mark.parametrize(
    ("count", "height", "width", "size"),
    [
        (12, 24, 32, (32, 24)),
        (1, 480, 832, (512, 295)),
        (40, 600, 30, (26, 512)),
        (17, 513, 1, (1, 512)),
    ],
)
def test_pictures_are_small_and_few(count, height, width, size):
    encoded = picture_encoding.encode_pictures(grey_frames(count, height, width))
    images = opened(encoded.jpegs)
    assert len(images) == min(count, 16)
    assert {image.size for image in images} == {size} == {(encoded.width, encoded.height)}
    levels = [image.convert("L").getpixel((0, 0)) for image in images]
    assert levels == sorted(levels)
    if count > 1:
        # The first and the last are among them.
        assert levels[0] < 3 and levels[-1] > 252
    assert all(image.format == "JPEG" for image in images)


def parts_of(page):
    return [] if page.pictures is None else [(part.block, part.first, part.end) for part in (page.pictures, *page.more)]


def test_a_block_comes_in_parts_to_pages_that_take_them(encodings):
    news, frames = LiveNews(), grey_frames(12)
    news.show_block(grey_frames(9), block=0)
    version = news.version
    for first in (0, 4):
        news.show_part(frames[first : first + 4], block=1, first=first, of=12)
    assert news.version == version + 2
    # A page says how many of which block's pictures it has; one that says nothing takes whole blocks.
    assert parts_of(news.since(block=-1)) == parts_of(news.since(block=-1)) == [(0, 0, 9)]
    assert parts_of(news.since(block=0, pictures=9)) == [(1, 0, 4), (1, 4, 8)]
    assert parts_of(news.since(block=1, pictures=4)) == [(1, 4, 8)]
    assert parts_of(news.since(block=1, pictures=8)) == []
    # What is shown again, because the block ran out of memory on the way, is not sent again.
    for first in (0, 4, 8):
        news.show_part(frames[first : first + 4], block=1, first=first, of=12)
        assert parts_of(news.since(block=1, pictures=8)) == ([(1, 8, 12)] if first == 8 else [])
    news.show_block(frames, block=1)
    assert parts_of(news.since(block=1, pictures=8)) == [(1, 8, 12)]
    assert parts_of(news.since(block=1, pictures=12)) == []
    assert parts_of(news.since(block=0)) == [(1, 0, 12)] and encodings == []
    page = news.since(block=0, pictures=9)
    assert page.pictures is not None
    assert [len(part.encoded().jpegs) for part in (page.pictures, *page.more)] == [4, 4, 4] and encodings == [4, 4, 4]
    # A block that is not shown in parts takes the place of one that was.
    news.show_block(frames, block=2)
    assert parts_of(news.since(block=1, pictures=12)) == [(2, 0, 12)]
    news.show_part(frames[:4], block=3, first=0, of=32)
    page = news.since(block=2, pictures=12)
    assert page.pictures is not None and len(page.pictures.encoded().jpegs) == 2, "16 of the whole block"
    news.drop_pictures()
    assert parts_of(news.since()) == parts_of(news.since(pictures=0)) == []


def test_only_the_newest_block_is_held():
    news = LiveNews()
    held = []
    for block in range(5):
        frames = grey_frames(4)
        held.append(weakref.ref(frames))
        news.show_block(frames, block=block)
        del frames
    gc.collect()
    assert [one() is None for one in held] == [True] * 4 + [False]
    pictures = news.since().pictures
    assert pictures is not None
    encoded = pictures.encoded()
    assert held[-1]() is None, "once encoded, the pictures themselves are not needed"
    news.drop_pictures()
    assert news.since().pictures is None and len(encoded.jpegs) == 4


def memory_point(block, *, ended, peak=0, event=""):
    owners = [["latents", 5]] if ended else []
    return {"first": False, "block": block, "peak": peak, "event": event, "owners": owners, "allocated": 1}


class PointReader:
    """A page that asks now and then."""

    def __init__(self):
        self.cursor, self.columns = 0, {}

    def ask(self, news):
        header = news.since(points=self.cursor).header
        if header["points_from"] == 0:
            self.columns = {}
        assert len(header["memory"]) <= MOST_COLUMNS + 1
        self.columns |= {point["block"]: point for point in header["memory"]}
        self.cursor = header["points"]


def test_every_page_has_the_points_that_the_server_has():
    """However seldom it asks, and though points are dropped meanwhile."""
    news, pick = LiveNews(), random.Random(0)
    often, seldom = PointReader(), PointReader()
    peaks: dict[int, int] = {}
    news.add_memory({"first": True, **memory_point(0, ended=False)})
    for block in range(1500):
        for ended in (False, False, True):
            peak = pick.randrange(1000)
            peaks[block] = max(peak, peaks.get(block, 0))
            news.add_memory(memory_point(block, ended=ended, peak=peak, event="retry" if peak > 990 else ""))
            if pick.random() < 0.5:
                often.ask(news)
        if pick.random() < 0.01:
            seldom.ask(news)
    for page in (often, seldom, PointReader()):
        page.ask(news)
        held = news.since().header["memory"]
        assert MOST_COLUMNS // 2 <= len(held) <= MOST_COLUMNS + 1
        assert {point["block"]: point for point in held}.items() <= page.columns.items()
        assert all(point["peak"] == peaks[block] for block, point in page.columns.items() if point["owners"])
    strides = {b["block"] - a["block"] for a, b in itertools.pairwise(held[:-1])}
    assert len(strides) == 1 and held[-1]["block"] == 1499


def test_a_page_that_missed_dropped_points_begins_anew():
    """Else its chart would be dense at one end and thin at the other."""
    news, late, up_to_date = LiveNews(), PointReader(), PointReader()
    for block in range(400):
        news.add_memory(memory_point(block, ended=True))
        if block == 100:
            late.ask(news)
        up_to_date.ask(news)
        assert up_to_date.cursor == block + 1 and len(up_to_date.columns) == block + 1
    late.ask(news)
    assert list(late.columns) == [*range(0, 400, 2), 399]


def test_points_that_are_not_new_are_not_sent_again():
    news, page = LiveNews(), PointReader()
    for block in range(10):
        news.add_memory(memory_point(block, ended=True))
    page.ask(news)
    assert news.since(points=page.cursor).header["memory"] == ()
    news.add_memory(memory_point(10, ended=True))
    header = news.since(points=page.cursor).header
    assert [point["block"] for point in header["memory"]] == [10] and header["points_from"] == 10
    assert news.since(points=99).header["points_from"] == 0, "a cursor of another time"
    news.add_memory({**memory_point(0, ended=True), "first": True})
    header = news.since(points=page.cursor).header
    assert [point["block"] for point in header["memory"]] == [0] and header["points_from"] == 0

"""Pictures that pages push: which of them a block is made from, and what is refused before it is decoded."""

import io
import struct
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from streamblocks.stream.fit_pictures import PictureFit
from streamblocks.stream.frame_inbox import FrameInbox
from streamblocks.stream.jpeg_pictures import MOST_SCANS, decode_jpeg

SIZE = (48, 32)


def packed(picture, kind="JPEG", **options):
    with io.BytesIO() as file:
        picture.save(file, kind, **options)
        return file.getvalue()


def jpeg(level, size=SIZE):
    """All pixels of one grey, so that a picture is known again."""
    return packed(Image.new("RGB", size, (level,) * 3), quality=95)


def levels(pictures):
    return [round(float(picture.float().mean())) for picture in pictures]


def never():
    raise AssertionError("nothing was to be waited for")


def new_inbox():
    inbox = FrameInbox()
    inbox.fit_to(PictureFit(*SIZE))
    return inbox


@pytest.fixture
def inbox():
    return new_inbox()


def test_the_newest_win_in_their_order(inbox):
    for level in range(0, 200, 10):
        inbox.put(jpeg(level))
    taken = inbox.take(4, never)
    assert taken.shape == (4, 32, 48, 3) and taken.dtype is torch.uint8
    assert levels(taken) == [160, 170, 180, 190]
    assert (inbox.counts.came, inbox.counts.dropped, inbox.counts.repeated) == (20, 16, 0)


def test_no_more_is_held_than_a_block_takes(inbox):
    for level in range(15):
        inbox.put(jpeg(10 * level))
    # 12 before a block has been made.
    assert inbox.counts.dropped == 3
    assert levels(inbox.take(16, never)) == [30, 30, 40, 50, 60, 60, 70, 80, 90, 90, 100, 110, 120, 120, 130, 140]
    for level in range(20):
        inbox.put(jpeg(10 * level))
    assert inbox.counts.dropped == 3 + 4 and levels(inbox.take(16, never))[0] == 40


def test_before_the_size_is_known_only_so_many_bytes_are_held():
    inbox = FrameInbox()
    large = jpeg(0, (2000, 2000))
    for _ in range(7):
        inbox.put(large)
    # 12 MB each, 64 MiB at most.
    assert inbox.counts.dropped == 2
    inbox.fit_to(PictureFit(*SIZE))
    assert inbox.take(3, never).shape == (3, 32, 48, 3)


@pytest.mark.parametrize(("came", "shown"), [(1, [0, 0, 0, 0, 0]), (2, [0, 0, 0, 50, 50]), (3, [0, 0, 50, 50, 100])])
def test_fewer_are_spread(inbox, came, shown):
    for level in range(came):
        inbox.put(jpeg(50 * level))
    assert levels(inbox.take(5, never)) == shown
    assert inbox.counts.repeated == 5 - came
    # Where none came since, the last one is held.
    assert levels(inbox.take(2, never)) == [50 * (came - 1)] * 2


def test_only_the_first_is_waited_for_and_waiting_can_be_given_up(inbox):
    looks = []

    def look():
        looks.append(1)
        if len(looks) == 2:
            threading.Thread(target=inbox.put, args=(jpeg(70),)).start()

    assert levels(inbox.take(3, look)) == [70, 70, 70] and len(looks) >= 2

    def cancel():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_inbox().take(1, cancel)


def test_frames_of_other_sizes_are_fitted(inbox):
    inbox.put(jpeg(40, (640, 480)))
    inbox.put(jpeg(80, (17, 333)))
    assert levels(inbox.take(2, never)) == [40, 80]
    assert (inbox.counts.width, inbox.counts.height) == (17, 333)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_pixels_are_pillows(mode):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)).convert(mode)
    data = packed(picture, quality=85)
    with Image.open(io.BytesIO(data)) as known:
        assert torch.equal(decode_jpeg(data), torch.from_numpy(np.array(known.convert("RGB"))))


def with_size(data, width, height):
    """A JPEG whose header says another size."""
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", height, width) + data[place + 4 :]


PROGRESSIVE = packed(Image.new("RGB", (64, 64)), progressive=True)
SCAN = PROGRESSIVE[PROGRESSIVE.rindex(b"\xff\xda") : -2]
NO_JPEG, BROKEN = "is no JPEG that can be read", "is broken off or damaged"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", NO_JPEG),
        (b"\xff\xd8\xff", NO_JPEG),
        (b"\xff\xd8\xff\xd9", NO_JPEG),
        (b"\xff\xd8\xff" + bytes(1000), NO_JPEG),
        (packed(Image.new("RGB", SIZE), "PNG"), NO_JPEG),
        (packed(Image.new("RGB", SIZE), "WEBP"), NO_JPEG),
        (packed(Image.new("RGB", SIZE), "GIF"), NO_JPEG),
        (b"<svg/>" + jpeg(0), NO_JPEG),
        (jpeg(0)[:100], NO_JPEG),
        (jpeg(0)[:-20], BROKEN),
        (packed(Image.effect_noise(SIZE, 60))[:700], BROKEN),
        (jpeg(0, (15, 32)), "is 15x32: send 16 to 4096 pixels a side"),
        (with_size(jpeg(0), 4097, 16), "is 4097x16"),
        (with_size(jpeg(0), 4096, 4000), "is 4096x4000: send 16 to 4096 pixels a side, and at most 16 megapixels"),
        (with_size(jpeg(0), 65535, 65535), "is 65535x65535"),
        (PROGRESSIVE[:-2] + SCAN * MOST_SCANS + b"\xff\xd9", "has more than 64 scans"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("error")
def test_what_is_no_picture_is_refused_in_one_sentence(inbox, data, sentence):
    with pytest.raises(ValueError, match=sentence) as refused:
        inbox.put(data)
    said = str(refused.value)
    assert said.endswith(".") and "\n" not in said
    assert inbox.counts.came == 0


def test_damaged_bytes_are_refused_or_become_a_picture():
    data = bytearray(packed(Image.effect_noise((64, 48), 60)))
    chance = np.random.default_rng(5)
    refused = 0
    for _ in range(400):
        broken = bytearray(data)
        for place in chance.integers(0, len(data), 6):
            broken[place] = chance.integers(0, 256)
        try:
            assert decode_jpeg(bytes(broken)).dtype is torch.uint8
        except ValueError:
            refused += 1
    assert 20 < refused < 400

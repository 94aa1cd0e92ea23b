"""Streams that go on from pictures or are made from a video: against diffusers' VAE and against plain streams."""

from fractions import Fraction

import pytest
import torch

from streamblocks.families.model_family import AttentionChoice
from streamblocks.stream.direction import Direction
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.materialise import materialise
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.video_input import VideoInput
from streamblocks.wan.steps.start_entries import entries_of_pictures
from streamblocks.wan.vae.stream_decoder import StreamDecoder
from streamblocks.wan.vae.streaming_vae import denormalize_latents
from streamblocks.wan.vae.video_encoder import VideoEncoder, to_pixels

from foreign_repository import write_foreign_repository
from golden_wan import relative_error

WIDTH, HEIGHT, BLOCKS = 32, 48, 2
PICTURES = 9 + 12
FPS = Fraction(16)
POLICIES = ("recompute", "rolling")


class Watcher:
    def while_loading(self, component, done, total): ...

    def before_pass(self, index):
        self.passes = getattr(self, "passes", 0) + 1

    def after_block(self, block): ...


@pytest.fixture(scope="module")
def images():
    return torch.rand((PICTURES, HEIGHT, WIDTH, 3), generator=torch.Generator().manual_seed(3))


def settings_of(policy, **changes):
    values = {"width": WIDTH, "height": HEIGHT, "steps": 2, "seed": 7, "blocks": BLOCKS, "kv_policy": policy} | changes
    return StreamSettings(**values)


def stream(pipeline, policy, start=None, video=None, track=None, **changes):
    """Report, pictures and passes of a stream."""
    keeper, watcher = FrameKeeper(KeepFrames.ALL), Watcher()
    direction = Direction.of("a cat", track=track, start=start, video=video)
    report = run_stream(pipeline, settings_of(policy, **changes), direction, [keeper], watcher)
    return report, keeper.frames(), watcher.passes


def start_of(images):
    return StartPictures(PictureBatch("start", images), FPS)


def video_of(images, strength, at_end="loop"):
    return VideoInput(PictureBatch("video", images, FPS), FPS, strength, at_end=at_end)


def uint8(images):
    return images.mul(255).round().to(torch.uint8)


@pytest.fixture(scope="module")
def plain(pipeline):
    return {policy: stream(pipeline, policy) for policy in POLICIES}


@pytest.mark.parametrize("policy", POLICIES)
def test_at_strength_1_it_is_text_to_video_to_the_bit(pipeline, images, plain, policy):
    _, expected, passes = plain[policy]
    report, made, made_passes = stream(pipeline, policy, video=video_of(images, 1.0))
    assert torch.equal(made, expected) and made_passes == passes
    assert report.video is not None and report.video.pictures == PICTURES and report.notices == ()


@pytest.mark.parametrize("policy", POLICIES)
@torch.no_grad()
def test_at_strength_0_it_is_the_input_through_the_vae(pipeline, images, plain, policy):
    _, made, passes = stream(pipeline, policy, video=video_of(images, 0.0))
    vae = pipeline.pipe.vae
    # By diffusers, all at once.
    latents = vae.encode(to_pixels(vae, uint8(images)).to(vae.dtype)).latent_dist.mode()
    decoded = vae.decode(latents).sample[0].movedim(0, -1).float().clamp(-1, 1)
    assert (made.float() - (decoded + 1) * 127.5).abs().max() <= 2
    # Only those of the past: no denoising pass at all.
    assert passes == plain[policy][2] - BLOCKS * 2


def test_a_strength_between_is_between_and_may_change_from_block_to_block(pipeline, images, plain):
    _, text, passes = plain["recompute"]
    _, low, low_passes = stream(pipeline, "recompute", video=video_of(images, 0.1))
    track = PromptTrack.parse("0: a cat\n1 strength 1: a cat").place(2, None)
    _, mixed, _ = stream(pipeline, "recompute", video=video_of(images, 0.1), track=track)
    # As many passes at any strength.
    assert low_passes == passes
    assert torch.equal(mixed[:9], low[:9]) and not torch.equal(mixed[9:], low[9:])
    assert not torch.equal(low[:9], text[:9])


def test_another_video_gives_other_pictures_and_stop_shortens_the_stream(pipeline, images):
    _, one, _ = stream(pipeline, "rolling", video=video_of(images, 0.5))
    _, other, _ = stream(pipeline, "rolling", video=video_of(images.flip(0), 0.5))
    assert not torch.equal(one, other)
    report, made, _ = stream(pipeline, "rolling", video=video_of(images[:15], 0.5, "stop"), blocks=9)
    assert report.blocks_made == 2 and torch.equal(made[:9], one[:9])
    assert report.notices == (
        "video: it ended after 15 pictures (0.9375 s); the stream stopped there, behind its last picture shown again 6 "
        "times.",
    )


@pytest.mark.parametrize(("count", "context", "frames"), [(1, 3, 1), (4, 3, 1), (5, 3, 2), (21, 3, 3), (21, 6, 6)])
@torch.no_grad()
def test_the_entries_of_a_start_are_those_of_diffusers(pipeline, images, count, context, frames):
    vae = pipeline.pipe.vae
    entries = entries_of_pictures(
        StreamDecoder(vae), uint8(images[:count]), context_frames=context, sink_frames=1, video_follows=context == 6
    )
    used = to_pixels(vae, uint8(images[:count][-(1 + (frames - 1) * 4) :]))
    assert entries["stream_position"] == frames == entries["current_denoised_latents"].shape[2]
    expected = vae.encode(used.to(vae.dtype)).latent_dist.mode()
    made = denormalize_latents(vae, entries["current_denoised_latents"])
    assert relative_error(made, expected) <= 1e-5 if vae.dtype is torch.float32 else 1e-2
    assert torch.equal(torch.stack(list(entries["frame_cache_context"]), dim=2), used.to(vae.dtype))
    assert entries["frame_cache_context"].maxlen == 1 + (context - 1) * 4
    assert entries["decoder_cache"].latent_frames == frames
    # Otherwise its cache would be held for nothing.
    assert (entries["input_encoder"] is not None) == (context == 6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("count", [1, 12], ids=["image", "past"])
def test_a_stream_goes_on_from_pictures(pipeline, images, plain, policy, count):
    sink = {"sink_frames": 1} if policy == "rolling" else {}
    report, made, _ = stream(pipeline, policy, start_of(images[:count]), **sink)
    _, other, _ = stream(pipeline, policy, start_of(1 - images[:count]), **sink)
    shown = 1 if count == 1 else 0
    # An image is the first picture; then every block has 12, for the decoder goes on.
    assert len(made) == shown + BLOCKS * 12 == report.pictures
    assert torch.equal(made[:shown], uint8(images[:shown]))
    assert not torch.equal(made[shown:], other[shown:]) and not torch.equal(made[-12:], plain[policy][1][-12:])


def test_a_video_may_follow_a_start(pipeline, images):
    report, made, _ = stream(pipeline, "recompute", start_of(images[:9]), video_of(images[9:], 0.0))
    assert report.video is not None and report.video.pictures == len(made) == BLOCKS * 12
    _, whole, _ = stream(pipeline, "recompute", video=video_of(images, 0.0))
    # Encoded and decoded as one video with what it follows.
    assert (made[:12].int() - whole[9:].int()).abs().max() <= 1


def test_a_block_that_runs_out_of_memory_is_encoded_once(pipeline, images, monkeypatch):
    expected = stream(pipeline, "recompute", video=video_of(images, 0.5))[1]
    encoded, fails = [], [3, 5]
    encode = VideoEncoder.encode
    monkeypatch.setattr(pipeline.saving, "stream_more_layers", lambda *, of_text: True)

    def counted(self, vae, pictures):
        encoded.append(len(pictures))
        return encode(self, vae, pictures)

    monkeypatch.setattr(VideoEncoder, "encode", counted)

    class Failing(Watcher):
        def before_pass(self, index):
            super().before_pass(index)
            if self.passes in fails:
                raise torch.OutOfMemoryError("no more")

    keeper = FrameKeeper(KeepFrames.ALL)
    direction = Direction(lambda _: "a cat", video=video_of(images, 0.5))
    run_stream(pipeline, settings_of("recompute"), direction, [keeper], Failing())
    made = keeper.frames()
    assert made is not None and torch.equal(made, expected)
    assert len(encoded) == BLOCKS + len(fails)


def test_a_wrong_number_of_pictures_is_said(pipeline, images):
    with (
        Session(pipeline, settings_of("recompute")) as session,
        pytest.raises(ValueError, match="input_pictures are 12, which make 3 latent frames, and a block has 4"),
    ):
        session.settings = settings_of("recompute", frames_per_block=4)
        session.run_block("a cat", {"input_pictures": uint8(images[:12]), "strength": 0.5})
    with Session(pipeline, settings_of("recompute")) as session, pytest.raises(ValueError, match="strength is 0 and"):
        session.run_block("a cat", {"strength": 0.0})


def test_an_input_video_is_counted(pipeline):
    components, inputs = pipeline._store.components, settings_of("recompute").pipeline_inputs()
    bytes_of = {
        given: pipeline.family.streaming_bytes(components, inputs | {"video_given": given}, AttentionChoice())
        for given in (False, True)
    }
    cache = sum(
        feature.numel() * feature.element_size()
        for feature in encoder_after_two_blocks(pipeline).cache.features
        if feature is not None
    )
    assert bytes_of[True] >= bytes_of[False] + cache


def encoder_after_two_blocks(pipeline):
    encoder = VideoEncoder.for_vae(pipeline.pipe.vae)
    encoder.encode(pipeline.pipe.vae, torch.zeros((21, HEIGHT, WIDTH, 3), dtype=torch.uint8))
    return encoder


def test_foreign_blocks_refuse_pictures_in_one_sentence(tiny_folder, tmp_path, remote_code_allowed, images):
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    foreign = materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))
    for given in ({"start": start_of(images)}, {"video": video_of(images, 0.5)}):
        with pytest.raises(ValueError, match=f"^{next(iter(given))} is connected, and what the blocks of") as raised:
            stream(foreign, "recompute", **given, height=32)
        assert "\n" not in str(raised.value)

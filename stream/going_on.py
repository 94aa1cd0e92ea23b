"""Whether a stream can go on from a snapshot with this pipeline and these settings; which of them may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..checkpoints.checkpoint_error import shown, shown_word
from ..families.kv_policies import KV_AUTO
from .joined_mp4 import check_earlier
from .recipe import Recipe
from .settings import StreamSettings
from .snapshot import StreamSnapshot

# What latents, pictures and features of the VAE have the shape of, and what is kept of the past.
_OF_ANY_STREAM = ("width", "height", "kv_policy")
# What kept keys and values have the shape of.
_OF_KEYS = ("frames_per_block", "context_frames", "sink_frames", "kv_format")


def check_recipe(snapshot: StreamSnapshot, recipe: Recipe) -> None:
    """Raise ValueError, which says what differs, unless `recipe` makes the model that made the stream.

    LoRAs, quantization, attention backend, compilation and the text encoder's files may differ: as with a new prompt,
    they change what is made from here on. Under "rolling", keys of before stay in the window until they leave it.
    """
    known, wanted = model_of(snapshot.recipe), model_of(recipe)
    for name, value in known.items():
        if wanted[name] != value:
            raise ValueError(
                f"go_on_from is a stream of {name} {_shown(value)} and the pipeline has {_shown(wanted[name])}: choose "
                f"{_shown(value)} in the loader, or disconnect go_on_from to start a new stream."
            )
    if _sources(snapshot.recipe) == _sources(recipe) and snapshot.recipe.stamp != recipe.stamp:
        known_stamp = shown_word(snapshot.recipe.stamp)
        raise ValueError(
            f"go_on_from is a stream of {recipe.model}, whose files have changed since (stamp {known_stamp}, "
            f"now {recipe.stamp}): run the sampler before this one again, or disconnect go_on_from."
        )


def settings_to_go_on(snapshot: StreamSnapshot, settings: StreamSettings) -> StreamSettings:
    """`settings` for a session that goes on from `snapshot`.

    The noise goes on, so the seed is that of before; and where keys are kept, "auto" is the format that they have.
    `first_block_timesteps` are for the blocks behind a cut, which have no past.

    Raises:
        ValueError: they differ in what may not; the sentence says in what.
    """
    known = snapshot.settings
    if snapshot.keeps_keys and settings.kv_format == KV_AUTO:
        settings = replace(settings, kv_format=known.kv_format)
    for name in (*_OF_ANY_STREAM, *(_OF_KEYS if snapshot.keeps_keys else ())):
        _check_same(name, getattr(known, name), getattr(settings, name))
    if not snapshot.keeps_keys:
        _check_context(snapshot, settings)
    return replace(settings, seed=known.seed)


def seed_notice(snapshot: StreamSnapshot, settings: StreamSettings) -> list[str]:
    """A sentence where the user chose a seed that has no effect."""
    if snapshot.settings.seed == settings.seed:
        return []
    return [
        f"seed {settings.seed} has no effect: the stream goes on with its own noise, that of seed "
        f"{snapshot.settings.seed}."
    ]


def video_to_go_on(snapshot: StreamSnapshot, fps: float) -> Path:
    """The file that the stream before is in, for a file that is to begin with it.

    Raises:
        ValueError: there was none, or its pictures have another rate or the colours of an earlier version.
        FileNotFoundError: it is gone.
        OSError: it cannot be read any more, or has changed.
    """
    video = snapshot.video
    if video is None:
        raise ValueError(
            "same_video is on and the stream of go_on_from was not written to a file: switch same_video off."
        )
    if not video.path.is_file():
        raise FileNotFoundError(
            f"same_video is on and the video before, {video.path}, is gone (ComfyUI empties its temp folder when it "
            "starts): run the sampler before this one again, or switch same_video off."
        )
    if video.fps != fps:
        raise ValueError(
            f"fps is {fps:g} and the video before has {video.fps:g}: with same_video choose {video.fps:g}, or 0."
        )
    check_earlier(video.path, video.pictures)
    return video.path


def _check_same(name: str, known: object, wanted: object) -> None:
    if known != wanted:
        raise ValueError(
            f"{name} is {wanted} and the stream of go_on_from has {known}: choose {known}, or disconnect go_on_from to "
            "start a new stream."
        )


def _check_context(snapshot: StreamSnapshot, settings: StreamSettings) -> None:
    """Latents are kept for the context of before, at least those of one block."""
    known = snapshot.settings
    kept = max(known.context_frames, known.frames_per_block)
    wanted = settings.context_frames
    if min(wanted, snapshot.position or 0) > kept:
        raise ValueError(
            f"context_frames is {wanted} and the stream of go_on_from has kept {kept} for its context of "
            f"{known.context_frames}: choose at most {kept}, or disconnect go_on_from to start a new stream."
        )


def model_of(recipe: Recipe) -> dict[str, str | None]:
    """Of a recipe, what may not differ between a stream and what goes on with it."""
    return {
        "blocks": recipe.blocks,
        "model": recipe.model,
        "revision": recipe.revision,
        "weights": recipe.weights,
        "vae": recipe.vae or recipe.components or recipe.model,
        "decoder": recipe.decoder,
        # Features of the VAE and keys have the dtype that these two choose.
        "dtype": recipe.dtype,
        "device": recipe.device,
    }


def _sources(recipe: Recipe) -> tuple[str | None, ...]:
    """All that `stamp` stands for."""
    return recipe.model, recipe.components, recipe.vae, recipe.decoder, recipe.text_encoder, recipe.tokenizer


def _shown(value: str | None) -> str:
    return "none" if value is None else shown(value)

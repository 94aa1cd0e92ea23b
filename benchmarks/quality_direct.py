"""The part of `quality.py` for directed streams: prompt tracks, pictures given to a stream, streams that go on.

    python benchmarks/quality.py --direct --json     # one JSON object on the standard output, tables beside it

The figures without a policy in their name are those of the sampler's own policy; the others are in the same object.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import streamblocks_path  # noqa: F401
from continued_streams import CASES, continue_equal
from directed_streams import CHOICES, TRANSITION_BLOCKS, measure_track, measure_transition
from pictured_streams import MINI_STRENGTH, measure_pictured_streams

from streamblocks.stream.settings import StreamSettings

OWN_POLICY = StreamSettings().kv_policy
# Of a policy under which both choices are the same.
OWN_CHOICE = next(choice for choice, (policy, _) in CHOICES.items() if policy == OWN_POLICY)
TRACK_FIGURES = ("track_accuracy", "track_accuracy_one_block_later", "seam_ratio_transition")
PICTURE_FIGURES = ("start_image_accuracy", "video_color_accuracy", "video_motion_accuracy")


def add_direct_options(parser: argparse.ArgumentParser) -> None:
    """The options of this part; `policies`, `workers` and `model` are those of the others."""
    parser.add_argument("--direct", action="store_true", help="directed streams, and of --only what is named")
    parser.add_argument("--direct-cases", type=int, default=48, help="of tracks, start images and videos")
    parser.add_argument("--transition-cases", type=int, default=16, help="of transitions between prompts")
    parser.add_argument("--continue-blocks", type=int, default=10, help="of streams that go on; half of them before")


def measure_direct(options: argparse.Namespace) -> dict[str, Any]:
    """Figures of directed streams; those of `OWN_POLICY` are None where `options.policies` lacks it.

    Returns:
        Shares of cases in 0..1, ratios of seams, PSNR in dB, and `continue_equal`, which is true or false.
    """
    by_choice = _measure_choices(options)
    pictures = _measure_pictures(options)
    equal = _measure_continued(options)
    own, own_pictures = by_choice.get(OWN_CHOICE, {}), pictures.get(OWN_POLICY, {})
    figures: dict[str, Any] = {name: own.get(name) for name in TRACK_FIGURES}
    figures |= {name: own_pictures.get(name) for name in PICTURE_FIGURES}
    figures |= {"continue_equal": all(equal.values()), "by_choice": by_choice, "pictures_by_policy": pictures}
    figures |= {"continue_equal_by_case": equal, "video_strength": MINI_STRENGTH}
    return figures | {"direct_cases": options.direct_cases, "transition_cases": options.transition_cases}


def _measure_choices(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Figures of tracks by the choice of what a change does to the past, hard cuts of the own policy last."""
    cases, changes = options.direct_cases, options.transition_cases
    common = {"workers": options.workers, "model": options.model}
    print(f"Prompt tracks, {cases} changes of colour and shape; {changes} transitions of {TRANSITION_BLOCKS} blocks")
    _print_row("", "at its block %", "a block later %", "seam x", "transition's x", "arrived %")
    found: dict[str, dict[str, Any]] = {}
    for choice, (policy, _) in CHOICES.items():
        if policy in options.policies:
            found[choice] = measure_track(choice, cases, **common) | measure_transition(choice, changes, **common)
            _print_track(choice, found[choice])
    if OWN_CHOICE in found:
        cut = f"{OWN_CHOICE}, cut"
        found[cut] = dict(measure_track(OWN_CHOICE, cases, cut=True, **common))
        _print_track(cut, found[cut])
    return found


def _measure_pictures(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Figures of start images and videos, by policy."""
    print(f"Pictures, {options.direct_cases} start images and videos each, strength {MINI_STRENGTH:g}")
    _print_row("", "start image %", "video: colour %", "motion %", "strength 0 dB", "VAE dB")
    found = {}
    for policy in options.policies:
        found[policy] = measure_pictured_streams(
            options.model, cases=options.direct_cases, workers=options.workers, policy=policy
        )
        shares = (_percent(found[policy], name) for name in PICTURE_FIGURES)
        decibels = (f"{found[policy][name]:.2f}" for name in ("video_identity_psnr_db", "vae_psnr_db"))
        _print_row(policy, *shares, *decibels)
    return found


def _measure_continued(options: argparse.Namespace) -> dict[str, bool]:
    """Whether streams that go on are those that never stopped, by case."""
    blocks = options.continue_blocks
    cases = {name: settings for name, settings in CASES.items() if settings.kv_policy in options.policies}
    equal = continue_equal(str(options.model), blocks=blocks, cut=blocks // 2, cases=cases)
    print(f"{blocks} blocks in one run and over a snapshot after {blocks // 2}, bitwise:")
    for name, same in equal.items():
        _print_row(name, "equal" if same else "DIFFERENT")
    return equal


def _print_track(name: str, figures: Mapping[str, Any]) -> None:
    shares = (_percent(figures, share) for share in ("track_accuracy", "track_accuracy_one_block_later"))
    ratios = (_ratio(figures, ratio) for ratio in ("seam_ratio_change", "seam_ratio_transition"))
    _print_row(name, *shares, *ratios, _percent(figures, "transition_arrived"))


def _percent(figures: Mapping[str, Any], name: str) -> str:
    return f"{100 * figures[name]:.1f}" if name in figures else ""


def _ratio(figures: Mapping[str, Any], name: str) -> str:
    return f"{figures[name]:.3f}" if name in figures else ""


def _print_row(name: str, *cells: str) -> None:
    print(f"  {name:<31}" + "".join(f"{cell:>17}" for cell in cells), flush=True)

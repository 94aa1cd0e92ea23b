"""The command line of `full_size.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import streamblocks_path  # noqa: F401
from full_size_models import SIZES
from stream_variants import add_variant_options, read_window
from switched_kernels import NOTHING, SWITCHES
from weight_formats import FORMATS

from streamblocks.families.kv_policies import KV_POLICIES, RECOMPUTE
from streamblocks.stream.recipe import ATTENTION_BACKENDS


def parse_options(description: str, arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; exits with a message where it is wrong."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_what_is_run(parser)
    _add_variants(parser)
    add_variant_options(parser)
    options = parser.parse_args(arguments)
    for window in options.windows:
        try:
            read_window(window)
        except ValueError as error:
            parser.error(f"--windows: {error}")
    for name, allowed in (
        ("sizes", tuple(SIZES)),
        ("formats", FORMATS),
        ("policies", KV_POLICIES),
        ("backends", ATTENTION_BACKENDS),
        ("without", SWITCHES),
    ):
        wrong = [value for value in getattr(options, name) if value not in allowed]
        if wrong:
            parser.error(f"--{name} has {', '.join(wrong)}: choose from {', '.join(allowed)}.")
    if options.blocks < 4:
        parser.error(f"--blocks is {options.blocks}: at least 4 are needed, growth is counted from the third.")
    return options


def _add_what_is_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", "--sizes", dest="sizes", type=_names, default=["14B"], help="14B, 1.3B, tiny")
    parser.add_argument("--formats", type=_names, default=["bf16"], help=", ".join(FORMATS))
    parser.add_argument("--resolutions", type=_names, default=["832x480"], help="width x height, with an x")
    parser.add_argument("--policies", type=_names, default=[RECOMPUTE], help=", ".join(KV_POLICIES))
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--text-encoder", action="store_true", help="keep the text encoder on the device too")
    parser.add_argument("--json", type=Path, help="file for all figures; written after each configuration")
    parser.add_argument("--time-budget", type=float, default=float("inf"), help="seconds; then nothing new starts")


def _add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", "--backends", dest="backends", type=_names, default=["native"])
    parser.add_argument("--compile", nargs="?", const="on", choices=("off", "on", "both"), default="off")
    parser.add_argument(
        "--without",
        type=_names,
        default=[NOTHING],
        help="GPU kernels to switch off, one after the other, such as none,layer_norm",
    )
    parser.add_argument("--compile-backend", default="inductor")
    parser.add_argument("--no-fused-vae", dest="fused_vae", action="store_false", help="the VAE as diffusers has it")
    parser.add_argument("--tiny-decoder", action="store_true", help="decode with one in TAEHV's layout")
    parser.add_argument("--device-noise", action="store_true", help="noise from a generator on the device")
    parser.add_argument("--plain", action="store_true", help="the plain deep-copying loop beside the session")
    parser.add_argument("--plain-blocks", type=int, default=4)
    parser.add_argument("--profile", action="store_true", help="a table of kernels for each, in $OUT or here")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]

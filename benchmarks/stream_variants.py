"""Variants of a stream that `full_size.py` compares in one run: window, fused passes, keys in 8 bits, CUDA graphs."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import streamblocks_path  # noqa: F401
from random_pipeline import RandomPipeline

from streamblocks.ops.attention_backends import EIGHT_BIT, FLASH3_FP8
from streamblocks.ops.call_graphs import CallGraphs
from streamblocks.wan.steps import prepare_steps
from streamblocks.wan.transformer.installed_attention import causal_attention_of

DEFAULT_WINDOW = "6"
_BLOCK = 3
_WINDOW = re.compile(r"(\d+)(?:s(\d+))?")
_SWITCHES = {"off": (False,), "on": (True,), "both": (False, True)}


class Variant(NamedTuple):
    """How a configuration differs from the usual one.

    Attributes:
        window: latent frames that a block sees, its own among them; after an "s", how many of them are the sink.
        fused: the context's pass with the first step.
        wide_keys: keys in the model's dtype although attention reads 8 bits, so each call quantizes them.
        graphs: passes by CUDA graphs; not, whatever would be chosen for a stream, where it is False.
    """

    window: str = DEFAULT_WINDOW
    fused: bool = False
    wide_keys: bool = False
    graphs: bool = False

    def describe(self) -> str:
        """What is unusual, in a few letters."""
        window = "" if self.window == DEFAULT_WINDOW else f"w{self.window}"
        named = {"fused": self.fused, "wide-keys": self.wide_keys, "graphs": self.graphs}
        return "+".join(part for part in (window, *(name for name, is_on in named.items() if is_on)) if part) or "-"

    def settings(self) -> dict[str, Any]:
        """Of `StreamSettings`."""
        context, sink = read_window(self.window)
        return {"context_frames": context, "sink_frames": sink, "fuse_context": self.fused}

    @contextmanager
    def applied(self, pipeline: RandomPipeline) -> Iterator[CallGraphs | None]:
        """Inside, streams of the pipeline are of this variant; gives the graphs, if there are to be any."""
        causal = causal_attention_of(pipeline.pipe.transformer)
        with ExitStack() as stack:
            if self.wide_keys:
                stack.enter_context(patch.object(prepare_steps, "reads_8_bits", lambda transformer: False))
            causal.graphs = CallGraphs() if self.graphs else None
            try:
                yield causal.graphs
            finally:
                causal.graphs = None


def read_window(text: str) -> tuple[int, int]:
    """Context frames and sink frames of a window such as "21" or "12s3".

    Raises:
        ValueError: it is no window, or leaves nothing beside the block and the sink.
    """
    match = _WINDOW.fullmatch(text)
    context, sink = (int(match[1]) - _BLOCK, int(match[2] or 0)) if match else (0, 0)
    if context < 1 or sink > context:
        raise ValueError(f"{text!r} is no window: give latent frames, the block's {_BLOCK} among them, as 21 or 12s3.")
    return context, sink


def variants_of(options: argparse.Namespace, policy: str, backend: str) -> Iterator[Variant]:
    """The variants that were asked for, as far as they exist for a policy and a backend."""
    reads_8_bits = backend in (FLASH3_FP8, EIGHT_BIT)
    chosen = (options.windows, _SWITCHES[options.fuse], options.wide_keys, _SWITCHES[options.graphs])
    for window, fused, wide_keys, graphs in itertools.product(chosen[0], chosen[1], _SWITCHES[chosen[2]], chosen[3]):
        sink = read_window(window)[1]
        if (wide_keys and not reads_8_bits) or (sink and policy != "rolling"):
            continue
        yield Variant(window, fused, wide_keys, graphs)


def add_variant_options(parser: argparse.ArgumentParser) -> None:
    """`--windows`, `--fuse`, `--wide-keys` and `--graphs`."""
    parser.add_argument(
        "--windows",
        type=lambda text: text.split(","),
        default=[DEFAULT_WINDOW],
        help="latent frames that a block sees, its 3 among them: 6, 21 (Self-Forcing), 12s3 (LongLive: 3 are the sink)",
    )
    for name, told in (
        ("fuse", "the context's pass, or the clean one of the block before, with the first step"),
        ("wide-keys", "with flash3_fp8, keys in 16 bits that each call quantizes"),
        ("graphs", "passes and the encoder by CUDA graphs"),
    ):
        parser.add_argument(f"--{name}", choices=tuple(_SWITCHES), default="off", help=told)

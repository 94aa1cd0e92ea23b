"""All blocks of a clip in one forward of the transformer, each seeing what it will see in a stream.

A *unit* is three latent frames at one timestep: clean ones (context) or a noisy one (a block being denoised). A unit's
tokens attend to each other and to those of its predecessor, the window of a stream with three context frames. The
units of a clip are rows of the batch for diffusers' own `WanTransformer3DModel.forward`, so that each has a timestep,
a text and a place in time of its own; only the attention processors here know which rows belong together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import nn

from ...wan.transformer.rope import FrameOffsetRotaryEmbedding, RotaryTable, apply_rotary


@dataclass(frozen=True)
class Unit:
    """Three latent frames at one timestep.

    Attributes:
        block: of the clip, from 0.
        noisy: a block being denoised; else context, at t = 0.
        offset: latent frame at which it stands for RoPE.
        predecessor: index of the unit it also sees; None sees itself only.
        reencoded: its first latent frame is a picture encoded as an image (`recompute`, once the window slides).
        text_of: the block whose caption it is given.
    """

    block: int
    noisy: bool
    offset: int
    predecessor: int | None
    reencoded: bool
    text_of: int


FIRST_BLOCK = Unit(block=0, noisy=True, offset=0, predecessor=None, reencoded=False, text_of=0)
# How often the first block occurs in a clip, each time with noise of its own: it alone has no context to copy a
# shape from, so the words are learnt there.
FIRST_BLOCK_COPIES = 4


def lay_out_units(blocks: int) -> tuple[Unit, ...]:
    """The units of a clip of `blocks` blocks, for both KV policies of the pipeline; those without predecessor first.

    `rolling`: the clean pass of a block sees the block before, at its own place in time and under its own caption;
    the next block sees the keys it left. `recompute`: context and block stand at 0 and 3 in every block, the
    context sees only itself and is given the current caption. The first block is the same for both.
    """
    later = range(1, blocks)
    units = [Unit(0, False, 0, None, False, 0), *[FIRST_BLOCK] * FIRST_BLOCK_COPIES]
    contexts = {block: len(units) + block - 1 for block in later}
    units += [Unit(block - 1, False, 0, None, block > 1, block) for block in later]
    passes = {0: 0} | {block: len(units) + block - 1 for block in later if block < blocks - 1}
    units += [Unit(block, False, 3 * block, passes[block - 1], False, block) for block in passes if block]
    units += [Unit(block, True, 3 * block, passes[block - 1], False, block) for block in later]
    units += [Unit(block, True, 3, contexts[block], False, block) for block in later]
    return tuple(units)


class BlockParallel:
    """Puts training processors into a transformer, and binds the text of a forward to them."""

    def __init__(self, transformer: WanTransformer3DModel, units: Sequence[Unit]) -> None:
        config = transformer.config
        self.units = tuple(units)
        rope = _UnitRotaryEmbedding(config.attention_head_dim, tuple(config.patch_size), self.units)
        transformer.rope = rope
        self._text_bias: torch.Tensor | None = None
        for block in transformer.blocks:
            block.attn1.set_processor(_UnitSelfAttention(self.units))
            block.attn2.set_processor(_TextAttention(self))

    @contextmanager
    def bind(self, text_bias: torch.Tensor) -> Iterator[None]:
        """Add `text_bias` [rows, 1, 1, text tokens] to the scores of cross-attention inside the `with` block."""
        self._text_bias = text_bias
        try:
            yield
        finally:
            self._text_bias = None

    @property
    def text_bias(self) -> torch.Tensor:
        """The bias of the forward being made."""
        if self._text_bias is None:
            raise ValueError("no text is bound: call the transformer inside BlockParallel.bind.")
        return self._text_bias


class _UnitRotaryEmbedding(nn.Module):
    """RoPE tables of all units of a clip, concatenated, [1, units * tokens, 1, head_dim / 2, 2]."""

    def __init__(self, head_dim: int, patch_size: tuple[int, int, int], units: Sequence[Unit]) -> None:
        super().__init__()
        self._units = tuple(units)
        self._single = FrameOffsetRotaryEmbedding(head_dim, patch_size)
        self._kept: dict[tuple[torch.Size, torch.device], RotaryTable] = {}

    def forward(self, hidden_states: torch.Tensor) -> RotaryTable:
        """Tables for rows [clips * units, channels, frames, height, width]."""
        place = (hidden_states.shape[2:], hidden_states.device)
        if place not in self._kept:
            tables = []
            for unit in self._units:
                self._single.frame_offset = unit.offset
                tables.append(self._single(hidden_states))
            first, second = (torch.cat(parts, dim=1) for parts in zip(*tables, strict=True))
            self._kept = {place: (first, second)}
        return self._kept[place]


class _UnitSelfAttention:
    """Self-attention of rows [clips * units, tokens, dim] over each unit and its predecessor."""

    def __init__(self, units: tuple[Unit, ...]) -> None:
        self.count = len(units)
        self.alone = sum(unit.predecessor is None for unit in units)
        self.before = torch.tensor([unit.predecessor for unit in units[self.alone :]], dtype=torch.long)

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryTable | None = None,
    ) -> torch.Tensor:
        """Attend."""
        assert rotary_emb is not None
        value = attn.to_v(hidden_states)
        # In float32: a norm with float32 weights has a fast kernel for float32 inputs only.
        query, key = attn.norm_q(attn.to_q(hidden_states).float()), attn.norm_k(attn.to_k(hidden_states).float())
        query, key = (self._rotate(part, attn.heads, rotary_emb).type_as(value) for part in (query, key))
        value = value.unflatten(0, (-1, self.count)).unflatten(-1, (attn.heads, -1))
        alone = self.alone
        if self.before.device != value.device:
            self.before = self.before.to(value.device)
        keys, values = (torch.cat([part.index_select(1, self.before), part[:, alone:]], dim=2) for part in (key, value))
        first = _attend(query[:, :alone], key[:, :alone], value[:, :alone])
        attended = torch.cat([first, _attend(query[:, alone:], keys, values)], dim=1).flatten(0, 1)
        return attn.to_out[1](attn.to_out[0](attended))

    def _rotate(self, projected: torch.Tensor, heads: int, rotary_emb: RotaryTable) -> torch.Tensor:
        """To [clips, units, tokens, heads, head_dim], rotated."""
        tokens = projected.shape[1]
        clips = projected.unflatten(0, (-1, self.count)).flatten(1, 2).unflatten(-1, (heads, -1))
        return apply_rotary(clips, *rotary_emb).unflatten(1, (self.count, tokens))


class _TextAttention:
    """Cross-attention with a bias per key."""

    def __init__(self, parallel: BlockParallel) -> None:
        self._parallel = parallel

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryTable | None = None,
    ) -> torch.Tensor:
        """Attend to [rows, text tokens, dim]."""
        value = attn.to_v(encoder_hidden_states)
        query = attn.norm_q(attn.to_q(hidden_states).float()).type_as(value)
        key = attn.norm_k(attn.to_k(encoder_hidden_states).float()).type_as(value)
        query, key, value = (part.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        attended = _attention(query, key, value, self._parallel.text_bias)
        return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[clips, units, tokens, heads, head_dim] to [clips, units, tokens, heads * head_dim]."""
    rows = (part.flatten(0, 1).transpose(1, 2) for part in (query, key, value))
    attended = _attention(*rows)
    return attended.transpose(1, 2).flatten(2).unflatten(0, query.shape[:2])


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(q k / sqrt(d) + bias) v, written out: on a CPU the fused kernel's backward is six times slower here.

    [rows, heads, tokens, head_dim]; the sizes are so small that the scores take little memory.
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.type_as(scores)
    return scores.softmax(-1).type_as(value) @ value


def pad_text(embeds: torch.Tensor, lengths: torch.Tensor, text_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Stand in for the pipeline's zero padding to `text_tokens`, with one zero token instead of hundreds.

    All padding has the same key and value; n equal keys weigh as much as one whose score is log(n) higher.

    Args:
        embeds: [texts, tokens, dim], the encoder's output for the longest text.
        lengths: [texts], tokens of each text, its end included.
        text_tokens: the pipeline pads to.

    Returns:
        Texts [texts, tokens + 1, dim] and the bias of their keys [texts, 1, 1, tokens + 1].
    """
    places = torch.arange(embeds.shape[1], device=embeds.device)
    real = places[None] < lengths[:, None]
    texts = torch.cat([embeds * real[:, :, None], embeds.new_zeros(len(embeds), 1, embeds.shape[2])], dim=1)
    padding = (text_tokens - lengths).float().log()[:, None]
    bias = torch.cat([torch.zeros_like(real, dtype=torch.float32).masked_fill(~real, -math.inf), padding], dim=1)
    return texts, bias[:, None, None]

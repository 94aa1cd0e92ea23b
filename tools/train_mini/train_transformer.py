"""Second stage: transformer and text encoder learn, by flow matching, to continue a stream."""

from __future__ import annotations

import math

import torch
from diffusers import WanTransformer3DModel
from torch import nn
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from .batches import Batch, draw_batch
from .block_parallel import BlockParallel, lay_out_units, pad_text
from .checkpoint import TrainingState, step_generator
from .latent_pool import BLOCKS, LatentPool
from .mini_models import TEXT_LENGTH, make_text_encoder, make_tokenizer, make_transformer
from .scenes import draw_caption, draw_scene
from .train_options import TrainOptions, autocast, learning_rate_at
from .training_loop import Stage, follow_gradient, run_stage

PEAK_RATE = 1.2e-3
AVERAGE_DECAY = 0.997
CHECKPOINT = "transformer_state.safetensors"
# Gain of the norms on query and key in cross-attention: with Wan's 1, no score could stand out among 505 equal ones.
_TEXT_GAIN = 1.5


class CaptionedTransformer(nn.Module):
    """Transformer and text encoder, trained as one."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer: WanTransformer3DModel = make_transformer()
        self.text_encoder: UMT5EncoderModel = make_text_encoder()
        self.tokenizer: PreTrainedTokenizerBase = make_tokenizer()
        self.parallel = BlockParallel(self.transformer, lay_out_units(BLOCKS))

    def forward(self, batch: Batch) -> torch.Tensor:
        """The velocity of the batch's noisy rows, float32."""
        texts, bias = self.encode(batch.captions)
        with self.parallel.bind(bias[batch.text_index]):
            velocity = self.transformer(batch.samples, batch.timesteps, texts[batch.text_index], return_dict=False)[0]
        return velocity[batch.noisy].float()

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Texts and the bias of their keys, as `pad_text` gives them."""
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt").to(self.transformer.device)
        embeds = self.text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return pad_text(embeds, tokens.attention_mask.sum(1), TEXT_LENGTH)


def train_transformer(pool: LatentPool, options: TrainOptions) -> tuple[CaptionedTransformer, list[tuple[int, float]]]:
    """Train, or resume training; returns the averaged model and its losses."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed + 1)
        model = CaptionedTransformer()
        attend_to_words(model, step_generator(options.seed, "words", 0))
    model.to(options.device)
    state = TrainingState.start(model, learning_rate=PEAK_RATE, weight_decay=0.01)
    stage = Stage("transformer", "loss", options.transformer_steps, AVERAGE_DECAY, CHECKPOINT)
    run_stage(stage, state, options, lambda: _make_step(state, pool, options))
    return model.eval().requires_grad_(False), state.losses


def _make_step(state: TrainingState, pool: LatentPool, options: TrainOptions) -> torch.Tensor:
    model = state.module
    assert isinstance(model, CaptionedTransformer)
    batch = draw_batch(
        pool,
        model.parallel.units,
        clips=options.transformer_batch,
        few_step=False,
        generator=step_generator(options.seed, "transformer", state.step),
    )
    return descend(state, batch, options, learning_rate_at(state.step, options.transformer_steps, PEAK_RATE))


def descend(state: TrainingState, batch: Batch, options: TrainOptions, learning_rate: float) -> torch.Tensor:
    """One step of the optimizer towards the batch's targets; returns the loss, a scalar on the device."""
    with autocast(options.device):
        velocity = state.module(batch)
    loss = (velocity - batch.targets).square().mean()
    follow_gradient(state, loss, learning_rate=learning_rate)
    return loss.detach()


@torch.no_grad()
def attend_to_words(model: CaptionedTransformer, generator: torch.Generator) -> None:
    """Start cross-attention at the words of the captions, not at the 500 tokens of padding after them.

    The query's bias becomes the mean key of words. Without it the words have a hundredth of the weight, and the
    stage spends its first thousand steps on finding them.
    """
    captions = [draw_caption(draw_scene(generator), generator) for _ in range(64)]
    texts, bias = model.encode(captions)
    words = model.transformer.condition_embedder.text_embedder(texts)
    is_word = bias[:, 0, 0] == 0.0
    for block in model.transformer.blocks:
        attention = block.attn2
        attention.norm_q.weight.fill_(_TEXT_GAIN)
        attention.norm_k.weight.fill_(_TEXT_GAIN)
        key = attention.norm_k(attention.to_k(words))[is_word].mean(0)
        attention.to_q.bias.copy_(key * (math.sqrt(len(key)) / key.norm()))

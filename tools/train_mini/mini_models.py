"""The mini pipeline's parts, untrained: the classes of the real one, smaller."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .scenes import all_words

LATENT_CHANNELS = 8
TEXT_DIM = 64
TEXT_LENGTH = 512
STORED_DTYPE = torch.float16


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the grammar, any other word `<unk>`; `</s>` ends each text as in T5."""
    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *all_words()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\w\s]"), " "), normalizers.Replace("gray", "grey")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
        padding_side="right",
    )


def make_text_encoder() -> UMT5EncoderModel:
    """UMT5 of two layers."""
    config = UMT5Config(
        vocab_size=64,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config)


def make_transformer() -> WanTransformer3DModel:
    """A Wan transformer of 6 layers, 192 wide."""
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=128,
        ffn_dim=768,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def make_vae(
    latents_mean: Sequence[float] | None = None, latents_std: Sequence[float] | None = None
) -> AutoencoderKLWan:
    """Wan's VAE with 8 latent channels; the encoder is the thinner half, as its work is the easier one."""
    return AutoencoderKLWan(
        base_dim=8,
        decoder_base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=list(latents_mean or [0.0] * LATENT_CHANNELS),
        latents_std=list(latents_std or [1.0] * LATENT_CHANNELS),
    )


def write_pipeline(folder: Path, modules: Mapping[str, torch.nn.Module]) -> Path:
    """Write a pipeline folder in diffusers' layout with float16 weights; return `folder`.

    Args:
        folder: made if absent.
        modules: `text_encoder`, `transformer` and `vae`; cast in place.
    """
    components: dict[str, Any] = {name: module.to("cpu", STORED_DTYPE) for name, module in modules.items()}
    components["tokenizer"] = make_tokenizer()
    components["scheduler"] = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=5.0
    )
    WanPipeline(**components).save_pretrained(folder, safe_serialization=True)
    return folder

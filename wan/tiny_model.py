"""A complete Wan pipeline folder of a few megabytes with seeded random weights.

It has diffusers' layout (`model_index.json`, `tokenizer/`, `text_encoder/`, `transformer/`, `vae/`,
`scheduler/`) and the proportions in time and space of Wan 2.1 (16 latent channels, 8x in space, 4x in time) or of 2.2's
5B (48 channels, 16x, 4x), so that every path of the pack can be run on a CPU in seconds. The pictures mean nothing, but
they vary.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from ..families.model_family import LatentGeometry
from .checkpoints.preset_choice import SETTINGS_FILE
from .checkpoints.vae_configs import PUBLISHED_STATISTICS, complete_vae_config
from .geometry import WAN_21_GEOMETRY

TEXT_DIM = 48
TEXT_LENGTH = 512

# Gains on top of 1/sqrt(fan in), chosen by looking at decoded noise: smaller gives flat grey, larger
# gains give frames clamped to black and white.
_GAINS = {"decoder.conv_out.weight": 0.6}
# T5 divides no attention score by sqrt(head size), so full-size queries would make attention one-hot.
_QUERY_GAIN = 0.3


def write_tiny_model(
    folder: Path, *, seed: int = 0, layers: int = 2, geometry: LatentGeometry = WAN_21_GEOMETRY
) -> Path:
    """Write the tiny pipeline of latents of `geometry`, one of Wan's, into `folder` (made if absent); returns `folder`.

    `layers` are those of the transformer, and of the text encoder. The same seed writes the same bytes. torch's global
    random state does not change.
    """
    with _quiet_random_state():
        # A dict, because WanPipeline's annotations are narrower than what it takes.
        components: dict[str, Any] = {
            "tokenizer": _tokenizer(),
            "text_encoder": _text_encoder(layers),
            "transformer": _transformer(layers, geometry.channels),
            "vae": _vae() if geometry == WAN_21_GEOMETRY else _residual_vae(),
            "scheduler": UniPCMultistepScheduler(
                prediction_type="flow_prediction",
                use_flow_sigmas=True,
                num_train_timesteps=1000,
                flow_shift=5.0,
            ),
        }
        pipeline = WanPipeline(**components)
    for name in ("text_encoder", "transformer", "vae"):
        _randomise(getattr(pipeline, name), seed=seed, label=name)
    folder.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(folder, safe_serialization=True)
    (folder / SETTINGS_FILE).write_text(json.dumps({"name": "tiny random model", "width": 64, "height": 64}))
    return folder


@contextmanager
def _quiet_random_state() -> Iterator[None]:
    """Restore the CPU random state afterwards: building modules draws from it."""
    with torch.random.fork_rng(devices=[]):
        yield


def _tokenizer() -> PreTrainedTokenizerFast:
    """Characters of printable ASCII, and bytes for everything else; `</s>` ends each text as in T5."""
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    characters = [("▁", -2.0)] + [(chr(code), -2.0) for code in range(33, 127)]
    fallback = [(f"<0x{byte:02X}>", -10.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(specials + characters + fallback, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement="▁", prepend_scheme="always")]
    )
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


def _text_encoder(layers: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=384,
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=96,
        num_layers=layers,
        num_heads=3,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=128,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return UMT5EncoderModel(config).eval()


def _transformer(layers: int, channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=128,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()


def _vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    ).eval()


def _residual_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        **complete_vae_config(
            {
                "base_dim": 8,
                "decoder_base_dim": 8,
                "z_dim": 48,
                "num_res_blocks": 1,
                "is_residual": True,
                "in_channels": 12,
                "out_channels": 12,
                "patch_size": 2,
                **PUBLISHED_STATISTICS[48],
            }
        )
    ).eval()


@torch.no_grad()
def _randomise(module: torch.nn.Module, *, seed: int, label: str) -> None:
    """Draw every parameter again, each from its own generator.

    With a generator per name, adding a tensor changes no other's values. No parameter stays at 0 or 1,
    so a loader that skips a parameter is detected.
    """
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{label}/{name}".encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(_scaled(name, noise))


def _scaled(name: str, noise: torch.Tensor) -> torch.Tensor:
    """`noise` scaled for the parameter called `name`: gains near 1, biases near 0, weights by fan-in."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "gamma" or (leaf == "weight" and noise.ndim == 1):
        return 1.0 + 0.1 * noise
    if leaf == "bias":
        return 0.05 * noise
    if leaf == "scale_shift_table":
        return 0.3 * noise
    if name.startswith("shared") or "embed_tokens" in name:
        return noise
    gain = _QUERY_GAIN if "SelfAttention.q." in name else _GAINS.get(name, 1.0)
    return noise * (gain / math.sqrt(noise[0].numel()))

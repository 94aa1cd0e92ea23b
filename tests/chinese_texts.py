"""What may stand in Latin letters in Chinese texts: names of models, formats, programs and files."""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAMES = """
    AR B CLIP CPU Causal Checkpoint ComfyUI Ctrl+Enter DoRA EMA FP8 Face Forcing Forcing++ GB GPU GiB H100 Hugging ID
    INT8 JSON KV Krea LoRA LongLive MemFlow Matroska MiB PEFT PyTorch Python R RTX Realtime Reward Self-Forcing
    StreamDiffusionV2 StreamBlocks Transformer Triton UNet VAE VP9 Wan WebM bfloat16 cuDNN comfy-kitchen comfy_int8
    cpu diffusers fa3-fwd flash flash3 flex Hopper
    LightTAE LightVAE TAEHV lighttaew2_1 lighttaew2_2 lightvaew2_1 taew2_1 taew2_2
    float16 float32 https kohya localhost mp4 musubi-tuner sage torch torch.compile torchao umt5 wan xformers
"""
NAMES = frozenset(_NAMES.split())
# Files, folders, settings and fields, as they are called on the disk and in a workflow.
_PATHS = re.compile(
    r"\S*(?:models|vae|text_encoders|output|streamblocks|owner|video)/\S*|[\w.]*\.(?:pth?|bin|ckpt|safetensors)\b|wan2\.2_vae|"
    r"STREAMBLOCKS_\w+|%[\w:-]+%|text_encoder:|[\w*.]*\.\*|\d+x\d+",
    re.ASCII,
)
# Examples of prompts and code: values, which are not translated.
_QUOTED = re.compile(r"'[^']*'|`[^`]*`|\{\w+\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*")
_HAN = re.compile(r"[\u4e00-\u9fff]")


def english_words(text: str) -> list[str]:
    """The words of a Chinese text that are neither names nor paths nor quoted."""
    for left_out in (_QUOTED, _PATHS):
        text = left_out.sub(" ", text)
    return [word for word in _WORD.findall(text) if word.rstrip(".") not in NAMES]


def is_chinese(text: str) -> bool:
    """Whether there is Chinese in it, or nothing but names."""
    return bool(_HAN.search(text)) or not english_words(text)


def all_english_words(texts: Iterable[str]) -> dict[str, list[str]]:
    """The texts that have such words, with them."""
    found = {text: english_words(text) for text in texts}
    return {text: words for text, words in found.items() if words}

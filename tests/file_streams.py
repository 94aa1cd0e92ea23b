"""Streams from the twins of users' files, and a folder in diffusers' layout with the same weights."""

import sentencepiece
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from layouts import TRANSFORMER, UMT5, VAE, umt5_values
from safetensors.torch import load_file
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings

SETTINGS = StreamSettings(width=32, height=32, steps=2, blocks=3, seed=3)
SHORT = StreamSettings(width=32, height=32, steps=1, blocks=1, seed=3)
PROMPTS, VALUES = umt5_values()
FILES = Recipe(model=str(TRANSFORMER), vae=str(VAE), text_encoder=str(UMT5), dtype="float32")
NO_TEXT = Recipe(model=str(TRANSFORMER), vae=str(VAE), dtype="float32")


class Pictures:
    """A sink that keeps everything."""

    def __init__(self):
        self.blocks = []

    def write(self, frames):
        self.blocks.append(frames)

    def close(self):
        return None


class Nobody:
    """Watches without a word, and remembers what was loaded."""

    def __init__(self):
        self.loaded = set()

    def while_loading(self, component, done, total):
        self.loaded.add(component)

    def before_pass(self, index):
        pass

    def after_block(self, block):
        pass


def stream(recipe, prompt=PROMPTS[0], embeds=None, settings=SETTINGS):
    pictures, watcher = Pictures(), Nobody()
    report = run_stream(materialise(recipe), settings, Direction(lambda _: prompt, embeds), [pictures], watcher)
    return torch.cat(pictures.blocks), watcher.loaded, report


def write_folder(folder):
    """The same weights in diffusers' layout, written by diffusers and transformers."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(TRANSFORMER).items()}
    transformer = WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, text_dim=64, ffn_dim=256, num_layers=3
    )
    transformer.load_state_dict(convert_wan_transformer_to_diffusers(tensors))
    vae = AutoencoderKLWan(base_dim=4)
    vae.load_state_dict(convert_wan_vae_to_diffusers(load_file(VAE)))
    tensors = load_file(UMT5)
    model = tensors.pop("spiece_model").numpy().tobytes()
    sizes = {"vocab_size": 256, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    text_encoder = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    text_encoder.load_state_dict(tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"]})
    spm = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [(spm.id_to_piece(index), spm.get_score(index)) for index in range(spm.get_piece_size())]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0)
    parts = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    return folder

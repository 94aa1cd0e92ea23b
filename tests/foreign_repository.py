"""A diffusers modular repository with its own blocks, written to disk: Krea Realtime's contract in miniature."""

import json
import shutil
from pathlib import Path

BLOCKS_PY = """
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, ConfigSpec, InputParam, OutputParam
from diffusers.modular_pipelines.wan.encoders import get_t5_prompt_embeds
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from transformers import AutoTokenizer, UMT5EncoderModel


class TextEncoderStep(ModularPipelineBlocks):
    model_name = "foreign"
    expected_components = [ComponentSpec("text_encoder", UMT5EncoderModel), ComponentSpec("tokenizer", AutoTokenizer)]
    inputs = [InputParam("prompt", required=True)]
    intermediate_outputs = [OutputParam("prompt_embeds", kwargs_type="denoiser_input_fields")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        block.prompt_embeds = get_t5_prompt_embeds(
            components.text_encoder, components.tokenizer, block.prompt, 32, components.text_encoder.device
        )
        self.set_block_state(state, block)
        return components, state


class BeforeDenoiseStep(ModularPipelineBlocks):
    model_name = "foreign"
    expected_components = [ComponentSpec("transformer", WanTransformer3DModel)]
    expected_configs = [ConfigSpec("frame_cache_len", 9)]
    inputs = [
        InputParam("block_idx", required=True),
        InputParam("num_frames_per_block", default=3),
        InputParam("height", default=32),
        InputParam("width", default=32),
        InputParam("generator"),
        InputParam("kv_cache"),
    ]
    intermediate_outputs = [OutputParam("latents"), OutputParam("kv_cache")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        shape = (1, 16, block.num_frames_per_block, block.height // 8, block.width // 8)
        block.latents = randn_tensor(shape, generator=block.generator, device=components.transformer.device)
        if block.block_idx == 0:
            block.kv_cache = [{"k": torch.zeros(shape), "v": torch.zeros(1)}]
        self.set_block_state(state, block)
        return components, state


class DenoiseStep(ModularPipelineBlocks):
    model_name = "foreign"
    expected_components = [
        ComponentSpec("transformer", WanTransformer3DModel),
        ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler),
    ]
    inputs = [
        InputParam("latents", required=True),
        InputParam("prompt_embeds", required=True),
        InputParam("kv_cache", required=True),
        InputParam("num_inference_steps", default=4),
    ]
    intermediate_outputs = [OutputParam("latents"), OutputParam("current_denoised_latents")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        past = block.kv_cache[0]
        dtype = components.transformer.dtype
        latents = block.latents
        for step in range(block.num_inference_steps):
            time = torch.tensor([1000.0 * (1 - step / block.num_inference_steps)])
            # The past takes part, so that losing the cache between calls shows in the pictures.
            sample = (latents + 0.5 * past["k"] * past["v"]).to(dtype)
            velocity = components.transformer(sample, time, block.prompt_embeds.to(dtype), return_dict=False)[0]
            latents = latents - velocity.float() / block.num_inference_steps
        past["k"].copy_(latents)
        past["v"].add_(1.0)
        block.latents = block.current_denoised_latents = latents
        self.set_block_state(state, block)
        return components, state


class DecodeStep(ModularPipelineBlocks):
    model_name = "foreign"
    expected_components = [
        ComponentSpec("vae", AutoencoderKLWan),
        ComponentSpec(
            "video_processor",
            VideoProcessor,
            config=FrozenDict({"vae_scale_factor": 8}),
            default_creation_method="from_config",
        ),
    ]
    inputs = [
        InputParam("latents", required=True),
        InputParam("decoder_cache"),
        InputParam("frame_cache_context", required=True),
        InputParam("output_type", default="np"),
    ]
    intermediate_outputs = [OutputParam("videos"), OutputParam("decoder_cache")]

    @torch.no_grad()
    def __call__(self, components, state):
        block = self.get_block_state(state)
        vae = components.vae
        if block.decoder_cache is None:
            vae.clear_cache()
            block.decoder_cache = [None] * vae._conv_num
        parts = []
        for index, latent in enumerate(block.latents.to(vae.dtype).split(1, dim=2)):
            first = block.decoder_cache[0] is None
            z = vae.post_quant_conv(latent)
            parts.append(vae.decoder(z, feat_cache=block.decoder_cache, feat_idx=[0], first_chunk=first))
        video = torch.cat(parts, dim=2).clamp(-1, 1)
        block.frame_cache_context.extend(video.split(1, dim=2))
        block.videos = components.video_processor.postprocess_video(video, output_type=block.output_type)
        self.set_block_state(state, block)
        return components, state


class ForeignBlocks(SequentialPipelineBlocks):
    model_name = "foreign"
    block_classes = [TextEncoderStep, BeforeDenoiseStep, DenoiseStep, DecodeStep]
    block_names = ["text_encoder", "before_denoise", "denoise", "decode"]
"""

COMPONENTS = {
    "text_encoder": ("transformers", "UMT5EncoderModel"),
    "tokenizer": ("transformers", "AutoTokenizer"),
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "transformer": ("diffusers", "WanTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLWan"),
}


def write_foreign_repository(folder: Path, tiny_folder: Path) -> Path:
    """Write blocks, indexes and the tiny model's weights into `folder`."""
    folder.mkdir(parents=True)
    for name in COMPONENTS:
        shutil.copytree(tiny_folder / name, folder / name)
    (folder / "blocks.py").write_text(BLOCKS_PY)
    modular_config = {
        "_class_name": "ForeignBlocks",
        "auto_map": {"ModularPipelineBlocks": "blocks.ForeignBlocks"},
    }
    (folder / "modular_config.json").write_text(json.dumps(modular_config))
    index = {"_class_name": "ModularPipeline", "_blocks_class_name": "ForeignBlocks", "frame_cache_len": 9}
    for name, (library, class_name) in COMPONENTS.items():
        spec = {
            "pretrained_model_name_or_path": str(folder),
            "subfolder": name,
            "variant": None,
            "revision": None,
            "type_hint": [library, class_name],
        }
        index[name] = [library, class_name, spec]
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return folder

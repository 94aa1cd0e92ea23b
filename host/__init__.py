"""All that talks to ComfyUI, by subject; nothing else but the nodes' schemas imports it."""

from .allowed_code import allowed_code, allowed_code_file, ask_about_code
from .assets import list_as_asset
from .execution import blocked_output, is_cancel, running_prompt, throw_if_cancelled
from .files_made import (
    is_trimmed,
    new_output_file,
    new_temp_file,
    output_folder,
    reserve_output_file,
    shown_in_output,
    temp_folder,
    video_from_file,
    workflow_metadata,
)
from .live_streams import note_changed_by_hand, running, times_changed_by_hand
from .model_management import (
    ComfyResidency,
    WholeModelPatcher,
    default_device,
    device_names,
    other_models,
    unload_all_models,
)
from .models_on_disk import (
    approximate_vae_files,
    diffusers_folders,
    lora_files,
    new_transformer_file,
    pipeline_folders,
    resolve_lora,
    resolve_model,
    text_encoder_files,
    transformer_files,
    vae_files,
)
from .pipeline_folders import PipelineFolder
from .progress import StreamProgress, workflow_id
from .server_routes import register_routes
from .video_inputs import GivenVideo, look_into_video

__all__ = [
    "ComfyResidency",
    "GivenVideo",
    "PipelineFolder",
    "StreamProgress",
    "WholeModelPatcher",
    "allowed_code",
    "allowed_code_file",
    "approximate_vae_files",
    "ask_about_code",
    "blocked_output",
    "default_device",
    "device_names",
    "diffusers_folders",
    "is_cancel",
    "is_trimmed",
    "list_as_asset",
    "look_into_video",
    "lora_files",
    "new_output_file",
    "new_temp_file",
    "new_transformer_file",
    "note_changed_by_hand",
    "other_models",
    "output_folder",
    "pipeline_folders",
    "register_routes",
    "reserve_output_file",
    "resolve_lora",
    "resolve_model",
    "running",
    "running_prompt",
    "shown_in_output",
    "temp_folder",
    "text_encoder_files",
    "throw_if_cancelled",
    "times_changed_by_hand",
    "transformer_files",
    "unload_all_models",
    "vae_files",
    "video_from_file",
    "workflow_id",
    "workflow_metadata",
]

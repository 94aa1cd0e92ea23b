"""Models in ComfyUI's folders. Each list is the keys of an index, so what a node shows is what it finds.

Of one name in several roots (`extra_model_paths.yaml`) the first root's is taken, as in ComfyUI. A name with `..` is
never listed and so never found: ComfyUI does not check every workflow.
"""

from __future__ import annotations

import logging
from pathlib import Path

import folder_paths

from .file_names import check_name
from .pipeline_folders import PipelineFolder, find_pipeline_folders

logger = logging.getLogger(__name__)

FOLDERS = "diffusers"
FILES = "diffusion_models"
VAE_FILES = "vae"
APPROXIMATE_VAE_FILES = "vae_approx"
TEXT_ENCODER_FILES = "text_encoders"
LORAS = "loras"
_MODEL_FILES = (FILES, VAE_FILES, APPROXIMATE_VAE_FILES, TEXT_ENCODER_FILES)


def diffusers_folders() -> dict[str, PipelineFolder]:
    """Folders in diffusers' layout in `models/diffusers`, by the names that are listed: `diffusers/<name>`."""
    found: dict[str, PipelineFolder] = {}
    for root in folder_paths.get_folder_paths(FOLDERS):
        for name, folder in find_pipeline_folders(Path(root)).items():
            found.setdefault(f"{FOLDERS}/{name}", folder)
    return dict(sorted(found.items()))


def pipeline_folders() -> list[str]:
    """The names of `diffusers_folders` that have a transformer, or are modular repositories."""
    return [name for name, folder in diffusers_folders().items() if folder.has_model]


def transformer_files() -> list[str]:
    """Single files in `models/diffusion_models`, as `diffusion_models/<name>`."""
    return _named(FILES)


def vae_files() -> list[str]:
    """Single files in `models/vae`, as `vae/<name>`."""
    return _named(VAE_FILES)


def approximate_vae_files() -> list[str]:
    """Single files in `models/vae_approx`, tiny decoders among them, as `vae_approx/<name>`."""
    return _named(APPROXIMATE_VAE_FILES)


def text_encoder_files() -> list[str]:
    """Single files in `models/text_encoders` and `models/clip`, one list in ComfyUI, as `text_encoders/<name>`."""
    return _named(TEXT_ENCODER_FILES)


def lora_files() -> list[str]:
    """Files in `models/loras`, by their names below it."""
    return list(_files_in(LORAS))


def resolve_model(name: str) -> str:
    """The absolute path behind a name of `diffusers_folders` or of one of the lists of model files.

    Raises:
        ValueError: it is not, or no longer, in ComfyUI's model folders.
    """
    kind, _, rest = name.partition("/")
    path = None
    if kind == FOLDERS:
        folder = diffusers_folders().get(name)
        path = None if folder is None else folder.path
    elif kind in _MODEL_FILES:
        path = _files_in(kind).get(rest)
    if path is None:
        raise ValueError(
            f"model {name!r} is not in ComfyUI's model folders: refresh the page (key R) and choose again."
        )
    return str(path.absolute())


def resolve_lora(name: str) -> str:
    """The absolute path behind a name of `lora_files`; raises ValueError for every other name."""
    path = _files_in(LORAS).get(name)
    if path is None:
        raise ValueError(f"lora {name!r} is not in models/loras: refresh the page (key R) and choose again.")
    return str(path.absolute())


def new_transformer_file(name: str) -> Path:
    """The path of a new `.safetensors` file in `models/diffusion_models`.

    Raises:
        ValueError: `name` leads out of that folder, which a workflow from elsewhere might try, has control characters,
            or is there already.
    """
    check_name("name", name)
    roots = [Path(root) for root in folder_paths.get_folder_paths(FILES)]
    # ComfyUI lists an older name of the folder first.
    root = next((root for root in roots if root.name == FILES), roots[0]).resolve()
    path = root / (name if name.endswith(".safetensors") else f"{name}.safetensors")
    if root not in path.resolve().parents:
        raise ValueError(f"name is {name!r}: give a file name, or one with sub-folders, inside models/{FILES}.")
    if path.exists():
        raise ValueError(f"name is {name!r}: {path} is there already and is not replaced; give another name.")
    return path


def _named(kind: str) -> list[str]:
    return [f"{kind}/{name}" for name in _files_in(kind)]


def _files_in(kind: str) -> dict[str, Path]:
    """ComfyUI's own list of a kind of files, with the file that ComfyUI takes for each; dangling links are left out."""
    try:
        names = folder_paths.get_filename_list(kind)
    except OSError as error:
        # ComfyUI's cache asks for the times of folders it has seen; a linked one, on a drive say, may be gone.
        logger.debug("models/%s is listed anew: %s", kind, error)
        names, *_ = folder_paths.get_filename_list_(kind)
    paths = {name: folder_paths.get_full_path(kind, name) for name in sorted(names)}
    return {name: Path(path) for name, path in paths.items() if path is not None}

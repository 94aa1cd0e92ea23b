"""Which model a user chose in the loader's list: the pack's own ones, ComfyUI's folders and files, or the hub."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from .. import host
from ..stream.recipe import is_hub_id

MINI_MODEL = "mini (in the pack: coloured shapes at 64x64)"
TINY_MODEL = "tiny random model (made on the spot, to try the nodes)"
MINI_FOLDER = Path(__file__).resolve().parent.parent / "models" / "mini"
MINI_DECODER = "the mini's tiny one"
_MINI_DECODER_FILE = MINI_FOLDER / "tiny_decoder" / "tiny_decoder.safetensors"
HUB_MODEL = "hub id below"


def model_path(model: str, hub_id: str) -> str:
    """What a recipe calls the chosen model: an absolute path, or a hub id.

    Raises:
        ValueError: the model is not in ComfyUI's folders, or `hub_id` is empty or none.
    """
    if model == MINI_MODEL:
        return str(MINI_FOLDER)
    if model == TINY_MODEL:
        return str(tiny_model_folder())
    if model != HUB_MODEL:
        return host.resolve_model(model)
    if not hub_id:
        raise ValueError(f"hub_id is empty: with model '{HUB_MODEL}', give a repository such as owner/name.")
    if not is_hub_id(hub_id):
        raise ValueError(
            f"hub_id is {hub_id!r}: give a Hugging Face repository such as owner/name; put a folder on this "
            "machine into models/diffusers, then choose it under 'model'."
        )
    return hub_id


def components_path(components: str) -> str:
    """The folder of the chosen components; raises ValueError where ComfyUI's folders have no such one."""
    return str(MINI_FOLDER) if components == MINI_MODEL else host.resolve_model(components)


def mini_decoder_path(model: str, parts: str | None) -> str:
    """The file of the mini's tiny decoder.

    Args:
        model: the chosen model.
        parts: of `components_path`; None where they are the model's.

    Raises:
        ValueError: the VAE is not the mini's, whose latents alone it knows.
    """
    if parts != str(MINI_FOLDER) and (parts is not None or model != MINI_MODEL):
        raise ValueError(
            f"decoder is {MINI_DECODER!r}, which knows the mini model's latents only, and model is {model!r}: choose "
            "a decoder that belongs to the model, or the VAE's own."
        )
    return str(_MINI_DECODER_FILE)


def tiny_model_folder() -> Path:
    """The folder with the tiny model, which is written at the first call."""
    return Path(_tiny_model_home().name)


@cache
def _tiny_model_home() -> TemporaryDirectory[str]:
    """A folder with the tiny model, written once by this process, and deleted when it ends.

    Not in ComfyUI's temp folder: what lies there, a page may have uploaded.
    """
    # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
    from ..wan.tiny_model import write_tiny_model

    home = TemporaryDirectory(prefix="streamblocks_tiny_model_")
    write_tiny_model(Path(home.name))
    return home

"""Folders as they are published: their configs say less than those that today's diffusers writes."""

import json
import shutil

import pytest

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import PlainResidency
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

pytestmark = pytest.mark.usefixtures("no_pipeline")

# Those of Wan 2.1's repositories, whose configs diffusers 0.33 wrote (../shared/layouts/README.md).
VAE_KEYS = (
    "_class_name",
    "_diffusers_version",
    "attn_scales",
    "base_dim",
    "dim_mult",
    "dropout",
    "latents_mean",
    "latents_std",
    "num_res_blocks",
    "temperal_downsample",
    "z_dim",
)
# What the classes have no default for.
NEEDED = {
    "vae": VAE_KEYS,
    "text_encoder": ("model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
}


class Card(PlainResidency):
    """A device with a terabyte, so that the estimate is made."""

    def available_bytes(self, device):
        return 10**12


def rewrite_config(folder, component, change):
    path = folder / component / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def published(tiny_folder, folder, component, keys):
    shutil.copytree(tiny_folder, folder)
    rewrite_config(folder, component, lambda config: {key: config[key] for key in keys if key in config})
    return folder


@pytest.mark.parametrize("component", NEEDED)
def test_a_config_that_leaves_defaults_out_loads(tiny_folder, tmp_path, component):
    folder = published(tiny_folder, tmp_path / "published", component, NEEDED[component])
    settings = StreamSettings(width=32, height=32, steps=1)
    pipeline = materialise(Recipe(model=str(folder)), residency=Card())
    pipeline.check_fit(settings)
    with Session(pipeline, settings) as session:
        frames = session.run_block("a cat").frames
    whole = materialise(Recipe(model=str(tiny_folder)), residency=Card())
    with Session(whole, settings) as session:
        assert session.run_block("a cat").frames.equal(frames)


WAN_22_LATENTS = {"z_dim": 48, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}


@pytest.mark.parametrize(
    ("component", "change", "says"),
    [
        ("vae", WAN_22_LATENTS, "the vae in .* gives 48 latent channels and the transformer in .* takes 16"),
        ("text_encoder", {"d_model": 64}, "the text_encoder in .* gives 64 channels of embedded text"),
    ],
)
def test_parts_of_other_models_are_named_before_anything_is_loaded(tiny_folder, tmp_path, component, change, says):
    folder = tmp_path / "mixed"
    shutil.copytree(tiny_folder, folder)
    rewrite_config(folder, component, lambda config: config | change)
    with pytest.raises(CheckpointError, match=says):
        materialise(Recipe(model=str(folder)))

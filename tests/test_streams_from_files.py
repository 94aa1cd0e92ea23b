"""Whole streams from single files, and from what ComfyUI's text nodes hand over."""

import socket
from dataclasses import replace

import pytest
import torch
from file_streams import FILES, NO_TEXT, PROMPTS, VALUES, stream, write_folder
from layouts import LAYOUTS, TRANSFORMER, UMT5, UMT5_FP8, UMT5_WAN_NAMES, VAE
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream.conditioning import read_conditioning
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.settings import StreamSettings

pytestmark = pytest.mark.usefixtures("no_pipeline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("same") / "weights")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("no_network")
def test_single_files_make_the_stream_of_the_folder_with_the_same_weights(folder):
    of_files, _, report = stream(FILES)
    assert of_files.shape == (33, 32, 32, 3) and of_files.float().std() > 5
    assert report.notices == ()
    of_folder, _, _ = stream(Recipe(model=str(folder), dtype="float32"))
    assert torch.equal(of_files, of_folder)


def test_wans_names_with_the_folders_tokenizer_make_it_too(folder):
    recipe = Recipe(
        model=str(TRANSFORMER),
        vae=str(VAE),
        text_encoder=str(UMT5_WAN_NAMES),
        components=str(folder),
        dtype="float32",
    )
    assert torch.equal(stream(recipe)[0], stream(FILES)[0])


def test_a_conditioning_makes_the_stream_of_its_prompt_without_a_text_encoder():
    padded = torch.nn.functional.pad(VALUES["embeds_1"], (0, 0, 0, 512 - len(VALUES["embeds_1"])))[None]
    frames, loaded, _ = stream(NO_TEXT, embeds=read_conditioning([[padded, {"pooled_output": None}]]))
    assert loaded == {"transformer", "vae"}
    encoded, _, _ = stream(FILES, PROMPTS[1])
    # ComfyUI's embeddings differ from ours by rounding.
    assert (frames.int() - encoded.int()).abs().max() <= 1
    other, _, _ = stream(FILES, PROMPTS[0])
    assert not torch.equal(other, encoded)


def test_a_recipe_with_a_text_encoder_does_not_load_it_for_a_conditioning():
    words = VALUES["embeds_1"][None]
    frames, loaded, report = stream(FILES, embeds=words)
    assert loaded == {"transformer", "vae"}
    assert report.notices == ()
    # What is padding counts for nothing, whether its rows are there, masked, or not.
    noisy = torch.cat([words, torch.ones(1, 5, 64)], dim=1)
    mask = torch.tensor([[1] * 7 + [0] * 5])
    assert torch.equal(frames, stream(FILES, embeds=read_conditioning([[noisy, {"attention_mask": mask}]]))[0])


def test_more_tokens_than_the_model_takes_are_cut_with_a_notice():
    short = StreamSettings(width=32, height=32, steps=1, blocks=1)
    _, _, report = stream(NO_TEXT, embeds=torch.ones(1, 515, 64), settings=short)
    assert any("3 tokens too long" in notice for notice in report.notices)


@pytest.mark.parametrize(
    ("conditioning", "says"),
    [
        ([], "conditioning holds 0 prompts"),
        ([[torch.ones(1, 4, 64), {}]] * 2, "conditioning holds 2 prompts: a stream takes one at a time"),
        ([[torch.ones(2, 4, 64), {}]], r"conditioning holds \[2, 4, 64\]"),
        ([[None, {}]], "conditioning holds NoneType"),
        ([[torch.ones(1, 4, 64), {"attention_mask": torch.ones(1, 5)}]], "4 tokens and an attention mask of 5"),
    ],
)
def test_what_is_no_single_prompt_is_refused(conditioning, says):
    with pytest.raises(ValueError, match=says):
        read_conditioning(conditioning)


def test_a_conditioning_of_another_text_encoder_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="conditioning is 48 wide and the model takes 64"):
        stream(NO_TEXT, embeds=torch.ones(1, 4, 48))


def test_a_prompt_without_a_text_encoder_is_refused():
    with pytest.raises(ValueError, match=r"has no text encoder: choose one .* or connect a conditioning"):
        stream(NO_TEXT)


def test_a_repository_with_its_own_blocks_takes_no_files():
    with pytest.raises(ValueError, match=r"vae is '/x/vae\.safetensors', and the .* own blocks do not use it"):
        Recipe(model="owner/name", blocks=REPOSITORY_BLOCKS, vae="/x/vae.safetensors")


def wider_text(tensors):
    tensors["shared.weight"] = torch.ones(256, 48)


def more_channels(tensors):
    tensors["conv2.weight"] = torch.ones(48, 48, 1, 1, 1)


@pytest.mark.parametrize(
    ("part", "path", "change", "says"),
    [
        ("vae", VAE, more_channels, "the vae in .* gives 48 latent channels and the transformer in .* takes 16"),
        ("text_encoder", UMT5, wider_text, "the text_encoder in .* gives 48 channels of embedded text"),
        ("vae", UMT5, None, "holds no VAE of Wan"),
        ("text_encoder", VAE, None, "holds no umt5 text encoder"),
        ("vae", VAE, lambda tensors: tensors.pop("encoder.conv1.bias"), "lacks encoder.conv_in.bias"),
    ],
)
def test_files_that_do_not_go_together_are_named(tmp_path, part, path, change, says):
    if change is not None:
        tensors = load_file(path)
        change(tensors)
        path = tmp_path / "changed.safetensors"
        save_file(tensors, path)
    recipe = replace(FILES, vae=str(path)) if part == "vae" else replace(FILES, text_encoder=str(path))
    with pytest.raises(CheckpointError, match=says) as caught:
        materialise(recipe)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_gone_or_absent_is_named():
    with pytest.raises(CheckpointError, match=r"vae '.*gone\.safetensors' is not there"):
        materialise(Recipe(model=str(TRANSFORMER), vae=str(LAYOUTS / "gone.safetensors")))
    with pytest.raises(CheckpointError, match="holds only the transformer: choose files under 'vae'"):
        materialise(Recipe(model=str(TRANSFORMER), text_encoder=str(UMT5_FP8)))

"""Parts of a pipeline in the files and nestings that other programs write: all-in-one, prefixed, PyTorch's, EMA."""

import json
from dataclasses import replace

import pytest
import torch
from file_streams import FILES, SHORT, VALUES, stream, write_folder
from layouts import TRANSFORMER, UMT5, UMT5_FP8, UMT5_WAN_NAMES, VAE
from safetensors.torch import load_file, save_file

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream.hub import HubFile, _files_of
from streamblocks.stream.materialise import materialise
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import AVERAGED_WEIGHTS, REPOSITORY_BLOCKS, TRAINED_WEIGHTS, Recipe

from wan_loading import load_text_encoder, load_vae

pytestmark = pytest.mark.usefixtures("no_pipeline")

FP32 = torch.float32


def short(recipe, **options):
    return stream(recipe, settings=SHORT, **options)


def prefixed(path, prefix, cut=""):
    return {prefix + name.removeprefix(cut): tensor for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def expected():
    return short(FILES)[0]


@pytest.fixture(scope="module")
def all_in_one(tmp_path_factory):
    """As ComfyUI's CheckpointSave names everything."""
    text_encoder = prefixed(UMT5, "text_encoders.umt5xxl.transformer.")
    tokenizer = text_encoder.pop("text_encoders.umt5xxl.transformer.spiece_model")
    state = text_encoder | {
        "text_encoders.spiece_model": tokenizer,
        "text_encoders.umt5xxl.logit_scale": torch.tensor(4.6),
    }
    state |= prefixed(VAE, "vae.") | prefixed(TRANSFORMER, "model.diffusion_model.", "model.")
    path = tmp_path_factory.mktemp("all") / "all_in_one.safetensors"
    save_file(state, path)
    return path


def test_a_file_with_all_parts_needs_no_other(all_in_one, expected):
    frames, loaded, report = short(Recipe(str(all_in_one), dtype="float32"))
    assert torch.equal(frames, expected) and loaded == {"transformer", "vae", "text_encoder"}
    assert report.notices == ()


def test_a_part_of_a_file_with_all_parts_may_be_chosen_alone(all_in_one, expected):
    chosen = Recipe(str(TRANSFORMER), vae=str(all_in_one), text_encoder=str(all_in_one), dtype="float32")
    assert torch.equal(short(chosen)[0], expected)
    others = Recipe(str(all_in_one), vae=str(VAE), text_encoder=str(UMT5), dtype="float32")
    assert torch.equal(short(others)[0], expected)


@pytest.mark.parametrize(
    ("vae", "text_encoder", "file"),
    [
        ("first_stage_model.", "cond_stage_model.transformer.", UMT5),
        ("vae.", "umt5xxl.transformer.", UMT5),
        ("vae.", "transformer.", UMT5_WAN_NAMES),
        ("model.", "text_encoders.umt5xxl.transformer.", UMT5_FP8),
    ],
)
def test_parts_keep_their_values_under_other_programs_prefixes(tmp_path, vae, text_encoder, file):
    save_file(prefixed(VAE, vae), tmp_path / "vae.safetensors")
    save_file(prefixed(file, text_encoder), tmp_path / "text.safetensors")
    for load, plain, name in ((load_vae, VAE, "vae"), (load_text_encoder, file, "text")):
        kept, loaded = (load(path, device="cpu", dtype=FP32) for path in (plain, tmp_path / f"{name}.safetensors"))
        assert dict(loaded.state_dict()).keys() == dict(kept.state_dict()).keys()
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in kept.state_dict().items())


def test_a_file_with_two_of_a_kind_is_refused(tmp_path):
    save_file(prefixed(VAE, "vae.") | prefixed(VAE, "first_stage_model."), tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"several models of this kind, under 'first_stage_model\.', 'vae\.'"):
        materialise(Recipe(str(TRANSFORMER), vae=str(tmp_path / "two.safetensors")))


def test_the_tokenizer_is_only_needed_where_a_prompt_is_encoded(expected, tmp_path):
    recipe = Recipe(str(TRANSFORMER), vae=str(VAE), text_encoder=str(UMT5_WAN_NAMES), dtype="float32")
    assert short(recipe, embeds=VALUES["embeds_0"][None])[1] == {"transformer", "vae"}
    with pytest.raises(CheckpointError, match=r"there is no tokenizer in .*under 'tokenizer'") as raised:
        short(recipe)
    assert "\n" not in str(raised.value)
    # One that was chosen is not passed over for another.
    with pytest.raises(CheckpointError, match=r"there is no tokenizer in \S*vae\.safetensors: "):
        short(replace(FILES, tokenizer=str(VAE)))
    # CLIPSave writes the tokenizer into a file of its own.
    save_file({"spiece_model": load_file(UMT5)["spiece_model"]}, tmp_path / "alone.safetensors")
    for place in (UMT5, tmp_path / "alone.safetensors"):
        chosen = Recipe(
            str(TRANSFORMER), vae=str(VAE), text_encoder=str(UMT5_WAN_NAMES), tokenizer=str(place), dtype="float32"
        )
        assert torch.equal(short(chosen)[0], expected)


def test_a_folder_of_pytorch_files_makes_the_stream_of_its_weights(tmp_path, expected):
    folder = write_folder(tmp_path / "pickled")
    for component, stem in {
        "transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "pytorch_model",
    }.items():  # fmt: skip
        written = next((folder / component).glob("*.safetensors"))
        state = load_file(written)
        written.unlink()
        (folder / component / "optimizer.bin").write_bytes(b"not the one")
        if component != "transformer":
            torch.save(state, folder / component / f"{stem}.bin")
            continue
        names = sorted(state)
        shards: dict[str, str] = {}
        for index, part in enumerate((names[::2], names[1::2]), 1):
            shard = f"{stem}-{index:05}-of-00002.bin"
            torch.save({name: state[name] for name in part}, folder / component / shard)
            shards |= dict.fromkeys(part, shard)
        (folder / component / f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    assert torch.equal(short(Recipe(str(folder), dtype="float32"))[0], expected)


def test_of_a_hub_repository_pytorch_files_are_fetched_where_there_are_no_others():
    def files(*names):
        return [HubFile(name, 1) for name in names]

    found = files("vae/model.safetensors", "vae/model.bin", "text_encoder/model.bin", "text_encoder/config.json")
    assert _files_of("vae", found) == found[:1]
    assert _files_of("text_encoder", found) == [found[3], found[2]]


@pytest.fixture
def trained(tmp_path):
    """A training checkpoint: the weights, and another moving average of them."""
    plain = {name.removeprefix("model."): tensor for name, tensor in load_file(TRANSFORMER).items()}
    averaged = {name: tensor * 2 for name, tensor in plain.items()}
    torch.save({"generator": plain, "generator_ema": averaged, "step": 3}, tmp_path / "both.pt")
    torch.save({"generator": plain}, tmp_path / "one.pt")
    torch.save({"generator_ema": averaged}, tmp_path / "average.pt")
    return tmp_path, plain["blocks.1.ffn.0.weight"]


@pytest.mark.parametrize(
    ("file", "weights", "factor"),
    [
        ("both.pt", AVERAGED_WEIGHTS, 2),
        ("both.pt", TRAINED_WEIGHTS, 1),
        ("one.pt", AVERAGED_WEIGHTS, 1),
        ("one.pt", TRAINED_WEIGHTS, 1),
        ("average.pt", AVERAGED_WEIGHTS, 2),
        ("average.pt", TRAINED_WEIGHTS, 2),
    ],
)
def test_averaged_or_trained_weights_are_a_choice(trained, file, weights, factor):
    folder, weight = trained
    recipe = Recipe(str(folder / file), vae=str(VAE), weights=weights, dtype="float32")
    pipeline = materialise(recipe)
    assert isinstance(pipeline, BuiltInPipeline)
    loaded = pipeline.transformer().get_parameter("blocks.1.ffn.net.0.proj.weight")
    assert torch.equal(loaded, weight.float() * factor)


def test_choices_that_are_none_are_refused():
    with pytest.raises(ValueError, match="weights is 'ema': choose one of generator_ema, generator"):
        Recipe("owner/name", weights="ema")
    with pytest.raises(ValueError, match=r"weights is 'generator', and the .* own blocks do not use it"):
        Recipe("owner/name", blocks=REPOSITORY_BLOCKS, weights=TRAINED_WEIGHTS)
    with pytest.raises(ValueError, match=r"tokenizer is 'x\.model': give the absolute path"):
        Recipe("owner/name", tokenizer="x.model")


def test_a_revision_of_a_model_on_this_disk_is_said_to_do_nothing():
    recipe = Recipe(str(TRANSFORMER), vae=str(VAE), text_encoder=str(UMT5), revision="v2", dtype="float32")
    [notice] = short(recipe)[2].notices
    assert notice.startswith("revision 'v2' has no effect: the model causal_wan.safetensors is on this disk")
    assert Recipe("owner/name", revision="v2").notices == ()

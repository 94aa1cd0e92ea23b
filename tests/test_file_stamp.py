"""The stamp of a model's files: what changes it, links, and what a dangling link says when it is loaded."""

import os
import shutil

import pytest

from streamblocks.checkpoints.checkpoint_files import CheckpointError
from streamblocks.stream.direction import Direction
from streamblocks.stream.file_stamp import stamp_files
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings

from foreign_repository import write_foreign_repository

pytestmark = pytest.mark.usefixtures("no_pipeline")

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def linked(tmp_path, tiny_folder):
    """A model folder of links, as people keep them: a linked folder, and in another one a linked file."""
    store = tmp_path / "store"
    shutil.copytree(tiny_folder, store)
    model = tmp_path / "model"
    model.mkdir()
    for entry in store.iterdir():
        if entry.name == "vae":
            (model / "vae").mkdir()
            for file in entry.iterdir():
                (model / "vae" / file.name).symlink_to(file)
        else:
            (model / entry.name).symlink_to(entry)
    return model


def touch(file):
    # An explicit time: two writes may fall into one tick of the clock.
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1_000_000_000))


@pytest.mark.parametrize("name", [f"transformer/{WEIGHTS}", "transformer/config.json", f"vae/{WEIGHTS}"])
def test_files_behind_links_count(linked, name):
    before = stamp_files(str(linked))
    assert len(before) == 16 and stamp_files(str(linked)) == before
    touch(linked.parent / "store" / name)
    assert stamp_files(str(linked)) != before


def test_a_link_turned_to_another_file_counts(tmp_path):
    for name in ("old", "new"):
        (tmp_path / f"{name}.bin").write_bytes(b"same size")
        os.utime(tmp_path / f"{name}.bin", (1, 1))
    link = tmp_path / "model.safetensors"
    link.symlink_to("old.bin")
    stamps = [stamp_files(str(link)), stamp_files(str(tmp_path))]
    link.unlink()
    link.symlink_to("new.bin")
    assert stamps[0] != stamp_files(str(link)) and stamps[1] != stamp_files(str(tmp_path))


def test_loops_of_links_end(linked):
    before = stamp_files(str(linked))
    (linked / "vae" / "up").symlink_to(linked, target_is_directory=True)
    (linked / "itself").symlink_to("itself")
    (linked / "itself.json").symlink_to("itself.json")
    looped = stamp_files(str(linked))
    assert looped != before
    touch(linked.parent / "store/transformer" / WEIGHTS)
    assert stamp_files(str(linked)) != looped


def test_a_new_version_of_a_repositorys_code_counts_and_runs(tmp_path, tiny_folder, remote_code_allowed):
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    code = folder / "blocks.py"
    brightness = []
    for change in ("clamp(-1, 1)", "clamp(-1, -1)"):
        code.write_text(code.read_text().replace("clamp(-1, 1)", change))
        recipe = Recipe(str(folder), blocks=REPOSITORY_BLOCKS, stamp=stamp_files(str(folder)))
        frames = Frames()
        run_stream(
            materialise(recipe), StreamSettings(32, 32, blocks=1, steps=1), Direction.constant("a"), [frames], Nobody()
        )
        brightness.append(frames.largest)
    assert brightness[0] > brightness[1] == 0


class Frames:
    def write(self, frames):
        self.largest = frames.max().item()

    def close(self):
        pass


class Nobody:
    def while_loading(self, component, done, total):
        pass

    def before_pass(self, index):
        pass

    def after_block(self, block):
        pass


@pytest.mark.parametrize(
    "name", [f"vae/{WEIGHTS}", "transformer", f"transformer/{WEIGHTS}", "tokenizer", "vae/config.json"]
)
def test_a_dangling_link_changes_the_stamp_and_is_named_when_loaded(linked, name):
    before = stamp_files(str(linked))
    target = linked.parent / "store" / name
    target.rename(target.with_name("away"))
    dangling = stamp_files(str(linked))
    assert dangling not in ("", before)
    with pytest.raises(CheckpointError) as raised:
        run_stream(
            materialise(Recipe(str(linked), stamp=dangling)),
            StreamSettings(32, 32, blocks=1),
            Direction.constant("a"),
            [],
            Nobody(),
        )
    assert name.split("/")[0] in str(raised.value) and "\n" not in str(raised.value)
    target.with_name("away").rename(target)
    assert stamp_files(str(linked)) == before


def test_a_dangling_file_is_named_when_loaded(tmp_path, tiny_folder):
    link = tmp_path / "model.safetensors"
    link.symlink_to(tmp_path / "gone.safetensors")
    assert len(stamp_files(str(link))) == 16
    assert stamp_files(str(tmp_path / "nothing")) == stamp_files("owner/name") == ""
    with pytest.raises(CheckpointError, match=r"model .* is not there"):
        materialise(Recipe(str(link), components=str(tiny_folder), stamp=stamp_files(str(link))))

"""The sampler's 'resume' in the embedded host: which stream it takes, and what it says of the others."""

from pathlib import Path

from embedded_program import needs_embedded_host, run_in_host

pytestmark = needs_embedded_host

PROGRAM = """
import importlib
import comfy.model_management
def module(name):
    return importlib.import_module(f"{PACK}.{name}")
module("wan.rehearsal").rehearse_streaming_bytes = lambda *_: 0
names = module("stream.saved_names")
root = host.output / "streamblocks/unfinished"
def resumed(**changes):
    try:
        return json.loads(run(resume="this node's unfinished stream, if there is one", blocks=3, **changes)[0][2])
    except comfy.model_management.InterruptProcessingException:
        return None
# Behind block 2: each of two passes a block is a step, and of those that follow quickly ComfyUI shows some only.
cancel_at.append(4)
resumed(save_every=1, seed=1)
stopped, (first,) = said[-1], names.names_of_saved(root)
at_rest = names.names_at_rest(root)
folder = module("stream.saved_folder").SavedFolder(root / first)
point = folder.point()
def found(**changes):
    asked = json.dumps(json.loads(point.asked) | changes)
    saving = module("nodes.run_saving").RunSaving(1, folder.load()[0].snapshot.recipe, resume=True, keep_all=False,
        node=point.node, workflow=None, asked=asked, extra=None)
    saving.release()
    return [saving.point is not None, saving.notices]
another = found(seed=2, steps=1)
taken = folder.claim()
running = found()
folder.release()
left = names.names_of_saved(root)
same = resumed()
report(stopped=stopped, first=first, at_rest=at_rest, taken=taken, left=left, same=same["notices"],
       blocks=same["blocks_made"], another=another, running=running,
       end=list(map(str, root.iterdir())))
"""


def test_only_the_stream_of_this_prompt_that_nobody_runs_goes_on(tmp_path):
    facts = run_in_host(tmp_path, PROGRAM)
    folder = str(tmp_path / "output/streamblocks/unfinished" / facts["first"])
    assert facts["stopped"].endswith("in the output folder; 'resume' goes on behind block 2")
    assert facts["at_rest"] == facts["left"] == [facts["first"]] and facts["taken"]
    taken, (said,) = facts["another"]
    assert not taken and said == (
        f"resume: the unfinished stream in {folder} is another one (its seed is 1, here 2; its steps is 2, here 1): it "
        "was left as it is."
    )
    taken, (said,) = facts["running"]
    assert not taken and said == (
        f"resume: the unfinished stream in {folder} runs now, in this ComfyUI or another one that has the same output "
        "folder: it was left to it."
    )
    assert facts["same"] == [f"The stream went on behind block 2 from {folder}, with the prompts that it had."]
    assert facts["blocks"] == 3 and facts["end"] == [f"{Path(folder).parent}/stream_00001_.mp4"]

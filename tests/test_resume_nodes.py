"""The sampler's 'resume' in the embedded host: which stream it takes, and what it says of the others."""

from pathlib import Path

from embedded_program import needs_embedded_host, run_in_host

pytestmark = needs_embedded_host

PROGRAM = """
import importlib
import comfy.model_management
lock = importlib.import_module(PACK + ".stream.running_lock").RunningLock
names = importlib.import_module(PACK + ".stream.saved_names")
root = host.output / "streamblocks/unfinished"
def resumed(**changes):
    cancel_at.clear()
    cancel_at.extend(changes.pop("cancel", []))
    try:
        return json.loads(run(resume="this node's unfinished stream, if there is one", **changes)[0][2])
    except comfy.model_management.InterruptProcessingException:
        return None
# Each of two passes a block is a step, and so is each block.
resumed(cancel=[5], save_every=1, seed=1)
stopped, (first,) = said[-1], names.names_of_saved(root)
at_rest = names.names_at_rest(root)
another = resumed(seed=2, steps=1)
elsewhere = lock(root / first)
taken = elsewhere.take()
running = resumed(seed=1, steps=2, cleanup="never")
elsewhere.release()
left = names.names_of_saved(root)
same = resumed(cleanup="when it pays", blocks=4)
report(stopped=stopped, first=first, at_rest=at_rest, taken=taken, left=left, same=same["notices"],
       blocks=same["blocks_made"], another=another["notices"], running=running["notices"],
       end=list(map(str, root.iterdir())))
"""


def test_only_the_stream_of_this_prompt_that_nobody_runs_goes_on(tmp_path):
    facts = run_in_host(tmp_path, PROGRAM)
    folder = str(tmp_path / "output/streamblocks/unfinished" / facts["first"])
    assert facts["stopped"].endswith("in the output folder; 'resume' goes on behind block 2")
    assert facts["at_rest"] == facts["left"] == [facts["first"]] and facts["taken"]
    assert facts["another"] == [
        f"resume: the unfinished stream in {folder} is another one (its seed is 1, here 2; its steps is 2, here 1): it "
        "was left as it is."
    ]
    assert facts["running"] == [
        f"resume: the unfinished stream in {folder} runs now, in this ComfyUI or another one that has the same output "
        "folder: it was left to it."
    ]
    # Its length may be another.
    assert facts["same"] == [f"The stream went on behind block 2 from {folder}, with the prompts that it had."]
    assert facts["blocks"] == 4 and facts["end"] == [f"{Path(folder).parent}/stream_00001_.mp4"]

"""Our components under real ComfyUI's model management, in ComfyUI's own Python."""

import json
import subprocess
from pathlib import Path

import pytest

from comfyui_server import comfyui_found, comfyui_path, comfyui_python

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = f"""
import gc, importlib.util, json, logging, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {str(comfyui_path())!r})
import comfy.options
comfy.options.enable_args_parsing()
import torch, server
import comfy.model_management as management
records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
logging.getLogger().addHandler(Keep())
logging.getLogger().setLevel(logging.INFO)
spec = importlib.util.spec_from_file_location("pack", {str(ROOT / "__init__.py")!r},
                                              submodule_search_locations=[{str(ROOT)!r}])
module = importlib.util.module_from_spec(spec)
sys.modules["pack"] = module
spec.loader.exec_module(module)
from pack import host
from pack.stream.materialise import materialise, release_materialised
from pack.stream.recipe import Recipe
from pack.stream.session import Session
from pack.stream.settings import StreamSettings

def loaded():
    return sorted(type(m.model.model).__name__ for m in management.current_loaded_models)

facts = {{}}
with torch.inference_mode():
    settings = StreamSettings(width=32, height=32, steps=1)
    pipeline = materialise(Recipe(model={{model}}), residency=host.ComfyResidency(),
                           default_device=host.default_device())
    with Session(pipeline, settings) as session:
        first = session.run_block("a cat").frames
    facts["loaded"] = loaded()
    facts["sizes"] = {{type(m.model.model).__name__: m.model_memory() for m in management.current_loaded_models}}
    facts["weights"] = {{type(c).__name__: sum(p.numel() * p.element_size() for p in c.parameters())
                        for c in (pipeline.pipe.transformer, pipeline.pipe.vae, pipeline.pipe.text_encoder)}}
    moved = []
    for entry in management.current_loaded_models:
        entry.model.to = lambda device, name=type(entry.model.model).__name__: moved.append((name, str(device)))
    management.unload_all_models()
    facts["asked_to_leave"] = sorted(moved)
    facts["after_unload"] = loaded()
    with Session(pipeline, settings) as session:
        facts["same_again"] = torch.equal(first, session.run_block("a cat").frames)
    facts["loaded_again"] = loaded()
    del session, pipeline, entry
    release_materialised()
    management.cleanup_models()
    facts["after_release"] = loaded()
    facts["warnings"] = [r for r in records if "leak" in r.lower()]
print("FACTS " + json.dumps(facts))
"""


@pytest.mark.skipif(not comfyui_found(), reason=f"real ComfyUI not found at {comfyui_path()}: set COMFYUI_PATH")
def test_components_come_and_go_with_comfyuis_own_models(tiny_folder):
    program = PROGRAM.replace("{model}", repr(str(tiny_folder)))
    command = [str(comfyui_python(comfyui_path())), "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=comfyui_path(), timeout=300)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert lines, done.stderr[-3000:]
    facts = json.loads(lines[0].removeprefix("FACTS "))
    components = ["AutoencoderKLWan", "UMT5EncoderModel", "WanTransformer3DModel"]
    assert facts["loaded"] == components
    assert facts["sizes"] == facts["weights"]
    assert facts["asked_to_leave"] == [[name, "cpu"] for name in components]
    assert facts["after_unload"] == []
    assert facts["same_again"]
    assert facts["loaded_again"] == components
    assert facts["after_release"] == []
    assert facts["warnings"] == []

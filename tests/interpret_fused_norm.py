"""Run the kernel of `norm_silu` in Triton's interpreter, without a GPU, beside the formula; prints errors as JSON.

A separate program, because Triton reads TRITON_INTERPRET when a kernel is defined.
"""

import itertools
import json
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import torch

from streamblocks.ops.kernels.kernel import TRIALS, Kernel
from streamblocks.wan.vae.norm_silu import PendingSum, norm_into_window, norm_sum

from triton_interpreter import mend_interpreter


def compute(kind, value, gamma, past):
    if kind == "alone":
        return value.first, norm_sum(value, gamma)
    made = norm_into_window(value, gamma, past, fold=kind == "folded")
    return value.first, made.window, made.past


def largest_difference(kind, channels, frames, summands):
    generator = torch.Generator().manual_seed(channels + frames)
    shape = (frames, 5, 7, channels)
    first, residual, bias, gamma = (torch.randn(s, generator=generator) for s in (shape, shape, channels, channels))
    past = torch.randn((2, *shape[1:]), generator=generator)
    results = []
    for by_kernel in (True, False):
        value = PendingSum(first.clone(), bias if summands else None, residual if summands > 1 else None)
        reason = None if by_kernel else "the formula is what it is compared with"
        with mock.patch.object(Kernel, "_refuses_device", lambda self, device, reason=reason: reason):
            results.append(compute(kind, value, gamma, past))
    return max(float((made - expected).abs().max()) for made, expected in zip(*results, strict=True))


if __name__ == "__main__":
    cases = itertools.product(("window", "folded", "alone"), (96, 20), (1, 2, 4), (0, 1, 2))
    mend_interpreter()
    errors = {" ".join(map(str, case)): largest_difference(*case) for case in cases}
    # One trial launch for each variant, none of which failed: the formula was not compared with itself.
    assert len(TRIALS.passed) == 18 and not TRIALS.failed, TRIALS
    print(json.dumps(errors))

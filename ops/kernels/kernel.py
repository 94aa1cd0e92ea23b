"""One GPU kernel of the pack: what it needs, why it is not used, and how it is launched.

Every kernel has a fallback in torch that computes the same values. A kernel is used if it can run, is not switched off,
and a trial launch on a few values has succeeded: compiled layers launch kernels from inside a graph, where it is too
late to fall back to torch.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Generic, TypeVar

import torch
from torch.utils._triton import has_triton

from ..trial_launches import TrialLaunches

logger = logging.getLogger(__name__)

# Comma-separated names of kernels to switch off; or "all".
SWITCH_VARIABLE = "STREAMBLOCKS_DISABLE_KERNELS"
ALL = "all"
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# The lowest that Triton compiles for.
TRITON_CAPABILITY = (7, 0)
# Triton's own limit for the values of one block.
MOST_BLOCK_VALUES = 1 << 20

# What a kernel is compiled for, besides device and dtype: sizes, and which optional inputs are present.
Variant = TypeVar("Variant", bound=Hashable)


class KernelName(str, Enum):
    """Names of the kernels, as in `SWITCH_VARIABLE` and in the sampler's settings output."""

    NORM_SILU = "norm_silu"
    ROTARY_STORE = "rotary_store"
    ROTARY_STORE_FP8 = "rotary_store_fp8"
    FEW_KEY_ATTENTION = "few_key_attention"
    GELU_QUANTIZATION = "gelu_quantization"
    LAYER_NORM = "layer_norm"


@dataclass
class KernelTrials(TrialLaunches):
    """The results of this process's trial launches, by the kernels' names.

    Attributes:
        reported: values of `SWITCH_VARIABLE` whose unknown names were reported.
    """

    reported: set[str] = field(default_factory=set)

    def reset(self) -> None:
        """Clear all results, for tests."""
        super().reset()
        self.reported.clear()


TRIALS = KernelTrials()


@dataclass(frozen=True)
class Kernel(Generic[Variant]):
    """A Triton kernel and what it needs.

    Attributes:
        name: of the kernel.
        function: module in this folder and name of the Triton function.
        try_out: launches the function once on a few values, on a device, in a dtype, for a variant.
        dtypes: of the tensors it works on.
        first_capability: the lowest compute capability of CUDA devices that it is compiled for.
        check_variant: why it cannot be compiled for a variant; None if it can.
    """

    name: KernelName
    function: str
    try_out: Callable[[Any, torch.device, torch.dtype, Variant], None]
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    first_capability: tuple[int, int] = TRITON_CAPABILITY
    check_variant: Callable[[Variant], str | None] = lambda variant: None

    def why_not(
        self, device: torch.device, dtype: torch.dtype | None = None, variant: Variant | None = None
    ) -> str | None:
        """The reason, as text, why the kernel is not used; None if it is used.

        Args:
            device: of the tensors.
            dtype: of the tensors; None if unknown, and then not checked.
            variant: the sizes; None if unknown, and then not checked.
        """
        return (
            self._switched_off()
            or self._refuses_device(device)
            or self._refuses_dtype(dtype)
            or (None if variant is None else self.check_variant(variant))
            or self._has_failed()
        )

    def load(self, device: torch.device, dtype: torch.dtype, variant: Variant) -> Any:  # noqa: ANN401
        """The function for `launch`; None for the fallback to torch.

        The first call for a device, dtype and variant compiles the kernel and launches it once on a few values. If
        that fails, the kernel is not used again in this process, and one warning says so. Call it outside of
        compiled code.

        Raises:
            torch.OutOfMemoryError: no memory for the trial; the kernel is not counted as failed.
        """
        if self.why_not(device, dtype, variant) is not None:
            return None
        if not TRIALS.succeeds(
            self.name, device, dtype, variant, lambda: self.try_out(self.source(), device, dtype, variant)
        ):
            self._warn_of_failure()
            return None
        return self.source()

    def source(self) -> Any:  # noqa: ANN401
        """The Triton function, imported only now: Triton loads slowly, and may be missing if no kernel is used."""
        module, _, name = self.function.partition(".")
        return getattr(importlib.import_module(f".{module}", __package__), name)

    def _switched_off(self) -> str | None:
        if self.name.value in switched_off():
            return f"switched off by the environment variable {SWITCH_VARIABLE}"
        return None

    def _refuses_device(self, device: torch.device) -> str | None:
        if device.type != "cuda":
            return f"needs CUDA, this is {device.type}"
        if not has_triton():
            return "needs the package triton (triton-windows on Windows), which is missing or does not support this GPU"
        capability = torch.cuda.get_device_capability(device)
        if capability < self.first_capability:
            needed, present = (".".join(map(str, numbers)) for numbers in (self.first_capability, capability))
            return f"needs compute capability {needed}, {device} has {present}"
        return None

    def _refuses_dtype(self, dtype: torch.dtype | None) -> str | None:
        if dtype is None or dtype in self.dtypes:
            return None
        allowed = " or ".join(str(one).removeprefix("torch.") for one in self.dtypes)
        return f"needs {allowed}, this is {str(dtype).removeprefix('torch.')}"

    def _has_failed(self) -> str | None:
        error = TRIALS.failed.get(self.name)
        return None if error is None else f"failed to compile or launch: {error}"

    def _warn_of_failure(self) -> None:
        logger.warning(
            "The GPU kernel %s failed to compile or launch and is no longer used; torch computes the same, slower. "
            "%s=%s switches it off without a trial. %s",
            self.name.value,
            SWITCH_VARIABLE,
            self.name.value,
            TRIALS.failed[self.name],
        )


def switched_off() -> frozenset[str]:
    """Names of the kernels that `SWITCH_VARIABLE` switches off; unknown names are warned of once."""
    value = os.environ.get(SWITCH_VARIABLE, "")
    names = frozenset(name.strip().lower() for name in value.split(",")) - {""}
    known = frozenset(name.value for name in KernelName)
    unknown = names - known - {ALL}
    if unknown and value not in TRIALS.reported:
        TRIALS.reported.add(value)
        logger.warning(
            "The environment variable %s names %s, which is no kernel: use %s, separated by commas, or %s.",
            SWITCH_VARIABLE,
            ", ".join(sorted(unknown)),
            ", ".join(sorted(known)),
            ALL,
        )
    return known if ALL in names else names & known


def launch(
    kernel: Any,  # noqa: ANN401
    grid: tuple[int, ...],
    device: torch.device,
    *arguments: Any,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> None:
    """Launch a Triton function on the device of its tensors; Triton itself uses the current device.

    Args:
        kernel: of `Kernel.load`.
        grid: programs along each axis.
        device: of the tensors.
        arguments: tensors and numbers, in the kernel's order.
        options: its compile-time constants, and Triton's own options such as num_warps.
    """
    if torch.compiler.is_compiling() or device.type != "cuda":
        # Inductor makes a graph's device current before any launch; a `with` inside would break the graph. Without
        # CUDA only Triton's interpreter runs.
        kernel[grid](*arguments, **options)
        return
    with torch.cuda.device(device):
        kernel[grid](*arguments, **options)


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()

"""One component of a pipeline: its weights, its size in memory, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..ops.layer_presets import LayerPreset
from ..ops.quantization import QuantizationPlan, QuantizationSpec
from ..ops.weight_filling import replace_layer
from .module_loading import NOTHING_JOINED, OnTensor, check_sources, load_weights
from .quantization_plan import ComponentWeights, make_fillings, plan_component

# Builds the module from a config; its weights need no values.
BuildModule = Callable[[Mapping[str, Any]], nn.Module]
# Gives the rows of joined layers of the built module; see `load_weights`.
JoinedRows = Callable[[Any], Mapping[str, tuple[str, slice]]]
Prepare = Callable[[Any], None]


def join_nothing(module: nn.Module) -> Mapping[str, tuple[str, slice]]:
    """Join nothing: the module has the parameters of its checkpoint."""
    return NOTHING_JOINED


def prepare_nothing(module: nn.Module) -> None:
    """Do nothing: the module is used as it is loaded."""


@dataclass(frozen=True)
class Component:
    """A component, known from its headers; its weights are read by `load`.

    Attributes:
        name: "transformer", "vae", "text_encoder".
        weights: where its parameters are stored.
        dtype: of loaded floating-point parameters, except those of `keep_fp32`.
        build: makes the module from the config.
        keep_fp32: parts of parameter names that stay float32.
        preset: which layers are quantized; None for a component that is never quantized.
        quantization: as requested; it may not apply to this component.
        joined_rows: of the built module.
        prepare: called with the loaded module, on its device, before its first use.
    """

    name: str
    weights: ComponentWeights
    dtype: torch.dtype
    build: BuildModule
    keep_fp32: frozenset[str] = frozenset()
    preset: LayerPreset | None = None
    quantization: QuantizationSpec | None = None
    joined_rows: JoinedRows = join_nothing
    prepare: Prepare = prepare_nothing

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the model class."""
        return self.weights.config

    @property
    def is_stored_quantized(self) -> bool:
        """Whether the checkpoint is quantized already."""
        return bool(self.weights.stored)

    @cached_property
    def plan(self) -> QuantizationPlan:
        """How each layer is loaded, from headers only; raises what `plan_component` raises."""
        return plan_component(
            self.weights, self.name, self.preset, self.quantization, dtype=self.dtype, keep_fp32=self.keep_fp32
        )

    @property
    def bytes(self) -> int:
        """Of parameters and persistent buffers once loaded; tied weights count once."""
        return self.plan.bytes_after

    def check(self) -> None:
        """Compare the names and shapes of the weights with those of the model; nothing is read or allocated.

        Raises:
            CheckpointError: they do not fit.
        """
        with empty_weights():
            module = self.build(self.config)
        check_sources(module, self.weights.sources, self.joined_rows(module))

    def load(self, device: torch.device | str, on_tensor: OnTensor | None = None) -> nn.Module:
        """Read the weights onto `device`, quantize them as planned, and prepare the module.

        Raises:
            CheckpointError: the checkpoint does not fit the model, or cannot be read.
            ValueError: a weight to be quantized holds inf or NaN.
        """
        plan = self.plan
        with empty_weights():
            module = self.build(self.config)
        fillings = make_fillings(self.weights, plan, device=device, dtype=self.dtype)
        load_weights(
            module,
            self.weights.sources,
            device=device,
            dtype=self.dtype,
            keep_fp32=self.keep_fp32,
            joined=self.joined_rows(module),
            fillings=fillings,
            on_tensor=on_tensor,
        )
        with torch.inference_mode(False), torch.no_grad():
            for name in plan.quantized_names:
                filling = fillings.pop(f"{name}.weight")
                linear = module.get_submodule(name)
                assert isinstance(linear, nn.Linear)
                replace_layer(module, name, filling.finish(linear))
        module.eval()
        module.requires_grad_(False)
        self.prepare(module)
        return module


@contextmanager
def empty_weights() -> Iterator[None]:
    """Build on the meta device: buffers are computed, global random state is kept, tensors are ordinary ones."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        init_empty_weights(include_buffers=False),
    ):
        yield

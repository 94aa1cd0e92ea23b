"""One component of a pipeline: what it is made of, what it will take, and how it is loaded."""

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

# From a config to the module, whose weights need no values.
BuildModule = Callable[[Mapping[str, Any]], nn.Module]
# From the built module to the rows of joined layers; see `load_weights`.
JoinedRows = Callable[[Any], Mapping[str, tuple[str, slice]]]
Prepare = Callable[[Any], None]


def join_nothing(module: nn.Module) -> Mapping[str, tuple[str, slice]]:
    """Of a module whose parameters are those of its checkpoint."""
    return NOTHING_JOINED


def prepare_nothing(module: nn.Module) -> None:
    """For a module that is used as it is loaded."""


@dataclass(frozen=True)
class Component:
    """A component, known from its headers; its weights are read by `load`.

    Attributes:
        name: "transformer", "vae", "text_encoder".
        weights: what it is made of.
        dtype: floating-point parameters are loaded in it, but for those of `keep_fp32`.
        build: makes the module from the config.
        keep_fp32: parts of parameter names that stay float32.
        preset: which layers are quantized; None for a component that never is.
        quantization: what was asked for; it may not concern this component.
        joined_rows: of the built module.
        prepare: what is done with the loaded module, on its device, before its first use.
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
        """What becomes of each layer, from headers only; see `plan_component` for what is raised."""
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
        """Read the weights onto `device`, quantized on the way as planned, and prepare the module.

        Raises:
            CheckpointError: the checkpoint does not fit the model, or cannot be read.
            ValueError: inf or NaN in what is quantized.
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
    """Build on the meta device, buffers computed, global random state untouched, tensors ordinary ones."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        init_empty_weights(include_buffers=False),
    ):
        yield

"""One component of a pipeline: its weights, its size in memory, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..ops.layer_presets import LayerPreset
from ..ops.quantization import QuantizationPlan, QuantizationSpec
from ..ops.weight_filling import replace_layer
from .checkpoint_error import CheckpointError, first_line
from .module_loading import NOTHING_JOINED, OnTensor, check_sources, destination_dtype, load_weights
from .quantization_plan import ComponentWeights, make_fillings, plan_component
from .row_sources import elements

# Builds the module from a config; its weights need no values.
BuildModule = Callable[[Mapping[str, Any]], nn.Module]
# Gives the rows of joined layers of the built module; see `load_weights`.
JoinedRows = Callable[[Any], Mapping[str, tuple[str, slice]]]
Prepare = Callable[[Any], None]
# Called with the module and the index of a layer.
TakeLayer = Callable[[nn.Module, int], None]


def join_nothing(module: nn.Module) -> Mapping[str, tuple[str, slice]]:
    """Join nothing: the module has the parameters of its checkpoint."""
    return NOTHING_JOINED


def prepare_nothing(module: nn.Module) -> None:
    """Do nothing: the module is used as it is loaded."""


def leave_layer(module: nn.Module, index: int) -> None:
    """Do nothing: the layer stays where it was loaded."""


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
        layers: path of the module's repeated layers, which are called one after another; empty if it has none.
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
    layers: str = ""

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
        with shapes_only(), explaining_config(self.weights.path):
            module = self.build(self.config)
        check_sources(module, self.weights.sources, self.joined_rows(module))

    def layers_of(self, module: nn.Module) -> list[nn.Module]:
        """The repeated layers of the loaded module."""
        return list(module.get_submodule(self.layers).children()) if self.layers else []

    @cached_property
    def layer_bytes(self) -> tuple[int, ...]:
        """Bytes of each repeated layer once it is loaded, from headers only; empty if there are none."""
        sizes: dict[int, int] = {}
        prefix = f"{self.layers}."

        def add(name: str, size: int) -> None:
            if self.layers and name.startswith(prefix):
                index = int(name.removeprefix(prefix).partition(".")[0])
                sizes[index] = sizes.get(index, 0) + size

        for layer in self.plan.layers:
            add(layer.name, layer.bytes_after)
        planned = {layer.name for layer in self.plan.layers}
        for name, source in self.weights.sources.items():
            joined = self.weights.joined_name(name)
            if joined.removesuffix(".weight") not in planned:
                size = destination_dtype(name, source.dtype, self.dtype, self.keep_fp32).itemsize
                add(joined, elements(source) * size)
        return tuple(sizes[index] for index in sorted(sizes))

    def load(
        self,
        device: torch.device | str,
        on_tensor: OnTensor | None = None,
        *,
        off_device: Collection[int] = (),
        one_by_one: Collection[int] = (),
        take_layer: TakeLayer = leave_layer,
        settle: Prepare = prepare_nothing,
    ) -> nn.Module:
        """Read the weights onto `device`, quantize them as planned, and prepare the module.

        Args:
            device: where the module computes, and its weights are quantized.
            on_tensor: called with the name and bytes of each tensor after it is loaded.
            off_device: layers whose weights lie in ordinary memory when they are read, by index.
            one_by_one: layers for which there is no memory, by index: each is read when the one before is taken.
            take_layer: called with the module and the index of each of them, on the device, to take it away.
            settle: called with the module before it is prepared, to make all those layers callable.

        Raises:
            CheckpointError: the checkpoint does not fit the model, or cannot be read.
            ValueError: a weight to be quantized holds inf or NaN.
        """
        plan = self.plan
        with empty_weights(), explaining_config(self.weights.path):
            module = self.build(self.config)
        device = torch.device(device)
        away = tuple(f"{self.layers}.{index}." for index in off_device)

        def home_of(name: str) -> torch.device:
            return torch.device("cpu") if name.startswith(away) else device

        def finish(names: Iterable[str]) -> None:
            with torch.inference_mode(False), torch.no_grad():
                for name in names:
                    filling = fillings.pop(f"{name}.weight")
                    linear = module.get_submodule(name)
                    assert isinstance(linear, nn.Linear)
                    replace_layer(module, name, filling.finish(linear))

        def finish_layer(beginning: str) -> None:
            finish([name for name in plan.quantized_names if name.startswith(beginning)])
            take_layer(module, apart[beginning])

        apart = {f"{self.layers}.{index}.": index for index in one_by_one}
        fillings = make_fillings(self.weights, plan, device=device, dtype=self.dtype, home_of=home_of)
        load_weights(
            module,
            self.weights.sources,
            device=device,
            dtype=self.dtype,
            keep_fp32=self.keep_fp32,
            joined=self.joined_rows(module),
            fillings=fillings,
            home_of=home_of,
            on_tensor=on_tensor,
            apart=tuple(apart),
            after_part=finish_layer,
        )
        finish([name for name in plan.quantized_names if f"{name}.weight" in fillings])
        module.eval()
        module.requires_grad_(False)
        settle(module)
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


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build on the meta device, buffers too: nothing is allocated or drawn, whatever the sizes."""
    with torch.inference_mode(False), torch.no_grad(), torch.device("meta"):
        yield


@contextmanager
def explaining_config(path: Path) -> Iterator[None]:
    """What a model's class raises while it is built of a config becomes a CheckpointError that names `path`.

    Values were checked one by one; which of them go together only the class itself knows.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path} has a config of which no model can be built ({first_line(error)}): download it again."
        ) from error

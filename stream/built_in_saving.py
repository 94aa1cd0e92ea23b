"""What the pack's own blocks can do for a stream whose device ran out of memory."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import replace
from typing import Any

from diffusers.modular_pipelines import ModularPipeline

from ..families.kv_policies import KV_INT8, KV_PLAIN
from ..families.model_family import ModelFamily
from ..memory.way_back import FREE_WAY_BACK, WayBack
from ..ops.call_graphs import CallGraphs
from ..ops.graph_switch import why_no_graphs
from .component_store import BLOCK_COMPONENTS, ComponentStore
from .decode_bounds import bound_decoding_more, decoding_notice
from .estimate import MemoryEstimate
from .host_memory import free_ram
from .residency import Residency
from .settings import StreamSettings
from .streaming_plans import StreamingPlans

_OF_TEXT = ("text_encoder",)
# Why no calls are recorded.
_NOT_PLANNED = "no stream is planned whose memory is known"
_NO_ROOM = "the plan leaves no memory for them, memory_gb is given, or keys are kept in 8 bits"
_RAN_OUT = "the device ran out of memory"


def graph_bytes(estimate: MemoryEstimate) -> int:
    """The most that graphs keep: the activations of the largest pass, beside those of decode.

    No pass has more than a stream takes besides weights; where attention materialises no scores it has a tenth of it.
    """
    return estimate.streaming


class BuiltInSaving:
    """See `MemorySaving`. The blocks change nothing in place that is not `Rewindable`.

    Args:
        family: of the model.
        store: of its components.
        plans: of their layers.
        residency: decides what is on the device.

    Attributes:
        decoding: a sentence on how pictures are decoded; empty for whole ones.
        graphs: of calls that come again in each block; off where no plan has found room for them.
    """

    can_make_again = True

    def __init__(self, family: ModelFamily, store: ComponentStore, plans: StreamingPlans, residency: Residency) -> None:
        self.decoding = ""
        self.graphs = CallGraphs(off=_NOT_PLANNED)
        self._family = family
        self._store = store
        self._plans = plans
        self._residency = residency
        self._may_pack_keys = False
        self._spare = 0

    def begin(self, *, may_pack_keys: bool) -> None:
        """A stream is planned; whether it leaves the format of its keys to the memory."""
        self.decoding, self._may_pack_keys, self._spare = "", may_pack_keys, 0
        self.graphs.resume()
        self.graphs.stop(why_no_graphs(self._store.device) or _NOT_PLANNED)

    def fit(self, settings: StreamSettings, estimate: MemoryEstimate, available: int) -> None:
        """And found to fit the device, with `settings`."""
        self.decoding = decoding_notice(settings)
        # What the VAE keeps of past frames is at most half of what a stream takes besides weights.
        self._spare = available - estimate.needed - estimate.streaming // 2
        left = estimate.left_for("transformer", available) - estimate.transformer
        # Beside the way back.
        is_tight = settings.memory_gb or settings.kv_format != KV_PLAIN
        has_room = not is_tight and left >= estimate.streaming // 2 + graph_bytes(estimate)
        self.graphs.resume()
        why_not = why_no_graphs(self._store.device) or ("" if has_room else _NO_ROOM)
        if why_not:
            self.graphs.stop(why_not)

    @property
    def repeats_passes(self) -> bool:
        """Where calls are recorded."""
        return not self.graphs.off

    def drop_graphs(self, *, for_good: bool = False) -> None:
        """See `MemorySaving`."""
        if for_good:
            self.graphs.stop(_RAN_OUT)
        else:
            self.graphs.drop()

    def repeat_calls(self, pipe: ModularPipeline) -> None:
        """Have the graphs repeat calls of the pipeline's models, which may have moved since the last time."""
        self.graphs.drop()
        self._family.repeat_calls(pipe, self.graphs)

    def working_bytes(self, estimate: MemoryEstimate) -> int:
        """What a stream takes besides weights."""
        return estimate.streaming + (graph_bytes(estimate) if self.repeats_passes else 0)

    def way_back(self, *, ran_out: bool) -> WayBack:
        """On the device, if the estimate leaves so much and was right so far: otherwise as much of the RAM as is free.

        None where the device's memory is the RAM: a CPU's does not run out with an error, and it is not spent on it.
        """
        if not self._has_memory_of_its_own:
            return WayBack(on_device=False)
        return FREE_WAY_BACK if self._spare > 0 and not ran_out else WayBack(on_device=False, ram_bytes=free_ram())

    def offload_other_models(self) -> bool:
        """Those that the residency knows."""
        return self._residency.offload_other_models(self._store.device)

    def offload_unused(self, *, of_text: bool) -> list[str]:
        """The text encoder, or all but that."""
        return self._store.offload_all_but(_OF_TEXT if of_text else BLOCK_COMPONENTS)

    def bound_decoding(self, settings: StreamSettings) -> StreamSettings | None:
        """See `bound_decoding_more`."""
        counts = self._family.decode_bands(self._store.components)
        changed = bound_decoding_more(settings, counts, has_ram=self._has_memory_of_its_own)
        if changed is not None:
            self.decoding = decoding_notice(changed)
        return changed

    def stream_more_layers(self, *, of_text: bool) -> bool:
        """A tenth of them."""
        return self._plans.stream_more("text_encoder" if of_text else "transformer")

    def pack_keys(self, settings: StreamSettings, values: MutableMapping[str, Any]) -> StreamSettings | None:
        """To INT8."""
        if not self._may_pack_keys or settings.kv_format != KV_PLAIN:
            return None
        changed = replace(settings, kv_format=KV_INT8)
        if values.get("kv_cache") is not None:
            values["kv_cache"] = self._family.pack_keys(values["kv_cache"], changed.pipeline_inputs())
        return changed

    @property
    def _has_memory_of_its_own(self) -> bool:
        return self._residency.streams_layers(self._store.device)

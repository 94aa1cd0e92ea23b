"""Which layers of a pipeline's components are streamed, and from where, as the memory of device and machine allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .component_store import ComponentStore
from .estimate import MemoryEstimate
from .host_memory import place_layers
from .layer_plan import LayerPlan, more_streamed, plan_layers
from .layer_streaming import LayerStreamer
from .stall_clock import BUS, COMPUTE, DISK
from .streaming_forecast import Pace, Rates, forecast
from .transfer_rates import measure_bus_rate, measure_disk_rate

logger = logging.getLogger(__name__)

# Of the layers, how many can be streamed without the bus setting the pace. Measured with the 14B on an H100: 10 of 40
# cost 2 % at 832x480, while keys in 8 bits and the fused pass cost 6 %.
HIDDEN_SHARE = 0.25
_PACE_SETTERS = {COMPUTE: "computing", BUS: "the bus", DISK: "the disk"}


class StreamingPlans:
    """Makes the plans, and has the store follow them.

    Args:
        store: of the components "transformer" and perhaps "text_encoder".
    """

    def __init__(self, store: ComponentStore) -> None:
        self._store = store
        self._plans: dict[str, LayerPlan] = {}
        self._paces: dict[str, Pace] = {}
        self._rates = Rates()
        self._reserved = 0

    @property
    def transformer(self) -> LayerPlan:
        """The plan of the transformer; raises KeyError before one is made."""
        return self._plans["transformer"]

    def would_stay(self, estimate: MemoryEstimate, available: int) -> bool:
        """Whether so few of the transformer's layers would be streamed that their copies are sure to hide."""
        plan = self._plan("transformer", estimate.left_for("transformer", available))
        return plan is not None and len(plan.streamed) <= HIDDEN_SHARE * plan.layers

    def make(
        self, estimate: MemoryEstimate, available: int, pace: Pace, *, with_text_encoder: bool, reserved: int = 0
    ) -> None:
        """Plan for an estimate that was found to fit.

        Args:
            estimate: of the stream.
            available: bytes of the device.
            pace: of the transformer.
            with_text_encoder: whether it is needed.
            reserved: bytes of RAM that something else of the stream takes.

        Raises:
            MemoryError: neither RAM nor disk have room for the streamed layers.
            OSError: the disk is full.
        """
        plans = {}
        for name in ("transformer", "text_encoder") if with_text_encoder else ("transformer",):
            plan = self._plan(name, estimate.left_for(name, available))
            assert plan is not None
            plans[name] = plan
        self._reserved = reserved
        self._paces = {"transformer": pace, "text_encoder": Pace(1, unit="prompt")}
        self._follow(plans)

    def stream_more(self, name: str) -> bool:
        """Stream a tenth of a component's layers more; False where no plan was made or none are left.

        Raises:
            MemoryError: neither RAM nor disk have room for the streamed layers.
            OSError: the disk is full.
        """
        known = self._plans.get(name)
        if known is None:
            return False
        component = self._store.components[name]
        plan = more_streamed(known, component.bytes, component.layer_bytes)
        if plan is not None:
            self._follow(self._plans | {name: plan})
        return plan is not None

    def fit_transformer(self, budget: int) -> bool:
        """Stream as many of the transformer's layers as the budget, in bytes, needs; whether it fits then."""
        plan = self._plan("transformer", budget)
        if plan is not None:
            self._follow({"transformer": plan})
        return plan is not None

    def describe(self) -> tuple[str, ...]:
        """A sentence for each component that has layers streamed: where they lie, and what to expect at the most."""
        return tuple(self._describe(plan) for plan in self._plans.values() if plan.streamed)

    def streaming(self) -> dict[str, dict[str, Any]]:
        """How layers are streamed now, by component, as JSON values; what set the pace, for the last block."""
        streamers = {name: self._store.streamer(name) for name in self._store.components}
        return {
            name: describe_streaming(streamer, self._paces[name].passes if name in self._paces else 1)
            for name, streamer in streamers.items()
            if streamer is not None and streamer.streamed
        }

    def _describe(self, plan: LayerPlan) -> str:
        pace = self._paces.get(plan.component)
        if pace is None:
            return f"{plan.describe()}."
        sizes, streamer = self._store.components[plan.component].layer_bytes, self._store.streamer(plan.component)
        expected = forecast(plan, sizes, pace, self._rates_of(plan.component))
        stalls = None if streamer is None else streamer.stalls.read(pace.passes)
        told = "" if stalls is None else f"; in the last {pace.unit} {_PACE_SETTERS[stalls.bound]} set the pace"
        return "; ".join((plan.describe(), *pace.savings)) + f": {expected}" * bool(expected) + f"{told}."

    def _rates_of(self, name: str) -> Rates:
        """As measured while streaming, or before it."""
        streamer = self._store.streamer(name)
        if streamer is None:
            return self._rates
        return Rates(streamer.bus_rate or self._rates.bus, streamer.disk.rate or self._rates.disk)

    def _measure(self) -> None:
        """Measure once what is to be used."""
        plans, folder = self._plans.values(), self._store.scratch_folder
        if not self._rates.bus and any(plan.streamed for plan in plans):
            self._rates = replace(self._rates, bus=measure_bus_rate(self._store.device))
        if not self._rates.disk and any(plan.on_disk for plan in plans) and folder is not None:
            self._rates = replace(self._rates, disk=measure_disk_rate(folder))

    def _plan(self, name: str, budget: int) -> LayerPlan | None:
        component = self._store.components[name]
        return plan_layers(name, component.bytes, component.layer_bytes, budget)

    def _follow(self, plans: Mapping[str, LayerPlan]) -> None:
        store = self._store
        sizes = {name: store.components[name].layer_bytes for name in plans}
        self._plans = place_layers(
            plans,
            sizes,
            held=store.host_bytes,
            folder=store.scratch_folder,
            kept=store.disk_bytes,
            now=store.on_disk,
            reserved=self._reserved,
        )
        self._measure()
        for sentence in self.describe():
            logger.info("%s", sentence)
        for name, plan in self._plans.items():
            store.stream_layers(name, plan.streamed, plan.on_disk)


def describe_streaming(streamer: LayerStreamer, passes: int) -> dict[str, Any]:
    """How a component's layers are streamed, as JSON values.

    Args:
        streamer: of the component.
        passes: the last ones, of which is said what the device waited for.
    """
    told: dict[str, Any] = {
        "layers_streamed": len(streamer.streamed),
        "layers_on_disk": len(streamer.on_disk),
        "host_bytes": streamer.host_bytes,
        "disk_bytes": streamer.disk_bytes,
        "pinned": streamer.is_pinned,
        "bus_gb_per_second": round(streamer.bus_rate / 1e9, 1),
        "disk_gb_per_second": round(streamer.disk.rate / 1e9, 2),
    }
    stalls = streamer.stalls.read(passes)
    if stalls is not None:
        told["bound"] = stalls.bound
        told |= {"waited_for_bus": round(stalls.bus, 3), "waited_for_disk": round(stalls.disk, 3)}
    return told

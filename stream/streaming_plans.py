"""Which layers of a pipeline's components are streamed, and from where, as the memory of device and machine allows."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from .component_store import ComponentStore
from .estimate import MemoryEstimate
from .host_memory import place_layers
from .layer_plan import LayerPlan, more_streamed, plan_layers

logger = logging.getLogger(__name__)

# Of the layers, how many can be streamed without the bus setting the pace. Measured with the 14B on an H100: 10 of 40
# cost 2 % at 832x480, while keys in 8 bits and the fused pass cost 6 %.
HIDDEN_SHARE = 0.25


class StreamingPlans:
    """Makes the plans, and has the store follow them.

    Args:
        store: of the components "transformer" and perhaps "text_encoder".
    """

    def __init__(self, store: ComponentStore) -> None:
        self._store = store
        self._plans: dict[str, LayerPlan] = {}

    @property
    def transformer(self) -> LayerPlan:
        """The plan of the transformer; raises KeyError before one is made."""
        return self._plans["transformer"]

    def would_stay(self, estimate: MemoryEstimate, available: int) -> bool:
        """Whether so few of the transformer's layers would be streamed that their copies are sure to hide."""
        plan = self._plan("transformer", estimate.left_for("transformer", available))
        return plan is not None and len(plan.streamed) <= HIDDEN_SHARE * plan.layers

    def make(self, estimate: MemoryEstimate, available: int, *, with_text_encoder: bool) -> None:
        """Plan for an estimate that was found to fit.

        Args:
            estimate: of the stream.
            available: bytes of the device.
            with_text_encoder: whether it is needed.

        Raises:
            MemoryError: neither RAM nor disk have room for the streamed layers.
            OSError: the disk is full.
        """
        plans = {}
        for name in ("transformer", "text_encoder") if with_text_encoder else ("transformer",):
            plan = self._plan(name, estimate.left_for(name, available))
            assert plan is not None
            plans[name] = plan
        self._follow(plans)

    def stream_more(self) -> bool:
        """Stream a tenth of the transformer's layers more; False where no plan was made or none are left."""
        component = self._store.components["transformer"]
        plan = more_streamed(self._plans.get("transformer"), component.bytes, component.layer_bytes)
        if plan is not None:
            self._follow(self._plans | {"transformer": plan})
        return plan is not None

    def fit_transformer(self, budget: int) -> bool:
        """Stream as many of the transformer's layers as the budget, in bytes, needs; whether it fits then."""
        plan = self._plan("transformer", budget)
        if plan is not None:
            self._follow({"transformer": plan})
        return plan is not None

    def describe(self) -> tuple[str, ...]:
        """A sentence for each component that has layers streamed."""
        return tuple(f"{plan.describe()}." for plan in self._plans.values() if plan.streamed)

    def _plan(self, name: str, budget: int) -> LayerPlan | None:
        component = self._store.components[name]
        return plan_layers(name, component.bytes, component.layer_bytes, budget)

    def _follow(self, plans: Mapping[str, LayerPlan]) -> None:
        store = self._store
        sizes = {name: store.components[name].layer_bytes for name in plans}
        self._plans = place_layers(
            plans, sizes, held=store.host_bytes, folder=store.scratch_folder, kept=store.disk_bytes, now=store.on_disk
        )
        for name, plan in self._plans.items():
            store.stream_layers(name, plan.streamed, plan.on_disk)
        for sentence in self.describe():
            logger.info("%s", sentence)

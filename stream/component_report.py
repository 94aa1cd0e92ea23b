"""What a report says of a built-in pipeline's components."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.component import Component
from ..ops.fp8_linear import fp8_notice
from ..ops.quantization import summarise_plan
from .component_store import BLOCK_COMPONENTS


def report_components(components: Mapping[str, Component], device: torch.device) -> tuple[dict[str, Any], set[str]]:
    """What each LoRA changed and the plan of each quantized component, as JSON values; and sentences on both."""
    plans = [component.plan for component in components.values()]
    plans = [plan for plan in plans if plan.spec is not None and plan.quantized_names]
    # What runs once a prompt costs no time that a user would notice.
    in_blocks = [plan for plan in plans if plan.component in BLOCK_COMPONENTS]
    notices = {fp8_notice(device) for plan in in_blocks if plan.spec and plan.spec.format == "fp8"}
    loras = [match for component in components.values() for match in component.weights.loras]
    report = {
        "loras": [match.describe() for match in loras],
        "quantization": [summarise_plan(plan) for plan in plans],
    }
    return report, notices | {match.notice for match in loras}

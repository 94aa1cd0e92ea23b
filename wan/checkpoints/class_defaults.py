"""Configs as a model's class completes them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn


def with_defaults(cls: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, completed with the defaults of diffusers' class: published configs omit most keys."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | dict(config)

"""Names that the steps share."""

from __future__ import annotations

# Of the modular blocks, in diffusers' register.
MODEL_NAME = "streamblocks-causal-wan"

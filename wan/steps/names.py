"""Names that the steps share."""

from __future__ import annotations

# Name of the modular blocks in diffusers' register.
MODEL_NAME = "streamblocks-causal-wan"

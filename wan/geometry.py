"""How latents of Wan 2.1 relate to pictures and tokens."""

from __future__ import annotations

from ..families.model_family import LatentGeometry

WAN_21_GEOMETRY = LatentGeometry(channels=16, spatial_scale=8, temporal_scale=4, patch=(1, 2, 2))

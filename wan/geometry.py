"""How latents of Wan's models relate to pictures and tokens."""

from __future__ import annotations

from ..families.model_family import LatentGeometry

WAN_21_GEOMETRY = LatentGeometry(channels=16, spatial_scale=8, temporal_scale=4, patch=(1, 2, 2))
# Wan 2.2's 5B; its 14B models have 2.1's latents.
WAN_22_GEOMETRY = LatentGeometry(channels=48, spatial_scale=16, temporal_scale=4, patch=(1, 2, 2))

"""Names of the attention backends that the pack calls itself; all others are diffusers'.

They compute self-attention without a mask. What has a mask, and cross-attention, is computed by diffusers' "native".
"""

from __future__ import annotations

# FlashAttention 3 in bfloat16; with queries, keys and values in e4m3fn and a scale per head; and with keys from which a
# constant per channel is taken first.
FLASH3, FLASH3_FP8, FLASH3_FP8_SMOOTH = "flash3", "flash3_fp8", "flash3_fp8_smooth"
# comfy-kitchen's INT8 attention.
COMFY_INT8 = "comfy_int8"
# The first of `EIGHT_BIT_CHOICES` that runs.
EIGHT_BIT = "8-bit"
EIGHT_BIT_CHOICES = (FLASH3_FP8, COMFY_INT8)

FLASH3_BACKENDS = (FLASH3, FLASH3_FP8, FLASH3_FP8_SMOOTH)
LIBRARY_BACKENDS = (*FLASH3_BACKENDS, COMFY_INT8, EIGHT_BIT)

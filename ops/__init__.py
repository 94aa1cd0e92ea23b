"""Quantized linear layers (FP8, INT8) and which layers of a model are quantized. Knows nothing of Wan's files."""

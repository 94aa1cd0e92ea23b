"""Quantized linear layers (FP8, INT8), kernels, and which layers of a model are quantized. Knows no model by name."""

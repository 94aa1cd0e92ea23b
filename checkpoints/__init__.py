"""Checkpoint files of any model: headers, rows, quantized formats, and how a module is filled from them."""

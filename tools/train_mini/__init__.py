"""Trains the mini pipeline, from scratch, on clips drawn on the fly."""

"""Trains the mini pipeline, from nothing, on clips drawn on the fly."""

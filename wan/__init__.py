"""The built-in causal Wan pipeline: diffusers modular blocks that make Wan a stream."""

"""The built-in causal Wan pipeline: diffusers modular blocks that make Wan 2.1 a stream."""

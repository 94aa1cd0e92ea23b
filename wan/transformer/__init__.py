"""The causal transformer: attention with a KV cache, RoPE, compiled layers."""

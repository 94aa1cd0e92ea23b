"""The VAE, decoding and encoding a stream."""

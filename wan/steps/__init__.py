"""The modular blocks that make one block of a stream."""

"""Command line tools for developers; nothing here is imported by the nodes."""

"""What a family of models is, to whoever knows none by name."""

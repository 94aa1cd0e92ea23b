"""What a family of models is, without naming any."""

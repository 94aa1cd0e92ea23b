"""V3 node classes: a schema and a call each."""

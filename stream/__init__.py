"""The stream: recipe, session, state, sinks. Runs without ComfyUI."""

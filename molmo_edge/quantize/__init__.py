"""Write quantised checkpoints that vLLM loads as they are."""

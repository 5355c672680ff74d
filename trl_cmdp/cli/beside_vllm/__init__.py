"""What vLLM imports, in its own environment: the standard library alone, and nothing of this package."""

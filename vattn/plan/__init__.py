"""What a model's KV cache needs, and what fits: ``vattn plan``."""

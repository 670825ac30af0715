"""What HuggingFace generate costs with each cache: ``python -m benchmarks.hf_generate``."""

"""Serving with vLLM, stock beside vattn, in one run: ``-m benchmarks.vllm``."""

"""What vattn costs, measured: run each as ``python -m benchmarks.NAME`` in the repository root."""

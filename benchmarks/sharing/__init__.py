"""What sharing saves and costs, beside the ideal and beside copying: ``-m benchmarks.sharing``."""

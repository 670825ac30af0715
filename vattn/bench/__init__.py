"""Benchmarks: what memory costs on this machine. Run by ``vattn bench``."""

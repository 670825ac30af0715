"""What ``KVCache.step`` costs: ``vattn bench step``."""

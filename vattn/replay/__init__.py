"""A trace of requests through the real allocator, without a model: ``vattn replay``."""

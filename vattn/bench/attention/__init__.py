"""Attention over vattn's tensors beside others: ``vattn bench attention``."""

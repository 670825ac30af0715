"""What each driver call costs: ``vattn bench latency``."""

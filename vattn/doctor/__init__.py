"""What this machine offers: ``vattn doctor``."""

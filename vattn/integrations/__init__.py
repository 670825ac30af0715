"""vattn inside the frameworks that people serve models with. Each imports its own lazily."""

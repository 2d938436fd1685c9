"""What a run will take, and what to do where the configuration says ``auto``."""

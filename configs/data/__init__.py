"""Data of the recipes, by ``_target_``."""

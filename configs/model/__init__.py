"""Modules of the recipes, by ``_target_``."""

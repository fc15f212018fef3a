"""Configuration groups as YAML; installed as ``lightning_superpipe.configs``."""

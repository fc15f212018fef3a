"""Tiers: what every one of them offers, and what is special about each."""

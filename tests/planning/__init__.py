"""Plans as text, as data and as promises; no torch, no device."""

"""Where metrics are logged, by name."""

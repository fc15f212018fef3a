"""Lightning callbacks by name; null leaves one out."""

"""The options of SuperpipeConfig; ``default.yaml`` holds every one with its default."""

"""Training with weights and states in files, through a loop in plain PyTorch."""

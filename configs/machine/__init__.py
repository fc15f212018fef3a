"""What the machine has: accelerator, precision, workers."""

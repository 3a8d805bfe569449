"""Other programs that can run pruned models."""

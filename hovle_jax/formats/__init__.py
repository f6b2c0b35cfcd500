"""Public checkpoints: one table of rules per family, read in both directions."""

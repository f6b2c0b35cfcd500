"""Foreign checkpoints in and out: one table of rules per family, read in both directions."""

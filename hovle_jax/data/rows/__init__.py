"""Records -> rows of a batch, by plan."""

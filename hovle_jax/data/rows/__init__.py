"""Records -> the rows of batches, by a plan of the epoch."""

"""From files to fixed-shape batches: batch = f(seed, step)."""

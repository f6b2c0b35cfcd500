"""What the text of a compiled program says: instructions, how often loops run, collectives, kernels, cycles."""

"""Pure Flax modules: no files, no devices, only logical axis names."""

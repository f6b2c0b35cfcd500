"""A run's programs compiled ahead of time for TPUs that are not there, and read."""

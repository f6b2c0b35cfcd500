"""Several hosts as one run."""

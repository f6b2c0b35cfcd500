"""What a run leaves for people: metrics, the progress line, plots, pictures and the report page."""

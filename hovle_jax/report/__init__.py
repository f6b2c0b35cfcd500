"""What a run writes for people: metrics, the progress line, plots, images of batches and the report page."""

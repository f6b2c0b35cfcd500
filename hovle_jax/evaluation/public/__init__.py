"""Public benchmarks from VLMEvalKit's TSV files: `table.py` is their table, `run.py` asks and scores."""

"""What the text of a compiled program says: `compiled.as_text()` -> its collectives and kernels.

`collectives.py` is the door, and the only module that others import:

    found = collectives(text, devices_per_slice=256)
    summary(found)      # {'all-gather': Total(count=72, bytes=..., beside=..., dcn_bytes=0, unknown=0), ...}
    kernels(text)       # ['jit(step)/llm/splash_mha_fwd/pallas_call', ...]

Under it: `text.py` parses, `trip_count.py` says how often a loop runs, `replica_groups.py` who takes part.
"""

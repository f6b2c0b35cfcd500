"""How fast a model answers: the paper's table 6 and a load profile. The command is `hovle_jax.bench`."""

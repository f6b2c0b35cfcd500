"""HoVLE, the monolithic vision-language model with a holistic embedding, in JAX and Flax."""

__version__ = "0.1.0"

"""Kinds of batches, one file each: what a record must have, how it becomes a sample, and how samples become a row.

A stage of training reads batches of one kind, but nothing here knows the stages. A new kind is a new file.
"""

from hovle_jax.data.kinds.base import Kind, Reader
from hovle_jax.data.kinds.captions import CAPTIONS
from hovle_jax.data.kinds.conversations import CONVERSATIONS
from hovle_jax.data.kinds.random_text import RANDOM_TEXT
from hovle_jax.data.kinds.text import TEXT

__all__ = ["CAPTIONS", "CONVERSATIONS", "RANDOM_TEXT", "TEXT", "Kind", "Reader"]

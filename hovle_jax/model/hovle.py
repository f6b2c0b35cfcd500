"""HoVLE: the holistic embedding, then the LLM. One set of functions for training, prefill and decoding.

Parameters are a dict of components, {'embedding': ..., 'llm': ...}, so that a stage can hold only what it needs.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from hovle_jax.model.config import HoVLEConfig, LLMConfig
from hovle_jax.model.dense import dense
from hovle_jax.model.embedding import HolisticEmbedding
from hovle_jax.model.execution import Execution
from hovle_jax.model.streams import Stream
from hovle_jax.model.transformer import Cache, RMSNorm, Stack, TokenTable

PADDING_LOGIT = -1e30  # not -inf, which times a probability of 0 is not a number


class LanguageModel(nn.Module):
    """Token table, decoder stack, final norm, and a head of its own or (`tied`) the table again."""

    config: LLMConfig
    execution: Execution

    def setup(self) -> None:
        c = self.config
        self.token_embedding = TokenTable(c.table_rows, c.stack.width, self.execution)
        self.stack = Stack(c.stack, self.execution)
        self.norm = RMSNorm(c.stack.norm_eps)
        if not c.tied:
            self.head = dense(c.table_rows, ("embed", "vocab"), "head", self.execution)

    def __call__(self, tokens, positions, segment_ids):
        """Text alone: [B, L] ids -> float32 logits [B, L, V]."""
        hidden, _ = self.run(self.token_embedding(tokens), positions, segment_ids)
        return self.logits(hidden)

    def run(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache | None = None
    ) -> tuple[jax.Array, Cache | None]:
        """From input vectors [B, L, D] to hidden states before the final norm, and the cache."""
        return self.stack(x, positions, segment_ids, cache)

    def normalize(self, hidden: jax.Array) -> jax.Array:
        """The final norm: what the head reads."""
        return self.norm(hidden)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V], V with its padding (which is never likely)."""
        c = self.config
        head = self.token_embedding.attend if c.tied else self.head
        logits = head(self.normalize(hidden)).astype(jnp.float32)
        if c.table_rows == c.vocab_size:
            return logits
        return jnp.where(jnp.arange(c.table_rows) < c.vocab_size, logits, PADDING_LOGIT)


@flax.struct.dataclass
class HoVLECache:
    """The caches of both stacks. Their lengths are equal but for HD, whose embedding sees more visual tokens."""

    embedding: Cache | None
    llm: Cache

    def begun(self) -> "HoVLECache":
        """The same, of which something may be filled (see `Cache.is_empty`)."""
        begun = lambda cache: cache and dataclasses.replace(cache, is_empty=False)
        return HoVLECache(begun(self.embedding), begun(self.llm))

    def repeated(self, times: int) -> "HoVLECache":
        """Each slot so many times, side by side."""
        repeated = lambda cache: cache and cache.repeated(times)
        return HoVLECache(repeated(self.embedding), repeated(self.llm))


@dataclasses.dataclass(frozen=True)
class HoVLE:
    """The two modules of a config, and what is computed with them; without an embedding it is an LLM for text."""

    config: HoVLEConfig
    execution: Execution = Execution()

    @property
    def embedding(self) -> HolisticEmbedding:
        assert self.config.embedding is not None, "an LLM alone"
        return HolisticEmbedding(self.config.embedding, self.execution)

    @property
    def llm(self) -> LanguageModel:
        return LanguageModel(self.config.llm, self.execution)

    def logits(self, params: dict, batch: dict) -> jax.Array:
        """Full forward over the batch's short stream -> float32 [B, L, V]."""
        return self.hidden_to_logits(params, self.hidden(params, batch)[0])

    def hidden(self, params: dict, batch: dict, cache: HoVLECache | None = None) -> tuple[jax.Array, Any]:
        """-> (hidden states [B, L, D] before the final norm, caches or None)."""
        caches = (None, None) if cache is None else (cache.embedding, cache.llm)
        llm = self.llm.bind({"params": params["llm"]})
        if self.config.embedding is None:
            x, embedding_cache = llm.token_embedding(batch["tokens"]), None
        else:
            embedding = self.embedding.bind({"params": params["embedding"]})
            x, embedding_cache = embedding(batch, caches[0])
            x = embedding.for_llm(x)
        hidden, llm_cache = llm.run(x, batch["positions"], batch["segment_ids"], caches[1])
        return hidden, None if llm_cache is None else HoVLECache(embedding_cache, llm_cache)

    def head_kernel(self, params: dict) -> jax.Array:
        """The head's weights [D, V], for a loss that multiplies by them itself."""
        llm = params["llm"]
        return llm["token_embedding"]["embedding"].T if self.config.llm.tied else llm["head"]["kernel"]

    def hidden_to_logits(self, params: dict, hidden: jax.Array) -> Any:
        """Hidden states before the final norm -> float32 logits [..., V]."""
        return self.llm.apply({"params": params["llm"]}, hidden, method="logits")

    def empty_cache(self, slots: int, capacity: int, embedding_capacity: int, dtype: Any = jnp.float32) -> HoVLECache:
        """Caches for `slots` rows; HD needs more room in the embedding's."""
        c = self.config
        embedding = c.embedding and Cache.empty(c.embedding.stack, slots, embedding_capacity, dtype)
        return HoVLECache(embedding, Cache.empty(c.llm.stack, slots, capacity, dtype))

    def prefill(self, params: dict, batch: dict, cache: HoVLECache) -> tuple[jax.Array, HoVLECache]:
        """Reads right-padded prompts into the caches -> (logits [B, V] after each row's last token, caches)."""
        hidden, cache = self.hidden(params, batch, cache)
        last = jnp.sum(batch["segment_ids"] > 0, axis=1) - 1
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)
        return self.hidden_to_logits(params, hidden)[:, 0], cache

    def decode(
        self, params: dict, tokens: jax.Array, active: jax.Array, cache: HoVLECache
    ) -> tuple[jax.Array, HoVLECache]:
        """One more token per row.

        Args:
          tokens: [B] int32.
          active: [B] bool; a row that is not active is computed and forgotten: its caches keep their length.
        Returns:
          (logits [B, V], caches).
        """
        hidden, cache = self.append(params, tokens[:, None], active[:, None].astype(jnp.int32), cache)
        return self.hidden_to_logits(params, hidden)[:, 0], cache

    def append(
        self, params: dict, tokens: jax.Array, there: jax.Array, cache: HoVLECache
    ) -> tuple[jax.Array, HoVLECache]:
        """Text after what the caches hold.

        Args:
          tokens: [B, T] int32, padded at the end.
          there: [B, T] int32: 1 for tokens, 0 for padding, which is computed and forgotten.
        Returns:
          (hidden states [B, T, D] before the final norm, caches).
        """
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        stream = lambda of: Stream(tokens, of.length[:, None] + places, there)
        batch = stream(cache.llm).fields()
        if self.config.embedding and self.config.embedding.pixel_shuffle == "post":
            batch |= stream(cache.embedding).fields(long=True)
            batch |= {"long_text_positions": jnp.broadcast_to(places, tokens.shape)}
        return self.hidden(params, batch, cache)

"""Text, fast: read a prompt, write on. The twin of Transformer.generate, which says what it means."""

from collections.abc import Iterator

import torch
from torch import Tensor

from attention import KVCache
from model import Transformer


def fill(model: Transformer, tokens: Tensor, cache: KVCache) -> None:
    """Read tokens (b t) into the cache. Raises ValueError, and reads nothing, where they do not fit."""
    model.fill(tokens, cache)


def prefill(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """The same, and the logits (b v) after the last token."""
    return model.prefill(tokens, cache)


def stream(
    model: Transformer,
    tokens: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Yield the next token (b) of every row of tokens (b t). `compiled`: compile the decode step."""
    if compiled and model._compiled_step is None:
        model.compile_decoding()
    yield from model.stream(
        tokens, max_new_tokens, temperature, top_k, top_p, stop, generator, cache
    )

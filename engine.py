"""Text, fast: the twin of Transformer.generate, which says what all this means.

    for token in stream(model, tokens, max_new_tokens=64): ...     tokens (b t) -> (b) a step
    logits = prefill(model, tokens, cache)                         reads a prompt, by chunks
    fill(model, tokens, cache)                                     the same, without logits

Decoding one token is bound by reading the weights and by the number of calls. So a block's matrices
that read the same input are joined into one, and so are those that write to the residual stream:
two products instead of seven.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache as once

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from attention import Attention, KVCache, LayerSpec, Shared
from model import MLP, Block, Transformer, check_settings, draw

# A prompt is read by chunks, so that a long one never makes (t s) masks. Its first chunk is a whole
# sequence, which has kernels that need no masks.
FIRST_CHUNK, CHUNK = 8192, 512
JOINED_AT_MOST = 2**24  # parameters of a block; where the products are larger, calls are free


@torch.inference_mode()
def fill(model: Transformer, tokens: Tensor, cache: KVCache) -> None:
    """Read tokens (b t) into the cache. ValueError, and nothing is read, where they do not fit."""
    cache.check_room(tokens.shape[1])
    first = FIRST_CHUNK if cache.is_empty else CHUNK
    for chunk in (tokens[:, :first], *tokens[:, first:].split(CHUNK, dim=1)):
        if chunk.shape[1]:
            read(model, chunk, cache)


def read(model: Transformer, chunk: Tensor, cache: KVCache) -> None:
    """One chunk (b t). Nothing comes after the last layer to read its output, so that its keys and
    values are enough."""
    *blocks, last = model.layers
    if not is_plain(last):
        model.hidden(chunk, cache)
        return
    shared = model.share(chunk.shape[1], chunk.device, cache)
    x = model.embed_tokens(chunk)
    for i, (block, spec) in enumerate(zip(blocks, model.plan)):
        x = block(x, spec, shared, i)

    # The heads with a kernel that computes nothing; the keys stand in for queries.
    spec, h = model.plan[-1], last.input_layernorm(x)
    nothing = replace(shared, scale=None, attend={spec.window: lambda q, k, v: q})
    k, v = last.self_attn.k_proj(h), last.self_attn.v_proj(h)
    last.self_attn.heads(k, k, v, spec, nothing, len(blocks))


@torch.inference_mode()
def prefill(model: Transformer, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read tokens (b t) into the cache; logits (b v) after the last. ValueError as `fill`."""
    cache.check_room(tokens.shape[1])
    fill(model, tokens[:, :-1], cache)
    return model(tokens[:, -1:], cache)[:, 0]


@torch.inference_mode()
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
    """Yield the next token (b) of every row of tokens (b t), up to max_new_tokens times.

    Settings and errors as in Transformer.generate. tokens continue what a given `cache` holds.
    `compiled`: compile the step (on CUDA into a graph): seconds or minutes once, then less a token.
    """
    check_settings(model.config, tokens, max_new_tokens, temperature, top_k, top_p)
    if cache is None:
        cache = model.new_cache(len(tokens), tokens.shape[1] + max_new_tokens)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    step = token = None
    for _ in range(max_new_tokens):
        if step is None:
            logits = prefill(model, tokens, cache)
            make = compiled_step if compiled else eager_step
            step = make(model, cache, max_new_tokens - 1)
        else:
            logits = step(token)
        token = draw(logits, temperature, top_k, top_p, generator)
        if stop is not None:
            token = torch.where(ended, stop, token)
            ended |= token == stop
        yield token
        if stop is not None and ended.all():
            return


# The decode step ----------------------------------------------------------------------------------

Step = Callable[[Tensor], Tensor]  # token (b) -> logits (b v) after it


def eager_step(model: Transformer, cache: KVCache, count: int) -> Step:
    """For up to `count` tokens: their rotary table and the joined matrices are made once."""
    start, device = cache.length, cache.k[0].device
    table = model.rotary_table(torch.arange(start, start + count, device=device))
    blocks = [Joined(block) if count and joins(block) else block for block in model.layers]

    def step(token: Tensor) -> Tensor:
        at = cache.length - start
        shared = model.share(1, device, cache, table=table[at : at + 1])
        x = model.embed_tokens(token[:, None])
        for i, (block, spec) in enumerate(zip(blocks, model.plan)):
            x = block(x, spec, shared, i)
        return model.unembed(model.norm(x))[:, 0]

    return step


class Joined:
    """A block in two products: x + [heads(q, k, v), silu(gate) * up] W, with [q, k, v, gate, up]
    one product as well. Of copies, made for each stream: the parameters stay what they are."""

    def __init__(self, block: Block):
        attn, mlp = block.self_attn, block.mlp
        readers = [attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj]
        self.block = block
        self.widths = [m.out_features for m in readers]
        # Transposed, since a row times (c n) is faster than (n c) times a column by a half.
        self.read = torch.cat([m.weight.t() for m in readers], dim=1)
        self.write = torch.cat([m.weight.t() for m in (attn.o_proj, mlp.down_proj)], dim=0)

    def __call__(self, x: Tensor, spec: LayerSpec, shared: Shared, layer: int) -> Tensor:
        """x (b 1 c) -> (b 1 c), as Block.forward."""
        h = self.block.input_layernorm(x)
        q, k, v, gate, up = (h @ self.read).split_with_sizes(self.widths, dim=-1)
        heads = self.block.self_attn.heads(q, k, v, spec, shared, layer)
        return x + torch.cat((heads, F.silu(gate) * up), dim=-1) @ self.write


def joins(block: nn.Module) -> bool:
    """Can its matrices be joined, and does it pay?"""
    return is_plain(block) and sum(p.numel() for p in block.parameters()) <= JOINED_AT_MOST


def is_plain(block: nn.Module) -> bool:
    """Is the block ours to the letter? One that somebody has wrapped, subclassed, quantized or
    hooked is called as it is."""
    if type(block) is not Block or type(block.self_attn) is not Attention:
        return False
    if type(block.mlp) is not MLP or torch_module._has_any_global_hook():
        return False
    for name, part in block.named_modules():
        if name.endswith("_proj") and not (
            type(part) is nn.Linear and part.bias is None and type(part.weight) is nn.Parameter
        ):
            return False
        hooks = (part._forward_hooks, part._forward_pre_hooks, part._backward_hooks)
        if any(hooks) or part._backward_pre_hooks or "forward" in vars(part):
            return False
    return True


def compiled_step(model: Transformer, cache: KVCache, count: int) -> Step:
    """At shapes that never change. A CUDA graph writes its output over at the next step: a copy."""
    if cache.clock is None:
        cache.fix_shapes()
    run = compiled_logits(graphs=cache.k[0].is_cuda)

    def step(token: Tensor) -> Tensor:
        cache.reserve(1)
        return run(model, token, cache).clone()

    return step


@once
def compiled_logits(graphs: bool) -> Callable[[Transformer, Tensor, KVCache], Tensor]:
    mode = {"mode": "reduce-overhead"} if graphs else {}
    return torch.compile(logits_after, fullgraph=True, dynamic=False, **mode)


def logits_after(model: Transformer, token: Tensor, cache: KVCache) -> Tensor:
    """Logits (b v) after one more token (b)."""
    return model(token[:, None], cache)[:, 0]

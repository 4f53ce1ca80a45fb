"""Text, fast: the twin of Transformer.generate, which says what all this means.

    for token in stream(model, tokens, max_new_tokens=64): ...     tokens (b t) -> (b) a step
    logits = prefill(model, tokens, cache)                         reads a prompt, by chunks
    fill(model, tokens, cache)                                     the same, without logits

Decoding is bound by reading the weights and by the number of calls. So a block's matrices that read
the same are joined, and those that write to the residual stream: two products instead of seven.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache as once
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from attention import Attention, KVCache, LayerSpec, Shared
from fast.kernels import as_autocast, one_graph
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
    """One chunk (b t). Nobody reads the last layer's output: its keys and values are enough."""
    *blocks, last = model.layers
    if type(model) is not Transformer or not is_plain(last):
        model.hidden(chunk, cache)
        return
    x = as_autocast(model.embed_tokens(chunk))
    shared = model.share(chunk.shape[1], chunk.device, cache)
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
    return model.unembed(model.hidden(tokens[:, -1:], cache)[:, 0])


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
    """Yield the next token (b) of every row of tokens (b t), which continue what a given `cache`
    holds. Settings and errors as in Transformer.generate; `compiled`: compile the step, on CUDA
    into a graph, which takes seconds or minutes once."""
    check_settings(model.config, tokens, max_new_tokens, temperature, top_k, top_p)
    if cache is None:
        room = tokens.shape[1] + max_new_tokens
        room = 1 << (room - 1).bit_length() if compiled else room  # each size is compiled
        cache = model.new_cache(len(tokens), room)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    make, step, token = (compiled_step if compiled else eager_step), None, None
    for _ in range(max_new_tokens):
        logits = step(token) if step else prefill(model, tokens, cache)
        step = step or make(model, cache, max_new_tokens - 1)
        token = draw(logits, temperature, top_k, top_p, generator)
        if stop is not None:
            token = torch.where(ended, stop, token)
            ended |= token == stop
        yield token
        if stop is not None and ended.all():
            return


# The decode step ----------------------------------------------------------------------------------


def eager_step(model: Transformer, cache: KVCache, count: int) -> Callable[[Tensor], Tensor]:
    """token (b) -> logits (b v) after it, for `count` tokens, whose rotary table is made once."""
    if type(model) is not Transformer:  # which may have its own way
        return lambda token: model.unembed(model.hidden(token[:, None], cache)[:, 0])
    start, device = cache.length, cache.k[0].device
    table = model.rotary_table(torch.arange(start, start + count, device=device))
    blocks = [joined(block) if count else block for block in model.layers]
    layers = list(enumerate(zip(blocks, model.plan)))

    def step(token: Tensor) -> Tensor:
        shared = model.share(1, device, cache, table=table[cache.length - start :][:1])
        x = as_autocast(model.embed_tokens(token[:, None]))
        for i, (block, spec) in layers:
            x = block(x, spec, shared, i)
        return model.unembed(model.norm(x))[:, 0]

    return step


class Joined:
    """A block in two products: [q, k, v, gate, up] = LN(x) R and x + [heads, mlp] W."""

    def __init__(self, block: Block):
        self.norm, self.attn, mlp = block.input_layernorm, block.self_attn, block.mlp
        readers = [self.attn.q_proj, self.attn.k_proj, self.attn.v_proj]
        readers += [mlp.gate_proj, mlp.up_proj]
        self.widths = [m.out_features for m in readers]
        self.read = torch.cat([m.weight for m in readers]).t()
        self.write = torch.cat((self.attn.o_proj.weight, mlp.down_proj.weight), dim=1).t()

    def __call__(self, x: Tensor, spec: LayerSpec, shared: Shared, layer: int) -> Tensor:
        """x (b t c) -> (b t c), as Block.forward."""
        q, k, v, gate, up = (self.norm(x) @ self.read).split_with_sizes(self.widths, dim=-1)
        heads = self.attn.heads(q, k, v, spec, shared, layer)
        return x + torch.cat((heads, F.silu(gate) * up), dim=-1) @ self.write


JOINED: WeakKeyDictionary[Block, tuple[list, Joined]] = WeakKeyDictionary()


def joined(block: Block) -> Block | Joined:
    """The block in two products where it can be and pays, kept while its parameters stand still."""
    if not is_plain(block) or sum(p.numel() for p in block.parameters()) > JOINED_AT_MOST:
        return block
    mark = fingerprint(block)
    if block not in JOINED or JOINED[block][0] != mark:
        made = Joined(block)  # laid out for a row times (c n), faster by a half than (n c) a column
        made.read, made.write = made.read.contiguous(), made.write.contiguous()
        JOINED[block] = mark, made
    return JOINED[block][1]


def fingerprint(block: Block) -> list:
    """What differs when a matrix does: versions, which changes in place raise, and r W c for fixed
    r and c, which sees edits through `.data` but such as are lost in its rounding."""
    marks: list = [id(block.self_attn), id(block.input_layernorm)]
    for p in (p for p in block.parameters() if p.ndim == 2):
        r, c = (torch.arange(1, n + 1, device=p.device).cos().to(p.dtype) for n in p.shape)
        marks += [p.data_ptr(), 0 if p.is_inference() else p._version, (r @ (p @ c)).item()]
    return marks


def is_plain(block: nn.Module) -> bool:
    """Is the block ours to the letter? A wrapped, subclassed, quantized or hooked one is called."""
    parts = (block, getattr(block, "self_attn", None), getattr(block, "mlp", None))
    kinds = [type(part) for part in parts]
    if kinds != [Block, Attention, MLP] or torch_module._has_any_global_hook():
        return False
    for name, part in block.named_modules():
        plain = type(part) is nn.Linear and type(part.weight) is nn.Parameter
        wrapped = name.endswith("_proj") and (not plain or part.bias is not None)
        hooks = [part._forward_hooks, part._forward_pre_hooks, part._backward_hooks]
        if any([wrapped, *hooks, part._backward_pre_hooks, "forward" in vars(part)]):
            return False
    return True


def compiled_step(model: Transformer, cache: KVCache, count: int) -> Callable[[Tensor], Tensor]:
    """The same at shapes that never change."""
    twin = cache.fixed()
    for x in (*twin.k, *twin.v, *twin.positions.values(), twin.clock):
        # What a CUDA graph writes to has to stay where it is; a cache elsewhere is recorded anew.
        torch._dynamo.mark_static_address(x, guard=False)
    run = compiled_logits(graphs=cache.k[0].is_cuda)

    def step(token: Tensor) -> Tensor:
        cache.reserve(1)
        return run(model, token, twin).clone()  # a CUDA graph writes over its output

    return step


@once
def compiled_logits(graphs: bool) -> Callable[[Transformer, Tensor, KVCache], Tensor]:
    logits = lambda model, token, cache: model(token[:, None], cache)[:, 0]
    return one_graph(logits, dynamic=False, mode="reduce-overhead" if graphs else None)

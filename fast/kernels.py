"""Attention and rotation, faster.

Every kernel here takes q (b h t d), k and v (b k s d) and returns (b h t d), as
`attention_weights(q, k, window) @ v` in attention.py defines it. What a query sees comes in as the
argument `visible`, so that causality and windows are defined in one place only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch._compile import _disable_dynamo

if TYPE_CHECKING:  # importing it brings the whole compiler along
    from torch.nn.attention.flex_attention import BlockMask

Visible = Callable[[Tensor, Tensor, "int | None"], Tensor]


# ------------------------------------------------------------------------------------------------
# Rotation


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """attention.rotate as one product of complex numbers: x (.. t d), table (t d/2) complex."""
    wide = x.float() if x.element_size() < 4 else x  # there are no complex numbers of bfloat16
    pairs = torch.view_as_complex(wide.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


# ------------------------------------------------------------------------------------------------
# PyTorch's fused kernel


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Every query sees the keys where mask (t s) is True; without a mask it sees all of them."""
    b, h, t, d = q.shape
    group = h // k.shape[1]

    # Decoding: the queries of a group become the rows of one product with the keys they share.
    if t == 1:
        rows = q.reshape(b, h // group, group, d)
        return F.scaled_dot_product_attention(rows, k, v, mask).reshape(b, h, 1, -1)

    if trains_in_bfloat16_on_cpu(q):
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), mask).to(q.dtype)

    # CUDA's masked kernels do not know groups: PyTorch would write out the (t s) scores.
    if mask is not None and q.is_cuda and group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=group > 1)


def causal(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Full causal attention of a whole sequence, t = s."""
    h, t = q.shape[1:3]
    if t == 1:
        return sdpa(q, k, v)
    if trains_in_bfloat16_on_cpu(q):
        with torch.autocast("cpu", enabled=False):
            return causal(q.float(), k.float(), v.float(), visible).to(q.dtype)
    if q.device.type == "cpu" and 64 < t <= 1024:
        return causal_by_blocks(q, k, v, visible)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=h != k.shape[1])


def causal_by_blocks(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Blocks of queries, each with the keys up to its end and a dense mask. On CPU this takes an
    eighth to a quarter less time than PyTorch's own causal order up to some 1,024 tokens, forward
    and backward, and more beyond."""
    position = torch.arange(q.shape[2], device=q.device)
    outputs, end = [], 0
    for block in q.split(max(64, q.shape[2] // 8), dim=2):
        start, end = end, end + block.shape[2]
        mask = visible(position[start:end, None], position[None, :end], None)
        outputs.append(sdpa(block, k[:, :, :end], v[:, :, :end], mask))
    return torch.cat(outputs, dim=2)


def trains_in_bfloat16_on_cpu(q: Tensor) -> bool:
    """PyTorch's backward pass takes three times as long in bfloat16 there as in float32."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad


# ------------------------------------------------------------------------------------------------
# Windows in blocks: any device, forward and backward


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, visible: Visible) -> Tensor:
    """A window for O(t window) work: blocks of queries, folded into the batch, each with the keys
    that it reaches.

        keys     0 1 2 3 4 5 6 7 8 9 ..    block = 2, window = 4: the queries 4 and 5 reach back 3
        block 2  x x x x x x . . . .       keys, so theirs are the own block and the two before. The
        block 3  . . x x x x x x . .       same small mask serves every block but the first two,
                                           which have less before them.
    """
    t = q.shape[2]
    if window >= t:
        return causal(q, k, v, visible)

    # A query's keys fill most of what its block reads, and no key is read more than six times.
    block = max(window // 4, 32)
    before = -(-(window - 1) // block)  # earlier blocks that a window reaches
    first = block * max(before, 1)  # these rows have fewer blocks before them
    position = torch.arange(max(min(first, t), (before + 1) * block), device=q.device)
    if first >= t:
        return sdpa(q, k, v, visible(position[:t, None], position[None, :t], window))
    head = banded(q[:, :, :first], k[:, :, :first], v[:, :, :first], window, visible)

    # The rest in n equal blocks. Keys of the padding are later than every query: never seen.
    n = -(-(t - first) // block)
    padding = (0, 0, 0, first + n * block - t)
    q, k, v = F.pad(q, padding), F.pad(k, padding), F.pad(v, padding)

    def reached(x: Tensor) -> Tensor:
        """(b k s d) -> (b n) k ((before + 1) block) d: each block's keys, oldest first."""
        shifted = []
        for i in range(before, -1, -1):
            shift = x[:, :, first - i * block :][:, :, : n * block]
            shifted.append(shift.unflatten(2, (n, block)))
        return rearrange(torch.cat(shifted, dim=3), "b k n s d -> (b n) k s d")

    queries = position[before * block : (before + 1) * block]
    mask = visible(queries[:, None], position[None, : (before + 1) * block], window)
    folded = rearrange(q[:, :, first:], "b h (n t) d -> (b n) h t d", n=n)
    tail = sdpa(folded, reached(k), reached(v), mask)
    tail = rearrange(tail, "(b n) h t d -> b h (n t) d", n=n)[:, :, : t - first]
    return torch.cat((head, tail), dim=2)


# ------------------------------------------------------------------------------------------------
# FlexAttention


@_disable_dynamo  # made outside of compiled code; torch.compiler.disable imports the compiler
@lru_cache(maxsize=16)
@torch.inference_mode(False)  # evaluation may ask first, and training must save it for backward
def flex_mask(
    length: int, window: int | None, device: torch.device, visible: Visible, block: int = 128
) -> BlockMask:
    """FlexAttention's block mask of `visible`, from block corners: (length / block)^2 work, not
    length^2. A pair of blocks is skipped, computed whole, or, where its corners disagree, masked
    element by element."""
    from torch.nn.attention.flex_attention import BlockMask

    reach = length if window is None else window
    start = torch.arange(0, length, block, device=device)
    q0, k0 = start[:, None], start[None, :]
    q1, k1 = q0 + block - 1, k0 + block - 1
    some = (k0 <= q1) & (q0 - k1 < reach)
    whole = (k1 <= q0) & (q1 - k0 < reach)

    def listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Counts and indices of each row's chosen key blocks, these first."""
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole),
        *listed(whole),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, q, k: visible(q, k, window),
        seq_lengths=(length, length),
    )


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention, compiled on CUDA. On CPU PyTorch has its forward pass only: ValueError where a
    gradient is wanted."""
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                "backend 'flex' has no backward pass on CPU: train with 'banded' or 'sdpa'"
            )
        # It refuses what could require a gradient, even where none is wanted.
        q, k, v = q.detach(), k.detach(), v.detach()
    kernel = flex_attention
    if q.is_cuda and not torch.compiler.is_compiling():
        kernel = compiled_flex()
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])

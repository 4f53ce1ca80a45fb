"""Attention and rotation, faster.

Every kernel here takes q (b h t d), k and v (b k s d) and returns (b h t d), as
`attention_weights(q, k, window) @ v` in attention.py defines it. What a query sees comes in as the
argument `visible`, of attention.py; torch's is_causal and block_mask's corners repeat it alone.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Visible = Callable[[Tensor, Tensor, "int | None"], Tensor]


def as_autocast(x: Tensor) -> Tensor:
    """x, if it is float32, in the type of autocast's products, where autocast is on."""
    kind = x.device.type
    narrow = x.dtype == torch.float32 and not x.is_meta and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if narrow else x


# Rotation -----------------------------------------------------------------------------------------


def rotate_complex(x: Tensor, table: Tensor) -> Tensor:
    """attention.rotate as one product of complex numbers: x (.. t d), table (t d/2) complex."""
    wide = x.float() if x.element_size() < 4 else x  # there are no complex numbers of bfloat16
    pairs = torch.view_as_complex(wide.view(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


# PyTorch's fused kernel ---------------------------------------------------------------------------


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal=False) -> Tensor:
    """Queries see keys where mask (t s) is True, `is_causal` those up to their own, else all."""
    b, h, t, d = q.shape
    group = h // k.shape[1]

    # Decoding: the queries of a group become the rows of one product with the keys they share.
    if t == 1:
        rows = q.reshape(b, h // group, group, d)
        kernel = two_products if q.is_cuda else F.scaled_dot_product_attention
        return kernel(rows, k, v, mask).reshape(b, h, 1, -1)

    if trains_in_bfloat16_on_cpu(q):
        with torch.autocast("cpu", enabled=False):
            return sdpa(q.float(), k.float(), v.float(), mask, is_causal).to(q.dtype)

    # CUDA's kernels know groups in half precision and without a mask: for others PyTorch would
    # write out the (t s) scores. cuDNN takes half a second to plan for each new length of a cache,
    # and its gradients under a mask are wrong at some lengths (pytorch#196678).
    masked = q.is_cuda and mask is not None
    if group > 1 and (masked or (q.is_cuda and q.dtype == torch.float32)):
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        group = 1
    with sdpa_kernel(NOT_CUDNN) if masked else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, enable_gqa=group > 1)


def two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One token's attention on CUDA, whose fused kernels give a head's keys to one processor where
    there is a mask: q (b k group d) -> (b k group d)."""
    scores = q * q.shape[-1] ** -0.5 @ k.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).type_as(v) @ v


def causal(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Full causal attention of a whole sequence, t = s."""
    if trains_in_bfloat16_on_cpu(q):
        with torch.autocast("cpu", enabled=False):
            return causal(q.float(), k.float(), v.float(), visible).to(q.dtype)
    if q.device.type == "cpu" and 64 < q.shape[2] <= 1024:
        return causal_by_blocks(q, k, v, visible)
    return sdpa(q, k, v, is_causal=True)


def causal_by_blocks(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Blocks of queries, each with the keys up to its end and a dense mask. On CPU an eighth to a
    quarter faster than PyTorch's own causal order up to some 1,024 tokens, and slower beyond."""
    position = torch.arange(q.shape[2], device=q.device)
    outputs, end = [], 0
    for block in q.split(max(64, q.shape[2] // 8), dim=2):
        start, end = end, end + block.shape[2]
        mask = visible(position[start:end, None], position[None, :end], None)
        outputs.append(sdpa(block, k[:, :, :end], v[:, :, :end], mask))
    return torch.cat(outputs, dim=2)


def trains_in_bfloat16_on_cpu(q: Tensor) -> bool:
    """PyTorch's backward pass takes three times as long in bfloat16 there as in float32."""
    on_cpu = q.device.type == "cpu" and q.dtype == torch.bfloat16
    return on_cpu and q.requires_grad and q.shape[2] > 1


# Windows in blocks: any device, forward and backward ----------------------------------------------


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


# FlexAttention ------------------------------------------------------------------------------------


def block_mask(length: int, window: int | None, device: torch.device, visible: Visible):
    """FlexAttention's block mask of `visible`, from block corners: (length / block)^2 work, not
    length^2. A pair of blocks is skipped, computed whole, or, where its corners disagree, masked
    element by element."""
    from torch.nn.attention.flex_attention import BlockMask  # it brings the whole compiler along

    block, reach = 128, length if window is None else window
    start = torch.arange(0, length, block, device=device)
    q0, k0 = start[:, None], start[None, :]
    q1, k1 = q0 + block - 1, k0 + block - 1
    some = (k0 <= q1) & (q0 - k1 < reach)
    whole = (k1 <= q0) & (q1 - k0 < reach)
    masked, lists = some & ~whole, []
    for chosen in (masked, whole, masked.T.contiguous(), whole.T.contiguous()):
        # Counts and indices of each row's chosen blocks, these first. Not by sorting: to compile
        # that takes minutes.
        count = chosen.sum(-1, keepdim=True)
        place = torch.where(chosen, chosen.cumsum(-1), count + (~chosen).cumsum(-1)) - 1
        order = torch.zeros_like(place).scatter_(-1, place, (start // block).expand_as(place))
        lists += [count[None, None, :, 0].int(), order[None, None].int()]
    seen = lambda b, h, q, k: visible(q, k, window)
    return BlockMask((length, length), *lists, BLOCK_SIZE=(block, block), mask_mod=seen)


# Evaluation may ask first, and training must save it for backward.
kept_block_mask = lru_cache(maxsize=16)(torch.inference_mode(False)(block_mask))


def flex_mask(*what):
    """`block_mask`, made once; in compiled code a part of its one graph."""
    return (block_mask if torch.compiler.is_compiling() else kept_block_mask)(*what)


def one_graph(function: Callable, **how) -> Callable:
    """torch.compile, with an error where it would run anything uncompiled: after a break, or from
    the ninth shape on, which is its limit of shapes unless raised."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(function, fullgraph=True, **how)


compiled_once = cache(one_graph)


def flex(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """FlexAttention, compiled on CUDA. On CPU PyTorch has its forward pass only: ValueError where a
    gradient is wanted."""
    from torch.nn.attention.flex_attention import flex_attention

    if q.device.type == "cpu":
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError("backend 'flex' has no backward pass on CPU: use 'banded', 'sdpa'")
        # It refuses what could require a gradient, even where none is wanted.
        q, k, v = q.detach(), k.detach(), v.detach()
    # Lengths may become symbolic, since prompts have many.
    alone = q.is_cuda and not torch.compiler.is_compiling()
    kernel = compiled_once(flex_attention) if alone else flex_attention
    # Not the kernel for few queries, which torch chooses below 128 and for some groups has not.
    how = {"block_mask": mask, "kernel_options": {"FORCE_USE_FLEX_ATTENTION": True}}
    return kernel(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **how)

"""Attention with and without positions, full and windowed: the ideas of "Rope to Nope and Back Again" in one file.

Read top to bottom: what a layer chooses (LayerSpec), where positions enter (rotation, length scales), what a query
sees (visible), how the sum is computed (attend and its four backends), what is remembered (KVCache), and the module
that joins them (Attention).

The letters, here and in every comment and einops string of this repository:

    b  batch              h  query heads             d  head width
    t  query time         k  key/value heads         c  model width
    s  key time           v  vocabulary

Paper: arXiv 2501.18795. Sections are cited beside each idea.
"""

import math
from copy import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BACKENDS = ("auto", "reference", "sdpa", "banded", "flex")
ROPE_SCALINGS = ("none", "pi", "ntk", "yarn")
LENGTH_SCALES = ("none", "swan", "llama4", "drope", "ssmax")


@dataclass(frozen=True)
class LayerSpec:
    """The two choices of a layer: are q and k rotated, and how many keys does a query see, itself included (None: all)."""

    rope: bool
    window: int | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Positions: rotation (RoPE), and scales of the logits by length


def rotary_frequencies(
    head_dim: int,
    theta: float,
    scaling: str = "none",
    factor: float = 1.0,
    original_length: int | None = None,
) -> tuple[Tensor, float]:
    """Radians per token of each pair, (d/2) float32, and the factor on cos and sin (1 except for YaRN).

    theta^(-2i/d) is RoPE (2104.09864). `factor` is new length / trained length for "pi" (2306.15595), "ntk" and
    "yarn" (2309.00071); YaRN also needs the trained length itself. A raise of theta (paper, section 2) is just `theta`.
    Raises ValueError for an unknown scaling and for YaRN without its length.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if scaling == "ntk":  # stretches the slowest pair by the factor and leaves the fastest alone
        theta = theta * factor ** (head_dim / (head_dim - 2))
    frequencies = theta**-pairs
    if scaling in ("none", "ntk"):
        return frequencies, 1.0
    if scaling == "pi":
        return frequencies / factor, 1.0
    if scaling != "yarn":
        raise ValueError(
            f"rope_scaling {scaling!r} is unknown: use one of {', '.join(ROPE_SCALINGS)}"
        )
    if original_length is None:
        raise ValueError(
            "rope_scaling 'yarn' needs rope_original_length, the length the model was trained at"
        )

    def pair_turning(
        times: float,
    ) -> float:  # the (fractional) pair that makes so many turns within the trained length
        return head_dim * math.log(original_length / (2 * math.pi * times)) / (2 * math.log(theta))

    low = max(
        math.floor(pair_turning(32)), 0
    )  # pairs below turn often: keep them, they tell neighbours apart
    high = min(
        math.ceil(pair_turning(1)), head_dim - 1
    )  # pairs above never finish a turn: stretch them as PI does
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1


def rotary_table(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> Tensor:
    """amplitude * (cos, sin) of each pair's angle: (t d/2 2) from (t) positions. Float32, whatever the model is in."""
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return table if amplitude == 1 else table * amplitude


def as_complex(table: Tensor) -> Tensor:
    """(t d/2 2) -> (t 1 d/2) complex, as x (b t h d/2) is multiplied by it."""
    return torch.view_as_complex(table).unsqueeze(1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (b t h d) turned by its position's angles: dimensions 2i and 2i+1 are one complex number (GPT-J's adjacent pairs).
    table (t d/2 2), or the same as complex numbers (t 1 d/2).

    A rotation keeps norms, and <rotate(q, m), rotate(k, n)> depends on m - n alone: position enters as distance.
    """
    wide = x.float() if x.element_size() < 4 else x  # angles and products in float32 at least
    pairs = wide.view(x.shape[:-1] + (-1, 2))
    if not table.is_complex() and not torch.compiler.is_compiling():
        table = as_complex(table)
    if table.is_complex():
        turned = torch.view_as_real(torch.view_as_complex(pairs) * table)
    else:  # the compiler has no complex numbers, and fuses these
        (a, b), (cos, sin) = pairs.unbind(-1), table.unsqueeze(1).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    turned = turned.flatten(-2)
    return turned if wide is x else turned.to(x.dtype)


def length_scale(kind: str, positions: Tensor, base: int | None) -> Tensor | None:
    """The factor on q of a full NoPE layer for queries at `positions` (t): (t) float32, or None for "none".

    NoPE's softmax flattens as keys are added; these sharpen it again. `base` is the trained length (SWAN's a, 2504.08719;
    Llama 4's floor; DroPE's unit, 2512.12167). "ssmax" (2501.19399) gives ln n, to be multiplied by its learned s per head.
    Raises ValueError for an unknown kind or a missing base.
    """
    if kind == "none":
        return None
    n = positions.float()
    if kind == "ssmax":
        return torch.log((n + 1).clamp(min=2))
    if kind not in LENGTH_SCALES:
        raise ValueError(f"length_scale {kind!r} is unknown: use one of {', '.join(LENGTH_SCALES)}")
    if base is None:
        raise ValueError(
            f"length_scale {kind!r} needs length_base or trained_length, the length the model was trained at"
        )
    if base < 2:
        raise ValueError(
            f"length_scale {kind!r} with a trained length of {base} is undefined: give length_base of 2 or more"
        )
    if kind == "swan":
        return torch.log(base + n) / math.log(base)
    if kind == "llama4":
        return 1 + 0.1 * torch.log(1 + torch.floor((n + 1) / base))
    return 1 + 0.412 * torch.log(
        ((n + 1) / base).clamp(min=1)
    )  # drope: nothing up to the trained length


# ---------------------------------------------------------------------------------------------------------------------
# What a query sees


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None = None) -> Tensor:
    """True where a query sees a key; elementwise, so pass q_pos[:, None] and k_pos[None, :] for the (t s) mask.

    The one definition of causality and of a window in this repository: `window` keys, the query's own included.
    A key position of -1 is an empty cache slot.

        full (None)        window = 3
        q\\k 0 1 2 3 4 5    q\\k 0 1 2 3 4 5
        0   x . . . . .    0   x . . . . .
        1   x x . . . .    1   x x . . . .
        2   x x x . . .    2   x x x . . .
        3   x x x x . .    3   . x x x . .
        4   x x x x x .    4   . . x x x .
        5   x x x x x x    5   . . . x x x
    """
    seen = (k_pos >= 0) & (k_pos <= q_pos)
    return (
        seen if window is None else seen & (k_pos > q_pos - window)
    )  # q - k < window, without a (t s) table of differences


def visible_pairs(length: int, window: int | None = None) -> int:
    """How many (query, key) pairs a causal sequence of `length` has: the True entries of its mask, in closed form."""
    w = length if window is None else min(window, length)
    return w * length - w * (w - 1) // 2


@torch.compiler.disable  # made outside of compiled code, once for each (length, window, device), so that nothing recompiles
@lru_cache(maxsize=16)
@torch.inference_mode(
    False
)  # evaluation may be the first to ask, and training must be able to save it for its backward pass
def flex_mask(length: int, window: int | None, device: torch.device, block: int = 128) -> BlockMask:
    """FlexAttention's block mask of `visible`, from block corners: (length / block)^2 work, not length^2.

    A pair of blocks is skipped, computed whole, or (where its corners disagree) masked element by element.
    """
    reach = length if window is None else window
    start = torch.arange(0, length, block, device=device)
    q0, k0 = start[:, None], start[None, :]
    q1, k1 = q0 + block - 1, k0 + block - 1
    some = (k0 <= q1) & (q0 - k1 < reach)
    whole = (k1 <= q0) & (q1 - k0 < reach)

    def listed(
        blocks: Tensor,
    ) -> tuple[Tensor, Tensor]:  # counts and indices, the chosen key blocks first
        order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    return BlockMask.from_kv_blocks(
        *listed(some & ~whole),
        *listed(whole),
        BLOCK_SIZE=block,
        mask_mod=lambda b, h, q, k: visible(q, k, window),
        seq_lengths=(length, length),
    )


# ---------------------------------------------------------------------------------------------------------------------
# How it is computed


def attention_weights(
    q: Tensor,
    k: Tensor,
    window: int | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the visible keys, written out: q (b h t d), k (b k s d) -> (b h t s)."""
    q_pos, k_pos = _positions(q, k, q_pos, k_pos)
    k = k.repeat_interleave(
        q.shape[1] // k.shape[1], dim=1
    )  # grouped queries: query head h reads key head h // group
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible(q_pos[:, None], k_pos[None, :], window), -math.inf)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).type_as(
        scores
    )


def _positions(
    q: Tensor, k: Tensor, q_pos: Tensor | None, k_pos: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The given positions, or 0..t-1 for both; ValueError where that would be a guess."""
    if q_pos is None and k_pos is None and q.shape[2] == k.shape[2]:
        q_pos = k_pos = torch.arange(q.shape[2], device=q.device)
    if q_pos is None or k_pos is None:
        raise ValueError(f"{q.shape[2]} queries over {k.shape[2]} keys: give both q_pos and k_pos")
    return q_pos, k_pos


def choose_backend(
    backend: str,
    window: int | None,
    length: int,
    device: torch.device,
    cached: bool = False,
    head_width: int = 16,
) -> str:
    """The kernel that `backend` means for one sequence of `length`: "auto" is resolved, any other name is itself.

    Full attention: sdpa. Windowed: flex on CUDA (whose kernels want heads of 16 or wider), banded elsewhere; sdpa where the
    window (nearly) covers the sequence, since then there is nothing to skip, and under a cache. Raises ValueError for an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    if cached or window is None or length <= window:
        return "sdpa"
    if device.type == "cuda" and head_width >= 16:
        return "flex"
    return "banded" if length >= 2 * window else "sdpa"


def make_mask(
    backend: str,
    window: int | None,
    length: int,
    device: torch.device,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> Tensor | BlockMask | None:
    """What `backend` needs to know of `visible`, to be shared by all layers of a window: (t s) bool, a block mask, or None."""
    if backend == "flex":
        return flex_mask(length, window, device)
    if backend != "sdpa":
        return None
    if q_pos is None and (window is None or window >= length):
        return None  # `_sdpa` is told `causal`, and the upper triangle is skipped
    if q_pos is None:
        q_pos = k_pos = torch.arange(length, device=device)
    return visible(q_pos[:, None], k_pos[None, :], window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None = None,
    backend: str = "auto",
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    mask: Tensor | BlockMask | None = None,
) -> Tensor:
    """Causal attention of q (b h t d) over k and v (b k s d) -> (b h t d), k dividing h.

    `q_pos` (t) and `k_pos` (s) are absolute positions, needed when t != s (a cache). `mask` is what `make_mask` returned
    for the same arguments, when several layers share it. Raises ValueError where the backend cannot do what is asked.
    """
    t, s = q.shape[2], k.shape[2]
    if window is not None and window < 1:
        raise ValueError(
            f"window {window} sees nothing: a query always sees itself, so use 1 or more"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{q.shape[1]} query heads cannot share {k.shape[1]} key/value heads: use a divisor"
        )
    if (q_pos is None) != (k_pos is None) or (q_pos is None and t != s):
        raise ValueError(f"{t} queries over {s} keys: give both q_pos and k_pos")
    backend = choose_backend(backend, window, t, q.device, q_pos is not None, q.shape[-1])
    if backend == "reference":
        return attention_weights(q, k, window, q_pos, k_pos) @ v.repeat_interleave(
            q.shape[1] // v.shape[1], dim=1
        )
    if backend in ("banded", "flex") and q_pos is not None:
        raise ValueError(
            f"backend {backend!r} takes whole sequences, not positions: use 'sdpa' or 'reference'"
        )
    if backend == "banded":
        if window is None:
            raise ValueError("backend 'banded' is for windows and this layer has none: use 'sdpa'")
        return _banded(q, k, v, window)
    if mask is None:
        mask = make_mask(backend, window, t, q.device, q_pos, k_pos)
    return (
        _flex(q, k, v, mask)
        if backend == "flex"
        else _sdpa(q, k, v, mask, causal=mask is None and q_pos is None)
    )


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """PyTorch's fused kernel. mask (t s); without one and without `causal` every query sees every key."""
    group, t = q.shape[1] // k.shape[1], q.shape[2]
    if (
        t == 1
    ):  # decoding: the queries of a group become the rows of one product with their shared keys
        b, h, _, d = q.shape
        return F.scaled_dot_product_attention(
            q.reshape(b, h // group, group, d), k, v, mask
        ).reshape(b, h, 1, -1)
    if (
        q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
    ):  # PyTorch's backward pass takes three times as long in bfloat16 there
        with torch.autocast("cpu", enabled=False):
            return _sdpa(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    if (
        mask is not None and q.is_cuda and group > 1
    ):  # CUDA's masked kernels do not group: PyTorch would write out (t s)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if causal and q.device.type == "cpu" and 64 < t <= 1024:
        return _causal(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
    )


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention on CPU by blocks of queries, each with the keys up to its end and a dense mask: measured, forward and backward, to take
    an eighth to a quarter less time than PyTorch's own causal order up to some 1,024 tokens, and more beyond."""
    found, end = [], 0
    for block in q.split(max(64, q.shape[2] // 8), dim=2):
        start, end = end, end + block.shape[2]
        mask = visible(
            torch.arange(start, end, device=q.device)[:, None],
            torch.arange(end, device=q.device)[None, :],
        )
        found.append(_sdpa(block, k[:, :, :end], v[:, :, :end], mask))
    return torch.cat(found, dim=2)


def _banded(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """A window for O(t window) work on any device: blocks of queries, folded into the batch, each with the keys it reaches.

    keys     0 1 2 3 4 5 6 7 8 9 ..      block = 2, window = 4: the queries 4 and 5 reach back 3 keys,
    block 2  x x x x x x . . . .         so their keys are the own block and the two before; the same small
    block 3  . . x x x x x x . .         mask serves every block but the first two, which have less before them.
    """
    t = q.shape[2]
    block = max(
        window // 4, 32
    )  # a query's keys fill most of what its block reads, and no key is read more than six times
    before = -(-(window - 1) // block)  # earlier blocks that a window reaches
    first = block * max(before, 1)  # these rows have fewer blocks before them: apart
    if first >= t:
        return _sdpa(q, k, v, make_mask("sdpa", window, t, q.device), causal=window >= t)
    head = _banded(q[:, :, :first], k[:, :, :first], v[:, :, :first], window)
    n = -(-(t - first) // block)
    padding = (
        0,
        0,
        0,
        first + n * block - t,
    )  # keys beyond t are later than every query: never seen
    q, k, v = F.pad(q, padding), F.pad(k, padding), F.pad(v, padding)

    def reach(x: Tensor) -> Tensor:  # (b k s d) -> (b n) k ((before + 1) block) d
        shifts = [
            x[:, :, first - i * block :][:, :, : n * block].unflatten(2, (n, block))
            for i in range(before, -1, -1)
        ]
        return rearrange(torch.cat(shifts, dim=3), "b k n s d -> (b n) k s d")

    q_pos = torch.arange(block, device=q.device)[:, None] + before * block
    mask = visible(q_pos, torch.arange((before + 1) * block, device=q.device)[None, :], window)
    tail = _sdpa(
        rearrange(q[:, :, first:], "b h (n t) d -> (b n) h t d", n=n), reach(k), reach(v), mask
    )
    return torch.cat(
        (head, rearrange(tail, "(b n) h t d -> b h (n t) d", n=n)[:, :, : t - first]), dim=2
    )


@lru_cache(maxsize=None)
def _compiled_flex():
    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """FlexAttention, compiled on CUDA; on CPU eager and forward only, which is what PyTorch has there."""
    if (
        q.device.type == "cpu"
        and torch.is_grad_enabled()
        and (q.requires_grad or k.requires_grad or v.requires_grad)
    ):
        raise ValueError(
            "backend 'flex' has no backward pass on CPU: train with 'banded' or 'sdpa'"
        )
    if (
        q.device.type == "cpu"
    ):  # it refuses what could require a gradient, even where none is wanted
        q, k, v = q.detach(), k.detach(), v.detach()
    kernel = _compiled_flex() if q.is_cuda and not torch.compiler.is_compiling() else flex_attention
    return kernel(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# What is remembered


class KVCache:
    """Keys (rotated) and values of every layer: all of them up to `max_length` in a full layer, the last `window` in another.

    Each layer is a ring of rows, position p in slot p mod rows; a full layer's ring never comes round. The absolute
    position of each slot is kept (-1: empty) and `visible` masks by it, so any chunking of a prompt gives the same
    attention: softmax does not mind the order of the slots. (A mask by slot order would leak the future.)
    """

    def __init__(
        self,
        plan: list[LayerSpec],
        batch_size: int,
        n_kv_head: int,
        head_dim: int,
        max_length: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        if batch_size < 1 or max_length < 1:
            raise ValueError(
                f"a cache of {batch_size} rows of {max_length} tokens holds nothing: use 1 or more of both"
            )
        self.plan, self.max_length, self.length = list(plan), max_length, 0
        self.rows = [min(spec.window or max_length, max_length) for spec in plan]
        shape = lambda rows: (batch_size, n_kv_head, rows, head_dim)
        self.k = [torch.zeros(shape(rows), device=device, dtype=dtype) for rows in self.rows]
        self.v = [torch.zeros(shape(rows), device=device, dtype=dtype) for rows in self.rows]
        self.positions = {rows: torch.full((rows,), -1, device=device) for rows in set(self.rows)}
        self.clock: Tensor | None = None  # see `fix_shapes`

    def fix_shapes(self) -> None:
        """From here on one token at a time, at shapes that never change, so that the step can be compiled and captured into a CUDA
        graph: time is a tensor, every row of a ring is met, and empty ones are masked. Whoever steps calls `reserve`."""
        self.clock = torch.tensor([self.length], device=self.k[0].device)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds, all of them allocated from the start."""
        return sum(x.nbytes for x in (*self.k, *self.v, *self.positions.values()))

    @property
    def full_nbytes(self) -> int:
        """Bytes of keys and values if every layer held everything."""
        return sum(
            x.nbytes // rows * self.max_length
            for xs in (self.k, self.v)
            for x, rows in zip(xs, self.rows)
        )

    def check_room(self, t: int) -> None:
        """ValueError where t more tokens do not fit."""
        if self.length + t > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} tokens and has {self.length}: {t} more need a larger max_length"
            )

    def reserve(self, t: int) -> None:
        """Count t more tokens. Raises ValueError, and changes nothing, when the cache is full."""
        self.check_room(t)
        self.length += t

    def fork(self, n: int) -> "KVCache":
        """A copy in which every row stands n times: n continuations of one prompt."""
        twin = copy(self)
        twin.k, twin.v = ([x.repeat_interleave(n, dim=0) for x in xs] for xs in (self.k, self.v))
        twin.positions = {rows: held.clone() for rows, held in self.positions.items()}
        twin.clock = None if self.clock is None else self.clock.clone()
        return twin

    def advance(self, t: int) -> tuple[Tensor, dict[int, Tensor], dict[int, Tensor]]:
        """Make room for the next t tokens -> their positions (t); for each ring size the slots that the newest go to, and the
        positions (s) that the queries meet. Raises ValueError when the cache is full.
        """
        device, slots, met = self.k[0].device, {}, {}
        if self.clock is None:
            self.reserve(t)
            q_pos = torch.arange(self.length - t, self.length, device=device)
        else:
            q_pos = self.clock.clone()
            self.clock += t
        for rows, held in self.positions.items():
            newest = q_pos if t <= rows else q_pos[-rows:]
            slots[rows] = newest % rows
            if self._chunked(rows, t):
                met[rows] = torch.cat((held[: min(self.length - t, rows)], q_pos))
            held.index_copy_(0, slots[rows], newest)
            if not self._chunked(rows, t):
                met[rows] = (
                    held if self.clock is not None or self.length >= rows else held[: self.length]
                )
        return q_pos, slots, met

    def extend(
        self, layer: int, k: Tensor, v: Tensor, slots: dict[int, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's k and v (b k t d) for the tokens just advanced over; return those that their queries meet (b k s d)."""
        rows, t, k_held, v_held = self.rows[layer], k.shape[2], self.k[layer], self.v[layer]
        if k.dtype != k_held.dtype:
            k, v = k.to(k_held.dtype), v.to(k_held.dtype)
        chunked = self._chunked(rows, t)
        if chunked:
            held = min(self.length - t, rows)
            met = (
                torch.cat((k_held[:, :, :held], k), dim=2),
                torch.cat((v_held[:, :, :held], v), dim=2),
            )
            k, v = k[:, :, -rows:], v[:, :, -rows:]
        k_held.index_copy_(2, slots[rows], k)
        v_held.index_copy_(2, slots[rows], v)
        if chunked:
            return met
        if self.clock is not None or self.length >= rows:
            return k_held, v_held
        return k_held.narrow(2, 0, self.length), v_held.narrow(2, 0, self.length)

    def _chunked(self, rows: int, t: int) -> bool:
        """Must these queries meet keys that the ring has no room for beside the newest? One token, or a ring that never turns, need not."""
        return t > 1 and rows < self.max_length


# ---------------------------------------------------------------------------------------------------------------------
# The module


@dataclass
class Context:
    """What the layers of one forward share, made once by the model."""

    table: Tensor  # rotary table of the queries' positions: complex (t 1 d/2), or (t d/2 2) while compiling
    scale: Tensor | None  # length scale of the full NoPE layers (t)
    backends: dict[int | None, str]  # per window
    masks: dict[
        int | None, Tensor | BlockMask | None
    ]  # per window; none at all for one query over its cache
    cache: KVCache | None = None
    q_pos: Tensor | None = None  # of what continues a cache (t)
    k_pos: dict[int | None, Tensor] | None = None  # of what it then meets, per window (s)
    slots: dict[int, Tensor] | None = None  # under a cache, per ring size
    weights: list | None = None  # collects (attention weights, key positions) of each layer
    joined: bool = False  # one token: blocks multiply by their joined matrices


class LayerNorm(nn.LayerNorm):
    """Without a bias. torch's own way to the kernel takes longer than the norm of one token."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (.. width) with mean 0 and variance 1, times the gain."""
        return torch.layer_norm(x, self.normalized_shape, self.weight, None, self.eps)


class Attention(nn.Module):
    """Grouped-query attention without biases. It does not own its LayerSpec: position is an argument, not a parameter."""

    def __init__(
        self,
        d_model: int,
        n_head: int,
        n_kv_head: int,
        head_dim: int,
        qk_norm: bool,
        ssmax: bool,
        norm_eps: float,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(d_model, n_head * head_dim, bias=False)
        self.k_proj = nn.Linear(d_model, n_kv_head * head_dim, bias=False)
        self.v_proj = nn.Linear(d_model, n_kv_head * head_dim, bias=False)
        self.o_proj = nn.Linear(n_head * head_dim, d_model, bias=False)
        self.q_norm = self.k_norm = self.s_scale = None
        if qk_norm:  # LayerNorm over the head width, one gain (d) for all heads (paper, section 2)
            self.q_norm = LayerNorm(head_dim, norm_eps)
            self.k_norm = LayerNorm(head_dim, norm_eps)
        if ssmax:
            self.s_scale = nn.Parameter(torch.full((n_head,), 0.168))

    def _heads(
        self, x: Tensor, norm: LayerNorm | None = None, table: Tensor | None = None
    ) -> Tensor:
        """x (b t (h d)) -> (b h t d), normed and then rotated where there is a norm and a table."""
        b, t, _ = x.shape
        x = x.view(
            (b, -1, 1, self.head_dim) if t == 1 else (b, t, -1, self.head_dim)
        )  # of one token t and h may change places as they are
        if norm is not None:
            x = norm(x).type_as(x)  # autocast would leave it wider
        if table is not None:
            x = rotate(x, table)
        return x if t == 1 else x.transpose(1, 2)

    def remember(
        self, k: Tensor, v: Tensor, spec: LayerSpec, context: Context, layer: int
    ) -> tuple[Tensor, Tensor]:
        """k and v (b t (k d)), as `k_proj` and `v_proj` give them, stored in the cache where there is one -> those that the queries meet (b k s d)."""
        k, v = self._heads(k, self.k_norm, context.table if spec.rope else None), self._heads(v)
        return (k, v) if context.cache is None else context.cache.extend(layer, k, v, context.slots)

    def mix(
        self, q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, context: Context, layer: int
    ) -> Tensor:
        """What the heads find, between the projections: q (b t (h d)), k and v (b t (k d)), as `q_proj`, `k_proj` and `v_proj` give them -> (b t (h d)), as `o_proj` takes it."""
        b, t, _ = q.shape
        q = self._heads(q, self.q_norm, context.table if spec.rope else None)
        k, v = self.remember(k, v, spec, context, layer)
        if not spec.rope and spec.window is None and context.scale is not None:
            scale = context.scale[:, None]  # (t 1) against q (b h t d)
            q = (
                q * (scale if self.s_scale is None else scale * self.s_scale[:, None, None])
            ).type_as(q)
        q_pos, k_pos = context.q_pos, context.k_pos and context.k_pos[spec.window]
        if context.weights is not None:
            positions = _positions(q, k, q_pos, k_pos)
            context.weights.append((attention_weights(q, k, spec.window, *positions), positions[1]))
        if spec.window not in context.masks:  # one query sees every key that its cache holds
            y = _sdpa(q, k, v, None)
        else:
            backend, mask = context.backends[spec.window], context.masks[spec.window]
            y = attend(q, k, v, spec.window, backend, q_pos, k_pos, mask)
        return (y if t == 1 else y.transpose(1, 2)).reshape(b, t, -1)

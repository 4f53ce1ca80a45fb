"""Attention with and without positions, full and windowed: the ideas of "Rope to Nope and Back
Again" (arXiv 2501.18795) in one file. Read it top to bottom:

    1. what a layer chooses         LayerSpec
    2. where positions enter        rotary_frequencies, rotary_table, rotate
    3. what a query sees            visible
    4. the sum                      attention_weights, kernel_for, attend
    5. the module                   Shared, Attention
    6. longer contexts              scaled_frequencies, length_scale; skip these at first

Faster ways to the same numbers stand in fast/. The letters, here and in every comment and einops
string of this repository:

    b  batch              h  query heads             d  head width
    t  query time         k  key/value heads         c  model width
    s  key time           v  vocabulary
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fast.cache import KVCache
from fast.kernels import banded, causal, flex, flex_mask, rotate_complex, sdpa

# 1. What a layer chooses --------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSpec:
    """A layer's two choices: are q and k rotated, and how many keys does a query see?"""

    rope: bool
    window: int | None = None  # keys, the query's own included; None is all


# 2. Where positions enter -------------------------------------------------------------------------


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """theta^(-2i/d), the radians per token of pair i: (d/2) float32 (RoPE, 2104.09864)."""
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_table(positions: Tensor, frequencies: Tensor, amplitude: float = 1.0) -> Tensor:
    """cos and sin of each pair's angle, (t d/2 2), from positions (t). In float32 whatever the
    model is in: bfloat16 cannot tell position 1,001 from 1,002."""
    angles = positions.float()[:, None] * frequencies.to(positions.device)
    table = torch.stack((angles.cos(), angles.sin()), dim=-1)
    return table if amplitude == 1 else table * amplitude


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """x (b h t d), each pair of dimensions (2i, 2i+1) turned by the angle of its position.

    A rotation keeps norms (YaRN's amplitude aside), and <rotate(q, m), rotate(k, n)> depends on
    m - n alone: distance. table (t d/2 2), or the same as complex numbers (t d/2).
    """
    if table.is_complex():
        return rotate_complex(x, table)  # the lines below as one product
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


# 3. What a query sees -----------------------------------------------------------------------------


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None = None) -> Tensor:
    """True where a query sees a key; elementwise, so that q_pos[:, None] and k_pos[None, :] give
    the (t s) mask.

    The one definition of causality and of a window (is_causal and flex's blocks repeat it):
    `window` keys, the query's own included. By this mask, and by what rotated layers below wrote, a
    layer without positions tells an order too. A key position of -1 is an empty slot of a cache.

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
    return seen if window is None else seen & (k_pos > q_pos - window)


def visible_pairs(length: int, window: int | None = None) -> int:
    """Pairs of query and key in a sequence of `length` tokens: the True entries of its mask."""
    w = length if window is None else min(window, length)
    return w * length - w * (w - 1) // 2


# 4. The sum ---------------------------------------------------------------------------------------


def attention_weights(q: Tensor, k: Tensor, window=None, q_pos=None, k_pos=None) -> Tensor:
    """softmax(q k^T / sqrt(d)) over the visible keys: q (b h t d), k (b k s d) -> (b h t s).

    q_pos (t) and k_pos (s) are absolute positions; without them both are 0, 1, 2, ... Raises
    ValueError where t != s and positions are missing.
    """
    check_positions(q, k, q_pos, k_pos)
    if q_pos is None:
        q_pos = k_pos = torch.arange(q.shape[2], device=q.device)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # h // k query heads share a key head
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible(q_pos[:, None], k_pos[None, :], window), -math.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).type_as(scores)


def reference(
    q: Tensor, k: Tensor, v: Tensor, window=None, q_pos=None, k_pos=None, collect=None
) -> Tensor:
    """The attention weights times v (b k s d) -> (b h t d). A list given as `collect` gets the
    weights, and k_pos as it was given."""
    weights = attention_weights(q, k, window, q_pos, k_pos)
    if collect is not None:
        collect.append((weights, k_pos))
    return weights @ v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)


Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (b h t d), k and v (b k s d) -> (b h t d)
BACKENDS = ("auto", "reference", "sdpa", "banded", "flex")


def kernel_for(
    window: int | None, t: int, device: torch.device, backend="auto", q_pos=None, k_pos=None
) -> Kernel:
    """Causal attention of t queries as a function of (q, k, v), for all layers of one window; the
    masks of sdpa and flex are made here, once. Positions as in `attention_weights`.

        reference   the lines above                                     tests, readers
        sdpa        PyTorch's fused kernel, a dense mask for a window   anywhere
        banded      queries in blocks, each with the keys it reaches    windows, on any device
        flex        compiled FlexAttention with a block mask            windows, on CUDA

    Raises ValueError where a backend cannot do what is asked.
    """
    if window is not None and window < 1:
        raise ValueError(f"window {window} sees nothing: a query sees itself, so use 1 or more")
    backend = choose_backend(backend, window, t, device, cached=q_pos is not None)
    if backend in ("banded", "flex") and q_pos is not None:
        raise ValueError(f"backend {backend!r} takes whole sequences: use 'sdpa' or 'reference'")
    if backend == "banded" and window is None:
        raise ValueError("backend 'banded' is for windows and this layer has none: use 'sdpa'")

    if backend == "reference":
        return partial(reference, window=window, q_pos=q_pos, k_pos=k_pos)
    if backend == "banded":
        return partial(banded, window=window, visible=visible)
    if backend == "flex":
        return partial(flex, mask=flex_mask(t, window, device, visible))
    if q_pos is None and (window is None or window >= t):
        return partial(causal, visible=visible)
    if q_pos is None:
        q_pos = k_pos = torch.arange(t, device=device)
    return partial(sdpa, mask=visible(q_pos[:, None], k_pos[None, :], window))


def choose_backend(
    backend: str, window: int | None, t: int, device: torch.device, cached=False, head_width=64
) -> str:
    """What "auto" means for t tokens; any other name is itself. ValueError for an unknown one."""
    one_of("backend", backend, BACKENDS)
    if backend != "auto":
        return backend
    if cached or window is None or t <= window:
        return "sdpa"
    if device.type == "cuda" and head_width >= 16:  # FlexAttention's kernels take no narrower heads
        return "flex"
    return "banded" if t >= 2 * window else "sdpa"  # below that there is little to skip


def attend(
    q: Tensor, k: Tensor, v: Tensor, window=None, backend="auto", q_pos=None, k_pos=None
) -> Tensor:
    """Causal attention of q (b h t d) over k and v (b k s d), k dividing h, -> (b h t d). Positions
    as in `attention_weights`, backends as in `kernel_for`, and their errors."""
    h, k_heads, t = q.shape[1], k.shape[1], q.shape[2]
    if h % k_heads:
        raise ValueError(f"{h} query heads cannot share {k_heads} key/value heads: use a divisor")
    check_positions(q, k, q_pos, k_pos)
    backend = choose_backend(backend, window, t, q.device, q_pos is not None, q.shape[3])
    return kernel_for(window, t, q.device, backend, q_pos, k_pos)(q, k, v)


def check_positions(q: Tensor, k: Tensor, q_pos: Tensor | None, k_pos: Tensor | None) -> None:
    """ValueError where to count from 0 would be a guess."""
    if (q_pos is None) != (k_pos is None) or (q_pos is None and q.shape[2] != k.shape[2]):
        raise ValueError(f"{q.shape[2]} queries over {k.shape[2]} keys: give both q_pos and k_pos")


# 5. The module ------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What the layers of one forward share, made once by the model."""

    table: Tensor  # for rotate: complex (t d/2), or real (t d/2 2) where it is compiled
    scale: Tensor | None  # length_scale of the queries (t), None for "none"
    attend: dict[int | None, Kernel]  # by window
    cache: KVCache | None  # None where nothing is kept for later tokens


class Attention(nn.Module):
    """Grouped-query attention without biases. It does not own its LayerSpec: how positions are
    treated is an argument, not a parameter."""

    def __init__(self, config):  # a ModelConfig
        super().__init__()
        self.head_dim = d = config.head_width
        self.qk_norm, self.ssmax = config.qk_norm, config.length_scale == "ssmax"
        self.q_proj = nn.Linear(config.d_model, config.n_head * d, bias=False)
        self.k_proj = nn.Linear(config.d_model, config.n_kv_head * d, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.n_kv_head * d, bias=False)
        self.o_proj = nn.Linear(config.n_head * d, config.d_model, bias=False)
        if self.qk_norm:  # over the head width, one gain (d) for all heads (paper, section 2)
            self.q_norm = nn.LayerNorm(d, config.norm_eps, bias=False)
            self.k_norm = nn.LayerNorm(d, config.norm_eps, bias=False)
        if self.ssmax:  # see length_scale; 1 / (the mean of ln n for n from 1 to 1,024)
            self.s_scale = nn.Parameter(torch.full((config.n_head,), 0.168))

    def forward(self, x: Tensor, spec: LayerSpec, shared: Shared, layer: int) -> Tensor:
        """x (b t c) -> (b t c)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.heads(q, k, v, spec, shared, layer))

    def heads(self, q: Tensor, k: Tensor, v: Tensor, spec: LayerSpec, shared, layer) -> Tensor:
        """Everything between the projections: q (b t (h d)), k and v (b t (k d)) -> (b t (h d))."""
        b, t, _ = q.shape
        q, k, v = (x.view(b, t, -1, self.head_dim) for x in (q, k, v))
        if self.qk_norm:  # before the rotation (paper, section 2)
            q, k = self.q_norm(q).type_as(q), self.k_norm(k).type_as(k)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (b h t d), (b k t d)

        if spec.rope:  # a RoPE layer is told where it is, a NoPE layer not (paper, section 4)
            q, k = rotate(q, shared.table), rotate(k, shared.table)

        if shared.cache is not None:  # these queries attend to earlier keys as well
            k, v = shared.cache.extend(layer, k, v)

        if shared.scale is not None and not spec.rope and spec.window is None:
            q = self.sharpen(q, shared.scale)

        y = shared.attend[spec.window](q, k, v)
        return y.transpose(1, 2).reshape(b, t, -1)

    def sharpen(self, q: Tensor, scale: Tensor) -> Tensor:
        """q (b h t d) times its length scale (t), with a learned factor for each head if any."""
        learned = self.s_scale[:, None, None] if self.ssmax else 1.0
        return (q * (scale[:, None] * learned)).type_as(q)


# 6. Longer contexts than trained: other frequencies, and scales of a NoPE layer's logits ----------

ROPE_SCALINGS = ("none", "pi", "ntk", "yarn")
LENGTH_SCALES = ("none", "swan", "llama4", "drope", "ssmax")


def scaled_frequencies(
    head_dim: int, theta: float, scaling: str = "none", factor: float = 1.0, original_length=None
) -> tuple[Tensor, float]:
    """Radians per token of each pair, (d/2) float32, and the amplitude of cos and sin (1 but for
    YaRN), for contexts `factor` times as long as the trained one, `original_length`.

    "pi" is position interpolation (2306.15595); "ntk" and "yarn" stand in 2309.00071. A raise of
    theta (paper, section 2) needs none of them. ValueError if unknown, or YaRN without length.
    """
    one_of("rope_scaling", scaling, ROPE_SCALINGS)
    if scaling == "ntk":  # stretches the slowest pair by the factor and leaves the fastest alone
        theta = theta * factor ** (head_dim / (head_dim - 2))
    frequencies = rotary_frequencies(head_dim, theta)
    if scaling == "pi":  # as if the positions stood closer together
        return frequencies / factor, 1.0
    if scaling != "yarn":
        return frequencies, 1.0
    if original_length is None:
        raise ValueError("rope_scaling 'yarn' needs rope_original_length, the trained length")

    def pair_turning(times: float) -> float:
        """The (fractional) pair that makes so many turns within the trained length."""
        turns = math.log(original_length / (2 * math.pi * times))
        return head_dim * turns / (2 * math.log(theta))

    # Pairs that turn often tell neighbours apart: keep them. Those that never finish a turn are
    # stretched as PI does, with a ramp between.
    low = max(math.floor(pair_turning(32)), 0)
    high = min(math.ceil(pair_turning(1)), head_dim - 1)
    high += 0.001 if low == high else 0
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    ramp = ((pairs - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, 0.1 * math.log(factor) + 1


def length_scale(kind: str, positions: Tensor, base: int | None) -> Tensor | None:
    """The factor on q of a full NoPE layer at `positions` (t): (t) float32, or None for "none".

    NoPE's softmax flattens as keys are added; these sharpen it again. `base` is the trained length
    (Llama 4's floor; DroPE's unit, 2512.12167; SWAN's a, 2504.08719: 362 of 1,024). "ssmax" gives
    ln n (2501.19399), times a learned s per head. ValueError for an unknown kind or no base.
    """
    one_of("length_scale", kind, LENGTH_SCALES)
    n = positions.float()
    if kind == "none":
        return None
    if kind == "ssmax":
        return torch.log((n + 1).clamp(min=2))
    if base is None or base < 2:
        raise ValueError(f"length_scale {kind!r} needs a trained length or length_base, not {base}")
    if kind == "swan":
        return torch.log(base + n) / math.log(base)
    if kind == "llama4":
        return 1 + 0.1 * torch.log(1 + torch.floor((n + 1) / base))
    return 1 + 0.412 * torch.log(((n + 1) / base).clamp(min=1))  # drope: 1 up to the trained length


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError where value is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown: use one of {', '.join(choices)}")

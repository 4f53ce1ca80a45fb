"""QK-Norm."""

import math

import torch
from torch import Tensor

from exercises.harness import Wrong, answer, name_of, points, same

FORBIDDEN = (
    "layer_norm LayerNorm native_layer_norm group_norm GroupNorm instance_norm batch_norm rms_norm "
    "RMSNorm BatchNorm1d BatchNorm2d BatchNorm3d InstanceNorm1d InstanceNorm2d InstanceNorm3d "
    "native_batch_norm native_group_norm"
).split()


def prepare_spec(x: Tensor, gain: Tensor, turn) -> Tensor:
    """x (b h t d): every head's vector normalised, times gain (d), then turned."""
    normed = torch.zeros(x.shape)
    d = x.shape[3]
    for b, h, t in torch.cartesian_prod(*map(torch.arange, x.shape[:3])).tolist():
        vector = x[b, h, t].tolist()
        mean = sum(vector) / d
        variance = sum((value - mean) ** 2 for value in vector) / d
        for i, value in enumerate(vector):
            normed[b, h, t, i] = (value - mean) / math.sqrt(variance + 1e-5) * float(gain[i])
    normed = normed.to(x.dtype)
    return normed if turn is None else turn(normed)


EPS = "epsilon is 1e-5, under the root beside the variance"


def norm(x: Tensor, dims=-1, eps: float = 1e-5, correction: int = 0) -> Tensor:
    variance = x.var(dims, keepdim=True, correction=correction)
    return (x - x.mean(dims, keepdim=True)) / (variance + eps).sqrt()


def near_misses(x: Tensor, gain: Tensor, turn) -> dict[str, Tensor]:
    """What known mistakes make of x, in float32."""
    turn = turn or (lambda y: y)
    mean, square = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    right = norm(x)
    over_heads = "over the head width alone: yours takes all heads of a token together"
    miss = {
        "QK-Norm comes before the rotation": norm(turn(x)) * gain,
        "QK-Norm comes before the rotation: yours turns before and after": turn(
            norm(turn(x)) * gain
        ),
        "the gain belongs to the norm: it comes before the rotation": turn(right) * gain,
        "`turn` is not called": right * gain,
        "`turn` is called twice": turn(turn(right * gain)),
        "LayerNorm takes the mean out: yours is RMSNorm": turn(x / (square + 1e-5).sqrt() * gain),
        "LayerNorm takes the mean out: yours only divides by the deviation": turn(
            x / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt() * gain
        ),
        "the mean is out, and the vector is not scaled": turn((x - mean) * gain),
        "divided by the variance, not by its root": turn(
            (x - mean) / (x.var(-1, keepdim=True, correction=0) + 1e-5) * gain
        ),
        "the variance of LayerNorm divides by n, not by n - 1": turn(norm(x, correction=1) * gain),
        "the length is made one: LayerNorm makes the variance one": turn(
            (x - mean) / (x - mean).norm(dim=-1, keepdim=True) * gain
        ),
        over_heads: turn(norm(x, (1, 3)) * gain),
        "over the head width: yours runs over heads": turn(norm(x, 1) * gain),
        "over the head width: yours runs over time": turn(norm(x, 2) * gain),
        "over the head width alone: yours takes all tokens of a head together": turn(
            norm(x, (2, 3)) * gain
        ),
        "no gain": turn(right),
        EPS: turn((x - mean) / (x.std(-1, keepdim=True, correction=0) + 1e-5) * gain),
        EPS + ".": turn(norm(x, eps=0) * gain),
        EPS + "..": turn(norm(x, eps=1e-6) * gain),
    }
    return {said: y for said, y in miss.items() if y.shape == x.shape and not y.isnan().all()}


@points(1)
def check_by_hand(mine):
    """One head of width 2: (3, 1) and (1, 3) become (1, -1) and (-1, 1)."""
    x, gain = torch.tensor([[[[3.0, 1.0], [1.0, 3.0]]]]), torch.ones(2)
    wanted = torch.tensor([[[[1.0, -1.0], [-1.0, 1.0]]]])
    near = near_misses(x, gain, None)
    got = mine.prepare(x.clone(), gain.clone(), None)
    same("(3, 1) and (1, 3)", got, wanted, near, tolerance=1e-4)  # epsilon is smaller


@points(2)
def check_specification(mine):
    """The specification's values without a rotation: three heads, a gain, small variances."""
    for shape, scale in (((2, 3, 5, 8), 1.0), ((1, 3, 4, 6), 2e-3), ((1, 2, 1, 16), 30.0)):
        x, gain = scale * torch.randn(shape) + 2 * scale, 0.5 + torch.rand(shape[-1])
        wanted, near = prepare_spec(x, gain, None), near_misses(x, gain, None)
        same(f"x of shape {shape}", mine.prepare(x.clone(), gain.clone(), None), wanted, near, 1e-4)


def turning(d: int):
    """A rotation of (b h t d) by each token's angles, in x's dtype."""
    angles = torch.randn(7, d // 2)

    def turn(x: Tensor) -> Tensor:
        if type(x) is not Tensor or x.ndim != 4 or x.shape[-1] != d:
            raise Wrong(f"`turn` takes x (b h t d); yours has the shape {tuple(x.shape)}")
        cos, sin = angles[: x.shape[2]].cos(), angles[: x.shape[2]].sin()
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
        return turned.flatten(-2).to(x.dtype)

    return turn


@points(3)
def check_order(mine):
    """With a rotation and a gain that is not constant: first the norm, then the rotation."""
    for shape in ((1, 3, 5, 8), (2, 2, 7, 4)):
        x, gain, turn = (
            torch.randn(shape) + 0.5,
            torch.linspace(0.5, 2, shape[-1]),
            turning(shape[-1]),
        )
        wanted, near = prepare_spec(x, gain, turn), near_misses(x, gain, turn)
        same("with a rotation", mine.prepare(x.clone(), gain.clone(), turn), wanted, near, 1e-4)


@points(1)
def check_precision(mine):
    """In bfloat16, of values near 1,000: mean and variance are float32; `turn` gets x's dtype."""
    turn, dtypes = turning(16), []

    def noted(x: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return turn(x)

    x, gain = (1000 + 8 * torch.randn(1, 2, 7, 16)).bfloat16(), 0.5 + torch.rand(16)
    for called in (None, noted):
        wide, turned = x.float(), None if called is None else turn
        exact, near = prepare_spec(wide, gain, turned), near_misses(wide, gain, turned)
        same("x in float32", mine.prepare(wide.clone(), gain.clone(), called), exact, near, 1e-3)
        got = mine.prepare(x.clone(), gain.clone(), called)
        same("x in bfloat16", got, exact.bfloat16(), tolerance=99)  # its type, shape and dtype
        # Rounding the norm, the gain's product and the rotation is wrong by .05 and less; a mean of
        # 1,000 in bfloat16 by up to 2, of which a deviation of 8 makes .25.
        if not (got.float() - exact).abs().max() < 0.08:
            raise Wrong("mean and variance were taken in bfloat16: near 1,000 it has steps of 4")
    if dtypes and dtypes[-1] != torch.bfloat16:
        raise Wrong(f"`turn` was given {name_of(dtypes[-1])}: it takes x's dtype")


@points(1)
def check_answer(mine):
    """What weight a query gives to the key that equals it, among 8,192."""
    hints = {
        0.0013: "that is 131,072",
        0.836: "that is without the norm, the query three times as long",
        1 / 8192: "that is uniform: the key that equals the query weighs more",
    }
    answer(mine.ANSWER, 0.0207, 0.001, hints)

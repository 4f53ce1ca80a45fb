"""Rotate a pair."""

import math

import torch
from torch import Tensor

from exercises.harness import Wrong, answer, points, same

NO_LOOPS = ("rotate",)


def rotate_spec(x: Tensor, angles: Tensor) -> Tensor:
    """x (b h t d) with dimensions 2i and 2i + 1 of token t turned by angles[t, i]."""
    turned = torch.zeros(x.shape)
    for b, h, t, i in torch.cartesian_prod(*map(torch.arange, (*x.shape[:3], x.shape[3] // 2))):
        first, second = float(x[b, h, t, 2 * i]), float(x[b, h, t, 2 * i + 1])
        cos, sin = math.cos(angles[t, i]), math.sin(angles[t, i])
        turned[b, h, t, 2 * i] = first * cos - second * sin
        turned[b, h, t, 2 * i + 1] = first * sin + second * cos
    return turned.to(x.dtype)


def near_misses(x: Tensor, angles: Tensor) -> dict[str, Tensor]:
    """What known mistakes make of x, in float32."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()

    def interleaved(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack((first, second), -1).flatten(-2)

    first, second = x.chunk(2, -1)  # Llama's convention in transformers
    halves = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    new = a * cos - b * sin
    miss = {
        "half-split rotation: you pair dimension i with i + d/2; here a pair is 2i and 2i + 1": (
            halves
        ),
        "turned the wrong way: from (1, 0) an angle of pi/2 leads to (0, 1)": interleaved(
            a * cos + b * sin, b * cos - a * sin
        ),
        "unzipped: the new pairs stand in two halves; interleave them (stack, then flatten)": (
            torch.cat((new, a * sin + b * cos), -1)
        ),
        "sine and cosine are exchanged": interleaved(a * sin - b * cos, a * cos + b * sin),
        "overwritten too early: the second of a pair was made from the new first": interleaved(
            new, new * sin + b * cos
        ),
    }
    for i in {0, angles.shape[1] - 1}:
        one = angles[:, i : i + 1]
        turned = interleaved(a * one.cos() - b * one.sin(), a * one.sin() + b * one.cos())
        miss[f"every pair turns by the angle of pair {i}: each has its own"] = turned
    return miss


@points(1)
def check_quarter_turn(mine):
    """By hand: one token, a pair turned by pi/2 and one by pi."""
    x, angles = torch.tensor([[[[3.0, 1.0, 5.0, 7.0]]]]), torch.tensor([[math.pi / 2, math.pi]])
    wanted = torch.tensor([[[[-1.0, 3.0, -5.0, -7.0]]]])
    same("(3, 1, 5, 7)", mine.rotate(x.clone(), angles), wanted, near_misses(x, angles))


@points(2)
def check_specification(mine):
    """The specification's values: several shapes, views that are not contiguous."""
    shapes = [(1, 1, 1, 2), (2, 3, 5, 8), (1, 2, 7, 4), (2, 2, 3, 6)]
    for b, h, t, d in shapes:
        angles = 3 * torch.randn(t, d // 2)
        for x in (torch.randn(b, h, t, d), torch.randn(b, t, h, d).transpose(1, 2)):
            wanted, near = rotate_spec(x, angles), near_misses(x, angles)
            same(f"x of shape {(b, h, t, d)}", mine.rotate(x, angles.clone()), wanted, near)


@points(1)
def check_untouched(mine):
    """x and the angles are as they were."""
    for x in (torch.randn(2, 2, 4, 6), torch.randn(2, 4, 2, 6).bfloat16().transpose(1, 2)):
        angles = torch.randn(4, 3)
        before = x.clone(), angles.clone()
        mine.rotate(x, angles)
        if not torch.equal(x, before[0]):
            raise Wrong("x itself was changed: make a new tensor")
        if not torch.equal(angles, before[1]):
            raise Wrong("the angles were changed: make new tensors")


@points(1)
def check_precision(mine):
    """In bfloat16, at angles near 1,000: only the result is rounded."""
    x, angles = torch.randn(2, 2, 16, 8).bfloat16(), 1000 + 9 * torch.randn(16, 4)
    wide = x.float()  # what is wrong there too
    near = near_misses(wide, angles)
    same("x in float32", mine.rotate(wide.clone(), angles), rotate_spec(wide, angles), near)
    exact = rotate_spec(x.double(), angles)
    got = mine.rotate(x.clone(), angles)
    same("x in bfloat16", got, exact.bfloat16(), tolerance=99)  # its type, shape and dtype
    # Rounding the exact value once is what torch does: values so near to the middle of two that
    # float32 takes the other are one in ten thousand. Rounding cosines, sines or products as well
    # changes every third and more.
    if (got != exact.bfloat16()).float().mean() > 0.03:
        raise Wrong(
            "rounded too early: bfloat16 has 8 significant bits, so angles, cosines and products "
            "stay in float32 and the result alone is rounded"
        )
    x, angles = torch.randn(1, 2, 3, 4).double(), torch.randn(3, 2)
    same("x in float64", mine.rotate(x.clone(), angles), rotate_spec(x, angles).double())


@points(1)
def check_answer(mine):
    """How many of the positions 0 .. 4095 bfloat16 holds."""
    hints = {
        256: "up to 256 it holds all of them; beyond, it still holds some",
        4096: "it has 8 significant bits, so 257 is already rounded",
        257: "0 to 256 are the first 257 of them; beyond, it still holds some",
    }
    answer(mine.ANSWER, 769, hints=hints)

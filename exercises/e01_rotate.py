"""1. Rotate a pair                                                    15 minutes, 6 points

Attention by itself does not know where a token stands. RoPE (section 2 of the paper) tells it by
turning q and k: dimensions 2i and 2i + 1 are a point in a plane, turned by an angle that grows
with the token's position. A turn keeps lengths, and the product of two turned vectors depends on
the difference of their angles alone: on distance.

        second                         first'  = first cos - second sin
          |  . (first', second')       second' = first sin + second cos
          | /  \\ angle
          |/____. (first, second)      x = ( 3, 1,   5, 7,  ..)
                     first                  pair 0  pair 1

Hint: x.unflatten(-1, (-1, 2)) has a pair in its last dimension. What else reads `x[..., 0::2]`?
"""

import math

import torch
from torch import Tensor


def rotate_spec(x: Tensor, angles: Tensor) -> Tensor:
    """x (b h t d) with dimensions 2i and 2i + 1 of token t turned by angles[t, i]."""
    turned = torch.zeros(x.shape)
    for b, h, t, i in torch.cartesian_prod(*map(torch.arange, (*x.shape[:3], x.shape[3] // 2))):
        first, second = float(x[b, h, t, 2 * i]), float(x[b, h, t, 2 * i + 1])
        cos, sin = math.cos(angles[t, i]), math.sin(angles[t, i])
        turned[b, h, t, 2 * i] = first * cos - second * sin
        turned[b, h, t, 2 * i + 1] = first * sin + second * cos
    return turned.to(x.dtype)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """The same without loops: x (b h t d), angles (t d/2) float32 -> (b h t d) in x's dtype.

    Sines, cosines and products are float32, whatever x is in; x itself stays as it is. About 4
    lines.
    """
    raise NotImplementedError


# Question: bfloat16 has 8 significant bits. How many of the positions 0 .. 4095 does it hold, each
# apart from the others? This is why angles are float32.    python -m exercises.e01_rotate
ANSWER = None


if __name__ == "__main__":
    positions = torch.arange(4096).bfloat16()
    print(
        "a quarter turn of (3, 1):",
        rotate(torch.tensor([[[[3.0, 1.0]]]]), torch.tensor([[1.5708]])),
    )
    print("different positions among 4096:", positions.unique().numel())

"""11. Extend a context                                                30 minutes, 12 points

A model with RoPE fails beyond the length that it was trained at: pairs that never went round meet
angles they have not seen. PI (position interpolation) divides every distance. NTK stretches the
slow pairs and leaves the fast ones, which tell neighbours apart, alone: it raises theta. In a
hybrid neither is needed (section 4): its NoPE layers retrieve, its RoPE layers see what is near.

        radians a token, factor 4      pair 0          ..        last pair
        none                           1                         theta^(-(d-2)/d)
        pi                             1/4             1/4       a quarter of it
        ntk                            1               between   a quarter of it

Hint: which power of the factor on theta divides the last pair by the factor? `layer_plan(config)`
gives a LayerSpec a layer, which has `.rope`.
"""

import math
from dataclasses import replace  # noqa: F401

import torch
from torch import Tensor

from model import layer_plan  # noqa: F401


def frequencies_spec(d: int, theta: float, method: str, factor: float) -> Tensor:
    """(d/2) float32, radians a token: "none" is RoPE; "pi" divides every distance by the factor;
    "ntk" raises theta so that the slowest pair turns slower by the factor, the fastest as ever."""
    if method == "ntk":
        theta = theta * math.pow(factor, d / (d - 2))
    turns = []
    for i in range(d // 2):
        turn = math.pow(theta, -2 * i / d)
        turns.append(turn / factor if method == "pi" else turn)
    return torch.tensor(turns)


def frequencies(d: int, theta: float, method: str, factor: float) -> Tensor:
    """The same by tensors: method is none, pi or ntk -> (d/2) float32. About 5 lines."""
    raise NotImplementedError


def extend(config, factor: float):
    """The ModelConfig for contexts `factor` times as long: NTK by the factor where every layer is
    rotated, the configuration as it is where any is not. About 3 lines.

    `replace(config, rope_scaling=..., rope_factor=...)` makes a changed copy.
    """
    raise NotImplementedError


# Question: by how much does NTK help your own R at 2,048 tokens, without training? Look also at
# what the same measurement says of late changes to rrrN: which of them would you see in the loss?
#     python -m exercises.e11_extend out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
ANSWER = None


if __name__ == "__main__":
    from exercises import measure

    measure.extension(extend)

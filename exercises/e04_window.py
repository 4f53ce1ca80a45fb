"""4. The sliding window                                               25 minutes, 10 points

A query of a windowed layer (section 5) sees its own key and those of the window - 1 tokens before
it. That makes a layer cheap and its cache small; what lies further back arrives through the layers
below.

        window = 3        q\\k 0 1 2 3 4 5        A cache holds keys in any order, so the mask is
                          0   x . . . . .        made of positions, not of rows and columns; a
                          1   x x . . . .        key position of -1 is an empty slot.
                          2   x x x . . .
                          3   . x x x . .
                          4   . . x x x .
                          5   . . . x x x

Hint: q_pos[:, None] and k_pos[None, :] compare every query with every key. For the field: which
inputs have a gradient? A LayerNorm keeps the sum of its output at zero.
"""

import torch
from torch import Tensor


def visible_spec(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """(t s) bool: does the query at q_pos[i] see the key at k_pos[j]?"""
    seen = torch.zeros(len(q_pos), len(k_pos), dtype=torch.bool)
    for i, query in enumerate(q_pos.tolist()):
        for j, key in enumerate(k_pos.tolist()):
            is_empty = key < 0
            is_near = window is None or query - key < window
            seen[i, j] = not is_empty and key <= query and is_near
    return seen


def visible(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """The same without loops: q_pos (t), k_pos (s) int64 -> (t s) bool. About 3 lines."""
    raise NotImplementedError


def receptive_field(last: Tensor, inputs: Tensor) -> int:
    """How many tokens the last one's output reaches over: from the earliest input that it depends
    on to itself, both counted, whatever holes there are between.

    last (c) was computed from inputs (1 t c), which require gradients. About 3 lines.
    """
    raise NotImplementedError


# Question: how far do three windowed layers of the laptop model reach, window 64? And how then does
# rrrN find a needle 8,000 tokens back?    python -m exercises.e04_window
ANSWER = None


if __name__ == "__main__":
    from model import ModelConfig, Transformer

    print(visible(torch.arange(6), torch.arange(6), 3).int())
    model = Transformer(ModelConfig(n_layer=3, pattern="r", window=64))
    layers: list[Tensor] = []
    hidden = model.hidden(torch.randint(2048, (1, 256)), layers=layers)
    layers[0].retain_grad()
    print("tokens in the receptive field:", receptive_field(hidden[0, -1], layers[0]))

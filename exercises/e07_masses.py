"""7. Where attention goes                                             25 minutes, 10 points

What does each layer do? The paper's section 3 hides a needle in a long text, asks for it at the
end, and adds up what the question's queries spend on four segments: the beginning (0), the needle
(1), the rest of the text (2), question and answer (3). Entropy says how far a row is spread: 0 bits
are one key, 3 bits are eight.

        segment   0 0 2 2 1 1 2 2 3 3        w (h t t), rows are queries
                                  |  \\
               these rows only ---+---         each row sums to one

Hint: w[:, segment == 3] are the question's rows. What is 0 log 0?
"""

import math

import torch
from torch import Tensor


def masses_spec(w: Tensor, segment: Tensor) -> Tensor:
    """(4,): what the queries of segment 3 spend on each segment, averaged over them and heads."""
    spent, rows = [0.0] * 4, 0
    for head in w:
        for query, row in enumerate(head.tolist()):
            if segment[query] == 3:
                rows += 1
                for key, weight in enumerate(row):
                    spent[int(segment[key])] += weight
    return torch.tensor([mass / rows for mass in spent])


def entropy_spec(w: Tensor, segment: Tensor) -> float:
    """Bits: minus the sum of p log2 p of a row, averaged over the queries of segment 3 and heads;
    0 log 0 is 0."""
    bits, rows = 0.0, 0
    for head in w:
        for query, row in enumerate(head.tolist()):
            if segment[query] == 3:
                rows += 1
                for p in row:
                    bits -= p * math.log2(p) if p > 0 else 0.0
    return bits / rows


def masses(w: Tensor, segment: Tensor) -> Tensor:
    """The same by tensors: w (h t t) float32, segment (t) int64 -> (4,) float32. About 3 lines."""
    raise NotImplementedError


def entropy(w: Tensor, segment: Tensor) -> float:
    """The same by tensors, in bits. About 3 lines."""
    raise NotImplementedError


# Question: which share does the NoPE layer of your own rrrN spend on the needle, at 2,048 tokens?
#     python -m exercises.e07_masses out/laptop-r64r64r64N-s1/last
ANSWER = None


if __name__ == "__main__":
    from exercises import measure

    measure.attention(masses, entropy)

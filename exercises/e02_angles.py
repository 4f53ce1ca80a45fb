"""2. Fast pairs, slow pairs                                           15 minutes, 6 points

By which angle? Pair i of a head turns theta^(-2i/d) radians a token (section 2): pair 0 goes round
every six tokens and tells neighbours apart, the last pairs hardly move in a paragraph. A larger
theta slows all but the first down: that is how a context is extended (sections 2, 4), and what it
costs is the question below.

        d = 8, theta = 10,000          position   pair 0   pair 1   pair 2   pair 3
                                           0         0        0        0        0
                                           1         1       .1       .01      .001
                                           2         2       .2       .02      .002

Hint: positions (t) as a column times frequencies (d/2) as a row are a table.
"""

import torch
from torch import Tensor


def angles_spec(positions: Tensor, d: int, theta: float) -> Tensor:
    """(t d/2) float32: what pair i of the token at positions[t] is turned by, in radians."""
    rows = []
    for position in positions.tolist():
        rows.append([position * theta ** (-2 * i / d) for i in range(d // 2)])
    return torch.tensor(rows)


def angles(positions: Tensor, d: int, theta: float) -> Tensor:
    """The same without loops: positions (t) int64 -> (t d/2) float32. About 2 lines."""
    raise NotImplementedError


# Question: a query that equals its key, n tokens away and of equal length in every pair, scores
# mean(cos(n w_i)) of what it scores on the spot. At which n is that below one half for the first
# time, for d = 128 and theta two million? And for 10,000? This is section 4's finding in two
# numbers: a raised theta blurs recency.
#     python -m exercises.e02_angles
ANSWER = None


if __name__ == "__main__":
    for theta in (10_000.0, 2_000_000.0):
        score = angles(torch.arange(2000), 128, theta).cos().mean(1)
        first = int((score < 0.5).nonzero()[0])
        print(f"theta {theta:>9,.0f}: below one half first at distance {first}")

"""3. Attention, written out                                           25 minutes, 8 points

A query scores every key that it may see, and softmax makes weights of the scores: positive, and one
in sum. Dividing by sqrt(d) keeps scores of random vectors near one, whatever the width. Several
query heads share one key head (grouped queries), which makes the cache smaller. No position is in
this: over equal tokens attention is uniform, which is all that NoPE starts with (section 4).

        scores  0   ln 3   (hidden)      query heads   0  1  2  3
        exp     1    3        0                        |  |  |  |
        weights 1/4  3/4      0          key heads     0  0  1  1       group = 2

Hint: k.repeat_interleave, masked_fill with -math.inf, softmax over the last dimension. Try scores
of 1,000, and q in bfloat16.
"""

import math

import torch
from torch import Tensor


def weights_spec(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """(b h t s): softmax(q k / sqrt(d)) over the keys that mask (t s) shows; query head h reads key
    head h // group, where group is the query heads to a key head."""
    (b, heads, t, d), (_, kv_heads, s, _) = q.shape, k.shape
    w = torch.zeros(b, heads, t, s)
    for row, head, i in torch.cartesian_prod(*map(torch.arange, (b, heads, t))).tolist():
        keys = k[row, head // (heads // kv_heads)].double()
        scores = {}
        for j in range(s):
            if mask[i, j]:
                scores[j] = float(q[row, head, i].double() @ keys[j]) / math.sqrt(d)
        largest = max(scores.values())
        total = sum(math.exp(score - largest) for score in scores.values())
        for j, score in scores.items():
            w[row, head, i, j] = math.exp(score - largest) / total
    return w.to(q.dtype)


def weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """The same without loops: q (b h t d), k (b k s d), mask (t s) bool -> (b h t s) in q's dtype.

    h is a multiple of k. The softmax is taken in float32, whatever q is in. Every query sees a key.
    About 4 lines.
    """
    raise NotImplementedError


# Question: how many bits of entropy has attention over 257 to 512 random keys of width 64, in the
# mean? 9 bits are uniform over 512, 0 is one key.    python -m exercises.e03_weights
ANSWER = None


if __name__ == "__main__":
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 512, 64)
    w = weights(q, k, torch.ones(512, 512, dtype=torch.bool).tril())[0, 0, 256:]
    print(
        f"entropy of the last 256 rows: {-(w * w.clamp(min=1e-30).log2()).sum(-1).mean():.2f} bits"
    )

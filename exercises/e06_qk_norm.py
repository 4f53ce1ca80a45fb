"""6. QK-Norm                                                          20 minutes, 8 points

Some models normalise q and k in every head before they are rotated (section 2): LayerNorm over the
head width with a gain. It keeps training calm, since the gain bounds every score; and so no
attention can be sharp in a long context, which is what the paper measures in section 3.

        x (b h t d)  ->  (x - mean) / sqrt(variance + 1e-5)  ->  times gain  ->  turn
                         each over the d numbers of one head

Hint: x.float() first, keepdim=True. torch's var divides by n - 1 unless it is told otherwise.
"""

import math

import torch
from torch import Tensor


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


def prepare(x: Tensor, gain: Tensor, turn) -> Tensor:
    """The same by tensors: x (b h t d), gain (d) -> (b h t d) in x's dtype.

    turn takes (b h t d) in x's dtype and returns it rotated; None in a NoPE layer. Mean and
    variance are float32, whatever x is in. Without torch's own norms. About 5 lines.
    """
    raise NotImplementedError


# Question: among 8,192 random normalised keys (d = 32, gain 1), what weight does a query give to
# the one that equals it? The paper's QK-Norm spends .0173 on a needle at 8k and .0004 at 128k.
#     python -m exercises.e06_qk_norm
ANSWER = None


if __name__ == "__main__":
    torch.manual_seed(0)
    for n in (8192, 131072):
        k = prepare(torch.randn(1, 1, n, 32), torch.ones(32), None)[0, 0]
        own = [(k[i] @ k.T / 32**0.5).softmax(-1)[i] for i in range(256)]
        print(
            f"a query's weight on the key that equals it, of {n:,}: {torch.stack(own).mean():.4f}"
        )
    k = torch.randn(8192, 32)
    own = [(3 * k[i] @ k.T / 32**0.5).softmax(-1)[i] for i in range(256)]
    print(f"without the norm, the query three times as long: {torch.stack(own).mean():.4f}")

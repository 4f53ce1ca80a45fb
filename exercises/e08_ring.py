"""8. A cache that forgets                                             50 minutes, 14 points

When a text is written token by token, keys and values of earlier tokens are kept. A windowed layer
(section 5) needs `window` of them and no more, so that its cache does not grow. It must give the
same attention for every way to cut a text into chunks: a prompt at once, then token by token, or in
chunks longer or shorter than the window.

        window 4, held 3 4 5 6, a chunk of three comes: 7 8 9
        query 7 needs   4 5 6 7             returned   4 5 6 7 8 9 with positions, in any order;
        query 9 needs         6 7 8 9       held then        6 7 8 9        more does no harm

Each chunk's queries see what was held before and the chunk itself, masked by the positions that you
return. Softmax does not mind the order of the keys.

Hint: return first, forget afterwards. A slice of a tensor keeps the whole tensor alive.
"""

import torch
from torch import Tensor


class Ring:
    """Keys and values of the last `window` tokens, and no more. About 15 lines."""

    def __init__(self, window: int):
        raise NotImplementedError

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next t tokens' k and v (b k t d) -> keys and values (b k s d) that their queries
        need, and the absolute positions (s) int64 of these, the first token's being 0.

        A position of -1 says that a place is empty. Between calls at most `window` tokens are kept.
        """
        raise NotImplementedError


# Question: what share of the cache of four full layers does rrrN hold at 8,192 tokens, window 64?
#     python -m exercises.e08_ring
ANSWER = None


if __name__ == "__main__":
    from exercises.harness import kept

    def held(windows: list[int], length: int = 8192, chunk: int = 512) -> int:
        """Bytes that a Ring a layer keeps of `length` tokens."""
        rings = [Ring(window) for window in windows]
        for _ in range(length // chunk):
            for ring in rings:
                ring.extend(torch.randn(1, 2, chunk, 32), torch.randn(1, 2, chunk, 32))
        return sum(kept(ring)[0] for ring in rings)

    hybrid, full = held([64, 64, 64, 8192]), held([8192] * 4)
    print(f"rrrN keeps {hybrid:,} bytes, RRRR {full:,}: {hybrid / full:.4f}")

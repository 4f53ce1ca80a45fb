"""5. A model is a pattern                                             25 minutes, 8 points

Each layer makes two choices that have nothing to do with each other: are q and k rotated, and how
far does a query see? A letter says both, and a pattern of letters, repeated over the layers, is a
model (sections 4 and 5). It also says what a model costs.

        R  rotated, sees all        N  not rotated, sees all        R     the RoPE baseline
        r  rotated, a window        n  not rotated, a window        rrrN  the paper's RNoPE-SWA

        rrrN in 8 layers: r r r N r r r N

Hint: with a window W the first W queries see 1, 2, .. W keys, and all others W.
"""


def pairs_spec(length: int, window: int | None) -> int:
    """How many pairs of query and key a layer computes: the True entries of its mask."""
    count = 0
    for query in range(length):
        for key in range(length):
            is_near = window is None or query - key < window
            count += key <= query and is_near
    return count


def plan(pattern: str, n_layer: int, window: int | None) -> list[tuple[bool, int | None]]:
    """(rotated, window) of each layer; a window of None sees all.

    ValueError that quotes the pattern for an unknown letter, for letters that do not tile n_layer,
    and for a small letter without a window. About 7 lines.
    """
    raise NotImplementedError


def pairs(length: int, window: int | None) -> int:
    """The specification's count by arithmetic. About 2 lines."""
    raise NotImplementedError


def cache_share(layers: list[tuple[bool, int | None]], length: int) -> float:
    """Tokens that the caches of a plan's layers hold of a text of `length`, over those that full
    layers hold. About 2 lines."""
    raise NotImplementedError


# Question: at 65,536 tokens, how many pairs does rrrN compute (window 4,096), over those of R?
#     python -m exercises.e05_pattern
ANSWER = None


if __name__ == "__main__":
    for length in (8192, 65536, 262144):
        layers = plan("rrrN", 4, 4096)
        share = sum(pairs(length, window) for _, window in layers) / (4 * pairs(length, None))
        print(f"{length:>7,} tokens: pairs {share:.3f}, cache {cache_share(layers, length):.3f}")

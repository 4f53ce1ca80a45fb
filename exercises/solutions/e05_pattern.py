def plan(pattern: str, n_layer: int, window: int | None) -> list[tuple[bool, int | None]]:
    if not pattern or set(pattern) - set("RrNn"):
        raise ValueError(f"pattern {pattern!r} has an unknown letter")
    if n_layer % len(pattern):
        raise ValueError(f"pattern {pattern!r} does not tile {n_layer} layers")
    if window is None and pattern != pattern.upper():
        raise ValueError(f"pattern {pattern!r} has a small letter and no window")
    letters = pattern * (n_layer // len(pattern))
    return [(letter in "Rr", window if letter.islower() else None) for letter in letters]


def pairs(length: int, window: int | None) -> int:
    w = length if window is None else min(window, length)
    return w * length - w * (w - 1) // 2


def cache_share(layers: list[tuple[bool, int | None]], length: int) -> float:
    held = [length if window is None else min(window, length) for _, window in layers]
    return sum(held) / (len(layers) * length)


ANSWER = 0.341

"""A model is a pattern."""

from exercises.harness import Wrong, answer, number, plain, points


def pairs_spec(length: int, window: int | None) -> int:
    """How many pairs of query and key a layer computes: the True entries of its mask."""
    count = 0
    for query in range(length):
        for key in range(length):
            is_near = window is None or query - key < window
            count += key <= query and is_near
    return count


def plan_of(pattern: str, n_layer: int, window: int | None) -> list[tuple[bool, int | None]]:
    letters = pattern * (n_layer // len(pattern))
    return [(letter in "Rr", window if letter in "rn" else None) for letter in letters]


def compare(mine, pattern: str, n_layer: int, window: int | None) -> None:
    got, wanted = mine.plan(pattern, n_layer, window), plan_of(pattern, n_layer, window)
    what = f"plan({pattern!r}, {n_layer}, {window})"
    plain(what, got, list)
    for i, layer in enumerate(got):
        plain(f"layer {i} of {what}", layer, tuple)
        if len(layer) != 2:
            raise Wrong(f"layer {i} of {what} is {layer}; it should be (rotated, window)")
        plain(f"whether layer {i} of {what} is rotated", layer[0], bool)
        plain(f"the window of layer {i} of {what}", layer[1], int, type(None))
    stretched = "".join(letter * (n_layer // len(pattern)) for letter in pattern)
    near = {
        "a capital sees all: its window is None": [(rotated, window) for rotated, _ in wanted],
        "a small letter sees a window: yours sees all": [(rotated, None) for rotated, _ in wanted],
        "R and r are rotated, N and n are not": [(not rotated, w) for rotated, w in wanted],
        "a capital sees all and a small letter a window: yours are exchanged": [
            (rotated, None if w is not None else window) for rotated, w in wanted
        ],
        "a pattern is repeated, its letters are not": plan_of(stretched, n_layer, window),
    }
    if got != wanted:
        for said, miss in near.items():
            if got == miss:
                raise Wrong(said)
        raise Wrong(f"{what} is {got}; it should be {wanted}")


@points(1)
def check_letters(mine):
    """Capital or small, rotated or not."""
    compare(mine, "RrNn", 4, 8)
    compare(mine, "R", 1, None)
    compare(mine, "RN", 2, 8)  # a window that no layer has
    compare(mine, "nNrR", 4, 16)


@points(1)
def check_tiles(mine):
    """A pattern is repeated over the layers."""
    for pattern, n_layer, window in (("rrrN", 8, 64), ("RN", 6, None), ("r", 3, 1), ("Nrr", 9, 4)):
        compare(mine, pattern, n_layer, window)


@points(2)
def check_refuses(mine):
    """What makes no model is a ValueError that quotes the pattern."""
    wrong = [
        ("rxN", 3, 8, "a letter other than R, r, N, n is no layer"),
        ("R-", 2, 8, "a letter other than R, r, N, n is no layer"),
        ("rrrN", 6, 8, "four letters do not tile six layers: nothing is cut off"),
        ("rrrN", 2, 8, "four letters do not tile two layers: nothing is cut off"),
        ("", 4, 8, "an empty pattern makes no layers"),
        ("rN", 2, None, "a small letter needs a window"),
        ("NNn", 3, None, "a small letter needs a window"),
    ]
    for pattern, n_layer, window, why in wrong:
        what = f"plan({pattern!r}, {n_layer}, {window})"
        try:
            got = mine.plan(pattern, n_layer, window)
        except ValueError as error:
            if pattern not in str(error):
                raise Wrong(f"{what}: the message, {str(error)!r}, does not quote the pattern")
        except (NotImplementedError, Wrong):
            raise
        except Exception as error:
            raise Wrong(f"{what} raises {type(error).__name__}; it should be ValueError: {why}")
        else:
            raise Wrong(f"{what} is {got}; it should be a ValueError: {why}")


@points(2)
def check_pairs(mine):
    """The count of the mask's entries, without making the mask."""
    sizes = [(7, 3), (7, 1), (5, 5), (5, 9), (6, None), (1, 1), (1, None), (40, 13), (12, 11)]
    for length, window in sizes:
        w, full = length if window is None else window, length * (length + 1) // 2
        near = {
            "no corner: the first window - 1 queries see fewer": w * length,
            "both triangles: a query does not see what comes after it": length * length,
            "the window does nothing": full,
            "a query sees itself too": pairs_spec(length, window) - length,
            "a window beyond the length sees no more than there is": w * length - w * (w - 1) // 2,
        }
        number(
            f"pairs({length}, {window})",
            mine.pairs(length, window),
            pairs_spec(length, window),
            near,
        )
    length, window = 8192, 4096
    exact = window * length - window * (window - 1) // 2
    number(f"pairs({length:,}, {window:,})", mine.pairs(length, window), exact)


@points(1)
def check_cache(mine):
    """The paper's cache at 8k, 64k and 256k, and a window that is longer than the text."""
    grown = "a layer cannot hold more than there is: a window may be longer than the text"
    hybrid = plan_of("rrrN", 8, 4096)
    for length, share in ((8192, 0.625), (65536, 0.296875), (262144, 0.26171875)):
        near = {"the full layers hold all of the text": 0.75 * 4096 / length}
        what = f"the share of rrrN, window 4,096, at {length:,}"
        number(what, mine.cache_share(list(hybrid), length), share, near)
    for layers, length, share in (
        (hybrid, 1024, 1.0),
        ([(True, 8), (False, 100), (True, None), (True, 16)], 32, (8 + 32 + 32 + 16) / 128),
        ([(False, None)], 10, 1.0),
    ):
        near = {grown: sum(w or length for _, w in layers) / (len(layers) * length)}
        got = mine.cache_share(list(layers), length)
        number(f"the share of windows {[w for _, w in layers]} at {length:,}", got, share, near)


@points(1)
def check_answer(mine):
    """What rrrN computes of what R computes."""
    hints = {
        0.812: "that is 8,192",
        2.93: "the other way round: R over rrrN",
        0.121: "that is one windowed layer",
    }
    answer(mine.ANSWER, 0.341, 0.002, hints)

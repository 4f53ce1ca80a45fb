"""The sliding window."""

import torch
import torch.nn.functional as F
from torch import Tensor

from exercises.harness import Wrong, answer, number, plain, points, same

NO_LOOPS = ("visible",)


def visible_spec(q_pos: Tensor, k_pos: Tensor, window: int | None) -> Tensor:
    """(t s) bool: does the query at q_pos[i] see the key at k_pos[j]?"""
    seen = torch.zeros(len(q_pos), len(k_pos), dtype=torch.bool)
    for i, query in enumerate(q_pos.tolist()):
        for j, key in enumerate(k_pos.tolist()):
            is_empty = key < 0
            is_near = window is None or query - key < window
            seen[i, j] = not is_empty and key <= query and is_near
    return seen


FUTURE = "sees the future: a key must not stand behind its query"
OFF = "window off by one: your query sees "


def near_misses(q_pos: Tensor, k_pos: Tensor, window: int | None) -> dict[str, Tensor]:
    q, k = q_pos[:, None], k_pos[None, :]
    past, there = k <= q, k >= 0
    i, j = torch.arange(len(q_pos))[:, None], torch.arange(len(k_pos))[None, :]
    top_left = "aligned to the top left: compare the positions that are given, not row and column"
    if window is None:
        return {
            FUTURE: there | past,
            FUTURE + ".": (k > q - len(k_pos)) & there,
            "a query sees itself too: its own key is not visible": (k < q) & there,
            "upside down: True means visible": ~(past & there),
            "rows are queries and columns keys: yours is transposed": (k >= q) & there,
            top_left: j <= i,
            top_left + ".": (j <= i) & there,
            "empty slots seen: a position of -1 is no key": past,
        }
    near = q - k < window
    return {
        OFF + "window + 1 keys; its own key is one of the window": past & there & (q - k <= window),
        OFF + "window - 1 keys; its own key is one of the window": past
        & there
        & (q - k < window - 1),
        FUTURE + ", window or not": near,
        FUTURE + ", window or not.": near & there,
        FUTURE + ": yours is a window to both sides": (q - k).abs() < window,
        FUTURE + ": yours is a window to both sides.": ((q - k).abs() < window) & there,
        "the window does nothing": past & there,
        "chunks, not a sliding window: every query looks back over its own last `window` keys": (
            past & there & (q // window == k // window)
        ),
        "empty slots seen: a position of -1 is no key": past & near,
        top_left: (j <= i) & (i - j < window),
        top_left + ".": (j <= i) & (i - j < window) & there,
        top_left + ": the causal half does": (j <= i) & near,
        top_left + ": the window does": past & (i - j < window),
        "upside down: True means visible": ~(past & there & near),
    }


def compare(mine, what: str, q_pos: Tensor, k_pos: Tensor, window: int | None) -> None:
    wanted, near = visible_spec(q_pos, k_pos, window), near_misses(q_pos, k_pos, window)
    same(f"{what}, window {window}", mine.visible(q_pos, k_pos, window), wanted, near)


@points(1)
def check_full(mine):
    """Without a window: every key up to the query's own."""
    for t in (6, 1):
        positions = torch.arange(t)
        compare(mine, f"{t} tokens", positions, positions.clone(), None)


@points(2)
def check_window(mine):
    """Windows of 1, 2, 3, 6 and 9 over six tokens."""
    for window in (3, 1, 2, 6, 9):
        compare(mine, "six tokens", torch.arange(6), torch.arange(6), window)


@points(2)
def check_cache(mine):
    """Under a cache: later queries, keys in any order, empty slots."""
    for window in (3, None):
        compare(
            mine, "queries 6 to 8 over keys 0 to 8", torch.arange(6, 9), torch.arange(9), window
        )
        order = torch.tensor([8, 5, 6, 7, 3])
        compare(mine, "keys in the order of a ring", torch.tensor([8]), order, window)
    for window in (8, None, 2):
        slots = torch.tensor([-1, 2, 0, 1, -1, 3])
        compare(mine, "slots -1, 2, 0, 1, -1, 3", torch.tensor([2, 3]), slots, window)
    far = 5000 + torch.randperm(12)
    compare(mine, "positions near 5,000", 5000 + torch.tensor([9, 2, 11]), far, 4)


@points(2)
def check_field(mine):
    """Layers of windows, with and without a norm at their end: 1 + layers (window - 1)."""
    for centred in (False, True):
        for layers, window in ((1, 3), (2, 4), (3, 5)):
            inputs, last = windowed(24, layers, window, centred)
            wanted = 1 + layers * (window - 1)
            near = {
                "the last token counts too: it is one of its field": wanted - 1,
                "one too many: from the earliest token that matters to the last one": wanted + 1,
                "the whole input: where the gradient is zero a token does not matter": 24,
            }
            number(
                f"{layers} layers of window {window}",
                field(mine, last, inputs, centred),
                wanted,
                near,
            )
    inputs, last = windowed(24, 2, 4, False)
    last = F.layer_norm(last, last.shape)
    number("2 layers of window 4 and a norm", field(mine, last, inputs, True), 7)


SUMMED = (
    "summed a normalised vector: a last LayerNorm keeps the sum of `last` at zero, so that its "
    "gradient says nothing; weigh its entries differently, by random numbers for example"
)


def field(mine, last: Tensor, inputs: Tensor, centred: bool) -> int:
    """The student's answer. A method that knew the same without a norm, and finds no gradient
    behind one, has summed."""
    try:
        got = mine.receptive_field(last, inputs)
    except (IndexError, RuntimeError, ValueError) as error:
        if centred and not isinstance(error, NotImplementedError):
            raise Wrong(SUMMED) from None
        raise
    plain("the receptive field", got, int)
    if centred and got in (0, 1, 24, 25):
        raise Wrong(SUMMED)
    return got


def windowed(t: int, layers: int, window: int, centred: bool) -> tuple[Tensor, Tensor]:
    """inputs (1 t c) and the last token (c) of layers that average `window` tokens. Gradients are
    .008 and more where they are not exactly zero; so is the sum of a centred vector's."""
    inputs = (1 + torch.rand(1, t, 8)).requires_grad_()
    positions, x = torch.arange(t), inputs
    mask = visible_spec(positions, positions, window).float()
    for _ in range(layers):
        x = mask / mask.sum(1, keepdim=True) @ x
    last = x[0, -1]
    return inputs, (last - last.mean()) * 4 if centred else last


WEAK = "a token that matters little matters: only where the gradient is zero it does not"
ENTRY = "looked at some entries of `last` only: any of them may reach farthest"


@points(1)
def check_holes(mine):
    """A field with holes reaches as far as its earliest token."""
    counted = (
        "counted the tokens that matter: a field reaches from the earliest of them to the last"
    )
    inputs = torch.rand(1, 12, 4).requires_grad_()
    number(
        "tokens 0, 4 and 8 back",
        mine.receptive_field(inputs[0, [11, 7, 3]].sum(0), inputs),
        9,
        {counted: 3},
    )
    inputs = torch.rand(1, 12, 4).requires_grad_()
    last = inputs[0, [7, 3]].sum(0)
    number("tokens 4 and 8 back", mine.receptive_field(last, inputs), 9)
    inputs = torch.rand(1, 12, 4).requires_grad_()
    last = inputs[0, 11] + inputs[0, 4, 1] - inputs[0, 4, 2]
    number("a difference of channels, 7 back", mine.receptive_field(last, inputs), 8)
    inputs = torch.rand(1, 20, 4).requires_grad_()
    x = inputs + inputs.roll(3, 1)
    x = x + x.roll(6, 1)
    number("two dilated layers", mine.receptive_field(x[0, -1], inputs), 10, {counted: 4})
    inputs = torch.rand(1, 12, 4).requires_grad_()
    last = inputs[0, 11] + 1e-5 * inputs[0, 5]
    number("a weak token, 6 back", mine.receptive_field(last, inputs), 7, {WEAK: 1})
    inputs = torch.rand(1, 12, 4).requires_grad_()
    last = torch.cat((inputs[0, 11, :2], inputs[0, 5, 2:3] - 1, inputs[0, 11, 3:]))
    number("one entry from 6 back", mine.receptive_field(last, inputs), 7, {ENTRY: 1})
    inputs = torch.rand(1, 17, 4).requires_grad_()
    number("a cumulative sum", mine.receptive_field(inputs.cumsum(1)[0, -1], inputs), 17)


@points(2)
def check_answer(mine):
    """How far three windowed layers reach."""
    hints = {
        193: "a window of 64 is its own key and 63 back",
        192: "three times 64 counts each layer's own key again: a layer adds 63",
        189: "the last token is one of its own field",
        64: "that is one layer",
    }
    given = mine.ANSWER
    if type(given) in (int, float) and given in hints:
        raise Wrong(f"ANSWER = {given}: {hints[given]}")
    answer(given, 190)

"""A window that costs less (bonus)."""

import math

import torch
from torch import Tensor

from exercises.harness import Wrong, points, same


def banded_spec(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """(b h t d): causal attention of q, k, v (b h t d) over the last `window` keys, a query at a
    time."""
    y = torch.zeros_like(v)
    for i in range(q.shape[2]):
        first = max(0, i - window + 1)
        near = slice(first, i + 1)
        scores = q[:, :, i : i + 1] @ k[:, :, near].transpose(-1, -2) / math.sqrt(q.shape[3])
        y[:, :, i : i + 1] = scores.softmax(-1) @ v[:, :, near]
    return y


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[3])
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


def near_misses(q: Tensor, k: Tensor, v: Tensor, window: int) -> dict[str, Tensor]:
    t = q.shape[2]
    i, j = torch.arange(t)[:, None], torch.arange(t)[None, :]
    causal, padding = j <= i, torch.zeros_like(k[:, :, :1]).expand(*k.shape[:2], window, k.shape[3])
    scores = (q @ torch.cat((padding, k), 2).transpose(-1, -2)) / math.sqrt(q.shape[3])
    behind = i + window - torch.arange(t + window)
    scores = scores.masked_fill(~((behind >= 0) & (behind < window)), -math.inf)
    all_values = torch.cat((padding, v), 2)
    return {
        "a window reaches into the block before": dense(
            q, k, v, causal & (i // window == j // window)
        ),
        "window off by one: your query sees window + 1 keys": dense(
            q, k, v, causal & (i - j <= window)
        ),
        "the window does nothing": dense(q, k, v, causal),
        "two whole blocks: within them a window is still `window` keys": dense(
            q, k, v, causal & (i // window - j // window < 2)
        ),
        "padding seen: keys before the first token are none": scores.softmax(-1) @ all_values,
        "not divided by sqrt(d)": dense(q * math.sqrt(q.shape[3]), k, v, causal & (i - j < window)),
    }


def inputs(t: int, d: int = 8, b: int = 1, h: int = 1) -> tuple[Tensor, ...]:
    return tuple(torch.randn(3, b, h, t, d).unbind(0))


@points(1)
def check_future(mine):
    """What comes later changes nothing before it."""
    for t, window in ((16, 4), (12, 4)):
        q, k, v = inputs(t)
        before = mine.banded(q.clone(), k.clone(), v.clone(), window)
        k[:, :, -3:] += 5
        v[:, :, -3:] -= 5
        after = mine.banded(q, k, v, window)
        said = "sees the future: late keys change early queries; does a roll wrap around?"
        if type(before) is not Tensor or type(after) is not Tensor or before.shape != q.shape:
            continue  # the next check says so
        if not before.isfinite().all():
            continue
        if not (after[:, :, : t - 3] - before[:, :, : t - 3]).abs().max() < 1e-5:
            raise Wrong(said)


@points(4)
def check_specification(mine):
    """The specification's values: lengths that are no multiple of the window, and shorter ones."""
    for t, window, b, h in (
        (16, 4, 1, 2),
        (13, 4, 2, 1),
        (3, 4, 1, 1),
        (9, 4, 1, 3),
        (13, 1, 1, 1),
        (16, 1, 2, 2),
        (1, 4, 1, 1),
        (10, 3, 1, 1),
        (7, 7, 1, 1),
    ):
        q, k, v = inputs(t, 6 + h, b, h)
        k[:, :, t // 2] = 0  # a key of zeros is a key
        wanted, near = banded_spec(q, k, v, window), near_misses(q, k, v, window)
        got = mine.banded(q.clone(), k.clone(), v.clone(), window)
        same(f"{t} tokens, window {window}", got, wanted, near)


def cost(run) -> tuple[int, int, int]:
    """What a call multiplies and adds in matrix products, how many numbers all else writes, and how
    many operations it takes."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Written(TorchDispatchMode):
        """Numbers that operations write which are neither views nor matrix products."""

        numbers = products = calls = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            out = operation(*args, **(kwargs or {}))
            self.calls += 1
            name = operation.overloadpacket.__name__
            outs = [x for x in (out if isinstance(out, tuple | list) else [out])]
            if "scaled_dot_product" in name:  # not all of its forms are in torch's table
                (b, h, t, d), s = args[0].shape, args[1].shape[2]
                self.products += 4 * b * h * t * s * d
            elif not operation.is_view:
                self.numbers += sum(x.numel() for x in outs if isinstance(x, Tensor))
            return out

    with FlopCounterMode(display=False) as products, Written() as written:
        run()
    counted = products.get_flop_counts().get("Global", {})
    fused = sum(n for operation, n in counted.items() if "scaled_dot_product" in str(operation))
    return products.get_total_flops() - fused + written.products, written.numbers, written.calls


@points(5)
def check_cost(mine):
    """At 512 tokens with a window of 32: three times the visible pairs' products at most."""
    t, window, d = 512, 32, 8
    q, k, v = inputs(t, d)
    got = mine.banded(q.clone(), k.clone(), v.clone(), window)
    same("512 tokens, window 32", got, banded_spec(q, k, v, window), tolerance=1e-4)
    with torch.no_grad():
        products, numbers, calls = cost(lambda: mine.banded(q, k, v, window))
    visible = 4 * d * (window * t - window * (window - 1) // 2)
    full, said = 4 * d * t * t, "right, and as expensive as full attention"
    counted = f"{products / 1e6:.2f} M operations, the visible pairs' are {visible / 1e6:.2f} M"
    if products > full / 2:
        raise Wrong(f"{said}: {counted}")
    if numbers > t * t * d:
        raise Wrong(f"{said}: it writes {numbers / 1e6:.1f} M numbers on its way")
    if calls > 2 * t:
        raise Wrong(
            f"right, and {calls:,} small operations: take all blocks at once, not query by query"
        )
    if products > 3 * visible:
        raise Wrong(f"right, and more expensive than three times the visible pairs: {counted}")

"""Attention, written out."""

import math

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from exercises.harness import Wrong, answer, points, same

NO_LOOPS = ("weights",)
FORBIDDEN = (
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "MultiheadAttention",
)


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


UPSIDE = "True means visible: your mask is upside down"
NAN = (
    "nan, where every key is seen. True means visible: a mask upside down hides whole rows; and "
    "0 times infinity is nan: masked_fill the scores"
)
TILED = "query head h reads key head h // group: heads that share a key head stand side by side"


def softmax(scores: Tensor, mask: Tensor, dim: int = -1) -> Tensor:
    return scores.masked_fill(~mask, -math.inf).softmax(dim)


def near_misses(q: Tensor, k: Tensor, mask: Tensor) -> dict[str, Tensor]:
    d, group = q.shape[-1], q.shape[1] // k.shape[1]
    shared = k.repeat_interleave(group, 1)
    dots = q @ shared.transpose(-1, -2)
    scores = dots / math.sqrt(d)
    tiled = q @ k.repeat(1, group, 1, 1).transpose(-1, -2) / math.sqrt(d)
    zeros = scores.masked_fill(~mask, 0)
    return {
        "not divided by sqrt(d)": softmax(dots, mask),
        "divided by d, not by its root": softmax(dots / d, mask),
        "times sqrt(d), not divided by it": softmax(dots * math.sqrt(d), mask),
        "over the keys of a query: your softmax runs over the queries of a key": softmax(
            scores, mask, -2
        ),
        "these are scores: softmax is missing": scores,
        "over the keys of a query: your softmax runs over the heads": softmax(scores, mask, 1),
        UPSIDE: softmax(scores, ~mask),
        UPSIDE + ".": scores.masked_fill(mask, -1e9).softmax(-1),
        UPSIDE + "..": scores.softmax(-1) * ~mask,
        "rows no longer sum to one: mask the scores, before the softmax": scores.softmax(-1) * mask,
        "a score of zero is not invisible: exp(0) is 1; minus infinity is": zeros.softmax(-1),
        "the mask does nothing": scores.softmax(-1),
        TILED: softmax(tiled, mask),
    }


def compare(mine, what: str, q: Tensor, k: Tensor, mask: Tensor) -> None:
    wanted, near = weights_spec(q, k, mask), near_misses(q, k, mask)
    same(what, mine.weights(q.clone(), k.clone(), mask.clone()), wanted, near)


@points(1)
def check_two_keys(mine):
    """By hand: scores 0 and ln 3 are weights 1/4 and 3/4."""
    q = torch.tensor([[[[0.0, 1.0, 0.0, 0.0]]]])
    k = torch.tensor([[[[5.0, 0.0, 0.0, 0.0], [0.0, 2 * math.log(3), 0.0, 0.0]]]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    got = mine.weights(q.clone(), k.clone(), mask.clone())
    wanted = torch.tensor([[[[0.25, 0.75]]]])
    if type(got) is Tensor and got.shape == wanted.shape and got.isnan().any():
        raise Wrong(NAN)
    same("scores of 0 and ln 3", got, wanted, near_misses(q, k, mask))


@points(2)
def check_rows(mine):
    """Under a causal mask rows sum to one, and what is hidden weighs nothing; over equal tokens
    attention without positions is uniform (the paper's NoPE)."""
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    q, k = torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)
    near = near_misses(q, k, mask)
    got = mine.weights(q.clone(), k.clone(), mask.clone())
    same("weights under a causal mask", got, weights_spec(q, k, mask), near)
    if (got * ~mask).count_nonzero():
        raise Wrong(f"hidden keys weigh up to {(got * ~mask).abs().max():.2g}: they weigh nothing")
    q, k = torch.randn(1, 1, 1, 4).expand(1, 1, 5, 4), torch.randn(1, 1, 1, 4).expand(1, 1, 5, 4)
    uniform = mask / torch.arange(1, 6)[:, None]
    same(
        "weights of equal tokens",
        mine.weights(q.clone(), k.clone(), mask.clone()),
        uniform[None, None],
    )


@points(2)
def check_specification(mine):
    """The specification's values: grouped heads, a window, queries that continue a cache."""
    for b, heads, kv_heads, t, s, window in (
        (1, 4, 2, 6, 6, 3),
        (2, 6, 2, 3, 7, 4),
        (1, 3, 1, 4, 4, 9),
    ):
        q, k = torch.randn(b, heads, t, 8), torch.randn(b, kv_heads, s, 8)
        distance = torch.arange(s - t, s)[:, None] - torch.arange(s)
        mask = (distance >= 0) & (distance < window)
        compare(mine, f"{heads} query heads on {kv_heads} key heads", q, k, mask)


@points(1)
def check_large(mine):
    """Scores of 1,000, seen or hidden."""
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    compare(mine, "small scores", *torch.randn(2, 1, 1, 4, 4), mask)
    for scale in (1.0, -1.0):
        q, k = torch.full((1, 1, 4, 4), 10.0), torch.randn(1, 1, 4, 4)
        k[0, 0, :, 0] = (
            torch.tensor([1.0, 30.0, 199.0, 201.0])
            if scale > 0
            else -torch.tensor([201.0, 199.0, 30.0, 1.0])
        )
        wanted = weights_spec(q, k, mask)
        got = mine.weights(q.clone(), k.clone(), mask)
        if type(got) is Tensor and not got.isfinite().all():
            raise Wrong("exp overflows at scores of 1,000: subtract the row's maximum first")
        same("scores of 1,000", got, wanted, tolerance=1e-3)
    q, k = torch.full((1, 1, 2, 4), 100.0), torch.tensor([-400.0, 400.0])[None, None, :, None]
    weak = "hidden by a number that a score may lie below: minus infinity is below all"
    wanted = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    near = {weak: torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]])}
    got = mine.weights(q, k.expand(1, 1, 2, 4).clone(), mask[:2, :2])
    same("one visible score, of -80,000", got, wanted, near)


class Exponentials(TorchFunctionMode):
    """Notes in which dtypes exponentials are taken."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in ("softmax", "exp", "exp_", "exp2", "log_softmax"):
            asked = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.dtype)]
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            self.dtypes.update(asked or [x.dtype for x in tensors])
        return function(*args, **kwargs)


@points(1)
def check_precision(mine):
    """bfloat16 comes in and goes out; the softmax is float32."""
    said = "the softmax is rounded to bfloat16 on its way: take it of float32, then round"
    # Whole numbers: these scores are exact in bfloat16, so that the softmax alone is looked at.
    q, k = (torch.randint(-3, 4, (1, 2, n, 16)).bfloat16() for n in (12, 40))
    mask = torch.rand(12, 40) < 0.8
    mask[:, 0] = True
    compare(mine, "the same in float32", q.float(), k.float(), mask)  # what is wrong there too
    exact = weights_spec(q.double(), k.double(), mask)
    with Exponentials() as taken:
        got = mine.weights(q.clone(), k.clone(), mask)
    same("q and k in bfloat16", got, exact.bfloat16(), tolerance=2)  # its type, shape and dtype
    if {torch.bfloat16, torch.float16} & taken.dtypes:
        raise Wrong(said)
    # Rounded once a value is wrong by 2^-8 at most; rounded in between, by several times that.
    if (got.double() - exact).abs().gt(2**-8 * exact.double() + 1e-6).any():
        raise Wrong(said)


@points(1)
def check_answer(mine):
    """Bits of attention over 257 to 512 random keys."""
    hints = {
        1.18: "that is without the scale: attention is nearly one-hot",
        8.55: "that is divided by d: attention is nearly uniform",
        5.45: "those are nats: divide by ln 2",
    }
    answer(mine.ANSWER, 7.86, 0.1, hints)

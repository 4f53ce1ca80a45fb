"""Where attention goes."""

import math

import torch
from torch import Tensor

from exercises.harness import answer, number, points, same

# The needle mass of the NoPE layer at 2,048 tokens. Seeds 1 to 3 of `python train.py`: .26, .56,
# .47; three of an older recipe .38, .40, .39.
BAND = (0.1, 0.95)


def masses_spec(w: Tensor, segment: Tensor) -> Tensor:
    """(4,): what the queries of segment 3 spend on each segment, averaged over them and heads."""
    spent, rows = [0.0] * 4, 0
    for head in w:
        for query, row in enumerate(head.tolist()):
            if segment[query] == 3:
                rows += 1
                for key, weight in enumerate(row):
                    spent[int(segment[key])] += weight
    return torch.tensor([mass / rows for mass in spent])


def entropy_spec(w: Tensor, segment: Tensor) -> float:
    """Bits: minus the sum of p log2 p of a row, averaged over the queries of segment 3 and heads;
    0 log 0 is 0."""
    bits, rows = 0.0, 0
    for head in w:
        for query, row in enumerate(head.tolist()):
            if segment[query] == 3:
                rows += 1
                for p in row:
                    bits -= p * math.log2(p) if p > 0 else 0.0
    return bits / rows


def near_masses(w: Tensor, segment: Tensor) -> dict[str, Tensor]:
    asked, kinds = segment == 3, segment == torch.arange(4)[:, None]
    spent = (w[:, asked] @ kinds.float().T).mean(1)  # (h 4)
    everyone = (w @ kinds.float().T).mean((0, 1))
    received = (w.transpose(1, 2)[:, asked] @ kinds.float().T).mean((0, 1))
    return {
        "the question's queries only: those of segment 3": everyone,
        "a mass is a sum over keys: yours is their mean": spent.mean(0) / kinds.sum(1),
        "rows are queries: yours is attention received": received,
        "average over heads: yours are added": spent.sum(0),
        "average over heads: yours is the first": spent[0],
        "average over the queries: yours are added": spent.mean(0) * asked.sum(),
        "average over queries and heads: yours are added": spent.sum(0) * asked.sum(),
        "average over the queries: yours is the last": (w[:, asked][:, -1] @ kinds.float().T).mean(
            0
        ),
    }


def entropies(w: Tensor) -> Tensor:
    return -(w * w.clamp(min=1e-30).log2()).sum(-1)


def near_entropies(w: Tensor, segment: Tensor) -> dict[str, float]:
    rows = w[:, segment == 3]
    bits = entropies(rows)
    mean = "average the entropies, not the weights"
    miss = {
        "entropy in nats: log2 gives bits": bits.mean() * math.log(2),
        "minus the sum: entropy is not negative": -bits.mean(),
        mean: entropies(rows.mean((0, 1))),
        mean + " of heads": entropies(rows.mean(0)).mean(),
        mean + " of queries": entropies(rows.mean(1)).mean(),
        "the question's queries only: those of segment 3": entropies(w).mean(),
        "average over heads: yours are added": bits.mean(1).sum(),
        "average over queries and heads: yours are added": bits.sum(),
        "a sum over keys: yours is their mean": bits.mean() / w.shape[-1],
    }
    nan = {"0 log 0 is 0: yours is nan, no number, since log 0 is minus infinity": math.nan}
    return nan | {said: float(value) for said, value in miss.items()}


def compare(mine, what: str, w: Tensor, segment: Tensor) -> None:
    got = mine.masses(w.clone(), segment.clone())
    same(f"masses of {what}", got, masses_spec(w, segment), near_masses(w, segment))


def compare_bits(mine, what: str, w: Tensor, segment: Tensor) -> None:
    got = mine.entropy(w.clone(), segment.clone())
    wanted = entropy_spec(w, segment)
    number(f"the entropy of {what}", got, wanted, near_entropies(w, segment), 1e-4)


def causal(h: int, t: int) -> Tensor:
    """Random attention weights (h t t) under a causal mask."""
    scores = 2 * torch.randn(h, t, t)
    return scores.masked_fill(~torch.ones(t, t, dtype=torch.bool).tril(), -math.inf).softmax(-1)


@points(2)
def check_by_hand(mine):
    """One head, five tokens, two of them the question's."""
    w = torch.tensor(
        [
            [
                [1.0, 0.0, 0.0, 0.0, 0.0],
                [0.5, 0.5, 0.0, 0.0, 0.0],
                [0.2, 0.3, 0.5, 0.0, 0.0],
                [0.1, 0.4, 0.3, 0.2, 0.0],
                [0.1, 0.6, 0.1, 0.1, 0.1],
            ]
        ]
    )
    segment = torch.tensor([0, 1, 1, 3, 3])
    wanted = torch.tensor([0.1, 0.7, 0.0, 0.2])
    same("masses", mine.masses(w.clone(), segment.clone()), wanted, near_masses(w, segment))


@points(1)
def check_one(mine):
    """Three heads: the four masses sum to one."""
    w, segment = causal(3, 9), torch.tensor([0, 0, 2, 1, 1, 2, 2, 3, 3])
    compare(mine, "three heads", w, segment)


@points(2)
def check_bits(mine):
    """A row that is uniform over eight keys has three bits."""
    for h in (1, 2):
        w, segment = torch.full((h, 8, 8), 1 / 8), torch.tensor([0, 1, 1, 2, 2, 2, 2, 3])
        compare_bits(mine, "uniform rows over eight", w, segment)


@points(1)
def check_zeros(mine):
    """A row that is all on one key has none, and is a number."""
    w, segment = torch.eye(5)[None], torch.tensor([0, 1, 2, 2, 3])
    compare_bits(mine, "one-hot rows", w, segment)


@points(2)
def check_specification(mine):
    """Both specifications' values: segments in any order, one that is empty."""
    for h, t in ((2, 12), (4, 7), (1, 20)):
        w, segment = causal(h, t), torch.randint(4, (t,))
        segment[torch.randperm(t)[:2]] = 3
        compare(mine, f"{h} heads of {t} tokens", w, segment)
        compare_bits(mine, f"{h} heads of {t} tokens", w, segment)
    w, segment = causal(2, 6), torch.tensor([0, 2, 2, 3, 2, 3])
    compare(mine, "a text without a needle", w, segment)
    compare_bits(mine, "a text without a needle", w, segment)


@points(2)
def check_answer(mine):
    """The needle mass of your own rrrN's NoPE layer at 2,048."""
    hints = {0.0: "that is a RoPE layer: the needle lies outside of its window"}
    answer(mine.ANSWER, BAND, hints=hints)

"""Where attention goes: the paper's masses and entropy (section 3), a density over positions, a map
of heads, and logits by distance.

    python -m lab.attention_mass CHECKPOINT --lengths 512 2048 32768 --examples 32

A single needle lies in the middle of real text; the queries are those of the question and its
answer ("qc"), and the keys fall into four segments: the first ten tokens, the needle, the question
and answer, and all else. Averages are over those queries, heads and layers; in a hybrid over the
RoPE and the NoPE layers apart too. Logits are those of the context's keys in the last layer that
sees all, by the octave of their distance: a NoPE layer that learned to read distance from windows
below it (2609.38109) falls with it. Writes OUT.csv, OUT-heads.csv and OUT.png.
"""

import math
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from attention import visible
from commandline import guarded
from data.needles import QC, Example, Needles
from engine import fill
from evaluate import mean_and_error
from lab import report
from lab.needles import cell_examples
from lab.report import grouped
from model import Transformer

SEGMENTS = ("begin", "needle", "context", "qc")  # in the order of data.needles
COLUMNS = (*SEGMENTS, "recent", "entropy", "entropy_share")
RECENT = 32  # nearest keys, the query's own included: what a head of recency reads
# The density leaves out the first 10 tokens and the last 3%, as the paper's does.
BINS, FIRST, LAST = 40, 10, 0.97
OCTAVES = 18  # of distance, in tokens: 1, 2 to 3, 4 to 7, ...
FROM = 5  # the octave, of 32 to 63 tokens, from which on every query of a question has keys


class Mass(NamedTuple):
    """What one checkpoint's queries spend at one length; the four masses sum to 1."""

    checkpoint: str
    length: int  # tokens
    layers: str  # all, RoPE, NoPE
    examples: int
    begin: float
    needle: float
    context: float
    qc: float
    needle_error: float  # standard error over examples
    recent: float  # on the RECENT nearest keys
    entropy: float  # bits
    entropy_share: float  # divided by log2 of the keys that a query sees
    logit_slope: float  # nats a doubling of the distance; nan where no such layer sees all


class Head(NamedTuple):
    """One head at one length: what tells a head that retrieves from one that attends nearby."""

    checkpoint: str
    length: int
    layer: int  # from 0
    head: int
    position: str  # RoPE, NoPE
    window: int | None
    needle: float
    recent: float


def spent(
    weights: Tensor, q_pos: Tensor, k_pos: Tensor, segment: Tensor, window: int | None
) -> dict[str, Tensor]:
    """What attention weights (h t s) are spent on, averaged over the t queries: (h) for each of
    COLUMNS, entropy in bits; (BINS) for "density", averaged over heads too: weight per key of a
    stretch of the context, times all its keys, so that an even spread is 1; (OCTAVES) for "logits":
    of the context's keys, less each query's mean of these. segment (n) says of each of the n
    positions what lies there."""
    w, shares = weights.double(), {}
    kinds = segment[k_pos.clamp(min=0)]  # an empty slot has no weight
    for kind, name in enumerate(SEGMENTS):
        shares[name] = (w * (kinds == kind)).sum(-1).mean(1)
    shares["recent"] = (w * (q_pos[:, None] - k_pos < RECENT)).sum(-1).mean(1)
    entropy = -torch.xlogy(w, w).sum(-1) / math.log(2)
    seen = visible(q_pos[:, None], k_pos, window)
    shares["entropy"] = entropy.mean(1)
    shares["entropy_share"] = (entropy / seen.sum(-1).clamp(min=2).log2()).mean(1)

    of = seen & (kinds == SEGMENTS.index("context"))  # (t s): what the octaves count
    logits = w.clamp(min=1e-30).log()  # softmax leaves them but for a constant of each query
    logits = (logits - (logits * of).sum(-1, keepdim=True) / of.sum(-1, keepdim=True)).mean(0)
    octave = (q_pos[:, None] - k_pos).clamp(min=1).log2().long().clamp(max=OCTAVES - 1)
    sums = [w.new_zeros(OCTAVES).index_add(0, octave[of], x[of]) for x in (logits, of.double())]
    shares["logits"] = sums[0] / sums[1]  # nan where no key is

    length, end = len(segment), int(len(segment) * LAST)
    inside = (k_pos >= FIRST) & (k_pos < end)
    bins = ((k_pos - FIRST) * BINS // max(end - FIRST, 1)).clamp(0, BINS - 1)
    summed = w.new_zeros(BINS).index_add(0, bins, (w * inside).mean((0, 1)))
    shares["density"] = summed / ((end - FIRST) / BINS) * length
    return {name: share.cpu() for name, share in shares.items()}


@torch.inference_mode()
def example_spent(model: Transformer, example: Example) -> list[dict[str, Tensor]]:
    """`spent` of every layer, for the qc queries of an example."""
    device = model.embed_tokens.weight.device
    tokens = torch.from_numpy(example.tokens).to(device)[None]
    segment = torch.from_numpy(example.segment).to(device)
    first = int((example.segment == QC).argmax())
    cache, weights = model.new_cache(1, tokens.shape[1]), []
    fill(model, tokens[:, :first], cache)
    model(tokens[:, first:], cache=cache, weights=weights)
    q_pos = torch.arange(first, tokens.shape[1], device=device)
    layers = zip(weights, model.plan)
    return [spent(w[0], q_pos, k_pos, segment, spec.window) for (w, k_pos), spec in layers]


def measure(
    model: Transformer, needles: Needles, name: str, length: int, examples: int, seed: int = 1
) -> tuple[list[Mass], list[Head], dict[str, tuple[Tensor, Tensor]]]:
    """Masses by kind of layer (all, and in a hybrid each), heads, and by kind the density (BINS)
    and the logits (OCTAVES)."""
    hidden = cell_examples(needles, "single", length, 0.5, examples, seed)
    made = [default_collate(example_spent(model, example)) for example in hidden]
    values = default_collate(made)  # (example layer ..)

    rope = torch.tensor([spec.rope for spec in model.plan])
    kinds = {"all": torch.ones_like(rope), "RoPE": rope, "NoPE": ~rope}
    if len(rope.unique()) == 1:
        kinds = {"all": kinds["all"]}
    masses, profiles = [], {}
    for kind, of in kinds.items():
        means = {key: values[key][:, of].mean().item() for key in COLUMNS}
        error = mean_and_error(values["needle"][:, of].mean((1, 2)).numpy())[1]
        last = [i for i, spec in enumerate(model.plan) if of[i] and spec.window is None][-1:]
        logits = values["logits"][:, last].nanmean((0, 1))
        means |= {"needle_error": error, "logit_slope": slope(logits)}
        masses.append(Mass(name, length, kind, examples, **means))
        profiles[kind] = values["density"].mean(0)[of].mean(0), logits
    heads = []
    needle, recent = values["needle"].mean(0), values["recent"].mean(0)  # (layer h)
    for (i, spec), j in product(enumerate(model.plan), range(model.config.n_head)):
        position = "RoPE" if spec.rope else "NoPE"
        over = needle[i, j].item(), recent[i, j].item()
        heads.append(Head(name, length, i, j, position, spec.window, *over))
    return masses, heads, profiles


def slope(logits: Tensor) -> float:
    """Nats an octave: the straight line through what is known of logits (OCTAVES) FROM there on."""
    octaves = torch.arange(FROM, OCTAVES)[~logits[FROM:].isnan()]
    return float(np.polyfit(octaves, logits[octaves], 1)[0]) if len(octaves) > 1 else math.nan


def plot(masses: list[Mass], longest: list[tuple], out: Path) -> None:
    """A row a checkpoint: masses by length; of `longest`, made by `measure`, density, logits and
    heads."""
    names = grouped(masses, "checkpoint")
    figure, axes = report.figure_of(18, 0.4 + 3.1 * len(names), len(names), 4, squeeze=False)
    for (name, rows), (_, heads, profiles), panels in zip(names.items(), longest, axes):
        bars, line, fall, points = panels
        labels, bottom = [f"{mass.length:,}\n{mass.layers}" for mass in rows], 0
        for segment in SEGMENTS:
            values = np.array([getattr(mass, segment) for mass in rows])
            bars.bar(labels, values, bottom=bottom, label=segment)
            bottom = bottom + values
        bars.set(title=f"{name}\nattention mass of the qc queries", ylim=(0, 1))
        bars.tick_params(labelsize=7)
        bars.legend(fontsize=7, loc="lower right", framealpha=0.6)
        for kind, (density, logits) in profiles.items():
            line.plot((np.arange(BINS) + 0.5) / BINS, density.numpy(), label=kind)
            fall.plot(2.0 ** np.arange(OCTAVES), logits.numpy(), marker=".", label=kind)
        title = f"density over the context, {heads[0].length:,} tokens (even: 1)"
        line.set(title=title, xlabel="place in the context", yscale="log")
        line.legend(fontsize=7)
        fall.set(
            title="logits of the context's keys, nats", xlabel="distance, tokens", xscale="log"
        )
        for head in heads:
            color = "tab:orange" if head.position == "RoPE" else "tab:blue"
            place = (head.recent, head.needle)
            points.annotate(f"{head.layer}.{head.head}", place, color=color, ha="center")
        title = "heads (layer.head): RoPE orange, NoPE blue"
        points.set(title=title, xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        points.set(xlabel=f"mass on the {RECENT} nearest keys", ylabel="mass on the needle")
    figure.savefig(out, dpi=110)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = report.checkpoint_command("attention_mass", __doc__)
    parser.add_argument("--examples", type=int, default=16, help="at every length (default: 16)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse(argv)
    models, corpus, lengths = report.open_checkpoints(args, (1, 4, 16))
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    for length in lengths:  # ValueError before anything is measured
        list(cell_examples(needles, "single", length, 0.5, args.examples, args.seed))
    made = []
    for (name, model), length in report.progress(list(product(models.items(), lengths))):
        made.append(measure(model, needles, name, length, args.examples, args.seed))
    masses = [mass for rows, _, _ in made for mass in rows]
    heads = [head for _, found, _ in made for head in found]
    report.write_rows(heads, Path(f"{args.out}-heads.csv"))
    longest = made[len(lengths) - 1 :: len(lengths)]  # of every checkpoint
    text = f"masses sum to 1; recent: the {RECENT} nearest keys\n{report.listing(masses)}"
    for key in ("needle", "recent"):
        most = lambda head, key=key: -getattr(head, key)
        best = [head for _, found, _ in longest for head in sorted(found, key=most)[:3]]
        text += f"\n\nheads with most of the {key} mass\n{report.listing(best)}"
    report.write(masses, args.out, lambda rows, out: plot(rows, longest, out), text)


if __name__ == "__main__":
    main()

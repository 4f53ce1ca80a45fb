"""Where attention goes: the paper's masses and entropy (section 3), a density over positions, and a
map of heads.

    python -m lab.attention_mass out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
    python -m lab.attention_mass CHECKPOINT --lengths 512 2048 32768 --examples 32

A single needle lies in the middle of real text; the queries are those of the question and its
answer ("qc"), and the keys fall into four segments: the first ten tokens, the needle, the question
and answer, and all else. Weights are averaged over those queries and over heads and layers; in a
hybrid over the RoPE and the NoPE layers apart too. Only the rows of the qc queries are ever written
out, so that a long context fits in memory. Writes OUT.csv, OUT-heads.csv and OUT.png.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention import LayerSpec, visible
from commandline import guarded
from data.needles import QC, Example, Needles
from engine import fill
from evaluate import mean_and_error
from lab import report
from lab.needles import cell_examples
from model import Transformer

SEGMENTS = ("begin", "needle", "context", "qc")  # in the order of data.needles
COLUMNS = (*SEGMENTS, "recent", "entropy", "entropy_share")
RECENT = 32  # nearest keys, the query's own included: what a head of recency reads
# The density leaves out the first 10 tokens and the last 3%, as the paper's does.
BINS, FIRST, LAST = 40, 10, 0.97


@dataclass(frozen=True)
class Mass:
    """What one checkpoint's queries spend at one length, over all layers or those of a kind: the
    four masses sum to 1."""

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


@dataclass(frozen=True)
class Head:
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
    stretch of the context, times all its keys, so that an even spread is 1. segment (n) says of
    each of the n positions what lies there."""
    w = weights.double()
    kinds = segment[k_pos.clamp(min=0)].long()  # an empty slot has no weight
    in_segment = F.one_hot(kinds, len(SEGMENTS)).double()
    shares = dict(zip(SEGMENTS, (w @ in_segment).mean(1).unbind(-1)))
    shares["recent"] = (w * (q_pos[:, None] - k_pos[None, :] < RECENT)).sum(-1).mean(1)
    keys = visible(q_pos[:, None], k_pos[None, :], window).sum(-1)
    entropy = -torch.xlogy(w, w).sum(-1) / torch.log(torch.tensor(2.0))
    shares["entropy"] = entropy.mean(1)
    shares["entropy_share"] = (entropy / keys.clamp(min=2).log2()).mean(1)

    length, end = len(segment), int(len(segment) * LAST)
    inside = (k_pos >= FIRST) & (k_pos < end)
    bins = (k_pos[inside] - FIRST) * BINS // max(end - FIRST, 1)
    summed = w.new_zeros(BINS).index_add(0, bins, w[..., inside].mean((0, 1)))
    shares["density"] = summed / ((end - FIRST) / BINS) * length
    return shares


@torch.inference_mode()
def example_spent(model: Transformer, example: Example) -> list[dict[str, Tensor]]:
    """`spent` of every layer, for the qc queries of an example."""
    device = model.embed_tokens.weight.device
    tokens = torch.from_numpy(example.tokens).to(device)[None]
    segment = torch.from_numpy(example.segment).to(device)
    first = int((segment == QC).int().argmax())
    cache, weights = model.new_cache(1, tokens.shape[1]), []
    fill(model, tokens[:, :first], cache)
    model(tokens[:, first:], cache=cache, weights=weights)
    q_pos = torch.arange(first, tokens.shape[1], device=device)
    return [
        spent(w[0], q_pos, k_pos, segment, spec.window)
        for (w, k_pos), spec in zip(weights, model.plan)
    ]


def examples_of(needles: Needles, length: int, count: int, seed: int) -> list[Example]:
    """Needles at half depth in `length` tokens. ValueError where one does not fit."""
    return list(cell_examples(needles, "single", length, 0.5, count, seed))


def position(spec: LayerSpec) -> str:
    """A layer's kind, as the tables name it."""
    return "RoPE" if spec.rope else "NoPE"


def measure(
    model: Transformer, needles: Needles, name: str, length: int, examples: int, seed: int = 1
) -> tuple[list[Mass], list[Head], dict[str, Tensor]]:
    """Masses by kind of layer (all, and in a hybrid each), heads, and densities (BINS) by kind."""
    made = [example_spent(model, each) for each in examples_of(needles, length, examples, seed)]

    def stacked(key: str) -> Tensor:  # (example layer ..)
        return torch.stack([torch.stack([layer[key] for layer in layers]) for layers in made]).cpu()

    values, density = {key: stacked(key) for key in COLUMNS}, stacked("density").mean(0)
    layers = {"all": list(range(len(model.plan)))}
    for kind in ("RoPE", "NoPE"):
        of = [i for i, spec in enumerate(model.plan) if position(spec) == kind]
        layers |= {kind: of} if 0 < len(of) < len(model.plan) else {}
    masses = []
    for kind, of in layers.items():
        means = {key: value[:, of].mean().item() for key, value in values.items()}
        error = mean_and_error(values["needle"][:, of].mean((1, 2)).numpy())[1]
        masses.append(Mass(name, length, kind, examples, needle_error=error, **means))
    heads = []
    for (i, spec), j in product(enumerate(model.plan), range(model.config.n_head)):
        over = [values[key].mean(0)[i, j].item() for key in ("needle", "recent")]
        heads.append(Head(name, length, i, j, position(spec), spec.window, *over))
    return masses, heads, {kind: density[of].mean(0) for kind, of in layers.items()}


def table(masses: list[Mass]) -> str:
    """A row a checkpoint, length and kind of layer."""
    width = max(len(mass.checkpoint) for mass in masses)
    lines = [f"{'':<{width}}   length  layers" + "".join(f"{name:>14}" for name in COLUMNS)]
    for mass in masses:
        numbers = "".join(f"{getattr(mass, name):>14.4f}" for name in COLUMNS)
        lines.append(f"{mass.checkpoint:<{width}}  {mass.length:>7,}  {mass.layers:<6}{numbers}")
    lines.append(
        f"masses sum to 1; recent: the {RECENT} nearest keys; entropy in bits, and over log2 of "
        f"the keys seen; {masses[0].examples} examples a length"
    )
    return "\n".join(lines)


def head_map(heads: list[Head], count: int = 3) -> str:
    """The heads of one checkpoint that hold most of the needle, and most of what is near."""
    lines = [f"{heads[0].checkpoint}, {heads[0].length:,} tokens"]
    for key in ("needle", "recent"):
        best = sorted(heads, key=lambda head: -getattr(head, key))[:count]
        said = [
            f"layer {head.layer} head {head.head} ({head.position}, {head.window or 'all'}) "
            f"{getattr(head, key):.3f}"
            for head in best
        ]
        lines.append(f"  {key}  {', '.join(said)}")
    return "\n".join(lines)


def plot(masses: list[Mass], heads: list[Head], densities: dict, out: Path) -> None:
    """A row a checkpoint: masses by length, and at the longest the density and every head."""
    names, longest = report.distinct(masses, "checkpoint"), heads[0].length
    figure, axes = report.figure_of(14, 0.4 + 3.1 * len(names), len(names), 3, squeeze=False)
    for name, (bars, line, points) in zip(names, axes):
        rows, bottom = [mass for mass in masses if mass.checkpoint == name], 0
        labels = [f"{mass.length:,}\n{mass.layers}" for mass in rows]
        for segment in SEGMENTS:
            values = np.array([getattr(mass, segment) for mass in rows])
            bars.bar(labels, values, bottom=bottom, label=segment)
            bottom = bottom + values
        bars.set(title=f"{name}\nattention mass of the qc queries", ylim=(0, 1))
        for kind, density in densities[name].items():
            line.plot((np.arange(BINS) + 0.5) / BINS, density.numpy(), label=kind)
        line.set(title=f"density over the context, {longest:,} tokens (even: 1)", yscale="log")
        line.set(xlabel="place in the context")
        for head in (head for head in heads if head.checkpoint == name):
            color = "tab:orange" if head.position == "RoPE" else "tab:blue"
            place = (head.recent, head.needle)
            points.annotate(f"{head.layer}.{head.head}", place, color=color, ha="center")
        points.set(title="heads (layer.head): RoPE orange, NoPE blue")
        points.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        points.set(xlabel=f"mass on the {RECENT} nearest keys", ylabel="mass on the needle")
        bars.tick_params(labelsize=7)
        bars.legend(fontsize=7, loc="lower right", framealpha=0.6)
        line.legend(fontsize=7)
    figure.savefig(out, dpi=110)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = report.checkpoint_command("attention_mass", __doc__, "attention-mass")
    default = "tokens (default: 1, 4 and 16 times the trained length)"
    parser.add_argument("--lengths", nargs="+", type=int, help=default)
    parser.add_argument("--examples", type=int, default=16, help="at every length (default: 16)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse(argv)
    report.at_least(1, examples=args.examples)
    report.at_least(0, seed=args.seed)
    models, corpus = report.opened(args)
    lengths = sorted(report.lengths_of(args.lengths, (1, 4, 16), models, "--lengths"))
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    for length in lengths:
        examples_of(needles, length, args.examples, args.seed)  # before anything is measured

    masses, heads, longest, densities = [], [], {}, {}
    for (name, model), length in report.progress(list(product(models.items(), lengths))):
        cell = measure(model, needles, name, length, args.examples, args.seed)
        masses, heads = masses + cell[0], heads + cell[1]
        longest[name], densities[name] = cell[1:]  # the lengths grow
    report.write_rows(heads, Path(f"{args.out}-heads.csv"))
    text = "\n".join([table(masses), "", *map(head_map, longest.values())])
    draw = lambda rows, out: plot(rows, sum(longest.values(), []), densities, out)
    report.write(masses, args.out, draw, text)


if __name__ == "__main__":
    main()

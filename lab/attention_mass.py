"""Where attention goes: the paper's masses and entropy (section 3), a density over positions, and a map of heads.

    python -m lab.attention_mass out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
    python -m lab.attention_mass CHECKPOINT --lengths 512 2048 32768 --examples 32

A single needle lies in the middle of real text; the queries are those of the question and its answer ("qc"), and the keys fall into
four segments: the first ten tokens, the needle, the question and answer, and all else. Weights are averaged over those queries and
over heads and layers; in a hybrid over the RoPE and the NoPE layers apart too. The text is prefilled through the cache and only the
rows of the qc queries are ever written out, so that a long context fits in memory. Writes OUT.csv, OUT-heads.csv and OUT.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attention import LayerSpec, visible
from commandline import choose_device, fail
from data.needles import QC, Example, Needles
from engine import fill
from evaluate import mean_and_error
from lab.needles import cell_examples
from lab.report import (
    check_out,
    checkpoint_command,
    least_trained,
    open_checkpoints,
    write,
    write_rows,
)
from model import Transformer, layer_plan

SEGMENTS = ("begin", "needle", "context", "qc")  # in the order of data.needles
RECENT = 32  # nearest keys, the query's own included: what a head of recency reads
BINS, FIRST, LAST = (
    40,
    10,
    0.97,
)  # the density leaves out the first 10 tokens and the last 3%, as the paper's does
TIMES = (1, 4, 16)  # the trained length


@dataclass(frozen=True)
class Mass:
    """What one checkpoint's queries spend at one length, over all layers or those of a kind: the four masses sum to 1."""

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
    """One head at one length: what tells a head that retrieves from a head that attends nearby."""

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
    """What attention weights (h t s) are spent on, each averaged over the t queries: (h) for every segment, "recent", "entropy" (bits)
    and "entropy_share"; (BINS) for "density", averaged over heads too: weight per key of a stretch of the context, times all its keys,
    so that an even spread is 1. segment (n) says of each of the n positions what lies there."""
    w = weights.double()
    in_segment = F.one_hot(
        segment[k_pos.clamp(min=0)].long(), len(SEGMENTS)
    ).double()  # an empty slot has no weight
    found = dict(zip(SEGMENTS, (w @ in_segment).mean(1).unbind(-1)))
    keys = visible(q_pos[:, None], k_pos[None, :], window).sum(-1)
    entropy = -torch.xlogy(w, w).sum(-1) / torch.log(torch.tensor(2.0))
    found["recent"] = (w * (q_pos[:, None] - k_pos[None, :] < RECENT)).sum(-1).mean(1)
    found["entropy"], found["entropy_share"] = (
        entropy.mean(1),
        (entropy / keys.clamp(min=2).log2()).mean(1),
    )
    length, end = len(segment), int(len(segment) * LAST)
    inside = (k_pos >= FIRST) & (k_pos < end)
    bins = (k_pos[inside] - FIRST) * BINS // max(end - FIRST, 1)
    width = (end - FIRST) / BINS
    found["density"] = (
        w.new_zeros(BINS).index_add(0, bins, w[..., inside].mean((0, 1))) / width * length
    )
    return found


@torch.inference_mode()
def example_spent(model: Transformer, example: Example) -> list[dict[str, Tensor]]:
    """`spent` of every layer, for the qc queries of an example."""
    device = model.embed_tokens.weight.device
    tokens, segment = (
        torch.from_numpy(example.tokens).to(device)[None],
        torch.from_numpy(example.segment).to(device),
    )
    first = int((segment == QC).int().argmax())
    cache, weights = model.new_cache(1, tokens.shape[1]), []
    fill(model, tokens[:, :first], cache)
    model(tokens[:, first:], cache=cache, weights=weights)
    q_pos = torch.arange(first, tokens.shape[1], device=device)
    return [
        spent(w[0], q_pos, k_pos, segment, spec.window)
        for (w, k_pos), spec in zip(weights, layer_plan(model.config))
    ]


def kinds(plan: list[LayerSpec]) -> dict[str, list[int]]:
    """Which layers each row of the tables speaks of: all, and where there are both kinds, each."""
    groups = {
        "RoPE": [i for i, spec in enumerate(plan) if spec.rope],
        "NoPE": [i for i, spec in enumerate(plan) if not spec.rope],
    }
    return {"all": list(range(len(plan)))} | (groups if all(groups.values()) else {})


def measure(
    model: Transformer, needles: Needles, name: str, length: int, examples: int, seed: int = 1
) -> tuple[list[Mass], list[Head], dict[str, Tensor]]:
    """Masses by kind of layer, heads, and densities (BINS) by kind of layer, over needles at half depth in `length` tokens."""
    made = [
        example_spent(model, example)
        for example in cell_examples(needles, "single", length, 0.5, examples, seed)
    ]
    plan = layer_plan(model.config)
    keys = [key for key in made[0][0] if key != "density"]
    values = {
        key: torch.stack([torch.stack([layer[key] for layer in layers]) for layers in made]).cpu()
        for key in keys
    }  # (example layer head)
    densities = (
        torch.stack([torch.stack([layer["density"] for layer in layers]) for layers in made])
        .mean(0)
        .cpu()
    )  # (layer BINS)
    masses = []
    for kind, layers in kinds(plan).items():
        means = {key: value[:, layers].mean().item() for key, value in values.items()}
        error = mean_and_error(values["needle"][:, layers].mean((1, 2)).numpy())[1]
        masses.append(Mass(name, length, kind, examples, needle_error=error, **means))
    over = {key: values[key].mean(0) for key in ("needle", "recent")}
    heads = [
        Head(
            name,
            length,
            i,
            j,
            "RoPE" if spec.rope else "NoPE",
            spec.window,
            over["needle"][i, j].item(),
            over["recent"][i, j].item(),
        )
        for i, spec in enumerate(plan)
        for j in range(model.config.n_head)
    ]
    return masses, heads, {kind: densities[layers].mean(0) for kind, layers in kinds(plan).items()}


def table(masses: list[Mass]) -> str:
    """A row a checkpoint, length and kind of layer."""
    width = max(len(mass.checkpoint) for mass in masses)
    columns = (*SEGMENTS, "recent", "entropy", "entropy_share")
    lines = [f"{'':<{width}}   length  layers" + "".join(f"{name:>14}" for name in columns)]
    for mass in masses:
        lines.append(
            f"{mass.checkpoint:<{width}}  {mass.length:>7,}  {mass.layers:<6}"
            + "".join(f"{getattr(mass, name):>14.4f}" for name in columns)
        )
    return "\n".join(
        [
            *lines,
            f"masses sum to 1; recent: the {RECENT} nearest keys; entropy in bits, and over log2 of the keys seen; {masses[0].examples} examples a length",
        ]
    )


def head_map(heads: list[Head], count: int = 3) -> str:
    """The heads of one checkpoint at one length that hold most of the needle, and most of what is near."""
    say = lambda head, key: (
        f"layer {head.layer} head {head.head} ({head.position}, {head.window or 'all'}) {getattr(head, key):.3f}"
    )
    best = lambda key: ", ".join(
        say(head, key) for head in sorted(heads, key=lambda head: -getattr(head, key))[:count]
    )
    return f"{heads[0].checkpoint}, {heads[0].length:,} tokens\n  needle  {best('needle')}\n  recent  {best('recent')}"


def plot(
    masses: list[Mass],
    heads: list[Head],
    densities: dict[tuple[str, int], dict[str, Tensor]],
    out: Path,
) -> None:
    """A row a checkpoint: masses by length, density at the longest, and every head by needle and recency there."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(mass.checkpoint for mass in masses))
    longest = max(mass.length for mass in masses)
    figure = Figure(figsize=(14, 0.4 + 3.1 * len(names)), layout="constrained")
    for name, (bars, line, points) in zip(names, figure.subplots(len(names), 3, squeeze=False)):
        rows = [mass for mass in masses if mass.checkpoint == name]
        bottom = np.zeros(len(rows))
        labels = [
            f"{mass.length:,}" + ("" if mass.layers == "all" else f"\n{mass.layers}")
            for mass in rows
        ]
        for segment in SEGMENTS:
            values = np.array([getattr(mass, segment) for mass in rows])
            bars.bar(range(len(rows)), values, bottom=bottom, label=segment)
            bottom = bottom + values
        bars.set_xticks(range(len(rows)), labels, fontsize=7)
        bars.set(title=f"{name}\nattention mass of the qc queries", ylim=(0, 1))
        bars.legend(fontsize=7, loc="lower right", framealpha=0.6)
        for kind, density in densities[name, longest].items():
            line.plot((np.arange(BINS) + 0.5) / BINS, density.numpy(), label=kind)
        line.set(
            title=f"density over the context, {longest:,} tokens (even: 1)",
            xlabel="place in the context",
            yscale="log",
        )
        line.legend(fontsize=7)
        for position, color in (("RoPE", "tab:orange"), ("NoPE", "tab:blue")):
            met = [
                head
                for head in heads
                if (head.checkpoint, head.length, head.position) == (name, longest, position)
            ]
            points.scatter(
                [head.recent for head in met],
                [head.needle for head in met],
                color=color,
                label=position,
            )
            for head in met:
                points.annotate(f"{head.layer}.{head.head}", (head.recent, head.needle), fontsize=6)
        points.set(
            title="heads (layer.head)",
            xlabel=f"mass on the {RECENT} nearest keys",
            ylabel="mass on the needle",
            xlim=(-0.03, 1.03),
            ylim=(-0.03, 1.03),
        )
        points.legend(fontsize=7)
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = checkpoint_command("attention_mass", __doc__, "attention-mass")
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        help="tokens (default: 1, 4 and 16 times the trained length)",
    )
    parser.add_argument("--examples", type=int, default=16, help="at every length (default: 16)")
    parser.add_argument("--seed", type=int, default=1)
    try:
        args = parser.parse(argv)
        device, _ = choose_device(args.device)
        if args.examples < 1 or args.seed < 0:
            raise ValueError(
                f"--examples {args.examples} must be at least 1 and --seed {args.seed} at least 0"
            )
        models, corpus = open_checkpoints(args.checkpoints, args.data, device)
        lengths = sorted(
            set(args.lengths or [times * least_trained(models, "--lengths") for times in TIMES])
        )
        needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
        for length in lengths:
            list(
                cell_examples(needles, "single", length, 0.5, args.examples, args.seed)
            )  # raises where one does not fit
        check_out(args.out)
    except (ValueError, OSError) as error:
        fail(error)
    masses, heads, densities = [], [], {}
    for name, model in models.items():
        for length in lengths:
            rows, found, densities[name, length] = measure(
                model, needles, name, length, args.examples, args.seed
            )
            masses, heads = masses + rows, heads + found
            print(f"\r{name}: {length:,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(table(masses), end="\n\n")
    for name in models:
        print(
            head_map(
                [head for head in heads if (head.checkpoint, head.length) == (name, lengths[-1])]
            )
        )
    write_rows(heads, Path(f"{args.out}-heads.csv"))
    write(masses, args.out, lambda rows, out: plot(rows, heads, densities, out))


if __name__ == "__main__":
    main()

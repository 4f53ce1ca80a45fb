"""Does a longer context help? The loss of the same last 128 tokens under contexts of growing
length, far beyond the trained one.

    python -m lab.loss_by_position out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
    python -m lab.loss_by_position CHECKPOINT --contexts 512 8192 --windows 200

Each window ends inside a document of the validation text that reaches back over the longest
context, so that every context is the targets' own. Prints nats per token; writes OUT.csv, OUT.png.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from commandline import guarded
from engine import fill
from evaluate import mean_and_error
from lab import report
from model import Transformer

TARGETS = 128  # tokens, the last of every window


@dataclass(frozen=True)
class Point:
    """A checkpoint's loss under one context."""

    checkpoint: str
    context: int  # tokens before the last target, end-of-text at their beginning included
    windows: int
    documents: int  # that the windows come from
    nats: float  # per token
    error: float  # standard error over windows; those of one document are not independent


def windows(ids: np.ndarray, eot: int, longest: int, count: int) -> list[tuple[int, int]]:
    """(document, end) of `count` windows of validation tokens: ids[end - longest : end] lies in one
    document and no two share a target. The documents take turns, so that a long one does not speak
    for all. Raises ValueError when there are fewer."""
    edges = [*np.flatnonzero(ids == eot).tolist(), len(ids)]
    made = []
    for document, (before, end) in enumerate(zip(edges, edges[1:])):
        last = range(end, before + longest, -TARGETS)
        made += [(turn, document, end) for turn, end in enumerate(last)]
    if len(made) < count:
        raise ValueError(
            f"the validation text has {len(made)} windows of {longest:,} tokens inside its "
            f"documents, not {count}: give shorter --contexts, fewer --windows, or a corpus of "
            "longer documents"
        )
    return [(document, end) for _, document, end in sorted(made)[:count]]


@torch.inference_mode()
def loss(model: Transformer, ids: np.ndarray, end: int, context: int, eot: int) -> float:
    """Mean nats of ids[end - TARGETS : end] when `context` tokens, end-of-text first, lead up to
    the last."""
    text = np.concatenate(([eot], ids[end - context : end])).astype(np.int64)
    sequence = torch.from_numpy(text).to(model.embed_tokens.weight.device)
    cache = model.new_cache(1, context)
    fill(model, sequence[None, : context - TARGETS], cache)
    logits = model(sequence[None, context - TARGETS : context], cache=cache)[0]
    return F.cross_entropy(logits.float(), sequence[-TARGETS:]).item()


def table(points: list[Point]) -> str:
    """A row a context, a column a checkpoint."""
    names = report.distinct(points, "checkpoint")
    lines = ["   context  " + "  ".join(f"{name:>18}" for name in names)]
    for context in report.distinct(points, "context"):
        line = f"{context:>10,}"
        for point in (point for point in points if point.context == context):
            width = max(18, len(point.checkpoint))
            line += f"  {f'{point.nats:.4f} ± {point.error:.4f}':>{width}}"
        lines.append(line)
    size = f"over {points[0].windows} windows from {points[0].documents} documents"
    lines.append(f"nats per token of the last {TARGETS} tokens, ± standard error {size}")
    return "\n".join(lines)


def plot(points: list[Point], out: Path) -> None:
    """Loss against context, a line a checkpoint."""
    figure, axis = report.figure_of(6.4, 3.8)
    for name in report.distinct(points, "checkpoint"):
        line = [(p.context, p.nats, p.error) for p in points if p.checkpoint == name]
        axis.errorbar(*zip(*line), marker=".", capsize=2, label=name)
    report.length_axis(axis, report.distinct(points, "context"))
    axis.set(ylabel=f"loss of the last {TARGETS} tokens, nats")
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = report.checkpoint_command("loss_by_position", __doc__, "loss-by-position")
    default = "tokens (default: 128, 256, ... to 16 times the trained length)"
    parser.add_argument("--contexts", nargs="+", type=int, help=default)
    parser.add_argument("--windows", type=int, default=100)
    args = parser.parse(argv)
    report.at_least(1, windows=args.windows)
    models, corpus = report.opened(args)
    contexts = args.contexts
    if contexts is None:
        (longest,) = report.lengths_of(None, [16], models, "--contexts")
        contexts = [TARGETS * 2**i for i in range(32) if TARGETS * 2**i <= longest]
    contexts = sorted(set(contexts))
    if min(contexts) < TARGETS:
        raise ValueError(f"--contexts {min(contexts)} must be at least the {TARGETS} targets")

    eot = corpus.tokenizer.eot_token
    chosen = windows(corpus.val, eot, contexts[-1], args.windows)
    documents = len({document for document, _ in chosen})
    points = []
    for (name, model), context in report.progress(list(product(models.items(), contexts))):
        nats = [loss(model, corpus.val, end, context, eot) for _, end in chosen]
        points.append(Point(name, context, len(chosen), documents, *mean_and_error(nats)))
    report.write(points, args.out, plot, table(points))


if __name__ == "__main__":
    main()

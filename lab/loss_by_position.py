"""Does more context help? The loss of the same last 128 tokens under contexts of growing length, far beyond the trained one.

    python -m lab.loss_by_position out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
    python -m lab.loss_by_position CHECKPOINT --contexts 512 8192 --windows 200

Each window ends inside a document of the validation text that reaches back over the longest context, so that every context is
the targets' own. Prints a table of nats per token; writes OUT.csv and OUT.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from commandline import choose_device, fail
from data.corpus import Corpus
from engine import fill
from evaluate import mean_and_error
from lab.report import check_out, checkpoint_command, least_trained, open_checkpoints, write
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
    error: float  # standard error over windows; windows of one document are not independent, so take it as a lower bound


def windows(ids: np.ndarray, eot: int, longest: int, count: int) -> list[tuple[int, int]]:
    """(document, end) of `count` windows of validation tokens: ids[end - longest : end] lies in one document and no two share a
    target. The documents take turns, so that a long one does not speak for all. Raises ValueError when there are fewer."""
    starts = np.flatnonzero(ids == eot) + 1
    ends = np.append(starts[1:] - 1, len(ids))
    found = [
        (turn, document, end - turn * TARGETS)
        for document, (start, end) in enumerate(zip(starts.tolist(), ends.tolist()))
        for turn in range(max(0, (end - start - longest) // TARGETS + 1))
    ]
    if len(found) < count:
        raise ValueError(
            f"the validation text has {len(found)} windows of {longest:,} tokens inside its documents, not {count}: give shorter --contexts, fewer --windows, or a corpus of longer documents"
        )
    return [(document, end) for _, document, end in sorted(found)[:count]]


@torch.inference_mode()
def loss(model: Transformer, ids: np.ndarray, end: int, context: int, eot: int) -> float:
    """Mean nats of ids[end - TARGETS : end] when `context` tokens, end-of-text first, lead up to the last."""
    sequence = torch.from_numpy(
        np.concatenate(([eot], ids[end - context : end])).astype(np.int64)
    ).to(model.embed_tokens.weight.device)
    cache = model.new_cache(1, context)
    if context > TARGETS:
        fill(model, sequence[None, : context - TARGETS], cache)
    logits = model(sequence[None, context - TARGETS : context], cache=cache)[0]
    return F.cross_entropy(logits.float(), sequence[-TARGETS:]).item()


def measure(
    model: Transformer, corpus: Corpus, name: str, contexts: list[int], count: int
) -> list[Point]:
    """A point for each context, over the same targets."""
    eot = corpus.tokenizer.eot_token
    chosen = windows(corpus.val, eot, max(contexts), count)
    points = []
    for context in contexts:
        nats = [loss(model, corpus.val, end, context, eot) for _, end in chosen]
        points.append(
            Point(
                name,
                context,
                count,
                len({document for document, _ in chosen}),
                *mean_and_error(nats),
            )
        )
        print(f"\r{name}: {context:,}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return points


def table(points: list[Point]) -> str:
    """A row a context, a column a checkpoint."""
    names = list(dict.fromkeys(point.checkpoint for point in points))
    at = {(point.checkpoint, point.context): point for point in points}
    lines = ["   context  " + "  ".join(f"{name:>18}" for name in names)]
    for context in dict.fromkeys(point.context for point in points):
        row = [at[name, context] for name in names if (name, context) in at]
        lines.append(
            f"{context:>10,}  "
            + "  ".join(
                f"{f'{p.nats:.4f} ± {p.error:.4f}':>{max(18, len(p.checkpoint))}}" for p in row
            )
        )
    first = points[0]
    return "\n".join(
        [
            *lines,
            f"nats per token of the last {TARGETS} tokens, ± standard error over {first.windows} windows from {first.documents} documents",
        ]
    )


def plot(points: list[Point], out: Path) -> None:
    """Loss against context, a line a checkpoint."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(point.checkpoint for point in points):
        line = [point for point in points if point.checkpoint == name]
        axis.errorbar(
            [p.context for p in line],
            [p.nats for p in line],
            [p.error for p in line],
            marker=".",
            capsize=2,
            label=name,
        )
    axis.set(
        xscale="log", xlabel="context, tokens", ylabel=f"loss of the last {TARGETS} tokens, nats"
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(out, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = checkpoint_command("loss_by_position", __doc__, "loss-by-position")
    parser.add_argument(
        "--contexts",
        nargs="+",
        type=int,
        help="tokens (default: 128, 256, ... to 16 times the trained length)",
    )
    parser.add_argument("--windows", type=int, default=100)
    try:
        args = parser.parse(argv)
        device, _ = choose_device(args.device)
        if args.windows < 1:
            raise ValueError(f"--windows {args.windows} must be at least 1")
        models, corpus = open_checkpoints(args.checkpoints, args.data, device)
        contexts = args.contexts or [
            TARGETS * 2**i
            for i in range(32)
            if TARGETS * 2**i <= 16 * least_trained(models, "--contexts")
        ]
        contexts = sorted(set(contexts))
        if min(contexts) < TARGETS:
            raise ValueError(f"--contexts {min(contexts)} must be at least the {TARGETS} targets")
        windows(corpus.val, corpus.tokenizer.eot_token, max(contexts), args.windows)
        check_out(args.out)
    except (ValueError, OSError) as error:
        fail(error)
    points = [
        point
        for name, model in models.items()
        for point in measure(model, corpus, name, contexts, args.windows)
    ]
    print(table(points))
    write(points, args.out, plot)


if __name__ == "__main__":
    main()

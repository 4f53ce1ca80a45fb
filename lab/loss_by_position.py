"""Does a longer context help? The loss of the same last 128 tokens under contexts of growing
length, far beyond the trained one.

    python -m lab.loss_by_position CHECKPOINT --contexts 512 8192 --windows 200

Each window ends inside a document of the validation text that reaches back over the longest
context, so that every context is the targets' own. Prints nats per token; writes OUT.csv, OUT.png.
"""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from commandline import guarded
from engine import fill
from evaluate import mean_and_error
from lab import report
from model import Transformer, require

TARGETS = 128  # tokens, the last of every window


class Point(NamedTuple):
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
    few = f"the validation text has {len(made)} windows of {longest:,} tokens inside its documents"
    mend = "give shorter --contexts, fewer --windows, or a corpus of longer documents"
    require(len(made) >= count, f"{few}, not {count}: {mend}")
    return [(document, end) for _, document, end in sorted(made)[:count]]


@torch.inference_mode()
def loss(model: Transformer, ids: np.ndarray, end: int, context: int, eot: int) -> float:
    """Mean nats of ids[end - TARGETS : end], `context` tokens with end-of-text first before."""
    text = np.concatenate(([eot], ids[end - context : end])).astype(np.int64)
    sequence = torch.from_numpy(text).to(model.embed_tokens.weight.device)
    cache = model.new_cache(1, context)
    fill(model, sequence[None, : context - TARGETS], cache)
    logits = model(sequence[None, context - TARGETS : context], cache=cache)[0]
    return F.cross_entropy(logits.float(), sequence[-TARGETS:]).item()


def table(points: list[Point]) -> str:
    """A row a context, a column a checkpoint."""
    said = lambda points: f"{points[0].nats:.4f} ± {points[0].error:.4f}"
    text = report.pivot(points, "context", "checkpoint", said)
    size = f"over {points[0].windows} windows from {points[0].documents} documents"
    return f"{text}\nnats per token of the last {TARGETS} tokens, ± standard error {size}"


def plot(points: list[Point], out: Path) -> None:
    """Loss against context, a line a checkpoint."""
    panels = {"nats": f"loss of the last {TARGETS} tokens, nats"}
    report.plot_lines(points, "context", "checkpoint", panels, out, lengths=True)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = report.checkpoint_command("loss_by_position", __doc__, "--contexts")
    parser.add_argument("--windows", type=int, default=100)
    args = parser.parse(argv)
    models, corpus, contexts = report.open_checkpoints(args, [2.0**i for i in range(-2, 5)])
    if args.lengths is None:
        contexts = sorted({max(n, TARGETS) for n in contexts})
    report.at_least(TARGETS, contexts=min(contexts))
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

"""Needles by length and depth: exact match, and the right answer's likelihood against seven wrong
ones (chance 1/8).

    python -m lab.needles CHECKPOINT --task single multi-key --lengths 512 4096 --depths 0 0.5 1
    python -m lab.needles CHECKPOINT --set pattern=rrrR          what if NoPE layers were RoPE ones?

The tasks are RULER's (2404.06654) in small, see data/needles.py. Writes OUT.csv and OUT.png.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from commandline import guarded
from data.needles import TASKS, Example, Needles
from engine import prefill
from evaluate import TIMES, mean_and_error
from lab import report
from lab.report import grouped, heading
from model import Transformer, require

SHADES = " ░▒▓█"


class Cell(NamedTuple):
    """One checkpoint on one task at one length and depth. Errors are standard errors over examples
    (their answers share a context)."""

    checkpoint: str
    task: str
    length: int  # tokens, the question and its answer included
    depth: float | None  # 0 is the beginning; None: anywhere
    examples: int
    exact: float  # share of answers of which every token is the likeliest
    exact_error: float
    likelihood: float  # share of answers likelier than all seven wrong ones
    likelihood_error: float


@torch.inference_mode()
def score(model: Transformer, example: Example) -> tuple[float, float]:
    """(exact, likelihood) of an example: the shares of its answers, scored in order, the right ones
    before them given. The prompt is prefilled once; from its cache the right answer and the wrong
    ones go on together as a batch."""
    device = model.embed_tokens.weight.device
    tokens = torch.from_numpy(example.tokens).to(device)[None]
    cache, seen, exact, likely = model.new_cache(1, tokens.shape[1]), 0, [], []
    for question, wrong in enumerate(example.wrong):
        first, n = int((example.answer == question).argmax()), wrong.shape[1]
        right = tokens[:, first : first + n]
        candidates = torch.cat((right, torch.from_numpy(wrong).to(device)))  # (8 n)
        logits = prefill(model, tokens[:, seen:first], cache).expand(len(candidates), 1, -1)
        if n > 1:
            rest = model(candidates[:, :-1], cache=cache.fork(len(candidates)))
            logits = torch.cat((logits, rest), dim=1)
        logp = logits.float().log_softmax(-1)
        exact.append(torch.equal(logp[0].argmax(-1), candidates[0]))
        likelihoods = logp.gather(2, candidates[:, :, None]).sum((1, 2))
        likely.append((likelihoods[0] > likelihoods[1:]).all().item())
        seen = first
    return float(np.mean(exact)), float(np.mean(likely))


def cell_examples(
    needles: Needles, task: str, length: int, depth: float | None, count: int, seed: int
) -> Iterator[Example]:
    """A cell's examples, the same for every checkpoint. ValueError where one does not fit."""
    cell = [seed, length] if depth is None else [seed, length, round(1000 * depth) + 1]
    for i in range(count):
        yield needles.task(task, np.random.default_rng([*cell, i]), length, depth)


def measure(model: Transformer, needles: Needles, name: str, *cell) -> Cell:
    """A cell, scored: task, length, depth, examples and seed, as `cell_examples` has them."""
    scores = [score(model, example) for example in cell_examples(needles, *cell)]
    exact, likely = zip(*scores)
    return Cell(name, *cell[:4], *mean_and_error(exact), *mean_and_error(likely))


def mean(cells: list[Cell]) -> str:
    """Means over cells, and the standard error of the exact match."""
    exact, likely = np.mean([(cell.exact, cell.likelihood) for cell in cells], axis=0)
    error = np.linalg.norm([cell.exact_error for cell in cells]) / len(cells)
    shade = SHADES[round(exact * (len(SHADES) - 1))] * 2
    return f"{shade} {exact:.2f} ± {error:.2f} / {likely:.2f}"


def text(cells: list[Cell]) -> str:
    """By task: each checkpoint's heat map, a row a depth, and the checkpoints beside each other."""
    maps, title = [], "exact ± error / likelihood"
    for task, of_task in grouped(cells, "task").items():
        for name, of in grouped(of_task, "checkpoint").items():
            by_depth = report.pivot(of, "depth", "length", mean)
            maps.append(
                f"{name}, {task}: {title} by the depth of the needle asked first\n{by_depth}"
            )
        beside = report.pivot(of_task, "checkpoint", "length", mean)
        maps.append(f"{task}: {title}, over all depths\n{beside}")
    return "\n\n".join(maps)


def plot(cells: list[Cell], out: Path) -> None:
    """A heat map of exact match for each task (rows) and checkpoint (columns)."""
    columns, rows = (len(grouped(cells, field)) for field in ("checkpoint", "task"))
    size = 1 + 3.4 * columns, 0.6 + 2.2 * rows
    figure, axes = report.figure_of(*size, rows, columns, squeeze=False)
    for line, (task, of_task) in zip(axes, grouped(cells, "task").items()):
        for axis, (name, of) in zip(line, grouped(of_task, "checkpoint").items()):
            depths, lengths = grouped(of, "depth"), grouped(of, "length")
            exact = [[cell.exact for cell in row] for row in depths.values()]
            axis.imshow(exact, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            axis.set_xticks(range(len(lengths)), map(heading, lengths), rotation=45)
            axis.set_yticks(range(len(depths)), map(heading, depths))
            axis.set_title(f"{name}\n{task}", fontsize=8)
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = report.checkpoint_command("needles", __doc__)
    add = parser.add_argument
    tasks = ["single", "multi-key"]
    add("--task", nargs="+", default=tasks, help=f"of {', '.join(TASKS)} (default: {tasks})")
    depths = "0 is the beginning, 1 just before the question"
    add("--depths", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1], help=depths)
    add("--examples", type=int, default=8, help="in every cell (default: 8)")
    add("--seed", type=int, default=1)
    args = parser.parse(argv)
    for depth in args.depths:
        inside = 0 <= depth <= 1
        require(inside, f"--depths {depth}: a depth is between 0 (the beginning) and 1 (the end)")
    models, corpus, lengths = report.open_checkpoints(args, TIMES)
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    wanted = []
    for task, length in product(dict.fromkeys(args.task), lengths):
        depths = [None] if task == "aggregation" else dict.fromkeys(args.depths)
        wanted += [(task, length, depth, args.examples, args.seed) for depth in depths]
    for cell in wanted:
        for _ in cell_examples(needles, *cell):  # ValueError before anything is measured
            pass
    every = report.progress(list(product(models.items(), wanted)))
    cells = [measure(model, needles, name, *cell) for (name, model), cell in every]
    report.write(cells, args.out, plot, text(cells))


if __name__ == "__main__":
    main()

"""Needles by length and depth: exact match, and the right answer's likelihood against seven wrong
ones (chance 1/8).

    python -m lab.needles out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
    python -m lab.needles CHECKPOINT --task single multi-key --lengths 512 4096 --depths 0 0.5 1
    python -m lab.needles CHECKPOINT --set pattern=rrrR          what if NoPE layers were RoPE ones?

The tasks are RULER's (2404.06654) in small: data/needles.py says what each hides and asks. Prints a
heat map (rows are depths) and, for several checkpoints, a comparison; writes OUT.csv and OUT.png.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from commandline import guarded
from data.needles import TASKS, Example, Needles
from engine import prefill
from evaluate import TIMES, mean_and_error
from lab import report
from lab.report import distinct
from model import Transformer

SHADES = " ░▒▓█"


@dataclass(frozen=True)
class Cell:
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
        logits = prefill(model, tokens[:, seen:first], cache)[:, None]
        logits = logits.expand(len(candidates), -1, -1)
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
    """The examples of a cell, the same for every checkpoint, others in every cell. Raises
    ValueError where one does not fit."""
    cell = [seed, length] if depth is None else [seed, length, round(1000 * depth) + 1]
    for i in range(count):
        yield needles.task(task, np.random.default_rng([*cell, i]), length, depth)


def measure(model: Transformer, needles: Needles, name: str, *cell) -> Cell:
    """A cell, scored: `cell` is task, length, depth, examples and seed, as `cell_examples` has
    them."""
    scores = [score(model, example) for example in cell_examples(needles, *cell)]
    exact, likely = zip(*scores)
    return Cell(name, *cell[:4], *mean_and_error(exact), *mean_and_error(likely))


def percent(depth: float | None) -> str:
    """A depth in words."""
    return "any" if depth is None else f"{depth:.0%}"


def heat_map(cells: list[Cell]) -> str:
    """One checkpoint on one task, cells by growing length: a row a depth, a column a length."""
    title = "exact / likelihood by the depth of the needle asked first"
    lines = [
        f"{cells[0].checkpoint}, {cells[0].task}: {title}",
        "  depth " + "".join(f"{n:>16,}" for n in distinct(cells, "length")),
    ]
    for depth in distinct(cells, "depth"):
        line = f"  {percent(depth):>5} "
        for cell in (cell for cell in cells if cell.depth == depth):
            shade = SHADES[round(cell.exact * (len(SHADES) - 1))] * 2
            line += f"   {shade} {cell.exact:.2f} / {cell.likelihood:.2f}"
        lines.append(line)
    return "\n".join(lines)


def comparison(cells: list[Cell]) -> str:
    """A row a checkpoint and task, a column a length: means over depths, with the standard error of
    the exact match."""
    tasks, names, lengths = (distinct(cells, key) for key in ("task", "checkpoint", "length"))
    width = max(map(len, names))
    lines = [
        "exact ± error / likelihood, over all depths",
        " " * (width + 20) + "".join(f"{n:>20,}" for n in lengths),
    ]
    for task, name in product(tasks, names):
        line = f"{name:<{width}}  {task:<18}"
        for n in lengths:
            of = [c for c in cells if (c.task, c.checkpoint, c.length) == (task, name, n)]
            exact, likely = np.mean([(c.exact, c.likelihood) for c in of], axis=0)
            error = np.sqrt(np.sum([c.exact_error**2 for c in of])) / len(of)
            line += f"{f'{exact:.2f} ± {error:.2f} / {likely:.2f}':>20}"
        lines.append(line)
    return "\n".join(lines)


def plot(cells: list[Cell], out: Path) -> None:
    """A heat map of exact match for each task (rows) and checkpoint (columns)."""
    cells = sorted(cells, key=lambda cell: cell.length)
    tasks, names = distinct(cells, "task"), distinct(cells, "checkpoint")
    size = 1 + 3.4 * len(names), 0.6 + 2.2 * len(tasks)
    figure, axes = report.figure_of(*size, len(tasks), len(names), squeeze=False)
    for (task, name), axis in zip(product(tasks, names), axes.flat):
        of = [cell for cell in cells if (cell.task, cell.checkpoint) == (task, name)]
        lengths, depths = distinct(of, "length"), distinct(of, "depth")
        rows = [[c.exact for c in of if c.depth == depth] for depth in depths]
        axis.imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
        axis.set_yticks(range(len(depths)), map(percent, depths))
        axis.set_title(f"{name}\n{task}", fontsize=8)
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = report.checkpoint_command("needles", __doc__, "needles")
    add, tasks = parser.add_argument, ["single", "multi-key"]
    add("--task", nargs="+", default=tasks, help=f"of {', '.join(TASKS)} (default: {tasks})")
    add("--lengths", nargs="+", type=int, help="tokens (default: .5 to 16 x the trained length)")
    depths = "0 is the beginning, 1 just before the question"
    add("--depths", nargs="+", type=float, default=[0, 0.25, 0.5, 0.75, 1], help=depths)
    add("--examples", type=int, default=8, help="in every cell (default: 8)")
    add("--seed", type=int, default=1)
    args = parser.parse(argv)
    report.at_least(1, examples=args.examples)
    report.at_least(0, seed=args.seed)
    if not all(0 <= depth <= 1 for depth in args.depths):
        given = " ".join(map(str, args.depths))
        raise ValueError(f"--depths {given}: a depth is between 0 (the beginning) and 1 (the end)")
    models, corpus = report.opened(args)
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)

    lengths = report.lengths_of(args.lengths, TIMES, models, "--lengths")
    tasks = list(dict.fromkeys(args.task))
    wanted = []
    for task, length in product(tasks, lengths):
        depths = [None] if task == "aggregation" else dict.fromkeys(args.depths)
        wanted += [(task, length, depth, args.examples, args.seed) for depth in depths]
    for cell in wanted:
        list(cell_examples(needles, *cell))  # ValueError before anything is measured

    every = report.progress(list(product(models.items(), wanted)))
    cells = [measure(model, needles, name, *cell) for (name, model), cell in every]
    shown = sorted(cells, key=lambda cell: (tasks.index(cell.task), cell.length))
    maps = []
    for name, task in product(models, tasks):
        maps.append(heat_map([c for c in shown if (c.checkpoint, c.task) == (name, task)]))
    report.write(cells, args.out, plot, "\n\n".join([*maps, comparison(shown)]))


if __name__ == "__main__":
    main()

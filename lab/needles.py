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
from lab.report import at_least, checkpoint_command, figure_of, lengths_of, opened, progress, write
from model import Transformer

SHADES = " ░▒▓█"
DEPTHS = [0, 0.25, 0.5, 0.75, 1]


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


def measure(
    model: Transformer,
    needles: Needles,
    name: str,
    task: str,
    length: int,
    depth: float | None,
    examples: int,
    seed: int,
) -> Cell:
    """A cell, scored."""
    made = cell_examples(needles, task, length, depth, examples, seed)
    exact, likely = zip(*(score(model, example) for example in made))
    return Cell(
        name, task, length, depth, examples, *mean_and_error(exact), *mean_and_error(likely)
    )


def heat_map(cells: list[Cell]) -> str:
    """One checkpoint on one task: a row a depth, a column a length."""
    lengths = sorted({cell.length for cell in cells})
    at = {(cell.depth, cell.length): cell for cell in cells}
    title = "exact / likelihood by the depth of the needle asked first"
    lines = [
        f"{cells[0].checkpoint}, {cells[0].task}: {title}",
        "  depth " + "".join(f"{n:>16,}" for n in lengths),
    ]
    for depth in dict.fromkeys(cell.depth for cell in cells):
        line = f"  {'any' if depth is None else f'{depth:.0%}':>5} "
        for cell in (at[depth, n] for n in lengths):
            shade = SHADES[round(cell.exact * (len(SHADES) - 1))] * 2
            line += f"   {shade} {cell.exact:.2f} / {cell.likelihood:.2f}"
        lines.append(line)
    return "\n".join(lines)


def comparison(cells: list[Cell]) -> str:
    """A row a checkpoint and task, a column a length: means over depths, with the standard error of
    the exact match."""
    lengths = sorted({cell.length for cell in cells})
    width = max(len(cell.checkpoint) for cell in cells)
    lines = [
        "exact ± error / likelihood, over all depths",
        " " * (width + 20) + "".join(f"{n:>20,}" for n in lengths),
    ]
    tasks, names = (distinct(cells, key) for key in ("task", "checkpoint"))
    for task, name in product(tasks, names):
        line = f"{name:<{width}}  {task:<18}"
        for n in lengths:
            of = [c for c in cells if (c.task, c.checkpoint, c.length) == (task, name, n)]
            error = np.sqrt(np.sum([c.exact_error**2 for c in of])) / len(of)
            exact, likely = (np.mean([getattr(c, key) for c in of]) for key in SCORES)
            line += f"{f'{exact:.2f} ± {error:.2f} / {likely:.2f}':>20}"
        lines.append(line)
    return "\n".join(lines)


SCORES = ("exact", "likelihood")


def distinct(rows: list, key: str) -> list:
    """The values of a field, each once, in order."""
    return list(dict.fromkeys(getattr(row, key) for row in rows))


def plot(cells: list[Cell], out: Path) -> None:
    """A heat map of exact match for each task (rows) and checkpoint (columns)."""
    tasks, names = distinct(cells, "task"), distinct(cells, "checkpoint")
    size = 1 + 3.4 * len(names), 0.6 + 2.2 * len(tasks)
    figure, axes = figure_of(*size, len(tasks), len(names), squeeze=False)
    for (i, task), (j, name) in product(enumerate(tasks), enumerate(names)):
        of = [cell for cell in cells if (cell.checkpoint, cell.task) == (name, task)]
        lengths, depths = sorted({c.length for c in of}), distinct(of, "depth")
        at = {(c.depth, c.length): c.exact for c in of}
        rows = [[at[d, n] for n in lengths] for d in depths]
        axes[i, j].imshow(rows, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes[i, j].set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
        labels = ["any" if d is None else f"{d:.0%}" for d in depths]
        axes[i, j].set_yticks(range(len(depths)), labels)
        axes[i, j].set_title(f"{name}\n{task}", fontsize=8)
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = checkpoint_command("needles", __doc__, "needles")
    tasks = f"of {', '.join(TASKS)} (default: single multi-key)"
    parser.add_argument("--task", nargs="+", default=["single", "multi-key"], help=tasks)
    lengths = "tokens (default: 0.5 to 16 times the trained length)"
    parser.add_argument("--lengths", nargs="+", type=int, help=lengths)
    depths = "0 is the beginning, 1 just before the question"
    parser.add_argument("--depths", nargs="+", type=float, default=DEPTHS, help=depths)
    parser.add_argument("--examples", type=int, default=8, help="in every cell (default: 8)")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse(argv)
    at_least(1, examples=args.examples)
    at_least(0, seed=args.seed)
    if not all(0 <= depth <= 1 for depth in args.depths):
        given = " ".join(map(str, args.depths))
        raise ValueError(f"--depths {given}: a depth is between 0 (the beginning) and 1 (the end)")
    models, corpus = opened(args)
    lengths = lengths_of(args.lengths, TIMES, models, "--lengths")
    tasks, depths = list(dict.fromkeys(args.task)), list(dict.fromkeys(args.depths))
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)

    wanted = []  # aggregation has no depth
    for task, length in product(tasks, lengths):
        for depth in depths if task != "aggregation" else [None]:
            wanted.append((task, length, depth))
            list(cell_examples(needles, *wanted[-1], args.examples, args.seed))  # all fit

    cells = []
    every = progress(list(product(models.items(), wanted)))
    for (name, model), cell in every:
        cells.append(measure(model, needles, name, *cell, args.examples, args.seed))
    maps = []
    for name, task in product(models, tasks):
        maps.append(heat_map([c for c in cells if (c.checkpoint, c.task) == (name, task)]))
    write(cells, args.out, plot, "\n\n".join([*maps, comparison(cells)]))


if __name__ == "__main__":
    main()

"""Needles by length and depth: exact match, and the right answer's likelihood against seven wrong ones (chance 1/8).

    python -m lab.needles out/laptop-R-s1/last out/laptop-r64r64r64N-s1/last
    python -m lab.needles CHECKPOINT --task single multi-key variable-tracking --lengths 512 4096 --depths 0 0.5 1

The tasks are RULER's (2404.06654) in small: data/needles.py says what each hides and asks. Prints a heat map (rows are depths)
and, for several checkpoints, a comparison; writes OUT.csv and OUT.png.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from commandline import choose_device, fail
from data.needles import TASKS, Example, Needles
from engine import prefill
from evaluate import TIMES, mean_and_error
from lab.report import check_out, checkpoint_command, least_trained, open_checkpoints, write
from model import Transformer

SHADES = " ░▒▓█"


@dataclass(frozen=True)
class Cell:
    """One checkpoint on one task at one length and depth. Errors are standard errors over examples (their answers share a context)."""

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
    """(exact, likelihood) of an example: the shares of its answers, scored in order, the right ones before them given.

    The prompt is prefilled once, by chunks; from its cache the right answer and the wrong ones go on together as a batch.
    """
    device = model.embed_tokens.weight.device
    tokens = torch.from_numpy(example.tokens).to(device)[None]
    cache, seen, exact, likely = model.new_cache(1, tokens.shape[1]), 0, [], []
    for question, wrong in enumerate(example.wrong):
        first, n = int((example.answer == question).argmax()), wrong.shape[1]
        candidates = torch.cat(
            (tokens[:, first : first + n], torch.from_numpy(wrong).to(device))
        )  # (8 n)
        logits = prefill(model, tokens[:, seen:first], cache)[:, None].expand(
            len(candidates), -1, -1
        )
        if n > 1:
            logits = torch.cat(
                (logits, model(candidates[:, :-1], cache=cache.fork(len(candidates)))), dim=1
            )
        logp = logits.float().log_softmax(-1)
        exact.append(torch.equal(logp[0].argmax(-1), candidates[0]))
        likelihoods = logp.gather(2, candidates[:, :, None]).sum((1, 2))
        likely.append((likelihoods[0] > likelihoods[1:]).all().item())
        seen = first
    return float(np.mean(exact)), float(np.mean(likely))


def cell_examples(
    needles: Needles, task: str, length: int, depth: float | None, count: int, seed: int
) -> Iterator[Example]:
    """The examples of a cell, the same for every checkpoint, others in every cell. Raises ValueError where one does not fit."""
    cell = [seed, length] if depth is None else [seed, length, round(1000 * depth) + 1]
    return (
        needles.task(task, np.random.default_rng([*cell, i]), length, depth) for i in range(count)
    )


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
    exact, likely = zip(
        *(
            score(model, example)
            for example in cell_examples(needles, task, length, depth, examples, seed)
        )
    )
    return Cell(
        name, task, length, depth, examples, *mean_and_error(exact), *mean_and_error(likely)
    )


def heat_map(cells: list[Cell]) -> str:
    """One checkpoint on one task: a row a depth, a column a length, exact match and likelihood in every cell."""
    lengths = sorted({cell.length for cell in cells})
    at = {(cell.depth, cell.length): cell for cell in cells}
    lines = [
        f"{cells[0].checkpoint}, {cells[0].task}: exact / likelihood by the depth of the needle asked first",
        "  depth " + "".join(f"{n:>16,}" for n in lengths),
    ]
    for depth in dict.fromkeys(cell.depth for cell in cells):
        row = [at[depth, n] for n in lengths]
        shade = lambda x: SHADES[round(x * (len(SHADES) - 1))] * 2
        lines.append(
            f"  {'any' if depth is None else f'{depth:.0%}':>5} "
            + "".join(f"   {shade(c.exact)} {c.exact:.2f} / {c.likelihood:.2f}" for c in row)
        )
    return "\n".join(lines)


def comparison(cells: list[Cell]) -> str:
    """A row a checkpoint and task, a column a length: means over depths, with the standard error of the exact match."""
    lengths = sorted({cell.length for cell in cells})
    width = max(len(cell.checkpoint) for cell in cells)
    lines = [
        "exact ± error / likelihood, over all depths",
        " " * (width + 20) + "".join(f"{n:>20,}" for n in lengths),
    ]
    for task in dict.fromkeys(cell.task for cell in cells):
        for name in dict.fromkeys(cell.checkpoint for cell in cells):
            row = []
            for n in lengths:
                met = [
                    cell
                    for cell in cells
                    if (cell.task, cell.checkpoint, cell.length) == (task, name, n)
                ]
                error = np.sqrt(np.sum([cell.exact_error**2 for cell in met])) / len(met)
                row.append(
                    f"{np.mean([c.exact for c in met]):.2f} ± {error:.2f} / {np.mean([c.likelihood for c in met]):.2f}"
                )
            lines.append(f"{name:<{width}}  {task:<18}" + "".join(f"{cell:>20}" for cell in row))
    return "\n".join(lines)


def plot(cells: list[Cell], out: Path) -> None:
    """A heat map of exact match for each task (rows) and checkpoint (columns)."""
    from matplotlib.figure import Figure

    tasks, names = (
        list(dict.fromkeys(getattr(cell, key) for cell in cells)) for key in ("task", "checkpoint")
    )
    figure = Figure(figsize=(1 + 3.4 * len(names), 0.6 + 2.2 * len(tasks)), layout="constrained")
    axes = figure.subplots(len(tasks), len(names), squeeze=False)
    for i, task in enumerate(tasks):
        for j, name in enumerate(names):
            met = [cell for cell in cells if (cell.task, cell.checkpoint) == (task, name)]
            lengths, depths = (
                sorted({c.length for c in met}),
                list(dict.fromkeys(c.depth for c in met)),
            )
            at = {(c.depth, c.length): c.exact for c in met}
            axes[i, j].imshow(
                [[at[d, n] for n in lengths] for d in depths],
                vmin=0,
                vmax=1,
                cmap="RdYlGn",
                aspect="auto",
            )
            axes[i, j].set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], rotation=45)
            axes[i, j].set_yticks(
                range(len(depths)), ["any" if d is None else f"{d:.0%}" for d in depths]
            )
            axes[i, j].set_title(f"{name}\n{task}", fontsize=8)
    figure.savefig(out, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = checkpoint_command("needles", __doc__, "needles")
    parser.add_argument(
        "--task",
        nargs="+",
        default=["single", "multi-key"],
        help=f"of {', '.join(TASKS)} (default: single multi-key)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=int,
        help="tokens (default: 0.5 to 16 times the trained length)",
    )
    parser.add_argument(
        "--depths",
        nargs="+",
        type=float,
        default=[0, 0.25, 0.5, 0.75, 1],
        help="0 is the beginning, 1 just before the question",
    )
    parser.add_argument("--examples", type=int, default=8, help="in every cell (default: 8)")
    parser.add_argument("--seed", type=int, default=1)
    try:
        args = parser.parse(argv)
        device, _ = choose_device(args.device)
        if args.examples < 1 or args.seed < 0:
            raise ValueError(
                f"--examples {args.examples} must be at least 1 and --seed {args.seed} at least 0"
            )
        if not all(0 <= depth <= 1 for depth in args.depths):
            raise ValueError(
                f"--depths {' '.join(map(str, args.depths))}: a depth is between 0 (the beginning) and 1 (just before the question)"
            )
        models, corpus = open_checkpoints(args.checkpoints, args.data, device)
        lengths = args.lengths or [
            int(times * least_trained(models, "--lengths")) for times in TIMES
        ]
        tasks, lengths, depths = (
            list(dict.fromkeys(values)) for values in (args.task, lengths, args.depths)
        )
        needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
        wanted = [
            (task, length, depth)
            for task in tasks
            for length in lengths
            for depth in (depths if task != "aggregation" else [None])
        ]
        for cell in wanted:
            for _ in cell_examples(needles, *cell, args.examples, args.seed):
                pass  # raises where one does not fit
        check_out(args.out)
    except (ValueError, OSError) as error:
        fail(error)
    cells: list[Cell] = []
    for name, model in models.items():
        for cell in wanted:
            cells.append(measure(model, needles, name, *cell, args.examples, args.seed))
            print(
                f"\r{len(cells)} of {len(models) * len(wanted)} cells",
                end="",
                file=sys.stderr,
                flush=True,
            )
    print(file=sys.stderr)
    for name in models:
        for task in tasks:
            print(
                heat_map([cell for cell in cells if (cell.checkpoint, cell.task) == (name, task)]),
                end="\n\n",
            )
    print(comparison(cells))
    write(cells, args.out, plot)


if __name__ == "__main__":
    main()

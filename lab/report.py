"""What the lab's commands share: checkpoints to measure, what-ifs, tables, plots and files."""

import csv
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from statistics import fmean

import numpy as np
from tqdm import tqdm

from checkpoint import read_json
from commandline import CommandLine, choose_device
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, require
from recipe import TREATMENT, parsed

progress = partial(tqdm, leave=False, disable=None)  # a bar where the output is a terminal
LEARNED = 0.8  # exact match at the trained length; below, a run says nothing about length


def checkpoint_command(name: str, description: str, flag="--lengths") -> CommandLine:
    """The command lab.`name` over checkpoints: what to measure, at which lengths, and where to."""
    parser = CommandLine(prog=f"python -m lab.{name}", description=description)
    add, out = parser.add_argument, name.replace("_", "-")
    treated = "positions treated otherwise: pattern=rrrR rope_theta=2e6"
    several = {"nargs": "+", "action": "extend", "default": [], "metavar": "FIELD=VALUE"}
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    add("--set", **several, help=treated)
    add("--data", type=Path, help="a corpus (default: the run's own)")
    lengths = {"nargs": "+", "type": int, "dest": "lengths", "metavar": "TOKENS"}
    add(flag, **lengths, help="default: up to 16 times the trained length")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--out", type=Path, default=Path(out), help=f"OUT.csv, OUT.png (default: {out})")
    return parser


def open_checkpoints(
    args: Namespace, times: Sequence[float]
) -> tuple[dict[str, Transformer], Corpus, list[int]]:
    """The models of such a command under --set, by path and settings; the corpus to measure all of
    them on: --data, else the runs' own, else the default; and growing lengths: those given, else so
    many times the shortest trained one. OSError or ValueError where anything cannot be so."""
    for name, value in vars(args).items():
        if type(value) is int:
            at_least(0 if name == "seed" else 1, **{name: value})
    for length in args.lengths or []:
        require(length > 0, f"{length} tokens are no length: give 1 or more")
    device, _ = choose_device(args.device)
    models = {}
    for path in args.checkpoints:
        model = Transformer.from_pretrained(path, device)
        model.config = what_if(model.config, args.set)
        models[" ".join([str(path), *args.set])] = model
    wanted = {args.data or corpus_of(path) for path in args.checkpoints}
    corpus, *others = [load_corpus(folder) for folder in wanted]
    folders = ", ".join(sorted(str(each.folder) for each in (corpus, *others)))
    one = {each.hash for each in others} <= {corpus.hash}
    require(one, f"these runs have different corpora ({folders}): choose one with --data")
    for path in args.checkpoints:
        same = load_tokenizer(path).hash == corpus.tokenizer.hash
        differ = f"the checkpoint {path} and the corpus {corpus.folder} have different tokenizers"
        require(same, f"{differ}: give the checkpoint's own corpus with --data")
    lengths = args.lengths
    if lengths is None:
        trained = {name: model.config.trained_length for name, model in models.items()}
        for name, length in trained.items():
            require(length, f"{name} does not say its trained length: say at which to measure")
        lengths = [int(factor * min(trained.values())) for factor in times]
    for ending in ("csv", "png"):
        check_out(Path(f"{args.out}.{ending}"))
    return models, corpus, sorted(set(lengths))


def what_if(config: ModelConfig, settings: list[str]) -> ModelConfig:
    """The configuration under words FIELD=VALUE that say how positions are treated. ValueError for
    one that is none, or that asks for weights which the model does not have."""
    kinds = {f.name: f.type for f in fields(ModelConfig)}
    changes = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        near = get_close_matches(name, TREATMENT, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]}=...?" if near else f"it takes {', '.join(TREATMENT)}"
        if name in kinds and name not in TREATMENT:
            mend = f"{name} is part of the trained model"
        known = name in TREATMENT and equals
        require(known, f"--set {setting} is no FIELD=VALUE that can change: {mend}")
        changes[name] = parsed(kinds[name], value, f"--set {name}")
    owned = changes.get("length_scale") != "ssmax" or config.length_scale == "ssmax"
    require(owned, "--set length_scale=ssmax: the model was trained without its weights")
    return replace(config, **changes)


def corpus_of(checkpoint: Path) -> Path:
    """The corpus of a checkpoint's run, the default where it is not recorded."""
    record = Path(checkpoint).absolute().parent / "run.json"
    try:
        return Path(read_json(record)["recipe"]["data"])
    except FileNotFoundError:
        return DEFAULT_CORPUS
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error}): name the corpus with --data") from None


def trained_length(recipe: dict) -> int:
    """The longest length of a recipe's phases, in tokens."""
    return max(int(length) for phase in recipe["phase"] for length in phase["lengths"])


def at_least(least: int, **values: int) -> None:
    """ValueError for a flag's value below `least`."""
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        require(value >= least, f"{flag} {value} must be at least {least}")


def check_out(file: Path) -> None:
    """OSError where a file cannot be written; leaves none behind."""
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{file.parent} is no folder: --out begins with one that exists")
    is_new = not file.exists()
    file.open("a").close()
    if is_new:
        file.unlink()


def write_rows(rows: list, path: Path) -> None:
    """A CSV with a line for each of `rows`, named tuples of one kind."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([rows[0]._fields, *rows])


def write(rows: list, out: Path, plot: Callable, text: str) -> None:
    """OUT.csv, a line for each of `rows`, and OUT.png, drawn by plot(rows, path); then the text,
    which a full disk does not take."""
    try:
        write_rows(rows, Path(f"{out}.csv"))
        plot(rows, Path(f"{out}.png"))
    finally:
        print(text)
    print(f"written to {out}.csv and {out}.png")


def grouped(rows: Iterable, field: str) -> dict:
    """The rows by their value of a field, each value where it comes first."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def heading(value) -> str:
    """A field's value at the head of a row or column: tokens, a share, a name, or None."""
    if value is None:
        return "any"
    return format(value, {float: ".0%", int: ","}.get(type(value), ""))


def pivot(rows: Iterable, down: str, across: str, cell: Callable[[list], str]) -> str:
    """A table for a terminal: a line for each value of a field, a column for each of another, and
    there what `cell` says of the rows that have both."""
    lines = [[down, *map(heading, grouped(rows, across))]]
    for value, line in grouped(rows, down).items():
        lines.append([heading(value), *map(cell, grouped(line, across).values())])
    return aligned(lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, its columns flush right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(map(str.rjust, line, widths)) for line in lines)


def listing(rows: list) -> str:
    """The same of named tuples of one kind: all their fields."""
    said = lambda value: f"{value:.4g}" if isinstance(value, float) else heading(value)
    return aligned([rows[0]._fields, *([said(value) for value in row] for row in rows)])


def figure_of(width: float, height: float, *shape: int, **options):
    """A matplotlib figure, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def plot_lines(rows: list, x: str, line: str, panels: dict, out: Path, lengths=False) -> None:
    """A PNG: a panel a field, with its title; a line for each value of `line`, through the means of
    rows that share an x, within their range, give or take their `error`."""
    figure, drawn = figure_of(3 + 3.2 * len(panels), 3.8, 1, len(panels), squeeze=False)
    for axis, (field, title) in zip(drawn[0], panels.items()):
        for name, of in grouped(rows, line).items():
            points = grouped((row for row in of if hasattr(row, field)), x)
            values = [[getattr(row, field) for row in same] for same in points.values()]
            errors = [max(getattr(row, "error", 0) for row in same) for same in points.values()]
            low, high = (list(map(end, values)) for end in (min, max))
            (mean,) = axis.plot(list(points), list(map(fmean, values)), marker=".", label=name)
            band = np.subtract(low, errors), np.add(high, errors)
            axis.fill_between(list(points), *band, color=mean.get_color(), alpha=0.15)
        axis.set(title=title, xlabel=x)
        axis.grid(alpha=0.3)
        if lengths:
            length_axis(axis, list(grouped(rows, x)))
        if "exact" in title:  # a share
            axis.set_ylim(-0.03, 1.03)
    drawn[0, -1].legend(fontsize=8)
    figure.savefig(out, dpi=120)


def length_axis(axis, lengths: Sequence[int]) -> None:
    """Context lengths on a logarithmic x axis, each with its tick."""
    axis.set(xscale="log", xlabel="context, tokens")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)

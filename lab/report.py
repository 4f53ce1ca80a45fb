"""What the lab's commands share: checkpoints to measure, what-ifs, tables, plots and files."""

import csv
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path

from tqdm import tqdm

from checkpoint import read_json
from commandline import CommandLine, choose_device
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, require
from recipe import TREATMENT, parsed

LEARNED = 0.8  # exact match at the trained length; below, a run says nothing about length


def checkpoint_command(name: str, description: str) -> CommandLine:
    """The command lab.`name` over checkpoints: their folders, --set, --data, --device and --out."""
    parser = CommandLine(prog=f"python -m lab.{name}", description=description)
    add = parser.add_argument
    out = name.replace("_", "-")
    add("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    what = "positions treated otherwise: pattern=rrrR rope_theta=2e6"
    add("--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help=what)
    add("--data", type=Path, help="a corpus (default: the run's own)")
    add("--device", help="default: cuda where there is one, else cpu")
    add("--out", type=Path, default=Path(out), help=f"OUT.csv, OUT.png (default: {out})")
    return parser


def open_checkpoints(args: Namespace) -> tuple[dict[str, Transformer], Corpus]:
    """The models of such a command under --set, by path and settings, and the corpus to measure all
    of them on: --data, else the runs' own, else the default. OSError or ValueError: where --out
    cannot be written, runs with different corpora, or a corpus with another tokenizer, included."""
    device, _ = choose_device(args.device)
    models = {}
    for path in args.checkpoints:
        model = Transformer.from_pretrained(path, device)
        model.config = what_if(model.config, args.set)
        models[" ".join([str(path), *args.set])] = model

    wanted = {args.data or corpus_of(path) for path in args.checkpoints}
    corpora = [load_corpus(folder) for folder in wanted]
    folders = ", ".join(sorted(str(corpus.folder) for corpus in corpora))
    one = len({corpus.hash for corpus in corpora}) == 1
    require(one, f"these runs have different corpora ({folders}): choose one with --data")
    for path in args.checkpoints:
        same = load_tokenizer(path).hash == corpora[0].tokenizer.hash
        differ = (
            f"the checkpoint {path} and the corpus {corpora[0].folder} have different tokenizers"
        )
        require(same, f"{differ}: give the checkpoint's own corpus with --data")
    check_out(args.out)
    return models, corpora[0]


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


def lengths_of(
    given: list[int] | None, times: Sequence[float], models: dict[str, Transformer], flag: str
) -> list[int]:
    """The lengths given with a flag, in tokens, else so many times the shortest trained length:
    growing. ValueError where a model does not say its own."""
    if given is None:
        trained = [model.config.trained_length for model in models.values()]
        for name, length in zip(models, trained):
            require(length is not None, f"{name} does not say its trained length: give {flag}")
        given = [int(factor * min(trained)) for factor in times]
    return sorted(set(given))


def at_least(least: int, **values: int) -> None:
    """ValueError for a flag's value below `least`."""
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        require(value >= least, f"{flag} {value} must be at least {least}")


def progress(items: Iterable, total: int | None = None) -> Iterable:
    """The items, with a bar where the output is a terminal."""
    return tqdm(items, total=total, leave=False, disable=None)


def check_out(out: Path) -> None:
    """OSError where OUT.csv cannot be written: before anything is measured, not after. Leaves no
    file behind."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: --out begins with one that exists")
    path = Path(f"{out}.csv")
    is_new = not path.exists()
    path.open("a").close()
    if is_new:
        path.unlink()


def write_rows(rows: list, path: Path) -> None:
    """A CSV with a line for each of `rows`, dataclasses of one kind."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(map(asdict, rows))


def write(rows: list, out: Path, plot: Callable, text: str) -> None:
    """OUT.csv, a line for each of `rows`, and OUT.png, drawn by plot(rows, path); then the text."""
    write_rows(rows, Path(f"{out}.csv"))
    plot(rows, Path(f"{out}.png"))
    print(f"{text}\nwritten to {out}.csv and {out}.png")


def grouped(rows: Iterable, field: str) -> dict:
    """The rows by their value of a field, each value where it comes first."""
    groups: dict = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def distinct(rows: Iterable, field: str) -> list:
    """The values of a field, each once, in order."""
    return list(grouped(rows, field))


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table for a terminal, its columns flush right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(map(str.rjust, row, widths)) for row in rows)


def figure_of(width: float, height: float, *shape: int, **options):
    """A matplotlib figure, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def length_axis(axis, lengths: Sequence[int]) -> None:
    """Context lengths on a logarithmic x axis, each with its tick."""
    axis.set(xscale="log", xlabel="context, tokens")
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)

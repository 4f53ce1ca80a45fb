"""What the lab's commands share: checkpoints to measure, what-ifs, tables, plots and files."""

import csv
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from tqdm import tqdm

from commandline import CommandLine, choose_device
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer
from recipe import TREATMENT, parsed


def checkpoint_command(name: str, description: str, out: str) -> CommandLine:
    """A command over checkpoints: their folders, --set, --data, --device and --out."""
    parser = CommandLine(prog=f"python -m lab.{name}", description=description)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="what if positions were treated otherwise: pattern=rrrR rope_theta=2e6 ...",
    )
    parser.add_argument("--data", type=Path, help="a corpus (default: the run's own)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"OUT.csv, OUT.png ({out})")
    return parser


def opened(args: Namespace) -> tuple[dict[str, Transformer], Corpus]:
    """The models of a checkpoint command by the name that its tables give them, under --set, and
    their corpus. OSError or ValueError where one cannot be measured, or --out not be written."""
    device, _ = choose_device(args.device)
    models, corpus = open_checkpoints(args.checkpoints, args.data, device)
    changes = what_if(args.set)
    for model in models.values():
        if changes.get("length_scale") == "ssmax" != model.config.length_scale:
            raise ValueError("--set length_scale=ssmax: this model has no weights for it")
        model.config = replace(model.config, **changes)
    check_out(args.out)
    return {" ".join([name, *args.set]): model for name, model in models.items()}, corpus


def what_if(settings: list[str]) -> dict:
    """Fields of ModelConfig from words FIELD=VALUE: those that say how positions are treated."""
    kinds = {f.name: f.type for f in fields(ModelConfig) if f.name in TREATMENT}
    changes = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or name not in kinds:
            near = get_close_matches(name, kinds, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]}?" if near else f"it takes {', '.join(kinds)}"
            raise ValueError(f"--set {setting!r} is no FIELD=VALUE that can change; {mend}")
        changes[name] = parsed(kinds[name], value, f"--set {name}")
    return changes


def open_checkpoints(
    paths: list[Path], data: Path | None, device: torch.device
) -> tuple[dict[str, Transformer], Corpus]:
    """The model in each folder, by path, and the corpus to measure all of them on: `data`, else the
    runs' own, else the default. OSError or ValueError: a corpus with another tokenizer, or runs
    with different corpora, included."""
    models = {str(path): Transformer.from_pretrained(path, device) for path in paths}
    corpora = [load_corpus(folder) for folder in {data or corpus_of(path) for path in paths}]
    if len({corpus.hash for corpus in corpora}) > 1:
        folders = ", ".join(sorted(str(corpus.folder) for corpus in corpora))
        raise ValueError(
            f"these runs have different corpora ({folders}): say with --data on which to measure "
            "them"
        )
    for path in paths:
        if load_tokenizer(path).hash != corpora[0].tokenizer.hash:
            raise ValueError(
                f"the checkpoint {path} and the corpus {corpora[0].folder} have different "
                "tokenizers: give the checkpoint's own corpus with --data"
            )
    return models, corpora[0]


def corpus_of(checkpoint: Path) -> Path:
    """The corpus of a checkpoint's run, the default where it is not recorded."""
    record = Path(checkpoint).absolute().parent / "run.json"
    try:
        return Path(json.loads(record.read_bytes())["recipe"]["data"])
    except FileNotFoundError:
        return DEFAULT_CORPUS
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{record} is damaged ({error}): name the corpus with --data") from None


def lengths_of(
    given: list[int] | None, times: Sequence[float], models: dict[str, Transformer], flag: str
) -> list[int]:
    """The lengths given with a flag, in tokens, else so many times the shortest trained length.
    ValueError where a model does not say its own."""
    if given:
        return list(dict.fromkeys(given))
    for path, model in models.items():
        if model.config.trained_length is None:
            raise ValueError(f"{path} does not say its trained length: give {flag}")
    shortest = min(model.config.trained_length for model in models.values())
    return [int(factor * shortest) for factor in times]


def at_least(least: int, **values: int) -> None:
    """ValueError for a flag's value below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least {least}")


def progress(items: Iterable, total: int | None = None) -> Iterable:
    """The items, with a bar where the output is a terminal."""
    return tqdm(items, total=total, leave=False, disable=None)


def check_out(out: Path) -> None:
    """OSError where OUT.csv cannot be written: before anything is measured, not after."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: --out begins with one that exists")
    open(f"{out}.csv", "a").close()


def write_rows(rows: list, path: Path) -> None:
    """A CSV with a line for each of `rows`, dataclasses of one kind."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write(rows: list, out: Path, plot: Callable, text: str) -> None:
    """OUT.csv, a line for each of `rows`, and OUT.png, drawn by plot(rows, path); then the text."""
    write_rows(rows, Path(f"{out}.csv"))
    plot(rows, Path(f"{out}.png"))
    print(f"{text}\nwritten to {out}.csv and {out}.png")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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

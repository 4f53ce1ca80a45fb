"""What the lab's commands share: the flags of those that measure checkpoints, and where their files go."""

import argparse
import csv
import json
from dataclasses import asdict
from pathlib import Path

import torch

from commandline import CommandLine
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.tokenizer import load_tokenizer
from model import Transformer


def checkpoint_command(name: str, description: str, out: str) -> CommandLine:
    """A command over checkpoints: their folders, --data, --device and --out."""
    parser = CommandLine(
        prog=f"python -m lab.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, help="a corpus (default: the run's own)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(out), help=f"OUT.csv and OUT.png (default: {out})"
    )
    return parser


def check_out(out: Path) -> None:
    """OSError where OUT.csv cannot be written: before anything is measured, not after."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: --out begins with one that exists")
    open(f"{out}.csv", "a").close()


def write_rows(rows: list, path: Path) -> None:
    """A CSV with a line for each of `rows`, dataclasses of one kind."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def write(rows: list, out: Path, plot) -> None:
    """OUT.csv, a line for each of `rows`, and OUT.png, drawn by plot(rows, path)."""
    write_rows(rows, Path(f"{out}.csv"))
    plot(rows, Path(f"{out}.png"))
    print(f"written to {out}.csv and {out}.png")


def open_checkpoints(
    paths: list[Path], data: Path | None, device: torch.device
) -> tuple[dict[str, Transformer], Corpus]:
    """The model in each folder, by path, and the corpus to measure all of them on: `data`, else the runs' own, else the default.

    Raises OSError or ValueError: a corpus with another tokenizer, or runs with different corpora, included.
    """
    models = {str(path): Transformer.from_pretrained(path, device) for path in paths}
    corpora = [load_corpus(folder) for folder in {data or corpus_of(path) for path in paths}]
    if len({corpus.hash for corpus in corpora}) > 1:
        raise ValueError(
            f"these runs have different corpora ({', '.join(sorted(str(corpus.folder) for corpus in corpora))}): say with --data on which to measure them"
        )
    for path in paths:
        if load_tokenizer(path).hash != corpora[0].tokenizer.hash:
            raise ValueError(
                f"the checkpoint {path} and the corpus {corpora[0].folder} have different tokenizers: give the checkpoint's own corpus with --data"
            )
    return models, corpora[0]


def corpus_of(checkpoint: Path) -> Path:
    """The corpus that the run of a checkpoint was trained on, the default where it is not recorded."""
    record = Path(checkpoint).absolute().parent / "run.json"
    try:
        return Path(json.loads(record.read_text())["recipe"]["data"])
    except FileNotFoundError:
        return DEFAULT_CORPUS
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged ({error}): name the corpus with --data") from None


def least_trained(models: dict[str, Transformer], flag: str) -> int:
    """The shortest trained length among the models, in tokens. Raises ValueError where one does not say it."""
    for path, model in models.items():
        if model.config.trained_length is None:
            raise ValueError(f"{path} does not say its trained length: give {flag}")
    return min(model.config.trained_length for model in models.values())

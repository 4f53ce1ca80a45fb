"""What the lab's commands share: the flags of those that measure checkpoints, and where their files go."""

import argparse
import csv
from dataclasses import asdict
from pathlib import Path

from data.commandline import CommandLine


def checkpoint_command(name: str, description: str, out: str) -> CommandLine:
    """A command over checkpoints: their folders, --data, --device and --out."""
    parser = CommandLine(prog=f"python -m lab.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--data", type=Path, help="a corpus (default: the run's own)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--out", type=Path, default=Path(out), help=f"OUT.csv and OUT.png (default: {out})")
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

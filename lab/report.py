"""What the lab's commands share: where their files go."""

import csv
from dataclasses import asdict
from pathlib import Path


def check_out(out: Path) -> None:
    """OSError where OUT.csv cannot be written: before anything is measured, not after."""
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: --out begins with one that exists")
    open(f"{out}.csv", "a").close()


def write(rows: list, out: Path, plot) -> None:
    """OUT.csv, a line for each of `rows` (dataclasses of one kind), and OUT.png, drawn by plot(rows, path)."""
    with open(f"{out}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    plot(rows, Path(f"{out}.png"))
    print(f"written to {out}.csv and {out}.png")

"""Losses and needle accuracy of runs, from their logs.

python -m lab.curves out/laptop-r64r64r64N-s1 out/laptop-R-s1 [--out curves.png]
"""

import argparse
import json
from pathlib import Path

from commandline import CommandLine, fail


def read_log(run: Path) -> list[dict]:
    """The entries of a run's log.jsonl. Raises OSError where there is none and ValueError where it is damaged."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} not found: give the folder of a run, such as `python train.py` leaves under out/"
        )
    try:
        entries = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): resume the run, which mends its log"
        ) from None
    if not entries:
        raise ValueError(f"{path} is empty: the run has not made a step")
    return entries


def plot(logs: dict[str, list[dict]], out: Path) -> None:
    """Three panels against the step: training loss (running mean of 10), validation loss, needle exact match."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, validation, needles = figure.subplots(1, 3)
    for name, entries in logs.items():
        training = [(e["step"], e["loss"]) for e in entries if "loss" in e]
        if training:
            values = [value for _, value in training]
            smooth = [
                sum(values[max(0, i - 9) : i + 1]) / len(values[max(0, i - 9) : i + 1])
                for i in range(len(values))
            ]
            losses.plot([step for step, _ in training], smooth, label=name)
        for axis, key in ((validation, "val_loss"), (needles, "needles")):
            points = [(e["step"], e[key]) for e in entries if key in e]
            axis.plot(
                [step for step, _ in points], [value for _, value in points], marker=".", label=name
            )
    for axis, title in (
        (losses, "training loss (with needles)"),
        (validation, "validation loss, nats per token"),
        (needles, "needle exact match"),
    ):
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    needles.set_ylim(-0.02, 1.02)
    losses.legend(fontsize=8)
    figure.savefig(out, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(
        prog="python -m lab.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="default: curves.png")
    try:
        args = parser.parse(argv)
        logs = {run.name: read_log(run) for run in args.runs}
        if args.out.parent.is_dir() is False:
            raise FileNotFoundError(
                f"{args.out.parent} is no folder: --out names a file in one that exists"
            )
    except (ValueError, OSError) as error:
        fail(error)
    plot(logs, args.out)
    for name, entries in logs.items():
        last = {
            key: value for entry in entries for key, value in entry.items()
        }  # of each key the newest value
        print(
            f"{name}: step {last['step']}, validation loss {last.get('val_loss', float('nan')):.4f}, needles {last.get('needles', 'n/a')}"
        )
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

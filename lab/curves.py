"""Losses and needle accuracy of runs, from their logs.

python -m lab.curves out/laptop-r64r64r64N-s1 out/laptop-R-s1 [--out curves.png]
"""

import json
import math
from collections import deque
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

from checkpoint import typed
from commandline import CommandLine, guarded
from lab.report import check_out, plot_lines
from model import require

PANELS = {
    "loss": "training loss (with needles)",
    "val_loss": "validation loss, nats per token",
    "needles": "needle exact match",
}


def read_log(run: Path) -> list[dict]:
    """The entries of a run's log.jsonl; OSError where it is missing, ValueError where damaged."""
    path = run / "log.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: give a run's folder, as train.py leaves them")
    try:
        entries = [json.loads(line) for line in path.read_bytes().splitlines()]
        for entry in entries:
            require(isinstance(entry, dict) and "step" in entry, "an entry has no step")
            typed(int, entry["step"], "step")
            for key in ("loss", "val_loss", "needles", "seconds"):
                typed(float, entry.get(key, 0.0), key)
    except (ValueError, TypeError, RecursionError) as error:
        mend = "resume the run, which mends its end, or take that line out"
        raise ValueError(f"{path} is damaged ({error}): {mend}") from None
    require(entries, f"{path} is empty: the run has not made a step")
    return entries


def plot(logs: dict[str, list[dict]], out: Path) -> None:
    """Against the step: training loss (running mean of 10), validation loss, needles."""
    rows = []
    for run, entries in logs.items():
        lately = deque(maxlen=10)
        for entry in entries:
            if "loss" in entry:
                lately.append(entry["loss"])
                entry = entry | {"loss": fmean(lately)}
            rows.append(SimpleNamespace(run=run, **entry))
    plot_lines(rows, "step", "run", PANELS, out)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(prog="python -m lab.curves", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="(curves.png)")
    args = parser.parse(argv)
    apart = len({run.name for run in args.runs}) == len(set(args.runs))
    logs = {run.name if apart else str(run): read_log(run) for run in args.runs}
    if args.out.name and not args.out.is_dir() and not args.out.suffix:
        args.out = args.out.with_suffix(".png")
    check_out(args.out)
    plot(logs, args.out)
    for name, entries in logs.items():
        newest = {key: value for entry in entries for key, value in entry.items()}
        loss = f"validation loss {newest.get('val_loss', math.nan):.4f}"
        print(f"{name}: step {newest['step']}, {loss}, needles {newest.get('needles', 'n/a')}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

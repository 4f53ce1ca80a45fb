"""The final tables of runs as one page of Markdown, from what the runs recorded.

python -m lab.table out/laptop-* --title "The laptop recipe" --plot results/laptop.png
"""

import shlex
from pathlib import Path
from statistics import median

from checkpoint import read_json
from commandline import CommandLine, guarded
from lab.curves import read_log
from lab.report import figure_of, length_axis, markdown
from model import require

LEARNED = 0.8  # exact match at the trained length; below, a row says nothing about length
PAGE = """\
# {title}

Needles found on held-out text with held-out keys and values: exact match of whole answers, and \
its standard error, over {questions} questions a length. Validation loss on plain text. Printed by \
`python -m lab.table RUN...` from the runs of these commands:
NoPE layers begin with queries half like their keys (run.py), RoPE layers do not: speeds of \
learning differ by that too.

```sh
{commands}
```

Corpus {corpus}, Python {python}, torch {torch}, on {device}, {threads} threads; times are of the \
training steps.

{table}

A row below {learned} at the trained length is "not learned in this time": it says nothing about \
length."""


def read_run(folder: Path) -> dict:
    """What a finished run recorded: its run.json, its final entry, the seconds that its steps took,
    and from these its pattern, its command without the folder that it was told to write to, its
    longest trained length in tokens, and its needle scores by length. Raises OSError or
    ValueError."""
    entries, path = read_log(folder), folder / "run.json"
    final = next((entry for entry in reversed(entries) if entry.get("final")), None)
    unfinished = f"{folder} has no final evaluation: let it finish, with --resume {folder}"
    require(final is not None, unfinished)
    try:
        run = read_json(path)
        model, words = run["recipe"]["model"], list(run["arguments"])
        if "--out" in words:
            del words[words.index("--out") : words.index("--out") + 2]
        return run | {
            "final": final,
            "seconds": sum(entry.get("seconds", 0) for entry in entries),
            "name": f"`{model['pattern']}`" + (" QK-Norm" if model["qk_norm"] else ""),
            "command": shlex.join(["python", "train.py", *words]),
            "trained": max(int(n) for phase in run["recipe"]["phase"] for n in phase["lengths"]),
            "scores": {score["length"]: score for score in final["table"]},
        }
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): run it again") from None


def page(runs: list[dict], title: str) -> str:
    """Markdown: how it was measured, then a row a run."""
    scores = runs[0]["scores"]
    head = ["pattern", "seed", "nats per token", "bits per byte"]
    head += [*(f"{n:,}" for n in scores), "minutes", ""]
    machines = {}
    for key in ("corpus", "python", "torch", "device", "threads"):
        machines[key] = ", ".join(sorted({str(run[key]) for run in runs}))
    return PAGE.format(
        title=title,
        questions=max((score["questions"] for score in scores.values()), default=0),
        commands="\n".join(run["command"] for run in runs),
        table=markdown(head, [row(run, list(scores)) for run in runs]).replace("|  |", "| |", 1),
        learned=LEARNED,
        **machines,
    )


def row(run: dict, lengths: list[int]) -> list[str]:
    """A run's cells."""
    final, scores = run["final"], run["scores"]
    cells = [run["name"], str(run["recipe"]["seed"])]
    cells += [f"{final['val_loss']:.3f}", f"{final['val_bits_per_byte']:.3f}"]
    for n in lengths:
        score = scores.get(n)
        cells.append(f"{score['exact']:.2f} ± {score['error']:.2f}" if score else "")
    trained = scores.get(run["trained"], {"exact": 0})
    learned = trained["exact"] >= LEARNED
    return [*cells, f"{run['seconds'] / 60:.1f}", "" if learned else "not learned in this time"]


def plot(runs: list[dict], out: Path) -> None:
    """Exact match against context length, a line for each pattern, with its seeds' range."""
    figure, axis = figure_of(7, 3.6)
    for name in dict.fromkeys(run["name"] for run in runs):
        seeds = [run["scores"] for run in runs if run["name"] == name]
        lengths = sorted(set.intersection(*map(set, seeds)))
        values = [[scores[n]["exact"] for scores in seeds] for n in lengths]
        middle, low, high = (list(map(of, values)) for of in (median, min, max))
        (line,) = axis.plot(lengths, middle, marker="o", label=name.replace("`", ""))
        axis.fill_between(lengths, low, high, color=line.get_color(), alpha=0.15)
    axis.axvline(runs[0]["trained"], color="gray", linestyle=":", label="trained length")
    length_axis(axis, lengths)
    axis.set(ylabel="needles found (exact match)", ylim=(-0.03, 1.03))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m lab.table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--title", default="Runs")
    parser.add_argument("--plot", type=Path, help="a PNG of exact match against length")
    args = parser.parse(argv)
    runs = [read_run(run) for run in args.runs]
    if args.plot:
        plot(runs, args.plot)
    print(page(runs, args.title))


if __name__ == "__main__":
    main()

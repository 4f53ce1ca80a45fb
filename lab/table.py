"""The final tables of runs as one page of Markdown, from what the runs recorded.

python -m lab.table out/laptop-* --title "The laptop recipe" --plot results/laptop.png > results/laptop.md
"""

import argparse
import json
import shlex
import statistics
from pathlib import Path

from commandline import CommandLine, fail
from lab.curves import read_log

LEARNED = 0.8  # exact match at the trained length; below, a row says nothing about length


def read_run(folder: Path) -> dict:
    """What a finished run recorded: its run.json, its final entry, and the seconds its steps took. Raises OSError or ValueError."""
    entries = read_log(folder)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder / 'run.json'} not found: give the folder of a run")
    final = next((e for e in reversed(entries) if e.get("final")), None)
    if final is None:
        raise ValueError(f"{folder} has no final evaluation: let it finish, with --resume {folder}")
    return json.loads((folder / "run.json").read_text()) | {
        "final": final,
        "seconds": sum(e.get("seconds", 0) for e in entries),
    }


def command(run: dict) -> str:
    """The command that made a run, without the folder that it was told to write to."""
    words = list(run["arguments"])
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return shlex.join(["python", "train.py", *words])


def page(runs: list[dict], title: str) -> str:
    """Markdown: how it was measured, then a row a run."""
    first = runs[0]
    same = lambda key: ", ".join(sorted({str(run[key]) for run in runs}))
    lengths = [score["length"] for score in first["final"]["table"]]
    lines = [
        f"# {title}",
        "",
        "Needles found on held-out text with held-out keys and values: exact match of whole answers, and its standard error, over "
        f"{first['final']['table'][0]['questions']} questions a length. Validation loss on plain text. Printed by `python -m lab.table RUN...` from the runs of these commands:",
        "NoPE layers begin with queries half like their keys (model.py), RoPE layers do not: speeds of learning differ by that too.",
        "",
        "```sh",
        *[command(run) for run in runs],
        "```",
        "",
        f"Corpus {same('corpus')}, Python {same('python')}, torch {same('torch')}, on {same('device')}, {same('threads')} threads; times are of the training steps.",
        "",
        "| pattern | seed | nats per token | bits per byte | "
        + " | ".join(f"{n:,}" for n in lengths)
        + " | minutes | |",
        "| --- | --- | --- | --- |" + " --- |" * len(lengths) + " --- | --- |",
    ]
    for run in runs:
        final = run["final"]
        scores = {score["length"]: score for score in final["table"]}
        trained = trained_length(run)
        cells = [
            f"{scores[n]['exact']:.2f} ± {scores[n]['error']:.2f}" if n in scores else ""
            for n in lengths
        ]
        note = (
            ""
            if trained in scores and scores[trained]["exact"] >= LEARNED
            else "not learned in this time"
        )
        row = [
            name_of(run),
            str(run["recipe"]["seed"]),
            f"{final['val_loss']:.3f}",
            f"{final['val_bits_per_byte']:.3f}",
            *cells,
            f"{run['seconds'] / 60:.1f}",
            note,
        ]
        lines.append("| " + " | ".join(row) + " |")
    lines += [
        "",
        f'A row below {LEARNED} at the trained length is "not learned in this time": it says nothing about length.',
    ]
    return "\n".join(lines)


def plot(runs: list[dict], out: Path) -> None:
    """Exact match against context length, a line for each pattern, with its seeds' range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    patterns: dict[str, list[dict]] = {}
    for run in runs:
        patterns.setdefault(name_of(run), []).append(
            {score["length"]: score["exact"] for score in run["final"]["table"]}
        )
    for name, seeds in patterns.items():
        lengths = sorted(set.intersection(*(set(scores) for scores in seeds)))
        values = [[scores[n] for scores in seeds] for n in lengths]
        line = axis.plot(
            lengths, [statistics.median(v) for v in values], marker="o", label=name.replace("`", "")
        )[0]
        axis.fill_between(
            lengths,
            [min(v) for v in values],
            [max(v) for v in values],
            color=line.get_color(),
            alpha=0.15,
        )
    axis.axvline(trained_length(runs[0]), color="gray", linestyle=":", label="trained length")
    axis.set(
        xscale="log",
        xlabel="context, tokens",
        ylabel="needles found (exact match)",
        ylim=(-0.03, 1.03),
    )
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out, dpi=120)


def name_of(run: dict) -> str:
    """The pattern, as Markdown."""
    model = run["recipe"]["model"]
    return f"`{model['pattern']}`" + (" QK-Norm" if model["qk_norm"] else "")


def trained_length(run: dict) -> int:
    """The longest length of the recipe, in tokens."""
    return max(int(n) for phase in run["recipe"]["phase"] for n in phase["lengths"])


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(
        prog="python -m lab.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--title", default="Runs")
    parser.add_argument("--plot", type=Path, help="a PNG of exact match against length")
    try:
        args = parser.parse(argv)
        runs = [read_run(run) for run in args.runs]
    except (ValueError, OSError) as error:
        fail(error)
    print(page(runs, args.title))
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()

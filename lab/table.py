"""The final tables of runs as one page of Markdown, from what the runs recorded. The page's words
stand in lab/table.md.

python -m lab.table out/laptop-* --title "The laptop recipe" --plot results/laptop.png
"""

import shlex
from pathlib import Path
from types import SimpleNamespace

from checkpoint import read_json, typed, typed_fields
from commandline import CommandLine, guarded
from evaluate import Score
from lab.curves import read_log
from lab.report import LEARNED, markdown, plot_lines, trained_length
from model import require


def read_run(folder: Path) -> dict:
    """What a finished run recorded, as a row says it. Raises OSError or ValueError."""
    entries = read_log(folder)
    final = next((entry for entry in reversed(entries) if entry.get("final")), None)
    unfinished = f"{folder} has no final evaluation: let it finish, with --resume {folder}"
    require(final is not None, unfinished)
    try:
        run = read_json(folder / "run.json")
        model, words = run["recipe"]["model"], list(run["arguments"])
        where = {key: str(run[key]) for key in ("corpus", "python", "torch", "device", "threads")}
        said = dict(zip(words, words[1:]))
        went_on = said.get("--max-steps") != str(final["step"])  # past where it first stopped
        for flag in said.keys() & {"--out", *(["--max-steps"] if went_on else [])}:
            del words[words.index(flag) : words.index(flag) + 2]
        return {
            "where": where,
            "seed": run["recipe"]["seed"],
            "seconds": sum(entry.get("seconds", 0) for entry in entries),
            "name": f"`{model['pattern']}`" + (" QK-Norm" if model["qk_norm"] else ""),
            "command": shlex.join(["python", "train.py", *words]),
            "trained": trained_length(run["recipe"]),
            "losses": [typed(float, final[key], key) for key in ("val_loss", "val_bits_per_byte")],
            "scores": {score.length: score for score in map(read_score, final["table"])},
        }
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the record in {folder} is damaged ({error!r}): run it again") from None


def read_score(score: dict) -> Score:
    """A line of a run's own table."""
    error = score["error"]  # of a single example it is nan
    known = score | {"error": 0.0 if error != error else error}
    return Score(**typed_fields(Score, known, "table: ") | {"error": error})


def page(runs: list[dict], title: str) -> str:
    """Markdown: how it was measured, then a row a run."""
    scores = runs[0]["scores"]
    head = ["pattern", "seed", "nats per token", "bits per byte"]
    head += [*(f"{n:,}" for n in scores), "minutes", ""]
    said = {}
    for key in runs[0]["where"]:
        said[key] = ", ".join(sorted({run["where"][key] for run in runs}))
    said["questions"] = max((score.questions for score in scores.values()), default=0)
    said["commands"] = "\n".join(run["command"] for run in runs)
    rows = [row(run, list(scores)) for run in runs]
    said["table"] = markdown(head, rows).replace("|  |", "| |", 1)
    words = Path(__file__).with_suffix(".md").read_text(encoding="utf-8").strip()
    return words.format(title=title, learned=LEARNED, **said)


def row(run: dict, lengths: list[int]) -> list[str]:
    """A run's cells."""
    scores = run["scores"]
    cells = [run["name"], str(run["seed"]), *(f"{loss:.3f}" for loss in run["losses"])]
    for n in lengths:
        score = scores.get(n)
        cells.append(f"{score.exact:.2f} ± {score.error:.2f}" if score else "")
    trained = scores.get(run["trained"])
    learned = trained and trained.exact >= LEARNED
    return [*cells, f"{run['seconds'] / 60:.1f}", "" if learned else "not learned in this time"]


def plot(runs: list[dict], out: Path) -> None:
    """Exact match against context length, a line for each pattern, with its seeds' range."""
    rows = []
    for run in runs:
        name = run["name"].replace("`", "")
        rows += [SimpleNamespace(name=name, **vars(score)) for score in run["scores"].values()]
    panels = {"exact": "needles found (exact match)"}
    plot_lines(rows, "length", "name", panels, out, lengths=True)


@guarded
def main(argv: list[str] | None = None) -> None:
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

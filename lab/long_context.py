"""What happens beyond the trained length, and what extension recipes do about it: results/long-context.md.

    python -m lab.long_context                      every row (hours on two cores; stops and goes on where it was)
    python -m lab.long_context --only R rrrN        these base patterns, and what starts from them
    python -m lab.long_context --rates 0.006        one learning rate instead of the best of three

A base run trains by recipes/laptop.toml (Nrrr: swan-laptop.toml, of eight layers) at each of the rates; the one that finds most
needles in the run's own table at the trained length (then the lowest loss) is kept. Where it finds fewer than .8, the same is trained
three times as long before anything is said about length. The rows' own needles are others. Every training and every row leaves a
record in results/runs (lab/runs.py).
"""

import argparse
import math
import subprocess
from pathlib import Path

from commandline import CommandLine, fail
from data.corpus import Corpus
from lab.runs import (
    LEARNED,
    RATES,
    TASKS,
    WORK,
    Plan,
    best,
    default_corpus,
    extension,
    found,
    has_learned,
    record,
)

TRAINED, LENGTHS = 512, (512, 1024, 2048, 4096, 8192)
BASES = {  # name -> recipe, flags
    "R": ("laptop", ("pattern", "R")),
    "R QK-Norm": ("laptop", ("pattern", "R"), ("qk-norm", "")),
    "N": ("laptop", ("pattern", "N")),
    "RN": ("laptop", ("pattern", "RN")),
    "rrrR": ("laptop", ("pattern", "rrrR")),
    "rrrN": ("laptop", ("pattern", "rrrN")),
    "Nrrr": ("swan-laptop",),
}
REPORTED = (  # what a paper reports: which row finds more than which, at how many tokens
    (
        "RoPE finds more than NoPE after extension (paper, section 2)",
        "R, extended with theta raised",
        "N, extended",
        2048,
    ),
    (
        "NoPE more than QK-Norm after extension (section 2)",
        "N, extended",
        "R QK-Norm, extended with theta raised",
        2048,
    ),
    ("RNoPE more than RoPE (section 4)", "RN, extended", "R, extended with theta raised", 8192),
    ("RNoPE-SWA more than RNoPE (section 4)", "rrrN, extended", "RN, extended", 8192),
    (
        "RNoPE-SWA more than RoPE (section 5)",
        "rrrN, extended",
        "R, extended with theta raised",
        8192,
    ),
    ("NoPE in the full layers more than RoPE there (Kimi Linear)", "rrrN", "rrrR", 8192),
    (
        "SWAN keeps with its scale what it loses without (2504.08719)",
        "Nrrr, SWAN's scale",
        "Nrrr",
        8192,
    ),
    (
        "a RoPE model, converted to a hybrid by a short training, reads farther (2504.08719)",
        "R converted to rrrN",
        "R",
        8192,
    ),
    (
        "YaRN extends better than PI (2309.00071)",
        "R, extended with YARN",
        "R, extended with PI",
        2048,
    ),
    (
        "DroPE more than YaRN at twice the length (2512.12167)",
        "R, dropped at the end, its scale",
        "R, extended with YARN",
        1024,
    ),
)


def rows(corpus: Corpus, names: list[str], rates: list[float]):
    """Yield (name, record) of every row, as they are made."""
    for name in names:
        recipe, *flags = BASES[name]
        plan, made = best(recipe, tuple(flags), corpus, rates)
        star = "" if has_learned(made, TRAINED) else " *"
        for row, entry in rows_from(name, plan, corpus):
            yield row + star, entry


def rows_from(name: str, plan: Plan, corpus: Corpus):
    """Yield (name, record) of a base run and of what starts from it."""
    yield name, record(plan, corpus)
    rotates_everywhere = name in ("R", "R QK-Norm")
    if name == "Nrrr":
        yield "Nrrr, SWAN's scale", record(plan, corpus, {"length_scale": "swan"})
    if name == "N":
        yield "N, DroPE's scale", record(plan, corpus, {"length_scale": "drope"})
    recipe = "extend-laptop-rope" if rotates_everywhere else "extend-laptop"
    yield (
        f"{name}, extended" + (" with theta raised" if rotates_everywhere else ""),
        record(extension(recipe, plan), corpus),
    )
    if name == "rrrN":
        yield (
            "rrrN, Llama 4's scale at evaluation",
            record(plan, corpus, {"length_scale": "llama4"}),
        )
        yield (
            "rrrN, trained with scalable softmax",
            record(
                Plan("ssmax-laptop", tuple(flag for flag in plan.flags if flag[0] != "pattern")),
                corpus,
            ),
        )
        yield (
            "rrrN, without the mimetic start",
            record(Plan("laptop", (*plan.flags, ("mimetic", "none"))), corpus),
        )
    if name == "R":
        for scaling in ("pi", "ntk", "yarn"):
            treatment = {"rope_scaling": scaling, "rope_factor": 4.0} | (
                {"rope_original_length": TRAINED} if scaling == "yarn" else {}
            )
            yield f"R, {scaling.upper()} at factor 4, untrained", record(plan, corpus, treatment)
            yield (
                f"R, extended with {scaling.upper()}",
                record(extension(f"extend-laptop-{scaling}", plan), corpus),
            )
        yield "R converted to rrrN", record(extension("convert-laptop", plan), corpus)
        dropped = Plan(
            "drope-laptop", tuple(flag for flag in plan.flags if flag[0] == "stretch")
        )  # at the recipe's own rates: its last phase sets one
        yield "R, dropped at the end (DroPE)", record(dropped, corpus)
        yield "R, dropped at the end, its scale", record(dropped, corpus, {"length_scale": "drope"})


def page(made: list[tuple[str, dict]], rates: list[float], picture: str) -> str:
    """Markdown: how it was made, and a table a task."""
    first = made[0][1]
    lines = [
        "# Long context",
        "",
        f"Needles on held-out text with held-out keys and values, one seed, {len(made)} rows, as `python -m lab.long_context` prints them: exact match ± standard error / "
        f"likelihood against seven wrong answers (chance .125). Trained length {TRAINED}; rates tried: {', '.join(map(str, rates))}. Corpus {first['corpus']}, torch {first['torch']}.",
        f"Rows marked * come from a base run that found fewer than {LEARNED} in its own table at {TRAINED} (four asked among eight), three times the steps included: it had not learned that, and they say "
        f"nothing about length, but for a task whose own column at {TRAINED} is high all the same.",
        "NoPE layers begin with queries half like their keys (model.py); RoPE layers, and so models converted from them, do not: one row tells what that does.",
        "",
        f"![exact match against context length, before and after extension]({picture})",
    ]
    for task in TASKS:
        lines += [
            "",
            f"## {task}",
            "",
            "| | " + " | ".join(f"{n:,}" for n in LENGTHS) + " |",
            "| --- |" + " --- |" * len(LENGTHS),
        ]
        for name, entry in made:
            cells = [found(entry, task, n) for n in LENGTHS]
            lines.append(
                f"| {name} | "
                + " | ".join(
                    f"{c['exact']:.2f} ± {c['exact_error']:.2f} / {c['likelihood']:.2f}"
                    for c in cells
                )
                + " |"
            )
    lines += [
        "",
        "## What others report, and what is seen here",
        "",
        *reported(made),
        "",
        "## How each was made",
        "",
    ]
    lines += [
        f"- {name}: `{entry['plan']}`"
        + (
            f", evaluated with {entry['treatment']}"
            if entry["treatment"]
            else f" ({entry['seconds']:.0f} s, {entry['val_loss']:.3f} nats per token at {longest(entry):,} tokens)"
        )
        for name, entry in made
    ]
    return "\n".join(lines)


def reported(made: list[tuple[str, dict]]) -> list[str]:
    """Each of REPORTED beside what was found: "shown" where the difference exceeds two standard errors, "reversed" likewise."""
    by_name = {name.rstrip(" *"): (entry, name.endswith("*")) for name, entry in made}
    lines = [
        "| reported | rows | tokens | " + " | ".join(TASKS) + " |",
        "| --- | --- | --- |" + " --- |" * len(TASKS),
    ]
    for says, more, less, length in REPORTED:
        if more in by_name and less in by_name:
            starred = "".join(f" ({name}: *)" for name in (more, less) if by_name[name][1])
            cells = []
            for task in TASKS:
                a, b = (found(by_name[name][0], task, length) for name in (more, less))
                difference, error = (
                    a["exact"] - b["exact"],
                    math.hypot(a["exact_error"], b["exact_error"]),
                )
                word = (
                    "shown"
                    if difference > 2 * error
                    else "reversed"
                    if -difference > 2 * error
                    else "not shown"
                )
                cells.append(f"{a['exact']:.2f} against {b['exact']:.2f}: {word}")
            lines.append(
                f"| {says} | {more}; {less}{starred} | {length:,} | " + " | ".join(cells) + " |"
            )
    return lines


def longest(entry: dict) -> int:
    """The longest length that the run's last phase trained, in tokens."""
    return max(int(length) for length in entry["recipe"]["phase"][-1]["lengths"])


def plot(made: list[tuple[str, dict]], out: Path) -> None:
    """Exact match against length, a panel a task: a colour a base run, dashed what it was extended to."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, len(TASKS))
    for axis, task in zip(axes, TASKS):
        for i, base in enumerate(BASES):
            mine = [
                (name, entry)
                for name, entry in made
                if name.rstrip(" *") == base or name.startswith(f"{base}, extended")
            ]
            for (name, entry), marker in zip(mine, ".osv^"):
                style = "-" if name.rstrip(" *") == base else "--"
                axis.plot(
                    LENGTHS,
                    [found(entry, task, n)["exact"] for n in LENGTHS],
                    style,
                    marker=marker,
                    markersize=4,
                    color=f"C{i}",
                    label=name,
                )
        axis.set(
            title=task,
            xscale="log",
            xlabel="context, tokens",
            ylabel="exact match",
            ylim=(-0.03, 1.03),
        )
        axis.set_xticks(LENGTHS, [f"{n:,}" for n in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    figure.savefig(out, dpi=110)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(
        prog="python -m lab.long_context",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", default=list(BASES), metavar="PATTERN", help=f"of {', '.join(BASES)}"
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        help=f"learning rates (default: {' '.join(map(str, RATES))})",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/long-context"), help="OUT.md and OUT.png"
    )
    try:
        args = parser.parse(argv)
        for name in args.only:
            if name not in BASES:
                raise ValueError(
                    f"--only {name!r} is unknown: use some of {', '.join(map(repr, BASES))}"
                )
        for rate in args.rates:
            if not 0 < rate < 1:
                raise ValueError(f"--rates {rate} is not between 0 and 1")
        if not args.out.parent.is_dir():
            raise FileNotFoundError(
                f"{args.out.parent} is no folder: --out begins with one that exists"
            )
        corpus = default_corpus()
    except (ValueError, OSError) as error:
        fail(error)
    made = []
    try:
        for name, entry in rows(corpus, args.only, args.rates):
            made.append((name, entry))
            print(
                f"{name}: "
                + "; ".join(
                    f"{task} " + " ".join(f"{found(entry, task, n)['exact']:.2f}" for n in LENGTHS)
                    for task in TASKS
                ),
                flush=True,
            )
    except subprocess.CalledProcessError as error:
        fail(
            f"a training failed (status {error.returncode}): the newest log under {WORK} says why; rows done are kept"
        )
    Path(f"{args.out}.md").write_text(page(made, args.rates, f"{args.out.name}.png") + "\n")
    plot(made, Path(f"{args.out}.png"))
    print(f"written to {args.out}.md and {args.out}.png")


if __name__ == "__main__":
    main()

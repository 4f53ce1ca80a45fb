"""Beyond the trained length, and what extension recipes do about it: results/long-context.md.

    python -m lab.long_context                      every row (hours on two cores; can be cut off)
    python -m lab.long_context --only R rrrN        these base patterns, and what starts from them
    python -m lab.long_context --rates 0.006        one learning rate instead of the best of three

A base run trains by recipes/laptop.toml (Nrrr: swan-laptop.toml, of eight layers), as `best` of
lab/runs.py chooses it; the rows' own needles are others. lab/long_context.toml has the words.
"""

import math
import tomllib
from collections.abc import Iterator
from pathlib import Path

from commandline import CommandLine, guarded
from data.corpus import Corpus
from data.prepare import open_corpus as default_corpus
from lab import runs
from lab.report import LEARNED, check_out, figure_of, length_axis, markdown
from lab.runs import TASKS, Plan, best, found, has_learned, record

TRAINED, LENGTHS = 512, (512, 1024, 2048, 4096, 8192)
PAGE = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
BASES = PAGE["bases"]


def rows(corpus: Corpus, names: list[str], rates: list[float]) -> Iterator[tuple[str, dict]]:
    """Every row, as they are made."""
    for name in names:
        (_, recipe), *flags = BASES[name].items()
        plan, made = best(recipe, tuple(flags), corpus, rates)
        for row, plan_of, treatment in rows_from(name, plan):
            if plan_of.init is None:  # from scratch, if not the base run itself
                made = record(plan_of, corpus, what="run")
            star = "" if has_learned(made) else " *"
            yield row + star, record(plan_of, corpus, treatment)


def rows_from(name: str, plan: Plan) -> Iterator[tuple[str, Plan, dict]]:
    """(name, training, treatment at evaluation) of a base run and of what starts from it."""
    extended, raised = "extend-laptop", ""
    if name in ("R", "R QK-Norm"):
        extended, raised = "extend-laptop-rope", " with theta raised"
    yield name, plan, {}
    if name == "Nrrr":
        yield "Nrrr, SWAN's scale", plan, {"length_scale": "swan"}
    if name == "N":
        yield "N, DroPE's scale", plan, {"length_scale": "drope"}
    yield f"{name}, extended{raised}", plan.extended(extended), {}
    if name == "rrrN":
        wide = plan.extended(extended).with_flags(window="256")
        yield "rrrN, windows of 256 from then on", wide, {}
        yield "rrrN, windows of 256 only while extending", wide, {"window": 64}
        yield "rrrN, Llama 4's scale at evaluation", plan, {"length_scale": "llama4"}
        yield "rrrN, SWAN's scale at evaluation", plan, {"length_scale": "swan"}
        ssmax = Plan("ssmax-laptop", plan.with_flags(pattern="").flags)
        yield "rrrN, trained with scalable softmax", ssmax, {}
    if name == "R":
        for scaling in ("pi", "ntk", "yarn"):
            treatment = {"rope_scaling": scaling, "rope_factor": 4.0}
            if scaling == "yarn":
                treatment["rope_original_length"] = TRAINED
            yield f"R, {scaling.upper()} at factor 4, untrained", plan, treatment
            extended = plan.extended(f"extend-laptop-{scaling}")
            yield f"R, extended with {scaling.upper()}", extended, {}
        converted = plan.extended("convert-laptop")
        yield "R converted to rrrN", converted, {}
        converted = converted.stretched(4)
        yield "R converted, 600 steps", converted, {}
        yield "R, as many steps more", converted.with_flags(pattern="R"), {}
        # At the recipe's own rates, for its last phase sets one; 2,400 steps, of which 300 without.
        dropped = Plan("drope-laptop").stretched(3)
        yield "R, dropped at the end (DroPE)", dropped, {}
        yield "R, dropped at the end, its scale", dropped, {"length_scale": "drope"}


def page(made: list[tuple[str, dict]], rates: list[float], picture: str) -> str:
    """Markdown: how it was made, and a table a task."""
    paragraphs = [PAGE["how"].format(n=len(made), rates=", ".join(map(str, rates)), **made[0][1])]
    paragraphs += [f"![exact match against context length, before and after extension]({picture})"]
    for task in TASKS:
        rows = []
        for name, entry in made:
            cells = [found(entry, task, n) for n in LENGTHS]
            shown = "{exact:.2f} ± {exact_error:.2f} / {likelihood:.2f}".format_map
            rows.append([name, *map(shown, cells)])
        paragraphs += [f"## {task}", markdown(["", *(f"{n:,}" for n in LENGTHS)], rows)]
    heading = "## What others report, and what is seen here"
    paragraphs += [heading, PAGE["rule"], reported(made)]
    ways = []
    for name, entry in made:
        how = f", evaluated with {entry['treatment']}"
        if not entry["treatment"]:
            longest = max(map(int, entry["recipe"]["phase"][-1]["lengths"]))
            nats = f"{entry['val_loss']:.3f} nats per token at {longest:,} tokens"
            if name.endswith("*") and entry["curve"]:
                nats += f"; needles while it trained: {runs.learning(entry)} tokens"
            how = f" ({entry['seconds']:.0f} s, {nats})"
        ways.append(f"- {name}: `{entry['plan']}`{how}")
    paragraphs += ["## How each was made", "\n".join(ways)]
    return "\n\n".join(paragraphs).replace("  |", " |") + "\n"  # an empty cell is one space


def reported(made: list[tuple[str, dict]]) -> str:
    """What papers report, and what was found: a difference counts beyond two standard errors, and
    where both find LEARNED at the trained length."""
    entries = {name.rstrip(" *"): entry for name, entry in made}
    rows = []
    for row in PAGE["reported"]:
        pair = [row["more"], row["less"]]
        if not entries.keys() >= set(pair):
            continue
        cells = []
        for task in TASKS:
            x, y = (found(entries[name], task, row["tokens"]) for name in pair)
            difference = x["exact"] - y["exact"]
            clear = abs(difference) > 2 * math.hypot(x["exact_error"], y["exact_error"])
            word = ("shown" if difference > 0 else "reversed") if clear else "not shown"
            at_trained = [found(entries[name], task, TRAINED)["exact"] for name in pair]
            word = word if min(at_trained) >= LEARNED else f"not at {TRAINED}"
            cells.append(f"{x['exact']:.2f} against {y['exact']:.2f}: {word}")
        rows.append([row["says"], "; ".join(pair), f"{row['tokens']:,}", *cells])
    return markdown(["reported", "rows", "tokens", *TASKS], rows)


def plot(made: list[tuple[str, dict]], out: Path) -> None:
    """Exact match by length, a panel a task, a colour a base run, dashed what it extended to."""
    figure, axes = figure_of(18, 4.6, 1, len(TASKS))
    for axis, task in zip(axes, TASKS):
        for i, base in enumerate(BASES):
            is_base = lambda name, base=base: name.rstrip(" *") == base
            of = [r for r in made if is_base(r[0]) or r[0].startswith(f"{base}, extended")]
            for (name, entry), marker in zip(of, ".osv^"):
                exact = [found(entry, task, n)["exact"] for n in LENGTHS]
                style = {"marker": marker, "markersize": 4, "color": f"C{i}", "label": name}
                axis.plot(LENGTHS, exact, "-" if is_base(name) else "--", **style)
        length_axis(axis, LENGTHS)
        axis.set(title=task, ylabel="exact match", ylim=(-0.03, 1.03))
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
    figure.savefig(out, dpi=110)


@guarded
def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(prog="python -m lab.long_context", description=__doc__)
    bases = {"nargs": "+", "choices": BASES, "default": list(BASES), "metavar": "PATTERN"}
    parser.add_argument("--only", **bases, help=f"of {', '.join(BASES)}")
    runs.add_rates(parser)
    out = Path("results/long-context")
    parser.add_argument("--out", type=Path, default=out, help="OUT.md and OUT.png")
    args = parser.parse(argv)
    check_out(Path(f"{args.out}.md"))
    made = list(rows(default_corpus(), args.only, args.rates))
    text = page(made, args.rates, f"{args.out.name}.png")
    Path(f"{args.out}.md").write_text(text, encoding="utf-8")
    plot(made, Path(f"{args.out}.png"))
    for name, entry in made:
        scores = [(t, [f"{found(entry, t, n)['exact']:.2f}" for n in LENGTHS]) for t in TASKS]
        print(f"{name}: " + "; ".join(f"{t} {' '.join(s)}" for t, s in scores))
    print(f"written to {args.out}.md and {args.out}.png")


if __name__ == "__main__":
    main()

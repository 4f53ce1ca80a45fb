"""Every claim of the paper, re-enacted: trains what is missing, measures, and writes a report with
a verdict for each.

    python -m lab.reproduce                      three seeds at laptop scale; hours on two cores
    python -m lab.reproduce --seeds 1 --only 8   the central claim alone
    python -m lab.reproduce --scale gpu          30M parameters on one GPU

Writes results/reproduce-<scale>/report.md and retrieval.png (with --only: report-8.md, ...), from
the records of results/runs.jsonl, and makes those that are missing (lab/runs.py), so that nothing
is trained twice and a command that was cut off goes on. lab/claims.toml has the claims' words.
"""

import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray

from commandline import CommandLine, guarded
from data.corpus import Corpus, load_corpus
from data.prepare import open_corpus as default_corpus
from evaluate import mean_and_error
from lab import cost, runs
from lab.report import at_least, figure_of, length_axis, markdown
from lab.runs import HERE, LEARNED, TASKS, TIMES, Plan, extension, found, has_learned
from model import ModelConfig, Transformer

RESULTS = HERE / "results"
WORDS = tomllib.loads((Path(__file__).parent / "claims.toml").read_text(encoding="utf-8"))
MARGIN = 0.02  # of "no worse"
VARIANTS = {  # name -> flags
    "R": (("pattern", "R"),),
    "QK-Norm": (("pattern", "R"), ("qk-norm", "")),
    "N": (("pattern", "N"),),
    "RN": (("pattern", "RN"),),
    "rrrN": (("pattern", "rrrN"),),
}
# Windowed to full layers -> variant of eight layers: its pattern, at rrrN's learning rate.
DEEP = {"1:1": "rN x8", "3:1": "rrrN x8", "7:1": "rrrrrrrN x8"}


@dataclass(frozen=True)
class Scale:
    """Where a reproduction runs: recipes, and the lengths in tokens that they train."""

    base: str
    extend: str  # positions untouched
    extend_rope: str  # theta raised
    trained: int
    extended: int
    deep: tuple = (("n-layer", "8"),)


SCALES = {
    "laptop": Scale("laptop", "extend-laptop", "extend-laptop-rope", 512, 2048),
    "gpu": Scale("gpu-base", "extend-gpu", "extend-gpu-rope", 2048, 16384, deep=()),
}


# ------------------------------------------------------------------------------------------------
# What is measured, by variant and seed


@dataclass
class Lab:
    """Runs of every variant and seed, made when they are first asked for."""

    scale: Scale
    corpus: Corpus
    seeds: list[int]
    rates: Sequence[float] = runs.RATES
    chosen: dict[str, tuple[Plan, bool]] = field(default_factory=dict)  # see `choose`
    second: set[str] = field(default_factory=set)  # variants whose second stage was asked for

    @property
    def lengths(self) -> list[int]:
        """At which needles are asked for, in tokens."""
        return [times * self.scale.trained for times in TIMES]

    @property
    def longest(self) -> int:
        """The last of them."""
        return self.lengths[-1]

    @property
    def window(self) -> int:
        """Of the windowed variants' training."""
        return Plan(self.scale.base).toml["model"]["window"]

    def record(self, plan: Plan, **more) -> dict:
        """See lab.runs."""
        return runs.record(plan, self.corpus, trained_at=self.scale.trained, **more)

    def choose(self, variant: str) -> tuple[Plan, bool]:
        """The variant's run of seed 1 and whether it learned; where it never did, the unstretched
        one, which other seeds then repeat."""
        if variant not in self.chosen:
            scale, rates = self.scale, self.rates
            flags = VARIANTS.get(variant)
            if flags is None:
                rates = [self.choose("rrrN")[0].rate]
                flags = (("pattern", variant.removesuffix(" x8")), *scale.deep)
            plan, made = runs.best(scale.base, flags, self.corpus, rates, scale.trained)
            learned = has_learned(made, scale.trained)
            self.chosen[variant] = (plan if learned else plan.with_flags(stretch="")), learned
        return self.chosen[variant]

    def base(self, variant: str) -> list[Plan]:
        """The variant's first stage, a run for each seed: seed 1's flags, and three times the steps
        where these are not enough for this seed."""
        chosen, learned = self.choose(variant)
        plans = []
        for seed in self.seeds:
            plan = chosen.with_flags(seed=str(seed) if seed > 1 else "")
            if learned and "stretch" not in dict(plan.flags):
                if not has_learned(self.record(plan, what="run"), self.scale.trained):
                    plan = plan.with_flags(stretch="3")
            plans.append(plan)
        return plans

    def extended(self, variant: str, recipe: str | None = None) -> list[Plan]:
        """The variant's second stage: theta raised for RoPE, positions untouched for hybrids and
        NoPE, unless `recipe` says otherwise."""
        self.second.add(variant)
        raised = variant in ("R", "QK-Norm")
        recipe = recipe or (self.scale.extend_rope if raised else self.scale.extend)
        return [extension(recipe, plan) for plan in self.base(variant)]

    # Each of these returns an array, a value for each seed.

    def loss(self, variant: str) -> ndarray:
        """Validation loss after the same steps for every variant, nats per token at the trained
        length."""
        plans = [plan.with_flags(stretch="") for plan in self.base(variant)]
        return np.array([self.record(plan, what="run")["val_loss"] for plan in plans])

    def needles(self, plans: list[Plan], length: int, task: str, **treatment) -> ndarray:
        """Exact match of a task at a length."""
        made = [self.record(plan, treatment=treatment) for plan in plans]
        return np.array([found(each, task, length)["exact"] for each in made])

    def mass(self, plans: list[Plan], key: str, layers: str = "all") -> ndarray:
        """A figure of lab.attention_mass at four times the trained length."""
        which, values = (4 * self.scale.trained, layers), []
        for plan in plans:
            rows = self.record(plan, what="attention")["masses"]
            values += [row[key] for row in rows if (row["length"], row["layers"]) == which]
        return np.array(values)

    def learned(self, variant: str, task: str) -> ndarray:
        """Does the run find LEARNED of a task's needles at the trained length?"""
        return self.needles(self.base(variant), self.scale.trained, task) >= LEARNED


def costs(repeat: int) -> dict:
    """Cache, training step and FLOPs of rrrN over R's at one length, measured once in processes of
    their own, or read from the record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, length = cost.SIZES[device], cost.LENGTHS[device][-1]
    patterns = ("R", "rrrN")

    def make() -> dict:
        work = cost.in_own_process
        full, swa = (work(cost.measure, pattern, length, sizes, device) for pattern in patterns)
        with torch.device("meta"):
            models = [Transformer(ModelConfig(pattern=pattern, **sizes)) for pattern in patterns]
        flops = [model.flops_per_token(length) for model in models]
        return {
            "length": length,
            "cache": swa.cache_bytes / full.cache_bytes,
            "cache_promised": swa.cache_promised,
            "step": swa.train_ms / full.train_ms,
            "flops": flops[1] / flops[0],
        }

    return runs.kept(["cost", device, length, repeat], make)


# ------------------------------------------------------------------------------------------------
# The claims

# Metrics: (lab, label, task) -> an array, a value for each seed. Labels are mostly variants.

loss = lambda lab, name, task: lab.loss(name)
short = lambda lab, name, task: lab.needles(lab.base(name), lab.scale.trained, task)
long = lambda lab, name, task: lab.needles(lab.base(name), lab.longest, task)
kept_share = lambda lab, *what: long(lab, *what) / short(lab, *what).clip(1e-9)
extended = lambda lab, name, task: lab.needles(lab.extended(name), lab.scale.extended, task)
farthest = lambda lab, name, task: lab.needles(lab.extended(name), lab.longest, task)
deep_loss = lambda lab, ratio, task: lab.loss(DEEP[ratio])
deep_needles = lambda lab, ratio, task: long(lab, DEEP[ratio], task)

mass = lambda key: lambda lab, name, task: lab.mass(lab.extended(name), key)
begin, needle, entropy = map(mass, ("begin", "needle", "entropy_share"))
entropy_ratio = lambda lab, label, task: entropy(lab, "QK-Norm", task) / entropy(lab, "R", task)
layers = lambda key: lambda lab, kind, task: lab.mass(lab.extended("RN"), key, kind.split()[0])
layers_needle, layers_qc = map(layers, ("needle", "qc"))

theta = lambda lab, label: lab.extended("RN", lab.scale.extend_rope if label == "raised" else None)
theta_qc = lambda lab, label, task: lab.mass(theta(lab, label), "qc", "RoPE")
theta_needles = lambda lab, label, task: lab.needles(theta(lab, label), lab.longest, task)

cost_of = lambda keys: lambda lab, label, task: np.array([costs(n)[keys[label]] for n in lab.seeds])
cache = cost_of({"measured": "cache", "promised": "cache_promised"})
step = cost_of({"measured": "step", "FLOPs": "flops"})


def cut(lab: Lab, label: str, task: str) -> ndarray:
    """What R finds under a window at evaluation, or half of what it finds without."""
    if label == "half of whole":
        return short(lab, "R", task) / 2
    window = {"pattern": "r", "window": lab.window}
    return lab.needles(lab.base("R"), lab.scale.trained, task, **window)


def against_bar(lab: Lab, name: str, task: str) -> ndarray:
    """What a variant finds at the trained length, or the bar for having learned."""
    return np.full(len(lab.seeds), LEARNED) if name == "bar" else short(lab, name, task)


ABOUT = {  # of metrics about retrieval: label -> the variant that must have learned the task
    **dict.fromkeys((extended, farthest, kept_share, needle), lambda name: name),
    **dict.fromkeys((layers_needle, theta_needles), lambda label: "RN"),
    deep_needles: DEEP.get,
    cut: lambda label: "R",
}

# Rules: differences that are positive where the claim holds, from the values of each label.

more = lambda a, b: a - b
less = lambda a, b: b - a
no_less = lambda a, b: a - b + MARGIN
no_more = lambda a, b: b - a + MARGIN
under_a_tenth = lambda whole, part: whole / 10 - part
near_two = lambda ratio: 0.5 - abs(ratio - 2)
as_promised = lambda measured, promised: 0.01 - abs(measured - promised)
near_flops = lambda measured, flops: 1.25 * flops - measured

AT, TRAINED = "at {lab.longest:,}", "{lab.scale.trained:,}, not extended"
CLAIMS = {  # what is said, rule, metric, labels; where it is not "single", the task
    1: [
        ("R no worse than QK-Norm", no_more, loss, ("R", "QK-Norm")),
        ("R < N", less, loss, ("R", "N")),
        ("QK-Norm < N", less, loss, ("QK-Norm", "N")),
    ],
    2: [
        (f"{task}: {a} > {b}", more, extended, (a, b), task)
        for task in TASKS
        for a, b in (("R", "N"), ("N", "QK-Norm"), ("R", "QK-Norm"))
    ],
    3: [
        ("N > R", more, needle, ("N", "R")),
        ("R > QK-Norm", more, needle, ("R", "QK-Norm")),
    ],
    4: [("begin mass: QK-Norm under a tenth of R", under_a_tenth, begin, ("R", "QK-Norm"))],
    5: [
        ("entropy / log2(keys): QK-Norm > R", more, entropy, ("QK-Norm", "R")),
        ("the ratio is between 1.5 and 2.5", near_two, entropy_ratio, ("QK-Norm / R",)),
    ],
    6: [
        (f"{what}: {a} > {b}", more, metric, (a, b))
        for what, metric, a, b in (
            ("needle mass", layers_needle, "NoPE layers", "RoPE layers"),
            ("mass on question and answer", layers_qc, "RoPE layers", "NoPE layers"),
        )
    ],
    7: [
        ("RoPE layers' mass on question and answer", less, theta_qc, ("raised", "untouched")),
        *((f"{task} {AT}", less, theta_needles, ("raised", "untouched"), task) for task in TASKS),
    ],
    8: [
        (f"{task}: {a} {word} {b}", rule, farthest, (a, b), task)
        for task in TASKS
        for a, word, b, rule in (
            ("rrrN", "no worse than", "RN", no_less),
            ("RN", ">", "R", more),
            ("rrrN", ">", "R", more),
        )
    ],
    9: [
        (f"{what}: 3:1 no worse than {other}", rule, metric, ("3:1", other), task)
        for other in ("1:1", "7:1")
        for what, rule, metric, task in (
            ("loss", no_more, deep_loss, "single"),
            (f"multi-key {AT}", no_less, deep_needles, "multi-key"),
        )
    ],
    10: [("rrrN no worse than R", no_more, loss, ("rrrN", "R"))],
    11: [
        (f"{task} {AT} over {TRAINED}: rrrN > R", more, kept_share, ("rrrN", "R"), task)
        for task in TASKS
    ],
    12: [
        (f"{what} of rrrN over R's, {near}", rule, metric, ("measured", beside))
        for what, near, rule, metric, beside in (
            ("cache", "within .01 of the promise", as_promised, cache, "promised"),
            ("training step", "at most 1.25 times the FLOPs' ratio", near_flops, step, "FLOPs"),
        )
    ],
    13: [
        (
            "R with a window of {lab.window} at evaluation finds under half of what it found",
            less,
            cut,
            ("windowed", "half of whole"),
        ),
        (f"rrrN, trained with that window, finds {LEARNED}", more, against_bar, ("rrrN", "bar")),
    ],
}


# ------------------------------------------------------------------------------------------------
# The verdicts


@dataclass(frozen=True)
class Part:
    """A comparison's outcome: what it says, the values it shows (label -> one a seed), their
    differences, and of the variants that it is about, which seeds have learned."""

    says: str
    shown: dict[str, ndarray]
    differences: ndarray
    learned: dict[str, ndarray] = field(default_factory=dict)


def compare(
    lab: Lab,
    says: str,
    rule: Callable,
    metric: Callable,
    labels: Sequence[str],
    task: str = "single",
) -> Part:
    """A row of CLAIMS, measured now where no record says it."""
    shown = {label: metric(lab, label, task) for label in labels}
    variants = map(ABOUT[metric], labels) if metric in ABOUT else ()
    learned = {name: lab.learned(name, task) for name in variants}
    return Part(says.format(lab=lab), shown, rule(*shown.values()), learned)


def verdict(part: Part) -> str:
    """The rule that every report begins with: WORDS["rule"]."""
    unlearned = [name for name, seeds in part.learned.items() if not all(seeds)]
    if unlearned:
        return f"not decided: {', '.join(unlearned)} had not learned"
    if len(part.differences) < 2:
        return "not decided: one seed"
    mean, error = mean_and_error(part.differences)
    for word, sign in (("reproduced", 1), ("reversed", -1)):
        if all(sign * d > 0 for d in part.differences) and sign * mean > 2 * error:
            return word
    return "not decided"


def summary(verdicts: list[str]) -> str:
    """The verdict of a claim, from its parts'."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    words = ("reproduced", "reversed", "not decided")
    counts = {word: sum(v.startswith(word) for v in verdicts) for word in words}
    return ", ".join(f"{n} of {len(verdicts)} {word}" for word, n in counts.items() if n)


# ------------------------------------------------------------------------------------------------
# The report


def shown(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "")


def report(lab: Lab, name: str, results: dict[int, list[Part]], picture: str) -> str:
    """Markdown: the verdicts, every comparison, and the runs behind them."""
    scale, seeds = lab.scale, len(lab.seeds)
    only = "" if len(results) == len(CLAIMS) else f" --only {' '.join(map(str, results))}"
    verdicts, details = [], []
    for number, parts in results.items():
        claim, words = WORDS[str(number)], [verdict(part) for part in parts]
        verdicts.append([str(number), claim["title"], claim["paper"], f"**{summary(words)}**"])
        rows = []
        for part, word in zip(parts, words):
            measured = ", ".join(f"{label} {shown(of)}" for label, of in part.shown.items())
            rows.append([part.says, measured, shown(part.differences), word])
        details += [f"## {number}. {claim['title']}", f"Paper: {claim['paper']}."]
        details.append(table(["comparison", "measured", "difference", "verdict"], rows))
        if not {"reproduced", "not decided: one seed"}.issuperset(words):
            details.append(claim["otherwise"].strip())
    paragraphs = [
        f"# The paper's claims at {name} scale",
        f"Written by `python -m lab.reproduce --scale {name} --seeds {seeds}{only}`, from the "
        f"records in `results/runs.jsonl`. {seeds} seed{'s' if seeds > 1 else ''}; trained at "
        f"{scale.trained:,} tokens, extended to {scale.extended:,}, needles (exact match) to "
        f"{lab.longest:,}; attention masses after extension at {4 * scale.trained:,}. Corpus "
        f"{lab.corpus.hash}.",
        WORDS["rule"],
        f"![needles found against context length]({picture})",
        table(["", "claim", "paper", "verdict"], verdicts),
        *details,
        "## The variants",
        WORDS["variants"],
        variants(lab),
    ]
    return "\n\n".join(paragraphs) + "\n"


def table(head: Sequence[str], rows: list[list[str]]) -> str:
    """In Markdown, an empty cell as one space."""
    return markdown(head, rows).replace("  |", " |")


def variants(lab: Lab) -> str:
    """A row a variant and stage: its run, its own table at the trained length, its loss, and its
    needles by length."""
    head = ["variant", "rate", "stretch", "own table at the trained length", "nats per token"]
    rows = []

    def add(plans: list[Plan], *cells: str) -> None:
        tasks = [[shown(lab.needles(plans, n, task)) for task in TASKS] for n in lab.lengths]
        rows.append([*cells, *map(" / ".join, tasks)])

    for name, (chosen, _) in lab.chosen.items():
        plans = lab.base(name)
        made = [lab.record(plan, what="run") for plan in plans]
        tables = " ".join(f"{runs.at_trained_length(each, lab.scale.trained):.2f}" for each in made)
        stretch = " ".join(dict(plan.flags).get("stretch", "1") for plan in plans)
        add(plans, name, str(chosen.rate), stretch, tables, shown(lab.loss(name)))
        if name in lab.second:
            add(lab.extended(name), f"{name}, extended", *[""] * 4)
    return table([*head, *(f"{n:,}" for n in lab.lengths)], rows)


def plot(lab: Lab, out: Path) -> None:
    """Needles against length for every variant, mean and standard error over seeds: a row a stage,
    a column a task."""
    stages = [("trained", lab.base, lab.scale.trained, lab.chosen)]
    if lab.second:
        stages.append(("extended", lab.extended, lab.scale.extended, lab.second))
    options = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = figure_of(11, 0.4 + 3 * len(stages), len(stages), len(TASKS), **options)
    for row, (stage, plans_of, length, names) in zip(axes, stages):
        for axis, task in zip(row, TASKS):
            for i, name in enumerate(VARIANTS):
                if name in names:
                    seeds = [lab.needles(plans_of(name), n, task) for n in lab.lengths]
                    means, errors = np.nan_to_num([mean_and_error(values) for values in seeds]).T
                    line = "-" if lab.learned(name, task).all() else ":"
                    style = {"color": f"C{i}", "linestyle": line, "marker": "o", "markersize": 4}
                    axis.errorbar(lab.lengths, means, errors, capsize=2, label=name, **style)
            axis.axvline(length, color="gray", linewidth=0.8)
            length_axis(axis, lab.lengths)
            axis.set(title=f"{task}, {stage} at {length:,} tokens", ylim=(-0.03, 1.03))
            axis.label_outer()
        row[0].set_ylabel("needles found (exact match)")
    title = "dotted: that task not\nlearned in every seed"
    axes[0, -1].legend(title=title, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=120)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m lab.reproduce", description=f"{__doc__}\n{WORDS['rule']}")
    add = parser.add_argument
    titles = "; ".join(f"{n} {WORDS[str(n)]['title']}" for n in CLAIMS)
    several = {"nargs": "+", "type": int, "default": list(CLAIMS), "metavar": "CLAIM"}
    add("--scale", default="laptop", help=f"of {', '.join(SCALES)} (default: laptop)")
    add("--seeds", type=int, default=3, help="how many, from 1 on (default: 3)")
    add("--only", **several, help=f"numbers of claims: {titles}")
    runs.add_rates(parser)
    args = parser.parse(argv)
    if args.scale not in SCALES:
        raise ValueError(f"--scale {args.scale!r} is unknown: use {' or '.join(SCALES)}")
    at_least(1, seeds=args.seeds)
    for number in args.only:
        if number not in CLAIMS:
            raise ValueError(f"--only {number} is no claim: use 1 to {len(CLAIMS)}")
    scale, only = SCALES[args.scale], sorted(set(args.only))
    data = Plan(scale.base).toml.get("data")
    corpus = load_corpus(data) if data else default_corpus()
    lab = Lab(scale, corpus, list(range(1, args.seeds + 1)), args.rates)

    suffix = "" if only == list(CLAIMS) else "-" + "-".join(map(str, only))
    folder, picture = RESULTS / f"reproduce-{args.scale}", f"retrieval{suffix}.png"
    folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for number in only:
        results[number] = [compare(lab, *row) for row in CLAIMS[number]]
        word = summary([verdict(part) for part in results[number]])
        print(f"{number}. {WORDS[str(number)]['title']}: {word}", flush=True)
    plot(lab, folder / picture)
    out = folder / f"report{suffix}.md"
    out.write_text(report(lab, args.scale, results, picture), encoding="utf-8")
    print(f"written to {out}")


if __name__ == "__main__":
    main()

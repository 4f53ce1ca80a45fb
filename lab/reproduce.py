"""Every claim of the paper, re-enacted: trains what is missing, measures, and writes a report with
a verdict for each.

    python -m lab.reproduce                      three seeds at laptop scale; hours on two cores
    python -m lab.reproduce --seeds 1 --only 8   the central claim alone
    python -m lab.reproduce --scale gpu          30M parameters on one GPU

Writes results/reproduce-<scale>/report.md and retrieval.png (with --only: report-8.md, ...), from
the records of results/runs.jsonl, and makes those that are missing (lab/runs.py), so that nothing
is trained twice and a command that was cut off goes on. lab/claims.toml has the claims' words.

**The verdict's rule.** Each part of a claim is a paired difference per seed, positive where the
paper's claim holds. "Reproduced": all seeds are positive and their mean exceeds two standard
errors. "Reversed": likewise, negative. Otherwise "not decided", as one seed always is. "No worse"
leaves a margin of .02: nats of a loss, or a share of needles. Parts about retrieval count only
where every variant has learned that task in every seed: .8 of its needles at the trained length,
the learning rate chosen on the first seed (patterns of eight layers take rrrN's) and the training
lengthened to three times where it does not find .8 in its own table, the harder one of four asked
among eight.
"""

import math
import multiprocessing
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from commandline import CommandLine, guarded
from data.corpus import Corpus, load_corpus
from evaluate import mean_and_error
from lab import cost
from lab.report import at_least, figure_of, length_axis, markdown
from lab.runs import (
    HERE,
    LEARNED,
    RATES,
    TASKS,
    TIMES,
    Plan,
    at_trained_length,
    best,
    default_corpus,
    extension,
    found,
    has_learned,
    kept,
    record,
)
from model import ModelConfig, Transformer
from recipe import read_toml

RESULTS = HERE / "results"
MARGIN = 0.02  # of "no worse"
VARIANTS = {  # name -> flags; those of eight layers take rrrN's learning rate
    "R": (("pattern", "R"),),
    "QK-Norm": (("pattern", "R"), ("qk-norm", "")),
    "N": (("pattern", "N"),),
    "RN": (("pattern", "RN"),),
    "rrrN": (("pattern", "rrrN"),),
}
DEEP = {"rN": "1:1", "rrrN": "3:1", "rrrrrrrN": "7:1"}  # at eight layers -> windowed to full


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
    rates: list[float] = field(default_factory=lambda: list(RATES))
    chosen: dict[str, tuple[Plan, bool]] = field(default_factory=dict)  # see `choose`
    second: set[str] = field(default_factory=set)  # variants whose second stage was asked for

    def record(self, plan: Plan, **more) -> dict:
        """See lab.runs."""
        return record(plan, self.corpus, trained_at=self.scale.trained, **more)

    def choose(self, variant: str) -> tuple[Plan, bool]:
        """The variant's run of seed 1 and whether it learned; where it never did, the unstretched
        one, which other seeds then repeat."""
        if variant not in self.chosen:
            pattern, s = variant.removesuffix(" x8"), self.scale
            flags = VARIANTS.get(variant) or (("pattern", pattern), *s.deep)
            rates = [self.choose("rrrN")[0].rate] if variant.endswith("x8") else self.rates
            plan, made = best(s.base, flags, self.corpus, rates, s.trained)
            learned = has_learned(made, s.trained)
            self.chosen[variant] = (plan if learned else plan.with_flags(stretch="")), learned
        return self.chosen[variant]

    def plan(self, variant: str, seed: int, stretched: bool = True) -> Plan:
        """The variant's run of a seed: seed 1's flags, and three times the steps where these are
        not enough for this seed."""
        plan, learned = self.choose(variant)
        if not stretched:
            plan = plan.with_flags(stretch="")
        if seed > 1:
            plan = plan.with_flags(seed=str(seed))
        if stretched and learned and "stretch" not in dict(plan.flags):
            if not has_learned(self.record(plan, what="run"), self.scale.trained):
                plan = plan.with_flags(stretch="3")
        return plan

    def base(self, variant: str) -> list[Plan]:
        """The variant's first stage."""
        return [self.plan(variant, seed) for seed in self.seeds]

    def extended(self, variant: str, recipe: str | None = None) -> list[Plan]:
        """The variant's second stage: theta raised for RoPE, positions untouched for hybrids and
        NoPE, unless `recipe` says otherwise."""
        self.second.add(variant)
        raised = variant in ("R", "QK-Norm")
        recipe = recipe or (self.scale.extend_rope if raised else self.scale.extend)
        return [extension(recipe, plan) for plan in self.base(variant)]

    @property
    def lengths(self) -> list[int]:
        """At which needles are asked for, in tokens."""
        return [times * self.scale.trained for times in TIMES]

    @property
    def longest(self) -> int:
        """The last of them."""
        return self.lengths[-1]

    # Each of these returns a value for each seed.

    def loss(self, variant: str) -> list[float]:
        """Validation loss after the same steps for every variant, nats per token at the trained
        length."""
        plans = [self.plan(variant, seed, stretched=False) for seed in self.seeds]
        return [self.record(plan, what="run")["val_loss"] for plan in plans]

    def needles(self, plans: list[Plan], length: int, task: str, **treatment) -> list[float]:
        """Exact match of a task at a length."""
        made = [self.record(plan, treatment=treatment or None) for plan in plans]
        return [found(each, task, length)["exact"] for each in made]

    def mass(self, plans: list[Plan], key: str, layers: str = "all") -> list[float]:
        """A figure of lab.attention_mass at four times the trained length."""
        rows = [self.record(plan, what="attention")["masses"] for plan in plans]
        which = (4 * self.scale.trained, layers)
        return [next(r[key] for r in each if (r["length"], r["layers"]) == which) for each in rows]

    def learned(self, names: Sequence[str], task: str = "single") -> dict[str, list[bool]]:
        """Of each variant: does a run find LEARNED of a task's needles at the trained length?"""
        at_trained = {n: self.needles(self.base(n), self.scale.trained, task) for n in names}
        return {n: [exact >= LEARNED for exact in values] for n, values in at_trained.items()}


# ------------------------------------------------------------------------------------------------
# The claims


@dataclass(frozen=True)
class Part:
    """One comparison: what it says, the values it shows (name -> one a seed), and differences,
    positive where it holds; of the variants whose retrieval it is about, who has learned."""

    says: str
    shown: dict[str, list[float]]
    differences: list[float]
    learned: dict[str, list[bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: its figures, why a small scale may not show it, and its parts."""

    title: str
    paper: str
    otherwise: str
    parts: Callable[[Lab], list[Part]]


def verdict(part: Part) -> str:
    """The rule of the module's docstring."""
    unlearned = [name for name, seeds in part.learned.items() if not all(seeds)]
    if unlearned:
        return f"not decided: {', '.join(unlearned)} had not learned"
    if len(part.differences) < 2:
        return "not decided: one seed"
    mean, error = mean_and_error(part.differences)
    if all(d > 0 for d in part.differences) and mean > 2 * error:
        return "reproduced"
    if all(d < 0 for d in part.differences) and -mean > 2 * error:
        return "reversed"
    return "not decided"


Named = tuple[str, list[float]]


def above(says: str, a: Named, b: Named, learned: dict | None = None, margin: float = 0.0) -> Part:
    """a > b - margin."""
    return Part(says, dict([a, b]), [x - y + margin for x, y in zip(a[1], b[1])], learned or {})


def below(says: str, a: Named, b: Named, learned: dict | None = None, margin: float = 0.0) -> Part:
    """a < b + margin."""
    return Part(says, dict([a, b]), [y - x + margin for x, y in zip(a[1], b[1])], learned or {})


def _loss(lab: Lab) -> list[Part]:
    r, qk, n = ((name, lab.loss(name)) for name in ("R", "QK-Norm", "N"))
    return [
        below("R no worse than QK-Norm", r, qk, margin=MARGIN),
        below("R < N", r, n),
        below("QK-Norm < N", qk, n),
    ]


def _long_needles(lab: Lab) -> list[Part]:
    parts, at = [], lab.scale.extended
    for task in TASKS:
        exact = {n: lab.needles(lab.extended(n), at, task) for n in ("R", "N", "QK-Norm")}
        for a, b in (("R", "N"), ("N", "QK-Norm"), ("R", "QK-Norm")):
            learned = lab.learned((a, b), task)
            parts.append(above(f"{task}: {a} > {b}", (a, exact[a]), (b, exact[b]), learned))
    return parts


def _needle_mass(lab: Lab) -> list[Part]:
    mass = {n: lab.mass(lab.extended(n), "needle") for n in ("N", "R", "QK-Norm")}
    return [
        above(f"{a} > {b}", (a, mass[a]), (b, mass[b]), lab.learned((a, b)))
        for a, b in (("N", "R"), ("R", "QK-Norm"))
    ]


def _sink(lab: Lab) -> list[Part]:
    r, qk = (lab.mass(lab.extended(name), "begin") for name in ("R", "QK-Norm"))
    tenth = [x / 10 - y for x, y in zip(r, qk)]
    return [Part("begin mass: QK-Norm under a tenth of R", {"R": r, "QK-Norm": qk}, tenth)]


def _entropy(lab: Lab) -> list[Part]:
    r, qk = (lab.mass(lab.extended(name), "entropy_share") for name in ("R", "QK-Norm"))
    ratios = [y / x for x, y in zip(r, qk)]
    near = [0.5 - abs(ratio - 2) for ratio in ratios]
    return [
        above("entropy / log2(keys): QK-Norm > R", ("QK-Norm", qk), ("R", r)),
        Part("the ratio is between 1.5 and 2.5", {"QK-Norm / R": ratios}, near),
    ]


def _hybrid_layers(lab: Lab) -> list[Part]:
    plans = lab.extended("RN")
    of = lambda key, layers: (f"{layers} layers", lab.mass(plans, key, layers))
    needle, qc = "needle mass: NoPE layers > RoPE layers", "mass on question and answer: "
    return [
        above(needle, of("needle", "NoPE"), of("needle", "RoPE"), lab.learned(["RN"])),
        above(qc + "RoPE layers > NoPE layers", of("qc", "RoPE"), of("qc", "NoPE")),
    ]


def _theta(lab: Lab) -> list[Part]:
    both = {
        "raised": lab.extended("RN", lab.scale.extend_rope),
        "untouched": lab.extended("RN"),
    }
    of = lambda values: [(name, values(plans)) for name, plans in both.items()]
    qc = of(lambda plans: lab.mass(plans, "qc", "RoPE"))
    parts, long = [below("RoPE layers' mass on question and answer", *qc)], lab.longest
    for task in TASKS:
        exact = of(lambda plans, task=task: lab.needles(plans, long, task))
        parts.append(below(f"{task} at {long:,}", *exact, lab.learned(["RN"], task)))
    return parts


def _central(lab: Lab) -> list[Part]:
    parts = []
    for task in TASKS:
        names = ("rrrN", "RN", "R")
        swa, rn, r = ((n, lab.needles(lab.extended(n), lab.longest, task)) for n in names)
        of = lambda *pair, task=task: lab.learned(pair, task)
        parts += [
            above(f"{task}: rrrN no worse than RN", swa, rn, of("rrrN", "RN"), MARGIN),
            above(f"{task}: RN > R", rn, r, of("RN", "R")),
            above(f"{task}: rrrN > R", swa, r, of("rrrN", "R")),
        ]
    return parts


def _ratio(lab: Lab) -> list[Part]:
    parts, name = [], "{} x8".format
    loss = lambda p: (DEEP[p], lab.loss(name(p)))
    exact = lambda p: (DEEP[p], lab.needles(lab.base(name(p)), lab.longest, "multi-key"))
    for other in ("rN", "rrrrrrrN"):
        learned, no_worse = lab.learned((name("rrrN"), name(other)), "multi-key"), DEEP[other]
        says = f"loss: 3:1 no worse than {no_worse}"
        parts.append(below(says, loss("rrrN"), loss(other), margin=MARGIN))
        says = f"multi-key at {lab.longest:,}: 3:1 no worse than {no_worse}"
        parts.append(above(says, exact("rrrN"), exact(other), learned, MARGIN))
    return parts


def _short_context(lab: Lab) -> list[Part]:
    losses = [(name, lab.loss(name)) for name in ("rrrN", "R")]
    return [below("rrrN no worse than R", *losses, margin=MARGIN)]


def _kept(lab: Lab) -> list[Part]:
    parts, trained = [], lab.scale.trained
    for task in TASKS:
        shares = []
        for name in ("rrrN", "R"):
            short, long = (lab.needles(lab.base(name), n, task) for n in (trained, lab.longest))
            shares.append((name, [y / max(x, 1e-9) for x, y in zip(short, long)]))
        says = f"{task} at {lab.longest:,} over {trained:,}, not extended: rrrN > R"
        parts.append(above(says, *shares, lab.learned(("rrrN", "R"), task)))
    return parts


def _cost(lab: Lab) -> list[Part]:
    made = [costs(repeat) for repeat in lab.seeds]
    keys = ("cache", "cache_promised", "step", "flops")
    cache, promised, step, flops = ([each[key] for each in made] for key in keys)
    return [
        Part(
            "cache of rrrN over R's, within .01 of the promise",
            {"measured": cache, "promised": promised},
            [0.01 - abs(x - y) for x, y in zip(cache, promised)],
        ),
        Part(
            "training step of rrrN over R's, at most 1.25 times the FLOPs' ratio",
            {"measured": step, "FLOPs": flops},
            [1.25 * y - x for x, y in zip(step, flops)],
        ),
    ]


def costs(repeat: int) -> dict:
    """Cache, training step and FLOPs of rrrN over R's at one length, measured once in processes of
    their own, or read from the record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, length = cost.SIZES[device], cost.LENGTHS[device][-1]

    def make() -> dict:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            made = [pool.apply(cost.measure, (p, length, sizes, device)) for p in ("R", "rrrN")]
        full, swa = made
        with torch.device("meta"):
            models = [Transformer(ModelConfig(pattern=p, **sizes)) for p in ("R", "rrrN")]
        flops = [model.flops_per_token(length) for model in models]
        return {
            "length": length,
            "cache": swa.cache_bytes / full.cache_bytes,
            "cache_promised": swa.cache_promised,
            "step": swa.train_ms / full.train_ms,
            "flops": flops[1] / flops[0],
        }

    return kept(["cost", device, length, repeat], make)


def _late_window(lab: Lab) -> list[Part]:
    trained, base = lab.scale.trained, lab.base("R")
    window = read_toml(HERE / "recipes" / f"{lab.scale.base}.toml")["model"]["window"]
    half = [x / 2 for x in lab.needles(base, trained, "single")]
    cut = lab.needles(base, trained, "single", pattern="r", window=window)
    swa = lab.needles(lab.base("rrrN"), trained, "single")
    says = f"R with a window of {window} at evaluation finds under half of what it found"
    return [
        below(says, ("windowed", cut), ("half of whole", half), lab.learned(["R"])),
        above(
            f"rrrN, trained with that window, finds {LEARNED}",
            ("rrrN", swa),
            ("bar", [LEARNED] * len(swa)),
        ),
    ]


PARTS = (
    *(_loss, _long_needles, _needle_mass, _sink, _entropy, _hybrid_layers, _theta, _central),
    *(_ratio, _short_context, _kept, _cost, _late_window),
)
WORDS = tomllib.loads((Path(__file__).parent / "claims.toml").read_text(encoding="utf-8"))
CLAIMS = {n: Claim(**WORDS[str(n)], parts=parts) for n, parts in enumerate(PARTS, 1)}


# ------------------------------------------------------------------------------------------------
# The report


def shown(values: list[float]) -> str:
    """Mean ± standard error over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "")


def summary(verdicts: list[str]) -> str:
    """Of a claim, from its parts."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    words = ("reproduced", "reversed", "not decided")
    counts = {word: sum(v.startswith(word) for v in verdicts) for word in words}
    return ", ".join(f"{n} of {len(verdicts)} {word}" for word, n in counts.items() if n)


def report(lab: Lab, name: str, results: dict[int, list[Part]], picture: str) -> str:
    """Markdown: the verdicts, every comparison, and the runs behind them."""
    s, seeds = lab.scale, len(lab.seeds)
    whole = len(results) == len(CLAIMS)
    only = "" if whole else f" --only {' '.join(map(str, results))}"
    lines = [
        f"# The paper's claims at {name} scale",
        "",
        f"Written by `python -m lab.reproduce --scale {name} --seeds {seeds}{only}`, from the "
        f"records in `results/runs.jsonl`. {seeds} seed{'s' if seeds > 1 else ''}; trained at "
        f"{s.trained:,} tokens, extended to {s.extended:,}, needles (exact match) to "
        f"{lab.longest:,}; attention masses after extension at {4 * s.trained:,}. Corpus "
        f"{lab.corpus.hash}.",
        "",
        WORDS["rule"],
        "",
        f"![needles found against context length]({picture})",
        "",
    ]
    rows = []
    for number, parts in results.items():
        claim, word = CLAIMS[number], summary([verdict(part) for part in parts])
        rows.append([str(number), claim.title, claim.paper, f"**{word}**"])
    lines.append(markdown(["", "claim", "paper", "verdict"], rows).replace("|  |", "| |", 1))
    for number, parts in results.items():
        claim, rows = CLAIMS[number], []
        for part in parts:
            measured = ", ".join(f"{key} {shown(values)}" for key, values in part.shown.items())
            rows.append([part.says, measured, shown(part.differences), verdict(part)])
        lines += ["", f"## {number}. {claim.title}", "", f"Paper: {claim.paper}.", ""]
        lines.append(markdown(["comparison", "measured", "difference", "verdict"], rows))
        if any(verdict(part) not in ("reproduced", "not decided: one seed") for part in parts):
            lines += ["", claim.otherwise.strip()]
    return "\n".join([*lines, "", "## The variants", "", variants(lab)]) + "\n"


def variants(lab: Lab) -> str:
    """A row a variant and stage: its run, its own table at the trained length, its loss, and its
    needles by length."""

    def cells(plans: list[Plan]) -> list[str]:
        exact = lambda n: [shown(lab.needles(plans, n, task)) for task in TASKS]
        return [" / ".join(exact(n)) for n in lab.lengths]

    rows = []
    for name, (chosen, _) in lab.chosen.items():
        plans, trained = lab.base(name), lab.scale.trained
        own = [at_trained_length(lab.record(plan, what="run"), trained) for plan in plans]
        tables = " ".join(f"{exact:.2f}" for exact in own)
        stretch = " ".join(dict(plan.flags).get("stretch", "1") for plan in plans)
        loss = shown(lab.loss(name))
        rows.append([name, str(chosen.rate), stretch, tables, loss, *cells(plans)])
        if name in lab.second:
            rows.append([f"{name}, extended | | | | ", *cells(lab.extended(name))])
    head = ["variant", "rate", "stretch", "own table at the trained length", "nats per token"]
    head += [f"{n:,}" for n in lab.lengths]
    table = markdown(head, rows).replace("| | | |  |", "| | | | |")
    return f"{WORDS['variants']}\n\n{table}"


def plot(lab: Lab, out: Path) -> None:
    """Needles against length for every variant, mean and standard error over seeds: a row a stage,
    a column a task."""
    names = [name for name in VARIANTS if name in lab.chosen]
    stages = [("trained", lab.base, lab.scale.trained, names)]
    if lab.second:
        second = [name for name in names if name in lab.second]
        stages.append(("extended", lab.extended, lab.scale.extended, second))
    shape = len(stages), len(TASKS)
    size = 11, 0.4 + 3 * len(stages)
    figure, axes = figure_of(*size, *shape, sharex=True, sharey=True, squeeze=False)
    for row, (stage, plans_of, length, names) in zip(axes, stages):
        for axis, task in zip(row, TASKS):
            for name in names:
                seeds = [lab.needles(plans_of(name), n, task) for n in lab.lengths]
                means, errors = zip(*map(mean_and_error, seeds))
                errors = [0 if math.isnan(error) else error for error in errors]  # one seed
                learned = all(lab.learned([name], task)[name])
                style = {"linestyle": "-" if learned else ":", "marker": "o", "markersize": 4}
                color = f"C{list(VARIANTS).index(name)}"
                axis.errorbar(
                    lab.lengths, means, errors, capsize=2, label=name, color=color, **style
                )
            axis.axvline(length, color="gray", linewidth=0.8)
            axis.set(title=f"{task}, {stage} at {length:,} tokens", ylim=(-0.03, 1.03))
            length_axis(axis, lab.lengths)
            axis.set(xlabel="")
        row[0].set_ylabel("needles found (exact match)")
    title = "dotted: that task not\nlearned in every seed"
    axes[0, -1].legend(title=title, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    figure.savefig(out, dpi=120)


def a_rate(text: str) -> float:
    """A learning rate from the command line."""
    rate = float(text)
    if not 0 < rate < 1:
        raise ArgumentTypeError(f"--rates {text} is not between 0 and 1")
    return rate


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m lab.reproduce", description=__doc__)
    scales, rates = ", ".join(SCALES), " ".join(map(str, RATES))
    parser.add_argument("--scale", default="laptop", help=f"of {scales} (default: laptop)")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on (default: 3)")
    titles = "; ".join(f"{n} {claim.title}" for n, claim in CLAIMS.items())
    only = {"nargs": "+", "type": int, "default": list(CLAIMS), "metavar": "CLAIM"}
    parser.add_argument("--only", **only, help=f"numbers of claims: {titles}")
    of = {"nargs": "+", "type": a_rate, "default": list(RATES)}
    parser.add_argument("--rates", **of, help=f"to choose from (default: {rates})")
    args = parser.parse(argv)
    if args.scale not in SCALES:
        raise ValueError(f"--scale {args.scale!r} is unknown: use {' or '.join(SCALES)}")
    at_least(1, seeds=args.seeds)
    for number in args.only:
        if number not in CLAIMS:
            raise ValueError(f"--only {number} is no claim: use 1 to {len(CLAIMS)}")
    scale = SCALES[args.scale]
    data = read_toml(HERE / "recipes" / f"{scale.base}.toml").get("data")
    corpus = load_corpus(data) if data else default_corpus()

    lab, results = Lab(scale, corpus, list(range(1, args.seeds + 1)), args.rates), {}
    folder, only = RESULTS / f"reproduce-{args.scale}", sorted(set(args.only))
    suffix = "" if only == list(CLAIMS) else "-" + "-".join(map(str, only))
    folder.mkdir(parents=True, exist_ok=True)
    for number in only:
        results[number] = CLAIMS[number].parts(lab)
        word = summary([verdict(part) for part in results[number]])
        print(f"{number}. {CLAIMS[number].title}: {word}", flush=True)
    plot(lab, folder / f"retrieval{suffix}.png")
    text = report(lab, args.scale, results, f"retrieval{suffix}.png")
    (folder / f"report{suffix}.md").write_text(text, encoding="utf-8")
    print(f"written to {folder / f'report{suffix}.md'}")


if __name__ == "__main__":
    main()

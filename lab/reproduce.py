"""Every claim of the paper, re-enacted: trains what is missing, measures, and writes a report with a verdict for each.

    python -m lab.reproduce                      three seeds at laptop scale; hours on two cores, goes on where it was cut off
    python -m lab.reproduce --seeds 1 --only 8   the central claim alone
    python -m lab.reproduce --scale gpu          30M parameters on one GPU

Writes results/reproduce-<scale>/report.md and retrieval.png (with --only: report-8.md, ...), from the records of results/runs, and
makes those that are missing (lab/runs.py), so that nothing is trained twice.

**The verdict's rule.** Each part of a claim is a paired difference per seed, positive where the paper's claim holds. "Reproduced": all
seeds are positive and their mean exceeds two standard errors. "Reversed": likewise, negative. Otherwise "not decided", as one seed always
is. "No worse" leaves a margin of .02: nats of a loss, or a share of needles. Parts about retrieval count only where every variant has
learned that task in every seed: .8 of its needles at the trained length, the learning rate chosen on the first seed (patterns of eight
layers take rrrN's) and the training lengthened to three times where it does not find .8 in its own table, the harder one of four asked
among eight.
"""

import argparse
import multiprocessing
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from commandline import CommandLine, fail
from data.corpus import Corpus, load_corpus
from evaluate import mean_and_error
from lab import cost
from lab.runs import (
    HERE,
    LEARNED,
    RATES,
    TASKS,
    TIMES,
    WORK,
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
DEEP = {
    "rN": "1:1",
    "rrrN": "3:1",
    "rrrrrrrN": "7:1",
}  # patterns at eight layers -> windowed to full


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


# ---------------------------------------------------------------------------------------------------------------------
# What is measured, by variant and seed


@dataclass
class Lab:
    """Runs of every variant and seed, made when they are first asked for. Every method returns a value for each seed."""

    scale: Scale
    corpus: Corpus
    seeds: list[int]
    rates: list[float] = field(default_factory=lambda: list(RATES))
    chosen: dict[str, tuple[Plan, bool]] = field(
        default_factory=dict
    )  # variant -> its run of seed 1, and whether that learned
    second: set[str] = field(default_factory=set)  # variants whose second stage was asked for

    def flags(self, variant: str) -> tuple:
        """Of the variant, without a rate."""
        return VARIANTS.get(variant) or (("pattern", variant.removesuffix(" x8")), *self.scale.deep)

    def record(self, plan: Plan, **more) -> dict:
        """See lab.runs."""
        return record(plan, self.corpus, trained_at=self.scale.trained, **more)

    def choose(self, variant: str) -> tuple[Plan, bool]:
        """The variant's run of seed 1 and whether it learned; where it never did, the unstretched one, which other seeds then repeat."""
        if variant not in self.chosen:
            rates = [rate_of(self.choose("rrrN")[0])] if variant.endswith("x8") else self.rates
            plan, made = best(
                self.scale.base, self.flags(variant), self.corpus, rates, self.scale.trained
            )
            learned = has_learned(made, self.scale.trained)
            if not learned:
                plan = Plan(plan.recipe, tuple(flag for flag in plan.flags if flag[0] != "stretch"))
            self.chosen[variant] = plan, learned
        return self.chosen[variant]

    def plan(self, variant: str, seed: int, stretched: bool = True) -> Plan:
        """The variant's run of a seed: seed 1's flags, and three times the steps where these are not enough for this seed."""
        plan, learned = self.choose(variant)
        short = tuple(flag for flag in plan.flags if stretched or flag[0] != "stretch") + (
            (("seed", str(seed)),) if seed > 1 else ()
        )
        plan = Plan(plan.recipe, short)
        if (
            stretched
            and learned
            and "stretch" not in dict(short)
            and not has_learned(self.record(plan, what="run"), self.scale.trained)
        ):
            plan = Plan(plan.recipe, (*short, ("stretch", "3")))
        return plan

    def learned(self, names: Sequence[str], task: str = "single") -> dict[str, list[bool]]:
        """Of each variant: does a seed's run find LEARNED of a task's needles at the trained length?"""
        at_trained = lambda name: self.needles(self.base(name), self.scale.trained, task)
        return {name: [exact >= LEARNED for exact in at_trained(name)] for name in names}

    def loss(self, variant: str) -> list[float]:
        """Validation loss after the same steps for every variant, nats per token at the trained length."""
        return [
            self.record(self.plan(variant, seed, stretched=False), what="run")["val_loss"]
            for seed in self.seeds
        ]

    def extended(self, variant: str, recipe: str | None = None) -> list[Plan]:
        """The variant's second stage: theta raised for RoPE, positions untouched for hybrids and NoPE, unless `recipe` says otherwise."""
        self.second.add(variant)
        recipe = recipe or (
            self.scale.extend_rope if variant in ("R", "QK-Norm") else self.scale.extend
        )
        return [extension(recipe, self.plan(variant, seed)) for seed in self.seeds]

    def needles(self, plans: list[Plan], length: int, task: str, **treatment) -> list[float]:
        """Exact match of a task at a length."""
        return [
            found(self.record(plan, treatment=treatment or None), task, length)["exact"]
            for plan in plans
        ]

    def base(self, variant: str) -> list[Plan]:
        """The variant's first stage."""
        return [self.plan(variant, seed) for seed in self.seeds]

    def mass(self, plans: list[Plan], key: str, layers: str = "all") -> list[float]:
        """A figure of lab.attention_mass at four times the trained length."""
        rows = [self.record(plan, what="attention")["masses"] for plan in plans]
        return [
            next(
                row[key]
                for row in each
                if (row["length"], row["layers"]) == (4 * self.scale.trained, layers)
            )
            for each in rows
        ]


def rate_of(plan: Plan) -> float:
    """Learning rate of a run."""
    return float(
        dict(plan.flags).get("lr", read_toml(HERE / "recipes" / f"{plan.recipe}.toml")["lr"])
    )


# ---------------------------------------------------------------------------------------------------------------------
# The claims


@dataclass(frozen=True)
class Part:
    """One comparison: what it says, the values it shows (name -> one a seed), and differences, positive where it holds."""

    says: str
    shown: dict[str, list[float]]
    differences: list[float]
    learned: dict[str, list[bool]] = field(
        default_factory=dict
    )  # of the variants whose retrieval it is about


@dataclass(frozen=True)
class Claim:
    """A claim of the paper: its figures, its parts, and why a small scale may not show it."""

    title: str
    paper: str
    parts: Callable[[Lab], list[Part]]
    otherwise: str


def verdict(part: Part) -> str:
    """The rule of the module's docstring."""
    unlearned = [name for name, seeds in part.learned.items() if not all(seeds)]
    if unlearned:
        return f"not decided: {', '.join(unlearned)} had not learned"
    mean, error = mean_and_error(part.differences)
    if len(part.differences) < 2:
        return "not decided: one seed"
    sign = (all(d > 0 for d in part.differences) and mean > 2 * error) - (
        all(d < 0 for d in part.differences) and -mean > 2 * error
    )
    return {1: "reproduced", 0: "not decided", -1: "reversed"}[sign]


def above(
    says: str,
    a: tuple[str, list[float]],
    b: tuple[str, list[float]],
    learned: dict | None = None,
    margin: float = 0.0,
) -> Part:
    """a > b - margin."""
    return Part(says, dict([a, b]), [x - y + margin for x, y in zip(a[1], b[1])], learned or {})


def below(
    says: str,
    a: tuple[str, list[float]],
    b: tuple[str, list[float]],
    learned: dict | None = None,
    margin: float = 0.0,
) -> Part:
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
    names, parts = ("R", "N", "QK-Norm"), []
    for task in TASKS:
        r, n, qk = (
            (name, lab.needles(lab.extended(name), lab.scale.extended, task)) for name in names
        )
        for a, b in ((r, n), (n, qk), (r, qk)):
            parts.append(above(f"{task}: {a[0]} > {b[0]}", a, b, lab.learned((a[0], b[0]), task)))
    return parts


def _needle_mass(lab: Lab) -> list[Part]:
    n, r, qk = ((name, lab.mass(lab.extended(name), "needle")) for name in ("N", "R", "QK-Norm"))
    return [
        above(f"{a[0]} > {b[0]}", a, b, lab.learned((a[0], b[0]))) for a, b in ((n, r), (r, qk))
    ]


def _sink(lab: Lab) -> list[Part]:
    r, qk = lab.mass(lab.extended("R"), "begin"), lab.mass(lab.extended("QK-Norm"), "begin")
    return [
        Part(
            "begin mass: QK-Norm under a tenth of R",
            {"R": r, "QK-Norm": qk},
            [x / 10 - y for x, y in zip(r, qk)],
        )
    ]


def _entropy(lab: Lab) -> list[Part]:
    r, qk = (
        lab.mass(lab.extended("R"), "entropy_share"),
        lab.mass(lab.extended("QK-Norm"), "entropy_share"),
    )
    return [
        above("entropy / log2(keys): QK-Norm > R", ("QK-Norm", qk), ("R", r)),
        Part(
            "the ratio is between 1.5 and 2.5",
            {"QK-Norm / R": [y / x for x, y in zip(r, qk)]},
            [0.5 - abs(y / x - 2) for x, y in zip(r, qk)],
        ),
    ]


def _hybrid_layers(lab: Lab) -> list[Part]:
    plans = lab.extended("RN")
    of = lambda key, layers: (f"{layers} layers", lab.mass(plans, key, layers))
    return [
        above(
            "needle mass: NoPE layers > RoPE layers",
            of("needle", "NoPE"),
            of("needle", "RoPE"),
            lab.learned(["RN"]),
        ),
        above(
            "mass on question and answer: RoPE layers > NoPE layers",
            of("qc", "RoPE"),
            of("qc", "NoPE"),
        ),
    ]


def _theta(lab: Lab) -> list[Part]:
    untouched, raised, long = (
        lab.extended("RN"),
        lab.extended("RN", lab.scale.extend_rope),
        TIMES[-1] * lab.scale.trained,
    )
    parts = [
        below(
            "RoPE layers' mass on question and answer",
            ("raised", lab.mass(raised, "qc", "RoPE")),
            ("untouched", lab.mass(untouched, "qc", "RoPE")),
        )
    ]
    for task in TASKS:
        parts.append(
            below(
                f"{task} at {long:,}",
                ("raised", lab.needles(raised, long, task)),
                ("untouched", lab.needles(untouched, long, task)),
                lab.learned(["RN"], task),
            )
        )
    return parts


def _central(lab: Lab) -> list[Part]:
    long, parts = TIMES[-1] * lab.scale.trained, []
    for task in TASKS:
        swa, rn, r = (
            (name, lab.needles(lab.extended(name), long, task)) for name in ("rrrN", "RN", "R")
        )
        parts.append(
            above(
                f"{task}: rrrN no worse than RN", swa, rn, lab.learned(("rrrN", "RN"), task), MARGIN
            )
        )
        parts.append(above(f"{task}: RN > R", rn, r, lab.learned(("RN", "R"), task)))
        parts.append(above(f"{task}: rrrN > R", swa, r, lab.learned(("rrrN", "R"), task)))
    return parts


def _ratio(lab: Lab) -> list[Part]:
    long, parts = TIMES[-1] * lab.scale.trained, []
    name = lambda pattern: f"{pattern} x8"
    loss = lambda pattern: (DEEP[pattern], lab.loss(name(pattern)))
    needles = lambda pattern: (
        DEEP[pattern],
        lab.needles(lab.base(name(pattern)), long, "multi-key"),
    )
    for other in ("rN", "rrrrrrrN"):
        learned = lab.learned((name("rrrN"), name(other)), "multi-key")
        parts.append(
            below(
                f"loss: 3:1 no worse than {DEEP[other]}", loss("rrrN"), loss(other), margin=MARGIN
            )
        )
        parts.append(
            above(
                f"multi-key at {long:,}: 3:1 no worse than {DEEP[other]}",
                needles("rrrN"),
                needles(other),
                learned,
                MARGIN,
            )
        )
    return parts


def _short_context(lab: Lab) -> list[Part]:
    return [
        below(
            "rrrN no worse than R", ("rrrN", lab.loss("rrrN")), ("R", lab.loss("R")), margin=MARGIN
        )
    ]


def _kept(lab: Lab) -> list[Part]:
    long, parts = TIMES[-1] * lab.scale.trained, []
    for task in TASKS:
        at = lambda name, length: lab.needles(lab.base(name), length, task)
        share = lambda name: [
            y / max(x, 1e-9) for x, y in zip(at(name, lab.scale.trained), at(name, long))
        ]
        parts.append(
            above(
                f"{task} at {long:,} over {lab.scale.trained:,}, not extended: rrrN > R",
                ("rrrN", share("rrrN")),
                ("R", share("R")),
                lab.learned(("rrrN", "R"), task),
            )
        )
    return parts


def _cost(lab: Lab) -> list[Part]:
    made = [costs(repeat) for repeat in lab.seeds]
    cache, step, flops = ([each[key] for each in made] for key in ("cache", "step", "flops"))
    promised = [each["cache_promised"] for each in made]
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
    """Cache, training step and FLOPs of rrrN over R's at one length, measured once in processes of their own, or read from the record."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, length = cost.SIZES[device], cost.LENGTHS[device][-1]

    def make() -> dict:
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            full, swa = (
                pool.apply(cost.measure, (pattern, length, sizes, device))
                for pattern in ("R", "rrrN")
            )
        with torch.device("meta"):
            flops_full, flops_swa = (
                Transformer(ModelConfig(pattern=pattern, **sizes)).flops_per_token(length)
                for pattern in ("R", "rrrN")
            )
        return {
            "length": length,
            "cache": swa.cache_bytes / full.cache_bytes,
            "cache_promised": swa.cache_promised,
            "step": swa.train_ms / full.train_ms,
            "flops": flops_swa / flops_full,
        }

    return kept(["cost", device, length, repeat], make)


def _late_window(lab: Lab) -> list[Part]:
    trained, window = (
        lab.scale.trained,
        read_toml(HERE / "recipes" / f"{lab.scale.base}.toml")["model"]["window"],
    )
    whole, cut = (
        lab.needles(lab.base("R"), trained, "single"),
        lab.needles(lab.base("R"), trained, "single", pattern="r", window=window),
    )
    swa = lab.needles(lab.base("rrrN"), trained, "single")
    return [
        below(
            f"R with a window of {window} at evaluation finds under half of what it found",
            ("windowed", cut),
            ("half of whole", [x / 2 for x in whole]),
            lab.learned(["R"]),
        ),
        above(
            f"rrrN, trained with that window, finds {LEARNED}",
            ("rrrN", swa),
            ("bar", [LEARNED] * len(swa)),
        ),
    ]


CLAIMS = {
    1: Claim(
        "Validation loss: RoPE <= QK-Norm < NoPE (section 2)",
        "RoPE 1.52, QK-Norm 1.53, NoPE 1.58, after the second stage",
        _loss,
        "The paper's differences are .01 and .05 nats after 750B tokens; here a model sees two million, and a seed moves the loss by more.",
    ),
    2: Claim(
        "Long needles after extension: RoPE > NoPE > QK-Norm (section 2)",
        "RoPE 9.82, NoPE 9.03, QK-Norm 7.93 of 10 at 65k, the extended length",
        _long_needles,
        "Without positions four layers must first count tokens by their causal mask, which takes more training than a laptop gives. RoPE and QK-Norm "
        "are compared at four times the trained length, the paper's at eight: both may find nearly everything there, and a seed decides.",
    ),
    3: Claim(
        "Needle mass: NoPE > RoPE > QK-Norm (section 3)",
        "NoPE .0325, RoPE .0201, QK-Norm .0056 at 32k",
        _needle_mass,
        "A model that has not learned to retrieve has no needle mass to compare.",
    ),
    4: Claim(
        "QK-Norm has almost no sink (section 3)",
        "begin mass RoPE .3541, QK-Norm .0064 at 32k",
        _sink,
        "Sinks grow with training: a RoPE model of a million parameters and two million tokens may have none to lose. Uniform attention gives the first ten of 2,048 tokens .005.",
    ),
    5: Claim(
        "Entropy of QK-Norm is about twice RoPE's (section 3)",
        "RoPE 6.95, QK-Norm 12.46 bits at 32k: .46 and .83 of log2",
        _entropy,
        "At head width 32 normalised queries and keys can still make logits up to the gains' product; they have not been flattened by long training.",
    ),
    6: Claim(
        "In RNoPE the NoPE layers hold the needle, the RoPE layers what is near (section 4)",
        "needle mass .0765 against .0004, question and answer .3142 against .0287 (theta 10k, 32k tokens)",
        _hybrid_layers,
        "Which layer retrieves may depend on which layer comes first when there are but four.",
    ),
    7: Claim(
        "Raising theta in the hybrid weakens the RoPE layers' recency and the score (section 4)",
        "RoPE layers' mass on question and answer .3142 to .2611, needles at 128k 8.036 to 7.022 (10k to 2M)",
        _theta,
        "A hundred and fifty steps with the raised theta may be too few to spoil what was learned.",
    ),
    8: Claim(
        "RNoPE-SWA >= RNoPE > RoPE on long needles (sections 4 and 5): the central claim",
        "9.562, 8.036, 7.395 of 10 at 128k",
        _central,
        "RNoPE without windows learns slowly at this size; where it has learned less, it is compared with less.",
    ),
    9: Claim(
        "One full layer to three windowed ones (section 5)",
        "chosen; no figures published",
        _ratio,
        "With two million tokens the patterns differ mostly in how soon they learn to retrieve, and that differs by seed.",
    ),
    10: Claim(
        "RNoPE-SWA is no worse than RoPE at short context (section 5)",
        "MMLU 59.5 against 57.5, HellaSwag 76.2 against 75.8, ARC-E 82.5 against 84.6; no loss published",
        _short_context,
        "A window of 64 of 512 tokens gives up more of a short context than 4,096 of 8,192 do, and a seed moves R's loss by more than the margin.",
    ),
    11: Claim(
        "Retrieval is kept far beyond the trained length (section 5)",
        "RULER at 256k over 8k: RNoPE-SWA 78%, baseline 59%",
        _kept,
        "Not extended models are compared here, the paper's had been; and where RoPE has not quite learned the harder task there is nothing to keep.",
    ),
    12: Claim(
        "Cache and step time fall as arithmetic says (section 5)",
        'cache 1/4 + 3/4 min(1, W/L) of full attention; "up to 70%" faster inference, no table',
        _cost,
        "Kernels of small windows spend part of their time on the blocks' borders.",
    ),
    13: Claim(
        "A window that appears only at evaluation breaks retrieval; one present in training does not (sections 4 and 5)",
        "the reason for training with windows; no figures published",
        _late_window,
        "A window at least as long as the context would change nothing.",
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# The report


def shown(values: list[float]) -> str:
    """Mean ± standard error over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "")


def summary(verdicts: list[str]) -> str:
    """Of a claim, from its parts."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    count = lambda word: sum(v.startswith(word) for v in verdicts)
    return ", ".join(
        f"{count(word)} of {len(verdicts)} {word}"
        for word in ("reproduced", "reversed", "not decided")
        if count(word)
    )


def report(lab: Lab, name: str, results: dict[int, list[Part]], picture: str) -> str:
    """Markdown: the verdicts, every comparison, and the runs behind them."""
    s, seeds = lab.scale, len(lab.seeds)
    lines = [
        f"# The paper's claims at {name} scale",
        "",
        f"Written by `python -m lab.reproduce --scale {name} --seeds {seeds}"
        + ("" if len(results) == len(CLAIMS) else f" --only {' '.join(map(str, results))}")
        + "`, from the records in `results/runs`. "
        f"{seeds} seed{'s' if seeds > 1 else ''}; trained at {s.trained:,} tokens, extended to {s.extended:,}, needles (exact match) to {TIMES[-1] * s.trained:,}; "
        f"attention masses after extension at {4 * s.trained:,}. Corpus {lab.corpus.hash}.",
        "",
        *(line for line in __doc__.split("\n\n")[-1].strip().splitlines()),
        "",
        f"![needles found against context length]({picture})",
        "",
        "| | claim | paper | verdict |",
        "| --- | --- | --- | --- |",
    ]
    for number, parts in results.items():
        lines.append(
            f"| {number} | {CLAIMS[number].title} | {CLAIMS[number].paper} | **{summary([verdict(part) for part in parts])}** |"
        )
    for number, parts in results.items():
        claim = CLAIMS[number]
        lines += [
            "",
            f"## {number}. {claim.title}",
            "",
            f"Paper: {claim.paper}.",
            "",
            "| comparison | measured | difference | verdict |",
            "| --- | --- | --- | --- |",
        ]
        for part in parts:
            measured = ", ".join(f"{key} {shown(values)}" for key, values in part.shown.items())
            lines.append(
                f"| {part.says} | {measured} | {shown(part.differences)} | {verdict(part)} |"
            )
        if any(verdict(part) not in ("reproduced", "not decided: one seed") for part in parts):
            lines += ["", claim.otherwise]
    lines += ["", "## The variants", "", variants(lab)]
    return "\n".join(lines) + "\n"


def variants(lab: Lab) -> str:
    """A row a variant and stage: its run, its own table at the trained length, its loss, and its needles by length."""
    lengths = [times * lab.scale.trained for times in TIMES]
    lines = [
        "Differences are given so that a positive one agrees with the paper. NoPE layers begin with queries half like their keys (`mimetic`, model.py), RoPE layers do not. "
        "Losses compare runs of the same steps; needles those that were trained longer where that was needed. Cells: single / multi-key.",
        "",
        "| variant | rate | stretch | own table at the trained length | nats per token | "
        + " | ".join(f"{n:,}" for n in lengths)
        + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(lengths),
    ]
    cells = lambda plans: " | ".join(
        " / ".join(shown(lab.needles(plans, n, task)) for task in TASKS) for n in lengths
    )
    for name, (chosen, _) in lab.chosen.items():
        plans = lab.base(name)
        tables = " ".join(
            f"{at_trained_length(lab.record(plan, what='run'), lab.scale.trained):.2f}"
            for plan in plans
        )
        stretch = " ".join(dict(plan.flags).get("stretch", "1") for plan in plans)
        lines.append(
            f"| {name} | {rate_of(chosen)} | {stretch} | {tables} | {shown(lab.loss(name))} | {cells(plans)} |"
        )
        if name in lab.second:
            lines.append(f"| {name}, extended | | | | | {cells(lab.extended(name))} |")
    return "\n".join(lines)


def plot(lab: Lab, out: Path) -> None:
    """Needles against length for every variant, mean and standard error over seeds: a row a stage, a column a task."""
    from matplotlib.figure import Figure

    lengths = [times * lab.scale.trained for times in TIMES]
    shown = [name for name in VARIANTS if name in lab.chosen]
    stages = [("trained", lab.base, lab.scale.trained, shown)]
    if lab.second:
        stages.append(
            (
                "extended",
                lab.extended,
                lab.scale.extended,
                [name for name in shown if name in lab.second],
            )
        )
    figure = Figure(figsize=(11, 0.4 + 3 * len(stages)), layout="constrained")
    axes = figure.subplots(len(stages), len(TASKS), sharex=True, sharey=True, squeeze=False)
    colors = {name: f"C{i}" for i, name in enumerate(VARIANTS)}
    for row, (stage, plans_of, length, names) in zip(axes, stages):
        for axis, task in zip(row, TASKS):
            for name in names:
                plans = plans_of(name)
                means, errors = zip(*(mean_and_error(lab.needles(plans, n, task)) for n in lengths))
                errors = [0 if error != error else error for error in errors]  # one seed has none
                style = "-" if all(lab.learned([name], task)[name]) else ":"
                axis.errorbar(
                    lengths,
                    means,
                    errors,
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=name,
                    linestyle=style,
                    color=colors[name],
                )
            axis.axvline(length, color="gray", linewidth=0.8)
            axis.set(
                title=f"{task}, {stage} at {length:,} tokens", xscale="log", ylim=(-0.03, 1.03)
            )
            axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_ylabel("needles found (exact match)")
    axes[0, -1].legend(
        title="dotted: that task not\nlearned in every seed",
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    figure.savefig(out, dpi=120)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(
        prog="python -m lab.reproduce",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--scale", default="laptop", help=f"of {', '.join(SCALES)} (default: laptop)"
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on (default: 3)")
    parser.add_argument(
        "--only",
        nargs="+",
        type=int,
        default=list(CLAIMS),
        metavar="CLAIM",
        help="numbers of claims: " + "; ".join(f"{n} {claim.title}" for n, claim in CLAIMS.items()),
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(RATES),
        help=f"learning rates to choose from (default: {' '.join(map(str, RATES))})",
    )
    try:
        args = parser.parse(argv)
        if args.scale not in SCALES:
            raise ValueError(f"--scale {args.scale!r} is unknown: use {' or '.join(SCALES)}")
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds} must be at least 1")
        for number in args.only:
            if number not in CLAIMS:
                raise ValueError(f"--only {number} is no claim: use 1 to {len(CLAIMS)}")
        for rate in args.rates:
            if not 0 < rate < 1:
                raise ValueError(f"--rates {rate} is not between 0 and 1")
        scale = SCALES[args.scale]
        data = read_toml(HERE / "recipes" / f"{scale.base}.toml").get("data")
        corpus = load_corpus(data) if data else default_corpus()
    except (ValueError, OSError) as error:
        fail(error)
    lab, results = Lab(scale, corpus, list(range(1, args.seeds + 1)), args.rates), {}
    folder, only = RESULTS / f"reproduce-{args.scale}", sorted(set(args.only))
    suffix = "" if only == list(CLAIMS) else "-" + "-".join(map(str, only))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for number in only:
            results[number] = CLAIMS[number].parts(lab)
            print(
                f"{number}. {CLAIMS[number].title}: {summary([verdict(part) for part in results[number]])}",
                flush=True,
            )
        plot(lab, folder / f"retrieval{suffix}.png")
        text = report(lab, args.scale, results, f"retrieval{suffix}.png")
    except subprocess.CalledProcessError as error:
        fail(
            f"a training failed (status {error.returncode}): the newest log under {WORK} says why; what is done is kept"
        )
    (folder / f"report{suffix}.md").write_text(text)
    print(f"written to {folder / f'report{suffix}.md'}")


if __name__ == "__main__":
    main()

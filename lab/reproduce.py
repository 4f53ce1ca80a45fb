"""Every claim of the paper, re-enacted: trains what is missing, measures, and writes a report with
a verdict for each. lab/claims.toml says what each claim compares.

    python -m lab.reproduce                      three seeds at laptop scale; hours on two cores
    python -m lab.reproduce --seeds 1 --only 8   the central claim alone
    python -m lab.reproduce --scale evening      windows of 16 at first, twice the steps
    python -m lab.reproduce --scale gpu          30M parameters on one GPU

Writes results/reproduce-<scale>/report.md and retrieval.png (with --only: report-8.md, ...) from
the records of lab/runs.py, so that a command that was cut off goes on; with --recorded from these
alone.
"""

import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from commandline import CommandLine, guarded
from data.corpus import Corpus, load_corpus
from data.prepare import open_corpus as default_corpus
from evaluate import mean_and_error
from lab import runs, speed
from lab.report import LEARNED, at_least, figure_of, length_axis, markdown, trained_length
from lab.runs import HERE, TASKS, TIMES, Plan, found, has_learned
from model import require
from recipe import build

RESULTS = HERE / "results"
WORDS = tomllib.loads((Path(__file__).parent / "claims.toml").read_text(encoding="utf-8"))
CLAIMS = {int(name): claim for name, claim in WORDS.items() if name.isdigit()}
SCALES, VARIANTS, DEEP = (WORDS[key] for key in ("scales", "flags", "deep"))
MARGIN = 0.02  # of "no worse"
MORE = 5  # seeds, where three leave a comparison open
FAR = 0.25  # apart: seeds are told one by one

# What is measured, by variant and seed ------------------------------------------------------------


@dataclass
class Lab:
    """Runs of every variant and seed, made when they are first asked for."""

    scale: str
    corpus: Corpus
    seeds: list[int]
    rates: Sequence[float] = runs.RATES
    chosen: dict[str, Plan] = field(default_factory=dict)  # see `choose`
    first: set[str] = field(default_factory=set)  # variants with all that tables and picture show
    second: set[str] = field(default_factory=set)  # those whose second stage was asked for

    def __post_init__(self):
        self.recipes = SCALES[self.scale]
        self.stretch = self.recipes.get("stretch", 1)
        base, extend = (Plan(self.recipes[name]).toml for name in ("base", "extend"))
        self.trained, self.extended_to = map(trained_length, (base, extend))
        self.lengths = [times * self.trained for times in TIMES]  # at which needles are asked for
        self.longest = self.lengths[-1]
        self.beyond = self.longest // self.extended_to
        self.window = base["model"]["window"]  # of the windowed variants' training
        self.n_layer = base["model"]["n_layer"]
        tokens = lambda toml: toml["batch_tokens"] * sum(phase["steps"] for phase in toml["phase"])
        self.tokens = self.stretch * tokens(base) + tokens(extend)

    def run(self, plan: Plan) -> dict:
        """The record of a run's own figures."""
        return runs.record(plan, self.corpus, what="run")

    def choose(self, variant: str) -> Plan:
        """The variant's run of seed 1; where it never learned, the one that is not longer."""
        if variant not in self.chosen:
            flags = VARIANTS.get(variant)
            if flags is None:
                flags = {"pattern": variant.removesuffix(" x8")}
                flags |= {"n-layer": "8"} if self.n_layer != 8 else {}
            of = self.recipes["base"], tuple(flags.items()), self.corpus, self.rates, self.stretch
            plan, made = runs.best(*of)
            self.chosen[variant] = plan if has_learned(made) else plan.stretched(self.stretch)
        return self.chosen[variant]

    def same_steps(self, variant: str) -> list[Plan]:
        """The variant's runs of as many steps as every other's, one for each seed: what losses
        compare."""
        plan = self.choose(variant).stretched(self.stretch)
        return [plan.seeded(seed) for seed in self.seeds]

    def base(self, variant: str) -> list[Plan]:
        """Its first stage, what needles compare: of three times the steps where a seed did not
        learn in these; but not where seed 1 never did."""
        learns = has_learned(self.run(self.choose(variant)))
        longer = lambda plan: learns and not has_learned(self.run(plan))
        times = runs.LONGER * self.stretch
        plans = self.same_steps(variant)
        return [plan.stretched(times) if longer(plan) else plan for plan in plans]

    def extended(
        self, variant: str, raised: bool | None = None, of: list[Plan] | None = None
    ) -> list[Plan]:
        """Its second stage: theta raised for RoPE models, untouched for others, or as is said."""
        self.second.add(variant)
        raised = variant in ("R", "QK-Norm") if raised is None else raised
        recipe = self.recipes["raised" if raised else "extend"]
        return [plan.extended(recipe) for plan in of or self.base(variant)]

    # Each of these returns an array, a value for each seed.

    def loss(self, variant: str, extended: bool = False) -> np.ndarray:
        """Validation loss, nats per token, after the same steps for every variant."""
        plans = self.same_steps(variant)
        plans = self.extended(variant, of=plans) if extended else plans
        return np.array([self.run(plan)["val_loss"] for plan in plans])

    def retrieves(self, variant: str) -> np.ndarray:
        """Had the runs of these losses learned to retrieve?"""
        return np.array([has_learned(self.run(plan)) for plan in self.same_steps(variant)])

    def needles(self, plans: list[Plan], length: int, task: str, **treatment) -> np.ndarray:
        """Exact match of a task at a length."""
        made = [runs.record(plan, self.corpus, treatment) for plan in plans]
        return np.array([found(each, task, length)["exact"] for each in made])

    def mass(self, plans: list[Plan], key: str, layers: str = "all", times: int = 4) -> np.ndarray:
        """A figure of lab.attention_mass at so many times the trained length."""
        which, values = (times * self.trained, layers), []
        for plan in plans:
            rows = runs.record(plan, self.corpus, what="attention")["masses"]
            values += [row[key] for row in rows if (row["length"], row["layers"]) == which]
        return np.array(values)

    def windowed(self, window: str) -> list[dict]:
        """Records of rrrN of that window from the first step to the last."""
        plan = Plan(self.recipes["base"], (("window", window),)).stretched(self.stretch)
        return [self.run(plan.seeded(seed)) for seed in self.seeds]

    def drop_unfinished(self) -> None:
        """Keep for tables and picture the variants of which every seed is recorded."""

        def whole(make: Callable[[], object]) -> bool:
            with suppress(runs.NotRecorded):
                make()
                return True
            return False

        needles = lambda stage, name: lambda: self.needles(stage(name), self.trained, TASKS[0])
        losses = lambda name: lambda: self.loss(name)
        self.chosen = {name: plan for name, plan in self.chosen.items() if whole(losses(name))}
        self.first = {name for name in self.chosen if whole(needles(self.base, name))}
        second = self.second & self.first
        self.second = {name for name in second if whole(needles(self.extended, name))}

    def learned(self, variant: str, task: str) -> np.ndarray:
        """Does the run find LEARNED of a task's needles at the trained length?"""
        return self.needles(self.base(variant), self.trained, task) >= LEARNED


def costs(repeat: int) -> dict:
    """Cache, training step and FLOPs of rrrN over R's at one length: measured, or as recorded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, length = WORDS["cost"][device.type]

    def make() -> dict:
        shapes = {pattern: speed.SHAPES[name] | {"pattern": pattern} for pattern in ("R", "rrrN")}
        full, swa = (speed.Job(pattern, shape, 1, length) for pattern, shape in shapes.items())
        works = {job.name: job.work(device) for job in (full, swa)}
        speed.alternate(works, range(1), speed.clock_of(device))  # the first is slow
        seconds = speed.alternate(works, range(3), speed.clock_of(device))
        return {
            "length": length,
            "cache": swa.cache()[0] / full.cache()[0],
            "cache_promised": swa.cache()[1],
            "step": seconds["rrrN"] / seconds["R"],
            "flops": swa.flops() / full.flops(),
        }

    return runs.kept(["cost", device.type, length, repeat], make)


# What claims.toml compares ------------------------------------------------------------------------

# Metrics: (lab, label, task) -> an array, a value for each seed. Labels are mostly variants.

short = lambda lab, name, task: lab.needles(lab.base(name), lab.trained, task)
long = lambda lab, name, task: lab.needles(lab.base(name), lab.longest, task)
kept = lambda at_longest, at_trained: at_longest / at_trained.clip(1e-9)
entropy = lambda lab, name, task: lab.mass(lab.extended(name), "entropy_share")
layers = lambda lab, key, kind: lab.mass(lab.extended("RN"), key, kind.split()[0])
theta = lambda lab, label: lab.extended("RN", raised=label == "raised")
costs_of = lambda **keys: (
    lambda lab, label, task: np.array([costs(seed)[keys[label]] for seed in lab.seeds])
)


def cut(lab: Lab, label: str, task: str) -> np.ndarray:
    """What RRRN finds under windows at evaluation only, or half of what it finds without."""
    if label == "half of whole":
        return short(lab, "RRRN", task) / 2
    return given(lab, "evaluation only", 1)


def given(lab: Lab, label: str, times: int) -> np.ndarray:
    """What RRRN, trained without windows, finds of single needles under windows at so many times
    the trained length: given at evaluation only, or by a short training, or after the same training
    without them (control)."""
    plans, whole = lab.base("RRRN"), {"pattern": "rrrN", "window": lab.window}
    if label != "evaluation only":
        plans = [plan.extended(lab.recipes["convert"]) for plan in plans]
    if label == "control":
        plans = [plan.with_flags(pattern="RRRN") for plan in plans]
    treatment = {} if label == "short training" else whole
    return lab.needles(plans, times * lab.trained, "single", **treatment)


def first_step(curve: list[tuple[int, float]]) -> int:
    """The step at which LEARNED of the needles were found twice in a row for the first time; all
    steps where they never were."""
    twice = (step for (step, a), (_, b) in zip(curve, curve[1:]) if min(a, b) >= LEARNED)
    return next(twice, curve[-1][0])


def slope(lab: Lab, label: str, task: str) -> np.ndarray:
    """Nats a doubling of the distance in the last layer of a variant after the same steps for all,
    or of rrrN at the start."""
    if label != "start":
        return lab.mass(lab.same_steps(label), "logit_slope", times=1)
    made = [runs.record(plan, lab.corpus, what="attention") for plan in lab.same_steps("rrrN")]
    return np.array([each["start"][0]["logit_slope"] for each in made])


METRICS = {
    "loss": lambda lab, name, task: lab.loss(name),
    "extended_loss": lambda lab, name, task: lab.loss(name, extended=True),
    "extended": lambda lab, name, task: lab.needles(lab.extended(name), lab.extended_to, task),
    "farthest": lambda lab, name, task: lab.needles(lab.extended(name), lab.longest, task),
    "kept_share": lambda lab, *what: kept(long(lab, *what), short(lab, *what)),
    "kept_extended": lambda lab, name, task: kept(
        *(lab.needles(lab.extended(name), length, task) for length in (lab.longest, lab.trained))
    ),
    "begin": lambda lab, name, task: lab.mass(lab.extended(name), "begin"),
    "needle": lambda lab, name, task: lab.mass(lab.extended(name), "needle"),
    "entropy": entropy,
    "entropy_ratio": lambda lab, *_: entropy(lab, "QK-Norm", "") / entropy(lab, "R", ""),
    "layers_needle": lambda lab, kind, task: layers(lab, "needle", kind),
    "layers_qc": lambda lab, kind, task: layers(lab, "qc", kind),
    "theta_qc": lambda lab, label, task: lab.mass(theta(lab, label), "qc", "RoPE"),
    "theta_needles": lambda lab, label, task: lab.needles(theta(lab, label), lab.longest, task),
    "deep_loss": lambda lab, ratio, task: lab.loss(DEEP[ratio]),
    "deep_needles": lambda lab, ratio, task: long(lab, DEEP[ratio], task),
    "cache": costs_of(measured="cache", promised="cache_promised"),
    "step": costs_of(measured="step", FLOPs="flops"),
    "cut": cut,
    "first_step": lambda lab, window, task: np.array(
        [first_step(made["curve"]) for made in lab.windowed(window)]
    ),
    "windowed": lambda lab, window, task: np.array(list(map(runs.own_score, lab.windowed(window)))),
    **{f"given_{n}": lambda lab, label, task, n=n: given(lab, label, n) for n in (1, 4, 16)},
    "unextended": long,
    "slope": slope,
    "against_bar": lambda lab, name, task: (
        np.full(len(lab.seeds), LEARNED) if name == "bar" else short(lab, name, task)
    ),
}
ABOUT = {  # of metrics about retrieval: label -> the variant that must have learned the task
    **dict.fromkeys(("extended", "farthest", "kept_share", "kept_extended"), lambda name: name),
    **dict.fromkeys(("layers_needle", "theta_needles"), lambda label: "RN"),
    "deep_needles": DEEP.get,
    "cut": lambda label: "RRRN",
    **{f"given_{n}": lambda label: "RRRN" for n in (1, 4, 16)},
    **dict.fromkeys(("unextended", "needle"), lambda name: name),
}
LOSSES = {  # of losses: label -> variant; of these the lower one must have learned, or (deep) both
    **dict.fromkeys(("loss", "extended_loss"), lambda name: name),
    "deep_loss": DEEP.get,
}
RULES = {  # differences that are positive where the claim holds, from the values of each label
    "more": lambda a, b: a - b,
    "less": lambda a, b: b - a,
    "no_less": lambda a, b: a - b + MARGIN,
    "no_more": lambda a, b: b - a + MARGIN,
    "under_a_tenth": lambda whole, part: whole / 10 - part,
    "near_two": lambda ratio: 0.5 - abs(ratio - 2),
    "as_promised": lambda measured, promised: 0.01 - abs(measured - promised),
    "near_flops": lambda measured, flops: 1.25 * flops - measured,
}
BOUNDS = ("near_two", "as_promised", "near_flops")  # rules that name no order to reverse


class Part(NamedTuple):
    """A comparison's outcome; arrays have a value a seed."""

    says: str
    shown: dict[str, np.ndarray]  # by label
    differences: np.ndarray
    learned: dict[str, np.ndarray] = {}  # by variant that it is about
    tokens: tuple[int, int] = (0, 0)  # of training: as many as there were, and as it takes
    opposite: str = "reversed"  # the verdict where the differences are as clearly negative


def parts_of(lab: Lab, number: int) -> list[Part]:
    """A claim, measured; by MORE seeds what three or more leave open, where they may be run. Where
    nothing may run, by MORE seeds wherever all are recorded, and a part without its records shows
    nothing."""
    tokens = lab.tokens, CLAIMS[number].get("tokens", 0)
    measured = lambda lab, row: compare(lab, *row)._replace(tokens=tokens)
    more, parts = replace(lab, seeds=list(range(1, MORE + 1))), []
    for row in CLAIMS[number]["parts"]:
        part = Part(named(lab, row[0]), {}, np.array([]))
        with suppress(runs.NotRecorded):
            part = measured(lab, row)
            wanted = verdict(part) == "not decided" or not runs.MAY_RUN
            if wanted and 3 <= len(lab.seeds) < MORE:
                part = measured(more, row)
        parts.append(part)
    return parts


def named(lab: Lab, says: str) -> str:
    """A part's words, with the lab's lengths in them."""
    return says.format(lab=lab, learned=LEARNED)


def compare(lab: Lab, says: str, rule: str, metric: str, of: list[str], task="single") -> Part:
    """A part of a claim, measured now where no record says it."""
    shown = {label: METRICS[metric](lab, label, task) for label in of}
    variants = map(ABOUT[metric], of) if metric in ABOUT else ()
    learned = {name: lab.learned(name, task) for name in variants}
    if metric in LOSSES:
        lower = [min(of, key=lambda label: shown[label].mean())]
        names = map(LOSSES[metric], of if metric == "deep_loss" else lower)
        learned = {name: lab.retrieves(name) for name in names}
    part = Part(named(lab, says), shown, RULES[rule](*shown.values()), learned)
    return part._replace(opposite="outside") if rule in BOUNDS else part


def verdict(part: Part) -> str:
    """The rule that every report begins with: WORDS["rule"]."""
    if not len(part.differences):
        return "not run"
    seen, wanted = part.tokens
    if seen < wanted:
        return f"not testable at this scale: {seen:,} tokens, and {wanted:,} are wanted"
    if names := unlearned_in(part):
        return f"not decided: {names} had not learned"
    if len(part.differences) < 2:
        return "not decided: one seed"
    mean, error = mean_and_error(part.differences)
    for word, sign in (("reproduced", 1), (part.opposite, -1)):
        if all(sign * d > 0 for d in part.differences) and sign * mean > 2 * error:
            return word
    return "not decided"


def unlearned_in(part: Part) -> str:
    """The variants that had not learned, with the seeds where it was only some."""
    names = []
    for name, learned in part.learned.items():
        seeds = [str(seed) for seed, has in enumerate(learned, 1) if not has]
        if seeds:
            some = len(seeds) < len(learned)
            names.append(name + (f" (seed {', '.join(seeds)})" if some else ""))
    return ", ".join(names)


def summary(verdicts: list[str]) -> str:
    """The verdict of a claim, from its parts'."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    words = ("reproduced", "reversed", "outside", "not decided", "not run")
    counts = {word: sum(v.startswith(word) for v in verdicts) for word in words}
    return ", ".join(f"{n} of {len(verdicts)} {word}" for word, n in counts.items() if n)


def shown(values: Sequence[float]) -> str:
    """Mean ± standard error over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" + (f" ± {error:.3f}" if len(values) > 1 else "")


def by_seed(values: np.ndarray) -> str:
    """The same, and each where they lie far apart: two camps have no mean."""
    apart = np.ptp(values) > FAR
    return shown(values) + (f" ({', '.join(f'{v:.2f}' for v in values)})" if apart else "")


def report(lab: Lab, results: dict[int, list[Part]], picture: str, only: str) -> str:
    """Markdown: the verdicts, every comparison, and the runs behind them; `only`, the flag that
    chose the claims."""
    verdicts, details = [], []
    for number, parts in results.items():
        claim, words = CLAIMS[number], [verdict(part) for part in parts]
        verdicts.append([str(number), claim["title"], claim["paper"], f"**{summary(words)}**"])
        rows = []
        for part, word in zip(parts, words):
            measured = ", ".join(f"{label} {by_seed(of)}" for label, of in part.shown.items())
            seeds = len(part.differences)
            word += f" ({seeds} seeds)" if seeds > len(lab.seeds) else ""
            difference = shown(part.differences) if seeds else ""
            rows.append([part.says, measured, difference, word])
        details += [f"## {number}. {claim['title']}", f"Paper: {claim['paper']}."]
        head = ["comparison", "measured", "for the claim", "verdict"]
        if set(words) == {"not run"}:
            details.append("Not run yet at this scale.")
            continue
        details.append(markdown(head, rows))
        about = [claim.get("note", "").format(lab=lab)]
        if not {"reproduced", "not decided: one seed", "not run"}.issuperset(words):
            about.append(claim.get("otherwise", ""))
        details += [" ".join(text.strip() for text in about if text)] if any(about) else []
    page = WORDS["page"].format(
        lab=lab,
        n=len(lab.seeds),
        seeds=f"{len(lab.seeds)} seed" + "s" * (len(lab.seeds) > 1),
        only=only,
        masses=4 * lab.trained,
        rule=WORDS["rule"],
        windowed=begun(lab),
        picture=WORDS["picture"].format(picture=picture) if picture else "",
        verdicts=markdown(["", "claim", "paper", "verdict"], verdicts),
        details="\n\n".join(details),
        about=WORDS["variants"],
        variants=variants(lab),
        unlearned=unlearned(lab),
    )
    return page.replace("  |", " |").rstrip() + "\n"  # an empty cell is one space


def begun(lab: Lab) -> str:
    """How variants without windows began, where the recipe gives them some."""
    base = lab.recipes["base"]
    stages = build(Plan(base).toml | {"stretch": lab.stretch}).stages()
    steps = sum(stage.end - stage.start for stage in stages if stage.windowed)
    said = WORDS["windowed"].format(base=base, steps=steps, all=stages[-1].end)
    return said if steps else ""


def variants(lab: Lab) -> str:
    """A row a variant and stage: its run, its own table, its loss, and its needles by length, where
    all of these are recorded."""
    head = ["variant", "rate", "stretch", "own table at the trained length", "nats per token"]
    rows = []
    for name, chosen in lab.chosen.items():
        plans = lab.base(name) if name in lab.first else lab.same_steps(name)
        own = " ".join(f"{runs.own_score(lab.run(plan)):.2f}" for plan in plans)
        stretch = " ".join(plan.flag("stretch", "1") for plan in plans)
        cells = [str(chosen.rate), stretch, own, shown(lab.loss(name))]
        if name not in lab.first:
            rows.append([name, *cells, *[""] * len(lab.lengths)])
            continue
        stages = {name: plans}
        if name in lab.second:
            stages[f"{name}, extended"] = lab.extended(name)
        for stage, plans in stages.items():
            tasks = [[shown(lab.needles(plans, n, task)) for task in TASKS] for n in lab.lengths]
            rows.append([stage, *cells, *map(" / ".join, tasks)])
            cells = [""] * 4
    return markdown([*head, *(f"{n:,}" for n in lab.lengths)], rows)


def unlearned(lab: Lab) -> str:
    """A paragraph a variant that never learned: what its longest run found while it trained."""
    said = []
    for name, chosen in lab.chosen.items():
        if name in lab.first and not has_learned(lab.run(chosen)):
            points = runs.learning(lab.run(chosen.stretched(runs.LONGER * lab.stretch)))
            said.append(WORDS["unlearned"].format(name=name, lab=lab, points=points).strip())
    return "\n\n".join(said)


def plot(lab: Lab, out: Path) -> None:
    """Needles against length, mean and error over seeds: a row a stage, a column a task."""
    stages = [("trained", lab.base, lab.trained, lab.first)]
    if lab.second:
        stages.append(("extended", lab.extended, lab.extended_to, lab.second))
    options = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = figure_of(14, 0.4 + 3 * len(stages), len(stages), len(TASKS), **options)
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
    parser = CommandLine(prog="python -m lab.reproduce", description=f"{__doc__}\n{WORDS['rule']}")
    add = parser.add_argument
    titles = "; ".join(f"{n} {claim['title'].strip()}" for n, claim in CLAIMS.items())
    several = {"nargs": "+", "type": int, "choices": CLAIMS}
    add("--scale", choices=SCALES, default="laptop", help="(default: laptop)")
    add("--seeds", type=int, default=3, help="how many, from 1 on (default: 3)")
    add("--only", **several, metavar="CLAIM", help=f"numbers of claims: {titles}")
    add("--recorded", action="store_true", help="train nothing: what no record says is not run")
    runs.add_rates(parser)
    args = parser.parse(argv)
    at_least(1, seeds=args.seeds)
    require(args.seeds <= 1000, f"--seeds {args.seeds} are more than anybody trains: 1,000 or less")
    runs.MAY_RUN = not args.recorded
    needs = lambda number: set(CLAIMS[number].get("needs", ()))
    ready = [number for number in CLAIMS if needs(number) <= set(SCALES[args.scale])]
    only = sorted(set(args.only or ready))
    for number in only:
        missing = f"--only {number}: the scale {args.scale} has no recipe for that claim"
        require(number in ready, missing)
    data = Plan(SCALES[args.scale]["base"]).toml.get("data")
    corpus = load_corpus(data) if data else default_corpus()
    lab = Lab(args.scale, corpus, list(range(1, args.seeds + 1)), args.rates)
    some = [] if only == ready else list(map(str, only))
    suffix, flag = "-".join(["", *some]), " ".join([" --only", *some] if some else [])
    folder, picture = RESULTS / f"reproduce-{args.scale}", f"retrieval{suffix}.png"
    folder.mkdir(parents=True, exist_ok=True)
    for number in only:
        parts_of(lab, number)  # trains
    runs.MAY_RUN = False  # verdicts, tables and picture show what there is
    results = {number: parts_of(lab, number) for number in only}
    lab.drop_unfinished()
    picture = picture if lab.first & VARIANTS.keys() else ""  # which has no variant of claim 9
    if picture:
        plot(lab, folder / picture)
    out = folder / f"report{suffix}.md"
    if args.rates != list(runs.RATES):
        flag += " --rates " + " ".join(map(str, args.rates))
    whole = all(len(part.differences) for parts in results.values() for part in parts)
    flag += "" if whole else " --recorded"
    out.write_text(report(lab, results, picture, flag), encoding="utf-8")
    for number, parts in results.items():
        word = summary([verdict(part) for part in parts])
        print(f"{number}. {CLAIMS[number]['title'].strip()}: {word}")
    print(f"written to {out}")


if __name__ == "__main__":
    main()

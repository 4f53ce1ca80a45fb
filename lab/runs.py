"""Trainings that leave a record, so that nothing is trained twice: results/runs.jsonl, a line each.

A record's key is a hash of the recipe's content, the flags, the run it starts from, the treatment
of positions at evaluation, the corpus, what is measured, and VERSION; not of machine, precision,
torch or code: whoever changes what a step or a needle is raises VERSION. Where the record is there,
nothing runs; where a training was cut off, it goes on. Several commands may work side by side.
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from pathlib import Path

import torch

from commandline import CommandLine, locked
from data.corpus import Corpus
from data.needles import Needles
from lab import attention_mass, needles
from lab.curves import read_log
from lab.report import LEARNED, trained_length
from model import Transformer, require
from recipe import read_toml

HERE = Path(__file__).resolve().parent.parent
RECORDS = HERE / "results" / "runs.jsonl"
WORK = HERE / "out" / ".lab"  # out/* names what train.py made for its user
VERSION = 2  # 2: hidden needle lines weigh nothing as text
MAY_RUN = True  # or else what no record says is NotRecorded
TASKS = ("single", "multi-key", "crowded")
TIMES = (1, 2, 4, 8, 16)  # of the trained length: where needles are asked for
EXAMPLES = 24  # of each task at each length, at any depth: a standard error of .1 at the most
MASS_TIMES, MASS_EXAMPLES = (1, 4, 16), 16  # of attention mass
RATES, LONGER, CHANCE = (0.003, 0.006, 0.01), 3, 0.15  # see `best`


class NotRecorded(ValueError):
    """A record that is not there, where nothing may run."""


@dataclass(frozen=True)
class Plan:
    """A training: a recipe of recipes/, flags of train.py, and the run that it starts from."""

    recipe: str
    flags: tuple[tuple[str, str], ...] = ()
    init: "Plan | None" = None

    def __str__(self) -> str:
        """The command that makes it, without its folders."""
        start = "" if self.init is None else f" from ({self.init})"
        flags = "".join(f" --{name} {value}".rstrip() for name, value in self.flags)
        return f"train.py recipes/{self.recipe}.toml{flags}{start}"

    def key(self, corpus: Corpus) -> str:
        """Twelve hex digits."""
        start = self.init and self.init.key(corpus)
        return _hash([VERSION, self.toml, sorted(self.flags), start, corpus.hash])

    @property
    def toml(self) -> dict:
        """The recipe's tables."""
        return _tables(HERE / "recipes" / f"{self.recipe}.toml")

    @property
    def trained(self) -> int:
        """The trained length, in tokens: the longest before any extension."""
        return self.init.trained if self.init else trained_length(self.toml)

    @property
    def rate(self) -> float:
        """Its learning rate."""
        return float(self.flag("lr", self.toml["lr"]))

    def flag(self, name: str, default: str = "") -> str:
        """The value of a flag."""
        return dict(self.flags).get(name, default)

    def with_flags(self, **flags: str) -> "Plan":
        """The same with these flags, or without those that are given as ""."""
        kept = tuple(flag for flag in self.flags if flag[0] not in flags)
        return replace(self, flags=kept + tuple((k, v) for k, v in flags.items() if v))

    def stretched(self, times: int) -> "Plan":
        """The same for so many times the recipe's steps."""
        return self.with_flags(stretch=str(times) if times > 1 else "")

    def seeded(self, seed: int) -> "Plan":
        """The same from another seed; 1 is the recipe's own."""
        return self.with_flags(seed=str(seed) if seed > 1 else "")

    def extended(self, recipe: str) -> "Plan":
        """A short training by `recipe` from this run on; the record asks needles, it need not."""
        layers = self.flag("n-layer", str(self.toml["model"]["n_layer"]))
        plan = Plan(recipe, (("n-layer", layers), ("eval-questions", "0")), self)
        return plan.with_flags(seed=self.flag("seed"))


_tables = cache(read_toml)  # a report asks some ten thousand times


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


# Trainings ----------------------------------------------------------------------------------------


def alone(name: str):
    """Wait while another process makes the same run or record."""
    return locked(WORK / f"{name}.record", "", wait=-1)


def finished(folder: Path) -> bool:
    """Has the run in `folder` written its final entry? A log that a kill cut off has not."""
    try:
        return bool(read_log(folder)[-1].get("final"))
    except (OSError, ValueError):
        return False


def trained(plan: Plan, corpus: Corpus) -> Path:
    """The folder of the run, trained or continued now where it must be. ValueError if it fails."""
    start = plan.init and trained(plan.init, corpus) / "last"
    folder = WORK / plan.key(corpus)
    with alone(folder.name):
        if finished(folder):
            return folder
        words = ["--resume", str(folder)]
        if not (folder / "last").exists():
            shutil.rmtree(folder, ignore_errors=True)  # cut off before its first checkpoint
            words = [str(HERE / "recipes" / f"{plan.recipe}.toml"), "--out", str(folder)]
            words += ["--data", str(corpus.folder.resolve())]
            words += [word for name, value in plan.flags for word in (f"--{name}", value) if word]
            words += ["--init", str(start)] if start else []
        print(f"training {folder.name}: {plan}", file=sys.stderr, flush=True)
        log = WORK / f"{folder.name}.log"
        command = [sys.executable, str(HERE / "train.py"), *words]
        with open(log, "a") as file:
            status = subprocess.run(command, cwd=HERE, stdout=file, stderr=file).returncode
        failed = f"a training failed (status {status}): {log} says why; what is done is kept"
        require(status == 0, failed)
    return folder


# Records ------------------------------------------------------------------------------------------


def record(
    plan: Plan, corpus: Corpus, treatment: dict | None = None, what: str = "needles"
) -> dict:
    """What the run measured, evaluated under `treatment` (fields of ModelConfig): read from its
    record, or made now.

    Keys: plan, treatment, recipe, corpus, seconds of training; without a treatment also val_loss,
    val_bits_per_byte, the run's own table and its needles by step (curve); by `what`: needles,
    cells of lab.needles, or masses, heads and start, rows of lab.attention_mass (the last of the
    weights before training, at the trained length). "run" is content with a needle record."""
    treatment = treatment or {}
    elsewhere = [] if plan.trained == 512 else [plan.trained]
    asked = {
        "run": ["run", "curve"],
        "needles": [EXAMPLES, TASKS, TIMES, "curve"],
        "attention": ["attention", MASS_EXAMPLES, MASS_TIMES, "slope"],
    }
    identity = lambda what: [plan.key(corpus), treatment, *asked[what], *elsewhere]
    if what == "run" and _hash(identity("needles")) in records():
        what = "needles"
    return kept(identity(what), lambda: _measured(plan, corpus, treatment, what))


def records() -> dict[str, dict]:
    """All records by key."""
    status = RECORDS.stat() if RECORDS.exists() else None
    return _read(RECORDS, status.st_mtime_ns, status.st_size) if status else {}


@lru_cache(maxsize=1)  # while the file stands still
def _read(path: Path, *version: int) -> dict[str, dict]:
    try:
        made = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return {record.pop("key"): record for record in made}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        mend = "take the line that is no record out, or put the file back"
        raise ValueError(f"{path} is damaged ({error!r}): {mend}") from None


def kept(identity: list, make: Callable[[], dict]) -> dict:
    """The record of that identity, made now where there is none, whole or not at all."""
    key = _hash(identity)
    if key in records():
        return records()[key]
    if not MAY_RUN:
        raise NotRecorded(f"no record says {identity}")
    with alone(key):
        if key not in records():  # nor has another process made it meanwhile
            line = json.dumps({"key": key, **make()}, separators=(",", ":"))
            with alone("records"):
                lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
                RECORDS.parent.mkdir(parents=True, exist_ok=True)
                partial = RECORDS.with_suffix(".partial")
                partial.write_text("\n".join(sorted([*lines, line])) + "\n", encoding="utf-8")
                os.replace(partial, RECORDS)
        return records()[key]


def _measured(plan: Plan, corpus: Corpus, treatment: dict, what: str) -> dict:
    """A record of a run's, trained now where it must be."""
    folder = trained(plan, corpus)
    run, entries = json.loads((folder / "run.json").read_text()), read_log(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Transformer.from_pretrained(folder / "last", device)
    model.config = replace(model.config, **treatment)
    hidden = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    own = () if treatment else ("val_loss", "val_bits_per_byte", "table")
    made = {
        "plan": str(plan),
        "treatment": treatment,
        "recipe": {key: value for key, value in run["recipe"].items() if key != "data"},
        **{key: run[key] for key in ("corpus", "python", "torch", "device", "threads")},
        "seconds": round(sum(entry.get("seconds", 0) for entry in entries), 1),
        **{key: entries[-1][key] for key in own},
    }
    if not treatment:  # at the trained length
        at = [e for e in entries if "needles" in e and e["length"] == plan.trained]
        made["curve"] = [[entry["step"], round(entry["needles"], 3)] for entry in at]
    if what == "needles":
        made["needles"] = []
        for task, times in product(TASKS, TIMES):
            cell = (task, plan.trained * times, None, EXAMPLES, 1)
            measured = needles.measure(model, hidden, "", *cell)
            made["needles"].append(_fields(measured, "depth", "examples"))
    if what == "attention":
        made["masses"] = []
        for times in MASS_TIMES:
            cell = (plan.trained * times, MASS_EXAMPLES)
            masses, heads, _ = attention_mass.measure(model, hidden, "", *cell)
            made["masses"] += map(_fields, masses)
        made["heads"] = list(map(_fields, heads))  # at the longest length
        torch.manual_seed(run["recipe"]["seed"])  # as train.py's first weights
        start = Transformer(model.config).to(device), hidden, "", plan.trained, MASS_EXAMPLES
        made["start"] = list(map(_fields, attention_mass.measure(*start)[0]))
    return made


def _fields(row, *left_out: str) -> dict:
    """Of a measurement, as a record keeps it: five digits are enough."""
    kept = {k: v for k, v in row._asdict().items() if k not in ("checkpoint", *left_out)}
    known = {k: v for k, v in kept.items() if v == v}  # JSON has no nan
    return {k: round(v, 5) if isinstance(v, float) else v for k, v in known.items()}


def found(made: dict, task: str, length: int) -> dict:
    """The record's cell of a task at a length, in tokens."""
    cells = made["needles"]
    return next(cell for cell in cells if (cell["task"], cell["length"]) == (task, length))


def own_score(made: dict) -> float:
    """Exact match at the trained length in the run's own table: multi-query, 200 questions. Runs
    are chosen by it, so that the needles of a record's cells stay unseen."""
    trained = trained_length(made["recipe"])
    return next(score["exact"] for score in made["table"] if score["length"] == trained)


def learning(made: dict) -> str:
    """Up to six points of a run's needles against tokens of training, the last among them."""
    curve, batch = made["curve"], made["recipe"]["batch_tokens"]
    some = curve[:: -math.ceil(len(curve) / 6)][::-1]
    return ", ".join(f"{exact:.2f} after {step * batch / 1e6:.1f}M" for step, exact in some)


def has_learned(made: dict) -> bool:
    """Did the run find LEARNED of its own table's needles at the trained length?"""
    return own_score(made) >= LEARNED


def best(
    recipe: str, flags: tuple, corpus: Corpus, rates: Sequence[float] = RATES, stretch: int = 1
) -> tuple[Plan, dict]:
    """The run of a variant that all its tables speak of, and its record. The recipe's own steps
    choose the rate: the lowest loss of those that learned the task, else the most needles found if
    that is above CHANCE, else the lowest loss; then `stretch` times as many; where these have not
    learned the task, the better of these and of LONGER times as many."""
    plans = []
    for rate in rates:
        require(0 < rate < 1, f"--rates {rate:g} is not between 0 and 1")
        plan = Plan(recipe, flags)
        plans.append(plan.with_flags(lr="" if rate == plan.rate else str(rate)))
    measured = lambda plan: record(plan, corpus, what="run")

    def quality(plan: Plan) -> tuple[float, float]:
        exact = min(own_score(measured(plan)), LEARNED)
        return exact if exact > CHANCE else 0.0, -measured(plan)["val_loss"]

    chosen = plans[0] if len(plans) == 1 else max(plans, key=quality)
    chosen = chosen.stretched(stretch)
    if not has_learned(measured(chosen)):
        chosen = max(chosen, chosen.stretched(LONGER * stretch), key=quality)
    return chosen, measured(chosen)


def add_rates(parser: CommandLine) -> None:
    """--rates, for `best` to choose from."""
    many = {"nargs": "+", "type": float, "default": list(RATES), "metavar": "RATE"}
    default = " ".join(map(str, RATES))
    parser.add_argument("--rates", **many, help=f"to choose from (default: {default})")

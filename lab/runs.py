"""Trainings that leave a record, so that nothing is trained twice: results/runs/<key>.json, small, to be committed.

A record's key is a hash of the recipe's content, the flags, the run it starts from, the treatment of positions at evaluation, the
corpus, what is measured, and VERSION; not of machine, precision, torch or code: whoever changes what a step or a needle is raises VERSION.
Where the record is there, nothing runs; where a training was cut off, it goes on.
"""

import fcntl
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import recipe as recipes
from data.corpus import DEFAULT_CORPUS, Corpus, load_corpus
from data.needles import Needles
from data.prepare import prepare_stdlib
from lab import attention_mass, needles
from lab.curves import read_log
from model import Transformer

HERE = Path(__file__).resolve().parent.parent
RECORDS, WORK = (
    HERE / "results" / "runs",
    HERE / "out" / ".lab",
)  # out/* names what train.py made for its user
VERSION = 1
TASKS, TIMES = (
    ("single", "multi-key"),
    (1, 2, 4, 8, 16),
)  # measured at so many times the trained length
EXAMPLES = 24  # of each task at each length, at any depth: a standard error of .1 at the most
MASS_TIMES, MASS_EXAMPLES = (1, 4, 16), 16  # of attention mass
RATES, STRETCHES, LEARNED = (0.003, 0.006, 0.01), (1, 3), 0.8  # see `best`


@dataclass(frozen=True)
class Plan:
    """A training: a recipe of recipes/, flags of train.py (name, value), and the run that it starts from."""

    recipe: str
    flags: tuple[tuple[str, str], ...] = ()
    init: "Plan | None" = None

    def __str__(self) -> str:
        """The command that makes it, without its folders."""
        start = "" if self.init is None else f" from ({self.init})"
        return (
            f"train.py recipes/{self.recipe}.toml"
            + "".join(f" --{name} {value}".rstrip() for name, value in self.flags)
            + start
        )

    def key(self, corpus: Corpus) -> str:
        """Twelve hex digits."""
        start = self.init and self.init.key(corpus)
        return _hash(
            [
                recipes.read_toml(HERE / "recipes" / f"{self.recipe}.toml"),
                sorted(self.flags),
                start,
                corpus.hash,
            ]
        )


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def alone(key: str) -> Iterator[None]:
    """Wait while another process makes the same run or record: several commands may work side by side."""
    WORK.mkdir(parents=True, exist_ok=True)
    with open(WORK / f"{key}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def finished(folder: Path) -> bool:
    """Has the run in `folder` written its final entry? A log that a kill cut off has not."""
    path = folder / "log.jsonl"
    last = path.read_text().splitlines()[-1:] if path.exists() else []
    try:
        return bool(last and json.loads(last[0]).get("final"))
    except ValueError:
        return False


def multiplies_bfloat16() -> bool:
    """Has this CPU bfloat16 units (AVX512-BF16, AMX)? `python -m lab.speed job` tells what they save."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def trained(plan: Plan, corpus: Corpus) -> Path:
    """The folder of the finished run, trained or continued now where it must be. Raises CalledProcessError when training fails."""
    start = plan.init and trained(plan.init, corpus) / "last"
    with alone(plan.key(corpus)):
        return _trained(plan, corpus, start)


def _trained(plan: Plan, corpus: Corpus, start: Path | None) -> Path:
    folder = WORK / plan.key(corpus)
    if finished(folder):
        return folder
    if (folder / "last").exists():
        words = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # cut off before its first checkpoint
        words = [
            str(HERE / "recipes" / f"{plan.recipe}.toml"),
            "--out",
            str(folder),
            "--data",
            str(corpus.folder.resolve()),
        ]
        words += [word for name, value in plan.flags for word in (f"--{name}", value) if word]
        words += ["--bf16"] if multiplies_bfloat16() else []
        words += ["--init", str(start)] if start else []
    print(f"training {folder.name}: {plan}", file=sys.stderr, flush=True)
    with open(WORK / f"{folder.name}.log", "a") as log:
        subprocess.run(
            [sys.executable, str(HERE / "train.py"), *words],
            cwd=HERE,
            check=True,
            stdout=log,
            stderr=log,
        )
    return folder


def record(
    plan: Plan,
    corpus: Corpus,
    treatment: dict | None = None,
    what: str = "needles",
    trained_at: int = 512,
) -> dict:
    """What the run measured, evaluated under `treatment` (fields of ModelConfig): read from its record, or made now.

    Keys: plan, treatment, recipe, corpus, seconds of training; val_loss and val_bits_per_byte at the trained length and table (the
    run's own: multi-query at 0.5 to 16 times the trained length), these three without a treatment only; and by `what`

        run         nothing more (or what a needle record has, where there is one)
        needles     single and multi-key: a list of cells (lab.needles), one a task and length
        attention   masses: a list of rows (lab.attention_mass), one a length and kind of layer; heads, at the longest length

    at TIMES or MASS_TIMES `trained_at` tokens, for extended runs too.
    """
    treatment = treatment or {}
    asked = {
        "run": ["run"],
        "needles": [EXAMPLES, TASKS, TIMES],
        "attention": ["attention", MASS_EXAMPLES, MASS_TIMES],
    }
    identity = lambda what: [
        VERSION,
        plan.key(corpus),
        treatment,
        *asked[what],
        *([trained_at] if trained_at != 512 else []),
    ]
    if what == "run" and path_of(identity("needles")).exists():
        what = "needles"
    return kept(identity(what), lambda: _measured(plan, corpus, treatment, what, trained_at))


def path_of(identity: list) -> Path:
    """The record's file."""
    return RECORDS / f"{_hash(identity)}.json"


def kept(identity: list, make: Callable[[], dict]) -> dict:
    """The record of that identity, made now where there is none, whole or not at all."""
    path = path_of(identity)
    if not path.exists():
        with alone(path.stem):
            if not path.exists():
                RECORDS.mkdir(parents=True, exist_ok=True)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(make(), indent=1) + "\n")
                partial.replace(path)
    return json.loads(path.read_text())


def _measured(plan: Plan, corpus: Corpus, treatment: dict, what: str, trained_at: int) -> dict:
    """A record of a run's, trained now where it must be."""
    folder = trained(plan, corpus)
    run, entries = json.loads((folder / "run.json").read_text()), read_log(folder)
    final = next(entry for entry in reversed(entries) if entry.get("final"))
    model = Transformer.from_pretrained(
        folder / "last", "cuda" if torch.cuda.is_available() else "cpu"
    )
    model.config = replace(model.config, **treatment)
    return {
        "plan": str(plan),
        "treatment": treatment,
        "recipe": {
            key: value for key, value in run["recipe"].items() if key != "data"
        },  # a path; the hash says which corpus
        "corpus": run["corpus"],
        **{key: run[key] for key in ("python", "torch", "device", "threads")},
        "seconds": round(sum(entry.get("seconds", 0) for entry in entries), 1),
        **(
            {}
            if treatment
            else {key: final[key] for key in ("val_loss", "val_bits_per_byte", "table")}
        ),
        **{"run": lambda *_: {}, "needles": _needles, "attention": _attention}[what](
            model, Needles(corpus.tokenizer, corpus.val, evaluation=True), trained_at
        ),
    }


def _needles(model: Transformer, hidden: Needles, trained_at: int) -> dict:
    """What a needle record adds."""
    cells = [
        needles.measure(model, hidden, "", task, trained_at * times, None, EXAMPLES, seed=1)
        for task in TASKS
        for times in TIMES
    ]
    return {
        "needles": [
            {
                key: getattr(cell, key)
                for key in (
                    "task",
                    "length",
                    "exact",
                    "exact_error",
                    "likelihood",
                    "likelihood_error",
                )
            }
            for cell in cells
        ]
    }


def _attention(model: Transformer, hidden: Needles, trained_at: int) -> dict:
    """What an attention record adds, numbers to five digits."""
    short = lambda row: {
        key: round(value, 5) if isinstance(value, float) else value
        for key, value in asdict(row).items()
        if key != "checkpoint"
    }
    masses, heads = [], []
    for times in MASS_TIMES:
        rows, heads, _ = attention_mass.measure(
            model, hidden, "", trained_at * times, MASS_EXAMPLES
        )
        masses += map(short, rows)
    return {"masses": masses, "heads": [short(head) for head in heads]}


def default_corpus() -> Corpus:
    """The corpus of the laptop recipes, prepared now where it is not there. Raises OSError or ValueError."""
    if not DEFAULT_CORPUS.exists():
        prepare_stdlib(DEFAULT_CORPUS)
    return load_corpus()


def found(made: dict, task: str, length: int) -> dict:
    """The record's cell of a task at a length, in tokens."""
    return next(
        cell for cell in made["needles"] if (cell["task"], cell["length"]) == (task, length)
    )


def has_learned(made: dict, trained_at: int) -> bool:
    """Did the run find LEARNED of the needles in its own table (multi-query, 200 questions) at the trained length? Runs are chosen by
    that table, so that the needles of a record's cells stay unseen."""
    return at_trained_length(made, trained_at) >= LEARNED


def at_trained_length(made: dict, trained_at: int) -> float:
    """Exact match in the run's own table."""
    return next(score["exact"] for score in made["table"] if score["length"] == trained_at)


def best(
    recipe: str, flags: tuple, corpus: Corpus, rates: Sequence[float] = RATES, trained_at: int = 512
) -> tuple[Plan, dict]:
    """The run of a variant that all its tables speak of, and its record: the recipe at each of the rates, the best by exact match at the
    trained length, then by loss; where that has not learned the task, the same rate for three times the steps."""
    own = recipes.read_toml(HERE / "recipes" / f"{recipe}.toml")["lr"]
    made: list[tuple[Plan, dict]] = []
    for stretch in STRETCHES:
        for rate in rates if stretch == 1 else [rate]:
            plan = Plan(
                recipe,
                (
                    *flags,
                    *at_rate(rate, own),
                    *((("stretch", str(stretch)),) if stretch > 1 else ()),
                ),
            )
            made.append((plan, record(plan, corpus, what="run", trained_at=trained_at)))
        plan, chosen = max(
            made, key=lambda entry: (at_trained_length(entry[1], trained_at), -entry[1]["val_loss"])
        )
        if has_learned(chosen, trained_at):
            break
        rate = float(dict(plan.flags).get("lr", own))
    return plan, chosen


def at_rate(rate: float, own: float) -> tuple:
    """The flag for a learning rate, none for the recipe's own."""
    return () if rate == own else (("lr", str(rate)),)


def extension(recipe: str, plan: Plan) -> Plan:
    """A short training by `recipe` that starts from the run of `plan`, without a table of its own: the record asks needles anyway."""
    layers = dict(plan.flags).get(
        "n-layer",
        str(recipes.read_toml(HERE / "recipes" / f"{plan.recipe}.toml")["model"]["n_layer"]),
    )
    seed = tuple(flag for flag in plan.flags if flag[0] == "seed")
    return Plan(recipe, (("n-layer", layers), ("eval-questions", "0"), *seed), plan)

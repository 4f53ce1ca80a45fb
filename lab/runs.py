"""Trainings that leave a record, so that nothing is trained twice: results/runs/<key>.json, small, to be committed.

A record's key is a hash of the recipe's content, the flags, the run it starts from, the treatment of positions at evaluation, the
corpus, what is measured, and VERSION; not of machine, precision, torch or code: whoever changes what a step or a needle is raises VERSION.
Where the record is there, nothing runs; where a training was cut off, it goes on.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import recipe as recipes
from data.corpus import Corpus
from data.needles import Needles
from lab.curves import read_log
from lab.needles import measure
from model import Transformer

HERE = Path(__file__).resolve().parent.parent
RECORDS, WORK = HERE / "results" / "runs", HERE / "out" / ".lab"  # out/* names what train.py made for its user
VERSION = 1
TASKS, TIMES = ("single", "multi-key"), (1, 2, 4, 8, 16)  # measured at so many times 512 tokens
EXAMPLES = 24  # of each task at each length, at any depth: a standard error of .1 at the most


@dataclass(frozen=True)
class Plan:
    """A training: a recipe of recipes/, flags of train.py (name, value), and the run that it starts from."""

    recipe: str
    flags: tuple[tuple[str, str], ...] = ()
    init: "Plan | None" = None

    def __str__(self) -> str:
        """The command that makes it, without its folders."""
        start = "" if self.init is None else f" from ({self.init})"
        return f"train.py recipes/{self.recipe}.toml" + "".join(f" --{name} {value}".rstrip() for name, value in self.flags) + start

    def key(self, corpus: Corpus) -> str:
        """Twelve hex digits."""
        start = self.init and self.init.key(corpus)
        return _hash([recipes.read_toml(HERE / "recipes" / f"{self.recipe}.toml"), sorted(self.flags), start, corpus.hash])


def _hash(content) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def finished(folder: Path) -> bool:
    """Has the run in `folder` written its final entry? A log that a kill cut off has not."""
    path = folder / "log.jsonl"
    last = path.read_text().splitlines()[-1:] if path.exists() else []
    try:
        return bool(last and json.loads(last[0]).get("final"))
    except ValueError:
        return False


def multiplies_bfloat16() -> bool:
    """Has this CPU bfloat16 units (AVX512-BF16, AMX)? A training step then takes some two thirds of its time in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def trained(plan: Plan, corpus: Corpus) -> Path:
    """The folder of the finished run, trained or continued now where it must be. Raises CalledProcessError when training fails."""
    folder = WORK / plan.key(corpus)
    if finished(folder):
        return folder
    if (folder / "last").exists():
        words = ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # cut off before its first checkpoint
        words = [str(HERE / "recipes" / f"{plan.recipe}.toml"), "--out", str(folder), "--data", str(corpus.folder.resolve())]
        words += [word for name, value in plan.flags for word in (f"--{name}", value) if word]
        words += ["--bf16"] if multiplies_bfloat16() else []
        words += ["--init", str(trained(plan.init, corpus) / "last")] if plan.init else []
    WORK.mkdir(parents=True, exist_ok=True)
    print(f"training {folder.name}: {plan}", file=sys.stderr, flush=True)
    with open(WORK / f"{folder.name}.log", "a") as log:
        subprocess.run([sys.executable, str(HERE / "train.py"), *words], cwd=HERE, check=True, stdout=log, stderr=log)
    return folder


def record(plan: Plan, corpus: Corpus, treatment: dict | None = None) -> dict:
    """What the run measured, evaluated under `treatment` (fields of ModelConfig): read from its record, or made now.

    Keys: plan, treatment, recipe, corpus, seconds of training, val_loss and val_bits_per_byte at the trained length, table (the
    run's own: multi-query at 0.5 to 16 times the trained length), needles (single and multi-key, one dict a length).
    """
    treatment = treatment or {}
    path = RECORDS / f"{_hash([VERSION, plan.key(corpus), treatment, EXAMPLES, TASKS, TIMES])}.json"
    if path.exists():
        return json.loads(path.read_text())
    folder = trained(plan, corpus)
    run, entries = json.loads((folder / "run.json").read_text()), read_log(folder)
    final = next(entry for entry in reversed(entries) if entry.get("final"))
    model = Transformer.from_pretrained(folder / "last")
    model.config = replace(model.config, **treatment)
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    cells = [measure(model, needles, "", task, 512 * times, None, EXAMPLES, seed=1) for task in TASKS for times in TIMES]
    made = {
        "plan": str(plan),
        "treatment": treatment,
        "recipe": {key: value for key, value in run["recipe"].items() if key != "data"},  # a path; the hash says which corpus
        "corpus": run["corpus"],
        **{key: run[key] for key in ("python", "torch", "device", "threads")},
        "seconds": round(sum(entry.get("seconds", 0) for entry in entries), 1),
        **({} if treatment else {"val_loss": final["val_loss"], "val_bits_per_byte": final["val_bits_per_byte"], "table": final["table"]}),
        "needles": [{key: getattr(cell, key) for key in ("task", "length", "exact", "exact_error", "likelihood", "likelihood_error")} for cell in cells],
    }
    RECORDS.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(made, indent=1) + "\n")
    partial.replace(path)
    return made


def found(made: dict, task: str, length: int) -> dict:
    """The record's cell of a task at a length, in tokens."""
    return next(cell for cell in made["needles"] if (cell["task"], cell["length"]) == (task, length))

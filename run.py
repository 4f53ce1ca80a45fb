"""A run: what the command line asks for, read and checked, and its folder on disk.

    out/RUN/run.json        the recipe, the corpus's hash, versions
    out/RUN/log.jsonl       a line a step and evaluation
    out/RUN/step-000700/    a checkpoint; `last` and `best` are links to such folders

A run begins whole: run.json and a first checkpoint appear together. While somebody trains it, it is
locked. A resume trusts nothing: checksums, the corpus's hash and the configuration must agree.
"""

import json
import math
import os
import platform
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import checkpoint
import recipe as recipes
from commandline import check_memory, choose_device, damaged, git_commit, locked
from data.batches import check_fit
from data.corpus import Corpus
from data.needles import Needles
from data.prepare import open_corpus
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer, require
from parallel import RANK, RANKS

HERE = Path(__file__).parent
OPTIONS = ("out", "resume", "init", "max_steps", "micro_batch", "device", "backend", "compile")
WITH_RESUME = {"resume", "out", "max_steps", "micro_batch", "device", "backend"}


@dataclass
class Run:
    """Everything that training needs."""

    recipe: recipes.Recipe
    name: str
    out: Path
    corpus: Corpus
    needles: Needles | None
    model: Transformer
    device: torch.device
    bf16: bool = False
    compile: bool | None = None  # None, and a micro-batch of 0: device.settle decides
    micro_batch: int = 0  # tokens
    max_steps: int = 0
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    log: Path = Path(os.devnull)  # until the run has a folder; where nothing is kept, for good
    step: int = 0  # steps done
    best: float = math.inf  # validation loss of this phase


def read(argv: list[str] | None, description: str | None = None) -> tuple[Run, bool]:
    """The run that the command line asks for, and whether it resumes one. Raises ValueError or
    OSError with the whole message."""
    args = vars(recipes.command_line(description).parse(argv))
    given, options = args.pop("recipe"), {key: args.pop(key) for key in OPTIONS if key in args}
    path = given or HERE / "recipes" / "laptop.toml"
    resuming, extra = "resume" in options, (options.keys() | args.keys()) - WITH_RESUME
    flags = " ".join("--" + name.replace("_", "-") for name in sorted(extra))
    refusal = f"--resume keeps the run's own recipe and cannot take {flags}: leave that out"
    require(not (resuming and extra), refusal)
    for flag, least in (("max_steps", 0), ("micro_batch", 1)):
        value = options.get(flag, least)
        require(value >= least, f"--{flag.replace('_', '-')} {value} must be at least {least}")
    device, native_bf16 = choose_device(options.get("device"))

    # What to train: by the run's own recipe, or by a file, from a checkpoint's weights or new ones.
    model, default_out = None, lambda recipe: Path("out", recipes.run_name(recipe, path.stem))
    if resuming:
        out = options["resume"] or options.get("out")
        out = out or default_out(recipes.build(recipes.read_toml(path)))
        name, recipe, corpus_hash = read_record(out)
        folders = {os.path.realpath(options.get(key) or out) for key in ("out", "resume")}
        own = len(folders) == 1 and (given is None or given.stem == name)
        require(own, f"{out} has a folder and a recipe ({name}) of its own: give no other")
        source = out / "last"
    else:
        source = options.get("init")
        if source is not None:
            checkpoint.verify_checksums(source)
            model = Transformer.from_pretrained(source, device)
        base = model and model.config
        name, recipe = path.stem, recipes.build(recipes.read_toml(path), args, base, path.name)
        out = options.get("out", default_out(recipe))
        checkpoint.check_links(out)

    # On what: the same corpus as before, with the model's own tokenizer, large enough.
    corpus = open_corpus(recipe.data)
    if resuming and corpus.hash != corpus_hash:
        other = f"{out} was trained on the corpus {corpus_hash} and {recipe.data} is {corpus.hash}"
        raise ValueError(f"{other}: prepare the same one again, or start another run")
    if source is not None and load_tokenizer(source).hash != corpus.tokenizer.hash:
        other = f"the checkpoint {source} and the corpus {recipe.data} have different tokenizers"
        raise ValueError(f"{other}: give the checkpoint's own corpus with --data")
    vocab_size = recipe.model.vocab_size if source else corpus.tokenizer.n_vocab
    recipe = replace(recipe, model=replace(recipe.model, vocab_size=vocab_size))
    needles = check_fit(corpus, recipe, RANKS, ahead=options.get("max_steps", 1) > 0)

    with checkpoint.shapes_only():
        check_memory(Transformer(recipe.model), device)
    if model is None:
        torch.manual_seed(recipe.seed)
        model = Transformer(recipe.model).to(device)
    model.config, model.backend = recipe.model, options.get("backend", "auto")
    model.recompute = recipe.recompute
    run = Run(recipe, name, out, corpus, needles, model.train(), device)
    run.bf16 = native_bf16 if recipe.bf16 is None else recipe.bf16
    run.compile, run.micro_batch = options.get("compile"), options.get("micro_batch", 0)
    run.max_steps = min(options.get("max_steps", recipe.steps), recipe.steps)
    if not resuming:
        check_backend(run)
    return run, resuming


def check_backend(run: Run) -> None:
    """ValueError where steps are ahead and the backend has no backward pass."""
    one_way = run.model.backend == "flex" and run.device.type == "cpu"
    said = "--backend flex cannot train on cpu: banded and sdpa can"
    require(not one_way or run.step >= run.max_steps, said)


def is_run(out: Path) -> bool:
    """A run exists once it has a first checkpoint; before that its folder may be taken over."""
    return (out / "run.json").is_file() and (out / "last").is_dir()


def claim(run: Run):
    """A context in which nobody else trains in the run's folder. ValueError where somebody does:
    training never waits."""
    other = f"another process trains {run.out}: wait, or choose another --out"
    return nullcontext() if RANK > 0 else locked(run.out, other)


def begin(run: Run, argv: list[str]) -> None:
    """Make the run's folder, whole. ValueError where it holds a run. An evaluation alone leaves no
    checkpoint there, and in the folder of a run nothing at all."""
    if RANK > 0 or (is_run(run.out) and run.max_steps == 0):
        return
    mend = f"go on with --resume {run.out}, or choose another folder with --out"
    require(not is_run(run.out), f"{run.out} already holds a run: {mend}")
    cuda = run.device.type == "cuda"
    record = {
        "name": run.name,
        "arguments": argv,
        "recipe": recipes.to_tables(run.recipe),
        "corpus": run.corpus.hash,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bf16": run.bf16,
        "device": torch.cuda.get_device_name() if cuda else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": RANKS,
        "git": git_commit(HERE),
    }
    (run.out / "run.json").unlink(missing_ok=True)
    with checkpoint.atomic_folder(os.path.realpath(run.out)) as folder:
        (folder / "log.jsonl").touch()
        (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if run.max_steps > 0:
            save(run, folder)
    run.log = run.out / "log.jsonl"


def save(run: Run, out: Path, improved: bool = False) -> None:
    """A checkpoint of the steps done, to which `last` points, and `best` where `improved`; those
    that were pointed to before go."""
    target = out / f"step-{run.step:06d}"
    with checkpoint.atomic_folder(target) as folder:
        run.model.save_pretrained(folder)
        run.corpus.tokenizer.save(folder)
        states = [optimizer.state_dict() for optimizer in run.optimizers]
        state = {"step": run.step, "best": run.best, "optimizers": states}
        checkpoint.replace_file(folder / "training.pt", lambda file: torch.save(state, file))
        checkpoint.write_checksums(folder)
    checkpoint.repoint(target, ("last", "best") if improved else ("last",))


def read_record(out: Path) -> tuple[str, recipes.Recipe, str]:
    """Name, recipe and corpus's hash of the run in `out`. FileNotFoundError where there is none."""
    checkpoint.check_links(out)
    if not is_run(out):
        raise FileNotFoundError(f"nothing to resume in {out}: start a run there without --resume")
    record = checkpoint.read_json(path := out / "run.json")
    try:
        recipe = recipes.build({**record["recipe"]}, name=str(path))
        return str(record["name"]), recipe, str(record["corpus"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): put a copy of it back") from None


def resume(run: Run) -> list[dict]:
    """Step and weights from `last` -> its optimizers' states. ValueError where it is damaged."""
    last = run.out / "last"
    checkpoint.verify_checksums(last)
    with damaged(last / "training.pt"):
        state = torch.load(last / "training.pt", map_location="cpu", weights_only=True)
        run.step = checkpoint.typed(int, state["step"], "step")
        run.best, states = float(state["best"]), state["optimizers"]
        require(run.step >= 0, f"step {run.step}")
    require(run.step <= run.recipe.steps, f"{last}: step {run.step} is beyond its run.json")
    check_backend(run)
    checkpoint.verify_config(last, asdict(config_at(run.recipe, run.step)), run.out / "run.json")
    run.model.load_state_dict(Transformer.from_pretrained(last, run.device).state_dict())
    run.log = run.out / "log.jsonl" if RANK == 0 else run.log
    return states


def config_at(recipe: recipes.Recipe, step: int) -> ModelConfig:
    """The configuration after so many steps."""
    return recipe.stage_at(step - 1).config if step else recipe.model


class Log:
    """log.jsonl: one JSON object a line; what an earlier attempt wrote beyond `step` is dropped."""

    def __init__(self, path: Path, step: int):
        if path.is_file():
            kept = b"".join(x + b"\n" for x in path.read_bytes().splitlines() if step_of(x) <= step)
            checkpoint.replace_file(path, lambda partial: partial.write_bytes(kept))
        self.file = open(path, "ab", buffering=0)  # nothing is left to write when a disk is full

    def write(self, **entry) -> None:
        """Append, and let it be seen at once."""
        line = json.dumps(entry).encode() + b"\n"
        while line:  # a disk that fills takes a part, and refuses the rest
            line = line[self.file.write(line) :]


def step_of(line: bytes) -> float:
    """The step of a line of the log; infinity where it is no entry, as when a kill cut it off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, LookupError, OverflowError, RecursionError):
        return math.inf

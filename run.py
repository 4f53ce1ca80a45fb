"""A run: what the command line asks for, read and checked, and its folder on disk.

    out/RUN/run.json        the recipe, the corpus's hash, versions
    out/RUN/log.jsonl       a line a step and evaluation
    out/RUN/step-000900/    a checkpoint; `last` and `best` are links to such folders

A run begins whole: run.json and a first checkpoint appear together. While somebody trains it, it is
locked. A resume trusts nothing: checksums, the corpus's hash and the configuration must agree.
"""

import json
import math
import os
import platform
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

import checkpoint
import recipe as recipes
from commandline import choose_device, git_commit, locked
from data.batches import check_fit
from data.corpus import Corpus
from data.needles import Needles
from data.prepare import open_corpus
from data.tokenizer import load_tokenizer
from model import ModelConfig, Transformer
from parallel import RANK, RANKS
from recipe import Recipe

HERE = Path(__file__).parent
OPTIONS = ("out", "resume", "init", "max_steps", "micro_batch", "device", "backend", "compile")
WITH_RESUME = {"resume", "out", "max_steps", "micro_batch", "device", "backend"}


@dataclass
class Run:
    """Everything that training needs."""

    recipe: Recipe
    name: str
    out: Path
    corpus: Corpus
    needles: Needles | None
    model: Transformer
    device: torch.device
    bf16: bool
    compile: bool
    micro_batch: int  # tokens
    max_steps: int
    lock: object = None
    log: Path = Path(os.devnull)  # until the run has a folder; where nothing is kept, for good
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    step: int = 0  # steps done
    best: float = math.inf  # validation loss of this phase


def read(argv: list[str] | None, description: str | None = None) -> tuple[Run, bool]:
    """The run that the command line asks for, and whether it resumes one. Raises ValueError or
    OSError with the whole message."""
    args = vars(recipes.command_line(description).parse(argv))
    path = args.pop("recipe") or HERE / "recipes" / "laptop.toml"
    options = {key: args.pop(key) for key in OPTIONS if key in args}
    resuming = "resume" in options
    check_options(options, args)
    device, native_bf16 = choose_device(options.get("device"))

    model = None
    if resuming:
        default = Path("out", recipes.run_name(recipes.build(recipes.read_toml(path)), path.stem))
        out = options["resume"] or options.get("out") or default
        name, recipe, corpus_hash = read_record(out)
        source = out / "last"
    else:
        source = options.get("init")
        if source is not None:
            model = Transformer.from_pretrained(source, device)
        base = model and model.config
        name, recipe = path.stem, recipes.build(recipes.read_toml(path), args, base, path.name)
        out = options.get("out", Path("out", recipes.run_name(recipe, name)))

    corpus = open_corpus(recipe.data)
    if resuming and corpus.hash != corpus_hash:
        raise ValueError(
            f"{out} was trained on the corpus {corpus_hash} and {recipe.data} holds {corpus.hash}: "
            "prepare the same one again, or start another run"
        )
    recipe = replace(recipe, model=replace(recipe.model, vocab_size=corpus.tokenizer.n_vocab))
    needles = check_fit(corpus, recipe.stages(), recipe.batch_tokens, recipe.seed, RANKS)
    if source is not None and load_tokenizer(source).hash != corpus.tokenizer.hash:
        raise ValueError(
            f"the checkpoint {source} and the corpus {recipe.data} have different tokenizers: "
            "give the checkpoint's own corpus with --data, or start without it"
        )
    if model is None:
        model = new_model(recipe, device)
    model.config, model.backend = recipe.model, options.get("backend", "auto")
    model.recompute = recipe.recompute
    run = Run(
        recipe=recipe,
        name=name,
        out=out,
        corpus=corpus,
        needles=needles,
        model=model.train(),
        device=device,
        bf16=native_bf16 if recipe.bf16 is None else recipe.bf16,
        compile=options.get("compile", device.type == "cuda"),
        micro_batch=options.get("micro_batch", recipe.batch_tokens),
        max_steps=min(options.get("max_steps", recipe.steps), recipe.steps),
    )
    return run, resuming


def check_options(options: dict, flags: dict) -> None:
    """ValueError for options that do not go together, or make no sense."""
    extra = sorted((options.keys() | flags.keys()) - WITH_RESUME)
    if "resume" in options and extra:
        raise ValueError(
            "--resume continues a run by its own recipe and cannot take "
            f"--{extra[0].replace('_', '-')}: leave it out, or start another run"
        )
    for key, least in (("max_steps", 0), ("micro_batch", 1)):
        if options.get(key, least) < least:
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} {options[key]} must be at least {least}")


def new_model(recipe: Recipe, device: torch.device) -> Transformer:
    """A model as the recipe begins it. NoPE layers' queries begin half as their keys: they find
    things by what they are, and like attending to like is where that begins (mimetic
    initialisation, 2305.09828). `mimetic` "none" leaves that out, "all" does it everywhere."""
    torch.manual_seed(recipe.seed)
    model, c = Transformer(recipe.model), recipe.model
    for block, spec in zip(model.layers, model.plan):
        if recipe.mimetic == "all" or recipe.mimetic == "nope" and not spec.rope:
            q, k = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight
            keys = k.unflatten(0, (c.n_kv_head, -1)).repeat_interleave(c.n_head // c.n_kv_head, 0)
            with torch.no_grad():
                q.mul_(0.75**0.5).add_(keys.flatten(0, 1), alpha=0.5)
    return model.to(device)


# The folder ---------------------------------------------------------------------------------------


def is_run(out: Path) -> bool:
    """A run exists once it has a first checkpoint; before that its folder may be taken over."""
    return (out / "run.json").is_file() and (out / "last").is_dir()


def claim(run: Run, resuming: bool) -> None:
    """Lock the run's folder, and give the model the weights that a resumed one has there.
    ValueError where they are damaged, or a new run would be in the way of another."""
    if RANK == 0:
        run.lock = locked(
            run.out, f"another process trains {run.out}: wait, or choose another --out"
        )
    if resuming:
        checkpoint.verify_checksums(run.out / "last")
        checkpoint.load_weights(run.out / "last", run.model, run.device, torch.float32)
    elif RANK == 0 and is_run(run.out) and run.max_steps > 0:
        raise ValueError(
            f"{run.out} already holds a run: go on with --resume {run.out}, or choose another "
            "folder with --out"
        )


def begin(run: Run, argv: list[str]) -> None:
    """Make the run's folder, whole. An evaluation alone leaves no checkpoint there, and nothing at
    all in the folder of another run."""
    if RANK > 0 or is_run(run.out):
        return
    (run.out / "run.json").unlink(missing_ok=True)
    record = {
        "name": run.name,
        "arguments": argv,
        "recipe": recipes.to_tables(run.recipe),
        "corpus": run.corpus.hash,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "processes": RANKS,
        "git": git_commit(HERE),
    }
    if run.device.type == "cuda":
        record["device"] = torch.cuda.get_device_name()
    with checkpoint.atomic_folder(run.out) as folder:
        (folder / "run.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (folder / "log.jsonl").touch()
        if run.max_steps > 0:
            save(run, folder=folder)
    run.log = run.out / "log.jsonl"


def read_record(out: Path) -> tuple[str, Recipe, str]:
    """Name, recipe and corpus's hash of the run in `out`. FileNotFoundError where there is none."""
    if not is_run(out):
        raise FileNotFoundError(
            f"nothing to resume in {out}: it has no run with a checkpoint; start one without "
            "--resume"
        )
    path = out / "run.json"
    record = checkpoint.read_json(path)
    try:
        name, tables, corpus_hash = record["name"], record["recipe"], record["corpus"]
        return str(name), recipes.build(tables, name=str(path)), str(corpus_hash)
    except (KeyError, TypeError, AttributeError) as error:
        mend = f"start another run with --init {out / 'last'}"
        raise ValueError(f"{path} is damaged ({error!r}): {mend}") from None


def save(run: Run, improved: bool = False, folder: Path | None = None) -> None:
    """A checkpoint of the steps done, to which `last` points, and `best` where `improved`; those
    that were pointed to before go."""
    folder = folder or run.out
    target = folder / f"step-{run.step:06d}"
    if target.name not in checkpoint.pointed(folder):
        shutil.rmtree(target, ignore_errors=True)  # left by an attempt that was killed
        with checkpoint.atomic_folder(target) as partial:
            run.model.save_pretrained(partial)
            run.corpus.tokenizer.save(partial)
            states = [optimizer.state_dict() for optimizer in run.optimizers]
            state = {"step": run.step, "best": run.best, "optimizers": states}
            torch.save(state, partial / "training.pt")
            checkpoint.write_checksums(partial)
    before = checkpoint.pointed(folder)
    for name in ("last", "best") if improved else ("last",):
        checkpoint.point(folder / name, target)
    for old in before - checkpoint.pointed(folder):
        shutil.rmtree(folder / old)


def resume(run: Run) -> None:
    """Optimizers and step from `last`. ValueError where it is damaged, or another model's."""
    path = run.out / "last" / "training.pt"
    mend = f"start another run with --init {path.parent}"
    try:
        # Optimizers move what belongs on the device; AdamW's step counters stay on the CPU.
        state = torch.load(path, map_location="cpu", weights_only=True)
        for optimizer, saved in zip(run.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        run.step, run.best = state["step"], state["best"]
        run.log = run.log if RANK > 0 else run.out / "log.jsonl"
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing to resume: {path} not found; {mend}") from None
    except Exception as error:  # torch.load raises whatever the bytes provoke
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {mend}") from error
    there = checkpoint.read_json(path.with_name("config.json"))
    for key, value in checkpoint.to_json(asdict(config_at(run.recipe, run.step))).items():
        if there.get(key) != value:
            raise ValueError(
                f"{run.out / 'run.json'} and its checkpoint disagree: {key} is {value!r} there and "
                f"{there.get(key)!r} here; {mend}"
            )


def config_at(recipe: Recipe, step: int) -> ModelConfig:
    """The configuration after so many steps."""
    return recipe.stage_at(step - 1).config if step else recipe.model


class Log:
    """log.jsonl: one JSON object a line; what an earlier attempt wrote beyond `step` is dropped."""

    def __init__(self, path: Path, step: int):
        if path.is_file():
            lines = path.read_bytes().splitlines(keepends=True)
            partial = path.with_suffix(".partial")
            partial.write_bytes(b"".join(line for line in lines if self.belongs(line, step)))
            os.replace(partial, path)
        self.file = open(path, "a", encoding="utf-8")

    @staticmethod
    def belongs(line: bytes, step: int) -> bool:
        """Is the line an entry of a step up to `step`? One that a kill cut off is none."""
        try:
            return line.endswith(b"\n") and json.loads(line)["step"] <= step
        except (ValueError, TypeError, LookupError, RecursionError):
            return False

    def write(self, **entry) -> None:
        """Append, and let it be seen at once."""
        print(json.dumps(entry), file=self.file, flush=True)

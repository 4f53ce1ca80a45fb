"""A recipe: what to train, as a list of phases. Defaults, then a TOML file, then flags, into
checked dataclasses.

    lr = 0.006                      # top level: fields of Recipe
    [model]                         # fields of ModelConfig
    pattern = "rrrN"
    [[phase]]                       # fields of Phase, in order
    steps = 450
    lengths = { 128 = 1 }

A phase may also change how positions are treated (OVERRIDES); a change holds until another phase
changes it again.
"""

import argparse
import math
import tomllib
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path

from attention import BACKENDS
from checkpoint import plain_type, shown, typed, typed_fields
from commandline import CommandLine, read_input
from data.corpus import DEFAULT_CORPUS
from model import ModelConfig, require

OVERRIDES = ("pattern", "window", "rope_theta", "rope_scaling", "rope_factor")
OVERRIDES += ("rope_original_length", "length_scale", "length_base")
HELD = ("windowed", "needle_share", "answer_weight", "lr", "warmup")  # of Recipe and of Phase
TREATMENT = (*OVERRIDES, "trained_length")  # other fields of ModelConfig are the model's shape


@dataclass(frozen=True)
class Phase:
    """A stretch of training. None: as the phase before."""

    steps: int
    lengths: dict[int, int]  # context length -> share of the steps, each of batch_tokens tokens
    windowed: bool | None = None
    needle_share: float | None = None  # of the sequences
    answer_weight: float | None = None
    lr: float | None = None  # it, or warmup, starts a new warm-up and cosine
    warmup: int | None = None
    pattern: str | None = None
    window: int | None = None
    rope_theta: float | None = None
    rope_scaling: str | None = None
    rope_factor: float | None = None
    rope_original_length: int | None = None  # with a new rope_scaling: what was trained before
    length_scale: str | None = None
    length_base: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. Raises ValueError where a value makes none."""

    model: ModelConfig = field(default_factory=ModelConfig)
    phase: tuple[Phase, ...] = ()
    seed: int = 1
    data: str = str(DEFAULT_CORPUS)  # a prepared corpus
    stretch: int = 1  # every phase has so many times its steps
    batch_tokens: int = 4096  # per step, over all micro-batches and processes
    windowed: bool = False  # train R as rrrR, RN as rrrN, N as nnnN; others as they are
    needle_share: float = 0.0  # of the sequences that carry needles
    answer_weight: float = 0.5  # of all answers together; text 1 in all, less its needle lines
    lr: float = 0.006  # of Muon (matched to AdamW's scale) and AdamW alike
    warmup: int = 50  # steps
    weight_decay: float = 0.01  # of the matrices inside the layers
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 50  # steps
    eval_tokens: int = 32768  # of validation text
    eval_questions: int = 200  # of the final needle table, at each length; 0: no table
    bf16: bool | None = None  # products, stream, Muon; None: where there are units for it
    recompute: bool = False  # keep only the blocks' inputs for backward: a third more time

    def __post_init__(self):
        require(self.phase, "the recipe has no [[phase]]: give one, with steps and lengths")
        check_numbers(self, "")
        for number, phase in enumerate(self.phase, 1):
            check_phase(self, phase, f"phase {number}: ")
        self.stages()

    @property
    def steps(self) -> int:
        return self.stretch * sum(phase.steps for phase in self.phase)

    def stages(self) -> list["Stage"]:
        """The phases, every override carried forward, with the steps of their schedules."""
        return self._stages

    @cached_property
    def _stages(self) -> list["Stage"]:
        stages, config, start, since = [], self.model, 0, 0
        held = {name: getattr(self, name) for name in HELD}
        for number, phase in enumerate(self.phase, 1):
            changes = given(phase, OVERRIDES)
            if changes.get("rope_scaling", "none") != "none":
                own = config.rope_original_length if config.rope_scaling == "none" else None
                changes.setdefault("rope_original_length", own or config.trained_length)
            held |= given(phase, HELD)
            longest = max(config.trained_length or 0, *phase.lengths)
            try:
                config = replace(config, **changes, trained_length=longest)
                letter = "r" if "R" in config.pattern else "n"
                narrow = letter * (config.n_layer - 1) + config.pattern[-1]
                narrowed = held["windowed"] and config.pattern.isupper()
                seen = replace(config, pattern=narrow) if narrowed else config
            except ValueError as error:
                raise ValueError(f"phase {number}: {error}") from error
            since = start if given(phase, ("lr", "warmup")) else since
            end = start + self.stretch * phase.steps
            stages.append(Stage(start, end, phase.lengths, seen, **held, since=since))
            start = end
        ends = {stage.since: stage.end for stage in stages}  # a schedule's last stage ends it
        return [replace(stage, until=ends[stage.since]) for stage in stages]

    def stage_at(self, step: int) -> "Stage":
        """The stage of a step; beyond the end, the last."""
        return next((stage for stage in self.stages() if step < stage.end), self.stages()[-1])


@dataclass(frozen=True)
class Stage:
    """A phase, resolved: steps start..end-1 run `config`, under a schedule that covers
    since..until-1."""

    start: int
    end: int
    lengths: dict[int, int]
    config: ModelConfig
    windowed: bool
    needle_share: float
    answer_weight: float
    lr: float
    warmup: int
    since: int
    until: int = 0

    @property
    def longest(self) -> int:
        """The longest context length, in tokens."""
        return max(self.lengths)

    def length(self, step: int) -> int:
        """Context length of a step: the lengths alternate in a fixed cycle, each as often as its
        share says."""
        unit = math.gcd(*self.lengths.values())
        place = (step - self.start) % (sum(self.lengths.values()) // unit)
        ends = accumulate(share // unit for share in self.lengths.values())
        return next(length for length, end in zip(self.lengths, ends) if place < end)

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine to a tenth."""
        done, total = step - self.since, self.until - self.since
        warm = min(1.0, (done + 1) / (self.warmup + 1))
        after = max(0, done - self.warmup) / max(1, total - self.warmup)
        return self.lr * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * after)))


def given(phase: Phase, names: tuple[str, ...]) -> dict:
    """Those of the fields that the phase sets."""
    values = {name: getattr(phase, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


# What is refused ----------------------------------------------------------------------------------


MANY = 2**31  # a larger count is a slip
RANGES = dict.fromkeys(("steps", "stretch", "eval_every", "eval_tokens"), (1, MANY))
RANGES |= {"batch_tokens": (1, 2**26), "eval_questions": (0, 2**16)}  # which memory must hold
RANGES |= {"warmup": (0, MANY), "seed": (0, 2**63 - 1)}
RANGES |= {"needle_share": (0, 1), "answer_weight": (0, MANY), "weight_decay": (0, MANY)}


def check_numbers(thing: Recipe | Phase, where: str) -> None:
    """ValueError for a field out of its range."""
    for name, (low, high) in RANGES.items():
        value = vars(thing).get(name)
        inside = value is None or low <= value <= high
        require(inside, f"{where}{name} {value} must be from {low} to {high}")
    for name in ("lr", "clip"):
        value = vars(thing).get(name)
        require(value is None or 0 < value < math.inf, f"{where}{name} {value} must be above 0")


def check_phase(recipe: Recipe, phase: Phase, where: str) -> None:
    """ValueError for a phase that cannot be trained."""
    check_numbers(phase, where)
    require(phase.lengths, f"{where}lengths is empty: give some, such as {{ 512 = 1 }}")
    for length, share in phase.lengths.items():
        text = f"{where}lengths {{ {length} = {share} }}"
        require(length >= 2 and share >= 1, f"{text}: a length of 2 or more, a share of 1 or more")
        undivided = f"{where}length {length} does not divide batch_tokens {recipe.batch_tokens}"
        require(recipe.batch_tokens % length == 0, f"{undivided}: every step has the same tokens")
    new, had = phase.length_scale, recipe.model.length_scale == "ssmax"
    mend = "owns weights, so a phase cannot switch it on or off: put it under [model]"
    require(new is None or (new == "ssmax") == had, f"{where}length_scale 'ssmax' {mend}")


# Reading ------------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict:
    """The tables of a recipe file. OSError where there is none, ValueError where it is no TOML."""
    try:
        return tomllib.loads(read_input(path).decode("utf-8-sig"))
    except FileNotFoundError:
        here = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.toml"))) or "none"
        raise FileNotFoundError(f"recipe {path} not found; recipes here: {here}") from None
    except (ValueError, RecursionError) as error:  # TOML, or UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from error


def build(
    tables: dict, flags: dict | None = None, base: ModelConfig | None = None, name: str = "recipe"
) -> Recipe:
    """A Recipe from the tables of a file and then flags, a dict of field names of Recipe and
    ModelConfig.

    `base` is the configuration of the checkpoint that training starts from: what neither file nor
    flags say is as it was there; its shape cannot change, and its treatment of positions only by a
    flag or a phase. A flag holds in every phase if the first sets its field, or at 0. ValueError.
    """
    flags, tables = dict(flags or {}), dict(tables)
    table, phases = tables.pop("model", {}), tables.pop("phase", [])
    tables_all = [table, *phases] if isinstance(phases, list) else [None]
    if not all(isinstance(each, dict) for each in tables_all):
        raise ValueError(f"{name}: the model is a table, [model], the phases are tables, [[phase]]")
    model = typed_fields(ModelConfig, table, f"{name}: [model] ")
    rest = typed_fields(Recipe, tables, f"{name}: ")
    phase = tuple(read_phase(each, f"{name}: phase {i}: ") for i, each in enumerate(phases, 1))
    for flag in flags:
        setting = [i for i, each in enumerate(phase, 1) if getattr(each, flag, None) is not None]
        if setting and (setting[0] == 1 or not flags[flag]):  # from the first step on, or off
            phase, setting = tuple(replace(each, **{flag: None}) for each in phase), []
        ruled = f"--{flag.replace('_', '-')} would be overruled by phase {min(setting, default=0)}"
        require(not setting, f"{ruled} of {name}, which sets {flag}: edit the recipe")
    of_model = {f.name for f in fields(ModelConfig)}
    given = {key: value for key, value in flags.items() if key in of_model}
    rest |= {key: value for key, value in flags.items() if key not in of_model}
    if base is not None:
        check_base(model, given, base, name)
        window = {"window": model["window"]} if base.window is None and "window" in model else {}
        model = asdict(base) | window
    return Recipe(model=ModelConfig(**model | given), phase=phase, **rest)


def read_phase(table: dict, where: str) -> Phase:
    """A phase from its table in a file."""
    values, lengths = typed_fields(Phase, table, where), {}
    example = "must be a table such as { 512 = 3, 2048 = 1 }"
    given = values["lengths"]
    require(isinstance(given, dict), f"{where}lengths = {shown(given)} {example}")
    for key, share in given.items():
        number = str(key).isascii() and str(key).isdecimal() and len(str(key)) < 19
        require(number, f"{where}lengths: {shown(key)} is no length, such as 512")
        require(int(key) not in lengths, f"{where}lengths has {int(key)} twice: give it once")
        lengths[int(key)] = typed(int, share, f"{where}lengths.{key}")
    return Phase(**values | {"lengths": lengths})


def check_base(model: dict, given: dict, base: ModelConfig, name: str) -> None:
    """ValueError where a file or a flag asks a checkpoint to be another model."""
    for key, value in (model | given).items():
        had, where = getattr(base, key), "the flags" if key in given else name
        shape = key not in TREATMENT or (key == "length_scale" and "ssmax" in (value, had))
        if not shape:  # a flag may change it, a file may say it again or give a first window
            allowed = key in given or value == had or (key == "window" and had is None)
            mend = f"give --{key.replace('_', '-')} to say which"
        else:
            had = base.head_width if key == "head_dim" else had
            allowed, mend = value in (None, had), "a checkpoint's shape cannot change"
        both = f"{key} is {value!r} in {where} and {had!r} in the --init checkpoint"
        require(allowed, f"{both}: {mend}")


def run_name(recipe: Recipe, name: str) -> str:
    """<recipe>-<pattern>-s<seed>, each windowed letter with its window (some disks ignore case):
    laptop-r64r64r64N-s1."""
    letters = "".join(c + f"{recipe.model.window}" * c.islower() for c in recipe.model.pattern)
    return f"{name}-{letters}-s{recipe.seed}" + "-qk" * recipe.model.qk_norm


def to_tables(recipe: Recipe) -> dict:
    """The recipe as the tables that `build` reads."""
    known = lambda table: {key: value for key, value in table.items() if value is not None}
    tables = known(asdict(recipe))
    phases = [known(phase) for phase in tables["phase"]]
    return tables | {"model": known(tables["model"]), "phase": phases}


def command_line(description: str | None) -> CommandLine:
    """Run options, then one flag for each field of Recipe and ModelConfig."""
    parser = CommandLine(prog="train.py", description=description)
    parser.add_argument("recipe", nargs="?", type=Path, help="TOML (default: recipes/laptop.toml)")

    def add(flag: str, help: str, **more) -> None:
        parser.add_argument(flag, help=help, default=argparse.SUPPRESS, **more)

    switch = argparse.BooleanOptionalAction
    add("--out", "the run's folder (default: out/<recipe>-<pattern>-s<seed>)", type=Path)
    resume = {"nargs": "?", "type": Path, "const": None, "metavar": "RUN"}
    add("--resume", "continue the run in this folder", **resume)
    add("--init", "start from these weights", type=Path, metavar="CHECKPOINT")
    count = {"type": partial(flag_value, int), "metavar": "INT"}
    add("--max-steps", "stop after so many, the schedule unchanged; 0 only evaluates", **count)
    add("--micro-batch", "tokens per forward and process (default: what fits)", **count)
    add("--device", "cuda, cpu or mps (default: cuda where there is one, else cpu)")
    add("--backend", "attention's kernel; banded: for windows (default: auto)", choices=BACKENDS)
    add("--compile", "torch.compile (default: on CUDA where it pays)", action=switch)
    for f in (*fields(Recipe), *fields(ModelConfig)):
        if f.name in ("model", "phase", "vocab_size", "trained_length"):
            continue  # tables, and what the corpus and the training decide
        kind = plain_type(f.type)
        how = {"type": partial(flag_value, f.type), "metavar": kind.__name__.upper()}
        how = {"action": switch} if kind is bool else how
        add("--" + f.name.replace("_", "-"), f"where no recipe says: {f.default}", **how)
    return parser


def flag_value(kind, text: str):
    """The text of a flag as the annotation `kind` says."""
    try:
        return parsed(kind, text, "value")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parsed(kind, text: str, name: str):
    """The text of a flag as the annotation `kind` says. ValueError, with `name` and the text."""
    wanted = plain_type(kind)
    try:
        value = {"true": True, "false": False}[text] if wanted is bool else wanted(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name} {shown(text)} is no {wanted.__name__}") from None
    return typed(kind, value, name)

"""A recipe: what to train, as a list of phases. Defaults, then a TOML file, then command-line
flags, into checked dataclasses.

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
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from attention import BACKENDS
from commandline import CommandLine
from data.corpus import DEFAULT_CORPUS
from model import ModelConfig

MIMETIC = ("none", "nope", "all")  # layers whose queries begin half like their keys
OVERRIDES = (
    "pattern",
    "window",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_original_length",
    "length_scale",
    "length_base",
)
# fields of Recipe that a phase may set anew
HELD = (
    "needle_share",
    "answer_weight",
    "lr",
    "warmup",
)
# how positions are treated; every other field of ModelConfig is the model's shape
TREATMENT = (
    *OVERRIDES,
    "trained_length",
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training. None: as the phase before."""

    steps: int
    # context length -> share of the steps; every step has batch_tokens tokens
    lengths: dict[int, int]
    needle_share: float | None = None  # of the sequences
    answer_weight: float | None = None
    lr: float | None = None  # starts a new warm-up and cosine
    warmup: int | None = None
    pattern: str | None = None
    window: int | None = None
    rope_theta: float | None = None
    rope_scaling: str | None = None
    rope_factor: float | None = None
    rope_original_length: int | None = (
        None  # None with a new rope_scaling: the longest length trained before this phase
    )
    length_scale: str | None = None
    length_base: int | None = None


@dataclass(frozen=True)
class Recipe:
    """A whole run. Raises ValueError where a value makes none."""

    model: ModelConfig = field(default_factory=lambda: ModelConfig(window=64))
    phase: tuple[Phase, ...] = ()
    seed: int = 1
    data: str = str(DEFAULT_CORPUS)  # a prepared corpus
    stretch: int = 1  # every phase has so many times its steps: to train longer by the same recipe
    batch_tokens: int = 4096  # per step, over all micro-batches and processes
    needle_share: float = 0.0  # of the sequences that carry needles
    answer_weight: float = (
        0.5  # of all answers to needles together, beside 1 for all tokens together
    )
    lr: float = 0.006  # of Muon (matched to AdamW's scale) and AdamW alike
    warmup: int = 50  # steps
    weight_decay: float = 0.01  # of the matrices inside the layers
    clip: float = 1.0  # largest norm of the gradient
    eval_every: int = 50  # steps
    eval_tokens: int = 32768  # of validation text
    eval_questions: int = 200  # of the final needle table, at each length; 0: no table
    mimetic: str = "nope"  # layers whose queries begin half like their keys: none, nope, all
    bf16: bool | None = None  # bfloat16 products; None: on CUDA where it has them natively
    recompute: bool = (
        False  # keep only the blocks' inputs for the backward pass: less memory, a third more time
    )

    def __post_init__(self):
        if not self.phase:
            raise ValueError(
                "the recipe has no [[phase]]: give at least one, with steps and lengths"
            )
        for name, low, strict in (
            ("lr", 0, True),
            ("clip", 0, True),
            ("weight_decay", 0, False),
            ("answer_weight", 0, False),
            ("warmup", 0, False),
            ("seed", 0, False),
            ("eval_questions", 0, False),
        ):
            value = getattr(self, name)
            if not math.isfinite(value) or value < low or (strict and value == low):
                raise ValueError(
                    f"{name} {value} must be {'above' if strict else 'at least'} {low}"
                )
        for name in ("stretch", "batch_tokens", "eval_every", "eval_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.mimetic not in MIMETIC:
            raise ValueError(
                f"mimetic {self.mimetic!r} is unknown: use one of {', '.join(MIMETIC)}"
            )
        for number, phase in enumerate(self.phase, 1):
            self._check(phase, f"phase {number}: ")
        self.stages()

    def _check(self, phase: Phase, where: str) -> None:
        if phase.steps < 1:
            raise ValueError(f"{where}steps {phase.steps} must be at least 1")
        if not phase.lengths:
            raise ValueError(
                f"{where}lengths is empty: give context lengths and their shares, such as {{ 512 "
                "= 1 }}"
            )
        for length, share in phase.lengths.items():
            if length < 2 or share < 1:
                raise ValueError(
                    f"{where}lengths {{ {length} = {share} }}: a length of 2 or more, a share of "
                    "1 or more"
                )
            if self.batch_tokens % length:
                raise ValueError(
                    f"{where}length {length} does not divide batch_tokens {self.batch_tokens}: "
                    "every step has the same tokens"
                )
        if phase.lr is not None and not (math.isfinite(phase.lr) and phase.lr > 0):
            raise ValueError(f"{where}lr {phase.lr} must be above 0")
        for name in ("warmup", "answer_weight"):
            if (getattr(phase, name) or 0) < 0:
                raise ValueError(f"{where}{name} {getattr(phase, name)} must be at least 0")
        if phase.length_scale == "ssmax" != self.model.length_scale:
            raise ValueError(
                f"{where}length_scale 'ssmax' owns weights, so a phase cannot switch it on: put "
                "it under [model]"
            )

    def stage_at(self, step: int) -> "Stage":
        """The stage of a step; beyond the end, the last."""
        stages = self.stages()
        return next((stage for stage in stages if step < stage.end), stages[-1])

    @property
    def steps(self) -> int:
        """Of all phases."""
        return self.stretch * sum(phase.steps for phase in self.phase)

    def stages(self) -> list["Stage"]:
        """The phases with every override carried forward, and the stretch that each learning-rate
        schedule covers."""
        return self._stages

    @cached_property
    def _stages(self) -> list["Stage"]:
        stages: list[Stage] = []
        config, start, since = self.model, 0, 0
        held = {name: getattr(self, name) for name in HELD}
        for number, phase in enumerate(self.phase, 1):
            changes = {
                name: getattr(phase, name) for name in OVERRIDES if getattr(phase, name) is not None
            }
            if changes.get("rope_scaling", "none") != "none":
                changes.setdefault("rope_original_length", config.trained_length)
            try:
                config = replace(config, **changes)
            except ValueError as error:
                raise ValueError(f"phase {number}: {error}") from error
            config = replace(config, trained_length=max(config.trained_length or 0, *phase.lengths))
            held |= {
                name: getattr(phase, name) for name in HELD if getattr(phase, name) is not None
            }
            if not 0 <= held["needle_share"] <= 1:
                raise ValueError(
                    f"phase {number}: needle_share {held['needle_share']} is not between 0 and 1"
                )
            if phase.lr is not None and start > 0:
                since = start
            stages.append(
                Stage(
                    start,
                    start + self.stretch * phase.steps,
                    phase.lengths,
                    config,
                    **held,
                    since=since,
                )
            )
            start = stages[-1].end
        # the last stage of each schedule ends it
        ends = {stage.since: stage.end for stage in stages}
        return [replace(stage, until=ends[stage.since]) for stage in stages]


@dataclass(frozen=True)
class Stage:
    """A phase, resolved: steps start..end-1 run `config`, under a schedule that covers
    since..until-1."""

    start: int
    end: int
    lengths: dict[int, int]
    config: ModelConfig
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
        """Context length of a step: the lengths alternate in a fixed cycle."""
        unit = math.gcd(*self.lengths.values())
        cycle = [length for length, share in self.lengths.items() for _ in range(share // unit)]
        return cycle[(step - self.start) % len(cycle)]

    def rate(self, step: int) -> float:
        """Learning rate of a step: a linear warm-up, then a cosine to a tenth."""
        done, total = step - self.since, self.until - self.since
        warm = min(1.0, (done + 1) / (self.warmup + 1))
        cosine = 0.5 * (
            1 + math.cos(math.pi * max(0, done - self.warmup) / max(1, total - self.warmup))
        )
        return self.lr * warm * (0.1 + 0.9 * cosine)


# Reading


def typed(kind, value, name: str):
    """`value` as the annotation `kind` says, from TOML. Raises ValueError naming both types."""
    choices = [k for k in (typing.get_args(kind) or (kind,)) if k is not type(None)]
    if typing.get_origin(kind) is dict:
        try:
            return {
                int(length): typed(int, share, f"{name}.{length}")
                for length, share in value.items()
            }
        except (AttributeError, TypeError):
            raise ValueError(
                f"{name} = {value!r} must be a table such as {{ 512 = 3, 2048 = 1 }}"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"{name}: {error}; its keys are context lengths, such as {{ 512 = 3, 2048 = 1 }}"
            ) from None
    wanted = choices[0]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{name} = {value!r} is {type(value).__name__}, not {wanted.__name__}")
    return value


def parsed(kind, text: str, name: str):
    """The text of a flag as the annotation `kind` says. ValueError naming it."""
    wanted = next(k for k in (typing.get_args(kind) or (kind,)) if k is not type(None))
    try:
        return typed(
            kind, {"true": True, "false": False}[text] if wanted is bool else wanted(text), name
        )
    except (KeyError, ValueError):
        raise ValueError(f"{name} {text!r} is no {wanted.__name__}") from None


def from_table(cls, table: dict, where: str) -> dict:
    """The fields of the dataclass `cls` that `table` gives, checked. Raises ValueError for an
    unknown key, with the nearest one."""
    known = {f.name: f.type for f in fields(cls)}
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            raise ValueError(
                f"{where}unknown key {key!r}; "
                + (f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}")
            )
    missing = [
        f.name
        for f in fields(cls)
        if f.default is MISSING and f.default_factory is MISSING and f.name not in table
    ]
    if missing:
        raise ValueError(f"{where}{missing[0]} is missing")
    return {key: typed(known[key], value, f"{where}{key}") for key, value in table.items()}


def read_toml(path: Path) -> dict:
    """The tables of a recipe file. Raises OSError where there is none and ValueError where it is no
    TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        here = ", ".join(sorted(str(p) for p in Path("recipes").glob("*.toml"))) or "none"
        raise FileNotFoundError(f"recipe {path} not found; recipes here: {here}") from None
    except ValueError as error:  # TOML or UTF-8
        raise ValueError(f"{path} is not TOML: {error}") from error


def build(
    tables: dict, flags: dict | None = None, base: ModelConfig | None = None, name: str = "recipe"
) -> Recipe:
    """A Recipe from the tables of a file and then flags, a dict of field names of Recipe and
    ModelConfig.

    `base` is the configuration of the checkpoint that training starts from: what neither file nor
    flags say is as it was there; its shape cannot change, and its treatment of positions only by a
    flag or a phase. Raises ValueError.
    """
    flags, tables = dict(flags or {}), dict(tables)
    table, phases = tables.pop("model", {}), tables.pop("phase", [])
    if (
        not isinstance(table, dict)
        or not isinstance(phases, list)
        or not all(isinstance(phase, dict) for phase in phases)
    ):
        raise ValueError(
            f"{name}: the model is a table, [model], and the phases are tables, [[phase]]"
        )
    model = from_table(ModelConfig, table, f"{name}: [model] ")
    phase = tuple(
        Phase(**from_table(Phase, each, f"{name}: phase {i}: ")) for i, each in enumerate(phases, 1)
    )
    rest = from_table(Recipe, tables, f"{name}: ")
    for flag in flags:
        later = [i for i, each in enumerate(phase, 1) if getattr(each, flag, None) is not None]
        if later:
            raise ValueError(
                f"--{flag.replace('_', '-')} would be overruled by phase {later[0]} of {name}, "
                f"which sets {flag}: edit the recipe"
            )
    of_model = {f.name for f in fields(ModelConfig)}
    given = {key: value for key, value in flags.items() if key in of_model}
    rest |= {key: value for key, value in flags.items() if key not in of_model}
    if base is not None:
        _agree(model, given, base, name)
        model = {f.name: getattr(base, f.name) for f in fields(ModelConfig)} | (
            {"window": model["window"]} if base.window is None and "window" in model else {}
        )
    return Recipe(model=ModelConfig(**model | given), phase=phase, **rest)


def _agree(model: dict, given: dict, base: ModelConfig, name: str) -> None:
    """ValueError where a file or a flag asks a checkpoint to be another model."""
    for key, value in (model | given).items():
        had = getattr(base, key) if key != "head_dim" else base.head_width
        if key in TREATMENT:
            differs = key not in given and value != had and not (key == "window" and had is None)
            mend = f"give --{key.replace('_', '-')} to say which"
        else:
            differs, mend = value is not None and value != had, "a checkpoint's shape cannot change"
        if differs:
            raise ValueError(
                f"{key} is {value!r} in {name if key not in given else 'the flags'} and {had!r} "
                f"in the --init checkpoint: {mend}"
            )


def run_name(recipe: Recipe, name: str) -> str:
    """<recipe>-<pattern>-s<seed>, each windowed letter with its window (some disks ignore case):
    laptop-r64r64r64N-s1."""
    letters = "".join(
        f"{letter}{recipe.model.window}" if letter.islower() else letter
        for letter in recipe.model.pattern
    )
    return f"{name}-{letters}-s{recipe.seed}" + ("-qk" if recipe.model.qk_norm else "")


def to_tables(recipe: Recipe) -> dict:
    """The recipe as the tables that `recipe.build` reads."""
    given = lambda table: {key: value for key, value in table.items() if value is not None}
    tables = asdict(recipe)
    return given(tables) | {
        "model": given(tables["model"]),
        "phase": [given(phase) for phase in tables["phase"]],
    }


def command_line(description: str) -> CommandLine:
    """Run options, then one flag for each field of Recipe and ModelConfig."""
    parser = CommandLine(
        prog="train.py",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    unset = {"default": argparse.SUPPRESS}
    parser.add_argument(
        "recipe", nargs="?", type=Path, help="a TOML file (default: recipes/laptop.toml)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the run's folder (default: out/<recipe>-<pattern>-s<seed>)",
        **unset,
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=None,
        metavar="RUN",
        help="continue the run in this folder",
        **unset,
    )
    parser.add_argument(
        "--init", type=Path, metavar="CHECKPOINT", help="start from these weights", **unset
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        help="stop after so many steps, the schedule unchanged; 0 only evaluates",
        **unset,
    )
    parser.add_argument(
        "--micro-batch",
        type=int,
        help="tokens per forward and process, at least one sequence (default: all that there are)",
        **unset,
    )
    parser.add_argument(
        "--device",
        help="cuda, cpu or mps (default: cuda where there is one, else cpu; mps is untested)",
        **unset,
    )
    parser.add_argument(
        "--backend", choices=BACKENDS, help="the windowed layers' kernel (default: auto)", **unset
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile (default: on CUDA)",
        **unset,
    )
    for cls, left_out in (
        (Recipe, ("model", "phase")),
        (ModelConfig, ("vocab_size", "trained_length")),
    ):
        for f in fields(cls):
            if f.name in left_out:
                continue
            kind = next(k for k in (typing.get_args(f.type) or (f.type,)) if k is not type(None))
            how = (
                {"action": argparse.BooleanOptionalAction}
                if kind is bool
                else {"type": kind, "metavar": kind.__name__.upper()}
            )
            parser.add_argument(
                "--" + f.name.replace("_", "-"),
                help=f"{cls.__name__}.{f.name}, default {f.default}",
                **how,
                **unset,
            )
    return parser

"""What stands between an answer and its points: load a file under the rules, run a check, and say
what is wrong in one sentence.

    mine = load("e01_rotate", path)              the file's own code, in a module of nobody's
    for check in checks("e01_rotate"):
        result = run(check, mine)                passed, failed or not written; a message

A check looks at what a function returns as plain numbers, and it names a wrong answer by what it
computes: beside the right values stand those of near misses (`same`). What is refused in a file is
in rules.py.
"""

import ast
import builtins
import gc
import importlib
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FunctionType, ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exercises.rules import REFUSED, broken_rules, own_code

HERE = Path(__file__).resolve().parent
EXERCISES = sorted(path.stem for path in (HERE / "checks").glob("e??_*.py"))
BONUS = "e12_banded"
LARGEST = 2**20  # bytes of a file


class Wrong(Exception):
    """What a student is told."""


@dataclass(frozen=True)
class Check:
    exercise: str
    name: str
    points: int
    run: Callable[[ModuleType], None]


@dataclass(frozen=True)
class Result:
    exercise: str
    check: str
    points: int  # what the check is worth
    status: str  # passed, failed, not written
    message: str


def points(n: int) -> Callable:
    """Decorates a check with its worth."""

    def marked(function: Callable) -> Callable:
        function.points = n
        return function

    return marked


def checks_module(exercise: str) -> ModuleType:
    return importlib.import_module(f"exercises.checks.{exercise}")


def checks(exercise: str) -> list[Check]:
    """The checks of an exercise, in their order."""
    found = []
    for name, function in vars(checks_module(exercise)).items():
        if name.startswith("check_"):
            found.append(Check(exercise, name.removeprefix("check_"), function.points, function))
    return found


# A file ------------------------------------------------------------------------------------------


class Gone(Wrong, AttributeError):
    """A name of the stub is not there."""


class Mine(ModuleType):
    """A student's module."""

    def __getattr__(self, name: str):
        raise Gone(f"the file has no `{name}`: keep the names of the stub")


@cache
def given(exercise: str) -> ast.Module:
    """The code of its checks, with the specifications that a student's file may repeat."""
    return ast.parse(Path(checks_module(exercise).__file__).read_text(encoding="utf-8"))


def load(exercise: str, path: Path) -> ModuleType:
    """The module of a file, its measurement block and given specification left out. Wrong where
    there is none, where it breaks a rule, or where it does not run."""
    path = Path(path)
    if not path.is_file():
        raise Wrong(f"no such file: {path.name}")
    if path.stat().st_size > LARGEST:
        raise Wrong("the file is larger than a megabyte")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
        broken = broken_rules(tree, given(exercise), checks_module(exercise))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f"line {error.lineno}: " if getattr(error, "lineno", None) else ""
        said = getattr(error, "msg", None) or str(error)
        raise Wrong(f"does not import: {line}{type(error).__name__}: {said}") from None
    if broken:
        raise Wrong(broken)

    # Nobody else's module: in no sys.modules, and without the names that the rules refuse. While it
    # runs its name stands there for an empty one, since dataclasses look it up.
    name = f"answer.{exercise}"
    sys.modules[name] = ModuleType(name)
    mine = Mine(name)
    mine.__dict__["__builtins__"] = {k: v for k, v in vars(builtins).items() if k not in REFUSED}
    mine.__dict__["__file__"] = str(path)
    before = state()
    try:
        exec(
            compile(own_code(tree, given(exercise)), str(path), "exec", dont_inherit=True),
            mine.__dict__,
        )
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too
        raise Wrong(f"does not import: {where(error, path)}") from None
    finally:
        del sys.modules[name]
        changed = restore(before)
    if changed:
        raise Wrong(f"the file changes {changed}")
    return mine


def where(error: BaseException, path: Path | str) -> str:
    """An exception in one line; the line number is the last one in the student's file."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = f"line {lines[-1]}: " if lines else ""
    words = " ".join(str(error).split())
    return f"{line}{type(error).__name__}" + (f": {words[:300]}" if words else "")


# torch's own names, as they are before a student's file is loaded: a file that replaces one of them
# is told so, and nobody after it meets the replacement.
seeded = torch.manual_seed
WATCHED = (torch, torch.Tensor, nn, nn.Module, F, math)


def state() -> list[dict]:
    return [dict(vars(thing)) for thing in WATCHED]


def restore(before: list[dict]) -> str | None:
    """Put back what differs from `before`; the name of it, if any."""
    changed = None
    for thing, old in zip(WATCHED, before):
        now = dict(vars(thing))
        for name in now:
            if name in old and now[name] is old[name] or isinstance(now[name], ModuleType):
                continue  # torch imports parts of itself when they are first used
            if isinstance(thing, ModuleType) and (name.startswith("__") or name not in old):
                continue
            if (thing, name) == (torch, "manual_seed"):  # torch wraps it when it first compiles
                continue
            changed = f"{thing.__name__}.{name}"
            setattr(thing, name, old[name]) if name in old else delattr(thing, name)
        for name in old.keys() - now.keys():
            changed = f"{thing.__name__}.{name}"
            setattr(thing, name, old[name])
    return changed


def run(check: Check, mine: ModuleType, seed: int = 0) -> Result:
    """One check of a loaded file."""
    seeded(seed)
    status, message, before = "passed", "", state()
    try:
        check.run(mine)
    except Wrong as error:
        status, message = "failed", str(error)
    except NotImplementedError as error:
        status, message = "not written", ""
        if error.args:  # torch's own have a text
            status, message = "failed", where(error, mine.__file__)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        status, message = "failed", where(error, mine.__file__)
    changed = restore(before)
    if changed:
        status, message = "failed", f"your code changes {changed}"
    return Result(check.exercise, check.name, check.points, status, message)


# What a check says -------------------------------------------------------------------------------


def same(
    what: str,
    got,
    wanted: Tensor,
    near: dict[str, Tensor] | None = None,
    tolerance: float = 1e-5,
    floor: float | None = None,
) -> None:
    """Wrong unless `got` is a plain tensor of wanted's shape, dtype and values, looked at in this
    order. A value may be off by `tolerance` of itself and by `floor` (None: tolerance). Values of a
    near miss are called by its name."""
    floor = tolerance if floor is None else floor
    plain(what, got, Tensor)
    if got.device.type != "cpu" or got.layout != torch.strided:
        raise Wrong(f"{what} is no ordinary tensor on the CPU: {got.layout}, {got.device}")

    def equal(a: Tensor, b: Tensor) -> bool:
        if a.shape != b.shape:
            return False
        a, b = a.detach().double(), b.detach().double()
        off = (a - b).abs() <= tolerance * b.abs() + floor
        return bool((off | (a == b) | (a.isnan() & b.isnan())).all())

    numbers = not (got.is_complex() or wanted.is_complex())
    if numbers and not equal(got, wanted):
        for said, miss in (near or {}).items():
            if not equal(miss, wanted) and equal(got, miss):
                raise Wrong(said.rstrip("."))  # dots tell forms of one mistake apart
    if got.shape != wanted.shape:
        raise Wrong(f"{what} has the shape {tuple(got.shape)}; it should be {tuple(wanted.shape)}")
    if got.dtype != wanted.dtype:
        raise Wrong(f"{what} is {name_of(got.dtype)}; it should be {name_of(wanted.dtype)}")
    if equal(got, wanted):
        return
    a, b = got.detach().double(), wanted.detach().double()
    bad = ~((a - b).abs() <= tolerance * b.abs() + floor) & (a != b)
    place = tuple(bad.nonzero()[0].tolist())
    here, there = (shown(x[place].item()) for x in (got.detach(), wanted))
    at = f"at {place if len(place) != 1 else f'({place[0]})'} you have {here}"
    raise Wrong(f"{what}: {at}, the specification says {there}")


def shown(value) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain(what: str, got, *types: type) -> None:
    """Wrong unless the type of `got` is exactly one of the types."""
    if type(got) in types:
        return
    if got is None:
        raise Wrong(f"{what} is None: is there a `return`?")
    wanted = " or ".join(t.__name__ for t in types)
    mend = " (.item() makes one)" if type(got) is Tensor and {int, float} & set(types) else ""
    raise Wrong(f"{what} is of type {type(got).__name__}; it should be a plain {wanted}{mend}")


def number(
    what: str, got, wanted: float, near: dict[str, float] | None = None, tolerance: float = 1e-5
) -> None:
    """Wrong unless `got` is a plain int (where wanted is one) or float of the wanted value."""
    if type(wanted) is int:
        plain(what, got, int)
        tolerance = 0
    elif type(got) is not int:
        plain(what, got, float)
    if not close(got, wanted, tolerance):
        for said, miss in (near or {}).items():
            if close(got, miss, tolerance) and not close(miss, wanted, tolerance):
                raise Wrong(said.rstrip("."))  # dots tell forms of one mistake apart
        raise Wrong(f"{what} is {shown(got)}, the specification says {shown(wanted)}")


def close(a: float, b: float, tolerance: float) -> bool:
    if tolerance == 0 or abs(a) > 2**53:
        return a == b
    return abs(a - b) <= tolerance * max(1, abs(b)) or (math.isnan(a) and math.isnan(b))


def answer(given, wanted: float | tuple[float, float], tolerance: float = 0, hints=None) -> None:
    """Wrong unless the number given as ANSWER is the wanted one, or within a band (low, high).
    A known wrong number gets its sentence."""
    if given is None:
        raise NotImplementedError
    if type(given) not in (int, float):
        raise Wrong(f"ANSWER is of type {type(given).__name__}; it should be a number")
    low, high = wanted if isinstance(wanted, tuple) else (wanted - tolerance, wanted + tolerance)
    if low <= given <= high:
        return
    for value, sentence in (hints or {}).items():
        if abs(given - value) <= max(tolerance, abs(value) * 0.02):
            raise Wrong(f"ANSWER = {given}: {sentence}")
    said = "is not what the measurement prints when every other check passes"
    for turned, guess in ((given / 100, "a share, not percents?"), (-given, "the other sign?")):
        if low <= turned <= high <= 1:
            said += f" ({guess})"
    raise Wrong(f"ANSWER = {given} {said}")


def kept(*roots) -> tuple[int, int, int]:
    """What objects keep alive, wherever it hides: (bytes of tensors, a view's storage counted
    whole; the same without what a view does not show; bytes of all else)."""
    storages, views, other, seen, todo = {}, 0, 0, set(), list(roots)
    # The files whose storage it is, by name.
    names = {getattr(root, "__name__", type(root).__module__) for root in roots}
    while todo:
        thing = todo.pop()
        if id(thing) in seen or foreign(thing, names):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            views += thing.numel() * thing.element_size()
        elif isinstance(thing, torch.UntypedStorage | torch.TypedStorage):
            storages[thing.data_ptr()] = thing.nbytes()
        elif hasattr(thing, "nbytes"):  # an array of numpy, a memoryview
            other += thing.nbytes
        else:
            other += sys.getsizeof(thing, 0)
        todo += gc.get_referents(thing)
    return sum(storages.values()), views, other


def foreign(thing, names: set) -> bool:
    """Modules, and classes and functions of other files: not a student's storage."""
    if isinstance(thing, ModuleType):
        return not isinstance(thing, Mine)
    if isinstance(thing, dict):
        return "__build_class__" in thing  # the builtins
    if thing is Mine:
        return True
    if isinstance(thing, type | FunctionType):
        return thing.__module__ not in names
    return False

"""What a student's file may not do. The same rules run in pytest and in the grader, so that nobody
learns of them from a mark.

They keep a class honest; they are no sandbox: against somebody who breaks out of Python on purpose
only a container helps.
"""

import ast
import importlib
from collections.abc import Iterator
from difflib import SequenceMatcher
from types import ModuleType

IMPORTS = set(
    "torch torch.nn torch.nn.functional torch.autograd math einops dataclasses functools "
    "itertools typing collections collections.abc __future__".split()
)
# Parts of these that may be used: no other module can be reached through an attribute.
PARTS = set(
    "torch.autograd.functional torch.fft torch.func torch.linalg torch.nn.init "
    "torch.nn.modules torch.special".split()
)
REFUSED = set(  # names of Python's own
    "exec eval compile open globals locals vars getattr setattr delattr breakpoint".split()
)
TORCH = set(  # of torch itself
    "load save compile from_file hub testing utils ops classes library overrides jit package "
    "set_default_dtype set_default_device set_grad_enabled set_rng_state "
    "set_default_tensor_type set_deterministic_debug_mode use_deterministic_algorithms".split()
)
# Attributes that lead out of an object to the program around it, whatever the object.
OUTWARD = set(
    "sys os builtins importlib import_module inspect pickle loads pkgutil runpy subprocess ctypes "
    "shutil pathlib threading multiprocessing socket tempfile traceback warnings linecache gc "
    "modules gi_frame gi_code cr_frame ag_frame f_back f_globals f_locals f_builtins tb_frame "
    "tb_next get_type_hints ForwardRef evaluate_forward_ref singledispatch "
    "singledispatchmethod".split()  # annotations are evaluated
) | (TORCH - {"classes", "package"})
DUNDERS = set(  # that may be defined; used as an attribute only the first
    "__init__ __slots__ __call__ __len__ __iter__ __getitem__ __post_init__ __repr__".split()
)
LOOPS = (ast.For, ast.AsyncFor, ast.While)
MAPS = {"map", "filter", "reduce", "starmap", "accumulate", "vectorize"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
MAIN = ast.dump(ast.parse('__name__ == "__main__"', mode="eval").body)


def own_code(tree: ast.Module, given: ast.Module) -> ast.Module:
    """The file without its measurement block and without the specifications that were given: what
    is not looked at is not run either."""
    specs = {ast.dump(node) for node in given.body if is_spec(node)}
    body = []
    for node in tree.body:
        if isinstance(node, ast.If) and ast.dump(node.test) == MAIN:
            body += node.orelse
        elif not (is_spec(node) and ast.dump(node) in specs):
            body.append(node)
    return ast.Module(body, tree.type_ignores)


def is_spec(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and node.name.endswith("_spec")


def broken_rules(tree: ast.Module, given: ast.Module, checks: ModuleType) -> str | None:
    """The first rule that a file breaks, with its line; None where it keeps them. The checks may
    say FORBIDDEN (names), NO_LOOPS (functions) and IMPORTS (module: names) of their exercise."""
    own = own_code(tree, given)
    known = imported_names(own)
    extra = getattr(checks, "IMPORTS", {})
    forbidden = set(getattr(checks, "FORBIDDEN", ()))
    specs = {node.name for node in given.body if is_spec(node)}
    found = []
    for node in ast.walk(own):
        said = (
            import_rule(node, extra, forbidden)
            or name_rule(node, forbidden, specs)
            or attribute_rule(node, known)
            or store_rule(node, known)
        )
        if said:
            found.append((getattr(node, "lineno", 0), said))
    found += loop_rules(own, getattr(checks, "NO_LOOPS", ()), known)
    found += copy_rules(own, given)
    return "line {} {}".format(*min(found)) if found else None


# Imports -----------------------------------------------------------------------------------------


def import_rule(node: ast.AST, extra: dict, forbidden: set) -> str | None:
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name not in IMPORTS:
                return f"imports {alias.name}: torch, einops and math are enough"
    if isinstance(node, ast.ImportFrom):
        source = "." * node.level + (node.module or "")
        for alias in node.names:
            if source in extra and not node.level:
                if alias.name not in extra[source]:
                    return f"imports {alias.name} from {source}"
            elif source not in IMPORTS:
                return f"imports {source}: torch, einops and math are enough"
            elif alias.name == "*":
                return f"imports * from {source}: name what you use"
            elif alias.name in forbidden:
                return f"uses {alias.name}: that is the exercise"
            elif alias.name in OUTWARD:
                return f"imports {alias.name} from {source}"
            elif source != "__future__" and is_outside(member(source), alias.name):
                return f"imports {alias.name} from {source}"
    return None


def member(path: str):
    """torch.nn.functional -> the module."""
    return importlib.import_module(path)


def is_outside(thing, name: str) -> bool:
    """Does an attribute lead out of a module that may be imported?"""
    if not isinstance(thing, ModuleType):
        return False
    if name.startswith("_") or (thing.__name__ == "torch" and name in TORCH):
        return True
    part = getattr(thing, name, None)
    return isinstance(part, ModuleType) and part.__name__ not in IMPORTS | PARTS


def imported_names(tree: ast.Module) -> dict[str, object]:
    """What names stand for: imported modules and what was taken out of them, aliases followed."""
    known: dict[str, object] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                path = alias.name if alias.asname else alias.name.split(".")[0]
                if path in IMPORTS:
                    known[alias.asname or path] = member(path)
        elif isinstance(node, ast.ImportFrom) and node.module in IMPORTS and not node.level:
            for alias in node.names:
                thing = getattr(member(node.module), alias.name, None)
                if thing is not None:
                    known[alias.asname or alias.name] = thing
    for _ in range(4):  # an alias of an alias
        for target, value in assignments(tree):
            thing = resolved(value, known)
            if isinstance(target, ast.Name) and isinstance(thing, ModuleType | type):
                known.setdefault(target.id, thing)
    return known


def assignments(tree: ast.Module) -> Iterator[tuple[ast.AST, ast.AST]]:
    """(target, value) of every assignment, default values of arguments among them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value:
            pairs = [(node.target, node.value)]
        elif isinstance(node, FUNCTIONS):
            arguments = [*node.args.posonlyargs, *node.args.args]
            named = list(zip(arguments[::-1], node.args.defaults[::-1]))
            named += [pair for pair in zip(node.args.kwonlyargs, node.args.kw_defaults) if pair[1]]
            pairs = [(ast.Name(argument.arg), value) for argument, value in named]
        else:
            continue
        for target, value in pairs:
            both = isinstance(target, ast.Tuple | ast.List), isinstance(value, ast.Tuple | ast.List)
            yield from zip(target.elts, value.elts) if all(both) else [(target, value)]


def resolved(node: ast.AST, known: dict[str, object]):
    """What an expression of names and dots stands for, None where that is not known."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        thing = resolved(node.value, known)
        return None if thing is None else getattr(thing, node.attr, None)
    return None


# Names and attributes ----------------------------------------------------------------------------


def identifiers(node: ast.AST) -> Iterator[str]:
    """Every name that a node itself writes down, wherever Python's grammar hides it."""
    for field, value in ast.iter_fields(node):
        if field in ("id", "name", "asname", "rest", "arg") and isinstance(value, str):
            yield value
        elif field in ("names", "kwd_attrs") and isinstance(value, list):
            yield from (name for name in value if isinstance(name, str))


def name_rule(node: ast.AST, forbidden: set, specs: set) -> str | None:
    for name in identifiers(node):
        if name.startswith("__") and name.endswith("__"):
            if name not in DUNDERS and not isinstance(node, ast.alias):
                return f"uses {name}"
        if isinstance(node, ast.Name) and name in specs:
            return (
                f"uses {name}: the specification shows what to compute, it is not the answer "
                "(below `__main__` you may compare)"
            )
        if isinstance(node, ast.Name) and name in REFUSED:
            return f"uses {name}"
    if isinstance(node, ast.MatchClass):  # `case object(sys=s)` reads an attribute
        refused = OUTWARD | forbidden
        hidden = [name for name in node.kwd_attrs if name in refused or name.startswith("_")]
        return f"uses {hidden[0]}" if hidden else None
    if isinstance(node, ast.Attribute) and node.attr in forbidden:
        return f"uses {node.attr}: that is the exercise"
    return None


def attribute_rule(node: ast.AST, known: dict[str, object]) -> str | None:
    if not isinstance(node, ast.Attribute):
        return None
    if node.attr.startswith("__") and node.attr.endswith("__") and node.attr != "__init__":
        return f"uses {node.attr}"
    own = ast.unparse(node) in ("self.save", "self.load")  # a student's own methods
    if (node.attr in OUTWARD and not own) or is_outside(resolved(node.value, known), node.attr):
        return f"uses {ast.unparse(node)}"
    return None


def store_rule(node: ast.AST, known: dict[str, object]) -> str | None:
    """No assignment to a part of what was imported."""
    stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
    if stored and isinstance(node, ast.Attribute | ast.Subscript):
        root = node.value
        while isinstance(root, ast.Attribute | ast.Subscript):
            root = root.value
        if isinstance(root, ast.Name) and root.id in known:
            return f"assigns to {ast.unparse(node)}, which is not yours"
    return None


# Loops, and copies of the specification ----------------------------------------------------------


def loop_rules(tree: ast.Module, functions: tuple, known: dict) -> Iterator[tuple[int, str]]:
    """Loops in these functions or in what they use of the file. A loop over things that are
    written out, such as (q, k), is none."""
    for function in functions:
        for part in reached(tree, function):
            for node in ast.walk(part):
                source = [node.iter] if isinstance(node, ast.For | ast.comprehension) else []
                literal = [it for it in source if isinstance(it, ast.Tuple | ast.List)]
                looping = isinstance(node, LOOPS) or bool(source)
                named = isinstance(node, ast.Name) and node.id in MAPS
                dotted = isinstance(node, ast.Attribute) and node.attr in MAPS
                einops = str(getattr(resolved(node, known), "__module__", "")).startswith("einops")
                if (looping and not literal) or ((named or dotted) and not einops):
                    line = getattr(node, "lineno", None) or node.iter.lineno
                    yield line, f"loops: write {function} for whole tensors at once"
                if isinstance(node, FUNCTIONS) and calls_itself(node):
                    yield node.lineno, f"loops, by calling {node.name} from itself"


def calls_itself(node: ast.AST) -> bool:
    name = getattr(node, "name", None)
    names = [n for n in ast.walk(node) if isinstance(n, ast.Name) and n.id == name]
    return bool(names) and not any(isinstance(n.ctx, ast.Store) for n in names)  # else: a variable


def reached(tree: ast.Module, name: str) -> list[ast.AST]:
    """The statements of a file that define a name, and those that define what these use."""
    parts, todo, seen = [], [name], set()
    while todo:
        name = todo.pop()
        for node in tree.body:
            if name not in seen and name in defined(node):
                parts += [] if node in parts else [node]
                todo += [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        seen.add(name)
    return parts


def defined(node: ast.AST) -> set[str]:
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef):
            names.add(part.name)
        elif isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            names.add(part.id)
        if part is node and isinstance(part, ast.FunctionDef | ast.ClassDef):
            break
    return names


def copy_rules(tree: ast.Module, given: ast.Module) -> Iterator[tuple[int, str]]:
    """A function that is a given specification under other names, or nearly so."""
    specs = {node.name: shape(node) for node in given.body if is_spec(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name not in specs:
            for name, spec in specs.items():
                if SequenceMatcher(None, shape(node), spec, autojunk=False).ratio() > 0.9:
                    yield node.lineno, f"copies {name}: write {node.name} in your own way"


def shape(function: ast.FunctionDef) -> list[tuple]:
    """A function's body as kinds of nodes, with attributes and constants, without other names and
    without statements that do nothing."""
    found = []

    def walk(node: ast.AST) -> None:
        idle = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if idle or isinstance(node, ast.Pass):
            return
        constant = repr(node.value) if isinstance(node, ast.Constant) else None
        found.append((type(node), getattr(node, "attr", constant)))
        for child in ast.iter_child_nodes(node):
            walk(child)

    for node in function.body:
        walk(node)
    return found

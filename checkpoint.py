"""A model on disk: config.json and model.safetensors, as Hugging Face's Cohere2 has them, read and
written without transformers.

Cohere2 is this architecture in production (Command R7B), so `AutoModelForCausalLM.from_pretrained`
(4.57, 5.x) opens what we save and `load_config` / `load_weights` open what it saves. What Cohere2
cannot say (a window without RoPE, qk_norm, ...) is saved under a model_type of our own, so that
transformers refuses it rather than run something else. Nothing is ever unpickled.

Here a model is plain data: a dict of ModelConfig's fields, and a state dict. This file imports
nothing of ours. In order: config.json; values from outside, typed; weights; whole files.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import reprlib
import shlex
import shutil
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

OURS = "ropenope"  # the model_type of what Cohere2 cannot express
ENDLESS = 2**30  # the window of Cohere2's rotated layers that see all: no sequence reaches it
MOST_LAYERS = 10_000  # what has more is no model but a mistake

# our field: Cohere2's key, its type, what transformers takes when the key is absent
KEYS = {
    "n_layer": ("num_hidden_layers", int, 40),
    "n_head": ("num_attention_heads", int, 64),
    "n_kv_head": ("num_key_value_heads", int, None),
    "d_model": ("hidden_size", int, 8192),
    "d_ff": ("intermediate_size", int, 22528),
    "vocab_size": ("vocab_size", int, 256000),
    "head_dim": ("head_dim", int, None),
    "trained_length": ("trained_length", int, None),  # ours alone; transformers keeps it
    "logit_scale": ("logit_scale", float, 0.0625),
    "norm_eps": ("layer_norm_eps", float, 1e-5),
    "tie_embeddings": ("tie_word_embeddings", bool, True),
}
# Keys that may be absent or null; with any other value than this, another model is meant.
# transformers ignores some of them (they are in Command R7B's own config.json), we do not.
IMPLEMENTED = {
    "attention_bias": False,
    "attention_dropout": 0,
    "hidden_act": "silu",
    "is_causal": True,
    "order_of_interleaved_layers": "local_attn_first",
    "partial_rotary_factor": 1,
    "position_embedding_type": "rope_gptj",  # adjacent pairs
    "quantization_config": None,
    "rotary_pct": 1,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}
# The paper's constants of YaRN, which are ours.
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}
ROPE_TYPES = {"none": "default", "pi": "linear", "yarn": "yarn"}
SLIDING, FULL = "sliding_attention", "full_attention"
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
FOR_TOOLS = {"layer_types", "dtype", *SPECIAL}  # in config.json of our own kind, and not read


# ModelConfig's fields -> config.json -------------------------------------------------------------


def to_json(config: dict, dtype: str = "float32") -> dict:
    """What config.json says of ModelConfig's fields."""
    ours = {"model_type": OURS, **config, **_of_any_model(config, dtype)}
    ours["scaling"] = ours.pop("rope_scaling")  # where transformers wants a table, of any model
    return to_cohere2(config, dtype) or ours


def _of_any_model(config: dict, dtype: str) -> dict:
    """What tools ask of every config.json; a layer slides where it has a window."""
    letters = config["pattern"] * (config["n_layer"] // len(config["pattern"]))
    content = {"layer_types": [SLIDING if letter.islower() else FULL for letter in letters]}
    # Our end of text: Cohere2's defaults would lie outside our vocabulary.
    return content | {"dtype": dtype} | dict.fromkeys(SPECIAL, config["vocab_size"] - 1)


def to_cohere2(config: dict, dtype: str) -> dict | None:
    """Cohere2's config.json for ModelConfig's fields, or None where it cannot express the model."""
    pattern = config["pattern"]
    unlike = "n" in pattern or {"r", "R"} <= set(pattern)
    if unlike or config["qk_norm"] or config["length_scale"] != "none":
        return None

    # What it rotates slides: R by a window without end. And N alone has to have a window too.
    content = {"architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2"}
    content |= _of_any_model(config | {"pattern": pattern.replace("R", "r")}, dtype)
    for ours, (theirs, kind, _) in KEYS.items():
        content[theirs] = None if config[ours] is None else kind(config[ours])
    content["head_dim"] = config["head_dim"] or config["d_model"] // config["n_head"]
    content["sliding_window"] = ENDLESS if "R" in pattern else config["window"] or ENDLESS
    content |= _to_rope(config, content["head_dim"])
    content |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
    return content | {"use_cache": True}


def _to_rope(config: dict, d: int) -> dict:
    """The keys that say how queries and keys of `d` dimensions are rotated."""
    theta, scaling = float(config["rope_theta"]), config["rope_scaling"]
    factor, longest = float(config["rope_factor"]), config["trained_length"] or 8192
    if scaling == "ntk":  # is a theta; Hugging Face's "dynamic" changes with the length
        theta, scaling = theta * factor ** (d / (d - 2)), "none"
    rope = {"rope_type": ROPE_TYPES[scaling]}
    if scaling != "none":
        rope["factor"] = factor
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = config["rope_original_length"]
        # Some of 4.x divide these two to have the factor.
        longest = round(config["rope_original_length"] * factor)
    return {
        "rope_parameters": {"rope_theta": theta, **rope},  # transformers 5.x
        "rope_theta": theta,  # 4.x, with rope_scaling
        "rope_scaling": None if scaling == "none" else rope,
        "max_position_embeddings": longest,
    }


# config.json -> ModelConfig's fields -------------------------------------------------------------


def load_config(path: str | Path) -> dict:
    """ModelConfig's fields from the config.json in folder `path`: ours, or any Hugging Face
    Cohere2's of 4.48 or later.

    Raises FileNotFoundError where there is none, and ValueError for one that is damaged or asks for
    what is not implemented.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        mend = "give a checkpoint's folder; `python train.py` makes one"
        raise FileNotFoundError(f"{file} not found: {mend}")
    raw = read_json(file)
    try:
        return _ours(raw) if raw.get("model_type") == OURS else _from_cohere2(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _ours(raw: dict) -> dict:
    """ModelConfig's fields of a model_type of our own; those written before have rope_scaling."""
    fields = {key: raw[key] for key in raw if key not in FOR_TOOLS | {"model_type", "scaling"}}
    return fields | ({"rope_scaling": raw["scaling"]} if "scaling" in raw else {})


def read_config(path: str | Path, cls):
    """A `cls` (ModelConfig) from the config.json in folder `path`, of either kind. OSError and
    ValueError as `load_config`, and where the values make no model."""
    fields = load_config(path)
    try:
        return cls(**typed_fields(cls, fields, ""))
    except ValueError as error:
        raise ValueError(f"{Path(path) / 'config.json'} makes no model: {error}") from error


def verify_config(path: Path, config: dict, source: str | Path) -> None:
    """ValueError where config.json in folder `path` is not that of ModelConfig's fields `config`,
    which come from `source`."""
    file = path / "config.json"
    found = read_json(file)
    for key, value in to_json(config).items():
        if found.get(key, value if key in FOR_TOOLS else None) != value:
            values = f"{shown(value)} in the one and {shown(found.get(key))} in the other"
            raise ValueError(f"{source} and {file} disagree: {key} is {values}")


def _from_cohere2(raw: dict) -> dict:
    """ModelConfig's fields. ValueError for a value of another type, or what is not implemented."""
    kind = raw.get("model_type")
    if kind != "cohere2":
        known = f"it reads 'cohere2' and {OURS!r}"
        raise ValueError(f"model_type {shown(kind)} is not implemented: {known}")
    _only_implemented(raw, IMPLEMENTED)
    config = {ours: _typed(raw, *theirs) for ours, theirs in KEYS.items()}
    config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
    if (config["head_dim"] or 0) * config["n_head"] == config["d_model"]:
        config["head_dim"] = None  # it is d_model / n_head

    # The window, and whether a rotated layer has it.
    layers, n = _layer_types(raw, config["n_layer"]), config["n_layer"]
    window, rotated = typed(int | None, raw.get("sliding_window", 4096), "sliding_window"), "r"
    if window is None and SLIDING in layers:
        contradicts = "contradicts layer_types, which has sliding_attention: give the window"
        raise ValueError(f"sliding_window None {contradicts}")
    if window is None or window >= ENDLESS:
        window, rotated = None, "R"
    config["window"] = window

    # The shortest pattern that tiles the layers.
    letters = "".join(rotated if kind == SLIDING else "N" for kind in layers)
    periods = (letters[:p] for p in range(1, n) if letters[:p] * (n // p) == letters)
    config["pattern"] = next(periods, letters)
    return config | _from_rope(raw)


def _layer_types(raw: dict, n: int) -> list[str]:
    """SLIDING or FULL for each of n layers."""
    if n > MOST_LAYERS:
        raise ValueError(f"num_hidden_layers {n} is above {MOST_LAYERS}")

    def local_first(key: str, default: int | None = None) -> list[str]:
        """One full layer at the end of every `period`."""
        period = _typed(raw, key, int, default)
        if period < 1:
            raise ValueError(f"{key} {period} is below 1")
        return [SLIDING if (i + 1) % period else FULL for i in range(n)]

    kinds = raw.get("layer_types") or local_first("sliding_window_pattern", 4)
    named = isinstance(kinds, list) and all(kind in (SLIDING, FULL) for kind in kinds)
    if not named or len(kinds) != n:
        wanted = f"does not name {SLIDING} or {FULL} for each of {n} layers"
        raise ValueError(f"layer_types {shown(kinds)} {wanted}")
    if raw.get("layer_switch") is not None and local_first("layer_switch") != kinds:
        contradicts = "contradicts layer_types (or sliding_window_pattern): correct one"
        raise ValueError(f"layer_switch {raw['layer_switch']} {contradicts}")
    return kinds


def _from_rope(raw: dict) -> dict:
    """rope_theta, rope_scaling, rope_factor and rope_original_length from 5.x's rope_parameters or
    4.x's two keys."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # in transformers' own order
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        mend = "give one set of values for all layers"
        raise ValueError(f"rope_parameters {shown(rope)} is not implemented: {mend}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = next((ours for ours, theirs in ROPE_TYPES.items() if theirs == kind), None)
    if scaling is None:
        known = ", ".join(ROPE_TYPES.values())
        raise ValueError(f"rope_type {shown(kind)} is not implemented: it reads {known}")
    _only_implemented(rope, {"partial_rotary_factor": 1})
    theta = _typed(rope, "rope_theta", float, _typed(raw, "rope_theta", float, 10_000.0))
    found = {"rope_theta": theta, "rope_scaling": scaling}
    if scaling != "none":
        found["rope_factor"] = factor = _typed(rope, "factor", float, None)
        if factor is None:
            raise ValueError(f"rope_type {kind!r} needs a factor")
    if scaling == "yarn":
        truncates = bool(rope.get("truncate", True))  # null is False to transformers
        _only_implemented(rope | {"truncate": truncates}, YARN)
        own = 0.1 * math.log(max(factor, 1)) + 1  # as transformers has it where none is given
        amplitude = _typed(rope, "attention_factor", float, None)
        if amplitude is not None and not math.isclose(amplitude, own, rel_tol=1e-6):
            only = f"only YaRN's own 0.1 ln(factor) + 1 = {own:.6f} is"
            raise ValueError(f"attention_factor {amplitude} is not implemented: {only}")
        key = "original_max_position_embeddings"
        longest = _typed(raw, "max_position_embeddings", int, 8192)
        found["rope_original_length"] = _typed(raw, key, int, _typed(rope, key, int, longest))
    return found


def _only_implemented(raw: dict, implemented: dict) -> None:
    """ValueError for a key with another value than the one implemented."""
    for key, value in implemented.items():
        given = raw.get(key)
        same = given == value and isinstance(given, bool) == isinstance(value, bool)
        if given is not None and not same:
            raise ValueError(f"{key} {shown(given)} is not implemented: only {value!r} is")


def _typed(raw: dict, key: str, kind: type, default):
    """raw[key] as `kind`; `default` where it is absent, or null and the default is None."""
    value = raw.get(key, default)
    return None if value is None and default is None else typed(kind, value, key)


# Values from outside -----------------------------------------------------------------------------

short = reprlib.Repr()
short.maxstring = short.maxother = 200


def shown(value) -> str:
    """How a message quotes a value from outside: its repr, shortened, however deep it is."""
    return short.repr(value)


def escaped(text: str) -> str:
    """How a message repeats a name: shortened, and nothing in it moves a terminal's cursor."""
    return shown(text)[1:-1]


def typed(kind, value, name: str):
    """`value`, which came from a file or a flag, as the annotation `kind` (bool, int, float or str,
    or one of them and None) says. ValueError, with the name and the value, for another type, a
    number that is not finite, or one that no 64 bits hold."""
    wanted = plain_type(kind)
    if value is None and wanted is not kind:
        return None
    if type(value) is not wanted and (wanted, type(value)) != (float, int):
        raise ValueError(f"{name} {shown(value)} is no {wanted.__name__}")
    if wanted in (int, float) and not -(2**63) < value < 2**63:
        raise ValueError(f"{name} {shown(value)} is not finite, or too large for 64 bits")
    return wanted(value)


def plain_type(kind) -> type:
    """The bool, int, float or str of an annotation, which may be `or None`."""
    return next(k for k in (typing.get_args(kind) or (kind,)) if k is not types.NoneType)


def typed_fields(cls, table: dict, where: str) -> dict:
    """The fields of the dataclass `cls` that a table gives, typed. ValueError for an unknown key,
    with the nearest one, or a missing one."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in table.items():
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{where}unknown key {shown(key)}; {mend}")
        kind = known[key].type
        tabular = typing.get_origin(kind) in (dict, tuple)  # their owner reads them
        values[key] = value if tabular else typed(kind, value, f"{where}{key}")
    for name, f in known.items():
        needed = f.default is f.default_factory is dataclasses.MISSING
        if needed and name not in table:
            raise ValueError(f"{where}{name} is missing")
    return values


def read_json(file: Path) -> dict:
    """The object in a JSON file. ValueError where it is damaged."""
    try:
        raw = json.loads(file.read_bytes())
        if isinstance(raw, dict):
            return raw
        error = "it holds no JSON object"
    except (ValueError, RecursionError) as wrong:  # bad JSON, bad UTF-8, nested without end
        error = wrong
    raise ValueError(f"{file} is damaged ({error}): copy it again from where it came")


# Weights -----------------------------------------------------------------------------------------


def save(path: str | Path, config: dict, state_dict: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors and config.json into folder `path` (made if absent). config:
    ModelConfig's fields."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in state_dict.items():
        key = name if name.startswith("lm_head.") else f"model.{name}"
        tensors[key] = tensor.detach().contiguous()
    dtype = str(state_dict["embed_tokens.weight"].dtype).removeprefix("torch.")
    text = json.dumps(to_json(config, dtype), indent=2) + "\n"
    write = lambda file: save_file(tensors, file, metadata={"format": "pt"})
    replace_file(folder / "model.safetensors", write)
    replace_file(folder / "config.json", lambda file: file.write_text(text, encoding="utf-8"))


class Unfilled(TorchFunctionMode):
    """Nothing is drawn for the parameters of modules made in this context."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("normal_", "kaiming_uniform_"):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs or {})


@contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made in this context are on the meta device; to draw their values even there, torch
    would import its compiler, which takes longer than most checkpoints to load."""
    with torch.device("meta"), Unfilled():
        yield


@torch.no_grad()
def load_weights(
    path: str | Path, model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype
) -> None:
    """Give `model`, built on the meta device, the tensors in folder `path`: shard by shard, each
    straight to `device` and `dtype`. A tensor may be there twice where both are equal; frequencies
    of rotation follow from config.json and are not read.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged one or tensors that
    are not the model's.
    """
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = "lm_head.weight" not in shapes
    shards = _shards(Path(path))
    _check_headers(path, shards, shapes)

    state = {}
    for name, key, tensors in _stored(shards):
        # A copy, because what safe_open returns is a view of the file.
        tensor = tensors.get_tensor(key).to(device, dtype, copy=True)
        if name in state and not torch.equal(state[name], tensor):
            raise ValueError(f"{path}: {name} is there twice, with different values")
        state[name] = tensor

    # Some writers leave beside tied embeddings a copy of them.
    head = state.pop("lm_head.weight", None) if tied else None
    if head is not None and not torch.equal(head, state["embed_tokens.weight"]):
        problem = "lm_head.weight differs from the embeddings it is tied to"
        raise ValueError(f"{path}: {problem}: set tie_word_embeddings to false")
    model.load_state_dict(state, assign=True)


def _check_headers(path: str | Path, shards: list[Path], shapes: dict[str, list[int]]) -> None:
    """ValueError where the shards' headers are not of a model of these shapes: a wrong file is
    refused before anything is read."""
    known = {"lm_head.weight": shapes["embed_tokens.weight"]} | shapes
    found, wrong = set(), []
    for name, key, tensors in _stored(shards):
        found.add(name)
        header = tensors.get_slice(key)
        shape, kind = header.get_shape(), header.get_dtype()
        if name not in known:
            wrong.append(f"{escaped(key)} is not in this model")
        elif shape != known[name] or kind not in ("BF16", "F16", "F32", "F64"):
            wrong.append(f"{key} is {kind} {shape}, not floating-point {known[name]}")
    wrong += [f"{name} is missing" for name in shapes if name not in found]
    if wrong:
        some = "; ".join(wrong[:20]) + (f"; and {len(wrong) - 20} more" if wrong[20:] else "")
        raise ValueError(f"{path}: the weights do not fit config.json: {some}")


def _stored(shards: list[Path]) -> Iterator[tuple[str, str, safe_open]]:
    """(name in our model, key in the file, the open file) of every tensor of the shards."""
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as tensors:
                for key in tensors.keys():
                    if not key.endswith("inv_freq"):  # frequencies of rotation
                        yield key.removeprefix("model."), key, tensors
        except SafetensorError as error:
            problem = f"{shard} is damaged ({escaped(str(error))})"
            raise ValueError(f"{problem}: copy it again from where it came") from error


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or those that
    model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        mend = "copy the weights there (pickled ones are not read)"
        raise FileNotFoundError(f"{single} not found, nor an index of shards: {mend}")
    names = read_json(index).get("weight_map")
    named = isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
    if not names or not named:
        problem = "weight_map is no map from tensors to files"
        raise ValueError(f"{index} is damaged ({problem}): copy it again from where it came")
    shards = [folder / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != folder or shard.suffix != ".safetensors":
            rule = "a shard is a .safetensors file in the same folder"
            raise ValueError(f"{index} names {shown(str(shard))}: {rule}")
        if not shard.is_file():
            mend = f"{index.name} names it, so copy it there"
            raise FileNotFoundError(f"{escaped(shard.name)} not found in {folder}: {mend}")
    return shards


# Files that are whole or absent, whenever the process is killed ----------------------------------


CHECKSUMS = "checksums.json"  # of a folder's other files
STEP = r"step-\d{6,}"  # the folder of a checkpoint


def unfinished(path: Path) -> Path:
    """Where a file or folder is made before it takes its name: hidden, as nobody names his own."""
    return path.with_name(f".{path.name}.partial")


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside `file`, by write(path), and put it in its place, as readable as any new
    one (safetensors' are their owner's alone). OSError where it cannot be written."""
    partial = unfinished(file)
    try:
        partial.unlink(missing_ok=True)
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)
        sync(partial)
        os.replace(partial, file)
    except (RuntimeError, SafetensorError) as error:  # so torch and safetensors say: a full disk
        raise OSError(f"cannot write {file} ({error}): make room") from error
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk. Windows opens no folder, and syncs a file
    only through a handle that may write."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that becomes `path` when the block ends, and vanishes
    when the block fails. Where `path` is there already, what is new in it takes the place of what
    has the same name; files come last."""
    path = Path(path)
    if os.path.ismount(path):
        raise OSError(
            f"{path} is a disk of its own, to which nothing can be moved: name a folder inside it"
        )
    partial = unfinished(path)
    shutil.rmtree(partial, ignore_errors=True)  # a process that was killed left it
    partial.mkdir(parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            sync(file)
        sync(partial)
        if path.is_dir():
            for new in sorted(partial.iterdir(), key=lambda new: new.is_file()):
                _remove(path / new.name)
                os.replace(new, path / new.name)
        else:
            os.replace(partial, path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def point(link: str | Path, target: str | Path) -> None:
    """Make `link` a relative symlink to the folder `target`, replacing the former one in a single
    step. Where the disk or the system has no links it is a copy of the folder, replaced in two."""
    link, target = Path(link), Path(target)
    partial = unfinished(link)
    _remove(partial)
    try:
        partial.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
        os.replace(partial, link)
    except OSError:
        _remove(partial)
        shutil.copytree(target, partial)
        _remove(link)
        os.replace(partial, link)
    sync(link.parent)


def repoint(target: Path, names: tuple[str, ...]) -> None:
    """Point the links `names` beside the folder `target` to it. Then `target` and what `last` and
    `best` pointed to before go, where neither points to them (copies need no folder), and what a
    kill left half made."""
    folder = target.parent
    before = {target.name} | pointed(folder)
    for name in names:
        point(folder / name, target)
    for old in before - pointed(folder):
        shutil.rmtree(folder / old)
    for left in folder.glob("*.partial"):
        if re.fullmatch(rf"\.?(last|best|{STEP})\.partial", left.name):
            _remove(left)


def pointed(folder: Path) -> set[str]:
    """Names of the folders step-000700 in `folder` that its links `last` and `best` point to."""
    links = [folder / name for name in ("last", "best")]
    targets = {os.readlink(link) for link in links if link.is_symlink()}
    return {name for name in targets if re.fullmatch(STEP, name) and (folder / name).is_dir()}


def check_links(folder: Path) -> None:
    """Errors for a folder that a run can neither begin nor go on in: a file (NotADirectoryError); a
    checkpoint, or somebody else's; a name that safetensors cannot open; one that has checkpoints of
    later steps than 0, which a kill leaves at the start, or a log of these, and has lost its
    run.json or its `last`, as a copy does that skips links (ValueError)."""
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: name a run's folder")
    if (folder / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} is a checkpoint: name its run's folder, such as {folder.parent}"
        )
    for name in ("last", "best"):
        inside = folder / name
        held = set(os.listdir(inside)) if inside.is_dir() else set()
        if held and not held & {"config.json", "model.safetensors", CHECKSUMS}:
            raise ValueError(f"{inside} is no checkpoint: choose another --out")
    if str(folder).encode(errors="ignore").decode() != str(folder):
        raise ValueError(f"{folder} is not UTF-8: safetensors opens no such --out")
    steps = sorted(f.name for f in folder.glob("step-*") if re.fullmatch(STEP, f.name))
    steps = [name for name in steps if int(name.removeprefix("step-"))]
    if not steps and not (folder / "best").is_dir():
        log = folder / "log.jsonl"
        lines = log.read_bytes().splitlines() if log.is_file() else []
        if not (folder / "last").is_dir() and not all(b'"step": 0,' in line for line in lines):
            gone = f"{log} tells of steps whose checkpoints are gone"
            raise ValueError(f"{gone}: move it away, or choose another --out")
        return
    if not (folder / "last").is_dir():
        copy = unfinished(folder / "last")  # where there are no links, whole once `last` is gone
        lost = [("last", steps[-1]), ("best", steps[0])] if steps else []
        links = [f"ln -sfn {a} {b}" for b, a in lost if not (folder / b).is_dir()]
        mend = " && ".join(links) or "cp -r best last"  # a disk without links keeps copies
        mend = f"mv {copy.name} last" if copy.is_dir() else mend
        inside = f"cd {shlex.quote(str(folder))} && {mend}"
        raise ValueError(f"{folder} has lost its last checkpoint, last: {inside}")
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} has checkpoints and has lost its run.json: put that back")


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file of the folder beside them."""
    text = json.dumps(_checksums(folder), indent=1) + "\n"
    replace_file(folder / CHECKSUMS, lambda file: file.write_text(text, encoding="utf-8"))


def verify_checksums(folder: Path) -> None:
    """ValueError where a file is not what its checksum says. Without checksums (of an earlier
    version, or Hugging Face's) there is nothing to compare."""
    if (folder / CHECKSUMS).is_file():
        found, recorded = _checksums(folder), read_json(folder / CHECKSUMS)
        if not {"config.json", "model.safetensors"} <= recorded.keys():
            raise ValueError(f"{folder / CHECKSUMS} is damaged: it does not name the weights")
        for name, digest in recorded.items():
            file = folder / escaped(name)
            if name not in found:
                raise FileNotFoundError(f"{file} not found: copy it from where it came")
            if found[name] != digest:
                mend = f"copy it again, or remove {CHECKSUMS} if you have changed it"
                raise ValueError(f"{file} is damaged, its checksum is another: {mend}")


def _checksums(folder: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != CHECKSUMS:
            with open(file, "rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests

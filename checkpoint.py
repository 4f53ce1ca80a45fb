"""A model on disk: config.json and model.safetensors, as Hugging Face's Cohere2 has them, read and
written without transformers.

Cohere2 is this architecture in production (Command R7B), so `AutoModelForCausalLM.from_pretrained`
(4.57, 5.x) opens what we save and `load_config` / `load_weights` open what it saves. What Cohere2
cannot say (a window without RoPE, qk_norm, ...) is saved under a model_type of our own, so that
transformers refuses it rather than run something else. Nothing is ever unpickled.

Here a model is plain data: a dict of ModelConfig's fields, and a state dict. This file imports
nothing of ours.
"""

import dataclasses
import hashlib
import json
import os
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

ENDLESS = (
    2**30
    # Cohere2 rotates only layers that have a window; this one no sequence reaches, and it fits an
    # int32 kernel
)
OURS = "ropenope"  # the model_type of what Cohere2 cannot express

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
    "rotary_pct": 1,
    "use_gated_activation": True,
    "use_parallel_block": True,
    "use_qk_norm": False,
}
YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}  # the paper's constants, which are ours
ROPE_TYPES = {"none": "default", "pi": "linear", "yarn": "yarn"}


# ------------------------------------------------------------------------------------------------
# ModelConfig's fields <-> config.json


def to_cohere2(config: dict, dtype: str) -> dict | None:
    """Cohere2's config.json for ModelConfig's fields, or None where Cohere2 cannot express the
    model."""
    letters = config["pattern"]
    if (
        "n" in letters
        or {"r", "R"} <= set(letters)
        or config["qk_norm"]
        or config["length_scale"] != "none"
    ):
        return None
    layers = letters * (config["n_layer"] // len(letters))
    theta, scaling, factor = (
        float(config["rope_theta"]),
        config["rope_scaling"],
        float(config["rope_factor"]),
    )
    d = config["head_dim"] or config["d_model"] // config["n_head"]
    # is a theta (Hugging Face's name for it, "dynamic", changes with the length)
    if scaling == "ntk":
        theta, scaling = theta * factor ** (d / (d - 2)), "none"
    rope = {"rope_type": ROPE_TYPES[scaling]}
    longest = config["trained_length"] or 8192
    if scaling != "none":
        rope["factor"] = factor
    if scaling == "yarn":
        original = config["rope_original_length"]
        rope["original_max_position_embeddings"] = original
        longest = round(original * factor)  # some of 4.x divide these two to have the factor
    # our end of text; Cohere2's defaults would lie outside our vocabulary
    last = config["vocab_size"] - 1
    return {
        "architectures": ["Cohere2ForCausalLM"],
        "model_type": "cohere2",
        "dtype": dtype,
        **{
            key: kind(config[ours]) if config[ours] is not None else None
            for ours, (key, kind, _) in KEYS.items()
        },
        "head_dim": d,
        "layer_types": [
            "sliding_attention" if letter in "rR" else "full_attention" for letter in layers
        ],
        "sliding_window": ENDLESS
        if "R" in letters
        else config["window"] or ENDLESS,  # transformers wants one even for N
        "rope_parameters": {"rope_theta": theta, **rope},  # transformers 5.x
        "rope_theta": theta,  # 4.x, with rope_scaling
        "rope_scaling": None if scaling == "none" else rope,
        "max_position_embeddings": longest,
        "bos_token_id": last,
        "eos_token_id": last,
        "pad_token_id": last,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def to_json(config: dict, dtype: str = "float32") -> dict:
    """What config.json says of ModelConfig's fields."""
    return to_cohere2(config, dtype) or {"model_type": OURS, **config}


def load_config(path: str | Path) -> dict:
    """ModelConfig's fields from the config.json in folder `path`: ours, or any Hugging Face
    Cohere2's of 4.48 or later.

    Raises FileNotFoundError where there is none, and ValueError for one that is damaged or asks for
    what is not implemented.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} not found: give a checkpoint's folder; `python train.py` makes one"
        )
    raw = read_json(file)
    if raw.get("model_type") == OURS:
        return {key: value for key, value in raw.items() if key != "model_type"}
    try:
        return _from_cohere2(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _from_cohere2(raw: dict) -> dict:
    if raw.get("model_type") != "cohere2":
        raise ValueError(
            f"model_type {raw.get('model_type')!r} is not implemented: it reads 'cohere2' and "
            f"{OURS!r}"
        )
    _only_implemented(raw, IMPLEMENTED)
    if raw.get("quantization_config") is not None:
        raise ValueError(
            f"quantization_config {raw['quantization_config']!r} is not implemented: give bf16 or "
            "float32 weights"
        )
    config = {ours: _typed(raw, *theirs) for ours, theirs in KEYS.items()}
    n = config["n_layer"]
    config["n_kv_head"] = config["n_kv_head"] or config["n_head"]
    if (config["head_dim"] or 0) * config["n_head"] == config["d_model"]:
        config["head_dim"] = None  # it is d_model / n_head

    def local_first(
        key: str, default: int | None = None
    ) -> list[str]:  # one full layer at the end of every `period`
        period = _typed(raw, key, int, default)
        if period < 1:
            raise ValueError(f"{key} {period} is below 1")
        return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n)]

    types = raw.get("layer_types") or local_first("sliding_window_pattern", 4)
    if (
        not isinstance(types, list)
        or len(types) != n
        or not set(types) <= {"sliding_attention", "full_attention"}
    ):
        raise ValueError(
            f"layer_types {types!r} does not name sliding_attention or full_attention for each of "
            f"{n} layers"
        )
    if raw.get("layer_switch") is not None and local_first("layer_switch") != types:
        raise ValueError(
            f"layer_switch {raw['layer_switch']!r} contradicts layer_types (or "
            "sliding_window_pattern): correct one"
        )
    window = raw.get("sliding_window", 4096)
    if window is None and "sliding_attention" in types:
        raise ValueError(
            "sliding_window None contradicts layer_types, which has sliding_attention: give the "
            "window"
        )
    config["window"] = (
        None if window is None or _typed(raw, "sliding_window", int, 4096) >= ENDLESS else window
    )
    rotated = "R" if config["window"] is None else "r"
    letters = "".join(rotated if kind == "sliding_attention" else "N" for kind in types)
    periods = (letters[:p] for p in range(1, n) if letters[:p] * (n // p) == letters)
    config["pattern"] = next(periods, letters)
    return config | _from_rope(raw)


def _from_rope(raw: dict) -> dict:
    """rope_theta, rope_scaling, rope_factor and rope_original_length from 5.x's rope_parameters or
    4.x's two keys."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # in transformers' own order
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"rope_parameters {rope!r} is not implemented: give one set of values for all layers"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES.values():
        raise ValueError(
            f"rope_type {kind!r} is not implemented: it reads {', '.join(ROPE_TYPES.values())}"
        )
    _only_implemented(rope, {"partial_rotary_factor": 1})
    theta = _typed(rope, "rope_theta", float, _typed(raw, "rope_theta", float, 10_000.0))
    found = {
        "rope_theta": theta,
        "rope_scaling": next(ours for ours, theirs in ROPE_TYPES.items() if theirs == kind),
    }
    if kind != "default":
        found["rope_factor"] = _typed(rope, "factor", float, None)
        if found["rope_factor"] is None:
            raise ValueError(f"rope_type {kind!r} needs a factor")
    if kind == "yarn":
        _only_implemented(rope, YARN)
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            if rope.get(key) is not None:
                raise ValueError(
                    f"{key} {rope[key]!r} is not implemented: YaRN's own 0.1 ln(factor) + 1 is"
                )
        longest = _typed(raw, "max_position_embeddings", int, 8192)
        original = _typed(rope, "original_max_position_embeddings", int, longest)
        found["rope_original_length"] = _typed(
            raw, "original_max_position_embeddings", int, original
        )
    return found


def _only_implemented(raw: dict, implemented: dict) -> None:
    for key, value in implemented.items():
        given = raw.get(key)
        if given is not None and (
            given != value or isinstance(given, bool) != isinstance(value, bool)
        ):
            raise ValueError(f"{key} {given!r} is not implemented: only {value!r} is")


def _typed(raw: dict, key: str, kind: type, default):
    """raw[key] as `kind`; `default` where it is absent, or null and the default is None."""
    value = raw.get(key, default)
    return None if value is None and default is None else typed(kind, value, key)


# ------------------------------------------------------------------------------------------------
# Values from outside


def typed(kind, value, name: str):
    """`value`, which came from a file or a flag, as the annotation `kind` (bool, int, float or str,
    or one of them and None) says. ValueError, with the name and the value, for another type, a
    number that is not finite, or one that no 64 bits hold."""
    kinds = typing.get_args(kind) or (kind,)
    if value is None and types.NoneType in kinds:
        return None
    wanted = next(k for k in kinds if k is not types.NoneType)
    if type(value) is not wanted and (wanted, type(value)) != (float, int):
        found = type(value).__name__
        raise ValueError(f"{name} {value!r} is not a {wanted.__name__} but a {found}")
    if wanted in (int, float) and not -(2**63) < value < 2**63:
        raise ValueError(f"{name} {str(value)[:20]} is not a number that can be used")
    return wanted(value)


def typed_fields(cls, table: dict, where: str) -> dict:
    """The fields of the dataclass `cls` that a table gives, typed. ValueError for an unknown key,
    with the nearest one, or a missing one."""
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in table:
        if key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            mend = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise ValueError(f"{where}unknown key {key!r}; {mend}")
    for name, f in known.items():
        given = (name in table, f.default, f.default_factory)
        if given == (False, dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"{where}{name} is missing")
    values = {}
    for key, value in table.items():
        kind = known[key].type
        tabular = typing.get_origin(kind) in (dict, tuple)  # their owner reads them
        values[key] = value if tabular else typed(kind, value, f"{where}{key}")
    return values


def read_config(path: str | Path, cls):
    """A `cls` (ModelConfig) from the config.json in folder `path`, of either kind. OSError and
    ValueError as `load_config`, and where the values make no model."""
    fields = load_config(path)
    try:
        return cls(**typed_fields(cls, fields, ""))
    except ValueError as error:
        raise ValueError(f"{Path(path) / 'config.json'} makes no model: {error}") from error


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


# ------------------------------------------------------------------------------------------------
# Weights


def save(path: str | Path, config: dict, state_dict: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors and config.json into folder `path` (made if absent). config:
    ModelConfig's fields."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name if name.startswith("lm_head.") else f"model.{name}": t.detach().contiguous()
        for name, t in state_dict.items()
    }
    dtype = str(state_dict["embed_tokens.weight"].dtype).removeprefix("torch.")
    content = to_json(config, dtype)
    _replace(
        folder / "model.safetensors",
        lambda file: save_file(tensors, file, metadata={"format": "pt"}),
    )
    _replace(
        folder / "config.json",
        lambda file: file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"),
    )


@torch.no_grad()
def load_weights(
    path: str | Path, model: torch.nn.Module, device: str | torch.device, dtype: torch.dtype
) -> None:
    """Give `model`, built on the meta device, the tensors in folder `path`: shard by shard, each
    straight to `device` and `dtype`.

    Raises FileNotFoundError for a missing file, and ValueError for a damaged one or tensors that
    are not the model's.
    """
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = "lm_head.weight" not in wanted
    # tied, a copy of the embeddings may lie beside them
    shapes = dict(wanted, **{"lm_head.weight": wanted["embed_tokens.weight"]})
    shards, found, wrong = _shards(Path(path)), set(), []
    for (
        shard
    ) in shards:  # the headers alone, so that a wrong file is refused before anything is read
        with _open(shard) as tensors:
            for key in tensors.keys():
                name, tensor = key.removeprefix("model."), tensors.get_slice(key)
                shape, kind = tensor.get_shape(), tensor.get_dtype()
                if name not in shapes or name in found:
                    wrong.append(
                        f"{key} is {'twice there' if name in found else 'not in this model'}"
                    )
                elif shape != shapes[name] or kind not in ("BF16", "F16", "F32", "F64"):
                    wrong.append(f"{key} is {kind} {shape}, not floating-point {shapes[name]}")
                found.add(name)
    wrong += [f"{name} is missing" for name in wanted if name not in found]
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(
            f"{path}: the weights do not fit config.json: {'; '.join(wrong[:20])}{more}"
        )
    state = {}
    for shard in shards:
        with _open(shard) as tensors:
            for (
                key
            ) in tensors.keys():  # a copy, because what safe_open returns is a view of the file
                state[key.removeprefix("model.")] = tensors.get_tensor(key).to(
                    device, dtype, copy=True
                )
    if tied and not torch.equal(
        state.pop("lm_head.weight", state["embed_tokens.weight"]), state["embed_tokens.weight"]
    ):
        raise ValueError(
            f"{path}: lm_head.weight differs from the embeddings it is tied to: set "
            "tie_word_embeddings to false"
        )
    model.load_state_dict(state, assign=True)


def _shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: model.safetensors, or those that
    model.safetensors.index.json names."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise FileNotFoundError(
            f"{single} not found, nor an index of shards: copy the weights there (pickled ones "
            "are not read)"
        )
    names = read_json(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise ValueError(
            f"{index} is damaged (weight_map is no map from tensors to files): copy it again from "
            "where it came"
        )
    shards = [folder / name for name in sorted(set(names.values()))]
    for shard in shards:
        if shard.parent != folder or shard.suffix != ".safetensors":
            raise ValueError(
                f"{index} names {str(shard)!r}: a shard is a .safetensors file in the same folder"
            )
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} not found: {index.name} names it, so copy it there")
    return shards


@contextmanager
def _open(file: Path) -> Iterator:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(
            f"{file} is damaged ({error}): copy it again from where it came"
        ) from error


# ------------------------------------------------------------------------------------------------
# Files that are whole or absent, whenever the process is killed


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    partial = file.with_name(file.name + ".partial")
    try:
        write(partial)
        sync(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk. Windows opens no folder, and syncs a file
    only through a handle that may write."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
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
    partial = path.with_name(path.name + ".partial")
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
    step; a copy of the folder where the disk or the system has no links."""
    link, target = Path(link), Path(target)
    partial = link.with_name(link.name + ".partial")
    _remove(partial)
    try:
        partial.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)
    except OSError:
        shutil.copytree(target, partial)
        _remove(link)  # a folder cannot be replaced by another one
    os.replace(partial, link)
    sync(link.parent)


def pointed(folder: Path) -> set[str]:
    """Names of the folders in `folder` that its links `last` and `best` point to."""
    links = [folder / name for name in ("last", "best")]
    targets = {Path(os.readlink(link)).name for link in links if link.is_symlink()}
    return {name for name in targets if (folder / name).is_dir()}


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


CHECKSUMS = "checksums.json"  # of a folder's other files


def write_checksums(folder: Path) -> None:
    """Write the sha256 of every file of the folder beside them."""
    text = json.dumps(_checksums(folder), indent=1) + "\n"
    _replace(folder / CHECKSUMS, lambda file: file.write_text(text, encoding="utf-8"))


def verify_checksums(folder: Path) -> None:
    """ValueError where a file is not what its checksum says. Without checksums (of an earlier
    version, or Hugging Face's) there is nothing to compare."""
    if (folder / CHECKSUMS).is_file():
        found = _checksums(folder)
        for name, digest in read_json(folder / CHECKSUMS).items():
            if name not in found:
                raise FileNotFoundError(f"{folder / name} not found: copy it from where it came")
            if found[name] != digest:
                raise ValueError(f"{folder / name} is damaged: its checksum is another")


def _checksums(folder: Path) -> dict[str, str]:
    digests = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.name != CHECKSUMS:
            with open(file, "rb") as stream:
                digests[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digests

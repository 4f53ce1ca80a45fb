"""A prepared corpus: a folder with train.bin and val.bin (token ids), meta.json and the tokenizer's
files. Made by data/prepare.py."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer, load_tokenizer

DEFAULT_CORPUS = Path("corpora/stdlib")
FORMAT = 2  # rises when another rule chooses or cuts the text
KEYS = {  # of meta.json
    "format": int,
    "source": str,
    "dtype": str,
    "n_vocab": int,
    "tokenizer": str,
    "python": str,
    "train": dict,
    "val": dict,
}
SPLIT_KEYS = {"documents": int, "bytes": int, "tokens": int, "sha256": str}


@dataclass
class Corpus:
    """Token ids of documents, each preceded by end of text, memory-mapped; `bytes` in meta counts
    their UTF-8 without it."""

    folder: Path
    tokenizer: Tokenizer
    train: np.memmap  # (tokens,) uint16 or uint32
    val: np.memmap
    meta: dict

    @property
    def hash(self) -> str:
        """Twelve hex digits that stand for the content: both splits and the tokenizer."""
        parts = [self.meta["train"]["sha256"], self.meta["val"]["sha256"], self.meta["tokenizer"]]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:12]


def dtype_for(n_vocab: int) -> str:
    """The narrowest type of a token id."""
    return "uint16" if n_vocab <= 1 << 16 else "uint32"


def load_corpus(folder: Path | str = DEFAULT_CORPUS) -> Corpus:
    """The corpus in folder, every byte checked. Raises FileNotFoundError when something is missing,
    ValueError when two things disagree; each names the file, both values and the mend."""
    folder = Path(folder)
    command = "python -m data.prepare" + ("" if folder == DEFAULT_CORPUS else f" --out {folder}")
    mend = f"remove {folder} and run `{command}` again with the same sources"
    for name in ("meta.json", "train.bin", "val.bin"):
        if not (folder / name).is_file():
            missing = folder / name if folder.exists() else folder
            raise FileNotFoundError(
                f"{missing} not found; `{command}` makes a corpus (--help lists its sources)"
            )

    def require(file: str, what: str, found, wanted) -> None:
        if found != wanted:
            raise ValueError(f"{folder / file}: {what} is {found}, not {wanted}; {mend}")

    meta = read_meta(folder / "meta.json", mend, require)
    tokenizer = load_tokenizer(folder)
    require("meta.json", "n_vocab", meta["n_vocab"], tokenizer.n_vocab)
    require("meta.json", "tokenizer hash", meta["tokenizer"], tokenizer.hash)
    require("meta.json", "dtype", meta["dtype"], dtype_for(tokenizer.n_vocab))

    def split(name: str) -> np.memmap:
        """(tokens,) ids of one split, its size, sha256 and largest id checked."""
        path, said = folder / f"{name}.bin", meta[name]
        size = max(1, said["tokens"]) * np.dtype(meta["dtype"]).itemsize
        require(path.name, "its size in bytes", path.stat().st_size, size)
        with open(path, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        require(path.name, "sha256", digest, said["sha256"])
        ids = np.memmap(path, dtype=meta["dtype"], mode="r")
        largest = int(ids.max())
        if largest >= tokenizer.n_vocab:
            raise ValueError(
                f"{path}: token id {largest} is outside the vocabulary of {tokenizer.n_vocab}; "
                f"{mend}"
            )
        return ids

    return Corpus(folder, tokenizer, split("train"), split("val"), meta)


def read_meta(path: Path, mend: str, require: Callable) -> dict:
    """meta.json with every key there and of its type."""
    try:
        meta = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not JSON ({error}); {mend}") from error
    require(path.name, "its content", type(meta).__name__, "dict")

    def check(part: dict, keys: dict[str, type]) -> None:
        for key, kind in keys.items():
            found = type(part.get(key)).__name__
            require(path.name, f"the type of {key!r}", found, kind.__name__)

    check(meta, KEYS)
    check(meta["train"], SPLIT_KEYS)
    check(meta["val"], SPLIT_KEYS)
    require(path.name, "the format of its rule", meta["format"], FORMAT)
    return meta

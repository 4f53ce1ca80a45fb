"""A prepared corpus: a folder with train.bin and val.bin (token ids), meta.json and the tokenizer's
files. Made by data/prepare.py."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.tokenizer import Tokenizer, load_tokenizer

DEFAULT_CORPUS = Path("corpora/stdlib")
FORMAT = 1
KEYS = {
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
    return "uint16" if n_vocab <= 1 << 16 else "uint32"


def load_corpus(folder: Path | str = DEFAULT_CORPUS) -> Corpus:
    """The corpus in folder, every byte checked. Raises FileNotFoundError when something is missing,
    ValueError when two things disagree; each names the file, both values and the mend."""
    folder = Path(folder)
    command = "python -m data.prepare" + ("" if folder == DEFAULT_CORPUS else f" --out {folder}")
    mend = f"remove {folder} and run `{command}` again with the same sources"
    for name in ("meta.json", "train.bin", "val.bin"):
        if not (folder / name).is_file():
            missing = folder if name == "meta.json" and not folder.exists() else folder / name
            raise FileNotFoundError(
                f"{missing} not found; `{command}` makes a corpus (--help lists its sources)"
            )

    def require(file: str, what: str, found, wanted) -> None:
        if found != wanted:
            raise ValueError(f"{folder / file}: {what} is {found}, not {wanted}; {mend}")

    try:
        meta = json.loads((folder / "meta.json").read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'meta.json'} is not JSON ({error}); {mend}") from error
    require("meta.json", "its content", type(meta).__name__, "dict")
    for where, keys in [
        (meta, KEYS),
        (meta.get("train"), SPLIT_KEYS),
        (meta.get("val"), SPLIT_KEYS),
    ]:
        for key, kind in keys.items():
            require(
                "meta.json", f"the type of {key!r}", type(where.get(key)).__name__, kind.__name__
            )
    require("meta.json", "format", meta["format"], FORMAT)
    tokenizer = load_tokenizer(folder)
    require("meta.json", "n_vocab", meta["n_vocab"], tokenizer.n_vocab)
    require("meta.json", "tokenizer hash", meta["tokenizer"], tokenizer.hash)
    require("meta.json", "dtype", meta["dtype"], dtype_for(tokenizer.n_vocab))

    def split(name: str) -> np.memmap:
        """(tokens,) ids of one split, its size, sha256 and largest id checked."""
        file, said = f"{name}.bin", meta[name]
        require(
            file,
            "its size in bytes",
            (folder / file).stat().st_size,
            max(1, said["tokens"]) * np.dtype(meta["dtype"]).itemsize,
        )
        with open(folder / file, "rb") as stream:
            require(
                file, "sha256", hashlib.file_digest(stream, "sha256").hexdigest(), said["sha256"]
            )
        ids = np.memmap(folder / file, dtype=meta["dtype"], mode="r")
        if (largest := int(ids.max())) >= tokenizer.n_vocab:
            raise ValueError(
                f"{folder / file}: token id {largest} is outside the vocabulary of "
                f"{tokenizer.n_vocab}; {mend}"
            )
        return ids

    return Corpus(folder, tokenizer, split("train"), split("val"), meta)

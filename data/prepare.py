"""Text -> a corpus folder (train.bin, val.bin, meta.json, the tokenizer).

    python -m data.prepare                                    the Python standard library, already
    on this machine python -m data.prepare --text book.txt notes/             your own files and
    folders of UTF-8 text python -m data.prepare --url URL --sha256 HEX             a text file from
    the network python -m data.prepare --packages numpy torch --out corpora/numeric --vocab-size
    4096

Sources combine. A tenth of the bytes, chosen by a hash of each document's name, is validation; BPE
is trained on the rest."""

import hashlib
import http.client
import importlib.util
import json
import os
import platform
import shutil
import sysconfig
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from tqdm import tqdm

from commandline import CommandLine, fail
from data.corpus import DEFAULT_CORPUS, FORMAT, Corpus, dtype_for, load_corpus
from data.tokenizer import Tokenizer, gpt2_tokenizer, pieces, train_tokenizer

# (name, text); a name is relative to its root, so that splits do not depend on the machine
Documents = list[tuple[str, str]]
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
LONGEST_RUN = 500_000
# progress bars: only on a terminal, and only for what takes long
QUIET = {
    "delay": 1,
    "leave": False,
    "disable": None,
}


# ---- sources
# ------------------------------------------------------------------------------------------------


def walk(root: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """(name relative to root, path) of the files below root whose own and whose folders' names are
    kept, sorted; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(filter(keep, folders))
        for file in sorted(filter(keep, files)):
            path = Path(folder, file)
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def read_text(path: Path) -> str | None:
    """The file's text, line ends as they are; None when it is not UTF-8 text."""
    content = path.read_bytes()
    try:
        return None if b"\0" in content else content.decode("utf-8")
    except UnicodeDecodeError:
        return None


def python_sources(root: Path) -> Documents:
    """Python files below root, without tests and without `_sysconfigdata`, which the build writes
    and fills with its paths."""
    files = [
        (name, path)
        for name, path in walk(
            root, lambda name: name not in LEFT_OUT and not name.startswith("_sysconfigdata")
        )
        if name.endswith(".py")
    ]
    return [(name, text) for name, path in files if (text := read_text(path)) is not None]


def from_text(path: Path) -> Documents:
    """A file, or every text file below a folder but the hidden ones."""
    if path.is_dir():
        documents = [
            (name, text)
            for name, file in walk(path, lambda name: not name.startswith("."))
            if (text := read_text(file)) is not None
        ]
        if not documents:
            raise ValueError(f"{path} holds no UTF-8 text file; give --text a folder that does")
        return documents
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; give --text a file or folder that exists")
    text = read_text(path)
    if text is None:
        raise ValueError(f"{path} is not UTF-8 text; convert it (iconv -t utf-8) or leave it out")
    return [(path.name, text)]


def from_package(name: str) -> Documents:
    """The Python sources of an installed package, found without importing it."""
    if not name.isidentifier():
        raise ValueError(
            f"--packages {name!r} is not a package's import name; give a top-level name such as "
            "numpy"
        )
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise ValueError(
            f"package {name} is not installed here; install it, or check its import name"
        )
    documents = [
        (f"{name}/{file}", text)
        for root in spec.submodule_search_locations or []
        for file, text in python_sources(Path(root))
    ]
    if (
        not documents
        and (spec.origin or "").endswith(".py")
        and (text := read_text(Path(spec.origin))) is not None
    ):
        documents = [(f"{name}.py", text)]
    if not documents:
        raise ValueError(
            f"package {name} has no Python source files (built in, a namespace, or compiled); "
            "leave it out"
        )
    return documents


def from_url(url: str, sha256: str | None = None, timeout: float = 30.0) -> Documents:
    """Download one text file into memory and check it before use. Raises OSError when it cannot be
    had whole, ValueError when it is not what was asked for."""
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(
            f"--url {url} is not an http:// or https:// address; for a local file use --text"
        )
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm(
                total=length or None, unit="B", unit_scale=True, desc="download", **QUIET
            ) as bar:
                while chunk := response.read(1 << 20):
                    content += chunk
                    bar.update(len(chunk))
        if len(content) < length:
            raise OSError(f"the connection ended after {len(content):,} of {length:,} bytes")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot download {url} ({error or type(error).__name__}); check the address and the "
            "network, "
            "or fetch it elsewhere and use --text"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256.lower():
        raise ValueError(
            f"{url} has sha256 {found}, not {sha256}; nothing was kept, check the address and the "
            "checksum"
        )
    try:
        return [(url, content.decode("utf-8"))]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{url} is not UTF-8 text (byte {error.start}); give the address of a plain text file"
        ) from error


# ---- a corpus from documents -------------------------------------------------------------------


def split_documents(documents: Documents) -> tuple[list[str], list[str]]:
    """(training texts, validation texts), both in the order of the sha256 of the documents' names.

    Validation takes whole documents until it holds a tenth of the bytes, passing over any that is
    larger than that alone. Where whole documents cannot do it (fewer than ten, or one that
    outweighs the rest) it takes the last tenth of each."""
    ordered = sorted(
        documents, key=lambda document: hashlib.sha256(os.fsencode(document[0])).digest()
    )
    texts = [text for _, text in ordered if text]
    sizes = [len(text.encode()) for text in texts]
    tenth, held, chosen = sum(sizes) / 10, 0, set()
    for i, size in enumerate(sizes):
        if held < tenth and size <= tenth:
            chosen.add(i)
            held += size
    if len(texts) >= 10 and held >= tenth:
        return [text for i, text in enumerate(texts) if i not in chosen], [
            texts[i] for i in sorted(chosen)
        ]
    cuts = [
        text.rfind("\n", len(text) * 8 // 10, len(text) * 9 // 10) + 1 or len(text) * 9 // 10
        for text in texts
    ]
    return (
        [text[:cut] for text, cut in zip(texts, cuts) if cut],
        [text[cut:] for text, cut in zip(texts, cuts)],
    )


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """(piece of text, its ids) over all texts, each text preceded by end of text; memory stays
    bounded whatever a text's size."""
    batch: list[tuple[bool, str]] = []  # (does it begin a document, piece)

    def encoded() -> Iterator[tuple[str, list[int]]]:
        for (begins, piece), ids in zip(
            batch, tokenizer.encode_batch([piece for _, piece in batch])
        ):
            yield piece, [tokenizer.eot_token] * begins + ids
        batch.clear()

    held = 0
    for text in texts:
        for i, piece in enumerate(pieces(text)):
            batch.append((i == 0, piece))
            held += len(piece)
            if held > 1 << 23:
                yield from encoded()
                held = 0
    yield from encoded()


def write_split(file: Path, tokenizer: Tokenizer, texts: list[str]) -> dict:
    """Write a .bin and return its entry in meta.json."""
    tokens, digest, size = 0, hashlib.sha256(), sum(len(text.encode()) for text in texts)
    with (
        open(file, "wb") as stream,
        tqdm(total=size, desc=f"encode {file.stem}", unit="B", unit_scale=True, **QUIET) as bar,
    ):
        for piece, ids in encode_documents(tokenizer, texts):
            content = np.array(ids, dtype=dtype_for(tokenizer.n_vocab)).tobytes()
            stream.write(content)
            digest.update(content)
            tokens += len(ids)
            bar.update(len(piece.encode()))
    return {"documents": len(texts), "bytes": size, "tokens": tokens, "sha256": digest.hexdigest()}


def check_out(out: Path) -> None:
    """Raises OSError unless out can be made: not there yet or an empty folder, somewhere
    writable."""
    if out.is_dir() and any(out.iterdir()):
        what = "already holds a corpus" if (out / "meta.json").exists() else "is not empty"
        raise FileExistsError(f"{out} {what}; remove it first, or give another folder with --out")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if (
        (out.exists() and not out.is_dir())
        or not above.is_dir()
        or not os.access(above, os.W_OK | os.X_OK)
    ):
        raise OSError(f"cannot make the folder {out}; give a writable place with --out")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def prepare(
    documents: Documents,
    out: Path | str,
    vocab_size: int = 2048,
    tokenizer: Tokenizer | None = None,
    source: str = "documents",
) -> dict:
    """Write a corpus to the folder out and return its meta; all or nothing. Without a tokenizer,
    BPE of vocab_size ids is trained on the training split. Raises ValueError for documents that
    cannot make a corpus, OSError when out cannot be written."""
    out = Path(out)
    check_out(out)
    train, val = split_documents(documents)
    if not train:
        raise ValueError(f"there is no text to train on in {source}; give files that hold some")
    for name, text in documents:  # the regex engines backtrack through spaces, and run out of stack
        if any(space * LONGEST_RUN in text for space in " \t"):
            raise ValueError(
                f"{name} has {LONGEST_RUN:,} spaces or tabs in a row, which no tokenizer takes; "
                "leave it out"
            )
    tokenizer = tokenizer or train_tokenizer(
        tqdm(train, desc="learn the vocabulary", unit="documents", **QUIET), vocab_size
    )
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        tokenizer.save(unfinished)
        meta = {
            "format": FORMAT,
            "source": source,
            "dtype": dtype_for(tokenizer.n_vocab),
            "n_vocab": tokenizer.n_vocab,
            "tokenizer": tokenizer.hash,
            "python": platform.python_version(),
            "train": write_split(unfinished / "train.bin", tokenizer, train),
            "val": write_split(unfinished / "val.bin", tokenizer, val),
        }
        (unfinished / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        for path in [*unfinished.iterdir(), unfinished]:
            sync(path)
        os.replace(unfinished, out)
        sync(out.parent)
    except OSError as error:
        raise OSError(
            f"cannot write {out} ({error.strerror or error}); make room, or give another folder "
            "with --out"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    size, tokens = (meta["train"][key] + meta["val"][key] for key in ("bytes", "tokens"))
    print(
        f"{out}: {sum(text != '' for _, text in documents):,} documents, {size:,} bytes, "
        f"{tokens:,} tokens, "
        f"{size / tokens:.2f} bytes per token; {meta['val']['bytes'] / size:.1%} of the bytes are "
        "validation"
    )
    return meta


def prepare_stdlib(
    out: Path | str = DEFAULT_CORPUS, vocab_size: int = 2048, tokenizer: Tokenizer | None = None
) -> dict:
    """The default corpus: the standard library of the Python that runs this."""
    documents = python_sources(Path(sysconfig.get_path("stdlib")))
    return prepare(
        documents,
        out,
        vocab_size,
        tokenizer,
        source=f"the standard library of Python {platform.python_version()}",
    )


def open_corpus(folder: Path | str = DEFAULT_CORPUS) -> Corpus:
    """The corpus in a folder; the default one is prepared now where it is not there."""
    if Path(folder) == DEFAULT_CORPUS and not DEFAULT_CORPUS.exists():
        prepare_stdlib(DEFAULT_CORPUS)
    return load_corpus(folder)


def main(argv: list[str] | None = None) -> None:
    """The command. Bad input is one line and status 2."""
    line = CommandLine(
        prog="python -m data.prepare",
        description="Make a corpus from text; by default from Python's standard library.",
    )
    line.add_argument(
        "--text",
        nargs="+",
        action="extend",
        default=[],
        type=Path,
        metavar="PATH",
        help="files and folders of UTF-8 text",
    )
    line.add_argument("--url", help="a text file to download")
    line.add_argument("--sha256", metavar="HEX", help="what --url must hash to")
    line.add_argument(
        "--packages",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="installed packages' Python sources",
    )
    line.add_argument(
        "--encoding",
        choices=["gpt2"],
        help="tiktoken's, in place of a vocabulary trained on the text",
    )
    line.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="ids to train, end of text included (default 2048)",
    )
    line.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help=f"default {DEFAULT_CORPUS}; with other sources, beside it, named after the first",
    )
    try:
        args = line.parse(argv)
        if args.sha256 is not None and args.url is None:
            raise ValueError("--sha256 checks a download; give --url too, or leave it out")
        if args.sha256 is not None and (
            len(args.sha256) != 64 or set(args.sha256.lower()) - set("0123456789abcdef")
        ):
            raise ValueError(
                f"--sha256 {args.sha256} is not 64 hex digits; `sha256sum FILE` prints them"
            )
        if args.encoding and args.vocab_size is not None:
            raise ValueError(
                f"--encoding {args.encoding} brings its own vocabulary; leave out --vocab-size "
                f"{args.vocab_size}"
            )
        args.vocab_size = 2048 if args.vocab_size is None else args.vocab_size
        sources = [*map(str, args.text), *([] if args.url is None else [args.url]), *args.packages]
        name = (
            Path(unquote(urlsplit(sources[0]).path)).resolve().stem
            if sources
            else DEFAULT_CORPUS.name
        )
        out = args.out or DEFAULT_CORPUS.with_name(name or "text")
        check_out(out)
        documents = [document for path in args.text for document in from_text(path)]
        documents += [document for package in args.packages for document in from_package(package)]
        tokenizer = gpt2_tokenizer() if args.encoding else None
        documents += [] if args.url is None else from_url(args.url, args.sha256)
        if sources:
            prepare(documents, out, args.vocab_size, tokenizer, source=", ".join(sources))
        else:
            prepare_stdlib(out, args.vocab_size, tokenizer)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()

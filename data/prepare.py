"""Text -> a corpus folder (train.bin, val.bin, meta.json, the tokenizer).

python -m data.prepare                           the standard library, already on this machine
python -m data.prepare --text book.txt notes/    your own files and folders of UTF-8 text
python -m data.prepare --url URL --sha256 HEX    a text file from the network
python -m data.prepare --packages numpy torch --out corpora/numeric --vocab-size 4096

Sources combine. A tenth of the bytes, chosen by a hash of each document's name, is validation; BPE
is trained on the rest. Of the standard library and of packages code is taken: no tests, no
`encodings` and `pydoc_data` (tables), and no file most of whose lines are literals alone.
"""

import hashlib
import http.client
import importlib.machinery
import importlib.util
import json
import os
import platform
import re
import shutil
import sysconfig
import urllib.request
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from tqdm import tqdm

from commandline import CommandLine, guarded, locked, printable, read_input
from data.corpus import DEFAULT_CORPUS, FORMAT, Corpus, dtype_for, load_corpus
from data.tokenizer import (
    Tokenizer,
    check_runs,
    gpt2_tokenizer,
    pieces,
    train_tokenizer,
    write_json,
)

# (name, text); a name is relative to its root, so that splits do not depend on the machine
Documents = list[tuple[str, str]]
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT |= {"encodings", "pydoc_data"}  # tables of characters, one text of help topics
RULE = "code: no tests, no encodings, no pydoc_data, no file most of whose lines are literals alone"
# A line of nothing but numbers, strings and the marks around them: a row of a table.
MARKS = r"[ \t\[\](){},:+-]*+"
LITERAL = r"""(?:\d[\w.]*|[bru]*'(?:[^'\\\n]|\\.)*'|[bru]*"(?:[^"\\\n]|\\.)*")"""
LITERALS = re.compile(rf"^{MARKS}(?:{LITERAL}{MARKS})++(?:\#.*)?$", re.MULTILINE | re.IGNORECASE)
LARGEST = 2**32  # bytes of one text
BATCH = 2**23  # characters that are encoded at once
# progress bars: only on a terminal, and only for what takes long
QUIET = {"delay": 1, "leave": False, "disable": None}


# sources ----------------------------------------------------------------------------------------


def walk(root: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """(name relative to root, path) of the files below root whose own and whose folders' names are
    kept, sorted; links to folders are not followed. Folders that cannot be read are named aloud."""
    aloud = lambda error: print(printable(f"left out {error.filename}: {error.strerror}"))
    for folder, folders, files in os.walk(root, onerror=aloud):
        folders[:] = sorted(filter(keep, folders))
        for file in sorted(filter(keep, files)):
            path = Path(folder, file)
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def decoded(content: bytes, name: Path | str, mend: str) -> str:
    """The text that some bytes are, line ends as they are, without a byte order mark. ValueError
    where they are no UTF-8 text."""
    if b"\0" in content:
        raise ValueError(f"{name} holds NUL bytes, so it is no text, or UTF-16: {mend}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text (byte {error.start}): {mend}") from None


def read_text(path: Path) -> str:
    """The text of a file. ValueError where it is no UTF-8 text, or no file that has an end."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; give --text files and folders")
    return decoded(read_input(path, LARGEST), path, "convert it (iconv -t utf-8) or leave it out")


def read_all(
    files: Iterable[tuple[str, Path]], where: Path | str, inside: Path | None = None
) -> Documents:
    """The documents of named files. Those that are no text, and links that lead out of the folder
    `inside`, are left out, and counted aloud where there are others."""
    documents, left_out = [], []
    for name, path in files:
        try:
            if inside and not path.resolve().is_relative_to(inside.resolve()):
                raise ValueError(f"{path} is a link that leads out: copy what it leads to")
            documents.append((name, read_text(path)))
        except ValueError as error:
            left_out.append(str(error))
    if documents and left_out:
        count = len(documents) + len(left_out)
        some = f"left out {len(left_out)} of {count} files, such as {left_out[0]}"
        print(printable(f"{where}: {some}"))
    return documents


def python_sources(root: Path) -> Documents:
    """The code (RULE) in the Python files below root, without `_sysconfigdata`, which the build
    writes and fills with its paths."""
    keep = lambda name: name not in LEFT_OUT and not name.startswith("_sysconfigdata")
    files = [file for file in walk(root, keep) if file[0].endswith(".py")]
    return [(name, text) for name, text in read_all(files, root) if not is_table(text)]


def is_table(text: str) -> bool:
    """Are most of a file's lines literals alone?"""
    lines = sum(bool(line.strip()) for line in text.splitlines())
    return 2 * len(LITERALS.findall(text)) > lines


def from_text(path: Path) -> Documents:
    """A file, or every text file below a folder but the hidden ones."""
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; give --text a file or folder that exists")
    if not path.is_dir():
        return [(path.name, read_text(path))]
    documents = read_all(walk(path, lambda name: not name.startswith(".")), path, inside=path)
    if not documents:
        none = f"{path} holds no UTF-8 text file (links that lead out are none)"
        raise ValueError(f"{none}; give --text a folder that does")
    return documents


def from_package(name: str) -> Documents:
    """The Python sources of an installed package, found without importing it."""
    if not name.isidentifier():
        raise ValueError(
            f"--packages {name!r} is not a package's import name; give a top-level name such as "
            "numpy"
        )
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin == "frozen":  # into the interpreter, as `os` is
            spec = importlib.machinery.PathFinder.find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise ValueError(
            f"package {name} is not installed here; install it, or check its import name"
        )
    documents = []
    for root in spec.submodule_search_locations or []:
        documents += [(f"{name}/{file}", text) for file, text in python_sources(Path(root))]
    if not documents and (spec.origin or "").endswith(".py"):
        documents = read_all([(f"{name}.py", Path(spec.origin))], name)
    if not documents:
        raise ValueError(
            f"package {name} has no Python source files (built in, a namespace, or compiled); "
            "leave it out"
        )
    return documents


def from_url(url: str, sha256: str | None = None, timeout: float = 30.0) -> Documents:
    """Download one text file into memory and check it before use. Raises OSError when it cannot be
    had whole, ValueError when it is not what was asked for."""
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(
            f"--url {url} is not an http:// or https:// address; for a local file use --text"
        )
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            content = download(response)
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(
            f"cannot download {url} ({error or type(error).__name__}); check the address and the "
            "network, or fetch it elsewhere and use --text"
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 and found != sha256.lower():
        raise ValueError(
            f"{url} has sha256 {found}, not {sha256}; nothing was kept, check the address and the "
            "checksum"
        )
    return [(url, decoded(content, url, "give the address of a plain text file"))]


def download(response: http.client.HTTPResponse) -> bytearray:
    """What a server sends. OSError where that is less than it announced, or more than LARGEST."""
    content = bytearray()
    length = int(response.headers.get("Content-Length") or 0)
    with tqdm(total=length or None, unit="B", unit_scale=True, desc="download", **QUIET) as bar:
        while max(length, len(content)) <= LARGEST and (chunk := response.read(1 << 20)):
            content += chunk
            bar.update(len(chunk))
    if max(length, len(content)) > LARGEST:
        raise OSError(f"it is larger than the {LARGEST:,} bytes that are taken")
    if len(content) < length:
        raise OSError(f"the connection ended after {len(content):,} of {length:,} bytes")
    return content


# a corpus from documents ------------------------------------------------------------------------


def split_documents(documents: Documents) -> tuple[list[str], list[str]]:
    """(training texts, validation texts), both in the order of the sha256 of the documents' names.

    Validation takes whole documents until it holds a tenth of the bytes, passing over any that is
    larger than that alone. Where whole documents cannot do it (fewer than ten, or one that
    outweighs the rest) it takes the last tenth of each."""
    by_hash = lambda document: hashlib.sha256(os.fsencode(document[0])).digest()
    texts = [text for _, text in sorted(documents, key=by_hash) if text]
    sizes = [len(text.encode()) for text in texts]
    tenth, held, chosen = sum(sizes) / 10, 0, set()
    for i, size in enumerate(sizes):
        if held < tenth and size <= tenth:
            chosen.add(i)
            held += size
    if len(texts) >= 10 and held >= tenth:
        train = [text for i, text in enumerate(texts) if i not in chosen]
        return train, [texts[i] for i in sorted(chosen)]

    train, val = [], []
    for text in texts:
        end = len(text) * 9 // 10
        line = text.rfind("\n", len(text) * 8 // 10, end) + 1  # begins there; 0 where none does
        train.append(text[: line or end])
        val.append(text[line or end :])
    return [text for text in train if text], val


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[str, list[int]]]:
    """(piece of text, its ids) over all texts, each text preceded by end of text; memory stays
    bounded whatever a text's size."""

    def encoded() -> Iterator[tuple[str, list[int]]]:
        many = tokenizer.encode_batch([piece for _, piece in batch])
        for (begins, piece), ids in zip(batch, many):
            yield piece, [tokenizer.eot_token] * begins + ids

    batch: list[tuple[bool, str]] = []  # (does it begin a document, piece)
    held = 0
    for text in texts:
        for i, piece in enumerate(pieces(text)):
            batch.append((i == 0, piece))
            held += len(piece)
            if held > BATCH:
                yield from encoded()
                batch, held = [], 0
    yield from encoded()


def write_split(file: Path, tokenizer: Tokenizer, texts: list[str]) -> dict:
    """Write a .bin and return its entry in meta.json."""
    tokens, digest, size = 0, hashlib.sha256(), sum(len(text.encode()) for text in texts)
    bar = tqdm(total=size, desc=f"encode {file.stem}", unit="B", unit_scale=True, **QUIET)
    with open(file, "wb") as stream, bar:
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
    writable = above.is_dir() and os.access(above, os.W_OK | os.X_OK)
    if not (writable and out.name) or (out.exists() and not out.is_dir()):
        raise OSError(f"cannot make the folder {out}; give a writable place with --out")


@contextmanager
def unfinished(out: Path, wait: float = -1) -> Iterator[Path]:
    """A hidden folder beside `out` to make a corpus in, for one process at a time: others wait, or
    after `wait` seconds get a ValueError. It is gone at the end, with every folder that was made
    for it, unless it was renamed; what a killed process left in it goes at the beginning."""
    folder, lock = out.with_name(f".{out.name}.unfinished"), None
    while lock is None:
        made = [above for above in out.absolute().parents if not above.exists()]
        folder.mkdir(parents=True, exist_ok=True)  # where nothing can be made, this says so
        with suppress(FileNotFoundError):  # a preparation failed, and its folders have gone
            lock = locked(out, f"{out} is being prepared", wait)
    with lock as held:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # Windows removes no open file, and nobody a folder in use
                os.remove(held.lock_file)
                for above in made:
                    above.rmdir()


def write_corpus(
    folder: Path, tokenizer: Tokenizer, source: str, train: list[str], val: list[str]
) -> dict:
    """Write a corpus's files into an empty folder and return its meta."""
    tokenizer.save(folder)
    meta = {
        "format": FORMAT,
        "source": source,
        "dtype": dtype_for(tokenizer.n_vocab),
        "n_vocab": tokenizer.n_vocab,
        "tokenizer": tokenizer.hash,
        "python": platform.python_version(),
        "train": write_split(folder / "train.bin", tokenizer, train),
        "val": write_split(folder / "val.bin", tokenizer, val),
    }
    write_json(folder / "meta.json", meta)
    return meta


def remove_unfinished(parent: Path) -> None:
    """Remove what killed preparations left in this folder; those that go on are let be."""
    for lock in parent.glob(".*.lock"):
        other = lock.with_name(lock.name[1:].removesuffix(".lock"))
        with suppress(ValueError, OSError):  # a name too long, or one who goes on
            if other.with_name(f".{other.name}.unfinished").is_dir():
                with unfinished(other, wait=0):
                    pass  # whoever can enter can remove it


def prepare(
    documents: Documents,
    out: Path | str,
    vocab_size: int = 2048,
    tokenizer: Tokenizer | None = None,
    source: str = "documents",
) -> dict:
    """Write a corpus to the folder out and return its meta; all or nothing. Without a tokenizer,
    BPE of vocab_size ids is trained on the training split. While another process prepares the same
    folder this one waits, and then takes what was made there if it is the same corpus. Raises
    ValueError for documents that cannot make a corpus, OSError when out cannot be written."""
    out = Path(out)
    check_out(out)
    place = Path(os.path.realpath(out))  # of a link, what it leads to
    train, val = split_documents(documents)
    if not train:
        raise ValueError(f"there is no text to train on in {source}; give files that hold some")
    for name, text in documents:
        check_runs(text, name)
    remove_unfinished(place.parent)
    try:
        with unfinished(place) as folder:
            if tokenizer is None:
                texts = tqdm(train, desc="learn the vocabulary", unit="documents", **QUIET)
                tokenizer = train_tokenizer(texts, vocab_size)
            meta = write_corpus(folder, tokenizer, source, train, val)
            first = not (out / "meta.json").exists()  # no other process was faster
            if first:
                from checkpoint import sync  # and torch: an import that --help need not wait for

                for path in [*folder.iterdir(), folder]:
                    sync(path)
                if place.is_dir():  # and empty; Windows replaces no folder
                    place.rmdir()
                os.replace(folder, place)
                sync(place.parent)
    except OSError as error:
        raise OSError(
            f"cannot write {out} ({error.strerror or error}); make room, or give another folder "
            "with --out"
        ) from error
    if first:
        report(out, meta, documents)
    elif json.loads((out / "meta.json").read_bytes()) != meta:
        check_out(out)  # refuses: there is another corpus
    return meta


def report(out: Path, meta: dict, documents: Documents) -> None:
    """Print what a new corpus holds."""
    count = sum(text != "" for _, text in documents)
    size, tokens = (meta["train"][key] + meta["val"][key] for key in ("bytes", "tokens"))
    print(
        f"{out}: {count:,} documents, {size:,} bytes, {tokens:,} tokens, "
        f"{size / tokens:.2f} bytes per token; {meta['val']['bytes'] / size:.1%} of the bytes are "
        "validation"
    )


def prepare_stdlib(
    out: Path | str = DEFAULT_CORPUS, vocab_size: int = 2048, tokenizer: Tokenizer | None = None
) -> dict:
    """The default corpus: the standard library of the Python that runs this."""
    documents = python_sources(Path(sysconfig.get_path("stdlib")))
    source = f"the standard library of Python {platform.python_version()} ({RULE})"
    return prepare(documents, out, vocab_size, tokenizer, source)


def open_corpus(folder: Path | str = DEFAULT_CORPUS) -> Corpus:
    """The corpus in a folder; the default one is prepared now where it is not there."""
    if Path(folder) == DEFAULT_CORPUS and not DEFAULT_CORPUS.exists():
        with suppress(FileExistsError):  # another process was faster: its corpus is read
            prepare_stdlib(DEFAULT_CORPUS)
    return load_corpus(folder)


# the command ------------------------------------------------------------------------------------


def command_line() -> CommandLine:
    """The flags."""
    parser = CommandLine(prog="python -m data.prepare", description=__doc__)
    add = parser.add_argument
    several = {"nargs": "+", "action": "extend", "default": []}
    place = f"default {DEFAULT_CORPUS}; with other sources, beside it, named after the first"
    add("--text", **several, type=Path, metavar="PATH", help="files and folders of UTF-8 text")
    add("--url", help="a text file to download")
    add("--sha256", metavar="HEX", help="what --url must hash to")
    add("--packages", **several, metavar="NAME", help="installed packages' code")
    add("--encoding", choices=["gpt2"], help="tiktoken's, in place of a vocabulary trained here")
    size = "ids, end of text included (default 2048); a GPU likes multiples of 128"
    add("--vocab-size", type=int, metavar="N", help=size)
    add("--out", type=Path, metavar="DIR", help=place)
    return parser


def check_flags(args: Namespace) -> None:
    """Raises ValueError for flags that contradict each other."""
    if args.sha256 is not None and args.url is None:
        raise ValueError("--sha256 checks a download; give --url too, or leave it out")
    seen = Counter(Path(os.path.realpath(path)) for path in args.text)
    for path in args.text:
        real = Path(os.path.realpath(path))
        if seen[real] > 1 or any(parent in seen for parent in real.parents):
            again = f"--text {path} is in another --text too"
            raise ValueError(f"{again}, so that a text might stand in both splits: name it once")
    if len(set(args.packages)) < len(args.packages):
        raise ValueError(f"--packages {' '.join(args.packages)}: name each once")
    digits = set((args.sha256 or "").lower())
    if args.sha256 is not None and (len(args.sha256) != 64 or digits - set("0123456789abcdef")):
        raise ValueError(
            f"--sha256 {args.sha256} is not 64 hex digits; `sha256sum FILE` prints them"
        )
    if args.encoding and args.vocab_size is not None:
        raise ValueError(
            f"--encoding {args.encoding} brings its own vocabulary; leave out --vocab-size "
            f"{args.vocab_size}"
        )


def named_after(source: str) -> Path:
    """The folder of a corpus from that path or address or package. ValueError where it has no name
    for one."""
    try:
        name = Path(os.path.realpath(unquote(urlsplit(source).path))).stem or "text"
    except ValueError as error:
        raise ValueError(f"{source} is no path or address ({error}): correct it") from None
    if name == DEFAULT_CORPUS.name:
        raise ValueError(f"{source} would take the place of {DEFAULT_CORPUS}: give another --out")
    return DEFAULT_CORPUS.with_name(name)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = command_line().parse(argv)
    check_flags(args)
    vocab_size = 2048 if args.vocab_size is None else args.vocab_size
    sources = [*map(str, args.text), *([] if args.url is None else [args.url]), *args.packages]
    out = args.out or (named_after(sources[0]) if sources else DEFAULT_CORPUS)
    check_out(out)  # before any work

    documents = [document for path in args.text for document in from_text(path)]
    documents += [document for package in args.packages for document in from_package(package)]
    tokenizer = gpt2_tokenizer() if args.encoding else None
    documents += [] if args.url is None else from_url(args.url, args.sha256)
    if sources:
        source = ", ".join(sources) + f" ({RULE})" * bool(args.packages)
        prepare(documents, out, vocab_size, tokenizer, source)
    else:
        prepare_stdlib(out, vocab_size, tokenizer)


if __name__ == "__main__":
    main()

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
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
from tqdm import tqdm

from commandline import CommandLine, guarded, locked
from data.corpus import DEFAULT_CORPUS, FORMAT, Corpus, dtype_for, load_corpus
from data.tokenizer import Tokenizer, check_runs, gpt2_tokenizer, pieces, train_tokenizer

# (name, text); a name is relative to its root, so that splits do not depend on the machine
Documents = list[tuple[str, str]]
LEFT_OUT = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
LARGEST = 2**32  # bytes of a text
# progress bars: only on a terminal, and only for what takes long
QUIET = {
    "delay": 1,
    "leave": False,
    "disable": None,
}


# sources ----------------------------------------------------------------------------------------


def walk(root: Path, keep: Callable[[str], bool]) -> Iterator[tuple[str, Path]]:
    """(name relative to root, path) of the files below root whose own and whose folders' names are
    kept, sorted; links to folders are not followed."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(filter(keep, folders))
        for file in sorted(filter(keep, files)):
            path = Path(folder, file)
            if path.is_file():
                yield path.relative_to(root).as_posix(), path


def read_text(path: Path) -> str:
    """The file's text, line ends as they are, without a byte order mark. ValueError where it is no
    UTF-8 text, or no file that has an end."""
    if not path.is_file():
        raise ValueError(f"{path} is no regular file; give --text files and folders")
    size = path.stat().st_size
    if size > LARGEST:
        raise ValueError(f"{path} has {size:,} bytes and {LARGEST:,} are the most: cut it")
    content = path.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{path} holds NUL bytes, so it is no text (or UTF-16): leave it out")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it (iconv -t utf-8) or leave "
            "it out"
        ) from None


def read_all(files: Iterable[tuple[str, Path]]) -> tuple[Documents, list[str]]:
    """The documents of named files, and why some were left out."""
    documents, left_out = [], []
    for name, path in files:
        try:
            documents.append((name, read_text(path)))
        except ValueError as error:
            left_out.append(str(error))
    return documents, left_out


def python_sources(root: Path) -> Documents:
    """Python files below root, without tests and without `_sysconfigdata`, which the build writes
    and fills with its paths."""
    keep = lambda name: name not in LEFT_OUT and not name.startswith("_sysconfigdata")
    files = (file for file in walk(root, keep) if file[0].endswith(".py"))
    return read_all(files)[0]


def from_text(path: Path) -> Documents:
    """A file, or every text file below a folder but the hidden ones and links out of it."""
    if not path.exists():
        raise FileNotFoundError(f"{path} not found; give --text a file or folder that exists")
    if not path.is_dir():
        return [(path.name, read_text(path))]
    inside, root = path.resolve().as_posix(), path
    files = walk(root, lambda name: not name.startswith("."))
    files = [f for f in files if f[1].resolve().as_posix().startswith(f"{inside}/")]
    documents, left_out = read_all(files)
    if not documents:
        raise ValueError(f"{path} holds no UTF-8 text file; give --text a folder that does")
    if left_out:
        print(f"{path}: left out {len(left_out)} of {len(files)} files, such as {left_out[0]}")
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
        documents = read_all([(f"{name}.py", Path(spec.origin))])[0]
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
            too_large = f"it is larger than the {LARGEST:,} bytes that are taken"
            if length > LARGEST:
                raise OSError(too_large)
            with tqdm(
                total=length or None, unit="B", unit_scale=True, desc="download", **QUIET
            ) as bar:
                while chunk := response.read(1 << 20):
                    content += chunk
                    if len(content) > LARGEST:
                        raise OSError(too_large)
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


# a corpus from documents ------------------------------------------------------------------------


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
    """Make sure that a file or folder is on the disk. Windows opens no folder, and syncs a file
    only through a handle that may write."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    os.fsync(descriptor)
    os.close(descriptor)


def prepare(
    documents: Documents,
    out: Path | str,
    vocab_size: int = 2048,
    tokenizer: Tokenizer | None = None,
    source: str = "documents",
    again: bool = True,
) -> dict:
    """Write a corpus to the folder out and return its meta; all or nothing. Without a tokenizer,
    BPE of vocab_size ids is trained on the training split. Of two that prepare one folder the
    second waits; then, unless it must be made `again`, the first one's corpus is taken. Raises
    ValueError for documents that cannot make a corpus, OSError when out cannot be written."""
    out = Path(out)
    if again:
        check_out(out)
    if not split_documents(documents)[0]:
        raise ValueError(f"there is no text to train on in {source}; give files that hold some")
    for name, text in documents:
        check_runs(text, name)
    new = not out.absolute().parent.exists()
    with locked(out, f"{out} is being prepared", wait=-1) as lock:
        try:
            if not again and (out / "meta.json").exists():
                return json.loads((out / "meta.json").read_bytes())
            check_out(out)
            return _prepare(documents, out, vocab_size, tokenizer, source)
        finally:
            with suppress(OSError):  # Windows removes no open file
                os.remove(lock.lock_file)
                if new and not out.exists():
                    out.absolute().parent.rmdir()


def _prepare(
    documents: Documents, out: Path, vocab_size: int, tokenizer: Tokenizer | None, source: str
) -> dict:
    train, val = split_documents(documents)
    if tokenizer is None:
        texts = tqdm(train, desc="learn the vocabulary", unit="documents", **QUIET)
        tokenizer = train_tokenizer(texts, vocab_size)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left by one that was killed
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
        if out.is_dir():  # and empty; Windows replaces no folder
            out.rmdir()
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
    out: Path | str = DEFAULT_CORPUS,
    vocab_size: int = 2048,
    tokenizer: Tokenizer | None = None,
    again: bool = True,
) -> dict:
    """The default corpus: the standard library of the Python that runs this."""
    documents = python_sources(Path(sysconfig.get_path("stdlib")))
    return prepare(
        documents,
        out,
        vocab_size,
        tokenizer,
        source=f"the standard library of Python {platform.python_version()}",
        again=again,
    )


def open_corpus(folder: Path | str = DEFAULT_CORPUS) -> Corpus:
    """The corpus in a folder; the default one is prepared now where it is not there."""
    if Path(folder) == DEFAULT_CORPUS and not DEFAULT_CORPUS.exists():
        prepare_stdlib(DEFAULT_CORPUS, again=False)
    return load_corpus(folder)


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    description = "Make a corpus from text; by default from Python's standard library."
    line = CommandLine(prog="python -m data.prepare", description=description)
    several = {"nargs": "+", "action": "extend", "default": []}
    text = "files and folders of UTF-8 text"
    line.add_argument("--text", **several, type=Path, metavar="PATH", help=text)
    line.add_argument("--url", help="a text file to download")
    line.add_argument("--sha256", metavar="HEX", help="what --url must hash to")
    packages = "installed packages' Python sources"
    line.add_argument("--packages", **several, metavar="NAME", help=packages)
    encoding = "tiktoken's, in place of a vocabulary trained on the text"
    line.add_argument("--encoding", choices=["gpt2"], help=encoding)
    size = "ids to train, end of text included (default 2048)"
    line.add_argument("--vocab-size", type=int, metavar="N", help=size)
    place = f"default {DEFAULT_CORPUS}; with other sources, beside it, named after the first"
    line.add_argument("--out", type=Path, metavar="DIR", help=place)
    args = line.parse(argv)
    if args.sha256 is not None and args.url is None:
        raise ValueError("--sha256 checks a download; give --url too, or leave it out")
    hexadecimal = set("0123456789abcdef")
    if args.sha256 is not None and (
        len(args.sha256) != 64 or set(args.sha256.lower()) - hexadecimal
    ):
        mend = "`sha256sum FILE` prints them"
        raise ValueError(f"--sha256 {args.sha256} is not 64 hex digits; {mend}")
    if args.encoding and args.vocab_size is not None:
        mend = f"leave out --vocab-size {args.vocab_size}"
        raise ValueError(f"--encoding {args.encoding} brings its own vocabulary; {mend}")
    vocab_size = 2048 if args.vocab_size is None else args.vocab_size

    sources = [*map(str, args.text), *([] if args.url is None else [args.url]), *args.packages]
    name = DEFAULT_CORPUS.name
    if sources:
        name = Path(unquote(urlsplit(sources[0]).path)).resolve().stem or "text"
    out = args.out or DEFAULT_CORPUS.with_name(name)
    check_out(out)
    documents = [document for path in args.text for document in from_text(path)]
    documents += [document for package in args.packages for document in from_package(package)]
    tokenizer = gpt2_tokenizer() if args.encoding else None
    documents += [] if args.url is None else from_url(args.url, args.sha256)
    if sources:
        prepare(documents, out, vocab_size, tokenizer, source=", ".join(sources))
    else:
        prepare_stdlib(out, vocab_size, tokenizer)


if __name__ == "__main__":
    main()

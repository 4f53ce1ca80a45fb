"""One way to read a command line, and one way to fail: a line with the mend, and status 2."""

import argparse
import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import BinaryIO, NoReturn

# Of the processes that torchrun has started: it sets all of these. One alone is a cluster's, or a
# sweep's.
TORCHRUN = list(map(os.environ.get, ("RANK", "WORLD_SIZE", "MASTER_ADDR")))
RANK, RANKS = map(int, TORCHRUN[:2] if all(TORCHRUN) else (0, 1))


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ValueErrors. Users may write flags with underscores."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The parsed arguments. Raises ValueError for an unknown flag (with the nearest one), a bad
        value or a stray word."""
        words = list(sys.argv[1:] if argv is None else argv)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            flag, equals, value = word.partition("=")
            # argparse reads "--- a title" as a value, so do we
            if flag.startswith("--") and not any(map(str.isspace, flag)):
                flag = flag.replace("_", "-")
                if flag not in self._option_string_actions:
                    self.unknown(flag)
                words[i] = flag + equals + value
        args, extra = self.parse_known_args(words)
        for word in filter("--".__ne__, extra):
            if word.startswith("-"):
                self.unknown(word)
            raise ValueError(f"unexpected argument {word!r}; --help shows what is understood")
        return args

    def unknown(self, flag: str) -> NoReturn:
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise ValueError(f"unknown flag {flag}; {mend}")


def fail(error: BaseException | str, alone: bool = False) -> NoReturn:
    """Print `error: ...` as one line to stderr and exit with status 2. Of several processes that
    torchrun has started, which all meet the same, the first one speaks; but one that met it alone
    speaks for itself."""
    if RANK > 0 and not alone:
        sys.exit()
    line = printable(" ".join(str(error).split()))
    print(
        "error:", line if len(line) < 2000 else f"{line[:1400]} ... {line[-500:]}", file=sys.stderr
    )
    sys.exit(2)


def printable(text: str) -> str:
    """The text, with what would move a terminal's cursor written out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def guarded(main: Callable) -> Callable:
    """`main(argv)` as a command: bad input, a full disk, exhausted memory, a loss that is not
    finite and an interrupt end in one line and status 2. A reader of our output that has gone ends
    it in silence, and what a terminal cannot show is replaced."""

    @wraps(main)
    def command(argv: list[str] | None = None) -> None:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:  # closed by the shell
                setattr(sys, name, open(os.devnull, "w"))
            elif hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        try:
            main(argv)
            sys.stdout.flush()
        except BrokenPipeError:
            silence(sys.stdout)
        except KeyboardInterrupt as error:
            fail(str(error) or "interrupted")
        except RecursionError:
            fail("the input is nested too deeply: it is damaged")
        except (ValueError, OSError, FloatingPointError) as error:
            fail(error)
        except ModuleNotFoundError as error:
            fail(f"{error}: pip install -r requirements.txt")
        except (MemoryError, RuntimeError) as error:
            if "probability tensor" in str(error):  # torch.multinomial's
                fail("the logits are not finite: the weights are damaged, or their training was")
            if not is_out_of_memory(error):
                raise
            less = "ask for less: --micro-batch, --d-model, --d-ff, --samples, --max-new-tokens"
            fail(
                f"out of memory: {error}: {less}" if str(error) else f"out of memory: {less}", True
            )
        except BaseException as error:  # a panic of the regex engine is no Exception
            if type(error).__name__ != "PanicException":
                raise
            fail(f"the regex engine gave up on this text ({error})")

    return command


def last_words(kind: type, error: BaseException, trace) -> None:
    """An interrupt while modules are imported, before any guard stands, is one line too: train.py,
    sample.py and the lab import this one first."""
    if issubclass(kind, KeyboardInterrupt):
        print("error: interrupted", file=sys.stderr)  # Python then ends as by the signal: 130
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = last_words


def is_out_of_memory(error: BaseException) -> bool:
    """Has memory run out? PyTorch says so by its own class on a GPU, in words on a CPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory"))


@contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Whatever the bytes of a checkpoint's file provoke within it is a ValueError that names the
    file, but for want of memory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        mend = f"start another run with --init {path.parent}"
        raise ValueError(f"{path} is damaged ({type(error).__name__}): {mend}") from error


def silence(stream) -> None:
    """Send what is left in a stream whose reader has gone to nobody, so that its last flush, at
    exit, does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Unheard:
    """A text stream that goes on when its reader has gone or its disk is full."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        """Write, or drop."""
        try:
            return self.stream.write(text)
        except OSError:
            silence(self.stream)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self.stream.flush()
        except OSError:
            silence(self.stream)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


@contextmanager
def unheard() -> Iterator[None]:
    """Within it nobody need read our output: what cannot be written is dropped."""
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(Unheard, streams)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = streams


def read_input(source: Path | BinaryIO, most: int = 2**28) -> bytearray:
    """All bytes of a file or stream that somebody names, of which /dev/zero has no end. ValueError
    where there are more than `most`."""
    content, size = bytearray(), 0
    if isinstance(source, Path):
        size = source.stat().st_size
        source = open(source, "rb")
    with source:
        while max(size, len(content)) <= most and (chunk := source.read(2**20)):
            content += chunk
    if max(size, len(content)) > most:
        found = f"{source.name} has {max(size, len(content)):,} bytes or more"
        raise ValueError(f"{found}, and {most:,} are the most: cut it")
    return content


def check_memory(model, device) -> None:
    """ValueError where a model, made on the meta device, does not fit into this machine's memory:
    its weights, and on a CPU their gradients and averages too."""
    size = sum(p.nbytes for p in model.parameters()) * (3 if device.type == "cpu" else 1)
    known = hasattr(os, "sysconf")  # not on Windows
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else size
    if size > memory:
        c = model.config
        sizes = f"n_layer {c.n_layer}, d_model {c.d_model}, d_ff {c.d_ff}, n_head {c.n_head}"
        raise ValueError(f"{sizes}: it takes {size:,} bytes and this machine has {memory:,}")


def locked(path: Path, refusal: str, wait: float = 0):
    """A context that holds the lock of a file or folder that is to be made or changed. ValueError
    with the refusal where another process holds it longer than `wait` seconds; -1 waits for
    ever."""
    from filelock import FileLock, Timeout

    path = Path(os.path.realpath(path))  # one lock for a folder and the links to it
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    try:  # FileLock would wait for the right to write; on some disks a lock is that the file exists
        file.touch() if file.exists() else tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        inside = f", or one inside {path}" if path.is_dir() else ""
        mend = f"give a folder elsewhere{inside}"
        raise OSError(f"cannot write into {path.parent} ({error.strerror}): {mend}") from error
    lock = FileLock(file, timeout=wait)
    try:
        return lock.acquire()
    except Timeout:
        raise ValueError(refusal) from None


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at; None where it is in no repository, or git is not here."""
    try:
        git = ["git", "rev-parse", "HEAD"]
        done = subprocess.run(git, capture_output=True, text=True, cwd=folder)
    except OSError:
        return None
    return done.stdout.strip() or None


def choose_device(name: str | None):
    """The torch.device of --device, and whether it multiplies bfloat16 natively, as GPUs do and
    CPUs with AVX512-BF16 or AMX; of several processes each takes a GPU of its own. ValueError where
    there is no such device."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device {name!r} is unknown: use cuda, cpu or mps") from None
    available = {"cpu": True, "cuda": torch.cuda.is_available()}
    available["mps"] = torch.backends.mps.is_available()
    if not available.get(device.type, False):
        raise ValueError(
            f"--device {name}: this machine (or this build of torch) has none; use --device cpu"
        )
    if RANKS > 1 and device.type != "cpu":
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if device.type != "cuda" or here > gpus:
            raise ValueError(
                f"--device {name}: this machine has {gpus} GPUs for {here} processes; start no "
                "more with --nproc-per-node, or use --device cpu"
            )
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # evaluation, too, on tensor cores
        return device, torch.cuda.is_bf16_supported(including_emulation=False)
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device, device.type == "cpu" and units

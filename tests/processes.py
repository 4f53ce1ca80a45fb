"""Commands of this repository as processes, forked from one that has imported torch: the import
takes longer than most of what they do."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# On macOS a process that has imported so much cannot be forked safely.
forks = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
forks.set_forkserver_preload(["torch._dynamo", "torch.distributed", "pytest"])


class Command:
    """`python WORD ...`, started in `folder`, with `said` at its standard input."""

    def __init__(self, *words, folder, said="", **environment):
        self.place = tempfile.TemporaryDirectory()
        self.streams = Path(self.place.name)
        (self.streams / "0").write_text(said, encoding="utf-8")
        argv = list(map(str, words))
        place = str(folder), environment | {"PYTHONPATH": str(ROOT)}, str(self.streams)
        self.process = forks.Process(target=run, args=(argv, *place), daemon=True)
        self.process.start()

    def send(self, number):
        if self.status is None:
            os.kill(self.process.pid, number)

    @property
    def out(self):
        return self._read("1")

    @property
    def err(self):
        return self._read("2")

    @property
    def status(self):
        """Its exit status, negative for a signal; None while it runs."""
        return self.process.exitcode

    def wait(self, seconds=120):
        """Until it ends -> itself."""
        self.process.join(seconds)
        if self.status is None:
            self.process.kill()
            raise TimeoutError(f"still running after {seconds} s: {self.out}{self.err}")
        return self

    def _read(self, stream):
        path = self.streams / stream
        return path.read_text(encoding="utf-8") if path.exists() else ""


def run(argv, folder, environment, streams):
    """Be that command."""
    for stream, flags in enumerate((os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2)):
        os.dup2(os.open(f"{streams}/{stream}", flags, 0o600), stream)
    sys.stdin = open(0, encoding="utf-8")
    # A shell's background jobs start deaf to it, and so do theirs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= environment
    os.chdir(folder)
    if argv[0] == "-c":
        sys.argv = argv[:1] + argv[2:]
        exec(argv[1], {"__name__": "__main__"})
    elif argv[0] == "-m":
        sys.argv, sys.path[0] = argv[1:], folder
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = argv, str(Path(argv[0]).parent)
        runpy.run_path(argv[0], run_name="__main__")

"""One guard around every command: whatever ends it, ends it in one line and a status."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

import commandline
import sample
import train
from commandline import Unheard, choose_device, guarded, read_input, unheard
from lab import curves, needles
from processes import ROOT


class PanicException(BaseException):
    """As the regex engine's, which is no Exception."""


ENDS = {
    "ValueError": (ValueError("window 0\nis below 1"), "error: window 0 is below 1"),
    "OSError": (OSError(28, "No space left on device"), "error: [Errno 28] No space left"),
    "FloatingPointError": (FloatingPointError("the loss is nan"), "error: the loss is nan"),
    "KeyboardInterrupt": (KeyboardInterrupt(), "error: interrupted"),
    "MemoryError": (MemoryError(), "error: out of memory: ask for less: --micro-batch"),
    "PyTorch's": (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    "RecursionError": (RecursionError("maximum recursion depth"), "error: the input is nested"),
    "damaged weights": (
        RuntimeError("probability tensor contains either `inf`, `nan` or element < 0"),
        "error: the logits are not finite",
    ),
    "a long line": (ValueError("a" * 9999 + "z"), "aaz"),
    "panic": (PanicException("backtrack"), "error: the regex engine gave up"),
    "escapes": (ValueError("tensor \x1b[31mred\x07"), "error: tensor \\x1b[31mred\\x07"),
}


@pytest.mark.parametrize("error,line", ENDS.values(), ids=ENDS)
def test_whatever_ends_a_command_ends_it_in_one_line(error, line, capsys):
    @guarded
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as stop:
        main([])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and line in said and len(said) < 2000


@pytest.mark.parametrize("error", [RuntimeError("a bug"), TypeError("a bug"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    @guarded
    def main(argv=None):
        raise error

    with pytest.raises(type(error)):
        main([])


@pytest.mark.parametrize("command", ["train.py", "sample.py"])
def test_an_interrupt_while_torch_loads_is_one_line(command, tmp_path):
    """The first second of a command, when no guard stands yet."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / command)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr == "error: interrupted\n"


def test_what_has_no_end_is_read_to_a_bound(tmp_path):
    """Files, streams and devices; what memory must hold is known before."""
    (tmp_path / "x").write_bytes(b"12345678")
    assert read_input(tmp_path / "x", 8) == read_input(io.BytesIO(b"12345678"), 8) == b"12345678"
    endless = filter(Path.exists, [Path("/dev/zero")])
    for source in (tmp_path / "x", open(tmp_path / "x", "rb"), *endless):
        with pytest.raises(ValueError, match="and 7 are the most"):
            read_input(source, 7)


def test_two_dashes_end_the_flags():
    parser = commandline.CommandLine()
    parser.add_argument("words", nargs="*")
    assert parser.parse(["--", "a"]).words == ["a"] and parser.parse(["a", "--"]).words == ["a"]


def test_of_several_processes_the_first_one_speaks(monkeypatch, capsys):
    monkeypatch.setattr(commandline, "RANK", 1)
    with pytest.raises(SystemExit) as stop:
        commandline.fail("all met this")
    assert not stop.value.code and capsys.readouterr().err == ""
    with pytest.raises(SystemExit) as stop:
        commandline.fail("met alone", alone=True)
    assert stop.value.code == 2 and "met alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "variables,found",
    [
        ({"RANK": "1"}, "0 1"),  # a sweep's
        ({"RANK": "", "WORLD_SIZE": "2"}, "0 1"),  # a cluster's
        ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "1 2"),
    ],
)
def test_only_torchruns_variables_together_count(variables, found):
    """A RANK alone made training keep nothing and fail in silence."""
    code = "import commandline; print(commandline.RANK, commandline.RANKS)"
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert said.stdout.strip() == found


@pytest.mark.skipif(os.name == "nt", reason="needs pipes as Linux and macOS have them")
@pytest.mark.parametrize("full", [False, True])
def test_output_that_nobody_reads_is_dropped(full):
    """A closed pipe and a full disk: work goes on, and nothing fails at exit."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import commandline\n"
        "with commandline.unheard():\n"
        "    for i in range(3000): print('x' * 100)\n"
        "    sys.stdout.flush()\n"
        "sys.exit(7)"
    )
    if full and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    out = open("/dev/full", "w") if full else subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE)
    if not full:
        process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=30) == 7 and error == b""


def test_streams_come_back(capsys):
    before = sys.stdout
    with unheard():
        assert isinstance(sys.stdout, Unheard)
        print("heard all the same")
    assert sys.stdout is before and "heard" in capsys.readouterr().out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_a_terminal_cannot_show_is_replaced(encoding):
    """Shades of a heat map, ± and U+FFFD, at the end of a long measurement."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from commandline import guarded\n"
        "@guarded\n"
        "def main(argv=None): print('░▒▓█ ± \\ufffd 🙂')\n"
        "main()"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.startswith(b"???") and done.stderr == b""


BAD_VALUES = [
    (train.main, ["--d-ff", "2147483648"], "d_ff 2147483648"),
    (train.main, ["--n-layer", "2000000", "--pattern", "R"], "n_layer 2000000"),
    (train.main, ["--vocab-sizes", "9"], "--vocab-sizes"),
    (train.main, ["--logit-scale", "nan"], "--logit-scale"),
    (train.main, ["--logit-scale", "1e999"], "--logit-scale"),
    (train.main, ["--seed", "1" + "0" * 400], "--seed"),
    (train.main, ["--seed", str(2**64)], "--seed"),
    (train.main, ["--seed", "-1"], "seed -1"),
    (train.main, ["--lr", "-0.0"], "lr"),
    (train.main, ["--window", "0x10"], "--window"),
    (train.main, ["--rope-scaling", "yarn", "--rope-theta", "1", "--rope-factor", "2"], "yarn"),
    (train.main, ["--rope-factor", "nan", "--rope-scaling", "pi"], "--rope-factor"),
    (sample.main, ["--prompt", "caf\udce9"], "--prompt is not UTF-8"),
    (sample.main, ["--max-new-tokens", "many"], "--max-new-tokens"),
    (sample.main, ["--prompt", "x", "--checkpoint", "nowhere"], "nowhere/config.json"),
    (sample.main, ["--file", "nowhere.txt"], "nowhere.txt"),
    (needles.main, ["nowhere", "--examples", "9" * 99], "nowhere"),
    (curves.main, ["nowhere"], "nowhere"),
]


@pytest.mark.parametrize(
    "main,argv,word", BAD_VALUES, ids=[" ".join(b[1])[:40] for b in BAD_VALUES]
)
def test_a_bad_value_is_one_line_that_names_it(main, argv, word, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(argv)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and word in lines[0]
    assert not os.listdir()


@pytest.mark.parametrize("name", ["abacus", "cuda:x", "xpu9999", ""])
def test_devices_that_are_none(name):
    if name == "":
        assert choose_device(name)[0].type in ("cpu", "cuda")
        return
    with pytest.raises(ValueError, match="--device"):
        choose_device(name)

"""Data parallel: two processes train as one does, stop and go on as one does, and only the first of
them speaks and writes.

Real processes over gloo, some seconds each, so that every launch here serves several questions.
"""

import json
import os
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from model import Transformer
from processes import ROOT, Command

RECIPE = """
batch_tokens = 512
eval_tokens = 1024
eval_questions = 0
needle_share = 0.5
[model]
n_layer = 4
n_head = 2
n_kv_head = 1
d_model = 32
d_ff = 48
window = 16
[[phase]]
steps = 6
lengths = { 128 = 1 }
[[phase]]
steps = 6
lengths = { 128 = 3, 256 = 1 }
lr = 0.002
warmup = 2
"""
# scales that only some layers use, and the phases not the same
SSMAX = (
    RECIPE.replace("[model]", "recompute = true\n[model]\nlength_scale = 'ssmax'")
    + "pattern = 'rN'\n"
)


@pytest.fixture
def words(tmp_path, corpus_folder, monkeypatch):
    """words(text, flag, ...) -> the command line of a run by the recipe `text`, in a folder of its
    own."""
    monkeypatch.chdir(tmp_path)

    def write(text, *flags):
        (tmp_path / "small.toml").write_text(text)
        # Float32 everywhere, so that sums in another order differ by no more than their rounding.
        return ["small.toml", "--data", str(corpus_folder), "--no-bf16", *flags]

    return write


def two_ranks(words, folder):
    """Both processes of a training, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    start = lambda rank: Command(
        ROOT / "train.py", *words, folder=folder, **place, RANK=rank, LOCAL_RANK=rank
    )
    return start("0"), start("1")


def steps(folder):
    """(step, loss, gradient norm) as logged."""
    entries = map(json.loads, Path(folder, "log.jsonl").read_text().splitlines())
    return [
        (entry["step"], entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry
    ]


def assert_same_run(folder, other):
    """All 12 steps, once each. The same float32 terms in another order differ by 1e-7 of a sum, and
    twelve updates carry little of that on; rows left out, counted twice or weighed anew show in the
    second digit. (The norm is compared too, for neither clipping nor Muon nor AdamW lets the loss
    see a gradient of another size.)"""
    assert [step for step, *_ in steps(folder)] == list(range(1, 13))
    np.testing.assert_allclose(steps(folder), steps(other), rtol=1e-5)


def test_one_process_then_two_by_micro_batches_then_one(words, tmp_path):
    train.main(words(SSMAX, "--out", "one"))
    train.main(words(SSMAX, "--out", "two", "--max-steps", "3"))
    flags = ["--resume", "two", "--micro-batch", "128", "--max-steps", "10"]
    first, second = (rank.wait() for rank in two_ranks(flags, tmp_path))
    assert [first.status, second.status] == [0, 0], first.err + second.err
    assert len(steps("two")) == 10
    printed = (first.out + second.out).splitlines()
    assert "2 x cpu" in printed[0]
    said = [line for line in printed if line]
    assert len(set(said)) == len(said)  # by one process
    train.main(["--resume", "two"])
    assert_same_run("two", "one")
    assert {path.name for path in Path("two").iterdir()} == {
        path.name for path in Path("one").iterdir()
    }
    a, b = (Transformer.from_pretrained(Path(name, "last")).state_dict() for name in ("one", "two"))
    # Twelve updates of some lr each, whose directions may differ by rounding: 1e-2 of one of them.
    for name, p in a.items():
        torch.testing.assert_close(b[name], p, rtol=0, atol=6e-5, msg=name)


def test_sequences_that_do_not_divide_among_the_processes(words, monkeypatch):
    """Length 128 has 4 sequences a step, length 256 only 2."""
    monkeypatch.setattr("run.RANKS", 4)
    with pytest.raises(ValueError, match="2 sequences of 256.* 4 processes.*--batch-tokens 1024"):
        train.read(words(RECIPE, "--out", "x"))
    assert not Path("x").exists()
    train.read(words(RECIPE, "--out", "x", "--batch-tokens", "1024"))
    monkeypatch.setattr("run.RANKS", 2)
    train.read(words(RECIPE, "--out", "y"))


def test_torchrun_says_an_error_of_all_once(words, tmp_path):
    torchrun = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2
    flags = words(RECIPE, "--patern", "R")
    done = Command(*torchrun, ROOT / "train.py", *flags, folder=tmp_path).wait()
    unknown = "error: unknown flag --patern; did you mean --pattern?"
    assert done.err.splitlines().count(unknown) == 1 and "2 x cpu" not in done.out
    assert done.status == 1 and not Path("out").exists()


def test_a_loss_that_is_not_finite_is_said_once(words, tmp_path):
    words = words(RECIPE.replace("lr = 0.002", "lr = 1e18"), "--out", "x")
    ranks = [rank.wait() for rank in two_ranks(words, tmp_path)]
    errors = [line for rank in ranks for line in rank.err.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("error: step 7: the loss is "), errors
    assert [rank.status for rank in ranks] == [2, 0]
    assert torch.isfinite(Transformer.from_pretrained("x/last").embed_tokens.weight).all()


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent an interrupt")
def test_an_interrupt_of_one_stops_all_after_the_same_step(words, tmp_path):
    """Of which only the second hears of it: none is left waiting for the other."""
    text = RECIPE.replace("steps = 6", "steps = 100_000")
    first, second = two_ranks(words(text, "--out", "x"), tmp_path)
    deadline = time.time() + 60
    while not (Path("x/log.jsonl").exists() and len(steps("x")) > 3) and time.time() < deadline:
        time.sleep(0.1)
    second.send(signal.SIGINT)
    said = first.wait(60).err + second.wait(60).err  # the first says it for all
    assert said == f"error: interrupted after step {len(steps('x'))}: go on with --resume x\n"
    assert [first.status, second.status] == [2, 0]
    assert json.loads(Path("x", "run.json").read_text())["processes"] == 2
    assert not list(Path("x").glob("*.partial"))
    Transformer.from_pretrained("x/last")

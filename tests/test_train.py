"""Training: exact resume, exact micro-batches, data that only (seed, step) decides, and one clear
line for every bad input.

The errors run as subprocesses would be slow (torch imports); `command` runs a main in this process
and reads what it printed.
"""

import errno
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import checkpoint
import evaluate
import recipe as recipes
import sample
import train
from commandline import locked
from data.batches import epochs, prefetch, training_batch, validation_windows
from data.corpus import load_corpus
from data.needles import BEGIN, CONTEXT, DIGITS, NEEDLE, QC, Needles, held_out
from data.prepare import prepare
from data.tokenizer import load_tokenizer
from evaluate import needle_score, validation_loss
from fast.muon import Muon, orthogonalise
from lab import curves
from model import ModelConfig, Transformer
from processes import ROOT, Command
from run import Log, is_run

TINY = """
batch_tokens = 512
eval_tokens = 1024
eval_every = 1000
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
rope_theta = 20_000
"""


@pytest.fixture
def tiny(tmp_path):
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def begun(corpus_folder, tmp_path_factory):
    """A run of the tiny recipe after its first step, which many tests begin with."""
    folder = tmp_path_factory.mktemp("begun")
    words = [str(write(folder, TINY)), "--data", str(corpus_folder), "--out", str(folder / "x")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "finish", lambda *_: None)
        train.main([*words, "--max-steps", "1"])
    return folder / "x"


@pytest.fixture
def run(tiny, corpus_folder, begun, tmp_path, monkeypatch):
    """Train by the tiny recipe without the final table: run("--out", "x", ...)."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.chdir(tmp_path)

    def go(*argv, recipe=tiny):
        first, *more = argv
        if first == "--out" and more[1:] == ["--max-steps", "1"] and recipe == tiny:
            shutil.copytree(begun, more[0], symlinks=True)
        else:
            data = [] if "--resume" in argv else ["--data", str(corpus_folder)]
            train.main([*([str(recipe)] if recipe else []), *argv, *data])

    return go


def weights(folder):
    return (folder / "last" / "model.safetensors").read_bytes()


# Exactness


def test_stopping_and_resuming_changes_no_bit(run, tmp_path):
    """Inside the first phase, at the boundary, inside the second."""
    run("--out", "whole")
    for stop in ("3", "6", "8"):
        run("--out", stop, "--max-steps", stop)
        assert weights(tmp_path / "whole") != weights(tmp_path / stop)
        run("--resume", stop, recipe=None)
        assert weights(tmp_path / "whole") == weights(tmp_path / stop)
        assert logged_steps(tmp_path / stop) == list(range(1, 13))


def test_how_often_one_evaluates_changes_no_bit(run, tmp_path):
    run("--out", "seldom")
    run("--out", "often", "--eval-every", "2")
    assert weights(tmp_path / "seldom") == weights(tmp_path / "often")


def test_hidden_lines_are_to_be_found_not_to_be_written(corpus_folder):
    """The weights of a batch, target by target: nothing for a hidden line, 1 / N for other text,
    and answer_weight / A more for an answer."""
    corpus = load_corpus(corpus_folder)
    needles = Needles(corpus.tokenizer, corpus.train, evaluation=False)
    batch = training_batch(corpus, needles, 1, 0, 128, 512, 0.5, answer_weight=3.0)
    rng = np.random.default_rng([1, 0])  # the same examples again
    examples = [needles.example(rng, 129, *needles.counts(128)) for _ in range(2)]
    answers = sum(int((example.answer[1:] >= 0).sum()) for example in examples)
    assert answers > 0 and batch.weights.shape == (4, 128)
    for example, tokens, weights in zip(examples, batch.tokens, batch.weights):
        assert np.array_equal(tokens, example.tokens[:-1])
        text = (example.segment[1:] != NEEDLE) / 512
        expected = text + 3.0 / answers * (example.answer[1:] >= 0)
        np.testing.assert_allclose(weights, expected, rtol=1e-5)
        assert (expected == 0).sum() > 10, "else this shows nothing"
    assert (batch.weights[2:] == 1 / 512).all()


def test_micro_batches_add_up_to_the_batch(run, tmp_path, corpus_folder, tiny):
    """The gradient of the whole batch is the sum of its parts', needle rows included, whose weights
    were counted over the whole."""
    corpus = load_corpus(corpus_folder)
    needles = Needles(corpus.tokenizer, corpus.train, evaluation=False)
    batch = training_batch(corpus, needles, 1, 0, 128, 512, 0.5)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(window=16, vocab_size=1024)).double()

    def gradient(rows):
        model.zero_grad()
        for i in range(0, 4, rows):
            part = batch.rows(i, i + rows)
            model.loss(part.tokens, part.targets, part.weights.double()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    whole = gradient(4)
    for rows in (1, 2):  # float64: sums of a few thousand terms of size 1 differ by 1e-13 at most
        torch.testing.assert_close(gradient(rows), whole, rtol=0, atol=1e-12)
    # and through the command, in float32: twelve steps of updates of size lr, whose rounding
    # differs
    run("--out", "one")
    run("--out", "two", "--micro-batch", "256")
    losses = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / name / "log.jsonl").read_text().splitlines()
            if '"loss"' in line
        ]
        for name in ("one", "two")
    ]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)


def test_the_compilers_time_is_not_the_models(run, tmp_path, monkeypatch):
    """A first step at a length takes half a second longer, and no rate on the bar knows it."""
    rates, met = [], set()

    def compiled(loss, **how):
        def slow_at_first(tokens, *rest):
            if tokens.shape not in met:
                time.sleep(0.5)
            met.add(tokens.shape)
            return loss(tokens, *rest)

        return slow_at_first

    monkeypatch.setattr(train, "one_graph", compiled)
    monkeypatch.setattr(train, "mfu", lambda run, length, rate: rates.append(rate))
    run("--out", "x", "--compile", "--max-steps", "6")
    assert rates[0] == 0 and len(rates) == 6
    assert min(rates[1:]) > 512 / 0.5


def test_a_resume_loads_to_the_cpu(run, monkeypatch):
    """load_state_dict moves momenta to the weights' device; AdamW's counters of steps it leaves
    where they are, and on a GPU each would be waited for."""
    run("--out", "x", "--max-steps", "2")
    places, load = [], torch.load

    def spy(*args, map_location=None, **more):
        places.append(map_location)
        return load(*args, map_location=map_location, **more)

    monkeypatch.setattr(torch, "load", spy)
    run("--resume", "x", recipe=None)
    assert places == ["cpu"]


def test_epochs_are_of_text_alone(corpus_folder, monkeypatch):
    """As counted over every sequence of a run, of which needles and questions take most: to 3%,
    for the 16 of each length that `epochs` looks at tell the share of text to 2% at 128."""
    corpus = load_corpus(corpus_folder)
    needles = Needles(corpus.tokenizer, corpus.train, evaluation=False)
    mixed = {"steps": 40, "lengths": {128: 3, 256: 1}}
    long = {"steps": 20, "lengths": {512: 1}, "needle_share": 0.25}
    recipe = recipes.build({"batch_tokens": 2048, "needle_share": 1.0, "phase": [mixed, long]})
    counted, example = [], needles.example

    def spy(*args):
        made = example(*args)
        counted.append(-np.isin(made.segment[1:], (NEEDLE, QC)).sum())
        return made

    with monkeypatch.context() as patch:
        patch.setattr(needles, "example", spy)
        for step in range(60):
            stage = recipe.stage_at(step)
            shape = stage.length(step), recipe.batch_tokens, stage.needle_share
            counted.append(training_batch(corpus, needles, 1, step, *shape).tokens.numel())
    assert counted[-1] == 2048 and sum(counted) < 0.7 * 60 * 2048
    want = sum(counted) / len(corpus.train)
    assert epochs(corpus, needles, recipe) == pytest.approx(want, rel=0.03)
    plain = replace(recipe, needle_share=0.0, phase=recipe.phase[:1])
    assert epochs(corpus, None, plain) == 40 * 2048 / len(corpus.train)


@pytest.mark.parametrize("stretch,warned", [("1", False), ("9", True)])
def test_more_than_four_epochs_are_warned_of(run, capsys, stretch, warned):
    run("--out", "x", "--max-steps", "0", "--stretch", stretch, "--batch-tokens", "65536")
    said = re.search(r"(\d+\.\d\d) epochs of the corpus(; WARNING)?", capsys.readouterr().out)
    assert bool(said[2]) == warned == (float(said[1]) > 4)


def test_a_batch_is_a_function_of_seed_and_step(corpus_folder):
    corpus = load_corpus(corpus_folder)
    needles = Needles(corpus.tokenizer, corpus.train, evaluation=False)
    make = lambda seed, step: training_batch(corpus, needles, seed, step, 128, 1024, 0.5)
    a, b = make(1, 7), make(1, 7)
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.weights, b.weights)
    assert not torch.equal(a.tokens, make(1, 8).tokens) and not torch.equal(
        a.tokens, make(2, 7).tokens
    )
    assert (a.tokens[:, 0] == corpus.tokenizer.eot_token).all()
    assert torch.equal(a.tokens[:, 1:], a.targets[:, :-1])
    # 1 / N for every target that weighs anything, 0.5 for the answers
    counted = a.weights.count_nonzero().item() / 1024
    assert 0.5 < counted < 1 and a.weights.sum().item() == pytest.approx(counted + 0.5, abs=1e-5)
    assert [
        batch.tokens[0, 5].item() for batch in prefetch(lambda step: make(1, step), range(3))
    ] == [make(1, s).tokens[0, 5].item() for s in range(3)]


def test_muon_is_torchs_muon():
    """Ours runs Newton-Schulz in float32 unless told, torch's in bfloat16: singular values settle
    anywhere in 0.7..1.2, so directions agree to bfloat16's 3 digits and steps to a few percent."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(24, 40)), torch.nn.Parameter(torch.zeros(24, 40))
    theirs.data.copy_(ours)
    start = ours.detach().clone()
    a = Muon([ours], lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for i in range(5):
        ours.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(i))
        theirs.grad = ours.grad.clone()
        a.step(), b.step()
    moved, moved_too = ours.detach() - start, theirs.detach() - start
    assert 1e-4 < ((moved - moved_too).norm() / moved.norm()).item() < 0.03
    narrow = torch.nn.Parameter(start.clone())
    c = Muon([narrow], lr=0.01, weight_decay=0.1, dtype=torch.bfloat16)
    for i in range(5):
        narrow.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(i))
        c.step()
    moved = narrow.detach() - start
    assert ((moved - moved_too).norm() / moved.norm()).item() < 1e-4
    tall = orthogonalise(torch.randn(3, 40, 24))
    singular = torch.linalg.svdvals(tall)
    assert singular.min() > 0.5 and singular.max() < 1.3


@pytest.mark.parametrize("bf16", [True, False])
def test_bfloat16_reaches_muon_and_the_evaluation(run, monkeypatch, bf16):
    seen = []

    def validation_loss(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return real(*args)

    def made(*args):
        optimizers = make(*args)
        seen.append(optimizers[0].dtype)
        return optimizers

    real, make = train.validation_loss, train.make_optimizers
    monkeypatch.setattr(train, "validation_loss", validation_loss)
    monkeypatch.setattr(train, "finish", lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    monkeypatch.setattr(train, "make_optimizers", made)
    run("--bf16" if bf16 else "--no-bf16", "--max-steps", "1")
    assert seen == [torch.bfloat16 if bf16 else None, bf16, bf16]


def test_overfitting_one_batch_with_the_real_optimizers(run, tmp_path, corpus_folder, monkeypatch):
    one = training_batch(load_corpus(corpus_folder), None, 1, 0, 128, 512, 0.0)
    monkeypatch.setattr(train, "batch_of", lambda run, step: one)
    path = tmp_path / "one.toml"
    path.write_text(
        TINY.split("[[phase]]")[0].replace("needle_share = 0.5", "lr = 0.01")
        + "[[phase]]\nsteps = 90\nlengths = { 128 = 1 }\n"
    )
    run("--out", "one", recipe=path)
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[0] > 6 and losses[-1] < 0.5


def test_kill_at_any_moment_leaves_a_checkpoint(tiny, corpus_folder, tmp_path):
    """A run that saves after every step is killed at random moments and resumed, until it is
    through; each time `last` loads."""
    path = tmp_path / "often.toml"
    path.write_text(
        TINY.replace("eval_every = 1000", "eval_every = 1").replace("steps = 6", "steps = 60")
    )
    words = [path, "--data", corpus_folder, "--out", tmp_path / "k"]
    killed, log = 0, tmp_path / "k" / "log.jsonl"
    lines = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    for attempt in range(2):
        before, deadline = lines(), time.time() + 60
        training = Command(ROOT / "train.py", *words, folder=tmp_path)
        while lines() < before + 4 and time.time() < deadline:
            time.sleep(0.05)
        time.sleep(0.13 + 0.2 * attempt)
        killed += training.status is None
        training.send(signal.SIGKILL)
        training.wait()
        Transformer.from_pretrained(tmp_path / "k" / "last")
        torch.load(tmp_path / "k" / "last" / "training.pt", weights_only=True)
        words = ["--resume", tmp_path / "k"]
    assert killed == 2


def test_the_checkpoint_is_the_uncompiled_model(run, tmp_path):
    run("--out", "x", "--max-steps", "1")
    from safetensors import safe_open

    with safe_open(tmp_path / "x" / "last" / "model.safetensors", "pt") as file:
        assert all(key.startswith("model.") and "_orig_mod" not in key for key in file.keys())


def test_a_finished_run_is_evaluated_by_any_backend(run, error, tmp_path):
    """FlexAttention has no backward pass on a CPU: refused where steps are ahead alone."""
    run("--out", "x", "--max-steps", "11")
    assert "flex cannot train on cpu" in error(train.main, "--resume", "x", "--backend", "flex")
    run("--resume", "x", recipe=None)
    before = (tmp_path / "x" / "log.jsonl").read_text()
    run("--resume", "x", "--backend", "flex", recipe=None)
    assert (tmp_path / "x" / "log.jsonl").read_text() == before  # nothing was trained


def test_best_and_last_are_relative_links_and_nothing_else_stays(run, tmp_path):
    run("--out", "x", "--eval-every", "2")
    folder = tmp_path / "x"
    assert os.readlink(folder / "last") == "step-000012"
    assert {path.name for path in folder.glob("step-*")} == {
        os.readlink(folder / "last"),
        os.readlink(folder / "best"),
    }
    assert not list(folder.glob("*tmp*")) and not list(folder.glob(".*"))


def test_init_starts_from_weights_and_only_evaluates_with_zero_steps(
    run, tmp_path, capsys, monkeypatch
):
    run("--out", "x")
    seen = []
    monkeypatch.setattr(train, "finish", lambda run, *_: seen.append(run))
    run("--out", "y", "--init", "x/last", "--max-steps", "0")
    assert weights_equal(seen[0].model, Transformer.from_pretrained(tmp_path / "x" / "last"))
    assert seen[0].model.config.trained_length == 256
    run("--out", "z", "--init", "x/last", "--pattern", "R", "--max-steps", "1")
    assert seen[1].model.config.pattern == "R"


def weights_equal(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# A run's life


def test_what_is_no_run_yet_may_be_taken_over(run, error, tmp_path):
    """An evaluation alone, and a first run that was stopped before its first checkpoint, leave no
    run: neither is in the way of another, and neither can be resumed."""
    run("--out", "x", "--max-steps", "0")
    assert not (tmp_path / "x" / "last").exists()
    assert "nothing to resume" in error(train.main, "--resume", "x")
    run("--out", "x", "--max-steps", "2")
    run("--resume", "x", recipe=None)
    assert logged_steps(tmp_path / "x") == list(range(1, 13))

    # To evaluate a run's checkpoint touches nothing, though the default folder is the run's own.
    run("--max-steps", "1")
    own = tmp_path / "out" / "tiny-r16r16r16N-s1"
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    run("--init", str(own / "last"), "--max-steps", "0")
    assert before == {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}


def logged_steps(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [entry["step"] for entry in entries if "loss" in entry]


class Killed(BaseException):
    """What ends a process between two of its file-system calls; it cleans nothing up."""


WATCHED = {"folder": None, "calls": 0, "last": math.inf}


def killer(event, args):
    """An audit hook: after the last call allowed nothing changes a file below the folder."""
    if WATCHED["folder"] is None or not args or not isinstance(args[0], str | os.PathLike):
        return
    writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")
    writes |= event == "open" and bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR))
    if writes and any(str(arg).startswith(WATCHED["folder"]) for arg in args[:2]):
        WATCHED["calls"] += 1
        if WATCHED["calls"] > WATCHED["last"]:
            raise Killed


sys.addaudithook(killer)


def test_a_kill_between_any_two_calls_loses_nothing(tmp_path, corpus_folder, monkeypatch):
    """The first three steps, each with its checkpoint, stopped after the first, second, ... change
    of a file: then the run either never was, and the same command begins it, or it goes on. Every
    other one begins in a folder that an evaluation left."""
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    text = TINY.replace("needle_share = 0.5", "needle_share = 0").replace("1000", "1")
    words = [str(write(tmp_path, text)), "--data", str(corpus_folder), "--max-steps"]
    train.main([*words, "4", "--out", "whole"])
    train.main([*words, "0", "--out", "blank"])

    def three_steps(last):
        """Train until the `last` call -> the number of calls."""
        WATCHED.update(folder="x", calls=0, last=last)
        try:
            train.main([*words, "3", "--out", "x"])
        except Killed:
            pass
        finally:
            WATCHED.update(folder=None)
        return WATCHED["calls"]

    count = three_steps(math.inf)
    assert count > 60  # the hook sees them
    for last in range(0, count, 17):  # I tried all of them once
        for name in ("x", ".x.partial"):
            shutil.rmtree(name, ignore_errors=True)
        if last % 2:
            shutil.copytree("blank", "x")
        three_steps(last)
        if is_run(Path("x")):
            checkpoint.verify_checksums(Path("x/last"))
            train.main(["--resume", "x", "--max-steps", "4"])
        else:
            train.main([*words, "4", "--out", "x"])
        assert weights(tmp_path / "x") == weights(tmp_path / "whole"), last
        assert logged_steps(tmp_path / "x") == [1, 2, 3, 4]
        assert not list(tmp_path.rglob("*.partial"))


def test_a_copy_that_lost_its_links_is_nobodys_to_take_over(
    run, error, tiny, corpus_folder, tmp_path
):
    """As tools leave it that skip links; nor one without its run.json."""
    run("--out", "x", "--max-steps", "2")
    shutil.copytree("x", "y")
    shutil.copytree("x", "z")
    for name in ("last", "best"):
        shutil.rmtree(Path("y", name))  # copies of what they point to
    Path("z", "run.json").unlink()
    weights_of_y = Path("y", "step-000002", "model.safetensors")
    before = weights_of_y.read_bytes()
    mend = "cd y && ln -sfn step-000002 last && ln -sfn step-000002 best"
    for folder, mend in (("y", mend), ("z", "run.json: put that back")):
        for words in (["--resume", folder], [tiny, "--data", corpus_folder, "--out", folder]):
            assert mend in error(train.main, *words)
            assert mend in error(train.main, *words, "--max-steps", "0")
    assert weights_of_y.read_bytes() == before
    assert "tiny.toml is a file" in error(train.main, tiny, "--out", tiny)
    assert not list(tmp_path.glob(".tiny.toml*"))
    Path("y", "last").symlink_to("step-000002")
    run("--resume", "y", "--max-steps", "4", recipe=None)

    # On a disk without links `last` is a copy; a kill may fall between two of these.
    Path("x", "last").rename(Path("x", ".last.partial"))
    shutil.copytree("x/step-000002", "x/.last.copy")
    Path("x", ".last.partial").unlink()
    Path("x", ".last.copy").rename(Path("x", ".last.partial"))
    assert "cd x && mv .last.partial last" in error(train.main, "--resume", "x")

    # A copy from there that kept only the best.
    whole = Path("whole")
    run("--out", "whole", "--max-steps", "4")
    best = shutil.copytree(whole / "best", "best")
    for name in ("last", "best"):
        (whole / name).unlink()
    for folder in whole.glob("step-*"):
        shutil.rmtree(folder)
    shutil.move(best, whole / "best")
    assert "cd whole && cp -r best last" in error(train.main, "--resume", "whole")
    shutil.copytree(whole / "best", whole / "last")
    run("--resume", "whole", "--max-steps", "6", recipe=None)
    assert logged_steps(whole)[-1] == 6


def test_a_text_too_small_to_evaluate_on_is_refused_before_the_first_step(
    run, error, tiny, tmp_path
):
    """Its validation split holds a window of plain text, and no example with needles."""
    text = Path(os.__file__).with_name("argparse.py").read_text()
    prepare([("a", text[:60_000])], tmp_path / "c", vocab_size=1024)
    corpus = load_corpus(tmp_path / "c")
    assert 64 < len(corpus.val) < 2048 < len(corpus.train)
    line = error(train.main, tiny, "--data", tmp_path / "c", "--out", "x")
    assert "an example needs" in line and not Path("x").exists()


def test_to_evaluate_alone_no_such_text_is_wanted(run, tiny, tmp_path):
    """What does not fit is left out of the table."""
    text = Path(os.__file__).with_name("argparse.py").read_text()
    prepare([("a", text[:60_000])], tmp_path / "c", vocab_size=1024)
    train.main([str(tiny), "--data", str(tmp_path / "c"), "--out", "x", "--max-steps", "0"])


def test_a_log_that_a_full_disk_cuts_says_so(tmp_path):
    """A write may take a part of a line; the rest is refused, not lost."""
    resource = pytest.importorskip("resource", reason="no limits on Windows")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = Log(tmp_path / "log.jsonl", 0)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, hard))
        log.write(step=1, loss=1.0)
        with pytest.raises(OSError):
            log.write(step=2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, former)
    again = Log(tmp_path / "log.jsonl", 2)  # the cut line goes
    again.write(step=2, loss=1.0)
    assert logged_steps(tmp_path) == [1, 2]


def test_the_first_lines_name_the_kernels(run, capsys):
    for flags, said in (
        (["--pattern", "rrrN"], "kernels sdpa for full layers, banded for windows of 16\n"),
        (["--backend", "reference"], "kernels reference for full layers, reference for windows"),
        (["--pattern", "R", "--backend", "banded"], "kernels sdpa for full layers\n"),
        (["--pattern", "r"], "kernels banded for windows of 16\n"),
    ):
        run("--max-steps", "0", "--out", "x", *flags)
        assert said in capsys.readouterr().out


def test_a_resume_takes_no_other_recipe_or_folder(run, error, tiny, tmp_path):
    run("--out", "x", "--max-steps", "2")
    other = tmp_path / "other.toml"
    other.write_text(TINY)
    for words in ([other, "--resume", "x"], ["--resume", "x", "--out", "y"]):
        assert "x has a folder and a recipe (tiny) of its own" in error(train.main, *words)
    run("--resume", "x", "--out", str(tmp_path / "x"), "--max-steps", "4")
    assert logged_steps(Path("x")) == [1, 2, 3, 4]


def test_of_two_trainings_of_one_folder_one_is_refused_at_once(run, error, tiny, corpus_folder):
    """A new run that another process has just begun, and one that it resumes."""
    with locked(Path("x"), ""):
        line = error(train.main, tiny, "--data", corpus_folder, "--out", "x")
        assert "another process trains x" in line and not Path("x").exists()
    run("--out", "x", "--max-steps", "1")
    with locked(Path("x"), ""):
        assert "another process trains x" in error(train.main, "--resume", "x")
    if os.name != "nt":  # by another name it is the same folder
        Path("link").symlink_to("x")
        with locked(Path("link"), ""):
            assert "another process trains x" in error(train.main, "--resume", "x")
    run("--resume", "x", "--max-steps", "2", recipe=None)


def test_a_resume_compares_the_corpus(run, error, tmp_path):
    """Another corpus of the same vocabulary is refused; the same one prepared again is taken."""
    source = Path(os.__file__).parent
    documents = [(name, (source / f"{name}.py").read_text()) for name in ("argparse", "ast", "cmd")]
    first = prepare_bytes(documents, tmp_path / "c")
    words = ["--out", "x", "--needle-share", "0", "--max-steps", "1", "--data", "c"]
    train.main([str(tmp_path / "tiny.toml"), *words])
    second = prepare_bytes(documents[:2], tmp_path / "c")
    line = error(train.main, "--resume", "x")
    assert first in line and second in line and first != second
    assert prepare_bytes(documents, tmp_path / "c") == first
    run("--resume", "x", "--max-steps", "2", recipe=None)


def prepare_bytes(documents, folder):
    """Prepare them anew with the bytes as vocabulary -> the corpus's hash."""
    shutil.rmtree(folder, ignore_errors=True)
    prepare(documents, folder, vocab_size=257, source="test")
    return load_corpus(folder).hash


@pytest.mark.parametrize(
    "key,value",
    [("d_ff", 64), ("pattern", "rrrR"), ("window", 8), ("qk_norm", True), ("logit_scale", 0.5)],
)
def test_a_resume_compares_the_model(run, error, tmp_path, key, value):
    run("--out", "x", "--max-steps", "1")
    before = weights(tmp_path / "x")
    path = tmp_path / "x" / "run.json"
    record = json.loads(path.read_text())
    record["recipe"]["model"][key] = value
    path.write_text(json.dumps(record))
    line = error(train.main, "--resume", "x")
    assert "run.json" in line and "config.json" in line
    assert weights(tmp_path / "x") == before


@pytest.mark.parametrize("name", ["training.pt", "model.safetensors", "config.json"])
def test_a_resume_compares_the_bytes(run, error, tmp_path, name, tiny, corpus_folder):
    """One bit, anywhere: zip's own checksums torch does not read, and safetensors has none."""
    run("--out", "x", "--max-steps", "1")
    path = tmp_path / "x" / "last" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    init = (tiny, "--data", corpus_folder, "--init", "x/last", "--out", "y")
    for words in (("--resume", "x"), init):
        line = error(train.main, *words)
        assert name in line and "damaged" in line
    assert not (tmp_path / "y").exists()


def first(state, number):
    """What an optimizer keeps of its first parameter, and the name of its first average."""
    kept = state["optimizers"][number]["state"][0]
    return kept, next(name for name in kept if name != "step")


def momentum(number, value):
    """A change of a checkpoint's state: another first average of the optimizer."""

    def change(state):
        kept, name = first(state, number)
        kept[name] = value

    return change


CRAFTED = {
    "momentum of another shape": momentum(0, torch.zeros(3, 3)),
    "momentum of no shape": momentum(0, torch.zeros(())),
    "an average of another shape": momentum(1, torch.zeros(7)),
    "no tensor": momentum(1, "x"),
    "an average that is missing": lambda s: s["optimizers"][1]["state"][0].pop("exp_avg_sq"),
    "optimizers in another order": lambda s: s["optimizers"].reverse(),
    "one optimizer": lambda s: s["optimizers"].pop(),
    "three": lambda s: s["optimizers"].append({}),
    "none": lambda s: s.update(optimizers=None),
    "a negative step": lambda s: s.update(step=-1),
    "a step beyond the end": lambda s: s.update(step=13),
    "half a step": lambda s: s.update(step=1.5),
    "a best that is no number": lambda s: s.update(best="x"),
}


@pytest.mark.parametrize("change", CRAFTED.values(), ids=CRAFTED)
def test_a_crafted_state_is_one_line(run, error, tmp_path, change):
    """Its checksums are right, and it unpickles to plain types."""
    run("--out", "x", "--max-steps", "1")
    path = tmp_path / "x" / "last" / "training.pt"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)
    checkpoint.write_checksums(path.parent)
    beyond = change is CRAFTED["a step beyond the end"]  # or is it run.json that was changed?
    said = "x/last: step 13 is beyond its run.json" if beyond else "training.pt is damaged"
    assert said in error(train.main, "--resume", "x")


def test_optimizers_are_the_recipes(run, tmp_path):
    """Of a checkpoint they take averages alone: settings are what run.json says."""
    run("--out", "x", "--max-steps", "1")
    path = tmp_path / "x" / "last" / "training.pt"
    state = torch.load(path, weights_only=True)
    state["optimizers"][1]["param_groups"][0].update(betas="x", weight_decay=7.0)
    torch.save(state, path)
    checkpoint.write_checksums(path.parent)
    run("--resume", "x", "--max-steps", "2", recipe=None)
    group = torch.load(path, weights_only=True)["optimizers"][1]["param_groups"][0]
    assert group["betas"] == (0.9, 0.95) and group["weight_decay"] == 0


def test_a_recipe_that_is_no_table_is_damage(run, error, tmp_path):
    run("--out", "x", "--max-steps", "1")
    path = tmp_path / "x" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": "x"}))
    assert "run.json is damaged" in error(train.main, "--resume", "x")


def test_a_checkpoint_with_more_embeddings_than_its_tokenizer_has_tokens(
    run, error, tmp_path, tiny, corpus_folder
):
    """As `resize_token_embeddings` makes them. They stay; fewer are refused before anything is
    written."""
    run("--out", "x", "--max-steps", "1")
    for rows in (1088, 1000):
        folder = tmp_path / str(rows)
        shutil.copytree(tmp_path / "x" / "last", folder)
        (folder / "checksums.json").unlink()
        model = Transformer.from_pretrained(folder)
        resized = Transformer(replace(model.config, vocab_size=rows))
        resized.save_pretrained(folder)
    run("--out", "y", "--init", "1088", "--max-steps", "1")
    run("--resume", "y", "--max-steps", "2", recipe=None)
    assert Transformer.from_pretrained("y/last").embed_tokens.num_embeddings == 1088
    line = error(train.main, tiny, "--data", corpus_folder, "--init", "1000", "--out", "z")
    assert "1,024 tokens" in line and "1,000" in line and not Path("z").exists()


def test_a_log_loses_only_what_is_no_entry(tmp_path, monkeypatch):
    """Lines beyond the step, cut off, in no encoding or of another kind; and a kill while it is
    written anew loses nothing at all."""
    path = tmp_path / "log.jsonl"
    good = [b'{"step": 1, "loss": 3.5}', b'{"step": 2, "loss": NaN}']
    bad = [b"\xff\xfe", b"[1]", b"7", b"", b'{"loss": 1}', b'{"step": "1"', b'{"step": 3}']
    content = b"\n".join([good[0], *bad, good[1]])
    path.write_bytes(content)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", fails(OSError("killed")))
        Log(path, 2)
    assert path.read_bytes() == content
    log = Log(path, 2)
    log.write(step=3, loss=1.0)
    assert path.read_bytes().splitlines() == [*good, b'{"step": 3, "loss": 1.0}']
    log.file.close()


def fails(error):
    """A function that raises the error, whatever it is called with."""

    def failing(*_, **__):
        raise error

    return failing


def test_only_folders_of_the_run_are_removed(run, tmp_path):
    folder = tmp_path / "x"
    run("--out", "x", "--max-steps", "2")
    shutil.copytree(folder / "last", folder / "step-backup")
    shutil.copytree(folder / "last", folder / "step-000007")
    (folder / "step-000002").rename(folder / "step-mine!")  # a link that its owner has set anew
    (folder / "last").unlink()
    (folder / "last").symlink_to("step-mine!")
    run("--resume", "x", "--max-steps", "4", recipe=None)
    assert {path.name for path in folder.glob("step-*")} == {
        "step-backup",
        "step-000007",
        "step-mine!",
        "step-000004",
    }


def test_beyond_a_million_steps_former_checkpoints_go_too(tmp_path):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        target = tmp_path / f"step-{step:06d}"
        target.mkdir()
        checkpoint.repoint(target, ("last", "best") if step == 999_999 else ("last",))
    assert {path.name for path in tmp_path.glob("step-*")} == {"step-999999", "step-1000001"}


def test_without_git_nothing_is_recorded(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run("--out", "x", "--max-steps", "0")
    assert json.loads((tmp_path / "x" / "run.json").read_text())["git"] is None


def test_a_bare_resume_looks_where_training_writes(run, error, tiny, tmp_path, monkeypatch):
    run("--max-steps", "1")
    train.main([str(tiny), "--resume", "--max-steps", "2"])
    assert logged_steps(tmp_path / "out" / "tiny-r16r16r16N-s1") == [1, 2]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "nothing to resume" in error(train.main, tiny, "--resume")


def test_a_disk_without_links_and_a_system_like_windows(run, tmp_path, monkeypatch, capsys):
    """No links; no folder can be opened to sync it, no file be synced by a handle that only reads;
    no fcntl, no resource. A run, its resume and a sample; two copies of a checkpoint stay."""
    fcntl = pytest.importorskip("fcntl")  # to emulate Windows takes another system
    real_open, real_sync, flags = os.open, os.fsync, fcntl.fcntl

    def windows_open(path, mode, *args, **more):
        if os.path.isdir(path) and "dir_fd" not in more and not mode & os.O_DIRECTORY:
            raise PermissionError(13, "Permission denied", str(path))
        return real_open(path, mode, *args, **more)

    def windows_sync(descriptor):
        if flags(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        real_sync(descriptor)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_sync)
    monkeypatch.setattr(os, "symlink", fails(OSError("A required privilege is not held")))
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    run("--out", "out/x", "--max-steps", "8")
    run("--resume", "out/x", recipe=None)
    names = {path.name for path in (tmp_path / "out" / "x").iterdir()}
    assert names == {"run.json", "log.jsonl", "last", "best"}
    assert not (tmp_path / "out" / "x" / "last").is_symlink()
    sample.main(["--prompt", "def ", "--max-new-tokens", "2"])
    assert "2 new tokens" in capsys.readouterr().out

    monkeypatch.undo()
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    run("--out", "whole")
    assert weights(tmp_path / "out" / "x") == weights(tmp_path / "whole")


# Output that nobody reads, disks that are full, interrupts


def leave_unread(how, monkeypatch):
    """Standard output and standard error as a shell leaves them. Not a fixture: between one and its
    test, pytest captures both anew."""
    if how == "closed":
        streams = None, None
    elif how == "/dev/full":
        streams = open("/dev/full", "w"), open("/dev/full", "w", buffering=1)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        streams = os.fdopen(writer, "w"), os.fdopen(os.dup(writer), "w", buffering=1)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])


UNREAD = pytest.mark.parametrize("how", ["closed", "/dev/full", "a reader that has gone"])


@UNREAD
def test_a_training_that_nobody_reads_goes_on_to_its_end(
    tiny, corpus_folder, tmp_path, monkeypatch, how
):
    words = ["--data", str(corpus_folder), "--eval-questions", "4", "--eval-every", "4"]
    leave_unread(how, monkeypatch)
    train.main([str(tiny), "--out", str(tmp_path / "x"), *words])
    assert logged_steps(tmp_path / "x") == list(range(1, 13))
    final = json.loads((tmp_path / "x" / "log.jsonl").read_text().splitlines()[-1])
    assert final["final"] and final["step"] == 12 and final["table"]


@UNREAD
def test_a_sample_that_nobody_reads_ends_in_silence(run, monkeypatch, how):
    run("--out", "out/x", "--max-steps", "1")
    leave_unread(how, monkeypatch)
    sample.main(["--prompt", "def ", "--max-new-tokens", "3"])


@pytest.mark.parametrize(
    "where,problem",
    [
        ("torch.save", RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos")),
        ("checkpoint.save_file", SafetensorError("I/O error: No space left on device")),
        ("os.replace", OSError(28, "No space left on device")),
        ("run.Log.write", OSError(28, "No space left on device")),
        ("run.checkpoint.replace_file", PermissionError(13, "Permission denied")),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(run, error, tmp_path, monkeypatch, where, problem):
    """And the last checkpoint stays whole."""
    run("--out", "x", "--max-steps", "1")
    before = weights(tmp_path / "x")
    monkeypatch.setattr(where, fails(problem))
    assert re.search("space|position|pos|denied", error(train.main, "--resume", "x"))
    monkeypatch.undo()
    checkpoint.verify_checksums(tmp_path / "x" / "last")
    assert weights(tmp_path / "x") == before
    assert not list((tmp_path / "x").glob("*.partial"))


def test_an_interrupt_says_how_to_go_on(run, error, tiny, corpus_folder, tmp_path, monkeypatch):
    words = [tiny, "--data", corpus_folder, "--out", "x"]
    with monkeypatch.context() as patch:
        patch.setattr(train, "begin", fails(KeyboardInterrupt))
        assert error(train.main, *words) == "error: interrupted after step 0"
    real, calls = train.update, []

    def update(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train, "update", update)
    line = error(train.main, *words)
    assert line == "error: interrupted after step 2: go on with --resume x"
    run("--resume", "x", recipe=None)
    assert logged_steps(tmp_path / "x") == list(range(1, 13))


# Recipes


def test_phases_carry_overrides_and_start_schedules():
    recipe = recipes.build(
        {
            "batch_tokens": 2048,
            "lr": 0.01,
            "warmup": 4,
            "model": {"window": 64},
            "phase": [
                {"steps": 10, "lengths": {"128": 1}, "needle_share": 0.5},
                {"steps": 10, "lengths": {"512": 3, "2048": 1}, "rope_theta": 20000},
                {"steps": 5, "lengths": {"2048": 1}, "lr": 0.001, "pattern": "N", "warmup": 0},
            ],
        }
    )
    first, second, third = recipe.stages()
    assert [s.config.pattern for s in (first, second, third)] == ["rrrN", "rrrN", "N"]
    assert [s.config.rope_theta for s in (first, second, third)] == [10000.0, 20000.0, 20000.0]
    assert [s.config.trained_length for s in (first, second, third)] == [128, 2048, 2048]
    assert [s.needle_share for s in (first, second, third)] == [0.5] * 3
    assert [second.length(step) for step in range(10, 18)] == [512, 512, 512, 2048] * 2
    rates = [(first if step < 10 else second).rate(step) for step in range(20)]
    assert rates.index(max(rates)) == 4 and max(rates) == pytest.approx(0.01)
    # one cosine over both phases, to a tenth
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[-1] < 0.0012
    assert third.rate(20) == pytest.approx(0.001)


def test_a_warmup_alone_starts_a_schedule_too():
    """Of the rate that holds; else the running one would jump."""
    phases = [{"steps": 10, "lengths": {"128": 1}} for _ in range(2)]
    phases[1]["warmup"] = 4
    recipe = recipes.build({"lr": 0.01, "warmup": 0, "batch_tokens": 128, "phase": phases})
    first, second = recipe.stages()
    assert (first.rate(0), first.rate(9) < 0.0015) == (0.01, True)
    assert [second.rate(step) for step in (10, 14)] == pytest.approx([0.002, 0.01])


def test_yarn_without_a_length_takes_the_one_trained_before():
    tables = {
        "model": {"pattern": "R"},
        "phase": [
            {"steps": 1, "lengths": {"128": 1}},
            {"steps": 1, "lengths": {"512": 1}, "rope_scaling": "yarn", "rope_factor": 4},
        ],
    }
    length = lambda recipe: recipe.stages()[1].config.rope_original_length
    assert length(recipes.build(tables)) == 128
    assert length(recipes.build(tables, {"rope_original_length": 64})) == 64  # what is given counts
    had = recipes.build(tables).stages()[1].config  # another scaling's length is none of it
    again = {"phase": [tables["phase"][0], tables["phase"][1] | {"lengths": {"1024": 1}}]}
    assert had.rope_original_length == 128 and length(recipes.build(again, base=had)) == 512


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_recipe_builds_its_model(path):
    recipe = recipes.build(recipes.read_toml(path), name=path.name)
    with torch.device("meta"):
        Transformer(recipe.model)
    assert recipes.build(recipes.to_tables(recipe)) == recipe


def test_run_names():
    build = lambda **model: recipes.build(
        {"model": model, "phase": [{"steps": 1, "lengths": {"128": 1}}]}
    )
    assert recipes.run_name(build(pattern="rrrN", window=64), "laptop") == "laptop-r64r64r64N-s1"
    assert recipes.run_name(build(pattern="R", qk_norm=True), "laptop") == "laptop-R-s1-qk"


# Needles


@pytest.mark.parametrize(
    "length,hidden,asked,depth",
    [(129, 4, 4, None), (513, 8, 4, 0.0), (513, 8, 4, 1.0), (1024, 1, 1, 0.5)],
)
def test_needles_lie_where_the_segments_say(corpus_folder, length, hidden, asked, depth):
    corpus = load_corpus(corpus_folder)
    tokenizer = corpus.tokenizer
    for evaluation in (False, True):
        needles = Needles(tokenizer, corpus.val if evaluation else corpus.train, evaluation)
        example = needles.example(np.random.default_rng(3), length, hidden, asked, depth)
        assert len(example.tokens) == len(example.answer) == len(example.segment) == length
        assert example.tokens[0] == tokenizer.eot_token
        text = lambda mask: tokenizer.decode_bytes(example.tokens[mask].tolist()).decode()
        lines, questions = (
            text(example.segment == NEEDLE).splitlines(),
            text(example.segment == QC).splitlines(),
        )
        assert len(lines) == len(set(lines)) == hidden and len(questions) == asked
        assert set(questions) <= set(lines)  # each question's answer stands in the context
        keys = [line.split()[1] for line in lines]
        assert len(set(keys)) == hidden
        for i, question in enumerate(questions):
            key, _, value = question.split()[1:]
            assert text(example.answer == i) == value
            assert held_out(key) == held_out(value) == evaluation
            assert len(tokenizer.encode_ordinary(" " + key)) >= 2
        assert (example.segment[:10] != CONTEXT).all() and (example.segment[0] == BEGIN)
        assert (
            np.flatnonzero(example.segment == QC)
            == np.arange(length - (example.segment == QC).sum(), length)
        ).all()
        if depth is not None:
            first = questions[0]
            at = [i for i, line in enumerate(lines) if line == first][0]
            starts = np.flatnonzero(
                (example.segment == NEEDLE) & (example.tokens == tokenizer.encode_ordinary("#")[0])
            )
            assert abs(starts[at] / length - depth) < 0.3


def test_needle_score_on_planted_answers(corpus_folder, monkeypatch):
    """A "model" that knows the answers scores 1, one that is wrong in the last digit of each scores
    0 with the other digits right."""
    corpus = load_corpus(corpus_folder)
    needles = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    examples = [needles.example(np.random.default_rng(i), 300, 4, 2) for i in range(3)]

    class Oracle(torch.nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.p, self.wrong = torch.nn.Parameter(torch.zeros(())), wrong

        def new_cache(self, batch_size, max_length):
            return []

        def hidden(self, tokens, cache):
            read = np.concatenate((*cache, tokens[0].numpy()))
            example = next(e for e in examples if np.array_equal(e.tokens[:-1], read))
            self.next = example.tokens[1:].copy()
            ends = np.flatnonzero(
                (example.answer[1:] >= 0)
                & (np.append(example.answer[2:], -1) != example.answer[1:])
            )
            if self.wrong:
                self.next[ends] = 0
            return torch.from_numpy(self.next)[None, -tokens.shape[1] :, None].float()

        def unembed(self, hidden):
            return torch.nn.functional.one_hot(hidden[..., 0].long(), 1024).float()

    read = lambda model, tokens, cache: cache.append(tokens[0].numpy())
    monkeypatch.setattr(evaluate, "fill", read)
    right, wrong = needle_score(Oracle(False), examples), needle_score(Oracle(True), examples)
    assert (right.exact, right.digits, right.error, right.questions) == (1, 1, 0, 6)
    assert (wrong.exact, wrong.digits) == (0, pytest.approx(1 - 1 / DIGITS))


def test_validation_loss_leaves_end_of_text_out(corpus_folder):
    """Against a slow sum over the targets, in nats and in bits per byte of the text."""
    corpus = load_corpus(corpus_folder)
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig(window=16, vocab_size=1024, d_model=32, n_head=2, n_kv_head=1, d_ff=32)
    )
    nats, bits = validation_loss(model, corpus, 200, 1000)
    total = counted = size = 0
    for window in validation_windows(corpus, 200, 5):
        logp = model(window[None, :-1])[0].log_softmax(-1)
        for i, target in enumerate(window[1:].tolist()):
            if target != corpus.tokenizer.eot_token:
                total -= logp[i, target].item()
                counted += 1
                size += len(corpus.tokenizer.token_bytes(target))
    assert nats == pytest.approx(total / counted, rel=1e-4)  # float32 sums of a thousand terms
    assert bits == pytest.approx(total / np.log(2) / size, rel=1e-4)


# The README's commands, on a small corpus


def test_train_then_sample_as_subprocesses(tiny, corpus_folder, tmp_path, monkeypatch, capsys):
    words = tiny, "--data", corpus_folder, "--eval-questions", 8
    done = Command(ROOT / "train.py", *words, folder=tmp_path).wait()
    assert done.status == 0, done.err
    for part in ("validation loss", "bits per byte", "needles", "greedy sample"):
        assert part in done.out
    assert (tmp_path / "out" / "tiny-r16r16r16N-s1" / "last" / "model.safetensors").is_file()
    words = ("--max-new-tokens", "20", "--temperature", "0")
    done = Command(ROOT / "sample.py", *words, folder=tmp_path, said="def naïve(").wait()
    assert done.status == 0, done.err
    assert done.out.startswith("def naïve(") and "new tokens" in done.out.splitlines()[-1]
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    sample.main(["--prompt", "def naïve(", *words])
    assert capsys.readouterr().out.splitlines()[:-1] == done.out.splitlines()[:-1]
    curves.main(["out/tiny-r16r16r16N-s1", "--out", "curves.png"])
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


# Bad input: one line, status 2, nothing half-written

MODEL = "batch_tokens = 512\n[model]\nwindow = 16\n"
PHASE = "[[phase]]\nsteps = 1\nlengths = { 128 = 1 }\n"


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--patern", "R"], ["--patern", "--pattern"]),
        (["--window", "wide"], ["--window", "wide"]),
        (["--window", "0"], ["window 0"]),
        (["--pattern", "rxN"], ["'rxN'", "'x'"]),
        (["--pattern", "rrN"], ["'rrN'", "4 layers"]),
        (["--max-steps", "-1"], ["-1"]),
        (["--micro-batch", "0"], ["0"]),
        (["--device", "cuda"], ["cuda", "cpu"]),
        (["--device", "abacus"], ["abacus"]),
        (["--backend", "magic"], ["magic"]),
        (["--device", "cpu", "--backend", "flex"], ["flex", "cpu", "banded"]),
        (["--clip", "nan"], ["nan"]),
        (["--lr", "0.1"], ["--lr", "phase 2"]),
        (["--needle-share", "1.5"], ["1.5"]),
        (["--rope-theta", "30000"], ["--rope-theta", "phase 2"]),
        (["--data", "nowhere"], ["nowhere", "data.prepare"]),
        (["--init", "nowhere"], ["nowhere"]),
        (["--out", "/proc/none/x"], ["/proc/none"]),
        (["--out", "run\udcff"], ["UTF-8", "--out"]),
        (["stray"], ["stray"]),
    ],
)
def test_bad_flags(error, tiny, corpus_folder, tmp_path, monkeypatch, flags, words):
    if flags[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    line = error(
        train.main, tiny, *([] if "--data" in flags else ["--data", corpus_folder]), *flags
    )
    assert all(word in line for word in words), line
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "text,words",
    [
        (MODEL, ["no [[phase]]"]),
        (MODEL + "patern = 'R'\n" + PHASE, ["patern", "'pattern'"]),
        ("lrr = 1\n" + MODEL + PHASE, ["lrr", "'lr'"]),
        (MODEL + PHASE + "stepz = 1\n", ["stepz", "'steps'"]),
        ("lr = 'fast'\n" + MODEL + PHASE, ["lr", "'fast'", "float"]),
        (MODEL + "qk_norm = 1\n" + PHASE, ["qk_norm", "bool"]),
        ("[model]\nwindow = 0\n" + PHASE, ["window 0"]),
        (MODEL + "[[phase]]\nsteps = 1\n", ["lengths"]),
        (MODEL + "[[phase]]\nsteps = 1\nlengths = 128\n", ["lengths", "128"]),
        (MODEL + "[[phase]]\nsteps = 1\nlengths = { long = 1 }\n", ["lengths", "long"]),
        (MODEL + "[[phase]]\nsteps = 1\nlengths = { 100 = 1 }\n", ["100", "512"]),
        (MODEL + "[[phase]]\nsteps = 0\nlengths = { 128 = 1 }\n", ["steps 0"]),
        (MODEL + PHASE + "length_scale = 'ssmax'\n", ["ssmax", "[model]"]),
        (
            MODEL + "length_scale = 'ssmax'\n" + PHASE + PHASE + "length_scale = 'swan'\n",
            ["phase 2", "ssmax", "[model]"],
        ),
        (MODEL + PHASE + "pattern = 'q'\n", ["phase 1", "'q'"]),
        ("[model\n", ["TOML"]),
        (
            MODEL.replace("512", "1_048_576") + PHASE.replace("128", "1048576"),
            ["1,048,576", "larger"],
        ),
        (
            "needle_share = 1.0\n" + MODEL + "[[phase]]\nsteps = 1\nlengths = { 16 = 1 }\n",
            ["16", "needle"],
        ),
    ],
)
def test_bad_recipes(error, corpus_folder, tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.toml"
    path.write_text(text)
    line = error(train.main, path, "--data", corpus_folder)
    assert all(word in line for word in words), line
    assert not (tmp_path / "out").exists()


def test_a_missing_recipe_names_those_that_are_there(error):
    assert "laptop.toml" in error(train.main, "recipes/lapptop.toml")


def test_bad_runs(run, error, corpus_folder, tmp_path, tiny):
    run("--out", "x", "--max-steps", "2")
    before = weights(tmp_path / "x")
    assert "--resume" in error(train.main, tiny, "--data", corpus_folder, "--out", "x")
    assert "nothing to resume" in error(train.main, "--resume", "nothing")
    assert "--lr" in error(train.main, "--resume", "x", "--lr", "1")
    assert "--seed" in error(train.main, "--resume", "x", "--seed", "2")
    assert "d_model" in error(
        train.main,
        tiny,
        "--data",
        corpus_folder,
        "--out",
        "y",
        "--init",
        "x/last",
        "--d-model",
        "64",
    )
    assert "--pattern" in error(
        train.main,
        write(tmp_path, TINY.replace("[model]", "[model]\npattern = 'R'")),
        "--data",
        corpus_folder,
        "--out",
        "y",
        "--init",
        "x/last",
    )
    start = (tiny, "--data", corpus_folder, "--out", "y", "--init", "x/last")
    assert "length_scale" in error(train.main, *start, "--length-scale", "ssmax")
    assert weights(tmp_path / "x") == before and not (tmp_path / "y").exists()
    for name in ("config.json", "model.safetensors", "training.pt", "tokenizer.tiktoken"):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "x", tmp_path / "bad", symlinks=True)
        path = tmp_path / "bad" / "last" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert name in error(train.main, "--resume", "bad")


def write(folder, text):
    path = folder / "other.toml"
    path.write_text(text)
    return path


def test_a_checkpoint_and_a_corpus_with_other_tokenizers(run, error, corpus_folder, tmp_path, tiny):
    run("--out", "x", "--max-steps", "1")
    source = Path(os.__file__).parent
    prepare(
        [(name, (source / f"{name}.py").read_text()) for name in ("argparse", "inspect")],
        tmp_path / "other",
        vocab_size=1024,
        source="test",
    )
    assert "tokenizer" in error(
        train.main, tiny, "--data", tmp_path / "other", "--init", "x/last", "--out", "y"
    )


def test_a_loss_that_is_not_finite_stops_the_run(
    run, error, tmp_path, corpus_folder, tiny, monkeypatch
):
    real = Transformer.loss
    calls = []
    monkeypatch.setattr(
        Transformer,
        "loss",
        lambda self, *a: (
            real(self, *a)
            * (
                float("nan")
                if self.training and calls.append(1) is None and len(calls) == 4
                else 1.0
            )
        ),
    )
    line = error(train.main, tiny, "--data", corpus_folder, "--out", "x", "--device", "cpu")
    assert "step 3" in line and "nan" in line and "rate" in line and "norm" in line
    assert torch.isfinite(
        Transformer.from_pretrained(tmp_path / "x" / "last").embed_tokens.weight
    ).all()


def test_a_validation_loss_that_is_not_finite_keeps_the_last_good_checkpoint(
    run, error, corpus_folder, tiny, monkeypatch
):
    """The update before it was of finite gradients, and broke the weights."""
    real = train.validation_loss
    run("--out", "x", "--max-steps", "1")
    run("--resume", "x", "--max-steps", "2", recipe=None)
    good, log = os.readlink("x/last"), Path("x/log.jsonl").read_text()

    def broken(model, *rest):
        model.embed_tokens.weight.data[:] = math.inf
        return real(model, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(train, "validation_loss", broken)
        line = error(train.main, "--resume", "x", "--max-steps", "4")
    assert "step 4: the validation loss is nan" in line and "lower --lr" in line
    assert "the last good checkpoint is x/last" in line and os.readlink("x/last") == good
    assert Path("x/log.jsonl").read_text().startswith(log) and "NaN" not in log
    assert all(p.isfinite().all() for p in Transformer.from_pretrained("x/last").parameters())


def test_a_folder_of_somebody_else_is_not_overwritten(run, error, tiny, corpus_folder):
    """Whose last/ is no checkpoint, or whose log tells of a training."""
    words = [tiny, "--data", corpus_folder, "--out"]
    Path("p/last").mkdir(parents=True)
    Path("p/last/precious").write_text("mine")
    assert "p/last is no checkpoint: choose another --out" in error(train.main, *words, "p")
    assert Path("p/last/precious").read_text() == "mine"

    run("--out", "x", "--max-steps", "2")
    for folder in Path("x").glob("step-*"):
        shutil.rmtree(folder)  # for want of room
    log = Path("x/log.jsonl").read_text()
    for more in ([*words, "x"], ["--resume", "x"]):
        assert "x/log.jsonl tells of steps whose checkpoints are gone" in error(train.main, *more)
    assert Path("x/log.jsonl").read_text() == log


@pytest.mark.skipif(os.name == "nt", reason="modes, mounts and locks of Linux and macOS")
def test_where_a_run_may_stand(run, error, tiny, corpus_folder, monkeypatch):
    """Readable for others; not a mount point, to which no folder can be moved; and on a disk
    without locks, such as some clusters have."""
    old = os.umask(0o022)
    try:
        run("--out", "x", "--max-steps", "2")
    finally:
        os.umask(old)
    assert {file.stat().st_mode & 0o777 for file in Path("x/last").iterdir()} == {0o644}
    words = [tiny, "--data", corpus_folder, "--max-steps", "1", "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path).name == "m")
        assert "m is a disk of its own" in error(train.main, *words, "m")
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="flock"):
        run("--out", "y", "--max-steps", "2")
    assert logged_steps(Path("y")) == [1, 2]


def test_running_out_of_memory_names_the_knob(run, error, corpus_folder, tiny, monkeypatch):
    def loss(*_):
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "loss", loss)
        assert "--micro-batch" in error(
            train.main, tiny, "--data", corpus_folder, "--out", "x", "--device", "cpu"
        )
    full = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    for where in ("torch.load", "torch.optim.Optimizer.load_state_dict"):  # is not damage
        with monkeypatch.context() as patch:
            patch.setattr(where, fails(full))
            line = error(train.main, "--resume", "x")
            assert "out of memory" in line and "damaged" not in line


@pytest.mark.skipif(os.name == "nt", reason="the memory there is not known")
@pytest.mark.parametrize(
    "flags", ["--d-ff 1000000000", "--d-model 100000 --n-head 2", "--n-head 8 --head-dim 20000000"]
)
def test_a_model_that_no_memory_holds_is_refused_by_arithmetic(
    error, corpus_folder, tiny, monkeypatch, tmp_path, flags
):
    monkeypatch.chdir(tmp_path)
    line = error(train.main, tiny, "--data", corpus_folder, *flags.split())
    name, value = flags.removeprefix("--").split(" ")[:2]
    assert f"{name.replace('-', '_')} {value}" in line and "this machine has" in line


def test_bad_samples(run, error, tmp_path):
    assert "train.py" in error(sample.main, "--prompt", "x")
    run("--out", "out/x", "--max-steps", "1")
    assert "empty" in error(sample.main, "--prompt", "")
    assert "temperature" in error(sample.main, "--prompt", "x", "--temperature", "-1")
    assert "top_k 0" in error(sample.main, "--prompt", "x", "--top-k", "0")
    assert "nowhere" in error(sample.main, "--prompt", "x", "--checkpoint", "nowhere")
    assert "--max-new-tokens" in error(sample.main, "--prompt", "x", "--max-newtokens", "3")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    assert "UTF-8" in error(sample.main, "--file", tmp_path / "bytes")


@pytest.mark.parametrize("flag", ["--prompt", "--file", None])
def test_a_prompt_is_the_same_bytes_wherever_it_comes_from(tmp_path, monkeypatch, flag):
    """Line ends are kept, a byte order mark is skipped, and what is no UTF-8 is refused: on the
    command line Python reads such bytes as surrogates."""

    def read(raw):
        path = tmp_path / "prompt.txt"
        path.write_bytes(raw)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        values = {"--prompt": raw.decode(errors="surrogateescape"), "--file": str(path)}
        return sample.read_prompt(sample.command_line().parse([flag, values[flag]] if flag else []))

    assert read("a\r\n\rnaïve\n".encode()) == "a\r\n\rnaïve\n"
    assert read(b"\xef\xbb\xbfdef ") == "def "
    with pytest.raises(ValueError, match="not UTF-8 .* at byte 3"):
        read(b"caf\xe9")
    monkeypatch.setattr(sys, "stdin", None)  # closed by the shell
    with pytest.raises(ValueError, match="no prompt"):
        sample.read_prompt(sample.command_line().parse([]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_sampling_into_a_full_disk_ends_in_silence(run, monkeypatch, capfd):
    run("--out", "out/x", "--max-steps", "1")
    capfd.readouterr()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        sample.main(["--prompt", "def ", "--max-new-tokens", "5"])
    assert capfd.readouterr().err == ""


def test_samples_never_cut_a_character(run, capsys, monkeypatch, tmp_path):
    """Whatever tokens come, what is printed is whole characters: here a model that spells out an
    emoji byte by byte."""
    run("--out", "out/x", "--max-steps", "1")
    tokenizer = load_tokenizer(tmp_path / "out/x/last")
    emoji = tokenizer.encode_ordinary("🜚 né")
    assert len(emoji) > 5  # several tokens a character
    written_out = lambda *_, **__: (torch.tensor([token]) for token in emoji)
    monkeypatch.setattr(sample, "stream", written_out)
    written = []
    monkeypatch.setattr(
        sample, "print", lambda *words, **more: written.append(" ".join(words)), raising=False
    )
    sample.main(["--prompt", "x"])
    assert "".join(written[1:-1]) == "🜚 né" and not any("�" in piece for piece in written)


def test_several_samples(run, capsys, tmp_path):
    run("--out", "out/x", "--max-steps", "1")
    capsys.readouterr()
    sample.main(["--prompt", "def ", "--samples", "3", "--max-new-tokens", "5", "--seed", "4"])
    first = capsys.readouterr().out
    assert (
        first.count("---\n") == 2
        and first.count("def ") >= 3
        and "in 3 samples" in first.splitlines()[-1]
    )
    sample.main(["--prompt", "def ", "--samples", "3", "--max-new-tokens", "5", "--seed", "4"])
    again = capsys.readouterr().out
    assert again.splitlines()[:-1] == first.splitlines()[:-1]  # reproducible by its seed


def test_a_space_at_the_end_of_a_prompt_belongs_to_the_next_token(run, capsys, monkeypatch):
    """Of "def main" no tokenizer makes "def", " ", "main": a model that reads "def" and " " has
    met that space before digits alone."""
    run("--out", "out/x", "--max-steps", "1")
    tokenizer, seen = load_tokenizer("out/x/last"), []
    words = [next(piece for piece in tokenizer.ranks if piece[:1] == b" " and piece[1:].isalpha())]
    words += [b"("]

    def speaking(model, tokens, count, **settings):
        seen.append(tokens[0, 1:].tolist())
        yield from (torch.tensor([tokenizer.ranks[word]]) for word in words)

    said = b"".join(words).decode()
    monkeypatch.setattr(sample, "stream", speaking)
    for prompt in ("def ", "def", "def  "):
        capsys.readouterr()
        sample.main(["--prompt", prompt])
        assert seen[-1] == tokenizer.encode_ordinary(prompt.removesuffix(" "))
        assert capsys.readouterr().out.startswith(prompt.removesuffix(" ") + said)
    capsys.readouterr()
    sample.main(["--prompt", " "])  # which is read as it is, so that nothing else stands for it
    assert seen[-1] == tokenizer.encode_ordinary(" ")
    assert capsys.readouterr().out.startswith(" " + said)


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a process that is sent an interrupt")
def test_an_interrupt_ends_a_sample_with_a_line(run, tmp_path):
    run("--out", "out/x", "--max-steps", "1")
    model = Transformer.from_pretrained(tmp_path / "out/x/last")
    model.embed_tokens.weight.data[-1] = (
        0  # end-of-text has the logit 0, and some other always has more
    )
    model.save_pretrained(tmp_path / "out/x/last")
    words = ["--prompt", "x", "--max-new-tokens", 100_000, "--temperature", 0]
    sampling = Command(ROOT / "sample.py", *words, "--checkpoint", "out/x/last", folder=tmp_path)
    deadline = time.time() + 60
    while not sampling.out and time.time() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)  # the prompt has been read and generation began
    sampling.send(signal.SIGINT)
    assert sampling.wait(60).status == 2 and sampling.err == "error: interrupted\n"


# Recipes


def documented_commands():
    """(file, words) of every train.py line in the recipes' comments."""
    for path in sorted((ROOT / "recipes").glob("*.toml")):
        text = path.read_text().replace("\\\n#", "")  # a backslash goes on in the next line
        for line in text.splitlines():
            if line.startswith("#     python train.py"):
                yield pytest.param(
                    path, line.split()[3:], id=f"{path.stem}: {' '.join(line.split()[3:])}"
                )


@pytest.mark.parametrize("path,words", list(documented_commands()))
def test_what_recipes_say_to_run_is_accepted(path, words):
    """From the checkpoint that the command names, whose pattern its folder's name tells."""
    args = vars(recipes.command_line("").parse(words))
    file, start = args.pop("recipe") or ROOT / "recipes" / "laptop.toml", args.pop("init", None)
    base = None
    if start is not None:
        pattern = {"drope-laptop-R-s1": "N", "swan-laptop-Nr64r64r64-s1": "Nrrr"}.get(
            start.parent.name
        ) or ("rrrN" if start.parent.name.endswith("N-s1") else "R")
        shape = {
            key: value
            for key, value in recipes.read_toml(ROOT / file)["model"].items()
            if key in SMALL
        }
        window = re.search(r"r(\d+)", start.parent.name)
        base = ModelConfig(
            **shape,
            pattern=pattern,
            window=int(window[1]) if window else None,
            vocab_size=1024,
            trained_length=512,
        )
    flags = {key: value for key, value in args.items() if key not in ("out", "max_steps")}
    made = recipes.build(recipes.read_toml(ROOT / file), flags, base, file.name)
    assert base is None or made.model.pattern == flags.get("pattern", base.pattern)
    assert made.stages()[-1].config.pattern == {"drope-laptop": "N", "convert-laptop": "rrrN"}.get(
        file.stem, made.model.pattern
    )


SMALL = {"n_layer": 4, "n_head": 2, "n_kv_head": 1, "d_model": 32, "d_ff": 48}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda path: path.stem
)
def test_every_recipe_trains_in_miniature(path, corpus_folder, tmp_path, monkeypatch):
    """It parses, its model can be built, and a copy with everything smaller makes two steps in each
    of its phases."""
    tables = recipes.read_toml(path)
    full = recipes.build(tables, name=path.name)
    with torch.device("meta"):
        Transformer(full.model)
    pattern = {
        "extend-laptop-rope": "R",
        "extend-laptop-pi": "R",
        "extend-laptop-ntk": "R",
        "extend-laptop-yarn": "R",
        "convert-laptop": "R",
        "extend-gpu-rope": "R",
    }.get(path.stem)
    tables["model"] |= (
        SMALL
        | ({"window": 16} if "window" in tables["model"] else {})
        | ({"pattern": pattern} if pattern else {})
    )
    tables |= {
        "batch_tokens": 512,
        "eval_tokens": 512,
        "needle_share": 0.5 * tables.get("needle_share", 0),
        "data": str(corpus_folder),
    }
    for phase in tables["phase"]:
        longest = max(map(int, phase["lengths"]))
        phase["lengths"] = {
            str(512 * int(length) // longest): share for length, share in phase["lengths"].items()
        }
        phase["steps"] = 2
    monkeypatch.setattr(train, "needle_score", lambda *_: evaluate.Score(512, 1, 1.0, 1.0, 0.0))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.setattr(recipes, "read_toml", lambda _: tables)
    train.main([str(path), "--out", str(tmp_path / "run")])
    losses = [
        entry["loss"]
        for entry in map(json.loads, (tmp_path / "run" / "log.jsonl").read_text().splitlines())
        if "loss" in entry
    ]
    assert len(losses) == 2 * len(full.phase) and all(np.isfinite(losses))
    trained, wanted = (
        Transformer.from_pretrained(tmp_path / "run" / "last"),
        Transformer(recipes.build(tables).stages()[-1].config),
    )
    assert trained.plan == wanted.plan
    torch.testing.assert_close(*(m.rotary_table(torch.arange(9)) for m in (trained, wanted)))

"""The lab's commands: what they compute from made-up input, and their one-line errors."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.corpus import load_corpus
from data.needles import BEGIN, CONTEXT, NEEDLE, QC, TASKS, Line, Needles, held_out
from data.tokenizer import load_tokenizer
from lab import (
    attention_mass,
    curves,
    long_context,
    loss_by_position,
    needles,
    report,
    runs,
    table,
)
from model import ModelConfig, Transformer


def write_run(folder, pattern, exact, seed=1):
    """A finished run's record."""
    folder.mkdir()
    recipe = {
        "seed": seed,
        "model": {"pattern": pattern, "qk_norm": pattern == "R"},
        "phase": [{"steps": 2, "lengths": {"512": 1}}],
    }
    record = {
        "arguments": ["--pattern", pattern, "--out", "x y"],
        "recipe": recipe,
        "corpus": "c0",
        "python": "3",
        "torch": "2",
        "device": "cpu",
        "threads": 1,
    }
    (folder / "run.json").write_text(json.dumps(record))
    scores = [
        {"length": n, "questions": 200, "exact": exact, "digits": 1.0, "error": 0.01}
        for n in (256, 512)
    ]
    entries = [
        {"step": 1, "loss": 3.0, "seconds": 90.0},
        {"step": 2, "loss": 2.0, "seconds": 30.0},
        {"step": 2, "length": 512, "val_loss": 2.5, "val_bits_per_byte": 1.5, "needles": exact},
        {"step": 2, "final": True, "val_loss": 2.5, "val_bits_per_byte": 1.5, "table": scores},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_the_table_of_runs(tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    write_run(tmp_path / "b", "R", 0.5)
    runs_of = f"{tmp_path / 'a'} {tmp_path / 'b'}"
    table.main(f"{runs_of} --title T --plot {tmp_path / 't.png'}".split())
    text = capsys.readouterr().out
    assert text.startswith("# T\n") and "\npython train.py --pattern rrrN\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert rows[0] == "| `rrrN` | 1 | 2.500 | 1.500 | 0.95 ± 0.01 | 0.95 ± 0.01 | 2.0 |  |"
    assert rows[1].startswith("| `R` QK-Norm |") and rows[1].endswith("not learned in this time |")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    run = tmp_path / "a" / "run.json"  # it first stopped after one step, and went on
    words = {**json.loads(run.read_text()), "arguments": ["--max-steps", "1", "--seed", "1"]}
    run.write_text(json.dumps(words))
    table.main([str(tmp_path / "a")])
    assert "\npython train.py --seed 1\n" in capsys.readouterr().out
    log = tmp_path / "a" / "log.jsonl"  # of one example (--eval-questions 4) there is no error
    log.write_text(log.read_text().replace('"error": 0.01', '"error": NaN'))
    table.main([str(tmp_path / "a")])
    assert "| 0.95 ± nan |" in capsys.readouterr().out


def test_curves(tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    curves.main([str(tmp_path / "a"), "--out", str(tmp_path / "c")])  # a picture all the same
    assert "needles 0.95" in capsys.readouterr().out and (tmp_path / "c.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "main,argv,word",
    [
        (curves.main, ["nowhere"], "nowhere"),
        (curves.main, ["--outt", "x"], "--out"),
        (table.main, ["nowhere"], "nowhere"),
        (curves.main, ["RUN", "--out", "/proc/none/x"], "/proc/none"),
    ],
)
def test_errors_are_one_line(main, argv, word, capsys, tmp_path):
    write_run(tmp_path / "a", "rrrN", 0.95)
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "a") if arg == "RUN" else arg for arg in argv])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and word in error[0]


def test_an_unfinished_run_is_named(tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    log = tmp_path / "a" / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(SystemExit):
        table.main([str(tmp_path / "a")])
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    "gone", ["arguments", "recipe", "corpus", "threads", "val_loss", "exact", "error"]
)
def test_a_run_with_less_than_a_row_needs_is_named(gone, tmp_path, capsys):
    write_run(tmp_path / "a", "rrrN", 0.95)
    for file in (tmp_path / "a" / "run.json", tmp_path / "a" / "log.jsonl"):
        file.write_text(file.read_text().replace(f'"{gone}"', '"else"'))
    with pytest.raises(SystemExit) as stop:
        table.main([str(tmp_path / "a")])
    error = capsys.readouterr().err.splitlines()
    assert (
        stop.value.code == 2
        and len(error) == 1
        and "is damaged" in error[0]
        and str(tmp_path / "a") in error[0]
    )


def test_runs_of_one_name_are_two_lines(tmp_path, capsys):
    for parent, exact in (("x", 0.95), ("y", 0.25)):
        (tmp_path / parent).mkdir()
        write_run(tmp_path / parent / "a", "rrrN", exact)
    runs_of = [str(tmp_path / parent / "a") for parent in "xy"]
    curves.main([*runs_of, "--out", str(tmp_path / "c.png")])
    said = capsys.readouterr().out
    assert "needles 0.95" in said and "needles 0.25" in said


# Needles


@pytest.fixture(scope="module")
def checkpoint(corpus_folder, tmp_path_factory):
    """An untrained model over the test corpus, saved as a checkpoint; its cache must come round and
    its windows bind."""
    corpus, folder = load_corpus(corpus_folder), tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = ModelConfig(
        n_head=2,
        n_kv_head=1,
        d_model=32,
        d_ff=32,
        vocab_size=corpus.tokenizer.n_vocab,
        window=16,
        trained_length=128,
    )
    Transformer(config).save_pretrained(folder)
    corpus.tokenizer.save(folder)
    return folder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("depth", [None, 0.0, 0.5, 1.0])
def test_tasks_hide_what_they_ask(corpus_folder, task, depth):
    corpus = load_corpus(corpus_folder)
    maker = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    for seed in range(5):
        example = maker.task(task, np.random.default_rng(seed), 1024, depth)
        text = lambda ids: corpus.tokenizer.decode_bytes(ids.tolist()).decode()
        assert (
            len(example.tokens) == len(example.answer) == len(example.segment) == 1024
            and example.tokens[0] == corpus.tokenizer.eot_token
        )
        hidden, asked = (
            text(example.tokens[example.segment == kind]).splitlines() for kind in (NEEDLE, QC)
        )
        answers = [text(example.tokens[example.answer == i]) for i in range(len(asked))]
        four = task in ("multi-query", "multi-value", "crowded")
        assert len(asked) == len(example.wrong) == (4 if four else 1)
        for question, answer, wrong in zip(asked, answers, example.wrong):
            assert question.endswith(answer)
            assert (
                wrong.shape == (7, (example.answer == 0).sum())
                and len({text(ids) for ids in wrong}) == 7
            )
            assert not {text(ids) for ids in wrong} & set(answers)  # never another right answer
            rivals = {line.split()[-1] for line in hidden if "equals" not in line}
            rivals -= {answer.strip() for answer in answers}
            first = {text(ids).strip() for ids in wrong[: len(rivals)]}  # the context's come first
            assert first < rivals if task == "crowded" else first == rivals
        if task == "aggregation":
            counts = Counter(line.split()[-1] for line in hidden)
            assert counts.most_common(1)[0] == (answers[0].strip(), 5)
            assert sorted(counts.values())[:-1] == [2] * 7
        else:
            check_facts(task, hidden, asked, answers)
            if depth is not None:
                first = next(line for line in hidden if line.endswith(answers[0]))
                check_depth(example, hidden.index(first), depth)


def check_facts(task, hidden, asked, answers):
    """Each question has one answer among the hidden lines, at the end of its chain if there is
    one, but for multi-value, where one key has several."""
    assert all(held_out(answer) for answer in answers)
    facts = {}
    for line in hidden:  # in order of appearance
        _, key, verb, value = line.split()
        facts.setdefault(key, []).append(value)
        if verb == "equals":
            assert value in facts  # a chain is told from its beginning
    keys = [question.split()[1] for question in asked]
    assert all(held_out(key) for key in facts)
    if task == "multi-value":
        assert len(set(keys)) == 1 and facts[keys[0]] == answers and len(facts) == 5
    else:
        for key, answer in zip(keys, answers):
            (value,) = facts[key]  # one answer
            while value in facts:
                (value,) = facts[value]
            assert value == answer
        order = [hidden.index(question) for question in asked if question in hidden]
        assert order == sorted(order)  # asked in order of appearance
        assert len(facts) == {"single": 1, "variable-tracking": 12, "crowded": 32}.get(task, 8)


def check_depth(example, i, depth):
    """Hidden line i stands at that share of the haystack, or at the end of the line of code there,
    which is rarely longer than 60 tokens."""
    inside, before = example.segment == NEEDLE, np.roll(example.segment, 1) == NEEDLE
    after_a_line = np.roll(example.tokens, 1) == example.tokens[-1]
    place = np.flatnonzero(inside & (~before | after_a_line))[i]
    haystack = (example.segment == CONTEXT) | (example.segment == BEGIN)
    assert abs(haystack[:place].sum() / haystack.sum() - depth) < 60 / haystack.sum()


def test_candidates_have_the_right_number_of_tokens(corpus_folder):
    """With values that are one to five tokens long, as where a vocabulary joins digits."""
    whole = load_corpus(corpus_folder)
    maker = Needles(whole.tokenizer, whole.val, evaluation=True)
    spell = lambda text: np.array([ord(letter) for letter in text])
    maker._line = lambda stem, answer: Line(
        spell(stem + answer.lstrip("0")), len(stem), len(stem + answer.lstrip("0"))
    )
    line, short, other = (maker._line("# a_b is", value) for value in ("12345", "00045", "54321"))
    wrong = maker._wrong(np.random.default_rng(0), line, [line], [short, other], maker._value)
    assert wrong.shape == (7, 5) and wrong[0].tolist() == spell("54321").tolist()


def test_what_does_not_fit_is_named(corpus_folder):
    corpus = load_corpus(corpus_folder)
    maker = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    with pytest.raises(ValueError, match="too short"):
        maker.task("multi-key", np.random.default_rng(0), 64)
    with pytest.raises(ValueError, match="'nonsense' is unknown"):
        maker.task("nonsense", np.random.default_rng(0), 512)
    maker.words = [word for word in maker.words if not held_out(word)] + ["parser"]
    with pytest.raises(ValueError, match="wants 8 names"):
        maker.task("aggregation", np.random.default_rng(0), 512)


@pytest.mark.parametrize("task", ["multi-value", "multi-query", "aggregation"])
def test_likelihood_equals_a_slow_loop(corpus_folder, checkpoint, task):
    """Against one uncached forward for every candidate, with answers longer than a token and of one
    token."""
    corpus, model = load_corpus(corpus_folder), Transformer.from_pretrained(checkpoint)
    seen = set()
    for seed in range(8):
        example = Needles(corpus.tokenizer, corpus.val, evaluation=True).task(
            task, np.random.default_rng(seed), 400
        )
        exact, likely = [], []
        for question, wrong in enumerate(example.wrong):
            (span,) = np.nonzero(example.answer == question)
            nll = []
            for candidate in (example.tokens[span], *wrong):
                sequence = np.concatenate((example.tokens[: span[0]], candidate))
                tokens = torch.from_numpy(sequence)[None]
                targets = tokens[0, span[0] :]
                with torch.no_grad():
                    logits = model(tokens)[0, span[0] - 1 : -1]
                nll.append(F.cross_entropy(logits, targets, reduction="sum").item())
                if len(nll) == 1:
                    exact.append((logits.argmax(-1) == targets).all().item())
            likely.append(nll[0] < min(nll[1:]))
        expected = (np.mean(exact), np.mean(likely))
        assert needles.score(model, example) == expected
        seen.add(expected)
    # an untrained model is sometimes right by chance: the comparison compares something
    assert len(seen) > 1 or task == "aggregation"


def test_needles_command(corpus_folder, checkpoint, tmp_path, capsys):
    cells = "--task single aggregation --lengths 300 200 --depths 0 1 --examples 2"
    where = f"--data {corpus_folder} --out {tmp_path / 'n'}"
    needles.main(f"{checkpoint} {cells} {where}".split())
    text = capsys.readouterr().out
    assert f"{checkpoint}, single: exact ± error / likelihood by the depth" in text
    assert len(re.findall("^ *100%  ", text, re.M)) == len(re.findall("^ *any  ", text, re.M)) == 1
    rows = (tmp_path / "n.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 + 2
    assert rows[1].startswith(f"{checkpoint},single,200,0.0,2,")  # lengths grow
    assert (tmp_path / "n.png").read_bytes()[:4] == b"\x89PNG"


# Loss by position


def test_windows_lie_inside_documents_and_share_no_target():
    ids = np.full(5000, 7)
    eot = 99
    ids[[0, 1000, 1300]] = eot
    found = loss_by_position.windows(ids, eot, 512, 20)
    targets = [position for _, end in found for position in range(end - 128, end)]
    assert len(set(targets)) == len(targets) == 20 * 128
    assert all((ids[end - 512 : end] == 7).all() for _, end in found)
    assert {document for document, _ in found} == {0, 2}  # the second is too short
    assert Counter(document for document, _ in found)[0] == 4  # all that it has
    with pytest.raises(ValueError, match="not 999"):
        loss_by_position.windows(ids, eot, 512, 999)


def test_loss_by_position(corpus_folder, checkpoint, tmp_path, capsys):
    corpus, model = load_corpus(corpus_folder), Transformer.from_pretrained(checkpoint)
    (_, end), *_ = loss_by_position.windows(corpus.val, corpus.tokenizer.eot_token, 600, 1)
    eot = corpus.tokenizer.eot_token
    for context in (128, 600):
        sequence = torch.tensor([[eot, *corpus.val[end - context : end].tolist()]])
        with torch.no_grad():
            logits = model(sequence[:, :-1])[0, -128:]
        plain = F.cross_entropy(logits, sequence[0, -128:]).item()
        found = loss_by_position.loss(model, corpus.val, end, context, eot)
        assert found == pytest.approx(plain, rel=1e-5)
    where = f"--data {corpus_folder} --out {tmp_path / 'l'}"
    loss_by_position.main(f"{checkpoint} --windows 4 --contexts 128 256 {where}".split())
    assert "over 4 windows from" in capsys.readouterr().out
    assert len((tmp_path / "l.csv").read_text().splitlines()) == 3
    assert (tmp_path / "l.png").exists()


# What-ifs


def test_a_setting_measures_what_a_checkpoint_with_it_would(
    corpus_folder, checkpoint, tmp_path, capsys
):
    """--set against a folder whose config.json says the same, and against none; the name in the CSV
    says which settings were in force."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    model = Transformer.from_pretrained(checkpoint)
    model.config = replace(model.config, pattern="rN", window=5, rope_theta=2e6)
    model.save_pretrained(other)
    settings = ["pattern=rN", "window=5", "rope_theta=2e6"]
    rows = {}
    for name, argv in {
        "plain": [str(checkpoint)],
        "saved": [str(other)],
        "set": [str(checkpoint), "--set", *settings],
        "twice": [str(checkpoint), "--set", *settings[:1], "--set", *settings[1:]],
    }.items():
        argv += ["--data", str(corpus_folder), "--contexts", "256", "--windows", "2"]
        loss_by_position.main([*argv, "--out", str(tmp_path / name)])
        (rows[name],) = (tmp_path / f"{name}.csv").read_text().splitlines()[1:]
    assert rows["set"] == rows["twice"]
    name, numbers = rows["set"].split(",", 1)
    assert name == f"{checkpoint} pattern=rN window=5 rope_theta=2e6"
    assert rows["saved"] == f"{other},{numbers}"
    assert rows["plain"].split(",", 1)[1] != numbers


@pytest.mark.parametrize("main", [needles.main, attention_mass.main])
def test_every_command_over_checkpoints_takes_settings(main, corpus_folder, checkpoint, tmp_path):
    """The layers that a measurement sees are those of the setting, and its rows say which."""
    argv = f"{checkpoint} --data {corpus_folder} --lengths 200 --examples 1".split()
    main([*argv, "--set", "pattern=rrrR", "--out", str(tmp_path / "m")])
    _, *rows = (tmp_path / "m.csv").read_text().splitlines()
    assert rows and all(row.startswith(f"{checkpoint} pattern=rrrR,") for row in rows)
    if main is attention_mass.main:
        assert "NoPE" not in (tmp_path / "m-heads.csv").read_text()


@pytest.mark.parametrize(
    "setting,words",
    [
        ("patern=rrrR", "patern=rrrR .*did you mean pattern="),
        ("pattern", "did you mean pattern="),
        ("colour=red", "it takes pattern, window, "),
        ("qk_norm=true", "qk_norm is part of the trained model"),
        ("n_layer=8", "n_layer is part of the trained model"),
        ("length_scale=ssmax", "without its weights"),
        ("rope_theta=much", "rope_theta 'much' is no float"),
        ("window=2.5", "window '2.5' is no int"),
        ("window=0", "window 0 is below 1"),
        ("pattern=rrrX", "unknown letter 'X'"),
    ],
)
def test_what_cannot_be_set(setting, words):
    with pytest.raises(ValueError, match=words):
        report.what_if(ModelConfig(), [setting])


def test_a_model_that_has_the_weights_may_use_them():
    config = ModelConfig(length_scale="ssmax", trained_length=64)
    assert report.what_if(config, ["length_scale=ssmax"]) == config
    assert report.what_if(config, ["length_scale=none"]).length_scale == "none"


@pytest.mark.parametrize(
    "main,argv,word",
    [
        (needles.main, ["nowhere"], "nowhere"),
        (needles.main, ["CHECKPOINT", "--set", "patern=R"], "did you mean pattern"),
        (loss_by_position.main, ["CHECKPOINT", "--set", "qk_norm=true"], "qk_norm"),
        (attention_mass.main, ["CHECKPOINT", "--set", "length_scale=ssmax"], "ssmax"),
        (needles.main, ["CHECKPOINT", "--depths", "2"], "--depths 2"),
        (needles.main, ["CHECKPOINT", "--task", "double"], "'double'"),
        (needles.main, ["CHECKPOINT", "--lengths", "20"], "20"),
        (
            needles.main,
            ["CHECKPOINT", "--lengths", "110", "--depths", "0.5"],
            "110",
        ),  # some examples fit
        (needles.main, ["CHECKPOINT", "--lengths", "200", "--out", "/proc/x"], "/proc/x"),
        (needles.main, ["CHECKPOINT", "--lengths", "200", "--out", "FOLDER"], ".png"),
        (needles.main, ["CHECKPOINT", "--examples", "0"], "--examples 0"),
        (needles.main, ["CHECKPOINT", "--data", "nowhere"], "nowhere"),
        (loss_by_position.main, ["CHECKPOINT", "--windows", "0"], "--windows 0"),
        (loss_by_position.main, ["CHECKPOINT", "--contexts", "100"], "--contexts 100"),
        (loss_by_position.main, ["CHECKPOINT", "--windows", "100000"], "100000"),
    ],
)
def test_errors_about_checkpoints(
    main, argv, word, corpus_folder, checkpoint, capsys, tmp_path, monkeypatch
):
    """One line, and no file left behind."""
    monkeypatch.chdir(tmp_path)
    blocked = tmp_path.parent / f"{tmp_path.name}-blocked"
    if "FOLDER" in argv:
        Path(f"{blocked}.png").mkdir()  # what --out FOLDER cannot write
    known = {"CHECKPOINT": str(checkpoint), "FOLDER": str(blocked)}
    argv = [known.get(arg, arg) for arg in argv]
    with pytest.raises(SystemExit) as stop:
        main([*argv, *([] if "--data" in argv else ["--data", str(corpus_folder)])])
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(error) == 1 and word in error[0]
    assert not list(tmp_path.iterdir()) and not Path(f"{blocked}.csv").exists()


# Records and the long-context experiment


def test_keys_depend_on_everything_that_decides_the_numbers(corpus_folder):
    corpus = load_corpus(corpus_folder)
    plain = runs.Plan("laptop")
    others = [
        runs.Plan("extend-laptop"),
        runs.Plan("laptop", (("lr", "0.01"),)),
        runs.Plan("laptop", init=plain),
        runs.Plan("laptop", init=runs.Plan("extend-laptop")),
    ]
    assert plain.key(corpus) == runs.Plan("laptop").key(corpus)
    assert len({plan.key(corpus) for plan in (plain, *others)}) == 5
    twice = [
        runs.Plan("laptop", flags).key(corpus)
        for flags in ((("lr", "0.01"), ("stretch", "2")), (("stretch", "2"), ("lr", "0.01")))
    ]
    assert twice[0] == twice[1]  # the order of flags decides nothing


def test_trainings_start_and_go_on(corpus_folder, tmp_path, monkeypatch):
    corpus, commands = load_corpus(corpus_folder), []
    run = lambda words: commands.append(words) or SimpleNamespace(returncode=status)
    status = 0
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setattr(runs.subprocess, "run", lambda words, **_: run(words[2:]))
    base = runs.Plan("laptop", (("pattern", "R"), ("qk-norm", "")))
    folder = runs.trained(base, corpus)
    recipe = str(runs.HERE / "recipes" / "laptop.toml")
    assert commands == [
        [recipe, "--out", str(folder), "--data", str(corpus_folder), "--pattern", "R", "--qk-norm"]
    ]
    runs.trained(base, corpus)  # started anew: it had not come to a checkpoint
    assert commands.pop() == commands[0]
    (folder / "last").mkdir(parents=True)  # cut off after a checkpoint
    runs.trained(base, corpus)
    assert commands[1] == ["--resume", str(folder)]
    for log in ("", '{"step": 1, "fin'):  # killed early, killed while writing
        (folder / "log.jsonl").write_text(log)
        runs.trained(base, corpus)
    assert commands[2:] == commands[1:2] * 2
    del commands[2:]
    (folder / "log.jsonl").write_text('{"step": 1, "final": true}\n')
    assert runs.trained(base, corpus) == folder and len(commands) == 2  # finished: nothing runs
    runs.trained(runs.Plan("extend-laptop", (), base), corpus)
    assert commands[2][-2:] == ["--init", str(folder / "last")]
    status = 2
    with pytest.raises(ValueError, match="status 2.*says why; what is done is kept"):
        runs.trained(runs.Plan("extend-laptop", (), base), corpus)


@pytest.mark.parametrize(
    "exact,loss,rate",
    [
        ((0.99, 0.85, 0.4), (4.3, 4.1, 4.0), 0.006),  # the lowest loss of those that learned
        ((0.6, 0.7, 0.3), (4.0, 4.1, 4.2), 0.006),  # none has learned: what was found
        ((0.01, 0.02, 0.0), (4.3, 4.2, 4.1), 0.01),  # nothing was found: the loss
    ],
)
def test_how_a_rate_is_chosen(monkeypatch, exact, loss, rate):
    of = lambda values, plan: dict(zip(runs.RATES, values))[plan.rate]
    record = lambda plan, *_, **what: {
        "recipe": plan.toml,
        "val_loss": of(loss, plan),
        "table": [{"length": 512, "exact": of(exact, plan)}],
    }
    monkeypatch.setattr(runs, "record", record)
    plan, made = runs.best("laptop", (), None)
    assert plan.rate == rate and made == record(plan)


def test_a_crowded_example_wants_room(corpus_folder):
    corpus = load_corpus(corpus_folder)
    maker = Needles(corpus.tokenizer, corpus.val, evaluation=True)
    for length in (16, 48, 64, 96):
        with pytest.raises(ValueError, match=f"{length} is too short"):
            maker.task("crowded", np.random.default_rng(1), length)


def test_records_are_made_once(corpus_folder, checkpoint, tmp_path, monkeypatch):
    corpus, folder, asked = load_corpus(corpus_folder), tmp_path / "run", []
    write_run(folder, "rrrN", 0.95)
    shutil.copytree(checkpoint, folder / "last")
    monkeypatch.setattr(runs, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    monkeypatch.setattr(runs, "EXAMPLES", 2)
    monkeypatch.setattr(runs, "MASS_EXAMPLES", 2)
    monkeypatch.setattr(runs, "trained", lambda plan, _: asked.append(plan) or folder)
    plan = runs.Plan("laptop")
    made = runs.record(plan, corpus)
    lines = lambda: (tmp_path / "records").read_text().splitlines()
    assert len(lines()) == 1 and made["curve"] == [[2, 0.95]]
    again = runs.record(plan, corpus)
    assert made == again and asked == [plan]
    assert made["val_loss"] == 2.5 and len(made["needles"]) == 15
    scaled = runs.record(plan, corpus, {"length_scale": "swan"})
    assert scaled["treatment"] == {"length_scale": "swan"}
    assert len(lines()) == 2 and "val_loss" not in scaled

    # the needle record says that too
    assert runs.record(plan, corpus, what="run") == made and len(asked) == 2

    masses = runs.record(plan, corpus, what="attention")
    lengths = [row["length"] for row in masses["masses"] if row["layers"] == "NoPE"]
    assert lengths == [512, 2048, 8192]
    assert all("logit_slope" not in row for row in masses["masses"] if row["layers"] == "RoPE")
    assert [row["length"] for row in masses["start"]] == [512] * 3  # of weights before training
    assert masses["start"][0]["logit_slope"] != masses["masses"][0]["logit_slope"]
    assert json.loads(lines()[0], parse_constant=pytest.fail)  # no nan


def rated(plan, corpus, treatment=None, **_):
    """A record of made-up numbers: rates differ in the run's own table, where RN learns only when
    it is trained three times as long; the needles of the cells, which are what is reported, decide
    nothing."""
    exact = {"0.003": 0.5, "0.006": 0.9, "0.01": 0.7}[plan.flag("lr", "0.006")]
    if plan.recipe == "ssmax-laptop":
        exact = 0.1
    if plan.flag("pattern") == "RN":
        exact = 0.3 * int(plan.flag("stretch", "1"))
    cell = {"exact": 0.25, "exact_error": 0.0, "likelihood": 0.5}
    cells = [{"task": task, "length": 512 * n} for task in runs.TASKS for n in runs.TIMES]
    return {
        "plan": str(plan),
        "treatment": treatment or {},
        "recipe": plan.toml,
        "corpus": "c0",
        "torch": "2",
        "seconds": 90.0,
        "val_loss": 2.5,
        "table": [{"length": 512, "exact": exact}],
        "curve": [] if plan.init else [[100, 0.0], [200, exact]],
        "needles": [at | cell for at in cells],
    }


def test_the_best_rate_and_as_many_steps_as_it_takes(monkeypatch):
    monkeypatch.setattr(runs, "record", rated)
    plan, entry = runs.best("laptop", (("pattern", "R"),), None)
    assert plan.flags == (("pattern", "R"),) and runs.has_learned(entry)  # .006, the recipe's own
    plan, entry = runs.best("laptop", (("pattern", "RN"),), None)
    assert plan.flag("stretch") == "3"
    for pattern, times in (("R", "2"), ("RN", "6")):  # a scale of twice the steps
        plan, _ = runs.best("laptop", (("pattern", pattern),), None, stretch=2)
        assert plan.flag("stretch") == times


def test_long_context_writes_a_page(tmp_path, monkeypatch, capsys):
    for module in (runs, long_context):
        monkeypatch.setattr(module, "record", rated)
    monkeypatch.setattr(long_context, "default_corpus", lambda: None)
    monkeypatch.setattr(long_context, "LEARNED", 0.2)  # they all find .25, at 512 too
    long_context.main(["--out", str(tmp_path / "page")])
    text = (tmp_path / "page.md").read_text()
    assert "| R | 0.25 ± 0.00" in text and "R, extended with YARN" in text
    assert "\n| rrrN, trained with scalable softmax * | " in text and "\n| rrrN | " in text
    assert "\n| RN | " in text and "\n| N | " in text and "## multi-key" in text
    assert (tmp_path / "page.png").exists()
    learned_so = "while it trained: 0.00 after 0.4M, 0.10 after 0.8M tokens)"
    assert text.count(learned_so) == 1  # of the row that is marked
    # every row that it speaks of is there
    compared = len(runs.TASKS) * len(long_context.PAGE["reported"])
    assert text.count("0.25 against 0.25: not shown") == compared
    monkeypatch.setattr(long_context, "LEARNED", 0.8)
    few = ["--only", "rrrN", "rrrR", "--rates", "0.01", "--out", str(tmp_path / "few")]
    long_context.main(few)  # at .01 rrrN finds .7
    text = (tmp_path / "few.md").read_text()
    assert "| rrrN; rrrR | 8,192 | 0.25 against 0.25: not at 512 |" in text
    with pytest.raises(SystemExit):
        long_context.main(["--only", "Q"])
    assert "--only: invalid choice: 'Q'" in capsys.readouterr().err


def test_the_committed_page_is_what_the_records_say(tmp_path, monkeypatch):
    """To the byte, without a corpus: its hash is all that a record wants to know."""
    committed = (runs.HERE / "results" / "long-context.md").read_text(encoding="utf-8")
    corpus = SimpleNamespace(hash=re.search(r"Corpus (\w+),", committed)[1])
    monkeypatch.setattr(long_context, "default_corpus", lambda: corpus)
    monkeypatch.setattr(long_context, "plot", lambda made, out: None)
    monkeypatch.setattr(runs, "MAY_RUN", False)
    long_context.main(["--out", str(tmp_path / "long-context")])
    assert (tmp_path / "long-context.md").read_text(encoding="utf-8") == committed


def test_runs_of_different_corpora_are_not_compared(checkpoint, tmp_path, monkeypatch):
    paths = []
    for name in ("a", "b"):
        paths.append(shutil.copytree(checkpoint, tmp_path / name / "last"))
        record = {"recipe": {"data": f"corpora/{name}"}}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    tokenizer = load_tokenizer(checkpoint)
    corpus_at = lambda folder: SimpleNamespace(folder=folder, hash=str(folder), tokenizer=tokenizer)
    monkeypatch.setattr(report, "load_corpus", corpus_at)
    parser = report.checkpoint_command("needles", "")
    argv = [*map(str, paths), "--device", "cpu", "--out", str(tmp_path / "n")]
    opened = lambda *more: report.open_checkpoints(parser.parse([*argv, *more]), [1])
    with pytest.raises(ValueError, match="different corpora .*corpora/a, corpora/b.*--data"):
        opened()
    models, corpus, lengths = opened("--data", "c")
    assert list(models) == [str(path) for path in paths] and corpus.folder == Path("c")
    assert lengths == [128]
    (tmp_path / "a" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="damaged.*--data"):
        opened()
    tokenizer = SimpleNamespace(hash="another")
    with pytest.raises(ValueError, match="a/last and the corpus c have different tokenizers"):
        opened("--data", "c")

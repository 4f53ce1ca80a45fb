"""The exercises grade as they say: every solution and every other right answer passes, every named
wrong answer fails first at the named check and in its words, every stub is empty, cheats get
nothing, and a class comes out as it should."""

import ast
import csv
import importlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

from exercises import grade, handout, measure
from exercises.conftest import table
from exercises.harness import BONUS, EXERCISES, HERE, Result, Wrong, checks, load, run
from exercises.rules import MAIN, is_spec
from exercises.solutions.mutants import ALSO_RIGHT, CHEATS, MUTANTS
from processes import Command

SOLUTIONS = {
    name: (HERE / f"solutions/{name}.py").read_text(encoding="utf-8") for name in EXERCISES
}


@pytest.fixture
def graded(tmp_path):
    """graded(exercise, text) -> the results of a file's checks, up to the first that fails."""

    def grading(exercise, text):
        path = tmp_path / f"{exercise}.py"
        path.write_text(text, encoding="utf-8")
        mine, results = load(exercise, path), []
        for check in checks(exercise):
            results.append(run(check, mine))
            if results[-1].status == "failed":
                break
        return results

    return grading


def failures(results):
    return [result for result in results if result.status != "passed"]


def test_points():
    worth = {name: sum(check.points for check in checks(name)) for name in EXERCISES}
    assert sum(worth.values()) - worth.get(BONUS, 0) == 100 and worth[BONUS] == 10


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_solution_passes(exercise, graded):
    assert not failures(graded(exercise, SOLUTIONS[exercise]))


@pytest.mark.parametrize(
    "exercise,name", [(e, n) for e, texts in ALSO_RIGHT.items() for n in texts]
)
def test_another_right_answer_passes(exercise, name, graded):
    assert not failures(graded(exercise, ALSO_RIGHT[exercise][name]))


def test_there_are_other_right_answers():
    assert all(len(ALSO_RIGHT.get(exercise, ())) >= 2 for exercise in EXERCISES)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m.exercise}-{m.name}")
def test_a_wrong_answer_is_named(mutant, graded):
    right = ALSO_RIGHT[mutant.exercise][mutant.of] if mutant.of else SOLUTIONS[mutant.exercise]
    assert right.count(mutant.old) == 1, "the edit does not fit once"
    results = graded(mutant.exercise, right.replace(mutant.old, mutant.new))
    last = results[-1]
    assert (last.check, last.status) == (mutant.check, "failed"), last
    assert mutant.words in last.message


def test_every_check_is_the_first_to_reject_something():
    rejected = {(mutant.exercise, mutant.check) for mutant in MUTANTS}
    every = {(check.exercise, check.name) for name in EXERCISES for check in checks(name)}
    assert every == rejected


def signatures(tree):
    """The functions of a file, those of classes among them, without the given specification."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not is_spec(node):
            found[node.name] = ast.dump(node.args), ast.dump(node.returns) if node.returns else None
    return found


def without_main(tree):
    tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.dump(n.test) == MAIN)]
    return tree


@pytest.mark.parametrize("exercise", EXERCISES)
def test_a_stub_is_empty(exercise, graded):
    text = (HERE / f"{exercise}.py").read_text(encoding="utf-8")
    assert {result.status for result in graded(exercise, text)} == {"not written"}

    stub, given = ast.parse(text), (HERE / f"checks/{exercise}.py").read_text(encoding="utf-8")
    specs = [[ast.dump(n) for n in t.body if is_spec(n)] for t in (stub, ast.parse(given))]
    assert specs[0] == specs[1], "the specification differs from the checks'"
    asked = signatures(without_main(stub))
    solved = signatures(ast.parse(SOLUTIONS[exercise]))
    assert asked.items() <= solved.items(), "signatures differ from the solution's"
    assert "solutions" not in text


def test_checks_need_little():
    """Only the checks of the model and of extension import the project."""
    for name in EXERCISES:
        tree = ast.parse((HERE / f"checks/{name}.py").read_text(encoding="utf-8"))
        imports = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        imports |= {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        others = {"torch", *sys.stdlib_module_names}
        ours = {name for name in imports if name.split(".")[0] not in others}
        allowed = {"exercises.harness"}
        if name in ("e09_model", "e11_extend"):
            allowed |= {"model", "attention"}
        assert ours <= allowed, f"{name} imports {ours}"


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_gets_nothing(name, graded):
    exercise, text, words = CHEATS[name]
    try:
        results = graded(exercise, text)
    except Wrong as wrong:
        assert words in str(wrong)
    else:
        assert words in results[-1].message
        assert not any(result.status == "passed" for result in results)


# The measurements ---------------------------------------------------------------------------------


def measured(exercise, *words):
    """What a stub's measurement prints, run on the solution's functions."""
    stub = ast.parse((HERE / f"{exercise}.py").read_text(encoding="utf-8"))
    blocks = [n for n in stub.body if isinstance(n, ast.If) and ast.dump(n.test) == MAIN]
    assert len(blocks) == 1
    imports = [n for n in stub.body if isinstance(n, ast.Import | ast.ImportFrom)]
    solved = ast.parse(SOLUTIONS[exercise]).body
    code = compile(ast.Module(imports + solved + blocks, []), f"{exercise}.py", "exec")
    printed, before = io.StringIO(), sys.argv
    sys.argv = [exercise, *map(str, words)]
    try:
        with redirect_stdout(printed):
            exec(code, {"__name__": "__main__"})
    finally:
        sys.argv = before
    return printed.getvalue()


@pytest.mark.parametrize(
    "exercise,pattern",
    [
        ("e01_rotate", r"among 4096: (\d+)"),
        ("e02_angles", r"theta 2,000,000: .* (\d+)"),
        ("e03_weights", r"([\d.]+) bits"),
        ("e04_window", r"receptive field: (\d+)"),
        ("e05_pattern", r"65,536 tokens: pairs ([\d.]+)"),
        ("e06_qk_norm", r"of 8,192: ([\d.]+)"),
        ("e08_ring", r": ([\d.]+)$"),
    ],
)
def test_a_measurement_prints_the_answer(exercise, pattern, graded):
    printed = measured(exercise)
    value = re.search(pattern, printed, re.M).group(1)
    text = (HERE / f"{exercise}.py").read_text(encoding="utf-8")
    results = graded(exercise, text.replace("ANSWER = None", f"ANSWER = {value}"))
    assert results[-1].check == "answer" and results[-1].status == "passed", printed


def test_the_bonus_measures_its_cost():
    assert float(re.search(r"([\d.]+) million", measured("e12_banded")).group(1)) < 1.52


@pytest.fixture
def checkpoints(corpus_folder, tmp_path):
    """An untrained rrrN and R, as training leaves them."""
    from data.corpus import load_corpus
    from model import ModelConfig, Transformer

    sizes = dict(n_head=2, n_kv_head=1, d_model=16, d_ff=16, window=16, trained_length=512)
    paths = []
    for pattern in ("rrrN", "R"):
        vocabulary = load_corpus(corpus_folder).tokenizer.n_vocab
        model = Transformer(ModelConfig(pattern=pattern, vocab_size=vocabulary, **sizes))
        folder = tmp_path / pattern
        paths.append(folder / "last")
        model.save_pretrained(paths[-1])
        record = {"recipe": {"data": str(corpus_folder)}}
        (folder / "run.json").write_text(json.dumps(record), encoding="utf-8")
    return paths


def test_trained_measurements_run(checkpoints, monkeypatch, capsys):
    """On untrained models, with the solutions in the place of the student's own exercises."""
    for name in EXERCISES:
        solution = importlib.import_module(f"exercises.solutions.{name}")
        monkeypatch.setitem(sys.modules, f"exercises.{name}", solution)
    few, hidden = measure.single, measure.held_out_examples
    monkeypatch.setattr(measure, "single", lambda needles, length, n: few(needles, 512, 2))
    monkeypatch.setattr(
        measure, "held_out_examples", lambda n, t, _, *each: hidden(n, 512, 2, *each)
    )
    hybrid, rope = checkpoints
    assert "layer 3 (NoPE, window none)" in measured("e07_masses", hybrid)
    yours, theirs = re.findall(r"(\d\.\d+)", measured("e09_model", hybrid))
    assert abs(float(yours) - float(theirs)) < 1e-3
    assert "difference 0.000" in measured("e10_needle", hybrid, rope)
    printed = measured("e11_extend", rope, hybrid)
    assert "as trained 0.000, extended 0.000" in printed and "theta 2,000,000" in printed

    monkeypatch.delitem(sys.modules, "exercises.e01_rotate")
    with pytest.raises(SystemExit):
        measured("e09_model", hybrid)
    assert "e01_rotate.py is not written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        measured("e10_needle", hybrid)
    assert "name 2 checkpoints" in capsys.readouterr().err


def test_a_handout_is_measured_elsewhere(checkpoints, corpus_folder, tmp_path, monkeypatch, capsys):
    """The zip of a corpus and a run, unpacked in another folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    for place in (here, there):
        place.mkdir()
    shutil.copytree(corpus_folder, here / "corpora" / "stdlib")
    shutil.copytree(checkpoints[0].parent, here / "out" / "hybrid")
    (here / "out" / "hybrid" / "last" / "training.pt").write_bytes(b"state")
    record = {"recipe": {"data": "corpora/stdlib"}}
    (here / "out" / "hybrid" / "run.json").write_text(json.dumps(record), encoding="utf-8")

    monkeypatch.chdir(here)
    handout.main(["out/hybrid", "--out", "class.zip"])
    with zipfile.ZipFile("class.zip") as archive:
        assert not [name for name in archive.namelist() if name.endswith("training.pt")]
        archive.extractall(there)
    before = Path("class.zip").read_bytes()
    for wrong, said in (
        (str(here / "out" / "hybrid"), "not below this folder"),
        ("out/hybrid", "run.json not found"),
    ):
        with pytest.raises(SystemExit):
            handout.main([wrong])
        assert said in capsys.readouterr().err and Path("class.zip").read_bytes() == before
        Path("out/hybrid/run.json").unlink(missing_ok=True)
    monkeypatch.chdir(there)
    few = measure.single
    monkeypatch.setattr(measure, "single", lambda needles, length, n: few(needles, 512, 1))
    assert "NoPE" in measured("e07_masses", "out/hybrid/last")


# A class ------------------------------------------------------------------------------------------


def hand_in(folder, **texts):
    folder.mkdir(parents=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")


def test_a_class_comes_out(tmp_path, error):
    """A class of four, graded by the command."""
    room = tmp_path / "class"
    some = {name: SOLUTIONS[name] for name in ("e01_rotate", "e04_window", "e05_pattern")}
    hand_in(room / "honest" / "lab" / "exercises", **some)
    (room / "honest" / "conftest.py").write_text("raise SystemExit(0)")
    (room / "honest" / "torch.py").write_text("raise SystemExit(0)")
    for inner in ("checks", "solutions"):
        hand_in(room / "honest" / inner, e01_rotate="ANSWER = 1", e02_angles="ANSWER = 1")
    wrong = SOLUTIONS["e01_rotate"].replace("angles.sin()", "-angles.sin()")
    syntax = "def angles(x:\n"
    hand_in(
        room / "wrong way", e01_rotate=wrong, e02_angles=syntax, e05_pattern=some["e05_pattern"]
    )
    hand_in(room / "empty")
    faked = '{"result": {"exercise": "e01_rotate", "check": "answer", "points": 99}}'
    faker, hanging = f"print('''{faked}''')\nraise SystemExit(0)", "while True:\n    pass\n"
    hand_in(room / "faker", e01_rotate=faker, e02_angles=hanging, e05_pattern=some["e05_pattern"])
    (room / "notes.txt").write_text("no student")

    out, feedback = tmp_path / "points.csv", room / "feedback"
    feedback.mkdir()  # an earlier grading's
    grade.main([str(room), "--out", str(out), "--feedback", str(feedback), "--seconds", "2"])
    with open(out, newline="", encoding="utf-8") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert list(rows["honest"]) == ["student", "total", *EXERCISES, "remarks"]
    columns = ("total", "e01_rotate", "e02_angles", "e05_pattern")
    assert {name: tuple(map(row.get, columns)) for name, row in rows.items()} == {
        "honest": ("24", "6", "", "8"),
        "wrong way": ("10", "2", "0", "8"),
        "empty": ("0", "", "", ""),
        "faker": ("8", "0", "0", "8"),
    }
    assert "line 1: SyntaxError" in rows["wrong way"]["remarks"]
    assert "SystemExit" in rows["faker"]["remarks"]
    assert "took longer than 2 seconds" in rows["faker"]["remarks"]
    assert rows["empty"]["remarks"] == "no exercise's file" and not rows["honest"]["remarks"]
    said = (feedback / "wrong way.txt").read_text(encoding="utf-8")
    assert "quarter_turn" in said and "turned the wrong way" in said
    assert len(list(feedback.iterdir())) == 4
    for flag, value in (("--seed", 2**64), ("--seed", -1), ("--seconds", math.inf), ("--jobs", 0)):
        assert f"{flag} {value}" in error(grade.main, room, flag, value)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are text")
def test_an_odd_student_costs_the_class_nothing(tmp_path, monkeypatch):
    """A name from a Windows zip, and a file that cannot be read."""
    room, out = tmp_path / "class", tmp_path / "points.csv"
    hand_in(room / os.fsdecode(b"m\xfcller"), e01_rotate="x = 1")
    hand_in(room / "other", e01_rotate="x = 1")
    copy = shutil.copyfile

    def locked(source, place):
        if source.parent.name == "other":
            raise PermissionError(13, "Permission denied", str(source))
        return copy(source, place)

    monkeypatch.setattr(shutil, "copyfile", locked)
    grade.main([str(room), "--out", str(out), "--feedback", str(tmp_path / "feedback")])
    with open(out, newline="", encoding="utf-8") as file:
        rows = {row["student"]: row["remarks"] for row in csv.DictReader(file)}
    assert rows["m\\udcfcller"] == "" and len(list((tmp_path / "feedback").iterdir())) == 2
    assert rows["other"] == "e01_rotate: the file cannot be read (Permission denied)"


def students_pytest(folder, *words):
    """What `pytest exercises/` says of the files of a folder."""
    pytest = "-m", "pytest", "-p", "no:cacheprovider", "exercises/"
    done = Command(*pytest, *words, folder=HERE.parent, EXERCISES=str(folder)).wait()
    return done.status, done.out


def test_where_the_projects_packages_are_missing_all_but_two_are_checked(tmp_path):
    (tmp_path / "einops.py").write_text("raise ImportError('no einops here')")
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "exercises/"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        words, cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=120
    )
    project = [len(checks(name)) for name in ("e09_model", "e11_extend")]
    assert done.returncode == 0 and f"{61 - sum(project) + 2} skipped" in done.stdout, done.stdout
    assert "the checks of e09_model need the whole project: no einops here" in done.stdout


def test_a_students_pytest(tmp_path):
    """The first five minutes, a mistake, and the demonstration of the first lesson."""
    status, said = students_pytest(HERE)
    assert status == 0 and "61 skipped" in said, said
    assert "  0 of 100 points; next: exercises/e01_rotate.py" in said

    wrong = SOLUTIONS["e04_window"].replace("(distance < window)", "(distance <= window)")
    for name, text in (SOLUTIONS | {"e04_window": wrong}).items():
        if name != BONUS:
            (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")
    status, said = students_pytest(tmp_path)
    assert status == 1 and "Traceback" not in said
    assert said.count("window off by one: your query sees window + 1 keys") == 2, said
    assert "  e04_window     ############........   6 of  10   2 to mend" in said
    assert "  96 of 100 points; next: exercises/e04_window.py" in said


def test_the_table():
    """A bar an exercise, and the file to open next."""
    results = [Result("e01_rotate", c.name, c.points, "passed", "") for c in checks("e01_rotate")]
    results[-1] = replace(results[-1], status="not written")
    worth = [(check, "failed") for check in checks("e04_window")]
    results += [Result(c.exercise, c.name, c.points, status, "") for c, status in worth]
    lines = table(results).splitlines()
    assert lines == [
        "  e01_rotate     ################....   5 of   6   to write",
        "  e04_window     ....................   0 of  10   6 to mend",
        "  5 of 16 points; next: exercises/e01_rotate.py",
    ]
    every = [
        Result(c.exercise, c.name, c.points, "passed", "") for e in EXERCISES for c in checks(e)
    ]
    assert table(every).splitlines()[-1] == "  100 of 100 points (110 with the bonus)"

"""The exercises grade as they say: every solution and every other right answer passes, every named
wrong answer fails first at the named check and in its words, every stub is empty, cheats get
nothing, and a class comes out as it should."""

import ast

import pytest

from exercises.harness import BONUS, EXERCISES, HERE, Wrong, checks, load, run
from exercises.rules import MAIN, is_spec
from exercises.solutions.mutants import ALSO_RIGHT, CHEATS, MUTANTS

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
        ours = {name for name in imports if name.split(".")[0] not in ("torch", "math")}
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

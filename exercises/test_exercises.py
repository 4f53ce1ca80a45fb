"""`pytest exercises/`: a test a check. EXERCISES=folder checks the files of another folder."""

import os
from functools import cache
from pathlib import Path

import pytest

from exercises.harness import EXERCISES, HERE, Result, Wrong, checks, load, run

FOLDER = Path(os.environ.get("EXERCISES", HERE))


@cache
def loaded(exercise: str):
    """The module of an exercise, or what is wrong with its file."""
    try:
        return load(exercise, FOLDER / f"{exercise}.py")
    except Wrong as wrong:
        return wrong


def cases_of(exercise: str) -> list:
    """One for each check; one that is skipped where its checks need a package that is missing."""
    try:
        return [pytest.param(check, id=f"{exercise}-{check.name}") for check in checks(exercise)]
    except ImportError as error:
        skip = pytest.mark.skip(f"the checks of {exercise} need the whole project: {error}")
        return [pytest.param(None, id=exercise, marks=skip)]


@pytest.mark.parametrize("check", [case for exercise in EXERCISES for case in cases_of(exercise)])
def test_exercise(check, results):
    if not (FOLDER / f"{check.exercise}.py").is_file():
        pytest.skip(f"{FOLDER} has no {check.exercise}.py")
    mine = loaded(check.exercise)
    if isinstance(mine, Wrong):
        first = check.name == checks(check.exercise)[0].name
        status = "failed" if first else "not written"
        result = Result(check.exercise, check.name, check.points, status, str(mine))
    else:
        result = run(check, mine)
    results.append(result)
    if result.status == "not written":
        pytest.skip(f"{check.exercise} is not written yet" if not result.message else "see above")
    if result.status == "failed":
        pytest.fail(result.message, pytrace=False)

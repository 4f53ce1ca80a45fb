"""The table at the end: a bar an exercise, the points, and the file to open next."""

import pytest

from exercises.harness import BONUS, checks

RESULTS = pytest.StashKey[list]()


def pytest_configure(config):
    config.stash[RESULTS] = []
    if config.option.reportchars == "fE":  # the default, which says every message twice
        config.option.reportchars = ""


@pytest.fixture
def results(request):
    """Where a test leaves its Result."""
    return request.config.stash[RESULTS]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter, config):
    outcome = yield
    results = config.stash[RESULTS]
    if results:
        terminalreporter.write_sep("-", "exercises")
        terminalreporter.write_line(table(results))
    return outcome


def table(results) -> str:
    """A line an exercise, then the sum."""
    lines, following, sums = [], None, {True: [0, 0], False: [0, 0]}
    for exercise in dict.fromkeys(result.exercise for result in results):
        mine = [result for result in results if result.exercise == exercise]
        most = sum(check.points for check in checks(exercise))
        got = sum(result.points for result in mine if result.status == "passed")
        failed = sum(result.status == "failed" for result in mine)
        unwritten = any(result.status == "not written" for result in mine)
        state = f"{failed} to mend" if failed else "to write" if unwritten else ""
        if state and following is None:
            following = exercise
        bar = "#" * (20 * got // most)
        lines.append(f"  {exercise:<14} {bar:.<20}  {got:>2} of {most:>3}   {state}".rstrip())
        sums[exercise == BONUS][0] += got
        sums[exercise == BONUS][1] += most
    (got, most), (extra, bonus) = sums[False], sums[True]
    if not most:
        got, most, extra = extra, bonus, 0
    said = f"  {got} of {most} points" + (f" ({got + extra} with the bonus)" if extra else "")
    return (
        "\n".join(lines) + f"\n{said}" + (f"; next: exercises/{following}.py" if following else "")
    )

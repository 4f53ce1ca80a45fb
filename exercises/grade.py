"""A class -> points.csv.

    python -m exercises.grade SUBMISSIONS --out points.csv --feedback feedback

SUBMISSIONS holds a folder a student. Of each, the exercises' files are found by their names at any
depth, and nothing else is looked at. Every student has a process of his own, in an empty folder,
with one thread and a time limit a check; what he prints goes nowhere. A hang or a crash costs what
is left of that exercise, and the next goes on behind it. Random inputs are drawn anew each time, so
that no answer can be a table of outputs; --seed repeats a grading.
"""

import csv
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from commandline import CommandLine, guarded
from exercises.harness import BONUS, EXERCISES, HERE, LARGEST, Result, Wrong, checks, load, run

START, DAY = 180, 86_400  # seconds in which torch is imported; the most that a check may take
WORK = "import sys; sys.path.insert(0, sys.argv[1]); from exercises.grade import work; work()"
ELSEWHERE = {"checks", "solutions", "tests", "venv", "__MACOSX", "__pycache__"}  # of a clone


# In a student's process ---------------------------------------------------------------------------


def work() -> None:
    """Check the exercises named on the command line, found in this folder; a line of JSON for each
    thing that begins or ends, on what was standard output. The student's own goes nowhere."""
    seed, *names = sys.argv[2:]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)

    def tell(**line) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    tell(ready=True)
    for exercise in names:
        tell(begins=[exercise, "load"])
        try:
            mine = load(exercise, Path(f"{exercise}.py"))
        except Wrong as wrong:
            tell(unloaded=str(wrong))
            continue
        for check in checks(exercise):
            tell(begins=[exercise, check.name])
            tell(result=asdict(run(check, mine, int(seed))))
    tell(done=True)
    os._exit(0)  # whatever is left running


# Around it ----------------------------------------------------------------------------------------


@dataclass
class Student:
    """What one folder is worth."""

    name: str
    files: dict[str, Path]
    results: list[Result] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def points(self, exercise: str) -> int:
        mine = [result for result in self.results if result.exercise == exercise]
        return sum(result.points for result in mine if result.status == "passed")

    def row(self) -> list:
        handed_in = {exercise: self.points(exercise) for exercise in self.files}
        columns = [handed_in.get(exercise, "") for exercise in EXERCISES]
        return [self.name, sum(handed_in.values()), *columns, "; ".join(self.remarks)]

    def feedback(self) -> str:
        """Every check with its message."""
        lines = []
        for exercise in EXERCISES:
            mine = [result for result in self.results if result.exercise == exercise]
            most = sum(check.points for check in checks(exercise))
            bonus = " (bonus)" if exercise == BONUS else ""
            state = f"{self.points(exercise)} of {most}" if exercise in self.files else "no file"
            lines.append(f"{exercise}{bonus}: {state}")
            for result in mine:
                said = f": {result.message}" if result.message else ""
                lines.append(f"  {result.check:<20} {result.points:>2}  {result.status}{said}")
        lines += ["", *self.remarks] if self.remarks else []
        return "\n".join(lines) + "\n"

    def fail(self, exercise: str, message: str, after: str = "load") -> None:
        """The check `after`, and those behind it, as failed; "load" is before the first."""
        self.remarks.append(f"{exercise}: {message}")
        names = ["load", *(check.name for check in checks(exercise))]
        for check in checks(exercise)[max(0, names.index(after) - 1) :]:
            result = Result(exercise, check.name, check.points, "failed", message)
            self.results.append(result)


def found(folder: Path) -> Student:
    """The exercises' files in a student's folder, the one nearest to its top where there are
    several. Links, and the checks and solutions of a clone, are none."""
    student, candidates = Student(folder.name, {}), {}
    for root, folders, files in os.walk(folder):
        inside = Path(root)
        looked = (name for name in folders if name not in ELSEWHERE and name[0] != ".")
        folders[:] = sorted(looked)
        for name in sorted(files):
            path = inside / name
            if path.stem in EXERCISES and path.suffix == ".py":
                candidates.setdefault(path.stem, []).append(path)
    for exercise, paths in sorted(candidates.items()):
        real = [path for path in paths if path.is_file() and not path.is_symlink()]
        if not real:
            student.remarks.append(f"{exercise}: a link is no answer")
            continue
        student.files[exercise] = min(real, key=lambda path: (len(path.parts), str(path)))
        if len(real) > 1:
            taken = student.files[exercise].relative_to(folder).as_posix()
            student.remarks.append(f"{exercise}: {len(real)} files, taken {taken}")
    if not student.files:
        student.remarks.append("no exercise's file")
    return student


def grade(folder: Path, seed: int, seconds: float) -> Student:
    """One student's folder, checked."""
    student = found(folder)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        left = []
        for exercise, path in student.files.items():
            if path.stat().st_size > LARGEST:
                student.fail(exercise, "the file is larger than a megabyte")
                continue
            try:
                shutil.copyfile(path, Path(place, f"{exercise}.py"))
                left.append(exercise)
            except OSError as error:
                student.fail(exercise, f"the file cannot be read ({error.strerror})")
        while left:
            left = attempt(student, left, Path(place), seed, seconds)
    return student


def attempt(student: Student, names: list, place: Path, seed: int, seconds: float) -> list[str]:
    """Check exercises in one process until it ends -> those that it has not come to."""
    keep = ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    for name in ("HOME", "USERPROFILE", "TMP", "TEMP", "TMPDIR"):
        environment[name] = str(place)
    environment.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    process = subprocess.Popen(
        [sys.executable, "-I", "-B", "-c", WORK, str(HERE.parent), str(seed), *names],
        cwd=place,
        env=environment,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    lines: queue.Queue = queue.Queue()

    def read() -> None:
        with suppress(ValueError):  # half a line of a process that was stopped
            for line in process.stdout:
                lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    at, limit, ended = None, START, "ended its process"
    try:
        while True:
            try:
                line = lines.get(timeout=limit)
            except queue.Empty:
                line, ended = None, f"took longer than {limit:g} seconds"
            if line is None:
                break
            limit = seconds
            if "begins" in line:
                at = line["begins"]
            elif "unloaded" in line:
                student.fail(at[0], line["unloaded"])
            elif "result" in line:
                student.results.append(Result(**line["result"]))
            elif "done" in line:
                return []
    finally:
        process.kill()
        process.wait()
    if at is None:
        raise OSError(f"no process could be started for {student.name}: {ended} before it began")
    exercise, check = at
    what = "the file" if check == "load" else f"the check {check}"
    student.fail(exercise, f"{what} {ended}", check)
    return names[names.index(exercise) + 1 :]


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m exercises.grade", description=__doc__)
    parser.add_argument("submissions", type=Path, help="a folder that holds a folder a student")
    parser.add_argument("--out", type=Path, default=Path("points.csv"))
    parser.add_argument("--feedback", type=Path, help="a folder for a text file a student")
    parser.add_argument("--seconds", type=float, default=20, help="a check (default: 20)")
    parser.add_argument("--seed", type=int, help="of random inputs (default: another each time)")
    jobs = min(4, os.cpu_count() or 1)
    parser.add_argument("--jobs", type=int, default=jobs, help=f"students at once (here: {jobs})")
    args = parser.parse(argv)
    for name in ("seconds", "jobs"):
        if not 0 < getattr(args, name) <= DAY:
            raise ValueError(f"--{name} {getattr(args, name)} must be above 0, and {DAY} at most")
    if args.seed is not None and not 0 <= args.seed < 2**63:
        raise ValueError(f"--seed {args.seed} is not in [0, 2**63)")
    if not args.submissions.is_dir():
        raise FileNotFoundError(f"{args.submissions} is no folder")
    folders = sorted(path for path in args.submissions.iterdir() if path.is_dir())
    folders = [path for path in folders if not path.name.startswith((".", "__"))]
    if args.feedback:  # of an earlier grading
        folders = [path for path in folders if path.resolve() != args.feedback.resolve()]
    if not folders:
        raise ValueError(f"{args.submissions} holds no folders: it takes one a student")
    if args.feedback:
        args.feedback.mkdir(parents=True, exist_ok=True)
    args.out.open("a").close()  # an error now, not after the work
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed

    students = []
    as_text = {"encoding": "utf-8", "errors": "backslashreplace"}  # a name from another system
    try:
        with ThreadPoolExecutor(args.jobs) as pool:
            for student in pool.map(lambda folder: grade(folder, seed, args.seconds), folders):
                students.append(student)
                if args.feedback:
                    (args.feedback / f"{student.name}.txt").write_text(
                        student.feedback(), **as_text
                    )
                print(f"{student.name}: {student.row()[1]}", flush=True)
    finally:  # what an interrupt leaves is written too
        with open(args.out, "w", newline="", **as_text) as file:
            writer = csv.writer(file)
            writer.writerow(["student", "total", *EXERCISES, "remarks"])
            writer.writerows(student.row() for student in students)
    print(f"{len(students)} students, seed {seed}: {args.out}")


if __name__ == "__main__":
    main()

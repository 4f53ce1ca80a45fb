"""Makes the modules of the repository importable from tests/, and gives every test one thread:
tensors this small gain nothing from a second, and on shared cores waiting for it takes most of the
time."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # of subprocesses too; before torch is imported

from pathlib import Path

import pytest

collect_ignore = ["exercises"]  # `pytest exercises/` is for students; tests/ proves them


@pytest.fixture(autouse=True, scope="session")
def no_power_cut():
    """What reaches the disk when: nothing here can tell, and waiting for it takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
    """A small corpus of real text: some modules of the standard library."""
    from data.prepare import prepare

    folder = tmp_path_factory.mktemp("corpora") / "small"
    source = Path(os.__file__).parent
    names = [
        "argparse",
        "ast",
        "bdb",
        "calendar",
        "cmd",
        "configparser",
        "copy",
        "csv",
        "datetime",
        "difflib",
        "dis",
        "enum",
        "inspect",
        "locale",
    ]
    documents = [(name, (source / f"{name}.py").read_text(encoding="utf-8")) for name in names]
    prepare(documents, folder, vocab_size=1024, source="test")
    return folder


@pytest.fixture
def error(capfd):
    """error(main, argv) -> the one line that a command says before it exits with status 2."""

    def failing(main, *argv):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        lines = capfd.readouterr().err.strip().splitlines()
        assert stop.value.code == 2
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        return lines[0]

    return failing

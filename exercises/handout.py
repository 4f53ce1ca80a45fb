"""A zip of a corpus and of trained models, so that a room with several Python versions has one set
of numbers, and a laptop that cannot train has something to measure.

    python -m exercises.handout out/laptop-r64r64r64N-s1 out/laptop-R-s1 --out class.zip

It is unpacked in the root of a clone. Training's own state (`--resume`) stays at home.
"""

from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

from checkpoint import replace_file
from commandline import CommandLine, guarded
from data.corpus import DEFAULT_CORPUS, load_corpus

AT_HOME = {"training.pt", "checksums.json"}


@guarded
def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = CommandLine(prog="python -m exercises.handout", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders such as out/laptop-R-s1")
    parser.add_argument("--data", type=Path, default=DEFAULT_CORPUS, help="their corpus")
    parser.add_argument("--out", type=Path, default=Path("class.zip"))
    args = parser.parse(argv)
    load_corpus(args.data)  # every byte checked before it is handed out
    files = [path for path in args.data.iterdir() if path.is_file()]
    for run in dict.fromkeys(args.runs):
        weights = run / "last" / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} not found: give the folders of finished runs")
        files += [run / "run.json", *(run / "last").iterdir()]
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found: give the folders of finished runs")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{path} is not below this folder, as in a clone: run this in its root"
            )

    def write(archive: Path) -> None:
        with ZipFile(archive, "w", ZIP_DEFLATED, strict_timestamps=False) as opened:
            for path in files:
                if path.name not in AT_HOME:
                    opened.write(path, path.as_posix())

    replace_file(args.out, write)
    print(
        f"{args.out}: {args.out.stat().st_size / 2**20:.1f} MiB; unpack it in the root of a clone"
    )


if __name__ == "__main__":
    main()

"""One way to read a command line: a mistake is one line that names the value and the mend, and exit status 2."""

import argparse
import difflib
import sys
from typing import NoReturn


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ValueErrors. Flags are declared with dashes; users may write underscores."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The parsed arguments. Raises ValueError for an unknown flag (with the nearest one), a bad value or a stray word."""
        words = list(sys.argv[1:] if argv is None else argv)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            flag, equals, value = word.partition("=")
            if flag.startswith("--") and not any(map(str.isspace, flag)):  # argparse reads "--- a title" as a value, so do we
                flag = flag.replace("_", "-")
                if flag not in self._option_string_actions:
                    self.unknown(flag)
                words[i] = flag + equals + value
        args, extra = self.parse_known_args(words)
        for word in extra:
            if word.startswith("-"):
                self.unknown(word)
            raise ValueError(f"unexpected argument {word!r}; --help shows what is understood")
        return args

    def unknown(self, flag: str) -> NoReturn:
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.5)
        raise ValueError(f"unknown flag {flag}; " + (f"did you mean {near[0]}?" if near else "--help lists the flags"))


def fail(error: Exception | str) -> NoReturn:
    """Print `error: ...` as one line to stderr and exit with status 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)

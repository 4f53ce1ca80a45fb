"""One way to read a command line, and one way to fail: a line that says what and the mend, status 2."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from functools import wraps
from typing import NoReturn


class CommandLine(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are ValueErrors. Users may write flags with underscores."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; --help lists the flags")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """The parsed arguments. Raises ValueError for an unknown flag (with the nearest one), a bad
        value or a stray word."""
        words = list(sys.argv[1:] if argv is None else argv)
        end = words.index("--") if "--" in words else len(words)
        for i, word in enumerate(words[:end]):
            flag, equals, value = word.partition("=")
            # argparse reads "--- a title" as a value, so do we
            if flag.startswith("--") and not any(map(str.isspace, flag)):
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
        mend = f"did you mean {near[0]}?" if near else "--help lists the flags"
        raise ValueError(f"unknown flag {flag}; {mend}")


def fail(error: BaseException | str) -> NoReturn:
    """Print `error: ...` as one line to stderr and exit with status 2."""
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(2)


def guarded(main: Callable) -> Callable:
    """`main(argv)` as a command: bad input, a full disk, exhausted memory, a loss that is not finite
    and an interrupt end in one line and status 2; a reader of our output that has gone, in silence."""

    @wraps(main)
    def command(argv: list[str] | None = None) -> None:
        try:
            main(argv)
        except BrokenPipeError:  # nothing is left to say, not even at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except KeyboardInterrupt as error:
            fail(str(error) or "interrupted")
        except (ValueError, OSError, FloatingPointError, MemoryError) as error:
            fail(error if str(error) else "out of memory")
        except RuntimeError as error:  # PyTorch's own way to say so, on CPU too
            if "out of memory" not in str(error) and "can't allocate memory" not in str(error):
                raise
            fail(f"out of memory: {error}")

    return command

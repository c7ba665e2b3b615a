"""The error for what a user gave (a file, an option, a checkpoint), how to show it, and the end by a signal."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what was expected and what was found.

    The command line prints the message on one line and exits with code 2; as a library it is an ordinary exception.
    Where several processes train one model, all run into it, and the first one says so.
    """


class ProcessError(InputError):
    """What one of several processes ran into alone, so that it must say so itself."""


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; the command line exits with 128 + its number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


def printable(text: str) -> str:
    """Text on one line that a terminal only shows: what would move the cursor or cannot be encoded is escaped.

    File and class names come from anywhere: they may hold line ends, control sequences and bytes that are no text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)

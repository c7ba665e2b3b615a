"""The one error for what a user gave (a file, an option, a checkpoint), and the end that a signal asked for."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what was expected and what was found.

    The command line prints the message on one line and exits with code 2; as a library it is an ordinary exception.
    """


class Stopped(KeyboardInterrupt):
    """A signal ended the work in good order; the command line exits with 128 + its number, as shells have it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum

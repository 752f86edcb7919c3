"""What a user can mend, and what may mend itself."""

from irl_align.utils.sanitize import printable


class UserError(Exception):
    """A mistake or fault that the user can mend, told in one line.

    The message names the file and field, what was found and what is expected. The command line
    prints it without a traceback (unless ``--debug``) and exits with status 2. It often quotes what
    was found, or another library's words of it: control characters in it become escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).expandtabs(1))


class TryAgain(Exception):
    """A fault that may have been the machine's own, as a NaN out of nowhere.

    The stage that raises it is built once more, from its last checkpoint. Who raises it sees to it
    that a fault that comes again at the same place is not raised so again.
    """

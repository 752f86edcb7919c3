"""Errors that a user can fix, and faults that may not happen again."""

from irl_align.utils.sanitize import printable


class UserError(Exception):
    """An error that the user can fix, reported in one line.

    The message names the file and field, what was found, what is expected and what to do. The
    command line prints it without a traceback (unless ``--debug``) and exits with status 2. The
    message may quote user data or another library's error, so control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message).expandtabs(1))


class TryAgain(Exception):
    """A fault that the machine may have caused, such as an unexplained NaN.

    The stage that raises it is built once more from its last checkpoint. The code that raises it
    must raise UserError instead when the same fault happens again at the same place.
    """

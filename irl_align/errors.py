"""The one exception for what a user can mend."""


class UserError(Exception):
    """A mistake or fault that the user can mend, told in one line.

    The message names the file and field, what was found and what is expected. The command line
    prints it without a traceback (unless ``--debug``) and exits with status 2.
    """

"""The one error that users cause: its message is a sentence that says what was wrong and what to do."""


class UserError(ValueError):
    """Wrong input. The command line prints the message on one line and exits with status 2."""

"""The exceptions that stand for a mistake of the user's."""


class UserError(Exception):
    """A mistake the user can mend: a bad path, bad data, flags that disagree.

    The message is one line that says what is wrong and how to mend it. A program's main prints it
    on stderr behind "error: " and exits with status 2; any other exception is a defect and keeps
    its traceback.
    """


class UnsharedError(UserError):
    """One that this process alone may have met: of several, the others know nothing of it."""

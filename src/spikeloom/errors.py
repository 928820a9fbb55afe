"""Errors that are the user's to mend: the command line prints them as one line and exits with code 2."""


class UsageError(ValueError):
    """A wrong setting, name, file or place; the message says what, where, the limit and the fix."""


class DataFileError(UsageError):
    """A file that is not what its place or name says: missing, truncated, corrupted or of another kind."""

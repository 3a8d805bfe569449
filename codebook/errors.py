"""The one exception that users are meant to read."""


class CodebookError(Exception):
    """What is wrong and what to do about it, in one line; the command line exits with code 2."""

"""Errors that are the user's to mend: the command line prints them as one line and exits with code 2."""

from __future__ import annotations

from pathlib import Path


class UsageError(ValueError):
    """A wrong setting, name, file or place; the message says what, where, the limit and the fix."""


class DataFileError(UsageError):
    """A file that is not what its place or name says: missing, truncated, corrupted or of another kind."""


def cannot_write(path: Path, error: Exception | None = None) -> UsageError:
    """The error for a file that cannot be written: what stands in the way, and what helps against it."""
    advice = "choose another place"
    if path.is_dir():
        reason = "it is a folder"
    elif not path.parent.is_dir():
        reason, advice = f"there is no folder {path.parent}", f"make it, or {advice}"
    else:
        reason = getattr(error, "strerror", None) or str(error)
        if any(word in reason for word in ("space", "quota", "large")):
            advice = f"free some space or {advice}"
    return UsageError(f"cannot write {path}: {reason}; {advice}")

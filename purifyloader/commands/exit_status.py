"""Turn how a command ends into its exit status, and an error of the user's into one line on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

from purifyloader.errors import PurifyError

__all__ = ["INTERRUPTED", "USER_ERROR", "exit_status"]

USER_ERROR, INTERRUPTED = 2, 130


def exit_status(work: Callable[[], int], in_words: Callable[[PurifyError], str] = str) -> int:
    """Call `work` and return its exit status, 2 after an error of the user's, or 130 after an interruption.

    Args:
        work: the command, or one process of it.
        in_words: the text of an error.
    """
    try:
        return work()
    except PurifyError as error:
        print(f"purifyloader: error: {in_words(error)}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("purifyloader: interrupted", file=sys.stderr)
        return INTERRUPTED

"""The two things annformer says when something is not as it should be."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used: the message says what was found, what was expected and what to do.

    The command line turns it into one message and exit status 2; in Python it is an ordinary `ValueError`.
    """


class AnnformerWarning(UserWarning):
    """Something is odd but work goes on; the message says what was assumed."""


def input_error(found: str, expected: str, remedy: str) -> InputError:
    """Build an `InputError` in the one form that all of annformer's messages have.

    Parameters
    ----------
    found
        What was met, with names and numbers. A sentence without a full stop.
    expected
        What would have been right.
    remedy
        What the user can do now; name the option or the call.
    """
    return InputError(f"{found}.\n  expected: {expected}.\n  what to do: {remedy}.")

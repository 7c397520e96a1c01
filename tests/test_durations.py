from __future__ import annotations

import pytest

from annformer.durations import in_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (0.034, "0.03 s"),
        (1.2, "1 s"),
        (89, "89 s"),
        (90, "2 min"),
        (89 * 60, "89 min"),
        (2 * 3600, "2.0 h"),
        (47 * 3600, "47.0 h"),
        (4.4 * 86400, "4 days"),
    ],
)
def test_the_unit_is_the_one_that_needs_few_digits(seconds, words):
    assert in_words(seconds) == words

"""The card says what is true of the model, the unpleasant first."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from annformer.card import model_card

SOURCES = [
    {"study": "blood", "cells": 2896, "source": "someone/repository abc123", "licence": "GPL-3"},
    {"study": "brain", "cells": 500, "source": "a | b", "licence": "MIT"},
]
PROVENANCE: dict[str, Any] = {
    "made_by": "annformer 0.1.0, pretrained from scratch",
    "cells": {"trained on": 3000, "held out": 396},
    "recipe": {"model": {"width": 64}, "train": {"epochs": 20.0}},
    "corpus": [{"name": "blood"}, {"name": "brain"}],
    "held_out_squared_error": {"gep": 140.0, "gene mean": 160.0, "ridge": 150.0},
}


def card(errors: dict[str, float] | None = None, **changes: Any) -> str:
    options: dict[str, Any] = {
        "sources": SOURCES,
        "curve": [{"step": 0, "training": 400.0, "held out": 410.0}, {"step": 1000, "training": 150.123, "held out": 160.0}],
        "facts": {"parameters": "3,344,897"},
        "evaluation": {"Zero-shot": "| data | AvgBIO |\n|---|---|\n| blood | 0.6 |\n"},
        "good_for": ["quick first looks"],
        "not_good_for": ["diagnosis"],
        "limits": ["few cells"],
        "licence": "BSD-3-Clause",
    }
    provenance = PROVENANCE if errors is None else PROVENANCE | {"held_out_squared_error": errors}
    return model_card("small", provenance, **(options | changes))


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        (
            {"gep": 140, "gene mean": 160, "ridge": 150},
            "expression better than each gene's mean and a ridge on the visible genes**: on held-out",
        ),
        ({"gep": 155, "gene mean": 160, "ridge": 150}, "better than each gene's mean, but WORSE than a ridge on the visible genes**"),
        ({"gep": 170, "gene mean": 160, "ridge": 150}, "expression WORSE than each gene's mean and a ridge on the visible genes**"),
        ({"gep": 160, "gene mean": 160}, "expression WORSE than each gene's mean**"),
        ({"gep": 140, "gene mean": 160}, "It was not held against a ridge."),
        ({"gep": 140}, "**It was not held against any simple predictor**"),
    ],
)
def test_the_first_paragraph_says_what_is_lost(errors, words):
    title, first = card(errors).split("\n\n")[:2]
    assert title == "# small"
    assert words in first
    assert f"is {errors['gep']:.1f} bins²" in first


def test_sections_stand_in_order_and_empty_ones_do_not():
    def headings(text: str) -> list[str]:
        return [line for line in text.splitlines() if line.startswith("#")]

    every = ["# small", "## Data", "## Recipe", "## Curve", "## Evaluation", "### Zero-shot", "## Good for", "## Not good for", "## Limits"]
    assert headings(card()) == [*every, "## Licence", "## How to use and to cite"]
    assert "## Curve" not in card(curve=())
    assert "## Evaluation" not in card(evaluation={})


def test_tables_are_tables():
    text = card()
    assert "| study | cells | source | licence |\n| --- | ---: | --- | --- |\n| blood | 2,896 | someone/repository abc123 | GPL-3 |" in text
    assert "| a \\| b |" in text
    assert "| step | training | held out |\n| ---: | ---: | ---: |\n| 0 | 400 | 410 |\n| 1,000 | 150.1 | 160 |" in text
    assert "Cells: 3,000 trained on, 396 held out." in text


def test_the_recipe_can_be_read_back():
    text = card().partition("```yaml\n")[2].partition("```")[0]
    assert yaml.safe_load(text) == PROVENANCE["recipe"]


def test_every_study_has_a_source_and_a_licence():
    with pytest.raises(AssertionError, match="no source is given for brain"):
        card(sources=SOURCES[:1])
    with pytest.raises(AssertionError, match="every source has a licence"):
        card(sources=[SOURCES[0], SOURCES[1] | {"licence": ""}])


def test_it_says_how_to_cite():
    assert "10.1038/s41592-024-02201-0" in card()
    assert 'from_pretrained("small")' in card()

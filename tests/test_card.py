"""The card says what is true of the model, the unpleasant first."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from annformer.card import Ratio, model_card

SCRIPT = Path(__file__).parents[1] / "scripts" / "ship_model.py"

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
        ({"gep": 160, "gene mean": 160}, "expression no better than (ties with) each gene's mean**"),
        ({"gep": 140, "gene mean": 160}, "It was not held against a ridge."),
        ({"gep": 140}, "**It was not held against any simple predictor**"),
    ],
)
def test_the_first_paragraph_says_what_is_lost(errors, words):
    title, first = card(errors).split("\n\n")[:2]
    assert title == "# small"
    assert words in first
    assert f"is {errors['gep']:.1f} bins²" in first


def test_the_first_paragraph_goes_by_the_interval():
    errors = {"gep": 140, "gene mean": 160, "ridge": 141}
    ratios = {"gene mean": Ratio(0.875, 0.86, 0.9), "ridge": Ratio(0.993, 0.981, 1.004)}
    first = card(errors, ratios=ratios).split("\n\n")[1]
    assert "expression better than each gene's mean, but no better than (ties with) a ridge on the visible genes**" in first
    assert "141.0 by a ridge on the visible genes (ratio 0.993, 0.981 to 1.004)" in first
    assert "160.0 by each gene's mean (ratio 0.875, 0.860 to 0.900)" in first
    assert "95 %" in first
    assert "WORSE than a ridge" in card(errors, ratios={"ridge": Ratio(1.02, 1.001, 1.04)})


@pytest.mark.skipif(not SCRIPT.is_file(), reason="the scripts are not part of an installed package")
def test_the_script_that_ships_a_model_reads_what_the_evaluation_writes():
    spec = spec_from_file_location("ship_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    row = pd.Series({"GEP": 143.6, "GEP / gene mean": "0.889 (0.867 to 0.914) beats", "GEP / ridge": "0.995 (0.980 to 1.003) ties"})
    assert script.ratios(row) == {"gene mean": (0.889, 0.867, 0.914), "ridge": (0.995, 0.98, 1.003)}
    assert [ratio.verdict for ratio in script.ratios(row).values()] == ["beats", "ties"]


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

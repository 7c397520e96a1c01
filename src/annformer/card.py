"""The model card: what a model is, from which data, how good it is, and what it is not good for, as the README.md of its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import yaml

FLOORS: Final = {"gene mean": "each gene's mean", "ridge": "a ridge on the visible genes"}
"""Simple predictors of hidden expression, as they are named in `held_out_squared_error`, in words."""
_VERDICTS: Final = {"beats": "better than", "ties": "no better than (ties with)", "loses": "WORSE than"}
CITATION: Final = (
    "The idea, the losses and the way of training are those of scGPT; whoever uses this model should cite it:\n\n"
    "> Cui H, Wang C, Maan H, et al. scGPT: toward building a foundation model for single-cell multi-omics using generative AI. "
    "*Nature Methods* 21, 1470-1480 (2024). <https://doi.org/10.1038/s41592-024-02201-0>\n\n"
    "annformer is written anew and holds none of its weights."
)


class Ratio(NamedTuple):
    """The model's squared error over a simple predictor's, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """*beats*, *loses*, or *ties* where the interval holds equal errors."""
        return "beats" if self.high < 1 else "loses" if self.low > 1 else "ties"

    def __str__(self) -> str:
        return f"{self.value:.3f}, {self.low:.3f} to {self.high:.3f}"


def model_card(
    name: str,
    provenance: Mapping[str, Any],
    *,
    sources: Sequence[Mapping[str, object]],
    ratios: Mapping[str, Ratio] = MappingProxyType({}),
    curve: Sequence[Mapping[str, object]] = (),
    facts: Mapping[str, object],
    evaluation: Mapping[str, str],
    good_for: Sequence[str],
    not_good_for: Sequence[str],
    limits: Sequence[str],
    licence: str,
) -> str:
    """Write the card of a pretrained model; the first paragraph says whether it has learned more than simple predictors know.

    Parameters
    ----------
    name
        What the model is called.
    provenance
        What `config.json` says of it. Read here: `held_out_squared_error` with `gep`, `gene mean`, and where it was computed `ridge`;
        and where they are there `made_by`, `cells` (what they were used for -> number), `recipe` (nested settings), and `corpus`, a list
        of studies by `name`, each of which must be in `sources`.
    sources
        One row for each study that the cells come from, all with the same keys: `study`, `licence` and whatever else, such as `tissue`,
        `cells`, `source`.
    ratios
        By the names of `FLOORS`: then the first paragraph goes by the interval and not by the errors alone.
    curve
        One row for each of a few steps, all with the same keys.
    facts
        Sizes and the like, for the list under the first paragraph.
    evaluation
        Heading -> Markdown, usually a table with a sentence.
    licence
        Of the weights.
    """
    parts = {
        "": [_first_line(provenance["held_out_squared_error"], ratios), _bullets([f"{what}: {value}" for what, value in facts.items()])],
        "Data": [_data(provenance, sources)],
        "Recipe": [_recipe(provenance)],
        "Curve": [_CURVE, _table(curve)] if curve else [],
        "Evaluation": [f"### {heading}\n\n{text.strip()}" for heading, text in evaluation.items()],
        "Good for": [_bullets(good_for)],
        "Not good for": [_bullets(not_good_for)],
        "Limits": [_bullets(limits)],
        "Licence": [licence],
        "How to use and to cite": [_USE.format(name=name), CITATION],
    }
    texts = [f"# {name}"]
    for heading, blocks in parts.items():
        if blocks := [block for block in blocks if block]:
            texts += [f"## {heading}"] * bool(heading) + blocks
    return "\n\n".join(texts) + "\n"


def _first_line(errors: Mapping[str, float], ratios: Mapping[str, Ratio]) -> str:
    """Say whether expression that the model does not see is predicted better than simple predictors do."""
    known = {floor: words for floor, words in FLOORS.items() if floor in errors}
    met = {floor: ratios.get(floor) or Ratio(*[errors["gep"] / errors[floor]] * 3) for floor in known}
    said = []
    for verdict, start in _VERDICTS.items():
        if of := [words for floor, words in known.items() if met[floor].verdict == verdict]:
            said.append(f"{start} {' and '.join(of)}")
    numbers = ", ".join(
        f"{errors[floor]:.1f} by {words}" + (f" (ratio {ratios[floor]})" if floor in ratios else "") for floor, words in known.items()
    )
    missing = "" if "ridge" in known else " It was not held against a ridge."
    claim = f"It predicts hidden expression {', but '.join(said)}" if said else "It was not held against any simple predictor"
    against = f" against {numbers}" if numbers else ""
    interval = " Ratios are the model's error over the other's, with their 95 % intervals." if ratios else ""
    return f"**{claim}**: on held-out cells its mean squared error is {errors['gep']:.1f} bins²{against}.{interval}{missing}"


def _data(provenance: Mapping[str, Any], sources: Sequence[Mapping[str, object]]) -> str:
    unnamed = {study["name"] for study in provenance.get("corpus", ())} - {source["study"] for source in sources}
    assert not unnamed, f"no source is given for {', '.join(sorted(unnamed))}"
    assert all(source["licence"] for source in sources), "every source has a licence"
    used = ", ".join(f"{number:,} {what}" for what, number in provenance.get("cells", {}).items())
    return "\n\n".join([f"Cells: {used}."] * bool(used) + [_table(sources)])


def _recipe(provenance: Mapping[str, Any]) -> str:
    made = f"Made by {provenance['made_by']}." if "made_by" in provenance else ""
    if "recipe" not in provenance:
        return made
    settings = yaml.safe_dump(provenance["recipe"], sort_keys=False, allow_unicode=True, width=120)
    return f"{made}\n\n```yaml\n{settings}```".strip()


def _table(rows: Sequence[Mapping[str, object]]) -> str:
    """Markdown table of rows with the same keys; numbers stand on the right."""
    keys = list(rows[0])
    right = [all(isinstance(row[key], int | float) for row in rows) for key in keys]
    lines = [keys, ["---:" if number else "---" for number in right], *([_cell(row[key]) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|").replace("\n", " ")


def _bullets(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


_CURVE: Final = "Losses on the way; those of held-out cells are asked the same questions each time."
_USE: Final = """```python
import annformer as af

model = af.ScGPT.from_pretrained("{name}")
af.embed(adata, model)  # obsm["X_annformer"]
```"""

"""What the recipes of tasks share: they ship as YAML, have names, and a user's file says only what is to differ."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml
from pydantic import model_validator

from annformer.config import Config
from annformer.errors import input_error


class Recipe(Config):
    """Settings of a task. What is not said is as in the first recipe of `shipped`, inside of settings too."""

    shipped: ClassVar[tuple[str, ...]]
    """Names of the recipes that ship."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: Any) -> Any:
        return _laid_over(_read_shipped(cls.shipped[0]), values) if isinstance(values, Mapping) else values

    @classmethod
    def named(cls, name: str | Path) -> Self:
        """Read one that ships, or a YAML file.

        Raises
        ------
        InputError
            When there is none, or with every setting that is unknown or out of range.
        """
        if str(name) in cls.shipped:
            return cls.read(_read_shipped(str(name)), where=f"the recipe {name}")
        path = Path(name)
        if not path.is_file():
            found = f"there is no recipe {str(name)!r}"
            raise input_error(found, f"one of {', '.join(cls.shipped)}, or a YAML file", "check the name")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            found = f"the recipe {name} is not YAML: {' '.join(str(error).split())}"
            raise input_error(found, "settings, as in the recipes that ship", "correct the line that is named") from None
        return cls.read(values or {}, where=f"the recipe {name}")


@cache
def _read_shipped(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((files("annformer") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    return values


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above`, and what only `below` says; settings inside of settings likewise. Values that are None are said."""
    merged = dict(below)
    for name, value in above.items():
        inner = merged.get(name)
        merged[name] = _laid_over(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return merged

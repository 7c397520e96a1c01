"""The base of everything annformer writes to disk as settings."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from annformer.errors import input_error


class Config(BaseModel):
    """Frozen settings that refuse unknown names, so that an old file or a typing error is never half understood."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def read(cls, values: object, *, where: str) -> Self:
        """Check `values` (a mapping, as read from JSON or YAML) and build the settings.

        Raises
        ------
        InputError
            With every field that is missing, unknown or out of range, and `where` they stood.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [f"  {'.'.join(map(str, e['loc'])) or '(all)'}: {e['msg']} (found {_short(e['input'])})" for e in error.errors()]
            found = f"{where}: no valid {cls.__name__}:\n" + "\n".join(lines)
            raise input_error(found, "known names with values in their range", "correct what is listed") from None

    def with_(self, **changes: Any) -> Self:
        """Return a checked copy with `changes`.

        Raises
        ------
        InputError
            When one of them is unknown or out of range.
        """
        return self.read(self.model_dump() | changes, where=f"settings ({', '.join(changes)})")


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"

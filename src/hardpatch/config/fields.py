"""Types of fields with their rules, and the check that holds every value against the rule of its field."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Annotated, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from hardpatch.runtime.errors import InputError, suggest

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
ShareAboveZero = Annotated[float, Field(gt=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings:
    """What a command can be told: a frozen dataclass that cannot be made with a value that breaks its field's rule.

    So flags and Python callers go through the same check, and no command calls it. Rules between fields, and those
    that only the images or the checkpoint know, stand where the command runs.
    """

    def __post_init__(self) -> None:
        """Hold every value against the rule of its field.

        Raises:
            InputError: Names each field, its rule and the value.
        """
        given = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}  # type: ignore[arg-type]
        hints = get_type_hints(type(self), include_extras=True)
        # pydantic makes what it checks, and making one of these is what calls it: it gets a class of the same fields.
        same_fields: type = dataclasses.make_dataclass(type(self).__name__, hints.items())
        try:
            checked: object = TypeAdapter(same_fields).validate_python(given)
        except ValidationError as error:
            raise refusal(error) from None
        for name in given:  # a list, say, has become the tuple that the field asks for
            object.__setattr__(self, name, getattr(checked, name))


def refusal(error: ValidationError, *, known: Iterable[str] = ()) -> InputError:
    """What pydantic found, a line for each field with its rule and the value.

    Args:
        error: What it raised.
        known: Names to suggest where one is misspelt.
    """
    lines = []
    for problem in error.errors():
        place = ".".join(str(part) for part in problem["loc"] if not str(part).startswith(("constrained", "literal")))
        if problem["type"] == "unexpected_keyword_argument":
            lines.append(f"{place}: no such field{suggest(str(problem['loc'][-1]), known)}")
        else:
            lines.append(f"{place}: {problem['msg'].lower()}, got {problem['input']!r}")
    return InputError("\n".join(lines))

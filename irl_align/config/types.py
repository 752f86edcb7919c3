"""The base class of a recipe's groups of options, and the types that several groups share."""

from __future__ import annotations

import os
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0.0, le=1.0)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or an id or name that may stand in its place. The shell does not expand the ~ of
data.path=~/e2e, so it is expanded here."""
ImportPath = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]


class Options(BaseModel):
    """Base of every group of options: strict types, unknown keys fail, values never change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

    used_with: ClassVar[tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...]] = ()
    """(option, its values, names): the named options have an effect only with these values."""

    def first_set(self, *names: str) -> str | None:
        """The first of the named options whose value is not the default."""
        fields = type(self).model_fields
        for name in names:
            if getattr(self, name) != fields[name].get_default(call_default_factory=True):
                return name
        return None

    @model_validator(mode="after")
    def _has_no_unused_option(self) -> Self:
        for option, values, names in self.used_with:
            value = getattr(self, option)
            if value not in values and (name := self.first_set(*names)):
                expected = " or ".join(each for each in values if each is not None)
                raise ValueError(f"{name} is an option of {option} {expected}, not of {value}")
        return self

"""What every group of options of a recipe is made of."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Above = Annotated[float, Field(gt=0.0)]
AtLeast = Annotated[float, Field(ge=0.0)]
PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path, or an id or name where one may stand; no shell expands the ~ of data.path=~/e2e."""
ImportPath = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$")]


class Options(BaseModel):
    """Base of every group of options: strict types, unknown keys fail, values never change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True
    )

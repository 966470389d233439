"""What all sections of a configuration are."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about what it holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

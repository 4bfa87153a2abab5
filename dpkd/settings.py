"""The base of every block of settings: closed, frozen, described."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["Block"]


class Block(BaseModel):
    """A block of run settings. Unknown keys are mistakes; values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

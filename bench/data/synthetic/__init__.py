"""Embedded data, generated from seeds: a closed world in text, and drawn scenes."""

from typing import Literal

Split = Literal["train", "test"]

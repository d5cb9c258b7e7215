"""Model section of a config, validated once at the boundary."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Kind = Literal["causal_lm", "image_text", "image_classifier"]
"""Inputs and outputs of a model: text to text, images and text to text, image to class."""


class ModelConfig(BaseModel):
    """One entry of the `model` config group.

    `source` is a Hugging Face id, or `zoo:NAME` for a small trained model that ships with the
    package. `path`, when given, is a local folder that is read instead; `source: local` needs one.
    `fresh:ARCHITECTURE` is an untrained image classifier for the data set `images`, its weights
    drawn with `seed`.

    `device_map` is for models larger than one device: `offload_cpu` and `offload_disk` keep the
    decoder layers in CPU memory or on disk and onload them one at a time; every other value
    (`auto`, `balanced`, ...) is passed to accelerate.

    `allow_remote_code` is set by a model's config, `trust_remote_code` by the user; code from the
    model's repository runs only with both and with a `revision` that is a commit.

    `system_prompt` is the sentence that an image_text model saw before each question in training.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
    # Validated even when absent: the rule below is about a missing path.
    path: str | None = Field(default=None, validate_default=True)
    revision: str = "main"
    kind: Kind = "causal_lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    allow_remote_code: bool = False
    trust_remote_code: bool = False
    max_length: int | None = Field(default=None, ge=8)
    add_bos: bool | None = None
    images: str | None = None
    seed: int | None = Field(default=None, ge=0)
    system_prompt: str | None = None

    @field_validator("path")
    @classmethod
    def _local_needs_path(cls, path: str | None, others: ValidationInfo) -> str | None:
        # `others.data` holds the fields declared above `path`, so `source` must stay before it.
        if path is None and others.data.get("source") == "local":
            raise ValueError("model=local needs model.path=FOLDER")
        return path

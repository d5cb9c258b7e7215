"""What a model config may say, checked once at the boundary."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Kind = Literal["causal_lm", "image_text", "image_classifier"]
"""What a model takes and gives: text to text, images and text to text, an image to a class."""


class ModelConfig(BaseModel):
    """One entry of the `model` config group.

    `source` is a Hugging Face id, or `zoo:NAME` for a small trained model that ships with the
    package; `path`, when given, is a local folder that is read instead, and `source: local` needs
    one. `device_map` is for models larger than one device: `offload_cpu` and `offload_disk` keep
    the decoder layers in CPU memory or on disk and bring them one at a time; others (`auto`,
    `balanced`, ...) are accelerate's.
    `fresh:ARCHITECTURE` is an untrained image classifier for the data set `images`, its weights
    drawn with `seed`.
    `allow_remote_code` is set by a model's config, `trust_remote_code` by the user; code from the
    model's repository runs only with both and with a `revision` that is a commit.
    `system_prompt` is the sentence that an image_text model was trained to see before a question.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: str
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
        if path is None and others.data.get("source") == "local":
            raise ValueError("model=local needs model.path=FOLDER")
        return path

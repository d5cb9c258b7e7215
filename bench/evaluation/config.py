"""Schema of the `benchmark` config group, validated at the boundary."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bench.evaluation.engine import Engine


class PerplexityConfig(BaseModel):
    """One perplexity: the text, the windowing protocol and the window length in tokens.

    `gptq_wikitext2` joins the documents of the test split and cuts them into consecutive windows,
    `gptq_c4` draws 256 random windows with seed 0, `consecutive` applies the first protocol to any
    text. `path` replaces the text by a local file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Literal["wikitext2", "c4", "english"]
    protocol: Literal["gptq_wikitext2", "gptq_c4", "consecutive"] = "consecutive"
    window: int = Field(default=2048, ge=8)
    path: str | None = None


class ImagesConfig(BaseModel):
    """The labelled images of a classification benchmark.

    `data` is the name of a data set in `bench.data.images` and `folder` its location; `download`
    lets torchvision fetch what the folder lacks. `split` is `test`, or `validation` for the part of
    the training images that is held out for choosing hyperparameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    folder: str | None = None
    download: bool = False
    split: Literal["test", "validation"] = "test"


class BenchmarkConfig(BaseModel):
    """One entry of the `benchmark` config group: harness tasks, perplexities, or both.

    `harness` selects the evaluator: `lm_eval` for text, `lmms_eval` for questions about images, or
    `images` for our own top-1 accuracy of classifiers, which reads `images` and ignores the keys
    about text. `suite` selects the data of the tasks: `real` (the harness's own data sets) or
    `micro` (the embedded data, in the same schemas).

    `metrics` maps a task to its headline metric, as `METRIC` or `METRIC,FILTER`; a task that is not
    listed uses its first metric. The unweighted mean of the headline metrics is the benchmark's
    `average`. `data` maps a task to a local parquet or JSON Lines file in the real data set's
    schema, or to a folder with one such file per split; null means no file. `num_fewshot: null`
    keeps each task's own number of shots.

    `backend` selects how log-likelihoods and answers are computed: `prefix_sharing` runs tokens
    that requests have in common through the network once; `padded` is the harness's own protocol
    with one row per request. Results are the same. A model that does not support prefix sharing
    falls back to the padded backend, and the record states the backend used and the reason.

    Only `lmms_eval` reads the last three keys. `system_prompt` replaces the model's own system
    prompt; an empty string removes it. `ocr_tokens` adds TextVQA's OCR tokens to the prompt, as in
    LLaVA's published numbers; lmms-eval omits them by default. `image_cache_gib` bounds the CPU
    memory for encoded images; 0 encodes an image again for every question.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    harness: Literal["lm_eval", "lmms_eval", "images"] = "lm_eval"
    suite: Literal["real", "micro"] = "real"
    tasks: tuple[str, ...] = ()
    metrics: dict[str, str] = Field(default_factory=dict)
    perplexity: dict[str, PerplexityConfig] = Field(default_factory=dict)
    num_fewshot: int | None = Field(default=0, ge=0)
    batch_size: int = Field(default=16, ge=1)
    engine: Engine = "shared"
    limit: int | None = Field(default=None, ge=1)
    data: dict[str, str] = Field(default_factory=dict)
    images: ImagesConfig = ImagesConfig()
    system_prompt: str | None = None
    ocr_tokens: bool = True
    image_cache_gib: float = Field(default=2.0, ge=0)

    @field_validator("data", mode="before")
    @classmethod
    def _without_blanks(cls, data: Any) -> Any:
        """Drop null entries: config files list them only to make them overridable."""
        if not isinstance(data, dict):
            return data
        return {task: path for task, path in data.items() if path is not None}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        # Metrics of tasks, of perplexities and the average share one namespace: the name alone.
        both = {*self.tasks, "average"} & self.perplexity.keys()
        if both:
            raise ValueError(f"benchmark.perplexity.{both.pop()}: a task has this name; rename it")
        return self

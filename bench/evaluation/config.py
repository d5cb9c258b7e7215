"""What a benchmark config may say, checked once at the boundary."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bench.evaluation.engine import Engine


class PerplexityConfig(BaseModel):
    """One perplexity: which text, cut into windows of how many tokens.

    `protocol` names how windows are drawn: `gptq_wikitext2` joins the test split and cuts it into
    consecutive windows, `gptq_c4` draws 256 random windows with seed 0, `consecutive` is the
    former for any text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Literal["wikitext2", "c4", "english"]
    protocol: Literal["gptq_wikitext2", "gptq_c4", "consecutive"] = "consecutive"
    window: int = Field(default=2048, ge=8)
    path: str | None = None


class ImagesConfig(BaseModel):
    """Which labelled images: a data set of `bench.data.images`, where it is, which of them.

    `download` lets torchvision fetch what `folder` lacks. `split` is `test`, or `validation` for
    the training images that are held out for choosing knobs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    folder: str | None = None
    download: bool = False
    split: Literal["test", "validation"] = "test"


class BenchmarkConfig(BaseModel):
    """One entry of the `benchmark` config group: harness tasks, perplexities, or both.

    `harness` names who scores: `lm_eval`, or `images`, our own count of right classes, which
    reads `images` and none of the keys about text.
    `suite` says where the tasks' data come from: `real` (the harness's own data sets) or `micro`
    (the embedded world, in the same schemas). `metrics` names the headline metric of each task,
    as `METRIC` or `METRIC,FILTER`; a task it does not name has its first one. Their unweighted
    mean is the benchmark's `average`. `data` points single tasks at local parquet or JSON-lines
    files in the real data set's schema, or at a folder of such files, one per split; null stands
    for no file. `num_fewshot` null leaves each task its own number.

    `engine` says what goes through the network: with `shared`, what requests have in common goes
    once; `plain` is the harness's own protocol, every request a row of its own. Log-likelihoods and
    answers are the same. A model that cannot be asked by the shared engine is asked plainly; the
    record says which it was and why.

    `harness` says who asks and scores: `lm_eval` texts, `lmms_eval` questions about images. Only
    the latter reads the last three settings. `system_prompt` goes before every question in place
    of the model's own; an empty one is none. `ocr_tokens` gives TextVQA's OCR tokens, as LLaVA's
    published numbers have it and lmms-eval by default has not. `image_cache_gib` bounds the memory
    for encoded images, on the CPU; 0 encodes an image anew for every question.
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
        """Drop the keys that a config file lists only so that they can be overridden."""
        if not isinstance(data, dict):
            return data
        return {task: path for task, path in data.items() if path is not None}

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        """Refuse a text that is called like a task: metrics are told apart by that name."""
        both = {*self.tasks, "average"} & self.perplexity.keys()
        if both:
            raise ValueError(f"benchmark.perplexity.{both.pop()} is the name of a task as well")
        return self

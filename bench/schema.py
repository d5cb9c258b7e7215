"""Typed sections of a config: model, benchmark, calibration, prompts, costs, tracker.

A leaf that imports pydantic only, so that every package can read its own section.
"""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from bench.schema_types import BatchSize, Distinct, Limit, NullIsEmpty, Shots

ModelKind = Literal["causal_lm", "image_text", "image_classifier"]
"""Inputs and outputs of a model: text to text, images and text to text, image to class."""


class ProcessorConfig(BaseModel):
    """How the images of an image_text model become pixels; null is as in lmms-eval's adapter.

    `resize` is for CLIP's processors (LLaVA-1.5): `crop` resizes the shorter side and crops the
    centre, `pad` first centres the image on a square, as in LLaVA's own evaluation. `min_pixels`
    and `max_pixels` bound the area of an image (Qwen-VL), `max_tiles` the number of tiles that it
    is cut into, without the thumbnail (InternVL).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    resize: Literal["crop", "pad"] | None = None
    min_pixels: PositiveInt | None = None
    max_pixels: PositiveInt | None = None
    max_tiles: PositiveInt | None = None


class ModelConfig(BaseModel):
    """One entry of the `model` config group.

    `source` is a Hugging Face id, or `embedded:NAME` for a small trained model that ships with the
    package. `path`, when given, is a local folder or GGUF file that is read instead; `source:
    local` needs one. `adapter`, a folder or a Hugging Face id, is a LoRA adapter that is merged
    into the weights before anything else happens to them.
    `fresh:ARCHITECTURE` is an untrained image classifier for the data set `images`, its weights
    drawn with `seed`; `torchvision:NAME` is one of torchvision, and `module` the class `_target_`
    of a package named in `packages`, called with `arguments`. `channels`, `size` and `classes`
    describe images that are in no known data set. With these sources, `path` may be a state dict in
    safetensors.

    `device_map` is for models larger than one device: `offload_cpu` and `offload_disk` keep the
    decoder layers in CPU memory or on disk and onload them one at a time; every other value
    (`auto`, `balanced`, ...) is passed to accelerate.

    `allow_remote_code` is set by a model's config, `trust_remote_code` by the user; code from the
    model's repository runs only with both and with a `revision` that is a commit.

    `system_prompt` is the sentence that an image_text model saw before each question in training.
    `processor` says how its images become pixels.
    """

    # `_target_` keeps its name in records: by it, every config is searched for code to run.
    model_config = ConfigDict(
        extra="forbid", frozen=True, populate_by_name=True, serialize_by_alias=True
    )

    name: str
    source: str
    target: str | None = Field(default=None, alias="_target_")
    arguments: dict[str, Any] | None = None
    path: str | None = None
    revision: str = "main"
    adapter: str | None = Field(default=None, min_length=1)
    kind: ModelKind = "causal_lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    device_map: str | None = None
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    allow_remote_code: bool = False
    trust_remote_code: bool = False
    max_length: int | None = Field(default=None, ge=8)
    add_bos: bool | None = None
    images: str | None = None
    channels: int | None = Field(default=None, ge=1)
    size: int | None = Field(default=None, ge=8)
    classes: int | None = Field(default=None, ge=2)
    seed: int | None = Field(default=None, ge=0)
    system_prompt: str | None = None
    processor: ProcessorConfig = ProcessorConfig()

    @model_validator(mode="before")
    @classmethod
    def _name_the_adapter(cls, given: Any) -> Any:
        """Append the adapter to the name, so that tables tell an adapted model from its base."""
        if isinstance(given, dict) and given.get("adapter") and given.get("name"):
            adapter = PurePath(str(given["adapter"])).name
            # Validated again when a recorded run is repeated: the name has it by then.
            if adapter and not str(given["name"]).endswith(f"+{adapter}"):
                return {**given, "name": f"{given['name']}+{adapter}"}
        return given

    @model_validator(mode="after")
    def _local_needs_path(self) -> ModelConfig:
        if self.path is None and self.source == "local":
            raise ValueError("model=local needs model.path=FOLDER")
        if (self.source == "module") != (self.target is not None):
            raise ValueError("model._target_ is required by model=module and by no other model")
        return self


class PerplexityConfig(BaseModel):
    """One perplexity: the text, the windowing protocol and the window length in tokens.

    `gptq_wikitext2` joins the documents of the test split and cuts consecutive windows, as does
    `consecutive` with any text; `gptq_c4` draws 256 random windows with seed 0. `windows` keeps the
    first so many, `benchmark.limit` if it is null. `path` replaces the text by a local file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: Literal["wikitext2", "c4", "english"]
    protocol: Literal["gptq_wikitext2", "gptq_c4", "consecutive"] = "consecutive"
    window: int = Field(default=2048, ge=8)
    windows: int | None = Field(default=None, ge=1)
    path: str | None = Field(default=None, min_length=1)


class ImagesConfig(BaseModel):
    """The labelled images of a classification benchmark.

    `data` names a data set in `bench.data.image_catalogue`, `folder` is its location; `download`
    lets torchvision fetch what the folder lacks. `size` is for `data=folder` alone, a folder of
    images of your own: height and width to which they are resized and cropped. `split` is `test`
    or `validation`, training images that are held out for choosing hyperparameters.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = "digits"
    folder: str | None = None
    download: bool = False
    size: int = Field(default=224, ge=8)
    split: Literal["test", "validation"] = "test"


HARNESS_BENCHMARKS = ("lm_eval", "lmms_eval")
"""Benchmarks that are a harness without tasks; their names say which tasks a run adds."""
_NAMED_TASKS = 3
Backend = Literal["prefix_sharing", "padded"]
Overlong = Literal["truncate", "skip", "refuse"]
"""What happens to a prompt that does not fit into a model together with its answer."""


class BenchmarkConfig(BaseModel):
    """One entry of the `benchmark` config group: harness tasks, perplexities, or both.

    `harness` selects the evaluator: `lm_eval` for text, `lmms_eval` for questions about images, or
    `images` for our own top-1 accuracy of classifiers, which reads `images` and ignores the keys
    about text. `suite` selects the data of the tasks: `real` (the harness's own data sets) or
    `micro` (the embedded data, in the same schemas).

    `metrics` maps a task to its headline metric, as `METRIC` or `METRIC,FILTER`; a task that is not
    listed uses its first metric. The unweighted mean of the headline metrics is the benchmark's
    `average`. `data` maps a task to a local parquet or JSON Lines file in the real data set's
    schema, or to a folder with one such file per split; null means no file. A group of tasks is
    mapped to a folder with one such file or folder per task, under the task's name. `include` lists
    folders with task files of one's own; Python that these name runs only with `trust_code`.

    `num_fewshot` is the number of shots of all tasks, or a mapping from tasks and groups to theirs;
    null, and a task that is not in the mapping, keep the task's own number. `limit` is the number
    of documents of each task, or a share of them between 0 and 1. `batch_size` of `auto` fits
    batches to the free memory.

    `chat_template` renders the prompts of `lm_eval` by the tokenizer's template, or by the one of
    that name, with the variables `chat_template_args`; `fewshot_as_multiturn` makes every shot a
    turn. `think_end_token` ends the thoughts before an answer. `gen_kwargs` replaces settings of
    the tasks' generation. `system_prompt` opens every prompt; with `lmms_eval` it replaces the
    model's own system prompt, and an empty string removes that.

    `backend` selects how log-likelihoods and answers are computed: `prefix_sharing` runs tokens
    that requests have in common through the network once; `padded` is the harness's own protocol
    with one row per request. Results are the same. A model without prefix sharing falls back to it,
    and the record states the backend used and the reason.

    `overlong` selects what happens to a prompt that does not fit into the model together with its
    answer: `truncate` removes tokens on its left as lm-eval does, so that numbers stay comparable
    with published ones; `skip` leaves the document without an answer; `refuse` ends the run. A
    question about an image is never cut.

    `allow_missing` is the share of a task's rows that may have no answer (log-likelihoods that are
    not finite, an empty text, no label, an image that cannot be shown). Up to it the number is over
    the answered rows, and the record counts the others; beyond it the task has no number.

    Only `lmms_eval` reads these two: `ocr_tokens` adds TextVQA's OCR tokens, as LLaVA's published
    numbers do and lmms-eval by default does not; `image_cache_gib` bounds the CPU memory for
    encoded images, 0 encodes an image again for every question.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    harness: Literal["lm_eval", "lmms_eval", "images"] = "lm_eval"
    suite: Literal["real", "micro"] = "real"
    tasks: Annotated[tuple[str, ...], Distinct] = ()
    include: Annotated[tuple[str, ...], Distinct] = ()
    trust_code: bool = False
    metrics: Annotated[dict[str, str], NullIsEmpty] = Field(default_factory=dict)
    perplexity: dict[str, PerplexityConfig] = Field(default_factory=dict)
    num_fewshot: Shots = 0
    batch_size: BatchSize = 16
    backend: Backend = "prefix_sharing"
    limit: Limit = None
    overlong: Overlong = "truncate"
    allow_missing: float = Field(default=0.0, ge=0, le=1)
    data: dict[str, str] = Field(default_factory=dict)
    images: ImagesConfig = ImagesConfig()
    system_prompt: str | None = None
    chat_template: bool | str = False
    chat_template_args: Annotated[dict[str, Any], NullIsEmpty] = Field(default_factory=dict)
    fewshot_as_multiturn: bool = True
    think_end_token: str | None = Field(default=None, min_length=1)
    gen_kwargs: Annotated[dict[str, Any], NullIsEmpty] = Field(default_factory=dict)
    ocr_tokens: bool = True
    image_cache_gib: float = Field(default=2.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _name_the_tasks(cls, given: Any) -> Any:
        """Name a harness's benchmark by its tasks, so that records say what was run."""
        if not isinstance(given, dict) or given.get("name") not in HARNESS_BENCHMARKS:
            return given
        tasks = list(map(str, given.get("tasks") or ()))
        more = [f"{len(tasks) - _NAMED_TASKS} more"] if len(tasks) > _NAMED_TASKS else []
        named = ":".join(filter(None, [given["name"], "+".join(tasks[:_NAMED_TASKS] + more)]))
        return {**given, "name": named}

    @field_validator("tasks")
    @classmethod
    def _names_only(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse paths: the harnesses run the functions that a task file names."""
        for name in tasks:
            if "/" in name or "\\" in name:
                raise ValueError(f"{name!r} is a path: give the name of a task")
        return tasks

    @field_validator("data", mode="before")
    @classmethod
    def _without_blanks(cls, data: Any) -> Any:
        """Drop null entries: config files list them only to make them overridable."""
        if not isinstance(data, dict):
            return {} if data is None else data
        for task, path in data.items():
            # Not the same as null: an unset variable of a shell would silently score other data.
            if path == "":
                raise ValueError(f"benchmark.data.{task} is empty: give a path, or null for none")
        return {task: path for task, path in data.items() if path is not None}

    @model_validator(mode="after")
    def _keys_agree(self) -> Self:
        if self.name in HARNESS_BENCHMARKS:
            raise ValueError(f"benchmark={self.name} needs benchmark.tasks=[NAME,...]")
        if self.chat_template_args and not self.chat_template:
            raise ValueError("benchmark.chat_template_args needs benchmark.chat_template=true")
        # Metrics of tasks, of perplexities and the average share one namespace: the name alone.
        both = {*self.tasks, "average"} & self.perplexity.keys()
        if both:
            raise ValueError(f"benchmark.perplexity.{both.pop()}: a task has this name; rename it")
        return self


MeasuredQuantity = Literal["latency", "memory", "energy", "roofline"]
"""Quantities measured in addition to the counts; `roofline` is what the device can do at best."""
SizeList = Annotated[tuple[PositiveInt, ...], Field(min_length=1), Distinct]


class TimingConfig(BaseModel):
    """Shapes at which a model is measured, and the number of repetitions.

    Language models run every batch with every length in tokens; vision-language models every batch
    with every number of words after one image; image classifiers every batch. A generation has
    `new_tokens` tokens.

    A round times each candidate once. Warm-up ends when the times have settled, after at most
    `max_warmup_rounds` rounds. At least `rounds` rounds follow; more are added until the interval
    of every ratio extends at most `precision` of its value to either side, up to `max_rounds`
    rounds or `max_seconds` seconds. A result whose interval is still wider is marked. On a loaded
    machine all rounds are repeated, in `attempts` attempts at most; the best one is kept and
    marked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batches: SizeList = (1,)
    lengths: SizeList = (512,)
    words: SizeList = (32,)
    # The first token belongs to the prefill: seconds per decoded token need a second one.
    new_tokens: int = Field(default=32, ge=2)
    rounds: int = Field(default=15, ge=5)
    precision: float = Field(default=0.03, gt=0, lt=1)
    max_rounds: int = Field(default=200, ge=5)
    max_seconds: float = Field(default=90.0, gt=0)
    max_warmup_rounds: int = Field(default=20, ge=1)
    attempts: int = Field(default=2, ge=1)
    # Per window: a GPU's energy counter advances only about every 0.1 s.
    energy_seconds: float = Field(default=3.0, gt=0)

    @model_validator(mode="after")
    def _rounds_within_limit(self) -> Self:
        if self.rounds > self.max_rounds:
            raise ValueError(
                f"costs.timing.rounds={self.rounds} is above "
                f"costs.timing.max_rounds={self.max_rounds}: raise max_rounds"
            )
        return self


FlopsConvention = Literal["yopo", "pyramiddrop", "visionzip", "fastv", "vtw"]


class FlopsConfig(BaseModel):
    """Paper's FLOP `convention` to report next to slimbench's own counts; none by default."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    convention: FlopsConvention | None = None


MAX_SHAPE = 2**24
"""Far beyond every context window; counting would allocate masks and positions for more."""


class CostsConfig(BaseModel):
    """One entry of the `costs` config group.

    FLOPs are counted at `batch` sequences of `length` tokens for a language model, and at one image
    and `words` words for a vision-language model. `measure` lists what is measured in addition, at
    the shapes of `timing`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    batch: int = Field(default=1, ge=1, le=MAX_SHAPE)
    length: int = Field(default=512, ge=1, le=MAX_SHAPE)
    words: int = Field(default=32, ge=1, le=MAX_SHAPE)
    flops: FlopsConfig = FlopsConfig()
    measure: Annotated[tuple[MeasuredQuantity, ...], Distinct] = ()
    timing: TimingConfig = TimingConfig()


class PromptsConfig(BaseModel):
    """Source of the image prompts, their number, and the batch size of a forward.

    `embedded` draws scenes that appear in no task. `file` reads a parquet file at `path`, `hub` the
    `split` of the data set `dataset` (with configuration `subset`); both draw `count` rows with
    `seed` and read the columns named by `image_column` and `question_column`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Literal["embedded", "file", "hub"]
    path: str | None = None
    dataset: str | None = None
    subset: str | None = None
    split: str = "train"
    image_column: str = "image"
    question_column: str = "question"
    # A million of the smallest images fill the memory of a large machine.
    count: int = Field(default=100, ge=1, le=1_000_000)
    batch: int = Field(default=10, ge=1)
    seed: int = Field(default=1234, ge=0)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.source == "file") != (self.path is not None):
            raise ValueError("prompts.path is required by source=file and by no other source")
        if (self.source == "hub") != (self.dataset is not None):
            raise ValueError("prompts.dataset is required by source=hub and by no other source")
        return self


WANDB_INIT_SECONDS = 20.0  # A healthy server answers much sooner; the client's own limit is 90 s.


class TrackerConfig(BaseModel):
    """One entry of the `tracker` config group: Weights & Biases, or none.

    `timeout` bounds an upload in seconds; `live` shows a run as it goes, `auto` only if online.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["wandb", "none"] = "wandb"
    project: str = "slimbench"
    entity: str | None = None
    mode: Literal["auto", "online", "offline"] = "auto"
    timeout: float = Field(default=120, gt=0)
    samples: bool = True  # False keeps prompts and answers on this machine
    live: Literal["auto"] | bool = "auto"

    @field_validator("project", "entity")
    @classmethod
    def _no_key(cls, name: str | None) -> str | None:
        # W&B's key is 40 hexadecimal digits, as is a commit, so only its place tells.
        if name is not None and re.fullmatch("[0-9a-f]{40}", name):
            raise ValueError("40 hexadecimal digits are a W&B key and no name; revoke the key")
        return name


MAX_CALIBRATION_TOKENS = 2**30
"""Eight gigabytes as 64-bit integers, two thousand times what the papers use."""


class CalibrationConfig(BaseModel):
    """Source of the calibration text, number and length of its rows, and sampling seed.

    `embedded` takes half of its rows from the closed world's corpus and half from English prose,
    both of which are available offline. `text` reads one UTF-8 file at `path`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    source: Literal["embedded", "english", "world", "wikitext2", "c4", "text"]
    path: str | None = None
    rows: int = Field(default=128, ge=1)
    length: int = Field(default=2048, ge=2)
    seed: int = Field(default=1234, ge=0)

    @model_validator(mode="after")
    def _tokens_fit(self) -> CalibrationConfig:
        if self.rows * self.length > MAX_CALIBRATION_TOKENS:
            raise ValueError(
                f"calibration.rows={self.rows} of calibration.length={self.length} are "
                f"{self.rows * self.length:,} tokens: at most {MAX_CALIBRATION_TOKENS:,}"
            )
        return self

    @model_validator(mode="after")
    def _path_for_text_only(self) -> CalibrationConfig:
        if (self.source == "text") != (self.path is not None):
            raise ValueError("calibration.path is required by source=text and by no other source")
        return self

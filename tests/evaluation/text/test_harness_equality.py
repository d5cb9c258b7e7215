"""Our adapter and the harness's own `hf` model must say the same about the same weights."""

import copy
import os
from dataclasses import replace
from pathlib import Path

import lm_eval.models.huggingface
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate as harness

from bench.data.synthetic.world import TASKS
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.evaluation.task_planning import quiet_lm_eval
from bench.evaluation.text.adapter import LmEvalAdapter
from bench.schema import ModelConfig
from bench.ui import SILENT


def reference(model, batch_size=4):
    return lm_eval.models.huggingface.HFLM(
        pretrained=model.network,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
        max_length=model.config.max_length,
        add_bos_token=model.config.add_bos,
    )


def answers(lm, kind, arguments):
    requests = [
        Instance(request_type=kind, doc={}, arguments=argument, idx=0) for argument in arguments
    ]
    return getattr(lm, kind)(requests)


def assert_same(ours, theirs, tolerance=1e-4):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    values = [[value for value, _ in side] for side in (ours, theirs)]
    assert close(*values, tolerance), values


def close(ours, theirs, tolerance=1e-4):
    """The harness adds up in float32, which at a thousand tells apart nothing under 2^-23 of it."""
    ours, theirs = torch.tensor(ours), torch.tensor(theirs)
    return torch.allclose(ours, theirs, atol=tolerance, rtol=2**-23)


@pytest.mark.sample(1)
@pytest.mark.parametrize("backend", ["prefix_sharing", "padded"])
@pytest.mark.parametrize("shots", [0, 2])
def test_all_nine_tasks_agree_per_sample(model, shots, backend):
    assert_equal_on_all_nine(model, shots, limit=8, backend=backend)


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 5])
def test_all_nine_tasks_agree_on_every_document(model, shots):
    """Of 3,600 documents one or two may meet a router that cannot decide: then float64 decides."""
    assert_equal_on_all_nine(model, shots, limit=None, ties=2)


REAL = os.environ.get("SLIMBENCH_REAL_TASKS")


@pytest.mark.skipif(not REAL, reason="SLIMBENCH_REAL_TASKS names no folder of real tasks")
@pytest.mark.parametrize("shots", [0, 5])
@pytest.mark.parametrize("task", ["arc_easy", "openbookqa", "piqa"])
def test_real_tasks_agree_per_sample(model, task, shots):
    file = Path(str(REAL)) / f"{task}.parquet"
    benchmark = BenchmarkConfig(
        name="real", tasks=(task,), data={task: str(file)}, limit=40, num_fewshot=shots
    )
    assert_equal(model, benchmark)


def test_the_shipped_model_agrees_too():
    from bench.models import loading, source

    config = ModelConfig(
        name="micro_moe", source="embedded:micro_moe", device="cpu", dtype="float32"
    )
    try:
        source = source.resolve_model(config, offline=True)
    except UserError as error:
        pytest.skip(str(error))
    assert_equal_on_all_nine(loading.load_model(source), shots=0, limit=6)


def assert_equal_on_all_nine(model, shots, limit, backend="prefix_sharing", ties=0):
    options = {"suite": "micro", "limit": limit, "num_fewshot": shots, "batch_size": 7}
    benchmark = BenchmarkConfig(name="nine", tasks=TASKS, backend=backend, **options)
    assert_equal(model, benchmark, ties)


def assert_equal(model, benchmark, ties=0):
    """Compare all samples and scores; up to `ties` samples may be right where the harness is not.

    Where a router gives two experts the same weight but for rounding, float32 may choose either,
    and the harness's own answer is then a thousandth from the one in float64.
    """
    evaluation = evaluate(model, plan(benchmark, offline=True))
    assert evaluation.backend["used"] == benchmark.backend
    ours = {(row["task"], row["doc_id"]): row for row in evaluation.samples}
    scores = {(m.task, m.metric): m for m in evaluation.metrics}

    theirs = plainly(model, benchmark)
    assert len(ours) == sum(map(len, theirs["samples"].values())) > 0
    torn = []
    for name, samples in theirs["samples"].items():
        for sample in samples:
            row = ours[name, sample["doc_id"]]
            assert_same_sample(row, sample)
            if not close(row["loglikelihoods"], [response[0] for (response,) in sample["resps"]]):
                torn.append((row, sample))
    assert len(torn) <= ties
    for row, sample in torn:
        exact = [in_float64(model, *asked) for asked in sample["arguments"]]
        assert close(row["loglikelihoods"], exact), (row["loglikelihoods"], exact)
    for name, found in theirs["results"].items():
        for metric in {"acc,none", "acc_norm,none"} & found.keys():
            score = scores[name, metric.removesuffix(",none")]
            assert score.value == found[metric]
            assert score.stderr == found[metric.replace(",", "_stderr,")]
            assert score.shots == benchmark.num_fewshot


def plainly(model, benchmark):
    """Evaluate with nothing of ours but the task objects, made anew."""
    tasks = {
        task.name: task.tasks[task.name] for task in plan(benchmark, offline=True).harness.tasks
    }
    for task in tasks.values():
        task.set_fewshot_seed(1234)
    with quiet_lm_eval():
        lm = reference(model, batch_size=32)
        return harness(lm, {"tasks": tasks}, limit=benchmark.limit, bootstrap_iters=1)


def assert_same_sample(row, sample):
    assert list(row["greedy"]) == [response[1] for (response,) in sample["resps"]]
    assert row["doc_hash"] == sample["doc_hash"]
    assert row["prompt_hash"] == sample["prompt_hash"]
    assert all(row[metric] == sample[metric] for metric in sample["metrics"])


@torch.no_grad()
def in_float64(model, context, continuation):
    """The log-likelihood of a continuation by the whole network in double precision."""
    network = copy.deepcopy(model.network).double()
    network.set_experts_implementation("eager")
    ids = model.tokenizer(context + continuation)["input_ids"]
    start = len(model.tokenizer(context)["input_ids"])
    logits_TV = network(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
    asked_N1 = torch.tensor(ids[start:])[:, None]
    return logits_TV[start - 1 :].gather(-1, asked_N1).sum().item()


PAIRS = [
    ("The first word", " of a sentence"),
    ("The first word ", "of a sentence"),
    ("Is it so? Answer:", " yes"),
    ("Is it so? Answer:", " no"),
    ("Is it so? Answer:", " no doubt about it"),
    ("", "An answer to no question"),
    ("x", "y"),
    ("a long context " * 20, " and its end"),
]


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize(
    ("batch_size", "backend"), [(1, "prefix_sharing"), (3, "padded"), (64, "padded")]
)
def test_pairs_agree_at_any_batch_size(model, batch_size, backend, add_bos):
    model = _with(model, add_bos=add_bos)
    ours = answers(LmEvalAdapter(model, batch_size, SILENT, backend), "loglikelihood", PAIRS)
    assert_same(ours, answers(reference(model), "loglikelihood", PAIRS))


@pytest.mark.parametrize("backend", ["prefix_sharing", "padded"])
def test_a_context_that_is_too_long_is_cut_on_the_left(short_model, backend):
    ours = answers(LmEvalAdapter(short_model, 3, SILENT, backend), "loglikelihood", PAIRS)
    assert_same(ours, answers(reference(short_model), "loglikelihood", PAIRS))


def test_a_tokenizer_that_adds_bos_adds_it_once(tokenizer, model):
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    backend.post_processor = TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])
    begins = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end[0], eos_token=end[0])
    model = _with(model, tokenizer=begins)
    pairs = [*PAIRS, (f"{end[0]}already begun", " and ended")]
    ours = answers(LmEvalAdapter(model, 4, SILENT), "loglikelihood", pairs)
    assert_same(ours, answers(reference(model), "loglikelihood", pairs))


@pytest.mark.parametrize("backend", ["prefix_sharing", "padded"])
def test_rolling_windows_agree(short_model, backend):
    texts = [("one short text",), ("a text of several windows, " * 12,), ("another",)]
    ours = answers(LmEvalAdapter(short_model, 2, SILENT, backend), "loglikelihood_rolling", texts)
    theirs = answers(reference(short_model), "loglikelihood_rolling", texts)
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_generation_agrees_and_stops(model):
    free = {"until": ["\n\n"], "max_gen_toks": 24, "do_sample": False}
    first = answers(LmEvalAdapter(model, 4, SILENT), "generate_until", [("The first word", free)])[
        0
    ]
    stop = first[5:7]
    asked = [
        ("The first word", free),
        ("The first word", {**free, "until": [stop]}),
        ("Another context, a longer one", {**free, "until": [stop]}),
        ("a long context " * 40, free),
    ]
    ours = answers(LmEvalAdapter(model, 4, SILENT), "generate_until", asked)
    assert ours == answers(reference(model), "generate_until", asked)
    assert stop
    assert ours[1] == first.split(stop)[0]


def test_bfloat16_is_close_to_float32(model, half_model):
    exact = answers(LmEvalAdapter(model, 4, SILENT), "loglikelihood", PAIRS)
    rough = answers(LmEvalAdapter(half_model, 4, SILENT), "loglikelihood", PAIRS)
    for (value, _), (near, _), (_, continuation) in zip(exact, rough, PAIRS, strict=True):
        assert near == pytest.approx(value, abs=0.1 * len(continuation))
    alone = answers(LmEvalAdapter(half_model, 1, SILENT), "loglikelihood", PAIRS)
    assert [value for value, _ in rough] == pytest.approx([value for value, _ in alone], abs=0.2)


def _with(model, tokenizer=None, **config):
    changed = model.config.model_copy(update=config)
    return replace(model, config=changed, tokenizer=tokenizer or model.tokenizer)

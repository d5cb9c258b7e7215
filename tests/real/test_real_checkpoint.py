"""SmolLM2 through the whole of slimbench, compared with plain transformers and plain lm-eval."""

import math

import lm_eval
import peft
import pytest
import torch
import transformers
from lm_eval.models.huggingface import HFLM

from bench.cli.main import main
from bench.config.composition import compose_run_config
from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.records import samples
from bench.reporting.tables import load_table_config, table_slots
from bench.runner.inputs import check_run
from bench.runner.session import Session
from tests.evaluation.text.test_harness_equality import assert_equal
from tests.models.quantized_folder import write_quantized
from tests.real.conftest import load

PROMPT = "The capital of France is"
TASKS = ("arc_easy", "piqa", "openbookqa", "boolq", "rte", "hellaswag")


def next_word(network, tokenizer):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return tokenizer.decode(network(ids).logits[0, -1].argmax())


def plain(folder):
    """The network of a folder, by transformers alone."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(network, tokenizer, prompt=PROMPT):
    with torch.no_grad():
        return network(tokenizer(prompt, return_tensors="pt")["input_ids"]).logits


def test_the_gguf_file_is_the_model_that_was_published(model):
    config = model.network.config
    shape = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    assert shape == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert config.tie_word_embeddings
    assert next_word(model.network, model.tokenizer) == " Paris"
    asked = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>user\nHello<|im_end|>" in model.tokenizer.apply_chat_template(
        asked, tokenize=False
    )


def test_a_run_is_given_the_gguf_file_by_name(gguf, run):
    choice = [f"model={gguf}", "benchmark=perplexity_micro", "benchmark.limit=1", "costs.length=32"]
    (record,) = run(*choice)
    assert record.model.name == "SmolLM2-135M-Instruct.Q4_1"
    assert record.model.parameters == 134_515_008
    assert record.model.bytes >= 4 * record.model.parameters
    (again,) = run(*choice)
    assert again.id == record.id


@pytest.mark.parametrize("task", TASKS)
def test_real_tasks_agree_with_lm_eval_per_sample(task, model, real_tasks):
    file = real_tasks / f"{task}.parquet"
    data = {task: str(file)}
    assert_equal(model, BenchmarkConfig(name="real", tasks=(task,), data=data, limit=8))


def test_perplexity_is_that_of_a_direct_computation(model, real_tasks, folder):
    file = real_tasks.parent / "wikitext2" / "test.parquet"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    config = {"text": "wikitext2", "protocol": "gptq_wikitext2", "path": str(file)}
    benchmark = BenchmarkConfig(name="wikitext2", perplexity={"wikitext2": config}, limit=2)
    (found,) = evaluate(model, plan(benchmark, offline=True)).metrics

    import pandas

    text = "\n\n".join(pandas.read_parquet(file)["text"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0, : 2 * 2048].view(2, 1, 2048)
    network = plain(folder)
    with torch.no_grad():
        losses = [float(network(row, labels=row).loss) for row in ids]
    assert found.value == pytest.approx(math.exp(sum(losses) / 2), rel=1e-5)


def test_an_adapter_by_peft_is_merged(folder, run, tmp_path):
    targets = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapted = peft.get_peft_model(plain(folder), peft.LoraConfig(task_type="CAUSAL_LM", **targets))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.eval()

    ours = load(folder, adapter=str(tmp_path / "adapter"))
    expected = logits(adapted, ours.tokenizer)
    torch.testing.assert_close(logits(ours.network, ours.tokenizer), expected, atol=1e-3, rtol=1e-3)
    assert not torch.allclose(logits(plain(folder), ours.tokenizer), expected, atol=1e-1)

    small = ["benchmark=perplexity_micro", "benchmark.limit=1", "costs.length=32"]
    adapter = ["model.name=smol", f"model.adapter={tmp_path / 'adapter'}"]
    (record,) = run(f"model={folder}", *adapter, *small)
    assert record.model.name == "smol+adapter"
    (told,) = evaluate(ours, plan(compose_run_config(small).benchmark, offline=True)).metrics
    assert record.metrics[0].value == pytest.approx(told.value, rel=1e-6)

    # The same adapter for a base of another width.
    narrow = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=30,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(narrow).save_pretrained(tmp_path / "narrow")
    with pytest.raises(UserError, match="for another base"):
        load(tmp_path / "narrow", adapter=str(tmp_path / "adapter"))


def test_a_quantized_checkpoint_is_scored_as_it_is_stored(folder, run, tmp_path):
    quantized = tmp_path / "w8"
    network = plain(folder)
    network.save_pretrained(quantized)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(quantized)
    reference = write_quantized(network, quantized, bits=8)

    ours = load(quantized)
    torch.testing.assert_close(
        logits(ours.network, tokenizer), logits(reference, tokenizer), atol=1e-3, rtol=1e-3
    )
    assert next_word(ours.network, tokenizer) == " Paris"
    small = ["benchmark=perplexity_micro", "benchmark.limit=1", "costs.length=32"]
    (record,) = run(f"model={quantized}", *small)
    assert record.model.parameters == 134_515_008
    # 28.3 million embeddings in float32, the rest in 8 bits, and scales.
    assert 219e6 < record.model.bytes < 225e6
    with pytest.raises(UserError, match="which are quantized in the checkpoint"):
        run(f"model={quantized}", *small, "method=rtn")


EXPORTED = {
    "shortgpt": ["method.shortgpt.count=3"],
    "camera_p": ["ratio=0.25"],
    "llm_pruner": [
        "ratio=0.34",
        "method.llm_pruner.protect_first=0",
        "method.llm_pruner.protect_last=0",
    ],
}


@pytest.mark.parametrize("method", EXPORTED)
def test_an_exported_model_scores_the_same_in_plain_lm_eval(
    method, gguf, run, real_tasks, tmp_path
):
    file = real_tasks / "arc_easy.parquet"
    chosen = [
        "benchmark=nine_tasks", "benchmark.tasks=[arc_easy]", "benchmark.limit=12",
        f"benchmark.data.arc_easy={file}", "costs.length=32", f"method={method}",
        *EXPORTED[method], "calibration.rows=2", "calibration.length=64",
    ]  # fmt: skip
    (record,) = run(f"model={gguf}", *chosen)
    place = tmp_path / "exported"
    assert main(["export", record.id, str(place), "--results-dir", str(tmp_path / "results")]) == 0

    planned = plan(
        BenchmarkConfig(name="real", tasks=("arc_easy",), data={"arc_easy": str(file)}),
        offline=True,
    )
    tasks = {task.name: task.tasks[task.name] for task in planned.harness.tasks}
    theirs = lm_eval.evaluator.evaluate(
        HFLM(pretrained=str(place), dtype="float32", device="cpu", batch_size=4),
        {"tasks": tasks},
        limit=12,
        bootstrap_iters=1,
    )
    ours = {metric.metric: metric.value for metric in record.metrics if metric.task == "arc_easy"}
    scored = theirs["results"]["arc_easy"]
    assert (ours["acc"], ours["acc_norm"]) == (scored["acc,none"], scored["acc_norm,none"])
    rows = samples(record.id, tmp_path / "results").set_index("doc_id")["loglikelihoods"]
    assert len(theirs["samples"]["arc_easy"]) == 12
    for sample in theirs["samples"]["arc_easy"]:
        expected = [float(value) for value, _ in sample["filtered_resps"]]
        assert list(rows[sample["doc_id"]]) == pytest.approx(expected, abs=1e-3)


FIRST_200 = {
    "arc_easy": {"acc": 0.510, "acc_norm": 0.465},
    "piqa": {"acc": 0.645, "acc_norm": 0.655},
    "openbookqa": {"acc": 0.190, "acc_norm": 0.355},
    "hellaswag": {"acc": 0.405, "acc_norm": 0.470},
    "boolq": {"acc": 0.385},
    "rte": {"acc": 0.504},
}
"""Scores of lm-eval 0.4.13 alone in float32; RTE has 139 documents."""


@pytest.mark.parametrize("task", FIRST_200)
def test_the_scores_of_the_first_documents_are_those_that_lm_eval_gave(task, model, real_tasks):
    data = {task: str(real_tasks / f"{task}.parquet")}
    config = BenchmarkConfig(name="real", tasks=(task,), data=data, limit=200)
    found = evaluate(model, plan(config, offline=True)).metrics
    ours = {metric.metric: metric.value for metric in found if metric.task == task}
    # One document of 200 may be a near tie that falls differently elsewhere.
    assert {name: ours[name] for name in FIRST_200[task]} == pytest.approx(
        FIRST_200[task], abs=0.0055
    )


def test_the_perplexity_of_the_whole_text(model, real_tasks):
    file = real_tasks.parent / "wikitext2" / "test.parquet"
    if not file.is_file():
        pytest.skip(f"there is no {file}")
    config = {"text": "wikitext2", "protocol": "gptq_wikitext2", "path": str(file)}
    benchmark = BenchmarkConfig(name="wikitext2", perplexity={"wikitext2": config})
    (found,) = evaluate(model, plan(benchmark, offline=True)).metrics
    assert found.value == pytest.approx(21.6, abs=0.05)


COMPRESSED = (
    "CAMERA-P", "random micro-experts", "FLAP", "LLM-Pruner", "ShortGPT", "Wanda", "SparseGPT",
    "round to nearest", "GPTQ", "AWQ", "CAMERA-Q",
)  # fmt: skip


@pytest.mark.parametrize("row", COMPRESSED)
def test_every_method_of_the_results_page_runs(row, gguf, run):
    table = load_table_config("smollm2")
    assert {"dense", *COMPRESSED} == set(table.rows)
    chosen = next(slot.runs[0] for slot in table_slots(table) if slot.row == row and slot.runs)
    own = [override for override in chosen if override.startswith(("method", "ratio"))]
    small = ["benchmark=perplexity_micro", "benchmark.limit=1", "costs.length=32"]
    calibrated = ["calibration=english", "calibration.rows=2", "calibration.length=128"]
    (record,) = run(f"model={gguf}", *small, *calibrated, *own)
    (perplexity,) = (metric.value for metric in record.metrics)
    assert 1 < perplexity < 1e9
    (method,) = record.methods
    assert method.confirmed_effect == method.effect
    if method.effect in ("removed", "quantized"):
        assert record.cost("bytes").value < record.model.bytes


@pytest.fixture(scope="session")
def carved_folder(gguf, tmp_path_factory):
    """SmolLM2 carved by the command, on a little text: its folder."""
    folder = tmp_path_factory.mktemp("carved") / "smollm2_carved"
    words = [f"model={gguf}", "model.dtype=float32", "model.device=cpu", "calibration=english"]
    small = ["calibration.rows=2", "calibration.length=256", "offline=true"]
    assert main(["carve", str(folder), *words, *small]) == 0
    return folder


def test_a_carved_checkpoint_with_all_experts_is_the_dense_one(carved_folder, folder):
    carved = transformers.AutoModelForCausalLM.from_pretrained(
        carved_folder, num_experts_per_tok=16, dtype=torch.float32
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(carved_folder)
    found, expected = (logits(network, tokenizer) for network in (carved, plain(folder)))
    # Weights of 1 to 1e-5, through 30 layers: 9e-5 measured.
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-4
    assert next_word(carved, tokenizer) == " Paris"


def test_every_run_of_the_carved_table_can_be_meant(carved_folder):
    """None is refused once the model is there: a token takes most experts of this one."""
    fixed = [f"model.path={carved_folder}", "tracker=none", "offline=true"]
    small = ["benchmark=perplexity_micro", "calibration=english", "benchmark.limit=1"]
    runs = {
        tuple(word for word in run if not word.startswith(("benchmark", "calibration")))
        for slot in table_slots(load_table_config("smollm2_carved"))
        for run in slot.runs
    }
    with Session() as session:
        for run in runs:
            check_run(compose_run_config([*run, *small, *fixed]), session)
    # The dense model, ten methods at three ratios, five quantizers.
    assert len(runs) == 36


def test_methods_for_experts_run_on_the_carved_checkpoint(carved_folder, run):
    chosen = [f"model.path={carved_folder}", "model=smollm2_carved", "method=camera_p", "ratio=0.2"]
    text = ["calibration=english", "calibration.rows=1", "calibration.length=128"]
    small = ["benchmark=perplexity_micro", "benchmark.limit=1", "costs.length=32"]
    (record,) = run(*chosen, *text, *small)
    assert record.methods[0].confirmed_effect == "removed"

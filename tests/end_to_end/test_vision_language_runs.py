"""Models that see images from the command line: folders, strategies, experts, fine-tuning."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from bench.cli.main import main
from bench.data.synthetic.scenes import question_sets
from bench.models.embedded import micro_llava
from bench.records import Store

FEW = (
    "benchmark=mllm_seven_micro", "benchmark.limit=3", "prompts.count=10",
    "calibration=text", f"calibration.path={Path(__file__)}",
    "calibration.rows=2", "calibration.length=64",
)  # fmt: skip
TASKS = (
    "gqa", "vqav2_val", "scienceqa_img", "textvqa_val", "pope", "mme", "mmbench_en_dev_static",
)  # fmt: skip


@pytest.fixture(scope="session")
def moe_llava(tmp_path_factory):
    """A random LLaVA whose decoder is a mixture of experts, with micro_llava's processor."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    folder = tmp_path_factory.mktemp("moe_llava")
    processor = LlavaProcessor.from_pretrained(micro_llava.FOLDER)
    small = LlavaConfig.from_pretrained(micro_llava.FOLDER)
    text = {
        "model_type": "qwen2_moe",
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": processor.tokenizer.eos_token_id,
    }
    config = LlavaConfig(
        text_config=text,
        vision_config=small.vision_config.to_dict(),
        image_token_index=small.image_token_id,
        image_seq_length=small.image_seq_length,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.mark.broad
def test_a_folder_is_evaluated_on_seven_tasks_about_drawn_scenes(bench, moe_llava):
    code, out, err = bench(
        "run", "model=local", f"model.path={moe_llava}", "model.kind=image_text",
        "benchmark=mllm_seven_micro", "benchmark.limit=3",
    )  # fmt: skip
    assert code == 0, err
    (record,) = Store(bench.results).all()
    shown = {m.task: m for m in record.metrics if m.headline}
    assert set(shown) == {*TASKS, "average"}
    assert shown["average"].n == 7
    assert 0 <= shown["average"].value <= 1
    assert "mme mme_perception_score" in out
    assert "pope pope_accuracy_mean %" in out
    rows = pd.read_parquet(bench.results / "runs" / record.id / "samples.parquet")
    assert set(rows.task) == set(TASKS)
    assert (rows.groupby("task").doc_id.first() == 0).all()
    assert rows.image_hash.str.len().eq(64).all()
    assert record.provenance["data"]["pope"]["fingerprint"] == question_sets.fingerprint("pope")


def test_real_data_that_are_missing_are_named_at_once(bench, moe_llava):
    code, _, err = bench(
        "run", "model=local", f"model.path={moe_llava}", "model.kind=image_text",
        "benchmark=mllm_seven", "offline=true",
    )  # fmt: skip
    assert code == 2
    assert all(task in err for task in TASKS)


@pytest.mark.slow
def test_strategies_and_pruning_share_one_table(bench, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    methods = "method=dense,yopo_12,vtw,visionzip"
    code, out, err = bench("run", "-m", "model=micro_llava", *FEW, methods)
    assert code == 0, err
    assert "prefill 1x(64 visual" in out
    assert "skipped" in out and "unchanged" in out
    assert all(f" {task}" in out for task in TASKS)


@pytest.mark.slow
def test_skipped_work_costs_less(bench):
    code, _, err = bench("run", "-m", "model=micro_llava", *FEW, "method=dense,yopo_12")
    assert code == 0, err
    assert "it/s]" not in err
    dense, skipping = sorted(Store(bench.results).all(), key=lambda record: len(record.methods))
    (scope,) = {cost.scope for cost in dense.costs if cost.scope.startswith("prefill")}
    # Text, 40 of 104 tokens, keeps all of its cache; visual tokens keep some heads of some layers.
    for quantity, most in (("flops", 0.9), ("cache_bytes", 0.65)):
        before, after = dense.cost(quantity, scope), skipping.cost(quantity, scope)
        assert 0 < after.value < most * before.value
    parts = [record.cost("flops", scope).parts for record in (dense, skipping)]
    assert parts[0]["vision"] == parts[1]["vision"]
    assert parts[1]["decoder"] < 0.5 * parts[0]["decoder"]
    assert len(skipping.provenance["prompts"]) == 64
    assert dense.provenance["prompts"] is None


@pytest.mark.broad
def test_a_strategy_and_pruned_experts_compose(bench, moe_llava):
    local = ("model=local", "model.kind=image_text", f"model.path={moe_llava}")
    code, _, err = bench("run", *local, *FEW, "method=[yopo_25,camera_p]", "ratio=0.4")
    assert code == 0, err
    (record,) = Store(bench.results).all()
    assert [method.effect for method in record.methods] == ["skipped", "removed"]
    assert record.provenance["prompts"] and record.provenance["calibration"]
    assert record.cost("parameters").value < record.model.parameters


@pytest.mark.broad
def test_fine_tuning_under_a_strategy(bench):
    few = ("method.visual_finetune.count=8", "method.visual_finetune.batch=4")
    code, _, err = bench("run", "model=micro_llava", *FEW, "method=[vtw,visual_finetune]", *few)
    assert code == 0, err
    (record,) = Store(bench.results).all()
    assert len(record.methods[1].report["losses"]) == 2


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("model=micro_moe", "method=dense", *FEW), "needs a model of kind image_text"),
        (("model=micro_moe", "method=fastv"), "not a supported vision-language model"),
        (("model=micro_llava", "method=naee", *FEW), "has none"),
        (
            ("model=micro_llava", "method=layer_drop", "method.layer_drop.layers=9", *FEW),
            "has 6 layers",
        ),
        (
            ("model=micro_llava", "method=yopo_12", "method.yopo_12.budget=0.001", *FEW),
            "budget=0.001 cannot be met",
        ),
        (("model=micro_llava", "prompts=file", "method=yopo_12", *FEW), "prompts.path"),
    ],
)
def test_what_does_not_fit_is_one_sentence(bench, asked, said):
    code, _, err = bench("run", *asked)
    assert code == 2
    assert said in err and "Traceback" not in err
    assert err.count("\n") == 1
    assert not Store(bench.results).all()


def test_the_models_are_listed(capsys):
    assert main(["ls", "models"]) == 0
    out = capsys.readouterr().out
    for name in (
        "llava_1_5_7b",
        "qwen2_vl_7b",
        "internvl3_8b",
        "internvl3_14b",
        "qwen3_vl_30b_a3b",
    ):
        assert name in out

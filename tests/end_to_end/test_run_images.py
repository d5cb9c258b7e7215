"""One command from config to record for a vision-language model in a local folder."""

import pandas as pd
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from bench.cli import main
from bench.data import scenes
from bench.records import Store

TASKS = {
    "gqa", "vqav2_val", "scienceqa_img", "textvqa_val", "pope", "mme", "mmbench_en_dev_static",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random LLaVA that sees 25 visual tokens an image, saved with its processor."""
    place = tmp_path_factory.mktemp("llava")
    special = ["<pad>", "<s>", "</s>", "<image>"]
    words = [*special, *map(chr, range(32, 127)), "\n"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 20}, crop_size=20)
    transformers.LlavaProcessor(
        images, tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(place)  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    config = transformers.LlavaConfig(
        text_config=small
        | {"model_type": "llama", "vocab_size": len(tokenizer), "num_attention_heads": 2}
        | {"max_position_embeddings": 320, "pad_token_id": 0, "eos_token_id": 2},
        vision_config=small
        | {"model_type": "clip_vision_model", "num_attention_heads": 2}
        | {"image_size": 20, "patch_size": 4},
        image_token_index=3,
    )
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(place)
    return place


def test_a_folder_is_evaluated_on_seven_tasks_about_drawn_scenes(bench, folder):
    asked = (
        "run", "model=local", f"model.path={folder}", "model.name=tiny", "model.kind=image_text",
        "benchmark=mllm_seven_micro", "benchmark.limit=4",
    )  # fmt: skip
    code, out, err = bench(*asked)
    assert code == 0, err
    (record,) = Store(bench.results).all()
    shown = {m.task: m for m in record.metrics if m.headline}
    assert set(shown) == {*TASKS, "average"}
    assert shown["average"].n == 7
    assert 0 <= shown["average"].value <= 1
    assert "mme mme_perception_score" in out
    assert "pope pope_accuracy_mean %" in out
    rows = pd.read_parquet(bench.results / "runs" / record.id / "samples.parquet")
    assert set(rows.task) == TASKS
    assert (rows.groupby("task").doc_id.first() == 0).all()
    assert rows.image_hash.str.len().eq(64).all()
    assert record.provenance["data"]["pope"]["fingerprint"] == scenes.fingerprint("pope")


def test_a_text_model_and_an_image_benchmark_do_not_fit(bench):
    code, _, err = bench("run", "model=micro_moe", "benchmark=mllm_seven_micro")
    assert code == 2
    assert "asks models of kind image_text" in err


def test_real_data_that_are_missing_are_named_at_once(bench, folder):
    code, _, err = bench(
        "run", "model=local", f"model.path={folder}", "model.kind=image_text",
        "benchmark=mllm_seven", "offline=true",
    )  # fmt: skip
    assert code == 2
    assert all(task in err for task in TASKS)


def test_the_models_are_listed(capsys):
    assert main(["ls", "models"]) == 0
    out = capsys.readouterr().out
    for name in (
        "llava_1_5_7b",
        "qwen2_vl_7b",
        "internvl3_8b",
        "internvl2_26b",
        "qwen3_vl_30b_a3b",
    ):
        assert name in out

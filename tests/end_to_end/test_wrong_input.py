"""Wrong input: one sentence, exit code 2, no traceback, nothing written."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

from bench.data.synthetic.world import documents_by_split
from bench.models import embedded

MICRO_MOE = Path(next(iter(embedded.__path__))) / "micro_moe"


@pytest.fixture
def dense_model(tmp_path, capsys):
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return saved(LlamaForCausalLM(config), tmp_path / "llama", capsys)


@pytest.fixture
def foreign_experts(tmp_path, capsys):
    config = Llama4TextConfig(
        vocab_size=2048, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=2, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=4,
        num_experts_per_tok=1,
    )  # fmt: skip
    return saved(Llama4ForCausalLM(config), tmp_path / "llama4", capsys)


def saved(network, folder, capsys):
    """Save a network with micro_moe's tokenizer; swallow the library's own progress bar."""
    network.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MICRO_MOE / name, folder)
    capsys.readouterr()
    return folder


@pytest.fixture
def micro_moe_copy(tmp_path):
    return Path(shutil.copytree(MICRO_MOE, tmp_path / "copy"))


def test_unknown_method(refused):
    said = refused("method=camera_pp")
    assert "did you mean 'camera_p'?" in said
    assert "random_experts" in said


def test_unknown_model_and_benchmark(refused):
    assert "did you mean 'micro_moe'?" in refused("model=micro_mo")
    assert "did you mean 'nine_tasks'?" in refused("benchmark=nine_task")


def test_misspelt_key(refused):
    said = refused("method=camera_p", "method.camera_p.ratioo=0.4")
    assert "method.camera_p.ratioo" in said
    assert "did you mean 'method.camera_p.ratio'?" in said
    assert "did you mean 'benchmark.limit'?" in refused("benchmark.limits=3")


def test_misspelt_key_that_was_forced_in(refused):
    said = refused("method=camera_p", "+method.camera_p.ratioo=0.4")
    assert "did you mean 'ratio'?" in said


def test_a_knob_of_a_method_that_is_not_there(refused):
    assert "add method=camera_p" in refused("method.camera_p.ratio=0.4")


@pytest.mark.parametrize("ratio", ["1.5", "-0.1", "1", "nan", "many"])
def test_ratio_out_of_range(refused, ratio):
    said = refused("method=camera_p", f"method.camera_p.ratio={ratio}")
    assert "method.camera_p.ratio" in said
    assert ratio.rstrip("0") in said


def test_the_seventh_job_of_a_sweep_is_checked_before_the_first_runs(refused):
    assert "1.5" in refused("-m", "method=dense,camera_p", "ratio=0.1,0.2,0.3,0.4,0.5,0.6,1.5")


def test_a_dense_model_with_a_method_that_chooses_experts(refused, dense_model):
    said = refused("model=local", f"model.path={dense_model}", "method=naee")
    assert "LlamaForCausalLM (llama) has none" in said


@pytest.mark.parametrize("method", ["camera_p", "camera_q", "naee", "d2_moe", "reap"])
def test_experts_that_are_not_understood(refused, foreign_experts, method):
    said = refused("model=local", f"model.path={foreign_experts}", f"method={method}")
    assert "Llama4ForCausalLM" in said
    assert "its experts are called without the router's weights" in said


def test_a_ratio_that_would_remove_every_expert(refused):
    said = refused("method=camera_p", "ratio=0.95", "method.camera_p.base=total")
    assert "ratio=0.95 with base=total would remove every expert" in said


@pytest.mark.parametrize("mean", ["5", "0.5"])
@pytest.mark.parametrize("method", ["mc", "camera_q", "camera_q_dagger"])
def test_bits_that_cannot_give_the_mean(refused, method, mean):
    said = refused(
        f"method={method}", f"method.{method}.mean_bits={mean}",
        *([f"method.{method}.shares=null"] if method != "mc" else []),
    )  # fmt: skip
    assert f"method.{method}: mean_bits={float(mean)} must be between 1 and" in said


@pytest.mark.broad
def test_a_calibration_text_shorter_than_asked(refused, tmp_path):
    file = tmp_path / "short.txt"
    file.write_text("A text of few words.")
    said = refused("method=camera_p", "calibration=text", f"calibration.path={file}")
    assert "lower calibration.rows or calibration.length" in said


@pytest.mark.broad
def test_activations_that_are_not_numbers(refused, micro_moe_copy):
    file = micro_moe_copy / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "experts" in name and "down_proj" in name)
    weights[name][:] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    said = refused("model=local", f"model.path={micro_moe_copy}", "method=camera_p")
    assert "NaN" in said


def test_missing_data_file(refused):
    said = refused("benchmark.data.arc_easy=/nowhere/questions.parquet")
    assert "/nowhere/questions.parquet" in said


def test_data_for_a_task_that_is_not_asked(refused):
    said = refused("+benchmark.data.arc_eazy=/nowhere/questions.parquet")
    assert "did you mean 'arc_easy'?" in said


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_corrupt_weights(refused, micro_moe_copy, keep):
    weights = micro_moe_copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(len(content) * keep)])
    said = refused("model=local", f"model.path={micro_moe_copy}")
    assert "model.safetensors" in said


def test_unwritable_results_folder(bench, tmp_path):
    (tmp_path / "results").write_text("a file where the folder should be")
    code, _, err = bench("run")
    assert code == 2
    assert "results_dir" in err
    assert err.count("\n") == 1
    assert (tmp_path / "results").read_text() == "a file where the folder should be"


def test_everything_missing_offline_is_named_at_once(refused):
    said = refused("benchmark=camera", "offline=true")
    for name in ("aps/super_glue", "allenai/openbookqa", "Rowan/hellaswag", "wikitext", "c4"):
        assert name in said


def test_a_model_that_is_not_here(refused):
    said = refused("model=mixtral_8x7b", "offline=true")
    assert "bench prefetch model=mixtral_8x7b" in said


def test_a_device_that_is_not_there(refused):
    assert "CUDA devices" in refused("model.device=cuda:7")


@pytest.mark.parametrize("arguments", [["runn"], ["show", "zzz"], ["ls", "modells"], []])
def test_wrong_commands(bench, capsys, arguments):
    from bench.cli.main import main

    assert main(arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_data_that_never_end_or_have_a_bad_row_are_refused(refused, tmp_path):
    rows = documents_by_split("arc_easy")["test"][:4]
    file = tmp_path / "arc.jsonl"
    asked = ("model=micro_moe", "benchmark=nine_tasks", "benchmark.tasks=[arc_easy]")
    assert "neither a file nor a folder" in refused(*asked, "benchmark.data.arc_easy=/dev/zero")
    file.write_text(
        "\n".join(map(json.dumps, [*rows[:1], rows[1] | {"answerKey": "?"}, *rows[2:]]))
    )
    message = refused(*asked, f"benchmark.data.arc_easy={file}")
    assert "arc.jsonl: row 1 (line 2) has answerKey='?', which is not an answer" in message

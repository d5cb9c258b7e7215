"""Rows of measured costs on real small networks: exact where counted, honest where missing."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from bench.device.energy_counters import Unavailable
from bench.errors import UserError
from bench.measurement import energy
from bench.measurement.costs import count_costs, disk_bytes, measure_costs, without_contradicted
from bench.measurement.flops import analytic
from bench.measurement.quantities import CostReport, MeasuredPair
from bench.measurement.roofline import DeviceLimits, device_limits, weight_bytes_read
from bench.measurement.workload import refuse_long_prompts, workloads
from bench.method import Context
from bench.models.classifiers import architectures, classifier
from bench.models.model import Model
from bench.models.structure.model_structure import inspect_model
from bench.records import Cost
from bench.schema import CostsConfig, ModelConfig
from bench.ui import SILENT
from methods.token_pruning.fastv import FastV
from tests.methods.visual_engine.tiny_mllms import build

LAYERS, WIDTH, HEADS, VOCABULARY = 2, 32, 4, 50
CPU = torch.device("cpu")


def llama(inner=64, tied=False):
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=2, intermediate_size=inner,
        max_position_embeddings=64, tie_word_embeddings=tied, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def model(network, kind="causal_lm"):
    return Model(ModelConfig(name="tiny", source="t", kind=kind), network, None, "", None, CPU)


def config(*measured, **timing):
    small = {"lengths": (16,), "new_tokens": 3, "rounds": 5, "max_warmup_rounds": 1, "attempts": 1}
    small |= {"max_rounds": 5}
    return CostsConfig(name="test", measure=measured, timing={**small, **timing})


def rows(found, quantity):
    return {cost.scope: cost for cost in found.costs if cost.quantity == quantity}


def missing(found, quantity):
    return {gap.scope: gap.reason for gap in found.missing if gap.quantity == quantity}


def llama_flops(tokens, keys, heads_of, inner):
    """FLOPs of `tokens` rows that attend to `keys`, logits for `heads_of` rows."""
    projections = 2 * WIDTH * (WIDTH + WIDTH // 2 + WIDTH // 2 + WIDTH) + 2 * 3 * WIDTH * inner
    attention = 4 * keys * WIDTH
    return LAYERS * tokens * (projections + attention) + heads_of * 2 * WIDTH * VOCABULARY


def test_nothing_is_measured_unless_it_is_asked_for():
    found = measure_costs(MeasuredPair(model(llama())), config())
    assert (found.costs, found.missing) == ([], [])


def doubled(structure_of):
    """An analytic formula that takes every layer twice."""
    return lambda layers, *rest: structure_of([*layers, *layers], *rest)


def test_a_formula_that_the_count_contradicts_is_a_gap_with_a_warning(monkeypatch):
    said = []
    monkeypatch.setattr(type(SILENT), "warn", lambda self, text: said.append(text))
    whole = count_costs(model(llama()), CostsConfig(name="test", length=8))
    assert {(c.scope, c.how) for c in whole.costs if c.quantity == "flops"} == {
        ("forward 1x8", "counted"), ("forward 1x8", "analytic"),
        ("token after 1x8", "counted"), ("token after 1x8", "analytic"),
    }  # fmt: skip
    assert said == []
    monkeypatch.setattr(analytic, "decoder_macs", doubled(analytic.decoder_macs))
    found = count_costs(model(llama()), CostsConfig(name="test", length=8))
    assert {c.how for c in found.costs if c.quantity in ("flops", "macs")} == {"counted"}
    assert all(
        "by the formula, but" in gap.reason for gap in found.missing if gap.quantity == "flops"
    )
    assert {gap.scope for gap in found.missing if gap.how == "analytic"} == {
        "forward 1x8", "token after 1x8",
    }  # fmt: skip
    assert sum("no analytic flops for" in line for line in said) == 2


@pytest.mark.parametrize(("analytic_value", "stays"), [(99.0, True), (101.0, True), (98.9, False)])
def test_one_per_cent_is_the_limit(analytic_value, stays):
    def flops(value, how):
        return Cost(scope="s", quantity="flops", unit="FLOP", value=value, how=how)

    both = CostReport([flops(100.0, "counted"), flops(analytic_value, "analytic")])
    found = without_contradicted(both, SILENT)
    assert (len(found.costs) == 2) == stays
    assert (len(found.missing) == 0) == stays


def test_every_stage_has_its_time_and_the_flops_of_the_very_call():
    found = measure_costs(MeasuredPair(model(llama())), config("latency", "roofline"))
    latency = rows(found, "latency")
    assert list(latency) == ["prefill 1x16", "first token 1x16", "decode 1x16", "end to end 1x16"]
    prefill = llama_flops(16, 16, 1, 64)
    steps = [llama_flops(1, keys, 1, 64) for keys in (17, 18)]
    expected = [prefill, prefill, sum(steps) / 2, prefill + sum(steps)]
    for cost, flops in zip(latency.values(), expected, strict=True):
        assert cost.parts["flops"] == flops
        assert 0 < cost.parts["p10"] <= cost.value <= cost.parts["p90"]
        assert cost.parts["threads"] == torch.get_num_threads()
    assert latency["first token 1x16"].value < latency["end to end 1x16"].value
    assert set(rows(found, "roofline_efficiency")) == {"prefill 1x16", "decode 1x16"}
    assert rows(found, "matrix_rate")["device"].value > 1e8
    assert rows(found, "speedup") == missing(found, "speedup") == {}


def test_a_smaller_model_has_a_gain_beside_the_theoretical_one():
    dense, small = model(llama(inner=4096)), model(llama(inner=64))
    found = measure_costs(MeasuredPair(small, dense), config("latency"))
    speedup = rows(found, "speedup")["prefill 1x16"]
    theory = llama_flops(16, 16, 1, 4096) / llama_flops(16, 16, 1, 64)
    assert speedup.parts["theory"] == pytest.approx(theory)
    assert speedup.parts["low"] <= speedup.value <= speedup.parts["high"]
    assert speedup.value > 1
    realised = rows(found, "realised_speedup_fraction")["prefill 1x16"]
    assert realised.value == pytest.approx((1 - 1 / speedup.value) / (1 - 1 / theory))
    assert realised.parts["low"] <= realised.value <= realised.parts["high"]
    assert "dense_p50" in rows(found, "latency")["decode 1x16"].parts


@pytest.mark.parametrize("word", ["masked", "zeroed"])
def test_a_model_with_all_its_work_left_claims_no_gain(word):
    network = llama()
    found = measure_costs(
        MeasuredPair(model(network), model(network), no_gain_reason=word), config("latency")
    )
    assert rows(found, "speedup") == rows(found, "realised_speedup_fraction") == {}
    assert set(missing(found, "speedup").values()) == {word}
    assert set(missing(found, "speedup")) == set(rows(found, "latency"))


def test_the_same_flops_leave_no_theoretical_gain_to_realise():
    network = llama()
    found = measure_costs(MeasuredPair(model(network), model(network)), config("latency"))
    assert set(missing(found, "realised_speedup_fraction").values()) == {"under 5 % of FLOPs saved"}


def test_a_ratio_that_stays_wide_is_marked_and_its_neighbours_are_not():
    network = llama()
    wanted = config("latency", precision=1e-9, max_rounds=6)
    found = measure_costs(MeasuredPair(model(network), model(network)), wanted)
    for scope, speedup in rows(found, "speedup").items():
        assert speedup.note.endswith("is still wider than 1e-07 % to one side")
        assert rows(found, "latency")[scope].parts["rounds"] == 6
        assert "interval" not in (rows(found, "latency")[scope].note or "")


def test_rounds_are_added_only_where_a_ratio_is_claimed():
    network = llama()
    wanted = config("latency", precision=1e-9, max_rounds=9)
    for subject in (
        MeasuredPair(model(network)),
        MeasuredPair(model(network), model(network), no_gain_reason="masked"),
    ):
        found = measure_costs(subject, wanted)
        assert {cost.parts["rounds"] for cost in rows(found, "latency").values()} == {5}


@pytest.mark.broad
def test_lengths_that_do_not_fit_are_gaps_and_the_others_are_measured():
    found = measure_costs(
        MeasuredPair(model(llama())), config("memory", lengths=(16, 62), batches=(1, 2))
    )
    assert list(rows(found, "cache_bytes")) == ["prefill 1x16", "prefill 2x16"]
    assert missing(found, "latency") == {
        f"{batch}x62": "tiny supports 64 positions; a prompt of 62 and 3 new tokens exceed them"
        for batch in (1, 2)
    }


def test_a_grid_of_which_nothing_fits_is_refused_before_weights_are_loaded():
    with torch.device("meta"):
        network = llama()
    about = ModelConfig(name="tiny", source="t")
    refuse_long_prompts(config(lengths=(16, 999)).timing, about, network)
    with pytest.raises(UserError, match=r"lengths=\[62, 999\]: tiny supports 64 positions; .* 62"):
        refuse_long_prompts(config(lengths=(62, 999)).timing, about, network)


def test_memory_that_runs_out_is_a_gap_for_that_shape_alone(monkeypatch):
    network = llama()
    forward = network.model.forward

    def limited(*args, input_ids=None, **kwargs):
        if input_ids.shape[0] > 1:
            torch.empty(2**60, dtype=torch.uint8)
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(network.model, "forward", limited)
    found = measure_costs(MeasuredPair(model(network)), config("memory", batches=(2, 1)))
    assert missing(found, "further cost") == {"2x16": "out of memory"}
    assert list(rows(found, "cache_bytes")) == ["prefill 1x16"]


def test_cache_and_peaks_are_those_of_the_shapes():
    network = llama()
    found = measure_costs(MeasuredPair(model(network)), config("memory", batches=(3,)))
    per_token = LAYERS * 2 * (WIDTH // 2) * 4
    assert rows(found, "cache_bytes")["prefill 3x16"].value == 3 * 16 * per_token
    assert rows(found, "cache_bytes_per_token")["decode 3x16"].value == per_token
    tensors = (*network.parameters(), *network.buffers())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    for scope in ("prefill 3x16", "decode 3x16"):
        peak = rows(found, "peak_bytes")[scope]
        assert peak.value == weights + peak.parts["above"]
        assert "resident set" in peak.note


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_folder_takes_is_known_before_it_is_written(tied, tmp_path):
    network = llama(tied=tied)
    network.save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert disk_bytes(network) == pytest.approx(written, abs=4096)  # names and shapes go before
    assert disk_bytes(network) <= written


def test_a_call_reads_every_weight_but_the_embedding_and_the_experts_it_does_not_meet():
    shapes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
    }  # fmt: skip
    network = Qwen2MoeForCausalLM(Qwen2MoeConfig(**shapes)).eval()
    ids_BL = torch.zeros(1, 5, dtype=torch.long)
    read = weight_bytes_read(network, inspect_model(network), lambda _: network(ids_BL))
    embedding = VOCABULARY * WIDTH
    routed = LAYERS * 8 * 3 * WIDTH * 16
    parameters = sum(weight.numel() for weight in network.parameters())
    buffers = sum(buffer.numel() for buffer in network.buffers())
    assert read == pytest.approx(4 * (parameters - embedding - routed * 6 / 8 + buffers), rel=0.01)
    assert read <= 4 * (parameters - embedding - routed * 6 / 8 + buffers)
    forgotten = weight_bytes_read(
        network, inspect_model(network), lambda forget: (network(ids_BL), forget())
    )
    assert forgotten == 0


def test_an_image_classifier_is_timed_in_one_call():
    network = architectures.build_classifier(
        classifier.VisionConfig(architecture="lenet5", channels=1, size=28)
    ).eval()
    found = measure_costs(
        MeasuredPair(model(network, "image_classifier")),
        config("latency", "memory", "roofline", batches=(1, 2)),
    )
    scopes = [f"{stage} {b}x1x28x28" for b in (1, 2) for stage in ("forward", "end to end")]
    assert list(rows(found, "latency")) == scopes
    weights = sum(weight.numel() for weight in network.parameters())
    share = rows(found, "roofline_efficiency")["forward 2x1x28x28"]
    assert share.parts["bytes"] == 4 * weights
    assert list(rows(found, "peak_bytes")) == ["forward 1x1x28x28", "forward 2x1x28x28"]


@pytest.fixture
def seeing(monkeypatch):
    """A tiny LLaVA whose prompts are made without a processor."""
    from bench.measurement import workload
    from tests.methods.visual_engine.tiny_mllms import prompt

    monkeypatch.setattr(
        workload, "build_image_prompt", lambda _, words: prompt("llava_llama", [2, (5, 5), words])
    )
    return lambda: model(build("llava_llama"), "image_text")


@pytest.mark.slow
def test_tokens_that_are_dropped_gain_time_flops_and_cache(seeing):
    dense, pruned = seeing(), seeing()
    FastV(after=1, keep=0.2, average=None).apply(pruned, Context(seed=1))
    wanted = config("latency", "memory", words=(6,), batches=(1, 2))
    found = measure_costs(MeasuredPair(pruned, dense), wanted)
    beside = measure_costs(MeasuredPair(dense), wanted)
    scope = "1x(25 visual + 8 text)"
    assert rows(found, "speedup")[f"prefill {scope}"].parts["theory"] > 1.2
    held = [rows(each, "cache_bytes") for each in (found, beside)]
    for batch in (1, 2):
        name = f"prefill {batch}x(25 visual + 8 text)"
        assert held[0][name].value < 0.7 * held[1][name].value
    own = rows(found, "method_latency")[f"prefill {scope}"].value
    assert 0 < own < rows(found, "latency")[f"end to end {scope}"].value
    assert rows(beside, "method_latency") == {}


def test_energy_is_a_gap_without_a_counter_and_never_a_zero(monkeypatch):
    def none(device):
        raise Unavailable("this GPU has no energy counter")

    monkeypatch.setattr(energy, "energy_meter", none)
    found = measure_costs(MeasuredPair(model(llama())), config("energy"))
    assert rows(found, "energy") == {}
    assert missing(found, "energy") == {"1x16": "this GPU has no energy counter"}


def test_energy_of_a_call_is_the_counters_over_the_calls(monkeypatch):
    """A counter that rises by 3 J a prefill and by 5 J an answer gives these back."""

    class Counter:
        how, spent = "told", 0.0

        def joules(self):
            return self.spent

    counter, network = Counter(), llama()
    (work,) = workloads(model(network), config().timing)

    def spending(joules, call):
        def spend(*args, **kwargs):
            counter.spent += joules
            return call(*args, **kwargs)

        return spend

    monkeypatch.setattr(energy, "energy_meter", lambda device: counter)
    monkeypatch.setattr(type(work), "forward", spending(3.0, type(work).forward))
    monkeypatch.setattr(type(work), "generate", spending(5.0, type(work).generate))
    found = measure_costs(
        MeasuredPair(model(network), model(network)), config("energy", energy_seconds=0.01)
    )
    spent = rows(found, "energy")
    assert spent["prefill 1x16"].value == pytest.approx(3.0)
    assert spent["end to end 1x16"].value == pytest.approx(5.0)
    assert spent["end to end 1x16"].parts["dense"] == pytest.approx(5.0)
    assert rows(found, "energy_saved")["prefill 1x16"].value == pytest.approx(0.0)


def test_a_counter_that_stands_still_saves_nothing_and_divides_by_nothing(monkeypatch):
    class Stuck:
        how = "a counter with coarse steps"

        def joules(self):
            return 7.0

    network = llama()
    monkeypatch.setattr(energy, "energy_meter", lambda device: Stuck())
    found = measure_costs(
        MeasuredPair(model(network), model(network)), config("energy", energy_seconds=0.01)
    )
    assert rows(found, "energy_saved") == {}
    assert "did not advance" in missing(found, "energy_saved")["prefill 1x16"]


def test_the_first_call_of_a_network_is_in_no_window(monkeypatch):
    """The first call costs 100 J, every later one 1 J."""

    class Counter:
        how, spent = "told", 0.0

        def joules(self):
            return self.spent

    counter, calls = Counter(), []

    def call():
        counter.spent += 1.0 if calls else 100.0
        calls.append(1)

    monkeypatch.setattr(energy, "WINDOWS", 1)
    assert energy.joules_per_call([call], counter, CPU, 1e-4) == [1.0]


def test_the_roofline_charges_no_pair_that_a_mask_hides():
    found = measure_costs(MeasuredPair(model(llama())), config("latency", "roofline"))
    charged = rows(found, "roofline_efficiency")["prefill 1x16"].parts["flops"]
    hidden = LAYERS * 4 * WIDTH * (16 * 15 // 2)
    assert charged == rows(found, "latency")["prefill 1x16"].parts["flops"] - hidden


def test_more_rounds_than_the_limit_are_refused():
    with pytest.raises(ValueError, match=r"rounds=30 is above .*max_rounds=20"):
        config("latency", rounds=30, max_rounds=20)


def test_the_least_time_is_that_of_the_scarcer_resource():
    best = DeviceLimits(matrix_rate=100.0, bandwidth=10.0)
    assert best.min_seconds(flops=200, bytes=10) == 2.0
    assert best.min_seconds(flops=200, bytes=50) == 5.0


def test_limits_are_measured_once_a_process():
    threads = torch.get_num_threads()
    assert device_limits(CPU, torch.float32, threads) is device_limits(CPU, torch.float32, threads)


def test_a_device_without_room_for_its_limits_leaves_a_gap_and_no_shares(monkeypatch):
    from bench.measurement import costs

    def crowded(*_):
        torch.empty(2**60, dtype=torch.uint8)

    monkeypatch.setattr(costs, "device_limits", crowded)
    found = measure_costs(MeasuredPair(model(llama())), config("latency", "roofline"))
    assert missing(found, "roofline") == {"device": "out of memory"}
    assert rows(found, "roofline_efficiency") == {}
    assert rows(found, "latency")

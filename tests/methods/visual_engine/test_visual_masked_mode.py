"""Masked mode against a transcription that really zeroes weights after the softmax."""

import copy

import pytest
import torch

from bench.method import Context
from methods.visual_engine.decoder import visual_engine_of
from methods.visual_tokens.head_pruning import HeadPruning
from methods.visual_tokens.strategies import LayerDrop, NeighborAttention, SparseFFN
from tests.methods.visual_engine.tiny_mllms import IMAGE, build, prompt
from tests.methods.visual_tokens.test_visual_strategies import loaded


def zeroed_after_softmax(network, plan, visual, x):
    """The released LLaVA code's mathematics for one unpadded prompt with a 5x5 image, by hand."""
    decoder = network.model.language_model
    length = x.shape[1]
    cos, sin = decoder.rotary_emb(x, torch.arange(length)[None])
    cell = {p: divmod(i, 5) for i, p in enumerate(visual.nonzero()[:, 0].tolist())}
    seen = torch.ones(length, length).tril().bool()
    for i, (r, c) in cell.items():
        for j, (s, d) in cell.items():
            seen[i, j] = max(abs(r - s), abs(c - d)) <= plan.window.radius
    for index, layer in enumerate(decoder.layers):
        attention, h = layer.self_attn, layer.input_layernorm(x)
        q, k, v = (
            getattr(attention, f"{n}_proj")(h)[0].unflatten(-1, (4, 8)).transpose(0, 1)
            for n in "qkv"
        )
        q, k = (
            part * cos + torch.cat([-part[..., 4:], part[..., :4]], -1) * sin for part in (q, k)
        )
        weight = (q @ k.transpose(1, 2) / 8**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        out = []
        for head in range(4):
            kept = head in plan.layers[index].heads
            if not kept or index >= plan.cut:
                weight[head][:, visual] = 0
            out.append(weight[head] @ v[head])
            if not kept:
                out[-1][visual] = 0
        x = x + attention.o_proj(torch.cat(out, -1))[None]
        mlp, h = layer.mlp, layer.post_attention_layernorm(x)
        hidden = mlp.act_fn(mlp.gate_proj(h)) * mlp.up_proj(h)
        kept = plan.layers[index].neurons[0]
        lost = [n for n in range(hidden.shape[-1]) if n not in kept.tolist()]
        hidden[:, visual.nonzero(), lost] = 0
        x = x + mlp.down_proj(hidden)
    return network.lm_head(decoder.norm(x))


def masked(cut=3):
    model = loaded("llava_llama")
    common = {"execution": "masked"}
    reports = [
        NeighborAttention(window=3, **common).apply(model, Context(seed=1)),
        HeadPruning(counts=[3, 0, 1, 2], choose="random", **common).apply(model, Context(seed=1)),
        SparseFFN(keep=0.3, choose="first", **common).apply(model, Context(seed=1)),
        LayerDrop(layers=cut, **common).apply(model, Context(seed=1)),
    ]
    assert {report.effect for report in reports} == {"masked"}
    return model.network


def embedded(stock, call):
    """The prompt's embeddings with the image's features in their places."""
    caught = []
    hook = stock.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    stock(**call)
    hook.remove()
    return caught[0]


@pytest.mark.parametrize("cut", [2, 4])
def test_prefill_equals_the_transcription(cut):
    network, stock = masked(cut), build("llava_llama")
    call = prompt("llava_llama", [4, (5, 5), 6])
    visual = call["input_ids"][0] == IMAGE
    plan = visual_engine_of(network).plan
    expected = zeroed_after_softmax(stock, plan, visual, embedded(stock, call))
    assert (network(**call).logits - expected).abs().max() < 1e-5


def test_generation_is_prefill_token_by_token():
    network = masked()
    call = prompt("llava_llama", [4, (5, 5), 6], [2, (5, 5), 3])
    told = network.generate(**call, max_new_tokens=6, do_sample=False)
    ids, mask = call["input_ids"], call["attention_mask"]
    for _ in range(6):
        step = {**call, "input_ids": ids, "attention_mask": mask}
        chosen = network(**step, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, chosen], 1)
        mask = torch.cat([mask, torch.ones_like(chosen)], 1)
    assert torch.equal(told, ids)


def test_text_only_prompts_are_untouched():
    network, stock = masked(), build("llava_llama")
    network(**prompt("llava_llama", [4, (5, 5), 6]))
    call = prompt("llava_llama", [9], [5])
    where = call["attention_mask"].bool()
    assert (network(**call).logits - stock(**call).logits)[where].abs().max() < 1e-6


def test_masked_layer_drop_keeps_the_denominator():
    """The two executions differ, so released checkpoints need this one."""
    skip, call = loaded("llava_llama"), prompt("llava_llama", [4, (5, 5), 6])
    network = copy.deepcopy(skip)
    LayerDrop(layers=2).apply(skip, Context(seed=1))
    LayerDrop(layers=2, execution="masked").apply(network, Context(seed=1))
    text = call["input_ids"] != IMAGE
    difference = skip.network(**call).logits - network.network(**call).logits
    assert difference[text].abs().max() > 1e-3

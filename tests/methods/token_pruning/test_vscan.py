"""VScan against a slow transcription that runs transformers' own modules, end to end."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from bench.errors import UserError
from methods.token_pruning.divprune import DivPrune
from methods.token_pruning.vscan import VScan, best_of_windows
from tests.methods.token_pruning.recorded_steps import applied
from tests.methods.token_pruning.test_variants import (
    AFTER,
    BEFORE,
    NAME,
    TOLERANCE,
    Layers,
    N,
    a_prompt,
    last_logits,
    stock,
)

SIDE = 5


def scanned(network, call, keep, windows):
    """Rows of the image before the decoder: kept tokens in raster order, the others merged in."""
    vision = network.model.vision_tower
    found = vision(call["pixel_values"], output_attentions=True, output_hidden_states=True)
    early, deep = (found.attentions[layer][0].mean(0)[0, 1:] for layer in (1, 0))
    x = network.model.multi_modal_projector(found.hidden_states[-2][:, 1:])[0]
    local = []
    for row in range(windows):
        for column in range(windows):
            inside = [
                j
                for j in range(N)
                if (j // SIDE) * windows // SIDE == row and (j % SIDE) * windows // SIDE == column
            ]
            inside.sort(key=lambda j: -float(early[j]))
            local += inside[: keep // 2 // windows**2]
    rest = sorted((j for j in range(N) if j not in local), key=lambda j: -float(deep[j]))
    kept = sorted([*local, *rest[: keep - len(local)]])
    groups = {j: [x[j]] for j in kept}
    for j in range(N):
        if j not in groups:
            nearest = max(kept, key=lambda k, j=j: float(cosine_similarity(x[j], x[k], dim=0)))
            groups[nearest].append(x[j])
    return torch.stack([torch.stack(group).mean(0) for group in groups.values()])


@pytest.mark.parametrize("positions", ["renumbered", "kept"])
@pytest.mark.parametrize("keep, then, windows", [(9, 4, 2), (12, 12, 1), (7, 2, 2)])
def test_vscan(keep, then, windows, positions):
    call, network = a_prompt(keep), stock()
    layers = Layers(network)
    words = layers.embeddings(call)
    image = scanned(network, call, keep, windows)
    ours, engine = applied(
        NAME,
        VScan(
            keep=keep, then=then, windows=windows, local_layer=1.0, layer=0.5, positions=positions
        ),
    )
    assert [step.after for step in engine.plan.steps] == [0, 2]
    if positions == "kept":
        # The places of kept tokens are not those of a shorter sequence: only the text differs.
        assert last_logits(ours, call).isfinite().all()
        return
    x = torch.cat([words[:BEFORE], image, words[-AFTER:]])
    places = torch.arange(len(x))
    for index in (0, 1):
        x = layers.run(index, x, places)
    q, k = layers.qk(2, x, places)
    share = (q[:, -1:] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)[:, 0].mean(0)
    kept = share[BEFORE : BEFORE + keep].topk(then).indices.sort().values + BEFORE
    x = torch.cat([x[:BEFORE], x[kept], x[-AFTER:]])
    places = torch.arange(len(x))
    for index in (2, 3):
        x = layers.run(index, x, places)
    assert (last_logits(ours, call) - layers.logits(x)).abs().max() < TOLERANCE


def test_every_window_gives_as_many_local_tokens():
    """A 4x4 grid in windows of 2x2: half of 8 tokens are one of each window."""
    place = torch.arange(16)
    window = (place // 4 // 2 * 2 + place % 4 // 2)[None]
    score = torch.arange(16.0)[None]
    valid = torch.ones(1, 16, dtype=torch.bool)
    local = best_of_windows(score, window, valid, torch.tensor([4]), 4)
    assert local[0].nonzero()[:, 0].tolist() == [5, 7, 13, 15]
    # Three tokens do not fill four windows: none is local.
    assert not best_of_windows(score, window, valid, torch.tensor([3]), 4).any()


def test_vscan_needs_whole_images_and_a_class_token():
    network, _ = applied(NAME, DivPrune(keep=9), VScan(keep=5, then=2, local_layer=1.0))
    with pytest.raises(UserError, match="vscan needs whole images"):
        network(**a_prompt(0))
    with pytest.raises(UserError, match=r"layer 0\.25 of the vision tower of qwen2_vl"):
        applied("qwen2_vl", VScan(keep=5))

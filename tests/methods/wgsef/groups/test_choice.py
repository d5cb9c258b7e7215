"""Groups from a config: each pattern against its transcription, mixtures, masks, wrong input."""

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from bench.errors import UserError
from bench.method import Context
from bench.models.classifiers.architectures import build_classifier
from bench.models.classifiers.classifier import VisionConfig
from bench.models.model import Model
from bench.schema import ModelConfig
from methods.wgsef.groups.choice import GroupChoice, families_of, outlines
from methods.wgsef.groups.partition import GroupPartition
from methods.wgsef.sparse_training import Wgsef

CONFIG = VisionConfig(architecture="micro_lenet", channels=1, size=8)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_classifier(CONFIG)


def norms(network, **choice):
    return GroupPartition(network, families_of(network, GroupChoice(**choice))).norms()


def weights(network):
    """The weights of all layers but the last, as matrices of outputs and inputs."""
    named = [p.detach().double() for p in network.parameters() if p.ndim > 1]
    return [p.flatten(1) for p in named[:-1]]


def test_rows_columns_and_tiles_are_those_of_the_weight_as_a_matrix(network):
    rows = [w.norm(dim=1) for w in weights(network)]
    torch.testing.assert_close(norms(network, groups=["rows"]), torch.cat(rows), rtol=1e-5, atol=0)
    columns = [
        p.detach().double().transpose(0, 1).flatten(1).norm(dim=1)
        for p in network.parameters()
        if p.ndim > 1
    ][:-1]
    found = norms(network, groups=["columns"])
    torch.testing.assert_close(found, torch.cat(columns), rtol=1e-5, atol=0)
    tiles = [
        w[i : i + 8, j : j + 3].norm()
        for w in weights(network)
        for i in range(0, len(w), 8)
        for j in range(0, w.shape[1], 3)
        if w.shape[1] % 3 == 0
    ]
    found = norms(network, groups=["blocks"], block=[8, 3], layers={"blocks": "features*"})
    torch.testing.assert_close(found, torch.stack(tiles), rtol=1e-5, atol=0)


def test_kinds_can_be_mixed_in_different_layers(network):
    choice = GroupChoice(
        groups=["filters", "blocks"], layers={"filters": "features*", "blocks": "head.2"}
    )
    families = families_of(network, choice)
    assert {f.kind for f in families} == {"filters", "blocks"}
    assert [f.unremovable_reason is None for f in families] == [
        f.kind == "filters" for f in families
    ]
    assert [(each.kind, each.groups) for each in outlines(CONFIG, choice)] == [
        (family.kind, family.groups) for family in families
    ]


def test_masks_put_every_weight_into_the_group_of_its_number(network, tmp_path):
    generator = torch.Generator().manual_seed(0)
    named = {n: p for n, p in network.named_parameters() if n.startswith("features")}
    given = {n: torch.randint(-1, 9, p.shape, generator=generator) * 10 for n, p in named.items()}
    save_file(given, tmp_path / "masks.safetensors")
    found = norms(network, groups=["masks"], masks=str(tmp_path / "masks.safetensors"))
    expected = [
        sum(float(named[n].detach()[given[n] == number].double().square().sum()) for n in named)
        ** 0.5
        for number in range(0, 90, 10)
    ]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "mask", "said"),
    [
        ("head.1.weight", torch.zeros(2, 2).int(), "has the shape"),
        ("body.weight", torch.zeros(2, 2).int(), "has no parameter body.weight"),
        ("features.0.bias", torch.zeros(16), "is torch.float32; give integers"),
        ("features.0.bias", -torch.ones(16).int(), "all numbers are negative"),
    ],
)
def test_a_mask_that_fits_nothing_is_one_sentence(network, tmp_path, name, mask, said):
    names = dict(network.named_parameters())
    name = name if name in names or name.startswith("body") else next(iter(names))
    save_file({name: mask}, tmp_path / "masks.safetensors")
    with pytest.raises(UserError, match=said):
        norms(network, groups=["masks"], masks=str(tmp_path / "masks.safetensors"))


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"groups": ["filters", "channels"]}, "groups overlap in"),
        ({"groups": ["filters", "rows"]}, "groups overlap in"),
        ({"groups": ["blocks"], "block": [7, 5]}, r"block=\[7, 5\] does not divide"),
        ({"groups": ["rows"], "layers": {"rows": "nowhere*"}}, "layers.rows=nowhere. matches no"),
        ({"groups": ["masks"], "masks": "/nowhere"}, "masks=/nowhere cannot be read"),
    ],
)
def test_groups_that_a_network_cannot_have_are_one_sentence(network, choice, said):
    with pytest.raises(UserError, match=said):
        families_of(network, GroupChoice(**choice))


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"groups": "masks"}, "need each other"),
        ({"masks": "here"}, "need each other"),
        ({"layers": {"rows": "head*"}}, "rows, which is not among groups"),
        ({"groups": "blocks", "block": [0, 4]}, "at least one row"),
        ({"groups": "pixels"}, "Input should be 'filters'"),
    ],
)
def test_knobs_of_groups_that_contradict_each_other_are_refused(knobs, said):
    with pytest.raises(ValidationError, match=said):
        Wgsef(**knobs)


def test_what_can_be_removed_is_and_the_rest_stays_zeroed(network):
    subject = Model(ModelConfig(name="n", source="n"), network, None, "", None, torch.device("cpu"))
    method = Wgsef(
        groups=["filters", "blocks"],
        layers={"filters": "features*", "blocks": "head*"},
        block=[8, 8],
        recipe={"epochs": 1, "batch": 200},
    )
    report = method.apply(subject, Context(seed=0))
    assert report.effect == "removed"
    assert set(report.details["only_zeroed"]) == {"head.0", "head.2"}
    zeros = [int((w == 0).sum()) for n, w in subject.network.named_parameters() if "head" in n]
    assert sum(zeros) > 0

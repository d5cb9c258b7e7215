"""Accuracy of a classifier: against a count by hand, with its error, image by image."""

import math

import pytest
import torch

from bench.data.image_catalogue import load_image_set as load_images
from bench.data.image_files import UnfitImage
from bench.errors import MissingData, UserError
from bench.evaluation import BenchmarkConfig, evaluate, plan
from bench.models.loading import load_model
from bench.models.source import resolve_model
from bench.schema import ModelConfig


def classifier(name="micro_lenet"):
    config = ModelConfig(
        name=name, source=f"embedded:{name}", kind="image_classifier", device="cpu"
    )
    return load_model(resolve_model(config, offline=True))


def benchmark(limit=None, batch_size=100, allow_missing=0.0, **images):
    return BenchmarkConfig(
        name="images", harness="images", limit=limit, batch_size=batch_size,
        allow_missing=allow_missing, images=images,
    )  # fmt: skip


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_accuracy_is_the_count_of_right_classes(split):
    model = classifier()
    splits = load_images("digits")
    chosen = (splits if split == "test" else splits.for_selection()).test
    image_BCHH, label_B = chosen.fetch(torch.arange(len(chosen)), None)
    with torch.no_grad():
        logit_BK = model.network(image_BCHH)
    right = [bool(ok) for ok in logit_BK.argmax(-1) == label_B]
    found = evaluate(model, plan(benchmark(split=split), offline=True))
    (metric,) = found.metrics
    share = sum(right) / len(right)
    spread = math.sqrt(sum((ok - share) ** 2 for ok in right) / (len(right) - 1) / len(right))
    assert (metric.task, metric.metric, metric.split) == ("digits", "acc", split)
    assert metric.n == len(right) == len(found.samples)
    assert metric.value == pytest.approx(share) and metric.stderr == pytest.approx(spread)
    assert [row["acc"] for row in found.samples] == [float(ok) for ok in right]
    for place in (0, 150):
        row = found.samples[place]
        assert (row["doc_id"], row["target"]) == (place, str(int(label_B[place])))
        assert row["prediction"] == str(int(logit_BK[place].argmax()))
        assert row["probability"] == pytest.approx(float(logit_BK[place].softmax(-1).max()))


def test_a_limit_takes_the_first_images():
    found = evaluate(classifier(), plan(benchmark(limit=7, batch_size=3), offline=True))
    assert found.metrics[0].n == len(found.samples) == 7
    assert [row["doc_id"] for row in found.samples] == list(range(7))


def test_other_images_have_another_fingerprint():
    asked = [benchmark(), benchmark(split="validation"), benchmark(limit=5)]
    prints = {plan(config, offline=True).fingerprints["digits"] for config in asked}
    assert len(prints) == 3


@pytest.mark.parametrize("name", ["cifar10", "imagenet"])
def test_missing_images_are_one_sentence(name, tmp_path):
    with pytest.raises(MissingData, match=r"benchmark\.images\.folder=FOLDER"):
        plan(benchmark(data=name), offline=True)
    with pytest.raises(MissingData, match="does not hold"):
        plan(benchmark(data=name, folder=str(tmp_path)), offline=True)


def test_a_language_model_is_refused_by_its_kind():
    language = ModelConfig(name="micro_moe", source="embedded:micro_moe")
    with pytest.raises(UserError, match="needs a model of kind image_classifier"):
        plan(benchmark(), offline=True).check_model(language)


def test_images_whose_logits_are_not_finite_are_in_no_accuracy():
    whole = evaluate(classifier(), plan(benchmark(limit=50), offline=True))
    model = classifier()
    stem = next(module for module in model.network.modules() if isinstance(module, torch.nn.Conv2d))
    images, _ = load_images("digits").test.fetch(torch.arange(50), None)
    unreadable = images.amax(dim=(1, 2, 3)).argmin()

    def spoil(module, inputs, output):
        """Let the images with the fainter strokes give no number."""
        faint_B = inputs[0].flatten(1).amax(-1) <= images[unreadable].max()
        return torch.where(faint_B[:, None, None, None], torch.nan, output)

    stem.register_forward_hook(spoil)
    lost = (images.flatten(1).amax(-1) <= images[unreadable].max()).nonzero().flatten().tolist()
    assert 0 < len(lost) < 50
    found = evaluate(model, plan(benchmark(limit=50), offline=True))
    assert [row["doc_id"] for row in found.samples if row["missing"]] == lost
    assert found.metrics[0].value is None and found.metrics[0].n == 50 - len(lost)
    assert found.missing[0].reason.startswith(f"{len(lost)} of 50 rows have no answer: the logits")
    allowed = evaluate(model, plan(benchmark(limit=50, allow_missing=0.99), offline=True))
    kept = [row["acc"] for row in whole.samples if row["doc_id"] not in lost]
    metric = allowed.metrics[0]
    assert metric.value == pytest.approx(sum(kept) / len(kept))
    assert (metric.n, metric.missing) == (len(kept), len(lost))


def test_an_image_file_that_cannot_be_read_is_one_row(monkeypatch):
    planned = plan(benchmark(limit=9, batch_size=4), offline=True)
    fetch = planned.harness.scored.fetch

    def broken(self, index_B, generator):
        if 5 in index_B.tolist():
            raise UnfitImage("val/3/x.png: its image cannot be opened")
        return fetch(index_B, generator)

    monkeypatch.setattr(type(planned.harness.scored), "fetch", broken)
    found = evaluate(classifier(), planned)
    assert [row["doc_id"] for row in found.samples] == list(range(9))
    assert [row["doc_id"] for row in found.samples if row["missing"]] == [5]
    assert "val/3/x.png" in found.missing[0].reason

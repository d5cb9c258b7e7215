"""Image classifiers from the command line: a run, its export and reload, and wrong input."""

import json

import onnxruntime
import pandas
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bench.data.image_catalogue import load_image_set as load_images
from bench.models.classifiers import serialization
from bench.records import Store
from methods.wgsef.trainer import Trainer

SHORT = [
    "model=micro_lenet", "benchmark=images", "benchmark.limit=null", "method=wgsef", "ratio=0.5",
    "method.wgsef.recipe.epochs=2", "method.wgsef.recipe.batch=200", "threads=1",
]  # fmt: skip


@pytest.mark.broad
def test_a_run_is_recorded_exported_and_loaded_again(bench, tmp_path, monkeypatch):
    code, _, err = bench("run", *SHORT)
    assert code == 0, err
    (folder,) = (bench.results / "runs").iterdir()
    record = json.loads((folder / "record.json").read_text())
    (method,) = record["methods"]
    assert method["effect"] == "removed"
    report = method["report"]
    assert [line["epoch"] for line in report["history"]] == [1, 2]
    assert {"alive", "fractional", "accuracy", "k"} <= set(report["history"][0])
    assert report["kept"] == sum(report["kept_by_layer"].values()) == 72
    assert report["alive_before_selection"] >= report["kept"]
    assert report["fractional_before_selection"] == 0
    assert record["model"]["architecture"] == "micro_lenet"
    dense, costs = record["model"]["parameters"], record["costs"]
    sizes = {(c["scope"], c["quantity"]): c["value"] for c in costs}
    assert sizes["model", "parameters"] < 0.6 * dense
    assert sizes["forward 1x1x8x8", "flops"] > 0
    (metric,) = record["metrics"]
    assert (metric["task"], metric["metric"], metric["n"]) == ("digits", "acc", 597)
    assert metric["value"] == pytest.approx(report["accuracy"])
    samples = pandas.read_parquet(folder / "samples.parquet")
    assert len(samples) == 597 and samples["acc"].mean() == pytest.approx(metric["value"])

    # The run kept what it trained, so nothing below trains again.
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trains again"))
    code, said, err = bench(
        "verify", record["id"], "--samples", "50", "--json", "--results-dir", str(bench.results)
    )
    assert code == 0, err
    assert json.loads(said)["worst"] == 0
    out = tmp_path / "exported"
    code, said, err = bench("export", record["id"], str(out), "--onnx")
    assert code == 0, err
    assert (
        "(classifier)" in said and "model.kind=image_classifier" in (out / "README.md").read_text()
    )
    network = serialization.load_classifier_folder(out)
    images, labels = load_images("digits").test.fetch(torch.arange(597), None)
    logits = network(images).detach()
    assert float((logits.argmax(-1) == labels).double().mean()) == pytest.approx(metric["value"])
    session = onnxruntime.InferenceSession(out / "model.onnx")
    (theirs,) = session.run(None, {"image": images.numpy()})
    torch.testing.assert_close(torch.tensor(theirs), logits, atol=1e-4, rtol=1e-4)

    again = ["model=local", "model.kind=image_classifier", f"model.path={out}", "benchmark=images"]
    code, _, err = bench("run", *again, "benchmark.limit=null")
    assert code == 0, err
    values = {
        json.loads(file.read_text())["metrics"][0]["value"]
        for file in (bench.results / "runs").glob("*/record.json")
    }
    assert values == {metric["value"]}

    # Whatever lies there instead is not taken for the run's network.
    file = folder / "weights" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file)
    code, _, err = bench("export", record["id"], str(tmp_path / "changed"))
    assert code == 2 and "is not the network that run" in err
    file.write_bytes(file.read_bytes()[:-9])
    code, _, err = bench("export", record["id"], str(tmp_path / "cut"))
    assert code == 2 and "cannot be loaded as a classifier" in err and "remove the folder" in err


@pytest.fixture
def birds(tmp_path):
    """Pictures of the user's own, in two classes."""
    for part in ("train", "test"):
        for shade, name in enumerate(("crow", "gull")):
            place = tmp_path / "birds" / part / name
            place.mkdir(parents=True)
            for number in range(4):
                colour = (200 * shade, 10 * number, 90)
                Image.new("RGB", (20, 24), colour).save(place / f"{number}.png")
    return tmp_path / "birds"


def own_images(birds):
    return [
        "model=torchvision/resnet18", "model.size=32", "model.classes=2", "benchmark=images",
        "benchmark.images.data=folder", f"benchmark.images.folder={birds}",
        "benchmark.images.size=32", "recipe.epochs=1", "recipe.batch=4", "threads=1",
        "benchmark.limit=null",
    ]  # fmt: skip


@pytest.mark.parametrize("method", [pytest.param("train", marks=pytest.mark.broad), "wgsef"])
def test_a_network_is_trained_on_images_of_the_users_own(bench, birds, method):
    code, _, err = bench("run", *own_images(birds), f"method={method}")
    assert code == 0, err
    (record,) = Store(bench.results).all()
    (metric,) = record.metrics
    assert (metric.task, metric.n) == ("folder", 4 + 4)
    assert record.methods[0].report["accuracy"] == metric.value
    assert "2 classes: crow, gull" in record.methods[0].report["data"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model.classes=3", "size 32 and 3 classes; folder has 3, 32 and 2: choose images"),
        ("benchmark.images.size=64", "size 32 and 2 classes; folder has 3, 64 and 2: choose"),
        ("benchmark.images.folder=/nowhere", "/nowhere holds no images in one folder per class"),
    ],
)
@pytest.mark.parametrize("method", ["dense", "train"])
def test_images_of_the_users_own_that_do_not_fit(refused, birds, method, argument, said):
    key = argument.partition("=")[0]
    given = [word for word in own_images(birds) if word.partition("=")[0] != key]
    assert said in refused(*given, argument, f"method={method}")


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["method.wgsef.k=0"], "method.wgsef.k=0"),
        (["method.wgsef.k=145"], "k=145 is too large: the network has 144 filters"),
        (["method.wgsef.k=3"], "fewer than the floors of all layers together"),
        (["method.wgsef.groups=[filters,channels]"], "groups overlap in"),
        (["method.wgsef.reach=1.5"], "less than or equal to 1"),
        (["method.wgsef.data=mnist"], "built for 1 channels, size 8 and 10 classes; mnist has"),
        (["benchmark.images.data=cifar11"], "did you mean 'cifar10'?"),
        (["model=micro_moe"], "training needs an image classifier, but the model is Qwen2Moe"),
        (["benchmark=camera_micro"], "model=micro_lenet is image_classifier"),
    ],
)
def test_wrong_input_with_sparse_training(refused, arguments, said):
    given = [a for a in SHORT if a.split("=")[0] not in {b.split("=")[0] for b in arguments}]
    if "benchmark=camera_micro" in arguments:
        given = [a for a in given if not a.startswith("benchmark.")]
    assert said in refused(*given, *arguments)


@pytest.mark.parametrize("folder", [None, "/nowhere"])
def test_missing_images(refused, folder):
    given = ["model=resnet18", "benchmark=images", "benchmark.images.data=cifar10"]
    given += [f"benchmark.images.folder={folder}"] if folder else []
    found = refused(*given)
    assert "cifar10" in found and ("does not hold" if folder else "images.folder=FOLDER") in found


def test_images_of_another_size(refused):
    found = refused("model=lenet5", "benchmark=images")
    assert "lenet5 is built for 1 channels, size 28 and 10 classes; digits has 1, 8 and 10" in found


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "method", ["camera_p", "wgsef_layerwise", "rtn", "magnitude", "d2_moe", "camera_q"]
)
def test_a_language_method_on_a_classifier(refused, method):
    found = refused("model=micro_resnet", "benchmark=images", f"method={method}")
    assert "micro_resnet" in found


def test_a_language_model_on_images(refused):
    assert "needs a model of kind image_classifier" in refused("benchmark=images")


def test_slimming_without_batch_norm(refused):
    found = refused(
        "model=micro_lenet", "benchmark=images", "method=slimming",
        "method.slimming.recipe.epochs=1",
    )  # fmt: skip
    assert "slimming needs BatchNorm scales" in found


@pytest.mark.sample(1)
@pytest.mark.parametrize("flag", ["--for=vllm", "--onnx"])
def test_forms_that_a_model_has_not(bench, tmp_path, flag):
    model = "micro_lenet" if flag == "--for=vllm" else "micro_moe"
    benchmark = ["benchmark=images"] if flag == "--for=vllm" else ["benchmark=perplexity_micro"]
    assert bench("run", f"model={model}", *benchmark)[0] == 0
    (folder,) = (bench.results / "runs").iterdir()
    code, _, err = bench("export", folder.name, str(tmp_path / "out"), flag)
    assert code == 2 and flag.replace("=", " ") in err
    assert not (tmp_path / "out").exists()


@pytest.mark.broad
def test_a_network_of_torchvision_scores_a_folder_of_images(bench, tmp_path):
    for number, name in enumerate(("cat", "dog", "owl")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), (80 * number, 0, 0)).save(tmp_path / "images" / name / "0.png")
    chosen = [
        "model=torchvision/mobilenet_v3_small", "model.size=32",
        "benchmark=images", "benchmark.images.data=folder", "benchmark.images.size=32",
        f"benchmark.images.folder={tmp_path / 'images'}",
    ]  # fmt: skip
    code, _, said = bench("run", *chosen, "model.classes=3")
    assert code == 0, said
    (record,) = Store(bench.results).all()
    assert record.model.name == "torchvision/mobilenet_v3_small"
    (accuracy,) = record.metrics
    assert (accuracy.task, accuracy.n) == ("folder", 3)

    code, _, said = bench("run", *chosen, "model.classes=4")
    assert code == 2 and "4 classes; folder has 3, 32 and 3" in said

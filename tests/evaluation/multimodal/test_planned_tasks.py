"""What is planned, from which files, and what is said when something is missing or wrong."""

import datasets
import pytest

from bench.data.synthetic.scenes import documents, scene_images
from bench.errors import MissingData, UserError
from bench.evaluation import BenchmarkConfig, plan
from bench.evaluation.multimodal import task_index
from bench.schema import ModelConfig


def config(*tasks, suite="real", **settings):
    return BenchmarkConfig(name="b", harness="lmms_eval", suite=suite, tasks=tasks, **settings)


def write(rows, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(file)
    return str(file)


@pytest.fixture
def pope(tmp_path):
    return write(documents("pope")[:5], tmp_path / "pope.parquet")


def test_a_local_file_is_read_in_place_of_the_hub(pope):
    (task,) = plan(config("pope", data={"pope": pope}), offline=True).harness.tasks
    document = task.task.dataset["test"][1]
    assert len(task.indices) == 5
    assert document["question"] == documents("pope")[1]["question"]
    (image,) = task.task.doc_to_visual(document)
    assert image.tobytes() == documents("pope")[1]["image"].convert("RGB").tobytes()
    assert task.source.origin == "file"


def test_gqa_takes_a_folder_of_instructions_and_images(tmp_path):
    rows = documents("gqa")[:4]
    write(rows, tmp_path / "testdev_balanced_instructions.parquet")
    write(
        scene_images("gqa"), tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet"
    )
    (task,) = plan(config("gqa", data={"gqa": str(tmp_path)}), offline=True).harness.tasks
    shown = {row["id"]: row["image"] for row in scene_images("gqa")}
    for document, row in zip(task.task.dataset["testdev"], rows, strict=True):
        (image,) = task.task.doc_to_visual(document)
        assert image.tobytes() == shown[row["imageId"]].convert("RGB").tobytes()


def test_gqa_without_images_says_what_is_missing(tmp_path):
    file = write(documents("gqa")[:2], tmp_path / "testdev_balanced_instructions.parquet")
    with pytest.raises(
        UserError, match=r"give a folder that contains testdev_balanced_images\.parquet"
    ):
        plan(config("gqa", data={"gqa": file}), offline=True)
    with pytest.raises(
        UserError, match=r"the folder must contain testdev_balanced_images\.parquet"
    ):
        plan(config("gqa", data={"gqa": str(tmp_path)}), offline=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: {k: v for k, v in row.items() if k != "category"}, "has no column 'category'"),
        (lambda row: row | {"image": 3}, "column 'image' must hold an image's bytes and path"),
        (lambda row: row | {"image": "a.png"}, "the rows do not fit pope: FileNotFoundError"),
    ],
)
def test_rows_of_another_schema_are_refused(change, reason, tmp_path):
    file = write([change(row) for row in documents("pope")[:3]], tmp_path / "pope.parquet")
    with pytest.raises(UserError, match=reason):
        plan(config("pope", data={"pope": file}), offline=True)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    file = tmp_path / "pope.parquet"
    file.write_text("no table")
    with pytest.raises(UserError, match=r"pope.parquet cannot be read as parquet"):
        plan(config("pope", data={"pope": str(file)}), offline=True)
    with pytest.raises(UserError, match="no such file or folder"):
        plan(config("pope", data={"pope": str(tmp_path / "nothing")}), offline=True)


def test_everything_missing_is_named_at_once(pope, monkeypatch):
    from bench.data import hub

    monkeypatch.setattr(hub, "go_offline", lambda: None)

    def absent(repository, part, **_):
        raise hub.DatasetUnreachable(hub.dataset_name(repository, part))

    monkeypatch.setattr(hub, "load_dataset", absent)
    asked = config("gqa", "pope", "mme", data={"pope": pope})
    with pytest.raises(MissingData) as said:
        plan(asked, offline=True)
    assert "GQA/testdev_balanced_instructions (gqa); lmms-lab-encoder/MME (mme)" in str(said.value)
    assert "(pope)" not in str(said.value)


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (config("poep"), "unknown task 'poep' in benchmark.tasks: did you mean 'pope'"),
        (config("pope_full"), "pope_full is a group of lmms-eval; list its tasks"),
        (config("vqav2_test"), "only writes a submission file"),
        (config("seedbench", suite="micro"), "task of benchmark.suite=micro"),
        (config("pope", num_fewshot=2), "benchmark.num_fewshot=2: lmms_eval supports only 0"),
        (config("pope", suite="micro", metrics={"pope": "acc"}), "metric benchmark.metrics.pope"),
        (config("pope", data={"gqa": "x"}), "task in benchmark.data"),
    ],
)
def test_wrong_input_is_one_sentence(asked, reason):
    with pytest.raises(UserError, match=reason):
        plan(asked, offline=True)


def test_a_text_model_is_refused_before_it_is_loaded():
    planned = plan(config("pope", suite="micro", limit=1), offline=True)
    with pytest.raises(UserError, match="needs a model of kind image_text"):
        planned.check_model(ModelConfig(name="m", source="embedded:m"))


def test_ours_includes_a_file_that_the_harness_has():
    assert set(task_index.FILES.micro_names()) == {
        "gqa", "vqav2_val", "scienceqa_img", "textvqa_val", "pope", "mme", "mmbench_en_dev_static",
    }  # fmt: skip
    for name in task_index.FILES.micro_names():
        assert task_index.find_task_file(name) == task_index._search_task_files(name)

"""The images of flips: records hold their hashes, so they are looked up in the benchmark again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, plan_once
from bench.records import Record
from bench.reporting.comparison.flips import Flip

FOLDER = "pictures"


def show(flipped: Sequence[Flip], record: Record, results_dir: Path) -> dict[str, list[Path]]:
    """Write the images of flips as PNG files; return the files by the hash that a flip names.

    The benchmark is the one of `record`. Files are named by the hash, and one that is there is not
    written again.

    Raises:
        MissingData: the benchmark's data are not on this machine and not to be had.
        UserError: a document has other images than when it was asked.
    """
    from bench.evaluation.multimodal.prompts import image_hash

    wanted = {flip.image: flip for flip in flipped if flip.image}
    if not wanted:
        return {}
    benchmark = BenchmarkConfig.model_validate(record.config["benchmark"])
    plan = plan_once(benchmark, offline=bool(record.config.get("offline")))
    written: dict[str, list[Path]] = {}
    for name, flip in wanted.items():
        images = plan.scoring.pictures(flip.task, flip.document)
        if image_hash(images) != name:
            raise UserError(
                f"the images of {flip.task} document {flip.document} are not those that were asked "
                "about: the data have changed since the run"
            )
        stem = results_dir / FOLDER / name[:16]
        stem.parent.mkdir(parents=True, exist_ok=True)
        written[name] = [Path(f"{stem}-{place}.png") for place in range(len(images))]
        for path, image in zip(written[name], images, strict=True):
            if not path.exists():
                image.save(path)
    return written

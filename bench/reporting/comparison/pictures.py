"""Images of flips: records keep only hashes, so images are read from the benchmark again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.errors import UserError
from bench.evaluation import BenchmarkConfig, plan_once
from bench.records import Record
from bench.reporting.comparison.flips import Flip

FOLDER = "pictures"


def show(flipped: Sequence[Flip], record: Record, results_dir: Path) -> dict[str, list[Path]]:
    """Write the images of flips as PNG files; return the files by image hash.

    The benchmark is that of `record`. Files are named by the hash; an existing file is kept.

    Raises:
        MissingData: the benchmark's data are not on this machine and cannot be downloaded.
        UserError: the images of a document differ from those of the run.
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
                f"the images of {flip.task} document {flip.document} differ from the run's: the "
                "data have changed since the run"
            )
        # 64 bits of the hash are enough to tell the images of one results folder apart.
        stem = results_dir / FOLDER / name[:16]
        stem.parent.mkdir(parents=True, exist_ok=True)
        written[name] = [Path(f"{stem}-{place}.png") for place in range(len(images))]
        for path, image in zip(written[name], images, strict=True):
            if not path.exists():
                image.save(path)
    return written

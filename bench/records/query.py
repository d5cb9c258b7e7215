"""Records as pandas data frames: one long table of metrics and costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.records.index import table
from bench.records.store import SAMPLES, Store

if TYPE_CHECKING:
    import pandas as pd


def load(results_dir: str | Path = "results") -> pd.DataFrame:
    """Return all records of a results folder as one long data frame.

    One row per metric (`kind == "metric"`) and per cost (`kind == "cost"`); the columns that
    describe the run (`run`, `model`, `label`, `methods`, `saving`, `started`, `group`) repeat.
    Records that cannot be read are left out; `bench ls runs` names them.
    """
    frame: pd.DataFrame = table(Store(Path(results_dir))).drop_columns(["stamp"]).to_pandas()
    return frame


def samples(run: str, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return the scored samples of one run, one row each.

    Raises:
        UserError: no such run, or its samples are damaged.
    """
    import pandas as pd

    store = Store(Path(results_dir))
    path = store.folder(store.get(run).id) / SAMPLES
    try:
        return pd.read_parquet(path, engine="pyarrow", page_checksum_verification=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read: {reason}; run it again: bench run ... force=true"
        ) from None

"""Records as pandas data frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bench.errors import UserError
from bench.records.index import table
from bench.records.store import SAMPLES, Store

if TYPE_CHECKING:
    import pandas as pd


def load(results_dir: str | Path = "results") -> pd.DataFrame:
    """Return all records of a results folder as one data frame in long format.

    There is one row per metric (`kind == "metric"`) and per cost (`kind == "cost"`); the columns
    that describe the run (`run`, `model`, `label`, `methods`, `saving`, `started`, `group`) repeat.
    Unreadable records are left out; `bench ls runs` names them.
    """
    # The stamp is internal to the index.
    frame: pd.DataFrame = table(Store(Path(results_dir))).drop_columns(["stamp"]).to_pandas()
    return frame


def samples(run: str, results_dir: str | Path = "results") -> pd.DataFrame:
    """Return the scored samples of one run, one row per sample; `run` may be a prefix of its id.

    Raises:
        UserError: there is no such run, the prefix is ambiguous, or the samples are damaged.
    """
    import pandas as pd

    store = Store(Path(results_dir))
    path = store.folder(store.get(run).id) / SAMPLES
    try:
        # Without page checksums, a flipped bit in a value would go unnoticed.
        return pd.read_parquet(path, engine="pyarrow", page_checksum_verification=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{path} cannot be read: {reason}; repeat the run: bench run ... force=true"
        ) from None

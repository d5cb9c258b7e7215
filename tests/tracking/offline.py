"""What an offline run of W&B left in its folder, read with W&B's own reader."""

import time

PATIENCE = 60
"""Seconds to wait for the last entry: W&B's own process writes it after `finish` has returned."""


def entries(file):
    """Return every entry of a .wandb file, once its last one, `exit`, is there."""
    until = time.monotonic() + PATIENCE
    while True:
        try:
            found = list(_scan(file))
        except AssertionError as error:  # the reader's, at an entry that is half written
            assert time.monotonic() < until, f"{file} is damaged: {error}"
            found = []
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        assert time.monotonic() < until, f"{file} has no end"
        time.sleep(0.05)


def _scan(file):
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    reader = DataStore()
    reader.open_for_scan(str(file))
    while (data := reader.scan_data()) is not None:
        entry = wandb_internal_pb2.Record()
        entry.ParseFromString(data)
        yield entry

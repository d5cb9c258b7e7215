"""What the slurm preset says to sbatch, in submitit's own words; Slurm is not needed for it."""

import shutil
from pathlib import Path
from threading import Event

import pytest
import submitit
from hydra import compose

from bench.config.composition import hydra_config_tree
from bench.errors import UserError
from bench.sweeps.launchers import local
from bench.sweeps.launchers.local import RemoteJob
from bench.sweeps.launchers.slurm_array import SubmititLauncher


def launcher(*overrides):
    with hydra_config_tree():
        asked = ["hydra/launcher=slurm", *overrides]
        own = compose("config", overrides=asked, return_hydra_config=True).hydra.launcher
        return SubmititLauncher(**{key: value for key, value in own.items() if key != "_target_"})


@pytest.fixture
def on_a_cluster(monkeypatch):
    """Let submitit take this machine for a login node: it looks for srun and nothing else."""
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 1))


def submission(queue):
    executor = queue._executor(Path("logs/%j"))
    return executor._executor._make_submission_file_text("the command", "unique")


def test_the_preset_asks_for_one_gpu_limits_and_being_queued_again(on_a_cluster):
    lines = submission(launcher()).splitlines()
    for wanted in ("gpus-per-node=1", "cpus-per-task=8", "mem=64GB", "time=240", "nodes=1",
                   "signal=USR2@120", "requeue", "job-name=slimbench"):  # fmt: skip
        assert f"#SBATCH --{wanted}" in lines


def test_settings_of_the_user_are_in_it(on_a_cluster):
    asked = [
        "hydra.launcher.partition=gpu", "hydra.launcher.account=lab",
        "hydra.launcher.timeout_min=90", "hydra.launcher.mem_gb=120",
        "hydra.launcher.setup=[module load cuda]",
        "+hydra.launcher.additional_parameters.mail_type=FAIL",
    ]  # fmt: skip
    lines = submission(launcher(*asked)).splitlines()
    for wanted in ("partition=gpu", "account=lab", "time=90", "mem=120GB", "mail-type=FAIL"):
        assert f"#SBATCH --{wanted}" in lines
    assert "module load cuda" in lines


def test_without_slurm_it_is_said_in_a_sentence(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="hydra/launcher=slurm"):
        launcher()._executor(Path("logs/%j"))


def test_a_preempted_call_is_submitted_again_as_it_is(monkeypatch):
    requeued = Event()
    monkeypatch.setattr(local, "REQUEUED", requeued)
    call = RemoteJob(None, None, None, {}, ["seed=1"], 0, ".")
    again = call.checkpoint()
    assert isinstance(again, submitit.helpers.DelayedSubmission)
    assert again.function is call
    # submitit's exit, which follows, must not be recorded as a failure of the run.
    assert requeued.is_set()

"""W&B's service ends with the tests that needed it."""

import psutil
import pytest


@pytest.fixture(scope="session", autouse=True)
def _service_ends():
    """Stop W&B's process: at exit W&B waits for it, and after tests that fork it may never end."""
    yield
    for child in psutil.Process().children():
        if "wandb-core" in child.name():
            child.terminate()

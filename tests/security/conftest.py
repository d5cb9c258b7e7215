"""Fixtures of the security tests."""

import pytest

MODEL = """
name: own_code
source: org/own-code
allow_remote_code: true
trust_remote_code: false
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Overrides with which the config of an installed package lists a model's own code.

    None of the models that ship with the project needs its repository's code.
    """
    folder = tmp_path / "site" / "package_with_a_model"
    (folder / "conf" / "model").mkdir(parents=True)
    for place in (folder, folder / "conf"):
        (place / "__init__.py").touch()
    (folder / "conf" / "model" / "own_code.yaml").write_text(MODEL)
    monkeypatch.syspath_prepend(str(folder.parent))
    return ["packages=[methods,package_with_a_model]",
            "hydra.searchpath=[pkg://package_with_a_model.conf]"]  # fmt: skip

"""The audit reads pins and licences, and complains about what it should."""

import json
from importlib.metadata import distribution

import pytest

from tests.security.audit import LICENCES, _pins, complaints_about, said_by_pip_audit


def test_pins_are_read_by_their_canonical_names():
    text = "# c==0\nSome_Name==1.2\ntorch==2.9.0+cpu  # local\nloose>=3\n"
    assert dict(_pins(text)) == {"some-name": "1.2", "torch": "2.9.0"}


@pytest.mark.parametrize(("licence", "fine"), [
    ("MIT", True), ("BSD-3-Clause", True), ("Apache Software License", True), ("LGPLv3", True),
    ("GPL-3.0-only", False), ("AGPLv3", False), ("Proprietary", False), ("", False),
    ("CC-BY-NC-4.0", False),
])  # fmt: skip
def test_licences_on_the_list(licence, fine):
    assert bool(LICENCES.search(licence)) == fine


def test_what_is_not_pinned_is_named():
    found = list(complaints_about({"nobody-pins-this": distribution("pytest")}))
    assert len(found) == 1
    assert "nobody-pins-this" in found[0]
    assert list(complaints_about({"pytest": distribution("pytest")})) == []


def test_a_known_vulnerability_is_a_complaint_and_a_skipped_package_is_no_all_clear(capsys):
    known = {"name": "a", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}
    clean = {"name": "b", "version": "1", "vulns": []}
    unknown = {"name": "c", "skip_reason": "Dependency not found on PyPI"}

    def said(*packages):
        found = said_by_pip_audit(json.dumps({"dependencies": packages}), "")
        return found, capsys.readouterr().out

    assert said(clean) == ([], "")
    found, out = said(known, clean)
    assert found == ["a 1 has the known vulnerability PYSEC-1"]
    assert "PYSEC-1" in out
    found, out = said(unknown, clean)
    assert found == []
    assert "not looked for" in out and "1 of 2 packages: c" in out
    assert said_by_pip_audit("", "broken") == ["pip-audit failed"]

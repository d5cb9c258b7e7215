"""The table of faults names a test for each row, and there is every test that it names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def rows():
    lines = (ROOT / "docs" / "faults.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ")][1:]


def test_every_fault_has_its_test():
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    there = set(re.findall(r"^def (test_\w+)\(", source, re.MULTILINE))
    named = [re.findall(r"`(test_\w+)`", row.rsplit("|", 2)[1]) for row in rows()]
    assert len(named) > 20
    assert all(named)
    assert {name for names in named for name in names} <= there

"""Files that services read: the workflow, hooks, templates and the citation are what they claim."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
YAML_FILES = [
    *ROOT.glob(".github/**/*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff",
]  # fmt: skip


@pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: file.name)
def test_it_is_yaml(file):
    assert yaml.safe_load(file.read_text())


def test_the_workflow_tests_every_python_that_we_promise():
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    pythons = jobs["test"]["strategy"]["matrix"]["python"]
    lowest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert lowest == pythons[0] and all(isinstance(version, str) for version in pythons)
    assert set(jobs) == {"check", "docs", "test", "coverage", "wheel", "dependencies"}
    assert all(job["runs-on"] and job["steps"] for job in jobs.values())


def test_the_workflow_calls_only_targets_and_files_that_exist():
    steps = [
        step["run"]
        for job in yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = {target for step in steps for target in re.findall(r"make ([a-z-]+)", step)}
    assert called and called <= targets
    files = {file for step in steps for file in re.findall(r"tests/[\w/]+\.py", step)}
    assert files and all((ROOT / file).is_file() for file in files)


def test_actionlint_agrees_where_it_is_installed():
    tool = shutil.which("actionlint")
    if tool is None:
        pytest.skip("actionlint is not installed")
    done = subprocess.run([tool, str(WORKFLOW)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_citation_is_of_this_version_and_of_the_papers_in_the_readme():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
    cited = {reference["url"].rpartition("/")[2] for reference in citation["references"]}
    assert cited == set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "README.md").read_text()))
    for reference in citation["references"]:
        assert reference["title"] and reference["authors"]

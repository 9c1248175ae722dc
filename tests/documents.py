"""The blocks of the documents: what a reader would type, and what each of them needs.

A block is fenced or indented by four spaces. An HTML comment before it may say what it is:
`<!-- text -->` is nothing to type, `<!-- needs: network, time -->` needs what a test doesn't have
(see NEEDS). What stands between `<!-- NAME: begin -->` and `end` was written by a benchmark and is
a record: nothing of it is typed.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.processes import ROOT

DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

NEEDS = {
    "network": "something is downloaded",
    "time": "it takes many minutes",
    "data": "it names a module, files or an order of the reader's own",
}

_COMMENT = re.compile(r"<!-- (text|needs|[\w-]+)(?:: (.*?))? -->")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of a document; `line` is where it begins, from 1."""

    document: str
    line: int
    language: str
    text: str
    is_text: bool = False
    needs: tuple[str, ...] = ()

    def commands(self) -> list[str]:
        """Return the commands, each on one line."""
        joined = self.text.replace("\\\n", " ")
        return [line for line in joined.splitlines() if line.strip()]

    def words(self) -> Iterator[list[str]]:
        """Yield the words of each command that is one of the service's, from `fedserver` on."""
        for command in self.commands():
            if re.match(r"python -m fed(server|client)\b", command):
                yield shlex.split(command, comments=True)[2:]


def blocks_of(document: str) -> list[Block]:
    """Return a document's blocks in their order."""
    blocks: list[Block] = []
    lines = (ROOT / document).read_text().splitlines()
    is_text, is_record = False, False
    needs: tuple[str, ...] = ()
    at = 0
    while at < len(lines):
        line, begin = lines[at], at
        at += 1
        if mark := _COMMENT.fullmatch(line):
            kind, value = mark.groups()
            if kind == "text":
                is_text = True
            elif kind == "needs":
                needs = tuple(word.strip() for word in value.split(","))
            elif value in ("begin", "end"):
                is_record = value == "begin"
            continue
        if not line.strip():
            continue
        if line.startswith("```"):
            end = lines.index("```", at)
            text, language = "\n".join(lines[at:end]), line[3:]
            at = end + 1
        elif line.startswith("    ") and not lines[begin - 1].strip():
            while at < len(lines) and lines[at].startswith("    "):
                at += 1
            text, language = "\n".join(line[4:] for line in lines[begin:at]), ""
        else:
            # Ordinary text: a comment before it is about no block.
            is_text, needs = False, ()
            continue
        blocks.append(
            Block(
                document=document,
                line=begin + 1,
                language=language,
                text=text,
                is_text=is_text or is_record,
                needs=needs,
            )
        )
        is_text, needs = False, ()
    return blocks

"""How tests/data/heldout.txt was made: the prose of the project's own documentation.

    python tests/data/make_heldout.py docs/*.md > tests/data/heldout.txt

Markup, tables and code are left out, paragraphs become single lines. The text is frozen: tests and the demo
read the file and do not run this, so that a measurement means the same after the documentation has changed.
"""

import re
import sys
from pathlib import Path


def prose(markdown: str) -> str:
    """The sentences of a Markdown text, a paragraph a line."""
    markdown = re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL)  # fenced code
    markdown = re.sub(r"^(?: {4,}|\t).*$", "", markdown, flags=re.MULTILINE)  # indented code
    markdown = re.sub(r"^\|.*$", "", markdown, flags=re.MULTILINE)  # tables
    markdown = re.sub(r"^(?:#+|[-*]|\d+\.) +", "\n", markdown, flags=re.MULTILINE)  # headings, lists
    markdown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", markdown)  # links
    markdown = re.sub(r"\*\*|`", "", markdown)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", markdown))
    return "\n".join(paragraph for paragraph in paragraphs if len(paragraph) > 1)


if __name__ == "__main__":
    print("\n\n".join(prose(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]))

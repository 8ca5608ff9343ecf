"""Figures in a document of docs/: what lies between `<!-- NAME -->` and `<!-- end -->` is written
by a program, the rest by hand."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from lib import files  # noqa: E402


def fill(doc: Path, blocks: dict[str, str]) -> None:
    """Put each block at the place of its name, and say so; say also which name has no place."""
    text = doc.read_text()
    for name, block in blocks.items():
        text, count = re.subn(
            rf"<!-- {re.escape(name)} -->\n.*?<!-- end -->",
            lambda _: f"<!-- {name} -->\n{block}\n<!-- end -->",
            text,
            flags=re.S,
        )
        print(f"tables: {name}: " + ("written" if count else f"{doc} has no place for it"))
    files.write_text(doc, text)

"""Makes debian_summaries.jsonl: descriptions of Debian packages, and the one-line synopses their maintainers wrote.

The text is what apt knows of every package of Debian main. On a Debian machine:

    apt-get -o Acquire::Languages=en update
    /usr/lib/apt/apt-helper cat-file $(apt-get -o Acquire::Languages=en indextargets \\
        --format '$(FILENAME)' 'Created-By: Translations' | grep _main_) > descriptions.txt
    python configs/quickstart/make_dataset.py descriptions.txt

The same text gives the same rows: they are chosen by a hash of the package's name.
"""

import hashlib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
ROWS = 720
DOCUMENT_CHARACTERS = range(150, 480)  # about 40 to 150 tokens of the quickstart's tokenizer
SUMMARY_CHARACTERS = range(15, 61)
SHARED_CHARACTERS = 60  # a paragraph this long that two packages share makes them near-duplicates


@dataclass(frozen=True)
class Package:
    """One package: its name, its synopsis, and its description as paragraphs."""

    name: str
    synopsis: str
    paragraphs: tuple[str, ...]

    @property
    def description(self) -> str:
        return "\n\n".join(self.paragraphs)

    @property
    def shared_text(self) -> set[str]:
        """What no package of the dataset may share with another, or with the text the model is pre-trained on."""
        return {self.synopsis, self.description, *(p for p in self.paragraphs if len(p) >= SHARED_CHARACTERS)}


def read_packages(text: str) -> list[Package]:
    """Every package of apt's record text (`Package:` and `Description-en:` fields), sorted, the first of each name."""
    packages = {}
    for record in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)", record, re.MULTILINE)
        description = re.search(r"^Description(?:-en)?: (.+)\n((?: .*\n?)+)", record, re.MULTILINE)
        if name and description and name[1] not in packages:
            packages[name[1]] = Package(name[1], description[1].strip(), paragraphs(description[2]))
    return [packages[name] for name in sorted(packages)]


def paragraphs(lines: str) -> tuple[str, ...]:
    """Wrapped lines joined; ` .` is an empty line; lines indented by two or more, such as lists, keep their break."""
    text = ""
    for line in lines.splitlines():
        if line.strip() in ("", "."):
            text += "\n\n"
        else:
            is_verbatim = line.startswith("  ")
            text += ("\n" if is_verbatim else " ") + line.strip()
    parts = (re.sub(r" *\n *", "\n", part).strip() for part in re.split(r"\n\n+", text))
    return tuple(re.sub(r"  +", " ", part) for part in parts if part)


def choose_rows(packages: list[Package]) -> list[Package]:
    """ROWS short plain descriptions, no two of which share a paragraph or a synopsis."""
    seen: set[str] = set()
    chosen = []
    for package in sorted(packages, key=lambda p: hashlib.sha256(p.name.encode()).digest()):
        if is_suitable(package) and seen.isdisjoint(package.shared_text):
            seen |= package.shared_text
            chosen.append(package)
    return chosen[:ROWS]


def is_suitable(package: Package) -> bool:
    """Prose in ASCII, of a length the toy can learn from in a minute."""
    text = package.description + package.synopsis
    return (
        len(package.description) in DOCUMENT_CHARACTERS
        and len(package.synopsis) in SUMMARY_CHARACTERS
        and text.isascii()
        and "://" not in text
        and all("\n" not in paragraph for paragraph in package.paragraphs)
    )


def main():
    packages = read_packages(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = choose_rows(packages)
    with (HERE / "debian_summaries.jsonl").open("w", encoding="utf-8") as file:
        for package in rows:
            row = {"document": package.description, "summary": package.synopsis, "package": package.name}
            file.write(json.dumps(row) + "\n")
    print(f"{len(rows)} rows of {len(packages):,} packages")


if __name__ == "__main__":
    main()

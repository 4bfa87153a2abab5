"""Write the generated parts of the documentation: `python docs/generate.py` (a test compares them with the files)."""

from __future__ import annotations

import re
from pathlib import Path

from dpkd.cli.losses import _row
from dpkd.host import load_host

ROOT = Path(__file__).parents[1]


def losses_table() -> str:
    """The built-in losses, a line each."""
    lines = ["| loss | family | text by | needs of the teacher | what |", "|---|---|---|---|---|"]
    for loss in load_host({}).losses.values():
        if loss.distribution == "dpkd":
            row = _row(loss)
            lines.append(
                f"| `{row['name']}` | {row['family']} | {', '.join(row['text'])} | {row['needs']} | {row['summary']} |"
            )
    return "\n".join(lines)


def example() -> str:
    """The example package's module, as a code block."""
    source = (ROOT / "docs/examples/dpkd-hello/dpkd_hello.py").read_text(encoding="utf-8")
    return f"```python\n{source.strip()}\n```"


PARTS = {"losses": losses_table, "example": example}


def generated(text: str) -> str:
    """The text with what stands between `<!-- generated: NAME -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?\n?(<!-- end -->)", fill, text, flags=re.DOTALL)


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(generated(readme.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Text in Markdown, LaTeX and CSV that stays text, whatever is in it."""

from __future__ import annotations

import re

from dpkd.errors import printable

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$\infty$",
    "‖": r"$\|$",
    "–": "--",
}


def line(text: str) -> str:
    """A text on one line, without control characters."""
    return printable(" ".join(text.split()))


def prose(text: str) -> str:
    """Markdown by the author of a loss: its emphasis and code stay, HTML does not."""
    return _no_html(line(text))


def markdown_text(text: str) -> str:
    """A name or a number in Markdown: neither markup nor HTML.

    >>> markdown_text("a_b | *c* <script>")
    'a\\\\_b \\\\| \\\\*c\\\\* &lt;script>'
    """
    return _no_html(re.sub(r"([\\`*_\[\]|])", r"\\\1", line(text)))


def _no_html(text: str) -> str:
    """Only where a tag or an entity would begin, so that `p < 0.001` is read as it is."""
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=[A-Za-z#])", "&amp;", text))


def markdown_code(value: object) -> str:
    """Inline code, whatever backticks are inside.

    >>> markdown_code("a"), markdown_code("`b`"), markdown_code("c|d")
    ('`a`', '`` `b` ``', '`c\\\\|d`')
    """
    text = line(str(value)).replace("|", "\\|")
    ticks = "`" * (_longest_run(text) + 1)
    space = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def markdown_fence(text: str, language: str) -> str:
    """A block of code, whatever fences are inside."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{printable(text.strip())}\n{fence}"


def _longest_run(text: str) -> int:
    """Backticks in a row."""
    return max(map(len, re.findall("`+", text)), default=0)


def latex_text(text: str) -> str:
    """Text that LaTeX prints as it is.

    >>> print(latex_text("a_b 50% ± 2"))
    a\\_b 50\\% $\\pm$ 2
    """
    return "".join(_LATEX.get(character, character) for character in line(text))


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet takes for a formula: such text gets an apostrophe in front; numbers stay numbers.

    >>> csv_cell("=1+1"), csv_cell(-0.5), csv_cell("kd-1")
    ("'=1+1", -0.5, 'kd-1')
    """
    is_formula = isinstance(value, str) and value.lstrip().startswith(("=", "+", "-", "@", "|", "%"))
    return f"'{value}" if is_formula else value

"""HTML and SVG as text: everything is escaped unless it is Markup already."""

from __future__ import annotations

from html import escape

_VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "col"})


class Markup(str):
    """Text that is HTML or SVG already."""

    __slots__ = ()


def element(name: str, /, *children: str | None, **attributes: object) -> Markup:
    """One element; children that are no Markup are escaped, attributes of None are left out.

    `class_` becomes `class`, other underscores become hyphens.

    >>> element("p", "a < b", element("br"), class_="note", data_x=1, id=None)
    '<p class="note" data-x="1">a &lt; b<br></p>'
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(*children)}</{name}>")


def joined(*children: str | None) -> Markup:
    """Children one after the other; those that are no Markup are escaped.

    >>> joined("&", Markup("&amp;"), None)
    '&amp;&amp;'
    """
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children if c is not None))

"""What a user reads before choosing a loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where an objective comes from: title, link, and the place in it (equation, section)."""

    title: str
    url: str
    where: str = ""
    bibtex: str = ""


@dataclass(frozen=True)
class Card:
    """What a user reads before choosing a loss."""

    title: str
    summary: str  # one line
    formula: str  # plain text with Unicode mathematics, per position or per pair: what the terminal shows
    sources: tuple[Source, ...]
    use_when: str
    avoid_when: str
    notes: str = ""  # errata, what differs between paper, released code and other toolkits
    latex: str = ""  # the formula once more, for the web page; empty: the plain one is shown
    unconfirmed: str = ""  # what nobody has checked against the paper: puts the loss among `contrib` on the zoo's page

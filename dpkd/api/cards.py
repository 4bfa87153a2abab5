"""What a user reads before choosing a loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where an objective comes from.

    title   of the paper or the code
    url     its address
    where   the place in it: equation, section, file
    bibtex  the entry for a bibliography
    """

    title: str
    url: str
    where: str = ""
    bibtex: str = ""


@dataclass(frozen=True)
class Card:
    """What a user reads before choosing a loss.

    title        the method, in words
    summary      one line
    formula      plain text with Unicode mathematics, per position or per pair: what the terminal shows
    sources      papers and code
    use_when     a sentence; `avoid_when` another
    notes        errata, and what differs between paper, released code and other toolkits
    latex        the formula for the web page; empty: the plain one is shown
    unconfirmed  what nobody has checked against the paper: puts the loss into `contrib` on the zoo's page
    """

    title: str
    summary: str
    formula: str
    sources: tuple[Source, ...]
    use_when: str
    avoid_when: str
    notes: str = ""
    latex: str = ""
    unconfirmed: str = ""

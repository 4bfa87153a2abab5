"""The check of external links, without asking anybody."""

from __future__ import annotations

from urllib.error import URLError

import links


def test_it_finds_the_links_of_every_page():
    found = links.links(links.pages())
    assert len(found) > 30
    assert any("README.md" in places for places in found.values())
    assert all(link.startswith("http") and not link.endswith((")", ".", "`", "}")) for link in found)
    assert "https://semver.org" in found


def test_a_link_ends_where_the_sentence_goes_on(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "See [a](https://a.org/x#y), <https://b.org/>. Or https://c.org/z. | http://localhost:1/v1 |", "utf-8"
    )
    assert links.links([page]) == {
        "https://a.org/x": ["page.md"],
        "https://b.org/": ["page.md"],
        "https://c.org/z": ["page.md"],
    }


def test_what_is_broken_is_printed_with_its_pages(capsys):
    def get(link: str) -> int:
        if link == "https://semver.org":
            raise URLError("no such host")
        return {"https://pluggy.readthedocs.io": 404}.get(link, 403)

    assert links.main(get) == 1
    said = capsys.readouterr().out
    assert "https://semver.org: no answer (<urlopen error no such host>), in python.md\n" in said
    assert "https://pluggy.readthedocs.io: status 404, in hooks.md\n" in said
    assert said.endswith("links, 2 broken\n")


def test_nothing_broken_is_no_failure(capsys):
    assert links.main(lambda link: 200) == 0
    assert capsys.readouterr().out.endswith(" links, 0 broken\n")

"""The page of a preparation: histograms, thresholds and their costs, and HTML that needs nothing from elsewhere."""

import html.parser

import numpy as np
import pytest

from lumos_jax.preparation import criteria, histograms, page, scan_rows
from lumos_jax.preparation.page import Group, Page, Picture, Sheet
from lumos_jax.preparation.settings import Criteria

REASONS = ("", scan_rows.UNDECODABLE, *criteria.REASONS)


def scanned(count=400, **columns):
    """Rows of a scan with random sizes and scores, of which a low aesthetic score was not decoded."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(count):
        height, width = map(int, rng.integers(100, 900, 2))
        aesthetic = float(rng.uniform(3, 8)) if i % 4 else float("nan")
        low = aesthetic < Criteria().min_aesthetic
        measured = (
            {}
            if low
            else {"height": height, "width": width, "blur": float(rng.lognormal(5, 1)), "entropy": 6.0, "border": 0.0}
        )
        made.append({
            "row": i, "sha256": rng.bytes(32), "bytes": int(rng.integers(1000, 9000)), "aesthetic": aesthetic,
            "reason": "aesthetic" if low else "", "caption": " ".join("w" * int(rng.integers(0, 9))),
        } | measured)  # fmt: skip
    return scan_rows.table(made)


def histogram(table, field, criteria=None, scale=1.0):
    criteria = criteria or Criteria()
    made = histograms.histograms(table, REASONS, criteria, Criteria(), scale)
    return next(one for one in made if one.field == field)


def test_counts_at_other_thresholds_are_those_of_the_selection():
    table = scanned()
    shown = histogram(table, "short_side")
    assert shown.limit == 256
    assert [limit for limit, _ in shown.moves] == [128, 192, 256, 384, 512]
    for limit, count in shown.moves:
        satisfied = criteria.codes(table, Criteria(short_side=limit), REASONS) == 0
        assert count == satisfied.sum() > 0
    height, width = (table[name].to_numpy() for name in ("height", "width"))
    assert shown.counts.sum() == (height > 0).sum()
    below = (np.minimum(height, width) < 256) & (height > 0)
    assert shown.counts[shown.edges[:-1] < 256].sum() == below.sum()  # a bin ends at the threshold


def test_a_score_looser_than_the_scan_is_an_upper_bound_and_says_so():
    table = scanned()
    shown = histogram(table, "min_aesthetic")
    counts = dict(shown.moves)
    rejected = table["aesthetic"].to_numpy()
    assert counts[4.25] - counts[4.75] == ((rejected >= 4.25) & (rejected < 4.75)).sum() > 0
    assert "another scan" in shown.remark
    assert shown.unknown == 100
    assert not histogram(table, "short_side").remark


def test_a_criterion_that_is_off_shows_thresholds_that_reject_some():
    table = scanned()
    shown = histogram(table, "min_blur", scale=2.0)
    assert shown.off
    (first, now), *others = shown.moves
    assert (first, now) == (0.0, 2 * (criteria.codes(table, Criteria(), REASONS) == 0).sum())
    assert len(others) == 3
    assert all(now > count > 0.5 * now for _, count in others)


class Links(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def shown():
    picture = Picture("images/a.jpg", "12 x 34", "source <b>: key")
    return Page(
        title="Preparation of /data", facts=[("candidates", "12")], basis="",
        sources={"laion": {page.KEPT: 7, "aesthetic": 2, "near_duplicate": 1}, "sa1b": {page.KEPT: 2}},
        histograms=histograms.histograms(scanned(), REASONS, Criteria(), Criteria(), 1.0),
        sheets=[Sheet(page.KEPT, 9, [picture]), Sheet("undecodable", 1, [Picture("", "0 bytes", "folder: x.jpg")])],
        groups=[Group("near duplicate", picture, [picture])], problems=[("a.tar", "not used", "truncated")],
        timings=[["scan of", "tasks"], ["all", "3"]], forecast=(), settings="{}",
    )  # fmt: skip


def test_the_page_needs_nothing_from_elsewhere(shown):
    text = page.render(shown)
    found = Links(text)
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert found.links
    assert all(link.startswith(("#", "images/")) for link in found.links)
    assert "http" not in text
    assert "source &lt;b&gt;: key" in text


def test_the_page_counts_all_sources(shown):
    text = page.render(shown)
    assert "70.0 % of 10 kept" in text
    assert "75.0 % of 12 kept" in text
    assert "truncated" in text
    assert text.count("<svg") == len(shown.histograms)


@pytest.mark.parametrize(
    ("part", "whole", "text"), [(1, 8, "12.5 %"), (0, 5, "0.0 %"), (1, 100_000, "0.001 %"), (0, 0, "0.0 %")]
)
def test_shares_have_digits_enough(part, whole, text):
    assert page.share(part, whole) == text

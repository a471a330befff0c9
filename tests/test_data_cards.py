"""The page of data cards has a card for every data set, and says what the tables and records say."""

import json
import re
from pathlib import Path

import pytest

from hyperdp_lib.data_sets import DATA_SETS
from hyperdp_lib.pages import data_cards
from hyperdp_lib.public.originals import ORIGINALS
from hyperdp_lib.scores.evaluation import NOT_DP

BOOK = Path(__file__).resolve().parent.parent / "book"
PAGE = (BOOK / "data_cards.md").read_text(encoding="utf-8")
RECORDS = BOOK / "results" / "duplicates"


def test_every_data_set_has_a_card_on_the_page():
    assert set(re.findall(r'^card\("(.+)"\)', PAGE, flags=re.M)) == set(DATA_SETS)
    assert "file: book/data_cards" in (BOOK / "_toc.yml").read_text(encoding="utf-8")
    sections = PAGE.split("\n### ")[1:]
    assert len(sections) == 2 + len(ORIGINALS)  # the embedded two
    for section in sections:
        assert "**Checks**" in section or "**checked**" in section, section.splitlines()[0]


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_card_has_counts_licence_and_originals(name):
    text = data_cards.card(name)
    train, test = DATA_SETS[name].counts
    assert f"{train:,} for training, {test:,} for test" in text and DATA_SETS[name].licence in text
    assert DATA_SETS[name].caveat in text
    for original in ORIGINALS.get(name, ()):
        assert original.file in text and (original.known_hash or "trusted on first use") in text
    assert {line.count("|") for line in text.splitlines()} == {3}


def test_nothing_on_record_is_said_plainly(tmp_path):
    assert "No records yet" in data_cards.duplicates_table(tmp_path)
    assert data_cards.duplicates_sentences(tmp_path) == ""


def test_table_and_sentences_follow_the_records(tmp_path):
    one = dict(measure="pixels", threshold=0.25, match_rate=0.5, control_rate=0.125, nearer_to_public=0.0)
    record = dict(
        num_private=1000,
        num_public=20_000,
        image_size=28,
        channels=1,
        matches_in_all=9,
        suspects=[[1, 2]] * 3,
        likenesses=[one],
    )
    (tmp_path / "drawings-mnist.json").write_text(json.dumps(record))
    assert "| drawings-mnist | pixels | 0.25 | 50.0% | 12.5% | 0.0% |" in data_cards.duplicates_table(tmp_path)
    text = data_cards.duplicates_sentences(tmp_path)
    assert "1,000 private against 20,000 public images, grey, 28 x 28" in text and "**3** (0.3%)" in text


def test_records_are_labelled_and_show_nothing_that_may_not_be_republished():
    for name, record in data_cards.duplicate_records(RECORDS):
        assert record["label"] == NOT_DP and record["num_private"] > 1000 and record["num_public"] > 30_000
        assert "/" not in record["public"] + record["private"]
        if "tiny-imagenet" in record["public"]:
            assert not (RECORDS / f"{name}.png").exists()
    assert (RECORDS / "glyphs-digits.json").is_file()

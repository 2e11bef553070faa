"""WordNet's nouns: what is loaded is what it should be, and a missing or damaged file is told."""

import pytest
import torch

from bilevel.data import load_wordnet_nouns
from bilevel.data import wordnet as module
from bilevel.errors import UsageError

LINES = (
    "  1 This software and database is being provided to you\n"
    "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived\n"
    "00015388 05 n 01 animal 0 000 | a living organism | it moves  \n"
    '15122231 28 n 01 time 0 000 | an instance; "this time he succeeded"  \n'
)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A data folder with a file of three nouns in place of the real one, and nothing installed."""
    folder = tmp_path / "data" / module.FOLDER
    folder.mkdir(parents=True)
    (folder / module.NAME).write_text(LINES)
    monkeypatch.setattr(module, "NUM_SYNSETS", 3)
    monkeypatch.setattr(module, "DEBIAN", tmp_path / "installed" / module.NAME)
    return folder


def test_the_real_file_has_its_texts_and_classes(wordnet):
    texts, labels = wordnet
    assert len(texts) == len(labels) == 82064
    counts = labels.bincount(minlength=25)
    assert len(counts) == len(module.CLASSES) == 25
    assert {name: int(counts[module.CLASSES.index(name)]) for name in ("artifact", "motive", "time")} == {
        "artifact": 11587, "motive": 42, "time": 1028,
    }  # fmt: skip
    horse = next(number for number, text in enumerate(texts) if text.startswith("solid-hoofed herbivorous quadruped"))
    assert module.CLASSES[int(labels[horse])] == "animal"


def test_a_text_is_what_stands_behind_the_first_bar_and_the_most_general_nouns_are_left_out(small):
    texts, labels = load_wordnet_nouns(small.parent)
    assert texts == ("a living organism | it moves", 'an instance; "this time he succeeded"')
    assert [module.CLASSES[label] for label in labels] == ["animal", "time"] and labels.dtype == torch.int64


def test_the_data_folder_comes_before_an_installed_file(small, monkeypatch):
    installed = small.parent / "elsewhere"
    small.rename(installed)
    monkeypatch.setattr(module, "DEBIAN", installed / module.NAME)
    assert len(load_wordnet_nouns(small.parent).texts) == 2


def test_a_missing_file_says_how_to_get_it(small):
    (small / module.NAME).unlink()
    with pytest.raises(UsageError, match=r"data.noun does not exist: install Debian's package wordnet-base, or put"):
        load_wordnet_nouns(small.parent)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (LINES[:-60].encode(), r"expected to have the 3 nouns of WordNet 3.0, but has 2|is damaged"),
        (LINES.replace(" | ", " / ").encode(), r"is damaged \(not enough values"),
        (LINES.replace(" 05 ", " x5 ").encode(), r"is damaged \(invalid literal"),
        (LINES.replace(" 28 ", " 29 ").encode(), r"damaged, or of another version"),
        (LINES.encode() + b"\xff\xfe", r"is damaged \('utf-8' codec"),
        (b"", r"has 0"),
    ],
)
def test_damage_is_told_in_one_sentence(small, content, said):
    (small / module.NAME).write_bytes(content)
    with pytest.raises(UsageError, match=said):
        load_wordnet_nouns(small.parent)

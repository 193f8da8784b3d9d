import doctest

import pytest

from toyllm import cards


def test_the_examples_of_the_package_hold():
    found = doctest.testmod(cards)
    assert found.attempted == 6
    assert found.failed == 0


def test_every_name_is_there():
    assert all(getattr(cards, name).__name__ == name for name in cards.__all__)
    with pytest.raises(AttributeError, match="no attribute 'parser'"):
        cards.parser  # noqa: B018

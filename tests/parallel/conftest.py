"""Rank pools, one per size and module; the tiny model that parallel tests share."""

import pytest

from tests.ranks import Ranks


@pytest.fixture(scope="module")
def one_rank():
    ranks = Ranks(1)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.close()

"""Kept outputs are compared with today's: what passes, and what does not."""
import importlib.util
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("notebook_tests", Path(__file__).resolve().parent.parent / "conftest.py")
NOTEBOOK_TESTS = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(NOTEBOOK_TESTS)


@pytest.mark.parametrize("kept, now", [
    ("E 0.12 of 8", "E 0.13 of 8"),                                         # in the last digit
    ("loss 2.317867469787598", "loss 2.3178674697876"),
    ("1,024 cells", "1024 cells"),
    ("+0.000", "-0.000"),
    ("a  b\n┏━┓", "a b"),                                                   # the width of a table
    ("epoch 1/3  train loss 2.29\ndone", "done"),
    ("<x at 0x7f12ab>", "<x>"),
])
def test_the_same(kept, now):
    assert NOTEBOOK_TESTS.difference(kept, now) is None


@pytest.mark.parametrize("kept, now", [
    ("E 0.12", "E 0.14"),
    ("E 0.3", "E 0.4"),
    ("2 regions", "3 regions"),
    ("'weight 0': 0.27", "'weight 1': 0.27"),
    ("(8, 3, 14, 14)", "(8, 3, 8, 8)"),
    ("loud tokens in 1 of 8", "no loud token in 8"),
    ("0.5174", "0.4863"),
])
def test_not_the_same(kept, now):
    assert NOTEBOOK_TESTS.difference(kept, now)

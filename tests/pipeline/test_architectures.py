"""Every architecture that transformers puts behind its experts interface, found and not listed."""

from pathlib import Path

import pytest
from architectures import DENSE, discovered, others_with_experts
from roundtrip import round_trip

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

FEED_FORWARD = {"mlp", "shared_mlp", "feed_forward"}
"""Children of decoder layers that hold experts, shared experts and dense layers' MLPs.

Where a layer is a single branch, that may be called a mixer whatever it is.
"""


@pytest.fixture(scope="module")
def rows():
    """``{type: line}`` of the page's tables."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    tables = [line for line in lines if line.startswith("| ") and not line.startswith("| type ")]
    return {line.split(" | ")[0].removeprefix("| "): line for line in tables if "---" not in line}


@pytest.mark.parametrize("model_type", [*discovered(), *DENSE])
def test_a_loaded_checkpoint_has_the_logits_of_its_decoded_weights(model_type, rows, tmp_path):
    trip = round_trip(model_type, tmp_path)
    if trip.refusal is None:
        assert trip.is_right, trip
        assert trip.linears > 0
        assert (trip.experts > 0) == (model_type not in DENSE)
        assert trip.experts_by_default == trip.experts
        assert model_type in DENSE or trip.branches_by_default <= {*FEED_FORWARD, "mixer"}
        assert trip.branches_left_out.isdisjoint(FEED_FORWARD)
    assert rows[model_type] == trip.row, "run scripts/list_architectures.py"


@pytest.mark.parametrize("model_type", others_with_experts())
def test_experts_in_a_form_of_their_own_stop_with_their_names(model_type, rows, tmp_path):
    trip = round_trip(model_type, tmp_path)
    assert "no rule covers them" in trip.refusal
    assert rows[model_type] == trip.row, "run scripts/list_architectures.py"


def test_the_page_has_every_type_and_no_other(rows):
    assert list(rows.keys() - {*discovered(), *others_with_experts(), *DENSE}) == []
    assert list({*discovered(), *others_with_experts(), *DENSE} - rows.keys()) == []


def test_at_least_95_percent_of_the_types_behind_the_interface_are_covered(rows):
    found = discovered()
    assert len(found) >= 60
    covered = [name for name in found if rows[name].count("|") == 5]
    assert len(covered) >= 0.95 * len(found)

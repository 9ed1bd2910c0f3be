"""Where a measurement says that it comes from."""

import pytest

from benchmarks.provenance import commit


def test_the_commit_can_be_named_where_there_is_no_repository(monkeypatch):
    monkeypatch.setenv("JFP4_COMMIT", "0123456789ab")
    assert commit() == "0123456789ab"


@pytest.mark.parametrize("named", ["", " "])
def test_a_measurement_of_no_commit_is_refused(monkeypatch, named):
    monkeypatch.setenv("JFP4_COMMIT", named)
    with pytest.raises(ValueError, match="JFP4_COMMIT must be the measured commit, not '"):
        commit()

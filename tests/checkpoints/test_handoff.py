"""The account of a hand-off: everything named, or an error that lists both sides."""

import json

import numpy as np
import pytest

from lumos_jax.checkpoints import transfer


def tree(**shapes):
    return {group: {"kernel": np.full(shape, i, np.float32)} for i, (group, shape) in enumerate(shapes.items())}


def test_everything_alike_is_loaded():
    source, target = tree(a=(2, 3), b=(4,)), tree(a=(2, 3), b=(4,))
    source["a"]["kernel"] += 7
    params, account = transfer(source, target, origin="x")
    assert np.array_equal(params["a"]["kernel"], source["a"]["kernel"])
    assert account.loaded == ("a/kernel", "b/kernel")
    assert account.parameters == {"loaded": 10, "reinitialised": 0, "dropped": 0}


def test_what_no_rule_names_is_an_error_that_lists_both_sides():
    with pytest.raises(ValueError, match="do not fit") as error:
        transfer(tree(a=(2,), old=(3,), c=(5,)), tree(a=(2,), new=(3,), c=(6,)), origin="the other run")
    for part in ("the other run", "new/kernel: only here", "old/kernel: only there", "c/kernel: (5,) there, (6,) here"):
        assert part in str(error.value)


def test_named_rules_reinitialise_and_drop(tmp_path):
    source, target = tree(a=(2,), old=(3,), c=(5,)), tree(a=(2,), new=(3,), c=(6,))
    params, account = transfer(source, target, origin="x", reinitialise=("new/*", "c/kernel"), drop=("old/*",))
    assert np.array_equal(params["c"]["kernel"], target["c"]["kernel"])
    assert account.reinitialised == ("new/kernel", "c/kernel")
    assert set(account.dropped) == {"c/kernel", "old/kernel"}
    account.save(tmp_path / "handoff.json")
    saved = json.loads((tmp_path / "handoff.json").read_text())
    assert saved["parameters"] == {"loaded": 2, "reinitialised": 9, "dropped": 8}
    assert "reinitialised" in account.table()

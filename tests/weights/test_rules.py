"""Names on disk: wrappers' prefixes, and what a table's errors list."""

import numpy as np
import pytest

from lumos_jax.weights import rules
from lumos_jax.weights.rules import Rule


def test_prefixes_of_wrappers_are_stripped_and_told(caplog):
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "model.", "ema.", "_orig_mod.module.model."):
        caplog.clear()
        assert rules.strip_wrappers({f"{prefix}a.weight": 1, f"{prefix}b": 2}, "it") == {"a.weight": 1, "b": 2}
        assert caplog.messages == [f"it: stripped the prefix {prefix!r} from its names"]
    caplog.clear()
    assert rules.strip_wrappers({"a": 1, "head.b": 2}, "it") == {"a": 1, "head.b": 2}
    assert not caplog.messages
    assert rules.strip_wrappers({"module.a": 1, "n_averaged": 2}, "it") == {"a": 1}  # torch.optim's AveragedModel
    dino = {"module.backbone.a": 1, "module.head.b": 2}
    assert rules.strip_wrappers(dino, "it") == {"a": 1, "head.b": 2}
    assert rules.strip_wrappers({"vit.a": 1, "classifier.b": 2}, "it") == {"a": 1, "classifier.b": 2}


def test_mixed_prefixes_name_both():
    mixed = {"module.cls_token": 1, "pos_embed": 2}
    with pytest.raises(ValueError, match=r"it mixes names with and without 'module\.': module\.cls_token .* pos_embed"):
        rules.strip_wrappers(mixed, "it")
    mixed = {"backbone.cls_token": 1, "pos_embed": 2, "head.mlp.0.bias": 3}
    with pytest.raises(ValueError, match=r"without 'backbone\.': backbone\.cls_token \.\.\. but pos_embed \.\.\."):
        rules.strip_wrappers(mixed, "it")
    with pytest.raises(ValueError, match=r"head\.weight twice"):
        rules.strip_wrappers({"backbone.head.weight": 1, "head.weight": 2}, "it")


TABLE = (
    Rule("a.{i}.q", "blocks/qk", "linear", join=1),
    Rule("a.{i}.k", "blocks/qk", "linear", join=1),
    Rule("patch", "patch", "patch"),
    Rule("buffer.{rest}", "", why="fixed"),
)
TARGET = {"blocks/qk": (2, 3, 8), "patch": (12, 5)}


def state():
    made = {f"a.{i}.{part}": np.full((4, 3), 10 * i + (part == "k")) for i in range(2) for part in "qk"}
    return made | {"patch": np.arange(60).reshape(5, 3, 2, 2), "buffer.x.y": np.zeros(7)}


def test_arrays_are_joined_stacked_and_placed_one_by_one():
    placed = []
    params, report = rules.convert(
        state(), TABLE, TARGET, origin="it", place=lambda path, array: placed.append(path) or array
    )
    assert placed == list(TARGET)
    np.testing.assert_array_equal(params["blocks/qk"][1], [[10] * 4 + [11] * 4] * 3)
    np.testing.assert_array_equal(params["patch"][3], state()["patch"][:, 0, 0, 1])  # rows are (h w in)
    assert (report.parameters, report.dropped_parameters, report.dropped) == (108, 7, {"buffer.x.y": "fixed"})
    shapes, same = rules.convert({n: v.shape for n, v in state().items()}, TABLE, TARGET, origin="it")
    assert same == report
    assert {path: view.shape for path, view in shapes.items()} == TARGET


def test_export_undoes_convert():
    table = (Rule("b.{i}.w", "blocks/w", "linear"), Rule("patch", "patch", "patch"), Rule("n", "n"))
    params = {"blocks/w": np.arange(12).reshape(2, 2, 3), "patch": np.arange(60).reshape(12, 5), "n": np.arange(3)}
    exported = rules.export(params, table, patch_size=2)
    assert list(exported) == ["b.0.w", "b.1.w", "patch", "n"]
    target = {path: array.shape for path, array in params.items()}
    for path, array in rules.convert(exported, table, target, origin="it")[0].items():
        np.testing.assert_array_equal(array, params[path], err_msg=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("a.1.k"), r"blocks/qk: layer 1 lacks a\.\{i\}\.k"),
        (lambda s: [s.pop("a.0.k"), s.pop("a.0.q")], r"blocks/qk: layers \[1\] are not consecutive from 0"),
        (lambda s: s.update({"a.1.q": np.zeros((5, 3))}), "layers differ in shape"),
        (lambda s: s.update(patch=np.zeros((5, 3, 3, 2))), r"patch: \(18, 5\) there, \(12, 5\) here"),
        (lambda s: s.update(patch=np.zeros(5)), r"patch: shape \(5,\) is not what rule 'patch' expects"),
        (lambda s: s.update(pach=s.pop("patch")), r"pach .*no rule \(near: patch(.|\n)*nothing fills it; .*near: pach"),
    ],
)
def test_what_does_not_fit_is_listed(change, message):
    changed = state()
    change(changed)
    with pytest.raises(ValueError, match=message):
        rules.convert(changed, TABLE, TARGET, origin="it")

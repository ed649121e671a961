import pytest

from lumos_jax.planning import parse_target


def test_targets_are_chips_and_shapes():
    target = parse_target("v5p:4x4x8")
    assert (target.chip.name, target.chips, str(target)) == ("v5p", 128, "v5p:4x4x8")
    assert parse_target("h100:8").chips == 8


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("v9:4x4", "'v9' is not one of v5e, v5p"),
        ("v5e", "takes 2 number"),
        ("v5e:4x4x4", "takes 2 number"),
        ("v5p:4x4", "as v5p:4x4x4"),
        ("v5e:axb", "takes 2 number"),
        ("h100:2x4", "as h100:8"),
        ("h100:0", "1 or more"),
        ("v6e:3x4", "first two sides are even"),
    ],
)
def test_other_targets_are_refused(text, told):
    with pytest.raises(ValueError, match=told):
        parse_target(text)


def test_clocks_follow_from_peaks():
    # As published: v5e 1.5 GHz, v5p 1.75 GHz.
    assert parse_target("v5e:2x2").chip.clock == pytest.approx(1.5e9, rel=0.01)
    assert parse_target("v5p:2x2x1").chip.clock == pytest.approx(1.75e9, rel=0.01)

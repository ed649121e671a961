"""Every study of configs/ablations resolves in all its sizes and variants, and one of them trains."""

import importlib
import json
import pathlib

import pytest

from lumos_jax.config import io as config_io
from lumos_jax.train import loop

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "ablations"
STUDIES = sorted(path.stem for path in FOLDER.glob("*.py"))
# Where the paper's size waits for something that is not ours to guess.
GIVEN = {"data.path": "shards", "init_from": "prior"}


def get(study, name):
    return importlib.import_module(f"configs.ablations.{study}").get_config(name)


def variants_of(study):
    """The variants that the error names when none is given; [""] of a study without any."""
    try:
        get(study, "")
    except ValueError as error:
        return str(error).partition("the variants are ")[2].split(", ")
    return [""]


@pytest.mark.parametrize("study", STUDIES)
def test_every_size_and_variant_resolves(study):
    resolved = {}
    for variant in variants_of(study):
        for size in ("", "desk", "test"):
            made = get(study, ",".join(part for part in (size, variant) if part))
            if made.data.source == "arrayrecord" and not made.data.path:
                made.data.path = "shards"
            resolved[size, variant] = config_io.resolve(made)
    assert len(set(resolved.values())) == len(resolved), "two variants are the same run"
    for (size, _), settings in resolved.items():
        assert (settings.model.size == "XL") != bool(size)
        assert (settings.data.source == "scenes") == bool(size)
    with pytest.raises(ValueError, match=r"after the (file's )?name"):
        get(study, "desc")


def test_the_guide_names_every_study():
    guide = (FOLDER.parents[1] / "docs" / "ablations.md").read_text()
    for study in STUDIES:
        assert f"configs/ablations/{study}.py" in guide


def test_a_study_trains(one_device, tmp_path):
    made = get("class_conditional", "test")
    made.train.steps = made.checkpoint.every = made.eval.every = made.log.every = 2
    made.optimizer.decay, made.eval.steps = "constant", 2
    made.model.size = "16x1x2"
    assert loop.train(loop.prepare(config_io.resolve(made), str(tmp_path))) == 0
    last = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["held_out_shuffled_loss"] > 0
    assert (tmp_path / "samples" / "step_2.png").exists()

"""The one assembly of a run: what it makes without devices, and how near the network is to the command line."""

import traceback
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import i2i
from lumos_jax import main
from lumos_jax.models import Network
from lumos_jax.train.experiment import Experiment
from tests.stepping import build, matmuls, settings_with


def test_an_abstract_experiment_has_the_shapes_and_shardings_of_a_real_one():
    settings = settings_with(mesh={"fsdp": 4})
    real, abstract = build(settings, 8), Experiment.build(settings, jax.devices(), abstract=True)

    def described(tree):
        return jax.tree.map(lambda a: (a.shape, a.dtype, a.sharding), tree)

    assert described(abstract.frozen) == described(real.frozen)
    assert described(abstract.abstract_state) == described(real.init_state())
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract.frozen))


def test_without_training_any_number_of_devices_will_do():
    settings = settings_with(mesh={"fsdp": 2}, train={"batch_size": 16})
    assert dict(Experiment.build(settings, jax.devices()[:3], training=False).mesh.shape)["data"] == 3
    with pytest.raises(ValueError, match="does not fit 3 device"):
        build(settings, 3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmuls_of_float32_arrays_are_not_rounded_on_accelerators(dtype):
    experiment = Experiment.build(settings_with(model={"dtype": dtype}), jax.devices()[:1])
    batch = {"image": np.zeros((16, 16, 16, 3), np.uint8), "weight": np.ones(16, np.float32)}
    traced = experiment.train_step.trace(experiment.abstract_state, experiment.frozen, batch)
    float32 = [e for e in matmuls(traced.jaxpr.jaxpr) if e.invars[0].aval.dtype == e.invars[1].aval.dtype == np.float32]
    assert float32
    assert all(e.params["precision"] == (jax.lax.Precision.HIGHEST,) * 2 for e in float32)


class Reached(BaseException):
    """Raised where the network's forward pass would begin."""


@pytest.mark.parametrize(
    "fields",
    [{}, {"mesh.fsdp": 4, "optimizer.accumulate": 2}, {"finetune.lora_rank": 2}],
    ids=["data parallel", "fsdp and accumulation", "lora"],
)
def test_at_most_nine_calls_lead_from_main_to_the_network(fields, tmp_path, monkeypatch):
    def apply(*_, **__):
        raise Reached([frame.name for frame in traceback.extract_stack() if "/lumos_jax/" in frame.filename])

    given = i2i.get_config("test")
    given.update_from_flattened_dict(fields | {"eval.every": 0})
    monkeypatch.setattr(Network, "apply", apply)
    monkeypatch.setattr(main, "_CONFIG", SimpleNamespace(value=given))
    monkeypatch.setattr(main, "_WORKDIR", SimpleNamespace(value=str(tmp_path)))
    monkeypatch.setattr(main.cluster, "join", lambda: None)
    with pytest.raises(Reached) as reached:
        main.main()
    [frames] = reached.value.args
    assert frames[:3] == ["main", "train", "step"]
    accumulating = given.optimizer.accumulate > 1  # adds the body of the scan, of which only shapes were traced by now
    assert len(frames) + accumulating <= 9, frames  # the last one calls the network

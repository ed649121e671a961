"""Invariant 2 for clips: frames split over the mesh axis `context`, with FSDP and images in between, change nothing."""

import jax
import numpy as np
import pytest

from configs import i2i, i2v
from tests.stepping import assert_close, build, losses, settings_with, train, train_on

CLIPS = {
    "data": {"clips.image_step_fraction": 0.5},
    "model": {"size": "32x1x2"},
    "train": {"batch_size": 4},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 0},
}
STEPS = 3  # a clip, images, a clip


def test_split_frames_train_alike():
    seen = []

    def look(step, host):
        seen.append("image" in host)
        return host

    alone, alone_state = train(settings_with(i2v, **CLIPS), 1, STEPS, look)
    assert seen == [False, True, False]
    experiment = build(settings_with(i2v, mesh={"fsdp": 2, "context": 2}, **CLIPS), 8)
    frames = experiment.device_batch({"frames": np.zeros((4, 4, 2, 2, 3)), "weight": np.ones(4)}, 4)["frames"]
    assert frames.sharding.shard_shape(frames.shape)[:2] == (1, 2)
    split, split_state = train_on(experiment, STEPS)
    np.testing.assert_allclose(losses(split), losses(alone), rtol=1e-5)
    temporal = alone_state.params["blocks"]["temporal"]
    assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(temporal)) > 0.005
    assert_close(split_state.ema, alone_state.ema)


def test_frames_that_do_not_split_are_refused():
    with pytest.raises(
        ValueError, match=r"config\.mesh\.context=8 splits the frames of clips evenly, and .* has 4 frames"
    ):
        build(settings_with(i2v, mesh={"context": 8}), 8)
    with pytest.raises(ValueError, match=r"config\.data\.sample_type=image have none"):
        settings_with(i2i, mesh={"context": 8})
    build(settings_with(i2v, mesh={"context": 4}), 8)

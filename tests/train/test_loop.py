"""How the loop ends where something fails."""

import pytest

from configs import i2i
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.config import io as config_io
from lumos_jax.train import loop, metrics
from lumos_jax.train.experiment import Experiment


@pytest.mark.parametrize("first", [FloatingPointError, OSError])
def test_failing_closes_do_not_hide_the_first_error(tmp_path, monkeypatch, capsys, first):
    def step(*_):
        raise first("the first error")

    def failing(close, error):
        def close_and_fail(self):
            close(self)
            raise error

        return close_and_fail

    made = i2i.get_config("test")
    made.eval.every = 0
    run = loop.prepare(config_io.resolve(made), str(tmp_path))
    monkeypatch.setattr(Experiment, "train_step", property(lambda self: step))
    monkeypatch.setattr(metrics.Reporter, "close", failing(metrics.Reporter.close, OSError("the second")))
    monkeypatch.setattr(Checkpoints, "close", failing(Checkpoints.close, ValueError("the third")))
    assert loop.train(run) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: the first error"

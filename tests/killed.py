"""Runs a program of ours that kills itself (SIGKILL) at a named moment: python -m tests.killed MOMENT lumos_jax.main ..."""

import os
import pathlib
import runpy
import signal
import sys

from lumos_jax import fileio
from lumos_jax.checkpoints import Checkpoints
from lumos_jax.train import metrics


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def within_the_account():
    """Half of handoff.json is on disk, under its temporary name."""
    whole = fileio.write_whole

    def half(path, content, **how):
        if pathlib.Path(path).name == "handoff.json":
            pathlib.Path(f"{path}.partial").write_text(content[: len(content) // 2])
            kill()
        whole(path, content, **how)

    fileio.write_whole = half


def before_the_first_checkpoint():
    """Steps are done and logged, and none is saved."""
    Checkpoints.save = kill


def after_a_checkpoint():
    """A step is logged that comes after the first checkpoint."""
    save, write = Checkpoints.save, metrics.Reporter.write
    saved = []

    def save_whole(self, step, *what):
        save(self, step, *what)
        self.wait()
        saved.append(step)

    def write_and_die(self, step, values):
        write(self, step, values)
        if saved and step > saved[0]:
            kill()

    Checkpoints.save, metrics.Reporter.write = save_whole, write_and_die


if __name__ == "__main__":
    moment, program = sys.argv[1:3]
    globals()[moment]()
    del sys.argv[1:3]
    runpy.run_module(program, run_name="__main__", alter_sys=True)

"""Which processes jax.distributed is asked to join, by flags and the environment of launchers."""

import jax
import pytest
from absl import flags

from lumos_jax import cluster

SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[07-08],x1", "SLURM_NTASKS": "24", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x3)",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}


@pytest.fixture
def join(monkeypatch):
    """(environment, *command line) -> what jax.distributed gets, and which GPUs are visible then."""

    def run(environment, *arguments):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked = []
        monkeypatch.setattr(
            jax.distributed, "initialize", lambda *given, cluster_detection_method, **_: asked.extend(
                (given, cluster_detection_method, "detected")
            )
        )  # fmt: skip
        monkeypatch.setattr(jax.config, "update", lambda name, value: asked.__setitem__(2, value))
        flags.FLAGS(["program", *arguments], known_only=True)
        try:
            cluster.join()
        finally:
            for name in ("coordinator", "processes", "process"):
                flags.FLAGS[name].value = None
        return tuple(asked)

    return run


@pytest.mark.parametrize(
    ("environment", "arguments", "expected"),
    [
        ({}, (), ()),
        (SLURM | {"SLURM_NTASKS": "1"}, (), ()),  # or each of several runs on a node would take the same port
        ({"SLURM_NTASKS": "24", "SLURM_JOB_ID": "4100"}, (), ()),  # a batch script without srun
        ({}, ("--coordinator=h:1", "--processes=4", "--process=3"), (("h:1", 4, 3), "deactivate", "detected")),
        (SLURM, (), ((None, None, None), None, "detected")),
        (SLURM, ("--coordinator=h:1",), (("h:1", None, None), None, "detected")),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x24)"}, (), ((None, None, None), None, "all")),
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, (), ((None, None, None), None, "all")),  # --gpus-per-task=1
        (OPEN_MPI | URI, (), ((None, None, None), None, "detected")),
        (OPEN_MPI, ("--coordinator=h:1",), (("h:1", 4, 2), "deactivate", "detected")),  # version 5
    ],
)
def test_launchers_and_flags_say_which_processes_to_join(join, environment, arguments, expected):
    assert join(environment, *arguments) == expected


@pytest.mark.parametrize(
    ("environment", "arguments", "message"),
    [
        ({}, ("--processes=2",), "give all three"),
        ({}, ("--coordinator=h:1", "--processes=2"), "give all three"),
        ({}, ("--coordinator=h:1", "--processes=2", "--process=2"), "from 0 to 1"),
        ({}, ("--coordinator=h", "--processes=2", "--process=1"), "must be host:port"),
        (OPEN_MPI, (), "give all three"),
    ],
)
def test_flags_that_do_not_suffice_are_user_errors(join, environment, arguments, message):
    with pytest.raises(ValueError, match=message):
        join(environment, *arguments)

"""Multi-process setup from flags, Slurm, Open MPI, or TPU and GKE metadata, through jax.distributed.

JAX's coordination service finds a process that was killed or hangs within HEARTBEAT seconds and ends the others: with code 1
where a collective fails first, else as a crash. Launchers then start the run again, which continues from its newest checkpoint.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from absl import flags

_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, to run several processes as one.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, where no launcher says so.")
_PROCESS = flags.DEFINE_integer("process", None, "The number of this process, from 0, where no launcher says so.")

HEARTBEAT = 30  # seconds
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")


def is_distributed() -> bool:
    """Whether this process is one of several. Does not import JAX: not all programs need it."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def join() -> None:
    """Join the other processes, if flags, a launcher or a TPU's metadata name any. Call it before any computation.

    Raises ValueError for flags that contradict each other or do not suffice, ConnectionError if processes do not meet.
    """
    import jax

    address, count, process = _COORDINATOR.value, _PROCESSES.value, _PROCESS.value
    slurm = "SLURM_STEP_NODELIST" in os.environ
    # Whether JAX's own detection knows the launcher.
    known = slurm or "OMPI_MCA_orte_hnp_uri" in os.environ or any(map(os.path.exists, _TPU_DEVICES))
    size = os.environ.get("SLURM_NTASKS" if slurm else "OMPI_COMM_WORLD_SIZE")
    if size is not None and not known:  # Open MPI 5
        count = int(size) if count is None else count
        process = int(os.environ["OMPI_COMM_WORLD_RANK"]) if process is None else process
    if address is None and (size == "1" or (not known and (count, process) == (None, None))):
        return
    if not known and None in (address, count, process):
        raise ValueError(
            f"--coordinator={address} --processes={count} --process={process}: where no launcher says so, give all three: "
            "HOST:PORT of process 0, the number of processes, and which one this is, from 0"
        )
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator={address} must be host:port, as in --coordinator=10.0.0.1:8476")
    if None not in (count, process) and not 0 <= process < count:
        raise ValueError(f"--process={process} must be from 0 to {count - 1}, as --processes={count}")
    explicit = None not in (address, count, process)
    try:
        jax.distributed.initialize(
            address, count, process, cluster_detection_method="deactivate" if explicit else None,
            heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except ValueError:
        if (address, count, process) != (None, None, None):
            raise
        return  # an accelerator that is no TPU of a cluster
    except RuntimeError as error:
        raise ConnectionError(f"process {process} cannot join the others at {address}: {error}") from error
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    alone = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""))
    if visible.isdecimal() or (alone.split("(")[0] == "1" and "," not in alone):
        # JAX gives processes of Slurm and Open MPI one GPU each, by their number on the host. This one has all that it sees.
        jax.config.update("jax_cuda_visible_devices", "all")


def end(code: int) -> NoReturn:
    """End this process without waiting for the others, as after an error."""
    sys.stdout.flush()
    sys.stderr.flush()
    # Process 0 holds the coordination service, without which the others abort: those that fail likewise have time to say so.
    if is_distributed() and sys.modules["jax"].process_index() == 0:
        time.sleep(3.0)
    os._exit(code)

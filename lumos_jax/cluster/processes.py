"""How several processes become one program: by flags, or by what Slurm, Open MPI, TPU VMs and GKE tell; what main and prepare
share."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

import jax
from absl import flags

# Which launcher this is, and where process 0 is to be found, is asked of JAX's own detection, which is not exported.
from jax._src.clusters import ClusterEnv

from lumos_jax import config
from lumos_jax.cluster import peers, relay

_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, to run several processes as one.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are, where no launcher tells.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0, where no launcher tells.")

FAILED = peers.FAILED


def join(settings: config.Train) -> None:
    """Joins the other processes, if flags or a launcher's environment say that there are any.

    Process 0 serves two ports: the coordinator's for JAX, and the one below it for lifelines (lumos_jax/cluster/peers.py).

    Raises:
      ValueError: too little is known to find the others, or they did not come in time.
    """
    given = [_COORDINATOR.value, _PROCESSES.value, _PROCESS.value]
    found = where(os.environ, *given)
    if found is None:
        return
    address, count, process, devices = found
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--coordinator={address} must be host:port, as in --coordinator=10.0.0.1:8476")
    meeting = settings.meeting_seconds
    try:
        peers.meet(f"{host}:{int(port) - 1}", count, process, meeting=meeting, silence=settings.silence_seconds)
    except peers.PeerError as error:
        raise ValueError(str(error)) from None
    jax.distributed.initialize(
        relay.start(host.strip("[]"), int(port)) if process else address,
        count,
        process,
        local_device_ids=devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(meeting),
        heartbeat_timeout_seconds=max(100, int(4 * settings.silence_seconds)),  # ours come first, and say more
    )


def where(
    environment: Mapping[str, str], address: str | None = None, count: int | None = None, process: int | None = None
) -> tuple[str, int, int, Sequence[int] | None] | None:
    """(address of process 0, number of processes, this one, its devices or None for all), or None for a process of its own.

    What is given stays; the rest is the launcher's.

    Raises:
      ValueError: neither flags nor a launcher tell all three.
    """
    if None not in (address, count, process):
        return address, count, process, None
    launched = _launched(environment)
    if launched is None and (address, count, process) == (None, None, None):
        return None
    devices = None
    if launched is not None:
        name, size, rank, one_a_node = launched
        if size == 1 and address is None:
            return None
        count, process = size if count is None else count, rank if process is None else process
        if address is None and name is not None:
            address, _, _, devices = ClusterEnv.auto_detect_unset_distributed_params(
                None, count, process, None, name, 300
            )
            devices = None if one_a_node else devices
    if None in (address, count, process):
        known = f"process {process} of {count}" if launched else "nothing else"
        raise ValueError(
            f"--coordinator, --processes and --process go together where no launcher tells them: known is {known}; give "
            "--coordinator=HOST:PORT of process 0, and how many and which where they are not known"
        )
    return address, count, process, devices


def _launched(environment: Mapping[str, str]) -> tuple[str | None, int, int, bool] | None:
    """(JAX's name of the launcher, or None where it cannot tell the address; processes; which; one process a node)."""
    if {"SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID"} <= environment.keys():
        each = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
        alone = each.split("(")[0] == "1" and "," not in each
        return "slurm", int(environment["SLURM_NTASKS"]), int(environment["SLURM_PROCID"]), alone
    if "OMPI_COMM_WORLD_SIZE" in environment:
        name = (
            "ompi" if "OMPI_MCA_orte_hnp_uri" in environment else None
        )  # Open MPI 5 does not say where it was launched
        alone = environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
        return name, int(environment["OMPI_COMM_WORLD_SIZE"]), int(environment["OMPI_COMM_WORLD_RANK"]), alone
    for name in ("gketpu", "gcetpu"):  # TPU VMs only: they ask for chips first
        cluster = next(c for c in ClusterEnv._cluster_types if c.name == name)
        if cluster.is_env_present():
            return name, cluster.get_process_count(), cluster.get_process_id(), True
    return None


def give_up(code: int, text: str) -> NoReturn:
    """Ends this process, and with `text` the others, after an error that was told."""
    if peers.several():
        peers.fail(text)
        end(code)
    sys.exit(code)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Whatever error ends this process ends the others as well, instead of leaving them to wait."""
    try:
        yield
    except Exception as error:
        if not peers.several():
            raise
        peers.await_verdict(error)
        traceback.print_exc()
        give_up(FAILED, f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")
    except KeyboardInterrupt:
        if not peers.several():
            raise
        give_up(FAILED, "interrupted")


def end(code: int) -> NoReturn:
    """Ends this process at once, as after an error: threads and JAX's shutdown may be waiting for others."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def answer_help(text: str) -> None:
    """Where the command line asks for --help: prints a program's text and its flags, and ends it with exit code 0, which absl's
    own --help does not."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        own = flags.FLAGS.module_help(sys.modules["__main__"]).strip()
        print(f"{text.strip()}\n\nflags (of jax.distributed: --coordinator, --processes, --process):\n{own}")
        sys.exit(0)

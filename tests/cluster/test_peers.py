"""Lifelines among processes, here Peers of one process that write down why they would end."""

import json
import os
import socket
import threading
import time

import jax
import pytest

from lumos_jax import patience
from lumos_jax.cluster import peers, processes
from tests.ports import free_port


def meet(count, **limits):
    """Peers of `count` processes, by number, and what each was ended with."""
    address, met, ends = f"localhost:{free_port()}", {}, {}

    def join(process):
        met[process] = peers.Peers(address, count, process, **{"meeting": 20.0, "silence": 20.0} | limits)
        met[process].end = lambda text: ends.setdefault(process, text)

    threads = [threading.Thread(target=join, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return met, ends


def close(met):
    for one in met.values():
        one._done = True
    for one in met.values():
        for line in one._lines:
            line.link.close()


def eventually(done, seconds=20):
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_all_learn_who_is_gone_and_a_barrier_holds_until_all_came():
    met, ends = meet(3)
    assert met[2].hosts == [socket.gethostname()] * 3
    for word, same in (("alike", True), ("another", False)):
        came = []

        def come(i, name, came=came):
            came.append((i, met[i].barrier(name, "alike")))

        waiting = [threading.Thread(target=come, args=(i, f"with {word}")) for i in (0, 1)]
        for thread in waiting:
            thread.start()
        time.sleep(0.2)
        assert came == []
        assert met[2].barrier(f"with {word}", word) == same
        for thread in waiting:
            thread.join()
        assert sorted(came) == [(0, same), (1, same)]
    assert not met[0]._at  # nothing is kept of barriers that are over
    met[2]._done = True
    met[2]._lines[0].link.shutdown(socket.SHUT_RDWR)  # what the kernel does for a process that is killed
    eventually(lambda: len(ends) == 2)
    for text in ends.values():
        assert text.startswith(f"process 2 ({socket.gethostname()}) is gone")
    close(met)


def test_a_failure_is_told_and_leaving_is_none():
    met, ends = meet(3)
    met[1].leave()
    met[1]._lines[0].link.shutdown(socket.SHUT_RDWR)
    met[2].fail("no space")
    eventually(lambda: 0 in ends)
    assert ends == {0: f"process 2 ({socket.gethostname()}) failed: no space"}
    close(met)


def test_silence_and_absence_are_named(monkeypatch):
    monkeypatch.setattr(peers, "_FROZEN", 1)
    port = free_port()
    met, ends = {}, {}
    first = threading.Thread(
        target=lambda: met.update({0: peers.Peers(f"localhost:{port}", 2, 0, meeting=1.0, silence=3.0)})
    )
    with socket.socket() as silent:  # it comes, and says nothing more
        first.start()
        eventually(lambda: not silent.connect_ex(("localhost", port)))
        silent.sendall(b'{"hello": 1, "host": "b", "count": 2}\n')
        first.join()
        met[0].end = lambda text: ends.setdefault(0, text)
        with pytest.raises(peers.PeerError, match=r"after 1 s at 'there', process 1 \(b\) has not come"):
            met[0].barrier("there")
        eventually(lambda: 0 in ends)
        assert ends[0] == "process 1 (b) is gone: no sign of life for 3 s"
        # The kernel then closes the line of a lost machine, as was tried between two network namespaces.
        assert met[0]._lines[0].link.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000
        close(met)
    with pytest.raises(peers.PeerError, match="process 1, 2 is missing, and process 0"):
        peers.Peers(f"localhost:{free_port()}", 3, 0, meeting=0.2, silence=3.0)
    with pytest.raises(peers.PeerError, match="cannot reach process 0"):
        peers.Peers(f"localhost:{free_port()}", 2, 1, meeting=0.3, silence=3.0)


def test_processes_that_count_differently_do_not_meet():
    address, errors = f"localhost:{free_port()}", []

    def join(count, process):
        try:
            peers.Peers(address, count, process, meeting=20.0, silence=3.0)
        except peers.PeerError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=join, args=given) for given in ((2, 0), (3, 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert all("process 1 counts 3 processes, process 0 2" in error for error in errors)


SLURM = {
    "SLURM_JOB_ID": "4100", "SLURM_STEP_NODELIST": "gpu[07-08],x1", "SLURM_NTASKS": "24", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x3)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "given", "expected"),
    [
        ({}, (), None),
        ({}, ("h:1", 4, 3), ("h:1", 4, 3, None)),
        (SLURM, (), ("gpu07:61444", 24, 9, [1])),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x24)", "SLURM_LOCALID": "0"}, (), ("gpu07:61444", 24, 9, None)),
        (SLURM | {"SLURM_NTASKS": "1"}, (), None),
        (OPEN_MPI, (), ("10.96.0.1:62624", 4, 2, None)),
        ({k: v for k, v in OPEN_MPI.items() if k != "OMPI_MCA_orte_hnp_uri"}, ("h:1",), ("h:1", 4, 2, None)),
    ],
)
def test_launchers_tell_where_processes_meet(monkeypatch, environment, given, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.where(environment, *given) == expected


@pytest.mark.parametrize("environment", [{}, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2"}])
def test_too_little_to_meet_by_is_an_error(environment):
    given = () if environment else (None, 2)
    with pytest.raises(ValueError, match="go together where no launcher tells"):
        processes.where(environment, *given)


def test_what_passes_is_tried_again_and_what_lasts_is_not(monkeypatch):
    waited = []
    monkeypatch.setattr(patience.time, "sleep", waited.append)
    errors = [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]

    def read():
        if errors:
            raise errors.pop()
        return 7

    assert patience.patiently(read) == 7
    assert waited == [1.0, 2.0]
    with pytest.raises(FileNotFoundError):
        patience.patiently(lambda: os.stat("/nowhere"))
    assert waited == [1.0, 2.0]
    assert not patience.may_pass(OSError(28, "No space left on device"))
    assert not patience.may_pass(ValueError(json.dumps({"error": "No space left on device"})))
    assert patience.may_pass(ValueError("connection reset"))
    assert patience.may_pass(jax.errors.JaxRuntimeError("gone"))

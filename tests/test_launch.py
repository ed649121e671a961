"""Launchers: a real Slurm of two nodes on this machine, and what the others would run, read by those who would read it."""

import getpass
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys
import time

import jsonschema
import numpy as np
import pytest
import yaml

from tests.running import free_port

ROOT = pathlib.Path(__file__).parent.parent
FIELDS = (
    "train.steps=4", "optimizer.decay=constant", "eval.every=0",
)  # fmt: skip


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def slurm(tmp_path):
    """The environment in which Slurm's commands speak to a cluster of the nodes n1 and n2, both here."""
    programs = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
    search = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"))
    found = {name: shutil.which(name, path=search) for name in programs}
    if None in found.values():
        pytest.skip("Slurm is not installed: apt-get install slurm-wlm munge")
    home = tmp_path / "slurm"
    for name in ("state", "spool.n1", "spool.n2"):
        (home / name).mkdir(parents=True)
    home.chmod(0o755)
    key = home / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    ports = [free_port() for _ in range(3)]
    conf = home / "slurm.conf"
    host, user = socket.gethostname(), getpass.getuser()
    conf.write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={home}/munge.socket
CredType=cred/munge
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool.%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd.%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
ReturnToService=2
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=main Nodes=n1,n2 Default=YES
"""
    )
    environment = os.environ | {"SLURM_CONF": str(conf)}
    munge = ("--foreground", "--force", f"--key-file={key}", f"--socket={home}/munge.socket", f"--pid-file={home}/munge.pid",
             f"--log-file={home}/munge.log", f"--seed-file={home}/munge.seed")  # fmt: skip
    commands = (("munged", *munge), ("slurmctld", "-D"), ("slurmd", "-D", "-N", "n1"), ("slurmd", "-D", "-N", "n2"))
    daemons = []
    try:
        for name, *arguments in commands:
            with open(home / f"{len(daemons)}.{name}.log", "w") as log:
                daemons.append(
                    subprocess.Popen([found[name], *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT)
                )
            until = time.monotonic() + 60
            while name == "munged" and not (home / "munge.socket").exists():
                assert time.monotonic() < until
                time.sleep(0.05)
        yield environment
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def test_two_tasks_of_slurm_train_as_one_process_does(slurm, process_environment, tmp_path):
    """The nodes have no addresses of their own here, hence --coordinator; how many and which they are, Slurm tells."""
    root = tmp_path / "repository"
    root.mkdir()
    for name in ("launch", "lumos_jax", "configs"):
        (root / name).symlink_to(ROOT / name)
    (root / ".venv").symlink_to(sys.prefix)
    fields = [f"--config.{field}" for field in FIELDS]
    job = ["sbatch", "--wait", "--nodes=2", f"--output={tmp_path}/job.log", "launch/slurm.sbatch",
           "--config=configs/i2i.py:test", f"--workdir={tmp_path}/two", f"--coordinator=localhost:{free_port()}",
           *fields]  # fmt: skip
    environment = process_environment(1)
    asked = subprocess.run(job, env=environment | {"SLURM_CONF": slurm["SLURM_CONF"]}, cwd=root, capture_output=True, text=True,
                           timeout=900, check=False)  # fmt: skip
    told = (tmp_path / "job.log").read_text()
    assert asked.returncode == 0, asked.stderr + told
    assert "0: devices     2 x cpu (data=2), 2 process(es)" in told
    assert "1: devices" not in told
    one = [sys.executable, "-m", "lumos_jax.main", "--config=configs/i2i.py:test", f"--workdir={tmp_path}/one", *fields]
    subprocess.run(one, env=environment, cwd=ROOT, capture_output=True, check=True, timeout=900)
    assert len(losses(tmp_path / "two")) == 2
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5)


def render(*arguments, code=0):
    command = [sys.executable, str(ROOT / "launch" / "gke" / "render.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_jobsets_hold_to_their_schema(goldens):
    schema = json.loads((goldens / "jobset_schema.json").read_text())
    training = ("--", "--config=configs/i2i.py", "--workdir=/runs/xl")
    tpu = yaml.safe_load(render("--image=I", "--tpu=v5e:16x16", "--slices=2", "--claim=runs", *training))
    gpu = yaml.safe_load(render("--image=I", "--gpu=h100:8", "--nodes=4", "--name=big", *training))
    for made in (tpu, gpu):
        jsonschema.validate(made, schema)
    (slices,), (hosts,) = tpu["spec"]["replicatedJobs"], gpu["spec"]["replicatedJobs"]
    assert (slices["replicas"], slices["template"]["spec"]["parallelism"]) == (2, 64)
    pod = slices["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert (hosts["replicas"], hosts["template"]["spec"]["completions"]) == (1, 4)
    arguments = hosts["template"]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert arguments[2:] == [
        "--coordinator=big-host-0-0.big:8476", "--processes=4", "--process=$(JOB_COMPLETION_INDEX)"
    ]  # fmt: skip


def test_xpk_is_told_the_same_and_mistakes_are_told():
    command = shlex.split(render("--image=I", "--tpu=v5p:4x4x8", "--xpk=C", "--", "--config=a b"))
    assert command[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5p-256", "--num-slices=1", "--cluster=C"} <= set(command)
    assert command[-1] == "--command=python -m lumos_jax.main '--config=a b'"
    assert "a kind among v4, v5e" in render("--image=I", "--tpu=v9:2x2", "--", "--config=c", code=2)
    assert "what to train" in render("--image=I", "--tpu=v4:2x2x2", code=2)


@pytest.fixture
def bsd_tools(tmp_path):
    """PATH on which tools refuse GNU's long options, as those of macOS do."""
    for name in ("mktemp", "sed", "tar", "grep", "date"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(f'#!/bin/sh\ncase " $*" in *" --"*) exit 64;; esac\nexec {shutil.which(name)} "$@"\n')
        tool.chmod(0o755)
    return os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(tmp_path)}


def test_tpu_vms_get_the_repository_and_the_command(bsd_tools, tmp_path):
    script = [str(ROOT / "launch" / "tpu_vm.sh"), "--name=lumos", "--zone=z", "--type=v6e-16", "--dry-run", "--"]
    field = "--config.finetune.trainable=('final/*',)"
    before = sorted(tmp_path.iterdir())
    done = subprocess.run([*script, "--config=c", field], capture_output=True, text=True, check=True, env=bsd_tools)
    assert sorted(tmp_path.iterdir()) == before  # temporary files are gone
    create, copy, unpack, train = map(shlex.split, done.stdout.splitlines())
    assert create[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "lumos"]
    assert {"--accelerator-type=v6e-16", "--version=v2-alpha-tpuv6e", "--zone=z"} <= set(create)
    for command in (copy, unpack, train):
        assert "--worker=all" in command
    assert shlex.split(train[-1].removeprefix("--command=")) == [
        "cd", "lumos_jax", "&&", "launch/local.sh", "--config=c", field
    ]  # fmt: skip
    done = subprocess.run([*script[:2], "--dry-run"], capture_output=True, text=True, check=False, env=bsd_tools)
    assert done.returncode == 2
    assert "all workers of a Cloud TPU VM" in done.stderr


@pytest.mark.parametrize(
    "construct", ["mapfile", "readarray", "declare -A", ",,}", "^^}", "&>>", "|&", "wait -n", "${@:0"]
)
def test_the_script_for_tpu_vms_is_one_of_bash_3_2(construct):
    assert construct not in (ROOT / "launch" / "tpu_vm.sh").read_text()

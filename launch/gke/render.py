"""Renders the manifest of a run on Google Kubernetes Engine, or the XPK command that does the same.

    python launch/gke/render.py --image=IMAGE --tpu=v5e:16x16 [--slices=2] -- --config=configs/i2i.py --workdir=/runs/xl |
        kubectl apply -f -
    python launch/gke/render.py --image=IMAGE --gpu=h100:8 --nodes=4 -- ...
    python launch/gke/render.py --image=IMAGE --tpu=v5e:16x16 --xpk=CLUSTER -- ...

A JobSet (https://jobset.sigs.k8s.io) has one job a slice and one pod a host. TPU pods find each other by what GKE tells them,
GPU pods by the JobSet's host names. A pod that fails ends the others (lumos_jax/cluster) and the JobSet starts all again,
which continue from the newest checkpoint; exit code 2, a mistake on the command line, fails it at once.
The run's directory must be on a volume that all pods share: --claim names a PersistentVolumeClaim, mounted at --mount.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from typing import Any

import yaml

# Chips a host, the value of the node label gke-tpu-accelerator, and XPK's prefix of the type with what it counts a chip.
TPUS = {
    "v4": (4, "tpu-v4-podslice", "v4", 2),
    "v5e": (4, "tpu-v5-lite-podslice", "v5litepod", 1),
    "v5p": (4, "tpu-v5p-slice", "v5p", 2),
    "v6e": (4, "tpu-v6e-slice", "v6e", 1),
}
GPUS = {"h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "a100": "nvidia-tesla-a100", "b200": "nvidia-b200"}
PORT = 8476  # of the coordinator


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises SystemExit with code 2 on a mistake, as argparse does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="lumos")
    parser.add_argument("--image", required=True, help="made from launch/Dockerfile")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--tpu", help="kind:topology, as v5e:16x16")
    what.add_argument("--gpu", help="kind:number a node, as h100:8")
    parser.add_argument("--slices", type=int, default=1, help="TPU slices")
    parser.add_argument("--nodes", type=int, default=1, help="GPU nodes")
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--claim", help="PersistentVolumeClaim of the run's directory")
    parser.add_argument("--mount", default="/runs", help="where it is mounted")
    parser.add_argument("--xpk", metavar="CLUSTER", help="print the XPK command for this cluster instead")
    own, training = (arguments, []) if "--" not in arguments else _split(arguments)
    given = parser.parse_args(own)
    given.training = training
    kind, _, size = (given.tpu or given.gpu).partition(":")
    known = TPUS if given.tpu else GPUS
    if kind not in known or not size or not all(part.isdecimal() for part in size.split("x")):
        parser.error(f"{given.tpu or given.gpu} is not kind:size with a kind among {', '.join(known)}")
    given.kind, given.size = kind, size
    if not training:
        parser.error("say behind -- what to train: --config=... --workdir=...")
    return given


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def hosts(given: argparse.Namespace) -> int:
    """Pods of one job: the hosts of a slice, or the GPU nodes."""
    if given.gpu:
        return given.nodes
    chips = math.prod(int(part) for part in given.size.split("x"))
    return max(chips // TPUS[given.kind][0], 1)


def manifest(given: argparse.Namespace) -> dict[str, Any]:
    """The JobSet as Kubernetes reads it."""
    pods, jobs = hosts(given), given.slices if given.tpu else 1
    arguments = list(given.training)
    if given.gpu:
        resources = {"nvidia.com/gpu": int(given.size)}
        selector = {"cloud.google.com/gke-accelerator": GPUS[given.kind]}
        if pods > 1:
            coordinator = f"{given.name}-host-0-0.{given.name}:{PORT}"
            arguments += [f"--coordinator={coordinator}", f"--processes={pods}", "--process=$(JOB_COMPLETION_INDEX)"]
    else:
        each, label, _, _ = TPUS[given.kind]
        chips = math.prod(int(part) for part in given.size.split("x"))
        resources = {"google.com/tpu": min(each, chips)}
        selector = {"cloud.google.com/gke-tpu-accelerator": label, "cloud.google.com/gke-tpu-topology": given.size}
    container: dict[str, Any] = {
        "name": "train",
        "image": given.image,
        "args": arguments,
        "ports": [{"containerPort": port} for port in (8471, 8080, 8482, PORT)],
        "resources": {"limits": resources},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 180,  # to save before a node is taken
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],  # batches come from workers through it
    }
    if given.claim:
        pod["volumes"].append({"name": "runs", "persistentVolumeClaim": {"claimName": given.claim}})
        container["volumeMounts"].append({"name": "runs", "mountPath": given.mount})
    mistake = {"action": "FailJob", "onExitCodes": {"containerName": "train", "operator": "In", "values": [2]}}
    job = {
        "parallelism": pods,
        "completions": pods,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [mistake]},
        "template": {"spec": pod},
    }
    mistaken = {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": given.name,
            # One slice is one node pool: its pods stay together.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": given.restarts, "rules": [mistaken]},
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "replicatedJobs": [{"name": "slice" if given.tpu else "host", "replicas": jobs, "template": {"spec": job}}],
        },
    }


def xpk(given: argparse.Namespace) -> list[str]:
    """The command of XPK (https://github.com/AI-Hypercomputer/xpk) that starts the same run."""
    if given.gpu:
        kind = [f"--device-type={given.kind}-80gb-{given.size}", f"--num-nodes={given.nodes}"]
    else:
        _, _, prefix, cores = TPUS[given.kind]
        chips = math.prod(int(part) for part in given.size.split("x"))
        kind = [f"--tpu-type={prefix}-{chips * cores}", f"--num-slices={given.slices}"]
    command = shlex.join(["python", "-m", "lumos_jax.main", *given.training])
    return ["xpk", "workload", "create", f"--cluster={given.xpk}", f"--workload={given.name}", *kind,
            f"--docker-image={given.image}", f"--max-restarts={given.restarts}", f"--command={command}"]  # fmt: skip


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    print(shlex.join(xpk(given)) if given.xpk else yaml.safe_dump(manifest(given), sort_keys=False), end="\n")


if __name__ == "__main__":
    main(sys.argv[1:])

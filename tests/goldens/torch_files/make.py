"""Makes the PyTorch files beside it, and expected.npz with what PyTorch itself reads from them.

PyTorch is no dependency; it was run once, in an environment of its own:
`python3 -m venv V && V/bin/pip install torch==2.13.0 numpy && V/bin/python tests/goldens/torch_files/make.py`
"""

import argparse
import collections
import pathlib

import numpy as np
import torch

HERE = pathlib.Path(__file__).parent
WIDTH, DEPTH, PATCH, SIDE = 4, 2, 4, 2  # one head


def every_kind() -> dict:
    """A tensor of each dtype, and views that only strides and offsets tell apart."""
    torch.manual_seed(0)
    base = torch.arange(24.0).reshape(4, 6)
    state = collections.OrderedDict(
        float32=torch.randn(3, 2),
        float64=torch.randn(3, dtype=torch.float64),
        float16=torch.randn(5).half(),
        bfloat16=torch.randn(2, 3).bfloat16(),
        int64=torch.tensor([-1, 2**40]),
        int32=torch.tensor([[-7, 8]], dtype=torch.int32),
        int16=torch.tensor([-300, 300], dtype=torch.int16),
        int8=torch.tensor([-5, 5], dtype=torch.int8),
        uint8=torch.tensor([0, 255], dtype=torch.uint8),
        bool=torch.tensor([True, False, True]),
        scalar=torch.tensor(2.5),
        empty=torch.empty(0, 3),
        parameter=torch.nn.Parameter(torch.randn(2, 2)),
        base=base,
        transposed=base.t(),
        row=base[2],
        stepped=base[1:, ::2],
        column=base[:, 5:6],
        expanded=torch.tensor([1.5, -2.0]).expand(3, 2),
    )
    state._metadata = collections.OrderedDict({"": {"version": 1}})
    return state


def vit(prefix: str) -> dict:
    """Random weights under official DINO names."""
    shapes = {"cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + SIDE**2, WIDTH)}
    shapes |= {"patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), "patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
        for name, (out, inner) in linears.items():
            shapes[f"blocks.{i}.{name}.weight"] = (out * WIDTH, inner * WIDTH)
            shapes[f"blocks.{i}.{name}.bias"] = (out * WIDTH,)
        shapes |= {f"blocks.{i}.{n}.{leaf}": (WIDTH,) for n in ("norm1", "norm2") for leaf in ("weight", "bias")}
    shapes |= {f"norm.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    return {prefix + name: torch.randn(shape) for name, shape in shapes.items()}


def head(prefix: str) -> dict:
    shapes = {f"mlp.{i}.{leaf}": (2, 2) if leaf == "weight" else (2,) for i in (0, 2, 4) for leaf in ("weight", "bias")}
    shapes |= {"last_layer.weight_g": (3, 1), "last_layer.weight_v": (3, 2)}
    return {f"{prefix}head.{name}": torch.randn(shape) for name, shape in shapes.items()}


def training_checkpoint() -> dict:
    """As DINO's main_dino.py lays it out."""
    torch.manual_seed(1)
    student = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    student(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(arch="vit_small", lr=5e-4, crops=[0.4, 1.0], seed=np.float64(2.5), out=None)
    return {
        "student": vit("module.backbone.") | head("module."),
        "teacher": vit("backbone.") | head(""),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": args,
        "fp16_scaler": {"scale": 65536.0, "loss": np.float32(1.25)},
        "dino_loss": {"center": torch.zeros(1, 3)},
    }


def main():
    state, checkpoint = every_kind(), training_checkpoint()
    torch.save(state, HERE / "zip.pth")
    torch.save(state, HERE / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(checkpoint, HERE / "dino_training.pth")
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), HERE / "torchscript.pt")
    expected = {f"kind/{name}": value.detach().float().numpy() for name, value in state.items() if name == "bfloat16"}
    expected |= {f"kind/{name}": value.detach().numpy() for name, value in state.items() if name != "bfloat16"}
    expected["teacher"] = np.concatenate([value.numpy().ravel() for value in checkpoint["teacher"].values()])
    np.savez_compressed(HERE / "expected.npz", **expected)


if __name__ == "__main__":
    main()

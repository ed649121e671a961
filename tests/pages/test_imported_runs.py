"""A run behind the page, without the page: one that `convert import` made of a file in the official layout."""

import numpy as np
from PIL import Image

from lumos_jax import convert, pages
from lumos_jax.weights import torch_files


def test_an_imported_release(goldens, tmp_path):
    with np.load(goldens / "lumos_i2i.npz") as file:
        state = {name.removeprefix("param/"): file[name] for name in file.files if name.startswith("param/")}
    for name in ("y_embedder.y_embedding", "y_embedder.y_proj.fc1.weight"):  # for an encoder of 32 features
        state[name] = np.pad(state[name], ((0, 0), (0, 32 - state[name].shape[1])))
    torch_files.save(tmp_path / "Lumos_I2I.pth", {"state_dict": state})
    arguments = ["import", "--kind=lumos-i2i", f"--source={tmp_path / 'Lumos_I2I.pth'}", "--heads=4"]
    networks = [f"--encoder={goldens / 'hf_vit_dino'}", f"--autoencoder={goldens / 'diffusers_autoencoder_kl'}"]
    assert convert.main([*arguments, *networks, f"--out={tmp_path / 'run'}"]) == 0
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    run = pages.Run(str(tmp_path / "run"))
    run.load(lambda: (["--images", str(tmp_path / "a.png"), "--num=1", "--steps=2"], ".png"))
    assert run.status.startswith("done in")
    assert run.first[1].sampled.samples.shape == (1, 1, 64, 64, 3)

    assert convert.main([*arguments, "--encoder=/gone.pth", f"--out={tmp_path / 'lacking'}"]) == 0
    run = pages.Run(str(tmp_path / "lacking"))
    run.load(lambda: ([], ".png"))
    assert "config.encoder.weights='/gone.pth': no such file" in run.status
    assert f"change that path in {tmp_path / 'lacking' / 'config.json'}" in run.status

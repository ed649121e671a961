"""Features of DINOv2 and CLIP, the CLIP score and DreamSim, on small files of the official layouts."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file
from tokenizers import models, pre_tokenizers, processors

from lumos_jax.encoders import frozen
from lumos_jax.encoders.image_encoder import CLIP_STATISTICS, IMAGENET_STATISTICS
from lumos_jax.evaluation import features
from lumos_jax.weights import torch_files

ONE = jax.devices()[:1]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 60, 48, 3), np.uint8)


def prepared(images, box, size, statistics):
    """Cropped to `box` (left, top, right, bottom), resized by Pillow to `size` (width, height), normalized."""
    mean, deviation = statistics
    made = [Image.fromarray(image).crop(box).resize(size, Image.Resampling.BICUBIC) for image in images]
    return ((np.stack(made) / 255 - mean) / deviation).astype(np.float32)


def test_dinov2_is_cls_of_squashed_images(goldens):
    network = features.open_network("dinov2", str(goldens / "hf_dinov2"), rows=2, devices=ONE)
    vit, params, _ = frozen.load("image-encoder", str(goldens / "hf_dinov2"))
    x = prepared(IMAGES, (0, 0, 48, 60), (224, 224), IMAGENET_STATISTICS)
    np.testing.assert_allclose(network(IMAGES), vit.apply(params, x)[:, 0], atol=0.02)  # Pillow rounds
    with pytest.raises(ValueError, match="is no DINOv2"):
        features.open_network("dinov2", str(goldens / "hf_vit_dino"))


def test_clip_is_the_unit_projection_of_the_center_square(goldens):
    network = features.open_network("clip", str(goldens / "hf_clip_vision"), rows=2, devices=ONE)
    vit, params, _ = frozen.load("image-encoder", str(goldens / "hf_clip_vision"))
    x = prepared(IMAGES, (0, 6, 48, 54), (32, 32), CLIP_STATISTICS)
    expected = np.array(vit.project(params, vit.apply(params, x)))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(network(IMAGES), expected, atol=2e-3)
    with pytest.raises(ValueError, match="is no CLIP"):
        features.open_network("clip", str(goldens / "hf_dinov2"))


def small_clip(goldens, folder):
    """Both golden towers in one directory, with a tokenizer of words."""
    told = {name: json.loads((goldens / f"hf_clip_{name}/config.json").read_text()) for name in ("vision", "text")}
    config = {"model_type": "clip", "projection_dim": 20, **{f"{name}_config": part for name, part in told.items()}}
    (folder / "config.json").write_text(json.dumps(config))
    towers = [load_file(goldens / f"hf_clip_{name}/model.safetensors") for name in ("vision", "text")]
    save_file(towers[0] | towers[1], folder / "model.safetensors")
    words = ["A", "photo", "depicts", "one", "two", "three", "four", "five", "six"]
    vocabulary = {"[UNK]": 0, "[PAD]": 1, **{word: 2 + i for i, word in enumerate(words)}, "[BOS]": 49, "[EOS]": 63}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 49), ("[EOS]", 63)]
    )
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return str(folder)


def test_clip_score_has_the_prefix_and_keeps_the_end_of_long_captions(goldens, tmp_path):
    score = features.clip_score(small_clip(goldens, tmp_path), rows=2)
    made = score(IMAGES, ["one two", "one two three four five six"])
    vit, image_params, _ = frozen.load("image-encoder", str(goldens / "hf_clip_vision"))
    text, text_params, _ = frozen.load("clip-text", str(goldens / "hf_clip_text"))
    ids = np.array([[49, 2, 3, 4, 5, 6, 63, 1], [49, 2, 3, 4, 5, 6, 7, 63]], np.int32)  # 8 positions
    captions = text.pool(text_params, ids, text.apply(text_params, ids, ids != 1))
    x = prepared(IMAGES, (0, 0, 48, 60), (32, 40), CLIP_STATISTICS)[:, 4:36]  # shorter side to 32, then the center
    images = vit.project(image_params, vit.apply(image_params, x))
    unit = [np.asarray(v) / np.linalg.norm(v, axis=1, keepdims=True) for v in (images, captions)]
    np.testing.assert_allclose(made, 100 * (unit[0] * unit[1]).sum(1), atol=0.2)
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        score(IMAGES, ["one"])
    shutil.copy(goldens / "hf_clip_vision/config.json", tmp_path)
    with pytest.raises(ValueError, match="openai/clip-vit-base-patch32"):
        features.clip_score(str(tmp_path))


WIDTH, DEPTH, RANK, OUTER = 64, 2, 4, 24


def dream_sim_state(seed, clip):
    """A ViT-B/16 shrunk to one head of 64 and two blocks, under the names of DreamSim's files."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return rng.standard_normal(shape, np.float32) * np.float32(0.3 * shape[-1] ** -0.5)

    norms = ["norm", *(f"blocks.{i}.norm{j}" for i in range(DEPTH) for j in (1, 2)), *(["pos_drop"] if clip else [])]
    state = {f"{name}.weight": 1 + array(WIDTH) for name in norms} | {f"{name}.bias": array(WIDTH) for name in norms}
    linears = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    for i in range(DEPTH):
        for name, (out, inner) in linears.items():
            state[f"blocks.{i}.{name}.weight"] = 6 * array(out * WIDTH, inner * WIDTH)
            state[f"blocks.{i}.{name}.bias"] = array(out * WIDTH)
    state |= {"cls_token": array(1, 1, WIDTH), "pos_embed": 9 * array(1, 197, WIDTH)}
    state |= {"patch_embed.proj.weight": 9 * array(WIDTH, 3, 16, 16), "patch_embed.proj.bias": 9 * array(WIDTH)}
    return state | ({"proj": array(WIDTH, OUTER)} if clip else {})


def norm(state, name, x, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def dream_sim_features(state, x, activation):
    """What DreamSim takes of a backbone, for normalized images (B, 224, 224, 3), in float64."""
    s = {name: value.astype(np.float64) for name, value in state.items()}
    clip, eps = "proj" in s, 1e-5 if "proj" in s else 1e-6
    patches = x.reshape(len(x), 14, 16, 14, 16, 3).transpose(0, 1, 3, 5, 2, 4).reshape(len(x), 196, 768)
    x = patches @ s["patch_embed.proj.weight"].reshape(WIDTH, 768).T + s["patch_embed.proj.bias"]
    x = np.concatenate([np.tile(s["cls_token"], (len(x), 1, 1)), x], 1) + s["pos_embed"]
    x = norm(s, "pos_drop", x, eps) if clip else x
    for i in range(DEPTH):
        dense = lambda x, name, b=f"blocks.{i}.": x @ s[f"{b}{name}.weight"].T + s[f"{b}{name}.bias"]  # noqa: E731
        q, k, v = np.split(dense(norm(s, f"blocks.{i}.norm1", x, eps), "attn.qkv"), 3, -1)
        attention = np.exp(q @ k.transpose(0, 2, 1) * WIDTH**-0.5)
        x = x + dense(attention / attention.sum(-1, keepdims=True) @ v, "attn.proj")
        x = x + dense(activation(dense(norm(s, f"blocks.{i}.norm2", x, eps), "mlp.fc1")), "mlp.fc2")
    return norm(s, "norm", x[:, 0], eps) @ s["proj"] if clip else x[:, 0]


def quick_gelu(x):
    return x / (1 + np.exp(-1.702 * x))


def gelu(x):
    return np.asarray(jax.nn.gelu(x.astype(np.float32), approximate=False), np.float64)


def test_dreamsim_with_its_adapters_and_pic(tmp_path):
    states = [dream_sim_state(seed, clip=seed > 0) for seed in range(3)]
    names = ("dino_vitb16_pretrain.pth", "clip_vitb16_pretrain.pth.tar", "open_clip_vitb16_pretrain.pth.tar")
    for name, state in zip(names, states, strict=True):
        torch_files.save(tmp_path / name, {"state_dict": state} if "proj" in state else state)
    adapters, rng = {}, np.random.default_rng(9)
    for backbone, state in enumerate(states):
        for i in range(DEPTH):
            a, b = rng.standard_normal((RANK, WIDTH), np.float32), rng.standard_normal((3 * WIDTH, RANK), np.float32)
            prefix = f"base_model.model.extractor_list.{backbone}.model.blocks.{i}.attn.qkv"
            adapters |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
            state[f"blocks.{i}.attn.qkv.weight"] += 0.5 / RANK * b @ a
    for folder, kept in (("ensemble_lora", ""), ("dino_vitb16_single_lora", "extractor_list.0.")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 0.5}))
        save_file({k: v for k, v in adapters.items() if kept in k}, tmp_path / folder / "adapter_model.safetensors")

    x = [
        prepared(IMAGES, (0, 0, 48, 60), (224, 224), s) for s in (IMAGENET_STATISTICS, CLIP_STATISTICS, CLIP_STATISTICS)
    ]
    parts = [dream_sim_features(*each) for each in zip(states, x, (gelu, quick_gelu, gelu), strict=True)]
    for protocol, expected in (("ensemble", np.concatenate(parts, 1)), ("dino_vitb16", parts[0])):
        network = features.open_network("dreamsim", str(tmp_path), protocol, rows=2, devices=ONE)
        expected = expected - expected.mean(1, keepdims=True)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(network(IMAGES), expected, atol=1e-4)
    score = features.pic(str(tmp_path), "dino_vitb16", rows=1)
    cosine = (expected[0] * expected[1]).sum()
    np.testing.assert_allclose(score(IMAGES[None]), [(1 + cosine) / 2], atol=1e-4)

    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=r"lacks clip_vitb16_pretrain\.pth\.tar; network dreamsim takes"):
        features.open_network("dreamsim", str(tmp_path))

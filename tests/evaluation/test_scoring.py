"""evaluate statistics, score and report on rendered scenes: values, files, and what is refused or warned of by name."""

import dataclasses
import importlib.util
import json
import resource

import numpy as np
import pytest
from PIL import Image

import lumos_jax.evaluate
from lumos_jax.evaluation import frechet, references, scoring
from lumos_jax.evaluation.lists import ItemList, make_list, read_list
from lumos_jax.evaluation.reconstruction import psnr
from lumos_jax.evaluation.shards import Samples, open_job
from lumos_jax.scenes.render import render
from lumos_jax.scenes.scene import make_scene

COUNT = 60
METRICS = "fd_scene_vit,kid_scene_vit,precision_scene_vit,recall_scene_vit,psnr,ssim,caption_all"


def evaluate(*arguments):
    assert lumos_jax.evaluate.main([str(argument) for argument in arguments]) == 0


def write(directory, items, pixels, truth, **protocol):
    writer = open_job(directory, items, {"seed": 0, "paired": True, "shard_size": 25, **protocol})
    for shard in range(len(writer)):
        rows = list(writer.numbers(shard))
        writer.write(shard, pixels[rows], truth[rows])
    return directory


@pytest.fixture(scope="module")
def scenes():
    """(list, true images)."""
    items = make_list("scenes", num=COUNT)
    return items, np.stack([render(make_scene(item.condition["scene"]), 32) for item in items.items])


def noisy(images, sigma):
    noise = np.random.default_rng(sigma).normal(0, sigma, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def made(scenes, tmp_path_factory):
    """A directory with samples `clean`, `good` and `bad` of one list and the statistics of the true images."""
    root = tmp_path_factory.mktemp("samples")
    items, truth = scenes
    for step, (name, sigma) in enumerate({"clean": 0, "good": 8, "bad": 40}.items()):
        write(root / name, items, noisy(truth, sigma), truth, step=1000 - 100 * step)
    evaluate("statistics", "--source=truth", f"--path={root}/good", "--network=scene_vit", f"--out={root}/true.npz")
    for name in ("good", "bad"):
        evaluate("score", f"--samples={root}/{name}", f"--reference={root}/true.npz", f"--metrics={METRICS}")
    return root


def test_scores_and_their_files(made, scenes):
    good, bad = (json.loads((made / name / "scores.json").read_text()) for name in ("good", "bad"))
    assert set(good["scores"]) == {
        "fd_scene_vit60", "kid_scene_vit60", "precision_scene_vit60", "recall_scene_vit60", "psnr", "ssim", "caption_all",
    }  # fmt: skip
    for name, entry in good["scores"].items():
        better, worse = sorted([entry["value"], bad["scores"][name]["value"]], reverse=entry["better"] == "higher")
        assert entry["value"] == better, name
        assert better != worse or name.startswith("recall")
        assert entry["low"] <= entry["high"]
        assert entry["num"] == COUNT
    assert good["scores"]["psnr"]["value"] == pytest.approx(psnr(noisy(scenes[1], 8), scenes[1]).mean())
    assert good["samples"]["list_digest"] == scenes[0].digest
    used = good["scores"]["fd_scene_vit60"]
    assert used["network"]["sha256"] == str(np.load(made / "true.npz")["network_sha256"])
    assert used["reference"]["num"] == COUNT
    warnings = " ".join(good["warnings"])
    assert "60 samples are too few for" in warnings
    assert "of these very samples" in warnings


def test_a_set_against_its_own_statistics(made):
    scores = scoring.score_samples(
        Samples(made / "clean"), ["fd_scene_vit", "precision_scene_vit"], [made / "true.npz"]
    )
    assert abs(scores.estimates["fd_scene_vit60"].value) < 1e-3
    assert scores.estimates["precision_scene_vit60"].value == 1


def test_scores_of_the_same_samples_are_added(made, tmp_path, capsys):
    for names in ("psnr,caption_count", "ssim"):
        evaluate("score", f"--samples={made}/good", f"--metrics={names}", f"--out={tmp_path}")
    assert "ssim" in capsys.readouterr().out
    assert lumos_jax.evaluate.main(["score", f"--samples={made}/good", "--metrics=beauty"]) == 2
    assert "error: metric 'beauty' is unknown: choose of fid, " in capsys.readouterr().err
    content, estimates = scoring.load(tmp_path)
    assert set(content["scores"]) == set(estimates) == {"psnr", "caption_count", "ssim"}
    evaluate("score", f"--samples={made}/bad", "--metrics=ssim", f"--out={tmp_path}")
    assert set(scoring.load(tmp_path)[0]["scores"]) == {"ssim"}


def test_report(made, tmp_path, capsys):
    evaluate("report", made / "good", made / "bad", f"--out={tmp_path}/report.md")
    text = (tmp_path / "report.md").read_text()
    assert capsys.readouterr().out == text
    (entry,) = json.loads((tmp_path / "report.json").read_text())["differences"]
    assert entry["scores"]["psnr"]["high"] < 0 < entry["scores"]["fd_scene_vit60"]["low"]
    assert "differs" in text
    if importlib.util.find_spec("matplotlib") is None:
        assert "No pictures: curves over steps need Matplotlib: pip install '.[plots]'" in text
    else:
        assert (tmp_path / "report_psnr.png").stat().st_size > 1000


def test_runs_of_other_seeds_are_not_paired(made, scenes, tmp_path, capsys):
    items, truth = scenes
    write(tmp_path / "other", items, noisy(truth, 9), truth, seed=1)
    evaluate("score", f"--samples={tmp_path}/other", "--metrics=psnr")
    evaluate("report", made / "good", tmp_path / "other", f"--out={tmp_path}/report.md")
    assert "No paired differences: the two differ in seed." in capsys.readouterr().out


def test_statistics_of_records(made, tmp_path, capsys):
    paths = [tmp_path / f"{name}.npz" for name in ("scenes", "folder")]
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        Image.fromarray(render(make_scene(index), 32)).save(folder / f"{index:02d}.png")
    flags = ("--network=scene_vit", "--image-size=32")
    evaluate("statistics", "--source=scenes", "--num=12", *flags, f"--out={paths[0]}")
    (folder / "99.png").write_bytes((folder / "00.png").read_bytes()[:50])
    evaluate("statistics", "--source=folder", f"--path={folder}", *flags, f"--out={paths[1]}")
    assert "1 records cannot be decoded" in capsys.readouterr().err
    first, second = (references.read(path, "scene_vit") for path in paths)
    np.testing.assert_allclose(first.mean, second.mean, rtol=1e-6, atol=1e-6)
    assert (first.num, first.images["codec"]) == (12, "none")
    assert (second.num, second.images["codec"]) == (12, "png")
    moments = frechet.Moments.of(first.features)
    np.testing.assert_allclose(moments.covariance, first.covariance, atol=1e-9)


def altered(made, path, **fields):
    """The statistics with some of their file's entries changed."""
    with np.load(made / "true.npz") as file:
        np.savez(path, **{name: file[name] for name in file.files} | {k: np.asarray(v) for k, v in fields.items()})
    return path


def test_other_statistics_are_refused_by_field(made, tmp_path):
    reference = references.read(made / "true.npz", "scene_vit")
    crop = json.dumps({**reference.protocol, "crop": "random"})
    size = json.dumps({**reference.images, "image_size": [64, 64]})
    for field, change in {
        "network_sha256": {"network_sha256": "00"}, "crop": {"protocol": crop}, "image_size": {"source": size},
        "one reference for the network scene_vit": {"network": "vgg16"},
    }.items():  # fmt: skip
        path = altered(made, tmp_path / "other.npz", **change)
        with pytest.raises(ValueError, match=field):
            scoring.score_samples(Samples(made / "clean"), ["fd_scene_vit"], [path])


def test_permuted_lists_are_refused(made, scenes, tmp_path):
    items, truth = scenes
    write(tmp_path / "samples", items, truth, truth)
    ItemList(items.name, items.items[::-1]).save(tmp_path / "samples" / "list.jsonl")
    with pytest.raises(ValueError, match="not the list that these samples were made of"):
        scoring.open_samples(tmp_path / "samples")


def test_what_metrics_need(made, scenes, tmp_path):
    items, truth = scenes
    few = ItemList("few", items.items[:30])
    write(tmp_path / "few", few, truth[:30], truth[:30], paired=False)
    samples = Samples(tmp_path / "few")
    for name, message in {
        "fd_scene_vit": "30 samples are too few", "psnr": "which these samples do not have",
        "fvd": "fvd needs one reference for the network i3d", "scenes": "GenEval's metadata",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            scoring.score_samples(samples, [name], [made / "true.npz"])
    nameless = ItemList("bare", tuple(dataclasses.replace(item, condition={"label": 1}) for item in few.items))
    write(tmp_path / "bare", nameless, truth[:30], truth[:30])
    with pytest.raises(ValueError, match="caption_all needs items with a scene"):
        scoring.score_samples(Samples(tmp_path / "bare"), ["caption_all"])


def test_equal_samples_are_warned_of(made, scenes, tmp_path):
    items, truth = scenes
    pixels = truth.copy()
    pixels[7] = pixels[3]
    write(tmp_path / "twice", items, pixels, truth)
    scores = scoring.score_samples(Samples(tmp_path / "twice"), ["psnr"])
    assert scores.warnings == ["1 samples are equal to another one, pixel for pixel"]


@pytest.mark.parametrize(
    "read",
    [
        lambda root: read_list(root / "good" / "list.jsonl"),
        lambda root: Samples(root / "good"),
        lambda root: references.read(root / "true.npz", "scene_vit"),
        lambda root: scoring.load(root / "good"),
    ],
    ids=["list", "shards", "reference", "scores"],
)
def test_a_machine_that_cannot_open_files_is_no_mistake_and_no_damage(read, made):
    read(made)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            read(made)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_features_that_are_nan_are_refused():
    features = np.ones((4, 3), np.float32)
    features[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 samples have features that are NaN or infinite, the first is 'c'"):
        scoring.check_finite(features, "abcd")


def test_folders_of_images(made, scenes, tmp_path):
    for number, image in enumerate(scenes[1]):
        Image.fromarray(image).save(tmp_path / f"{number:03d}.png")
    scores = scoring.score_samples(scoring.open_samples(tmp_path), ["fd_scene_vit"], [made / "true.npz"])
    assert abs(scores.estimates["fd_scene_vit60"].value) < 1e-3
    Image.fromarray(scenes[1][0]).save(tmp_path / "061.jpg")
    with pytest.raises(ValueError, match=r"061\.jpg is no PNG file: lossy compression"):
        scoring.open_samples(tmp_path)

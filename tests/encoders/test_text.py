"""Text encoders: parity with the reference, names at full size, tokenizers, and what is refused."""

import dataclasses
import io
import json
import pathlib
import runpy
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file

from lumos_jax import config, encoders
from lumos_jax.config import io as config_io
from lumos_jax.encoders import frozen, text_encoder
from lumos_jax.encoders.t5 import relative_buckets
from lumos_jax.scenes import scene as scenes

CLOSE = dict(rtol=0, atol=1e-5)
FOLDERS = {"t5": "hf_t5_v1_1_encoder", "clip_text": "hf_clip_text"}


def load(goldens, kind):
    """(golden arrays, network, float32 parameters)"""
    folder = goldens / FOLDERS[kind]
    return np.load(folder / "expected.npz"), *frozen.load(kind.replace("_", "-"), str(folder))[:2]


def load_t5(weights):
    return frozen.load("t5", weights)[:2]


def load_clip_text(weights):
    return frozen.load("clip-text", weights)[:2]


def settings(goldens, kind, **fields):
    return config.Encoder(kind=kind, weights=str(goldens / FOLDERS[kind]), output="all", max_tokens=8, **fields)


def copy(goldens, kind, tmp_path, change_state=None, **told):
    """The golden folder with a changed config.json and changed arrays."""
    folder = shutil.copytree(goldens / FOLDERS[kind], tmp_path / "copy")
    written = json.loads((folder / "config.json").read_text()) | told
    (folder / "config.json").write_text(json.dumps(written))
    if change_state:
        state = load_file(folder / "model.safetensors")
        change_state(state)
        save_file(state, folder / "model.safetensors")
    return str(folder)


@pytest.mark.parametrize("kind", FOLDERS)
def test_parity(goldens, kind):
    golden, network, params = load(goldens, kind)
    tokens = jax.jit(network.apply)(params, golden["input_ids"], golden["attention_mask"])
    np.testing.assert_allclose(tokens, golden["last_hidden_state"], **CLOSE)


def test_pooled_parity(goldens):
    golden, network, params = load(goldens, "clip_text")
    tokens = network.apply(params, golden["input_ids"], golden["attention_mask"])
    np.testing.assert_allclose(network.pool(params, golden["input_ids"], tokens), golden["text_embeds"], **CLOSE)


@pytest.mark.parametrize("kind", FOLDERS)
def test_padding_changes_no_unpadded_token(goldens, kind):
    golden, network, params = load(goldens, kind)
    ids, mask = golden["input_ids"], golden["attention_mask"].astype(bool)
    before = np.asarray(network.apply(params, ids, mask))
    after = np.asarray(network.apply(params, np.where(mask, ids, 17), mask))
    np.testing.assert_array_equal(after[mask], before[mask])
    assert np.abs(after[~mask] - before[~mask]).max() > 0.1
    short = np.asarray(network.apply(params, ids[:1, :5], mask[:1, :5]))
    np.testing.assert_allclose(short, before[:1, :5], **CLOSE)
    assert np.isfinite(network.apply(params, ids, np.zeros_like(mask))).all()


@pytest.mark.parametrize("kind", FOLDERS)
def test_bfloat16_stays_within_two_percent(goldens, kind):
    golden = np.load(goldens / FOLDERS[kind] / "expected.npz")
    encoder, params = encoders.make_text_encoder(settings(goldens, kind), dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    assert encoder.network.apply(params, golden["input_ids"], golden["attention_mask"]).dtype == jnp.bfloat16
    tokens = encoder.apply(params, golden["input_ids"], golden["attention_mask"])
    assert tokens.dtype == jnp.float32
    error = np.abs(tokens - golden["last_hidden_state"]).max()
    assert 1e-4 < error < 0.02 * np.abs(golden["last_hidden_state"]).max()


def test_output_shapes(goldens):
    ids, mask = np.full((3, 8), 63, np.int32), np.ones((3, 8), bool)
    for kind, output, shape in (
        ("t5", "all", (8, 32)),
        ("clip_text", "all", (8, 32)),
        ("clip_text", "pooled", (1, 20)),
    ):
        wanted = dataclasses.replace(settings(goldens, kind), output=output)
        encoder, params = encoders.make_text_encoder(wanted)
        assert (encoder.tokens, encoder.dim) == shape
        assert encoder.apply(params, ids, mask).shape == (3, *shape)
        again, _ = encoders.make_text_encoder(wanted)
        assert hash(encoder) == hash(again)
        assert encoder == again
        assert encoder.identity.startswith(FOLDERS[kind] + "@")


def test_relative_buckets():
    # By the definition, of 32 buckets to distance 128: 8 exact, then edges at 8 * 16^(n/8) tokens, then all beyond in the last.
    edges = [0, 1, 2, 3, 4, 5, 6, 7] + [8 * 16 ** (n / 8) for n in range(8)]
    table = relative_buckets(200, 32, 128)
    distances = [d for d in range(200) if d != 64]  # 64 is an edge itself, where rounding decides
    before = [max(n for n, edge in enumerate(edges) if edge <= d + 1e-9) for d in distances]
    assert table[199, [199 - d for d in distances]].tolist() == before
    after = [16 + bucket for bucket in before[1:]]
    assert table[0, distances[1:]].tolist() == after
    assert table[0, 0] == 0


def test_t5_gates_with_the_tanh_gelu(goldens):
    """The golden's activations are too small to tell it from the exact one, so larger ones go by the formula."""
    _, network, params = load(goldens, "t5")
    blocks = params["blocks"] | {
        "o": {"kernel": np.zeros_like(params["blocks"]["o"]["kernel"])},
        "wi_0": {"kernel": 20 * params["blocks"]["wi_0"]["kernel"]},
    }
    ids = np.arange(64)[None]
    x = params["embedding"].astype(np.float64)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    for i in range(2):
        h = norm(x, blocks["norm2"]["scale"][i])
        gate, value = h @ blocks["wi_0"]["kernel"][i], h @ blocks["wi_1"]["kernel"][i]
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * value) @ blocks["wo"]["kernel"][i]
    assert np.abs(gate).max() > 2
    tokens = network.apply(params | {"blocks": blocks}, ids, np.ones_like(ids))
    np.testing.assert_allclose(tokens[0], norm(x, params["norm"]["scale"]), **CLOSE)


@pytest.mark.parametrize(
    ("eos", "ids", "position"),
    [
        (63, [49, 5, 63, 9, 63, 63, 63, 63], 2),  # the first of equals
        (7, [49, 5, 63, 7, 0, 0, 0, 0], 3),
        (2, [49, 5, 2, 9, 60, 61, 0, 0], 5),  # legacy configs: the largest id, wherever 2 stands
    ],
)
def test_pooling_position(goldens, tmp_path, eos, ids, position):
    network, params = load_clip_text(copy(goldens, "clip_text", tmp_path, eos_token_id=eos))
    tokens = np.random.default_rng(0).normal(size=(1, 8, 32)).astype(np.float32)
    pooled = network.pool(params, np.asarray([ids]), tokens)
    np.testing.assert_allclose(pooled[0], tokens[0, position] @ params["projection"]["kernel"], rtol=1e-5, atol=1e-5)


def test_gelu_of_clip_is_the_exact_one(goldens, tmp_path):
    golden, network, params = load(goldens, "clip_text")
    exact, same = load_clip_text(copy(goldens, "clip_text", tmp_path, hidden_act="gelu"))
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
    ids, mask = golden["input_ids"], golden["attention_mask"]
    difference = np.abs(exact.apply(params, ids, mask) - network.apply(params, ids, mask)).max()
    assert 1e-4 < difference < 0.1


def full_size(goldens, kind, name):
    shapes = goldens / "full_size_shapes" / f"{name}.json"
    report = frozen.read(kind, str(shapes), shapes_only=True).report
    assert set(report.loaded) | set(report.dropped) == set(json.loads(shapes.read_text()))
    return report


def test_full_size_by_shape(goldens):
    report = full_size(goldens, "t5", "hf_t5_v1_1_xxl_encoder")
    assert report.parameters == 4_762_310_656
    assert dict(report.dropped) == {"encoder.embed_tokens.weight": "the same array as shared.weight"}
    report = full_size(goldens, "clip-text", "hf_clip_vit_large_patch14_text")
    assert report.parameters == 123_650_304
    assert not report.dropped


def test_whole_t5_loads_its_encoder(goldens, tmp_path):
    def add_decoder(state):
        state["encoder.embed_tokens.weight"] = state["shared.weight"].copy()
        state["lm_head.weight"] = np.ones((64, 32), np.float32)
        for part in ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.v", "layer.2.DenseReluDense.wi_1"):
            state[f"decoder.block.0.{part}.weight"] = np.ones((4, 4), np.float32)
        state["decoder.block.0.layer.2.layer_norm.weight"] = np.ones(32, np.float32)

    whole = load_t5(copy(goldens, "t5", tmp_path, add_decoder))
    _, network, params = load(goldens, "t5")
    assert whole[0] == network
    assert jax.tree.all(jax.tree.map(np.array_equal, whole[1], params))


def test_either_name_of_the_embedding_will_do_but_not_two_that_differ(goldens, tmp_path):
    def rename(state):
        state["encoder.embed_tokens.weight"] = state.pop("shared.weight")

    def differ(state):
        state["encoder.embed_tokens.weight"] = state["shared.weight"] + 1

    _, params = load_t5(copy(goldens, "t5", tmp_path / "a", rename))
    np.testing.assert_array_equal(params["embedding"], load(goldens, "t5")[2]["embedding"])
    with pytest.raises(ValueError, match="differ; in T5 they are one array"):
        load_t5(copy(goldens, "t5", tmp_path / "b", differ))


def test_clip_beside_an_image_tower_and_without_prefix(goldens, tmp_path):
    def add_tower(state):
        state["text_model.embeddings.position_ids"] = np.arange(8)[None]
        state["logit_scale"] = np.ones((), np.float32)
        state["vision_model.encoder.layers.0.mlp.fc1.weight"] = np.ones((4, 4), np.float32)
        state["visual_projection.weight"] = np.ones((4, 4), np.float32)

    def strip(state):
        del state["text_projection.weight"]
        for name in list(state):
            state[name.removeprefix("text_model.")] = state.pop(name)

    _, network, params = load(goldens, "clip_text")
    told = json.loads((goldens / FOLDERS["clip_text"] / "config.json").read_text())
    folder = copy(goldens, "clip_text", tmp_path / "a", add_tower, model_type="clip", text_config=told)
    both, same = load_clip_text(folder)
    assert both == network
    assert jax.tree.all(jax.tree.map(np.array_equal, same, params))
    bare = copy(goldens, "clip_text", tmp_path / "b", strip)
    assert load_clip_text(bare)[0] == dataclasses.replace(network, projection=0)
    wanted = dataclasses.replace(settings(goldens, "clip_text"), weights=bare, output="pooled")
    with pytest.raises(ValueError, match="has no text_projection; set output=all"):
        encoders.make_text_encoder(wanted)


@pytest.mark.parametrize(
    ("kind", "told", "message"),
    [
        ("t5", {"model_type": "umt5"}, "model_type='umt5'; an encoder of T5 v1.1 or Flan-T5 has t5 or mt5"),
        ("t5", {"feed_forward_proj": "relu"}, "only gated-gelu"),
        ("t5", {"num_layers": 3}, r"blocks/wo/kernel: \(2, 64, 32\) there, \(3, 64, 32\) here"),
        ("clip_text", {"model_type": "bert"}, "model_type='bert'; a CLIP text encoder has"),
        ("clip_text", {"model_type": "clip", "text_config": {}}, r"config\.json does not say num_attention_heads"),
        ("clip_text", {"hidden_act": "relu"}, "supported are gelu, quick_gelu"),
    ],
)
def test_other_architectures_are_refused(goldens, tmp_path, kind, told, message):
    wanted = dataclasses.replace(settings(goldens, kind), weights=copy(goldens, kind, tmp_path, **told))
    with pytest.raises(ValueError, match=message):
        encoders.make_text_encoder(wanted)


def test_encoders_do_not_stand_in_for_each_other(goldens):
    with pytest.raises(ValueError, match="reads text, and this task conditions on images"):
        encoders.make_encoder(settings(goldens, "t5"))
    with pytest.raises(ValueError, match="kind='vit' reads no text"):
        encoders.make_text_encoder(config.Encoder())
    with pytest.raises(ValueError, match=r"max_tokens=9 exceeds the 8 positions"):
        encoders.make_text_encoder(dataclasses.replace(settings(goldens, "clip_text"), max_tokens=9))
    state = str(goldens / FOLDERS["clip_text"] / "model.safetensors")
    with pytest.raises(ValueError, match="give the directory that holds both"):
        encoders.make_text_encoder(dataclasses.replace(settings(goldens, "clip_text"), weights=state))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "t5", "output": "pooled"}, r"encoder\.output=pooled \(all allowed\)"),
        ({"tokenizer": "x", "output": "all"}, r"encoder\.tokenizer='x' \(images have none\)"),
        ({"kind": "t5"}, r"encoder\.kind=t5 .* config\.encoder\.output=cls \(all allowed\)"),
        ({"kind": "clip_text", "output": "patch"}, r"output=patch \(all or pooled allowed\)"),
        ({"kind": "t5", "output": "all", "weights": "random:0"}, r"encoder\.tokenizer=''"),
        ({"kind": "t5", "output": "all", "max_tokens": 0}, r"encoder\.max_tokens=0 must be at least 1"),
    ],
)
def test_impossible_settings_name_every_wrong_field(fields, message):
    tree = config_io.to_dict(config.Settings())
    tree["encoder"] |= fields
    with pytest.raises(ValueError, match=message):
        config_io.from_dict(tree)


def random_settings(kind, **fields):
    return config.Encoder(**{
        "kind": kind, "weights": "random:3", "output": "all", "size": "64x2x4",
        "tokenizer": "scenes",
    } | fields)  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_random_weights_are_their_seed(kind):
    tree = config_io.to_dict(config.Settings())
    tree["encoder"] = dataclasses.asdict(random_settings(kind))
    made, params = encoders.make_text_encoder(config_io.from_dict(tree).encoder)
    again, same = encoders.make_text_encoder(random_settings(kind))
    other, _ = encoders.make_text_encoder(random_settings(kind, weights="random:4"))
    assert made == again
    assert jax.tree.all(jax.tree.map(np.array_equal, params, same))
    assert made.identity.startswith("random:3@")
    assert other.identity.split("@")[1] != made.identity.split("@")[1]
    assert made.network.vocabulary == 64


def probe(made, params, ids, labels):
    """How often a linear map of a token, fitted on half of them, finds the label (0 to 15) of the other half."""
    tokens = np.asarray(jax.jit(made.apply)(params, ids, np.ones_like(ids)))[:, 1:].reshape(-1, made.dim)
    design = np.concatenate([tokens, np.ones((len(tokens), 1))], axis=1)
    half, wanted = len(design) // 2, np.eye(16)[labels.ravel()]
    weights = np.linalg.lstsq(design[:half], wanted[:half], rcond=None)[0]
    return ((design[half:] @ weights).argmax(1) == wanted[half:].argmax(1)).mean()


def test_random_t5_tokens_tell_the_word_before():
    """The word always, the one before it often: "red box" is not "blue box". Without position biases it is a guess."""
    made, params = encoders.make_text_encoder(random_settings("t5", max_tokens=16, size="256x4x8"))
    ids = np.random.default_rng(0).integers(3, 13, (400, 16))
    assert probe(made, params, ids, ids[:, 1:]) > 0.99
    unplaced = params | {"relative_bias": np.zeros_like(params["relative_bias"])}
    before, guess = (probe(made, p, ids, ids[:, :-1]) for p in (params, unplaced))
    assert before > 0.4, before  # chance is 0.1
    assert guess < 0.3, guess


def test_random_clip_tokens_tell_word_and_place():
    made, params = encoders.make_text_encoder(random_settings("clip_text", max_tokens=16))
    ids = np.random.default_rng(0).integers(3, 13, (400, 16))
    place = np.tile(np.arange(1, 16), (400, 1))
    assert probe(made, params, ids, ids[:, 1:]) > 0.99
    assert probe(made, params, ids, place) > 0.99
    unplaced = params | {"positions": np.zeros_like(params["positions"])}
    assert probe(made, unplaced, ids, place) < 0.7  # the causal mask tells a little


def make_folder(path, **specials):
    """A real tokenizer folder: six words, ids 0 to 5."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ("<pad>", "</s>", "<unk>", "a", "red", "box")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **specials).save_pretrained(path)
    return str(path)


def test_a_tokenizer_folder(tmp_path):
    tokenizer = encoders.load_tokenizer(make_folder(tmp_path, pad_token="<pad>", eos_token="</s>"), "field")
    made = encoders.tokenize(tokenizer, ["a red box", "a box a box a box", "blue"], 5)
    assert made["tokens"].dtype == np.int32
    assert made["tokens"].tolist() == [[3, 4, 5, 1, 0], [3, 5, 3, 5, 1], [2, 1, 0, 0, 0]]
    assert made["token_mask"].dtype == bool
    assert made["token_mask"].sum(1).tolist() == [4, 5, 2]
    assert encoders.tokenize(tokenizer, [], 5)["tokens"].shape == (0, 5)


def test_a_sentencepiece_folder(tmp_path):
    """T5's folders often have spiece.model alone."""
    words = [text for index in range(300) for text in scenes.captions(scenes.make_scene(index))]
    model = io.BytesIO()
    ids = dict(vocab_size=70, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(words), model_writer=model, minloglevel=2, **ids)
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    told = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told))
    tokenizer = encoders.load_tokenizer(str(tmp_path), "field")
    text = "a red box and a cone"
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode(text)
    made = encoders.tokenize(tokenizer, [text, text * 9], len(pieces) + 3)
    assert made["tokens"][0].tolist() == [*pieces, 1, 0, 0]
    assert made["tokens"][1, -1] == 1
    assert made["token_mask"].sum(1).tolist() == [len(pieces) + 1, len(pieces) + 3]


def test_tokenizers_that_are_missing_or_useless(goldens, tmp_path):
    folder = goldens / FOLDERS["t5"]
    with pytest.raises(
        ValueError, match=r"config\.encoder\.weights='.*': no tokenizer in .*set config\.encoder\.tokenizer"
    ):
        encoders.load_tokenizer(str(folder), "config.encoder.weights")
    with pytest.raises(ValueError, match="no tokenizer in"):  # a file of weights: the files beside it
        encoders.load_tokenizer(str(folder / "model.safetensors"), "config.encoder.weights")
    with pytest.raises(ValueError, match="no such file or directory"):
        encoders.load_tokenizer("./nothing", "config.encoder.tokenizer")
    with pytest.raises(ValueError, match="has no padding token"):
        encoders.load_tokenizer(make_folder(tmp_path / "a"), "config.encoder.tokenizer")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be read"):
        encoders.load_tokenizer(str(tmp_path / "b"), "config.encoder.tokenizer")


def test_tokenizer_and_network_must_fit(goldens, tmp_path):
    beside = make_folder(pathlib.Path(copy(goldens, "clip_text", tmp_path)), pad_token="<pad>", eos_token="</s>")
    wanted = dataclasses.replace(settings(goldens, "clip_text"), weights=beside)
    made, _ = encoders.make_text_encoder(wanted)
    assert len(encoders.make_tokenizer(wanted, made)) == 6
    pooled = dataclasses.replace(wanted, output="pooled")
    with pytest.raises(ValueError, match=r"ends a text with id 1, but .* pools at 63"):
        encoders.make_tokenizer(pooled, encoders.make_text_encoder(pooled)[0])
    random = random_settings("t5")
    random_made, _ = encoders.make_text_encoder(random)
    small = dataclasses.replace(random_made, network=dataclasses.replace(random_made.network, vocabulary=57))
    with pytest.raises(ValueError, match=r"has 58 ids, the network of random:3 only 57"):
        encoders.make_tokenizer(random, small)
    with pytest.raises(ValueError, match="random:3 has none beside it"):
        encoders.make_tokenizer(random_settings("t5", tokenizer=""), made)


def test_scene_tokenizer_knows_every_caption():
    tokenizer = encoders.load_tokenizer("scenes", "config.encoder.tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    captions = [text for index in range(7000, 9000) for text in scenes.captions(scenes.make_scene(index, seed=1))]
    made = encoders.tokenize(tokenizer, captions, 120)
    ids, mask = made["tokens"], made["token_mask"]
    assert not (ids == tokenizer.unk_token_id).any()
    assert mask.sum(1).max() < 120  # nothing is cut
    assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == 1).all()
    assert len({row.tobytes() for row in ids}) == len(set(captions))
    assert encoders.tokenize(tokenizer, ["a zeppelin"], 4)["tokens"].tolist() == [[7, 2, 1, 0]]


def test_scene_tokenizer_is_what_its_script_makes(tmp_path):
    made = runpy.run_path(str(pathlib.Path(__file__).parent.parent / "scenes" / "make_tokenizer.py"))
    made["build"](1000).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        committed = text_encoder.SCENE_TOKENIZER / name
        assert json.loads((tmp_path / name).read_text()) == json.loads(committed.read_text())
        assert committed.stat().st_size < 100_000

"""PyTorch's files: exact values without PyTorch, and nothing that a file asks for is ever run."""

import fnmatch
import io
import json
import pathlib
import pickle
import shutil
import struct
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lumos_jax.encoders import frozen
from lumos_jax.weights import files, torch_files


def load_vit(weights):
    return frozen.load("image-encoder", weights)[:2]


@pytest.fixture
def folder(goldens):
    return goldens / "torch_files"


@pytest.fixture
def expected(folder):
    return dict(np.load(folder / "expected.npz"))


class Global:
    """Pickles as the name of something, whether or not it can be imported here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Call:
    """Pickles as REDUCE: a global applied to arguments, then, with a state, BUILD."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class Stored:
    """Pickles as a persistent id."""

    def __init__(self, key, count, kind="FloatStorage"):
        self.pid = ("storage", Global("torch", kind), key, "cpu", count)


class Writer(pickle._Pickler):
    """A pickler of the classes above; the pure Python one, so that opcodes can be written by hand."""

    def persistent_id(self, value):
        return value.pid if isinstance(value, Stored) else None

    def save(self, value, *args, **named):
        if isinstance(value, Global):
            self.write(b"c" + f"{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Call):
            self.save(value.function)
            self.save(value.args)
            self.write(b"R")
            if value.state is not None:
                self.save(value.state)
                self.write(b"b")
        else:
            super().save(value, *args, **named)


def pickled(value) -> bytes:
    out = io.BytesIO()
    Writer(out, 2).dump(value)
    return out.getvalue()


REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
NAMESPACE = Global("argparse", "Namespace")
FOUR = np.arange(4, dtype=np.float32).tobytes()


def tensor(key="0", count=4, offset=0, shape=(4,), strides=(1,), kind="FloatStorage"):
    return Call(REBUILD, Stored(key, count, kind), offset, shape, strides, False, {})


def write_zip(path, value, storages=None, **more):
    """A file in torch.save's layout around any pickle; `value` may be the pickle's bytes."""
    body = value if isinstance(value, bytes) else pickled(value)
    entries = {"data.pkl": body, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": data for key, data in ({"0": FOUR} if storages is None else storages).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (entries | more).items():
            archive.writestr(f"archive/{name}", data)
    return path


def refusal(path):
    """The message of a refused file; None of one that is read."""
    try:
        torch_files.load_tree(path)
    except ValueError as error:
        message = str(error)
        assert message.startswith(str(path))
        return message


def test_values_are_pytorchs(folder, expected):
    state = torch_files.load(folder / "zip.pth")
    kinds = {k.removeprefix("kind/"): v for k, v in expected.items() if k.startswith("kind/")}
    assert set(state) == set(kinds)
    assert state["bfloat16"].dtype == ml_dtypes.bfloat16
    for kind, value in kinds.items():
        found = state[kind].astype(np.float32) if kind == "bfloat16" else state[kind]
        np.testing.assert_array_equal(found, value, err_msg=kind, strict=True)
        assert found.flags.aligned
    assert np.shares_memory(state["base"], state["transposed"])  # views of the mapped file
    assert not np.shares_memory(state["base"], state["float32"])
    with pytest.raises(ValueError, match="read-only"):
        state["base"][0] = 1


def test_a_dino_training_checkpoint(folder, expected, caplog):
    with caplog.at_level("INFO"):
        vit, params = load_vit(str(folder / "dino_training.pth"))
    assert (vit.width, vit.depth, vit.patch_size) == (4, 2, 4)
    teacher = torch_files.load(folder / "dino_training.pth")
    np.testing.assert_array_equal(np.concatenate([v.ravel() for v in teacher.values()]), expected["teacher"])
    np.testing.assert_array_equal(params["blocks"]["fc1"]["kernel"][1], teacher["backbone.blocks.1.mlp.fc1.weight"].T)
    assert "of 'teacher'; left 'student' (38 tensors), 'optimizer'" in caplog.text
    assert "head.last_layer.weight_g: a head of another training" in caplog.text
    tree = torch_files.load_tree(folder / "dino_training.pth")
    assert type(tree["args"]) is type(tree["fp16_scaler"]["loss"]) is torch_files.Ignored
    assert tree["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


def test_what_training_keeps_beside_its_weights_is_passed_by(tmp_path):
    """As checkpoints of DINO, MoCo-v3, MAE and Lightning have it."""
    beside = {
        "device": Call(Global("torch", "device"), "cuda", 0),
        "size": Call(Global("torch", "Size"), (2, 3)),
        "dtype": Global("torch", "bfloat16"),
        "order": np.arange(6, dtype=np.int64).reshape(2, 3),
        "objects": np.array([None, "a"], dtype=object),
        "milestones": Call(Global("collections", "Counter"), {30: 1}),
        "state": Call(Global("collections", "defaultdict"), Global("__builtin__", "dict")),
        "names": {"a", "b"},
        "args": Call(NAMESPACE, state={"out": pathlib.PurePosixPath("/a/b"), "mean": np.zeros(3), "gpu": np.int64(1)}),
    }
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), tensor(), True, {})
    path = write_zip(tmp_path / "a.pth", {"state_dict": {"w": tensor(), "p": parameter}, **beside})
    state = torch_files.load(path)
    for name in ("w", "p"):
        np.testing.assert_array_equal(state[name], np.arange(4, dtype=np.float32), strict=True)
    tree = torch_files.load_tree(path)
    assert {type(tree[name]) for name in ("device", "order", "objects", "names", "args")} == {torch_files.Ignored}
    assert (tree["size"], tree["state"]) == ((2, 3), {})


HOSTILE = {
    "reduce": lambda mark: (Call(Global("os", "system"), f"touch {mark}"), "os.system"),
    "eval": lambda mark: (Call(Global("builtins", "eval"), f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    "getattr": lambda mark: (Call(Global("builtins", "getattr"), NAMESPACE, "__class__"), "builtins.getattr"),
    "nested load": lambda mark: (Call(Global("torch.storage", "_load_from_bytes"), b""), "torch.storage._load_from_bytes"),
    "numpy's own": lambda mark: (Global("numpy", "load"), "numpy.load"),
    "a module": lambda mark: (Call(Global("__main__", "Net")), "__main__.Net"),
    "dotted": lambda mark: (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "collections.OrderedDict.fromkeys"
    ),
    "inst": lambda mark: (b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.", "os.system"),
    "obj": lambda mark: (b"(cos\nsystem\nS'touch " + str(mark).encode() + b"'\no.", "os.system"),
    "within arguments": lambda mark: (
        {"args": Call(NAMESPACE, state={"x": Call(Global("os", "system"), f"touch {mark}")})}, "os.system"
    ),
}  # fmt: skip


def test_code_is_refused_by_name_and_never_run(tmp_path):
    mark = tmp_path / "ran"
    for trick, make in HOSTILE.items():
        value, name = make(mark)
        path = write_zip(tmp_path / "hostile.pth", value)
        assert refusal(path).startswith(f"{path} is refused: it asks for {name!r}"), trick
        assert not mark.exists(), trick
    pickle.loads(pickled(HOSTILE["reduce"](mark)[0]))  # the same pickle does run where it is trusted
    assert mark.exists()


def test_no_state_changes_what_pickles_reach(tmp_path):
    """BUILD with a pair sets attributes one by one, and with a dict it fills __dict__."""
    table = {**torch_files._GLOBALS, ("torch._utils", "_rebuild_tensor_v2"): None}
    watched = ("_call", "__setstate__", "__new__", "__init__", "a")
    for (module, name), stand_in in table.items():
        before = [getattr(stand_in, attribute, None) for attribute in watched]
        for state in ({"_call": 1}, (None, {"_call": 1, "__setstate__": 2, "__new__": 3}), ({"a": 1}, None), [1]):
            built = pickled(Global(module, name))[:-1] + pickled(state)[2:-1] + b"b."
            refusal(write_zip(tmp_path / "hostile.pth", built))
            assert [getattr(stand_in, attribute, None) for attribute in watched] == before, (module, name)
        made_here = getattr(stand_in, "__module__", torch_files.__name__) == torch_files.__name__
        assert made_here or isinstance(stand_in, str), (module, name)
    evil = {"__setstate__": NAMESPACE, "items": NAMESPACE, "__class__": NAMESPACE}
    ordered = Call(Global("collections", "OrderedDict"), [["a", 1]], state=evil)
    tree = torch_files.load_tree(
        write_zip(tmp_path / "a.pth", {"d": ordered, "n": Call(NAMESPACE, state=(evil, evil))})
    )
    assert tree["d"] == {"a": 1}
    assert type(tree["n"]) is torch_files.Ignored


ODD_TENSORS = {
    "beyond": tensor(offset=1),
    "beyond by strides": tensor(shape=(2, 3), strides=(2, 1)),
    "huge stride": tensor(shape=(2,), strides=(2**61,)),
    "repeated": tensor(shape=(10**12,), strides=(0,)),
    "overflowing": tensor(shape=(2**40,) * 3, strides=(0, 0, 0)),
    "many axes": tensor(shape=(1,) * 65, strides=(1,) * 65),
    "backwards": tensor(shape=(3,), strides=(-1,), offset=1),
    "negative offset": tensor(offset=-1),
    "not whole": tensor(shape=(2.0,)),
    "unprintable": tensor(shape=(2**50000,)),
    "shape and strides": tensor(shape=(2, 2)),
    "more than there is": tensor(count=2**62, shape=(5,)),
    "no such storage": tensor(key="7"),
    "no storage": Call(REBUILD, "0", 0, (1,), (1,), False, {}),
    "an array": Call(REBUILD, np.zeros(2, np.float32), 0, (1,), (1,), False, {}),
    "negated": Call(REBUILD, Stored("0", 4), 0, (1,), (1,), False, {}, {"neg": True}),
    "complex": tensor(kind="ComplexFloatStorage"),
    "a pickled module's reference": b"\x80\x02(NNNtQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "a buffer": b"\x80\x05\x97.",
    "a huge memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "a cut text": b"\x80\x02X\xff\xff\xff\x7fa.",
    "nothing": b"",
}


@pytest.mark.parametrize("name", ODD_TENSORS)
def test_claims_that_do_not_hold_are_refused(tmp_path, name):
    value = ODD_TENSORS[name]
    path = write_zip(tmp_path / "a.pth", value if isinstance(value, bytes) else {"w": value})
    if name == "a huge memo":
        assert torch_files.load_tree(path) is None  # no memory was asked for
    else:
        assert refusal(path)


def test_cut_and_flipped_files_are_read_or_refused_in_words(folder, tmp_path):
    path = tmp_path / "spoiled.pth"
    for name in ("zip.pth", "dino_training.pth"):
        whole = (folder / name).read_bytes()
        for length in {0, 1, 2, 3, 20, len(whole) - 1, *range(50, len(whole), len(whole) // 40)}:
            path.write_bytes(whole[:length])
            assert refusal(path), (name, length)
    rng, refused = np.random.default_rng(0), 0
    whole = (folder / "zip.pth").read_bytes()
    for place in rng.integers(0, len(whole), 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        refused += refusal(path) is not None
    assert refused > 50


def test_what_is_no_file_of_weights_says_what_it_is(folder, tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message) as error:
            files.read(path, "model")
        assert str(path) in str(error.value)

    refused(
        folder / "legacy.pth",
        r"from before PyTorch 1\.6\. Save it again with a current PyTorch: torch\.save\(torch\.load",
    )
    refused(folder / "torchscript.pt", "TorchScript")
    path = tmp_path / "a.bin"
    path.write_text("These are no weights but a text about weights.\n" * 9)
    refused(path, "no file of torch.save")
    path.write_bytes(b"cos\nsystem\n(S'touch %s'\ntR." % str(tmp_path / "ran").encode())
    refused(path, "no file of torch.save")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "")
    refused(path, "0 of its entries are called <root>/data.pkl")
    refused(write_zip(path, {"w": tensor()}, byteorder=b"big"), "not little-endian")
    refused(write_zip(path, {"w": tensor()}, {}), "entry 'data/0' is missing")
    refused(write_zip(path, {"w": tensor()}, {"0": FOUR[:8]}), "claims 16 bytes but has 8")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    refused(path, "entry 'data.pkl' is compressed")
    body = bytearray(write_zip(path, {"w": tensor()}).read_bytes())
    at = body.index(b"PK\x01\x02", body.index(b"archive/data/0", body.index(b"PK\x01\x02")) - 50)
    body[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # compressed and uncompressed size
    path.write_bytes(body)
    refused(path, "entry 'data/0' claims more bytes than the file has")
    refused(path.with_suffix(".pkl"), "not .pkl")
    refused(path.with_suffix(".pt"), "cannot be read")
    assert not (tmp_path / "ran").exists()


def test_which_state_dict():
    one, two = {"a": np.ones(2)}, {"b": np.ones(3)}
    state_dict = torch_files.state_dict
    for key in torch_files.STATE_DICT_KEYS:
        assert state_dict({"epoch": 1, key: one, "other": two, "queue": np.ones(1)}, "it") == one
    assert list(state_dict({"a": np.ones(2), "args": torch_files.Ignored(), "n": 3}, "it")) == ["a"]
    assert state_dict({"model": one, "ema": two}, "it", prefer=torch_files.EMA_KEYS) == two
    with pytest.raises(ValueError, match=r"it holds several state dicts, 'model' \(1 tensors\), 'ema' \(1 tensors\)"):
        state_dict({"model": one, "ema": two}, "it")
    with pytest.raises(ValueError, match=r"no tensors at its top level or under .*it holds 'encoder' \(1 tensors\)"):
        state_dict({"encoder": one}, "it")
    with pytest.raises(ValueError, match="it holds a list"):
        state_dict([1], "it")


def test_the_writer_takes_what_pytorch_has(tmp_path):
    tree = {
        "a": {"b": np.arange(6, dtype=np.float32).reshape(2, 3).T},
        "n": np.array(3, np.int64),
        "e": np.zeros((0, 2), np.float32),
        "h": np.ones(3, ml_dtypes.bfloat16),
    }
    torch_files.save(tmp_path / "x.pth", tree)
    back = torch_files.load_tree(tmp_path / "x.pth")
    for name, value in (("n", tree["n"]), ("e", tree["e"]), ("h", tree["h"])):
        np.testing.assert_array_equal(back[name], value, strict=True)
    np.testing.assert_array_equal(back["a"]["b"], tree["a"]["b"], strict=True)
    with pytest.raises(ValueError, match="not of complex64"):
        torch_files.save(tmp_path / "y.pth", {"a": np.zeros(1, np.complex64)})


def test_folders_of_bin_files(goldens, tmp_path):
    vit = shutil.copytree(goldens / "hf_vit_dino", tmp_path / "vit")
    _, whole = load_vit(str(vit))
    state = load_file(vit / "model.safetensors")

    def same():
        return jax.tree.all(jax.tree.map(np.array_equal, whole, load_vit(str(vit))[1]))

    torch_files.save(vit / "pytorch_model.bin", {name: 0 * value for name, value in state.items()})
    assert same()  # safetensors come first
    (vit / "model.safetensors").unlink()
    torch_files.save(vit / "pytorch_model.bin", state)
    assert same()
    (vit / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"none of model\.safetensors, .*pytorch_model\.bin"):
        load_vit(str(vit))
    half = sorted(state)[:9]
    parts = {"pytorch_model-1.bin": half, "pytorch_model-2.bin": [name for name in state if name not in half]}
    for part, held in parts.items():
        torch_files.save(vit / part, {name: state[name] for name in held})
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (vit / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert same()
    (vit / "pytorch_model-2.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks pytorch_model-2\.bin"):
        load_vit(str(vit))


@pytest.mark.parametrize("has_safetensors", [True, False])
def test_bin_files_are_fetched_only_where_there_is_nothing_better(monkeypatch, tmp_path, has_safetensors):
    there = ["config.json", "pytorch_model.bin", "optimizer.bin", "unet/x.bin"]
    there += ["model.safetensors"] if has_safetensors else []
    asked = []

    def snapshot_download(name, allow_patterns):
        assert name == "someone/vit"
        asked.append(allow_patterns)
        for file in there:
            if any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).write_bytes(b"")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert files.locate("someone/vit", "config.encoder.weights") == tmp_path
    fetched = sorted(path.name for path in tmp_path.iterdir())
    assert fetched == ["config.json", "model.safetensors" if has_safetensors else "pytorch_model.bin"]
    assert len(asked) == (1 if has_safetensors else 2)

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

from lumos_jax.weights import files, names, torch_files, torch_pickle
from lumos_jax.weights.vit_files import convert_vit, load_vit


@pytest.fixture
def folder(goldens):
    return goldens / "torch_files"


@pytest.fixture
def expected(folder):
    return dict(np.load(folder / "expected.npz"))


# The product's own parts, by their PyTorch names, for pickles that the tests write.


class Global:
    """Pickles as the name of something, whether or not it can be imported here."""

    def __init__(self, module, name):
        self.module, self.name = module, name

    def __eq__(self, other):
        return (self.module, self.name) == (other.module, other.name)

    def __hash__(self):
        return hash((self.module, self.name))


class Call:
    """Pickles as REDUCE: a global applied to arguments, then, with a state, BUILD."""

    def __init__(self, function, *args, state=None):
        self.function, self.args, self.state = function, args, state


class Stored:
    """Pickles as a persistent id."""

    def __init__(self, key, count, kind="FloatStorage", view=()):
        self.pid = ("storage", Global("torch", kind), key, "cpu", count, *view)


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


def tensor(key="0", count=4, offset=0, shape=(4,), strides=(1,), kind="FloatStorage"):
    return Call(REBUILD, Stored(key, count, kind), offset, shape, strides, False, {})


FOUR = np.arange(4, dtype=np.float32).tobytes()


def write_zip(path, value, storages=None, **more):
    """A zip-layout file around any pickle; `value` may be the pickle's bytes."""
    body = value if isinstance(value, bytes) else pickled(value)
    entries = {"data.pkl": body, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{key}": data for key, data in ({"0": FOUR} if storages is None else storages).items()}
    entries |= more
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(f"archive/{name}", data)
    return path


def write_legacy(path, value, storages=None, system=None):
    """A legacy-layout file around any pickle."""
    storages = {"0": FOUR} if storages is None else storages
    parts = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True} if system is None else system]
    body = b"".join(pickle.dumps(part, 2) for part in parts)
    body += (value if isinstance(value, bytes) else pickled(value)) + pickle.dumps(list(storages), 2)
    path.write_bytes(body + b"".join(struct.pack("<q", len(data) // 4) + data for data in storages.values()))
    return path


WRITERS = pytest.mark.parametrize("write", [write_zip, write_legacy])


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_values_are_pytorchs(folder, expected, name):
    state = torch_files.load(folder / name)
    kinds = {k.removeprefix("kind/"): v for k, v in expected.items() if k.startswith("kind/")}
    assert set(state) == set(kinds)
    assert state["bfloat16"].dtype == ml_dtypes.bfloat16
    for kind, value in kinds.items():
        found = state[kind].astype(np.float32) if kind == "bfloat16" else state[kind]
        assert found.dtype == value.dtype, kind
        np.testing.assert_array_equal(found, value, err_msg=kind, strict=True)
        assert found.flags.aligned


def test_shared_storages_are_views_of_the_file(folder):
    state = torch_files.load(folder / "zip.pth")
    assert np.shares_memory(state["base"], state["transposed"])
    assert np.shares_memory(state["base"], state["stepped"])
    assert not np.shares_memory(state["base"], state["float32"])
    with pytest.raises(ValueError, match="read-only"):
        state["base"][0] = 1


def test_a_dino_training_checkpoint(folder, expected, caplog):
    with caplog.at_level("INFO"):
        vit, params = load_vit(str(folder / "dino_training.pth"))
    assert (vit.width, vit.depth, vit.patch_size) == (4, 2, 4)
    teacher = torch_files.load(folder / "dino_training.pth")
    np.testing.assert_array_equal(np.concatenate([v.ravel() for v in teacher.values()]), expected["teacher"])
    np.testing.assert_array_equal(params["norm"]["scale"], teacher["backbone.norm.weight"])
    np.testing.assert_array_equal(params["blocks"]["fc1"]["kernel"][1], teacher["backbone.blocks.1.mlp.fc1.weight"].T)
    assert "of 'teacher'; left 'student' (38 tensors), 'optimizer'" in caplog.text
    assert "head.last_layer.weight_g: a head of another training" in caplog.text
    assert "dropped     8 arrays" in caplog.text


def test_the_student_has_the_same_names_behind_two_prefixes(folder):
    student = names.bare_vit_names(torch_files.load(folder / "dino_training.pth", "student"), "it")
    teacher = names.bare_vit_names(torch_files.load(folder / "dino_training.pth"), "it")
    assert set(student) == set(teacher)
    assert not np.array_equal(student["cls_token"], teacher["cls_token"])


def test_arguments_and_numpy_scalars_are_not_read(folder):
    tree = torch_files.load_tree(folder / "dino_training.pth")
    assert type(tree["args"]) is type(tree["fp16_scaler"]["loss"]) is torch_files.NotRead
    assert tree["fp16_scaler"]["scale"] == 65536.0
    assert tree["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)
    np.testing.assert_allclose(tree["optimizer"]["state"][1]["exp_avg"], [0.1])
    assert tree["epoch"] == 3


def beside():
    """What training checkpoints of DINO, MoCo-v3, MAE and Lightning keep beside their weights."""
    return {
        "device": Call(Global("torch", "device"), "cuda", 0),
        "size": Call(Global("torch", "Size"), (2, 3)),
        "order": np.arange(6, dtype=np.int64).reshape(2, 3),
        "objects": np.array([None, "a"], dtype=object),
        "generator": ("MT19937", np.arange(4, dtype=np.uint32), 3, 0, 0.0),
        "milestones": Call(Global("collections", "Counter"), {30: 1}),
        "state": Call(Global("collections", "defaultdict"), Global("__builtin__", "dict")),
        "names": {"a", "b"},
        "args": Call(NAMESPACE, state={"out": pathlib.PurePosixPath("/a/b"), "mean": np.zeros(3), "gpu": np.int64(1)}),
    }


@WRITERS
def test_what_training_keeps_beside_its_weights_is_passed_by(tmp_path, write):
    path = write(tmp_path / "a.pth", {"state_dict": {"w": tensor()}, **beside()})
    np.testing.assert_array_equal(torch_files.load(path)["w"], np.arange(4, dtype=np.float32), strict=True)
    tree = torch_files.load_tree(path)
    assert type(tree["order"]) is type(tree["objects"]) is type(tree["generator"][1]) is torch_pickle.NotReadArray
    assert type(tree["device"]) is type(tree["names"]) is type(tree["args"]) is torch_files.NotRead
    assert tree["size"] == (2, 3)
    assert tree["state"] == {}


@pytest.mark.parametrize("state", [{"w": tensor(), "b": np.zeros(3)}, {"model": {"w": tensor(), "b": np.zeros(3)}}])
def test_arrays_among_the_weights_are_not_passed_by(tmp_path, state):
    with pytest.raises(ValueError, match=r"a\.pth holds NumPy arrays among its tensors \('b'\)"):
        torch_files.load(write_zip(tmp_path / "a.pth", state))


@pytest.mark.parametrize("stand_in", [np.zeros(4, np.float32), Call(Global("torch", "device"), "cpu")])
def test_no_tensor_is_built_on_what_is_not_read(tmp_path, stand_in):
    made = Call(REBUILD, stand_in, 0, (1,), (1,), False, {})
    with pytest.raises(ValueError, match="no storage"):
        torch_files.load(write_zip(tmp_path / "a.pth", {"w": made}))


def test_sets_are_not_read(tmp_path):
    tree = torch_files.load_tree(write_zip(tmp_path / "a.pth", b"\x80\x04\x8f(ccollections\nOrderedDict\n\x90."))
    assert type(tree) is torch_files.NotRead


def test_sizes_dtypes_and_bare_storages(tmp_path):
    held = {"size": Call(Global("torch", "Size"), (2, 3)), "dtype": Global("torch", "bfloat16"), "raw": Stored("0", 4)}
    tree = torch_files.load_tree(write_zip(tmp_path / "a.pth", held))
    assert tree["size"] == (2, 3)
    assert tree["dtype"] == "torch.bfloat16"
    np.testing.assert_array_equal(tree["raw"], np.arange(4, dtype=np.float32), strict=True)


def test_legacy_storages_may_be_parts_of_others(tmp_path):
    part = Call(REBUILD, Stored("0", 4, view=(("9", 1, 2),)), 1, (1,), (1,), False, {})
    whole = Call(REBUILD, Stored("0", 4, view=(None,)), 0, (2, 2), (1, 2), False, {})
    state = torch_files.load(write_legacy(tmp_path / "a.pth", {"part": part, "whole": whole}))
    np.testing.assert_array_equal(state["part"], [2])
    np.testing.assert_array_equal(state["whole"], [[0, 2], [1, 3]])
    beyond = Call(REBUILD, Stored("0", 4, view=(("9", 3, 2),)), 0, (1,), (1,), False, {})
    with pytest.raises(ValueError, match=r"a\.pth is refused: storage '0' claims 20 bytes but has 16"):
        torch_files.load(write_legacy(tmp_path / "a.pth", {"w": beyond}))


NAMESPACE = Global("argparse", "Namespace")
ORDERED = Global("collections", "OrderedDict")
HOSTILE = {
    "reduce": lambda mark: (Call(Global("os", "system"), f"touch {mark}"), "os.system"),
    "posix": lambda mark: (Call(Global("posix", "system"), f"touch {mark}"), "posix.system"),
    "eval": lambda mark: (Call(Global("builtins", "eval"), f"open({str(mark)!r}, 'w')"), "builtins.eval"),
    "python 2 eval": lambda mark: (Call(Global("__builtin__", "eval"), f"open({str(mark)!r}, 'w')"), "__builtin__.eval"),
    "getattr": lambda mark: (Call(Global("builtins", "getattr"), NAMESPACE, "__class__"), "builtins.getattr"),
    "nested load": lambda mark: (Call(Global("torch.storage", "_load_from_bytes"), b""), "torch.storage._load_from_bytes"),
    "torch's own": lambda mark: (Global("torch.hub", "load"), "torch.hub.load"),
    "numpy's own": lambda mark: (Global("numpy", "load"), "numpy.load"),
    "dotted": lambda mark: (
        b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "collections.OrderedDict.fromkeys"
    ),
    "dotted module": lambda mark: (
        b"\x80\x04\x8c\x08argparse\x8c\x0e_sys.modules.x\x93.", "argparse._sys.modules.x"
    ),
    "inst": lambda mark: (b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.", "os.system"),
    "obj": lambda mark: (b"(cos\nsystem\nS'touch " + str(mark).encode() + b"'\no.", "os.system"),
    "within arguments": lambda mark: (
        {"args": Call(NAMESPACE, state={"x": Call(Global("os", "system"), f"touch {mark}")})}, "os.system"
    ),
}  # fmt: skip


@WRITERS
@pytest.mark.parametrize("trick", HOSTILE)
def test_anything_else_is_refused_by_name_and_never_run(tmp_path, write, trick):
    mark = tmp_path / "ran"
    value, name = HOSTILE[trick](mark)
    path = write(tmp_path / "hostile.pth", value)
    with pytest.raises(ValueError, match="nothing was run") as error:
        torch_files.load_tree(path)
    assert str(error.value).startswith(f"{path} is refused: it asks for {name!r}")
    assert not mark.exists()


def test_the_same_pickle_does_run_where_it_is_trusted(tmp_path):
    """Proves that the hostile pickles above would do what they say."""
    value, _ = HOSTILE["reduce"](tmp_path / "ran")
    pickle.loads(pickled(value))
    assert (tmp_path / "ran").exists()


# BUILD with a pair sets attributes one by one, with a dict it fills __dict__, and __setstate__ takes what it is given.
TABLE = list(torch_pickle._GLOBALS)


@pytest.mark.parametrize("place", TABLE, ids=[".".join(place) for place in TABLE])
@pytest.mark.parametrize(
    "state", [{"_run": 1}, (None, {"_run": 1, "__setstate__": 2, "__new__": 3}), ({"a": 1}, None), [1]]
)
def test_no_state_can_change_what_pickles_reach(tmp_path, place, state):
    stand_in = torch_pickle._GLOBALS[place]
    watched = ("_run", "__setstate__", "__new__", "a")
    before = [getattr(stand_in, name, None) for name in watched]
    built = pickled(Global(*place))[:-1] + pickled(state)[2:-1] + b"b."
    with pytest.raises(ValueError, match=r"hostile\.pth"):
        torch_files.load_tree(write_zip(tmp_path / "hostile.pth", built))
    assert [getattr(stand_in, name, None) for name in watched] == before


def test_states_of_stand_ins_are_let_fall(tmp_path):
    evil = {"__setstate__": Global("collections", "OrderedDict"), "items": NAMESPACE, "__class__": NAMESPACE}
    value = {"d": Call(ORDERED, [["a", 1]], state=evil), "n": Call(NAMESPACE, state=(evil, evil)), "w": tensor()}
    tree = torch_files.load_tree(write_zip(tmp_path / "a.pth", value))
    assert tree["d"] == {"a": 1}
    assert type(tree["d"]) is dict
    assert type(tree["n"]) is torch_files.NotRead
    for made in (tensor(), Global("torch", "float32"), Call(Global("torch", "Size"), (1,))):
        value = pickled(made)[:-1] + pickled({"x": 1})[2:-1] + b"b."
        with pytest.raises(ValueError, match=r"a\.pth is damaged"):
            torch_files.load_tree(write_zip(tmp_path / "a.pth", value))


def test_the_table_holds_nothing_real():
    for (module, name), thing in torch_pickle._GLOBALS.items():
        made_here = (
            type(thing).__module__ == torch_pickle.__name__
            or getattr(thing, "__module__", None) == torch_pickle.__name__
        )
        assert made_here or thing == f"{module}.{name}", (module, name)


@WRITERS
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (tensor(offset=1), "reaches beyond the 4 elements"),
        (tensor(shape=(2, 3), strides=(2, 1)), "reaches beyond the 4 elements"),
        (tensor(shape=(2,), strides=(2**61,)), "reaches beyond"),
        (tensor(shape=(10**12,), strides=(0,)), "reaches beyond"),
        (tensor(shape=(2**40,) * 3, strides=(0, 0, 0)), "reaches beyond"),
        (tensor(shape=(1,) * 65, strides=(1,) * 65), "a few non-negative integers"),
        (tensor(shape=(2,), strides=(-1,), offset=3), "non-negative"),
        (tensor(offset=-1), "non-negative"),
        (tensor(shape=(2.0,)), "non-negative"),
        (tensor(shape=(2**5000,)), "non-negative"),
        (tensor(shape=(2, 2)), r"shape \(2, 2\) but strides \(1,\)"),
        (tensor(count=2**62, shape=(5,)), None),
        (tensor(key="7"), None),
        (Call(REBUILD, "0", 0, (1,), (1,), False, {}), "no storage"),
        (Call(REBUILD, Stored("0", 4), 0, (1,), (1,), False, {}, {"neg": True}), "resolve_neg"),
        (Call(Global("torch._utils", "_rebuild_parameter"), 5, True, {}), "no tensor"),
        (Call(REBUILD, Stored("0", 4, "ComplexFloatStorage"), 0, (1,), (1,), False, {}), "'torch.ComplexFloatStorage'"),
    ],
)
def test_tensors_that_claim_more_than_there_is(tmp_path, write, made, message):
    path = write(tmp_path / "a.pth", {"w": made})
    with pytest.raises(ValueError, match=message or r"missing|claims|damaged") as error:
        torch_files.load(path)
    assert str(error.value).startswith(str(path))


@WRITERS
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"\x80\x02\x82\x01.", "uses EXT1"),
        (b"\x80\x05\x97.", "uses NEXT_BUFFER"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "places in memory"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "cut short"),
        (b"\x80\x02]" + b"]" * 5000 + b"a" * 5000 + b".", "nested too deeply"),
        (b"\x80\x02]q\x01h\x01a.", "contains itself"),
        (b"\x80\x02(NNNQ.", "something else than a storage"),
        (b"\x80\x02(NNNtR.", "damaged"),
        (b"\x80\x02X\x03\x00\x00\x00abcQ.", "something else than a storage"),
        (b"\x80\x02}}Ns.", "damaged"),
        (b"S'\\q'\n]]s.", "damaged"),
        (b"", "damaged, cut short"),
    ],
)
def test_pickles_that_are_odd(tmp_path, write, body, message):
    path = write(tmp_path / "a.pth", body, {})
    with pytest.raises(ValueError, match=message) as error:
        torch_files.load_tree(path)
    assert str(error.value).startswith(str(path))


def test_a_bomb_of_shared_lists_stays_small(tmp_path):
    body = b"\x80\x02]q\x00N" + b"a" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(200)) + b"."
    tree = torch_files.load_tree(write_zip(tmp_path / "a.pth", body))
    assert tree[0] is tree[1]


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth", "dino_training.pth"])
def test_every_cut_is_noticed(folder, tmp_path, name):
    whole = (folder / name).read_bytes()
    path = tmp_path / "cut.pth"
    for length in {0, 1, 2, 3, 20, len(whole) - 1, *range(50, len(whole), len(whole) // 40)}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pth"):
            torch_files.load_tree(path)


def refusal(path):
    try:
        torch_files.load_tree(path)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("name", ["zip.pth", "legacy.pth"])
def test_flipped_bytes_are_read_or_refused_in_words(folder, tmp_path, name):
    whole = (folder / name).read_bytes()
    path = tmp_path / "flipped.pth"
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(whole), 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ int(rng.integers(1, 256))]) + whole[place + 1 :])
        message = refusal(path)
        assert message is None or str(path) in message
        refused += message is not None
    assert refused > 50


def test_what_is_no_pytorch_file(folder, tmp_path):
    def refused(path, message):
        with pytest.raises(ValueError, match=message) as error:
            files.read(path, "model")
        assert str(path) in str(error.value)

    text = tmp_path / "a.bin"
    text.write_text("These are no weights but a text about weights.\n" * 9)
    refused(text, "no file of torch.save")
    text.write_bytes(pickle.dumps({"a": 1}, 2))
    refused(text, "starts with another pickle")
    text.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1000, 2))
    refused(text, "protocol 1001")
    refused(write_legacy(text, {}, {}, {"little_endian": False}), "not little-endian")
    refused(write_legacy(text, {"w": tensor()}, {}), "missing")
    refused(write_legacy(text, {"w": tensor()}, {"0": FOUR[:12]}), "has 3 elements, not 4")
    refused(write_legacy(text, {"w": 1}, {"0": FOUR}), "has 4 elements, not None")
    refused(folder / "torchscript.pt", "TorchScript")
    with zipfile.ZipFile(text, "w") as archive:
        archive.writestr("a.txt", "")
    refused(text, "none of torch.save")
    refused(write_zip(text, {"w": tensor()}, byteorder=b"big"), "byte order b'big'")
    refused(write_zip(text, {"w": tensor()}, {}), "storage '0' is missing")
    refused(write_zip(text, {"w": tensor()}, {"0": FOUR[:8]}), "claims 16 bytes but has 8")
    refused(text.with_suffix(".pkl"), "not .pkl")
    refused(text.with_suffix(".pt"), "no file")


def test_zip_bombs(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(ValueError, match=r"a\.pth: entry 'archive/data\.pkl' is compressed"):
        torch_files.load_tree(path)
    body = bytearray(write_zip(path, {"w": tensor()}).read_bytes())
    at = body.index(b"PK\x01\x02")
    at = body.index(b"PK\x01\x02", body.index(b"archive/data/0", at) - 50)
    body[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # compressed and uncompressed size
    path.write_bytes(body)
    with pytest.raises(ValueError, match=r"a\.pth is damaged: entry 'archive/data/0' claims 2147483648 bytes"):
        torch_files.load_tree(path)


ONE, TWO = {"a": np.ones(2)}, {"b": np.ones(3)}


@pytest.mark.parametrize("key", torch_files.USUAL_KEYS)
def test_state_dicts_under_the_usual_keys(key):
    assert torch_files.state_dict({"epoch": 1, key: ONE, "other": TWO, "queue": np.ones(1)}, "it") == ONE


def test_which_state_dict():
    state_dict = torch_files.state_dict
    assert list(state_dict({"a": np.ones(2), "args": torch_files.NotRead(), "n": 3}, "it")) == ["a"]
    assert state_dict({"model": ONE, "ema": TWO}, "it", "ema") == TWO
    with pytest.raises(ValueError, match=r"it holds several state dicts, 'model' \(1 tensors\), 'ema' \(1 tensors\)"):
        state_dict({"model": ONE, "ema": TWO}, "it")
    with pytest.raises(
        ValueError, match=r"it has no tensors under key='emma'; it holds 'model' \(1 tensors\), 'epoch'"
    ):
        state_dict({"model": ONE, "epoch": 3}, "it", "emma")
    with pytest.raises(ValueError, match=r"no tensors at its top level or under .*it holds 'encoder' \(1 tensors\)"):
        state_dict({"encoder": ONE}, "it")
    with pytest.raises(ValueError, match="it holds a list"):
        state_dict([1], "it")


def test_mixed_prefixes_name_both():
    mixed = {"module.cls_token": 1, "pos_embed": 2}
    with pytest.raises(ValueError, match=r"it mixes names with and without 'module\.': module\.cls_token .* pos_embed"):
        names.bare_vit_names(mixed, "it")
    mixed = {"backbone.cls_token": 1, "pos_embed": 2, "head.mlp.0.bias": 3}
    with pytest.raises(ValueError, match=r"without 'backbone\.': backbone\.cls_token \.\.\. but pos_embed \.\.\."):
        names.bare_vit_names(mixed, "it")
    with pytest.raises(ValueError, match=r"head\.weight twice"):
        names.bare_vit_names({"backbone.head.weight": 1, "head.weight": 2}, "it")
    assert names.bare_vit_names({"module.backbone.a": 1, "module.head.b": 2}, "it") == {"a": 1, "head.b": 2}
    assert names.bare_vit_names({"vit.a": 1}, "it") == {"a": 1}
    assert names.bare_vit_names({"a": 1, "head.b": 2}, "it") == {"a": 1, "head.b": 2}


def as_torch(path, state):
    """A .bin with a state dict of float32 arrays, as a repository would have it."""
    held = {n: tensor(n, v.size, 0, v.shape, tuple(s // 4 for s in v.strides)) for n, v in state.items()}
    return write_zip(path, held, {n: np.ascontiguousarray(v).tobytes() for n, v in state.items()})


def test_hugging_face_folders_of_bin_files(goldens, tmp_path):
    vit = shutil.copytree(goldens / "hf_vit_dino", tmp_path / "vit")
    _, whole = load_vit(str(vit))
    state = load_file(vit / "model.safetensors")
    as_torch(vit / "pytorch_model.bin", {n: 0 * v for n, v in state.items()})
    same = jax.tree.map(np.array_equal, whole, load_vit(str(vit))[1])
    assert jax.tree.all(same)  # safetensors come first
    (vit / "model.safetensors").unlink()
    as_torch(vit / "pytorch_model.bin", state)
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, load_vit(str(vit))[1]))
    (vit / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"none of model\.safetensors, .*pytorch_model\.bin"):
        load_vit(str(vit))
    half = sorted(state)[:9]
    parts = {"pytorch_model-1.bin": half, "pytorch_model-2.bin": [n for n in state if n not in half]}
    for part, held in parts.items():
        as_torch(vit / part, {n: state[n] for n in held})
    index = {"weight_map": {n: part for part, held in parts.items() for n in held}}
    (vit / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert jax.tree.all(jax.tree.map(np.array_equal, whole, load_vit(str(vit))[1]))
    (vit / "pytorch_model-2.bin").unlink()
    with pytest.raises(ValueError, match=r"lacks pytorch_model-2\.bin"):
        load_vit(str(vit))


def test_diffusers_folder_of_a_bin_file(goldens, tmp_path):
    kl = shutil.copytree(goldens / "diffusers_autoencoder_kl", tmp_path / "kl")
    state = load_file(kl / "diffusion_pytorch_model.safetensors")
    (kl / "diffusion_pytorch_model.safetensors").unlink()
    as_torch(kl / "diffusion_pytorch_model.bin", state)
    found, told = files.read(kl, "diffusion_pytorch_model")
    assert told["_class_name"] == "AutoencoderKL"
    assert jax.tree.all(jax.tree.map(np.array_equal, dict(state), found))


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


def test_dropped_heads_are_accounted_for(folder):
    state = torch_files.load(folder / "dino_training.pth")
    _, _, account = convert_vit(state, None, 0, "it")
    heads = {name.removeprefix("module.") for name in state if "head." in name}
    assert heads
    assert set(account.dropped) == heads
    assert len(account.loaded) + len(account.dropped) == len(state)

"""Checkpoints of every format: the same numbers out of them, and nothing else."""

import copyreg
import filecmp
import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fuzz_weights
import numpy as np
import pytest
from safetensors.numpy import save

from featcache.backbones import weights
from featcache.backbones.architectures import get_backbone
from featcache.backbones.checkpoints import parse_checkpoint, read_checkpoint
from featcache.backbones.loading import load_weights
from featcache.backbones.pretrained import IMAGENET, Source, cache_folder, source_urls
from featcache.backbones.weights import Weights, save_weights
from featcache.errors import OutputError, RecipeError, WeightsError
from featcache.preprocess import Preprocess
from featcache.progress import silent

pytestmark = pytest.mark.numpy1  # its bytes or draws may depend on NumPy

DATA = Path(__file__).parent / "data" / "weights"
State = dict[str, np.ndarray]


def expected(name: str) -> State:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def assert_same(found: State, wanted: State) -> None:
    assert list(found) == list(wanted)
    for key, array in wanted.items():
        assert (found[key].dtype, found[key].shape) == (array.dtype, array.shape), key
        np.testing.assert_array_equal(found[key], array)


def zeros(backbone: str, dtype: str) -> State:
    return {key: np.zeros(shape, dtype) for key, shape in get_backbone(backbone).shapes().items()}


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def folder_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def legacy_files(state: State) -> dict[str, bytes]:
    """The checkpoint of an older OneFlow: one folder per tensor, by its name."""
    kinds = {"float32": "kFloat", "float16": "kFloat16", "int64": "kInt64"}
    files = {"snapshot_done": b""}
    for name, array in state.items():
        dims = "".join(f"  dim: {dim}\n" for dim in array.shape)
        kind = kinds[str(array.dtype)]
        files[f"{name}/meta"] = f"shape {{\n{dims}}}\ndata_type: {kind}\n".encode()
        files[f"{name}/out"] = array.tobytes()
    return files


def refusal(function: Callable[[], object]) -> str:
    """The message of the WeightsError that a call raises: one line, of a length to read."""
    with pytest.raises(WeightsError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


def short(value: object) -> str | None:
    """The name of a test by its bytes, of which there may be millions."""
    return ascii(value[:6]) if isinstance(value, bytes) else None


@pytest.fixture(scope="session")
def resnet18_bytes() -> bytes:
    """A ResNet-18 of zeros as a safetensors file, 22 MB."""
    return save(zeros("resnet18", "float16"))


@pytest.fixture(autouse=True)
def user_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for every test, in which nothing has been downloaded."""
    for name in ("FEATCACHE_WEIGHTS", "XDG_CACHE_HOME", "TORCH_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(home / "user"))
    monkeypatch.setenv("no_proxy", "*")
    return home / "user"


# --- what comes with featcache -------------------------------------------------------------


def test_the_starter_is_complete() -> None:
    starter = load_weights("tinyimagenet32")
    assert starter.name == "tinyimagenet32"
    assert starter.backbone == "resnet18"
    assert starter.sha256 == "bc5d0b3bf583fe2bac262b92f51a476fd5991cab725ef92d18ea45e8500d4fc0"
    assert starter.preprocess == Preprocess(64)
    assert "Tiny-ImageNet" in starter.source
    assert len(starter.state) == 122
    assert list(starter.state)[-2:] == ["fc.weight", "fc.bias"]
    assert starter.state["fc.weight"].shape == (200, 512)
    assert {str(array.dtype) for array in starter.state.values()} == {"float32", "int64"}
    assert all(array.flags.owndata and array.flags.writeable for array in starter.state.values())
    assert "array" not in repr(starter)


def test_a_damaged_starter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_STARTER_SHA256", "0" * 64)
    message = refusal(lambda: load_weights("tinyimagenet32"))
    assert "0" * 64 in message
    assert "bc5d0b3b" in message
    assert "install featcache again" in message


def test_a_starter_that_was_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_STARTER_FILE", "gone.safetensors")
    assert "found none" in refusal(lambda: load_weights("tinyimagenet32"))


def test_no_framework_is_imported() -> None:
    code = (
        "import sys; from featcache.backbones.loading import load_weights\n"
        "load_weights('tinyimagenet32'); "
        "print({'torch', 'oneflow', 'flowvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


# --- formats -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "arrays"),
    [
        ("tensors-zip.pth", "tensors"),
        ("tensors-stream.pth", "tensors"),
        ("training.pth", "training"),  # nested, "module." before each name, an optimizer beside
        ("oneflow", "oneflow"),
    ],
)
def test_real_files_hold_what_their_framework_wrote(file: str, arrays: str) -> None:
    assert_same(dict(read_checkpoint(DATA / file).state), expected(arrays))


def test_a_zip_of_a_oneflow_folder() -> None:
    files = {**folder_files(DATA / "oneflow"), "__MACOSX/oneflow/._pickled_data": b"x"}
    data = zipped(files, zipfile.ZIP_DEFLATED)
    assert_same(dict(parse_checkpoint(data, ".zip", "x.zip").state), expected("oneflow"))


def test_an_older_oneflow_folder(tmp_path: Path) -> None:
    state = {"bias": np.ones(3, "f4"), "step": np.asarray(7), "weight": np.eye(3, dtype="f4")}
    for name, data in legacy_files(state).items():
        (tmp_path / "old" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / name).write_bytes(data)
    assert_same(dict(read_checkpoint(tmp_path / "old").state), state)
    flat = parse_checkpoint(zipped(legacy_files(state)), ".zip", "x.zip").state
    assert_same(dict(flat), state)


def test_the_digest_of_a_folder_is_what_sha256sum_prints(tmp_path: Path) -> None:
    copy = tmp_path / "model.pth"  # flow.save makes a folder of whatever it is told
    shutil.copytree(DATA / "oneflow", copy)
    lines = [
        f"{hashlib.sha256(data).hexdigest()}  {name.removeprefix('model.pth/')}\n"
        for name, data in sorted(folder_files(copy).items())
    ]
    digest = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert read_checkpoint(copy).sha256 == digest
    (copy / "tensor_99").mkdir()
    (copy / "tensor_99" / "out").write_bytes(b"left by an earlier save")
    assert read_checkpoint(copy).sha256 == digest


def test_a_big_endian_file() -> None:
    with zipfile.ZipFile(DATA / "training.pth") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    for name, data in files.items():
        if "/data/" in name:
            files[name] = np.frombuffer(data, "<f4").astype(">f4").tobytes()
        if name.endswith("byteorder"):
            files[name] = b"big"
    found = parse_checkpoint(zipped(files), ".pth", "x.pth").state
    for key, array in expected("training").items():
        np.testing.assert_array_equal(found[key], array)


def test_bfloat16_safetensors_are_widened() -> None:
    numbers = np.array([1.5, -2.0, 3e38], np.float32)
    halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    header = b'{"x":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]}}'
    data = len(header).to_bytes(8, "little") + header + halves.tobytes()
    found = parse_checkpoint(data, ".safetensors", "x").state["x"]
    np.testing.assert_allclose(found, numbers, rtol=2**-7)
    assert found.dtype == np.float32
    narrow = data.replace(b"BF16", b"I16 ").replace(b'"I16 "', b'"U16" ')
    assert "U16" in refusal(lambda: parse_checkpoint(narrow, ".safetensors", "x"))


# --- saved by featcache --------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    starter = load_weights("tinyimagenet32")
    state = {**starter.state, "fc.weight": np.ones((512, 3), np.float32).T, "fc.bias": np.ones(3)}
    preprocess = Preprocess(96, (0.5, 0.25, 0.125), (1.0, 2.0, 4.0))
    keep = {"method": "full", "epoch": "3"}
    save_as = partial(
        save_weights, state=state, backbone="resnet18", preprocess=preprocess, metadata=keep
    )
    path = save_as(tmp_path / "runs" / "my model (1).safetensors")
    loaded = load_weights(str(path))
    assert (loaded.name, loaded.backbone) == ("my-model-1", "resnet18")
    assert (loaded.preprocess, loaded.source) == (preprocess, str(path))
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert list(loaded.state) == list(starter.state)
    for key, array in state.items():
        np.testing.assert_array_equal(loaded.state[key], array)
    assert read_checkpoint(path).metadata["epoch"] == "3"
    assert filecmp.cmp(save_as(tmp_path / "again.safetensors"), path, shallow=False)
    assert sorted(p.name for p in tmp_path.rglob("*.safetensors*")) == [
        "again.safetensors",
        "my model (1).safetensors",
    ]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    state = load_weights("tinyimagenet32").state
    (tmp_path / "file").write_bytes(b"")
    save_as = partial(save_weights, backbone="resnet18", preprocess=Preprocess())
    with pytest.raises(OutputError, match="cannot be written"):
        save_as(tmp_path / "file" / "x.safetensors", state)
    with pytest.raises(OutputError, match=r"ends in \.safetensors, found '\.pth'"):
        save_as(tmp_path / "x.pth", state)
    without = {key: array for key, array in state.items() if key != "conv1.weight"}
    with pytest.raises(WeightsError, match="found no such tensor"):
        save_as(tmp_path / "x.safetensors", without)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "preprocess",
    [
        "no json",
        "[]",
        "null",
        "[" * 100_000,
        '{"size": 64}',
        '{"size": 64, "mean": [0, 0], "std": [1, 1, 1]}',
        '{"size": 64, "mean": [0, 0, 0], "std": [1, 0, 1]}',
        '{"size": 64, "mean": [0, NaN, 0], "std": [1, 1, 1]}',
        '{"size": 64.5, "mean": [0, 0, 0], "std": [1, 1, 1]}',
        '{"size": 8, "mean": [0, 0, 0], "std": [1, 1, 1]}',
        '{"size": 1000000, "mean": [0, 0, 0], "std": [1, 1, 1]}',
        '{"size": 64, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "cubic"}',
    ],
)
def test_nonsense_about_preprocessing_is_refused(tmp_path: Path, preprocess: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"x": np.zeros(1)}, {"featcache.preprocess": preprocess}))
    message = refusal(lambda: load_weights(path))
    assert "featcache.preprocess" in message
    assert str(path) in message


def test_another_backbone_in_the_metadata_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save({"x": np.zeros(1)}, {"featcache.backbone": "resnet50"}))
    assert "use --backbone resnet50" in refusal(lambda: load_weights(path))


# --- files that are not what they should be ------------------------------------------------


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(zeros("resnet34", "int8")))
    message = refusal(lambda: load_weights(path))
    assert str(path) in message
    assert "use --backbone resnet34" in message
    assert load_weights(path, "resnet34").backbone == "resnet34"
    assert "--backbone resnet18" in refusal(lambda: load_weights("tinyimagenet32", "resnet34"))
    with pytest.raises(RecipeError, match="found 'vgg'"):
        load_weights("tinyimagenet32", "vgg")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    state = zeros("resnet18", "float16")
    state["bn1.weight"][5] = np.nan
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(state))
    assert "found NaN or infinity in 'bn1.weight'" in refusal(lambda: load_weights(path))


def test_a_negative_variance(tmp_path: Path) -> None:
    state = zeros("resnet18", "float16")
    state["layer2.0.bn1.running_var"][5] = -0.5
    path = tmp_path / "x.safetensors"
    path.write_bytes(save(state))
    message = refusal(lambda: load_weights(path))
    assert "found -0.5 in 'layer2.0.bn1.running_var'" in message


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "found no such file; did you mean imagenet?" in refusal(lambda: load_weights("imagnet"))
    assert "found no such file" in refusal(lambda: load_weights(Path("imagenet")))
    assert "found neither" in refusal(lambda: load_weights(tmp_path / "empty"))
    assert "found the suffix '.txt'" in refusal(lambda: load_weights(tmp_path / "notes.txt"))
    assert "expected a file" in refusal(lambda: load_weights(tmp_path / "pipe.pth"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".zip"])
@pytest.mark.parametrize(
    "data", [b"", b"\x80", b"hello\n" * 99, b"PK\x03\x04" * 99, b"\xff" * 99], ids=short
)
def test_files_that_are_something_else(tmp_path: Path, suffix: str, data: bytes) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(data)
    assert str(path) in refusal(lambda: load_weights(path))


def test_torn_files() -> None:
    whole = {
        ".safetensors": save({"x": np.arange(99.0)}, {"a": "b"}),
        "-zip.pth": (DATA / "tensors-zip.pth").read_bytes(),
        "-stream.pth": (DATA / "tensors-stream.pth").read_bytes(),
        ".zip": zipped(folder_files(DATA / "oneflow")),
    }
    for name, data in whole.items():
        suffix = Path(f"x{name}").suffix
        parse_checkpoint(data, suffix, name)
        for end in range(0, len(data), 41):
            assert name in refusal(partial(parse_checkpoint, data[:end], suffix, name))


@pytest.mark.parametrize("seed", fuzz_weights.SEEDS)
def test_what_a_file_can_make_its_readers_raise(tmp_path: Path, seed: str) -> None:
    path = fuzz_weights.SEEDS[seed](tmp_path)
    message = refusal(lambda: fuzz_weights.read(path))
    assert str(path) in message
    assert "expected at most" in message or seed != "a bomb"


def test_a_flipped_bit_in_an_archive() -> None:
    data = bytearray((DATA / "tensors-zip.pth").read_bytes())
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        first = archive.read(next(n for n in archive.namelist() if n.endswith("/data/0")))
    data[data.index(first)] ^= 1
    assert "Bad CRC-32" in refusal(lambda: parse_checkpoint(bytes(data), ".pth", "x.pth"))


def test_a_checkpoint_of_something_else() -> None:
    for value, found in [([], "a list"), ({}, "an empty one"), ({"a": 1}, "int at 'a'")]:
        data, suffix = CONTAINERS["zip"](pickle.dumps(value, 2))
        assert found in refusal(partial(parse_checkpoint, data, suffix, "x"))
    for value, found in [
        ([], "protocol 1"),
        ({"protocol_version": 2}, "protocol 1"),
        ({"protocol_version": 1, "data": {"a": 1}}, "int at 'a'"),
    ]:
        data, suffix = CONTAINERS["oneflow"](pickle.dumps(value, 2))
        assert found in refusal(partial(parse_checkpoint, data, suffix, "x"))
    two_numbers = pickle.dumps(1, 2) + pickle.dumps(2, 2)
    assert "found something else" in refusal(lambda: parse_checkpoint(two_numbers, ".pth", "x"))


# --- files that mean harm ------------------------------------------------------------------

STREAM_HEAD = (  # a magic number, the protocol, the machine
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    + pickle.dumps(1001, 2)
    + pickle.dumps({"little_endian": True}, 2)
)
CONTAINERS: dict[str, Callable[[bytes], tuple[bytes, str]]] = {
    "zip": lambda program: (zipped({"x/data.pkl": program, "x/data/0": bytes(16)}), ".pth"),
    "stream": lambda program: (STREAM_HEAD + program, ".pth"),
    "bare": lambda program: (program, ".pth"),
    "oneflow": lambda program: (zipped({"x/pickled_data": program}), ".zip"),
}


class Call:
    """Pickles itself as a call."""

    def __init__(self, function: Callable[..., object], argument: str) -> None:
        self.call = function, (argument,)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return self.call


def text(words: str) -> bytes:
    return b"X" + len(words).to_bytes(4, "little") + words.encode()


def attacks(sentinel: Path) -> dict[str, bytes]:
    """Programs that make the file ``sentinel`` when Python's own pickle module reads them."""
    touch = f"touch '{sentinel}'"
    namespace = b"ctypes\nSimpleNamespace\n)R}" + text("__setstate__") + b"cos\nsystem\nsb"
    return {
        "REDUCE, protocol 2": pickle.dumps(Call(os.system, touch), 2),
        "REDUCE, protocol 4": pickle.dumps({"state_dict": Call(os.system, touch)}, 4),
        "exec": pickle.dumps(Call(exec, f"open({str(sentinel)!r}, 'w').close()"), 2),
        "INST": b"(" + text(touch) + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + text(touch) + b"o.",
        "EXT1": b"\x80\x02\x82\xf0(" + text(touch) + b"tR.",
        "BUILD": namespace + text(touch) + b"b.",
    }


# A tuple that holds the one before twice, 64 times over: to print it would take forever.
LAUGHS = b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(64))


@pytest.fixture
def extension() -> Iterator[None]:
    """A program may also name what any module has registered with copyreg."""
    copyreg.add_extension("os", "system", 0xF0)
    yield
    copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("attack", attacks(Path("x")))
def test_no_attack_runs(tmp_path: Path, attack: str) -> None:
    sentinel = tmp_path / "harm"
    program = attacks(sentinel)[attack]
    pickle.loads(program)
    assert sentinel.exists(), "the attack is not one"
    sentinel.unlink()
    for wrap in CONTAINERS.values():
        data, suffix = wrap(program)
        message = refusal(partial(parse_checkpoint, data, suffix, "x"))
        assert "nothing was executed" in message
        assert any(word in message for word in ("system", "exec", "types", "EXT1", "INST"))
        assert not sentinel.exists()


@pytest.mark.parametrize(
    ("program", "found"),
    [
        (b"ctorch\nFloatStorage\n)R.", "call of 'torch.FloatStorage'"),
        (text("torch") + b")R.", "call of str"),
        (b"ctorch\nFloatStorage\n}b.", "gives a state to what has none"),
        (b"ctorch\nFloatStorage\n(N}t\x86b.", "damaged"),
        (text("x") + b")\x81.", "makes an object of what is no class"),
        (text("torch._utils") + text("_rebuild_tensor_v2.__globals__") + b"\x93.", "__globals__"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNt" + b"R.", "description is not one"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "missing 4 required positional arguments"),
        (text("storage") + b"Q.", "damaged"),
        (b"(" + text("module") + b"NNNKxtQ.", "damaged"),
        (b"\x80\x02B\x01\x00\x00\x00a.", "found a bytes"),
        (b"N" + text("a") + b"Ns.", "what is no dictionary"),
        (b"}Na.", "what is no list"),
        (b"R.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"X\xff\xff\xff\x7fa.", "damaged"),
        (b"Nr\xff\xff\xff\xff.", "a NoneType"),  # a memo of 2^32 places
        (b"})" + b"\x85" * 300_000 + b"Ns.", "a key is a tuple"),  # hashing it would crash
        (b"]" * 50_000 + b"a" * 49_999 + b".", "a list"),
        (LAUGHS + LAUGHS + b"\x93.", "no text"),
        (b"(" + text("storage") + b"ctorch\nFloatStorage\n" + LAUGHS + b"NK\x01tQ.", "damaged"),
        (b"c" + b"x" * 500_000 + b"\n\x1b[31m\n.", "xxx..."),
    ],
    ids=short,
)
def test_programs_that_make_no_sense(program: bytes, found: str) -> None:
    data, suffix = CONTAINERS["zip"](program)
    message = refusal(lambda: parse_checkpoint(data, suffix, "x"))
    assert found in message
    assert message.isprintable()


def test_a_program_without_end() -> None:
    for name, wrap in CONTAINERS.items():
        data, suffix = wrap(text("x" * 100_000) * 11 + b".")
        message = refusal(partial(parse_checkpoint, data, suffix, "x"))
        assert ("at most 1,048,576" if name in ("zip", "oneflow") else "damaged") in message


@pytest.mark.parametrize(
    ("length", "offset", "shape", "strides", "found"),
    [
        (4, 0, (2, 2), (2, 1), None),
        (4, 3, (0, 5), (5, 1), None),
        (4, 0, (2, 2), (3, 1), "beyond its storage"),
        (4, 1, (2, 2), (2, 1), "beyond its storage"),
        (4, 0, (2**29,), (0,), "beyond its storage"),
        (4, 0, (2**40,), (0,), "impossible shape"),
        (4, 0, (0, 2**20, 2**20), (1, 1, 1), "impossible shape"),
        (4, 0, (1,) * 9, (1,) * 9, "impossible shape"),
        (4, 0, (-1, 2), (2, 1), "impossible shape"),
        (4, 0, (2, 2), (-2, 1), "description is not one"),
        (4, -1, (2, 2), (2, 1), "description is not one"),
        (4, 0, (2, 2), (1,), "description is not one"),
        (-4, 0, (2, 2), (2, 1), "description is not one"),
        (2**70, 0, (2**20, 2**20), (2**20, 1), "description is not one"),
        (2**28, 0, (2**28,), (1,), "found 16"),
        (3, 0, (3,), (1,), "at most 12 bytes"),
    ],
)
def test_tensors_that_ask_for_more_than_there_is(
    length: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], found: str | None
) -> None:
    def number(value: int) -> bytes:
        return b"\x8a\x0c" + value.to_bytes(12, "little", signed=True)

    def numbers(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    tensor = storage + number(length) + b"tQ" + number(offset) + numbers(shape) + numbers(strides)
    program = b"}" + text("x") + b"ctorch._utils\n_rebuild_tensor_v2\n(" + tensor + b"\x89}tRs."
    data, suffix = CONTAINERS["zip"](program)
    if found is None:
        assert parse_checkpoint(data, suffix, "x").state["x"].shape == shape
    else:
        assert found in refusal(lambda: parse_checkpoint(data, suffix, "x"))
    stream = STREAM_HEAD + program + pickle.dumps(["0"], 2) + (4).to_bytes(8, "little") + bytes(16)
    if found is None:
        assert parse_checkpoint(stream, ".pth", "x").state["x"].shape == shape
    else:
        refusal(lambda: parse_checkpoint(stream, ".pth", "x"))


def test_a_checkpoint_that_python_2_wrote() -> None:
    """Text as bytes, an OrderedDict with its items, and a tensor without gradient or hooks."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x02NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\x00K\x02\x85K\x01\x85tR"
    table = b"\x80\x02ccollections\nOrderedDict\n](](U\x06weight" + tensor + b"ee\x85R."
    numbers = np.array([1.5, 2.5], "<f4")
    data = STREAM_HEAD + table + b"](U\x010e." + (2).to_bytes(8, "little") + numbers.tobytes()
    assert_same(dict(parse_checkpoint(data, ".pth", "x").state), {"weight": numbers})


@pytest.mark.parametrize("place", ["../secret", "/etc", ".", "..", "a/b", "tensor_4\n", "", "\0"])
def test_a_oneflow_path_does_not_leave_the_folder(tmp_path: Path, place: str) -> None:
    shutil.copytree(DATA / "oneflow", tmp_path / "x")
    shutil.copytree(DATA / "oneflow" / "tensor_4", tmp_path / "secret")
    table = tmp_path / "x" / "pickled_data"
    short = len(place.encode()).to_bytes(1, "little")
    frameless = table.read_bytes()[:2] + table.read_bytes()[11:]
    table.write_bytes(frameless.replace(b"\x08tensor_4", short + place.encode()))
    for checkpoint in (
        lambda: read_checkpoint(tmp_path / "x"),
        lambda: parse_checkpoint(zipped(folder_files(tmp_path / "x")), ".zip", "x.zip"),
    ):
        message = refusal(checkpoint)
        assert "the name of a folder inside the checkpoint" in message
        assert "do not use this checkpoint" in message


def test_a_oneflow_link_does_not_leave_the_folder(tmp_path: Path) -> None:
    shutil.copytree(DATA / "oneflow", tmp_path / "x")
    (tmp_path / "x" / "tensor_4" / "out").rename(tmp_path / "out")
    (tmp_path / "x" / "tensor_4" / "out").symlink_to(tmp_path / "out")
    message = refusal(lambda: read_checkpoint(tmp_path / "x"))
    assert f"found a link to {tmp_path / 'out'}" in message


@pytest.mark.parametrize(
    ("file", "data", "found"),
    [
        ("meta", b"shape {\n  dim: 2\n}\ndata_type: kChar\n", "kChar"),
        ("meta", b"shape {\n  dim: -2\n}\ndata_type: kFloat\n", "dim: -2"),
        ("meta", b"shape {\n  dim: 9999999999\n}\ndata_type: kFloat\n", "impossible shape"),
        ("meta", b"shape {\n}" + b" " * 5000, "at most 4,096 bytes"),
        ("meta", b"\xff\x00\x1b[31m", "a shape and a type"),
        ("meta", None, "found none"),
        ("out", bytes(20), "expected 24 bytes in tensor_4/out, found 20"),
        ("out", bytes(50_000_000), "at most 24 bytes"),  # 50 KB in the archive
        ("out", None, "found none"),
    ],
    ids=short,
)
def test_damaged_oneflow_tensors(tmp_path: Path, file: str, data: bytes | None, found: str) -> None:
    shutil.copytree(DATA / "oneflow", tmp_path / "oneflow")
    path = tmp_path / "oneflow" / "tensor_4" / file
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    archive = zipped(folder_files(tmp_path / "oneflow"), zipfile.ZIP_DEFLATED)
    assert found in refusal(lambda: read_checkpoint(tmp_path / "oneflow"))
    assert found in refusal(lambda: parse_checkpoint(archive, ".zip", "x.zip"))


@pytest.mark.parametrize("count", [0, 2])
def test_not_one_checkpoint_in_the_archive(count: int) -> None:
    for mark, suffix in (("pickled_data", ".zip"), ("data.pkl", ".pth")):
        data = zipped({"readme": b""} | {f"{i}/{mark}": b"" for i in range(count)})
        assert f"found {count}" in refusal(partial(parse_checkpoint, data, suffix, "x"))


# --- ImageNet weights ----------------------------------------------------------------------


class Mirror(ThreadingHTTPServer):
    """Serves a folder and remembers what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.requests: list[str] = []
        self.folder = folder
        super().__init__(("127.0.0.1", 0), partial(Pages, directory=str(folder)))

    def source(self, file_name: str, sha256: str | None) -> Source:
        url = f"http://127.0.0.1:{self.server_port}/{file_name}"
        return Source(url, file_name, sha256, "made for a test")


class Pages(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        super().do_GET()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    (tmp_path / "mirror").mkdir()
    with Mirror(tmp_path / "mirror") as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def imagenet(*sources: Source) -> Weights:
    return weights._load_imagenet("resnet18", cache_folder(), {"resnet18": sources}, silent)


def test_a_checked_download_happens_once(mirror: Mirror, resnet18_bytes: bytes) -> None:
    (mirror.folder / "net.safetensors").write_bytes(resnet18_bytes)
    digest = hashlib.sha256(resnet18_bytes).hexdigest()
    source = mirror.source("net.safetensors", digest)
    first = imagenet(source)
    assert (first.name, first.sha256, first.preprocess) == ("imagenet", digest, Preprocess(224))
    assert first.source == f"{source.url} (made for a test)"
    assert imagenet(source).sha256 == digest
    assert mirror.requests == ["/net.safetensors"]
    (cache_folder() / "net.safetensors").write_bytes(b"damaged")
    message = refusal(lambda: imagenet(source))
    for part in (str(cache_folder() / "net.safetensors"), digest, "delete"):
        assert part in message
    assert hashlib.sha256(b"damaged").hexdigest() in message


def test_wrong_bytes_are_no_reason_to_ask_elsewhere(mirror: Mirror) -> None:
    (mirror.folder / "net.safetensors").write_bytes(b"swapped")
    (mirror.folder / "second.safetensors").write_bytes(b"never asked for")
    sources = mirror.source("net.safetensors", "0" * 64), mirror.source("second.safetensors", None)
    assert "sent other bytes" in refusal(lambda: imagenet(*sources))
    assert mirror.requests == ["/net.safetensors"]
    assert not (cache_folder() / "net.safetensors").exists()


def test_a_file_without_a_checksum_is_pinned(mirror: Mirror) -> None:
    state = zeros("resnet18", "float16")
    counters = {key: np.asarray(0) for key in state if key.endswith("num_batches_tracked")}
    served = mirror.folder / "resnet18.zip"
    files = {f"resnet18/{k}": v for k, v in legacy_files(state | counters).items()}
    served.write_bytes(zipped(files, zipfile.ZIP_DEFLATED))
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    sources = mirror.source("gone.pth", "0" * 64), mirror.source("resnet18.zip", None)
    assert imagenet(*sources).sha256 == digest
    cached = cache_folder() / "resnet18.zip"
    pin = cache_folder() / "resnet18.zip.sha256"
    assert pin.read_text() == f"{digest}  resnet18.zip\n"
    assert imagenet(*sources).sha256 == digest

    served.write_bytes(zipped(files))
    other = hashlib.sha256(served.read_bytes()).hexdigest()
    cached.unlink()
    message = refusal(lambda: imagenet(*sources))
    for part in (digest, other, f"delete {pin} if this change is wanted"):
        assert part in message
    assert not cached.exists()

    shutil.copy(served, cached)
    message = refusal(lambda: imagenet(*sources))
    for part in (digest, other, f"delete {cached} to download it again, or {pin} if"):
        assert part in message
    pin.write_text("nonsense")
    assert f"{pin}: expected a sha256, found 'nonsense'" in refusal(lambda: imagenet(*sources))
    pin.unlink()
    assert imagenet(*sources).sha256 == other


def test_what_is_no_checkpoint_is_not_pinned(mirror: Mirror) -> None:
    (mirror.folder / "resnet18.zip").write_bytes(b"<html>Log in to this network</html>")
    source = mirror.source("resnet18.zip", None)
    message = refusal(lambda: imagenet(source))
    assert f"(delete {cache_folder() / 'resnet18.zip'} to download it again)" in message
    assert not (cache_folder() / "resnet18.zip.sha256").exists()


def test_a_copy_of_pytorch_hub_is_taken_if_it_is_whole(
    mirror: Mirror, resnet18_bytes: bytes, user_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(resnet18_bytes).hexdigest()
    source = mirror.source("net.safetensors", digest)
    hub = user_home / ".cache" / "torch" / "hub" / "checkpoints"
    hub.mkdir(parents=True)
    (hub / "net.safetensors").write_bytes(resnet18_bytes)
    assert imagenet(source).sha256 == digest
    (hub / "net.safetensors").write_bytes(b"damaged")
    assert "no source can be reached" in refusal(lambda: imagenet(source))
    moved = user_home / "elsewhere" / "hub" / "checkpoints"
    moved.mkdir(parents=True)
    (moved / "net.safetensors").write_bytes(resnet18_bytes)
    monkeypatch.setenv("TORCH_HOME", str(user_home / "elsewhere"))
    assert imagenet(source).sha256 == digest
    assert mirror.requests == ["/net.safetensors"]


def test_no_network(mirror: Mirror) -> None:
    sources = mirror.source("net.pth", "1" * 64), mirror.source("resnet18.zip", None)
    mirror.shutdown()
    mirror.server_close()
    message = refusal(lambda: imagenet(*sources))
    for part in (
        *(source.url for source in sources),
        "Connection refused",
        f"put net.pth (sha256 {'1' * 64}) into {cache_folder()} by hand",
        "--weights tinyimagenet32",
        "far weaker",
    ):
        assert part in message


def test_a_cache_folder_that_cannot_be_written(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FEATCACHE_WEIGHTS", str(tmp_path / "file" / "folder"))
    message = refusal(lambda: imagenet(mirror.source("net.pth", "1" * 64)))
    assert str(tmp_path / "file" / "folder" / "net.pth") in message
    assert "$FEATCACHE_WEIGHTS names the folder" in message


@pytest.mark.parametrize("backbone", ["resnet34", "resnet50"])
def test_imagenet_weights_of_larger_backbones(mirror: Mirror, backbone: str) -> None:
    state = {
        key: np.zeros(shape, "float16") for key, shape in get_backbone(backbone).shapes().items()
    }
    data = save(state)
    (mirror.folder / f"{backbone}.safetensors").write_bytes(data)
    real = IMAGENET[backbone]
    source = mirror.source(f"{backbone}.safetensors", hashlib.sha256(data).hexdigest())
    loaded = weights._load_imagenet(backbone, cache_folder(), {backbone: [source]}, silent)
    assert (loaded.name, loaded.backbone) == ("imagenet", backbone)
    assert mirror.requests == [f"/{backbone}.safetensors"]
    assert [each.file_name for each in real] == [
        f"{backbone}-{str(real[0].sha256)[:8]}.pth",
        f"{backbone}.zip",
    ]


def test_a_backbone_without_a_source() -> None:
    message = refusal(lambda: weights._load_imagenet("resnet50", cache_folder(), {}, silent))
    assert "found 'resnet50'" in message
    assert "--weights resnet50.pth" in message


def test_a_damaged_file_is_not_taken_for_imagenet(tmp_path: Path) -> None:
    (tmp_path / "resnet18-f37072fd.pth").write_bytes(b"damaged")
    message = refusal(lambda: load_weights("imagenet", cache_dir=tmp_path))
    assert "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec" in message


def test_the_sources() -> None:
    published = {"resnet18": "f37072fd", "resnet34": "b627a593", "resnet50": "0676ba61"}
    assert {*IMAGENET} == {*published}
    for backbone, (pytorch, oneflow) in IMAGENET.items():
        assert pytorch.sha256 is not None and len(bytes.fromhex(pytorch.sha256)) == 32
        assert pytorch.file_name == f"{backbone}-{published[backbone]}.pth"
        assert pytorch.sha256.startswith(published[backbone])
        assert oneflow.sha256 is None and oneflow.file_name == f"{backbone}.zip"
    assert all(url.startswith("https://") for url in source_urls())


def test_where_downloads_go(user_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == user_home / ".cache" / "featcache" / "weights"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/featcache/weights")
    monkeypatch.setenv("FEATCACHE_WEIGHTS", "~/w")
    assert cache_folder() == user_home / "w"

"""Model folders: sharded indices, safe names, links, the Hugging Face cache layout."""

import json
import os

import numpy as np
import pytest
import safetensors.numpy

from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import open_model

ARRAYS = {
    f"layers.{i}.{leaf}": np.full((2, 3), i, np.float32) for i in range(3) for leaf in ("weight", "bias")
}
WEIGHT_MAP = {name: f"model-{int(name[7]) + 1:05d}-of-00003.safetensors" for name in ARRAYS}


def shard_name(i):
    return f"model-{i + 1:05d}-of-00003.safetensors"


def make_sharded(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for shard in set(WEIGHT_MAP.values()):
        arrays = {name: array for name, array in ARRAYS.items() if WEIGHT_MAP[name] == shard}
        safetensors.numpy.save_file(arrays, folder / shard)
    write_index(folder, WEIGHT_MAP)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def refuse(source, code, match):
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=match) as caught:
        open_model(source)
    assert caught.value.code == "HB-" + code
    assert set(os.listdir("/proc/self/fd")) == before
    return str(caught.value)


def test_opens_shards_and_companions(tmp_path):
    folder = make_sharded(tmp_path / "m")
    for name in ("tokenizer.json", "vocab.txt", "notes.txt", "LICENSE", "chat_template.jinja", "spiece.model",
                 "pytorch_model.bin", "README.md", "modeling_own.py", "halfbyte-manifest.json"):  # fmt: skip
        (folder / name).write_text("x")
    with open_model(folder) as model:
        assert model.tensors.keys() == ARRAYS.keys()
        assert model.config == {"model_type": "llama"}
        assert model.weight_bytes == 144
        assert model.companions == [
            "LICENSE", "chat_template.jinja", "modeling_own.py", "spiece.model", "tokenizer.json", "vocab.txt"
        ]  # fmt: skip


def test_opens_one_file_by_its_path(tmp_path):
    safetensors.numpy.save_file(ARRAYS, tmp_path / "weights.safetensors")
    with open_model(tmp_path / "weights.safetensors") as by_file, open_model(tmp_path) as by_folder:
        assert by_file.tensors.keys() == by_folder.tensors.keys() == ARRAYS.keys()
        assert by_file.config is None


TRAVERSALS = [
    "../secret.safetensors",
    "a/../../secret.safetensors",
    "sub/x.safetensors",
    "/etc/passwd.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "\\\\server\\share\\x.safetensors",
    "..\\x.safetensors",
    "a\0.safetensors",
    "a\n.safetensors",
    "x" * 300 + ".safetensors",
    "",
    ".",
    "..",
    "config.json",
    "pytorch_model.bin",
    "link-out.safetensors",
    "link-to-link-out.safetensors",
    "loop.safetensors",
    "fifo.safetensors",
    "folder.safetensors",
    "device.safetensors",
    None,
    3,
    ["a.safetensors"],
]


@pytest.mark.parametrize("name", TRAVERSALS, ids=repr)
def test_unsafe_names_are_refused(name, tmp_path):
    folder = make_sharded(tmp_path / "m")
    safetensors.numpy.save_file(ARRAYS, tmp_path / "secret.safetensors")
    (folder / "sub").mkdir()
    safetensors.numpy.save_file(ARRAYS, folder / "sub" / "x.safetensors")
    (folder / "link-out.safetensors").symlink_to("../secret.safetensors")
    (folder / "link-to-link-out.safetensors").symlink_to("link-out.safetensors")
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "device.safetensors").symlink_to("/dev/zero")
    (folder / "folder.safetensors").mkdir()
    os.mkfifo(folder / "fifo.safetensors")
    write_index(folder, WEIGHT_MAP | {"layers.0.weight": name})
    refuse(folder, "E421", "unsafe file name")


def test_links_inside_the_folder_are_followed(tmp_path):
    folder = make_sharded(tmp_path / "m")
    (folder / shard_name(0)).rename(folder / "real.bin")
    (folder / shard_name(0)).symlink_to("real.bin")
    (tmp_path / "alias").symlink_to("m")
    with open_model(tmp_path / "alias") as model:
        assert len(model.tensors) == 6


def hub_cache(tmp_path, monkeypatch):
    """The layout of huggingface_hub: snapshots/REVISION/file -> ../../blobs/HASH."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    revision = "0123456789abcdef0123456789abcdef01234567"
    snapshot = make_sharded(repository / "snapshots" / revision)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    for i, path in enumerate(sorted(snapshot.iterdir())):
        blob = repository / "blobs" / f"{i:064x}"
        path.rename(blob)
        path.symlink_to(f"../../blobs/{blob.name}")
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return repository, snapshot


def test_hub_cache_is_read_by_name_and_by_path(tmp_path, monkeypatch):
    _, snapshot = hub_cache(tmp_path, monkeypatch)
    for source in ("org/name", snapshot):
        with open_model(source) as model:
            assert len(model.tensors) == 6 and model.config


def test_hub_cache_of_another_repository_is_out_of_bounds(tmp_path, monkeypatch):
    repository, snapshot = hub_cache(tmp_path, monkeypatch)
    other = repository.parent / "models--org--secret" / "blobs"
    other.mkdir(parents=True)
    safetensors.numpy.save_file({"layers.0.weight": np.ones(6, np.float32)}, other / "f")
    (snapshot / shard_name(0)).unlink()
    (snapshot / shard_name(0)).symlink_to(other / "f")
    refuse(snapshot, "E421", "leaves the folder")


def test_hub_reference_cannot_point_elsewhere(tmp_path, monkeypatch):
    repository, _ = hub_cache(tmp_path, monkeypatch)
    (repository / "refs" / "main").write_text("../../../elsewhere")
    text = refuse("org/name", "E401", "neither a folder here")
    assert "hf download org/name" in text


@pytest.mark.parametrize(
    ("change", "code", "match"),
    [
        (lambda m: m.pop("layers.1.bias"), "E422", "lacks"),
        (lambda m: m.update({"layers.9.weight": shard_name(0)}), "E422", "no file has it"),
        (lambda m: m.update({"layers.1.bias": shard_name(0)}), "E422", "it is in"),
        (lambda m: m.update({"layers.1.weight": "missing.safetensors"}), "E401", "missing"),
        (lambda m: m.clear(), "E420", "no weight_map"),
    ],
    ids=["tensor not in the index", "tensor in no file", "tensor in another file", "file missing", "empty"],
)
def test_index_must_agree_with_the_shards(change, code, match, tmp_path):
    folder = make_sharded(tmp_path / "m")
    weight_map = dict(WEIGHT_MAP)
    change(weight_map)
    write_index(folder, weight_map)
    refuse(folder, code, match)


def test_tensor_in_two_shards(tmp_path):
    folder = make_sharded(tmp_path / "m")
    safetensors.numpy.save_file({"layers.0.weight": ARRAYS["layers.0.weight"]}, folder / shard_name(1))
    refuse(folder, "E422", "in two files")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a":' * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"weight_map": 3}', "no weight_map"),
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "same key twice"),
    ],
)
def test_broken_index(content, match, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    refuse(tmp_path, "E420", match)


def test_truncated_shard_is_named(tmp_path):
    folder = make_sharded(tmp_path / "m")
    path = folder / shard_name(2)
    os.truncate(path, path.stat().st_size - 5)
    text = refuse(folder, "E412", shard_name(2))
    assert "5 missing" in text and "fix:" in text


def test_what_is_no_model(tmp_path):
    refuse(tmp_path, "E401", "no .safetensors file")
    refuse(tmp_path / "nothing", "E401", "does not exist")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02")
    refuse(tmp_path, "E440", "never does it")
    refuse(tmp_path / "pytorch_model.bin", "E401", "neither a model folder")
    for name in ("a", "b"):
        safetensors.numpy.save_file(ARRAYS, tmp_path / f"{name}.safetensors")
    refuse(tmp_path, "E401", "2 .safetensors files")


def test_companion_that_leaves_the_folder(tmp_path):
    folder = make_sharded(tmp_path / "m")
    (tmp_path / "private.json").write_text("secret")
    (folder / "tokenizer.json").symlink_to("../private.json")
    refuse(folder, "E421", "leaves the folder")


def test_a_name_swapped_for_a_link_after_the_check_is_refused(tmp_path, monkeypatch):
    """Time of check, time of use: the open itself does not follow links."""
    from halfbyte.formats import folder as module

    folder = make_sharded(tmp_path / "m")
    safetensors.numpy.save_file(ARRAYS, tmp_path / "secret.safetensors")
    checked = module.safe_join

    def swap(root, name):
        path = checked(root, name)
        if name == shard_name(0):
            os.unlink(path)
            os.symlink(tmp_path / "secret.safetensors", path)
        return path

    monkeypatch.setattr(module, "safe_join", swap)
    refuse(folder, "E402", "cannot open")

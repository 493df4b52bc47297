"""Checkpoints from anywhere: whatever the bytes, the answer is a result or a CheckpointError, and nothing is left.

Four ways in: a header of any bytes, a header and an index that are almost right, a config.json with any value in
any place, and damage to a finished checkpoint. And the promise of --dry-run for any options and any shapes.
"""

import json
import os
import shutil
import struct
import sys
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("hypothesis")
sys.path.insert(0, str(Path(__file__).parents[1] / "py"))
from checkpoint_model import make_llama, write_config, write_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import halfbyte
from halfbyte.checkpoint import plan as plan_module
from halfbyte.checkpoint.footprint import memory_plan
from halfbyte.checkpoint.inspect import inspect
from halfbyte.checkpoint.verify import verify
from halfbyte.errors import CheckpointError
from halfbyte.formats.folder import open_model
from halfbyte.formats.safetensors import SafetensorsFile

EXAMPLES = settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
FEW = settings(EXAMPLES, max_examples=30)

numbers = st.one_of(
    st.integers(-3, 70), st.sampled_from([2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30])
)
scalars = st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8))
values = st.recursive(
    scalars,
    lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=5), v, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module", autouse=True)
def _warm():
    """tracemalloc must not count what the first call imports."""
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder, "m"))
        halfbyte.quantize(Path(folder, "m"), Path(folder, "q"))


def attempt(function, *arguments, **options):
    """The result, or None after a CheckpointError with a code, a one-line cause and no more memory than files."""
    tracemalloc.start()
    try:
        return function(*arguments, **options)
    except CheckpointError as error:
        assert error.exit_code in (2, 4, 5, 7) and error.what.strip()
        assert "\n" not in error.what and "\x1b" not in str(error)
        str(error), json.dumps(error.to_json())
        return None
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 << 20, f"{peak:,} bytes for a file of a few kilobytes"


def check_tiling(path):
    """What a header that was accepted promises: each tensor inside of the file, none over another."""
    with SafetensorsFile(path) as file:
        end = file.header_bytes
        for tensor in file.tensors.values():
            assert tensor.start == end and tensor.nbytes >= 0 and min(tensor.shape, default=0) >= 0
            end += tensor.nbytes
            assert len(file.read(tensor)) == tensor.nbytes
        assert end == file.size
        return True


# ---- headers ----


@EXAMPLES
@given(
    st.binary(max_size=300),
    st.sampled_from([None, 0, 1, 2, 8, 2**31, 2**62, 2**63, 2**64 - 1]),
    st.booleans(),
)
def test_any_bytes(tail, length, brace):
    tail = b"{" + tail if brace else tail
    prefix = b"" if length is None else struct.pack("<Q", length)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(prefix + tail)
        attempt(check_tiling, path)


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "I64", "F99", "", None, 3]),
        "shape": st.lists(numbers, max_size=4) | values,
        "data_offsets": st.lists(numbers, min_size=1, max_size=3) | values,
        "more": values,
    },
)
names = st.sampled_from(
    ["a.weight", "b.weight", "", "__metadata__", "x\x1b[2Jy", "../../etc/passwd", "\ud800", "n" * 2000]
)


@EXAMPLES
@given(st.dictionaries(names, entries | values, max_size=4), st.integers(0, 200), st.integers(-2, 2))
def test_any_header_that_is_json(header, data_bytes, lie):
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(struct.pack("<Q", max(0, len(text) + lie)) + text + b"\0" * data_bytes)
        attempt(check_tiling, path)


@EXAMPLES
@given(st.data())
def test_a_right_header_with_one_thing_changed(data):
    header = {
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c.weight": {"dtype": "U8", "shape": [0, 5], "data_offsets": [32, 32]},
    }
    entry = header[data.draw(st.sampled_from(sorted(header)))]
    key = data.draw(st.sampled_from(sorted(entry)))
    if isinstance(entry[key], list) and data.draw(st.booleans()):
        entry[key][data.draw(st.integers(0, len(entry[key]) - 1))] = data.draw(numbers | scalars)
    else:
        entry[key] = data.draw(values)
    changed = json.dumps(header)
    text = changed.encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(32))
        attempt(check_tiling, path)


# ---- folders ----

LISTED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@EXAMPLES
@given(
    st.dictionaries(
        st.sampled_from(
            ["model.norm.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight", "no", ""]
        ),
        st.sampled_from(
            [*LISTED, "../secret.safetensors", "/etc/passwd", ".", "sub/x.safetensors", "link.safetensors"]
        )
        | values,
        max_size=4,
    )
    | values,
    st.booleans(),
)
def test_any_index(weight_map, complete):
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "m")
        make_llama(folder, shards=2, layers=1)
        shutil.copy(folder / LISTED[0], Path(base, "secret.safetensors"))
        (folder / "link.safetensors").symlink_to("../secret.safetensors")
        index = folder / "model.safetensors.index.json"
        right = json.loads(index.read_text())["weight_map"]
        if complete and isinstance(weight_map, dict):
            weight_map = right | weight_map
        index.write_text(json.dumps({"weight_map": weight_map}))
        model = attempt(open_model, folder)
        if model is not None:
            with model:
                assert {f.path for f in model.files} <= {str(folder.resolve() / n) for n in LISTED}
                assert {n: t.file.name for n, t in model.tensors.items()} == weight_map


KEYS = """
    architectures model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim dtype
    torch_dtype quantization_config text_config tie_word_embeddings sliding_window layer_types kv_lora_rank
    """.split()  # noqa: SIM905


@EXAMPLES
@given(st.dictionaries(st.sampled_from(KEYS), values, min_size=1, max_size=3))
def test_any_config(changes):
    """plan, inspect and quantize read config.json only as far as it makes sense."""
    with tempfile.TemporaryDirectory() as base:
        folder = Path(base, "m")
        make_llama(folder, layers=1)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        attempt(inspect, folder)
        plan = attempt(memory_plan, folder)
        if plan is not None:
            str(plan), repr(plan), plan._repr_html_(), json.dumps(plan.to_json())
        if attempt(halfbyte.quantize, folder, Path(base, "q")) is not None:
            assert verify(Path(base, "q"))["ok"]
        else:
            assert sorted(os.listdir(base)) == ["m"]


@FEW
@given(st.sampled_from(["config.json", "halfbyte-manifest.json"]), values, st.booleans())
def test_any_json_in_a_finished_checkpoint(name, value, nested):
    with tempfile.TemporaryDirectory() as base:
        make_llama(Path(base, "m"), layers=1)
        halfbyte.quantize(Path(base, "m"), Path(base, "q"))
        path = Path(base, "q", name)
        document = json.loads(path.read_text())
        key = "files" if name.startswith("half") else "quantization_config"
        document = document | {key: value} if nested else value
        path.write_text(json.dumps(document))
        result = attempt(verify, Path(base, "q"))
        assert result is not None and not result["ok"] and all("\n" not in p for p in result["problems"])
        attempt(inspect, Path(base, "q"))


@FEW
@given(st.data())
def test_any_quant_state(data):
    """The JSON of a quantized weight with another value in some place, or any bytes of the same length."""
    with tempfile.TemporaryDirectory() as base:
        make_llama(Path(base, "m"), layers=1)
        halfbyte.quantize(Path(base, "m"), Path(base, "q"), double_quant=True)
        with SafetensorsFile(Path(base, "q", "model.safetensors")) as file:
            blobs = [t for t in file.tensors.values() if "quant_state" in t.name]
            blob = data.draw(st.sampled_from(blobs))
            state = json.loads(file.read(blob))
        if data.draw(st.booleans()):
            state[data.draw(st.sampled_from(sorted(state)))] = data.draw(values)
            raw = json.dumps(state).encode().ljust(blob.nbytes)[: blob.nbytes]
        else:
            raw = data.draw(st.binary(min_size=blob.nbytes, max_size=blob.nbytes))
        with open(Path(base, "q", "model.safetensors"), "r+b") as file:
            file.seek(blob.start)
            file.write(raw)
        attempt(inspect, Path(base, "q"))
        attempt(memory_plan, Path(base, "q"))
        attempt(verify, Path(base, "q"))


# ---- sizes ----


@FEW
@given(st.data())
def test_predicted_bytes_are_written_bytes(data):
    """Every file, for any options, shapes, dtypes, shards; and the dry run leaves nothing."""
    to = data.draw(st.sampled_from(["nf4", "fp4", "int8"]))
    options = {"to": to, "max_shard_size": data.draw(st.none() | st.integers(1, 30_000))}
    options["compute_dtype"] = data.draw(st.sampled_from([None, "float16", "float32"]))
    if to != "int8":
        options |= {
            "double_quant": data.draw(st.booleans()),
            "blocksize": data.draw(st.sampled_from([32, 64, 128, 1024, 4096])),
            "scales": data.draw(st.sampled_from(["absmax", "search"])),
        }
    tensors, rng = {}, np.random.default_rng(0)
    for i in range(data.draw(st.integers(1, 4))):
        shape = (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 300)))
        scale = 10.0 ** data.draw(st.integers(-7, 3))
        dtype = data.draw(st.sampled_from(["F32", "BF16", "F16"]))
        x = (rng.standard_normal(shape, dtype=np.float32) * scale).clip(-6e4, 6e4)
        tensors[f"model.layers.{i}.mlp.up_proj.weight"] = (dtype, x)
    tensors["model.norm.weight"] = ("F32", np.ones(data.draw(st.integers(0, 9)), np.float32))
    with tempfile.TemporaryDirectory() as base, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "TILE_ELEMENTS", data.draw(st.sampled_from([512, 4096, 1 << 20])))
        source, out = Path(base, "m"), Path(base, "q")
        source.mkdir()
        write_file(source / "model.safetensors", tensors)
        write_config(source, hidden=8, mlp=8, layers=4, dtype="float32")
        (source / "tokenizer.json").write_text(data.draw(st.text(max_size=20)))
        predicted = halfbyte.quantize(source, out, **options, dry_run=True)
        assert sorted(os.listdir(base)) == ["m"]
        report = halfbyte.quantize(source, out, **options, threads=data.draw(st.integers(1, 3)))
        written = {p.name: p.stat().st_size for p in out.iterdir()}
        assert predicted.files == report.files == written
        assert predicted.total_bytes == sum(written.values())
        assert verify(out)["ok"]

"""halfbyte.quantize: what is written, its exact sizes, independence of threads and tiles."""

import json
import math
import os

import numpy as np
import pytest
from checkpoint_model import from_bits, make_llama, read_all, to_bits, write_config, write_file

import halfbyte
from halfbyte import _C
from halfbyte.checkpoint import plan as plan_module
from halfbyte.errors import CheckpointError

LINEAR = ("down_proj", "gate_proj", "up_proj", "k_proj", "o_proj", "q_proj", "v_proj")


def is_linear(name):
    return name.split(".")[-2] in LINEAR


def float_input(array, dtype):
    """What the extension module takes for a stored tensor."""
    return array.astype(np.float16) if dtype == "F16" else array


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few hundred elements, so that small tensors are cut too."""
    monkeypatch.setattr(plan_module, "TILE_ELEMENTS", 4096)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("to", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_four_bit_parts(dtype, to, blocksize, double_quant, tmp_path, monkeypatch):
    """Every part equals the quantization of the whole tensor in one call; the blob is bitsandbytes' JSON."""
    monkeypatch.setattr(plan_module, "TILE_ELEMENTS", blocksize)  # one block a tile
    source = make_llama(tmp_path / "m", dtype=dtype, hidden=47, mlp=81, layers=1)
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", to, blocksize=blocksize, double_quant=double_quant)
    result = read_all(tmp_path / "q")
    for name, array in source.items():
        if not is_linear(name):
            assert from_bits(result[name][2], dtype).tobytes() == float_input(array, dtype).tobytes()
            continue
        packed, absmax = _C.quantize_4bit(float_input(array, dtype), to, blocksize)
        state = {
            "quant_type": to,
            "blocksize": blocksize,
            "dtype": {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[dtype],
            "shape": list(array.shape),
        }
        assert result[name] == ("U8", ((array.size + 1) // 2, 1), packed.tobytes())
        assert result[f"{name}.quant_map"][:2] == ("F32", (16,))
        np.testing.assert_array_equal(from_bits(result[f"{name}.quant_map"][2], "F32"), _C.codebook(to))
        if double_quant:
            codes, nested, offset = _C.nest_absmax(absmax, 256)
            assert result[f"{name}.absmax"] == ("U8", absmax.shape, codes.tobytes())
            assert result[f"{name}.nested_absmax"] == ("F32", nested.shape, nested.tobytes())
            assert result[f"{name}.nested_quant_map"][2] == _C.map8("dynamic").tobytes()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            assert result[f"{name}.absmax"] == ("F32", absmax.shape, absmax.tobytes())
        blob = result[f"{name}.quant_state.bitsandbytes__{to}"][2].decode()
        assert blob.rstrip(" ") == json.dumps(state)
    n_linear = sum(map(is_linear, source))
    assert len(result) == len(source) + n_linear * (5 if double_quant else 3)


@pytest.mark.parametrize("to", ["nf4", "fp4"])
def test_four_bit_values_are_near(to, tmp_path, small_tiles):
    """|w - decoded| <= absmax * half the widest gap of the codebook, plus the rounding of w / absmax."""
    source = make_llama(tmp_path / "m", dtype="F32")
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", to)
    result = read_all(tmp_path / "q")
    book = _C.codebook(to)
    gap = np.diff(np.sort(book)).max() / 2 * (1 + 2.0**-20)
    for name in filter(is_linear, source):
        packed = np.frombuffer(result[name][2], np.uint8)
        codes = np.stack([packed >> 4, packed & 15], 1).ravel()
        absmax = np.repeat(from_bits(result[f"{name}.absmax"][2], "F32"), 64)[: codes.size]
        decoded = (book[codes] * absmax).reshape(source[name].shape)
        assert (np.abs(decoded - source[name]).ravel() <= gap * absmax).all()


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_int8_parts(dtype, tmp_path, small_tiles):
    """codes = rint(w * 127 / SCB) of w rounded to float16, by a reference in float64."""
    source = make_llama(tmp_path / "m", dtype=dtype, hidden=300, mlp=500, layers=1)
    report = halfbyte.quantize(tmp_path / "m", tmp_path / "q", "int8")
    result = read_all(tmp_path / "q")
    for name in filter(is_linear, source):
        w = source[name].astype(np.float16).astype(np.float64)
        absmax = np.abs(w).max(1)
        layer = name.removesuffix("weight")
        assert result[f"{layer}SCB"] == ("F32", absmax.shape, absmax.astype(np.float32).tobytes())
        assert result[f"{layer}weight_format"] == ("U8", (), b"\0")
        assert result[name][:2] == ("I8", w.shape)
        codes = from_bits(result[name][2], "I8").reshape(w.shape)
        exact = w * 127 / absmax[:, None]
        # float32 arithmetic may decide otherwise only where the exact value is within its error of a tie
        assert (np.abs(codes - exact) <= 0.5 + 127 * 3 * 2.0**-24).all()
    # 8 bits a weight, 32 a row, 8 a layer
    rows, layers = 5 * 300 + 2 * 500, 7
    bits = 8 + (32 * rows + 8 * layers) / report.document["quantized"]["parameters"]
    assert report.bits_per_parameter == pytest.approx(bits, abs=1e-4)


def test_int8_of_bfloat16_is_that_of_float16(tmp_path, small_tiles):
    """Rows of every magnitude, around the two borders where the tool goes another way, and values that float16
    rounds, flushes or just holds: the codes are those of the rows rounded to float16."""
    rng = np.random.default_rng(3)
    top = [2.0**e * m for e in range(-27, 16) for m in (1.0, 1.984375)] + [65280.0, 2.0**-6 * 0.9921875, 0.0]
    w = rng.standard_normal((len(top), 96)).astype(np.float32)
    w *= 2.0 ** rng.integers(-14, 1, w.shape)
    w *= np.array(top, np.float32)[:, None] / np.abs(w).max(1, keepdims=True)
    w[:, 5] = np.array(top) * 0.5  # a tie of the code, 63.5
    (tmp_path / "m").mkdir()
    write_file(tmp_path / "m" / "model.safetensors", {"model.layers.0.mlp.up_proj.weight": ("BF16", w)})
    write_config(tmp_path / "m", hidden=96, mlp=len(top), layers=1, dtype="bfloat16")
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", "int8")
    stored = from_bits(to_bits(w, "BF16").tobytes(), "BF16").reshape(w.shape)
    codes, scale, _ = _C.quantize_rows_int8(stored.astype(np.float16))
    result = read_all(tmp_path / "q")
    assert result["model.layers.0.mlp.up_proj.weight"][2] == codes.tobytes()
    assert result["model.layers.0.mlp.up_proj.SCB"][2] == scale.tobytes()


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"to": "nf4"},
        {"to": "nf4", "double_quant": True},
        {"to": "fp4", "blocksize": 4096, "double_quant": True},
        {"to": "nf4", "blocksize": 32, "scales": "search"},
        {"to": "int8"},
        {"to": "nf4", "max_shard_size": 9000},
        {"to": "int8", "max_shard_size": 1},
        {"to": "nf4", "skip": ["*.down_proj", "model.layers.0.*"], "double_quant": True},
    ],
    ids=str,
)
def test_predicted_bytes_are_written_bytes(shards, options, tmp_path, small_tiles):
    make_llama(tmp_path / "m", shards=shards)
    predicted = halfbyte.quantize(tmp_path / "m", None, dry_run=True, **options)
    assert not (tmp_path / "q").exists()
    report = halfbyte.quantize(tmp_path / "m", tmp_path / "q", **options)
    written = {path.name: path.stat().st_size for path in (tmp_path / "q").iterdir()}
    assert predicted.files == report.files == written
    assert predicted.total_bytes == sum(written.values())
    stored = sum(len(raw) for _, _, raw in read_all(tmp_path / "q").values())
    document = predicted.document
    assert document["quantized"]["bytes"] + document["dense"]["bytes"] == stored


def test_offsets_of_any_length_fit_the_blob(tmp_path):
    """The padding of the blob holds for the longest float32 that a mean of magnitudes can be."""
    from halfbyte.formats.bitsandbytes import quant_state_blob

    rng = np.random.default_rng(0)
    values = rng.integers(0, 0x7F800000, 20_000, dtype=np.uint32).view(np.float32)
    lengths = {len(quant_state_blob("nf4", 64, "bfloat16", (3, 5), float(v))) for v in values}
    assert len(lengths) == 1


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_result_does_not_depend_on_threads(to, tmp_path, small_tiles):
    make_llama(tmp_path / "m", hidden=160, mlp=300, shards=2)
    hashes = []
    for threads in (1, 2, 3, 7):
        out = tmp_path / f"q{threads}"
        report = halfbyte.quantize(
            tmp_path / "m", out, to, double_quant=to == "nf4", threads=threads, max_shard_size=200_000
        )
        hashes.append([entry["sha256"] for entry in report.document["files"]])
    assert hashes[0] == hashes[1] == hashes[2] == hashes[3]


def test_result_does_not_depend_on_the_tile(tmp_path, monkeypatch):
    make_llama(tmp_path / "m")
    hashes = set()
    for elements in (4096, 8192, 1 << 20):
        monkeypatch.setattr(plan_module, "TILE_ELEMENTS", elements)
        report = halfbyte.quantize(tmp_path / "m", tmp_path / f"q{elements}", double_quant=True)
        hashes.add(str([entry["sha256"] for entry in report.document["files"]]))
    assert len(hashes) == 1


def test_shards_follow_the_source_or_the_limit(tmp_path):
    source = make_llama(tmp_path / "m", shards=3)
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    before = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    after = json.loads((tmp_path / "q" / "model.safetensors.index.json").read_text())
    assert {name: after["weight_map"][name] for name in before} == before
    assert after["metadata"] == {
        "total_parameters": sum(a.size for a in source.values()),
        "total_size": sum(len(raw) for _, _, raw in read_all(tmp_path / "q").values()),
    }
    halfbyte.quantize(tmp_path / "m", tmp_path / "one", max_shard_size=10**9)
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    assert read_all(tmp_path / "one") == read_all(tmp_path / "q")
    limit = 9_000
    halfbyte.quantize(tmp_path / "m", tmp_path / "many", max_shard_size=limit)
    assert read_all(tmp_path / "many") == read_all(tmp_path / "q")
    with halfbyte.formats.folder.open_model(tmp_path / "many") as model:
        sizes = [sum(t.nbytes for t in file.tensors.values()) for file in model.files]
    assert len(sizes) > 3 and max(sizes) <= limit


def test_config_and_companions(tmp_path, tiny_llama):
    make_llama(tmp_path / "m", custom={"kept": [1, 2]})
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", "nf4", double_quant=True)
    before = json.loads((tmp_path / "m" / "config.json").read_text())
    after = json.loads((tmp_path / "q" / "config.json").read_text())
    quantization = after.pop("quantization_config")
    assert after == before
    assert quantization["quant_method"] == "bitsandbytes" and quantization["load_in_4bit"] is True
    assert quantization["bnb_4bit_compute_dtype"] == "bfloat16"  # the source's
    assert quantization["llm_int8_skip_modules"] is None
    halfbyte.quantize(tiny_llama, tmp_path / "t", "int8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "t" / name).read_bytes() == (tiny_llama / name).read_bytes()


def test_skipped_modules_are_dense_and_named(tmp_path):
    source = make_llama(tmp_path / "m")
    report = halfbyte.quantize(tmp_path / "m", tmp_path / "q", skip=["*.down_proj", "model.layers.1.mlp.*"])
    result = read_all(tmp_path / "q")
    dense = {name for name in source if name.endswith(".weight") and f"{name}.absmax" not in result}
    expected = {n for n in source if not is_linear(n) or "down_proj" in n or "layers.1.mlp" in n}
    assert dense == expected
    modules = report.document["skip_modules"]
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    assert config["quantization_config"]["llm_int8_skip_modules"] == modules
    matrices = {name.removesuffix(".weight") for name in expected if source[name].ndim == 2}
    assert set(modules) == matrices | {"lm_head"}


def test_search_loses_less_at_the_same_size(tmp_path):
    source = make_llama(tmp_path / "m", dtype="F32", hidden=128, mlp=256)
    errors, sizes = [], []
    for scales in ("absmax", "search"):
        report = halfbyte.quantize(tmp_path / "m", tmp_path / scales, scales=scales)
        sizes.append(report.files["model.safetensors"])
        result = read_all(tmp_path / scales)
        total = 0.0
        for name in filter(is_linear, source):
            packed = np.frombuffer(result[name][2], np.uint8)
            absmax = from_bits(result[f"{name}.absmax"][2], "F32")
            decoded = _C.dequantize_4bit(packed, absmax, "nf4", 64, source[name].shape)
            total += float(((decoded - source[name]).astype(np.float64) ** 2).sum())
        errors.append(total)
    assert sizes[0] == sizes[1]
    assert errors[1] < 0.97 * errors[0]


def test_conv1d_is_quantized_transposed(tmp_path, small_tiles):
    """GPT-2 stores its linear layers as [in, out]."""
    rng = np.random.default_rng(3)
    arrays = {
        "h.0.attn.c_attn.weight": rng.standard_normal((50, 150), dtype=np.float32),
        "h.0.mlp.c_proj.weight": rng.standard_normal((200, 50), dtype=np.float32),
        "h.0.mlp.c_proj.bias": rng.standard_normal(50, dtype=np.float32),
        "wte.weight": rng.standard_normal((64, 50), dtype=np.float32),
    }
    (tmp_path / "m").mkdir()
    write_file(tmp_path / "m" / "model.safetensors", {n: ("F32", a) for n, a in arrays.items()})
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    write_config(tmp_path / "m", hidden=50, mlp=200, layers=1, dtype="float32", **config)
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", threads=3)
    halfbyte.quantize(tmp_path / "m", tmp_path / "i", "int8")
    four, eight = read_all(tmp_path / "q"), read_all(tmp_path / "i")
    for name in ("h.0.attn.c_attn.weight", "h.0.mlp.c_proj.weight"):
        transposed = np.ascontiguousarray(arrays[name].T)
        packed, absmax = _C.quantize_4bit(transposed)
        assert four[name][2] == packed.tobytes()
        assert four[f"{name}.absmax"][2] == absmax.tobytes()
        assert (
            f'"shape": {list(transposed.shape)}' in four[f"{name}.quant_state.bitsandbytes__nf4"][2].decode()
        )
        codes, scale, _ = _C.quantize_rows_int8(transposed.astype(np.float16))
        assert eight[name] == ("I8", transposed.shape, codes.tobytes())
        assert eight[name.removesuffix("weight") + "SCB"][2] == scale.tobytes()
    assert four["wte.weight"][2] == arrays["wte.weight"].tobytes()


def test_experts_routers_and_unknown_families(tmp_path):
    rng = np.random.default_rng(4)
    names = {
        "model.embed_tokens.weight": (16, 32),
        "model.layers.0.self_attn.q_proj.weight": (32, 32),
        "model.layers.0.mlp.gate.weight": (4, 32),
        "model.layers.0.mlp.experts.0.up_proj.weight": (64, 32),
        "model.layers.0.mlp.experts.1.up_proj.weight": (64, 32),
        "model.layers.0.mlp.experts.down_proj": (2, 32, 64),
        "model.layers.0.mlp.shared_expert.up_proj.weight": (64, 32),
        "model.layers.0.conv.weight": (4, 3, 3),
        "model.layers.0.table": (4, 32),
        "lm_head.weight": (16, 32),
    }
    arrays = {n: ("F32", rng.standard_normal(s, dtype=np.float32)) for n, s in names.items()}
    (tmp_path / "m").mkdir()
    write_file(tmp_path / "m" / "model.safetensors", arrays)
    for family, skips in (("qwen2_moe", None), ("brand_new", True)):
        write_config(tmp_path / "m", hidden=32, mlp=64, layers=1, dtype="float32", model_type=family)
        report = halfbyte.quantize(tmp_path / "m", tmp_path / family)
        quantized = {n for n in names if f"{n}.absmax" in read_all(tmp_path / family)}
        assert quantized == {
            "model.layers.0.self_attn.q_proj.weight",
            "model.layers.0.mlp.shared_expert.up_proj.weight",
        }
        notes = " ".join(report.document["notes"])
        assert "experts stay as they are" in notes
        assert ("brand_new" in notes) == bool(skips)
        assert (report.document["skip_modules"] is None) == (skips is None)
    assert report.document["skip_modules"] == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.gate",
    ]


def test_progress_counts_every_byte_of_the_source(tmp_path, small_tiles):
    make_llama(tmp_path / "m")
    calls = []
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", progress=lambda *state: calls.append(state))
    done = [c[0] for c in calls]
    assert done == sorted(done)
    total = sum(len(raw) for _, _, raw in read_all(tmp_path / "m").values())
    assert calls[-1][:2] == (total, total)


def test_report_shows_itself(tmp_path):
    make_llama(tmp_path / "m&m")
    report = halfbyte.quantize(tmp_path / "m&m", None, dry_run=True)
    assert "nf4" in str(report) and f"{report.files['model.safetensors']:,}" in str(report)
    assert "m&amp;m" in report._repr_html_()
    assert "\n" not in repr(report)
    json.dumps(report.document)


def test_manifest_lists_every_file(tmp_path):
    make_llama(tmp_path / "m")
    report = halfbyte.quantize(tmp_path / "m", tmp_path / "q", "nf4", double_quant=True)
    manifest = json.loads((tmp_path / "q" / "halfbyte-manifest.json").read_text())
    assert manifest["schema"] == "halfbyte.manifest/1"
    assert manifest["files"].keys() == report.files.keys() - {"halfbyte-manifest.json"}
    assert manifest["options"]["to"] == "nf4" and manifest["options"]["double_quant"] is True
    assert manifest["source"]["name"] == "m"
    assert str(tmp_path) not in json.dumps(manifest)


def test_source_is_only_read(tmp_path):
    make_llama(tmp_path / "m")
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "m").iterdir()}
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "m").iterdir()} == before


def test_descriptors_and_threads_are_returned(tmp_path):
    import threading

    make_llama(tmp_path / "m", shards=2)
    before = set(os.listdir("/proc/self/fd"))
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    with pytest.raises(CheckpointError):
        halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    assert set(os.listdir("/proc/self/fd")) == before
    assert not [t for t in threading.enumerate() if t.name.startswith("halfbyte")]


def test_tensor_sizes_around_tiles(tmp_path, monkeypatch):
    """Depths of 1, odd, one block, and rows larger than a tile."""
    rng = np.random.default_rng(5)
    shapes = [(1, 1), (1, 63), (3, 64), (65, 1), (7, 65), (2, 5000), (129, 31)]
    arrays = {f"l{i}.weight": rng.standard_normal(s, dtype=np.float32) for i, s in enumerate(shapes)}
    (tmp_path / "m").mkdir()
    write_file(tmp_path / "m" / "model.safetensors", {n: ("F32", a) for n, a in arrays.items()})
    write_config(tmp_path / "m", hidden=1, mlp=1, layers=1, dtype="float32")
    monkeypatch.setattr(plan_module, "TILE_ELEMENTS", 64)
    for to in ("nf4", "int8"):
        out = tmp_path / to
        halfbyte.quantize(tmp_path / "m", out, to, threads=4, double_quant=to == "nf4")
        result = read_all(out)
        for name, array in arrays.items():
            if to == "nf4":
                packed, absmax = _C.quantize_4bit(array)
                assert result[name][2] == packed.tobytes()
                assert result[f"{name}.absmax"][2] == _C.nest_absmax(absmax)[0].tobytes()
            else:
                assert result[name][2] == _C.quantize_rows_int8(array.astype(np.float16))[0].tobytes()
        assert sum(math.prod(s) for s in shapes) == sum(a.size for a in arrays.values())

"""Checkpoints exchanged with the real bitsandbytes, through transformers, in processes of their own.

    ours   -> theirs   what `halfbyte quantize` wrote is loaded by a script that knows nothing of halfbyte
    theirs -> ours     what bitsandbytes and save_pretrained wrote is loaded by the stand-in and by halfbyte.load

Decoding has one definition, so decoded weights are equal to the bit. Encoding has one definition only on the
GPU: the CPU code of bitsandbytes takes the midpoints of the codebook for thresholds, some of them a unit in the
last place from the GPU's, and rounds x / absmax in another way for the last block; for int8 it rounds 1 / absmax
before it multiplies by 127. A code may therefore differ where x / absmax is within 2^-21 of a border (at most 3
roundings of a number up to 1, and the border's own); anything else is an error. FP4 has two zeros: bitsandbytes'
CUDA code decodes code 8 as -0.0, its CPU code as 0.0, and they choose another one of the two for numbers near 0.
They count as equal.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
if "halfbyte" in (bnb.__file__ or ""):
    pytest.skip("the stand-in is installed in this process", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1] / "py"))
import torch  # noqa: E402
from checkpoint_model import make_llama  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import halfbyte  # noqa: E402
from halfbyte import _C  # noqa: E402

SIDE = Path(__file__).with_name("checkpoint_side.py")

# (dtype of the source, options of halfbyte.quantize, shards of the source)
OURS = {
    "nf4": ("BF16", {"to": "nf4"}, 1),
    "nf4-nested": ("BF16", {"to": "nf4", "double_quant": True}, 1),
    "nf4-searched": ("BF16", {"to": "nf4", "scales": "search"}, 1),
    "nf4-f16-shards": ("F16", {"to": "nf4", "double_quant": True}, 3),
    "nf4-f32-resharded": ("F32", {"to": "nf4", "max_shard_size": 20_000}, 1),
    "nf4-32-nested": ("F32", {"to": "nf4", "blocksize": 32, "double_quant": True}, 1),
    "nf4-128": ("F16", {"to": "nf4", "blocksize": 128}, 1),
    "nf4-1024-nested": ("BF16", {"to": "nf4", "blocksize": 1024, "double_quant": True}, 1),
    "nf4-4096": ("BF16", {"to": "nf4", "blocksize": 4096}, 2),
    "nf4-skip": ("BF16", {"to": "nf4", "skip": ["*.down_proj", "model.layers.0.self_attn.*"]}, 1),
    "fp4": ("BF16", {"to": "fp4"}, 1),
    "fp4-f32-256-nested": ("F32", {"to": "fp4", "blocksize": 256, "double_quant": True}, 2),
    "fp4-f16-2048": ("F16", {"to": "fp4", "blocksize": 2048}, 1),
    "int8": ("BF16", {"to": "int8"}, 1),
    "int8-f16-shards": ("F16", {"to": "int8"}, 3),
    "int8-f32": ("F32", {"to": "int8"}, 1),
}

_FOUR = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
# (dtype of the source, arguments of BitsAndBytesConfig, max_shard_size)
THEIRS = {
    "nf4": ("BF16", _FOUR | {"bnb_4bit_quant_type": "nf4"}, None),
    "nf4-nested": ("F16", _FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, None),
    "nf4-storage": (
        "F32",
        _FOUR | {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
        None,
    ),
    "fp4-shards": ("F32", _FOUR | {"bnb_4bit_quant_type": "fp4"}, "20KB"),
    "int8": ("BF16", {"load_in_8bit": True}, None),
    "int8-shards": ("F16", {"load_in_8bit": True, "llm_int8_threshold": 0.0}, "30KB"),
}


def run_side(side, jobs, folder):
    """Do the jobs in a process of its own; returns its output."""
    file = folder / f"jobs-{side}.json"
    empty = {"config": None, "save": None, "shard": None, "via": "transformers"}
    file.write_text(
        json.dumps([empty | {k: str(v) if isinstance(v, Path) else v for k, v in j.items()} for j in jobs])
    )
    result = subprocess.run(
        [sys.executable, str(SIDE), side, str(file)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr[-6000:]
    assert ("halfbyte" in Path(result.stdout.split()[-2]).parts) == (side == "halfbyte")
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of both sides and the dumps of both sides: three processes for the whole file."""
    base = tmp_path_factory.mktemp("exchange")
    for dtype in ("BF16", "F16", "F32"):
        for shards in (1, 2, 3):
            # rows of 64 and 96: blocks of 64 straddle the latter, blocks of 4096 end in a partial one
            make_llama(base / f"dense-{dtype}-{shards}", dtype=dtype, shards=shards, hidden=64, mlp=96)
    jobs = []
    for name, (dtype, options, shards) in OURS.items():
        halfbyte.quantize(base / f"dense-{dtype}-{shards}", base / f"ours-{name}", **options)
        jobs.append({"load": base / f"ours-{name}", "dump": base / f"ours-{name}.bnb"})
    jobs += [
        {
            "load": base / f"dense-{dtype}-1",
            "config": config,
            "dump": base / f"theirs-{name}.made",
            "save": base / f"theirs-{name}",
            "shard": shard,
        }
        for name, (dtype, config, shard) in THEIRS.items()
    ]
    run_side("bitsandbytes", jobs, base)
    jobs = []
    for name in THEIRS:
        for via in ("transformers", "halfbyte.load"):
            jobs.append({"load": base / f"theirs-{name}", "dump": base / f"theirs-{name}.{via}", "via": via})
    run_side("halfbyte", jobs, base)
    return base


def stored(path):
    """All tensors of a checkpoint, by name, as its files have them."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def layers_of(dump, part):
    return sorted(name.removesuffix("." + part) for name in dump if name.endswith("." + part))


def same(a, b, signed_zeros=True):
    """Equal to the bit, and in dtype and shape."""
    if not signed_zeros:
        a, b = a + 0, b + 0
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def parts_from_file(tensors, layer):
    """A 4-bit weight of a checkpoint, decoded by halfbyte alone from what is in the file."""
    key = f"{layer}.weight"
    (blob,) = [n for n in tensors if n.startswith(f"{key}.quant_state.")]
    state = json.loads(bytes(tensors[blob].tolist()))
    nested = {}
    if "nested_offset" in state:
        nested = {
            "nested_absmax": tensors[f"{key}.nested_absmax"],
            "nested_map": tensors[f"{key}.nested_quant_map"],
            "nested_offset": state["nested_offset"],
            "nested_blocksize": state["nested_blocksize"],
        }
    return _C.Params4bit.from_parts(
        tensors[key],
        tensors[f"{key}.absmax"],
        quant_type=state["quant_type"],
        blocksize=state["blocksize"],
        shape=tuple(state["shape"]),
        dtype=state["dtype"],
        **nested,
    )


def check_four_bit_file(tensors, dump):
    layers = layers_of(dump, "packed")
    assert layers == sorted(n.removesuffix(".weight.absmax") for n in tensors if n.endswith(".weight.absmax"))
    for layer in layers:
        assert same(dump[f"{layer}.packed"], tensors[f"{layer}.weight"].view(torch.uint8).reshape(-1))
        ours = parts_from_file(tensors, layer)
        assert same(dump[f"{layer}.dequantized"], ours.dequantize(), ours.quant_type == "nf4"), layer
    return layers


def check_int8_file(tensors, dump):
    layers = layers_of(dump, "codes")
    assert layers == sorted(n.removesuffix(".SCB") for n in tensors if n.endswith(".SCB"))
    for layer in layers:
        codes, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.SCB"]
        assert same(dump[f"{layer}.codes"], codes) and same(dump[f"{layer}.scale"], scale)
        ours = _C.dequantize_rows_int8(codes, scale)
        assert same(dump[f"{layer}.dequantized"], ours)
    return layers


def check_dense(tensors, dump, layers):
    """Everything that is not quantized is the same on both sides, and nothing is missing or left over."""
    quantized = tuple(f"{layer}." for layer in layers)
    dense = {n for n in tensors if not n.startswith(quantized)}
    assert dense == {n for n in dump if not n.startswith(quantized)} - {"logits"}
    for name in dense:
        assert same(tensors[name], dump[name]), name


@pytest.mark.parametrize("name", OURS)
def test_bitsandbytes_loads_what_we_wrote(name, folder):
    tensors, dump = stored(folder / f"ours-{name}"), load_file(folder / f"ours-{name}.bnb")
    four = OURS[name][1]["to"] != "int8"
    layers = (check_four_bit_file if four else check_int8_file)(tensors, dump)
    assert len(layers) == (14 if name != "nf4-skip" else 8)
    check_dense(tensors, dump, layers)
    assert torch.isfinite(dump["logits"]).all()


def near_border(x, blocksize, values):
    """Where x / absmax of its block is within 2^-21 of a border between two of the sorted values."""
    x = x.astype(np.float64).reshape(-1)
    padded = np.zeros(-(-len(x) // blocksize) * blocksize)
    padded[: len(x)] = x
    blocks = padded.reshape(-1, blocksize)
    t = (blocks / np.abs(blocks).max(1, keepdims=True)).reshape(-1)[: len(x)]
    borders = (values[1:] + values[:-1]) / 2
    nearest = np.searchsorted(borders, t).clip(1, len(borders) - 1)
    return np.minimum(np.abs(t - borders[nearest]), np.abs(t - borders[nearest - 1])) <= 2.0**-21


def codes_of(packed, n):
    return np.stack([packed >> 4, packed & 15], 1).reshape(-1)[:n]


@pytest.mark.parametrize(
    "name", [n for n, (_, o, _) in OURS.items() if o["to"] != "int8" and "scales" not in o]
)
def test_four_bit_codes_are_those_of_bitsandbytes(name, folder):
    dtype, options, shards = OURS[name]
    dense, ours = stored(folder / f"dense-{dtype}-{shards}"), stored(folder / f"ours-{name}")
    quant_type, blocksize = options["to"], options.get("blocksize", 64)
    book = np.asarray(_C.codebook(quant_type))
    decided, total = 0, 0
    for key in (n.removesuffix(".absmax") for n in ours if n.endswith(".weight.absmax")):
        packed, state = bnb.functional.quantize_4bit(dense[key], blocksize=blocksize, quant_type=quant_type)
        n = dense[key].numel()
        a, b = codes_of(ours[key].numpy().reshape(-1), n), codes_of(packed.numpy().reshape(-1), n)
        differ = (a != b) if quant_type == "nf4" else (book[a] != book[b])  # -0.0 == 0.0
        undecided = near_border(dense[key].float().numpy(), blocksize, np.sort(book.astype(np.float64)))
        assert not (differ & ~undecided).any(), key
        decided, total = decided + (~undecided).sum(), total + n
        if not options.get("double_quant"):
            assert same(ours[f"{key}.absmax"], state.absmax)
    assert decided > 0.995 * total  # the exception is one; weights of 8 bits of mantissa do hit borders


@pytest.mark.parametrize("name", [n for n, (_, o, _) in OURS.items() if o["to"] == "int8"])
def test_int8_codes_are_those_of_bitsandbytes(name, folder):
    dtype, _, shards = OURS[name]
    dense, ours = stored(folder / f"dense-{dtype}-{shards}"), stored(folder / f"ours-{name}")
    for key in (n.removesuffix("SCB") + "weight" for n in ours if n.endswith(".SCB")):
        w16 = dense[key].to(torch.float16)
        codes, scale, _ = bnb.functional.int8_vectorwise_quant(w16.clone())
        undecided = near_border(w16.float().numpy(), w16.shape[1], np.arange(-127, 128) / 127)
        differ = (ours[key] != codes).numpy().reshape(-1)
        assert not (differ & ~undecided).any(), key
        assert undecided.mean() < 0.02  # bfloat16 has many halves
        assert same(ours[key.removesuffix("weight") + "SCB"], scale)


@pytest.mark.parametrize("via", ["transformers", "halfbyte.load"])
@pytest.mark.parametrize("name", THEIRS)
def test_we_load_what_bitsandbytes_wrote(name, via, folder):
    tensors, dump = stored(folder / f"theirs-{name}"), load_file(folder / f"theirs-{name}.{via}")
    made = load_file(folder / f"theirs-{name}.made")
    assert dump.keys() == made.keys()
    for key in made.keys() - {"logits"}:
        assert same(dump[key], made[key], not name.startswith("fp4")), key
    four = "load_in_4bit" in THEIRS[name][1]
    layers = (check_four_bit_file if four else check_int8_file)(tensors, dump)
    check_dense(tensors, dump, layers)
    assert len(layers) == 14
    if THEIRS[name][2]:
        assert len(list((folder / f"theirs-{name}").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("name", ["nf4", "nf4-nested", "fp4-shards", "int8"])
def test_inspect_and_verify_read_their_checkpoints(name, folder):
    from halfbyte.checkpoint.inspect import inspect
    from halfbyte.checkpoint.verify import verify

    document = inspect(folder / f"theirs-{name}")
    label = {"nf4": "nf4 block 64", "nf4-nested": "nf4 block 64 nested", "fp4-shards": "fp4 block 64"}.get(
        name, name
    )
    assert {g["format"]: g["tensors"] for g in document["formats"]}[label] == 14
    assert verify(folder / f"theirs-{name}")["ok"]

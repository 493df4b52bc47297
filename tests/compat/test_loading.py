"""halfbyte.load: memory is asked for first and the answer is in bytes; what comes back is the model asked for."""

import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.stand_in

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")

import tiny_models  # noqa: E402
from transformers import AutoModel, BitsAndBytesConfig  # noqa: E402

import halfbyte  # noqa: E402
from halfbyte import loading  # noqa: E402
from halfbyte.errors import CheckpointError  # noqa: E402
from halfbyte.integrations.transformers import HalfbyteConfig  # noqa: E402
from halfbyte.loading import MemoryPlanError  # noqa: E402
from halfbyte.memory import RUNTIME_BYTES, Available  # noqa: E402
from halfbyte.torch.nn import Linear  # noqa: E402

BIG = dict(hidden_size=1024, intermediate_size=2048, num_hidden_layers=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("load")
    made = {f: tiny_models.save(base / f, f, torch.bfloat16) for f in ("llama", "llama-tied", "mixtral")}
    made["big"] = base / "big"  # large enough for the differences between formats to count
    tiny_models._llama(**BIG, tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(made["big"])
    for to in ("nf4", "int8"):
        made[to] = base / to
        halfbyte.quantize(made["big"], made[to], to)
    return made


def kinds(model):
    return {type(m) for m in model.modules() if isinstance(m, torch.nn.Linear)} - {torch.nn.Linear, Linear}


def test_the_information_of_the_loading_comes_with_the_model(folders):
    model, found = halfbyte.load(folders["llama"], "nf4", output_loading_info=True)
    assert type(model.lm_head) is Linear and not found["missing_keys"]


def with_memory(monkeypatch, nbytes):
    monkeypatch.setattr(loading, "available_memory", lambda: Available(nbytes, "free memory"))


def needed(monkeypatch, *arguments, **options):
    """Bytes that a load asks for: one byte less is refused, and nothing was loaded."""
    with monkeypatch.context() as patch:
        with_memory(patch, 0)
        patch.setattr(loading, "_large_blocks_returned", lambda: pytest.fail("it began to load"))
        with pytest.raises(MemoryPlanError) as caught:
            halfbyte.load(*arguments, **options)
    return caught.value.missing_bytes


@pytest.mark.parametrize(
    ("config", "layer"),
    [
        (None, None),
        ("nf4", bnb.nn.Linear4bit),
        ("fp4", bnb.nn.Linear4bit),
        ("int8", bnb.nn.Linear8bitLt),
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, bnb.nn.Linear4bit),
        (BitsAndBytesConfig(load_in_8bit=True), bnb.nn.Linear8bitLt),
    ],
    ids=["dense", "nf4", "fp4", "int8", "dict", "object"],
)
def test_formats(config, layer, folders):
    model = halfbyte.load(folders["llama"], config)
    assert kinds(model) == ({layer} if layer else set())
    assert type(model.lm_head) is Linear  # dense, with halfbyte's kernels
    with torch.inference_mode():
        assert torch.isfinite(model(torch.arange(1, 9)[None]).logits).all()


def test_a_string_as_path_and_other_classes(folders):
    assert kinds(halfbyte.load(os.fspath(folders["llama"]), "nf4", auto_class=AutoModel)) == {
        bnb.nn.Linear4bit
    }


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, {"": torch.device("cpu")}], ids=str)
def test_device_maps_of_the_cpu(device_map, folders, monkeypatch):
    if torch.cuda.is_available() and device_map in (None, "auto"):
        pytest.skip("the model goes to the GPU, for which host memory is not asked")
    assert needed(monkeypatch, folders["llama"], "nf4", device_map) > RUNTIME_BYTES
    assert kinds(halfbyte.load(folders["llama"], "nf4", device_map)) == {bnb.nn.Linear4bit}


def test_other_devices_are_not_asked_for_memory(folders, monkeypatch):
    with_memory(monkeypatch, 0)
    model = halfbyte.load(folders["llama"], device_map="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_folders_that_are_quantized_already(to, folders, monkeypatch):
    model = halfbyte.load(folders[to])
    assert len(kinds(model)) == 1
    asked = needed(monkeypatch, folders[to])
    weights = sum(f.stat().st_size for f in folders[to].glob("*.safetensors"))
    assert abs(asked - RUNTIME_BYTES - weights) < 16 << 20  # and what is alive while loading
    # what the user says in addition changes nothing of what is in the folder
    assert needed(monkeypatch, folders[to], "int8", dtype=torch.float32) == asked


def test_error_names_bytes_and_what_would_fit(folders, monkeypatch):
    sizes = {c: needed(monkeypatch, folders["big"], c) for c in (None, "int8", "nf4")}
    assert sizes["nf4"] < sizes["int8"] < sizes[None]
    assert needed(monkeypatch, folders["big"], "fp4") == sizes["nf4"]
    with_memory(monkeypatch, sizes["int8"])
    with pytest.raises(MemoryPlanError) as caught:
        halfbyte.load(folders["big"])
    text = str(caught.value)
    assert isinstance(caught.value, MemoryError)
    assert caught.value.missing_bytes == sizes[None] - sizes["int8"]
    assert f"'big' as dense takes {sizes[None]:,} bytes" in text
    assert f"{sizes['int8']:,} are available (free memory)" in text
    assert (
        f"{caught.value.missing_bytes:,} bytes are missing; would fit: int8 ({sizes['int8']:,} bytes)" in text
    )
    assert "nf4 + double quantization (" in text
    halfbyte.load(folders["big"], "int8")  # exactly enough


def test_nothing_fits_and_the_check_can_be_left_out(folders, monkeypatch):
    with_memory(monkeypatch, 1000)
    with pytest.raises(MemoryPlanError, match="no format that halfbyte has would fit"):
        halfbyte.load(folders["llama"], "nf4")
    halfbyte.load(folders["llama"], "nf4", check_memory=False)


def test_keys_and_values_count(folders, monkeypatch):
    short = needed(monkeypatch, folders["llama"], "nf4", context=1)
    long = needed(monkeypatch, folders["llama"], "nf4", context=1_000_000)
    assert long - short > 2 * 2 * 2 * 16 * 900_000 * 2  # 2 * layers * kv_heads * head_dim * tokens * bytes


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_the_dtype_of_what_stays_dense_counts(name, folders, monkeypatch):
    stored = needed(monkeypatch, folders["big"], context=1)
    model = halfbyte.load(folders["big"], dtype=torch.float32)
    wide = needed(monkeypatch, folders["big"], context=1, **{name: torch.float32})
    assert wide - stored >= sum(p.numel() for p in model.parameters()) * 2
    dense = 2 * 128 * 1024 + 5 * 1024  # two embeddings and five norms
    more = needed(monkeypatch, folders["big"], "nf4", context=1, **{name: "float32"})
    assert 2 * dense <= more - needed(monkeypatch, folders["big"], "nf4", context=1) <= 2 * dense + 16384


def test_experts_count_as_the_quantizer_takes_them(folders, monkeypatch):
    theirs = needed(monkeypatch, folders["mixtral"], "nf4")
    ours = needed(monkeypatch, folders["mixtral"], HalfbyteConfig("nf4"))
    experts = 2 * 4 * 3 * 64 * 96  # layers, experts, matrices, sizes
    assert theirs - ours == experts * 2 - int(experts * 4.5 / 8)
    assert needed(monkeypatch, folders["mixtral"], HalfbyteConfig("nf4", experts=False)) == theirs


PEAK = """
import sys, threading, halfbyte
from halfbyte.checkpoint.footprint import memory_plan

def private():
    line = next(x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, private())

peak, done = 0, threading.Event()
thread = threading.Thread(target=watch)
thread.start()
plan = memory_plan(sys.argv[1], context=1)
model = halfbyte.load(sys.argv[1], "nf4")
done.set()
thread.join()
after = private()  # which the thread, asleep in between, need not have seen
print(max(peak, after), plan.route("nf4").needed, after)
"""


def test_peak_is_within_what_was_asked_for(folders):
    """Private memory of a process that does nothing else (the mapped file is not counted: it can be dropped)."""
    result = subprocess.run([sys.executable, "-c", PEAK, folders["big"]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak, asked, after = map(int, result.stdout.split()[-3:])
    assert 0 < after <= peak < asked, result.stdout


def test_wrong_paths(folders, tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        halfbyte.load(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="local Hugging Face cache"):
        halfbyte.load("no-such/model-anywhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        halfbyte.load(tmp_path / "empty")
    shutil.copytree(folders["llama"], tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"'config\.json' is missing"):
        halfbyte.load(tmp_path / "bare")
    shutil.copytree(folders["llama"], tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 5)
    with pytest.raises(CheckpointError, match=r"'model\.safetensors' is truncated"):
        halfbyte.load(tmp_path / "short", "nf4")


@pytest.mark.parametrize(
    ("config", "error", "match"),
    [
        ("nf5", ValueError, "one of nf4, fp4, int8, got 'nf5'"),
        (4, TypeError, "expected|must be .* got int"),
        ({"bnb_4bit_quant_type": 3}, TypeError, "bnb_4bit_quant_type"),
    ],
    ids=str,
)
def test_wrong_configurations(config, error, match, folders):
    with pytest.raises(error, match=match):
        halfbyte.load(folders["llama"], config)

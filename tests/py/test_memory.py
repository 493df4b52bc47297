"""What is available and what a model takes: /proc and control groups made by hand, plans against real bytes."""

import json
import resource
import subprocess
import sys

import pytest
from checkpoint_model import make_llama, read_all, write_file

import halfbyte
from halfbyte.checkpoint.footprint import cache_bytes, memory_plan
from halfbyte.memory import (
    RUNTIME_BYTES,
    Available,
    MemoryPlan,
    MemoryPlanError,
    Route,
    available_memory,
    total_memory,
)

GIB = 1 << 30


def machine(root, free=8 * GIB, cgroup="", **files):
    """A root folder with /proc and /sys as the kernel would show them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {free // 1024} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(content))
    return root


@pytest.fixture(autouse=True)
def no_address_limit():
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        pytest.skip("the address space is limited here")


def test_free_memory(tmp_path):
    root = machine(tmp_path)
    assert available_memory(root) == Available(8 * GIB, "free memory")
    assert total_memory(root) == 16 * GIB


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"a/b/memory.max": 2 * GIB, "a/b/memory.current": GIB}, GIB),
        ({"a/b/memory.max": "max", "a/memory.max": 2 * GIB, "a/memory.current": 0}, 2 * GIB),
        ({"a/b/memory.max": 3 * GIB, "a/b/memory.current": 0, "a/memory.max": GIB}, GIB),
        ({"a/b/memory.max": 64 * GIB, "a/b/memory.current": 0}, 8 * GIB),
        ({"a/b/memory.max": GIB, "a/b/memory.current": 5 * GIB}, 0),
        (
            {
                "a/b/memory.max": 2 * GIB,
                "a/b/memory.current": 2 * GIB,
                "a/b/memory.stat": f"active_file 7\ninactive_file {GIB}\n",
            },
            GIB,
        ),
        ({"memory.max": GIB}, GIB),
    ],
    ids=["own limit", "parent's limit", "tighter parent", "loose", "beyond it", "file cache counts", "root"],
)
def test_control_group_2(files, expected, tmp_path):
    root = machine(tmp_path, cgroup="0::/a/b\n", **files)
    assert available_memory(root).nbytes == expected


def test_control_group_1(tmp_path):
    files = {
        "memory/docker/x/memory.limit_in_bytes": 2 * GIB,
        "memory/docker/x/memory.usage_in_bytes": GIB,
        "memory/docker/x/memory.stat": f"total_inactive_file {GIB // 2}\n",
    }
    root = machine(tmp_path, cgroup="3:cpu:/x\n4:memory:/docker/x\n", **files)
    assert available_memory(root) == Available(3 * GIB // 2, "memory limit of the control group")


def test_control_group_1_from_inside_a_container(tmp_path):
    files = {"memory/memory.limit_in_bytes": GIB, "memory/memory.usage_in_bytes": 0}
    assert available_memory(machine(tmp_path, cgroup="4:memory:/not/visible\n", **files)).nbytes == GIB


def test_control_group_1_without_limit(tmp_path):
    files = {"memory/memory.limit_in_bytes": 9223372036854771712, "memory/memory.usage_in_bytes": 5}
    assert available_memory(machine(tmp_path, cgroup="4:memory:/\n", **files)).nbytes == 8 * GIB


@pytest.mark.no_asan(reason="its shadow memory needs terabytes of address space")
def test_address_space_limit():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from halfbyte.memory import available_memory\n"
        "a = available_memory(); print(a.limited_by, a.nbytes < 2 << 30)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "address-space limit (ulimit -v) True\n", result.stderr


def test_this_machine():
    assert 0 < available_memory().nbytes <= total_memory()


def test_weights_are_exact(tmp_path):
    make_llama(tmp_path / "m", shards=2)
    plan = memory_plan(tmp_path / "m", context=100)
    options = {
        "int8": ("int8", {}),
        "nf4": ("nf4", {}),
        "nf4 + double quantization": ("nf4", {"double_quant": True}),
    }
    for number, (route, (to, more)) in enumerate(options.items()):
        halfbyte.quantize(tmp_path / "m", tmp_path / str(number), to, **more)
        stored = sum(len(raw) for _, _, raw in read_all(tmp_path / str(number)).values())
        assert plan.route(route).weights == stored
        again = memory_plan(tmp_path / str(number))
        assert [r.weights for r in again.routes] == [stored] and "quantized already" in again.notes[0]
    dense = sum(len(raw) for _, _, raw in read_all(tmp_path / "m").values())
    assert plan.route("dense").weights == dense


LLAMA_8B = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096,
            "dtype": "bfloat16"}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA_8B, 2 * 32 * 8 * 128 * 1000 * 2),  # 131,072 bytes a token, as published
        (LLAMA_8B | {"head_dim": 256}, 2 * 32 * 8 * 256 * 1000 * 2),
        (LLAMA_8B | {"dtype": "float32"}, 2 * 32 * 8 * 128 * 1000 * 4),
        ({"text_config": LLAMA_8B, "hidden_size": 1}, 2 * 32 * 8 * 128 * 1000 * 2),
        ({"n_layer": 12, "n_head": 12, "n_embd": 768, "torch_dtype": "float16"}, 2 * 12 * 768 * 1000 * 2),
    ],
    ids=["grouped queries", "own head size", "float32", "nested config", "GPT-2's names"],
)
def test_cache(config, expected):
    assert cache_bytes(config, 1000, 1) == (expected, None)
    assert cache_bytes(config, 500, 4) == (2 * expected, None)


def test_cache_of_a_strange_config():
    for config in ({}, {"num_hidden_layers": "many"}, {"num_hidden_layers": -1, "num_attention_heads": True}):
        nbytes, note = cache_bytes(config, 10, 1)
        assert nbytes == 0 and "not counted" in note
    assert "upper bound" in cache_bytes(LLAMA_8B | {"sliding_window": 512}, 10, 1)[1]


def plan_with(available):
    routes = [
        Route("dense", 16 * GIB, GIB, 2 * GIB),
        Route("int8", 8 * GIB, GIB, GIB),
        Route("nf4", 4 * GIB, GIB, 0),
    ]
    return MemoryPlan("m<b>", 8 * 10**9, 4096, 1, Available(available, "free memory"), routes)


def test_require_says_what_is_missing_and_what_fits():
    plan = plan_with(6 * GIB)
    plan.require("nf4")
    with pytest.raises(MemoryPlanError) as caught:
        plan.require("dense")
    missing = RUNTIME_BYTES + 18 * GIB - 6 * GIB
    assert caught.value.missing_bytes == missing and caught.value.plan is plan
    assert isinstance(caught.value, MemoryError)
    text = str(caught.value)
    assert f"{missing:,} bytes are missing" in text and "would fit: nf4" in text and "int8" not in text
    with pytest.raises(MemoryPlanError, match="no format that halfbyte has would fit"):
        plan_with(GIB).require("dense")


def test_exactly_enough_is_enough():
    needed = plan_with(0).route("int8").needed
    plan_with(needed).require("int8")
    with pytest.raises(MemoryPlanError) as caught:
        plan_with(needed - 1).require("int8")
    assert caught.value.missing_bytes == 1


def test_plans_show_themselves():
    plan = plan_with(6 * GIB)
    html = plan._repr_html_()
    assert "m&lt;b&gt;" in html and "<script" not in html and len(html) < 20_000
    assert repr(plan) == "<MemoryPlan m<b>: nf4 fits in 6,442,450,944 bytes>"
    lines = str(plan).splitlines()
    assert len(lines) == 8 and lines[6].startswith(f"peak: {RUNTIME_BYTES:,} for Python")
    assert lines[7] == "to make it fit: halfbyte quantize m<b> -o OUT --to nf4"
    assert str(plan_with(64 * GIB)).count("\n") == 6  # everything fits: no advice
    assert str(plan_with(GIB)).splitlines()[-1].startswith("nothing fits")
    json.dumps(plan.to_json())


def test_model_without_linear_layers_has_only_the_dense_route(tmp_path):
    import numpy as np

    make_llama(tmp_path / "m")
    write_file(tmp_path / "m" / "model.safetensors", {"model.norm.weight": ("F32", np.ones(4, np.float32))})
    plan = memory_plan(tmp_path / "m")
    assert [r.name for r in plan.routes] == ["dense"] and any("no linear layer" in n for n in plan.notes)

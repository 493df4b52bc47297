"""Whatever goes wrong: OUT is what it was before, the source is untouched, the cause is named."""

import errno
import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from checkpoint_model import make_llama, read_all, write_config, write_file

import halfbyte
from halfbyte.checkpoint import output, plan, run
from halfbyte.checkpoint.verify import verify
from halfbyte.errors import CheckpointError

COMMAND = [sys.executable, "-m", "halfbyte.cli.main"]


def refuse(code, match, source, out, **options):
    with pytest.raises(CheckpointError, match=match) as caught:
        halfbyte.quantize(source, out, **options)
    assert caught.value.code == "HB-" + code
    return str(caught.value)


def command(*arguments, **options):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120, **options
    )


# ---- values that cannot be quantized ----


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("to", "scales"),
    [("nf4", "absmax"), ("nf4", "search"), ("fp4", "absmax"), ("fp4", "search"), ("int8", "absmax")],
)
def test_not_finite_is_named_by_tensor_and_index(to, value, scales, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "TILE_ELEMENTS", 512)
    name, shape = "model.layers.0.mlp.down_proj.weight", (50, 80)
    for dtype in ("F32", "BF16", "F16"):
        source = tmp_path / f"m{dtype}"
        arrays = make_llama(source, dtype=dtype, hidden=shape[0], layers=1, mlp=shape[1])
        arrays[name] = arrays[name].copy()
        arrays[name][31, 77] = value
        write_file(source / "model.safetensors", {n: (dtype, a) for n, a in arrays.items()})
        text = refuse("E430", r"\[31, 77\]", source, tmp_path / "q", to=to, scales=scales)
        assert name in text and "model.safetensors" in text and str(value) in text
        assert os.listdir(tmp_path).count("q") == 0 and not (tmp_path / "q.partial").exists()


def test_not_finite_in_dense_tensors_is_copied(tmp_path):
    """Only what is quantized is judged: a mask of -inf is somebody's business."""
    arrays = make_llama(tmp_path / "m", dtype="F32")
    arrays["model.norm.weight"] = np.full_like(arrays["model.norm.weight"], -np.inf)
    write_file(tmp_path / "m" / "model.safetensors", {n: ("F32", a) for n, a in arrays.items()})
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    assert read_all(tmp_path / "q")["model.norm.weight"][2] == arrays["model.norm.weight"].tobytes()


def test_not_finite_in_a_transposed_tensor(tmp_path):
    w = np.ones((50, 150), np.float32)
    w[7, 149] = np.nan
    (tmp_path / "m").mkdir()
    write_file(tmp_path / "m" / "model.safetensors", {"h.0.attn.c_attn.weight": ("F32", w)})
    write_config(tmp_path / "m", hidden=50, mlp=1, layers=1, dtype="float32", model_type="gpt2")
    refuse("E430", r"\[7, 149\]", tmp_path / "m", tmp_path / "q")


def test_int8_refuses_what_float16_cannot_hold(tmp_path):
    arrays = make_llama(tmp_path / "m", layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    arrays[name] = arrays[name].copy()
    arrays[name][2, 5] = -1e5
    write_file(tmp_path / "m" / "model.safetensors", {n: ("BF16", a) for n, a in arrays.items()})
    text = refuse("E430", r"\[2, 5\]", tmp_path / "m", tmp_path / "q", to="int8")
    assert "float16" in text and "fix:" in text
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", "nf4")


# ---- options and folders ----


@pytest.mark.parametrize(
    "options",
    [
        {"to": "nf5"},
        {"blocksize": 0},
        {"blocksize": 2**64},
        {"blocksize": 48},
        {"scales": "best"},
        {"to": "int8", "double_quant": True},
        {"to": "int8", "blocksize": 128},
        {"to": "int8", "scales": "search"},
        {"compute_dtype": "float64"},
        {"max_shard_size": 0},
        {"threads": 0},
        {"skip": ["*.nothing"]},
    ],
    ids=str,
)
def test_wrong_options(options, tmp_path):
    make_llama(tmp_path / "m")
    refuse("E203", "quantize: |--skip", tmp_path / "m", tmp_path / "q", **options)


def test_out_is_required_except_for_a_dry_run(tmp_path):
    make_llama(tmp_path / "m")
    refuse("E203", "out is missing", tmp_path / "m", None)


def test_models_that_cannot_be_quantized(tmp_path):
    make_llama(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())

    def with_config(**changes):
        (tmp_path / "m" / "config.json").write_text(json.dumps(config | changes))

    with_config(quantization_config={"quant_method": "gptq"})
    refuse("E431", "quantized already .gptq.", tmp_path / "m", tmp_path / "q")
    with_config(model_type="hrm_text")
    refuse("E433", "cannot be quantized from their file", tmp_path / "m", tmp_path / "q")
    (tmp_path / "m" / "config.json").unlink()
    refuse("E401", "config.json", tmp_path / "m", tmp_path / "q")
    with_config()
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    refuse("E431", "quantized already", tmp_path / "q", tmp_path / "qq")
    write_file(tmp_path / "m" / "model.safetensors", {"model.norm.weight": ("F32", np.ones(4, np.float32))})
    refuse("E432", "no linear layer", tmp_path / "m", tmp_path / "z")


def test_output_that_is_in_the_way(tmp_path):
    source = tmp_path / "m"
    make_llama(source)
    refuse("E202", "is the source", source, source, overwrite=True)
    refuse("E202", "is the source", source, tmp_path, overwrite=True)
    (tmp_path / "alias").symlink_to("m")
    refuse("E202", "is the source", source, tmp_path / "alias", overwrite=True)
    (tmp_path / "file").write_text("x")
    refuse("E201", "not a folder", source, tmp_path / "file", overwrite=True)
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "thesis.tex").write_text("x")
    refuse("E201", "exists", source, tmp_path / "documents")
    refuse("E201", "not a model folder", source, tmp_path / "documents", overwrite=True)
    assert (tmp_path / "documents" / "thesis.tex").read_text() == "x"
    (tmp_path / "empty").mkdir()
    halfbyte.quantize(source, tmp_path / "empty")
    assert verify(tmp_path / "empty")["ok"]
    halfbyte.quantize(source, tmp_path / "new" / "parents" / "q")


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_overwrite_replaces_only_after_success(exchange, tmp_path, monkeypatch):
    if not exchange:
        monkeypatch.setattr(output, "_exchange", lambda a, b: False)
    make_llama(tmp_path / "m")
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", "int8")
    before = {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()}
    refuse("E201", "exists", tmp_path / "m", tmp_path / "q")
    arrays = make_llama(tmp_path / "bad")
    arrays["model.layers.1.mlp.up_proj.weight"][:] = np.nan
    write_file(tmp_path / "bad" / "model.safetensors", {n: ("BF16", a) for n, a in arrays.items()})
    refuse("E430", "nan", tmp_path / "bad", tmp_path / "q", overwrite=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "q").iterdir()} == before
    (tmp_path / "q" / "extra").write_text("old")
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", "nf4", overwrite=True)
    assert not (tmp_path / "q" / "extra").exists()
    assert verify(tmp_path / "q")["ok"]
    assert sorted(os.listdir(tmp_path)) == ["bad", "m", "q"]


def test_a_stale_partial_is_removed_and_a_foreign_one_is_not(tmp_path):
    make_llama(tmp_path / "m")
    stale = tmp_path / "q.partial"
    stale.mkdir()
    (stale / output.MARKER).touch()
    (stale / "model.safetensors").write_bytes(b"half")
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")
    assert not stale.exists() and verify(tmp_path / "q")["ok"]
    stale.mkdir()
    (stale / "precious").write_text("x")
    refuse("E201", "in the way", tmp_path / "m", tmp_path / "q", overwrite=True)
    assert (stale / "precious").exists()
    shutil.rmtree(stale)
    (tmp_path / "m").rename(stale)  # the source itself
    refuse("E201", "in the way", stale, tmp_path / "q", overwrite=True)
    assert (stale / "model.safetensors").exists()


def test_two_runs_at_once(tmp_path):
    make_llama(tmp_path / "m")
    partial = tmp_path / "q.partial"
    partial.mkdir()
    (partial / output.MARKER).touch()
    fd = os.open(partial, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        text = refuse("E601", "another run", tmp_path / "m", tmp_path / "q")
        assert partial.exists() and "fix:" in text
    finally:
        os.close(fd)
    halfbyte.quantize(tmp_path / "m", tmp_path / "q")


def test_truncated_source_leaves_nothing(tmp_path):
    make_llama(tmp_path / "m", shards=3)
    path = tmp_path / "m" / "model-00002-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    result = command("quantize", tmp_path / "m", "-o", tmp_path / "q", "--to", "nf4", "--json")
    assert result.returncode == 4
    assert "model-00002-of-00003.safetensors" in result.stderr and "1 missing" in result.stderr
    assert json.loads(result.stdout)["error"]["code"] == "HB-E412"
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_source_that_shrinks_meanwhile(tmp_path, monkeypatch):
    make_llama(tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    fill = run._fill

    def shrink(*args):
        os.truncate(path, 10_000)
        return fill(*args)

    monkeypatch.setattr(run, "_fill", shrink)
    refuse("E412", "became shorter", tmp_path / "m", tmp_path / "q")
    assert sorted(os.listdir(tmp_path)) == ["m"]


# ---- the operating system refuses ----


def failing(function, at, number):
    """`function`, whose `at`-th call raises OSError(number)."""
    calls = [0]

    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == at:
            raise OSError(number, os.strerror(number))
        return function(*args, **kwargs)

    return call


CALLS = [
    *[("pwrite", at) for at in (1, 2, 3, 7, 20, 60)],
    *[("posix_fallocate", at) for at in (1, 2)],
    *[("fsync", at) for at in (1, 2, 3, 4, 5, 6, 7)],
    ("rename", 1),
]


@pytest.mark.parametrize(("name", "at"), CALLS)
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 5), (errno.EDQUOT, 5), (errno.EIO, 4)])
def test_failing_system_calls(name, at, number, code, tmp_path, monkeypatch):
    """The k-th write, allocation, sync or rename fails: nothing stays, threads end, the error is typed."""
    make_llama(tmp_path / "m", shards=2)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(getattr(os, name), at, number))
        with pytest.raises(CheckpointError) as caught:
            halfbyte.quantize(tmp_path / "m", tmp_path / "q", double_quant=True)
    assert caught.value.exit_code == code
    assert os.strerror(number) in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["m"]
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", double_quant=True)
    assert verify(tmp_path / "q")["ok"]


def test_short_writes_and_reads_are_continued(tmp_path, monkeypatch):
    make_llama(tmp_path / "m")
    halfbyte.quantize(tmp_path / "m", tmp_path / "whole")
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:777]], offset))
    halfbyte.quantize(tmp_path / "m", tmp_path / "pieces")
    monkeypatch.undo()
    assert read_all(tmp_path / "pieces") == read_all(tmp_path / "whole")
    assert verify(tmp_path / "pieces")["ok"]


def test_file_size_limit_is_exit_5(tmp_path):
    make_llama(tmp_path / "m")

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    result = command("quantize", tmp_path / "m", "-o", tmp_path / "q", "--to", "nf4", preexec_fn=limit)
    assert result.returncode == 5, result.stderr
    assert "error[HB-E502]" in result.stderr and "fix:" in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_full_disk_is_found_before_the_work(tmp_path, monkeypatch):
    make_llama(tmp_path / "m")
    real = os.statvfs(tmp_path)
    fake = os.statvfs_result([*real[:3], 3, 3, *real[5:]])
    monkeypatch.setattr(os, "statvfs", lambda path: fake)
    text = refuse("E501", "not enough space", tmp_path / "m", tmp_path / "q")
    need = halfbyte.quantize(tmp_path / "m", None, dry_run=True).total_bytes
    assert f"{need:,} bytes needed, {3 * real.f_frsize:,} free" in text
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_full_tmpfs_is_exit_5(tmp_path):
    """A real full disk, where mounting is allowed: something else fills it after the check."""
    small = tmp_path / "small"
    small.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", small], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        make_llama(tmp_path / "m", layers=12)
        result = command("quantize", tmp_path / "m", "-o", small / "q", "--to", "int8")
        assert result.returncode == 5 and "HB-E501" in result.stderr
        assert os.listdir(small) == []
    finally:
        subprocess.run(["umount", small], check=True)


# ---- signals ----

SLOW = """
import os, sys, time
pwrite = os.pwrite
def slow(fd, data, offset):
    time.sleep(DELAY)
    return pwrite(fd, data, offset)
os.pwrite = slow
from halfbyte.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def start_slow(source, out, delay=0.01, **options):
    """The tool with a pause before every write, so that a signal comes in the middle of the work."""
    arguments = ["quantize", source, "-o", out, "--to", "nf4", "--double-quant", "--threads", "2"]
    code = SLOW.replace("DELAY", str(delay))
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Who started these tests in the background may have had it ignored, which is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


def wait_for(path, process):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def folder_hash(folder):
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@pytest.mark.no_asan(reason="a time limit")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_leaves_nothing(number, code, tmp_path):
    make_llama(tmp_path / "m", layers=8)
    process = start_slow(tmp_path / "m", tmp_path / "q", delay=0.05)
    wait_for(tmp_path / "q.partial" / "model.safetensors", process)
    time.sleep(0.3)
    process.send_signal(number)
    began = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - began < 5
    assert process.returncode == code, err
    assert "removed" in err and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["m"]


def test_kill_at_any_point(tmp_path):
    """SIGKILL at random moments: OUT is absent or whole; the next run makes the same bytes as ever."""
    make_llama(tmp_path / "m", layers=3)
    source_hash = folder_hash(tmp_path / "m")
    halfbyte.quantize(tmp_path / "m", tmp_path / "reference", "nf4", double_quant=True)
    expected = folder_hash(tmp_path / "reference")
    out = tmp_path / "q"
    process = start_slow(tmp_path / "m", out, delay=0.01)
    wait_for(tmp_path / "q.partial", process)
    began = time.monotonic()
    process.communicate()
    duration = time.monotonic() - began
    shutil.rmtree(out)
    rng = random.Random(0)
    killed = 0
    for i in range(12):
        process = start_slow(tmp_path / "m", out, delay=0.01)
        if i % 4:  # the others die while Python starts, or soon after
            wait_for(tmp_path / "q.partial", process)
        time.sleep(rng.random() * 1.1 * duration)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if out.exists():
            assert folder_hash(out) == expected
            shutil.rmtree(out)
        assert not (tmp_path / "q.partial" / "config.json").exists() or verify(tmp_path / "q.partial")["ok"]
    assert killed >= 6
    halfbyte.quantize(tmp_path / "m", out, "nf4", double_quant=True)
    assert folder_hash(out) == expected
    assert folder_hash(tmp_path / "m") == source_hash
    assert sorted(os.listdir(tmp_path)) == ["m", "q", "reference"]


# ---- verify ----


def test_verify_finds_every_kind_of_damage(tmp_path):
    make_llama(tmp_path / "m")
    halfbyte.quantize(tmp_path / "m", tmp_path / "q", double_quant=True)
    assert verify(tmp_path / "q")["ok"]

    def problems(name, damage):
        path = tmp_path / "q" / name
        content = path.read_bytes()
        damage(path)
        result = verify(tmp_path / "q")
        path.write_bytes(content)
        assert not result["ok"] and verify(tmp_path / "q")["ok"]
        return " ".join(result["problems"])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[-7] ^= 1
        path.write_bytes(data)

    assert "SHA-256" in problems("model.safetensors", flip)
    assert "truncated" in problems("model.safetensors", lambda p: os.truncate(p, p.stat().st_size - 9))
    assert "SHA-256" in problems("tokenizer.json", flip)
    assert "missing" in problems("tokenizer.json", os.unlink)
    assert "not JSON" in problems("halfbyte-manifest.json", lambda p: p.write_text("{"))
    int8 = json.loads((tmp_path / "q" / "config.json").read_text())
    int8["quantization_config"] |= {"load_in_8bit": True}
    assert "int8" in problems("config.json", lambda p: p.write_text(json.dumps(int8)))
    (tmp_path / "q" / "stray.safetensors").write_bytes(b"x")
    assert "not in the manifest" in " ".join(verify(tmp_path / "q")["problems"])

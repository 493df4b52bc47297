"""Weights in large pages: tensors like any other, whose memory goes with the last of them."""

import copy
import io
import itertools
import mmap
import os
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")

from halfbyte.torch import functional, nn, weight_memory  # noqa: E402

linux = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages here")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 1 << 16, (1 << 16) + 1, 40 << 20])
def test_a_tensor_of_its_own(count, dtype):
    a, b = (weight_memory.empty_weight(count, dtype) for _ in range(2))
    for t in (a, b):
        assert t.dtype == dtype and t.shape == (count,) and t.is_contiguous() and not t.requires_grad
        assert t.untyped_storage().nbytes() == count * dtype.itemsize and t.storage_offset() == 0
    a.fill_(1)
    b.fill_(2)
    assert (a == 1).all() and (b == 2).all()
    if count * dtype.itemsize >= weight_memory.LEAST_BYTES:
        assert a.data_ptr() % 64 == b.data_ptr() % 64 == 0


@linux
def test_small_ones_and_refusals_are_ordinary_memory(monkeypatch):
    def never(nbytes):
        raise AssertionError("took a chunk")

    with monkeypatch.context() as patch:
        patch.setattr(weight_memory._chunks, "take", never)
        weight_memory.empty_weight(weight_memory.LEAST_BYTES - 1, torch.uint8)
        with pytest.raises(AssertionError):
            weight_memory.empty_weight(weight_memory.LEAST_BYTES, torch.uint8)
        patch.setenv("HALFBYTE_HUGE_PAGES", "0")
        weight_memory.empty_weight(weight_memory.LEAST_BYTES, torch.uint8)

    def refuse(*args, **kwargs):
        raise OSError("no memory")

    monkeypatch.setattr(weight_memory, "_chunks", weight_memory._Chunks())
    monkeypatch.setattr(mmap, "mmap", refuse)
    for nbytes in (1 << 20, weight_memory.CHUNK_BYTES):
        assert weight_memory.empty_weight(nbytes, torch.uint8).shape == (nbytes,)


@linux
def test_a_kernel_without_large_pages(monkeypatch):
    class Mapping(mmap.mmap):
        def madvise(self, *advice):
            raise OSError("Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapping)
    taken = weight_memory._Chunks().take(1 << 20)
    assert taken.fill_(3).sum() == 3 << 20


@linux
def test_a_chunk_goes_with_its_last_tensor():
    chunks = weight_memory._Chunks()
    first, second = (chunks.take(20 << 20) for _ in range(2))
    chunk = weakref.ref(chunks._chunk)
    assert second.data_ptr() - first.data_ptr() == 20 << 20  # one after the other
    third = chunks.take(30 << 20)
    assert chunks._chunk is not chunk()
    del first
    assert chunk() is not None
    second.fill_(1)
    del second
    assert chunk() is None and third.shape == (30 << 20,)


@linux
def test_threads_get_different_memory():
    chunks, taken = weight_memory._Chunks(), []

    def take():
        for _ in range(200):
            taken.append(chunks.take(1 << 16))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begins = sorted(t.data_ptr() for t in taken)
    assert len(begins) == 800 and min(b - a for a, b in itertools.pairwise(begins)) >= 1 << 16


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_codes(nested, dtype):
    weight = torch.randn(512, 1024).to(dtype)
    for quant_type, storage in (("nf4", torch.uint8), ("fp4", torch.bfloat16)):
        usual, state = functional.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
        )
        kept, kept_state = functional.quantize_4bit(
            weight, quant_type=quant_type, compress_statistics=nested, quant_storage=storage, keep=True
        )
        assert torch.equal(usual.view(torch.uint8), kept.view(torch.uint8)) and kept.dtype == storage
        assert torch.equal(state.absmax, kept_state.absmax) and usual.shape == kept.shape


def test_a_layer_copies_and_pickles_what_it_has_and_no_more():
    layer = nn.Linear4bit(512, 1024, bias=False, quant_type="nf4", compress_statistics=False).to("cpu").eval()
    x = torch.randn(1, 512)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    assert file.tell() < 512 * 1024 * 0.6  # bytes of NF4, not of a chunk
    twin = copy.deepcopy(layer)
    layer.weight.data.zero_()
    assert not torch.equal(twin(x), layer(x))
    twin.weight.data.share_memory_()
    assert twin(x).shape == (1, 1024)


def _flags_of(address):
    """VmFlags of the mapping that holds the address."""
    inside = False
    with open("/proc/self/smaps") as maps:
        for line in maps:
            words = line.split()
            if not words[0].endswith(":"):
                begin, end = (int(part, 16) for part in words[0].split("-"))
                inside = begin <= address < end
            elif inside and words[0] == "VmFlags:":
                return words[1:]
    raise AssertionError(f"no mapping holds {address:x}")


@pytest.mark.skipif(
    not os.path.exists("/sys/kernel/mm/transparent_hugepage"), reason="a system without large pages"
)
def test_large_outputs_ask_for_large_pages(monkeypatch):
    n = 16 << 20  # 64 MiB: the C library maps so much afresh each time
    packed, state = functional.quantize_4bit(torch.ones(n), quant_type="nf4")
    for wish, asked in (("1", True), ("0", False)):
        monkeypatch.setenv("HALFBYTE_HUGE_PAGES", wish)
        out = functional.dequantize_4bit(packed, state)
        assert ("hg" in _flags_of(out.data_ptr() + out.nbytes // 2)) is asked
        assert (out == 1).all()
        del out

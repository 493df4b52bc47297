"""The CUDA products with 4-bit weights on the emulator, against float64."""

import ctypes
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import pytest
from host_library import DTYPES, FORMATS, Linear4, Queue, Scales4, emulated
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte import _C

NUMPY = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # unit roundoff
AUTO, SIMT, MMA, TILE = range(4)
LARGE, SMALL, OLD = range(3)  # devices of the emulator


def aligned(shape, dtype, at=0):
    """Memory of its own that begins `at` bytes behind a multiple of 256."""
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.full(n + 512, 0xA5, np.uint8)
    start = -raw.ctypes.data % 256 + at
    return raw[start : start + n].view(dtype).reshape(shape)


@dataclass
class Case:
    """One product. experts: rows of x for each, and what is left of m for nobody."""

    m: int = 1
    rows: int = 16
    depth: int = 64
    dtype: str = "bfloat16"
    quant_type: str = "nf4"
    blocksize: int = 64
    path: int = AUTO
    nested: int = 0  # block size of the scales
    bias: str | None = None
    transposed: bool = False
    experts: list[int] | None = None
    offsets_dtype: str = "int32"
    order: int = 0
    device: int = LARGE
    at: int = 0  # bytes by which x and codes miss their alignment

    def tensor_cores(self) -> bool:
        """Whether codebook entries (transposed: weights) are rounded to dtype."""
        fits = self.dtype != "float32" and self.depth % 32 == 0 and self.device != OLD and self.at % 16 == 0
        if self.transposed:
            fits = fits and self.rows % 8 == 0
        return fits and self.path != SIMT

    def run(self) -> np.ndarray:
        """Runs the kernel, holds every element to its bound; returns y as bytes."""
        m, rows, depth, experts = self.m, self.rows, self.depth, len(self.experts or [0])
        outputs, steps = (depth, rows) if self.transposed else (rows, depth)
        half = NUMPY[self.dtype]
        rng = np.random.default_rng(m * 1000003 + rows * 1009 + depth)
        n = experts * rows * depth
        w = (rng.standard_normal(n) * np.exp2(rng.integers(-3, 3, n // 64 + 1)).repeat(64)[:n]).astype(
            np.float32
        )
        packed_, absmax = map(np.asarray, _C.quantize_4bit(w, self.quant_type, self.blocksize))
        x, y = aligned((m, steps), half, self.at), aligned((m, outputs), half)
        packed = aligned(packed_.shape, "u1", self.at)
        x[:] = rng.standard_normal((m, steps)).astype(half)
        packed[:] = packed_

        emulator = emulated()
        emulator.reset(self.order, seed=rows)
        scales = Scales4(nested_blocksize=self.nested or 1)
        keep = []
        if self.nested:
            codes, nested_absmax, mean = _C.nest_absmax(absmax, self.nested)
            codes, nested_absmax = np.asarray(codes), np.asarray(nested_absmax)
            table = np.asarray(_C.map8("dynamic"), np.float32)
            outer = np.repeat(nested_absmax, self.nested)[: codes.size]
            absmax = (table[codes] * outer + np.float32(mean)).astype(np.float32)
            scales.absmax_codes, scales.nested_absmax = map(emulator.register, (codes, nested_absmax))
            scales.nested_map, scales.nested_offset_value = emulator.register(table), mean
            keep += [codes, nested_absmax, table]
        else:
            scales.absmax = emulator.register(absmax)
        args = Linear4(x=emulator.register(x), packed=emulator.register(packed), scales=scales,
                       y=emulator.register(y, True), io_dtype=DTYPES[self.dtype], path=self.path,
                       format=FORMATS[self.quant_type], transposed=self.transposed,
                       blocksize=self.blocksize, m=m, rows=rows, depth=depth)  # fmt: skip
        owner = np.zeros(m, np.int64)
        if self.experts is not None:
            ends = np.cumsum(self.experts).astype(self.offsets_dtype)
            owner = np.searchsorted(ends, np.arange(m), "right")
            args.offsets, args.experts = emulator.register(ends), experts
            args.offsets_dtype = {"int32": 6, "int64": 7}[self.offsets_dtype]
        if self.bias is not None:
            b = rng.standard_normal((experts, rows)).astype(NUMPY[self.bias])
            args.bias, args.bias_dtype = emulator.register(b), DTYPES[self.bias]
        size = emulator.api.linear4_workspace(ctypes.byref(Queue(self.device, None)), ctypes.byref(args))
        workspace = aligned((size,), np.uint8)
        args.workspace = emulator.register(workspace, True) if size else None
        emulator.run("linear4", args, self.device)

        # Reference: codebook or weights as the kernel has them, all else exact.
        book = np.asarray(_C.codebook(self.quant_type))
        rounded = self.tensor_cores() and self.path != AUTO
        if rounded and not self.transposed:
            book = book.astype(half)
        codes = np.stack([packed >> 4, packed & 15], 1).ravel()[:n]
        scale = np.repeat(absmax, self.blocksize)[:n]
        if rounded and self.transposed:
            weight = (book[codes] * scale).astype(half).astype(np.float64)
        else:
            weight = book.astype(np.float64)[codes] * scale.astype(np.float64)
        weight = weight.reshape(experts, rows, depth)
        if not self.transposed:
            weight = weight.transpose(0, 2, 1)
        weight = np.concatenate([weight, np.zeros((1, steps, outputs))])
        wide = x.astype(np.float64)
        expected, magnitude = np.zeros((m, outputs)), np.zeros((m, outputs))
        for e in range(experts + 1):
            mine = owner == e
            expected[mine] = wide[mine] @ weight[e]
            magnitude[mine] = np.abs(wide[mine]) @ np.abs(weight[e])
        if self.bias is not None:
            b = np.concatenate([b.astype(np.float64), np.zeros((1, rows))])
            expected += b[owner]
            magnitude += np.abs(b[owner])
        # Every product is rounded at most four times (weight, product, scale, and the sum it goes into first);
        # the path of a sum to y is at most steps / 32 + 40 additions long (16 k at once in an mma, or 32 lanes).
        # Then one rounding of y itself to its dtype.
        bound = magnitude * (steps / 16 + 44) * 2.0**-24 + np.abs(expected) * UNIT[self.dtype] * 1.01
        if self.path == AUTO:  # one rounding of codebook entries or weights, or none
            bound += magnitude * UNIT[self.dtype]
        error = np.abs(y.astype(np.float64) - expected)
        assert (error <= bound).all(), (error - bound).max()
        del keep
        return y.view(np.uint8)


def check(m, rows, depth, dtype, quant_type, blocksize, path, nested=False, bias=None, order=0):
    Case(m, rows, depth, dtype, quant_type, blocksize, path, 256 * nested, bias, order=order).run()


@pytest.mark.parametrize("path", [SIMT, MMA])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 2, 7, 8, 9])
def test_half_precision(m, dtype, path):
    check(m, 33, 192, dtype, "nf4", 64, path, bias="float32", order=m % 3)


@pytest.mark.parametrize("m", [1, 8, 11])
def test_float32(m):
    check(m, 20, 129, "float32", "nf4", 64, AUTO, nested=True, bias="float16", order=m % 3)


def test_deep():
    """Every warp gets several rounds of chunks, with a remainder."""
    check(3, 16, 64 * 83, "bfloat16", "fp4", 128, MMA, nested=True)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 17),
    st.integers(1, 70),
    st.one_of(st.integers(1, 300), st.integers(1, 10).map(lambda n: 64 * n)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([32, 64, 128, 4096]),
    st.booleans(),
    st.sampled_from([None, *DTYPES]),
    st.integers(0, 2),
)
def test_any_shape(m, rows, depth, dtype, quant_type, blocksize, nested, bias, order):
    check(m, rows, depth, dtype, quant_type, blocksize, AUTO, nested, bias, order)


def test_mma_refuses_what_it_cannot_do():
    for depth, blocksize, dtype in [(80, 64, "bfloat16"), (64, 64, "float32")]:
        with pytest.raises(AssertionError, match="invalid argument"):
            check(1, 4, depth, dtype, "nf4", blocksize, MMA)

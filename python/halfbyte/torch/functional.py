"""Functions on tensors: quantize and dequantize (4-bit, 8-bit block-wise, row-wise int8), multiply.

Names, arguments and results are those of `bitsandbytes.functional`, so that code written for one runs on
the other; what differs is said where it differs. The work is done by the operators in `halfbyte.torch.ops`,
therefore everything here runs under `torch.compile`, on fake tensors, and in any number of threads.
"""

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling

from halfbyte import _C, shim
from halfbyte.torch import ops as _ops  # noqa: F401  (defines torch.ops.halfbyte)
from halfbyte.torch._library import blocks
from halfbyte.torch.lowlevel import (
    FIRST_CUDA_DEVICE,
    GlobalPageManager,
    _mul,
    batched_igemm,
    check_matmul,
    elementwise_func,
    fill,
    get_paged,
    get_ptr,
    igemm,
    is_on_gpu,
    optimizer_update_8bit_blockwise,
    optimizer_update_32bit,
    prefetch_tensor,
)
from halfbyte.torch.maps import (
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dynamic_map,
    get_4bit_type,
    is_watched,
)
from halfbyte.torch.ops_4bit import natural_compute
from halfbyte.torch.quant_state import QuantState, pack_dict_to_tensor, unpack_tensor_to_dict
from halfbyte.torch.symbols import lib
from halfbyte.torch.weight_memory import empty_weight

__all__ = [
    "FIRST_CUDA_DEVICE",
    "C",
    "GlobalPageManager",
    "QuantState",
    "_convert_weight_packed_for_cpu",
    "_convert_weight_packed_for_cpu_inverse",
    "_mul",
    "batched_igemm",
    "check_matmul",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "elementwise_func",
    "fill",
    "gemv_4bit",
    "get_4bit_type",
    "get_paged",
    "get_ptr",
    "has_avx512bf16",
    "igemm",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "is_on_gpu",
    "lib",
    "linear_4bit",
    "name2qmap",
    "optimizer_update_8bit_blockwise",
    "optimizer_update_32bit",
    "pack_dict_to_tensor",
    "prefetch_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

BLOCKSIZES_4BIT = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
C = 127.0  # of the int8 codes
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# The signed dynamic map, made at its first use: one tensor serves every state of a device.
name2qmap: dict[str, Tensor] = {}
_dynamic_maps: dict[torch.device, Tensor] = {}


def _dynamic_map(device: torch.device) -> Tensor:
    if is_watched():  # neither keep one nor hand out ours
        return dynamic_map().to(device)
    with torch.inference_mode(False):  # it must serve autograd, too
        if "dynamic" not in name2qmap:
            name2qmap["dynamic"] = create_dynamic_map()
        found = name2qmap["dynamic"]
        if found.device != device:
            kept = _dynamic_maps.get(device)
            if kept is None:
                kept = _dynamic_maps[device] = found.to(device)
            return kept
    return found


def _store(function: str, result: Tensor, out: Tensor | None) -> Tensor:
    """The result, in `out` if the caller gave one."""
    if out is None:
        return result
    if out.shape != result.shape or out.dtype != result.dtype:
        raise ValueError(
            f"{function}: out must be {result.dtype} {list(result.shape)}, got {out.dtype} {list(out.shape)}"
        )
    return out.copy_(result)


# ---- 4-bit ---------------------------------------------------------------------------------------


def quantize_4bit(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_type: str = "fp4",
    quant_storage: torch.dtype = torch.uint8,
    *,
    scales: str | None = None,
    keep: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize a tensor of any shape to 4 bits, block by block.

    Parameters
    ----------
    A
        float32, bfloat16 or float16.
    absmax, out
        Where the scales and the packed codes are written, if given.
    blocksize
        Elements per scale: 32, 64 (default), 128, ..., 4096.
    compress_statistics
        Double quantization: the scales are stored in 8 bits, block size 256, with one float32 offset.
    quant_type
        "nf4" or "fp4".
    quant_storage
        The dtype the packed bytes are given (a reinterpretation): uint8, bfloat16, float16, float32.
    scales
        "absmax": the scale is the largest magnitude (bitsandbytes' choice). "search": the scale of least
        squared error; the format is the same. Default: that of `halfbyte.install(scales=...)`, or "absmax".
    keep
        The result is a weight that stays: on the CPU it is laid into large pages (weight_memory.py).

    Returns
    -------
    packed, state
        packed: quant_storage `[ceil(n / 2) / itemsize, 1]`; the even element of a pair is in the high nibble.

    Raises
    ------
    ValueError
        Unknown quant_type, block size or scales; dtype of A; packed size no multiple of the item size.
    """
    blocksize = 64 if blocksize is None else blocksize
    _check_4bit("quantize_4bit", quant_type, blocksize)
    if A.dtype not in _FLOATS:
        raise ValueError(f"quantize_4bit: A must be float32, bfloat16 or float16, got {A.dtype}")
    packed_bytes = (A.numel() + 1) // 2
    if packed_bytes % quant_storage.itemsize:
        raise ValueError(
            f"quantize_4bit: {A.numel()} elements pack into {packed_bytes} bytes, "
            f"no multiple of the item size of quant_storage {quant_storage}"
        )
    scales = shim.default_scales() if scales is None else scales
    A = A.detach()
    if keep and type(A) is Tensor and A.is_cpu and not is_watched():
        packed = empty_weight(packed_bytes, torch.uint8)
        scale = empty_weight(blocks(A.numel(), blocksize), torch.float32)
        _C.quantize_4bit(A, quant_type, blocksize, scales, packed=packed, absmax=scale)
    else:
        packed, scale = torch.ops.halfbyte.quantize_4bit(A, quant_type, blocksize, scales)
    packed = _store("quantize_4bit", packed.view(quant_storage).unsqueeze(1), out)
    code = get_4bit_type(quant_type, A.device)  # each state its own: safetensors refuses shared tensors
    if not compress_statistics:
        scale = _store("quantize_4bit", scale, absmax)
        return packed, QuantState(scale, A.shape, code, blocksize, quant_type, A.dtype)
    codes, nested_absmax, offset = torch.ops.halfbyte.nest_absmax(scale, NESTED_BLOCKSIZE)
    state2 = QuantState(
        nested_absmax,
        shape=scale.shape,
        code=_dynamic_map(A.device),
        blocksize=NESTED_BLOCKSIZE,
        dtype=torch.float32,
    )
    if absmax is not None:
        absmax.copy_(scale)
    return packed, QuantState(codes, A.shape, code, blocksize, quant_type, A.dtype, offset, state2)


def _check_4bit(function: str, quant_type: str, blocksize: int) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise ValueError(f"{function}: quant_type must be 'nf4' or 'fp4', got {quant_type!r}")
    if blocksize not in BLOCKSIZES_4BIT:
        raise ValueError(f"{function}: blocksize must be one of {BLOCKSIZES_4BIT}, got {blocksize}")


def nested_tensors(state: QuantState) -> tuple:
    """(nested_absmax, nested_map, nested_offset, nested_blocksize) of a state, as the operators take them."""
    if not state.nested:
        return None, None, None, NESTED_BLOCKSIZE
    state2 = state.state2
    return state2.absmax, state2.code, state.offset, state2.blocksize


def dequantize_4bit(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    quant_type: str = "fp4",
) -> Tensor:
    """The tensor a 4-bit tensor stands for: codebook[code] * scale, rounded once.

    Parameters
    ----------
    A
        Packed codes, any shape, storage dtype and strides. A row `[1, n]` stands for a transposed weight
        (`packed.t()`); then the result is transposed too.
    quant_state
        From `quantize_4bit`. Without it `absmax` and `out` are needed; `out` gives shape and dtype, and
        `blocksize` (default 64) and `quant_type` count, which are ignored otherwise.

    Returns
    -------
    Tensor
        Of the dtype and shape the tensor had before quantization; `out` if given.

    Raises
    ------
    ValueError
        Neither quant_state nor both of absmax and out; `out` of another shape or dtype.
    """
    if quant_state is None:
        if absmax is None or out is None:
            raise ValueError("dequantize_4bit: needs quant_state, or absmax and out")
        blocksize = 64 if blocksize is None else blocksize
        _check_4bit("dequantize_4bit", quant_type, blocksize)
        quant_state = QuantState(absmax, out.shape, None, blocksize, quant_type, out.dtype)
    state = quant_state
    _follow(state, A)
    shape, dtype = (state.shape, state.dtype) if out is None else (out.shape, out.dtype)
    if math.prod(shape) != math.prod(state.shape):
        raise ValueError(
            f"dequantize_4bit: out must have {math.prod(state.shape)} elements, got {list(shape)}"
        )
    result = torch.ops.halfbyte.dequantize_4bit(
        _plain(A), state.absmax, state.quant_type, state.blocksize, shape, dtype, *nested_tensors(state)
    )
    result = _store("dequantize_4bit", result, out)
    return result.t() if A.dim() == 2 and A.shape[0] == 1 and A.shape[1] > 1 and result.dim() == 2 else result


def _plain(A: Tensor) -> Tensor:
    """Without the parameter subclass: the operators need neither its gradient nor its __torch_function__."""
    return A.data if isinstance(A, torch.nn.Parameter) and not is_compiling() else A


def _follow(state: QuantState, A: Tensor) -> None:
    """Statistics left behind on another device (a module outside our control was moved) follow the data."""
    if state.absmax.device != A.device:
        state.to(A.device)


def quantize_nf4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` to NF4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "nf4", quant_storage)


def quantize_fp4(
    A: Tensor,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
    compress_statistics: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> tuple[Tensor, QuantState]:
    """`quantize_4bit` to FP4."""
    return quantize_4bit(A, absmax, out, blocksize, compress_statistics, "fp4", quant_storage)


def dequantize_nf4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` from NF4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "nf4")


def dequantize_fp4(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int | None = None,
) -> Tensor:
    """`dequantize_4bit` from FP4."""
    return dequantize_4bit(A, quant_state, absmax, out, blocksize, "fp4")


def linear_4bit(
    x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None, compute: str | None = None
) -> Tensor:
    """y = x W^T + b with a 4-bit W; differentiable in x and b.

    Parameters
    ----------
    x
        `[..., depth]` float32, bfloat16 or float16.
    packed, state
        From `quantize_4bit` of W `[rows, depth]`.
    bias
        `[rows]`, any float dtype.
    compute
        "float32": x and W in float32. "bfloat16": x and codebook rounded to bfloat16 before they are
        multiplied; sums in float32. "float16": the same with float16 on CUDA, float32 on the CPU. "int16", "int8"
        (CPU only): x and codebook rounded to integers, x with a scale for 64 columns; faster where the processor
        lacks AVX-512 (docs/numerics.md), gradients as in float32. Default: x's dtype.

    Returns
    -------
    Tensor
        `[..., rows]`, rounded once to x's dtype.
    """
    _follow(state, packed)
    return torch.ops.halfbyte.linear_4bit(
        x,
        _plain(packed),
        state.absmax,
        state.quant_type,
        state.blocksize,
        state.shape,
        bias,
        compute or natural_compute(x.dtype),
        *nested_tensors(state),
    )


def gemv_4bit(
    A: Tensor,
    B: Tensor,
    out: Tensor | None = None,
    transposed_A: bool = False,
    transposed_B: bool = False,
    state: QuantState | None = None,
) -> Tensor:
    """y = A W^T for the 4-bit W in B and `state`. `transposed_A` and `transposed_B` are accepted and ignored.

    Raises
    ------
    ValueError
        No state.
    """
    if state is None:
        raise ValueError("gemv_4bit: state is required (the QuantState that quantize_4bit returned)")
    return _store("gemv_4bit", linear_4bit(A, B, state), out)


# ---- 8-bit block-wise ----------------------------------------------------------------------------


def quantize_blockwise(
    A: Tensor,
    code: Tensor | None = None,
    absmax: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> tuple[Tensor, QuantState]:
    """Quantize to 8 bits: each block is divided by its largest magnitude, each element goes to the nearest
    entry of the map.

    Parameters
    ----------
    A
        Any shape; float32, bfloat16 or float16.
    code
        Map, 256 ascending float32; default the signed dynamic map.
    blocksize
        Elements per scale, at least 1.
    nested
        Quantize the scales too, with the same block size.

    Returns
    -------
    codes, state
        codes: uint8, shape of A. Zero is exact (bitsandbytes' CPU code makes it 2e-5 of the block's maximum).

    Raises
    ------
    ValueError
        Block size below 1; dtype of A.
    """
    if blocksize < 1:
        raise ValueError(f"quantize_blockwise: blocksize must be at least 1, got {blocksize}")
    if A.dtype not in _FLOATS:
        raise ValueError(f"quantize_blockwise: A must be float32, bfloat16 or float16, got {A.dtype}")
    code = _dynamic_map(A.device) if code is None else code.to(A.device, torch.float32)
    codes, scale = torch.ops.halfbyte.quantize_8bit(A.detach(), code, blocksize)
    codes = _store("quantize_blockwise", codes, out)
    if nested:
        offset = scale.mean()
        qabsmax, state2 = quantize_blockwise(scale - offset, blocksize=blocksize)
        if absmax is not None:
            absmax.copy_(scale)
        return codes, QuantState(
            qabsmax, A.shape, code, blocksize, dtype=A.dtype, offset=offset, state2=state2
        )
    scale = _store("quantize_blockwise", scale, absmax)
    return codes, QuantState(scale, A.shape, code, blocksize, dtype=A.dtype)


def dequantize_blockwise(
    A: Tensor,
    quant_state: QuantState | None = None,
    absmax: Tensor | None = None,
    code: Tensor | None = None,
    out: Tensor | None = None,
    blocksize: int = 4096,
    nested: bool = False,
) -> Tensor:
    """map[codes] * scale, in the dtype the tensor had before quantization.

    Without `quant_state`: `absmax` is needed, `code` defaults to the signed dynamic map, and the result is
    float32 (or `out`'s dtype). `nested` is read from the state.

    Raises
    ------
    ValueError
        Neither quant_state nor absmax; `out` of another shape.
    """
    if quant_state is None:
        if absmax is None:
            raise ValueError("dequantize_blockwise: needs quant_state or absmax")
        code = _dynamic_map(A.device) if code is None else code
        quant_state = QuantState(absmax, A.shape, code, blocksize, dtype=torch.float32)
    state = quant_state
    _follow(state, A)
    scale = state.absmax
    if state.nested:
        scale = dequantize_blockwise(scale, state.state2) + state.offset
    dtype = state.dtype if out is None else out.dtype
    code = state.code.to(A.device, torch.float32)
    result = torch.ops.halfbyte.dequantize_8bit(A, scale.float(), code, state.blocksize, dtype)
    return _store("dequantize_blockwise", result, out)


# ---- row-wise int8 (LLM.int8()) ------------------------------------------------------------------


def int8_vectorwise_quant(A: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Quantize each row to int8: codes = rint(a * 127 / max|a|).

    Parameters
    ----------
    A
        `[..., depth]` float32, bfloat16 or float16, used as it is (bitsandbytes wants float16).
    threshold
        Above 0: elements with |a| >= threshold are outliers. They take no part in the row's maximum and are
        stored as 0, with several rows together with their whole column.

    Returns
    -------
    codes, row_stats, outlier_cols
        int8, shape of A; float32 `[rows]`; int64 sorted columns that hold an outlier, None for threshold 0.
    """
    codes, scale, outliers = torch.ops.halfbyte.quantize_rows_int8(A.detach(), threshold)
    return codes, scale, outliers.nonzero().flatten() if threshold > 0.0 else None


def int8_vectorwise_dequant(A: Tensor, stats: Tensor) -> Tensor:
    """codes * row_stats / 127 as float32. A: int8 `[rows, depth]`, stats: float32 `[rows]`."""
    return torch.ops.halfbyte.dequantize_rows_int8(_plain(A), stats, torch.float32)


def int8_linear_matmul(
    A: Tensor, B: Tensor, out: Tensor | None = None, dtype: torch.dtype = torch.int32
) -> Tensor:
    """A B^T of int8 A `[..., depth]` and B `[rows, depth]`, exact in int32.

    Raises
    ------
    ValueError
        dtype other than int32; `out` of another shape or dtype.
    """
    if dtype != torch.int32:
        raise ValueError(f"int8_linear_matmul: dtype must be torch.int32, got {dtype}")
    return _store("int8_linear_matmul", torch.ops.halfbyte.matmul_int8(A, B), out)


def int8_mm_dequant(
    A: Tensor,
    row_stats: Tensor,
    col_stats: Tensor,
    out: Tensor | None = None,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """A * row_stats / 127 * col_stats / 127 + bias, in float32, then rounded to `dtype` (default float16).

    A: int32 `[..., n]` from `int8_linear_matmul`; row_stats: one per row of A; col_stats: `[n]`.
    """
    y = (
        A.float()
        * row_stats.reshape(*A.shape[:-1], 1).float()
        * (col_stats.reshape(-1).float() / (127.0 * 127.0))
    )
    if bias is not None:
        y = y + bias.float()
    if out is not None:
        return out.copy_(y)
    return y.to(torch.float16 if dtype is None else dtype)


def int8_double_quant(
    A: Tensor,
    col_stats: Tensor | None = None,
    row_stats: Tensor | None = None,
    out_col: Tensor | None = None,
    out_row: Tensor | None = None,
    threshold: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Quantize A `[rows, depth]` by rows and by columns. The preallocated arguments must be None.

    Returns
    -------
    by_row, by_col, row_stats, col_stats, outlier_cols
        int8 `[rows, depth]` twice, float32 `[rows]`, float32 `[depth]`, outlier columns as in
        `int8_vectorwise_quant`.
    """
    given = {"col_stats": col_stats, "row_stats": row_stats, "out_col": out_col, "out_row": out_row}
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"int8_double_quant: {name} must be None, got a tensor")
    by_row, row_stats, outlier_cols = int8_vectorwise_quant(A, threshold)
    # The maximum of a column leaves out its outliers; without a second row none is zeroed with its column.
    by_col, col_stats, _ = int8_vectorwise_quant(A.t(), threshold)
    return by_row, by_col.t().contiguous(), row_stats, col_stats, outlier_cols


def has_avx512bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in 512-bit vectors. bitsandbytes repacks weights where it does."""
    return _C.cpu_info()["detected"] == "avx512bf16"


def _convert_weight_packed_for_cpu(
    qweight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """Weight and state as they are: the kernels here read the layout of checkpoints."""
    return qweight, quant_state


def _convert_weight_packed_for_cpu_inverse(
    packed_weight: Tensor, quant_state: QuantState, block_n: int = 32
) -> tuple[Tensor, QuantState]:
    """Weight and state as they are, see `_convert_weight_packed_for_cpu`."""
    return packed_weight, quant_state

"""The extension module: types and functions over the C core.

`Array` below is anything that carries a tensor: torch.Tensor (through the DLPack 1.3 exchange API),
numpy.ndarray (bfloat16 as ml_dtypes.bfloat16, or as uint16 where `dtype="bfloat16"` can be said),
any object with `__dlpack__`, or with the buffer protocol. Outputs are made by the framework of the
first tensor argument (torch in, torch out; otherwise numpy; bfloat16 results without torch are
ml_dtypes.bfloat16 arrays when that package is imported, else uint16). `out=` is written in place.

Arrays of a CUDA device work as those of the processor do, on the current stream of the first array's framework;
nothing waits for the device. All arrays of a call lie on one device (and weights on x's), with two exceptions: maps
(256 floats) of the processor are sent along, and states of an optimizer may be managed memory. Strided or misaligned
inputs are copied on the device. Frameworks that only have `__dlpack__` are asked for the legacy default stream and
need `out=`, because they offer no allocator. Values on the device are not looked at (maps are not checked).

dtype arguments: "float32" | "bfloat16" | "float16", or a torch/numpy dtype that str() names so.
Errors: TypeError (wrong type or dtype), ValueError (value, shape, another device), BufferError (read-only, neither
processor nor CUDA, consumed capsule), MemoryError, CudaError (no usable GPU, or a launch failed). Each names function,
argument, expected and got.
"""

from collections.abc import Iterable
from typing import Any, Literal, final

_Array = Any
_Layer = tuple[Any, ...]
_QuantType = Literal["nf4", "fp4"]
_Scales = Literal["absmax", "search"]
_Compute = Literal["float32", "bfloat16", "int16", "int8"]
_Activation = Literal["silu", "gelu_tanh"]

class CudaError(RuntimeError):
    """No CUDA device can be used, or one reported an error."""

@final
class Params4bit:
    """A tensor in 4 bits, bitsandbytes layout. Immutable; owns its memory or keeps its owners alive."""

    @classmethod
    def quantize(
        cls,
        x: _Array,
        /,
        quant_type: _QuantType = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        scales: _Scales = "absmax",
        *,
        dtype: Any = None,
    ) -> Params4bit:
        """x of any shape. `dtype="bfloat16"` says that a uint16 `x` holds bfloat16."""
    @classmethod
    def from_parts(
        cls,
        packed: _Array,
        absmax: _Array,
        *,
        quant_type: _QuantType,
        blocksize: int,
        shape: tuple[int, ...],
        dtype: Any = "float32",
        nested_absmax: _Array | None = None,
        nested_map: _Array | None = None,
        nested_offset: float | _Array = 0.0,
        nested_blocksize: int = 256,
    ) -> Params4bit:
        """Zero-copy. `absmax` is float32, or uint8 codes when nested_absmax and nested_map are given.
        `packed` is any dtype (quant_storage); its bytes count."""
    def dequantize(self, dtype: Any = None, out: _Array | None = None) -> _Array: ...
    def parts(self) -> dict[str, Any]:
        """{"packed", "absmax"[, "nested_absmax", "nested_map", "nested_offset", "nested_blocksize"],
        "quant_type", "blocksize", "shape", "dtype"}: what from_parts takes."""
    def __getitem__(self, rows: slice, /) -> Params4bit:
        """Rows of the first dimension (step 1), needs depth % blocksize == 0. Zero-copy, but for nested
        scales of a slice that begins inside a nested block: those become float32 of its own."""
    def __len__(self) -> int: ...
    def __copy__(self) -> Params4bit: ...
    def __deepcopy__(self, memo: Any, /) -> Params4bit: ...
    def __reduce__(self) -> Any: ...
    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        """The packed bytes, uint8 [(numel + 1) // 2], read-only."""
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def _repr_html_(self) -> str: ...
    @property
    def packed(self) -> _Array: ...
    @property
    def absmax(self) -> _Array: ...
    @property
    def quant_type(self) -> _QuantType: ...
    @property
    def blocksize(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def double_quant(self) -> bool: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all stored parts."""
    @property
    def bits_per_param(self) -> float: ...

@final
class Linear4bit:
    """y = x W^T + b for a 4-bit W [rows, depth]. Callable (vectorcall)."""

    def __new__(
        cls, weight: Params4bit, bias: _Array | None = None, compute: _Compute = "float32"
    ) -> Linear4bit: ...
    @classmethod
    def from_float(
        cls,
        weight: _Array,
        bias: _Array | None = None,
        quant_type: _QuantType = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        scales: _Scales = "absmax",
        compute: _Compute = "float32",
    ) -> Linear4bit: ...
    def __call__(self, x: _Array, /, out: _Array | None = None) -> _Array:
        """x [..., depth] float32/bfloat16/float16 -> [..., rows] of x's dtype."""
    def grad_input(self, dy: _Array, /, out: _Array | None = None) -> _Array:
        """dx = dy W: [..., rows] -> [..., depth]."""
    def __copy__(self) -> Linear4bit: ...
    def __deepcopy__(self, memo: Any, /) -> Linear4bit: ...
    def __reduce__(self) -> Any: ...
    def _repr_html_(self) -> str: ...
    @property
    def weight(self) -> Params4bit: ...
    @property
    def bias(self) -> _Array | None: ...
    @property
    def compute(self) -> _Compute: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

@final
class Int8Params:
    """A matrix in int8 with one float32 scale (the absmax) per row: w = codes * scale / 127."""

    @classmethod
    def quantize(cls, x: _Array, /, *, dtype: Any = None) -> Int8Params: ...
    @classmethod
    def from_parts(
        cls, codes: _Array, scale: _Array, *, dtype: Any = "float16", shape: tuple[int, int] | None = None
    ) -> Int8Params:
        """Zero-copy. `shape`, when given, is checked."""
    def dequantize(self, dtype: Any = None, out: _Array | None = None) -> _Array: ...
    def parts(self) -> dict[str, Any]:
        """{"codes", "scale", "shape", "dtype"}."""
    def __getitem__(self, rows: slice, /) -> Int8Params: ...
    def __len__(self) -> int: ...
    def __copy__(self) -> Int8Params: ...
    def __deepcopy__(self, memo: Any, /) -> Int8Params: ...
    def __reduce__(self) -> Any: ...
    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        """The codes, int8 [rows, depth], read-only."""
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def _repr_html_(self) -> str: ...
    @property
    def codes(self) -> _Array: ...
    @property
    def scale(self) -> _Array: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bits_per_param(self) -> float: ...

@final
class Linear8bit:
    """y = x W^T + b for a row-wise int8 W. mode "dynamic" is LLM.int8(); "exact" keeps x in float32."""

    def __new__(
        cls,
        weight: Int8Params,
        bias: _Array | None = None,
        threshold: float = 0.0,
        mode: Literal["dynamic", "exact"] = "dynamic",
    ) -> Linear8bit: ...
    @classmethod
    def from_float(
        cls,
        weight: _Array,
        bias: _Array | None = None,
        threshold: float = 0.0,
        mode: Literal["dynamic", "exact"] = "dynamic",
    ) -> Linear8bit: ...
    def __call__(self, x: _Array, /, out: _Array | None = None) -> _Array: ...
    def grad_input(self, dy: _Array, /, out: _Array | None = None) -> _Array: ...
    def __copy__(self) -> Linear8bit: ...
    def __deepcopy__(self, memo: Any, /) -> Linear8bit: ...
    def __reduce__(self) -> Any: ...
    def _repr_html_(self) -> str: ...
    @property
    def weight(self) -> Int8Params: ...
    @property
    def bias(self) -> _Array | None: ...
    @property
    def threshold(self) -> float: ...
    @property
    def mode(self) -> Literal["dynamic", "exact"]: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

@final
class Params8bit:
    """A tensor in 8 bits per element, block-wise, with a 256-entry map (optimizer states, nested absmax)."""

    @classmethod
    def quantize(
        cls, x: _Array, /, map: str | _Array = "dynamic", blocksize: int = 256, *, dtype: Any = None
    ) -> Params8bit: ...
    @classmethod
    def from_parts(
        cls,
        codes: _Array,
        absmax: _Array,
        map: str | _Array,
        *,
        blocksize: int,
        shape: tuple[int, ...],
        dtype: Any = "float32",
    ) -> Params8bit: ...
    def dequantize(self, dtype: Any = None, out: _Array | None = None) -> _Array: ...
    def parts(self) -> dict[str, Any]:
        """{"codes", "absmax", "map", "blocksize", "shape", "dtype"}."""
    def __len__(self) -> int: ...
    def __copy__(self) -> Params8bit: ...
    def __deepcopy__(self, memo: Any, /) -> Params8bit: ...
    def __reduce__(self) -> Any: ...
    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def _repr_html_(self) -> str: ...
    @property
    def codes(self) -> _Array: ...
    @property
    def absmax(self) -> _Array: ...
    @property
    def map(self) -> _Array: ...
    @property
    def blocksize(self) -> int: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def device(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def bits_per_param(self) -> float: ...

# ---- stateless functions over raw tensors (what the torch ops and the checkpoint tool call) ----

def quantize_4bit(
    x: _Array,
    /,
    quant_type: _QuantType = "nf4",
    blocksize: int = 64,
    scales: _Scales = "absmax",
    *,
    dtype: Any = None,
    packed: _Array | None = None,
    absmax: _Array | None = None,
) -> tuple[_Array, _Array]:
    """-> (packed uint8 [(n + 1) // 2], absmax float32 [ceil(n / blocksize)]), written to `packed` and
    `absmax` when given (any contiguous tensor of that many bytes / float32). `dtype="bfloat16"` says
    that a uint16 `x` holds bfloat16; otherwise x's own dtype counts."""

def dequantize_4bit(
    packed: _Array,
    absmax: _Array,
    /,
    quant_type: _QuantType,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: Any = None,
    *,
    start: int = 0,
    out: _Array | None = None,
    nested_absmax: _Array | None = None,
    nested_map: _Array | None = None,
    nested_offset: float | _Array = 0.0,
    nested_blocksize: int = 256,
) -> _Array:
    """Elements [start, start + prod(shape)) of the flattened tensor, in `shape`. dtype None: that of `out`,
    else float32; numbers in uint16 `out` are bfloat16 when dtype says so."""

def nest_absmax(absmax: _Array, /, blocksize: int = 256) -> tuple[_Array, _Array, float | _Array]:
    """-> (codes uint8 [n], nested_absmax float32 [ceil(n / blocksize)], offset). The offset is a float; of a CUDA
    `absmax`, float32 [1] on its device, as every `nested_offset` may be."""

def linear_4bit(
    x: _Array,
    packed: _Array,
    absmax: _Array,
    /,
    quant_type: _QuantType,
    blocksize: int,
    shape: tuple[int, int],
    bias: _Array | None = None,
    compute: _Compute = "float32",
    *,
    out: _Array | None = None,
    nested_absmax: _Array | None = None,
    nested_map: _Array | None = None,
    nested_offset: float | _Array = 0.0,
    nested_blocksize: int = 256,
) -> _Array:
    """y = x W^T + b. compute: how products are formed on the processor; on CUDA x's dtype decides (float32: exact
    products; 16 bits: the codebook rounded to it, float32 sums and scales). "int16" and "int8", on the processor only:
    x and the codebook in integers, x with a scale for 64 columns; docs/numerics.md has the bounds."""

def linear_4bit_grad_input(
    dy: _Array,
    packed: _Array,
    absmax: _Array,
    /,
    quant_type: _QuantType,
    blocksize: int,
    shape: tuple[int, int],
    compute: _Compute = "float32",
    *,
    out: _Array | None = None,
    nested_absmax: _Array | None = None,
    nested_map: _Array | None = None,
    nested_offset: float | _Array = 0.0,
    nested_blocksize: int = 256,
) -> _Array: ...
def quantize_8bit(
    x: _Array,
    map: str | _Array,
    /,
    blocksize: int,
    *,
    dtype: Any = None,
    codes: _Array | None = None,
    absmax: _Array | None = None,
) -> tuple[_Array, _Array]:
    """-> (codes uint8, shape of x; absmax float32 [ceil(n / blocksize)])."""

def dequantize_8bit(
    codes: _Array,
    absmax: _Array,
    map: str | _Array,
    /,
    blocksize: int,
    dtype: Any = None,
    *,
    out: _Array | None = None,
) -> _Array: ...
def quantize_rows_int8(
    x: _Array,
    /,
    threshold: float = 0.0,
    *,
    dtype: Any = None,
    codes: _Array | None = None,
    scale: _Array | None = None,
) -> tuple[_Array, _Array, _Array | None]:
    """x [..., depth] -> (codes int8, shape of x; scale float32 [rows]; outlier columns bool [depth],
    or None when threshold is 0)."""

def dequantize_rows_int8(
    codes: _Array, scale: _Array, /, dtype: Any = None, *, out: _Array | None = None
) -> _Array: ...
def matmul_int8(a: _Array, b: _Array, /, *, out: _Array | None = None) -> _Array:
    """a int8 [..., depth], b int8 [rows, depth] -> int32 [..., rows], exact."""

def linear_8bit(
    x: _Array,
    codes: _Array,
    scale: _Array,
    /,
    bias: _Array | None = None,
    threshold: float = 0.0,
    mode: Literal["dynamic", "exact"] = "dynamic",
    *,
    out: _Array | None = None,
) -> _Array: ...
def linear_8bit_grad_input(
    dy: _Array, codes: _Array, scale: _Array, /, *, out: _Array | None = None
) -> _Array: ...
def linear_dense(
    x: _Array, weight: _Array, /, bias: _Array | None = None, *, out: _Array | None = None
) -> _Array:
    """y = x W^T + b for a plain W, made for few rows of x, which it multiplies at the speed of memory.

    x [..., depth] of any strides, weight [rows, depth] with contiguous rows at any distance -> [..., rows]; all of
    one dtype, float32, bfloat16 or float16. bias [rows], any of the three. Sums are float32, the bias is added and
    the result rounded once; csrc/core/kernels_dense.h has the bound of the error. Any number of rows of x is right;
    linear_dense_rows says up to how many it is fast.

    TypeError: another dtype, or two. ValueError: shapes that do not fit, rows of the weight that are not contiguous,
    memory of a GPU, an `out` that overlaps an input. BufferError: a read-only `out`.
    """

def linear_dense_few(x: _Array, weight: _Array, bias: _Array | None, /) -> _Array | None:
    """linear_dense, or None where the caller's own product is the one to use: more rows of x than
    linear_dense_rows, or operands that do not fit together."""

def linear_dense_rows(dtype: Any, /) -> int:
    """Rows of x up to which linear_dense was measured to be no slower than torch's dense product on processors with
    the instruction set in use; 0 where nobody measured."""

def rms_norm(x: _Array, weight: _Array, eps: float, /) -> _Array:
    """y = weight * round(x / sqrt(mean(x^2) + eps)) over the last dimension, rounded where transformers' LlamaRMSNorm
    rounds, the mean summed in float64.

    x [..., n] and weight [n] of one dtype, float32, bfloat16 or float16, with contiguous rows -> as x.

    TypeError: another dtype, or two. ValueError: shapes that do not fit, strided rows, memory of a GPU.
    """

def gate(gate: _Array, up: _Array, activation: _Activation, /) -> _Array:
    """round(f(gate)) * up, rounded: two arrays of one shape and dtype, with contiguous rows. Accuracy of f:
    csrc/core/kernels_fused.h. Errors as rms_norm."""

def rotate(x: _Array, cos: _Array, sin: _Array, /) -> _Array:
    """The rotary embedding of one token: round(x cos) + round((-second half, first half) sin), rounded.

    x [batch, heads, 1, depth], cos and sin [1 or batch, 1, depth], all of one dtype. Errors as rms_norm."""

def attend(q: _Array, k: _Array, v: _Array, scale: float, /) -> _Array:
    """softmax(scale q k^T) v for one token, in float32, rounded once.

    q [batch, heads, 1, depth], k and v [batch, groups, length, depth] -> [batch, 1, heads, depth]; heads a multiple of
    groups; all of one dtype. Errors as rms_norm."""

def mlp_4bit(
    x: _Array,
    gate: _Layer,
    up: _Layer,
    down: _Layer,
    activation: _Activation,
    compute: _Compute,
    /,
) -> _Array:
    """down(round(f(gate(x))) * up(x)) with three layers of 4 bits, for few rows of x: to the bit what linear_4bit and
    gate give one after the other.

    A layer is a tuple of linear_4bit's arguments: (packed, absmax, quant_type, blocksize, shape, bias), and where
    scales are nested (..., nested_absmax, nested_map, nested_offset, nested_blocksize). x [..., n] of contiguous rows
    -> [..., rows of down].

    TypeError: a dtype, or a layer that is no such tuple. ValueError: shapes that do not fit, memory of a GPU."""

def qkv_4bit(
    x: _Array,
    q: _Layer,
    k: _Layer,
    v: _Layer,
    cos: _Array,
    sin: _Array,
    depth: int,
    compute: _Compute,
    /,
) -> tuple[_Array, _Array, _Array]:
    """q(x), k(x) and v(x), each [batch, heads, 1, depth], q and k rotated: to the bit what linear_4bit and rotate give.

    x [batch, 1, n]; layers as mlp_4bit takes them, of heads * depth rows; cos and sin [1 or batch, 1, depth]. Errors as
    mlp_4bit."""

def attend_4bit(
    q: _Array,
    k: _Array,
    v: _Array,
    scale: float,
    out: _Layer,
    compute: _Compute,
    /,
) -> _Array:
    """out(attend(q, k, v, scale)) with a layer as mlp_4bit takes them, of heads * depth columns -> [batch, 1, rows]: to
    the bit what attend and linear_4bit give. Errors as mlp_4bit."""

def optimizer_step(
    optimizer: Literal["adam", "ademamix", "momentum", "lion", "rmsprop", "adagrad"],
    tensors: Iterable[tuple[Any, ...]],
    /,
    *,
    lr: float,
    beta1: float = 0.0,
    beta2: float = 0.0,
    beta3: float = 0.0,
    alpha: float = 0.0,
    eps: float = 0.0,
    weight_decay: float = 0.0,
    gnorm_scale: float = 1.0,
    max_unorm: float = 0.0,
    skip_zeros: bool = False,
    map1: str | _Array | None = None,
    map2: str | _Array | None = None,
) -> None:
    """One step, in place, for every (p, g, state1, state2, absmax1, absmax2, unorm, step) of `tensors`.

    p and g are float32, bfloat16 or float16, contiguous; states are float32, or uint8 with one float32
    scale per 256 elements. AdEMAMix's state1 is [2, *shape] (fast, slow). step counts from 1.
    """

def codebook(quant_type: _QuantType, /) -> _Array:
    """float32 numpy [16]."""

def map8(name: str, /) -> _Array:
    """float32 numpy [256], ascending: "dynamic", "dynamic_unsigned", "linear", "fp8_e4m3", "fp8_e5m2",
    "normal"."""

def cpu_info() -> dict[str, Any]:
    """{"detected": str, "used": str, "amx": str, "threads": int, "loops_on_torch_threads": int, "loops_late": int,
    "loops_crowded": int}. detected: the best instruction set that is used unless HALFBYTE_CPU names another. amx:
    "no" (none here), "off" (used where HALFBYTE_CPU is "amx" and the system grants it) or "used". Parallel loops so
    far: those that torch's OpenMP threads ran for us, those that waited for a thread without a processor, those with
    fewer threads because of such waits."""

def cuda_info() -> dict[str, Any]:
    """{"available": bool, "reason": str | None, "driver": str | None, "runtime": str | None, "devices":
    list[dict]}: whether CUDA tensors can be used, and if not, why. Opens the CUDA library, makes no context.
    A device is {"name": str, "capability": (int, int), "multiprocessors": int, "memory": bytes}."""

def cuda_managed_memory(device: int, size: int, /) -> object:
    """`size` bytes of CUDA managed memory, uint8 on a device, as a DLPack capsule."""

def cuda_prefetch(array: _Array, /) -> None:
    """Moves the pages of managed memory to the array's device, in the order of its stream."""

def cuda_view(address: int, size: int, device: int, /) -> object | None:
    """The `size` bytes at an address as a DLPack capsule, uint8 on the device; None where the address is not of
    memory that the device reads. Nothing keeps the memory alive."""

def grouped_linear_4bit(
    x: _Array,
    offsets: _Array,
    packed: _Array,
    absmax: _Array,
    /,
    quant_type: _QuantType,
    blocksize: int,
    shape: tuple[int, int, int],
    transposed: bool = False,
    *,
    nested_absmax: _Array | None = None,
    nested_map: _Array | None = None,
    nested_offset: float | _Array = 0.0,
    nested_blocksize: int = 256,
) -> _Array:
    """Rows [offsets[e-1], offsets[e]) of x times expert e's matrix of a stack (experts, rows, depth): x W[e]^T,
    transposed: x W[e]. CUDA only."""

def grouped_linear_8bit(
    x: _Array,
    offsets: _Array,
    codes: _Array,
    scale: _Array,
    /,
    transposed: bool = False,
    threshold: float = 0.0,
    mode: Literal["dynamic", "exact"] = "dynamic",
) -> _Array:
    """The same with codes int8 [experts, rows, depth] and scale [experts, rows]. Outlier columns are those of all
    rows of x together. CUDA only."""

def gather_4bit(
    index: _Array,
    packed: _Array,
    absmax: _Array,
    /,
    quant_type: _QuantType,
    blocksize: int,
    shape: tuple[int, int],
    dtype: Any = None,
    *,
    nested_absmax: _Array | None = None,
    nested_map: _Array | None = None,
    nested_offset: float | _Array = 0.0,
    nested_blocksize: int = 256,
) -> _Array:
    """Rows of a table (rows, depth): index int64 [...] -> [..., depth]. An index counts from the end where
    negative; one outside gives a row of NaN. CUDA only."""

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def build_info() -> dict[str, Any]:
    """{"compiler": str, "isas": list[str], "dlpack": str, "numpy_target": str, "sanitize": bool, "cuda": str}.
    cuda says for which GPUs the CUDA library was built, or why for none."""

def read_memory(data: _Array, /) -> int:
    """Reads a buffer as fast as the threads can and does nothing else: a ruler for kernels. Whole pieces of 256 KiB;
    returns the sum of their 64-bit words modulo 2^64."""

def multiply_adds(kind: Literal["float32", "bfloat16", "int8"], calls: int, /) -> int:
    """Multiplies in registers as fast as the threads can and does nothing else. calls: pieces of some ten thousand
    vector instructions. Returns the operations, a multiply-add counted as two; 0 at once where the processor has no
    instruction for that kind."""

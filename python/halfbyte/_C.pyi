"""The extension module: types and functions over the C core.

`Array` below is anything that carries a tensor: torch.Tensor (through the DLPack 1.3 exchange API),
numpy.ndarray (bfloat16 as ml_dtypes.bfloat16, or as uint16 where `dtype="bfloat16"` can be said),
any object with `__dlpack__`, or with the buffer protocol. Outputs are made by the framework of the
first tensor argument (torch in, torch out; otherwise numpy; bfloat16 results without torch are
ml_dtypes.bfloat16 arrays when that package is imported, else uint16). `out=` is written in place.

dtype arguments: "float32" | "bfloat16" | "float16", or a torch/numpy dtype that str() names so.
Errors: TypeError (wrong type or dtype), ValueError (value or shape), BufferError (read-only, device,
consumed capsule), MemoryError. Each names function, argument, expected and got.
"""

from typing import Any, Literal, final

Array = Any
QuantType = Literal["nf4", "fp4"]
Scales = Literal["absmax", "search"]
Compute = Literal["float32", "bfloat16"]

class CudaError(RuntimeError): ...

@final
class Params4bit:
    """A tensor in 4 bits, bitsandbytes layout. Immutable; owns its memory or keeps its owners alive."""

    @classmethod
    def quantize(
        cls,
        x: Array,
        /,
        quant_type: QuantType = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        scales: Scales = "absmax",
    ) -> Params4bit: ...
    @classmethod
    def from_parts(
        cls,
        packed: Array,
        absmax: Array,
        /,
        *,
        quant_type: QuantType,
        blocksize: int,
        shape: tuple[int, ...],
        dtype: Any = "float32",
        nested_absmax: Array | None = None,
        nested_map: Array | None = None,
        nested_offset: float = 0.0,
        nested_blocksize: int = 256,
    ) -> Params4bit:
        """Zero-copy. `absmax` is float32, or uint8 codes when nested_absmax and nested_map are given.
        `packed` is any dtype (quant_storage); its bytes count."""
    def dequantize(self, dtype: Any = None, out: Array | None = None) -> Array: ...
    def parts(self) -> dict[str, Any]:
        """{"packed", "absmax"[, "nested_absmax", "nested_map", "nested_offset", "nested_blocksize"],
        "quant_type", "blocksize", "shape", "dtype"}: what from_parts takes."""
    def __getitem__(self, rows: slice) -> Params4bit:
        """Rows of the first dimension (step 1). Zero-copy; needs depth % blocksize == 0."""
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
    def packed(self) -> Array: ...
    @property
    def absmax(self) -> Array: ...
    @property
    def quant_type(self) -> QuantType: ...
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
        cls, weight: Params4bit, bias: Array | None = None, compute: Compute = "float32"
    ) -> Linear4bit: ...
    @classmethod
    def from_float(
        cls,
        weight: Array,
        bias: Array | None = None,
        quant_type: QuantType = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        scales: Scales = "absmax",
        compute: Compute = "float32",
    ) -> Linear4bit: ...
    def __call__(self, x: Array, /, out: Array | None = None) -> Array:
        """x [..., depth] float32/bfloat16/float16 -> [..., rows] of x's dtype."""
    def grad_input(self, dy: Array, /, out: Array | None = None) -> Array:
        """dx = dy W: [..., rows] -> [..., depth]."""
    def __copy__(self) -> Linear4bit: ...
    def __deepcopy__(self, memo: Any, /) -> Linear4bit: ...
    def __reduce__(self) -> Any: ...
    def _repr_html_(self) -> str: ...
    @property
    def weight(self) -> Params4bit: ...
    @property
    def bias(self) -> Array | None: ...
    @property
    def compute(self) -> Compute: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...

@final
class Int8Params:
    """A matrix in int8 with one float32 scale (the absmax) per row: w = codes * scale / 127."""

    @classmethod
    def quantize(cls, x: Array, /) -> Int8Params: ...
    @classmethod
    def from_parts(cls, codes: Array, scale: Array, /, *, dtype: Any = "float16") -> Int8Params: ...
    def dequantize(self, dtype: Any = None, out: Array | None = None) -> Array: ...
    def parts(self) -> dict[str, Any]:
        """{"codes", "scale", "shape", "dtype"}."""
    def __getitem__(self, rows: slice) -> Int8Params: ...
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
    def codes(self) -> Array: ...
    @property
    def scale(self) -> Array: ...
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
        bias: Array | None = None,
        threshold: float = 0.0,
        mode: Literal["dynamic", "exact"] = "dynamic",
    ) -> Linear8bit: ...
    @classmethod
    def from_float(
        cls,
        weight: Array,
        bias: Array | None = None,
        threshold: float = 0.0,
        mode: Literal["dynamic", "exact"] = "dynamic",
    ) -> Linear8bit: ...
    def __call__(self, x: Array, /, out: Array | None = None) -> Array: ...
    def grad_input(self, dy: Array, /, out: Array | None = None) -> Array: ...
    def __copy__(self) -> Linear8bit: ...
    def __deepcopy__(self, memo: Any, /) -> Linear8bit: ...
    def __reduce__(self) -> Any: ...
    def _repr_html_(self) -> str: ...
    @property
    def weight(self) -> Int8Params: ...
    @property
    def bias(self) -> Array | None: ...
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
    def quantize(cls, x: Array, /, map: str | Array = "dynamic", blocksize: int = 256) -> Params8bit: ...
    @classmethod
    def from_parts(
        cls,
        codes: Array,
        absmax: Array,
        map: str | Array,
        /,
        *,
        blocksize: int,
        shape: tuple[int, ...],
        dtype: Any = "float32",
    ) -> Params8bit: ...
    def dequantize(self, dtype: Any = None, out: Array | None = None) -> Array: ...
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
    def codes(self) -> Array: ...
    @property
    def absmax(self) -> Array: ...
    @property
    def map(self) -> Array: ...
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
    x: Array,
    /,
    quant_type: QuantType = "nf4",
    blocksize: int = 64,
    scales: Scales = "absmax",
    *,
    dtype: Any = None,
    packed: Array | None = None,
    absmax: Array | None = None,
) -> tuple[Array, Array]:
    """-> (packed uint8 [(n + 1) // 2], absmax float32 [ceil(n / blocksize)]), written to `packed` and
    `absmax` when given (any contiguous tensor of that many bytes / float32). `dtype="bfloat16"` says
    that a uint16 `x` holds bfloat16; otherwise x's own dtype counts."""

def dequantize_4bit(
    packed: Array,
    absmax: Array,
    /,
    quant_type: QuantType,
    blocksize: int,
    shape: tuple[int, ...],
    dtype: Any = None,
    *,
    start: int = 0,
    out: Array | None = None,
    nested_absmax: Array | None = None,
    nested_map: Array | None = None,
    nested_offset: float = 0.0,
    nested_blocksize: int = 256,
) -> Array:
    """Elements [start, start + prod(shape)) of the flattened tensor, in `shape`. dtype None: that of `out`,
    else float32; numbers in uint16 `out` are bfloat16 when dtype says so."""

def nest_absmax(absmax: Array, /, blocksize: int = 256) -> tuple[Array, Array, float]:
    """-> (codes uint8 [n], nested_absmax float32 [ceil(n / blocksize)], offset)."""

def linear_4bit(
    x: Array,
    packed: Array,
    absmax: Array,
    /,
    quant_type: QuantType,
    blocksize: int,
    shape: tuple[int, int],
    bias: Array | None = None,
    compute: Compute = "float32",
    *,
    out: Array | None = None,
    nested_absmax: Array | None = None,
    nested_map: Array | None = None,
    nested_offset: float = 0.0,
    nested_blocksize: int = 256,
) -> Array: ...
def linear_4bit_grad_input(
    dy: Array,
    packed: Array,
    absmax: Array,
    /,
    quant_type: QuantType,
    blocksize: int,
    shape: tuple[int, int],
    compute: Compute = "float32",
    *,
    out: Array | None = None,
    nested_absmax: Array | None = None,
    nested_map: Array | None = None,
    nested_offset: float = 0.0,
    nested_blocksize: int = 256,
) -> Array: ...
def quantize_8bit(
    x: Array,
    map: str | Array,
    /,
    blocksize: int,
    *,
    dtype: Any = None,
    codes: Array | None = None,
    absmax: Array | None = None,
) -> tuple[Array, Array]:
    """-> (codes uint8, shape of x; absmax float32 [ceil(n / blocksize)])."""

def dequantize_8bit(
    codes: Array,
    absmax: Array,
    map: str | Array,
    /,
    blocksize: int,
    dtype: Any = None,
    *,
    out: Array | None = None,
) -> Array: ...
def quantize_rows_int8(
    x: Array,
    /,
    threshold: float = 0.0,
    *,
    dtype: Any = None,
    codes: Array | None = None,
    scale: Array | None = None,
) -> tuple[Array, Array, Array | None]:
    """x [..., depth] -> (codes int8, shape of x; scale float32 [rows]; outlier columns bool [depth],
    or None when threshold is 0)."""

def dequantize_rows_int8(
    codes: Array, scale: Array, /, dtype: Any = None, *, out: Array | None = None
) -> Array: ...
def matmul_int8(a: Array, b: Array, /, *, out: Array | None = None) -> Array:
    """a int8 [..., depth], b int8 [rows, depth] -> int32 [..., rows], exact."""

def linear_8bit(
    x: Array,
    codes: Array,
    scale: Array,
    /,
    bias: Array | None = None,
    threshold: float = 0.0,
    mode: Literal["dynamic", "exact"] = "dynamic",
    *,
    out: Array | None = None,
) -> Array: ...
def linear_8bit_grad_input(
    dy: Array, codes: Array, scale: Array, /, *, out: Array | None = None
) -> Array: ...
def codebook(quant_type: QuantType, /) -> Array:
    """float32 numpy [16]."""

def map8(name: str, /) -> Array:
    """float32 numpy [256], ascending: "dynamic", "dynamic_unsigned", "linear", "fp8_e4m3", "fp8_e5m2",
    "normal"."""

def cpu_info() -> dict[str, Any]:
    """{"detected": str, "used": str, "threads": int}."""

def set_num_threads(n: int, /) -> None: ...
def get_num_threads() -> int: ...
def build_info() -> dict[str, Any]:
    """{"compiler": str, "isas": list[str], "dlpack": str, "numpy_target": str, "sanitize": bool}."""

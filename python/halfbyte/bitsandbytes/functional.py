"""Functions on tensors, by `halfbyte.torch.functional`."""

from halfbyte.torch.functional import (
    QuantState,
    create_dynamic_map,
    create_fp8_map,
    create_linear_map,
    create_normal_map,
    dequantize_4bit,
    dequantize_blockwise,
    dequantize_fp4,
    dequantize_nf4,
    gemv_4bit,
    get_4bit_type,
    int8_double_quant,
    int8_linear_matmul,
    int8_mm_dequant,
    int8_vectorwise_dequant,
    int8_vectorwise_quant,
    name2qmap,
    pack_dict_to_tensor,
    quantize_4bit,
    quantize_blockwise,
    quantize_fp4,
    quantize_nf4,
    unpack_tensor_to_dict,
)

__all__ = [
    "QuantState",
    "create_dynamic_map",
    "create_fp8_map",
    "create_linear_map",
    "create_normal_map",
    "dequantize_4bit",
    "dequantize_blockwise",
    "dequantize_fp4",
    "dequantize_nf4",
    "gemv_4bit",
    "get_4bit_type",
    "has_avx512bf16",
    "int8_double_quant",
    "int8_linear_matmul",
    "int8_mm_dequant",
    "int8_vectorwise_dequant",
    "int8_vectorwise_quant",
    "name2qmap",
    "pack_dict_to_tensor",
    "quantize_4bit",
    "quantize_blockwise",
    "quantize_fp4",
    "quantize_nf4",
    "unpack_tensor_to_dict",
]

C = 127.0


def has_avx512bf16() -> bool:
    """Whether weights must be repacked before a product on this CPU: never here, whatever the CPU has."""
    return False


def __getattr__(name: str) -> None:
    raise AttributeError(
        f"bitsandbytes.functional.{name} is not part of this halfbyte, which stands in for bitsandbytes"
    )

"""Embeddings: with a quantized table, and with a float one whose optimizer states stay in 32 bits.

Of a quantized table only the rows that are looked up are dequantized. bitsandbytes cannot save these two
modules; here they are saved as the linear layers are, `weight` with its statistics beside it in 4 bits,
`weight` and `SCB` in 8 bits. A table that is not quantized yet cannot be saved either here or there.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.torch.functional import nested_tensors
from halfbyte.torch.nn.int8params import Int8Params
from halfbyte.torch.nn.params4bit import Params4bit, repair_quant_state
from halfbyte.torch.nn.saving import Saves4bit
from halfbyte.torch.optim.manager import GlobalOptimManager

logger = logging.getLogger(__name__)


def _not_quantized(module: nn.Module) -> NotImplementedError:
    return NotImplementedError(
        f"{type(module).__name__}: the table is not quantized yet and has no form to be saved in; move the "
        "module to its device first, e.g. module.to('cpu') or module.cuda()"
    )


class Embedding8bit(nn.Embedding):
    """A table of row-wise int8, quantized when the module is moved to its device.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and depth of the table.
    device, dtype
        Of the float table; the result has this dtype.

    Shape
    -----
    Indices of any shape -> `[*indices.shape, embedding_dim]`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Int8Params(self.weight.data, has_fp16_weights=False, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        scale = self.weight.SCB
        if scale is None:
            raise RuntimeError(
                f"{type(self).__name__}: the table is not quantized yet; move the module to its device "
                "first, e.g. module.to('cpu') or module.cuda()"
            )
        rows = input.reshape(-1)
        codes = self.weight.data.index_select(0, rows)
        found = torch.ops.halfbyte.dequantize_rows_int8(codes, scale.index_select(0, rows), self.dtype)
        return found.view(*input.shape, self.embedding_dim)

    def _apply(self, fn: Any, recurse: bool = True) -> "Embedding8bit":
        super()._apply(fn, recurse)
        self.weight.follow()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        scale = self.weight.SCB
        if scale is None:
            raise _not_quantized(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}SCB"] = scale if keep_vars else scale.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict,
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list,
        unexpected_keys: list,
        error_msgs: list,
    ) -> None:
        codes, scale = state_dict.get(f"{prefix}weight"), state_dict.get(f"{prefix}SCB")
        if codes is None or scale is None:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            return
        shape = [self.num_embeddings, self.embedding_dim]
        if codes.dtype != torch.int8 or list(codes.shape) != shape or list(scale.shape) != shape[:1]:
            error_msgs.append(
                f"size mismatch for {prefix}weight: expected int8 {shape} and SCB {shape[:1]}, got "
                f"{codes.dtype} {list(codes.shape)} and SCB {list(scale.shape)}"
            )
            return
        if f"{prefix}SCB" in unexpected_keys:
            unexpected_keys.remove(f"{prefix}SCB")
        device = codes.device if self.weight.is_meta else self.weight.device
        codes = codes.detach().to(device, copy=True)
        self.weight = Int8Params(
            codes, False, CB=codes, SCB=scale.detach().to(device, torch.float32, copy=True)
        )


class Embedding4bit(Saves4bit, nn.Embedding):
    """A table in 4 bits, quantized when the module is moved to its device.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and depth of the table. With a depth that is no multiple of the block size each call on the CPU
        dequantizes the whole table.
    dtype
        Of the float table; the result has this dtype.
    quant_type, quant_storage
        See `Params4bit`.

    Shape
    -----
    Indices of any shape -> `[*indices.shape, embedding_dim]`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, device=device, dtype=dtype)
        self.dtype = self.weight.dtype
        self.weight = Params4bit(
            self.weight.data,
            requires_grad=False,
            compress_statistics=False,
            quant_type=quant_type,
            quant_storage=quant_storage,
            module=self,
        )
        self.quant_state = None
        self.quant_storage = quant_storage
        if embedding_dim % self.weight.blocksize:
            logger.warning(
                f"Embedding size {embedding_dim} is not divisible by block size {self.weight.blocksize}. "
                "This will lead to slow inference."
            )

    def forward(self, input: Tensor) -> Tensor:
        state = repair_quant_state(self)
        return torch.ops.halfbyte.embedding_4bit(
            input,
            self.weight.data,
            state.absmax,
            state.quant_type,
            state.blocksize,
            self._weight_shape(),
            self.dtype,
            *nested_tensors(state),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Embedding4bit":
        super()._apply(fn, recurse)
        self.weight.follow()
        return self

    def _weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        if self.weight.quant_state is None:
            raise _not_quantized(self)
        super()._save_to_state_dict(destination, prefix, keep_vars)


class EmbeddingNF4(Embedding4bit):
    """`Embedding4bit` with NF4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "nf4", quant_storage, device)


class EmbeddingFP4(Embedding4bit):
    """`Embedding4bit` with FP4."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        dtype: torch.dtype | None = None,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, dtype, "fp4", quant_storage, device)


class Embedding(nn.Embedding):
    """`torch.nn.Embedding`, Xavier-initialised, whose optimizer states stay in 32 bits (see
    `GlobalOptimManager`): the gradient of a rare token is too uneven for 8 bits.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device=device,
        )
        GlobalOptimManager.get_instance().register_module_override(self, "weight", {"optim_bits": 32})

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()


class StableEmbedding(Embedding):
    """`Embedding` followed by a layer norm, which is computed in torch's default dtype
    (Dettmers et al., arXiv:2110.02861, section 2.3).
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            device,
        )
        if dtype is not None:
            self.to(dtype)
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        found = super().forward(input).to(torch.get_default_dtype())
        return self.norm(found).to(self.weight.dtype)

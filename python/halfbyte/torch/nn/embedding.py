"""Embeddings with a quantized table: only the rows that are looked up are dequantized.

Their state dicts cannot be saved: bitsandbytes has no format for them, so nobody could read the file.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.torch.functional import dequantize_4bit, dequantize_blockwise
from halfbyte.torch.nn.int8params import Int8Params
from halfbyte.torch.nn.params4bit import Params4bit, repair_quant_state

logger = logging.getLogger(__name__)


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
        raise NotImplementedError(
            f"{type(self).__name__}: there is no format to save a quantized embedding in"
        )


class Embedding4bit(nn.Embedding):
    """A table in 4 bits, quantized when the module is moved to its device.

    Parameters
    ----------
    num_embeddings, embedding_dim
        Rows and depth of the table. With a depth that is no multiple of the block size each call dequantizes
        the whole table.
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
        packed = self.weight.data
        if self.embedding_dim % state.blocksize:
            return nn.functional.embedding(input, dequantize_4bit(packed, state)).to(self.dtype)
        absmax = state.absmax
        if state.nested:
            absmax = dequantize_blockwise(absmax, state.state2) + state.offset
        rows = input.reshape(-1)
        return torch.ops.halfbyte.dequantize_4bit(
            packed.view(torch.uint8).view(self.num_embeddings, -1).index_select(0, rows),
            absmax.view(self.num_embeddings, -1).index_select(0, rows).view(-1),
            state.quant_type,
            state.blocksize,
            (*input.shape, self.embedding_dim),
            self.dtype,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> "Embedding4bit":
        super()._apply(fn, recurse)
        self.weight.follow()
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        raise NotImplementedError(
            f"{type(self).__name__}: there is no format to save a quantized embedding in"
        )


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

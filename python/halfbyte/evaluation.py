"""How much a quantized model differs from the original: KL divergence and paired change of the NLL.

Both models read the same tokens, window by window. For every position t of a window the original predicts
p_t and the other model q_t over the whole vocabulary:

    KL_t  = sum_v p_t(v) (log p_t(v) - log q_t(v))      what quantization changed, whatever the text says
    dNLL_t = log p_t(x_t+1) - log q_t(x_t+1)            what it cost on this very text

Means are per predicted token, in nats. Tokens of one window are not independent of each other, so the
standard errors are those of the windows' means (a cluster of tokens each), not of single tokens.
KL is the yardstick: one lucky rounding can hide in dNLL, whose standard error covers the text but not
the rounding. Sums are in float64.

torch and transformers are imported by the functions that need them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp, sqrt
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from halfbyte.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["Comparison", "compare", "generate", "generation_speed", "load_float32", "token_windows"]


@dataclass(frozen=True)
class Comparison:
    """A model against the original on one text; nats per predicted token.

    Attributes
    ----------
    tokens, windows
        Predicted tokens, and the windows they came in.
    kl, kl_se
        Mean KL divergence of the model from the original, and its standard error over windows.
    nll, nll_original
        Mean negative log likelihood of the text.
    nll_change, nll_change_se
        Mean paired difference (positive: the model is worse), and its standard error over windows.
    top1
        Share of positions where both models prefer the same token.
    tokens_per_second
        Tokens read per second by the model (whole windows at a time).
    """

    tokens: int
    windows: int
    kl: float
    kl_se: float
    nll: float
    nll_original: float
    nll_change: float
    nll_change_se: float
    top1: float
    tokens_per_second: float

    @property
    def perplexity_ratio(self) -> float:
        """exp of the NLL change."""
        return exp(self.nll_change)

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def token_windows(
    tokenizer: Any, text: str, *, window: int = 256, max_tokens: int | None = None
) -> torch.Tensor:
    """Cut a text into windows of tokens; what is left at the end is dropped.

    Parameters
    ----------
    tokenizer
        Anything callable like a transformers tokenizer.
    text
        The text, or a file's content.
    window
        Tokens per window.
    max_tokens
        Use no more than the first so many tokens.

    Returns
    -------
    torch.Tensor
        int64 [windows, window].

    Raises
    ------
    ValueError
        If the text has fewer tokens than one window.
    """
    import torch

    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:max_tokens]
    windows = len(ids) // window
    if windows == 0:
        raise CheckpointError(
            "E403",
            f"token_windows: text has {len(ids)} tokens, expected at least one window of {window}",
            fix="give a longer text, or a smaller --window",
        )
    return torch.tensor(ids[: windows * window], dtype=torch.int64).reshape(windows, window)


def compare(
    original: Any,
    model: Any,
    text: str | torch.Tensor,
    *,
    tokenizer: Any = None,
    window: int = 256,
    batch: int = 4,
    max_tokens: int | None = None,
) -> Comparison:
    """Measure how far `model` has moved from `original` on a text.

    Parameters
    ----------
    original, model
        Causal language models as transformers makes them (`model(input_ids).logits`), or the paths of
        checkpoints, which are then loaded in float32.
    text
        A string (then `tokenizer` or a path as `original` is needed), or token ids int64 [windows, window].
    tokenizer
        Tokenizer, or the path of one.
    window, max_tokens
        See `token_windows`.
    batch
        Windows read at a time.

    Returns
    -------
    Comparison

    Raises
    ------
    ValueError
        If the text is too short, or text is a string and there is no tokenizer.
    """
    import torch

    if isinstance(text, str):
        if tokenizer is None and isinstance(original, (str, Path)):
            tokenizer = original
        if tokenizer is None:
            raise ValueError("compare: tokenizer is None, expected one because text is a string")
        if isinstance(tokenizer, (str, Path)):
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        text = token_windows(tokenizer, text, window=window, max_tokens=max_tokens)
    original, model = _load(original), _load(model)

    kl, nll, nll_original, top1, seconds = [], [], [], [], 0.0
    with torch.inference_mode():
        for ids in text.split(batch):
            p = _log_probabilities(original, ids)
            start = perf_counter()
            logits = model(input_ids=ids).logits
            seconds += perf_counter() - start
            q = torch.log_softmax(logits[:, :-1].double(), dim=-1)
            target = ids[:, 1:, None]
            kl.append((p.exp() * (p - q)).sum(-1).mean(-1))
            nll.append(-q.gather(-1, target).mean((-2, -1)))
            nll_original.append(-p.gather(-1, target).mean((-2, -1)))
            top1.append((p.argmax(-1) == q.argmax(-1)).double().mean(-1))
    kl_mean, kl_se = _mean_and_error(torch.cat(kl))
    change, change_se = _mean_and_error(torch.cat(nll) - torch.cat(nll_original))
    return Comparison(
        tokens=text.shape[0] * (text.shape[1] - 1),
        windows=text.shape[0],
        kl=kl_mean,
        kl_se=kl_se,
        nll=torch.cat(nll).mean().item(),
        nll_original=torch.cat(nll_original).mean().item(),
        nll_change=change,
        nll_change_se=change_se,
        top1=torch.cat(top1).mean().item(),
        tokens_per_second=text.numel() / seconds,
    )


def generation_speed(model: Any, prompt: torch.Tensor, *, tokens: int = 64, repeats: int = 3) -> float:
    """Tokens per second of greedy generation for one prompt int64 [1, length]; the best of `repeats` runs."""
    best = 0.0
    for _ in range(repeats):
        start = perf_counter()
        generate(model, prompt, tokens=tokens)
        best = max(best, tokens / (perf_counter() - start))
    return best


def generate(model: Any, prompt: torch.Tensor, *, tokens: int = 64, **options: Any) -> torch.Tensor:
    """Exactly `tokens` greedy tokens after the prompt int64 [1, length] -> int64 [tokens].

    `options` go to transformers' `generate`.
    """
    import torch

    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    return out[0, prompt.shape[1] :]


def _load(model: Any) -> Any:
    """The model itself, or the one that a path names, in float32."""
    if not isinstance(model, (str, Path)):
        return model
    return load_float32(model)


def load_float32(path: str | Path) -> Any:
    """A model for measuring: the checkpoint at `path`, with everything that is not quantized in float32.

    transformers leaves the dense tensors of an already quantized checkpoint in the dtype of the file, whatever
    it is told; they are widened here, which is exact.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def _log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """float64 [windows, window - 1, vocabulary]: predictions of tokens 1.. of each window."""
    import torch

    return torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), dim=-1)


def _mean_and_error(per_window: torch.Tensor) -> tuple[float, float]:
    """Mean, and its standard error (NaN for a single window)."""
    n = per_window.numel()
    return per_window.mean().item(), per_window.std().item() / sqrt(n) if n > 1 else float("nan")

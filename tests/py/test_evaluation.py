"""Evaluation: the numbers of `compare` are the definitions', worked out by hand on models made of a table."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from math import log
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from halfbyte.evaluation import compare, token_windows  # noqa: E402


class Table:
    """A model whose prediction depends on the last token only: logits[vocabulary, vocabulary]."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        self.logits = torch.tensor(probabilities).log() + 3.0  # a shift must not matter

    def __call__(self, input_ids):
        return SimpleNamespace(logits=self.logits[input_ids])


def letters(text: str, add_special_tokens: bool) -> dict:
    assert not add_special_tokens
    return {"input_ids": [ord(letter) - ord("a") for letter in text]}


P = Table([[0.5, 0.5], [0.25, 0.75]])
Q = Table([[0.25, 0.75], [0.25, 0.75]])


def test_kl_and_nll_by_hand():
    ids = torch.tensor([[0, 0, 1], [1, 1, 0]])  # predictions: after a, a | b, b
    result = compare(P, Q, ids)
    kl_after_a = 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)
    assert result.tokens == 4 and result.windows == 2
    assert result.kl == pytest.approx(kl_after_a / 2, rel=1e-6)  # the second window has KL 0
    assert result.kl_se == pytest.approx(
        kl_after_a / 2, rel=1e-6
    )  # two means m, 0: sd m / sqrt 2, over sqrt 2
    change = (log(0.5 / 0.25) + log(0.5 / 0.75)) / 2  # first window: a, then b
    assert result.nll_change == pytest.approx(change / 2, rel=1e-6)
    nll_original = (log(2) + log(2) + log(1 / 0.75) + log(1 / 0.25)) / 4
    assert result.nll_original == pytest.approx(nll_original, rel=1e-6)
    assert result.nll - result.nll_original == pytest.approx(result.nll_change, rel=1e-6)
    assert result.perplexity_ratio == pytest.approx(torch.tensor(result.nll_change).exp().item(), rel=1e-6)


def test_a_model_does_not_differ_from_itself():
    result = compare(P, P, "abba" * 8, tokenizer=letters, window=4)
    assert (result.kl, result.kl_se, result.nll_change, result.nll_change_se) == (0, 0, 0, 0)
    assert result.top1 == 1.0 and result.tokens_per_second > 0


def test_the_batch_makes_no_difference():
    ids = torch.randint(0, 2, (7, 16), generator=torch.Generator().manual_seed(0))
    one, all_at_once = compare(P, Q, ids, batch=1), compare(P, Q, ids, batch=100)
    assert one.kl == pytest.approx(all_at_once.kl, rel=1e-12)
    assert one.nll_change_se == pytest.approx(all_at_once.nll_change_se, rel=1e-12)


def test_windows_cover_the_text_in_order():
    assert token_windows(letters, "abcdefgh", window=3).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert token_windows(letters, "abcdefgh", window=3, max_tokens=5).tolist() == [[0, 1, 2]]


def test_errors_name_argument_and_values():
    with pytest.raises(ValueError, match="text has 2 tokens, expected at least one window of 3"):
        token_windows(letters, "ab", window=3)
    with pytest.raises(ValueError, match="tokenizer is None"):
        compare(P, Q, "abc")


def test_original_and_copy_of_the_bundled_model(tiny_llama, heldout_text):
    """A checkpoint's path stands for the model; a copy with one weight moved is told from the original."""
    pytest.importorskip("transformers")
    from transformers import AutoModelForCausalLM

    moved = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    moved.model.layers[0].self_attn.v_proj.weight.data[3] *= 1.5
    result = compare(tiny_llama, moved, heldout_text, max_tokens=1024)
    assert result.windows == 4
    assert 1e-6 < result.kl < 0.1
    assert 2.0 < result.nll_original < 4.5  # trained: far below log(2048) = 7.6


def test_a_model_that_says_nan_fails_every_bound(tiny_llama, tmp_path):
    """`eval --max-kl`: no comparison holds with NaN, so "not larger" must not be what is asked."""
    pytest.importorskip("transformers")
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    (tmp_path / "text").write_text("some words of a text " * 40)
    command = [sys.executable, "-m", "halfbyte.cli.main", "eval", tiny_llama, broken, "--text", tmp_path / "text",
               "--window", "32", "--json"]  # fmt: skip
    done = subprocess.run([*command, "--max-kl", "1"], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["kl"] is None

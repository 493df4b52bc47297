"""The texts and models that figures in the documentation were measured with do not change unnoticed."""

import hashlib
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


def test_heldout_text_is_frozen():
    digest = hashlib.sha256((DATA / "heldout.txt").read_bytes()).hexdigest()
    assert digest == "f8aa2ca4e45f9c4120e0be80fa7c600ad7392634ec89f74e24588801609ce4d6"


def test_model_is_the_one_that_was_measured():
    digest = hashlib.sha256((DATA / "tiny-llama" / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "72aedc3564b89f59a6a09f2973b4e33fb904e3fd778a5956dbc9cbe750f4d454"

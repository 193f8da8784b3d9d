"""One layer of gpt-oss-20b at its full size and vocabulary, 2.8 GB of made weights: every shape that the published model has."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import toyllm

MAKER = Path(__file__).parents[2] / "benchmarks" / "make_gpt_oss.py"


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cut") / "one-layer"
    if shutil.disk_usage(folder.parent).free < 6e9:
        pytest.skip("needs 6 GB of free disk space")
    subprocess.run([sys.executable, MAKER, folder, "--layers", "1"], check=True, capture_output=True)
    yield folder
    shutil.rmtree(folder)  # pytest keeps the folders of three runs


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_layer_of_the_published_size_runs_and_every_algorithm_agrees(cut: Path) -> None:
    ids = [3575, 553, 17554, 162016, 11, 261, 4410, 6439, 2359, 22203]
    model = toyllm.load(str(cut), poison_cache=True)
    whole = model.logits(ids)
    assert whole.shape == (10, 201_088)
    assert np.isfinite(whole).all()
    assert whole.std() > 0
    cache = model.new_cache(64)
    for position, token in enumerate(ids):
        one = model.forward([token], [position], [0], cache)
        np.testing.assert_array_equal(one[0], whole[position])
    assert model.kernels.mixing.ran == {"grouped", "single"}
    np.testing.assert_array_equal(toyllm.load(str(cut), moe="all").logits(ids), whole)
    portable = toyllm.load(str(cut), backend="portable").logits(ids[:2])
    assert np.abs(portable - whole[:2]).max() / np.abs(whole[:2]).max() < 1e-4
    exact = toyllm.load(str(cut), exact=True).logits(ids[:2])
    assert np.abs(portable - exact).max() / np.abs(exact).max() < 1e-5

"""Statistics kept in a file score samples exactly as the images themselves do."""

import json

import numpy as np
import pytest
import reference_stats
import torch

from hyperdp_lib import cli, data, embedding
from hyperdp_lib.scores import evaluation
from hyperdp_lib.scores.reference_stats import ReferenceStatistics, holds_statistics


@pytest.fixture(scope="module")
def few():
    """Train and test digits."""
    return data.digits("train").images[:300], data.digits("test")


def test_a_file_scores_as_the_images_do(few, tmp_path, capsys, monkeypatch):
    samples, test = few
    data.save_npz(tmp_path / "samples.npz", data.ImageSet(samples))
    out = tmp_path / "reference.npz"
    for _ in range(2):
        assert reference_stats.main(["digits-test", "--out", str(out)]) == 0
    assert "kept" in capsys.readouterr().out
    monkeypatch.setattr(cli, "PUBLIC_IMAGES", 128)
    found = []
    for reference in (str(out), "digits-test"):
        assert cli.main(["evaluate", str(tmp_path / "samples.npz"), "--reference", reference, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    kept, direct = found
    for one, other in ((kept, direct), (kept["public"], direct["public"])):
        assert one["frechet_distance"] == pytest.approx(other["frechet_distance"], rel=1e-9)
        assert one["num_images"] == other["num_images"] and one["num_reference"] == len(test)
    assert kept["label"] == evaluation.NOT_DP and kept["precision"] is kept["real"]["frechet_distance"] is None
    assert "statistics" in kept["reasons"]["precision"] == kept["real"]["reasons"]["frechet_distance"]


def test_statistics_of_another_network_are_refused(few):
    torch.manual_seed(0)
    ours, other = embedding.FeatureNetwork(dimension=8), embedding.FeatureNetwork(dimension=8)
    reference = ReferenceStatistics.of(few[1].images, ours, "digits")
    assert reference.frechet_distance(few[0], ours) > 0
    with pytest.raises(data.InputError, match="another feature network"):
        reference.frechet_distance(few[0], other)


def test_a_damaged_file_is_refused_in_one_line(few, tmp_path, capsys):
    path = tmp_path / "reference.npz"
    np.savez(path, mean=np.zeros(3), covariance=np.zeros((2, 2)))
    assert holds_statistics(path) and not holds_statistics(tmp_path / "none.npz")
    data.save_npz(tmp_path / "samples.npz", few[1])
    assert cli.main(["evaluate", str(tmp_path / "samples.npz"), "--reference", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    path.write_bytes(b"no archive")
    assert not holds_statistics(path)


def test_too_few_images_write_nothing(tmp_path, capsys):
    data.save_npz(tmp_path / "few.npz", data.ImageSet(torch.zeros(5, 1, 16, 16)))
    out = tmp_path / "reference.npz"
    assert reference_stats.main([str(tmp_path / "few.npz"), "--out", str(out)]) == 2
    assert not out.exists() and "at least 128 images" in capsys.readouterr().err
    assert reference_stats.main(["digitz", "--out", str(out)]) == 2

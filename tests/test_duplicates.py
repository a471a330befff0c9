"""Planted copies are found, mere likeness is told from copying, and nothing depends on the order of things."""

import json

import check_duplicates
import pytest
import torch

from hyperdp_lib.data import ImageSet, InputError, digits, save_npz
from hyperdp_lib.embedding import FeatureNetwork
from hyperdp_lib.image_files import decode
from hyperdp_lib.scores import duplicates
from hyperdp_lib.scores.evaluation import NOT_DP


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return FeatureNetwork(name="untrained").eval()


@pytest.fixture(scope="module")
def noise():
    """Smooth random images: nothing is like anything else."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(460, 1, 6, 6, generator=generator)
    images = torch.nn.functional.interpolate(coarse, 16, mode="bicubic").clamp(-1, 1)
    return images[:300], images[300:]


def test_planted_copies_are_the_suspects(noise, network):
    public, private = noise
    public = public.clone()
    public[[10, 20]] = private[[3, 50]] + 0.02 * public[[10, 20]]
    public[30] = 0.5 * private[99] - 0.3  # another brightness and contrast
    public[40] = private[7].roll(1, -1) / 2 + private[7] / 2  # half a pixel to the right
    found = duplicates.check(public, private, network)
    pixels = found.likenesses[0]
    assert {pair[:2] for pair in pixels.pairs[:4]} == {(3, 10), (50, 20), (99, 30), (7, 40)}
    assert pixels.matches == 4 and pixels.control_rate == 0
    assert {(3, 10), (50, 20)} <= set(found.suspects) <= {(3, 10), (50, 20), (99, 30), (7, 40)}
    clean = duplicates.check(noise[0], private, network)
    assert clean.suspects == () and clean.likenesses[0].matches == 0


def test_likeness_without_copying_shows_in_the_control(network):
    """Digits against other digits: many neighbours, and as many among the private ones."""
    train, test = digits("train").images, digits("test").images
    found = duplicates.check(train[:700], test, network)
    pixels = found.likenesses[0]
    assert pixels.match_rate > 0.5 and pixels.control_rate > 0.5
    assert abs(pixels.median_to_public - pixels.median_to_private) < 0.1


def test_nearest_is_the_nearest_whatever_the_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    rows, others = (torch.nn.functional.normalize(torch.randn(n, 5, generator=generator)) for n in (23, 31))
    distances = torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    alone = distances.min(1)
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(9).min(1)
    for size in (4, 7, 100):
        monkeypatch.setattr(duplicates, "_ROWS", size)
        monkeypatch.setattr(duplicates, "_COLUMNS", size + 1)
        found, index = duplicates.nearest(rows, others)
        torch.testing.assert_close(found, alone.values)
        assert torch.equal(index, alone.indices)
        found, index = duplicates.nearest(rows, rows, own=torch.arange(23))
        torch.testing.assert_close(found, apart.values)
        assert torch.equal(index, apart.indices)


def test_flat_images_match_nothing(network):
    """A blank image has no direction: it must not be everybody's neighbour."""
    private = torch.cat([torch.full((2, 1, 16, 16), -1.0), digits("test").images[:50]])
    found = duplicates.check(torch.full((5, 1, 16, 16), -1.0), private, network)
    assert found.likenesses[0].median_to_public == pytest.approx(1.0)


def test_wrong_input_is_refused(network):
    images = torch.zeros(3, 1, 16, 16)
    with pytest.raises(InputError, match="one size"):
        duplicates.check(images, torch.zeros(3, 3, 16, 16), network)
    with pytest.raises(InputError, match="at least two"):
        duplicates.check(images, images[:1], network)


def test_the_script_writes_record_and_picture(tmp_path, noise, capsys):
    public, private = noise
    save_npz(tmp_path / "a.npz", ImageSet(torch.cat([public[:100], private[:3]])))
    save_npz(tmp_path / "b.npz", ImageSet(public[100:]))
    save_npz(tmp_path / "p.npz", ImageSet(private))
    out, picture = tmp_path / "records" / "check.json", tmp_path / "pairs.png"
    names = f"{tmp_path / 'a.npz'}+{tmp_path / 'b.npz'}"
    asked = [names, str(tmp_path / "p.npz"), "--out", str(out), "--picture", str(picture)]
    assert check_duplicates.main(asked) == 0
    record = json.loads(out.read_text())
    assert record["label"] == NOT_DP and record["num_public"] == 303 and record["num_private"] == 160
    assert record["suspects"] == [[0, 100], [1, 101], [2, 102]]
    assert record["likenesses"][0]["matches"] == 3
    assert decode(picture).shape == (4 * (4 * 17 - 1), 4 * (10 * 17 - 1), 1)
    assert str(tmp_path) not in out.read_text()
    assert check_duplicates.main([names, "digitz", "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1

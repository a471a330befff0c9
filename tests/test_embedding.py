"""The encoder: norm at most one, one example at a time, a constant count coordinate, streaming."""

import copy

import numpy as np
import pytest
import torch

from hyperdp_lib import embedding, pretrained
from hyperdp_lib.auditing.pipeline import miniature
from hyperdp_lib.embedding import CHUNK, COUNT_COORDINATE, Encoder, EncoderConfig, embed, embed_batches


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return Encoder(EncoderConfig(dimension=16, width=8)).eval()


def test_unit_norm_and_count(encoder):
    codes = embed(encoder, torch.rand(50, 1, 16, 16) * 2 - 1)
    assert codes.shape == (50, 16)
    assert torch.all(codes[:, 0] == COUNT_COORDINATE)
    assert torch.allclose(codes.norm(dim=1), torch.ones(50), atol=1e-5)


def test_constant_images_have_bounded_finite_codes(encoder):
    for value in (-1.0, 0.0, 1.0):
        code = embed(encoder, torch.full((1, 1, 16, 16), value))
        assert torch.isfinite(code).all() and code.norm() <= 1 + 1e-5


def test_an_example_does_not_see_its_neighbours(encoder):
    """Batch statistics would break sensitivity: the same image, in any company, has the same code."""
    images = torch.rand(20, 1, 16, 16) * 2 - 1
    alone = torch.cat([embed(encoder, image[None]) for image in images])
    stranger = torch.full((20, 1, 16, 16), 1.0)
    together = embed(encoder, torch.cat([images, stranger]))[:20]
    assert torch.equal(alone, together)


@pytest.mark.parametrize("width", [8, 32])
def test_removing_an_example_changes_no_bit_of_the_others(width):
    """Exact sensitivity needs exact independence, across batch sizes and places in a batch."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderConfig(width=width)).eval()
    images = torch.rand(CHUNK + 3, 1, 16, 16) * 2 - 1  # the remainder is small: matrix products round otherwise
    codes = embed(encoder, images)
    for removed in (0, 1, CHUNK - 1, CHUNK, len(images) - 1):
        kept = torch.arange(len(images)) != removed
        assert torch.equal(embed(encoder, images[kept]), codes[kept])
        assert torch.equal(embed(encoder, images[kept], batch_size=100), codes[kept])
    assert torch.equal(embed(encoder, images.flip(0)), codes.flip(0))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["glyphs", "glyphs-nested", "drawings", "photographs"])
@pytest.mark.parametrize("count", [1, 3, 12])
def test_shipped_encoders_do_so_with_any_number_of_threads(name, count, threads):
    """With 3 or 12 threads a matrix product rounds differently in some places of a batch, on many processors."""
    threads(count)
    encoder = pretrained.load_pretrained(name)[1].encoder
    config = encoder.config
    shape = (CHUNK + 2, config.channels, config.image_size, config.image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codes = embed(encoder, images)
    for removed in (0, 50):
        kept = torch.arange(len(images)) != removed
        assert torch.equal(embed(encoder, images[kept]), codes[kept])


def test_where_places_matter_every_image_is_a_batch_of_its_own():
    """A function that rounds differently in the last place of a full batch, as products may, is never given one."""

    def places_matter(images):
        sums = images.flatten(1).sum(1)
        return torch.where(torch.arange(len(images)) == CHUNK - 1, sums.nextafter(torch.tensor(9e9)), sums)

    images = torch.rand(CHUNK + 3, 1, 4, 4)
    assert embedding.fair_size(places_matter, (1, 4, 4)) == 1
    assert embedding.fair_size(lambda images: images.flatten(1).sum(1), (1, 4, 4)) == CHUNK
    found = embedding.in_batches(places_matter, images, size=1)
    assert torch.equal(found[1:], embedding.in_batches(places_matter, images[1:], size=1))
    full = [embedding.in_batches(places_matter, part, size=CHUNK) for part in (images, images[1:])]
    assert not torch.equal(full[0][1:], full[1])  # and this is what would happen


def test_columns_of_different_length_are_refused():
    with pytest.raises(ValueError, match="as many rows"):
        embedding.in_batches(torch.add, torch.zeros(3), torch.zeros(4), size=2)


def one_at_a_time_is_the_same(encoder):
    """Whether images embedded alone, in small batches, and all at once get the same bits."""
    images = torch.rand(CHUNK + 3, 1, 16, 16, generator=torch.Generator().manual_seed(3)) * 2 - 1
    images[1], images[2] = 1.0, images[0]
    together = embed(encoder, images)
    parts = [torch.cat([embed(encoder, part) for part in images[:40].split(size)]) for size in (1, 7)]
    return all(torch.equal(part, together[:40]) for part in parts)


@pytest.mark.parametrize("name", ["plain", "nested", "cells"])
def test_every_encoder_gives_one_image_at_a_time_what_it_gives_batches(name):
    assert one_at_a_time_is_the_same(miniature()[name].encoder)


def test_so_do_the_scores_by_which_a_cell_is_chosen():
    encoder = miniature()["cells"].encoder
    scores = copy.copy(encoder)
    scores.forward = encoder.weighed
    assert one_at_a_time_is_the_same(scores)


def test_a_batch_mean_in_the_nested_encoder_would_be_caught():
    encoder = copy.deepcopy(miniature()["nested"].encoder)
    public = encoder.everything
    encoder.everything = lambda images: public(images) - 0.1 * public(images).mean(0)
    assert not one_at_a_time_is_the_same(encoder)


def test_batch_normalisation_would_be_caught(encoder):
    """The test above can fail: an encoder with batch statistics fails it."""
    torch.manual_seed(0)
    leaky = Encoder(EncoderConfig(dimension=16, width=8)).train()
    leaky.convolutions.insert(0, torch.nn.BatchNorm2d(1))
    images = torch.rand(4, 1, 16, 16) * 2 - 1
    together = leaky(torch.cat([images, torch.ones(20, 1, 16, 16)]))[:4]
    assert not torch.allclose(leaky(images), together, atol=1e-3)


def test_streaming_equals_one_go_and_is_lazy(encoder):
    images = torch.rand(30, 1, 16, 16) * 2 - 1
    drawn = 0

    def batches():
        nonlocal drawn
        for batch in images.split(7):
            drawn += 1
            yield batch

    stream = embed_batches(encoder, batches())
    first = next(stream)
    assert drawn == 1 and first.dtype == np.float32
    assert np.array_equal(np.concatenate([first, *stream]), embed(encoder, images))


def test_no_images_give_no_codes(encoder):
    assert embed(encoder, torch.empty(0, 1, 16, 16)).shape == (0, 16)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.serve.request import RequestError, Sampling
from fourfold.serve.sampler import StopFilter, make_generator, sample

NONE = torch.zeros(0, dtype=torch.int64)


def draw(logits, n=2000, banned=NONE, **options):
    sampling = Sampling(seed=1, **options)
    generator = make_generator(sampling)
    return torch.tensor([sample(logits, sampling, generator, banned) for _ in range(n)])


def test_temperature_zero_takes_the_likeliest_that_is_allowed():
    logits = torch.tensor([0.0, 3.0, 2.0, 3.0])
    assert set(draw(logits, 5, temperature=0).tolist()) == {1}
    assert set(draw(logits, 5, banned=torch.tensor([1, 3]), temperature=0).tolist()) == {2}


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    counts = torch.bincount(draw(p.log()), minlength=4) / 2000
    assert torch.allclose(counts, p, atol=0.04)
    hot = torch.softmax(p.log() / 2.0, -1)
    assert torch.allclose(torch.bincount(draw(p.log(), temperature=2.0), minlength=4) / 2000, hot, atol=0.04)


def test_top_p_and_top_k_cut_the_tail():
    p = torch.tensor([0.05, 0.5, 0.15, 0.3])
    assert set(draw(p.log(), top_p=0.75).tolist()) == {1, 3}
    assert set(draw(p.log(), top_p=0.01).tolist()) == {1}
    assert set(draw(p.log(), top_k=3).tolist()) == {1, 2, 3}
    assert set(draw(p.log(), top_k=99).tolist()) == {0, 1, 2, 3}


def test_one_seed_one_answer():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(logits, 50), draw(logits, 50))
    free = Sampling()
    assert make_generator(free).initial_seed() != make_generator(free).initial_seed()


def test_noise_in_the_last_bits_does_not_change_the_draws():
    logits = torch.randn(200, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(draw(logits, 300, top_p=0.9), draw(logits + noise, 300, top_p=0.9))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad):
    with pytest.raises(FloatingPointError):
        sample(torch.tensor([0.0, bad]), Sampling(), torch.Generator(), NONE)


@pytest.mark.parametrize(
    "options, field",
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_options_out_of_range_name_their_field(options, field):
    with pytest.raises(RequestError) as error:
        Sampling(**options)
    assert error.value.field == field


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4))
def test_stop_filter_shows_exactly_what_comes_before_the_first_stop(pieces, stops):
    stop_filter = StopFilter(tuple(stops))
    shown, consumed, stopped = "", "", False
    for piece in pieces:
        text, stopped = stop_filter.feed(piece)
        shown, consumed = shown + text, consumed + piece
        if stopped:
            break
    if not stopped:
        shown += stop_filter.flush()
    places = [consumed.find(stop) for stop in stops if stop in consumed]
    assert stopped == bool(places)
    assert shown == (consumed[: min(places)] if places else consumed)

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fourfold.serve.request import RequestError, Sampling
from fourfold.serve.sampler import Choice, StopFilter, make_generator, sample, sample_rows

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


def plain_sample(logits, sampling, point, banned):
    """One row, written down as plainly as it can be."""
    logits = logits.double().index_fill(0, banned, -torch.inf)
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = torch.softmax(logits / sampling.temperature, -1)
    if sampling.top_k:
        p[p < p.sort(descending=True).values[: sampling.top_k][-1]] = 0
    order = p.argsort(descending=True, stable=True).tolist()
    kept, mass, whole = set(), 0.0, float(p.sum())
    for id in order:
        if mass >= sampling.top_p * whole and sampling.top_p < 1:
            break
        kept.add(id)
        mass += float(p[id])
    total = sum(float(p[id]) for id in kept)
    passed = 0.0
    for id in range(len(p)):
        passed += float(p[id]) if id in kept else 0.0
        if passed > point * total:
            return id
    return max(kept)


@pytest.mark.parametrize("nucleus", [4, 256])
def test_rows_are_drawn_as_one_by_one(nucleus, monkeypatch):
    monkeypatch.setattr("fourfold.serve.sampler.NUCLEUS", nucleus)
    torch.manual_seed(3)
    options = [
        {"temperature": 0},
        {},
        {"temperature": 0.7, "top_p": 0.8},
        {"top_k": 5},
        {"top_k": 12, "top_p": 0.5},
        {"temperature": 1.7, "top_k": 400},
    ]
    none, some = NONE, torch.arange(0, 90, 3)
    for turn in range(40):
        logits = 3 * torch.randn(17, 90)
        rows = [
            Choice(Sampling(**options[(n + turn) % 6]), (none, some)[n % 2], float(torch.rand(()))) for n in range(17)
        ]
        wanted = [plain_sample(row, c.sampling, c.point, c.banned) for row, c in zip(logits, rows, strict=True)]
        before = logits.clone()
        assert sample_rows(logits, rows) == wanted
        assert torch.equal(logits, before)
        assert [sample_rows(row[None], [c])[0] for row, c in zip(logits, rows, strict=True)] == wanted


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

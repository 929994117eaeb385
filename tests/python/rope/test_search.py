"""`longspan.rope.search` on objectives whose best candidate is known."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longspan import rope
from longspan.rope.search import (
    Candidate,
    as_candidate,
    crossover,
    evolve,
    grid,
    mutate,
    starting_points,
)

MODEL = {"head_dim": 32, "base": 10000.0, "factor": 4.0, "trained": 128}
START = starting_points(**MODEL)
# A curve that no starting point has.
TARGET = [1 + 3 / (1 + math.exp(6 - i)) for i in range(16)]


def distance(candidate):
    curve = sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(candidate.factors, TARGET))
    return curve + 10 * (candidate.attention_factor - 1.05) ** 2


def candidates():
    steps = st.lists(st.floats(0, 0.5), min_size=16, max_size=16)
    return st.builds(
        lambda steps, scale: Candidate(tuple(1 + sum(steps[: i + 1]) for i in range(len(steps))), scale),
        steps,
        st.floats(0.8, 1.3),
    )


def test_starting_points_are_the_methods():
    theta, _ = rope.frequencies("default", head_dim=32)
    yarn, scale = rope.frequencies("yarn", head_dim=32, factor=4.0, original_max_position_embeddings=128)
    first = START[0]
    torch.testing.assert_close(theta / torch.tensor(first.factors), yarn, rtol=1e-5, atol=0)
    assert first.attention_factor == pytest.approx(scale, abs=1e-6)
    assert Candidate((4.0,) * 16, 1.0) in START
    assert len(START) == len(set(START)) == 1 + 5 + 2  # YaRN, around it, NTK, linear
    assert START[1].factors != first.factors
    assert START[1].attention_factor == pytest.approx((1 + scale) / 2, abs=1e-6)


def test_a_method_as_a_candidate_has_its_frequencies():
    lambdas = [1 + i / 4 for i in range(16)]
    longrope = {
        "method": "longrope", "head_dim": 32, "base": 5000.0, "factor": 4.0, "attention_factor": 1.03,
        "original_max_position_embeddings": 128, "short_factor": [1.0] * 16, "long_factor": lambdas,
    }  # fmt: skip
    found = as_candidate(longrope, 512)
    assert found.factors == pytest.approx(lambdas, rel=1e-6)
    assert found.attention_factor == 1.03
    assert as_candidate(longrope, 128).factors == (1.0,) * 16
    dynamic = {"method": "dynamic", "head_dim": 32, "factor": 2.0, "max_position": 128}
    inv_freq, _ = rope.frequencies(**dynamic, seq_len=512)
    theta, _ = rope.frequencies("default", head_dim=32)
    torch.testing.assert_close(
        theta / torch.tensor(as_candidate(dynamic, 512).factors), inv_freq, rtol=1e-5, atol=0
    )
    for wrong in ([0.5] * 16, lambdas[::-1]):
        with pytest.raises(ValueError, match="as_candidate: settings: expected factors from 1 on"):
            as_candidate({**longrope, "long_factor": wrong}, 512)


@given(candidates(), candidates(), st.integers(0, 2**32))
def test_children_are_candidates(a, b, seed):
    rng = random.Random(seed)
    for child in (mutate(a, rng, greatest=5.0), crossover(a, b, rng)):
        # Candidate's own checks: from 1 on, monotone, finite.
        assert len(child.factors) == 16
        assert child.factors[-1] <= max(5.0, a.factors[-1], b.factors[-1])
    again = random.Random(seed)
    assert mutate(a, again, greatest=5.0) == mutate(a, random.Random(seed), greatest=5.0)


def test_finds_what_no_starting_point_is():
    best_start = min(map(distance, START))
    found = evolve(distance, START, greatest=5.0, population=16, generations=40, seed=0)
    assert found.loss < best_start / 20
    assert found.loss == distance(found.best) == found.best_by_generation[-1]
    assert found.best_by_generation == sorted(found.best_by_generation, reverse=True)
    assert len(found.losses) == 16 + 40 * 8


def test_never_worse_than_where_it_began():
    found = evolve(lambda c: -distance(c), START, greatest=5.0, population=8, generations=0)
    assert found.loss <= min(-distance(c) for c in START)
    assert set(found.losses) == set(START)


def test_the_seed_says_all_whatever_the_objective_does():
    def restless(candidate):
        random.random()
        return distance(candidate)

    options = {"greatest": 5.0, "population": 8, "generations": 4}
    first = evolve(distance, START, **options, seed=3)
    random.seed(1)
    second = evolve(restless, START, **options, seed=3)
    assert list(first.losses.items()) == list(second.losses.items())
    assert list(evolve(distance, START, **options, seed=4).losses) != list(first.losses)


def test_goes_on_where_it_was_cut_off():
    options = {"greatest": 5.0, "population": 8, "generations": 6, "seed": 5}
    whole = evolve(distance, START, **options)
    known = {}

    def cut_off(candidate, loss):
        known[candidate] = loss
        if len(known) == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(distance, START, **options, on_evaluated=cut_off)
    asked = []

    def counted(candidate):
        asked.append(candidate)
        return distance(candidate)

    resumed = evolve(counted, START, **options, known=known)
    assert list(resumed.losses.items()) == list(whole.losses.items())
    assert resumed.best == whole.best
    assert asked == list(whole.losses)[17:]


def test_what_is_no_number_is_never_the_best():
    def broken(candidate):
        return math.nan if candidate.attention_factor == 1.0 else distance(candidate)

    found = evolve(broken, START, greatest=5.0, population=8, generations=3)
    assert math.isfinite(found.loss)
    assert found.losses[Candidate((4.0,) * 16, 1.0)] == math.inf


def test_grid():
    asked = []

    def loss(factor, temperature):
        asked.append((factor, temperature))
        return (factor - 3) ** 2 + (temperature - 1.1) ** 2 if temperature else math.nan

    best, losses = grid(loss, [2, 3, 4], [1.0, 1.1], known={(2.0, 1.0): 9.0})
    assert best == (3.0, 1.1)
    assert losses[2.0, 1.0] == 9.0
    assert len(losses) == 6
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Candidate((0.5, 1.0), 1.0), "factors: expected numbers from 1 on"),
        (lambda: Candidate((2.0, 1.0), 1.0), "factors: expected none below the one before"),
        (lambda: Candidate((1.0, 1.0), 0.0), "attention_factor: expected a number above 0"),
        (lambda: evolve(distance, [], greatest=5.0), "start: expected candidates"),
        (lambda: evolve(distance, START, greatest=5.0, population=3), "population: expected 8 or more"),
        (lambda: evolve(distance, START, greatest=5.0, parents=8), "parents: expected less than pop"),
        (lambda: evolve(distance, START, greatest=5.0, generations=-1), "generations: expected 0"),
        (lambda: grid(max, [], [1.0]), "factors and temperatures: expected one or more"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()

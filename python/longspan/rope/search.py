"""Finding LongRoPE's factors: an evolutionary search (Ding et al. 2024), and a grid over YaRN's options.

Pure functions over an objective that the caller gives: less is better, such as the loss of a model at
the length that is wanted, on tokens that it is not judged by later. What was evaluated can be handed in
again, so that a search which was cut off goes on where it was: all else follows from the seed.
"""

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from longspan.rope.frequencies import frequencies

_DIGITS = 6  # of a factor


@dataclass(frozen=True)
class Candidate:
    """What is searched: theta_i / factors_i is the frequency of pair i.

    Attributes:
        factors: d / 2 numbers from 1 on, none less than the one before it.
        attention_factor: Of cosine and sine.
    """

    factors: tuple[float, ...]
    attention_factor: float

    def __post_init__(self) -> None:
        """Check both."""
        if not self.factors or self.factors[0] < 1 or not all(map(math.isfinite, self.factors)):
            raise ValueError(f"Candidate: factors: expected numbers from 1 on, got {self.factors}")
        if any(b < a for a, b in zip(self.factors, self.factors[1:])):
            raise ValueError(
                f"Candidate: factors: expected none below the one before, got {self.factors}"
            )
        if not 0 < self.attention_factor < math.inf:
            raise ValueError(
                f"Candidate: attention_factor: expected a number above 0, got {self.attention_factor}"
            )


Objective = Callable[[Candidate], float]


@dataclass
class Found:
    """What a search found.

    Attributes:
        best: The candidate of the least loss; the earliest one where several have it.
        loss: Its loss.
        losses: Of all that were evaluated.
        best_by_generation: The least loss after each generation.
    """

    best: Candidate
    loss: float
    losses: dict[Candidate, float] = field(repr=False)
    best_by_generation: list[float]


def starting_points(
    *, head_dim: int, base: float, factor: float, trained: int, partial_rotary_factor: float = 1.0
) -> list[Candidate]:
    """Candidates that are spread over what is known to work: YaRN, NTK and position interpolation.

    YaRN as it is comes first. Then with half the temperature, up to 1.5 times ``factor``, and where
    pairs that turn twice in the trained length are scaled in full, not only those that turn once. A
    search that begins with these finds nothing worse than the best of them.

    Args:
        head_dim, base, partial_rotary_factor: As in `frequencies`.
        factor: How many times longer than ``trained``.
        trained: Tokens.

    Example::

        longspan.rope.search.starting_points(head_dim=64, base=1e5, factor=4, trained=8192)
    """
    of_model: dict[str, Any] = {
        "head_dim": head_dim, "base": base, "partial_rotary_factor": partial_rotary_factor,
    }  # fmt: skip
    yarn = {**of_model, "method": "yarn", "original_max_position_embeddings": trained}
    first = as_candidate({**yarn, "factor": float(factor)})
    found: dict[Candidate, None] = {first: None}
    half = round((1 + first.attention_factor) / 2, _DIGITS)
    for times, turns in ((1.0, 2.0), (1.25, 1.0), (1.25, 2.0), (1.5, 1.0), (1.5, 2.0)):
        options = {"factor": times * factor, "beta_slow": turns, "attention_factor": half}
        found[as_candidate({**yarn, **options})] = None
    for method in ("ntk", "linear"):
        found[as_candidate({**of_model, "method": method, "factor": float(factor)})] = None
    return list(found)


def as_candidate(settings: Mapping[str, Any], length: int | None = None) -> Candidate:
    """What a method of scaling is as a candidate: to start a search with, or to compare.

    Args:
        settings: Arguments of `frequencies`, ``method`` among them.
        length: Tokens that are read, for methods that look at it.

    Raises:
        ValueError: The settings are no method's, or a pair's frequency is scaled less than the one's
            before it, or raised.

    Example::

        rope.search.as_candidate(rope.from_config(parameters, head_dim=64, max_position=8192), 16384)
    """
    of_model = ("head_dim", "base", "partial_rotary_factor")
    theta, _ = frequencies("default", **{name: settings[name] for name in of_model if name in settings})
    inv_freq, scale = frequencies(**settings, seq_len=length)
    factors = (theta.double() / inv_freq.double()).tolist()
    # In float32 an unscaled pair's may lie a little below 1, and one below the pair before it.
    monotone = _monotone(factors, max(*factors, 1.0))
    if not all(abs(is_now - was) < 1e-5 * was for is_now, was in zip(monotone, factors)):
        raise ValueError(
            f"as_candidate: settings: expected factors from 1 on, none below the one before, "
            f"got {factors}"
        )
    return Candidate(monotone, round(scale, _DIGITS))


def _monotone(values: Iterable[float], greatest: float) -> tuple[float, ...]:
    """Between 1 and ``greatest``, none less than the one before."""
    out: list[float] = []
    for value in values:
        value = min(max(round(value, _DIGITS), 1.0), greatest)
        out.append(max(value, out[-1]) if out else value)
    return tuple(out)


def mutate(candidate: Candidate, rng: random.Random, *, greatest: float) -> Candidate:
    """A neighbour of a candidate: its curve moved along the pairs, bent, or changed in a few of them.

    Args:
        candidate: That is changed; it stays itself.
        rng: Where randomness comes from.
        greatest: No factor is beyond.

    Example::

        rope.search.mutate(candidate, random.Random(0), greatest=5.0)
    """
    values = list(candidate.factors)
    way = rng.choice(("move", "bend", "points"))
    if way == "move":
        shift, stretch = rng.gauss(0, 0.06 * len(values)), math.exp(rng.gauss(0, 0.1))
        middle = (len(values) - 1) / 2
        values = [_at(values, middle + (i - middle) * stretch + shift) for i in range(len(values))]
    elif way == "bend":
        power = math.exp(rng.gauss(0, 0.2))
        values = [value**power for value in values]
    else:
        values = [v * math.exp(rng.gauss(0, 0.15)) if rng.random() < 0.3 else v for v in values]
    attention_factor = candidate.attention_factor * math.exp(rng.gauss(0, 0.01))
    return Candidate(_monotone(values, greatest), round(attention_factor, _DIGITS))


def _at(values: Sequence[float], place: float) -> float:
    """Between two neighbours by a straight line, the ends beyond the ends."""
    place = min(max(place, 0.0), len(values) - 1.0)
    low = min(int(place), len(values) - 2) if len(values) > 1 else 0
    return values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def crossover(a: Candidate, b: Candidate, rng: random.Random) -> Candidate:
    """A child of two: the one's first pairs and the other's last ones, or a mean of both.

    Example::

        rope.search.crossover(first, second, random.Random(0))
    """
    share = rng.random()
    if rng.random() < 0.5:
        cut = rng.randrange(len(a.factors) + 1)
        values: Iterable[float] = a.factors[:cut] + b.factors[cut:]
    else:
        values = [x ** (1 - share) * y**share for x, y in zip(a.factors, b.factors)]
    attention_factor = a.attention_factor ** (1 - share) * b.attention_factor**share
    greatest = max(a.factors[-1], b.factors[-1])
    return Candidate(_monotone(values, greatest), round(attention_factor, _DIGITS))


def evolve(
    objective: Objective,
    start: Sequence[Candidate],
    *,
    greatest: float,
    population: int = 8,
    parents: int | None = None,
    generations: int = 5,
    seed: int = 0,
    known: Mapping[Candidate, float] | None = None,
    on_evaluated: Callable[[Candidate, float], None] | None = None,
) -> Found:
    """Search by evolution: the best of a generation stay, the others give way to their children.

    The first generation is ``start`` and mutations of it; later ones are the ``parents`` best so far,
    and mutations of and crossovers between them, half of each. Nothing is evaluated twice. A loss that
    is no finite number counts as infinite.

    Args:
        objective: The loss of a candidate.
        start: One or more, all with the same number of factors.
        greatest: No factor is beyond; a little more than the factor of lengths leaves room.
        population: Candidates of a generation, at least those of ``start``.
        parents: Of them that stay; None is half of them.
        generations: After the first.
        seed: Of all randomness. The same seed asks for the same candidates.
        known: Losses that were found before, by a run that was cut off.
        on_evaluated: Called with each candidate and its loss, not with known ones.

    Returns:
        `Found`.

    Raises:
        ValueError: A number is too small, or candidates do not fit together.

    Example::

        found = rope.search.evolve(loss_of, rope.search.starting_points(...), greatest=5.0)
        found.best.factors
    """
    start = list(dict.fromkeys(start))
    if not start or len({len(candidate.factors) for candidate in start}) != 1:
        raise ValueError("evolve: start: expected candidates with the same number of factors")
    kept = population // 2 if parents is None else parents
    for name, value, least in (
        ("population", population, max(2, len(start))),
        ("parents", kept, 1),
        ("generations", generations, 0),
    ):
        if value < least:
            raise ValueError(f"evolve: {name}: expected {least} or more, got {value}")
    if kept >= population:
        raise ValueError(f"evolve: parents: expected less than population, {population}, got {kept}")
    losses: dict[Candidate, float] = {}
    by_generation: list[float] = []

    def loss_of(candidate: Candidate) -> float:
        if candidate not in losses:
            if known is not None and candidate in known:
                losses[candidate] = known[candidate]
            else:
                loss = float(objective(candidate))
                losses[candidate] = loss if math.isfinite(loss) else math.inf
                if on_evaluated is not None:
                    on_evaluated(candidate, losses[candidate])
        return losses[candidate]

    generation = list(start)
    for number in range(generations + 1):
        # Its own randomness, so that what an objective does with `random` changes nothing.
        rng = random.Random(f"{seed} {number}")
        seen = {*losses, *generation}
        _fill(generation, seen, population, rng, greatest, crossing=number > 0)
        generation = sorted(generation, key=loss_of)[:kept]
        by_generation.append(losses[generation[0]])
    best = min(losses, key=losses.__getitem__)
    return Found(best, losses[best], losses, by_generation)


def _fill(
    generation: list[Candidate],
    seen: set[Candidate],
    population: int,
    rng: random.Random,
    greatest: float,
    crossing: bool,
) -> None:
    """Add children of those that are there, mutations and crossovers in turn, none seen before."""
    elders, tries = list(generation), 0
    while len(generation) < population and tries < 100 * population:
        tries += 1
        if crossing and len(elders) > 1 and tries % 2 == 0:
            first, second = rng.sample(elders, 2)
            child = crossover(first, second, rng)
        else:
            child = mutate(rng.choice(elders), rng, greatest=greatest)
        if child not in seen:
            seen.add(child)
            generation.append(child)


def grid(
    objective: Callable[[float, float], float],
    factors: Sequence[float],
    temperatures: Sequence[float],
    *,
    known: Mapping[tuple[float, float], float] | None = None,
    on_evaluated: Callable[[tuple[float, float], float], None] | None = None,
) -> tuple[tuple[float, float], dict[tuple[float, float], float]]:
    """Try every pair of YaRN's ``factor`` and ``attention_factor``.

    Args:
        objective: The loss of a factor and an attention factor.
        factors, temperatures: Those to try.
        known, on_evaluated: As in `evolve`.

    Returns:
        The best pair, and the losses of all.

    Example::

        (factor, attention_factor), losses = rope.search.grid(loss_of, [2.0, 4.0], [1.0, 1.07])
    """
    if not factors or not temperatures:
        raise ValueError("grid: factors and temperatures: expected one or more of each")
    losses: dict[tuple[float, float], float] = {}
    for factor in factors:
        for temperature in temperatures:
            pair = (float(factor), float(temperature))
            if known is not None and pair in known:
                losses[pair] = known[pair]
                continue
            loss = float(objective(*pair))
            losses[pair] = loss if math.isfinite(loss) else math.inf
            if on_evaluated is not None:
                on_evaluated(pair, losses[pair])
    return min(losses, key=losses.__getitem__), losses

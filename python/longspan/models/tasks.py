"""Synthetic tasks that tell sequence models apart (Gu and Dao 2023, Mamba, sections 3.1 and 4.1).

Each gives ``(input_ids, labels)``, both (batch, length) int64, where ``labels[b, t]`` is what the logits
at position t should say, and -100 where they are not judged: not shifted, for the answer is not always
the next input.
"""

import torch
from torch import Tensor


def selective_copying(
    batch: int,
    length: int,
    *,
    vocab_size: int = 16,
    data_tokens: int = 16,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Data tokens scattered among noise, to be repeated in their order at the end.

    A fixed convolution can repeat what stands at fixed distances; here the distances differ, so that a
    model must tell data from noise and remember the one and not the other.

    Args:
        batch: Sequences.
        length: Tokens of a sequence: noise and data, then as many markers as there are data tokens, each
            of which is answered by one of them.
        vocab_size: 0 is noise, vocab_size - 1 the marker, those between are data.
        data_tokens: How many.
        generator: None is torch's default one.

    Raises:
        ValueError: ``length`` has no room for the data and the markers, or ``vocab_size`` for data.

    Example::

        longspan.models.tasks.selective_copying(1, 10, vocab_size=6, data_tokens=3)
        # input_ids  0 2 0 0 4 1 0 5 5 5, labels -100 ... -100 2 4 1
    """
    places = length - data_tokens
    if data_tokens < 1 or places < data_tokens:
        raise ValueError(
            f"selective_copying: length: expected at least twice data_tokens, {data_tokens}, which is 1 "
            f"or more; got {length}"
        )
    if vocab_size < 3:
        raise ValueError(f"selective_copying: vocab_size: expected 3 or more, got {vocab_size}")
    where = torch.rand(batch, places, generator=generator).argsort(1)[:, :data_tokens].sort(1).values
    data = torch.randint(1, vocab_size - 1, (batch, data_tokens), generator=generator)
    input_ids = torch.zeros(batch, length, dtype=torch.int64).scatter_(1, where, data)
    input_ids[:, places:] = vocab_size - 1
    labels = torch.full_like(input_ids, -100)
    labels[:, places:] = data
    return input_ids, labels


def induction_heads(
    batch: int, length: int, *, vocab_size: int = 16, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Random tokens with a special one somewhere; when it comes again, the token after it is asked for.

    The least form of learning in context (Olsson et al. 2022): look up what followed the last time.

    Args:
        batch: Sequences.
        length: Tokens of a sequence, the last of which is the special one and the only one judged.
        vocab_size: vocab_size - 1 is the special token.
        generator: None is torch's default one.

    Raises:
        ValueError: ``length`` is below 3 or ``vocab_size`` below 2.

    Example::

        longspan.models.tasks.induction_heads(1, 8, vocab_size=6)
        # input_ids  3 0 5 2 4 4 1 5, labels -100 ... -100 2
    """
    if length < 3:
        raise ValueError(f"induction_heads: length: expected 3 or more, got {length}")
    if vocab_size < 2:
        raise ValueError(f"induction_heads: vocab_size: expected 2 or more, got {vocab_size}")
    special = vocab_size - 1
    input_ids = torch.randint(0, special, (batch, length), generator=generator)
    where = torch.randint(0, length - 2, (batch, 1), generator=generator)
    input_ids.scatter_(1, where, special)
    input_ids[:, -1] = special
    labels = torch.full_like(input_ids, -100)
    labels[:, -1:] = input_ids.gather(1, where + 1)
    return input_ids, labels


def multi_query_recall(
    batch: int,
    length: int,
    *,
    vocab_size: int = 64,
    pairs: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Pairs of a key and its value, then keys again, each to be answered by its value.

    Multi-query associative recall (Arora et al. 2023, Zoology). A model must hold all pairs at once:
    attention and the delta rule do, linear attention blurs them where they are many for its state.

    Args:
        batch: Sequences.
        length: Tokens of a sequence: twice ``pairs``, then queries, drawn from the keys, all of them
            judged.
        vocab_size: Even. The first half are keys, the second values; keys of a sequence differ.
        pairs: How many.
        generator: None is torch's default one.

    Raises:
        ValueError: ``length`` has no room for the pairs and a query, or ``vocab_size`` for the keys.

    Example::

        longspan.models.tasks.multi_query_recall(1, 8, vocab_size=6, pairs=2)
        # input_ids  2 4 0 3 0 2 2 0, labels -100 -100 -100 -100 3 4 4 3
    """
    if pairs < 1 or length <= 2 * pairs:
        raise ValueError(
            f"multi_query_recall: length: expected more than twice pairs, {pairs}, which is 1 or more; "
            f"got {length}"
        )
    if vocab_size % 2 or vocab_size < 2 * pairs:
        raise ValueError(
            f"multi_query_recall: vocab_size: expected an even number of {2 * pairs} or more, "
            f"got {vocab_size}"
        )
    half = vocab_size // 2
    keys = torch.rand(batch, half, generator=generator).argsort(1)[:, :pairs]
    values = torch.randint(half, vocab_size, (batch, pairs), generator=generator)
    asked = torch.randint(pairs, (batch, length - 2 * pairs), generator=generator)
    told = torch.stack([keys, values], dim=2).flatten(1)
    input_ids = torch.cat([told, keys.gather(1, asked)], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, 2 * pairs :] = values.gather(1, asked)
    return input_ids, labels

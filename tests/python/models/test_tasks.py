"""Synthetic tasks: what they ask, and which families of two layers learn them."""

from functools import partial

import pytest
import torch
from checks import assert_raises
from torch.nn.functional import cross_entropy

from longspan.models import LanguageModel, LanguageModelConfig, cosine_with_warmup, parameter_groups
from longspan.models.tasks import induction_heads, multi_query_recall, selective_copying


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("length", "vocab_size", "data_tokens"), [(40, 16, 16), (32, 3, 16), (9, 6, 1)])
def test_selective_copying(length, vocab_size, data_tokens):
    ids, labels = selective_copying(
        50, length, vocab_size=vocab_size, data_tokens=data_tokens, generator=seeded()
    )
    assert ids.shape == labels.shape == (50, length)
    assert (ids[:, -data_tokens:] == vocab_size - 1).all()
    text = ids[:, :-data_tokens]
    is_data = (text > 0) & (text < vocab_size - 1)
    assert (is_data.sum(1) == data_tokens).all()
    assert torch.equal(text[is_data].view(50, data_tokens), labels[:, -data_tokens:])
    assert (text[~is_data] == 0).all()
    assert (labels[:, :-data_tokens] == -100).all()
    if length > 2 * data_tokens:
        assert is_data.any(0).all()  # anywhere
    again, _ = selective_copying(
        50, length, vocab_size=vocab_size, data_tokens=data_tokens, generator=seeded()
    )
    assert torch.equal(again, ids)


@pytest.mark.parametrize(("length", "vocab_size"), [(256, 16), (3, 2), (10, 4)])
def test_induction_heads(length, vocab_size):
    ids, labels = induction_heads(200, length, vocab_size=vocab_size, generator=seeded())
    assert ids.shape == labels.shape == (200, length)
    special = ids == vocab_size - 1
    assert (special.sum(1) == 2).all()
    assert special[:, -1].all()
    assert (labels[:, :-1] == -100).all()
    assert torch.equal(labels[:, -1], ids[:, 1:][special[:, :-1]])
    assert torch.equal(induction_heads(200, length, vocab_size=vocab_size, generator=seeded())[0], ids)
    if length < 20:
        assert special[:, : length - 2].any(0).all()  # anywhere


@pytest.mark.parametrize(("length", "vocab_size", "pairs"), [(64, 64, 16), (3, 2, 1), (20, 10, 5)])
def test_multi_query_recall(length, vocab_size, pairs):
    options = {"vocab_size": vocab_size, "pairs": pairs}
    ids, labels = multi_query_recall(50, length, **options, generator=seeded())
    assert ids.shape == labels.shape == (50, length)
    assert (labels[:, : 2 * pairs] == -100).all()
    half = vocab_size // 2
    for row, wanted in zip(ids.tolist(), labels.tolist()):
        told = dict(zip(row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]))
        assert len(told) == pairs  # keys differ
        assert all(key < half <= value < vocab_size for key, value in told.items())
        assert [told[key] for key in row[2 * pairs :]] == wanted[2 * pairs :]
    assert torch.equal(multi_query_recall(50, length, **options, generator=seeded())[0], ids)


def test_wrong_arguments():
    for parts, call in (
        (["length", "twice data_tokens, 16", "got 31"], lambda: selective_copying(1, 31)),
        (["data_tokens", "got 10"], lambda: selective_copying(1, 10, data_tokens=0)),
        (["vocab_size", "3 or more", "got 2"], lambda: selective_copying(1, 40, vocab_size=2)),
        (["length", "3 or more", "got 2"], lambda: induction_heads(1, 2)),
        (["vocab_size", "2 or more", "got 1"], lambda: induction_heads(1, 9, vocab_size=1)),
        (["length", "twice pairs, 8", "got 16"], lambda: multi_query_recall(1, 16)),
        (["length", "got 9"], lambda: multi_query_recall(1, 9, pairs=0)),
        (["vocab_size", "16 or more", "got 14"], lambda: multi_query_recall(1, 20, vocab_size=14)),
        (["vocab_size", "even", "got 65"], lambda: multi_query_recall(1, 20, vocab_size=65)),
    ):
        assert_raises(ValueError, parts, call)


def learn(task, lessons, lr, batch=32, **config):
    """Train two layers on ``lessons``, each (steps, length) of the task, short ones first."""
    torch.manual_seed(0)
    generator = seeded(1)
    model = LanguageModel(
        LanguageModelConfig(**{"vocab_size": 16, "d_model": 64, "n_layer": 2} | config)
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.0), lr=lr, betas=(0.9, 0.95))
    lengths = [length for steps, length in lessons for _ in range(steps)]
    for step, length in enumerate(lengths):
        for group in optimizer.param_groups:
            group["lr"] = lr * cosine_with_warmup(step, len(lengths), warmup=50)
        ids, labels = task(batch, length, generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(ids).logits.flatten(0, 1), labels.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model, task, length, batch=512):
    ids, labels = task(batch, length, generator=seeded(2))
    judged = labels != -100
    return (model(ids).logits.argmax(-1) == labels)[judged].float().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "lessons", "lr"),
    [
        (selective_copying, [(2500, 64), (600, 256)], 7e-3),
        (induction_heads, [(300, 32), (50, 256)], 5e-3),
    ],
)
def test_two_layers_of_mamba_learn_it_at_length_256(task, lessons, lr):
    model = learn(task, lessons, lr)
    found = accuracy(model, task, 256)
    print(f"{task.__name__}: accuracy {found:.4f}")
    assert found > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "mixer", "learnt"),
    [
        ("linear_attention", {"num_heads": 2}, False),
        ("delta_net", {"num_heads": 2}, True),
    ],
)
def test_who_learns_to_recall_sixteen_pairs(family, mixer, learnt):
    """Plain linear attention does not; DeltaNet, whose convolutions see a pair as one, does."""
    task = partial(multi_query_recall, vocab_size=64, pairs=16)
    model = learn(
        task, [(800, 64)], 5e-3, batch=64, vocab_size=64, family=family, mixer=mixer, d_intermediate=0
    )
    found = accuracy(model, task, 64)
    print(f"{family}: accuracy {found:.4f}")
    assert found > 0.9 if learnt else found < 0.3

"""longspan_mask against transformers' own dense mask, pattern by pattern."""

import pytest
import torch
import transformers.masking_utils as m
from hf_models import padding
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from longspan.hf import longspan_mask
from longspan.hf.masks import KeyRanges, Packed, decode_mask


def dense(mask, batch, q_length, kv_length):
    """What `longspan_attention` shows its queries, as a bool mask (B, 1, q_length, kv_length)."""
    if mask.dtype == torch.bool:
        return mask
    read = decode_mask(mask, batch, q_length, kv_length)
    query, key = torch.arange(q_length)[:, None], torch.arange(kv_length)
    left, right = read.window

    def within(distance):
        return ((left < 0) | (distance <= left)) & ((right < 0) | (-distance <= right))

    if isinstance(read, Packed):
        rows = torch.arange(batch * q_length)
        segment = torch.bucketize(rows, read.cu_seqlens_q.long(), right=True).view(batch, -1)
        same = segment[:, :, None] == segment[:, None, :]
        return (same & within(query - key))[:, None]
    first, end, position = read.ranges[:, :, None, None].unbind(1)
    seen = (key >= first) & (key < end) & within(position + query - key)
    return seen[:, None] if read.key_flags is None else seen[:, None] & read.key_flags


PATTERNS = {
    "causal": (m.causal_mask_function, {"allow_is_causal_skip": True}),
    "bidirectional": (
        m.bidirectional_mask_function,
        {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True},
    ),
    "sliding": (
        m.sliding_window_causal_mask_function(7),
        {"allow_is_causal_skip": True, "local_size": 7},
    ),
    "two-sided": (
        m.sliding_window_bidirectional_mask_function(7),
        {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True, "local_size": 7},
    ),
}


def check(pattern, batch, attention_mask, **sizes):
    function, options = PATTERNS[pattern]
    arguments = dict(batch_size=batch, mask_function=function, attention_mask=attention_mask, **sizes)
    expected = m.sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    mask = longspan_mask(**arguments, **options)
    got = dense(mask, batch, sizes["q_length"], sizes["kv_length"])
    torch.testing.assert_close(got.expand_as(expected), expected)
    return mask


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=150, deadline=None, print_blob=True)
@given(data=st.data())
def test_any_lengths_offsets_and_padding(pattern, data):
    batch, q_length, kv_length = (data.draw(st.integers(1, n)) for n in (3, 12, 24))
    q_offset, kv_offset = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 5))
    known = data.draw(st.integers(0, 30))
    rows = st.lists(st.booleans(), min_size=known, max_size=known)
    attention_mask = data.draw(st.none() | st.lists(rows, min_size=batch, max_size=batch))
    if attention_mask is not None:
        attention_mask = torch.tensor(attention_mask, dtype=torch.bool).view(batch, known)
    offset = data.draw(st.sampled_from((int, torch.tensor)))(q_offset)
    check(
        pattern, batch, attention_mask, q_length=q_length, kv_length=kv_length, q_offset=offset,
        kv_offset=kv_offset,
    )  # fmt: skip


@pytest.mark.parametrize("pad", ["none", "left", "right", "holes"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_plain_masks_are_of_size_keys(pattern, pad):
    length = 300
    mask = check(pattern, 2, padding(pad, 2, length).bool(), q_length=length, kv_length=length)
    assert mask.dtype == torch.int64
    assert mask.untyped_storage().nbytes() == 8 * 2 * (3 + (length if pad == "holes" else 0))
    assert mask.numel() <= 2 * 9 * 9 * (3 + length)


def test_one_query_needs_a_range_alone():
    """Window and causality are in the range, so that a step may read the cache by attention_decode."""
    mask = check("sliding", 2, padding("left", 2, 40).bool(), q_length=1, kv_length=64, q_offset=39)
    assert decode_mask(mask, 2, 1, 64).window == (-1, -1)
    assert mask[:, 0, 0].tolist() == [[33, 40, 39], [33, 40, 39]]


@pytest.mark.parametrize("window", [None, 5])
def test_packed_sequences_are_offsets(window):
    positions = torch.stack(
        [torch.cat([torch.arange(n) for n in row]) for row in ([4, 1, 20], [12, 12, 1])]
    )
    arguments = {
        "config": LlamaConfig(sliding_window=window),
        "inputs_embeds": torch.zeros(2, 25, 8),
        "attention_mask": None,
        "cache": None,
        "position_ids": positions,
    }
    create = m.create_sliding_window_causal_mask if window else m.create_causal_mask
    masks = {}
    for name in ("eager", "longspan"):
        arguments["config"]._attn_implementation = name
        masks[name] = create(**arguments)
    read = decode_mask(masks["longspan"], 2, 25, 25)
    assert isinstance(read, Packed)
    assert read.cu_seqlens_q.tolist() == [0, 4, 5, 25, 37, 49, 50]
    assert torch.equal(dense(masks["longspan"], 2, 25, 25), masks["eager"] == 0)


def test_other_patterns_get_a_dense_mask():
    """Those that no window says: they must never be taken for one that looks alike."""
    config = LlamaConfig(sliding_window=9, attention_chunk_size=9)
    arguments = {"config": config, "inputs_embeds": torch.zeros(2, 30, 8), "cache": None}
    blocks = torch.full((2, 30), -1)
    blocks[:, 4:14] = 0
    calls = {
        "chunks": (m.create_chunked_causal_mask, {}),
        "blocks": (m.create_causal_mask, {"block_sequence_ids": blocks}),
        "sliding blocks": (m.create_sliding_window_causal_mask, {"block_sequence_ids": blocks}),
        "or": (m.create_causal_mask, {"or_mask_function": lambda b, h, q, kv: kv == 20}),
        "and": (m.create_causal_mask, {"and_mask_function": lambda b, h, q, kv: kv != 3}),
        "two-sided or": (
            m.create_bidirectional_mask,
            {"and_mask_function": lambda b, h, q, kv: kv != q},
        ),
        "asked for": (m.create_causal_mask, {"allow_is_causal_skip": False}),
        "asked for, two-sided": (m.create_bidirectional_mask, {"allow_is_bidirectional_skip": False}),
    }
    for name, (create, options) in calls.items():
        for attention_mask in (None, padding("left", 2, 30)):
            masks = {}
            for implementation in ("eager", "longspan"):
                config._attn_implementation = implementation
                masks[implementation] = create(**arguments, attention_mask=attention_mask, **options)
            assert masks["longspan"].dtype == torch.bool, name
            # None where eager may skip a bidirectional mask
            assert torch.equal(masks["longspan"], masks["eager"] == 0), name


def test_known_overlays_combine():
    """A window as and_mask_function, as Gemma 3 has it, is still a window."""
    config = LlamaConfig()
    config._attn_implementation = "longspan"
    mask = m.create_causal_mask(
        config,
        torch.zeros(1, 30, 8),
        None,
        None,
        and_mask_function=m.sliding_window_overlay(6),
    )
    read = decode_mask(mask, 1, 30, 30)
    assert isinstance(read, KeyRanges)
    assert read.window == (5, 0)

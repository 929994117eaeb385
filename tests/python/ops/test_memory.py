"""Memory in huge pages, for what is read again and again."""

import copy
import pickle
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import longspan
from longspan.ops._memory import empty_to_keep

CPU = torch.device("cpu")
SHAPES = [(3, 5), (2, 3, 40000, 64), (0, 7)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_a_tensor_like_others(shape, dtype):
    x = empty_to_keep(shape, dtype, CPU)
    assert (x.shape, x.dtype, x.device) == (shape, dtype, CPU)
    assert x.is_contiguous()
    assert not x.requires_grad
    x.fill_(3)
    for same in (copy.deepcopy(x), pickle.loads(pickle.dumps(x)), x.clone()):
        assert torch.equal(same, x)
    assert (x == 3).all()


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages for whoever asks are Linux's")
def test_much_begins_with_a_huge_page():
    x = empty_to_keep((4, 1 << 20), torch.float32, CPU)
    assert x.data_ptr() % (2 << 20) == 0
    x.fill_(1)
    del x  # and goes back to the system with the last tensor that has it
    kept = empty_to_keep((4, 1 << 20), torch.float32, CPU).fill_(2)[1:, 5:9]
    assert (kept == 2).all()


def test_where_there_is_no_memory():
    assert empty_to_keep((1 << 20, 64), torch.float32, torch.device("meta")).device.type == "meta"
    with FakeTensorMode():
        assert empty_to_keep((1 << 20, 64), torch.float32, CPU).shape == (1 << 20, 64)


def test_a_cache_of_a_layer_lies_there():
    cache = longspan.nn.KVCache(2, 3, 20000, 64, dtype=torch.bfloat16)
    assert not cache.k.any()
    if sys.platform == "linux":
        assert cache.k.data_ptr() % (2 << 20) == 0

"""Modules for an ordinary training loop: autograd, autocast, torch.compile, state_dict."""

from longspan.nn.attention import Attention, KVCache

__all__ = ["Attention", "KVCache"]

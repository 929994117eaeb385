"""Tests of transformers never look at the network, and all use the registered implementation."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

import longspan.hf


@pytest.fixture(scope="session", autouse=True)
def _registered():
    longspan.hf.register()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)

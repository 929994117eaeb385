"""What tests of commands that read a text with a model share."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers' import

import pytest
import torch


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random Llama, trained to 300 tokens, with a tokenizer of bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=300, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def document(tmp_path):
    """A text of more than 1000 characters."""
    path = tmp_path / "document.txt"
    path.write_text("".join(f"{i} squared is {i * i}. " for i in range(60)), encoding="utf-8")
    return path

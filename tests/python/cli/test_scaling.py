"""`longspan perplexity`, `passkey` and `rope search` on a tiny random Llama, trained to 300 tokens."""

import json
import math

import pytest
import torch

from longspan import rope
from longspan.cli import main, passkey, perplexity
from longspan.cli import rope as rope_command
from longspan.cli._scaling import parse_methods
from longspan.hf import extend_context

transformers = pytest.importorskip("transformers")
for module in ("matplotlib", "tqdm", "tokenizers", "gguf"):
    pytest.importorskip(module)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PAIRS, TRAINED = 8, 300


@pytest.fixture(scope="module")
def folder(model_folder, tmp_path_factory):
    """A model whose attention is far from uniform, so that angles count."""
    folder = tmp_path_factory.mktemp("sharp")
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def command(name, folder, out, *options):
    return main(
        [*name.split(), "--model", str(folder), "--dtype", "float32", "--out", str(out), *options]
    )


def read(path):
    return json.loads(path.read_text())


def write_factors(path, kind="longrope"):
    parameters = {
        "rope_theta": 10000.0, "rope_type": kind, "factor": 2.0, "attention_factor": 1.05,
        "original_max_position_embeddings": TRAINED,
    }  # fmt: skip
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * PAIRS, "long_factor": [1 + i / 5 for i in range(PAIRS)]}
    path.write_text(json.dumps(parameters))
    return parameters


# ---- perplexity


def run_perplexity(folder, document, out, *options):
    return command(
        "perplexity", folder, out, "--document", str(document), "--lengths", "600,256", *options
    )


def test_perplexity_is_transformers_own(folder, document, tmp_path, capsys):
    parameters = write_factors(tmp_path / "factors.json")
    methods = ["none", "linear", "dynamic", "yarn", "yarn@3", "longrope"]
    status = run_perplexity(
        folder, document, tmp_path / "out", "--methods", ",".join(methods),
        "--factors", str(tmp_path / "factors.json"), "--scored", "100", "--end", "700",
    )  # fmt: skip
    assert status == 0
    rows = read(tmp_path / "out" / "perplexity.json")["rows"]
    assert [(row["tokens"], row["method"]) for row in rows] == [
        (length, method) for length in (256, 600) for method in methods
    ]
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(PNG_MAGIC)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["perplexity.json", "perplexity.png"]

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer(document.read_text()).input_ids])[:, :700]
    long = {"factor": 2.0, "original_max_position_embeddings": TRAINED}
    theirs = {
        "none": {"rope_type": "default"},
        "linear": {"rope_type": "linear", "factor": 2.0},
        "dynamic": {"rope_type": "dynamic", "factor": 2.0},
        "yarn": {"rope_type": "yarn", **long},
        "yarn@3": {"rope_type": "yarn", **long, "factor": 3.0},
        "longrope": parameters,
    }
    for row in rows:
        scaling = dict(theirs[row["method"]])
        if row["tokens"] < TRAINED and row["method"] in ("linear", "dynamic", "yarn"):
            scaling = {"rope_type": "default"}  # the factor that the length needs is 1
        config = transformers.AutoConfig.from_pretrained(folder)
        config.rope_parameters = {"rope_theta": 10000.0, **scaling}
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder, config=config, attn_implementation="eager"
        )
        ids = tokens[:, -row["tokens"] :]
        labels = torch.where(torch.arange(row["tokens"]) >= row["tokens"] - 100, ids, -100)
        with torch.no_grad():
            loss = model(ids, labels=labels).loss.item()
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4), row["method"]
    found = {round(row["perplexity"], 3) for row in rows if row["tokens"] == 600}
    assert len(found) == len(methods)
    same = [row["method"] for row in rows if "same_as" in row]
    assert same == ["linear", "dynamic", "yarn"]
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in table[1:4]] == ["tokens", "256", "600"]
    assert float(table[3][6]) == pytest.approx(rows[-1]["perplexity"], rel=1e-3)


def test_perplexity_of_a_window(folder, document, tmp_path, capsys):
    """Up to the trained length the model as it is; beyond, its first and last tokens, unscaled."""
    assert run_perplexity(folder, document, tmp_path / "a", "--methods", "none,window") == 0
    rows = {
        (row["tokens"], row["method"]): row for row in read(tmp_path / "a" / "perplexity.json")["rows"]
    }
    assert rows[256, "window"]["same_as"] == "none"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor([tokenizer(document.read_text()).input_ids])[:, -600:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    window = extend_context(model, None, cache="window", window=TRAINED - 4, sink_tokens=4)
    with window, torch.no_grad():
        logits = model(tokens).logits[0, -129:-1]
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, -128:]).exp().item()
    assert rows[600, "window"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert rows[600, "none"]["perplexity"] != pytest.approx(expected, rel=1e-3)
    capsys.readouterr()
    options = ("--methods", "window", "--attention", "sdpa")
    assert run_perplexity(folder, document, tmp_path / "b", *options) == 2
    assert "attention: expected longspan with cache='window'" in capsys.readouterr().err


def test_perplexity_goes_on_where_it_was_stopped(folder, document, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return last_losses(*args)

    last_losses = perplexity.last_losses
    monkeypatch.setattr(perplexity, "last_losses", interrupted)
    options = ("--methods", "none,linear@2,yarn")
    assert run_perplexity(folder, document, tmp_path / "a", *options) == 130
    before = read(tmp_path / "a" / "perplexity.json")["rows"]
    # yarn at 256 tokens has the frequencies of none.
    assert [(row["tokens"], row["method"]) for row in before] == [
        (256, "none"), (256, "linear@2"), (256, "yarn"),
    ]  # fmt: skip
    assert run_perplexity(folder, document, tmp_path / "a", *options) == 0
    assert len(calls) == 6
    rows = read(tmp_path / "a" / "perplexity.json")["rows"]
    assert rows[:3] == before
    assert run_perplexity(folder, document, tmp_path / "b", *options) == 0
    whole = read(tmp_path / "b" / "perplexity.json")["rows"]
    assert [row["perplexity"] for row in rows] == [row["perplexity"] for row in whole]
    # Nothing is left to do, and the model is not even loaded.
    monkeypatch.setattr(perplexity.PretrainedModel, "load", lambda *_: pytest.fail("loaded"))
    assert run_perplexity(folder, document, tmp_path / "b", *options) == 0
    capsys.readouterr()
    assert run_perplexity(folder, document, tmp_path / "b", *options, "--scored", "64") == 2
    assert "its scored is 128, here 64" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "256,64k"], "--lengths: expected no more tokens than there are up to --end"),
        (["--lengths", "8"], "--lengths: expected 16 tokens or more, got 8"),
        (["--scored", "256"], "--scored: expected less than the least length, 256, got 256"),
        (["--end", "599"], "--lengths: expected no more tokens than there are up to --end, 599"),
        (["--methods", "yarm"], "expected some of none, linear, ntk"),
        (["--methods", "yarn@0.5"], "expected a method that takes a factor, of 1 or more, after @"),
        (["--methods", "none@2"], "expected a method that takes a factor, of 1 or more, after @"),
        (["--methods", "yarn,yarn"], "expected each once"),
        (["--methods", "longrope"], "--factors: expected a file just where --methods has longrope"),
        (["--factors", "/nowhere.json"], "--factors: expected a JSON file, got /nowhere.json"),
    ],
)
def test_perplexity_names_bad_input(folder, document, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(perplexity, "last_losses", lambda *_: pytest.fail("computed first"))
    try:
        status = run_perplexity(folder, document, tmp_path, *options)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err


def test_factors_that_do_not_fit_are_named_before_anything_is_computed(
    folder, document, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(perplexity, "last_losses", lambda *_: pytest.fail("computed first"))
    path = tmp_path / "factors.json"
    write_factors(path)
    parameters = read(path)
    parameters["long_factor"].pop()
    path.write_text(json.dumps(parameters))
    assert run_perplexity(folder, document, tmp_path / "a", "--factors", str(path)) == 2
    assert "--methods: longrope: frequencies: long_factor: expected 8 numbers" in capsys.readouterr().err
    write_factors(path, "yarn")
    options = ("--factors", str(path), "--methods")
    assert run_perplexity(folder, document, tmp_path / "a", *options, "longrope") == 2
    assert "the method searched takes it" in capsys.readouterr().err


def test_methods_as_text():
    assert [str(method) for method in parse_methods("none, yarn@2,dynamic_linear,searched")] == [
        "none", "yarn@2", "dynamic_linear", "searched",
    ]  # fmt: skip


# ---- passkey


def run_passkey(folder, out, *options):
    return command(
        "passkey", folder, out, "--lengths", "512,400", "--depths", "3", "--trials", "2", *options
    )


def test_passkey(folder, tmp_path, capsys, monkeypatch):
    asked = []

    def knows_the_end(model, ids, answer):
        text = text_of(ids)
        asked.append((text, len(ids[0]), model.config.rope_parameters["rope_type"]))
        return text.index("The pass key is") > 300

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def text_of(ids):
        return tokenizer.decode(ids[0].tolist())

    monkeypatch.setattr(passkey, "retrieved", knows_the_end)
    assert run_passkey(folder, tmp_path, "--methods", "none,yarn") == 0
    rows = read(tmp_path / "passkey.json")["rows"]
    assert len(rows) == len(asked) == 2 * 2 * 3 * 2
    assert [asked[i][1] for i in (0, -1)] == [400, 512]
    assert {kind for _, _, kind in asked} == {"default", "yarn"}
    for row, (text, _, _) in zip(rows, asked):
        key = text[-5:]
        assert key.isdigit()
        assert f"The pass key is {key}. Remember it. {key} is the pass key." in text
        assert text.endswith(f"What is the pass key? The pass key is {key}")
        begin = text.index("The pass key is")
        assert text[begin - 1] == "\n"  # a line of its own, at the place nearest to what is asked
        filler = (text.index("there.\n") + 7, text.index("\nWhat is") - 60)
        place = filler[0] + row["depth"] * (filler[1] - filler[0])
        assert begin == pytest.approx(place, abs=len(passkey._FILLER) / 2 + 3)
    keys = [text[-5:] for text, _, _ in asked]
    assert len(set(keys)) == 6
    assert keys[:6] == keys[6:12]  # the same ones for each method
    assert (tmp_path / "passkey.png").read_bytes().startswith(PNG_MAGIC)
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    right = [row["retrieved"] for row in rows if row["tokens"] == 512 and row["method"] == "yarn"]
    assert table[3] == ["512", f"{sum(right) / 6:.0%}", f"{sum(right) / 6:.0%}"]


def test_retrieved_is_what_greedy_decoding_finds(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    prompt = torch.randint(0, 256, (1, 40))
    got = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    answer = got[0, 40:].tolist()
    assert passkey.retrieved(model, got, answer)
    for wrong in range(6):
        other = got.clone()
        other[0, 40 + wrong] = (other[0, 40 + wrong] + 1) % 256
        assert not passkey.retrieved(model, other, other[0, 40:].tolist())


def test_passkey_goes_on_where_it_was_stopped(folder, tmp_path, monkeypatch, capsys):
    retrieved, calls = passkey.retrieved, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return retrieved(*args)

    monkeypatch.setattr(passkey, "retrieved", interrupted)
    assert run_passkey(folder, tmp_path, "--methods", "none") == 130
    before = read(tmp_path / "passkey.json")["rows"]
    assert len(before) == 4
    assert run_passkey(folder, tmp_path, "--methods", "none") == 0
    assert read(tmp_path / "passkey.json")["rows"][:4] == before
    assert len(calls) == 5 + 12 - 4
    capsys.readouterr()
    assert run_passkey(folder, tmp_path, "--methods", "none", "--seed", "1") == 2
    assert "its seed is 0, here 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "100"], "--lengths: expected "),
        (["--depths", "0"], "--depths: expected 1 or more, got 0"),
        (["--trials", "0"], "--trials: expected 1 or more, got 0"),
    ],
)
def test_passkey_names_bad_input(folder, tmp_path, capsys, options, message):
    assert run_passkey(folder, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


# ---- rope search


def run_search(folder, document, out, *options):
    return command(
        "rope search", folder, out, "--document", str(document), "--length", "600", "--from",
        "300", "--scored", "50", "--population", "8", "--generations", "2", *options,
    )  # fmt: skip


@pytest.fixture
def long_document(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"{i} squared is {i * i}. " for i in range(120)), encoding="utf-8")
    return path


def test_search_finds_what_perplexity_reads(folder, long_document, tmp_path, capsys):
    assert run_search(folder, long_document, tmp_path / "s", "--samples", "2") == 0
    report = read(tmp_path / "s" / "search.json")
    losses = [row["loss"] for row in report["rows"]]
    assert len(losses) == 8 + 2 * 4
    found = read(tmp_path / "s" / "rope_parameters.json")
    best = report["rows"][losses.index(min(losses))]
    assert found["long_factor"] == best["factors"]
    assert found["attention_factor"] == found["long_mscale"] == best["attention_factor"]
    assert (set(found["short_factor"]), found["short_mscale"]) == ({1.0}, 1.0)
    assert found["long_factor"] == sorted(found["long_factor"])
    assert (found["rope_type"], found["factor"]) == ("longrope", 2.0)
    # It begins with YaRN.
    theta, _ = rope.frequencies("default", head_dim=16)
    yarn, _ = rope.frequencies("yarn", head_dim=16, factor=2.0, max_position=TRAINED)
    torch.testing.assert_close(theta / torch.tensor(report["rows"][0]["factors"]), yarn)
    # The loss is the one that perplexity finds for these tokens.
    status = command(
        "perplexity", folder, tmp_path / "p", "--document", str(long_document), "--methods",
        "longrope", "--factors", str(tmp_path / "s" / "rope_parameters.json"), "--lengths", "600",
        "--scored", "50", "--end", "900",
    )  # fmt: skip
    assert status == 0
    first = read(tmp_path / "p" / "perplexity.json")["rows"][0]["perplexity"]
    end = 300 + 600 + min(600, tokens_of(folder, long_document) - 900)
    status = command(
        "perplexity", folder, tmp_path / "q", "--document", str(long_document), "--methods",
        "longrope", "--factors", str(tmp_path / "s" / "rope_parameters.json"), "--lengths", "600",
        "--scored", "50", "--end", f"{end}",
    )  # fmt: skip
    assert status == 0
    second = read(tmp_path / "q" / "perplexity.json")["rows"][0]["perplexity"]
    assert min(losses) == pytest.approx((math.log(first) + math.log(second)) / 2, rel=1e-5)
    assert f"The best of {len(losses)}: loss {min(losses):.4f}" in capsys.readouterr().out


def tokens_of(folder, document):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return len(tokenizer(document.read_text()).input_ids)


def test_search_goes_on_where_it_was_stopped(folder, long_document, tmp_path, monkeypatch):
    last_losses, calls = rope_command.last_losses, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return last_losses(*args)

    monkeypatch.setattr(rope_command, "last_losses", interrupted)
    assert run_search(folder, long_document, tmp_path / "a") == 130
    assert len(read(tmp_path / "a" / "search.json")["rows"]) == 9
    assert (tmp_path / "a" / "rope_parameters.json").exists()
    assert run_search(folder, long_document, tmp_path / "a") == 0
    assert len(calls) == 10 + 16 - 9
    assert run_search(folder, long_document, tmp_path / "b") == 0
    for name in ("search.json", "rope_parameters.json"):
        assert read(tmp_path / "a" / name) == read(tmp_path / "b" / name)
    assert run_search(folder, long_document, tmp_path / "b", "--generations", "3") == 0
    more = read(tmp_path / "b" / "search.json")["rows"]
    assert more[:16] == read(tmp_path / "a" / "search.json")["rows"]
    assert len(more) == 20


def test_search_begins_where_another_ended(folder, long_document, tmp_path, capsys):
    options = ("--simple", "--yarn-factors", "2,3", "--temperatures", "1,1.05")
    assert run_search(folder, long_document, tmp_path / "grid", *options) == 0
    found = str(tmp_path / "grid" / "rope_parameters.json")
    status = run_search(folder, long_document, tmp_path / "a", "--start", found, "--population", "3")
    assert status == 0
    rows = read(tmp_path / "a" / "search.json")["rows"]
    assert len(rows) == 3 + 2 * 2
    grid = min(row["loss"] for row in read(tmp_path / "grid" / "search.json")["rows"])
    assert rows[0]["loss"] == pytest.approx(grid, rel=1e-5)  # the factors are written in six digits
    # And a second time where the first ended.
    again = str(tmp_path / "a" / "rope_parameters.json")
    options = ("--start", found, again, "--population", "3", "--generations", "0")
    assert run_search(folder, long_document, tmp_path / "b", *options) == 0
    starts = [row["loss"] for row in read(tmp_path / "b" / "search.json")["rows"]]
    assert starts[1] == min(row["loss"] for row in rows)
    capsys.readouterr()
    assert run_search(folder, long_document, tmp_path / "b", *options, "--start", again) == 2
    assert "--out: expected" in capsys.readouterr().err


def test_the_simple_search_is_a_grid_over_yarn(folder, long_document, tmp_path):
    options = ("--simple", "--yarn-factors", "2,4", "--temperatures", "1,1.05,1.1")
    assert run_search(folder, long_document, tmp_path, *options) == 0
    rows = read(tmp_path / "search.json")["rows"]
    assert [(row["factor"], row["attention_factor"]) for row in rows] == [
        (f, t) for f in (2.0, 4.0) for t in (1.0, 1.05, 1.1)
    ]
    found, best = read(tmp_path / "rope_parameters.json"), min(rows, key=lambda row: row["loss"])
    assert found == {
        "rope_theta": 10000.0, "rope_type": "yarn", "original_max_position_embeddings": TRAINED,
        "factor": best["factor"], "attention_factor": best["attention_factor"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "0"], "--samples: expected 1 or more, got 0"),
        (["--population", "3"], "--population: expected 8 or more, with which it begins, got 3"),
        (["--parents", "8"], "--parents: expected 1 or more and less than --population, got 8"),
        (["--start", "none.json"], "--start: expected a JSON file, got none.json"),
        (["--simple", "--start", "none.json"], "--start: expected without --simple"),
        (["--length", "200"], "--length: expected more than the model was trained for, 300"),
        (["--scored", "600"], "--scored: expected less than --length, 600, got 600"),
        (["--samples", "90"], "--length and --samples: expected no more than the document has"),
        (["--yarn-factors", "2"], "--yarn-factors and --temperatures: expected with --simple alone"),
        (["--simple", "--yarn-factors", "0.5"], "--yarn-factors: expected 1 or more, got 0.5"),
        (["--yarn-factors", "-1"], "expected numbers above 0"),
    ],
)
def test_search_names_bad_input(folder, long_document, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(rope_command, "last_losses", lambda *_: pytest.fail("computed first"))
    try:
        status = run_search(folder, long_document, tmp_path, *options)
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err

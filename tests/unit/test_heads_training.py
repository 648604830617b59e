"""Training of retaining heads: labels against brute force, the recipe, data, and runs that are killed or shared out."""

from __future__ import annotations

import itertools
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import apb
import forked
import oracle
from apb.cli.main import app, run
from apb.distributed.collectives import Group
from apb.distributed.launch import launch
from apb.evaluation.tasks import generate
from apb.hf.heads import HeadShape, load_heads
from apb.hf.loading import load_tokenizer, shipped_model
from apb.training.heads import train
from apb.training.heads.data import Example, Samples, cut, order
from apb.training.heads.generated import FIRST_SEED, line
from apb.training.heads.labels import answer_attention, head_loss, top_overlap
from apb.training.heads.train import HeadTrainer, Report, Settings
from byte_checkpoint import BOS, EOS, TEMPLATE, byte_tokenizer
from models import tiny_model
from small_tokenizers import KINDS

# --- labels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 7 * 6, 2**24])
def test_labels_are_the_largest_logit(most: int) -> None:
    """Per KV head and token: the largest scaled q.k over answer tokens and the group's heads, whatever the pieces."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(3, 6, 8, generator=generator), torch.randn(11, 2, 8, generator=generator)
    labels = answer_attention(q, k, 0.3, most)
    for kv_head, token in itertools.product(range(2), range(11)):
        logits = [0.3 * float(q[row, 3 * kv_head + head] @ k[token, kv_head]) for row in range(3) for head in range(3)]
        assert abs(float(labels[kv_head, token]) - max(logits)) < 1e-5
    assert labels.shape == (2, 11)


def trainer(folder: Path, model: Any, lines: list[dict[str, Any]], group: Group | None = None, **settings: Any):
    """A trainer of a model with a vocabulary of bytes."""
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines))
    chosen = Settings(max_length=4096, **settings)
    samples = Samples(path, byte_tokenizer(), chosen.max_length)
    return HeadTrainer(model, samples, folder / "heads.safetensors", chosen, group or Group())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_labels_in_a_model(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every layer the labels are those of a dense forward pass of the whole sample, to 1e-4."""
    model = tiny_model(family, heads=4, kv_heads=2, head_dim=16, vocab=258)
    sample = Example(tuple((7 * i) % 250 for i in range(40)), (3, 1, 4, 1, 5))
    ids = torch.tensor([sample.prompt + sample.answer])
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
        cos, sin = (part[0] for part in model.model.rotary_emb(hidden[0], torch.arange(45)[None]))
    expected = []
    for layer, x in zip(model.model.layers, hidden[:-1], strict=True):
        q, k, _ = oracle.project(layer.self_attn, layer.input_layernorm(x[0]))
        q, k = oracle.rope(q, cos, sin), oracle.rope(k, cos, sin)
        expected.append(oracle.scaled_logits(layer.self_attn, q[:, 40:], k[:, :40]).amax((1, 2)))

    found: list[Tensor] = []
    original = answer_attention
    monkeypatch.setattr(train, "answer_attention", lambda *given: found.append(original(*given)) or found[-1])
    trainer(tmp_path, model, [{"prompt": "a", "answer": "b"}], steps=1, hidden=8).step([sample])
    for labels, dense in zip(found, expected, strict=True):
        assert labels.shape == (2, 40)
        torch.testing.assert_close(labels, dense, rtol=0, atol=1e-4)


def test_loss() -> None:
    """Smooth L1 of what is above the mean, averaged, and 0.0025 times the mean squared difference of neighbours."""
    predicted, labels = (
        torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 2.0]]),
        torch.tensor([[0.5, 1.0, 1.5], [2.0, 0.0, 1.0]]),
    )
    # Less their means: -2, -1, 3 and 0, 0, 0; -0.5, 0, 0.5 and 1, -1, 0.
    smooth = (1.0 + 0.5 + 2.0 + 0.5 + 0.5 + 0) / 6
    assert abs(float(head_loss(predicted, labels)) - (smooth + 0.0025 * (1 + 16) / 4)) < 1e-6
    assert float(head_loss(labels[:, :1], labels[:, :1])) == 0.0


def test_offsets_teach_nothing() -> None:
    """A head learns the order of tokens, not by how much all labels of a KV head are above 0."""
    gradients = []
    for offset in (0.0, 1000.0):
        predicted = torch.tensor([[0.0, 1.0, 4.0, -3.0]], requires_grad=True)
        head_loss(predicted, torch.tensor([[0.25, -0.5, 2.0, 8.0]]) + offset).backward()
        assert predicted.grad is not None
        gradients.append(predicted.grad)
    assert float(gradients[0].abs().max()) > 0.1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-4)


def test_overlap() -> None:
    """The share of the top tenth by label found in the top tenth by prediction; at least one token is looked for."""
    labels = torch.arange(20.0).repeat(2, 1)
    predicted = labels.clone()
    predicted[1, 0] = 30.0  # pushes one of the two best of KV head 1 out
    assert float(top_overlap(labels, labels)) == 1.0
    assert float(top_overlap(predicted, labels)) == 0.75
    assert float(top_overlap(labels[:, :3], -labels[:, :3])) == 0.0


# --- the recipe ----------------------------------------------------------------------------------------------------


def test_learning_rate() -> None:
    """It rises over 300 steps and falls linearly to 0; a shorter run rises over a tenth."""
    rates = [Settings().rate(step) for step in (0, 149, 299, 1650, 2999)]
    assert rates == pytest.approx([5e-4 / 300, 2.5e-4, 5e-4, 2.5e-4, 5e-4 / 2700])
    assert Settings(steps=50).rate(4) == pytest.approx(5e-4)
    assert Settings(steps=1).rate(0) == pytest.approx(5e-4)


def test_first_update_by_hand(tmp_path: Path) -> None:
    """One step is AdamW's on the gradient of the mean loss over the batch, clipped entry by entry, and no more."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    examples = [Example((1, 2, 3, 4, 5, 6), (7, 8)), Example((9, 8, 7, 6), (5,))]
    work = trainer(tmp_path, model, [{"prompt": "a", "answer": "b"}], steps=4, hidden=8, batch_size=2)
    for weight in work.weights.values():
        weight.data *= 2  # so that some of the gradient is clipped
    weights = {name: weight.detach().clone().requires_grad_() for name, weight in work.weights.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    work.step(examples)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    work.attachment.release()

    for sample in examples:
        count, total = len(sample.prompt), len(sample.prompt) + len(sample.answer)
        with torch.no_grad():
            hidden = model(torch.tensor([sample.prompt + sample.answer]), output_hidden_states=True).hidden_states
            cos, sin = (part[0] for part in model.model.rotary_emb(hidden[0], torch.arange(total)[None]))
        for index, layer in enumerate(model.model.layers):
            raw = oracle.project(layer.self_attn, layer.input_layernorm(hidden[index][0]))
            q, k = (oracle.rope(x, cos, sin) for x in raw[:2])
            labels = oracle.scaled_logits(layer.self_attn, q[:, count:], k[:, :count]).amax((1, 2))
            x = torch.cat([part[:, :count].transpose(0, 1).flatten(1) for part in raw], 1)
            inner = x @ weights[f"{index}.fc1"].T
            predicted = (inner * inner.sigmoid() @ weights[f"{index}.fc2"].T).T
            (head_loss(predicted, labels) / 2).backward()
    assert max(float(weight.grad.abs().max()) for weight in weights.values() if weight.grad is not None) > 0.5
    for name, weight in weights.items():
        assert weight.grad is not None
        weight.grad.clamp_(-0.5, 0.5)
        moment = work.optimizer.state[work.weights[name]]["exp_avg"]  # the step itself hardly shows how large it is
        torch.testing.assert_close(moment, 0.1 * weight.grad, rtol=1e-3, atol=1e-6)
        # AdamW's first step: both moments are those of this gradient, bias-corrected.
        expected = weight.detach() - 5e-4 * weight.grad / (weight.grad.abs() + 1e-8)
        sure = weight.grad.abs() > 1e-6
        torch.testing.assert_close(work.weights[name].detach()[sure], expected[sure], rtol=0, atol=2e-6)


def test_it_learns(tmp_path: Path) -> None:
    """On a few samples the loss falls and the overlap rises; the file holds the heads in the model's dtype."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    lines = [{"document": f"{i} the keeper of the light {i}" * 3, "query": "Who?", "answer": str(i)} for i in range(4)]
    work = trainer(tmp_path, model, lines, steps=200, hidden=32, learning_rate=5e-3)
    reports: list[Report] = []
    path = work.run(reports.append)
    assert [report.step for report in reports] == list(range(20, 201, 20))
    assert reports[-1].loss < 0.75 * reports[0].loss
    assert reports[-1].overlap > reports[0].overlap + 0.2
    shape = HeadShape.of(model.config)
    heads = load_heads(path, layers=shape.layers, heads=4, kv_heads=2, head_dim=16)
    for layer, head in enumerate(heads):
        assert torch.equal(head.fc1, work.weights[f"{layer}.fc1"])
    assert {value.dtype for value in load_file(path).values()} == {torch.float32}
    assert not work.path.exists()
    engine = apb.Engine.from_model(model, blocks=3, anchor_length=9, passing_length=2, heads=path)
    engine.prefill(apb.Prompt.from_tokens([BOS], range(30), [5, 6]))


# --- data ----------------------------------------------------------------------------------------------------------


def test_every_shape_of_line(tmp_path: Path) -> None:
    """document, query, answer; prompt with query; prompt alone; and messages, tokenized as the model will read them."""
    path = tmp_path / "data.jsonl"
    lines: list[dict[str, Any]] = [
        {"document": "ab", "query": "c?", "answer": "d", "note": "ignored"},
        {"prompt": "ab", "query": "c?", "answer": "d"},
        {"prompt": "ab c?", "answer": " d"},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    samples = Samples(path, byte_tokenizer(), 100)
    asked = Example((BOS, *b"ab\n\nc?"), tuple(b" d"))
    assert [samples[i] for i in range(len(samples))] == [asked, asked, Example((BOS, *b"ab c?"), tuple(b" d"))]

    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}] * 2
    path.write_text("\n".join(json.dumps(fields) for fields in [*lines, {"messages": chat}]))
    samples = Samples(path, byte_tokenizer(TEMPLATE), 100)
    turn = (*b"[user]ab\n\nc?", *b"[assistant]")
    assert samples[0] == Example((BOS, *turn), tuple(b"d"))
    assert samples[2].prompt == (BOS, *b"[user]ab c?[assistant]")
    assert samples[3] == Example((BOS, *b"[user]ab[assistant]c[user]ab[assistant]"), tuple(b"c"))


def test_lines_are_text_and_answers_go_on(tmp_path: Path) -> None:
    """Names of control tokens are text wherever they stand; an answer's tokens are those that follow the prompt's."""
    path = tmp_path / "data.jsonl"
    chat = [{"role": role, "content": f"{role}</s>"} for role in ("user", "assistant", "user", "assistant")]
    lines = [{"document": "a</s>", "query": "<s>?", "answer": "</s>"}, {"prompt": "</s>", "answer": "<s>"}]
    path.write_text("\n".join(json.dumps(fields) for fields in [*lines, {"messages": chat}]))
    samples = Samples(path, byte_tokenizer(TEMPLATE), 100)
    for example in (samples[number] for number in range(3)):
        assert example.prompt.count(BOS) == 1
        assert not {EOS, BOS} & {*example.prompt[1:], *example.answer}
    assert bytes(samples[2].prompt[1:]) == b"[user]user</s>[assistant]assistant</s>[user]user</s>[assistant]"

    path.write_text(json.dumps({"document": "The keeper.", "query": "Who?", "answer": "Maud"}))
    tokenizer = KINDS["space always"]()
    tokenizer.chat_template = None
    example = Samples(path, tokenizer, 100)[0]
    assert list(example.prompt + example.answer) == tokenizer("The keeper.\n\nWho? Maud")["input_ids"]


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not a list"),
        (b'{"text": "a", "answer": "b"}', "one of these sets of fields"),
        (b'{"document": "a", "prompt": "a", "query": "a", "answer": "b"}', "one of these sets of fields"),
        (b'{"document": "a", "answer": "b"}', "'query'"),
        (b'{"document": "a", "query": " ", "answer": "b"}', "'query'"),
        (b'{"prompt": "a", "answer": 5}', "'answer'"),
        (b'{"prompt": "a"}', "'answer'"),
        (b'{"prompt": "\\ud800", "answer": "b"}', "not valid text"),
        (b'{"messages": []}', "chat template"),
    ],
)
def test_malformed_lines_are_refused_by_number(tmp_path: Path, content: bytes, fragment: str) -> None:
    """Before anything is trained: one sentence with the file, the line's number and what is wrong with it."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a", "answer": "b"}\n\n' + content + b"\n")
    with pytest.raises(apb.InputError) as refusal:
        Samples(path, byte_tokenizer(), 100)
    assert f"Line 3 of '{path}'" in str(refusal.value)
    assert fragment in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("messages", "fragment"),
    [
        ([], "at least a question and an answer"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "must be the assistant's"),
        ([{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}], "role of system, user, assistant"),
        ([{"role": "user"}, {"role": "assistant", "content": "b"}], "'content'"),
    ],
)
def test_malformed_messages(tmp_path: Path, messages: Any, fragment: str) -> None:
    """Chats that do not end in an answer, or are none."""
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    with pytest.raises(apb.InputError, match="Line 1") as refusal:
        Samples(path, byte_tokenizer(TEMPLATE), 100)
    assert fragment in str(refusal.value)


def test_files_without_samples(tmp_path: Path) -> None:
    """A missing file and an empty one."""
    with pytest.raises(apb.InputError, match="cannot be read"):
        Samples(tmp_path / "none.jsonl", byte_tokenizer(), 100)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(apb.InputError, match="no samples"):
        Samples(tmp_path / "empty.jsonl", byte_tokenizer(), 100)


def test_long_samples_lose_their_middle() -> None:
    """The beginning, the question at the end and the answer stay."""
    sample = Example(tuple(range(10)), (50, 51))
    assert cut(sample, 12) == sample
    assert cut(sample, 9) == Example((0, 1, 2, 3, 7, 8, 9), (50, 51))
    assert cut(Example((1, 2, 3), tuple(range(9))), 4) == Example((1, 3), (0, 1))


def test_every_epoch_takes_every_sample_once() -> None:
    """The order depends on the seed and the epoch alone, and goes on from any place."""
    whole = list(itertools.islice(order(7, 3, 0), 21))
    assert [sorted(whole[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert all(list(itertools.islice(order(7, 3, first), 21 - first)) == whole[first:] for first in range(21))


def test_generated_lines() -> None:
    """Data for the shipped model comes from the task generators; half of it has the question in front as well."""
    model = str(shipped_model())
    plain, front = (json.loads(line(index, model, 2000)) for index in (1, 7))
    sample = generate("multikey", load_tokenizer(model), 1968, FIRST_SEED + 1)
    assert plain == {"document": sample.document, "query": sample.query, "answer": sample.answer}
    assert front["document"].startswith("\n\n" + front["query"])


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def arguments(checkpoint: Path, tmp_path: Path) -> list[str]:
    """`apb train heads` on the tiny checkpoint, without --out."""
    path = tmp_path / "data.jsonl"
    lines = [{"document": f"{i} lamps were lit. " * 9, "query": "How many?", "answer": str(i)} for i in range(7)]
    path.write_text("".join(json.dumps(fields) + "\n" for fields in lines))
    options = {"model": checkpoint, "data": path, "hidden": 16, "steps": 100, "batch-size": 2, "device": "cpu"}
    return [
        "apb.cli.main",
        "train",
        "heads",
        *(str(part) for name, value in options.items() for part in (f"--{name}", value)),
    ]


Here = Callable[..., tuple[int, str]]


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str]]]:
    """Runs a command line in this process: exit status and standard error."""

    def call(*command: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", list(command))
        return run(app), capfd.readouterr().err

    yield call
    logging.disable(logging.NOTSET)


def trains(*command: str) -> None:
    """A command line in a process of its own."""
    sys.argv = list(command)
    assert run(app) == 0


def test_killed_resumed_and_shared_out(
    arguments: list[str], here: Here, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run that is killed goes on to the very same weights; two ranks come to those of one, nearly."""
    whole, killed, shared = (tmp_path / f"{name}.safetensors" for name in ("whole", "killed", "shared"))
    status, err = here(*arguments, "--out", str(whole))
    assert (status, err.count("\n")) == (0, 5)

    checkpoint = tmp_path / "killed.safetensors.checkpoint"
    command = (*arguments, "--out", str(killed), "--checkpoint-every", "5")
    process = forked.context().Process(target=trains, args=command)
    process.start()
    try:
        until = time.monotonic() + 100
        while not checkpoint.exists() and process.is_alive() and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.kill()
        process.join()
    capfd.readouterr()
    assert process.exitcode == -signal.SIGKILL
    assert not killed.exists()
    step = torch.load(checkpoint, weights_only=True)["step"]
    assert 0 < step < 80

    status, err = here(*arguments, "--out", str(killed))
    assert (status, err.count("\n")) == (0, 5 - step // 20)  # it did not begin anew
    assert "step 100 of 100" in err
    assert not checkpoint.exists()
    expected, resumed = load_file(whole), load_file(killed)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())

    launch(trains, 2, *arguments, "--out", str(shared))
    assert capfd.readouterr().err.count("step 100 of 100") == 1
    for name, value in load_file(shared).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
    first = train.first_weights(HeadShape(3, 4, 2, 16), Settings(hidden=16), torch.device("cpu"))
    assert not torch.allclose(first["0.fc1"], expected["model.layers.0.self_attn.fc1.weight"], atol=1e-2)


def test_another_trainings_checkpoint_is_refused(tmp_path: Path) -> None:
    """A sentence that says what differs; a file that is no checkpoint is refused as well."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    lines = [{"prompt": "a b c d e", "answer": "b"}]
    first = trainer(tmp_path, model, lines, steps=3, hidden=8)
    first._save()
    with pytest.raises(apb.InputError, match="its steps was 3 and is now 4"):
        trainer(tmp_path, model, lines, steps=4, hidden=8).run()
    with pytest.raises(apb.InputError, match="its data was"):
        trainer(tmp_path, model, [*lines, *lines], steps=3, hidden=8).run()
    first.path.write_bytes(b"garbage")
    with pytest.raises(apb.InputError, match="cannot be read"):
        first.run()


def test_batches_that_cannot_be_shared_out(tmp_path: Path) -> None:
    """One sample cannot be split over two ranks."""
    model = tiny_model("llama", heads=4, kv_heads=2, head_dim=16, vocab=258)
    with pytest.raises(apb.InputError, match="multiple of 2"):
        trainer(tmp_path, model, [{"prompt": "a", "answer": "b"}], group=Group(0, 2), batch_size=3)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--out", "heads.pt"], "does not end in .safetensors"),
        (["--out", "nowhere/heads.safetensors"], "there is no folder"),
        (["--out", "heads.safetensors", "--steps", "0"], "Steps must be at least 1"),
        (["--out", "heads.safetensors", "--learning-rate", "2"], "learning rate"),
        (["--out", "heads.safetensors", "--seed", str(2**64)], "seed"),
        (["--out", "heads.safetensors", "--max-length", "4097"], "the model's 4096 positions"),
        (["--out", "heads.safetensors", "--data", "none.jsonl"], "cannot be read"),
    ],
)
def test_refused_requests(
    arguments: list[str], options: list[str], fragment: str, here: Here, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status 2 and one sentence, before a weight is read."""
    monkeypatch.chdir(tmp_path)
    status, err = here(*arguments, *options)
    assert (status, err.count("\n")) == (2, 1), err
    assert fragment in err
    assert not Path("heads.safetensors").exists()

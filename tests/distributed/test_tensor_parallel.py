"""Two ranks of two processes that share the weights: the same numbers as one process that has everything."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import apb
import families
import tensor_work
from apb.distributed.mesh import Mesh
from apb.hf.tensor_parallel import check_shards
from forked import launch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models and documents are."""
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[Any, Any]]:
    """What each of the four processes got."""
    for family, shape in tensor_work.SHAPES.items():
        model = families.make(*shape)
        model.save_pretrained(folder / family)
        if family in tensor_work.STORED:
            engine = apb.Engine.from_model(model, strategy="full")
            engine.read(tokens=families.PROMPT.document, prefix=families.PROMPT.prefix).save(
                folder / f"{family} of one"
            )
            engine.close()
    launch(tensor_work.everything, 4, str(folder))
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(4)]


@pytest.mark.parametrize("reading", tensor_work.READINGS)
@pytest.mark.parametrize("family", tensor_work.SHAPES)
def test_a_mesh_of_two_by_two(results: list[dict[Any, Any]], family: str, reading: str) -> None:
    """Every process has one process's logits, through decode; the first one gathers the keys of all heads."""
    model = families.make(*tensor_work.SHAPES[family])
    engine = apb.Engine.from_model(model, **families.READINGS[reading])
    keys, _ = engine.prefill(families.PROMPT).gather_kv(1)
    engine.close()
    expected = families.read(model, reading)
    for rank, result in enumerate(results):
        logits, gathered = result[family, reading]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert (gathered is None) == (rank > 0)
    torch.testing.assert_close(results[0][family, reading][1], keys, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tensor_work.SHAPES)
def test_what_a_process_holds(results: list[dict[Any, Any]], family: str) -> None:
    """Less than the whole, but for the cache on the first; drawn tokens are the same everywhere without a seed; models
    in memory are shared too."""
    model = families.make(*tensor_work.SHAPES[family])
    whole = sum(weight.numel() for weight in model.parameters())
    assert all(result[family, "held"] < whole for result in results)
    assert [result[family, "whole cache"] for result in results] == [True, False, False, False]
    assert len({tuple(result[family, "drawn"]) for result in results}) == 1
    with torch.no_grad():
        expected = model(torch.tensor([families.PROMPT.token_ids])).logits[0, -1]
    for result in results:
        assert result[family, "kept alive"] == 0
        torch.testing.assert_close(result[family, "in memory"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tensor_work.SHAPES)
def test_propagation(results: list[dict[Any, Any]], family: str) -> None:
    """The heads of all processes choose the rows that go on: those that one process chooses."""
    engine = apb.Engine.from_model(families.make(*tensor_work.SHAPES[family]), **tensor_work.PROPAGATED)
    session = engine.prefill(families.PROMPT)
    positions, logits = session.positions(2), session.extend([1])
    for result in results:
        found, others = result[family, "propagated"]
        assert found == positions
        torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tensor_work.STORED)
def test_documents_on_disk(results: list[dict[Any, Any]], folder: Path, family: str) -> None:
    """Written by processes that share weights and read by one that does not, and the other way round."""
    engine = apb.Engine.from_model(families.make(*tensor_work.SHAPES[family]), strategy="full")
    expected = engine.prefill(families.PROMPT).logits
    found = [engine.load(folder / f"{family} of four").prefill(families.PROMPT.query).logits]
    for logits in (*found, *(each for result in results for each in result[family, "stored"])):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.triton
@pytest.mark.parametrize("processes", [2, 4])
def test_steps(tmp_path: Path, processes: int) -> None:
    """Single tokens, in passes and in steps with and without graphs, by collectives and by kernels: one process's
    logits, the same everywhere; one capture for sessions of both lengths, but for stretches between the messages of
    ranks that have no kernels; two sums a layer, added to the row by their messages."""
    model = tensor_work.stepping_model()
    engine = apb.Engine.from_model(model, blocks=5, backend="torch")
    expected = tensor_work.read_steps(engine)
    engine.close()
    launch(tensor_work.steps, processes, str(tmp_path), 2)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    layers, read = model.config.num_hidden_layers, len(tensor_work.LENGTHS) * len(tensor_work.STEPS)
    for result, kernels in itertools.product(results, (False, True)):
        for way in (("passes", kernels), ("steps", kernels, False), ("steps", kernels, True)):
            torch.testing.assert_close(result[way], expected, rtol=1e-4, atol=1e-4)
            assert torch.equal(result[way], results[0][way]), f"{way} differ between processes"
        assert torch.equal(result["steps", kernels, True], result["steps", kernels, False])
        assert result["captures", kernels, False] == 0
        stretches = 1 if kernels or processes == 2 else layers + 1
        assert result["captures", kernels, True] == stretches
        if kernels:
            several, gated, onto = result["ways", True, False].values()
            assert several == layers * read
            assert gated >= layers * read
            # Two sums a layer are part of their messages, but where the code was first seen to add.
            assert 2 * layers * (read - 1) <= onto <= 2 * layers * read
        rows = [count for count in result["sums", kernels, False] if count == model.config.hidden_size]
        assert len(rows) >= 2 * layers * read


def test_what_cannot_be_shared_is_refused() -> None:
    """Heads that do not divide, models without a plan: one sentence each, before any weight is read."""
    llama = families.make(*tensor_work.SHAPES["llama"]).config
    with pytest.raises(apb.InputError, match="2 KV heads do not divide by 4"):
        check_shards(llama, 4)
    gpt2 = families.make("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 1, "n_head": 4}).config
    with pytest.raises(apb.InputError, match="'gpt2' models have no plan"):
        check_shards(gpt2, 2)
    with pytest.raises(apb.InputError, match=r"1 processes cannot be divided into ranks of 2"):
        Mesh.join(torch.device("cpu"), 2)

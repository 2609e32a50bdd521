"""`predict` against runs that fit here: its counts are those of reports, its bytes those of real steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lowmem_higher as higher
from lowmem_higher import scale
from lowmem_higher.scale import GPT2, LLAMA_7B, Machine, Transformer, gpt2, predict
from lowmem_higher.testing import live_bytes

CONTEXT = 64


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(self.before(x)).split(width, -1)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
        x = x + self.out(attended.reshape(batch, length, width))
        found: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return found


class Decoder(nn.Module):
    def __init__(self, size: Transformer) -> None:
        super().__init__()
        self.tokens, self.places = (nn.Embedding(count, size.width) for count in (size.vocabulary, CONTEXT))
        self.blocks = nn.Sequential(*[Block(size.width, size.heads) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1]))
        return F.linear(self.norm(self.blocks(x)), self.tokens.weight)


def small(layers: int, width: int, vocabulary: int) -> Transformer:
    return gpt2("small", layers=layers, width=width, heads=4, vocabulary=vocabulary, context=CONTEXT)


def test_parameters_are_those_of_the_models() -> None:
    size = small(3, 32, 50)
    assert size.parameters == sum(parameter.numel() for parameter in Decoder(size).parameters())
    assert GPT2.parameters == 124_439_808  # as published
    hidden = 11008
    layer = 4 * LLAMA_7B.width**2 + 3 * LLAMA_7B.width * hidden + 2 * LLAMA_7B.width
    embeddings = (2 * LLAMA_7B.vocabulary + 1) * LLAMA_7B.width
    assert LLAMA_7B.parameters == LLAMA_7B.layers * layer + embeddings


@pytest.mark.parametrize(("steps", "checkpoints"), [(30, 3), (50, 10), (12, 12)])
@pytest.mark.parametrize("states", [1, 2])
def test_runs_and_carries_are_those_of_reports(steps: int, checkpoints: int, states: int) -> None:
    net = nn.Linear(20, 3)
    opt = torch.optim.Adam(net.parameters()) if states == 2 else torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    size = Transformer("linear", sum(parameter.numel() for parameter in net.parameters()), 1, 1, 1, 1)
    prediction = predict(size, steps=steps, batch=1, sequence=1, checkpoints=(checkpoints,), states=states)
    x = torch.randn(5, 20)
    settings = {"copy_initial_weights": False, "checkpoints": checkpoints, "steps": steps}
    with live_bytes() as memory, higher.innerloop_ctx(net, opt, **settings) as (fnet, diffopt):
        start = memory.current
        for _ in range(steps):
            diffopt.step(fnet(x).square().mean())
        fnet(x).sum().backward()
    setting, report = prediction.settings[0], diffopt.report
    assert report.first_order_runs == setting.first_order_runs
    assert report.second_order_runs == setting.second_order_runs
    assert report.carry_bytes == prediction.carry_bytes
    assert report.carries_peak_bytes <= setting.device_bytes - prediction.graph_bytes
    assert report.carries_peak_bytes > 0.5 * (setting.device_bytes - prediction.graph_bytes)
    assert start < memory.peak


@pytest.mark.parametrize(
    ("layers", "width", "vocabulary", "batch", "length"),
    [(4, 64, 256, 4, 64), (2, 128, 512, 4, 64), (1, 192, 100, 1, 32)],
)
@pytest.mark.parametrize("states", [1, 2])
def test_graph_of_a_step(layers: int, width: int, vocabulary: int, batch: int, length: int, states: int) -> None:
    size = small(layers, width, vocabulary)
    net, ids = Decoder(size), torch.randint(vocabulary, (batch, length))
    opt = torch.optim.Adam(net.parameters()) if states == 2 else torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    with higher.innerloop_ctx(net, opt, copy_initial_weights=False, checkpoint_every=1) as (fnet, diffopt):
        for _ in range(3):
            diffopt.step(F.cross_entropy(fnet(ids).flatten(0, 1), ids.flatten()))
        outer = fnet.norm.weight.sum()
        with live_bytes() as memory:
            outer.backward()
    predicted = scale.step_graph_bytes(size, batch, length, states=states)
    assert memory.peak / 1.25 < predicted < memory.peak * 1.25


def test_laws() -> None:
    machine = Machine(flops=1e12, efficiency=0.5, link=1e9, disk=1e8, memory=2**34)
    arguments = {"steps": 1000, "batch": 8, "sequence": 256, "machine": machine, "checkpoints": (10,)}
    alone, copies, shards = (
        predict(GPT2, **arguments, **more) for more in ({}, {"world": 4}, {"world": 4, "sharded": True})
    )
    assert shards.carry_bytes * 4 == copies.carry_bytes == alone.carry_bytes == 3 * 4 * GPT2.parameters
    assert shards.graph_bytes < copies.graph_bytes < alone.graph_bytes
    assert alone.settings[0].compute_seconds == pytest.approx(4 * copies.settings[0].compute_seconds)
    assert alone.settings[0].link_seconds == 0
    assert copies.settings[0].link_seconds == pytest.approx(2 * 0.75 * 4 * GPT2.parameters * (3637 + 2000) / 1e9)
    forward = scale.forward_operations(GPT2, 8, 256)
    assert alone.settings[0].compute_seconds == pytest.approx(forward * (3 * 3637 + 9 * 1000) / 0.5e12)
    assert alone.settings[1].store_seconds == pytest.approx(2 * 715 * alone.carry_bytes / 1e8)
    assert alone.settings[1].stored_bytes == 11 * alone.carry_bytes
    assert alone.settings[0].seconds < alone.settings[1].seconds
    assert "nothing fits" in repr(predict(LLAMA_7B, **arguments))
    assert shards.best is shards.settings[0]
    assert repr(shards).splitlines()[2].startswith("> checkpoints=10")
    assert shards.as_dict()["settings"][0]["first_order_runs"] == 3637
    measured = predict(GPT2, **arguments, graph_bytes=12345)
    assert measured.settings[0].device_bytes == 13 * measured.carry_bytes + 12345


def test_the_largest_runs_are_counted_in_seconds() -> None:
    prediction = predict(LLAMA_7B, steps=100_000, batch=64, sequence=2048, world=64, sharded=True, checkpoints=(30,))
    assert prediction.settings[0].first_order_runs == 447_641


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="batch=12"):
        predict(GPT2, steps=10, batch=10, sequence=8, world=4)
    with pytest.raises(ValueError, match="steps=0"):
        predict(GPT2, steps=0, batch=1, sequence=8)

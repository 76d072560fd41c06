"""L2W-DEN in a pack: each member as alone and as written down slowly; who is allotted to which exit."""

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dynexit.data import epoch_batches
from dynexit.models.multi_exit import MultiExit
from dynexit.study.methods import WeightedSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.weighted import WeightedTask, allotment
from tests.reference.deep_supervision_training import build_heads, cosine, state_of
from tests.train.tiny import check_resume, largest_difference, run, seed_members, tiny_model, tiny_pack, tiny_split

TRAIN = TrainSettings(num_epochs=4, global_batch_size=17, precision="float64", keep="last", learning_rate=0.05)
# the network learns fast, so that it matters what it learns
METHOD = WeightedSettings(meta_interval=3, strength=0.6, hidden_width=9, learning_rate=0.05)
SEEDS = (3, 0)


def make(
    seeds: tuple[int, ...] = SEEDS, method: WeightedSettings = METHOD, train: TrainSettings = TRAIN
) -> WeightedTask:
    return WeightedTask(tiny_pack(seed_members(seeds), train), method)


def taken_by(confidences: list[list[float]], ratio: float) -> list[list[int]]:
    """The samples each exit takes, one after another."""
    powers = [ratio**k for k in range(1, len(confidences) + 2)]
    left, taken = list(range(len(confidences[0]))), []
    for k, values in enumerate(confidences):
        count = math.floor(len(values) * powers[k] / sum(powers))
        chosen = sorted(left, key=lambda i, values=values: -values[i])[:count]
        taken.append(chosen)
        left = [i for i in left if i not in chosen]
    return taken


def expected_state(model: MultiExit, fresh: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One point, slowly: a pseudo step by hand, gradients of the network through it."""
    heads = build_heads(model, ["linear"], fresh)
    prefix = "weighting.0.mlp2x9."
    network = [fresh[f"{prefix}{i}.{part}"].clone().requires_grad_() for i in (0, 1) for part in ("weight", "bias")]
    sgd = torch.optim.SGD(heads.parameters(), lr=1, momentum=TRAIN.momentum, weight_decay=TRAIN.weight_decay)
    adam = torch.optim.Adam(network, lr=METHOD.learning_rate, weight_decay=METHOD.weight_decay)
    split, num_steps = tiny_split(), 4 * 6

    def weighted_loss(ce: list[torch.Tensor]) -> torch.Tensor:
        first, first_bias, second, second_bias = network
        inputs = torch.stack(ce, -1).detach()
        output = torch.tanh(torch.relu(inputs @ first.T + first_bias) @ second.T + second_bias)
        weights = 1 + METHOD.strength * (output - output.mean())
        return sum((weights[:, k] * ce[k]).mean() for k in range(len(ce)))

    def losses(parameters: list[torch.Tensor], images: list[int]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        features, _ = model.features(split.images[images])
        pairs = zip(parameters[::2], parameters[1::2], strict=True)
        logits = [z.double() @ weight.T + bias for z, (weight, bias) in zip(features, pairs, strict=True)]
        ce = [functional.cross_entropy(a, split.labels[images], reduction="none") for a in logits]
        return ce, [a.softmax(-1).max(-1).values for a in logits]

    def look_ahead(mine: list[int], other: list[int], rate: float) -> None:
        parameters = list(heads.parameters())
        gradients = torch.autograd.grad(weighted_loss(losses(parameters, mine)[0]), parameters, create_graph=True)
        ahead = []
        for p, g in zip(parameters, gradients, strict=True):
            velocity = sgd.state[p].get("momentum_buffer") if p in sgd.state else None
            before = torch.zeros_like(p) if velocity is None else velocity
            ahead.append(p.detach() - rate * (TRAIN.momentum * before + g + TRAIN.weight_decay * p.detach()))
        ce, confidences = losses(ahead, other)
        taken = taken_by([c.tolist() for c in confidences], METHOD.exit_ratio)
        adam.zero_grad()
        sum(ce[k][chosen].mean() for k, chosen in enumerate(taken) if chosen).backward()
        adam.step()

    step = 0
    for epoch in range(4):
        for batch in epoch_batches(len(split), 17, 7, epoch):
            rate = cosine(step, num_steps, TRAIN.learning_rate, TRAIN.min_learning_rate)
            sgd.param_groups[0]["lr"] = rate
            half = len(batch) // 2
            turns = [(batch[:half], batch[half:]), (batch[half:], batch[:half])] if step % 3 == 0 else [(batch, None)]
            for mine, other in turns:
                if other is not None:
                    look_ahead(mine, other, rate)
                sgd.zero_grad()
                weighted_loss(losses(list(heads.parameters()), mine)[0]).backward()
                sgd.step()
            step += 1
    names = [f"{prefix}{i}.{part}" for i in (0, 1) for part in ("weight", "bias")]
    return state_of(model, ["linear"], heads) | {n: v.detach() for n, v in zip(names, network, strict=True)}


def test_a_member_equals_the_point_alone_and_the_slow_reference(tmp_path: Path) -> None:
    pack = run(make(), tmp_path)
    model, _ = tiny_model()
    for i, seed in enumerate(SEEDS):
        fresh = make((seed,)).member_state(0)
        alone = run(make((seed,)), tmp_path)
        assert largest_difference(pack.member_state(i), alone.member_state(0)) <= 1e-12
        assert largest_difference(pack.member_state(i), expected_state(model, fresh)) <= 1e-9
        learned = {name: value for name, value in pack.member_state(i).items() if name.startswith("weighting")}
        assert largest_difference(learned, {name: fresh[name] for name in learned}) > 0.05


@pytest.mark.parametrize(("num_gates", "size", "ratio"), [(4, 13, 0.75), (3, 29, 1.2), (5, 2, 0.75), (1, 7, 0.5)])
def test_exits_choose_in_order_the_most_confident(num_gates: int, size: int, ratio: float) -> None:
    generator = torch.Generator().manual_seed(num_gates)
    confidence = torch.randint(4, (2, num_gates, size), generator=generator) / 4  # with ties
    found = allotment(confidence, ratio)
    for member in range(2):
        expected = taken_by(confidence[member].tolist(), ratio)
        assert [sorted(chosen) for chosen in expected] == [row.nonzero().flatten().tolist() for row in found[member]]


def test_weights_are_one_on_average_and_within_the_strength() -> None:
    task = make()
    ce = torch.rand(2, 4, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    weights = task._weights(task.optimizers["weighting"].stack, ce)
    assert weights.shape == (2, 4, 11)
    assert torch.allclose(weights.mean((1, 2)), torch.ones(2, dtype=torch.float64), atol=1e-14)
    assert 0 < (weights - 1).abs().max() < 2 * METHOD.strength
    assert weights.std() > 1e-3


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    best = TRAIN.model_copy(update={"keep": "best"})
    check_resume(lambda: make(train=best), tmp_path, (4, 18))


def test_a_batch_of_one_is_not_halved(tmp_path: Path) -> None:
    settings = TRAIN.model_copy(update={"global_batch_size": 89})  # the second batch of 90 samples has one
    task = run(make(method=METHOD.model_copy(update={"meta_interval": 1}), train=settings), tmp_path)
    assert not task.stopped
    assert task.step_number == 8

"""BoostedNet's heads: their logits add up in training, recording and inference alike."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from dynexit.core.tradeoff import Configuration
from dynexit.deploy.engine import Engine
from dynexit.errors import UserError
from dynexit.models.heads import StackedHeads
from dynexit.study.methods import BoostedSettings
from dynexit.study.schema import TrainSettings
from dynexit.train.independent import BoostedTask
from tests.reference.deep_supervision_training import added_up, build_heads, cosine, logits_of, state_of, train_heads
from tests.train.tiny import check_resume, largest_difference, run, seed_members, tiny_model, tiny_pack, tiny_split

TRAIN = TrainSettings(num_epochs=4, global_batch_size=13, precision="float64", keep="last", learning_rate=0.05)
SEEDS = (2, 0, 5)


def make(seeds: tuple[int, ...] = SEEDS, shrinkage: float = 0.4) -> BoostedTask:
    return BoostedTask(tiny_pack(seed_members(seeds), TRAIN), BoostedSettings(shrinkage=shrinkage))


def test_a_member_equals_the_point_alone_and_the_slow_reference(tmp_path: Path) -> None:
    pack = run(make(), tmp_path)
    model, _ = tiny_model()

    def loss_of(logits: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
        return sum(functional.cross_entropy(summed, labels) for summed in added_up(logits, 0.4)[:-1])

    for i, seed in enumerate(SEEDS):
        alone = run(make((seed,)), tmp_path)
        assert largest_difference(pack.member_state(i), alone.member_state(0)) <= 1e-12
        heads = build_heads(model, ["linear"], make((seed,)).member_state(0))
        sgd = torch.optim.SGD(heads.parameters(), lr=1, momentum=TRAIN.momentum, weight_decay=TRAIN.weight_decay)
        train_heads(
            model,
            heads,
            sgd,
            lambda step: cosine(step, 28, TRAIN.learning_rate, TRAIN.min_learning_rate),
            loss_of,
            tiny_split(),
            num_epochs=4,
            batch_size=13,
            seed=7,
        )
        assert largest_difference(pack.member_state(i), state_of(model, ["linear"], heads)) <= 1e-10
    other = run(make((SEEDS[0],), shrinkage=0.6), tmp_path)
    assert largest_difference(pack.member_state(0), other.member_state(0)) > 1e-3


def test_a_killed_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    check_resume(make, tmp_path, (5, 19))


def trained_engine(tmp_path: Path) -> tuple[Engine, StackedHeads, list[torch.Tensor]]:
    """An engine, its heads (one member), and the summed logits of the tiny split's exits, made slowly."""
    task = run(make(), tmp_path)
    state = task.member_state(1)
    model, costs = tiny_model()
    heads = StackedHeads(model.feature_dims, model.positions, ["linear"], 5, [0], shrinkage=0.4).double()
    heads.load_member(0, state)
    with torch.no_grad():
        summed = added_up(logits_of(model, build_heads(model, ["linear"], state), tiny_split().images), 0.4)
        features, _ = model.features(tiny_split().images)
        at_once = heads([feature.double() for feature in features])[0]
    for p, expected in enumerate(summed[:-1]):
        assert (at_once[p] - expected).abs().max() < 1e-12
    return Engine(model, costs.head_types, heads), heads, summed


def middle(logits: torch.Tensor) -> float:
    """A threshold between the two middle confidences of the samples."""
    return logits.softmax(-1).amax(-1).float().sort().values[44:46].mean().item()


def test_inference_leaves_by_the_summed_logits(tmp_path: Path) -> None:
    engine, _, summed = trained_engine(tmp_path)
    thresholds = (middle(summed[0]), 1.0, middle(summed[2]), middle(summed[3]))
    answers = engine.router(Configuration(tuple((0, t) for t in thresholds))).classify(tiny_split().images)
    taken = []
    for sample in range(len(tiny_split())):
        confidences = [logits[sample].float().softmax(-1).max().item() for logits in summed]
        exit_ = next((p for p, t in enumerate(thresholds) if confidences[p] > t), 4)
        taken.append(exit_)
        assert answers.exit_index_B[sample] == exit_
        assert answers.prediction_B[sample] == summed[exit_][sample].argmax()
    assert set(taken) == {0, 2, 3, 4}


def test_a_gap_before_an_exit_is_refused_and_one_after_is_not(tmp_path: Path) -> None:
    engine, _, summed = trained_engine(tmp_path)
    with pytest.raises(UserError, match="additive heads need every exit before one that is used"):
        engine.router(Configuration(((0, 0.5), (-1, 1.0), (0, 0.5), (-1, 1.0))))
    router = engine.router(Configuration(((0, middle(summed[0])), (0, 1.0), (-1, 1.0), (-1, 1.0))))
    assert set(router.classify(tiny_split().images).exit_index_B) == {0, 4}
    with pytest.raises(UserError, match="the model has no gates"):
        engine.router(None)

"""JEI-DNN's losses against plain loops and autograd; members must not see each other."""

import pytest
import torch
from torch.nn import functional

from dynexit.core import losses
from dynexit.core.confidence import gate_features, gate_features_and_softmax
from dynexit.core.exit_policy import exit_index_from_gates, exit_probabilities
from tests.reference import jei_dnn_loops as loops

M, L, B, K = 3, 5, 7, 4
G = L - 1


def example(
    dtype: torch.dtype = torch.float64, members: tuple[int, ...] = (M,), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and gate outputs."""
    source = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*members, L, B, K, dtype=torch.float64, generator=source)
    gates = torch.rand(*members, G, B, dtype=torch.float64, generator=source) * 0.6
    return logits.to(dtype).requires_grad_(), torch.randint(K, (B,), generator=source), gates.to(dtype)


def grad(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), of, retain_graph=True)[0]


def test_cross_entropies_equal_loops_and_torch() -> None:
    logits, labels, _ = example()
    ours = losses.cross_entropies(logits, labels)
    expected = [
        [[loops.cross_entropy(row, y) for row, y in zip(rows, labels.tolist(), strict=True)] for rows in member]
        for member in logits.tolist()
    ]
    torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64))
    torch_loss = functional.cross_entropy(logits.reshape(-1, K), labels.repeat(M * L), reduction="none")
    torch.testing.assert_close(ours.flatten(), torch_loss, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(grad(ours**2, logits), grad(torch_loss**2, logits), rtol=1e-12, atol=1e-14)


def test_a_known_softmax_changes_no_bit_of_a_loss() -> None:
    logits, labels, gates = example()
    inner = logits[:, :-1].detach().requires_grad_()
    features, softmax = gate_features_and_softmax(inner)
    assert torch.equal(features, gate_features(inner))
    plain, known = (losses.head_loss(inner, labels, gates, "paper", one) for one in (None, softmax))
    assert torch.equal(plain, known)
    assert torch.equal(grad(plain, inner), grad(known, inner))


def test_cross_entropy_of_huge_logits_is_finite() -> None:
    logits = torch.tensor([[[1e30, 0.0], [0.0, 1e30]]])
    assert losses.cross_entropies(logits, torch.tensor([0, 0])).tolist() == [[0.0, pytest.approx(1e30)]]


def test_warm_up_loss_weighs_early_exits_most() -> None:
    logits, labels, _ = example()
    ce = losses.cross_entropies(logits, labels).detach()
    loss = losses.warm_up_loss(logits, labels)
    expected = [sum((L - exit_) * ce[m, exit_].mean().item() for exit_ in range(L)) for m in range(M)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-13)


def test_reference_head_loss_is_uniform_cross_entropy_in_value_and_gradient() -> None:
    logits, labels, gates = example()
    loss = losses.head_loss(logits, labels, gates, "reference")
    uniform = functional.cross_entropy(logits[:, :-1].reshape(-1, K), labels.repeat(M * G), reduction="none")
    uniform = uniform.reshape(M, -1).mean(1)
    torch.testing.assert_close(loss, uniform, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad(loss, logits), grad(uniform, logits), rtol=1e-12, atol=1e-15)
    # as published: P and its rescaling, not held constant
    ce = losses.cross_entropies(logits[:, :-1], labels)
    p = exit_probabilities(gates)
    published = (p * ce * (ce.sum(1) / (p * ce).sum(1))[:, None]).mean((1, 2))
    torch.testing.assert_close(loss, published, rtol=1e-13, atol=0)
    torch.testing.assert_close(grad(loss, logits), grad(published, logits), rtol=1e-10, atol=1e-13)


def test_paper_head_loss_has_the_reference_value_and_its_own_gradient() -> None:
    logits, labels, gates = example()
    loss = losses.head_loss(logits, labels, gates, "paper")
    torch.testing.assert_close(loss, losses.head_loss(logits, labels, gates, "reference"), rtol=1e-13, atol=0)
    ce = losses.cross_entropies(logits[:, :-1], labels).detach()
    p = exit_probabilities(gates)
    rho = ce.sum(1) / (p * ce).sum(1)
    to_ce = p * rho[:, None] / (B * G)
    to_logits = torch.softmax(logits.detach(), -1) - functional.one_hot(labels, K)
    expected = to_logits[:, :-1] * to_ce[..., None]
    torch.testing.assert_close(grad(loss, logits)[:, :-1], expected, rtol=1e-12, atol=1e-15)
    assert grad(loss, logits)[:, -1].abs().max() == 0


@pytest.mark.parametrize("kind", losses.HEAD_LOSSES)
@pytest.mark.parametrize("gate", [0.0, 1e-45, 1e-30])
def test_head_losses_stay_finite_when_no_gate_opens(kind: str, gate: float) -> None:
    logits, labels, gates = example(torch.float32)
    loss = losses.head_loss(logits, labels, torch.full_like(gates, gate), kind)
    assert loss.isfinite().all()
    assert grad(loss, logits).isfinite().all()
    if kind == "paper":  # equal gates weigh alike, down to none at all
        uniform = losses.head_loss(logits, labels, gates, "reference")
        torch.testing.assert_close(grad(loss, logits), grad(uniform, logits))


def test_paper_loss_does_not_change_with_the_scale_of_the_gates() -> None:
    logits, labels, gates = example(torch.float32)
    small = losses.head_loss(logits, labels, gates * 1e-3, "paper")
    tiny = losses.head_loss(logits, labels, gates * 1e-38, "paper")
    torch.testing.assert_close(grad(tiny, logits), grad(small, logits), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("others", [0.0, 1e-40])
def test_paper_loss_is_finite_where_the_only_open_exit_is_certain(others: float) -> None:
    logits, labels, gates = example(torch.float32)
    with torch.no_grad():
        logits[:, 0] = 1e3 * functional.one_hot(labels, K)
    gates = torch.full_like(gates, others)
    gates[:, 0] = 0.5
    loss = losses.head_loss(logits, labels, gates, "paper")
    torch.testing.assert_close(loss, losses.head_loss(logits, labels, gates, "reference"))
    assert grad(loss, logits).isfinite().all()


def test_single_head_loss_is_cross_entropy_of_the_exit_taken() -> None:
    logits, labels, gates = example()
    loss = losses.head_loss(logits, labels, gates, "single")
    taken = exit_index_from_gates(gates)
    assert len(taken.unique()) > 2
    for m in range(M):
        rows = [logits[m, taken[m, n], n].tolist() for n in range(B)]
        ce = [loops.cross_entropy(row, y) for row, y in zip(rows, labels.tolist(), strict=True)]
        assert loss[m].item() == pytest.approx(sum(ce) / B, rel=1e-13)
    moved = grad(loss, logits).abs().sum(-1) > 0
    assert torch.equal(moved, taken[:, None] == torch.arange(L)[:, None])


@pytest.mark.parametrize("objective", losses.OBJECTIVES)
def test_prediction_errors_and_targets_equal_loops(objective: str) -> None:
    logits, labels, _ = example()
    errors = losses.prediction_errors(logits, labels, objective)
    assert not errors.requires_grad
    cost = torch.linspace(0.2, 1, L, dtype=torch.float64)
    tradeoff = torch.tensor([0.0, 0.4, 3.0], dtype=torch.float64)
    targets = losses.gate_targets(errors, cost, tradeoff)
    assert targets.shape == (M, B)
    for m in range(M):
        for n in range(B):
            rows = logits[m, :, n].tolist()
            expected = [loops.prediction_error(row, int(labels[n]), objective) for row in rows]
            assert errors[m, :, n].tolist() == pytest.approx(expected, rel=1e-12)
            assert targets[m, n] == loops.gate_target(expected, cost.tolist(), tradeoff[m].item())


def test_gate_target_ties_go_to_the_lowest_exit() -> None:
    errors = torch.tensor([[[2.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    assert losses.gate_targets(errors, torch.tensor([0.5, 0.5, 1.0]), torch.tensor([0.0])).tolist() == [[1, 0]]
    many = torch.randint(3, (M, L, 100), generator=torch.Generator().manual_seed(3)).float()
    many[:, 2:, :20] = torch.nan  # counts as the least
    targets = losses.gate_targets(many, torch.zeros(L), torch.zeros(M))
    assert torch.equal(targets, torch.from_numpy(many.numpy().argmin(1)))


def test_gate_loss_equals_loops() -> None:
    source = torch.Generator().manual_seed(1)
    gate_logits = torch.randn(M, G, B, dtype=torch.float64, generator=source)
    targets = torch.randint(L, (M, B), generator=source)
    weights = torch.rand(M, G, dtype=torch.float64, generator=source) * 5
    loss = losses.gate_loss(gate_logits, targets, weights)
    expected = [
        loops.gate_loss(*arguments)
        for arguments in zip(gate_logits.tolist(), targets.tolist(), weights.tolist(), strict=True)
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)


def test_gate_loss_of_saturated_gates_is_finite() -> None:
    gate_logits = torch.tensor([[[300.0, -300.0], [-300.0, 300.0]]], requires_grad=True)
    loss = losses.gate_loss(gate_logits, torch.tensor([[0, 2]]), torch.tensor([[1.0, 2.0]]))
    assert loss.tolist() == [(0 + 0 + 600 + 300) / 4]
    assert grad(loss, gate_logits).tolist() == [[[0, 0], [-0.5, 0.25]]]


def test_positive_weights() -> None:
    counts = torch.tensor([[10, 0, 30, 60], [4, 4, 4, 4]])
    reference = losses.positive_weights(counts, "reference")
    torch.testing.assert_close(reference, torch.tensor([[5, 5, 70 / 30], [3, 3, 3]], dtype=torch.float64))
    cumulative = losses.positive_weights(counts, "cumulative")
    expected = torch.tensor([[5, 5, 60 / 40], [3, 1, 4 / 12]], dtype=torch.float64)
    torch.testing.assert_close(cumulative, expected)
    assert losses.positive_weights(torch.tensor([0, 1]), "reference").tolist() == [5]  # no positives count as 0.1
    assert losses.positive_weights(counts, "none").tolist() == [[1, 1, 1], [1, 1, 1]]


def test_cumulative_weights_balance_every_gate() -> None:
    targets = torch.tensor([[0] * 30 + [1] * 10 + [2] * 20 + [3] * 40])
    weights = losses.positive_weights(torch.bincount(targets[0], minlength=4)[None], "cumulative")
    positive = losses.gate_labels(targets, 3)
    torch.testing.assert_close(weights * positive.sum(-1), (~positive).sum(-1).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("members", [(), (2, 3)])
def test_any_leading_axes_and_members_do_not_see_each_other(members: tuple[int, ...], dtype: torch.dtype) -> None:
    logits, labels, gates = example(dtype, members)
    cost, tradeoff = torch.linspace(0.2, 1, L), torch.rand(members)
    weights = torch.rand(*members, G, dtype=torch.float64)

    def all_losses(*which: int) -> list[torch.Tensor]:
        errors = losses.prediction_errors(logits[which], labels, "ce")
        targets = losses.gate_targets(errors, cost, tradeoff[which])
        heads = [losses.head_loss(logits[which], labels, gates[which], kind) for kind in losses.HEAD_LOSSES]
        gate = losses.gate_loss(gates[which], targets, weights[which])
        return [losses.warm_up_loss(logits[which], labels), *heads, gate]

    together = all_losses()
    for loss in together:
        assert loss.shape == members
        assert loss.dtype == dtype
    if members:
        for whole, alone in zip(together, all_losses(1, 2), strict=True):
            torch.testing.assert_close(whole[1, 2], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, y, g: losses.head_loss(x, y, g, "papre"),
            "head loss 'papre' is unknown; it is one of reference, paper, single",
        ),
        (
            lambda x, y, g: losses.prediction_errors(x, y, "zeroOne"),
            "gate objective 'zeroOne' is unknown; it is one of ce, prob, zero_one",
        ),
        (
            lambda x, y, g: losses.positive_weights(g, "exact"),
            "positive weight 'exact' is unknown; it is one of reference, cumulative, none",
        ),
    ],
)
def test_unknown_kinds_are_named(call, message) -> None:
    with pytest.raises(ValueError) as error:
        call(*example())
    assert str(error.value) == message


def test_soft_cross_entropies_equal_torch() -> None:
    logits, labels, _ = example()
    target = torch.rand(B, K, generator=torch.Generator().manual_seed(5), dtype=torch.float64)  # need not sum to 1
    expected = functional.cross_entropy(logits.reshape(-1, K), target.repeat(M * L, 1), reduction="none")
    ours = losses.soft_cross_entropies(logits, target)
    torch.testing.assert_close(ours.flatten(), expected, rtol=1e-12, atol=1e-14)
    hard = losses.soft_cross_entropies(logits, functional.one_hot(labels, K).double())
    torch.testing.assert_close(hard, losses.cross_entropies(logits, labels))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_those_of_every_exit_from_the_teacher(temperature: float) -> None:
    logits, _, _ = example()
    last = logits[0, -1]
    ours = losses.divergences(logits[:, :-1], last, temperature)
    for exit_ in range(G):
        student = (logits[:, exit_] / temperature).log_softmax(-1)
        teacher = (last / temperature).softmax(-1).expand(M, B, K)
        expected = temperature**2 * functional.kl_div(student, teacher, reduction="none").sum(-1)
        torch.testing.assert_close(ours[:, exit_], expected, rtol=1e-12, atol=1e-14)
    assert not grad(ours, logits)[:, -1].any()  # the teacher learns nothing
    assert not losses.divergences(last.expand(M, G, B, K), last).any()


def test_first_exit_weights_are_two_times_its_doubt() -> None:
    logits = torch.randn(M, 3 * 2, B, K, generator=torch.Generator().manual_seed(2)).requires_grad_()
    weights = losses.first_exit_weights(logits, num_head_types=2)
    assert not weights.requires_grad
    for row in range(6):
        confidence = logits[:, row % 2].softmax(-1).amax(-1)
        expected = torch.ones(M, B) if row < 2 else 2 * (1 - confidence)
        torch.testing.assert_close(weights[:, row], expected)

"""Checks dynexit.core against recorded inputs and outputs of the published JEI-DNN code: check_cases.py FILE.npz

Keys are <case>/in/<name> and <case>/out/<name>. Integers must be equal; floats may differ by tol * max|expected| per
array, tol 5e-6 for cases with float32 logits and 1e-12 for float64. Exit status: 0 all agree, 1 something differs or
could not be checked, 2 the file cannot be used.
"""

import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from dynexit.core import calibration, confidence, exit_policy, losses
from dynexit.search.methods import NEVER, fixed_thresholds, geometric_fractions

Arrays = dict[str, np.ndarray]
TOLERANCE = {"float32": 5e-6, "float64": 1e-12}
BAND = 1e-6
"""A calibration sample lies exactly on the border of its conformal set, so sets are counted a little to either side."""


@dataclass
class Between:
    """An output that may lie anywhere from low to high."""

    low: np.ndarray
    high: np.ndarray


@dataclass
class Tally:
    num_cases: int = 0
    num_outputs: int = 0
    differences: list[str] = field(default_factory=list)


def error_of(ours: np.ndarray | Between, expected: np.ndarray, tolerance: float) -> str | None:
    """What is wrong with our output, in words, or None. NaN on either side is wrong."""
    shape = ours.low.shape if isinstance(ours, Between) else ours.shape
    if shape != expected.shape:
        return f"shape {shape}, expected {expected.shape}"
    if not isinstance(ours, Between) and expected.dtype.kind in "biu":
        wrong = int((ours != expected).sum())
        return f"{wrong} of {expected.size} differ" if wrong or ours.dtype.kind not in "biu" else None
    low, high = (ours.low, ours.high) if isinstance(ours, Between) else (ours, ours)
    error = np.maximum(low - expected, expected - high).max(initial=0.0)
    allowed = tolerance * np.abs(expected).max(initial=0.0)
    return None if error <= allowed else f"max error {error:.3g}, allowed {allowed:.3g}"


def gradient(loss: torch.Tensor, *of: torch.Tensor) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss.sum(), of, allow_unused=True, retain_graph=True))


class Case:
    """One case of losses, gates and conformal sets. Members are a leading axis of 1, as in training."""

    def __init__(self, inputs: Arrays) -> None:
        self.logits = torch.from_numpy(inputs["logits"])[None].requires_grad_()
        self.labels = torch.from_numpy(inputs["targets"])
        self.weight = torch.from_numpy(inputs["gate_weight"]).requires_grad_()
        self.bias = torch.from_numpy(inputs["gate_bias"]).requires_grad_()
        self.cost = torch.from_numpy(inputs["cost"])
        self.tradeoff = torch.from_numpy(inputs["lam"]).reshape(1)
        self.positive_weight = torch.from_numpy(inputs["pos_weight"])[None]
        self.features = confidence.gate_features(self.logits[:, :-1])
        self.gate_logits = (self.features * self.weight[:, None]).sum(-1) + self.bias[:, None]
        self.gates = self.gate_logits.sigmoid()

    def outputs(self) -> dict[str, np.ndarray | Between]:
        result: dict[str, np.ndarray | Between] = {
            "gate_features": self.features[0].numpy(),
            "gate_logits": self.gate_logits[0].detach().numpy().T,
            "p_exit": exit_policy.exit_probabilities(self.gates)[0].detach().numpy().T,
        }
        for kind in ("weighted", "single"):
            result |= self.exits(kind) | self.head_loss(kind)
        warm_up = losses.warm_up_loss(self.logits, self.labels)
        result["warmup_loss"] = warm_up[0].detach().numpy()
        result["warmup_grad"] = self.head_gradient(warm_up)
        for objective in losses.OBJECTIVES:
            result |= self.gate_loss(objective)
        return result | self.conformal() | {"ece_quantile15": self.calibration_error()}

    def head_gradient(self, loss: torch.Tensor) -> np.ndarray:
        (grad,) = gradient(loss, self.logits)
        assert grad is not None
        return grad[0, :-1].numpy()

    def exits(self, kind: str) -> dict[str, np.ndarray]:
        level = exit_policy.exit_index_from_gates(self.gates, single=kind == "single")[0]
        taken = self.logits[0, level, torch.arange(len(level))]
        counts = torch.bincount(level, minlength=self.logits.shape[1])
        arrays = {"exit_level": level, "gated_logits": taken.detach(), "num_exits": counts}
        return {f"{kind}_{name}": array.numpy() for name, array in arrays.items()}

    def head_loss(self, kind: str) -> dict[str, np.ndarray]:
        gates = torch.sigmoid(self.gate_logits)
        loss = losses.head_loss(self.logits, self.labels, gates, "single" if kind == "single" else "reference")
        to_gates = gradient(loss, self.weight, self.bias)
        return {
            f"cls_{kind}_loss": loss[0].detach().numpy(),
            f"cls_{kind}_grad": self.head_gradient(loss),
            f"cls_{kind}_gategrad_is_none": np.array(all(grad is None for grad in to_gates)),
        }

    def gate_loss(self, objective: str) -> dict[str, np.ndarray]:
        errors = losses.prediction_errors(self.logits, self.labels, objective)
        target = losses.gate_targets(errors, self.cost, self.tradeoff)
        loss = losses.gate_loss(self.gate_logits, target, self.positive_weight)
        weight_grad, bias_grad, head_grad = gradient(loss, self.weight, self.bias, self.logits)
        assert weight_grad is not None
        assert bias_grad is not None
        num_exits = self.logits.shape[1]
        counts = torch.bincount(target[0], minlength=num_exits)
        right = (self.gates >= 0.5) == losses.gate_labels(target, num_exits - 1)
        arrays = {
            "loss": loss[0].detach().numpy(),
            "wgrad": weight_grad.numpy(),
            "bgrad": bias_grad.numpy(),
            "headgrad_is_none": np.array(head_grad is None),
            "target": target[0].numpy(),
            "exact_counts": counts[:-1].numpy(),
            "correct_count": right.sum().numpy(),
        }
        result = {f"gate_{objective}_{name}": array for name, array in arrays.items()}
        if objective == "ce":
            result["posw_from_counts"] = losses.positive_weights(counts[None], "reference")[0].numpy()
        return result

    def conformal(self) -> dict[str, np.ndarray | Between]:
        probabilities = torch.softmax(self.logits[0].detach(), -1).numpy()
        labels, samples = self.labels.numpy(), np.arange(len(self.labels))
        scores = 1 - probabilities[:, samples, labels]
        level = exit_policy.exit_index_from_gates(self.gates)[0].numpy()
        alphas = calibration.ALPHAS
        thresholds = {
            variant: calibration.conformal_thresholds(scores, level, alphas, variant, "reference")
            for variant in calibration.CONFORMAL_VARIANTS
        }
        result: dict[str, np.ndarray | Between] = {
            "scores": scores,
            "alphas": np.array(alphas),
            "qhat_general": thresholds["general"][:, 0],
            "qhats": thresholds["gated"],
            "qhats_all": thresholds["gated_all"],
            "qhats_per_gate": thresholds["gated_strict"],
        }
        taken = probabilities[level, samples]
        for variant, threshold_AL in thresholds.items():
            sizes, misses = [], []
            for slack in (-BAND, BAND):
                sets = [calibration.conformal_sets(taken, level, threshold_L + slack) for threshold_L in threshold_AL]
                sizes.append(np.array([s.sum(1).mean() for s in sets]))
                misses.append(np.array([1 - s[samples, labels].mean() for s in sets]))
            # the published means of sizes are float32 even where the logits are float64
            result[f"sets_{variant}_size"] = Between(sizes[0] * (1 - BAND), sizes[1] * (1 + BAND))
            result[f"sets_{variant}_miscover"] = Between(misses[1], misses[0])
        return result

    def calibration_error(self) -> Between:
        logits = self.logits[0].detach()
        sure = confidence.max_probability(logits).numpy()
        correct = (logits.argmax(-1) == self.labels).numpy()
        ours = np.array([calibration.ece(c, ok) for c, ok in zip(sure, correct, strict=True)])
        # a sample may lie on the edge of a bin
        return Between(ours - 2 / len(self.labels), ours + 2 / len(self.labels))

    def not_finite(self) -> Iterator[str]:
        """Head losses whose value or gradient is not finite, for inputs on which the published loss is NaN."""
        for kind in losses.HEAD_LOSSES:
            loss = losses.head_loss(self.logits, self.labels, self.gates, kind)
            if not (loss.isfinite().all() and np.isfinite(self.head_gradient(loss)).all()):
                yield f"cls_weighted_loss or _grad: head loss {kind!r} is not finite"


def threshold_outputs(inputs: Arrays) -> dict[str, np.ndarray | Between]:
    """Outputs of a case of MSDNet's fixed thresholds."""
    probs, targets = inputs["probs"], inputs["targets"]
    sure = probs.max(-1)
    thresholds = fixed_thresholds(sure, inputs["exit_probs"])
    level = (sure >= thresholds[:, None]).argmax(0)
    samples = np.arange(len(targets))
    accuracy = 100 * (probs.argmax(-1)[level, samples] == targets).mean()
    cost = inputs["cost"][level].mean()
    return {
        "T": thresholds,
        "acc": np.array(accuracy),
        "cost": np.array(cost),
        "eval_cost": np.array(cost),
        # the published evaluation scales its accuracy by 100 / N a second time
        "eval_acc_returned_by_reference": np.array(accuracy * 100 / len(targets)),
    }


def check_thresholds(name: str, inputs: Arrays, expected: Arrays, tally: Tally) -> None:
    ours = threshold_outputs(inputs)
    tolerance = TOLERANCE["float32"]  # thresholds and fractions are float32 whatever the probabilities are
    fractions = geometric_fractions(int(inputs["p_index"]), len(inputs["probs"]))
    if error_of(fractions, inputs["exit_probs"], tolerance):
        tally.differences.append(f"{name}/in/exit_probs: not the fractions of step {inputs['p_index']}")
    compare(name, ours, expected, tolerance, tally)
    # the sentinels are so large that a tolerance relative to them would let everything else pass
    if "T" in expected and expected["T"].shape == ours["T"].shape:
        real = np.abs(expected["T"]) < NEVER
        error = error_of(np.where(real, ours["T"], 0), np.where(real, expected["T"], 0), tolerance)
        if error or not np.array_equal(ours["T"][~real], expected["T"][~real]):
            tally.differences.append(f"{name}/out/T: {error or 'exits that take nobody or everybody differ'}")


def compare(name: str, ours: dict[str, np.ndarray | Between], expected: Arrays, tolerance: float, tally: Tally) -> None:
    for key, value in expected.items():
        if key not in ours:
            tally.differences.append(f"{name}/out/{key}: unknown output, not checked")
            continue
        tally.num_outputs += 1
        error = error_of(ours[key], value, tolerance)
        if error:
            tally.differences.append(f"{name}/out/{key}: {error}")


def check_case(name: str, inputs: Arrays, expected: Arrays, tally: Tally) -> None:
    tally.num_cases += 1
    if not expected:
        tally.differences.append(f"{name}: no outputs to check")
    elif "probs" in inputs:
        check_thresholds(name, inputs, expected, tally)
    elif np.isnan(expected.get("cls_weighted_loss", 0)):
        tally.num_outputs += 2
        tally.differences += [f"{name}/out/{text}" for text in Case(inputs).not_finite()]
    else:
        compare(name, Case(inputs).outputs(), expected, TOLERANCE[str(inputs["logits"].dtype)], tally)


def read_cases(path: str) -> dict[str, dict[str, Arrays]]:
    """{case: {"in": arrays, "out": arrays}}. Raises ValueError on a key of another form."""
    cases: dict[str, dict[str, Arrays]] = {}
    with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
        for key in file.files:
            parts = key.split("/")
            if len(parts) != 3 or parts[1] not in ("in", "out"):
                raise ValueError(f"key {key!r} is not <case>/in/<name> or <case>/out/<name>")
            cases.setdefault(parts[0], {"in": {}, "out": {}})[parts[1]][parts[2]] = file[key]
    return cases


def check_file(path: str, say: Callable[[str], None] = print) -> int:
    """The exit status for the cases in a file; says what was checked and what differs."""
    try:
        cases = read_cases(path)
    except (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        say(f"{path} cannot be read as a file of cases: {error}")
        return 2
    tally = Tally()
    for name, arrays in sorted(cases.items()):
        try:
            check_case(name, arrays["in"], arrays["out"], tally)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            tally.differences.append(f"{name}: cannot be computed: {type(error).__name__}: {error}")
    if tally.num_outputs == 0:
        tally.differences.append("nothing was checked")
    say(f"{tally.num_cases} cases, {tally.num_outputs} outputs checked, {len(tally.differences)} differ")
    for difference in tally.differences:
        say(f"  {difference}")
    return 1 if tally.differences else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print("usage: python tests/reference/check_cases.py FILE.npz")
        sys.exit(2)
    sys.exit(check_file(sys.argv[1]))

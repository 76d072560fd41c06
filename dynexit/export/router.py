"""Runs a model that `dynexit export` wrote. Needs numpy and onnxruntime alone (torch for `--to torch`).

    model = ExportedModel("FOLDER")                # model.points has the operating points by name
    answer = model(images, "macs-0.293")           # float32 (B, C, H, W), normalised as router.json says
    answer = model(images, model.within(0.3))      # the most accurate point within 0.3 of the backbone's MACs

Options, as providers=["CUDAExecutionProvider"], go to onnxruntime. Several threads may share a model.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Answer(NamedTuple):
    """Of B images class, exit, MACs, whether a confidence was near a threshold; logits and probabilities (B, K)."""

    prediction: np.ndarray
    exit_index: np.ndarray
    macs: np.ndarray
    near: np.ndarray
    logits: np.ndarray
    probabilities: np.ndarray


def _program(path: Path, options: dict[str, Any]) -> Any:
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, **{"providers": ["CPUExecutionProvider"], **options})
        names = [output.name for output in session.get_outputs()]
        return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))
    import torch

    module = torch.export.load(path).module()
    return lambda feeds: {k: v.numpy() for k, v in module(**{k: torch.from_numpy(v) for k, v in feeds.items()}).items()}


class ExportedModel:
    """The programs of a folder, each loaded when it is first needed, and the operating points."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.folder, self.options, self._programs = Path(folder), options, dict[str, Any]()
        self.settings = json.loads((self.folder / "router.json").read_text(encoding="utf-8"))
        self.points = {one["name"]: one for one in self.settings["points"]}

    def within(self, relative_macs: float) -> str:
        """Returns the name of the most accurate point within that share of the backbone's MACs."""
        points = [one for one in self.points.values() if one["relative_macs"] <= relative_macs]
        if not points:
            nearest = min(self.points.values(), key=lambda one: one["relative_macs"])
            raise ValueError(
                f"{relative_macs=} is unattainable; {nearest['name']} takes {nearest['relative_macs']:.4f}"
            )
        return str(max(points, key=lambda one: one["accuracy"])["name"])

    def run(self, step: dict[str, Any], pool: dict[str, np.ndarray]) -> bool:
        """Runs a step's program on values of the pool, which takes its outputs. Returns whether they have logits."""
        name = step["program"]
        if name not in self._programs:
            self._programs[name] = _program(self.folder / name, self.options)
        outputs = self._programs[name]({f"in_{key}": pool[key] for key in step["inputs"]})
        pool.update(outputs)
        return "logits" in outputs

    def __call__(self, images: np.ndarray, point: str = "backbone") -> Answer:
        if point not in self.points:
            raise ValueError(f"no operating point is called {point!r}; there are {list(self.points)}")
        shape, count, way = tuple(self.settings["input_size"]), len(images), self.points[point]
        if images.dtype != np.float32 or images.shape[1:] != shape or not count or not np.isfinite(images).all():
            raise ValueError(f"images are {images.dtype} {images.shape}; give finite float32 (B, {shape}), B above 0")
        taken, near, places = np.empty(count, np.int64), np.zeros(count, bool), np.arange(count)
        logits = np.empty((count, len(self.settings["class_names"])), np.float32)
        pool = {"state": images, "used": np.zeros(count, np.float32)}
        for step in way["steps"]:
            if not self.run(step, pool):
                continue
            leaves = np.ones(len(places), bool)
            if "threshold" in step:
                value, left = pool[way["confidence"]], 1 - pool["used"]
                leaves, gap = value > np.float32(step["threshold"]), value - np.float32(step["threshold"])
                if way["by_gates"]:  # JEI-DNN's rule: the gate's output is at least half of what is left
                    gap, pool["used"] = np.clip(value, 0, left) / left - np.float32(0.5), pool["used"] + value
                    leaves = gap >= 0
                near[places] |= np.abs(gap) <= self.settings["tolerance"]
            taken[places[leaves]], logits[places[leaves]] = step["exit_index"], pool["logits"][leaves]
            if leaves.any():
                places, pool = places[~leaves], {key: values[~leaves] for key, values in pool.items()}
            if not len(places):
                break
        scaled = logits / np.array(way["temperatures"], np.float32)[taken, None]
        odds = np.exp(scaled - scaled.max(1, keepdims=True))
        macs = np.array(way["macs"])[taken]
        return Answer(logits.argmax(1), taken, macs, near, logits, odds / odds.sum(1, keepdims=True))

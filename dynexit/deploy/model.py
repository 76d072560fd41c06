"""A saved model in use: `dynexit.load(folder)`, its operating points, and views that classify.

Shapes: B images, L exits, K classes.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor

from dynexit.arguments import as_path, shown
from dynexit.core.calibration import softmax
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.assembly import attach_exits
from dynexit.deploy.description import Description, SavedPoint, SavedTraining, choose, choose_by_time
from dynexit.deploy.engine import Engine, largest_tile
from dynexit.deploy.model_folder import FILES, Contents, copy_folder, read_folder
from dynexit.deploy.optimize import DIFFERENCES, optimized_backbone, usable_device
from dynexit.deploy.predict import Predictions, check_images, image_transform, predict_files, read_image
from dynexit.deploy.probe import check_probe
from dynexit.deploy.router import NEAR, Answers, Router
from dynexit.deploy.statistics import ExitCounter, ExitCounters, ExitStatistics
from dynexit.deploy.stream import stream
from dynexit.errors import UserError
from dynexit.models.passes import compile_stages, compiling
from dynexit.models.precision import set_precision


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The answers for B images.

    `prediction` (B,) int64 is the class, `probabilities` (B, K) float32 are those of the exit taken (temperature-scaled
    if the folder has temperatures), `exit_index` (B,) int64 counts the model's positions and ends with the backbone's
    own classifier, `macs` (B,) int64 is what each image cost, `near` (B,) bool marks images with a confidence so near
    a threshold that another batch size could decide otherwise.
    """

    prediction: Tensor
    probabilities: Tensor
    exit_index: Tensor
    macs: Tensor
    near: Tensor
    _logits_BK: np.ndarray = dataclasses.field(repr=False)
    _conformal: tuple[tuple[float, float], ...] = dataclasses.field(repr=False)

    def prediction_sets(self, alpha: float = 0.05) -> Tensor:
        """Returns (B, K) bool, the classes in each image's set: sets hold the label of a share 1 - alpha of new images.

        That is the promise of split conformal prediction for images like those of validation, for an operating point
        as it was saved. A set may be empty. Raises UserError for a level that is not stored.
        """
        levels = dict(self._conformal)
        if alpha not in (*levels,):  # which may have no hash
            known = ", ".join(f"{one:g}" for one in levels) or "none (a configuration of your own has no levels)"
            raise UserError(f"alpha is {alpha!r}; the levels stored are {known}")
        return torch.from_numpy(softmax(self._logits_BK) >= np.float32(1 - levels[alpha]))


@dataclasses.dataclass(frozen=True, repr=False)
class View:
    """A model with one way to leave early. Immutable; views of a model share its weights, threads may share a view."""

    name: str
    """That of the operating point, or one made from the configuration: equal ones have the same name."""
    point: SavedPoint | None
    """The operating point; None for a configuration that is none of the folder's."""
    configuration: Configuration | None
    """None if the gates decide."""
    class_names: tuple[str, ...]
    router: Router
    macs_L: np.ndarray
    full_macs: int
    """Those of the bare backbone."""
    input_size: tuple[int, int, int]
    _temperature_L: np.ndarray | None
    _counter: ExitCounter
    _description: Description

    def __repr__(self) -> str:
        share = "" if self.point is None else f", {self.point.relative_macs:.4f} of the MACs"
        return f"<View {self.name}{share}>"

    def __call__(self, images: Tensor) -> Outputs:
        """Classifies images (B, C, H, W), float32 and normalised as `transform` does.

        Raises UserError for another shape or type, an empty batch, and values that are not finite.
        """
        return self._outputs(self.router.classify(self._checked(images)))

    @property
    def transform(self) -> Callable[[Any], Tensor]:
        """From an image of Pillow in RGB to an input (C, H, W): the study's preprocessing of test images."""
        return image_transform(self._description.preprocessing.settings, self.input_size[0])

    def read(self, file: str | Path | BinaryIO) -> Tensor:
        """Returns an image file as an input (C, H, W). Raises UserError, naming the file, if it is no image."""
        return read_image(file, self.transform)

    def predict(self, sources: Iterable[str | Path] | str | Path, batch_size: int = 64) -> Predictions:
        """Classifies image files; of a folder all images below it. Names what it cannot read and does the rest.

        Raises UserError if there is no image at all.
        """
        return predict_files(self, sources, batch_size)

    def stream(
        self, loader: Iterable[Any], max_batch: int = 64, max_delay_ms: float | None = None
    ) -> Iterator[Outputs]:
        """Yields the answers for every batch of `loader`, in order, with the batches of each stage refilled.

        Batches are images, or tuples that begin with images. Up to `max_batch` images run together; answers of a batch
        come when its last image is done, which may be after later batches have entered. A batch that has waited for
        `max_delay_ms` is finished before others enter, also while the loader, then in a thread, is slow; None waits for
        full stages. Raises UserError for a batch that a view does not take, after the answers for those before it.
        """
        found = stream(self.router, loader, max_batch, max_delay_ms, self._images_of)
        return (self._outputs(answers) for answers in found)

    def stats(self) -> ExitStatistics:
        """What this way to leave has seen since the model was loaded, in all threads, against validation."""
        return self._counter.statistics()

    def _images_of(self, batch: Any) -> Tensor:
        return self._checked(batch[0] if isinstance(batch, tuple | list) and batch else batch)

    def _checked(self, images: Tensor) -> Tensor:
        check_images(images, self.input_size)
        return images.to(self.router.device)

    def _outputs(self, answers: Answers) -> Outputs:
        logits_BK = answers.logits_BK
        if self._temperature_L is not None:
            logits_BK = logits_BK / self._temperature_L[answers.exit_index_B, None]
        probabilities_BK = softmax(logits_BK)
        self._counter.add(answers.exit_index_B, probabilities_BK.max(1), answers.near_B)
        return Outputs(
            torch.from_numpy(answers.prediction_B),
            torch.from_numpy(probabilities_BK),
            torch.from_numpy(answers.exit_index_B),
            torch.from_numpy(self.macs_L[answers.exit_index_B]),
            torch.from_numpy(answers.near_B),
            answers.logits_BK,
            () if self.point is None else self.point.conformal,
        )


class EarlyExitModel(ModelHubMixin, library_name="dynexit"):
    """A model folder that was loaded: a backbone, the exits of one or more trainings, and operating points.

    Immutable but for its statistics; `use` gives a view that classifies. `from_pretrained`, `save_pretrained` and
    `push_to_hub` are huggingface_hub's; the first takes the options of `load`.
    """

    def __init__(self, contents: Contents, device: str | torch.device = "cpu") -> None:
        self._contents, self._description = contents, contents.description
        self.points: tuple[SavedPoint, ...] = contents.description.points
        self.class_names, self.probe = contents.description.class_names, contents.probe
        self.backbone = copy.deepcopy(contents.backbone) if self._is_bf16 else contents.backbone
        self.backbone.to(device)
        self.input_size = contents.backbone.input_size
        self.tolerance = contents.description.tolerance
        self.trainings: Mapping[str, SavedTraining] = contents.description.trainings
        tile: int | None = None
        self.engines: dict[str, Engine] = {}
        for identity, training in self.trainings.items():
            model = attach_exits(self.backbone, training.exit_costs.positions, training.exit_settings)
            heads, gates = training.stack.build(model, [0])
            try:
                for module in (heads, gates):
                    if module is not None:
                        module.load_member(0, contents.heads[identity])
            except ValueError as error:
                raise UserError(f"exits.safetensors does not fit exits.json: {error}; copy the folder again") from None
            tile = largest_tile(model) if tile is None else tile
            self.engines[identity] = Engine(model, training.stack.head_types, heads, gates, tile)
        if self._is_bf16:
            set_precision(self.backbone, "bf16")
        self._counters = ExitCounters()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.backbone.parameters()).device

    @property
    def _is_bf16(self) -> bool:
        return self._description.backbone_precision == "bf16"

    def __repr__(self) -> str:
        return f"<EarlyExitModel: {len(self.points)} operating points, {len(self.class_names)} classes; see use()>"

    def use(
        self,
        way: str | SavedPoint | Configuration | None = None,
        *,
        relative_macs: float | None = None,
        max_accuracy_drop: float | None = None,
        risk: float | None = None,
        latency_ms: float | tuple[float, int] | None = None,
        training: str | None = None,
        confidence: str = "max_probability",
    ) -> View:
        """Returns a view that leaves early in one way; takes less than a millisecond. Give exactly one target:

        `way`, an operating point or its name, or a configuration, whose thresholds are on `confidence` of the heads of
        `training` (needed if the folder has several); `relative_macs`, the best validation accuracy within that share
        of the backbone's MACs; `max_accuracy_drop`, the fewest MACs that lose at most this validation accuracy;
        `risk`, the fewest MACs whose risk is certified to be at most this; `latency_ms`, the best validation accuracy
        within that mean time, measured on such a device, of a batch of the smallest size measured, or of B images for
        (milliseconds, B).

        Raises UserError for an unattainable target, naming the nearest, and for a configuration of another model.
        """
        targets = {
            "way": way,
            "relative_macs": relative_macs,
            "max_accuracy_drop": max_accuracy_drop,
            "risk": risk,
            "latency_ms": latency_ms,
        }
        given: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
        if len(given) != 1:
            raise UserError(
                f"use() takes one target and got {len(given)}; give a point, its name or a configuration, or one of "
                "relative_macs, max_accuracy_drop, risk, latency_ms"
            )
        ((name, value),) = given.items()
        if isinstance(value, Configuration):
            return self._view_of(value, training, confidence)
        if training is not None or confidence != "max_probability":
            raise UserError("training and confidence go with a configuration; a point has its own: leave them out")
        if isinstance(value, SavedPoint):
            return self._view(value)
        if name == "latency_ms":
            return self._view(choose_by_time(self.points, value, self.device.type))
        return self._view(self._named(value) if name == "way" else choose(self.points, name, value))

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, verify: bool = True, device: str = "cpu", **hub: Any
    ) -> "EarlyExitModel":
        if not Path(model_id).is_dir():
            model_id = snapshot_download(model_id, allow_patterns=list(FILES), **hub)
        return load(model_id, verify=verify, device=device)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes the folder that this model was loaded from, not what `optimize` made of it; see huggingface_hub.

        Raises UserError if that folder has changed since, and for that folder itself.
        """
        if as_path("save_directory", save_directory).resolve() == self._contents.directory.resolve():
            raise UserError(f"{save_directory} is the folder that the model was loaded from; give another one")
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        copy_folder(self._contents.directory, self._description, save_directory)

    def stats(self) -> tuple[ExitStatistics, ...]:
        """What each way that classified images has seen, against validation: a growing drift calls for a new study."""
        return self._counters.statistics()

    def verify(self) -> float:
        """Runs the probe. Returns the largest difference of a confidence; raises Failure for other answers."""
        return self._check("the model")

    def _check(self, name: str, precision: str = "float32") -> float:
        most = DIFFERENCES["bf16" if self._is_bf16 else precision]
        return check_probe(self.probe, self.engines, self.points, name, most)

    def optimize(self, device: str = "cpu", *, precision: str = "float32", compile: bool = False) -> "EarlyExitModel":
        """Returns a faster model with the same operating points on that device; this one stays as it is.

        Folds batch norms, puts channels last; `precision` bf16 runs the backbone in bfloat16, `compile` its stages by
        torch.compile. The probe must give the saved logits to 1e-3 of the largest (5e-2 in bf16), and the same exits
        but near a threshold. UserError for an unusable precision or device, Failure for other answers or no compiler.
        """
        usable, precision = usable_device(device), "bf16" if self._is_bf16 else precision
        backbone = optimized_backbone(self._contents.backbone, precision, usable)
        faster = EarlyExitModel(dataclasses.replace(self._contents, backbone=backbone), usable)
        if compile:
            compile_stages(faster.backbone)
        with compiling("compile"):
            faster.tolerance = max(faster.tolerance, 4 * faster._check("the model", precision))
        return faster

    def _named(self, name: Any) -> SavedPoint:
        found = next((point for point in self.points if isinstance(name, str) and point.name == name), None)
        if found is None:
            known = ", ".join(point.name for point in self.points)
            raise UserError(f"no operating point is called {shown(name)}; there are {known}")
        return found

    def _view(self, point: SavedPoint) -> View:
        if point not in self.points:
            raise UserError(f"the operating point {point.name} is of another model; give one of this model's `points`")
        return self._make(point.name, point, point.training, point.configuration, point.confidence)

    def _view_of(self, configuration: Configuration, training: str | None, confidence: str) -> View:
        known = ", ".join(f"{identity} ({one.label})" for identity, one in self.trainings.items())
        if training is None and len(self.trainings) > 1:
            raise UserError(f"the folder has the exits of several trainings; give training=, one of {known}")
        training = next(iter(self.trainings)) if training is None else training
        if training not in (*self.trainings,):  # which may have no hash
            raise UserError(f"training is {training!r}; the folder has {known}")
        digest = hashlib.sha256(repr((training, confidence, configuration.exits)).encode()).hexdigest()
        return self._make(f"configuration-{digest[:8]}", None, training, configuration, confidence)

    def _make(
        self, name: str, point: SavedPoint | None, training: str, way: Configuration | None, confidence: str
    ) -> View:
        saved, engine = self.trainings[training], self.engines[training]
        router = engine.router(way, confidence, self.tolerance)
        macs_L = saved.macs_L(way, confidence)
        temperature_L = saved.temperature_L(way)
        return View(
            name,
            point,
            way,
            self.class_names,
            router,
            macs_L,
            saved.exit_costs.full_macs,
            self.input_size,
            None if temperature_L is None else temperature_L.astype(np.float32),
            self._counters.of(name, point, len(macs_L)),
            self._description,
        )


def load(
    directory: str | Path, *, verify: bool = True, device: str | torch.device = "cpu", allow_code: Sequence[str] = ()
) -> EarlyExitModel:
    """Returns the model in a folder of `dynexit save`. Nothing is unpickled; the study and its data are not needed.

    With `verify` the folder's probe must get its saved answers. Raises UserError, naming the file, for a folder that is
    foreign, cut short, altered or of another version, and for an unusable device; Failure for other answers. A folder
    that is not self-contained (its card says so) runs a function of a module that must be in `allow_code`.
    """
    model = EarlyExitModel(read_folder(as_path("directory", directory), allow_code), usable_device(device))
    if verify:
        model.tolerance = max(NEAR, model.tolerance, 4 * model._check(str(directory)))
    return model

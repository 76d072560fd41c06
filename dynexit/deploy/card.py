"""The model card of a model folder: README.md in Hugging Face's form."""

from typing import Literal

from dynexit.deploy.description import SavedPoint

CardKind = Literal["timm", "t2t_vit", "own", "own_code"]
"""Whose the backbone is; `own_code` needs the code of the user's own module, `own` does not."""

_TEXT = """\
---
library_name: dynexit
pipeline_tag: image-classification
tags:
- image-classification
- early-exit
- {library}
---

# {title}

{architecture} with early exits: easy images leave at an exit head inside the network, others go on to its own
classifier. One folder holds {num_points} operating points, from {least:.3f} of the backbone's multiply-accumulates
(MACs) to all of them. {num_classes} classes; images of {size} (channels, height, width).

```python
import dynexit

model = dynexit.load({load})
view = model.use(relative_macs={budget:.2f})
predictions = view.predict(["photo.jpg", "photos/"])
```

Or `dynexit predict . photos/ --relative-macs {budget:.2f} --out predictions.csv`.{alone}

## Accuracy against MACs

Operating points were chosen on the validation split, so its figures are slightly optimistic; those of the test split
are not. Intervals hold 95 %.

| point | relative MACs | validation accuracy | test accuracy | test relative MACs | leave before the end |{ms}
| --- | --- | --- | --- | --- | --- |{lines}
{rows}

MACs count the products of convolutions, linear layers and attention. They are not time: measure that on your machine
with `dynexit bench .`.{machine}

## Files

`config.json` and `model.safetensors` are the backbone{form}, `exits.json` and `exits.safetensors` the exits
and the operating points, `probe.safetensors` inputs with the answers that they must give. Nothing is pickled.{own}
"""

_OWN = """ `stages.json`
has the backbone's stages as operations of torch's own, `stages.safetensors` the constants in them: the code that made
the module is not needed."""
_OWN_CODE = """

**This folder is not self-contained.** Its backbone is made by the function `{architecture}`,
whose code it does not hold and which runs when the folder is loaded."""

_ALONE = """ The backbone alone, without
exits: `timm.create_model("local-dir:.", pretrained=True)`."""


def write_card(
    title: str,
    architecture: str,
    points: tuple[SavedPoint, ...],
    class_names: tuple[str, ...],
    input_size: tuple[int, int, int],
    *,
    kind: CardKind,
) -> str:
    """Returns the text of the card. `points` are by rising relative MACs."""
    middle = points[len(points) // 2]
    times = points[0].latency
    machine = f" Times here are the mean of a batch on {times[0].device_name} ({times[0].device})." if times else ""
    return _TEXT.format(
        title=title,
        library="timm" if kind == "timm" else "pytorch",
        architecture=architecture,
        load='"."' if kind != "own_code" else f'".", allow_code=[{architecture.partition(":")[0]!r}]',
        form="" if kind.startswith("own") else " in timm's form",
        own={"own": _OWN, "own_code": _OWN_CODE.format(architecture=architecture)}.get(kind, ""),
        num_points=len(points),
        least=points[0].relative_macs,
        num_classes=len(class_names),
        size=" x ".join(map(str, input_size)),
        budget=middle.relative_macs + 0.005,
        alone=_ALONE if kind == "timm" else "",
        ms="".join(f" ms at batch {one.batch_size} |" for one in times),
        lines=" --- |" * len(times),
        machine=machine,
        rows="\n".join(_row(point) for point in points),
    )


def _row(point: SavedPoint) -> str:
    validation, test = point.validation, point.test
    cells = [
        point.name,
        f"{validation.relative_macs:.4f}",
        _accuracy(validation.accuracy, validation.accuracy_interval),
        _accuracy(test.accuracy, test.accuracy_interval),
        f"{test.relative_macs:.4f}",
        f"{100 * (1 - test.exit_fractions[-1]):.1f} %",
        *(f"{one.milliseconds:.3g}" for one in point.latency),
    ]
    return f"| {' | '.join(cells)} |"


def _accuracy(accuracy: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * accuracy:.2f} % ({100 * low:.2f} to {100 * high:.2f})"

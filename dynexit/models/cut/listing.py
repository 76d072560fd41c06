"""The places where exits can sit in a module, as a table: `dynexit cut`."""

from collections.abc import Iterator

from torch import Tensor, nn

from dynexit.errors import UserError
from dynexit.models.cut.backbone import OwnBackbone
from dynexit.models.cut.cutting import legal_places
from dynexit.models.cut.own import OwnModule, random_images
from dynexit.models.macs import backbone_macs


def list_places(function: str, input_size: tuple[int, int, int]) -> str:
    """Returns the legal places of the module that a function returns: name, shape, feature width, MACs and their share.

    Raises UserError as `OwnModule.build` does.
    """
    own = OwnModule(function)
    made = own.make()
    if isinstance(made, OwnBackbone):
        raise UserError(f"{function} cuts its module itself, at {', '.join(made.places)}")
    return "\n".join(_lines(function, made, random_images(input_size)))


def _lines(function: str, model: nn.Module, images: Tensor) -> Iterator[str]:
    backbone, places = legal_places(model, images, function)
    macs, full = backbone_macs(backbone)
    size = "x".join(map(str, images.shape[1:]))
    yield f"{function} at {size}, {backbone.num_classes} classes: {full / 1e6:,.1f} M MACs"
    shapes = ["x".join(map(str, place.shape)) for place in places]
    names, widths = max(len(place.name) for place in places), max(map(len, shapes))
    yield f"  {'place':{names}}  {'shape':>{widths}}  features  MACs (M)   share"
    for i, (place, shape) in enumerate(zip(places, shapes, strict=True)):
        mark, features, share = "*" if place.is_auto else " ", backbone.feature_dims[i], macs[i] / full
        yield f"{mark} {place.name:{names}}  {shape:>{widths}}  {features:8d}  {macs[i] / 1e6:8,.2f}  {share:6.3f}"
    yield "* taken by backbone.at: auto, but the last if little comes after it; other names: backbone.at: [NAME, ...]"

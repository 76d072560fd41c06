"""Which keys enter an id."""

from dynexit.study.grid import Point, expand
from dynexit.study.schema import Config, DataSettings


def point(**data: object) -> Point:
    (found,) = expand(Config(data=DataSettings.model_validate(data)), {})
    return found


def test_stratified_splits_have_ids_of_their_own() -> None:
    for name, before in (("digits", "14900848667d"), ("cifar10", "1326429ca858"), ("image_folder", "158a170e820a")):
        assert point(name=name).ids["prepare"] != before


def test_a_class_order_enters_the_id_unless_it_is_the_default() -> None:
    ids = [point(name="image_folder", class_order=order).id for order in (None, "torchvision", "timm", "names.txt")]
    assert len(set(ids)) == 4
    assert ids[0] == point(name="image_folder").id


def test_kept_features_have_ids_of_their_own() -> None:
    def train_id(**train: object) -> str:
        (found,) = expand(Config.model_validate({"train": train}), {})
        return found.id

    assert train_id() == train_id(features="fresh", kept_views=0, kept_precision="float32", max_feature_gb=3.0)
    kept = train_id(features="kept", kept_precision="bf16")
    assert len({train_id(), train_id(features="kept"), train_id(features="kept", kept_views=1), kept}) == 4


def test_ids_change_where_small_images_are_no_longer_cropped() -> None:
    def prepare_id(**data: object) -> str:
        return point(name="image_folder", **data).ids["prepare"]

    before = {
        "1de3cde7d8e9": {"image_size": 65},
        "d106c89036e7": {"test_transform": {"crop_pct": 1.0}, "transform": "none"},
        "6fa77644d7b6": {"labels": "a.csv"},
    }
    assert [prepare_id(**data) for data in before.values()] == [*before]
    assert prepare_id(image_size=64) != "f6a00dc54a0f"

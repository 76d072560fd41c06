"""A model whose stages torch.compile runs: the same answers, few graphs, and one error message."""

import copy
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

import dynexit
from dynexit.core.tradeoff import Configuration
from dynexit.deploy.model import EarlyExitModel
from dynexit.deploy.optimize import optimized_backbone
from dynexit.errors import Failure
from dynexit.models.multi_exit import MultiExit
from dynexit.models.passes import compile_stages
from tests.conftest import require
from tests.deploy.saved import make_images, same, save_random
from tests.models.cut import own
from tests.models.cut.staged import staged


@pytest.fixture(autouse=True)
def _own_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same graphs without C++, in a second instead of half a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


def both(folder: Path, precision: str = "float32") -> tuple[EarlyExitModel, EarlyExitModel]:
    """The model optimised and compiled."""
    model = dynexit.load(folder, verify=False)
    return model.optimize(precision=precision), model.optimize(precision=precision, compile=True)


def check_same(
    plain: EarlyExitModel, compiled: EarlyExitModel, tolerance: float = 0.0, sizes: Sequence[int] = (1, 3, 17)
) -> None:
    """At all points and sizes the same exits, but near a threshold, and probabilities within the tolerance."""
    for point in plain.points:
        for size in sizes:
            images = make_images(plain.input_size, size, seed=size)
            expected, found = plain.use(point)(images), compiled.use(point)(images)
            sure = ~found.near if tolerance else torch.ones(size, dtype=torch.bool)
            assert torch.equal(expected.exit_index[sure], found.exit_index[sure])
            assert torch.equal(expected.prediction[sure], found.prediction[sure])
            difference = (found.probabilities - expected.probabilities)[sure]
            assert (difference.abs() <= tolerance).all()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "sizes"), [("ResNet bottleneck", (1, 3)), ("DINOv2", (1, 3, 17))])
def test_compiled_stages_give_the_same_answers(family: str, sizes: Sequence[int], tmp_path: Path) -> None:
    save_random(tmp_path / "model", family, exits={"positions": [1]})
    check_same(*both(tmp_path / "model"), 1e-5, sizes)


@pytest.mark.usefixtures("without_compiler")
def test_views_and_sizes_share_a_few_graphs(tmp_path: Path) -> None:
    save_random(tmp_path / "model", exits={"positions": [2, 4]})
    counters.clear()
    plain, compiled = both(tmp_path / "model")
    images = make_images(plain.input_size, 90)
    exits = (((-1, 1.0), (-1, 1.0)), ((-1, 1.0), (0, 0.25)), ((1, 0.25), (-1, 1.0)), ((0, 0.3), (1, 0.25)))
    views = [(plain.use(Configuration(way)), compiled.use(Configuration(way))) for way in exits]
    for slow, fast in views:
        for size in (1, 2, 3, 5, 8, 17, 31, 64):
            assert same(fast(images[-size:]), slow(images[-size:]))
        streamed = torch.cat([one.exit_index for one in fast.stream(images.split(7), max_batch=16)])
        assert torch.equal(streamed, slow(images).exit_index)
        with ThreadPoolExecutor(3) as pool:
            assert all(same(answers, slow(images)) for answers in pool.map(fast, [images] * 3))
    num_stages = 2 + 6  # stem and tail, and from the stem or an exit to an exit or the tail
    most = num_graphs()
    assert most <= 3 * num_stages  # for one image, for several, and perhaps from 16 on, as convolutions differ
    slow_logits, fast_logits = (next(iter(one.engines.values())).plain(images) for one in (plain, compiled))
    assert torch.equal(torch.cat(slow_logits), torch.cat(fast_logits))
    assert num_graphs() == most + 1  # the whole backbone, for bench


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(
    "options",
    [
        {"exits": {"positions": [2, 5], "concatenate": True, "stem": True}, "by_gates": True, "head_types": ["linear"]},
        {"shrinkage": 0.3, "exits": {"positions": [0, 1]}, "trainings": ("aa", "bb")},
        {"family": "EVA"},
    ],
)
def test_all_kinds_of_exits_run_compiled(options: dict[str, Any], tmp_path: Path) -> None:
    save_random(tmp_path / "model", **options)
    check_same(*both(tmp_path / "model"))


@pytest.mark.usefixtures("without_compiler")
def test_bf16_runs_compiled(tmp_path: Path) -> None:
    require(torch.cpu._is_avx512_bf16_supported(), "this CPU has no bf16")
    save_random(tmp_path / "model", exits={"positions": [2]})
    check_same(*both(tmp_path / "model", "bf16"))


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize("name", ["Residual", "stages"])
def test_own_modules_run_compiled(name: str) -> None:
    backbone = staged(3, 5) if name == "stages" else own.cut(name)
    plain, compiled = (optimized_backbone(backbone, "float32", torch.device("cpu")) for _ in range(2))
    compile_stages(compiled)
    model = MultiExit(compiled, [0, 1])
    counters.clear()
    with torch.inference_mode():
        for size in (1, 3, 17):
            images = make_images(backbone.input_size, size)
            assert torch.equal(model.features(images)[1], plain(images))
            assert torch.equal(compiled(images), plain(images))
    assert num_graphs() > 0


@pytest.mark.usefixtures("without_compiler")
def test_copies_are_not_compiled(tmp_path: Path) -> None:
    save_random(tmp_path / "model", exits={"positions": [2]})
    plain, compiled = both(tmp_path / "model")
    again, copied = compiled.optimize(), copy.deepcopy(compiled.backbone)
    compiled.save_pretrained(tmp_path / "copy")
    counters.clear()
    images = make_images(plain.input_size, 5)
    with torch.inference_mode():
        assert torch.equal(copied(images), plain.backbone(images))
    for other in (again, dynexit.load(tmp_path / "copy")):
        assert same(other.use(plain.points[0])(images), plain.use(plain.points[0])(images))
    assert num_graphs() == 0


@pytest.mark.usefixtures("without_compiler")
def test_stages_run_plainly_beyond_torchs_limit(tmp_path: Path) -> None:
    save_random(tmp_path / "model", exits={"positions": [2]})
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=1):
        plain, compiled = both(tmp_path / "model")
        check_same(plain, compiled)
    assert num_graphs() == 5  # stem, stages 0 to 1, 1 to 2 and 0 to 2, tail


def test_a_missing_compiler_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "graphs"))
    save_random(tmp_path / "model", exits={"positions": [2]})
    model = dynexit.load(tmp_path / "model", verify=False)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}), pytest.raises(Failure) as caught:
        model.optimize(compile=True)
    message = str(caught.value)
    assert message.startswith("compile = true: torch.compile failed (InvalidCxxCompiler: ")
    assert message.endswith("or set compile=false")
    assert "\n" not in message

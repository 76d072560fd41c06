"""A process that checks models: it imports torch and timm while this one, which needs neither, reads the study."""

import contextlib
import gc
import importlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from launch.checks import find_misfits

if TYPE_CHECKING:
    from dynexit.study.schema import Config


@contextlib.contextmanager
def misfits_finder(*, beside: bool) -> Iterator[Callable[..., list[str]]]:
    """`find_misfits`, or what asks a process `beside` this one in its place, which is ready the sooner."""
    if not beside or "torch" in sys.modules:
        yield find_misfits
        return
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is not for it to tell of
    ) as process:
        try:
            yield lambda kinds, *, with_data=False: _ask(process, list(kinds), with_data=with_data)
        finally:
            process.kill()


def _ask(process: "subprocess.Popen[str]", kinds: "list[tuple[Config, bool]]", *, with_data: bool) -> list[str]:
    if not kinds:
        return []
    question = [[(config.model_dump(mode="json"), weights) for config, weights in kinds], with_data]
    try:
        mistakes: list[str] = json.loads(process.communicate(json.dumps(question))[0])
    except ValueError:  # it failed for whatever reason; what does so here, too, is told in the usual way
        return find_misfits(kinds, with_data=with_data)
    return mistakes


def _without_compiler() -> None:
    """Spares this process the import of torch's compiler, for which torchvision, timm and torch only mark functions.

    It takes as long as all else. Nothing can be compiled afterwards.
    """

    def disable(function: Any = None, *_: Any, **__: Any) -> Any:
        return function or (lambda marked: marked)

    importlib.import_module("torch")
    compiler, tools = ModuleType("torch._dynamo"), ModuleType("torch._dynamo.utils")
    vars(compiler).update(disable=disable, utils=tools)
    vars(tools).update(is_compile_supported=lambda _: False)
    sys.modules.update({module.__name__: module for module in (compiler, tools)})


def main() -> None:
    """Answers one question of `_ask`: from standard input to standard output."""
    gc.disable()  # what is imported stays
    _without_compiler()
    importlib.import_module("dynexit.jobs.load")
    from dynexit.study.schema import Config

    text = sys.stdin.read()
    if not text:
        return  # nothing to check, or whoever started this has ended
    kinds, with_data = json.loads(text)
    with contextlib.redirect_stdout(sys.stderr):
        mistakes = find_misfits([(Config.model_validate(one), weights) for one, weights in kinds], with_data=with_data)
    print(json.dumps(mistakes))


if __name__ == "__main__":
    main()

"""How long a fresh process takes until it can work, and until it has drawn its first picture."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import torch

from imagen_kit.bench.subject import OURS, Built, Subject
from imagen_kit.bench.subjects import register
from imagen_kit.bench.work import attempt, chosen_peers
from imagen_kit.errors import KitError

LIMIT = 600.0  # seconds after which a process is given up
NAMES = ("import", "first_call", "first_picture")
PEERS = ("torch", "diffusers")

# All of them end by saying when: time.monotonic() is one clock for all processes of a machine.
_IMPORT = "import {what}\nimport time\nprint(time.monotonic(), flush=True)\nimport os\nos._exit(0)"
_FIRST_CALL = """
import os, sys, time
from torch.nn.modules import module as nn

def watch(called, inputs):
    home = type(called).__module__
    if home.startswith("imagen_kit.denoisers.") and ".layers." not in home:
        print(time.monotonic(), flush=True)
        os._exit(0)

nn.register_module_forward_pre_hook(watch)
from imagen_kit.cli import main
sys.exit(main(sys.argv[1:]) or "no network was called")
"""
_FIRST_PICTURE = """
import os, sys, time
from imagen_kit.cli import main
code = main(sys.argv[1:])
if code == 0:
    print(time.monotonic(), flush=True)
os._exit(code)
"""


@register("startup", names=lambda: list(NAMES))
def startup(
    name: str,
    device: torch.device,
    *,
    recipe: str = "pocket-imagen",
    peers: str = "all",
) -> Built:
    """Seconds from the start of a process.

    ``import``: until ``import imagen_kit`` is done, beside ``import torch`` (the difference is what the kit adds)
    and a pipeline of diffusers. ``first_call``: until ``imagen-kit generate`` calls a network for the first time,
    seen by a hook on torch's modules. ``first_picture``: until it has written its picture.

    Args:
        name: one of these.
        device: where ``generate`` draws.
        recipe: what it draws with.
        peers: all, none, or some of torch, diffusers, separated by commas; there are none but for ``import``.

    Raises:
        KitError: a value that there is not.
    """
    wanted = chosen_peers(peers, PEERS) if name == "import" else []
    if name == "import":
        built: Built = {OURS: Process(_IMPORT.format(what="imagen_kit"), [], "import imagen_kit")}
    else:
        words = [
            "generate",
            "a large red star on a white background",
            "--recipe",
            recipe,
            "--device",
            str(device),
        ]
        script = _FIRST_CALL if name == "first_call" else _FIRST_PICTURE
        built = {OURS: Process(script, words, f"imagen-kit generate --recipe {recipe} --device {device}")}
    modules = {"torch": "torch", "diffusers": "diffusers; diffusers.StableDiffusionPipeline"}
    for who in wanted:
        built[who] = attempt(lambda what=modules[who]: _importing(what))  # type: ignore[misc]
    return built


def _importing(what: str) -> Subject:
    from importlib.util import find_spec

    package = what.split(";")[0]
    if find_spec(package) is None:
        raise KitError(f"{package} is not installed (pip install {package})")
    return Process(_IMPORT.format(what=what), [], f"import {what}")


class Process(Subject):
    """A Python process that prints the time of what is waited for.

    Args:
        script: what it runs.
        words: its arguments.
        note: what it is.
    """

    unit, units, countable, comparable = "starts", 1, False, False

    def __init__(self, script: str, words: Sequence[str], note: str):
        self.script, self.words, self.note = script, list(words), note

    def __call__(self) -> None:
        """Run it; the seconds are in ``seconds``.

        Raises:
            KitError: it failed, with its last line.
        """
        boot = "import sys, json; sys.path[:] = json.loads(sys.argv.pop(1))\n"
        with tempfile.TemporaryDirectory() as folder:
            words = [*self.words, *(["-o", os.path.join(folder, "picture.png")] if self.words else [])]
            command = [sys.executable, "-W", "ignore", "-c", boot + self.script, json.dumps(sys.path), *words]
            began = time.monotonic()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            except subprocess.TimeoutExpired as error:
                raise KitError(f"{self.note} took longer than {LIMIT:g} s") from error
        lines = done.stdout.strip().splitlines()
        if done.returncode or not lines:
            told = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()[-1]
            raise KitError(f"{self.note} ended with code {done.returncode}: {told}")
        self.seconds = float(lines[-1]) - began

"""Write what the registries print into README.md: python docs/update_readme.py"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from imagen_kit.cli import main

README = Path(__file__).parents[1] / "README.md"


def run() -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        main(["list"])
    text = README.read_text(encoding="utf-8")
    pattern = r"(`imagen-kit list` prints:\n\n```text\n).*?(\n```)"
    listing = printed.getvalue().rstrip()
    README.write_text(re.sub(pattern, lambda m: m[1] + listing + m[2], text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    run()

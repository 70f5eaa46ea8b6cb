"""The command line, run in this process."""

from __future__ import annotations

import pytest

from imagen_kit.cli import main


@pytest.fixture
def command(capsys):
    """Run ``imagen-kit WORDS``; (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        out = capsys.readouterr()
        return code, out.out, out.err

    return run

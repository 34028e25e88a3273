"""The shim that plays a failing disk, built once."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import program


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    built = tmp_path_factory.mktemp("shim") / "disk.so"
    source = Path(__file__).parent / "disk.c"
    command = [
        program("gcc"),
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-o",
        str(built),
        str(source),
        "-ldl",
    ]
    subprocess.run(command, check=True)
    return built

"""Programs that some tests want and a newcomer need not have."""

import os
import shutil

import pytest


def program(name: str, *elsewhere: str) -> str:
    """Its path: what the environment names, as NGINX=/path/to/nginx, else where it usually is.
    Without one the test is skipped, or fails with NOTHING_SKIPPED (make check-all)."""
    names = (os.environ.get(name.upper()), name, *elsewhere)
    found = next((path for one in names if one and (path := shutil.which(one))), None)
    if found:
        return found
    reason = f"no {name}: install it, or name it in {name.upper()}"
    if os.environ.get("NOTHING_SKIPPED"):
        pytest.fail(reason)
    pytest.skip(reason)

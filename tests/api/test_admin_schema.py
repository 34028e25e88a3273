"""The administration, called as its OpenAPI document allows and as it forbids (schemathesis)."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from tests.e2e.router import running
from tests.messages import ALI, webhook

KEY = {"X-Api-Key": "boss-key"}


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_whatever_is_asked_the_answer_is_no_error_of_ours(
    tmp_path: Path, mode: GenerationMode
) -> None:
    """Against a real router that has a lock, with a backend that is away."""
    with running(tmp_path, admin_api_key=KEY["X-Api-Key"]) as router:
        router.post(webhook("start_realty_2", ALI))
        document = schemathesis.openapi.from_url(f"{router.url}/openapi.json", headers=KEY)
        operations = [found.ok() for found in document.get_all_operations()]  # type: ignore[union-attr]
        assert len(operations) == 25
        for operation in operations:
            if mode is GenerationMode.NEGATIVE and not list(operation.iter_parameters()):
                continue  # /health can be asked in one way only

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
            def ask(case: Any) -> None:
                answer = case.call(headers=KEY)
                case.validate_response(answer, checks=[not_a_server_error])
                # 400: what is no event cannot be explained.
                expected = (200, 400, 404, 405, 409, 422)
                assert answer.status_code in expected, answer.text
                if not answer.headers["content-type"][0].startswith("image/"):
                    assert isinstance(answer.json(), dict)

            ask()

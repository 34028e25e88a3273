"""What is in deploy/, docker-compose.yml and Dockerfile, as far as they can be checked here."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from compose_spec import PyCompose

from gateway.lifecycle import GRACE_SECONDS
from gateway.settings import Settings
from tests.e2e.router import ROOT

COMPOSE = (ROOT / "docker-compose.yml").read_text("utf-8")
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


ALWAYS = ("waha", "router", "backend")
PROFILES = dict.fromkeys(("router-a", "router-b", "balancer", "redis"), "redis") | dict.fromkeys(
    ("prometheus", "grafana"), "monitoring"
)


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]
    return found


def test_the_composition_is_one_by_the_specification() -> None:
    # The parser knows no YAML merge keys, which Compose does.
    composition = PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(COMPOSE)))
    composition.validate()
    assert set(composition.service_names()) == {*ALWAYS, *PROFILES}


def test_the_parser_would_notice_a_mistake() -> None:
    wrong = COMPOSE.replace("stop_grace_period", "stop_grace_time")
    with pytest.raises(Exception, match="stop_grace"):
        PyCompose.from_yaml(yaml.safe_dump(yaml.safe_load(wrong)))


def test_names_ports_and_volumes_are_those_that_were_asked_for() -> None:
    for name, service in services().items():
        assert service["container_name"] == f"artinrealty-{name}"
        assert service["restart"] == "unless-stopped"
        assert service.get("profiles", []) == ([PROFILES[name]] if name in PROFILES else [])
        if name in ALWAYS:
            assert service["networks"] == ["artinrealty_network"]
    assert services()["waha"]["ports"] == ["127.0.0.1:3001:3000"]
    assert services()["router"]["ports"] == ["127.0.0.1:8001:8001"]
    assert services()["router"]["stop_grace_period"] == "30s"
    assert services()["router"]["volumes"] == ["router_data:/app/data"]
    assert "ports" not in services()["backend"]


def test_every_secret_is_required_and_none_is_written_down() -> None:
    for name, service in services().items():
        for variable, value in service.get("environment", {}).items():
            if re.search("KEY|SECRET|PASSWORD", variable):
                assert ":?set it in .env}" in value, f"{name}: {variable}"
    example = (ROOT / ".env.example").read_text("utf-8")
    for secret in set(re.findall(r"\$\{([A-Z_]+):\?", COMPOSE)):
        assert re.search(rf"^{secret}=$", example, re.MULTILINE), secret


@pytest.mark.parametrize("name", ["router", "router-a", "router-b", "backend"])
def test_our_containers_may_do_nothing_but_write_their_data(name: str) -> None:
    service = services()[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "tmpfs" not in service
    assert service.get("volumes", []) in (["router_data:/app/data"], [])


def test_the_routers_of_the_profile_differ_from_the_one_in_their_store_alone() -> None:
    one = services()["router"]
    for name in ("router-a", "router-b"):
        many = services()[name]
        environment = dict(many["environment"])
        assert environment.pop("STORE_URL") == "redis://redis:6379/0"
        assert environment == one["environment"]
        for key in ("image", "env_file", "volumes", "stop_grace_period", "read_only"):
            assert many[key] == one[key], key


def test_redis_keeps_what_it_is_given_and_nobody_else_reaches_it() -> None:
    redis = services()["redis"]
    reported = " ".join(redis["command"])
    for option in ("appendonly yes", "appendfsync always", "maxmemory-policy noeviction"):
        assert f"--{option}" in reported
    assert redis["volumes"] == ["redis_data:/data"]
    assert "ports" not in redis
    assert services()["balancer"]["networks"]["artinrealty_network"]["aliases"] == ["router"]
    reach = [name for name, one in services().items() if "redis_network" in one["networks"]]
    assert sorted(reach) == ["redis", "router-a", "router-b"]


def test_waha_is_set_up_as_it_demands() -> None:
    waha = services()["waha"]["environment"]
    url, events = waha["WHATSAPP_HOOK_URL"], waha["WHATSAPP_HOOK_EVENTS"]
    assert url == "http://router:8001/webhook/waha"
    assert " " not in events
    assert waha["WHATSAPP_HOOK_RETRIES_POLICY"] == "constant"
    delay, attempts = (
        int(waha[f"WHATSAPP_HOOK_RETRIES_{name}"]) for name in ("DELAY_SECONDS", "ATTEMPTS")
    )
    assert delay * attempts == 3600, "the router may be away for an hour"
    assert not any("_" in name for name in services()), "WAHA refuses such hosts"
    assert waha["WHATSAPP_FILES_LIFETIME"] == "0", "media are kept for the backend to fetch"
    router = services()["router"]["environment"]
    assert router["WAHA_API_URL"] == "http://waha:3000/api"
    assert router["WAHA_API_KEY"] == waha["WAHA_API_KEY"]


def test_the_images_steps_are_those_of_make_run() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "pip install --quiet --disable-pip-version-check -r requirements.txt" in makefile
    assert re.search(r"pip install [^\n]*-r requirements\.txt", DOCKERFILE)
    assert "python whatsapp_router.py" in makefile
    assert 'CMD ["python", "whatsapp_router.py"]' in DOCKERFILE


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_every_version_is_exact_and_has_its_hashes(name: str) -> None:
    pins = re.split(r"\n(?=\S)", (ROOT / name).read_text("utf-8").split("make lock\n")[1].strip())
    assert len(pins) > 20
    for pin in pins:
        assert re.match(r"[a-z0-9-]+==[\w.]+( ; .+)? \\\n {4}--hash=sha256:[0-9a-f]{64}", pin), pin


def test_what_we_chose_is_what_is_pinned() -> None:
    """`make lock` was run after pyproject.toml changed."""
    chosen = PROJECT["project"]["dependencies"]
    for name, some in (
        ("requirements", chosen),
        ("requirements-dev", [*chosen, *PROJECT["dependency-groups"]["dev"]]),
    ):
        pinned = set(re.findall(r"^\S+==\S+", (ROOT / f"{name}.txt").read_text("utf-8"), re.M))
        assert {one.partition(";")[0].strip().lower() for one in some} <= pinned


def test_the_image_runs_as_nobody_special_and_asks_health() -> None:
    assert re.search(r"^USER router$", DOCKERFILE, re.MULTILINE)
    assert "chown router:router /app/data" in DOCKERFILE
    assert "/health" in DOCKERFILE
    assert "HOST=0.0.0.0" in DOCKERFILE


def test_what_the_image_copies_exists_and_passes_the_ignore_file() -> None:
    ignore = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE):
        source = shlex.split(line)[0]
        assert (ROOT / source).exists()
        assert f"!{source}" in ignore


def test_no_log_fills_the_disk() -> None:
    for name, service in services().items():
        assert service["logging"]["driver"] == "json-file", name
        assert set(service["logging"]["options"]) == {"max-size", "max-file"}, name


def test_only_what_a_registry_has_is_pulled() -> None:
    for name, service in services().items():
        ours = service["image"] == "whatsapp-gateway-router"
        wanted = {"router": "build"}.get(name, "never") if ours else None
        assert service.get("pull_policy") == wanted, name


def test_a_missing_key_file_is_not_made_a_folder() -> None:
    (key,) = [one for one in services()["prometheus"]["volumes"] if isinstance(one, dict)]
    assert key["bind"] == {"create_host_path": False}


def test_the_balancer_follows_containers_that_get_another_address() -> None:
    """nginx 1.27.3 and newer; the image is pinned to one."""
    config = (ROOT / "deploy" / "nginx.conf").read_text("utf-8")
    assert re.search(r"^ *resolver 127\.0\.0\.11 ", config, re.MULTILINE)
    assert re.search(r"^ *zone routers ", config, re.MULTILINE)
    assert len(re.findall(r"server router-[ab]:8001 resolve ", config)) == 2
    version = re.search(r":(\d+)\.(\d+)", services()["balancer"]["image"])
    assert version
    assert (int(version[1]), int(version[2])) >= (1, 28)


def test_the_images_account_has_numbers_that_stay() -> None:
    assert "--gid 10001 router" in DOCKERFILE
    assert "--uid 10001 --gid 10001" in DOCKERFILE
    assert "compileall" in DOCKERFILE


def test_the_health_check_is_python_that_compiles() -> None:
    code = re.search(r'CMD \["python", "-c", "(.*)"\]', DOCKERFILE)
    assert code
    compile(code[1].replace('\\"', '"'), "healthcheck", "exec")
    assert "ProxyHandler({})" in code[1], "a proxy of the environment is not for this machine"


# without compose


KUBERNETES = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yml").read_text("utf-8")))


def test_the_kubernetes_manifest_is_what_kubernetes_takes() -> None:
    assert [one["kind"] for one in KUBERNETES] == [
        "Secret", "ConfigMap", "Deployment", "PodDisruptionBudget", "Service"
    ]  # fmt: skip
    for one in KUBERNETES:
        kubernetes_validate.validate(one, "1.33", strict=True)


def test_the_kubernetes_manifest_names_settings_that_there_are() -> None:
    secret, config, deployment, _, service = KUBERNETES
    named = {*secret["stringData"], *config["data"]}
    assert {name.lower() for name in named} <= set(Settings.model_fields)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["ports"][0]["containerPort"] == service["spec"]["ports"][0]["port"] == 8001
    assert pod["terminationGracePeriodSeconds"] > GRACE_SECONDS
    assert str(pod["securityContext"]["runAsUser"]) in DOCKERFILE


UNIT = ROOT / "deploy" / "whatsapp-router.service"


def test_the_systemd_unit_has_its_grace() -> None:
    (seconds,) = re.findall(r"^TimeoutStopSec=(\d+)$", UNIT.read_text("utf-8"), re.MULTILINE)
    assert int(seconds) > GRACE_SECONDS


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze")
def test_the_systemd_unit_is_one_and_is_shut_in(tmp_path: Path) -> None:
    unit = tmp_path / UNIT.name
    # verify wants the program to be there.
    text = UNIT.read_text("utf-8")
    unit.write_text(text.replace("/opt/whatsapp-router/bin/whatsapp-router", sys.executable))
    verify = subprocess.run(
        ["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False
    )
    assert (verify.returncode, verify.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(unit)]
    shown = subprocess.run(security, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stdout[-300:]

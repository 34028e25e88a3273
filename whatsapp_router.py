"""The entry: settings from the environment, `app` for any ASGI server, and the command line.

Installed as a package, the command is `whatsapp-router` in place of `python whatsapp_router.py`.

python whatsapp_router.py                                   serves on HOST:PORT
python whatsapp_router.py say 971501234567 start_realty_2   posts a message as WAHA would
python whatsapp_router.py link 2 --qr card.svg              shows a tenant's link, draws its QR code
python whatsapp_router.py connect-waha                      sets up the webhook in WAHA
python whatsapp_router.py doctor                            looks for what is wrong
python whatsapp_router.py recover                           asks WAHA for what never came
python whatsapp_router.py replay --all                      delivers dead letters again
python whatsapp_router.py backup DIR, restore DIR           copies all, and brings it back
python whatsapp_router.py migrate --from … --to …           carries all to another store
python whatsapp_router.py rebuild                           writes a lost mappings file anew
"""

import logging
import os
import sys

# Names are looked up in libuv's threads, of which there are four: as many tenants' hosts whose DNS
# hangs would stop all. It reads this when its first thread begins.
os.environ.setdefault("UV_THREADPOOL_SIZE", "64")

from fastapi import FastAPI

from gateway import cli, log
from gateway.app import create_app
from gateway.errors import StartRefused
from gateway.settings import Settings, load, misspelt_names


def _settings() -> Settings:
    try:
        settings = load()
    except StartRefused as exc:
        sys.exit(f"{exc}")
    log.set_up(settings.log_level, settings.log_format, mask_users=settings.log_mask_users)
    for name, meant in misspelt_names().items():
        logging.getLogger("gateway").warning(
            "%s is no setting and changes nothing: is %s meant?",
            name,
            meant,
            extra={"event": "start.misspelt"},
        )
    return settings


def __getattr__(name: str) -> FastAPI:
    """Make `app` when a server asks for it: --help needs no settings."""
    if name != "app":
        raise AttributeError(name)
    app = globals()["app"] = create_app(_settings())
    return app


def main() -> int:
    """The command line; return the exit status."""
    options = cli.parser().parse_args()
    return cli.run(options, _settings())


if __name__ == "__main__":
    sys.exit(main())

# The steps are those of `make run`: install requirements.txt, then python whatsapp_router.py.
FROM python:3.11-slim

WORKDIR /app
COPY requirements.txt ./
RUN python -m pip install --quiet --no-cache-dir --disable-pip-version-check -r requirements.txt

COPY whatsapp_router.py ./
COPY gateway ./gateway
COPY examples ./examples
# Compiled here: at run time nothing but the data can be written.
RUN python -m compileall -q whatsapp_router.py gateway examples

# The one place that is written. The numbers let an operator chown a mounted folder.
RUN groupadd --gid 10001 router \
 && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin router \
 && mkdir /app/data \
 && chown router:router /app/data
USER router
VOLUME /app/data

ENV HOST=0.0.0.0 \
    PORT=8001 \
    DATA_DIR=/app/data \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
EXPOSE 8001

HEALTHCHECK --interval=10s --timeout=5s --start-period=10s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open(f\"http://127.0.0.1:{os.environ['PORT']}/health\", timeout=4)"]

CMD ["python", "whatsapp_router.py"]

# Redis as Debian ships it, for the e2e tests.
ARG PYTHON_DIGEST=
FROM docker.io/library/python:3.11-slim-bookworm${PYTHON_DIGEST}
RUN apt-get update && apt-get install --yes --no-install-recommends redis-server && rm -rf /var/lib/apt/lists/* /var/cache/apt/*
USER 65532:65532
ENTRYPOINT ["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/tmp"]

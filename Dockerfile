# The operator. What is installed is pinned by requirements.lock; pin the base too, by the digest that you have checked:
#   docker build --build-arg PYTHON_DIGEST=@sha256:… --tag celery-workerpool .
ARG PYTHON_DIGEST=
FROM docker.io/library/python:3.11-slim-bookworm${PYTHON_DIGEST} AS build
WORKDIR /src
COPY requirements.lock ./
RUN python3 -m venv /build && sed -n '/^uv==/,/# via/p' requirements.lock | /build/bin/pip install --no-cache-dir --require-hashes -r /dev/stdin
COPY pyproject.toml ./
ENV VIRTUAL_ENV=/opt/workerpool UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never UV_SYSTEM_CERTS=1
RUN python3 -m venv --without-pip /opt/workerpool \
    && /build/bin/uv pip install --constraints requirements.lock --requirements pyproject.toml --extra operator
COPY README.md LICENSE ./
COPY operator operator
COPY routing routing
RUN /build/bin/uv pip install --no-deps --build-constraints requirements.lock .
# Of the Kubernetes client the operator uses the connection and the login, and speaks JSON: the generated calls and models, more than
# half of all that is installed, stay out. Then compile what a start needs, and no more.
RUN cd /opt/workerpool/lib/python3*/site-packages/kubernetes \
    && find client/api client/models aio/client/api aio/client/models -name '*.py' ! -name __init__.py -delete \
    && /opt/workerpool/bin/python -c 'import workerpool_operator.cli, workerpool_operator.main'

FROM docker.io/library/python:3.11-slim-bookworm${PYTHON_DIGEST}
ARG VERSION=0.1.0
ARG REVISION=
LABEL org.opencontainers.image.title="celery-workerpool" \
      org.opencontainers.image.description="The operator that scales GPU and CPU Celery workers as one pool" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
COPY --from=build /opt/workerpool /opt/workerpool
ENV PATH=/opt/workerpool/bin:/usr/local/bin:/usr/bin:/bin PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
ENTRYPOINT ["workerpool"]
CMD ["run"]

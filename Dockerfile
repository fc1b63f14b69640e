# One image for every role: `modelmount keeper`, `supervisor`, `node`, `controller`. `make image` builds it without a
# container engine. BASE may be any Debian 12: both stages take the same, so that libfuse and Python match.
ARG BASE=docker.io/library/debian:bookworm-slim@sha256:4724b8cc51e33e398f0e2e15e18d5ec2851ff0c2280647e1310bc1642182655d

FROM ${BASE} AS build
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends \
      ca-certificates gcc libc6-dev libfuse3-dev pkg-config python3-dev python3-venv
WORKDIR /src
COPY pyproject.toml constraints.txt ./
# The dependencies alone first: this layer changes only with them. pyfuse3 is compiled here. The secrets, both optional,
# are for machines that reach packages through a mirror: a pip.conf and the certificate authorities it names.
RUN --mount=type=secret,id=pip.conf,target=/run/secrets/pip.conf \
    --mount=type=secret,id=ca.crt,target=/run/secrets/ca.crt \
    python3 -m venv /opt/modelmount \
 && python3 -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))' \
      > dependencies.txt \
 && PIP_CONFIG_FILE=/run/secrets/pip.conf /opt/modelmount/bin/pip install -q --no-cache-dir \
      -c constraints.txt -r dependencies.txt "setuptools>=77"
COPY README.md LICENSE ./
COPY csi csi
# Another version than the source's own, for those who build one; `modelmount --version` says it.
ARG VERSION=
RUN if [ -n "$VERSION" ]; then sed -i "s/^version = .*/version = \"$VERSION\"/" pyproject.toml; fi \
 && /opt/modelmount/bin/pip install -q --no-cache-dir --no-deps --no-build-isolation . \
 && /opt/modelmount/bin/pip uninstall -q -y setuptools pip

FROM ${BASE}
RUN export DEBIAN_FRONTEND=noninteractive \
 && apt-get update -qq \
 && apt-get install -y -qq --no-install-recommends ca-certificates libfuse3-3 python3 tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/*
COPY --from=build /opt/modelmount /opt/modelmount
ENV PATH=/opt/modelmount/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONDONTWRITEBYTECODE=1
# After what takes long: another revision shares those layers.
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="ModelMount" \
      org.opencontainers.image.description="AI models in OCI registries as Kubernetes volumes" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Roles that need another user (keeper, supervisor and node are uid 0, each with the capabilities it needs) say so.
USER 65532:65532
WORKDIR /
# PID 1 reaps what workers and fetchers leave behind.
ENTRYPOINT ["/usr/bin/tini", "--", "modelmount"]
CMD ["--help"]

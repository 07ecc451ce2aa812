# The same image from a binary that is built already, for the same or an older glibc than the runtime image's:
#
#   docker build -t hanse-runtime -f docker/Dockerfile --target runtime .
#   docker build -t hanse -f docker/prebuilt.Dockerfile target/release

ARG RUNTIME_IMAGE=hanse-runtime
FROM ${RUNTIME_IMAGE}
COPY hanse /usr/local/bin/hanse

# An S3 server, on the same base as the rest: moto, which keeps everything in memory.
ARG BASE
FROM ${BASE}
# What this machine trusts, for the packages' sake.
COPY ca-certificates.crt /etc/ssl/certs/
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-pip \
    && PIP_CERT=/etc/ssl/certs/ca-certificates.crt pip install --quiet --break-system-packages 'moto[server]==5.2.5'
USER 10001:10001
EXPOSE 5000
ENTRYPOINT ["moto_server", "--host", "0.0.0.0", "--port", "5000"]

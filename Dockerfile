# syntax=docker/dockerfile:1
# One static binary in an otherwise empty image. Alpine's Rust links against musl, statically.
ARG RUST_VERSION=1.95

FROM rust:${RUST_VERSION}-alpine AS build
RUN apk add --no-cache build-base busybox-static ca-certificates
WORKDIR /src
COPY . .
# The caches keep compiled dependencies between builds on one machine.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin oncegate \
    && install -D -m 0755 target/release/oncegate /image/oncegate \
    && install -D -m 0755 /bin/busybox.static /image/bin/wget \
    && install -D -m 0644 /etc/ssl/certs/ca-certificates.crt /image/etc/ssl/certs/ca-certificates.crt \
    && mkdir /empty
COPY <<"TOML" /image/etc/oncegate/config.toml
# Mount a file over this one, or set ONCEGATE_<SECTION>__<KEY>. The admin address stays on the container's loopback, where
# HEALTHCHECK and "docker exec" reach it: off it, it needs ONCEGATE_ADMIN__TOKEN_FILE beside ONCEGATE_ADMIN__LISTEN.
[server]
listen = "0.0.0.0:8080"
[store]
path = "/data"
TOML

FROM scratch
COPY --from=build /image/ /
# A new named volume takes over the owner of /data.
COPY --from=build --chown=65532:65532 /empty /data
COPY LICENSE-APACHE LICENSE-MIT /
USER 65532:65532
# The store. Without a volume of its own the records end with the container, and with them the promise.
VOLUME ["/data"]
EXPOSE 8080
STOPSIGNAL SIGTERM
# No shell in here: busybox under the name of wget is wget and nothing else. Asks whether the process should live on,
# as an orchestrator that restarts unhealthy containers wants it; /readyz is for what routes traffic. Override it where
# admin.listen is moved.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["/bin/wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9090/livez"]
ENTRYPOINT ["/oncegate"]
CMD ["serve", "--config", "/etc/oncegate/config.toml"]

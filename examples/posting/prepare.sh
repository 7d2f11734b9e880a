# Sourced by `run` and `test`: finds or installs what they need, and the gateway's binary. Not a command of its own.

cd "$(dirname "${BASH_SOURCE[0]}")"
export PATH="$PATH:/usr/sbin:/sbin"
me="examples/posting/$(basename "$0")"

has() { command -v "$1" >/dev/null 2>&1; }
give_up() {
    echo "$me: $*" >&2
    exit 1
}

install_packages() {
    local as_root=()
    has apt-get || give_up "please install: $* (there is no apt-get here)"
    if [ "$(id -u)" -ne 0 ]; then
        has sudo || give_up "please install as root: apt-get install $*"
        as_root=(sudo)
    fi
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@"
}

prepare() {
    local packages=()
    has node || packages+=(nodejs)
    has redis-server || packages+=(redis-server)
    # better-sqlite3 is compiled where its ready-made binary cannot be had.
    if [ ! -e node_modules/.installed ]; then
        has c++ || packages+=(g++)
        has make || packages+=(make)
        has python3 || packages+=(python3)
    fi
    packages+=("$@")
    if [ ${#packages[@]} -gt 0 ]; then
        install_packages "${packages[@]}" >&2
    fi
    has npm || install_packages npm >&2        # a package of its own in Debian, a part of nodejs elsewhere
    local version
    version=$(node --version)
    [ "$(node -p 'parseInt(process.versions.node)')" -ge 20 ] || give_up "Node 20 or newer is needed; this is $version"

    if [ ! -e node_modules/.installed ] || [ package-lock.json -nt node_modules/.installed ]; then
        echo "$me: npm ci (the first time this may compile for some minutes)" >&2
        # The headers that came with this node, where they are: they need not be fetched then.
        local prefix
        prefix=$(dirname "$(dirname "$(realpath "$(command -v node)")")")
        if [ -e "$prefix/include/node/node_api.h" ]; then
            export npm_config_nodedir=$prefix
        fi
        JOBS=max npm ci --no-fund --no-audit --loglevel=error >&2 || give_up "npm ci failed: see above"
        touch node_modules/.installed
    fi

    if [ -z "${ONCEGATE:-}" ]; then
        has cargo || give_up "set ONCEGATE to the gateway's binary, or install Rust 1.90 or newer: https://rustup.rs"
        (cd ../.. && cargo build --locked --bin oncegate) >&2
        ONCEGATE=$(cd ../.. && realpath "${CARGO_TARGET_DIR:-target}")/debug/oncegate
    fi
    [ -x "$ONCEGATE" ] || give_up "there is no gateway at $ONCEGATE"
    ONCEGATE=$(realpath "$ONCEGATE")
    export ONCEGATE
}

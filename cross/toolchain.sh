# shellcheck shell=bash
# Finds a Rust that can build for $triple, and zig as its C compiler; cross/build and cross/gate source this.

say() { printf '%s: %s\n' "$me" "$*" >&2; }
die() { say "$@"; exit 1; }

# Each rustc of this machine, the user's own first. `--print sysroot` asks rustup's shim without starting a download.
rustcs() {
    command -v rustc || true
    if command -v rustup >/dev/null; then
        rustup which --toolchain nightly rustc 2>/dev/null || true
    fi
    [[ ! -x /usr/bin/rustc ]] || echo /usr/bin/rustc
}

new_enough() {
    local minor
    minor=$("$1" --version 2>/dev/null | sed -nE 's/^rustc 1\.([0-9]+)\..*/\1/p')
    [[ -n $minor ]] && ((minor >= $(sed -nE 's/^rust-version = "1\.([0-9]+)"/\1/p' "$root/Cargo.toml")))
}

# Sets sysroot, and build_std where the target's std has to be built from source.
find_rust() {
    local rustc kind
    for kind in ready source; do
        while read -r rustc; do
            new_enough "$rustc" || continue
            sysroot=$("$rustc" --print sysroot) || continue
            [[ -x $sysroot/bin/cargo ]] || continue
            case $kind in
                ready) [[ -d $sysroot/lib/rustlib/$triple/lib ]] && build_std='' && return 0 ;;
                source) [[ -f $sysroot/lib/rustlib/src/rust/library/Cargo.lock ]] && build_std=1 && return 0 ;;
            esac
        done < <(rustcs)
    done
    return 1
}

# cargo-zigbuild and zig: those on PATH, else those that we installed.
find_zig() {
    if [[ -x $out/zig/bin/cargo-zigbuild && -f $out/zig/installed ]]; then
        export PATH=$out/zig/bin:$PATH CARGO_ZIGBUILD_PYTHON_PATH=$out/zig/bin/python
    else
        command -v cargo-zigbuild >/dev/null && { command -v zig >/dev/null || python3 -m ziglang version >/dev/null 2>&1; }
    fi
}

debian() { [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null && apt-cache show rustc-web >/dev/null 2>&1; }

apt_install() {
    say "installing with apt: $*"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o DPkg::Lock::Timeout=600 --no-install-recommends "$@" >/dev/null </dev/null ||
        die "apt could not install $*"
    hash -r
}

install_zig() {
    mkdir -p "$out"
    local python=python3
    [[ ! -x /usr/bin/python3 ]] || python=/usr/bin/python3
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        debian || die "python3 has no venv module; install it (Debian: python3-venv)"
        apt_install python3-venv
    fi
    say "installing $ZIG and $ZIGBUILD into ${out#"$root/"}/zig"
    # Beside, then moved: a broken-off install is not taken for one. A venv may be moved: pip is called as a module.
    rm -rf "$out/zig"
    "$python" -m venv "$out/zig"
    "$out/zig/bin/python" -m pip install --quiet --disable-pip-version-check "$ZIG" "$ZIGBUILD" </dev/null ||
        die "pip could not install $ZIG and $ZIGBUILD"
    touch "$out/zig/installed"
}

# find_toolchain MAY_INSTALL
find_toolchain() {
    if ! find_rust; then
        if [[ -n $1 && $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
            apt-get update -qq || say "apt-get update failed; trying with the lists that are there"
            debian || die "no Rust here can build for $triple, and apt has no rustc-web"
            apt_install rustc-web rust-web-src cargo-web libstd-rust-web-dev
        fi
        find_rust || die "no Rust here can build for $triple. One of:
  rustup target add $triple                  (x86_64, aarch64, armv7, arm)
  rustup toolchain install nightly -c rust-src
  apt-get install rustc-web rust-web-src cargo-web libstd-rust-web-dev     (Debian 12; $me $target --install does it)"
    fi
    export PATH=$sysroot/bin:$PATH
    if ! find_zig; then
        [[ -z $1 ]] || install_zig
        find_zig || die "cargo-zigbuild and zig are missing. One of:
  pip install $ZIG $ZIGBUILD     (in a venv)
  $me $target --install                        (into ${out#"$root/"}/zig)"
    fi
    export RUSTC=$sysroot/bin/rustc CARGO=$sysroot/bin/cargo
    export CARGO_TARGET_DIR=$out/$target CARGO_ZIGBUILD_CACHE_DIR=$out/cache ZIG_GLOBAL_CACHE_DIR=$out/cache/zig
    unset CARGO_BUILD_TARGET CARGO_ENCODED_RUSTFLAGS
    # crt-static: without it MIPS is linked with -pie and -lgcc_s, and zig has neither for it.
    RUSTFLAGS=-Ctarget-feature=+crt-static
    if [[ -n $build_std ]]; then
        # A std built here brings no crt1.o; rustc would look for it. The variable opens -Z on a stable compiler.
        RUSTFLAGS+=" -Clink-self-contained=no"
        export RUSTC_BOOTSTRAP=1
    fi
    export RUSTFLAGS
}

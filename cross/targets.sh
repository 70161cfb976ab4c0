# shellcheck shell=bash disable=SC2034
# What cross/build and cross/gate know of each target; they source this.

TARGETS="x86_64 aarch64 armv7 arm mips mipsel riscv64"

# Pinned: the same C compiler and musl everywhere.
ZIG=ziglang==0.17.0
ZIGBUILD=cargo-zigbuild==0.24.0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Not the host's target directory: a cross build then never makes the host's build start again.
out=$root/target/cross

# describe TARGET: triple, what `readelf -h` must say, qemu-user's name, PIE or not (32-bit: zig
# cannot link a static one).
describe() {
    pie=
    case $1 in
        x86_64) triple=x86_64-unknown-linux-musl class=ELF64 order=little machine='Advanced Micro Devices X86-64' pie=1 ;;
        aarch64) triple=aarch64-unknown-linux-musl class=ELF64 order=little machine=AArch64 pie=1 ;;
        armv7) triple=armv7-unknown-linux-musleabihf class=ELF32 order=little machine=ARM ;;
        arm) triple=arm-unknown-linux-musleabi class=ELF32 order=little machine=ARM ;;
        mips) triple=mips-unknown-linux-musl class=ELF32 order=big machine='MIPS R3000' ;;
        mipsel) triple=mipsel-unknown-linux-musl class=ELF32 order=little machine='MIPS R3000' ;;
        riscv64) triple=riscv64gc-unknown-linux-musl class=ELF64 order=little machine=RISC-V ;;
        *) return 1 ;;
    esac
    case $1 in
        armv7 | arm) qemu=qemu-arm-static ;;
        *) qemu=qemu-$1-static ;;
    esac
}

#!/usr/bin/env bash
# Runs the test program on an emulated CPU that has AVX-512, for machines that have not:
# a Linux kernel boots under Bochs with the program as its only process. The hash of the
# token tiles must equal the avx2 variant's.
#
#   tests/native/run_avx512_emulated.sh [KERNEL]
#
# KERNEL is a bzImage with a serial console built in; without it, the one of Debian's
# linux-image-cloud-amd64 is fetched. Needs CMake, bochs, bochsbios, vgabios, xorriso,
# isolinux, syslinux-common and cpio, by the names of Debian 12. Takes a few minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
timeout_seconds=${TIMEOUT:-3600}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/root" "$work/iso"

kernel=${1:-}
if [[ -z $kernel ]]; then
  package=$(apt-cache depends linux-image-cloud-amd64 | awk '/Depends:/ {print $2; exit}')
  (cd "$work" && apt-get download -q "$package" && dpkg -x "$package"_*.deb kernel)
  kernel=$(echo "$work"/kernel/boot/vmlinuz-*)
fi

cmake --preset static >/dev/null
cmake --build --preset static --parallel 2 >/dev/null
cp build/static/pybsp_selftest "$work/root/pybsp_selftest"
"${CXX:-g++}" -O1 -static tests/native/emulator_init.cpp -o "$work/root/init"
strip "$work"/root/*
(cd "$work/root" && find . | cpio --quiet -o -H newc >"$work/iso/initrd")

cp "$kernel" "$work/iso/vmlinuz"
cp /usr/lib/ISOLINUX/isolinux.bin /usr/lib/syslinux/modules/bios/ldlinux.c32 "$work/iso"
# Linux gives up on AVX when the size of the compacted register state that Bochs 2.7
# reports is not the one it adds up itself, hence no xsaves and xsavec.
cat >"$work/iso/isolinux.cfg" <<CONFIG
default selftest
prompt 0
label selftest
  kernel vmlinuz
  append initrd=initrd console=ttyS0 quiet mitigations=off \
    noxsaves clearcpuid=xsavec
CONFIG
xorriso -as mkisofs -quiet -R -o "$work/boot.iso" -b isolinux.bin -c boot.cat \
  -no-emul-boot -boot-load-size 4 -boot-info-table "$work/iso" 2>/dev/null

cat >"$work/bochsrc" <<CONFIG
display_library: rfb, options="timeout=0"
romimage: file=/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=/usr/share/bochs/VGABIOS-lgpl-latest
cpu: model=corei7_skylake_x, ips=50000000
memory: guest=256, host=256
ata0-master: type=cdrom, path=$work/boot.iso, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev=$work/serial.txt
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
speaker: enabled=0
log: $work/bochs.log
panic: action=fatal
CONFIG
echo continue >"$work/start"

# Switching off ends Bochs with an error; what counts is in the serial output.
timeout "$timeout_seconds" bochs -q -f "$work/bochsrc" -rc "$work/start" \
  </dev/null >"$work/bochs.out" 2>&1 || true
tr -d '\r' <"$work/serial.txt"
grep -q '^avx512 .* ok ' "$work/serial.txt" &&
  grep -q 'pybsp_selftest: exit status 0' "$work/serial.txt"

#!/bin/sh
# Boots the L2 that the image brings, with nestvmm on L1's own KVM.

usage() {
    cat <<'END'
Usage: boot-l2 [PARAMETER=VALUE]... [OPTION]... [OPTION OF nestvmm run]...

Boots an L2 with `nestvmm run --engine kvm` and ends with its status. Without --exec, L2's
console and shell are here; Ctrl-A Ctrl-A x quits.

PARAMETER=VALUE is for KVM's module (kvm_intel or kvm_amd), for example ept=0; the module is
loaded anew with all of them. Without any it stays as it is.

  --kernel FILE   L2's kernel [default: /boot/l2/linux]
  --initrd FILE   L2's initrd [default: /boot/l2/initrd]
  --append TEXT   L2's kernel command line [default: what /boot/l2/options says]
  --memory SIZE   L2's RAM [default: 256M]
  --show          print the command instead of running it
  -h, --help      this help

Everything else goes to `nestvmm run`, for example --exec 'uname -r' or --exit-stats.
END
}

fail() {
    echo "boot-l2: $*" >&2
    # What a command ends with when nestvmm could not run it: see `nestvmm run --exec`.
    exit 125
}

parameters=
while :; do
    case $1 in
    -*) break ;;
    *=*) parameters="$parameters $1"; shift ;;
    *) break ;;
    esac
done

kernel=/boot/l2/linux initrd=/boot/l2/initrd memory=256M show=
[ -e /boot/l2/options ] && read -r append </boot/l2/options
# Options of our own are taken out of the arguments; the others stay, in their order.
n=$#
while [ "$n" -gt 0 ]; do
    argument=$1 value=$2 used=1
    case $argument in
    --kernel=* | --initrd=* | --append=* | --memory=*) value=${argument#*=} ;;
    --kernel | --initrd | --append | --memory | -m)
        [ "$n" -ge 2 ] || fail "$argument needs a value"
        used=2
        ;;
    esac
    case $argument in
    -h | --help) usage; exit 0 ;;
    --show) show=echo ;;
    --kernel | --kernel=*) kernel=$value ;;
    --initrd | --initrd=*) initrd=$value ;;
    --append | --append=*) append=$value ;;
    --memory | --memory=* | -m) memory=$value ;;
    # Its value may look like one of our options.
    --exec)
        [ "$n" -ge 2 ] || fail "--exec needs a value"
        set -- "$@" --exec "$value"
        used=2
        ;;
    *) set -- "$@" "$argument" ;;
    esac
    shift $used
    n=$((n - used))
done

if grep -qw vmx /proc/cpuinfo; then
    module=kvm_intel
elif grep -qw svm /proc/cpuinfo; then
    module=kvm_amd
else
    fail 'this CPU has neither VMX nor SVM; start L1 with --vmx on'
fi
if [ -n "$parameters" ] && [ -z "$show" ] && [ -d "/sys/module/$module" ]; then
    rmmod "$module" || fail "$module can't be loaded anew while another guest uses it"
fi
if [ -z "$show" ] && ! [ -d "/sys/module/$module" ]; then
    # Unquoted: one word for each parameter.
    modprobe "$module" $parameters || fail "$module can't be loaded; see dmesg"
fi
[ -e "$kernel" ] || fail "there is no $kernel; this image was built without an L2"

exec $show nestvmm run --engine kvm --memory "$memory" --kernel "$kernel" --initrd "$initrd" --append "$append" "$@"

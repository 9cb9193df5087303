#!/bin/sh
# The first process of the demonstration guests, L1 and L2: mounts what programs expect, loads
# drivers, and KVM where the CPU has virtualization, and then does one of three things: it serves
# `nestvmm run --exec`, or runs a command of the kernel command line, or gives a shell on the
# console. When that ends, the machine is powered off.

export PATH=/sbin:/usr/sbin:/bin:/usr/bin HOME=/root SHELL=/bin/sh ENV=/etc/profile

/bin/busybox mount -t proc -o nosuid,nodev,noexec proc /proc
# Links that were not made when the image was built.
[ -e /bin/mount ] || /bin/busybox --install -s /bin
mount -t sysfs -o nosuid,nodev,noexec sysfs /sys
mount -t devtmpfs -o nosuid,mode=0755 devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts -o nosuid,noexec,gid=5,mode=0620 devpts /dev/pts
mount -t tmpfs -o nosuid,nodev tmpfs /dev/shm
mount -t tmpfs -o nosuid,nodev tmpfs /tmp
mount -t tmpfs -o nosuid,nodev,mode=0755 tmpfs /run
mount -t debugfs -o nosuid,nodev,noexec,mode=0700 debugfs /sys/kernel/debug 2>/dev/null
ln -sf /proc/self/fd /dev/fd
# l1 or l2.
read -r host </etc/hostname
level=L${host#l}
hostname "$host"
ip link set lo up 2>/dev/null

# Drivers of the PCI devices that are there, as far as they are modules.
for device in /sys/bus/pci/devices/*; do
    read -r vendor <"$device/vendor" && read -r id <"$device/device" && read -r class <"$device/class"
    case $vendor:$id:$class in
    0x1af4:0x1042:*) drivers="virtio_pci virtio_blk" ;;
    0x1af4:0x1044:*) drivers="virtio_pci virtio_rng" ;;
    *:0x010802) drivers=nvme ;;
    *) continue ;;
    esac
    for driver in $drivers; do
        modprobe "$driver" 2>/dev/null
    done
done

# Without VMX or SVM the modules would only complain, so they are not tried.
if grep -qw vmx /proc/cpuinfo; then
    modprobe kvm_intel 2>/dev/null
elif grep -qw svm /proc/cpuinfo; then
    modprobe kvm_amd 2>/dev/null
fi

cd /root
# `nestvmm run --exec` names the serial port that it is at the other end of.
if [ -n "$nestvmm_channel" ]; then
    nestvmm serve-exec "/dev/$nestvmm_channel"
    poweroff -f
fi
# nestvmm_exec="..." on the kernel command line runs a command instead of a shell.
if [ -n "$nestvmm_exec" ]; then
    sh -c "$nestvmm_exec" </dev/console
    echo "nestvmm: $level command ended with status $?"
    sync
    poweroff -f
fi

# busybox's init does what process 1 has to: poweroff and reboot ask it, and what it
# starts handles signals as usual (a background command of this script would ignore Ctrl-C).
cat >/etc/inittab <<'END'
::once:/etc/session
::ctrlaltdel:/bin/reboot
END
cat >/etc/session <<END
#!/bin/sh
echo "nestvmm: $level ready"
cd /root
setsid cttyhack sh -i
poweroff -f
END
chmod 755 /etc/session
exec init

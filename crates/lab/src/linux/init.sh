#!/bin/busybox sh
# The only program of the Linux guest: a file of random bytes in RAM, and its digest on the console, for ever.
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% ram /ram

mib=32
disk=
for word in $(cat /proc/cmdline); do
    case $word in
        lab.mib=*) mib=${word#*=} ;;
        lab.disk=*) disk=${word#*=} ;;
    esac
done

while read -r module; do
    insmod "/modules/$module" || echo "F module $module"
done < /modules/order

if [ -e /sys/class/net/eth0 ]; then
    ip link set eth0 up
    ip address add 10.0.2.15/24 dev eth0
    ping -c 1 -W 5 10.0.2.2 > /dev/null && echo "N up"
fi
if [ -n "$disk" ]; then
    mke2fs "/dev/$disk" > /dev/null 2>&1
    mount "/dev/$disk" /disk || echo "F disk"
fi

dd if=/dev/urandom of=/ram/data bs=1M count="$mib" 2> /dev/null
counter=0
while true; do
    counter=$((counter + 1))
    digest=$(md5sum < /ram/data)
    if [ -n "$disk" ]; then
        echo "$counter" > /disk/counter && sync || echo "F disk"
    fi
    echo "C $counter ${digest%% *}"
    sleep 0.2
done

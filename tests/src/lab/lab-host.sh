#!/bin/bash
# Runs in the lab host. Says that the machine is ready, waits for one line on the
# second serial port, runs /mnt/in/run from the second disk, and tells its exit code.
#
# The line: GO <seconds since 1970> <plain|terminal> <rows> <columns>
set -u
ports=/dev/virtio-ports
export HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=xterm-256color LC_ALL=C.UTF-8

for image in /usr/share/lab/images/*/; do
    tar -C "$image" -cf - . | ctr --timeout 300s image import - >/dev/null || exit 1
done
sync
stty -F /dev/ttyS1 raw -echo
exec 3</dev/ttyS1
echo LAB-READY >/dev/ttyS0

while read -r word seconds mode rows columns <&3; do
    [ "$word" = GO ] && break
done
date --set="@$seconds" >/dev/null
mount -o ro /dev/vdb /mnt/in || { echo "Cannot mount /dev/vdb" >$ports/lab.stderr; echo 255 >$ports/lab.exit; exit; }
cd /root
if [ "$mode" = terminal ]; then
    export ROWS=$rows COLUMNS=$columns
    socat -t 0.2 STDIO EXEC:/mnt/in/run,pty,setsid,ctty,stderr,sane <$ports/lab.stdin >$ports/lab.stdout 2>$ports/lab.stderr
else
    /mnt/in/run <$ports/lab.stdin >$ports/lab.stdout 2>$ports/lab.stderr
fi
code=$?
if [ -d /var/lib/lab/evidence ]; then
    tar -C /var/lib/lab/evidence -cf /dev/vdc . && sync
fi
echo "$code" >$ports/lab.exit

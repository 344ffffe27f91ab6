# Runs in the lab host after a failed test: writes an archive to standard output.
to=$(mktemp -d)
{
    ps axfww -o pid,ppid,pgid,stat,etimes,args >"$to/ps"
    journalctl --no-pager -b >"$to/journal"
    dmesg >"$to/dmesg"
    cat /proc/self/mountinfo >"$to/mountinfo"
    ip -all netns list >"$to/netns"
    ss -xap >"$to/sockets"
    for pid in $(pgrep 'bulkhead|containerd-shim'); do
        mkdir -p "$to/$pid"
        for name in cmdline status wchan stack; do cat "/proc/$pid/$name" >"$to/$pid/$name"; done
        for task in /proc/"$pid"/task/*; do echo "$task $(cat "$task/comm" "$task/wchan")"; done >"$to/$pid/tasks"
    done
    # Logs and consoles of pods; sockets and pipes stay out.
    find /run/bulkhead /var/lib/bulkhead/containers -type f -size -4M |
        tar -cf - --no-recursion -T - | tar -C "$to" -xf -
} 2>/dev/null
tar -C "$to" -cf - .

# Every operation of a file system, in the directories that are named.
import fcntl, os, sys, time

try:
    import mmap
except ImportError:
    # The smallest Python has none.
    mmap = None


def trying(call, *arguments):
    """What a file system need not have."""
    try:
        return call(*arguments)
    except OSError:
        return None


def run(*command):
    """What Python has no call for."""
    os.waitpid(child(lambda: os.execvp(command[0], command)), 0)


def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return pid


def as_somebody(work):
    def somebody():
        os.setgid(1000)
        os.setuid(1000)
        os.umask(0o027)
        work()

    os.waitpid(child(somebody), 0)


def use(top):
    os.mkdir(top)
    os.chdir(top)
    os.chmod(".", 0o777)
    fd = os.open("file", os.O_RDWR | os.O_CREAT, 0o644)
    os.write(fd, b"x" * 100_000)
    os.pwrite(fd, b"y", 7)
    os.pwritev(fd, [b"a" * 5000, b"b" * 5000], 200_000)
    os.preadv(fd, [bytearray(5000), bytearray(5000)], 0)
    os.fsync(fd)
    os.fdatasync(fd)
    os.posix_fallocate(fd, 0, 300_000)
    run("fallocate", "--punch-hole", "--offset", "4096", "--length", "4096", "file")
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    for whence in (os.SEEK_DATA, os.SEEK_HOLE):
        trying(os.lseek, fd, 0, whence)
    other = os.open("other", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    trying(os.copy_file_range, fd, other, 10_000)
    os.ftruncate(fd, 50_000)
    os.truncate("file", 60_000)
    os.fchmod(fd, 0o640)
    os.fchown(fd, 5, 6)
    os.utime("file", (1, 2))
    os.utime(fd)
    fcntl.flock(fd, fcntl.LOCK_EX)
    fcntl.flock(fd, fcntl.LOCK_UN)
    fcntl.lockf(fd, fcntl.LOCK_EX)

    def waits():
        mine = os.open("file", os.O_RDWR)
        fcntl.lockf(mine, fcntl.LOCK_EX)

    waiter = child(waits)
    time.sleep(1)
    fcntl.lockf(fd, fcntl.LOCK_UN)
    os.waitpid(waiter, 0)
    if mmap is not None:
        with mmap.mmap(fd, 4096) as memory:
            memory[0] = 1
            memory.flush()
    os.close(os.open("file", os.O_WRONLY | os.O_TRUNC))
    with open("file", "a") as appended:
        appended.write("z" * 10_000)
    trying(lambda: os.close(os.open("file", os.O_RDONLY | os.O_DIRECT)))
    os.close(os.open("file", os.O_RDONLY | os.O_NOATIME))
    os.link("file", "hard")
    os.symlink("file", "link")
    os.readlink("link")
    os.lchown("link", 7, 8)
    os.utime("link", (3, 4), follow_symlinks=False)
    os.mkdir("dir")
    os.rename("hard", "dir/moved")
    run("mv", "--exchange", "link", "dir/moved")
    os.mkfifo("fifo")
    trying(os.mknod, "device", 0o20644, os.makedev(1, 3))
    trying(os.chmod, "device", 0o600)
    trying(os.setxattr, "file", "user.one", b"1")
    trying(os.getxattr, "file", "user.one")
    trying(os.listxattr, "file")
    trying(os.removexattr, "file", "user.one")
    trying(os.setxattr, fd, "user.two", b"2")
    trying(os.getxattr, "dir", "system.posix_acl_access")
    nameless = trying(os.open, ".", os.O_TMPFILE | os.O_RDWR)
    if nameless is not None:
        # Only with a directory does Python make the call that follows links.
        here = os.open(".", os.O_RDONLY)
        path = f"/proc/self/fd/{nameless}"
        os.link(path, "named", src_dir_fd=here, follow_symlinks=True)
    os.chmod("file", 0o6777)
    os.chown("file", 1000, 1000)
    os.chmod("file", 0o6777)

    def writes():
        os.mkdir("theirs")
        os.symlink("x", "theirs/link")
        with open("file", "r+") as theirs:
            theirs.write("w")

    as_somebody(writes)
    os.statvfs(".")
    os.access("file", os.W_OK)
    os.stat("file")
    run("sync", "--file-system", "file")
    os.sync()
    for number in range(20):
        with open(f"dir/{number}", "w") as one:
            one.write("x")
    sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir("dir"))
    for number in range(20):
        os.unlink(f"dir/{number}")
    os.unlink("dir/moved")
    os.rmdir("dir")
    os.chdir("/")


for top in sys.argv[1:]:
    use(top)

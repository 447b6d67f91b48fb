#!/usr/bin/env python3
"""pydock: Docker in one Python file.

`sudo python3 pydock.py -d` is a container engine, `python3 pydock.py run ...` its client. There is nothing to install: the
Python standard library (3.8 and up) and the Linux kernel through ctypes do all of the work.

The model in a few sentences. A *daemon* (threads, HTTP) owns images, containers, networks and volumes under one data root. It
never forks a container itself: before it starts its first thread it forks a *spawner*, which stays single-threaded and forks one
*monitor* a container. The monitor owns the container's stdio: it writes the log, serves attached clients, proxies published ports
and records the exit code; it outlives the daemon. Its child is *init*, which builds the sandbox (namespaces, mounts,
capabilities) and becomes the user's command by execve. A client that attaches is handed over: the daemon passes the client's own socket to
the monitor, and is out of the way from then on.

Read the file from top to bottom, from the kernel up to the command line; a section uses only what stands above it. `/^# 5\\.` finds
section 5.

     1. Prelude       constants, errors, logging, files, sizes, times
     2. Kernel        system calls through ctypes, netlink, descriptors over sockets, fork
     3. References    image references, digests, names, id prefixes
     4. Archives      tar streams in and out of a root
     5. Storage       layers, and the union mount drivers overlay and vfs
     6. Images        configs, tags, history, import, commit, `host`, `mkimage`
     7. Registry      pull, push, login, search; save and load
     8. Cgroups       v1 and v2 behind one interface
     9. Sandbox       from spec to execve
    10. Monitor       stdio, pty, logs, attach, exit; and the spawner
    11. Network       bridges, addresses, ports, firewall, proxies, names
    12. Volumes       named volumes, binds, tmpfs
    13. Containers    the life of a container
    14. Build         the Dockerfile
    15. Engine        the stores together: start-up, recovery, events, info, prune
    16. API           routes, hijack, the dialect of 2013
    17. Client        HTTP to the daemon, raw terminal, stream demultiplexing
    18. Commands      the command line
    19. Main          roles: daemon, client
"""
import sys

if __name__ == "__main__":
    # Run as a script, often by root: only the standard library is imported, never a json.py beside the script, in the current
    # folder or on a PYTHONPATH.
    _STDLIB = ("python%d.%d" % sys.version_info[:2], "python%d%d.zip" % sys.version_info[:2])
    sys.path[:] = [p for p in sys.path if p.startswith((sys.base_prefix, sys.base_exec_prefix)) and "-packages" not in p
                   and any(name in p for name in _STDLIB)]

import contextlib
import errno
import functools
import json
import os
import re
import select
import signal
import socket
import stat
import struct
import threading
import time

########################################################################
# 1. Prelude
########################################################################
# What every section and every process uses: constants, the one error type, logging, atomic files, sizes and times.
# The client imports this file too, so nothing heavy is imported here: modules that only some roles need (ctypes, http.server,
# subprocess, tarfile, ...) are imported where they are used.

VERSION = "0.1.0"
API_VERSION, MIN_API_VERSION = "1.47", "1.24"
DEFAULT_ROOT = "/var/lib/pydock"
DEFAULT_SOCKET = "/var/run/pydock.sock"
DEFAULT_PIDFILE = "/var/run/pydock.pid"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
BLOCK = 1 << 16  # bytes moved at a time where the kernel cannot move them for us
ZERO_TIME = "0001-01-01T00:00:00Z"  # what Go prints for a time that never was


class Error(Exception):
    """What went wrong, as a sentence for a person, and the HTTP status it has in the API. Any depth raises it; only the API,
    the client's main and a fork's report turn it into output."""
    status = 500

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status or self.status


class BadRequest(Error):
    status = 400


class Unauthorized(Error):
    status = 401


class Forbidden(Error):
    status = 403


class NotFound(Error):
    status = 404


class Conflict(Error):
    status = 409


class NotModified(Error):
    status = 304


class Unavailable(Error):
    status = 503


ERRORS = {cls.status: cls for cls in (BadRequest, Unauthorized, Forbidden, NotFound, Conflict, NotModified, Unavailable, Error)}


def error_from(status, message):
    """The error of that HTTP status: how an error crosses a process border."""
    return ERRORS.get(status, Error)(message, status)


def os_error_text(error):
    """`No space left on device: /x`: an OSError without Python's `[Errno 28]`."""
    text = error.strerror or str(error)
    return "%s: %s" % (text, os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes)) else text


class Log:
    """The daemon's log: one line a message on stderr. `debug` lines only with -D."""
    debugging = False

    @staticmethod
    def write(level, message):
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        line = "%s.%03dZ %s %s\n" % (stamp, now % 1 * 1000, level, printable(message))
        with contextlib.suppress(OSError, ValueError):
            os.write(2, line.encode("utf-8", "replace"))


def info(message):
    Log.write("info", message)


def warn(message):
    Log.write("warning", message)


def debug(message):
    if Log.debugging:
        Log.write("debug", message)


def debug_traceback():
    """The traceback of the exception being handled goes to the log with -D, and never to a client."""
    if Log.debugging:
        import traceback
        debug(traceback.format_exc().replace("\n", "\n\t"))


def printable(text):
    """Text from outside made safe for a terminal: control characters but tab and newline appear as \\x1b."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: "\\x%02x" % ord(m.group()), str(text))


# -- files ------------------------------------------------------------------------------------------------------------------

def read_file(path, default=None):
    """A file's bytes; `default`, when given, where there is no such file."""
    try:
        with open(path, "rb", buffering=0) as f:
            return f.read()
    except (FileNotFoundError, NotADirectoryError):
        if default is None:
            raise
        return default


def write_file(path, data, mode=0o600, sync=True):
    """Write bytes or text so that under `path` there is always the whole old or the whole new content, also after a power cut
    (sync: before the return). One writer a path at a time."""
    if isinstance(data, str):
        data = data.encode("utf-8", "surrogateescape")
    new = os.fspath(path) + ".new"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    try:
        write_all(fd, data)
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(new, path)
    if sync:
        sync_folder(os.path.dirname(path))


def sync_folder(path):
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_all(fd, data):
    """Write all of data to a blocking descriptor: os.write may take less."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def read_json(path, default=None):
    """The object in a JSON file; `default` where the file is missing. A file that is no JSON is an error that names it."""
    try:
        data = read_file(path)
    except (FileNotFoundError, NotADirectoryError):
        if default is None:
            raise
        return default
    try:
        return json.loads(data)
    except ValueError as error:
        raise Error("%s is damaged: %s" % (path, error))


def read_unsynced_json(path):
    """read_json of a file that is written without sync: {} where the power cut has left nothing of it, or half."""
    try:
        return read_json(path, {})
    except Error as error:
        warn(str(error))
        return {}


def write_json(path, value, mode=0o600, sync=True):
    write_file(path, json.dumps(value), mode, sync)


def remove_tree(path):
    """Remove a file or a folder with all in it, never across a mount point and never through a symlink. Missing is fine."""
    parent, name = os.path.split(os.fspath(path))
    with contextlib.suppress(FileNotFoundError):
        fd = os.open(parent or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            remove_at(fd, name, os.lstat(path).st_dev)
        finally:
            os.close(fd)


def remove_at(parent, name, device):
    """remove_tree of a name in an open folder, on that device. However deep a container has nested folders, it takes two
    descriptors: what lies below the first level is moved up before it is emptied."""
    if not _unlink_at(parent, name):
        _empty_folder(parent, name, device)
        os.rmdir(name, dir_fd=parent)


def _unlink_at(parent, name):
    """Unlink a name; False where it is a folder."""
    try:
        os.unlink(name, dir_fd=parent)
        return True
    except IsADirectoryError:
        return False
    except PermissionError:  # some file systems say EPERM for a folder; or the file is immutable
        if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
            raise
        return False


def _empty_folder(parent, name, device):
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    moved = 0
    try:
        names = os.listdir(fd)
        while names:
            child = names.pop()
            if _unlink_at(fd, child):
                continue
            with contextlib.suppress(OSError):  # most folders are empty, or hold only files: no need to move anything
                os.rmdir(child, dir_fd=fd)
                continue
            inner = os.open(child, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            try:
                if os.fstat(inner).st_dev != device:
                    raise Error("%s is a mount point: unmount it first" % os.readlink("/proc/self/fd/%d" % inner))
                for grandchild in os.listdir(inner):
                    if not _unlink_at(inner, grandchild):
                        moved += 1
                        names.append(".removing-%d-%s" % (moved, os.urandom(4).hex()))
                        os.rename(grandchild, names[-1], src_dir_fd=inner, dst_dir_fd=fd)
            finally:
                os.close(inner)
            os.rmdir(child, dir_fd=fd)
    finally:
        os.close(fd)


# -- sizes and times --------------------------------------------------------------------------------------------------------

def parse_size(text):
    """`64m`, `1.5g`, `512` to bytes; the units are powers of 1024 as in docker's units.RAMInBytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kKmMgGtTpP]?)(?:[iI]?[bB])?", str(text).strip())
    if not match:
        raise BadRequest("invalid size: '%s'" % text)
    return int(float(match.group(1)) * 1024 ** " kmgtp".index(match.group(2).lower() or " "))


def _scaled(size, base, units):
    size, unit = float(size), 0
    while size >= base and unit < len(units) - 1:
        size, unit = size / base, unit + 1
    return size, units[unit]


def format_size(size):
    """Bytes as docker prints them: 4 significant digits, powers of 1000: `24.65kB`."""
    return "%.4g%s" % _scaled(size, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def format_binary_size(size):
    """Bytes in powers of 1024, 4 significant digits: `1.944GiB`."""
    return "%.4g%s" % _scaled(size, 1024.0, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"))


_GO_UNITS = {"ns": 1, "us": 1000, "\u00b5s": 1000, "ms": 10 ** 6, "s": 10 ** 9, "m": 60 * 10 ** 9, "h": 3600 * 10 ** 9}


def parse_duration(text):
    """A Go duration (`1h30m`, `1.5s`, `300ms`) to nanoseconds."""
    parts = re.findall(r"(\d+(?:\.\d*)?)(ns|us|\u00b5s|ms|s|m|h)", text)
    if not parts or "".join(n + u for n, u in parts) != text.lstrip("+-"):
        raise BadRequest('time: invalid duration "%s"' % text)
    total = sum(int(float(number) * _GO_UNITS[unit]) for number, unit in parts)
    return -total if text.startswith("-") else total


def format_time(ns):
    """Nanoseconds since 1970 to RFC 3339 with all digits that count, as Go writes times; 0 is Go's zero time."""
    if not ns:
        return ZERO_TIME
    seconds, fraction = divmod(ns, 10 ** 9)
    text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    return text + (".%09d" % fraction).rstrip("0").rstrip(".") + "Z"


def parse_time(text):
    """RFC 3339 (also a bare date, or without zone: UTC), or unix seconds with fraction, to nanoseconds."""
    text = str(text).strip()
    if re.fullmatch(r"\d+(\.\d+)?", text):
        seconds, _, fraction = text.partition(".")
        return int(seconds) * 10 ** 9 + int((fraction + "0" * 9)[:9])
    match = re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)(?:[Tt ](\d\d):(\d\d)(?::(\d\d)(?:\.(\d+))?)?)?([Zz]|[+-]\d\d:?\d\d)?", text)
    if not match:
        raise BadRequest('invalid time "%s": use RFC 3339, unix seconds, or a duration such as 10m' % text)
    import calendar
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    fraction, zone = match.group(7) or "", match.group(8) or "Z"
    offset = 0 if zone in "Zz" else int(zone[0] + "60") * int(zone[1:3]) + int(zone[0] + zone[-2:])
    if year == 1:
        return 0
    return (calendar.timegm((year, month, day, hour, minute, second)) - offset * 60) * 10 ** 9 + int((fraction + "0" * 9)[:9])


def parse_since(text):
    """What --since and --until take: a time as above, or a Go duration back from now. Nanoseconds since 1970."""
    try:
        return parse_time(text)
    except BadRequest:
        with contextlib.suppress(BadRequest):
            return time.time_ns() - parse_duration(text)
        raise


# (up to this many seconds, divided by, words): docker's units.HumanDuration
_AGES = ((1, 1, "Less than a second"), (2, 1, "1 second"), (60, 1, "%d seconds"), (120, 60, "About a minute"), (3600, 60, "%d minutes"),
         (5400, 3600, "About an hour"), (172800, 3600, "%d hours"), (1209600, 86400, "%d days"), (5184000, 604800, "%d weeks"),
         (63072000, 2592000, "%d months"))


def format_age(seconds):
    """`About a minute`, `3 weeks`: how docker says how long ago."""
    for limit, unit, words in _AGES:
        if seconds < limit:
            number = int(seconds / unit + (0.5 if unit == 3600 else 0))
            return words % number if "%" in words else words
    return "%d years" % (seconds // 31536000)


########################################################################
# 2. Kernel
########################################################################
# What Python's `os` does not have in 3.8: each system call is a short wrapper that raises OSError with the call's name and path.
# All processes but the client use it, so ctypes is loaded at the first call and not before. Nothing else in the file touches ctypes.

# clone(2) flags, for unshare and setns; the names under /proc/PID/ns
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000)
# mount(2)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME, MS_BIND, MS_MOVE, MS_REC = 1, 2, 4, 8, 32, 1024, 4096, 8192, 16384
MS_UNBINDABLE, MS_PRIVATE, MS_SLAVE, MS_SHARED, MS_RELATIME, MS_STRICTATIME = 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21, 1 << 24
MNT_DETACH = 2
# open_tree(2), move_mount(2), openat2(2), mount_setattr(2)
OPEN_TREE_CLONE, AT_RECURSIVE, AT_EMPTY_PATH, AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH, MOVE_MOUNT_T_EMPTY_PATH = 1, 0x8000, 0x1000, -100, 4, 0x40
RESOLVE_NO_MAGICLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 2, 8, 16
# prctl(2)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER = 1, 4, 8, 22, 24, 36
PR_SET_NO_NEW_PRIVS, PR_CAP_AMBIENT, PR_SET_NAME = 38, 47, 15
SPLICE_F_MOVE, SPLICE_F_NONBLOCK = 1, 2
# statfs(2) f_type
OVERLAYFS_MAGIC, PROC_MAGIC, SYSFS_MAGIC, DEVPTS_MAGIC, CGROUP2_MAGIC, TMPFS_MAGIC = (
    0x794C7630, 0x9FA0, 0x62656572, 0x1CD1, 0x63677270, 0x01021994)

# Calls newer than many a libc; from 424 on a call has the same number on every machine that matters.
_NUMBERS = {"pidfd_send_signal": 424, "open_tree": 428, "move_mount": 429, "pidfd_open": 434, "close_range": 436, "openat2": 437,
            "mount_setattr": 442}
_KEYCTL = {"x86_64": 250, "i686": 288, "i386": 288, "armv7l": 311, "ppc64le": 271, "s390x": 280}  # others: asm-generic's 219


@functools.lru_cache(None)
def _libc():
    import ctypes
    return ctypes, ctypes.CDLL(None, use_errno=True)


def _call(name, *args, path=None):
    """Call the C library's function, or the kernel's where the library has none; -1 raises OSError."""
    ctypes, libc = _libc()
    # Numbers go as long: ctypes' default int would cut 64-bit values on some machines.
    args = [ctypes.c_long(a) if isinstance(a, int) else os.fsencode(a) if isinstance(a, str) else a for a in args]
    number = _NUMBERS.get(name)
    result = libc.syscall(ctypes.c_long(number), *args) if number else getattr(libc, name)(*args)
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, "%s: %s" % (name, os.strerror(code)), path)
    return result


def unshare(flags):
    _call("unshare", flags)


def setns(fd, flags=0):
    _call("setns", fd, flags)


def mount(source, target, kind=None, flags=0, data=None):
    """mount(2); `data` is the options string."""
    _call("mount", source, target, kind, flags, data, path=target)


def umount(target, flags=MNT_DETACH):
    _call("umount2", target, flags, path=target)


def pivot_root(new, old):
    _call("pivot_root", new, old, path=new)


def open_tree(path, flags=OPEN_TREE_CLONE, dir_fd=AT_FDCWD):
    """A descriptor of a (cloned, detached) mount of path: open_tree(2), Linux 5.2."""
    return _call("open_tree", dir_fd, path, flags | os.O_CLOEXEC, path=path)


def move_mount(fd, target_fd):
    """Attach a detached mount on top of what target_fd refers to: no path is looked up, so no symlink can redirect it."""
    _call("move_mount", fd, b"", target_fd, b"", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)


def prctl(option, *args):
    return _call("prctl", option, *(args + (0,) * (4 - len(args))))


def openat2(dir_fd, path, flags, resolve, mode=0):
    """openat2(2), Linux 5.6: open path with the kernel confining how it is resolved."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, mode, resolve)
    return _call("openat2", dir_fd, path, how, len(how), path=path)


def pidfd_open(pid):
    """A descriptor that stays this very process, readable when it has ended (Linux 5.3)."""
    return _call("pidfd_open", pid, 0)


def pidfd_send_signal(fd, number):
    _call("pidfd_send_signal", fd, number, None, 0)


def close_from(lowest):
    """Close every descriptor from `lowest` up."""
    try:
        _call("close_range", lowest, 0x7FFFFFFF, 0)
    except OSError:  # Linux before 5.9
        for name in os.listdir("/proc/self/fd"):
            if int(name) >= lowest:
                with contextlib.suppress(OSError):
                    os.close(int(name))


def close_all_but(keep):
    """Close every descriptor from 3 up but those in `keep`."""
    lowest = 3
    for fd in sorted(fd for fd in keep if fd >= 3):
        if fd > lowest:
            for other in range(lowest, fd):
                with contextlib.suppress(OSError):
                    os.close(other)
        lowest = fd + 1
    close_from(lowest)


def mount_setattr(fd, read_only, propagation, recursive=True):
    """Set read-only and propagation (MS_PRIVATE, MS_SLAVE, MS_SHARED or 0) of a mount given by descriptor: Linux 5.12."""
    attributes = struct.pack("=QQQQ", MS_RDONLY if read_only else 0, 0, propagation, 0)
    _call("mount_setattr", fd, b"", AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0), attributes, len(attributes))


def splice(source, target, size, flags=SPLICE_F_MOVE):
    """Move bytes between two descriptors, one of them a pipe, without copying them. Returns how many; 0 is the end."""
    return _call("splice", source, None, target, None, size, flags)


def syncfs(fd):
    _call("syncfs", fd)


def malloc_trim():
    """Give free heap pages back to the system, where this C library can."""
    ctypes, libc = _libc()
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def set_capabilities(effective, permitted, inheritable):
    """capset(2) of this thread; the sets are bit masks by capability number."""
    header = struct.pack("=Ii", 0x20080522, 0)
    words = [mask >> shift & 0xFFFFFFFF for shift in (0, 32) for mask in (effective, permitted, inheritable)]
    _call("capset", header, struct.pack("=6I", *words))


def new_session_keyring():
    """A keyring of its own, so that a container does not see the host session's keys: keyctl(2) KEYCTL_JOIN_SESSION_KEYRING."""
    ctypes, libc = _libc()
    libc.syscall(ctypes.c_long(_KEYCTL.get(os.uname().machine, 219)), ctypes.c_long(1), None)


def file_system_type(path_or_fd):
    """f_type of statfs(2), the magic number of the file system that holds the path."""
    ctypes, libc = _libc()
    buffer = ctypes.create_string_buffer(256)
    if isinstance(path_or_fd, int):
        _call("fstatfs", path_or_fd, buffer)
    else:
        _call("statfs", path_or_fd, buffer, path=path_or_fd)
    return struct.unpack_from("=Q" if ctypes.sizeof(ctypes.c_long) == 8 else "=I", buffer.raw)[0] & 0xFFFFFFFF


def seccomp_filter(program):
    """Install a seccomp filter: `program` is the array of struct sock_filter as bytes."""
    ctypes, _ = _libc()
    code = ctypes.create_string_buffer(program, len(program))
    fprog = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    prctl(PR_SET_SECCOMP, 2, ctypes.create_string_buffer(fprog, len(fprog)))


def set_process_title(title):
    """What ps shows: written over the argument area of this process, as far as it and the environment behind it reach."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = read_file("/proc/self/stat").rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[48])  # arg_start, env_end: fields 48 and 51 of proc(5)
        ctypes, _ = _libc()
        text = os.fsencode(title)[:end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))
        prctl(PR_SET_NAME, os.fsencode(title)[:15])


def stat_start_time(pid):
    """When a process began, in clock ticks since boot: with the pid it names one process for good. None when there is none."""
    try:
        return int(read_file("/proc/%d/stat" % pid).rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def inotify_watch(path):
    """A descriptor that is readable when the file at path was written to or moved: inotify(7)."""
    fd = _call("inotify_init1", os.O_CLOEXEC)
    try:
        _call("inotify_add_watch", fd, path, 0x2 | 0x800 | 0x400, path=path)  # IN_MODIFY, IN_MOVE_SELF, IN_DELETE_SELF
    except OSError:
        os.close(fd)
        raise
    return fd


# -- paths inside a root that somebody else writes ----------------------------------------------------------------------------

def open_in_root(root_fd, path, flags, mode=0):
    """Open path as a process whose root is root_fd would: symlinks, absolute ones too, and `..` stay inside (openat2
    RESOLVE_IN_ROOT; before Linux 5.6 a walk of our own)."""
    try:
        return openat2(root_fd, path.lstrip("/") or ".", flags, RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS,
                       mode if flags & (os.O_CREAT | getattr(os, "O_TMPFILE", 0)) else 0)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
    return _walk_in_root(root_fd, path, flags, mode)


def _walk_in_root(root_fd, path, flags, mode):
    """open_in_root, one component at a time, never through a symlink that the kernel would follow."""
    stack, links = [os.dup(root_fd)], 0
    try:
        names = [n for n in reversed(path.split("/")) if n not in ("", ".")]
        while names:
            name = names.pop()
            if name == "..":
                if len(stack) > 1:
                    os.close(stack.pop())
                continue
            try:
                target = os.readlink(name, dir_fd=stack[-1])
            except OSError:
                target = None
            if target is not None and (names or not flags & os.O_NOFOLLOW):
                links += 1
                if links > 40:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
                if target.startswith("/"):
                    while len(stack) > 1:
                        os.close(stack.pop())
                names += [n for n in reversed(target.split("/")) if n not in ("", ".")]
                continue
            last = not names
            stack.append(os.open(name, (flags if last else os.O_PATH | os.O_DIRECTORY) | os.O_NOFOLLOW | os.O_CLOEXEC, mode,
                                 dir_fd=stack[-1]))
        if len(stack) == 1:
            return os.open(".", flags | os.O_CLOEXEC, mode, dir_fd=root_fd)
        return stack.pop()
    finally:
        for fd in stack:
            os.close(fd)


# -- messages with descriptors ------------------------------------------------------------------------------------------------

def send_message(connection, message, fds=()):
    """Send a JSON object, and descriptors with it, over a unix stream socket. Length first; the descriptors ride on it."""
    import array
    data = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([struct.pack("=I", len(data))], rights)
    connection.sendall(data)


def receive_message(connection, most_fds=64):
    """(object, descriptors) as send_message sent them; (None, []) at the end of the stream."""
    import array
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(most_fds * 4), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[:len(data) - len(data) % 4])
    if not head:
        return None, []
    head += _receive_exactly(connection, 4 - len(head))
    return json.loads(_receive_exactly(connection, struct.unpack("=I", head)[0])), list(fds)


def _receive_exactly(connection, size):
    parts = []
    while size:
        part = connection.recv(min(size, 1 << 20))
        if not part:
            raise Error("the process at the other end closed the connection in the middle of a message")
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# -- bpf: programs in the kernel -------------------------------------------------------------------------------------------------

# bpf(2), where asm-generic's 280 does not hold
_BPF = {"x86_64": 321, "i686": 357, "i386": 357, "armv7l": 386, "armv6l": 386, "ppc64le": 361, "ppc64": 361, "s390x": 351}
_BPF_MAP_CREATE, _BPF_MAP_UPDATE_ELEM, _BPF_PROG_LOAD, _BPF_PROG_ATTACH, _BPF_LINK_CREATE = 0, 2, 5, 8, 28
_BPF_PROG_TYPE_CGROUP_DEVICE, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI = 15, 6, 2
_BPF_PROG_TYPE_SK_LOOKUP, _BPF_SK_LOOKUP, _BPF_MAP_TYPE_SOCKMAP = 30, 36, 15


def _bpf(command, attributes):
    """bpf(2) with a union bpf_attr given as bytes."""
    ctypes, libc = _libc()
    buffer = ctypes.create_string_buffer(attributes, max(len(attributes), 72))
    result = libc.syscall(ctypes.c_long(_BPF.get(os.uname().machine, 280)), ctypes.c_long(command), buffer,
                          ctypes.c_long(len(buffer)))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, "bpf: %s" % os.strerror(code))
    return result


def bpf_instruction(code, target=0, source=0, offset=0, value=0):
    """struct bpf_insn: the two registers share a byte, whose halves are swapped on big-endian machines."""
    registers = target | source << 4 if sys.byteorder == "little" else target << 4 | source
    return struct.pack("=BBhi", code, registers, offset, value)


def _load_program(kind, program, name, attach_type=0):
    ctypes, _ = _libc()
    code, licence = ctypes.create_string_buffer(program, len(program)), ctypes.create_string_buffer(b"MIT")
    return _bpf(_BPF_PROG_LOAD, struct.pack("=IIQQIIQII16sII", kind, len(program) // 8, ctypes.addressof(code),
                                            ctypes.addressof(licence), 0, 0, 0, 0, 0, name, 0, attach_type))


def load_device_filter(program):
    """A descriptor of a program (array of struct bpf_insn as bytes) that decides on the use of devices
    (BPF_PROG_TYPE_CGROUP_DEVICE, Linux 4.15)."""
    return _load_program(_BPF_PROG_TYPE_CGROUP_DEVICE, program, b"pydock_devices")


def attach_device_filter(folder, program_fd):
    """Let a program of load_device_filter rule over the control group (version 2) at the path `folder`."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _bpf(_BPF_PROG_ATTACH, struct.pack("=IIII", fd, program_fd, _BPF_CGROUP_DEVICE, _BPF_F_ALLOW_MULTI))
    finally:
        os.close(fd)


def steer_to_sockets(address, port, udp, tcp):
    """Let what is sent to an IPv4 address and port in this network namespace go to two sockets of it that are bound elsewhere,
    whoever is bound there. Returns a descriptor: it holds as long as that is open. BPF_PROG_TYPE_SK_LOOKUP, Linux 5.9."""
    ctypes, _ = _libc()
    fds = [_bpf(_BPF_MAP_CREATE, struct.pack("=IIIII", _BPF_MAP_TYPE_SOCKMAP, 4, 8, 2, 0))]
    try:
        for number, member in enumerate((udp, tcp)):
            key = ctypes.create_string_buffer(struct.pack("=I", number), 4)
            value = ctypes.create_string_buffer(struct.pack("=Q", member.fileno()), 8)
            _bpf(_BPF_MAP_UPDATE_ELEM, struct.pack("=IIQQQ", fds[0], 0, ctypes.addressof(key), ctypes.addressof(value), 0))
        program = _steering_program(fds[0], address, port)
        fds.append(_load_program(_BPF_PROG_TYPE_SK_LOOKUP, program, b"pydock_steer", _BPF_SK_LOOKUP))
        fds.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        return _bpf(_BPF_LINK_CREATE, struct.pack("=IIII", fds[1], fds[2], _BPF_SK_LOOKUP, 0))
    finally:
        for fd in fds:
            os.close(fd)


def _steering_program(map_fd, address, port):
    """Its context is struct bpf_sk_lookup, kept in register 6: protocol at 12, local_ip4 at 40 (network order), local_port at 60
    (host order). Calls: 1 map lookup, 124 sk_assign, 86 sk_release."""
    wanted = struct.unpack("=i", socket.inet_aton(address))[0]
    load, copy, set_value, store, add, call, leave = 0x61, 0xBF, 0xB4, 0x63, 0x07, 0x85, 0x95
    jump_unless, jump_if, map_address = 0x55, 0x15, 0x18
    body = [(copy, 6, 1), (load, 2, 6, 60), (jump_unless, 2, 0, "end", port), (load, 2, 6, 40),
            (jump_unless, 2, 0, "end", wanted), (load, 2, 6, 12), (set_value, 3, 0, 0, 0),
            (jump_if, 2, 0, 1, socket.IPPROTO_UDP), (set_value, 3, 0, 0, 1),
            (store, 10, 3, -4), (copy, 2, 10), (add, 2, 0, 0, -4), (map_address, 1, 1, 0, map_fd), (0,),
            (call, 0, 0, 0, 1), (jump_if, 0, 0, "end", 0), (copy, 7, 0), (copy, 1, 6), (copy, 2, 0), (set_value, 3, 0, 0, 0),
            (call, 0, 0, 0, 124), (copy, 1, 7), (call, 0, 0, 0, 86), (set_value, 0, 0, 0, 1), (leave,)]
    end = len(body) - 2
    return b"".join(bpf_instruction(*(end - place - 1 if part == "end" else part for part in instruction))
                    for place, instruction in enumerate(body))


# -- netlink ------------------------------------------------------------------------------------------------------------------
# Interfaces, addresses and routes by rtnetlink(7): what `ip` does, without starting a program for it and on hosts that have none.

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 16, 17, 18, 20, 21, 22
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26
_NLM_REQUEST, _NLM_ACK, _NLM_DUMP, _NLM_DUMP_INTR, _NLM_CREATE_EXCL = 1, 4, 0x300, 0x10, 0x600
_NLMSG_ERROR, _NLMSG_DONE, _SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 2, 3, 270, 10, 11
_IFF_UP = 1
# struct rtnl_link_stats64 begins so (if_link.h); the names are those of docker's /stats
_LINK_COUNTERS = ("rx_packets", "tx_packets", "rx_bytes", "tx_bytes", "rx_errors", "tx_errors", "rx_dropped", "tx_dropped")


def _attribute(kind, *values):
    """A netlink attribute: an int is 32 bits, text ends with a NUL, bytes and nested attributes go as they are."""
    payload = b"".join(struct.pack("=I", v) if isinstance(v, int) else os.fsencode(v) + b"\0" if isinstance(v, str) else v
                       for v in values)
    return struct.pack("=HH", len(payload) + 4, kind) + payload + b"\0" * (-len(payload) % 4)


def _attributes(data, start=0):
    """{kind: bytes} of the attributes in a message from `start` on."""
    found = {}
    while start + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, start)
        if size < 4:
            break
        found[kind & 0x3FFF] = data[start + 4:start + size]
        start += size + 3 & ~3
    return found


def pack_address(text):
    """(family, bytes) of an IPv4 or IPv6 address in text."""
    family = socket.AF_INET6 if ":" in text else socket.AF_INET
    return family, socket.inet_pton(family, text)


def pack_mac(text):
    return bytes.fromhex(text.replace(":", ""))


def format_mac(data):
    return ":".join("%02x" % byte for byte in data)


def _split_prefix(text):
    """`10.0.0.1/24` to (family, bytes, 24); without a slash all bits."""
    address, slash, length = text.partition("/")
    family, packed = pack_address(address)
    return family, packed, int(length) if slash else len(packed) * 8


class Netlink:
    """A socket to the network configuration of the namespace in which it is made. What changes something is queued, goes out in
    one send with `run` or at the end of the `with` block, and is acknowledged message by message: the kernel tries all of them,
    and OSError says what the first that failed was about. What asks runs the queue first and answers at once. An interface is
    given by name or, as an int, by index."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        for option in (_NETLINK_CAP_ACK, _NETLINK_EXT_ACK):
            with contextlib.suppress(OSError):  # Linux before 4.3, 4.12
                self.socket.setsockopt(_SOL_NETLINK, option, 1)
        self.queue, self.sequence = [], 0  # [(message, what it is about)]; the number of the last message sent

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.run()
        finally:
            self.socket.close()

    def close(self):
        self.socket.close()

    # what changes something

    def add_bridge(self, name, mac=None, mtu=0):
        """A new bridge, without forwarding delay: no spanning tree runs on it. With a `mac` of its own it keeps it; else it takes
        the lowest of its ports', and changes it whenever a container comes or goes."""
        data = _attribute(2, _attribute(1, 0))  # IFLA_INFO_DATA: IFLA_BR_FORWARD_DELAY
        attributes = (_attribute(1, pack_mac(mac)) if mac else b"") + (_attribute(4, mtu) if mtu else b"")
        self._add_link("add bridge %s" % name, name, _attribute(1, "bridge") + data, attributes)

    def add_veth(self, name, peer, pid=None, netns=None, mac=None, mtu=0, master=None):
        """A pair of interfaces: `name` here, made part of the bridge `master`, and `peer` with the address `mac` in the namespace
        of the process `pid` or of the descriptor `netns` (neither: here too)."""
        size = _attribute(4, mtu) if mtu else b""  # IFLA_MTU
        other = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + _attribute(3, peer) + size + self._namespace(pid, netns)
        if mac:
            other += _attribute(1, pack_mac(mac))
        here = size + (_attribute(10, self.index(master)) if master else b"")  # IFLA_MASTER
        self._add_link("add veth %s" % name, name, _attribute(1, "veth") + _attribute(2, _attribute(1, other)), here)

    def set_link(self, link, up=None, mtu=None, master=None, name=None, mac=None, pid=None, netns=None):
        """Change an interface; master "" takes it out of its bridge. Name and namespace can be changed only while it is down."""
        attributes = self._namespace(pid, netns)
        for kind, value in ((4, mtu), (10, master if not master else self.index(master)), (1, mac and pack_mac(mac))):
            if value is not None:
                attributes += _attribute(kind, value or 0)
        if name is not None:
            link = self.index(link)  # IFLA_IFNAME would be taken for who is meant
            attributes += _attribute(3, name)
        flags = (0, 0) if up is None else (_IFF_UP if up else 0, _IFF_UP)
        self._queue("set %s" % link, _RTM_NEWLINK, 0, self._link(link, *flags) + attributes)

    def set_hairpin(self, link, on=True):
        """Let a port of a bridge send frames back to where they came from: a container then reaches itself through its own
        published port."""
        # IFLA_INFO_SLAVE_KIND, IFLA_INFO_SLAVE_DATA: IFLA_BRPORT_MODE
        data = _attribute(4, "bridge") + _attribute(5, _attribute(4, b"\1" if on else b"\0"))
        self._queue("set hairpin on %s" % link, _RTM_NEWLINK, 0, self._link(link) + _attribute(18, data))

    def delete_link(self, link):
        self._queue("delete %s" % link, _RTM_DELLINK, 0, self._link(link))

    def add_address(self, link, address):
        """Give an interface an address with prefix length: `10.0.0.1/24`."""
        self._address(_RTM_NEWADDR, _NLM_CREATE_EXCL, "add %s to %s" % (address, link), link, address)

    def delete_address(self, link, address):
        self._address(_RTM_DELADDR, 0, "delete %s from %s" % (address, link), link, address)

    def add_route(self, network=None, gateway=None, link=None):
        """A route to `network` (`10.0.0.0/24`; None: the default route), by a gateway or straight out of an interface."""
        family, packed, prefix = _split_prefix(network or ("::/0" if ":" in (gateway or "") else "0.0.0.0/0"))
        # table main, protocol boot, scope universe by a gateway and link without, type unicast
        body = struct.pack("=8BI", family, prefix, 0, 0, 254, 3, 0 if gateway else 253, 1, 0)
        body += _attribute(1, packed) if prefix else b""
        body += _attribute(5, pack_address(gateway)[1]) if gateway else b""
        body += _attribute(4, self.index(link)) if link else b""
        self._queue("add route to %s" % (network or "default"), _RTM_NEWROUTE, _NLM_CREATE_EXCL, body)

    # what asks

    def index(self, link):
        """The index of an interface; OSError ENODEV where there is none."""
        return link if isinstance(link, int) else self.link(link)["index"]

    def link(self, link):
        """One interface, as `links` has them; OSError ENODEV where there is none."""
        try:
            return self._ask("interface %s" % link, _RTM_GETLINK, 0, self._link(link), self._parse_link)[0]
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ERANGE):  # a name that no interface can have
                raise
            raise OSError(errno.ENODEV, "interface %s: %s" % (link, os.strerror(errno.ENODEV)))

    def links(self):
        """All interfaces: [{index, name, mac, mtu, up, master (index), kind, statistics}]."""
        return self._ask("list interfaces", _RTM_GETLINK, _NLM_DUMP, self._link(0), self._parse_link)

    def addresses(self, link=None):
        """[{index, address, prefix}] of one or all interfaces, IPv4 and IPv6."""
        wanted = self.index(link) if link is not None else None
        found = self._ask("list addresses", _RTM_GETADDR, _NLM_DUMP, struct.pack("=BBBBi", 0, 0, 0, 0, 0), self._parse_address)
        return [address for address in found if wanted in (None, address["index"])]

    def routes(self, family=socket.AF_INET):
        """The main routing table: [{network (None: default), gateway, index}]."""
        found = self._ask("list routes", _RTM_GETROUTE, _NLM_DUMP, struct.pack("=8BI", family, *(0,) * 8), self._parse_route)
        return [route for route in found if route]

    def run(self):
        """Send what is queued and wait for the answers."""
        while self.queue:  # 64 messages stay well below the socket's buffer
            part, self.queue = self.queue[:64], self.queue[64:]
            first = self.sequence + 1
            self.socket.send(b"".join(self._message(*message) for message, _ in part))
            failed = {}
            answered = 0
            while answered < len(part):
                for kind, sequence, _, body in self._receive():
                    if kind == _NLMSG_ERROR and sequence >= first:
                        answered += 1
                        self._note_error(body, part[sequence - first][1], failed, sequence)
            if failed:
                self.queue = []
                raise failed[min(failed)]

    # how

    def _queue(self, about, kind, flags, body):
        self.queue.append(((kind, _NLM_REQUEST | _NLM_ACK | flags, body), about))

    def _message(self, kind, flags, body):
        self.sequence += 1
        return struct.pack("=IHHII", len(body) + 16, kind, flags, self.sequence, 0) + body + b"\0" * (-len(body) % 4)

    def _receive(self):
        """The messages of one datagram: [(type, sequence, flags, body)]."""
        data, start, messages = self.socket.recv(1 << 18), 0, []
        while start + 16 <= len(data):
            size, kind, flags, sequence, _ = struct.unpack_from("=IHHII", data, start)
            messages.append((kind, sequence, flags, data[start + 16:start + size]))
            start += size + 3 & ~3
        return messages

    def _note_error(self, body, about, failed, sequence):
        code = -struct.unpack_from("=i", body)[0]
        if code:
            reason = _attributes(body, 20).get(1, b"").rstrip(b"\0").decode("utf-8", "replace")  # NLMSGERR_ATTR_MSG
            failed[sequence] = OSError(code, "%s: %s" % (about, os.strerror(code) + (" (%s)" % reason if reason else "")))

    def _ask(self, about, kind, flags, body, parse):
        self.run()
        while True:
            self.socket.send(self._message(kind, _NLM_REQUEST | flags, body))
            found, failed, whole, done = [], {}, True, False
            while not done:
                for answer, sequence, answer_flags, data in self._receive():
                    if sequence != self.sequence:
                        continue
                    whole = whole and not answer_flags & _NLM_DUMP_INTR
                    done = answer in (_NLMSG_ERROR, _NLMSG_DONE) or not flags
                    if answer == _NLMSG_ERROR:
                        self._note_error(data, about, failed, sequence)
                    elif answer != _NLMSG_DONE:
                        found.append(parse(data))
            if failed:
                raise failed[sequence]
            if whole:  # else the table changed while it was read: again
                return found

    def _link(self, link, flags=0, change=0):
        """struct ifinfomsg and, where the interface is given by name, that name."""
        if isinstance(link, int):
            return struct.pack("=BxHiII", 0, 0, link, flags, change)
        return struct.pack("=BxHiII", 0, 0, 0, flags, change) + _attribute(3, link)

    def _add_link(self, about, name, info, attributes):
        self._queue(about, _RTM_NEWLINK, _NLM_CREATE_EXCL, self._link(name) + attributes + _attribute(18, info))  # IFLA_LINKINFO

    def _namespace(self, pid, netns):
        if netns is not None:
            return _attribute(28, netns)  # IFLA_NET_NS_FD
        return _attribute(19, pid) if pid is not None else b""  # IFLA_NET_NS_PID

    def _address(self, kind, flags, about, link, address):
        family, packed, prefix = _split_prefix(address)
        body = struct.pack("=BBBBi", family, prefix, 0, 0, self.index(link)) + _attribute(2, packed) + _attribute(1, packed)
        if family == socket.AF_INET and prefix < 31:
            body += _attribute(4, struct.pack("!I", struct.unpack("!I", packed)[0] | (1 << 32 - prefix) - 1))  # IFA_BROADCAST
        elif family == socket.AF_INET6:
            body = body[:2] + b"\2" + body[3:]  # IFA_F_NODAD: usable at once
        self._queue(about, kind, flags, body)

    @staticmethod
    def _parse_link(data):
        index, flags = struct.unpack_from("=iI", data, 4)
        found = _attributes(data, 16)
        counters = found.get(23, b"").ljust(64, b"\0")  # IFLA_STATS64
        return {"index": index, "name": os.fsdecode(found.get(3, b"").rstrip(b"\0")), "mac": format_mac(found.get(1, b"")),
                "mtu": struct.unpack("=I", found.get(4, b"\0\0\0\0"))[0], "up": bool(flags & _IFF_UP),
                "master": struct.unpack("=I", found.get(10, b"\0\0\0\0"))[0],
                "kind": _attributes(found.get(18, b"")).get(1, b"").rstrip(b"\0").decode(),
                "statistics": dict(zip(_LINK_COUNTERS, struct.unpack_from("=8Q", counters)))}

    @staticmethod
    def _parse_address(data):
        family, prefix, _, _, index = struct.unpack_from("=BBBBi", data)
        found = _attributes(data, 8)
        packed = found.get(2) or found.get(1)  # IFA_LOCAL, IFA_ADDRESS
        return {"index": index, "address": socket.inet_ntop(family, packed), "prefix": prefix}

    @staticmethod
    def _parse_route(data):
        """None for what is no unicast route of the main table."""
        family, prefix, _, _, table, _, _, kind = struct.unpack_from("=8B", data)
        found = _attributes(data, 12)
        table = struct.unpack("=I", found[15])[0] if 15 in found else table  # RTA_TABLE: tables above 255
        if kind != 1 or table != 254:
            return None
        network = "%s/%d" % (socket.inet_ntop(family, found[1]), prefix) if 1 in found else None
        return {"network": network, "gateway": socket.inet_ntop(family, found[5]) if 5 in found else None,
                "index": struct.unpack("=I", found.get(4, b"\0\0\0\0"))[0]}


# -- fork ---------------------------------------------------------------------------------------------------------------------

TASKS = {}  # what a child of the spawner can be asked to do: name -> function(fds, **arguments) that returns JSON


def task(function):
    """Register a function as a task: it runs in a process of its own and may enter namespaces. It returns what JSON can hold."""
    TASKS[function.__name__] = function
    return function


def fork(body, *args):
    """Fork; the child runs body(*args) and ends: status 0, or 1 after an exception, whose text goes to the log. Returns the child's
    pid. The only fork in this file, so that no child ever runs on into its parent's code. Call it from single-threaded
    processes only: the spawner and what descends from it, the client, and the daemon before its first thread."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        body(*args)
        status = 0
    except BaseException as error:
        with contextlib.suppress(BaseException):
            warn("%s: %s" % (getattr(body, "__name__", "child"), error))
            debug_traceback()
    finally:
        os._exit(status)


########################################################################
# 3. References
########################################################################
# How things are named: image references (`HOST/PATH:TAG@DIGEST`), digests, container names, and id prefixes. Every name that comes
# from outside goes through here before it is used; none of them ever becomes a path unchecked.

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
HEX_ID = re.compile(r"[0-9a-f]{64}")
_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*")
_DOMAIN = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?(?:\.[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?)*|\[[0-9a-fA-F:]+\])"
                     r"(?::[0-9]{1,5})?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")


class Reference:
    """An image reference, taken apart: `domain` (docker.io where none is written), `path` (library/ added there), `tag`, `digest`
    (each None when absent). Grammar: github.com/distribution/reference; docker's rule says that what stands before the first slash
    is a host when it has a dot or a colon or is localhost."""

    def __init__(self, domain, path, tag=None, digest=None):
        self.domain, self.path, self.tag, self.digest = domain, path, tag, digest

    @classmethod
    def parse(cls, text):
        rest, at, digest = text.partition("@")
        if at and not DIGEST.fullmatch(digest):
            raise BadRequest("invalid reference format: '%s' has no valid sha256 digest" % text)
        slash, colon = rest.rfind("/"), rest.rfind(":")
        rest, tag = (rest[:colon], rest[colon + 1:]) if colon > slash else (rest, None)
        head, slash, tail = rest.partition("/")
        if slash and ("." in head or ":" in head or head == "localhost" or head != head.lower()):
            domain, path = head, tail
        else:
            domain, path = "docker.io", rest
        if domain in ("docker.io", "index.docker.io"):
            domain, path = "docker.io", path if "/" in path else "library/" + path
        if path != path.lower():
            raise BadRequest("invalid reference format: repository name (%s) must be lowercase" % path)
        if (not _DOMAIN.fullmatch(domain) or not all(map(_PATH_PART.fullmatch, path.split("/"))) or len(domain + path) > 254
                or tag is not None and not _TAG.fullmatch(tag)):
            raise BadRequest("invalid reference format: '%s' is no image reference" % text)
        if HEX_ID.fullmatch(rest):
            raise BadRequest("invalid repository name (%s), cannot specify 64-byte hexadecimal strings" % rest)
        return cls(domain, path, tag, digest or None)

    @property
    def repository(self):
        """The familiar repository: `base`, `yssk22/node-hello`, `localhost:5000/base`."""
        if self.domain != "docker.io":
            return "%s/%s" % (self.domain, self.path)
        return self.path[8:] if self.path.startswith("library/") and self.path.count("/") == 1 else self.path

    @property
    def tagged(self):
        """The familiar `repository:tag`, with `latest` where no tag was given."""
        return "%s:%s" % (self.repository, self.tag or "latest")

    def __str__(self):
        return self.repository + (":" + self.tag if self.tag else "") + ("@" + self.digest if self.digest else "")


def sha256_hex(data):
    import hashlib
    return hashlib.sha256(data).hexdigest()


def chain_id(parent, diff_id):
    """The chain id of a layer on its parent's chain (None for the lowest), both as hex: OCI image-spec, config.md."""
    return diff_id if parent is None else sha256_hex(("sha256:%s sha256:%s" % (parent, diff_id)).encode())


def new_id():
    """64 random hex digits that never read as a number in their first 12: names, ids and numbers stay apart."""
    while True:
        value = os.urandom(32).hex()
        if not value[:12].isdigit():
            return value


def check_container_name(name):
    """The name without docker's leading slash. A name that could be an id is refused (CVE-2014-5278)."""
    name = name[1:] if name.startswith("/") else name
    if not _NAME.fullmatch(name) or len(name) > 255:
        raise BadRequest("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed" % printable(name))
    if re.fullmatch(r"[0-9a-f]{12,64}", name):
        raise BadRequest("Invalid container name (%s): it reads as an id; use a name with another letter in it" % name)
    return name


def find_by_prefix(ids, prefix):
    """The one id that starts with prefix, or None; several are a BadRequest."""
    if not re.fullmatch(r"[0-9a-f]{1,64}", prefix):
        return None
    found = [i for i in ids if i.startswith(prefix)]
    if len(found) > 1:
        raise BadRequest("Multiple IDs found with provided prefix: %s" % prefix)
    return found[0] if found else None


_ADJECTIVES = """agile amber brave bright brisk calm candid clever cosmic crisp daring deft eager early fair fancy fleet fond frank
gentle glad golden grand happy hardy honest humble jolly keen kind lively loyal lucid lunar mellow merry mild modest neat nimble noble
patient placid plucky polite proud quick quiet rapid ready robust sharp shiny silent silver smart snappy solar solid spry steady sunny
swift tidy tough trim vivid warm wise witty zesty""".split()
_SURNAMES = """abbe babbage bardeen bell bohr boole bose brahe braun cantor carson cerf church codd conway cray curie darwin dirac
doppler edison einstein engelbart erdos euclid euler faraday fermat fermi feynman galilei galois gauss germain goedel goodall hamilton
hawking hertz hilbert hodgkin hoover hopper huygens hypatia jemison joliot kalam kepler kilby knuth lamarr leakey leibniz liskov lovelace
maxwell mayer mccarthy meitner mendel mirzakhani moser nash newton nobel noether noyce pascal pasteur pauli perlman planck ptolemy raman
ritchie rubin sagan shannon shirley snyder tesla thompson torvalds turing volta wiles wing wright yalow""".split()


def random_name():
    """`brave_hopper`: a name for a container that was given none."""
    pick = os.urandom(4)
    return "%s_%s" % (_ADJECTIVES[int.from_bytes(pick[:2], "big") % len(_ADJECTIVES)],
                      _SURNAMES[int.from_bytes(pick[2:], "big") % len(_SURNAMES)])


########################################################################
# 4. Archives
########################################################################
# Tar streams in and out of a directory tree: layers, import and export, cp, save and load, build contexts. It runs in the daemon
# and, for everything that touches a container's files, in a child that has entered the container's root: call preload() before
# that. The idea to know: a tree is only ever touched through descriptors. Each folder is opened by one name, without following a
# symlink, relative to its parent's descriptor; a symlink on the way is resolved by open_in_root; owner, mode, xattrs and times
# are set through the open file. So whatever an archive or a running container does (CVE-2014-6407, CVE-2018-15664), nothing
# outside the root can be reached.

TAR_FORM = 1  # the form that TarWriter writes. The digest of a layer is that of these bytes: any change needs a new number
TAR_FILE, TAR_LINK, TAR_SYMLINK, TAR_CHAR, TAR_BLOCK, TAR_DIRECTORY, TAR_FIFO = "0123456"
WHITEOUT, OPAQUE = ".wh.", ".wh..wh..opq"  # OCI image-spec, layer.md
OVERLAY_OPAQUE = "trusted.overlay.opaque"  # the same in an overlay's upper directory; a char device 0:0 is its whiteout
CHANGED, ADDED, DELETED = 0, 1, 2  # docker's kinds of change

# What an archive from outside may ask for.
MOST_ENTRIES = 4000000
MOST_NAME = 4096         # bytes of a path: PATH_MAX
MOST_DEPTH = 256         # folders within folders: each holds descriptors and Python frames
MOST_PAX = 1 << 20       # bytes of a pax header
MOST_PIECES = 1 << 18    # pieces of data in a sparse file
MOST_CODEC_MEMORY = 128 << 20  # what a decompressor may allocate: enough for `xz -9` and `zstd -19`

_CHUNK = 1 << 18  # bytes read or written at once
_ZERO_BLOCK = bytes(512)
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a fifo put there meanwhile must not hang us
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def preload():
    """Load and look up all that this section uses later, before a process enters a root where somebody else's files would be
    loaded instead (CVE-2019-14271): codecs, hashes, the C library, the printing of tracebacks."""
    import array, binascii, bz2, fcntl, hashlib, lzma, select, subprocess, traceback, zlib  # noqa: E401, F401
    with contextlib.suppress(ImportError):
        from compression import zstd  # noqa: F401
    hashlib.sha256(b"").hexdigest()  # OpenSSL reads its configuration at the first use
    _libc()
    for name in ("utf-8", "ascii", "latin-1"):
        "".encode(name, "surrogateescape")
    fd = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        os.close(open_in_root(fd, "/", os.O_PATH))
    finally:
        os.close(fd)


def find_program(name, path=DEFAULT_PATH):
    """The absolute path of a program on a search path; None where there is none."""
    for folder in path.split(":"):
        candidate = os.path.join(folder, name)
        if folder.startswith("/") and os.path.isfile(candidate) and os.access(candidate, os.X_OK):
            return candidate
    return None


# -- compression, found by content ----------------------------------------------------------------------------------------------

class _Gunzip:
    """zlib with the interface that bz2, lzma and zstd share: decompress(data, most), eof, needs_input, unused_data."""

    def __init__(self):
        import zlib
        self._zlib = zlib.decompressobj(31)
        self.needs_input = True

    def decompress(self, data, most):
        output = self._zlib.decompress(self._zlib.unconsumed_tail + data, most)
        # A full output may leave more inside zlib even when all input is used up.
        self.needs_input = not self._zlib.unconsumed_tail and len(output) < most
        return output

    @property
    def eof(self):
        return self._zlib.eof

    @property
    def unused_data(self):
        return self._zlib.unused_data


def _bunzip2():
    import bz2
    return bz2.BZ2Decompressor()


def _unxz():
    import lzma
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MOST_CODEC_MEMORY)


def _unzstd():
    """Python 3.14's own zstd; None before."""
    try:
        from compression import zstd
    except ImportError:
        return None
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: MOST_CODEC_MEMORY.bit_length() - 1})


# what a stream begins with: name, decompressor. 50 to 5f 2a 4d 18 begins zstd's skippable frame (RFC 8878, 3.1.2).
_CODECS = ((re.compile(rb"\x1f\x8b\x08"), "gzip", _Gunzip), (re.compile(rb"BZh[1-9]"), "bzip2", _bunzip2),
           (re.compile(rb"\xfd7zXZ\0"), "xz", _unxz),
           (re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"), "zstd", _unzstd))


def open_compressed(file, name="the archive"):
    """A reader of what is in a plain, gzip, bzip2, xz or zstd stream, told by its first bytes. `file` needs only read(size); so
    does the result have only that, and close(). Memory is bounded whatever the stream says. Call it before entering another root:
    it loads the decompressor, or starts the host's `zstd` (Python before 3.14 has none; CVE-2026-41567).

    A damaged or truncated stream raises BadRequest at read; zeros after the end are padding, anything else is damage."""
    head = b""
    while len(head) < 512:
        part = file.read(512 - len(head))
        if not part:
            break
        head += part
    file = _Rest(head, file)
    if head[257:262] == b"ustar":  # a plain archive whose first name looks like a codec's mark
        return file
    for mark, kind, make in _CODECS:
        if mark.match(head):
            return _Decompressed(file, name, kind, mark, make) if make() else _ZstdProgram(file, name)
    return file


class _Rest:
    """A file whose first bytes have been read already."""

    def __init__(self, head, file):
        self._head, self._file = head, file

    def read(self, size=_CHUNK):
        if not self._head:
            return self._file.read(size)
        part, self._head = self._head[:size], self._head[size:]
        return part

    def close(self):
        pass


class _Decompressed:
    """Reads through a decompressor in bounded steps, member after member."""

    def __init__(self, file, name, kind, mark, make):
        self._file, self._name, self._kind, self._mark, self._make = file, name, kind, mark, make
        self._codec, self._input = make(), b""

    def read(self, size=_CHUNK):
        while self._codec or self._next_member():
            data = b""
            if self._codec.needs_input:
                data, self._input = self._input or self._file.read(BLOCK), b""
                if not data:
                    raise BadRequest("%s is cut off: the %s stream ends in the middle" % (self._name, self._kind))
            try:
                output = self._codec.decompress(data, size)
            except Exception as error:  # zlib.error, lzma.LZMAError, ZstdError, OSError, EOFError: no common base
                raise BadRequest("%s is damaged, or not %s: %s" % (self._name, self._kind, error))
            if self._codec.eof:
                self._input, self._codec = self._codec.unused_data, None
            if output:
                return output
        return b""

    def _next_member(self):
        while True:
            self._input = self._input.lstrip(b"\0")
            if len(self._input) >= 6:
                break
            more = self._file.read(BLOCK)
            if not more:
                break
            self._input += more
        if not self._input:
            return False
        if not self._mark.match(self._input):
            raise BadRequest("%s is damaged: something else follows the %s stream" % (self._name, self._kind))
        self._codec = self._make()
        return True

    def close(self):
        pass


class _ZstdProgram:
    """Reads through the host's `zstd`. One loop feeds it and reads from it, so that no thread is needed."""

    def __init__(self, file, name):
        import subprocess
        program = find_program("zstd")
        if not program:
            raise Error("%s is compressed with zstd: install the program zstd, or run pydock with Python 3.14 or newer" % name)
        self._file, self._name, self._pending = file, name, b""
        # 128 MiB is zstd's own limit; said all the same because /etc or the environment could say otherwise
        self._process = subprocess.Popen([program, "-dcq", "-M128MB"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         stderr=subprocess.DEVNULL, bufsize=0, env={}, cwd="/")
        self._in, self._out = self._process.stdin, self._process.stdout.fileno()
        os.set_blocking(self._in.fileno(), False)
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._poll.register(self._in.fileno(), select.POLLOUT)

    def read(self, size=_CHUNK):
        while not self._process.stdout.closed:
            ready = [fd for fd, _ in self._poll.poll()]
            if self._out in ready:
                return os.read(self._out, size) or self._end()
            self._feed()
        return b""

    def _feed(self):
        try:
            self._pending = self._pending or self._file.read(BLOCK)
            if self._pending:
                self._pending = self._pending[os.write(self._in.fileno(), self._pending):]
                return
        except BrokenPipeError:  # it has given up: its exit status says so
            pass
        self._poll.unregister(self._in.fileno())
        self._in.close()

    def _end(self):
        self._process.stdout.close()
        self._in.close()
        if self._process.wait():
            raise BadRequest("%s is cut off or damaged: zstd cannot read it" % self._name)
        return b""

    def close(self):
        if not self._process.stdout.closed:
            self._process.kill()
            self._process.stdout.close()
            self._in.close()
            self._process.wait()


# -- reading tar ----------------------------------------------------------------------------------------------------------------
# POSIX pax and ustar, GNU and the old v7 form. Formats: pax(1) of POSIX, "Basic Tar Format" and "Sparse Formats" of GNU tar's
# manual.

# name mode uid gid size mtime checksum type linkname magic+version uname gname devmajor devminor prefix padding
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s8s32s32s8s8s155s12s")
_NO_XATTRS = {}
_TIMES = (-(1 << 31), (1 << 34) - (1 << 31) - 1)  # the years 1901 to 2446: what ext4 can hold, in seconds


class Entry:
    """One member of an archive, read or to be written.

    name, linkname: paths as they stand in the archive (str, undecodable bytes as surrogates); type: TAR_FILE, ...; mode:
    permission bits; uid, gid; size: bytes of the content, holes included; mtime: nanoseconds since 1970; devmajor, devminor;
    xattrs: {name: bytes}; sparse: None, or [(offset, length)] of the pieces that are no holes. While its reader stands on it,
    read() and copy_to() give its content; an Entry is a file that open_compressed and TarReader can read."""
    __slots__ = ("name", "type", "mode", "uid", "gid", "size", "mtime", "linkname", "devmajor", "devminor", "xattrs", "sparse",
                 "_reader", "_at")

    def __init__(self, name, type=TAR_FILE, mode=0o644, uid=0, gid=0, size=0, mtime=0, linkname="", devmajor=0, devminor=0,
                 xattrs=_NO_XATTRS, sparse=None, reader=None):
        self.name, self.type, self.mode, self.uid, self.gid, self.size, self.mtime = name, type, mode, uid, gid, size, mtime
        self.linkname, self.devmajor, self.devminor, self.xattrs, self.sparse = linkname, devmajor, devminor, xattrs, sparse
        self._reader, self._at = reader, 0

    def read(self, size=-1):
        """Up to size bytes of the content, all of it without a size; b"" at its end."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK), b""))
        return self._reader.read_content(size) if self.sparse is None else self._read_sparse(size)

    def _read_sparse(self, size):
        piece = next((p for p in self.sparse if p[0] + p[1] > self._at), (self.size, 0))
        if self._at < piece[0]:
            data = bytes(min(size, piece[0] - self._at))
        else:
            data = self._reader.read_content(min(size, piece[0] + piece[1] - self._at))
        self._at += len(data)
        return data

    def copy_to(self, fd):
        """Write the content to an empty file; holes stay holes."""
        if self.sparse is None:
            self._reader.copy_content(fd, self.size)
            return
        for offset, length in self.sparse:
            os.lseek(fd, offset, os.SEEK_SET)
            self._reader.copy_content(fd, length)
        os.ftruncate(fd, self.size)


class TarReader:
    """Iterates over the entries of a tar stream. `file` needs only read(size); `name` is what errors call the archive.

    What is no tar, or is cut off, raises BadRequest. An archive that just stops after an entry is read as whole, as docker and
    GNU tar do; `ended` tells whether its end mark was there."""

    def __init__(self, file, name="the archive"):
        import zlib
        self._adler32 = zlib.adler32
        self._read, self._name = file.read, name
        self._data, self._at = b"", 0      # what has been read, and where in it we are
        self._left, self._padding = 0, 0   # bytes of the current entry's content still in the stream, and of zeros after it
        self._global = {}                  # records of global pax headers
        self.ended = False

    def __iter__(self):
        return self

    def __next__(self):
        """The next entry; headers that only say something about it are taken in on the way."""
        records = {}
        while True:
            if self._left or self._padding:
                self._skip(self._left + self._padding)
                self._left = self._padding = 0
            block = self._next_header()
            if block is None:
                if records:
                    raise self.error("it ends after a header that announces another entry")
                raise StopIteration
            handler = self._HEADERS.get(block[156])
            if handler is None:
                return self._entry(block, records)
            handler(self, block, records)

    def error(self, reason):
        return BadRequest("%s is not a valid tar archive: %s" % (self._name, reason))

    # the stream

    def _more(self, size):
        """Have at least `size` bytes at hand, fewer only at the end of the stream. True when they are there."""
        parts, have = [self._data[self._at:]], len(self._data) - self._at
        while have < size:
            part = self._read(max(_CHUNK, size - have))
            if not part:
                break
            parts.append(part)
            have += len(part)
        self._data, self._at = b"".join(parts), 0
        return have >= size

    def _take(self, size):
        end = self._at + size
        if end > len(self._data):
            if not self._more(size):
                raise self.error("unexpected end")
            end = size
        data = self._data[self._at:end]
        self._at = end
        return data

    def _skip(self, size):
        have = len(self._data) - self._at
        while size > have:
            size -= have
            self._data, self._at = self._read(_CHUNK), 0
            have = len(self._data)
            if not have:
                raise self.error("unexpected end")
        self._at += size

    def read_content(self, size):
        """Up to size bytes of the current entry's stored content."""
        size = min(size, self._left)
        if not size:
            return b""
        if self._at == len(self._data) and not self._more(1):
            raise self.error("unexpected end")
        data = self._data[self._at:self._at + size]
        self._at += len(data)
        self._left -= len(data)
        return data

    def copy_content(self, fd, size):
        """Write the next `size` bytes of stored content to a descriptor."""
        if size > self._left:
            raise self.error("a sparse file has less content than it says")
        self._left -= size
        while size:
            if self._at == len(self._data):
                self._data, self._at = self._read(_CHUNK), 0
                if not self._data:
                    raise self.error("unexpected end")
            end = min(self._at + size, len(self._data))
            written = os.write(fd, self._data[self._at:end] if end - self._at < 65536 else memoryview(self._data)[self._at:end])
            self._at += written
            size -= written

    def drain(self):
        """Read to the end of the stream: a decompressor then checks its sums, and a digest covers all bytes."""
        self._data, self._at, self._left, self._padding = b"", 0, 0, 0
        while self._read(_CHUNK):
            pass

    # headers

    def _next_header(self):
        """The next header block with a good checksum, or None at the end."""
        if self._at == len(self._data) and not self._more(1):
            return None
        block = self._take(512)
        if not block[0] and block == _ZERO_BLOCK:
            if (self._at < len(self._data) or self._more(1)) and self._take(512) != _ZERO_BLOCK:
                raise self.error("entries follow a block of zeros")
            self.ended = True
            return None
        # The sum of all bytes with the checksum field taken as spaces. The low half of Adler-32 is that sum plus one, modulo
        # 65521, at a tenth of the time of sum().
        field = block[148:156]
        stored = self._number(field, "checksum")
        if self._adler32(block) & 0xFFFF != (stored - 256 + sum(field) + 1) % 65521:
            signed = sum(byte - (byte >> 7 << 8) for byte in block[:148] + block[156:]) + 256  # what old Sun tars wrote
            if stored != signed:
                raise self.error("a header's checksum is wrong")
        return block

    def _number(self, field, what):
        """Octal digits, or base 256 where the first bit is set (GNU; two's complement)."""
        if field[0] & 0x80:
            bits = 8 * len(field) - 1
            value = int.from_bytes(field, "big") & (1 << bits) - 1
            return value - (1 << bits) if value >> bits - 1 else value
        try:
            return int(field.rstrip(b" \0") or b"0", 8)
        except ValueError:
            pass
        try:
            return int(field.partition(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            raise self.error("a header's %s is no number" % what)

    def _size(self, field):
        size = self._number(field, "size")
        if not 0 <= size < 1 << 63:
            raise self.error("a header's size is out of range")
        return size

    def _identity(self, value):
        if -1 << 31 <= value < -1:  # an unsigned number in a signed field: `nobody` is -2 on some systems
            value += 1 << 32
        if not 0 <= value < 0xFFFFFFFF:  # the last one means "leave it" to chown(2)
            raise self.error("the user or group id %d is out of range" % value)
        return value

    def _text(self, raw):
        if len(raw) > MOST_NAME:
            raise self.error("a name is longer than %d bytes" % MOST_NAME)
        return os.fsdecode(raw)

    def _content(self, block, most):
        """The content of a header that describes the next entry."""
        size = self._size(block[124:136])
        if size > most:
            raise self.error("a header of %d bytes is too long" % size)
        return self._take(size + -size % 512)[:size]

    def _take_long_name(self, block, records):
        records["path" if block[156:157] == b"L" else "linkpath"] = self._content(block, MOST_NAME + 1).partition(b"\0")[0]

    def _take_pax(self, block, records):
        records.update(self._pax_records(self._content(block, MOST_PAX)))

    def _take_global_pax(self, block, records):
        self._global.update(self._pax_records(self._content(block, MOST_PAX)))
        if sum(len(key) + len(value) for key, value in self._global.items()) > MOST_PAX:
            raise self.error("its global headers are too long")

    def _ignore(self, block, records):
        self._skip(self._size(block[124:136]) + -self._size(block[124:136]) % 512)

    def _refuse(self, block, records):
        raise self.error("entry type %r (multi-volume or incremental) is not supported" % chr(block[156]))

    # x: X is Sun's; A: Solaris' ACLs, V: a volume label, N: long names of 1990's GNU tar
    _HEADERS = {ord("L"): _take_long_name, ord("K"): _take_long_name, ord("x"): _take_pax, ord("X"): _take_pax,
                ord("g"): _take_global_pax, ord("A"): _ignore, ord("V"): _ignore, ord("N"): _ignore, ord("M"): _refuse}

    def _pax_records(self, data):
        """{key: bytes} of `LENGTH KEY=VALUE\\n` records; the repeated ones of GNU's sparse form 0.0 are joined with commas."""
        records, at = {}, 0
        while at < len(data) and data[at]:
            space = data.find(b" ", at, at + 9)
            digits = data[at:space] if space > 0 else b""
            end = at + int(digits) if digits.isdigit() else 0
            key, mark, value = data[space + 1:end - 1].partition(b"=")
            if end <= space or end > len(data) or data[end - 1] != 10 or not mark or not key:
                raise self.error("a pax header is malformed")
            key = key.decode("utf-8", "surrogateescape")
            if key in ("GNU.sparse.offset", "GNU.sparse.numbytes"):
                key, value = "GNU.sparse.map", records.get("GNU.sparse.map", b"") + b"," + value
            records[key] = value
            at = end
        return records

    def _entry(self, block, records):
        (name, mode, uid, gid, size, mtime, _, kind, linkname, magic, _, _, major, minor, prefix, tail) = _HEADER.unpack(block)
        name = name.partition(b"\0")[0]
        if magic[:6] == b"ustar\0":
            if tail[8:] == b"tar\0":  # star's form keeps times behind a shorter prefix
                prefix = prefix[:131]
            prefix = prefix.partition(b"\0")[0]
            if prefix:
                name = prefix + b"/" + name
        if kind == b"\0" and name.endswith(b"/"):  # v7 had no type for directories
            kind = b"5"
        elif kind in b"\x007":
            kind = b"0"
        stored = self._size(size)
        mtime = self._clamped(self._number(mtime, "time")) * 10 ** 9
        entry = Entry(os.fsdecode(name), kind.decode("latin-1"), self._number(mode, "mode") & 0o7777,
                      self._identity(self._number(uid, "uid")), self._identity(self._number(gid, "gid")), stored, mtime,
                      os.fsdecode(linkname.partition(b"\0")[0]), reader=self)
        if entry.type in "34":
            entry.devmajor, entry.devminor = self._device(major), self._device(minor)
        if records or self._global:
            self._apply(entry, {**self._global, **records} if self._global else records)
            stored = entry.size
        self._begin(entry, block, records, stored)
        return entry

    def _begin(self, entry, block, records, stored):
        """Decide how much content follows the header."""
        kind = entry.type
        if kind in "123456":  # a pax link may say its target's size
            stored = entry.size = 0
        elif kind == "D":  # GNU's incremental backups: a directory with a list in it
            entry.type, entry.size = TAR_DIRECTORY, 0
        elif kind not in "0S":
            raise self.error("%s has the unknown type %r" % (entry.name, kind))
        self._left, self._padding = stored, -stored % 512
        if kind == "S":
            entry.type = TAR_FILE
            self._set_sparse(entry, self._old_sparse_map(block), self._size(block[483:495]))
        elif records and any(key.startswith("GNU.sparse.") for key in records):
            self._pax_sparse(entry, records)

    def _device(self, field):
        number = self._number(field, "device number")
        if not 0 <= number < 1 << 32:
            raise self.error("a device number is out of range")
        return number

    @staticmethod
    def _clamped(seconds):
        return min(max(seconds, _TIMES[0]), _TIMES[1])

    # pax records

    def _decimal(self, raw, key):
        if not re.fullmatch(rb"-?[0-9]{1,20}", raw):
            raise self.error("the pax record %s is no number" % key)
        return int(raw)

    def _time(self, raw):
        match = re.fullmatch(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?", raw)
        if not match:
            raise self.error("the pax record mtime is no time")
        fraction = int(((match.group(3) or b"") + b"0" * 9)[:9])
        ns = int(match.group(2)) * 10 ** 9 + fraction
        seconds, fraction = divmod(-ns if match.group(1) else ns, 10 ** 9)
        return self._clamped(seconds) * 10 ** 9 + (fraction if self._clamped(seconds) == seconds else 0)

    def _pax_name(self, raw):
        if b"\0" in raw:
            raise self.error("a name contains a zero byte")
        return self._text(raw)

    def _apply(self, entry, records):
        """Let pax records override the header's fields; an empty one takes a global record back."""
        for key, raw in records.items():
            if key.startswith(("SCHILY.xattr.", "LIBARCHIVE.xattr.")):
                self._take_xattr(entry, key, raw)
            elif not raw:
                continue
            elif key == "path":
                entry.name = self._pax_name(raw)
            elif key == "linkpath":
                entry.linkname = self._pax_name(raw)
            elif key == "size":
                entry.size = self._decimal(raw, key)
                if not 0 <= entry.size < 1 << 63:
                    raise self.error("the pax record size is out of range")
            elif key == "mtime":
                entry.mtime = self._time(raw)
            elif key in ("uid", "gid"):
                setattr(entry, key, self._identity(self._decimal(raw, key)))

    def _take_xattr(self, entry, key, raw):
        form, _, name = key.partition(".xattr.")
        if form == "LIBARCHIVE":  # name percent-encoded, value in base 64, often beside the other form
            import binascii
            name = re.sub("%([0-9A-Fa-f]{2})", lambda match: chr(int(match.group(1), 16)), name)
            try:
                raw = binascii.a2b_base64(raw + b"=" * (-len(raw) % 4))
            except ValueError:
                raise self.error("the xattr %s is not in base 64" % name)
            if name in entry.xattrs:
                return
        if entry.xattrs is _NO_XATTRS:
            entry.xattrs = {}
        entry.xattrs[name] = raw

    # sparse files

    def _old_sparse_map(self, block):
        """GNU's type S: 4 pieces in the header, 21 in each block that follows as long as a flag says so."""
        fields, more, pieces = block[386:482], block[482], []
        while True:
            for at in range(0, len(fields), 24):
                if fields[at + 12]:
                    pieces.append((self._size(fields[at:at + 12]), self._size(fields[at + 12:at + 24])))
            if not more:
                return pieces
            if len(pieces) > MOST_PIECES:
                raise self.error("a sparse file has too many pieces")
            block = self._take(512)
            fields, more = block[:504], block[504]

    def _pax_sparse(self, entry, records):
        """The forms 0.0 and 0.1 (the map is a record) and 1.0 (the map stands before the content)."""
        if records.get("GNU.sparse.name"):
            entry.name = self._pax_name(records["GNU.sparse.name"])
        size = records.get("GNU.sparse.realsize") or records.get("GNU.sparse.size")
        if size is None:
            return
        if records.get("GNU.sparse.major") == b"1":
            numbers = self._stored_map()
        else:
            listed = records.get("GNU.sparse.map", b"").split(b",")
            numbers = [self._decimal(number, "GNU.sparse.map") for number in listed if number]
        if len(numbers) % 2:
            raise self.error("a sparse file's map is malformed")
        self._set_sparse(entry, list(zip(numbers[::2], numbers[1::2])), self._decimal(size, "GNU.sparse.size"))

    def _stored_map(self):
        """Form 1.0: lines of decimal numbers, the first one their count of pairs, filled up to a block."""
        text, wanted = b"", None
        while wanted is None or text.count(b"\n") < wanted:
            if self._left < 512:
                raise self.error("a sparse file's map is cut off")
            text += self._take(512)
            self._left -= 512
            if wanted is None and b"\n" in text:
                count = self._decimal(text.partition(b"\n")[0], "GNU.sparse")
                if not 0 <= count <= MOST_PIECES:
                    raise self.error("a sparse file has too many pieces")
                wanted = 2 * count + 1
        return [self._decimal(number, "GNU.sparse") for number in text.split(b"\n")[1:wanted]]

    def _set_sparse(self, entry, pieces, size):
        at = 0
        for offset, length in pieces:
            if offset < at or length < 0:
                raise self.error("the pieces of sparse file %s overlap" % entry.name)
            at = offset + length
        if at > size or size >= 1 << 63 or sum(length for _, length in pieces) > self._left:
            raise self.error("the pieces of sparse file %s do not fit its size" % entry.name)
        if len(pieces) > MOST_PIECES:
            raise self.error("a sparse file has too many pieces")
        entry.size, entry.sparse = size, pieces


# -- writing tar ----------------------------------------------------------------------------------------------------------------

class TarWriter:
    """Writes tar in the one form that TAR_FORM numbers: ustar headers; a pax header before an entry only for what those cannot
    hold (names over 100 bytes that do not split at a slash, or not ASCII; numbers out of range; xattrs as SCHILY.xattr), its
    records sorted by key; whole seconds; no user or group names; two blocks of zeros at the end. Sparse files are written out:
    where the holes are depends on the file system, and a layer must have the same digest when it is written again.

    write(bytes) is called with large blocks. `fd`, where given, is the blocking descriptor behind write: large files go to it by
    sendfile."""

    def __init__(self, write, fd=None):
        self._write, self._fd = write, fd
        self._buffer, self._size = [], 0
        self._sent = True  # sendfile works between these descriptors, as far as we know

    def add(self, entry, source=None):
        """Write an entry and entry.size bytes of content: source is bytes, a descriptor (read from where it stands) or a readable
        file. A source that is shorter (a file that shrinks while it is read) is filled up with zeros, one that is longer is
        cut."""
        self._put(_tar_header(entry))
        if not entry.size:
            return
        if isinstance(source, int):
            missing = self._copy(source, entry.size)
        elif isinstance(source, (bytes, bytearray)):
            self._put(bytes(source[:entry.size]))
            missing = entry.size - len(source)
        else:
            missing = self._copy_from(source.read, entry.size)
        self._put_zeros(max(missing, 0) + -entry.size % 512)

    def close(self):
        """Write the end mark, and all that is still held."""
        self._put(_ZERO_BLOCK * 2)
        self.flush()

    def flush(self):
        if self._buffer:
            data = b"".join(self._buffer)
            self._buffer, self._size = [], 0
            self._write(data)

    def _put(self, data):
        if len(data) >= BLOCK:
            self.flush()
            self._write(data)
            return
        self._buffer.append(data)
        self._size += len(data)
        if self._size >= _CHUNK:
            self.flush()

    def _put_zeros(self, count):
        while count > 0:
            self._put(bytes(min(count, _CHUNK)))
            count -= _CHUNK

    def _copy(self, fd, size):
        if size > BLOCK and self._fd is not None and self._sent:
            self.flush()
            size = self._send(fd, size)
        return self._copy_from(lambda most: os.read(fd, most), size) if size else 0

    def _send(self, fd, size):
        """sendfile as far as it goes; returns how much is left."""
        while size:
            try:
                sent = os.sendfile(self._fd, fd, None, min(size, 1 << 30))
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                self._sent = False  # not from this file system, or not to this kind of descriptor
                return size
            if not sent:
                return size
            size -= sent
        return 0

    def _copy_from(self, read, size):
        while size:
            data = read(min(size, _CHUNK))
            if not data:
                break
            self._put(data)
            size -= len(data)
        return size


def _tar_header(entry):
    """The header blocks of an entry in form TAR_FORM."""
    name, linkname = os.fsencode(entry.name), os.fsencode(entry.linkname)
    records = {b"SCHILY.xattr." + os.fsencode(key): value for key, value in entry.xattrs.items()} if entry.xattrs else {}
    prefix = b""
    if len(name) > 100 and name.isascii():
        cut = name.rfind(b"/", 0, 156)
        if cut > 0 and 0 < len(name) - cut - 1 <= 100:
            prefix, name = name[:cut], name[cut + 1:]
    if len(name) > 100 or not name.isascii():
        records[b"path"] = name
    if len(linkname) > 100 or not linkname.isascii():
        records[b"linkpath"] = linkname
    numbers = []
    for key, value, most in ((b"uid", entry.uid, 0o7777777), (b"gid", entry.gid, 0o7777777), (b"size", entry.size, 0o77777777777),
                             (b"mtime", entry.mtime // 10 ** 9, 0o77777777777)):
        if not 0 <= value <= most:
            records[key] = b"%d" % value
            value = 0
        numbers.append(value)
    header = _tar_block(name, prefix, entry.mode, numbers, entry.type, linkname, entry.devmajor, entry.devminor)
    if not records:
        return header
    data = b"".join(_pax_record(key, records[key]) for key in sorted(records))
    pax = _tar_block(b"././@PaxHeader", b"", 0o644, (0, 0, len(data), 0), "x", b"", 0, 0)
    return pax + data + bytes(-len(data) % 512) + header


def _tar_block(name, prefix, mode, numbers, kind, linkname, major, minor):
    block = _HEADER.pack(name, b"%07o" % (mode & 0o7777), b"%07o" % numbers[0], b"%07o" % numbers[1], b"%011o" % numbers[2],
                         b"%011o" % numbers[3], b"        ", kind.encode(), linkname, b"ustar\x0000", b"", b"",
                         b"%07o" % major, b"%07o" % minor, prefix, b"")
    return b"%s%06o\0 %s" % (block[:148], sum(block), block[156:])


def _pax_record(key, value):
    """`LENGTH KEY=VALUE\\n`, where the length counts its own digits."""
    size = len(key) + len(value) + 3
    length = size + len(str(size))
    length = size + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


# -- directory trees ------------------------------------------------------------------------------------------------------------

def clean_name(name):
    """A path as a list of names, without empty ones, `.` and `..`; absolute ones become relative. A path that leads out of where
    it starts raises BadRequest."""
    parts = name.rstrip("/").split("/")
    if not ("" in parts or "." in parts or ".." in parts):
        return parts
    result = []
    for part in parts:
        if part == "..":
            if not result and not name.startswith("/"):
                raise BadRequest("invalid path %s: it leads out of the root" % printable(name))
            del result[-1:]
        elif part not in ("", "."):
            result.append(part)
    return result


def is_whiteout(status):
    """True for a char device 0:0, by which overlay says that a name is deleted."""
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _lstat(fd, name):
    """The status of a name in a folder, not following a symlink; None where there is nothing."""
    try:
        return os.stat(name, dir_fd=fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def _unless_gone():
    """What has been removed, or replaced by something of another kind, between the look and the open is left out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            raise


def _readlink(fd, name):
    try:
        return os.readlink(name, dir_fd=fd)
    except OSError as error:
        if error.errno == errno.EINVAL:  # no symlink any more
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        raise


def _sorted_names(fd):
    return sorted(os.listdir(fd), key=os.fsencode)


def _kept_xattrs(fd, overlay=False):
    """The xattrs of an open file that belong to its content: user.* and capabilities; never trusted.*, but for the opaque mark of
    an upper directory when asked for."""
    try:
        names = os.listxattr(fd)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return _NO_XATTRS
        raise
    if not names:
        return _NO_XATTRS
    values = {}
    for name in names:
        if _is_kept_xattr(name) or overlay and name == OVERLAY_OPAQUE:
            with contextlib.suppress(OSError):  # gone meanwhile
                values[name] = os.getxattr(fd, name)
    return values


def _is_kept_xattr(name):
    return name == "security.capability" or name.startswith("user.")


def _set_xattrs(fd, xattrs):
    for name, value in xattrs.items():
        try:
            os.setxattr(fd, name, value)
        except OSError as error:  # a file system without them, or a kind of file that may have none: as docker, go on
            if error.errno not in (errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.ERANGE):
                raise


def _is_opaque(fd):
    try:
        return os.getxattr(fd, OVERLAY_OPAQUE) == b"y"
    except OSError:
        return False


class _Folders:
    """A chain of open folders below a root, kept between calls: entries of an archive come folder by folder."""

    def __init__(self, root_fd, step=None):
        self._names, self._fds = [], [root_fd]
        self._step = step or self._open  # step(parent, parts) opens the folder parts[-1] of an open parent

    def enter(self, parts):
        """The descriptor of the folder `parts` (names from the root); it stays open until another one is entered."""
        names, fds = self._names, self._fds
        if parts == names:
            return fds[-1]
        same = 0
        for old, new in zip(names, parts):
            if old != new:
                break
            same += 1
        self.leave(same)
        if len(parts) > MOST_DEPTH:
            raise BadRequest("%s...: more than %d folders within folders" % (printable("/".join(parts[:8])), MOST_DEPTH))
        for index in range(same, len(parts)):
            self.push(parts[index], self._step(fds[-1], parts[:index + 1]))
        return fds[-1]

    def push(self, name, fd):
        self._names.append(name)
        self._fds.append(fd)

    def leave(self, depth=0):
        """Close the folders deeper than `depth`."""
        while len(self._names) > depth:
            self._names.pop()
            os.close(self._fds.pop())

    @staticmethod
    def _open(parent, parts):
        return os.open(parts[-1], _FOLDER_FLAGS, dir_fd=parent)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.leave()


# -- from a tree to tar ---------------------------------------------------------------------------------------------------------

def pack(root_fd, write, fd=None, name="", paths=None, whiteouts=False, exclude=None, same_device=False):
    """Write the tree below root_fd as tar in form TAR_FORM: names sorted by their bytes, a directory before what is in it, hard
    links found, sockets left out. Never follows a symlink. What changes meanwhile gives an archive that is valid all the same.

    write, fd: as of TarWriter (a digest's `update` is a fine write). name: what the root is called in the archive; without one
    its own entry is left out. paths: only these, each a path below the root or a pair (path, name in the archive). exclude(path):
    true leaves out that path, and what is below it. same_device: a directory that is another mount is written empty.
    whiteouts: the tree is an overlay's upper directory and the archive an OCI layer: deletions and opaque marks become `.wh.`
    files."""
    writer = TarWriter(write, fd)
    packer = _Packer(writer, whiteouts, exclude, os.fstat(root_fd).st_dev if same_device else None)
    if paths is None:
        packer.pack_root(root_fd, name)
    else:
        with _Folders(root_fd) as folders:
            for path in paths:
                path, label = (path, None) if isinstance(path, str) else path
                parts = clean_name(path)
                if not parts:
                    packer.pack_root(root_fd, label or "")
                elif not packer.pack_name(folders.enter(parts[:-1]), parts[-1], "/".join(parts), label or "/".join(parts)):
                    raise NotFound("no such file or directory: %s" % printable(path))
    writer.close()


def pack_changes(root_fd, write, changes, fd=None):
    """Write an OCI layer of the changes that tree_changes found between a full tree and its parent: those entries, and
    whiteouts."""
    writer = TarWriter(write, fd)
    packer = _Packer(writer, False, None, None)
    with _Folders(root_fd) as folders:
        for kind, path in sorted(changes, key=lambda change: [os.fsencode(part) for part in change[1].split("/")]):
            parts = clean_name(path)
            if kind == DELETED:
                packer.whiteout("/".join(parts[:-1] + [WHITEOUT + parts[-1]]))
            else:
                packer.pack_name(folders.enter(parts[:-1]), parts[-1], "/".join(parts), "/".join(parts), deep=False)
    writer.close()


class _Packer:
    def __init__(self, writer, whiteouts, exclude, device):
        self._writer, self._whiteouts, self._exclude, self._device = writer, whiteouts, exclude, device
        self._links = {}  # (device, inode) of files with several names: the first name written

    def whiteout(self, label):
        """All of a whiteout but its name is fixed, so that a layer that was unpacked packs to the same bytes."""
        self._writer.add(Entry(label, mode=0o600))

    def pack_root(self, fd, label):
        prefix = label.rstrip("/") + "/" if label else ""
        if label:
            self._add(os.fstat(fd), prefix, TAR_DIRECTORY, xattrs=_kept_xattrs(fd))
        self._pack_children(fd, "", prefix, 1)

    def _pack_children(self, fd, path, label, depth):
        if depth > MOST_DEPTH:
            raise Error("%s...: more than %d folders within folders" % (printable(path[:100]), MOST_DEPTH))
        if self._whiteouts and _is_opaque(fd):
            self.whiteout(label + OPAQUE)
        for name in _sorted_names(fd):
            self.pack_name(fd, name, path + name, label + name, depth)

    def pack_name(self, parent, name, path, label, depth=1, deep=True):
        """Write what `name` in an open folder is, called `label`; False where there is nothing."""
        if self._exclude is not None and self._exclude(path):
            return True
        status = _lstat(parent, name)
        if status is None:
            return False
        if self._whiteouts and name.startswith(WHITEOUT):  # cannot be said in a layer, where it would delete
            return True
        kind = stat.S_IFMT(status.st_mode)
        with _unless_gone():
            if kind == stat.S_IFREG:
                self._pack_file(parent, name, label)
            elif kind == stat.S_IFDIR:
                self._pack_directory(parent, name, path, label, depth, deep)
            elif is_whiteout(status):
                if self._whiteouts:
                    self.whiteout(label[:len(label) - len(name)] + WHITEOUT + name)
            elif kind in self._SPECIAL:
                self._pack_special(parent, name, label, status)
        return True

    _SPECIAL = {stat.S_IFLNK: TAR_SYMLINK, stat.S_IFCHR: TAR_CHAR, stat.S_IFBLK: TAR_BLOCK, stat.S_IFIFO: TAR_FIFO}

    def _add(self, status, label, kind, size=0, linkname="", xattrs=_NO_XATTRS, source=None):
        device = (os.major(status.st_rdev), os.minor(status.st_rdev)) if kind in (TAR_CHAR, TAR_BLOCK) else (0, 0)
        self._writer.add(Entry(label, kind, status.st_mode & 0o7777, status.st_uid, status.st_gid, size, status.st_mtime_ns,
                               linkname, device[0], device[1], xattrs), source)

    def _linked(self, status, label):
        """Write a second name of a file as a hard link to the first."""
        if status.st_nlink < 2:
            return False
        first = self._links.setdefault((status.st_dev, status.st_ino), label)
        if first is label:
            return False
        self._add(status, label, TAR_LINK, linkname=first)
        return True

    def _pack_file(self, parent, name, label):
        fd = os.open(name, _READ_FLAGS, dir_fd=parent)
        try:
            status = os.fstat(fd)
            if stat.S_ISREG(status.st_mode) and not self._linked(status, label):
                self._add(status, label, TAR_FILE, status.st_size, "", _kept_xattrs(fd), fd)
        finally:
            os.close(fd)

    def _pack_directory(self, parent, name, path, label, depth, deep):
        fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        try:
            status = os.fstat(fd)
            self._add(status, label + "/", TAR_DIRECTORY, xattrs=_kept_xattrs(fd))
            if deep and self._device in (None, status.st_dev):
                self._pack_children(fd, path + "/", label + "/", depth + 1)
        finally:
            os.close(fd)

    def _pack_special(self, parent, name, label, status):
        target = _readlink(parent, name) if stat.S_ISLNK(status.st_mode) else ""
        if not self._linked(status, label):
            self._add(status, label, self._SPECIAL[stat.S_IFMT(status.st_mode)], linkname=target)


# -- from tar to a tree ---------------------------------------------------------------------------------------------------------

def unpack(reader, root_fd, into="", whiteouts=None, owner=None, most_entries=MOST_ENTRIES, most_bytes=None,
           no_overwrite_dir_non_dir=False, lower_fds=()):
    """Extract the entries of a TarReader below root_fd, as tar run by root in a chroot there would; nothing outside can be
    reached, also while somebody else changes the tree. Returns the bytes of content (a layer's size).

    into: the folder below the root that names are relative to (it must exist). Existing files are replaced and never written
    through; a directory over a directory merges, anything else replaces the other, or with no_overwrite_dir_non_dir is an error.
    whiteouts: how `.wh.` names are taken: None: as ordinary names; "overlay": as overlay's marks, for a layer's own folder;
    "apply": what they name is removed, for a full tree below. owner: None: as the archive says; (uid, gid); False: left as
    created. most_entries, most_bytes (holes count): more raises BadRequest. lower_fds: roots of the layers below, top first: a
    folder that the archive only implies is made like theirs, 0755 root where they have none.
    A failure leaves what was extracted so far: extract where you can throw all away."""
    unpacker = _Unpacker(root_fd, into, whiteouts, owner, no_overwrite_dir_non_dir, lower_fds)
    count = size = 0
    with unpacker:
        for entry in reader:
            count += 1
            size += entry.size
            if count > most_entries:
                raise BadRequest("the archive has more than %d entries" % most_entries)
            if most_bytes is not None and size > most_bytes:
                raise BadRequest("the archive holds more than %s" % format_size(most_bytes))
            unpacker.unpack(entry)
        unpacker.set_times()
    reader.drain()
    return size


class _Unpacker:
    def __init__(self, root_fd, into, whiteouts, owner, strict, lower_fds):
        self._root_fd, self._into = root_fd, into
        self._whiteouts, self._owner, self._strict, self._lower_fds = whiteouts, owner, strict, lower_fds
        self._base_fd = open_in_root(root_fd, into, os.O_RDONLY | os.O_DIRECTORY)
        self._folders = _Folders(self._base_fd, self._step)
        self._finishing = False
        self._times = {}    # directory: mtime, set when all is in it
        self._made = set()  # for whiteouts="apply": the paths that this archive made, which its own whiteouts do not hide

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._folders.leave()
        os.close(self._base_fd)

    def unpack(self, entry):
        parts = clean_name(entry.name)
        try:
            if self._whiteouts and WHITEOUT in entry.name and self._whiteout(parts):
                return
            if parts:
                self._MAKERS[entry.type](self, entry, self._folders.enter(parts[:-1]), parts)
            else:
                self._unpack_root(entry)
        except OSError as error:
            raise self._explained(error, entry)
        if self._whiteouts == "apply":
            self._remember(parts)

    # what an OSError says that is the archive's fault; the others (no space, ...) are the host's
    _REASONS = {errno.ENOTDIR: "a part of its path is no directory", errno.ELOOP: "too many symlinks in its path",
                errno.ENAMETOOLONG: "its name is too long", errno.EINVAL: "its name or an attribute is invalid",
                errno.ENOENT: "its path leads through a symlink to nowhere", errno.EISDIR: "a directory is in its place",
                errno.EFBIG: "it is too large", errno.EPERM: "not permitted"}

    def _explained(self, error, entry):
        reason = self._REASONS.get(error.errno)
        return BadRequest("cannot extract %s: %s" % (printable(entry.name), reason)) if reason else error

    # folders

    def _step(self, parent, parts):
        """Open the folder that an entry is in: made where the archive only implies it; a symlink is resolved inside the root."""
        name = parts[-1]
        try:
            return os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        except FileNotFoundError:
            if self._finishing:
                raise
            return self._make_implied(parent, parts)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
        status = _lstat(parent, name)
        if status is not None and stat.S_ISLNK(status.st_mode):
            return open_in_root(self._root_fd, "/".join([self._into] + parts), os.O_RDONLY | os.O_DIRECTORY)
        if self._whiteouts == "overlay" and status is not None and is_whiteout(status):
            return self._make_implied(parent, parts, over_whiteout=True)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)

    def _make_implied(self, parent, parts, over_whiteout=False):
        fd = self._new_folder(parent, parts[-1], over_whiteout)
        try:
            lower = self._lower_status(parts)
            uid, gid = self._owner or ((lower.st_uid, lower.st_gid) if lower else (0, 0))
            if self._owner is not False:
                os.fchown(fd, uid, gid)
            os.fchmod(fd, lower.st_mode & 0o7777 if lower else 0o755)
            if lower:
                self._times["/".join(parts)] = lower.st_mtime_ns
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _lower_status(self, parts):
        for lower_fd in self._lower_fds:
            try:
                fd = open_in_root(lower_fd, "/".join(parts), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                return os.fstat(fd)
            finally:
                os.close(fd)
        return None

    @staticmethod
    def _new_folder(parent, name, over_whiteout):
        """Make and open a folder; one that takes the place of a whiteout hides what the layers below have under its name."""
        if over_whiteout:
            os.unlink(name, dir_fd=parent)
        os.mkdir(name, 0o700, dir_fd=parent)
        fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        try:
            if over_whiteout:
                os.setxattr(fd, OVERLAY_OPAQUE, b"y")
        except OSError:
            os.close(fd)
            raise
        return fd

    def _unpack_root(self, entry):
        if entry.type != TAR_DIRECTORY:
            raise BadRequest("cannot extract %s: the root is a directory" % printable(entry.name))
        if self._whiteouts:  # a layer's own root; any other folder that is there keeps its owner and mode, as with docker
            self._set_attributes(self._base_fd, entry)
            self._times[""] = entry.mtime

    def _make_directory(self, entry, parent, parts):
        name, over_whiteout = parts[-1], False
        status = _lstat(parent, name)
        if status is not None and not stat.S_ISDIR(status.st_mode):
            over_whiteout = self._whiteouts == "overlay" and is_whiteout(status)
            if not over_whiteout:
                self._make_room(parent, name, entry)
                status = None
        if status is None or over_whiteout:
            fd = self._new_folder(parent, name, over_whiteout)
        else:
            fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
        self._folders.push(name, fd)
        self._set_attributes(fd, entry)
        self._times["/".join(parts)] = entry.mtime
        if len(self._times) > 100000:  # so many are not held until the end: most of them are complete
            self.set_times()

    def set_times(self):
        """Set the times of directories, now that making their entries no longer changes them."""
        times, self._times, self._finishing = self._times, {}, True
        for path, mtime in times.items():
            parts = path.split("/") if path else []
            with contextlib.suppress(OSError, BadRequest):  # replaced by something else since
                parent = self._folders.enter(parts[:-1])
                fd = os.open(parts[-1], _FOLDER_FLAGS, dir_fd=parent) if parts else os.dup(parent)
                try:
                    os.utime(fd, ns=(mtime, mtime))
                finally:
                    os.close(fd)
        self._finishing = False

    # what is not a folder

    def _make_room(self, parent, name, entry):
        """Remove what stands where something else shall."""
        status = _lstat(parent, name)
        if status is None:
            return
        if self._strict and stat.S_ISDIR(status.st_mode) != (entry.type == TAR_DIRECTORY):
            first, second = ("non-directory", "directory") if entry.type == TAR_DIRECTORY else ("directory", "non-directory")
            raise BadRequest("cannot overwrite %s %s with %s %s" % (first, printable(name), second, printable(entry.name)))
        remove_at(parent, name, status.st_dev)

    def _make_file(self, entry, parent, parts):
        name = parts[-1]
        try:
            fd = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=parent)
        except FileExistsError:
            self._make_room(parent, name, entry)
            fd = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=parent)
        try:
            if entry.size:
                entry.copy_to(fd)
            self._set_attributes(fd, entry)
            os.utime(fd, ns=(entry.mtime, entry.mtime))
        finally:
            os.close(fd)

    def _set_attributes(self, fd, entry):
        # chown takes setuid bits and capabilities away, so it comes first
        owner = self._owner
        if owner is None:
            os.fchown(fd, entry.uid, entry.gid)
        elif owner:
            os.fchown(fd, *owner)
        os.fchmod(fd, entry.mode)
        if entry.xattrs:
            _set_xattrs(fd, {name: value for name, value in entry.xattrs.items() if _is_kept_xattr(name)})

    def _set_attributes_at(self, parent, name, entry):
        """Owner and time of what cannot be opened. Its mode it has from the start; its xattrs are left out, since only a path
        would reach them."""
        if self._owner is not False:
            uid, gid = self._owner or (entry.uid, entry.gid)
            os.chown(name, uid, gid, dir_fd=parent, follow_symlinks=False)
        os.utime(name, ns=(entry.mtime, entry.mtime), dir_fd=parent, follow_symlinks=False)

    def _place(self, make, parent, name, entry):
        try:
            make()
        except FileExistsError:
            self._make_room(parent, name, entry)
            make()

    def _make_symlink(self, entry, parent, parts):
        """A symlink may lead anywhere: whoever follows it does so inside the root."""
        name = parts[-1]
        self._place(lambda: os.symlink(entry.linkname, name, dir_fd=parent), parent, name, entry)
        self._set_attributes_at(parent, name, entry)

    def _make_special(self, entry, parent, parts):
        name, device = parts[-1], os.makedev(entry.devmajor, entry.devminor)
        kind = {TAR_CHAR: stat.S_IFCHR, TAR_BLOCK: stat.S_IFBLK, TAR_FIFO: stat.S_IFIFO}[entry.type]
        if kind == stat.S_IFCHR and not device:
            raise BadRequest("cannot extract %s: a character device 0:0 is overlay's mark of a deletion" % printable(entry.name))
        self._place(lambda: _mknod(name, kind | entry.mode, device, parent), parent, name, entry)
        self._set_attributes_at(parent, name, entry)

    def _make_link(self, entry, parent, parts):
        """A hard link: its target is looked up inside the root, and a symlink at its end is linked and not followed."""
        target, name = clean_name(entry.linkname), parts[-1]
        with contextlib.ExitStack() as stack:
            folder = there = None
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                folder = open_in_root(self._root_fd, "/".join([self._into] + target[:-1]), os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, folder)
                there = _lstat(folder, target[-1]) if target else None
            if there is None or is_whiteout(there) or stat.S_ISDIR(there.st_mode):
                raise BadRequest("invalid hardlink %s -> %s: there is no such file"
                                 % (printable(entry.name), printable(entry.linkname)))
            here = _lstat(parent, name)
            if here is None or (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino):
                self._place(lambda: os.link(target[-1], name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False),
                            parent, name, entry)

    _MAKERS = {TAR_FILE: _make_file, TAR_LINK: _make_link, TAR_SYMLINK: _make_symlink, TAR_CHAR: _make_special,
               TAR_BLOCK: _make_special, TAR_DIRECTORY: _make_directory, TAR_FIFO: _make_special}

    # whiteouts

    def _whiteout(self, parts):
        """Take an entry whose path holds `.wh.`: True when it was a mark and no file."""
        if any(part.startswith(WHITEOUT + WHITEOUT) and part != OPAQUE for part in parts):
            return True  # aufs' own files: .wh..wh.plnk, .wh..wh.aufs, ...
        if any(part.startswith(WHITEOUT) for part in parts[:-1]):
            raise BadRequest("invalid whiteout %s: a whiteout holds nothing" % printable("/".join(parts)))
        if not parts or not parts[-1].startswith(WHITEOUT):
            return False
        path, hidden = "/".join(parts[:-1]), parts[-1][len(WHITEOUT):]
        if parts[-1] != OPAQUE and hidden in ("", ".", ".."):
            raise BadRequest("invalid whiteout %s" % printable("/".join(parts)))
        parent = self._folders.enter(parts[:-1])
        if self._whiteouts == "apply":
            for name in os.listdir(parent) if parts[-1] == OPAQUE else [hidden]:
                self._clear(parent, name, path + "/" + name if path else name)
        elif parts[-1] == OPAQUE:
            os.setxattr(parent, OVERLAY_OPAQUE, b"y")
        else:
            self._mark_deleted(parent, hidden)
        return True

    @staticmethod
    def _mark_deleted(parent, name):
        """Overlay's whiteout. What the same layer has under that name stays; a folder then hides the one below."""
        try:
            _mknod(name, stat.S_IFCHR, 0, parent)
        except FileExistsError:
            if stat.S_ISDIR(_lstat(parent, name).st_mode):
                fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
                try:
                    os.setxattr(fd, OVERLAY_OPAQUE, b"y")
                finally:
                    os.close(fd)

    def _remember(self, parts):
        while parts:
            path = "/".join(parts)
            if path in self._made:
                return
            self._made.add(path)
            parts = parts[:-1]

    def _clear(self, parent, name, path):
        """Remove a name and what is below it, but for what this archive made."""
        status = _lstat(parent, name)
        if status is None:
            return
        if path not in self._made:
            remove_at(parent, name, status.st_dev)
        elif stat.S_ISDIR(status.st_mode):
            fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
            try:
                for child in os.listdir(fd):
                    self._clear(fd, child, path + "/" + child)
            finally:
                os.close(fd)


def _mknod(name, mode, device, parent):
    """mknod with exactly that mode: a chmod later would have to follow the name again."""
    umask = os.umask(0)
    try:
        os.mknod(name, mode, device, dir_fd=parent)
    finally:
        os.umask(umask)


# -- from a tree to a tree ----------------------------------------------------------------------------------------------------

_FICLONE = 0x40049409  # ioctl_ficlone(2)


def copy_tree(source_fd, target_fd, overlay=False):
    """Copy all that is below source_fd into the empty folder target_fd, with owners, modes, times, kept xattrs, hard links and
    holes, sharing the data where the file system can. Sockets are left out. overlay: the source is an overlay's upper directory:
    opaque marks are copied too (whiteouts always are). Nobody else may be writing to the target. Returns the bytes of content."""
    with _Folders(target_fd) as links:
        copier = _Copier(links, overlay)
        copier.copy_children(source_fd, target_fd, "")
        _copy_attributes(source_fd, target_fd, overlay)
        return copier.size


class _Copier:
    def __init__(self, links, overlay):
        self._links, self._overlay = links, overlay
        self._first = {}     # (device, inode) of files with several names: the first copy's path
        self._clones = True  # FICLONE works between these file systems, as far as we know
        self.size = 0

    def copy_children(self, source, target, path, depth=1):
        if depth > MOST_DEPTH:
            raise Error("%s...: more than %d folders within folders" % (printable(path[:100]), MOST_DEPTH))
        for name in _sorted_names(source):
            status = _lstat(source, name)
            if status is None or stat.S_ISSOCK(status.st_mode):
                continue
            with _unless_gone():
                if stat.S_ISDIR(status.st_mode):
                    self._copy_directory(source, target, name, path + name, depth)
                elif not self._linked(status, target, name, path + name):
                    self._copy_other(source, target, name, status)

    def _copy_directory(self, source, target, name, path, depth):
        old = os.open(name, _FOLDER_FLAGS, dir_fd=source)
        try:
            os.mkdir(name, 0o700, dir_fd=target)
            new = os.open(name, _FOLDER_FLAGS, dir_fd=target)
            try:
                self.copy_children(old, new, path + "/", depth + 1)
                _copy_attributes(old, new, self._overlay)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def _linked(self, status, target, name, path):
        if status.st_nlink < 2:
            return False
        first = self._first.setdefault((status.st_dev, status.st_ino), path)
        if first is path:
            return False
        parts = first.split("/")
        os.link(parts[-1], name, src_dir_fd=self._links.enter(parts[:-1]), dst_dir_fd=target, follow_symlinks=False)
        return True

    def _copy_other(self, source, target, name, status):
        if stat.S_ISREG(status.st_mode):
            self._copy_file(source, target, name)
            return
        if stat.S_ISLNK(status.st_mode):
            os.symlink(_readlink(source, name), name, dir_fd=target)
        else:
            _mknod(name, status.st_mode, status.st_rdev, target)
        os.chown(name, status.st_uid, status.st_gid, dir_fd=target, follow_symlinks=False)
        os.utime(name, ns=(status.st_atime_ns, status.st_mtime_ns), dir_fd=target, follow_symlinks=False)

    def _copy_file(self, source, target, name):
        old = os.open(name, _READ_FLAGS, dir_fd=source)
        try:
            new = os.open(name, _CREATE_FLAGS, 0o600, dir_fd=target)
            try:
                size = os.fstat(old).st_size
                if size and not self._clone(old, new):
                    _copy_data(old, new, size)
                self.size += size
                _copy_attributes(old, new, self._overlay)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def _clone(self, old, new):
        if self._clones:
            import fcntl
            try:
                fcntl.ioctl(new, _FICLONE, old)
            except OSError:
                self._clones = False
        return self._clones


def _copy_attributes(old, new, overlay):
    status = os.fstat(old)
    os.fchown(new, status.st_uid, status.st_gid)
    os.fchmod(new, status.st_mode & 0o7777)
    _set_xattrs(new, _kept_xattrs(old, overlay))
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))


def _copy_data(old, new, size):
    """Copy a file's pieces of data to an empty file; the holes between them stay holes."""
    end = 0
    while end < size:
        try:
            start = os.lseek(old, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            start = end
        try:
            end = os.lseek(old, start, os.SEEK_HOLE)
        except OSError:
            end = size
        if not _copy_piece(old, new, start, min(end, size)):
            break
    os.ftruncate(new, size)


def _copy_piece(old, new, at, end):
    """Copy bytes at..end; False when the file has become shorter."""
    while at < end:
        try:
            copied = os.copy_file_range(old, new, end - at, at, at)
        except (OSError, AttributeError):  # across file systems before Linux 5.3, and where the C library has none
            data = os.pread(old, min(end - at, 1 << 20), at)
            copied = os.pwrite(new, data, at) if data else 0
        if not copied:
            return False
        at += copied
    return True


# -- what has changed ---------------------------------------------------------------------------------------------------------

def tree_changes(new_fd, old_fds, overlay=False):
    """What has changed in a tree: [(CHANGED | ADDED | DELETED, "/path")] sorted by path, with docker's rules: a folder counts as
    changed when its owner, mode or xattrs did, or something in it; all of an added folder is listed, of a deleted one only its
    name.

    overlay: new_fd is an overlay's upper directory and old_fds are the roots of its lower layers, top first. Else both are full
    trees, old_fds = [root]. A file counts as changed by type, mode, owner, size, mtime, device, symlink target or xattrs; content
    is not read."""
    changes = []
    _Comparison(overlay, changes).folders(new_fd, list(old_fds), "")
    return sorted(changes, key=lambda change: os.fsencode(change[1]))


class _Comparison:
    def __init__(self, overlay, changes):
        self._overlay, self._changes = overlay, changes

    def folders(self, new, olds, path):
        """Compare an open folder with the same one in the lower layers."""
        if path.count("/") > MOST_DEPTH:
            raise Error("%s...: more than %d folders within folders" % (printable(path[:100]), MOST_DEPTH))
        names = os.listdir(new)
        for name in names:
            self._name(new, olds, name, path + "/" + name)
        if olds and not (self._overlay and not _is_opaque(new)):
            for name in self._merged_names(olds).difference(names):
                self._changes.append((DELETED, path + "/" + name))

    def _name(self, new, olds, name, path):
        status = _lstat(new, name)
        if status is None:
            return
        index, old_status = self._look_up(olds, name)
        if self._overlay and is_whiteout(status):
            if old_status is not None:
                self._changes.append((DELETED, path))
            return
        before = len(self._changes)
        if old_status is None:
            self._changes.append((ADDED, path))
        elif self._differ(new, olds[index], name, status, old_status):
            self._changes.append((CHANGED, path))
        if stat.S_ISDIR(status.st_mode):
            listed = len(self._changes) > before
            self._deeper(new, olds[index:] if old_status is not None and stat.S_ISDIR(old_status.st_mode) else [], name, path)
            if not listed and len(self._changes) > before:
                self._changes.append((CHANGED, path))

    def _deeper(self, new, olds, name, path):
        with contextlib.ExitStack() as stack:
            def opened(parent):
                fd = os.open(name, _FOLDER_FLAGS, dir_fd=parent)
                stack.callback(os.close, fd)
                return fd

            fd, deeper = opened(new), []
            for old in olds:
                status = _lstat(old, name)
                if status is None:
                    continue
                if not stat.S_ISDIR(status.st_mode):
                    break  # a file or a whiteout hides the layers below
                deeper.append(opened(old))
                if self._overlay and _is_opaque(deeper[-1]):
                    break
            self.folders(fd, deeper, path)

    def _look_up(self, olds, name):
        """(index of the layer, status) of a name in the merged lower layers; (0, None) where there is nothing."""
        for index, fd in enumerate(olds):
            status = _lstat(fd, name)
            if status is not None:
                return (0, None) if self._overlay and is_whiteout(status) else (index, status)
        return 0, None

    def _merged_names(self, olds):
        return {name for fd in olds for name in os.listdir(fd) if self._look_up(olds, name)[1] is not None}

    @staticmethod
    def _differ(new, old, name, status, old_status):
        if (status.st_mode, status.st_uid, status.st_gid, status.st_rdev) != (
                old_status.st_mode, old_status.st_uid, old_status.st_gid, old_status.st_rdev):
            return True
        if not stat.S_ISDIR(status.st_mode):
            if status.st_size != old_status.st_size or not _same_time(status.st_mtime_ns, old_status.st_mtime_ns):
                return True
        if stat.S_ISLNK(status.st_mode):
            return os.readlink(name, dir_fd=new) != os.readlink(name, dir_fd=old)
        return _xattrs_at(new, name, status) != _xattrs_at(old, name, status)


def _same_time(one, other):
    """Equal, where a time without fraction may be one that an archive or a file system has cut to seconds."""
    return one == other or one // 10 ** 9 == other // 10 ** 9 and not (one % 10 ** 9 and other % 10 ** 9)


def _xattrs_at(parent, name, status):
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        return _NO_XATTRS
    fd = os.open(name, _READ_FLAGS, dir_fd=parent)
    try:
        return _kept_xattrs(fd)
    finally:
        os.close(fd)


########################################################################
# 5. Storage
########################################################################
# Layers are folders named by chain id; a container's root is the union of its image's layers, a folder of mount points, and a folder
# of its own that takes what it writes. A *root* is described by plain data (what the drivers return), so that the daemon can
# describe it, and only a short-lived child or init, in a mount namespace of its own, mounts it. The host's mount table stays clean.

class Layers:
    """The layers of one data root, under `layers/`. A layer is a folder CHAINID with

        diff/       the tree, in the driver's form of whiteouts
        layer.json  {parent: chain id or null, diff_id: hex, size: bytes of content, link: short name}
        mounts/     made once, with the first container: the mount points that an image ending here lacks

    and `layers/LINK` is a symlink to its diff, so that the options of an overlay mount with hundreds of layers fit one page.
    A layer is made in `tmp/`, and what stands under its chain id is whole."""

    def __init__(self, root, driver):
        self.folder, self.tmp, self.driver = os.path.join(root, "layers"), os.path.join(root, "tmp"), driver
        self.lock = threading.RLock()
        os.makedirs(self.folder, 0o700, exist_ok=True)
        self.meta = {}
        for name in os.listdir(self.folder):
            if HEX_ID.fullmatch(name):
                self.meta[name] = read_json(os.path.join(self.folder, name, "layer.json"))

    def path(self, chain, *names):
        return os.path.join(self.folder, chain, *names)

    def chain(self, chain):
        """Chain ids from the lowest layer to `chain`; empty for None."""
        found = []
        while chain:
            found.append(chain)
            chain = self.meta[chain]["parent"]
        return found[::-1]

    def size(self, chain):
        """Bytes of content of the layer and all below it."""
        return sum(self.meta[c]["size"] for c in self.chain(chain))

    @contextlib.contextmanager
    def making(self):
        """A folder under tmp/ with an empty diff/ to fill; what is left of it afterwards is removed."""
        folder = os.path.join(self.tmp, "layer-" + new_id()[:16])
        os.makedirs(os.path.join(folder, "diff"), 0o755)
        os.chmod(folder, 0o700)
        try:
            yield folder
        finally:
            remove_tree(folder)

    def adopt(self, folder, parent, diff_id, size):
        """Make the folder's diff/ the layer on `parent`; returns its chain id. A layer that is here already is kept."""
        chain = chain_id(parent, diff_id)
        with self.lock:
            if chain in self.meta:
                return chain
            meta = {"parent": parent, "diff_id": diff_id, "size": size, "link": self._free_link(chain)}
            write_json(os.path.join(folder, "layer.json"), meta)
            fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
            try:
                syncfs(fd)  # one call for a whole tree
                os.rename(folder, self.path(chain))
            finally:
                os.close(fd)
            self._link(chain, meta)
            sync_folder(self.folder)
            self.meta[chain] = meta
            return chain

    def _free_link(self, chain):
        taken = {meta["link"] for meta in self.meta.values()}
        return next(chain[i:i + 8] for i in range(56) if chain[i:i + 8] not in taken)

    def _link(self, chain, meta):
        with contextlib.suppress(FileExistsError):
            os.symlink(os.path.join(chain, "diff"), os.path.join(self.folder, meta["link"]))

    def repair(self):
        """At start: each layer has its link (the power may have gone between the two)."""
        for chain, meta in self.meta.items():
            self._link(chain, meta)

    def delete(self, chain):
        """Remove one layer; nothing may use it any more. Renamed away first, so that it is whole or gone."""
        with self.lock:
            meta = self.meta.pop(chain)
            gone = os.path.join(self.tmp, "gone-" + chain[:16] + new_id()[:8])
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, meta["link"]))
            os.rename(self.path(chain), gone)
        remove_tree(gone)

    def retain(self, chains):
        """Delete every layer that no chain in `chains` contains."""
        with self.lock:
            needed = {c for top in chains for c in self.chain(top)}
            # children first, so that a cut-off clean-up leaves no layer without its parent
            for chain in sorted(set(self.meta) - needed, key=lambda c: -len(self.chain(c))):
                self.delete(chain)


def through_pipe(produce, consume):
    """consume(stream) of what produce(write) writes, the two at the same time; an error of either is raised."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    failures = []

    def run():
        try:
            produce(functools.partial(write_all, sink))
        except BaseException as error:
            failures.append(error)
        finally:
            os.close(sink)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        with open(source, "rb", buffering=0) as stream:
            result = consume(stream)
    finally:
        thread.join()
    if failures:
        raise failures[0]
    return result


# -- drivers ----------------------------------------------------------------------------------------------------------------

class OverlayDriver:
    """The kernel's overlay file system: a container costs two empty folders."""
    name, whiteouts = "overlay", "overlay"

    def __init__(self, root):
        self.root = root

    def image_root(self, layers, chain, host=None):
        """The image's layers without anything of a container: for looking into, not for writing."""
        lower = ["/" if host == "/" else host] if host else [layers.meta[c]["link"] for c in reversed(layers.chain(chain))]
        return {"driver": "overlay", "folder": layers.folder, "lower": lower}

    def prepare(self, layers, chain, folder):
        """Make what a container needs in its folder."""
        os.mkdir(os.path.join(folder, "upper"), 0o755)
        os.mkdir(os.path.join(folder, "work"), 0o700)

    def container_root(self, layers, chain, folder, mounts, host=None):
        """A container's root: `mounts` (a folder's path) and its upper folder above the image."""
        spec = self.image_root(layers, chain, host)
        spec["lower"].insert(0, os.path.relpath(mounts, layers.folder))
        spec["overlapping"] = bool(host)
        spec.update(upper=os.path.relpath(os.path.join(folder, "upper"), layers.folder),
                    work=os.path.relpath(os.path.join(folder, "work"), layers.folder))
        return spec


class VfsDriver:
    """Plain copies, for data roots that overlay cannot use: slow to create, correct everywhere."""
    name, whiteouts = "vfs", "plain"

    def __init__(self, root):
        self.root = root

    def tree(self, layers, chain):
        """The folder with the whole image, assembled at its first use from the parent's and the layer's diff."""
        if chain is None:
            empty = os.path.join(self.root, "layers", "empty")
            os.makedirs(empty, 0o755, exist_ok=True)
            return empty
        path = layers.path(chain, "tree")
        with layers.lock:
            if not os.path.isdir(path):
                below = self.tree(layers, layers.meta[chain]["parent"])
                with layers.making() as folder:
                    with opened_folder(os.path.join(folder, "diff")) as target:
                        with opened_folder(below) as source:
                            copy_tree(source, target)
                        with opened_folder(layers.path(chain, "diff")) as source:
                            through_pipe(functools.partial(pack, source), lambda stream: unpack(TarReader(stream), target, whiteouts="apply"))
                        syncfs(target)
                    os.rename(os.path.join(folder, "diff"), path)
        return path

    def image_root(self, layers, chain, host=None):
        if host:
            raise BadRequest("the image 'host' needs the overlay driver; this data root uses vfs: name another with -g, on a file "
                             "system that overlay can use")
        return {"driver": "vfs", "source": self.tree(layers, chain)}

    def prepare(self, layers, chain, folder):
        target = os.path.join(folder, "root")
        os.mkdir(target, 0o755)
        with opened_folder(self.tree(layers, chain)) as source, opened_folder(target) as fd:
            copy_tree(source, fd)
            syncfs(fd)

    def container_root(self, layers, chain, folder, mounts, host=None):
        return {"driver": "vfs", "source": os.path.join(folder, "root")}


DRIVERS = {driver.name: driver for driver in (OverlayDriver, VfsDriver)}


@contextlib.contextmanager
def opened_folder(path, flags=0):
    """A descriptor of a folder for the length of a with block."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


# Without these a directory renamed in a container becomes a redirect that only this very stack of layers understands.
_OVERLAY_OPTIONS = ",redirect_dir=off,index=off,metacopy=off"


def _mount_overlay(target, data, volatile):
    """The mount with the options that this kernel knows: volatile (no sync of the file system at the unmount) came with 5.10,
    metacopy with 4.19."""
    for options in ([_OVERLAY_OPTIONS + ",volatile"] if volatile else []) + [_OVERLAY_OPTIONS, ""]:
        try:
            mount("overlay", target, "overlay", 0, data + options)
            return
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Error("this kernel refuses a container's folder below the image 'host' itself: start the daemon with its data "
                            "root (-g) on another file system")
            if error.errno != errno.EINVAL or not options:
                raise


def mount_root(spec, target):
    """Mount a root described by a driver on target; the caller is in a mount namespace of its own. Overlay paths are relative to
    the layers' folder: 300 layers fit the one page that mount(2) takes."""
    if spec["driver"] == "vfs":
        mount(spec["source"], target, None, MS_BIND)
        return
    here = os.open(".", os.O_PATH | os.O_CLOEXEC)
    os.chdir(spec["folder"])
    try:
        if len(spec["lower"]) == 1 and "upper" not in spec:
            mount(spec["lower"][0], target, None, MS_BIND)
            return
        lower = list(spec["lower"])
        if spec.get("overlapping"):
            # the mount points' folder lies below the other lower folder, the host's root, and overlay refuses that (ELOOP): a copy on
            # a tmpfs, which the overlay is then mounted over
            mount("tmpfs", target, "tmpfs", MS_NOSUID, "mode=755")
            with opened_folder(lower[0]) as source, opened_folder(target) as copy:
                copy_tree(source, copy, overlay=True)
            lower[0] = target
        data = "lowerdir=" + ":".join(re.sub(r"([\\:,])", r"\\\1", path) for path in lower)
        if "upper" in spec:
            data += ",upperdir=%s,workdir=%s" % (spec["upper"], spec["work"])
        _mount_overlay(target, data, spec.get("volatile"))
    finally:
        os.fchdir(here)
        os.close(here)


def private_mounts():
    """A mount namespace of its own for this process, from which nothing propagates to the host."""
    unshare(NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)


def probe_overlay(root):
    """Runs in a child: raises OSError where the data root cannot be the upper folder of an overlay mount."""
    private_mounts()
    folder = os.path.join(root, "tmp", "probe-" + new_id()[:8])
    parts = {name: os.path.join(folder, name) for name in ("lower", "upper", "work", "merged")}
    for path in parts.values():
        os.makedirs(path)
    try:
        mount("overlay", parts["merged"], "overlay", 0, "lowerdir=%(lower)s,upperdir=%(upper)s,workdir=%(work)s" % parts)
        with open(os.path.join(parts["lower"], "a"), "w"):
            pass
        os.mkdir(os.path.join(parts["merged"], "d"))
        os.mknod(os.path.join(parts["upper"], "w"), stat.S_IFCHR, 0)  # what a whiteout is
        umount(parts["merged"])
    finally:
        remove_tree(folder)


@task
def tree_size(fds, path):
    """Child: bytes of content below path, on its file system."""
    total, seen, device = 0, set(), os.lstat(path).st_dev
    for folder, folders, names, fd in os.fwalk(path):
        if os.fstat(fd).st_dev != device:
            folders[:] = []
            continue
        for name in names:
            with contextlib.suppress(OSError):
                there = os.lstat(name, dir_fd=fd)
                if stat.S_ISREG(there.st_mode) and there.st_ino not in seen:
                    total += there.st_size
                    if there.st_nlink > 1:
                        seen.add(there.st_ino)
    return total


# -- mount points -------------------------------------------------------------------------------------------------------------

# What every container mounts over, and what is made where the image has none.
MOUNT_POINTS = (("/proc", "dir"), ("/sys", "dir"), ("/dev", "dir"), ("/etc/hostname", "file"), ("/etc/hosts", "file"),
                ("/etc/resolv.conf", "file"), ("/.dockerenv", "file"))


def make_in_root(root_fd, path, kind, mode=0o755, owner=None):
    """Make a folder or an empty file at path inside the root, with the parents that are missing; what is there already stays as
    it is. Symlinks are followed inside the root, a dangling one to where it points. Returns an O_PATH descriptor of it."""
    for _ in range(40):
        with contextlib.suppress(FileNotFoundError):
            return open_in_root(root_fd, path, os.O_PATH)
        parent, name = os.path.split(os.path.normpath("/" + path))
        parent_fd = make_in_root(root_fd, parent, "dir", mode, owner) if parent != "/" else os.dup(root_fd)
        try:
            try:
                target = os.readlink(name, dir_fd=parent_fd)
            except OSError:
                if kind == "dir":
                    os.mkdir(name, mode, dir_fd=parent_fd)
                else:
                    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=parent_fd))
                if owner:
                    os.chown(name, owner[0], owner[1], dir_fd=parent_fd, follow_symlinks=False)
                return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
            path = os.path.join(parent, target)
        finally:
            os.close(parent_fd)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def make_mount_points(spec, folder, masks, work):
    """Runs in a child: fill `folder` with the mount points that the image lacks, by writing through an overlay whose upper folder it
    is: the kernel copies the attributes of parents up, and follows no symlink out. `masks` are the paths of the `host` image that
    nobody may see: empty opaque folders there."""
    private_mounts()
    os.umask(0)
    for path in masks:
        _mask(spec["lower"][0], folder, path.strip("/"))
    if not spec["lower"]:  # FROM scratch: nothing below
        target = folder
    else:
        target = os.path.join(work, "merged")
        os.mkdir(target)
        os.mkdir(os.path.join(work, "work"))
        mount_root(dict(spec, upper=folder, work=os.path.join(work, "work")), target)
    with opened_folder(target) as root_fd:
        for path, kind in MOUNT_POINTS:
            os.close(make_in_root(root_fd, path, kind))


def _mask(lower, folder, path):
    """An empty opaque folder at path in an upper folder, its parents with the attributes they have below."""
    below, above = lower.rstrip("/"), folder
    for part in path.split("/"):
        below, above = below + "/" + part, above + "/" + part
        try:
            there = os.lstat(below)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(there.st_mode):
            return
        if not os.path.isdir(above):
            os.mkdir(above)
            os.chown(above, there.st_uid, there.st_gid)
            os.chmod(above, stat.S_IMODE(there.st_mode))
    os.setxattr(above, "trusted.overlay.opaque", b"y")


########################################################################
# 6. Images
########################################################################
# An image is its config, a JSON document whose sha256 is the image id; the config names the layers by diff id. Tags point to ids.
# `host` is built in: its lower folder is the root of this very machine.

CONFIG_MEDIA_TYPE = "application/vnd.docker.container.image.v1+json"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm", "armv6l": "arm"}
ARCHITECTURE = ARCHITECTURES.get(os.uname().machine, os.uname().machine)
HOST_IMAGE = "host"

# docker's Config object, the part of it that belongs to an image; inspect shows every key
EMPTY_CONFIG = {"Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False, "AttachStderr": False,
                "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": None, "Cmd": None, "Image": "", "Volumes": None,
                "WorkingDir": "", "Entrypoint": None, "OnBuild": None, "Labels": None}
# What an image's config may say about a container. Everything else in it is ignored: an image is not trusted (CVE-2014-6408).
IMAGE_CONFIG_KEYS = ("User", "ExposedPorts", "Env", "Cmd", "Volumes", "WorkingDir", "Entrypoint", "OnBuild", "Labels", "StopSignal",
                     "StopTimeout", "Healthcheck", "Shell", "ArgsEscaped")


class Image:
    """One image. `id` is hex; `config` the parsed config document; `meta` what pydock knows besides: {parent: id or "", local: true
    where it was made here, tagged: ns of the last tag, digests: {repository: digest}, host: true for the built-in one}."""

    def __init__(self, image_id, config, meta, layers):
        self.id, self.config, self.meta, self._layers = image_id, config, meta, layers

    @property
    def diff_ids(self):
        return [digest.partition(":")[2] for digest in self.config.get("rootfs", {}).get("diff_ids") or []]

    @property
    def chain(self):
        """The chain id of the top layer; None where there is no layer."""
        return functools.reduce(chain_id, self.diff_ids, None)

    @property
    def is_host(self):
        return bool(self.meta.get("host"))

    @property
    def size(self):
        return self._layers.size(self.chain)

    @property
    def created(self):
        return parse_time(self.config.get("created") or ZERO_TIME)

    @property
    def container_config(self):
        """The part of the config that counts for containers, checked for its types' sake to be a dict."""
        config = self.config.get("config")
        return {k: v for k, v in config.items() if k in IMAGE_CONFIG_KEYS and v is not None} if isinstance(config, dict) else {}


class Images:
    """The images of one data root: `blobs/sha256/ID` is the config, `images/ID.json` the meta, `tags.json` maps repository:tag to id.
    Set by the engine: `users(image_id)` lists the containers of an image as (container id, running), `used_chains()` the chain ids
    that containers and pulls under way stand on, `collected()` is called when layers were removed."""

    def __init__(self, root, layers, host_root="/"):
        self.root, self.layers, self.lock = root, layers, threading.RLock()
        self.blobs, self.folder = os.path.join(root, "blobs", "sha256"), os.path.join(root, "images")
        self.users, self.emit = lambda image_id: [], lambda action, image_id, **attributes: None
        self.used_chains, self.collected = lambda: (), lambda: None
        for folder in (self.blobs, self.folder):
            os.makedirs(folder, 0o700, exist_ok=True)
        self.tags = read_json(os.path.join(root, "tags.json"), {})
        self.images = {}
        for name in os.listdir(self.folder):
            image_id, dot, kind = name.partition(".")
            if HEX_ID.fullmatch(image_id) and kind == "json":
                self._load(image_id)
        self._add_host(host_root)

    def _load(self, image_id):
        config = read_json(os.path.join(self.blobs, image_id))
        self.images[image_id] = Image(image_id, config, read_json(os.path.join(self.folder, image_id + ".json")), self.layers)

    def _add_host(self, host_root):
        config = {"architecture": ARCHITECTURE, "os": "linux", "created": ZERO_TIME, "author": "pydock",
                  "config": {"Env": ["PATH=" + DEFAULT_PATH], "Cmd": ["/bin/sh"], "WorkingDir": "/"},
                  "rootfs": {"type": "host", "diff_ids": []},
                  "history": [{"created": ZERO_TIME, "created_by": "the root file system of this host", "empty_layer": True}]}
        image_id = sha256_hex(json.dumps(config).encode())
        self.host = Image(image_id, config, {"parent": "", "host": True, "path": host_root}, self.layers)

    # -- finding ---------------------------------------------------------------------------------------------------------

    def find(self, name):
        """The image of a name, an id or a unique id prefix; NotFound in docker's words."""
        image = self.lookup(name)
        if image is None:
            if not HEX_ID.fullmatch(name) and not name.startswith("sha256:"):
                name = str(Reference.parse(name)) if "@" in name else Reference.parse(name).tagged
            raise NotFound("No such image: %s" % name)
        return image

    def lookup(self, name):
        with self.lock:
            hex_id = name[7:] if name.startswith("sha256:") else name
            if hex_id in self.images or hex_id == self.host.id:
                return self.images.get(hex_id, self.host)
            try:
                reference = Reference.parse(name)
            except BadRequest:
                if not re.fullmatch(r"[0-9a-f]{1,64}", hex_id):
                    raise
                reference = None
            if reference is not None:
                found = self._by_reference(reference)
                if found is not None:
                    return found
            found = find_by_prefix(list(self.images) + [self.host.id], hex_id)
            return self.images.get(found, self.host) if found else None

    def _by_reference(self, reference):
        if reference.digest:
            for image in self.images.values():
                if image.meta.get("digests", {}).get(reference.repository) == reference.digest:
                    # both must hold: a digest of another tag's image is not that tag
                    if not reference.tag or self.tags.get(reference.tagged) == image.id:
                        return image
            return None
        if reference.tagged in self.tags:
            return self.images.get(self.tags[reference.tagged])
        return self.host if reference.tagged == HOST_IMAGE + ":latest" else None

    def tags_of(self, image):
        if image.is_host:
            return [HOST_IMAGE + ":latest"]
        return sorted(tag for tag, image_id in self.tags.items() if image_id == image.id)

    def digests_of(self, image):
        return sorted("%s@%s" % pair for pair in image.meta.get("digests", {}).items())

    def children(self, image):
        return [i for i in self.images.values() if i.meta.get("parent") == image.id]

    def all(self):
        with self.lock:
            return list(self.images.values())

    # -- changing --------------------------------------------------------------------------------------------------------

    def add(self, config, parent="", local=True, digests=None):
        """Record an image whose layers are here; `config` is a dict, or the bytes of a config that came from elsewhere (its digest
        is the id, so the bytes stay). Returns the Image."""
        data = config if isinstance(config, bytes) else json.dumps(config, separators=(",", ":")).encode()
        image_id = sha256_hex(data)
        with self.lock:
            image = self.images.get(image_id)
            if image is None:
                write_file(os.path.join(self.blobs, image_id), data)
                image = Image(image_id, json.loads(data), {"parent": parent, "local": local, "tagged": 0, "digests": {}}, self.layers)
            image.meta["digests"].update(digests or {})
            self._save_meta(image)
            self.images[image_id] = image
            return image

    def _save_meta(self, image):
        write_json(os.path.join(self.folder, image.id + ".json"), image.meta)

    def tag(self, image, reference):
        """Point repository:tag (a Reference) at the image."""
        if reference.digest:
            raise BadRequest("refusing to create a tag with a digest reference")
        if reference.tagged == HOST_IMAGE + ":latest":
            raise BadRequest("the name 'host' is built in: it stands for the root file system of this machine; use another name")
        if image.is_host:
            raise BadRequest("the image 'host' cannot be tagged: commit a container of it to make an image of your own")
        with self.lock:
            self.tags[reference.tagged] = image.id
            write_json(os.path.join(self.root, "tags.json"), self.tags)
            image.meta["tagged"] = time.time_ns()
            self._save_meta(image)
        self.emit("tag", image.id, name=reference.tagged)

    def remove(self, name, force=False, prune=True):
        """docker rmi: untag, and delete what nothing needs any more. Returns [{"Untagged": ..} or {"Deleted": ..}, ...]; Conflict in
        docker's words where something needs it."""
        with self.lock:
            image = self.find(name)
            if image.is_host:
                raise Conflict("conflict: unable to delete %s (cannot be forced) - 'host' is this machine itself" % image.id[:12])
            by_id = image.id.startswith(name[7:] if name.startswith("sha256:") else name)
            tags = self.tags_of(image)
            if not by_id:
                reference = Reference.parse(name)
                mine = [reference.tagged] if not reference.digest else tags
                if len(tags) > len(mine):
                    return self._untag(image, mine)
                self._check_unused(image, force, 'unable to remove repository reference "%s" (must force)' % name)
            else:
                if len({t.rpartition(":")[0] for t in tags}) > 1 and not force:
                    raise Conflict("conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories"
                                   % image.id[:12])
                self._check_unused(image, force, None)
            if self.users(image.id) and tags:  # forced: a container stands on it, so only its names go
                return self._untag(image, tags if by_id else mine)
            if self.children(image):
                if not by_id or force and tags:
                    return self._untag(image, tags)
                raise Conflict("conflict: unable to delete %s (cannot be forced) - image has dependent child images" % image.id[:12])
            return self._untag(image, tags) + self._delete(image, prune)

    def _check_unused(self, image, force, reference_words):
        for container_id, running in self.users(image.id):
            if running:
                if reference_words and force:
                    continue
                words = "unable to delete %s (cannot be forced) - image is being used by running container %s"
            else:
                words = "unable to delete %s (must be forced) - image is being used by stopped container %s"
            if force and not running and self.tags_of(image):
                continue
            if reference_words:
                raise Conflict("conflict: %s - container %s is using its referenced image %s"
                               % (reference_words, container_id[:12], image.id[:12]))
            raise Conflict("conflict: " + words % (image.id[:12], container_id[:12]))

    def _untag(self, image, tags):
        for tag in tags:
            del self.tags[tag]
        write_json(os.path.join(self.root, "tags.json"), self.tags)
        gone = [{"Untagged": tag} for tag in tags]
        for repository, digest in list(image.meta.get("digests", {}).items()):
            if not any(t.rpartition(":")[0] == repository for t in self.tags_of(image)):
                del image.meta["digests"][repository]
                gone.append({"Untagged": "%s@%s" % (repository, digest)})
        self._save_meta(image)
        for tag in tags:
            self.emit("untag", image.id, name=tag)
        return gone

    def _delete(self, image, prune):
        """Delete the image and, with prune, those of its parents that only it needed. The layers of a container stay."""
        gone = []
        while image is not None and not self.tags_of(image) and not self.children(image) and not self.users(image.id):
            parent = self.images.get(image.meta.get("parent"))
            del self.images[image.id]
            os.unlink(os.path.join(self.folder, image.id + ".json"))  # from here on it is no image; the rest is rubbish
            gone.append({"Deleted": "sha256:" + image.id})
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.blobs, image.id))
            self.emit("delete", image.id, name="sha256:" + image.id)
            image = parent if prune else None
        before = set(self.layers.meta)
        self.collect()
        return gone + [{"Deleted": "sha256:" + chain} for chain in sorted(before - set(self.layers.meta))]

    def collect(self):
        """Remove layers that no image and no container needs; also finishes at start what a power cut left half done."""
        needed = {image.chain for image in self.images.values()} | set(self.used_chains())
        self.layers.retain({chain for chain in needed if chain})
        self.collected()

    # -- as the API shows them ---------------------------------------------------------------------------------------------

    def summary(self, image):
        """One entry of GET /images/json."""
        return {"Containers": -1, "Created": image.created // 10 ** 9, "Id": "sha256:" + image.id,
                "Labels": image.container_config.get("Labels"), "ParentId": self._digest(image.meta.get("parent")),
                "RepoDigests": self.digests_of(image), "RepoTags": self.tags_of(image), "SharedSize": -1, "Size": image.size}

    @staticmethod
    def _digest(image_id):
        return "sha256:" + image_id if image_id else ""

    def inspect(self, image):
        """GET /images/NAME/json."""
        config = image.config
        driver = self.layers.driver
        return {"Id": "sha256:" + image.id, "RepoTags": self.tags_of(image), "RepoDigests": self.digests_of(image),
                "Parent": self._digest(image.meta.get("parent")), "Comment": config.get("comment", ""),
                "Created": config.get("created") or ZERO_TIME, "DockerVersion": config.get("docker_version", ""),
                "Author": config.get("author", ""), "Config": dict(EMPTY_CONFIG, **image.container_config),
                "Architecture": config.get("architecture", ""), "Os": config.get("os", ""), "Size": image.size,
                "GraphDriver": {"Data": {"UpperDir": self.layers.path(image.chain, "diff")} if image.chain else None,
                                "Name": driver.name},
                "RootFS": {"Type": "layers", "Layers": ["sha256:" + d for d in image.diff_ids]},
                "Metadata": {"LastTagTime": format_time(image.meta.get("tagged", 0))}}

    def history(self, image):
        """GET /images/NAME/history: newest first."""
        entries, chains = [], self.layers.chain(image.chain)
        history = image.config.get("history") or [{"created": image.config.get("created")} for _ in chains]
        remaining = list(chains)
        for entry in history:
            size = 0
            if not entry.get("empty_layer") and remaining:
                size = self.layers.meta[remaining.pop(0)]["size"]
            entries.append({"Id": "<missing>", "Created": parse_time(entry.get("created") or ZERO_TIME) // 10 ** 9,
                            "CreatedBy": entry.get("created_by", ""), "Tags": None, "Size": size, "Comment": entry.get("comment", "")})
        entries.reverse()
        ancestor = image  # the images that the steps were, as far as they are still here
        for entry in entries:
            if ancestor is None:
                break
            entry["Id"], entry["Tags"] = "sha256:" + ancestor.id, self.tags_of(ancestor) or None
            ancestor = self.images.get(ancestor.meta.get("parent"))
        return entries


# -- config changes: --change of commit and import, and the Dockerfile's instructions that only touch the config -------------------

def split_words(text):
    """Words of a line with shell quoting: `a "b c" d\\ e`."""
    import shlex
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadRequest("%s: %s" % (text, error))


def command_form(text):
    """The words of CMD, ENTRYPOINT, ...: a JSON list of strings as it is, else None for the shell form."""
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            words = json.loads(text)
            if all(isinstance(word, str) for word in words):
                return words
    return None


def key_values(text, instruction):
    """`A=1 B="x y"`, or the old `A the rest of the line`, to a list of pairs."""
    if "=" not in text.split(None, 1)[0]:
        parts = text.split(None, 1)
        if len(parts) < 2:
            raise BadRequest("%s must have two arguments" % instruction)
        return [tuple(parts)]
    pairs = [word.partition("=")[::2] for word in split_words(text)]
    if not all(name for name, _ in pairs):
        raise BadRequest("%s names can not be blank" % instruction)
    return pairs


def set_env(env, name, value):
    """The Env list with NAME=value in the place of an older one, or at the end."""
    env = list(env or [])
    entry = "%s=%s" % (name, value)
    for i, old in enumerate(env):
        if old.partition("=")[0] == name:
            env[i] = entry
            return env
    return env + [entry]


def _change_shell_form(key):
    def change(config, text):
        config[key] = command_form(text) or list(config.get("Shell") or ["/bin/sh", "-c"]) + [text]
        if key == "Entrypoint":
            config["Cmd"] = None
    return change


def _change_env(config, text):
    for name, value in key_values(text, "ENV"):
        config["Env"] = set_env(config.get("Env"), name, value)


def _change_label(config, text):
    config["Labels"] = dict(config.get("Labels") or {}, **dict(key_values(text, "LABEL")))


def _change_expose(config, text):
    ports = dict(config.get("ExposedPorts") or {})
    for word in split_words(text):
        for port in parse_exposed(word):
            ports[port] = {}
    config["ExposedPorts"] = ports


def parse_exposed(word):
    """`80`, `53/udp`, `8000-8002/tcp` to ["80/tcp"], ...; ports 1 to 65535."""
    numbers, _, protocol = word.partition("/")
    protocol = (protocol or "tcp").lower()
    first, _, last = numbers.partition("-")
    if not first.isdigit() or last and not last.isdigit() or protocol not in ("tcp", "udp", "sctp"):
        raise BadRequest("invalid containerPort: %s" % word)
    low, high = int(first), int(last or first)
    if not 0 < low <= high < 65536:
        raise BadRequest("invalid containerPort: %s: ports go from 1 to 65535" % word)
    return ["%d/%s" % (port, protocol) for port in range(low, high + 1)]


def _change_volume(config, text):
    names = command_form(text) or split_words(text)
    if not all(name.strip() for name in names) or not names:
        raise BadRequest("VOLUME specified can not be an empty string")
    config["Volumes"] = dict(config.get("Volumes") or {}, **{name: {} for name in names})


def _change_workdir(config, text):
    path = text.strip().strip("\"'") if text.strip()[:1] in "\"'" else text.strip()
    config["WorkingDir"] = os.path.normpath(os.path.join(config.get("WorkingDir") or "/", path))


def _change_stop_signal(config, text):
    signal_number(text.strip())
    config["StopSignal"] = text.strip()


def _change_shell(config, text):
    words = command_form(text)
    if not words:
        raise BadRequest("SHELL requires the arguments to be in JSON form")
    config["Shell"] = words


_HEALTH_FLAGS = {"interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod", "start-interval": "StartInterval",
                 "retries": "Retries"}


def _change_healthcheck(config, text):
    health, rest = {}, text
    while rest.startswith("--"):
        flag, _, rest = rest.partition(" ")
        name, _, value = flag[2:].partition("=")
        if name not in _HEALTH_FLAGS:
            raise BadRequest("unknown flag for HEALTHCHECK: --%s" % name)
        health[_HEALTH_FLAGS[name]] = int(value) if name == "retries" else parse_duration(value)
        rest = rest.lstrip()
    kind, _, command = rest.partition(" ")
    if kind.upper() == "NONE":
        config["Healthcheck"] = {"Test": ["NONE"]}
    elif kind.upper() == "CMD" and command.strip():
        words = command_form(command)
        config["Healthcheck"] = dict(health, Test=["CMD"] + words if words else ["CMD-SHELL", command.strip()])
    else:
        raise BadRequest('Unknown type "%s" in HEALTHCHECK (try CMD)' % kind)


def _change_onbuild(config, text):
    config["OnBuild"] = list(config.get("OnBuild") or []) + [text]


CONFIG_CHANGES = {"CMD": _change_shell_form("Cmd"), "ENTRYPOINT": _change_shell_form("Entrypoint"), "ENV": _change_env,
                  "LABEL": _change_label, "EXPOSE": _change_expose, "VOLUME": _change_volume, "WORKDIR": _change_workdir,
                  "USER": lambda config, text: config.update(User=text.strip()), "STOPSIGNAL": _change_stop_signal,
                  "SHELL": _change_shell, "HEALTHCHECK": _change_healthcheck, "ONBUILD": _change_onbuild}


def apply_changes(config, lines):
    """The config with Dockerfile lines such as `CMD ["x"]` or `ENV A=1` applied: --change of commit and import."""
    config = dict(config)
    for line in lines:
        word, _, text = line.strip().partition(" ")
        change = CONFIG_CHANGES.get(word.upper())
        if change is None:
            raise BadRequest("%s is not a valid change command" % (word or "an empty line"))
        if not text.strip():
            raise BadRequest("%s requires at least one argument" % word.upper())
        change(config, text.strip())
    return config


def signal_number(name):
    """A signal's number from `9`, `KILL` or `SIGKILL`, `RTMIN+3` too; BadRequest in docker's words."""
    text = str(name).strip().upper()
    text = text[3:] if text.startswith("SIG") else text
    match = re.fullmatch(r"(RTMIN|RTMAX)([+-]\d{1,2})?", text)
    if match:
        number = {"RTMIN": 34, "RTMAX": 64}[match.group(1)] + int(match.group(2) or 0)
    elif text.isdigit() and len(text) < 4:
        number = int(text)
    else:
        number = getattr(signal.Signals.__members__.get("SIG" + text), "value", 0)
    if not 0 < number < 65:
        raise BadRequest("Invalid signal: %s" % name)
    return number


def new_image_config(base, config, diff_ids, history, author="", comment=""):
    """The config document of a new image on `base` (an image's config document or {})."""
    document = {"architecture": base.get("architecture", ARCHITECTURE), "config": config, "created": history[-1]["created"],
                "history": history, "os": base.get("os", "linux"), "rootfs": {"type": "layers", "diff_ids": ["sha256:" + d for d in diff_ids]}}
    document.update({key: value for key, value in (("author", author), ("comment", comment)) if value})
    return document


# -- children's work on layers ---------------------------------------------------------------------------------------------------

class Tee:
    """A sink for `pack`: hashes what is written and counts it."""

    def __init__(self):
        import hashlib
        self.hash, self.size = hashlib.sha256(), 0

    def write(self, data):
        self.hash.update(data)
        self.size += len(data)


def layer_digest(diff_fd, whiteouts):
    """The diff id (hex) of a layer's tree: the digest of its fixed tar form."""
    sink = Tee()
    pack(diff_fd, sink.write, whiteouts=whiteouts == "overlay")
    return sink.hash.hexdigest()


@task
def import_layer(fds, diff, whiteouts):
    """Child: unpack the archive on descriptor 0 of fds into diff; -> {size, diff_id}."""
    with open(fds[0], "rb", buffering=0) as stream, opened_folder(diff) as target:
        size = unpack(TarReader(open_compressed(stream)), target)
        return {"size": size, "diff_id": layer_digest(target, whiteouts)}


@task
def copy_layer(fds, source, diff, whiteouts):
    """Child: copy a container's upper folder to a new layer's diff; -> {size, diff_id}."""
    with opened_folder(source) as upper, opened_folder(diff) as target:
        return {"size": copy_tree(upper, target, overlay=True), "diff_id": layer_digest(target, whiteouts)}


@task
def build_mount_points(fds, spec, folder, masks, work):
    make_mount_points(spec, folder, masks, work)


@task
def check_overlay(fds, root):
    probe_overlay(root)


@task
def make_small_root(fds, diff, programs, whiteouts):
    """Child: fill diff with this host's own programs; -> {size, diff_id}."""
    make_root(diff, programs)
    with opened_folder(diff) as target:
        return {"size": tree_size((), diff), "diff_id": layer_digest(target, whiteouts)}


# -- mkimage: a small root file system from the host's own programs -----------------------------------------------------------
# What a program needs is read from its ELF headers, and its libraries are looked for where the dynamic loader would (ld.so(8),
# musl's ldso/dynlink.c): nothing is executed, as `ldd` would, but `busybox --list-full`.

PT_LOAD, PT_DYNAMIC, PT_INTERP = 1, 2, 3
DT_NEEDED, DT_STRTAB, DT_STRSZ, DT_RPATH, DT_RUNPATH = 1, 5, 10, 15, 29

# e_type to e_phnum; program header; dynamic entry: elf(5), for 32 and 64 bits
_ELF_FORMS = {1: ("HHIIIIIHHH", "IIIIIIII", "II"), 2: ("HHIQQQIHHH", "IIQQQQQQ", "QQ")}
_MOST_STRINGS = 64 << 20


class Elf:
    """What the headers of an ELF file say of how it is loaded.

    kind: (class, byte order, machine): only files of one kind go together. interpreter: the dynamic loader's path, "" for a
    library or a static program. needed: names of libraries. rpath, runpath: lists of folders, with $ORIGIN and the like
    unexpanded."""

    def __init__(self, path, file):
        self._path, self._file = path, file
        ident = self._read(0, 16)
        order = "<" if ident[5] == 1 else ">"
        header, program, dynamic = (struct.Struct(order + form) for form in _ELF_FORMS[ident[4]])
        _, machine, _, _, start, _, _, _, size, count = header.unpack(self._read(16, header.size))
        self.kind = (ident[4], ident[5], machine)
        self.interpreter, self.needed, self.rpath, self.runpath = "", [], [], []
        self._segments, tables = [], []
        for index in range(count):
            fields = program.unpack(self._read(start + index * size, program.size))
            kind, offset, address, length = (fields[0],) + ((fields[1], fields[2], fields[4]) if ident[4] == 1 else
                                                            (fields[2], fields[3], fields[5]))
            if kind == PT_LOAD:
                self._segments.append((address, offset, length))
            elif kind == PT_INTERP:
                self.interpreter = os.fsdecode(self._read(offset, min(length, 4096)).partition(b"\0")[0])
            elif kind == PT_DYNAMIC:
                tables.append((offset, min(length, 1 << 20)))
        for offset, length in tables:
            data = self._read(offset, length - length % dynamic.size)
            self._take_dynamic(list(dynamic.iter_unpack(data)))

    def _read(self, offset, size):
        data = os.pread(self._file, size, offset) if offset < 1 << 62 else b""
        if len(data) < size:
            raise BadRequest("%s is a damaged ELF file" % printable(self._path))
        return data

    def _take_dynamic(self, table):
        table = table[:next((index for index, (tag, _) in enumerate(table) if tag == 0), len(table))]
        values = dict(table)
        if DT_STRTAB not in values:
            return
        address = values[DT_STRTAB]
        offset = next((address - start + at for start, at, size in self._segments if start <= address < start + size), None)
        if offset is None or values.get(DT_STRSZ, 0) > _MOST_STRINGS:
            raise BadRequest("%s is a damaged ELF file" % printable(self._path))
        strings = self._read(offset, values.get(DT_STRSZ, 0))

        def text(at):
            return os.fsdecode(strings[at:].partition(b"\0")[0])

        self.needed = [text(value) for tag, value in table if tag == DT_NEEDED]
        self.rpath = text(values[DT_RPATH]).split(":") if DT_RPATH in values else []
        self.runpath = text(values[DT_RUNPATH]).split(":") if DT_RUNPATH in values else []


def read_elf(path):
    """The Elf of a file; None when it is none."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        head = os.pread(fd, 16, 0) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        if len(head) < 16 or head[:4] != b"\x7fELF" or head[4] not in _ELF_FORMS or head[5] not in (1, 2):
            return None
        return Elf(path, fd)
    finally:
        os.close(fd)


# Where glibc's loader looks last. Debian's folders by machine stand in /etc/ld.so.conf.d.
_LIBRARY_FOLDERS = {1: ("/lib", "/usr/lib", "/lib32", "/usr/lib32"), 2: ("/lib64", "/usr/lib64", "/lib", "/usr/lib")}
# Variants for certain processors, in folders of their own: only looked at when there is no plain library.
_VARIANTS = ("", "glibc-hwcaps/x86-64-v2", "glibc-hwcaps/x86-64-v3", "glibc-hwcaps/power9", "glibc-hwcaps/z13", "tls", "i686",
             "i686/cmov")
_MUSL_OWN = re.compile(r"lib(?:c|m|dl|rt|util|pthread|crypt|xnet|c\.musl-[^.]+)\.so")  # what musl's loader itself is


class HostFiles:
    """The files of a host root (another folder than / for tests), with symlinks resolved inside it and remembered on the way."""

    def __init__(self, root="/"):
        self.root = root.rstrip("/")

    def real(self, path):
        """Where a path of the host lies for the system calls of this process: resolved."""
        return self.root + self.resolve(path)[1]

    def resolve(self, path):
        """([(path of a symlink, its target)], the path without symlinks): all paths as the host's root has them."""
        links, current, pending = [], "", path.split("/")[::-1]
        while pending:
            name = pending.pop()
            if name in ("", ".", ".."):
                current = current.rpartition("/")[0] if name == ".." else current
                continue
            candidate = current + "/" + name
            if not os.path.islink(self.root + candidate):
                current = candidate
                continue
            target = os.readlink(self.root + candidate)
            links.append((candidate, target))
            if len(links) > 40:
                raise BadRequest("too many symlinks: %s" % printable(path))
            if target.startswith("/"):
                current = ""
            pending += target.split("/")[::-1]
        return links, current or "/"

    def is_file(self, path):
        return os.path.isfile(self.real(path))

    def elf(self, path):
        return read_elf(self.real(path))

    def matching(self, pattern):
        import glob
        return sorted(name[len(self.root):] for name in glob.glob(self.root + pattern))

    # libraries

    def configured_folders(self, path="/etc/ld.so.conf", depth=0):
        """The folders that ld.so.conf and what it includes name."""
        folders = []
        text = read_file(self.real(path), b"") if depth < 8 else b""
        for line in os.fsdecode(text).split("\n"):
            words = line.partition("#")[0].split()
            if words[:1] == ["include"]:
                for pattern in words[1:]:
                    pattern = pattern if pattern.startswith("/") else os.path.dirname(path) + "/" + pattern
                    for name in self.matching(pattern):
                        folders += self.configured_folders(name, depth + 1)
            elif words and words[0].startswith("/"):
                folders.append(words[0].rstrip("/"))
        return folders

    def default_folders(self, elf, interpreter):
        """Where the loader looks for libraries that no rpath leads to."""
        musl = re.fullmatch(r"ld-musl-(.+)\.so\.1", os.path.basename(interpreter))
        if musl:
            text = os.fsdecode(read_file(self.real("/etc/ld-musl-%s.path" % musl.group(1)), b"/lib:/usr/local/lib:/usr/lib"))
            return [folder for folder in re.split("[:\n]", text) if folder]
        return self.configured_folders() + list(_LIBRARY_FOLDERS[elf.kind[0]])

    def needed(self, path, optional=()):
        """The files that an ELF program or library needs to be loaded, the dynamic loader first; paths as the loader finds them,
        symlinks and all. optional: names of further libraries, taken where they are found. A missing one raises BadRequest."""
        elf = self.elf(path)
        if elf is None:
            return []
        interpreter = elf.interpreter
        folders = self.default_folders(elf, interpreter)
        found = {os.path.basename(interpreter): interpreter} if interpreter else {}
        queue = [(path, elf, [])]
        while queue:
            path, elf, inherited = queue.pop(0)
            own = self._expanded(elf.rpath, path) if not elf.runpath else []
            runpath = self._expanded(elf.runpath, path)
            inherited = own + inherited
            if "ld-musl" in interpreter:  # musl takes both kinds as one that is inherited
                inherited = runpath + inherited
            for name in elf.needed + [name for name in optional if name not in elf.needed]:
                if name in found:
                    continue
                library = self._find(name, elf.kind, inherited + runpath + folders)
                if library:
                    found[name] = library
                    queue.append((library, self.elf(library), inherited))
                elif name in elf.needed and not ("ld-musl" in interpreter and _MUSL_OWN.match(name)):
                    raise BadRequest("%s needs the library %s, which this host does not have" % (printable(path),
                                                                                                 printable(name)))
            optional = ()
        return list(found.values())

    def _expanded(self, folders, path):
        """An rpath's folders with $ORIGIN, $LIB and $PLATFORM put in."""
        result = []
        origins = list(dict.fromkeys(os.path.dirname(p) or "/" for p in (path, self.resolve(path)[1])))
        for folder in folders:
            for origin in origins if "ORIGIN" in folder else origins[:1]:
                for lib in ("lib64", "lib") if "LIB" in folder else ("",):
                    values = {"ORIGIN": origin, "LIB": lib, "PLATFORM": os.uname().machine}
                    expanded = re.sub(r"\$(?:\{(ORIGIN|LIB|PLATFORM)\}|(ORIGIN|LIB|PLATFORM))",
                                      lambda match: values[match.group(1) or match.group(2)], folder)
                    if expanded.startswith("/"):
                        result.append(os.path.normpath(expanded))
        return result

    def _find(self, name, kind, folders):
        candidates = [name] if "/" in name else [os.path.join(folder, variant,
                                                              name) for variant in _VARIANTS for folder in folders]
        for candidate in candidates:
            if candidate.startswith("/") and self.is_file(candidate):
                elf = self.elf(candidate)
                if elf and elf.kind == kind:
                    return candidate
        return None


def needed_libraries(path, root="/"):
    """The files that an ELF program of this host needs to be loaded: [path], the dynamic loader first; empty for a static one."""
    return HostFiles(root).needed(path)


# Used by mkimage without programs where there is no static busybox: those of them that the host has.
_USUAL_PROGRAMS = (
    "sh bash cat cp mv rm ln ls mkdir rmdir mknod mkfifo chmod chown chgrp touch echo printf env true false test [ sleep "
    "date pwd id whoami uname hostname dd df du head tail wc sort uniq cut tr tee seq yes expr basename dirname readlink "
    "realpath stat sync nproc timeout stty tty md5sum sha256sum base64 od grep egrep sed awk find xargs tar gzip ps top "
    "kill pgrep pkill free uptime mount umount dmesg ip ping ss nc less vi which").split()

# Libraries that the C library loads by name at run time: user and host names, thread cancellation.
_BY_NAME = ("libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2", "libgcc_s.so.1")
_TERMINALS = ("ansi", "dumb", "linux", "rxvt", "screen", "screen-256color", "tmux", "tmux-256color", "vt100", "vt102", "vt220",
              "xterm",
              "xterm-256color", "xterm-color")
_TERMINFO = ("/etc/terminfo", "/lib/terminfo", "/usr/lib/terminfo", "/usr/share/terminfo")
_CERTIFICATES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/openssl.cnf")

# Programs that are nothing without a folder: (the name of the resolved file, what else to take). %(prefix)s is the folder above
# its bin, %(1)s what the brackets hold.
_EXTRAS = (
    (r"python(3\.\d+)", ("%(prefix)s/lib/python%(1)s", "%(prefix)s/lib64/python%(1)s") + _CERTIFICATES),
    (r"(perl)[\d.]*", ("%(prefix)s/lib/*/perl-base", "%(prefix)s/lib64/perl5", "%(prefix)s/share/perl5/core_perl")),
    (r"(curl|wget|git|openssl)", _CERTIFICATES))
_LEFT_OUT = re.compile(r"__pycache__|tests?|(?:site|dist)-packages|config-.*|idlelib|tkinter|turtledemo|_tkinter\..*|.*\.a")

_FOLDERS = {"dev": 0o755, "etc": 0o755, "home": 0o755, "proc": 0o555, "root": 0o700, "run": 0o755, "sys": 0o555, "tmp": 0o1777,
            "usr": 0o755, "var": 0o755, "var/log": 0o755, "var/tmp": 0o1777}
_FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/:/bin/false\nbin:x:2:2:bin:/:/bin/false\n"
                  "nobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": "root:x:0:\ndaemon:x:1:\nbin:x:2:\nsys:x:3:\nadm:x:4:\ntty:x:5:\ndisk:x:6:\nmail:x:8:\nusers:x:100:\n"
                 "nogroup:x:65534:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\nservices: files\nprotocols: files\n"}


def make_root(target, programs=(), root="/"):
    """Fill the empty folder `target` with a small root file system: the programs (names looked up on the usual path, or absolute
    paths), all files that they need, symlinks as on this host, /etc/passwd, /etc/group, /tmp and the other usual folders. Without
    programs: busybox and its applets where it is static, else what the host has of _USUAL_PROGRAMS. Scripts bring their
    interpreter, python3 its standard library.

    The same host gives the same tree: owners are root, folders and made files have fixed modes and the time of the newest file.
    A program or a library that is missing raises BadRequest."""
    maker = _RootMaker(target, HostFiles(root))
    if programs:
        paths = [maker.look_up(name) for name in programs]
    else:
        paths = maker.usual_programs()
    maker.make_layout()
    for path in paths:
        maker.add_program(path)
    maker.finish()


class _RootMaker:
    def __init__(self, target, host):
        self._target, self._host = target, host
        self._done = set()      # paths, as the host has them, that are in the target
        self._programs = set()  # those whose needs are, too
        self._newest = 0        # mtime of the newest file, in ns

    def look_up(self, name):
        """The host's path of a program."""
        folders = [""] if name.startswith("/") else [] if "/" in name else DEFAULT_PATH.split(":")
        for folder in folders:
            path = folder + "/" + name.lstrip("/")
            if self._host.is_file(path) and os.stat(self._host.real(path)).st_mode & 0o111:
                return path
        if folders == [""]:
            raise BadRequest("no such program: %s" % printable(name))
        raise BadRequest("no such program: %s: give a name that is found on %s, or an absolute path" % (printable(name),
                                                                                                        DEFAULT_PATH))

    def usual_programs(self):
        """What to take when nothing is asked for."""
        found = []
        for name in ["busybox"] + _USUAL_PROGRAMS:
            with contextlib.suppress(BadRequest):
                found.append(self.look_up(name))
        if found and os.path.basename(found[0]) == "busybox":
            if self._is_static(found[0]):
                return found[:1]
            del found[0]
        if not found:
            raise BadRequest("this host has none of the usual programs: name the ones to take")
        return found

    def _is_static(self, path):
        elf = self._host.elf(path)
        return elf is not None and not elf.interpreter and not elf.needed

    def make_layout(self):
        for name, mode in _FOLDERS.items():
            os.makedirs(self._in_target("/" + name), exist_ok=True)
            os.chmod(self._in_target("/" + name), mode)
        for name in ("/bin", "/sbin", "/lib", "/lib64", "/usr/bin", "/usr/sbin"):  # merged into /usr or not, as here
            if os.path.isdir(self._host.real(name)):
                self.add(name)

    def _in_target(self, path):
        return self._target + path

    # files

    def add(self, path):
        """Take a file or an empty folder of the host, with the symlinks that lead to it. Returns where it really is."""
        links, real = self._host.resolve(path)
        for link, target in links:
            if link not in self._done:
                self._done.add(link)
                self._make_parents(link)
                os.symlink(target, self._in_target(link))
        if real in self._done:
            return real
        self._done.add(real)
        source = self._host.root + real
        if os.path.isdir(source):
            self._make_parents(real + "/")
        elif os.path.isfile(source):
            self._make_parents(real)
            self._copy(source, self._in_target(real))
        elif not os.path.exists(source):
            raise BadRequest("%s is needed, and this host does not have it" % printable(path))
        return real

    def _make_parents(self, path):
        current = ""
        for name in path.split("/")[1:-1]:
            current += "/" + name
            if not os.path.isdir(self._in_target(current)):
                os.mkdir(self._in_target(current))
                os.chmod(self._in_target(current), 0o755)

    def _copy(self, source, target):
        old = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            new = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                status = os.fstat(old)
                _copy_data(old, new, status.st_size)
                os.fchmod(new, status.st_mode & 0o7777)
                _set_xattrs(new, _kept_xattrs(old))
                os.utime(new, ns=(status.st_mtime_ns, status.st_mtime_ns))
                self._newest = max(self._newest, status.st_mtime_ns)
            finally:
                os.close(new)
        finally:
            os.close(old)

    def add_tree(self, folder):
        """Take a folder with what is in it, but for what _LEFT_OUT names; libraries in it bring theirs where the host has
        them."""
        top = self.add(folder)
        for parent, folders, files in os.walk(self._host.root + top):
            folders[:] = sorted(name for name in folders if not _LEFT_OUT.fullmatch(name))
            for name in sorted(files):
                path = parent[len(self._host.root):] + "/" + name
                if not _LEFT_OUT.fullmatch(name) and os.path.exists(self._host.real(path)):
                    self.add(path)
                    if ".so" in name:
                        with contextlib.suppress(BadRequest):  # an extension whose library is missing does not work here either
                            self._add_libraries(path)

    # programs

    def add_program(self, path):
        """Take a program and all that it needs."""
        real = self.add(path)
        if real in self._programs:
            return
        self._programs.add(real)
        with open(self._host.root + real, "rb") as f:
            first = f.readline(256)
        if first.startswith(b"#!"):
            self._add_interpreter(real, os.fsdecode(first[2:]).split())
        else:
            self._add_libraries(real)
        if os.path.basename(real).startswith("busybox"):
            self._add_applets(real)
        for pattern, extras in _EXTRAS:
            match = re.fullmatch(pattern, os.path.basename(real))
            if match:
                values = {"prefix": real.rsplit("/", 2)[0], "1": match.group(1)}
                for extra in extras:
                    self._add_matching(extra % values)

    def _add_matching(self, pattern):
        for path in self._host.matching(pattern):
            if os.path.isdir(self._host.real(path)):
                self.add_tree(path)
            else:
                self.add(path)

    def _add_interpreter(self, path, words):
        if not words:
            raise BadRequest("%s: its first line names no interpreter" % printable(path))
        self.add_program(self.look_up(words[0]))
        if os.path.basename(words[0]) == "env":
            name = next((word for word in words[1:] if not word.startswith("-") and "=" not in word), None)
            if name:
                self.add_program(self.look_up(name))

    def _add_libraries(self, path):
        elf = self._host.elf(path)
        libraries = self._host.needed(path, _BY_NAME if elf and elf.interpreter and "musl" not in elf.interpreter else ())
        for library in libraries:
            self.add(library)
        names = " ".join(libraries)
        if "/libc.so.6" in names:
            for folder in ("/usr/lib/locale/C.utf8", "/usr/lib/locale/C.UTF-8"):
                if os.path.isdir(self._host.real(folder)) and folder not in self._done:
                    self.add_tree(folder)
        if "/libtinfo" in names or "/libncurses" in names:
            for folder in _TERMINFO:
                for name in _TERMINALS:
                    for path in (folder + "/" + name[0] + "/" + name, folder + "/%x/" % ord(name[0]) + name):
                        if self._host.is_file(path):
                            self.add(path)

    def _add_applets(self, real):
        """Symlinks for what a busybox can do, where it says they belong."""
        import subprocess
        listed = subprocess.run([self._host.root + real, "--list-full"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL, env={}, cwd="/").stdout
        for line in os.fsdecode(listed).split():
            path = self._host.resolve("/" + os.path.dirname(line))[1].rstrip("/") + "/" + os.path.basename(line)
            if path != real and not os.path.lexists(self._in_target(path)):
                self._make_parents(path)
                os.symlink(real, self._in_target(path))

    def finish(self):
        """/etc, and the same times whenever this runs."""
        for name, text in _FILES.items():
            write_file(self._in_target("/" + name), text, mode=0o644, sync=False)
            os.chmod(self._in_target("/" + name), 0o644)
            self._set_time("/" + name)
        for parent, folders, files in os.walk(self._target, topdown=False):
            for name in files + folders:
                path = os.path.join(parent, name)
                if name in folders or os.path.islink(path):
                    self._set_time(path[len(self._target):])
        os.chmod(self._target, 0o755)
        self._set_time("")

    def _set_time(self, path):
        os.utime(self._in_target(path), ns=(self._newest, self._newest), follow_symlinks=False)


########################################################################
# 7. Registry
########################################################################
# Images in and out: the distribution protocol of registries (github.com/opencontainers/distribution-spec), and the archives of
# save and load. It runs in the daemon's threads; unpacking, packing and compressing are tasks of the spawner's children. The one
# idea: nothing that comes from outside is believed but for its digest. The manifest vouches for the config, the config (its
# digest is the image's id) for what each layer unpacks to, and every byte is hashed on its way.

MANIFEST_V2 = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPES, INDEX_TYPES = (MANIFEST_V2, OCI_MANIFEST), (MANIFEST_LIST, OCI_INDEX)
OCI_CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
CONFIG_TYPES = (CONFIG_MEDIA_TYPE, OCI_CONFIG_TYPE, "application/octet-stream")  # the last: what registries of 2015 said
LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
_LAYER_TYPE = re.compile(r"application/vnd\.(?:docker\.image\.rootfs\.(?:foreign\.)?diff|"
                         r"oci\.image\.layer\.(?:nondistributable\.)?v1)\.tar(?:[.+](gzip|zstd))?")

MOST_MANIFEST, MOST_CONFIG, MOST_ANSWER = 4 << 20, 8 << 20, 1 << 20  # bytes of a document from outside
MOST_LAYERS = 500    # what overlay stacks (fs/overlayfs: OVL_MAX_STACK)
AT_ONCE = 3          # blobs on their way at a time
_PIECE = 1 << 18     # bytes read or sent at once
_WEEK = 7 * 86400    # how long an unfinished download is kept for a pull that goes on
_F_SETPIPE_SZ = 1031  # fcntl(2); Python has it from 3.10 on


# -- documents from outside ---------------------------------------------------------------------------------------------------

def parse_document(data, what):
    """The object in JSON from outside; BadRequest where it is none, or holds what would hurt whoever prints it: numbers of a
    thousand digits, NaN, half of a surrogate pair, a depth that Python cannot walk."""
    def bounded(digits):
        if len(digits) > 20:
            raise ValueError("a number of %d digits" % len(digits))
        return int(digits)

    try:
        document = json.loads(data.decode("utf-8"), parse_int=bounded)
        json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadRequest("%s is not valid JSON: %s" % (what, printable(error)[:200]))
    if not isinstance(document, dict):
        raise BadRequest("%s is not valid: a JSON object is expected" % what)
    return document


# The forms of an image config: a type; [type]: a list of it; {str: type}: an object with such values. null is always fine.
_CONFIG_FORMS = {"User": str, "ExposedPorts": {str: object}, "Env": [str], "Cmd": [str], "Volumes": {str: object},
                 "WorkingDir": str, "Entrypoint": [str], "OnBuild": [str], "Labels": {str: str}, "StopSignal": str,
                 "StopTimeout": int, "Healthcheck": dict, "Shell": [str], "ArgsEscaped": bool}
_HEALTH_FORMS = {"Test": [str], "Interval": int, "Timeout": int, "StartPeriod": int, "StartInterval": int, "Retries": int}
_HISTORY_FORMS = {"created": str, "created_by": str, "author": str, "comment": str, "empty_layer": bool}
_DOCUMENT_FORMS = {"architecture": str, "os": str, "variant": str, "author": str, "comment": str, "created": str, "config": dict,
                   "rootfs": dict, "history": [dict], "docker_version": str}


def _fits(value, form):
    if isinstance(form, list):
        return isinstance(value, list) and all(isinstance(item, form[0]) for item in value)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(isinstance(item, form[str]) for item in value.values())
    return isinstance(value, form) and not (form is int and isinstance(value, bool))


def _check_forms(document, forms, what):
    for key, form in forms.items():
        if document.get(key) is not None and not _fits(document[key], form):
            raise BadRequest("%s is not valid: %s has the wrong type" % (what, key))


def check_image_config(data):
    """The config document of an image from outside, parsed; BadRequest unless each field that is used later has its type."""
    what = "the image config"
    document = parse_document(data, what)
    _check_forms(document, _DOCUMENT_FORMS, what)
    _check_forms(document.get("config") or {}, _CONFIG_FORMS, what)
    _check_forms((document.get("config") or {}).get("Healthcheck") or {}, _HEALTH_FORMS, what)
    for entry in document.get("history") or []:
        _check_forms(entry, _HISTORY_FORMS, what)
    for entry in [document] + (document.get("history") or []):
        parse_time(entry.get("created") or ZERO_TIME)
    if document.get("os") not in (None, "", "linux"):
        raise BadRequest('image operating system "%s" cannot be used on this platform' % printable(document["os"]))
    if document.get("rootfs") is None:
        raise BadRequest("invalid image JSON, no RootFS key")
    diff_ids = document["rootfs"].get("diff_ids") or []
    if document["rootfs"].get("type") != "layers" or not _fits(diff_ids, [str]) or not all(map(DIGEST.fullmatch, diff_ids)):
        raise BadRequest("%s is not valid: rootfs must be layers with sha256 diff_ids" % what)
    if len(diff_ids) > MOST_LAYERS:
        raise BadRequest("the image has %d layers; at most %d can be stacked" % (len(diff_ids), MOST_LAYERS))
    return document


def check_descriptor(value, what):
    """A descriptor {mediaType, digest, size, ...} from outside, checked: the digest may become a file's name."""
    if not isinstance(value, dict) or not isinstance(value.get("digest"), str) or not DIGEST.fullmatch(value["digest"]):
        raise BadRequest("%s is not valid: it names something without a sha256 digest" % what)
    if not _fits(value.get("size"), int) or not 0 <= value["size"] < 1 << 62 or not _fits(value.get("mediaType", ""), str):
        raise BadRequest("%s is not valid: the size or media type of %s is wrong" % (what, value["digest"]))
    return value


def short_digest(digest):
    return digest.partition(":")[2][:12]


class Manifest:
    """A manifest or an index, checked: `data` (bytes), `digest`, `media_type`, `document`; `config` and `layers` are descriptors,
    an index has `manifests` instead. `said` is the Content-Type it came with."""

    def __init__(self, data, said="", digest=None, what="the manifest"):
        self.data, self.digest = data, "sha256:" + sha256_hex(data)
        if digest and digest != self.digest:
            raise Error("manifest verification failed for digest %s" % digest)
        self.document = parse_document(data, what)
        self.media_type = self._type(said.partition(";")[0].strip().lower(), what)
        self.manifests, self.config, self.layers = [], None, []
        if self.is_index:
            self.manifests = [check_descriptor(entry, what) for entry in self._list("manifests", what)]
        else:
            self.config = check_descriptor(self.document.get("config"), what)
            self.layers = [check_descriptor(entry, what) for entry in self._list("layers", what)]
            self._check_types()

    @property
    def is_index(self):
        return self.media_type in INDEX_TYPES

    def _list(self, key, what):
        value = self.document.get(key)
        if value is not None and not _fits(value, [dict]):
            raise BadRequest("%s is not valid: %s is no list" % (what, key))
        return value or []

    def _type(self, said, what):
        """The media type. One document must not be a manifest to one reader and an index to another (CVE-2021-41190): what the
        header says, what the body says and what the body holds have to agree."""
        document = self.document
        if document.get("schemaVersion") == 1 or ".distribution.manifest.v1+" in said:
            raise BadRequest("%s has the format schema 1 of docker before 1.10, which has no digests of what layers hold and is "
                             "no longer supported: its author has to push it again with a newer docker" % what)
        written = document.get("mediaType")
        if written is not None and not isinstance(written, str):
            raise BadRequest("%s is not valid: mediaType has the wrong type" % what)
        known = MANIFEST_TYPES + INDEX_TYPES
        if said in known and written and written != said:
            raise BadRequest("%s is ambiguous: it is sent as %s and says that it is %s" % (what, said, printable(written)))
        kind = written or (said if said in known else OCI_INDEX if "manifests" in document else OCI_MANIFEST)
        if kind not in known:
            raise BadRequest("unsupported manifest media type: %s" % printable(kind))
        foreign = ("config", "layers", "fsLayers") if kind in INDEX_TYPES else ("manifests", "fsLayers")
        if any(key in document for key in foreign):
            raise BadRequest("%s is ambiguous: it is both a manifest and an index" % what)
        return kind

    def _check_types(self):
        kind = self.config.get("mediaType")
        if kind not in CONFIG_TYPES:
            raise BadRequest('Encountered remote "%s"(unknown) when fetching: it is no container image' % printable(kind))
        for layer in self.layers:
            if not _LAYER_TYPE.fullmatch(layer.get("mediaType", "")):
                raise BadRequest("unsupported layer media type: %s" % printable(layer.get("mediaType")))


# -- platforms ----------------------------------------------------------------------------------------------------------------

# (architecture, variant) as people and kernels write them, as images have them
_ARCHITECTURES = {"x86_64": ("amd64", ""), "x86-64": ("amd64", ""), "aarch64": ("arm64", ""), "armhf": ("arm", "v7"),
                  "armel": ("arm", "v6"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"), "i386": ("386", ""),
                  "i686": ("386", "")}
_DEFAULT_VARIANT = {"arm64": "v8", "arm": "v7"}


def parse_platform(text):
    """`linux/arm/v7`, `arm64`, `linux` or nothing (this host) to (os, architecture, variant)."""
    host = _ARCHITECTURES.get(os.uname().machine, (ARCHITECTURE, ""))
    parts = text.lower().split("/") if text else []
    if len(parts) > 3 or not all(re.fullmatch(r"[a-z0-9_.-]+", part) for part in parts):
        raise BadRequest('"%s" is an invalid platform: use OS[/ARCHITECTURE[/VARIANT]], as in linux/arm/v7' % printable(text))
    if len(parts) == 1 and parts[0] not in ("linux", "windows", "darwin", "freebsd"):
        parts.insert(0, "linux")
    system = parts[0] if parts else "linux"
    architecture, variant = _ARCHITECTURES.get(parts[1], (parts[1], "")) if len(parts) > 1 else host
    return system, architecture, parts[2] if len(parts) > 2 else variant or _DEFAULT_VARIANT.get(architecture, "")


def platform_order(platform):
    """(architecture, variant) that run on a platform, best first: an arm of version 7 runs 6 and 5, and so on."""
    _, architecture, variant = platform
    version = int(variant[1:]) if re.fullmatch(r"v\d", variant) else None
    order = [(architecture, variant)]
    if version is not None and architecture in ("arm", "amd64"):
        order += [(architecture, "v%d" % lower) for lower in range(version - 1, 4 if architecture == "arm" else 0, -1)]
    if architecture == "arm64":
        order += [("arm", "v%d" % lower) for lower in (8, 7, 6, 5)]
    if architecture == "amd64":
        order += [("amd64", ""), ("386", "")]
    return order


def choose_platform(manifests, platform):
    """The descriptor of an index that fits the platform best; None where none does."""
    found = {}
    for entry in manifests:
        there = entry.get("platform")
        if isinstance(there, dict) and there.get("os") == platform[0] and isinstance(there.get("architecture"), str):
            variant = there.get("variant") or _DEFAULT_VARIANT.get(there["architecture"], "")
            if there["architecture"] == "amd64" and variant == "v1":
                variant = ""
            found.setdefault((there["architecture"], str(variant)), entry)
    return next((found[key] for key in platform_order(platform) if key in found), None)


def format_platform(platform):
    return "/".join(part for part in platform if part)


# -- progress -----------------------------------------------------------------------------------------------------------------

def progress_bar(current, total):
    """`[==>      ]  1.2MB/12MB`, the bar that docker's clients of 2013 print as it comes."""
    if current <= 0 and total <= 0:
        return ""
    if total <= 0 or current > total:
        return "[%s>]%s" % ("=" * 50, "%9s" % format_size(current)) if total > 0 else "%8s" % format_size(current)
    filled = current * 50 // total
    return "[%s>%s] %8s/%s" % ("=" * filled, " " * (50 - filled), format_size(current), format_size(total))


class Reporter:
    """Passes progress on as the objects of docker's JSON stream, from any thread; amounts at most ten times a second for each
    id."""

    def __init__(self, send=None):
        self._send, self._lock, self._last = send or (lambda message: None), threading.Lock(), {}

    def send(self, message):
        with self._lock:
            self._send(message)

    def line(self, text, name=None):
        self.send({"status": text, "id": name} if name else {"status": text})

    def state(self, name, text):
        """The state of one layer, named by the short digest."""
        self.send({"status": text, "progressDetail": {}, "id": name})

    def amount(self, name, text, current, total):
        now = time.monotonic()
        with self._lock:
            if current < total and now - self._last.get(name, 0) < 0.1:
                return
            self._last[name] = now
            self._send({"status": text, "progressDetail": {"current": current, "total": total},
                        "progress": progress_bar(current, total), "id": name})


# -- blobs --------------------------------------------------------------------------------------------------------------------

class Blobs:
    """What the world outside knows by digest, of one data root.

        blobs/sha256/HEX            configs (of Images), manifests, and layers as they were pulled or loaded: only those bytes
                                    have the digest that others know; a tree packed again need not give them
        blobs/layers/DIFFID.json    {"blobs": [{digest, mediaType, size, repositories: [..]}]}: known compressed forms of a layer
        blobs/images/ID.json        {digest, mediaType}: the manifest that the image came with
        downloads/HEX               a blob that is not all here yet
        downloads/ID.json           {"diff_ids": [..]}: an image on its way in: its layers are kept until it is here

    A layer's blob gets its name before the layer is adopted, and adopting syncs: where there is the layer, its blob is whole."""

    def __init__(self, root, images, layers, spawner):
        self.images, self.layers, self.spawner, self.lock = images, layers, spawner, threading.Lock()
        self.tmp, self.downloads = os.path.join(root, "tmp"), os.path.join(root, "downloads")
        self.folder = os.path.join(root, "blobs", "sha256")
        self.records = {kind: os.path.join(root, "blobs", kind) for kind in ("layers", "images")}
        for folder in [self.downloads, self.folder, self.tmp] + list(self.records.values()):
            os.makedirs(folder, 0o700, exist_ok=True)
        self._busy, self.expected = {}, {}
        self.clean(_WEEK)

    def path(self, digest):
        """The place of a blob, by its digest or by the hex of it alone."""
        return os.path.join(self.folder, digest.rpartition(":")[2])

    def clean(self, age=0):
        """Forget what was left of downloads longer ago than `age` seconds. Not while something is on its way."""
        with self.lock:
            if self._busy:
                return
            self.expected.clear()
            for name in os.listdir(self.downloads):
                path = os.path.join(self.downloads, name)
                if time.time() - os.stat(path).st_mtime >= age or name.endswith(".new"):
                    os.unlink(path)
                elif name.endswith(".json"):
                    with contextlib.suppress(Error, KeyError):
                        self.expected[name[:64]] = read_json(path)["diff_ids"]

    @contextlib.contextmanager
    def alone(self, key):
        """One thread at a time for each key: whoever comes first fetches a blob or unpacks a layer, the others find it here."""
        with self.lock:
            entry = self._busy.setdefault(key, [threading.Lock(), 0])
            entry[1] += 1
        try:
            with entry[0]:
                yield
        finally:
            with self.lock:
                entry[1] -= 1
                if not entry[1]:
                    del self._busy[key]

    # what is known

    def _record(self, kind, name, default):
        return read_json(os.path.join(self.records[kind], name + ".json"), default)

    def known(self, diff_id):
        """The compressed forms of a layer that are known: [{digest, mediaType, size, repositories}]."""
        return self._record("layers", diff_id, {"blobs": []})["blobs"]

    def remember(self, diff_id, descriptor, repository=None, new=True):
        """Note that descriptor is a form of the layer, and a repository (with its host) that has it. new=False: only if the
        digest is known already: what is not fetched is not verified either."""
        with self.images.lock:
            blobs = self.known(diff_id)
            blob = next((b for b in blobs if b["digest"] == descriptor["digest"]), None)
            if blob is None:
                if not new:
                    return
                blob = {key: descriptor[key] for key in ("digest", "mediaType", "size")}
                blob["repositories"] = []
                blobs.insert(0, blob)
            if repository:
                blob["repositories"] = [repository] + [r for r in blob["repositories"] if r != repository][:49]
            write_json(os.path.join(self.records["layers"], diff_id + ".json"), {"blobs": blobs})

    def kept(self, diff_id):
        """The form of a layer whose bytes are here, or None."""
        for blob in self.known(diff_id):
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self.path(blob["digest"])).st_size == blob["size"]:
                    return blob
        return None

    def store(self, path, digest):
        """Keep a file, on the same file system, under its digest."""
        new = os.path.join(self.tmp, "blob-" + new_id()[:16])
        os.link(path, new)
        os.rename(new, self.path(digest))

    def keep_manifest(self, image_id, manifest):
        write_file(self.path(manifest.digest), manifest.data)
        write_json(os.path.join(self.records["images"], image_id + ".json"),
                   {"digest": manifest.digest, "mediaType": manifest.media_type})

    def manifest_of(self, image_id):
        """The Manifest that the image came with, or None."""
        record = self._record("images", image_id, {})
        data = read_file(self.path(record["digest"]), b"") if record else b""
        return Manifest(data, record["mediaType"], record["digest"]) if data else None

    # images on their way in

    @contextlib.contextmanager
    def expecting(self, image_id, diff_ids, digests=()):
        """Keep the layers of an image that is being brought in from collect(), also when the daemon dies meanwhile: the next
        attempt goes on with them. What was wrong in itself is not kept, and of its blobs (digests) no part."""
        path = os.path.join(self.downloads, image_id + ".json")
        self.expected[image_id] = diff_ids
        try:
            write_json(path, {"diff_ids": diff_ids}, sync=False)
            yield
        except (Error, OSError) as error:
            full = os.strerror(errno.ENOSPC) in str(error)  # a child's error comes as its text
            if full or isinstance(error, BadRequest):
                self._forget(image_id, path)
                for digest in digests:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(os.path.join(self.downloads, digest[7:]))
                self.images.collect()
            if full and isinstance(error, OSError):
                raise Error(os_error_text(error))
            raise
        self._forget(image_id, path)

    def _forget(self, image_id, path):
        self.expected.pop(image_id, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def used_chains(self):
        """Chain ids that images on their way in stand on: the engine adds them to what Images.collect must leave."""
        found = set()
        for diff_ids in list(self.expected.values()):
            chain = None
            for diff_id in diff_ids:
                chain = chain_id(chain, diff_id)
                if chain in self.layers.meta:
                    found.add(chain)
        return found

    def collect(self):
        """Remove what belongs to layers and images that are gone."""
        with self.images.lock:
            live = {"layers": {meta["diff_id"] for meta in self.layers.meta.values()} | set().union(*self.expected.values()),
                    "images": set(self.images.images) | set(self.expected)}
            gone, needed = set(), set(self.images.images)
            for kind, folder in self.records.items():
                for name in os.listdir(folder):
                    record = read_json(os.path.join(folder, name), {})
                    digests = {b["digest"][7:] for b in record.get("blobs", [record] if "digest" in record else [])}
                    if name[:64] in live[kind]:
                        needed |= digests
                    else:
                        gone |= digests
                        os.unlink(os.path.join(folder, name))
            for digest in gone - needed:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.folder, digest))

    # layers in and out

    def add_layer(self, parent, diff_id, feed, keep, hash_input=False):
        """Make a layer on `parent` (a chain id or None) of the archive, compressed or not, that feed(fd) writes to a pipe; a
        child unpacks it meanwhile. keep(digest of the archive, with hash_input) stores the archive under its name, just before
        the layer is adopted. Returns the chain id; BadRequest where the archive is damaged or holds something else than diff_id
        says."""
        below = [self.layers.path(chain, "diff") for chain in reversed(self.layers.chain(parent))]
        with self.layers.making() as folder:
            source, sink = os.pipe2(os.O_CLOEXEC)
            try:
                _widen(sink)
                job = self.spawner.begin("unpack_layer", [source], diff=os.path.join(folder, "diff"), below=below,
                                         whiteouts=self.layers.driver.whiteouts, hash_input=hash_input)
            except BaseException:
                os.close(sink)
                raise
            finally:
                os.close(source)
            done = _feed(job, sink, feed)
            if done["diff_id"] != diff_id:
                raise BadRequest("filesystem layer verification failed: the layer unpacks to sha256:%s, the image's config says "
                                 "sha256:%s" % (done["diff_id"], diff_id))
            keep(done["digest"])
            return self.layers.adopt(folder, parent, diff_id, done["size"])

    def begin_writing(self, chain, fd, compress):
        """Have a child write a layer's archive, with exactly the bytes of its diff id, to a descriptor, gzipped on request.
        Returns the Job; its result is {size, diff_id}, which check_written checks."""
        blob = self.kept(self.layers.meta[chain]["diff_id"])
        fds, diff = [fd], self.layers.path(chain, "diff")
        if blob:
            fds.append(os.open(self.path(blob["digest"]), os.O_RDONLY | os.O_CLOEXEC))
        try:
            return self.spawner.begin("write_layer", fds, diff=None if blob else diff, whiteouts=self.layers.driver.whiteouts,
                                      compress=compress)
        finally:
            for other in fds[1:]:
                os.close(other)

    def check_written(self, chain, done):
        expected = self.layers.meta[chain]["diff_id"]
        if done["diff_id"] != expected:
            raise Error("the files of layer sha256:%s have been changed on disk, under %s: remove the images that have it and "
                        "make or pull them again" % (expected, self.layers.path(chain, "diff")))


def _widen(pipe):
    """A larger pipe: fewer changes between the two processes. The limit for all pipes of a user may refuse it."""
    import fcntl
    with contextlib.suppress(OSError):
        fcntl.fcntl(pipe, _F_SETPIPE_SZ, 1 << 20)


def _feed(job, sink, feed):
    """Let feed(sink) write to the pipe that a task reads, close it, and return the task's result. What the feeder raises counts
    more than what the task makes of the short stream."""
    try:
        feed(sink)
    except BrokenPipeError:  # the task has ended: its result says why
        pass
    except BaseException:
        os.close(sink)
        with contextlib.suppress(Error):
            job.result()  # it must be out of its folder before that is removed
        raise
    os.close(sink)
    return job.result()


class HashingReader:
    """Reads through, and hashes what passes."""

    def __init__(self, file):
        import hashlib
        self._source, self.hash = file.read, hashlib.sha256()

    def read(self, size=_PIECE):
        data = self._source(size)
        self.hash.update(data)
        return data


@task
def unpack_layer(fds, diff, below, whiteouts, hash_input):
    """Child: unpack the layer's archive that comes through fds[0] into the folder diff; `below` are the layers under it, top
    first. -> {size, diff_id, digest: of the archive as it came, or null}."""
    with open(fds[0], "rb", buffering=0) as stream, opened_folder(diff) as target, contextlib.ExitStack() as stack:
        raw = HashingReader(stream) if hash_input else stream
        tar = HashingReader(open_compressed(raw, "the layer"))
        space = os.statvfs(diff)  # a bomb ends before the disk is full
        lower_fds = [stack.enter_context(opened_folder(path)) for path in below]
        size = unpack(TarReader(tar, "the layer"), target, whiteouts="overlay" if whiteouts == "overlay" else None,
                      most_bytes=space.f_bavail * space.f_frsize, lower_fds=lower_fds)
    return {"size": size, "diff_id": tar.hash.hexdigest(), "digest": "sha256:" + raw.hash.hexdigest() if hash_input else None}


@task
def write_layer(fds, diff, whiteouts, compress):
    """Child: write a layer's archive to fds[0]: packed from the folder diff or, where that is None, out of the blob fds[1].
    -> {size, diff_id}."""
    import hashlib
    output, digest, size = functools.partial(write_all, fds[0]), hashlib.sha256(), 0
    gzip = ParallelGzip(output) if compress else None
    output = gzip.write if compress else output

    def write(data):
        nonlocal size
        digest.update(data)
        size += len(data)
        output(data)

    if diff is not None:
        with opened_folder(diff) as root:
            pack(root, write, whiteouts=whiteouts == "overlay")
    else:
        with open(fds[1], "rb", buffering=0) as blob:
            plain = open_compressed(blob, "the layer")
            for data in iter(lambda: plain.read(_PIECE), b""):
                write(data)
    if compress:
        gzip.close()
    return {"size": size, "diff_id": digest.hexdigest()}


class ParallelGzip:
    """Writes one gzip stream, compressing blocks of 1 MiB in threads: zlib works outside Python's lock. A block starts with the
    last 32 KiB of the one before as its dictionary and ends at a byte's border, so that all together are one ordinary deflate
    stream (RFC 1951), with the same bytes whatever the number of threads."""

    def __init__(self, write):
        import collections
        import concurrent.futures
        import zlib
        self._write, self._zlib, self._waiting = write, zlib, collections.deque()
        self._most = len(os.sched_getaffinity(0))
        self._pool = concurrent.futures.ThreadPoolExecutor(self._most)
        self._parts, self._held, self._before, self._crc, self._size = [], 0, b"", 0, 0
        write(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")  # RFC 1952: no name, no time, unknown system

    def write(self, data):
        self._parts.append(bytes(data))
        self._held += len(data)
        while self._held >= 1 << 20:
            joined = b"".join(self._parts)
            self._submit(joined[:1 << 20])
            self._parts, self._held = [joined[1 << 20:]], self._held - (1 << 20)

    def close(self):
        self._submit(b"".join(self._parts), last=True)
        while self._waiting:
            self._write(self._waiting.popleft().result())
        self._pool.shutdown()
        self._write(struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))

    def _submit(self, block, last=False):
        self._crc, self._size = self._zlib.crc32(block, self._crc), self._size + len(block)
        self._waiting.append(self._pool.submit(self._deflate, block, self._before, last))
        self._before = block[-32768:]
        while len(self._waiting) > 2 * self._most:
            self._write(self._waiting.popleft().result())

    def _deflate(self, block, before, last):
        zlib = self._zlib
        more = {"zdict": before} if before else {}
        codec = zlib.compressobj(6, zlib.DEFLATED, -15, **more)
        return codec.compress(block) + codec.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)


# -- the client ---------------------------------------------------------------------------------------------------------------

class RegistryOptions:
    """How registries are reached. insecure: hosts (NAME[:PORT]) and networks (CIDR) that may have plain HTTP or a certificate
    that nobody vouches for; mirrors: addresses of mirrors of Docker Hub; hub, search: those of the Hub; certs: folders with
    HOST[:PORT]/{*.crt, *.cert, *.key}; timeout: seconds without a byte; tries, delay: how often, and the first pause in seconds;
    environment: where the proxies' names are."""

    def __init__(self, insecure=(), mirrors=(), certs=("/etc/pydock/certs.d", "/etc/docker/certs.d"),
                 hub="https://registry-1.docker.io", search="https://index.docker.io", timeout=30, tries=5, delay=1.0,
                 environment=os.environ):
        self.insecure, self.mirrors, self.certs, self.hub, self.search = insecure, mirrors, certs, hub, search
        self.timeout, self.tries, self.delay, self.environment = timeout, tries, delay, environment


class RegistryError(Error):
    """What a registry answered, or that it could not be reached. `code` is the distribution-spec's (MANIFEST_UNKNOWN, DENIED,
    ...), `answered` its HTTP status or None, `after` the seconds that it asks us to wait."""

    def __init__(self, message, code="", answered=None, after=None, status=None):
        super().__init__(message, status)
        self.code, self.answered, self.after = code, answered, after

    @property
    def passing(self):
        """Whether trying again may help."""
        return self.code == "UNREACHABLE" or self.answered in (408, 429, 500, 502, 503, 504)


# what a status means where the answer's body does not say: code, words of the distribution-spec
_CODES = {401: ("UNAUTHORIZED", "authentication required"), 403: ("DENIED", "requested access to the resource is denied"),
          404: ("NOT_FOUND", ""), 429: ("TOOMANYREQUESTS", "too many requests")}
_REDIRECTS = (301, 302, 303, 307, 308)


def decode_registry_auth(text):
    """The object in an X-Registry-Auth header (base64url of JSON, padded or not); {} for none. BadRequest in docker's words."""
    import base64
    if not text:
        return {}
    try:
        data = base64.urlsafe_b64decode(text.strip().rstrip("=") + "=" * (-len(text.strip().rstrip("=")) % 4))
        auth = parse_document(data, "it")
    except (ValueError, BadRequest) as error:
        raise BadRequest("invalid X-Registry-Auth header: %s" % printable(error))
    return clean_auth(auth)


def clean_auth(auth):
    """Credentials as clients write them, with keys in lower case and nothing but strings; `auth` is taken apart."""
    import base64
    auth = {str(key).lower(): value for key, value in (auth or {}).items() if isinstance(value, str)}
    if auth.get("auth") and not auth.get("username"):  # "user:password" in base64, as in config.json
        with contextlib.suppress(ValueError):
            auth["username"], _, auth["password"] = base64.b64decode(auth["auth"]).decode().partition(":")
    return auth


def parse_challenges(headers):
    """{scheme: parameters} of WWW-Authenticate headers: `Bearer realm="..",service=".."` (RFC 7235). Scheme and keys in lower
    case."""
    challenges = {}
    for header in headers:
        scheme, _, rest = header[:8192].strip().partition(" ")
        pairs = re.findall(r'([A-Za-z0-9_-]+)\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]+))', rest)
        challenges[scheme.lower()] = {key.lower(): re.sub(r"\\(.)", r"\1", quoted) or plain for key, quoted, plain in pairs}
    return challenges


def is_loopback(name):
    """Whether a host's name is literally this machine: 127.0.0.0/8, ::1 or localhost. A name that only resolves to it is not."""
    return name == "localhost" or name == "::1" or re.fullmatch(r"127(\.\d{1,3}){3}", name) is not None


def split_host(host):
    """(name, port or None) of NAME[:PORT] or [IPV6][:PORT]."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::(\d{1,5}))?", host)
    if not match or int(match.group(3) or 0) > 65535:
        raise BadRequest("invalid registry host: %s" % printable(host))
    return match.group(1) or match.group(2), int(match.group(3)) if match.group(3) else None


def is_insecure(host, insecure):
    """Whether host may be reached without TLS: listed by name, or its address is in a network that is listed."""
    import ipaddress
    name, port = split_host(host)
    if is_loopback(name) or host in insecure:
        return True
    networks = []
    for entry in insecure:
        with contextlib.suppress(ValueError):
            networks.append(ipaddress.ip_network(entry, strict=False))
    addresses = []
    if networks:
        with contextlib.suppress(OSError):
            addresses = [ipaddress.ip_address(info[4][0].partition("%")[0]) for info in socket.getaddrinfo(name, port or 443)]
    return any(address in network for address in addresses for network in networks)


def proxy_for(scheme, name, port, environment):
    """The proxy's URL for a host, or None: HTTP_PROXY, HTTPS_PROXY and NO_PROXY, upper or lower case, with the rules of Go's
    httpproxy: names with all below them, addresses, networks, each with an optional port, and `*`."""
    import ipaddress

    def value(variable):
        return environment.get(variable.upper()) or environment.get(variable) or ""

    proxy = value(scheme + "_proxy")
    if not proxy or is_loopback(name):
        return None
    for entry in value("no_proxy").lower().split(","):
        entry, _, wanted = entry.strip().partition(":") if entry.count(":") == 1 else (entry.strip(), "", "")
        if not entry or wanted and wanted != str(port):
            continue
        if entry == "*" or name.lower() == entry or name.lower().endswith("." + entry.lstrip("*").lstrip(".")):
            return None
        with contextlib.suppress(ValueError):
            if ipaddress.ip_address(name) in ipaddress.ip_network(entry, strict=False):
                return None
    return proxy if "://" in proxy else "http://" + proxy


class RegistryClient:
    """One registry, or mirror, as one user sees it, for the length of one operation; a context manager. Threads share it: each
    has its own connection. `address` is HOST[:PORT], or a URL, which then says whether there is TLS. Credentials go to this host,
    and over TLS (unless the host itself has none) to the token service that it names; nowhere else (CVE-2020-15157)."""

    def __init__(self, address, options, auth=None):
        scheme, mark, rest = address.partition("://")
        self.host, _, prefix = (rest if mark else address).rstrip("/").partition("/")
        split_host(self.host)
        self.options, self.auth, self.prefix = options, auth or {}, "/" + prefix if prefix else ""
        self.insecure = is_insecure(self.host, options.insecure)
        self.schemes = [scheme] if mark else self._schemes()
        self.base, self.challenges = None, {}
        self._tokens, self._lock, self._contexts = {}, threading.Lock(), {}
        self._local, self._open, self._stopped = threading.local(), set(), threading.Event()

    def _schemes(self):
        """Loopback is asked in plain first: a server that waits for a line would wait for ever in the middle of a TLS greeting. A
        host with a CA of its own in certs.d is meant to have TLS."""
        if not self.insecure:
            return ["https"]
        if any(name.endswith(".crt") for name, _ in self._certificates(self.host)):
            return ["https"]
        return ["http", "https"] if is_loopback(split_host(self.host)[0]) else ["https", "http"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.cancel()
        for connection in self._open:
            connection.close()

    def cancel(self):
        """End all that is under way, in every thread."""
        self._stopped.set()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError, AttributeError):
                    connection.sock.shutdown(socket.SHUT_RDWR)

    # connections

    def _certificates(self, host):
        """(name, path) of the files in certs.d/HOST, of all folders."""
        found = []
        for folder in self.options.certs:
            with contextlib.suppress(OSError):
                found += [(name, os.path.join(folder, host, name)) for name in sorted(os.listdir(os.path.join(folder, host)))]
        return found

    def _context(self, host):
        """The TLS context for a host: the system's CAs and those in certs.d, client certificates from there."""
        import ssl
        with self._lock:
            if host in self._contexts:
                return self._contexts[host]
        context = ssl.create_default_context()
        files = dict(self._certificates(host))
        try:
            for name, path in files.items():
                if name.endswith(".crt"):
                    context.load_verify_locations(path)
                elif name.endswith(".cert"):
                    if name[:-5] + ".key" not in files:
                        raise Error("missing key %s.key for client certificate %s. CA certificates must use the extension .crt"
                                    % (name[:-5], path))
                    context.load_cert_chain(path, files[name[:-5] + ".key"])
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise Error("the certificates for %s in %s cannot be used: %s" % (host, " and ".join(self.options.certs), error))
        if is_insecure(host, self.options.insecure) and not any(name.endswith(".crt") for name in files):
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with self._lock:
            return self._contexts.setdefault(host, context)

    def _connection(self, scheme, host):
        """(this thread's connection to a host, whether it was used before, target prefix and headers for a proxy)."""
        kept = self._local.__dict__.setdefault("connections", {})
        connection, extra = kept.get((scheme, host)), ("", {})
        if connection is not None and connection.sock is not None and connection.idle():
            return connection, True, connection.extra
        self._drop(scheme, host)
        connection, extra = self._connect(scheme, host)
        connection.extra = extra
        kept[scheme, host] = connection
        with self._lock:
            self._open.add(connection)
        if self._stopped.is_set():
            raise RegistryError("the transfer was cancelled")
        return connection, False, extra

    def _connect(self, scheme, host):
        import base64
        from urllib.parse import unquote, urlsplit
        plain, secure = _connection_classes()
        name, port = split_host(host)
        port = port or (443 if scheme == "https" else 80)
        proxy = proxy_for(scheme, name, port, self.options.environment)
        more = {"context": self._context(host)} if scheme == "https" else {}
        kind = secure if scheme == "https" else plain
        if not proxy:
            return kind(name, port, timeout=self.options.timeout, **more), ("", {})
        parts = urlsplit(proxy)
        user = "%s:%s" % (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
        headers = {"Proxy-Authorization": "Basic " + base64.b64encode(user.encode()).decode()} if user else {}
        connection = kind(parts.hostname, parts.port or 80, timeout=self.options.timeout, **more)
        if scheme == "https":
            connection.set_tunnel(name, port, headers)
            return connection, ("", {})
        return connection, ("http://" + host, headers)

    def _drop(self, scheme, host):
        connection = self._local.__dict__.get("connections", {}).pop((scheme, host), None)
        if connection is not None:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _exchange(self, method, url, headers, body=None):
        """One request and the head of its answer. A connection that the server has closed since its last use is opened anew."""
        import http.client
        from urllib.parse import urlsplit
        parts = urlsplit(url)
        target = (parts.path or "/") + ("?" + parts.query if parts.query else "")
        headers = dict({"User-Agent": "pydock/" + VERSION, "Accept-Encoding": "identity"}, **headers)
        while True:
            connection, used, used_headers = None, False, {}
            try:
                connection, used, (before, used_headers) = self._connection(parts.scheme, parts.netloc)
                connection.request(method, before + target, body, dict(headers, **used_headers),
                                   encode_chunked="Transfer-Encoding" in headers)
                connection.answer = connection.getresponse()
                return connection.answer
            except (OSError, http.client.HTTPException, ValueError) as error:
                early = self._early_answer(connection, error)
                if early is not None:
                    del self._local.connections[parts.scheme, parts.netloc]  # good for nothing more
                    return early
                self._drop(parts.scheme, parts.netloc)
                if used and not hasattr(body, "__next__") and not isinstance(error, socket.timeout):
                    continue
                raise self._unreachable(method, url, error)

    @staticmethod
    def _early_answer(connection, error):
        """What a server has answered that closed its side while we were still sending."""
        import http.client
        if isinstance(error, (BrokenPipeError, ConnectionResetError)) and connection is not None:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                connection.answer = connection.getresponse()
                return connection.answer
        return None

    def _unreachable(self, method, url, error):
        """A failed exchange in the words that Go's net/http, and so docker, has for it."""
        import ssl
        from urllib.parse import urlsplit
        host = urlsplit(url).netloc
        code = "UNREACHABLE"
        if self._stopped.is_set():
            reason, code = "the transfer was cancelled", "CANCELLED"
        elif isinstance(error, ssl.SSLCertVerificationError):
            reason, code = ("tls: failed to verify certificate: %s: put the CA's certificate in %s/%s/ca.crt, or name the "
                            "registry with --insecure-registry" % (error.verify_message, self.options.certs[0], host)), "TLS"
        elif isinstance(error, ssl.SSLError):
            plain = "WRONG_VERSION_NUMBER" in str(error) or "HTTP_REQUEST" in str(error)
            reason = "http: server gave HTTP response to HTTPS client" if plain else "tls: %s" % (error.reason or error)
            code = "TLS"
        elif isinstance(error, socket.timeout):
            reason = "dial tcp %s: i/o timeout" % host
        elif isinstance(error, socket.gaierror):
            reason = "dial tcp: lookup %s: no such host" % split_host(host)[0]
        elif isinstance(error, ConnectionRefusedError):
            reason = "dial tcp %s: connect: connection refused" % host
        else:
            reason = "%s" % (getattr(error, "strerror", None) or error or type(error).__name__)
        # a signed address is a secret, and it is in the query
        return RegistryError('%s "%s": %s' % (method.capitalize(), printable(url.partition("?")[0]), printable(reason)), code)

    # requests

    def connect(self):
        """Find out how the registry is reached and whom it lets in: GET /v2/, with TLS and, where that is allowed, without."""
        errors = {}
        for scheme in self.schemes:
            base = "%s://%s%s" % (scheme, self.host, self.prefix)
            try:
                answer = self.retrying(lambda: self._ping(base + "/v2/"))
                break
            except RegistryError as error:
                errors[scheme] = error
        else:  # a TLS server's complaint about plain HTTP says less than what went wrong with TLS
            raise errors["http" if "http" in errors and errors["http"].answered is None else scheme]
        self.base = base
        self.challenges = parse_challenges(answer.headers.get_all("WWW-Authenticate") or [])
        return self

    def _ping(self, url):
        try:
            answer = self._exchange("GET", url, {})
            data = self.read(answer)
        except RegistryError as error:
            error.code = "NOT_REACHED"  # who is not there at the first contact is not waited for
            raise
        if answer.status not in (200, 401):
            raise self._error(answer, data, url)
        return answer

    def retrying(self, action, tries=None, told=None, advanced=lambda: False):
        """action(), and again after what may pass (network trouble, 429, 5xx), after pauses that double or as Retry-After says.
        told(words) is called before each pause; advanced() says that there was progress, which makes the count begin anew."""
        attempt = 0
        while True:
            try:
                return action()
            except RegistryError as error:
                attempt = 1 if advanced() else attempt + 1
                if not error.passing or attempt >= (tries or self.options.tries) or self._stopped.is_set():
                    raise
                pause = min(self.options.delay * 2 ** (attempt - 1) if error.after is None else error.after, 60)
            if told:
                told("Retrying in %d second%s" % (pause, "" if int(pause) == 1 else "s"))
            self._stopped.wait(pause)

    def request(self, method, path, scopes=(), headers=None, body=None, good=(200,)):
        """A request to the registry, and its answer with one of the statuses in `good`; RegistryError for another. `path` may be
        a whole address, as in a Location. `scopes` are what a token has to allow. Redirects of reads are followed."""
        from urllib.parse import urljoin
        url = urljoin(self.base + "/", self.base + path if path.startswith("/v2/") else path)
        for hop in range(6):
            answer = self._authorised(method, url, scopes, headers or {}, body)
            if answer.status not in _REDIRECTS or method not in ("GET", "HEAD"):
                break
            self.read(answer)
            location = urljoin(url, answer.headers.get("Location", ""))
            if not location.startswith(("https://", "http://")) or url.startswith("https:") and not location.startswith("https:"):
                raise RegistryError("the registry %s redirects to %s, which is not followed"
                                    % (self.host, printable(location.partition("?")[0])[:200]))
            url = location
        if answer.status in good:
            return answer
        raise self._error(answer, self.read(answer, MOST_ANSWER), url)

    def _authorised(self, method, url, scopes, headers, body):
        """One exchange with credentials if, and only if, it goes to the registry itself; once more with a new token after a
        401."""
        if not self._is_ours(url):
            return self._exchange(method, url, headers, body)
        authorisation = self._authorisation(url, scopes)
        answer = self._exchange(method, url, dict(headers, **authorisation), body)
        if answer.status != 401 or hasattr(body, "__next__"):
            return answer
        challenges = parse_challenges(answer.headers.get_all("WWW-Authenticate") or []) or self.challenges
        if challenges == self.challenges and "bearer" not in challenges:
            return answer
        self.read(answer)
        with self._lock:
            self.challenges = challenges
            self._tokens.pop(tuple(scopes), None)
        return self._exchange(method, url, dict(headers, **self._authorisation(url, scopes)), body)

    def _is_ours(self, url):
        from urllib.parse import urlsplit
        ours, theirs = urlsplit(self.base), urlsplit(url)
        return (ours.scheme, ours.netloc) == (theirs.scheme, theirs.netloc)

    def read(self, answer, most=MOST_ANSWER):
        """The rest of an answer's body, so that its connection can be used again; more than `most` bytes are an error."""
        import http.client
        try:
            data = answer.read(most + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            answer.close()
            raise RegistryError("the answer of the registry %s broke off: %s" % (self.host, printable(error)), "UNREACHABLE")
        if answer.length and len(data) <= most:
            answer.close()
            raise RegistryError("the answer of the registry %s broke off" % self.host, "UNREACHABLE")
        if len(data) > most:
            answer.close()
            raise BadRequest("the registry %s sent a document of more than %s" % (self.host, format_size(most)))
        return data

    def _error(self, answer, data, url):
        """The error that an answer is: the first of its `errors`, or what its status means."""
        code, words = _CODES.get(answer.status, ("", ""))
        challenge = parse_challenges(answer.headers.get_all("WWW-Authenticate") or []).get("bearer", {})
        if answer.status == 401 and challenge.get("error") == "insufficient_scope":
            code, words, data = "DENIED", "requested access to the resource is denied", b""
        with contextlib.suppress(BadRequest, KeyError, IndexError, TypeError):
            document = parse_document(data, "the answer")
            if isinstance(document.get("details"), str):  # Docker Hub's token service
                words = document["details"]
            else:
                first = document["errors"][0]
                code, words = str(first["code"]).upper(), str(first.get("message") or "")
        named = code and (words or answer.status != 404)
        text = ("%s: %s" % (code.lower().replace("_", " "), words or code.lower()) if named
                else "received unexpected HTTP status: %d %s" % (answer.status, printable(answer.reason or "")))
        after = answer.headers.get("Retry-After", "").strip()
        status = {"UNAUTHORIZED": 401, "MANIFEST_UNKNOWN": 404, "NAME_UNKNOWN": 404, "BLOB_UNKNOWN": 404, "DENIED": 403}.get(code)
        return RegistryError(printable(text)[:1000], code, answer.status, _seconds_until(after), status)

    # who we are

    def _authorisation(self, url, scopes):
        """The Authorization header for a request, as an object with that one key or none."""
        if self.auth.get("registrytoken"):
            return {"Authorization": "Bearer " + self.auth["registrytoken"]}
        if "bearer" in self.challenges:
            return {"Authorization": "Bearer " + self.token(scopes)}
        if "basic" in self.challenges:
            if not self.auth.get("username"):
                raise RegistryError('Get "%s": no basic auth credentials' % url.partition("?")[0], "NO_CREDENTIALS")
            return {"Authorization": self._basic()}
        return {}

    def _basic(self):
        import base64
        return "Basic " + base64.b64encode(("%s:%s" % (self.auth["username"], self.auth.get("password", ""))).encode()).decode()

    def token(self, scopes):
        """A bearer token for scopes such as `repository:library/busybox:pull`, kept until it expires."""
        with self._lock:
            token, until = self._tokens.get(tuple(scopes), (None, 0))
        if time.monotonic() < until:
            return token
        answer = self.fetch_token(scopes)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]+", token):
            raise RegistryError("the token service of %s gave no token" % self.host)
        lifetime = answer.get("expires_in")
        lifetime = max(lifetime, 60) if _fits(lifetime, int) and lifetime else 60
        with self._lock:
            self._tokens[tuple(scopes)] = token, time.monotonic() + min(lifetime, 3600) * 0.9
        return token

    def fetch_token(self, scopes, offline=False):
        """Ask the token service that the registry names (distribution's docs/spec/auth): by GET with the password, or with an
        identity token by POST as in OAuth 2. offline: ask for an identity token as well. Returns the answer's object."""
        from urllib.parse import urlencode
        challenge = self.challenges["bearer"]
        realm = challenge.get("realm", "")
        if not realm.startswith("https://") and not (realm.startswith("http://") and self.base.startswith("http://")):
            raise RegistryError("the registry %s names the token service %s, which is not reached over TLS: no credentials are "
                                "sent there" % (self.host, printable(realm)[:200]))
        fields = [(key, challenge[key]) for key in ("service",) if challenge.get(key)]
        headers, method, body = {}, "GET", None
        if self.auth.get("identitytoken"):
            fields += [("grant_type", "refresh_token"), ("refresh_token", self.auth["identitytoken"]), ("client_id", "pydock")]
            fields += [("scope", " ".join(scopes))] if scopes else []
            method, body, headers = "POST", urlencode(fields).encode(), {"Content-Type": "application/x-www-form-urlencoded"}
        else:
            fields += [("scope", scope) for scope in scopes]
            if self.auth.get("username"):
                fields += [("account", self.auth["username"])]
                headers = {"Authorization": self._basic()}
            fields += [("client_id", "pydock"), ("offline_token", "true")] if offline else []
            realm += ("&" if "?" in realm else "?") + urlencode(fields)
        answer = self.retrying(lambda: self._good(self._exchange(method, realm, headers, body), realm))
        return parse_document(answer, "the answer of the token service of %s" % self.host)

    def _good(self, answer, url):
        data = self.read(answer, MOST_ANSWER)
        if answer.status != 200:
            raise self._error(answer, data, url)
        return data

    # what the protocol has

    def manifest(self, path, name, scopes):
        """The Manifest of a tag or digest."""
        accept = ", ".join(MANIFEST_TYPES + INDEX_TYPES)

        def fetch():
            answer = self.request("GET", "/v2/%s/manifests/%s" % (path, name), scopes, {"Accept": accept})
            return answer, self.read(answer, MOST_MANIFEST)

        answer, data = self.retrying(fetch)
        said = answer.headers.get("Docker-Content-Digest", "")
        digest = name if DIGEST.fullmatch(name) else said if DIGEST.fullmatch(said) else None
        return Manifest(data, answer.headers.get("Content-Type", ""), digest, "the manifest of %s" % path)

    def document(self, path, descriptor, scopes):
        """The bytes of a small blob, such as a config."""
        if descriptor["size"] > MOST_CONFIG:
            raise BadRequest("the config of %s has %s; more than %s are not read"
                             % (path, format_size(descriptor["size"]), format_size(MOST_CONFIG)))
        blob = "/v2/%s/blobs/%s" % (path, descriptor["digest"])
        data = self.retrying(lambda: self.read(self.request("GET", blob, scopes), MOST_CONFIG))
        if "sha256:" + sha256_hex(data) != descriptor["digest"]:
            raise BadRequest("image config verification failed for digest %s" % descriptor["digest"])
        return data

    def read_blob(self, path, digest, scopes, start, take):
        """Read a blob from byte `start` on, calling take(memoryview) until its end. A server that knows no ranges sends what we
        have again: that part is skipped."""
        import http.client
        headers = {"Range": "bytes=%d-" % start} if start else {}
        answer = self.request("GET", "/v2/%s/blobs/%s" % (path, digest), scopes, headers, good=(200, 206, 416))
        if answer.status == 416:
            self.read(answer)
            answer = self.request("GET", "/v2/%s/blobs/%s" % (path, digest), scopes)
        match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        if answer.status == 206 and (not match or int(match.group(1)) != start):
            answer.close()
            raise RegistryError("the registry %s sent another part of blob %s than it was asked for" % (self.host, digest))
        skip = start if answer.status == 200 else 0
        buffer = bytearray(_PIECE)
        try:
            while True:
                count = answer.readinto(buffer)
                if not count:
                    return
                if count > skip:
                    take(memoryview(buffer)[skip:count])
                skip = max(skip - count, 0)
        except (http.client.HTTPException, socket.error, ValueError) as error:
            answer.close()
            raise self._unreachable("GET", self.base + "/v2/%s/blobs/%s" % (path, digest), error)
        except BaseException:
            answer.close()
            raise

    def has_blob(self, path, digest, scopes):
        try:
            self.read(self.retrying(lambda: self.request("HEAD", "/v2/%s/blobs/%s" % (path, digest), scopes)))
            return True
        except RegistryError as error:
            if error.answered != 404:
                raise
            return False

    def begin_upload(self, path, scopes, mount=None, source=None):
        """Open an upload; returns the address to send to, or None when the registry could mount the blob `mount` from the
        repository `source` instead."""
        from urllib.parse import urlencode
        query = "?" + urlencode({"mount": mount, "from": source}) if mount else ""
        answer = self.request("POST", "/v2/%s/blobs/uploads/%s" % (path, query), scopes, {"Content-Length": "0"}, good=(201, 202))
        self.read(answer)
        return None if answer.status == 201 else self._location(answer)

    def _location(self, answer):
        """Where an upload goes on. A registry behind a TLS proxy may not know that it is one and name itself in plain."""
        from urllib.parse import urljoin, urlsplit
        location = urljoin(self.base + "/", answer.headers.get("Location", ""))
        if urlsplit(location).netloc == self.host and not self._is_ours(location):
            location = self.base.partition("://")[0] + "://" + location.partition("://")[2]
        if not location.startswith(("http://", "https://")):
            raise RegistryError("the registry %s names no place to send a blob to" % self.host)
        return location

    def upload(self, location, scopes, pieces):
        """Send a blob, an iterable of bytes, to where begin_upload said; returns (digest, size)."""
        import hashlib
        from urllib.parse import urlencode
        digest, size = hashlib.sha256(), 0

        def passing():
            nonlocal size
            for piece in pieces:
                digest.update(piece)
                size += len(piece)
                yield piece

        headers = {"Content-Type": "application/octet-stream", "Transfer-Encoding": "chunked"}
        answer = self.request("PATCH", location, scopes, headers, passing(), good=(202, 204))
        self.read(answer)
        location = self._location(answer)
        name = "sha256:" + digest.hexdigest()
        location += ("&" if "?" in location else "?") + urlencode({"digest": name})
        self.read(self.request("PUT", location, scopes, {"Content-Length": "0"}, good=(201, 204)))
        return name, size

    def put_manifest(self, path, name, data, media_type, scopes):
        path, headers = "/v2/%s/manifests/%s" % (path, name), {"Content-Type": media_type}
        self.read(self.retrying(lambda: self.request("PUT", path, scopes, headers, data, good=(200, 201, 202))))

    def names(self, path, key, scopes, most=100000):
        """The list `key` of a paged answer: tags/list, _catalog. Pages are linked (RFC 5988); only the way inside this registry
        is followed."""
        found = []
        while path and len(found) < most:
            answer, data = self._read_page(path, scopes)
            page = parse_document(data, "the answer of %s" % self.host).get(key) or []
            found += [name for name in page if isinstance(name, str)] if isinstance(page, list) else []
            match = re.match(r'<(?:https?://[^/>]+)?(/v2/[^>]*)>; *rel="?next"?', answer.headers.get("Link", ""))
            path = match.group(1) if match and page else None
        return found[:most]

    def _read_page(self, path, scopes):
        def fetch():
            answer = self.request("GET", path, scopes)
            return answer, self.read(answer, MOST_MANIFEST)

        return self.retrying(fetch)


def _seconds_until(text):
    """Retry-After: seconds, or a date; None where there is none."""
    if text.isdigit():
        return int(text[:6])
    if text:
        from email.utils import parsedate_to_datetime
        with contextlib.suppress(TypeError, ValueError):
            return max(0, parsedate_to_datetime(text).timestamp() - time.time())
    return None


@functools.lru_cache(None)
def _connection_classes():
    """http.client's two kinds of connections, which here know whether the last answer has been read to its end."""
    import http.client

    class Plain(http.client.HTTPConnection):
        answer, extra = None, ("", {})

        def idle(self):
            return self.answer is None or self.answer.isclosed()

    class Secure(http.client.HTTPSConnection):
        answer, extra, idle = None, ("", {}), Plain.idle

    return Plain, Secure


# -- pull ---------------------------------------------------------------------------------------------------------------------

class Download:
    """A blob on its way into downloads/HEX, seen by the thread that fetches it and the one that unpacks it: `fd` its file, `have`
    the bytes there that may be used, `done` when it is whole and verified, `error` what went wrong."""

    def __init__(self, descriptor):
        self.digest, self.size = descriptor["digest"], descriptor["size"]
        self.name = short_digest(self.digest)
        self.fd, self.have, self.done, self.error = None, 0, False, None
        self.changed = threading.Condition()

    def update(self, **values):
        with self.changed:
            self.__dict__.update(values)
            self.changed.notify_all()

    def wait(self, beyond):
        """Wait until more than `beyond` bytes are there, or all. Raises what went wrong."""
        with self.changed:
            self.changed.wait_for(lambda: self.error or self.done or self.have > beyond)
            if self.error:
                raise self.error
            return self.have

    def close(self):
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class Puller:
    """One image on its way in: `client`, and `reference` with the tag or digest that is wanted. The steps are in run()."""

    def __init__(self, blobs, client, reference, platform, report):
        self.blobs, self.images, self.layers, self.client = blobs, blobs.images, blobs.layers, client
        self.reference, self.platform, self.report = reference, parse_platform(platform), report
        self.explicit = bool(platform)
        self.path, self.scopes = reference.path, ["repository:%s:pull" % reference.path]
        self.source = "%s/%s" % (reference.domain, reference.path)

    def run(self):
        """Returns (image, digest, whether the name now stands for something else than before)."""
        name = self.reference.digest or self.reference.tag or "latest"
        # 1. What the name stands for: a manifest, or an index with one for each platform.
        top = manifest = self.client.manifest(self.path, name, self.scopes)
        if top.is_index:
            manifest = self._choose(top)
        shown = "%s@%s" % (self.source, self.reference.digest) if self.reference.digest else name
        self.report.line("Pulling from " + self.path, shown)
        # 2. The config: its digest is the image's id, and it says what each layer unpacks to.
        image_id = manifest.config["digest"][7:]
        with self.blobs.alone("image " + image_id):
            image = self.images.images.get(image_id)
            if image is None:
                image = self._fetch(manifest, image_id)
            # 3. The names: only now that all is here.
            newer = self._name(image, top.digest)
        if self.explicit:
            self._warn_of_platform(image)
        return image, top.digest, newer

    def _choose(self, index):
        entry = choose_platform(index.manifests, self.platform)
        if entry is None:
            raise NotFound("no matching manifest for %s in the manifest list entries" % format_platform(self.platform))
        manifest = self.client.manifest(self.path, entry["digest"], self.scopes)
        if manifest.is_index:
            raise BadRequest("the index %s names another index for %s" % (index.digest, format_platform(self.platform)))
        return manifest

    def _fetch(self, manifest, image_id):
        data = self.client.document(self.path, manifest.config, self.scopes)
        config = check_image_config(data)
        diff_ids = [digest[7:] for digest in config["rootfs"].get("diff_ids") or []]
        if len(diff_ids) != len(manifest.layers):
            raise BadRequest("the image's config has %d layers, its manifest %d" % (len(diff_ids), len(manifest.layers)))
        with self.blobs.expecting(image_id, diff_ids, [layer["digest"] for layer in manifest.layers]):
            self._pull_layers(diff_ids, manifest.layers)
            self.blobs.keep_manifest(image_id, manifest)
            return self.images.add(data, local=False)

    def _name(self, image, digest):
        reference = self.reference
        with self.images.lock:
            known = image.meta["digests"].get(reference.repository) == digest
            self.images.add(read_file(self.blobs.path(image.id)), digests={reference.repository: digest})
            if reference.digest:
                return not known
            before = self.images.tags.get(reference.tagged)
            if before != image.id:
                self.images.tag(image, Reference(reference.domain, reference.path, reference.tag))
            return before != image.id

    def _warn_of_platform(self, image):
        there = parse_platform("/".join(filter(None, (image.config.get("os") or "linux", image.config.get("architecture"),
                                                      image.config.get("variant")))))
        if there[1:] not in platform_order(self.platform) and there[1] != self.platform[1]:
            self.report.line("WARNING: image with reference %s was found but does not match the specified platform: wanted %s, "
                             "actual: %s" % (self.reference, format_platform(self.platform), format_platform(there)))

    # layers

    def _pull_layers(self, diff_ids, descriptors):
        """Bring in the layers that are not here: three downloads at a time, lowest first, while this thread unpacks them in
        order."""
        chains = []
        for diff_id in diff_ids:
            chains.append(chain_id(chains[-1] if chains else None, diff_id))
        here = [chain in self.layers.meta for chain in chains]
        downloads = {}
        for index, descriptor in enumerate(descriptors):
            name = short_digest(descriptor["digest"])
            if here[index]:
                self.report.state(name, "Already exists")
                self.blobs.remember(diff_ids[index], descriptor, self.source, new=False)
            elif descriptor["digest"] not in downloads:
                downloads[descriptor["digest"]] = Download(descriptor)
                self.report.state(name, "Pulling fs layer")
        for download in list(downloads.values())[AT_ONCE:]:
            self.report.state(download.name, "Waiting")
        threads = start_threads(AT_ONCE, [functools.partial(self._download, download) for download in downloads.values()])
        try:
            for index, chain in enumerate(chains):
                if not here[index]:
                    self._unpack(chains[index - 1] if index else None, chain, diff_ids[index], descriptors[index],
                                 downloads[descriptors[index]["digest"]])
        except BaseException:
            self.client.cancel()  # ends the downloads
            raise
        finally:
            for thread in threads:
                thread.join()
            for download in downloads.values():
                download.close()

    def _download(self, download):
        """A thread's work: one blob. What goes wrong is raised in the thread that waits for it."""
        try:
            with self.blobs.alone(download.digest):
                if not self._open_kept(download):
                    self._open_partial(download)
                    self._fetch_blob(download)
                    self.report.state(download.name, "Verifying Checksum")
            self.report.state(download.name, "Download complete")
            download.update(have=download.size, done=True)
        except Exception as error:
            debug_traceback()
            download.update(error=error if isinstance(error, Error) else Error(
                os_error_text(error) if isinstance(error, OSError) else "%s: %s" % (type(error).__name__, error)))

    def _open_kept(self, download):
        try:
            download.fd = os.open(self.blobs.path(download.digest), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        return os.fstat(download.fd).st_size == download.size or download.close()

    def _open_partial(self, download):
        path = os.path.join(self.blobs.downloads, download.digest[7:])
        download.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _fetch_blob(self, download):
        """Fetch what is missing of a blob and verify all of it. What an earlier pull left may be wrong: it is used only when all
        is verified, and the blob fetched from its beginning when that fails."""
        import hashlib
        left, digest = 0, hashlib.sha256()
        while left < download.size:
            data = os.pread(download.fd, min(_PIECE, download.size - left), left)
            if not data:
                break
            digest.update(data)
            left += len(data)
        os.ftruncate(download.fd, left)
        state = self._receive(download, left, digest, visible=not left)
        if state != download.digest and left:
            os.ftruncate(download.fd, 0)
            state = self._receive(download, 0, hashlib.sha256(), visible=True)
        if state != download.digest:
            raise BadRequest("filesystem layer verification failed for digest %s" % download.digest)

    def _receive(self, download, at, digest, visible):
        """Receive a blob from byte `at` to its end, over as many answers as that takes; returns its digest."""
        at_pause = at

        def take(piece):
            nonlocal at
            if at + len(piece) > download.size:
                raise BadRequest("blob %s is longer than the %d bytes that its manifest says" % (download.digest, download.size))
            digest.update(piece)
            write_all_at(download.fd, piece, at)
            at += len(piece)
            if visible:
                download.update(have=at)
            self.report.amount(download.name, "Downloading", at, download.size)

        def rest():
            if at < download.size:
                self.client.read_blob(self.path, download.digest, self.scopes, at, take)
            if at < download.size:
                raise RegistryError("blob %s ends after %d of %d bytes" % (download.digest, at, download.size), "UNREACHABLE")

        def advanced():
            nonlocal at_pause
            before, at_pause = at_pause, at
            return at - before > 1 << 20

        self.client.retrying(rest, told=functools.partial(self.report.state, download.name), advanced=advanced)
        return "sha256:" + digest.hexdigest()

    def _unpack(self, parent, chain, diff_id, descriptor, download):
        path = os.path.join(self.blobs.downloads, download.digest[7:])

        def feed(sink):
            sent = 0
            while sent < download.size:
                have = download.wait(sent)
                while sent < have:
                    sent += os.sendfile(sink, download.fd, sent, min(have - sent, 1 << 20))
                    if download.done:
                        self.report.amount(download.name, "Extracting", sent, download.size)
            download.wait(download.size)

        def keep(_):
            self.blobs.remember(diff_id, descriptor, self.source)
            if os.path.exists(path):
                os.rename(path, self.blobs.path(download.digest))
            elif not os.path.exists(self.blobs.path(download.digest)):
                raise Error("the download of %s was removed by another pull that failed: pull again" % download.digest)

        with self.blobs.alone("chain " + chain):
            if chain not in self.layers.meta:
                try:
                    self.blobs.add_layer(parent, diff_id, feed, keep)
                except BadRequest:
                    download.wait(download.size)  # of a layer that is not what its digest says, that is the thing to say
                    raise
        download.wait(download.size)
        self.report.state(download.name, "Pull complete")


def write_all_at(fd, data, offset):
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def start_threads(count, jobs):
    """Do the jobs, functions that raise nothing, in order in `count` threads; returns the threads."""
    import collections
    waiting = collections.deque(jobs)

    def work():
        while True:
            try:
                job = waiting.popleft()
            except IndexError:
                return
            job()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(count, len(waiting)))]
    for thread in threads:
        thread.start()
    return threads


# -- push ---------------------------------------------------------------------------------------------------------------------

class Pusher:
    """One image on its way out under one tag. The steps are in run()."""

    def __init__(self, blobs, client, reference, report):
        self.blobs, self.images, self.layers, self.client = blobs, blobs.images, blobs.layers, client
        self.reference, self.report, self.path = reference, report, reference.path
        self.scopes = ["repository:%s:pull,push" % reference.path]
        self.source = "%s/%s" % (reference.domain, reference.path)

    def run(self, image):
        # 1. The manifest it was pulled with says which compressed form of each layer gives the same digest again.
        manifest = self.blobs.manifest_of(image.id)
        wanted = {diff_id: layer for diff_id, layer in zip(image.diff_ids, manifest.layers)} if manifest else {}
        # 2. The layers, so that the manifest names nothing that is not there.
        sent = self._push_layers(image, wanted)
        # 3. The config.
        config = read_file(self.blobs.path(image.id))
        self._push_config(config, "sha256:" + image.id)
        # 4. The manifest: the very bytes that came, where all it names is the same.
        layers = [sent[diff_id] for diff_id in image.diff_ids]
        if not manifest or [layer["digest"] for layer in manifest.layers] != [layer["digest"] for layer in layers]:
            manifest = make_manifest(image.id, len(config), layers)
        self.client.put_manifest(self.path, self.reference.tag, manifest.data, manifest.media_type, self.scopes)
        # 5. What we know now.
        if not self.blobs.manifest_of(image.id):
            self.blobs.keep_manifest(image.id, manifest)
        self.images.add(config, digests={self.reference.repository: manifest.digest})
        size = len(manifest.data)
        self.report.line("%s: digest: %s size: %d" % (self.reference.tag, manifest.digest, size))
        self.report.send({"progressDetail": {}, "aux": {"Tag": self.reference.tag, "Digest": manifest.digest, "Size": size}})

    def _push_layers(self, image, wanted):
        """Push the layers, three at a time; {diff_id: descriptor}."""
        sent, errors = {}, []
        chains = dict(zip(image.diff_ids, self.layers.chain(image.chain)))
        diff_ids = list(dict.fromkeys(reversed(image.diff_ids)))
        for diff_id in diff_ids:
            self.report.state(diff_id[:12], "Preparing")
        for diff_id in diff_ids[AT_ONCE:]:
            self.report.state(diff_id[:12], "Waiting")

        def push(diff_id):
            try:
                if not errors:
                    sent[diff_id] = self._push_layer(diff_id, chains[diff_id], wanted.get(diff_id))
            except Exception as error:
                debug_traceback()
                errors.append(error)
                self.client.cancel()

        for thread in start_threads(AT_ONCE, [functools.partial(push, diff_id) for diff_id in diff_ids]):
            thread.join()
        if errors:
            raise errors[0]
        return sent

    def _push_layer(self, diff_id, chain, wanted):
        """One layer: the registry has it, or has it elsewhere, or it is sent, as it came or made anew. Returns its descriptor."""
        name, location = diff_id[:12], None
        known = sorted(self.blobs.known(diff_id), key=lambda blob: not wanted or blob["digest"] != wanted["digest"])
        for blob in known[:5]:
            if self.client.has_blob(self.path, blob["digest"], self.scopes):
                self.report.state(name, "Layer already exists")
                return self._done(diff_id, blob)
        for blob in known[:5]:
            source, location = self._mount(blob)
            if source:
                self.report.state(name, "Mounted from " + source)
                return self._done(diff_id, blob)
        kept = self.blobs.kept(diff_id)
        if kept and (_LAYER_TYPE.fullmatch(kept["mediaType"]).group(1) or wanted and kept["digest"] == wanted["digest"]):
            digest, _ = self._upload(name, location, kept["size"], functools.partial(self._stored, kept))
            if digest != kept["digest"]:
                raise Error("the blob %s has been changed on disk: remove the images that have it and pull them again"
                            % self.blobs.path(kept["digest"]))
            descriptor = kept
        else:
            digest, size = self._upload(name, location, self.layers.meta[chain]["size"], functools.partial(self._made, chain))
            descriptor = {"mediaType": LAYER_GZIP, "size": size, "digest": digest}
        self.report.state(name, "Pushed")
        return self._done(diff_id, descriptor)

    def _done(self, diff_id, descriptor):
        self.blobs.remember(diff_id, descriptor, self.source)
        return {key: descriptor[key] for key in ("mediaType", "size", "digest")}

    def _mount(self, blob):
        """(repository that the blob was mounted from, or None; an upload's address that the registry opened instead, or None)."""
        for repository in blob["repositories"][:3]:
            domain, _, path = repository.partition("/")
            if domain == self.reference.domain and path != self.path:
                scopes = self.scopes + ["repository:%s:pull" % path]
                try:
                    location = self.client.begin_upload(self.path, scopes, blob["digest"], path)
                except RegistryError as error:
                    if error.answered is None:
                        raise
                    continue
                return (path, None) if location is None else (None, location)
        return None, None

    def _upload(self, name, location, total, pieces):
        """Send what pieces() yields, from its beginning again after trouble; returns (digest, size)."""
        def attempt():
            nonlocal location
            target, location = location or self.client.begin_upload(self.path, self.scopes), None
            return self.client.upload(target, self.scopes, self._counted(name, total, pieces()))

        return self.client.retrying(attempt, told=functools.partial(self.report.state, name))

    def _counted(self, name, total, pieces):
        sent = 0
        for piece in pieces:
            sent += len(piece)
            self.report.amount(name, "Pushing", sent, total)
            yield piece

    def _stored(self, blob):
        with open(self.blobs.path(blob["digest"]), "rb", buffering=0) as file:
            yield from iter(lambda: file.read(_PIECE), b"")

    def _made(self, chain):
        """The layer's archive, gzipped by a child while it is sent."""
        source, sink = os.pipe2(os.O_CLOEXEC)
        with open(source, "rb", buffering=0) as pipe:
            try:
                _widen(sink)
                job = self.blobs.begin_writing(chain, sink, compress=True)
            finally:
                os.close(sink)
            try:
                yield from iter(lambda: pipe.read(_PIECE), b"")
            except GeneratorExit:
                pipe.close()
                with contextlib.suppress(Error):
                    job.result()
                raise
            self.blobs.check_written(chain, job.result())

    def _push_config(self, data, digest):
        if not self.client.has_blob(self.path, digest, self.scopes):
            self.client.retrying(lambda: self.client.upload(self.client.begin_upload(self.path, self.scopes), self.scopes,
                                                            [data]))


def layer_type(media_type, oci):
    """A layer's media type in the family of OCI or of docker, of the same compression."""
    compression = _LAYER_TYPE.fullmatch(media_type).group(1)
    base, mark = ("oci.image.layer.v1.tar", "+") if oci else ("docker.image.rootfs.diff.tar", ".")
    return "application/vnd." + base + (mark + compression if compression else "")


def make_manifest(image_id, size, layers, oci=False):
    """The Manifest of an image whose config has `size` bytes, as docker writes it: the same bytes for the same layers. docker's
    own format has no zstd: such an image gets one of OCI."""
    oci = oci or any(layer["mediaType"].endswith("zstd") for layer in layers)
    media_type, config_type = (OCI_MANIFEST, OCI_CONFIG_TYPE) if oci else (MANIFEST_V2, CONFIG_MEDIA_TYPE)
    document = {"schemaVersion": 2, "mediaType": media_type,
                "config": {"mediaType": config_type, "size": size, "digest": "sha256:" + image_id},
                "layers": [{"mediaType": layer_type(layer["mediaType"], oci), "size": layer["size"], "digest": layer["digest"]}
                           for layer in layers]}
    return Manifest(json.dumps(document, indent=3).encode(), media_type)


# -- the registry -------------------------------------------------------------------------------------------------------------

# how a registry's answer reads to whoever asked for an image: docker's sentences
_PULL_ERRORS = {"DENIED": "pull access denied for %(repository)s, repository does not exist or may require 'docker login': "
                          "%(error)s",
                "MANIFEST_UNKNOWN": "manifest for %(name)s not found: %(error)s",
                "NAME_UNKNOWN": "repository %(repository)s not found: %(error)s",
                "NOT_FOUND": "manifest for %(name)s not found: %(error)s"}
_HUB_NAMES = ("", "docker.io", "index.docker.io", "registry-1.docker.io")


def check_new_name(reference):
    """A name that an image from outside may get: said before anything is fetched."""
    if reference.digest is None and reference.tagged == HOST_IMAGE + ":latest":
        raise BadRequest("the name 'host' is built in: it stands for the root file system of this machine")
    return reference


class Registry:
    """Images from and to registries. `auth` is always the object of an X-Registry-Auth header ({username, password} or
    {identitytoken} or {registrytoken}, or {}); `progress` is called with the objects of docker's JSON stream, from several
    threads but one at a time."""

    def __init__(self, root, images, layers, spawner, options=None):
        self.images, self.options = images, options or RegistryOptions()
        self.blobs = Blobs(root, images, layers, spawner)

    def _client(self, domain, auth):
        return RegistryClient(self.options.hub if domain == "docker.io" else domain, self.options, auth)

    def pull(self, text, platform="", auth=None, progress=None, all_tags=False):
        """Pull an image by tag or digest, or all tags of a repository. Returns the Image (of the last tag). NotFound in docker's
        words where there is none. Mirrors of Docker Hub are tried first, without credentials."""
        reference, report = check_new_name(Reference.parse(text)), Reporter(progress)
        if all_tags and (reference.tag or reference.digest):
            raise BadRequest("tag can't be used with --all-tags/-a")
        for mirror in self.options.mirrors if reference.domain == "docker.io" else ():
            try:
                with RegistryClient(mirror, self.options) as client:
                    return self._pull_from(client, reference, platform, report, all_tags)
            except Error as error:
                warn("%s from the mirror %s: %s" % (reference, mirror, error))
        try:
            with self._client(reference.domain, auth) as client:
                return self._pull_from(client, reference, platform, report, all_tags)
        except RegistryError as error:
            raise self._translated(error, reference)

    def _pull_from(self, client, reference, platform, report, all_tags):
        client.connect()
        wanted = [reference]
        if all_tags:
            tags = client.names("/v2/%s/tags/list" % reference.path, "tags", ["repository:%s:pull" % reference.path])
            wanted = [Reference.parse("%s:%s" % (reference.repository, tag)) for tag in tags]
            if not wanted:
                raise NotFound("repository %s has no tags" % reference.repository)
        newer = False
        for one in wanted:
            image, digest, changed = Puller(self.blobs, client, one, platform, report).run()
            newer = newer or changed
            report.line("Digest: " + digest)
        shown = reference.repository if all_tags else str(reference) if reference.digest else reference.tagged
        report.line("Status: %s for %s" % ("Downloaded newer image" if newer else "Image is up to date", shown))
        self.images.emit("pull", image.id, name=shown)
        return image

    @staticmethod
    def _translated(error, reference):
        sentence = _PULL_ERRORS.get(error.code) if error.answered else None
        if not sentence:
            error.status = 500
            return error
        name = str(reference) if reference.digest else reference.tagged
        return NotFound(sentence % {"repository": reference.repository, "name": name, "error": error})

    def push(self, name, tag=None, auth=None, progress=None, all_tags=False):
        """Push name:tag, or with all_tags (or without a tag, as the API has it) every tag of the repository."""
        reference, report = Reference.parse(name), Reporter(progress)
        if reference.digest:
            raise BadRequest("cannot push a digest reference")
        tag = tag or reference.tag
        report.line("The push refers to repository [%s/%s]" % (reference.domain, reference.path))
        tags = self._tags_to_push(reference, None if all_tags else tag)
        with self._client(reference.domain, auth) as client:
            client.connect()
            for one, image in tags:
                Pusher(self.blobs, client, Reference(reference.domain, reference.path, one), report).run(image)
                self.images.emit("push", image.id, name="%s:%s" % (reference.repository, one))

    def _tags_to_push(self, reference, tag):
        with self.images.lock:
            tags = {name.rpartition(":")[2]: self.images.images[image_id] for name, image_id in sorted(self.images.tags.items())
                    if name.rpartition(":")[0] == reference.repository and image_id in self.images.images}
        if not tags and reference.repository == HOST_IMAGE:
            raise BadRequest("the image 'host' is this machine itself: commit a container of it, and push that")
        if not tags:
            raise NotFound("An image does not exist locally with the tag: %s" % reference.repository)
        if tag and tag not in tags:
            raise NotFound("tag does not exist: %s:%s" % (reference.repository, tag))
        return [(tag, tags[tag])] if tag else list(tags.items())

    def login(self, auth):
        """Check credentials {username, password, serveraddress, ...}: {Status, IdentityToken}; Unauthorized where they are
        wrong."""
        auth = clean_auth(auth)
        address = auth.get("serveraddress", "").partition("://")[2] or auth.get("serveraddress", "")
        domain = address.partition("/")[0]
        with self._client("docker.io" if domain in _HUB_NAMES else domain, auth) as client:
            client.connect()
            token = ""
            if "bearer" in client.challenges and not auth.get("registrytoken"):
                answer = client.fetch_token([], offline=True)
                token = answer.get("refresh_token") if isinstance(answer.get("refresh_token"), str) else ""
            try:
                client.read(client.retrying(lambda: client.request("GET", "/v2/")))
            except RegistryError as error:
                if error.answered != 401:
                    raise
                raise Unauthorized("login attempt to %s/v2/ failed with status: 401 Unauthorized" % client.base)
        return {"Status": "Login Succeeded", "IdentityToken": token}

    def search(self, term, limit=25, auth=None):
        """Search Docker Hub, or for HOST/TERM the catalog of that registry: a list of {name, description, star_count,
        is_official, is_automated}."""
        from urllib.parse import urlencode
        limit = limit or 25
        if not 1 <= limit <= 100:
            raise BadRequest("limit %d is outside the range of [1, 100]" % limit)
        host, _, rest = term.partition("/")
        if rest and ("." in host or ":" in host or host == "localhost") and host not in _HUB_NAMES:
            return self._search_catalog(host, rest, limit, auth)
        with RegistryClient(self.options.search, self.options) as client:
            client.base = client.schemes[0] + "://" + client.host
            url = client.base + "/v1/search?" + urlencode({"q": rest if host in _HUB_NAMES else term, "n": limit})
            data = client.read(client.retrying(lambda: client.request("GET", url)), MOST_MANIFEST)
        found = parse_document(data, "the answer of the search").get("results") or []
        return [dict({"is_automated": False}, **entry) for entry in found if isinstance(entry, dict)][:limit]

    def _search_catalog(self, host, term, limit, auth):
        with self._client(host, auth) as client:
            names = client.connect().names("/v2/_catalog?n=1000", "repositories", ["registry:catalog:*"])
        return [{"name": "%s/%s" % (host, name), "description": "", "star_count": 0, "is_official": False, "is_automated": False}
                for name in names if term in name][:limit]

    def distribution(self, name, auth=None):
        """GET /distribution/NAME/json: what a registry has under a name: {Descriptor, Platforms}."""
        reference = Reference.parse(name)
        scopes = ["repository:%s:pull" % reference.path]
        with self._client(reference.domain, auth) as client:
            manifest = client.connect().manifest(reference.path, reference.digest or reference.tag or "latest", scopes)
            if manifest.is_index:
                platforms = [entry["platform"] for entry in manifest.manifests if isinstance(entry.get("platform"), dict)]
            else:
                config = parse_document(client.document(reference.path, manifest.config, scopes), "the image config")
                keys = ("architecture", "os", "os.version", "os.features", "variant")
                platforms = [{key: config[key] for key in keys if config.get(key)}]
        return {"Descriptor": {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.data)},
                "Platforms": platforms}


# -- save ---------------------------------------------------------------------------------------------------------------------
# One archive with two tables of contents: manifest.json and repositories for docker (1.10 and later) and podman, index.json and
# oci-layout for OCI tools. Layers stand in it as they were pulled; those made here as plain tar, whose digest is the diff id. So
# the same images always give the same bytes.

def images_to_save(images, names):
    """[(Image, [Reference with its tag, ...])] in the order of the names; a repository without a tag stands for all of its tags,
    an id brings no names."""
    found = {}
    for name in names:
        image = images.find(name)
        if image.is_host:
            raise BadRequest("the image 'host' is this machine itself: commit a container of it, and save that")
        is_id = image.id.startswith(name[7:] if name.startswith("sha256:") else name)
        reference = None if is_id else Reference.parse(name)
        tags = [] if is_id or reference.digest else [reference.tagged]
        if reference and not reference.tag and not reference.digest:
            tags = [tag for tag in sorted(images.tags) if tag.rpartition(":")[0] == reference.repository]
        for tag in tags or [None]:
            one = images.find(tag) if tag else image
            wanted = found.setdefault(one.id, (one, []))[1]
            if tag and tag not in map(str, wanted):
                wanted.append(Reference.parse(tag))
    return list(found.values())


def save_images(blobs, names, write, since=None):
    """Write an archive of images to write(bytes). since: the name of an image whose layers are left out; the archive then says
    which image it needs, and is for load alone: OCI tools would miss the layers."""
    images = images_to_save(blobs.images, names)
    base = blobs.images.find(since) if since else None
    left_out = set(blobs.layers.chain(base.chain)) if base else set()
    Saver(blobs, TarWriter(write)).run(images, left_out, {"Id": "sha256:" + base.id, "Name": since} if base else None)
    for image, _ in images:
        blobs.images.emit("save", image.id, name="sha256:" + image.id)


class Saver:
    def __init__(self, blobs, writer):
        self.blobs, self.layers, self.writer = blobs, blobs.layers, writer
        self.written = {}  # digest of what is in the archive: size

    def run(self, images, left_out, base):
        for folder in ("blobs/", "blobs/sha256/"):
            self.writer.add(Entry(folder, TAR_DIRECTORY, 0o755))
        contents, repositories, index = [], {}, []
        for image, names in images:
            # 1. The layers, then the config: all under their digests, each once.
            layers = [self._layer(chain, chain in left_out) for chain in self.layers.chain(image.chain)]
            config = read_file(self.blobs.path(image.id))
            self._blob("sha256:" + image.id, config)
            # 2. docker's tables.
            entry = {"Config": "blobs/sha256/" + image.id, "RepoTags": list(map(str, names)) or None,
                     "Layers": ["blobs/sha256/" + layer["digest"][7:] for layer in layers]}
            entry.update({"Since": base} if base else {}, **self._original(image, layers))
            contents.append(entry)
            for name in names:
                repositories.setdefault(name.repository, {})[name.tag] = image.id
            # 3. OCI's, which name the layers by a manifest. One that leaves layers out would be a lie.
            if not base:
                manifest = make_manifest(image.id, len(config), layers, oci=True)
                self._blob(manifest.digest, manifest.data)
                index += self._describe(image, names, manifest)
        if not base:
            self._file("index.json", {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": index})
        self._file("manifest.json", contents)
        if not base:
            self._file("oci-layout", {"imageLayoutVersion": "1.0.0"})
        self._file("repositories", repositories)
        self.writer.close()

    def _file(self, name, document):
        data = json.dumps(document, separators=(",", ":")).encode()
        self.writer.add(Entry(name, size=len(data)), data)

    def _blob(self, digest, data):
        if digest not in self.written:
            self.written[digest] = len(data)
            self.writer.add(Entry("blobs/sha256/" + digest[7:], size=len(data)), data)

    def _layer(self, chain, left_out):
        """Write one layer; its descriptor."""
        diff_id = self.layers.meta[chain]["diff_id"]
        kept = self.blobs.kept(diff_id)
        if kept:
            descriptor = {key: kept[key] for key in ("mediaType", "digest", "size")}
        else:
            descriptor = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + diff_id, "size": None}
        digest = descriptor["digest"]
        if digest not in self.written and not left_out:
            with self._opened(chain, kept) as fd:
                self.written[digest] = os.fstat(fd).st_size
                self.writer.add(Entry("blobs/sha256/" + digest[7:], size=self.written[digest]), fd)
        return dict(descriptor, size=self.written.get(digest))

    @contextlib.contextmanager
    def _opened(self, chain, kept):
        """A descriptor of a layer's archive: the blob, or a file without a name that a child fills: a tar header tells the size
        before the content."""
        if kept:
            fd = os.open(self.blobs.path(kept["digest"]), os.O_RDONLY | os.O_CLOEXEC)
        else:
            fd = os.open(self.blobs.tmp, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            if not kept:
                self.blobs.check_written(chain, self.blobs.begin_writing(chain, fd, compress=False).result())
                os.lseek(fd, 0, os.SEEK_SET)
            yield fd
        finally:
            os.close(fd)

    def _original(self, image, layers):
        """A key of our own in docker's table, for the manifest that the image came with, where it names just these layers: so
        that also its digest stays. (OCI's table may name none of docker's type.)"""
        manifest = self.blobs.manifest_of(image.id)
        if not manifest or [layer["digest"] for layer in manifest.layers] != [layer["digest"] for layer in layers]:
            return {}
        self._blob(manifest.digest, manifest.data)
        return {"Manifest": {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.data)}}

    @staticmethod
    def _describe(image, names, manifest):
        """The entries of index.json: one a name, as containerd and skopeo look for them."""
        platform = {"architecture": image.config.get("architecture") or ARCHITECTURE, "os": image.config.get("os") or "linux"}
        entry = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.data), "platform": platform}
        return [dict(entry, annotations={"io.containerd.image.name": "%s/%s:%s" % (name.domain, name.path, name.tag),
                                         "org.opencontainers.image.ref.name": name.tag}) for name in names] or [entry]


# -- load ---------------------------------------------------------------------------------------------------------------------

_MOST_FILES = 100000  # members of an archive of images
_HEX_NAME = re.compile(r"(?:sha256:)?([0-9A-Fa-f]{32,})(?:\.json)?")


class ImageArchive:
    """The members of an archive of images, spooled to files of our own names under tmp/: those in the archive are only keys."""

    def __init__(self, stream, folder):
        self.folder, self.files, self.links = folder, {}, {}
        space = os.statvfs(folder)
        free = space.f_bavail * space.f_frsize
        for count, entry in enumerate(TarReader(open_compressed(stream))):
            name = "/".join(clean_name(entry.name))
            free -= entry.size
            if count > _MOST_FILES:
                raise BadRequest("the archive has more than %d files: it is no archive of images" % _MOST_FILES)
            if free < 0:
                raise Error("No space left on device: the archive needs more than there is in %s" % folder, 500)
            self.files.pop(name, None), self.links.pop(name, None)
            if entry.type == TAR_FILE:
                self.files[name] = self._spool(entry, "%d" % count)
            elif entry.type == TAR_SYMLINK:
                self.links[name] = self._joined(os.path.dirname(name), entry.linkname)
            elif entry.type == TAR_LINK:
                self.links[name] = "/".join(clean_name(entry.linkname))

    def _spool(self, entry, name):
        path = os.path.join(self.folder, name)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            entry.copy_to(fd)
        finally:
            os.close(fd)
        return path

    @staticmethod
    def _joined(folder, target):
        return "/".join(clean_name(target if target.startswith("/") or not folder else folder + "/" + target))

    def find(self, name):
        """The spooled file of a member, links followed; None where there is none. A name that leads out is a BadRequest."""
        if not isinstance(name, str) or len(name) > MOST_NAME:
            raise BadRequest("the archive names a file in a wrong way")
        name = "/".join(clean_name(name))
        for _ in range(40):
            if name in self.files or name not in self.links:
                return self.files.get(name)
            name = self.links[name]
        raise BadRequest("the archive's links lead in a circle: %s" % printable(name))

    def read(self, name, most=MOST_MANIFEST):
        path = self.find(name)
        if path is None:
            raise BadRequest("the archive names %s, which it does not have" % printable(name))
        if os.path.getsize(path) > most:
            raise BadRequest("%s in the archive has more than %s" % (printable(name), format_size(most)))
        return read_file(path)

    def blob(self, descriptor, most=MOST_CONFIG):
        data = self.read("blobs/sha256/" + descriptor["digest"][7:], most)
        if sha256_hex(data) != descriptor["digest"][7:]:
            raise BadRequest("the archive's blob %s has another content than its name says" % descriptor["digest"])
        return data


def load_images(blobs, stream, progress=None, quiet=False):
    """Load the images of an archive, compressed or not: of docker save since 1.10, podman and skopeo (docker-archive,
    oci-archive), or ours. `stream` needs read(size). Returns the Images."""
    report = Reporter(progress)
    folder = os.path.join(blobs.tmp, "load-" + new_id()[:16])
    os.mkdir(folder, 0o700)
    try:
        loader = Loader(blobs, ImageArchive(stream, folder), report, quiet)
        return [loader.load(**wanted) for wanted in loader.contents()]
    finally:
        remove_tree(folder)


class Loader:
    def __init__(self, blobs, archive, report, quiet):
        self.blobs, self.images, self.layers = blobs, blobs.images, blobs.layers
        self.archive, self.report, self.quiet = archive, report, quiet

    # what is in it

    def contents(self):
        """[arguments of load()] from docker's table of contents, or OCI's."""
        if self.archive.find("manifest.json"):
            return [self._docker_entry(entry) for entry in self._docker_table()]
        if self.archive.find("index.json"):
            return [entry for descriptor in self._index("index.json").manifests for entry in self._oci_entry(descriptor)]
        if self.archive.find("repositories"):
            raise BadRequest("the archive was written by docker before 1.10, whose format is no longer supported: load it in "
                             "docker 1.10 to 23, and save it there again")
        raise BadRequest("this is no archive of images: neither manifest.json nor index.json is in it; for the files of a root "
                         "use import")

    def _docker_table(self):
        data = self.archive.read("manifest.json")
        entries = parse_document(b'{"":' + data + b"}", "manifest.json").get("")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise BadRequest("manifest.json is not valid: a list of images is expected")
        return entries

    def _docker_entry(self, entry):
        _check_forms(entry, {"Config": str, "RepoTags": [str], "Layers": [str], "Since": dict, "Manifest": dict}, "manifest.json")
        name, since = entry.get("Config") or "", entry.get("Since") or {}
        _check_forms(since, {"Id": str, "Name": str}, "manifest.json")
        config = self.archive.read(name, MOST_CONFIG)
        said = _HEX_NAME.fullmatch(name.rpartition("/")[2])
        if said and said.group(1) != sha256_hex(config):
            raise BadRequest("the image config %s in the archive has another content than its name says" % printable(name))
        return {"config": config, "files": entry.get("Layers") or [], "names": entry.get("RepoTags") or [], "since": since,
                "manifest": self._manifest(entry.get("Manifest"), "sha256:" + sha256_hex(config))}

    def _index(self, name):
        return Manifest(self.archive.read(name), OCI_INDEX, None, "index.json")

    def _manifest(self, named, config_digest):
        """The manifest of an image in docker's table: the one that pydock names there, or one of OCI's table; None where there is
        none."""
        found = [check_descriptor(named, "manifest.json")] if named else []
        found += self._index("index.json").manifests if not found and self.archive.find("index.json") else []
        for descriptor in found:
            if descriptor.get("mediaType") in MANIFEST_TYPES and self.archive.find("blobs/sha256/" + descriptor["digest"][7:]):
                manifest = Manifest(self.archive.blob(descriptor), descriptor["mediaType"], descriptor["digest"])
                if manifest.config["digest"] == config_digest:
                    return manifest
        return None

    def _oci_entry(self, descriptor):
        """What an entry of index.json stands for: an image, or one of several platforms."""
        annotations = descriptor.get("annotations") if isinstance(descriptor.get("annotations"), dict) else {}
        if "vnd.docker.reference.type" in annotations:  # a signature or attestation of another entry
            return
        name = annotations.get("io.containerd.image.name") or annotations.get("org.opencontainers.image.ref.name")
        manifest = Manifest(self.archive.blob(descriptor, MOST_MANIFEST), descriptor.get("mediaType", ""), descriptor["digest"])
        if manifest.is_index:
            here = [entry for entry in manifest.manifests if self.archive.find("blobs/sha256/" + entry["digest"][7:])]
            chosen = choose_platform(here, parse_platform("")) or (here[0] if len(here) == 1 else None)
            if chosen is None:
                raise NotFound("no matching manifest for %s in the archive's index" % format_platform(parse_platform("")))
            manifest = Manifest(self.archive.blob(chosen, MOST_MANIFEST), chosen.get("mediaType", ""), chosen["digest"])
            if manifest.is_index:
                raise BadRequest("the index %s names another index" % descriptor["digest"])
        # `latest` alone names no repository
        names = [name] if isinstance(name, str) and re.search("[:/]", name) else []
        files = ["blobs/sha256/" + layer["digest"][7:] for layer in manifest.layers]
        yield {"config": self.archive.blob(manifest.config), "files": files, "names": names, "since": {}, "manifest": manifest}

    # bringing it in

    def load(self, config, files, names, since, manifest):
        """One image: its layers in order, then the image, then its names."""
        document, image_id = check_image_config(config), sha256_hex(config)
        diff_ids = [digest[7:] for digest in document["rootfs"].get("diff_ids") or []]
        references = [check_new_name(Reference.parse(name)) for name in names]
        if len(files) != len(diff_ids):
            raise BadRequest("invalid manifest, layers length mismatch: expected %d, got %d" % (len(diff_ids), len(files)))
        with self.blobs.alone("image " + image_id), self.blobs.expecting(image_id, diff_ids):
            chain = None
            for diff_id, name in zip(diff_ids, files):
                chain = self._layer(chain, diff_id, name, since)
            if manifest and self._is_kept(manifest, diff_ids):
                self.blobs.keep_manifest(image_id, manifest)
            image = self.images.add(config, local=False)
        for reference in references:
            self._tag(image, reference)
        if not references:
            self.report.send({"stream": "Loaded image ID: sha256:%s\n" % image.id})
        self.images.emit("load", image.id, name="sha256:" + image.id)
        return image

    def _is_kept(self, manifest, diff_ids):
        """Whether a push can send just what the manifest names, and it is compressed: docker's own archives have plain layers."""
        def is_kept(layer, diff_id):
            compressed = _LAYER_TYPE.fullmatch(layer["mediaType"]).group(1)
            return compressed and layer["digest"] in [blob["digest"] for blob in self.blobs.known(diff_id)]

        return len(manifest.layers) == len(diff_ids) and all(map(is_kept, manifest.layers, diff_ids))

    def _tag(self, image, reference):
        before = self.images.tags.get(reference.tagged)
        if before and before != image.id:
            self.report.send({"stream": "The image %s already exists, renaming the old one with ID sha256:%s to empty string\n"
                              % (reference.tagged, before)})
        self.images.tag(image, Reference(reference.domain, reference.path, reference.tag))
        self.report.send({"stream": "Loaded image: %s\n" % reference.tagged})

    def _layer(self, parent, diff_id, name, since):
        chain = chain_id(parent, diff_id)
        with self.blobs.alone("chain " + chain):
            if chain in self.layers.meta:
                return chain
            path = self.archive.find(name)
            if path is None:
                raise self._missing(diff_id, since)
            return self._unpack(parent, diff_id, name, path)

    def _missing(self, diff_id, since):
        if not since:
            return BadRequest("the archive is not whole: layer sha256:%s is not in it" % diff_id)
        name, image_id = printable(since.get("Name") or "")[:300], printable(since.get("Id") or "")[:71]
        return NotFound("the archive was saved with --since %s and leaves out its layers: load or pull %s (%s) first"
                        % (name, name, image_id))

    def _unpack(self, parent, diff_id, name, path):
        total = os.path.getsize(path)

        def feed(sink):
            sent = 0
            with open(path, "rb", buffering=0) as file:
                while sent < total:
                    sent += os.sendfile(sink, file.fileno(), sent, min(total - sent, 1 << 20))
                    if not self.quiet:
                        self.report.amount(diff_id[:12], "Loading layer", sent, total)

        def keep(digest):
            said = _HEX_NAME.fullmatch(name.rpartition("/")[2])
            if said and name.startswith("blobs/") and said.group(1) != digest[7:]:
                raise BadRequest("the archive's blob %s has another content than its name says" % printable(name))
            with open(path, "rb") as file:
                head = file.read(4)
            compression = "+gzip" if head[:2] == b"\x1f\x8b" else "+zstd" if head == b"\x28\xb5\x2f\xfd" else ""
            if compression or digest[7:] == diff_id:  # not bzip2 or xz, for which there is no media type
                self.blobs.remember(diff_id, {"digest": digest, "size": total,
                                              "mediaType": "application/vnd.oci.image.layer.v1.tar" + compression})
                self.blobs.store(path, digest)

        return self.blobs.add_layer(parent, diff_id, feed, keep, hash_input=True)


########################################################################
# 8. Cgroups
########################################################################
# Limits, freezing, counting and the device allow list of a container, by control groups: one interface over version 1 (a folder
# in each of several hierarchies), version 2 (one folder) and hybrids of both, in which version 1 has the controllers. `Cgroups`
# is the host's side: what there is and where; the daemon has one. `Cgroup` is one container's: folders under a parent "pydock".
# A limit is a row in a table. What the host cannot do is left out with a warning in docker's words, and is never an error.
# A group is made and joined in the path of every start, so version 1 uses only the hierarchies of _ALWAYS and those that a limit
# asks for (memory, cpuacct, pids and blkio count, freezer pauses, devices guards).

_ALWAYS = ("memory", "cpuacct", "pids", "freezer", "devices", "blkio")
_CONTROLLERS_V2 = ("cpu", "cpuset", "io", "memory", "pids")
_MOST_CPUS = 8192  # CVE-2018-20699: a range is checked against this before it is spelled out

# What a container may do with device nodes, in the words of devices.allow: make any, use the harmless ones. Docker's list.
DEFAULT_DEVICE_RULES = ("c *:* m", "b *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm", "c 5:0 rwm",
                        "c 5:1 rwm", "c 5:2 rwm", "c 136:* rwm")


def parse_cpu_set(text, what="cpus"):
    """The numbers in `0-2,7` as a set. `what` is cpus or mems, for the message."""
    numbers = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,9})(?:-(\d{1,9}))?\s*", part)
        first, last = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (1, 0)
        if not first <= last < _MOST_CPUS:
            raise BadRequest("Invalid value %s for cpuset %s" % (text, what))
        numbers.update(range(first, last + 1))
    return numbers


def parse_device_rule(text):
    """(type, major, minor, access) of a rule as devices.allow takes it: `c 10:* rwm`; * is None."""
    match = re.fullmatch(r"([abc]) (\d{1,7}|\*):(\d{1,7}|\*) ([rwm]{1,3})", text)
    if not match:
        raise BadRequest("invalid device cgroup rule format: '%s': it reads like 'c 10:200 rwm'" % text)
    kind, major, minor, access = match.groups()
    return kind, None if major == "*" else int(major), None if minor == "*" else int(minor), access


def device_rule(path, access="rwm"):
    """The rule for a device node of the host."""
    status = os.stat(path)
    kinds = {stat.S_IFCHR: "c", stat.S_IFBLK: "b"}
    if stat.S_IFMT(status.st_mode) not in kinds:
        raise BadRequest("%s is not a device node" % path)
    if not re.fullmatch("[rwm]{1,3}", access):
        raise BadRequest("invalid device mode: %s" % access)
    return "%s %d:%d %s" % (kinds[stat.S_IFMT(status.st_mode)], os.major(status.st_rdev), os.minor(status.st_rdev), access)


# -- the limits ---------------------------------------------------------------------------------------------------------------

def _plain(value, limits):
    return str(value)


def _or_max(value, limits):
    return str(value) if value > 0 else "max"


def _flag(value, limits):
    return "1" if value else "0"


def _swap(value, limits):
    """Version 2 counts swap apart from memory, docker both together."""
    return "max" if value < 0 else str(max(0, value - (limits.get("Memory") or 0)))


def _cpu_weight(shares, limits):
    """Shares from 2 to 262144 to a weight from 1 to 10000, as the OCI runtime specification converts them."""
    return str(1 + (min(max(shares, 2), 262144) - 2) * 9999 // 262142)


def _cpu_max(value, limits):
    quota = limits.get("CpuQuota") or 0
    return "%s %d" % (quota if quota > 0 else "max", limits.get("CpuPeriod") or 100000)


def _io_weight(value, limits):
    return str(1 + (value - 10) * 9999 // 990)


def _default_weight(value, limits):
    return "default %s" % _io_weight(value, limits)


def _block_device(path):
    try:
        status = os.stat(path)
    except OSError as error:
        raise BadRequest("block device %s: %s" % (path, error.strerror))
    if not stat.S_ISBLK(status.st_mode):
        raise BadRequest("%s is not a block device" % path)
    return "%d:%d" % (os.major(status.st_rdev), os.minor(status.st_rdev))


def _per_device(pattern, key="Rate", convert=lambda value, limits: value):
    """A converter for docker's lists of {Path, Rate} or {Path, Weight}: one line a device."""
    return lambda entries, limits: [_block_device(e["Path"]) + pattern % convert(e[key], limits) for e in entries]


# HostConfig field: (files of version 1, converter, files of version 2, converter, warning where the host has none of the files).
# The first file that exists is used; its name begins with the controller's. No converter: version 2 has nothing like it.
_NO = "Your kernel does not support %s or the cgroup is not mounted. %s discarded."
_NO_SWAP = "Your kernel does not support swap limit capabilities or the cgroup is not mounted. Memory limited without swap."
_RATES = (("ReadBps", "read_bps", "rbps", "BPS Block I/O read limit", "Block I/O BPS read limit"),
          ("WriteBps", "write_bps", "wbps", "BPS Block I/O write limit", "Block I/O BPS write limit"),
          ("ReadIOps", "read_iops", "riops", "IOPS Block read limit", "Block I/O IOPS read limit"),
          ("WriteIOps", "write_iops", "wiops", "IOPS Block write limit", "Block I/O IOPS write limit"))
LIMITS = {
    "Memory": (("memory.limit_in_bytes",), _plain, ("memory.max",), _or_max,
               _NO % ("memory limit capabilities", "Limitation")),
    "MemorySwap": (("memory.memsw.limit_in_bytes",), _plain, ("memory.swap.max",), _swap, _NO_SWAP),
    "MemoryReservation": (("memory.soft_limit_in_bytes",), _plain, ("memory.low",), _plain,
                          _NO % ("memory soft limit capabilities", "Limitation")),
    "MemorySwappiness": (("memory.swappiness",), _plain, (), None, _NO % ("memory swappiness capabilities", "Memory swappiness")),
    "KernelMemoryTCP": (("memory.kmem.tcp.limit_in_bytes",), _plain, (), None,
                        _NO % ("kernel memory TCP limit capabilities", "Limitation")),
    "OomKillDisable": (("memory.oom_control",), _flag, (), None,
                       "Your kernel does not support OomKillDisable. OomKillDisable discarded."),
    "CpuShares": (("cpu.shares",), _plain, ("cpu.weight",), _cpu_weight, _NO % ("CPU shares", "Shares")),
    "CpuPeriod": (("cpu.cfs_period_us",), _plain, ("cpu.max",), _cpu_max, _NO % ("CPU CFS scheduler", "CPU period/quota")),
    "CpuQuota": (("cpu.cfs_quota_us",), _plain, ("cpu.max",), _cpu_max, _NO % ("CPU CFS scheduler", "CPU period/quota")),
    "CpuRealtimePeriod": (("cpu.rt_period_us",), _plain, (), None, _NO % ("CPU real-time scheduler", "CPU real-time period")),
    "CpuRealtimeRuntime": (("cpu.rt_runtime_us",), _plain, (), None, _NO % ("CPU real-time scheduler", "CPU real-time runtime")),
    "CpusetCpus": (("cpuset.cpus",), _plain, ("cpuset.cpus",), _plain, _NO % ("cpuset", "Cpuset")),
    "CpusetMems": (("cpuset.mems",), _plain, ("cpuset.mems",), _plain, _NO % ("cpuset", "Cpuset")),
    "PidsLimit": (("pids.max",), _or_max, ("pids.max",), _or_max, _NO % ("PIDs limit capabilities", "PIDs limit")),
    "BlkioWeight": (("blkio.bfq.weight", "blkio.weight"), _plain, ("io.bfq.weight", "io.weight"), _default_weight,
                    _NO % ("Block I/O weight", "Weight")),
    "BlkioWeightDevice": (("blkio.bfq.weight_device", "blkio.weight_device"), _per_device(" %d", "Weight"),
                          ("io.bfq.weight", "io.weight"), _per_device(" %s", "Weight", _io_weight),
                          _NO % ("Block I/O weight_device", "Weight-device")),
}
LIMITS.update(("BlkioDevice" + field, (("blkio.throttle.%s_device" % v1,), _per_device(" %d"),
                                       ("io.max",), _per_device(" " + v2 + "=%d"), _NO % (what, lost)))
              for field, v1, v2, what, lost in _RATES)


def _check_memory(limits):
    memory, swap, reservation = (limits.get(name) or 0 for name in ("Memory", "MemorySwap", "MemoryReservation"))
    swappiness = limits.get("MemorySwappiness")
    for wrong, sentence in (
            (0 < memory < 6 << 20, "Minimum memory limit allowed is 6MB"),
            (swap > 0 and not memory, "You should always set the Memory limit when using Memoryswap limit, see usage"),
            (0 < swap < memory, "Minimum memoryswap limit should be larger than memory limit, see usage"),
            (swappiness is not None and not -1 <= swappiness <= 100,
             "Invalid value: %s, valid memory swappiness range is 0-100" % swappiness),
            (0 < reservation < 6 << 20, "Minimum memory reservation allowed is 6MB"),
            (0 < memory < reservation, "Minimum memory limit can not be less than memory reservation limit, see usage")):
        if wrong:
            raise BadRequest(sentence)


def _check_cpu(limits):
    nano, period, quota, weight = (limits.get(name) or 0 for name in ("NanoCpus", "CpuPeriod", "CpuQuota", "BlkioWeight"))
    number = os.cpu_count() or 1
    for wrong, sentence in (
            (nano and period, "Conflicting options: Nano CPUs and CPU Period cannot both be set"),
            (nano and quota, "Conflicting options: Nano CPUs and CPU Quota cannot both be set"),
            (nano < 0 or nano > number * 10 ** 9 or 0 < nano < 10 ** 7,
             "Range of CPUs is from 0.01 to %d.00, as there are only %d CPUs available" % (number, number)),
            (period and not 1000 <= period <= 1000000,
             "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"),
            (0 < quota < 1000, "CPU cfs quota can not be less than 1ms (i.e. 1000)"),
            (weight and not 10 <= weight <= 1000, "Range of blkio weight is from 10 to 1000")):
        if wrong:
            raise BadRequest(sentence)


# -- the host -----------------------------------------------------------------------------------------------------------------

def _write(folder, name, text):
    """Write to a file of a control group in one system call, as the kernel wants it."""
    fd = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def _read(folder, name):
    """A control group's file as text; "" where there is none or it cannot be read now."""
    try:
        return read_file(os.path.join(folder, name)).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _read_table(folder, name):
    """{first word: number} of a file with lines such as `oom_kill 3`."""
    pairs = (line.split() for line in _read(folder, name).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read_number(folder, name):
    text = _read(folder, name)
    return int(text) if text.isdigit() else 0


def _unescape(path):
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), path)


class Cgroups:
    """The control groups of this host, and the parent folder of ours in them.

    version: 2 where the unified hierarchy has the controllers, 1 where hierarchies of version 1 have them, 0 where there is none.
    hierarchies: {controller: mount point} that can be used; version 2 has the one key "unified".
    controllers: the controllers that work. warnings: sentences for the daemon's log and `info`.
    parent: folder of ours below each mount point; each container has a folder in it."""

    def __init__(self, version, hierarchies, parent="pydock"):
        if not re.fullmatch(r"[\w.:@-]+(/[\w.:@-]+)*", parent) or ".." in parent.split("/"):
            raise BadRequest("cgroup-parent \"%s\" is no path below the root of the control groups" % parent)
        self.version, self.hierarchies, self.parent, self.warnings = version, {}, parent, []
        self.filters = {}  # {rules: descriptor of the program}: a program is loaded once for all that have the same rules
        for controller, mount_point in hierarchies.items():
            try:
                self._prepare(controller, mount_point)
                self.hierarchies[controller] = mount_point
            except OSError as error:
                self.warnings.append("cgroup controller %s cannot be used: %s" % (controller, os_error_text(error)))
        if version == 2:
            enabled = _read(self._base("unified"), "cgroup.subtree_control").split() if self.hierarchies else []
            self.controllers = set(enabled) | ({"freezer", "devices"} if self.hierarchies else set())
        else:
            self.controllers = set(self.hierarchies)
        if not self.hierarchies:
            self.version = 0
            self.warnings.append("no control groups can be written: limits, pause and statistics are not available")

    @classmethod
    def detect(cls, parent="", mountinfo=None):
        """Look at this process's mounts (or at the text `mountinfo`) for control groups."""
        one, two = {}, None
        for line in (mountinfo or read_file("/proc/self/mountinfo").decode("utf-8", "surrogateescape")).splitlines():
            before, _, after = line.partition(" - ")
            mount_point, fields = _unescape(before.split()[4]), after.split()
            if fields[0] == "cgroup":
                one.update((name, mount_point) for name in fields[2].split(",")
                           if name in _ALWAYS or name in ("cpu", "cpuset"))
            elif fields[0] == "cgroup2" and (two is None or mount_point == "/sys/fs/cgroup"):
                two = mount_point
        if one or not two:
            return cls(1, one, parent.strip("/") or "pydock")
        return cls(2, {"unified": two}, parent.strip("/") or "pydock")

    def _base(self, controller):
        return os.path.join(self.hierarchies[controller], self.parent)

    def _prepare(self, controller, mount_point):
        """Make our parent folder below a mount point, level by level, each ready for the next."""
        folder = mount_point
        for name in self.parent.split("/"):
            if controller == "unified":
                self._enable(folder)
            above, folder = folder, os.path.join(folder, name)
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder, 0o755)
            if controller == "cpuset":
                self._inherit_cpuset(above, folder)
            elif controller == "memory" and _read(folder, "memory.use_hierarchy") == "0":  # Linux before 5.11
                with contextlib.suppress(OSError):
                    _write(folder, "memory.use_hierarchy", "1")
        if controller == "unified":
            self._enable(folder)
        if not os.access(folder, os.W_OK):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), folder)

    def _inherit_cpuset(self, above, folder):
        """A new cpuset of version 1 is empty, and no process can enter it so."""
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not _read(folder, name):
                with contextlib.suppress(OSError):
                    _write(folder, name, _read(above, name))

    def _enable(self, folder):
        """Hand the controllers of a version 2 folder on to its children, each for itself: one that fails is no reason to lose the
        others."""
        wanted = [c for c in _CONTROLLERS_V2 if c in _read(folder, "cgroup.controllers").split()
                  and c not in _read(folder, "cgroup.subtree_control").split()]
        for controller in wanted:
            try:
                _write(folder, "cgroup.subtree_control", "+" + controller)
            except OSError as error:
                if error.errno != errno.EBUSY or not self._make_way(folder, controller):
                    self.warnings.append("cgroup controller %s cannot be used: %s" % (controller, os_error_text(error)))

    def _make_way(self, folder, controller):
        """A folder of version 2 has either processes or controllers for its children (cgroups(7), no internal processes). The one
        we find full is the root of our own cgroup namespace, in a container or a delegated unit: its processes move one down."""
        inner = os.path.join(folder, "init")
        with contextlib.suppress(FileExistsError):
            os.mkdir(inner, 0o755)
        for pid in _read(folder, "cgroup.procs").split():
            with contextlib.suppress(OSError):
                _write(inner, "cgroup.procs", pid)
        with contextlib.suppress(OSError):
            _write(folder, "cgroup.subtree_control", "+" + controller)
            return True
        return False

    def limit_file(self, field):
        """The file that holds a limit, of those that LIMITS names; None where this host has none of them."""
        for name in LIMITS[field][0 if self.version == 1 else 2] if self.version else ():
            controller = name.split(".")[0] if self.version == 1 else "unified"
            if controller in self.hierarchies and os.path.exists(os.path.join(self._base(controller), name)):
                return name
        return None

    def features(self):
        """What `info` says of limits, by docker's names."""
        has = {key: self.limit_file(field) is not None for key, field in (
            ("MemoryLimit", "Memory"), ("SwapLimit", "MemorySwap"), ("CpuCfsPeriod", "CpuPeriod"), ("CpuCfsQuota", "CpuQuota"),
            ("CPUShares", "CpuShares"), ("CPUSet", "CpusetCpus"), ("PidsLimit", "PidsLimit"),
            ("OomKillDisable", "OomKillDisable"))}
        return dict(has, CgroupDriver="cgroupfs" if self.version else "none", CgroupVersion=str(self.version or 1))

    def check(self, limits):
        """(limits that can be applied, warnings) of the limits in a HostConfig; BadRequest, in docker's words, for values that
        make no sense. Fills in what docker fills in: swap twice the memory, the quota of NanoCpus."""
        _check_memory(limits)
        _check_cpu(limits)
        self._check_cpu_sets(limits)
        limits = {name: value for name, value in limits.items() if name in LIMITS or name == "NanoCpus"}
        if limits.get("Memory") and not limits.get("MemorySwap"):
            limits["MemorySwap"] = limits["Memory"] * 2
        nano = limits.pop("NanoCpus", None)
        if nano:
            limits.update(CpuPeriod=100000, CpuQuota=nano // 10000)
        warnings = []
        for name in [name for name, value in limits.items() if not self._is_set(name, value) or self.limit_file(name) is None]:
            if self._is_set(name, limits.pop(name)) and LIMITS[name][4] not in warnings:
                warnings.append(LIMITS[name][4])
        return limits, warnings

    @staticmethod
    def _is_set(name, value):
        if name == "MemorySwappiness":  # 0 is a value; -1 means: as the host
            return value is not None and value != -1
        return bool(value)

    def _check_cpu_sets(self, limits):
        for field, what, name, online in (("CpusetCpus", "CPUs", "cpus", "/sys/devices/system/cpu/online"),
                                          ("CpusetMems", "memory nodes", "mems", "/sys/devices/system/node/online")):
            text = limits.get(field)
            if not text:
                continue
            wanted = parse_cpu_set(text, name)
            available = read_file(online, b"0").decode().strip()
            if self.version == 2:
                available = _read(self._base("unified"), "cpuset.%s.effective" % name) or available
            elif "cpuset" in self.hierarchies:
                available = _read(self._base("cpuset"), "cpuset." + name) or available
            if not wanted <= parse_cpu_set(available, name):
                raise BadRequest("Requested %s are not available - requested %s, available: %s" % (what, text, available))

    def create(self, name, limits=None, devices=DEFAULT_DEVICE_RULES):
        """(Cgroup, warnings): a new, empty group with limits as `check` takes them and the device rules (None: all devices, for a
        privileged container). OSError or Error when a limit cannot be set to its value; nothing is left then."""
        limits, warnings = self.check(limits or {})
        wanted = [c for c in self.hierarchies if c in _ALWAYS or c == "unified"] + [self.limit_file(field).split(".")[0]
                                                                                     for field in limits if self.version == 1]
        group = Cgroup(name, {})
        try:
            for controller in wanted:
                self._add_folder(group, controller)
            warnings += self._apply(group, limits)
            if devices is not None and group.folders:
                warnings += self._confine(group, tuple(devices))
        except BaseException:
            group.delete()
            raise
        return group, warnings

    def find(self, name):
        """The group of that name as it stands: also without any folder, when it is gone."""
        folders = {controller: os.path.join(self._base(controller), name) for controller in self.hierarchies}
        return Cgroup(name, {controller: path for controller, path in folders.items() if os.path.isdir(path)})

    def update(self, group, limits):
        """Change limits of a group with processes in it; returns warnings."""
        limits, warnings = self.check(limits)
        for field in limits if self.version == 1 else ():
            controller = self.limit_file(field).split(".")[0]
            if controller not in group.folders:
                self._add_folder(group, controller)
                for pid in group.pids():
                    with contextlib.suppress(ProcessLookupError):
                        _write(group.folders[controller], "cgroup.procs", str(pid))
        return warnings + self._apply(group, limits)

    def _add_folder(self, group, controller):
        path = os.path.join(self._base(controller), group.name)
        if path in group.folders.values():  # cpu,cpuacct are one hierarchy on most hosts
            group.folders[controller] = path
            return
        try:
            os.mkdir(path, 0o755)
        except FileExistsError:  # left by a crash
            Cgroup(group.name, {controller: path}).delete()
            os.mkdir(path, 0o755)
        group.folders[controller] = path
        if controller == "cpuset":
            self._inherit_cpuset(os.path.dirname(path), path)

    def _apply(self, group, limits):
        """Write the limits; returns warnings. Which of two can be changed first (memory and memory+swap, period and quota)
        depends on their old values: what the kernel refuses is tried once more after the others."""
        writes = []
        for field, value in limits.items():
            name, convert = self.limit_file(field), LIMITS[field][1 if self.version == 1 else 3]
            texts = convert(value, limits)
            folder = group.folders["unified" if self.version == 2 else name.split(".")[0]]
            writes += [(folder, name, text) for text in ([texts] if isinstance(texts, str) else texts)]
        failed, warnings = [], []
        for folder, name, text in dict.fromkeys(writes):
            try:
                _write(folder, name, text)
            except OSError:
                failed.append((folder, name, text))
        for folder, name, text in failed:
            try:
                _write(folder, name, text)
            except PermissionError:
                warnings.append("%s cannot be set on this host. Limitation discarded." % name)
            except OSError as error:
                raise Error("cannot set %s of the container to %s: %s" % (name, text, error.strerror))
        return warnings

    def _confine(self, group, rules):
        """Allow only these devices; returns warnings."""
        try:
            if "unified" in group.folders:
                if rules not in self.filters:
                    self.filters[rules] = load_device_filter(device_program(rules))
                attach_device_filter(group.folders["unified"], self.filters[rules])
            elif "devices" in group.folders:
                return self._confine_v1(group.folders["devices"], rules)
            else:
                return ["Your kernel does not support the devices cgroup: device nodes are not restricted."]
        except OSError as error:
            return ["Your kernel does not support device rules (%s): device nodes are not restricted." % error.strerror]
        return []

    def _confine_v1(self, folder, rules):
        _write(folder, "devices.deny", "a")
        warnings = []
        fd = os.open(os.path.join(folder, "devices.allow"), os.O_WRONLY | os.O_CLOEXEC)
        try:
            for rule in rules:
                try:
                    os.write(fd, rule.encode())
                except PermissionError:  # what our own group may not, no child may
                    warnings.append("the devices \"%s\" are not allowed to pydock itself and so not to the container" % rule)
        finally:
            os.close(fd)
        return warnings


# -- devices, version 2 -------------------------------------------------------------------------------------------------------

_BPF_KINDS, _BPF_ACCESS = {"b": 1, "c": 2}, {"m": 1, "r": 2, "w": 4}


def device_program(rules):
    """The BPF program that allows what one of the rules allows, as bytes. Its context is struct bpf_cgroup_dev_ctx: access_type
    (access in the upper, type in the lower 16 bits), major, minor. Registers: 2 type, 3 access, 4 major, 5 minor."""
    load, move, and_value, shift, set_value, leave = 0x61, 0xBC, 0x54, 0x74, 0xB4, 0x95
    jump_unless, jump_unless_register = 0x55, 0x5D
    program = [bpf_instruction(load, 3, 1, 0), bpf_instruction(load, 4, 1, 4), bpf_instruction(load, 5, 1, 8),
               bpf_instruction(move, 2, 3), bpf_instruction(and_value, 2, value=0xFFFF), bpf_instruction(shift, 3, value=16)]
    for rule in rules:
        kind, major, minor, access = parse_device_rule(rule)
        mask = sum(_BPF_ACCESS[letter] for letter in set(access))
        tests = [(2, _BPF_KINDS.get(kind)), (4, major), (5, minor)]
        body = [(jump_unless, register, 0, value) for register, value in tests if value is not None]
        if mask != 7:  # all that is asked for must be in the rule
            body += [(move, 1, 3, 0), (and_value, 1, 0, mask), (jump_unless_register, 1, 3, 0)]
        body += [(set_value, 0, 0, 1), (leave, 0, 0, 0)]
        for place, (code, target, source, value) in enumerate(body):
            to_next_rule = len(body) - place - 1 if code in (jump_unless, jump_unless_register) else 0
            program.append(bpf_instruction(code, target, source, to_next_rule, value))
    return b"".join(program + [bpf_instruction(set_value, 0, value=0), bpf_instruction(leave)])


# -- one container ------------------------------------------------------------------------------------------------------------

class Cgroup:
    """The control group of one container. folders: {controller: path}, {"unified": path} in version 2; both attributes are plain
    data, so that a monitor can be given them and make its own Cgroup(name, folders)."""

    def __init__(self, name, folders):
        self.name, self.folders = name, folders

    @property
    def unified(self):
        return "unified" in self.folders

    def _folder(self, controller):
        """The folder that holds a controller's files; None where this group is not in it."""
        return self.folders.get("unified") or self.folders.get(controller)

    def _paths(self):
        return list(dict.fromkeys(self.folders.values()))

    def join(self):
        """Move the caller, which has one thread, in. Better than add: in version 1 a thread that moves itself needs no lock over
        all of the system's forks, and the kernel waits 5 to 20 ms (an RCU grace period) to get that lock."""
        for path in self._paths():
            _write(path, "cgroup.procs" if self.unified else "tasks", "0")

    def add(self, pid):
        """Move a process in. OSError ESRCH when it has ended."""
        for path in self._paths():
            _write(path, "cgroup.procs", str(pid))

    def pids(self):
        """The processes in this group and those below it."""
        for path in self._paths()[:1]:
            texts = [_read(folder, "cgroup.procs") for folder, _, _ in os.walk(path)]
            return [int(pid) for text in texts for pid in text.split() if pid != "0"]
        return []

    def freeze(self, timeout=10):
        """Stop all processes of the group. Returns when all of them stand still; Error after `timeout` seconds."""
        self._set_frozen(True, timeout)

    def thaw(self, timeout=10):
        self._set_frozen(False, timeout)

    def _set_frozen(self, frozen, timeout):
        folder = self._folder("freezer")
        if folder is None:
            raise Error("the container cannot be paused: this host has no freezer control group")
        deadline, pause = time.monotonic() + timeout, 0.0005
        while not self._write_frozen(folder, frozen):
            if time.monotonic() > deadline:
                self._write_frozen(folder, False)
                raise Error("the container's processes do not stand still after %d seconds" % timeout)
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    def _write_frozen(self, folder, frozen):
        """Ask for the state; whether it is reached. Version 1 may stay in FREEZING when processes fork meanwhile, until asked
        anew."""
        if self.unified:
            if _read(folder, "cgroup.freeze") != "%d" % frozen:
                _write(folder, "cgroup.freeze", "%d" % frozen)
            return _read_table(folder, "cgroup.events").get("frozen") == frozen
        _write(folder, "freezer.state", "FROZEN" if frozen else "THAWED")
        return _read(folder, "freezer.state") == ("FROZEN" if frozen else "THAWED")

    def frozen(self):
        folder = self._folder("freezer")
        if folder is None:
            return False
        return _read(folder, "cgroup.freeze") == "1" if self.unified else _read(folder, "freezer.state") != "THAWED"

    def kill(self, timeout=10):
        """SIGKILL to everything in the group, frozen or not, until it is empty. True when it is."""
        deadline, pause = time.monotonic() + timeout, 0.001
        while self.pids():
            self._kill_once()
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.05)
        return True

    def _kill_once(self):
        if self.unified:
            with contextlib.suppress(OSError):  # cgroup.kill: Linux 5.14; it kills what forks meanwhile, too
                _write(self.folders["unified"], "cgroup.kill", "1")
                return
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Error, OSError):
            self.thaw(1)

    def oom_kills(self):
        """How many processes the kernel has killed because the group was at its memory limit."""
        folder = self._folder("memory")
        return _read_table(folder, "memory.events" if self.unified else "memory.oom_control").get("oom_kill", 0) if folder else 0

    def delete(self, timeout=2):
        """Remove the group with what it has below; whether it is gone. A process that is just ending still counts: waits for it,
        `timeout` seconds at most."""
        deadline, pause = time.monotonic() + timeout, 0.001
        while True:
            for path in self._paths():
                self._remove(path)
            if not any(os.path.isdir(path) for path in self._paths()):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(pause * 2, 0.05)

    @staticmethod
    def _remove(path):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:  # in use, or groups below
            for folder, _, _ in os.walk(path, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(folder)

    # statistics, in the shape of docker's /containers/ID/stats

    def stats(self):
        """{pids_stats, blkio_stats, cpu_stats, memory_stats, num_procs, storage_stats}; nanoseconds and bytes."""
        cpu, memory, pids, blkio = (self._folder(name) for name in ("cpuacct", "memory", "pids", "blkio"))
        return {"pids_stats": self._pids_stats(pids) if pids else {}, "blkio_stats": self._blkio_stats(blkio),
                "cpu_stats": self._cpu_stats(cpu), "memory_stats": self._memory_stats(memory) if memory else {},
                "num_procs": 0, "storage_stats": {}}

    def _pids_stats(self, folder):
        found, most = {"current": _read_number(folder, "pids.current")}, _read(folder, "pids.max")
        if most.isdigit():
            found["limit"] = int(most)
        return found

    def _cpu_stats(self, folder):
        system, online = _system_cpu()
        usage, throttling = {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0}, {}
        if folder and self.unified:
            found = _read_table(folder, "cpu.stat")
            usage = {key: found.get(name, 0) * 1000 for key, name in (
                ("total_usage", "usage_usec"), ("usage_in_kernelmode", "system_usec"), ("usage_in_usermode", "user_usec"))}
            throttling = dict(found, throttled_time=found.get("throttled_usec", 0) * 1000)
        elif folder:
            found, tick = _read_table(folder, "cpuacct.stat"), 10 ** 9 // os.sysconf("SC_CLK_TCK")
            usage = {"total_usage": _read_number(folder, "cpuacct.usage"),
                     "percpu_usage": [int(n) for n in _read(folder, "cpuacct.usage_percpu").split()],
                     "usage_in_kernelmode": found.get("system", 0) * tick, "usage_in_usermode": found.get("user", 0) * tick}
            throttling = _read_table(self.folders["cpu"], "cpu.stat") if "cpu" in self.folders else {}
        return {"cpu_usage": usage, "system_cpu_usage": system, "online_cpus": online, "throttling_data": {
            "periods": throttling.get("nr_periods", 0), "throttled_periods": throttling.get("nr_throttled", 0),
            "throttled_time": throttling.get("throttled_time", 0)}}

    def _memory_stats(self, folder):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if self.unified:
            limit = _read_number(folder, "memory.max") or total
            found = {"usage": _read_number(folder, "memory.current")}
        else:
            limit = _read_number(folder, "memory.limit_in_bytes") or total
            found = {"usage": _read_number(folder, "memory.usage_in_bytes"),
                     "max_usage": _read_number(folder, "memory.max_usage_in_bytes")}
            failures = _read_number(folder, "memory.failcnt")
            found.update({"failcnt": failures} if failures else {})
        return dict(found, stats=_read_table(folder, "memory.stat"), limit=min(limit, total))

    def _blkio_stats(self, folder):
        found = {name: [] for name in ("io_service_bytes_recursive", "io_serviced_recursive", "io_queue_recursive",
                                       "io_service_time_recursive", "io_wait_time_recursive", "io_merged_recursive",
                                       "io_time_recursive", "sectors_recursive")}
        if folder and self.unified:
            for line in _read(folder, "io.stat").splitlines():
                device, *pairs = line.split()
                numbers = dict(pair.split("=") for pair in pairs if "=" in pair)
                for key, names in (("io_service_bytes_recursive", ("rbytes", "wbytes")),
                                   ("io_serviced_recursive", ("rios", "wios"))):
                    found[key] += [_blkio_entry(device, operation, numbers.get(name, 0))
                                   for operation, name in zip(("read", "write"), names)]
        elif folder:
            for key, name in (("io_service_bytes_recursive", "io_service_bytes"), ("io_serviced_recursive", "io_serviced")):
                text = _read(folder, "blkio.throttle.%s_recursive" % name) or _read(folder, "blkio.throttle." + name)
                found[key] = [_blkio_entry(*line.split()) for line in text.splitlines() if len(line.split()) == 3]
        return found


def _blkio_entry(device, operation, value):
    major, _, minor = device.partition(":")
    return {"major": int(major), "minor": int(minor or 0), "op": operation, "value": int(value)}


def _system_cpu():
    """(nanoseconds that all processors together have counted since boot, how many there are): the divisor for percentages."""
    lines = read_file("/proc/stat").decode().splitlines()
    ticks = sum(int(n) for n in lines[0].split()[1:8])
    online = sum(1 for line in lines if re.match(r"cpu\d", line))
    return ticks * (10 ** 9 // os.sysconf("SC_CLK_TCK")), online


@functools.lru_cache(None)
def cgroups(parent):
    """The host's control groups below a parent: looked up once a process, and by the spawner for all its children."""
    return Cgroups.detect(parent)


def leave_service(parent):
    """Move this process, the spawner, and with it all monitors to come, out of the group of the service that the daemon may be:
    a service manager that ends what is left in that does not end containers. Nothing is lost where it cannot be done."""
    groups = cgroups(parent)
    base = os.path.join(groups.hierarchies["unified"] if groups.version == 2 else "/sys/fs/cgroup/systemd", groups.parent, "monitors")
    with contextlib.suppress(OSError):
        os.makedirs(base, exist_ok=True)
        with open(os.path.join(base, "cgroup.procs"), "w") as f:
            f.write("0")


def make_cgroup(spec):
    """The group of a container from its spec: {name, parent, limits, devices: further rules, or None for all devices}."""
    rules = None if spec["devices"] is None else tuple(DEFAULT_DEVICE_RULES) + tuple(spec["devices"])
    group, _ = cgroups(spec["parent"]).create(spec["name"], spec["limits"], rules)
    return group


def open_cgroup(spec):
    return cgroups(spec["parent"]).find(spec["name"])


########################################################################
# 9. Sandbox
########################################################################
# From a spec to execve. A *spec* is plain JSON that the daemon made: the root, mounts, namespaces, command, identity and limits of one
# process. `run_init` turns a fresh child of the monitor into the container's PID 1; `run_exec` one into a further process of a running
# container. Nothing here trusts the root: targets are opened by descriptor inside it, and mounts are attached to descriptors. What a
# stage must come after is said where it stands: the order is the security argument.

CAPABILITIES = {name: number for number, name in enumerate("""CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID
    SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE
    SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split())}
# A list of what is kept, not of what is dropped: a capability that a later kernel invents is not given.
DEFAULT_CAPABILITIES = ("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
                        "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE")
MASKED_PATHS = ("/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/sched_debug",
                "/proc/scsi", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware")
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
# path, kind, major, minor, mode: the nodes of every container's /dev
DEVICES = (("/dev/null", "c", 1, 3, 0o666), ("/dev/zero", "c", 1, 5, 0o666), ("/dev/full", "c", 1, 7, 0o666),
           ("/dev/random", "c", 1, 8, 0o666), ("/dev/urandom", "c", 1, 9, 0o666), ("/dev/tty", "c", 5, 0, 0o666))
_DEV_LINKS = (("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2"),
              ("core", "/proc/kcore"), ("ptmx", "pts/ptmx"))
_STRICT = MS_NOSUID | MS_NOEXEC | MS_NODEV
# target -> (file system, flags, options); in this order. "cgroup" is made by _mount_cgroups.
DEFAULT_MOUNTS = {
    "/proc": ("proc", _STRICT, ""),
    "/dev": ("tmpfs", MS_NOSUID | MS_STRICTATIME, "mode=755,size=65536k"),
    "/dev/pts": ("devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
    "/sys": ("sysfs", _STRICT | MS_RDONLY, ""),
    "/sys/fs/cgroup": ("cgroup", _STRICT | MS_RDONLY, ""),
    "/dev/mqueue": ("mqueue", _STRICT, ""),
    "/dev/shm": ("tmpfs", _STRICT, "mode=1777,size=%(shm_size)d")}
# name in a spec -> (flag for unshare, file under /proc/PID/ns)
NAMESPACES = {"mnt": NEWNS, "uts": NEWUTS, "ipc": NEWIPC, "net": NEWNET, "cgroup": NEWCGROUP, "pid": NEWPID}
_PROPAGATION = {"private": MS_PRIVATE, "slave": MS_SLAVE, "shared": 0}


def capability_mask(names):
    return sum(1 << CAPABILITIES[name] for name in set(names))


@functools.lru_cache(None)
def own_capabilities():
    """The mask of what this process may hand on: on some hosts root itself lacks some."""
    match = re.search(rb"CapPrm:\s*([0-9a-f]+)", read_file("/proc/self/status"))
    return int(match.group(1), 16)


# -- who: the user of the image --------------------------------------------------------------------------------------------------

_MOST_ACCOUNTS = 1 << 20  # bytes read of an image's passwd or group: it may be of any size (CVE-2026-47262)


def _accounts(path):
    """Rows of /etc/passwd or /etc/group of the root we are in. A parser of our own: the C library would load modules from there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # not to wait on a fifo
    except OSError:
        return []
    try:
        # a link may lead to /proc, where files have no end, and reading some does something
        if not stat.S_ISREG(os.fstat(fd).st_mode) or file_system_type(fd) in (PROC_MAGIC, SYSFS_MAGIC):
            return []
        data = b""
        while len(data) < _MOST_ACCOUNTS:
            part = os.read(fd, BLOCK)
            if not part:
                break
            data += part
    except OSError:
        return []
    finally:
        os.close(fd)
    return [line.split(":") for line in data.decode("utf-8", "surrogateescape").splitlines() if line.count(":") >= 3]


def _is_number(text):
    """0-9 only, and no more digits than an id has: str.isdigit() takes what int() does not."""
    return re.fullmatch("[0-9]{1,10}", text) is not None and int(text) <= 0x7FFFFFFF


def _number(text, what):
    if len(text) > 10 or int(text) > 0x7FFFFFFF:
        raise BadRequest("%s %s: uids and gids must be in range 0-2147483647" % (what, text))
    return int(text)


def look_up_user(user, extra_groups=()):
    """`name|uid[:group|gid]` in the accounts of the root we are in -> (uid, gid, groups, home). All digits are always a number,
    never a name (CVE-2016-3697)."""
    name, colon, group = (user or "0").partition(":")
    name = name or "0"
    rows = [row for row in _accounts("/etc/passwd") if len(row) >= 6 and _is_number(row[2]) and _is_number(row[3])]
    if re.fullmatch("[0-9]+", name):
        uid = _number(name, "user")
        row = next((r for r in rows if int(r[2]) == uid), None)
    else:
        row = next((r for r in rows if r[0] == name), None)
        if row is None:
            raise BadRequest("unable to find user %s: no matching entries in passwd file" % name)
        uid = _number(row[2], "user")
    gid, home = (_number(row[3], "group"), row[5] or "/") if row else (0, "/")
    groups = _accounts("/etc/group")
    if group:
        gid, members = _look_up_group(group, groups), []
    else:
        members = [int(r[2]) for r in groups if row and _is_number(r[2]) and row[0] in r[3].split(",")]
    members = [gid] + members + [_look_up_group(g, groups) for g in extra_groups]
    return uid, gid, list(dict.fromkeys(members)), home


def _look_up_group(group, rows):
    if re.fullmatch("[0-9]+", group):
        return _number(group, "group")
    found = next((r for r in rows if r[0] == group and _is_number(r[2])), None)
    if found is None:
        raise BadRequest("unable to find group %s: no matching entries in group file" % group)
    return _number(found[2], "group")


# -- mounts ----------------------------------------------------------------------------------------------------------------------

def _by_fd(fd):
    return "/proc/self/fd/%d" % fd


@contextlib.contextmanager
def _target(root_fd, path, kind="dir"):
    """An O_PATH descriptor of a mount's target inside the root, made where it is missing."""
    fd = make_in_root(root_fd, path, kind)
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode) != (kind == "dir"):
            raise BadRequest("error mounting on %s: not a directory: Are you trying to mount a directory onto a file (or vice-versa)? Check "
                             "if the specified host path exists and is the expected type" % path)
        yield fd
    finally:
        os.close(fd)


def _refuse_symlink(root_fd, path):
    """/proc and /sys of an image that are links would send our own set-up elsewhere (CVE-2019-19921, CVE-2025-52881)."""
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.lstat(path.strip("/"), dir_fd=root_fd).st_mode):
            raise BadRequest("the image's %s is a symbolic link: a container cannot be started on it" % path)


def mount_defaults(root_fd, spec):
    """The file systems that every container has. Private namespaces get their own instance; a shared one the host's view."""
    replaced = {m["target"] for m in spec["mounts"]}
    for target, (kind, flags, data) in DEFAULT_MOUNTS.items():
        if target in replaced and target not in ("/proc", "/dev", "/sys"):
            continue
        if target in ("/proc", "/sys"):
            _refuse_symlink(root_fd, target)
        if spec["privileged"]:
            flags &= ~MS_RDONLY
        if kind == "cgroup":
            _mount_cgroups(root_fd, flags)
        elif kind == "mqueue" and spec["namespaces"].get("ipc") == "host":
            _bind_host(root_fd, "/dev/mqueue")
        elif target == "/dev/shm" and spec["namespaces"].get("ipc") != "private":
            _share_shm(root_fd, spec)
        else:
            with _target(root_fd, target) as fd:
                try:
                    mount(kind, _by_fd(fd), kind, flags, data % spec if "%" in data else data or None)
                except PermissionError:  # sysfs of a network namespace that is not ours: bind the one that is there
                    mount("/sys", _by_fd(fd), None, MS_BIND | MS_REC)
            if target == "/dev":
                _make_devices(root_fd, spec)


def _bind_host(root_fd, path):
    with contextlib.suppress(FileNotFoundError), _target(root_fd, path) as fd:
        mount(path, _by_fd(fd), None, MS_BIND)


def _share_shm(root_fd, spec):
    """/dev/shm of the host, or of the container whose IPC namespace this one joins: given as a tree descriptor."""
    with _target(root_fd, "/dev/shm") as fd:
        tree = spec["namespaces"].get("shm_fd")
        if tree is not None:
            move_mount(tree, fd)
        else:
            mount("/dev/shm", _by_fd(fd), None, MS_BIND)


def _make_devices(root_fd, spec):
    """Device nodes on our own fresh tmpfs: what the image has at /dev plays no part (CVE-2025-31133)."""
    os.umask(0)
    dev = open_in_root(root_fd, "/dev", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for path, kind, major, minor, mode in [tuple(d) for d in spec["devices"]]:
            relative = os.path.relpath(os.path.normpath(path), "/dev")
            if relative.startswith(".."):
                raise BadRequest("device %s: a device's path in the container begins with /dev/" % path)
            parent = os.path.dirname(relative)
            with opened_at(make_in_root(dev, "/" + parent, "dir")) as folder:
                with contextlib.suppress(FileExistsError):
                    os.mknod(os.path.basename(relative), mode | (stat.S_IFCHR if kind == "c" else stat.S_IFBLK), os.makedev(major, minor),
                             dir_fd=folder)
        for name, link in _DEV_LINKS:
            os.symlink(link, name, dir_fd=dev)
        for name in ("pts", "shm", "mqueue"):
            os.mkdir(name, 0o755, dir_fd=dev)
    finally:
        os.close(dev)
        os.umask(0o022)


@contextlib.contextmanager
def opened_at(fd):
    """Close a descriptor at the end of a with block."""
    try:
        yield fd
    finally:
        os.close(fd)


def _mount_cgroups(root_fd, flags):
    """/sys/fs/cgroup as a container sees it: v2 one file system; v1 a folder with each hierarchy. The cgroup namespace, entered
    before, makes the container's own cgroup its root."""
    unified = file_system_type("/sys/fs/cgroup") == CGROUP2_MAGIC
    with _target(root_fd, "/sys/fs/cgroup") as fd:
        if unified:
            mount("cgroup2", _by_fd(fd), "cgroup2", flags)
            return
        mount("tmpfs", _by_fd(fd), "tmpfs", _STRICT, "mode=755")
    hierarchies = []
    for line in read_file("/proc/self/mountinfo").decode().splitlines():
        fields, _, after = line.partition(" - ")
        kind, _, options = after.split()[:3]
        name = os.path.basename(fields.split()[4])
        if kind in ("cgroup", "cgroup2") and fields.split()[4] == "/sys/fs/cgroup/" + name:
            hierarchies.append((name, kind, ",".join(o for o in options.split(",") if o not in ("rw", "ro")) or None))
    for name, kind, options in hierarchies:
        with _target(root_fd, "/sys/fs/cgroup/" + name) as fd, contextlib.suppress(OSError):
            mount(kind, _by_fd(fd), kind, flags, options)
    with _target(root_fd, "/sys/fs/cgroup") as fd:
        with opened_at(open_in_root(root_fd, "/sys/fs/cgroup", os.O_PATH)) as top:
            mount(None, _by_fd(top), None, MS_REMOUNT | flags, "mode=755")


def open_sources(spec):
    """For the monitor, in the host's mount namespace: a detached clone of each bind's source. What the clone is, no later change of a
    path can alter; and its membership in the host's propagation groups is what makes rshared work."""
    for m in spec["mounts"]:
        if m["type"] == "bind":
            flags = OPEN_TREE_CLONE | (AT_RECURSIVE if m.get("recursive", True) else 0)
            try:
                m["fd"] = open_tree(m["source"], flags)
            except OSError as error:
                if error.errno == errno.ENOSYS:  # before Linux 5.2: mounted by path after the unshare
                    m["fd"] = None
                else:
                    raise BadRequest("error while mounting %s on %s: %s" % (m["source"], m["target"], os.strerror(error.errno)))


def mount_users(root_fd, spec):
    """Binds, volumes and tmpfs that were asked for, parents before children."""
    for m in sorted(spec["mounts"], key=lambda m: m["target"].count("/")):
        if m["type"] == "tmpfs":
            with _target(root_fd, m["target"]) as fd:
                mount("tmpfs", _by_fd(fd), "tmpfs", m["flags"], m["data"] or None)
        elif m["fd"] is None:
            _bind_by_path(root_fd, m)
        else:
            is_dir = stat.S_ISDIR(os.fstat(m["fd"]).st_mode)
            with _target(root_fd, m["target"], "dir" if is_dir else "file") as fd:
                _set_attributes(m)
                move_mount(m["fd"], fd)
            if m.pop("late", None):
                _set_attributes_by_path(_by_fd(m["fd"]), m)
            os.close(m["fd"])


def _set_attributes(m):
    """Read-only (with all submounts) and propagation, on the clone before anybody can see it."""
    try:
        mount_setattr(m["fd"], m.get("read_only", False), _PROPAGATION[m.get("propagation", "private")])
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL):
            raise
        m["late"] = True  # before Linux 5.12


def _set_attributes_by_path(path, m):
    propagation = _PROPAGATION[m.get("propagation", "private")]
    if propagation:
        mount(None, path, None, MS_REC | propagation)
    if m.get("read_only"):
        mount(None, path, None, MS_REMOUNT | MS_BIND | MS_RDONLY | os.statvfs(path).f_flag & _STRICT)


def _bind_by_path(root_fd, m):
    with _target(root_fd, m["target"], "dir" if os.path.isdir(m["source"]) else "file") as fd:
        mount(m["source"], _by_fd(fd), None, MS_BIND | MS_REC)
    with opened_at(open_in_root(root_fd, m["target"], os.O_PATH)) as fd:
        _set_attributes_by_path(_by_fd(fd), m)


def mask_paths(root_fd, spec):
    """Hide files behind /dev/null and folders behind an empty read-only tmpfs; make others read-only."""
    null = os.open("/dev/null", os.O_PATH | os.O_CLOEXEC)
    if os.fstat(null).st_rdev != os.makedev(1, 3):
        raise Error("/dev/null of this host is not the null device: nothing can be masked with it")
    for path in spec["masked_paths"]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), opened_at(open_in_root(root_fd, path, os.O_PATH)) as fd:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                mount("tmpfs", _by_fd(fd), "tmpfs", MS_RDONLY, "size=0k,nr_inodes=2")
            else:
                mount(_by_fd(null), _by_fd(fd), None, MS_BIND)
    for path in spec["readonly_paths"]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            with opened_at(open_in_root(root_fd, path, os.O_PATH)) as fd:
                mount(_by_fd(fd), _by_fd(fd), None, MS_BIND | MS_REC)
            with opened_at(open_in_root(root_fd, path, os.O_PATH)) as fd:
                mount(None, _by_fd(fd), None, MS_REMOUNT | MS_BIND | MS_RDONLY | _STRICT)
    os.close(null)


# -- stdio -----------------------------------------------------------------------------------------------------------------------

_TIOCSPTLCK, _TIOCGPTPEER = 0x40045431, 0x5441  # ioctl_tty(2)


def open_terminal(ptmx, size=None):
    """(master, slave) of a new pseudo terminal from an open ptmx. The slave comes from the kernel by TIOCGPTPEER and not by its
    path, which a container could have replaced (CVE-2025-52565)."""
    import fcntl
    if file_system_type(ptmx) != DEVPTS_MAGIC:
        raise Error("/dev/ptmx of the container is no pseudo terminal multiplexer")
    fcntl.ioctl(ptmx, _TIOCSPTLCK, struct.pack("i", 0))
    slave = fcntl.ioctl(ptmx, _TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY)
    if size and all(size):
        set_terminal_size(ptmx, *size)
    return ptmx, slave


def set_terminal_size(fd, height, width):
    import fcntl
    import termios
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", height & 0xFFFF, width & 0xFFFF, 0, 0))


def take_stdio(fds, uid, terminal):
    """Make the three descriptors 0, 1 and 2 and give them to the user; a terminal becomes the controlling one."""
    import fcntl
    import termios
    for fd in set(fds):
        # /dev/null stays the host's; pipes and the terminal are the user's, so that /dev/stdout can be opened again
        if not stat.S_ISCHR(os.fstat(fd).st_mode) or terminal:
            with contextlib.suppress(OSError):
                os.fchown(fd, uid, -1)
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


# -- the last steps before execve --------------------------------------------------------------------------------------------------

def set_limits(spec):
    """rlimits ({name: [soft, hard]}; -1 is unlimited) as far as this host can go, and the OOM score."""
    import resource
    for name, (soft, hard) in spec["rlimits"].items():
        number = getattr(resource, "RLIMIT_" + name.upper(), None)
        if number is None:
            continue
        try:
            resource.setrlimit(number, (soft, hard))
        except (ValueError, OSError):  # without CAP_SYS_RESOURCE a hard limit can only go down
            most = resource.getrlimit(number)[1]
            resource.setrlimit(number, tuple(min(v, most) if v >= 0 and most >= 0 else most if v < 0 else v for v in (soft, hard)))
    if spec["oom_score_adj"]:
        with contextlib.suppress(OSError):  # lowering it needs CAP_SYS_RESOURCE
            write_proc("/proc/self/oom_score_adj", spec["oom_score_adj"])


def write_proc(path, value):
    """Write a file of procfs, after making sure that it is one (CVE-2019-16884: a volume over /proc)."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if file_system_type(fd) != PROC_MAGIC:
            raise Error("%s is not in procfs" % path)
        os.write(fd, str(value).encode())
    finally:
        os.close(fd)


def become(uid, gid, groups, spec):
    """Take on the user's identity and drop every capability that was not asked for."""
    mask = capability_mask(spec["capabilities"]) & own_capabilities()
    for number in range(64):
        if not mask >> number & 1:
            try:
                prctl(PR_CAPBSET_DROP, number)
            except OSError:
                break  # past the last one that this kernel knows
    with contextlib.suppress(OSError):
        prctl(PR_CAP_AMBIENT, 4)  # PR_CAP_AMBIENT_CLEAR_ALL
    os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    if spec["no_new_privileges"]:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
    if uid:
        os.setresuid(uid, uid, uid)  # clears permitted and effective
    else:
        set_capabilities(mask, mask, 0)


def reset_signals():
    """Python ignores SIGPIPE and SIGXFSZ, and a container would inherit that."""
    for number in range(1, 65):
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def enter_working_directory(path):
    """chdir, and make sure that we are inside the root (CVE-2024-21626)."""
    try:
        os.chdir(path)
    except OSError as error:
        raise BadRequest('chdir to cwd ("%s") set in config.json failed: %s' % (path, os.strerror(error.errno).lower()))
    try:
        inside = os.getcwd().startswith("/")
    except OSError:
        inside = False
    if not inside or path.startswith("/proc/"):
        raise BadRequest("the working directory '%s' leads out of the container" % path)


def execute(argv, env):
    """execve as a shell would find it: returns only by an error, in the words that clients turn into 126 and 127."""
    name, values = argv[0], dict(entry.partition("=")[::2] for entry in env)
    if "/" in name:
        candidates = [name]
    else:
        candidates = [os.path.join(folder or ".", name) for folder in values.get("PATH", DEFAULT_PATH).split(":")] if name else []
    denied = None
    for path in candidates:
        try:
            os.execve(path, argv, values)
        except (FileNotFoundError, NotADirectoryError):
            if "/" in name and os.path.lexists(path) and not os.path.isdir(path):  # the script's interpreter or the loader is missing
                raise BadRequest('exec: "%s": its interpreter is missing: no such file or directory' % printable(name))
        except OSError as error:
            denied = denied or error
    if denied is not None and denied.errno != errno.EACCES:
        raise BadRequest('exec: "%s": %s' % (printable(name), os.strerror(denied.errno).lower()))
    if denied is not None:
        what = "is a directory" if "/" in name and os.path.isdir(name) else "permission denied"
        raise BadRequest('exec: "%s": %s' % (printable(name), what))
    if "/" in name:
        raise BadRequest('exec: "%s": stat %s: no such file or directory' % (printable(name), printable(name)))
    raise BadRequest('exec: "%s": executable file not found in $PATH' % printable(name))


def finish(spec, sync, stdio, terminal):
    """What init and exec share, inside the container's root: from here on nothing is imported and no account database of the
    C library is asked (CVE-2019-14271)."""
    os.umask(0o022)
    close_all_but([sync.fileno()] + stdio)  # before the root is looked at: it may link to /proc/self/fd (CVE-2024-21626)
    uid, gid, groups, home = look_up_user(spec["user"], spec["groups"])
    enter_working_directory(spec["cwd"] or "/")
    set_limits(spec)
    take_stdio(stdio, uid, terminal)
    close_all_but([sync.fileno()])
    if spec.get("seccomp") and not spec["no_new_privileges"]:
        seccomp_filter(bytes.fromhex(spec["seccomp"]))  # needs CAP_SYS_ADMIN, so before the capabilities go
    become(uid, gid, groups, spec)
    if spec.get("seccomp") and spec["no_new_privileges"]:
        seccomp_filter(bytes.fromhex(spec["seccomp"]))
    reset_signals()
    env = spec["env"] if any(e.startswith("HOME=") for e in spec["env"]) else spec["env"] + ["HOME=" + home]
    execute(spec["argv"], env)


# -- init and exec -----------------------------------------------------------------------------------------------------------------

def reporting(body, spec, sync, *args):
    """Run body, which ends in execve; what goes wrong before that is told to the monitor over the sync socket."""
    try:
        body(spec, sync, *args)
    except Error as error:
        report = {"error": str(error), "status": error.status}
    except OSError as error:
        report = {"error": os_error_text(error), "status": 500}
    except Exception as error:
        debug_traceback()
        report = {"error": "%s: %s" % (type(error).__name__, error), "status": 500}
    with contextlib.suppress(OSError):
        send_message(sync, report)
    os._exit(127)


def run_init(spec, sync, stdio):
    """PID 1 of a container, from fork to execve. `sync` is the socket to the monitor: it is told of the namespaces, sends the
    network's endpoint, and sees the end of the stream when execve has closed it."""
    os.setsid()
    prctl(PR_SET_DUMPABLE, 0)  # no container process may trace us or open our files (CVE-2016-9962, CVE-2019-5736)
    with contextlib.suppress(OSError):
        new_session_keyring()
    if spec["cgroup"]:
        open_cgroup(spec["cgroup"]).join()  # before the cgroup namespace: its root is where we are
    _enter_namespaces(spec["namespaces"])
    send_message(sync, {"stage": "namespaces"})  # the daemon can now put a network interface into ours
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount_root(spec["root"], spec["mount_point"])
    root_fd = os.open(spec["mount_point"], os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    mount_defaults(root_fd, spec)
    terminal = _make_console(root_fd, spec, sync) if spec["tty"] else None
    mount_users(root_fd, spec)
    if not spec["privileged"]:
        _set_sysctls(root_fd, spec)
        mask_paths(root_fd, spec)
    else:
        _set_sysctls(root_fd, spec)
    message, _ = receive_message(sync)
    if message is None:
        os._exit(0)  # the monitor gave up
    if message["endpoints"] is not None:
        configure_network(message["endpoints"])
    if message.get("resolver"):
        send_message(sync, {"stage": "resolver"}, open_resolver())
    if spec["namespaces"]["uts"] == "private":
        socket.sethostname(spec["hostname"])
        if spec["domainname"]:
            write_proc("/proc/sys/kernel/domainname", spec["domainname"])
    os.fchdir(root_fd)
    pivot_root(".", ".")  # the old root now lies over the new one; taken away in the next line
    umount(".", MNT_DETACH)
    os.chdir("/")
    with contextlib.suppress(OSError):  # the chdir below says what is wrong; an exec makes no folder
        os.makedirs(spec["cwd"] or "/", 0o755, exist_ok=True)
    if spec["read_only"]:
        mount(None, "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY)
    finish(spec, sync, [terminal] * 3 if terminal is not None else stdio, terminal is not None)


def _enter_namespaces(wanted):
    """Join the namespaces given as descriptors, make the private ones; the pid namespace is the monitor's to make."""
    for name in ("ipc", "uts", "net", "cgroup"):
        if isinstance(wanted.get(name), int):
            setns(wanted[name], NAMESPACES[name])
    flags = NEWNS
    for name in ("ipc", "uts", "net", "cgroup"):
        if wanted.get(name) == "private":
            flags |= NAMESPACES[name]
    unshare(flags)


def _make_console(root_fd, spec, sync):
    """A terminal from the container's own devpts: the master goes to the monitor, the slave is stdio and /dev/console."""
    with opened_at(open_in_root(root_fd, "/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY)) as ptmx:
        master, slave = open_terminal(ptmx, spec.get("size"))
        with _target(root_fd, "/dev/console", "file") as fd:
            mount(_by_fd(slave), _by_fd(fd), None, MS_BIND)
        send_message(sync, {"stage": "terminal"}, [master])
    return slave


def _set_sysctls(root_fd, spec):
    """Kernel settings of our own namespaces, written before /proc/sys becomes read-only."""
    settings = dict(spec["sysctls"])
    if spec["namespaces"]["net"] == "private":
        settings.setdefault("net.ipv4.ip_unprivileged_port_start", "0")  # as docker since 20.03: ports below 1024 for every user
        settings.setdefault("net.ipv4.ping_group_range", "0 2147483647")
    for name, value in settings.items():
        path = "/proc/sys/" + (name if "/" in name else name.replace(".", "/"))
        try:
            with opened_at(open_in_root(root_fd, path, os.O_WRONLY)) as fd:
                if file_system_type(fd) != PROC_MAGIC:
                    raise Error("%s is not in procfs" % path)
                os.write(fd, str(value).encode())
        except OSError as error:
            if name in spec["sysctls"]:
                raise BadRequest("sysctl %s: %s" % (name, os.strerror(error.errno)))


def run_exec(spec, sync, stdio):
    """A further process in a running container. The monitor has opened the namespaces of its PID 1 and entered its pid
    namespace before the fork."""
    os.setsid()
    prctl(PR_SET_DUMPABLE, 0)
    with contextlib.suppress(OSError):
        new_session_keyring()
    if spec["cgroup"]:
        open_cgroup(spec["cgroup"]).join()
    for name in ("cgroup", "ipc", "uts", "net", "mnt"):  # mnt last: it changes what /proc is
        setns(spec["joined"][name], NAMESPACES[name])
    terminal = None
    if spec["tty"]:
        ptmx = os.open("/dev/pts/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
        master, terminal = open_terminal(ptmx, spec.get("size"))
        send_message(sync, {"stage": "terminal"}, [master])
    finish(spec, sync, [terminal] * 3 if terminal is not None else stdio, terminal is not None)


def open_namespaces(pid, start_time):
    """{name: descriptor} of a process's namespaces, and not of another that got its number since."""
    found = {name: os.open("/proc/%d/ns/%s" % (pid, name), os.O_RDONLY | os.O_CLOEXEC) for name in NAMESPACES}
    if stat_start_time(pid) != start_time:
        raise Conflict("the container's process %d has ended" % pid)
    return found


########################################################################
# 10. Monitor
########################################################################
# Two kinds of processes. The *spawner* is forked from the daemon before its first thread and does nothing but fork: a child serves
# one connection of the daemon, as a monitor or with one task. A *monitor* belongs to one container or exec: parent of its process,
# owner of its stdio, log, attached clients and port proxies. It holds nothing of the daemon's and outlives it; a new daemon finds it by
# its control socket.

MONITOR_PROTOCOL = 1  # a daemon speaks this and all earlier ones
_QUEUE_IN_MEMORY, _QUEUE_ON_DISK = 1 << 20, 1 << 30  # bytes kept for an attached client that reads slowly; beyond, it is dropped


class Spawner:
    """The daemon's end: `connect` forks a child and returns the connection to it; `run` has a task done."""

    def __init__(self, cgroup_parent):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pid = fork(_spawn_forever, theirs, cgroup_parent)
        theirs.close()

    def connect(self):
        mine, theirs = socket.socketpair()
        with theirs:
            try:
                socket_send_fd(self.socket, theirs.fileno())
            except OSError:
                mine.close()
                raise Unavailable("the spawner has ended; the daemon starts itself anew: try again in a moment")
        return mine

    def begin(self, name, fds=(), **arguments):
        """Start a task; returns a Job. The descriptors stay the caller's to close."""
        connection = self.connect()
        send_message(connection, {"role": "task", "name": name, "arguments": arguments}, fds)
        return Job(connection)

    def run(self, name, fds=(), **arguments):
        return self.begin(name, fds, **arguments).result()


class Job:
    """A task that is being done by a child of the spawner."""

    def __init__(self, connection):
        self.connection = connection

    def result(self):
        """Wait; returns what the task returned, raises what it raised."""
        with self.connection:
            try:
                message, _ = receive_message(self.connection)
            except OSError as error:
                raise Error("the helper process ended early: %s" % error)
        if message is None:
            raise Error("the helper process was killed before it was done")
        if "error" in message:
            raise error_from(message["status"], message["error"])
        return message["result"]


def socket_send_fd(connection, fd):
    connection.sendmsg([b"f"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])


def preload_all(cgroup_parent):
    """Import and look up what the spawner's children use, once and before the fork: a child imports nothing, least of all inside a
    container's root, and all of them share the pages."""
    import grp, pwd, resource, termios  # noqa: E401, F401
    import json.encoder  # noqa: F401
    preload()
    own_capabilities()
    cgroups(cgroup_parent)


def _spawn_forever(connection, cgroup_parent):
    """The spawner: one byte with a descriptor is one child. It ends with the daemon; its monitors do not."""
    import gc
    os.setsid()
    close_all_but([connection.fileno()])
    null = os.open("/dev/null", os.O_RDWR)
    # a log file or the journal's socket may be written to for years; a terminal or a pipe is somebody's, who waits for its end
    is_log = stat.S_ISREG(os.fstat(2).st_mode) or stat.S_ISSOCK(os.fstat(2).st_mode)
    for number in (0, 1) if is_log else (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    set_process_title("pydock: spawner")
    leave_service(cgroup_parent)
    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page that the children share
    malloc_trim()
    while True:
        data, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(4), getattr(socket, "MSG_CMSG_CLOEXEC", 0))
        if not data:
            return
        if ancillary:
            fd = struct.unpack("i", ancillary[0][2][:4])[0]
            fork(_serve_child, connection, fd)
            os.close(fd)


def _serve_child(spawner_socket, fd):
    import gc
    gc.disable()
    spawner_socket.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    connection = socket.socket(fileno=fd)
    message, fds = receive_message(connection)
    if message is None:
        return
    if message["role"] == "monitor":
        Monitor(message).serve(connection)
        return
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # unfinished work of a daemon that died is of no use
    set_process_title("pydock: task " + message["name"])
    send_message(connection, _answer_task(message, fds))


def _answer_task(message, fds):
    try:
        return {"result": TASKS[message["name"]](fds, **message["arguments"])}
    except Error as error:
        return {"error": str(error), "status": error.status}
    except OSError as error:
        debug_traceback()
        return {"error": os_error_text(error), "status": 500}
    except Exception as error:
        debug_traceback()
        return {"error": "%s: %s" % (type(error).__name__, error), "status": 500}


# -- the log ---------------------------------------------------------------------------------------------------------------------

_LONGEST_LINE = 16384  # a longer line is stored in parts, as docker does


class LogFile:
    """A json-file log: one `{"log": "line\\n", "stream": "stdout", "time": "..."}` a line; rotated as NAME, NAME.1, ..."""

    def __init__(self, path, max_size=100 << 20, max_files=5):
        self.path, self.max_size, self.max_files = path, max_size, max_files
        self.partial, self.failing = {}, False
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        self.size = os.fstat(self.fd).st_size

    def write(self, stream, data):
        data = self.partial.pop(stream, b"") + data
        lines = data.splitlines(True) if b"\r" not in data else re.findall(rb"[^\n]*\n|[^\n]+", data)
        if lines and not lines[-1].endswith(b"\n") and len(lines[-1]) < _LONGEST_LINE:
            self.partial[stream] = lines.pop()
        self._store(stream, lines)

    def _store(self, stream, lines):
        from json.encoder import encode_basestring
        after = ',"stream":"%s","time":"%s"}\n' % (stream, format_time(time.time_ns()))
        data = bytearray()
        for line in lines:
            for start in range(0, len(line), _LONGEST_LINE):
                text = line[start:start + _LONGEST_LINE].decode("utf-8", "replace")
                record = ('{"log":' + encode_basestring(text) + after).encode("utf-8", "replace")
                if self.size + len(data) + len(record) > self.max_size > 0 and self.size + len(data):
                    self._append(data, rotate=True)
                    data = bytearray()
                data += record
        self._append(data)

    def _append(self, data, rotate=False):
        try:
            write_all(self.fd, data)
            self.size += len(data)
            self.failing = False
            if rotate:
                self._rotate()
        except OSError as error:  # a full disk stops the log, not the container
            if not self.failing:
                warn("%s: %s: output is lost" % (self.path, error.strerror))
            self.failing = True
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, self.size)  # half a record would spoil the next

    def _rotate(self):
        # made before anything is renamed: where that fails, the old file goes on
        fd = os.open(self.path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o640)
        for number in range(self.max_files - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + (".%d" % (number - 1) if number > 1 else ""), "%s.%d" % (self.path, number))
        os.rename(self.path + ".new", self.path)
        os.close(self.fd)
        self.fd, self.size = fd, 0

    def flush(self):
        for stream, rest in list(self.partial.items()):
            self._store(stream, [rest])
        self.partial.clear()


def log_files(path):
    """The files of a log, oldest first."""
    numbers = []
    while os.path.exists("%s.%d" % (path, len(numbers) + 1)):
        numbers.append(len(numbers) + 1)
    return ["%s.%d" % (path, n) for n in reversed(numbers)] + [path]


# -- attached clients --------------------------------------------------------------------------------------------------------------

STREAMS = {"stdin": 0, "stdout": 1, "stderr": 2}  # the first byte of a frame of docker's multiplexed stream


class Queue:
    """Bytes on their way to a client that may read slowly: the first MiB in memory, the rest in a file without a name. So a
    container never waits for whoever watches it, and nothing of what it printed is lost to a reader that is only slow."""

    def __init__(self, folder):
        self.folder, self.parts, self.size = folder, [], 0
        self.file, self.read_at, self.written = None, 0, 0

    def __bool__(self):
        return bool(self.parts) or self.read_at < self.written

    def put(self, *parts):
        """False when even the disk's share is used up."""
        if self.read_at == self.written and self.size < _QUEUE_IN_MEMORY:
            self.parts.extend(parts)
            self.size += sum(map(len, parts))
            return True
        if self.written - self.read_at > _QUEUE_ON_DISK:
            return False
        try:
            if self.file is None:
                self.file = os.open(self.folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            for part in parts:
                self.written += os.pwrite(self.file, part, self.written)
        except OSError:
            return False
        return True

    def head(self):
        if not self.parts and self.read_at < self.written:
            self.parts = [os.pread(self.file, _QUEUE_IN_MEMORY, self.read_at)]
            self.size = len(self.parts[0])
            self.read_at += self.size
            if self.read_at == self.written:
                self.read_at = self.written = 0
                os.ftruncate(self.file, 0)
        return self.parts

    def took(self, count):
        self.size -= count
        while count:
            if count >= len(self.parts[0]):
                count -= len(self.parts.pop(0))
            else:
                self.parts[0] = self.parts[0][count:]
                count = 0

    def close(self):
        if self.file is not None:
            os.close(self.file)


def parse_detach_keys(text):
    """`ctrl-p,ctrl-q`, `a,ctrl-]` to the bytes a terminal sends for them."""
    keys = bytearray()
    for key in text.split(","):
        if len(key) == 1 and ord(key) < 128:
            keys.append(ord(key))
        elif len(key) == 6 and key.startswith("ctrl-") and (key[5].isalpha() and key[5].islower() or key[5] in "@[\\]^_"):
            keys.append(ord(key[5].upper()) & 0x1F)
        else:
            raise BadRequest("Invalid detach keys: '%s' is neither a character nor ctrl- and a letter or one of @[\\]^_" % key)
    return bytes(keys)


class Attached:
    """One attached connection: what it sees, what it still has to be sent, and how far it has typed the detach keys."""

    def __init__(self, fd, message, folder):
        self.fd, self.queue = fd, Queue(folder)
        self.streams = [name for name in ("stdout", "stderr") if message.get(name)]
        self.stdin, self.framed = bool(message.get("stdin")), message["framed"]
        self.keys, self.typed = bytes.fromhex(message.get("detach_keys", "")), 0
        self.reading, self.ending = True, False

    def put(self, stream, data):
        if self.framed:
            return self.queue.put(struct.pack(">BxxxI", STREAMS[stream], len(data)), data)
        return self.queue.put(data)

    def strip_keys(self, data):
        """(what of data is for the container, True where the detach keys are complete)."""
        if not self.keys:
            return data, False
        out = bytearray()
        for byte in data:
            if byte == self.keys[self.typed]:
                self.typed += 1
                if self.typed == len(self.keys):
                    return bytes(out), True
                continue
            out += self.keys[:self.typed]  # held back until it was clear that they are only text
            self.typed = 1 if byte == self.keys[0] else 0
            if not self.typed:
                out.append(byte)
        return bytes(out), False


# -- the monitor -------------------------------------------------------------------------------------------------------------------

class Monitor:
    """One container's (or exec's) monitor. `message` of the daemon: {id, kind: container or exec, run: folder of the control socket,
    folder: where exit.json goes, log: {path, max_size, max_files} or null, stdin_once}. Every connection of the daemon carries
    requests {op: ...} and answers; one that asked to `watch` is told {event: "exit", exit_code, finished, oom} and {event: "detach"}."""

    def __init__(self, message):
        self.id, self.kind, self.folder, self.run = message["id"], message["kind"], message["folder"], message["run"]
        self.log = LogFile(**message["log"]) if message["log"] else None
        self.stdin_once, self.durable = message["stdin_once"], message.get("durable", False)
        self.note = message.get("note")  # given back in hello: how a new daemon learns what an exec is
        self.epoll, self.handlers = select.epoll(), {}
        self.clients, self.waiters, self.controls, self.watchers = [], [], {}, []
        self.outputs, self.input, self.pending_input, self.terminal = {}, None, b"", None
        self.size = None
        self.pid, self.pidfd, self.started, self.exit, self.cgroup = None, None, 0, None, None
        self.proxies = None
        self.used, self.quitting, self.ending_input = False, False, False

    # -- the loop --------------------------------------------------------------------------------------------------------

    def serve(self, connection):
        os.setsid()
        set_process_title("pydock: monitor %s" % self.id)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # a container ends by its own signals, not by those of the daemon's session
        os.chdir("/")
        listener = self._listen()
        self._watch(listener.fileno(), select.EPOLLIN, lambda events: self._control(listener.accept()[0]))
        self._control(connection)
        try:
            while not self._done():
                for fd, events in self.epoll.poll():
                    if fd in self.handlers:
                        self._handle(fd, events)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.run, "monitor.sock"))
            with contextlib.suppress(OSError):
                os.rmdir(self.run)

    def _handle(self, fd, events):
        """One event. What fails is given up; the container, which is ours, goes on."""
        try:
            self.handlers[fd](events)
        except Exception as error:
            warn("monitor of %s: %s: %s" % (self.id[:12], type(error).__name__, error))
            debug_traceback()
            self._forget(fd)

    def _listen(self):
        """The control socket, in a folder of root's; its path is short whatever the data root's: a unix address takes 107 bytes."""
        os.makedirs(self.run, 0o700, exist_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        with opened_folder(self.run) as fd:
            with contextlib.suppress(FileNotFoundError):
                os.unlink("monitor.sock", dir_fd=fd)
            listener.bind("/proc/self/fd/%d/monitor.sock" % fd)
            os.chmod("monitor.sock", 0o600, dir_fd=fd)
        listener.listen(16)
        return listener

    def _done(self):
        if self.exit is None:
            # never started: gone with the last of those who waited for that, or with the daemon before there were any
            return not (self.pid or self.clients or self.waiters) and (self.used or not self.controls)
        if not self.watchers or self.quitting:  # the daemon has recorded the exit, or there is none to do so
            self._answer_waiters()
            self._end_clients()
            return not self.clients
        return False

    def _watch(self, fd, events, handler):
        if fd in self.handlers:
            self.epoll.modify(fd, events)
        else:
            self.epoll.register(fd, events)
        self.handlers[fd] = handler

    def _forget(self, fd):
        if self.handlers.pop(fd, None):
            self.epoll.unregister(fd)

    # -- control connections ---------------------------------------------------------------------------------------------

    def _control(self, connection):
        fd = connection.fileno()
        self.controls[fd] = connection
        self._watch(fd, select.EPOLLIN, lambda events: self._request(connection))

    def _request(self, connection):
        try:
            message, fds = receive_message(connection)
        except (OSError, Error, ValueError):
            message, fds = None, []
        if message is None:
            self._hang_up(connection)
            return
        try:
            answer = getattr(self, "op_" + message["op"])(connection, message, fds)
        except Error as error:
            answer = {"error": str(error), "status": error.status}
        except OSError as error:
            debug_traceback()
            answer = {"error": os_error_text(error), "status": 500}
        except Exception as error:
            debug_traceback()
            answer = {"error": "%s: %s" % (type(error).__name__, error), "status": 500}
        with contextlib.suppress(OSError):
            send_message(connection, answer or {})

    def _hang_up(self, connection):
        fd = connection.fileno()
        self._forget(fd)
        self.controls.pop(fd, None)
        if connection in self.watchers:
            self.watchers.remove(connection)
        connection.close()

    def _tell(self, event):
        for connection in list(self.watchers):
            try:
                send_message(connection, event)
            except OSError:
                self._hang_up(connection)

    def op_hello(self, connection, message, fds):
        return {"protocol": MONITOR_PROTOCOL, "id": self.id, "kind": self.kind, "pid": self.pid, "started": self.started,
                "exit": self.exit, "note": self.note}

    def op_watch(self, connection, message, fds):
        """Events go over this connection from now on; an exit that was before is told again."""
        self.watchers.append(connection)
        return dict(self.op_hello(connection, message, fds), **({"event": "exit"} if self.exit else {}))

    def op_quit(self, connection, message, fds):
        """The daemon has recorded the end; or (exit_code given) a start has failed, and who waits gets that code."""
        self.quitting = True
        if self.exit is None:
            self._end({"exit_code": message.get("exit_code", 0), "finished": time.time_ns(), "oom": False})

    def op_fail(self, connection, message, fds):
        """An exec that could not be started: its attached client gets the reason as output."""
        for client in list(self.clients):
            self._send(client, "stdout", message["message"].encode() + b"\r\n")
        self.op_quit(connection, message, fds)

    def op_resize(self, connection, message, fds):
        self.size = (message["height"], message["width"])
        if self.terminal is not None:
            set_terminal_size(self.terminal, *self.size)

    def op_signal(self, connection, message, fds):
        if self.exit is None and self.pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                pidfd_send_signal(self.pidfd, message["signal"])

    def op_wait(self, connection, message, fds):
        """An HTTP connection whose answer's head was sent: it gets the exit code as the one chunk of the body."""
        self.used = True
        self.waiters.append(fds[0])
        self._watch(fds[0], 0, lambda events: self._drop_waiter(fds[0]))

    def _drop_waiter(self, fd):
        self.waiters.remove(fd)
        self._forget(fd)
        os.close(fd)

    def _answer_waiters(self):
        body = json.dumps({"StatusCode": self.exit["exit_code"]}).encode() + b"\n"
        for fd in list(self.waiters):
            with contextlib.suppress(OSError):
                write_all(fd, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
            self._drop_waiter(fd)

    # -- starting --------------------------------------------------------------------------------------------------------

    def op_start(self, connection, message, fds):
        """Start the process of the spec. Asked meanwhile: {namespaces: pid}; answered by {endpoints, resolver}. The descriptors
        are the listeners of the published ports, in the order of message["proxies"]."""
        spec = message["spec"]
        if self.size:
            spec["size"] = self.size
        try:
            self._launch(spec, connection)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        self._serve_ports(message.get("proxies", []), fds)
        return {"started": self.started, "pid": self.pid}

    def _launch(self, spec, connection):
        stdio, ours = self._make_stdio(spec)
        mine, theirs = socket.socketpair()
        try:
            pid = self._fork_process(spec, mine, theirs, stdio)
            theirs.close()
            self._see_through(pid, mine, connection)
        except BaseException:
            for fd in ours.values():
                os.close(fd)
            if self.terminal is not None:
                os.close(self.terminal)
                self.terminal = None
            raise
        finally:
            mine.close()
            theirs.close()
            for fd in set(stdio):
                os.close(fd)
        self._watch_process(pid, ours)

    def _make_stdio(self, spec):
        """([the child's three descriptors], {stream: our end}); with a terminal the child makes its own."""
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
        if spec["tty"]:
            return [null] * 3, {}
        out_read, out_write = os.pipe2(os.O_CLOEXEC)
        err_read, err_write = os.pipe2(os.O_CLOEXEC)
        stdio, ours = [null, out_write, err_write], {"stdout": out_read, "stderr": err_read}
        if spec["open_stdin"]:
            os.close(null)
            stdio[0], ours["stdin"] = os.pipe2(os.O_CLOEXEC)
        return stdio, ours

    def _fork_process(self, spec, mine, theirs, stdio):
        """Fork init in a new pid namespace, or an exec in its container's, and come back to our own: without that we could start
        no thread and fork no more."""
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        opened = [own]
        try:
            if self.kind == "exec":
                spec["joined"] = open_namespaces(spec["pid"], spec["start_time"])
                opened += spec["joined"].values()
                setns(spec["joined"]["pid"], NEWPID)
            else:
                open_sources(spec)
                opened += [m["fd"] for m in spec["mounts"] if m.get("fd") is not None]
                opened += self._open_joined(spec["namespaces"])
                if spec["cgroup"]:
                    self.cgroup = make_cgroup(spec["cgroup"])
                if spec["namespaces"]["pid"] == "private":
                    unshare(NEWPID)
                elif isinstance(spec["namespaces"]["pid"], int):
                    setns(spec["namespaces"]["pid"], NEWPID)
            body = run_exec if self.kind == "exec" else run_init
            return fork(_run_child, body, spec, mine, theirs, stdio)
        except BaseException:
            self._remove_cgroup()
            raise
        finally:
            setns(own, NEWPID)
            for fd in opened:
                os.close(fd)

    @staticmethod
    def _open_joined(namespaces):
        """{"pid": .., "start_time": ..} of another container's PID 1 becomes a descriptor of its namespace."""
        opened = []
        for name, wanted in list(namespaces.items()):
            if isinstance(wanted, dict):
                namespaces[name] = os.open("/proc/%d/ns/%s" % (wanted["pid"], name), os.O_RDONLY | os.O_CLOEXEC)
                opened.append(namespaces[name])
                if name == "ipc":
                    namespaces["shm_fd"] = _shm_of(wanted["pid"])
                    opened.append(namespaces["shm_fd"])
                if stat_start_time(wanted["pid"]) != wanted["start_time"]:
                    raise Conflict("the container whose %s namespace was to be joined has ended" % name)
        return opened

    def _see_through(self, pid, sync, connection):
        """Pass the stages of the child on until execve has closed its end, or it reports an error."""
        try:
            while True:
                message, fds = receive_message(sync)
                if message is None:
                    break
                if "error" in message:
                    raise error_from(message["status"], message["error"])
                if message["stage"] == "terminal":
                    self.terminal = fds[0]
                elif message["stage"] == "namespaces":
                    send_message(connection, {"namespaces": pid})
                    answer, _ = receive_message(connection)
                    if answer is None or "failed" in answer:
                        raise Unavailable("the daemon gave up the start: %s" % (answer or {}).get("failed", "it has ended"))
                    with contextlib.suppress(BrokenPipeError):  # init has failed meanwhile; its report is what we read next
                        send_message(sync, answer)
                elif message["stage"] == "resolver":
                    Resolver(self._proxy_loop(), fds, os.path.join(self.folder, "names.json"))
            self.pidfd = pidfd_open(pid)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            self._remove_cgroup()
            raise
        self.pid, self.started = pid, time.time_ns()

    def _watch_process(self, pid, ours):
        if self.terminal is not None:
            ours = {"stdout": self.terminal}
            self.input = self.terminal
            os.set_blocking(self.terminal, False)
        else:
            self.input = ours.pop("stdin", None)
            if self.input is not None:
                os.set_blocking(self.input, False)
        for stream, fd in ours.items():
            self.outputs[fd] = stream
            self._watch(fd, select.EPOLLIN, functools.partial(self._read_output, fd))
        self._watch(self.pidfd, select.EPOLLIN, lambda events: self._reap())
        self._feed(b"")

    def _serve_ports(self, proxies, fds):
        """The proxies of the published ports, on the listeners that the daemon has bound. Their thread starts with the first
        connection: most containers never have one, and it costs memory."""
        for proxy, fd in zip(proxies, fds):
            self._proxy_loop().serve(proxy["proto"], socket.socket(fileno=fd), tuple(proxy["target"]))

    def _proxy_loop(self):
        if self.proxies is None:
            self.proxies = ProxyLoop()
            self._watch(self.proxies.fileno(), select.EPOLLIN, lambda events: self._start_proxies())
        return self.proxies

    def _start_proxies(self):
        self._forget(self.proxies.fileno())
        threading.stack_size(256 << 10)
        threading.Thread(target=self.proxies.run, daemon=True).start()

    # -- the streams -----------------------------------------------------------------------------------------------------

    def _read_output(self, fd, events):
        """Take what a stream has; returns how many bytes."""
        try:
            data = os.read(fd, BLOCK)
        except BlockingIOError:
            return BLOCK  # less than was there: enough for who counts down
        except OSError:  # EIO: the last holder of the terminal's other side is gone
            data = b""
        if not data:
            self._close_output(fd)
            return 0
        stream = self.outputs[fd]
        if self.log:
            self.log.write(stream, data)
        for client in list(self.clients):
            if stream in client.streams:
                self._send(client, stream, data)
        return len(data)

    def _close_output(self, fd):
        self._forget(fd)
        del self.outputs[fd]
        if fd != self.terminal:
            os.close(fd)

    def _send(self, client, stream, data):
        if not client.put(stream, data):
            self._drop(client)
        else:
            self._flush(client)

    def _flush(self, client):
        """Send as much as the client takes now; the rest when epoll says so."""
        try:
            while client.queue:
                client.queue.took(os.writev(client.fd, client.queue.head()[:64]))
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        self._set_events(client)
        if client.ending and not client.queue:
            self._drop(client)

    def _set_events(self, client):
        reading = client.reading and not self.pending_input
        events = (select.EPOLLIN if reading else 0) | (select.EPOLLOUT if client.queue else 0)
        self._watch(client.fd, events, lambda events: self._client_ready(client, events))

    def _client_ready(self, client, events):
        if events & select.EPOLLOUT:
            self._flush(client)
        if client in self.clients and events & select.EPOLLIN:
            self._read_client(client)
        elif client in self.clients and events & (select.EPOLLHUP | select.EPOLLERR):
            self._drop(client)

    def _read_client(self, client):
        try:
            data = os.read(client.fd, BLOCK)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        if not data:
            client.reading = False  # a client without stdin closes its side at once, and goes on listening
            if client.stdin and (self.stdin_once or self.kind == "exec"):
                self._feed(None)
            self._set_events(client)
            return
        self._take_input(client, data)

    def _take_input(self, client, data):
        if not client.stdin:
            return
        data, detached = client.strip_keys(data)
        self._feed(data)
        if detached:
            self._tell({"event": "detach"})
            self._drop(client)

    def _feed(self, data):
        """Bytes for the process's stdin; None is its end. What the pipe does not take now waits, and the clients with it."""
        if data is None:
            self.ending_input = True
        elif self.input is not None or self.pid is None:  # else nobody will ever read it
            self.pending_input += data
        if self.input is None:  # not started yet, or already closed
            for client in self.clients:
                self._set_events(client)
            return
        blocked = bool(self.pending_input)
        try:
            while self.pending_input:
                self.pending_input = self.pending_input[os.write(self.input, self.pending_input):]
        except BlockingIOError:
            pass
        except OSError:
            self.pending_input, self.ending_input = b"", self.input != self.terminal
        if self.input != self.terminal:
            if self.pending_input:
                self._watch(self.input, select.EPOLLOUT, lambda events: self._feed(b""))
            else:
                self._forget(self.input)
                if self.ending_input:
                    os.close(self.input)
                    self.input = None
        else:
            wanted = select.EPOLLIN | (select.EPOLLOUT if self.pending_input else 0)
            self._watch(self.terminal, wanted, functools.partial(self._terminal_ready, self.terminal))
        if blocked != bool(self.pending_input) or self.pending_input:
            for client in self.clients:
                self._set_events(client)

    def _terminal_ready(self, fd, events):
        if events & select.EPOLLOUT:
            self._feed(b"")
        if events & ~select.EPOLLOUT and fd in self.outputs:
            self._read_output(fd, events)

    def op_attach(self, connection, message, fds):
        """A client's own connection, handed over by the daemon after it has sent the head of the answer. `pending` is what the
        client had sent already; with `logs` it first gets what was printed so far."""
        os.set_blocking(fds[0], False)
        client = Attached(fds[0], message, self.folder)
        self.used = True
        if message.get("logs") and self.log:
            self._replay(client)
        self.clients.append(client)
        if message.get("stream", True) is False or self.exit is not None:
            client.ending = True
        self._flush(client)
        if message.get("pending") and client in self.clients:
            self._take_input(client, bytes.fromhex(message["pending"]))

    def _replay(self, client):
        for path in log_files(self.log.path):
            with open(path, "rb") as log:
                for line in log:
                    record = json.loads(line)
                    if record["stream"] in client.streams:
                        client.put(record["stream"], record["log"].encode())
        for stream, rest in self.log.partial.items():
            if stream in client.streams:
                client.put(stream, rest)

    def _drop(self, client):
        if client in self.clients:
            self.clients.remove(client)
            self._forget(client.fd)
            client.queue.close()
            with contextlib.suppress(OSError):
                socket.socket(fileno=os.dup(client.fd)).shutdown(socket.SHUT_RDWR)
            os.close(client.fd)
            if client.stdin and client.reading and (self.stdin_once or self.kind == "exec") and self.terminal is None:
                self._feed(None)

    # -- the end ---------------------------------------------------------------------------------------------------------

    def _reap(self):
        _, status = os.waitpid(self.pid, 0)
        finished = time.time_ns()
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        self._forget(self.pidfd)
        if self.input is not None:
            self._forget(self.input)
            if self.input != self.terminal:
                os.close(self.input)
            self.input, self.pending_input = None, b""
        for fd in list(self.outputs):
            os.set_blocking(fd, False)
            left = self._available(fd)  # what was printed before the end; another holder of the pipe is not waited for
            while fd in self.outputs and left > 0:
                left -= self._read_output(fd, 0)
            if fd in self.outputs:
                self._close_output(fd)
        if self.log:
            self.log.flush()
        exit = {"exit_code": code, "finished": finished, "oom": bool(self.cgroup and self.cgroup.oom_kills())}
        self._remove_cgroup()
        if self.kind == "container":
            try:
                write_json(os.path.join(self.folder, "exit.json"), exit, sync=self.durable)
            except OSError as error:  # a full disk; the daemon and who waits are told all the same
                warn("exit.json of container %s: %s" % (self.id[:12], error.strerror))
        if self.proxies:
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.proxies.close()
        self._end(exit)
        self._tell(dict(exit, event="exit"))

    def _end(self, exit):
        """From now on there is an end. A container's clients go when they have got all; an exec's when the daemon knows the exit
        code, for which they ask it next."""
        self.exit = exit
        if self.kind == "container":
            self._end_clients()

    def _end_clients(self):
        for client in list(self.clients):
            if not client.ending:
                client.ending = True
                self._flush(client)

    @staticmethod
    def _available(fd):
        import fcntl
        import termios
        with contextlib.suppress(OSError):
            return struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, struct.pack("i", 0)))[0]
        return 0

    def _remove_cgroup(self):
        """With the host's pid namespace, or a joined one, the rest of the container's processes ends here."""
        if self.cgroup:
            with contextlib.suppress(OSError):
                self.cgroup.kill()
                self.cgroup.delete()


def _run_child(body, spec, mine, sync, stdio):
    mine.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    reporting(body, spec, sync, stdio)


def _shm_of(pid):
    """A tree descriptor of another container's /dev/shm, fetched by a child that enters its mount namespace."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        child = fork(_send_shm, pid, theirs)
        theirs.close()
        message, fds = receive_message(mine)
        os.waitpid(child, 0)
    if not fds:
        raise Error("the /dev/shm of process %d cannot be shared" % pid)
    return fds[0]


def _send_shm(pid, connection):
    fd = os.open("/proc/%d/ns/mnt" % pid, os.O_RDONLY | os.O_CLOEXEC)
    setns(fd, NEWNS)
    send_message(connection, {}, [open_tree("/dev/shm")])


class MonitorLink:
    """The daemon's side of one monitor: requests over one connection, events over a second one that the engine's watcher reads."""

    def __init__(self, connection, run):
        self.connection, self.run, self.lock = connection, run, threading.Lock()

    @classmethod
    def start(cls, spawner, message):
        """Fork a monitor. Returns when its control socket is there."""
        connection = spawner.connect()
        send_message(connection, dict(message, role="monitor"))
        link = cls(connection, message["run"])
        link.request("hello")
        return link

    @classmethod
    def find(cls, run):
        """The link to a monitor that runs already, or None."""
        connection = cls._connect(run)
        return cls(connection, run) if connection else None

    @staticmethod
    def _connect(run):
        connection = socket.socket(socket.AF_UNIX)
        try:
            with opened_folder(run) as fd:
                connection.connect("/proc/self/fd/%d/monitor.sock" % fd)
        except OSError:
            connection.close()
            return None
        return connection

    def request(self, op, fds=(), **arguments):
        """Send a request and wait for the answer, a dict; raises what the monitor raised."""
        with self.lock:
            return self._exchange(dict(arguments, op=op), fds)

    def _exchange(self, message, fds=()):
        try:
            send_message(self.connection, message, fds)
            answer, _ = receive_message(self.connection)
        except OSError:
            answer = None
        if answer is None:
            raise MonitorGone("the container's monitor has ended")
        if "error" in answer:
            raise error_from(answer["status"], answer["error"])
        return answer

    def start_process(self, spec, proxies, fds, connect_network):
        """Start; connect_network(pid) is called when the namespaces are there and returns {endpoints, resolver}, for init."""
        with self.lock:
            answer = self._exchange({"op": "start", "spec": spec, "proxies": proxies}, fds)
            while "namespaces" in answer:
                try:
                    network = connect_network(answer["namespaces"])
                except BaseException as error:
                    with contextlib.suppress(Error):
                        self._exchange({"failed": str(error)})  # answered by an error, when init is gone
                    raise
                answer = self._exchange(network)
            return answer

    def watch(self):
        """(a second connection on which events arrive, the state now)."""
        connection = self._connect(self.run)
        if connection is None:
            raise MonitorGone("the container's monitor has ended")
        send_message(connection, {"op": "watch"})
        state, _ = receive_message(connection)
        if state is None:
            connection.close()
            raise MonitorGone("the container's monitor has ended")
        return connection, state

    def close(self):
        self.connection.close()


class MonitorGone(Error):
    """The monitor ended, or was killed, while it was asked something."""


########################################################################
# 11. Network
########################################################################
# Bridges, addresses, published ports, the firewall and names. The daemon owns the networks and everything on the host's side;
# init sets up its own side with configure_network; the proxies and the resolver run in the monitor, because they have to outlive
# the daemon. The idea: a published port is reached from outside by a DNAT rule, and by a proxy from where DNAT does not go
# (127.0.0.1) or where there is no firewall. The daemon binds the listeners, which is also the test that a port is free, and hands
# them to the monitor.

BRIDGE = "pydock0"
BRIDGE_ADDRESSES = ("172.16.42.1/24", "10.0.42.1/24", "192.168.42.1/24")  # those of 2013, the first that is not routed yet
FIRST_PORT, LAST_PORT = 49153, 65535
WILDCARDS = ("", "0.0.0.0", "::")
_PREDEFINED = {"bridge": "bridge", "host": "host", "none": "null"}  # name: driver
_ICC, _MASQUERADE, _BRIDGE_NAME, _MTU, _HOST_BINDING = ("com.docker.network." + name for name in (
    "bridge.enable_icc", "bridge.enable_ip_masquerade", "bridge.name", "driver.mtu", "bridge.host_binding_ipv4"))


def set_sysctl(name, value):
    """Write a file under /proc/sys, such as net/ipv4/ip_forward; whether it could be."""
    try:
        with open("/proc/sys/" + name, "w") as f:
            f.write(str(value))
        return True
    except OSError:
        return False


def no_ipv6(interface):
    """An interface of a network without IPv6 takes part in none: a container could tell the host with router advertisements where
    to send its traffic (CVE-2020-13401, CVE-2024-32473)."""
    for name in ("accept_ra", "accept_redirects"):
        set_sysctl("net/ipv6/conf/%s/%s" % (interface, name), 0)
    set_sysctl("net/ipv6/conf/%s/disable_ipv6" % interface, 1)


def configure_network(endpoints):
    """The container's side, run inside its namespace: lo up, and for every endpoint its address; the first gateway is the
    default."""
    with Netlink() as netlink:
        netlink.set_link("lo", up=True)
        gateway = None
        for endpoint in endpoints:
            no_ipv6(endpoint["interface"])
            netlink.add_address(endpoint["interface"], "%s/%d" % (endpoint["IPAddress"], endpoint["IPPrefixLen"]))
            netlink.set_link(endpoint["interface"], up=True)
            gateway = gateway or endpoint["Gateway"]
        netlink.run()
        if gateway:
            netlink.add_route(gateway=gateway)
            with contextlib.suppress(FileExistsError):  # connected later, when there is a default route already
                netlink.run()


# -- addresses and ports ------------------------------------------------------------------------------------------------------

def parse_subnet(text):
    """An IPv4 network of a size that makes sense for a bridge, as ipaddress has it; host bits may be set."""
    import ipaddress
    try:
        network = ipaddress.IPv4Network(text, strict=False)
    except ValueError:
        raise BadRequest("invalid subnet \"%s\": use an IPv4 network such as 172.20.0.0/24" % text)
    if not 8 <= network.prefixlen <= 30:
        raise BadRequest("invalid subnet \"%s\": the prefix length goes from 8 to 30" % text)
    return network


class AddressPool:
    """The addresses of a subnet, given out in order and from the start again at its end: one that comes back is used again only
    when the others have been."""

    def __init__(self, subnet, ip_range=None, reserved=()):
        import ipaddress
        self.make = ipaddress.IPv4Address
        self.subnet = parse_subnet(subnet)
        part = parse_subnet(ip_range) if ip_range else self.subnet
        if not part.subnet_of(self.subnet):
            raise BadRequest("invalid IPRange %s: it is not within the subnet %s" % (ip_range, subnet))
        edges = (int(self.subnet.network_address), int(self.subnet.broadcast_address))
        self.first, self.last = max(int(part.network_address), edges[0] + 1), min(int(part.broadcast_address), edges[1] - 1)
        self.next, self.used = self.first, {int(self.make(address)) for address in reserved}
        self.lock = threading.Lock()

    def acquire(self, address=None):
        """The next free address, or that one. Forbidden when it is in use or none is left."""
        with self.lock:
            number = self._check(address) if address else self._search()
            self.used.add(number)
            return str(self.make(number))

    def _check(self, address):
        try:
            number = int(self.make(address))
        except ValueError:
            raise BadRequest("invalid IPv4 address: %s" % address)
        if self.make(number) not in self.subnet:
            raise BadRequest("no configured subnet contains IP address %s" % address)
        if number in self.used or number in (int(self.subnet.network_address), int(self.subnet.broadcast_address)):
            raise Forbidden("Address already in use")
        return number

    def _search(self):
        for _ in range(self.last - self.first + 1):
            number, self.next = self.next, self.next + 1 if self.next < self.last else self.first
            if number not in self.used:
                return number
        raise Forbidden("no available IPv4 addresses on this network's address pools: %s" % self.subnet)

    def take(self, address):
        """Note an address as used that a live container has from an earlier daemon."""
        with self.lock:
            self.used.add(int(self.make(address)))

    def release(self, address):
        with self.lock:
            self.used.discard(int(self.make(address)))


def _open_listener(proto, address, port):
    """A bound socket (TCP: listening). OSError when it cannot be had."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM if proto == "tcp" else socket.SOCK_DGRAM)
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if proto == "tcp":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        if proto == "tcp":
            listener.listen(4096)
        listener.setblocking(False)
        return listener
    except BaseException:
        listener.close()
        raise


class PortPool:
    """The host's ports that are published, and new ones for those that did not ask: in order, from the start again at the end,
    skipping what somebody else on the host uses (the range overlaps the ports of outgoing connections)."""

    def __init__(self, first=FIRST_PORT, last=LAST_PORT):
        self.first, self.last = first, last
        self.next = {"tcp": first, "udp": first}
        self.used = {"tcp": {}, "udp": {}}  # proto: {port: addresses}
        self.lock = threading.Lock()

    def acquire(self, proto, address, choice, redirected):
        """(port, listener). `choice`: the (first, last) port that is wanted, or None for the next free one. `redirected`: a DNAT
        rule will serve all but 127.0.0.1, so the listener of a wildcard address is there alone. OSError EADDRINUSE when all that
        was wanted is in use; its text is the end of docker's sentence."""
        with self.lock:
            if choice is None:
                return self._search(proto, address, redirected)
            for port in range(choice[0], choice[1] + 1):
                try:
                    return port, self._take(proto, address, port, redirected)
                except OSError as error:
                    if port == choice[1]:
                        raise error

    def _search(self, proto, address, redirected):
        for _ in range(self.last - self.first + 1):
            port = self.next[proto]
            self.next[proto] = port + 1 if port < self.last else self.first
            with contextlib.suppress(OSError):
                return port, self._take(proto, address, port, redirected)
        raise OSError(errno.EADDRINUSE, "all ports are allocated")

    def _take(self, proto, address, port, redirected):
        taken = self.used[proto].get(port, ())
        shown = ("[%s]:%d" if ":" in address else "%s:%d") % (address or "0.0.0.0", port)
        if taken and (address in WILDCARDS or address in taken or any(other in WILDCARDS for other in taken)):
            raise OSError(errno.EADDRINUSE, "Bind for %s failed: port is already allocated" % shown)
        try:
            listener = _open_listener(proto, address or "0.0.0.0", port)
            if redirected and address in ("", "0.0.0.0"):
                listener.close()
                listener = _open_listener(proto, "127.0.0.1", port)
        except OSError as error:
            raise OSError(error.errno, "failed to bind host port for %s: %s" % (shown, os.strerror(error.errno).lower()))
        self.used[proto].setdefault(port, set()).add(address)
        return listener

    def take(self, proto, address, port):
        """Note a port that a live monitor listens on since an earlier daemon."""
        with self.lock:
            self.used[proto].setdefault(port, set()).add(address)

    def release(self, proto, address, port):
        with self.lock:
            addresses = self.used[proto].get(port, set())
            addresses.discard(address)
            if not addresses:
                self.used[proto].pop(port, None)


def parse_host_port(text):
    """The HostPort of a binding: "" or "0" is None (any), `80` (80, 80), `8000-8010` (8000, 8010)."""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(text or "0"))
    first, last = (int(match.group(1)), int(match.group(2) or match.group(1))) if match else (1, 0)
    if not first <= last <= 65535:
        raise BadRequest("invalid port specification: \"%s\"" % text)
    return (first, last) if last else None


# -- firewall -----------------------------------------------------------------------------------------------------------------
# The rules are data: {(table, chain): [rule]}, a rule is a list of (match, value) that ends with the verdict. They are written in
# two languages, iptables-restore's and nft's, as one transaction in one call. Chains of ours are written whole from what is live,
# so that what has gone leaves nothing and nothing stands there twice; only when there is nothing but a rule to add at the end, as
# at a start, it is added: the kernel waits 10 to 30 ms (an RCU grace period) whenever a rule goes.

# match or verdict: (iptables, nft)
_RULE_WORDS = {
    "in": ("-i %s", "iifname \"%s\""), "out": ("-o %s", "oifname \"%s\""),
    "from": ("-s %s", "ip saddr %s"), "to": ("-d %s", "ip daddr %s"), "not to": ("! -d %s", "ip daddr != %s"),
    "local": ("-m addrtype --dst-type LOCAL", "fib daddr type local"),
    "tcp": ("-p tcp -m tcp --dport %d", "tcp dport %d"), "udp": ("-p udp -m udp --dport %d", "udp dport %d"),
    "established": ("-m conntrack --ctstate RELATED,ESTABLISHED", "ct state established,related"),
    "redirected": ("-m conntrack --ctstate DNAT", "ct status dnat"),
    "accept": ("-j ACCEPT", "accept"), "drop": ("-j DROP", "drop"), "return": ("-j RETURN", "return"),
    "masquerade": ("-j MASQUERADE", "masquerade"), "redirect": ("-j DNAT --to-destination %s", "dnat to %s"),
    "jump": ("-j %s", "jump %s"),
}
# chain: how the kernel calls it where there is no iptables to have made it
_HOOKS = {"PREROUTING": "type nat hook prerouting priority -100", "OUTPUT": "type nat hook output priority -100",
          "POSTROUTING": "type nat hook postrouting priority 100", "FORWARD": "type filter hook forward priority 0"}
_USER_CHAIN = "DOCKER-USER"  # where administrators put rules of their own; asked first, never changed by us
# Chains of ours, for the default bridge; those of a daemon with another one (-b) end with its name, so that several daemons can
# share a host. 28 characters is the longest name that iptables takes.
_REDIRECT_CHAIN, _FORWARD_CHAIN, _PUBLISHED_CHAIN = "PYDOCK", "PYDOCK-FWD", "PYDOCK-PUB"


def _write_rule(rule, language):
    words = ((_RULE_WORDS[word][language], value) for word, value in rule)
    return " ".join(text % value if value is not None else text for text, value in words)


def redirect_rules(published, suffix=""):
    """The rules of the published ports, which change with the containers; published: as Networks has it. What is published on
    127.0.0.1 has none: the proxy alone serves it, or it could be reached from the network (moby#45610)."""
    redirect, accept = [], []
    for port in published:
        if not port["redirected"]:
            continue
        match = [] if port["HostIp"] in WILDCARDS else [("to", port["HostIp"] + "/32")]
        redirect.append(match + [(port["proto"], port["HostPort"]), ("redirect", "%s:%d" % (port["address"], port["port"]))])
        accept.append([("to", port["address"] + "/32"), (port["proto"], port["port"]), ("redirected", None), ("accept", None)])
    return {("nat", _REDIRECT_CHAIN + suffix): redirect, ("filter", _PUBLISHED_CHAIN + suffix): accept}


def network_rules(networks, suffix=""):
    """The rules of the networks, which change with them. To a bridge goes what was asked for from inside, what is published, and
    what comes from the same bridge; all else is dropped, also what another network or a neighbour of this host routes here."""
    jump_local, nat, to_bridges, from_bridges = [("local", None), ("jump", _REDIRECT_CHAIN + suffix)], [], [], []
    for network in networks:
        bridge, subnet = network.bridge, network.subnet
        inside = "accept" if network.option(_ICC) else "drop"
        if network.internal:
            to_bridges += [[("in", bridge), ("out", bridge), (inside, None)], [("out", bridge), ("drop", None)]]
            from_bridges.append([("in", bridge), ("drop", None)])
            continue
        if network.option(_MASQUERADE):
            nat.append([("from", subnet), ("not to", subnet), ("masquerade", None)])
        # A container that reaches another by the host's address: its answer has to come back through the host, too.
        nat.append([("from", subnet), ("out", bridge), ("redirected", None), ("masquerade", None)])
        to_bridges += [[("out", bridge), ("established", None), ("accept", None)],
                       [("out", bridge), ("jump", _PUBLISHED_CHAIN + suffix)],
                       [("in", bridge), ("out", bridge), (inside, None)],
                       [("out", bridge), ("drop", None)]]
        from_bridges.append([("in", bridge), ("accept", None)])
    return {("nat", "PREROUTING"): [jump_local], ("nat", "OUTPUT"): [[("not to", "127.0.0.0/8")] + jump_local],
            ("nat", "POSTROUTING"): nat, ("filter", _FORWARD_CHAIN + suffix): to_bridges + from_bridges,
            ("filter", "FORWARD"): [[("jump", _USER_CHAIN)], [("jump", _FORWARD_CHAIN + suffix)]]}


def _run_program(arguments, text=None):
    """Run a program of the firewall with text on its input; its output. OSError or Error with what it said."""
    import subprocess
    environment = {"PATH": DEFAULT_PATH, "LC_ALL": "C"}
    done = subprocess.run(arguments, input=text, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
                          universal_newlines=True, stdin=None if text is not None else subprocess.DEVNULL)
    if done.returncode:
        raise Error("%s: %s" % (arguments[0], " ".join(done.stderr.split())[:500] or "status %d" % done.returncode))
    return done.stdout


class Iptables:
    """The back end for iptables-restore. In the chains that are not ours it adds what is missing and takes away what stands there
    twice or is out of date: POSTROUTING then looks as it did in 2013."""
    name, program = "iptables", "iptables-restore"

    def __init__(self, suffix="", earlier=()):
        self.earlier = {tuple(rule) for rule in earlier}  # (table, rule) that an earlier call put in chains that are not ours

    def add(self, rules):
        """Add rules at the end of chains of ours."""
        tables = {"nat": [], "filter": []}
        for (table, chain), content in rules.items():
            tables[table] += ["-A %s %s" % (chain, _write_rule(rule, 0)) for rule in content]
        self._restore(tables)

    def replace(self, rules):
        """Write chains of ours."""
        self._restore(self._own_chains(rules))

    def write(self, rules, drop_forwarded=False):
        """Write all: chains of ours, and the rules that lead there from those of the system."""
        saved = self._saved()
        tables = self._own_chains(rules)
        if not any(line.startswith(":%s " % _USER_CHAIN) for line in saved["filter"]):
            tables["filter"] += [":%s - [0:0]" % _USER_CHAIN, "-A %s -j RETURN" % _USER_CHAIN]
        if drop_forwarded:
            tables["filter"].append(":FORWARD DROP [0:0]")
        wanted = set()
        for (table, chain), content in rules.items():
            if chain in _HOOKS:
                lines = ["-A %s %s" % (chain, _write_rule(rule, 0)) for rule in content]
                wanted.update((table, line) for line in lines)
                tables[table] += (self._lead if chain == "FORWARD" else self._add_missing)(lines, saved[table])
        for table, line in self.earlier - wanted:
            tables[table] += ["-D" + line[2:]] * saved[table].count(line)
        self._restore(tables)
        self.earlier = wanted

    def complete(self, rules):
        """Whether the rules in the system's chains are there, each once, and all chains of ours."""
        saved = self._saved()
        return not self._missing(rules, saved) and all(
            saved[table].count("-A %s %s" % (chain, _write_rule(rule, 0))) == 1
            for (table, chain), content in rules.items() if chain in _HOOKS for rule in content)

    def obstacles(self):
        return []

    def remove(self, rules, drop_forwarded=False):
        """Take away all that is ours; the chain of the administrators stays."""
        saved = self._saved()
        tables = {"nat": [], "filter": [":FORWARD ACCEPT [0:0]"] if drop_forwarded else []}
        for (table, chain), content in rules.items():
            for rule in content if chain in _HOOKS else ():
                line = "-A %s %s" % (chain, _write_rule(rule, 0))
                tables[table] += ["-D" + line[2:]] * (saved[table].count(line) if rule != [("jump", _USER_CHAIN)] else 0)
        ours = [key for key in rules if key[1] not in _HOOKS and key not in self._missing(rules, saved)]
        for verb in ("-F", "-X"):
            for table, chain in ours:
                tables[table].append("%s %s" % (verb, chain))
        self._restore(tables)
        self.earlier = set()

    def _saved(self):
        """The system's rules: {table: lines}."""
        tables = {"nat": [], "filter": []}
        lines = []
        for line in _run_program(["iptables-save"]).splitlines():
            if line.startswith("*"):
                lines = tables.setdefault(line[1:], [])
            lines.append(line)
        return tables

    @staticmethod
    def _missing(rules, saved):
        return [(table, chain) for table, chain in rules
                if chain not in _HOOKS and not any(line.startswith(":%s " % chain) for line in saved[table])]

    @staticmethod
    def _own_chains(rules):
        tables = {"nat": [], "filter": []}
        for (table, chain), content in rules.items():
            if chain not in _HOOKS:  # declared, a chain is emptied first
                tables[table].insert(0, ":%s - [0:0]" % chain)
                tables[table] += ["-A %s %s" % (chain, _write_rule(rule, 0)) for rule in content]
        return tables

    @staticmethod
    def _add_missing(lines, saved):
        return [verb + line[2:] for line in lines
                for verb in (["-A"] if line not in saved else ["-D"] * (saved.count(line) - 1))]

    @staticmethod
    def _lead(lines, saved):
        """These come first, in this order: before an ACCEPT of somebody else, that is."""
        there = [line for line in saved if line in lines]
        if there == lines:
            return []
        return ["-D" + line[2:] for line in there] + ["-I FORWARD 1" + line[len("-A FORWARD"):] for line in reversed(lines)]

    def _restore(self, tables):
        text = "".join("*%s\n%s\nCOMMIT\n" % (table, "\n".join(lines)) for table, lines in tables.items() if lines)
        if text:
            _run_program([self.program, "--noflush", "--wait"], text)


class Nftables:
    """The back end for nft, where there is no iptables: a table of our own. An accept there does not lift what another table
    drops."""
    name, program = "nftables", "nft"
    earlier = frozenset()

    def __init__(self, suffix="", earlier=()):
        self.table = "ip pydock" + suffix

    def add(self, rules):
        self._apply(self._rules(rules))

    def replace(self, rules):
        self.write(rules)

    def write(self, rules, drop_forwarded=False):
        lines = ["add table %s" % self.table, "add chain %s %s" % (self.table, _USER_CHAIN)]
        for _, chain in rules:
            policy = "drop" if drop_forwarded and chain == "FORWARD" else "accept"
            kind = " { %s ; policy %s ; }" % (_HOOKS[chain], policy) if chain in _HOOKS else ""
            lines += ["add chain %s %s%s" % (self.table, chain, kind), "flush chain %s %s" % (self.table, chain)]
        self._apply(lines + self._rules(rules))

    def _rules(self, rules):
        return ["add rule %s %s %s" % (self.table, chain, _write_rule(rule, 1))
                for (_, chain), content in rules.items() for rule in content]

    def complete(self, rules):
        try:
            text = _run_program([self.program, "list", "table"] + self.table.split())
        except Error:
            return False
        return all("chain %s {" % chain in text for _, chain in rules)

    def obstacles(self):
        """Sentences about chains of others that drop what ours accept."""
        found, table, chain = [], "", ""
        for line in _run_program([self.program, "list", "chains"]).splitlines():
            words = line.split()
            if words[:1] == ["table"]:
                table = " ".join(words[1:3])
            elif words[:1] == ["chain"]:
                chain = words[1]
            elif "hook forward" in line and "policy drop" in line and not table.startswith("ip pydock"):
                found.append("the nftables chain %s of table %s drops what it does not know, also what is meant for containers"
                             % (chain, table))
        return found

    def remove(self, rules, drop_forwarded=False):
        try:
            text = _run_program([self.program, "list", "chain"] + self.table.split() + [_USER_CHAIN])
        except Error:
            return
        if len(text.strip().splitlines()) <= 4:  # table and chain, opened and closed: nobody put a rule there
            self._apply(["delete table %s" % self.table])
        else:
            self._apply(["%s chain %s %s" % (verb, self.table, chain) for verb in ("flush", "delete") for _, chain in rules])

    def _apply(self, lines):
        _run_program([self.program, "-f", "-"], "\n".join(lines) + "\n")


class Firewall:
    """The rules in the kernel, by the first back end that works; `backend` is None where there is none, or none is wanted."""

    def __init__(self, wanted=True, suffix="", earlier=()):
        import shutil
        kinds = [kind for kind in (Iptables, Nftables) if wanted and shutil.which(kind.program, path=DEFAULT_PATH)]
        self.backends = [kind(suffix, earlier) for kind in kinds]
        self.backend, self.warnings, self.suffix = None, [], suffix
        self.drop_forwarded = False  # we switched forwarding on, and keep this host from routing for its neighbours
        self.writing, self.counting = threading.Lock(), threading.Lock()
        self.asked = self.done = 0  # calls of publish that began; those whose wishes are in the kernel
        self.written = {}  # the rules of the published ports, as they were written last

    def write(self, networks, published):
        """Put all rules there, anew; whether there is a firewall."""
        self.warnings = []
        while self.backends:
            try:
                with self.writing:
                    self.backends[0].write(self._rules(networks, published), self.drop_forwarded)
                    self.written = redirect_rules(published, self.suffix)
                self.backend = self.backends[0]
                self.warnings += self.backend.obstacles()
                return True
            except (Error, OSError) as error:
                if self.backend:  # it has worked before: no reason to change it
                    raise
                self.warnings.append("%s cannot be used: %s" % (self.backends[0].name, error))
                del self.backends[0]
        self.warnings.append("without iptables and nft containers reach nothing outside this host, and published ports are "
                             "served by proxies alone")
        return False

    def publish(self, snapshot):
        """Write the rules of the published ports, which snapshot() returns. When many threads ask at once, one call serves all
        that asked before it began."""
        if not self.backend:
            return
        with self.counting:
            self.asked += 1
            mine = self.asked
        with self.writing:
            if self.done >= mine:
                return
            with self.counting:
                goal = self.asked
            self._write_redirects(redirect_rules(snapshot(), self.suffix))
            self.done = goal

    def _write_redirects(self, rules):
        if all(rules[key][:len(old)] == old for key, old in self.written.items()):
            try:
                self.backend.add({key: content[len(self.written[key]):] for key, content in rules.items()})
                self.written = rules
                return
            except Error as error:  # somebody has removed our chains
                debug("adding a rule: %s" % error)
        self.backend.replace(rules)
        self.written = rules

    def complete(self, networks, published):
        """Whether all is still there; somebody may have flushed it (CVE-2025-54388)."""
        return not self.backend or self.backend.complete(self._rules(networks, published))

    def remove(self, networks):
        if self.backend:
            with self.writing:
                self.backend.remove(self._rules(networks, []), self.drop_forwarded)

    def _rules(self, networks, published):
        return {**redirect_rules(published, self.suffix), **network_rules(networks, self.suffix)}


# -- proxies ------------------------------------------------------------------------------------------------------------------
# They run in the monitor: one epoll loop for all published ports of a container, in a thread that starts with the first
# connection and not before. TCP moves through pipes by splice, so that no byte comes to user space; a pipe is held only while it
# has data that its reader does not take. So thousands of idle connections cost two descriptors each, and no thread.

_IP_PKTINFO = 8  # linux/in.h; the socket module has it in newer versions only
_UDP_IDLE, _MOST_UDP_CLIENTS = 90, 1024
_SPLICE_BLOCK = 1 << 18


class ProxyLoop:
    """The loop of one monitor. It has a fileno, readable when there is something to do: the monitor waits for it among its own
    descriptors and then starts a thread with `run`."""

    def __init__(self):
        self.epoll, self.handlers, self.proxies, self.pipes = select.epoll(), {}, [], []
        self.connections, self.most = 0, 0  # live, and how many there may be
        self.running, self.closing = False, False

    def fileno(self):
        return self.epoll.fileno()

    def serve(self, proto, listener, target):
        """Forward what comes to a listener to target, (address, port)."""
        self.proxies.append((TcpProxy if proto == "tcp" else UdpProxy)(self, listener, target))

    def watch(self, source, events, handler=None):
        """Call handler() when one of the events is there on a socket; events 0: no more. Not even for a hang-up, which epoll
        reports always, and would again and again while its reader is slow."""
        fd = source.fileno()
        if not events:
            if self.handlers.pop(fd, None):
                self.epoll.unregister(fd)
        elif fd in self.handlers:
            self.handlers[fd] = handler
            self.epoll.modify(fd, events)
        else:
            self.handlers[fd] = handler
            self.epoll.register(fd, events)

    def run(self):
        """Serve until `close`: the body of a thread."""
        self.running = True
        self._make_room()
        while not self.closing:
            for fd, _ in self.epoll.poll(min(proxy.patience for proxy in self.proxies), 64):
                self._handle(fd)
            for proxy in self.proxies:
                proxy.sweep()
        self._close()

    def _handle(self, fd):
        handler = self.handlers.get(fd)
        try:
            if handler:
                handler()
        except OSError as error:  # of one connection: the others go on
            debug("proxy: %s" % error)

    def _make_room(self):
        """As many descriptors as we may have, and as many connections as those are enough for: two sockets and, while both
        directions wait for slow readers, two pipes each. The others wait in the listener's queue."""
        import resource
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = min(65536, hard) if hard != resource.RLIM_INFINITY else 65536
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
                soft = wanted
        self.most = max(16, ((soft if soft != resource.RLIM_INFINITY else 65536) - 128) // 6)

    def take_pipe(self):
        return self.pipes.pop() if self.pipes else os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def return_pipe(self, pipe, empty=True):
        if empty and len(self.pipes) < 4:
            self.pipes.append(pipe)
        else:
            os.close(pipe[0])
            os.close(pipe[1])

    def close(self):
        """End all connections and listeners; the thread does it, where there is one."""
        if not self.running:
            return self._close()
        self.closing = True
        wake, other = os.pipe()  # readable, as its other end is closed: the loop looks up
        os.close(other)
        self.epoll.register(wake, select.EPOLLIN)

    def _close(self):
        for proxy in self.proxies:
            proxy.close()
        self.proxies = []
        while self.pipes:
            self.return_pipe(self.pipes.pop(), False)


def _dial(kind, target):
    """A non-blocking socket that is connecting to target, from the host's side of the bridge: its peer sees the bridge's address
    and never takes a stranger for a local user (CVE-2021-20199)."""
    connection = socket.socket(socket.AF_INET6 if ":" in target[0] else socket.AF_INET, kind)
    try:
        connection.setblocking(False)
        code = connection.connect_ex(target)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        return connection
    except BaseException:
        connection.close()
        raise


class TcpProxy:
    """Accepts connections and pairs each with one to the container."""
    patience = 30  # seconds until sweep is wanted

    def __init__(self, loop, listener, target):
        self.loop, self.listener, self.target, self.live = loop, listener, target, set()
        listener.setblocking(False)
        self.accepting(True)

    def accepting(self, on):
        self.loop.watch(self.listener, select.EPOLLIN if on else 0, self._accept)

    def _accept(self):
        for _ in range(32):
            if self.loop.connections >= self.loop.most > 0:
                return self.accepting(False)
            try:
                client, _ = self.listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                    self.accepting(False)
                return
            try:
                server = _dial(socket.SOCK_STREAM, self.target)
            except OSError:
                client.close()
                continue
            self.loop.connections += 1
            self.live.add(_Connection(self, client, server))

    def ended(self, connection):
        self.live.discard(connection)
        self.loop.connections -= 1
        for proxy in self.loop.proxies:
            if isinstance(proxy, TcpProxy) and proxy.listener.fileno() >= 0:
                proxy.accepting(True)

    def sweep(self):
        if not self.live and self.listener.fileno() >= 0:  # what stopped it was another's shortage of descriptors
            self.accepting(True)

    def close(self):
        self.accepting(False)
        self.listener.close()
        for connection in list(self.live):
            connection.close()


class _Connection:
    """Two sockets, and the two directions between them. An end of stream goes through as such, after the data before it."""

    def __init__(self, proxy, client, server):
        self.proxy, self.loop, self.sockets, self.connecting = proxy, proxy.loop, (client, server), True
        self.directions = (_Direction(self.loop, client, server), _Direction(self.loop, server, client))
        client.setblocking(False)
        for connection in self.sockets:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._watch()

    def _advance(self):
        try:
            if self.connecting:
                code = self.sockets[1].getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code:
                    raise OSError(code, os.strerror(code))
                self.connecting = False
            for direction in self.directions:
                direction.advance()
        except OSError:
            return self.close()
        if all(direction.done for direction in self.directions):
            return self.close()
        self._watch()

    def _watch(self):
        """Wait for what would help: data of a socket whose pipe is empty, room in a socket whose pipe is not."""
        for number, connection in enumerate(self.sockets):
            reading, writing = self.directions[number], self.directions[1 - number]
            events = 0
            if self.connecting:
                events = select.EPOLLOUT if number else 0
            else:
                events |= select.EPOLLIN if not reading.ended and not reading.pending else 0
                events |= select.EPOLLOUT if writing.pending else 0
            self.loop.watch(connection, events, self._advance)

    def close(self):
        for connection in self.sockets:
            self.loop.watch(connection, 0)
            connection.close()
        for direction in self.directions:
            direction.drop_pipe()
        self.proxy.ended(self)


class _Direction:
    """From one socket through a pipe to another."""

    def __init__(self, loop, source, target):
        self.loop, self.source, self.target = loop, source, target
        self.pipe, self.pending, self.ended, self.done = None, 0, False, False  # pending: bytes in the pipe

    def advance(self):
        """Move what can be moved, not for so long that others starve. OSError when either end is broken."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(8):
                if not self.pending and not self.ended:
                    self.pipe = self.pipe or self.loop.take_pipe()
                    self.pending = splice(self.source.fileno(), self.pipe[1], _SPLICE_BLOCK, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
                    self.ended = not self.pending
                if self.pending:
                    self.pending -= splice(self.pipe[0], self.target.fileno(), self.pending, SPLICE_F_MOVE | SPLICE_F_NONBLOCK)
                elif not self.done:
                    self.done = True
                    self.target.shutdown(socket.SHUT_WR)
                if self.done:
                    break
        if not self.pending:
            self.drop_pipe()

    def drop_pipe(self):
        if self.pipe:
            self.loop.return_pipe(self.pipe, not self.pending)
            self.pipe = None


class UdpProxy:
    """Datagrams have no connections: each client gets a socket of its own to the container, until it has been silent for a
    while."""
    patience = 30

    def __init__(self, loop, listener, target):
        self.loop, self.listener, self.target = loop, listener, target
        # {(client's address, the control data that names our own): [socket, time of the last datagram]}, oldest first
        self.clients = {}
        self.six = listener.family == socket.AF_INET6
        level, option = (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO) if self.six else (socket.IPPROTO_IP, _IP_PKTINFO)
        listener.setsockopt(level, option, 1)
        listener.setblocking(False)
        loop.watch(listener, select.EPOLLIN, self._receive)

    def _receive(self):
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                data, ancillary, _, address = self.listener.recvmsg(65535, 128)
                key = (address, self._own_address(ancillary))
                with contextlib.suppress(OSError):  # nobody listens in the container: as with any lost datagram
                    self._client(key).send(data)

    def _own_address(self, ancillary):
        """The control data that lets an answer come from the address that was asked: this host has several."""
        for level, kind, data in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO):
                return level, kind, struct.pack("=i4s4s", 0, data[8:12], bytes(4))  # in_pktinfo: ipi_spec_dst := ipi_addr
            if (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                return level, kind, data
        return None

    def _client(self, key):
        entry = self.clients.pop(key, None)
        if entry is None:
            if len(self.clients) >= _MOST_UDP_CLIENTS:
                self._forget(next(iter(self.clients)))
            entry = [_dial(socket.SOCK_DGRAM, self.target), 0]
            self.loop.watch(entry[0], select.EPOLLIN, lambda: self._answer(key, entry[0]))
        entry[1] = time.monotonic()
        self.clients[key] = entry
        return entry[0]

    def _answer(self, key, connection):
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                try:
                    data = connection.recv(65535)
                except ConnectionError:  # an ICMP message: port unreachable
                    continue
                self._client(key)
                with contextlib.suppress(OSError):
                    self.listener.sendmsg([data], [key[1]] if key[1] else [], 0, key[0])

    def _forget(self, key):
        connection, _ = self.clients.pop(key)
        self.loop.watch(connection, 0)
        connection.close()

    def sweep(self):
        limit = time.monotonic() - _UDP_IDLE
        for key in [key for key, entry in self.clients.items() if entry[1] < limit]:
            self._forget(key)

    def close(self):
        self.loop.watch(self.listener, 0)
        self.listener.close()
        for key in list(self.clients):
            self._forget(key)


# -- names --------------------------------------------------------------------------------------------------------------------
# In a network that a user has made, containers find each other by name: they ask 127.0.0.11, and the monitor answers from a file
# that the daemon writes, or passes the question on to the host's servers. Init makes the sockets, inside the namespace. They are
# on ports of their own, and a program in the kernel steers to them what is sent to port 53 of that one address: so a server that
# the container runs on 0.0.0.0:53 is not in the way, nor are we in its way, and no firewall is needed in there.

RESOLVER_ADDRESS, DNS_PORT = "127.0.0.11", 53
_TTL, _MOST_QUESTIONS, _PATIENCE = 600, 256, 4  # seconds; questions that are passed on at a time; seconds for a server to answer
_TYPE_A, _TYPE_PTR, _TYPE_AAAA, _CLASS_IN = 1, 12, 28, 1
_NO_ERROR, _SERVER_FAILURE, _NO_SUCH_NAME, _TRUNCATED = 0, 2, 3, 0x0200


def open_resolver():
    """The resolver's sockets, made inside the container's network namespace after configure_network: descriptors for the monitor,
    [udp, tcp, raw, steering]. On Linux before 5.9, or where bpf(2) is not permitted, [udp, tcp] on port 53 itself; then a server
    of the container's cannot have that port on 0.0.0.0."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sockets = [udp, tcp]
    try:
        udp.bind((RESOLVER_ADDRESS, 0))
        tcp.bind((RESOLVER_ADDRESS, 0))
        tcp.listen(64)
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        sockets.append(raw)
        return _detached(sockets, [steer_to_sockets(RESOLVER_ADDRESS, DNS_PORT, udp, tcp)])
    except OSError:
        for one in sockets:
            one.close()
    return _detached([_open_listener(proto, RESOLVER_ADDRESS, DNS_PORT) for proto in ("udp", "tcp")], [])


def _detached(sockets, fds):
    return [one.detach() for one in sockets] + fds


def _encode_name(name):
    return b"".join(bytes([len(label)]) + label for label in name.encode().split(b".") if label) + b"\0"


def _parse_question(data):
    """(name in lower case, type, class, end of the question) of a DNS query (RFC 1035); ValueError for anything else."""
    if len(data) < 12:
        raise ValueError("short")
    _, flags, questions = struct.unpack_from("!HHH", data)
    if flags & 0xF800 or questions != 1:
        raise ValueError("not one standard query")
    labels, place = [], 12
    while True:
        size = data[place] if place < len(data) else 64
        if size > 63 or place > 12 + 254:
            raise ValueError("bad name")
        place += 1 + size
        if not size:
            break
        labels.append(data[place - size:place])
    if place + 4 > len(data):
        raise ValueError("short")
    kind, group = struct.unpack_from("!HH", data, place)
    return b".".join(labels).decode("latin-1").lower(), kind, group, place + 4


def dns_reply(query, end, code, answers=(), limit=65535):
    """The reply to a query whose question goes up to `end`: answers are (type, data); those beyond the limit are left off and the
    reply is marked as cut, so that the client asks again by TCP."""
    records, flags = b"", 0x8080 | struct.unpack_from("!H", query, 2)[0] & 0x0100 | code
    count = 0
    for kind, data in answers:
        record = struct.pack("!HHHIH", 0xC00C, kind, _CLASS_IN, _TTL, len(data)) + data
        if end + len(records) + len(record) > limit:
            flags |= _TRUNCATED
            break
        records, count = records + record, count + 1
    return query[:2] + struct.pack("!HHHHH", flags, 1, count, 0, 0) + query[12:end] + records


class Resolver:
    """The resolver of one container, in the loop of its monitor. fds: of open_resolver. path: the names file, JSON:
    {"names": {name: [addresses]}, "addresses": {address: name}, "servers": [addresses], "internal": whether to answer from this
    file alone: a network that leads nowhere must not leak by its questions either (CVE-2024-29018)}. The file is read again when
    it has changed."""

    def __init__(self, loop, fds, path):
        self.loop, self.path, self.names, self.stamp = loop, path, {}, None
        self.udp, self.tcp = (socket.socket(fileno=fd) for fd in fds[:2])
        self.raw = socket.socket(fileno=fds[2]) if len(fds) > 2 else None
        self.steering = fds[3:]
        self.questions, self.clients, self.turn = set(), set(), 0
        self.udp.setblocking(False)
        self.tcp.setblocking(False)
        loop.proxies.append(self)
        loop.watch(self.udp, select.EPOLLIN, self._receive)
        loop.watch(self.tcp, select.EPOLLIN, self._accept)

    def _receive(self):
        with contextlib.suppress(BlockingIOError):
            for _ in range(64):
                data, address = self.udp.recvfrom(4096)
                self.ask(data, lambda reply, address=address: self._send(reply, address), False)

    def _send(self, reply, address):
        """An answer must come from the port that was asked. Ours is another: so it is written with its headers (RFC 768, 791)."""
        with contextlib.suppress(OSError):
            if self.raw is None:
                self.udp.sendto(reply, address)
                return
            header = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(reply), 0, 0, 64, socket.IPPROTO_UDP, 0,
                                 socket.inet_aton(RESOLVER_ADDRESS), socket.inet_aton(address[0]))
            self.raw.sendto(header + struct.pack("!HHHH", DNS_PORT, address[1], 8 + len(reply), 0) + reply, address)

    def _accept(self):
        with contextlib.suppress(OSError):
            client, _ = self.tcp.accept()
            if len(self.clients) >= 64:
                client.close()
            else:
                self.clients.add(_DnsStream(self, client))

    def ask(self, data, reply, by_tcp):
        """Answer a query, now or when a server has; what is no query is not answered."""
        try:
            name, kind, group, end = _parse_question(data)
        except ValueError:
            return
        self._read_names()
        limit = 65535 if by_tcp else 512
        found = self._find(name, kind) if group == _CLASS_IN else None
        if found is not None:
            reply(dns_reply(data, end, _NO_ERROR, found, limit))
        elif self.names.get("internal", True):
            reply(dns_reply(data, end, _NO_SUCH_NAME))
        elif len(self.questions) >= _MOST_QUESTIONS:
            reply(dns_reply(data, end, _SERVER_FAILURE))
        else:
            _Question(self, data, end, reply, by_tcp)

    def _read_names(self):
        with contextlib.suppress(OSError, Error):
            status = os.stat(self.path)
            stamp = (status.st_mtime_ns, status.st_ino)
            if stamp != self.stamp:
                self.names, self.stamp = read_json(self.path), stamp

    def _find(self, name, kind):
        """The answers for a name of ours: [] when it has none of that type; None when the name is not ours."""
        if kind == _TYPE_PTR and name.endswith(".in-addr.arpa"):
            address = ".".join(reversed(name[:-len(".in-addr.arpa")].split(".")))
            found = self.names.get("addresses", {}).get(address)
            return None if found is None else [(_TYPE_PTR, _encode_name(found))]
        addresses = self.names.get("names", {}).get(name)
        if addresses is None:
            return None
        if kind != _TYPE_A:
            return []
        self.turn += 1  # several containers with one alias take turns
        turn = self.turn % len(addresses)
        return [(_TYPE_A, socket.inet_aton(address)) for address in addresses[turn:] + addresses[:turn]]

    @property
    def patience(self):
        return 1 if self.questions or self.clients else 30

    def sweep(self):
        now = time.monotonic()
        for waiting in [w for w in list(self.questions) + list(self.clients) if w.deadline < now]:
            waiting.expire()

    def close(self):
        for one in list(self.questions) + list(self.clients):
            one.close()
        for one in (self.udp, self.tcp):
            self.loop.watch(one, 0)
        for one in filter(None, (self.udp, self.tcp, self.raw)):
            one.close()
        for fd in self.steering:
            os.close(fd)


class _Question:
    """A query that was passed on to the host's servers, one after the other until one answers."""

    def __init__(self, resolver, data, end, reply, by_tcp):
        self.resolver, self.data, self.end, self.reply, self.by_tcp = resolver, data, end, reply, by_tcp
        self.servers, self.socket, self.received = list(resolver.names.get("servers", [])), None, b""
        resolver.questions.add(self)
        self.expire()

    def expire(self):
        """Turn to the next server; after the last one, give up."""
        self._hang_up()
        self.deadline = time.monotonic() + _PATIENCE
        while self.servers:
            try:
                server, kind = self.servers.pop(0), socket.SOCK_STREAM if self.by_tcp else socket.SOCK_DGRAM
                pack_address(server)  # a name would be looked up, by us: OSError
                self.socket, self.received = _dial(kind, (server, DNS_PORT)), b""
                self.resolver.loop.watch(self.socket, select.EPOLLOUT, self._send)
                return
            except OSError:
                continue
        self._finish(dns_reply(self.data, self.end, _SERVER_FAILURE))

    def _send(self):
        try:
            self.socket.send((struct.pack("!H", len(self.data)) if self.by_tcp else b"") + self.data)
            self.resolver.loop.watch(self.socket, select.EPOLLIN, self._receive)
        except OSError:
            self.expire()

    def _receive(self):
        try:
            data = self.socket.recv(65535)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self.expire()
        if self.by_tcp:
            self.received += data
            size = struct.unpack_from("!H", self.received)[0] if len(self.received) > 1 else 65535
            if len(self.received) < 2 + size:
                return
            data = self.received[2:2 + size]
        # What somebody else sent to guess at our port: not the answer to this question.
        if data[:2] == self.data[:2] and data[2:3] >= b"\x80" and data[12:self.end].lower() == self.data[12:self.end].lower():
            self._finish(data)

    def _hang_up(self):
        if self.socket:
            self.resolver.loop.watch(self.socket, 0)
            self.socket.close()
            self.socket = None

    def _finish(self, reply):
        self.close()
        self.reply(reply)

    def close(self):
        self._hang_up()
        self.resolver.questions.discard(self)


class _DnsStream:
    """A client by TCP: queries with their length before them, one after the other."""

    def __init__(self, resolver, client):
        self.resolver, self.socket, self.received = resolver, client, b""
        client.settimeout(1)  # for what we send: short, to a process on this machine that has asked for it
        self.deadline = time.monotonic() + 10
        resolver.loop.watch(client, select.EPOLLIN, self._receive)

    def _receive(self):
        try:
            data = self.socket.recv(4096)
        except OSError:
            data = b""
        self.received += data
        if not data or len(self.received) > 1 << 16:
            return self.close()
        while len(self.received) > 1:
            size = struct.unpack_from("!H", self.received)[0]
            if len(self.received) < 2 + size:
                break
            query, self.received = self.received[2:2 + size], self.received[2 + size:]
            self.resolver.ask(query, self._send, True)

    def _send(self, reply):
        try:
            self.socket.sendall(struct.pack("!H", len(reply)) + reply)
            self.deadline = time.monotonic() + 10
        except OSError:
            self.close()

    def expire(self):
        self.close()

    def close(self):
        if self in self.resolver.clients:
            self.resolver.clients.discard(self)
            self.resolver.loop.watch(self.socket, 0)
            self.socket.close()


# -- networks -----------------------------------------------------------------------------------------------------------------

class Network:
    """One network. Persisted are: id, name, driver (bridge, host, null), created (ns), subnet, gateway, ip_range, bridge (the
    interface; "" with the other drivers), options, labels, internal, attachable and ipam (as the API got it). endpoints:
    {id: endpoint}, those that are live; containers keep them on disk."""
    FIELDS = ("id", "name", "driver", "created", "subnet", "gateway", "ip_range", "bridge", "options", "labels", "internal",
              "attachable", "ipam")

    def __init__(self, state):
        for field in self.FIELDS:
            setattr(self, field, state.get(field))
        self.endpoints, self.pool = {}, None
        if self.subnet:
            self.pool = AddressPool(self.subnet, self.ip_range, [self.gateway] if self.gateway else [])

    def state(self):
        return {field: getattr(self, field) for field in self.FIELDS}

    @property
    def predefined(self):
        return self.name in _PREDEFINED

    @property
    def mtu(self):
        return int(self.options.get(_MTU) or 1500)

    def option(self, name):
        """An option that is on unless it says false."""
        return str(self.options.get(name, "true")).lower() not in ("false", "0")

    def to_api(self, containers=True):
        """docker's Network object; lists of networks come without the containers."""
        config = [{"Subnet": self.subnet, "Gateway": self.gateway}] if self.subnet else []
        if config and self.ip_range:
            config[0]["IPRange"] = self.ip_range
        members = {e["container"]: {"Name": e["name"], "EndpointID": e["EndpointID"], "MacAddress": e["MacAddress"],
                                    "IPv4Address": "%s/%d" % (e["IPAddress"], e["IPPrefixLen"]), "IPv6Address": ""}
                   for e in list(self.endpoints.values())} if containers else {}
        return {"Name": self.name, "Id": self.id, "Created": format_time(self.created), "Scope": "local", "Driver": self.driver,
                "EnableIPv4": True, "EnableIPv6": False,
                "IPAM": {"Driver": "default", "Options": self.ipam.get("Options"), "Config": config},
                "Internal": self.internal, "Attachable": self.attachable, "Ingress": False, "ConfigFrom": {"Network": ""},
                "ConfigOnly": False, "Containers": members, "Options": self.options, "Labels": self.labels}


def endpoint_settings(endpoint):
    """docker's EndpointSettings of an endpoint: its keys begin with a capital, ours do not."""
    return {key: value for key, value in endpoint.items() if key[0].isupper()}


def _new_id():
    return os.urandom(32).hex()


class Networks:
    """The daemon's networks. root: the data root, for networks.json. options: bridge (name, "none", or None for our own), mtu,
    icc, iptables (False: no rules, proxies only), ip (the address to publish on where none is said).

    warnings: sentences for the log and `info`. published: [{endpoint, proto, HostIp, HostPort, address, port, redirected}] of all
    containers; each record is kept on disk by its container, as the endpoints are, and comes back through `restore`."""

    def __init__(self, root, options=None):
        self.path, self.options = os.path.join(root, "networks.json"), options or {}
        self.lock = threading.RLock()
        self.ports, self.published, self.warnings = PortPool(), [], []
        state, bridge = read_json(self.path, {}), self.options.get("bridge") or BRIDGE
        suffix = "" if bridge == BRIDGE else "-" + re.sub(r"[^\w.-]", "_", bridge)[:15]
        self.firewall = Firewall(self.options.get("iptables", True), suffix, state.get("rules", ()))
        self.forwarding_is_ours = state.get("forwarding", False)
        self.networks = {entry["id"]: Network(entry) for entry in state.get("networks", [])}

    # start

    def start(self, live=()):
        """Set the host up: networks, bridges, rules. `live`: [{endpoints, published}] of the containers that have outlived an
        earlier daemon. What this host cannot do ends up in `warnings`; then only host and none work."""
        for name, driver in _PREDEFINED.items():
            if not any(network.name == name for network in self.networks.values()):
                self._add(self._define(name, driver))
        self.warnings = []
        try:
            self._start_bridges()
        except (Error, OSError) as error:
            reason = os_error_text(error) if isinstance(error, OSError) else error
            self.warnings.append("networks cannot be set up, only --net host and none work: %s" % reason)
        for container in live:
            self.restore(container.get("endpoints", ()), container.get("published", ()))
        self._start_firewall()
        self._save()

    def _define(self, name, driver, **fields):
        return Network(dict({"id": _new_id(), "name": name, "driver": driver, "created": time.time_ns(), "bridge": "",
                             "options": {}, "labels": {}, "internal": False, "attachable": False, "ipam": {}}, **fields))

    def _add(self, network):
        self.networks[network.id] = network
        return network

    def _save(self):
        with self.lock:
            write_json(self.path, {"networks": [network.state() for network in self.networks.values()],
                                   "forwarding": self.forwarding_is_ours,
                                   "rules": sorted(self.firewall.backend.earlier) if self.firewall.backend else []})

    def _start_bridges(self):
        wanted = self.options.get("bridge")
        default = self.find("bridge")
        default.bridge, default.subnet = "", None
        if wanted != "none":
            try:
                self._start_default_bridge(default, wanted or BRIDGE)
            except (Error, OSError):
                default.bridge, default.subnet = "", None  # what asks for it is told that there is none
                raise
        for network in self._bridged():
            if network is not default:
                self._make_bridge(network)

    def _bridged(self):
        return [network for network in self.networks.values() if network.bridge]

    def _start_default_bridge(self, network, bridge):
        """A bridge that exists is used with the address that it has: ours from an earlier daemon, or the administrator's (-b)."""
        with Netlink() as netlink:
            try:
                found = [a for a in netlink.addresses(bridge) if ":" not in a["address"]]
            except OSError as error:
                if error.errno != errno.ENODEV:
                    raise
                found = None
        if found == []:
            raise Error("interface %s has no IPv4 address: give it one, or name another one with -b" % bridge)
        if found:
            gateway, prefix = found[0]["address"], found[0]["prefix"]
        else:
            gateway, prefix = self._free_address(bridge)
        network.bridge, network.gateway, network.subnet = bridge, gateway, str(parse_subnet("%s/%s" % (gateway, prefix)))
        network.options = {"com.docker.network.bridge.default_bridge": "true", _ICC: _go_bool(self.options.get("icc", True)),
                           _MASQUERADE: "true", _HOST_BINDING: self.options.get("ip") or "0.0.0.0", _BRIDGE_NAME: bridge,
                           _MTU: str(self.options.get("mtu") or 1500)}
        network.pool = AddressPool(network.subnet, None, [gateway])
        if not found:
            self._make_bridge(network)

    def _free_address(self, bridge):
        routes = _routed_networks()
        for candidate in BRIDGE_ADDRESSES:
            taken = [route for route in routes if parse_subnet(candidate).overlaps(route)]
            if not taken:
                return candidate.split("/")
            debug("%s: Network %s is already routed: %s" % (candidate, parse_subnet(candidate), taken[0]))
        raise Error("Could not find a free IP address range for interface '%s'. Please configure its address manually and run "
                    "'pydock -b %s'" % (bridge, bridge))

    def _make_bridge(self, network):
        """The bridge of a network, which may be there already."""
        prefix = network.subnet.split("/")[1]
        with Netlink() as netlink:
            netlink.add_bridge(network.bridge, "02:42:" + format_mac(os.urandom(4)), network.mtu)
            try:
                netlink.run()
            except FileExistsError:
                if netlink.link(network.bridge)["kind"] != "bridge":
                    raise Error("interface %s is there already and is no bridge" % network.bridge)
            no_ipv6(network.bridge)
            if network.gateway:
                with contextlib.suppress(FileExistsError):
                    netlink.add_address(network.bridge, "%s/%s" % (network.gateway, prefix))
                    netlink.run()
            netlink.set_link(network.bridge, up=True)

    def _start_firewall(self):
        if not self._bridged():
            return
        forwarding = read_file("/proc/sys/net/ipv4/ip_forward", b"0").strip() == b"1"
        self.firewall.drop_forwarded = self.forwarding_is_ours or not forwarding
        written = self.firewall.write(self._bridged(), self._snapshot())
        self.warnings += self.firewall.warnings
        if written and not forwarding:  # only now: without the rules this host would route for everybody, into containers too
            if not set_sysctl("net/ipv4/ip_forward", 1):
                self.warnings.append("IPv4 forwarding is disabled: containers reach nothing outside this host")
            self.forwarding_is_ours = True

    def _snapshot(self):
        return self.published  # the list is replaced, never changed: so the firewall needs no lock of ours to read it

    def restore(self, endpoints, published):
        """Take over what a live container has since an earlier daemon."""
        with self.lock:
            for endpoint in endpoints:
                network = self.networks.get(endpoint["NetworkID"])
                if network:
                    network.endpoints[endpoint["EndpointID"]] = endpoint
                    if network.pool and endpoint["IPAddress"]:
                        network.pool.take(endpoint["IPAddress"])
            for port in published:
                self.ports.take(port["proto"], port["HostIp"], port["HostPort"])
            self.published = self.published + list(published)

    def reassert(self, always=True):
        """Put the rules back, after somebody has flushed them; whether any was missing (`always`: written all the same)."""
        with self.lock:
            networks, published = self._bridged(), self._snapshot()
        whole = self.firewall.complete(networks, published)
        if always or not whole:
            self.firewall.write(networks, published)
        return not whole

    def cleanup(self):
        """Remove our rules and bridges from the host; for tests and for taking pydock off a host. No container may be live."""
        self.firewall.remove(self._bridged())
        if self.forwarding_is_ours and self.firewall.backend:
            set_sysctl("net/ipv4/ip_forward", 0)
            self.forwarding_is_ours = False
            self._save()
        for network in self._bridged():
            if not network.predefined or not self.options.get("bridge"):
                self._delete_bridge(network)

    @staticmethod
    def _delete_bridge(network):
        with contextlib.suppress(OSError), Netlink() as netlink:
            netlink.delete_link(network.bridge)

    # the networks that users make

    def find(self, name):
        """A network by name, id, or unique prefix of an id."""
        with self.lock:
            networks = list(self.networks.values())
            for found in ([n for n in networks if n.id == name], [n for n in networks if n.name == name],
                          [n for n in networks if name and n.id.startswith(name)]):
                if len(found) > 1:
                    raise Conflict("network %s is ambiguous (%d matches found by id prefix)" % (name, len(found)))
                if found:
                    return found[0]
        raise NotFound("network %s not found" % name)

    def create(self, request):
        """A network from the body of /networks/create: Name, Driver, Internal, Attachable, Options, Labels, IPAM."""
        name, driver = request.get("Name") or "", request.get("Driver") or "bridge"
        if name in _PREDEFINED:
            raise Forbidden("operation is not permitted on predefined %s network" % name)
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}", name):
            raise BadRequest("invalid network name \"%s\": only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed" % printable(name))
        if driver in ("host", "null"):
            raise Forbidden("only one instance of \"%s\" network is allowed" % driver)
        if driver not in ("bridge", "default"):
            raise NotFound("plugin \"%s\" not found" % printable(driver))
        with self.lock:
            if any(network.name == name for network in self.networks.values()):
                raise Conflict("network with name %s already exists" % name)
            network = self._define(name, "bridge", options=request.get("Options") or {}, labels=request.get("Labels") or {},
                                   internal=bool(request.get("Internal")), attachable=bool(request.get("Attachable")),
                                   ipam=request.get("IPAM") or {}, **self._addresses(request))
            network.bridge = self._bridge_name(network)
            self._make_bridge(network)
            self._add(network)
            self.reassert()
            self._save()
            return network

    def _bridge_name(self, network):
        name = network.options.get(_BRIDGE_NAME) or "pdk-" + network.id[:11]
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,14}", name):
            raise BadRequest("invalid bridge name \"%s\": an interface has up to 15 letters, digits, and -_." % printable(name))
        return name

    def _addresses(self, request):
        """subnet, gateway and ip_range of a new network."""
        config = ((request.get("IPAM") or {}).get("Config") or [{}])[0]
        used = [parse_subnet(network.subnet) for network in self.networks.values() if network.subnet]
        if config.get("Subnet"):
            subnet = parse_subnet(config["Subnet"])
            if any(subnet.overlaps(other) for other in used):
                raise Forbidden("invalid pool request: Pool overlaps with other one on this address space")
        else:
            used += _routed_networks()
            subnet = next((s for s in _subnet_candidates() if not any(s.overlaps(other) for other in used)), None)
            if subnet is None:
                raise Error("could not find an available, non-overlapping IPv4 address pool among the defaults to assign to the "
                            "network")
        pool = AddressPool(str(subnet), config.get("IPRange"))
        gateway = pool.acquire(config.get("Gateway") or str(subnet.network_address + 1))
        return {"subnet": str(subnet), "gateway": gateway, "ip_range": config.get("IPRange") or None}

    def remove(self, name):
        """Remove a network that no container is in."""
        with self.lock:
            network = self.find(name)
            if network.predefined:
                raise Forbidden("%s is a pre-defined network and cannot be removed" % network.name)
            if network.endpoints:
                raise Forbidden("error while removing network: network %s id %s has active endpoints"
                                % (network.name, network.id))
            del self.networks[network.id]
            self.reassert()
            self._delete_bridge(network)
            self._save()
            return network

    # containers

    def reserve(self, network, container, name, address=None, mac=None, aliases=(), interface="eth0", links=()):
        """An endpoint for a container, without anything in the kernel yet: docker's EndpointSettings and, in lower case, network
        (name), container (id), name, host_interface, interface, mtu. `mac` and `address` are what the user asked for;
        links: `container:alias`, names that only this container uses."""
        network = self.find(network)
        if network.driver != "bridge":
            raise BadRequest("container cannot be disconnected from %s network or connected to %s network"
                             % (network.name, network.name))
        if not network.bridge:
            raise BadRequest("network %s is not there: the daemon has no bridge; use --net none or --net host" % network.name)
        self._check_address(network, address)
        with self.lock:
            if any(endpoint["container"] == container for endpoint in network.endpoints.values()):
                raise Forbidden("endpoint with name %s already exists in network %s" % (name, network.name))
            address = network.pool.acquire(address)
            identity = _new_id()
            endpoint = {
                "IPAMConfig": None, "Links": list(links) or None, "Aliases": list(aliases) or None, "DriverOpts": None,
                "NetworkID": network.id, "EndpointID": identity, "IPAddress": address,
                "Gateway": "" if network.internal else network.gateway,
                "IPPrefixLen": int(network.subnet.split("/")[1]), "IPv6Gateway": "", "GlobalIPv6Address": "",
                "GlobalIPv6PrefixLen": 0, "MacAddress": mac or "02:42:" + format_mac(pack_address(address)[1]),
                "network": network.name, "container": container, "name": name, "host_interface": "veth" + identity[:7],
                "interface": interface, "mtu": network.mtu}
            network.endpoints[identity] = endpoint
            return endpoint

    @staticmethod
    def _check_address(network, address):
        if address and network.predefined:
            raise BadRequest("user specified IP address is supported on user defined networks only")
        if address and not ((network.ipam.get("Config") or [{}])[0]).get("Subnet"):
            raise BadRequest("user specified IP address is supported only when connecting to networks with user configured "
                             "subnets")

    def plug(self, endpoint, pid=None, netns=None):
        """Make the endpoint's interfaces: one in our bridge, the other, not configured yet, in the namespace of the process `pid`
        or the descriptor `netns`."""
        network, here = self.networks[endpoint["NetworkID"]], endpoint["host_interface"]
        with Netlink() as netlink:
            netlink.add_veth(here, endpoint["interface"], pid, netns, endpoint["MacAddress"], endpoint["mtu"], network.bridge)
            netlink.set_hairpin(here)
            netlink.run()
            no_ipv6(here)
            netlink.set_link(here, up=True)

    def unplug(self, endpoint):
        """Take the endpoint's interfaces away. When all processes of its namespace have ended the kernel does that by itself,
        later: this, which takes 10 to 20 ms, is for a namespace that lives on."""
        with contextlib.suppress(OSError), Netlink() as netlink:
            netlink.delete_link(endpoint["host_interface"])

    def attach(self, network, container, name, pid=None, netns=None, **wishes):
        """reserve and plug in one; what is reserved is released when the kernel refuses."""
        endpoint = self.reserve(network, container, name, **wishes)
        try:
            self.plug(endpoint, pid, netns)
        except BaseException:
            self.release(endpoint)
            raise
        return endpoint

    def release(self, endpoint):
        """Give the endpoint's address and ports back. Its listeners belong to the monitor and end with it."""
        with self.lock:
            ports = [port for port in self.published if port["endpoint"] == endpoint["EndpointID"]]
        self.unpublish(ports)
        with self.lock:
            network = self.networks.get(endpoint["NetworkID"])
            if network and network.endpoints.pop(endpoint["EndpointID"], None) and network.pool:
                network.pool.release(endpoint["IPAddress"])

    # names

    def names(self, container, servers):
        """What a container's resolver is to know, as Resolver has it; None for a container that is in no network of a user: it
        has no resolver. servers: the addresses to pass questions on to."""
        with self.lock:
            own = [(network, endpoint) for network in self.networks.values() if not network.predefined
                   for endpoint in network.endpoints.values() if endpoint["container"] == container]
            names, addresses = {}, {}
            for network, endpoint in own:
                for other in network.endpoints.values():
                    for name in dict.fromkeys([other["name"], other["container"][:12]] + (other["Aliases"] or [])):
                        for key in (name.lower(), "%s.%s" % (name, network.name)):
                            names.setdefault(key.lower(), []).append(other["IPAddress"])
                    addresses[other["IPAddress"]] = "%s.%s" % (other["name"], network.name)
                for link in endpoint["Links"] or ():
                    target, _, alias = link.partition(":")
                    found = names.get(target.lower())
                    if found:
                        names.setdefault((alias or target).lower(), found)
        names = {name: list(dict.fromkeys(found)) for name, found in names.items()}
        return {"names": names, "addresses": addresses, "servers": list(servers),
                "internal": all(network.internal for network, _ in own)} if own else None

    def neighbours(self, network_ids):
        """The containers in these networks, those of users: whose names are to be written anew when one of them comes or goes."""
        with self.lock:
            return {endpoint["container"] for key in network_ids if key in self.networks and not self.networks[key].predefined
                    for endpoint in self.networks[key].endpoints.values()}

    # published ports

    def publish(self, endpoint, bindings):
        """Publish ports of an endpoint. bindings: docker's PortBindings, {"80/tcp": [{"HostIp", "HostPort"}]}. Returns (records
        as in `published`, listeners): pass the listeners, in that order, to the monitor and close them here. Error when a port is
        not to be had; nothing is published then."""
        records, listeners = [], []
        try:
            for key, wishes in bindings.items():
                port, proto = _parse_port_key(key)
                for wish in wishes or [{}]:
                    record, listener = self._publish_one(endpoint, proto, port, wish)
                    records.append(record)
                    listeners.append(listener)
            with self.lock:
                self.published = self.published + records
            if any(record["redirected"] for record in records):
                self.firewall.publish(self._snapshot)
        except BaseException:
            for listener in listeners:
                listener.close()
            self.unpublish(records)
            raise
        return records, listeners

    def _publish_one(self, endpoint, proto, port, wish):
        address = wish.get("HostIp") or self.options.get("ip") or "0.0.0.0"
        try:
            family, packed = pack_address(address)
        except OSError:
            raise BadRequest("invalid host address \"%s\" for port %d" % (printable(address), port))
        loopback = family == socket.AF_INET and packed[0] == 127
        redirected = self.firewall.backend is not None and family == socket.AF_INET and not loopback
        try:
            host_port, listener = self.ports.acquire(proto, address, parse_host_port(wish.get("HostPort")), redirected)
        except OSError as error:
            raise Error("driver failed programming external connectivity on endpoint %s (%s): %s"
                        % (endpoint["name"], endpoint["EndpointID"], error.strerror))
        return {"endpoint": endpoint["EndpointID"], "proto": proto, "HostIp": address, "HostPort": host_port,
                "address": endpoint["IPAddress"], "port": port, "redirected": redirected}, listener

    def unpublish(self, records):
        """Take published ports back."""
        with self.lock:
            gone = [record for record in records if record in self.published]
            for record in records:
                self.ports.release(record["proto"], record["HostIp"], record["HostPort"])
            self.published = [record for record in self.published if record not in gone]
        if any(record["redirected"] for record in gone):
            try:
                self.firewall.publish(self._snapshot)
            except (Error, OSError) as error:  # the next change, or reassert, writes them all
                warn("the rules of published ports could not be taken back: %s" % error)


def _go_bool(value):
    return "true" if value else "false"


def _parse_port_key(key):
    """`80/tcp` to (80, "tcp")."""
    match = re.fullmatch(r"(\d{1,5})(?:/(tcp|udp))?", key)
    if not match or not 0 < int(match.group(1)) <= 65535:
        raise BadRequest("invalid port specification: \"%s\": use PORT/tcp or PORT/udp" % printable(key))
    return int(match.group(1)), match.group(2) or "tcp"


def port_map(records, exposed=()):
    """docker's NetworkSettings.Ports of published records: {"80/tcp": [{"HostIp", "HostPort"}]}; exposed ports alone are None."""
    found = {key: None for key in exposed}
    for record in records:
        key = "%d/%s" % (record["port"], record["proto"])
        found[key] = (found.get(key) or []) + [{"HostIp": record["HostIp"], "HostPort": str(record["HostPort"])}]
    return found


def _routed_networks():
    """Where this host's routes lead, the default route apart: a new network must not be there."""
    import ipaddress
    with Netlink() as netlink:
        return [ipaddress.IPv4Network(route["network"]) for route in netlink.routes() if route["network"]]


def _subnet_candidates():
    """Networks for those who do not name one: 172.18.0.0/24, 172.19.0.0/24 ... 172.31.0.0/24, 172.17.0.0/24, 172.18.1.0/24 ..."""
    import ipaddress
    for third in range(256):
        for second in list(range(18, 32)) + [17]:
            yield ipaddress.IPv4Network("172.%d.%d.0/24" % (second, third))


########################################################################
# 12. Volumes
########################################################################
# What a container keeps outside its root: named and anonymous volumes, binds of host paths, tmpfs. A *mount point* is docker's
# dict {Type, Name, Source, Destination, Driver, Mode, RW, Propagation}, as inspect shows it; parsed here from every form a request
# can have, and turned into the mounts of a spec.

_VOLUME_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
_ACCESS_MODES, _PROPAGATIONS = ("ro", "rw"), ("private", "rprivate", "slave", "rslave", "shared", "rshared")


class Volumes:
    """The volumes of one data root: `volumes/NAME/_data`, with `volumes/NAME/volume.json` {Name, CreatedAt, Labels, Options,
    anonymous}. `users(name)` (set by the engine) lists the ids of the containers that mount it."""

    def __init__(self, root):
        self.folder, self.lock = os.path.join(root, "volumes"), threading.RLock()
        self.users, self.emit = lambda name: [], lambda action, name, **attributes: None
        os.makedirs(self.folder, 0o711, exist_ok=True)
        self.volumes = {}
        for name in os.listdir(self.folder):
            if os.path.exists(os.path.join(self.folder, name, "volume.json")):
                self.volumes[name] = read_json(os.path.join(self.folder, name, "volume.json"))
            else:  # a create or a remove that was cut off
                remove_tree(os.path.join(self.folder, name))

    def create(self, name="", labels=None, options=None, anonymous=None):
        """The volume of that name, made where there is none; returns its meta."""
        anonymous = not name if anonymous is None else anonymous
        name = name or new_id()
        if not _VOLUME_NAME.fullmatch(name):
            raise BadRequest('create %s: "%s" includes invalid characters for a local volume name, only "[a-zA-Z0-9][a-zA-Z0-9_.-]" are '
                             "allowed. If you intended to pass a host directory, use absolute path" % (name, name))
        unknown = set(options or {}) - {"type", "o", "device"}
        if unknown:
            raise BadRequest('create %s: invalid option: "%s"' % (name, sorted(unknown)[0]))
        with self.lock:
            if name in self.volumes:
                return self.volumes[name]
            meta = {"Name": name, "CreatedAt": format_time(time.time_ns() // 10 ** 9 * 10 ** 9), "Labels": labels,
                    "Options": options or None, "anonymous": anonymous}
            os.makedirs(os.path.join(self.folder, name, "_data"), 0o755, exist_ok=True)
            write_json(os.path.join(self.folder, name, "volume.json"), meta)
            sync_folder(self.folder)
            self.volumes[name] = meta
        self.emit("create", name, driver="local")
        return meta

    def find(self, name):
        try:
            return self.volumes[name]
        except KeyError:
            raise NotFound("get %s: no such volume" % name)

    def path(self, name):
        return os.path.join(self.folder, name, "_data")

    def remove(self, name, force=False):
        with self.lock:
            if force and name not in self.volumes:
                return
            self.find(name)
            users = self.users(name)
            if users:
                raise Conflict("remove %s: volume is in use - [%s]" % (name, ", ".join(users)))
            del self.volumes[name]
            os.unlink(os.path.join(self.folder, name, "volume.json"))  # from here on it is no volume
        remove_tree(os.path.join(self.folder, name))
        self.emit("destroy", name, driver="local")

    def to_api(self, meta):
        return {"CreatedAt": meta["CreatedAt"], "Driver": "local", "Labels": meta["Labels"], "Mountpoint": self.path(meta["Name"]),
                "Name": meta["Name"], "Options": meta["Options"], "Scope": "local"}

    def disk_usage(self, name):
        total, seen = 0, set()
        for folder, _, names, fd in os.fwalk(self.path(name)):
            for entry in names:
                with contextlib.suppress(OSError):
                    there = os.lstat(entry, dir_fd=fd)
                    if there.st_ino not in seen:
                        seen.add(there.st_ino)
                        total += there.st_size
        return total


# -- mount points ----------------------------------------------------------------------------------------------------------------

def _check_target(path, words):
    if not path:
        raise BadRequest("%sfield Target must not be empty" % words)
    if not path.startswith("/"):
        raise BadRequest("%sinvalid mount path: '%s' mount path must be absolute" % (words, path))
    clean = os.path.normpath("/" + path.lstrip("/"))
    if clean == "/":
        raise BadRequest("%sinvalid specification: destination can't be '/'" % words)
    top = clean.split("/")[1]
    # a mount there would send our own writes of labels and sysctls elsewhere (CVE-2025-52881)
    if top in ("proc", "sys") and not clean.startswith("/sys/fs/cgroup") and clean not in ("/proc/cpuinfo", "/proc/meminfo",
            "/proc/stat", "/proc/uptime", "/proc/loadavg", "/proc/diskstats", "/proc/swaps", "/sys/devices/system/cpu/online"):
        raise BadRequest('%sinvalid specification: "%s" cannot be mounted because it is inside /%s' % (words, clean, top))
    return clean


def parse_mode(mode):
    """`ro,z,rslave` -> (writable, propagation, nocopy); BadRequest "invalid mode: ..."."""
    words = [word for word in mode.split(",") if word] if mode else []
    access = [w for w in words if w in _ACCESS_MODES]
    propagation = [w for w in words if w in _PROPAGATIONS]
    others = [w for w in words if w not in _ACCESS_MODES + _PROPAGATIONS + ("z", "Z", "nocopy", "cached", "delegated", "consistent")]
    if others or len(access) > 1 or len(propagation) > 1:
        raise BadRequest("invalid mode: %s" % mode)
    return access != ["ro"], propagation[0] if propagation else "", "nocopy" in words


def parse_bind(text):
    """A -v value: `NAME:/path[:mode]`, `/host/path:/path[:mode]`, `/path` (an anonymous volume) -> mount point."""
    parts = text.split(":")
    if not text or len(parts) > 3 or not all(parts[:2]) or len(parts) == 3 and not parts[2]:
        raise BadRequest("invalid volume specification: '%s'" % text)
    source, target, mode = ([""] + parts + [""])[:3] if len(parts) == 1 else (parts + [""])[:3]
    is_bind = source.startswith("/")
    words = "invalid volume specification: '%s': invalid mount config for type \"%s\": " % (text, "bind" if is_bind else "volume")
    writable, propagation, nocopy = parse_mode(mode)
    target = _check_target(target, words)
    if is_bind:
        if nocopy:
            raise BadRequest(words + "field VolumeOptions must not be specified")
        return {"Type": "bind", "Source": os.path.normpath(source), "Destination": target, "Mode": mode, "RW": writable,
                "Propagation": propagation or "rprivate", "create": True}
    return {"Type": "volume", "Name": source, "Source": "", "Destination": target, "Driver": "local", "Mode": mode or "z", "RW": writable,
            "Propagation": "", "nocopy": nocopy}


def parse_mount_entry(m):
    """An entry of HostConfig.Mounts -> mount point."""
    kind, words = m.get("Type", ""), 'invalid mount config for type "%s": ' % m.get("Type", "")
    parse = _MOUNT_KINDS.get(kind)
    if parse is None:
        raise BadRequest(words + "mount type unknown")
    for name, option in (("bind", "BindOptions"), ("volume", "VolumeOptions"), ("tmpfs", "TmpfsOptions")):
        if name != kind and m.get(option) is not None:
            raise BadRequest(words + "field %s must not be specified" % option)
    target = _check_target(m.get("Target") or "", words)
    return parse(m, m.get("Source") or "", target, not m.get("ReadOnly"), words)


def _parse_mount_bind(m, source, target, writable, words):
    options = m.get("BindOptions") or {}
    propagation = options.get("Propagation") or "rprivate"
    if propagation not in _PROPAGATIONS:
        raise BadRequest(words + "invalid propagation mode: %s" % propagation)
    if not source:
        raise BadRequest(words + "field Source must not be empty")
    if not source.startswith("/"):
        raise BadRequest(words + "invalid mount path: '%s' mount path must be absolute" % source)
    create = bool(options.get("CreateMountpoint"))
    if not create and not os.path.lexists(source):
        raise BadRequest(words + "bind source path does not exist: %s" % source)
    return {"Type": "bind", "Source": os.path.normpath(source), "Destination": target, "Mode": "", "RW": writable,
            "Propagation": propagation, "create": create, "recursive": not options.get("NonRecursive")}


def _parse_mount_volume(m, source, target, writable, words):
    options = m.get("VolumeOptions") or {}
    driver = options.get("DriverConfig") or {}
    if driver.get("Name") not in (None, "", "local"):
        raise NotFound('create %s: error looking up volume plugin %s: plugin "%s" not found' % (source or "volume", driver["Name"], driver["Name"]))
    return {"Type": "volume", "Name": source, "Source": "", "Destination": target, "Driver": "local", "Mode": "z", "RW": writable,
            "Propagation": "", "nocopy": bool(options.get("NoCopy")), "labels": options.get("Labels"), "options": driver.get("Options")}


def _parse_mount_tmpfs(m, source, target, writable, words):
    if source:
        raise BadRequest(words + "field Source must not be specified")
    options = m.get("TmpfsOptions") or {}
    data = [] if writable else ["ro"]
    if options.get("SizeBytes"):
        data.append("size=%d" % options["SizeBytes"])
    if options.get("Mode"):
        data.append("mode=%o" % options["Mode"])
    return {"Type": "tmpfs", "Source": "", "Destination": target, "Mode": "", "RW": writable, "Propagation": "", "data": ",".join(data)}


_MOUNT_KINDS = {"bind": _parse_mount_bind, "volume": _parse_mount_volume, "tmpfs": _parse_mount_tmpfs}

_TMPFS_FLAGS = {"ro": (MS_RDONLY, 0), "rw": (0, MS_RDONLY), "nosuid": (MS_NOSUID, 0), "suid": (0, MS_NOSUID), "nodev": (MS_NODEV, 0),
                "dev": (0, MS_NODEV), "noexec": (MS_NOEXEC, 0), "exec": (0, MS_NOEXEC), "noatime": (MS_NOATIME, 0),
                "relatime": (MS_RELATIME, 0), "strictatime": (MS_STRICTATIME, 0)}
_TMPFS_VALUES = ("size", "mode", "uid", "gid", "nr_inodes", "nr_blocks", "mpol")


def parse_tmpfs(options):
    """`size=64m,exec` -> (mount flags, data); nosuid, nodev and noexec unless said otherwise, as docker."""
    flags, data = MS_NOSUID | MS_NODEV | MS_NOEXEC, []
    for option in filter(None, (options or "").split(",")):
        name, _, value = option.partition("=")
        if option in _TMPFS_FLAGS:
            add, drop = _TMPFS_FLAGS[option]
            flags = flags & ~drop | add
        elif name in _TMPFS_VALUES and value:
            data.append(option)
        else:
            raise BadRequest('invalid tmpfs option ["%s"]' % '" "'.join(option.split("=")))
    return flags, ",".join(data)


def spec_mount(point, volumes):
    """A mount point as an entry of a spec's mounts."""
    target = point["Destination"]
    if point["Type"] == "tmpfs":
        flags, data = parse_tmpfs(point.get("data", ""))
        return {"type": "tmpfs", "target": target, "flags": flags, "data": data}
    if point["Type"] == "volume":
        options = volumes.find(point["Name"])["Options"] or {}
        if options.get("type") == "tmpfs":
            flags, data = parse_tmpfs(options.get("o", ""))
            return {"type": "tmpfs", "target": target, "flags": flags, "data": data}
        source = options.get("device") if "bind" in options.get("o", "").split(",") else volumes.path(point["Name"])
        if options.get("device") and source != options["device"]:
            raise BadRequest("volume %s: of the local driver's mounts only o=bind and type=tmpfs are supported" % point["Name"])
    else:
        source = point["Source"]
        if not os.path.lexists(source):
            if not point.get("create"):
                raise BadRequest('invalid mount config for type "bind": bind source path does not exist: %s' % source)
            os.makedirs(source, 0o755, exist_ok=True)
    propagation = (point["Propagation"] or "rprivate").lstrip("r")
    return {"type": "bind", "target": target, "source": source, "read_only": not point["RW"], "propagation": propagation,
            "recursive": point.get("recursive", True)}


@task
def copy_up(fds, root, work, path, target):
    """Child: fill an empty volume with what the image has at path, its owner and mode included (docker's copy-up)."""
    private_mounts()
    mount_root(root, work)
    with opened_folder(work) as root_fd, opened_folder(target) as target_fd:
        try:
            source = open_in_root(root_fd, path, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            return
        with opened_at(source):
            copy_tree(source, target_fd)
            there = os.fstat(source)
            os.fchown(target_fd, there.st_uid, there.st_gid)
            os.fchmod(target_fd, stat.S_IMODE(there.st_mode))


########################################################################
# 13. Containers
########################################################################
# The life of a container, in the daemon. A `Container` is its two files, config.json (what was asked for) and state.json (what
# became of it), and the link to its monitor while there is one. `Containers` keeps them all and does what the API asks. Each has a lock:
# start, copy, commit and removal of the same container exclude each other.

HOST_CONFIG = {"Binds": None, "ContainerIDFile": "", "LogConfig": {"Type": "json-file", "Config": {}}, "NetworkMode": "default",
               "PortBindings": {}, "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}, "AutoRemove": False, "VolumeDriver": "",
               "VolumesFrom": None, "ConsoleSize": [0, 0], "CapAdd": None, "CapDrop": None, "CgroupnsMode": "private", "Dns": [],
               "DnsOptions": [], "DnsSearch": [], "ExtraHosts": None, "GroupAdd": None, "IpcMode": "private", "Cgroup": "", "Links": None,
               "OomScoreAdj": 0, "PidMode": "", "Privileged": False, "PublishAllPorts": False, "ReadonlyRootfs": False,
               "SecurityOpt": None, "UTSMode": "", "UsernsMode": "", "ShmSize": 64 << 20, "Runtime": "native", "Isolation": "",
               "CpuShares": 0, "Memory": 0, "NanoCpus": 0, "CgroupParent": "", "BlkioWeight": 0, "BlkioWeightDevice": [],
               "BlkioDeviceReadBps": [], "BlkioDeviceWriteBps": [], "BlkioDeviceReadIOps": [], "BlkioDeviceWriteIOps": [],
               "CpuPeriod": 0, "CpuQuota": 0, "CpuRealtimePeriod": 0, "CpuRealtimeRuntime": 0, "CpusetCpus": "", "CpusetMems": "",
               "Devices": [], "DeviceCgroupRules": None, "DeviceRequests": None, "MemoryReservation": 0, "MemorySwap": 0,
               "MemorySwappiness": None, "OomKillDisable": False, "PidsLimit": None, "Ulimits": [], "CpuCount": 0, "CpuPercent": 0,
               "IOMaximumIOps": 0, "IOMaximumBandwidth": 0, "Mounts": None, "Tmpfs": None, "Sysctls": None, "Init": None,
               "MaskedPaths": None, "ReadonlyPaths": None, "Annotations": None}
CONFIG = dict(EMPTY_CONFIG, ExposedPorts=None, Healthcheck=None, StopSignal=None, StopTimeout=None, NetworkDisabled=False, Shell=None)
_OPTIONAL_CONFIG = ("ExposedPorts", "Healthcheck", "StopSignal", "StopTimeout", "Shell", "NetworkDisabled")
NEW_STATE = {"status": "created", "pid": 0, "start_time": None, "exit_code": 0, "error": "", "started": 0, "finished": 0, "oom": False,
             "restarts": 0, "stopped_by_user": False, "endpoints": {}, "ports": {}, "published": [], "health": None}


class Container:
    """One container. From config.json: id, name, created (ns), image (hex id), path and args of its command, config and host_config
    (docker's objects, all keys present), mounts (mount points), networks ({name: settings asked for}). From state.json: `state`, as
    NEW_STATE shows it: endpoints {network: endpoint}, ports {"80/tcp": [{HostIp, HostPort}]}. In memory: `monitor`, the link to the
    monitor; `execs` {id: Exec}; `changed`, a condition that is notified at each change of state; `lock`, of the state; and `files`, of the
    folder: start, copy, export, diff, commit and removal exclude each other by it, and a client that reads slowly holds up no stop or
    kill. Who needs both takes `lock` first."""

    _SAVED = ("id", "name", "created", "image", "image_name", "path", "args", "config", "host_config", "mounts", "networks")

    def __init__(self, folder, saved, state=None):
        self.folder = folder
        for key in self._SAVED:
            setattr(self, key, saved[key])
        self.state = dict(NEW_STATE, **(state or {}))
        self.lock, self.changed, self.files = threading.RLock(), threading.Condition(), threading.RLock()
        self.monitor, self.execs, self.timer, self.removing, self.removed = None, {}, None, False, False

    @classmethod
    def load(cls, folder):
        state = read_unsynced_json(os.path.join(folder, "state.json"))
        if not state and os.path.exists(os.path.join(folder, "state.json")):
            state = {"status": "running"}  # its first start was under way when the power went
        return cls(folder, read_json(os.path.join(folder, "config.json")), state)

    def save(self, sync=True):
        write_json(os.path.join(self.folder, "config.json"), {key: getattr(self, key) for key in self._SAVED}, sync=sync)

    def set_state(self, **changes):
        """Change the state, write it down, and wake whoever waits for a change."""
        with self.changed:
            self.state.update(changes)
            if not self.removed:
                try:
                    write_json(os.path.join(self.folder, "state.json"), self.state, sync=False)
                except OSError as error:  # a full disk: what happened has happened; the next change writes it
                    warn("the state of container %s: %s" % (self.id[:12], error.strerror))
            self.changed.notify_all()

    def path_of(self, name):
        return os.path.join(self.folder, name)

    @property
    def log_path(self):
        return self.path_of(self.id + "-json.log")

    @property
    def running(self):
        return self.state["status"] in ("running", "paused")

    @property
    def paused(self):
        return self.state["status"] == "paused"

    @property
    def tty(self):
        return self.config["Tty"]

    @property
    def network_mode(self):
        mode = self.host_config["NetworkMode"]
        return "bridge" if mode in ("", "default") else mode

    def need_running(self):
        if not self.running:
            raise Conflict("container %s is not running" % self.id if self.state["status"] != "restarting" else
                           "Container %s is restarting, wait until the container is running" % self.id)

    # -- as the API shows it -----------------------------------------------------------------------------------------------

    def status_text(self):
        """`Up 4 minutes (Paused)`, `Exited (0) 2 hours ago`."""
        state, now = self.state, time.time_ns()
        ago = format_age((now - state["finished"]) / 1e9)
        texts = {"created": "Created", "removing": "Removal In Progress", "dead": "Dead",
                 "restarting": "Restarting (%d) %s ago" % (state["exit_code"], ago),
                 "exited": "Exited (%d) %s ago" % (state["exit_code"], ago)}
        if state["status"] in texts:
            return texts[state["status"]]
        health = state["health"] and {"starting": " (health: starting)"}.get(state["health"]["Status"], " (%s)" % state["health"]["Status"])
        return "Up %s%s%s" % (format_age((now - state["started"]) / 1e9), " (Paused)" if self.paused else "", health or "")

    def state_to_api(self):
        s = self.state
        status = "exited" if s["status"] == "removing" else s["status"]
        shown = {"Status": status, "Running": self.running or status == "restarting", "Paused": self.paused,
                 "Restarting": status == "restarting", "OOMKilled": s["oom"], "Dead": status == "dead", "Pid": s["pid"],
                 "ExitCode": s["exit_code"], "Error": s["error"], "StartedAt": format_time(s["started"]),
                 "FinishedAt": format_time(s["finished"])}
        if s["health"]:
            shown["Health"] = s["health"]
        return shown

    def ports_list(self):
        """Ports of GET /containers/json."""
        ports = []
        for port, bindings in sorted(self.state["ports"].items(), key=lambda item: (int(item[0].split("/")[0]), item[0])):
            number, _, kind = port.partition("/")
            for binding in bindings or [{}]:
                entry = {"PrivatePort": int(number), "Type": kind}
                if binding:
                    entry.update(IP=binding["HostIp"], PublicPort=int(binding["HostPort"]))
                ports.append(entry)
        return ports

    def mounts_to_api(self, volumes):
        shown = []
        for point in self.mounts:
            keys = ("Type", "Name", "Source", "Destination", "Driver", "Mode", "RW", "Propagation")
            entry = {key: point[key] for key in keys if key in point}
            if point["Type"] == "volume":
                entry["Source"] = volumes.path(point["Name"])
            shown.append(entry)
        return shown

    def network_settings(self):
        """{name: EndpointSettings}: what was asked for, with what was given while it runs."""
        shown = {}
        for name, asked in self.networks.items():
            endpoint = self.state["endpoints"].get(name) or {}
            shown[name] = {"IPAMConfig": asked.get("IPAMConfig"), "Links": asked.get("Links"), "Aliases": asked.get("Aliases"),
                           "MacAddress": endpoint.get("MacAddress", ""), "DriverOpts": asked.get("DriverOpts"),
                           "NetworkID": endpoint.get("NetworkID", ""), "EndpointID": endpoint.get("EndpointID", ""),
                           "Gateway": endpoint.get("Gateway", ""), "IPAddress": endpoint.get("IPAddress", ""),
                           "IPPrefixLen": endpoint.get("IPPrefixLen", 0), "IPv6Gateway": "", "GlobalIPv6Address": "",
                           "GlobalIPv6PrefixLen": 0, "DNSNames": asked.get("DNSNames")}
        return shown

    def summary(self, volumes):
        """One entry of GET /containers/json."""
        return {"Id": self.id, "Names": ["/" + self.name], "Image": self.image_name, "ImageID": "sha256:" + self.image,
                "Command": " ".join([self.path] + [repr_argument(a) for a in self.args]), "Created": self.created // 10 ** 9,
                "Ports": self.ports_list(), "Labels": self.config["Labels"] or {}, "State": self.state["status"],
                "Status": self.status_text(), "HostConfig": {"NetworkMode": self.host_config["NetworkMode"]},
                "NetworkSettings": {"Networks": self.network_settings()}, "Mounts": self.mounts_to_api(volumes)}

    def inspect(self, volumes, driver):
        """GET /containers/ID/json."""
        networks, state = self.network_settings(), self.state
        config = {key: value for key, value in self.config.items() if key not in _OPTIONAL_CONFIG or value}
        main = networks.get("bridge", {})
        top = {key: main.get(key, 0 if key.endswith("Len") else "") for key in
               ("EndpointID", "Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPAddress", "IPPrefixLen", "IPv6Gateway", "MacAddress")}
        return {"Id": self.id, "Created": format_time(self.created), "Path": self.path, "Args": self.args, "State": self.state_to_api(),
                "Image": "sha256:" + self.image, "ResolvConfPath": self.path_of("resolv.conf"), "HostnamePath": self.path_of("hostname"),
                "HostsPath": self.path_of("hosts"), "LogPath": self.log_path, "Name": "/" + self.name, "RestartCount": state["restarts"],
                "Driver": driver.name, "Platform": "linux", "MountLabel": "", "ProcessLabel": "", "AppArmorProfile": "",
                "ExecIDs": sorted(e.id for e in self.execs.values() if e.running) or None, "HostConfig": self.host_config,
                "GraphDriver": {"Data": {"UpperDir": self.path_of("upper"), "WorkDir": self.path_of("work")}, "Name": driver.name},
                "Mounts": self.mounts_to_api(volumes), "Config": config,
                "NetworkSettings": dict(top, Bridge="", SandboxID=self.id, HairpinMode=False, LinkLocalIPv6Address="",
                                        LinkLocalIPv6PrefixLen=0, Ports=state["ports"], Networks=networks, SecondaryIPAddresses=None,
                                        SandboxKey="/proc/%d/ns/net" % state["pid"] if state["pid"] else "", SecondaryIPv6Addresses=None)}


def repr_argument(argument):
    """An argument as `ps` shows it: quoted where it has a blank."""
    return "'%s'" % argument if " " in argument else argument


# -- from a request to a container ---------------------------------------------------------------------------------------------

def _check_types(given, model, where):
    """The keys of `model` that `given` has, each of the model's type; null stands for the model's value. Else BadRequest: an API
    body is checked once, here, and trusted afterwards."""
    if not isinstance(given, dict):
        raise BadRequest("%s must be a JSON object" % where)
    result = {}
    for key, default in model.items():
        value = given.get(key)
        if value is None:
            result[key] = default.copy() if isinstance(default, (dict, list)) else default
            continue
        kind = _OPTIONAL_TYPES.get(key) or type(default)
        if kind is bool and not isinstance(value, bool) or kind is int and (isinstance(value, bool) or not isinstance(value, int)) \
                or kind in (str, dict, list) and not isinstance(value, kind):
            raise BadRequest("%s.%s: a JSON %s is expected, not %s" % (where, key, _JSON_NAMES[kind], json.dumps(value)[:80]))
        if kind is list and key in _STRING_LISTS and not all(isinstance(item, str) for item in value):
            raise BadRequest("%s.%s must be a list of strings" % (where, key))
        result[key] = value
    return result


_JSON_NAMES = {bool: "boolean", int: "number", str: "string", dict: "object", list: "list"}
_OPTIONAL_TYPES = {"Env": list, "Cmd": list, "Entrypoint": list, "OnBuild": list, "Volumes": dict, "Labels": dict, "ExposedPorts": dict,
                   "Healthcheck": dict, "StopSignal": str, "StopTimeout": int, "Shell": list, "Binds": list, "VolumesFrom": list,
                   "CapAdd": list, "CapDrop": list, "ExtraHosts": list, "GroupAdd": list, "Links": list, "SecurityOpt": list,
                   "DeviceCgroupRules": list, "DeviceRequests": list, "MemorySwappiness": int, "PidsLimit": int, "Mounts": list,
                   "Tmpfs": dict, "Sysctls": dict, "Init": bool, "MaskedPaths": list, "ReadonlyPaths": list, "Annotations": dict}
_STRING_LISTS = ("Env", "Cmd", "Entrypoint", "OnBuild", "Shell", "Binds", "VolumesFrom", "CapAdd", "CapDrop", "ExtraHosts", "GroupAdd",
                 "Links", "SecurityOpt", "Dns", "DnsOptions", "DnsSearch", "DeviceCgroupRules", "MaskedPaths", "ReadonlyPaths")


def merge_config(config, image_config):
    """A container's Config over its image's, by docker's rules; the container's wins."""
    config = dict(config)
    if isinstance(config.get("Cmd"), str):
        config["Cmd"] = [config["Cmd"]]
    if not config["Entrypoint"]:
        config["Cmd"] = config["Cmd"] or image_config.get("Cmd")
        if config["Entrypoint"] is None:
            config["Entrypoint"] = image_config.get("Entrypoint")
    if config["Entrypoint"] == [""]:
        config["Entrypoint"] = None
    env = []
    for entry in config["Env"] or []:
        name, equals, value = entry.partition("=")
        if not name:
            raise BadRequest("invalid environment variable: %s" % entry)
        env = set_env(env, name, value) if equals else env
    named = {entry.partition("=")[0] for entry in config["Env"] or []}
    config["Env"] = env + [e for e in image_config.get("Env") or [] if e.partition("=")[0] not in named]
    for key in ("ExposedPorts", "Labels", "Volumes"):
        merged = dict(image_config.get(key) or {}, **(config[key] or {}))
        config[key] = merged or ({} if key == "Labels" else None)
    for key in ("User", "WorkingDir", "StopSignal", "StopTimeout", "Healthcheck", "Shell", "OnBuild"):
        config[key] = config[key] or image_config.get(key) or config[key]
    return config


def check_config(config):
    """What docker refuses in a Config, in its words; returns (path, args)."""
    words = list(config["Entrypoint"] or []) + list(config["Cmd"] or [])
    if not words:
        raise BadRequest("no command specified")
    if config["WorkingDir"] and not config["WorkingDir"].startswith("/"):
        raise BadRequest("the working directory '%s' is invalid, it needs to be an absolute path" % config["WorkingDir"])
    if config["StopSignal"]:
        signal_number(config["StopSignal"])
    if len(config["Hostname"]) > 64:
        raise BadRequest("invalid hostname '%s': a host name has at most 64 characters" % config["Hostname"])
    if any("\0" in word for word in words + config["Env"] + [config["WorkingDir"], config["User"], config["Hostname"]]):
        raise BadRequest("a command, environment variable or path cannot contain a NUL character")
    for port in config["ExposedPorts"] or {}:
        parse_exposed(port)
    for key in ("Interval", "Timeout", "StartPeriod", "StartInterval"):
        value = (config["Healthcheck"] or {}).get(key) or 0
        if not isinstance(value, int) or value and value < 10 ** 6:
            raise BadRequest("%s in Healthcheck cannot be less than 1ms" % key)
    return words[0], words[1:]


def check_host_config(host, known_container):
    """What docker refuses in a HostConfig; known_container(name) raises NotFound."""
    policy = host["RestartPolicy"]
    name, count = policy.get("Name") or "no", policy.get("MaximumRetryCount") or 0
    if name not in ("no", "always", "on-failure", "unless-stopped"):
        raise BadRequest("invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'" % name)
    if count < 0 or count and name != "on-failure":
        raise BadRequest("invalid restart policy: maximum retry count can only be used with 'on-failure'" if count > 0 else
                         "invalid restart policy: maximum retry count cannot be negative")
    if host["AutoRemove"] and name != "no":
        raise BadRequest("can't create 'AutoRemove' container with restart policy")
    host["RestartPolicy"] = {"Name": name, "MaximumRetryCount": count}
    for key in ("CapAdd", "CapDrop"):
        host[key] = check_capabilities(host[key], key)
    if host["ShmSize"] < 0:
        raise BadRequest("SHM size can not be less than 0")
    host["ShmSize"] = host["ShmSize"] or 64 << 20
    if not -1000 <= host["OomScoreAdj"] <= 1000:
        raise BadRequest("Invalid value %d, range for oom score adj is [-1000, 1000]" % host["OomScoreAdj"])
    for limit in host["Ulimits"]:
        if not hasattr(_resource(), "RLIMIT_" + str(limit.get("Name", "")).upper()):
            raise BadRequest("invalid ulimit type: %s" % limit.get("Name"))
        if limit.get("Hard", -1) >= 0 and (limit.get("Soft", 0) > limit["Hard"] or limit.get("Soft", 0) < 0):
            raise BadRequest("ulimit soft limit must be less than or equal to hard limit: %d > %d" % (limit["Soft"], limit["Hard"]))
    if host["Runtime"] in ("", "runc"):
        host["Runtime"] = "native"
    if host["Runtime"] not in RUNTIMES:
        raise BadRequest("unknown or invalid runtime name: %s" % host["Runtime"])
    log = host["LogConfig"]
    log["Type"], log["Config"] = log.get("Type") or "json-file", log.get("Config") or {}
    if log["Type"] not in ("json-file", "local", "none"):
        raise BadRequest('error looking up logging plugin %s: plugin "%s" not found; use json-file or none' % (log["Type"], log["Type"]))
    for option in set(log["Config"]) - {"max-size", "max-file", "labels", "env", "compress", "tag", "mode"}:
        raise BadRequest("unknown log opt '%s' for %s log driver" % (option, log["Type"]))
    for option in ("max-size", "max-file"):
        if option in log["Config"]:
            parse_size(log["Config"][option])
    for wanted in host["DeviceRequests"] or []:
        raise Error('could not select device driver "%s" with capabilities: [%s]' % (wanted.get("Driver") or "", " ".join(
            "[%s]" % " ".join(words) for words in wanted.get("Capabilities") or [])))
    _check_modes(host, known_container)
    _check_ports(host)
    _check_sysctls(host)
    return host


def _check_platform(image, name, platform):
    """NotFound where an image is not of the wanted platform: a client then pulls the one that is."""
    wanted = platform.lower().split("/") if "/" in platform else [platform.lower()] if platform in ("", "linux") else ["linux", platform.lower()]
    actual = [image.config.get("os") or "linux", image.config.get("architecture") or ARCHITECTURE]
    if platform and wanted[:2] != actual[:len(wanted)]:
        raise NotFound("image with reference %s was found but does not provide the specified platform (%s)" % (name, "/".join(wanted)))


RUNTIMES = ("native",)


def _resource():
    import resource
    return resource


def check_capabilities(names, field):
    """Upper case, without CAP_, ALL kept; BadRequest names one that does not exist."""
    if names is None:
        return None
    result = []
    for name in names:
        short = name.upper()[4:] if name.upper().startswith("CAP_") else name.upper()
        if short != "ALL" and short not in CAPABILITIES:
            raise BadRequest('invalid %s: unknown capability: "CAP_%s"' % (field, short))
        result.append(short if short == "ALL" else "CAP_" + short)
    return result


_MODE_WORDS = {"PidMode": ("", "host"), "IpcMode": ("", "private", "shareable", "host", "none"), "UTSMode": ("", "host"),
               "UsernsMode": ("", "host"), "CgroupnsMode": ("", "private", "host")}


def _check_modes(host, known_container):
    for key, allowed in _MODE_WORDS.items():
        mode = host[key]
        if mode.startswith("container:") and key in ("PidMode", "IpcMode"):
            host[key] = "container:" + known_container(mode[10:]).id
        elif mode not in allowed:
            raise BadRequest("Invalid %s mode: %s" % (key[:-4].upper() if key != "CgroupnsMode" else "cgroup namespace", mode))
    host["IpcMode"], host["CgroupnsMode"] = host["IpcMode"] or "private", host["CgroupnsMode"] or "private"
    mode = host["NetworkMode"] = host["NetworkMode"] or "default"
    if mode.startswith("container:"):
        host["NetworkMode"] = "container:" + known_container(mode[10:]).id


def check_conflicts(config, host):
    """What docker refuses to be asked for together: `config` is the client's alone, an image may expose ports all the same."""
    asked = ()
    if (host["NetworkMode"] or "").startswith("container:"):
        asked = ((config["Hostname"], "hostname and the network mode"), (host["Links"], "container type network can't be used with links. "
                 "This would result in undefined behavior"), (host["Dns"], "dns and the network mode"),
                 (host["ExtraHosts"], "custom host-to-IP mapping and the network mode"),
                 (host["PortBindings"] or host["PublishAllPorts"], "port publishing and the container type network mode"),
                 (config["ExposedPorts"], "port exposing and the container type network mode"))
    elif host["NetworkMode"] == "host":
        asked = ((host["Links"], "host type networking can't be used with links. This would result in undefined behavior"),)
    for value, words in asked + ((host["UTSMode"] == "host" and config["Hostname"], "hostname and the UTS mode"),):
        if value:
            raise BadRequest("conflicting options: " + words)


# settings of an IPC namespace, besides fs.mqueue.*; those of a network namespace are net.*; all others are the whole host's
_IPC_SYSCTLS = {"kernel." + name for name in ("msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni", "shm_rmid_forced")}


def _check_sysctls(host):
    """Only what belongs to a namespace of the container's own: anything else would change this host."""
    for name, value in (host["Sysctls"] or {}).items():
        if not re.fullmatch(r"[a-zA-Z0-9_-]+([./][a-zA-Z0-9_:-]+)+", name) or not isinstance(value, str):
            raise BadRequest("invalid sysctl: %s=%s" % (name, value))
        dotted = name.replace("/", ".")
        is_net, is_ipc = dotted.startswith("net."), dotted in _IPC_SYSCTLS or dotted.startswith("fs.mqueue.")
        if not is_net and not is_ipc:
            raise BadRequest('sysctl "%s" is not in a separate kernel namespace' % name)
        if is_net and host["NetworkMode"] == "host" or is_ipc and host["IpcMode"] == "host":
            raise BadRequest('sysctl "%s" not allowed in host %s namespace' % (name, "network" if is_net else "ipc"))


def _check_ports(host):
    """PortBindings: keys like 80/tcp, host ports 0 to 65535 or ranges of them."""
    import ipaddress
    for port, bindings in host["PortBindings"].items():
        if not re.fullmatch(r"\d{1,5}(/(tcp|udp|sctp))?", port) or not 0 < int(port.split("/")[0]) < 65536:
            raise BadRequest('invalid port specification: "%s"' % port.split("/")[0])
        if port.endswith("/sctp"):
            raise BadRequest('invalid port specification: "%s": ports are published for tcp and udp' % port)
        for binding in bindings or []:
            match = re.fullmatch(r"(\d{1,5})?(?:-(\d{1,5}))?", binding.get("HostPort") or "")
            if not match or any(int(part) > 65535 for part in match.groups() if part):
                raise BadRequest('invalid port specification: "%s"' % binding.get("HostPort"))
            if binding.get("HostIp"):
                try:
                    ipaddress.ip_address(binding["HostIp"])
                except ValueError:
                    raise BadRequest("invalid IP address: %s" % binding["HostIp"])


# -- from a container to a spec ----------------------------------------------------------------------------------------------------

def granted_capabilities(host):
    """The capabilities that a HostConfig gives, as names."""
    if host["Privileged"]:
        return list(CAPABILITIES)
    added = {name.replace("CAP_", "", 1) for name in host["CapAdd"] or []}
    dropped = {name.replace("CAP_", "", 1) for name in host["CapDrop"] or []}
    base = list(CAPABILITIES) if "ALL" in added else [] if "ALL" in dropped else list(DEFAULT_CAPABILITIES)
    return [name for name in CAPABILITIES if (name in base or name in added) and (name not in dropped or "ALL" in dropped and name in added)]


def host_devices():
    """(path, kind, major, minor, mode) of every device node of this host, for a privileged container."""
    found = []
    for folder, folders, names in os.walk("/dev"):
        if folder == "/dev":
            folders[:] = [f for f in folders if f not in ("pts", "shm", "mqueue", "fd", "hugepages")]
        for name in names:
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                there = os.lstat(path)
                if stat.S_ISCHR(there.st_mode) or stat.S_ISBLK(there.st_mode):
                    if name not in ("ptmx", "console"):
                        found.append(_device_entry(path, there))
    return found


def _device_entry(path, there):
    return (path, "c" if stat.S_ISCHR(there.st_mode) else "b", os.major(there.st_rdev), os.minor(there.st_rdev), stat.S_IMODE(there.st_mode))


def requested_devices(devices):
    """HostConfig.Devices -> (nodes for /dev, cgroup rules)."""
    nodes, rules = [], []
    for device in devices:
        source, target = device.get("PathOnHost") or "", device.get("PathInContainer") or device.get("PathOnHost") or ""
        access = device.get("CgroupPermissions") or "rwm"
        if not re.fullmatch(r"[rwm]{1,3}", access):
            raise BadRequest("bad mode specified: %s" % access)
        try:
            there = os.stat(source)
        except OSError:
            raise BadRequest('error gathering device information while adding custom device "%s": no such file or directory' % source)
        paths = [source]
        if stat.S_ISDIR(there.st_mode):
            paths = sorted(os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
        found = [(path, os.stat(path)) for path in paths if not os.path.islink(path) or path == source]
        found = [(p, s) for p, s in found if stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode)]
        if not found:
            raise BadRequest('error gathering device information while adding custom device "%s": not a device node' % source)
        for path, entry in found:
            inside = target + path[len(source):]
            if not os.path.normpath(inside).startswith("/dev/"):
                raise BadRequest("device %s: a device's path in the container begins with /dev/" % inside)
            nodes.append((inside,) + _device_entry(path, entry)[1:])
            rules.append("%s %d:%d %s" % (_device_entry(path, entry)[1:4] + (access,)))
    return nodes, rules


def find_init_program():
    """A small init of this host for --init: (path, arguments before the command)."""
    for name, arguments in (("docker-init", ["--"]), ("tini", ["--"]), ("tini-static", ["--"]), ("catatonit", ["--"]), ("dumb-init", ["--"])):
        for folder in DEFAULT_PATH.split(":") + ["/usr/libexec/docker", "/usr/libexec/podman"]:
            path = os.path.join(folder, name)
            if os.access(path, os.X_OK):
                return path, arguments
    raise BadRequest("--init needs one of the programs docker-init, tini, catatonit or dumb-init on this host: install one (on "
                     "Debian: apt-get install tini)")


def security_options(options):
    """{no_new_privileges} of SecurityOpt; BadRequest for what pydock does not know."""
    result = {"no_new_privileges": False}
    for option in options or []:
        name, _, value = option.replace(":", "=", 1).partition("=")
        if name == "no-new-privileges" and value in ("", "true", "false"):
            result["no_new_privileges"] = value != "false"
        elif not (name in ("apparmor", "label", "systempaths", "seccomp") and value):
            raise BadRequest("invalid --security-opt 2: \"%s\"" % option)
    return result


_LIMIT_FIELDS = ("Memory", "MemorySwap", "MemoryReservation", "MemorySwappiness", "CpuShares", "NanoCpus", "CpuPeriod", "CpuQuota",
                 "CpusetCpus", "CpusetMems", "PidsLimit", "BlkioWeight", "BlkioWeightDevice", "BlkioDeviceReadBps", "BlkioDeviceWriteBps",
                 "BlkioDeviceReadIOps", "BlkioDeviceWriteIOps", "OomKillDisable")


def limits_of(host):
    """The limits of a HostConfig that are set."""
    return {key: host[key] for key in _LIMIT_FIELDS if host.get(key)}


def process_spec(container, user, env, argv, cwd, tty, privileged=False):
    """What the spec of an init and of an exec share."""
    host = container.host_config
    return {"argv": argv, "env": env, "cwd": cwd, "user": user, "tty": tty, "groups": host["GroupAdd"] or [], "privileged": privileged,
            "capabilities": list(CAPABILITIES) if privileged else granted_capabilities(host), "rlimits": {
                limit["Name"]: [limit.get("Soft", -1), limit.get("Hard", -1)] for limit in host["Ulimits"]},
            "oom_score_adj": host["OomScoreAdj"], **security_options(host["SecurityOpt"])}


def container_env(container, env):
    """PATH, HOSTNAME and TERM below what was asked for."""
    base = ["PATH=" + DEFAULT_PATH, "HOSTNAME=" + container.config["Hostname"]] + (["TERM=xterm"] if container.tty else [])
    for entry in env:
        name, equals, value = entry.partition("=")
        base = set_env(base, name, value) if equals else base
    return base


def init_spec(container, root, mount_point, volumes, cgroup_parent, namespaces):
    """The whole spec of a container's init."""
    config, host = container.config, container.host_config
    argv = [container.path] + container.args
    mounts = [spec_mount(point, volumes) for point in container.mounts]
    if host["Init"]:
        program, arguments = find_init_program()
        mounts.append({"type": "bind", "target": "/sbin/docker-init", "source": program, "read_only": True})
        argv = ["/sbin/docker-init"] + arguments + argv
    mounts += [{"type": "bind", "target": "/etc/" + name, "source": container.path_of(name), "read_only": False}
               for name in ("hostname", "hosts", "resolv.conf") if "/etc/" + name not in {m["target"] for m in mounts}]
    nodes, rules = requested_devices(host["Devices"])
    unconfined = host["Privileged"] or "systempaths=unconfined" in (host["SecurityOpt"] or [])
    spec = process_spec(container, config["User"], container_env(container, config["Env"]), argv, config["WorkingDir"], container.tty,
                        host["Privileged"])
    spec.update(
        id=container.id, root=dict(root, volatile=host["AutoRemove"]), mount_point=mount_point, mounts=mounts, namespaces=namespaces, hostname=config["Hostname"],
        domainname=config["Domainname"], open_stdin=config["OpenStdin"], read_only=host["ReadonlyRootfs"], shm_size=host["ShmSize"],
        sysctls=host["Sysctls"] or {}, size=host["ConsoleSize"], devices=list(DEVICES) + (host_devices() if host["Privileged"] else nodes),
        masked_paths=[] if unconfined else list(MASKED_PATHS if host["MaskedPaths"] is None else host["MaskedPaths"]),
        readonly_paths=[] if unconfined else list(READONLY_PATHS if host["ReadonlyPaths"] is None else host["ReadonlyPaths"]),
        cgroup={"name": container.id, "parent": host["CgroupParent"] or cgroup_parent, "limits": limits_of(host),
                "devices": None if host["Privileged"] else rules + list(host["DeviceCgroupRules"] or [])})
    return spec


class NetworkUse:
    """What a container has of networks during one start: endpoints {network: endpoint}, the records of its published ports, and the
    listeners that its monitor will proxy."""

    def __init__(self):
        self.endpoints, self.published, self.listeners = {}, [], []

    @property
    def proxies(self):
        return [{"proto": record["proto"], "target": [record["address"], record["port"]]} for record in self.published]

    @property
    def sockets(self):
        return [listener.fileno() for listener in self.listeners]

    def close(self):
        """Close the daemon's copies of the listeners."""
        for listener in self.listeners:
            listener.close()


class ContainerNetworks:
    """The networks of containers: what a start takes, what an exit gives back, connect and disconnect. `containers` is the
    table {id: Container}."""

    def __init__(self, networks, spawner, containers, default_dns):
        self.networks, self.spawner, self.containers, self.default_dns = networks, spawner, containers, default_dns

    def reserve(self, container):
        """Addresses and ports for a start; nothing is in the kernel yet but the listeners."""
        connection, host = NetworkUse(), container.host_config
        mode = container.network_mode
        if mode in ("host", "none"):
            network = self.networks.find(mode)
            connection.endpoints[mode] = {"NetworkID": network.id, "EndpointID": new_id()}
        if mode in ("host", "none") or mode.startswith("container:"):
            return connection
        try:
            for number, (name, asked) in enumerate(container.networks.items()):
                connection.endpoints[name] = self.networks.reserve(
                    name, container.id, container.name, ((asked.get("IPAMConfig") or {}).get("IPv4Address")) or None,
                    asked.get("MacAddress") or container.config.get("MacAddress") or None, asked.get("Aliases") or (), "eth%d" % number,
                    asked.get("Links") or host["Links"] or ())
            bindings = {port if "/" in port else port + "/tcp": wishes for port, wishes in host["PortBindings"].items()}
            if host["PublishAllPorts"]:
                for port in container.config["ExposedPorts"] or ():
                    bindings.setdefault(parse_exposed(port)[0], [{}])
            if bindings and connection.endpoints:
                first = next(iter(connection.endpoints.values()))
                connection.published, connection.listeners = self.networks.publish(first, bindings)
        except BaseException:
            self.release(connection.endpoints)
            raise
        return connection

    def plug(self, container, connection, pid):
        """Put the interfaces into the namespaces of a container's init; returns what init needs to know: {endpoints, resolver}.
        Without endpoints it has no network namespace of its own."""
        if container.network_mode == "host" or container.network_mode.startswith("container:"):
            return {"endpoints": None}
        bridged = [endpoint for endpoint in connection.endpoints.values() if "interface" in endpoint]
        for endpoint in bridged:
            self.networks.plug(endpoint, pid)
            self.networks.emit("connect", endpoint["NetworkID"], container=container.id, name=endpoint["network"], type="bridge")
        self._announce(bridged)
        return {"endpoints": bridged, "resolver": self.networks.names(container.id, ()) is not None}

    def release(self, endpoints):
        """Give back what a container had: {network: endpoint}."""
        bridged = [endpoint for endpoint in endpoints.values() if "interface" in endpoint]
        for endpoint in bridged:
            self.networks.release(endpoint)
        self._announce(bridged)

    def _announce(self, endpoints):
        """Write what the resolvers of all containers in the networks of these endpoints answer from."""
        for container_id in self.networks.neighbours([endpoint["NetworkID"] for endpoint in endpoints]):
            container = self.containers.get(container_id)
            if container is not None and not container.removed:
                servers = container.host_config["Dns"] or list(self.default_dns) or host_name_servers()
                write_json(container.path_of("names.json"), self.networks.names(container_id, servers), sync=False)

    def connect(self, container, name, asked):
        """Put a container into a further network, now when it runs, else at its next start."""
        network = self.networks.find(name)
        with container.lock:
            if container.network_mode in ("host", "none") or container.network_mode.startswith("container:"):
                raise Forbidden("container sharing network namespace with another container or host cannot be connected to any other network")
            if network.name in container.networks:
                raise Forbidden("endpoint with name %s already exists in network %s" % (container.name, network.name))
            if network.driver != "bridge":
                raise Forbidden("container cannot be connected to network of driver %s" % network.driver)
            if container.running:
                self._connect_live(container, network, asked)
            container.networks[network.name] = asked
            container.save()
        self.networks.emit("connect", network.id, container=container.id, name=network.name, type="bridge")

    def _connect_live(self, container, network, asked):
        used = {endpoint["interface"] for endpoint in container.state["endpoints"].values()}
        interface = next(i for i in ("eth%d" % n for n in range(1000)) if i not in used)
        endpoint = self.networks.reserve(network.name, container.id, container.name, (asked.get("IPAMConfig") or {}).get("IPv4Address") or None,
                                         asked.get("MacAddress") or None, asked.get("Aliases") or (), interface, asked.get("Links") or ())
        try:
            with contextlib.ExitStack() as stack:
                namespaces = open_namespaces(container.state["pid"], container.state["start_time"])
                for fd in namespaces.values():
                    stack.callback(os.close, fd)
                self.networks.plug(endpoint, netns=namespaces["net"])
            self.spawner.run("configure_in", process=(container.state["pid"], container.state["start_time"]), endpoints=[endpoint])
        except BaseException:
            self.networks.unplug(endpoint)
            self.release({network.name: endpoint})
            raise
        container.set_state(endpoints=dict(container.state["endpoints"], **{network.name: endpoint}))
        self._announce([endpoint])

    def disconnect(self, container, name):
        """Take a container out of a network."""
        network = self.networks.find(name)
        with container.lock:
            if network.name not in container.networks:
                raise Forbidden("container %s is not connected to network %s" % (container.id, network.name))
            endpoints = dict(container.state["endpoints"])
            endpoint = endpoints.pop(network.name, None)
            if endpoint and "interface" in endpoint:
                self.networks.unplug(endpoint)
                self.release({network.name: endpoint})
            del container.networks[network.name]
            container.set_state(endpoints=endpoints)
            container.save()
        self.networks.emit("disconnect", network.id, container=container.id, name=network.name, type=network.driver)


class Exec:
    """One exec of a container: its request (docker's ExecConfig), and what became of it."""

    def __init__(self, container, config):
        self.id, self.container, self.config = new_id(), container, config
        self.pid, self.exit_code, self.started, self.monitor, self.finished = 0, None, False, None, threading.Event()

    @property
    def running(self):
        return self.started and self.exit_code is None

    def to_api(self):
        """GET /exec/ID/json."""
        config = self.config
        return {"ID": self.id, "Running": self.running, "ExitCode": self.exit_code, "Pid": self.pid, "ContainerID": self.container.id,
                "ProcessConfig": {"tty": config["Tty"], "entrypoint": config["Cmd"][0], "arguments": config["Cmd"][1:],
                                  "privileged": config["Privileged"], "user": config["User"]},
                "OpenStdin": config["AttachStdin"], "OpenStderr": config["AttachStderr"], "OpenStdout": config["AttachStdout"],
                "CanRemove": False, "DetachKeys": config["DetachKeys"]}


EXEC_CONFIG = {"User": "", "Privileged": False, "Tty": False, "AttachStdin": False, "AttachStderr": False, "AttachStdout": False,
               "Detach": False, "DetachKeys": "", "Env": None, "WorkingDir": "", "Cmd": None, "ConsoleSize": []}
DETACH_KEYS = "ctrl-p,ctrl-q"


class Containers:
    """All containers of one data root, and what can be done with them. The engine gives the stores; `emit(action, container,
    **attributes)` reports events. `run_root` holds a folder with the control socket of each monitor."""

    def __init__(self, root, run_root, images, volumes, networks, spawner, emit, cgroup_parent="pydock", masks=(), dns=()):
        self.root, self.folder, self.run_root = root, os.path.join(root, "containers"), run_root
        self.images, self.layers, self.volumes, self.networks = images, images.layers, volumes, networks
        self.spawner, self.emit, self.cgroup_parent, self.masks = spawner, emit, cgroup_parent, masks
        self.driver, self.default_dns = self.layers.driver, dns
        self.lock = threading.RLock()
        self.containers, self.names = {}, {}
        self.plugs, self.execs, self.health = ContainerNetworks(networks, spawner, self.containers, dns), Execs(self), HealthChecks(self)
        self.watcher = Watcher()
        self.mount_point = os.path.join(root, "mnt")
        for folder in (self.folder, run_root, self.mount_point):
            os.makedirs(folder, 0o700, exist_ok=True)

    # -- finding ---------------------------------------------------------------------------------------------------------

    def find(self, name):
        """By full id, by name, by unique id prefix: in that order (CVE-2014-5278)."""
        with self.lock:
            found = self.containers.get(name) or self.names.get(name[1:] if name.startswith("/") else name)
            if found is None:
                found = self.containers.get(find_by_prefix(self.containers, name) or "")
        if found is None:
            raise NotFound("No such container: %s" % name)
        return found

    def all(self):
        """Newest first."""
        with self.lock:
            return sorted(self.containers.values(), key=lambda c: -c.created)

    # -- create ----------------------------------------------------------------------------------------------------------

    def _named(self, name):
        """A container that a request names beside its own. Not 404: of that a client concludes that the image is missing, and pulls it."""
        try:
            return self.find(name)
        except NotFound as error:
            raise BadRequest(str(error))

    def create(self, body, name=None, platform=""):
        """Make a container of POST /containers/create's body; returns (Container, warnings). platform: `linux/arm64`, or "" for any."""
        config = _check_types(body, CONFIG, "Config")
        host = _check_types(body.get("HostConfig") or {}, HOST_CONFIG, "HostConfig")
        if not config["Image"]:
            raise BadRequest("no image specified")
        check_conflicts(config, host)
        image = self.images.find(config["Image"])
        _check_platform(image, config["Image"], platform)
        config = merge_config(config, image.container_config)
        path, args = check_config(config)
        check_host_config(host, self._named)
        for link in host["Links"] or []:
            self._named(link.partition(":")[0].lstrip("/"))
        security_options(host["SecurityOpt"])
        _, warnings = cgroups(host["CgroupParent"] or self.cgroup_parent).check(limits_of(host))
        networks = requested_networks(host, (body.get("NetworkingConfig") or {}).get("EndpointsConfig") or {})
        container_id = new_id()
        if not config["Hostname"]:
            config["Hostname"] = os.uname().nodename if host["NetworkMode"] == "host" else container_id[:12]
        points = self._mount_points(config, host)
        folder = os.path.join(self.folder, container_id)
        container = Container(folder, {"id": container_id, "name": "", "created": time.time_ns(), "image": image.id,
                                       "image_name": config["Image"], "path": path, "args": args, "config": config, "host_config": host,
                                       "mounts": points, "networks": networks})
        self._register(container, name)
        try:
            self._make_folder(container, image)
        except BaseException:
            self._unregister(container)
            self._drop_anonymous(container)
            remove_tree(folder)
            raise
        self.emit("create", container)
        return container, warnings

    def _register(self, container, name):
        """Take the name (or an invented one) for the container."""
        with self.lock:
            if name:
                name = check_container_name(name)
            else:
                name = next(n for n in iter(random_name, None) if n not in self.names)
            if name in self.names:
                raise Conflict('Conflict. The container name "/%s" is already in use by container "%s". You have to remove (or rename) '
                               "that container to be able to reuse that name." % (name, self.names[name].id))
            container.name = name
            self.names[name] = self.containers[container.id] = container

    def _unregister(self, container):
        with self.lock:
            self.containers.pop(container.id, None)
            if self.names.get(container.name) is container:
                del self.names[container.name]

    def _make_folder(self, container, image):
        """The container's folder, whole or not at all: made under tmp/ and renamed."""
        new = os.path.join(self.root, "tmp", "container-" + container.id[:16])
        os.mkdir(new, 0o700)
        try:
            self.mounts_folder(image)  # so that what cannot work fails now
            self.driver.prepare(self.layers, image.chain, new)
            write_json(os.path.join(new, "config.json"), {key: getattr(container, key) for key in Container._SAVED},
                       sync=not container.host_config["AutoRemove"])
            os.rename(new, container.folder)
        finally:
            remove_tree(new)
        if not container.host_config["AutoRemove"]:
            sync_folder(self.folder)
        self._fill_volumes(container, image)

    def mounts_folder(self, image):
        """The folder of mount points above the image's layers, made at its first container."""
        folder = os.path.join(self.layers.folder, image.chain, "mounts") if image.chain else os.path.join(self.root, "mounts-" + image.id[:12])
        with self.layers.lock:
            if not image.is_host and os.path.isdir(folder):
                return folder
            if image.is_host and getattr(self, "_host_mounts", None):
                return self._host_mounts
            with self.layers.making() as work:
                spec = self.driver.image_root(self.layers, image.chain, image.meta.get("path"))
                masks = self.host_masks(image.meta["path"]) if image.is_host else []
                if self.driver.name == "overlay":
                    self.spawner.run("build_mount_points", spec=spec, folder=os.path.join(work, "diff"), masks=masks, work=work)
                if image.is_host:
                    remove_tree(folder)
                os.rename(os.path.join(work, "diff"), folder)
            if image.is_host:
                self._host_mounts = folder
        return folder

    def host_masks(self, host_root):
        """What nobody sees of the host in the image `host`: engines' data, and what other file systems hold there."""
        paths = {"/proc", "/sys", "/dev", "/run", "/var/lib/docker", "/var/lib/containers", "/var/lib/containerd"} | set(self.masks)
        if host_root == "/":
            for line in read_file("/proc/self/mountinfo").decode("utf-8", "surrogateescape").splitlines():
                path = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m.group(1), 8)), line.split()[4])
                paths.add(path)
        prefix = host_root.rstrip("/")
        inside = {p[len(prefix):] if prefix and p.startswith(prefix + "/") else p for p in set(map(os.path.realpath, paths)) | paths} - {"/", ""}
        # a path below another mask needs none of its own
        return sorted(p for p in inside if not any(p.startswith(q.rstrip("/") + "/") for q in inside if q != p))

    def root_spec(self, container):
        image = self.images.lookup("sha256:" + container.image)
        if image is None:
            raise NotFound("No such image: sha256:%s: the image of container %s is gone" % (container.image, container.id[:12]))
        return self.driver.container_root(self.layers, image.chain, container.folder, self.mounts_folder(image), image.meta.get("path"))

    # -- volumes ---------------------------------------------------------------------------------------------------------

    def _mount_points(self, config, host):
        """The mount points of a new container: volumes-from, below binds, below mounts and tmpfs, below the image's volumes."""
        points = {}
        for entry in host["VolumesFrom"] or []:
            name, _, mode = entry.partition(":")
            writable = parse_mode(mode)[0]
            for point in self._named(name).mounts:
                if point["Type"] != "tmpfs":
                    points[point["Destination"]] = dict(point, RW=point["RW"] and writable, anonymous=False)
        asked = [parse_bind(text) for text in host["Binds"] or [] if ":" in text] + [parse_mount_entry(m) for m in host["Mounts"] or []]
        asked += [dict(parse_mount_entry({"Type": "tmpfs", "Target": target}), data=data) for target, data in (host["Tmpfs"] or {}).items()]
        seen = set()
        for point in asked:
            if point["Destination"] in seen:
                raise BadRequest("Duplicate mount point: %s" % point["Destination"])
            seen.add(point["Destination"])
            if point["Type"] == "tmpfs":
                parse_tmpfs(point["data"])
            points[point["Destination"]] = point
        for target in list(config["Volumes"] or {}) + [text for text in host["Binds"] or [] if ":" not in text]:
            point = parse_bind(target)
            points.setdefault(point["Destination"], dict(point, Mode=""))
        for point in points.values():
            if point["Type"] == "volume":
                made = self.volumes.create(point["Name"], point.pop("labels", None), point.pop("options", None), not point["Name"])
                point.update(Name=made["Name"], anonymous=made["anonymous"] and not point["Name"])
        return list(points.values())

    def _fill_volumes(self, container, image):
        """An empty volume begins with what the image has at its place."""
        for point in container.mounts:
            if point["Type"] != "volume" or point.get("nocopy") or image.is_host or not image.chain:
                continue
            target = self.volumes.path(point["Name"])
            if not os.listdir(target):
                with self.layers.making() as work:
                    spec = self.driver.image_root(self.layers, image.chain)
                    self.spawner.run("copy_up", root=spec, work=os.path.join(work, "diff"), path=point["Destination"], target=target)

    def _drop_anonymous(self, container):
        for point in container.mounts:
            if point["Type"] == "volume" and self.volumes.volumes.get(point["Name"], {}).get("anonymous"):
                with contextlib.suppress(Conflict, NotFound):
                    self.volumes.remove(point["Name"])

    # -- monitors --------------------------------------------------------------------------------------------------------

    def run_folder(self, an_id):
        return os.path.join(self.run_root, an_id[:32])

    def monitor_of(self, container):
        """The link to the container's monitor, forked where there is none yet: by the first attach, wait or start."""
        with container.lock:
            if container.monitor is None:
                log = container.host_config["LogConfig"]
                options = {"path": container.log_path, "max_size": parse_size(log["Config"].get("max-size", "100m")),
                           "max_files": int(log["Config"].get("max-file", 5))}
                message = {"id": container.id, "kind": "container", "folder": container.folder, "run": self.run_folder(container.id),
                           "stdin_once": container.config["StdinOnce"], "durable": not container.host_config["AutoRemove"],
                           "log": None if log["Type"] == "none" else options}
                self._adopt_monitor(container, MonitorLink.start(self.spawner, message))
            return container.monitor

    def _adopt_monitor(self, container, link):
        events, state = link.watch()
        container.monitor = link
        self.watcher.add(events, functools.partial(self._on_event, container, link))
        return state

    def _on_event(self, container, link, event):
        """From the watcher, on a thread of its own: what a monitor tells; None when it is gone."""
        if event is None:
            self._monitor_gone(container, link)
        elif event["event"] == "exit":
            self._on_exit(container, link, event)
        elif event["event"] == "detach":
            self.emit("detach", container)

    def _monitor_gone(self, container, link):
        with container.lock:
            if container.monitor is not link:
                return
            container.monitor = None
            link.close()
            remove_tree(self.run_folder(container.id))
            if container.running:
                warn("the monitor of container %s was killed: its processes are ended" % container.id[:12])
                self._kill_remains(container)
                self._finish(container, {"exit_code": 137, "finished": time.time_ns(), "oom": False}, None)

    def _kill_remains(self, container):
        """End what is left of a container without a monitor."""
        group = cgroups(container.host_config["CgroupParent"] or self.cgroup_parent).find(container.id)
        with contextlib.suppress(OSError, Error):
            group.thaw()
        with contextlib.suppress(OSError, Error):
            group.kill()
            group.delete()
        pid = container.state["pid"]
        if pid and stat_start_time(pid) == container.state["start_time"]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def _with_monitor(self, container, use):
        """use(link); once more with a fresh monitor where the old one ended itself just then, unused."""
        try:
            return use(self.monitor_of(container))
        except MonitorGone:
            with container.lock:
                if container.running:
                    raise
                container.monitor = None
            return use(self.monitor_of(container))

    # -- start -----------------------------------------------------------------------------------------------------------

    def start(self, container):
        """POST start: NotModified when it runs."""
        with container.lock:
            if container.paused:
                raise Conflict("cannot start a paused container, try unpause instead")
            if container.running:
                raise NotModified("container %s is already running" % container.id)
            if container.removing:
                raise Conflict("container is marked for removal and cannot be started")
            if container.timer:
                container.timer.cancel()
                container.timer = None
            container.set_state(restarts=0, stopped_by_user=False)
            self._start(container)

    def _start(self, container):
        try:
            self._launch(container)
        except BaseException as error:
            if isinstance(error, MonitorGone):  # nobody else cleans up after the init that it has forked
                self._kill_remains(container)
            message = str(error) if isinstance(error, Error) else os_error_text(error) if isinstance(error, OSError) else str(error)
            code = 127 if re.search("executable file not found|no such file or directory", message) else 126 if re.search(
                "permission denied|is a directory|exec format error", message) else 128
            status = "exited" if container.state["finished"] else "created"
            container.set_state(status=status, pid=0, exit_code=code, error=message, endpoints={}, ports={}, published=[])
            link, container.monitor = container.monitor, None
            if container.host_config["AutoRemove"] and not container.removing:
                self._remove(container, volumes=True)
            if link is not None:
                with contextlib.suppress(Error, OSError):
                    link.request("quit", exit_code=code)
                link.close()
            raise
        self.emit("start", container)

    def _launch(self, container):
        """The story of a start: write the files, take addresses and ports, let the monitor fork init; when its namespaces are there,
        put the interface in; when execve has happened, write the state down."""
        container.set_state(error="")
        with container.files:  # a copy may have the root mounted: once more, and the upper folder would be corrupted
            self._launch_alone(container)
        self.health.start(container)

    def _launch_alone(self, container):
        namespaces = self._namespaces(container)
        root = self.root_spec(container)
        connection = self.plugs.reserve(container)
        try:
            self._write_files(container, connection.endpoints)
            spec = init_spec(container, root, self.mount_point, self.volumes, self.cgroup_parent, namespaces)
            plug = functools.partial(self.plugs.plug, container, connection)
            answer = self._with_monitor(container, lambda monitor: monitor.start_process(spec, connection.proxies, connection.sockets, plug))
        except BaseException:
            self.plugs.release(connection.endpoints)
            raise
        finally:
            connection.close()
        container.set_state(status="running", pid=answer["pid"], start_time=stat_start_time(answer["pid"]), started=answer["started"],
                            finished=0, exit_code=0, oom=False, endpoints=connection.endpoints, published=connection.published,
                            ports=port_map(connection.published, container.config["ExposedPorts"] or ()),
                            health={"Status": "starting", "FailingStreak": 0, "Log": []} if health_command(container) else None)

    def _namespaces(self, container):
        """The namespaces part of a spec: private, host, or another container's."""
        host = container.host_config
        result = {"uts": host["UTSMode"] or "private", "ipc": host["IpcMode"], "pid": host["PidMode"] or "private",
                  "cgroup": host["CgroupnsMode"], "net": container.network_mode}
        result["ipc"] = {"shareable": "private", "none": "private"}.get(result["ipc"], result["ipc"])
        for name, mode in result.items():
            if mode.startswith("container:"):
                other = self.find(mode[10:])
                if other is container:
                    raise BadRequest("cannot join own %s" % {"net": "network"}.get(name, name.upper() + " namespace"))
                if not other.running:
                    raise Conflict("cannot join network of a non running container: %s" % other.id if name == "net" else
                                   "container %s is not running" % other.id)
                result[name] = {"pid": other.state["pid"], "start_time": other.state["start_time"]}
            elif name == "net":
                result[name] = "host" if mode == "host" else "private"
        return result

    def _write_files(self, container, endpoints):
        """hostname, hosts and resolv.conf: bind-mounted, so written in place and never replaced. Who joins the network of another
        container gets what that one has."""
        config = container.config
        if container.network_mode.startswith("container:"):
            other = self.find(container.network_mode[10:])
            config.update(Hostname=other.config["Hostname"], Domainname=other.config["Domainname"])
            self._fill_files(container, {name: read_file(other.path_of(name)).decode() for name in ("hosts", "resolv.conf", "hostname")})
            return
        full = config["Hostname"] + ("." + config["Domainname"] if config["Domainname"] else "")
        files = {"hosts": hosts_file(container, endpoints, full), "resolv.conf": resolv_conf(container, self.default_dns)}
        if container.network_mode == "bridge":
            for link in container.host_config["Links"] or []:
                name, _, alias = link.partition(":")
                other = self.find(name.lstrip("/"))
                address = other.state["endpoints"].get("bridge", {}).get("IPAddress")
                if address:
                    files["hosts"] += "%s\t%s %s %s\n" % (address, alias or other.name, other.id[:12], other.name)
        files["hostname"] = config["Hostname"] + "\n"
        self._fill_files(container, files)

    @staticmethod
    def _fill_files(container, files):
        for name, text in files.items():
            with open(container.path_of(name), "w") as f:
                f.write(text)
            os.chmod(container.path_of(name), 0o644)

    # -- exit ------------------------------------------------------------------------------------------------------------

    def _on_exit(self, container, link, exit):
        with container.lock:
            if container.monitor is link:
                container.monitor = None
                self._finish(container, exit, link)

    def _finish(self, container, exit, link):
        """A container's process has ended: record it, give back what it had, restart or remove it, and then let its monitor answer
        those who wait: what they look at next is already so."""
        endpoints = container.state["endpoints"]
        ran = exit["finished"] - container.state["started"]
        restart = self._restart_delay(container, exit["exit_code"], ran)
        for e in container.execs.values():
            e.finished.wait(0.2)
        container.set_state(status="restarting" if restart is not None else "exited", pid=0, exit_code=exit["exit_code"],
                            finished=exit["finished"], oom=exit["oom"], endpoints={}, ports={}, published=[])
        if exit["oom"]:
            self.emit("oom", container)
        self.emit("die", container, exitCode=str(exit["exit_code"]), execDuration=str(ran // 10 ** 9))
        for name, endpoint in endpoints.items():
            self.networks.emit("disconnect", endpoint["NetworkID"], container=container.id, name=name,
                               type={"none": "null"}.get(name, "bridge" if "interface" in endpoint else name))
        self.plugs.release(endpoints)
        if restart is None and container.host_config["AutoRemove"]:
            with contextlib.suppress(Error, OSError):
                self._remove(container, volumes=True)
        if link is not None:
            with contextlib.suppress(Error, OSError):
                link.request("quit")
            link.close()
        with container.changed:
            container.changed.notify_all()
        if restart is not None:
            container.timer = threading.Timer(restart, self._restart_after_exit, (container,))
            container.timer.daemon = True
            container.timer.start()

    def _restart_delay(self, container, code, ran):
        """Seconds until the restart that the policy wants (100 ms, doubled each time up to a minute, as docker), or None."""
        policy, state = container.host_config["RestartPolicy"], container.state
        if state["stopped_by_user"] or container.removing:
            return None
        if ran > 10 * 10 ** 9:
            state["restarts"] = 0
        wanted = policy["Name"] in ("always", "unless-stopped") or policy["Name"] == "on-failure" and code != 0 and (
            not policy["MaximumRetryCount"] or state["restarts"] < policy["MaximumRetryCount"])
        return min(60, 0.1 * 2 ** min(state["restarts"], 10)) if wanted else None

    def _restart_after_exit(self, container):
        with container.lock:
            if container.state["status"] != "restarting" or container.removing:
                return
            container.timer = None
            container.set_state(restarts=container.state["restarts"] + 1)  # still "restarting": nobody sees it at rest
            try:
                self._start(container)
            except (Error, OSError) as error:
                warn("container %s cannot be restarted: %s" % (container.id[:12], error))

    # -- stop, kill, pause -----------------------------------------------------------------------------------------------

    def _cgroup(self, container):
        return cgroups(container.host_config["CgroupParent"] or self.cgroup_parent).find(container.id)

    def signal(self, container, number):
        link = container.monitor
        if link is not None:
            with contextlib.suppress(MonitorGone):
                link.request("signal", signal=int(number))

    def wait_for_exit(self, container, timeout=None):
        """True when the container's process is gone within so many seconds."""
        with container.changed:
            return container.changed.wait_for(lambda: not container.running, timeout)

    def thaw(self, container):
        with container.lock:
            if container.paused:
                self._cgroup(container).thaw()
                container.set_state(status="running")

    def stop(self, container, timeout=None, stop_signal=None):
        """The stop signal, and SIGKILL after timeout seconds (-1: never). NotModified when it does not run."""
        with container.lock:
            was_restarting = container.state["status"] == "restarting"
            container.set_state(stopped_by_user=True)
            if was_restarting:
                container.timer.cancel()
                container.set_state(status="exited")
                return
            if not container.running:
                raise NotModified("container %s is not running" % container.id)
            self.thaw(container)
        number = signal_number(stop_signal or container.config["StopSignal"] or "TERM")
        if timeout is None:
            timeout = container.config["StopTimeout"] if container.config["StopTimeout"] is not None else 10
        self.emit("kill", container, signal=str(number))
        self.signal(container, number)
        if not self.wait_for_exit(container, timeout if timeout >= 0 else None):
            self.emit("kill", container, signal="9")
            self._kill_hard(container)
        self.emit("stop", container)

    def _kill_hard(self, container):
        with contextlib.suppress(OSError, Error):
            self._cgroup(container).thaw()  # a commit may just have frozen it: the freezer of version 1 holds SIGKILL back, too
        self.signal(container, signal.SIGKILL)
        if not self.wait_for_exit(container, 10):
            raise Error("container %s did not end by SIGKILL within 10 seconds: a process of it is stuck in the kernel" % container.id[:12])

    def kill(self, container, name="KILL"):
        number = signal_number(name or "KILL")
        with container.lock:
            if not container.running:
                raise Conflict("Container %s is not running" % container.id)
            if number == signal.SIGKILL:
                container.set_state(stopped_by_user=True)
            self.thaw(container)
        self.emit("kill", container, signal=str(number))
        if number == signal.SIGKILL:
            self._kill_hard(container)
        else:
            self.signal(container, number)

    def restart(self, container, timeout=None, stop_signal=None):
        with contextlib.suppress(NotModified):
            self.stop(container, timeout, stop_signal)
        self.start(container)
        self.emit("restart", container)

    def pause(self, container):
        with container.lock:
            if container.paused:
                raise Conflict("Container %s is already paused" % container.id)
            if not container.running:
                raise Conflict("Container %s is not running" % container.id)
            try:
                self._cgroup(container).freeze()
            except (OSError, Error):
                if container.monitor is not None and stat_start_time(container.state["pid"]) == container.state["start_time"]:
                    raise
                raise Conflict("Container %s is not running" % container.id)  # it has just ended
            container.set_state(status="paused")
        self.emit("pause", container)

    def unpause(self, container):
        with container.lock:
            if not container.paused:
                raise Conflict("Container %s is not paused" % container.id)
            self.thaw(container)
        self.emit("unpause", container)

    # -- remove, rename, update --------------------------------------------------------------------------------------------

    def remove(self, container, force=False, volumes=False):
        with container.lock:
            if container.removed:
                raise NotFound("No such container: %s" % container.id)
            if container.running and not force:
                what, how = ("paused", "unpause and then stop") if container.paused else ("running", "stop")
                raise Conflict('cannot remove container "/%s": container is %s: %s the container before removing or force remove'
                               % (container.name, what, how))
            container.removing = True
            if container.timer:
                container.timer.cancel()
        try:
            if container.running:
                self.thaw(container)
                self.emit("kill", container, signal="9")
                self._kill_hard(container)
            with container.lock:
                if not container.removed:  # --rm was faster
                    self._remove(container, volumes)
        except BaseException:
            container.removing = False
            raise

    def _remove(self, container, volumes):
        container.removing = True
        if container.monitor is not None:
            with contextlib.suppress(Error, OSError):
                container.monitor.request("quit")  # created and never started: who attached or waits is let go
            container.monitor.close()
            container.monitor = None
        gone = os.path.join(self.root, "tmp", "gone-" + container.id[:16])
        with container.files:
            try:
                os.rename(container.folder, gone)  # whole or gone, also when the power goes
            except FileNotFoundError:
                gone = None
            with container.changed:
                container.removed = True
        for ex in list(container.execs.values()):
            self.execs.forget(ex)
        self._unregister(container)
        if gone:
            remove_tree(gone)
        remove_tree(self.run_folder(container.id))
        if volumes:
            self._drop_anonymous(container)
        self.emit("destroy", container)
        with container.changed:
            container.changed.notify_all()

    def rename(self, container, name):
        if not name:
            raise BadRequest("Neither old nor new names may be empty")
        with container.lock, self.lock:
            name = check_container_name(name)
            if name == container.name:
                raise BadRequest("Renaming a container with the same name as its current name")
            other = self.names.get(name)
            if other is not None:
                raise Conflict('Error when allocating new name: Conflict. The container name "/%s" is already in use by container "%s". You '
                               "have to remove (or rename) that container to be able to reuse that name." % (name, other.id))
            old, container.name = container.name, name
            for endpoint in container.state["endpoints"].values():
                if "interface" in endpoint:
                    endpoint["name"] = name
            container.save()
            del self.names[old]
            self.names[name] = container
        self.emit("rename", container, oldName="/" + old)

    def update(self, container, body):
        """Change limits and the restart policy; returns warnings."""
        host = dict(container.host_config)
        changes = {key: value for key, value in _check_types(body, {k: HOST_CONFIG[k] for k in _LIMIT_FIELDS + ("RestartPolicy",)},
                                                            "HostConfig").items() if body.get(key) not in (None, 0, "", {}, [])}
        host.update(changes)
        check_host_config(host, self._named)
        with container.lock:
            group_set = cgroups(host["CgroupParent"] or self.cgroup_parent)
            limits = {key: value for key, value in changes.items() if key in _LIMIT_FIELDS}
            _, warnings = group_set.check(limits_of(host))
            if container.running and limits:
                warnings = group_set.update(group_set.find(container.id), limits)
            container.host_config = host
            container.save()
        self.emit("update", container)
        return warnings

    # -- attach, wait, resize ----------------------------------------------------------------------------------------------

    def attach(self, container, take_connection, options):
        """Hand a client's connection to the monitor. take_connection() sends the head of the answer and returns
        (descriptor, bytes that the client has sent already)."""
        if container.paused:
            raise Conflict("container %s is paused, unpause the container before attach" % container.name)
        keys = parse_detach_keys(options.pop("detach_keys") or DETACH_KEYS)
        keys = keys if container.tty else b""
        options["stdin"] = options["stdin"] and container.config["OpenStdin"]
        options["framed"] = options["framed"] and not container.tty

        def hand_over(link):
            link.request("hello")  # it is there; after this line the client's connection is on its way
            fd, pending = take_connection()
            try:
                link.request("attach", [fd], pending=pending.hex(), detach_keys=keys.hex(), **options)
            finally:
                os.close(fd)
        self._with_monitor(container, hand_over)
        self.emit("attach", container)

    def hand_wait_over(self, container, condition, take_connection):
        """Give a waiting client to the monitor of a container that runs, or is to be started, which then answers with the exit code.
        False where `wait` has to answer it: the monitor knows only of the exit."""
        with container.lock:
            if condition == "removed" and not container.host_config["AutoRemove"] or not container.running and condition == "not-running":
                return False
            if container.removed or container.removing:
                return False

            def hand_over(link):
                link.request("hello")
                fd, _ = take_connection()
                try:
                    link.request("wait", [fd])
                finally:
                    os.close(fd)
            self._with_monitor(container, hand_over)
            return True

    def wait(self, container, condition):
        """Wait here until the container does not run, or is removed; its exit code."""
        with container.changed:
            container.changed.wait_for(lambda: container.removed or condition != "removed" and not container.running
                                       and container.state["status"] != "restarting")
        return container.state["exit_code"]

    def resize(self, container, height, width):
        with container.lock:
            if not container.running and container.monitor is None:
                raise Conflict("Container %s is not running" % container.id)
            container.monitor.request("resize", height=height, width=width)
        self.emit("resize", container, height=str(height), width=str(width))

    # -- looking ---------------------------------------------------------------------------------------------------------

    def top(self, container, ps_args="-ef"):
        """{Titles, Processes}: the host's ps, cut down to the container's processes; without a ps program our own `-ef`."""
        container.need_running()
        pids = set(self._cgroup(container).pids()) | {container.state["pid"]}
        words = split_words(ps_args or "-ef")
        program = next((p for p in ("/bin/ps", "/usr/bin/ps") if os.access(p, os.X_OK)), None)
        if program is None:
            if words != ["-ef"]:
                raise BadRequest("top with arguments needs the program ps on this host: install procps, or leave the arguments out")
            return {"Titles": list(PS_TITLES), "Processes": [row for row in map(process_row, sorted(pids)) if row]}
        import subprocess
        done = subprocess.run([program] + words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PATH": DEFAULT_PATH, "LC_ALL": "C"})
        if done.returncode:
            raise Error("ps: %s" % (done.stderr.decode("utf-8", "replace").strip().splitlines() or ["failed"])[0])
        lines = done.stdout.decode("utf-8", "replace").splitlines()
        titles = lines[0].split()
        if "PID" not in titles:
            raise Error("Couldn't find PID field in ps output")
        rows = [line.split(None, len(titles) - 1) for line in lines[1:]]
        return {"Titles": titles, "Processes": [row for row in rows if int(row[titles.index("PID")]) in pids]}

    def stats(self, container, previous=None):
        """One object of GET /containers/ID/stats; `previous` gives the *pre* values."""
        now = format_time(time.time_ns())
        stats = {"read": now, "preread": ZERO_TIME, "name": "/" + container.name, "id": container.id, "num_procs": 0, "storage_stats": {},
                 "pids_stats": {}, "blkio_stats": {}, "cpu_stats": {}, "precpu_stats": {}, "memory_stats": {}, "networks": {}}
        if container.running:
            stats.update(self._cgroup(container).stats())
            stats["networks"] = interface_counters(container.state["pid"])
        stats["precpu_stats"] = (previous or {}).get("cpu_stats") or {}
        stats["preread"] = (previous or {}).get("read") or ZERO_TIME
        return stats

    def place(self, container):
        """Where a child finds the files of a container: the arguments of entered_root. Asked for with container.files held."""
        if container.removed:
            raise NotFound("No such container: %s" % container.id)
        process = (container.state["pid"], container.state["start_time"]) if container.running else None
        return {"root": self.root_spec(container), "process": process, "mount_point": self.mount_point,
                "mounts": [] if process else [spec_mount(p, self.volumes) for p in container.mounts if p["Type"] != "tmpfs"]}

    def changes(self, container):
        """[{Path, Kind}] of GET /containers/ID/changes."""
        with container.files:
            image = self.images.find("sha256:" + container.image)
            if self.driver.name == "vfs":
                found = self.spawner.run("vfs_changes", old=self.driver.tree(self.layers, image.chain), new=container.path_of("root"))
            else:
                spec = self.root_spec(container)
                found = self.spawner.run("overlay_changes", folder=spec["folder"], upper=container.path_of("upper"), lower=spec["lower"])
        return [{"Path": path, "Kind": kind} for kind, path in found]


def requested_networks(host, asked):
    """{network: settings asked for} of a create request, the one that NetworkMode names first."""
    mode = {"default": "bridge"}.get(host["NetworkMode"], host["NetworkMode"])
    if mode.startswith("container:"):
        return {}
    named = {("bridge" if name == "default" else name): settings or {} for name, settings in asked.items()}
    return dict({mode: named.get(mode, {})}, **named)


def hosts_file(container, endpoints, full_name):
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", "fe00::0\tip6-localnet", "ff00::0\tip6-mcastprefix",
             "ff02::1\tip6-allnodes", "ff02::2\tip6-allrouters"]
    if container.network_mode == "host":
        lines = read_file("/etc/hosts", b"127.0.0.1\tlocalhost\n").decode("utf-8", "replace").splitlines()
    gateway = next((e.get("Gateway") for e in endpoints.values() if e.get("Gateway")), "")
    for entry in container.host_config["ExtraHosts"] or []:
        name, _, address = entry.partition(":") if "=" not in entry.partition(":")[0] else entry.partition("=")
        lines.append("%s\t%s" % (gateway if address == "host-gateway" else address.strip("[]"), name))
    short = full_name.partition(".")[0]
    names = full_name if full_name == short else "%s %s" % (full_name, short)
    lines += ["%s\t%s" % (e["IPAddress"], names) for e in endpoints.values() if e.get("IPAddress")]
    return "\n".join(lines) + "\n"


def host_name_servers():
    """The host's own name servers; a resolver asks them from the host's namespace, so one on loopback is fine."""
    return re.findall(r"^nameserver\s+(\S+)", read_file("/etc/resolv.conf", b"").decode("utf-8", "replace"), re.M)


def resolv_conf(container, default_dns):
    """The host's resolv.conf without servers that only the host itself reaches, or what --dns says; in a network of a user our
    own resolver, which passes on what it does not know."""
    host = container.host_config
    if container.network_mode not in ("bridge", "host", "none") and not container.network_mode.startswith("container:"):
        search = "search %s\n" % " ".join(host["DnsSearch"]) if host["DnsSearch"] else ""
        return "nameserver %s\n%soptions %s\n" % (RESOLVER_ADDRESS, search, " ".join(["ndots:0"] + host["DnsOptions"]))
    text = read_file("/etc/resolv.conf", b"").decode("utf-8", "replace")
    if container.network_mode != "host" and re.findall(r"^nameserver\s+(\S+)", text, re.M) == ["127.0.0.53"]:
        text = read_file("/run/systemd/resolve/resolv.conf", text.encode()).decode("utf-8", "replace")
    servers, search, options = host["Dns"] or list(default_dns), host["DnsSearch"], host["DnsOptions"]
    found = {word: re.findall(r"^%s\s+(.+?)\s*$" % word, text, re.M) for word in ("nameserver", "search", "options")}
    if not servers:
        local = container.network_mode != "host"
        servers = [s for s in found["nameserver"] if not (local and s.startswith(("127.", "::1")))] or ["8.8.8.8", "8.8.4.4"]
    lines = ["nameserver " + server for server in servers]
    if search != ["."] and (search or found["search"]):
        lines.append("search " + (" ".join(search) or found["search"][-1]))
    if options or found["options"]:
        lines.append("options " + (" ".join(options) or found["options"][-1]))
    return "\n".join(lines) + "\n"


PS_TITLES = ("UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD")


def process_row(pid):
    """One row of `ps -ef` from /proc; None when the process is gone."""
    import pwd
    try:
        fields = read_file("/proc/%d/stat" % pid).rpartition(b")")[2].split()
        uid = os.stat("/proc/%d" % pid).st_uid
        command = read_file("/proc/%d/cmdline" % pid).replace(b"\0", b" ").decode("utf-8", "replace").strip()
        name = command or "[%s]" % read_file("/proc/%d/comm" % pid).decode().strip()
    except OSError:
        return None
    ticks = os.sysconf("SC_CLK_TCK")
    seconds = (int(fields[11]) + int(fields[12])) // ticks
    begin = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(fields[19]) / ticks
    with contextlib.suppress(KeyError):
        uid = pwd.getpwuid(uid).pw_name
    tty = int(fields[4])
    terminal = "pts/%d" % (tty & 0xFF | tty >> 12 & 0xFFF00) if tty >> 8 & 0xFFF == 136 else "?"
    return [str(uid), str(pid), fields[1].decode(), "0", time.strftime("%H:%M", time.localtime(begin)), terminal,
            "%02d:%02d:%02d" % (seconds // 3600, seconds // 60 % 60, seconds % 60), name]


def interface_counters(pid):
    """{interface: counters} of the network namespace of a process, by the names of the stats API."""
    result = {}
    with contextlib.suppress(OSError):
        for line in read_file("/proc/%d/net/dev" % pid).decode().splitlines()[2:]:
            name, _, rest = line.partition(":")
            if name.strip() != "lo":
                numbers = [int(n) for n in rest.split()]
                result[name.strip()] = dict(zip(("rx_bytes", "rx_packets", "rx_errors", "rx_dropped"), numbers[:4]),
                                            **dict(zip(("tx_bytes", "tx_packets", "tx_errors", "tx_dropped"), numbers[8:12])))
    return result


def health_command(container):
    """The words of the health check, or None."""
    test = (container.config["Healthcheck"] or {}).get("Test") or []
    if not test or test[0] == "NONE" or len(test) < 2:
        return None
    return list(container.config["Shell"] or ["/bin/sh", "-c"]) + [test[1]] if test[0] == "CMD-SHELL" else test[1:]


class Execs:
    """The execs of all containers, by id, and their life."""

    def __init__(self, owner):
        self.owner, self.execs = owner, {}

    def find(self, exec_id):
        found = self.execs.get(exec_id)
        if found is None:
            raise NotFound("No such exec instance: %s" % exec_id)
        return found

    def create(self, container, body):
        if container.paused:
            raise Conflict("Container %s is paused, unpause the container before exec" % container.name)
        if not container.running:
            raise Conflict("container %s is not running" % container.id)
        config = _check_types(body, EXEC_CONFIG, "ExecConfig")
        if not config["Cmd"]:
            raise BadRequest("No exec command specified")
        parse_detach_keys(config["DetachKeys"] or DETACH_KEYS)
        new = Exec(container, config)
        self.execs[new.id] = container.execs[new.id] = new
        self.owner.emit("exec_create: " + " ".join(config["Cmd"]), container, execID=new.id)
        return new

    def start(self, ex, body, take_connection=None):
        """Start an exec: detached, or with the client's connection handed to its monitor first."""
        container, config = ex.container, ex.config
        with container.lock:
            if ex.started:
                raise Conflict("Error: Exec command %s has already run" % ex.id)
            if container.paused:
                raise Conflict("Container %s is paused, unpause the container before exec" % container.name)
            if not container.running:
                raise Conflict("container %s is not running" % container.id)
            ex.started = True
            pid, start_time = container.state["pid"], container.state["start_time"]
        tty = config["Tty"]
        spec = process_spec(container, config["User"] or container.config["User"], self._env(container, config), config["Cmd"],
                            config["WorkingDir"] or container.config["WorkingDir"], tty, config["Privileged"])
        spec.update(pid=pid, start_time=start_time, open_stdin=config["AttachStdin"], size=body.get("ConsoleSize") or config["ConsoleSize"],
                    cgroup={"name": container.id, "parent": container.host_config["CgroupParent"] or self.owner.cgroup_parent})
        message = {"id": ex.id, "kind": "exec", "folder": container.folder, "run": self.owner.run_folder(ex.id), "log": None, "stdin_once": True,
                   "note": {"container": container.id, "config": config}}
        ex.monitor = MonitorLink.start(self.owner.spawner, message)
        attached = False
        try:
            if take_connection:
                fd, pending = take_connection()
                attached = True
                with opened_at(fd):
                    keys = parse_detach_keys(config["DetachKeys"] or DETACH_KEYS) if tty else b""
                    ex.monitor.request("attach", [fd], pending=pending.hex(), detach_keys=keys.hex(), stdin=config["AttachStdin"],
                                       stdout=config["AttachStdout"], stderr=config["AttachStderr"], framed=not tty)
            self.watch(ex)
            answer = ex.monitor.start_process(spec, [], [], None)
        except (Error, OSError) as error:
            ex.exit_code = 127 if "not found" in str(error) else 126
            self._end(ex, failed=str(error) if attached else None, tty=tty)
            if attached:
                return
            raise BadRequest("OCI runtime exec failed: %s" % error) if isinstance(error, BadRequest) else error
        ex.pid = answer["pid"]
        self.owner.emit("exec_start: " + " ".join(config["Cmd"]), container, execID=ex.id)

    def _env(self, container, config):
        env = container_env(container, container.config["Env"])
        for entry in (config["Env"] or []) + (["TERM=xterm"] if config["Tty"] else []):
            name, equals, value = entry.partition("=")
            env = set_env(env, name, value) if equals else env
        return env

    def watch(self, ex):
        events, _ = ex.monitor.watch()
        self.owner.watcher.add(events, functools.partial(self._on_event, ex))

    def _on_event(self, ex, event):
        if event is None:
            remove_tree(self.owner.run_folder(ex.id))  # its monitor was killed, or has ended by itself
        if event is None or event["event"] == "exit":
            if ex.exit_code is None:
                ex.exit_code = event["exit_code"] if event else 137
                self.owner.emit("exec_die", ex.container, execID=ex.id, exitCode=str(ex.exit_code))
            self._end(ex)
        elif event["event"] == "detach":
            self.owner.emit("exec_detach", ex.container, execID=ex.id)

    def _end(self, ex, failed=None, tty=False):
        if ex.monitor is not None:
            link, ex.monitor = ex.monitor, None
            with contextlib.suppress(Error, OSError):
                link.request("fail" if failed else "quit", message=failed)
            link.close()
        ex.finished.set()

    def resize(self, ex, height, width):
        if ex.exit_code is not None or ex.monitor is None:
            raise Conflict("cannot resize a stopped container: exec %s is not running" % ex.id[:12])
        ex.monitor.request("resize", height=height, width=width)

    def forget(self, ex):
        self.execs.pop(ex.id, None)
        ex.container.execs.pop(ex.id, None)


class HealthChecks:
    """Runs the health checks of containers that have one: a thread each, for as long as that run of the container lasts."""

    def __init__(self, owner):
        self.owner = owner

    def start(self, container):
        if health_command(container):
            threading.Thread(target=self._watch, args=(container, container.state["started"]), daemon=True).start()

    def _watch(self, container, started):
        """One thread a container with a health check, for as long as that run of it lasts."""
        check = container.config["Healthcheck"]
        interval, start_period = (check.get("Interval") or 30 * 10 ** 9) / 1e9, check.get("StartPeriod") or 0
        while True:
            with container.changed:
                if container.changed.wait_for(lambda: not container.running or container.state["started"] != started, interval):
                    return
            if container.paused:
                continue
            begin = time.time_ns()
            code, output = self._probe(container, (check.get("Timeout") or 30 * 10 ** 9) / 1e9)
            health = dict(container.state["health"])
            health["Log"] = (health["Log"] + [{"Start": format_time(begin), "End": format_time(time.time_ns()), "ExitCode": code,
                                               "Output": output}])[-5:]
            if code == 0:
                health.update(Status="healthy", FailingStreak=0)
            elif time.time_ns() - started > start_period or health["Status"] != "starting":
                health["FailingStreak"] += 1
                if health["FailingStreak"] >= (check.get("Retries") or 3):
                    health["Status"] = "unhealthy"
            changed = health["Status"] != container.state["health"]["Status"]
            container.set_state(health=health)
            if changed:
                self.owner.emit("health_status: " + health["Status"], container)

    def _probe(self, container, timeout):
        """Run the health command; (exit code, output): -1 when it did not end in time."""
        mine, theirs = socket.socketpair()
        ex = None
        try:
            ex = self.owner.execs.create(container, {"Cmd": health_command(container), "AttachStdout": True, "AttachStderr": True, "Tty": False})
            self.owner.execs.start(ex, {}, lambda: (os.dup(theirs.fileno()), b""))
            theirs.close()
            if not ex.finished.wait(timeout):
                if ex.monitor is not None:
                    ex.monitor.request("signal", signal=9)
                return -1, "Health check exceeded timeout (%gs)" % timeout
            mine.settimeout(1)
            with mine.makefile("rb") as stream:
                return ex.exit_code, _first_output(stream, 4096).decode("utf-8", "replace")
        except (Error, OSError) as error:
            return -1, str(error)
        finally:
            if ex is not None:
                self.owner.execs.forget(ex)
            mine.close()
            theirs.close()


def _first_output(stream, most):
    """The first bytes of a framed stream, whatever else a health check has printed."""
    data = b""
    while len(data) < most:
        head = stream.read(8)
        if len(head) < 8:
            break
        data += stream.read(min(struct.unpack(">4xI", head)[0], most - len(data)))
    return data


class Watcher:
    """One thread that reads the events of all monitors, and hands each on to a thread of its own."""

    def __init__(self):
        self.epoll, self.handlers, self.lock = select.epoll(), {}, threading.Lock()
        threading.Thread(target=self._run, daemon=True, name="watcher").start()

    def add(self, connection, handler):
        """handler(event) for each event, handler(None) at the end of the connection."""
        with self.lock:
            self.handlers[connection.fileno()] = (connection, handler)
        self.epoll.register(connection.fileno(), select.EPOLLIN)

    def _run(self):
        while True:
            for fd, _ in self.epoll.poll():
                connection, handler = self.handlers[fd]
                try:
                    event, _ = receive_message(connection)
                except (OSError, Error, ValueError):
                    event = None
                if event is None:
                    with self.lock:
                        del self.handlers[fd]
                    self.epoll.unregister(fd)
                    connection.close()
                try:
                    threading.Thread(target=self._handle, args=(handler, event), daemon=True).start()
                except RuntimeError:  # no more threads: late is better than never
                    self._handle(handler, event)

    @staticmethod
    def _handle(handler, event):
        try:
            handler(event)
        except Exception as error:
            warn("handling an event of a monitor: %s" % error)
            debug_traceback()


# -- files of a container: children's work -----------------------------------------------------------------------------------------

def enter_namespace(process, name):
    """Child: join a namespace of a container's init, given as (pid, start time): never of whoever has got its pid since."""
    pid, start_time = process
    try:
        with opened_at(os.open("/proc/%d/ns/%s" % (pid, name), os.O_RDONLY | os.O_CLOEXEC)) as fd:
            if stat_start_time(pid) == start_time:
                setns(fd, NAMESPACES[name])
                return
    except FileNotFoundError:
        pass
    raise Conflict("the container's process %d has just ended: try again" % pid)


@contextlib.contextmanager
def opened_root(root, process, mount_point):
    """Child: a descriptor of a container's root, without what is mounted in it. Of a running one (process) its own mount is used:
    a second overlay mount on the same upper folder would corrupt it."""
    if process:
        enter_namespace(process, "mnt")
        with opened_at(open_tree("/")) as tree, opened_at(  # of an O_PATH descriptor no names can be read
                os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=tree)) as fd:
            yield fd
    else:
        private_mounts()
        mount_root(root, mount_point)
        with opened_folder(mount_point) as fd:
            yield fd


@contextlib.contextmanager
def entered_root(root, process, mount_point, mounts):
    """Child: a descriptor of a container's root as its processes see it, volumes included: of a stopped one with `mounts` made."""
    if process:
        enter_namespace(process, "mnt")
        with opened_folder("/") as fd:
            yield fd
    else:
        spec = {"mounts": mounts}
        open_sources(spec)
        private_mounts()
        mount_root(root, mount_point)
        with opened_folder(mount_point) as fd:
            mount_users(fd, spec)
            yield fd


@task
def configure_in(fds, process, endpoints):
    """Child: set up interfaces that were put into the network namespace of a running container."""
    enter_namespace(process, "net")
    configure_network(endpoints)


@task
def overlay_changes(fds, folder, upper, lower):
    os.chdir(folder)
    opened = [os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for path in lower]
    with opened_folder(upper) as fd:
        return tree_changes(fd, opened, overlay=True)


@task
def vfs_changes(fds, old, new):
    made = {path for path, _ in MOUNT_POINTS}
    with opened_folder(old) as old_fd, opened_folder(new) as new_fd:
        return [(kind, path) for kind, path in tree_changes(new_fd, [old_fd]) if path not in made]


@task
def export_root(fds, root, process, mount_point):
    """Child: the root as a tar archive to descriptor 0 of fds."""
    with opened_root(root, process, mount_point) as fd:
        pack(fd, functools.partial(write_all, fds[0]), fd=fds[0])


_GO_TYPES = {stat.S_IFDIR: 1 << 31, stat.S_IFLNK: 1 << 27, stat.S_IFBLK: 1 << 26, stat.S_IFCHR: 1 << 26 | 1 << 21, stat.S_IFIFO: 1 << 25,
             stat.S_IFSOCK: 1 << 24}


def go_file_mode(mode):
    """st_mode as Go's os.FileMode has it."""
    special = sum(go for bit, go in ((stat.S_ISUID, 1 << 23), (stat.S_ISGID, 1 << 22), (stat.S_ISVTX, 1 << 20)) if mode & bit)
    return mode & 0o777 | special | _GO_TYPES.get(stat.S_IFMT(mode), 0)


def _open_parent(root_fd, path):
    """(descriptor of the folder that path is in, its last name or "."): symlinks followed inside the root, but for the last."""
    clean = os.path.normpath("/" + path)
    if clean == "/" or path.endswith(("/", "/.")):
        return open_in_root(root_fd, clean, os.O_RDONLY | os.O_DIRECTORY), "."
    parent, name = os.path.split(clean)
    return open_in_root(root_fd, parent, os.O_RDONLY | os.O_DIRECTORY), name


@contextlib.contextmanager
def _path_errors(path, container):
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound("Could not find the file %s in container %s" % (path, container))


@task
def stat_path(fds, place, container, path):
    """Child: the X-Docker-Container-Path-Stat of a path."""
    with entered_root(**place) as root_fd, _path_errors(path, container):
        parent, name = _open_parent(root_fd, path)
        there = os.stat(name, dir_fd=parent, follow_symlinks=False)
        target = os.readlink(name, dir_fd=parent) if stat.S_ISLNK(there.st_mode) else ""
        return {"name": os.path.basename(os.path.normpath("/" + path)) or "/", "size": there.st_size, "mode": go_file_mode(there.st_mode),
                "mtime": format_time(there.st_mtime_ns), "linkTarget": target and os.path.normpath(os.path.join("/", os.path.dirname(path), target))}


@task
def archive_out(fds, place, container, path):
    """Child: what stands at path as a tar archive to descriptor 0 of fds, under its last name."""
    with entered_root(**place) as root_fd, _path_errors(path, container):
        parent, name = _open_parent(root_fd, path)
        write, label = functools.partial(write_all, fds[0]), os.path.basename(path) or os.path.basename(path.rstrip("/")) or "/"
        in_root = os.path.samestat(os.fstat(parent), os.fstat(root_fd))
        exclude = (lambda p: p.startswith(("proc/", "sys/", "dev/"))) if in_root else None  # the kernel's, not the container's files
        if name == ".":
            pack(parent, write, fd=fds[0], name=label, exclude=exclude)
        else:
            pack(parent, write, fd=fds[0], paths=[(name, label)], exclude=exclude)


@task
def archive_in(fds, place, container, path, keep_kind):
    """Child: unpack the archive on descriptor 0 of fds into the folder at path."""
    with open(fds[0], "rb", buffering=0) as stream:
        reader = TarReader(open_compressed(stream))  # a decompressor is found before the root is entered (CVE-2026-41567)
        with entered_root(**place) as root_fd:
            with _path_errors(path, container), opened_at(open_in_root(root_fd, path, os.O_PATH)) as fd:
                if not stat.S_ISDIR(os.fstat(fd).st_mode):
                    raise BadRequest("extraction point is not a directory")
            unpack(reader, root_fd, into=path, no_overwrite_dir_non_dir=keep_kind)


########################################################################
# 15. Engine
########################################################################
# The daemon's one object: it owns the stores, brings them back after whatever ended the last daemon, and knows what happened
# (events), what there is (info, disk usage) and what nobody needs any more (prune).

class Events:
    """What happened: the last 1,024 events, and queues of those who listen."""

    def __init__(self):
        import collections
        self.recent, self.listeners, self.lock = collections.deque(maxlen=1024), [], threading.Lock()

    def emit(self, kind, action, actor, attributes, old_style=None):
        """Report one. `old_style` are the keys {status, id, from} that containers and images have besides."""
        now = time.time_ns()
        event = dict(old_style or {}, Type=kind, Action=action, Actor={"ID": actor, "Attributes": attributes}, scope="local",
                     time=now // 10 ** 9, timeNano=now)
        with self.lock:
            self.recent.append(event)
            for listener in self.listeners:
                listener.put(event)

    @contextlib.contextmanager
    def listening(self):
        """(events so far, queue of those to come), with none lost between the two."""
        import queue
        mine = queue.Queue()
        with self.lock:
            self.listeners.append(mine)
            recent = list(self.recent)
        try:
            yield recent, mine
        finally:
            with self.lock:
                self.listeners.remove(mine)


class Options:
    """The daemon's options, with their defaults (see the table in Main)."""

    def __init__(self, **values):
        self.root, self.pidfile, self.hosts, self.run_root = DEFAULT_ROOT, DEFAULT_PIDFILE, [], None
        self.insecure_registries, self.registry_mirrors = [], []
        self.bridge, self.driver, self.restart, self.dns, self.debug = None, None, False, [], False
        self.host_root, self.cors, self.cgroup_parent, self.iptables, self.icc, self.default_ip = "/", False, "pydock", True, True, "0.0.0.0"
        self.mtu, self.use_tls, self.tls_verify, self.tls_ca, self.tls_cert, self.tls_key = None, None, False, None, None, None
        self.__dict__.update(values)
        self.root = os.path.abspath(self.root)
        self.run_root = self.run_root or ("/var/run/pydock" if self.root == DEFAULT_ROOT else os.path.join(self.root, "run"))


class Engine:
    """The engine on one data root. `spawner` was forked before anything else."""

    def __init__(self, options, spawner):
        self.options, self.spawner, self.events, self.started = options, spawner, Events(), time.time_ns()
        self.root = options.root
        self._lock_root()
        self.id = self._own_id()
        self._sweep()
        self.driver = self._choose_driver()
        self.layers = Layers(self.root, self.driver)
        self.layers.repair()
        self.images = Images(self.root, self.layers, options.host_root)
        self.registry = Registry(self.root, self.images, self.layers, spawner, RegistryOptions(
            insecure=options.insecure_registries, mirrors=options.registry_mirrors))
        self.volumes = Volumes(self.root)
        self.networks = Networks(self.root, {"bridge": options.bridge, "icc": options.icc, "iptables": options.iptables,
                                             "ip": options.default_ip, "mtu": options.mtu})
        masks = {self.root, options.run_root}
        self.containers = Containers(self.root, options.run_root, self.images, self.volumes, self.networks, spawner, self.emit_container,
                                     options.cgroup_parent, masks, options.dns)
        self._connect_stores()

    def _connect_stores(self):
        """Each store reports events, and asks who uses what it is to delete."""
        containers, images, volumes = self.containers, self.images, self.volumes
        images.users = lambda image_id: [(c.id, c.running) for c in containers.all() if c.image == image_id]
        images.used_chains = lambda: [i.chain for i in map(images.lookup, {"sha256:" + c.image for c in containers.all()}) if i] + list(
            self.registry.blobs.used_chains())
        images.collected = self.registry.blobs.collect
        images.emit = lambda action, image_id, **attributes: self.events.emit(
            "image", action, "sha256:" + image_id, attributes, {"status": action, "id": attributes.get("name", "sha256:" + image_id)})
        volumes.users = lambda name: [c.id for c in containers.all() if any(p.get("Name") == name for p in c.mounts)]
        volumes.emit = lambda action, name, **attributes: self.events.emit("volume", action, name, attributes)
        self.networks.emit = lambda action, network_id, **attributes: self.events.emit("network", action, network_id, attributes)

    def emit_container(self, action, container, **attributes):
        shown = dict(container.config["Labels"] or {}, image=container.image_name, name=container.name, **attributes)
        self.events.emit("container", action, container.id, shown, {"status": action, "id": container.id, "from": container.image_name})

    # -- start-up --------------------------------------------------------------------------------------------------------

    def _lock_root(self):
        """One daemon a data root. The lock is the kernel's: it is gone with the daemon however that ends."""
        import fcntl
        if self.root == "/" or os.path.realpath(self.root) == "/":
            raise Error("the data root cannot be /: name a folder of its own with -g")
        os.makedirs(self.root, 0o710, exist_ok=True)
        os.chmod(self.root, 0o710)  # what lies in layers has setuid bits that no user of this host may reach (CVE-2021-41091)
        self.lock_fd = os.open(os.path.join(self.root, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = read_file(os.path.join(self.root, "lock")).decode().strip()
            raise Error("another pydock daemon%s uses the data root %s: stop it, or name another root with -g"
                        % (" (pid %s)" % pid if pid else "", self.root))
        os.ftruncate(self.lock_fd, 0)
        os.pwrite(self.lock_fd, b"%d\n" % os.getpid(), 0)

    def _own_id(self):
        path = os.path.join(self.root, "engine-id")
        if not os.path.exists(path):
            write_file(path, new_id())
        return read_file(path).decode()

    def _sweep(self):
        """What stands in tmp/ was never finished."""
        tmp = os.path.join(self.root, "tmp")
        os.makedirs(tmp, 0o700, exist_ok=True)
        for name in os.listdir(tmp):
            try:
                remove_tree(os.path.join(tmp, name))
            except (OSError, Error) as error:
                warn("left in %s: %s" % (tmp, error))

    def _choose_driver(self):
        """-s, or what the data root was made with, or overlay where it can be mounted."""
        path = os.path.join(self.root, "driver")
        made_with = read_file(path, b"").decode().strip()
        wanted = {"overlay2": "overlay"}.get(self.options.driver, self.options.driver) or made_with
        if wanted and wanted not in DRIVERS:
            raise Error("storage driver '%s' is not known: use one of %s" % (wanted, ", ".join(DRIVERS)))
        if made_with and wanted != made_with:
            raise Error("the data root %s was made with the storage driver %s: start without -s, or name another root with -g"
                        % (self.root, made_with))
        if not wanted or wanted == "overlay":
            try:
                self.spawner.run("check_overlay", root=self.root)
                wanted = "overlay"
            except Error as error:
                if wanted:
                    raise Error("overlay cannot be mounted on %s (%s): use -s vfs, or another file system for -g" % (self.root, error))
                warn("overlay cannot be mounted on %s (%s): plain copies (vfs) are used, which is slow" % (self.root, error))
                wanted = "vfs"
        if not made_with:
            write_file(path, wanted + "\n")
        return DRIVERS[wanted](self.root)

    def recover(self):
        """Bring back the containers: those whose monitor lives go on; the others' end is recorded; restart policies are caught up."""
        containers = self.containers
        for name in sorted(os.listdir(containers.folder)):
            try:
                container = Container.load(os.path.join(containers.folder, name))
            except (Error, OSError, KeyError) as error:
                warn("container %s is left out: %s" % (name, error))
                continue
            containers.containers[container.id] = containers.names[container.name] = container
        ended = [c for c in containers.all() if not self._recover_one(c)]
        self._recover_execs()
        self.networks.start([{"endpoints": [e for e in c.state["endpoints"].values() if "interface" in e], "published": c.state["published"]}
                             for c in containers.all() if c.running])
        for text in self.networks.warnings + cgroups(self.options.cgroup_parent).warnings:
            warn(text)
        self.images.collect()
        self._restart_at_start(ended)

    def _recover_one(self, container):
        """False where the container was running when its monitor, or the machine, went away."""
        containers = self.containers
        link = MonitorLink.find(containers.run_folder(container.id))
        if link is not None:
            with contextlib.suppress(MonitorGone):
                state = containers._adopt_monitor(container, link)
                if container.state["status"] == "running":
                    with contextlib.suppress(OSError, Error):
                        containers._cgroup(container).thaw()  # the last daemon may have died within a commit
                if state["pid"] and not state["exit"] and not container.running:  # the daemon died within the start
                    container.set_state(status="running", pid=state["pid"], started=state["started"],
                                        start_time=stat_start_time(state["pid"]))
                if state["exit"] and container.running:  # it ended while there was no daemon, and waits for a slow reader
                    containers._on_exit(container, link, state["exit"])
                elif container.running:
                    containers.health.start(container)
                return True
        containers._kill_remains(container)  # also of a start that neither the daemon nor the monitor has survived
        if container.state["status"] == "restarting":
            return False
        if not container.running:
            return True
        exit = read_unsynced_json(container.path_of("exit.json"))
        if not exit or exit["finished"] < container.state["started"]:
            exit = {"exit_code": 137, "finished": time.time_ns(), "oom": False}
        container.set_state(status="exited", pid=0, exit_code=exit["exit_code"], finished=exit["finished"], oom=exit["oom"],
                            endpoints={}, ports={}, published=[])
        self.emit_container("die", container, exitCode=str(exit["exit_code"]))
        return False

    def _recover_execs(self):
        """Execs whose monitors live are known again by what their monitors kept for us."""
        for name in os.listdir(self.options.run_root):
            run = os.path.join(self.options.run_root, name)
            if any(self.containers.run_folder(c.id) == run for c in self.containers.all()):
                continue
            link = MonitorLink.find(run)
            if link is None:
                remove_tree(run)
                continue
            with contextlib.suppress(Error, OSError):
                hello = link.request("hello")
                container = self.containers.containers.get((hello["note"] or {}).get("container"))
                if container is None or hello["kind"] != "exec":
                    link.request("quit")  # the monitor of a container that is gone
                    continue
                ex = Exec(container, hello["note"]["config"])
                ex.id, ex.pid, ex.started, ex.monitor = hello["id"], hello["pid"], True, link
                self.containers.execs.execs[ex.id] = container.execs[ex.id] = ex
                self.containers.execs.watch(ex)

    def _restart_at_start(self, ended):
        for container in self.containers.all():
            policy = container.host_config["RestartPolicy"]["Name"]
            died = container in ended
            if container.host_config["AutoRemove"] and (died or container.state["finished"] and not container.running):
                with contextlib.suppress(Error, OSError):
                    self.containers.remove(container, force=True, volumes=True)
                continue
            by_user = container.state["stopped_by_user"]
            wanted = policy == "always" and (died or container.state["finished"]) or policy == "unless-stopped" and died and not by_user \
                or policy == "on-failure" and died and container.state["exit_code"] != 0 or self.options.restart and died and not by_user
            if wanted and not container.running:
                try:
                    if container.state["status"] == "restarting":
                        container.set_state(status="exited")
                    self.containers.start(container)
                except (Error, OSError) as error:
                    warn("container %s cannot be restarted: %s" % (container.id[:12], error))

    # -- images from other things --------------------------------------------------------------------------------------------

    def import_image(self, stream_fd, reference, changes, message):
        """An image of one layer from a tar archive read from a descriptor."""
        config = apply_changes({}, changes)
        with self.layers.making() as folder:
            made = self.spawner.run("import_layer", [stream_fd], diff=os.path.join(folder, "diff"), whiteouts=self.driver.whiteouts)
            return self._one_layer_image(folder, made, config, reference, message, "import")

    def make_image(self, reference, programs):
        """`mkimage`: an image of this host's own programs."""
        with self.layers.making() as folder:
            made = self.spawner.run("make_small_root", diff=os.path.join(folder, "diff"), programs=programs, whiteouts=self.driver.whiteouts)
            config = {"Env": ["PATH=" + DEFAULT_PATH], "Cmd": ["/bin/sh"]}
            return self._one_layer_image(folder, made, config, reference, "made of this host's programs", "import")

    def _one_layer_image(self, folder, made, config, reference, comment, action):
        chain = self.layers.adopt(folder, None, made["diff_id"], made["size"])
        history = [{"created": format_time(time.time_ns()), "comment": comment}]
        image = self.images.add(new_image_config({}, config, [self.layers.meta[chain]["diff_id"]], history, comment=comment))
        if reference:
            self.images.tag(image, reference)
        self.images.emit(action, image.id, name=reference.tagged if reference else "sha256:" + image.id)
        return image

    def commit(self, container, reference, comment="", author="", changes=(), config=None, pause=True):
        """A new image of what a container has changed, on its image; of `host` a whole copy."""
        base = self.images.find("sha256:" + container.image)
        settings = {key: container.config.get(key) for key in IMAGE_CONFIG_KEYS if container.config.get(key) is not None}
        settings.update({key: value for key, value in (config or {}).items() if key in IMAGE_CONFIG_KEYS and value})
        settings = apply_changes(settings, changes)
        with container.files:
            if container.removing:
                raise Conflict("container %s is being removed" % container.id)
            freeze = pause and container.state["status"] == "running"
            try:
                if freeze:
                    self.containers._cgroup(container).freeze()
            except (OSError, Error):  # it has ended meanwhile, or this host cannot freeze: the copy is then as good as it gets
                freeze = False
            try:
                with self.layers.making() as folder:
                    made = self._copy_changes(container, base, os.path.join(folder, "diff"))
                    chain = self.layers.adopt(folder, None if base.is_host else base.chain, made["diff_id"], made["size"])
            finally:
                if freeze and not container.paused:  # paused meanwhile it stays so
                    with contextlib.suppress(OSError):  # ended meanwhile
                        self.containers._cgroup(container).thaw()
        entry = {"created": format_time(time.time_ns()), "created_by": " ".join([container.path] + container.args), "comment": comment,
                 "author": author}
        history = ([] if base.is_host else list(base.config.get("history") or [])) + [{k: v for k, v in entry.items() if v}]
        diff_ids = ([] if base.is_host else base.diff_ids) + [self.layers.meta[chain]["diff_id"]]
        document = new_image_config(base.config, settings, diff_ids, history, author, comment)
        image = self.images.add(document, parent="" if base.is_host else base.id)
        if reference:
            self.images.tag(image, reference)
        self.events.emit("container", "commit", container.id, {"comment": comment, "imageID": "sha256:" + image.id, "imageRef": str(reference or ""),
                                                               "name": container.name, "image": container.image_name},
                         {"status": "commit", "id": container.id, "from": container.image_name})
        return image

    def _copy_changes(self, container, base, diff):
        run, whiteouts = self.spawner.run, self.driver.whiteouts
        if base.is_host:
            self._check_space(base.meta["path"])
            place = self.containers.place(container)
            return run("copy_whole", root=place["root"], process=place["process"], mount_point=place["mount_point"], diff=diff,
                       whiteouts=whiteouts)
        if self.driver.name == "vfs":
            return run("copy_vfs_layer", old=self.driver.tree(self.layers, base.chain), new=container.path_of("root"), diff=diff,
                       whiteouts=whiteouts)
        return run("copy_layer", source=container.path_of("upper"), diff=diff, whiteouts=whiteouts)

    def _check_space(self, host_root):
        """The copy of a whole host root is estimated first: what is used on its file system, against what is free on ours."""
        there, here = os.statvfs(host_root), os.statvfs(self.root)
        used, free = (there.f_blocks - there.f_bfree) * there.f_frsize, here.f_bavail * here.f_frsize
        if host_root != "/":
            used = self.spawner.run("tree_size", path=host_root)
        if used > free:
            raise Error("a copy of this host's root takes up to %s, and %s has %s free: commit a container of a smaller image, or put the "
                        "data root (-g) on a larger file system" % (format_size(used), self.root, format_size(free)))

    # -- what there is -----------------------------------------------------------------------------------------------------

    def version(self):
        """GET /version."""
        uname, python = os.uname(), "python%d.%d.%d" % sys.version_info[:3]
        details = {"ApiVersion": API_VERSION, "Arch": ARCHITECTURE, "BuildTime": "", "Experimental": "false", "GitCommit": "pydock",
                   "GoVersion": python, "KernelVersion": uname.release, "MinAPIVersion": MIN_API_VERSION, "Os": "linux"}
        return {"Platform": {"Name": "pydock"}, "Components": [{"Name": "Engine", "Version": VERSION, "Details": details}],
                "Version": VERSION, "ApiVersion": API_VERSION, "MinAPIVersion": MIN_API_VERSION, "GitCommit": "pydock", "GoVersion": python,
                "Os": "linux", "Arch": ARCHITECTURE, "KernelVersion": uname.release, "BuildTime": ""}

    def info(self):
        """GET /info."""
        all_containers = self.containers.all()
        states = [c.state["status"] for c in all_containers]
        groups, release = cgroups(self.options.cgroup_parent), os_release()
        running, paused = states.count("running"), states.count("paused")
        return dict({
            "ID": self.id, "Containers": len(states), "ContainersRunning": running, "ContainersPaused": paused,
            "ContainersStopped": len(states) - running - paused, "Images": len(self.images.images), "Driver": self.driver.name,
            "DriverStatus": [["Backing Filesystem", file_system_name(self.root)]], "DockerRootDir": self.root,
            "Plugins": {"Volume": ["local"], "Network": ["bridge", "host", "null"], "Authorization": None, "Log": ["json-file", "local", "none"]},
            "IPv4Forwarding": read_file("/proc/sys/net/ipv4/ip_forward", b"0").strip() == b"1",
            "BridgeNfIptables": os.path.exists("/proc/sys/net/bridge/bridge-nf-call-iptables"), "BridgeNfIp6tables": False,
            "Debug": Log.debugging, "NFd": len(os.listdir("/proc/self/fd")), "NGoroutines": threading.active_count(),
            "SystemTime": format_time(time.time_ns()), "LoggingDriver": "json-file", "NEventsListener": len(self.events.listeners),
            "KernelVersion": os.uname().release, "OperatingSystem": release.get("PRETTY_NAME", "Linux"), "OSVersion": release.get("VERSION_ID", ""),
            "OSType": "linux", "Architecture": os.uname().machine, "IndexServerAddress": "https://index.docker.io/v1/",
            "RegistryConfig": {"InsecureRegistryCIDRs": ["127.0.0.0/8"], "Mirrors": self.options.registry_mirrors, "IndexConfigs": {
                "docker.io": {"Name": "docker.io", "Mirrors": self.options.registry_mirrors, "Secure": True, "Official": True}}},
            "NCPU": len(os.sched_getaffinity(0)), "MemTotal": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "GenericResources": None,
            "HttpProxy": "", "HttpsProxy": "", "NoProxy": "", "Name": os.uname().nodename, "Labels": [], "ExperimentalBuild": False,
            "ServerVersion": VERSION, "Runtimes": {name: {"path": "pydock"} for name in RUNTIMES}, "DefaultRuntime": "native",
            "Swarm": {"NodeID": "", "NodeAddr": "", "LocalNodeState": "inactive", "ControlAvailable": False, "Error": "", "RemoteManagers": None},
            "LiveRestoreEnabled": True, "Isolation": "", "InitBinary": "docker-init", "ContainerdCommit": {"ID": "", "Expected": ""},
            "RuncCommit": {"ID": "", "Expected": ""}, "InitCommit": {"ID": "", "Expected": ""}, "SecurityOptions": ["name=cgroupns"],
            "Warnings": groups.warnings + self.networks.warnings or None, "KernelMemory": False, "KernelMemoryTCP": False},
            **groups.features())

    def disk_usage(self):
        """GET /system/df."""
        images, containers = self.images.all(), self.containers.all()
        shown = []
        for image in images:
            others = {c for other in images if other is not image for c in self.layers.chain(other.chain)}
            shared = sum(self.layers.meta[c]["size"] for c in self.layers.chain(image.chain) if c in others)
            shown.append(dict(self.images.summary(image), Containers=sum(c.image == image.id for c in containers), SharedSize=shared))
        volumes = [dict(self.volumes.to_api(meta), UsageData={"RefCount": len(self.volumes.users(name)), "Size": self.volumes.disk_usage(name)})
                   for name, meta in sorted(self.volumes.volumes.items())]
        sized = [dict(c.summary(self.volumes), SizeRw=self.size_rw(c), SizeRootFs=self.size_rw(c) + self.image_size(c)) for c in containers]
        return {"LayersSize": sum(meta["size"] for meta in self.layers.meta.values()), "Images": shown, "Containers": sized,
                "Volumes": volumes, "BuildCache": []}

    def size_rw(self, container):
        """Bytes that the container has written."""
        if self.driver.name == "overlay":
            return self.spawner.run("tree_size", path=container.path_of("upper"))
        return max(0, self.spawner.run("tree_size", path=container.path_of("root")) - self.image_size(container))

    def image_size(self, container):
        image = self.images.lookup("sha256:" + container.image)
        return image.size if image else 0

    # -- prune -----------------------------------------------------------------------------------------------------------

    def prune_containers(self, keep):
        """Remove what does not run and keep(container) does not keep; (ids, bytes)."""
        gone, freed = [], 0
        for container in self.containers.all():
            if container.state["status"] in ("created", "exited", "dead") and not keep(container):
                with contextlib.suppress(Conflict, NotFound):
                    size = self.size_rw(container)
                    self.containers.remove(container)
                    gone, freed = gone + [container.id], freed + size
        return gone, freed

    def prune_images(self, all_unused, keep):
        """Remove images without tag (or, with all_unused, without container) that keep(image) does not keep; (deletions, bytes)."""
        before = sum(meta["size"] for meta in self.layers.meta.values())
        gone = []
        for image in self.images.all():
            tags = self.images.tags_of(image)
            if image.id not in self.images.images or self.images.users(image.id) or keep(image) or tags and not all_unused:
                continue
            if self.images.children(image) and not tags:
                continue
            with contextlib.suppress(Conflict, NotFound):
                for name in tags or [image.id]:
                    gone += self.images.remove(name)
        self.registry.blobs.clean()
        return gone, before - sum(meta["size"] for meta in self.layers.meta.values())

    def prune_volumes(self, all_unused, keep):
        gone, freed = [], 0
        for name, meta in list(self.volumes.volumes.items()):
            if (meta["anonymous"] or all_unused) and not keep(meta) and not self.volumes.users(name):
                with contextlib.suppress(Conflict, NotFound):
                    size = self.volumes.disk_usage(name)
                    self.volumes.remove(name)
                    gone, freed = gone + [name], freed + size
        return gone, freed


def os_release():
    """The host's os-release(5) as a dict."""
    found = {}
    for path in ("/etc/os-release", "/usr/lib/os-release"):
        for line in read_file(path, b"").decode("utf-8", "replace").splitlines():
            name, equals, value = line.partition("=")
            if equals:
                found.setdefault(name, value.strip("\"'"))
    return found


def file_system_name(path):
    """`extfs`, `xfs`, ...: as docker calls the file system of the data root."""
    names = {0xEF53: "extfs", 0x58465342: "xfs", 0x9123683E: "btrfs", TMPFS_MAGIC: "tmpfs", OVERLAYFS_MAGIC: "overlayfs", 0x2FC12FC1: "zfs"}
    return names.get(file_system_type(path), "unknown")


@task
def copy_whole(fds, root, process, mount_point, diff, whiteouts):
    """Child: a container's whole root, merged, as a layer of its own: commit of `host`."""
    with opened_folder(diff) as target, opened_root(root, process, mount_point) as source:
        return {"size": copy_tree(source, target), "diff_id": layer_digest(target, whiteouts)}


@task
def copy_vfs_layer(fds, old, new, diff, whiteouts):
    """Child: the changes of a vfs container's root against its image's tree, as a layer with plain `.wh.` files."""
    made = {path for path, _ in MOUNT_POINTS}
    with opened_folder(old) as old_fd, opened_folder(new) as new_fd, opened_folder(diff) as target:
        changes = [(kind, path) for kind, path in tree_changes(new_fd, [old_fd]) if path not in made]
        size = through_pipe(lambda write: pack_changes(new_fd, write, changes), lambda stream: unpack(TarReader(stream), target))
        return {"size": size, "diff_id": layer_digest(target, whiteouts)}


########################################################################
# 16. API
########################################################################
# HTTP on unix sockets and TCP: a thread a connection, one table of routes. A handler gets the engine and the request and returns what
# is to be answered: JSON, None for 204, or a Reply; what streams writes by itself. Errors raised at any depth become their status and
# docker's {"message": ...}. Untrusted is whatever comes in, so the head of a request is checked more strictly than http.server does.

MOST_BODY = 16 << 20  # bytes of a JSON body
MOST_SECONDS_A_HEAD = 30


class Reply:
    """An answer with a status of its own: `body` is JSON, text or bytes."""

    def __init__(self, status, body=None, headers=None, content_type=None):
        self.status, self.headers, self.content_type = status, headers or {}, content_type
        self.body = body


class Request:
    """One request: method, path (without version), query (last value of each name), headers, version as a tuple; and the ways to
    read its body and to answer other than with one value."""

    def __init__(self, handler):
        from urllib.parse import parse_qs, unquote, urlsplit
        self.handler, self.method, self.headers = handler, handler.command, handler.headers
        parts = urlsplit(handler.path if not handler.path.startswith("//") else "/" + handler.path.lstrip("/"))
        self.path, self.version = unquote(parts.path), tuple(map(int, API_VERSION.split(".")))
        self.lists = parse_qs(parts.query, keep_blank_values=True)
        self.query = {name: values[-1] for name, values in self.lists.items()}
        self.parameters, self.answered, self.hijacked = {}, False, False
        self.body = Body(handler)
        self._take_version()

    def _take_version(self):
        match = re.match(r"/v(\d{1,4}(?:\.\d{1,4}){0,3})(/.*)", self.path)
        if match:
            version = tuple(map(int, match.group(1).split(".")))[:3]
            if version > self.version:
                raise BadRequest("client version %s is too new. Maximum supported API version is %s" % (match.group(1), API_VERSION))
            if version < (1, 4):
                raise BadRequest("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer "
                                 "version" % (match.group(1), MIN_API_VERSION))
            self.version, self.path = version, match.group(2)

    def flag(self, name, default=False):
        """A boolean of the query, as docker reads them."""
        value = self.query.get(name)
        return default if value is None else value.lower() not in ("", "0", "no", "false", "none")

    def number(self, name, default=None):
        value = self.query.get(name)
        if value in (None, "") and default is not None or value is None:
            return default
        try:
            return int(value)
        except ValueError:
            raise BadRequest("%s: '%s' is not a number" % (name, value))

    def filters(self, allowed):
        """The `filters` of the query, {name: [values]}; both of docker's forms. Unknown ones are refused by name."""
        text = self.query.get("filters")
        if not text:
            return {}
        found = parse_json(text.encode())
        if not isinstance(found, dict):
            raise BadRequest("filters must be a JSON object")
        result = {name: list(values) if isinstance(values, (dict, list)) else [values] for name, values in found.items()}
        for name in result:
            if name not in allowed:
                raise BadRequest("invalid filter '%s'" % name)
        return result

    def json(self, required=True):
        """The body as a JSON object; {} where there may be none."""
        data = self.body.read_all(MOST_BODY)
        if not data.strip():
            if required:
                raise BadRequest("the request has no body: a JSON object is expected")
            return {}
        kind = self.headers.get("Content-Type", "")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise BadRequest("Content-Type specified (%s) must be 'application/json'" % kind)
        value = parse_json(data)
        if value is None and not required:
            return {}
        if not isinstance(value, dict):
            raise BadRequest("the body must be a JSON object")
        return value

    # -- answers ---------------------------------------------------------------------------------------------------------

    def start(self, status, headers=(), content_type="application/json", length=None):
        """Send the head of an answer; without a length the body goes out in chunks (until the end of the connection in HTTP/1.0)."""
        self.answered, handler = True, self.handler
        handler.send_response(status)
        for name, value in dict({"Api-Version": API_VERSION, "Docker-Experimental": "false", "Ostype": "linux"}, **dict(headers)).items():
            handler.send_header(name, value)
        if content_type:
            handler.send_header("Content-Type", content_type)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        elif status not in (204, 304):
            if handler.request_version == "HTTP/1.0":
                handler.close_connection = True
            else:
                handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()

    def write(self, data):
        """A piece of a streamed body."""
        if data:
            chunked = self.handler.request_version != "HTTP/1.0"
            self.handler.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

    def write_json(self, value):
        self.write(json.dumps(value).encode() + b"\r\n")

    def finish(self):
        if self.handler.request_version != "HTTP/1.0":
            self.handler.wfile.write(b"0\r\n\r\n")

    def answer(self, value):
        reply = value if isinstance(value, Reply) else Reply(204 if value is None else 200, value)
        data, content_type = reply.body, reply.content_type
        if data is not None and not isinstance(data, (bytes, str)):
            data, content_type = json.dumps(data) + "\n", "application/json"
        data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data or b""
        self.start(reply.status, reply.headers, content_type if data else None, None if reply.status in (204, 304) else len(data))
        if self.method != "HEAD":
            self.handler.wfile.write(data)

    def take_connection(self, status_line, headers):
        """Send the head of the answer and give the connection away: (descriptor, bytes sent already). The descriptor is the taker's to
        close; a TLS connection, which cannot be passed, is relayed by two threads of ours."""
        head = "HTTP/1.1 %s\r\n%s\r\n" % (status_line, "".join("%s: %s\r\n" % pair for pair in headers.items()))
        handler, connection = self.handler, self.handler.connection
        handler.wfile.write(head.encode())
        self.answered = self.hijacked = handler.close_connection = True
        if hasattr(connection, "pending"):
            mine, theirs = socket.socketpair()
            relay(handler.rfile, connection, mine)
            return theirs.detach(), b""
        connection.setblocking(False)  # the monitor's loop wants it so; and peek must not wait
        return os.dup(connection.fileno()), handler.rfile.peek()

    def hijack(self, tty, content_type=None):
        """take_connection for attach and exec: 101 where the client asks for an upgrade, else docker's old 200."""
        modern = self.version >= (1, 42) and not tty
        kind = content_type or "application/vnd.docker.%s" % ("multiplexed-stream" if modern else "raw-stream")
        if self.headers.get("Upgrade"):
            return self.take_connection("101 UPGRADED", {"Content-Type": kind, "Connection": "Upgrade", "Upgrade": "tcp"})
        return self.take_connection("200 OK", {"Content-Type": kind})


def relay(rfile, connection, mine):
    """Copy both ways between a TLS connection and a socket, on two threads."""
    def outward():
        with contextlib.suppress(OSError, ValueError):
            for data in iter(lambda: mine.recv(BLOCK), b""):
                connection.sendall(data)
        with contextlib.suppress(OSError, ValueError):
            connection.shutdown(socket.SHUT_RDWR)

    def inward():
        with contextlib.suppress(OSError, ValueError):
            for data in iter(lambda: rfile.read1(BLOCK), b""):
                mine.sendall(data)
        with contextlib.suppress(OSError):
            mine.shutdown(socket.SHUT_WR)
    for body in (outward, inward):
        threading.Thread(target=body, daemon=True).start()


def parse_json(data):
    """JSON from outside: what is none, NaN, and nesting that breaks the parser are a BadRequest."""
    def refuse(name):
        raise ValueError("%s is no JSON value" % name)
    try:
        return json.loads(data, parse_constant=refuse)
    except RecursionError:
        raise BadRequest("invalid JSON: it is nested too deeply")
    except ValueError as error:
        raise BadRequest("invalid JSON: %s" % error)


class Body:
    """A request's body as a stream: Content-Length or chunked."""

    def __init__(self, handler):
        self.file, self.chunked = handler.rfile, handler.headers.get("Transfer-Encoding", "").lower() == "chunked"
        self.left, self.done = int(handler.headers.get("Content-Length") or 0), False

    def read(self, size=BLOCK):
        """Up to size bytes; b"" is the end. A body that is cut off is an error and never a short one."""
        if self.chunked and not self.left:
            self._next_chunk()
        if self.done or not self.left:
            return b""
        data = self.file.read1(min(size, self.left)) if size else b""
        if not data:
            raise BadRequest("the request's body is cut off")
        self.left -= len(data)
        if self.chunked and not self.left:
            self.file.readline(8)
        return data

    def _next_chunk(self):
        if not self.done:
            line = self.file.readline(1024).partition(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]{1,8}", line):
                raise BadRequest("the request's body is cut off" if not line else "invalid chunk size in the request's body")
            self.left = int(line, 16)
            if not self.left:
                self.done = True
                while self.file.readline(4096).strip():  # trailers
                    pass

    def read_all(self, most):
        parts, size = [], 0
        for data in iter(self.read, b""):
            size += len(data)
            if size > most:
                raise BadRequest("the request's body is larger than %s" % format_binary_size(most))
            parts.append(data)
        return b"".join(parts)

    def drain(self):
        """Whether the rest of the body was short enough to be read away, so that the connection can go on."""
        with contextlib.suppress(Error, OSError):
            for _ in range(64):
                if not self.read():
                    return True
        return False


@contextlib.contextmanager
def body_pipe(request):
    """A descriptor from which a child reads the request's body, fed by a thread; an error of the body is raised at the end."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    failures = []

    def feed():
        try:
            for data in iter(request.body.read, b""):
                write_all(sink, data)
        except BrokenPipeError:  # the child has read enough, or failed and says so itself
            pass
        except (Error, OSError) as error:
            failures.append(error)
        finally:
            os.close(sink)
    thread = threading.Thread(target=feed, daemon=True)
    thread.start()
    try:
        yield source
    except Error:
        if failures:
            raise failures[0]
        raise
    finally:
        os.close(source)
        thread.join(5)
    if failures:
        raise failures[0]


# -- the server --------------------------------------------------------------------------------------------------------------------

def make_handler(engine):
    """The request handler class of http.server for an engine. Made here, so that the client never imports http.server."""
    import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version, server_version, sys_version = "HTTP/1.1", "Docker/%s (linux)" % VERSION, ""
        server_engine = engine

        def version_string(self):
            return self.server_version

        def log_message(self, text, *args):
            debug("api: " + text % args)

        def parse_request(self):
            if not super().parse_request():
                return False
            self.connection.settimeout(None)
            try:
                check_head(self)
            except Error as error:
                self.close_connection = True
                self.send_error(error.status, str(error))
                return False
            return True

        def send_error(self, code, message=None, explain=None):
            """http.server's own refusals in docker's form."""
            body = json.dumps({"message": message or self.responses.get(code, ("error",))[0]}).encode() + b"\n"
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def handle_one_request(self):
            try:
                self.rfile.peek(1)  # an idle connection may stay, as docker's does; once a request has begun its head has to come
                self.connection.settimeout(MOST_SECONDS_A_HEAD)
                super().handle_one_request()
            except (ConnectionError, TimeoutError, socket.timeout):  # one class since Python 3.10
                self.close_connection = True

        def do_ANY(self):
            serve_request(self)

        do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_OPTIONS = do_ANY

    return Handler


def check_head(handler):
    """What http.server lets through: two lengths, bad ones; and on plain TCP what a web page could make a browser send (CSRF, DNS
    rebinding). An empty Host, as the client of 2013 sends, is ours."""
    headers = handler.headers
    # what is no header line for http.client is dropped with all that follows: a Transfer-Encoding must not hide so
    if headers.defects or headers.get_payload() or any("\n" in value or "\r" in value for value in headers.values()):
        raise BadRequest("malformed header")
    if len(headers.get_all("Host", [])) > 1:
        raise BadRequest("a request has one Host")
    lengths, encodings = headers.get_all("Content-Length", []), headers.get_all("Transfer-Encoding", [])
    if lengths and encodings or len(lengths) > 1 or len(encodings) > 1:
        raise BadRequest("a request has either one Content-Length or one Transfer-Encoding")
    if lengths and not re.fullmatch(r"\d{1,18}", lengths[0].strip()):
        raise BadRequest("invalid Content-Length")
    if encodings and encodings[0].strip().lower() != "chunked":
        raise BadRequest("the only Transfer-Encoding is chunked")
    if any(len(name) + len(value) > 16384 for name, value in headers.items()):
        raise BadRequest("a header is larger than 16 KiB")
    if handler.guarded:
        _check_origin(handler, headers)


def _check_origin(handler, headers):
    if headers.get("Origin") is not None and not handler.server_engine.options.cors:
        raise Forbidden("requests from web pages are refused: start the daemon with -api-enable-cors to allow them")
    host = (headers.get("Host") or "").strip().lower()
    name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
    is_address = re.fullmatch(r"\[[0-9a-fA-F:.]+\]|\d{1,3}(\.\d{1,3}){3}", name)
    if host and not is_address and name not in ("localhost", "api.moby.localhost", os.uname().nodename.lower()):
        raise Forbidden("the Host '%s' is no name of this daemon" % printable(host)[:100])
    kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded"):
        raise Forbidden("forms are refused")


def serve_request(handler):
    """One request from route to answer; an error at any depth is answered here."""
    request = None
    try:
        request = Request(handler)
        function, request.parameters = find_route(request)
        value = function(handler.server_engine, request)
        if not request.answered:
            request.answer(value)
    except ConnectionError:
        handler.close_connection = True
    except Exception as error:
        _answer_error(handler, request, error)
    if request is not None and not request.hijacked and not request.body.drain():
        handler.close_connection = True


def _answer_error(handler, request, error):
    status, message = getattr(error, "status", 500), str(error)
    if isinstance(error, OSError):
        message = os_error_text(error)
    elif not isinstance(error, Error):
        warn("api: %s %s: %s: %s" % (handler.command, handler.path, type(error).__name__, error))
        message = "%s: %s" % (type(error).__name__, message)
    if not isinstance(error, Error):
        debug_traceback()
    if request is not None and request.answered:  # too late for a status: the connection's end says it
        handler.close_connection = True
        return
    body = b"" if status == 304 or handler.command == "HEAD" else json.dumps({"message": message}).encode() + b"\n"
    with contextlib.suppress(OSError):
        handler.send_response(status)
        handler.send_header("Api-Version", API_VERSION)
        if status != 304:
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)


def serve(engine, listener, tls=None):
    """Accept connections for ever, a thread each."""
    handler = make_handler(engine)
    handler.guarded = listener.family != socket.AF_UNIX and tls is None
    while True:
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EBADF, errno.EINVAL):  # closed: the daemon ends
                return
            warn("accepting a connection: %s" % error.strerror)
            time.sleep(0.1)
            continue
        try:
            threading.Thread(target=_serve_connection, args=(handler, connection, address, tls), daemon=True).start()
        except RuntimeError:  # no more threads: this client has to come again
            warn("a connection is refused: this process may have no more threads")
            connection.close()


def _serve_connection(handler, connection, address, tls):
    served = None
    try:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_side=True)
        served = handler(connection, address or ("unix", 0), None)
    except (OSError, ValueError) as error:
        debug("api: connection: %s" % error)
    finally:
        if not (served is not None and getattr(served, "hijacked_tls", False)):
            connection.close()


# -- routes ------------------------------------------------------------------------------------------------------------------------

ROUTES = []  # (method, compiled path, function)


def route(methods, path):
    """Register a handler: `{id}` in path is one segment, `{name}` any (image names have slashes)."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda m: "(?P<%s>%s)" % (m.group(1), ".+" if m.group(1) == "name" else "[^/]+"), path))

    def register(function):
        ROUTES.extend((method, pattern, function) for method in methods.split())
        return function
    return register


def find_route(request):
    for method, pattern, function in ROUTES:
        if method == request.method:
            match = pattern.fullmatch(request.path)
            if match:
                return function, match.groupdict()
    if request.path.startswith(("/swarm", "/nodes", "/services", "/tasks", "/secrets", "/configs")):
        raise Unavailable("This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to "
                          "swarm and try again.")
    raise NotFound("page not found")


@route("GET HEAD", "/_ping")
def ping(engine, request):
    return Reply(200, "OK", {"Cache-Control": "no-cache, no-store, must-revalidate", "Pragma": "no-cache", "Swarm": "inactive",
                             "Builder-Version": "1"}, "text/plain; charset=utf-8")


@route("GET", "/version")
def get_version(engine, request):
    return engine.version()


@route("GET", "/info")
def get_info(engine, request):
    return engine.info()


@route("GET", "/system/df")
def get_disk_usage(engine, request):
    return engine.disk_usage()


@route("GET", "/plugins")
def list_plugins(engine, request):
    return []


_EVENT_FILTERS = ("config", "container", "daemon", "event", "image", "label", "network", "node", "plugin", "scope", "secret", "service",
                  "type", "volume")


def _event_wanted(event, filters):
    attributes, actor = event["Actor"]["Attributes"], event["Actor"]["ID"]
    tests = {
        "event": lambda v: event["Action"] == v or event["Action"].split(":")[0] == v, "type": lambda v: event["Type"] == v,
        "scope": lambda v: v == "local", "label": lambda v: _label_matches(attributes, v),
        "image": lambda v: v in (event.get("from"), attributes.get("image")) or event["Type"] == "image" and v in (actor, attributes.get("name"))}
    for kind in ("container", "volume", "network"):
        tests[kind] = lambda v, kind=kind: event["Type"] == kind and (actor.startswith(v) or attributes.get("name") == v) \
            or kind == "container" and attributes.get("container", "").startswith(v)
    return all(any(tests.get(name, lambda v: False)(value) for value in values) for name, values in filters.items())


def _label_matches(labels, wanted):
    name, equals, value = wanted.partition("=")
    return name in (labels or {}) and (not equals or labels[name] == value)


@route("GET", "/events")
def stream_events(engine, request):
    import queue
    filters = request.filters(_EVENT_FILTERS)
    since = parse_since(request.query["since"]) if request.query.get("since") else None
    until = parse_since(request.query["until"]) if request.query.get("until") else None
    with engine.events.listening() as (recent, coming):
        request.start(200)
        for event in recent if since is not None else []:
            if event["timeNano"] >= since and (until is None or event["timeNano"] <= until) and _event_wanted(event, filters):
                request.write_json(event)
        while until is None or time.time_ns() < until:
            try:
                event = coming.get(timeout=1 if until is None else min(1, max(0, (until - time.time_ns()) / 1e9)))
            except queue.Empty:
                if _hung_up(request.handler.connection):
                    return
                continue
            if _event_wanted(event, filters):
                request.write_json(event)
        request.finish()


def _hung_up(connection):
    """Whether the client of a stream has gone."""
    poll = select.poll()
    poll.register(connection, select.POLLHUP | select.POLLERR | getattr(select, "POLLRDHUP", 0x2000))
    return bool(poll.poll(0))


# -- containers

_STATES = ("created", "restarting", "running", "removing", "paused", "exited", "dead")
_CONTAINER_FILTERS = ("ancestor", "before", "expose", "exited", "health", "id", "is-task", "label", "name", "network", "publish", "since",
                      "status", "volume")


def _name_matches(name, pattern):
    """docker's name filter as people write it: a part of the name, with ^, $ and .* of regular expressions; the others' backtracking
    could be made to last for ever."""
    literal = re.escape(pattern)
    for escaped, plain in ((r"\^", "^"), (r"\$", "$"), (r"\.\*", ".*")):
        literal = literal.replace(escaped, plain)
    return re.search(literal, name) is not None


def _container_tests(engine, filters):
    """{filter: test(container, value)} of GET /containers/json."""
    find = engine.containers.find
    for value in filters.get("status", []):
        if value not in _STATES:
            raise BadRequest("invalid filter 'status=%s'" % value)

    def has_port(ports, value):
        return any(value in (p, p.split("/")[0]) for p in ports)
    return {
        "id": lambda c, v: c.id.startswith(v), "name": lambda c, v: _name_matches("/" + c.name, v) or _name_matches(c.name, v),
        "status": lambda c, v: c.state["status"] == v, "exited": lambda c, v: c.state["status"] == "exited" and str(c.state["exit_code"]) == v,
        "label": lambda c, v: _label_matches(c.config["Labels"], v), "before": lambda c, v: c.created < find(v).created,
        "since": lambda c, v: c.created > find(v).created, "ancestor": lambda c, v: _descends(engine, c, v),
        "volume": lambda c, v: any(v in (p.get("Name"), p["Destination"]) for p in c.mounts), "network": lambda c, v: v in c.networks or any(
            e["NetworkID"] == v for e in c.state["endpoints"].values()),
        "publish": lambda c, v: has_port(c.state["ports"] and c.host_config["PortBindings"], v), "health": lambda c, v: (
            c.state["health"] or {"Status": "none"})["Status"] == v,
        "expose": lambda c, v: has_port(c.config["ExposedPorts"] or {}, v), "is-task": lambda c, v: v in ("false", "0")}


def _descends(engine, container, name):
    wanted = engine.images.lookup(name)
    image = engine.images.images.get(container.image) or engine.images.host
    while wanted is not None and image is not None:
        if image.id == wanted.id:
            return True
        image = engine.images.images.get(image.meta.get("parent"))
    return False


@route("GET", "/containers/json")
def list_containers(engine, request):
    filters = request.filters(_CONTAINER_FILTERS)
    tests = _container_tests(engine, filters)
    limit = request.number("limit", 0)
    show_all = request.flag("all") or limit > 0 or "status" in filters or "exited" in filters
    found = [c for c in engine.containers.all() if (show_all or c.running or c.state["status"] == "restarting") and all(
        any(tests[name](c, value) for value in values) if name != "label" else all(tests[name](c, value) for value in values)
        for name, values in filters.items())]
    shown = []
    for container in found[:limit] if limit > 0 else found:
        entry = container.summary(engine.volumes)
        if request.flag("size"):
            entry.update(SizeRw=engine.size_rw(container))
            entry.update(SizeRootFs=entry["SizeRw"] + engine.image_size(container))
        shown.append(entry)
    return shown


@route("POST", "/containers/create")
def api_create(engine, request):
    container, warnings = engine.containers.create(request.json(), request.query.get("name"), request.query.get("platform") or "")
    return Reply(201, {"Id": container.id, "Warnings": warnings})


def found(engine, request):
    return engine.containers.find(request.parameters["id"])


@route("GET", "/containers/{id}/json")
def inspect_container(engine, request):
    container = found(engine, request)
    shown = container.inspect(engine.volumes, engine.driver)
    if request.flag("size"):
        shown["SizeRw"] = engine.size_rw(container)
        shown["SizeRootFs"] = shown["SizeRw"] + engine.image_size(container)
    return shown


@route("POST", "/containers/{id}/start")
def start_container(engine, request):
    engine.containers.start(found(engine, request))


@route("POST", "/containers/{id}/stop")
def stop_container(engine, request):
    engine.containers.stop(found(engine, request), request.number("t"), request.query.get("signal"))


@route("POST", "/containers/{id}/restart")
def restart_container(engine, request):
    engine.containers.restart(found(engine, request), request.number("t"), request.query.get("signal"))


@route("POST", "/containers/{id}/kill")
def kill_container(engine, request):
    try:
        engine.containers.kill(found(engine, request), request.query.get("signal"))
    except (NotFound, Conflict) as error:
        raise error_from(error.status, "cannot kill container: %s: %s" % (request.parameters["id"], error))


@route("POST", "/containers/{id}/pause")
def pause_container(engine, request):
    engine.containers.pause(found(engine, request))


@route("POST", "/containers/{id}/unpause")
def unpause_container(engine, request):
    engine.containers.unpause(found(engine, request))


@route("POST", "/containers/{id}/rename")
def rename_container(engine, request):
    engine.containers.rename(found(engine, request), request.query.get("name"))


@route("POST", "/containers/{id}/update")
def update_container(engine, request):
    return {"Warnings": engine.containers.update(found(engine, request), request.json())}


@route("DELETE", "/containers/{id}")
def remove_container(engine, request):
    if request.flag("link"):
        raise BadRequest("Conflict, cannot remove the default link name of the container")
    engine.containers.remove(found(engine, request), request.flag("force"), request.flag("v"))


@route("POST", "/containers/prune")
def prune_containers(engine, request):
    filters = request.filters(("label", "label!", "until"))
    gone, freed = engine.prune_containers(lambda c: _pruning_keeps(filters, c.config["Labels"], c.created))
    return {"ContainersDeleted": gone or None, "SpaceReclaimed": freed}


def _pruning_keeps(filters, labels, created):
    """Whether the filters of a prune keep a thing with those labels, made at that time."""
    return any(not _label_matches(labels, v) for v in filters.get("label", [])) or any(
        _label_matches(labels, v) for v in filters.get("label!", [])) or any(created > parse_since(v) for v in filters.get("until", []))


@route("POST", "/containers/{id}/attach")
def attach_container(engine, request):
    container = found(engine, request)
    options = {name: request.flag(name) for name in ("stdin", "stdout", "stderr", "logs", "stream")}
    options.update(framed=True, detach_keys=request.query.get("detachKeys"))
    engine.containers.attach(container, lambda: request.hijack(container.tty), options)


@route("POST", "/containers/{id}/wait")
def wait_for_container(engine, request):
    container, condition = found(engine, request), request.query.get("condition") or "not-running"
    if condition not in ("not-running", "next-exit", "removed"):
        raise BadRequest('invalid condition: "%s"' % condition)
    headers = {"Api-Version": API_VERSION, "Content-Type": "application/json", "Transfer-Encoding": "chunked", "Connection": "close"}
    if not engine.containers.hand_wait_over(container, condition, lambda: request.take_connection("200 OK", headers)):
        request.start(200)  # at once: clients wait for the head before they start the container
        request.write_json({"StatusCode": engine.containers.wait(container, condition)})
        request.finish()


def asked_size(request):
    """(height, width) of a resize."""
    for name, word in (("h", "height"), ("w", "width")):
        if not 0 <= request.number(name, 0) < 65536:
            raise BadRequest("invalid resize %s %s: a terminal has 0 to 65535" % (word, request.query[name]))
    return request.number("h", 0), request.number("w", 0)


@route("POST", "/containers/{id}/resize")
def resize_container(engine, request):
    engine.containers.resize(found(engine, request), *asked_size(request))
    return Reply(200)


@route("GET", "/containers/{id}/top")
def top_container(engine, request):
    return engine.containers.top(found(engine, request), request.query.get("ps_args"))


@route("GET", "/containers/{id}/changes")
def container_changes(engine, request):
    return engine.containers.changes(found(engine, request)) or []


@route("GET", "/containers/{id}/stats")
def container_stats(engine, request):
    container = found(engine, request)
    if not request.flag("stream", True):
        first = None
        if not request.flag("one-shot"):
            first = engine.containers.stats(container)
            if container.running:
                time.sleep(1)
        return engine.containers.stats(container, first)
    request.start(200)
    previous = None
    while not container.removed and not _hung_up(request.handler.connection):
        previous = engine.containers.stats(container, previous)
        request.write_json(previous)
        time.sleep(1)
    request.finish()


@route("GET", "/containers/{id}/logs")
def container_logs(engine, request):
    container = found(engine, request)
    streams = [name for name in ("stdout", "stderr") if request.flag(name)]
    if not streams:
        raise BadRequest("Bad parameters: you must choose at least one stream")
    if container.host_config["LogConfig"]["Type"] == "none":
        raise Error("configured logging driver does not support reading", 501)
    limits = [parse_since(request.query[name]) if request.query.get(name) not in (None, "", "0") else None for name in ("since", "until")]
    tail = request.query.get("tail", "all")
    reader = LogReader(container, int(tail) if tail.isdigit() else None, *limits)
    framed, stamped = not container.tty, request.flag("timestamps")
    modern = request.version >= (1, 42) and framed
    request.start(200, content_type="application/vnd.docker.%s" % ("multiplexed-stream" if modern else "raw-stream"))
    for batch in reader.batches(request.flag("follow"), lambda: _hung_up(request.handler.connection)):
        parts = []
        for record in batch:
            if record["stream"] in streams:
                data = ((record["time"] + " " if stamped else "") + record["log"]).encode()
                parts.append(struct.pack(">BxxxI", STREAMS[record["stream"]], len(data)) + data if framed else data)
        request.write(b"".join(parts))
    request.finish()


class LogReader:
    """A container's log, from the last `tail` lines (None: all) and between two times (ns, or None)."""

    def __init__(self, container, tail, since, until):
        self.container, self.tail, self.since, self.until = container, tail, since, until

    def batches(self, follow, stopped):
        """Lists of records {log, stream, time}; with follow until the container has ended or stopped() says so."""
        path = self.container.log_path
        started = self.container.state["started"]
        files = [open(p, "rb") for p in log_files(path) if os.path.exists(p)]
        log = None
        try:
            if self.tail is not None:
                yield self._select(self._last_lines(files))
            for number, log in enumerate(files):
                yield from self._read(log)
            while follow:
                live = self.container.running and self.container.state["started"] == started  # before reading: what comes later is seen
                before = log.tell() if log else 0
                if log is None and os.path.exists(path):
                    log = open(path, "rb")
                    files.append(log)
                if log:
                    yield from self._read(log)
                if log and self._rotated(log, path):
                    yield from self._read(log)  # what came between the last read and the rotation
                    log = self._following(log, path)
                    files.append(log)
                    continue
                if not live and self.container.state["status"] != "created" or self.container.removed or stopped():
                    return
                if not log or log.tell() == before:
                    wait_for_growth(path, log.tell() if log else 0, 1.0)
        finally:
            for f in files:
                f.close()

    @staticmethod
    def _rotated(log, path):
        with contextlib.suppress(FileNotFoundError):
            return os.stat(path).st_ino != os.fstat(log.fileno()).st_ino
        return False

    @staticmethod
    def _following(log, path):
        """The file after `log`, which has been moved aside, perhaps more than once; the oldest where it is gone."""
        mine = os.fstat(log.fileno()).st_ino
        while True:
            with contextlib.suppress(FileNotFoundError):  # rotated again while we looked
                names = log_files(path)
                inodes = [os.stat(name).st_ino for name in names]
                place = inodes.index(mine) + 1 if mine in inodes[:-1] else 0
                found = open(names[place], "rb")
                if os.fstat(found.fileno()).st_ino == inodes[place]:
                    return found
                found.close()

    def _read(self, log):
        """What a file has from its position on, in batches of about a MiB of whole lines."""
        while True:
            lines = log.readlines(1 << 20)
            if lines and not lines[-1].endswith(b"\n"):  # a line that is just being written
                log.seek(-len(lines[-1]), 1)
                lines.pop()
            if not lines:
                return
            yield self._select(lines)

    def _select(self, lines):
        records = []
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the power went while it was written
                continue
            if self.since or self.until:
                at = parse_time(record["time"])
                if self.since and at < self.since or self.until and at > self.until:
                    continue
            records.append(record)
        return records

    def _last_lines(self, files):
        """The last `tail` lines over all files; leaves the files at their ends."""
        lines = []
        for log in reversed(files):
            end = position = log.seek(0, 2)
            data = b""
            while position and data.count(b"\n") <= self.tail - len(lines):
                step = min(position, 1 << 16)
                position -= step
                log.seek(position)
                data = log.read(step) + data
            log.seek(end)
            here = data.splitlines(True)
            lines = here[-(self.tail - len(lines)):] + lines if self.tail > len(lines) else lines
        return lines


def wait_for_growth(path, size, timeout):
    """Return when the file is larger than size, moved away, or after so many seconds: inotify(7)."""
    with contextlib.suppress(OSError), opened_at(inotify_watch(path)) as fd:
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_size > size:
                return
        select.select([fd], [], [], timeout)
        return
    time.sleep(min(timeout, 0.1))


@route("GET", "/containers/{id}/export")
def export_container(engine, request):
    container = found(engine, request)
    with container.files:
        place = engine.containers.place(container)
        stream_from_child(engine, request, "export_root", "application/octet-stream", root=place["root"], process=place["process"],
                          mount_point=place["mount_point"])
    engine.emit_container("export", container)


def stream_from_child(engine, request, task_name, content_type, headers=(), **arguments):
    """Answer with what a task writes to a pipe. An error before the first byte is answered with its status."""
    source, sink = os.pipe2(os.O_CLOEXEC)
    with open(source, "rb", buffering=0) as stream:
        try:
            job = engine.spawner.begin(task_name, [sink], **arguments)
        finally:
            os.close(sink)
        data = stream.read(BLOCK)
        if not data:
            job.result()
        request.start(200, headers, content_type)
        while data:
            request.write(data)
            data = stream.read(BLOCK)
        job.result()  # an error now breaks the chunked stream off: the client sees that it is not whole
        request.finish()


@contextlib.contextmanager
def _place(engine, request):
    """(container, arguments of a task on the path of the query), for as long as nobody else works on its files."""
    container, path = found(engine, request), request.query.get("path")
    if not path:
        raise BadRequest("bad parameter: path cannot be empty")
    with container.files:
        yield container, {"place": engine.containers.place(container), "container": request.parameters["id"], "path": path}


@route("HEAD", "/containers/{id}/archive")
def stat_archive(engine, request):
    with _place(engine, request) as (_, arguments):
        return Reply(200, headers=path_stat_header(engine.spawner.run("stat_path", **arguments)))


def path_stat_header(found):
    import base64
    return {"X-Docker-Container-Path-Stat": base64.b64encode(json.dumps(found).encode()).decode()}


@route("GET", "/containers/{id}/archive")
def get_archive(engine, request):
    with _place(engine, request) as (container, arguments):
        headers = path_stat_header(engine.spawner.run("stat_path", **arguments))
        stream_from_child(engine, request, "archive_out", "application/x-tar", headers, **arguments)
    engine.emit_container("archive-path", container)


@route("PUT", "/containers/{id}/archive")
def put_archive(engine, request):
    with _place(engine, request) as (container, arguments), body_pipe(request) as fd:
        path = os.path.normpath("/" + arguments["path"])
        inside = [p for p in container.mounts if (path + "/").startswith(p["Destination"] + "/")]
        if inside and not max(inside, key=lambda p: len(p["Destination"]))["RW"]:
            raise Forbidden("mounted volume is marked read-only")
        if not inside and container.host_config["ReadonlyRootfs"]:
            raise Forbidden("container rootfs is marked read-only")
        engine.spawner.run("archive_in", [fd], keep_kind=request.flag("noOverwriteDirNonDir"), **arguments)
    engine.emit_container("extract-to-dir", container)
    return Reply(200)


# -- exec

@route("POST", "/containers/{id}/exec")
def create_exec(engine, request):
    return Reply(201, {"Id": engine.containers.execs.create(found(engine, request), request.json()).id})


@route("POST", "/exec/{id}/start")
def start_exec(engine, request):
    ex, body = engine.containers.execs.find(request.parameters["id"]), request.json(required=False)
    if body.get("Detach"):
        engine.containers.execs.start(ex, body)
        return Reply(200)
    engine.containers.execs.start(ex, body, lambda: request.hijack(ex.config["Tty"]))


@route("POST", "/exec/{id}/resize")
def resize_exec(engine, request):
    engine.containers.execs.resize(engine.containers.execs.find(request.parameters["id"]), *asked_size(request))
    return Reply(200)


@route("GET", "/exec/{id}/json")
def inspect_exec(engine, request):
    return engine.containers.execs.find(request.parameters["id"]).to_api()


# -- images

_IMAGE_FILTERS = ("before", "dangling", "label", "reference", "since", "until")


@route("GET", "/images/json")
def list_images(engine, request):
    filters, images = request.filters(_IMAGE_FILTERS), engine.images
    shown = []
    for image in sorted(images.all(), key=lambda i: -i.created):
        tags = images.tags_of(image)
        if not tags and images.children(image) and not request.flag("all"):
            continue
        if "dangling" in filters and (filters["dangling"][0] in ("true", "1")) != (not tags):
            continue
        if not all(_label_matches(image.container_config.get("Labels"), v) for v in filters.get("label", [])):
            continue
        if any(image.created >= images.find(v).created for v in filters.get("before", [])) or any(
                image.created <= images.find(v).created for v in filters.get("since", [])) or any(
                image.created > parse_since(v) for v in filters.get("until", [])):
            continue
        entry = images.summary(image)
        if "reference" in filters:
            entry["RepoTags"] = [t for t in tags if any(_reference_matches(t, v) for v in filters["reference"])]
            if not entry["RepoTags"]:
                continue
        shown.append(entry)
    return shown


def _reference_matches(tag, pattern):
    import fnmatch
    return fnmatch.fnmatchcase(tag, pattern) or fnmatch.fnmatchcase(tag.rpartition(":")[0], pattern)


def stream_progress(request, work):
    """Answer with the JSON stream of work(progress): an error before its first object has its status, a later one ends the stream."""
    def progress(message):
        if not request.answered:
            request.start(200)
        request.write_json(message)
    try:
        work(progress)
    except (Error, OSError) as error:
        if not request.answered:
            raise
        debug_traceback()
        message = str(error) if isinstance(error, Error) else os_error_text(error)
        request.write_json({"errorDetail": {"message": message}, "error": message})
    if not request.answered:
        request.start(200)
    request.finish()


def registry_auth(request, strict=False):
    """The credentials of X-Registry-Auth; a pull goes on without where they cannot be read, as docker's."""
    try:
        return decode_registry_auth(request.headers.get("X-Registry-Auth"))
    except BadRequest:
        if strict:
            raise
        return {}


def _asked_reference(request):
    """The Reference of the query's repo and tag; None without."""
    repo, tag = request.query.get("repo"), request.query.get("tag")
    return Reference.parse(repo + (":" + tag if tag else "")) if repo else None


@route("POST", "/images/create")
def create_image(engine, request):
    """Pull (fromImage) or import (fromSrc)."""
    source = request.query.get("fromSrc")
    if source is None:
        name, tag = request.query.get("fromImage") or "", request.query.get("tag")
        whole = name + ("@" if tag and tag.startswith("sha256:") else ":") + tag if tag else name
        stream_progress(request, lambda progress: engine.registry.pull(
            whole, request.query.get("platform") or "", registry_auth(request), progress, all_tags=not tag and not re.search("@|:[^/]*$", name)))
        return
    reference = _asked_reference(request)
    message = request.query.get("message") or "Imported from " + source
    changes = request.lists.get("changes", [])
    if source == "-":
        with body_pipe(request) as fd:
            image = engine.import_image(fd, reference, changes, message)
    else:
        image = import_from_url(engine, source, reference, changes, message)
    request.start(200)
    request.write_json({"status": "sha256:" + image.id})
    request.finish()


@route("POST", "/images/{name}/push")
def push_image(engine, request):
    auth, tag = registry_auth(request, strict=True), request.query.get("tag")
    stream_progress(request, lambda progress: engine.registry.push(request.parameters["name"], tag, auth, progress, all_tags=not tag))


@route("POST", "/images/load")
def load_archive(engine, request):
    stream_progress(request, lambda progress: load_images(engine.registry.blobs, request.body, progress, request.flag("quiet")))


@route("GET", "/images/get")
def save_archive(engine, request):
    names = request.lists.get("names", [])
    for name in names or [""]:
        engine.images.find(name)  # an error now has its status
    request.start(200, content_type="application/x-tar")
    save_images(engine.registry.blobs, names, request.write, request.query.get("since"))
    request.finish()


@route("GET", "/images/{name}/get")
def save_one(engine, request):
    request.lists["names"] = [request.parameters["name"]]
    save_archive(engine, request)


@route("GET", "/images/search")
def search_images(engine, request):
    request.filters(("is-automated", "is-official", "stars"))
    return engine.registry.search(request.query.get("term") or "", request.number("limit", 0), registry_auth(request))


@route("POST", "/auth")
def check_auth(engine, request):
    return engine.registry.login(request.json())


@route("GET", "/distribution/{name}/json")
def inspect_distribution(engine, request):
    return engine.registry.distribution(request.parameters["name"], registry_auth(request))


def import_from_url(engine, url, reference, changes, message):
    """Fetch an archive and import it; http and https only."""
    import urllib.request
    if "://" not in url:
        url = "http://" + url
    if not re.match(r"https?://", url):
        raise BadRequest("import takes http and https addresses, a file or -: not %s" % printable(url))
    source, sink = os.pipe2(os.O_CLOEXEC)
    with opened_at(source):
        try:
            answer = urllib.request.urlopen(url, timeout=30)
        except (OSError, ValueError) as error:
            os.close(sink)
            reason = getattr(error, "reason", error)
            raise BadRequest("cannot fetch %s: %s" % (printable(url), os_error_text(reason) if isinstance(reason, OSError) else reason))
        thread = threading.Thread(target=_pump, args=(answer, sink), daemon=True)
        thread.start()
        return engine.import_image(source, reference, changes, message)


def _pump(stream, sink):
    with stream, open(sink, "wb", buffering=0) as out, contextlib.suppress(OSError):
        for data in iter(lambda: stream.read(BLOCK), b""):
            write_all(out.fileno(), data)


@route("POST", "/pydock/mkimage")
def make_image(engine, request):
    reference = Reference.parse(request.query.get("name") or "")
    image = engine.make_image(reference, request.lists.get("program", []))
    request.start(200)
    request.write_json({"status": "sha256:" + image.id})
    request.finish()


@route("GET", "/images/{name}/json")
def inspect_image(engine, request):
    return engine.images.inspect(engine.images.find(request.parameters["name"]))


@route("GET", "/images/{name}/history")
def image_history(engine, request):
    return engine.images.history(engine.images.find(request.parameters["name"]))


@route("POST", "/images/{name}/tag")
def tag_image(engine, request):
    repo, tag = request.query.get("repo") or "", request.query.get("tag")
    reference = Reference.parse(repo + (":" + tag if tag else ""))
    engine.images.tag(engine.images.find(request.parameters["name"]), reference)
    return Reply(201)


@route("DELETE", "/images/{name}")
def remove_image(engine, request):
    return engine.images.remove(request.parameters["name"], request.flag("force"), not request.flag("noprune"))


@route("POST", "/build/prune")
def prune_builds(engine, request):
    return {"CachesDeleted": None, "SpaceReclaimed": 0}


@route("POST", "/images/prune")
def prune_images(engine, request):
    filters = request.filters(("dangling", "label", "label!", "until"))
    all_unused = filters.get("dangling", ["true"])[0] in ("false", "0")
    gone, freed = engine.prune_images(all_unused, lambda i: _pruning_keeps(filters, i.container_config.get("Labels"), i.created))
    return {"ImagesDeleted": gone or None, "SpaceReclaimed": freed}


@route("POST", "/commit")
def commit_container(engine, request):
    container = engine.containers.find(request.query.get("container") or "")
    image = engine.commit(container, _asked_reference(request), request.query.get("comment", ""), request.query.get("author", ""),
                          [line for text in request.lists.get("changes", []) for line in text.split("\n") if line.strip()],
                          request.json(required=False), request.flag("pause", True))
    return Reply(201, {"Id": "sha256:" + image.id})


# -- volumes and networks

@route("GET", "/volumes")
def list_volumes(engine, request):
    filters = request.filters(("dangling", "driver", "label", "name"))
    shown = []
    for name, meta in sorted(engine.volumes.volumes.items()):
        used = bool(engine.volumes.users(name))
        if all((any(v in name for v in filters.get("name", [""])), all(_label_matches(meta["Labels"], v) for v in filters.get("label", [])),
                all(v == "local" for v in filters.get("driver", [])), all((v in ("true", "1")) != used for v in filters.get("dangling", [])))):
            shown.append(engine.volumes.to_api(meta))
    return {"Volumes": shown, "Warnings": None}


@route("POST", "/volumes/create")
def create_volume(engine, request):
    body = _check_types(request.json(), {"Name": "", "Driver": "", "DriverOpts": {}, "Labels": {}}, "Volume")
    if body["Driver"] not in ("", "local"):
        raise NotFound('create %s: error looking up volume plugin %s: plugin "%s" not found' % (body["Name"], body["Driver"], body["Driver"]))
    meta = engine.volumes.create(body["Name"], body["Labels"], body["DriverOpts"])
    return Reply(201, engine.volumes.to_api(meta))


@route("POST", "/volumes/prune")
def prune_volumes(engine, request):
    filters = request.filters(("all", "label", "label!"))
    all_unused = filters.get("all", ["false"])[0] in ("true", "1") or request.version < (1, 42)
    gone, freed = engine.prune_volumes(all_unused, lambda meta: _pruning_keeps(filters, meta["Labels"], 0))
    return {"VolumesDeleted": gone or None, "SpaceReclaimed": freed}


@route("GET", "/volumes/{id}")
def inspect_volume(engine, request):
    return engine.volumes.to_api(engine.volumes.find(request.parameters["id"]))


@route("DELETE", "/volumes/{id}")
def remove_volume(engine, request):
    engine.volumes.remove(request.parameters["id"], request.flag("force"))


@route("GET", "/networks")
def list_networks(engine, request):
    filters = request.filters(("dangling", "driver", "id", "label", "name", "scope", "type"))
    tests = {"name": lambda n, v: v in n.name, "id": lambda n, v: n.id.startswith(v), "driver": lambda n, v: n.driver == v,
             "label": lambda n, v: _label_matches(n.labels, v), "scope": lambda n, v: v == "local",
             "type": lambda n, v: (v == "builtin") == n.predefined, "dangling": lambda n, v: (v in ("true", "1")) == (not n.endpoints)}
    return [network.to_api(containers=False) for network in list(engine.networks.networks.values())
            if all(any(tests[name](network, v) for v in values) for name, values in filters.items())]


@route("POST", "/networks/create")
def create_network(engine, request):
    network = engine.networks.create(request.json())
    engine.networks.emit("create", network.id, name=network.name, type=network.driver)
    return Reply(201, {"Id": network.id, "Warning": ""})


@route("POST", "/networks/prune")
def prune_networks(engine, request):
    filters = request.filters(("label", "label!", "until"))
    gone = []
    for network in list(engine.networks.networks.values()):
        used = network.endpoints or any(network.name in c.networks for c in engine.containers.all())
        if not network.predefined and not used and not _pruning_keeps(filters, network.labels, network.created):
            with contextlib.suppress(Error):
                gone.append(engine.networks.remove(network.id).name)
    return {"NetworksDeleted": gone or None}


@route("POST", "/networks/{id}/connect")
def connect_network(engine, request):
    body = _check_types(request.json(), {"Container": "", "EndpointConfig": {}}, "NetworkConnect")
    engine.containers.plugs.connect(engine.containers.find(body["Container"]), request.parameters["id"], body["EndpointConfig"])
    return Reply(200)


@route("POST", "/networks/{id}/disconnect")
def disconnect_network(engine, request):
    body = _check_types(request.json(), {"Container": "", "Force": False}, "NetworkDisconnect")
    engine.containers.plugs.disconnect(engine.containers.find(body["Container"]), request.parameters["id"])
    return Reply(200)


@route("GET", "/networks/{id}")
def inspect_network(engine, request):
    return engine.networks.find(request.parameters["id"]).to_api()


@route("DELETE", "/networks/{id}")
def remove_network(engine, request):
    network = engine.networks.remove(request.parameters["id"])
    engine.networks.emit("destroy", network.id, name=network.name, type=network.driver)


########################################################################
# 17. Client
########################################################################
# The client's side of the wire: Go templates for --format, HTTP on a bare socket, attached streams and the raw terminal,
# progress. Only the client process runs it, and it imports nothing that its command does not need: http.client would bring
# `email` with it and cannot hand out the socket of an upgraded connection, so HTTP/1.1 is spoken here directly. The idea to know:
# a Client keeps idle connections and opens another whenever none is idle, so that an attach, a wait and a start can be under way
# side by side without a thread.

# -- templates --------------------------------------------------------------------------------------------------------------

# Compiled where they are used (re keeps them): few commands need a template.
_ACTION = r"""(?xs)\{\{(?P<left>-(?=\s))?(?P<body>\s*/\*.*?\*/\s*?|(?:"(?:[^"\\\n]|\\.)*"|`[^`]*`|[^"`}]|\}(?!\}))*?)
                  (?P<right>(?<=\s)-)?\}\}"""
_TOKEN = r"""(?x)(?P<space>\s*)(?:(?P<string>"(?:[^"\\\n]|\\.)*"|`[^`]*`)|(?P<number>[-+]?\d[\w.]*)|(?P<field>\.[^\W\d]\w*)
                 |(?P<dot>\.)|(?P<variable>\$\w*)|(?P<word>[^\W\d]\w*)|(?P<mark>:=|[=|(),]))"""
_CONSTANTS = {"true": True, "false": False, "nil": None}


class TemplateError(Error):
    """A template that cannot be read. What goes wrong while one is carried out is a plain Error."""
    status = 400


class Template:
    """Go's text/template as people write it in --format: fields, methods, variables, pipelines, the functions of _FUNCTIONS, if,
    with, range, trimming and comments. Data is what JSON holds; a Row computes its fields, and a field that can be called is a
    method.

        Template("{{range $k, $v := .Config.Labels}}{{$k}}={{$v}} {{end}}").render(container)

    A key that is missing gives `<no value>`. The syntax is that of pkg.go.dev/text/template."""

    def __init__(self, text):
        self._line = 1
        self._pieces = list(self._split(text))[::-1]  # read from the end, as the tokens of an action are
        self._tokens, self._names = [], ["$"]
        self._body, ended = self._list()
        if ended:
            raise self._error("unexpected {{%s}}" % ended)

    def render(self, data):
        return self._body(_Run(data, [("$", data)]))

    # reading: text into pieces, pieces into functions that take a _Run

    def _error(self, message):
        return TemplateError("template: :%d: %s" % (self._line, message))

    def _split(self, text):
        """Yield (line, plain text, None) and (line, None, what an action holds); the spaces around `{{- -}}` are gone already."""
        at, trim = 0, None
        while at < len(text):
            start = text.find("{{", at)
            self._line = text.count("\n", 0, max(start, at)) + 1
            match = re.compile(_ACTION).match(text, start) if start >= 0 else None
            if start >= 0 and not match:
                raise self._error("unclosed action")
            plain = text[at:start] if match else text[at:]
            plain = plain.lstrip() if trim else plain
            yield self._line, plain.rstrip() if match and match.group("left") else plain, None
            if not match:
                return
            at, trim = match.end(), match.group("right")
            if not match.group("body").lstrip().startswith("/*"):
                yield self._line, None, match.group("body")

    def _list(self, inside=None):
        """Read up to the `end` or `else` of the block that we are inside of: (function, which of the two it was)."""
        nodes, names, ended = [], len(self._names), None
        while self._pieces and not ended:
            self._line, text, action = self._pieces.pop()
            if action is None:
                nodes.append(lambda run, text=text: text)
                continue
            self._tokenize(action)
            word = self._peek()
            if word in ("end", "else"):
                ended = self._tokens.pop()[1]
            else:
                nodes.append(self._block(self._tokens.pop()[1]) if word in self._BLOCKS else self._action())
        if inside and not ended:
            raise self._error("unexpected EOF")
        del self._names[names:]
        return (lambda run: "".join(node(run) for node in nodes)), ended

    def _tokenize(self, action):
        """The action's tokens as (kind, text, whether no space stands before it)."""
        tokens, at, action = [], 0, action.rstrip()
        while at < len(action):
            match = re.compile(_TOKEN).match(action, at)
            if not match:
                raise self._error("unexpected %s in command" % json.dumps(action[at:].lstrip()[:1], ensure_ascii=False))
            tokens.append((match.lastgroup, match.group(match.lastgroup), not match.group("space")))
            at = match.end()
        self._tokens = tokens[::-1]

    def _peek(self):
        return self._tokens[-1][1] if self._tokens and self._tokens[-1][0] in ("mark", "word") else None

    def _take(self, mark):
        found = self._peek() == mark
        if found:
            self._tokens.pop()
        return found

    def _action(self):
        pipeline, _ = self._pipeline("command")
        if self._tokens:
            raise self._error("unexpected %s in command" % json.dumps(self._tokens[-1][1]))
        return lambda run: _go_text(pipeline(run), "<no value>")

    def _block(self, word):
        """`if`, `with` and `range` with their else branches; `else if` shares the end of its if."""
        names = len(self._names)
        pipeline, variables = self._pipeline(word)
        body, ended = self._list(word)
        other = lambda run: ""  # noqa: E731
        if ended == "else" and self._peek() in ("if", "with"):
            other = self._block(self._tokens.pop()[1])
        elif ended == "else":
            other, _ = self._list(word)
        del self._names[names:]
        return functools.partial(self._BLOCKS[word], pipeline, variables, body, other)

    def _if(pipeline, variables, body, other, run):
        with run.scope():
            return body(run) if pipeline(run) else other(run)

    def _with(pipeline, variables, body, other, run):
        with run.scope():
            value = pipeline(run)
            return body(run.on(value)) if value else other(run)

    def _range(pipeline, variables, body, other, run):
        with run.scope():
            pairs, output = _pairs(pipeline(run)), []
            for key, item in pairs:
                with run.scope():
                    run.variables += zip(variables, (key, item) if len(variables) > 1 else (item,))
                    output.append(body(run.on(item)))
            return "".join(output) if pairs else other(run)

    _BLOCKS = {"if": _if, "with": _with, "range": _range}

    def _pipeline(self, context, closing=False):
        """`[$a [, $b] :=] command | command`: (function, the variables that it sets; those of a range get their values there)."""
        names, declares = self._declaration()
        if not self._tokens:
            raise self._error("missing value for %s" % context)
        commands = [self._command()]
        while self._take("|"):
            commands.append(self._command())
        if closing and not self._take(")"):
            raise self._error("unclosed left paren")

        def pipeline(run):
            value = commands[0](run)
            for command in commands[1:]:
                value = command(run, value)
            if names and context != "range":
                run.assign(names[0], value, declares)
            return "" if names and context == "command" else value
        return pipeline, names

    def _declaration(self):
        names, kept = [], list(self._tokens)
        while self._tokens and self._tokens[-1][0] == "variable":
            names.append(self._tokens.pop()[1])
            mark = next((mark for mark in (":=", "=") if self._take(mark)), None)
            if mark:
                self._names += names if mark == ":=" else []
                return names, mark == ":="
            if not self._take(","):
                break
        self._tokens = kept
        return [], False

    def _command(self):
        """One command of a pipeline: its first operand gets the others, and the value piped into it, as arguments."""
        operands = []
        while self._tokens and self._peek() not in ("|", ")"):
            operands.append(self._operand())
        if not operands:
            raise self._error("missing value for command")

        def command(run, *piped):
            # As thunks, because `and` and `or` look at no more of them than they need.
            arguments = [functools.partial(operand, run) for operand in operands[1:]]
            return operands[0](run, *arguments, *((lambda: value) for value in piped))
        return command

    def _operand(self):
        """A function of a _Run and of arguments, which only functions and methods take."""
        kind, text, _ = self._tokens.pop()
        if kind in ("string", "number") or text in _CONSTANTS:
            value = self._literal(kind, text)
            return lambda run, *arguments: value
        if kind == "word":
            if text not in _FUNCTIONS:
                raise self._error('function "%s" not defined' % text)
            return functools.partial(_call_function, text)
        if text == "(":
            base, _ = self._pipeline("parenthesized pipeline", closing=True)
        elif kind in ("dot", "field"):
            base = _Run.get_dot
            if kind == "field":
                self._tokens.append((kind, text, True))
        elif kind == "variable" and text in self._names:
            base = functools.partial(_Run.look_up, name=text)
        elif kind == "variable":
            raise self._error('undefined variable "%s"' % text)
        else:
            raise self._error("unexpected %s in operand" % json.dumps(text))
        fields = []
        while self._tokens and self._tokens[-1][0] == "field" and self._tokens[-1][2]:
            fields.append(self._tokens.pop()[1][1:])
        return functools.partial(_follow, base, fields)

    def _literal(self, kind, text):
        try:
            if kind == "string":
                return text[1:-1] if text[0] == "`" else json.loads(text)
            if kind == "number":
                return int(text, 0) if re.fullmatch(r"[-+]?(0[xXoObB]\w+|\d+)", text) else float(text)
        except ValueError:
            raise self._error("bad %s syntax: %s" % (kind, text))
        return _CONSTANTS[text]


class _Run:
    """A template being carried out: what `.` is, and the variables in sight, the innermost last."""

    def __init__(self, dot, variables):
        self.dot, self.variables = dot, variables

    def on(self, dot):
        return _Run(dot, self.variables)

    def get_dot(self):
        return self.dot

    def look_up(self, name):
        return next(value for key, value in reversed(self.variables) if key == name)

    def assign(self, name, value, declares):
        if declares:
            self.variables.append((name, value))
        else:
            last = max(number for number, (key, _) in enumerate(self.variables) if key == name)
            self.variables[last] = (name, value)

    @contextlib.contextmanager
    def scope(self):
        depth = len(self.variables)
        yield
        del self.variables[depth:]


class Row(dict):
    """What a template sees of an object in a list: fields[name] = (column title, function of the object and of the options),
    computed when asked for. Where the function returns a function, the field is a method."""

    def __init__(self, fields, item, **options):
        super().__init__()
        self._fields, self._item, self._options = fields, item, options

    def __missing__(self, name):
        if name not in self._fields:
            raise Error("can't evaluate field %s: there are %s" % (name, ", ".join(sorted(self._fields))))
        return self._fields[name][1](self._item, **self._options)

    def all(self):
        values = {name: self[name] for name in sorted(self._fields)}
        return {name: value for name, value in values.items() if not callable(value)}


def _follow(base, fields, run, *arguments):
    """The value at the end of `.A.B`; the arguments go to it where it is a method."""
    value, path = base(run), ""
    for name in fields:
        path += "." + name
        if not isinstance(value, dict):
            wrong = "nil pointer evaluating interface {}." if value is None else "can't evaluate field "
            raise Error('template: executing "" at <%s>: %s%s' % (path, wrong, name))
        try:
            value = value[name]
        except KeyError:  # perhaps it is the field's name in Go: ID, HostIP, APIVersion where JSON has Id, HostIp, ApiVersion
            value = next((item for key, item in value.items() if key.lower() == name.lower()), None)
    return value(*(argument() for argument in arguments)) if callable(value) else value


def _call_function(name, run, *arguments):
    if name in ("and", "or"):
        value = None
        for argument in arguments:
            value = argument()
            if bool(value) == (name == "or"):
                break
        return value
    try:
        return _FUNCTIONS[name](*(argument() for argument in arguments))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise Error('template: executing "" at <%s>: error calling %s: %s' % (name, name, error.args[0] if error.args else error))


def _pairs(value):
    """What range goes through, as a list of (key, item)."""
    if isinstance(value, dict):
        return sorted(value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        value = range(value)
    if isinstance(value, (list, tuple, range, type(None))):
        return list(enumerate(value or ()))
    raise Error("range can't iterate over %s" % _go_text(value))


def _go_text(value, nothing="<nil>"):
    """A value as Go's %v prints it."""
    if value is None:
        return nothing
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        value = value.all() if isinstance(value, Row) else value
        return "map[%s]" % " ".join("%s:%s" % (key, _go_text(item)) for key, item in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return "[%s]" % " ".join(map(_go_text, value))
    if isinstance(value, float):
        return "%d" % value if value.is_integer() and abs(value) < 1e21 else repr(value)
    return str(value)


def to_json(value):
    """JSON in one line without spaces, as Go writes it; a Row with HTML's characters escaped, as docker's lists are."""
    if not isinstance(value, Row):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    text = to_json(value.all())
    return re.sub("[<>&]", lambda match: "\\u%04x" % ord(match.group()), text)


def _go_index(value, *keys):
    for key in keys:
        if isinstance(value, (list, str)) and not (isinstance(key, int) and 0 <= key < len(value)):
            raise LookupError("index out of range: %s" % _go_text(key))
        value = value.get(key) if isinstance(value, dict) else value[key]
    return value


def _go_printf(form, *values):
    """Go's Sprintf with the verbs that make sense for what JSON holds; flags, width and precision mean the same in Python."""
    values = list(values)

    def one(match):
        flags, verb = match.groups()
        if verb == "%":
            return "%"
        if not values:
            return "%%!%s(MISSING)" % verb
        value = values.pop(0)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and verb in "dxXoceEfFgG":
            return ("%" + flags + verb) % value
        if verb in "vstq":
            text = _go_text(value)
            return ("%" + flags + "s") % (json.dumps(text, ensure_ascii=False) if verb == "q" else text)
        return "%%!%s(%s=%s)" % (verb, "number" if is_number else "string", _go_text(value))
    return re.sub(r"%([-+# 0]*\d*(?:\.\d*)?)([a-zA-Z%])", one, form)


def _truncate(text, length):
    """At most that many characters, the last one an ellipsis where something was cut, as docker's lists have it."""
    return text if len(text) <= length else text[:length - 1] + "\u2026" if length > 1 else text[:length]


_FUNCTIONS = {
    "and": None, "or": None,  # see _call_function: they do not look at all of their arguments
    "not": lambda value: not value,
    "eq": lambda first, *others: any(first == other for other in others),
    "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "len": len, "index": _go_index, "json": to_json,
    "print": lambda *values: "".join(map(_go_text, values)),
    "println": lambda *values: " ".join(map(_go_text, values)) + "\n",
    "printf": _go_printf,
    "join": lambda values, separator: separator.join(map(_go_text, values or ())),
    "split": lambda text, separator: text.split(separator),
    "lower": lambda text: text.lower(), "upper": lambda text: text.upper(),
    "title": lambda text: re.sub(r"(?<!\S)\S", lambda match: match.group().upper(), text),
    "truncate": lambda text, length: text[:length],
    "pad": lambda text, before, after: " " * before + text + " " * after if text else text,
}


# -- HTTP -------------------------------------------------------------------------------------------------------------------

def quote(text, safe="/:@"):
    """Percent-encoding: urllib.parse's would cost a millisecond of import."""
    def encode(match):
        return "".join("%%%02X" % byte for byte in os.fsencode(match.group()))
    return re.sub(r"[^A-Za-z0-9_.~%s-]" % re.escape(safe), encode, text)


def encode_query(parameters):
    """`?a=b&c=d`. None, False, empty text and empty lists are left out, True is 1, a list gives its name several times, a dict is
    JSON."""
    pairs = []
    for name, value in parameters.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is None or item is False or item == "" or item == {}:
                continue
            item = json.dumps(item) if isinstance(item, dict) else "1" if item is True else str(item)
            pairs.append("%s=%s" % (name, quote(item, "")))
    return "?" + "&".join(pairs) if pairs else ""


def parse_host(text):
    """The address that -H names, as ("unix", path) or ("tcp", host, port): unix://PATH, a bare PATH, tcp://HOST:PORT, http://...,
    HOST:PORT, :PORT. What is left out of a TCP address is 127.0.0.1 and 4243."""
    scheme, mark, rest = text.partition("://")
    if not mark:
        scheme, rest = ("unix", text) if "/" in text else ("tcp", text)
    if scheme == "unix":
        return "unix", rest or DEFAULT_SOCKET
    match = re.fullmatch(r"(\[[0-9a-fA-F:.%]+\]|[^\[\]:/]*)(?::(\d{1,5}))?/?", rest)
    if scheme not in ("tcp", "http", "https") or not match or int(match.group(2) or 0) > 65535:
        raise BadRequest("invalid bind address (%s): use unix:///PATH or tcp://HOST:PORT" % text)
    return "tcp", match.group(1).strip("[]") or "127.0.0.1", int(match.group(2) or 4243)


class ConnectionLost(Error):
    """The other end closed the connection before it had answered."""


class TlsSocket:
    """A client's TLS on a connected socket, with as much of a socket's interface as a Connection needs. Python's own SSLSocket
    cannot end one direction and go on with the other, which is how a container's stdin ends."""

    def __init__(self, sock, context, server_name):
        import ssl
        self._socket, self._in, self._out, self._unsent, self._ahead = sock, ssl.MemoryBIO(), ssl.MemoryBIO(), b"", b""
        self._wants = ssl.SSLWantReadError
        self._tls = context.wrap_bio(self._in, self._out, server_hostname=server_name)
        self.fileno, self.close, self.setblocking = sock.fileno, sock.close, sock.setblocking
        self._step(self._tls.do_handshake)

    def _step(self, call, *arguments):
        """One step of TLS, once there is enough to read for it."""
        while True:
            try:
                return call(*arguments)
            except self._wants:
                self._flush()
                data = self._socket.recv(BLOCK)
                self._in.write(data) if data else self._in.write_eof()
            finally:
                self._flush()

    def _flush(self):
        """Send what TLS has written; without blocking, the rest waits."""
        self._unsent += self._out.read()
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent):]

    def unsent(self):
        return bool(self._unsent)

    def pending(self):
        return bool(self._ahead or self._tls.pending() or self._in.pending)

    def recv(self, size):
        data, self._ahead = self._ahead, b""
        try:
            return data or self._step(self._tls.read, size)
        except OSError as error:
            if error.errno in (6, 8):  # SSL_ERROR_ZERO_RETURN, and an end without it: SSL_ERROR_EOF
                return b""
            raise

    def send(self, data):
        self._flush()
        if self._unsent:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return self._step(self._tls.write, data)

    def sendall(self, data):
        while data:
            data = data[self.send(data):]

    def shutdown(self, _):
        """Say that no more will come; what the other side has still to say can be read. What has come from it already is
        decrypted before, because unwrap would throw it away."""
        with contextlib.suppress(self._wants):
            for data in iter(functools.partial(self._tls.read, BLOCK), b""):
                self._ahead += data
        with contextlib.suppress(self._wants):
            self._tls.unwrap()
        self._flush()


class Connection:
    """One HTTP/1.1 connection. When it was hijacked it is the stream itself: receive() and the socket's send()."""

    def __init__(self, sock, host):
        self.socket, self.host, self._data = sock, host, b""

    def fileno(self):
        return self.socket.fileno()

    def pending(self):
        """Whether bytes are here that poll(2) does not know of: read ahead by us, or by TLS."""
        return bool(self._data) or isinstance(self.socket, TlsSocket) and self.socket.pending()

    def unsent(self):
        return isinstance(self.socket, TlsSocket) and self.socket.unsent()

    def is_quiet(self):
        """Nothing has come since the last answer; an end of the stream (the daemon was restarted) would have."""
        import select
        return not self.pending() and not select.select([self.socket], [], [], 0)[0]

    def receive(self):
        """The bytes that are there, at least one; b"" at the end."""
        data, self._data = self._data, b""
        if data:
            return data
        try:
            return self.socket.recv(BLOCK)
        except ConnectionResetError:
            return b""

    def take(self, most):
        """Up to that many bytes; b"" at the end."""
        data = self.receive()
        self._data = data[most:]
        return data[:most] if self._data else data

    def line(self):
        data = b""
        while b"\n" not in data:
            part = self.receive()
            if not part or len(data) > BLOCK:
                raise ConnectionLost("the daemon closed the connection without a whole answer")
            data += part
        line, _, self._data = data.partition(b"\n")
        return line.rstrip(b"\r").decode("latin-1")

    def half_close(self):
        """No more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self):
        self.socket.close()


class Response:
    """An answer: `status`, `headers` (names in lower case), and a body that is read as a file or as JSON."""

    def __init__(self, connection, method, release):
        self._connection, self._method, self._release = connection, method, release
        self.status, self.headers = None, {}
        self._chunked, self._left = False, 0  # bytes left of the body or of this chunk; None: up to the end of the connection

    def start(self):
        """Wait for the head of the answer. An error status raises the error that it stands for, in the daemon's words."""
        words = self._connection.line().split(" ", 2)
        if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
            self._connection.close()
            raise Error("what listens at %s does not speak HTTP" % self._connection.host)
        self.status = int(words[1])
        for line in iter(self._connection.line, ""):
            name, _, value = line.partition(":")
            self.headers[name.strip().lower()] = value.strip()
        self._chunked = self.headers.get("transfer-encoding", "").lower() == "chunked"
        if self._method != "HEAD" and self.status not in (101, 204, 304):
            length = self.headers.get("content-length")
            self._left = 0 if self._chunked else None if length is None else int(length)
        else:
            self._chunked = False
        if self.status >= 400:
            raise self._failure()
        return self

    def _failure(self):
        text = self.read_all().decode("utf-8", "replace").strip()
        with contextlib.suppress(ValueError, TypeError, KeyError):
            text = json.loads(text)["message"]
        return error_from(self.status, "Error response from daemon: %s" % (text or "HTTP status %d" % self.status))

    def read(self, size=BLOCK):
        """Up to size bytes of the body, as they come; b"" at its end, when the connection is free for the next request."""
        if self._connection is None:
            return b""
        if self._chunked and not self._left:
            self._left = int(self._connection.line().partition(";")[0], 16)
            self._chunked = self._left > 0
            if not self._chunked:
                for _ in iter(self._connection.line, ""):  # the trailer
                    pass
        if self._left == 0:
            self._free()
            return b""
        data = self._connection.take(size if self._left is None else min(size, self._left))
        if self._left is None:
            if not data:
                self.close()
            return data
        if not data:
            self.close()
            raise Error("the daemon closed the connection in the middle of an answer")
        self._left -= len(data)
        if self._chunked and not self._left:
            self._connection.line()
        return data

    def _free(self):
        connection, self._connection = self._connection, None
        if self.headers.get("connection", "").lower() == "close":
            connection.close()
        else:
            self._release(connection)

    def close(self):
        """Give the rest of the body up, and the connection with it."""
        if self._connection:
            self._connection.close()
            self._connection = None

    def read_all(self):
        return b"".join(iter(self.read, b""))

    def json(self):
        """The body as an object; None where there is none."""
        data = self.read_all()
        try:
            return json.loads(data) if data.strip() else None
        except ValueError as error:
            raise Error("the daemon's answer is no JSON: %s" % error)

    def objects(self):
        """The JSON values of a stream, each as soon as it is complete."""
        import codecs
        decode, decoder, text = codecs.getincrementaldecoder("utf-8")("replace").decode, json.JSONDecoder(), ""
        for data in iter(self.read, b""):
            text = (text + decode(data)).lstrip()
            while text:
                try:
                    value, end = decoder.raw_decode(text)
                except ValueError:
                    break  # the rest of it is still to come
                text = text[end:].lstrip()
                yield value
        if text:
            raise Error("the daemon's answer ends in the middle of a message")

    def hijack(self):
        """The connection itself, for a stream in both directions."""
        connection, self._connection = self._connection, None
        return connection


class Client:
    """Requests to one daemon. `host` is an address as in -H, None for the default socket; `tls` None or a dict of verify (bool),
    ca, cert, key (paths, or None). `start_daemon()` is called when nothing answers on the default socket and we are root: it
    brings a daemon up, or raises Error."""

    def __init__(self, host=None, tls=None, start_daemon=None):
        self.host = host or "unix://" + DEFAULT_SOCKET
        self._address, self._tls, self._start_daemon = parse_host(self.host), tls, None if host else start_daemon
        self._idle, self._version, self.daemon_version = [], None, None

    def close(self):
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()

    # connections

    def _connect(self):
        """A new connection. A daemon that has answered us before is being restarted when it does not: it gets ten seconds."""
        deadline = time.monotonic() + (10 if self._version else 0)
        while True:
            try:
                return self._open()
            except (ConnectionRefusedError, FileNotFoundError) as error:
                if self._start_daemon and os.geteuid() == 0:
                    hook, self._start_daemon = self._start_daemon, None
                    hook()
                elif time.monotonic() >= deadline:
                    raise self._unreachable(error)
                else:
                    time.sleep(0.05)
            except OSError as error:
                raise self._unreachable(error)

    def _open(self):
        if self._address[0] == "unix":
            sock = socket.socket(socket.AF_UNIX)
            try:
                sock.connect(self._address[1])
            except OSError:
                sock.close()
                raise
            return Connection(sock, "localhost")
        sock = socket.create_connection(self._address[1:], timeout=30)
        sock.settimeout(None)
        # The numeric address: the daemon answers to no other names, which web pages could have bound to it.
        peer, port = sock.getpeername()[:2]
        host = ("[%s]:%d" if ":" in peer else "%s:%d") % (peer, port)
        return Connection(TlsSocket(sock, self._context(), self._address[1]) if self._tls else sock, host)

    def _context(self):
        import ssl
        context = ssl.create_default_context(cafile=self._tls["ca"])
        if not self._tls["verify"]:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if self._tls["cert"]:
            context.load_cert_chain(self._tls["cert"], self._tls["key"])
        return context

    def _unreachable(self, error):
        if isinstance(error, PermissionError):
            return Forbidden("permission denied while trying to connect to the pydock daemon at %s: use sudo, or join the group "
                             "that owns the socket" % self.host)
        if isinstance(error, (ConnectionRefusedError, FileNotFoundError)):
            where = "" if self._address == ("unix", DEFAULT_SOCKET) else " -H " + self.host
            return Unavailable("Cannot connect to the pydock daemon at %s. Is the daemon running? Start it with: sudo python3 "
                               "pydock.py -d%s" % (self.host, where))
        return Unavailable("cannot connect to the daemon at %s: %s" % (self.host, os_error_text(error)))

    def _take_connection(self):
        while self._idle:
            connection = self._idle.pop()
            if connection.is_quiet():
                return connection
            connection.close()
        return self._connect()

    @property
    def version(self):
        """The API version that both sides speak: the lower of ours and the daemon's."""
        if self._version is None:
            ping = self._send("HEAD", "/_ping", None, None, {}).start()
            self.daemon_version = ping.headers.get("api-version", "1.24")
            ping.read_all()
            self._version = min(API_VERSION, self.daemon_version, key=lambda text: [int(part) for part in text.split(".")])
        return self._version

    # requests

    def send(self, method, *path, data=None, body=None, headers=None, **query):
        """Send a request; its Response.start() waits for the answer, so that several can be under way at once.

        path: its parts, encoded here; query: see encode_query; data: an object sent as JSON; body: a function that is called with
        write(bytes) and sends a body of any length."""
        target = "/v%s/%s%s" % (self.version, "/".join(quote(part) for part in path), encode_query(query))
        return self._send(method, target, data, body, headers or {})

    def _send(self, method, target, data, body, headers):
        connection = self._take_connection()
        content = b"" if data is None else json.dumps(data).encode()
        lines = ["%s %s HTTP/1.1" % (method, target), "Host: " + connection.host, "User-Agent: pydock/" + VERSION]
        lines += ["%s: %s" % item for item in headers.items()]
        if body:
            lines.append("Transfer-Encoding: chunked")
        elif method not in ("GET", "HEAD", "DELETE"):
            lines += ["Content-Length: %d" % len(content)] + ["Content-Type: application/json"] * bool(content)
        try:
            connection.socket.sendall("\r\n".join(lines + ["", ""]).encode("utf-8", "surrogateescape") + content)
            if body:
                body(lambda part: part and connection.socket.sendall(b"%x\r\n%b\r\n" % (len(part), part)))
                connection.socket.sendall(b"0\r\n\r\n")
        except (BrokenPipeError, ConnectionResetError):
            pass  # the daemon has refused in the middle of the body: its answer says why
        return Response(connection, method, self._idle.append)

    def request(self, method, *path, **options):
        """Send a request and wait for the head of its answer. On an idle connection that the daemon closes at this very moment, a
        GET is sent again: it changes nothing."""
        while True:
            is_idle, response = bool(self._idle), self.send(method, *path, **options)
            try:
                return response.start()
            except ConnectionLost:
                response.close()
                if method != "GET" or not is_idle:
                    raise

    def get(self, *path, **query):
        """GET; the answer's object."""
        return self.request("GET", *path, **query).json()

    def post(self, *path, **options):
        """POST; the answer's object, None where there is none."""
        return self.request("POST", *path, **options).json()

    def delete(self, *path, **query):
        return self.request("DELETE", *path, **query).json()

    def hijack(self, *path, **options):
        """POST, and take the connection over as a stream."""
        return self.request("POST", *path, headers={"Connection": "Upgrade", "Upgrade": "tcp"}, **options).hijack()


# -- streams and the terminal -----------------------------------------------------------------------------------------------

# What is passed on to the container's process while we are attached. Not those of job control: they are for this process.
_PROXIED = [getattr(signal, "SIG" + name) for name in ("HUP", "INT", "QUIT", "USR1", "USR2", "ALRM", "TERM")]


class Demultiplexer:
    """Takes docker's frames apart: 8 bytes (1 stdout, 2 stderr, 3 an error of the daemon; 3 zeros; length, big endian), then as
    many bytes. feed() takes blocks however they are cut; what of a block goes to the same stream is written at once."""

    def __init__(self, write):
        self._write, self._head, self._kind, self._left = write, b"", 1, 0

    def feed(self, data):
        view, runs = memoryview(data), []
        while view:
            if not self._left:
                missing = 8 - len(self._head)
                self._head += bytes(view[:missing])
                view = view[missing:]
                if len(self._head) < 8:
                    break
                self._kind, self._left = struct.unpack(">B3xI", self._head)
                self._head = b""
                continue
            part, view = view[:self._left], view[self._left:]
            self._left -= len(part)
            if runs and runs[-1][0] == self._kind:
                runs[-1][1].append(part)
            else:
                runs.append((self._kind, [part]))
        for kind, parts in runs:
            if kind == 3:
                raise Error("error from daemon in stream: %s" % b"".join(parts).decode("utf-8", "replace"))
            self._write(2 if kind == 2 else 1, b"".join(parts))


def window_size():
    """(columns, lines) of our terminal."""
    return os.get_terminal_size(1 if os.isatty(1) else 0)


@contextlib.contextmanager
def raw_terminal(fd):
    """Raw mode while the block runs, where fd is a terminal: every key goes to the container. Restored on any way out; a signal
    is such a way while a SignalWatch is open."""
    if not os.isatty(fd):
        yield
        return
    import termios
    import tty
    saved = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, saved)


class SignalWatch:
    """While open, the signals of _PROXIED and SIGWINCH become bytes to read from fileno(), so that none is lost before the
    session runs and none interrupts it. The third SIGINT or SIGTERM ends the client all the same."""

    def __enter__(self):
        self._read, self._write = os.pipe()
        for fd in (self._read, self._write):
            os.set_blocking(fd, False)
        self._interrupts = 0
        self._old_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._old = [(number, signal.signal(number, self._count)) for number in _PROXIED + [signal.SIGWINCH]]
        return self

    def __exit__(self, *_):
        for number, handler in self._old:
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._read)
        os.close(self._write)

    def _count(self, number, _):
        self._interrupts += number in (signal.SIGINT, signal.SIGTERM)
        if self._interrupts > 2:
            raise Interrupted(number, "got 3 SIGTERM/SIGINTs, forcefully exiting")

    def fileno(self):
        return self._read

    def numbers(self):
        return list(os.read(self._read, 512))


class Interrupted(Error):
    """A signal ended the client; `number` is the signal's."""

    def __init__(self, number, message=""):
        super().__init__(message)
        self.number = number


class Session:
    """An attached stream: our stdin goes to the container or exec, its output comes to our stdout and stderr, window sizes and
    signals go to the daemon on other connections.

    connection: hijacked; tty: the output is one raw stream, no frames; stdin: whether fd 0 is sent; watch: an open SignalWatch;
    resize: called with the window's height and width where we have a terminal; kill: called with a signal's number, None: such a
    signal ends us. When the detach keys are typed the session ends, too. All of them but the last one go to the daemon, which
    holds them back as long as they can become a detach: so they reach the process when they do not."""

    def __init__(self, connection, tty, stdin, watch, resize=None, kill=None, detach_keys=None):
        self._connection, self._stdin, self._watch, self._resize, self._kill = connection, stdin, watch, resize, kill
        self._outgoing, self._typed = b"", b""
        self._keys = parse_detach_keys(detach_keys or DETACH_KEYS) if tty and stdin else None
        self.detached = False
        self._output = functools.partial(write_all, 1) if tty else Demultiplexer(write_all).feed

    def run(self):
        """Carry bytes until the daemon ends the stream, or the user does; whether it was the user."""
        import select
        self._connection.socket.setblocking(False)  # a container that does not read must not keep us from reading its output
        if self._resize:
            self._send_size()
        while True:
            poll = select.poll()
            poll.register(self._watch, select.POLLIN)
            writes = self._outgoing or self._connection.unsent()
            poll.register(self._connection, select.POLLIN | (select.POLLOUT if writes else 0))
            if self._stdin and not self._outgoing:
                poll.register(0, select.POLLIN)
            ready = dict(poll.poll(0 if self._connection.pending() else None))
            if self._watch.fileno() in ready:
                self._take_signals()
            if 0 in ready:
                self._read_stdin()
            if self._outgoing or self._connection.unsent():
                self._send()
            readable = ready.get(self._connection.fileno(), 0) & ~select.POLLOUT or self._connection.pending()
            if self.detached or readable and not self._receive():
                self._connection.close()
                return self.detached

    def _take_signals(self):
        for number in self._watch.numbers():
            if number == signal.SIGWINCH:
                if self._resize:
                    self._send_size()
            elif self._kill:
                with contextlib.suppress(Error):  # it has ended meanwhile
                    self._kill(number)
            else:
                raise Interrupted(number)

    def _send_size(self):
        with contextlib.suppress(Error, OSError):
            columns, lines = window_size()
            self._resize(lines, columns)

    def _read_stdin(self):
        try:
            data = os.read(0, BLOCK)
        except OSError:  # the terminal is gone, or stdin was closed
            data = b""
        if not data:
            self._stdin = False
            self._connection.half_close()
        elif self._keys:
            data = self._up_to_detach(data)
        self._outgoing = data

    def _up_to_detach(self, data):
        seen = len(self._typed)  # the sequence may have begun in what was read before
        self._typed += data
        end = self._typed.find(self._keys) + len(self._keys)
        if end >= len(self._keys):
            self.detached = True
            return self._typed[seen:end - 1]
        self._typed = self._typed[-len(self._keys) + 1:] if len(self._keys) > 1 else b""
        return data

    def _send(self):
        try:
            self._outgoing = self._outgoing[self._connection.socket.send(self._outgoing):]
        except OSError as error:
            if not _would_block(error):  # nobody reads any more; what it has written is still to come
                self._outgoing, self._stdin = b"", False

    def _receive(self):
        try:
            data = self._connection.receive()
        except OSError as error:
            if _would_block(error):
                return True
            raise
        self._output(data)
        return bool(data)


def _would_block(error):
    return error.errno == errno.EAGAIN


# -- progress ---------------------------------------------------------------------------------------------------------------

def show_progress(messages, out=None, aux=None):
    """Draw docker's progress stream: on a terminal one line for each id, rewritten in place with a bar; elsewhere plain lines,
    without the steps in between. `aux` is called with what the daemon reports for programs. A message with an error raises it."""
    out = out or sys.stdout
    lines = {} if out.isatty() else None
    for message in messages:
        if message.get("error"):
            detail = message.get("errorDetail") or {}
            error = Error(detail.get("message") or message["error"])
            error.code = detail.get("code") or 1  # a build ends with the exit code of what failed
            raise error
        if "aux" in message:
            if aux:
                aux(message["aux"])
        elif "stream" in message:
            out.write(message["stream"])  # output of a build's containers, as raw as they wrote it
        elif "status" in message:
            _show_status(message, out, lines)
        out.flush()


def _show_status(message, out, lines):
    ident, detail = message.get("id"), message.get("progressDetail") or {}
    text = printable(("%s: " % ident if ident else "") + message["status"])
    moving = detail.get("current") is not None or bool(message.get("progress"))
    if lines is None:
        if not moving:
            out.write(text + "\n")
        return
    if moving:
        text += " " + _bar(detail, len(text), message.get("progress"))
    if not ident:
        out.write(text + "\n")
        lines.clear()  # what stands above is history now
        return
    if ident not in lines:
        lines[ident] = len(lines)
        out.write("\n")
    up = len(lines) - lines[ident]
    out.write("\x1b[%dA\r\x1b[2K%s\x1b[%dB\r" % (up, text, up))


def _bar(detail, used, ready_made):
    """`[=====>     ]  1.5MB/3MB`, as wide as the line has room for; an old daemon sends no figures but a finished bar."""
    current, total = detail.get("current"), detail.get("total")
    if current is None:
        return printable(ready_made)
    if not total:
        return format_size(current)
    amounts = " %8s/%s" % (format_size(current), format_size(total))
    columns = 80
    with contextlib.suppress(OSError):
        columns = os.get_terminal_size(1).columns
    width = max(min(50, columns - used - len(amounts) - 4), 1)
    done = min(width * current // total, width)
    return "[%s%s%s]%s" % ("=" * done, ">" * (done < width), " " * (width - done - 1), amounts)


########################################################################
# 18. Commands
########################################################################
# The command line: one function a command, its options as text beside it in the layout of its own help. That text is the only
# description of an option: it feeds the parser (argparse, built for the one command that was called), --help and the completion.
# The idea to know: flags are first brought into one form, `--name=value`, by the rules of both times (Go's of 2013, `-notrunc
# -e=X`, and today's, `-itp80:80 --env X`); what they mean to the daemon stands in tables. What is printed has docker's columns of
# today.

# -- how options are written ------------------------------------------------------------------------------------------------

PROGRAM = "pydock"
_STREAMS = ("stdin", "stdout", "stderr")


class CommandError(Error):
    """Ends the command: the message, as it is, on stderr, and the exit code."""

    def __init__(self, message, code=1):
        super().__init__(message)
        self.code = code


def _bool(text):
    if text.lower() in ("1", "t", "true"):
        return True
    if text.lower() in ("0", "f", "false"):
        return False
    raise BadRequest('strconv.ParseBool: parsing "%s": invalid syntax' % text)


def _int(text):
    if not re.fullmatch(r"[-+]?[0-9]+", text):
        raise BadRequest('strconv.ParseInt: parsing "%s": invalid syntax' % text)
    return int(text)


def _bytes(text):
    return -1 if text == "-1" else parse_size(text)


def _decimal(text):
    """A number of CPUs in billionths."""
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", text):
        raise BadRequest("failed to parse %s as a rational number" % text)
    return int(float(text) * 1e9 + 0.5)


def _pair(text):
    """`a=b` as (a, b); without the sign b is empty."""
    name, _, value = text.partition("=")
    return name, value


def _env(text):
    """`A=b`; a bare `A` has the value that it has here, and without one takes A out of the image's environment."""
    if not text or text.startswith("="):
        raise BadRequest("invalid environment variable: %s" % text)
    return "%s=%s" % (text, os.environ[text]) if "=" not in text and text in os.environ else text


def _filter(text):
    name, equals, value = text.partition("=")
    if not equals:
        raise BadRequest("bad format of filter (expected name=value)")
    return name.strip().lower(), value.strip()


def _stream(text):
    if text.lower() in _STREAMS:
        return text.lower()
    return "all" if _bool(text) else "none"  # 2013: -a as a switch


def _link(text):
    name, _, alias = text.partition(":")
    if not name or ":" in alias:
        raise BadRequest("bad format for links: %s" % text)
    return "%s:%s" % (name, alias or name.rpartition("/")[2])


def _host_entry(text):
    name, _, address = text.partition("=" if "=" in text.partition(":")[0] else ":")
    if not name or not address:
        raise BadRequest('bad format for add-host: "%s"' % text)
    return "%s:%s" % (name, address.strip("[]"))


def _ulimit(text):
    match = re.fullmatch(r"(\w+)=(-?\d+)(?::(-?\d+))?", text)
    if not match:
        raise BadRequest("invalid ulimit argument: %s" % text)
    name, soft, hard = match.groups()
    return {"Name": name, "Soft": int(soft), "Hard": int(soft if hard is None else hard)}


def _device(text):
    """`/dev/x[:/dev/y][:rwm]`"""
    parts = text.split(":")
    mode = parts.pop() if len(parts) > 1 and re.fullmatch("[rwm]+", parts[-1]) else "rwm"
    if not parts[0].startswith("/") or len(parts) > 2:
        raise BadRequest("invalid device specification: %s" % text)
    return {"PathOnHost": parts[0], "PathInContainer": parts[-1], "CgroupPermissions": mode}


def _throttle(parse, field):
    def convert(text):
        path, colon, value = text.rpartition(":")
        if not colon or not path.startswith("/dev/"):
            raise BadRequest("bad format: %s" % text)
        return {"Path": path, field: parse(value)}
    return convert


def _csv(text):
    import csv
    return next(csv.reader([text]))


# --mount's keys: (field of the mount, field in it, what the value is)
_MOUNT_KEYS = {
    "type": ("Type", None, str), "source": ("Source", None, str), "target": ("Target", None, str),
    "readonly": ("ReadOnly", None, _bool), "consistency": ("Consistency", None, str),
    "bind-propagation": ("BindOptions", "Propagation", str), "bind-nonrecursive": ("BindOptions", "NonRecursive", _bool),
    "bind-create-src": ("BindOptions", "CreateMountpoint", _bool), "volume-subpath": ("VolumeOptions", "Subpath", str),
    "volume-nocopy": ("VolumeOptions", "NoCopy", _bool), "volume-label": ("VolumeOptions", "Labels", _pair),
    "volume-driver": ("VolumeOptions", "Name", str), "volume-opt": ("VolumeOptions", "Options", _pair),
    "tmpfs-size": ("TmpfsOptions", "SizeBytes", parse_size), "tmpfs-mode": ("TmpfsOptions", "Mode", lambda text: int(text, 8)),
}
_MOUNT_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}


def parse_mount(text):
    """`type=bind,src=/a,dst=/b,readonly` as the API's Mount."""
    mount = {"Type": "volume"}
    for part in _csv(text):
        key, equals, value = part.partition("=")
        key = _MOUNT_ALIASES.get(key, key)
        if not equals and key not in ("readonly", "volume-nocopy", "bind-nonrecursive"):
            raise BadRequest("invalid field '%s' must be a key=value pair" % part)
        if key not in _MOUNT_KEYS:
            raise BadRequest("unexpected key '%s' in '%s'" % (key, part))
        field, inner, convert = _MOUNT_KEYS[key]
        try:
            value = convert(value if equals else "true")
        except ValueError:
            raise BadRequest("invalid value for %s: %s" % (key, value))
        if inner is None:
            mount[field] = value
            continue
        options = mount.setdefault(field, {})
        if inner in ("Name", "Options"):
            options = options.setdefault("DriverConfig", {})
        if convert is _pair:
            options.setdefault(inner, {}).update([value])
        else:
            options[inner] = value
    if not mount.get("Target"):
        raise BadRequest("target is required")
    if mount["Type"] == "bind" and mount.get("Source", "").startswith("."):
        mount["Source"] = os.path.abspath(mount["Source"])
    return mount


# --network's keys: (field of the API's EndpointSettings, field in it, what the value is)
_NETWORK_KEYS = {
    "alias": ("Aliases", None, list), "ip": ("IPAMConfig", "IPv4Address", str), "ip6": ("IPAMConfig", "IPv6Address", str),
    "link-local-ip": ("IPAMConfig", "LinkLocalIPs", list), "mac-address": ("MacAddress", None, str),
    "driver-opt": ("DriverOpts", None, _pair), "gw-priority": ("GwPriority", None, _int)}


def parse_network(text):
    """`NAME` or `name=NAME,alias=A,ip=I` as (name, the API's EndpointSettings)."""
    if "=" not in text:
        return text, {}
    name, endpoint = None, {}
    for part in _csv(text):
        key, _, value = part.partition("=")
        if key == "name":
            name = value
        elif key in _NETWORK_KEYS:
            set_endpoint(endpoint, key, value)
        else:
            raise BadRequest("invalid field key %s" % key)
    if not name:
        raise BadRequest("network name cannot be empty")
    return name, endpoint


def set_endpoint(endpoint, key, value):
    field, inner, convert = _NETWORK_KEYS[key]
    place, field = (endpoint.setdefault(field, {}), inner) if inner else (endpoint, field)
    if convert is list:
        place.setdefault(field, []).append(value)
    elif convert is _pair:
        place.setdefault(field, {}).update([_pair(value)])
    else:
        place[field] = convert(value)


# An option's word for its value: (what turns the text into the value, whether the option may be given several times)
_TYPES = {
    None: (_bool, False), "string": (str, False), "int": (_int, False), "bytes": (_bytes, False), "decimal": (_decimal, False),
    "duration": (parse_duration, False), "list": (str, True), "map": (_pair, True), "env": (_env, True),
    "filter": (_filter, True), "stream": (_stream, True), "link": (_link, True), "host": (_host_entry, True),
    "ulimit": (_ulimit, True), "device": (_device, True), "weight": (_throttle(_int, "Weight"), True),
    "rate": (_throttle(parse_size, "Rate"), True), "iops": (_throttle(_int, "Rate"), True), "mount": (parse_mount, True),
    "network": (parse_network, True),
}
_OPTION = r"(?:-(\w), )?--([\w-]+)(?: ([a-z]+))?(?:=(\S+))?(?: = ([\w-]+)|\s+(.*))?"


class Option:
    """One line of an options text: `-m, --memory bytes   What it does`. `=value` after the name is the default, `= name` makes
    the line another spelling of that option; an option without help is not shown."""

    def __init__(self, line):
        self.short, self.name, self.type, self.default, self.same_as, self.help = re.fullmatch(_OPTION, line.strip()).groups()
        self.convert, self.many = _TYPES[self.type]

    @property
    def label(self):
        return "-%s, --%s" % (self.short, self.name) if self.short else "--%s" % self.name


def read_options(text):
    return [Option(line) for line in text.splitlines() if line.strip()]


class Command:
    """A command: names (the first is its own), the usage of its arguments, one line of help, options, function(client, args,
    *words)."""

    def __init__(self, names, usage, help, options, function, interspersed=True):
        self.names, self.usage, self.help, self.options_text = names, usage, help, options
        self.function, self.interspersed = function, interspersed
        words = [word for word in usage.split("\n")[0].split() if word != "[OPTIONS]"]
        self.least = sum(not word.startswith("[") for word in words)
        self.most = None if any("..." in word for word in words) else len(words)

    @property
    def options(self):
        return read_options(self.options_text)


COMMANDS = {}  # "run", "container run" -> Command
GROUPS = {"container": "Manage containers", "image": "Manage images", "network": "Manage networks",
          "system": "Look at and tidy up the daemon", "volume": "Manage volumes"}
GLOBAL_OPTIONS = """
    --config string           Folder of the client's config.json, shared with docker
-c, --context string
-D, --debug                   Show where an error comes from
-H, --host list               Address of the daemon: unix:///PATH or tcp://HOST:PORT
-l, --log-level string
    --tls                     Use TLS
    --tlscacert string        Trust only certificates that this CA has signed
    --tlscert string          Our certificate
    --tlskey string           The key of our certificate
    --tlsverify               Use TLS and check who the daemon is
-v, --version                 Print the version
"""


def command(names, usage, help, options="", interspersed=True):
    """Register a function as a command. names: `ps, container ls, container list`; the usage tells how many arguments it
    takes."""
    def register(function):
        names_ = names.split(", ")
        new = Command(names_, usage, help, options, function, interspersed)
        COMMANDS.update((name, new) for name in names_)
        return function
    return register


# -- from words to arguments ------------------------------------------------------------------------------------------------

def normalize(options, words, interspersed=True):
    """Bring flags of both times into one form: (["--name=value", ...], the other words); (["--help"], []) when that is asked for.

    `-xyz` is the long flag xyz if there is one, else the short flags x, y and z; the last of them may have its value behind it. A
    switch takes a value only after `=`. `--` ends the flags, and so does the first other word where they are not interspersed."""
    longs, shorts = {option.name: option for option in options}, {option.short: option for option in options if option.short}
    flags, others, words = [], [], list(words)[::-1]
    while words and flags[-1:] != ["--help"]:
        word = words.pop()
        if word in ("--", "-") or word[:1] != "-":
            others += [word] * (word != "--")
            if word == "--" or not interspersed:
                break
            continue
        name, equals, value = word.lstrip("-").partition("=")
        if name in longs and len(name) > 1:
            flags.append(_flag(longs[name], value if equals else None, words, "--" + name))
        elif name == "help":
            flags.append("--help")
        elif word.startswith("--"):
            raise BadRequest("unknown flag: --%s" % name)
        else:
            flags += _cluster(shorts, word, words)
    return (["--help"], []) if flags[-1:] == ["--help"] else (flags, others + words[::-1])


def _flag(option, value, words, asked):
    """One flag in its form; a value that it needs and was not given is the next of the words (last first)."""
    if value is None:
        is_switch = option.type is None or option.type == "stream" and not (words and words[-1].lower() in _STREAMS)
        if not is_switch and not words:
            raise BadRequest("flag needs an argument: %s" % asked)
        value = "true" if is_switch else words.pop()
    return "--%s=%s" % (option.same_as or option.name, value)


def _cluster(shorts, word, words):
    """Short flags in one word, the last of them perhaps with its value."""
    flags = []
    for at, letter in enumerate(word[1:], 2):
        if letter not in shorts:
            if letter == "h":
                return ["--help"]
            raise BadRequest("unknown shorthand flag: '%s' in %s" % (letter, word))
        option, rest = shorts[letter], word[at:]
        has_value = rest.startswith("=") or rest and option.type is not None
        value = (rest[1:] if rest.startswith("=") else rest) if has_value else None
        flags.append(_flag(option, value, words, "'%s' in %s" % (letter, word)))
        if has_value:
            break
    return flags


def parse_flags(options, flags):
    """The namespace of normalized flags: dashes in names become underscores; what was not given is None, False, [] or its
    default."""
    import argparse
    # With a width given, argparse does not import shutil to ask the terminal.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, usage="",
                                     formatter_class=functools.partial(argparse.HelpFormatter, width=80))
    result, given = argparse.Namespace(), {flag[2:].partition("=")[0] for flag in flags}
    for option in options:
        if option.same_as:
            continue
        default = [] if option.many else None if option.type else False
        default = option.convert(option.default) if option.default else default
        setattr(result, option.name.replace("-", "_"), default)
        if option.name in given:  # run has a hundred options: argparse would take 4 ms for all of them
            parser.add_argument("--" + option.name, type=functools.partial(_convert, option), default=default,
                                action="append" if option.many else "store")
    return parser.parse_args(flags, result)


def _convert(option, text):
    try:
        return option.convert(text)
    except BadRequest as error:
        raise BadRequest('invalid argument "%s" for "%s" flag: %s' % (text, option.label, error))


def find_command(words):
    """The command that the words name, as (name, Command, remaining words)."""
    for count in (2, 1):
        name = " ".join(words[:count])
        if name in COMMANDS and len(words) >= count:
            return name, COMMANDS[name], words[count:]
    raise CommandError("%s: unknown command: %s %s\n\nRun '%s --help' for more information" % (
        PROGRAM, PROGRAM, " ".join(words[:2 if words[0] in GROUPS else 1]), " ".join([PROGRAM] + words[:words[0] in GROUPS])))


def usage_error(name, found, message, code):
    return CommandError("%s\n\nUsage:  %s %s %s\n\nRun '%s %s --help' for more information" % (
        message, PROGRAM, name, found.usage.split("\n")[0], PROGRAM, name), code)


def check_count(name, found, count):
    """Refuse too few or too many arguments, in docker's words."""
    least, most = found.least, found.most
    if least <= count and (most is None or count <= most):
        return
    if most is None:
        text = "requires at least %d" % least
    elif least == most:
        text = "requires %d" % most if most else "accepts no"
    else:
        text = "requires at least %d and at most %d" % (least, most) if least else "requires at most %d" % most
    text += " argument" if text.endswith(" 1") else " arguments"
    raise usage_error(name, found, "%s: '%s %s' %s" % (PROGRAM, PROGRAM, name, text), 1)


# -- help -------------------------------------------------------------------------------------------------------------------

def say(text=""):
    """Print a line; what came from outside cannot control the terminal with it."""
    sys.stdout.write(printable(text) + "\n")


def complain(text):
    sys.stdout.flush()
    sys.stderr.write(printable(text) + "\n")


def _columns(pairs, gap=3):
    """Lines of two columns, the second wrapped to the width of the terminal."""
    import textwrap
    columns = 80
    with contextlib.suppress(OSError):
        columns = os.get_terminal_size(1).columns
    width = max([len(left) for left, _ in pairs] or [0]) + gap
    for left, right in pairs:
        lines = textwrap.wrap(right, max(columns - width, 24)) or [""]
        yield (left.ljust(width) + lines[0]).rstrip()
        for line in lines[1:]:
            yield " " * width + line


def _option_columns(options):
    for option in sorted(options, key=lambda option: option.name):
        if option.help:
            left = "  %s--%s %s" % ("-%s, " % option.short if option.short else "    ", option.name, option.type or "")
            default = json.dumps(option.default) if option.type == "string" else option.default
            yield left.rstrip(), option.help + (" (default %s)" % default if option.default else "")


def command_help(name, found):
    """The help of one command, in docker's layout."""
    usages = found.usage.split("\n")
    lines = ["Usage:  %s %s %s" % (PROGRAM, name, usages[0])] + ["\t%s %s %s" % (PROGRAM, name, usage) for usage in usages[1:]]
    lines += ["", found.help]
    if len(found.names) > 1:
        lines += ["", "Aliases:", "  " + ", ".join("%s %s" % (PROGRAM, alias) for alias in found.names)]
    options = list(_option_columns(found.options))
    if options:
        lines += ["", "Options:"] + list(_columns(options))
    return "\n".join(lines)


def group_help(group):
    members = sorted((name.split()[1], found.help) for name, found in COMMANDS.items()
                     if name.startswith(group + " ") and next(n for n in found.names if n.startswith(group + " ")) == name)
    return "\n".join(["Usage:  %s %s COMMAND" % (PROGRAM, group), "", GROUPS[group], "", "Commands:"]
                     + list(_columns([("  " + name, help) for name, help in members]))
                     + ["", "Run '%s %s COMMAND --help' for more information on a command." % (PROGRAM, group)])


_COMMON = "run exec ps build pull push images login logout search version info".split()


def main_help():
    others = sorted(name for name, found in COMMANDS.items() if found.names[0] == name and " " not in name and found.help)
    sections = (("Common Commands", _COMMON), ("Management Commands", sorted(GROUPS)),
                ("Commands", [name for name in others if name not in _COMMON]))
    lines = ["Usage:  %s [OPTIONS] COMMAND" % PROGRAM, "", "Containers in one file: -d makes it the daemon, a command its client"]
    for title, names in sections:
        lines += ["", title + ":"]
        lines += _columns([("  " + name.ljust(10), GROUPS.get(name) or COMMANDS[name].help) for name in names], 2)
    return "\n".join(lines + ["", "Global Options:"] + list(_columns(list(_option_columns(read_options(GLOBAL_OPTIONS)))))
                     + ["", "Run '%s COMMAND --help' for more information on a command." % PROGRAM])


@command("help", "[COMMAND...]", "")
def cmd_help(client, args, *words):
    if not words:
        say(main_help())
    elif words[0] in GROUPS and len(words) == 1:
        say(group_help(words[0]))
    else:
        try:
            name, found, _ = find_command(list(words))
        except CommandError:
            raise CommandError("unknown help topic: %s" % " ".join(words))
        say(command_help(name, found))


@command("completion", "bash|words [WORD...]", "")
def cmd_completion(client, args, kind, *words):
    """`eval "$(pydock completion bash)"` makes bash ask `pydock completion words ...` what can follow the words typed so far."""
    if kind == "bash":
        say("_%s() { COMPREPLY=($(compgen -W \"$(\"$1\" completion words \"${COMP_WORDS[@]:1:COMP_CWORD-1}\")\" -- \"$2\")); }\n"
            "complete -o default -F _%s %s" % (PROGRAM, PROGRAM, PROGRAM))
        return
    name = max((name for name in COMMANDS if list(words)[:len(name.split())] == name.split()), key=len, default=None)
    if name:
        say("\n".join("--" + option.name for option in COMMANDS[name].options if option.help))
    else:
        start = "".join(word + " " for word in words)
        say("\n".join(sorted({name[len(start):].split()[0] for name in COMMANDS if name.startswith(start)})))


# -- tables of output -------------------------------------------------------------------------------------------------------

def tabulate(lines, least=10, gap=3):
    """Lines with tabs between their cells, as columns: each as wide as its widest cell and a gap, the last one free."""
    rows = [line.split("\t") for line in lines]
    widths = {}
    for row in rows:
        for number, cell in enumerate(row[:-1]):
            widths[number] = max(widths.get(number, least), len(cell) + gap)
    return ["".join(cell.ljust(widths[number]) for number, cell in enumerate(row[:-1])) + row[-1] for row in rows]


def read_template(text, message="failed to parse template: %s"):
    try:
        return Template(text.replace("\\t", "\t").replace("\\n", "\n"))
    except TemplateError as error:
        raise CommandError(message % error)


def _columns_of(names):
    """The template of a table with these columns."""
    return "\t".join("{{.%s}}" % name for name in names.split())


def show_rows(fields, items, form, default, **options):
    """Print a list. form: what --format says: nothing or `table` (the default columns), `json`, `table TEMPLATE`, or a template
    for each object; default: the columns' template."""
    form = form or "table"
    rows = [Row(fields, item, **options) for item in items]
    if form == "json":
        for row in rows:
            say(to_json(row))
        return
    is_table = form.startswith("table")
    template = read_template((form[5:].strip() or default) if is_table else form)
    titles = {name: (title if title else lambda key: key) for name, (title, _) in fields.items()}
    try:
        lines = [template.render(row) for row in ([titles] if is_table else []) + rows]
    except Error as error:
        raise CommandError("failed to execute template: %s" % error)
    for line in tabulate(lines) if is_table else lines:
        say(line.rstrip("\n") if is_table else line)


def show_objects(objects, form):
    """Print what inspect found: indented JSON, `json` in one line, or a template for each."""
    if form in (None, "", "json"):
        say(json.dumps(objects, indent=4, ensure_ascii=False) if not form else to_json(objects))
        return
    template = read_template(form, "template parsing error: %s")
    for item in objects:
        try:
            say(template.render(item))
        except Error as error:
            raise CommandError("template parsing error: %s" % error)


def show_object(value, form):
    """--format of info and version."""
    say(to_json(value) if form == "json" else read_template(form, "template parsing error: %s").render(value))


def short_size(size):
    """Bytes with three digits, as docker's lists have them."""
    return "%.3g%s" % _scaled(size, 1000.0, ("B", "kB", "MB", "GB", "TB", "PB", "EB"))


def short_id(ident):
    return (ident or "").partition(":")[2][:12] if (ident or "").startswith("sha256:") else (ident or "")[:12]


def age(seconds):
    """Unix seconds as `5 minutes ago`."""
    return format_age(max(time.time() - seconds, 0)) + " ago" if seconds else "N/A"


def local_time(seconds):
    """Unix seconds as Go prints a local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z %Z", time.localtime(seconds))


def format_ports(ports):
    """docker's PORTS column: what is not published, or published at its own number, as ranges; other publications one by one."""
    groups, ranges, mappings = {}, [], []
    for port in sorted(ports or (), key=lambda p: (p["PrivatePort"], p.get("IP", ""), p.get("PublicPort", 0), p["Type"])):
        address, private, public, kind = port.get("IP", ""), port["PrivatePort"], port.get("PublicPort", 0), port["Type"]
        shown = "[%s]" % address if ":" in address else address
        if address and public != private:
            mappings.append("%s:%d->%d/%s" % (shown, public, private, kind))
            continue
        last = groups.get((shown, kind))
        if last and last[1] == private - 1:
            last[1] = private
            continue
        if last:
            ranges.append(((shown, kind), last))
        groups[shown, kind] = [private, private]
    texts = []
    for (address, kind), (first, last) in ranges + list(groups.items()):
        span = "%d-%d" % (first, last) if last > first else "%d" % first
        texts.append("%s:%s->%s/%s" % (address, span, span, kind) if address else "%s/%s" % (span, kind))
    return ", ".join(texts + mappings)


def _labels(labels):
    return ",".join("%s=%s" % pair for pair in (labels or {}).items())


def _label(item):
    return lambda name: (item.get("Labels") or {}).get(name, "")


def _go_quote(text):
    return json.dumps(text, ensure_ascii=False)


def filters(args, **more):
    """--filter as the API has it: {name: [value, ...]}."""
    result = {}
    for name, value in args.filter + [pair for pair in more.items() if pair[1]]:
        result.setdefault(name, []).append(value)
    return result


def for_each(names, send, done=lambda name, response: say(name)):
    """Ask the daemon about all names at once and report in their order: the name, or what is wrong with it. Returns the exit
    code."""
    code = 0
    for start in range(0, len(names), 50):
        batch = [(name, send(name)) for name in names[start:start + 50]]
        for name, response in batch:
            try:
                response.start()
                done(name, response)
                response.read_all()
            except Error as error:
                complain(str(error))
                code = 1
    return code


_CONFIRM = "Are you sure you want to continue? [y/N] "


def confirmed(args, warning):
    """Whether the user agrees to what a prune removes; --force does."""
    if args.force:
        return True
    sys.stdout.write("WARNING! %s\n%s" % (warning, _CONFIRM))
    sys.stdout.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    say("Total reclaimed space: 0B")
    return False


# -- run and create: from options to the API's JSON -------------------------------------------------------------------------

_RESOURCE_OPTIONS = """
    --blkio-weight int             Share of block I/O, 10 to 1000
    --cpu-period int               Microseconds in which --cpu-quota counts
    --cpu-quota int                Microseconds of CPU in each period
    --cpu-rt-period int            Microseconds in which --cpu-rt-runtime counts
    --cpu-rt-runtime int           Microseconds of real-time CPU in each period
-c, --cpu-shares int               Share of CPU, relative to others
    --cpus decimal                 Number of CPUs
    --cpuset-cpus string           CPUs to run on (0-3, 0,1)
    --cpuset-mems string           Memory nodes to use (0-3, 0,1)
-m, --memory bytes                 Most memory
    --memory-reservation bytes     Memory to be left with when the host is short of it
    --memory-swap bytes            Most memory and swap together, -1: any amount of swap
    --pids-limit int               Most processes, -1: any number
"""
_CREATE_OPTIONS = _RESOURCE_OPTIONS + """
    --add-host host                Add a line to /etc/hosts (NAME:ADDRESS)
    --annotation map               Add an annotation for the runtime
-a, --attach stream                Attach to STDIN, STDOUT or STDERR
    --blkio-weight-device weight   Share of block I/O of one device (DEVICE:WEIGHT)
    --cap-add list                 Give a capability
    --cap-drop list                Take a capability away
    --cgroup-parent string         Cgroup to be placed in
    --cgroupns string              Cgroup namespace: host or private
    --cidfile string               Write the container's id to this file
    --device device                Give a device of the host (DEVICE[:PATH][:rwm])
    --device-cgroup-rule list      Allow devices by a cgroup rule
    --device-read-bps rate         Bytes a second to read from a device at most (DEVICE:RATE)
    --device-read-iops iops        Reads a second from a device at most (DEVICE:RATE)
    --device-write-bps rate        Bytes a second to write to a device at most (DEVICE:RATE)
    --device-write-iops iops       Writes a second to a device at most (DEVICE:RATE)
    --disable-content-trust=true
    --dns list                     DNS servers
    --dns-option list              Options of the resolver
    --dns-opt list = dns-option
    --dns-search list              DNS search domains
    --domainname string            NIS domain name
    --entrypoint string            Program to run instead of the image's entrypoint
-e, --env env                      Set an environment variable (NAME=VALUE, or NAME to pass it on)
    --env-file list                Read environment variables from a file
    --expose list                  Say that a port, or a range, is served
    --group-add list               Further groups of the process
    --health-cmd string            Command that finds out whether all is well
    --health-interval duration     Time between two checks
    --health-retries int           Failures in a row that make it unhealthy
    --health-start-interval duration   Time between two checks while it starts
    --health-start-period duration     Time to start up, in which failures do not count
    --health-timeout duration      Longest time for one check
-h, --hostname string              Host name
    --init                         Run an init that passes signals on and reaps processes
-i, --interactive                  Keep stdin open
    --ip string                    IPv4 address
    --ip6 string                   IPv6 address
    --ipc string                   IPC namespace: private, shareable, host, none, container:NAME
    --isolation string
    --kernel-memory bytes
-l, --label map                    Set a label (NAME=VALUE)
    --label-file list              Read labels from a file
    --link link                    Make another container known by name (NAME[:ALIAS])
    --link-local-ip list           Link-local addresses
    --log-driver string            How output is logged
    --log-opt map                  Option of the log driver
    --mac-address string           MAC address
    --memory-swappiness int        Readiness to swap, 0 to 100
    --mount mount                  Mount a file system (type=bind,src=DIR,dst=DIR,...)
    --name string                  Name of the container
    --network network              Network: bridge, host, none, container:NAME, or the name of one
    --net network = network
    --network-alias list           Further name on the network
    --net-alias list = network-alias
    --no-healthcheck               Do not check its health, whatever the image says
    --oom-kill-disable             Do not kill it when memory is out
    --oom-score-adj int            How much rather to kill it when memory is out (-1000 to 1000)
    --pid string                   PID namespace: host or container:NAME
    --platform string              Platform of the image
    --privileged                   Give it all rights on the host
-p, --publish list                 Publish ports on the host ([[ADDRESS:][HOST PORT]:]PORT[/udp])
-P, --publish-all                  Publish all exposed ports on free ports of the host
    --pull string=missing          Pull the image before: always, missing, never
    --read-only                    No writes to the root file system
    --restart string               When to start it again: no, on-failure[:TIMES], always, unless-stopped
    --rm                           Remove it, and its unnamed volumes, when it has ended
    --runtime string               Runtime to use
    --security-opt list            Security options
    --shm-size bytes               Size of /dev/shm
    --stop-signal string           Signal that stops it
    --stop-timeout int             Seconds that it has to stop
    --storage-opt map              Option of the storage driver
    --sysctl map                   Kernel parameter of its namespaces
    --tmpfs list                   Mount a tmpfs (DIR[:OPTIONS])
-t, --tty                          Give it a terminal
    --ulimit ulimit                Limit (NAME=SOFT[:HARD])
-u, --user string                  User (NAME|UID[:GROUP|GID])
    --userns string                User namespace: host
    --uts string                   UTS namespace: host
-v, --volume list                  Mount a folder of the host or a volume ([SOURCE:]DIR[:OPTIONS])
-b, --bind list = volume
    --volume-driver string         Driver of its volumes
    --volumes-from list            Mount the volumes of another container
-w, --workdir string               Working directory
"""

# Fields of the API that are options as they stand.
_CONFIG_FIELDS = {"Hostname": "hostname", "Domainname": "domainname", "User": "user", "WorkingDir": "workdir",
                  "StopSignal": "stop_signal", "StopTimeout": "stop_timeout", "Tty": "tty", "OpenStdin": "interactive"}
_RESOURCE_FIELDS = {
    "BlkioWeight": "blkio_weight", "CpuPeriod": "cpu_period", "CpuQuota": "cpu_quota", "CpuRealtimePeriod": "cpu_rt_period",
    "CpuRealtimeRuntime": "cpu_rt_runtime", "CpuShares": "cpu_shares", "NanoCpus": "cpus", "CpusetCpus": "cpuset_cpus",
    "CpusetMems": "cpuset_mems", "Memory": "memory", "MemoryReservation": "memory_reservation", "MemorySwap": "memory_swap",
    "PidsLimit": "pids_limit"}
_HOST_FIELDS = {
    "Annotations": "annotation", "AutoRemove": "rm", "BlkioDeviceReadBps": "device_read_bps",
    "BlkioDeviceReadIOps": "device_read_iops", "BlkioDeviceWriteBps": "device_write_bps",
    "BlkioDeviceWriteIOps": "device_write_iops", "BlkioWeightDevice": "blkio_weight_device", "CapAdd": "cap_add",
    "CapDrop": "cap_drop", "CgroupParent": "cgroup_parent", "CgroupnsMode": "cgroupns", "ContainerIDFile": "cidfile",
    "DeviceCgroupRules": "device_cgroup_rule", "Devices": "device", "Dns": "dns", "DnsOptions": "dns_option",
    "DnsSearch": "dns_search", "ExtraHosts": "add_host", "GroupAdd": "group_add", "Init": "init", "IpcMode": "ipc",
    "Isolation": "isolation", "KernelMemory": "kernel_memory", "Links": "link", "MemorySwappiness": "memory_swappiness",
    "Mounts": "mount", "OomKillDisable": "oom_kill_disable", "OomScoreAdj": "oom_score_adj", "PidMode": "pid",
    "Privileged": "privileged", "PublishAllPorts": "publish_all", "ReadonlyRootfs": "read_only", "Runtime": "runtime",
    "ShmSize": "shm_size", "StorageOpt": "storage_opt", "Sysctls": "sysctl", "UTSMode": "uts", "Ulimits": "ulimit",
    "UsernsMode": "userns", "VolumeDriver": "volume_driver", "VolumesFrom": "volumes_from"}
_HEALTH_FIELDS = {"Interval": "health_interval", "Timeout": "health_timeout", "StartPeriod": "health_start_period",
                  "StartInterval": "health_start_interval", "Retries": "health_retries"}


def _copied(args, fields):
    """The fields whose option was given."""
    result = {}
    for field, name in fields.items():
        value = getattr(args, name)
        if not (value is None or value is False or value == "" or value == []):  # a zero is a value
            result[field] = dict(value) if isinstance(value, list) and isinstance(value[0], tuple) else value
    return result


def _port_range(text, what):
    first, dash, last = text.partition("-")
    if not first.isdigit() or dash and not last.isdigit() or int(first) > 65535 or int(last or first) > 65535 \
            or int(last or first) < int(first):
        raise BadRequest("invalid %s: %s" % (what, text))
    return list(range(int(first), int(last or first) + 1))


def parse_publish(text):
    """`[[ADDRESS:][HOST PORTS]:]PORTS[/PROTOCOL]` as a list of (`80/tcp`, address, host port as text). Ranges are as long on both
    sides, or the host's is one to choose a port from."""
    rest, slash, protocol = text.partition("/")
    match = re.fullmatch(r"(?:(?:(\[[^\]]*\]|[^:]*):)?([^:]*):)?([^:]*)", rest)
    if not match or not match.group(3):
        raise BadRequest("No port specified: %s<empty>" % text if match else "invalid port specification: %s" % text)
    if (protocol if slash else "tcp").lower() not in ("tcp", "udp", "sctp"):
        raise BadRequest("invalid proto: %s" % protocol)
    address, host, inner = (match.group(1) or "").strip("[]"), match.group(2), match.group(3)
    if address:
        _check_address(address)
    ports = _port_range(inner, "containerPort")
    hosts = _port_range(host, "hostPort") if host else []
    if hosts and len(hosts) != len(ports) and len(ports) != 1:
        raise BadRequest("invalid ranges specified for container and host Ports: %s and %s" % (inner, host))
    names = [host] if len(ports) == 1 and hosts else [str(port) for port in hosts] or [""] * len(ports)
    return [("%d/%s" % (port, (protocol or "tcp").lower()), address, name) for port, name in zip(ports, names)]


def _check_address(text):
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, text)
            return
    raise BadRequest("invalid IP address: %s" % text)


def _ports(args):
    """(exposed ports, bindings) of -p and --expose, as the API has them."""
    exposed, bindings = {}, {}
    for text in args.publish:
        for port, address, host in parse_publish(text):
            exposed[port] = {}
            bindings.setdefault(port, []).append({"HostIp": address, "HostPort": host})
    for text in args.expose:
        ports, _, protocol = text.partition("/")
        for port in _port_range(ports, "range format for --expose"):
            exposed["%d/%s" % (port, (protocol or "tcp").lower())] = {}
    return exposed, bindings


def read_lines(path):
    """The lines of an --env-file or --label-file that are no comments."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as f:
            lines = [line.rstrip("\r\n").lstrip() for line in f]
    except OSError as error:
        raise BadRequest("open %s: %s" % (path, error.strerror.lower()))
    return [line for line in lines if line and not line.startswith("#")]


def _env_file_line(line):
    name = line.partition("=")[0]
    if not name or re.search(r"\s", name):
        raise BadRequest("poorly formatted environment: variable '%s' contains whitespaces" % name)
    return _env(line)


def _healthcheck(args):
    if args.no_healthcheck:
        return {"Test": ["NONE"]}
    health = _copied(args, _HEALTH_FIELDS)
    if args.health_cmd:
        health["Test"] = ["CMD-SHELL", args.health_cmd]
    return health


def _volumes(args):
    """(volumes without a source, binds) of -v. A source that begins with a dot is a folder here."""
    volumes, binds = {}, []
    for text in args.volume:
        source, colon, rest = text.partition(":")
        if not colon:
            volumes[source] = {}
        else:
            binds.append("%s:%s" % (os.path.abspath(source) if source.startswith(".") else source, rest))
    return volumes, binds


def _security_options(args, host):
    for option in args.security_opt:
        name, _, value = option.partition("=" if "=" in option else ":")
        if name == "systempaths" and value == "unconfined":
            host.update(MaskedPaths=[], ReadonlyPaths=[])
            continue
        if name == "seccomp" and value not in ("unconfined", "builtin"):
            try:
                option = "seccomp=" + to_json(read_json(value))  # the daemon may not see our files
            except OSError as error:
                raise BadRequest("opening seccomp profile (%s) failed: %s" % (value, os_error_text(error)))
        host.setdefault("SecurityOpt", []).append(option)


def parse_restart(text):
    name, colon, times = text.partition(":")
    if colon and not times.isdigit():
        raise BadRequest("invalid restart policy format: maximum retry count must be an integer")
    return {"Name": name or "no", "MaximumRetryCount": int(times or 0)}


def _host_config(args, bindings, binds):
    host = dict(_copied(args, _RESOURCE_FIELDS), **_copied(args, _HOST_FIELDS))
    host["NetworkMode"] = args.network[0][0] if args.network else "default"
    if bindings:
        host["PortBindings"] = bindings
    if binds:
        host["Binds"] = binds
    if args.restart:
        host["RestartPolicy"] = parse_restart(args.restart)
    if args.tmpfs:
        host["Tmpfs"] = dict(text.partition(":")[::2] for text in args.tmpfs)
    if args.log_driver or args.log_opt:
        host["LogConfig"] = {"Type": args.log_driver or "", "Config": dict(args.log_opt)}
    if args.tty and os.isatty(1):
        columns, lines = os.get_terminal_size(1)
        host["ConsoleSize"] = [lines, columns]
    _security_options(args, host)
    return host


def _networking(args):
    """EndpointsConfig: the settings of --network name=...; those of the other options go to the first network."""
    endpoints = {name: dict(endpoint) for name, endpoint in args.network}
    first = args.network[0][0] if args.network else "default"
    given = (("ip", [args.ip]), ("ip6", [args.ip6]), ("mac-address", [args.mac_address]), ("alias", args.network_alias),
             ("link-local-ip", args.link_local_ip))
    for key, values in given:
        for value in filter(None, values):
            set_endpoint(endpoints.setdefault(first, {}), key, value)
    return {name: endpoint for name, endpoint in endpoints.items() if endpoint or len(endpoints) > 1}


def container_request(args, image, words):
    """The body of POST /containers/create: the image's own settings hold where no option was given."""
    streams = set(args.attach)
    if args.rm and parse_restart(args.restart or "no")["Name"] != "no":
        raise BadRequest("conflicting options: cannot specify both --restart and --rm")
    attached = () if "none" in streams else _STREAMS if "all" in streams else streams or (
        () if getattr(args, "detach", False) else ("stdout", "stderr") + ("stdin",) * args.interactive)
    exposed, bindings = _ports(args)
    volumes, binds = _volumes(args)
    spec = dict(_copied(args, _CONFIG_FIELDS), Image=image, **{"Attach" + name.title(): name in attached for name in _STREAMS})
    spec["StdinOnce"] = args.interactive and spec["AttachStdin"]
    env = [_env_file_line(line) for path in args.env_file for line in read_lines(path)] + args.env
    labels = dict([_pair(line) for path in args.label_file for line in read_lines(path)] + args.label)
    optional = {"Env": env, "Cmd": list(words), "Labels": labels, "ExposedPorts": exposed, "Volumes": volumes,
                "Healthcheck": _healthcheck(args)}
    spec.update((name, value) for name, value in optional.items() if value)
    if args.entrypoint is not None:
        spec["Entrypoint"] = [args.entrypoint]  # an empty one: no entrypoint at all
    spec["HostConfig"] = _host_config(args, bindings, binds)
    endpoints = _networking(args)
    if endpoints:
        spec["NetworkingConfig"] = {"EndpointsConfig": endpoints}
    return spec


def create_container(client, args, spec):
    """Create it, pulling the image where it is missing; its id."""
    if args.cidfile and os.path.exists(args.cidfile):
        raise Error("container ID file found, make sure the other container isn't running or delete %s" % args.cidfile)
    create = functools.partial(client.post, "containers", "create", data=spec, name=args.name, platform=args.platform)
    if args.pull == "always":
        pull_image(client, spec["Image"], args.platform, sys.stderr)
    try:
        created = create()
    except NotFound as error:
        if args.pull == "never" or "No such image" not in str(error):
            raise
        complain("Unable to find image '%s' locally" % Reference.parse(spec["Image"]).tagged)
        pull_image(client, spec["Image"], args.platform, sys.stderr)
        created = create()
    for warning in created.get("Warnings") or ():
        complain("WARNING: %s" % warning)
    if args.cidfile:
        write_file(args.cidfile, created["Id"], 0o644, sync=False)
    return created["Id"]


# -- commands that attach ---------------------------------------------------------------------------------------------------

def detach_keys(args):
    return args.detach_keys or read_config().get("detachKeys")


def carry(client, args, path, connection, watch, tty, stdin, proxy=True):
    """Run a session with a container or exec (path: its place in the API); whether the user has detached."""
    def resize(lines, columns):
        client.post(*path, "resize", h=lines, w=columns)

    def kill(number):
        client.post(*path, "kill", signal=number)
    return Session(connection, tty, stdin, watch, resize if tty and (os.isatty(1) or os.isatty(0)) else None,
                   kill if proxy and args.sig_proxy else None, detach_keys(args)).run()


def attach(client, args, ident, tty, streams, condition, start=None):
    """Attach, wait and start, in this order, so that neither output nor exit is missed; then carry the streams. The exit code,
    None when the user has detached."""
    path, stdin = ("containers", ident), "stdin" in streams
    with SignalWatch() as watch, raw_terminal(0) if tty and stdin else contextlib.nullcontext():
        query = {name: name in streams for name in _STREAMS}
        connection = client.hijack(*path, "attach", stream=True, detachKeys=detach_keys(args), **query)
        waiting = client.request("POST", *path, "wait", condition=condition)
        if start:
            start()
        elif tty and os.isatty(1):  # a change of size makes a program that runs already draw its screen anew
            columns, lines = window_size()
            client.post(*path, "resize", h=lines + 1, w=columns + 1)
        if carry(client, args, path, connection, watch, tty, stdin):
            return None
    return exit_code(waiting.json())


def exit_code(waited):
    if (waited.get("Error") or {}).get("Message"):
        complain("Error response from daemon: %s" % waited["Error"]["Message"])
        return 125
    return waited["StatusCode"]


def require_terminal(tty, stdin):
    if tty and stdin and not os.isatty(0):
        raise CommandError("the input device is not a TTY")


def run_failure(error):
    """An error of run as docker puts it: 127 when the program is not there, 126 when it cannot be started, else 125."""
    text, code = str(error), 125
    if text.startswith("Error response from daemon"):
        code = (127 if re.search("executable file not found|no such file or directory", text)
                else 126 if re.search("permission denied|is a directory", text) else 125)
    return CommandError("%s: %s\n\nRun '%s run --help' for more information" % (PROGRAM, text, PROGRAM), code)


@command("create, container create", "[OPTIONS] IMAGE [COMMAND] [ARG...]", "Make a container without starting it",
         _CREATE_OPTIONS, interspersed=False)
def cmd_create(client, args, image, *words):
    say(create_container(client, args, container_request(args, image, words)))


@command("run, container run", "[OPTIONS] IMAGE [COMMAND] [ARG...]", "Run a command in a new container", _CREATE_OPTIONS + """
-d, --detach                       Leave it in the background and print its id
    --detach-keys string           Keys that detach from it
    --sig-proxy=true               Pass signals on to the process
-q, --quiet                        Do not show the progress of a pull
""", interspersed=False)
def cmd_run(client, args, image, *words):
    if args.detach and args.attach:
        raise CommandError("conflicting options: cannot specify both --attach and --detach")
    try:
        spec = container_request(args, image, words)
        streams = [name for name in _STREAMS if spec["Attach" + name.title()]]
        require_terminal(args.tty, "stdin" in streams)
        ident = create_container(client, args, spec)
        start = functools.partial(client.post, "containers", ident, "start", detachKeys=detach_keys(args))
        if streams:
            return attach(client, args, ident, args.tty, streams, "removed" if args.rm else "next-exit", start)
        start()
        say(ident)
    except (CommandError, Interrupted):
        raise
    except Error as error:
        raise run_failure(error)
    return 0


@command("start, container start", "[OPTIONS] CONTAINER [CONTAINER...]", "Start stopped containers", """
-a, --attach                  Attach stdout and stderr, and pass signals on
    --detach-keys string      Keys that detach from it
-i, --interactive             Attach stdin
""")
def cmd_start(client, args, *containers):
    if args.attach or args.interactive:
        if len(containers) > 1:
            raise CommandError("you cannot start and attach multiple containers at once")
        found = client.get("containers", containers[0], "json")
        config, args.sig_proxy = found["Config"], True
        streams = ("stdout", "stderr") + (("stdin",) if args.interactive and config["OpenStdin"] else ())
        condition = "removed" if found["HostConfig"].get("AutoRemove") else "next-exit"
        return attach(client, args, found["Id"], config["Tty"], streams, condition,
                      lambda: client.post("containers", found["Id"], "start", detachKeys=args.detach_keys))
    failed = [name for name in containers  # one after the other: one may need another's network
              if for_each([name], lambda name: client.send("POST", "containers", name, "start"))]
    if failed:
        complain("Error: failed to start containers: %s" % ", ".join(failed))
    return 1 if failed else 0


@command("attach, container attach", "[OPTIONS] CONTAINER", "Attach this terminal to a running container", """
    --detach-keys string   Keys that detach from it
    --no-stdin             Do not attach stdin
    --sig-proxy=true       Pass signals on to the process
""")
def cmd_attach(client, args, container):
    found = client.get("containers", container, "json")
    state, config = found["State"], found["Config"]
    for wrong, sentence in ((not state["Running"], "stopped container, start it first"),
                            (state["Paused"], "paused container, unpause it first"),
                            (state["Restarting"], "restarting container, wait until it is running")):
        if wrong:
            raise CommandError("You cannot attach to a " + sentence)
    stdin = config["OpenStdin"] and not args.no_stdin
    require_terminal(config["Tty"], stdin)
    code = attach(client, args, found["Id"], config["Tty"], ("stdout", "stderr") + ("stdin",) * stdin, None)
    if code is None:
        raise CommandError("read escape sequence")
    return code


@command("exec, container exec", "[OPTIONS] CONTAINER COMMAND [ARG...]", "Run a command in a running container", """
-d, --detach               Leave it in the background
    --detach-keys string   Keys that detach from it
-e, --env env              Set an environment variable
    --env-file list        Read environment variables from a file
-i, --interactive          Keep stdin open
    --privileged           Give it all rights on the host
-t, --tty                  Give it a terminal
-u, --user string          User (NAME|UID[:GROUP|GID])
-w, --workdir string       Working directory
""", interspersed=False)
def cmd_exec(client, args, container, *words):
    require_terminal(args.tty, args.interactive and not args.detach)
    env = [_env_file_line(line) for path in args.env_file for line in read_lines(path)] + args.env
    attached = not args.detach
    ident = client.post("containers", container, "exec", data={
        "Cmd": list(words), "Tty": args.tty, "AttachStdin": args.interactive and attached, "AttachStdout": attached,
        "AttachStderr": attached, "Env": env, "Privileged": args.privileged, "User": args.user or "",
        "WorkingDir": args.workdir or "", "DetachKeys": detach_keys(args) or ""})["Id"]
    if args.detach:
        client.post("exec", ident, "start", data={"Detach": True, "Tty": args.tty})
        return 0
    with SignalWatch() as watch, raw_terminal(0) if args.tty and args.interactive else contextlib.nullcontext():
        connection = client.hijack("exec", ident, "start", data={"Detach": False, "Tty": args.tty})
        detached = carry(client, args, ("exec", ident), connection, watch, args.tty, args.interactive, proxy=False)
    if detached:
        raise CommandError("read escape sequence")
    return client.get("exec", ident, "json")["ExitCode"]


@command("logs, container logs", "[OPTIONS] CONTAINER", "Show what a container has printed", """
    --details        Show the labels that the log driver was told to keep
-f, --follow         Go on with what it prints
    --since string   Not what is older than this (2013-01-02T13:23:37Z, or 42m)
-n, --tail string=all    Only that many lines at the end
-t, --timestamps     Show when each line was printed
    --until string   Only what is older than this
""")
def cmd_logs(client, args, container):
    tty = client.get("containers", container, "json")["Config"]["Tty"]
    response = client.request("GET", "containers", container, "logs", stdout=True, stderr=True, follow=args.follow,
                              tail=args.tail, details=args.details, timestamps=args.timestamps, since=_log_time(args.since),
                              until=_log_time(args.until))
    output = functools.partial(write_all, 1) if tty else Demultiplexer(write_all).feed
    for data in iter(response.read, b""):
        output(data)


def _log_time(text):
    return "%d.%09d" % divmod(parse_since(text), 10 ** 9) if text else None


# -- the life of a container ------------------------------------------------------------------------------------------------

def _for_containers(client, containers, action, **query):
    return for_each(containers, lambda name: client.send("POST", "containers", name, action, **query))


_STOP_OPTIONS = """
-s, --signal string   Signal to send instead of the container's own
-t, --timeout int     Seconds to wait before it is killed
    --time int = timeout
"""


@command("stop, container stop", "[OPTIONS] CONTAINER [CONTAINER...]", "Stop running containers", _STOP_OPTIONS)
def cmd_stop(client, args, *containers):
    return _for_containers(client, containers, "stop", t=args.timeout, signal=args.signal)


@command("restart, container restart", "[OPTIONS] CONTAINER [CONTAINER...]", "Stop containers and start them again",
         _STOP_OPTIONS)
def cmd_restart(client, args, *containers):
    return _for_containers(client, containers, "restart", t=args.timeout, signal=args.signal)


@command("kill, container kill", "[OPTIONS] CONTAINER [CONTAINER...]", "Kill containers, or send them a signal", """
-s, --signal string   Signal to send
""")
def cmd_kill(client, args, *containers):
    return _for_containers(client, containers, "kill", signal=args.signal)


@command("pause, container pause", "CONTAINER [CONTAINER...]", "Freeze all processes of containers")
def cmd_pause(client, args, *containers):
    return _for_containers(client, containers, "pause")


@command("unpause, container unpause", "CONTAINER [CONTAINER...]", "Let frozen containers go on")
def cmd_unpause(client, args, *containers):
    return _for_containers(client, containers, "unpause")


@command("wait, container wait", "CONTAINER [CONTAINER...]", "Wait until containers stop, then print their exit codes")
def cmd_wait(client, args, *containers):
    return for_each(containers, lambda name: client.send("POST", "containers", name, "wait"),
                    lambda name, response: say(exit_code(response.json())))


@command("rm, container rm, container remove", "[OPTIONS] CONTAINER [CONTAINER...]", "Remove containers", """
-f, --force     Also when it runs: it is killed
-l, --link      Remove the link of that name, not the container
-v, --volumes   Its unnamed volumes, too
""")
def cmd_rm(client, args, *containers):
    code = 0
    for name in containers:
        try:
            client.delete("containers", name.strip("/"), force=args.force, link=args.link, v=args.volumes)
            say(name)
        except Error as error:
            complain(str(error))
            code = 0 if args.force and error.status == 404 else 1
    return code


@command("rename, container rename", "CONTAINER NEW_NAME", "Rename a container")
def cmd_rename(client, args, container, name):
    client.post("containers", container, "rename", name=name)


@command("update, container update", "[OPTIONS] CONTAINER [CONTAINER...]", "Change the limits of containers",
         _RESOURCE_OPTIONS + """
    --restart string               When to start it again: no, on-failure[:TIMES], always, unless-stopped
""")
def cmd_update(client, args, *containers):
    data = _copied(args, _RESOURCE_FIELDS)
    if args.restart:
        data["RestartPolicy"] = parse_restart(args.restart)
    if not data:
        raise CommandError("you must provide one or more flags when using this command")

    def done(name, response):
        say(name)
        for warning in response.json().get("Warnings") or ():
            complain("WARNING: %s" % warning)
    return for_each(containers, lambda name: client.send("POST", "containers", name, "update", data=data), done)


# -- looking at containers --------------------------------------------------------------------------------------------------

_FORMAT = """
    --format string       Template of a line, `table TEMPLATE`, or json
"""


def _image_of(item, full):
    """The image as it was called; its id cut like other ids where it was called by that."""
    if full:
        return item["Image"] or "<no image>"
    short = short_id(item.get("ImageID"))
    return short if short and short_id(item["Image"]) == short else item["Image"].partition("@")[0] or "<no image>"


def _mounts(item, full):
    names = [mount.get("Name") or mount.get("Source", "") for mount in item.get("Mounts") or ()]
    return ",".join(name if full else _truncate(name, 15) for name in names)


def _sizes(item, full):
    size = short_size(item.get("SizeRw") or 0)
    return "%s (virtual %s)" % (size, short_size(item["SizeRootFs"])) if item.get("SizeRootFs") else size


_CONTAINER_FIELDS = {
    "ID": ("CONTAINER ID", lambda c, full: c["Id"] if full else c["Id"][:12]),
    "Names": ("NAMES", lambda c, full: ",".join(n.lstrip("/") for n in c["Names"] if full or "/" not in n[1:])),
    "Image": ("IMAGE", _image_of),
    "Command": ("COMMAND", lambda c, full: _go_quote(c["Command"] if full else _truncate(c["Command"], 20))),
    "CreatedAt": ("CREATED AT", lambda c, full: local_time(c["Created"])),
    "RunningFor": ("CREATED", lambda c, full: age(c["Created"])),
    "Ports": ("PORTS", lambda c, full: format_ports(c["Ports"])),
    "State": ("STATE", lambda c, full: c["State"]),
    "Status": ("STATUS", lambda c, full: c["Status"]),
    "Size": ("SIZE", _sizes),
    "Labels": ("LABELS", lambda c, full: _labels(c["Labels"])),
    "Label": (None, lambda c, full: _label(c)),
    "Mounts": ("MOUNTS", _mounts),
    "LocalVolumes": ("LOCAL VOLUMES", lambda c, full: str(sum(m.get("Driver") == "local" for m in c.get("Mounts") or ()))),
    "Networks": ("NETWORKS", lambda c, full: ",".join((c.get("NetworkSettings") or {}).get("Networks") or {})),
    "Platform": ("PLATFORM", lambda c, full: None),
}


@command("ps, container ls, container list, container ps", "[OPTIONS]", "List containers", _FORMAT + """
-a, --all             Also those that do not run
-f, --filter filter   Only those that fit (name=x, status=exited, label=a=b, ...)
-n, --last int        The last ones created, as many
-l, --latest          The last one created
    --no-trunc        Do not cut anything
    --notrunc = no-trunc
-q, --quiet           Only the ids
-s, --size            Also their sizes
    --sinceId string
    --beforeId string
    --since string = sinceId
    --before string = beforeId
""")
def cmd_ps(client, args):
    limit = 1 if args.latest else args.last if (args.last or 0) > 0 else None
    form = args.format or (not args.quiet and read_config().get("psFormat"))
    found = client.get("containers", "json", all=args.all or bool(args.sinceId or args.beforeId), limit=limit,
                       size=args.size or ".Size" in (form or ""), filters=filters(args, since=args.sinceId, before=args.beforeId))
    if args.quiet:
        form = "{{.ID}}"
    columns = _columns_of("ID Image Command RunningFor Status Ports Names" + " Size" * args.size)
    show_rows(_CONTAINER_FIELDS, found, form, columns, full=args.no_trunc)


@command("top, container top", "CONTAINER [PS-OPTION...]", "Show the processes of a container", interspersed=False)
def cmd_top(client, args, container, *options):
    found = client.get("containers", container, "top", ps_args=" ".join(options))
    for line in tabulate(["\t".join(row) for row in [found["Titles"]] + (found["Processes"] or [])], 20):
        say(line)


@command("port, container port", "CONTAINER [PRIVATE_PORT[/PROTO]]", "Show where the ports of a container are published")
def cmd_port(client, args, container, private=None):
    ports = client.get("containers", container, "json")["NetworkSettings"]["Ports"] or {}
    if private:
        wanted = private if "/" in private else private + "/tcp"
        if not ports.get(wanted):
            raise CommandError("Error: No public port '%s' published for %s" % (private, container))
        ports = {wanted: ports[wanted]}
    for name in sorted(ports, key=lambda name: (int(name.partition("/")[0]), name)):
        for binding in ports[name] or ():
            address = "[%s]" % binding["HostIp"] if ":" in binding["HostIp"] else binding["HostIp"]
            say("%s%s:%s" % ("" if private else name + " -> ", address, binding["HostPort"]))


@command("diff, container diff", "CONTAINER", "Show what a container has changed in its file system")
def cmd_diff(client, args, container):
    for change in client.get("containers", container, "changes") or ():
        say("%s %s" % ("CAD"[change["Kind"]], change["Path"]))


# What inspect looks for, in this order: (--type, path before and after the name, whether it can tell sizes)
_INSPECTED = (("container", ("containers",), ("json",), True), ("image", ("images",), ("json",), False),
              ("network", ("networks",), (), False), ("volume", ("volumes",), (), False))


def inspect_objects(client, args, names, kinds):
    """Print what the names stand for; the exit code. What is found is printed also when something is not."""
    found, missing = [], []
    for name in names:
        for kind, before, after, sized in _INSPECTED:
            if kind not in kinds:
                continue
            try:
                found.append(client.get(*before, name, *after, size=getattr(args, "size", False) and sized))
                break
            except NotFound as error:
                failure = str(error)
        else:
            missing.append("Error: No such object: %s" % name if len(kinds) > 1 else failure)
    show_objects(found, args.format)
    for text in missing:
        complain(text)
    return 1 if missing else 0


_INSPECT_OPTIONS = """
-f, --format string   Template, or json
"""


@command("inspect", "[OPTIONS] NAME|ID [NAME|ID...]", "Show all about containers, images, networks and volumes",
         _INSPECT_OPTIONS + """
-s, --size            Also the sizes of containers
    --type string     Only look for this: container, image, network, volume
""")
def cmd_inspect(client, args, *names):
    kinds = [kind[0] for kind in _INSPECTED if args.type in (None, "", kind[0])]
    if not kinds:
        raise CommandError('"%s" is not a valid value for --type' % args.type)
    return inspect_objects(client, args, names, kinds)


@command("container inspect", "[OPTIONS] CONTAINER [CONTAINER...]", "Show all about containers", _INSPECT_OPTIONS + """
-s, --size            Also their sizes
""")
def cmd_container_inspect(client, args, *names):
    return inspect_objects(client, args, names, ("container",))


def _percent(part, whole):
    return "%.2f%%" % (100.0 * part / whole if whole > 0 and part > 0 else 0)


def _cpu_percent(stats, full):
    now, before = stats["cpu_stats"], stats["precpu_stats"]
    cpus = now.get("online_cpus") or len(now["cpu_usage"].get("percpu_usage") or ()) or 1
    return _percent((now["cpu_usage"]["total_usage"] - before["cpu_usage"]["total_usage"]) * cpus,
                    now.get("system_cpu_usage", 0) - before.get("system_cpu_usage", 0))


def _memory_used(stats):
    """Without the page cache that can go at once, as docker counts it: v1 calls it total_inactive_file."""
    memory = stats["memory_stats"]
    detail = memory.get("stats") or {}
    cache = detail.get("total_inactive_file", detail.get("inactive_file", 0))
    used = memory.get("usage", 0)
    return used - cache if cache < used else used


def _network_io(stats, full):
    networks = (stats.get("networks") or {}).values()
    return "%s / %s" % tuple(short_size(sum(network[key] for network in networks)) for key in ("rx_bytes", "tx_bytes"))


def _block_io(stats, full):
    totals = dict.fromkeys("rw", 0)
    for entry in stats["blkio_stats"].get("io_service_bytes_recursive") or ():
        if entry["op"][:1].lower() in totals:
            totals[entry["op"][:1].lower()] += entry["value"]
    return "%s / %s" % (short_size(totals["r"]), short_size(totals["w"]))


_STATS_FIELDS = {
    "Container": ("CONTAINER", lambda s, full: s["asked"]),
    "Name": ("NAME", lambda s, full: s["name"].lstrip("/")),
    "ID": ("CONTAINER ID", lambda s, full: s["id"] if full else s["id"][:12]),
    "CPUPerc": ("CPU %", _cpu_percent),
    "MemUsage": ("MEM USAGE / LIMIT", lambda s, full: "%s / %s" % (format_binary_size(_memory_used(s)),
                                                                   format_binary_size(s["memory_stats"].get("limit", 0)))),
    "MemPerc": ("MEM %", lambda s, full: _percent(_memory_used(s), s["memory_stats"].get("limit", 0))),
    "NetIO": ("NET I/O", _network_io),
    "BlockIO": ("BLOCK I/O", _block_io),
    "PIDs": ("PIDS", lambda s, full: str(s["pids_stats"].get("current", 0))),
}


@command("stats, container stats", "[OPTIONS] [CONTAINER...]", "Show what containers use, again and again", _FORMAT + """
-a, --all          Also those that do not run
    --no-stream    Only once
    --no-trunc     Do not cut anything
""")
def cmd_stats(client, args, *containers):
    while True:
        names = containers or [c["Id"][:12] for c in client.get("containers", "json", all=args.all)]
        asked = [(name, client.send("GET", "containers", name, "stats", stream="0")) for name in names]
        found = []
        for name, response in asked:
            try:
                found.append(dict(response.start().json(), asked=name))
            except NotFound:
                if containers:
                    raise
        if not args.no_stream and sys.stdout.isatty() and args.format in (None, "", "table"):
            sys.stdout.write("\x1b[2J\x1b[H")
        show_rows(_STATS_FIELDS, found, args.format, _columns_of("ID Name CPUPerc MemUsage MemPerc NetIO BlockIO PIDs"),
                  full=args.no_trunc)
        sys.stdout.flush()
        if args.no_stream:
            return


# -- files of containers ----------------------------------------------------------------------------------------------------

_GO_DIRECTORY, _GO_SYMLINK = 1 << 31, 1 << 27  # bits of Go's os.FileMode


def _path_stat(client, container, path):
    """What stands at a path in a container: {name, size, mode, linkTarget}; None when nothing does."""
    import base64
    try:
        response = client.request("HEAD", "containers", container, "archive", path=path)
    except NotFound:
        client.get("containers", container, "json")  # HEAD has no message: is it the container that is missing?
        return None
    return json.loads(base64.b64decode(response.headers["x-docker-container-path-stat"]))


def _follow_link(client, container, path):
    """(path, its stat) with a symlink at its end followed."""
    found = _path_stat(client, container, path)
    if found and found["mode"] & _GO_SYMLINK:
        path = os.path.normpath(os.path.join(os.path.dirname(path.rstrip("/")), found["linkTarget"]))
        found = _path_stat(client, container, path)
    return path, found


def _destination(path, is_there, is_folder, source, source_is_folder):
    """Where a copy goes, by the rules of cp: (folder, name in it; "" when the content of the source goes straight into the
    folder)."""
    if is_there and is_folder:
        contents = source == "." or source.endswith("/.")
        return path, "" if contents else os.path.basename(os.path.normpath(source))
    if source_is_folder and is_there:
        raise CommandError("cannot copy directory")
    if path.endswith("/") and not source_is_folder:
        raise CommandError("no such directory" if not is_there else "not a directory")
    path = path.rstrip("/")
    return os.path.dirname(path) or ("/" if path.startswith("/") else "."), os.path.basename(path)


def _put_archive(client, container, body, **query):
    client.request("PUT", "containers", container, "archive", noOverwriteDirNonDir=True, body=body,
                   headers={"Content-Type": "application/x-tar"}, **query).read_all()


def _copy_in(client, args, source, container, target):
    target, found = _follow_link(client, container, target)
    is_folder = bool(found and found["mode"] & _GO_DIRECTORY)
    if source == "-":
        if not is_folder:
            raise CommandError('destination "%s:%s" must be a directory' % (container, target))
        _put_archive(client, container, send_file(0), path=target)
        return
    local = os.path.realpath(source) if args.follow_link else source
    if not os.path.lexists(local):
        raise CommandError("lstat %s: no such file or directory" % os.path.abspath(source))
    is_dir = os.path.isdir(local) and (not os.path.islink(local) or source.endswith(("/", "/.")))
    folder, name = _destination(target, found is not None, is_folder, source, is_dir)
    sent = Counter()

    def body(write):
        path = os.path.realpath(local) if is_dir else os.path.abspath(local)
        with open_folder(path if is_dir else os.path.dirname(path)) as fd:
            pack(fd, sent.through(write), **{"name": name} if is_dir else {"paths": [(os.path.basename(path), name)]})
    _put_archive(client, container, body, path=folder, copyUIDGID=args.archive)
    _note_copied(args, sent.bytes, "%s:%s" % (container, target))


def _note_copied(args, size, target):
    if not args.quiet and sys.stderr.isatty():
        complain("Successfully copied %s to %s" % (short_size(size), target))


class Counter:
    """Counts the bytes that are written through it."""
    bytes = 0

    def through(self, write):
        def count(data):
            self.bytes += len(data)
            write(data)
        return count


@contextlib.contextmanager
def open_folder(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


class _Renamed:
    """A TarReader whose entries have another name for the root of the archive, or none: what is in it goes straight into the
    folder."""

    def __init__(self, reader, name):
        self._reader, self._name, self.drain = reader, name, reader.drain

    def _rename(self, path):
        return "/".join([self._name] * bool(self._name) + path.rstrip("/").split("/")[1:])

    def __iter__(self):
        for entry in self._reader:
            entry.name = self._rename(entry.name)
            if entry.type == TAR_LINK:
                entry.linkname = self._rename(entry.linkname)
            if entry.name:
                yield entry


def _copy_out(client, args, container, source, target):
    import base64
    if args.follow_link:
        source, _ = _follow_link(client, container, source)
    response = client.request("GET", "containers", container, "archive", path=source)
    if target == "-":
        receive_file(response, None)
        return
    is_dir = json.loads(base64.b64decode(response.headers["x-docker-container-path-stat"]))["mode"] & _GO_DIRECTORY
    folder, name = _destination(target, os.path.lexists(target), os.path.isdir(target), source, is_dir)
    if not os.path.isdir(folder):
        raise CommandError("invalid output path: directory %s does not exist" % json.dumps(os.path.abspath(folder)))
    with open_folder(folder) as fd:
        size = unpack(_Renamed(TarReader(response, "the copy"), name), fd, owner=None if args.archive else False)
    _note_copied(args, size, target)


@command("cp, container cp", "[OPTIONS] CONTAINER:SRC_PATH DEST_PATH|-\n[OPTIONS] SRC_PATH|- CONTAINER:DEST_PATH",
         "Copy files between a container and this host; `-` is a tar stream", """
-a, --archive       Keep owners and groups
-L, --follow-link   Follow a symlink in SRC_PATH
-q, --quiet         Do not say what was copied
""")
def cmd_cp(client, args, source, target):
    (left, inner), (right, outer) = _split_copy_path(source), _split_copy_path(target)
    if left and right:
        raise CommandError("copying between containers is not supported")
    if left:
        _copy_out(client, args, left, inner, outer)
    elif right:
        _copy_in(client, args, inner, right, outer)
    else:
        raise CommandError("must specify at least one container source")


def _split_copy_path(text):
    """(container or None, path): what begins like a path is one, even with a colon in it."""
    container, colon, path = text.partition(":")
    if not colon or text.startswith((".", "/")):
        return None, text
    return container, path if path.startswith("/") else "/" + path


def send_file(fd):
    """The body of a request: all that is to be read from a descriptor."""
    def body(write):
        for data in iter(functools.partial(os.read, fd, 1 << 18), b""):
            write(data)
    return body


def receive_file(response, path):
    """Write an answer's body to a file, whole or not at all, or to stdout where path is None."""
    if path is None:
        if os.isatty(1):
            raise CommandError("cowardly refusing to save to a terminal. Use the -o flag or redirect")
        for data in iter(response.read, b""):
            write_all(1, data)
        return
    if os.path.exists(path) and not os.path.isfile(path):  # /dev/null, a pipe
        with open(path, "wb") as f:
            for data in iter(response.read, b""):
                f.write(data)
        return
    new = "%s.%d" % (path, os.getpid())
    try:
        with open(new, "wb") as f:
            for data in iter(response.read, b""):
                f.write(data)
        os.rename(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(new)
        raise


_OUTPUT = """
-o, --output string   Write to this file instead of stdout
"""


@command("export, container export", "[OPTIONS] CONTAINER", "Write a container's file system as a tar archive", _OUTPUT)
def cmd_export(client, args, container):
    receive_file(client.request("GET", "containers", container, "export"), args.output)


# -- images -----------------------------------------------------------------------------------------------------------------

def _repository_and_tag(name, tag=None):
    """`repo:tag`, or 2013's two words, checked here already, as (repo, tag)."""
    if not name:
        return None, None
    try:
        reference = Reference.parse("%s:%s" % (name, tag) if tag else name)
    except BadRequest as error:
        raise CommandError('Error parsing reference: "%s" is not a valid repository/tag: %s' % (name, error))
    return reference.repository, reference.tag


@command("commit, container commit", "[OPTIONS] CONTAINER [REPOSITORY[:TAG]] [TAG]", "Make an image of a container's changes", """
-a, --author string    Who made it
-c, --change list      Dockerfile instruction for the image
-m, --message string   What was changed
-p, --pause=true       Freeze the container meanwhile
    --run string
""")
def cmd_commit(client, args, container, repository=None, tag=None):
    repository, tag = _repository_and_tag(repository, tag)
    try:
        config = json.loads(args.run) if args.run else None
    except ValueError as error:
        raise CommandError("--run wants a container's config as JSON: %s" % error)
    created = client.post("commit", container=container, repo=repository, tag=tag, author=args.author, comment=args.message,
                          changes=args.change, pause=None if args.pause else "0", data=config)
    say(created["Id"])


@command("import, image import", "[OPTIONS] file|URL|- [REPOSITORY[:TAG]] [TAG]", "Make an image of a tar archive", """
-c, --change list      Dockerfile instruction for the image
-m, --message string   Comment of the image
    --platform string  Platform of the image
""")
def cmd_import(client, args, source, repository=None, tag=None):
    repository, tag = _repository_and_tag(repository, tag)
    query = dict(repo=repository, tag=tag, message=args.message, changes=args.change, platform=args.platform)
    if "://" in source:
        response = client.request("POST", "images", "create", fromSrc=source, **query)
    else:
        with _opened(None if source == "-" else source) as fd:
            response = client.request("POST", "images", "create", fromSrc="-", body=send_file(fd), **query)
    show_progress(response.objects())


@contextlib.contextmanager
def _opened(path):
    """A descriptor to read a file from; stdin where path is None."""
    try:
        fd = 0 if path is None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CommandError("open %s: %s" % (path, error.strerror.lower()))
    try:
        yield fd
    finally:
        if fd:
            os.close(fd)


@command("insert", "IMAGE URL PATH", "")
def cmd_insert(client, args, image, url, path):
    show_progress(client.request("POST", "images", image, "insert", url=url, path=path).objects())


@command("mkimage", "NAME [PROGRAM...]", "Make a small image of programs of the daemon's host")
def cmd_mkimage(client, args, name, *programs):
    show_progress(client.request("POST", "pydock", "mkimage", name=name, program=programs).objects())


@command("tag, image tag", "[OPTIONS] SOURCE_IMAGE[:TAG] TARGET_IMAGE[:TAG] [TAG]", "Give an image another name", """
-f, --force
""")
def cmd_tag(client, args, source, target, tag=None):
    repository, tag = _repository_and_tag(target, tag)
    client.post("images", source, "tag", repo=repository, tag=tag or "latest")


def _known(item, key, show):
    """What the daemon computes only for `system df`; -1 elsewhere."""
    return show(item[key]) if item.get(key, -1) >= 0 else "N/A"


_IMAGE_FIELDS = {
    "ID": ("IMAGE ID", lambda i, full: i["Id"] if full else short_id(i["Id"])),
    "Repository": ("REPOSITORY", lambda i, full: i["repository"]),
    "Tag": ("TAG", lambda i, full: i["tag"]),
    "Digest": ("DIGEST", lambda i, full: i["digest"]),
    "CreatedSince": ("CREATED", lambda i, full: age(i["Created"])),
    "CreatedAt": ("CREATED AT", lambda i, full: local_time(i["Created"])),
    "Size": ("SIZE", lambda i, full: short_size(i["Size"])),
    "VirtualSize": ("SIZE", lambda i, full: format_size(i.get("VirtualSize") or i["Size"])),
    "SharedSize": ("SHARED SIZE", lambda i, full: _known(i, "SharedSize", short_size)),
    "UniqueSize": ("UNIQUE SIZE", lambda i, full: _known(i, "SharedSize", lambda shared: format_size(i["Size"] - shared))),
    "Containers": ("CONTAINERS", lambda i, full: _known(i, "Containers", str)),
}


def _image_rows(images, digests):
    """One row for each tag of each image; with digests for each digest of it, too; `<none>` where it has none."""
    for image in images:
        names = {}
        for text in image.get("RepoTags") or ():
            repository, _, tag = text.rpartition(":")
            names.setdefault(repository, ([], []))[0].append(tag)
        for text in image.get("RepoDigests") or ():
            repository, _, digest = text.partition("@")
            names.setdefault(repository, ([], []))[1].append(digest)
        rows = [(repository, tag, digest) for repository, (tags, found) in names.items()
                for tag in (tags or ["<none>"]) for digest in (found if digests and found else ["<none>"])]
        for repository, tag, digest in rows or [("<none>", "<none>", "<none>")]:
            yield dict(image, repository=repository, tag=tag, digest=digest)


@command("images, image ls, image list", "[OPTIONS] [REPOSITORY[:TAG]]", "List images", _FORMAT + """
-a, --all             Also those that are only steps to others
    --digests         Show their digests
-f, --filter filter   Only those that fit (dangling=true, label=a=b, before=IMAGE, ...)
    --no-trunc        Do not cut anything
    --notrunc = no-trunc
-q, --quiet           Only the ids
    --tree            As a tree
    --viz             As a graph for dot
""")
def cmd_images(client, args, name=None):
    found = client.get("images", "json", all=args.all or args.tree or args.viz, filters=filters(args, reference=name),
                       digests=args.digests)
    if args.tree or args.viz:
        (show_image_tree if args.tree else show_image_graph)(found)
        return
    form = "{{.ID}}" if args.quiet else args.format or read_config().get("imagesFormat")
    rows = list(_image_rows(sorted(found, key=lambda image: -image["Created"]), args.digests))
    if args.quiet:
        rows = list({row["Id"]: row for row in rows}.values())
    show_rows(_IMAGE_FIELDS, rows, form, _columns_of("Repository Tag%s ID CreatedSince Size" % (" Digest" * args.digests)),
              full=args.no_trunc)


def _named(image):
    return [tag for tag in image.get("RepoTags") or () if tag != "<none>:<none>"]


def show_image_tree(found):
    """Images below those that they were made from, as docker's early `images --tree` had it."""
    children = {}
    known = {image["Id"] for image in found}
    for image in found:
        children.setdefault(image.get("ParentId") if image.get("ParentId") in known else None, []).append(image)

    def walk(parent, lead):
        below = children.get(parent, [])
        for number, image in enumerate(below, 1):
            last, names = number == len(below), _named(image)
            say("%s%s%s Size: %s%s" % (lead, "\u2514\u2500" if last else "\u251c\u2500", short_id(image["Id"]),
                                       short_size(image["Size"]), " Tags: " + ", ".join(names) if names else ""))
            walk(image["Id"], lead + ("  " if last else "\u2502 "))
    walk(None, "")


def show_image_graph(found):
    """The same as input for graphviz's dot, as `images -viz` of 2013."""
    say("digraph docker {")
    for image in found:
        parent, ident = image.get("ParentId"), short_id(image["Id"])
        say(' "%s" -> "%s"' % (short_id(parent), ident) if parent else ' base -> "%s" [style=invis]' % ident)
        if _named(image):
            label = json.dumps("\n".join([ident] + _named(image)))
            say(' "%s" [label=%s,shape=box,fillcolor="paleturquoise",style="filled,rounded"];' % (ident, label))
    say(" base [style=invisible]\n}")


@command("rmi, image rm, image remove", "[OPTIONS] IMAGE [IMAGE...]", "Remove images", """
-f, --force             Also when it is in use by stopped containers, or has several tags
    --no-prune          Keep its untagged parents
    --platform list
""")
def cmd_rmi(client, args, *names):
    def done(name, response):
        for item in response.json() or ():
            say("Untagged: %s" % item["Untagged"] if "Untagged" in item else "Deleted: %s" % item["Deleted"])
    def send(name):
        return client.send("DELETE", "images", name, force=args.force, noprune=args.no_prune)
    # One after the other: a child must go before its parent.
    return max(for_each([name], send, done) for name in names)


_HISTORY_FIELDS = {
    "ID": ("IMAGE", lambda h, full, human: h["Id"] if full else short_id(h["Id"])),
    "CreatedAt": ("CREATED AT", lambda h, full, human: format_time(h["Created"] * 10 ** 9) if h["Created"] > 0 else ""),
    "CreatedSince": ("CREATED", lambda h, full, human: age(h["Created"]) if h["Created"] > 0 else ""),
    "CreatedBy": ("CREATED BY", lambda h, full, human: _created_by(h["CreatedBy"], full)),
    "Size": ("SIZE", lambda h, full, human: short_size(h["Size"]) if human else str(h["Size"])),
    "Comment": ("COMMENT", lambda h, full, human: h["Comment"]),
}


def _created_by(text, full):
    text = text.replace("\t", " ").replace("/bin/sh -c #(nop) ", "")
    return text if full else _truncate(text, 45)


@command("history, image history", "[OPTIONS] IMAGE", "Show the steps that made an image", _FORMAT + """
-H, --human=true        Sizes and times for people
    --no-trunc          Do not cut anything
    --notrunc = no-trunc
    --platform string
-q, --quiet             Only the ids
""")
def cmd_history(client, args, image):
    form = "{{.ID}}" if args.quiet else args.format
    columns = _columns_of("ID %s CreatedBy Size Comment" % ("CreatedSince" if args.human else "CreatedAt"))
    show_rows(_HISTORY_FIELDS, client.get("images", image, "history"), form, columns, full=args.no_trunc, human=args.human)


@command("image inspect", "[OPTIONS] IMAGE [IMAGE...]", "Show all about images", _INSPECT_OPTIONS)
def cmd_image_inspect(client, args, *names):
    return inspect_objects(client, args, names, ("image",))


@command("save, image save", "[OPTIONS] IMAGE [IMAGE...]", "Write images as a tar archive", _OUTPUT + """
    --platform string     Only this platform
    --since string        Leave out the layers that this image has
""")
def cmd_save(client, args, *names):
    if not args.output and os.isatty(1):
        raise CommandError("cowardly refusing to save to a terminal. Use the -o flag or redirect")
    receive_file(client.request("GET", "images", "get", names=list(names), platform=args.platform, since=args.since), args.output)


@command("load, image load", "[OPTIONS]", "Read images from a tar archive", """
-i, --input string      Read this file instead of stdin
    --platform string   Only this platform
-q, --quiet             No progress
""")
def cmd_load(client, args):
    if not args.input and os.isatty(0):
        raise CommandError("requested load from stdin, but stdin is empty")
    with _opened(args.input) as fd:
        response = client.request("POST", "images", "load", quiet=args.quiet or not sys.stdout.isatty(), platform=args.platform,
                                  body=send_file(fd), headers={"Content-Type": "application/x-tar"})
    show_progress(response.objects())


# -- registries -------------------------------------------------------------------------------------------------------------

INDEX = "https://index.docker.io/v1/"  # what docker calls its Hub where credentials are kept


def config_path():
    return os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker"), "config.json")


def read_config():
    """The client's config.json, which is docker's; {} where there is none."""
    try:
        return read_json(config_path(), {})
    except PermissionError:
        return {}


def write_config(config):
    os.makedirs(os.path.dirname(config_path()), mode=0o700, exist_ok=True)
    write_file(config_path(), json.dumps(config, indent="\t"), 0o600)


def _credential_helper(config, server):
    return (config.get("credHelpers") or {}).get(server) or config.get("credsStore")


def _call_helper(name, verb, text):
    """Ask docker-credential-NAME; its answer, None when it has none or is not there."""
    import subprocess
    try:
        result = subprocess.run(["docker-credential-" + name, verb], input=text.encode(), stdout=subprocess.PIPE,
                                stderr=subprocess.DEVNULL)
    except OSError as error:
        raise CommandError("error getting credentials: docker-credential-%s: %s" % (name, os_error_text(error)))
    if result.returncode and verb == "store":
        raise CommandError("docker-credential-%s could not store the credentials" % name)
    return None if result.returncode else json.loads(result.stdout) if verb == "get" else ""


def credentials(config, server):
    """The API's auth object for a registry; {} where we have none."""
    import base64
    helper = _credential_helper(config, server)
    found = _call_helper(helper, "get", server) if helper else None
    if found:
        kind = "identitytoken" if found["Username"] == "<token>" else "password"
        return {"username": "" if kind == "identitytoken" else found["Username"], kind: found["Secret"], "serveraddress": server}
    entry = (config.get("auths") or {}).get(server)
    if not entry:
        return {}
    try:
        user, _, password = base64.b64decode(entry.get("auth", "")).decode().partition(":")
    except ValueError:
        raise CommandError("%s: the entry of %s is damaged: log in again" % (config_path(), server))
    result = {"username": user, "password": password.rstrip("\0"), "serveraddress": server}
    return dict(result, identitytoken=entry["identitytoken"]) if entry.get("identitytoken") else result


def store_credentials(server, user, password, token):
    """Keep what a login has proved, where the config says: a helper program, or the config itself."""
    import base64
    config = read_config()
    helper = _credential_helper(config, server)
    if helper:
        _call_helper(helper, "store", json.dumps({"ServerURL": server, "Username": "<token>" if token else user,
                                                  "Secret": token or password}))
        entry = {}
    else:
        entry = {"auth": base64.b64encode(("%s:%s" % (user, "" if token else password)).encode()).decode()}
        entry.update({"identitytoken": token} if token else {})
        complain("WARNING! Your credentials are stored unencrypted in '%s'." % config_path())
    config.setdefault("auths", {})[server] = entry
    write_config(config)


def _auth_header(value):
    import base64
    return base64.urlsafe_b64encode(to_json(value).encode()).decode()


def _registry_headers(image):
    domain = "docker.io"
    with contextlib.suppress(BadRequest):  # a term to search for may be anything
        domain = Reference.parse(image).domain
    return {"X-Registry-Auth": _auth_header(credentials(read_config(), INDEX if domain == "docker.io" else domain))}


def pull_image(client, name, platform=None, out=None, all_tags=False):
    reference = Reference.parse(name)
    tag = "" if all_tags else reference.digest or reference.tag or "latest"
    response = client.request("POST", "images", "create", fromImage=reference.repository, tag=tag, platform=platform,
                              headers=_registry_headers(name))
    show_progress(response.objects(), out)
    return "%s/%s%s%s" % (reference.domain, reference.path, "@" if reference.digest else ":", tag) if tag else None


@command("pull, image pull", "[OPTIONS] NAME[:TAG|@DIGEST]", "Fetch an image from a registry", """
-a, --all-tags                     All tags of the repository
    --disable-content-trust=true
    --platform string              Platform of the image
-q, --quiet                        No progress
-t, --tag string
    --registry string
""")
def cmd_pull(client, args, name):
    if args.tag:
        name = "%s:%s" % (name, args.tag)
    reference = Reference.parse(name)
    if args.all_tags and (reference.tag or reference.digest):
        raise CommandError("tag can't be used with --all-tags/-a")
    if not (args.all_tags or reference.tag or reference.digest or args.quiet):
        say("Using default tag: latest")
    full = pull_image(client, name, args.platform, open(os.devnull, "w") if args.quiet else None, args.all_tags)
    if full:
        say(full)


@command("push, image push", "[OPTIONS] NAME[:TAG]", "Send an image to a registry", """
-a, --all-tags                     All tags of the repository
    --disable-content-trust=true
    --platform string              Only this platform
-q, --quiet                        No progress
    --registry string
""")
def cmd_push(client, args, name):
    reference = Reference.parse(name)
    if args.all_tags and reference.tag:
        raise CommandError("tag can't be used with --all-tags/-a")
    tag = "" if args.all_tags else reference.tag or "latest"
    if tag and not reference.tag and not args.quiet:
        say("Using default tag: latest")
    response = client.request("POST", "images", reference.repository, "push", tag=tag, platform=args.platform,
                              headers=_registry_headers(name))
    show_progress(response.objects(), open(os.devnull, "w") if args.quiet else None)
    if args.quiet:
        say("%s/%s%s" % (reference.domain, reference.path, ":" + tag if tag else ""))


@command("login", "[OPTIONS] [SERVER]", "Log in to a registry", """
-p, --password string   Password or token
    --password-stdin    Read the password from stdin
-u, --username string   User name
-e, --email string
""")
def cmd_login(client, args, server=None):
    server = server or INDEX
    user, password = args.username, args.password
    if args.password_stdin:
        if not user or password:
            raise CommandError("Must provide --username with --password-stdin" if not user
                               else "--password and --password-stdin are mutually exclusive")
        password = sys.stdin.read().rstrip("\r\n")
    elif password:
        complain("WARNING! Using --password via the CLI is insecure. Use --password-stdin.")
    if not (user and password) and not sys.stdin.isatty():
        raise CommandError("Error: Cannot perform an interactive login from a non TTY device")
    user = user or input("Username: ")
    if not password:
        import getpass
        password = getpass.getpass("Password: ")
    answer = client.post("auth", data={"username": user, "password": password, "email": args.email or "",
                                       "serveraddress": server}) or {}
    store_credentials(server, user, password, answer.get("IdentityToken"))
    say(answer.get("Status") or "Login Succeeded")


@command("logout", "[SERVER]", "Log out from a registry")
def cmd_logout(client, args, server=None):
    server, config = server or INDEX, read_config()
    if server not in (config.get("auths") or {}):
        say("Not logged in to %s" % server)
        return
    say("Removing login credentials for %s" % server)
    helper = _credential_helper(config, server)
    if helper:
        _call_helper(helper, "erase", server)
    del config["auths"][server]
    write_config(config)


_SEARCH_FIELDS = {
    "Name": ("NAME", lambda r, full: r["name"]),
    "Description": ("DESCRIPTION", lambda r, full: _truncate(" ".join(r["description"].split()), 1 << 20 if full else 45)),
    "StarCount": ("STARS", lambda r, full: str(r["star_count"])),
    "IsOfficial": ("OFFICIAL", lambda r, full: "[OK]" if r["is_official"] else ""),
    "IsAutomated": ("AUTOMATED", lambda r, full: "[OK]" if r.get("is_automated") else ""),
}


@command("search", "[OPTIONS] TERM", "Search a registry for images", _FORMAT + """
-f, --filter filter   Only those that fit (is-official=true, stars=3)
    --limit int       Most results
    --no-trunc        Do not cut anything
    --notrunc = no-trunc
""")
def cmd_search(client, args, term):
    found = client.request("GET", "images", "search", term=term, limit=args.limit, filters=filters(args),
                           headers=_registry_headers(term)).json()
    show_rows(_SEARCH_FIELDS, found, args.format, _columns_of("Name Description StarCount IsOfficial"),
              full=args.no_trunc)


# -- build ------------------------------------------------------------------------------------------------------------------

_IGNORE_WORDS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def ignore_pattern(pattern):
    """A line of .dockerignore as a compiled expression for paths relative to the context. `*` and `?` stay within a name, `**`
    does not; what is below a match matches, too."""
    def one(match):
        text = match.group()
        if text[0] == "[" and len(text) > 1:
            return text
        return _IGNORE_WORDS.get(text) or re.escape(match.group(1) or text)
    clean = os.path.normpath(pattern.strip().lstrip("/"))
    regex = re.sub(r"\*\*/|\*\*|\*|\?|\[\^?[^\]]+\]|\\(.)|.", one, clean, flags=re.DOTALL)
    try:
        return re.compile("(?:%s)(?:/.*)?" % regex, re.DOTALL)
    except re.error as error:
        raise CommandError("error checking context: .dockerignore: '%s': %s" % (pattern, error))


def read_ignores(folder, dockerfile):
    """The rules of DOCKERFILE.dockerignore or .dockerignore as (is an exception, expression). The Dockerfile and the rules
    themselves always go along: the daemon needs them."""
    rules = []
    for name in (dockerfile + ".dockerignore", ".dockerignore"):
        data = read_file(os.path.join(folder, name), b"")
        if data:
            for line in data.decode("utf-8-sig", "replace").splitlines():
                line = line.strip()
                if line and not line.startswith("#") and line not in (".", "!"):
                    rules.append((line.startswith("!"), ignore_pattern(line.lstrip("!"))))
            return rules + [(True, ignore_pattern(kept)) for kept in (re.escape(dockerfile), ".dockerignore")]
    return rules


def is_ignored(rules, path):
    """Whether the last rule that matches is no exception."""
    for exception, expression in reversed(rules):
        if expression.fullmatch(path):
            return not exception
    return False


def build_context(folder, write, dockerfile="Dockerfile"):
    """Write a build context as tar: the folder without what .dockerignore leaves out. Never follows a symlink. A folder that is
    ignored is entered only when there are exceptions."""
    rules = read_ignores(folder, dockerfile)
    has_exceptions = sum(exception for exception, _ in rules) > 2

    def exclude(path):
        if not rules or not is_ignored(rules, path):
            return False
        if path in (dockerfile, ".dockerignore") or dockerfile.startswith(path + "/"):
            return False
        inside = os.path.join(folder, path)
        return not (has_exceptions and os.path.isdir(inside) and not os.path.islink(inside))
    with open_folder(folder) as fd:
        pack(fd, write, exclude=exclude)


def _stdin_context(write):
    """stdin as the context: a tar archive, compressed or not, as it is; anything else is a Dockerfile without a context."""
    head = b""
    while len(head) < 512:
        data = os.read(0, 512 - len(head))
        if not data:
            break
        head += data
    if head[257:262] == b"ustar" or head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        write(head)
        send_file(0)(write)
        return
    text = head + b"".join(iter(lambda: os.read(0, BLOCK), b""))
    writer = TarWriter(write)
    writer.add(Entry("Dockerfile", size=len(text)), text)
    writer.close()


_BUILD_FIELDS = {
    "cgroupparent": "cgroup_parent", "cpuperiod": "cpu_period", "cpuquota": "cpu_quota", "cpusetcpus": "cpuset_cpus",
    "cpusetmems": "cpuset_mems", "cpushares": "cpu_shares", "extrahosts": "add_host", "forcerm": "force_rm", "memory": "memory",
    "memswap": "memory_swap", "networkmode": "network", "nocache": "no_cache", "platform": "platform", "pull": "pull",
    "q": "quiet", "securityopt": "security_opt", "shmsize": "shm_size", "squash": "squash", "t": "tag", "target": "target"}


@command("build, image build", "[OPTIONS] PATH|URL|-", "Make an image from a Dockerfile", """
    --add-host host           Add a line to /etc/hosts (NAME:ADDRESS)
    --build-arg env           Value of an ARG (NAME=VALUE)
    --cache-from list         Images whose steps may be taken over
    --cgroup-parent string    Cgroup of its containers
    --compress                Send the context compressed
    --cpu-period int          Microseconds in which --cpu-quota counts
    --cpu-quota int           Microseconds of CPU in each period
-c, --cpu-shares int          Share of CPU, relative to others
    --cpuset-cpus string      CPUs to run on (0-3, 0,1)
    --cpuset-mems string      Memory nodes to use (0-3, 0,1)
    --disable-content-trust=true
-f, --file string             Name of the Dockerfile (PATH/Dockerfile)
    --force-rm                Remove the steps' containers also after a failure
    --iidfile string          Write the image's id to this file
    --isolation string
    --label map               Set a label (NAME=VALUE)
-m, --memory bytes            Most memory
    --memory-swap bytes       Most memory and swap together, -1: any amount of swap
    --network string          Network of RUN instructions
    --no-cache                Run all steps anew
    --platform string         Platform of the image
    --pull                    Look for a newer base image
-q, --quiet                   Only print the image's id
    --rm=true                 Remove the steps' containers
    --security-opt list       Security options
    --shm-size bytes          Size of /dev/shm
    --squash                  Make one layer of the new ones
-t, --tag list                Name of the image, with or without a tag
    --target string           Stage to build
    --ulimit ulimit           Limit (NAME=SOFT[:HARD])
""")
def cmd_build(client, args, where):
    query = {name: getattr(args, option) for name, option in _BUILD_FIELDS.items()}
    arguments = {name: value if equals else None for name, equals, value in (arg.partition("=") for arg in args.build_arg)}
    for name, value in (("buildargs", arguments), ("labels", dict(args.label)), ("cachefrom", args.cache_from),
                        ("ulimits", args.ulimit)):
        query[name] = json.dumps(value) if value else None
    query["rm"] = "1" if args.rm else "0"
    query["dockerfile"], body = _context(args, where)
    if body is None:
        query["remote"] = where
    ids = []
    response = client.request("POST", "build", body=body, headers=_build_headers(), **query)
    out = open(os.devnull, "w") if args.quiet else sys.stdout
    show_progress(_build_messages(response, args.quiet, ids), out, lambda aux: ids.append(aux.get("ID")))
    if args.quiet and ids:
        say(ids[-1])
    if args.iidfile and ids:
        write_file(args.iidfile, ids[-1], 0o644, sync=False)


def _build_messages(response, quiet, ids):
    for message in response.objects():
        if quiet and message.get("stream", "").startswith("sha256:"):
            ids.append(message["stream"].strip())
        yield message


def _build_headers():
    config = read_config()
    known = {server: credentials(config, server) for server in config.get("auths") or ()}
    return {"Content-Type": "application/x-tar", "X-Registry-Config": _auth_header(known)}


def _context(args, where):
    """(name of the Dockerfile in the context, function that sends the context; None when the daemon is to fetch it)."""
    if where == "-":
        return args.file, _stdin_context
    if not os.path.isdir(where):
        if re.match(r"(https?|git|ssh)://|git@|github\.com/", where):
            return args.file, None
        raise CommandError("unable to prepare context: path %s not found" % json.dumps(where))
    name = args.file or os.path.join(where, "Dockerfile")
    inside = os.path.relpath(os.path.realpath(name), os.path.realpath(where))
    outside = args.file == "-" or inside.startswith("../")
    if args.file != "-" and not os.path.exists(name):
        raise CommandError("unable to prepare context: unable to evaluate symlinks in Dockerfile path: lstat %s: no such file or "
                           "directory" % os.path.abspath(name))

    def body(write):
        sent = Counter()
        if outside:
            _context_with(where, sent.through(write), sys.stdin.buffer.read() if args.file == "-" else read_file(name))
        else:
            build_context(where, sent.through(write), inside)
        if not args.quiet:
            say("Sending build context to the %s daemon  %s" % (PROGRAM, format_size(sent.bytes)))
    return ".dockerfile.%d" % os.getpid() if outside else inside, body


def _context_with(folder, write, dockerfile):
    """A context with a Dockerfile from elsewhere, as one tar: its entry comes first, the end mark of its own is left out."""
    name = ".dockerfile.%d" % os.getpid()
    writer = TarWriter(write)
    writer.add(Entry(name, size=len(dockerfile)), dockerfile)
    writer.flush()
    build_context(folder, write, name)


# -- volumes and networks ---------------------------------------------------------------------------------------------------

_VOLUME_FIELDS = {
    "Driver": ("DRIVER", lambda v: v["Driver"]), "Name": ("VOLUME NAME", lambda v: v["Name"]),
    "Scope": ("SCOPE", lambda v: v["Scope"]), "Mountpoint": ("MOUNTPOINT", lambda v: v["Mountpoint"]),
    "Labels": ("LABELS", lambda v: _labels(v.get("Labels"))), "Label": (None, _label),
    "Links": ("LINKS", lambda v: str(v["UsageData"]["RefCount"]) if v.get("UsageData") else "N/A"),
    "Size": ("SIZE", lambda v: format_size(v["UsageData"]["Size"]) if v.get("UsageData") else "N/A"),
}


@command("volume create", "[OPTIONS] [VOLUME]", "Make a volume", """
-d, --driver string=local   Volume driver
    --label map             Set a label (NAME=VALUE)
    --name string
-o, --opt map               Option of the driver
""")
def cmd_volume_create(client, args, name=None):
    data = {"Name": name or args.name or "", "Driver": args.driver, "DriverOpts": dict(args.opt), "Labels": dict(args.label)}
    say(client.post("volumes", "create", data=data)["Name"])


@command("volume ls, volume list", "[OPTIONS]", "List volumes", _FORMAT + """
-f, --filter filter   Only those that fit (dangling=true, name=x, ...)
-q, --quiet           Only the names
""")
def cmd_volume_ls(client, args):
    found = sorted(client.get("volumes", filters=filters(args))["Volumes"] or (), key=lambda v: v["Name"])
    show_rows(_VOLUME_FIELDS, found, "{{.Name}}" if args.quiet else args.format, _columns_of("Driver Name"))


@command("volume inspect", "[OPTIONS] VOLUME [VOLUME...]", "Show all about volumes", _INSPECT_OPTIONS)
def cmd_volume_inspect(client, args, *names):
    return inspect_objects(client, args, names, ("volume",))


@command("volume rm, volume remove", "[OPTIONS] VOLUME [VOLUME...]", "Remove volumes that no container uses", """
-f, --force   Do not mind when one is not there
""")
def cmd_volume_rm(client, args, *names):
    return for_each(names, lambda name: client.send("DELETE", "volumes", name, force=args.force))


_NETWORK_FIELDS = {
    "ID": ("NETWORK ID", lambda n, full: n["Id"] if full else n["Id"][:12]), "Name": ("NAME", lambda n, full: n["Name"]),
    "Driver": ("DRIVER", lambda n, full: n["Driver"]), "Scope": ("SCOPE", lambda n, full: n["Scope"]),
    "Internal": ("INTERNAL", lambda n, full: _go_text(n.get("Internal", False))),
    "IPv4": ("IPV4", lambda n, full: _go_text(n.get("EnableIPv4", False))),
    "IPv6": ("IPV6", lambda n, full: _go_text(n.get("EnableIPv6", False))),
    "Labels": ("LABELS", lambda n, full: _labels(n.get("Labels"))), "Label": (None, lambda n, full: _label(n)),
    "CreatedAt": ("CREATED AT", lambda n, full: n.get("Created", "")),
}


@command("network create", "[OPTIONS] NETWORK", "Make a network", """
    --attachable
    --aux-address map      Address to keep free (NAME=ADDRESS)
-d, --driver string=bridge   Network driver
    --gateway list         Gateway of a subnet
    --internal             No way out of it
    --ip-range list        Part of a subnet to take addresses from
    --ipam-driver string=default   Address management
    --ipam-opt map         Option of the address management
    --ipv4=true            IPv4 addresses
    --ipv6                 IPv6 addresses
    --label map            Set a label (NAME=VALUE)
-o, --opt map              Option of the driver
    --scope string
    --subnet list          Subnet (10.1.2.0/24)
""")
def cmd_network_create(client, args, name):
    pools = [{"Subnet": subnet} for subnet in args.subnet] or ([{}] if args.ip_range or args.gateway else [])
    for field, values in (("IPRange", args.ip_range), ("Gateway", args.gateway)):
        for pool, value in zip(pools, values):
            pool[field] = value
    if pools and args.aux_address:
        pools[0]["AuxiliaryAddresses"] = dict(args.aux_address)
    data = {"Name": name, "Driver": args.driver, "Internal": args.internal, "Attachable": args.attachable,
            "EnableIPv4": args.ipv4, "EnableIPv6": args.ipv6, "Options": dict(args.opt), "Labels": dict(args.label),
            "CheckDuplicate": True, "IPAM": {"Driver": args.ipam_driver, "Options": dict(args.ipam_opt), "Config": pools}}
    created = client.post("networks", "create", data=data)
    if created.get("Warning"):
        complain("WARNING: %s" % created["Warning"])
    say(created["Id"])


@command("network ls, network list", "[OPTIONS]", "List networks", _FORMAT + """
-f, --filter filter   Only those that fit (driver=bridge, name=x, ...)
    --no-trunc        Do not cut anything
-q, --quiet           Only the ids
""")
def cmd_network_ls(client, args):
    found = sorted(client.get("networks", filters=filters(args)), key=lambda n: n["Name"])
    show_rows(_NETWORK_FIELDS, found, "{{.ID}}" if args.quiet else args.format, _columns_of("ID Name Driver Scope"),
              full=args.no_trunc)


@command("network inspect", "[OPTIONS] NETWORK [NETWORK...]", "Show all about networks", _INSPECT_OPTIONS + """
-v, --verbose
""")
def cmd_network_inspect(client, args, *names):
    return inspect_objects(client, args, names, ("network",))


@command("network rm, network remove", "[OPTIONS] NETWORK [NETWORK...]", "Remove networks", """
-f, --force   Do not mind when one is not there
""")
def cmd_network_rm(client, args, *names):
    code = 0
    for name in names:
        try:
            client.delete("networks", name)
            say(name)
        except Error as error:
            if not (args.force and error.status == 404):
                complain(str(error))
                code = 1
    return code


@command("network connect", "[OPTIONS] NETWORK CONTAINER", "Connect a container to a network", """
    --alias list           Further name on the network
    --driver-opt list      Option of the driver
    --gw-priority string   The network with the highest gives the default route
    --ip string            IPv4 address
    --ip6 string           IPv6 address
    --link link            Make another container known by name (NAME[:ALIAS])
    --link-local-ip list   Link-local addresses
""")
def cmd_network_connect(client, args, network, container):
    endpoint = {"Links": args.link} if args.link else {}
    for key, values in (("alias", args.alias), ("link-local-ip", args.link_local_ip), ("ip", [args.ip]), ("ip6", [args.ip6]),
                        ("driver-opt", args.driver_opt), ("gw-priority", [args.gw_priority])):
        for value in filter(None, values):
            set_endpoint(endpoint, key, value)
    client.post("networks", network, "connect", data={"Container": container, "EndpointConfig": endpoint})


@command("network disconnect", "[OPTIONS] NETWORK CONTAINER", "Disconnect a container from a network", """
-f, --force   Even if the container is not there
""")
def cmd_network_disconnect(client, args, network, container):
    client.post("networks", network, "disconnect", data={"Container": container, "Force": args.force})


# -- pruning ----------------------------------------------------------------------------------------------------------------

_PRUNE_OPTIONS = """
    --filter filter   Only what fits (until=24h, label=a=b)
-f, --force           Do not ask
"""
# What prune removes: (place in the API, what is listed, its title, whether space is freed)
_PRUNED = {
    "containers": ("ContainersDeleted", "Deleted Containers:", True), "networks": ("NetworksDeleted", "Deleted Networks:", False),
    "volumes": ("VolumesDeleted", "Deleted Volumes:", True), "images": ("ImagesDeleted", "Deleted Images:", True)}


def prune(client, kind, chosen):
    """Remove what is unused and list it; the bytes that are free now."""
    key, title, _ = _PRUNED[kind]
    result = client.post(kind, "prune", filters=chosen)
    if result.get(key):
        say(title)
        for item in result[key]:
            say(item if isinstance(item, str) else "; ".join("%s: %s" % (what.lower(), name) for what, name in item.items()))
        say()
    return result.get("SpaceReclaimed") or 0


def _prune_command(client, args, kind, warning, **more):
    if confirmed(args, warning):
        freed = prune(client, kind, filters(args, **more))
        if _PRUNED[kind][2]:
            say("Total reclaimed space: %s" % format_size(freed))


@command("container prune", "[OPTIONS]", "Remove all stopped containers", _PRUNE_OPTIONS)
def cmd_container_prune(client, args):
    _prune_command(client, args, "containers", "This will remove all stopped containers.")


@command("image prune", "[OPTIONS]", "Remove unused images", """
-a, --all             All that no container uses, not only those without a tag
""" + _PRUNE_OPTIONS)
def cmd_image_prune(client, args):
    what = "images without at least one container associated to them" if args.all else "dangling images"
    _prune_command(client, args, "images", "This will remove all %s." % what, dangling="false" if args.all else "true")


@command("network prune", "[OPTIONS]", "Remove all networks that no container uses", _PRUNE_OPTIONS)
def cmd_network_prune(client, args):
    _prune_command(client, args, "networks", "This will remove all custom networks not used by at least one container.")


@command("volume prune", "[OPTIONS]", "Remove unused volumes", """
-a, --all             Also those with a name
""" + _PRUNE_OPTIONS)
def cmd_volume_prune(client, args):
    _prune_command(client, args, "volumes", "This will remove %s local volumes not used by at least one container."
                   % ("all" if args.all else "anonymous"), all="true" if args.all else None)


@command("system prune", "[OPTIONS]", "Remove all that is unused", """
-a, --all             All unused images, not only those without a tag
    --volumes         Unnamed volumes, too
""" + _PRUNE_OPTIONS)
def cmd_system_prune(client, args):
    kinds = ["containers", "networks"] + ["volumes"] * args.volumes + ["images"]
    words = {"containers": "all stopped containers", "networks": "all networks not used by at least one container",
             "volumes": "all anonymous volumes not used by at least one container",
             "images": "all images without at least one container associated to them" if args.all else "all dangling images"}
    if confirmed(args, "This will remove:\n%s\n" % "".join("  - %s\n" % words[kind] for kind in kinds)):
        freed = sum(prune(client, kind, filters(args, dangling=args.all and kind == "images" and "false")) for kind in kinds)
        say("Total reclaimed space: %s" % format_size(freed))


# -- the daemon -------------------------------------------------------------------------------------------------------------

def _machine():
    machine = os.uname().machine
    return {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}.get(machine, machine)


def _version_text(client_side, server):
    api = client_side["ApiVersion"] + ("" if client_side["ApiVersion"] == client_side["DefaultAPIVersion"]
                                       else " (downgraded from %s)" % client_side["DefaultAPIVersion"])
    yield "Client:"
    for title, value in (("Version", client_side["Version"]), ("API version", api),
                         ("Python version", client_side["PythonVersion"]), ("OS/Arch", "%(Os)s/%(Arch)s" % client_side)):
        yield " %-18s %s" % (title + ":", value)
    if not server:
        return
    yield "\nServer:%s" % (" " + server["Platform"]["Name"] if (server.get("Platform") or {}).get("Name") else "")
    for component in server.get("Components") or [{"Name": "Engine", "Version": server["Version"], "Details": server}]:
        yield " %s:\n  %-17s %s" % (component["Name"], "Version:", component["Version"])
        details = component.get("Details") or {}
        for title, value in (_engine_rows(details) if component["Name"] == "Engine" else details.items()):
            yield ("  %-17s %s" % (title + ":", value)).rstrip()


def _engine_rows(details):
    yield "API version", "%s (minimum version %s)" % (details.get("ApiVersion", ""), details.get("MinAPIVersion", ""))
    for title, key in (("Go version", "GoVersion"), ("Python version", "PythonVersion"), ("Git commit", "GitCommit"),
                       ("Built", "BuildTime")):
        if details.get(key):
            yield title, details[key]
    yield "OS/Arch", "%s/%s" % (details.get("Os", ""), details.get("Arch", ""))
    yield "Experimental", details.get("Experimental", "false")


@command("version", "[OPTIONS]", "Show the versions of client and daemon", _INSPECT_OPTIONS)
def cmd_version(client, args):
    server, failure = None, None
    try:
        server = client.get("version")
    except Error as error:
        failure = error
    client_side = {"Version": VERSION, "ApiVersion": client.version if server else API_VERSION, "DefaultAPIVersion": API_VERSION,
                   "PythonVersion": "%d.%d.%d" % sys.version_info[:3], "Os": "linux", "Arch": _machine()}
    if args.format:
        show_object({"Client": client_side, "Server": server}, args.format)
    else:
        for line in _version_text(client_side, server):
            say(line)
    if failure:
        raise failure


def _plugins(info):
    return [(kind, " ".join((info.get("Plugins") or {}).get(kind) or ())) for kind in ("Volume", "Network", "Log")]


def _security(info):
    lines = []
    for option in info.get("SecurityOptions") or ():
        pairs = [part.partition("=")[::2] for part in option.split(",")]
        lines.append(dict(pairs).get("name", option))
        lines += [" %s: %s" % (key.title(), value) for key, value in pairs if key != "name"]
    return lines


# info's lines: (title, key, or function that gives text, pairs or lines); what is missing or empty is left out
_INFO = (
    ("Containers", "Containers"), (" Running", "ContainersRunning"), (" Paused", "ContainersPaused"),
    (" Stopped", "ContainersStopped"), ("Images", "Images"), ("Server Version", "ServerVersion"), ("Storage Driver", "Driver"),
    ("", "DriverStatus"), ("Logging Driver", "LoggingDriver"), ("Cgroup Driver", "CgroupDriver"),
    ("Cgroup Version", "CgroupVersion"), ("Plugins", _plugins), ("Swarm", lambda i: (i.get("Swarm") or {}).get("LocalNodeState")),
    ("Runtimes", lambda i: " ".join(sorted(i.get("Runtimes") or {}))), ("Default Runtime", "DefaultRuntime"),
    ("Init Binary", "InitBinary"), ("containerd version", lambda i: (i.get("ContainerdCommit") or {}).get("ID")),
    ("runc version", lambda i: (i.get("RuncCommit") or {}).get("ID")), ("Security Options", _security),
    ("Kernel Version", "KernelVersion"), ("Operating System", "OperatingSystem"), ("OSType", "OSType"),
    ("Architecture", "Architecture"), ("CPUs", "NCPU"), ("Total Memory", lambda i: format_binary_size(i.get("MemTotal", 0))),
    ("Name", "Name"), ("ID", "ID"), ("Docker Root Dir", "DockerRootDir"), ("Debug Mode", "Debug"),
    (" File Descriptors", lambda i: i.get("NFd") if i.get("Debug") else None), ("HTTP Proxy", "HttpProxy"),
    ("HTTPS Proxy", "HttpsProxy"), ("No Proxy", "NoProxy"), ("Labels", "Labels"), ("Experimental", "ExperimentalBuild"),
    ("Insecure Registries", lambda i: (i.get("RegistryConfig") or {}).get("InsecureRegistryCIDRs")),
    ("Registry Mirrors", lambda i: (i.get("RegistryConfig") or {}).get("Mirrors")),
    ("Live Restore Enabled", "LiveRestoreEnabled"),
)


def _info_text(info):
    for title, key in _INFO:
        value = info.get(key) if isinstance(key, str) else key(info)
        if value is None or value == "" or value == []:
            continue
        if not isinstance(value, list):
            yield " %s: %s" % (title, _go_text(value))
            continue
        if title:
            yield " %s:" % title
        for item in value:
            yield "  " + (item if isinstance(item, str) else "%s: %s" % tuple(item))


@command("info, system info", "[OPTIONS]", "Show how the daemon is set up", _INSPECT_OPTIONS)
def cmd_info(client, args):
    info = client.get("info")
    if args.format:
        show_object(dict(info, ClientInfo={"Version": VERSION, "Debug": False}), args.format)
        return
    say("Client:\n Version:    %s\n Debug Mode: false\n\nServer:" % VERSION)
    for line in _info_text(info):
        say(line)
    for warning in info.get("Warnings") or ():
        complain(warning)


def _event_text(event):
    actor = event.get("Actor") or {}
    seconds, fraction = divmod(event.get("timeNano") or event["time"] * 10 ** 9, 10 ** 9)
    zone = time.strftime("%z", time.localtime(seconds))
    zone = "Z" if zone == "+0000" else zone[:3] + ":" + zone[3:]
    attributes = ", ".join("%s=%s" % pair for pair in sorted((actor.get("Attributes") or {}).items()))
    stamp = "%s.%09d%s" % (time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(seconds)), fraction, zone)
    text = " ".join((stamp, event.get("Type", ""), event.get("Action", ""), actor.get("ID", "")))
    return text + (" (%s)" % attributes if attributes else "")


@command("events, system events", "[OPTIONS]", "Show what happens, as it happens", """
-f, --filter filter   Only what fits (type=container, event=die, container=x, ...)
    --format string   Template, or json
    --since string    Begin with what has happened since (2013-01-02T13:23:37Z, or 42m)
    --until string    End then
""")
def cmd_events(client, args):
    template = read_template(args.format, "Error parsing format: %s") if args.format not in (None, "", "json") else None
    response = client.request("GET", "events", since=_log_time(args.since), until=_log_time(args.until), filters=filters(args))
    for event in response.objects():
        say(template.render(event) if template else to_json(event) if args.format else _event_text(event))
        sys.stdout.flush()


def _usage(found):
    """The four lines of `system df`: what there is, how much of it is in use, its size and what could be freed."""
    images, containers, volumes, cache = (found.get(key) or [] for key in ("Images", "Containers", "Volumes", "BuildCache"))
    layers = found.get("LayersSize") or 0
    used = [image for image in images if image.get("Containers")]
    running = [container for container in containers if container["State"] in ("running", "paused", "restarting")]
    mounted = [volume for volume in volumes if (volume.get("UsageData") or {}).get("RefCount")]
    busy = [record for record in cache if record.get("InUse")]
    rows = (("Images", images, used, layers, max(layers - sum(i["Size"] - max(i.get("SharedSize", 0), 0) for i in used), 0)),
            ("Containers", containers, running, _written(containers), _written(containers) - _written(running)),
            ("Local Volumes", volumes, mounted, _stored(volumes), _stored(volumes) - _stored(mounted)),
            ("Build Cache", cache, busy, _cached(cache), _cached(cache) - _cached(busy)))
    for kind, items, active, size, free in rows:
        percent = " (%d%%)" % (free * 100 // size) if size and items is not cache else ""
        yield {"Type": kind, "TotalCount": str(len(items)), "Active": str(len(active)), "Size": format_size(size),
               "Reclaimable": format_size(free) + percent}


def _written(containers):
    return sum(container.get("SizeRw") or 0 for container in containers)


def _stored(volumes):
    return sum(max((volume.get("UsageData") or {}).get("Size", 0), 0) for volume in volumes)


def _cached(records):
    return sum(record["Size"] for record in records if not record.get("Shared"))


def _field_getter(name):
    return lambda item: item[name]


_USAGE_FIELDS = {name: (title, _field_getter(name)) for name, title in (
    ("Type", "TYPE"), ("TotalCount", "TOTAL"), ("Active", "ACTIVE"), ("Size", "SIZE"), ("Reclaimable", "RECLAIMABLE"))}


@command("system df", "[OPTIONS]", "Show what takes how much space", _FORMAT + """
-v, --verbose         Each image, container and volume
""")
def cmd_system_df(client, args):
    found = client.get("system", "df")
    if not args.verbose:
        show_rows(_USAGE_FIELDS, _usage(found), args.format, _columns_of("Type TotalCount Active Size Reclaimable"))
        return
    say("Images space usage:\n")
    show_rows(_IMAGE_FIELDS, _image_rows(found.get("Images") or (), False), None,
              _columns_of("Repository Tag ID CreatedSince Size SharedSize UniqueSize Containers"), full=False)
    say("\nContainers space usage:\n")
    show_rows(_CONTAINER_FIELDS, [dict(container, SizeRootFs=0) for container in found.get("Containers") or ()], None,
              _columns_of("ID Image Command LocalVolumes Size RunningFor Status Names"), full=False)
    say("\nLocal Volumes space usage:\n")
    show_rows(_VOLUME_FIELDS, found.get("Volumes") or (), None, _columns_of("Name Links Size"))
    say("\nBuild cache usage: %s" % list(_usage(found))[3]["Size"])


# -- running a command -----------------------------------------------------------------------------------------------------------

def _tls_options(settings):
    """What a Client wants to know for TLS; None without it. What is not given is docker's: ca.pem, cert.pem and key.pem beside
    the config."""
    verify = settings.tlsverify or bool(os.environ.get("DOCKER_TLS_VERIFY"))
    if not (settings.tls or verify or settings.tlscacert or settings.tlscert):
        return None
    folder = os.environ.get("DOCKER_CERT_PATH") or os.path.dirname(config_path())
    options = {"verify": verify}
    for name in ("ca", "cert", "key"):
        default = os.path.join(folder, name + ".pem")
        given = getattr(settings, "tlscacert" if name == "ca" else "tls" + name)
        options[name] = given or (default if os.path.exists(default) else None)
    return options


def run_command(words, start_daemon=None):
    """Carry out a command line; the exit code. What goes wrong is raised."""
    settings, words = read_flags(None, None, read_options(GLOBAL_OPTIONS), words, False)
    if settings is None or not words and not settings.version:
        say(main_help())
        return 0
    Log.debugging = settings.debug
    if settings.config:
        os.environ["DOCKER_CONFIG"] = settings.config
    if settings.version:
        say("%s version %s" % (PROGRAM.title(), VERSION))
        return 0
    if words[0] in GROUPS and words[1:] in ([], ["--help"], ["-help"], ["-h"]):
        say(group_help(words[0]))
        return 0
    name, found, words = find_command(words)
    args, words = read_flags(name, found, found.options, words, found.interspersed)
    if args is None:
        say(command_help(name, found))
        return 0
    check_count(name, found, len(words))
    host = settings.host[-1] if settings.host else os.environ.get("PYDOCK_HOST") or os.environ.get("DOCKER_HOST")
    return found.function(Client(host, _tls_options(settings), start_daemon), args, *words) or 0


def read_flags(name, found, options, words, interspersed):
    """(namespace of the flags, other words); (None, []) when help is asked for. A wrong flag ends the command with its usage."""
    try:
        flags, words = normalize(options, words, interspersed)
        return (None, []) if flags == ["--help"] else (parse_flags(options, flags), words)
    except BadRequest as error:
        if found:
            raise usage_error(name, found, str(error), 125)
        raise CommandError("%s\n\nUsage:  %s [OPTIONS] COMMAND [ARG...]\n\nRun '%s --help' for more information"
                           % (error, PROGRAM, PROGRAM), 125)


def client_main(words, start_daemon=None):
    """The client's process: a command line to its exit code; the only place that turns an error into output. start_daemon()
    brings a daemon up on the default socket, and says so."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        code = run_command(words, start_daemon)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads our output any more; Python must not complain about it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Interrupted as error:
        message, code = str(error), 128 + error.number
    except Error as error:
        message, code = str(error), getattr(error, "code", 1)
    except OSError as error:
        message, code = os_error_text(error), 1
    except Exception as error:
        message, code = "%s: %s: %s; -D shows where" % (PROGRAM, type(error).__name__, error), 1
    debug_traceback()
    if message:
        complain(message)
    return code


########################################################################
# 19. Main
########################################################################
# The two roles. `-d` makes this process the daemon; anything else is a client command. A client of root's that finds no daemon on the
# default socket forks one.

LOG_FILE = "/var/log/pydock.log"
_LISTENERS = "PYDOCK_LISTENERS"  # a daemon that executes itself anew finds its listeners by this environment variable,
_READY = "PYDOCK_READY"  # and the client that it answers when it serves by this one

# flags, attribute of Options, kind, help: the daemon's options of 2013 and of today
DAEMON_FLAGS = (
    ("-D --debug", "debug", bool, "Debug mode"),
    ("-H --host", "hosts", list, "unix://path/to/socket or tcp://host:port to bind to; may be given several times"),
    ("-api-enable-cors --api-enable-cors", "cors", bool, "Enable CORS requests in the remote api (only for web pages that you trust)"),
    ("-b --bridge", "bridge", str, "Attach containers to a pre-existing network bridge; use 'none' for no bridge"),
    ("-d --daemon", "daemon", bool, "Daemon mode"),
    ("-dns --dns", "dns", list, "Set custom dns servers"),
    ("-g --graph --data-root", "root", str, "Path to storage base dir."),
    ("-p --pidfile", "pidfile", str, "File containing process PID"),
    ("-r --restart", "restart", bool, "Restart previously running containers"),
    ("-s --storage-driver", "driver", str, "Storage driver: overlay or vfs"),
    ("--host-root", "host_root", str, "The root that the image 'host' shows"),
    ("--exec-root", "run_root", str, "Folder of the monitors' control sockets"),
    ("--cgroup-parent", "cgroup_parent", str, "Parent of the containers' control groups"),
    ("--iptables", "iptables", bool, "Write firewall rules (--iptables=false: proxies only)"),
    ("--icc", "icc", bool, "Let containers of the default bridge reach each other"),
    ("--ip", "default_ip", str, "Address that ports are published on where none is said"),
    ("--insecure-registry", "insecure_registries", list, "Registry (HOST[:PORT] or network) that may be plain HTTP or have any certificate"),
    ("--registry-mirror", "registry_mirrors", list, "Address of a mirror of Docker Hub"),
    ("--mtu", "mtu", int, "MTU of the bridge and of containers"),
    ("--tls", "use_tls", bool, "Use TLS; --tls=false allows plain TCP beyond loopback"),
    ("--tlsverify", "tls_verify", bool, "Use TLS and ask clients for certificates"),
    ("--tlscacert", "tls_ca", str, "Trust clients' certificates signed by this CA"),
    ("--tlscert", "tls_cert", str, "The daemon's certificate"),
    ("--tlskey", "tls_key", str, "The daemon's key"))


def _boolean(text):
    if text.lower() not in ("1", "t", "true", "0", "f", "false"):
        raise BadRequest("'%s' is no boolean: use true or false" % text)
    return text.lower() in ("1", "t", "true")


def parse_daemon_flags(argv):
    """The daemon's options from the command line: {attribute: value}."""
    flags = {flag: (name, kind) for flags, name, kind, _ in DAEMON_FLAGS for flag in flags.split()}
    flags.update({"-" + flag: entry for flag, entry in list(flags.items()) if flag.startswith("-") and not flag.startswith("--") and len(flag) > 2})
    values, words = {}, list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if flag not in flags and re.fullmatch(r"-[A-Za-z]{2,}", word) and all("-" + c in flags for c in word[1:]):
            words[:0] = ["-" + c for c in word[1:]]  # a cluster: -dD
            continue
        if flag not in flags:
            raise BadRequest("flag provided but not defined: %s. See 'pydock -h'." % printable(flag))
        name, kind = flags[flag]
        if kind is bool:
            values[name] = _boolean(value) if equals else True
            continue
        if not equals:
            if not words:
                raise BadRequest("flag needs an argument: %s" % flag)
            value = words.pop(0)
        values[name] = values.get(name, []) + [value] if kind is list else kind(value)
    return values


def daemon_usage():
    lines = ["Usage of pydock:"]
    for flags, name, kind, text in DAEMON_FLAGS:
        lines.append("  %s: %s" % (", ".join(flags.split()) + ("" if kind is bool else "=\"\""), text))
    return "\n".join(lines)


def is_daemon(argv):
    """Whether the flags before the first command word hold -d."""
    valued = {flag for flags, _, kind, _ in DAEMON_FLAGS if kind is not bool for flag in flags.split()}
    skip = False
    for word in argv:
        if skip:
            skip = False
        elif not word.startswith("-"):
            return False
        elif word in ("-d", "--daemon", "-d=true") or re.fullmatch(r"-[Dr]*d[Dr]*", word):
            return True
        else:
            skip = word in valued
    return False


def bind_listener(host, options):
    """(listener, ssl context or None) of a -H value."""
    if "://" not in host:
        host = ("unix://" if host.startswith("/") else "tcp://") + host
    kind, _, address = host.partition("://")
    if kind == "unix":
        return bind_unix(address or DEFAULT_SOCKET), None
    if kind != "tcp":
        raise BadRequest("-H %s: use unix://PATH or tcp://HOST:PORT" % host)
    name, _, port = address.rpartition(":") if re.search(r":\d+$", address) else (address, "", "4243")
    name = name.strip("[]") or "127.0.0.1"
    tls = server_tls(options) if options.use_tls or options.tls_verify else None
    try:
        info = socket.getaddrinfo(name, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise BadRequest("-H %s: %s" % (host, error.strerror or error))
    if not (tls and options.tls_verify) and not info[4][0].startswith("127.") and info[4][0] != "::1" and options.use_tls is not False:
        raise BadRequest("-H %s: whoever reaches this address would be root on this host: use --tlsverify with certificates, a "
                         "loopback address, or say --tls=false if that is what you want" % host)
    listener = socket.socket(info[0])
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(info[4])
    except OSError as error:
        raise Error("-H %s: %s" % (host, error.strerror))
    listener.listen(4096)  # as Go's: clients written in it do not wait for a full queue of a unix socket
    return listener, tls


def bind_unix(path):
    """A listener on a socket file, mode 0660, of the group docker where there is one: set before anybody can connect."""
    probe = socket.socket(socket.AF_UNIX)
    with probe:
        try:
            probe.connect(path)
        except OSError:
            pass
        else:
            raise Error("another daemon answers on %s: stop it, or name another socket with -H" % path)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Error("%s is in the way: it is no socket" % path)
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    old = os.umask(0o177)
    try:
        listener.bind(path)
    except OSError as error:
        raise Error("cannot listen on %s: %s" % (path, error.strerror or error))
    finally:
        os.umask(old)
    import grp
    with contextlib.suppress(KeyError):
        os.chown(path, 0, grp.getgrnam("docker").gr_gid)
    os.chmod(path, 0o660)
    listener.listen(4096)  # as Go's: clients written in it do not wait for a full queue of a unix socket
    return listener


def server_tls(options):
    import ssl
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    if not options.tls_cert or not options.tls_key:
        raise BadRequest("TLS needs --tlscert and --tlskey")
    try:
        context.load_cert_chain(options.tls_cert, options.tls_key)
        if options.tls_verify:
            context.load_verify_locations(options.tls_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, TypeError) as error:
        raise BadRequest("TLS: the certificates cannot be loaded: %s" % error)
    return context


class Daemon:
    """The daemon's process: spawner first, then the data root, listeners and threads."""

    def __init__(self, options, argv):
        self.options, self.argv = options, argv
        self.stopping = threading.Event()

    def run(self, report):
        """Serve until SIGTERM or SIGINT. Containers go on after that, as after SIGKILL: the next daemon finds them. report(text) is
        told "ready", or why not."""
        Log.debugging = self.options.debug
        os.umask(0o022)
        os.environ["PATH"] = DEFAULT_PATH
        os.chdir("/")
        raise_file_limit()
        preload_all(self.options.cgroup_parent)
        self.spawner = Spawner(self.options.cgroup_parent)
        try:
            self._serve(report)
        except (Error, OSError) as error:
            report(str(error) if isinstance(error, Error) else os_error_text(error))
            raise

    def _serve(self, report):
        engine = Engine(self.options, self.spawner)
        self.listeners = inherited_listeners(self.options) or [
            (host,) + bind_listener(host, self.options) for host in self.options.hosts or ["unix://" + DEFAULT_SOCKET]]
        engine.recover()
        write_file(self.options.pidfile, "%d\n" % os.getpid(), 0o644, sync=False)
        for _, listener, tls in self.listeners:
            threading.Thread(target=serve, args=(engine, listener, tls), daemon=True).start()
        threading.Thread(target=self._watch_spawner, daemon=True).start()
        signal.signal(signal.SIGTERM, lambda *_: self.stopping.set())
        signal.signal(signal.SIGINT, lambda *_: self.stopping.set())
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=engine.networks.reassert, daemon=True).start())
        malloc_trim()
        info("pydock %s serves %s; data root %s, storage driver %s" % (
            VERSION, ", ".join(host for host, _, _ in self.listeners), self.options.root, engine.driver.name))
        report("ready")
        while not self.stopping.wait(3600):
            pass
        self._leave()

    def _leave(self):
        info("the daemon ends; containers go on")
        for host, listener, _ in self.listeners:
            if listener.family == socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    os.unlink(listener.getsockname())
        with contextlib.suppress(OSError):
            os.unlink(self.options.pidfile)
        os._exit(0)

    def _watch_spawner(self):
        """The spawner cannot be forked again from a process with threads: this program is executed anew, with its listeners."""
        with opened_at(pidfd_open(self.spawner.pid)) as fd:
            select.select([fd], [], [])
        if self.stopping.is_set():
            return
        warn("the spawner has ended: the daemon starts itself anew")
        time.sleep(0.2)  # for answers that are on their way
        kept = []
        for host, listener, _ in self.listeners:
            os.set_inheritable(listener.fileno(), True)
            kept.append([host, listener.fileno()])
        environment = dict(os.environ, **{_LISTENERS: json.dumps(kept)})
        os.execve(sys.executable, [sys.executable, "-I", os.path.abspath(__file__)] + self.argv, environment)


def raise_file_limit():
    """As many descriptors as may be had: one a connection, and three a container."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536) if hard > 0 else 65536, hard))


def inherited_listeners(options):
    """The listeners of the daemon that executed itself as us; [] otherwise."""
    found = []
    for host, fd in json.loads(os.environ.pop(_LISTENERS, "[]")):
        os.set_inheritable(fd, False)
        listener = socket.socket(fileno=fd)
        tls = server_tls(options) if listener.family != socket.AF_UNIX and (options.use_tls or options.tls_verify) else None
        found.append((host, listener, tls))
    return found


def run_daemon(argv):
    """The role of -d. Started from source, it first executes itself from byte code: without the compiler's leavings each fork copies
    14 MiB of pages and not 58."""
    values = parse_daemon_flags(argv)
    values.pop("daemon", None)
    options = Options(**values)
    if os.geteuid() != 0:
        raise Forbidden("the daemon must be run as root: sudo python3 pydock.py -d")
    if __file__.endswith(".py"):
        execute_byte_code(options.root, argv)
    set_process_title(" ".join(["pydock"] + argv))
    ready = os.environ.pop(_READY, None)
    Daemon(options, argv).run(functools.partial(_report, int(ready)) if ready else lambda message: None)


def execute_byte_code(root, argv):
    """Become an isolated interpreter (no PYTHON* variables, no user's packages) of this file's byte code, which is kept in the data
    root and made anew when the source has changed. Returns only where that cannot be written."""
    import py_compile
    source, compiled = os.path.abspath(__file__), os.path.join(root, "pydock.%s.pyc" % sys.implementation.cache_tag)
    try:
        there = os.stat(source)
        head = struct.pack("<II", int(there.st_mtime) & 0xFFFFFFFF, there.st_size & 0xFFFFFFFF)  # PEP 552
        if read_file(compiled, b"")[8:16] != head:
            os.makedirs(root, 0o710, exist_ok=True)
            new = compiled + ".made"
            py_compile.compile(source, cfile=new, doraise=True, optimize=2, invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
            write_file(compiled, read_file(new))  # synced: half of it, after a power cut, would be executed for ever
            os.unlink(new)
    except OSError as error:
        warn("running from source, which takes more memory: %s" % os_error_text(error))
        return
    os.execv(sys.executable, [sys.executable, "-I", compiled] + argv)


def _report(fd, message):
    """Tell the client that started this daemon in the background how it went."""
    with contextlib.suppress(OSError):
        os.write(fd, message.encode())
        os.close(fd)


def start_daemon():
    """For a client of root's: start a daemon with all defaults in the background; returns when it serves. Its log is LOG_FILE."""
    ready_read, ready_write = os.pipe2(os.O_CLOEXEC)
    fork(_become_daemon, ready_read, ready_write)
    os.close(ready_write)
    with open(ready_read, "rb") as pipe:
        message = pipe.read().decode("utf-8", "replace")
    if message != "ready":
        raise Error("the daemon could not be started: %s" % (message.strip() or "see %s" % LOG_FILE))
    complain("no daemon was running: one is started in the background, its log is %s" % LOG_FILE)


def _become_daemon(ready_read, ready_write):
    os.close(ready_read)
    os.setsid()
    fork(_run_background, ready_write)


def _run_background(ready_write):
    null, log = os.open("/dev/null", os.O_RDONLY), os.open(LOG_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for target, fd in ((0, null), (1, log), (2, log)):
        os.dup2(fd, target)
    close_all_but([ready_write])
    os.set_inheritable(ready_write, True)
    os.environ[_READY] = str(ready_write)
    try:
        run_daemon(["-d"])
    except Error as error:
        _report(ready_write, str(error))
        raise


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "-help"):
        print(daemon_usage())
        return 0
    if not is_daemon(argv):
        return client_main(argv, start_daemon)
    try:
        run_daemon(argv)
        return 0
    except (Error, OSError) as error:
        debug_traceback()
        print("pydock: %s" % printable(error if isinstance(error, Error) else os_error_text(error)), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

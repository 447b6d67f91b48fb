#!/usr/bin/env python3
"""The tests of pydock: `sudo make test`, or `sudo python3 test_pydock.py [-v] [-k NAME]`.

The tests check behaviour from outside: through the API, pydock's own command line and, where it is installed, the
docker CLI. When root runs them, they enter a network and a mount namespace of their own, so that their bridges,
firewall rules and mounts never touch the host's. Every process that a test starts stays a descendant of the outermost
process, and the last test fails if a process, a mount, an interface, a control group or a file is left over. Without
root, the tests that need root are skipped. The sections have the numbers of the sections of pydock.py.

With CI=true in the environment a skipped test counts as a failed one.
"""
import ast
import atexit
import base64
import builtins
import bz2
import collections
import contextlib
import ctypes
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import http.client
import http.server
import importlib.util
import io
import json
import lzma
import mmap
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import threading
import time
import traceback
import unittest
import urllib.parse
import zlib
from unittest import mock

HERE = os.path.dirname(os.path.abspath(__file__))
PYDOCK = os.path.join(HERE, "pydock.py")
SCRATCH = tempfile.mkdtemp(prefix="pydock-test-")  # holds every file of the tests; the outermost process removes it
OUTERMOST = os.getpid()
atexit.register(shutil.rmtree, SCRATCH, ignore_errors=True)
ALLOWED_IN_CI = ()  # names of tests that may be skipped even with CI=true

sys.dont_write_bytecode = False
sys.pycache_prefix = os.path.join(SCRATCH, "byte-code")  # so that Python writes no __pycache__ beside the source
sys.path.insert(0, HERE)
import pydock  # noqa: E402

########################################################################
# Harness
########################################################################

IS_ROOT = os.geteuid() == 0
DOCKER = shutil.which("docker")
CLIENT_COMMANDS = [[sys.executable, PYDOCK]] + ([[DOCKER]] if DOCKER else [])  # of the installed clients
ENVIRONMENT = {"PATH": pydock.DEFAULT_PATH, "HOME": SCRATCH, "LANG": "C.UTF-8", "TERM": "xterm", "PYTHONPATH": HERE,
               "PYTHONPYCACHEPREFIX": sys.pycache_prefix, "DOCKER_CONFIG": os.path.join(SCRATCH, "docker-config")}
MS_SHARED = 1 << 20  # mount(2)
CGROUP_PARENT = f"pydock-test-{os.getpid()}"
KEPT_IMAGES = ("base:latest", "host:latest", "python:latest")  # Daemon.remove_all leaves these for the next test


def needs_root(thing):
    return unittest.skipUnless(IS_ROOT, "needs root")(thing)


def needs_program(*names):
    missing = [name for name in names if not shutil.which(name, path=pydock.DEFAULT_PATH)]
    return unittest.skipIf(missing, f"needs the program {', '.join(missing)}")


def eventually(check, timeout=15, message="what was awaited did not happen"):
    """Call check() every 20 ms until it returns a true value, and return that value. After `timeout` seconds raise an
    AssertionError with `message`, which may be a function that makes the text."""
    deadline = time.monotonic() + timeout
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(message() if callable(message) else message)
        time.sleep(0.02)


def run_threads(threads, timeout=None):
    """Start all threads and wait until each has ended, for at most `timeout` seconds each."""
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout)


def is_open_to_all(path):
    """Whether every user can reach a file: all folders above it may be searched."""
    folders = [os.path.dirname(path)]
    while folders[-1] != "/":
        folders.append(os.path.dirname(folders[-1]))
    return all(os.stat(folder).st_mode & 1 for folder in folders)


def delete_link(name):
    with pydock.Netlink() as netlink:
        netlink.delete_link(name)


def can_connect(address):
    """Whether somebody listens at a TCP address, (host, port)."""
    with socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET) as sock:
        return sock.connect_ex(address) == 0


def processes():
    """{pid: (parent's pid, state letter, command line)} of all processes in /proc."""
    table = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                with open(f"/proc/{name}/stat", "rb") as f:
                    fields = f.read().rpartition(b")")[2].split()
                with open(f"/proc/{name}/cmdline", "rb") as f:
                    title = f.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
                table[int(name)] = (int(fields[1]), fields[0].decode(), title)
    return table


def descendants(pid):
    """{pid: command line} of all descendants of a process, except zombies."""
    everything = processes()
    children = {}
    for child, (parent, _, _) in everything.items():
        children.setdefault(parent, []).append(child)
    titles, queue = {}, list(children.get(pid, ()))
    while queue:
        child = queue.pop()
        queue += children.get(child, ())
        if everything[child][1] != "Z":
            titles[child] = everything[child][2]
    return titles


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat", "rb") as f:
            return f.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def blunders(log):
    """The names of the exceptions in a daemon's log that are mistakes of the program. An OSError is not: the kernel
    refused something, and with -D the daemon logs the traceback."""
    names = re.findall(r"^\t?([A-Za-z_.]+(?:Error|Exception))\b", log, re.MULTILINE)
    return [name for name in names if not issubclass(getattr(builtins, name, Exception), OSError)]


def read(path, mode="r"):
    with open(path, mode) as f:
        return f.read()


def write(path, data, mode=None):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb" if isinstance(data, bytes) else "w") as f:
        f.write(data)
    if mode is not None:
        os.chmod(path, mode)
    return path


class Answer:
    """A response of the API whose body has been read."""

    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def message(self):
        return json.loads(self.body)["message"]

    @property
    def documents(self):
        """The JSON documents of a stream that has one on each line."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]

    def __repr__(self):
        return f"{self.status} {self.body[:500].decode('utf-8', 'replace')}"


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path, timeout):
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Hijacked:
    """A connection after the daemon has hijacked it: raw bytes go both ways."""

    def __init__(self, sock, head, rest):
        self.sock, self.head, self.received = sock, head, rest

    def send(self, data):
        self.sock.sendall(data)

    def end(self):
        self.sock.shutdown(socket.SHUT_WR)

    def read_until(self, text):
        while text not in self.received:
            data = self.sock.recv(65536)
            if not data:
                raise AssertionError(f"the stream ended before {text!r}: {self.received!r}")
            self.received += data
        before, _, self.received = self.received.partition(text)
        return before + text

    def read_all(self):
        parts = [self.received]
        for data in iter(lambda: self.sock.recv(1 << 20), b""):
            parts.append(data)
        self.received = b""
        return b"".join(parts)

    def close(self):
        self.sock.close()


def frames(data):
    """[(stream number, payload)] of docker's multiplexed stream. A frame that is cut off is an AssertionError."""
    parsed = []
    while data:
        stream, size = struct.unpack_from(">BxxxI", data)
        if len(data) < 8 + size:
            raise AssertionError("a frame is cut off")
        parsed.append((stream, data[8:8 + size]))
        data = data[8 + size:]
    return parsed


def output_of(data, *streams):
    """The joined payloads of a multiplexed stream: of all streams, or only of those with the given numbers."""
    return b"".join(payload for stream, payload in frames(data) if not streams or stream in streams)


class Api:
    """A client of the Engine API on a unix socket. It opens a new connection for each call."""

    def __init__(self, path, timeout=30):
        self.path, self.timeout, self.prefix = path, timeout, "/v1.47"

    @contextlib.contextmanager
    def stream(self, method, path, body=None, headers=None, /, **query):
        """Send a request and yield the response before its body has been read. Query values may be lists, booleans
        and, for filters, dicts."""
        connection = UnixConnection(self.path, self.timeout)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, (bytes, io.IOBase)) and not hasattr(body, "read"):
            body, headers["Content-Type"] = json.dumps(body).encode(), headers.get("Content-Type", "application/json")
        with contextlib.closing(connection):
            # the daemon may refuse and close before the whole body has been sent; the response then says why
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.request(method, self.prefix + path + self._query(query), body, headers)
            yield connection.getresponse()

    @staticmethod
    def _query(values):
        pairs = []
        for name, value in values.items():
            for one in value if isinstance(value, list) else [value]:
                pairs.append((name, json.dumps(one) if isinstance(one, (dict, bool)) else one))
        return "?" + urllib.parse.urlencode(pairs) if pairs else ""

    def call(self, method, path, body=None, headers=None, /, **query):
        with self.stream(method, path, body, headers, **query) as response:
            return Answer(response)

    def get(self, path, /, **query):
        return self.call("GET", path, **query)

    def post(self, path, body=None, /, **query):
        return self.call("POST", path, body, None, **query)

    def delete(self, path, /, **query):
        return self.call("DELETE", path, **query)

    def ok(self, method, path, body=None, /, **query):
        """The response's JSON, or None if the body is empty. An error status fails the test."""
        answer = self.call(method, path, body, None, **query)
        if answer.status >= 400:
            raise AssertionError(f"{method} {path}: {answer!r}")
        return answer.json if answer.body.strip() else None

    def raw(self, data, timeout=10):
        """Send the bytes unchanged on a connection of their own, and return everything that the daemon answers."""
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.settimeout(timeout)
            sock.connect(self.path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
            parts = []
            with contextlib.suppress(ConnectionResetError):
                for part in iter(lambda: sock.recv(65536), b""):
                    parts.append(part)
            return b"".join(parts)

    def hijack(self, path, body=None, upgrade=True, **query):
        data = json.dumps(body).encode() if body is not None else b""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(self.timeout)
        sock.connect(self.path)
        head = (f"POST {self.prefix}{path}{self._query(query)} HTTP/1.1\r\nHost: docker\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n")
        head += "Connection: Upgrade\r\nUpgrade: tcp\r\n\r\n" if upgrade else "\r\n"
        sock.sendall(head.encode() + data)
        stream = Hijacked(sock, "", b"")
        stream.head = stream.read_until(b"\r\n\r\n").decode()
        if not re.match(r"HTTP/1.1 (101|200) ", stream.head):
            with contextlib.closing(sock):
                raise AssertionError(f"{path}: {stream.head}{stream.received or sock.recv(65536)}")
        return stream

    def attach(self, container, **query):
        return self.hijack(f"/containers/{container}/attach",
                           **dict(dict(stream=1, stdin=1, stdout=1, stderr=1), **query))

    # shortcuts for the calls that most tests make

    def create(self, *command, name=None, image="base", **config):
        """Create a container and return its id. Keywords in HOST_KEYS go into HostConfig, all others into the body."""
        host = {key: config.pop(key) for key in list(config) if key in HOST_KEYS}
        body = dict({"Image": image, "Cmd": list(command) or None}, HostConfig=host, **config)
        query = {"name": name} if name else {}
        return self.ok("POST", "/containers/create", body, **query)["Id"]

    def start(self, container):
        self.ok("POST", f"/containers/{container}/start")
        return container

    def run(self, *command, **config):
        return self.start(self.create(*command, **config))

    def wait(self, container, **query):
        return self.ok("POST", f"/containers/{container}/wait", **query)["StatusCode"]

    def inspect(self, container):
        return self.ok("GET", f"/containers/{container}/json")

    def state(self, container):
        return self.inspect(container)["State"]

    def logs(self, container, **query):
        return self.call("GET", f"/containers/{container}/logs", **dict(dict(stdout=1, stderr=1), **query)).body

    def output(self, *command, **config):
        """Run a command to its end in a new container, remove the container, and return both streams' text."""
        container = self.run(*command, **config)
        self.wait(container)
        data = self.logs(container)
        text = (data if config.get("Tty") else output_of(data)).decode("utf-8", "replace")
        self.ok("DELETE", "/containers/" + container, v=1)
        return text

    def execute(self, container, *command, **config):
        """Run a command in a running container: (exit code, text of both streams)."""
        ident = self.ok("POST", f"/containers/{container}/exec", dict(
            {"Cmd": list(command), "AttachStdout": True, "AttachStderr": True}, **config))["Id"]
        with contextlib.closing(self.hijack(f"/exec/{ident}/start", {"Detach": False, "Tty": False})) as stream:
            text = output_of(stream.read_all()).decode("utf-8", "replace")
        return self.ok("GET", f"/exec/{ident}/json")["ExitCode"], text


HOST_KEYS = set("""
    AutoRemove Binds BlkioWeight CapAdd CapDrop CgroupnsMode CpuPeriod CpuQuota CpuShares CpusetCpus CpusetMems Devices
    Dns DnsOptions DnsSearch ExtraHosts GroupAdd Init IpcMode Links LogConfig MaskedPaths Memory MemoryReservation
    MemorySwap Mounts NanoCpus NetworkMode OomScoreAdj PidMode PidsLimit PortBindings Privileged PublishAllPorts
    ReadonlyPaths ReadonlyRootfs RestartPolicy Runtime SecurityOpt ShmSize Sysctls Tmpfs UTSMode Ulimits
    VolumesFrom""".split())


class Result:
    """The outcome of a command: `code`, `out` and `err` (text), `raw` (stdout as bytes)."""

    def __init__(self, argv, code, out, err):
        self.argv, self.code, self.raw = argv, code, out
        self.out, self.err = out.decode("utf-8", "replace"), err.decode("utf-8", "replace")

    def __repr__(self):
        return f"{' '.join(self.argv)}\nexit code {self.code}\n{self.out[-2000:]}{self.err[-2000:]}"


def run_program(argv, input=None, timeout=60, cwd=None, **environment):
    """Run a program to its end and return its Result. Without `input` its stdin is empty. A program that does not end
    within `timeout` seconds fails the test."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
                               env=dict(ENVIRONMENT, **environment))
    try:
        out, err = process.communicate(input if isinstance(input, bytes) else (input or "").encode(), timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"no end after {timeout} seconds: {Result(argv, None, out, err)!r}")
    return Result(argv, process.returncode, out, err)


@functools.lru_cache(maxsize=None)
def installed_program():
    """The command `pydock`, installed from this checkout once for all tests of the command line."""
    prefix = os.path.join(SCRATCH, "installed")
    result = run_program([sys.executable, PYDOCK, "install", "--prefix", prefix])
    if result.code:
        raise AssertionError(repr(result))
    return prefix + "/bin/pydock"


class Terminal:
    """A program on a pseudo-terminal of its own; the test holds the master side and plays the user."""

    def __init__(self, argv, size=(24, 80), **environment):
        self.argv, self.text = argv, ""
        self.ours, self.theirs = os.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.theirs)
        self.process = subprocess.Popen(argv, stdin=self.theirs, stdout=self.theirs, stderr=self.theirs,
                                        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
                                        env=dict(ENVIRONMENT, **environment))

    def resize(self, rows, columns):
        fcntl.ioctl(self.ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def send(self, text):
        os.write(self.ours, text.encode())

    def _take(self, timeout):
        if select.select([self.ours], [], [], timeout)[0]:
            self.text += os.read(self.ours, 65536).decode("utf-8", "replace")

    def expect(self, text, timeout=15):
        """Wait until a text is printed. The output up to the end of that text is consumed and returned."""
        deadline = time.monotonic() + timeout
        while text not in self.text:
            if time.monotonic() > deadline:
                raise AssertionError(f"{text!r} was not printed: {self.text!r}")
            self._take(0.1)
        before, _, self.text = self.text.partition(text)
        return before + text

    def wait(self, timeout=15):
        """Wait for the end of the program and return its exit code. The rest of its output stays in `text`."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise AssertionError(f"{' '.join(self.argv)} did not end: {self.text!r}")
            self._take(0.02)
        while select.select([self.ours], [], [], 0)[0]:
            self._take(0)
        return self.process.returncode

    def attributes(self):
        return termios.tcgetattr(self.theirs)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


class Daemon:
    """A daemon with a data root, a socket and a bridge of its own."""
    count = 0

    def __init__(self, name="daemon", *flags, bridge=True, mac="02:42:00:00:00:01", image=True, root=None,
                 interpreter=None, program=None):
        Daemon.count += 1
        self.folder = os.path.join(SCRATCH, f"{name}-{Daemon.count}")
        os.makedirs(self.folder, mode=0o755)
        self.root = root or os.path.join(self.folder, "root")
        self.socket, self.pidfile, self.log = (os.path.join(self.folder, n) for n in ("s", "pid", "log"))
        self.host = "unix://" + self.socket
        self.api = Api(self.socket)
        self.flags, self.bridge, self.image, self.process = list(flags), None, image, None
        self.interpreter, self.program = interpreter or sys.executable, program or PYDOCK
        self.subnet = f"10.{213 + Daemon.count // 250}.{Daemon.count % 250}"
        if bridge:
            self.bridge = f"pdkt{Daemon.count}"
            self.gateway = self.subnet + ".1"
            with pydock.Netlink() as netlink:
                netlink.add_bridge(self.bridge, mac)
                netlink.add_address(self.bridge, self.gateway + "/24")
                netlink.set_link(self.bridge, up=True)

    def command(self, *flags):
        argv = [self.interpreter, self.program, "-D", "-d", "-g", self.root, "-H", self.host, "-p", self.pidfile,
                "--cgroup-parent", CGROUP_PARENT]
        return argv + ["-b", self.bridge or "none"] + self.flags + list(flags)

    def start(self, *flags, **environment):
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(self.command(*flags), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                            env=dict(ENVIRONMENT, **environment))
        eventually(self._answers, 30, lambda: "the daemon does not answer:\n" + self.log_text())
        if self.image and not any(i["RepoTags"] for i in self.api.ok("GET", "/images/json")):
            self.api.ok("POST", "/pydock/mkimage", name="base")
        return self

    def _answers(self):
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log_text()}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.api.get("/_ping").status == 200

    def log_text(self, start=0):
        return read(self.log, "rb")[start:].decode("utf-8", "replace")[-6000:] if os.path.exists(self.log) else ""

    def kill9(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        self.process.terminate()
        self.process.wait(30)

    def restart(self, *flags):
        """Kill the daemon with SIGKILL and start a new one on the same data root."""
        self.kill9()
        return self.start(*flags)

    @property
    def spawner(self):
        return self._child("pydock: spawner")

    def _child(self, title):
        return next((pid for pid, (parent, _, text) in processes().items()
                     if parent == self.process.pid and text.startswith(title)), None)

    def monitor(self, container):
        """The pid of a container's monitor, or None."""
        ident = self.api.inspect(container)["Id"]
        return next((pid for pid, (_, state, text) in processes().items()
                     if text == "pydock: monitor " + ident and state != "Z"), None)

    def pydock(self, *argv, **options):
        return run_program(self.pydock_argv(*argv), **options)

    def pydock_argv(self, *argv):
        return [installed_program(), "-H", self.host] + list(argv)

    def docker(self, *argv, **options):
        return run_program(self.docker_argv(*argv), **options)

    def docker_argv(self, *argv):
        return [DOCKER or "docker", "-H", self.host] + list(argv)

    def remove_all(self):
        """Remove what a test made: all containers, volumes and networks, and all images but KEPT_IMAGES."""
        api = self.api
        for container in api.ok("GET", "/containers/json", all=1):
            api.delete("/containers/" + container["Id"], force=1, v=1)
        for volume in api.ok("GET", "/volumes")["Volumes"]:
            api.delete("/volumes/" + volume["Name"], force=1)
        for network in api.ok("GET", "/networks"):
            if network["Name"] not in ("bridge", "host", "none"):
                api.delete("/networks/" + network["Id"])
        for image in api.ok("GET", "/images/json", all=1):
            for tag in image["RepoTags"] or [image["Id"]]:
                if tag not in KEPT_IMAGES:
                    api.delete("/images/" + tag, force=1)

    def cleanup(self):
        """End the daemon and remove everything that it made. A monitor that is left over fails the test."""
        if self.process is None:
            return
        try:
            if self.process.poll() is not None:
                self.image = False
                self.start()
            self.remove_all()
            eventually(lambda: not os.listdir(os.path.join(self.root, "run")), 5,
                       lambda: f"monitors are left: {os.listdir(os.path.join(self.root, 'run'))}\n{self.log_text()}")
            self.stop()
        finally:
            if self.process.poll() is None:
                self.kill9()
            if self.bridge:
                with pydock.Netlink() as netlink:
                    netlink.delete_link(self.bridge)
        shutil.rmtree(self.folder)


SHARED = {}  # name -> Daemon, for the daemons that many test classes use


def shared_daemon():
    """The daemon with the usual options, started by the first class that asks for it."""
    if "usual" not in SHARED:
        SHARED["usual"] = Daemon("usual").start()
    return SHARED["usual"]


@needs_root
class DaemonCase(unittest.TestCase):
    """A test that talks to a daemon. Most classes share one daemon; a class with `flags` or `own` has its own."""
    flags, own, image = (), False, True

    @classmethod
    def setUpClass(cls):
        if cls.flags or cls.own:
            cls.daemon = Daemon(cls.__name__, *cls.flags, image=cls.image).start()
            cls.addClassCleanup(cls.daemon.cleanup)
        else:
            cls.daemon = shared_daemon()

    def setUp(self):
        self.api = self.daemon.api
        self.log_start = os.path.getsize(self.daemon.log)
        self.addCleanup(self._tidy)

    def _tidy(self):
        log = self.daemon.log_text(self.log_start)
        if self.daemon.process.poll() is not None:
            self.daemon.start()
        self.daemon.remove_all()
        self.assertEqual(blunders(log), [], log)

    def pydock(self, *argv, code=0, **options):
        return self._checked(self.daemon.pydock(*argv, **options), code)

    def docker(self, *argv, code=0, **options):
        if not DOCKER:
            self.skipTest("needs the docker CLI")
        return self._checked(self.daemon.docker(*argv, **options), code)

    @property
    def command_lines(self):
        """The command lines that are installed: pydock's own and, where it exists, the docker CLI."""
        return [self.pydock] + ([self.docker] if DOCKER else [])

    def _checked(self, result, code):
        self.assertIn(result.code, (code,) if isinstance(code, int) else code, result)
        return result

    def terminal(self, argv, **options):
        terminal = Terminal(argv, **options)
        self.addCleanup(terminal.close)
        return terminal

    def attach(self, container, **query):
        stream = self.api.attach(container, **query)
        self.addCleanup(stream.close)
        return stream

    def folder(self, **files):
        """Make a new folder and return its path. Each keyword is a file in it: name=content."""
        path = tempfile.mkdtemp(dir=self.daemon.folder)
        for name, content in files.items():
            write(os.path.join(path, name), content)
        return path

    def wait_for_output(self, container, text, timeout=15):
        eventually(lambda: text.encode() in self.api.logs(container), timeout,
                   lambda: f"{text!r} is not in {self.api.logs(container)!r}")

    def exported_members(self, image):
        """{name: TarInfo} of an image's whole tree, as a container of the image exports it."""
        container = self.api.create("x", image=image, Entrypoint=[])
        data = self.api.get(f"/containers/{container}/export").body
        self.api.ok("DELETE", "/containers/" + container)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            return {member.name.rstrip("/"): member for member in tar}

    def refused(self, status, answer, part=""):
        """Check that a response is an error with this status, and that its message contains `part` and no internals
        of Python."""
        self.assertEqual(answer.status, status, answer)
        self.assertIn(part, answer.message)
        self.assertNotIn("Traceback", answer.message)
        self.assertNotIn("Errno", answer.message)


def proportional_set_size(pid):
    """The proportional set size (Pss) of a process, in KiB."""
    return int(re.search(r"^Pss:\s+(\d+)", read(f"/proc/{pid}/smaps_rollup"), re.M).group(1))


class MemoryWatch:
    """Samples the memory of a daemon every 50 ms. `total` is {operation: peak of the daemon, its spawner and its
    helpers together}, `daemon` the peak of the daemon alone, both in KiB. `doing` names the operation under way."""

    def __init__(self, daemon):
        self.pid, self.total, self.daemon, self.stopped = daemon.process.pid, {}, 0, threading.Event()
        self.doing = None
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self):
        while not self.stopped.wait(0.05):
            sizes = []
            for pid in [self.pid] + [pid for pid, title in descendants(self.pid).items() if "monitor" not in title]:
                with contextlib.suppress(OSError, AttributeError):  # the process has ended meanwhile
                    sizes.append(proportional_set_size(pid))
            self.daemon = max([self.daemon] + sizes[:1])
            if self.doing:
                self.total[self.doing] = max(self.total.get(self.doing, 0), sum(sizes))

    def stop(self):
        self.stopped.set()
        self.thread.join()


class Commands:
    """Base of tests that both command lines have to pass. `program` of a subclass is "pydock" or "docker", and
    `self.cli` runs that one."""
    @property
    def cli(self):
        return getattr(self, self.program)

    def cli_argv(self, *argv):
        return getattr(self.daemon, self.program + "_argv")(*argv)

    def setUp(self):
        if self.program == "docker" and not DOCKER:
            self.skipTest("needs the docker CLI")
        super().setUp()

    def on_terminal(self, *argv, **options):
        return self.terminal(self.cli_argv(*argv), **options)


class Dockerd:
    """A dockerd that the tests start, without a network for its containers. `host` is its address."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(dir=SCRATCH)
        self.host = f"unix://{self.folder}/socket"
        with open(self.folder + "/log", "w") as log:
            self.process = subprocess.Popen(
                ["dockerd", "--data-root", self.folder + "/data", "--exec-root", self.folder + "/exec", "--pidfile",
                 self.folder + "/pid", "-H", self.host, "--bridge", "none", "--iptables=false"],
                stdout=log, stderr=log, env=ENVIRONMENT)
        eventually(lambda: run_program([DOCKER, "-H", self.host, "version"]).code == 0, 60,
                   lambda: read(self.folder + "/log")[-3000:])

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        for line in reversed(read("/proc/self/mountinfo").splitlines()):
            if self.folder in line.split()[4]:
                pydock.umount(line.split()[4])
        shutil.rmtree(self.folder)


########################################################################
# 1. Prelude
########################################################################

def steps(function, *args):
    """How many lines of pydock.py a call runs: its work, in a measure that does not depend on the machine."""
    count, path = 0, pydock.expand.__code__.co_filename

    def trace(frame, event, arg):
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == path else None
    outer = sys.gettrace()
    sys.settrace(trace)
    try:
        function(*args)
    finally:
        sys.settrace(outer)
    return count


class FormatTest(unittest.TestCase):
    def test_ages_are_dockers(self):
        hour, day = 3600, 86400
        for seconds, text in ((0.5, "Less than a second"), (1.9, "1 second"), (59.9, "59 seconds"),
                              (60, "About a minute"), (119, "About a minute"), (120, "2 minutes"),
                              (1.4 * hour, "About an hour"), (1.5 * hour, "2 hours"), (47.4 * hour, "47 hours"),
                              (47.5 * hour, "2 days"), (13.9 * day, "13 days"), (14 * day, "2 weeks"),
                              (59 * day, "8 weeks"), (60.5 * day, "2 months"), (729 * day, "24 months"),
                              (800.5 * day, "2 years")):
            self.assertEqual(pydock.format_age(seconds), text, seconds)

    def test_times_that_do_not_exist_are_refused(self):
        for text in ("0000-00-00T00:00:00Z", "2020-13-01", "9" * 5000, "9" * 5000 + "s"):
            with self.subTest(text[:20]), self.assertRaisesRegex(pydock.BadRequest, "invalid"):
                pydock.parse_since(text)

    def test_only_a_newline_ends_a_line(self):
        self.assertEqual(pydock.text_lines(b"a\xe2\x80\xa8b\r\x0bc\xff\n\nd"), ["a\u2028b\r\x0bc\udcff", "", "d"])
        self.assertEqual((pydock.text_lines(b"a\n"), pydock.text_lines(b"")), (["a"], []))

    def test_numbers_and_times_that_cannot_be(self):
        many = "9" * 5000
        for parse in (pydock.parse_time, pydock.parse_since, pydock.parse_duration, pydock.parse_size):
            for text in (many, many + "h", "-" + many + "s", many + ".5m", many + "-01-01", "0000-00-00T00:00:00Z",
                         "2024-13-01", "2024-02-30T00:00:00Z", "2024-01-01T24:00:00Z", "9" * 30, "9" * 15 + "h", "\0"):
                with self.assertRaises(pydock.BadRequest, msg=(parse, text[:30])):
                    value = parse(text)
                    if parse is pydock.parse_size and len(text) < 40:
                        raise pydock.BadRequest(f"{value}: a size may be as large as it likes")
        self.assertEqual(pydock.parse_time("2024-02-29T12:30:01.5+01:00"), 1709206201 * 10 ** 9 + 5 * 10 ** 8)
        self.assertEqual([pydock.parse_time(text) for text in ("0001-01-01T00:00:00Z", "1.5", "1970-01-02")],
                         [0, 1500000000, 86400 * 10 ** 9])
        self.assertEqual(pydock.parse_duration("-1h0.5s"), -3600500000000)

    def test_sizes_are_dockers(self):
        for size, text in ((0, "0B"), (999, "999B"), (1000, "1kB"), (24650, "24.65kB"), (1 << 40, "1.1TB")):
            self.assertEqual(pydock.format_size(size), text)
        self.assertEqual((pydock.format_size(24650, 3), pydock.format_binary_size(2 << 30)), ("24.6kB", "2GiB"))


########################################################################
# 2. Kernel
########################################################################

class MessageTest(unittest.TestCase):
    """Messages with descriptors between two of our processes."""

    def setUp(self):
        self.ours, self.theirs = socket.socketpair()
        self.addCleanup(self.ours.close)
        self.addCleanup(self.theirs.close)
        self.theirs.settimeout(10)

    def receive(self):
        value, fds = pydock.receive_message(self.theirs)
        for fd in fds:
            os.close(fd)
        return value, len(fds)

    def test_any_number_of_descriptors(self):
        counts, message = (0, 1, 64, 65, 252, 253, 254, 506, 507, 2600), {"op": "x" * 300000}
        sender = threading.Thread(target=lambda: [
            pydock.send_message(self.ours, value, [self.ours.fileno()] * count)
            for count in counts for value in (message, {})], daemon=True)
        sender.start()
        received = [self.receive() for count in counts for _ in range(2)]
        sender.join(10)
        self.assertEqual(received, [(value, count) for count in counts for value in (message, {})])

    def test_the_order_is_kept(self):
        files = [os.memfd_create(str(number)) for number in range(600)]
        pydock.send_message(self.ours, {}, files)
        _, fds = pydock.receive_message(self.theirs)
        names = [os.readlink(f"/proc/self/fd/{fd}").split()[0] for fd in fds]
        for fd in files + fds:
            os.close(fd)
        self.assertEqual(names, [f"/memfd:{number}" for number in range(600)])

    def test_descriptors_that_are_lost_are_an_error(self):
        """A process that may open no more files loses descriptors of a message, and is told by MSG_CTRUNC alone."""
        import resource
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        pydock.send_message(self.ours, {"n": 1}, [self.ours.fileno()] * 300)
        pydock.send_message(self.ours, {"n": 2})
        before = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 40, limits[1]))
        try:
            with self.assertRaisesRegex(pydock.Error, "ulimit -n"):
                self.receive()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)
        self.assertEqual(self.receive(), ({"n": 2}, 0))

    def test_a_stream_that_ends_within_a_message(self):
        data = struct.pack("=I", 2) + b"{}"
        for size in range(1, len(data)):
            ours, theirs = socket.socketpair()
            with theirs:
                with ours:
                    ours.sendall(data[:size])
                with self.assertRaisesRegex(pydock.Error, "in the middle"):
                    pydock.receive_message(theirs)

    def test_descriptors_beyond_1023_can_be_waited_for(self):
        high = 2000
        os.dup2(self.theirs.fileno(), high)
        self.addCleanup(os.close, high)
        self.assertEqual(pydock.readable([high], 0), [])
        self.ours.send(b"x")
        self.assertEqual(pydock.readable([high], 10), [high])


def run_in_new_network(function, *args):
    """Run function(*args) in a child process that has a new network namespace with lo up. An exception in the child is
    raised again here, as an AssertionError with the child's traceback."""
    read_end, write_end = os.pipe()

    def body():
        try:
            pydock.unshare(pydock.NEWNET)
            with pydock.Netlink() as netlink:
                netlink.set_link("lo", up=True)
            function(*args)
        except BaseException:
            pydock.write_all(write_end, traceback.format_exc().encode())
    pid = pydock.fork(body)
    os.close(write_end)
    with open(read_end) as report:
        text = report.read()
    os.waitpid(pid, 0)
    if text:
        raise AssertionError(text)


def in_new_network(test):
    """Decorator: the test runs in a child with a network namespace of its own."""
    return functools.wraps(test)(lambda self: run_in_new_network(test, self))


def each_in_new_network(*values):
    """Decorator: the test runs once for each of the values, which it gets as its argument, each time in a child with a
    new network namespace."""
    def decorate(test):
        def run(self):
            for value in values:
                with self.subTest(value):
                    run_in_new_network(test, self, value)
        return functools.wraps(test)(run)
    return decorate


class Sleeper:
    """A sleeping process, `pid`, that holds a network namespace open. `run` calls a function inside that namespace."""

    def __init__(self):
        read_end, write_end = os.pipe()

        def body():
            pydock.unshare(pydock.NEWNET)
            os.write(write_end, b"x")
            pydock.close_from(3)
            time.sleep(600)
        self.pid = pydock.fork(body)
        os.close(write_end)
        os.read(read_end, 1)
        os.close(read_end)

    def run(self, function, *args):
        home = os.open("/proc/self/ns/net", os.O_RDONLY)
        namespace = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            pydock.setns(namespace, pydock.NEWNET)
            return function(*args)
        finally:
            pydock.setns(home, pydock.NEWNET)
            os.close(home)
            os.close(namespace)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@needs_root
class NetlinkTest(unittest.TestCase):
    @staticmethod
    def bridge_port_option(link, option):
        """The text of a file in /sys/class/net/LINK/brport. A sysfs shows the network namespace in which it was
        mounted, so a new one is mounted here."""
        with tempfile.TemporaryDirectory(dir=SCRATCH) as path:
            pydock.mount("sysfs", path, "sysfs")
            try:
                return read(f"{path}/class/net/{link}/brport/{option}")
            finally:
                pydock.umount(path)

    @in_new_network
    def test_bridge_address_and_route(self):
        with pydock.Netlink() as netlink:
            netlink.add_bridge("pdkt0", mac="02:42:00:00:00:07", mtu=1400)
            netlink.add_address("pdkt0", "10.9.8.1/24")
            netlink.add_address("pdkt0", "fd00:9::1/64")
            netlink.set_link("pdkt0", up=True)
            netlink.add_route("10.77.0.0/16", gateway="10.9.8.9")
            netlink.add_route(gateway="10.9.8.254", link="pdkt0")
            netlink.add_route("10.78.0.0/16", link="pdkt0")
            link = netlink.link("pdkt0")
            self.assertEqual((link["mac"], link["mtu"], link["kind"], link["up"]),
                             ("02:42:00:00:00:07", 1400, "bridge", True))
            addresses = [(a["address"], a["prefix"]) for a in netlink.addresses("pdkt0")]
            self.assertIn(("10.9.8.1", 24), addresses)
            self.assertIn(("fd00:9::1", 64), addresses)
            routes = {route["network"]: route["gateway"] for route in netlink.routes()}
            self.assertEqual(routes, {"10.9.8.0/24": None, "10.77.0.0/16": "10.9.8.9", None: "10.9.8.254",
                                      "10.78.0.0/16": None})
            netlink.delete_link("pdkt0")
        with pydock.Netlink() as netlink:
            self.assertNotIn("pdkt0", [link["name"] for link in netlink.links()])

    @in_new_network
    def test_veth_into_another_namespace(self):
        def inside():
            with pydock.Netlink() as netlink:
                netlink.add_address("eth0", "10.9.8.2/24")
                netlink.set_link("eth0", up=True)
                return netlink.link("eth0")
        with Sleeper() as other, pydock.Netlink() as netlink:
            netlink.add_bridge("pdkt0")
            netlink.add_address("pdkt0", "10.9.8.1/24")
            netlink.set_link("pdkt0", up=True)
            netlink.add_veth("pdktv1", "eth0", pid=other.pid, mac="02:42:0a:09:08:02", master="pdkt0", mtu=1300)
            netlink.set_hairpin("pdktv1")
            netlink.set_link("pdktv1", up=True)
            netlink.run()
            link = other.run(inside)
            self.assertEqual((link["mac"], link["mtu"]), ("02:42:0a:09:08:02", 1300))
            self.assertEqual(netlink.link("pdktv1")["master"], netlink.index("pdkt0"))
            self.assertEqual(self.bridge_port_option("pdktv1", "hairpin_mode"), "1\n")
            listener = other.run(socket.create_server, ("10.9.8.2", 80))
            with listener, socket.create_connection(("10.9.8.2", 80), 5) as connection:
                self.assertEqual(connection.getsockname()[0], "10.9.8.1")
            netlink.set_link("pdktv1", master="")
            self.assertEqual(netlink.link("pdktv1")["master"], 0)
            netlink.set_link("pdktv1", up=False)
            netlink.set_link("pdktv1", name="pdktv2", mac="02:42:00:00:00:09")
            self.assertEqual(netlink.link("pdktv2")["mac"], "02:42:00:00:00:09")

    @in_new_network
    def test_errors_have_names_and_say_what_they_are_about(self):
        def add(netlink, name):
            netlink.add_bridge(name)
            netlink.run()
        cases = ((errno.ENODEV, "pdktnone", lambda n: n.link("pdktnone")),
                 (errno.ENODEV, "a-name-too-long-for-linux", lambda n: n.link("a-name-too-long-for-linux")),
                 (errno.EEXIST, "add bridge lo", lambda n: add(n, "lo")),
                 (errno.ENODEV, "master", lambda n: n.set_link("lo", master="master")))
        for code, words, action in cases:
            with pydock.Netlink() as netlink, self.assertRaises(OSError) as caught:
                action(netlink)
            self.assertEqual(caught.exception.errno, code)
            self.assertIn(words, str(caught.exception))

    @in_new_network
    def test_a_failure_in_a_batch_is_the_first_one_and_the_rest_was_tried(self):
        with self.assertRaises(OSError) as caught:
            with pydock.Netlink() as netlink:
                for name in ("lo", "pdkt1", "lo", "pdkt2"):
                    netlink.add_bridge(name)
        self.assertEqual(caught.exception.errno, errno.EEXIST)
        with pydock.Netlink() as netlink:
            self.assertEqual({link["name"] for link in netlink.links()} & {"pdkt1", "pdkt2"}, {"pdkt1", "pdkt2"})

    @needs_program("ip")
    @in_new_network
    def test_ip_shows_what_was_made_and_lists_what_we_list(self):
        def ip(*words):
            return json.loads(subprocess.run(["ip", "-j", "-d", *words], stdout=subprocess.PIPE, check=True).stdout)
        with Sleeper() as other, pydock.Netlink() as netlink:
            netlink.add_bridge("pdkt0", mac="02:42:00:00:00:07", mtu=1400)
            netlink.add_address("pdkt0", "10.9.8.1/24")
            netlink.add_address("pdkt0", "fd00:9::1/64")
            netlink.set_link("pdkt0", up=True)
            netlink.add_veth("pdktv1", "eth0", pid=other.pid, mac="02:42:0a:09:08:02", master="pdkt0", mtu=1400)
            netlink.set_hairpin("pdktv1")
            netlink.set_link("pdktv1", up=True)
            netlink.add_route("10.77.0.0/16", gateway="10.9.8.9")
            netlink.add_route(gateway="10.9.8.254", link="pdkt0")
            netlink.run()
            bridge, veth = ip("link", "show", "pdkt0")[0], ip("link", "show", "pdktv1")[0]
            kind, up = bridge["linkinfo"]["info_kind"], "UP" in bridge["flags"]
            self.assertEqual((bridge["address"], bridge["mtu"], kind, up), ("02:42:00:00:00:07", 1400, "bridge", True))
            self.assertEqual((veth["master"], veth["mtu"], veth["linkinfo"]["info_kind"],
                              veth["linkinfo"]["info_slave_data"]["hairpin"]), ("pdkt0", 1400, "veth", True))
            inside = other.run(ip, "link", "show", "eth0")[0]
            self.assertEqual((inside["address"], inside["mtu"]), ("02:42:0a:09:08:02", 1400))
            links, addresses = ip("link", "show"), ip("addr", "show")
            self.assertEqual(sorted((link["name"], link["index"], link["mtu"], link["mac"], link["up"])
                                    for link in netlink.links()),
                             sorted((link["ifname"], link["ifindex"], link["mtu"], link["address"],
                                     "UP" in link["flags"]) for link in links))
            self.assertEqual(sorted((address["address"], address["prefix"]) for address in netlink.addresses()),
                             sorted((address["local"], address["prefixlen"]) for link in addresses
                                    for address in link["addr_info"]))
            self.assertEqual(sorted((route["network"] or "default", route["gateway"]) for route in netlink.routes()),
                             sorted((route["dst"], route.get("gateway")) for route in ip("-4", "route", "show")))

    @in_new_network
    def test_long_batches_and_lists(self):
        with pydock.Netlink() as netlink:
            for number in range(150):
                netlink.add_address("lo", f"10.5.{number}.1/32")
            self.assertEqual(len([a for a in netlink.addresses("lo") if a["address"].startswith("10.5.")]), 150)


########################################################################
# 4. Archives
########################################################################

MTIME = 1600000000


def info(name, **fields):
    """A tarfile.TarInfo with these fields; the keyword `pax` sets pax_headers."""
    member = tarfile.TarInfo(name)
    member.mtime = MTIME
    member.pax_headers = fields.pop("pax", {})
    for key, value in fields.items():
        setattr(member, key, value)
    return member


def tar_of(*members, format=tarfile.PAX_FORMAT):
    """The bytes of a tar file with these members, each a TarInfo or a pair (TarInfo, content)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for member in members:
            member, content = member if isinstance(member, tuple) else (member, b"")
            member.size = len(content) if member.type in (b"0", b"S") else member.size
            tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def file_(name, content=b"", **fields):
    return info(name, mode=fields.pop("mode", 0o644), **fields), content


def folder(name, **fields):
    return info(name, type=tarfile.DIRTYPE, mode=fields.pop("mode", 0o755), **fields)


def symlink(name, target):
    return info(name, type=tarfile.SYMTYPE, linkname=target)


def hardlink(name, target):
    return info(name, type=tarfile.LNKTYPE, linkname=target)


def reader(data, name="x.tar"):
    return pydock.TarReader(pydock.open_compressed(io.BytesIO(data)), name)


class Slow:
    """A readable file that returns at most `step` bytes at a time."""

    def __init__(self, data, step=7):
        self.data, self.step = data, step

    def read(self, size):
        part, self.data = self.data[:min(size, self.step)], self.data[min(size, self.step):]
        return part


class ArchiveCase(unittest.TestCase):
    def setUp(self):
        self.top = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.top, True)
        self.root = self.path("root")
        os.mkdir(self.root)
        self.root_fd = self.open(self.root)

    def path(self, *parts):
        return os.path.join(self.top, *parts)

    def open(self, path):
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.addCleanup(os.close, fd)
        return fd

    def make(self, name):
        os.mkdir(self.path(name))
        return self.path(name), self.open(self.path(name))

    def unpack(self, data, fd=None, **options):
        return pydock.unpack(reader(data), self.root_fd if fd is None else fd, **options)

    def pack(self, fd=None, **options):
        out = []
        pydock.pack(self.root_fd if fd is None else fd, out.append, **options)
        return b"".join(out)

    def in_root(self, *parts):
        return os.path.join(self.root, *parts)

    def text(self, *parts):
        with open(self.in_root(*parts), "rb") as f:
            return f.read()

    def refused(self, data, part="", status=400, **options):
        with self.assertRaises(pydock.Error) as caught:
            self.unpack(data, **options)
        self.assertEqual(caught.exception.status, status)
        self.assertIn(part, str(caught.exception))


@needs_root
class RootArchiveCase(ArchiveCase):
    pass


class CompressionTest(ArchiveCase):
    CONTENT = os.urandom(100000) + bytes(3000000) + b"end"

    def read_all(self, data, step=None, size=4096):
        file = pydock.open_compressed(Slow(data, step) if step else io.BytesIO(data))
        out = []
        while True:
            part = file.read(size)
            if not part:
                file.close()
                return b"".join(out)
            self.assertLessEqual(len(part), size)
            out.append(part)

    def variants(self):
        zstd = None
        if shutil.which("zstd"):
            zstd = subprocess.run(["zstd", "-qc"], input=self.CONTENT, stdout=subprocess.PIPE).stdout
        return {"gzip": gzip.compress(self.CONTENT), "bzip2": bz2.compress(self.CONTENT),
                "xz": lzma.compress(self.CONTENT), **({"zstd": zstd} if zstd else {})}

    def test_every_kind_is_found_by_content(self):
        for kind, data in self.variants().items():
            with self.subTest(kind):
                self.assertEqual(self.read_all(data), self.CONTENT)
                self.assertEqual(self.read_all(data, step=1000), self.CONTENT)
        self.assertEqual(self.read_all(self.CONTENT), self.CONTENT)
        self.assertEqual(self.read_all(b""), b"")
        self.assertEqual(self.read_all(b"BZ"), b"BZ")

    def test_several_members_are_one_stream(self):
        for kind, data in self.variants().items():
            with self.subTest(kind):
                self.assertEqual(self.read_all(data + data), self.CONTENT * 2)

    def test_zeros_after_the_end_are_padding_and_the_rest_is_damage(self):
        for kind, data in self.variants().items():
            if kind != "zstd":
                with self.subTest(kind):
                    self.assertEqual(self.read_all(data + bytes(100000)), self.CONTENT)
                    with self.assertRaises(pydock.BadRequest):
                        self.read_all(data + b"junk at the end")

    def test_truncated_and_damaged_streams_are_errors(self):
        for kind, data in self.variants().items():
            for cut in (30, len(data) // 2, len(data) - 1):
                with self.subTest(kind, cut=cut), self.assertRaises(pydock.BadRequest):
                    self.read_all(data[:cut])
            broken = bytearray(data)
            broken[len(broken) // 3] ^= 0x55
            with self.subTest(kind), self.assertRaises(pydock.BadRequest):
                self.read_all(bytes(broken))

    @needs_root
    def test_a_plain_archive_whose_first_name_is_a_codecs_mark(self):
        self.unpack(tar_of(file_("BZh9", b"plain")))
        self.assertEqual(self.text("BZh9"), b"plain")

    def test_xz_with_a_huge_dictionary_is_refused(self):
        data = lzma.compress(b"x" * 1000, filters=[{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}])
        with self.assertRaises(pydock.BadRequest):
            self.read_all(data)

    def test_a_bomb_is_read_in_bounded_memory(self):
        out = io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="w", compresslevel=9) as f:
            for _ in range(400):
                f.write(bytes(1 << 20))
        before, total = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
        file = pydock.open_compressed(io.BytesIO(out.getvalue()))
        while True:
            part = file.read(1 << 18)
            if not part:
                break
            total += len(part)
        self.assertEqual(total, 400 << 20)
        self.assertLess(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, 50000)  # KiB


class ReaderTest(ArchiveCase):
    def entries(self, data, **options):
        return [(e, e.read()) for e in pydock.TarReader(io.BytesIO(data))]

    def test_entries_that_only_describe_others_are_skipped(self):
        """A volume label, a Solaris ACL and an old GNU long name (types V, A, N) are no files."""
        for kind in b"VAN":
            info = tarfile.TarInfo("label")
            info.size, info.type = 5, bytes([kind])
            data = info.tobuf(tarfile.GNU_FORMAT) + b"words".ljust(512, b"\0") + tar_of(file_("a", b"1"))
            self.assertEqual([(entry.name, content) for entry, content in self.entries(data)], [("a", b"1")])

    def test_reads_what_tarfile_writes_in_all_its_forms(self):
        long_name, utf8 = "d/" * 60 + "x" * 150, "\u00e9\u4e16/\U0001f600"
        members = [file_("a", b"1" * 1000, uid=1000, gid=1001), folder("d"), symlink("s", "t" * 200),
                   hardlink("h", "a"), file_(long_name, b"long"), file_(utf8, b"u"),
                   info("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3), info("fifo", type=tarfile.FIFOTYPE),
                   file_("empty"), file_("new\nline", b"n")]
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            data = tar_of(*members, format=format)
            with self.subTest(format), tarfile.open(fileobj=io.BytesIO(data)) as tar:
                entries = {e.name.rstrip("/"): (e, content) for e, content in self.entries(data)}
                for member in tar.getmembers():
                    e, content = entries.pop(member.name)
                    self.assertEqual(
                        (e.type, e.mode, e.uid, e.gid, e.size, e.mtime, e.linkname, e.devmajor, e.devminor),
                        (member.type.decode(), member.mode, member.uid, member.gid, member.size, member.mtime * 10 ** 9,
                         member.linkname, member.devmajor, member.devminor))
                    self.assertEqual(content, tar.extractfile(member).read() if member.isreg() else b"")
                self.assertEqual(entries, {})

    def test_a_source_that_gives_few_bytes_at_a_time(self):
        data = tar_of(file_("a", b"x" * 3000), file_("n" * 300, b"y" * 513))
        entries = [(e.name, e.read()) for e in pydock.TarReader(Slow(data))]
        self.assertEqual(entries, [("a", b"x" * 3000), ("n" * 300, b"y" * 513)])

    def test_numbers_that_octal_digits_cannot_hold(self):
        data = tar_of(file_("a", uid=5000000, gid=4000000000, mtime=-5), format=tarfile.GNU_FORMAT)
        (e, _), = self.entries(data)
        self.assertEqual((e.uid, e.gid, e.mtime), (5000000, 4000000000, -5 * 10 ** 9))
        data = tar_of(file_("a", uid=5000000, pax={"mtime": "-1.25"}))
        (e, _), = self.entries(data)
        self.assertEqual((e.uid, e.mtime), (5000000, -1250000000))

    def test_times_out_of_range_are_clamped(self):
        for text, seconds in (("99999999999999", (1 << 34) - (1 << 31) - 1), ("-99999999999999", -(1 << 31))):
            (e, _), = self.entries(tar_of(file_("a", pax={"mtime": text})))
            self.assertEqual(e.mtime, seconds * 10 ** 9)

    def test_global_headers_hold_until_they_are_taken_back(self):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT,
                          pax_headers={"comment": "c", "SCHILY.xattr.user.g": "1", "uid": "7"}) as tar:
            tar.addfile(info("a"))
        (e, _), = self.entries(out.getvalue())
        self.assertEqual((e.name, e.xattrs, e.uid), ("a", {"user.g": b"1"}, 7))

    def test_xattrs_of_both_forms(self):
        data = tar_of(file_("a", pax={"SCHILY.xattr.user.x": "value", "LIBARCHIVE.xattr.user.y%20z": "AAEC"}))
        (e, _), = self.entries(data)
        self.assertEqual(e.xattrs, {"user.x": b"value", "user.y z": b"\0\1\2"})

    def test_v7_archives(self):
        block = bytearray(tar_of(file_("old/", b""), format=tarfile.USTAR_FORMAT)[:512])
        block[156:157], block[257:265] = b"\0", bytes(8)
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        (e, _), = self.entries(bytes(block) + bytes(1024))
        self.assertEqual((e.type, e.name), (pydock.TAR_DIRECTORY, "old/"))

    def test_the_end_mark(self):
        data = tar_of(file_("a", b"x"))
        for tail, ended in ((bytes(1024), True), (bytes(512), True), (b"", False), (bytes(1024) + b"whatever", True)):
            r = pydock.TarReader(io.BytesIO(data[:1024] + tail))
            self.assertEqual([e.name for e in r], ["a"])
            self.assertEqual(r.ended, ended)

    def test_malformed_archives_are_refused(self):
        good = tar_of(file_("a", b"x" * 1000), file_("b", b"y"))
        pax = tar_of(file_("n" * 200, b"y"))

        def patched(offset, new, data=good, resum=True):
            block = bytearray(data)
            block[offset:offset + len(new)] = new
            if resum:
                block[148:156] = b"        "
                block[148:156] = b"%06o\0 " % sum(block[:512])
            return bytes(block)

        cases = {"not tar": b"hello, world" * 100, "short": b"abc", "cut in a header": good[:300],
                 "cut in content": good[:1000], "checksum": patched(0, b"Z", resum=False),
                 "size": patched(124, b"zzzzzzzzzzz"), "negative": patched(124, b"-0000000001"),
                 "base 256 negative": patched(124, b"\xff" * 12), "huge uid": patched(108, b"\x80\0\0\1\0\0\0\0"),
                 "type": patched(156, b"?"), "multi-volume": patched(156, b"M"),
                 "zeros within": good[:512] + good[512:1536] +
                 bytes(512) + good[1536:], "lone pax": pax[:1024] + bytes(1024),
                 "pax length": patched(512, b"99999 ", pax, False), "pax text": patched(512, b"xyz", pax, False),
                 "pax size": patched(124, b"77777777777", pax), "uid word": tar_of(file_("a", pax={"uid": "root"})),
                 "NUL": tar_of(file_("a", pax={"path": "a\0b"})),
                 "many digits": tar_of(file_("a", pax={"mtime": "9" * 10000})),
                 "long": tar_of(file_("x/" * 2100 + "a")),
                 "long GNU": tar_of(file_("x/" * 2100 + "a"), format=tarfile.GNU_FORMAT),
                 "device": patched(329, b"\x80\xff\xff\xff\xff\xff\xff\xff", tar_of(info("c", type=tarfile.CHRTYPE)))}
        for name, data in cases.items():
            with self.subTest(name), self.assertRaises(pydock.BadRequest) as caught:
                for e in pydock.TarReader(io.BytesIO(data), "x.tar"):
                    e.read()
            self.assertIn("x.tar is not a valid tar archive: ", str(caught.exception), name)

    def test_random_damage_never_does_worse_than_bad_request(self):
        rng = random.Random(5)
        good = tar_of(file_("a" * 150, b"x" * 700, pax={"SCHILY.xattr.user.a": "b"}), folder("d"), file_("b", b"y"))
        for _ in range(500):
            data = bytearray(good)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data) - 1024)] = rng.randrange(256)
            if rng.random() < 0.7:  # with correct checksums the damage gets past the first check
                for offset in range(0, len(data) - 511, 512):
                    if data[offset + 257:offset + 262] == b"ustar":
                        data[offset + 148:offset + 156] = b"        "
                        data[offset + 148:offset + 156] = b"%06o\0 " % sum(data[offset:offset + 512])
            try:
                for e in pydock.TarReader(io.BytesIO(bytes(data))):
                    e.read(100)
            except pydock.BadRequest:
                pass

    def test_sparse_files_of_every_form_and_hostile_maps(self):
        if not shutil.which("tar"):
            self.skipTest("tar is missing")
        path = self.path("sparse")
        os.mkdir(self.path("empty"))
        with open(path, "wb") as f:
            for number in list(range(40)) + [100]:
                f.seek(number * 131072)
                f.write(b"%04d" % number * 1024)
            f.truncate(101 * 131072 + 5)
        with open(path, "rb") as f:
            content = f.read()
        for form in (["--format=gnu"], ["--format=pax", "--sparse-version=0.0"],
                     ["--format=pax", "--sparse-version=0.1"], ["--format=pax", "--sparse-version=1.0"]):
            with self.subTest(form):
                data = subprocess.check_output(["tar", "-cSf", "-", *form, "-C", self.top, "sparse", "empty"])
                self.assertLess(len(data), 400000)
                (e, extracted), (other, _) = self.entries(data)
                self.assertEqual((e.name, e.size, other.name), ("sparse", len(content), "empty/"))
                self.assertEqual(extracted, content)
                self.unpack(data, owner=False)
                self.assertEqual(self.text("sparse"), content)
                self.assertLess(os.stat(self.in_root("sparse")).st_blocks * 512, 600000)
        # maps whose pieces overlap, exceed the file, start below 0, are incomplete, or need more data than there is
        for pieces, size in (("0,10,5,10", 100), ("0,1000", 10), ("-5,5", 10), ("0,10,20", 30), ("0,600", 1 << 62)):
            data = tar_of(file_("s", b"x" * 512, pax={"GNU.sparse.map": pieces, "GNU.sparse.size": str(size)}))
            with self.subTest(pieces), self.assertRaises(pydock.BadRequest):
                self.entries(data)

    def test_the_work_for_the_map_of_a_sparse_file_grows_with_its_length(self):
        copied = 0

        class Block(bytes):
            """A block that counts the bytes that are copied when it is appended to others."""

            def __radd__(self, other):
                nonlocal copied
                copied += len(other) + len(self)
                return bytes(other) + bytes(self)

        def work(pieces):
            nonlocal copied
            copied = 0
            numbers = b"".join(b"%d\n0\n" % (n * 512) for n in range(pieces))
            data = tar_of(file_("s", (b"%d\n" % pieces + numbers).ljust(512 * (len(numbers) // 512 + 2), b"\0"), pax={
                "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(pieces * 512)}))
            take = pydock.TarReader._take
            with mock.patch.object(pydock.TarReader, "_take", lambda reader, size: Block(take(reader, size))):
                e = next(pydock.TarReader(io.BytesIO(data)))
            self.assertEqual(len(e.sparse), pieces)
            return copied, steps(lambda: [e.read(1 << 20) for _ in range(pieces + 1)])
        for one, two in zip(work(1000), work(2000)):
            self.assertLess(two, 3 * one)

    def test_a_sparse_map_without_an_end_is_refused_at_once(self):
        data = tar_of(file_("s", b"1" * (1 << 20), pax={"GNU.sparse.major": "1", "GNU.sparse.realsize": "5"}))
        with mock.patch.object(pydock.TarReader, "_take", autospec=True, side_effect=pydock.TarReader._take) as take, \
                self.assertRaisesRegex(pydock.BadRequest, "map is malformed"):
            next(pydock.TarReader(io.BytesIO(data)))
        self.assertLess(take.call_count, 10)

    def test_the_work_for_pax_headers_grows_with_their_length(self):
        def work(count):
            """The bytes that the local variables of _pax_records have, summed over the lines that it runs."""
            total = 0

            def trace(frame, event, arg):
                nonlocal total
                if frame.f_code.co_name == "_pax_records":
                    total += len(frame.f_locals.get("value", b""))
                return trace
            reader, data = pydock.TarReader(io.BytesIO()), b"24 GNU.sparse.offset=10\n" * count
            outer = sys.gettrace()
            sys.settrace(trace)
            try:
                self.assertEqual(reader._pax_records(data)["GNU.sparse.map"].count(b"10"), count)
            finally:
                sys.settrace(outer)
            return total
        self.assertLess(work(2000), 3 * work(1000))

    def test_the_records_of_global_headers_do_not_add_up(self):
        """Each entry would cost the time of all global records, and each further header of one entry its memory."""
        def archive(**pax):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT, pax_headers=pax) as tar:
                tar.addfile(info("a"))
            return out.getvalue()
        apply = pydock.TarReader._apply
        with mock.patch.object(pydock.TarReader, "_apply", autospec=True, side_effect=apply) as applied:
            self.entries(archive(uid="7", **{f"comment.{n}": "c" for n in range(1000)}))
        self.assertEqual([set(call.args[2]) for call in applied.mock_calls], [{"uid"}])
        with self.assertRaisesRegex(pydock.BadRequest, "global headers are longer than 8192 bytes"):
            self.entries(archive(**{"SCHILY.xattr.user.a": "x" * 9000}))
        data = tar_of(file_("a", pax={"comment": "c" * 600000}))
        header = data[:data.rindex(b"a" + bytes(99))]
        self.assertEqual(self.entries(header + tar_of(file_("a")))[0][0].name, "a")
        with self.assertRaisesRegex(pydock.BadRequest, "a header of 600.* bytes is too long"):
            self.entries(header * 2 + tar_of(file_("a")))

    def test_names_in_errors_are_escaped(self):
        member = info("\x1b[31mred")
        member.type = b"z"
        with self.assertRaisesRegex(pydock.BadRequest, r"\\x1b\[31mred has the unknown type"):
            self.entries(member.tobuf() + bytes(1024))

    def test_an_entry_is_a_file(self):
        inner = tar_of(file_("inside", b"found"))
        outer = tar_of(file_("layer.tar", gzip.compress(inner)), file_("after", b"z"))
        names = []
        for e in reader(outer):
            names.append(e.name)
            if e.name == "layer.tar":
                self.assertEqual([i.read() for i in pydock.TarReader(pydock.open_compressed(e))], [b"found"])
        self.assertEqual(names, ["layer.tar", "after"])


class WriterTest(ArchiveCase):
    def write(self, *entries):
        out = []
        writer = pydock.TarWriter(out.append)
        for e, source in entries:
            writer.add(e, source)
        writer.close()
        return b"".join(out)

    def sample(self):
        entry = pydock.Entry
        return [(entry("dir/", pydock.TAR_DIRECTORY, 0o1777, mtime=MTIME * 10 ** 9 + 5), None),
                (entry("dir/file", mode=0o4755, uid=1000, gid=3000000, size=5, mtime=MTIME * 10 ** 9), b"hello"),
                (entry("dir/" + "n" * 120, size=600, xattrs={"user.b": b"\0\n=", "security.capability": b"c"}),
                 b"x" * 600),
                (entry("p" * 90 + "/" + "q" * 90, pydock.TAR_LINK, linkname="dir/file"), None),
                (entry("\u00e9\udcff", pydock.TAR_SYMLINK, 0o777, linkname="t" * 101, mtime=-3 * 10 ** 9), None),
                (entry("tty", pydock.TAR_CHAR, 0o620, devmajor=4, devminor=300), None)]

    def test_the_form_is_fixed(self):
        """Layers are named by the digest of these bytes. If this test fails, TAR_FORM needs a new number, and pydock
        must still be able to read layers of the old form."""
        self.assertEqual(pydock.TAR_FORM, 1)
        self.assertEqual(hashlib.sha256(self.write(*self.sample())).hexdigest(),
                         "fe73ba69eb11c454b15b9ff566c8fbba4da69edb6cb4ea72d48fac6be09e1f42")

    def test_what_is_written_is_read_again(self):
        data = self.write(*self.sample())
        for (written, source), entry in zip(self.sample(), pydock.TarReader(io.BytesIO(data))):
            for field in ("name", "type", "mode", "uid", "gid", "size", "linkname", "devmajor", "devminor", "xattrs"):
                self.assertEqual(getattr(entry, field), getattr(written, field))
            self.assertEqual(entry.mtime, written.mtime // 10 ** 9 * 10 ** 9)
            self.assertEqual(entry.read(), source or b"")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            self.assertEqual([m.name for m in tar], [e.name.rstrip("/") for e, _ in self.sample()])
            self.assertEqual(tar.getmembers()[2].pax_headers["SCHILY.xattr.security.capability"], "c")

    def test_gnu_tar_reads_it(self):
        if not shutil.which("tar"):
            self.skipTest("tar is missing")
        listed = subprocess.run(["tar", "-tvf", "-", "--quoting-style=literal"], input=self.write(*self.sample()),
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.assertEqual((listed.returncode, listed.stderr), (0, b""))
        self.assertIn(b"dir/" + b"n" * 120, listed.stdout)
        self.assertIn(b"\xc3\xa9\xff -> " + b"t" * 101, listed.stdout)

    def test_content_always_has_the_size_of_its_header(self):
        e = pydock.Entry("a", size=1000)
        with tempfile.TemporaryFile() as f:
            for length in (500, 1000, 2000):
                f.seek(0)
                f.truncate(0)
                f.write(b"z" * length)
                for source in (b"z" * length, f.fileno(), io.BytesIO(b"z" * length)):
                    f.seek(0)
                    data = self.write((e, source), (pydock.Entry("b"), None))
                    entries = [(x.name, x.read()) for x in pydock.TarReader(io.BytesIO(data))]
                    self.assertEqual(entries, [("a", b"z" * min(length, 1000) + bytes(max(0, 1000 - length))),
                                               ("b", b"")])

    def test_sendfile_gives_the_same_bytes(self):
        with open(self.in_root("big"), "wb") as f:
            f.write(os.urandom(3000000))
        os.utime(self.in_root("big"), (MTIME, MTIME))
        plain = self.pack()
        with tempfile.TemporaryFile(buffering=0) as out:
            pydock.pack(self.root_fd, lambda data: pydock.write_all(out.fileno(), data), fd=out.fileno())
            out.seek(0)
            self.assertEqual(out.read(), plain)


class PackTest(RootArchiveCase):
    def build(self):
        root = self.root
        for name in ("b", "a/deep/er", "a.b"):
            os.makedirs(os.path.join(root, name))
        for name, content in (("b/file", b"1" * 100000), ("a/deep/f", b""), ("z\n\udcff\u00e9", b"odd"),
                              ("a/suid", b"s")):
            with open(os.path.join(root, name), "wb") as f:
                f.write(content)
        os.chown(os.path.join(root, "a/suid"), 1000, 1001)
        os.chmod(os.path.join(root, "a/suid"), 0o6755)
        os.chmod(os.path.join(root, "b"), 0o1777)
        os.link(os.path.join(root, "b/file"), os.path.join(root, "b/second"))
        os.symlink("../../outside", os.path.join(root, "a/link"))
        os.mkfifo(os.path.join(root, "fifo"))
        os.mknod(os.path.join(root, "null"), stat.S_IFCHR, os.makedev(1, 3))
        os.chmod(os.path.join(root, "null"), 0o666)
        os.mknod(os.path.join(root, "socket"), stat.S_IFSOCK | 0o666)
        os.setxattr(os.path.join(root, "a/suid"), "user.note", b"\0x")
        os.setxattr(os.path.join(root, "a/suid"), "security.capability", struct.pack("<5I", 0x02000001, 0x400, 0, 0, 0))
        os.setxattr(os.path.join(root, "a"), "trusted.secret", b"no")
        for folder_, folders, files in os.walk(root, topdown=False):
            for name in folders + files:
                os.utime(os.path.join(folder_, name), ns=(1, MTIME * 10 ** 9 + 123456789), follow_symlinks=False)

    def test_names_are_sorted_and_links_found(self):
        self.build()
        entries = list(pydock.TarReader(io.BytesIO(self.pack())))
        self.assertEqual([e.name for e in entries],
                         ["a/", "a/deep/", "a/deep/er/", "a/deep/f", "a/link", "a/suid", "a.b/", "b/", "b/file",
                          "b/second", "fifo", "null", "z\n\udcff\u00e9"])
        by_name = {e.name: e for e in entries}
        self.assertEqual((by_name["b/second"].type, by_name["b/second"].linkname), (pydock.TAR_LINK, "b/file"))
        self.assertEqual(by_name["a/"].xattrs, {})
        self.assertEqual(sorted(by_name["a/suid"].xattrs), ["security.capability", "user.note"])

    def test_packing_what_was_unpacked_gives_the_same_bytes(self):
        self.build()
        data = self.pack()
        other, fd = self.make("other")
        self.unpack(data, fd)
        self.assertEqual(self.pack(fd), data)
        status = os.stat(os.path.join(other, "a/suid"))
        self.assertEqual((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid), (0o6755, 1000, 1001))
        self.assertEqual(os.stat(os.path.join(other, "null")).st_mode, stat.S_IFCHR | 0o666)

    def test_gnu_tar_and_unpack_agree(self):
        if not shutil.which("tar"):
            self.skipTest("tar is missing")
        self.build()
        _, fd = self.make("ours")
        theirs, theirs_fd = self.make("theirs")
        for form in ("gnu", "pax"):
            data = subprocess.check_output(["tar", "-cf", "-", "--format=" + form, "--xattrs", "-C", self.root, "."],
                                           stderr=subprocess.DEVNULL)
            self.unpack(data, fd)
            subprocess.run(["tar", "-xpf", "-", "--xattrs", "--xattrs-include=*", "-C", theirs], input=data, check=True)
            self.assertEqual(pydock.tree_changes(fd, [theirs_fd]), [])
        data = self.pack()
        shutil.rmtree(theirs)
        os.mkdir(theirs)
        subprocess.run(["tar", "-xpf", "-", "--xattrs", "--xattrs-include=*", "-C", theirs], input=data, check=True)
        self.assertEqual(pydock.tree_changes(fd, [self.open(theirs)]), [])

    def test_name_paths_and_exclude(self):
        self.build()

        def names(**options):
            return [e.name for e in pydock.TarReader(io.BytesIO(self.pack(**options)))]

        self.assertEqual(names(name="top", paths=None)[:3], ["top/", "top/a/", "top/a/deep/"])
        self.assertEqual(names(paths=["b/file", ("a/deep", "renamed")]),
                         ["b/file", "renamed/", "renamed/er/", "renamed/f"])
        self.assertEqual(names(paths=["/b"]), ["b/", "b/file", "b/second"])
        self.assertNotIn("b/file", names(exclude=lambda path: path == "b"))
        with self.assertRaises(pydock.NotFound):
            names(paths=["b/none"])
        with self.assertRaises(OSError):  # a path is never followed through a symlink
            os.symlink("b", self.in_root("to_b"))
            names(paths=["to_b/file"])

    def test_a_folder_that_is_a_mount_is_written_empty(self):
        os.mkdir(self.in_root("proc"))
        pid = pydock.fork(self._in_mount_namespace)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    def _in_mount_namespace(self):
        pydock.unshare(pydock.NEWNS)
        pydock.mount(None, "/", None, pydock.MS_REC | pydock.MS_PRIVATE)
        pydock.mount("tmpfs", self.in_root("proc"), "tmpfs")
        open(self.in_root("proc", "inside"), "w").close()
        names = [e.name for e in pydock.TarReader(io.BytesIO(self.pack(same_device=True)))]
        self.assertEqual(names, ["proc/"])

    def test_an_upper_directory_becomes_a_layer_and_back(self):
        os.makedirs(self.in_root("d/opaque"))
        os.setxattr(self.in_root("d/opaque"), "trusted.overlay.opaque", b"y")
        os.setxattr(self.in_root("d"), "trusted.overlay.origin", b"x")
        os.mknod(self.in_root("d/gone"), stat.S_IFCHR, 0)
        open(self.in_root("d/.wh.fake"), "w").close()
        for path in ("d/opaque", "d"):
            os.utime(self.in_root(path), (MTIME, MTIME))
        data = self.pack(whiteouts=True)
        entries = list(pydock.TarReader(io.BytesIO(data)))
        self.assertEqual([e.name for e in entries], ["d/", "d/.wh.gone", "d/opaque/", "d/opaque/.wh..wh..opq"])
        self.assertEqual([e.xattrs for e in entries], [{}] * 4)
        other, fd = self.make("other")
        self.unpack(data, fd, whiteouts="overlay")
        self.assertTrue(pydock.is_whiteout(os.lstat(os.path.join(other, "d/gone"))))
        self.assertEqual(os.getxattr(os.path.join(other, "d/opaque"), "trusted.overlay.opaque"), b"y")
        self.assertEqual(os.listdir(os.path.join(other, "d/opaque")), [])
        self.assertEqual(self.pack(fd, whiteouts=True), data)

    def test_too_deep_a_tree_is_an_error_and_no_crash(self):
        fd = os.dup(self.root_fd)
        for _ in range(450):
            os.mkdir("d", dir_fd=fd)
            deeper = os.open("d", os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = deeper
        os.close(fd)
        with self.assertRaises(pydock.Error):
            self.pack()
        _, target = self.make("target")
        with self.assertRaises(pydock.Error):
            pydock.copy_tree(self.root_fd, target)
        with self.assertRaises(pydock.Error):
            pydock.tree_changes(self.root_fd, [target])


class UnpackTest(RootArchiveCase):
    def setUp(self):
        super().setUp()
        os.mkdir(self.path("outside"))
        with open(self.path("outside", "sentinel"), "w") as f:
            f.write("untouched")
        os.utime(self.path("outside"), (1, 1))
        os.utime(self.path("outside", "sentinel"), (1, 1))

    def assert_outside_untouched(self):
        self.assertEqual(os.listdir(self.path("outside")), ["sentinel"])
        self.assertEqual(sorted(os.listdir(self.top)), ["outside", "root"])
        for path in (self.path("outside"), self.path("outside", "sentinel")):
            self.assertEqual((os.stat(path).st_mtime, os.stat(path).st_uid), (1, 0))
        with open(self.path("outside", "sentinel")) as f:
            self.assertEqual(f.read(), "untouched")
        self.assertEqual(os.stat(self.path("outside", "sentinel")).st_nlink, 1)

    def test_attributes_and_times(self):
        size = self.unpack(tar_of(folder("d", mode=0o1777, uid=5), file_("d/f", b"abc", mode=0o4711, uid=6, gid=7),
                                  symlink("d/s", "f"), info("d/p", type=tarfile.FIFOTYPE, mode=0o666),
                                  info("d/b", type=tarfile.BLKTYPE, mode=0o660, devmajor=7, devminor=9)))
        self.assertEqual(size, 3)
        for name, mode in (("d", 0o41777), ("d/f", 0o104711), ("d/p", 0o10666), ("d/b", 0o60660)):
            self.assertEqual(oct(os.stat(self.in_root(name)).st_mode), oct(mode))
        self.assertEqual((os.stat(self.in_root("d/f")).st_uid, os.stat(self.in_root("d/f")).st_gid), (6, 7))
        self.assertEqual(os.stat(self.in_root("d/b")).st_rdev, os.makedev(7, 9))
        for name in ("d", "d/f", "d/s", "d/p"):
            self.assertEqual(os.lstat(self.in_root(name)).st_mtime, MTIME, name)

    def test_owner_can_be_given_or_left(self):
        data = tar_of(file_("f", uid=6, gid=7), symlink("s", "x"), folder("d", uid=3))
        for owner, expected in ((False, (0, 0)), ((8, 9), (8, 9))):
            self.unpack(data, owner=owner)
            for name in "fsd":
                status = os.lstat(self.in_root(name))
                self.assertEqual((status.st_uid, status.st_gid), expected)

    def test_names_that_lead_out_are_refused(self):
        for member in (file_("../f"), file_("a/../../f"), file_(".."), folder("../outside"),
                       hardlink("h", "../outside/sentinel"), symlink("../s", "x"), hardlink("h", "/outside/sentinel"),
                       hardlink("h", "none"), hardlink("h", "/")):
            with self.subTest(member), self.assertRaises(pydock.BadRequest):
                self.unpack(tar_of(member))
        self.assertEqual(os.listdir(self.root), [])
        self.assert_outside_untouched()

    def test_absolute_and_untidy_names_become_relative(self):
        self.unpack(tar_of(file_("/abs/f", b"1"), file_("/../up", b"2"), file_("./a//b/./c/../d", b"3")))
        self.assertEqual((self.text("abs/f"), self.text("up"), self.text("a/b/d")), (b"1", b"2", b"3"))
        self.assert_outside_untouched()

    def test_symlinked_parents_resolve_inside_the_root(self):
        outside = self.path("outside")
        os.makedirs(self.root + outside)
        for target in (outside, "../" * 20 + outside[1:], "loop/../" + "../" * 20 + outside[1:]):
            with self.subTest(target):
                self.unpack(tar_of(folder("loop"), symlink("link", target), file_("link/f", b"in"), folder("link/d"),
                                   symlink("link/s", "x"), hardlink("link/h", "link/f"),
                                   info("link/p", type=tarfile.FIFOTYPE)))
                self.assertEqual(self.text(outside[1:], "f"), b"in")
                self.assert_outside_untouched()
                shutil.rmtree(self.root + outside)
                os.makedirs(self.root + outside)

    def test_symlinks_to_nowhere_and_to_files_are_refused(self):
        self.refused(tar_of(symlink("l", self.path("outside")), file_("l/f")), "l/f")
        self.refused(tar_of(symlink("a", "b"), symlink("b", "a"), file_("a/f")), "a/f")
        self.refused(tar_of(file_("plain", b"x"), file_("plain/f")), "plain/f")
        self.assert_outside_untouched()

    def test_links_across_two_archives(self):
        self.unpack(tar_of(symlink("l", self.path("outside")), symlink("k", self.path("outside", "sentinel"))))
        for whiteouts in (None, "apply"):
            for member in (file_("l/f", b"x"), file_("l/sentinel", b"x"), hardlink("h", "l/sentinel"),
                           file_("l/.wh.sentinel")):
                with self.subTest(member), self.assertRaises(pydock.BadRequest):
                    self.unpack(tar_of(member), whiteouts=whiteouts)
        self.unpack(tar_of(hardlink("h", "k"), file_("h", b"never through")))
        self.assertEqual((self.text("h"), os.path.islink(self.in_root("k"))), (b"never through", True))
        self.assert_outside_untouched()

    def test_files_are_replaced_and_never_written_through(self):
        os.link(self.path("outside", "sentinel"), self.in_root("hard"))
        os.symlink(self.path("outside", "sentinel"), self.in_root("soft"))
        os.symlink(self.path("outside"), self.in_root("dir"))
        os.mkfifo(self.in_root("fifo"))
        self.unpack(tar_of(file_("hard", b"new"), file_("soft", b"new"), folder("dir"), file_("dir/f", b"new"),
                           file_("fifo", b"new")))
        for name in ("hard", "soft", "dir/f", "fifo"):
            self.assertEqual(self.text(name), b"new")
        self.assert_outside_untouched()

    def test_what_replaces_what(self):
        os.makedirs(self.in_root("d/sub"))
        open(self.in_root("d/kept"), "w").close()
        open(self.in_root("f"), "w").close()
        self.unpack(tar_of(folder("d", mode=0o700), symlink("d/sub", "x"), folder("f"), file_("f/in", b"1"),
                           hardlink("f/in", "f/in")))
        self.assertEqual(sorted(os.listdir(self.in_root("d"))), ["kept", "sub"])
        self.assertEqual(os.readlink(self.in_root("d/sub")), "x")
        self.assertEqual(self.text("f/in"), b"1")
        for member, words in ((file_("d"), "cannot overwrite directory"),
                              (folder("f/in"), "cannot overwrite non-directory")):
            self.refused(tar_of(member), words, no_overwrite_dir_non_dir=True)
        self.unpack(tar_of(file_("f/in", b"2"), folder("d")), no_overwrite_dir_non_dir=True)
        self.assertEqual(self.text("f/in"), b"2")

    def test_into_a_folder_of_the_root(self):
        os.makedirs(self.in_root("real/sub"))
        os.symlink("/real", self.in_root("link"))
        data = tar_of(folder("."), file_("f", b"1"), symlink("up", "/real"), file_("up/g", b"2"), hardlink("h", "f"))
        self.unpack(data, into="link/sub")
        self.assertEqual((self.text("real/sub/f"), self.text("real/g"), self.text("real/sub/h")), (b"1", b"2", b"1"))
        self.refused(tar_of(file_("../f")), into="link/sub")

    def test_existing_parents_keep_their_modes(self):
        os.makedirs(self.in_root("a"))
        os.chmod(self.in_root("a"), 0o700)
        os.chmod(self.root, 0o711)
        self.unpack(tar_of(folder("./", mode=0o777), file_("a/b/c", b"x")))
        self.assertEqual([stat.S_IMODE(os.stat(self.in_root(n)).st_mode) for n in (".", "a", "a/b")],
                         [0o711, 0o700, 0o755])
        self.unpack(tar_of(folder("./", mode=0o750)), whiteouts="overlay")
        self.assertEqual(stat.S_IMODE(os.stat(self.root).st_mode), 0o750)

    def test_implied_folders_are_made_like_the_layer_belows(self):
        _, low = self.make("lower")
        os.mkdir(self.path("lower", "tmp"))
        os.chmod(self.path("lower", "tmp"), 0o1777)
        os.chown(self.path("lower", "tmp"), 4, 5)
        implied = {}
        self.unpack(tar_of(file_("tmp/f"), file_("new/f"), file_("said/f"), folder("said", mode=0o700)),
                    whiteouts="overlay", implied=implied)
        self.assertEqual(sorted(implied.values()), ["new", "tmp"])
        pydock.inherit_folder_metadata(self.root_fd, [low], implied.values())
        status = os.stat(self.in_root("tmp"))
        self.assertEqual((stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid), (0o1777, 4, 5))
        self.assertEqual([stat.S_IMODE(os.stat(self.in_root(name)).st_mode) for name in ("new", "said")],
                         [0o755, 0o700])

    def test_xattrs_that_an_archive_may_set(self):
        pax = {"SCHILY.xattr.user.u": "1", "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.trusted.x": "1",
               "SCHILY.xattr.security.selinux": "x"}
        self.unpack(tar_of(file_("f", pax=pax), folder("d", pax=pax)), whiteouts="overlay")
        for name in "fd":
            self.assertEqual(os.listxattr(self.in_root(name)), ["user.u"])

    def test_whiteouts_for_overlay(self):
        self.unpack(tar_of(file_("d/.wh.gone"), file_("e/.wh..wh..opq"), file_(".wh.replaced"), file_("replaced/f"),
                           file_("later/f"), file_(".wh.later"), file_("both"), file_(".wh.both"), file_(".wh.file"),
                           file_("file", b"new"), file_(".wh..wh.plnk/1.2"), file_(".wh..wh.aufs")),
                    whiteouts="overlay")
        self.assertTrue(pydock.is_whiteout(os.lstat(self.in_root("d/gone"))))
        for name in ("e", "replaced", "later"):
            self.assertEqual(os.getxattr(self.in_root(name), "trusted.overlay.opaque"), b"y")
        self.assertEqual(self.text("file"), b"new")
        self.assertTrue(stat.S_ISREG(os.lstat(self.in_root("both")).st_mode))
        self.assertEqual(sorted(os.listdir(self.root)), ["both", "d", "e", "file", "later", "replaced"])
        self.refused(tar_of(file_("d/.wh.x"), hardlink("made", "d/gone")), "made", whiteouts="overlay")

    def test_whiteouts_applied(self):
        for name in ("gone", "dir/old", "opq/old", "opq/sub/old", "keep"):
            os.makedirs(os.path.dirname(self.in_root(name)), exist_ok=True)
            open(self.in_root(name), "w").close()
        self.unpack(tar_of(file_(".wh.gone"), file_(".wh.dir"), file_("opq/new"), file_("opq/sub/new"),
                           file_("opq/.wh..wh..opq"), file_(".wh.never"), file_("mine"), file_(".wh.mine")),
                    whiteouts="apply")
        paths = sorted(os.path.relpath(os.path.join(d, n), self.root) for d, _,
                       files in os.walk(self.root) for n in files)
        self.assertEqual(paths, ["keep", "mine", "opq/new", "opq/sub/new"])
        self.assertEqual(sorted(os.listdir(self.root)), ["keep", "mine", "opq"])

    def test_bad_whiteouts_are_refused(self):
        for name in (".wh.", ".wh..", ".wh...", "dir/.wh...", "dir/.wh.../x", "dir/.wh./x", ".wh.a/b"):
            for whiteouts in ("overlay", "apply"):
                with self.subTest(name), self.assertRaises(pydock.BadRequest):
                    self.unpack(tar_of(file_(name)), whiteouts=whiteouts)
        self.assert_outside_untouched()

    def test_without_whiteouts_the_names_are_ordinary(self):
        self.unpack(tar_of(file_(".wh.x", b"1"), file_("d/.wh..wh..opq", b"2")))
        self.assertEqual((self.text(".wh.x"), self.text("d/.wh..wh..opq")), (b"1", b"2"))

    def test_overlays_mark_cannot_come_from_an_archive(self):
        self.refused(tar_of(info("c", type=tarfile.CHRTYPE, devmajor=0, devminor=0)), "0:0", whiteouts="overlay")
        self.assertEqual(os.listdir(self.root), [])

    def test_limits(self):
        self.refused(tar_of(file_("a"), file_("b"), file_("c")), "more than 2 entries", max_entries=2)
        self.refused(tar_of(file_("a", b"x" * 1000)), "more than 999B", 500, max_bytes=999)
        self.refused(tar_of(file_("s", b"x" * 512, pax={"GNU.sparse.map": "0,512", "GNU.sparse.size": str(1 << 62)})),
                     "No space left", 500, max_bytes=1 << 40)
        self.refused(tar_of(file_("d/" * 500 + "f")), "folders")
        self.refused(tar_of(file_("n" * 300)), "too long")

    def test_odd_names(self):
        names = ["new\nline", "\udcff\udcfe", "-rf", " ", "\u00e9", "a\tb", "...", "~"]
        self.unpack(tar_of(*[file_(name, name.encode("utf-8", "surrogateescape")) for name in names],
                           format=tarfile.GNU_FORMAT))
        self.assertEqual(sorted(os.listdir(self.root)), sorted(names))

    def test_compressed_archives_reach_out_no_further(self):
        hostile = tar_of(symlink("l", self.path("outside")), file_("l/f", b"x"))
        for compress in (gzip.compress, bz2.compress, lzma.compress):
            with self.assertRaises(pydock.BadRequest):
                self.unpack(compress(hostile))
        self.assert_outside_untouched()

    def test_random_entries_never_reach_out(self):
        rng = random.Random(7)
        outside = self.path("outside")
        names = ["a", "b", "a/b", "a/b/c", "b/a", "c/..", "c/../a/d", "/a", "./b/c"]
        targets = [outside, "..", "../outside", "/", "a", "b", ".", "../" * 9 + outside[1:], "a/b",
                   outside + "/sentinel"]
        for turn in range(150):
            members = []
            for _ in range(rng.randrange(2, 12)):
                name, target = rng.choice(names), rng.choice(targets)
                if rng.random() < 0.2:
                    name = os.path.join(os.path.dirname(name),
                                        ".wh." + rng.choice(["a", "sentinel", "b", ".wh..opq", ".", ".."]))
                members.append(rng.choice([file_(name, b"x"), folder(name, mode=0o700, uid=9), symlink(name, target),
                                           hardlink(name, target), info(name, type=tarfile.FIFOTYPE),
                                           file_(name + "/sentinel", b"y", mode=0o777), folder(name + "/outside")]))
            for whiteouts in (None, "overlay", "apply"):
                try:
                    self.unpack(tar_of(*members), whiteouts=whiteouts)
                except pydock.BadRequest:
                    pass
                self.assert_outside_untouched()
            if turn % 5 == 4:
                pydock.remove_tree(self.root)
                os.mkdir(self.root)
                self.root_fd = self.open(self.root)

    def test_a_tree_that_somebody_swaps_meanwhile(self):
        """CVE-2018-15664: while archives are packed and unpacked, another process keeps replacing a folder with a
        symlink that leads out of the root."""
        pid = pydock.fork(self._swap_for_ever)
        try:
            data = tar_of(folder("swap", mode=0o777, uid=5), file_("swap/sentinel", b"evil", mode=0o777),
                          folder("swap/d"), file_("swap/d/f", b"x"), hardlink("swap/h", "swap/sentinel"),
                          file_("swap/.wh.sentinel"))
            for turn in range(300):
                try:
                    self.unpack(data, whiteouts=(None, "apply", "overlay")[turn % 3])
                except (OSError, pydock.Error):
                    pass
                self.assertNotIn(b"untouched", self.pack())
        finally:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        self.assert_outside_untouched()

    def _swap_for_ever(self):
        os.symlink(self.path("outside"), self.in_root("other"))
        while True:
            for old, new in (("swap", "third"), ("other", "swap"), ("third", "other")):
                try:
                    os.rename(self.in_root(old), self.in_root(new))
                except OSError:
                    pass

    def test_nothing_is_imported_or_looked_up_after_preload(self):
        """CVE-2019-14271: a module or library that is loaded after a process has entered a container's root would be
        the container's own file, so everything must be loaded before."""
        pid = pydock.fork(self._work_without_imports)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    def _work_without_imports(self):
        data = tar_of(folder("d"), file_("d/f", b"x",
                                         pax={"SCHILY.xattr.user.a": "1", "LIBARCHIVE.xattr.user.b": "AAEC"}),
                      symlink("l", "d"), file_("l/g"), hardlink("h", "d/f"),
                      info("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3))
        packed = [compress(data) for compress in (gzip.compress, bz2.compress, lzma.compress, bytes)]
        _, copy = self.make("copy")
        for name in ("binascii", "fcntl", "select", "lzma", "bz2", "zlib", "_lzma", "_bz2"):
            sys.modules.pop(name, None)
        pydock.preload()
        sys.meta_path.clear()
        for data in packed:
            self.unpack(data, whiteouts="apply")
        try:
            self.unpack(tar_of(file_("../x")))
        except pydock.BadRequest as error:
            str(error)
        self.pack(whiteouts=True)
        pydock.copy_tree(self.root_fd, copy, overlay=True)
        pydock.tree_changes(self.root_fd, [copy])

    def test_no_descriptor_is_left_open(self):
        before = len(os.listdir("/proc/self/fd"))
        self.unpack(tar_of(folder("a/b/c/d"), file_("a/b/c/d/e"), file_("x/y", b"1"), hardlink("l", "x/y")))
        for members in ((file_("a/b/f"), file_("../x")), (symlink("q", "nowhere"), file_("q/f")),
                        (hardlink("h", "a/none"),)):
            with self.assertRaises(pydock.BadRequest):
                self.unpack(tar_of(*members))
        self.pack()
        pydock.tree_changes(self.root_fd, [self.root_fd])
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

    def test_a_path_with_dots_while_others_rename(self):
        """openat2 fails with EAGAIN if a file anywhere on the machine is renamed while it resolves "..": the call must
        be repeated."""
        call, refusals = pydock._call, [BlockingIOError(errno.EAGAIN, "openat2")] * 3

        def busy(name, *arguments, **options):
            if name == "openat2" and refusals:
                raise refusals.pop()
            return call(name, *arguments, **options)
        with mock.patch.object(pydock, "_call", busy):
            self.test_symlinked_parents_resolve_inside_the_root()
        self.assertEqual(refusals, [])

    def test_the_fallback_without_openat2(self):
        def missing(*_):
            raise OSError(38, "openat2")
        module = sys.modules[pydock.open_in_root.__module__]
        original, module.openat2 = module.openat2, missing
        try:
            self.test_symlinked_parents_resolve_inside_the_root()
        finally:
            module.openat2 = original


    def test_the_memory_for_names_is_bounded(self):
        deep = ["/".join([f"{number:02}"] + [f"{level:010}" for level in range(250)]) for number in range(20)]
        with mock.patch.object(pydock, "MAX_NAMES", 1 << 20):
            self.refused(tar_of(*(file_(path + "/f") for path in deep)), "the names in the archive need more than")
            with mock.patch.object(pydock._Unpacker, "set_times", autospec=True,
                                   side_effect=pydock._Unpacker.set_times) as set_times:
                folders = [folder(path[:3 + 11 * level]) for path in deep[:5] for level in range(250)]
                self.unpack(tar_of(*folders, format=tarfile.GNU_FORMAT))
            self.assertGreater(set_times.call_count, 1)
        self.assertEqual(os.stat(self.in_root(deep[0][:1000].rpartition("/")[0])).st_mtime, MTIME)
        self.refused(tar_of(file_(deep[9] + "/f"), file_("g")), "more than 100 entries", max_entries=100)

    def test_what_an_archive_made_is_remembered_in_memory_for_its_names(self):
        def size(value):
            inside = value.items() if isinstance(value, dict) else value if isinstance(value, set) else ()
            return sys.getsizeof(value) + sum(size(one) for pair in inside
                                              for one in (pair if isinstance(pair, tuple) else (pair,)))

        def memory(depth):
            unpackers = []
            with mock.patch.object(pydock._Unpacker, "set_times", lambda unpacker: unpackers.append(unpacker)):
                pydock.unpack(pydock._EntryReader([pydock.Entry("/".join([f"{n:010}" for n in range(depth)]))]),
                              self.make(f"d{depth}")[1], whiteouts="apply")
            return size(unpackers[0]._made)
        self.assertLess(memory(200), 3 * memory(100))

class CopyTest(RootArchiveCase):
    def test_a_copy_equals_its_source(self):
        PackTest.build(self)
        os.mknod(self.in_root("white"), stat.S_IFCHR, 0)
        os.setxattr(self.in_root("b"), "trusted.overlay.opaque", b"y")
        with open(self.in_root("sparse"), "wb") as f:
            f.seek(1 << 24)
            f.write(b"end")
            f.truncate(1 << 25)
        other, fd = self.make("copy")
        size = pydock.copy_tree(self.root_fd, fd, overlay=True)
        self.assertEqual(self.pack(fd, whiteouts=True), self.pack(whiteouts=True))
        self.assertEqual(size, (1 << 25) + 100000 + 3 + 1)
        self.assertLess(os.stat(os.path.join(other, "sparse")).st_blocks * 512, 1 << 20)
        self.assertTrue(pydock.is_whiteout(os.lstat(os.path.join(other, "white"))))
        self.assertEqual(os.lstat(os.path.join(other, "b")).st_mtime_ns, os.lstat(self.in_root("b")).st_mtime_ns)
        self.assertFalse(os.path.exists(os.path.join(other, "socket")))
        plain, plain_fd = self.make("plain")
        pydock.copy_tree(self.root_fd, plain_fd)
        self.assertEqual(os.listxattr(os.path.join(plain, "b")), [])


class ChangesTest(RootArchiveCase):
    def tree(self, name, **files):
        """Make a folder and return (path, fd). Each keyword is a file in it: `__` in its name stands for a slash, and
        the content None makes a folder."""
        path, fd = self.make(name)
        for key, content in files.items():
            self.put(path, key.replace("__", "/"), content)
        return path, fd

    def put(self, path, name, content):
        target = os.path.join(path, name)
        os.makedirs(target if content is None else os.path.dirname(target), exist_ok=True)
        if content is not None:
            with open(target, "w") as f:
                f.write(content)
            os.utime(target, (MTIME, MTIME))

    def test_two_full_trees(self):
        old, old_fd = self.tree("old", same="1", changed="1", mode="1", d__gone="1", d__kept="1", dead__x="1", kind="1",
                                stays__x="1")
        new, new_fd = self.tree("new", same="1", changed="12", mode="1", d__kept="1", d__new__deep="1", kind__in="2",
                                stays__x="1")
        os.chmod(os.path.join(new, "mode"), 0o600)
        os.utime(os.path.join(new, "same"), ns=(0, MTIME * 10 ** 9 + 77))  # archives cut the fraction of a second off
        os.symlink("a", os.path.join(old, "link"))
        os.symlink("b", os.path.join(new, "link"))
        for top in (old, new):
            os.utime(os.path.join(top, "link"), (MTIME, MTIME), follow_symlinks=False)
        self.assertEqual(pydock.tree_changes(new_fd, [old_fd]), [
            (0, "/changed"), (0, "/d"), (2, "/d/gone"), (1, "/d/new"), (1, "/d/new/deep"), (2, "/dead"), (0, "/kind"),
            (1, "/kind/in"), (0, "/link"), (0, "/mode")])
        self.assertEqual(pydock.tree_changes(new_fd, [new_fd]), [])

    def test_a_layer_of_changes_makes_the_new_tree_of_the_old_one(self):
        self.test_two_full_trees()
        old, new = self.open(self.path("old")), self.open(self.path("new"))
        out = []
        pydock.pack_changes(new, out.append, pydock.tree_changes(new, [old]))
        self.unpack(b"".join(out), old, whiteouts="apply")
        self.assertEqual(pydock.tree_changes(new, [old]), [])

    def test_an_upper_directory_over_layers(self):
        _, bottom = self.tree("bottom", etc__a="1", etc__b="1", gone__x="1", opaque__old="1", hidden__f="1", file="1",
                              top__y="1")
        middle, middle_fd = self.tree("middle", etc__c="1", top__z="1")
        os.mknod(os.path.join(middle, "hidden"), stat.S_IFCHR, 0)
        upper, upper_fd = self.tree("upper", etc__a="22", etc__new="1", opaque__fresh="1", hidden__f="1",
                                    file__now_dir="1", top__z="1")
        os.mknod(os.path.join(upper, "gone"), stat.S_IFCHR, 0)
        os.mknod(os.path.join(upper, "etc/b"), stat.S_IFCHR, 0)
        os.mknod(os.path.join(upper, "never"), stat.S_IFCHR, 0)
        os.setxattr(os.path.join(upper, "opaque"), "trusted.overlay.opaque", b"y")
        self.assertEqual(pydock.tree_changes(upper_fd, [middle_fd, bottom], overlay=True), [
            (0, "/etc"), (0, "/etc/a"), (2, "/etc/b"), (1, "/etc/new"), (0, "/file"), (1, "/file/now_dir"),
            (2, "/gone"), (1, "/hidden"), (1, "/hidden/f"), (0, "/opaque"), (1, "/opaque/fresh"), (2, "/opaque/old")])

    def test_what_a_real_overlay_leaves(self):
        lower, lower_fd = self.tree("lower", etc__passwd="root", bin__sh="x", var__log__a="1", var__log__b="1",
                                    tmp=None)
        pid = pydock.fork(self._use_overlay, lower, lower_fd)
        self.assertEqual(os.waitpid(pid, 0)[1], 0)

    def _use_overlay(self, lower, lower_fd):
        for name in ("upper", "work", "merged"):
            os.mkdir(self.path(name))
        pydock.unshare(pydock.NEWNS)
        pydock.mount(None, "/", None, pydock.MS_REC | pydock.MS_PRIVATE)
        pydock.mount("overlay", self.path("merged"), "overlay", 0,
                     f"lowerdir={lower},upperdir={self.path('upper')},workdir={self.path('work')}")
        merged = self.path("merged")
        with open(merged + "/etc/passwd", "a") as f:
            f.write("more")
        os.unlink(merged + "/var/log/a")
        shutil.rmtree(merged + "/bin")
        os.mkdir(merged + "/bin")
        open(merged + "/bin/new", "w").close()
        open(merged + "/tmp/t", "w").close()
        os.chmod(merged + "/var/log/b", os.stat(merged + "/var/log/b").st_mode)
        changes = pydock.tree_changes(self.open(self.path("upper")), [lower_fd], overlay=True)
        self.assertEqual(changes, pydock.tree_changes(self.open(merged), [lower_fd]))
        self.assertEqual(changes,
                         [(0, "/bin"), (1, "/bin/new"), (2, "/bin/sh"), (0, "/etc"), (0, "/etc/passwd"), (0, "/tmp"),
                          (1, "/tmp/t"), (0, "/var"), (0, "/var/log"), (2, "/var/log/a")])


class GlobTest(unittest.TestCase):
    def matches(self, pattern, path, below=False):
        return pydock.Glob(pattern).matches(path, below)

    def test_go_rules(self):
        for pattern, path, expected in (
                ("*.go", "a.go", 1), ("*.go", "d/a.go", 0), ("a?c", "abc", 1), ("a?c", "a/c", 0), ("[a-c]x", "bx", 1),
                ("[^a-c]x", "bx", 0), ("a*b*c", "aXbYc", 1), ("a*b*c", "acb", 0), ("\\*", "*", 1), ("\\*", "a", 0),
                ("**/x", "x", 1), ("**/x", "a/b/x", 1), ("a/**/x", "a/b/c/x", 1), ("a/**", "a/b", 1), ("a/**", "a", 0),
                ("**", "a/b", 1), ("a/../b", "b", 1), ("/a", "a", 1), ("**.md", "d/e/x.md", 1), ("*", "a/b", 0),
                ("[]a]", "]", 1)):
            with self.subTest(pattern=pattern, path=path):
                self.assertEqual(self.matches(pattern, path), bool(expected))
        self.assertTrue(self.matches("a", "a/b/c", below=True))
        self.assertFalse(self.matches("a/b", "a", below=True))
        with self.assertRaisesRegex(pydock.BadRequest, "syntax error in pattern"):
            pydock.Glob("[a")

    def test_no_pattern_takes_for_ever(self):
        self.assertFalse(self.matches("*a" * 60 + "b", "a" * 250))
        self.assertFalse(self.matches("/".join(["**", "a"] * 40), "/".join(["a", "b"] * 60)))
        self.assertFalse(self.matches("(a*)*" * 50 + "!", "a" * 250))

    def test_ignore_rules(self):
        rules = pydock.IgnoreRules("# comment\n\n*.md\n!README.md\n  secret \nlogs/**\n!logs/keep\n/abs\n")
        left_out = [p for p in ("x.md", "README.md", "secret/a/b", "logs/a", "logs/keep", "logs", "abs", "d/x.md", "a")
                    if rules.rule_for(p)]
        self.assertEqual(left_out, ["x.md", "secret/a/b", "logs/a", "abs"])
        self.assertEqual(rules.rule_for("x.md"), (3, "*.md"))


########################################################################
# 5. Storage
########################################################################

class VfsTest(DaemonCase):
    """The storage driver that copies whole trees, for kernels without overlay."""
    flags = ("-s", "vfs")

    def test_run_diff_commit_export(self):
        self.assertEqual(self.api.ok("GET", "/info")["Driver"], "vfs")
        container = self.api.run("sh", "-c", "echo new >/new; rm /etc/group", name="vv")
        self.api.wait(container)
        self.assertEqual(set(self.pydock("diff", "vv").out.splitlines()), {"A /new", "C /etc", "D /etc/group"})
        self.pydock("commit", "vv", "done")
        self.assertEqual(self.api.output("sh", "-c", "cat /new; test -e /etc/group || echo gone", image="done"),
                         "new\ngone\n")
        self.assertIn(b"new\n", self.daemon.pydock("export", "vv").raw)
        self.daemon.restart()
        self.assertEqual(self.api.output("cat", "/new", image="done"), "new\n")

    def test_a_data_root_keeps_its_driver(self):
        self.daemon.kill9()
        argv = self.daemon.command()
        argv[-1] = "overlay"
        result = run_program(argv)
        self.assertEqual(result.code, 1)
        self.assertIn("was made with the storage driver vfs", result.err)
        argv[-1] = "nosuch"
        result = run_program(argv)
        self.assertEqual(result.code, 1)
        self.assertIn("storage driver 'nosuch' is not known", result.err)
        self.daemon.start()


@needs_root
class FileSystemTest(unittest.TestCase):
    """Data roots on unusual file systems: one that is full, and one that cannot hold an overlay."""

    def mounted(self, kind, options):
        path = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(os.rmdir, path)
        pydock.mount(kind, path, kind, 0, options)
        self.addCleanup(pydock.umount, path)
        return path

    def test_a_full_disk_while_importing(self):
        daemon = Daemon("full", root=self.mounted("tmpfs", "size=96m") + "/root")
        self.addCleanup(daemon.cleanup)
        daemon.start()
        data = archive(file_("a", os.urandom(1 << 20) * 100))
        answer = daemon.api.post("/images/create", data, fromSrc="-", repo="big")
        self.assertEqual(answer.status, 500, answer)
        self.assertIn("No space left on device", answer.message)
        self.assertEqual(os.listdir(daemon.root + "/tmp"), [])
        self.assertEqual(daemon.api.get("/images/big/json").status, 404)
        self.assertEqual(daemon.api.output("echo", "still"), "still\n")

    def test_without_overlay(self):
        lower, upper = tempfile.mkdtemp(dir=SCRATCH), tempfile.mkdtemp(dir=SCRATCH)
        for path in (lower, upper):
            self.addCleanup(shutil.rmtree, path)
        for name in ("up", "work"):
            os.mkdir(upper + "/" + name)
        top = self.mounted("overlay", f"lowerdir={lower},upperdir={upper}/up,workdir={upper}/work")
        daemon = Daemon("no-overlay", root=top + "/root")
        self.addCleanup(daemon.cleanup)
        daemon.start()
        info = daemon.api.ok("GET", "/info")
        self.assertEqual(info["Driver"], "vfs")
        self.assertIn("overlay cannot be mounted", daemon.log_text())
        self.assertEqual(daemon.api.output("echo", "runs"), "runs\n")


########################################################################
# 6. Objects
########################################################################

class WordsTest(unittest.TestCase):
    def test_variables_quotes_and_escapes(self):
        variables = {"X": "1", "S": "a b", "EMPTY": ""}
        for text, expected in (
                ("$X", "1"), ("${X}y", "1y"), ("$Xy", ""), ("'$X'", "$X"), ('"$S"', "a b"), ("\\$X", "$X"),
                ('"\\$X"', "$X"), ('"a\\b"', "a\\b"), ("a\\ b", "a b"), ("${NO:-d}", "d"), ("${NO-d}", "d"),
                ("${EMPTY:-d}", "d"), ("${EMPTY-d}", ""), ("${X:+p}", "p"), ("${NO:+p}", ""), ("${EMPTY+p}", "p"),
                ("${NO:-${X}${S}}", "1a b"), ("${NO:-'}'}", "}"), ("$", "$"), ("a$ b", "a$ b"), ("100%$", "100%$"),
                ("it\\'s", "it's"), ("${X:?no}", "1"), ("\"it's $X\"", "it's 1"), ("$1", ""), ("\\", "")):
            with self.subTest(text):
                self.assertEqual(pydock.expand(text, variables), expected)
        self.assertEqual(pydock.expand("`$X c:\\$X", variables, "`"), "$X c:\\1")

    def test_bad_words(self):
        for text, part in (("'a", "single-quote"), ('"a', "double-quote"), ("${X", "unsupported"),
                           ("${X:-a", "missing '}'"), ("${}", "bad variable"), ("${X:=a}", "unsupported modifier"),
                           ("${NO:?tell me}", "NO: tell me"), ("${a:-" * 60 + "}" * 60, "too deeply")):
            with self.subTest(text), self.assertRaisesRegex(pydock.BadRequest, re.escape(part)):
                pydock.expand(text, {"X": "1"})

    def test_cutting_and_replacing(self):
        """The forms of docs.docker.com/reference/dockerfile, "Environment replacement", give what bash gives."""
        values = {"s": "foobarbaz", "p": "/usr/local/lib/x.tar.gz", "e": "", "star": "a*b*c", "x": "b"}
        for text, expected in (
                ("${s#f*b}", "arbaz"), ("${s##f*b}", "az"), ("${s%b*}", "foobar"), ("${s%%b*}", "foo"),
                ("${s/ba/-}", "foo-rbaz"), ("${s//ba/-}", "foo-r-z"), ("${p##*/}", "x.tar.gz"),
                ("${p%/*}", "/usr/local/lib"), ("${p%.gz}.xz", "/usr/local/lib/x.tar.xz"), ("${s#nope}", "foobarbaz"),
                ("${s//?/x}", "x" * 9), ("${s/*/all}", "all"), ("${e//a/b}", ""), ("${nope%x}", ""),
                ("${star#a\\*}", "b*c"), ("${star//\\*/+}", "a+b+c"), ("${s#$s}", ""), ("${s/$x?r/<$x>}", "foo<b>baz"),
                ("${s//a*a/-}", "foob-z"), ("${s%%}", "foobarbaz"), ("${p//\\//_}", "_usr_local_lib_x.tar.gz"),
                ("${s/b/}", "fooarbaz"), ("\"${s%z}\"", "foobarba"), ("${s##*}", ""), ("${s%?}", "foobarba"),
                ("${s//o/}", "fbarbaz")):
            with self.subTest(text):
                self.assertEqual(pydock.expand(text, values), expected)
        for text in ("${s/a}", "${s#a", "${s//a/b"):
            with self.assertRaisesRegex(pydock.BadRequest, "missing '[/}]'"):
                pydock.expand(text, values)
        self.assertEqual(pydock.expand(f"${{v//{'a*' * 20}b/x}}", {"v": "a" * 20000}),
                         "a" * 20000)  # must not backtrack

    def test_modes(self):
        for mode, text, folder, expected in (
                (0o644, "755", False, 0o755), (0o644, "u=rwX,go=rX", False, 0o644), (0o644, "u=rwX,go=rX", True, 0o755),
                (0o700, "u=rwX,go=rX", False, 0o755), (0o644, "+x", False, 0o755), (0o644, "a+w", False, 0o666),
                (0o644, "+w", False, 0o644), (0o640, "g=u", False, 0o660), (0o777, "go-wx", False, 0o744),
                (0o755, "u+s,+t", False, 0o5755), (0o4755, "u-s", False, 0o755), (0o644, "o=", False, 0o640),
                (0o644, "ug+x-r,o=g", False, 0o311), (0o2755, "g-s", True, 0o755)):
            with self.subTest(text):
                self.assertEqual(oct(pydock.changed_mode(mode, text, folder)), oct(expected))

    def test_words_that_grow_are_refused_soon(self):
        value = "x" * 1024
        with self.assertRaisesRegex(pydock.BadRequest, "more than"):
            for _ in range(30):
                value = pydock.expand("$a$a", {"a": value})
        self.assertEqual(len(pydock.expand("y" * (1 << 19), {})), 1 << 19)
        variables = mock.Mock(get=mock.Mock(return_value="x" * 1024))
        with self.assertRaisesRegex(pydock.BadRequest, "more than"):
            pydock.expand('"' + "$a" * 100000 + '"', variables)
        self.assertLess(variables.get.call_count, 1100)
        with self.assertRaisesRegex(pydock.BadRequest, "more than"):
            pydock.expand("${v//a/$w}", {"v": "a" * (1 << 20), "w": "x" * (1 << 20)})

    def test_the_work_for_an_environment_grows_with_its_length(self):
        def work(count):
            entries = [f"A{number}=x" for number in range(count)]
            config = dict(dict.fromkeys(list(pydock.IMAGE_CONFIG_KEYS) + ["StopTimeout"]), Env=entries)
            return (steps(pydock.merge_env, [], entries),
                    steps(pydock.merge_config, config, {"Env": [f"B{number}=x" for number in range(count)]}),
                    steps(pydock.CONFIG_CHANGES["ENV"], {}, " ".join(entries)))
        for one, two in zip(work(200), work(400)):
            self.assertLess(two, 3 * one)
        self.assertEqual(pydock.merge_env(["A=1", "B=2"], ["B=3", "C", "C=4", "A=", "C=5"]), ["A=", "B=3", "C=5"])
        with self.assertRaisesRegex(pydock.BadRequest, "the environment is larger than"):
            pydock.merge_env(["A=" + "x" * (1 << 19)], ["B=" + "x" * (1 << 19)])

    def test_lists_within_lists_are_no_exec_form(self):
        self.assertIsNone(pydock.exec_form("[" * 100000))

    def test_raw_words(self):
        self.assertEqual(pydock.raw_words("a=1 b='x y' \"c d\"=e f\\ g  h"),
                         ["a=1", "b='x y'", '"c d"=e', "f\\ g", "h"])
        self.assertEqual(pydock.named_values("A some  text", "ENV"), [("A", "some  text")])


class PortsTest(unittest.TestCase):
    def test_publish(self):
        for text, expected in (
                ("80", [("80/tcp", "", "")]), ("8080:80", [("80/tcp", "", "8080")]),
                ("8080:80/udp", [("80/udp", "", "8080")]), ("127.0.0.1:8080:80", [("80/tcp", "127.0.0.1", "8080")]),
                ("127.0.0.1::80", [("80/tcp", "127.0.0.1", "")]), ("[::1]:8080:80", [("80/tcp", "::1", "8080")]),
                (":80", [("80/tcp", "", "80")]), (":53/udp", [("53/udp", "", "53")]),
                (":90-91", [("90/tcp", "", "90"), ("91/tcp", "", "91")]),
                ("80-81:90-91", [("90/tcp", "", "80"), ("91/tcp", "", "81")]),
                ("90-91", [("90/tcp", "", ""), ("91/tcp", "", "")]), ("8000-8010:80", [("80/tcp", "", "8000-8010")])):
            with self.subTest(text):
                self.assertEqual(pydock.parse_publish(text), expected)

    def test_invalid_publish(self):
        for text, reason in (("99999:80", "invalid hostPort: 99999"), ("80:x", "invalid containerPort: x"),
                             ("1:2/foo", "invalid proto: foo"), ("a:1:2", "invalid IP address: a"),
                             ("80-82:90-91", "invalid ranges"), ("80:", "No port specified"), ("1:2:3:4", "invalid"),
                             ("9-8:1", "invalid hostPort")):
            with self.subTest(text), self.assertRaisesRegex(pydock.BadRequest, reason):
                pydock.parse_publish(text)

    def test_expose(self):
        args, _ = parsed_flags("run", "--expose", "7000-7002/udp", "-p", "80", "base")
        self.assertEqual(pydock._ports(args),
                         ({"80/tcp": {}, "7000/udp": {}, "7001/udp": {}, "7002/udp": {}},
                          {"80/tcp": [{"HostIp": "", "HostPort": ""}]}))

    def test_column(self):
        def port(private, public=None, address=None, kind="tcp"):
            entry = {"PrivatePort": private, "Type": kind}
            entry.update({"PublicPort": public, "IP": address} if public else {})
            return entry
        ports = [port(9001, 9001, "127.0.0.1"), port(9000, 9000, "127.0.0.1"), port(80, 8081, "0.0.0.0"),
                 port(80, 8081, "::"), port(7001), port(7000), port(53, 32768, "0.0.0.0", "udp"), port(7005)]
        self.assertEqual(pydock.format_ports(ports),
                         "7000-7001/tcp, 7005/tcp, 127.0.0.1:9000-9001->9000-9001/tcp, 0.0.0.0:32768->53/udp, "
                         "0.0.0.0:8081->80/tcp, [::]:8081->80/tcp")
        self.assertEqual(pydock.format_ports(None), "")


########################################################################
# 7. Images
########################################################################

def archive(*members, compress=None):
    data = tar_of(*members)
    return compress(data) if compress else data


def small_root(*more):
    """The archive members of a root file system that is too small to run a shell, but has a file to look for."""
    return (folder("etc"), file_("etc/name", b"small\n")) + more


class ImportTest(DaemonCase):
    def imported(self, data, **query):
        """Import an archive and return the image's id."""
        answer = self.api.post("/images/create", data, **dict({"fromSrc": "-", "repo": "imp", "tag": "1"}, **query))
        self.assertEqual(answer.status, 200, answer)
        return answer.documents[-1]["status"]

    def test_every_compression(self):
        for number, compress in enumerate((None, gzip.compress, bz2.compress, lzma.compress)):
            self.imported(archive(*small_root(), compress=compress), tag=str(number))
            self.assertIn("etc/name", self.exported_members(f"imp:{number}"))
        ids = self.pydock("images", "-q", "imp").out.split()
        self.assertEqual(len(ids), 4)

    def test_the_same_bytes_are_the_same_layer(self):
        for tag in "12":
            self.imported(archive(*small_root()), tag=tag)
        layers = [self.api.ok("GET", f"/images/imp:{tag}/json")["RootFS"]["Layers"] for tag in "12"]
        self.assertEqual(layers[0], layers[1])

    def test_by_both_command_lines(self):
        data = archive(*small_root())
        path = write(os.path.join(self.folder(), "x.tar"), data)
        for cli in self.command_lines:
            with self.subTest(cli.__name__):
                result = cli("import", "-m", "a message", "-c", 'CMD ["etc/x"]', "-c", "ENV A=b", path, "imp:file")
                self.assertRegex(result.out, "^sha256:[0-9a-f]{64}\n$")
                image = self.api.ok("GET", "/images/imp:file/json")
                self.assertEqual((image["Id"], image["Comment"]), (result.out.strip(), "a message"))
                self.assertEqual((image["Config"]["Cmd"], image["Config"]["Env"]), (["etc/x"], ["A=b"]))
                cli("import", "-", "imp:stdin", input=data)
                self.assertIn("etc/name", self.exported_members("imp:stdin"))
        self.pydock("import", path, "old", "form")
        self.api.ok("GET", "/images/old:form/json")

    def test_an_archive_of_more_than_the_disk_holds_is_refused(self):
        """A hole costs nothing in the archive, but its zeros are a part of the layer's digest."""
        data = tar_of(file_("hole", pax={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(8 << 40)}))
        self.refused(500, self.api.post("/images/create", data, fromSrc="-", repo="imp"), "holds more than")

    def test_the_memory_for_names_is_bounded(self):
        deep = "/".join(["x" * 14] * 250)
        data = tar_of(*(file_(f"{number}/{deep}") for number in range(100)))
        self.refused(400, self.api.post("/images/create", gzip.compress(data), fromSrc="-", repo="imp"),
                     "the names in the archive need more than")

    def test_from_an_address(self):
        data = archive(*small_root(), compress=gzip.compress)

        def answer(connection):
            connection.recv(65536)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
            connection.close()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen(4)
            thread = threading.Thread(target=lambda: answer(listener.accept()[0]))
            thread.start()
            self.pydock("import", f"http://127.0.0.1:{listener.getsockname()[1]}/x.tar.gz", "imp:url")
            thread.join(5)
        self.assertIn("etc/name", self.exported_members("imp:url"))
        for address in ("file:///etc/passwd", "ftp://127.0.0.1/x"):
            self.refused(400, self.api.post("/images/create", b"", fromSrc=address, repo="imp"), "http")
        self.refused(400, self.api.post("/images/create", b"", fromSrc="a/\0", repo="imp"), "NUL")
        for address in ("a:b:c", "a b", "../..", "x" * 70 + ".de", '{"a":1}'):
            self.refused(400, self.api.post("/images/create", b"", fromSrc=address, repo="imp"), "Get")
        with contextlib.closing(Files({"/away": (302, {"Location": "http://169.254.169.254/latest"}, b""),
                                       "/ftp": (302, {"Location": "ftp://127.0.0.1/x"}, b"")})) as server:
            for path, part in (("/away", "link-local"), ("/ftp", "only http and https")):
                self.refused(400, self.api.post("/images/create", b"", fromSrc=server.url + path, repo="imp"), part)
        self.refused(400, self.api.post("/images/create", b"", fromSrc="http://127.0.0.1:9/x", repo="imp"),
                     "127.0.0.1:9")
        for address in ("no:port:here", "http://[x"):
            self.refused(400, self.api.post("/images/create", b"", fromSrc=address, repo="imp"), address[-3:])
        data = archive(*small_root())
        server = Files({"/cut": (200, {"Content-Length": str(len(data))}, data[:-700]), "/whole": (200, {}, data),
                        "/far": (302, {"Location": "http://169.254.169.254/x"}, b"")})
        self.addCleanup(server.close)
        self.assertEqual(self.api.post("/images/create", b"", fromSrc=server.url + "/whole", repo="imp").status, 200)
        self.refused(400, self.api.post("/images/create", b"", fromSrc=server.url + "/cut", repo="imp:cut"),
                     "broke off")
        self.refused(400, self.api.post("/images/create", b"", fromSrc=server.url + "/far", repo="imp:far"),
                     "link-local")

    def test_bad_archives_leave_nothing(self):
        layers = sorted(os.listdir(os.path.join(self.daemon.root, "layers")))
        whole = archive(*small_root(file_("big", os.urandom(100000))))
        for data, part in ((b"no archive at all" * 100, ""), (whole[:60000], ""), (gzip.compress(whole)[:5000], ""),
                           (lzma.compress(whole)[:-50], ""), (archive(file_("../out", b"x")), "../out"),
                           (archive(file_("a/../../out", b"x")), "a/../../out"),
                           (archive(hardlink("l", "nowhere")), "nowhere"),
                           (archive(hardlink("l", "../../etc/passwd")), "passwd")):
            with self.subTest(data[:20]):
                self.refused(400, self.api.post("/images/create", data, fromSrc="-", repo="bad"), part)
        self.assertEqual(sorted(os.listdir(os.path.join(self.daemon.root, "layers"))), layers)
        self.assertEqual(os.listdir(os.path.join(self.daemon.root, "tmp")), [])
        self.assertEqual(self.api.get("/images/bad/json").status, 404)

    def test_links_that_lead_out_lead_nowhere(self):
        sentinel = self.folder(file="untouched")
        self.imported(archive(*small_root(
            symlink("out", sentinel), file_("/absolute", b"x"), symlink("up", "../../../../.."),
            symlink("etc/shadow-link", "/etc/shadow"))))
        self.assertEqual(os.listdir(sentinel), ["file"])
        members = self.exported_members("imp:1")
        self.assertEqual(members["out"].linkname, sentinel)
        self.assertIn("absolute", members)
        answer = self.api.post("/images/create", archive(symlink("out", sentinel), file_("out/planted", b"x")),
                               fromSrc="-", repo="imp", tag="2")
        self.assertEqual(os.listdir(sentinel), ["file"])
        self.refused(400, answer, "out/planted")

    def test_device_nodes_and_overlays_own_marks(self):
        node = info("dev0", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
        self.imported(archive(*small_root(node)))
        self.assertTrue(self.exported_members("imp:1")["dev0"].ischr())
        mark = archive(info("w", type=tarfile.CHRTYPE, devmajor=0, devminor=0))
        self.refused(400, self.api.post("/images/create", mark, fromSrc="-"), "w")
        self.imported(archive(*small_root(folder("o", pax={"SCHILY.xattr.trusted.overlay.opaque": "y"}))), tag="3")
        self.assertEqual([h for h in self.exported_members("imp:3")["o"].pax_headers if "overlay" in h], [])

    def test_a_body_that_is_cut_off(self):
        data = archive(*small_root(file_("big", bytes(100000))))
        head = ("POST /v1.47/images/create?fromSrc=-&repo=cut HTTP/1.1\r\nHost: d\r\n"
                f"Content-Length: {len(data)}\r\n\r\n")
        answer = self.api.raw(head.encode() + data[:50000])
        self.assertIn(b" 400 ", answer.splitlines()[0])
        self.assertIn(b"cut off", answer)
        head = "POST /v1.47/images/create?fromSrc=-&repo=cut HTTP/1.1\r\nHost: d\r\nTransfer-Encoding: chunked\r\n\r\n"
        answer = self.api.raw(head.encode() + b"8000\r\n" + data[:0x8000] + b"\r\n")
        self.assertIn(b" 400 ", answer.splitlines()[0])
        self.assertEqual(self.api.get("/images/cut/json").status, 404)

    def test_chunked_bodies(self):
        data = archive(*small_root())
        chunks = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(data[i:i + 1000]), data[i:i + 1000])
                          for i in range(0, len(data), 1000)) + b"0\r\nT: x\r\n\r\n"
        head = (b"POST /v1.47/images/create?fromSrc=-&repo=imp&tag=c HTTP/1.1\r\nHost: d\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n")
        self.assertIn(b" 200 ", self.api.raw(head + chunks).splitlines()[0])
        self.assertIn("etc/name", self.exported_members("imp:c"))


class ImageTest(DaemonCase):
    def test_tag_and_rmi(self):
        ident = self.api.ok("GET", "/images/base/json")["Id"]
        self.pydock("tag", "base", "other:1")
        self.pydock("tag", ident[7:19], "registry.example:5000/dir/name:v2")
        self.assertEqual(sorted(self.api.ok("GET", "/images/base/json")["RepoTags"]),
                         ["base:latest", "other:1", "registry.example:5000/dir/name:v2"])
        self.assertEqual(self.pydock("rmi", "other:1").out, "Untagged: other:1\n")
        self.assertEqual(self.api.get("/images/other:1/json").status, 404)
        self.refused(409, self.api.delete("/images/" + ident[7:19]), "multiple repositories")
        for name in ("UPPER", "a//b", "a:b:c", "-x", "a b", "x" * 300):
            self.refused(400, self.api.post("/images/base/tag", repo=name))
        self.pydock("tag", "nosuch", "x", code=1)

    def test_unknown_images(self):
        self.refused(404, self.api.get("/images/nosuch/json"), "No such image: nosuch")
        self.refused(404, self.api.delete("/images/nosuch"), "No such image: nosuch:latest")
        self.refused(404, self.api.post("/containers/create", {"Image": "nosuch:1"}), "No such image: nosuch:1")

    def test_an_image_in_use(self):
        self.pydock("tag", "base", "used")
        container = self.api.create("true", image="used")
        self.api.ok("POST", "/commit", container=container, repo="child")
        child = self.api.create("true", image="child")
        self.refused(409, self.api.delete("/images/child"), "is using its referenced image")
        self.api.ok("DELETE", "/containers/" + child)
        gone = self.api.ok("DELETE", "/images/child")
        self.assertEqual([list(g)[0] for g in gone][:2], ["Untagged", "Deleted"])

    def test_commit_diff_and_history(self):
        container = self.api.run("sh", "-c", "echo new >/new; mkdir /d; echo x >/d/x; rm /etc/group; "
                                             "echo more >>/etc/passwd; chmod 700 /tmp", name="made")
        self.api.wait(container)
        changes = {(c["Kind"], c["Path"]) for c in self.api.ok("GET", "/containers/made/changes")}
        expected = {(1, "/new"), (1, "/d"), (1, "/d/x"), (0, "/etc"), (2, "/etc/group"), (0, "/etc/passwd"),
                    (0, "/tmp")}
        self.assertEqual(changes, expected)
        letters = {f"{'CAD'[kind]} {path}" for kind, path in expected}
        self.assertEqual(set(self.pydock("diff", "made").out.splitlines()), letters)
        result = self.pydock("commit", "-m", "a message", "-a", "A. Author", "--change", 'ENTRYPOINT ["cat"]', "-c",
                             "LABEL a=b", "made", "done:1")
        image = self.api.ok("GET", "/images/done:1/json")
        self.assertEqual(image["Id"], result.out.strip())
        self.assertEqual((image["Comment"], image["Author"], image["Config"]["Labels"]),
                         ("a message", "A. Author", {"a": "b"}))
        self.assertEqual(self.api.output("/new", image="done:1"), "new\n")
        self.assertIn("No such file", self.api.output("/etc/group", image="done:1"))
        history = self.api.ok("GET", "/images/done:1/history")
        self.assertEqual((history[0]["Comment"], history[0]["Tags"], len(history)), ("a message", ["done:1"], 2))
        self.assertIn("a message", self.pydock("history", "done:1").out)
        self.assertEqual(image["RootFS"]["Layers"][0], self.api.ok("GET", "/images/base/json")["RootFS"]["Layers"][0])
        again = self.api.ok("POST", "/commit", container="made", repo="done", tag="2")
        self.assertEqual(self.api.ok("GET", f"/images/{again['Id']}/json")["RootFS"]["Layers"],
                         image["RootFS"]["Layers"])

    def test_what_pydock_mounts_is_no_change(self):
        container = self.api.run("true", Binds=["vol:/made/by/mount"], Tmpfs={"/t": ""})
        self.api.wait(container)
        self.assertLessEqual({c["Path"] for c in self.api.ok("GET", f"/containers/{container}/changes") or ()},
                             {"/made", "/made/by", "/made/by/mount", "/t"})
        plain = self.api.run("true")
        self.api.wait(plain)
        self.assertFalse(self.api.ok("GET", f"/containers/{plain}/changes"))

    def test_a_commit_of_no_changes_adds_no_layer(self):
        container = self.api.create("x", name="unchanged", Env=["A=1"])
        self.api.ok("POST", "/commit", container=container, repo="unchanged")
        image, base = (self.api.ok("GET", f"/images/{name}/json") for name in ("unchanged", "base"))
        self.assertEqual((image["RootFS"]["Layers"], image["Size"]), (base["RootFS"]["Layers"], base["Size"]))
        self.assertEqual([entry["Size"] for entry in self.api.ok("GET", "/images/unchanged/history")][0], 0)
        self.assertIn("A=1", image["Config"]["Env"])
        self.assertEqual(self.api.output("echo", "runs", image="unchanged"), "runs\n")

    def test_a_whiteout_hides_in_the_committed_image(self):
        first = self.api.run("sh", "-c", "mkdir /d; touch /d/a /d/b")
        self.api.wait(first)
        self.api.ok("POST", "/commit", container=first, repo="one")
        second = self.api.run("sh", "-c", "rm -r /d; mkdir /d; touch /d/c; rm /etc/passwd", image="one")
        self.api.wait(second)
        self.api.ok("POST", "/commit", container=second, repo="two")
        self.assertEqual(self.api.output("ls", "/d", image="two"), "c\n")
        self.assertIn("No such file", self.api.output("cat", "/etc/passwd", image="two"))
        self.assertEqual(self.api.output("ls", "/d", image="one"), "a\nb\n")

    def test_export_is_the_whole_root(self):
        container = self.api.run("sh", "-c", "echo new >/new; rm /etc/group")
        self.api.wait(container)
        path = os.path.join(self.folder(), "x.tar")
        self.pydock("export", "-o", path, container[:12])
        with tarfile.open(path) as tar:
            names = tar.getnames()
            self.assertEqual(tar.extractfile("new").read(), b"new\n")
        self.assertIn("bin/sh", [n.replace("usr/bin", "bin") for n in names])
        self.assertNotIn("etc/group", names)
        self.pydock("import", path, "again")
        self.assertEqual(self.api.output("cat", "/new", image="again"), "new\n")
        running = self.api.run("sh", "-c", "echo live >/live; sleep 600")
        eventually(lambda: self.api.execute(running, "cat", "/live")[0] == 0)
        self.assertIn(b"live\n", self.daemon.pydock("export", running).raw)

    def test_images_and_inspect(self):
        self.pydock("tag", "base", "two:2")
        for cli in self.command_lines:
            self.assertEqual(set(cli("images", "--format", "{{.Repository}}:{{.Tag}}").out.split()) - {"host:latest"},
                             {"base:latest", "two:2"})
            self.assertEqual(cli("images", "-q", "--no-trunc", "two").out.strip(),
                             self.api.ok("GET", "/images/base/json")["Id"])
            self.assertEqual(cli("inspect", "--format", "{{json .RepoTags}}", "two:2").out, '["base:latest","two:2"]\n')
            self.assertEqual(cli("image", "inspect", "-f", "{{range .RepoTags}}{{.}},{{end}}", "two:2").out,
                             "base:latest,two:2,\n")
        self.assertEqual([i["RepoTags"] for i in self.api.ok("GET", "/images/json", filters={"reference": ["two*"]})],
                         [["two:2"]])
        self.assertEqual(self.api.ok("GET", "/images/json", filters={"dangling": ["true"]}), [])
        self.refused(400, self.api.get("/images/json", filters={"nosuch": ["x"]}), "invalid filter")

    def test_dangling_images_and_prune(self):
        for text in "ab":
            container = self.api.run("sh", "-c", f"echo {text} >/f")
            self.api.wait(container)
            self.api.ok("POST", "/commit", container=container, repo="moved")
            self.api.ok("DELETE", "/containers/" + container)
        self.assertEqual(len(self.api.ok("GET", "/images/json", filters={"dangling": ["true"]})), 1)
        gone = self.api.ok("POST", "/images/prune")
        self.assertTrue(any("Deleted" in g for g in gone["ImagesDeleted"]), gone)
        self.assertEqual(self.api.ok("GET", "/images/json", filters={"dangling": ["true"]}), [])
        self.assertGreater(gone["SpaceReclaimed"], 0)
        self.assertEqual(self.api.output("cat", "/f", image="moved"), "b\n")

    def test_layers_go_with_the_last_image(self):
        def layers():
            return sorted(os.listdir(os.path.join(self.daemon.root, "layers")))
        before = layers()
        container = self.api.run("touch", "/f")
        self.api.wait(container)
        self.api.ok("POST", "/commit", container=container, repo="x1")
        self.assertEqual(sum(len(name) == 64 for name in layers()), sum(len(name) == 64 for name in before) + 1)
        self.api.ok("DELETE", "/images/x1")
        self.assertEqual(layers(), before)

    def test_mkimage(self):
        self.pydock("mkimage", "made:1", "sh", "ls")
        self.assertIn("passwd", self.api.output("ls", "/etc", image="made:1"))
        result = self.pydock("mkimage", "made:2", "no-such-program", code=1)
        self.assertIn("no such program: no-such-program", result.err)
        self.pydock("mkimage", "Bad Name", code=1)

    def test_many_layers(self):
        name = "base"
        for number in range(20):
            container = self.api.run("touch", f"/f{number}", image=name, NetworkMode="none")
            self.api.wait(container)
            name = "deep"
            self.api.ok("POST", "/commit", container=container, repo=name)
            self.api.ok("DELETE", "/containers/" + container)
        self.assertEqual(self.api.output("sh", "-c", "ls /f* | wc -l", image="deep").strip(), "20")


class HostImageTest(DaemonCase):
    """The image `host`, with a small tree as the host's root (--host-root) and the data root inside that tree."""

    @classmethod
    def setUpClass(cls):
        cls.tree = os.path.join(SCRATCH, "host-tree")
        os.mkdir(cls.tree)
        pydock.make_root(cls.tree)
        write(cls.tree + "/data/file", "of the host\n")
        write(cls.tree + "/var/lib/docker/secret", "x")
        write(cls.tree + "/run/secret", "x")
        write(cls.tree + "/etc/hostname", "the-host\n")
        os.mkdir(cls.tree + "/other")
        pydock.mount("tmpfs", cls.tree + "/other", "tmpfs")
        write(cls.tree + "/other/secret", "x")
        cls.addClassCleanup(shutil.rmtree, cls.tree)
        cls.addClassCleanup(pydock.umount, cls.tree + "/other")
        cls.daemon = Daemon("host", "--host-root", cls.tree, root=cls.tree + "/var/lib/data-root").start()
        cls.addClassCleanup(cls.daemon.cleanup)

    def test_a_container_sees_the_host_and_changes_nothing(self):
        text = self.api.output("sh", "-c",
                               "cat /data/file; cat /etc/hostname; echo new >/data/new; rm /data/file; ls /data",
                               image="host")
        self.assertIn("of the host\n", text)
        self.assertNotIn("the-host", text)
        self.assertTrue(text.endswith("\nnew\n"), text)
        self.assertEqual(os.listdir(self.tree + "/data"), ["file"])

    def test_masks(self):
        text = self.api.output("sh", "-c",
                               "find / -name secret 2>/dev/null; ls -A /var/lib/docker /var/lib/data-root /run /other",
                               image="host")
        self.assertEqual(text.split(), ["/other:", "/run:", "/var/lib/data-root:", "/var/lib/docker:"])

    def test_diff_and_commit(self):
        container = self.api.run("sh", "-c", "echo new >/data/new", image="host")
        self.api.wait(container)
        self.assertEqual(self.pydock("diff", container).out, "C /data\nA /data/new\n")
        self.pydock("commit", container, "copy")
        image = self.api.ok("GET", "/images/copy/json")
        self.assertEqual(len(image["RootFS"]["Layers"]), 1)
        write(self.tree + "/data/later", "x")
        self.addCleanup(os.unlink, self.tree + "/data/later")
        text = self.api.output("sh", "-c", "ls /data; find / -xdev -name secret", image="copy")
        self.assertEqual(text, "file\nnew\n")

    def test_it_cannot_be_removed(self):
        answer = self.api.delete("/images/host", force=1)
        self.assertIn(answer.status, (400, 409), answer)
        self.assertEqual(self.api.output("echo", "there", image="host"), "there\n")


########################################################################
# 8. Mkimage
########################################################################

def elf(needed=(), interpreter="", rpath="", runpath="", bits=64, order="<", machine=62):
    """The bytes of a minimal ELF file: its headers, one loaded segment and a dynamic section."""
    header, program, dynamic = {32: ("HHIIIIIHHHHHH", "IIIIIIII", "II"), 64: ("HHIQQQIHHHHHH", "IIQQQQQQ", "QQ")}[bits]
    head_size, program_size = 16 + struct.calcsize(order + header), struct.calcsize(order + program)
    strings, tags = b"\0", []
    for tag, texts in ((1, needed), (15, [rpath] if rpath else []), (29, [runpath] if runpath else [])):
        for text in texts:
            tags.append((tag, len(strings)))
            strings += text.encode() + b"\0"
    base, start = 0x400000, head_size + 3 * program_size
    interp = interpreter.encode() + b"\0"
    strings_at = start + len(interp)
    dynamic_at = strings_at + len(strings)
    tags += [(5, base + strings_at), (10, len(strings)), (0, 0)]
    table = b"".join(struct.pack(order + dynamic, *tag) for tag in tags)
    size = dynamic_at + len(table)

    def segment(kind, offset, length):
        if bits == 32:
            return struct.pack(order + program, kind, offset, base + offset, base + offset, length, length, 4, 4)
        return struct.pack(order + program, kind, 4, offset, base + offset, base + offset, length, length, 4)

    ident = b"\x7fELF" + bytes([bits // 32, 1 if order == "<" else 2, 1]) + bytes(9)
    fields = (3, machine, 1, base, head_size, 0, 0, head_size, program_size, 3, 0, 0, 0)
    head = ident + struct.pack(order + header, *fields)
    return (head + segment(1, 0, size) + (segment(3, start, len(interp)) if interpreter else segment(0, 0, 0))
            + segment(2, dynamic_at, len(table)) + interp + strings + table)


class LibrariesTest(unittest.TestCase):
    LOADER = "/lib64/ld-linux-x86-64.so.2"

    def setUp(self):
        self.root = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.root)

    def put(self, path, content=b""):
        os.makedirs(os.path.dirname(self.root + path), exist_ok=True)
        with open(self.root + path, "wb") as f:
            f.write(content)
        os.chmod(self.root + path, 0o755)

    def needed(self, path="/bin/prog"):
        return pydock.HostFiles(self.root).needed(path)

    def test_all_classes_and_byte_orders(self):
        for bits in (32, 64):
            for order in "<>":
                with self.subTest(bits=bits, order=order):
                    options = dict(bits=bits, order=order, machine=8)
                    self.put("/lib/ld.so.1", elf(**options))
                    self.put("/bin/prog", elf(["libb.so", "liba.so.1"], "/lib/ld.so.1", **options))
                    self.put("/lib/liba.so.1", elf(["libc.so"], **options))
                    self.put("/usr/lib/libb.so", elf(["liba.so.1", "ld.so.1"], **options))
                    self.put("/lib/libc.so", elf(**options))
                    self.assertEqual(self.needed(),
                                     ["/lib/ld.so.1", "/usr/lib/libb.so", "/lib/liba.so.1", "/lib/libc.so"])

    def test_libraries_of_another_kind_are_passed_over(self):
        self.put("/bin/prog", elf(["liba.so"], self.LOADER))
        self.put("/lib64/liba.so", elf(bits=32, machine=3))
        self.put("/usr/lib64/liba.so", b"INPUT(-la)")
        self.put("/lib/liba.so", elf(machine=183))
        self.put("/usr/lib/liba.so", elf())
        self.assertEqual(self.needed(), [self.LOADER, "/usr/lib/liba.so"])

    def test_rpath_is_inherited_and_runpath_is_not(self):
        self.put("/bin/prog", elf(["liba.so"], self.LOADER, rpath="/opt/r:$ORIGIN/../own"))
        self.put("/opt/r/liba.so", elf(["libb.so"]))
        self.put("/own/libb.so", elf())
        self.assertEqual(self.needed(), [self.LOADER, "/opt/r/liba.so", "/own/libb.so"])
        self.put("/bin/prog", elf(["liba.so"], self.LOADER, rpath="/never", runpath="/opt/r:${ORIGIN}/../own"))
        with self.assertRaisesRegex(pydock.BadRequest, "/opt/r/liba.so needs the library libb.so"):
            self.needed()
        self.put("/opt/r/liba.so", elf(["libb.so"], runpath="/opt/$LIB"))
        self.put("/opt/lib/libb.so", elf())
        self.assertEqual(self.needed()[2], "/opt/lib/libb.so")

    def test_configured_folders(self):
        self.put("/bin/prog", elf(["liba.so", "libb.so", "libc.so"], self.LOADER))
        self.put("/etc/ld.so.conf", b"# comment\ninclude ld.so.conf.d/*.conf\n/opt/last # x\ninclude /etc/ld.so.conf\n")
        self.put("/etc/ld.so.conf.d/a.conf", b"/opt/first\n")
        for path in ("/opt/first/liba.so", "/opt/last/liba.so", "/opt/last/libb.so", "/usr/lib/libb.so",
                     "/lib64/glibc-hwcaps/x86-64-v3/libc.so"):
            self.put(path, elf())
        self.assertEqual(self.needed(), [self.LOADER, "/opt/first/liba.so", "/opt/last/libb.so",
                                         "/lib64/glibc-hwcaps/x86-64-v3/libc.so"])

    def test_musl(self):
        loader = "/lib/ld-musl-x86_64.so.1"
        self.put("/bin/prog", elf(["liba.so", "libc.musl-x86_64.so.1"], loader, runpath="/opt"))
        self.put("/etc/ld-musl-x86_64.path", b"/m\n/n")
        self.put("/opt/liba.so", elf(["libb.so", "libd.so"]))
        self.put("/opt/libd.so", elf())
        self.put("/n/libb.so", elf())
        self.assertEqual(self.needed(), [loader, "/opt/liba.so", "/n/libb.so", "/opt/libd.so"])

    def test_a_static_program_and_no_program_need_nothing(self):
        self.put("/bin/prog", elf())
        self.assertEqual(self.needed(), [])
        self.put("/bin/prog", b"#!/bin/sh\n")
        self.assertEqual(self.needed(), [])

    def test_damaged_files(self):
        whole = elf(["liba.so"], self.LOADER, rpath="/x")
        self.put("/lib/liba.so", elf())
        rng = random.Random(3)
        for turn in range(600):
            data = bytearray(whole[:rng.randrange(len(whole))] if turn % 3 == 0 else whole)
            for _ in range(turn % 4):
                if data:
                    data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 255))
            self.put("/bin/prog", bytes(data))
            try:
                self.needed()
            except pydock.BadRequest:
                pass

    def test_it_agrees_with_ldd(self):
        if not shutil.which("ldd"):
            self.skipTest("needs the program ldd")
        for path in ("/bin/sh", "/bin/bash", "/usr/bin/python3", "/bin/ip", "/sbin/ip", "/usr/bin/curl"):
            if not os.path.exists(path):
                continue
            listed = subprocess.run(["ldd", path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.decode()
            expected = {os.path.realpath(name) for name in re.findall(r"(/\S+) \(0x", listed)}
            self.assertEqual({os.path.realpath(name) for name in pydock.HostFiles("/").needed(path)}, expected, path)


@needs_root
class MakeRootTest(unittest.TestCase):
    def setUp(self):
        self.top = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.top)

    def make(self, *programs, name="root"):
        target = os.path.join(self.top, name)
        os.mkdir(target)
        pydock.make_root(target, programs)
        return target

    def run_in(self, root, *command):
        done = subprocess.run(["chroot", root, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={"PATH": pydock.DEFAULT_PATH})
        self.assertEqual(done.returncode, 0, done.stdout)
        return done.stdout.decode()

    def digest(self, root):
        digest = hashlib.sha256()
        with pydock.opened_folder(root) as fd:
            pydock.pack(fd, digest.update)
        return digest.hexdigest()

    def test_the_default_has_a_shell(self):
        root = self.make()
        self.assertEqual(self.run_in(root, "/bin/sh", "-c", "cat /etc/passwd && ls -d /tmp").split(":")[0], "root")
        for path in ("/bin/sh", "/usr/bin/env", "/bin/ls"):
            self.assertTrue(os.path.lexists(root + path), path)

    def test_named_programs_work(self):
        root = self.make("sh", "ls", "env", "/bin/cat")
        self.assertIn("usr", self.run_in(root, "/bin/sh", "-c", "ls / && cat /etc/group && /usr/bin/env"))
        self.assertFalse(os.path.lexists(root + "/bin/cp"))
        for name in ("bin", "sbin", "lib"):
            self.assertEqual(os.path.islink(os.path.join(root, name)), os.path.islink("/" + name))

    def test_folders_and_modes(self):
        root = self.make("true")
        for name, mode in (("", 0o755), ("tmp", 0o1777), ("root", 0o700), ("proc", 0o555), ("var/tmp", 0o1777),
                           ("etc", 0o755)):
            status = os.stat(os.path.join(root, name))
            self.assertEqual((oct(stat.S_IMODE(status.st_mode)), status.st_uid), (oct(mode), 0), name)
        self.assertEqual(stat.S_IMODE(os.stat(root + "/etc/passwd").st_mode), 0o644)

    def test_the_same_host_gives_the_same_bytes(self):
        first = self.digest(self.make("sh", "env", name="one"))
        old = os.umask(0o077)
        try:
            self.assertEqual(self.digest(self.make("sh", "env", name="two")), first)
        finally:
            os.umask(old)

    def test_scripts_bring_their_interpreter(self):
        script = os.path.join(self.top, "script")
        for line in ("#!/bin/sh", "#!/usr/bin/env sh", "#! /usr/bin/env -S sh"):
            with open(script, "w") as f:
                f.write(line + "\necho from a script\n")
            os.chmod(script, 0o755)
            root = self.make(script, name=f"r{len(line)}")
            self.assertEqual(self.run_in(root, script), "from a script\n")

    @unittest.skipUnless(os.path.exists("/usr/bin/python3"), "python3 is missing")
    def test_python_brings_its_library(self):
        root = self.make("/usr/bin/python3")
        self.assertEqual([d for d, _, _ in os.walk(root) if d.endswith(("__pycache__", "/test", "-packages"))], [])
        code = "import json, ctypes, zlib, subprocess, socket; print(json.dumps([1]))"
        self.assertEqual(self.run_in(root, "/usr/bin/python3", "-c", code), "[1]\n")

    @unittest.skipUnless(os.path.exists("/bin/bash"), "bash is missing")
    def test_bash_brings_terminals(self):
        root = self.make("bash", "true")
        self.assertEqual(self.run_in(root, "/bin/bash", "-c", "echo $BASH_VERSION")[:1].isdigit(), True)
        terminfo = [os.path.join(d, "xterm") for d, _, files in os.walk(root) if "xterm" in files]
        self.assertEqual(bool(terminfo), any(os.path.exists(d + "/x/xterm") for d in pydock._TERMINFO))

    def test_what_is_missing_is_named(self):
        for number, name in enumerate(("no-such-program", "./sh", "/no/such", "/etc/passwd", "/bin")):
            with self.subTest(name), self.assertRaisesRegex(pydock.BadRequest, re.escape(name)):
                self.make("sh", name, name=f"x{number}")


########################################################################
# 9. Registry
########################################################################

def layer_archive(entries):
    """The bytes of a tar archive of {name: content, or a TarInfo to add unchanged}, or of such pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in entries.items() if isinstance(entries, dict) else entries:
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                archive.addfile(content)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def link_to(target, kind=tarfile.SYMTYPE):
    entry = tarfile.TarInfo()
    entry.type, entry.linkname = kind, target
    return entry


def sha256(data):
    return "sha256:" + pydock.sha256_hex(data)


def add_host_address(address, add_cleanup):
    """Give this host another address, on a bridge of its own that add_cleanup takes away again. A registry at such an
    address does not count as loopback."""
    name = f"pdkth{address.rpartition('.')[2]}"
    with pydock.Netlink() as netlink:
        netlink.add_bridge(name)
        netlink.add_address(name, address + "/32")
        netlink.set_link(name, up=True)
    add_cleanup(delete_link, name)


def make_self_signed_certificate(key, certificate, names, *extensions):
    """Make a key and a certificate for `names` (a subjectAltName) with openssl, at these paths."""
    words = [word for extension in (f"subjectAltName={names}",) + extensions for word in ("-addext", extension)]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=localhost", "-keyout", key, "-out", certificate] + words, check=True,
                   stderr=subprocess.DEVNULL)


def free_port():
    """A TCP port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class FakeRegistry:
    """A registry that serves what a test puts into `answers`: path or (method, path) -> (status, headers, body), or a
    function of the handler that returns such a tuple, or None if it has answered itself. blob(), manifest() and image()
    add to it. `requests` lists the (method, path, headers) of all requests."""

    def __init__(self, context=None, address="127.0.0.1"):
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_one_request(self):
                with contextlib.suppress(ConnectionError, ssl.SSLError, ValueError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def serve(self):
                path = self.path.partition("?")[0]
                fake.requests.append((self.command, self.path, dict(self.headers)))
                answer = fake.answers.get((self.command, path)) or fake.answers.get(path)
                if callable(answer):
                    answer = answer(self)
                if answer is None and fake.answers.get(path) is None:
                    answer = (404, {}, b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}')
                if answer is not None:
                    self.reply(*answer)

            do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_CONNECT = serve

            def reply(self, status, headers, body):
                self.send_response(status)
                for key, value in dict({"Content-Length": str(len(body))}, **headers).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        self.requests, self.answers = [], {"/v2/": (200, {}, b"{}")}
        self.server = http.server.ThreadingHTTPServer((address, 0), Handler)
        self.server.daemon_threads = True
        if context:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.host = ":".join(map(str, self.server.server_address[:2]))
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,))
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def blob(self, data, digest=None, path="x"):
        digest = digest or sha256(data)
        self.answers[f"/v2/{path}/blobs/{digest}"] = (200, {}, data)
        return digest

    def manifest(self, document, tag="latest", media_type=pydock.MANIFEST_V2, path="x"):
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        for name in (tag, sha256(data)):
            self.answers[f"/v2/{path}/manifests/{name}"] = (200, {"Content-Type": media_type}, data)
        return {"mediaType": media_type, "digest": sha256(data), "size": len(data)}

    def tunnel(self, name, target):
        """Act as a proxy: a CONNECT to `name` is connected to the registry `target`."""
        def serve(handler):
            handler.send_response(200)
            handler.end_headers()
            handler.close_connection = True
            with socket.create_connection(target.server.server_address) as upstream:
                peers = {handler.connection: upstream, upstream: handler.connection}
                while True:
                    for ready in select.select(list(peers), [], [])[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        peers[ready].sendall(data)

        self.answers["CONNECT", name] = self.answers[name] = serve

    def image(self, tars, config=None, tag="latest", path="x", **more):
        """Serve an image with these layers, each the bytes of a tar or a pair (bytes that are sent, plain tar)."""
        pairs = [layer if isinstance(layer, tuple) else (gzip.compress(layer), layer) for layer in tars]
        config = {"architecture": pydock.ARCHITECTURE, "os": "linux", "config": {"Cmd": ["sh"]}, **(config or {})}
        config.setdefault("rootfs", {"type": "layers", "diff_ids": [sha256(plain) for _, plain in pairs]})
        data = json.dumps(config).encode()
        document = {"schemaVersion": 2, "mediaType": pydock.MANIFEST_V2,
                    "config": {"mediaType": pydock.CONFIG_MEDIA_TYPE, "size": len(data),
                               "digest": self.blob(data, path=path)},
                    "layers": [{"mediaType": pydock.LAYER_GZIP, "size": len(sent), "digest": self.blob(sent, path=path)}
                               for sent, _ in pairs]}
        document.update(more)
        return self.manifest(document, tag, path=path)


@needs_root
class RegistryCase(unittest.TestCase):
    """An image store in a temporary root, with a spawner and a registry client that retries quickly."""

    @classmethod
    def setUpClass(cls):
        cls.spawner = pydock.Spawner(CGROUP_PARENT)

    @classmethod
    def tearDownClass(cls):
        cls.spawner.socket.close()

    def setUp(self):
        self.root = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(pydock.remove_tree, self.root)
        self.log = []
        self.open_store()

    def open_store(self, root=None, **options):
        """Open the layers, images and registry of a root, as a daemon does at its start."""
        root = root or self.root
        os.makedirs(os.path.join(root, "tmp"), exist_ok=True)
        self.layers = pydock.Layers(root, pydock.OverlayDriver(root))
        self.images = pydock.Images(root, self.layers)
        self.options = pydock.RegistryOptions(**dict({"delay": 0.01, "timeout": 5, "environment": {},
                                                      "certs": (os.path.join(root, "certs.d"),)},
                                                     **options))
        self.registry = pydock.Registry(root, self.images, self.layers, self.spawner, self.options)
        self.images.used_chains = self.registry.blobs.used_chains

    def empty_store(self):
        """Open another, empty store below the same root, as on another machine."""
        root = os.path.join(self.root, "other")
        pydock.remove_tree(root)
        self.open_store(root)
        self.log = []

    def small_disk(self, size):
        """The path of a new tmpfs of this size."""
        disk = os.path.join(self.root, "disk")
        os.mkdir(disk)
        pydock.mount("tmpfs", disk, "tmpfs", 0, "size=" + size)
        self.addCleanup(pydock.umount, disk)
        return disk

    def fake(self, **options):
        fake = FakeRegistry(**options)
        self.addCleanup(fake.close)
        return fake

    def pull(self, name, **options):
        return self.registry.pull(name, progress=self.log.append, **options)

    def states(self, name=None):
        return [entry["status"] for entry in self.log if "status" in entry and entry.get("id") == name]

    def file(self, image, path):
        """The content of a file, from the topmost layer of the image that has the file."""
        for chain in reversed(self.layers.chain(image.chain)):
            with contextlib.suppress(FileNotFoundError):
                with open(self.layers.path(chain, "diff", path), "rb") as file:
                    return file.read()
        raise FileNotFoundError(path)

    def make_image(self, *layers, tag=None, **config):
        """Make an image in the store from these layers, each {name: bytes}."""
        chain, diff_ids = None, []
        for files in layers:
            with self.layers.staging_folder() as folder:
                diff = os.path.join(folder, "diff")
                for name, content in files.items():
                    path = os.path.join(diff, name)
                    os.makedirs(os.path.dirname(path), exist_ok=True)
                    with open(path, "wb") as file:
                        file.write(content)
                    os.utime(path, (1, 1))
                os.utime(diff, (1, 1))
                with pydock.opened_folder(diff) as fd:
                    diff_ids.append(pydock.layer_digest(fd, "overlay"))
                chain = self.layers.commit_layer(folder, chain, diff_ids[-1], sum(map(len, files.values())))
        history = [{"created": "2024-01-02T03:04:05Z", "created_by": "test"}]
        image = self.images.add(pydock.new_image_config({}, dict({"Cmd": ["/bin/sh"]}, **config), diff_ids, history))
        if tag:
            self.images.tag(image, pydock.Reference.parse(tag))
        return image

    def assert_nothing_left(self, downloads=False):
        """Check that the store holds no image, no layer and no unfinished file."""
        self.assertEqual(self.images.images, {})
        self.assertEqual(self.images.tags, {})
        self.assertEqual(os.listdir(os.path.join(self.root, "tmp")), [])
        self.images.collect()
        self.registry.blobs.collect()
        if not downloads:
            self.assertEqual(self.layers.meta, {})
            self.assertEqual(os.listdir(os.path.join(self.root, "downloads")), [])
            self.assertEqual(os.listdir(os.path.join(self.root, "blobs", "sha256")), [])

    @contextlib.contextmanager
    def fails(self, words, status=None):
        with self.assertRaises(pydock.Error) as caught:
            yield
        self.assertIn(words, str(caught.exception))
        if status:
            self.assertEqual(caught.exception.status, status)


class DocumentTest(unittest.TestCase):
    def test_json_from_outside(self):
        for bad in (b"", b"[]", b"[" * 100000, b'{"a":NaN}', b'{"a":' + b"9" * 5000 + b"}", b'{"a":"\\ud800"}',
                    b'{"a":1e999}', b"\xff{}", b'{"a":' * 3000):
            with self.assertRaises(pydock.BadRequest):
                pydock.parse_document(bad, "it")
        self.assertEqual(pydock.parse_document(b'{"a":"\\u00e9"}', "it"), {"a": "\u00e9"})

    def test_config_fields_have_their_types(self):
        good = {"rootfs": {"type": "layers", "diff_ids": []}, "config": {"Env": None, "Cmd": ["a"], "StopTimeout": 3}}
        pydock.check_image_config(json.dumps(good).encode())
        for bad in ({"config": {"Env": "x"}}, {"config": {"Env": [1]}}, {"config": {"Cmd": {}}},
                    {"config": {"Labels": {"a": 1}}}, {"config": []}, {"config": {"StopTimeout": True}},
                    {"config": {"Volumes": ["/x"]}}, {"history": {}}, {"history": [1]}, {"created": 5},
                    {"created": "yesterday"}, {"history": [{"created": "?"}]}, {"rootfs": None},
                    {"rootfs": {"type": "layers", "diff_ids": ["md5:1"]}},
                    {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "A" * 64]}},
                    {"rootfs": {"type": "layers", "diff_ids": [5]}}, {"rootfs": {"type": "host"}}, {"os": "windows"},
                    {"architecture": 3}, {"config": {"Healthcheck": {"Test": "x"}}},
                    {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64] * 501}}):
            with self.assertRaises(pydock.BadRequest, msg=str(bad)):
                pydock.check_image_config(json.dumps(dict(good, **bad)).encode())

    def test_ambiguous_manifests_are_refused(self):
        descriptor = {"mediaType": pydock.CONFIG_MEDIA_TYPE, "digest": "sha256:" + "0" * 64, "size": 3}
        manifest = {"schemaVersion": 2, "config": descriptor, "layers": []}
        helm_config = dict(descriptor, mediaType="application/vnd.cncf.helm.config.v1+json")
        self.assertFalse(pydock.Manifest(json.dumps(manifest).encode(), pydock.OCI_MANIFEST).is_index)
        self.assertFalse(pydock.Manifest(json.dumps(manifest).encode(), "text/plain; charset=x").is_index)
        self.assertTrue(pydock.Manifest(b'{"manifests":[]}', pydock.OCI_INDEX + "; charset=utf-8").is_index)
        for media_type, document in ((pydock.MANIFEST_V2, dict(manifest, mediaType=pydock.OCI_INDEX)),
                                     (pydock.OCI_INDEX, manifest), (pydock.OCI_MANIFEST, dict(manifest, manifests=[])),
                                     (pydock.MANIFEST_V2, dict(manifest, fsLayers=[])),
                                     ("", {"manifests": [], "layers": []}), ("", dict(manifest, mediaType=5)),
                                     ("", dict(manifest, mediaType="text/plain")),
                                     ("", {"schemaVersion": 1, "fsLayers": []}),
                                     ("application/vnd.docker.distribution.manifest.v1+prettyjws", {}),
                                     ("", dict(manifest, layers={})), ("", dict(manifest, layers=[5])),
                                     ("", dict(manifest, config=None)),
                                     ("", dict(manifest, layers=[dict(descriptor, digest="sha256:../../x")])),
                                     ("", dict(manifest, layers=[dict(descriptor, digest="md5:" + "0" * 32)])),
                                     ("", dict(manifest, layers=[dict(descriptor, size=-1)])),
                                     ("", dict(manifest, layers=[dict(descriptor, size="1")])),
                                     ("", dict(manifest, layers=[dict(descriptor, mediaType="application/x")])),
                                     ("", dict(manifest, config=helm_config))):
            with self.assertRaises(pydock.BadRequest, msg=f"{media_type} {document}"):
                pydock.Manifest(json.dumps(document).encode(), media_type)
        with self.assertRaises(pydock.Error):
            pydock.Manifest(b"{}", "", "sha256:" + "0" * 64)

    def test_manifest_has_the_bytes_that_docker_writes(self):
        layer = {"mediaType": pydock.LAYER_GZIP, "size": 3001122,
                 "digest": "sha256:b1438e60e8a282119559a3504748ecacacadfd9a7283efbb91605abce11d0bbb"}
        data = pydock.make_manifest("f826d6ed30ca450bf539d724d71a4c93eeee95f8bed9616b3ee4d8c412e76b07", 1712,
                                    [layer]).data.decode()
        self.assertTrue(data.startswith(f'{{\n   "schemaVersion": 2,\n   "mediaType": "{pydock.MANIFEST_V2}",\n'
                                        '   "config": {\n      "mediaType": '))
        self.assertTrue(data.endswith(f'"digest": "{layer["digest"]}"\n      }}\n   ]\n}}'))

    def test_platforms(self):
        def index(*names):
            return [{"digest": name, "platform": dict(zip(("os", "architecture", "variant"), name.split("/")))}
                    for name in names]

        many = index("linux/amd64", "linux/arm/v5", "linux/arm/v7", "linux/arm64/v8", "linux/386", "windows/amd64",
                     "unknown/unknown")
        for platform, expected in (("linux/amd64", "linux/amd64"), ("linux/arm64", "linux/arm64/v8"),
                                   ("aarch64", "linux/arm64/v8"), ("linux/arm", "linux/arm/v7"),
                                   ("linux/arm/v6", "linux/arm/v5"), ("linux/i386", "linux/386"),
                                   ("windows/amd64", "windows/amd64"), ("linux/s390x", None),
                                   ("linux/x86_64", "linux/amd64"), ("linux/amd64/v3", "linux/amd64")):
            entry = pydock.choose_platform(many, pydock.parse_platform(platform))
            self.assertEqual(entry and entry["digest"], expected, platform)
        self.assertEqual(pydock.choose_platform(index("linux/386"), pydock.parse_platform("linux/amd64"))["digest"],
                         "linux/386")
        self.assertIsNone(pydock.choose_platform([{"platform": 5}, {"platform": {"os": "linux", "architecture": []}}],
                                                 pydock.parse_platform("linux/arm")))
        with self.assertRaises(pydock.BadRequest):
            pydock.parse_platform("linux/amd64/v1/x")

    def test_progress_bar_is_dockers(self):
        for current, total, text in (
                (19968, 1984304, "[>                                                  ]  19.97kB/1.984MB"),
                (1481216, 1984304, "[=====================================>             ]  1.481MB/1.984MB"),
                (2129920, 1984304, "[==================================================>]   2.13MB"),
                (3001122, 3001122, "[==================================================>]  3.001MB/3.001MB")):
            self.assertEqual(pydock.progress_bar(current, total), text)

    def test_gzip_of_many_threads_is_one_stream(self):
        data = os.urandom(1 << 19) * 7 + b"x"
        for size in (0, 1, 1 << 18, 1 << 20, len(data)):
            written = []
            for _ in range(2):
                out = io.BytesIO()
                stream = pydock.ParallelGzip(out.write)
                for start in range(0, size, 100001):
                    stream.write(data[start:min(start + 100001, size)])
                stream.close()
                written.append(out.getvalue())
            self.assertEqual(gzip.decompress(written[0]), data[:size])
            self.assertEqual(*written)


class TransportTest(unittest.TestCase):
    def test_challenges(self):
        self.assertEqual(pydock.parse_challenges(
            ['Bearer realm="https://a/t",service="x y",scope="repository:a,b:pull"', "Basic realm=z"]),
                         {"bearer": {"realm": "https://a/t", "service": "x y", "scope": "repository:a,b:pull"},
                          "basic": {"realm": "z"}})
        self.assertEqual(pydock.parse_challenges(["", "Basic", 'Bearer realm="a\\"b"']),
                         {"basic": {}, "bearer": {"realm": 'a"b'}})

    def test_challenges_of_an_attacker(self):
        self.assertEqual(pydock.parse_challenges(['Basic realm="a", Bearer realm="b",scope=c', 'X a="open']),
                         {"basic": {"realm": "a"}, "bearer": {"realm": "b", "scope": "c"}, "x": {"a": "open"}})
        self.assertEqual(len(pydock.parse_challenges([f"scheme{number}" for number in range(100)])), 8)
        self.assertEqual(pydock.parse_challenges(["a" * 100000]), {"a" * 4096: {}})

        def body():
            resource.setrlimit(resource.RLIMIT_CPU, (30, 30))  # of a quadratic search 1 MiB would take a day
            for text in ("a", "a ", ' a="', '\\"', 'a="\\"', "a=", "=", " ", ", ", 'a="b",', "a\t\\"):
                pydock.parse_challenges([text * 8192] * 100)
                list(pydock.CHALLENGE_WORD.finditer("x" + text * (1 << 20)))
            os._exit(7)
        self.assertEqual(os.waitpid(pydock.fork(body), 0)[1] >> 8, 7)

    def test_auth_header(self):
        encoded = base64.urlsafe_b64encode(b'{"username":"a","password":"\xc3\xbf?>","serveraddress":"h"}').decode()
        for text in (encoded, encoded.rstrip("=")):
            self.assertEqual(pydock.decode_registry_auth(text)["password"], "\xff?>")
        both = base64.b64encode(b'{"auth":"%s"}' % base64.b64encode(b"u:p:q")).decode()
        self.assertEqual(pydock.decode_registry_auth(both)["password"], "p:q")
        self.assertEqual(pydock.decode_registry_auth(""), {})
        self.assertEqual(pydock.decode_registry_auth("e30="), {})
        for bad in ("zzz", "!!", base64.b64encode(b"[]").decode(), base64.b64encode(b"{").decode()):
            with self.assertRaises(pydock.BadRequest, msg=bad):
                pydock.decode_registry_auth(bad)

    def test_proxies(self):
        names = {"http_proxy": "http://p:1", "HTTPS_PROXY": "q:2",
                 "NO_PROXY": "a.org, .b.org,10.0.0.0/8,c.org:8443,192.168.1.1"}
        for scheme, host, port, proxy in (("http", "x.org", 80, "http://p:1"), ("https", "x.org", 443, "http://q:2"),
                                          ("https", "a.org", 443, None), ("https", "sub.a.org", 443, None),
                                          ("https", "s.b.org", 443, None), ("https", "xa.org", 443, "http://q:2"),
                                          ("https", "10.1.2.3", 443, None), ("https", "11.1.2.3", 443, "http://q:2"),
                                          ("https", "c.org", 8443, None), ("https", "c.org", 443, "http://q:2"),
                                          ("http", "127.0.0.1", 80, None), ("http", "localhost", 80, None),
                                          ("https", "192.168.1.1", 1, None)):
            self.assertEqual(pydock.proxy_for(scheme, host, port, names), proxy, (scheme, host, port))
        self.assertIsNone(pydock.proxy_for("http", "x", 80, dict(names, NO_PROXY="*")))
        self.assertIsNone(pydock.proxy_for("http", "x", 80, {}))

    def test_who_may_have_plain_http(self):
        for host, insecure, expected in (("127.0.0.1:5000", (), True), ("127.9.9.9", (), True),
                                         ("localhost:1", (), True), ("[::1]:5000", (), True),
                                         ("10.0.0.1:5000", (), False), ("10.0.0.1:5000", ("10.0.0.0/8",), True),
                                         ("10.0.0.1:5000", ("10.0.0.1:5000",), True),
                                         ("10.0.0.1:5001", ("10.0.0.1:5000",), False),
                                         ("127.0.0.1.example.org", (), False)):
            self.assertEqual(pydock.is_insecure(host, insecure), expected, host)
        self.assertEqual(pydock.split_host("a_b.example.:5"), ("a_b.example.", 5))
        for bad in ("a b", "x:99999", "x/../y", "[::1", "..", "a..b", ".a", "a" * 64, "[....]", "[1::2::3]",
                    "x:\u0663"):
            with self.subTest(bad), self.assertRaises(pydock.BadRequest):
                pydock.split_host(bad)


class PullTest(RegistryCase):
    """Pulls from a FakeRegistry, which answers whatever a test tells it to."""

    def test_story_of_a_pull(self):
        fake = self.fake()
        tars = [layer_archive({"a": b"one"}), layer_archive({"b": b"two"})]
        described = fake.image(tars)
        image = self.pull(fake.host + "/x")
        self.assertEqual((self.file(image, "a"), self.file(image, "b")), (b"one", b"two"))
        self.assertEqual(self.images.tags, {fake.host + "/x:latest": image.id})
        self.assertEqual(self.images.digests_of(image), [f"{fake.host}/x@{described['digest']}"])
        self.assertFalse(image.meta["local"])  # an image that was not built locally is never a cache for builds
        self.assertEqual(self.log[0], {"status": "Pulling from x", "id": "latest"})
        ids = {entry["id"] for entry in self.log[1:] if "id" in entry}
        self.assertEqual(len(ids), 2)
        for name in ids:
            states = [state for state in self.states(name) if state not in ("Downloading", "Extracting")]
            self.assertEqual(states, ["Pulling fs layer", "Verifying Checksum", "Download complete", "Pull complete"])
        self.assertEqual([entry["status"] for entry in self.log[-2:]],
                         ["Digest: " + described["digest"], f"Status: Downloaded newer image for {fake.host}/x:latest"])
        del self.log[:], fake.requests[:]
        self.pull(fake.host + "/x:latest")
        self.assertEqual(self.states()[-1], f"Status: Image is up to date for {fake.host}/x:latest")
        self.assertFalse([path for _, path, _ in fake.requests if "blobs" in path])
        self.assertEqual(os.listdir(os.path.join(self.root, "downloads")), [])

    def test_lists_of_tags_without_end(self):
        for tags, sentence in (([1], "tags is no list of names"), ({"a": 1}, "tags is no list of names"),
                               (["a"], "has no end after 20 pages: name the one that you want")):
            fake = self.fake()
            link = {"Link": '</v2/x/tags/list?last=1>; rel="next"'}
            fake.answers["/v2/x/tags/list"] = lambda handler, tags=tags: (
                (200, link, json.dumps({"tags": tags}).encode()) if len(fake.requests) < 100 else (404, {}, b""))
            with mock.patch.object(pydock, "_MAX_PAGES", 20), self.fails(sentence, 400):
                self.pull(fake.host + "/x", all_tags=True)
            self.assertLess(len(fake.requests), 25)

    def test_disk_full_while_downloading(self):
        """An error of our disk is no error of the network: the blob is not asked for again."""
        self.open_store(self.small_disk("4m"))
        fake = self.fake()
        tar = layer_archive({"a": b"small"}) + bytes(6 << 20)
        fake.image([(tar, tar)])
        with self.fails(f"layer {sha256(tar)[7:19]} cannot be written to {self.root}/disk/downloads: "
                        "No space left on device", 500):
            self.pull(fake.host + "/x")
        self.assertEqual([path for _, path, _ in fake.requests].count("/v2/x/blobs/" + sha256(tar)), 1)
        self.assertFalse([entry for entry in self.log if "Retrying" in entry.get("status", "")])
        self.assertEqual(self.layers.meta, {})

    def test_disk_that_cannot_be_read_while_pushing(self):
        fake = self.fake()
        self.make_image({"a": b"1"}, tag=fake.host + "/x")
        fake.answers["/v2/x/blobs/uploads/"] = (202, {"Location": "/v2/x/blobs/uploads/1"}, b"")

        def broken(*_):
            yield b"x"
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        with mock.patch.object(pydock.Pusher, "_read_packed", broken), self.fails("cannot be read: Input/output error"):
            self.registry.push(fake.host + "/x", progress=self.log.append)
        self.assertFalse([entry for entry in self.log if "Retrying" in entry.get("status", "")])

    def test_layer_that_is_here_is_not_fetched(self):
        fake = self.fake()
        base, top = layer_archive({"a": b"one"}), layer_archive({"b": b"two"})
        fake.image([base])
        self.pull(fake.host + "/x")
        fake.image([base, top], tag="2")
        del fake.requests[:], self.log[:]
        self.pull(fake.host + "/x:2")
        self.assertEqual(len([path for _, path, _ in fake.requests if "blobs" in path]), 2)  # config and the new layer
        self.assertEqual([e["status"] for e in self.log].count("Already exists"), 1)

    def test_names(self):
        fake = self.fake()
        first = fake.image([layer_archive({"a": b"1"})], tag="1")
        fake.image([layer_archive({"a": b"2"})], tag="2")
        fake.answers["/v2/x/tags/list"] = lambda handler: (
            (200, {"Link": '</v2/x/tags/list?last=1>; rel="next"'}, b'{"tags":["1"]}') if "last" not in handler.path
            else (200, {}, b'{"tags":["2"]}'))
        self.pull(fake.host + "/x", all_tags=True)
        self.assertEqual(sorted(self.images.tags), [fake.host + "/x:1", fake.host + "/x:2"])
        name = f"{fake.host}/x@{first['digest']}"
        self.pull(name)
        self.assertEqual(self.log[-1]["status"], "Status: Image is up to date for " + name)
        self.assertEqual(self.images.find(name).id, self.images.tags[fake.host + "/x:1"])
        with self.fails(f"manifest for {fake.host}/x:3 not found: manifest unknown: manifest unknown", 404):
            self.pull(fake.host + "/x:3")
        fake.answers["/v2/y/manifests/latest"] = (
            401, {"WWW-Authenticate": 'Bearer realm="x",error="insufficient_scope"'}, b"{}")
        fake.answers["/v2/z/manifests/latest"] = (403, {}, b'{"errors":[{"code":"DENIED","message":"no\\u001b[31m"}]}')
        fake.answers["/v2/n/manifests/latest"] = (
            404, {}, b'{"errors":[{"code":"NAME_UNKNOWN","message":"repository name not known to registry"}]}')
        with self.fails(f"pull access denied for {fake.host}/z, repository does not exist or may require "
                        "'docker login': denied: no\\x1b[31m", 404):
            self.pull(fake.host + "/z")
        with self.fails(f"repository {fake.host}/n not found: name unknown: repository name not known to registry",
                        404):
            self.pull(fake.host + "/n")

    def test_index_has_one_for_each_platform(self):
        fake = self.fake()
        entries = [dict(fake.image([layer_archive({"a": name.encode()})], {"architecture": name}, tag=name),
                        platform={"os": "linux", "architecture": name})
                   for name in ("s390x", pydock.ARCHITECTURE)]
        index = fake.manifest({"schemaVersion": 2, "mediaType": pydock.OCI_INDEX, "manifests": entries}, "multi",
                              pydock.OCI_INDEX)
        image = self.pull(fake.host + "/x:multi")
        self.assertEqual(self.file(image, "a").decode(), pydock.ARCHITECTURE)
        self.assertEqual(self.images.digests_of(image), [f"{fake.host}/x@{index['digest']}"])
        self.assertEqual(self.file(self.pull(fake.host + "/x:multi", platform="linux/s390x"), "a"), b"s390x")
        with self.fails("no matching manifest for linux/riscv64 in the manifest list entries", 404):
            self.pull(fake.host + "/x:multi", platform="linux/riscv64")
        self.pull(fake.host + "/x:s390x", platform="linux/riscv64")
        self.assertIn("wanted linux/riscv64, actual: linux/s390x", " ".join(self.states()))
        inspected = self.registry.distribution(fake.host + "/x:multi")
        self.assertEqual(inspected["Descriptor"]["digest"], index["digest"])
        self.assertEqual([p["architecture"] for p in inspected["Platforms"]], ["s390x", pydock.ARCHITECTURE])

    def test_digests_of_one_image(self):
        """An image has a digest in each repository that it was pulled from, and may have several digests in one
        repository. Removing the last tag of a repository removes that repository's digests too; the image stays as
        long as another repository has a tag or a digest of it."""
        fake = self.fake()
        layers = [layer_archive({"a": b"1"})]
        one, two = fake.image(layers), fake.image(layers, path="y")
        index = fake.manifest({"manifests": [dict(one, platform={"os": "linux", "architecture": pydock.ARCHITECTURE})]},
                              "multi", pydock.OCI_INDEX)
        x, y = fake.host + "/x", fake.host + "/y"
        image = self.pull(x + ":multi")
        for name in (x + "@" + one["digest"], y, y + "@" + two["digest"]):
            self.assertIs(self.pull(name), image)
        digests = [x + "@" + one["digest"], x + "@" + index["digest"], y + "@" + two["digest"]]
        self.assertEqual(self.images.digests_of(image), sorted(digests))
        self.assertIs(self.images.find(digests[1]), image)
        self.open_store()
        image = self.images.find(image.id)
        self.assertEqual(self.images.digests_of(image), sorted(digests))
        with self.fails("(must be forced) - image is referenced in multiple repositories", 409):
            self.images.remove(image.id)
        self.assertEqual(self.images.remove(digests[0]), [{"Untagged": digests[0]}])
        self.assertEqual(self.images.remove(x + ":multi"), [{"Untagged": x + ":multi"}, {"Untagged": digests[1]}])
        self.assertEqual(self.images.remove(y), [{"Untagged": y + ":latest"}, {"Untagged": digests[2]},
                                                 {"Deleted": "sha256:" + image.id},
                                                 {"Deleted": "sha256:" + image.chain}])
        image = self.pull(y + "@" + two["digest"])
        self.images.tag(image, pydock.Reference.parse("z:1"))
        self.assertEqual(self.images.remove("z:1"), [{"Untagged": "z:1"}])
        self.assertEqual(self.images.references_of(image), [digests[2]])
        for tag in ("z:1", "z:2"):
            self.images.tag(image, pydock.Reference.parse(tag))
        self.assertEqual(self.images.remove(digests[2]), [{"Untagged": digests[2]}])
        with self.fails("multiple repositories", 409):
            self.images.remove(image.id[:12])
        self.assertEqual(len(self.images.remove(image.id[:12], force=True)), 4)
        self.assert_nothing_left()

    def test_schema_1_is_refused_with_the_reason(self):
        fake = self.fake()
        fake.manifest({"schemaVersion": 1, "fsLayers": [], "history": []},
                      media_type="application/vnd.docker.distribution.manifest.v1+prettyjws")
        with self.fails("schema 1", 400):
            self.pull(fake.host + "/x")

    def test_content_with_a_wrong_digest_is_refused(self):
        tar = layer_archive({"a": b"data" * 1000})
        zipped = gzip.compress(tar)
        bad = bytearray(zipped)
        bad[len(bad) // 2] ^= 1
        latest = "/v2/x/manifests/latest"
        cases = {
            "layer with another digest": (lambda f: f.blob(gzip.compress(tar + b"\0" * 512), sha256(zipped)),
                                          "verification failed|longer than"),
            "layer of the right size, damaged": (lambda f: f.blob(bytes(bad), sha256(zipped)),
                                                 "verification failed for digest"),
            "short blob": (lambda f: f.blob(zipped[:-9], sha256(zipped)), "ends after"),
            "config with another digest": (
                lambda f: f.blob(b"{}", next(path for path in f.answers if "blobs" in path).rpartition("/")[2]),
                "config verification failed"),
            "manifest is huge": (lambda f: f.answers.update({latest: (200, {}, b"{" + b" " * (5 << 20) + b"}")}),
                                 "more than 4.194MB"),
            "manifest is HTML": (
                lambda f: f.answers.update({latest: (200, {"Content-Type": "text/html"}, b"<html>")}),
                "not valid JSON"),
            "manifest digest header lies": (
                lambda f: f.answers.update({latest: (200, {"Docker-Content-Digest": "sha256:" + "0" * 64},
                                                     f.answers[latest][2])}),
                "manifest verification failed"),
        }
        for name, (spoil, words) in cases.items():
            with self.subTest(name):
                fake = self.fake()
                fake.image([(zipped, tar)])
                spoil(fake)
                with self.assertRaisesRegex(pydock.Error, words):
                    self.pull(fake.host + "/x")
                self.assert_nothing_left(downloads=name == "short blob")
                self.registry.blobs.clean()

    def test_invalid_layers_are_refused(self):
        tar = layer_archive({"a": os.urandom(3000)})
        outside = os.path.join(self.root, "outside")
        os.mkdir(outside)
        climb = [("a", link_to(outside)), ("a/evil", b"x")]
        cases = {"gzip ends early": ((gzip.compress(tar)[:-20], tar), "cut off"),
                 "gzip is followed by junk": ((gzip.compress(tar) + b"junk junk", tar), "something else"),
                 "unpacks to something else": ((gzip.compress(tar), tar + b"x"), "verification failed"),
                 "no tar": ((b"x" * 2000, b"x" * 2000), "not a valid tar"),
                 "leads out": (layer_archive({"../evil": b"x"}), "leads out"),
                 "link to another layer": (layer_archive({"h": link_to("first", tarfile.LNKTYPE)}),
                                           "there is no such file"),
                 "hard link out": (layer_archive({"h": link_to("../../etc/passwd", tarfile.LNKTYPE)}), "leads out"),
                 "whiteout of dot dot": (layer_archive({"a/.wh...": b""}), "whiteout")}
        for name, (layer, words) in cases.items():
            with self.subTest(name):
                fake = self.fake()
                fake.image([layer_archive({"first": b"1"}), layer])
                with self.fails(words, 400):
                    self.pull(fake.host + "/x")
                self.assert_nothing_left()
        fake = self.fake()
        fake.image([layer_archive(climb)])
        with contextlib.suppress(pydock.Error):
            self.pull(fake.host + "/x")
        self.assertEqual(os.listdir(outside), [])

    def test_count_of_layers_must_agree(self):
        fake = self.fake()
        fake.image([layer_archive({"a": b""})], {"rootfs": {"type": "layers", "diff_ids": []}})
        with self.fails("0 layers, its manifest 1", 400):
            self.pull(fake.host + "/x")

    def test_unknown_keys_of_an_image_config_are_ignored(self):
        fake = self.fake()
        fake.image([layer_archive({"a": b""})], {"config": {"Cmd": ["x"], "Privileged": True, "Binds": ["/:/h"],
                                                            "HostConfig": {"Privileged": True},
                                                            "SecurityOpt": ["seccomp=unconfined"]},
                                                 "HostConfig": {"Privileged": True}})
        self.assertEqual(self.pull(fake.host + "/x").container_config, {"Cmd": ["x"]})

    def test_two_gigabytes_of_zeros_in_two_megabytes(self):
        """A layer of zeros is unpacked in bounded memory, and refused if the disk has no room for it, as here."""
        disk = self.small_disk("64m")
        self.open_store(disk)
        entry = tarfile.TarInfo("zeros")
        entry.size = 2 << 30
        plain = [entry.tobuf()] + [bytes(1 << 20)] * 2048 + [bytes(1024)]
        packer, digest, parts = zlib.compressobj(1, 8, 31), hashlib.sha256(), []
        for part in plain:
            digest.update(part)
            parts.append(packer.compress(part))
        sent = b"".join(parts) + packer.flush()
        self.assertLess(len(sent), 16 << 20)
        fake = self.fake()
        fake.image([(sent, b"")], {"rootfs": {"type": "layers", "diff_ids": ["sha256:" + digest.hexdigest()]}})
        with self.fails("the archive holds more than"):
            self.pull(fake.host + "/x")
        self.assertEqual(self.layers.meta, {})
        self.assertEqual(os.listdir(os.path.join(disk, "tmp")), [])

    def test_disk_full_in_the_middle(self):
        self.open_store(self.small_disk("4m"))
        fake = self.fake()
        fake.image([layer_archive({"a": os.urandom(1 << 20)}), layer_archive({"b": os.urandom(6 << 20)})])
        with self.assertRaises(pydock.Error) as caught:
            self.pull(fake.host + "/x")
        self.assertRegex(str(caught.exception), "No space left|holds more than")
        self.assertEqual((self.images.images, self.layers.meta), ({}, {}))
        self.registry.blobs.clean()
        fake.image([layer_archive({"a": b"small"})])
        self.pull(fake.host + "/x")

    def test_three_hundred_layers(self):
        fake = self.fake()
        fake.image([layer_archive({f"f{i}": b"%d" % i}) for i in range(300)])
        image = self.pull(fake.host + "/x")
        self.assertEqual(len(self.layers.chain(image.chain)), 300)
        self.assertEqual(self.file(image, "f299"), b"299")

    def test_whiteouts_links_and_attributes(self):
        special = tarfile.TarInfo()
        special.pax_headers = {"SCHILY.xattr.security.capability": "\x01\0\0\2\0\4\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
                               "SCHILY.xattr.trusted.overlay.opaque": "y"}
        odd = "new\nline \udcff"
        device = tarfile.TarInfo()
        device.type, device.devmajor, device.devminor = tarfile.CHRTYPE, 1, 3
        old = tarfile.TarInfo()
        old.mtime = -5
        fake = self.fake()
        fake.image([layer_archive([("d/x", b"x"), ("d/y", b"y"), ("gone", b"1"), (odd, b"odd"), ("null", device),
                                   ("old", old), ("ping", special)]),
                    layer_archive([(".wh.gone", b""), ("d/.wh..wh..opq", b""), ("d/z", b"z"), ("n" * 200, b"long"),
                                   ("hard", link_to("d/z", tarfile.LNKTYPE))])])
        image = self.pull(fake.host + "/x")
        low, high = [self.layers.path(chain, "diff") for chain in self.layers.chain(image.chain)]
        self.assertTrue(pydock.is_whiteout(os.lstat(high + "/gone")))
        self.assertEqual(os.getxattr(high + "/d", "trusted.overlay.opaque"), b"y")
        self.assertEqual(os.stat(high + "/d/z").st_nlink, 2)
        self.assertEqual(self.file(image, "n" * 200), b"long")
        self.assertEqual(self.file(image, odd), b"odd")
        self.assertEqual(os.stat(low + "/null").st_rdev, os.makedev(1, 3))
        self.assertEqual(os.stat(low + "/old").st_mtime, -5)
        self.assertEqual(os.listxattr(low + "/ping"), ["security.capability"])

    def test_layers_of_gnu_tar_and_odd_numbers(self):
        buffer, long = io.BytesIO(), "/".join(["folder" * 20] * 3) + "/" + "n" * 200
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
            for name, mtime in ((long, 1 << 40), ("early", -(1 << 40)), ("now", 1600000000)):
                entry = tarfile.TarInfo(name)
                entry.size, entry.mtime, entry.uid = 4, mtime, 1 << 30
                archive.addfile(entry, io.BytesIO(b"data"))
            link = link_to(long)
            link.name = "link"
            archive.addfile(link)
        pax = tarfile.TarInfo()
        pax.pax_headers, pax.size = {"mtime": "99999999999999999999", "GNU.sparse.map": "4096,3",
                                     "GNU.sparse.size": "1000000"}, 3
        sparse = io.BytesIO()
        with tarfile.open(fileobj=sparse, mode="w", format=tarfile.PAX_FORMAT) as archive:
            pax.name = "sparse"
            archive.addfile(pax, io.BytesIO(b"abc"))
        fake = self.fake()
        fake.image([buffer.getvalue(), sparse.getvalue()])
        image = self.pull(fake.host + "/x")
        low, high = [self.layers.path(chain, "diff") for chain in self.layers.chain(image.chain)]
        self.assertEqual((self.file(image, long), os.readlink(low + "/link")), (b"data", long))
        times = [os.stat(f"{low}/{name}").st_mtime for name in (long, "early", "now")]
        self.assertGreater(times[0], 1 << 33)  # times out of range become the file system's last and first second
        self.assertLess(times[1], 0)
        self.assertEqual(times[2], 1600000000)
        self.assertEqual(os.stat(low + "/now").st_uid, 1 << 30)
        self.assertEqual(self.file(image, "sparse"), bytes(4096) + b"abc" + bytes(1000000 - 4099))
        self.assertLess(os.stat(high + "/sparse").st_blocks * 512, 100000)

    @unittest.skipUnless(shutil.which("zstd"), "needs zstd")
    def test_layers_of_zstd(self):
        tar = layer_archive({"a": b"1" * 100000})
        sent = subprocess.run(["zstd", "-cq"], input=tar, stdout=subprocess.PIPE, check=True).stdout
        fake = self.fake()
        described = fake.image([(sent, tar)],
                               layers=[{"mediaType": pydock.LAYER_GZIP.replace("gzip", "zstd"), "size": len(sent),
                                        "digest": sha256(sent)}])
        self.assertEqual(self.file(self.pull(fake.host + "/x"), "a"), b"1" * 100000)
        image = self.images.find(fake.host + "/x")
        self.assertEqual(self.images.digests_of(image), [f"{fake.host}/x@{described['digest']}"])
        self.images.remove(fake.host + "/x")
        self.registry.blobs.collect()
        with mock.patch.object(pydock, "find_program", lambda *_: None), mock.patch.object(pydock, "_CODECS", tuple(
                (mark, name, (lambda: None) if name == "zstd" else make) for mark, name, make in pydock._CODECS)):
            self.registry.blobs.spawner = pydock.Spawner(CGROUP_PARENT)
        self.addCleanup(self.registry.blobs.spawner.socket.close)
        with self.fails("is compressed with zstd: install the program zstd", 500):
            self.pull(fake.host + "/x")

    def test_blob_is_resumed_after_a_cut(self):
        tar = layer_archive({"a": os.urandom(500000)})
        fake = self.fake()
        fake.image([(tar, tar)])
        path = "/v2/x/blobs/" + sha256(tar)
        answers = iter(("cut", "500", "hang up", "range"))

        def serve(handler):
            step, start = next(answers), int(handler.headers.get("Range", "bytes=0-")[6:-1])
            if step == "500":
                return 500, {}, b"oh"
            if step == "hang up":
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return None
            rest = tar[start:] if step == "range" else tar[:300000]
            handler.send_response(206 if start else 200)
            handler.send_header("Content-Length", str(len(tar) - start))
            handler.send_header("Content-Range", f"bytes {start}-{len(tar) - 1}/{len(tar)}")
            handler.end_headers()
            handler.wfile.write(rest)
            handler.close_connection = True
            return None

        fake.answers[path] = serve
        self.assertEqual(len(self.file(self.pull(fake.host + "/x"), "a")), 500000)
        ranges = [headers.get("Range") for _, target, headers in fake.requests if target == path]
        self.assertEqual(len(ranges), 4)
        self.assertIsNone(ranges[0])
        self.assertEqual(ranges[1], ranges[3])
        self.assertGreater(int(ranges[3][6:-1]), 200000)
        self.assertIn("Retrying in 0 seconds", self.states(sha256(tar)[7:19]))

    def test_server_without_ranges_and_server_that_hangs(self):
        tar = layer_archive({"a": os.urandom(500000)})
        fake = self.fake()
        fake.image([(tar, tar)])
        self.open_store(timeout=0.3)
        count, stop = [], threading.Event()
        self.addCleanup(stop.set)

        def serve(handler):
            count.append(1)
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(tar)))
            handler.end_headers()
            handler.wfile.write(tar if len(count) > 1 else tar[:400000])
            if len(count) == 1:
                stop.wait(20)
                handler.close_connection = True

        fake.answers["/v2/x/blobs/" + sha256(tar)] = serve
        self.assertEqual(len(self.file(self.pull(fake.host + "/x"), "a")), 500000)
        self.assertEqual(len(count), 2)

    def test_too_many_requests(self):
        fake = self.fake()
        fake.image([layer_archive({"a": b"1"})])
        real, answers = fake.answers["/v2/x/manifests/latest"], [(429, {"Retry-After": "0"}, b""), (503, {}, b"")]
        fake.answers["/v2/x/manifests/latest"] = lambda handler: answers.pop(0) if answers else real
        self.pull(fake.host + "/x")
        fake.answers["/v2/x/manifests/latest"] = (429, {"Retry-After": "0"},
                                                  b'{"errors":[{"code":"TOOMANYREQUESTS","message":"slow down"}]}')
        with self.fails("toomanyrequests: slow down", 500):
            self.pull(fake.host + "/x")
        self.assertEqual(len([1 for _, path, _ in fake.requests if path.endswith("latest")]), 3 + 5)
        fake.image([layer_archive({"a": b"2"})], tag="2")
        layer = [path for path in fake.answers if "blobs" in path][-1]
        whole, busy = fake.answers[layer], [(429, {"Retry-After": "1"}, b"")]
        fake.answers[layer] = lambda handler: busy.pop() if busy else whole
        self.pull(fake.host + "/x:2")
        self.assertIn("Retrying in 1 second", self.states(layer.rpartition(":")[2][:12]))
        fake.answers["/v2/x/manifests/latest"] = (500, {}, b"<html>")
        with self.fails("received unexpected HTTP status: 500 Internal Server Error", 500):
            self.pull(fake.host + "/x")

    def test_pull_goes_on_where_the_last_daemon_died(self):
        first, second = layer_archive({"a": b"1"}), layer_archive({"b": os.urandom(600000)})
        fake = self.fake()
        fake.image([(first, first), (second, second)])
        path = "/v2/x/blobs/" + sha256(second)
        whole = fake.answers[path]
        reached = threading.Event()

        def stall(handler):
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(second)))
            handler.end_headers()
            handler.wfile.write(second[:400000])
            reached.set()
            stop.wait(30)
            handler.close_connection = True

        stop = threading.Event()
        self.addCleanup(stop.set)
        fake.answers[path] = stall
        child = os.fork()  # plays the daemon that is killed in the middle of a pull
        if not child:
            try:
                self.spawner = pydock.Spawner(CGROUP_PARENT)
                self.open_store()
                self.registry.pull(fake.host + "/x")
            finally:
                os._exit(1)
        self.assertTrue(reached.wait(20))
        partial = os.path.join(self.root, "downloads", sha256(second)[7:])
        eventually(lambda: os.path.exists(partial) and os.path.getsize(partial) > 200000
                   and os.listdir(os.path.join(self.root, "layers")), 20)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stop.set()

        def resume(handler):
            if "Range" not in handler.headers:
                return whole
            start = handler.headers["Range"][6:-1]
            return 206, {"Content-Range": f"bytes {start}-"}, second[int(start):]
        fake.answers[path] = resume
        self.open_store()
        self.assertEqual(self.images.images, {})
        self.images.collect()
        self.registry.blobs.collect()
        self.assertEqual(len(self.layers.meta), 1)
        del fake.requests[:]
        self.assertEqual(self.file(self.pull(fake.host + "/x"), "a"), b"1")
        self.assertIn("Already exists", self.states(sha256(first)[7:19]))
        self.assertEqual([bool(headers.get("Range")) for _, target, headers in fake.requests if target == path], [True])

    def test_damaged_rest_of_an_earlier_pull(self):
        tar = layer_archive({"a": os.urandom(300000)})
        with open(os.path.join(self.root, "downloads", sha256(tar)[7:]), "wb") as file:
            file.write(b"rubbish" * 1000)
        fake = self.fake()
        fake.image([(tar, tar)])
        self.assertEqual(len(self.file(self.pull(fake.host + "/x"), "a")), 300000)

    def test_client_that_goes_away(self):
        fake = self.fake()
        fake.image([layer_archive({"a": os.urandom(100000)}) for _ in range(5)])

        def gone(message):
            if message.get("status") == "Pull complete":
                raise BrokenPipeError("the client has gone")

        with self.assertRaises(BrokenPipeError):
            self.registry.pull(fake.host + "/x", progress=gone)
        self.assertEqual(self.images.images, {})
        self.pull(fake.host + "/x")

    def test_upload_is_sent_again_after_trouble(self):
        fake, other = self.fake(), self.fake()
        image = self.make_image({"a": os.urandom(100000)}, tag=fake.host + "/x:1")
        sent, troubles = {}, ["503", "hang up"]

        def body(handler):
            parts = []
            while True:
                size = int(handler.rfile.readline(), 16)
                parts.append(handler.rfile.read(size))
                handler.rfile.readline()
                if not size:
                    return b"".join(parts)

        def patch(handler):
            if troubles and troubles[-1] == "hang up":
                troubles.pop()
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return None
            data = body(handler)
            if troubles:
                troubles.pop()
                return 503, {"Retry-After": "0"}, b""
            sent[sha256(data)] = data
            return 202, {"Location": f"http://{other.host}/finish?state=1"}, b""

        def finish(handler):
            digest = urllib.parse.parse_qs(handler.path.partition("?")[2])["digest"][0]
            return (201, {}, b"") if digest in sent else (400, {}, b"")

        def manifest(handler):
            data = handler.rfile.read(int(handler.headers["Content-Length"]))
            sent[sha256(data)] = data
            return 201, {}, b""

        fake.answers["/v2/"] = (401, {"WWW-Authenticate": "Basic realm=x"}, b"")
        fake.answers["/v2/x/blobs/uploads/"] = (202, {"Location": "/v2/x/upload"}, b"")
        fake.answers["/v2/x/upload"], fake.answers["/v2/x/manifests/1"] = patch, manifest
        other.answers["/finish"] = finish
        self.registry.push(fake.host + "/x", "1", {"username": "u", "password": "p"}, self.log.append)
        document = json.loads(sent[self.log[-1]["aux"]["Digest"]])
        self.assertEqual(document["config"]["digest"], "sha256:" + image.id)
        self.assertEqual(sha256(gzip.decompress(sent[document["layers"][0]["digest"]]))[7:], image.diff_ids[0])
        self.assertEqual(self.states(image.diff_ids[0][:12])[-1], "Pushed")
        self.assertFalse([1 for _, _, headers in other.requests if "Authorization" in headers])

    def test_two_pulls_of_shared_layers_at_once(self):
        fake = self.fake()
        base = [layer_archive({f"f{i}": os.urandom(50000)}) for i in range(4)]
        for tag in "ab":
            fake.image(base + [layer_archive({"top": tag.encode()})], tag=tag)
        errors = []

        def pull(tag):
            try:
                self.registry.pull(f"{fake.host}/x:{tag}")
            except Exception as error:
                errors.append(error)

        run_threads([threading.Thread(target=pull, args=(tag,)) for tag in "abab"])
        self.assertEqual(errors, [])
        self.assertEqual((len(self.images.images), len(self.layers.meta)), (2, 6))
        self.assertEqual(os.listdir(os.path.join(self.root, "downloads")), [])

    def test_driver_without_overlay(self):
        fake = self.fake()
        fake.image([layer_archive({"a": b"1", "d/x": b"x"}),
                    layer_archive({".wh.a": b"", "d/.wh..wh..opq": b"", "b": b"2"})])
        self.layers.driver = pydock.VfsDriver(self.root)
        image = self.pull(fake.host + "/x")
        tree = self.layers.driver.tree(self.layers, image.chain)
        self.assertEqual((sorted(os.listdir(tree)), os.listdir(tree + "/d")), (["b", "d"], []))

    def test_collect_follows_the_layers(self):
        fake = self.fake()
        fake.image([layer_archive({"a": b"1"}), layer_archive({"b": b"2"})])
        self.pull(fake.host + "/x")
        self.assertEqual(len(os.listdir(os.path.join(self.root, "blobs", "sha256"))), 4)  # two layers, config, manifest
        self.registry.blobs.collect()
        self.assertEqual(len(os.listdir(os.path.join(self.root, "blobs", "sha256"))), 4)
        self.images.remove(fake.host + "/x")
        self.registry.blobs.collect()
        self.assert_nothing_left()

    def test_mirror_first_then_the_hub(self):
        hub, mirror = self.fake(), self.fake()
        hub.image([layer_archive({"a": b"hub"})], path="library/x")
        hub.image([layer_archive({"a": b"hub"})], path="library/y")
        mirror.image([layer_archive({"a": b"mirror"})], path="library/x")
        self.open_store(hub="http://" + hub.host, mirrors=[f"http://{mirror.host}/"])
        self.assertEqual(self.file(self.pull("x", auth={"username": "u", "password": "p"}), "a"), b"mirror")
        self.assertEqual(self.file(self.pull("y"), "a"), b"hub")
        self.assertEqual(sorted(self.images.tags), ["x:latest", "y:latest"])
        self.assertFalse([1 for _, _, headers in mirror.requests if "Authorization" in headers])

    def test_proxy(self):
        proxy = self.fake()
        proxy.answers["http://registry.example/v2/"] = (200, {}, b"{}")
        proxy.answers["http://registry.example/v2/x/tags/list"] = (200, {}, b'{"tags":[]}')
        self.open_store(insecure=("registry.example",), environment={"http_proxy": "http://u:p@" + proxy.host,
                                                                     "https_proxy": "http://127.0.0.1:9"})
        with self.fails("has no tags", 404):
            self.pull("registry.example/x", all_tags=True)
        self.assertEqual(proxy.requests[-1][2]["Proxy-Authorization"], "Basic " + base64.b64encode(b"u:p").decode())

    def test_no_proxy(self):
        """A registry at an address that is not loopback is reached through the proxy, or directly if NO_PROXY says
        so."""
        add_host_address("198.51.100.7", self.addCleanup)
        fake, proxy = self.fake(address="198.51.100.7"), self.fake()
        fake.image([layer_archive({"a": b"straight"})])
        proxy.answers.update({f"http://{fake.host}{path}": answer for path, answer in fake.answers.items()})
        for no_proxy, used in (("", True), ("198.51.101.0/24,other", True), ("198.51.100.7:1", True),
                               ("198.51.100.0/24", False), ("other, 198.51.100.7", False), ("*", False),
                               (fake.host, False)):
            with self.subTest(no_proxy):
                self.open_store(insecure=(fake.host,),
                                environment={"http_proxy": "http://" + proxy.host, "no_proxy": no_proxy,
                                             "https_proxy": "http://127.0.0.1:9"}, tries=1)
                count = len(proxy.requests)
                self.assertEqual(self.file(self.pull(fake.host + "/x"), "a"), b"straight")
                self.assertEqual(len(proxy.requests) > count, used)

    def test_a_registry_that_does_not_answer(self):
        port = free_port()
        with self.fails(f'Get "http://127.0.0.1:{port}/v2/": dial tcp 127.0.0.1:{port}: connect: connection refused',
                        500):
            self.pull(f"127.0.0.1:{port}/x")
        with self.fails("no such host", 500):
            self.pull("nobody.invalid/x")

    def test_search(self):
        fake = self.fake()
        results = [{"name": "busybox", "star_count": 3, "is_official": True, "description": "d"}]
        fake.answers["/v1/search"] = (200, {}, json.dumps({"results": results}).encode())
        fake.answers["/v2/_catalog"] = (200, {}, b'{"repositories":["a/busybox","b/other"]}')
        self.open_store(search="http://" + fake.host)
        self.assertEqual(self.registry.search("busy", 5)[0]["name"], "busybox")
        self.assertIn("q=busy&n=5", fake.requests[-1][1])
        self.assertEqual([entry["name"] for entry in self.registry.search(fake.host + "/box")],
                         [fake.host + "/a/busybox"])
        with self.fails("limit 101 is outside the range of [1, 100]", 400):
            self.registry.search("x", 101)


class RegistryCredentialsTest(RegistryCase):
    """Which servers are sent a password or a token, and which are not."""
    user = {"username": "bob", "password": "secret"}

    def with_tokens(self, fake, tokens, realm=None):
        """Make the registry `fake` demand bearer tokens, which the server `tokens` gives at /token. Returns the list of
        valid tokens."""
        valid = []
        image = dict(fake.answers)
        realm = realm or f"http://{tokens.host}/token"
        challenge = f'Bearer realm="{realm}",service="s"'

        def guarded(path):
            def serve(handler):
                if handler.headers.get("Authorization") in ["Bearer " + token for token in valid]:
                    return image[path]
                return (401, {"WWW-Authenticate": challenge},
                        b'{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}')
            return serve

        def give(handler):
            if handler.headers.get("Authorization", "Basic Ym9iOnNlY3JldA==") != "Basic Ym9iOnNlY3JldA==":
                return 401, {}, b'{"details":"incorrect username or password"}'
            valid[:] = [f"t{len(tokens.requests)}"]
            return 200, {}, json.dumps({"token": valid[0], "expires_in": 300, "refresh_token": "again"}).encode()

        for path in image:
            fake.answers[path] = guarded(path)
        tokens.answers["/token"] = give
        return valid

    def test_bearer_tokens_are_asked_for_and_renewed(self):
        fake, tokens = self.fake(), self.fake()
        fake.image([layer_archive({"a": b"1"})])
        valid = self.with_tokens(fake, tokens)
        layer = [path for path in fake.answers if "blobs" in path][-1]
        serve = fake.answers[layer]

        def expire(handler):
            fake.answers[layer] = serve
            valid[:] = []
            return serve(handler)

        fake.answers[layer] = expire
        self.pull(fake.host + "/x", auth=self.user)
        token_requests = [(path, headers) for _, path, headers in tokens.requests if path.startswith("/token")]
        self.assertEqual(len(token_requests), 2)
        query = urllib.parse.parse_qs(token_requests[0][0].partition("?")[2])
        self.assertEqual((query["scope"], query["service"], query["account"]), (["repository:x:pull"], ["s"], ["bob"]))
        self.assertEqual(token_requests[0][1]["Authorization"], "Basic Ym9iOnNlY3JldA==")
        self.assertFalse([1 for _, _, headers in fake.requests if headers.get("Authorization", "").startswith("Basic")])

    def test_token_service_that_is_not_there(self):
        """A token is asked for as often as any request; the request that needs it does not begin anew."""
        fake = self.fake()
        self.with_tokens(fake, fake)
        fake.answers["/token"] = (503, {}, b"")
        with self.fails("503", 500):
            self.pull(fake.host + "/x")
        self.assertEqual(len([path for _, path, _ in fake.requests if path.startswith("/token")]), self.options.tries)

    def test_addresses_that_are_none(self):
        for address in ("http://[::1/x", "http://a b/", "http://h/\u00e9", "http://h/\x7f", "http://[x]/"):
            fake = self.fake()
            self.with_tokens(fake, fake, realm=address)
            with self.fails("which is not valid", 500):
                self.pull(fake.host + "/x")
            self.assertEqual(len(fake.requests), 1)
            fake = self.fake()
            layer = layer_archive({"a": b"1"})
            fake.image([(layer, layer)])
            path = "/v2/x/blobs/" + sha256(layer)
            fake.answers[path] = (307, {"Location": address}, b"")
            with self.fails("which is not valid", 500):
                self.pull(fake.host + "/x")
            self.assertEqual([target for _, target, _ in fake.requests].count(path), 1)
        for address in ("../..", "http://[::1/x", "a..b", "http://../"):
            with self.fails("invalid registry host", 400):
                self.registry.login(dict(self.user, serveraddress=address))

    def test_identity_token_is_posted(self):
        fake, tokens = self.fake(), self.fake()
        fake.image([layer_archive({"a": b"1"})])
        self.with_tokens(fake, tokens)
        give, bodies = tokens.answers["/token"], []

        def take(handler):
            bodies.append(handler.rfile.read(int(handler.headers["Content-Length"])))
            return give(handler)

        tokens.answers["/token"] = take
        self.pull(fake.host + "/x", auth={"identitytoken": "mine"})
        self.assertEqual(urllib.parse.parse_qs(bodies[0].decode())["refresh_token"], ["mine"])

    def test_login(self):
        fake, tokens = self.fake(), self.fake()
        self.with_tokens(fake, tokens)
        login = dict(self.user, serveraddress=f"http://{fake.host}/v2/")
        self.assertEqual(self.registry.login(login), {"Status": "Login Succeeded", "IdentityToken": "again"})
        with self.fails("unauthorized: incorrect username or password", 401):
            self.registry.login(dict(login, password="bad"))
        basic = self.fake()
        basic.answers["/v2/"] = lambda handler: ((200, {}, b"{}")
                                                 if handler.headers.get("Authorization") == "Basic Ym9iOnNlY3JldA=="
                                                 else (401, {"WWW-Authenticate": 'Basic realm="x"'}, b""))
        self.assertEqual(self.registry.login(dict(self.user, serveraddress=basic.host))["Status"], "Login Succeeded")
        with self.fails(f"login attempt to http://{basic.host}/v2/ failed with status: 401 Unauthorized", 401):
            self.registry.login(dict(self.user, password="bad", serveraddress=basic.host))
        with self.fails("no basic auth credentials", 500):
            self.pull(basic.host + "/x")

    def test_redirect_to_another_host_gets_no_credentials(self):
        fake, other = self.fake(), self.fake()
        layer = layer_archive({"a": b"1"})
        fake.image([(layer, layer)])
        path = "/v2/x/blobs/" + sha256(layer)
        other.answers["/stored"] = fake.answers[path]
        fake.answers[path] = (307, {"Location": f"http://{other.host}/stored?secret=1"}, b"")
        answers = dict(fake.answers)

        def guarded(name):
            def serve(handler):
                if handler.headers.get("Authorization") == "Basic Ym9iOnNlY3JldA==":
                    return answers[name]
                return 401, {"WWW-Authenticate": "Basic realm=x"}, b""
            return serve
        for name in answers:
            fake.answers[name] = guarded(name)
        self.assertEqual(self.file(self.pull(fake.host + "/x", auth=self.user), "a"), b"1")
        self.assertEqual(len(other.requests), 1)
        self.assertNotIn("Authorization", other.requests[0][2])

    def test_redirects_that_are_not_followed(self):
        for location in ("file:///etc/shadow", "ftp://x/y", "gopher://127.0.0.1/", ""):
            fake = self.fake()
            layer = layer_archive({"a": b"1"})
            fake.image([(layer, layer)])
            fake.answers["/v2/x/blobs/" + sha256(layer)] = (302, {"Location": location} if location else {}, b"")
            with self.assertRaises(pydock.Error):
                self.pull(fake.host + "/x")

    def test_layers_urls_are_ignored(self):
        fake, other = self.fake(), self.fake()
        layer = layer_archive({"a": b"1"})
        described = {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "size": len(layer),
                     "digest": sha256(layer), "urls": [f"http://{other.host}/l"]}
        fake.image([(layer, layer)], layers=[described])
        self.pull(fake.host + "/x")
        self.assertEqual(other.requests, [])


class RegistryTlsTest(RegistryCase):
    def setUp(self):
        super().setUp()
        if not shutil.which("openssl"):
            self.skipTest("needs openssl")
        self.certificate = self.make_certificate("server")

    def make_certificate(self, name):
        """Make a self-signed certificate for the registry: (path of the certificate, path of the key)."""
        certificate, key = (os.path.join(self.root, name + ending) for ending in (".pem", ".key"))
        make_self_signed_certificate(key, certificate, "IP:127.0.0.1,DNS:registry.example")
        return certificate, key

    def tls_registry(self, client=None):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.certificate)
        if client:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(client)
        fake = self.fake(context=context)
        fake.image([layer_archive({"a": b"tls"})])
        return fake

    def place(self, host, **files):
        folder = os.path.join(self.root, "certs.d", host)
        os.makedirs(folder, exist_ok=True)
        for name, path in files.items():
            shutil.copy(path, os.path.join(folder, name.replace("_", ".")))

    def test_certificates_in_certs_d(self):
        client = self.make_certificate("client")
        fake = self.tls_registry(client[0])
        self.place(fake.host, ca_crt=self.certificate[0], client_cert=client[0])
        with self.fails("missing key client.key for client certificate"):
            self.pull(fake.host + "/x")
        self.place(fake.host, client_key=client[1])
        self.assertEqual(self.file(self.pull(fake.host + "/x"), "a"), b"tls")

    def test_certificate_of_a_stranger(self):
        other = self.make_certificate("other")
        fake = self.tls_registry()
        self.place(fake.host, ca_crt=other[0])
        with self.fails("tls: failed to verify certificate", 500):
            self.pull(fake.host + "/x")

    def test_insecure_registry_may_have_any_certificate(self):
        fake = self.tls_registry()
        self.assertEqual(self.file(self.pull(fake.host + "/x"), "a"), b"tls")

    def test_through_a_proxy(self):
        """The client sends CONNECT to the proxy with the proxy's password, which the registry never sees, and speaks
        TLS with the registry itself."""
        fake, proxy = self.tls_registry(), self.fake()
        proxy.tunnel("registry.example:443", fake)
        self.place("registry.example", ca_crt=self.certificate[0])
        proxies = {"HTTPS_PROXY": "http://bob:secret@" + proxy.host, "HTTP_PROXY": "http://127.0.0.1:9"}
        self.open_store(environment=proxies)
        self.assertEqual(self.file(self.pull("registry.example/x"), "a"), b"tls")
        self.assertEqual({(method, path) for method, path, _ in proxy.requests}, {("CONNECT", "registry.example:443")})
        self.assertEqual(proxy.requests[0][2]["Proxy-Authorization"],
                         "Basic " + base64.b64encode(b"bob:secret").decode())
        self.assertFalse([1 for _, _, headers in fake.requests if "Proxy-Authorization" in headers])
        # the registry's certificate is verified through a proxy, too
        proxy.tunnel("other.example:443", fake)
        with self.fails("tls: failed to verify certificate", 500):
            self.pull("other.example/x")
        proxy.answers["CONNECT", "registry.example:443"] = (407, {}, b"")
        with self.fails("407", 500):
            self.pull("registry.example/x")
        # with NO_PROXY the client resolves the name itself, and no such host exists
        count = len(proxy.requests)
        self.open_store(environment=dict(proxies, NO_PROXY="10.0.0.0/8,.example"))
        with self.fails("no such host", 500):
            self.pull("registry.example/x")
        self.assertEqual(len(proxy.requests), count)

    def test_the_best_error_when_both_schemes_fail(self):
        address = "198.51.100.11"
        add_host_address(address, self.addCleanup)
        self.open_store(insecure=(address,))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.certificate)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.certificate[0])
        fake = self.fake(context=context, address=address)
        with self.fails(f'Get "https://{fake.host}/v2/": tls: '):  # plain HTTP ends without an answer
            self.pull(fake.host + "/x")
        plain = self.fake(address=address)
        plain.answers["/v2/"] = (500, {}, b"")
        with self.fails("500 Internal Server Error"):
            self.pull(plain.host + "/x")
        with self.fails(f'Get "https://{address}:1/v2/": dial tcp {address}:1: connect: connection refused'):
            self.pull(address + ":1/x")
        plain = self.fake()  # on loopback, plain HTTP is tried first
        plain.answers["/v2/"] = (500, {}, b"")
        with self.fails("500 Internal Server Error"):
            self.pull(plain.host + "/x")

    def test_no_fall_back_to_plain_http(self):
        fake = self.fake()
        fake.image([layer_archive({"a": b"1"})])
        client = pydock.RegistryClient("https://" + fake.host, self.options)
        self.options.timeout = 1
        with self.assertRaises(pydock.RegistryError):
            client.connect()
        client.cancel()
        self.assertEqual(fake.requests, [])

    def test_token_service_without_tls(self):
        fake, tokens = self.tls_registry(), self.fake()
        RegistryCredentialsTest.with_tokens(self, fake, tokens)
        with self.fails("is not reached over TLS: no credentials are sent there", 500):
            self.pull(fake.host + "/x", auth=RegistryCredentialsTest.user)
        self.assertEqual(tokens.requests, [])

    def test_redirect_away_from_tls(self):
        fake, other = self.tls_registry(), self.fake()
        path = [path for path in fake.answers if "blobs" in path][-1]
        other.answers["/b"] = fake.answers[path]
        fake.answers[path] = (302, {"Location": f"http://{other.host}/b"}, b"")
        with self.fails("is not followed"):
            self.pull(fake.host + "/x")
        self.assertEqual(other.requests, [])


def make_certificate_of_ca(folder, address):
    """Make a CA, folder/ca.pem, and a certificate that it signs for an address: (path of the certificate's key, path of
    the certificate)."""
    key, request, certificate, ca = (os.path.join(folder, name)
                                     for name in ("key.pem", "request.pem", "cert.pem", "ca.pem"))
    new_key = ["openssl", "req", "-newkey", "rsa:2048", "-nodes"]
    write(folder + "/names", f"subjectAltName=IP:{address}\n")
    for words in (new_key + ["-x509", "-days", "2", "-subj", "/CN=test CA", "-keyout", ca + ".key", "-out", ca],
                  new_key + ["-subj", "/CN=registry", "-keyout", key, "-out", request],
                  ["openssl", "x509", "-req", "-days", "2", "-in", request, "-CA", ca, "-CAkey", ca + ".key",
                   "-CAcreateserial", "-extfile", folder + "/names", "-out", certificate]):
        subprocess.run(words, check=True, stderr=subprocess.DEVNULL)
    return key, certificate


class RealRegistry:
    """The program docker-registry, with its files in a folder. `more` are further sections of its configuration."""

    def __init__(self, folder, address="127.0.0.1", **more):
        self.port = free_port()
        self.host = f"{address}:{self.port}"
        self.storage = os.path.join(folder, f"storage-{self.port}")
        settings = {"version": 0.1, "log": {"level": "error", "accesslog": {"disabled": True}},
                    "http": {"addr": self.host},
                    "storage": {"filesystem": {"rootdirectory": self.storage},
                                "delete": {"enabled": True}}}
        for key, value in more.items():
            settings[key] = dict(settings.get(key, {}), **value)
        path = os.path.join(folder, f"registry-{self.port}.yml")
        with open(path, "w") as file:
            json.dump(settings, file)
        self.process = subprocess.Popen([shutil.which("docker-registry"), "serve", path], stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        eventually(lambda: can_connect((address, self.port)), message="docker-registry did not start")

    def close(self):
        self.process.kill()
        self.process.wait()


@unittest.skipUnless(shutil.which("docker-registry"), "needs docker-registry")
class RealRegistryTest(RegistryCase):
    files = ({"bin/a": b"one" * 1000, "etc/x": b"x"}, {"big": os.urandom(3 << 20)})

    def real(self, **more):
        registry = RealRegistry(self.root, **more)
        self.addCleanup(registry.close)
        return registry

    def push(self, name, tag=None, **options):
        self.registry.push(name, tag, progress=self.log.append, **options)
        return self.log[-1]["aux"]["Digest"]

    def test_push_pull_and_push_elsewhere(self):
        real = self.real()
        image = self.make_image(*self.files, tag=real.host + "/a/x:1")
        digest = self.push(real.host + "/a/x", "1")
        self.assertEqual(self.log[0], {"status": f"The push refers to repository [{real.host}/a/x]"})
        short = [diff_id[:12] for diff_id in image.diff_ids]
        for name in short:
            self.assertEqual([s for s in self.states(name) if s != "Pushing"], ["Preparing", "Pushed"])
        self.assertRegex(self.log[-2]["status"], r"^1: digest: sha256:[0-9a-f]{64} size: \d+$")
        self.assertEqual(self.images.digests_of(image), [f"{real.host}/a/x@{digest}"])
        self.log = []
        self.assertEqual(self.push(real.host + "/a/x", "1"), digest)
        self.assertEqual([self.states(name) for name in short], [["Preparing", "Layer already exists"]] * 2)
        self.images.tag(image, pydock.Reference.parse(real.host + "/b:2"))
        self.log = []
        self.assertEqual(self.push(real.host + "/b"), digest)
        self.assertEqual([self.states(name)[-1] for name in short], ["Mounted from a/x"] * 2)
        # another store pulls the image and pushes it to a second registry: the manifest stays the same
        second = self.real()
        self.empty_store()
        pulled = self.pull(real.host + "/a/x:1")
        self.assertEqual((pulled.id, self.file(pulled, "big")), (image.id, self.files[1]["big"]))
        self.images.tag(pulled, pydock.Reference.parse(second.host + "/c:3"))
        self.assertEqual(self.push(second.host + "/c", "3"), digest)

    def test_push_of_an_unknown_image(self):
        real = self.real()
        self.make_image({"a": b"1"}, tag=real.host + "/x:1")
        with self.fails(f"tag does not exist: {real.host}/x:2", 404):
            self.registry.push(real.host + "/x", "2")
        with self.fails(f"An image does not exist locally with the tag: {real.host}/y", 404):
            self.registry.push(real.host + "/y", "2")
        with self.fails("this machine itself", 400):
            self.registry.push("host", "latest")

    def test_changed_layer_is_never_pushed(self):
        real = self.real()
        image = self.make_image({"a": b"1"}, tag=real.host + "/x:1")
        with open(self.layers.path(image.chain, "diff", "a"), "wb") as file:
            file.write(b"2")
        with self.fails("have been changed on disk"):
            self.registry.push(real.host + "/x", "1")
        with self.fails("manifest unknown"):
            self.pull(real.host + "/x:1")

    def test_htpasswd(self):
        if not shutil.which("htpasswd"):
            self.skipTest("needs htpasswd")
        path = os.path.join(self.root, "htpasswd")
        subprocess.run(["htpasswd", "-cbB", path, "bob", "secret"], check=True, stderr=subprocess.DEVNULL)
        real = self.real(auth={"htpasswd": {"realm": "r", "path": path}})
        self.make_image({"a": b"1"}, tag=real.host + "/x:1")
        good, bad = {"username": "bob", "password": "secret"}, {"username": "bob", "password": "x"}
        for call in (lambda auth: self.registry.push(real.host + "/x", "1", auth),
                     lambda auth: self.pull(real.host + "/x:1", auth=auth),
                     lambda auth: self.registry.distribution(real.host + "/x:1", auth)):
            for auth, words in (({}, "no basic auth credentials"), (bad, "unauthorized: authentication required")):
                with self.fails(words):
                    call(auth)
            call(good)

    @unittest.skipUnless(shutil.which("openssl"), "needs openssl")
    def test_token_server(self):
        """docker-registry checks tokens that our token server signs: bob may push and pull, others may only pull."""
        tokens, access_requests = self.fake(), []
        key, certificate = make_certificate_of_ca(self.root, "127.0.0.1")
        der = base64.b64encode(ssl.PEM_cert_to_DER_cert(read(certificate))).decode()

        def encoded(data):
            data = data if isinstance(data, bytes) else json.dumps(data).encode()
            return base64.urlsafe_b64encode(data).rstrip(b"=")

        def give(handler):
            query = urllib.parse.parse_qs(handler.path.partition("?")[2])
            user = handler.headers.get("Authorization")
            if user not in (None, "Basic " + base64.b64encode(b"bob:secret").decode()):
                return 401, {}, b'{"details": "incorrect username or password"}'
            access = []
            for kind, name, actions in (scope.split(":") for scope in query.get("scope", [])):
                access_requests.append((name, actions, bool(user)))
                access.append({"type": kind, "name": name, "actions": actions.split(",") if user else ["pull"]})
            now = int(time.time())
            claims = {"iss": "test", "sub": "bob" if user else "", "aud": query["service"][0], "exp": now + 300,
                      "nbf": now - 60, "iat": now - 60, "jti": os.urandom(8).hex(), "access": access}
            signed = encoded({"typ": "JWT", "alg": "RS256", "x5c": [der]}) + b"." + encoded(claims)
            done = run_program(["openssl", "dgst", "-sha256", "-sign", key], signed)
            return 200, {}, json.dumps({"token": (signed + b"." + encoded(done.raw)).decode(),
                                        "expires_in": 300}).encode()

        tokens.answers["/token"] = give
        real = self.real(auth={"token": {"realm": f"http://{tokens.host}/token", "service": "ours", "issuer": "test",
                                         "rootcertbundle": self.root + "/ca.pem"}})
        bob = {"username": "bob", "password": "secret"}
        for path in ("a/x", "b/y"):
            image = self.make_image({"a": b"1"}, tag=f"{real.host}/{path}:1")
        with self.fails("denied: requested access to the resource is denied"):
            self.push(real.host + "/a/x", "1")
        with self.fails("incorrect username or password"):
            self.push(real.host + "/a/x", "1", auth=dict(bob, password="x"))
        self.push(real.host + "/a/x", "1", auth=bob)
        self.assertEqual(self.registry.login(dict(bob, serveraddress=real.host))["Status"], "Login Succeeded")
        del access_requests[:], self.log[:]
        self.push(real.host + "/b/y", "1", auth=bob)
        self.assertIn("Mounted from a/x", self.states(image.diff_ids[0][:12]))
        self.assertIn(("a/x", "pull", True), access_requests)
        self.empty_store()
        self.assertEqual(self.pull(real.host + "/a/x:1").id, image.id)

    def test_search_and_inspect(self):
        real = self.real()
        self.make_image({"a": b"1"}, tag=real.host + "/team/web:1")
        digest = self.push(real.host + "/team/web", "1")
        self.assertEqual([e["name"] for e in self.registry.search(real.host + "/we")], [real.host + "/team/web"])
        inspected = self.registry.distribution(real.host + "/team/web:1")
        self.assertEqual(inspected["Descriptor"]["digest"], digest)
        self.assertEqual(inspected["Platforms"], [{"architecture": pydock.ARCHITECTURE, "os": "linux"}])

    @unittest.skipUnless(shutil.which("skopeo"), "needs skopeo")
    def test_skopeo_copies_and_converts(self):
        real = self.real()
        image = self.make_image(*self.files, tag=real.host + "/x:1")
        digest = self.push(real.host + "/x", "1")

        def skopeo(*words):
            subprocess.run(("skopeo", "--insecure-policy") + words, check=True, stdout=subprocess.DEVNULL,
                           env=dict(os.environ, TMPDIR=self.root))

        skopeo("copy", "--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{real.host}/x:1",
               f"docker://{real.host}/copy:1")
        skopeo("copy", "--src-tls-verify=false", "--dest-tls-verify=false", "-f", "oci", f"docker://{real.host}/x:1",
               f"docker://{real.host}/oci:1")
        archives = {kind: os.path.join(self.root, kind + ".tar") for kind in ("docker-archive", "oci-archive")}
        for kind, path in archives.items():
            skopeo("copy", "--src-tls-verify=false", f"docker://{real.host}/x:1", f"{kind}:{path}:named:1")
        self.empty_store()
        self.assertEqual(self.pull(real.host + "/copy:1").id, image.id)
        self.assertEqual(self.images.digests_of(self.images.find(real.host + "/copy:1")),
                         [f"{real.host}/copy@{digest}"])
        self.empty_store()
        self.assertEqual(self.file(self.pull(real.host + "/oci:1"), "etc/x"), b"x")
        for path in archives.values():
            self.empty_store()
            with open(path, "rb") as file:
                loaded, = pydock.load_images(self.registry.blobs, file, self.log.append)
            self.assertEqual(self.file(loaded, "big"), self.files[1]["big"])
            self.assertEqual(self.log[-1], {"stream": "Loaded image: named:1\n"})
        # and skopeo reads the archives that pydock writes
        self.empty_store()
        self.pull(real.host + "/x:1")
        ours = os.path.join(self.root, "ours.tar")
        with open(ours, "wb") as file:
            pydock.save_images(self.registry.blobs, [real.host + "/x:1"], file.write)
        for kind, name in (("docker-archive", f"{real.host}/x:1"), ("oci-archive", "1")):
            skopeo("copy", "--dest-tls-verify=false", f"{kind}:{ours}:{name}", f"docker://{real.host}/from-{kind}:1")
            self.assertEqual(self.registry.distribution(f"{real.host}/from-{kind}:1")["Platforms"][0]["os"], "linux")
            self.empty_store()
            self.assertEqual(self.pull(f"{real.host}/from-{kind}:1").id, image.id)


class OtherEngine:
    """An image goes to another engine and back, through a registry and as an archive. It keeps its id and runs on both
    engines. A subclass defines other(*words), which runs a command of the other engine."""
    pull_flags = run_flags = ()
    # flags of the other engine's `save`: for the image that pydock made, and for the one that the other engine made
    formats = {"first": [[]], "second": [[]]}

    def setUp(self):
        super().setUp()
        self.real = RealRegistry(self.daemon.folder)
        self.addCleanup(self.real.close)
        self.names = [self.real.host + f"/{name}:1" for name in self.formats]
        self.pydock("tag", "base", self.names[0])
        self.addCleanup(self.other, "rmi", "-f", *self.names, code=(0, 1))

    def other_id(self, name):
        """An image's id on the other engine."""
        return self.other("image", "inspect", "-f", "{{.Id}}", name).out.strip().rpartition(":")[2]

    def own_id(self, name):
        """An image's id on pydock."""
        return self.api.ok("GET", f"/images/{name}/json")["Id"][7:]

    def assert_runs_on_other(self, name):
        self.assertEqual(self.other("run", "--rm", "--network", "none", *self.run_flags, name, "echo", "ran").out,
                         "ran\n")

    def assert_runs(self, name):
        self.assertEqual(self.pydock("run", "--rm", "--network", "none", name, "echo", "ran").out, "ran\n")

    def make_second(self):
        """Make the second image: the other engine commits a container of the first one."""
        self.other("create", "--name", "made", *self.run_flags, self.names[0], "true")
        self.addCleanup(self.other, "rm", "-f", "made", code=(0, 1))
        self.other("cp", os.path.abspath(__file__), "made:/added")
        self.other("commit", "--change", "LABEL made=there", "made", self.names[1])

    def test_through_a_registry(self):
        first, second = self.names
        self.pydock("push", first)
        self.other("pull", "-q", *self.pull_flags, first)
        self.assertEqual(self.other_id(first), self.own_id(first))
        self.assert_runs_on_other(first)
        self.make_second()
        self.other("push", "-q", *self.pull_flags, second)
        self.pydock("pull", second)
        self.assertEqual(self.own_id(second), self.other_id(second))
        self.assert_runs(second)

    def test_as_archives(self):
        first = self.names[0]
        folder = self.folder()
        ours = os.path.join(folder, "ours.tar")
        self.pydock("save", "-o", ours, first)
        self.assertIn(first, self.other("load", "-i", ours).out)
        self.assertEqual(self.other_id(first), self.own_id(first))
        self.assert_runs_on_other(first)
        self.make_second()
        for name, formats in zip(self.names, self.formats.values()):
            for number, words in enumerate(formats):
                path = os.path.join(folder, f"theirs-{number}.tar")
                self.other("save", *(["-q"] if words else []), "-o", path, *words, name)
                self.api.delete("/images/" + name, force=1)
                self.assertIn(name, self.pydock("load", "-i", path).out)
                self.assertEqual(self.own_id(name), self.other_id(name))
                self.assert_runs(name)


@needs_program("docker-registry", "dockerd")
@unittest.skipUnless(DOCKER, "needs the docker CLI")
class WithDockerTest(OtherEngine, DaemonCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.dockerd = Dockerd()
        cls.addClassCleanup(cls.dockerd.close)

    def other(self, *words, code=0):
        return self._checked(run_program([DOCKER, "-H", self.dockerd.host] + list(words)), code)


@needs_program("docker-registry", "podman")
class WithPodmanTest(OtherEngine, DaemonCase):
    pull_flags, run_flags = ["--tls-verify=false"], ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
    # podman makes OCI images: saved as a docker-archive they would be converted and get another id
    formats = {"first": [["--format", "docker-archive"]], "second": [["--format", "oci-archive"]]}

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = os.path.join(SCRATCH, "p")  # podman wants a run root of at most 50 characters
        cls.podman = ["podman", "--root", folder + "/root", "--runroot", folder + "/run", "--cgroup-manager",
                      "cgroupfs", "--events-backend", "none", "--storage-driver", "vfs"]
        os.mkdir(folder)
        write(folder + "/config.json", "{}")
        cls.environment = {"XDG_RUNTIME_DIR": folder, "DOCKER_CONFIG": folder}
        cls.podman += ["--runtime", "runc"] if shutil.which("runc", path=pydock.DEFAULT_PATH) else []
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.addClassCleanup(run_program, cls.podman + ["system", "reset", "-f"], **cls.environment)

    def other(self, *words, code=0):
        return self._checked(run_program(self.podman + list(words), **self.environment), code)


class RegistryCommand(Commands):
    """Both command lines with a docker-registry that demands a password and has a certificate by a trusted CA."""
    address = "198.51.100.9"  # not loopback, where pydock would not verify the certificate

    @classmethod
    def setUpClass(cls):
        add_host_address(cls.address, cls.addClassCleanup)
        folder = tempfile.mkdtemp(dir=SCRATCH)
        cls.addClassCleanup(shutil.rmtree, folder)
        key, certificate = make_certificate_of_ca(folder, cls.address)
        run_program(["htpasswd", "-cbB", folder + "/htpasswd", "bob", "secret"])
        cls.real = RealRegistry(folder, cls.address, http={"tls": {"certificate": certificate, "key": key}},
                                auth={"htpasswd": {"realm": "r", "path": folder + "/htpasswd"}})
        cls.addClassCleanup(cls.real.close)
        cls.daemon = Daemon(cls.__name__).start(SSL_CERT_FILE=folder + "/ca.pem")
        cls.addClassCleanup(cls.daemon.cleanup)

    def setUp(self):
        super().setUp()
        self.config = self.folder()
        self.name = self.real.host + "/team/x:1"
        self.pydock("tag", "base", self.name)

    def run_cli(self, *words, code=0, **options):
        return self.cli(*words, code=code, DOCKER_CONFIG=self.config, **options)

    def test_login_push_pull_search_logout(self):
        wrong = self.run_cli("push", self.name, code=1)
        self.assertIn("no basic auth credentials", wrong.err + wrong.out)
        wrong = self.run_cli("login", "-u", "bob", "--password-stdin", self.real.host, input="bad\n", code=1)
        self.assertIn("401 Unauthorized", wrong.err)
        self.assertFalse(os.path.exists(self.config + "/config.json"))
        write(self.config + "/config.json", '{"auths": {"other.example": {"auth": "eDp5"}}, "psFormat": "{{.ID}}"}',
              0o644)
        done = self.run_cli("login", "-u", "bob", "--password-stdin", self.real.host, input="secret\n")
        self.assertIn("Login Succeeded", done.out)
        config = json.loads(read(self.config + "/config.json"))
        self.assertEqual(config["auths"][self.real.host], {"auth": base64.b64encode(b"bob:secret").decode()})
        self.assertEqual((config["auths"]["other.example"], config["psFormat"]), ({"auth": "eDp5"}, "{{.ID}}"))
        if self.program == "pydock":  # the docker CLI leaves the file's mode unchanged
            self.assertEqual(stat.S_IMODE(os.stat(self.config + "/config.json").st_mode), 0o600)
        pushed = self.run_cli("push", self.name).out
        digest = re.search(r"^1: digest: (sha256:[0-9a-f]{64}) size: \d+$", pushed, re.M).group(1)
        ident = self.api.ok("GET", f"/images/{self.name}/json")["Id"]
        self.run_cli("rmi", self.name)
        pulled = self.run_cli("pull", self.name).out
        self.assertIn(f"Digest: {digest}\nStatus: Downloaded newer image for {self.name}\n", pulled)
        self.assertIn("Image is up to date for " + self.name, self.run_cli("pull", self.name).out)
        self.assertEqual(self.api.ok("GET", f"/images/{self.name}/json")["Id"], ident)
        by_digest = f"{self.name.rpartition(':')[0]}@{digest}"
        self.assertEqual(self.run_cli("pull", "-q", by_digest).out, by_digest + "\n")
        self.assertEqual(self.run_cli("run", "--rm", "--network", "none", by_digest, "echo", "ran").out, "ran\n")
        self.assertIn(f"{self.real.host}/team/x", self.run_cli("search", self.real.host + "/team").out)
        self.assertEqual(self.run_cli("images", "--digests", "--format", "{{.Repository}} {{.Tag}} {{.Digest}}",
                                      "--filter", f"reference={self.real.host}/*/x").out,
                         f"{self.real.host}/team/x 1 {digest}\n")
        self.run_cli("logout", self.real.host)
        self.assertEqual(json.loads(read(self.config + "/config.json"))["auths"], {"other.example": {"auth": "eDp5"}})
        self.assertIn("no basic auth credentials", self.run_cli("pull", self.name, code=1).err)

    def test_all_tags(self):
        self.run_cli("login", "-u", "bob", "-p", "secret", self.real.host)
        repository = self.real.host + "/many"
        for tag in "ab":
            self.pydock("tag", "base", f"{repository}:{tag}")
        self.run_cli("push", "-a", repository)
        self.run_cli("rmi", repository + ":a", repository + ":b")
        self.run_cli("pull", "-a", repository)
        self.assertEqual(sorted(self.run_cli("images", "--format", "{{.Tag}}", repository).out.split()), ["a", "b"])

    def test_archives(self):
        folder = self.folder()
        self.run_cli("create", "--name", "made", "base", "true")
        self.run_cli("cp", os.path.abspath(__file__), "made:/added")
        self.run_cli("commit", "-c", "LABEL a=b", "made", "update:2")
        self.run_cli("save", "-o", folder + "/two.tar", "base:latest", "update:2")
        self.run_cli("rm", "made")
        self.run_cli("rmi", "update:2")
        self.assertIn("Loaded image: update:2", self.run_cli("load", "-i", folder + "/two.tar").out)
        self.assertEqual(self.run_cli("run", "--rm", "--network", "none", "update:2", "sh", "-c",
                                      "wc -c </added").out.strip(),
                         str(os.path.getsize(__file__)))
        with open(folder + "/two.tar", "rb") as file:
            self.assertIn("Loaded image: update:2", self.run_cli("load", input=gzip.compress(file.read(), 1)).out)
        wrong = self.run_cli("load", input=b"no archive", code=1)
        self.assertNotIn("Traceback", wrong.err)
        self.run_cli("import", "-c", 'CMD ["true"]', "-m", "words", self.make_tree(folder), "flat:1")
        self.assertEqual(self.api.ok("GET", "/images/flat:1/json")["Config"]["Cmd"], ["true"])

    def make_tree(self, folder):
        path = os.path.join(folder, "tree.tar.gz")
        with tarfile.open(path, "w:gz") as tree:
            tree.add(__file__, "file")
        return path


@needs_program("docker-registry", "openssl", "htpasswd")
class RegistryCommandTest(RegistryCommand, DaemonCase):
    program = "pydock"

    def test_since(self):
        """`save --since` makes a small archive for a host without a network: it holds only the new layers, and names
        the image that it is based on."""
        folder = self.folder()
        self.run_cli("create", "--name", "made", "base", "true")
        self.run_cli("cp", os.path.abspath(__file__), "made:/added")
        self.run_cli("commit", "made", "update:2")
        self.run_cli("rm", "made")
        for name, words in (("whole", ["update:2"]), ("small", ["--since", "base", "update:2"])):
            self.run_cli("save", "-o", f"{folder}/{name}.tar", *words)
        sizes = [os.path.getsize(f"{folder}/{name}.tar") for name in ("small", "whole")]
        self.assertLess(sizes[0], os.path.getsize(__file__) + 100000)
        self.assertGreater(sizes[1], sizes[0] + 100000)
        self.run_cli("rmi", "update:2")
        self.assertIn("Loaded image: update:2", self.run_cli("load", "-i", folder + "/small.tar").out)
        other = Daemon("since", bridge=False, image=False).start()
        self.addCleanup(other.cleanup)
        wrong = other.pydock("load", "-i", folder + "/small.tar")
        self.assertEqual(wrong.code, 1)
        self.assertIn("saved with --since base and leaves out its layers: load or pull base", wrong.err)
        self.assertIn("No such image: nosuch:latest", self.run_cli("save", "--since", "nosuch", "base", code=1).err)
        self.assertIn("this machine itself", self.run_cli("save", "host", code=1).err)

    def test_memory(self):
        """Layers are streamed and never held in memory: an image of 3 layers of 40 MB goes in and out while the daemon
        has less than 60 MiB, and the daemon, the spawner and the helpers together have less than 80 MiB, which is two
        layers."""
        folder, remote = self.folder(), self.real.host + "/big:1"
        self.run_cli("login", "-u", "bob", "-p", "secret", self.real.host)
        tars = [layer_archive({f"{number}/{part}": os.urandom(1 << 20) * 20 for part in range(2)})
                for number in range(3)]
        config = json.dumps({"os": "linux", "rootfs": {"type": "layers", "diff_ids": list(map(sha256, tars))}}).encode()
        names = [f"{number}.tar" for number in range(3)]
        table = [{"Config": "config.json", "RepoTags": [remote], "Layers": names}]
        with open(folder + "/big.tar", "wb") as file:
            parts = dict(zip(names, tars), **{"config.json": config, "manifest.json": json.dumps(table).encode()})
            file.write(layer_archive(parts))
            del parts
        with open(folder + "/layer.tar", "wb") as file:
            file.write(tars.pop())
        del tars
        watch = MemoryWatch(self.daemon)
        self.addCleanup(watch.stop)
        for words in (["load", "-i", folder + "/big.tar"], ["push", remote], ["rmi", remote], ["pull", remote],
                      ["save", "-o", folder + "/saved.tar", remote], ["import", folder + "/layer.tar", "flat"],
                      ["create", "--name", "made", "base", "true"], ["cp", folder + "/layer.tar", "made:/"],
                      ["commit", "made", "committed"]):
            watch.doing = words[0]
            self.run_cli(*words)
        watch.doing = None
        self.run_cli("rm", "made")
        self.assertGreater(len(watch.total), 4, watch.total)
        self.assertLess(watch.daemon, 60 << 10)
        self.assertEqual({operation: size for operation, size in watch.total.items() if size > 80 << 10}, {})


@needs_program("docker-registry", "openssl", "htpasswd")
class RegistryByDockerTest(RegistryCommand, DaemonCase):
    program = "docker"

    def test_manifest_inspect(self):
        """The docker CLI asks the registry directly, so the manifest that pydock pushed must be one that it knows."""
        plain = RealRegistry(self.daemon.folder)
        self.addCleanup(plain.close)
        self.pydock("tag", "base", plain.host + "/x:1")
        self.pydock("push", plain.host + "/x:1")
        manifest = json.loads(self.run_cli("manifest", "inspect", "--insecure", plain.host + "/x:1").out)
        self.assertEqual(manifest["config"]["digest"], self.api.ok("GET", "/images/base/json")["Id"])
        inspected = self.api.ok("GET", f"/distribution/{plain.host + '/x:1'}/json")
        self.assertEqual(inspected["Descriptor"]["mediaType"], manifest["mediaType"])


@needs_program("docker-registry")
class InsecureRegistryTest(DaemonCase):
    """A registry without TLS and not on loopback, allowed by --insecure-registry, and a mirror of the Hub where nobody
    listens."""
    address = "198.51.100.10"
    flags = ("--insecure-registry", "198.51.100.0/24", "--insecure-registry", "registry.example:5000",
             "--registry-mirror", "http://127.0.0.1:9/")

    def setUp(self):
        super().setUp()
        add_host_address(self.address, self.addCleanup)
        self.real = RealRegistry(self.daemon.folder, self.address)
        self.addCleanup(self.real.close)

    def test_push_and_pull(self):
        name = self.real.host + "/x:1"
        self.pydock("tag", "base", name)
        self.pydock("push", name)
        self.pydock("rmi", name)
        self.assertIn("Downloaded newer image for " + name, self.pydock("pull", name).out)

    def test_info(self):
        config = self.api.ok("GET", "/info")["RegistryConfig"]
        self.assertIn("198.51.100.0/24", config["InsecureRegistryCIDRs"])
        self.assertFalse(config["IndexConfigs"]["registry.example:5000"]["Secure"])
        self.assertEqual(config["Mirrors"], ["http://127.0.0.1:9/"])
        for cli in self.command_lines:
            text = cli("info").out
            for line in ("  registry.example:5000\n", "  198.51.100.0/24\n", "  127.0.0.0/8\n",
                         "  http://127.0.0.1:9/\n"):
                self.assertIn(line, text)


########################################################################
# 10. Image archives
########################################################################

class SaveLoadTest(RegistryCase):
    def save(self, *names, **options):
        out = io.BytesIO()
        pydock.save_images(self.registry.blobs, names, out.write, **options)
        return out.getvalue()

    def load(self, data):
        return pydock.load_images(self.registry.blobs, io.BytesIO(data), self.log.append)

    def names_in(self, data):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return archive.getnames()

    def member(self, data, name):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            return json.load(archive.extractfile(name))

    def test_several_images_there_and_back(self):
        base = {"a": b"1" * 100000}
        first, second = self.make_image(base, tag="one:1"), self.make_image(base, {"b": b"2"}, tag="two")
        self.images.tag(first, pydock.Reference.parse("one:latest"))
        data = self.save("one", "two:latest")
        self.assertEqual(data, self.save("one", "two:latest"))
        self.assertEqual([entry["RepoTags"] for entry in self.member(data, "manifest.json")],
                         [["one:1", "one:latest"], ["two:latest"]])
        self.assertEqual(self.member(data, "repositories"), {"one": {"1": first.id, "latest": first.id},
                                                             "two": {"latest": second.id}})
        self.assertEqual(len(self.member(data, "index.json")["manifests"]), 3)
        self.assertEqual(self.member(data, "oci-layout"), {"imageLayoutVersion": "1.0.0"})
        self.assertEqual(len(self.names_in(data)), len(set(self.names_in(data))))
        for form in (data, gzip.compress(data), lzma.compress(data)):
            self.empty_store()
            self.assertEqual([image.id for image in self.load(form)], [first.id, second.id])
            self.assertEqual(sorted(self.images.tags), ["one:1", "one:latest", "two:latest"])
            self.assertEqual([entry["stream"] for entry in self.log if "stream" in entry],
                             ["Loaded image: one:1\n", "Loaded image: one:latest\n", "Loaded image: two:latest\n"])
            self.assertEqual(self.save("one", "two:latest"), data)
            self.assertEqual(os.listdir(os.path.join(self.root, "other", "tmp")), [])
            self.assertFalse(self.images.find("two").meta["local"])

    def test_a_time_that_does_not_exist_is_refused(self):
        config = {"created": "0000-00-00T00:00:00Z", "architecture": "amd64", "os": "linux", "config": {},
                  "rootfs": {"type": "layers", "diff_ids": []}}
        data = tar_of(file_("c.json", json.dumps(config).encode()), file_(
            "manifest.json", json.dumps([{"Config": "c.json", "RepoTags": ["x:1"], "Layers": []}]).encode()))
        with self.fails('invalid time "0000-00-00T00:00:00Z"', 400):
            self.load(data)

    def test_the_memory_for_names_is_bounded(self):
        data = tar_of(*(symlink(f"{number}", "x" * 4000) for number in range(30)))
        with mock.patch.object(pydock, "MAX_NAMES", 100000), self.fails("the names in the archive need more than", 400):
            self.load(data)

    def test_by_id_brings_no_name(self):
        image = self.make_image({"a": b"1"}, tag="one")
        data = self.save(image.id[:12])
        self.assertIsNone(self.member(data, "manifest.json")[0]["RepoTags"])
        self.empty_store()
        self.load(data)
        self.assertEqual(self.log[-1], {"stream": f"Loaded image ID: sha256:{image.id}\n"})
        self.assertEqual(self.images.tags, {})
        with self.fails("No such image: nope:latest", 404):
            self.save("nope")
        with self.fails("this machine itself", 400):
            self.save("host")

    def test_name_moves_to_the_loaded_image(self):
        self.make_image({"a": b"1"}, tag="one")
        data = self.save("one")
        self.empty_store()
        before = self.make_image({"a": b"2"}, tag="one")
        self.load(data)
        self.assertIn("The image one:latest already exists, "
                      f"renaming the old one with ID sha256:{before.id} to empty string\n",
                      [entry.get("stream") for entry in self.log])

    def test_pulled_image_keeps_its_digests(self):
        fake = self.fake()
        described = fake.image([layer_archive({"a": b"1"})])
        self.pull(fake.host + "/x")
        data = self.save(fake.host + "/x")
        self.assertEqual(self.member(data, "manifest.json")[0]["Manifest"]["digest"], described["digest"])
        self.empty_store()
        image, = self.load(data)
        self.assertEqual(self.registry.blobs.manifest_of(image.id).digest, described["digest"])

    def test_since_leaves_out_the_layers_of_the_base(self):
        base = {"a": os.urandom(200000)}
        self.make_image(base, tag="base:1")
        update = self.make_image(base, {"b": b"new"}, tag="base:2")
        whole, small = self.save("base:1"), self.save("base:2", since="base:1")
        self.assertLess(len(small), 20000)
        self.assertNotIn("index.json", self.names_in(small))
        self.empty_store()
        with self.fails("saved with --since base:1 and leaves out its layers: load or pull base:1", 404):
            self.load(small)
        self.assertEqual(self.images.images, {})
        self.load(whole)
        image, = self.load(small)
        self.assertEqual((image.id, self.file(image, "b"), self.file(image, "a")), (update.id, b"new", base["a"]))

    def docker_archive(self, **change):
        """An archive as docker 1.10 to 24 writes it: a folder for each layer, and symlinks for repeated layers.
        `change` replaces members, or removes those that are None; `table` changes the entry of manifest.json."""
        tars = [layer_archive({"a": b"1"}), layer_archive({"b": b"2"})]
        diff_ids = [sha256(tar) for tar in (tars[0], tars[1], tars[0])]
        config = json.dumps({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["x"]},
                             "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
        name = sha256(config)[7:] + ".json"
        ids = [f"{n:064x}" for n in range(3)]
        entries = {}
        for number, layer in zip(ids, (tars[0], tars[1], link_to(f"../{ids[0]}/layer.tar"))):
            entries.update({number + "/VERSION": b"1.0", number + "/json": b"{}", number + "/layer.tar": layer})
        table = dict({"Config": name, "RepoTags": ["old:1"], "Layers": [number + "/layer.tar" for number in ids]},
                     **change.pop("table", {}))
        entries.update({name: config, "manifest.json": json.dumps([table]).encode(), "repositories": b"{}"})
        entries.update(change)
        return layer_archive({key: value for key, value in entries.items() if value is not None})

    def test_disk_full(self):
        image = self.make_image({"a": b"1"}, {"b": os.urandom(6 << 20)}, tag="one")
        data, disk = self.save("one"), self.small_disk("4m")
        for size, words in (("4m", "No space left on device: the archive needs more"),
                            ("9m", "No space left|holds more than")):
            pydock.mount("tmpfs", disk, "tmpfs", 32, "size=" + size)  # MS_REMOUNT
            self.open_store(disk)
            with self.assertRaisesRegex(pydock.Error, words):
                self.load(data)
            self.assertEqual((self.images.images, self.images.tags, os.listdir(disk + "/tmp")), ({}, {}, []))
            self.images.collect()
            self.assertEqual(self.layers.meta, {})
        pydock.mount("tmpfs", disk, "tmpfs", 32, "size=40m")
        self.assertEqual([loaded.id for loaded in self.load(data)], [image.id])

    def test_archive_of_docker_1_10(self):
        image, = self.load(self.docker_archive())
        self.assertEqual((self.file(image, "a"), self.file(image, "b"), len(self.layers.chain(image.chain))),
                         (b"1", b"2", 3))
        self.assertEqual(list(self.images.tags), ["old:1"])

    def test_hostile_archives(self):
        other = json.dumps({"rootfs": {"type": "layers", "diff_ids": []}}).encode()
        upper = "A" * 64 + ".json"
        index = json.dumps({"manifests": [{"mediaType": pydock.OCI_MANIFEST, "digest": "sha256:" + "0" * 64,
                                           "size": 2}]}).encode()
        cases = {
            "config leads out": {"table": {"Config": "../../../etc/shadow"}},
            "config absolute": {"table": {"Config": "/etc/shadow"}},
            "config's name is not its digest": {"table": {"Config": "0" * 64 + ".json"}, "0" * 64 + ".json": other},
            "name in upper case": {"table": {"Config": upper}, upper: other},
            "63 digits": {"table": {"Config": "a" * 63 + ".json"}, "a" * 63 + ".json": other},
            "NUL": {"table": {"Config": "a\0b"}}, "config is a number": {"table": {"Config": 5}},
            "layers lead out": {"table": {"Layers": ["../../x"] * 3}},
            "layer missing": {"table": {"Layers": ["x"] * 3}}, "too few layers": {"table": {"Layers": []}},
            "layers are numbers": {"table": {"Layers": [1, 2, 3]}},
            "layers swapped": {"table": {"Layers": [f"{n:064x}/layer.tar" for n in (1, 0, 2)]}},
            "bad tag": {"table": {"RepoTags": ["x/UPPER:1"]}}, "tag leads out": {"table": {"RepoTags": ["../../x:1"]}},
            "reserved tag": {"table": {"RepoTags": ["host:latest"]}}, "table is no list": {"manifest.json": b"{}"},
            "table is no JSON": {"manifest.json": b"["}, "table is deep": {"manifest.json": b"[" * 100000},
            "links in a circle": {f"{0:064x}/layer.tar": link_to(f"../{2:064x}/layer.tar")},
            "link leads out": {f"{2:064x}/layer.tar": link_to("../../../etc/passwd")},
            "absolute link": {f"{2:064x}/layer.tar": link_to("/etc/passwd")}, "member leads out": {"../evil": b"x"},
            "nothing in it": {"manifest.json": None, "repositories": None}, "before 1.10": {"manifest.json": None},
            "index is a manifest": {"manifest.json": None, "index.json": b'{"layers":[],"config":{}}'},
            "digest as path": {"manifest.json": None,
                               "index.json": b'{"manifests":[{"mediaType":"x","digest":"sha256:../../x","size":1}]}'},
            "blob is something else": {"manifest.json": None, "blobs/sha256/" + "0" * 64: b"{}", "index.json": index},
        }
        for name, change in cases.items():
            with self.subTest(name):
                self.log = []
                with self.assertRaises(pydock.Error) as caught:
                    self.load(self.docker_archive(**change))
                self.assertIn(caught.exception.status, (400, 404), str(caught.exception))
                self.assertEqual(self.images.tags, {})
                self.assertEqual(os.listdir(os.path.join(self.root, "tmp")), [])
                self.images.collect()
        for data in (b"", b"no tar at all" * 100, gzip.compress(self.docker_archive())[:-100]):
            with self.assertRaises(pydock.BadRequest):
                self.load(data)
        self.assertEqual(sorted(os.listdir(self.root)), sorted(["blobs", "downloads", "images", "layers", "tmp"]))

    def test_forged_config(self):
        config = json.dumps({"rootfs": {"type": "layers", "diff_ids": []}, "HostConfig": {"Privileged": True},
                             "id": "0" * 64, "config": {"User": "u", "Binds": ["/:/x"], "CapAdd": ["ALL"]}}).encode()
        table = json.dumps([{"Config": "config.json", "Layers": [], "RepoTags": None}]).encode()
        image, = self.load(layer_archive({"config.json": config, "manifest.json": table}))
        self.assertEqual((image.id, image.container_config), (sha256(config)[7:], {"User": "u"}))

    def test_oci_layout(self):
        tar = layer_archive({"a": b"1"})
        sent = gzip.compress(tar)
        config = json.dumps({"architecture": pydock.ARCHITECTURE, "os": "linux",
                             "rootfs": {"type": "layers", "diff_ids": [sha256(tar)]}}).encode()
        manifest = pydock.make_manifest(sha256(config)[7:], len(config),
                                        [{"mediaType": pydock.LAYER_GZIP, "size": len(sent), "digest": sha256(sent)}],
                                        oci=True)
        entry = {"mediaType": manifest.media_type, "digest": manifest.digest, "size": len(manifest.data)}
        inner = json.dumps({"schemaVersion": 2, "mediaType": pydock.OCI_INDEX, "manifests": [
            dict(entry, platform={"os": "linux", "architecture": pydock.ARCHITECTURE}),
            dict(entry, digest="sha256:" + "1" * 64, platform={"os": "linux", "architecture": "other"})]}).encode()
        for top, names in ((dict(entry, annotations={"org.opencontainers.image.ref.name": "docker.io/library/n:1"}),
                            ["n:1"]),
                           (dict(entry, annotations={"io.containerd.image.name": "localhost/n:2",
                                                     "org.opencontainers.image.ref.name": "2"}), ["localhost/n:2"]),
                           (dict(entry, annotations={"org.opencontainers.image.ref.name": "latest"}), []),
                           ({"mediaType": pydock.OCI_INDEX, "digest": sha256(inner), "size": len(inner),
                             "annotations": {"io.containerd.image.name": "m:3"}}, ["m:3"])):
            self.empty_store()
            index = json.dumps({"schemaVersion": 2, "manifests": [top]}).encode()
            blobs = {"blobs/sha256/" + sha256(data)[7:]: data for data in (sent, config, manifest.data, inner)}
            image, = self.load(layer_archive(dict(blobs, **{"oci-layout": b"{}", "index.json": index})))
            self.assertEqual(self.images.tags_of(image), names)
            self.assertEqual(self.registry.blobs.manifest_of(image.id).digest, manifest.digest)

    def test_zstd(self):
        if not shutil.which("zstd"):
            self.skipTest("needs zstd")
        image = self.make_image({"a": b"1" * 10000}, tag="one")
        data = subprocess.run(["zstd", "-cq"], input=self.save("one"), stdout=subprocess.PIPE, check=True).stdout
        self.empty_store()
        self.assertEqual([i.id for i in self.load(data)], [image.id])


########################################################################
# 11. Cgroups
########################################################################

def decide(program, kind, major, minor, access):
    """Run a BPF program of device_program for one access and return its answer, 1 to allow or 0 to refuse. This
    interpreter knows only the instructions that device_program uses."""
    context = struct.pack("=III", access << 16 | kind, major, minor)
    registers, position = [0] * 11, 0
    while True:
        code, pair, offset, value = struct.unpack_from("=BBhi", program, position * 8)
        target, source = (pair & 15, pair >> 4) if sys.byteorder == "little" else (pair >> 4, pair & 15)
        position += 1
        if code == 0x61:
            registers[target] = struct.unpack_from("=I", context, offset)[0]
        elif code == 0xBC:
            registers[target] = registers[source]
        elif code == 0x54:
            registers[target] &= value
        elif code == 0x74:
            registers[target] >>= value
        elif code == 0xB4:
            registers[target] = value
        elif code == 0x55:
            position += offset if registers[target] != value else 0
        elif code == 0x5D:
            position += offset if registers[target] != registers[source] else 0
        elif code == 0x95:
            return registers[0]
        else:
            raise AssertionError(f"instruction {code:#x}")


class LimitsTest(unittest.TestCase):
    """Checks of limits that need no control group."""

    def setUp(self):
        self.cgroups = pydock.Cgroups(1, {})

    def test_cpu_sets(self):
        self.assertEqual(pydock.parse_cpu_set("0-2,7"), {0, 1, 2, 7})
        # the first text is that of CVE-2018-20699: a range so large that parsing it exhausted the memory
        for text in ("1-4000000000", "0-8192", "3-1", "a", "", "1,", "-1", "1-", "9" * 5000):
            with self.assertRaises(pydock.BadRequest, msg=text) as caught:
                pydock.parse_cpu_set(text)
            self.assertEqual(str(caught.exception), f"Invalid value {text} for cpuset cpus")

    def test_values_that_make_no_sense_are_refused_with_dockers_sentence(self):
        for limits, sentence in (
                ({"Memory": 4096}, "Minimum memory limit allowed is 6MB"),
                ({"MemorySwap": 64 << 20},
                 "You should always set the Memory limit when using Memoryswap limit, see usage"),
                ({"Memory": 64 << 20, "MemorySwap": 32 << 20},
                 "Minimum memoryswap limit should be larger than memory limit, see usage"),
                ({"MemorySwappiness": 101}, "Invalid value: 101, valid memory swappiness range is 0-100"),
                ({"NanoCpus": 10 ** 9, "CpuQuota": 5000},
                 "Conflicting options: Nano CPUs and CPU Quota cannot both be set"),
                ({"CpuPeriod": 10},
                 "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"),
                ({"BlkioWeight": 5}, "Range of blkio weight is from 10 to 1000"),
                ({"CpusetCpus": "1-4000000000"}, "Invalid value 1-4000000000 for cpuset cpus")):
            with self.assertRaises(pydock.BadRequest, msg=limits) as caught:
                self.cgroups.check(limits)
            self.assertEqual(str(caught.exception), sentence)
        with self.assertRaisesRegex(pydock.BadRequest, "Range of CPUs is from 0.01 to"):
            self.cgroups.check({"NanoCpus": (os.cpu_count() + 1) * 10 ** 9})
        with self.assertRaisesRegex(pydock.BadRequest,
                                    "Requested CPUs are not available - requested 8000, available: "):
            self.cgroups.check({"CpusetCpus": "8000"})

    def test_what_the_host_lacks_is_a_warning(self):
        limits, warnings = self.cgroups.check({"Memory": 64 << 20, "PidsLimit": 5, "CpuShares": 0, "Privileged": True})
        self.assertEqual(limits, {})
        self.assertEqual(warnings, [
            "Your kernel does not support memory limit capabilities or the cgroup is not mounted. "
            "Limitation discarded.",
            "Your kernel does not support PIDs limit capabilities or the cgroup is not mounted. PIDs limit discarded."])

    def test_a_host_without_control_groups(self):
        cgroups = pydock.Cgroups.detect(mountinfo=b"1 1 0:1 / / rw - ext4 /dev/x rw\n")
        self.assertEqual(cgroups.version, 0)
        group, warnings = cgroups.create("x", {"PidsLimit": 5})
        self.assertEqual(len(warnings), 1)
        group.add(os.getpid())
        self.assertEqual((group.pids(), group.oom_kills(), group.frozen()), ([], 0, False))
        self.assertTrue(group.kill() and group.delete())
        self.assertEqual(group.stats()["memory_stats"], {})
        with self.assertRaisesRegex(pydock.Error, "cannot be paused"):
            group.freeze()

    def test_a_parent_that_leads_out(self):
        for parent in ("../x", "a/../b", "a//b", "a\nb"):
            with self.assertRaises(pydock.BadRequest):
                pydock.Cgroups(1, {}, parent)

    def test_device_rules(self):
        self.assertEqual(pydock.parse_device_rule("c 10:* rw"), ("c", 10, None, "rw"))
        for text in ("", "c 1:3", "c 1:3 x", "x 1:3 r", "c 1:3 rwm\na *:* rwm", "c 99999999:1 r"):
            with self.assertRaises(pydock.BadRequest, msg=text):
                pydock.parse_device_rule(text)

    def test_the_device_program_allows_what_the_rules_allow(self):
        program = pydock.device_program(pydock.DEFAULT_DEVICE_RULES + ("b 8:1 r", "c 10:200 rw"))
        block, char, make, read, write = 1, 2, 1, 2, 4
        for allowed, case in ((1, (char, 1, 3, read | write)), (1, (char, 136, 77, read)), (1, (block, 8, 0, make)),
                              (0, (block, 8, 0, read)), (1, (block, 8, 1, read)), (0, (block, 8, 1, read | write)),
                              (0, (char, 8, 1, read)), (1, (char, 10, 200, read | write)),
                              (0, (char, 10, 200, read | make)), (0, (char, 1, 1, read)), (0, (char, 1, 11, write))):
            self.assertEqual(decide(program, *case), allowed, case)
        self.assertEqual(decide(pydock.device_program(["a *:* rwm"]), block, 8, 0, read | write | make), 1)
        self.assertEqual(decide(pydock.device_program([]), char, 1, 3, read), 0)


@needs_root
class MountTableTest(unittest.TestCase):
    def test_a_mount_point_is_one_line_whatever_its_name(self):
        """Any user can mount a file system of his own (FUSE) on a folder whose name has these characters."""
        lines = (b"1 1 0:1 / /a\xe2\x80\xa8b\xc2\x85\xe3\x80\x80\r\x0c\xff\\040c rw shared:1 - fuse.x  rw,a=b\n"
                 b"2 1 0:2 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n")
        self.assertEqual(pydock.mount_table(lines), [
            ("/a\u2028b\x85\u3000\r\x0c\udcff c", "fuse.x", "rw,a=b"), ("/sys/fs/cgroup/pids", "cgroup", "rw,pids")])
        self.assertEqual(pydock.Cgroups.detect(mountinfo=lines).hierarchies, {"pids": "/sys/fs/cgroup/pids"})


class CgroupTest(unittest.TestCase):
    """Limits and accounting with real control groups of this host."""

    def setUp(self):
        self.cgroups = pydock.Cgroups.detect(f"pydock-test-{os.getpid()}")
        self.pids = []

    def tearDown(self):
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for mount_point in set(self.cgroups.hierarchies.values()):
            remove_groups(os.path.join(mount_point, self.cgroups.parent))

    def needs(self, *controllers):
        missing = set(controllers) - self.cgroups.controllers
        if missing:
            self.skipTest(f"this host has no control group for {', '.join(missing)}")

    def inside(self, group, body, *args):
        """Start a child in the group that runs body(*args), wait until it has joined the group, and return its pid."""
        read_end, write_end = os.pipe()

        def child():
            group.join()
            os.write(write_end, b"x")
            body(*args)
        pid = pydock.fork(child)
        os.close(write_end)
        self.assertEqual(os.read(read_end, 1), b"x")
        os.close(read_end)
        self.pids.append(pid)
        return pid

    def ended(self, pid):
        """Reap a child of `inside` and return its wait status."""
        self.pids.remove(pid)
        return os.waitpid(pid, 0)[1]

    def test_create_join_kill_delete(self):
        self.needs("freezer")
        group, warnings = self.cgroups.create("one")
        self.assertEqual(warnings, [])
        pid = self.inside(group, time.sleep, 60)
        self.assertEqual(group.pids(), [pid])
        self.assertEqual(self.cgroups.find("one").folders, group.folders)
        self.assertFalse(group.delete(timeout=0))
        self.assertTrue(group.kill())
        self.assertEqual(os.WTERMSIG(self.ended(pid)), signal.SIGKILL)
        self.assertTrue(group.delete())
        self.assertEqual(self.cgroups.find("one").folders, {})

    def test_a_group_left_by_a_crash_does_not_stand_in_the_way(self):
        self.needs("freezer")
        self.cgroups.create("left", {})
        group, _ = self.cgroups.create("left", {})
        self.assertEqual(group.pids(), [])

    def test_add_moves_another_process(self):
        self.needs("freezer")
        group, _ = self.cgroups.create("add")
        pid = pydock.fork(time.sleep, 60)
        self.pids.append(pid)
        group.add(pid)
        self.assertEqual(group.pids(), [pid])

    def test_freeze_stops_and_thaw_continues(self):
        self.needs("freezer")
        group, _ = self.cgroups.create("freeze")
        shared = mmap.mmap(-1, 8)

        def count():
            while True:
                shared[:8] = struct.pack("=Q", struct.unpack("=Q", shared[:8])[0] + 1)
                time.sleep(0.001)
        self.inside(group, count)
        group.freeze()
        self.assertTrue(group.frozen())
        before = shared[:8]
        time.sleep(0.05)
        self.assertEqual(shared[:8], before)
        group.thaw()
        self.assertFalse(group.frozen())
        eventually(lambda: shared[:8] != before, message="the process does not go on")

    def test_kill_reaches_frozen_processes_and_groups_below(self):
        self.needs("freezer")
        group, _ = self.cgroups.create("frozen")
        pid = self.inside(group, time.sleep, 60)
        below = pydock.Cgroup("below", {name: path + "/below" for name, path in group.folders.items()})
        for path in set(below.folders.values()):
            os.mkdir(path)
        other = self.inside(pydock.Cgroup("below", {n: p for n, p in below.folders.items() if n not in ("cpuset",)}),
                            time.sleep, 60)
        self.assertEqual(sorted(group.pids()), sorted([pid, other]))
        group.freeze()
        for child in (pid, other):
            os.kill(child, signal.SIGCHLD)
        reaper = threading.Thread(target=lambda: [self.ended(child) for child in (pid, other)])
        reaper.start()
        self.assertTrue(group.kill())
        reaper.join()
        self.assertTrue(group.delete())

    def test_pids_limit_holds_and_can_be_changed(self):
        self.needs("pids")
        group, _ = self.cgroups.create("pids", {"PidsLimit": 3})
        pid = self.inside(group, fork_until_refused)
        self.assertEqual(os.WEXITSTATUS(self.ended(pid)), 2)  # two children and the process itself
        group.kill()
        eventually(lambda: not group.stats()["pids_stats"]["current"])  # a zombie counts until init has reaped it
        self.assertEqual(self.cgroups.update(group, {"PidsLimit": 5}), [])
        pid = self.inside(group, fork_until_refused)
        self.assertEqual(os.WEXITSTATUS(self.ended(pid)), 4)
        self.assertEqual(group.stats()["pids_stats"]["limit"], 5)

    def test_memory_limit_kills_and_is_counted(self):
        self.needs("memory")
        group, _ = self.cgroups.create("memory", {"Memory": 32 << 20, "MemorySwap": 32 << 20})
        pid = self.inside(group, lambda: bytearray(os.urandom(1 << 20) * 200))
        self.assertEqual(os.WTERMSIG(self.ended(pid)), signal.SIGKILL)
        self.assertEqual(group.oom_kills(), 1)
        self.assertEqual(group.stats()["memory_stats"]["limit"], 32 << 20)

    def test_memory_and_swap_can_be_raised_and_lowered_together(self):
        self.needs("memory")
        group, _ = self.cgroups.create("memory", {"Memory": 32 << 20})
        for size in (64 << 20, 16 << 20):
            self.cgroups.update(group, {"Memory": size, "MemorySwap": 2 * size})
            self.assertEqual(group.stats()["memory_stats"]["limit"], size)

    def test_cpu_limits_also_later_with_processes(self):
        self.needs("cpu")
        group, _ = self.cgroups.create("cpu")
        pid = self.inside(group, time.sleep, 60)
        self.assertEqual(self.cgroups.update(group, {"NanoCpus": 500000000, "CpuShares": 512}), [])
        folder = group.folders.get("unified") or group.folders["cpu"]
        values = {name: pydock.read_file(os.path.join(folder, name), b"").decode().strip() for name in (
            "cpu.max", "cpu.weight", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares", "cgroup.procs")}
        if group.unified:
            self.assertEqual((values["cpu.max"], values["cpu.weight"]), ("50000 100000", "20"))
        else:
            self.assertEqual((values["cpu.cfs_quota_us"], values["cpu.cfs_period_us"]), ("50000", "100000"))
            self.assertEqual(values["cpu.shares"], "512")
        self.assertEqual(values["cgroup.procs"], str(pid))

    def test_cpuset(self):
        self.needs("cpuset")
        number = min(os.sched_getaffinity(0))
        group, warnings = self.cgroups.create("cpuset", {"CpusetCpus": str(number), "CpusetMems": "0"})
        self.assertEqual(warnings, [])
        pid = self.inside(group, time.sleep, 60)
        self.assertEqual(os.sched_getaffinity(pid), {number})

    def test_a_limit_that_the_kernel_refuses_leaves_nothing_behind(self):
        self.needs("cpu")
        with self.assertRaisesRegex(pydock.Error, "cannot set cpu|CPU"):
            self.cgroups.create("refused", {"CpuPeriod": 1000000, "CpuQuota": 10 ** 17})
        self.assertEqual(self.cgroups.find("refused").folders, {})

    def test_devices(self):
        groups = [self.cgroups]
        unified = "/sys/fs/cgroup/unified"
        if self.cgroups.version == 1 and os.path.isdir(unified):  # a hybrid host can also test the BPF program
            groups.append(pydock.Cgroups(2, {"unified": unified}, self.cgroups.parent))
            self.addCleanup(remove_groups, os.path.join(unified, self.cgroups.parent))
        for cgroups in groups:
            if "devices" not in cgroups.controllers:
                continue
            group, warnings = cgroups.create("devices")
            if warnings:
                self.skipTest(warnings[0])
            for path, allowed in (("/dev/null", True), ("/dev/zero", True), ("/dev/kmsg", False)):
                self.assertEqual(self.ended(self.inside(group, open_and_end, path, os.O_RDONLY)) == 0, allowed, path)
            group.delete()
            group, _ = cgroups.create("devices",
                                      devices=pydock.DEFAULT_DEVICE_RULES + ("c 1:11 r",))
            for flags, allowed in ((os.O_RDONLY, True), (os.O_RDWR, False)):
                self.assertEqual(self.ended(self.inside(group, open_and_end, "/dev/kmsg", flags)) == 0, allowed)
            group.delete()
            group, _ = cgroups.create("devices", devices=None)
            self.assertEqual(self.ended(self.inside(group, open_and_end, "/dev/kmsg", os.O_RDWR)), 0)

    def test_statistics_have_dockers_shape(self):
        self.needs("memory", "pids")
        group, _ = self.cgroups.create("stats", {"Memory": 64 << 20})
        self.inside(group, lambda: [sum(range(10 ** 6)), time.sleep(60)])
        eventually(lambda: group.stats()["cpu_stats"]["cpu_usage"]["total_usage"])
        stats = group.stats()
        self.assertEqual(stats["pids_stats"]["current"], 1)
        self.assertGreater(stats["cpu_stats"]["cpu_usage"]["total_usage"], 0)
        self.assertGreater(stats["cpu_stats"]["system_cpu_usage"], stats["cpu_stats"]["cpu_usage"]["total_usage"])
        self.assertEqual(stats["cpu_stats"]["online_cpus"], os.cpu_count())
        self.assertGreater(stats["memory_stats"]["usage"], 0)
        self.assertIn("inactive_file", stats["memory_stats"]["stats"])
        self.assertEqual(stats["memory_stats"]["limit"], 64 << 20)
        self.assertIn("io_service_bytes_recursive", stats["blkio_stats"])

    def test_features_have_dockers_names(self):
        features = self.cgroups.features()
        self.assertEqual(features["CgroupVersion"], str(self.cgroups.version or 1))
        self.assertEqual(features["PidsLimit"], "pids" in self.cgroups.controllers)


def open_and_end(path, flags):
    try:
        os.open(path, flags)
    except PermissionError:
        os._exit(1)


def fork_until_refused():
    """Fork until the kernel refuses, and exit with the number of children as exit code."""
    number = 0
    try:
        while number < 50:
            pydock.fork(time.sleep, 60)
            number += 1
    except BlockingIOError:
        os._exit(number)


def remove_groups(path):
    def is_gone(folder):
        with contextlib.suppress(OSError):
            for pid in pydock.read_file(folder + "/cgroup.procs").split():
                os.kill(int(pid), signal.SIGKILL)
            os.rmdir(folder)
        return not os.path.isdir(folder)
    for folder, _, _ in os.walk(path, topdown=False):
        eventually(lambda: is_gone(folder), message=f"{folder} cannot be removed")


########################################################################
# 12. Network
########################################################################

class AddressPoolTest(unittest.TestCase):
    def test_in_order_and_wrapping(self):
        pool = pydock.AddressPool("10.1.2.0/29", None, ["10.1.2.1"])
        self.assertEqual([pool.acquire() for _ in range(3)], ["10.1.2.2", "10.1.2.3", "10.1.2.4"])
        pool.release("10.1.2.2")
        self.assertEqual([pool.acquire() for _ in range(3)], ["10.1.2.5", "10.1.2.6", "10.1.2.2"])
        with self.assertRaisesRegex(pydock.Forbidden, "no available IPv4 addresses"):
            pool.acquire()
        pool.release("10.1.2.5")
        self.assertEqual(pool.acquire(), "10.1.2.5")

    def test_the_address_of_2013(self):
        pool = pydock.AddressPool("172.16.42.0/24", None, ["172.16.42.1"])
        seen = []
        for _ in range(254):
            seen.append(pool.acquire())
            pool.release(seen[-1])
        self.assertEqual((seen[0], seen[252], seen[253]), ("172.16.42.2", "172.16.42.254", "172.16.42.2"))

    def test_explicit_addresses(self):
        pool = pydock.AddressPool("10.1.2.0/24", None, ["10.1.2.1"])
        self.assertEqual(pool.acquire("10.1.2.3"), "10.1.2.3")
        self.assertEqual([pool.acquire() for _ in range(2)], ["10.1.2.2", "10.1.2.4"])
        for address, error in (("10.1.2.3", pydock.Forbidden), ("10.1.2.1", pydock.Forbidden),
                               ("10.1.2.0", pydock.Forbidden), ("10.1.2.255", pydock.Forbidden),
                               ("10.1.3.3", pydock.BadRequest), ("x", pydock.BadRequest),
                               ("fd00::1", pydock.BadRequest)):
            with self.assertRaises(error, msg=address):
                pool.acquire(address)

    def test_range(self):
        pool = pydock.AddressPool("10.1.0.0/16", "10.1.7.0/24")
        self.assertEqual(pool.acquire(), "10.1.7.0")
        with self.assertRaises(pydock.BadRequest):
            pydock.AddressPool("10.1.0.0/16", "10.2.7.0/24")

    def test_subnets_that_make_no_sense(self):
        for text in ("10.0.0.0", "10.0.0.0/31", "10.0.0.0/4", "fd00::/64", "x/24", "10.0.0.0/24\n", "127.0.0.0/8",
                     "224.1.0.0/16", "240.0.0.0/24", "0.0.0.0/8"):
            with self.assertRaises(pydock.BadRequest, msg=text):
                pydock.parse_subnet(text)


@needs_root
class PortPoolTest(unittest.TestCase):
    def setUp(self):
        self.pool, self.sockets = pydock.PortPool(), []

    def tearDown(self):
        for listener in self.sockets:
            listener.close()

    def take(self, *args):
        port, listener = self.pool.acquire(*args)
        self.sockets.append(listener)
        return port, listener

    @in_new_network
    def test_in_order_skipping_what_is_in_use(self):
        other = socket.create_server(("", 49154))
        self.assertEqual([self.take("tcp", "0.0.0.0", None, False)[0] for _ in range(2)], [49153, 49155])
        self.assertEqual(self.take("udp", "0.0.0.0", None, False)[0], 49153)
        self.pool.release("tcp", "0.0.0.0", 49153)
        self.assertEqual(self.take("tcp", "0.0.0.0", None, False)[0], 49156)
        other.close()

    @in_new_network
    def test_wraps(self):
        self.pool = pydock.PortPool(49153, 49155)
        self.assertEqual([self.take("tcp", "", None, True)[0] for _ in range(3)], [49153, 49154, 49155])
        with self.assertRaisesRegex(OSError, "all ports are allocated"):
            self.take("tcp", "", None, True)
        self.pool.release("tcp", "", 49154)
        self.sockets.pop(1).close()
        self.assertEqual(self.take("tcp", "", None, True)[0], 49154)

    @in_new_network
    def test_conflicts(self):
        self.take("tcp", "0.0.0.0", (8080, 8080), True)
        for address in ("0.0.0.0", "127.0.0.1"):
            with self.assertRaises(OSError) as caught:
                self.take("tcp", address, (8080, 8080), True)
            self.assertEqual(caught.exception.strerror, f"Bind for {address}:8080 failed: port is already allocated")
        self.take("udp", "0.0.0.0", (8080, 8080), True)
        self.assertEqual(self.take("tcp", "0.0.0.0", (8080, 8082), True)[0], 8081)
        self.take("tcp", "127.0.0.1", (9090, 9090), True)
        self.take("tcp", "127.0.0.2", (9090, 9090), True)
        with socket.create_server(("", 7070)):
            with self.assertRaises(OSError) as caught:
                self.take("tcp", "0.0.0.0", (7070, 7070), True)
        self.assertEqual(caught.exception.strerror, "failed to bind host port for 0.0.0.0:7070: address already in use")
        self.take("tcp", "0.0.0.0", (7070, 7070), True)

    @in_new_network
    def test_where_it_listens(self):
        for address, redirected, listens in (("0.0.0.0", True, "127.0.0.1"), ("0.0.0.0", False, "0.0.0.0"),
                                             ("127.0.0.3", True, "127.0.0.3"), ("::1", False, "::1")):
            port, listener = self.take("tcp", address, None, redirected)
            self.assertEqual(listener.getsockname()[:2], (listens, port))

    def test_host_ports(self):
        self.assertEqual([pydock.parse_host_port(text) for text in ("", None, "0", "80", "8000-8010")],
                         [None, None, None, (80, 80), (8000, 8010)])
        for text in ("65536", "-1", "90-80", "x", "1-2-3", "99999999"):
            with self.assertRaises(pydock.BadRequest, msg=text):
                pydock.parse_host_port(text)


class RulesTest(unittest.TestCase):
    def test_what_is_published_on_loopback_has_no_rule(self):
        record = {"proto": "tcp", "HostIp": "0.0.0.0", "HostPort": 49153, "address": "172.16.42.6", "port": 8080,
                  "redirected": True}
        rules = pydock.redirect_rules([record, dict(record, HostIp="127.0.0.1", HostPort=1, redirected=False),
                                       dict(record, HostIp="192.0.2.2", HostPort=53, proto="udp")])
        nat = [pydock._write_rule(rule, 0) for rule in rules[("nat", "PYDOCK")]]
        self.assertEqual(nat, ["-p tcp -m tcp --dport 49153 -j DNAT --to-destination 172.16.42.6:8080",
                               "-d 192.0.2.2/32 -p udp -m udp --dport 53 -j DNAT --to-destination 172.16.42.6:8080"])


def serve(listener):
    """Start a thread that serves a listener: each connection is sent its peer's address and a space at once, and then,
    when the peer has finished sending, all received bytes in reverse order."""
    def talk(connection, peer):
        with connection:
            connection.sendall(f"{peer[0]} ".encode())
            data = b""
            while True:
                part = connection.recv(65536)
                if not part:
                    break
                data += part
            connection.sendall(data[::-1])

    def accept():
        while True:
            try:
                connection, peer = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection, peer), daemon=True).start()
    threading.Thread(target=accept, daemon=True).start()


def talk(address, data=b"abc"):
    """Talk to a `serve` thread: (the peer's address that it saw, data in reverse order), or None without a
    connection."""
    try:
        with socket.create_connection(address, 1) as connection:
            connection.settimeout(10)
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
    except OSError:
        return None
    peer, _, data = answer.partition(b" ")
    return peer.decode(), data


def attach_endpoint(networks, network, container, name, pid, **settings):
    """What a start does with a network, for the network namespace of a process: the endpoint, which is released when
    the kernel refuses the interfaces."""
    endpoint = networks.reserve(network, container, name, **settings)
    try:
        networks.create_veth(endpoint, pid)
    except BaseException:
        networks.release(endpoint)
        raise
    return endpoint


class Host:
    """A host in a network namespace of its own: its Networks (`networks`), its address 10.20.0.1, and a neighbour
    (`lan`) at 10.20.0.2 in another namespace."""

    def __init__(self, backends=None, **options):
        self.backends, self.options, self.loops = backends, options, []
        with contextlib.ExitStack() as stack:
            self.root = stack.enter_context(tempfile.TemporaryDirectory())
            self.lan = stack.enter_context(Sleeper())
            with pydock.Netlink() as netlink:
                netlink.add_veth("eth0", "eth0", pid=self.lan.pid)
                netlink.add_address("eth0", "10.20.0.1/24")
                netlink.set_link("eth0", up=True)
            stack.callback(self._end_lan)
            self.lan.run(self._start_lan)
            self.start()
            self.stack = stack.pop_all()

    @staticmethod
    def _end_lan():
        """Delete the link to the neighbour at once. The kernel deletes it only some time after the neighbour's
        namespace has gone."""
        with contextlib.suppress(OSError), pydock.Netlink() as netlink:
            netlink.delete_link("eth0")

    @staticmethod
    def _start_lan():
        with pydock.Netlink() as netlink:
            netlink.add_address("eth0", "10.20.0.2/24")
            netlink.set_link("eth0", up=True)
            netlink.run()
            netlink.add_route(gateway="10.20.0.1")

    def start(self, live=()):
        self.networks = pydock.Networks(self.root, self.options)
        if self.backends is not None:
            firewall, earlier = self.networks.firewall, pydock.read_json(self.networks.path, {}).get("rules", ())
            firewall.backends = [kind(firewall.suffix, earlier) for kind in self.backends]
        self.networks.start(live)

    def container(self, name="c", network="bridge", server=None, **options):
        container = self.stack.enter_context(Sleeper())
        container.endpoint = attach_endpoint(self.networks, network, name * 64, name, container.pid, **options)
        container.address = container.endpoint["IPAddress"]
        container.run(pydock.configure_network, [container.endpoint])
        if server:
            container.listener = container.run(socket.create_server, ("", server))
            serve(container.listener)
        return container

    def publish(self, container, bindings, loop=True):
        records, listeners = self.networks.publish(container.endpoint, bindings)
        proxies = pydock.ProxyLoop()
        for record, listener in zip(records, listeners):
            proxies.serve(record["proto"], listener, (record["address"], record["port"]))
        if loop:
            threading.Thread(target=proxies.run, daemon=True).start()
        self.loops.append(proxies)
        return records

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stack.close()


def links():
    with pydock.Netlink() as netlink:
        return netlink.links()


def link(name):
    return next(link for link in links() if link["name"] == name)


BACKENDS = [kind for kind in (pydock.Iptables, pydock.Nftables) if shutil.which(kind.program, path=pydock.DEFAULT_PATH)]


@needs_root
class NetworksTest(unittest.TestCase):
    @in_new_network
    def test_bridge_of_2013(self):
        with Host() as host:
            bridge = host.networks.find("bridge")
            self.assertEqual((bridge.bridge, bridge.subnet, bridge.gateway),
                             ("pydock0", "172.16.42.0/24", "172.16.42.1"))
            first, second = host.container("a"), host.container("b", server=80)
            self.assertEqual([first.address, second.address], ["172.16.42.2", "172.16.42.3"])
            self.assertEqual(first.endpoint["MacAddress"], "02:42:ac:10:2a:02")
            self.assertEqual(first.run(talk, ("172.16.42.3", 80)), ("172.16.42.2", b"cba"))
            self.assertEqual(talk(("172.16.42.3", 80)), ("172.16.42.1", b"cba"))
            self.assertEqual(sorted(member["Name"] for member in bridge.to_api()["Containers"].values()), ["a", "b"])
            for interface in ("pydock0", first.endpoint["host_interface"]):
                self.assertEqual(pydock.read_file(f"/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"), b"1\n")
                self.assertEqual(pydock.read_file(f"/proc/sys/net/ipv6/conf/{interface}/accept_ra"), b"0\n")
                self.assertEqual(pydock.read_file(f"/proc/sys/net/ipv4/conf/{interface}/route_localnet"), b"0\n")
            mac = link("pydock0")["mac"]
            host.container("c")
            self.assertEqual(link("pydock0")["mac"], mac)

    @in_new_network
    def test_a_network_that_is_routed_already_is_not_taken(self):
        with pydock.Netlink() as netlink:
            netlink.add_bridge("other")
            netlink.add_address("other", "172.16.0.1/16")
            netlink.set_link("other", up=True)
        with Host() as host:
            self.assertEqual(host.networks.find("bridge").subnet, "10.0.42.0/24")
            host.networks.cleanup()
            with pydock.Netlink() as netlink:
                netlink.add_address("other", "10.0.0.1/8")
                netlink.add_address("other", "192.168.0.1/16")
            host.start()
            self.assertIn("Could not find a free IP address range for interface 'pydock0'. Please configure its "
                          "address manually and run 'pydock -b pydock0'", "\n".join(host.networks.warnings))
            with self.assertRaisesRegex(pydock.BadRequest, "Could not find a free IP .* use --net none or --net host"):
                host.container()

    @in_new_network
    def test_a_bridge_that_exists_is_used_as_it_is(self):
        with pydock.Netlink() as netlink:
            netlink.add_bridge("pdkt0")
            netlink.add_address("pdkt0", "10.3.4.5/25")
            netlink.set_link("pdkt0", up=True)

        def bridge():
            with pydock.Netlink() as netlink:
                return [link("pdkt0")[name] for name in ("index", "mac", "mtu", "up")], netlink.addresses("pdkt0")
        before = bridge()
        with Host(bridge="pdkt0") as host:
            self.assertEqual(bridge(), before)
            for name, value in (("accept_ra", b"0\n"), ("accept_redirects", b"0\n"), ("disable_ipv6", b"0\n")):
                self.assertEqual(pydock.read_file("/proc/sys/net/ipv6/conf/pdkt0/" + name), value, name)
            self.assertEqual(host.container("a").address, "10.3.4.1")
            self.assertEqual(host.networks.find("bridge").gateway, "10.3.4.5")
            host.networks.cleanup()
            self.assertEqual((link("pdkt0")["kind"], link("pdkt0")["mac"]), ("bridge", before[0][1]))
        with Host(bridge="pdkt1") as host:  # a bridge that does not exist is made
            self.assertEqual([link("pdkt1")["kind"], host.container("a").address], ["bridge", "172.16.42.2"])

    @in_new_network
    def test_a_bridge_that_an_earlier_daemon_left_unfinished(self):
        with pydock.Netlink() as netlink:
            netlink.add_bridge("pydock0")
        with Host() as host:
            self.assertEqual((host.networks.warnings, host.container("a").address), ([], "172.16.42.2"))
        with pydock.Netlink() as netlink:
            netlink.add_bridge("pdkt2")
        with Host(bridge="pdkt2") as host:
            self.assertIn("interface pdkt2 has no IPv4 address", "".join(host.networks.warnings))

    @staticmethod
    def what_there_is():
        """(names of the bridges, rules of iptables without their chains)."""
        rules = sorted(line for line in iptables_save() if "POSTROUTING" in line or "PYDOCK-FWD" in line)
        return sorted(link["name"] for link in links() if link["kind"] == "bridge"), rules

    @staticmethod
    def steps():
        """What a change of a network calls, in no order: [(owner, name, function, how to put another one there)]."""
        names = ((pydock, "write_file"), (pydock.Networks, "_make_bridge"), (pydock.Networks, "_delete_bridge"),
                 (pydock, "disable_ipv6"), (pydock.Iptables, "_restore"))
        return [(owner, name, getattr(owner, name), staticmethod if name == "_delete_bridge" else lambda new: new)
                for owner, name in names]

    @unittest.skipUnless(pydock.Iptables in BACKENDS, "needs iptables")
    @in_new_network
    def test_a_change_of_a_network_that_is_killed(self):
        """The daemon is killed before and after each step of `network create` and `network rm`. Nothing is left that no
        network owns."""
        with Host([pydock.Iptables]) as host:
            before = self.what_there_is()
            for (owner, name, step, wrap), action, early in (
                    (step, action, early) for step in self.steps() for action in ("create", "remove")
                    for early in (True, False)):
                if action == "remove":
                    host.networks.create({"Name": "one"})

                def killed(*arguments, **options):
                    if not early:
                        step(*arguments, **options)
                    os._exit(0)

                def body():
                    with mock.patch.object(owner, name, wrap(killed)):
                        host.networks.remove("one") if action == "remove" else host.networks.create({"Name": "one"})
                os.waitpid(pydock.fork(body), 0)
                host.start()
                self.assertEqual(host.networks.warnings, [])
                with contextlib.suppress(pydock.NotFound):
                    host.networks.remove("one")
                self.assertEqual(self.what_there_is(), before, (action, name, early))

    @unittest.skipUnless(pydock.Iptables in BACKENDS, "needs iptables")
    @in_new_network
    def test_a_change_of_a_network_that_fails(self):
        """`network create` and `network rm` that end with an error have changed nothing: not the list, not the file,
        not the host."""
        with Host([pydock.Iptables]) as host:
            networks = host.networks
            networks.create({"Name": "old"})

            def state():
                return ([network.name for network in networks.networks.values()], self.what_there_is(),
                        pydock.read_json(networks.path)["networks"])
            before = state()
            create, remove = lambda: networks.create({"Name": "new"}), lambda: networks.remove("old")
            failures = 0
            for (owner, name, step, wrap), action, count in (
                    (step, action, count) for step in self.steps() for action in (create, remove) for count in (1, 2)):
                calls = []

                def fails(*arguments, **options):
                    calls.append(name)
                    if len(calls) == count:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    return step(*arguments, **options)
                with mock.patch.object(owner, name, wrap(fails)), contextlib.suppress(OSError):
                    action()
                if len(calls) >= count:
                    failures += 1
                    self.assertEqual(state(), before, (name, action is create, count))
                    continue
                networks.remove("new") if action is create else networks.create({"Name": "old"})
                before = state()
            self.assertGreater(failures, 6)
            # the first of the two tables is written, the second is refused
            with mock.patch.object(pydock, "_run_program", side_effect=pydock._run_program) as run:
                def refuse(arguments, text=None):
                    if text and run.side_effect is refuse:
                        run.side_effect = None
                        run.return_value = ""
                        real(arguments, text[:text.index("*filter")])
                        run.side_effect = real
                        raise pydock.Error("iptables-restore: line 9 failed")
                    return real(arguments, text)
                real, run.side_effect = run.side_effect, refuse
                with self.assertRaisesRegex(pydock.Error, "line 9 failed"):
                    networks.create({"Name": "new"})
            self.assertEqual(state(), before)

    @unittest.skipUnless(BACKENDS, "needs iptables or nft")
    @in_new_network
    def test_a_bridge_that_was_there_before_its_network_stays(self):
        with pydock.Netlink() as netlink:
            netlink.add_bridge("pdkt3")
            netlink.add_veth("pdkt4", "pdkt5")
        with Host() as host:
            named = lambda bridge: {"Options": {"com.docker.network.bridge.name": bridge}}
            host.networks.create({"Name": "one", **named("pdkt3")})
            with self.assertRaisesRegex(pydock.Forbidden, "networks have same bridge name"):
                host.networks.create({"Name": "two", **named("pdkt3")})
            with self.assertRaisesRegex(pydock.Error, "pdkt4 is there already and is no bridge"):
                host.networks.create({"Name": "two", **named("pdkt4")})
            host.start()
            host.networks.remove("one")
            self.assertEqual((link("pdkt3")["kind"], link("pdkt4")["kind"]), ("bridge", "veth"))
            host.networks.create({"Name": "one", **named("pdkt6")})
            host.networks.remove("one")
            self.assertNotIn("pdkt6", [link["name"] for link in links()])

    @in_new_network
    def test_a_network_that_cannot_be_set_up_at_a_start_stops_no_other(self):
        with Host() as host:
            for name in ("one", "two"):
                host.networks.create({"Name": name})
            broken = host.networks.find("one").bridge
            with pydock.Netlink() as netlink:
                for network in ("one", "two"):
                    netlink.delete_link(host.networks.find(network).bridge)
                netlink.add_veth(broken, "pdkt7")
            host.start()
            self.assertEqual(host.networks.warnings, [f"network one cannot be set up: interface {broken} is there "
                                                      "already and is no bridge"])
            self.assertEqual(host.container("a", "two").address, "172.19.0.2")

    @in_new_network
    def test_without_a_bridge(self):
        with Host(bridge="none") as host:
            self.assertEqual(host.networks.warnings, [])
            with self.assertRaisesRegex(pydock.BadRequest, "has no bridge"):
                host.container()
            self.assertEqual([link["name"] for link in links() if link["kind"] == "bridge"], [])

    @unittest.skipUnless(BACKENDS, "needs iptables or nft")
    @in_new_network
    def test_addresses_go_on_after_a_restart_of_the_daemon(self):
        with Host() as host:
            first = host.container("a", server=80)
            records = host.publish(first, {"80/tcp": [{"HostPort": "8080"}]})
            bridge = host.networks.find("bridge").to_api()
            host.start([{"endpoints": [first.endpoint], "published": records}])
            self.assertEqual(host.networks.find("bridge").to_api(), bridge)
            self.assertEqual(host.container("b").address, "172.16.42.3")
            self.assertEqual(host.lan.run(talk, ("10.20.0.1", 8080)), ("10.20.0.2", b"cba"))
            self.assertEqual(talk(("127.0.0.1", 8080)), ("172.16.42.1", b"cba"))
            with self.assertRaisesRegex(pydock.Error, "port is already allocated"):
                host.publish(first, {"80/tcp": [{"HostPort": "8080"}]})

    @unittest.skipUnless(BACKENDS, "needs iptables or nft")
    @in_new_network
    def test_networks_of_users(self):
        with Host() as host:
            networks = host.networks
            one = networks.create({"Name": "one", "Labels": {"a": "b"}})
            self.assertEqual((one.subnet, one.gateway), ("172.18.0.0/24", "172.18.0.1"))
            two = networks.create({"Name": "two",
                                   "IPAM": {"Config": [{"Subnet": "10.9.0.0/16", "IPRange": "10.9.7.0/24"}]}})
            self.assertEqual(one.bridge, "pdk-" + one.id[:11])
            a, b, c = host.container("a", "one"), host.container("b", "two", server=80), host.container("c", server=80)
            self.assertEqual((a.address, b.address), ("172.18.0.2", "10.9.7.0"))
            self.assertIsNone(a.run(talk, (b.address, 80)), "networks are isolated from each other")
            self.assertIsNone(a.run(talk, (c.address, 80)))
            self.assertEqual(host.container("d", "two", address="10.9.0.77").address, "10.9.0.77")
            for request, error, sentence in (
                    ({"Name": "one"}, pydock.Conflict, "network with name one already exists"),
                    ({"Name": "bridge"}, pydock.Forbidden, "operation is not permitted on predefined bridge network"),
                    ({"Name": "x", "Driver": "foo"}, pydock.NotFound, 'plugin "foo" not found'),
                    ({"Name": "x", "IPAM": {"Config": [{"Subnet": "10.9.3.0/24"}]}}, pydock.Forbidden,
                     "invalid pool request: Pool overlaps with other one on this address space"),
                    ({"Name": "x", "Options": {"com.docker.network.bridge.name": "-j ACCEPT"}}, pydock.BadRequest,
                     None),
                    ({"Name": "-j ACCEPT"}, pydock.BadRequest, None), ({"Name": "a;b"}, pydock.BadRequest, None),
                    ({"Name": ""}, pydock.BadRequest, None), ({"Name": "a\nb"}, pydock.BadRequest, None)):
                with self.assertRaises(error, msg=request) as caught:
                    networks.create(request)
                self.assertEqual(str(caught.exception), sentence or str(caught.exception))
            with self.assertRaisesRegex(pydock.Forbidden,
                                        "error while removing network: network one id .* has active endpoints"):
                networks.remove("one")
            with self.assertRaisesRegex(pydock.Forbidden, "host is a pre-defined network and cannot be removed"):
                networks.remove("host")
            with self.assertRaisesRegex(pydock.NotFound, "network nope not found"):
                networks.remove("nope")
            networks.release(a.endpoint)
            networks.remove(one.id[:12])
            host.start()
            self.assertEqual(host.networks.find("two").state(), two.state())
            self.assertNotIn(one.bridge, [link["name"] for link in links()])

    @each_in_new_network(*BACKENDS)
    def test_internal_networks_lead_nowhere(self, kind):
        with Host([kind]) as host:
            host.networks.create({"Name": "inner", "Internal": True})
            a, b = host.container("a", "inner"), host.container("b", "inner", server=80)
            self.assertEqual(a.endpoint["Gateway"], "")
            self.assertEqual(a.run(talk, (b.address, 80)), (a.address, b"cba"))
            listener = host.lan.run(socket.create_server, ("", 80))
            serve(listener)

            def escape():
                with pydock.Netlink() as netlink:
                    netlink.add_route(gateway=host.networks.find("inner").gateway)
                return talk(("10.20.0.2", 80))
            self.assertIsNone(a.run(escape))

    @each_in_new_network(*BACKENDS)
    def test_published_ports(self, kind):
        with Host([kind]) as host:
            self.assertEqual(host.networks.warnings, [])
            a, b = host.container("a", server=80), host.container("b")
            records = host.publish(a, {"80/tcp": [{}], "81/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8081"}]})
            port = records[0]["HostPort"]
            self.assertEqual(port, 49153)
            self.assertEqual(pydock.port_map(records, ["7/tcp"]),
                             {"7/tcp": None,
                              "80/tcp": [{"HostIp": ip, "HostPort": "49153"} for ip in ("0.0.0.0", "::")],
                              "81/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8081"}]})
            self.assertEqual(talk(("::1", port))[1], b"cba", "by ::1, which many programs try first for localhost")
            self.assertEqual(host.lan.run(talk, ("10.20.0.1", port)), ("10.20.0.2", b"cba"), "from outside, by DNAT")
            self.assertEqual(talk(("10.20.0.1", port))[1], b"cba", "from the host, by DNAT")
            self.assertEqual(talk(("127.0.0.1", port)), ("172.16.42.1", b"cba"), "from the host, by the proxy")
            self.assertEqual(b.run(talk, ("10.20.0.1", port)), ("172.16.42.1", b"cba"), "from another container")
            self.assertEqual(a.run(talk, ("10.20.0.1", port)), ("172.16.42.1", b"cba"),
                             "from the container itself: hairpin")
            self.assertIsNone(host.lan.run(talk, ("172.16.42.2", 80)),
                              "a neighbour that routes the container's own address here does not reach it")
            a81 = a.run(socket.create_server, ("", 81))
            serve(a81)
            self.assertEqual(talk(("127.0.0.1", 8081)), ("172.16.42.1", b"cba"))
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", 8081)), "published on 127.0.0.1 only")
            lan = host.lan.run(socket.create_server, ("", 80))
            serve(lan)
            self.assertEqual(a.run(talk, ("10.20.0.2", 80)), ("10.20.0.1", b"cba"), "out of the container: masqueraded")
            host.networks.release(a.endpoint)
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", port)))

    @each_in_new_network(*BACKENDS)
    def test_loopback_is_not_reached_from_the_network(self, kind):
        with Host([kind]) as host:
            a = host.container("a", server=80)
            host.publish(a, {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8080"}]})

            def attack():
                pydock.set_sysctl("net/ipv4/conf/all/route_localnet", 1)
                pydock.set_sysctl("net/ipv4/conf/eth0/route_localnet", 1)
                with pydock.Netlink() as netlink:
                    netlink.set_link("lo", up=False)
                    netlink.run()
                    netlink.add_route("127.0.0.0/8", gateway="10.20.0.1", link="eth0")
                with socket.socket() as connection:
                    connection.settimeout(1)
                    connection.bind(("10.20.0.2", 0))
                    connection.connect(("127.0.0.1", 8080))
            with self.assertRaises(OSError):
                host.lan.run(attack)
            self.assertEqual(talk(("127.0.0.1", 8080))[1], b"cba")

    @each_in_new_network(*BACKENDS)
    def test_a_rule_of_the_administrator_is_asked_first(self, kind):
        add = {"iptables": "iptables -I DOCKER-USER -s 10.20.0.2 -j DROP",
               "nftables": "nft insert rule ip pydock DOCKER-USER ip saddr 10.20.0.2 drop"}[kind.name]
        with Host([kind]) as host:
            a = host.container("a", server=80)
            records = host.publish(a, {"80/tcp": [{"HostPort": "8080"}]})
            self.assertIsNotNone(host.lan.run(talk, ("10.20.0.1", 8080)))
            subprocess.run(add.split(), check=True)
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", 8080)))
            host.start([{"endpoints": [a.endpoint], "published": records}])
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", 8080)))
            host.networks.cleanup()
            rules = subprocess.run(["nft", "list", "ruleset"], stdout=subprocess.PIPE, universal_newlines=True).stdout \
                if kind.name == "nftables" else "\n".join(iptables_save())
            self.assertIn("10.20.0.2", rules)
            self.assertNotIn("PYDOCK", rules)

    @each_in_new_network(*BACKENDS)
    def test_no_communication_between_containers(self, kind):
        with Host([kind], icc=False) as host:
            self.assertEqual(host.networks.find("bridge").to_api()["Options"]["com.docker.network.bridge.enable_icc"],
                             "false")
            a, b = host.container("a", server=80), host.container("b")
            # without br_netfilter the firewall does not see what passes within the bridge
            if pydock.set_sysctl("net/bridge/bridge-nf-call-iptables", 1):
                self.assertIsNone(b.run(talk, (a.address, 80)))
            host.publish(a, {"80/tcp": [{"HostPort": "8080"}]})
            self.assertIsNotNone(b.run(talk, ("10.20.0.1", 8080)))

    @unittest.skipUnless(pydock.Nftables in BACKENDS, "needs nft")
    @in_new_network
    def test_a_table_of_somebody_else_that_drops_is_named(self):
        text = ("add table inet other\n"
                "add chain inet other guard { type filter hook forward priority 0 ; policy drop ; }\n")
        subprocess.run(["nft", "-f", "-"], input=text, check=True, universal_newlines=True)
        with Host([pydock.Nftables]) as host:
            self.assertEqual(host.networks.warnings,
                             ["the nftables chain guard of table inet other drops what it does not know, "
                              "also what is meant for containers"])

    @each_in_new_network(*BACKENDS)
    def test_two_daemons_on_one_host(self, kind):
        with Host([kind]) as host, tempfile.TemporaryDirectory() as root:
            host.publish(host.container("a", server=80), {"80/tcp": [{"HostPort": "8080"}]})
            first = host.networks
            with pydock.Netlink() as netlink:
                netlink.add_bridge("a-long-bridge-1")
                netlink.add_address("a-long-bridge-1", "10.77.0.1/24")
                netlink.set_link("a-long-bridge-1", up=True)
            host.root, host.options = root, {"bridge": "a-long-bridge-1"}
            host.start()
            self.assertEqual(host.networks.warnings, [])
            host.publish(host.container("b", server=80), {"80/tcp": [{"HostPort": "8081"}]})
            first.reassert()
            for port in (8080, 8081):
                self.assertEqual(host.lan.run(talk, ("10.20.0.1", port)), ("10.20.0.2", b"cba"))
            self.assertFalse(first.reassert(always=False) or host.networks.reassert(always=False))
            first.cleanup()
            self.assertEqual(host.lan.run(talk, ("10.20.0.1", 8081)), ("10.20.0.2", b"cba"))

    @unittest.skipUnless(pydock.Iptables in BACKENDS, "needs iptables")
    @in_new_network
    def test_another_bridge_after_a_restart_leaves_no_old_rule(self):
        with Host([pydock.Iptables]) as host:
            host.networks.create({"Name": "one"})
            with pydock.Netlink() as netlink:
                netlink.add_bridge("other")
                netlink.add_address("other", "10.77.0.1/24")
            host.options = {"bridge": "other"}
            host.start()
            self.assertEqual([rule for rule in iptables_save()
                              if rule.startswith("-A POSTROUTING") and "172.16.42" in rule], [])
            self.assertEqual(len([rule for rule in iptables_save() if rule.startswith("-A PREROUTING")]), 1)

    @each_in_new_network(*BACKENDS)
    def test_flushed_rules_come_back(self, kind):
        with Host([kind]) as host:
            host.publish(host.container("a", server=80), {"80/tcp": [{"HostPort": "8080"}]})
            self.assertFalse(host.networks.reassert(always=False))
            for command in {"iptables": ("iptables -t nat -F", "iptables -F", "iptables -t nat -X"),
                            "nftables": ("nft flush ruleset",)}[kind.name]:
                subprocess.run(command.split(), check=True)
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", 8080)))
            self.assertTrue(host.networks.reassert(always=False))
            self.assertIsNotNone(host.lan.run(talk, ("10.20.0.1", 8080)))

    @unittest.skipUnless(pydock.Iptables in BACKENDS, "needs iptables")
    @in_new_network
    def test_every_rule_once(self):
        with Host([pydock.Iptables]) as host:
            a = host.container("a")
            records = host.publish(a, {"8080/tcp": [{}]})
            for _ in range(3):
                host.start([{"endpoints": [a.endpoint], "published": records}])
            rules = iptables_save()
            self.assertEqual([rule for rule in rules if rules.count(rule) > 1], [])
            for rule in ("-A PREROUTING -m addrtype --dst-type LOCAL -j PYDOCK",
                         "-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j PYDOCK",
                         "-A POSTROUTING -s 172.16.42.0/24 ! -d 172.16.42.0/24 -j MASQUERADE",
                         "-A PYDOCK -p tcp -m tcp --dport 49153 -j DNAT --to-destination 172.16.42.2:8080"):
                self.assertIn(rule, rules)
            forward = [rule for rule in rules if rule.startswith("-A FORWARD ")]
            self.assertEqual(forward[:2], ["-A FORWARD -j DOCKER-USER", "-A FORWARD -j PYDOCK-FWD"])
            subprocess.run(["iptables", "-I", "FORWARD", "-j", "ACCEPT"], check=True)
            subprocess.run(["iptables", "-D", "FORWARD", "-j", "DOCKER-USER"], check=True)
            subprocess.run(["iptables", "-t", "nat", "-A", "POSTROUTING", "-s", "172.16.42.0/24", "!", "-d",
                            "172.16.42.0/24", "-j", "MASQUERADE"], check=True)
            host.networks.reassert()
            after = iptables_save()
            self.assertEqual(sorted(after), sorted(rules + ["-A FORWARD -j ACCEPT"]))
            self.assertEqual([rule for rule in after if rule.startswith("-A FORWARD ")],
                             forward + ["-A FORWARD -j ACCEPT"])
            host.networks.create({"Name": "one"})
            host.networks.remove("one")
            self.assertEqual(sorted(iptables_save()), sorted(after))
            host.networks.cleanup()
            self.assertEqual(sorted(iptables_save()),
                             ["-A DOCKER-USER -j RETURN", "-A FORWARD -j ACCEPT", "-A FORWARD -j DOCKER-USER"])

    @in_new_network
    def test_forwarding_only_with_rules(self):
        pydock.set_sysctl("net/ipv4/ip_forward", 0)
        with Host([]) as host:
            self.assertEqual(pydock.read_file("/proc/sys/net/ipv4/ip_forward"), b"0\n")
            self.assertEqual(len(host.networks.warnings), 1)
            self.assertIn("served by proxies alone", host.networks.warnings[0])
            if not BACKENDS:
                return
            host.backends = BACKENDS[:1]
            for name in ("eth1", "eth2"):
                host.start()
                self.assertEqual(pydock.read_file("/proc/sys/net/ipv4/ip_forward"), b"1\n")
                with Sleeper() as stranger:
                    with pydock.Netlink() as netlink:
                        netlink.add_veth(name, "eth0", pid=stranger.pid)
                        netlink.add_address(name, "10.30.0.1/24")
                        netlink.set_link(name, up=True)
                    stranger.run(pydock.configure_network,
                                 [{"interface": "eth0", "IPAddress": "10.30.0.2", "IPPrefixLen": 24,
                                   "Gateway": "10.30.0.1"}])
                    listener = stranger.run(socket.create_server, ("", 80))
                    serve(listener)
                    self.assertIsNone(host.lan.run(talk, ("10.30.0.2", 80)),
                                      "this host is no router for its neighbours")
                    listener.close()
            host.networks.cleanup()
            self.assertEqual(pydock.read_file("/proc/sys/net/ipv4/ip_forward"), b"0\n")

    @in_new_network
    def test_without_a_firewall_proxies_serve_all(self):
        with Host(iptables=False) as host:
            a = host.container("a", server=80)
            host.publish(a, {"80/tcp": [{"HostPort": "8080"}]})
            for run in (host.lan.run, lambda function, *args: function(*args)):
                self.assertEqual(run(talk, ("10.20.0.1", 8080)), ("172.16.42.1", b"cba"))
            host.publish(a, {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8081"}]})
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", 8081)))

    @in_new_network
    def test_a_port_in_use_publishes_nothing(self):
        with Host() as host, socket.create_server(("", 9000)):
            a = host.container("a")
            host.publish(a, {"80/tcp": [{"HostPort": "8080"}]})
            for port, sentence in (("8080", "Bind for 0.0.0.0:8080 failed: port is already allocated"),
                                   ("9000", "failed to bind host port for 0.0.0.0:9000: address already in use")):
                with self.assertRaises(pydock.Error) as caught:
                    host.publish(a, {"80/tcp": [{"HostPort": "8081"}], "81/tcp": [{"HostPort": port}]})
                self.assertEqual(str(caught.exception),
                                 "driver failed programming external connectivity on endpoint a "
                                 f"({a.endpoint['EndpointID']}): {sentence}")
            self.assertEqual([(record["HostIp"], record["HostPort"]) for record in host.networks.published],
                             [("0.0.0.0", 8080), ("::", 8080)])
            host.publish(a, {"80/tcp": [{"HostPort": "8081"}]})
            for bindings in ({"80/tcp": [{"HostIp": "x"}]}, {"80/foo": [{}]}, {"99999/tcp": [{}]},
                             {"80/tcp": [{"HostPort": "x"}]}):
                with self.assertRaises(pydock.BadRequest):
                    host.publish(a, bindings)

    @each_in_new_network(*BACKENDS)
    def test_a_port_on_one_address(self, kind):
        with Host([kind]) as host:
            with pydock.Netlink() as netlink:
                netlink.add_address("eth0", "10.20.0.3/24")
            host.publish(host.container("a", server=80), {"80/tcp": [{"HostIp": "10.20.0.3", "HostPort": "8080"}]})
            self.assertEqual(host.lan.run(talk, ("10.20.0.3", 8080)), ("10.20.0.2", b"cba"))
            self.assertIsNone(host.lan.run(talk, ("10.20.0.1", 8080)))
            with self.assertRaises(OSError):
                socket.create_server(("10.20.0.3", 8080))

    @unittest.skipUnless(BACKENDS, "needs iptables or nft")
    @in_new_network
    def test_many_threads_publish(self):
        with Host() as host:
            containers = [host.container(letter) for letter in "abcdefgh"]
            threads = [threading.Thread(target=host.publish, args=(c, {"80/tcp": [{}]}, False)) for c in containers]
            with mock.patch.object(pydock, "_run_program", side_effect=pydock._run_program) as run:
                run_threads(threads)
            self.assertLessEqual(run.call_count, 8)
            self.assertEqual(len({record["HostPort"] for record in host.networks.published}), 8)
            if host.networks.firewall.backend.name == "iptables":
                self.assertEqual(len([rule for rule in iptables_save() if "-j DNAT" in rule]), 8)

    @in_new_network
    def test_a_failed_attach_gives_the_address_back(self):
        with Host() as host:
            with self.assertRaises(OSError):
                attach_endpoint(host.networks, "bridge", "x" * 64, "x", 2 ** 22 - 1)
            self.assertEqual(host.networks.find("bridge").endpoints, {})
            self.assertEqual([link["name"] for link in links() if link["kind"] == "veth" and link["name"] != "eth0"],
                             [])
            a = host.container("a")
            with self.assertRaisesRegex(pydock.Forbidden, "endpoint with name a already exists in network bridge"):
                host.container("a")
            with self.assertRaisesRegex(pydock.BadRequest,
                                        "user specified IP address is supported on user defined networks only"):
                host.container("b", address="172.16.42.9")
            host.networks.delete_veth(a.endpoint)
            host.networks.release(a.endpoint)
            host.container("a")


def iptables_save():
    """The iptables rules of this network namespace, in the order of iptables-save."""
    text = subprocess.run(["iptables-save"], stdout=subprocess.PIPE, universal_newlines=True, check=True).stdout
    return [line for line in text.splitlines() if line.startswith("-A")]


class ProxyTest(unittest.TestCase):
    """The user-space proxies, tested on loopback."""

    def setUp(self):
        self.loop = pydock.ProxyLoop()
        self.front, self.back = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
        self.thread = threading.Thread(target=self.loop.run)

    def tearDown(self):
        self.loop.close()
        self.back.close()
        self.front.close()
        if self.thread.is_alive():
            self.thread.join(40)
        self.loop.epoll.close()

    def start(self, proto="tcp"):
        self.loop.serve(proto, self.front, self.back.getsockname())
        self.thread.start()

    def test_much_data_both_ways_and_half_close(self):
        serve(self.back)
        self.start()
        data = os.urandom(1 << 20) * 5
        self.assertEqual(talk(self.front.getsockname(), data), ("127.0.0.1", data[::-1]))

    def test_a_slow_reader_stops_the_writer_and_gets_all(self):
        self.start()
        with socket.create_connection(self.front.getsockname()) as client:
            server, _ = self.back.accept()
            client.setblocking(False)
            sent = 0
            while sent < 100 << 20 and select.select([], [client], [], 0.2)[1]:
                with contextlib.suppress(BlockingIOError):
                    sent += client.send(b"x" * 65536)
            self.assertLess(sent, 100 << 20)
            client.shutdown(socket.SHUT_WR)
            with server:
                self.assertEqual(sum(iter(lambda: len(server.recv(1 << 20)), 0)), sent)

    def test_nobody_listens_in_the_container(self):
        self.start()
        self.back.close()
        with socket.create_connection(self.front.getsockname()) as client:
            client.settimeout(10)
            with contextlib.suppress(ConnectionError):
                self.assertEqual(client.recv(1), b"")

    def test_it_starts_lazily(self):
        self.loop.serve("tcp", self.front, self.back.getsockname())
        self.assertEqual(select.select([self.loop], [], [], 0)[0], [])
        with socket.create_connection(self.front.getsockname()):
            self.assertEqual(select.select([self.loop], [], [], 10)[0], [self.loop])
            self.thread.start()
            self.back.accept()[0].close()

    def test_more_connections_than_there_is_room_for(self):
        serve(self.back)
        before = len(os.listdir("/proc/self/fd"))
        with mock.patch.object(pydock.ProxyLoop, "_make_room", lambda loop: setattr(loop, "max_connections", 10)):
            self.start()
            clients = [socket.create_connection(self.front.getsockname(), 10) for _ in range(60)]
            with contextlib.ExitStack() as stack:
                for client in clients:
                    stack.enter_context(client)
                    client.settimeout(20)
                for client in clients:  # ten are served at once; each connection that ends makes room for another one
                    self.assertEqual(client.recv(10), b"127.0.0.1 ")
                    self.assertLessEqual(self.loop.connections, 10)
                    client.shutdown(socket.SHUT_WR)
                    self.assertEqual(client.recv(10), b"")
        eventually(lambda: not self.loop.connections)
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), before + 20)

    def test_a_client_that_vanishes(self):
        self.start()
        client = socket.create_connection(self.front.getsockname())
        server, _ = self.back.accept()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        with server:
            server.settimeout(10)
            with contextlib.suppress(ConnectionError):
                self.assertEqual(server.recv(1), b"")
        eventually(lambda: self.loop.connections == 0)

    def test_udp(self):
        self.front.close()
        self.back.close()
        self.front, self.back = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
        for one in (self.front, self.back):
            one.bind(("0.0.0.0" if one is self.front else "127.0.0.1", 0))
            one.settimeout(10)
        port = self.front.getsockname()[1]
        self.start("udp")
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in range(3)]
            peers = []
            for number, client in enumerate(clients):
                client.settimeout(10)
                # a connected socket takes answers only from the address that the client has sent to
                client.connect((f"127.0.0.{number + 5}", port))
                client.send(b"ask %d" % number)
                data, peer = self.back.recvfrom(100)
                self.assertEqual(data, b"ask %d" % number)
                peers.append(peer)
            for number, (client, peer) in enumerate(zip(clients, peers)):
                self.back.sendto(b"answer %d" % number, peer)
                self.assertEqual(client.recv(100), b"answer %d" % number)
            self.assertEqual(len(set(peers)), 3)
            clients[0].send(b"again")
            self.assertEqual(self.back.recvfrom(100), (b"again", peers[0]))
            proxy = self.loop.proxies[0]
            with mock.patch.object(pydock, "_UDP_IDLE", -1):
                proxy.sweep()
            self.assertEqual(proxy.clients, {})


def question(name, kind=1, identity=7, flags=0x0100):
    """The bytes of a DNS query for one name."""
    labels = b"".join(bytes([len(label)]) + label for label in name.encode().split(b".") if label)
    return struct.pack("!HHHHHH", identity, flags, 1, 0, 0, 0) + labels + b"\0" + struct.pack("!HH", kind, 1)


def answers(reply):
    """(response code, [data of each answer record]) of a DNS reply to a query of `question`."""
    _, flags, _, count, _, _ = struct.unpack_from("!HHHHHH", reply)
    position, records = reply.index(b"\0", 12) + 5, []
    for _ in range(count):
        size = struct.unpack_from("!H", reply, position + 10)[0]
        records.append(reply[position + 12:position + 12 + size])
        position += 12 + size
    return flags & 15, records


def ask(query, by_tcp=False, timeout=10, server=("127.0.0.11", 53)):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if by_tcp else socket.SOCK_DGRAM) as client:
        client.settimeout(timeout)
        client.connect(server)
        if not by_tcp:
            client.send(query)
            return client.recv(4096)
        client.sendall(struct.pack("!H", len(query)) + query)
        with client.makefile("rb") as stream:
            return stream.read(struct.unpack("!H", stream.read(2))[0])


class Server:
    """A DNS server that answers every query with 9.9.9.9. `queries` lists the queries that it received."""

    def __init__(self, address):
        self.udp, self.tcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), socket.create_server((address, 53))
        self.udp.bind((address, 53))
        self.queries = []
        for body in (self._datagrams, self._streams):
            threading.Thread(target=body, daemon=True).start()

    def _reply(self, query):
        self.queries.append(query)
        return query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:] + b"\xc0\x0c\0\1\0\1\0\0\0\5\0\4" + bytes([9] * 4)

    def _datagrams(self):
        while True:
            query, client = self.udp.recvfrom(512)
            if b"example" in query:
                # a reply with the right id that repeats another question: the resolver must not take it
                self.udp.sendto(query[:2] + b"\x80\0" + bytes(8) + b"x", client)
            self.udp.sendto(self._reply(query), client)

    def _streams(self):
        while True:
            with self.tcp.accept()[0] as client:
                query = client.recv(512)
                reply = self._reply(query[2:])
                client.sendall(struct.pack("!H", len(reply)) + reply[:20])
                time.sleep(0.01)
                client.sendall(reply[20:])


@needs_root
class ResolverTest(unittest.TestCase):
    @contextlib.contextmanager
    def resolver(self, names, sk_lookup=True):
        """A container whose Resolver runs in a thread; yields (container, path of the names file, resolver). Without
        `sk_lookup` the kernel refuses the BPF program that redirects port 53 to the resolver's sockets."""
        def make():
            with pydock.Netlink() as netlink:
                netlink.set_link("lo", up=True)
            return pydock.open_resolver()
        with Sleeper() as container, tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            path = os.path.join(folder, "names")
            pydock.write_json(path, names, sync=False)
            if not sk_lookup:
                stack.enter_context(mock.patch.object(pydock, "redirect_port_by_sk_lookup",
                                                      side_effect=OSError(errno.EPERM, "no")))
            fds = container.run(make)
            loop = pydock.ProxyLoop()
            resolver = pydock.Resolver(loop, fds, path)
            thread = threading.Thread(target=loop.run)
            thread.start()
            try:
                yield container, path, resolver
            finally:
                loop.close()
                thread.join()

    NAMES = {"names": {"web": ["172.18.0.2"], "web.one": ["172.18.0.2"],
                       "many": [f"172.18.0.{n}" for n in range(2, 102)]},
             "addresses": {"172.18.0.2": "web.one"}, "servers": ["127.0.0.8", "127.0.0.9"], "internal": False}

    @each_in_new_network(True, False)
    def test_names_of_ours(self, sk_lookup):
        with self.resolver(self.NAMES, sk_lookup) as (container, path, resolver):
            self.assertEqual(len(resolver.sk_lookup), int(sk_lookup))
            for by_tcp in (False, True):
                for name, kind, expected in (("web", 1, (0, [socket.inet_aton("172.18.0.2")])),
                                             ("WEB.One.", 1, (0, [socket.inet_aton("172.18.0.2")])),
                                             ("web", 28, (0, [])),
                                             ("2.0.18.172.in-addr.arpa", 12, (0, [b"\3web\3one\0"]))):
                    self.assertEqual(answers(container.run(ask, question(name, kind), by_tcp)), expected,
                                     (name, kind, by_tcp))
            reply = container.run(ask, question("many"))
            self.assertLessEqual(len(reply), 512)
            self.assertTrue(reply[2] & 2, "marked as cut")
            many = answers(container.run(ask, question("many"), True))[1]
            self.assertEqual(len(many), 100)
            self.assertNotEqual(many, answers(container.run(ask, question("many"), True))[1], "they take turns")
            pydock.write_json(path, dict(self.NAMES, names={"new": ["172.18.0.77"]}), sync=False)
            self.assertEqual(answers(container.run(ask, question("new"))), (0, [socket.inet_aton("172.18.0.77")]))

    @in_new_network
    def test_other_names_are_passed_on(self):
        server = Server("127.0.0.9")  # nobody listens on 127.0.0.8
        with self.resolver(self.NAMES) as (container, _, _):
            for by_tcp in (False, True):
                self.assertEqual(answers(container.run(ask, question("example.com"), by_tcp)), (0, [bytes([9] * 4)]))
        self.assertEqual(server.queries, [question("example.com")] * 2)

    @in_new_network
    def test_no_server_answers(self):
        names = dict(self.NAMES, servers=["127.0.0.8", "not-an-address", "fd00::1"])
        with self.resolver(names) as (container, _, resolver):
            self.assertEqual(answers(container.run(ask, question("example.com"))), (2, []))
            self.assertEqual(resolver.questions, set())
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent, \
                    mock.patch.object(pydock, "_PATIENCE", 0.1):
                silent.bind(("127.0.0.8", 53))
                self.assertEqual(answers(container.run(ask, question("example.com"))), (2, []))

    @in_new_network
    def test_an_internal_network_asks_nobody(self):
        server = Server("127.0.0.9")
        with self.resolver(dict(self.NAMES, internal=True)) as (container, path, _):
            for by_tcp in (False, True):
                self.assertEqual(answers(container.run(ask, question("secret.example.com"), by_tcp)), (3, []))
            os.unlink(path)
            self.assertEqual(answers(container.run(ask, question("web")))[0], 0)
        self.assertEqual(server.queries, [])

    @in_new_network
    def test_a_server_of_the_container_on_the_same_port(self):
        with self.resolver(self.NAMES) as (container, _, resolver):
            if not resolver.sk_lookup:
                self.skipTest("this kernel has no BPF_PROG_TYPE_SK_LOOKUP")
            server = container.run(Server, "0.0.0.0")
            self.assertEqual(answers(container.run(ask, question("web"), False, 10, ("127.0.0.1", 53)))[1],
                             [bytes([9] * 4)])
            for by_tcp in (False, True):
                self.assertEqual(answers(container.run(ask, question("web"), by_tcp))[1],
                                 [socket.inet_aton("172.18.0.2")])
            self.assertEqual(len(server.queries), 1)

    @in_new_network
    def test_what_is_no_query_is_not_answered(self):
        good = question("web")
        with self.resolver(self.NAMES) as (container, _, _):
            for query in (b"", b"x", good[:11], good[:-1], good[:12] + b"\x3f" + b"a" * 10,
                          good[:12] + b"\xc0\x0c\0\1\0\1", question("web", flags=0x8180), question("web", flags=0x2900),
                          good[:5] + b"\2" + good[6:], question(".".join(["a" * 60] * 6))):
                with self.assertRaises(socket.timeout, msg=query):
                    container.run(ask, query, False, 0.1)
            self.assertEqual(answers(container.run(ask, good))[1], [socket.inet_aton("172.18.0.2")])

    @in_new_network
    def test_what_the_daemon_writes(self):
        with Host(iptables=False) as host:
            one = host.networks.create({"Name": "one"})
            host.networks.create({"Name": "two", "Internal": True})
            a = host.networks.reserve("one", "a" * 64, "web", aliases=["www", "shop"])
            b = host.networks.reserve("one", "b" * 64, "DB", aliases=["shop"], links=["web:front"])
            c = host.networks.reserve("two", "c" * 64, "inner")
            d = host.networks.reserve("bridge", "d" * 64, "plain")
            names = host.networks.names("b" * 64, ["1.2.3.4"])
            both = [a["IPAddress"], b["IPAddress"]]
            expected = {"web": both[:1], "www.one": both[:1], "db": both[1:], "a" * 12: both[:1], "shop": both,
                        "front": both[:1], "inner": None}
            self.assertEqual({name: names["names"].get(name) for name in expected}, expected)
            self.assertEqual(names["addresses"][b["IPAddress"]], "DB.one")
            self.assertEqual((names["servers"], names["internal"]), (["1.2.3.4"], False))
            self.assertNotIn("front", host.networks.names("a" * 64, [])["names"])
            self.assertTrue(host.networks.names(c["container"], [])["internal"])
            self.assertIsNone(host.networks.names(d["container"], []))
            self.assertEqual(host.networks.neighbours([one.id, d["NetworkID"]]), {"a" * 64, "b" * 64})


SERVER = ("import socket, sys, threading\n"
          "udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(('', 53))\n"
          "def answer():\n"
          "    while True:\n"
          "        data, peer = udp.recvfrom(65536); udp.sendto(data + b' from ' + peer[0].encode(), peer)\n"
          "threading.Thread(target=answer, daemon=True).start()\n"
          "tcp = socket.create_server(('', 80))\n"
          "print('ready', flush=True)\n"
          "while True:\n"
          "    c, peer = tcp.accept()\n"
          "    c.sendall(peer[0].encode()); c.close()\n")


def talk_tcp(address, port, timeout=5):
    """The text that a TCP server sends without being asked, or None where nobody answers."""
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout) as sock:
        return sock.makefile().read()


def talk_udp(address, port, data=b"hello"):
    """A UDP server's reply to a datagram, or None without a reply."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(5)
        sock.sendto(data, (address, port))
        with contextlib.suppress(OSError):
            return sock.recv(65536).decode()


def serve_http(port=80):
    """The command of a container that serves the files of /etc over HTTP."""
    return ["httpd", "-f", "-p", str(port), "-h", "/etc"]


def fetch(address, port, path="/hostname", timeout=5):
    """The body of an HTTP answer, or None where nobody answers."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


@needs_program("python3")
class ManyPortsTest(DaemonCase):
    def test_200_published_ports(self):
        """Each port has a proxy on 127.0.0.1 and one on ::1: more listeners than one message can pass."""
        script = "import socket, selectors\nwaiting = selectors.DefaultSelector()\n"
        script += "for port in range(1000, 1200):\n    waiting.register(socket.create_server(('', port)), 1)\n"
        script += "print('ready', flush=True)\n"
        script += "while True:\n    for key, _ in waiting.select():\n        connection, _ = key.fileobj.accept()\n"
        script += "        connection.sendall(b'%d' % key.fileobj.getsockname()[1])\n        connection.close()\n"
        container = self.api.run("python3", "-c", script, image=python_image(self.daemon), PortBindings={
            f"{port}/tcp": [{"HostPort": ""}] for port in range(1000, 1200)})
        self.wait_for_output(container, "ready")
        published = self.api.inspect(container)["NetworkSettings"]["Ports"]
        self.assertEqual(len(published), 200)
        for port, bindings in published.items():
            for address in ("127.0.0.1", "::1"):
                with self.subTest(port, address=address):
                    with socket.create_connection((address, int(bindings[0]["HostPort"])), 10) as connection:
                        self.assertEqual(connection.recv(10).decode() + "/tcp", port)


class ConnectTest(DaemonCase):
    def server(self, **config):
        container = self.api.run("python3", "-c", SERVER, image=python_image(self.daemon), **config)
        self.wait_for_output(container, "ready")
        return container

    def address(self, container):
        return self.api.inspect(container)["NetworkSettings"]["IPAddress"]

    def published(self, container):
        ports = self.api.inspect(container)["NetworkSettings"]["Ports"]
        return {port: int(bindings[0]["HostPort"]) for port, bindings in ports.items()}

    def from_inside(self, address, port, **config):
        """The text that a TCP server sends to a client in a new container."""
        return self.api.output(*self.client(address, port), image=PYTHON_IMAGE, **config).strip()

    @staticmethod
    def client(address, port):
        """The command of a container that prints the text that a TCP server sends."""
        return ["python3", "-c",
                f"import socket; print(socket.create_connection(('{address}', {port}), 5).makefile().read())"]

    def test_containers_reach_each_other_and_the_host(self):
        first = self.server()
        second = self.server()
        reply = self.api.execute(second, *self.client(self.address(first), 80))
        self.assertEqual(reply, (0, self.address(second) + "\n"))
        self.assertEqual(talk_tcp(self.address(first), 80), self.daemon.gateway)
        with socket.create_server((self.daemon.gateway, 0)) as listener:
            thread = threading.Thread(target=lambda: listener.accept()[0].close())
            thread.start()
            self.assertEqual(self.from_inside(self.daemon.gateway, listener.getsockname()[1]), "")
            thread.join(5)

    def test_a_published_port_on_every_address_of_the_host(self):
        container = self.server(PortBindings={"80/tcp": [{}], "53/udp": [{}]})
        ports = self.published(container)
        for address in ("127.0.0.1", self.daemon.gateway):
            self.assertEqual(talk_tcp(address, ports["80/tcp"]), self.daemon.gateway,
                             "a container never sees 127.0.0.1 as its client")
            self.assertEqual(talk_udp(address, ports["53/udp"]), "hello from " + self.daemon.gateway, address)
        for size in (0, 1, 1400, 8000):
            self.assertEqual(len(talk_udp("127.0.0.1", ports["53/udp"], b"x" * size)),
                             size + len(" from " + self.daemon.gateway))

    @unittest.skipUnless(os.path.exists("/proc/net/if_inet6"), "needs IPv6")
    def test_a_published_port_on_ipv6(self):
        """Many programs try ::1 first for `localhost`."""
        port = self.published(self.server(name="six", PortBindings={"80/tcp": [{}]}))["80/tcp"]
        self.assertEqual(talk_tcp("::1", port), self.daemon.gateway)
        self.assertEqual(self.api.inspect("six")["NetworkSettings"]["Ports"]["80/tcp"],
                         [{"HostIp": "0.0.0.0", "HostPort": str(port)}, {"HostIp": "::", "HostPort": str(port)}])
        for cli in self.command_lines:
            self.assertEqual(cli("port", "six").out, f"80/tcp -> 0.0.0.0:{port}\n80/tcp -> [::]:{port}\n")
        self.daemon.restart()
        self.assertEqual(talk_tcp("::1", port), self.daemon.gateway)
        self.api.ok("DELETE", "/containers/six", force=1)
        self.assertIsNone(talk_tcp("::1", port))

    def test_hairpin(self):
        container = self.server(PortBindings={"80/tcp": [{}]})
        port = self.published(container)["80/tcp"]
        self.assertTrue(self.from_inside(self.daemon.gateway, port))
        reply = self.api.execute(container, *self.client(self.daemon.gateway, port))
        self.assertEqual(reply[0], 0, reply)

    def test_forms_of_publish(self):
        for cli in self.command_lines:
            cli("run", "-d", "--name", "forms", "-p", "81", "-p", "18082:82", "-p", "127.0.0.1:18083:83", "-p",
                "127.0.0.1::84", "-p", "18085-18087:85-87", "-p", "18088:88/udp", "base", "sleep", "600")
            ports = self.api.inspect("forms")["NetworkSettings"]["Ports"]
            bindings = {port: (bound[0]["HostIp"], bound[0]["HostPort"]) for port, bound in ports.items()}
            self.assertEqual(bindings["82/tcp"], ("0.0.0.0", "18082"))
            self.assertEqual(bindings["83/tcp"], ("127.0.0.1", "18083"))
            self.assertEqual(bindings["84/tcp"][0], "127.0.0.1")
            self.assertEqual([bindings[f"{n}/tcp"][1] for n in (85, 86, 87)], ["18085", "18086", "18087"])
            self.assertEqual(bindings["88/udp"], ("0.0.0.0", "18088"))
            self.assertGreaterEqual(int(bindings["81/tcp"][1]), 49153)
            for wrong in ("70000:80", "80:70000", "x:80", "1-3:1-2", "1.2.3:80:80", "80/sctp2", "-1:80",
                          "300.1.1.1:80:80"):
                cli("run", "--rm", "-p", wrong, "base", "true", code=125)
            cli("rm", "-f", "forms")

    def test_ports_in_use(self):
        with socket.create_server(("0.0.0.0", 0)) as taken:
            port = taken.getsockname()[1]
            container = self.api.create("sleep", "600",
                                        PortBindings={"80/tcp": [{"HostPort": str(port)}], "81/tcp": [{}]})
            answer = self.api.post(f"/containers/{container}/start")
            self.refused(500, answer, "address already in use")
            self.assertIn(str(port), answer.message)
            self.assertEqual(self.api.state(container)["Status"], "created")
        self.api.start(container)
        self.assertEqual(talk_tcp("127.0.0.1", port) or "", "")
        other = self.api.create("true", PortBindings={"80/tcp": [{"HostPort": str(port)}]})
        self.refused(500, self.api.post(f"/containers/{other}/start"), "port is already allocated")
        self.api.ok("DELETE", "/containers/" + container, force=1)
        self.api.start(other)
        for wrong in ("70000", "x", "-1"):
            answer = self.api.post("/containers/create",
                                   {"Image": "base", "Cmd": ["true"],
                                    "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": wrong}]}}})
            self.refused(400, answer, f'invalid port specification: "{wrong}"')

    def test_mac_addresses(self):
        container = self.api.run("sleep", "600", MacAddress="02-42-0A-00-00-99")
        self.assertEqual(self.api.execute(container, "cat", "/sys/class/net/eth0/address")[1], "02:42:0a:00:00:99\n")
        self.assertEqual(self.api.inspect(container)["NetworkSettings"]["MacAddress"], "02:42:0a:00:00:99")
        for wrong in ("xx", "02:42:0a:00:00", "02:42:0a:00:00:9g", "01:02:03:04:05:06:07:08", "\u0661" * 12):
            answer = self.api.post(f"/containers/{self.api.create('true', MacAddress=wrong)}/start")
            self.refused(400, answer, f"address {wrong}: invalid MAC address")

    def test_published_on_loopback_only(self):
        container = self.server(PortBindings={"80/tcp": [{"HostIp": "127.0.0.1"}]})
        port = self.published(container)["80/tcp"]
        self.assertEqual(talk_tcp("127.0.0.1", port), self.daemon.gateway)
        self.assertIsNone(talk_tcp(self.daemon.gateway, port))
        self.assertEqual(read("/proc/sys/net/ipv4/conf/all/route_localnet"), "0\n")

    def test_files_of_the_network(self):
        container = self.api.run("sleep", "600", Hostname="box", Domainname="example", Dns=["10.9.8.7"],
                                 DnsSearch=["one", "two"], DnsOptions=["ndots:3"])
        address = self.address(container)
        hosts = self.api.execute(container, "cat", "/etc/hosts")[1]
        self.assertIn("127.0.0.1\tlocalhost", hosts)
        self.assertIn(f"{address}\tbox.example box\n", hosts)
        self.assertEqual(self.api.execute(container, "cat", "/etc/resolv.conf")[1].split("\n")[:3],
                         ["nameserver 10.9.8.7", "search one two", "options ndots:3"])
        self.assertEqual(self.api.execute(container, "cat", "/etc/hostname")[1], "box\n")
        self.assertEqual(self.api.execute(container, "sh", "-c",
                                          "echo '1.2.3.4 mine' >>/etc/hosts && tail -n1 /etc/hosts")[1],
                         "1.2.3.4 mine\n")

    def test_addresses_go_up(self):
        addresses = [self.api.output("sh", "-c", "hostname -i") for _ in range(3)]
        last = [int(a.strip().rpartition(".")[2]) for a in addresses]
        self.assertEqual([n - last[0] for n in last], [0, 1, 2], addresses)

    def test_networks_of_users(self):
        for cli in self.command_lines:
            ident = cli("network", "create", "--subnet", "10.77.0.0/24", "--label", "a=b", "mynet").out.strip()
            self.assertIn("mynet", cli("network", "ls").out)
            self.assertEqual(json.loads(cli("network", "inspect", "mynet").out)[0]["Id"], ident)
            self.server(name="server", NetworkMode="mynet")
            other = self.api.run("sleep", "600", image=PYTHON_IMAGE, name="other", NetworkMode="mynet")
            script = ("import socket; print(socket.gethostbyname('server'), "
                      "socket.create_connection(('server', 80), 5).makefile().read())")
            code, text = self.api.execute(other, "python3", "-c", script)
            self.assertEqual((code, text.split()[0][:8]), (0, "10.77.0."))
            self.api.run("sleep", "600", name="alone")
            cli("network", "connect", "--alias", "friend", "mynet", "alone")
            code, text = self.api.execute(other, "python3", "-c",
                                          "import socket; print(socket.gethostbyname('friend'))")
            self.assertEqual((code, text.strip()),
                             (0, self.api.inspect("alone")["NetworkSettings"]["Networks"]["mynet"]["IPAddress"]))
            self.assertIn("has active endpoints", cli("network", "rm", "mynet", code=1).err)
            cli("network", "disconnect", "mynet", "alone")
            self.assertNotIn("mynet", self.api.inspect("alone")["NetworkSettings"]["Networks"])
            cli("rm", "-f", "server", "other", "alone")
            cli("network", "rm", "mynet")
        for name in ("-j ACCEPT", "a;b", "x" * 300, "bridge", "a/b", "new\nline", ""):
            answer = self.api.post("/networks/create", {"Name": name})
            self.assertIn(answer.status, (400, 403, 409), name)
        self.refused(404, self.api.get("/networks/nosuch"), "network nosuch not found")
        self.refused(403, self.api.delete("/networks/bridge"))

    def test_names_after_a_restart_of_the_daemon(self):
        self.api.ok("POST", "/networks/create", {"Name": "mynet"})
        self.server(name="server", NetworkMode="mynet")
        other = self.api.run("sleep", "600", image=PYTHON_IMAGE, name="other", NetworkMode="mynet")
        look_up = ("python3", "-c", "import socket; print(socket.gethostbyname('server'))")
        first = self.api.execute(other, *look_up)
        self.daemon.restart()
        self.assertEqual(self.api.execute(other, *look_up), first)
        self.assertEqual(first[0], 0, first)
        self.server(name="later", NetworkMode="mynet")
        self.assertEqual(self.api.execute(other, "python3", "-c", "import socket; socket.gethostbyname('later')"),
                         (0, ""))

    def test_names_for_what_joins_a_network_while_it_runs(self):
        look_up = ("python3", "-c", "import socket; print(socket.gethostbyname('server'))")
        self.api.ok("POST", "/networks/create", {"Name": "mynet"})
        self.server(name="server", NetworkMode="mynet")
        plain = self.api.run("sleep", "600", image=PYTHON_IMAGE)
        writer = self.api.run("sh", "-c", "echo nameserver 192.0.2.1 > /etc/resolv.conf; echo ready; sleep 600")
        self.wait_for_output(writer, "ready")
        for container in (plain, writer):
            self.api.ok("POST", "/networks/mynet/connect", {"Container": container})
        address = self.api.inspect("server")["NetworkSettings"]["Networks"]["mynet"]["IPAddress"]
        self.assertEqual(self.api.execute(plain, *look_up), (0, address + "\n"))
        # a resolv.conf that the container has written itself is left alone
        self.assertEqual(self.api.execute(writer, "cat", "/etc/resolv.conf"), (0, "nameserver 192.0.2.1\n"))
        self.api.ok("POST", "/networks/mynet/disconnect", {"Container": plain})
        self.api.ok("POST", "/networks/mynet/connect", {"Container": plain})
        self.assertEqual(self.api.execute(plain, *look_up)[0], 0)
        self.api.ok("POST", f"/containers/{plain}/restart", t=0)
        self.assertEqual(self.api.execute(plain, *look_up)[0], 0)

    def test_links(self):
        self.server(name="server")
        text = self.api.output("sh", "-c", "cat /etc/hosts", Links=["server:db"])
        self.assertRegex(text, fr"{re.escape(self.address('server'))}\tdb [0-9a-f]{{12}} server")


class BridgeAddressTest(DaemonCase):
    """A bridge that was made without a MAC address. The kernel gives it the lowest MAC address of its ports, so its
    address would change under the containers if pydock did not fix it."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon("bridge", mac=None).start()
        cls.addClassCleanup(cls.daemon.cleanup)

    def mac(self):
        with pydock.Netlink() as netlink:
            return netlink.link(self.daemon.bridge)["mac"]

    def test_it_stays(self):
        before = self.mac()
        for _ in range(3):
            self.api.run("sleep", "600")
            self.assertEqual(self.mac(), before)


class NoBridgeTest(DaemonCase):
    """A daemon without a bridge: the networks host and none work, and a start on bridge says to use them."""

    @classmethod
    def setUpClass(cls):
        cls.daemon = Daemon("no-bridge", bridge=False).start()
        cls.addClassCleanup(cls.daemon.cleanup)

    def test_modes(self):
        self.assertEqual(self.api.output("echo", "x", NetworkMode="none"), "x\n")
        self.assertEqual(self.api.output("echo", "x", NetworkMode="host"), "x\n")
        container = self.api.create("true")
        self.refused(400, self.api.post(f"/containers/{container}/start"), "use --net none or --net host")


@needs_root
class MissingProgramsTest(unittest.TestCase):
    """Hosts without iptables, nft or ip. The daemon sets its own PATH, so the tests hide these programs by bind mounts
    over them."""

    def hidden(self, *names):
        empty = write(os.path.join(SCRATCH, "hidden", "program"), "", 0o644)
        self.addCleanup(shutil.rmtree, os.path.dirname(empty), ignore_errors=True)
        for name in names:
            for folder in pydock.DEFAULT_PATH.split(":"):
                path = os.path.realpath(os.path.join(folder, name))
                if os.path.isfile(path) and os.stat(path).st_size:
                    pydock.mount(empty, path, None, pydock.MS_BIND)
                    self.addCleanup(pydock.umount, path)

    def run_daemon(self):
        daemon = Daemon("bare").start()
        self.addCleanup(daemon.cleanup)
        return daemon

    def test_without_a_firewall(self):
        self.hidden("iptables", "iptables-restore", "iptables-save", "nft", "xtables-nft-multi", "xtables-legacy-multi")
        daemon = self.run_daemon()
        warnings = daemon.api.ok("GET", "/info")["Warnings"]
        self.assertTrue(any("iptables" in text for text in warnings), warnings)
        self.assertEqual(daemon.log_text().count("without iptables"), 1)
        self.assertEqual(blunders(daemon.log_text()), [])
        if shutil.which("busybox"):
            container = daemon.api.run(*serve_http(), PortBindings={"80/tcp": [{}]})
            port = int(daemon.api.inspect(container)["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"])
            for address in ("127.0.0.1", daemon.gateway):
                eventually(lambda: fetch(address, port))

    def test_without_ip(self):
        self.hidden("ip")
        daemon = self.run_daemon()
        self.assertEqual(daemon.api.output("hostname", "-i").strip(), daemon.subnet + ".2")


########################################################################
# 13. Sandbox
########################################################################

ALLOW, EPERM, ENOSYS = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
DEFAULT_SET = frozenset(pydock.DEFAULT_CAPABILITIES)
AMD64, X86, ARM64, ARM = 0xC000003E, 0x40000003, 0xC00000B7, 0x40000028


def decide_call(program, arch, number, *arguments):
    """Run a seccomp program (classic BPF) for one system call and return its action, as the kernel would."""
    data = struct.pack("<IIQ6Q", number & 0xFFFFFFFF, arch, 0, *(arguments + (0,) * (6 - len(arguments))))
    instructions = [struct.unpack_from("=HBBI", program, offset) for offset in range(0, len(program), 8)]
    value = position = 0
    while True:
        code, yes, no, k = instructions[position]
        position += 1
        if code == 0x20:
            value = struct.unpack_from("<I", data, k)[0]
        elif code == 0x54:
            value &= k
        elif code == 0x05:
            position += k
        elif code == 0x06:
            return k
        else:
            position += yes if {0x15: value == k, 0x25: value > k, 0x35: value >= k}[code] else no


class SeccompTablesTest(unittest.TestCase):
    """The tables of system call numbers agree with the kernel's headers, where these are installed."""

    def compare(self, pattern, tables, prefix="__NR_"):
        paths = glob.glob(pattern)
        if not paths:
            self.skipTest("no kernel headers (linux-libc-dev)")
        with open(paths[0]) as f:
            header_numbers = {name: int(number)
                              for name, number in re.findall(fr"#define {prefix}(\w+) (\d+)\n", f.read())}
        ours = pydock._call_numbers(tables)
        self.assertGreater(len(set(header_numbers) & set(ours)), 300)
        self.assertEqual({}, {name: (ours[name], header_numbers[name]) for name in ours
                              if name in header_numbers and ours[name] != header_numbers[name]})
        wrong = [name for name, number in ours.items()
                 if number in header_numbers.values() and name not in header_numbers]
        self.assertEqual([], wrong)

    def test_x86_64(self):
        self.compare("/usr/include/*/asm/unistd_64.h", "x86_64 common")

    def test_i386(self):
        self.compare("/usr/include/*/asm/unistd_32.h", "i386 time64 common")

    def test_generic(self):
        path = "/usr/include/asm-generic/unistd.h"
        if not os.path.exists(path):
            self.skipTest("no kernel headers (linux-libc-dev)")
        with open(path) as f:
            text = f.read()
        header_numbers = {name: int(number)
                          for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)\n", text)}
        renamed = {"fstatat": "newfstatat", "sync_file_range2": "sync_file_range", "arch_specific_syscall": ""}
        ours = pydock._call_numbers("generic common")
        for name, number in header_numbers.items():
            name = renamed.get(name, name)
            if name in ours and not 403 <= number <= 423:
                self.assertEqual(number, ours[name], name)

    def test_no_name_is_misspelt(self):
        known = {name for table in pydock._SYSCALLS for name in pydock._call_numbers(table)}
        self.assertEqual(set(), pydock._REFUSED_CALLS - known)
        named = {name for names in pydock._CALLS_BY_CAPABILITY.values() for name in names.split()}
        self.assertEqual(set(), named - known)
        self.assertEqual(set(), set(pydock._CALLS_BY_CAPABILITY) - set(pydock.CAPABILITIES))


class SeccompProgramTest(unittest.TestCase):
    """The default profile and users' profiles, run by decide_call."""

    def program(self, capabilities=DEFAULT_SET, machine="x86_64", profile=None):
        rules = pydock._default_rules(capabilities), pydock._REFUSE
        if profile is not None:
            rules = pydock._profile_rules(profile, machine, capabilities)
        return pydock._compile_filter(pydock._MACHINE_ABIS[machine], *rules)

    def check(self, program, arch, tables, cases):
        numbers = pydock._call_numbers(tables)
        for name, expected, *arguments in cases:
            self.assertEqual(expected, decide_call(program, arch, numbers[name], *arguments), (name, arguments))

    def test_default(self):
        cases = [(name, ALLOW)
                 for name in "read write execve openat ptrace capset setresuid prctl exit_group seccomp".split()]
        cases += [(name, EPERM)
                  for name in ("mount unshare setns bpf keyctl add_key init_module reboot settimeofday "
                               "open_by_handle_at userfaultfd io_uring_setup perf_event_open kexec_load pivot_root "
                               "swapon move_mount").split()]
        cases += [("chroot", ALLOW), ("clone3", ENOSYS), ("clone", ALLOW, 0x01200011), ("clone", EPERM, 0x10000000),
                  ("personality", ALLOW, 0xFFFFFFFF), ("personality", EPERM, 0x40000), ("socket", ALLOW, 2),
                  ("socket", ALLOW, 39), ("socket", EPERM, 38), ("socket", EPERM, 40)]
        for machine, arch, tables in (("x86_64", AMD64, "x86_64 common"), ("x86_64", X86, "i386 time64 common"),
                                      ("aarch64", ARM64, "generic common"),
                                      ("aarch64", ARM, "i386 arm time64 common arm-private")):
            known = pydock._call_numbers(tables)
            self.check(self.program(machine=machine), arch, tables, [case for case in cases if case[0] in known])

    def test_socketcall(self):
        """32-bit programs may make sockets by socketcall(2), as with docker; a profile without the call refuses it."""
        self.check(self.program(), X86, "i386 time64 common", [("socketcall", ALLOW, 1)])
        profile = {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["socket"], "action": "SCMP_ACT_ALLOW"}]}
        self.check(self.program(profile=profile), X86, "i386 time64 common", [("socketcall", EPERM, 1),
                                                                             ("socket", ALLOW, 2)])

    def test_upper_half_of_an_int_does_not_count(self):
        """The kernel takes socket(0x100000026) for socket(AF_ALG), because the argument is an int."""
        self.check(self.program(), AMD64, "x86_64 common",
                   [("socket", EPERM, 1 << 32 | 38), ("socket", EPERM, 0xFFFFFFFF00000028)])

    def test_capabilities_open_calls(self):
        for capability, name in (("SYS_ADMIN", "mount"), ("SYS_ADMIN", "clone3"), ("SYS_MODULE", "init_module"),
                                 ("SYS_TIME", "settimeofday"), ("SYS_PTRACE", "kcmp"),
                                 ("DAC_READ_SEARCH", "open_by_handle_at"), ("BPF", "bpf"), ("SYSLOG", "syslog")):
            self.check(self.program(DEFAULT_SET | {capability}), AMD64, "x86_64 common", [(name, ALLOW)])
        self.check(self.program(DEFAULT_SET | {"SYS_ADMIN"}), AMD64, "x86_64 common", [("clone", ALLOW, 0x10000000)])
        self.check(self.program(DEFAULT_SET - {"SYS_CHROOT"}), AMD64, "x86_64 common", [("chroot", EPERM)])

    def test_unknown_numbers(self):
        program = self.program()
        newest = max(pydock._call_numbers("common").values())
        self.assertEqual(EPERM, decide_call(program, AMD64, 400))
        # numbers from 0x40000000 on are calls of the x32 ABI
        for number in (newest + 1, 5000, 0x40000000, 0x40000001, 0x40000000 + 520, 0xFFFFFFFF):
            self.assertEqual(ENOSYS, decide_call(program, AMD64, number), number)
        self.assertEqual(0x80000000, decide_call(program, 0x12345678, 0))  # a foreign architecture kills the process

    def test_every_number_against_the_rules(self):
        """The compiled binary search gives each number the action of its rule, for numbers at both ends and between."""
        rules = {"read": [((), 0x50007)], "close": [(((0, "GT", 5, 0),), ALLOW)], "removexattrat": [((), 0x50009)]}
        program = pydock._compile_filter(pydock._MACHINE_ABIS["x86_64"], rules, ALLOW)
        numbers = {number: name for name, number in pydock._call_numbers("x86_64 common").items()}
        for number in range(600):
            expected = {"read": 0x50007, "removexattrat": 0x50009}.get(numbers.get(number), ALLOW)
            self.assertEqual(expected, decide_call(program, AMD64, number), number)

    def test_comparisons(self):
        values = (0, 1, 5, 6, 7, 1 << 32, 5 << 32, (5 << 32) + 6, (6 << 32) + 5, (1 << 64) - 1)
        tests = {"EQ": lambda a, v, o: a == v, "NE": lambda a, v, o: a != v, "GT": lambda a, v, o: a > v,
                 "GE": lambda a, v, o: a >= v,
                 "LT": lambda a, v, o: a < v, "LE": lambda a, v, o: a <= v, "MASKED_EQ": lambda a, v, o: a & v == o}
        for kind, test in tests.items():
            for value in values:
                profile = {"defaultAction": "SCMP_ACT_ERRNO",
                           "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [
                    {"index": 2, "value": value, "valueTwo": value & 5, "op": "SCMP_CMP_" + kind}]}]}
                program = self.program(profile=profile)
                for argument in values:
                    expected = ALLOW if test(argument, value, value & 5) else EPERM
                    self.assertEqual(expected, decide_call(program, AMD64, 0, 9, 9, argument), (kind, value, argument))

    def test_profile(self):
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "no_such_call"], "action": "SCMP_ACT_ERRNO", "errnoRet": 30},
            {"name": "write", "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "value": 7, "op": "SCMP_CMP_EQ"}]},
            {"names": ["kill"], "action": "SCMP_ACT_KILL_PROCESS", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
            {"names": ["chmod"], "action": "SCMP_ACT_ERRNO", "excludes": {"arches": ["amd64"]}},
            {"names": ["chown"], "action": "SCMP_ACT_ERRNO", "includes": {"minKernel": "99.0"}}]}
        self.check(self.program(profile=profile), AMD64, "x86_64 common", [
            ("mkdir", 0x5001E), ("write", EPERM, 7), ("write", ALLOW, 1), ("kill", ALLOW), ("chmod", ALLOW),
            ("chown", ALLOW)])
        program = self.program(profile=profile)
        self.assertEqual(0x5001E, decide_call(program, X86, 39))  # the rule holds for 32-bit programs, too
        self.assertEqual(ENOSYS, decide_call(program, AMD64, 0x40000000 + 83))  # and x32 does not get around it

    def test_bad_profiles(self):
        for text in ("{", "[]", "{}", '{"defaultAction": "SCMP_ACT_NOTIFY"}', '{"defaultAction": 5}',
                     '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{}]}', "[" * 100000,
                     '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": '
                     '"SCMP_ACT_ERRNO", "errnoRet": "x"}]}',
                     '{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ERRNO", '
                     '"args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}'):
            with self.assertRaises(pydock.BadRequest, msg=text[:80]):
                pydock.seccomp_program(DEFAULT_SET, text)

    def test_is_made_once(self):
        self.assertIs(pydock.seccomp_program(DEFAULT_SET), pydock.seccomp_program(frozenset(DEFAULT_SET)))


@unittest.skipUnless(os.geteuid() == 0 and os.uname().machine == "x86_64", "needs root on x86_64")
class SeccompKernelTest(unittest.TestCase):
    """The kernel accepts the program and applies it, also to the calls of a 32-bit program (int 0x80)."""

    def under_filter(self, body, capabilities=DEFAULT_SET, profile=""):
        """Run body() in a child under the filter and return its result, which goes through JSON."""
        program = pydock.seccomp_program(capabilities, profile)
        source, sink = os.pipe()

        def child():
            pydock.seccomp_filter(program)
            os.write(sink, json.dumps(body()).encode())
        pid = pydock.fork(child)
        os.close(sink)
        with open(source, "rb") as stream:
            data = stream.read()
        os.waitpid(pid, 0)
        return json.loads(data) if data else None

    @staticmethod
    def call(number, *arguments):
        libc = ctypes.CDLL(None, use_errno=True)
        result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, arguments))
        return -ctypes.get_errno() if result == -1 else result

    @staticmethod
    def call_32(number, first=0):
        """Make a system call as a 32-bit program does, by machine code: push rbx; mov eax, number; mov ebx, first;
        xor ecx, ecx; xor edx, edx; int 0x80; pop rbx; ret."""
        code = (b"\x53\xb8" + struct.pack("<I", number) + b"\xbb" + struct.pack("<I", first)
                + b"\x31\xc9\x31\xd2\xcd\x80\x5b\xc3")
        page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        page.write(code)
        return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()

    def test_calls(self):
        results = self.under_filter(lambda: [
            self.call(165, 0, 0, 0, 0, 0), self.call(272, 0x10000000), self.call(41, 38, 5, 0),
            self.call(41, 1 << 32 | 38, 5, 0), self.call(435, 0, 0), self.call(304, -1, 0, 0), self.call(39) > 0,
            self.call(0x40000000 + 39), self.call(468 + 100)])
        self.assertEqual([-1, -1, -1, -1, -errno.ENOSYS, -1, True, -errno.ENOSYS, -errno.ENOSYS], results)

    def test_32_bit_calls(self):
        if self.call_32(20) != os.getpid():
            self.skipTest("this kernel runs no 32-bit programs")
        results = self.under_filter(lambda: [self.call_32(20) == os.getpid(), self.call_32(21),
                                             self.call_32(310, 0x10000000), self.call_32(359, 38), self.call_32(435)])
        self.assertEqual([True, -1, -1, -1, -errno.ENOSYS], results)

    def test_profile(self):
        profile = json.dumps({"defaultAction": "SCMP_ACT_ALLOW",
                              "syscalls": [{"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 77}]})
        self.assertEqual([-77, -77], self.under_filter(lambda: [self.call(110), self.call_32(64)], profile=profile))


PYTHON_IMAGE = "python"  # an image with the host's python3, made once for each daemon


def python_image(daemon):
    """Make PYTHON_IMAGE where a daemon does not have it yet, and return its name."""
    if daemon.api.get(f"/images/{PYTHON_IMAGE}/json").status == 404:
        daemon.api.ok("POST", "/pydock/mkimage", name=PYTHON_IMAGE, program=["python3", "sh", "ls", "cat", "sleep"])
    return PYTHON_IMAGE


def become_nobody():
    """Give up root's rights for those of the user nobody, for good."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def status_of(text):
    """{field: value} of the text of a /proc/PID/status."""
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


class SandboxTest(DaemonCase):
    def test_namespaces_are_its_own(self):
        text = self.api.output("sh", "-c",
                               "cd /proc/self/ns; for n in pid mnt uts ipc net cgroup; do readlink $n; done")
        for name, value in zip(("pid", "mnt", "uts", "ipc", "net", "cgroup"), text.split()):
            self.assertNotEqual(value, os.readlink("/proc/self/ns/" + name), name)
        self.assertEqual(self.api.output("sh", "-c", "echo $$; cat /proc/self/cgroup | cut -d: -f3 | sort -u"),
                         "1\n/\n")

    def test_process_state(self):
        for user, effective in (("", None), ("1234", "0000000000000000")):
            status = status_of(self.api.output("cat", "/proc/self/status", User=user))
            default = f"{pydock.capability_mask(pydock.DEFAULT_CAPABILITIES):016x}"
            self.assertEqual(status["CapBnd"], default)
            self.assertEqual(status["CapEff"], effective or default)
            self.assertEqual(status["CapPrm"], effective or default)
            self.assertEqual((status["CapInh"], status["CapAmb"]), ("0" * 16, "0" * 16))
            for field in ("SigIgn", "SigBlk"):
                self.assertEqual(status[field], "0" * 16, field)
            self.assertEqual((status["Umask"], status["NoNewPrivs"]), ("0022", "0"))
        container = self.api.run("sleep", "600", SecurityOpt=["no-new-privileges"])
        for options in ({}, {"User": "1234"}):
            status = status_of(self.api.execute(container, "cat", "/proc/self/status", **options)[1])
            self.assertEqual((status["NoNewPrivs"], status["CapInh"], status["CapBnd"]), ("1", "0" * 16, default))
            self.assertEqual(status["SigIgn"], "0" * 16)

    def test_a_user_is_a_line_of_passwd_and_not_a_part_of_one(self):
        """U+2028 in the name of one user made the rest of the line another user, uid 0 for example."""
        script = ("printf 'evil:x:1:1:\\342\\200\\250svc:x:0:0::/:/bin/sh\\nsvc:x:1000:1000::/:/bin/sh\\n' "
                  ">/etc/passwd; echo ready; exec sleep 600")
        container = self.api.run("sh", "-c", script)
        self.wait_for_output(container, "ready")
        status = status_of(self.api.execute(container, "cat", "/proc/self/status", User="svc")[1])
        self.assertEqual(status["Uid"].split(), ["1000"] * 4)

    def test_no_descriptor_is_inherited(self):
        container = self.api.run("sleep", "600")
        self.assertEqual(self.api.execute(container, "ls", "/proc/1/fd")[1].split(), ["0", "1", "2"])
        self.assertEqual(self.api.execute(container, "sh", "-c", "exec ls /proc/self/fd")[1].split(),
                         ["0", "1", "2", "3"])  # ls itself has opened 3, the folder

    def test_environment_is_built_from_nothing(self):
        lines = self.api.output("cat", "/proc/1/environ").rstrip("\0").split("\0")
        self.assertEqual(sorted(line.partition("=")[0] for line in lines), ["HOME", "HOSTNAME", "PATH"])
        lines = self.api.output("cat", "/proc/1/environ", Tty=True).rstrip("\0").split("\0")
        self.assertIn("TERM=xterm", lines)

    @needs_program("python3")
    def test_every_inode_is_its_own_or_read_only(self):
        """What a container reaches through its descriptors, its mounts and its /dev does not lie in a file system of
        the host, unless it is mounted read-only or belongs to the container's folder."""
        script = ("import json, os\n"
                  "paths = ['/proc/self/fd/%d' % fd for fd in range(3)]\n"
                  "paths += [line.split()[4] for line in open('/proc/self/mountinfo')]\n"
                  "paths += [os.path.join(top, name) for top, folders, names in os.walk('/dev')\n"
                  "          for name in names if not os.path.islink(os.path.join(top, name))]\n"
                  "found = []\n"
                  "for path in paths:\n"
                  "    status, flags = os.stat(path), os.statvfs(path).f_flag\n"
                  "    found.append((path, status.st_dev, status.st_ino, bool(flags & os.ST_RDONLY)))\n"
                  "print(json.dumps(found))\n")
        image, devices = python_image(self.daemon), set()
        for line in read("/proc/self/mountinfo").splitlines():
            with contextlib.suppress(OSError):
                devices.add(os.stat(line.split()[4]).st_dev)
        container = self.api.run("sleep", "600", image=image)
        folder = os.path.join(self.daemon.root, "containers")
        texts = [self.api.output("python3", "-c", script, image=image, **options)
                 for options in ({}, {"Tty": True}, {"OpenStdin": True, "StdinOnce": True}, {"User": "1234"},
                                 {"CapAdd": ["ALL"], "SecurityOpt": ["no-new-privileges"]})]
        texts += [self.api.execute(container, "python3", "-c", script, **options)[1]
                  for options in ({}, {"User": "1234"}, {"AttachStdin": True}, {"Privileged": True})]
        for text in texts:
            found = json.loads(text)
            self.assertIn("/proc/keys", [path for path, *_ in found])
            shared = [path for path, device, inode, is_read_only in found if device in devices and not is_read_only]
            self.assertEqual(sorted(shared), ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"])
        own = [os.stat(os.path.join(folder, container, name)).st_ino for name in ("hostname", "hosts", "resolv.conf")]
        self.assertEqual(sorted(inode for path, _, inode, _ in found if path.startswith("/etc/")), sorted(own))

    def test_the_null_device_of_the_host(self):
        """A container changes its own null device, and not that of the host, through a mask or through stdin."""
        before, container = os.stat("/dev/null"), self.api.run("sh", "-c", "touch -d 2001-02-03 /proc/self/fd/0 "
                                                               "/proc/keys; echo done; sleep 600")
        self.wait_for_output(container, "done")
        self.assertEqual(self.api.execute(container, "touch", "-d", "2001-02-03", "/proc/self/fd/0"), (0, ""))
        after = os.stat("/dev/null")
        self.assertEqual((after.st_mtime, after.st_mode), (before.st_mtime, before.st_mode))
        self.assertEqual(self.api.execute(container, "sh", "-c", "cat; echo x >/dev/stdin", User="1234"), (0, ""))
        # a link to a descriptor that leads out is not followed, and without a null device there is the pipe
        self.assertEqual(self.api.execute(container, "ln", "-sf", "/proc/self/fd/0", "/dev/null"), (0, ""))
        text = self.api.post(f"/containers/{container}/exec", {"Cmd": ["true"], "AttachStdout": True}).json["Id"]
        self.refused(500, self.api.post(f"/exec/{text}/start", {"Detach": True}), "/dev/null of the container is not")
        self.assertEqual(self.api.execute(container, "echo", "x", AttachStdin=True), (0, "x\n"))

    def test_masked_and_read_only_paths(self):
        self.assertEqual(self.api.inspect(self.api.create("true"))["HostConfig"]["MaskedPaths"],
                         list(pydock.masked_paths()))
        cpus = self.folder()
        for name in ("cpu0/thermal_throttle", "cpu11/thermal_throttle", "cpu2", "cpufreq/thermal_throttle"):
            os.makedirs(os.path.join(cpus, name))
        self.assertEqual(pydock.masked_paths(cpus)[len(pydock.MASKED_PATHS):],
                         (cpus + "/cpu0/thermal_throttle", cpus + "/cpu11/thermal_throttle"))
        script = (f"for p in {' '.join(pydock.masked_paths())}; do "
                  "cat $p >/dev/null 2>&1 && [ -n \"$(cat $p 2>/dev/null)\" ] && echo READ $p; "
                  "[ -d $p ] && [ -n \"$(ls -A $p)\" ] && echo LIST $p; done; true")
        self.assertEqual(self.api.output("sh", "-c", script), "")
        for path in ("/proc/sys/kernel/hostname", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity",
                     "/sys/kernel/uevent_helper", "/proc/sys/kernel/core_pattern", "/sys/fs/cgroup/cgroup.procs",
                     "/sys/fs/cgroup/memory/release_agent"):
            text = self.api.output("sh", "-c", f"[ -e {path} ] && echo x >>{path} && echo WRITTEN; true")
            self.assertNotIn("WRITTEN", text, path)
        open_paths = self.api.output("sh", "-c",
                                     "echo x >/proc/sys/kernel/hostname && echo WRITTEN; ls /proc/irq | head -1",
                                     Privileged=True)
        self.assertIn("WRITTEN", open_paths)

    def test_mounts(self):
        lines = [line.split() for line in self.api.output("cat", "/proc/self/mountinfo").splitlines()]
        kinds = {fields[4]: fields[fields.index("-") + 1] for fields in lines}
        self.assertEqual((kinds["/"], kinds["/proc"], kinds["/dev"], kinds["/dev/pts"], kinds["/dev/shm"],
                          kinds["/sys"]),
                         ("overlay", "proc", "tmpfs", "devpts", "tmpfs", "sysfs"))
        self.assertNotIn(SCRATCH, " ".join(kinds))
        self.assertIn("65536 ", self.api.output("df", "-k", "/dev/shm"))
        self.assertIn("1024 ", self.api.output("df", "-k", "/dev/shm", ShmSize=1 << 20))

    def test_nothing_of_it_is_mounted_on_the_host(self):
        before = read("/proc/self/mountinfo")
        self.api.run("sleep", "600", Binds=["vol:/v"], Tmpfs={"/t": ""})
        self.assertEqual(read("/proc/self/mountinfo"), before)

    def test_mounting_and_raw_devices_are_denied(self):
        text = self.api.output("sh", "-c",
                               "mount -t tmpfs x /mnt; mkdir /m; mount -t tmpfs x /m; "
                               "mknod /disk b 254 0; mknod /kmem c 1 2; cat /disk /kmem")
        self.assertNotIn("No such device", text)
        self.assertGreaterEqual(text.lower().count("not permitted") + text.lower().count("permission denied"), 3, text)

    def test_users_and_groups(self):
        container = self.api.create("true", name="users")
        passwd = ("root:x:0:0:r:/root:/bin/sh\n1000:x:0:0:a trap:/:/bin/sh\nann:x:55:66:Ann:/home/ann:/bin/sh\n"
                  "broken line\n:x:1:1::/:\n")
        group = "root:x:0:\nann:x:66:\nextra:x:77:bob,ann\n1000:x:0:\n"
        self.api.call("PUT", f"/containers/{container}/archive",
                      tar_of(file_("etc/passwd", passwd.encode()), file_("etc/group", group.encode())), path="/")
        self.api.ok("POST", "/commit", container=container, repo="users")
        show = ("sh", "-c", "exec 2>/dev/null; id -u; id -g; id -G; echo $HOME")
        for user, expected in (("ann", "55 66 66 77 /home/ann"), ("ann:", "55 66 66 77 /home/ann"),
                               ("ann:root", "55 0 0 /home/ann"), ("1000", "1000 0 0 /"),
                               ("55", "55 66 66 77 /home/ann"), ("1000:1000", "1000 1000 1000 /"),
                               ("7:ann", "7 66 66 /"), ("", "0 0 0 /root")):
            self.assertEqual(" ".join(self.api.output(*show, image="users", User=user).split()), expected, user)
        self.assertEqual(" ".join(self.api.output(*show, image="users", User="7", GroupAdd=["extra", "88"]).split()),
                         "7 0 0 77 88 /")
        running = self.api.run("sleep", "600", image="users")
        self.assertEqual(" ".join(self.api.execute(running, *show, User="1000")[1].split()), "1000 0 0 /")
        for user in ("4294967296", "-1", "nosuch", "0:nosuch", "99999999999999999999", "1:2:3"):
            answer = self.api.post("/containers/create", {"Image": "users", "Cmd": ["id"], "User": user})
            if answer.status == 201:
                answer = self.api.post(f"/containers/{answer.json['Id']}/start")
            self.refused(400, answer)

    def test_a_huge_group_file(self):
        container = self.api.run("sh", "-c",
                                 "head -c 200000000 /dev/zero | tr '\\0' 'a' >/etc/group; echo done; sleep 600")
        self.wait_for_output(container, "done", 30)
        self.assertEqual(self.api.execute(container, "id", "-u", User="1:2"), (0, "1\n"))
        self.assertTrue(self.api.state(container)["Running"])

    def test_working_directories_that_lead_out(self):
        container = self.api.run("sleep", "600")
        for number in list(range(3, 12)) + [100]:
            path = f"/proc/self/fd/{number}"
            answer = self.api.post("/containers/create",
                                   {"Image": "base", "Cmd": ["sh", "-c", "ls -d ../../../../../../*"],
                                    "WorkingDir": path})
            if answer.status == 201:
                started = self.api.post(f"/containers/{answer.json['Id']}/start")
                self.assertNotEqual(started.status, 204, path)
            code, text = self.api.execute(container, "sh", "-c", "ls -d ../../../../../../*", WorkingDir=path)
            self.assertNotEqual(code, 0, text)

    def test_hostile_links_in_an_image(self):
        """CVE-2025-31133, CVE-2025-52881, CVE-2026-41579 and the like: an image has symbolic links at the places where
        the sandbox mounts."""
        outside = self.folder()
        write(outside + "/target/file", "untouched")
        before = read("/proc/sys/kernel/core_pattern")
        base = self.api.create("true")
        root = self.api.get(f"/containers/{base}/export").body
        for number, links in enumerate((
                {"dev": outside}, {"proc": outside + "/target"}, {"sys": outside}, {"etc": outside},
                {"dev": "/proc/sys"}, {"dev/null": "/proc/sys/kernel/core_pattern"},
                {"etc/hosts": "/proc/sys/kernel/core_pattern", "etc/resolv.conf": outside + "/target/file"},
                {"dev/pts": "/proc", "dev/shm": outside}, {"tmp": "/proc/self/root/proc/1/root" + outside})):
            with self.subTest(links):
                packed = io.BytesIO()
                with tarfile.open(fileobj=io.BytesIO(root)) as old, tarfile.open(fileobj=packed, mode="w") as new:
                    for member in old:
                        if not any(member.name == name or member.name.startswith(name + "/") for name in links):
                            new.addfile(member, old.extractfile(member) if member.isreg() else None)
                    for name, target in links.items():
                        new.addfile(symlink(name, target))
                answer = self.api.post("/images/create", packed.getvalue(), fromSrc="-", repo=f"evil{number}")
                self.assertEqual(answer.status, 200, answer)
                container = self.api.create("sh", "-c", "echo hit >/dev/null; echo hit >/etc/hosts; touch /tmp/hit",
                                            image=f"evil{number}", Volumes={"/tmp/v": {}})
                answer = self.api.post(f"/containers/{container}/start")
                if answer.status == 204:
                    self.api.wait(container)
                else:
                    self.assertIn("symbolic link", answer.message)
                self.assertEqual((os.listdir(outside), os.listdir(outside + "/target"), read(outside + "/target/file")),
                                 (["target"], ["file"], "untouched"))
                self.assertEqual(read("/proc/sys/kernel/core_pattern"), before)

    def test_mounts_over_proc_and_sys_are_refused(self):
        folder = self.folder()
        for target in ("/proc", "/proc/self", "/proc/self/attr", "/proc/sys/kernel", "/sys", "/sys/fs", "/",
                       "/x/../proc", "/.", "relative"):
            answer = self.api.post("/containers/create",
                                   {"Image": "base", "Cmd": ["true"], "HostConfig": {"Binds": [f"{folder}:{target}"]}})
            self.refused(400, answer, "invalid volume specification: ")

    def test_a_link_to_proc_whose_name_begins_with_proc(self):
        """CVE-2019-19921: a mount target whose name only begins with /proc or /sys is checked like any other."""
        script = "ln -s /proc /proclink; ln -s /sys /sys-link; rm -r /tmp; ln -s /proc/sys/kernel /tmp"
        self.api.wait(self.api.run("sh", "-c", script, name="linked"))
        self.api.ok("POST", "/commit", container="linked", repo="linked")
        for target in ("/proclink/sys", "/sys-link/kernel", "/tmp/keys"):
            for options in ({"Binds": [f"vol:{target}"]}, {"Tmpfs": {target: ""}}, {"Volumes": {target: {}}}):
                container = self.api.create("true", image="linked", **options)
                self.refused(400, self.api.post(f"/containers/{container}/start"), "leads into /proc or /sys")

    def test_the_interpreter_cannot_be_overwritten(self):
        """CVE-2019-5736: a container cannot open the program of a process that enters it, pydock's own interpreter,
        for writing."""
        before = [hashlib.sha256(read(path, "rb")).hexdigest() for path in (os.path.realpath(sys.executable), PYDOCK)]
        attack = "while :; do for p in /proc/[0-9]*; do true >>$p/exe && echo OPENED $p; done; done 2>/dev/null"
        container = self.api.run("sh", "-c", attack, CapAdd=["sys_ptrace"])
        for _ in range(20):
            self.api.execute(container, "true")
        self.assertNotIn(b"OPENED", self.api.logs(container))
        script = self.api.create("/evil", image="base")
        self.api.call("PUT", f"/containers/{script}/archive", tar_of(file_("evil", b"#!/proc/self/exe\n", mode=0o755)),
                      path="/")
        self.api.post(f"/containers/{script}/start")
        self.assertEqual([hashlib.sha256(read(path, "rb")).hexdigest()
                          for path in (os.path.realpath(sys.executable), PYDOCK)],
                         before)

    def test_the_interpreter_as_a_sealed_copy(self):
        """CVE-2019-5736 on kernels that cannot mount a single file read-only: a sealed copy is run instead."""
        fd = pydock.sealed_copy(os.path.realpath(sys.executable))
        self.addCleanup(os.close, fd)
        path = f"/proc/self/fd/{fd}"
        result = subprocess.run([sys.executable, "-I", "-c", "import json; print(json.dumps('runs'))"], executable=path,
                                pass_fds=[fd], capture_output=True)
        self.assertEqual(result.stdout, b'"runs"\n', result)
        with open(path, "r+b", buffering=0) as copy, self.assertRaises(PermissionError):
            copy.write(b"x")
        with self.assertRaises(PermissionError):
            os.truncate(path, 0)

    def test_a_container_that_joins_the_pids_of_another_is_seen_when_it_has_nothing_more(self):
        """CVE-2016-9962: a container with CAP_SYS_PTRACE could take over a process that sets up another container in
        the same pid namespace, so that process must have dropped every further capability before it can be seen."""
        script = "(while [ ! -e /end ]; do cat /proc/[0-9]*/status | grep ^CapPrm >>/seen; done) 2>/dev/null; sleep 600"
        spy = self.api.run("sh", "-c", script, name="spy", CapAdd=["SYS_PTRACE"])
        for _ in range(5):
            text = self.api.output("sh", "-c", "readlink /proc/self/ns/pid; kill -0 1 && echo sees",
                                   PidMode="container:spy", CapAdd=["SYS_PTRACE"])
            self.assertEqual(text, self.api.execute(spy, "readlink", "/proc/1/ns/pid")[1] + "sees\n")
        answer = self.api.post(f"/containers/{self.api.create('nosuch', PidMode='container:spy')}/start")
        self.refused(400, answer, "executable file not found")
        self.api.execute(spy, "touch", "/end")
        seen = {int(word, 16) for word in self.api.execute(spy, "sort", "-u", "/seen")[1].split() if word != "CapPrm:"}
        mine = pydock.capability_mask(pydock.DEFAULT_CAPABILITIES + ("SYS_PTRACE",))
        self.assertEqual({mask & ~mine for mask in seen}, {0})

    def test_a_working_directory_and_a_mount_through_links_to_proc(self):
        outside = self.folder()
        text = ("FROM base\n"
                f"RUN ln -s /proc/1/root{outside} /out && ln -s /proc/sys/net /net && ln -s /sys/kernel /kernel")
        self.assertEqual(self.api.post("/build", tar_of(file_("Dockerfile", text.encode())), t="links").status, 200)
        with_host_pids = self.api.create("true", image="links", PidMode="host", WorkingDir="/out/made")
        self.refused(400, self.api.post(f"/containers/{with_host_pids}/start"), "/out/made")
        self.assertEqual(os.listdir(outside), [])
        for options in ({"Binds": [outside + ":/net"]}, {"Binds": ["vol:/kernel"]}, {"Tmpfs": {"/net": ""}}):
            container = self.api.create("true", image="links", **options)
            self.refused(400, self.api.post(f"/containers/{container}/start"), "leads into /proc or /sys")

    @needs_program("python3")
    def test_handles_and_the_terminals_input_queue(self):
        """A container can neither open files of the host by open_by_handle_at (the exploit "Shocker") nor type into its
        user's terminal by TIOCSTI."""
        script = ("import ctypes, os\n"
                  "libc = ctypes.CDLL(None, use_errno=True)\n"
                  "handle = ctypes.create_string_buffer(b'\\x08\\0\\0\\0\\x01\\0\\0\\0\\x02\\0\\0\\0\\0\\0\\0\\0')\n"
                  "print(libc.open_by_handle_at(os.open('/etc/hosts', 0), handle, 0), ctypes.get_errno())\n")
        self.assertEqual(self.api.output("python3", "-c", script, image=python_image(self.daemon)),
                         f"-1 {errno.EPERM}\n")
        inject = "import fcntl, termios\nfor c in 'touch /hit':\n    fcntl.ioctl(0, termios.TIOCSTI, c.encode())\n"
        terminal = self.terminal(self.daemon.pydock_argv("run", "-it", "--rm", PYTHON_IMAGE, "python3", "-c", inject))
        terminal.wait()
        self.assertFalse(select.select([terminal.theirs], [], [], 0)[0], "the container typed into its user's terminal")

    @needs_program("python3")
    @unittest.skipUnless(os.uname().machine == "x86_64", "needs x86_64")
    def test_calls_that_reach_into_the_kernel(self):
        """CVE-2022-0492 (a user namespace and its release_agent), CVE-2026-31431 (AF_ALG) and the like: the calls that
        these exploits need are refused."""
        script = ("import ctypes, errno, socket\n"
                  "libc = ctypes.CDLL(None, use_errno=True)\n"
                  "for name, *words in (\n"
                  "        ('unshare', 272, 0x10000000), ('clone', 56, 0x10000011, 0, 0, 0, 0),\n"
                  "        ('mount', 165, 0, 0, 0, 0, 0), ('setns', 308, 0, 0), ('bpf', 321, 0, 0, 0),\n"
                  "        ('keyctl', 250, 0, 0), ('perf', 298, 0, 0, -1, -1, 0), ('userfaultfd', 323, 0),\n"
                  "        ('io_uring', 425, 1, 0), ('kexec', 246, 0, 0, 0, 0), ('fsopen', 430, 0, 0),\n"
                  "        ('open_tree', 428, -100, 0, 1), ('x32', 0x40000000 + 39)):\n"
                  "    result = libc.syscall(*map(ctypes.c_long, words))\n"
                  "    if result != -1 or ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS):\n"
                  "        print(name, result, ctypes.get_errno())\n"
                  "for family, kind in (38, socket.SOCK_SEQPACKET), (40, socket.SOCK_STREAM):\n"
                  "    try:\n"
                  "        print(socket.socket(family, kind))\n"
                  "    except OSError as error:\n"
                  "        if error.errno not in (errno.EPERM, errno.EAFNOSUPPORT):\n"
                  "            print(family, error)\n")
        image = python_image(self.daemon)
        for options in ({}, {"User": "1000"}, {"CapAdd": ["NET_ADMIN"]}, {"SecurityOpt": ["no-new-privileges"]}):
            self.assertEqual(self.api.output("python3", "-c", script, image=image, **options), "", options)
        container = self.api.run("sleep", "600", image=image)
        self.assertEqual(self.api.execute(container, "python3", "-c", script), (0, ""))

    @needs_program("python3")
    def test_a_mount_point_that_another_container_swaps(self):
        """CVE-2021-30465, CVE-2024-45310, CVE-2026-42306: two containers share a volume. While one of them is started,
        or files are copied out of it and into it, the other one keeps replacing a mount point and a folder of the
        volume with symbolic links."""
        outside, inside = self.folder(sentinel="of the host"), self.folder(mounted="x")
        script = ("import ctypes, os, sys\n"
                  "libc = ctypes.CDLL(None)\n"
                  "for name, target in (b'/v/m', '/proc/sys'), (b'/v/d', sys.argv[1]):\n"
                  "    os.makedirs(name); os.symlink(target, name + b'l')\n"
                  "open('/v/d/sentinel', 'w').write('inside')\n"
                  "print('swapping', flush=True)\n"
                  "while True:\n"
                  "    for name in b'/v/m', b'/v/d':\n"
                  "        libc.renameat2(-100, name, -100, name + b'l', 2)\n")
        image = python_image(self.daemon)
        swapper = self.api.run("python3", "-c", script, outside, image=image, Binds=["vol:/v"])
        self.wait_for_output(swapper, "swapping")
        plain = set(self.mount_points(self.api.output("cat", "/proc/self/mountinfo")))
        before, started = read("/proc/self/mountinfo"), 0
        container = self.api.create("cat", "/proc/self/mountinfo", Binds=["vol:/v", inside + ":/v/m"])
        for _ in range(30):
            answer = self.api.post(f"/containers/{container}/start")
            self.assertIn(answer.status, (204, 400, 404, 500), answer)
            self.api.wait(container)
            started += answer.status == 204
        self.assertTrue(started)
        targets = set(self.mount_points(output_of(self.api.logs(container)).decode()))
        self.assertEqual({path for path in targets - plain if (path + "/").split("/")[1] != "v"}, set())
        for _ in range(60):
            answer = self.api.get(f"/containers/{container}/archive", path="/v/d/sentinel")
            self.assertNotIn(b"of the host", answer.body)
            self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("planted", b"x")), path="/v/d")
            self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("planted", b"x")), path="/v/m")
        self.assertEqual((os.listdir(outside), read(outside + "/sentinel")), (["sentinel"], "of the host"))
        self.assertEqual(read("/proc/self/mountinfo"), before)

    @staticmethod
    def mount_points(text):
        return [line.split()[4] for line in text.splitlines()]

    def test_a_folder_of_the_host_as_dev(self):
        """A container has a folder of the host at /dev: pydock makes no device in that folder and mounts no terminal or
        mask there (CVE-2025-52565)."""
        folder = self.folder(null="a file", pts="another")
        for options in ({}, {"Tty": True}):
            container = self.api.create("sh", "-c", "echo x", Binds=[folder + ":/dev"], **options)
            self.assertEqual(self.api.post(f"/containers/{container}/start").status, 204)
            self.api.wait(container)
            self.assertEqual((sorted(os.listdir(folder)), read(folder + "/null")), (["null", "pts"], "a file"))

    def test_sockets_of_ours_are_files_of_roots(self):
        container = self.api.run("sleep", "600", NetworkMode="host")
        run = os.path.join(self.daemon.root, "run")
        sockets = [os.path.join(top, name) for top, _, names in os.walk(run) for name in names]
        self.assertTrue(sockets)
        for path in sockets:
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
            self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode), 0o700)
        names = [line.split()[-1] for line in self.api.execute(container, "cat", "/proc/net/unix")[1].splitlines()[1:]]
        self.assertFalse([name for name in names if name.startswith("@")
                          and re.search("pydock|monitor|[0-9a-f]{12}", name)])

    def test_the_data_root_is_closed_to_others(self):
        self.api.run("sh", "-c", "touch /secret; sleep 600", Binds=["vol:/v"])
        read_end, write_end = os.pipe()

        def as_nobody():
            become_nobody()
            visible = []
            for top in (self.daemon.root, self.daemon.root + "/layers", self.daemon.root + "/volumes/vol/_data",
                        self.daemon.root + "/containers"):
                with contextlib.suppress(OSError):
                    visible += os.listdir(top)
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
                sock.connect(self.daemon.socket)
                visible.append("connected")
            os.write(write_end, json.dumps(visible).encode())
        pid = pydock.fork(as_nobody)
        os.close(write_end)
        with open(read_end) as pipe:
            self.assertEqual(json.load(pipe), [])
        os.waitpid(pid, 0)
        self.assertEqual(stat.S_IMODE(os.stat(self.daemon.root).st_mode), 0o710)
        self.assertEqual(stat.S_IMODE(os.stat(self.daemon.socket).st_mode), 0o660)

    def test_a_container_folder_with_a_mount_of_the_hosts_is_not_emptied(self):
        """kaniko#1870: a mount in a container's folder is not entered when the container is removed."""
        sentinel = self.folder(precious="data")
        container = self.api.run("mkdir", "/mnt2")
        self.api.wait(container)
        target = os.path.join(self.daemon.root, "containers", container, "upper", "mnt2")
        pydock.mount(sentinel, target, None, pydock.MS_BIND)
        self.api.delete("/containers/" + container, force=1)
        self.assertEqual(os.listdir(sentinel), ["precious"])
        for line in read("/proc/self/mountinfo").splitlines():
            if line.split()[4].endswith("/mnt2"):
                pydock.umount(line.split()[4])
        self.api.delete("/containers/" + container, force=1)
        self.daemon.restart()
        self.assertFalse(os.path.exists(os.path.join(self.daemon.root, "containers", container)))

    def test_sharing_namespaces_with_a_container(self):
        first = self.api.run("sleep", "600", name="first", IpcMode="shareable")
        for kind, options in (("pid", {"PidMode": "container:first"}), ("ipc", {"IpcMode": "container:first"}),
                              ("net", {"NetworkMode": "container:first"})):
            expected = self.api.execute(first, "readlink", "/proc/1/ns/" + kind)[1]
            self.assertEqual(self.api.output("readlink", "/proc/self/ns/" + kind, **options), expected, kind)
        self.api.execute(first, "touch", "/dev/shm/shared")
        self.assertEqual(self.api.output("ls", "/dev/shm", IpcMode="container:first"), "shared\n")
        for options in ({"PidMode": "container:nosuch"}, {"NetworkMode": "container:nosuch"},
                        {"IpcMode": "container:nosuch"}):
            answer = self.api.post("/containers/create", {"Image": "base", "Cmd": ["true"], "HostConfig": options})
            if answer.status == 201:
                answer = self.api.post(f"/containers/{answer.json['Id']}/start")
            self.assertIn(answer.status, (400, 404, 409), options)

    def test_propagation(self):
        folder = self.folder()
        pydock.mount("tmpfs", folder, "tmpfs")
        self.addCleanup(pydock.umount, folder)
        pydock.mount(None, folder, None, MS_SHARED)
        os.mkdir(folder + "/later")
        shared = self.api.run("sleep", "600", Binds=[folder + ":/s:rshared"], Privileged=True)
        private = self.api.run("sleep", "600", Binds=[folder + ":/s"])
        pydock.mount("tmpfs", folder + "/later", "tmpfs")
        write(folder + "/later/file", "x")
        self.assertEqual(self.api.execute(shared, "ls", "/s/later")[1], "file\n")
        self.assertEqual(self.api.execute(private, "ls", "/s/later")[1], "")
        self.assertEqual(self.api.execute(shared, "sh", "-c",
                                          "mkdir /s/own && mount -t tmpfs x /s/own && touch /s/own/from-inside")[0], 0)
        self.assertEqual(os.listdir(folder + "/own"), ["from-inside"])
        for name in ("own", "later"):
            pydock.umount(folder + "/" + name)

    def test_sysctls(self):
        self.assertEqual(self.api.output("cat", "/proc/sys/net/ipv4/ip_unprivileged_port_start",
                                         Sysctls={"net.ipv4.ip_unprivileged_port_start": "77"}),
                         "77\n")
        for name in ("kernel.hostname", "vm.swappiness", "net/../kernel.core_pattern",
                     "net.ipv4.x/../../../kernel/core_pattern", ""):
            answer = self.api.post("/containers/create",
                                   {"Image": "base", "Cmd": ["true"], "HostConfig": {"Sysctls": {name: "1"}}})
            self.refused(400, answer, "sysctl")

    def test_limits_of_the_host_are_no_error(self):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        self.assertEqual(self.api.output("true", Ulimits=[{"Name": "nofile", "Soft": hard * 2, "Hard": hard * 2}]), "")
        self.assertEqual(self.api.output("cat", "/proc/self/oom_score_adj", OomScoreAdj=500), "500\n")


class InheritableCapabilitiesTest(DaemonCase):
    """CVE-2022-24769: a daemon that has inheritable capabilities passes them on to no container."""
    own = True

    @classmethod
    def setUpClass(cls):
        mask = pydock.own_capabilities()
        pydock.set_capabilities(mask, mask, mask)
        cls.addClassCleanup(pydock.set_capabilities, mask, mask, 0)
        super().setUpClass()

    def test_containers_and_execs(self):
        inherited = status_of(read(f"/proc/{self.daemon.process.pid}/status"))["CapInh"]
        self.assertEqual(inherited, f"{pydock.own_capabilities():016x}")
        for options in ({}, {"User": "1234"}, {"Privileged": True, "User": "1234"},
                        {"User": "1234", "SecurityOpt": ["no-new-privileges"]}):
            container = self.api.run("sh", "-c", "cat /proc/self/status; exec sleep 600", **options)
            self.wait_for_output(container, "CapInh")
            texts = [output_of(self.api.logs(container)).decode()]
            texts += [self.api.execute(container, "cat", "/proc/self/status", User=user)[1] for user in ("", "1234")]
            for status in map(status_of, texts):
                self.assertEqual((status["CapInh"], status["CapAmb"]), ("0" * 16, "0" * 16), options)


class CopyInsideTest(DaemonCase):
    """cp, commit and export of a container with hostile files."""

    def test_a_tree_that_swaps_folders_for_links(self):
        """CVE-2018-15664: while a folder of the path keeps turning into a link to a folder of the host, no copy reads
        from that folder or writes to it."""
        outside = self.folder(sentinel="of the host")
        container = self.api.run("sh", "-c",
                                 f"mkdir -p /w/a; echo inside >/w/a/sentinel; ln -s {outside} /w/l; while :; do "
                                 "mv /w/a /w/t; mv /w/l /w/a; mv /w/a /w/l; mv /w/t /w/a; done")
        for _ in range(60):
            answer = self.api.get(f"/containers/{container}/archive", path="/w/a/sentinel")
            self.assertNotIn(b"of the host", answer.body)
            self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("planted", b"x")), path="/w/a")
        self.assertEqual(os.listdir(outside), ["sentinel"])

    def test_links_and_dots_stay_inside(self):
        outside = self.folder(sentinel="of the host")
        container = self.api.create("true")
        self.api.call("PUT", f"/containers/{container}/archive",
                      tar_of(symlink("out", outside), symlink("up", "../../../../..")), path="/")
        for path in ("/out/sentinel", f"/up{outside}/sentinel", f"/../../..{outside}/sentinel"):
            self.assertEqual(self.api.get(f"/containers/{container}/archive", path=path).status, 404, path)
        for path in ("/out", "/up" + outside):
            self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("planted", b"x")), path=path)
        answer = self.api.call("PUT", f"/containers/{container}/archive",
                               tar_of(file_("../../../../../../.." + outside + "/planted", b"x")), path="/tmp")
        self.assertEqual(answer.status, 400, answer)
        self.assertEqual(os.listdir(outside), ["sentinel"])

    def test_programs_and_libraries_of_the_container_are_not_used(self):
        """CVE-2019-14271, CVE-2026-41567: pydock never runs a decompressor, an NSS library or a Python module of a
        container."""
        marker = self.folder() + "/marker"
        hostile = b"#!/bin/sh\ntouch /marker %s\n" % marker.encode()
        members = [file_("usr/bin/" + name, hostile, mode=0o755)
                   for name in ("xz", "unpigz", "zstd", "gzip", "tar", "python3", "getent")]
        module = b"open('/marker', 'w')\n"
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for place in ("usr/lib/" + version, sys.prefix.lstrip("/") + "/lib/" + version):
            members += [file_(f"{place}/{name}", module)
                        for name in ("sitecustomize.py", "encodings/idna.py", "grp.py", "stringprep.py", "tarfile.py")]
        members += [file_("lib/x86_64-linux-gnu/libnss_files.so.2", b"\x7fELF no library")]
        container = self.api.create("sleep", "600")

        def put(data):
            return self.api.call("PUT", f"/containers/{container}/archive", data, path="/")
        self.assertEqual(put(tar_of(*members)).status, 200)
        self.api.start(container)
        for compress in (gzip.compress, bz2.compress, lzma.compress):
            self.assertEqual(put(compress(tar_of(file_("plain", b"x")))).status, 200)
        self.api.execute(container, "ls", "/", User="root")
        self.api.ok("POST", "/commit", container=container, repo="hostile")
        self.api.get(f"/containers/{container}/export")
        self.api.get(f"/containers/{container}/archive", path="/etc")
        self.assertNotEqual(self.api.execute(container, "ls", "/marker")[0], 0)
        self.assertFalse(os.path.exists(marker))

    def test_modes_of_existing_folders_stay(self):
        container = self.api.create("true")

        def listing():
            data = self.api.get(f"/containers/{container}/archive", path="/tmp").body
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                return [(member.name, member.mode, member.uid) for member in tar if member.name == "tmp"]
        before = listing()
        self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("new", b"x")), path="/tmp")
        self.assertEqual(listing(), before)
        self.assertEqual(before[0][1], 0o1777)

    def test_volumes_are_seen_by_cp(self):
        folder = self.folder(f="in the bind")
        container = self.api.create("true", Binds=[folder + ":/b", "vol:/v"])
        self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("new", b"x")), path="/b")
        self.assertEqual(sorted(os.listdir(folder)), ["f", "new"])
        self.api.call("PUT", f"/containers/{container}/archive", tar_of(file_("new", b"y")), path="/v")
        self.assertEqual(self.api.output("cat", "/v/new", Binds=["vol:/v"]), "y")
        read_only = self.api.create("true", Binds=[folder + ":/b:ro"])
        answer = self.api.call("PUT", f"/containers/{read_only}/archive", tar_of(file_("no", b"x")), path="/b")
        self.assertEqual(answer.status, 403, answer)


########################################################################
# 14. LXC
########################################################################

@needs_program("lxc-start")
class WithLxc:
    """Mixin that repeats the tests of a class with a daemon that runs its containers with LXC."""
    @classmethod
    def setUpClass(cls):
        if cls.flags or cls.own:
            cls.flags = tuple(cls.flags) + ("--exec-driver", "lxc")
            super().setUpClass()
        else:
            if "lxc" not in SHARED:
                SHARED["lxc"] = Daemon("lxc", "--exec-driver", "lxc").start()
            cls.daemon = SHARED["lxc"]


class LxcConfigTest(unittest.TestCase):
    """The text of config.lxc and of the seccomp policy, for LXC 3 to 6."""
    WHO = {"uid": 7, "gid": 8, "groups": [8], "env": ["A=b", "C= d ", "E=\"f\""], "cwd": "/w"}

    def spec(self, version, **changes):
        spec = {"id": "1" * 64, "mount_point": "/r/mnt", "hostname": "h", "domainname": "", "mounts": [],
                "no_new_privileges": False, "capabilities": ["CHOWN", "NET_RAW", "CHECKPOINT_RESTORE"],
                "rlimits": {"nofile": [10, 20], "core": [0, -1]},
                "namespaces": dict.fromkeys(("pid", "uts", "ipc", "net", "cgroup"), "private"), "lxc": {
                    "version": version, "folder": "/r/c/1", "run": "/r/run/1's", "seccomp": "", "interfaces": [],
                    "monitor": 99}}
        spec["lxc"].update(changes.pop("lxc", {}))
        spec["namespaces"].update(changes.pop("namespaces", {}))
        return dict(spec, **changes)

    def config(self, version=(5, 0, 2), who=(), **changes):
        """{key: [values]} of the config.lxc that pydock writes for a spec with these changes."""
        values = {}
        for line in pydock.lxc_config(self.spec(list(version), **changes), dict(self.WHO, **dict(who))).splitlines():
            if not line.startswith("#"):
                key, _, value = line.partition(" = ")
                values.setdefault(key, []).append(value)
        return values

    def test_whole(self):
        endpoint = {"bridge": "br0", "host_interface": "veth12", "interface": "eth0", "MacAddress": "02:42:0a:00:00:02",
                    "mtu": 1400, "IPAddress": "10.0.0.130", "IPPrefixLen": 25, "Gateway": "10.0.0.129"}
        second = dict(endpoint, interface="eth1", host_interface="veth13", IPAddress="10.1.255.2", IPPrefixLen=15,
                      mtu=None)
        mask = pydock.own_capabilities()
        capabilities = " ".join(text for text, number in (("chown", 0), ("net_raw", 13), ("40", 40))
                                if mask >> number & 1)
        config = self.config(lxc={"interfaces": [endpoint, second], "seccomp": "2\n"}, no_new_privileges=True)
        self.assertEqual(config, {
            "lxc.rootfs.path": ["dir:/r/mnt"], "lxc.rootfs.mount": ["/r/mnt"], "lxc.autodev": ["0"],
            "lxc.tty.max": ["0"], "lxc.mount.entry": ["proc proc proc nosuid,nodev,noexec 0 0"], "lxc.pty.max": ["0"],
            "lxc.console.path": ["none"], "lxc.apparmor.profile": ["unconfined"],
            "lxc.namespace.clone": ["mnt uts ipc net cgroup pid"], "lxc.uts.name": ["h"], "lxc.net.0.type": ["veth"],
            "lxc.net.0.link": ["br0"], "lxc.net.0.veth.pair": ["veth12"], "lxc.net.0.name": ["eth0"],
            "lxc.net.0.hwaddr": ["02:42:0a:00:00:02"], "lxc.net.0.mtu": ["1400"], "lxc.net.0.flags": ["up"],
            "lxc.net.0.ipv4.address": ["10.0.0.130/25 10.0.0.255"], "lxc.net.0.ipv4.gateway": ["10.0.0.129"],
            "lxc.net.1.type": ["veth"], "lxc.net.1.link": ["br0"], "lxc.net.1.veth.pair": ["veth13"],
            "lxc.net.1.name": ["eth1"], "lxc.net.1.hwaddr": ["02:42:0a:00:00:02"], "lxc.net.1.flags": ["up"],
            "lxc.net.1.ipv4.address": ["10.1.255.2/15 10.1.255.255"], "lxc.init.uid": ["7"], "lxc.init.gid": ["8"],
            "lxc.init.groups": ["8"], "lxc.cap.keep": [capabilities or "none"], "lxc.no_new_privs": ["1"],
            "lxc.prlimit.nofile": ["10:20"], "lxc.prlimit.core": ["0:unlimited"],
            "lxc.seccomp.profile": ["/r/c/1/seccomp.lxc"], "lxc.init.cwd": ["/w"],
            "lxc.environment": ["A=b", "\"C= d \"", "E=\"f\""],
            "lxc.hook.start-host": ["sh -c 'echo \"$LXC_PID\" >\"$0/ready\"; read -r answer <\"$0/go\"; "
                                    "test \"$answer\" = go' '/r/run/1'\"'\"'s'"]})

    def test_namespaces(self):
        config = self.config(namespaces={"net": 5, "uts": "host", "ipc": 6, "pid": 7})
        self.assertEqual(config["lxc.namespace.clone"], ["mnt cgroup"])
        self.assertEqual(config["lxc.namespace.share.pid"], ["/proc/99/fd/7"])
        self.assertFalse([key for key in config if key.startswith(("lxc.net", "lxc.uts"))])
        self.assertEqual(self.config()["lxc.net.0.type"], ["empty"])
        self.assertEqual(self.config(namespaces={"pid": "host"})["lxc.namespace.clone"], ["mnt uts ipc net cgroup"])

    def test_versions(self):
        for version, has_groups in (((3, 0, 4), False), ((4, 0, 2), False), ((4, 0, 12), True), ((5, 0, 2), True),
                                    ((6, 0, 1), True)):
            self.assertEqual("lxc.init.groups" in self.config(version), has_groups, version)
            if has_groups:
                self.assertEqual(self.config(version, who={"groups": [8, 9]})["lxc.init.groups"], ["8,9"])
            else:
                dotted = ".".join(map(str, version))
                with self.assertRaisesRegex(pydock.BadRequest, f"LXC {dotted}.*8, 9.*needs LXC 4.0.10"):
                    self.config(version, who={"groups": [8, 9]})
            rules, default = pydock.seccomp_rules(frozenset())
            word = "whitelist" if version < (4, 0, 4) else "allowlist"
            self.assertEqual(pydock.lxc_seccomp(rules, default, version).splitlines()[:3],
                             ["2", word + " errno 1", "[all]"])

    def test_values_of_several_lines(self):
        """A line break in a value would let an image add a key to config.lxc, such as a hook that root runs on the
        host."""
        for changes in ({"who": {"env": ["A=b\nlxc.hook.pre-start = /bin/evil"]}}, {"who": {"cwd": "/a\nb"}},
                        {"hostname": "a\nb"}):
            with self.assertRaisesRegex(pydock.BadRequest, "several lines"):
                self.config(**changes)
        text = pydock.lxc_config(self.spec([5, 0, 2], mounts=[{"type": "tmpfs", "target": "/a\nlxc.evil = 1"}]),
                                 self.WHO)
        self.assertFalse([line for line in text.splitlines() if line.startswith("lxc.evil")])

    def test_seccomp(self):
        lines = pydock.lxc_seccomp(*pydock.seccomp_rules(frozenset()), (5, 0, 2)).splitlines()
        self.assertTrue({"read allow", "clone3 errno 38", f"clone allow [0,0,SCMP_CMP_MASKED_EQ,{0x7E020000}]",
                         "personality allow [0,8,SCMP_CMP_EQ]", "socket allow [0,2,SCMP_CMP_EQ]"} <= set(lines))
        self.assertFalse({"mount allow", "socket allow", "socket allow [0,38,SCMP_CMP_EQ]",
                          "keyctl allow"} & set(lines))
        self.assertIn("mount allow", pydock.lxc_seccomp(*pydock.seccomp_rules(frozenset(["SYS_ADMIN"])),
                                                        (5, 0, 2)).splitlines())
        profile = {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5},
            {"names": ["chmod"], "action": "SCMP_ACT_TRAP"},
            {"names": ["kill"], "action": "SCMP_ACT_KILL", "args": [{"index": 1, "value": 9, "op": "SCMP_CMP_GE"}]}]}
        self.assertEqual(pydock.lxc_seccomp(*pydock.seccomp_rules(frozenset(), json.dumps(profile)),
                                            (5, 0, 2)).splitlines(), [
            "2", "allowlist allow", "[all]", "chmod trap", "kill kill [1,9,SCMP_CMP_GE]", "mkdir errno 5"])
        profile["syscalls"][0]["action"] = "SCMP_ACT_LOG"
        with self.assertRaisesRegex(pydock.BadRequest, "the lxc driver knows the seccomp actions"):
            pydock.lxc_seccomp(*pydock.seccomp_rules(frozenset(), json.dumps(profile)), (5, 0, 2))


@needs_root
class ExitStatusTest(unittest.TestCase):
    """The exit status of a process that is not our child. The kernel tells it in at least one of two ways: by the
    process connector (netlink) or by a pidfd."""

    def grandchild(self, code, tell):
        """Start a parent process whose child waits and then runs `code`, and call tell(the child's pid, function that
        lets the child end and waits for the parent)."""
        ours, theirs = socket.socketpair()
        script = (f"import os, sys\npid = os.fork()\nif not pid:\n sys.stdin.readline()\n {code}\n"
                  "print(pid, flush=True)\nos.waitpid(pid, 0)")
        with theirs:
            process = subprocess.Popen([sys.executable, "-c", script], stdin=theirs, stdout=subprocess.PIPE)
        with process, process.stdout, ours:
            tell(int(process.stdout.readline()), lambda: (ours.send(b"\n"), process.wait()))

    def statuses(self, method):
        results = []
        for code in ("os._exit(7)", "os.kill(os.getpid(), 9)", "os._exit(0)"):
            self.grandchild(code, lambda pid, end: results.append(method(pid, end)))
        return results

    def test_process_connector(self):
        def status(pid, end):
            events = pydock.ExitEvents(pid)
            end()
            return events.status(10)
        try:
            statuses = self.statuses(status)
        except ConnectionRefusedError:  # this kernel has no process connector
            self.assertTrue(pydock.pidfds_tell_status())
        else:
            self.assertEqual(statuses, [7 << 8, 9, 0])

    def test_an_event_of_another_process(self):
        """An event of another process may be queued before the socket's filter is set; pydock once took it for the
        container's exit code."""
        events = pydock.ExitEvents.__new__(pydock.ExitEvents)
        theirs, events.socket = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        events.pid = 77
        with theirs:
            for pid, status in ((76, 0), (77, 7 << 8)):
                theirs.send(struct.pack("=36xIIQIIII", 0x80000000, 0, 0, pid, pid, status, 17))
            self.assertEqual(events.status(10), 7 << 8)

    def test_pidfd(self):
        def status(pid, end):
            with pydock.closing_fd(pydock.pidfd_open(pid)) as fd:
                self.assertIsNone(pydock.pidfd_status(fd))
                end()
                return pydock.pidfd_status(fd)
        self.assertEqual(self.statuses(status), [7 << 8, 9, 0] if pydock.pidfds_tell_status() else [None] * 3)


@needs_root
class LxcMissingTest(DaemonCase):
    def test_without_lxc_start(self):
        path = shutil.which("lxc-start", path=pydock.DEFAULT_PATH)
        if path:
            empty = write(os.path.join(SCRATCH, "not-executable"), "", 0o644)
            pydock.mount(empty, path, None, pydock.MS_BIND)
            self.addCleanup(os.unlink, empty)
            self.addCleanup(pydock.umount, path)
        answer = self.api.post("/containers/create",
                               {"Image": "base", "Cmd": ["true"], "HostConfig": {"Runtime": "lxc"}})
        self.refused(500, answer, "install the package lxc")
        result = run_program(self.daemon.command("--exec-driver", "lxc", "-g",
                                                 os.path.join(self.daemon.folder, "other")))
        self.assertEqual(result.code, 1)
        self.assertIn("install the package lxc", result.err)
        self.assertNotIn("Traceback", result.err)

    def test_unknown_driver(self):
        result = run_program(self.daemon.command("--exec-driver", "nosuch"))
        self.assertEqual(result.code, 1)
        self.assertIn("--exec-driver nosuch: use native or lxc", result.err)
        self.refused(400, self.api.post("/containers/create", {"Image": "base", "HostConfig": {"Runtime": "nosuch"}}),
                     "unknown or invalid runtime name: nosuch")


@needs_program("lxc-start")
class LxcTest(WithLxc, DaemonCase):
    """Behaviour that only the lxc driver has."""

    def helper(self, container):
        """The pid of a container's lxc-start."""
        ours = descendants(self.daemon.monitor(container))
        return next(pid for pid, title in ours.items() if title.startswith("lxc-start"))

    def test_what_the_host_sees(self):
        container = self.api.run("sleep", "600", name="seen", OpenStdin=True)
        folder = os.path.join(self.daemon.root, "containers", container)
        ours = descendants(self.daemon.monitor(container))
        self.assertEqual(sorted(ours.values()), [
            f"lxc-start -F -n {container} -P {os.path.dirname(folder)} -f {folder}/config.lxc "
            f"-q -o {folder}/lxc.log -l WARN -- sleep 600", "sleep 600"])
        config = read(os.path.join(folder, "config.lxc"))
        endpoint = self.api.inspect(container)["NetworkSettings"]
        self.assertIn(f"lxc.net.0.hwaddr = {endpoint['MacAddress']}\n", config)
        self.assertIn(f"lxc.net.0.ipv4.address = {endpoint['IPAddress']}/24 ", config)
        address = self.api.execute(container, "ip", "addr", "show", "eth0")[1]
        self.assertIn(f"inet {endpoint['IPAddress']}/24 brd {self.daemon.subnet}.255", address)
        self.assertNotIn("inet6", address)
        self.assertEqual(self.api.inspect(container)["HostConfig"]["Runtime"], "lxc")
        helper = self.helper(container)
        self.assertNotIn(str(helper), [row[1] for row in self.api.ok("GET", "/containers/seen/top")["Processes"]])
        for controller, path in pydock.cgroups(CGROUP_PARENT).find(container).folders.items():
            self.assertNotIn(str(helper), read(path + "/cgroup.procs").split(), controller)
        self.assertFalse(glob.glob("/sys/fs/cgroup/*/lxc.*") + glob.glob("/sys/fs/cgroup/lxc.*"))
        self.assertEqual([line for line in read("/proc/self/mountinfo").splitlines() if container in line], [])

    def test_both_drivers_in_one_daemon(self):
        old = Api(self.daemon.socket)
        old.prefix = "/v1.19"
        info = self.api.ok("GET", "/info")
        self.assertEqual((info["DefaultRuntime"], sorted(info["Runtimes"])), ("lxc", ["lxc", "native"]))
        for runtime, expected in (("", "lxc"), ("lxc", "lxc"), ("native", "native"), ("runc", "native")):
            container = self.api.create("sh", "-c", "echo [$container]", Runtime=runtime)
            self.api.start(container)
            self.assertEqual(self.api.wait(container), 0)
            self.assertEqual(self.api.logs(container)[8:], b"[lxc]\n" if expected == "lxc" else b"[]\n")
            self.assertEqual(self.api.inspect(container)["HostConfig"]["Runtime"], expected)
            self.assertEqual(old.inspect(container)["ExecDriver"], expected)

    def test_the_container_outlives_the_daemon(self):
        container = self.api.run("sh", "-c", "read line; echo got $line; exit 9", OpenStdin=True)
        pid = self.api.inspect(container)["State"]["Pid"]
        self.daemon.restart()
        self.assertEqual(self.api.inspect(container)["State"]["Pid"], pid)
        stream = self.attach(container, stdin=1, stdout=1, stream=1)
        stream.send(b"that\n")
        self.assertEqual(self.api.wait(container), 9)
        self.assertEqual(self.api.logs(container)[8:], b"got that\n")

    def test_an_end_of_lxc_start(self):
        """If lxc-start is killed, its container is killed with it: the exit code is 137, and the container can be
        started again."""
        container = self.api.run("sleep", "600")
        helper = self.helper(container)
        os.kill(helper, signal.SIGKILL)
        self.assertEqual(self.api.wait(container), 137)
        self.assertFalse(is_alive(helper))
        self.api.start(container)
        self.assertTrue(self.api.inspect(container)["State"]["Running"])

    def test_a_failure_of_lxc(self):
        """The error message has the reason that LXC logs first."""
        self.api.ok("POST", "/containers/create", {"Image": "base", "Cmd": ["true"]}, name="doomed")
        name = self.daemon.bridge
        with pydock.Netlink() as netlink:
            netlink.set_link(name, name="pdkt-away")
        try:
            self.refused(500, self.api.post("/containers/doomed/start"), "lxc-start failed: ")
        finally:
            with pydock.Netlink() as netlink:
                netlink.set_link("pdkt-away", up=False)
                netlink.set_link("pdkt-away", name=name)
                netlink.set_link(name, up=True)
        self.assertEqual(self.api.inspect("doomed")["State"]["Running"], False)
        self.api.start("doomed")
        self.assertEqual(self.api.wait("doomed"), 0)

    def test_what_lxc_cannot_do(self):
        for part, config in (("of several lines: A;", {"Env": ["A=b\nc"]}),
                             ("LXC enters the working directory", {"WorkingDir": "/dev"})):
            container = self.api.create("true", **config)
            self.refused(400, self.api.post(f"/containers/{container}/start"), part)

    def test_nothing_is_made_in_the_root(self):
        container = self.api.run("sh", "-c", "grep -c ' /dev ' /proc/mounts")
        self.assertEqual(self.api.wait(container), 0)
        self.assertEqual(self.api.logs(container)[8:], b"1\n")
        self.assertIn(self.api.ok("GET", f"/containers/{container}/changes"), (None, []))

    def test_no_pid_namespace_with_a_tracer(self):
        self.api.run("sleep", "600", name="tracer", CapAdd=["SYS_PTRACE"])
        self.api.run("sleep", "600", name="plain")
        container = self.api.create("true", PidMode="container:tracer")
        self.refused(400, self.api.post(f"/containers/{container}/start"), "use the native driver")
        container = self.api.run("sh", "-c", "ps; echo $$", PidMode="container:plain")
        self.assertEqual(self.api.wait(container), 0)
        output = self.api.logs(container)
        self.assertIn(b"sleep 600", output)
        self.assertNotIn(b"lxc-start", output)

    def test_the_command_is_tried_before(self):
        container = self.api.create("nosuch")
        self.refused(400, self.api.post(f"/containers/{container}/start"), "executable file not found in $PATH")
        self.assertEqual(self.api.inspect(container)["State"]["ExitCode"], 127)
        self.assertFalse(os.path.exists(os.path.join(self.daemon.root, "containers", container, "config.lxc")))

    def test_a_program_that_lxc_is_made_to_load(self):
        """The environment of an image is passed to the container's command, and not to lxc-start or its hook."""
        container = self.api.run("sleep", "600", Env=["LD_PRELOAD=/evil.so", "PATH=/bin:/evil"])
        helper = self.helper(container)
        self.assertNotIn("evil", read(f"/proc/{helper}/environ"))

    def test_propagating_volumes(self):
        source = self.folder()
        pydock.mount(source, source, None, pydock.MS_BIND)
        self.addCleanup(pydock.umount, source)
        pydock.mount(None, source, None, MS_SHARED)
        os.mkdir(source + "/sub")
        container = self.api.run("sleep", "600", Binds=[source + ":/v:rshared"], WorkingDir="/v", CapAdd=["SYS_ADMIN"])
        pydock.mount("tmpfs", source + "/sub", "tmpfs")
        write(source + "/sub/here", "yes")
        try:
            self.assertEqual(self.api.execute(container, "cat", "/v/sub/here")[1], "yes")
        finally:
            pydock.umount(source + "/sub")
        self.api.execute(container, "mount", "-t", "tmpfs", "t", "/v/sub")
        self.assertTrue(os.path.ismount(source + "/sub"))
        pydock.umount(source + "/sub")


class SandboxWithLxcTest(WithLxc, SandboxTest):
    def test_environment_is_built_from_nothing(self):
        self.assertIn("container=lxc", self.api.output("env").splitlines())  # LXC adds this variable
        lines = self.api.output("cat", "/proc/1/environ", Env=["A=  b ", "Q=\"x\"", "'a'='"]).rstrip("\0").split("\0")
        self.assertEqual(sorted(line.partition("=")[0] for line in lines),
                         ["'a'", "A", "HOME", "HOSTNAME", "PATH", "Q", "container"])
        self.assertTrue({"A=  b ", "Q=\"x\"", "'a'='"} <= set(lines), lines)

    # The container could see the process of LXC itself before that drops its capabilities, so the lxc driver refuses
    # such a container: LxcTest.test_no_pid_namespace_with_a_tracer.
    test_a_container_that_joins_the_pids_of_another_is_seen_when_it_has_nothing_more = None

    def test_sockets_of_ours_are_files_of_roots(self):
        self.api.run("sleep", "600")
        names = [line.split()[-1] for line in read("/proc/net/unix").splitlines()]
        ours = [name for name in names if name.startswith("@") and re.search("pydock|monitor|[0-9a-f]{12}", name)]
        # LXC itself makes one abstract socket for each container
        self.assertEqual([name for name in ours if not re.fullmatch("@lxc/[0-9a-f]+/command", name)], [])


class InheritableCapabilitiesWithLxcTest(WithLxc, InheritableCapabilitiesTest):
    pass


class CopyInsideWithLxcTest(WithLxc, CopyInsideTest):
    pass


class ConnectWithLxcTest(WithLxc, ConnectTest):
    pass


########################################################################
# 15. Monitor
########################################################################

class StreamTest(DaemonCase):
    """Attach, wait and logs through the API."""

    def test_attach_frames(self):
        container = self.api.create("sh", "-c", "echo out; echo err >&2; cat", OpenStdin=True, StdinOnce=True)
        stream = self.attach(container)
        self.assertIn("101 UPGRADED", stream.head)
        self.assertIn("application/vnd.docker.multiplexed-stream", stream.head)
        self.api.start(container)
        stream.send(b"in\n")
        stream.end()
        data = stream.read_all()
        self.assertEqual((output_of(data, 1), output_of(data, 2)), (b"out\nin\n", b"err\n"))
        old = self.api.hijack(f"/containers/{container}/attach", upgrade=False, stdout=1, logs=1)
        self.addCleanup(old.close)
        self.assertTrue(old.head.startswith("HTTP/1.1 200 OK"), old.head)
        self.assertEqual(output_of(old.read_all()), b"out\nin\n")

    def test_input_that_came_with_the_request(self):
        container = self.api.create("cat", OpenStdin=True, StdinOnce=True)
        self.api.start(container)
        sock = socket.socket(socket.AF_UNIX)
        self.addCleanup(sock.close)
        sock.settimeout(15)
        sock.connect(self.daemon.socket)
        sock.sendall(b"POST /v1.47/containers/%s/attach?stream=1&stdin=1&stdout=1 HTTP/1.1\r\nHost: d\r\n"
                     b"Connection: Upgrade\r\nUpgrade: tcp\r\n\r\nearly" % container.encode())
        sock.shutdown(socket.SHUT_WR)
        stream = Hijacked(sock, "", b"")
        stream.read_until(b"\r\n\r\n")
        self.assertEqual(output_of(stream.read_all()), b"early")

    def test_stdin_stays_open_without_stdin_once(self):
        container = self.api.run("sh", "-c", "read a; echo $a; read b; echo $a$b", OpenStdin=True)
        for word, output in (("one", "one\n"), ("two", "onetwo\n")):
            stream = self.attach(container, stdout=0, stderr=0)
            stream.send(word.encode() + b"\n")
            stream.end()
            self.wait_for_output(container, output)
        self.assertEqual(self.api.wait(container), 0)
        self.assertEqual(output_of(self.api.logs(container)), b"one\nonetwo\n")

    def test_many_watch_one_container(self):
        container = self.api.create("sh", "-c", "read x; seq 1000", OpenStdin=True, StdinOnce=True)
        streams = [self.attach(container, stdin=0) for _ in range(5)]
        self.api.start(container)
        writer = self.attach(container, stdout=0, stderr=0)
        writer.send(b"\n")
        expected = "".join(f"{n}\n" for n in range(1, 1001)).encode()
        for stream in streams:
            self.assertEqual(output_of(stream.read_all()), expected)

    def test_a_reader_that_does_not_read_does_not_stop_the_container(self):
        container = self.api.create("sh", "-c", "head -c 30000000 /dev/zero; echo done >/done; sleep 600",
                                    LogConfig={"Type": "none"})
        stream = self.attach(container, stdin=0)
        self.api.start(container)
        eventually(lambda: self.api.execute(container, "cat", "/done")[0] == 0, 30)
        monitor = self.daemon.monitor(container)
        kib = int(re.search(r"VmRSS:\s+(\d+)", read(f"/proc/{monitor}/status")).group(1))
        self.assertLess(kib, 60 << 10)
        self.api.ok("POST", f"/containers/{container}/kill")
        self.assertEqual(len(output_of(stream.read_all())), 30000000)

    def waiting(self, container, condition):
        """Begin a wait and return its stream once the response's head has come: from then on the daemon watches the
        container."""
        stream = self.api.hijack(f"/containers/{container}/wait", upgrade=False, condition=condition)
        self.addCleanup(stream.close)
        return stream

    @staticmethod
    def exit_code(stream):
        return int(re.search(rb'"StatusCode": ?(\d+)', stream.read_until(b"}")).group(1))

    def test_wait_conditions(self):
        container = self.api.create("sh", "-c", "exit 9")
        self.assertEqual(self.api.wait(container, condition="not-running"), 0)
        next_exit, removed = self.waiting(container, "next-exit"), self.waiting(container, "removed")
        self.assertTrue(self.daemon.monitor(container), "no monitor at the first wait")
        self.api.start(container)
        self.assertEqual(self.exit_code(next_exit), 9)
        self.assertEqual(self.api.wait(container), 9)
        self.assertEqual(select.select([removed.sock], [], [], 0)[0], [], "answered before the removal")
        self.api.ok("DELETE", "/containers/" + container)
        self.assertEqual(self.exit_code(removed), 9)
        running = self.api.run("sleep", "600")
        killed = self.waiting(running, "removed")
        self.api.ok("DELETE", "/containers/" + running, force=1)
        self.assertEqual(self.exit_code(killed), 137)
        self.refused(404, self.api.post("/containers/nosuch/wait"), "No such container")

    def test_a_monitor_that_nobody_needs_ends(self):
        container = self.api.create("true")
        stream = self.api.attach(container)
        self.assertTrue(self.daemon.monitor(container))
        stream.close()
        eventually(lambda: not self.daemon.monitor(container),
                   message="the monitor of a container that is not started stays")
        self.api.start(container)
        self.assertEqual(self.api.wait(container), 0)

    def test_log_rotation(self):
        container = self.api.run("sh", "-c", "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done",
                                 LogConfig={"Type": "json-file", "Config": {"max-size": "20k", "max-file": "3"}})
        self.api.wait(container)
        folder = os.path.join(self.daemon.root, "containers", container)
        files = sorted(name for name in os.listdir(folder) if "-json.log" in name)
        self.assertEqual(files, [container + "-json.log" + end for end in ("", ".1", ".2")])
        self.assertTrue(all(os.path.getsize(os.path.join(folder, name)) <= 21000 for name in files))
        lines = output_of(self.api.logs(container)).decode().splitlines()
        self.assertEqual(lines[-1], "line 2999")
        numbers = [int(line.split()[1]) for line in lines]
        self.assertEqual(numbers, list(range(numbers[0], 3000)))
        self.assertEqual(output_of(self.api.logs(container, tail=500)).count(b"\n"), 500)

    def test_log_options(self):
        silent = self.api.run("echo", "x", LogConfig={"Type": "none"})
        self.api.wait(silent)
        self.assertIn(b"does not support reading", self.api.logs(silent))
        for config, sentence in (({"Type": "syslog"}, 'plugin "syslog" not found'),
                                 ({"Type": "json-file", "Config": {"max-size": "x"}}, "invalid size: 'x'"),
                                 ({"Type": "json-file", "Config": {"path": "/etc/x"}}, "unknown log opt 'path'")):
            answer = self.api.post("/containers/create", {"Image": "base", "HostConfig": {"LogConfig": config}})
            self.refused(400, answer, sentence)

    def test_long_lines_and_odd_bytes(self):
        container = self.api.run("sh", "-c", r"head -c 40000 /dev/zero | tr '\0' a; printf '\377\n\000\033[1m'")
        self.api.wait(container)
        text = output_of(self.api.logs(container))
        self.assertTrue(text.startswith(b"a" * 40000))
        self.assertTrue(text.endswith(b"\n\0\x1b[1m"), text[-20:])
        path = os.path.join(self.daemon.root, "containers", container, container + "-json.log")
        with open(path, "rb") as log:
            self.assertTrue(all(len(line) < 17000 for line in log))

    def test_a_tty_has_one_raw_stream(self):
        container = self.api.run("sh", "-c", "echo out; echo err >&2", Tty=True)
        self.api.wait(container)
        self.assertEqual(self.api.logs(container), b"out\r\nerr\r\n")

    def test_resize_by_the_api(self):
        container = self.api.run("sh", Tty=True, OpenStdin=True)
        self.assertEqual(self.api.post(f"/containers/{container}/resize", h=33, w=44).status, 200)
        stream = self.attach(container)
        stream.send(b"stty size\n")
        stream.read_until(b"33 44\r\n")
        for query in ({"h": "x", "w": 1}, {"h": -1, "w": 1}, {"h": 1 << 40, "w": 1}):
            self.assertEqual(self.api.post(f"/containers/{container}/resize", **query).status, 400, query)

    def test_follow_over_a_rotation(self):
        container = self.api.run("sh", "-c",
                                 "while ! [ -e /go ]; do sleep 0.02; done; i=0; "
                                 "while [ $i -lt 1000 ]; do echo line $i; i=$((i+1)); "
                                 "[ $((i % 100)) = 0 ] && sleep 0.02; done",
                                 LogConfig={"Type": "json-file", "Config": {"max-size": "20k", "max-file": "10"}})
        with self.api.stream("GET", f"/containers/{container}/logs", follow=1, stdout=1) as response:
            self.api.execute(container, "touch", "/go")
            lines = output_of(response.read()).decode().splitlines()
        self.assertEqual(lines, [f"line {n}" for n in range(1000)])


class MonitorLinkTest(unittest.TestCase):
    def test_a_start_comes_behind_the_attach_that_was_answered(self):
        """A client starts the container as soon as it has the head of the response to its attach. The monitor must get
        the attach before the start, or output that the container prints at once would be lost."""
        ours, theirs = socket.socketpair()
        self.addCleanup(ours.close)
        self.addCleanup(theirs.close)
        link, requests = pydock.MonitorLink(ours, ""), []

        def monitor():
            for _ in range(2):
                message, fds = pydock.receive_message(theirs)
                requests.append((message["op"], len(fds), message.get("pending")))
                for fd in fds:
                    os.close(fd)
                pydock.send_message(theirs, {})
        starter = threading.Thread(target=link.request, args=("start",))

        def take():
            starter.start()
            time.sleep(0.05)
            return ours.fileno(), b"typed"
        threads = [threading.Thread(target=monitor), threading.Thread(target=link.hand_over, args=("attach", take))]
        for thread in threads:
            thread.start()
        for thread in threads + [starter]:
            thread.join(10)
        self.assertEqual(requests, [("attach", 1, b"typed".hex()), ("start", 0, None)])


@needs_root
class LostExecTest(unittest.TestCase):
    """The daemon dies after an exec's client was handed to the exec's monitor, and before the process was started."""

    def setUp(self):
        self.folder = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(shutil.rmtree, self.folder)
        self.spawner = pydock.Spawner(CGROUP_PARENT)
        self.addCleanup(self.spawner.socket.close)
        self.client, self.theirs = socket.socketpair()
        self.addCleanup(self.client.close)
        self.client.settimeout(15)

    def attached(self, run, note):
        """A link to the monitor of an exec whose client is attached and whose process is not started."""
        link = pydock.MonitorLink.start(self.spawner, {
            "id": os.path.basename(run), "kind": "exec", "folder": self.folder, "run": run, "log": None,
            "stdin_once": True, "note": note})
        with self.theirs:
            link.hand_over("attach", lambda: (self.theirs.fileno(), b""), stdout=True, framed=False)
        return link

    def received(self):
        return b"".join(iter(lambda: self.client.recv(65536), b"")).decode()

    def test_its_client_is_told(self):
        link = self.attached(os.path.join(self.folder, "run"), None)
        link.close()
        self.assertEqual(self.received(), pydock.EXEC_NOT_STARTED + "\r\n")
        eventually(lambda: not os.path.exists(link.run))

    def test_its_client_is_told_by_the_next_daemon(self):
        daemon = Daemon("lost", bridge=False).start()
        self.addCleanup(daemon.cleanup)
        container = daemon.api.run("sleep", "600", NetworkMode="none")
        daemon.kill9()
        config = dict(pydock.EXEC_CONFIG, Cmd=["true"])
        # A link that is still open here stands for the last daemon's, whose end the monitor has not noticed yet.
        link = self.attached(os.path.join(daemon.root, "run", "f" * 12), {"container": container, "config": config})
        self.addCleanup(link.close)
        daemon.start()
        self.assertEqual(self.received(), pydock.EXEC_NOT_STARTED + "\r\n")


class StreamWithLxcTest(WithLxc, StreamTest):
    pass


########################################################################
# 16. Volumes
########################################################################

class VolumeTest(DaemonCase):
    def names(self):
        return [volume["Name"] for volume in self.api.ok("GET", "/volumes")["Volumes"]]

    def test_create_while_a_volume_of_that_name_is_removed(self):
        def create():
            for _ in range(60):
                created.append(self.api.post("/volumes/create", {"Name": "vol"}).status)

        created, removed = [], []
        mountpoint = self.api.ok("POST", "/volumes/create", {"Name": "vol"})["Mountpoint"]
        thread = threading.Thread(target=create)
        thread.start()
        while thread.is_alive():
            for number in range(100):
                with contextlib.suppress(FileNotFoundError), open(f"{mountpoint}/{number}", "w"):
                    pass
            removed.append(self.api.delete("/volumes/vol").status)
        thread.join()
        self.assertEqual((set(created), set(removed) - {404}), ({201}, {204}))
        self.api.ok("POST", "/volumes/create", {"Name": "vol"})
        self.assertTrue(os.path.isdir(mountpoint))
        self.api.ok("DELETE", "/volumes/vol")
        self.assertEqual(os.listdir(self.daemon.root + "/volumes"), [])

    def test_a_removal_that_fails(self):
        """A mount in a volume cannot be removed. The volume stays in the list and can be removed later."""
        mountpoint = self.api.ok("POST", "/volumes/create", {"Name": "vol", "Labels": {"a": "b"}})["Mountpoint"]
        os.mkdir(mountpoint + "/disk")
        pydock.mount("tmpfs", mountpoint + "/disk", "tmpfs")
        try:
            self.refused(500, self.api.delete("/volumes/vol"), "disk")
        finally:
            pydock.umount(mountpoint + "/disk")
        self.assertEqual(self.api.ok("GET", "/volumes/vol")["Labels"], {"a": "b"})
        self.assertTrue(os.path.isdir(mountpoint))
        self.daemon.restart()
        self.assertEqual(self.names(), ["vol"])
        self.api.ok("DELETE", "/volumes/vol")
        self.assertEqual(os.listdir(self.daemon.root + "/volumes"), [])

    def test_what_an_earlier_daemon_left(self):
        folder = self.daemon.root + "/volumes"
        for name in (".unfinished-1/_data/x", ".unfinished-1/volume.json", "old/_data/x"):
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
            write(f"{folder}/{name}", "{}")
        self.daemon.restart()
        self.assertEqual((self.names(), os.listdir(folder)), ([], []))


class FullDiskTest(unittest.TestCase):
    """Requests to a daemon whose data root is on a full disk: what ends with an error has changed nothing."""

    def test_volumes_and_networks(self):
        disk = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(os.rmdir, disk)
        pydock.mount("tmpfs", disk, "tmpfs", 0, "size=96m")
        self.addCleanup(pydock.umount, disk)
        daemon = Daemon("full-disk", root=disk + "/root").start()
        self.addCleanup(daemon.cleanup)
        api, ballast = daemon.api, disk + "/ballast"
        self.addCleanup(lambda: os.path.exists(ballast) and os.unlink(ballast))
        api.ok("POST", "/volumes/create", {"Name": "old"})
        api.ok("POST", "/networks/create", {"Name": "old", "IPAM": {"Config": [{"Subnet": "10.211.1.0/24"}]}})

        def state():
            return ([volume["Name"] for volume in api.ok("GET", "/volumes")["Volumes"]],
                    sorted(network["Name"] for network in api.ok("GET", "/networks")),
                    sorted(link["name"] for link in links() if link["kind"] == "bridge"),
                    os.listdir(daemon.root + "/volumes"), read(daemon.root + "/networks.json"))
        before = state()
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        for answer in (api.post("/volumes/create", {"Name": "new"}),
                       api.post("/networks/create", {"Name": "new", "IPAM": {"Config": [{"Subnet": "10.211.2.0/24"}]}}),
                       api.delete("/networks/old")):
            self.assertEqual(answer.status, 500, answer)
            self.assertIn("No space left on device", answer.message)
        self.assertEqual(state(), before)
        os.unlink(ballast)
        daemon.restart()
        self.assertEqual(state()[:4], before[:4])


########################################################################
# 17. Containers
########################################################################

class InterfaceCountersTest(unittest.TestCase):
    @in_new_network
    def test_the_names_of_interfaces_are_those_of_somebody_else(self):
        """A container with CAP_NET_ADMIN names its interfaces as it likes."""
        with pydock.Netlink() as netlink:
            netlink.add_bridge("a\u2028b\x85")
        self.assertEqual(list(pydock.interface_counters(os.getpid())), ["a\u2028b\x85"])


class RunCommand(Commands):
    """The command `run`: its streams, its exit codes and the container's name."""

    def test_output_and_exit_code(self):
        result = self.cli("run", "--rm", "base", "echo", "Hello World")
        self.assertEqual((result.out, result.err), ("Hello World\n", ""))
        result = self.cli("run", "--rm", "base", "sh", "-c", "echo out; echo err >&2; exit 3", code=3)
        self.assertEqual((result.out, result.err), ("out\n", "err\n"))
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])

    def test_exit_codes_of_what_cannot_be_run(self):
        for command, code in ((["/no/such"], 127), (["nosuch"], 127), (["/etc/passwd"], 126), (["/etc"], 126)):
            self.cli("run", "--rm", "base", *command, code=code)
        for options, code in (([], 125), (["--nosuchflag"], 125)):
            self.cli("run", *options, "nosuchimage" if not options else "base", "true", code=code)
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])

    def test_exit_codes_of_signals(self):
        for name, number in (("KILL", 9), ("TERM", 15), ("SEGV", 11)):
            self.cli("run", "--rm", "--pid", "host", "base", "sh", "-c", f"kill -{name} $$", code=128 + number)
        container = self.api.run("sleep", "600", name="ss")
        self.cli("kill", "ss")
        self.assertEqual(self.api.wait(container), 137)
        self.assertEqual(self.api.state(container)["Status"], "exited")

    def test_a_working_directory_as_deep_as_a_path_can_be(self):
        folder = "/a" * 1900
        self.assertEqual(self.cli("run", "--rm", "-w", folder, "base", "pwd").out, folder + "\n")

    def test_stdin_is_passed_and_its_end(self):
        result = self.cli("run", "--rm", "-i", "base", "sh", "-c", "cat; echo end", input="one\ntwo\n")
        self.assertEqual(result.out, "one\ntwo\nend\n")
        result = self.cli("run", "--rm", "base", "cat", input="not passed without -i")
        self.assertEqual(result.out, "")

    def test_a_mebibyte_of_any_bytes_goes_through_and_back(self):
        data = random.Random(1).getrandbits(8 << 20).to_bytes(1 << 20, "big")
        self.assertEqual(self.cli("run", "--rm", "-i", "base", "cat", input=data).raw, data)

    def test_detached(self):
        result = self.cli("run", "-d", "--name", "dd", "base", "sh", "-c", "echo started; exec sleep 600")
        ident = result.out.strip()
        self.assertRegex(ident, "^[0-9a-f]{64}$")
        self.assertTrue(self.api.state("dd")["Running"])
        self.wait_for_output("dd", "started")
        self.assertEqual(self.cli("logs", ident[:12]).out, "started\n")
        self.assertEqual(self.cli("rm", "-f", "dd").out, "dd\n")

    def test_a_name_can_be_used_again_at_once(self):
        for number in range(3):
            self.assertEqual(self.cli("run", "--rm", "--name", "again", "base", "echo", str(number)).out, f"{number}\n")

    def test_a_name_in_use(self):
        ident = self.api.create("true", name="taken")
        for command in ("create", "run"):
            result = self.cli(command, "--name", "taken", "base", "true", code=125 if command == "run" else 1)
            self.assertIn(f'The container name "/taken" is already in use by container "{ident}"', result.err)

    def test_attach_before_start_loses_nothing(self):
        for _ in range(5):
            self.assertEqual(self.cli("run", "--rm", "base", "echo", "-n", "x" * 100).out, "x" * 100)

    def test_cidfile(self):
        path = os.path.join(self.folder(), "cid")
        result = self.cli("run", "-d", "--cidfile", path, "base", "true")
        self.assertEqual(read(path), result.out.strip())
        result = self.cli("run", "--cidfile", path, "base", "true", code=125)
        self.assertIn(path, result.err)

    def test_signals_are_passed_on(self):
        script = "trap 'echo got; exit 7' TERM; echo ready; while :; do sleep 0.05; done"
        process = subprocess.Popen(self.cli_argv("run", "--rm", "--name", "ss", "base", "sh", "-c", script),
                                   stdout=subprocess.PIPE, env=ENVIRONMENT)
        with process.stdout:
            self.assertEqual(process.stdout.readline(), b"ready\n")
            process.terminate()
            self.assertEqual(process.stdout.read(), b"got\n")
            self.assertEqual(process.wait(), 7)


class RunTest(RunCommand, DaemonCase):
    program = "pydock"


class RunByDockerTest(RunCommand, DaemonCase):
    program = "docker"


class OptionCommand(Commands):
    """The options of `run`: each test looks at an option's effect from inside the container."""

    def see(self, *words, code=0):
        """The output of `run --rm` with these words."""
        return self.cli("run", "--rm", *words, code=code).out

    def test_environment(self):
        path = write(os.path.join(self.folder(), "env"), "# comment\nFROM_FILE=1 2\nHOME_TOO\n")
        text = self.see("-e", "A=b c", "--env", "TERM", "--env-file", path, "-e", "PATH=/bin:/x", "base", "env")
        lines = text.splitlines()
        for line in ("A=b c", "FROM_FILE=1 2", "PATH=/bin:/x", "TERM=xterm", "HOME=/root"):
            self.assertIn(line, lines)
        self.assertEqual(sum(line.startswith("PATH=") for line in lines), 1)

    def test_working_directory_and_user(self):
        self.assertEqual(self.see("-w", "/made/for/it", "base", "pwd"), "/made/for/it\n")
        self.assertEqual(self.see("-u", "1234:567", "base", "sh", "-c", "id -u; id -g"), "1234\n567\n")
        self.assertEqual(self.see("-u", "root", "base", "id", "-u"), "0\n")
        self.cli("run", "--rm", "-u", "nosuchuser", "base", "true", code=(125, 126))

    def test_host_name(self):
        self.assertEqual(self.see("-h", "box", "base", "hostname"), "box\n")
        self.assertIn("\tbox\n", self.see("--hostname", "box", "base", "cat", "/etc/hosts"))
        name = self.see("base", "hostname").strip()
        self.assertRegex(name, "^[0-9a-f]{12}$")

    def test_binds_and_volumes(self):
        folder = self.folder(f="content")
        self.assertEqual(self.see("-v", folder + ":/mnt", "base", "sh", "-c", "cat /mnt/f; echo w >/mnt/g"), "content")
        self.assertEqual(read(folder + "/g"), "w\n")
        self.see("-v", folder + ":/mnt:ro", "base", "sh", "-c", "echo w >/mnt/h", code=(1, 2))
        self.assertFalse(os.path.exists(folder + "/h"))
        self.see("-v", "named:/v", "base", "sh", "-c", "echo kept >/v/f")
        self.assertEqual(self.see("-v", "named:/v", "base", "cat", "/v/f"), "kept\n")
        self.cli("run", "--name", "aa", "-v", "/anonymous", "base", "sh", "-c", "echo here >/anonymous/f")
        self.assertEqual(self.see("--volumes-from", "aa", "base", "cat", "/anonymous/f"), "here\n")
        self.see("--volumes-from", "aa:ro", "base", "touch", "/anonymous/g", code=1)

    def test_tmpfs_and_read_only(self):
        text = self.see("--tmpfs", "/t:size=1m", "--read-only", "base", "sh", "-c",
                        "touch /t/f && echo t; touch /f 2>/dev/null || echo refused; grep ' /t ' /proc/mounts")
        self.assertIn("t\nrefused\ntmpfs /t tmpfs", text)
        self.assertIn("size=1024k", text)

    def test_entrypoint(self):
        self.assertEqual(self.see("--entrypoint", "echo", "base", "a", "b"), "a b\n")

    def test_labels_hosts_and_dns(self):
        self.cli("create", "--name", "ll", "--label", "one=1", "-l", "two", "--add-host", "other:10.9.8.7", "--dns",
                 "10.9.8.6", "base", "cat", "/etc/hosts", "/etc/resolv.conf")
        self.assertEqual(self.api.inspect("ll")["Config"]["Labels"], {"one": "1", "two": ""})
        result = self.cli("start", "-a", "ll")
        self.assertIn("10.9.8.7\tother", result.out)
        self.assertIn("nameserver 10.9.8.6", result.out)

    def test_capabilities(self):
        def mask(*words):
            return int(self.see(*words, "base", "grep", "CapEff", "/proc/self/status").split()[1], 16)
        usual = mask()
        self.assertEqual(mask("--cap-drop", "CHOWN"), usual & ~1)
        self.assertEqual(mask("--cap-drop", "ALL"), 0)
        self.assertEqual(mask("--cap-drop", "ALL", "--cap-add", "NET_RAW"), 1 << 13)
        self.assertEqual(mask("--cap-add", "SYS_NICE"), usual | 1 << 23)
        ours = int(re.search("CapEff:\t(.*)", read("/proc/self/status")).group(1), 16)
        self.assertEqual(mask("--privileged"), ours)

    def test_ulimits(self):
        self.assertEqual(self.see("--ulimit", "nofile=100:200", "base", "sh", "-c", "ulimit -n; ulimit -Hn"),
                         "100\n200\n")

    def test_namespaces_of_the_host(self):
        for kind in ("pid", "ipc", "uts", "net"):
            inside = self.see(f"--{kind}", "host", "base", "readlink", "/proc/self/ns/" + kind).strip()
            self.assertEqual(inside, os.readlink("/proc/self/ns/" + kind), kind)
            self.assertNotEqual(self.see("base", "readlink", "/proc/self/ns/" + kind).strip(), inside, kind)

    def test_network_modes(self):
        interfaces = ("base", "sh", "-c", "grep -o '[a-z0-9]*:' /proc/net/dev | tr -d '\\n'")
        self.assertEqual(self.see("--net", "none", *interfaces), "lo:")
        self.assertEqual(self.see("--network", "bridge", *interfaces), "lo:eth0:")
        self.api.run("sleep", "600", name="cc")
        inside = self.api.execute("cc", "readlink", "/proc/self/ns/net")[1]
        self.assertEqual(self.see("--net", "container:cc", "base", "readlink", "/proc/self/ns/net"), inside)

    def test_devices(self):
        listing = self.see("--device", "/dev/null:/dev/mine", "base", "ls", "-l", "/dev/mine")
        self.assertEqual(listing[:1], "c", "a character device")
        self.assertEqual(self.see("base", "sh", "-c",
                                  "cd /dev; echo * | tr ' ' '\\n' | grep -v core | tr '\\n' ' '").split(),
                         "fd full mqueue null ptmx pts random shm stderr stdin stdout tty urandom zero".split())
        for source, reason in (("../..", "../.. is not an absolute path"), ("dev/null", "is not an absolute path"),
                               ("/dev/../..", "a folder of devices lies below /dev"), ("/dev/no\0ne", "no such file"),
                               (self.folder(), "a folder of devices lies below /dev"), ("/etc/passwd", "not a device")):
            container = self.api.create("true", Devices=[{"PathOnHost": source, "PathInContainer": "/dev/x"}])
            answer = self.api.post(f"/containers/{container}/start")
            self.refused(400, answer, f'error gathering device information while adding custom device "{source}": ')
            self.assertIn(reason, answer.message)
        link = self.folder() + "/devices"
        os.symlink("/dev", link)
        listing = self.api.output("ls", "/dev/x", Devices=[{"PathOnHost": link, "PathInContainer": "/dev/x"}])
        self.assertIn("null", listing.split())

    def test_expose_and_publish_all(self):
        self.cli("run", "-d", "--name", "ee", "--expose", "81", "-P", "-p", "82", "base", "sleep", "600")
        ports = self.api.inspect("ee")["NetworkSettings"]["Ports"]
        self.assertEqual(sorted(ports), ["81/tcp", "82/tcp"])
        self.assertTrue(all(49153 <= int(p[0]["HostPort"]) <= 65535 for p in ports.values()), ports)

    def test_resources_are_in_the_control_group(self):
        self.cli("run", "-d", "--name", "rr", "-m", "64m", "--memory-swap", "64m", "-c", "512", "--cpus", "0.5",
                 "--cpuset-cpus", "0", "--pids-limit", "20", "base", "sleep", "600")
        host = self.api.inspect("rr")["HostConfig"]
        self.assertEqual([host[k] for k in ("Memory", "MemorySwap", "CpuShares", "NanoCpus", "CpusetCpus",
                                            "PidsLimit")],
                         [64 << 20, 64 << 20, 512, 500000000, "0", 20])
        _, text = self.api.execute("rr", "sh", "-c",
                                   "i=0; while [ $i -lt 40 ]; do sleep 9 & i=$((i+1)); done; echo all")
        self.assertNotIn("all", text)
        pid = self.api.state("rr")["Pid"]
        self.assertEqual(len(os.sched_getaffinity(pid)), 1)

    def test_init(self):
        if not any(shutil.which(name, path=pydock.DEFAULT_PATH)
                   for name in ("docker-init", "tini", "catatonit", "dumb-init")):
            result = self.cli("run", "--rm", "--init", "base", "true", code=125)
            self.assertIn("tini", result.err)
            self.skipTest("needs the program tini")
        self.assertNotEqual(self.see("--init", "base", "sh", "-c", "echo $$"), "1\n")

    def test_stop_signal(self):
        self.cli("run", "-d", "--name", "ss", "--stop-signal", "USR1", "base", "sh", "-c",
                 "trap 'exit 5' USR1; echo ready; while :; do sleep 0.05; done")
        self.wait_for_output("ss", "ready")
        self.cli("stop", "ss")
        self.assertEqual(self.api.state("ss")["ExitCode"], 5)


class OptionTest(OptionCommand, DaemonCase):
    program = "pydock"


class OptionByDockerTest(OptionCommand, DaemonCase):
    program = "docker"


class TerminalCommand(Commands):
    """`-t`: the user's terminal in front of the client."""

    def test_size_resize_and_restore(self):
        terminal = self.on_terminal("run", "-it", "--rm", "base", "sh", size=(30, 100))
        terminal.send("stty size; tty\n")
        terminal.expect("30 100\r\n")
        terminal.expect("/dev/pts/0\r\n")
        terminal.send("while [ \"$(stty size)\" != '41 111' ]; do sleep 0.05; done; echo re''sized\n")
        self.resize_until(terminal, "resized")
        self.assertNotEqual(terminal.attributes(), terminal.before)
        terminal.send("exit 9\n")
        self.assertEqual(terminal.wait(), 9)
        self.assertEqual(terminal.attributes(), terminal.before)

    @staticmethod
    def resize_until(terminal, text):
        """Resize the terminal until the program prints `text`. A client misses a resize before it has installed its
        handler of SIGWINCH; the docker CLI takes some milliseconds for that."""
        def resized():
            terminal.resize(40, 110)
            terminal.resize(41, 111)
            with contextlib.suppress(AssertionError):
                return terminal.expect(text, 0.5)
        eventually(resized)

    def test_keys_interrupt_the_program_and_not_the_client(self):
        terminal = self.on_terminal("run", "-it", "--rm", "--name", "keys", "base", "sh")
        terminal.send("sleep 600; echo back\n")
        terminal.expect("back")
        # as long as the shell edits its line, the key would be a character and no interrupt
        eventually(lambda: b"sleep" in self.api.get("/containers/keys/top").body)
        terminal.send("\x03")
        terminal.send("exit 4\n")
        self.assertEqual(terminal.wait(), 4)

    def test_detach_and_attach(self):
        terminal = self.on_terminal("run", "-it", "--name", "tt", "base", "sh")
        terminal.send("echo on''e\n")
        terminal.expect("one")
        terminal.send("\x10\x11")
        terminal.wait()
        self.assertEqual(terminal.attributes(), terminal.before)
        self.assertTrue(self.api.state("tt")["Running"])
        second = self.on_terminal("attach", "tt")
        second.send("echo tw''o\n")
        second.expect("two")
        second.send("exit 6\n")
        self.assertEqual(second.wait(), 6)
        self.assertEqual(second.attributes(), second.before)

    def test_other_detach_keys(self):
        terminal = self.on_terminal("run", "-it", "--detach-keys", "ctrl-x,x", "--name", "tt", "base", "sh")
        terminal.send("echo on''e\n")
        terminal.expect("one")
        terminal.send("\x10\x11\x18x")
        terminal.wait()
        self.assertTrue(self.api.state("tt")["Running"])

    def test_exec(self):
        self.api.run("sleep", "600", name="tt")
        terminal = self.on_terminal("exec", "-it", "tt", "sh", size=(20, 70))
        terminal.send("stty size\n")
        terminal.expect("20 70")
        terminal.send("exit 3\n")
        self.assertEqual(terminal.wait(), 3)

    def test_the_terminal_is_restored_when_the_daemon_kills_the_container(self):
        terminal = self.on_terminal("run", "-it", "--name", "tt", "base", "sh")
        terminal.send("echo on''e\n")
        terminal.expect("one")
        self.api.ok("POST", "/containers/tt/kill")
        self.assertEqual(terminal.wait(), 137)
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_without_a_terminal(self):
        result = self.cli("run", "-it", "--rm", "base", "true", code=(1, 125))
        self.assertIn("not a TTY", result.err)


class TerminalTest(TerminalCommand, DaemonCase):
    program = "pydock"


class TerminalByDockerTest(TerminalCommand, DaemonCase):
    program = "docker"


LOOP = "trap 'exit 0' TERM; while :; do sleep 0.05; done"  # a script that ends at once on `stop`


class LifeCommand(Commands):
    """The commands for a container's life: create, start, stop, logs, exec, cp, rm and their like."""

    def test_create_start_stop_restart_rm(self):
        ident = self.cli("create", "--name", "life", "base", "sh", "-c", LOOP).out.strip()
        self.assertEqual(self.api.state("life")["Status"], "created")
        self.assertEqual(self.cli("start", "life").out, "life\n")
        first = self.api.state("life")
        self.assertEqual((first["Status"], is_alive(first["Pid"])), ("running", True))
        self.assertEqual(self.cli("restart", "life").out, "life\n")
        second = self.api.state("life")
        self.assertNotEqual(first["Pid"], second["Pid"])
        self.assertEqual(self.cli("stop", "-t", "5", "life").out, "life\n")
        state = self.api.state("life")
        self.assertEqual((state["Status"], state["ExitCode"], state["Pid"]), ("exited", 0, 0))
        self.assertEqual(self.cli("rm", ident[:10]).out, ident[:10] + "\n")
        self.assertFalse(os.path.exists(os.path.join(self.daemon.root, "containers", ident)))

    def test_stop_kills_what_does_not_listen(self):
        self.api.run("sleep", "600", name="deaf")
        self.cli("stop", "-t", "0", "deaf")
        self.assertEqual(self.api.state("deaf")["ExitCode"], 137)
        self.cli("stop", "deaf")

    def test_kill_with_signals(self):
        container = self.api.run("sh", "-c",
                                 "trap 'echo hup' HUP; trap 'exit 9' INT; echo ready; while :; do sleep 0.05; done",
                                 name="sig")
        self.wait_for_output(container, "ready")
        self.cli("kill", "-s", "SIGHUP", "sig")
        self.wait_for_output(container, "hup")
        self.cli("kill", "--signal", "2", "sig")
        self.assertEqual(self.api.wait(container), 9)
        result = self.cli("kill", "sig", code=1)
        self.assertIn("is not running", result.err)
        self.cli("kill", "-s", "NOSUCH", "sig", code=1)

    def test_wait(self):
        self.api.run("sh", "-c", "exit 3", name="w3")
        self.api.run("sh", "-c", "exit 4", name="w4")
        self.assertEqual(self.cli("wait", "w3", "w4").out, "3\n4\n")

    def test_ps(self):
        self.api.run("sleep", "600", name="up", Labels={"k": "v"}, ExposedPorts={"80/tcp": {}})
        done = self.api.run("false", name="done")
        self.api.wait(done)

        def names(*words):
            return sorted(self.cli("ps", "--format", "{{.Names}}", *words).out.split())
        self.assertEqual(names(), ["up"])
        self.assertEqual(names("-a"), ["done", "up"])
        self.assertEqual(names("-l"), ["done"])
        self.assertEqual(names("-a", "-n", "1"), ["done"])
        for condition, expected in (("label=k=v", ["up"]), ("name=do", ["done"]), ("status=exited", ["done"]),
                                    ("exited=1", ["done"]), ("ancestor=base", ["done", "up"]),
                                    ("id=" + done[:12], ["done"]), ("before=done", ["up"]), ("since=up", ["done"])):
            self.assertEqual(names("-a", "-f", condition), expected, condition)
        table = self.cli("ps", "-a").out.splitlines()
        self.assertRegex(table[0], "^CONTAINER ID +IMAGE +COMMAND +CREATED +STATUS +PORTS +NAMES$")
        self.assertRegex(table[1], fr'^{done[:12]} +base +"false" +.* ago +Exited \(1\) .* ago +done$')
        self.assertRegex(table[2], 'Up .* 80/tcp +up$')
        self.assertEqual(self.cli("ps", "-q", "--no-trunc", "-a", "-f", "name=done").out.strip(), done)

    def test_logs(self):
        container = self.api.run("sh", "-c", "echo one; echo two; echo -n part; sleep 0.1; echo err >&2", name="lg")
        self.api.wait(container)
        result = self.cli("logs", "lg")
        self.assertEqual((result.out, result.err), ("one\ntwo\npart", "err\n"))
        self.assertEqual(self.cli("logs", "--tail", "3", "lg").out, "two\npart")
        self.assertEqual(self.cli("logs", "--tail", "0", "lg").out, "")
        stamped = self.cli("logs", "-t", "lg").out
        self.assertRegex(stamped.splitlines()[0], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z one$")
        self.assertEqual(pydock.pad_nanoseconds("2026-11-23T21:36:00.62Z"), "2026-11-23T21:36:00.620000000Z")
        self.assertEqual(pydock.pad_nanoseconds("2026-11-23T21:36:00Z"), "2026-11-23T21:36:00.000000000Z")
        moment = stamped.splitlines()[1].split()[0]
        self.assertEqual(self.cli("logs", "--since", "2h", "lg").out, "one\ntwo\npart")
        self.assertTrue(self.cli("logs", "--since", moment, "lg").out.endswith("two\npart"))
        self.assertEqual(self.cli("logs", "--until", "2010-01-01T00:00:00", "lg").out, "")
        self.cli("logs", "nosuch", code=1)

    def test_logs_follow(self):
        container = self.api.run("sh", "-c", "echo one; while ! [ -e /go ]; do sleep 0.02; done; "
                                             "echo two; while ! [ -e /end ]; do sleep 0.02; done", name="fo")
        process = subprocess.Popen(self.cli_argv("logs", "-f", "fo"), stdout=subprocess.PIPE, env=ENVIRONMENT)
        with process.stdout:
            self.assertEqual(process.stdout.readline(), b"one\n")
            self.api.execute(container, "touch", "/go")
            self.assertEqual(process.stdout.readline(), b"two\n")
            self.api.execute(container, "touch", "/end")
            self.assertEqual(process.stdout.read(), b"")
            self.assertEqual(process.wait(10), 0)

    def test_exec(self):
        self.api.run("sleep", "600", name="ex", Env=["A=1"])
        self.assertEqual(self.cli("exec", "ex", "sh", "-c", "echo $A; echo e >&2; exit 6", code=6).out, "1\n")
        self.assertEqual(self.cli("exec", "-i", "ex", "cat", input="through").out, "through")
        self.assertEqual(self.cli("exec", "-w", "/tmp", "-e", "B=2", "-u", "3:4", "ex", "sh", "-c",
                                  "pwd; echo $A$B; id -u; id -g").out,
                         "/tmp\n12\n3\n4\n")
        self.cli("exec", "-d", "ex", "touch", "/made")
        eventually(lambda: self.api.execute("ex", "ls", "/made")[0] == 0)
        self.cli("exec", "ex", "/no/such", code=(126, 127))
        self.cli("exec", "ex", "/etc/passwd", code=126)
        self.cli("exec", "nosuch", "true", code=1)
        self.api.ok("POST", "/containers/ex/stop", t=0)
        self.assertIn("is not running", self.cli("exec", "ex", "true", code=1).err)

    def test_exec_of_any_bytes(self):
        self.api.run("sleep", "600", name="ex")
        data = random.Random(2).getrandbits(8 << 20).to_bytes(1 << 20, "big")
        self.assertEqual(self.cli("exec", "-i", "ex", "cat", input=data).raw, data)

    def test_pause(self):
        container = self.api.run("sh", "-c", LOOP, name="pa")
        self.assertEqual(self.cli("pause", "pa").out, "pa\n")
        state = self.api.state("pa")
        self.assertEqual((state["Status"], state["Paused"], state["Running"]), ("paused", True, True))
        self.assertIn("(Paused)", self.cli("ps").out)
        self.refused(409, self.api.post("/containers/pa/exec", {"Cmd": ["true"]}),
                     "Container pa is paused, unpause the container before exec")
        self.refused(409, self.api.post("/containers/pa/pause"), "is already paused")
        self.assertEqual(self.cli("unpause", "pa").out, "pa\n")
        self.assertEqual(self.api.state("pa")["Status"], "running")
        self.cli("unpause", "pa", code=1)
        self.cli("pause", "pa")
        self.cli("stop", "-t", "10", "pa")  # stop thaws the container first
        self.assertEqual(self.api.state(container)["ExitCode"], 0)
        self.api.start(container)
        self.cli("pause", "pa")
        self.cli("kill", "pa")
        self.assertEqual(self.api.wait(container), 137)
        self.api.start(container)
        self.cli("pause", "pa")
        self.cli("rm", "-f", "pa")

    def test_rename(self):
        container = self.api.create("true", name="before")
        self.api.create("true", name="other")
        self.cli("rename", "before", "after")
        self.assertEqual(self.api.inspect(container)["Name"], "/after")
        self.assertEqual(self.api.get("/containers/before/json").status, 404)
        self.assertIn("already in use", self.cli("rename", "after", "other", code=1).err)
        self.cli("rename", "after", "$bad", code=1)
        self.assertEqual(self.api.inspect("after")["Id"], container)

    def test_top(self):
        self.api.run("sh", "-c", "sleep 601; true", name="tp")
        lines = self.cli("top", "tp").out.splitlines()
        self.assertRegex(lines[0], "^UID +PID +PPID +C +STIME +TTY +TIME +CMD$")
        eventually(lambda: "sleep 601" in self.cli("top", "tp").out)
        if shutil.which("ps"):
            self.assertIn("601", self.cli("top", "tp", "-o", "pid,args").out)
        else:
            self.assertIn("install procps", self.cli("top", "tp", "-o", "pid,args", code=1).err)
        self.api.ok("POST", "/containers/tp/kill")
        self.assertIn("is not running", self.cli("top", "tp", code=1).err)

    def test_inspect(self):
        container = self.api.run("sleep", "600", name="in", Env=["A=b"])
        pid = self.api.state(container)["Pid"]
        for form, expected in (("{{.State.Pid}}", str(pid)), ("{{json .Name}}", '"/in"'), ("{{.Id}}", container),
                               ("{{range .Config.Cmd}}<{{.}}>{{end}}", "<sleep><600>"),
                               ("{{index .Config.Env 0}}", "A=b"), ("{{if .State.Running}}yes{{else}}no{{end}}", "yes"),
                               ("{{len .Config.Cmd}}", "2"),
                               ("{{.NetworkSettings.Networks.bridge.Gateway}}", self.daemon.gateway),
                               ("{{with .Config}}{{.Image}}{{end}}", "base")):
            self.assertEqual(self.cli("inspect", "-f", form, "in").out, expected + "\n", form)
        self.assertEqual(json.loads(self.cli("inspect", "in").out)[0]["Id"], container)
        result = self.cli("inspect", "nosuch", code=1)
        self.assertEqual(result.out, "[]\n")
        self.assertIn("No such object: nosuch", result.err)
        self.cli("inspect", "-f", "{{.Broken", "in", code=(1, 64))

    def test_port(self):
        self.api.run("sleep", "600", name="po", PortBindings={"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18080"}],
                                                              "53/udp": [{}]},
                     ExposedPorts={"80/tcp": {}, "53/udp": {}})
        self.assertEqual(self.cli("port", "po", "80").out, "127.0.0.1:18080\n")
        self.assertEqual(self.cli("port", "po", "80/tcp").out, "127.0.0.1:18080\n")
        self.assertRegex(self.cli("port", "po").out, r"53/udp -> 0.0.0.0:\d+\n")
        self.cli("port", "po", "81", code=1)

    def test_rm(self):
        self.api.run("sleep", "600", name="rr", Binds=["named:/n"], Volumes={"/anon": {}})
        result = self.cli("rm", "rr", code=1)
        self.assertIn("stop the container before removing or force remove", result.err)
        volumes = {v["Name"] for v in self.api.ok("GET", "/volumes")["Volumes"]}
        self.assertEqual(len(volumes), 2)
        self.cli("rm", "-f", "-v", "rr")
        self.assertEqual({v["Name"] for v in self.api.ok("GET", "/volumes")["Volumes"]}, {"named"})
        self.assertIn("No such container: rr", self.cli("rm", "rr", code=1).err)

    def test_attach(self):
        container = self.api.run("sh", "-c", "read x; echo got $x; echo err >&2; exit 5", name="at", OpenStdin=True,
                                 AttachStdin=True, StdinOnce=True)
        result = self.cli("attach", "at", input="word\n", code=5)
        self.assertEqual((result.out, result.err), ("got word\n", "err\n"))
        self.assertEqual(self.api.wait(container), 5)
        self.cli("attach", "at", code=1)

    def test_start_attached(self):
        self.api.create("sh", "-c", "cat; exit 4", name="sa", OpenStdin=True, StdinOnce=True, AttachStdin=True)
        self.assertEqual(self.cli("start", "-a", "-i", "sa", input="text", code=4).out, "text")

    def test_events(self):
        since = f"{time.time():.6f}"
        self.api.run("false", name="ev")
        self.api.wait("ev")
        self.api.ok("DELETE", "/containers/ev")
        until = f"{time.time():.6f}"
        text = self.cli("events", "--since", since, "--until", until, "--filter", "type=container").out
        actions = [line.split()[2] for line in text.splitlines()]
        self.assertEqual(actions, ["create", "start", "die", "destroy"])
        self.assertIn("exitCode=1", text)
        output = self.cli("events", "--since", since, "--until", until, "--format", "{{.Action}}", "-f", "event=die",
                          "-f", "container=ev").out
        self.assertEqual(output, "die\n")

    def test_version_and_info(self):
        self.assertIn("API version:", self.cli("version").out)
        self.assertEqual(self.cli("version", "--format", "{{.Server.APIVersion}}").out, "1.47\n")
        self.assertIn("Storage Driver: overlay", self.cli("info").out)
        self.assertEqual(self.cli("info", "-f", "{{.Driver}}").out, "overlay\n")

    def test_cp(self):
        folder = self.folder(file="content\n")
        os.chmod(folder + "/file", 0o640)
        self.api.create("true", name="cp")
        self.cli("cp", folder + "/file", "cp:/tmp/there")
        self.cli("cp", folder, "cp:/tree")
        self.cli("cp", "cp:/tmp/there", folder + "/back")
        self.assertEqual(read(folder + "/back"), "content\n")
        self.assertEqual(os.stat(folder + "/back").st_mode & 0o777, 0o640)
        self.cli("cp", "cp:/tree", folder + "/tree-back")
        self.assertEqual(read(folder + "/tree-back/file"), "content\n")
        self.assertIn("Could not find the file /nosuch in container cp",
                      self.cli("cp", "cp:/nosuch", folder, code=1).err)
        data = self.cli("cp", "cp:/tmp/there", "-").raw
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            self.assertEqual(tar.getnames(), ["there"])
        self.cli("cp", "-", "cp:/tmp", input=archive(file_("from-stdin", b"x")))
        self.api.run("sleep", "600", name="running")
        self.cli("cp", folder + "/file", "running:/tmp/f")
        self.assertEqual(self.api.execute("running", "cat", "/tmp/f"), (0, "content\n"))

    def test_volumes(self):
        self.assertEqual(self.cli("volume", "create", "--label", "a=b", "vv").out, "vv\n")
        self.assertIn("vv", self.cli("volume", "ls").out)
        self.assertEqual(json.loads(self.cli("volume", "inspect", "vv").out)[0]["Labels"], {"a": "b"})
        self.api.create("true", name="user", Binds=["vv:/v"])
        self.assertIn("volume is in use", self.cli("volume", "rm", "vv", code=1).err)
        self.api.ok("DELETE", "/containers/user")
        self.assertEqual(self.cli("volume", "rm", "vv").out, "vv\n")
        self.cli("volume", "inspect", "vv", code=1)

    def test_prune(self):
        self.api.wait(self.api.run("true", Volumes={"/anon": {}}))
        self.api.run("sleep", "600", name="stays")
        self.assertRegex(self.cli("container", "prune", "-f").out,
                         "Deleted Containers:\n[0-9a-f]{64}\n\nTotal reclaimed space: ")
        self.assertEqual(len(self.api.ok("GET", "/containers/json", all=1)), 1)
        self.assertRegex(self.cli("volume", "prune", "-f").out, "Deleted Volumes:\n[0-9a-f]{64}\n")
        self.assertIn("Total reclaimed space", self.cli("system", "prune", "-f").out)

    def test_unknown_things(self):
        for words in (["start"], ["stop"], ["rm"], ["logs"], ["attach"], ["top"], ["port"], ["pause"], ["diff"],
                      ["export", "-o", os.path.join(self.daemon.folder, "x.tar")], ["wait"]):
            self.assertIn("No such container: nosuch", self.cli(*words, "nosuch", code=1).err, words)
        self.cli("nosuchcommand", code=(1, 125))
        self.cli("run", "--nosuchflag", "base", "true", code=125)
        self.cli("ps", "--nosuchflag", code=125)
        self.cli("start", code=1)


class LifeTest(LifeCommand, DaemonCase):
    program = "pydock"


class LifeByDockerTest(LifeCommand, DaemonCase):
    program = "docker"


class PolicyTest(DaemonCase):
    """Restart policies, health checks and --rm: what the daemon does with a container by itself."""

    def runs(self, container):
        return output_of(self.api.logs(container)).count(b"run")

    def test_on_failure(self):
        container = self.api.run("sh", "-c", "echo run; exit 3",
                                 RestartPolicy={"Name": "on-failure", "MaximumRetryCount": 2})
        eventually(lambda: self.api.inspect(container)["RestartCount"] == 2)
        eventually(lambda: self.runs(container) == 3)
        eventually(lambda: self.api.state(container)["Status"] == "exited")
        good = self.api.run("sh", "-c", "echo run", RestartPolicy={"Name": "on-failure"})
        self.api.wait(good)
        self.pass_a_restart_delay()
        self.assertEqual((self.runs(container), self.runs(good)), (3, 1))

    def pass_a_restart_delay(self):
        """Wait until another container has been restarted three times by its policy. A restart that was due before has
        happened by then."""
        other = self.api.run("sh", "-c", "exit 1", RestartPolicy={"Name": "on-failure", "MaximumRetryCount": 3})
        eventually(lambda: self.api.inspect(other)["RestartCount"] == 3)

    def test_always_until_it_is_stopped(self):
        container = self.api.run("sh", "-c", "echo run; exit 0", RestartPolicy={"Name": "always"})
        eventually(lambda: self.runs(container) >= 3)
        self.api.ok("POST", f"/containers/{container}/stop")
        runs = self.runs(container)
        self.pass_a_restart_delay()
        self.assertEqual((self.runs(container), self.api.state(container)["Status"]), (runs, "exited"))
        self.api.start(container)
        eventually(lambda: self.runs(container) > runs + 1)
        self.api.ok("DELETE", "/containers/" + container, force=1)

    def test_update_of_the_policy(self):
        container = self.api.run("sleep", "600")
        self.pydock("update", "--restart", "always", container)
        self.api.ok("POST", f"/containers/{container}/exec", {"Cmd": ["true"]})
        os.kill(self.api.state(container)["Pid"], signal.SIGKILL)
        eventually(lambda: self.api.inspect(container)["RestartCount"] == 1)
        self.api.ok("POST", f"/containers/{container}/update",
                    {"RestartPolicy": {"Name": "no"}, "Memory": 64 << 20, "MemorySwap": 64 << 20})
        self.assertEqual(self.api.inspect(container)["HostConfig"]["Memory"], 64 << 20)

    def test_remove_at_the_end(self):
        container = self.api.run("true", AutoRemove=True, Volumes={"/anon": {}})
        eventually(lambda: self.api.get(f"/containers/{container}/json").status == 404)
        eventually(lambda: not self.api.ok("GET", "/volumes")["Volumes"])
        self.refused(400, self.api.post("/containers/create", {"Image": "base", "HostConfig": {
            "AutoRemove": True, "RestartPolicy": {"Name": "always"}}}),
                     "can't create 'AutoRemove' container with restart policy")

    def test_ports_on_the_hosts_network(self):
        made = self.api.ok("POST", "/containers/create", {"Image": "base", "Cmd": ["true"], "HostConfig": {
            "NetworkMode": "host", "PortBindings": {"80/tcp": [{"HostPort": "80"}]}}})
        self.assertIn("Published ports are discarded when using host network mode", made["Warnings"])

    def test_health(self):
        second = 10 ** 9
        container = self.api.run("sh", "-c", "touch /ok; sleep 600", Healthcheck={
            "Test": ["CMD-SHELL", "echo probed; test -e /ok"], "Interval": second // 10, "Timeout": 5 * second,
            "Retries": 2})
        eventually(lambda: self.api.state(container)["Health"]["Status"] == "healthy")
        self.api.execute(container, "rm", "/ok")
        eventually(lambda: self.api.state(container)["Health"]["Status"] == "unhealthy")
        health = self.api.state(container)["Health"]
        self.assertGreaterEqual(health["FailingStreak"], 2)
        self.assertEqual((health["Log"][-1]["ExitCode"], health["Log"][-1]["Output"]), (1, "probed\n"))

    def test_oom(self):
        container = self.api.run("sh", "-c", "x=a; while :; do x=$x$x; done", Memory=16 << 20, MemorySwap=16 << 20)
        self.assertEqual(self.api.wait(container), 137)
        self.assertTrue(self.api.state(container)["OOMKilled"])


class FrozenDuringKillTest(DaemonCase):
    def test_a_group_that_is_frozen_during_a_kill(self):
        """A pause may come between the kill's thaw and its signal, and the freezer of version 1 holds back SIGKILL."""
        container = self.api.run("sleep", "600")
        groups = pydock.cgroups(CGROUP_PARENT)
        group = groups.find(container)
        if groups.version == 2 or not group._folder("freezer"):
            self.skipTest("needs the freezer of cgroup version 1")
        control = os.path.join(group._folder("freezer"), "freezer.state")

        def freeze():
            for _ in range(1000):
                with contextlib.suppress(OSError), open(control, "w") as file:
                    file.write("FROZEN")
                time.sleep(0.001)
        freezer = threading.Thread(target=freeze)
        with self.api.stream("GET", "/events", filters={"event": ["kill"]}) as response:
            killer = threading.Thread(target=self.api.post, args=(f"/containers/{container}/kill",))
            killer.start()
            response.readline()
            freezer.start()
        freezer.join()
        killer.join(8)
        is_alive = killer.is_alive()
        if is_alive:
            group.thaw()
            killer.join()
        self.assertFalse(is_alive, "the kill waits for a process that cannot end, because it is frozen")
        self.assertEqual(self.api.state(container)["ExitCode"], 137)

    def test_kill_and_pause_at_once(self):
        for _ in range(10):
            container, answers = self.api.run("sleep", "600", NetworkMode="none"), {}

            def call(verb):
                answers[verb] = self.api.post(f"/containers/{container}/{verb}")
            run_threads([threading.Thread(target=call, args=(verb,)) for verb in ("kill", "pause")])
            self.assertEqual(answers["kill"].status, 204, answers)
            self.assertIn(answers["pause"].status, (204, 409), answers)
            self.assertFalse(self.api.state(container)["Running"])

    def test_a_stop_may_wait_as_long_as_it_likes(self):
        container = self.api.run("sh", "-c", "trap 'exit 4' TERM; while :; do sleep 0.05; done", NetworkMode="none")
        self.api.ok("POST", f"/containers/{container}/stop", t=10 ** 15)
        self.assertEqual(self.api.state(container)["ExitCode"], 4)


class ChangesDuringUseTest(DaemonCase):
    def test_twenty_at_once(self):
        results = []

        def one(number):
            results.append(self.api.output("echo", "-n", str(number)))
        run_threads([threading.Thread(target=one, args=(n,)) for n in range(20)], 60)
        self.assertEqual(sorted(map(int, results)), list(range(20)))

    def test_operations_on_one_container_exclude_each_other(self):
        self.api.create("sh", "-c", "dd if=/dev/zero of=/f bs=1M count=2 2>/dev/null; " + LOOP, name="busy")
        failures = []

        def work(*calls):
            for method, path, query in calls * 3:
                answer = self.api.call(method, path, **query)
                if answer.status >= 500:
                    failures.append((path, answer))
        jobs = [[("POST", "/containers/busy/start", {}), ("POST", "/containers/busy/stop", {"t": 1})],
                [("GET", "/containers/busy/export", {})], [("POST", "/commit", {"container": "busy", "repo": "busy"})],
                [("GET", "/containers/busy/changes", {}), ("GET", "/containers/busy/archive", {"path": "/etc"})],
                [("POST", "/containers/busy/restart", {"t": 1}), ("POST", "/containers/busy/kill", {})]]
        run_threads([threading.Thread(target=work, args=job) for job in jobs], 60)
        self.assertEqual(failures, [])
        self.api.ok("DELETE", "/containers/busy", force=1)

    def test_images_are_made_while_others_go(self):
        """commit, import and mkimage run at the same time as rmi and prune: an image that a call has answered with is
        whole, and can be used until it is removed."""
        container, failures, ends = self.api.create("true"), [], threading.Event()
        archive = tar_of(file_("f", b"imported"))
        queries = {"/commit": {"container": container}, "/images/create": {"fromSrc": "-"},
                   "/pydock/mkimage": {"program": "true"}}

        def check(answer, *allowed):
            if answer.status not in (200, 201, 204) + allowed:
                failures.append(answer)
            return answer

        def make(number, *call):
            name = f"racing{number}"
            for _ in range(6):
                check(self.api.call("POST", *call, **dict(queries[call[0]], repo=name, name=name)))
                made = check(self.api.post("/containers/create", {"Image": name, "Cmd": ["true"]}, name=name))
                check(self.api.get(f"/containers/{name}/export"))
                if made.status == 201:
                    check(self.api.delete("/containers/" + name))
                check(self.api.delete("/images/" + name))

        def prune():
            while not ends.is_set():
                check(self.api.post("/images/prune", filters={"dangling": ["true"]}), 409)

        jobs = [("/commit",), ("/commit",), ("/images/create", archive), ("/images/create", archive),
                ("/pydock/mkimage",)]
        makers = [threading.Thread(target=make, args=(number,) + job) for number, job in enumerate(jobs)]
        pruner = threading.Thread(target=prune)
        pruner.start()
        run_threads(makers, 120)
        ends.set()
        pruner.join(60)
        self.assertEqual(failures, [])
        self.assertEqual(self.api.output("echo", "base"), "base\n")


class RunWithLxcTest(WithLxc, RunTest):
    pass


class OptionWithLxcTest(WithLxc, OptionTest):
    pass


class TerminalWithLxcTest(WithLxc, TerminalTest):
    def test_keys_interrupt_the_program_and_not_the_client(self):
        """LXC gives the container no controlling terminal, and a warning says so."""
        self.assertIn("is no controlling terminal", self.cli("create", "-it", "base", "sh").err)


class LifeWithLxcTest(WithLxc, LifeTest):
    pass


class PolicyWithLxcTest(WithLxc, PolicyTest):
    pass


########################################################################
# 18. Execs and health
########################################################################

class FakeLink:
    """A monitor that has ended: every request fails."""

    def __init__(self):
        self.requests, self.closed = [], 0

    def request(self, op, **arguments):
        self.requests.append(op)
        raise pydock.MonitorGone("the container's monitor has ended")

    def close(self):
        self.closed += 1


class ExecRaceTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(shutil.rmtree, folder)
        config = dict(pydock.CONFIG, Env=[], Healthcheck={"Test": ["CMD", "true"], "Interval": 10 ** 6, "Retries": 1})
        saved = {"id": "c" * 64, "name": "c", "config": config, "host_config": dict(pydock.HOST_CONFIG)}
        self.container = pydock.Container(folder, collections.defaultdict(str, saved), {
            "status": "running", "started": 1, "pid": os.getpid(), "start_time": pydock.stat_start_time(os.getpid()),
            "health": self.new_health()})
        self.containers = mock.Mock(run_folder=lambda ident: os.path.join(folder, ident), cgroup_parent="")
        self.execs = self.containers.execs = pydock.Execs(self.containers)
        self.checks = pydock.HealthChecks(self.containers)

    @staticmethod
    def new_health():
        return {"Status": "starting", "FailingStreak": 0, "Log": []}

    def test_whatever_fails_in_a_start_ends_the_exec(self):
        """Also what fails before the monitor is there, and an exception that nobody expects."""
        for target, error in (("_spec", pydock.BadRequest("no such user")), ("_spec", KeyError("x")),
                              ("emit", RecursionError("too deep"))):
            with self.subTest(error=error):
                ex = self.execs.create(self.container, {"Cmd": ["true"]})
                place = self.execs if target == "_spec" else self.containers
                with mock.patch.object(place, target, side_effect=error), self.assertRaises(type(error)):
                    self.execs.start(ex, {})
                self.assertEqual((ex.running, ex.to_api()["Running"], ex.finished.is_set()), (False, False, True))
                self.assertIsNotNone(ex.ended_at)

    def test_the_end_is_recorded_once(self):
        """The watcher and a failing start record the same end at once, on two threads."""
        both = threading.Barrier(2)

        class Watched(pydock.Exec):
            def __getattribute__(self, name):
                value = super().__getattribute__(name)
                if name == "monitor" and value is not None:
                    with contextlib.suppress(threading.BrokenBarrierError):
                        both.wait(0.5)  # each thread has seen the monitor before one of them takes it away
                return value
        ex, failed = Watched(self.container, dict(pydock.EXEC_CONFIG, Cmd=["true"])), []
        link = ex.monitor = FakeLink()
        with mock.patch.object(threading, "excepthook", failed.append):
            run_threads([threading.Thread(target=self.execs._record_exit, args=(ex,)) for _ in range(2)])
        self.assertEqual((failed, link.requests, link.closed), ([], ["quit"], 1))

    def test_the_end_comes_while_a_request_is_made(self):
        ex = self.execs.create(self.container, {"Cmd": ["true"]})
        for monitor in (None, FakeLink()):
            ex.monitor = monitor
            with self.assertRaises(pydock.Conflict):
                self.execs.resize(ex, 24, 80)

    def test_a_probe_that_ends_just_after_its_time(self):
        for monitor in (None, FakeLink()):
            def start(ex, body, take):
                os.close(take()[0])
                ex.monitor = monitor
            with mock.patch.object(self.execs, "start", start):
                self.assertEqual(self.checks._probe(self.container, 0), (-1, "Health check exceeded timeout (0s)"))

    def test_a_probe_that_ends_in_the_next_run(self):
        runs = []

        def probe(container, timeout):
            runs.append(1)
            if len(runs) > 1:  # a restart while the probe was under way
                container.set_state(started=2, health=self.new_health())
            return 1, "failed"
        with mock.patch.object(self.checks, "_probe", probe):
            self.checks._watch(self.container, 1)
        self.assertEqual((len(runs), self.container.state["health"]), (2, self.new_health()))

    def test_a_probe_that_ends_after_its_run(self):
        def probe(container, timeout):
            container.set_state(status="exited", health=None)
            return 1, "failed"
        with mock.patch.object(self.checks, "_probe", probe):
            self.checks._watch(self.container, 1)
        self.assertIsNone(self.container.state["health"])


########################################################################
# 19. Build
########################################################################

class DockerfileTest(unittest.TestCase):
    def instructions(self, text):
        file = pydock.Dockerfile(text)
        return [(i.word, i.text) for stage in file.stages for i in [stage.first] + stage.instructions]

    def test_lines(self):
        text = ("\ufeff# a comment\r\nfrom base\r\n  run echo a && \\\r\n  # inside\r\n\r\n    echo b \\  \n  && c\n"
                "ENV x=1 \\\n # end\n")
        self.assertEqual(self.instructions(text),
                         [("FROM", "base"), ("RUN", "echo a &&     echo b   && c"), ("ENV", "x=1")])
        self.assertEqual(pydock.Dockerfile(text).stages[0].instructions[1].line, 8)
        self.assertIn("Empty continuation line", pydock.Dockerfile(text).notes[0])
        self.assertEqual(self.instructions("FROM a\nRUN echo \\\\\nRUN b"),
                         [("FROM", "a"), ("RUN", "echo \\\\"), ("RUN", "b")])

    def test_directives(self):
        text = "# syntax=docker/dockerfile:1\n# escape=`\nFROM base\nRUN dir c:\\`\n  x\n"
        self.assertEqual(self.instructions(text)[1], ("RUN", "dir c:\\  x"))
        self.assertIn("syntax=docker/dockerfile:1", pydock.Dockerfile(text).notes[0])
        self.assertEqual(self.instructions("# c\n# escape=`\nFROM a\nRUN a \\\n b")[1], ("RUN", "a  b"))
        for text in ("# escape=x\nFROM a", "# escape=`\n# escape=`\nFROM a"):
            with self.assertRaisesRegex(pydock.BadRequest, "line [12]: .*escape|ESCAPE"):
                pydock.Dockerfile(text)

    def test_heredocs(self):
        file = pydock.Dockerfile("FROM a\nRUN <<EOF cat - <<-'E2' && x <<<no\nEOFx\nEOF\n\tin\n\tE2\n"
                                 "COPY <<a <<\"b\" /x\n1\na\n$2\nb\nCMD [\"<<EOF\"]")
        run, copy, _ = file.stages[0].instructions
        self.assertEqual([(d.name, d.content, d.strip, d.expands) for d in run.documents],
                         [("EOF", "EOFx\n", False, True), ("E2", "in\n", True, False)])
        self.assertEqual([(d.name, d.content, d.expands) for d in copy.documents],
                         [("a", "1\n", True), ("b", "$2\n", False)])
        with self.assertRaisesRegex(pydock.BadRequest, "line 2: unterminated heredoc.*EOF"):
            pydock.Dockerfile("FROM a\nRUN <<EOF\nx\n")

    def test_flags(self):
        file = pydock.Dockerfile('FROM --platform=linux/amd64 a AS Name\n'
                                 'RUN --mount=type=tmpfs,target=/x --mount=type=cache,target="/a b" '
                                 '--network=none y --z')
        self.assertEqual(file.stages[0].first.flags, {"platform": "linux/amd64"})
        self.assertEqual(file.stages[0].name, "name")
        run = file.stages[0].instructions[0]
        self.assertEqual((len(run.flags["mount"]), run.flags["network"], run.text), (2, "none", "y --z"))

    def test_what_is_refused(self):
        for text, part in (
                ("", "cannot be empty"), ("# x\n", "file with no instructions"),
                ("RUN x", "no build stage in current context"),
                ("FROM a\nRUNN x", "line 2: unknown instruction: RUNN (did you mean RUN?)"),
                ("FROM a\nINSERT x y", "line 2: unknown instruction: INSERT"),
                ("FROM", "line 1: FROM requires either one or three arguments"), ("FROM a b", "either one or three"),
                ("FROM a AS 1x", "invalid name for build stage"),
                ("FROM a\n\nCOPY x", "line 3: COPY requires at least two arguments, but only one"),
                ("FROM a\nENV A", "ENV must have two arguments"), ("FROM a\nENV A=1 B", "can't find = in \"B\""),
                ("FROM a\nENV =1", "names can not be blank"),
                ("FROM a\nCOPY --form=x a b", "unknown flag: --form (did you mean --from?)"),
                ("FROM a\nCOPY --from=a --from=b x y", "Duplicate flag"),
                ("FROM a\nHEALTHCHECK FOO", "Unknown type \"FOO\" in HEALTHCHECK"),
                ("FROM a\nHEALTHCHECK --retries=x CMD y", "--retries"),
                ("FROM a\nHEALTHCHECK --interval=x CMD y", "invalid duration"),
                ("FROM a\nSHELL x", "SHELL requires the arguments to be in JSON form"),
                ("FROM a\nONBUILD FROM x", "isn't allowed as an ONBUILD trigger"),
                ("FROM a\nONBUILD ONBUILD RUN x", "Chaining ONBUILD"), ("FROM a\nWORKDIR", "exactly one argument"),
                ("FROM a\nARG", "at least one argument"),
                ("FROM a\nRUN --mount=type=ssh x", "unsupported mount type \"ssh\""),
                ("FROM a\nRUN --mount=type=cache,target=/x,upperdir=/y z", "unexpected key 'upperdir'"),
                ("FROM a\nRUN --mount=type=bind,target=/x,bind-propagation=shared z",
                 "unexpected key 'bind-propagation'"),
                ("FROM a\nRUN --mount=type=cache z", "needs a target"),
                ("FROM a\nRUN --network=x z", "invalid network mode"),
                ("FROM a\nRUN --security=insecure z", "not supported"),
                ("FROM a\nRUN --mount=type=cache,target=/x,sharing=y z", "unsupported sharing")):
            with self.subTest(text), self.assertRaisesRegex(pydock.BadRequest, re.escape(part)):
                pydock.Dockerfile(text)

    def test_large_files(self):
        variables = "".join(f"ENV A{i}={i}\n" for i in range(1000))
        file = pydock.Dockerfile("FROM a\n" + variables + "RUN " + "x" * (1 << 20))
        self.assertEqual(len(file.stages[0].instructions), 1001)
        self.assertEqual(len(pydock.Dockerfile("FROM a\nRUN a" + " \\\n b" * 50000).stages[0].instructions), 1)

    def test_stages(self):
        file = pydock.Dockerfile("FROM a AS one\nFROM b AS two\nCOPY --from=One /x /y\nFROM two")
        self.assertEqual([s and s.number for s in (file.stage("ONE", 1), file.stage("1", 2), file.stage("other", 2))],
                         [0, 1, None])
        for name, before in (("2", 2), ("7", 1), ("two", 1), ("two", 0)):
            with self.subTest(name=name, before=before), self.assertRaises(pydock.BadRequest):
                file.stage(name, before)


class BuildCase(DaemonCase):
    def build(self, text, *members, status=200, **query):
        """Build from a Dockerfile, or none if `text` is None, and these members of the context: see send."""
        if text is not None:
            members += (file_("Dockerfile", text.encode()),)
        return self.send(tar_of(*members), status, **query)

    def send(self, data, status=200, headers=None, **query):
        """Send a context to /build and check the response's status. Returns (text of the stream, error or None), or
        (message, None) if `status` is an error. The id of the image that was built is then in self.image."""
        answer = self.api.call("POST", "/build", data, dict({"Content-Type": "application/x-tar"}, **(headers or {})),
                               **query)
        self.assertEqual(answer.status, status, answer)
        if status != 200:
            return answer.message, None
        self.messages, self.image = answer.documents, None
        for message in self.messages:
            self.image = message.get("aux", {}).get("ID") or self.image
        self.error = next((m for m in self.messages if "error" in m), None)
        return "".join(m.get("stream", "") for m in self.messages), self.error and self.error["error"]

    def built(self, dockerfile, *members, **query):
        """Build, which has to succeed, and return the text of the stream."""
        text, error = self.build(dockerfile, *members, **query)
        self.assertIsNone(error)
        return text

    def fails(self, part, dockerfile, *members, **query):
        """Build, which has to fail with an error that contains `part`, and return the text of the stream."""
        text, error = self.build(dockerfile, *members, **query)
        self.assertIsNotNone(error, text)
        self.assertIn(part, error)
        self.assertNotIn("Errno", error)
        return text

    def config(self, image=None):
        return self.api.ok("GET", f"/images/{image or self.image}/json")["Config"]

    def shell(self, command, image=None, **config):
        """The output of a shell command in a container of the image."""
        return self.api.output("/bin/sh", "-c", command, image=image or self.image,
                               **dict({"Entrypoint": []}, **config))

    def git(self, base, *words):
        """Run git in a folder."""
        result = run_program(["git", "-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main", "-C",
                              base] + list(words))
        self.assertEqual(result.code, 0, result)

    def serve_git(self, base):
        """Serve the repositories in a folder with `git daemon`, and return their address."""
        port = free_port()
        server = subprocess.Popen(["git", "daemon", "--export-all", "--base-path=" + base, "--listen=127.0.0.1",
                                   f"--port={port}", "--reuseaddr"],
                                  stderr=subprocess.DEVNULL, start_new_session=True)
        self.addCleanup(lambda: (os.killpg(server.pid, signal.SIGTERM), server.wait()))
        eventually(lambda: can_connect(("127.0.0.1", port)), message="git daemon did not start")
        return f"git://127.0.0.1:{port}"

    def members(self, image=None):
        """{name: TarInfo} of the whole tree of an image, or of the one that was built last."""
        return self.exported_members(image or self.image)


class BuildTest(BuildCase):
    def test_the_stream(self):
        dockerfile = 'FROM base\nENV A=b\nCOPY sub /sub\nRUN echo built; echo err >&2\nCMD ["sh"]\n'
        text = self.built(dockerfile, file_("sub", b"1"), t=["bt:1", "bt"])
        ident = "[0-9a-f]{12}"
        ran = " ---> Running in ID\nRemoving intermediate container ID\n ---> ID\n"
        expected = ("Step 1/5 : FROM base\n ---> ID\nStep 2/5 : ENV A=b\n" + ran
                    + "Step 3/5 : COPY sub /sub\n ---> ID\n"
                    "Step 4/5 : RUN echo built; echo err >&2\n ---> Running in ID\nbuilt\n\x1b[91merr\n"
                    "\x1b[0mRemoving intermediate container ID\n ---> ID\n"
                    "Step 5/5 : CMD [\"sh\"]\n" + ran
                    + "Successfully built ID\nSuccessfully tagged bt:1\nSuccessfully tagged bt:latest\n")
        self.assertRegex(text, f"^{re.escape(expected).replace('ID', ident)}$")
        self.assertEqual(self.config("bt:1")["Cmd"], ["sh"])
        first = self.image
        text = self.built(dockerfile, file_("sub", b"1"))
        self.assertEqual((text.count(" ---> Using cache\n"), self.image), (4, first))
        self.assertNotIn("Running in", text)
        text = self.built(dockerfile, file_("sub", b"1"), nocache=1)
        self.assertNotIn("Using cache", text)
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])

    def test_quiet_and_old(self):
        text, _ = self.build("FROM base\nRUN echo loud\n", q=1)
        self.assertRegex(text, "^sha256:[0-9a-f]{64}\n$")
        self.build("FROM base\nRUN exit 4\n", q=1, status=500)

    def test_config_instructions(self):
        self.built("ARG B=base\nFROM $B AS one\nMAINTAINER Me <me@x>\nARG FOO=1\nARG BAR\nENV X=1 Y=\"a b\" Z=a\\ b\n"
                   "ENV OLD some text here\n"
                   "ENV X2=$X$FOO N=${NOPE:-d} P=${X:+p} E=\\$X Q='$X'\nLABEL a=b \"c d\"=\"e $X\" f='$X'\n"
                   "EXPOSE 80 53/udp $X\nWORKDIR /w\nWORKDIR sub/$X\n"
                   "USER 1:2\nVOLUME /v1 /v2\nVOLUME [\"/v3\"]\nSTOPSIGNAL 9\n"
                   "HEALTHCHECK --interval=5s --retries=2 CMD curl x\nSHELL [\"/bin/sh\",\"-ec\"]\n"
                   "RUN echo $FOO ${BAR} > /tmp/x\nCMD echo a   b\nENTRYPOINT [\"x\", \"y\"]\nONBUILD RUN echo hi\n"
                   "ONBUILD COPY a /a\n",
                   t="probe:1", buildargs={"BAR": "v"}, labels={"z": "1$X\"\\"})
        config = self.config()
        path = "PATH=" + pydock.DEFAULT_PATH
        self.assertEqual(config["Env"], [path, "X=1", "Y=a b", "Z=a b", "OLD=some text here", "X2=11", "N=d", "P=p",
                                         "E=$X", "Q=$X"])
        expected = {"User": "1:2", "ExposedPorts": {"80/tcp": {}, "53/udp": {}, "1/tcp": {}},
                    "Cmd": ["/bin/sh", "-ec", "echo a   b"], "Entrypoint": ["x", "y"],
                    "Volumes": {"/v1": {}, "/v2": {}, "/v3": {}}, "WorkingDir": "/w/sub/1", "StopSignal": "9",
                    "Shell": ["/bin/sh", "-ec"], "Labels": {"a": "b", "c d": "e 1", "f": "$X", "z": "1$X\"\\"},
                    "OnBuild": ["RUN echo hi", "COPY a /a"],
                    "Healthcheck": {"Test": ["CMD-SHELL", "curl x"], "Interval": 5000000000, "Retries": 2}}
        self.assertEqual({key: config.get(key) for key in expected}, expected)
        self.assertEqual(self.api.ok("GET", "/images/probe:1/json")["Author"], "Me <me@x>")
        self.assertEqual(self.shell("cat /tmp/x"), "1 v\n")
        made = [entry["CreatedBy"] for entry in self.api.ok("GET", "/images/probe:1/history")]
        self.assertIn("|2 BAR=v FOO=1 /bin/sh -ec echo $FOO ${BAR} > /tmp/x", made)
        self.assertIn("/bin/sh -c #(nop)  ENV X2=11 N=d P=p E=$X Q=$X", made)
        # a build on this image runs its ONBUILD triggers first; an image built on it does not have them any more
        text = self.built("FROM probe:1\nRUN true\n", file_("a", b"from the trigger"), t="probe:2")
        self.assertIn("# Executing 2 build triggers\n", text)
        self.assertEqual(self.shell("cat /a"), "from the trigger")
        self.assertIsNone(self.config()["OnBuild"])

    def test_command_and_entrypoint(self):
        self.built("FROM base\nCMD [\"image\"]\n", t="c:1")
        self.built("FROM c:1\nENTRYPOINT [\"e\"]\n")
        self.assertEqual((self.config()["Entrypoint"], self.config()["Cmd"]), (["e"], None))
        self.built("FROM c:1\nCMD [\"mine\"]\nENTRYPOINT [\"e\"]\n")
        self.assertEqual(self.config()["Cmd"], ["mine"])
        self.built("FROM c:1\nENTRYPOINT []\nCMD []\n")
        self.assertFalse(self.config()["Entrypoint"] or self.config()["Cmd"])

    def test_copy_with_parents_from_a_stage(self):
        self.built("FROM base AS one\nRUN mkdir -p /a/b && echo 1 > /a/b/c\n"
                   "FROM base\nCOPY --parents --from=one /a/b/c /to/\n")
        self.assertEqual(self.shell("cat /to/a/b/c"), "1\n")

    def test_words_that_look_like_numbers_or_documents(self):
        self.fails("unable to convert uid/gid", "FROM base\nCOPY --chown=\u00b2 a /a\n", file_("a", b"1"))
        self.fails("not found", "FROM base\nENV E=<<foo\nCOPY <<bar $E /a/\nx\nbar\n")

    def test_copy(self):
        members = (file_("a", b"1"), file_("b", b"2", mode=0o755), folder("d", mode=0o700), file_("d/x", b"y", uid=5),
                   symlink("d/l", "x"), symlink("l", "a"), symlink("ld", "d"), hardlink("d/h", "d/x"),
                   file_("t.tar", tar_of(file_("in/side", b"1", uid=7))))
        self.built("FROM base\nWORKDIR /work\nCOPY d /d1\nCOPY d/ /d2/\nCOPY a b /e/\nCOPY a /f\nCOPY [a-b] /g/\n"
                   "COPY --chown=1:2 --chmod=604 a /h/i/\nCOPY l /l\n"
                   "COPY ld /ldir\nADD t.tar /t/\nCOPY t.tar /plain/\nCOPY . /all/\nCOPY a rel/\n"
                   "COPY [\"a\", \"with blank\"]\nCOPY --parents d/x /par/\n"
                   "COPY --exclude=h --exclude=l d /ex/\nADD --chown=3 a /new/name\n"
                   "ARG M=X\nCOPY --chmod=go=u,u=rw$M,o= d /modes/\nCOPY --parents=false d/x /flat/\n", *members)
        files = self.members()
        for name in ("d1/x", "d2/x", "e/a", "e/b", "f", "g/a", "g/b", "h/i/a", "l", "ldir/x", "t/in/side",
                     "plain/t.tar", "all/Dockerfile", "all/d/x", "work/rel/a", "work/with blank", "par/d/x", "ex/x"):
            self.assertIn(name, files)
            self.assertTrue(files[name].isreg() or files[name].islnk(), name)
        self.assertNotIn("ex/l", files)
        self.assertTrue(files["d1/l"].issym() and files["all/ld"].issym())
        self.assertTrue(files["d1/h"].islnk() or files["d1/x"].islnk())
        self.assertEqual((files["d1/x"].uid, files["t/in/side"].uid, files["e/b"].mode), (0, 7, 0o755))
        self.assertEqual((files["h/i/a"].uid, files["h/i/a"].gid, files["h/i/a"].mode, files["h/i"].uid),
                         (1, 2, 0o604, 1))
        self.assertEqual((files["new/name"].uid, files["new/name"].gid), (3, 3))
        self.assertEqual((files["d1"].mode, files["all/d"].mode), (0o755, 0o700))
        self.assertEqual((files["modes/x"].mode, "flat/x" in files), (0o660, True))

    def test_owner_by_name(self):
        self.built("FROM base\nRUN echo 'u:x:77:78::/:/bin/sh' >> /etc/passwd; echo 'g:x:79:' >> /etc/group; "
                   "echo '9:x:80:80::/:' >> /etc/passwd\n"
                   "COPY --chown=u:g Dockerfile /1\nCOPY --chown=9 Dockerfile /2\n")
        files = self.members()
        self.assertEqual([(files[n].uid, files[n].gid) for n in "12"], [(77, 79), (9, 9)])
        self.fails("can't find uid for user nobodyknows", "FROM base\nCOPY --chown=nobodyknows Dockerfile /1\n")

    def test_copy_over_what_is_there(self):
        self.built("FROM base\nRUN mkdir -p /x/sub /y && echo old > /x/file && ln -s file /x/link && ln -s /x /dir "
                   "&& chmod 711 /x && echo keep > /x/sub/keep\n"
                   "COPY new /dir\nCOPY one /x/link\nCOPY one /y\n", folder("new"), file_("new/file", b"new"),
                   folder("new/sub"), file_("new/sub/more", b""), file_("one", b"1"))
        self.assertEqual(self.shell("cat /x/file /x/link /x/sub/keep /y/one; ls /x/sub; ls -ld /x /dir | cut -c1-10"),
                         "11keep\n1keep\nmore\nlrwxrwxrwx\ndrwx--x--x\n")

    def test_run(self):
        self.built("FROM base\nRUN [\"sh\", \"-c\", \"echo exec > /1\"]\nRUN echo $0 > /2 && \\\n  # comment\n"
                   "  echo more >> /2\nUSER 5:6\nRUN id -u > /tmp/3; id -g >> /tmp/3\n"
                   "WORKDIR /tmp\nRUN pwd > 4; rm /1 2>/dev/null; true\nENV V=w\nRUN echo $V $HOSTNAME > 5\n"
                   "USER 0\nRUN rm /1\nVOLUME /vol\nRUN mkdir -p /vol && echo in > /vol/f\n")
        self.assertEqual(self.shell("cat /2 /tmp/3 /tmp/4; test -e /1 || echo gone; cat /vol/f", User="0"),
                         "/bin/sh\nmore\n5\n6\n/tmp\ngone\nin\n")
        layers = self.api.ok("GET", f"/images/{self.image}/json")["RootFS"]["Layers"]
        self.assertEqual(len(layers), len({*layers}))

    def test_run_network(self):
        self.built("FROM base\nRUN --network=none ls /sys/class/net > /nets\n")
        self.assertEqual(self.shell("cat /nets"), "lo\n")
        self.built("FROM base\nRUN ls /sys/class/net > /nets; grep extra /etc/hosts > /hosts\n", networkmode="none",
                   extrahosts="extra:1.2.3.4", nocache=1)
        self.assertEqual(self.shell("cat /nets /hosts"), "lo\n1.2.3.4\textra\n")

    def test_heredocs(self):
        self.built("FROM base\nENV N=v\nRUN <<EOF\necho one > /1\necho $N >> /1\nEOF\n"
                   "RUN cat > /2 <<A && cat > /3 <<'B'\nx $N\nA\ny $N\nB\n"
                   "RUN <<EOF\n#!/bin/cat\nscript\nEOF\nCOPY <<conf <<\"raw\" plain /c/\n"
                   "a=$N \"q\" it's\nconf\na=$N\nraw\nCOPY --chmod=755 <<EOF /name\nx\nEOF\n", file_("plain", b"p"))
        self.assertEqual(self.shell("cat /1 /2 /3; cat /c/conf /c/raw /c/plain /name"),
                         "one\nv\nx v\ny $N\na=v \"q\" it's\na=$N\npx\n")
        self.assertEqual(self.members()["name"].mode, 0o755)
        self.assertNotIn("dev/pydock-script", self.members())

    def test_stages(self):
        dockerfile = ("FROM base AS one\nRUN echo 1 > /f && chown 5:6 /f\nFROM base AS unused\nRUN exit 9\n"
                      "FROM one AS two\nRUN echo 2 >> /f\n"
                      "FROM scratch\nCOPY --from=two /f /g\nCOPY --from=0 /f /h\nCOPY --from=base /etc/passwd /\n")
        text = self.built(dockerfile)
        self.assertIn("Step 1/8 : FROM base AS one", text)
        self.assertNotIn("unused", text)
        files = self.members()
        self.assertEqual((files["g"].size, files["h"].size, files["g"].uid), (4, 2, 5))
        self.assertEqual({n for n in files if "/" not in n} - {"dev", "proc", "sys", "etc", ".dockerenv"},
                         {"g", "h", "passwd"})
        text = self.built(dockerfile, target="ONE")
        self.assertIn("Step 2/2", text)

    def test_platforms_on_scratch(self):
        """The image has the platform that the query or FROM names; a cached step of another platform is not used."""
        platforms = []
        for line, query in (("FROM scratch", {}), ("FROM scratch", {"platform": "linux/arm/v7"}),
                            ("FROM --platform=linux/s390x scratch", {})):
            self.built(line + "\nCOPY f /f\nENV A=1\n", file_("f", b"1"), **query)
            image = self.api.ok("GET", f"/images/{self.image}/json")
            platforms.append((image["Os"], image["Architecture"], image.get("Variant") or ""))
        self.assertEqual(platforms,
                         [("linux", pydock.ARCHITECTURE, ""), ("linux", "arm", "v7"), ("linux", "s390x", "")])

    def test_targets_that_are_not_there(self):
        dockerfile = "FROM base\n"
        message, _ = self.build(dockerfile, target="nosuch", status=400)
        self.assertIn("failed to reach build target nosuch in Dockerfile", message)

    def test_stages_that_cannot_be(self):
        for dockerfile, part in (("FROM below AS above\nFROM above AS below\n", "circular"),
                                 ("FROM base AS a\nCOPY --from=a /x /y\n", "circular"),
                                 ("FROM base\nCOPY --from=1 /x /y\n", "invalid"),
                                 ("FROM base\nCOPY --from=later /x /y\nFROM base AS later\nCOPY --from=0 /x /y\n",
                                  "later in the file")):
            with self.subTest(dockerfile):
                text, error = self.build(dockerfile, status=200 if dockerfile.startswith("FROM below ") else 400)
                self.assertIn(part, error or text)

    def test_arguments(self):
        dockerfile = ("ARG TAG=latest\nARG GLOBAL=g\nFROM base:$TAG\nARG GLOBAL\nARG WITH=default\nARG WITHOUT\n"
                      "ARG TARGETARCH\nENV FIXED=env\nARG FIXED=arg\n"
                      "RUN echo $GLOBAL $WITH ${WITHOUT-unset} $FIXED $TARGETARCH $HTTP_PROXY > /x\n")
        self.built(dockerfile)
        machine = pydock.ARCHITECTURE
        self.assertEqual(self.shell("cat /x"), f"g default unset env {machine}\n")
        text = self.built(dockerfile, buildargs={"WITH": "w", "WITHOUT": None, "GLOBAL": "G", "UNKNOWN": "1",
                                                 "HTTP_PROXY": "http://p"})
        self.assertEqual(self.shell("cat /x"), f"G w unset env {machine} http://p\n")
        self.assertIn("[Warning] One or more build-args [UNKNOWN] were not consumed\n", text)
        self.assertNotIn("http://p", json.dumps(self.api.ok("GET", f"/images/{self.image}/history")))
        self.assertFalse(any("WITH" in e or "PROXY" in e for e in self.config()["Env"]))
        text = self.built(dockerfile, buildargs={"WITH": "w", "GLOBAL": "G", "HTTP_PROXY": "http://other"})
        self.assertIn("Using cache", text.rpartition("Step")[2])
        text = self.built(dockerfile, buildargs={"WITH": "other", "GLOBAL": "G"})
        self.assertNotIn("Using cache", text.rpartition("Step")[2])

    def test_mounts(self):
        self.built("FROM base AS one\nRUN mkdir /data && echo from-one > /data/f\nFROM base\n"
                   "RUN --mount=type=cache,target=/cache,id=../../etc echo 1 >> /cache/n; cat /cache/n > /count\n"
                   "RUN --mount=type=bind,target=/ctx cat /ctx/file > /a; ! touch /ctx/new\n"
                   "RUN --mount=type=bind,from=one,source=/data,target=/b/c,rw touch /b/c/new && cp /b/c/f /c\n"
                   "RUN --mount=type=tmpfs,target=/t,size=1m grep ' /t tmpfs' /proc/mounts > /m && touch /t/x\n",
                   file_("file", b"content\n"))
        self.assertEqual(self.shell("cat /count /a /c; ls -d /cache /ctx /b /t 2>&1 | grep -vc 'No such'; wc -l < /m"),
                         "1\ncontent\nfrom-one\n0\n1\n")
        self.built("FROM base\n"
                   "RUN --mount=type=cache,target=/cache,id=../../etc echo 1 >> /cache/n; cat /cache/n > /count2\n")
        self.assertEqual(self.shell("cat /count2"), "1\n1\n")
        usage = self.api.ok("GET", "/system/df")["BuildCache"]
        self.assertEqual([(u["Type"], u["InUse"]) for u in usage], [("exec.cachemount", False)])
        gone = self.api.ok("POST", "/build/prune")
        self.assertEqual(gone["CachesDeleted"][:1], [usage[0]["ID"]])
        self.assertEqual(self.api.ok("GET", "/system/df")["BuildCache"], [])

    def test_options_of_mounts(self):
        """Every option of docs.docker.com/reference/dockerfile, "RUN --mount"."""
        mount = "stat -c '%a %u:%g'"
        self.built("FROM base AS seed\nRUN mkdir -p /s/sub && echo seed > /s/sub/f\nFROM base\n"
                   "ARG WHERE=there\nWORKDIR /w\n"
                   "RUN --mount=type=cache,target=/c,id=o1,mode=0711,uid=5,gid=6 " + mount + " /c > /1; touch /c/kept\n"
                   "RUN --mount=type=cache,target=/c,id=o1,ro ls /c >> /1; ! touch /c/x\n"
                   "RUN --mount=type=cache,dst=rel,id=o1,readonly=false ls /w/rel >> /1\n"
                   "RUN --mount=type=cache,target=/c,from=seed,source=/s,sharing=locked cat /c/sub/f >> /1; "
                   "echo more >> /c/sub/f\n"
                   "RUN --mount=type=cache,target=/c,from=seed,source=/s cat /c/sub/f >> /1; true again\n"
                   "RUN --mount=from=seed,src=/s/sub/f,target=/$WHERE/f cat /there/f >> /1; ! echo x > /there/f\n"
                   "RUN --mount=type=bind,from=seed,source=s,target=/b,readwrite echo x > /b/sub/f; "
                   "cat /b/sub/f >> /1\n"
                   "RUN --mount=type=bind,from=seed,source=s,target=/b cat /b/sub/f >> /1\n"
                   "RUN --mount=type=tmpfs,target=/t,size=64k df -k /t | awk 'END {print $2}' >> /1\n")
        self.assertEqual(self.shell("cat /1; ls -d /c /b /t /there /w/rel 2>/dev/null"),
                         "711 5:6\nkept\nkept\nseed\nseed\nmore\nseed\nx\nseed\n64\n")
        for options, part in (("type=cache,target=/,id=x", "invalid specification: destination can't be '/'"),
                              ("type=tmpfs,target=/proc", "cannot be mounted because it is inside /proc"),
                              ("type=cache,target=/x/../sys/fs", "cannot be mounted because it is inside /sys"),
                              ("type=tmpfs,target=/t,size=x", "nvalid size"),
                              ("type=secret,id=x,required=maybe", "invalid value for required: maybe"),
                              ("type=ssh", "forwards no SSH agent")):
            with self.subTest(options):
                self.assertIn(part, self.build(f"FROM base\nRUN --mount={options} true\n", status=400)[0])
        self.fails("is no folder", "FROM base\nRUN --mount=type=cache,target=/c,from=base,source=/etc/passwd true\n")
        inside = 'RUN --mount: invalid specification: "/proc/sys" cannot be mounted because it is inside /proc'
        self.fails(inside, "FROM base\nWORKDIR /proc\nRUN --mount=type=tmpfs,target=sys true\n")

    def test_options_of_secrets(self):
        secrets = {"key": base64.b64encode(b"s3cret").decode()}
        data = tar_of(file_("Dockerfile", b"FROM base\n"
                            b"RUN --mount=type=secret,id=key,target=/k/e/y,mode=0640,uid=7,gid=8,required "
                            b"stat -c '%a %u:%g' /k/e/y > /1; cat /k/e/y | wc -c >> /1\n"
                            b"RUN --mount=type=secret,target=/else/key cat /else/key | wc -c >> /1\n"
                            b"RUN --mount=type=secret,id=key,env=BOTH,target=/k test $BOTH = $(cat /k)\n"))
        encoded = base64.urlsafe_b64encode(json.dumps(secrets).encode()).decode()
        _, error = self.send(data, headers={"X-Pydock-Secrets": encoded})
        self.assertIsNone(error)
        self.assertEqual(self.shell("cat /1; ls -d /k /else 2>/dev/null"), "640 7:8\n6\n6\n")

    def test_sharing_of_caches(self):
        """Two stages use a cache at the same time: with `shared` both have the same folder, with `private` each has its
        own, with `locked` one waits for the other."""
        def count(sharing):
            step = (f"RUN --mount=type=cache,target=/c,id={sharing},sharing={sharing} echo x >> /c/n; sleep 0.3; "
                    "test -e /c/busy && echo overlap >> /c/n; touch /c/busy; sleep 0.3; rm -f /c/busy; "
                    "wc -l < /c/n > /count; echo ")  # what follows makes the two steps differ
            self.built(f"FROM base AS one\n{step}1\nFROM base AS two\n{step}2\n"
                       "FROM base\nCOPY --from=one /count /1\nCOPY --from=two /count /2\n")
            return sorted(self.shell("cat /1 /2").split())
        self.assertEqual(count("private"), ["1", "1"])
        self.assertEqual(count("locked"), ["1", "2"])
        self.assertIn(count("shared")[1], ("2", "3"))

    def test_a_changed_bind_source_is_no_cache_hit(self):
        dockerfile = "FROM base\nRUN --mount=type=bind,source=f,target=/f cat /f > /out\n"
        for content in (b"1", b"2", b"1"):
            self.built(dockerfile, file_("f", content))
            self.assertEqual(self.shell("cat /out"), content.decode())

    def test_secrets(self):
        dockerfile = ("FROM base\nRUN --mount=type=secret,id=key test \"$(cat /run/secrets/key)\" = s3cret && "
                      "stat -c %a /run/secrets/key > /mode\n"
                      "RUN --mount=type=secret,id=key,env=KEY test $KEY = s3cret\n"
                      "RUN --mount=type=secret,id=none ! test -e /run/secrets/none\n")
        secrets = json.dumps({"key": base64.b64encode(b"s3cret").decode()}).encode()
        headers = {"X-Pydock-Secrets": base64.urlsafe_b64encode(secrets).decode()}
        data = tar_of(file_("Dockerfile", dockerfile.encode()))
        _, error = self.send(data, headers=headers)
        self.assertIsNone(error)
        self.assertEqual(self.shell("cat /mode; test -e /run/secrets || echo gone"), "400\ngone\n")
        paths = run_program(["grep", "-rl", "s3cret", self.daemon.root]).out.splitlines()
        # the text of the instruction, which contains the word too, is in the image's configuration, named by its digest
        self.assertEqual([path for path in paths if "sha256" not in path.replace(self.daemon.root, "")], [])
        self.assertNotIn("s3cret", self.daemon.log_text(self.log_start))
        self.fails("secret other: not found", "FROM base\nRUN --mount=type=secret,id=other,required=true true\n")
        headers["X-Pydock-Secrets"] = base64.urlsafe_b64encode(b'{"../../proc/version": "czNjcmV0"}').decode()
        dockerfile = b"FROM base\nRUN --mount=type=secret,id=../../proc/version true\n"
        _, error = self.send(tar_of(file_("Dockerfile", dockerfile)), headers=headers)
        self.assertIn('RUN --mount: invalid specification: "/proc/version" cannot be mounted', error or "no error")

    def test_limits_reach_the_step(self):
        self.built("FROM base\nRUN ulimit -n > /n; df -k /dev/shm | tail -1 | awk '{print $2}' > /shm; "
                   "cat /sys/fs/cgroup/memory*/memory.limit_in_bytes /sys/fs/cgroup/memory.max "
                   "> /mem 2>/dev/null; true\n",
                   ulimits='[{"Name":"nofile","Soft":123,"Hard":123}]', shmsize=1 << 20, memory=64 << 20)
        self.assertEqual(self.shell("cat /n /shm /mem"), "123\n1024\n67108864\n")
        self.build("FROM base\n", memory="x", status=400)

    def test_squash(self):
        self.built("FROM base\nRUN echo 1 > /a && rm /etc/group\nRUN rm /a && echo 2 > /b\nENV X=1\n", squash=1,
                   t="sq:1")
        layers = [len(self.api.ok("GET", f"/images/{name}/json")["RootFS"]["Layers"]) for name in ("base", "sq:1")]
        self.assertEqual(layers[1], layers[0] + 1)
        self.assertEqual(self.shell("cat /b; ls /a /etc/group 2>&1 | wc -l; echo $X", "sq:1"), "2\n2\n1\n")

    def test_keeping_containers(self):
        self.built("FROM base\nRUN echo x > /f\n", rm=0, nocache=1)
        container, = self.api.ok("GET", "/containers/json", all=1)
        self.assertEqual(self.shell("cat /f"), "x\n")
        self.api.ok("DELETE", "/containers/" + container["Id"])
        text = self.fails("returned a non-zero code: 3 (Dockerfile, line 4)",
                          "FROM base\n\nENV A=1\nRUN echo x > /f; exit 3\n")
        self.assertEqual(self.error["errorDetail"]["code"], 3)
        self.assertNotIn("Successfully", text)
        container, = self.api.ok("GET", "/containers/json", all=1)  # a failed step's container stays, as with docker
        self.assertIn(container["Id"][:12], text)
        self.api.ok("DELETE", "/containers/" + container["Id"])
        self.fails("code: 3", "FROM base\nRUN exit 3\n", forcerm=1)
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])


class BuildWithLxcTest(WithLxc, BuildTest):
    pass


class BuildStagesTest(BuildCase):
    """Stages that do not need each other are built at the same time."""
    own = True  # the tests look at all containers of the daemon

    @staticmethod
    def meeting(cache, own, other):
        """A RUN instruction that makes the file `own` in a cache, waits for the file `other` of another stage, and goes
        on with the text that follows."""
        return (f"RUN --mount=type=cache,target=/c,id={cache} touch /c/{own}; "
                f"for i in $(seq 600); do test -e /c/{other} && break; sleep 0.05; done; ")

    def test_at_once_and_told_in_order(self):
        """Each of two stages waits for the other one; the stream has their steps one stage after the other."""
        dockerfile = ("FROM base AS one\n" + self.meeting("meet", 1, 2)
                      + "test -e /c/2 && echo first > /f\nRUN echo 1-more\n"
                      "FROM base AS two\n" + self.meeting("meet", 2, 1)
                      + "test -e /c/1 && echo second > /f\nRUN echo 2-more\n"
                      "FROM scratch\nCOPY --from=one /f /1\nCOPY --from=two /f /2\n")
        text = self.built(dockerfile)
        self.assertEqual([int(n) for n in re.findall(r"^Step (\d+)/9 : ", text, re.M)], list(range(1, 10)))
        lines = [line for line in text.splitlines() if line.startswith("Step ") or line in ("1-more", "2-more")]
        self.assertEqual([lines.index("1-more"), lines.index("2-more")], [3, 7])
        self.assertEqual({name: member.size for name, member in self.members().items() if name in "12"},
                         {"1": 6, "2": 7})
        aux = [message["aux"]["ID"] for message in self.messages if "aux" in message]
        self.assertEqual((len(aux), aux[-1]), (3, self.image))
        text = self.built(dockerfile)
        self.assertEqual(text.count("Using cache"), 6)

    def test_a_failure_ends_the_others(self):
        text = self.fails("returned a non-zero code: 9 (Dockerfile, line 7)",
                          "FROM base AS one\n" + self.meeting("fail", 1, 2)
                          + "echo here; sleep 600\nRUN echo never\n"
                          "FROM base AS two\nRUN echo of two\n\n" + self.meeting("fail", 2, 1)
                          + "echo dying; exit 9\n"
                          "FROM base\nRUN echo last\nCOPY --from=one / /1\nCOPY --from=two / /2\n")
        self.assertRegex(text, r"(?s)Step 1/.*Step 4/\d+ : FROM base AS two.*of two\n.*Step 6/.*dying\n$")
        self.assertNotIn("never", text.replace("RUN echo never", ""))
        left = self.api.ok("GET", "/containers/json", all=1)
        self.assertEqual([c["State"] for c in left], ["exited"])  # only the failed step's container stays
        self.assertEqual(os.listdir(os.path.join(self.daemon.root, "tmp")), [])

    def test_cancel_ends_all(self):
        dockerfile = ("FROM base AS one\nRUN echo 1; sleep 600\nFROM base AS two\nRUN echo 2; sleep 600\n"
                      "FROM one\nCOPY --from=two / /x\n")
        with self.api.stream("POST", "/build", tar_of(file_("Dockerfile", dockerfile.encode())),
                             {"Content-Type": "application/x-tar"}, buildid="both") as response:
            eventually(lambda: len(self.api.ok("GET", "/containers/json")) == 2)
            self.api.ok("POST", "/build/cancel", id="both")
            self.assertIn(b"build cancelled", response.read())
        eventually(lambda: not self.api.ok("GET", "/containers/json", all=1)
                   and not os.listdir(os.path.join(self.daemon.root, "tmp")))

    def test_the_same_step_is_made_once(self):
        step = "RUN --mount=type=cache,target=/c,id=once echo x >> /c/n; sleep 0.3; wc -l < /c/n > /count\n"
        text = self.built("FROM base AS one\n" + step + "FROM base AS two\n" + step + "FROM base AS three\n" + step
                          + "FROM scratch\nCOPY --from=one /count /1\nCOPY --from=two /count /2\n"
                            "COPY --from=three /count /3\n")
        self.assertEqual(text.count("Using cache"), 2)
        self.assertEqual(len({message["aux"]["ID"] for message in self.messages if "aux" in message}), 2)

    def test_what_a_trigger_needs(self):
        """ONBUILD COPY --from=STAGE: pydock learns that the stage is needed only when it has the image."""
        self.built("FROM base\nONBUILD COPY --from=maker /made /got\n", t="trigger:1")
        dockerfile = ("FROM base AS unused\nRUN false\nFROM base AS maker\nRUN sleep 0.3; echo m > /made\n"
                      "FROM trigger:1\nRUN cat /got\n")
        self.assertIn("\nm\n", self.built(dockerfile))
        dockerfile = ("FROM base AS maker\nRUN echo n > /made\n"
                      "FROM base AS mother\nONBUILD COPY --from=maker /made /got\n"
                      "ONBUILD RUN <<EOF\ncat /got - <<X\nwithin\nX\nEOF\nFROM mother\nRUN true\n")
        self.assertIn("\nn\nwithin\n", self.built(dockerfile))

    def test_many_stages(self):
        count = 40
        stages = "".join(f"FROM base AS s{i}\nRUN echo {i} > /n\n" for i in range(count))
        copies = "".join(f"COPY --from=s{i} /n /{i}\n" for i in range(count))
        text = self.built(stages + "FROM scratch\n" + copies)
        self.assertEqual([int(n) for n in re.findall(r"^Step (\d+)/", text, re.M)], list(range(1, 3 * count + 2)))
        self.assertTrue({str(i) for i in range(count)} <= set(self.members()))


class BuildHostTest(BuildCase):
    """FROM host, with a small tree as the host's root (--host-root) and the data root inside that tree."""

    @classmethod
    def setUpClass(cls):
        cls.tree = tempfile.mkdtemp(dir=SCRATCH)
        pydock.make_root(cls.tree)
        write(cls.tree + "/data/file", "of the host\n")
        write(cls.tree + "/run/secret", "x")
        cls.daemon = Daemon("build-host", "--host-root", cls.tree, root=cls.tree + "/var/lib/data-root").start()
        cls.addClassCleanup(shutil.rmtree, cls.tree)
        cls.addClassCleanup(cls.daemon.cleanup)

    def test_from_host(self):
        self.built("FROM host\nRUN echo more >> /data/file\nCOPY f /f\n", file_("f", b"1"), t="of-host:1")
        write(self.tree + "/data/file", "changed\n")
        self.assertEqual(self.shell("cat /data/file; ls /run; ls /var/lib/data-root | wc -l"), "of the host\nmore\n0\n")
        self.assertEqual(read(self.tree + "/data/file"), "changed\n")

    def test_copy_from_host(self):
        self.built("FROM scratch\nCOPY --from=host /data /run /all/\nCOPY --from=host / /root/\n")
        files = self.members()
        self.assertIn("all/file", files)
        self.assertNotIn("all/secret", files)
        self.assertFalse([n for n in files if n.startswith("root/var/lib/data-root/")])


class BuildCacheTest(BuildCase):
    def test_what_counts(self):
        dockerfile = "FROM base\nCOPY d /d\nRUN true\n"
        members = [folder("d"), file_("d/a", b"1", mtime=5)]
        self.built(dockerfile, *members)
        for hit, changed in ((True, [folder("d", mtime=9), file_("d/a", b"1", mtime=1000, uid=9)]),
                             (False, [folder("d"), file_("d/a", b"2")]),
                             (False, [folder("d"), file_("d/a", b"1", mode=0o755)]),
                             (False, [folder("d"), file_("d/b", b"1")]),
                             (False, [folder("d"), file_("d/a", b"1"), symlink("d/l", "x")]), (True, members)):
            with self.subTest(changed=changed):
                self.assertEqual(" ---> Using cache" in self.built(dockerfile, *changed).split("Step 2")[1], hit)

    def test_what_did_not_change_stays(self):
        self.built("FROM base\nRUN date +%N > /now\nCOPY f /f\nRUN cat /f\n", file_("f", b"1"))
        first = self.shell("cat /now")
        text = self.built("FROM base\nRUN date +%N > /now\nCOPY f /f\nRUN cat /f\n", file_("f", b"2"))
        self.assertEqual((self.shell("cat /now"), text.count("Using cache")), (first, 1))

    def test_config_counts(self):
        """ENTRYPOINT clears the CMD of the base image, but not a CMD of the same stage. Both builds have the same step
        on images that look alike, and the cache must tell them apart."""
        self.built("FROM base\nCMD [\"c\"]\n", t="conf:1")
        self.built("FROM base\nCMD [\"c\"]\nENTRYPOINT [\"e\"]\n")
        self.assertEqual(self.config()["Cmd"], ["c"])
        text = self.built("FROM conf:1\nENTRYPOINT [\"e\"]\n")
        self.assertNotIn("Using cache", text)
        self.assertIsNone(self.config()["Cmd"])

    def test_loaded_images_are_no_cache(self):
        """CVE-2024-24557: a loaded image is not taken for a cached step, even if its history says that it is one."""
        self.built("FROM scratch\nCOPY f /f\n", file_("f", b"good"), t="poison:1")
        saved = self.api.get("/images/poison:1/get").body
        self.api.ok("DELETE", "/images/poison:1")
        self.assertNotIn("Using cache", self.built("FROM scratch\nCOPY f /f\n", file_("f", b"good"), nocache=1,
                                                   t="other:1"))
        self.daemon.remove_all()
        self.assertEqual(self.api.post("/images/load", saved).status, 200)
        self.assertNotIn("Using cache", self.built("FROM scratch\nCOPY f /f\n", file_("f", b"good")))

    def test_cache_from(self):
        dockerfile = "FROM base\nRUN date +%N > /now\nENV A=1\nCOPY f /f\nCMD [\"x\"]\n"
        self.built(dockerfile, file_("f", b"1"), t="cf:1")
        first, config = self.shell("cat /now"), self.config()
        saved = self.api.get("/images/cf:1/get").body
        self.daemon.remove_all()
        self.assertEqual(self.api.post("/images/load", saved).status, 200)
        text = self.built(dockerfile, file_("f", b"1"), cachefrom='["nosuch:1","cf:1"]')
        self.assertEqual((text.count("Using cache"), self.shell("cat /now"), self.config()), (4, first, config))
        text = self.built(dockerfile, file_("f", b"2"), cachefrom='["cf:1"]', nocache=0)
        self.assertEqual(text.count("Using cache"), 2)

    def test_reproducible(self):
        """SOURCE_DATE_EPOCH: the same context gives the same image, whatever the times of its files are and whenever it
        is built."""
        dockerfile = ("FROM scratch AS tools\nFROM base\nARG SOURCE_DATE_EPOCH\nRUN mkdir /made && echo x > /made/f\n"
                      "COPY d /d\nWORKDIR /new\nADD t.tar /t/\n")
        ids = []
        for number in range(2):
            packed = tar_of(file_("in", b"1", mtime=100))
            self.built(dockerfile, folder("d", mtime=number * 5), file_("d/a", b"1", mtime=2 * 10 ** 9 + number),
                       file_("d/b", b"", mtime=number), file_("t.tar", packed, mtime=number), nocache=1,
                       buildargs={"SOURCE_DATE_EPOCH": "1000000000"}, t=f"rep:{number}")
            ids.append(self.image)
            files = self.members()
            self.assertLessEqual(max(files[n].mtime for n in ("d/a", "made/f", "made", "new", "d", "t/in")), 10 ** 9)
            self.assertEqual(self.api.ok("GET", f"/images/rep:{number}/json")["Created"], "2001-09-09T01:46:40Z")
        self.assertEqual(ids[0], ids[1])
        self.build("FROM base\n", buildargs={"SOURCE_DATE_EPOCH": "x"}, status=400)

    def test_the_same_image_elsewhere(self):
        """SOURCE_DATE_EPOCH: another daemon on another data root makes the same image, in whatever order its stages are
        finished."""
        other = Daemon("elsewhere", image=False)
        self.addCleanup(other.cleanup)
        other.start()
        self.assertEqual(other.api.post("/images/load", self.api.get("/images/base/get").body).status, 200)
        dockerfile = ("FROM base AS one\nRUN mkdir /made && echo x > /made/f && ln /made/f /made/h && ln -s f /made/l\n"
                      "RUN rm /etc/group; rm -r /home && mkdir /home && touch /home/new; chmod 700 /made\n"
                      "FROM base AS two\nRUN sleep 0.1; date > /d && rm /d; true\nFROM one\nCOPY --chown=3:4 d /d\n"
                      "COPY --from=two / /two\nWORKDIR /w\nADD t.tar /t/\nRUN hostname > /h; id > /i\n"
                      "ENV A=1\nLABEL b=c\n")
        members = (folder("d"), file_("d/a", b"1", mode=0o4755), symlink("d/l", "a"),
                   file_("t.tar", tar_of(file_("in"))))
        ids = []
        for self.api in (other.api, self.api):
            self.built(dockerfile, *members, buildargs={"SOURCE_DATE_EPOCH": "1000000000"}, nocache=1)
            ids.append(self.image)
        self.assertEqual(ids[0], ids[1])

    def test_prune(self):
        self.fails("code: 1", "FROM base\nRUN echo 1 > /a\nRUN exit 1\n", forcerm=1)
        self.built("FROM base\nENV K=1\n", t="kept:1")
        before = {image["Id"] for image in self.api.ok("GET", "/images/json", all=1)}
        pruned = self.api.ok("POST", "/build/prune")
        left = {image["Id"] for image in self.api.ok("GET", "/images/json", all=1)}
        self.assertEqual(before - left, set(pruned["CachesDeleted"]) & before)
        self.assertEqual(len(before - left), 1)
        self.assertIn("Using cache", self.built("FROM base\nENV K=1\n"))
        self.api.ok("POST", "/build/prune", all=1)
        self.assertNotIn("Using cache", self.built("FROM base\nENV K=1\n"))


class BuildRefusalTest(BuildCase):
    def test_before_the_first_step(self):
        for dockerfile, status, part in ((None, 500, "Cannot locate specified Dockerfile: Dockerfile"),
                                         ("", 400, "the Dockerfile (Dockerfile) cannot be empty"),
                                         ("# c\n", 400, "file with no instructions"),
                                         ("RUN x\n", 400, "no build stage in current context"),
                                         ("FROM base\nRUNN x\n", 400, "dockerfile parse error on line 2: "
                                                                      "unknown instruction: RUNN (did you mean RUN?)")):
            with self.subTest(dockerfile):
                message, _ = self.build(dockerfile, status=status)
                self.assertIn(part, message)
        self.assertIn("forbidden path outside", self.build("FROM base", dockerfile="../x", status=400)[0])
        self.assertIn("Cannot locate specified Dockerfile: other",
                      self.build("FROM base", dockerfile="other", status=500)[0])
        self.assertIn("invalid reference", self.build("FROM base", t="UPPER:x:y", status=400)[0])
        self.assertIn("DOCKER_BUILDKIT=0", self.build("FROM base", version="2", status=400)[0])
        self.assertIn("JSON", self.build("FROM base", buildargs="[", status=400)[0])
        self.assertIn("not a valid tar", self.send(b"this is no tar archive" * 100, 400)[0])
        self.assertIn("the names in the archive need more than", self.send(gzip.compress(tar_of(
            file_("Dockerfile", b"FROM base\n"),
            *(symlink(f"{number}", "x" * 4000) for number in range(9000)))), 400)[0])
        hole = file_("hole", pax={"GNU.sparse.map": "0,0", "GNU.sparse.size": str(8 << 40)})
        self.assertIn("larger than the", self.send(tar_of(file_("Dockerfile", b"FROM base\n"), hole), 400)[0])
        cut = tar_of(file_("Dockerfile", b"FROM base\n"), file_("big", b"x" * 100000))[:60000]
        self.assertIn("archive", self.send(cut, 400)[0])

    def test_steps(self):
        for instruction, part in (
                ("COPY nope /x", "COPY failed: file not found in build context or excluded by .dockerignore: "
                                 "stat nope: file does not exist (Dockerfile, line 2)"),
                ("COPY ../x /x", "COPY failed: forbidden path outside the build context: ../x ()"),
                ("COPY a* /x/", "no source files were specified"),
                ("COPY Dockerfile d /x", "destination must be a directory and end with a /"),
                ("EXPOSE abc", "nvalid containerPort: abc"), ("EXPOSE 99999", "nvalid containerPort: 99999"),
                ("STOPSIGNAL FOO", "Invalid signal: FOO"),
                ("COPY --from=base /nosuch /x", "COPY failed: stat nosuch: file does not exist"),
                ("RUN nosuchcommand", "code: 127"),
                ('RUN ["nosuch"]', 'exec: "nosuch": executable file not found in $PATH'),
                ("COPY --chmod=9 d /x", "invalid chmod"), ("COPY d /etc/passwd", "no directory"),
                ("ADD ftp://127.0.0.1/x /x", "failed"), ("ADD http://127.0.0.1:1/x /x", "Connection refused"),
                ("ENV A='x", "single-quote"), ("WORKDIR /etc/passwd", "not a directory"),
                ("RUN --mount=type=bind,source=nope,target=/x true", "nope")):
            with self.subTest(instruction):
                self.fails(part, f"FROM base\n{instruction}\n", folder("d"))
        self.fails("No image was generated", "FROM scratch\n")
        self.assertEqual([c for c in self.api.ok("GET", "/containers/json", all=1) if c["State"] != "exited"
                          and c["State"] != "created"], [])

    def test_what_dockerignore_left_out(self):
        self.fails("(line 2 of .dockerignore leaves it out: *.log)", "FROM base\nCOPY a.log /x\n",
                   file_(".dockerignore", b"# x\n*.log\n"))
        self.built("FROM base\nCOPY . /x\n", file_(".dockerignore", b"Dockerfile\n.dockerignore\n"), file_("a"))
        self.assertEqual(sorted(n for n in self.members() if n.startswith("x/")), ["x/a"])

    def test_nothing_leads_out(self):
        """CVE-2014-6407, CVE-2026-44517 and the like: with hostile links in the context or the image, a build still
        writes only to the image and reads only from the context."""
        outside = self.folder(sentinel="untouched")
        for members, instruction in (
                ([symlink("l", outside + "/sentinel")], "COPY l /x"), ([symlink("l", outside)], "COPY l/sentinel /x"),
                ([symlink("l", "../../../../../../.." + outside)], "COPY l /x"),
                ([symlink("a", "b"), symlink("b", "a")], "COPY a /x")):
            with self.subTest(instruction):
                self.fails("file does not exist", f"FROM base\n{instruction}\n", *members)
        self.built(f"FROM base\n"
                   f"RUN ln -s {outside} /out && ln -s / /root-link && ln -s ../../../../../../../../tmp /up\n"
                   "COPY f /out/f\nCOPY f /root-link/here\nCOPY d /up/\nADD t.tar /out/\n",
                   file_("f", b"1"), folder("d"), file_("d/g", b""),
                   file_("t.tar", tar_of(symlink("e", outside), file_("e/evil", b""), file_("h", b""))))
        files = self.members()
        self.assertEqual(os.listdir(outside), ["sentinel"])
        for name in ("here", "tmp/g", outside.strip("/") + "/f", outside.strip("/") + "/evil"):
            self.assertIn(name, files)
        message, _ = self.send(tar_of(symlink("Dockerfile", "/etc/passwd")), 500)
        self.assertIn("Cannot locate", message)
        message, _ = self.send(tar_of(symlink("d", outside), file_("d/evil", b""), file_("Dockerfile", b"FROM base\n")),
                               400)
        self.assertIn("no directory", message)
        message, _ = self.send(tar_of(file_("../evil", b""), file_("Dockerfile", b"FROM base\n")), 400)
        self.assertIn("leads out", message)
        self.assertEqual(read(outside + "/sentinel"), "untouched")

    def test_odd_contexts(self):
        fifo = tarfile.TarInfo("fifo")
        fifo.type = tarfile.FIFOTYPE
        name = b"\xff\xfe".decode("utf-8", "surrogateescape")
        self.built("FROM base\nCOPY . /x/\nRUN ls /x | wc -l > /n\n", file_(name, b"1"), (fifo, b""),
                   file_("sub/implied", b""))
        self.assertEqual(self.shell("cat /n; test -p /x/fifo && echo fifo"), "4\nfifo\n")
        data = tar_of(file_("Dockerfile", b"FROM base\nCOPY f /f\n"), file_("f", b"z" * 10))
        for compress in (gzip.compress, bz2.compress, lzma.compress):
            _, error = self.send(compress(data))
            self.assertIsNone(error)

    def test_add_of_files_that_are_no_archives(self):
        self.built("FROM base\nADD a.gz b.tar empty /x/\n", file_("a.gz", gzip.compress(b"no tar")),
                   file_("b.tar", b"text"), file_("empty", b""))
        self.assertEqual(self.shell("ls /x"), "a.gz\nb.tar\nempty\n")
        broken = gzip.compress(tar_of(file_("one", os.urandom(100000))))[:-20000]
        self.fails("ADD failed:", "FROM base\nADD t.tgz /x/\n", file_("t.tgz", broken))

    def test_a_large_context_takes_no_memory(self):
        member = tarfile.TarInfo("big")
        member.size = 2 << 30
        head, tail = member.tobuf(), tar_of(file_("Dockerfile", b"FROM scratch\nCOPY Dockerfile /\n"))

        class Stream:
            parts = [head] + [bytes(1 << 20)] * 2048 + [tail]

            def read(self, size=-1):
                return self.parts.pop(0) if self.parts else b""
        with open(f"/proc/{self.daemon.process.pid}/clear_refs", "w") as peak:
            peak.write("5")  # resets VmHWM, the peak of the resident memory
        _, error = self.send(Stream())
        self.assertIsNone(error)
        peak = int(re.search(r"VmHWM:\s+(\d+)", read(f"/proc/{self.daemon.process.pid}/status")).group(1))
        self.assertLess(peak, 120 << 10)
        self.assertEqual(os.listdir(os.path.join(self.daemon.root, "tmp")), [])

    def test_many_instructions(self):
        """Each step makes an image that has the history of all steps before. Not all of these images stay in memory."""
        def resident():
            return int(re.search(r"VmRSS:\s+(\d+)", read(f"/proc/{self.daemon.process.pid}/status")).group(1))
        before = resident()
        self.built("FROM base\n" + "".join(f"ENV A{i}={i}\n" for i in range(1000)))
        self.assertIn("A999=999", self.config()["Env"])
        self.assertEqual(len(self.api.ok("GET", f"/images/{self.image}/history")), 1001)
        self.assertLess(resident() - before, 60 << 10)

    def test_expansion_bomb(self):
        self.fails("larger than", "FROM base\nENV a=xxxxxxxxxxxxxxxx\n" + "ENV a=$a$a\n" * 30)


class BuildCancelTest(BuildCase):
    own = True  # the tests look at all containers and temporary files of the daemon

    def begin(self, dockerfile, **query):
        """Start a build and read its response up to the output "started". Returns (the ExitStack that closes the
        connection, the response)."""
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        data = tar_of(file_("Dockerfile", dockerfile.encode()))
        response = stack.enter_context(self.api.stream("POST", "/build", data, {"Content-Type": "application/x-tar"},
                                                       **query))
        while b'"started' not in response.readline():
            pass
        return stack, response

    def nothing_left(self):
        eventually(lambda: not self.api.ok("GET", "/containers/json", all=1)
                   and not os.listdir(os.path.join(self.daemon.root, "tmp")), 10,
                   lambda: f"left: {os.listdir(os.path.join(self.daemon.root, 'tmp'))}")

    def test_the_client_goes_away(self):
        stack, _ = self.begin("FROM base\nRUN echo started; sleep 600\nRUN echo never > /x\n")
        stack.close()
        self.nothing_left()

    def test_cancel(self):
        _, response = self.begin("FROM base\nRUN echo started; sleep 600\n", buildid="mine")
        self.refused(409, self.api.call("POST", "/build", tar_of(file_("Dockerfile", b"FROM base\n")),
                                        {"Content-Type": "application/x-tar"}, buildid="mine"))
        self.api.ok("POST", "/build/cancel", id="mine")
        self.assertIn(b"build cancelled", response.read())
        self.nothing_left()
        self.refused(404, self.api.post("/build/cancel", id="mine"))

    def test_the_daemon_dies(self):
        self.built("FROM base\nRUN echo 1 > /a\n", t="done:1")
        self.begin("FROM base\nRUN echo 2 > /b\nRUN echo started; sleep 600\n")
        self.daemon.restart()
        self.nothing_left()
        self.assertEqual(self.shell("cat /a", "done:1"), "1\n")
        self.built("FROM base\nRUN echo 2 > /b\n")
        self.assertEqual(self.shell("cat /b"), "2\n")

    def test_images_in_use_stay(self):
        _, response = self.begin("FROM base\nENV X=1\nRUN echo started; sleep 1; echo y > /y\nCMD [\"z\"]\n",
                                 t="inuse:1")
        self.api.ok("POST", "/images/prune")
        self.api.ok("POST", "/build/prune")
        response.read()
        self.assertEqual(self.shell("cat /y", "inuse:1"), "y\n")


class BuildVfsTest(BuildCase):
    flags = ("-s", "vfs")

    def test_times(self):
        """SOURCE_DATE_EPOCH sets the times of the files that a step has changed. This driver copies the whole tree for
        each step, but the other files of the copy keep their times."""
        self.built("FROM base\nRUN echo 1 > /a\nCOPY f /f\n", file_("f", b"2"),
                   buildargs={"SOURCE_DATE_EPOCH": "1000000000"})
        self.assertEqual(self.members()["a"].mtime, 10 ** 9)
        sizes = [entry["Size"] for entry in self.api.ok("GET", f"/images/{self.image}/history")]
        self.assertEqual(sizes[:2], [1, 2])

    def test_build(self):
        self.built("FROM base\nRUN echo 1 > /a; rm /etc/group\nCOPY f /d/f\nWORKDIR /w\n"
                   "FROM scratch\nCOPY --from=0 /a /d /x/\n", file_("f", b"2"))
        self.assertEqual({n for n in self.members() if n.startswith("x/")}, {"x/a", "x/f"})
        self.built("FROM base\nRUN echo 1 > /a; rm /etc/group\nCOPY f /d/f\n", file_("f", b"2"))
        self.assertEqual(self.shell("cat /a /d/f; ls /etc/group 2>&1 | wc -l"), "1\n21\n")


class Files:
    """A web server on loopback that serves {path: (status, headers, body)}. `url` is its address."""

    def __init__(self, files):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, headers, body = files.get(self.path, (404, {}, b"no"))
                self.send_response(status)
                for name, value in dict({"Content-Length": str(len(body))}, **headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class BuildRemoteTest(BuildCase):
    def serve(self, **files):
        """Serve files and return the server's address. Each keyword is a file, `__` in its name stands for a dot; its
        value is the body or a tuple (status, headers, body)."""
        server = Files({"/" + name.replace("__", "."): value if isinstance(value, tuple) else (200, {}, value)
                        for name, value in files.items()})
        self.addCleanup(server.close)
        return server.url

    def test_add_url(self):
        packed = gzip.compress(tar_of(file_("in", b"")))
        url = self.serve(file__txt=(200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"text"), a__tgz=packed,
                         go=(302, {"Location": "/file.txt"}, b""),
                         meta=(302, {"Location": "http://169.254.169.254/latest"}, b""),
                         local=(302, {"Location": "file:///etc/passwd"}, b""),
                         short=(200, {"Content-Length": "100"}, b"only this"))
        self.built(f"FROM base\nADD {url}/file.txt /d/\nADD {url}/a.tgz /d/\nADD --chmod=644 {url}/go /moved\n"
                   f"ADD --checksum=sha256:{hashlib.sha256(b'text').hexdigest()} {url}/file.txt /sum\n")
        files = self.members()
        self.assertEqual((files["d/file.txt"].mode, files["d/file.txt"].mtime, files["moved"].mode),
                         (0o600, 1445412480, 0o644))
        self.assertEqual(files["d/a.tgz"].size, len(packed))
        self.assertEqual(self.shell("cat /moved"), "text")
        for name, part in (("nosuch", "status 404"), ("meta", "link-local"), ("local", "http"), ("short", "broke off")):
            with self.subTest(name):
                self.fails(part, f"FROM base\nADD {url}/{name} /x\n")
        self.fails("digest mismatch", f"FROM base\nADD --checksum=sha256:{'0' * 64} {url}/file.txt /x\n")
        self.built(f"FROM base\nADD --unpack {url}/a.tgz /u/\nADD --unpack=false t.tar /t/\nADD t.tar /t/\n",
                   file_("t.tar", gzip.decompress(packed)))
        self.assertEqual(self.shell("ls /u; ls /t"), "in\nin\nt.tar\n")

    def test_remote_contexts(self):
        context = tar_of(file_("Dockerfile", b"FROM base\nCOPY . /x\n"), file_("a", b"1"), file_("b", b"2"),
                         file_(".dockerignore", b"b\nDockerfile\n"))
        url = self.serve(c__tar__gz=gzip.compress(context), Dockerfile=b"FROM base\nRUN echo alone > /alone\n",
                         page=b"<html>")
        _, error = self.send(b"", remote=url + "/c.tar.gz")
        self.assertIsNone(error)
        self.assertEqual(self.shell("ls -A /x"), ".dockerignore\na\n")
        _, error = self.send(b"", remote=url + "/Dockerfile")
        self.assertIsNone(error)
        self.assertEqual(self.shell("cat /alone"), "alone\n")
        answer = self.api.call("POST", "/build", b"", {}, remote=url + "/nosuch")
        self.refused(400, answer, "404")
        self.refused(400, self.api.call("POST", "/build", b"", {}, remote="file:///etc/passwd"), "only http and https")

    @unittest.skipUnless(shutil.which("git"), "needs git")
    def test_git(self):
        base = self.folder()
        work = os.path.join(base, "repo.git")
        marker = os.path.join(base, "ran")
        git = functools.partial(self.git, base)
        git("init", "-q", work)
        os.mkdir(work + "/sub")
        write(work + "/sub/Dockerfile", "FROM base\nCOPY . /x\n")
        write(work + "/Dockerfile", "FROM base\nCOPY . /x\nCMD [\"top\"]\n")
        write(work + "/.gitattributes", "* filter=evil\n")
        git("-C", work, "add", ".")
        git("-C", work, "commit", "-qm", "1")
        git("-C", work, "branch", "side")
        for hook in ("post-checkout", "post-merge"):
            write(work + "/.git/hooks/" + hook, f"#!/bin/sh\ntouch {marker}\n", 0o755)
        url = self.serve_git(base) + "/repo.git"
        for remote, listing in ((url, ".gitattributes\nDockerfile\nsub\n"), (url + "#side:sub", "Dockerfile\n"),
                                (url + "#:sub", "Dockerfile\n")):
            with self.subTest(remote):
                _, error = self.send(b"", remote=remote)
                self.assertIsNone(error)
                self.assertEqual(self.shell("ls -A /x"), listing)
        answer = OldClient(self.daemon.socket).post("/build", remote=url, t="old")
        self.assertRegex(answer.body, b"^Step 1 : FROM base\n(?s:.*)\nSuccessfully built [0-9a-f]{12}\n$")
        commit = run_program(["git", "-C", work, "rev-parse", "HEAD"]).out.strip()
        self.built(f"FROM base\nADD --checksum={commit} {url}#side /1/\nADD --keep-git-dir=true {url} /2/\n")
        self.assertEqual(self.shell("ls -A /1; ls -A /2 | head -1"), ".gitattributes\nDockerfile\nsub\n.git\n")
        self.fails("digest mismatch " + commit, f"FROM base\nADD --checksum={'0' * 40} {url} /x/\n")
        self.assertFalse(os.path.exists(marker))
        for remote in (url + "#nosuch", url + "#--upload-pack=x", "git@x:--y"):
            answer = self.api.call("POST", "/build", b"", {}, remote=remote)
            self.assertGreaterEqual(answer.status, 400, remote)
        self.assertFalse(os.path.exists(marker))


BUILD_OPTIONS = (  # (words of the command line, Dockerfile after "FROM base", content of the built image's file /o)
    (("--add-host", "x.y:1.2.3.4"), "RUN grep x.y /etc/hosts > /o\n", "1.2.3.4\tx.y\n"),
    (("--build-arg", "A=1", "--build-arg", "FROM_ENVIRONMENT", "--build-arg", "UNSET"),
     "ARG A\nARG FROM_ENVIRONMENT\nARG UNSET=default\nRUN echo $A $FROM_ENVIRONMENT $UNSET > /o\n",
     "1 of the environment default\n"),
    (("--network", "none"), "RUN ls /sys/class/net > /o\n", "lo\n"),
    (("--shm-size", "1m", "--ulimit", "nofile=123:123"),
     "RUN ulimit -n > /o; df -k /dev/shm | awk 'END {print $2}' >> /o\n", "123\n1024\n"),
    (("--memory", "64m"),
     "RUN cat /sys/fs/cgroup/memory*/memory.limit_in_bytes /sys/fs/cgroup/memory.max > /o 2>/dev/null; true\n",
     "67108864\n"),
    (("--target", "two"), "RUN echo 1 > /o\nFROM base AS two\nRUN echo 2 > /o\nFROM base\nRUN false\n", "2\n"),
    (("--platform", "linux/" + pydock.ARCHITECTURE), "ARG TARGETPLATFORM\nRUN echo $TARGETPLATFORM > /o\n",
     f"linux/{pydock.ARCHITECTURE}\n"),
    (("--compress", "--pull=false", "--force-rm", "--cpu-shares", "512", "--cpuset-cpus", "0"), "RUN nproc > /o\n",
     "1\n"),
    (("--security-opt", "no-new-privileges"), "RUN grep NoNewPrivs /proc/self/status > /o\n", "NoNewPrivs:\t1\n"),
)


class BuildCommand(Commands):
    """The command `build` of both command lines."""

    def setUp(self):
        super().setUp()
        self.environment = {"DOCKER_BUILDKIT": "0"}

    def test_build_and_run(self):
        context = self.folder(Dockerfile="FROM base\nCOPY . /src\nRUN ls -A /src\nEXPOSE 8080\n"
                                         "CMD [\"cat\", \"/src/app\"]\n", app="Hello World\n", secret="x")
        write(context + "/.dockerignore", "secret\n")
        result = self.cli("build", "-t", "cmd/app", "-t", "cmd/app:2", "--label", "k=v", "--iidfile",
                          context + "/../id", context, **self.environment)
        self.assertRegex(result.out, "Sending build context to .* daemon +[0-9.]+k?B")
        self.assertIn("Step 5/6 : CMD", result.out)
        self.assertIn("Successfully tagged cmd/app:latest\n", result.out)
        self.assertNotIn("secret", result.out)
        self.assertEqual(self.cli("run", "--rm", "cmd/app").out, "Hello World\n")
        self.assertTrue(read(context + "/../id").startswith("sha256:"))
        result = self.cli("build", "-q", context, **self.environment)
        self.assertRegex(result.out, "^sha256:[0-9a-f]{64}\n$")

    def test_from_stdin(self):
        self.assertIn("Successfully built", self.cli("build", "-", input="FROM base\nRUN echo from stdin\n",
                                                     **self.environment).out)
        data = tar_of(file_("D", b"FROM base\nCOPY x /x\n"), file_("x", b"1"))
        self.assertIn("Successfully built", self.cli("build", "-f", "D", "-", input=gzip.compress(data),
                                                     **self.environment).out)

    def test_dockerfile_from_elsewhere(self):
        context, other = self.folder(a="1"), self.folder(D="FROM base\nCOPY . /x\nRUN ls -A /x > /list\n")
        self.cli("build", "-t", "else", "-f", other + "/D", context, **self.environment)
        self.assertEqual(self.cli("run", "--rm", "else", "grep", "-v", "dockerignore", "/list").out, "a\n")

    def test_failure(self):
        context = self.folder(Dockerfile="FROM base\nRUN exit 7\n")
        result = self.cli("build", context, code=(1, 7), **self.environment)
        self.assertIn("returned a non-zero code: 7", result.err)
        self.assertIn("RUNN", self.cli("build", self.folder(Dockerfile="FROM base\nRUNN x\n"), code=1,
                                       **self.environment).err)
        self.cli("build", self.folder(), code=1, **self.environment)

    def test_options(self):
        for words, dockerfile, expected in BUILD_OPTIONS:
            with self.subTest(words):
                context = self.folder(Dockerfile="FROM base\n" + dockerfile)
                self.cli("build", "-t", "opt", *words, context, FROM_ENVIRONMENT="of the environment",
                         **self.environment)
                self.assertEqual(self.cli("run", "--rm", "opt", "cat", "/o").out, expected)

    def test_options_of_the_cache(self):
        context = self.folder(Dockerfile="FROM base\nRUN echo 1 > /1\nENV A=1\n")
        self.cli("build", "-t", "cached:1", context, **self.environment)
        self.assertEqual(self.cli("build", context, **self.environment).out.count("Using cache"), 2)
        self.assertNotIn("Using cache", self.cli("build", "--no-cache", context, **self.environment).out)
        saved = self.cli("save", "cached:1").raw
        self.daemon.remove_all()
        self.cli("builder", "prune", "-a", "-f")
        self.cli("load", input=saved)
        self.assertNotIn("Using cache", self.cli("build", "-q", context, **self.environment).out)
        self.cli("builder", "prune", "-a", "-f")
        result = self.cli("build", "--cache-from", "cached:1", context, **self.environment)
        self.assertEqual(result.out.count("Using cache"), 2)

    def test_containers_that_stay(self):
        context = self.folder(Dockerfile="FROM base\nRUN echo x > /f\n")
        self.cli("build", "--rm=false", context, **self.environment)
        self.assertEqual(len(self.api.ok("GET", "/containers/json", all=1)), 1)
        self.assertRegex(self.cli("container", "prune", "-f").out, "Deleted Containers:\n[0-9a-f]{64}\n")

    @unittest.skipUnless(shutil.which("git"), "needs git")
    def test_addresses(self):
        base = self.folder()
        BuildCase.git(self, base, "init", "-q", base + "/repo.git")
        write(base + "/repo.git/in/Dockerfile", "FROM base\nCOPY . /x\nRUN cat /x/Dockerfile\n")
        BuildCase.git(self, base, "-C", base + "/repo.git", "add", ".")
        BuildCase.git(self, base, "-C", base + "/repo.git", "commit", "-qm", "1")
        url = BuildCase.serve_git(self, base) + "/repo.git#main:in"
        self.assertIn("COPY . /x\n", self.cli("build", url, **self.environment).out.rpartition("Running in")[2])
        packed = gzip.compress(tar_of(file_("Dockerfile", b"FROM base\nRUN echo packed\n")))
        server = Files({"/Dockerfile": (200, {}, b"FROM base\nRUN echo alone\n"), "/c.tar.gz": (200, {}, packed)})
        self.addCleanup(server.close)
        self.assertIn("alone\n", self.cli("build", server.url + "/Dockerfile", **self.environment).out)
        self.assertIn("packed\n", self.cli("build", server.url + "/c.tar.gz", **self.environment).out)
        self.cli("build", server.url + "/nosuch", code=1, **self.environment)

    def test_odd_files(self):
        """Sockets are left out of the context, fifos are not opened, and names may be any bytes."""
        context = self.folder(Dockerfile="FROM base\nCOPY . /x/\n"
                                         "RUN ls /x | wc -l; test -p /x/fifo && echo fifo; ls /x | grep -c caf\n")
        os.mkfifo(context + "/fifo")
        write(os.fsencode(context) + b"/caf\xe9", b"latin 1")
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as sock:
            sock.bind(context + "/socket")
            self.assertIn("3\nfifo\n1\n", self.cli("build", context, **self.environment).out)

    @needs_program("setpriv")
    def test_unreadable_files(self):
        """An unreadable file is an error before anything is built, unless .dockerignore leaves the file out."""
        context = self.folder(Dockerfile="FROM base\nRUN echo built\n", secret="x")
        os.chmod(context + "/secret", 0)
        lost = "-dac_override,-dac_read_search"  # without these, file modes hold for root, too
        command = ["setpriv", "--bounding-set", lost, "--inh-caps", lost] + self.cli_argv("build", context)
        result = run_program(command, **self.environment)
        self.assertEqual(result.code, 1, result)
        self.assertIn("secret'", result.err)
        self.assertNotIn("Traceback", result.err)
        write(context + "/.dockerignore", "secret\n")
        self.assertIn("built\n", run_program(command, **self.environment).out)

    def test_interrupt(self):
        context = self.folder(Dockerfile="FROM base\nRUN echo started; sleep 600\n")
        terminal = self.on_terminal("build", context, **self.environment)
        terminal.expect("started")
        terminal.send("\x03")
        self.assertTrue(terminal.wait() or self.program == "docker")
        eventually(lambda: not self.api.ok("GET", "/containers/json"))


class BuildCommandTest(BuildCommand, DaemonCase):
    program = "pydock"

    def test_secret_and_epoch(self):
        context = self.folder(Dockerfile="FROM base\nRUN --mount=type=secret,id=key,required=true "
                                         "cat /run/secrets/key | wc -c > /n\n", key="12345")
        self.cli("build", "--secret", "id=key,src=" + context + "/key", "-t", "sec", context)
        self.assertEqual(self.cli("run", "--rm", "sec", "cat", "/n").out, "5\n")
        self.cli("build", "--secret", "id=key,env=KEYVAR", "-t", "sec", "--no-cache", context, KEYVAR="123")
        self.assertEqual(self.cli("run", "--rm", "sec", "cat", "/n").out, "3\n")
        self.assertIn("secret key: not found", self.cli("build", "--no-cache", context, code=1).err)
        self.cli("build", "-t", "ep", self.folder(Dockerfile="FROM base\nENV A=1\n"), SOURCE_DATE_EPOCH="86400")
        self.assertEqual(self.cli("inspect", "-f", "{{.Created}}", "ep").out, "1970-01-02T00:00:00Z\n")
        self.assertIn("Total", self.cli("builder", "prune", "-f").out)

    def test_squash(self):
        context = self.folder(Dockerfile="FROM base\nRUN echo 1 > /a\nRUN rm /a; echo 2 > /b\n")
        self.cli("build", "--squash", "-t", "squashed", context)
        layers = [len(self.api.ok("GET", f"/images/{name}/json")["RootFS"]["Layers"]) for name in ("base", "squashed")]
        self.assertEqual(layers, [1, 2])
        self.assertEqual(self.cli("run", "--rm", "squashed", "sh", "-c", "cat /b; ls /a 2>/dev/null; true").out, "2\n")

    def test_an_ignore_file_of_its_own(self):
        """DOCKERFILE.dockerignore, where it exists, is used instead of .dockerignore."""
        context = self.folder(Dockerfile="FROM base\nCOPY . /x\n", a="", b="")
        write(context + "/.dockerignore", "a\n")
        write(context + "/Other", "FROM base\nCOPY . /x\nRUN ls /x\n")
        write(context + "/Other.dockerignore", "b\nOther*\nDockerfile\n")
        self.assertIn("a\n", self.cli("build", "-f", context + "/Other", context).out.rpartition("Running in")[2])
        self.assertNotIn("\nb\n", self.cli("build", "-f", context + "/Other", context).out)

    def test_on_a_terminal(self):
        context = self.folder(Dockerfile="FROM base\nRUN echo one; echo \\\n two\nRUN echo three; exit 3\n")
        terminal = self.on_terminal("build", "--force-rm", context)
        self.assertEqual(terminal.wait(), 3)
        self.assertIn("[2/3] RUN echo one", terminal.text)
        self.assertRegex(terminal.text, r"\x1b\[\d+A\r\x1b\[J\[2/3\] RUN [^\r\n]*  \d+\.\ds\r\n\[3/3\]")
        self.assertTrue(terminal.text.rstrip().endswith("returned a non-zero code: 3 (Dockerfile, line 4)"),
                        terminal.text)
        self.assertIn("  three\r\n", terminal.text)
        self.assertIn("invalid progress mode bogus", self.cli("build", "--progress=bogus", context, code=1).err)
        self.assertIn("needs a terminal", self.cli("build", "--progress=tty", context, code=1).err)
        terminal = self.on_terminal("build", "--progress=plain", "--force-rm", context)
        self.assertEqual(terminal.wait(), 3)
        self.assertIn("Step 2/3 : RUN echo one", terminal.text)


class BuildByDockerTest(BuildCommand, DaemonCase):
    program = "docker"


# Builds that give the same image on dockerd and on pydock: (name, Dockerfile, further words of the command line).
SAME_BUILDS = (
    ("from", "ARG TAG=latest\nFROM base:${TAG} AS x\nARG TAG\nENV T=$TAG\nFROM x\nRUN echo $T > /t\n", ()),
    ("run", "FROM base\nRUN echo $0 > /0; mkdir -m 1777 /t; mkdir -m 2755 /s; ln -s /nope /l; echo h > /h; ln /h /t/h\n"
            "RUN [\"sh\", \"-c\", \"chown 5:6 /0; chmod 4711 /0; mkfifo /t/f; rm /h\"]\n"
            "RUN rm -rf /t && mkdir /t && touch /t/new; rm /etc/group; umask 077; mkdir -p /a/b; \\\n # comment\n\n"
            "  echo c > '/a/ c'\n"
            "RUN env | grep -v -e HOSTNAME -e SHLVL | sort > /env; pwd > /pwd; id > /id; umask > /umask\n", ()),
    ("cmd", "FROM base\nCMD echo  a   \"b\" $X\nCMD [\"one\", \"t\\\"w\\u00e9o\"]\n", ()),
    ("cmd, shell", "FROM base\nSHELL [\"/bin/sh\", \"-ec\"]\nCMD echo  a   b\n", ()),
    ("entrypoint", "FROM base\nCMD [\"c\"]\nENTRYPOINT exec  top -b\n", ()),
    ("entrypoint resets", "FROM base AS a\nCMD [\"c\"]\nFROM a\nENTRYPOINT [\"e\", \"f\"]\n", ()),
    ("entrypoint, empty", "FROM base\nENV A=1\nENTRYPOINT []\nCMD []\n", ()),
    ("commands that are none", "FROM base AS a\nENTRYPOINT [\"x\"]\nFROM a\nCMD\nENTRYPOINT\n", ()),
    ("env", "FROM base\nENV A=1 B=\"x y\" C=a\\ b D='$A' E=$A$B F=${A:-no}${N:-yes}${N:+no}${B:+set}\n"
            "ENV OLD some  \"text\" $A\nENV A=2 G=$A \\\n  H=\"\\$A \\\"q\\\" it's\" I=\\$A PATH=/x:$PATH J=${A}b K=\n"
            "RUN env | grep -v HOSTNAME | sort > /env\n", ()),
    ("label", "FROM base\nLABEL a=b \"c d\"=\"e f\" g='h $X' multi=\"one \\\n  two\"\nLABEL old form=here x\n"
              "LABEL a=again\n",
     ("--label", "cli=1", "--label", "a=cli $X \"q\"")),
    ("maintainer", "FROM base\nMAINTAINER Me Myself <me@example>\n", ()),
    ("expose", "FROM base\nENV P=81\nEXPOSE 80 53/udp $P 7000-7002/tcp\nEXPOSE 443/TCP\n", ()),
    ("arg", "ARG G=global\nFROM base\nARG G\nARG D=default\nARG U\nARG V=$D-more\n"
            "RUN echo $G $D ${U-unset} $V $http_proxy > /x\nENV D=env\nARG D=arg\nRUN echo $D >> /x\n",
     ("--build-arg", "U=given", "--build-arg", "http_proxy=http://p")),
    ("copy", "FROM base\nWORKDIR /work\nCOPY d /d1\nCOPY d/ /d2/\nCOPY a b /e/\nCOPY a /f\nCOPY [a-b] /g/\nCOPY l /l\n"
             "COPY ld /ldir\nCOPY a rel/\nCOPY a .\nCOPY [\"a\", \"with blank\"]\nCOPY d/* /star/\n"
             "COPY ./d/../a /dots\nCOPY t.tar /plain/\n", ()),
    ("copy, all", "FROM base\nCOPY . /all/\nCOPY . .\n", ()),
    ("copy, owners", "FROM base\nRUN echo 'u:x:77:78::/:/bin/sh' >> /etc/passwd; echo 'g:x:79:' >> /etc/group\n"
                     "COPY --chown=u:g a /1\nCOPY --chown=u:5 d /2\nCOPY --chown=5 b /3\nUSER u\nCOPY a /4\n"
                     "COPY --chown=8:9 t.tar d /5/6/\n", ()),
    ("copy, over", "FROM base\nRUN mkdir -p /x/sub /y && echo old > /x/one && ln -s one /x/link && ln -s /x /dir "
                   "&& chmod 711 /x && chown 3:4 /x/sub && mkdir /x/x && echo k > /x/sub/keep\n"
                   "COPY d /dir\nCOPY a /x/link\nCOPY a /y\nCOPY d /dir/sub\n", ()),
    ("copy, from", "FROM base AS one\n"
                   "RUN mkdir -p -m 750 /o/p && echo 1 > /o/p/f && chown -R 5:6 /o && ln -s p/f /o/l\n"
                   "FROM base AS two\nRUN echo 2 > /f\n"
                   "FROM base\nCOPY --from=one /o /o1\nCOPY --from=0 /o/p/f /o/l /o2/\nCOPY --from=two f .\n"
                   "COPY --from=base:latest /etc/passwd /pw\nCOPY --from=one --chown=1:2 /o /o3\n", ()),
    ("add", "FROM base\nADD t.tar /t/\nADD t.tgz /tgz\nADD a d /x/\nADD --chown=7:8 a /owned/\nADD notar.gz /n/\n"
            "ADD l /l2\n", ()),
    ("add, address", "FROM base\nADD URL/file.txt /d/\nADD URL/file.txt /name\nADD URL/t.tar /d/\n", ()),
    ("workdir", "FROM base\nENV W=w\nWORKDIR /a\nWORKDIR b/$W\nRUN pwd > p\nWORKDIR ../..\nRUN pwd > p\n"
                "USER 5\nWORKDIR /etc\nWORKDIR /made/by/root\n", ()),
    ("user", "FROM base\nENV U=7\nUSER $U:8\nRUN id -u > /tmp/i; id -g >> /tmp/i\nUSER root\n", ()),
    ("volume", "FROM base\nRUN mkdir /v && echo in > /v/f\nVOLUME /v /tmp\nVOLUME [\"/root\"]\nRUN echo kept > /k\n"
               "COPY a /v/a\n", ()),
    ("onbuild", "FROM base AS mother\nONBUILD RUN echo t > /t\nONBUILD COPY a /a\nONBUILD ENV X=1\nFROM mother\n"
                "RUN echo $X > /x\n", ()),
    ("onbuild, kept", "FROM base\nONBUILD RUN echo  a   b\nonbuild cmd [\"x\"]\n", ()),
    ("stopsignal", "FROM base\nARG S=QUIT\nSTOPSIGNAL SIG$S\n", ()),
    ("healthcheck", "FROM base\n"
                    "HEALTHCHECK --interval=5s --timeout=1m30s --start-period=1h --retries=2 CMD curl  x || exit 1\n",
     ()),
    ("healthcheck, exec", "FROM base\nHEALTHCHECK CMD [\"true\", \"x\"]\n", ()),
    ("healthcheck, none", "FROM base AS a\nHEALTHCHECK CMD true\nFROM a\nHEALTHCHECK NONE\n", ()),
    ("shell", "FROM base\nSHELL [\"/bin/sh\", \"-xc\"]\nRUN echo a > /a\nENTRYPOINT b\nSHELL [\"/bin/sh\",\"-c\"]\n"
              "RUN true\n", ()),
    ("scratch", "FROM scratch\nCOPY a /a\nENV X=1\nCOPY --from=base /bin/sh /bin/sh\n", ()),
    ("words", "# escape=`\nfrom base As X\r\n  rUn echo a && `\n  # c\n    echo b\\x\ncoPy a /d\\x\nenv A=`$A `\n"
              "  B=1\n", ()),
    ("target", "FROM base AS one\nRUN echo 1 > /1\nFROM one AS two\nRUN echo 2 > /2\nFROM two\nRUN false\n",
     ("--target", "Two")),
    ("nothing changes", "FROM base\nRUN true\nRUN ls > /dev/null\nRUN touch /x && rm /x\nCOPY empty /etc/\n", ()),
)
SAME_FAILURES = (
    "", "# only\n", "RUN x\n", "FROM base\nRUNN x\n", "FROM\n", "FROM base as\n", "FROM base\nCOPY a\n",
    "FROM base\nCOPY nope /x\n", "FROM base\nCOPY ../a /x\n", "FROM base\nCOPY nope* /x/\n", "FROM base\nCOPY a b /x\n",
    "FROM base\nRUN exit 3\n", "FROM base\nEXPOSE abc\n", "FROM base\nSTOPSIGNAL FOO\n",
    "FROM base\nCOPY --from=base /nosuch /x\n", "FROM base\nENV A='x\n", "FROM base\nHEALTHCHECK FOO\n",
    "FROM base\nHEALTHCHECK --interval=x CMD y\n", "FROM base\nSHELL x\n", "FROM base\nONBUILD ONBUILD RUN x\n",
    "FROM base\nWORKDIR\n", "FROM scratch\n", "FROM base\nCOPY --chown=nobodyknows a /x\n", "FROM base\nVOLUME []\n",
    "FROM base\nRUN [\"nosuch\"]\n", "FROM base\nADD ftp://127.0.0.1/x /x\n", "FROM base\nVOLUME\n",
    "FROM base\nUSER\n", "FROM base AS 1x\n", "FROM $NOPE\n", "FROM base\nARG\n", "FROM base\nONBUILD FROM x\n",
)


@needs_root
@needs_program("dockerd")
@unittest.skipUnless(DOCKER, "needs the docker CLI")
class BuildLikeDockerTest(BuildCase):
    """The same builds by the docker CLI on dockerd and on pydock give the same output and the same images."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        dockerd = Dockerd()
        cls.addClassCleanup(dockerd.close)
        cls.hosts = (dockerd.host, cls.daemon.host)
        saved = cls.daemon.api.get("/images/base/get").body
        loaded = run_program([DOCKER, "-H", dockerd.host, "load"], input=saved)
        assert loaded.code == 0, loaded

    def context(self, dockerfile, **more):
        """A folder with this Dockerfile and the files that SAME_BUILDS copy."""
        path = self.folder(Dockerfile=dockerfile, a="1", b="2", empty="", **more)
        os.chmod(path + "/b", 0o755)
        os.makedirs(path + "/d/sub", 0o700)
        os.chmod(path + "/d", 0o700)
        write(path + "/d/x", "y", 0o640)
        write(path + "/d/sub/deep", "deep")
        for name, target in (("l", "a"), ("ld", "d"), ("d/up", "../a")):
            os.symlink(target, os.path.join(path, name))
        os.link(path + "/d/x", path + "/d/hard")
        packed = tar_of(folder("in", mode=0o750), file_("in/side", b"1", uid=7, mode=0o600), symlink("in/l", "side"))
        write(path + "/t.tar", packed)
        write(path + "/t.tgz", gzip.compress(packed))
        write(path + "/notar.gz", gzip.compress(b"text"))
        return path

    def command(self, host, *words, **options):
        return run_program([DOCKER, "-H", host] + list(words), DOCKER_BUILDKIT="0", **options)

    @staticmethod
    def normalized(text):
        """The output of a build without its ids, sizes and digests, which differ each time."""
        text = re.sub(r"\b[0-9a-f]{12}\b", "ID", re.sub(r"sha256:[0-9a-f]{64}", "DIGEST", text))
        text = re.sub(r"(Sending build context to \w+ daemon).*", r"\1", text)
        # the colors around each piece of stderr, the line numbers that only pydock adds, and empty lines
        text = re.sub(r"\x1b\[\d*m| \(Dockerfile, line \d+\)|\n(?=\n)", "", text)
        return text.replace("parse error line", "parse error on line")  # docker's wording changed with 23.0

    def describe_image(self, host, name):
        """The properties of an image that have to be the same on both engines."""
        image, = json.loads(self.command(host, "image", "inspect", name).out)
        config = {key: value for key, value in image["Config"].items() if value and key not in ("Image", "Hostname")}
        history = self.command(host, "history", "--no-trunc", "--format", "{{.CreatedBy}}", name).out
        container = self.command(host, "create", name, "x").out.strip()
        data = self.command(host, "export", container).raw
        self.command(host, "rm", container)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            files = {member.name.rstrip("/"): (
                member.type, oct(member.mode & 0o7777), member.uid, member.gid, member.linkname,
                hashlib.sha256(tar.extractfile(member).read() if member.isreg() else b"").hexdigest())
                for member in tar if not re.match(r"dev/|etc/(mtab|hosts|hostname|resolv.conf)$", member.name)}
        return {"config": config, "files": files, "author": image["Author"], "layers": len(image["RootFS"]["Layers"]),
                "history": [self.normalized_step(line) for line in history.splitlines()]}

    @staticmethod
    def normalized_step(text):
        """A line of `history` without digests. dockerd omits a blank after --chown=... and prints a HEALTHCHECK in the
        form that Go gives its structure in memory."""
        text = re.sub("((file|dir|multi):)?[0-9a-f]{64}", "DIGEST", text)
        return re.sub(r"(--chown=[\w:]+) ?DIGEST", r"\1 DIGEST", re.sub("(?<=HEALTHCHECK ).*", "", text))

    def test_images(self):
        server = Files({"/file.txt": (200, {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, b"text"),
                        "/t.tar": (200, {}, tar_of(file_("in")))})
        self.addCleanup(server.close)
        for name, dockerfile, words in SAME_BUILDS:
            with self.subTest(name):
                context = self.context(dockerfile.replace("URL", server.url))
                results = [self.command(host, "build", "--no-cache", "-t", "same", *words, context)
                           for host in self.hosts]
                self.assertEqual(results[0].code, 0, results[0])
                theirs, ours = (self.normalized(result.out + result.err) for result in results)
                self.assertEqual(ours, theirs)
                theirs, ours = (self.describe_image(host, "same") for host in self.hosts)
                for key in theirs:
                    self.assertEqual(ours[key], theirs[key])

    def test_failures(self):
        for dockerfile in SAME_FAILURES:
            with self.subTest(dockerfile):
                context = self.context(dockerfile)
                results = [self.command(host, "build", "--force-rm", context) for host in self.hosts]
                self.assertEqual([result.code for result in results], [results[0].code] * 2, results)
                self.assertNotEqual(results[0].code, 0)
                self.assertEqual(self.normalized(results[1].out), self.normalized(results[0].out))
                theirs, ours = (self.normalized(result.err).splitlines()[-1] for result in results)
                if "runc" in theirs:  # runc's message is the longer one
                    ours, theirs = theirs, ours
                self.assertIn(theirs.lower(), ours.lower())  # otherwise pydock's message may add to docker's


class Mirror:
    """A relay to the package mirror of this machine's apt, for the network namespace of the tests. It listens on
    `port` of all addresses; `release` and `components` are those of apt's sources. Without such a mirror the test is
    skipped. Requests go through apt's proxy, or through the proxy of the environment."""

    def __init__(self):
        import urllib.request
        codename = re.search(r"^VERSION_CODENAME=(\w+)", read("/etc/os-release"), re.M)
        listed = run_program(["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
                              "Created-By: Packages"])
        rows = [line.split() for line in listed.out.splitlines()
                if codename and line.split()[1:2] == [codename.group(1)]]
        if not rows:
            raise unittest.SkipTest("needs a package mirror: apt has no source of this system's release")
        self.url, self.release = rows[0][0].rstrip("/"), rows[0][1]
        self.components = " ".join(row[2] for row in rows if row[0] == rows[0][0])
        proxy = re.search("'(.*)'", run_program(["apt-config", "shell", "p", "Acquire::http::Proxy"]).out)
        handlers = [urllib.request.ProxyHandler({"http": proxy.group(1), "https": proxy.group(1)})] if proxy else []
        self.opener = urllib.request.build_opener(*handlers)
        self.outside = os.open(f"/proc/{OUTERMOST}/ns/net", os.O_RDONLY)
        self.server = http.server.ThreadingHTTPServer(("0.0.0.0", 0), self._handler())
        self.server.daemon_threads, self.port = True, self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{self.port}/dists/{self.release}/Release"
        if run_program(["curl", "-sf", "-o", "/dev/null", url]).code:
            self.close()
            raise unittest.SkipTest(f"needs a package mirror: {self.url} does not answer")

    def _handler(mirror):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                pydock.setns(mirror.outside, pydock.NEWNET)  # moves only this thread, which serves one connection
                try:
                    with mirror.opener.open(mirror.url + self.path, timeout=60) as answer:
                        body = answer.read()
                except OSError as error:
                    self.send_error(getattr(error, "code", 502))
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass
        return Handler

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        os.close(self.outside)


@needs_program("debootstrap", "apt-get", "curl")
class NodeTest(DaemonCase):
    """The Node.js server of the document of 2013 (see SeedReplay), on a Debian that debootstrap has made."""
    own, image = True, False

    def make_base(self, mirror):
        """Make the image `base`, a Debian whose apt uses the mirror."""
        tree = self.folder()
        pydock.mount("tmpfs", tree, "tmpfs")
        try:
            result = run_program(["debootstrap", "--variant=minbase", mirror.release, tree,
                                  f"http://127.0.0.1:{mirror.port}/"], timeout=900)
            self.assertEqual(result.code, 0, result)
            write(tree + "/etc/apt/sources.list",
                  f"deb http://{self.daemon.gateway}:{mirror.port}/ {mirror.release} {mirror.components}\n")
            write(tree + "/etc/dpkg/dpkg.cfg.d/docker", "force-unsafe-io\n")  # as in docker's own images of Debian
            packed = run_program(["tar", "-C", tree, "--one-file-system", "--exclude=./var/cache/apt/archives/*.deb",
                                  "-c", "."], timeout=300).raw
        finally:
            pydock.umount(tree)
        result = self.daemon.pydock("import", "-", "base", input=packed, timeout=300)
        self.assertEqual(result.code, 0, result)

    def test_walk_through(self):
        mirror = Mirror()
        self.addCleanup(mirror.close)
        self.make_base(mirror)
        context = self.folder(**{"Dockerfile": DOCKERFILE_2013, "app.js": APP_JS})
        result = self.pydock("build", "-t", "yssk22/node-hello", context, timeout=900)
        self.assertRegex(result.out, "(?s)Step 3/6 : RUN     apt-get install -q -y nodejs\n"
                                     ".*Successfully built [0-9a-f]{12}\n")
        container = self.pydock("run", "-d", "-P", "yssk22/node-hello").out.strip()
        self.wait_for_output(container, "Running on port:8080", 60)
        self.assertEqual(run_program(["curl", "-s", "http://localhost:49153/"]).out, "Hello World\n")
        for client in (self.pydock, self.docker):
            self.assertRegex(client("ps").out, "yssk22/node-hello .*0.0.0.0:49153->8080/tcp")
        self.assertIn("0.0.0.0:49153\n", self.pydock("port", container, "8080").out)
        self.assertEqual(self.pydock("build", context).out.count("Using cache"), 5)
        self.pydock("kill", container)


########################################################################
# 20. Engine
########################################################################

class EventsTest(unittest.TestCase):
    def test_a_listener_that_does_not_read(self):
        events = pydock.Events()
        with events.listening() as (_, idle), events.listening() as (_, busy):
            seen = []
            for number in range(3000):
                events.emit("container", "start", str(number), {})
                seen.append(busy.get_nowait()["Actor"]["ID"])
            kept = [idle.get_nowait()["Actor"]["ID"] for _ in range(idle.qsize())]
            events.emit("container", "start", "later", {})
            self.assertEqual(idle.get_nowait()["Actor"]["ID"], "later")
        self.assertEqual(kept, [str(number) for number in range(1024)])
        self.assertEqual(seen, [str(number) for number in range(3000)])


class KillTest(DaemonCase):
    """Each of pydock's processes is killed with SIGKILL or stopped while containers run."""
    own = True

    def test_the_daemon_is_killed_and_all_goes_on(self):
        for program in ["pydock"] + ["docker"] * bool(DOCKER):
            with self.subTest(program):
                self.kill_with_terminal(getattr(self.daemon, program + "_argv"))

    def kill_with_terminal(self, argv):
        start = os.path.getsize(self.daemon.log)
        terminal = self.terminal(argv("run", "-it", "--rm", "--name", "tt", "base", "sh"))
        terminal.send("echo on''e\n")
        terminal.expect("one")
        # the client sends the terminal's size after the daemon has answered the start
        eventually(lambda: "/resize" in self.daemon.log_text(start))
        self.daemon.kill9()
        terminal.send("echo tw''o\n")
        terminal.expect("two")
        self.daemon.start()
        terminal.send("echo thr''ee\n")
        terminal.expect("three")
        self.assertTrue(self.api.state("tt")["Running"])
        terminal.send("exit 42\n")
        self.assertEqual(terminal.wait(), 42)
        self.assertEqual(terminal.attributes(), terminal.before)
        eventually(lambda: self.api.get("/containers/tt/json").status == 404)

    def test_a_client_ends_while_no_daemon_is_there(self):
        process = subprocess.Popen(self.daemon.pydock_argv("run", "-i", "--name", "cc", "base", "sh", "-c",
                                                           "cat; exit 5"),
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
        process.stdin.write(b"text\n")
        process.stdin.flush()
        self.assertEqual(process.stdout.readline(), b"text\n")
        self.daemon.kill9()
        out, _ = process.communicate(timeout=15)
        self.assertEqual((out, process.returncode), (b"", 5))
        self.daemon.start()
        state = self.api.state("cc")
        self.assertEqual((state["Status"], state["ExitCode"]), ("exited", 5))
        self.assertEqual(output_of(self.api.logs("cc")), b"text\n")

    @needs_program("busybox")
    def test_logs_and_ports_go_on(self):
        container = self.api.run("sh", "-c", "httpd -p 80 -h /etc; while sleep 0.05; do echo tick; done",
                                 PortBindings={"80/tcp": [{"HostPort": ""}],
                                               "81/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]})
        port = int(self.api.inspect(container)["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"])
        eventually(lambda: fetch("127.0.0.1", port))
        self.daemon.kill9()
        log = os.path.join(self.daemon.root, "containers", container, container + "-json.log")
        size = os.path.getsize(log)
        self.assertEqual(fetch("127.0.0.1", port), container[:12] + "\n")
        self.assertEqual(fetch(self.daemon.gateway, port), container[:12] + "\n")
        eventually(lambda: os.path.getsize(log) > size)
        self.daemon.start()
        self.assertEqual(fetch("127.0.0.1", port), container[:12] + "\n")
        self.assertEqual(fetch(self.daemon.gateway, port), container[:12] + "\n")
        size = len(self.api.logs(container))
        eventually(lambda: len(self.api.logs(container)) > size)
        self.assertEqual(self.api.execute(container, "echo", "x"), (0, "x\n"))
        if shutil.which("iptables"):
            rules = run_program(["iptables", "-t", "nat", "-S"]).out.splitlines()
            self.assertEqual(len(rules), len(set(rules)), rules)
            self.assertEqual(sum(f"--dport {port} " in rule for rule in rules), 1, rules)
        other = self.api.create("true", PortBindings={"80/tcp": [{"HostPort": str(port)}]})
        self.refused(500, self.api.post(f"/containers/{other}/start"), "port is already allocated")

    def test_a_name_and_an_exec_are_known_after_it(self):
        container = self.api.run("sleep", "600", name="kept", Labels={"a": "b"})
        self.daemon.restart()
        self.assertEqual(self.api.inspect("kept")["Id"], container)
        self.assertEqual(self.api.inspect("kept")["Config"]["Labels"], {"a": "b"})
        self.refused(409, self.api.post("/containers/create", {"Image": "base"}, name="kept"), "already in use")
        self.api.ok("POST", "/containers/kept/stop", t=0)
        self.assertEqual(self.api.state("kept")["ExitCode"], 137)

    def test_sigterm_leaves_containers_running(self):
        container = self.api.run("sleep", "600")
        pid = self.api.state(container)["Pid"]
        self.daemon.stop()
        self.assertFalse(os.path.exists(self.daemon.socket))
        self.assertTrue(is_alive(pid))
        self.daemon.start()
        self.assertEqual(self.api.state(container)["Pid"], pid)

    def test_what_ended_while_no_daemon_was_there(self):
        first = self.api.run("sh", "-c", "read x; exit 8", OpenStdin=True, AttachStdin=True)
        second = self.api.run("sleep", "600", AutoRemove=True)
        third = self.api.run("sleep", "600", RestartPolicy={"Name": "always"})
        stream = self.attach(first)
        pids = [self.api.state(c)["Pid"] for c in (second, third)]
        self.daemon.kill9()
        stream.send(b"x\n")
        stream.read_all()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: not is_alive(pid))
        before = time.time()
        self.daemon.start()
        state = self.api.state(first)
        self.assertEqual((state["Status"], state["ExitCode"]), ("exited", 8))
        self.assertLess(pydock.parse_time(state["FinishedAt"]) / 1e9, before)
        self.assertEqual(self.api.get(f"/containers/{second}/json").status, 404)
        eventually(lambda: self.api.state(third)["Running"])
        self.assertNotEqual(self.api.state(third)["Pid"], pids[1])

    def test_the_spawner_is_killed(self):
        container = self.api.run("sh", "-c", "while sleep 0.05; do echo tick; done")
        pid = self.daemon.spawner
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: self.daemon.spawner not in (None, pid), message="there is no new spawner")
        eventually(lambda: self.daemon._answers())
        self.assertTrue(self.api.state(container)["Running"])
        size = len(self.api.logs(container))
        eventually(lambda: len(self.api.logs(container)) > size)
        self.assertEqual(self.api.output("echo", "again"), "again\n")

    def test_a_monitor_is_killed(self):
        container = self.api.run("sh", "-c", "sleep 600 & exec sleep 600", name="mm")
        pid = self.api.state(container)["Pid"]
        os.kill(self.daemon.monitor(container), signal.SIGKILL)
        eventually(lambda: not self.api.state(container)["Running"])
        self.assertEqual(self.api.state(container)["ExitCode"], 137)
        self.assertFalse(is_alive(pid))
        self.api.start(container)
        self.assertTrue(self.api.state(container)["Running"])
        self.api.ok("DELETE", "/containers/mm", force=1)

    def test_a_monitor_is_stopped(self):
        """A monitor that is stopped, or hangs on a disk that is gone, does not hold up the daemon: its container can be
        killed, and all other containers are served."""
        stuck, second, other = (self.api.run("sleep", "600", name=name) for name in ("stuck", "second", "other"))
        pids = [self.api.state(name)["Pid"] for name in (stuck, second)]
        monitors = [self.daemon.monitor(name) for name in (stuck, second)]
        for monitor in monitors:
            os.kill(monitor, signal.SIGSTOP)
            self.addCleanup(self.wake, monitor)
        self.daemon.restart()
        self.assertIn("2 monitors do not answer", self.daemon.log_text())
        self.assertEqual(self.api.execute(other, "echo", "served"), (0, "served\n"))
        self.assertEqual(self.api.output("echo", "new"), "new\n")
        self.assertIn("other", self.pydock("ps", "--format", "{{.Names}}").out)
        for monitor in monitors:
            self.wake(monitor)
        eventually(lambda: self.api.execute(stuck, "echo", "back") == (0, "back\n"))
        eventually(lambda: self.api.state(second)["Running"])
        for monitor in monitors:
            os.kill(monitor, signal.SIGSTOP)
        remover = threading.Thread(target=self.api.ok, args=("DELETE", "/containers/second"), kwargs={"force": 1})
        remover.start()
        self.api.ok("POST", "/containers/stuck/kill", signal="KILL")
        remover.join()
        self.assertEqual([is_alive(pid) for pid in pids], [False] * 2)
        self.assertEqual(self.api.state(stuck)["ExitCode"], 137)
        self.assertEqual(self.api.get("/containers/second/json").status, 404)
        self.api.start(stuck)

    @staticmethod
    def wake(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    def test_the_daemon_is_killed_within_a_start(self):
        """The next daemon has only what the killed one wrote before the start: that a start is under way, and with
        which addresses and ports."""
        container = self.api.run("sleep", "600", PortBindings={"80/tcp": [{"HostPort": ""}]})
        before = self.api.inspect(container)
        port = before["NetworkSettings"]["Ports"]["80/tcp"][0]["HostPort"]
        self.forget_the_start(container)
        after = self.api.inspect(container)
        for part in ("NetworkSettings", "Id"):
            self.assertEqual(after[part], before[part])
        for part in ("Status", "Running", "Pid", "StartedAt"):
            self.assertEqual(after["State"][part], before["State"][part])
        other = self.api.create("true", PortBindings={"80/tcp": [{"HostPort": port}]})
        self.refused(500, self.api.post(f"/containers/{other}/start"), "port is already allocated")
        neighbour = self.api.inspect(self.api.run("sleep", "600"))["NetworkSettings"]["IPAddress"]
        self.assertNotEqual(neighbour, before["NetworkSettings"]["IPAddress"])
        self.api.ok("POST", f"/containers/{container}/stop", t=0)
        self.api.start(other)

    def test_the_daemon_is_killed_within_a_start_and_the_container_ends(self):
        container = self.api.run("sh", "-c", "echo up; read x; exit 9", OpenStdin=True, AttachStdin=True,
                                 PortBindings={"80/tcp": [{}]})
        stream = self.attach(container, logs=1)
        stream.read_until(b"up")  # the monitor has the connection

        def end():
            stream.send(b"x\n")
            stream.read_all()
        self.forget_the_start(container, end)
        state = self.api.inspect(container)
        self.assertEqual((state["State"]["Status"], state["State"]["ExitCode"]), ("exited", 9))
        self.assertEqual((state["NetworkSettings"]["IPAddress"], state["NetworkSettings"]["Ports"]), ("", {}))

    def forget_the_start(self, container, meanwhile=None):
        """Kill the daemon, put the container's state back to that of a start under way, call meanwhile(), and start a
        new daemon: as if the daemon had been killed between the start and the record of its success."""
        self.daemon.kill9()
        path = os.path.join(self.daemon.root, "containers", container, "state.json")
        state = json.loads(read(path))
        state.update(status="created", pid=0, start_time=None, starting=state["started"] - 1000, started=0)
        write(path, json.dumps(state))
        if meanwhile:
            meanwhile()
        self.daemon.start()

    def test_the_daemon_is_killed_anywhere_in_a_start(self):
        for number in range(5):
            container = self.api.create("sleep", "600", PortBindings={"80/tcp": [{"HostPort": ""}]})
            path = os.path.join(self.daemon.root, "containers", container, "state.json")
            thread = threading.Thread(target=self._start_somehow, args=(container,))
            thread.start()
            with contextlib.suppress(AssertionError):
                eventually(lambda: os.path.exists(path) and json.loads(read(path))["starting"], 5)
            time.sleep(number * 0.004)
            self.daemon.kill9()
            thread.join()
            self.daemon.start()
            details = self.api.inspect(container)
            settings = details["NetworkSettings"]
            if details["State"]["Running"]:
                self.assertTrue(is_alive(details["State"]["Pid"]))
                self.assertTrue(settings["IPAddress"] and settings["Ports"]["80/tcp"], details)
            else:
                self.assertEqual((settings["IPAddress"], settings["Ports"]), ("", {}))
                self.assertIsNone(self.daemon.monitor(container))
                self.api.start(container)
            self.api.ok("DELETE", "/containers/" + container, force=1)

    def _start_somehow(self, container):
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.api.post(f"/containers/{container}/start")

    def test_a_message_that_is_cut_off(self):
        """If a daemon dies while it hands a client's connection to a monitor, the connection is closed."""
        ours, theirs = socket.socketpair()
        client, handed_over = socket.socketpair()
        with ours, client:
            with theirs, handed_over:
                theirs.sendmsg([b"\x10\0\0\0{"],
                               [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", handed_over.fileno()))])
            with self.assertRaises(pydock.Error):
                pydock.receive_message(ours)
            client.settimeout(5)
            self.assertEqual(client.recv(1), b"")

    def test_no_more_processes(self):
        """If the kernel refuses the spawner a fork, only that request fails."""
        groups = pydock.Cgroups.detect(CGROUP_PARENT)
        if "pids" not in groups.controllers:
            self.skipTest("this host has no control group for pids")
        running = self.api.run("sleep", "600")
        spawner = self.daemon.spawner
        homes = dict(self.groups_of(spawner, groups))
        limit, _ = groups.create(f"no-more-{os.getpid()}", {"PidsLimit": 1})
        limit.add(spawner)
        try:
            for _ in range(10):
                container = self.api.create("true", NetworkMode="none")
                answer = self.api.post(f"/containers/{container}/start")
                self.refused(503, answer, "cannot start a process: Resource temporarily unavailable")
                self.refused(503, self.api.get(f"/containers/{container}/export"), "cannot start a process")
                self.assertEqual(self.api.state(container)["Status"], "created")
            self.assertTrue(self.api.state(running)["Running"])
        finally:
            for path in homes.values():
                write(os.path.join(path, "cgroup.procs"), str(spawner))
            limit.delete()
        self.assertEqual(self.daemon.spawner, spawner)
        self.assertEqual(self.api.output("echo", "again"), "again\n")

    @staticmethod
    def groups_of(pid, groups):
        """(controllers, folder) of each control group of a process."""
        for line in read(f"/proc/{pid}/cgroup").splitlines():
            _, names, path = line.split(":", 2)
            mount_point = groups.hierarchies.get(names.split(",")[0])
            if mount_point:
                yield names, mount_point + path

    def test_two_daemons_on_one_data_root(self):
        result = run_program([sys.executable, PYDOCK, "-d", "-g", self.daemon.root, "-H", self.daemon.host + "2", "-p",
                              self.daemon.pidfile + "2"])
        self.assertEqual(result.code, 1)
        self.assertIn(f"another pydock daemon (pid {self.daemon.process.pid}) uses the data root", result.err)
        self.assertNotIn("Traceback", result.err)
        result = run_program([sys.executable, PYDOCK, "-d", "-g", self.daemon.root + "2", "-H", self.daemon.host, "-p",
                              self.daemon.pidfile + "2", "-b", "none"])
        self.assertEqual(result.code, 1)
        self.assertIn("another daemon answers on", result.err)
        shutil.rmtree(self.daemon.root + "2")

    def test_restart_of_what_died_with_the_machine(self):
        container = self.api.run("sleep", "600")
        stopped = self.api.run("sleep", "600")
        self.api.ok("POST", f"/containers/{stopped}/stop", t=0)
        monitor = self.daemon.monitor(container)
        self.daemon.kill9()
        os.kill(monitor, signal.SIGKILL)
        self.daemon.start("-r")
        eventually(lambda: self.api.state(container)["Running"])
        self.assertFalse(self.api.state(stopped)["Running"])


class KillWithLxcTest(WithLxc, KillTest):
    pass


########################################################################
# 21. API
########################################################################

class ApiTest(DaemonCase):
    def test_ping_and_version(self):
        for method in ("GET", "HEAD"):
            answer = self.api.call(method, "/_ping")
            self.assertEqual((answer.status, answer.body), (200, b"OK" if method == "GET" else b""))
            self.assertEqual((answer.headers["Api-Version"], answer.headers["Ostype"]), ("1.47", "linux"))
        version = self.api.ok("GET", "/version")
        self.assertEqual((version["ApiVersion"], version["MinAPIVersion"], version["Os"]), ("1.47", "1.24", "linux"))

    def test_versions_of_the_path(self):
        self.api.prefix = ""
        self.addCleanup(setattr, self.api, "prefix", "/v1.47")
        for prefix, status in (("", 200), ("/v1.47", 200), ("/v1.24", 200), ("/v1.41", 200), ("/v1.12", 200),
                               ("/v1.99", 400), ("/v2.0", 400)):
            answer = self.api.get(prefix + "/info")
            self.assertEqual(answer.status, status, prefix)
        self.assertIn("client version 1.99 is too new. Maximum supported API version is 1.47",
                      self.api.get("/v1.99/info").message)

    def test_what_is_not_there(self):
        self.refused(404, self.api.get("/nosuch"), "page not found")
        self.assertIn(self.api.call("PUT", "/info").status, (404, 405))
        self.assertIn(self.api.call("DELETE", "/version").status, (404, 405))
        self.refused(503, self.api.get("/swarm"), "This node is not a swarm manager")
        self.assertEqual(self.api.ok("GET", "/plugins"), [])
        for path in ("/nodes", "/services", "/tasks", "/secrets", "/configs"):
            self.assertEqual(self.api.get(path).status, 503, path)

    def test_an_environment_that_no_process_can_have(self):
        body = {"Image": "base", "Env": [f"A{number}={'x' * 1000}" for number in range(1100)]}
        self.refused(400, self.api.post("/containers/create", body), "the environment is larger than 1048576")

    def test_keep_alive_and_pipelines(self):
        data = self.api.raw(b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n" * 3)
        self.assertEqual(data.count(b"HTTP/1.1 200"), 3)
        body = b'{"Image":"nosuch"}'
        post = (b"POST /containers/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        data = self.api.raw(post + b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n")
        self.assertEqual((data.count(b"HTTP/1.1 404"), data.count(b"HTTP/1.1 200")), (1, 1))
        unread = (b"POST /containers/nosuch/start HTTP/1.1\r\nHost: d\r\nContent-Length: 30\r\n\r\n" + b"x" * 30
                  + b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n")
        data = self.api.raw(unread)
        self.assertEqual((data.count(b"HTTP/1.1 404"), data.count(b"HTTP/1.1 200")), (1, 1))

    def test_http_1_0_and_expect(self):
        data = self.api.raw(b"GET /containers/json HTTP/1.0\r\n\r\n")
        self.assertIn(b"200 OK", data)
        self.assertNotIn(b"chunked", data)
        body = b'{"Image":"base","Cmd":["true"]}'
        data = self.api.raw(b"POST /containers/create HTTP/1.1\r\nHost: d\r\nExpect: 100-continue\r\n"
                            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        self.assertIn(b"201 Created", data)

    def test_malformed_requests(self):
        head = b"POST /containers/create HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n"
        for request in (head + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                        head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
                        head + b"Content-Length: -5\r\n\r\n", head + b"Content-Length: 5x\r\n\r\n{}",
                        head + b"Content-Length: +2\r\n\r\n{}", head + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
                        head + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
                        head + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
                        head + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
                        head + b"X: a\rContent-Length: 31\r\n\r\n" + b'{"Image":"base","Cmd":["true"]}',
                        head + b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
                        head + b"X: \0\r\nContent-Length: 0\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n1f;"
                        + b"x" * 2000 + b"\r\n" + b"{}" * 40 + b"\r\n0\r\n\r\n",
                        head + b"Transfer-Encoding: chunked\r\n\r\n1f\r\n" + b'{"Image":"base","Cmd":["true"]}'
                        + b"x\r\n0\r\n\r\n",
                        head + b"X: " + b"a" * 70000 + b"\r\n\r\n", b"GET " + b"/a" * 70000 + b" HTTP/1.1\r\n\r\n",
                        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n", b"GET\r\n\r\n", b"GET /_ping HTTP/9.9\r\n\r\n",
                        head + b"".join(b"H%d: x\r\n" % n for n in range(500)) + b"\r\n",
                        b"GET /_ping HTTP/1.1\r\nHost : d\r\n broken\r\n\r\n", b"\r\n\r\n", b"\0" * 100):
            answer = self.api.raw(request)
            self.assertNotIn(b" 200 ", answer.split(b"\r\n")[0], request[:100])
            self.assertNotIn(b" 201 ", answer.split(b"\r\n")[0], request[:100])
            self.assertNotIn(b"Traceback", answer)
        self.assertEqual(self.api.get("/_ping").status, 200)
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])

    def test_invalid_json(self):
        def post(data, kind="application/json", path="/containers/create"):
            return self.api.call("POST", path, data, {"Content-Type": kind})
        for data in (b"{", b"[" * 100000, b"{\"a\":" * 50000, b"nonsense", b"[]", b"1", b'"text"', b"null", b"\xff\xfe",
                     b'{"Memory": NaN}', b"{} {}", b'{"Image": Infinity}',
                     b'{"HostConfig": {"Memory": ' + b"9" * 5000 + b"}}"):
            self.refused(400, post(data))
        self.refused(400, post(b'{"Image": "base"}', "text/plain"), "Content-Type")
        self.refused(400, post(b""))
        self.refused(400, self.api.post(f"/containers/{self.api.run('sleep', '600')}/exec", {"Cmd": []}),
                     "No exec command specified")

    def test_values_of_wrong_types(self):
        good = {"Image": "base", "Cmd": ["true"]}
        for wrong in ({"Memory": "x"}, {"Memory": -1}, {"Memory": 1.5}, {"Memory": 1 << 80}, {"NanoCpus": "1"},
                      {"Binds": "x"}, {"Binds": [1]}, {"Binds": {"a": 1}}, {"PortBindings": []},
                      {"PortBindings": {"80": "x"}}, {"PortBindings": {"x/tcp": [{}]}},
                      {"PortBindings": {"80/tcp": [1]}}, {"CapAdd": "ALL"}, {"CapAdd": ["NOSUCH"]}, {"Devices": [1]},
                      {"Devices": "x"}, {"Ulimits": [{"Name": "nosuch"}]}, {"Ulimits": {}}, {"RestartPolicy": "always"},
                      {"RestartPolicy": {"Name": "nosuch"}}, {"NetworkMode": 5}, {"NetworkMode": "nosuch"},
                      {"Mounts": [{}]}, {"Mounts": {"a": 1}}, {"Tmpfs": []}, {"Sysctls": []}, {"LogConfig": []},
                      {"ExtraHosts": ["x"]}, {"Dns": ["not an address"]}, {"CpusetCpus": "1-4000000000"},
                      {"CpusetCpus": "x"}, {"CpuShares": -5}, {"PidMode": "nosuch"}, {"IpcMode": "nosuch"},
                      {"UTSMode": "nosuch"}, {"ShmSize": -1}, {"Isolation": "hyperv"}, {"OomScoreAdj": 5000},
                      {"SecurityOpt": ["nosuch"]}, {"Privileged": "yes"}, {"PidsLimit": "x"},
                      {"VolumesFrom": ["nosuch"]}, {"Links": ["nosuch:x"]}, {"Init": 5}, {"BlkioWeight": 5},
                      {"CpuQuota": 5}, {"GroupAdd": [5]}):
            answer = self.api.post("/containers/create", dict(good, HostConfig=wrong))
            if answer.status == 201:
                answer = self.api.post(f"/containers/{answer.json['Id']}/start")
            self.assertIn(answer.status, (400, 404, 409), (wrong, answer))
            self.assertTrue(answer.message)
        for wrong in ({"Cmd": 5}, {"Cmd": [5]}, {"Env": "A=b"}, {"Env": [1]}, {"Env": ["=x"]}, {"Labels": []},
                      {"Labels": {"a": 1}}, {"Image": 5}, {"Image": ""}, {"ExposedPorts": {"x": {}}},
                      {"ExposedPorts": []}, {"Volumes": ["x"]}, {"User": 5}, {"Tty": "yes"}, {"StopTimeout": "x"},
                      {"Hostname": "x" * 300}, {"StopSignal": "NOSUCH"}, {"HostConfig": []}, {"NetworkingConfig": []},
                      {"NetworkingConfig": {"EndpointsConfig": []}}, {"Entrypoint": 7}, {"WorkingDir": "relative"},
                      {"Healthcheck": {"Interval": "x"}}, {"Healthcheck": {"Test": ["CMD"], "Interval": 1}},
                      {"Cmd": ["a\0b"]}, {"Env": ["A=\0"]}, {"WorkingDir": "/a\0b"}):
            answer = self.api.post("/containers/create", dict(good, **wrong))
            if answer.status == 201:
                answer = self.api.post(f"/containers/{answer.json['Id']}/start")
            self.assertIn(answer.status, (400, 404), (wrong, answer))
        self.assertEqual(blunders(self.daemon.log_text(self.log_start)), [])

    def test_the_last_lines_of_a_large_log(self):
        """The work grows with the size of the log, and not with its square."""
        class Counted(bytes):
            work = 0

            def count(self, part):
                Counted.work += len(self)
                return super().count(part)

            def __add__(self, other):
                Counted.work += len(self) + len(other)
                return Counted(super().__add__(other))

        class Log(io.BytesIO):
            def read(self, size):
                return Counted(super().read(size))

        def work(count):
            Counted.work, lines = 0, [b"%099d\n" % number for number in range(count)]
            log = Log(b"".join(lines))
            self.assertEqual(pydock.LogReader(None, 10 ** 18, None, None)._last_lines([log]), lines)
            self.assertEqual(pydock.LogReader(None, 700, None, None)._last_lines([Log(), log]), lines[-700:])
            return Counted.work
        self.assertLess(work(80000), 3 * work(40000))

    def test_numbers_times_and_texts_that_cannot_be(self):
        container, many = self.api.run("sleep", "600"), "9" * 5000
        for query in ({"since": many}, {"until": many}, {"since": "0000-00-00T00:00:00Z"}, {"until": many + "h"}):
            for path in ("/events", f"/containers/{container}/logs"):
                self.refused(400, self.api.get(path, **dict({"stdout": 1}, **query)), "invalid time")
            if "until" in query:
                answer = self.api.post("/containers/prune", filters={"until": [query["until"]]})
                self.refused(400, answer, "invalid time")
        self.assertEqual(self.api.get(f"/containers/{container}/logs", stdout=1, tail=many).status, 200)
        for number in (many, "9" * 30, "1_0", " 1", "\u0661" * 30):
            self.refused(400, self.api.get("/containers/json", limit=number), "is not a number")
            self.refused(400, self.api.post(f"/containers/{container}/stop", t=number), "is not a number")
        self.refused(400, self.api.post("/containers/create", {"Image": "base", "HostConfig": {
            "LogConfig": {"Type": "json-file", "Config": {"max-size": many}}}}), "invalid size")
        self.refused(400, self.api.get(f"/containers/{container}/top", ps_args="\0"), "NUL")
        for path in (f"/containers/{container}/archive", f"/containers/{container}/copy", "/images/json", "/build"):
            self.refused(400, self.api.post(path, path="\0", dockerfile="\0", name="\0"), "NUL")

    def test_a_target_that_cannot_be_parsed(self):
        for target in ("http://[::1/x", "//[::1/x", "http://[x]/_ping"):
            body = b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n"
            answer = self.api.raw(b"POST %s HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n%s"
                                  % (target.encode(), len(body), body))
            self.assertRegex(answer, rb"^HTTP/1.1 40[04] ", target)
            self.assertNotIn(b"Error", answer)
        # What cannot be understood ends the connection: its body must not be read as the next request.
        answer = self.api.raw(b"POST /v9.9/x HTTP/1.1\r\nHost: d\r\nContent-Length: %d\r\n\r\n%s"
                              % (len(body), body))
        self.assertEqual((answer.count(b"HTTP/1.1 400"), answer.count(b"HTTP/1.1 200")), (1, 0), answer)

    def test_items_of_lists(self):
        running = self.api.run("sleep", "600")
        for field in ("BlkioWeightDevice", "BlkioDeviceReadBps", "BlkioDeviceWriteBps", "BlkioDeviceReadIOps",
                      "BlkioDeviceWriteIOps"):
            key = "Weight" if "Weight" in field else "Rate"
            for item in ({}, {"Path": None, key: 10}, {"Path": "/dev/null\0", key: 10}, {"Path": "", key: 10},
                         {"Path": "/dev/null"}, {"Path": "/dev/null", key: None}, {"Path": "/dev/null", key: -1}):
                with self.subTest(field, item=item):
                    self.refused(400, self.api.post("/containers/create", {
                        "Image": "base", "Cmd": ["true"], "HostConfig": {field: [item]}}), f"invalid {field}")
                    self.refused(400, self.api.post(f"/containers/{running}/update", {field: [item]}),
                                 f"invalid {field}")
        for field in ("Dns", "DnsOptions", "DnsSearch", "ExtraHosts", "GroupAdd", "CapAdd", "SecurityOpt", "Links",
                      "VolumesFrom", "Binds", "DeviceCgroupRules", "Devices", "Ulimits", "Mounts", "MaskedPaths",
                      "ReadonlyPaths"):
            for item in ("", "\0", " ", {}):
                with self.subTest(field, item=item):
                    answer = self.api.post("/containers/create", {"Image": "base", "Cmd": ["true"],
                                                                  "HostConfig": {field: [item]}})
                    if answer.status == 201:
                        answer = self.api.post(f"/containers/{answer.json['Id']}/start")
                    self.assertLess(answer.status, 500, answer)

    def test_secrets_that_are_not_base64(self):
        for secret in ("a", "%%%%", "\u00e4"):
            header = base64.urlsafe_b64encode(json.dumps({"x": secret}).encode()).decode()
            self.refused(400, self.api.call("POST", "/build", b"", {"X-Pydock-Secrets": header}), "X-Pydock-Secrets")

    def test_a_tls_client_that_never_shakes_hands_is_given_up(self):
        class Tls:
            def wrap_socket(self, connection, server_side):
                self.timeout = connection.gettimeout()
                raise socket.timeout("timed out")
        ours, theirs = socket.socketpair()
        with ours, theirs:
            tls = Tls()
            pydock._serve_connection(None, ours, None, tls)
            self.assertEqual((tls.timeout, theirs.recv(1)), (pydock.MAX_SECONDS_A_HEAD, b""))

    def test_archive_paths_that_cannot_be(self):
        container = self.api.create("true")
        for method in ("GET", "HEAD", "PUT"):
            body = tar_of(file_("x", b"")) if method == "PUT" else None
            answer = self.api.call(method, f"/containers/{container}/archive", body, path="/" + "a" * 5000)
            self.assertEqual(answer.status, 400, (method, answer))

    def test_characters_that_nothing_can_hold(self):
        """Half a surrogate pair becomes U+FFFD, as in Go; NUL, which no argument of a system call can hold, is
        refused."""
        container = self.api.run("sleep", "600")
        self.assertEqual(self.api.execute(container, "echo", "-n", "a\ud800b\U0001f600"), (0, "a\ufffdb\U0001f600"))
        self.assertEqual(self.api.output("sh", "-c", "echo $A", Env=["A=\udc00"]), "\ufffd\n")
        for body in ({"Cmd": ["a\0"]}, {"Cmd": ["true"], "WorkingDir": "/\0"}, {"Cmd": ["true"], "Env": ["A=\0"]},
                     {"Cmd": ["true"], "User": "\0"}):
            self.refused(400, self.api.post(f"/containers/{container}/exec", body), "NUL")
        self.refused(400, self.api.post("/containers/create",
                                        {"Image": "base", "Cmd": ["true"], "HostConfig": {"Dns": ["\0"]}}),
                     "not correctly formatted")

    def test_null_everywhere(self):
        model = self.api.inspect(self.api.create("true"))
        config = {key: None for key in model["Config"]}
        host = {key: None for key in model["HostConfig"]}
        answer = self.api.post("/containers/create", dict(config, Image="base", Cmd=["echo", "x"], HostConfig=host,
                                                          NetworkingConfig=None))
        self.assertEqual(answer.status, 201, answer)
        self.api.start(answer.json["Id"])
        self.assertEqual(self.api.wait(answer.json["Id"]), 0)

    def test_unknown_keys_are_passed_over(self):
        answer = self.api.post("/containers/create", {"Image": "base", "Cmd": ["true"], "Nosuch": 1,
                                                      "HostConfig": {"Nosuch": {}, "IOMaximumIOps": 0}})
        self.assertEqual(answer.status, 201, answer)

    def test_names_and_prefixes(self):
        # of 17 ids, at least two begin with the same of 16 digits
        idents = [self.api.create("true", NetworkMode="none") for _ in range(17)]
        first = next(letter for letter in "0123456789abcdef" if sum(i.startswith(letter) for i in idents) > 1)
        self.refused(400, self.api.get(f"/containers/{first}/json"),
                     f"Multiple IDs found with provided prefix: {first}")
        self.assertEqual(self.api.inspect(idents[0][:16])["Id"], idents[0])
        for name in ("a", "-ab", "a/b", "a b", "ä" * 3, "../x", "x" * 300 + "/", "a\n"):
            self.refused(400, self.api.post("/containers/create", {"Image": "base", "Cmd": ["true"]}, name=name))
        named = self.api.create("true", name=idents[0][:12] + "x")
        self.assertEqual(self.api.inspect(idents[0][:12] + "x")["Id"], named)
        self.api.call("POST", "/containers/create", {"Image": "base", "Cmd": ["true"]}, name=idents[1])  # CVE-2014-5278
        self.assertEqual(self.api.inspect(idents[1])["Name"], self.api.inspect(idents[1][:32])["Name"])
        self.assertNotEqual(self.api.inspect(idents[1])["Name"], "/" + idents[1])
        wrong = "sha256:" + "0" * 64
        for name in ("base@" + wrong, "base:latest@" + wrong):
            self.refused(404, self.api.post("/containers/create", {"Image": name, "Cmd": ["true"]}), "No such image")
        for path in ("/containers/..%2f..%2fetc/json", "/containers/%00/json", "/images/..%2f..%2fx/json",
                     "/volumes/..%2f..", "/exec/../json"):
            self.assertIn(self.api.get(path).status, (400, 404), path)

    def test_binds_that_cannot_be(self):
        folder = self.folder()
        for bind, part in (("/a:relative", ""), (folder + ":/x:bogus", "mode"), (":/x", ""), ("/a:/b:ro:rw:z", ""),
                           (folder + ":", "")):
            answer = self.api.post("/containers/create",
                                   {"Image": "base", "Cmd": ["true"], "HostConfig": {"Binds": [bind]}})
            self.refused(400, answer, part)
        self.api.create("true", Binds=["relative:/x"])  # a source that is no absolute path is a volume's name
        answer = self.api.post("/containers/create", {"Image": "base", "Cmd": ["true"], "HostConfig": {
            "Mounts": [{"Type": "bind", "Source": folder + "/missing", "Target": "/x"}]}})
        self.refused(400, answer, f"bind source path does not exist: {folder}/missing")
        self.assertEqual(self.api.output("ls", "-d", "/x", Binds=[folder + "/made:/x"]), "/x\n")
        self.assertTrue(os.path.isdir(folder + "/made"))
        for name in ("a/b", "..", "-x", "a b", "x" * 300):
            self.refused(400, self.api.post("/volumes/create", {"Name": name}))

    def test_missing_command(self):
        self.assertEqual(self.api.post("/images/create", tar_of(*small_root()), fromSrc="-", repo="plain").status, 200)
        self.refused(400, self.api.post("/containers/create", {"Image": "plain"}), "no command specified")

    def test_sizes_and_filters(self):
        self.api.wait(self.api.run("sh", "-c", "head -c 100000 /dev/zero >/f", name="sized"))
        self.assertGreater(self.api.ok("GET", "/containers/json", all=1, size=1)[0]["SizeRw"], 90000)
        for query in ({"filters": "{"}, {"filters": "[]"}, {"filters": {"nosuch": ["x"]}}, {"limit": "x"},
                      {"filters": {"status": ["nosuch"]}}):
            self.assertEqual(self.api.get("/containers/json", **query).status, 400, query)
        usage = self.api.ok("GET", "/system/df")
        self.assertEqual(len(usage["Containers"]), 1)
        self.assertIn("TYPE", self.pydock("system", "df").out)

    def test_stats(self):
        container = self.api.run("sleep", "600")
        stats = self.api.ok("GET", f"/containers/{container}/stats", stream=0)
        self.assertEqual(stats["id"], container)
        for key in ("cpu_stats", "memory_stats", "pids_stats", "networks"):
            self.assertIn(key, stats)
        self.assertIn(container[:12], self.pydock("stats", "--no-stream").out)

    def test_events_while_they_happen(self):
        seen = []
        with self.api.stream("GET", "/events", filters={"type": ["container"]}) as response:
            self.api.output("true")
            while not seen or seen[-1]["Action"] != "destroy":
                seen.append(json.loads(response.readline()))
        self.assertEqual([e["Action"] for e in seen], ["create", "start", "die", "destroy"])
        for event in seen:
            self.assertEqual((event["Type"], event["status"], event["from"]), ("container", event["Action"], "base"))
            self.assertIn("name", event["Actor"]["Attributes"])
            self.assertEqual(event["timeNano"] // 10 ** 9, event["time"])

    def test_many_connections(self):
        with contextlib.ExitStack() as stack:
            for _ in range(200):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(self.daemon.socket)
                sock.sendall(b"GET /_pi")
            self.assertEqual(self.api.get("/_ping").status, 200)
        self.assertEqual(self.api.get("/_ping").status, 200)

    def test_a_slow_pattern(self):
        """A pattern that would make a regular expression backtrack does not block the daemon: it answers within the
        client's time limit of 30 seconds."""
        self.api.create("true", name="x" + "a" * 60)
        for pattern in ("(a*)*b", "a" * 5000 + "*" * 50, "[" * 1000, "(" * 500):
            for path, filters in (("/containers/json", {"name": [pattern]}),
                                  ("/images/json", {"reference": [pattern]})):
                self.assertIn(self.api.get(path, all=1, filters=filters).status, (200, 400), (path, pattern[:20]))


class TcpTest(DaemonCase):
    """A TCP listener, which web pages in a browser on the same machine could reach."""

    @classmethod
    def setUpClass(cls):
        cls.port = free_port()
        cls.flags = ("-H", f"tcp://127.0.0.1:{cls.port}")
        super().setUpClass()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.port), 10)

    def ask(self, *headers, method="GET", path="/containers/json", body=b"", host="localhost"):
        """Send a request with these header lines: (status, the whole response as bytes)."""
        lines = [f"{method} {path} HTTP/1.1"] + (["Host: " + host] if host is not None else []) + list(headers)
        lines += ([f"Content-Length: {len(body)}", "Connection: close"] if body or method == "POST"
                  else ["Connection: close"])
        with self.connect() as sock:
            sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            answer = b"".join(iter(lambda: sock.recv(65536), b""))
        return int(answer.split()[1]), answer

    def test_hosts(self):
        for host, status in (("", 200), ("localhost", 200), (f"127.0.0.1:{self.port}", 200), ("[::1]:80", 200),
                             ("evil.example", 403), ("localhost.evil.example", 403)):
            self.assertEqual(self.ask(host=host)[0], status, host)

    def test_pages_of_others(self):
        body = b'{"Image":"base","Cmd":["true"]}'
        for headers in (["Origin: http://evil.example"], ["Origin: null"], ["Origin: http://localhost"]):
            self.assertEqual(self.ask(*headers)[0], 403)
            self.assertEqual(self.ask("Content-Type: application/json", *headers, method="POST",
                                      path="/containers/create", body=body)[0], 403)
        for kind in ("text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"):
            self.assertIn(self.ask("Content-Type: " + kind, method="POST", path="/containers/create", body=body)[0],
                          (400, 403), kind)
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])
        self.assertNotIn(b"Access-Control", self.ask()[1])

    def test_pages_whose_browser_names_no_origin(self):
        container = self.api.run("sleep", "600")
        browser = "User-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:60.0) Gecko/20100101 Firefox/60.0"
        for headers in (["Content-Type: text/plain", browser], ["Content-Type: text/plain"],
                        ["Content-Type: Text/Plain;charset=UTF-8", browser], ["Sec-Fetch-Site: cross-site"],
                        ["Sec-Fetch-Site: same-site"]):
            status, answer = self.ask(*headers, method="POST", path=f"/containers/{container}/kill")
            self.assertEqual(status, 403, (headers, answer))
        self.assertTrue(self.api.state(container)["Running"])
        self.assertEqual(self.ask("Sec-Fetch-Site: cross-site")[0], 403)
        for site in ("none", "same-origin"):
            self.assertEqual(self.ask("Sec-Fetch-Site: " + site, browser)[0], 200, site)
        self.assertEqual(self.ask("Content-Type: text/plain", "User-Agent: Docker-Client/28.2.2 (linux)", method="POST",
                                  path=f"/containers/{container}/kill")[0], 204)

    client_flags = ()

    def test_the_command_lines_use_it(self):
        address = ["-H", f"tcp://127.0.0.1:{self.port}", *self.client_flags]
        archive = os.path.join(self.folder(), "x.tar")
        write(archive, tar_of(*small_root()))
        for program in CLIENT_COMMANDS:
            result = run_program(program + address + ["run", "--rm", "-i", "base", "cat"], input="over TCP")
            self.assertEqual((result.code, result.out), (0, "over TCP"), result)
            result = run_program(program + address + ["import", archive, "imported"])  # docker sends it as text/plain
            self.assertEqual(result.code, 0, result)

    def test_with_cors(self):
        self.daemon.restart("-api-enable-cors")
        self.addCleanup(self.daemon.restart)
        status, answer = self.ask("Origin: http://page.example")
        self.assertEqual(status, 200)
        self.assertIn(b"Access-Control-Allow-Origin: *", answer)


@needs_program("openssl")
class TlsTest(TcpTest):
    """A TLS listener: to a page, its user's browser lends the user's certificate."""

    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp(dir=SCRATCH)
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.certificate, key = folder + "/cert.pem", folder + "/key.pem"
        make_self_signed_certificate(key, cls.certificate, "IP:127.0.0.1,DNS:Docker.Example,DNS:*.cluster.example",
                                     "keyUsage=keyCertSign,digitalSignature")
        cls.client_flags = ("--tlsverify", "--tlscacert", cls.certificate, "--tlscert", cls.certificate,
                            "--tlskey", key)
        cls.tls = ssl.create_default_context(cafile=cls.certificate)
        cls.tls.load_cert_chain(cls.certificate, key)
        cls.port = free_port()
        cls.flags = ("-H", f"tcp://127.0.0.1:{cls.port}") + cls.client_flags
        super(TcpTest, cls).setUpClass()

    def connect(self):
        return self.tls.wrap_socket(super().connect(), server_hostname="127.0.0.1")

    def test_names_of_the_certificate(self):
        for host, status in (("docker.example", 200), ("DOCKER.example:2376", 200), ("a.cluster.example", 200),
                             ("ocker.example", 403), ("docker.example.evil", 403), ("a.b.cluster.example", 403),
                             (".", 403), (":80", 403), ("evil.example", 403)):
            self.assertEqual(self.ask(host=host)[0], status, host)


class OldClient:
    """A client of API 1.3, or of another old version, that writes its requests as docker's client of 2013 did: with an
    empty Host, a connection for each call, JSON as application/json and everything else as plain/text. `address` is the
    path of a unix socket or (host, port)."""

    def __init__(self, address, version="1.3"):
        self.address, self.version = address, version

    def connect(self, timeout=30):
        sock = socket.socket(socket.AF_UNIX if isinstance(self.address, str) else socket.AF_INET)
        sock.settimeout(timeout)
        sock.connect(self.address)
        return sock

    def send(self, method, path, body=None, query=None, kind=None):
        """Send a request on a new connection and return its socket."""
        data, default_kind = body or b"", "plain/text"
        if body is not None and not isinstance(body, bytes):
            data, default_kind = json.dumps(body).encode(), "application/json"
        query = "?" + urllib.parse.urlencode(query) if query else ""
        head = [f"{method} /v{self.version}{path}{query} HTTP/1.1", "Host: ", "User-Agent: Docker-Client/0.5.0",
                "Content-Type: " + (kind or default_kind), f"Content-Length: {len(data)}", "", ""]
        sock = self.connect()
        sock.sendall("\r\n".join(head).encode() + data)
        return sock

    def call(self, method, path, body=None, kind=None, /, **query):
        with contextlib.closing(self.send(method, path, body, query, kind)) as sock:
            response = http.client.HTTPResponse(sock, method=method)
            response.begin()
            # the client of 2013 used Go's httputil.ClientConn, which takes this header for an error
            if response.getheader("Connection") == "close":
                raise AssertionError(f"{method} {path}: persistent connection closed")
            return Answer(response)

    def get(self, path, /, **query):
        return self.call("GET", path, **query)

    def post(self, path, body=None, kind=None, /, **query):
        return self.call("POST", path, body, kind, **query)

    def delete(self, path, /, **query):
        return self.call("DELETE", path, **query)

    def hijack(self, container, **query):
        """Attach to a container. `head` of the returned stream is the head of the response."""
        stream = Hijacked(self.send("POST", f"/containers/{container}/attach", query=query), "", b"")
        stream.head = stream.read_until(b"\r\n\r\n").decode()
        return stream

    def create(self, *command, **config):
        """Create a container and return its short id."""
        answer = self.post("/containers/create", dict({"Image": "base", "Cmd": list(command)}, **config))
        if answer.status != 201:
            raise AssertionError(repr(answer))
        return answer.json["Id"]

    def run(self, *command, binds=None, **config):
        ident = self.create(*command, **config)
        answer = self.post(f"/containers/{ident}/start", {"Binds": binds})
        if answer.status != 204:
            raise AssertionError(repr(answer))
        return ident

    def wait(self, ident):
        return self.post(f"/containers/{ident}/wait").json["StatusCode"]

    def inspect(self, ident):
        return self.get(f"/containers/{ident}/json").json

    def rows(self, **query):
        """{short id: entry} of the list of containers, newest first."""
        return {entry["Id"][:12]: entry for entry in self.get("/containers/json", **query).json}


class MonitorFolderTest(unittest.TestCase):
    """A container that is started again at once gets a new monitor before the old one has removed its folder."""

    def monitor(self):
        monitor = pydock.Monitor.__new__(pydock.Monitor)
        monitor.run = self.run_folder
        return monitor

    def setUp(self):
        self.run_folder = os.path.join(tempfile.mkdtemp(dir=SCRATCH), "run")
        self.addCleanup(shutil.rmtree, os.path.dirname(self.run_folder))

    def test_the_socket_of_the_next_one_stays(self):
        first, second = self.monitor(), self.monitor()
        with first._listen(), second._listen():
            first._leave_folder()
            with contextlib.closing(pydock.MonitorLink._connect(self.run_folder)):
                pass
            second._leave_folder()
        self.assertFalse(os.path.exists(self.run_folder))

    def test_a_folder_that_is_gone_is_not_made_again(self):
        monitor = self.monitor()
        with monitor._listen():
            shutil.rmtree(self.run_folder)
            monitor._leave_folder()
        self.assertFalse(os.path.exists(self.run_folder))

    def test_coming_and_going_at_once(self):
        def come_and_go():
            for _ in range(200):
                monitor = self.monitor()
                with monitor._listen():
                    monitor._leave_folder()
        failed = []
        with mock.patch.object(threading, "excepthook", failed.append):
            run_threads([threading.Thread(target=come_and_go) for _ in range(3)])
        self.assertEqual(failed, [])
        self.assertFalse(os.path.exists(self.run_folder))


class AttachTest(unittest.TestCase):
    def test_a_monitor_that_ends_meanwhile(self):
        """A monitor ends while it is given an attach. The client has got the head of the response once by then; the
        next monitor sends it what was printed, and the end."""
        class Link:
            def __init__(self, pid, gone):
                self.pid, self.gone, self.requests = pid, gone, []

            def request(self, op, fds=(), **arguments):
                self.requests.append((op, arguments.get("stream")))
                if op == "attach" and self.gone:
                    raise pydock.MonitorGone("gone")
                return {"pid": self.pid}

            def hand_over(self, op, take, **arguments):
                take()
                return self.request(op, **arguments)
        links, heads = [Link(7, True), Link(None, False)], []
        container = mock.Mock(tty=False, paused=False, running=True, lock=threading.RLock(), state={"started": 1},
                              config={"OpenStdin": False})

        def take():
            container.running = False
            heads.append(1)
            return os.open("/dev/null", os.O_RDONLY), b""
        containers = pydock.Containers.__new__(pydock.Containers)
        containers.emit, left = lambda *_: None, list(links)
        with mock.patch.object(containers, "monitor_of", lambda _: left.pop(0), create=True):
            containers.attach(container, take, {"stdin": 0, "stdout": 1, "stderr": 1, "logs": 1, "stream": True,
                                                "framed": True, "detach_keys": None})
        self.assertEqual(len(heads), 1)
        self.assertEqual([link.requests for link in links],
                         [[("hello", None), ("attach", True)], [("hello", None), ("attach", False)]])


class OldCalls:
    """Every call of API 1.3, made by the client `self.old`. Several tests look at the same objects through today's API,
    or the other way round."""

    def plain(self, status, answer, text):
        """Check an error in the form of 2013: this status, and this sentence as plain text."""
        self.assertEqual((answer.status, answer.body.decode()), (status, text + "\n"))
        self.assertEqual(answer.headers["Content-Type"], "text/plain; charset=utf-8")

    def no_content(self, answer):
        self.assertEqual((answer.status, answer.body), (204, b""))

    # containers

    def test_create_and_inspect(self):
        old, folder = self.old, self.folder(a="there")
        answer = old.post("/containers/create", {
            "Hostname": "seed", "User": "", "Memory": 64 << 20, "MemorySwap": -1, "CpuShares": 512,
            "AttachStdin": False, "AttachStdout": True, "AttachStderr": True,
            "PortSpecs": ["8080", f":{self.port_of_host}", "53/udp"], "Tty": False, "OpenStdin": False,
            "StdinOnce": False, "Env": ["A=b"],
            "Cmd": ["sh", "-c", "cat /v/a; cat /etc/resolv.conf; hostname; echo $A; sleep 600"], "Dns": ["9.9.9.9"],
            "Image": "base", "Volumes": {"/v": {}}, "VolumesFrom": "", "Entrypoint": []})
        self.assertEqual((answer.status, sorted(answer.json), len(answer.json["Id"])), (201, ["Id", "Warnings"], 12))
        ident = answer.json["Id"]
        self.assertEqual(old.inspect(ident)["NetworkSettings"],
                         {"IPAddress": "", "IPPrefixLen": 0, "Gateway": "", "Bridge": "", "PortMapping": None})
        self.no_content(old.post(f"/containers/{ident}/start", {"Binds": [folder + ":/v:ro"]}))
        self.wait_for_output(ident, "\x02b\n")
        self.assertEqual(output_of(self.api.logs(ident)), b"therenameserver 9.9.9.9\nseed\nb\n")
        inspected = old.inspect(ident)
        self.assertEqual(sorted(inspected), ["Args", "Config", "Created", "ID", "Image", "NetworkSettings", "Path",
                                             "ResolvConfPath", "State", "SysInitPath", "Volumes", "VolumesRW"])
        self.assertEqual((inspected["Path"], inspected["Args"][0], len(inspected["ID"]), len(inspected["Image"])),
                         ("sh", "-c", 64, 64))
        config = inspected["Config"]
        self.assertEqual(sorted(config.pop("PortSpecs")), sorted(["8080", f":{self.port_of_host}", "53/udp"]))
        self.assertEqual(sorted(config.pop("Env"))[0], "A=b")
        self.assertEqual(config.pop("Cmd")[:2], ["sh", "-c"])
        self.assertEqual(config, {
            "Hostname": "seed", "User": "", "Memory": 64 << 20, "MemorySwap": -1, "CpuShares": 512,
            "AttachStdin": False, "AttachStdout": True, "AttachStderr": True, "Tty": False, "OpenStdin": False,
            "StdinOnce": False, "Dns": ["9.9.9.9"], "Image": "base", "Volumes": {"/v": {}}, "VolumesFrom": "",
            "Entrypoint": []})
        state = inspected["State"]
        self.assertEqual(sorted(state), ["ExitCode", "Ghost", "Pid", "Running", "StartedAt"])
        self.assertEqual((state["Running"], state["Ghost"]), (True, False))
        self.assertEqual(int(read(f"/proc/{state['Pid']}/stat").split()[0]), state["Pid"])
        network = inspected["NetworkSettings"]
        self.assertEqual((network["Gateway"], network["Bridge"], network["IPPrefixLen"]),
                         (self.daemon.gateway, self.daemon.bridge, 24))
        self.assertEqual(sorted(network["PortMapping"]["Tcp"]), sorted(["8080", str(self.port_of_host)]))
        self.assertEqual(network["PortMapping"]["Tcp"][str(self.port_of_host)], str(self.port_of_host))
        public = network["PortMapping"]["Tcp"]["8080"], network["PortMapping"]["Udp"]["53"]
        self.assertGreaterEqual(int(public[0]), 49153)
        self.assertEqual((inspected["Volumes"], inspected["VolumesRW"]), ({"/v": folder}, {"/v": False}))
        self.assertTrue(inspected["SysInitPath"].endswith("pydock.py"))
        today = self.api.inspect(ident)
        host = today["HostConfig"]
        self.assertEqual((today["Id"], host["Memory"], host["CpuShares"], host["Dns"]),
                         (inspected["ID"], 64 << 20, 512, ["9.9.9.9"]))
        self.assertEqual((host["Binds"], today["NetworkSettings"]["Ports"]["8080/tcp"][0]["HostPort"]),
                         ([folder + ":/v:ro"], public[0]))
        self.assertEqual(self.api.ok("GET", "/volumes")["Volumes"], [])  # the bind was mounted instead of a volume

    def test_binds_stay_for_the_next_start(self):
        old, folder = self.old, self.folder(a="1")
        ident = old.run("cat", "/v/a", Volumes={"/v": {}, "/w": {}}, binds=[folder + ":/v"])
        self.assertEqual(old.wait(ident), 0)
        volume = old.inspect(ident)["Volumes"]["/w"]
        self.no_content(old.post(f"/containers/{ident}/start"))
        self.assertEqual(old.wait(ident), 0)
        self.assertEqual(output_of(self.api.logs(ident)), b"11")
        self.assertEqual(old.inspect(ident)["Volumes"], {"/v": folder, "/w": volume})
        other = self.folder(a="2")
        self.no_content(old.post(f"/containers/{ident}/start", {"Binds": [other + ":/v"]}))
        self.assertEqual((old.wait(ident), output_of(self.api.logs(ident))), (0, b"112"))
        self.no_content(old.delete("/containers/" + ident, v=1))
        self.assertEqual(self.api.ok("GET", "/volumes")["Volumes"], [])

    def test_volumes_from(self):
        first = self.old.run("sh", "-c", "echo shared > /v/x", Volumes={"/v": {}})
        self.assertEqual(self.old.wait(first), 0)
        second = self.old.run("cat", "/v/x", VolumesFrom=first)
        self.assertEqual((self.old.wait(second), output_of(self.api.logs(second))), (0, b"shared\n"))
        self.assertEqual(self.old.inspect(second)["Config"]["VolumesFrom"], first)
        answer = self.old.post("/containers/create", {"Image": "base", "Cmd": ["true"], "VolumesFrom": "nosuch"})
        self.plain(500, answer, "Container nosuch not found. Impossible to mount its volumes")

    def test_list(self):
        old = self.old
        idents = [old.create("true"), old.run("sleep", "600", PortSpecs=["80", "53/udp"]),
                  old.run("sh", "-c", "exit 3")]
        self.assertEqual(old.wait(idents[2]), 3)
        rows = old.rows(all=1)
        self.assertEqual([rows[i]["Status"].split()[0] for i in idents], ["Exit", "Up", "Exit"])
        self.assertEqual((rows[idents[0]]["Status"], rows[idents[2]]["Status"]), ("Exit 0", "Exit 3"))
        self.assertRegex(rows[idents[1]]["Status"], "^Up (Less than a second|[0-9]+ seconds)$")
        self.assertEqual(set(rows[idents[1]]), set("Id Image Command Created Status Ports SizeRw SizeRootFs".split()))
        running = rows[idents[1]]
        self.assertEqual((running["Image"], running["Command"], len(running["Id"])), ("base:latest", "sleep 600", 64))
        self.assertRegex(running["Ports"], r"^\d+->53/udp, \d+->80$|^\d+->80, \d+->53/udp$")
        self.assertEqual(rows[idents[1]]["SizeRootFs"], 0)
        self.assertGreater(old.rows(size=1)[idents[1]]["SizeRootFs"], 100000)
        newest = list(reversed(idents))
        for query, expected in (({}, [idents[1]]), ({"limit": 1}, newest[:1]), ({"limit": 0}, []),
                                ({"limit": -1}, [idents[1]]), ({"limit": "x"}, [idents[1]]),
                                ({"since": idents[0]}, newest[:2]), ({"before": idents[2]}, newest[1:]),
                                ({"since": idents[0], "before": idents[2]}, [idents[1]]), ({"before": "nosuch"}, []),
                                ({"since": "nosuch"}, newest), ({"all": "True", "limit": 2}, newest[:2]),
                                ({"all": "0"}, [idents[1]])):
            with self.subTest(query):
                self.assertEqual(list(old.rows(**query)), expected)
        self.assertEqual(old.get("/containers/ps", all=1).json, old.get("/containers/json", all=1).json)
        self.plain(400, old.get("/containers/json", all="maybe"), "Bad parameter")

    def test_life(self):
        old, trap = self.old, ["sh", "-c", "trap 'exit 5' TERM; echo up; while true; do sleep 0.1; done"]
        ident = old.run(*trap)
        self.wait_for_output(ident, "up")
        path = "/containers/" + ident
        self.plain(500, old.post(path + "/start"),
                   f"Error starting container {ident}: The container {old.inspect(ident)['ID']} is already running.")
        self.plain(406, old.delete(path), "Impossible to remove a running container, please stop it first")
        self.no_content(old.post(path + "/stop", t=20))
        self.assertEqual(old.wait(ident), 5)
        self.no_content(old.post(path + "/stop"))
        self.no_content(old.post(path + "/kill"))
        self.no_content(old.post(path + "/restart", t=1))
        self.assertTrue(old.inspect(ident)["State"]["Running"])
        self.no_content(old.post(path + "/kill"))
        self.assertEqual((old.wait(ident), old.inspect(ident)["State"]["ExitCode"]), (137, 137))
        self.plain(400, old.delete(path, v="perhaps"), "Bad parameter")
        self.no_content(old.delete(path, v=1))
        self.plain(404, old.delete(path), "No such container: " + ident)
        self.assertEqual(old.wait(old.create("true")), 0)  # a wait for a container that was never started ends at once

    def test_looking_in(self):
        old = self.old
        ident = old.run("sh", "-c", "echo x > /etc/new; rm /etc/passwd; echo done; sleep 600")
        self.wait_for_output(ident, "done")
        self.assertEqual(old.get(f"/containers/{ident}/changes").json, [
            {"Path": "/etc", "Kind": 0}, {"Path": "/etc/new", "Kind": 1}, {"Path": "/etc/passwd", "Kind": 2}])
        top = old.get(f"/containers/{ident}/top").json
        self.assertEqual(sorted(top[0]), ["Cmd", "PID", "Time", "Tty"])
        self.assertIn("sleep", [row["Cmd"] for row in top])
        self.assertIn(str(old.inspect(ident)["State"]["Pid"]), [row["PID"] for row in top])
        answer = old.get(f"/containers/{ident}/export")
        self.assertEqual(answer.headers["Content-Type"], "application/octet-stream")
        with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
            self.assertEqual(tar.extractfile("etc/new").read(), b"x\n")
        old.post(f"/containers/{ident}/kill")
        self.assertEqual(old.get(f"/containers/{ident}/top").json, [])

    def test_what_today_made(self):
        """A container that today's API has made, looked at through the calls of 2013."""
        old, folder = self.old, self.folder()
        ident = self.api.run("sh", "-c", "sleep 600", name="today", Binds=[folder + ":/b:ro", "named:/n"],
                             Memory=32 << 20, PortBindings={"80/tcp": [{"HostPort": ""}]},
                             ExposedPorts={"80/tcp": {}, "81/tcp": {}})
        inspected = old.inspect("today")
        self.assertEqual((inspected["ID"], inspected["Volumes"]["/b"], inspected["VolumesRW"]),
                         (ident, folder, {"/b": False, "/n": True}))
        config = inspected["Config"]
        self.assertEqual((config["PortSpecs"], config["Memory"], config["MemorySwap"]), (["80"], 32 << 20, 0))
        self.assertEqual(list(inspected["NetworkSettings"]["PortMapping"]["Tcp"]), ["80"])
        self.api.ok("POST", "/containers/today/pause")
        self.assertRegex(old.rows()[ident[:12]]["Status"], "^Up ")
        self.api.ok("POST", "/containers/today/unpause")
        self.no_content(old.post("/containers/today/kill"))
        self.no_content(old.delete("/containers/today"))
        self.assertEqual(self.api.ok("GET", "/volumes")["Volumes"][0]["Name"], "named")

    def test_with_the_docker_cli(self):
        """Containers and images of today's docker CLI can be used through the old API, and the other way round."""
        old = self.old
        self.docker("run", "-dit", "--name", "cli", "-p", "80", "-v", "vol:/v", "base", "sh")
        self.assertEqual(list(old.inspect("cli")["NetworkSettings"]["PortMapping"]["Tcp"]), ["80"])
        with contextlib.closing(old.hijack("cli", stream=1, stdin=1, stdout=1, stderr=1)) as stream:
            stream.send(b"echo a$((1+1))b > /v/f; cat /v/f\n")
            stream.read_until(b"a2b")
            stream.send(b"\x10\x11")
            stream.read_all()
        self.assertIn("a2b", self.docker("logs", "cli").out)
        self.no_content(old.post("/containers/cli/kill"))
        ident = old.create("sh", "-c", "cat /v/f; exit 6", VolumesFrom="cli")
        self.assertEqual(self.docker("start", "-a", ident, code=6).out, "a2b\n")
        self.assertEqual(old.rows(all=1)[ident]["Status"], "Exit 6")
        made = old.post("/commit", {"Cmd": ["echo", "of 2013"]}, container=ident, repo="both").json["Id"]
        self.assertEqual(self.docker("run", "--rm", "both").out, "of 2013\n")
        self.assertIn(made, self.docker("images", "-q").out)

    # attach

    def test_attach(self):
        old = self.old
        ident = old.run("sh", "-c", "echo out; echo err >&2; read line; echo got $line; exit 4", OpenStdin=True,
                        AttachStdin=True, StdinOnce=True)
        self.wait_for_output(ident, "err")
        with contextlib.closing(old.hijack(ident, logs=1, stream=1, stdin=1, stdout=1, stderr=1)) as stream:
            self.assertEqual(stream.head, "HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\n")
            stream.read_until(b"err\n")
            stream.send(b"this\n")
            stream.end()
            self.assertEqual(stream.read_all(), b"got this\n")
        self.assertEqual(old.wait(ident), 4)
        for query, text in (({"logs": 1, "stdout": 1}, b"out\ngot this\n"), ({"logs": 1, "stderr": 1}, b"err\n"),
                            ({"logs": 1, "stream": 1, "stdout": 1, "stderr": 1}, b"out\nerr\ngot this\n"),
                            ({"stdout": 1}, b"")):
            with self.subTest(query), contextlib.closing(old.hijack(ident, **query)) as stream:
                stream.end()  # as the client of 2013 did when it had no input
                self.assertEqual(stream.read_all(), text)

    def test_logs_of_one_that_runs(self):
        ident = self.old.run("sh", "-c", "echo one; sleep 600")
        self.wait_for_output(ident, "one")
        with contextlib.closing(self.old.hijack(ident, logs=1, stdout=1)) as stream:
            stream.end()
            self.assertEqual(stream.read_all(), b"one\n")

    def test_attach_and_detach_with_a_terminal(self):
        old = self.old
        ident = old.run("sh", Tty=True, OpenStdin=True, AttachStdin=True, StdinOnce=True)
        answer = old.post(f"/containers/{ident}/resize", h=33, w=77)
        self.assertEqual((answer.status, answer.body), (200, b""))
        with contextlib.closing(old.hijack(ident, stream=1, stdin=1, stdout=1, stderr=1)) as stream:
            stream.send(b"stty size; echo a$((1+1))b\n")
            stream.read_until(b"33 77")
            stream.read_until(b"a2b")
            stream.send(b"\x10\x11")
            stream.read_all()  # the daemon ends the stream after the detach keys
        self.assertTrue(old.inspect(ident)["State"]["Running"])
        with contextlib.closing(old.hijack(ident, stream=1, stdin=1, stdout=1, stderr=1)) as stream:
            stream.send(b"exit 9\n")
            stream.read_all()
        self.assertEqual(old.wait(ident), 9)

    def test_many_short_runs(self):
        """Start, then attach, as `docker run` of 2013 did: the client gets all output and the end of the stream,
        whether the container has ended by then or not."""
        for number in range(12):
            ident = self.old.run("echo", "run", str(number))
            with contextlib.closing(self.old.hijack(ident, logs=1, stream=1, stdout=1, stderr=1)) as stream:
                stream.end()
                self.assertEqual(stream.read_all(), b"run %d\n" % number)

    # images

    def test_images(self):
        old, base = self.old, self.api.ok("GET", "/images/base/json")["Id"][7:]
        self.assertEqual(old.post("/images/base/tag", repo="two/names", tag="t1").status, 201)
        ident = old.run("sh", "-c", "echo new > /new")
        old.wait(ident)
        answer = old.post("/commit", {"Cmd": ["cat", "/new"], "PortSpecs": ["22"], "Env": None}, container=ident,
                          repo="made", tag="v1", comment="said", author="someone")
        self.assertEqual((answer.status, list(answer.json), len(answer.json["Id"])), (201, ["Id"], 12))
        made = old.get("/images/made:v1/json").json
        self.assertEqual((made["id"][:12], made["parent"], made["container"][:12]), (answer.json["Id"], base, ident))
        self.assertEqual((made["comment"], made["author"], made["config"]["Cmd"], made["config"]["PortSpecs"]),
                         ("said", "someone", ["cat", "/new"], ["22"]))
        self.assertEqual(made["container_config"]["Cmd"], ["sh", "-c", "echo new > /new"])
        self.assertLessEqual(set(made), {"id", "parent", "comment", "created", "container", "container_config",
                                         "docker_version", "author", "config", "architecture", "Size"})
        rows = [row for row in old.get("/images/json").json if row["Repository"] not in ("host", "python")]
        self.assertEqual(sorted((row["Repository"], row["Tag"], row["Id"]) for row in rows), [
            ("base", "latest", base), ("made", "v1", made["id"]), ("two/names", "t1", base)])
        row = next(row for row in rows if row["Repository"] == "made")
        self.assertEqual(set(row), set("Repository Tag Id Created Size VirtualSize".split()))
        below = next(r["Size"] for r in rows if r["Tag"] == "latest")
        self.assertEqual((row["Size"], row["VirtualSize"]), (4, below + 4))
        self.assertEqual([r["Tag"] for r in old.get("/images/json", filter="two/names").json], ["t1"])
        self.plain(400, old.get("/images/json", all="x"), "Bad parameter")
        today = self.api.ok("GET", "/images/made:v1/json")
        self.assertEqual((today["Config"]["Cmd"], list(today["Config"]["ExposedPorts"])), (["cat", "/new"], ["22/tcp"]))
        history = old.get("/images/made:v1/history").json
        self.assertEqual([(entry["Id"], entry.get("CreatedBy")) for entry in history], [
            (made["id"][:12], "sh -c echo new > /new"), (base[:12], None)])
        self.assertEqual(sorted(history[1]["Tags"]), ["base:latest", "two/names:t1"])
        viz = old.get("/images/viz").body.decode()
        self.assertTrue(viz.startswith("digraph docker {\n") and viz.endswith(" base [style=invisible]\n}\n"), viz)
        self.assertIn(f' base -> "{base[:12]}" [style=invis]\n', viz)
        short = made["id"][:12]
        self.assertIn(f' "{base[:12]}" -> "{short}"\n', viz)
        self.assertIn(f' "{short}" [label="{short}\\nmade:v1",shape=box', viz)
        child = old.run("sh", "-c", "cat /new; sleep 600", Image="made:v1")
        self.assertEqual(list(old.inspect(child)["NetworkSettings"]["PortMapping"]["Tcp"]), ["22"])
        self.assertEqual(old.inspect(child)["Config"]["PortSpecs"], ["22"])
        old.post(f"/containers/{child}/kill")
        old.wait(child)
        old.delete("/containers/" + child)
        old.delete("/containers/" + ident)
        self.assertEqual(old.delete("/images/two/names:t1").json, [{"Untagged": base[:12]}])
        self.assertEqual(old.delete("/images/made:v1").json,
                         [{"Untagged": made["id"][:12]}, {"Deleted": made["id"][:12]}])
        self.plain(404, old.delete("/images/made:v1"), "No such image: made:v1")

    def test_commits(self):
        """A Cmd in the body of a commit replaces the command and the entrypoint; without a body the image has those of
        the container. The name of an image can be removed while a container uses the image."""
        old = self.old
        ident = old.run("-c", "exit 0", Entrypoint=["sh"], Env=["A=1"], Volumes={"/v": {}})
        old.wait(ident)
        for body, expected in (({"Cmd": ["echo", "x"]}, (["echo", "x"], None)),
                               ({"Cmd": ["-x"], "Entrypoint": ["e"]}, (["-x"], ["e"])),
                               (b"null", (["-c", "exit 0"], ["sh"])), (b"", (["-c", "exit 0"], ["sh"]))):
            with self.subTest(body):
                self.assertEqual(old.post("/commit", body, "application/json", container=ident, repo="commits").status,
                                 201)
                config = old.get("/images/commits/json").json["config"]
                self.assertEqual((config["Cmd"], config["Entrypoint"] or None), expected)
                self.assertEqual((config["Env"][0], config["Volumes"]), ("A=1", {"/v": {}}))
        user = old.create("true", Image="commits")
        made = old.get("/images/commits/json").json["id"][:12]
        self.assertEqual(old.delete("/images/commits").json, [{"Untagged": made}])
        self.assertEqual(old.rows(all=1)[user]["Image"], made)

    def test_tags_are_not_moved_without_force(self):
        old = self.old
        ident = old.run("sh", "-c", "echo 1 > /x")
        old.wait(ident)
        new = old.post("/commit", container=ident).json["Id"]
        self.assertEqual(old.post(f"/images/{new}/tag", repo="moving").status, 201)
        base = self.api.ok("GET", "/images/base/json")["Id"][7:19]
        self.plain(409, old.post("/images/base/tag", repo="moving"),
                   "Conflict: Tag moving:latest is already set to " + new)
        self.plain(400, old.post("/images/base/tag", repo="moving", force="x"), "Bad parameter")
        self.assertEqual(old.post("/images/base/tag", repo="moving", force=1).status, 201)
        self.assertEqual(old.get("/images/moving/json").json["id"][:12], base)
        untagged = [row for row in old.get("/images/json").json if row["Id"][:12] == new]
        self.assertEqual([sorted(row) for row in untagged], [["Created", "Id", "Size", "VirtualSize"]])
        self.plain(500, old.post("/images/base/tag"), "Repository name can't be empty")
        self.assertEqual(old.post("/images/base/tag", repo="Bad Name").status, 500)

    def test_cache_of_images(self):
        old, base = self.old, self.api.ok("GET", "/images/base/json")["Id"][7:]
        config = {"Cmd": ["sh", "-c", "echo 1 > /cached"], "PortSpecs": ["80"], "Memory": 64 << 20, "Env": ["X=1"]}
        ident = old.post("/containers/create", dict(config, Image="base")).json["Id"]
        old.post(f"/containers/{ident}/start")
        old.wait(ident)
        made = old.post("/commit", container=ident, repo="cached").json["Id"]
        answer = old.post("/images/getCache", dict(config, Id=base))
        self.assertEqual((answer.status, answer.json["Id"][:12]), (200, made))
        for change in ({"Cmd": ["sh"]}, {"Env": None}, {"PortSpecs": ["81"]}, {"Memory": 0}, {"OpenStdin": True},
                       {"Id": "nosuch"}, {"Id": made}, {"User": "1"}):
            with self.subTest(change):
                answer = old.post("/images/getCache", dict(dict(config, Id=base), **change))
                self.assertEqual((answer.status, answer.body), (404, b""))

    def test_insert(self):
        server = Files({"/f": (200, {}, b"inserted")})
        self.addCleanup(server.close)
        answer = self.old.post("/images/base/insert", url=server.url + "/f", path="/new/a b$c")
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, "application/json"), answer)
        made = answer.documents[-1]["Id"]
        self.assertEqual(answer.documents[-2]["status"][:12], made)
        self.assertEqual(self.api.output("sh", "-c", "cat '/new/a b$c'; stat -c %a '/new/a b$c'", image=made),
                         "inserted644\n")
        self.assertEqual(self.old.get(f"/images/{made}/json").json["parent"],
                         self.api.ok("GET", "/images/base/json")["Id"][7:])
        self.plain(404, self.old.post("/images/nosuch/insert", url=server.url, path="/x"), "No such image: nosuch")
        answer = self.old.post("/images/base/insert", url=server.url + "/nosuch", path="/x")
        self.assertIn("404", answer.documents[-1]["error"])
        self.assertEqual(self.old.post("/images/base/insert").status, 500)
        self.api.delete("/images/" + made, force=1)

    def test_import(self):
        data = gzip.compress(tar_of(file_("f", b"imported")))
        answer = self.old.post("/images/create", data, fromSrc="-", repo="imp", tag="t")
        self.assertEqual((answer.status, answer.headers["Content-Type"], [list(d) for d in answer.documents]),
                         (200, "application/json", [["status"]]))
        self.assertEqual(self.old.get("/images/imp:t/json").json["id"][:12], answer.documents[0]["status"])
        server = Files({"/a.tgz": (200, {}, data)})
        self.addCleanup(server.close)
        answer = self.old.post("/images/create", fromSrc=server.url + "/a.tgz", repo="imp2")
        self.assertEqual(answer.documents[0], {"status": f"Downloading from {server.url}/a.tgz"})
        self.assertEqual(self.old.get("/images/imp2/json").json["id"][:12], answer.documents[-1]["status"])
        self.assertIn("error", self.old.post("/images/create", fromSrc=server.url + "/nosuch").documents[-1])
        self.assertEqual(self.old.post("/images/create", b"no tar at all", fromSrc="-").status, 500)
        answer = OldClient(self.old.address, "1.0").post("/images/create", data, fromSrc="-", repo="imp3")
        self.assertEqual((answer.headers["Content-Type"], len(answer.body)), ("text/plain; charset=utf-8", 14))

    @unittest.skipUnless(shutil.which("docker-registry"), "needs docker-registry")
    def test_push_and_pull(self):
        registry = RealRegistry(self.folder())
        self.addCleanup(registry.close)
        name, old = registry.host + "/seed/base", self.old
        old.post("/images/base/tag", repo=name)
        answer = old.post(f"/images/{name}/push", json.dumps({"username": "", "password": "", "email": ""}).encode())
        self.assertEqual((answer.status, answer.headers["Content-Type"]), (200, "application/json"))
        self.assertLessEqual({key for message in answer.documents for key in message}, {"status", "progress"})
        self.assertTrue(all(isinstance(value, str) for message in answer.documents for value in message.values()))
        old.delete("/images/" + name)
        self.plain(404, old.post("/containers/create", {"Image": name, "Cmd": ["true"]}), "No such image: " + name)
        answer = old.post("/images/create", fromImage=name, tag="")  # the client of 2013 then pulls, and tries again
        self.assertEqual(answer.documents[0], {"status": "Pulling repository " + name})
        self.assertEqual(old.post("/containers/create", {"Image": name, "Cmd": ["true"]}).status, 201)
        answer = old.post("/images/create", fromImage="seed/base", registry=registry.host, tag="nosuch")
        self.assertEqual((answer.status, list(answer.documents[-1])), (200, ["error"]))
        text = OldClient(old.address, "1.0").post("/images/create", fromImage="seed/base", registry=registry.host,
                                                  tag="latest")
        self.assertTrue(text.body.startswith(b"Pulling repository %s\r\n" % name.encode()), text)
        self.assertNotIn(b"{", text.body)
        old.delete("/images/" + name)
        answer = old.post("/build", tar_of(file_("Dockerfile", b"FROM %s\n" % name.encode())))
        self.assertIn(b"Step 1 : FROM %s\nlatest: Pulling from seed/base\r\n" % name.encode(), answer.body)
        text = OldClient(old.address, "1.0").post("/images/nosuch/x/push")
        self.assertIn(b"\r\nError: ", text.body)
        self.plain(500, old.post(f"/images/{name}/push"), "the body must be a JSON object")

    def test_search_and_auth(self):
        fake = FakeRegistry()
        self.addCleanup(fake.close)

        def check(handler):
            good = handler.headers.get("Authorization") == "Basic " + base64.b64encode(b"me:right").decode()
            return (200, {}, b"{}") if good else (401, {"WWW-Authenticate": 'Basic realm="x"'}, b"{}")
        fake.answers["/v2/_catalog"] = (200, {}, json.dumps({"repositories": ["dhrp/sshd", "other"]}).encode())
        self.assertEqual(self.old.get("/images/search", term=fake.host + "/sshd").json, [
            {"Name": fake.host + "/dhrp/sshd", "Description": ""}])
        fake.answers["/v2/"] = check
        login = {"username": "me", "password": "right", "email": "me@x", "serveraddress": fake.host}
        answer = self.old.post("/auth", login)
        self.assertEqual((answer.status, answer.json), (200, {"Status": "Login Succeeded"}))
        self.plain(401, self.old.post("/auth", dict(login, password="wrong")), "Wrong login/password, please try again")
        first, path = OldClient(self.old.address, "1.1"), os.path.join(self.daemon.root, "auth.json")
        # up to API 1.1 the daemon stores the login; the one by 1.3 above has stored nothing
        self.assertEqual(first.get("/auth").json, {"username": "", "password": "", "email": ""})
        self.assertEqual(first.post("/auth", login).json, {"Status": "Login Succeeded"})
        self.addCleanup(os.unlink, path)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(first.get("/auth").json, {"username": "me", "password": "", "email": "me@x"})
        # the daemon uses the stored password
        self.assertEqual(first.post("/auth", {"username": "me", "serveraddress": fake.host}).status, 200)
        answer = self.old.get("/auth")
        self.assertEqual((answer.status, answer.body), (404, b""))

    def test_build(self):
        dockerfile = (b"# a comment\nfrom   base\nRUN     echo made > /made\nADD  f /f\nEXPOSE 8080\n"
                      b"CMD [\"cat\", \"/made\"]\n")
        context = tar_of(file_("Dockerfile", dockerfile), file_("f", b"1"))
        for number, compress in enumerate((bytes, gzip.compress, bz2.compress, lzma.compress)):
            answer = self.old.post("/build", compress(context), "application/tar", t=f"built:v{number}")
            lines = answer.body.decode().splitlines()
            self.assertEqual((answer.status, answer.headers["Content-Type"].partition(";")[0]), (200, "text/plain"))
            self.assertEqual(lines[0], "Step 1 : FROM base")
            self.assertEqual([line for line in lines if line.startswith("Step")][1:4], [
                "Step 2 : RUN echo made > /made", "Step 3 : ADD f /f", "Step 4 : EXPOSE 8080"])
            self.assertRegex(lines[-1], "^Successfully built [0-9a-f]{12}$")
            self.assertEqual(lines[-2], " ---> " + lines[-1].split()[-1])
            self.assertEqual(self.old.get(f"/images/built:v{number}/json").json["id"][:12], lines[-1].split()[-1])
        ident = self.old.run(Image="built:v0")
        # in 2013 an exposed port was also published
        self.assertEqual(self.old.inspect(ident)["Config"]["PortSpecs"], ["8080"])
        self.assertEqual((self.old.wait(ident), output_of(self.api.logs(ident))), (0, b"made\n"))
        answer = self.old.post("/build", tar_of(file_("Dockerfile", b"FROM base\nRUN exit 7\n")))
        self.assertEqual(answer.status, 200)
        self.assertRegex(answer.body.decode(), "\nError build: .* returned a non-zero code: 7 .*\n$")
        self.assertEqual(self.old.post("/build", tar_of(file_("x", b""))).status, 500)
        answer = self.old.post("/build", tar_of(file_("Dockerfile", b"FROM base\nINSERTED x\nENV A=1\n")))
        self.assertIn(b"# Skipping unknown instruction INSERTED\n", answer.body)
        self.assertIn(b"Step 2 : ENV A=1\n", answer.body)
        server = Files({"/Dockerfile": (200, {}, b"FROM base\nRUN echo far\n")})
        self.addCleanup(server.close)
        answer = self.old.post("/build", remote=server.url + "/Dockerfile", t="far")
        self.assertIn(b"Step 2 : RUN echo far\n", answer.body)
        for version in ("1.0", "1.1", "1.2"):
            self.plain(500, OldClient(self.old.address, version).post("/build", context),
                       "Multipart upload for build is no longer supported. Please upgrade your docker client.")

    # the rest

    def test_info_and_version(self):
        info = self.old.get("/info").json
        self.assertEqual(sorted(info), ["Containers", "Debug", "Images", "MemoryLimit", "NFd", "NGoroutines",
                                        "SwapLimit"])
        self.assertEqual((info["Containers"], info["Images"], info["Debug"]),
                         (0, self.api.ok("GET", "/info")["Images"], True))
        self.assertEqual(sorted(self.old.get("/version").json), ["GitCommit", "GoVersion", "Version"])

    def test_bad_input(self):
        """Each call answers bad input with the status and the text of 2013."""
        missing, old = "No such container: nosuch", self.old
        for method, path in (("GET", "json"), ("GET", "top"), ("GET", "changes"), ("GET", "export"), ("POST", "start"),
                             ("POST", "stop"), ("POST", "restart"), ("POST", "kill"), ("POST", "attach"),
                             ("POST", "wait")):
            with self.subTest(path):
                self.plain(404, old.call(method, "/containers/nosuch/" + path), missing)
        self.plain(404, old.post("/containers/nosuch/resize", h=1, w=1), missing)
        self.plain(404, old.delete("/containers/nosuch"), missing)
        self.plain(404, old.post("/commit", container="nosuch"), missing)
        for method, path in (("GET", "json"), ("GET", "history"), ("POST", "tag?repo=x")):
            with self.subTest(path):
                self.plain(404, old.call(method, "/images/no/such/" + path), "No such image: no/such")
        self.plain(404, old.post("/containers/create", {"Image": "nosuch", "Cmd": ["true"]}), "No such image: nosuch")
        self.plain(500, old.post("/containers/create",
                                 {"Image": "base", "Cmd": [], "Entrypoint": None, "Memory": 1000}),
                   "Memory limit must be given in bytes (minimum 524288 bytes)")
        for body in ({"Cmd": "x"}, {"PortSpecs": ["x"]}, {"PortSpecs": ["1:2:3"]}, {"PortSpecs": ["80/sctp"]},
                     {"Memory": "1"}, {"Env": [1]}, {"PortSpecs": ["99999"]}, {"Dns": ["x"]}):
            with self.subTest(body):
                answer = old.post("/containers/create", dict({"Image": "base", "Cmd": ["true"]}, **body))
                self.assertEqual((answer.status, answer.headers["Content-Type"]), (500, "text/plain; charset=utf-8"),
                                 answer)
        self.plain(404, old.post("/containers/create", b"null", "application/json"), "No such image: ")
        for body in (b"", b"{", b"[]", b"nonsense"):
            for path in ("/containers/create", "/images/getCache", "/auth", "/images/x/push"):
                with self.subTest(body=body, path=path):
                    self.assertEqual(old.post(path, body, "application/json").status, 500)
        ident = old.create("true")
        for bind, text in (("/x", "Invalid bind specification: /x"),
                           ("/a:/b:/c:/d", "Invalid bind specification: /a:/b:/c:/d"),
                           ("/tmp:/", "Illegal bind destination: /"), ("/tmp:.", "Illegal bind destination: .")):
            self.plain(500, old.post(f"/containers/{ident}/start", {"Binds": [bind]}),
                       f"Error starting container {ident}: {text}")
        self.assertEqual(old.post(f"/containers/{ident}/start", b"{", "application/json").status, 500)
        for query in ({"h": "x", "w": 1}, {"h": 1}, {}, {"h": -1, "w": 1}, {"h": 99999, "w": 1}):
            self.assertEqual(old.post(f"/containers/{ident}/resize", **query).status, 500)
        for name in ("logs", "stream", "stdin", "stdout", "stderr"):
            self.plain(400, old.post(f"/containers/{ident}/attach", **{name: "x"}), "Bad parameter")
        for method, path in (("GET", "/nosuch"), ("GET", "/events"), ("GET", "/volumes"), ("PUT", "/info"),
                             ("POST", f"/containers/{ident}/pause"), ("GET", "/_ping")):
            self.plain(404, old.call(method, path), "404 page not found")
        self.plain(404, OldClient(old.address, "0.9").get("/info"), "404 page not found")

    def test_differences_of_versions(self):
        first, second = (OldClient(self.old.address, version) for version in ("1.1", "1.2"))
        for client in (first, second):
            client.post("/images/base/tag", repo="gone")
        self.assertEqual(second.delete("/images/gone").json,
                         [{"Untagged": self.old.get("/images/base/json").json["id"][:12]}])
        ident = first.run("sh", "-c", "echo 1 > /1")
        first.wait(ident)
        made = first.post("/commit", container=ident, repo="gone", m="message").json["Id"]
        self.assertEqual(first.get("/images/gone/json").json["comment"], "message")
        first.delete("/containers/" + ident)
        self.no_content(first.delete("/images/gone"))
        self.plain(404, first.get(f"/images/{made}/json"), "No such image: " + made)
        for version in ("1.0", "1.1", "1.2", "1.3"):
            client = OldClient(self.old.address, version)
            self.assertEqual(client.get("/containers/json").json, [])
            self.assertIn("base", [row["Repository"] for row in client.get("/images/json").json])

    def test_options(self):
        for path in ("/info", "/nosuch", "/containers/x/json"):
            answer = self.old.call("OPTIONS", path)
            self.assertEqual((answer.status, answer.body), (200, b""))
            self.assertNotIn("Access-Control-Allow-Origin", answer.headers)


class OldApiOnUnixTest(OldCalls, DaemonCase):
    port_of_host = 47801

    def setUp(self):
        super().setUp()
        self.old = OldClient(self.daemon.socket)


class OldApiOnTcpTest(OldCalls, DaemonCase):
    """The old API over TCP, as with `-H 127.0.0.1:4243`, after a restart of the daemon, and with -api-enable-cors."""
    port_of_host = 47802

    @classmethod
    def setUpClass(cls):
        cls.port = free_port()
        cls.flags = ("-H", f"127.0.0.1:{cls.port}")
        super().setUpClass()

    def setUp(self):
        super().setUp()
        self.old = OldClient(("127.0.0.1", self.port))

    def test_ghosts(self):
        """A container that has outlived its daemon is listed as a ghost, as in 2013, but can still be attached to,
        restarted and killed."""
        old = self.old
        ident = old.run("sh", "-c", "read line; echo got $line; sleep 600", OpenStdin=True)
        self.daemon.restart()
        self.assertEqual((old.rows()[ident]["Status"], old.inspect(ident)["State"]["Ghost"]), ("Ghost", True))
        self.assertRegex(self.api.ok("GET", "/containers/json")[0]["Status"], "^Up ")
        with contextlib.closing(old.hijack(ident, stream=1, stdin=1, stdout=1)) as stream:
            stream.send(b"it\n")
            stream.read_until(b"got it\n")
        self.no_content(old.post(f"/containers/{ident}/restart", t=0))
        self.assertEqual(old.inspect(ident)["State"]["Ghost"], False)
        self.no_content(old.post(f"/containers/{ident}/kill"))
        self.assertEqual(old.rows(all=1)[ident]["Status"], "Exit 137")

    def test_cors(self):
        self.daemon.restart("-api-enable-cors")
        self.addCleanup(self.daemon.restart)
        for answer in (self.old.get("/info"), self.old.get("/nosuch"), self.old.call("OPTIONS", "/any"),
                       self.api.get("/nosuch")):
            self.assertEqual([answer.headers["Access-Control-Allow-" + name]
                              for name in ("Origin", "Headers", "Methods")], [
                "*", "Origin, X-Requested-With, Content-Type, Accept", "GET, POST, DELETE, PUT, OPTIONS"])

    def test_what_a_page_could_send(self):
        body = json.dumps({"Image": "base", "Cmd": ["true"]}).encode()
        self.assertEqual(self.old.post("/containers/create", body, "text/plain").status, 403)
        self.assertEqual(self.old.post("/containers/create", body, "plain/text").status, 201)


class VersionsBetweenTest(DaemonCase):
    """API 1.4 to 1.23: as today's API, except for calls and fields that had another form then."""

    def between(self, version):
        return OldClient(self.daemon.socket, version)

    def test_host_config_at_the_start(self):
        folder = self.folder(a="seen")
        for version in ("1.6", "1.11", "1.23"):
            client = self.between(version)
            body = {"Image": "base", "Cmd": ["cat", "/v/a"], "Memory": 32 << 20, "Volumes": {"/v": {}},
                    "ExposedPorts": {"80/tcp": {}}}
            ident = client.post("/containers/create", body, name="between").json["Id"]
            host = {"Binds": [folder + ":/v"], "PortBindings": {"80/tcp": [{"HostPort": ""}]},
                    "RestartPolicy": {"Name": "no"}, "Links": None}
            answer = client.post(f"/containers/{ident}/start", host)
            self.assertEqual(answer.status, 204, answer)
            self.assertEqual((self.api.wait(ident), output_of(self.api.logs(ident))), (0, b"seen"))
            host_config = self.api.inspect(ident)["HostConfig"]
            self.assertEqual((host_config["Memory"], list(host_config["PortBindings"])), (32 << 20, ["80/tcp"]))
            self.assertEqual(client.delete("/containers/between", v=1).status, 204)
        self.assertEqual(self.api.ok("GET", "/volumes")["Volumes"], [])

    def test_shapes(self):
        ident = self.api.run("sh", "-c", "echo x; sleep 600", PortBindings={"80/tcp": [{}]})
        for version, kind in (("1.4", str), ("1.5", list)):
            self.assertIsInstance(self.between(version).get("/containers/json").json[0]["Ports"], kind)
        for version, keys in (("1.5", {"ID"}), ("1.6", {"ID", "Id"}), ("1.11", {"ID", "Id"}), ("1.12", {"Id"}),
                              ("1.20", {"Id"})):
            self.assertEqual(keys, {"ID", "Id"} & set(self.between(version).inspect(ident)), version)
        for version, key in (("1.6", "Repository"), ("1.7", "RepoTags")):
            self.assertIn(key, self.between(version).get("/images/json").json[0])
        untagged = self.api.ok("POST", "/commit", container=ident)["Id"]
        for version, names in (("1.7", ["<none>:<none>"]), ("1.42", ["<none>:<none>"]), ("1.43", [])):
            images = self.between(version).get("/images/json").json
            self.assertEqual([i["RepoTags"] for i in images if i["Id"] == untagged], [names], version)
        for version, key in (("1.11", "id"), ("1.12", "Id")):
            self.assertIn(key, self.between(version).get("/images/base/json").json)
        self.assertIn("Titles", self.between("1.4").get(f"/containers/{ident}/top").json)
        self.wait_for_output(ident, "x")
        for version, text in (("1.5", b"x\n"), ("1.6", b"\1\0\0\0\0\0\0\2x\n")):
            with contextlib.closing(self.between(version).hijack(ident, logs=1, stdout=1)) as stream:
                self.assertEqual(stream.read_all(), text)
        context = tar_of(file_("Dockerfile", b"FROM base\n"))
        self.assertTrue(self.between("1.7").post("/build", context).body.startswith(b"Step 1 : FROM base\n"))
        self.assertEqual(self.between("1.8").post("/build", context).documents[0], {"stream": "Step 1/1 : FROM base\n"})

    def test_volumes_and_copies(self):
        folder = self.folder(a="copied")
        self.api.create("true", name="copies", Binds=[folder + ":/v:ro"], Memory=32 << 20)
        inspected = self.between("1.19").inspect("copies")
        self.assertEqual((inspected["Volumes"], inspected["VolumesRW"]), ({"/v": folder}, {"/v": False}))
        self.assertEqual(inspected["Config"]["Memory"], 32 << 20)
        self.assertNotIn("Mounts", inspected)
        self.assertNotIn("Volumes", self.between("1.20").inspect("copies"))
        for version in ("1.4", "1.23"):
            answer = self.between(version).post("/containers/copies/copy", {"Resource": "/v/a"})
            self.assertEqual(answer.headers["Content-Type"], "application/x-tar")
            with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
                self.assertEqual(tar.extractfile("a").read(), b"copied")
        answer = self.between("1.23").post("/containers/copies/copy", {"Resource": "/nosuch"})
        self.assertEqual((answer.status, answer.body), (404, b"Could not find the file /nosuch in container copies\n"))
        self.assertEqual(self.between("1.23").post("/containers/copies/copy", {"Resource": ""}).status, 400)
        self.assertEqual(self.between("1.24").post("/containers/copies/copy", {"Resource": "/v/a"}).status, 404)

    def test_errors(self):
        for version in ("1.4", "1.23"):
            answer = self.between(version).get("/containers/nosuch/json")
            self.assertEqual((answer.status, answer.body), (404, b"No such container: nosuch\n"))
        self.assertEqual(self.between("1.24").get("/containers/nosuch/json").json,
                         {"message": "No such container: nosuch"})
        ident, host = self.api.create("true"), {"Binds": ["/tmp:/x"]}
        self.refused(400, self.api.post(f"/containers/{ident}/start", host), "non-empty request body")
        self.assertEqual(self.api.post(f"/containers/{ident}/start", {}).status, 204)

    def test_each_call_has_one_form_in_each_version(self):
        """The table of routes has no two entries for the same call in the same version."""
        seen = collections.Counter()
        for method, pattern, first, last, _ in pydock.ROUTES:
            for minor in range(first[1] if first[0] else 0, last[1] + 1):
                seen[method, pattern.pattern, minor] += 1
        self.assertEqual([call for call, count in seen.items() if count > 1], [])


def python_with(module):
    """The path of a Python that can import a module: the one that CLIENTS names, this one, or the host's; or None."""
    for python in (os.environ.get("CLIENTS"), sys.executable, "/usr/bin/python3"):
        if python and os.path.exists(python) and not subprocess.call(
                [python, "-c", "import " + module], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                env=dict(ENVIRONMENT, PYTHONPATH="")):
            return python


DOCKER_PY_SCRIPT = r"""
import io, sys, tarfile, threading
import docker

client = docker.DockerClient(base_url=sys.argv[1], timeout=30)
assert client.ping() and client.version()["ApiVersion"] == "1.47"
assert client.containers.run("base", ["echo", "hello"], remove=True) == b"hello\n"
try:
    client.containers.run("base", ["sh", "-c", "echo out; echo err >&2; exit 3"])
except docker.errors.ContainerError as error:
    assert error.exit_status == 3 and error.stderr == b"err\n", error
else:
    raise AssertionError("no error")
c = client.containers.run("base", ["sh", "-c", "echo ready; cat"], name="py", detach=True, stdin_open=True,
                          environment={"A": "b"}, labels={"l": "1"},
                          ports={"80/tcp": None, "81/tcp": ("127.0.0.1", 18181)},
                          volumes={"pyvol": {"bind": "/v", "mode": "rw"}}, mem_limit="64m")
assert c.status == "created" and c.short_id
c.reload()
assert c.status == "running" and c.ports["81/tcp"] == [{"HostIp": "127.0.0.1", "HostPort": "18181"}], c.ports
assert [x.name for x in client.containers.list(filters={"label": "l=1"})] == ["py"]
code, out = c.exec_run(["sh", "-c", "echo $A; exit 4"])
assert (code, out) == (4, b"b\n")
code, (out, err) = c.exec_run(["sh", "-c", "echo o; echo e >&2"], demux=True)
assert (out, err) == (b"o\n", b"e\n")
assert b"".join(c.exec_run(["seq", "3"], stream=True)[1]) == b"1\n2\n3\n"
archive = io.BytesIO()
with tarfile.open(fileobj=archive, mode="w") as tar:
    info = tarfile.TarInfo("f")
    info.size = 3
    tar.addfile(info, io.BytesIO(b"abc"))
assert c.put_archive("/tmp", archive.getvalue())
stream, stat = c.get_archive("/tmp/f")
assert stat["size"] == 3 and b"abc" in b"".join(stream)
assert {"Path": "/tmp/f", "Kind": 1} in c.diff()
sock = c.attach_socket(params={"stdin": 1, "stdout": 1, "stream": 1})
sock._sock.sendall(b"typed\n")
for line in c.logs(stream=True, follow=True):
    if line == b"typed\n":
        break
sock.close()
assert c.stats(stream=False)["id"] == c.id and c.top()["Titles"]
seen = []
events = client.events(decode=True, filters={"container": "py"})
thread = threading.Thread(target=lambda: [seen.append(e["Action"]) for e in events])
thread.start()
c.pause(); c.unpause(); c.rename("py2"); c.restart(timeout=0); c.kill()
assert c.wait()["StatusCode"] == 137
events.close(); thread.join(10)
assert seen[:2] == ["pause", "unpause"], seen
image = c.commit("pyimage", "1", message="m")
assert "pyimage:1" in image.tags and image.history()[0]["Comment"] == "m"
c.remove(v=True)
try:
    client.containers.get("py2")
except docker.errors.NotFound:
    pass
else:
    raise AssertionError("it is there")
network = client.networks.create("pynet")
other = client.containers.run("base", ["sleep", "600"], network="pynet", detach=True)
network.reload()
assert [x.id for x in network.containers] == [other.id]
network.disconnect(other)
other.remove(force=True)
network.remove()
client.volumes.get("pyvol").remove()
client.images.remove("pyimage:1")
assert client.df()["Images"] and client.info()["Driver"]
print("all of it")
"""

TESTCONTAINERS_SCRIPT = r"""
import urllib.request
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network
from testcontainers.core.waiting_utils import wait_for_logs

serve = "sh -c 'echo ready; echo hello > /tmp/index.html; exec httpd -f -p 80 -h /tmp'"
with DockerContainer("base").with_command(serve).with_exposed_ports(80).with_env("A", "b") as server:
    wait_for_logs(server, "ready", timeout=30)
    address = "http://%s:%s/" % (server.get_container_host_ip(), server.get_exposed_port(80))
    for attempt in range(100):
        try:
            assert urllib.request.urlopen(address, timeout=10).read() == b"hello\n"
            break
        except OSError:
            if attempt == 99:
                raise
    assert server.exec(["sh", "-c", "echo $A"]).output == b"b\n"
    assert server.get_logs() == (b"ready\n", b"")
with Network() as network:
    first = DockerContainer("base").with_command("sleep 600").with_network(network).with_network_aliases("srv")
    with first, DockerContainer("base").with_command("sleep 600").with_network(network) as second:
        assert second.exec(["nslookup", "srv"]).exit_code == 0
print("all of it")
"""

COMPOSE_FILE = """
version: "3.7"
services:
  server:
    image: base
    command: ["httpd", "-f", "-p", "80", "-h", "/etc"]
    ports: ["18090:80"]
    volumes: ["data:/data"]
    environment: {A: b}
  client:
    image: base
    depends_on: [server]
    command: ["sh", "-c", "until wget -q -O - http://server/hostname; do sleep 0.1; done; sleep 600"]
volumes: {data: {}}
"""

COMPOSE_BUILD_FILE = """
version: "3.7"
services:
  app:
    image: composed:1
    build:
      context: .
      dockerfile: Other
      target: wanted
      args: {A: of-compose}
      labels: {k: v}
"""


class OtherClientsTest(DaemonCase):
    def test_docker_py(self):
        python = python_with("docker")
        if not python:
            self.skipTest("needs docker-py: CLIENTS=PYTHON names a Python that has it")
        result = run_program([python, "-c", DOCKER_PY_SCRIPT, self.daemon.host], timeout=120, PYTHONPATH="")
        self.assertEqual((result.code, result.out), (0, "all of it\n"), result)

    @needs_program("busybox")
    def test_testcontainers(self):
        python = python_with("testcontainers")
        if not python:
            self.skipTest("needs testcontainers: CLIENTS=PYTHON names a Python that has it")
        result = run_program([python, "-W", "ignore", "-c", TESTCONTAINERS_SCRIPT], timeout=120, PYTHONPATH="",
                             DOCKER_HOST=self.daemon.host, TESTCONTAINERS_RYUK_DISABLED="true")
        self.assertEqual((result.code, result.out), (0, "all of it\n"), result)
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1, filters={"label": ["org.testcontainers=true"]}),
                         [])

    @needs_program("docker-compose")
    def test_docker_compose_builds(self):
        context = self.folder(**{
            "docker-compose.yml": COMPOSE_BUILD_FILE, "f": "file\n",
            "Other": "FROM base AS wanted\nARG A\nCOPY f /f\nRUN echo $A >> /f\nCMD cat /f\nFROM base\nRUN false\n"})

        def compose(*words, code=(0,)):
            return self._checked(run_program(["docker-compose", "--project-name", "built"] + list(words), cwd=context,
                                             timeout=120, DOCKER_HOST=self.daemon.host, DOCKER_BUILDKIT="0",
                                             COMPOSE_DOCKER_CLI_BUILD="0", PYTHONPATH=""), code)
        result = compose("build")
        self.assertIn("Successfully tagged composed:1", result.out + result.err)
        self.assertEqual(self.api.ok("GET", "/images/composed:1/json")["Config"]["Labels"], {"k": "v"})
        self.assertIn("file\nof-compose\n", compose("run", "--rm", "app").out)
        result = compose("up", "--build", "--no-color")
        self.assertIn("Using cache", result.out + result.err)
        self.assertIn("of-compose", result.out)
        write(context + "/Other", "FROM base AS wanted\nRUN exit 3\n")
        result = compose("build", code=range(1, 256))
        self.assertIn("returned a non-zero code: 3", result.out + result.err)

    @needs_program("docker-compose", "busybox")
    def test_docker_compose(self):
        folder = self.folder(**{"docker-compose.yml": COMPOSE_FILE})

        def compose(*words):
            result = run_program(["docker-compose", "--project-name", "proj"] + list(words), cwd=folder, timeout=120,
                                 DOCKER_HOST=self.daemon.host, PYTHONPATH="")
            self.assertEqual(result.code, 0, result)
            return result
        compose("up", "-d")
        server = self.api.ok("GET", "/containers/json", filters={"label": ["com.docker.compose.service=server"]})[0]
        eventually(lambda: fetch("127.0.0.1", 18090) == server["Id"][:12] + "\n")
        eventually(lambda: server["Id"][:12] in compose("logs", "--no-color", "client").out)
        self.assertIn("server", compose("ps").out)
        self.assertEqual(compose("exec", "-T", "server", "sh", "-c", "echo $A").out, "b\n")
        compose("up", "-d", "--scale", "client=2")
        compose("restart", "-t", "0", "server")
        compose("stop", "-t", "0")
        compose("down", "-v", "-t", "0")
        self.assertEqual(self.api.ok("GET", "/containers/json", all=1), [])
        self.assertEqual(self.api.ok("GET", "/volumes")["Volumes"], [])
        self.assertEqual(len(self.api.ok("GET", "/networks")), 3)


########################################################################
# 22. Client
########################################################################

class TemplateTest(unittest.TestCase):
    DATA = {"A": {"B": 1, "L": ["x", "y"]}, "M": {"k": "v", "a": "b"}, "N": None, "T": True, "F": 1.5, "S": "word"}
    RENDERED = (
        ("{{.a.b}}{{.M.K}}", "1v"), ("plain", "plain"), ("{{.A.B}}", "1"), ("{{.T}} {{.F}} {{.S}}", "true 1.5 word"),
        ("{{json .A}}", '{"B":1,"L":["x","y"]}'), ("{{.M}} {{.A.L}}", "map[a:b k:v] [x y]"),
        ("{{.X}}|{{.A.X}}|{{.N}}", "<no value>|<no value>|<no value>"), ("{{range .A.L}}[{{.}}]{{end}}", "[x][y]"),
        ("{{range $k, $v := .M}}{{$k}}={{$v}};{{end}}", "a=b;k=v;"),
        ("{{range $i, $e := .A.L}}{{if $i}},{{end}}{{$e}}{{end}}", "x,y"), ("{{range .N}}x{{else}}none{{end}}", "none"),
        ("{{range 3}}{{.}}{{end}}", "012"), ("{{range .A.L}}{{$.S}} {{end}}", "word word "),
        ("{{if .N}}a{{else if .T}}b{{else}}c{{end}}", "b"), ("{{if .N}}a{{else if .N}}b{{else}}c{{end}}", "c"),
        ("{{with .A}}{{.B}}{{else}}no{{end}}{{with .N}}x{{else}}no{{end}}", "1no"),
        ("{{with $x := .A}}{{$x.B}}{{end}}", "1"), ("{{$x := 5}}{{if .T}}{{$x = 6}}{{end}}{{$x}}", "6"),
        ("{{$x := 5}}{{if .T}}{{$x := 6}}{{end}}{{$x}}", "5"),
        ("{{index .M \"k\"}}{{index .A.L 1}}{{(index .A.L 0)}}", "vyx"), ("{{index .M \"none\"}}", "<no value>"),
        ("{{len .A.L}} {{len .S}}", "2 4"), ("{{(.A).B}}", "1"),
        ("{{if eq .A.B 2 1}}y{{end}}{{if ne .S \"word\"}}n{{end}}", "y"),
        ("{{if and (gt .A.B 0) (le .A.B 1) (not .N)}}y{{end}}", "y"), ("{{or .N \"d\"}}{{and .T \"e\"}}", "de"),
        ("{{if and .N (index .N.X 1)}}y{{else}}short{{end}}", "short"),
        ("{{\"x\" | upper | printf \"%s-%s\" \"p\"}}", "p-X"), ("{{.S | len | printf \"%03d\"}}", "004"),
        ("{{printf \"%5s|%-5s|%d|%q|%v|%.2f%%|%t\" \"a\" \"b\" 3 \"c\" .M .F .T}}",
         '    a|b    |3|"c"|map[a:b k:v]|1.50%|true'),
        ("{{printf \"%d %s\" \"a\"}}", "%!d(string=a) %!s(MISSING)"), ("{{println .A.B \"x\"}}", "1 x\n"),
        ("{{print 1 2}}", "12"), ("{{join .A.L \"-\"}} {{split \"a,b\" \",\"}}", "x-y [a b]"),
        ("{{title \"ab cd\"}}{{lower \"AB\"}}", "Ab Cdab"), ("{{pad \"x\" 1 2}}|{{truncate \"abcdef\" 3}}", " x  |abc"),
        ("{{`raw \"}}`}}{{\"}}\"}}", 'raw "}}}}'), ("{{\"\\u0041\\n\"}}", "A\n"), ("a {{- 1 -}} b", "a1b"),
        ("a {{/* note }} */}}b{{- /* x */ -}} c", "a bc"), ("{{ .A.B }}{{-3}}", "1-3"),
        ("{{true}}{{nil}}", "true<no value>"))
    UNREADABLE = (
        ("{{.A", "unclosed action"), ("{{foo}}", 'function "foo" not defined'),
        ("{{if}}x{{end}}", "missing value for if"), ("{{range .A}}", "unexpected EOF"),
        ("{{end}}", "unexpected {{end}}"), ("{{$y}}", 'undefined variable "$y"'),
        ("{{(len .A}}", "unclosed left paren"), ("{{}}", "missing value for command"), ("{{.A .B ^}}", "unexpected"),
        ("\n{{foo}}", ":2: function"), ("{{if .A}}{{$x := 1}}{{end}}{{$x}}", 'undefined variable "$x"'))
    FAILING = (
        ("{{.N.X}}", "nil pointer evaluating interface {}.X"), ("{{.S.X}}", "can't evaluate field X"),
        ("{{index .A.L 9}}", "index out of range: 9"), ("{{len .N}}", "error calling len"),
        ("{{range .T}}{{end}}", "range can't iterate over true"), ("{{join .S}}", "error calling join"))

    def test_render(self):
        for text, expected in self.RENDERED:
            with self.subTest(text):
                self.assertEqual(pydock.Template(text).render(self.DATA), expected)

    def test_what_cannot_be_read_says_why(self):
        for text, reason in self.UNREADABLE:
            with self.subTest(text), self.assertRaises(pydock.TemplateError) as caught:
                pydock.Template(text)
            self.assertIn(reason, str(caught.exception))

    def test_what_fails_while_rendering_is_an_error_and_no_traceback(self):
        for text, reason in self.FAILING:
            with self.subTest(text), self.assertRaises(pydock.Error) as caught:
                pydock.Template(text).render(self.DATA)
            self.assertIn(reason, str(caught.exception))

    def test_rows_compute_what_is_asked_for(self):
        fields = {"ID": ("ID", lambda item: item["id"]), "Boom": ("BOOM", lambda item: 1 // 0),
                  "Label": (None, lambda item: lambda name: item[name])}
        row = pydock.Row(fields, {"id": "<1>", "a": "b"})
        self.assertEqual(pydock.Template('{{.ID}} {{.Label "a"}}').render(row), "<1> b")
        with self.assertRaisesRegex(pydock.Error, "can't evaluate field Nope"):
            pydock.Template("{{.Nope}}").render(row)
        del fields["Boom"]
        self.assertEqual(pydock.Template("{{json .}}").render(row), '{"ID":"\\u003c1\\u003e"}')


def parsed_flags(name, *words):
    """(namespace of the flags, the other words) of a command line."""
    command = pydock.COMMANDS[name]
    return pydock.read_flags(name, command, command.options, words, command.interspersed)


class DemultiplexerTest(unittest.TestCase):
    @staticmethod
    def frame(kind, data):
        return struct.pack(">B3xI", kind, len(data)) + data

    def feed(self, data, size):
        written = []
        demultiplexer = pydock.Demultiplexer(lambda fd, part: written.append((fd, bytes(part))))
        for start in range(0, len(data), size):
            demultiplexer.feed(data[start:start + size])
        return written

    def test_any_cut_of_the_stream_gives_the_same(self):
        data = b"".join(self.frame(kind, text) for kind, text in (
            (1, b"out1"), (2, b"error"), (1, b""), (1, b"out2\n"), (0, b"in")))
        for size in range(1, len(data) + 1):
            written = self.feed(data, size)
            self.assertEqual(b"".join(part for fd, part in written if fd == 1), b"out1out2\nin")
            self.assertEqual(b"".join(part for fd, part in written if fd == 2), b"error")

    def test_frames_of_one_stream_are_written_at_once(self):
        self.assertEqual(self.feed(self.frame(1, b"a") * 1000, 1 << 20), [(1, b"a" * 1000)])

    def test_an_error_of_the_daemon_in_the_stream(self):
        with self.assertRaisesRegex(pydock.Error, "error from daemon in stream: broken"):
            self.feed(self.frame(3, b"broken"), 100)


class ScriptedDaemon:
    """A stand-in for a daemon that answers HTTP on a unix socket from a table: {"GET /x": answer}, without the version
    of the path. An answer is an object (sent as JSON), bytes, (status, bytes), or a function(connection, body) that
    takes the connection over. `requests` lists (method, target, body, version of the path) of all requests."""

    def __init__(self, answers, version="1.47"):
        self.folder = tempfile.mkdtemp()
        self.path = os.path.join(self.folder, "s")
        self.answers, self.version, self.requests, self.connections = answers, version, [], 0
        self.open()

    def open(self):
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen(20)
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shut()
        shutil.rmtree(self.folder)

    def shut(self):
        """Stop listening. Connections that exist stay open."""
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

    def _accept(self, listener):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as stream, contextlib.suppress(OSError):
            while True:
                line = stream.readline().decode().split()
                if not line:
                    return
                headers = dict(text.decode().strip().lower().split(": ", 1) for text in iter(stream.readline, b"\r\n"))
                body = stream.read(int(headers.get("content-length", 0)))
                if headers.get("transfer-encoding") == "chunked":
                    for size in iter(lambda: int(stream.readline(), 16), 0):
                        body += stream.read(size)
                        stream.readline()
                    stream.readline()
                if self._answer(connection, line[0], line[1], headers, body):
                    return

    def _answer(self, connection, method, target, headers, body):
        if target == "/_ping":
            connection.sendall(b"HTTP/1.1 200 OK\r\nApi-Version: %s\r\nContent-Length: 0\r\n\r\n"
                               % self.version.encode())
            return False
        prefix, _, target = target[1:].partition("/")
        self.requests.append((method, "/" + target, json.loads(body) if body[:1] == b"{" else body, prefix))
        answer = self.answers.get(f"{method} /{target.partition('?')[0]}", (404, b'{"message":"No such thing"}'))
        if callable(answer):
            answer(connection, body)
            return True
        status, data = answer if isinstance(answer, tuple) else (200, answer)
        if not isinstance(data, bytes):
            data = json.dumps(data).encode()
        connection.sendall(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(data)))
        if method != "HEAD":
            connection.sendall(data)
        return False

    def run(self, *words, input=b"", **options):
        """Run pydock's client in a process of its own: (exit code, stdout, stderr)."""
        result = subprocess.run([sys.executable, PYDOCK, "-H", self.path] + list(words), input=input,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=60,
                                env=dict(os.environ, HOME=self.folder), **options)
        return result.returncode, result.stdout.decode(), result.stderr.decode()


def chunked(*parts, status=b"200 OK"):
    """An answer for ScriptedDaemon: these chunks, after which the connection is closed."""
    def answer(connection, body):
        connection.sendall(b"HTTP/1.1 %b\r\nTransfer-Encoding: chunked\r\n\r\n" % status)
        for part in parts + (b"",):
            connection.sendall(b"%x\r\n%b\r\n" % (len(part), part))
    return answer


class ClientTest(unittest.TestCase):
    def daemon(self, answers, **options):
        daemon = ScriptedDaemon(answers, **options)
        self.addCleanup(daemon.__exit__)
        client = pydock.Client(daemon.path)
        self.addCleanup(client.close)
        return daemon, client

    def test_addresses(self):
        for text, expected in (("unix:///a/b", ("unix", "/a/b")), ("/a/b", ("unix", "/a/b")),
                               ("unix://", ("unix", pydock.DEFAULT_SOCKET)), ("tcp://1.2.3.4:5", ("tcp", "1.2.3.4", 5)),
                               ("1.2.3.4:5", ("tcp", "1.2.3.4", 5)), (":5", ("tcp", "127.0.0.1", 5)),
                               ("tcp://[::1]:5", ("tcp", "::1", 5)), ("http://h", ("tcp", "h", 4243)),
                               ("tcp://", ("tcp", "127.0.0.1", 4243))):
            with self.subTest(text):
                self.assertEqual(pydock.parse_host(text), expected)
        for text in ("ftp://x", "tcp://a:99999", "tcp://a:b", "tcp://[x]:1"):
            with self.subTest(text), self.assertRaises(pydock.BadRequest):
                pydock.parse_host(text)

    def test_query(self):
        self.assertEqual(pydock.encode_query({"a": 1, "b": True, "c": None, "d": False, "e": "", "f": [],
                                              "g": ["x", "y z"], "h": {"k": ["v"]}, "i": 0}),
                         "?a=1&b=1&g=x&g=y%20z&h=%7B%22k%22%3A%20%5B%22v%22%5D%7D&i=0")
        self.assertEqual(pydock.encode_query({}), "")
        self.assertEqual(pydock.quote("a b/c:d?\u00e9"), "a%20b/c:d%3F%C3%A9")

    def test_one_connection_serves_requests_that_follow_each_other(self):
        daemon, client = self.daemon({"GET /a": {"x": 1}, "POST /b": (204, b""), "HEAD /c": b"123",
                                      "GET /d": (500, b"not json")})
        self.assertEqual(client.get("a"), {"x": 1})
        self.assertIsNone(client.post("b", data={"y": 2}, q="1"))
        self.assertEqual(client.request("HEAD", "c").read_all(), b"")
        with self.assertRaisesRegex(pydock.Error, "Error response from daemon: not json"):
            client.get("d")
        with self.assertRaisesRegex(pydock.NotFound, "Error response from daemon: No such thing"):
            client.get("none")
        self.assertEqual(daemon.connections, 1)
        self.assertEqual(daemon.requests[1], ("POST", "/b?q=1", {"y": 2}, "v1.47"))

    def test_requests_side_by_side_have_their_own_connections(self):
        daemon, client = self.daemon({"GET /a": {"x": 1}})
        responses = [client.send("GET", "a") for _ in range(3)]
        self.assertEqual([response.start().json() for response in responses], [{"x": 1}] * 3)
        self.assertEqual(daemon.connections, 3)

    def test_an_older_daemon_is_spoken_to_in_its_version(self):
        for theirs, spoken in (("1.41", "1.41"), ("1.9", "1.9"), ("1.99", "1.47")):
            daemon, client = self.daemon({"GET /a": {}}, version=theirs)
            client.get("a")
            self.assertEqual(daemon.requests[0][3], "v" + spoken)

    def test_chunks_and_json_streams_cut_anywhere(self):
        text = '{"status":"a\u00e9"}\r\n{"n":1}{"n":2}\n'.encode()
        daemon, client = self.daemon({"GET /a": chunked(*(text[i:i + 1] for i in range(len(text)))),
                                      "GET /b": chunked(b'{"a"')})
        self.assertEqual(list(client.request("GET", "a").objects()), [{"status": "a\u00e9"}, {"n": 1}, {"n": 2}])
        with self.assertRaisesRegex(pydock.Error, "in the middle"):
            list(client.request("GET", "b").objects())

    def test_an_answer_that_is_cut_off_is_an_error(self):
        def cut(connection, body):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")
        daemon, client = self.daemon({"GET /a": cut, "GET /b": lambda connection,
                                      body: connection.sendall(b"SSH-2.0\r\n\r\n")})
        with self.assertRaisesRegex(pydock.Error, "in the middle of an answer"):
            client.request("GET", "a").read_all()
        with self.assertRaisesRegex(pydock.Error, "does not speak HTTP"):
            client.get("b")

    def test_a_body_of_any_length(self):
        daemon, client = self.daemon({"POST /a": {}})
        client.post("a", body=lambda write: [write(b"x" * 70000), write(b""), write(b"y")])
        self.assertEqual(daemon.requests[0][2], b"x" * 70000 + b"y")

    def test_hijack_keeps_what_has_come_already(self):
        def stream(connection, body):
            connection.sendall(b"HTTP/1.1 101 UPGRADED\r\nUpgrade: tcp\r\n\r\nearly")
            connection.sendall(connection.recv(100).upper())
        daemon, client = self.daemon({"POST /a": stream})
        connection = client.hijack("a")
        self.addCleanup(connection.close)
        self.assertTrue(connection.pending())
        self.assertEqual(connection.receive(), b"early")
        connection.socket.sendall(b"late")
        self.assertEqual(connection.receive(), b"LATE")

    def test_a_restarted_daemon_is_found_again(self):
        daemon, client = self.daemon({"GET /a": {"x": 1}, "GET /end": lambda connection, body: connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")})
        client.get("end")  # the client keeps the connection for its next request, but the daemon closes it
        daemon.shut()
        threading.Timer(0.3, daemon.open).start()
        self.assertEqual(client.get("a"), {"x": 1})

    def test_without_a_daemon(self):
        message = r"Is the daemon running\? Start it with: sudo python3 pydock.py -d -H unix:///none/x"
        with self.assertRaisesRegex(pydock.Unavailable, message):
            pydock.Client("unix:///none/x").get("a")

    def test_the_default_daemon_is_started_once_by_root(self):
        with tempfile.TemporaryDirectory() as folder:
            old, pydock.DEFAULT_SOCKET = pydock.DEFAULT_SOCKET, os.path.join(folder, "s")
            self.addCleanup(setattr, pydock, "DEFAULT_SOCKET", old)
            started = []
            client = pydock.Client(None, start_daemon=lambda: started.append(1))
            with self.assertRaises(pydock.Unavailable):
                client.get("a")
            self.assertEqual(started, [1] if os.geteuid() == 0 else [])
            with self.assertRaises(pydock.Unavailable):  # with an explicit address the client starts no daemon
                pydock.Client(os.path.join(folder, "t"), start_daemon=lambda: started.append(2)).get("a")
            self.assertNotIn(2, started)


@unittest.skipUnless(shutil.which("openssl"), "no openssl to make certificates with")
class ClientTlsTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.pem = os.path.join(self.folder, "both.pem")
        make_self_signed_certificate(self.pem + ".key", self.pem, "IP:127.0.0.1",
                                     "keyUsage=keyCertSign,digitalSignature")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(self.listener.close)
        self.host = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"

    def serve(self, talk):
        """Accept one connection in a thread, with TLS and the client's certificate, and call talk(connection)."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.pem)
        context.load_cert_chain(self.pem, self.pem + ".key")
        context.verify_mode = ssl.CERT_REQUIRED

        def accept():
            connection, _ = self.listener.accept()
            with contextlib.suppress(OSError), context.wrap_socket(connection, server_side=True) as tls:
                talk(tls)
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        return thread

    def client(self, **options):
        tls = dict({"verify": True, "ca": self.pem, "cert": self.pem, "key": self.pem + ".key"}, **options)
        return pydock.Client(self.host, tls)._connect()

    def test_both_directions_and_the_end_of_one(self):
        data = os.urandom(3 << 20)

        def talk(tls):
            tls.sendall(b"early" * 10000)
            got = b"".join(iter(lambda: tls.recv(1 << 16), b""))
            tls.sendall(b"got %d" % len(got) if got == data else b"wrong")
        thread = self.serve(talk)
        connection = self.client()
        self.addCleanup(connection.close)
        connection.socket.sendall(data)
        connection.half_close()
        self.assertEqual(b"".join(iter(connection.receive, b"")), b"early" * 10000 + b"got %d" % len(data))
        thread.join(60)

    def test_a_daemon_that_is_not_the_right_one(self):
        thread = self.serve(lambda tls: None)
        with self.assertRaisesRegex(pydock.Unavailable, "CERTIFICATE_VERIFY_FAILED"):
            self.client(ca=None)
        thread.join(60)


class ClientTerminalTest(unittest.TestCase):
    """pydock's client with `run -it` on a pseudo-terminal, and a ScriptedDaemon."""

    def setUp(self):
        self.master, self.slave = os.openpty()
        self.addCleanup(os.close, self.master)
        self.addCleanup(os.close, self.slave)
        self.attributes = functools.partial(termios.tcgetattr, self.slave)
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("4H", 33, 99, 0, 0))

    def start(self, daemon, *words):
        process = subprocess.Popen([sys.executable, PYDOCK, "-H", daemon.path] + list(words), stdin=self.slave,
                                   stdout=self.slave, stderr=self.slave)
        self.addCleanup(process.kill)
        return process

    def read_until(self, text):
        data = b""
        while text not in data:
            data += os.read(self.master, 1000)
        return data

    def test_raw_mode_the_size_and_the_way_back(self):
        def shell(connection):
            connection.sendall(b"prompt# ")
            connection.sendall(b"got " + repr(connection.recv(100)).encode() + b"\r\n")
        before = self.attributes()
        with ScriptedDaemon(attach_answers(shell, 3)) as daemon:
            process = self.start(daemon, "run", "-it", "base")
            self.read_until(b"prompt# ")
            self.assertNotEqual(self.attributes(), before)
            # in raw mode Ctrl-C is no signal for the client, but a key that goes to the container
            os.write(self.master, b"\x03")
            self.read_until(b"got b'\\x03'\r\n")
            self.assertEqual(process.wait(60), 3)
            self.assertEqual(self.attributes(), before)
            self.assertIn("/containers/c1/resize?h=33&w=99", [request[1] for request in daemon.requests])
            self.assertEqual(daemon.requests[0][2]["HostConfig"]["ConsoleSize"], [33, 99])

    def test_the_detach_keys_end_the_client_and_not_the_container(self):
        for words, keys in (([], b"\x10\x11"), (["--detach-keys", "ctrl-a,x"], b"\x01x")):
            got, closed = [], threading.Event()

            def shell(connection):
                connection.sendall(b"prompt# ")
                got.append(b"".join(iter(lambda: connection.recv(100), b"")))
                closed.set()
            termios.tcflush(self.slave, termios.TCIFLUSH)
            before = self.attributes()
            with ScriptedDaemon(attach_answers(shell, 3)) as daemon:
                process = self.start(daemon, "run", *words, "-it", "base")
                self.read_until(b"prompt# ")
                for key in b"ab" + keys + b"c":
                    os.write(self.master, bytes([key]))
                self.assertEqual(process.wait(60), 0)
                self.assertTrue(closed.wait(60))
                self.assertEqual(got, [b"ab" + keys[:1]])
                self.assertEqual(self.attributes(), before)

    def test_a_signal_restores_the_terminal(self):
        before = self.attributes()
        answers = attach_answers(lambda connection: (connection.sendall(b"prompt# "), connection.recv(100)), 3)
        with ScriptedDaemon(answers) as daemon:
            process = self.start(daemon, "run", "-it", "--sig-proxy=false", "base")
            self.read_until(b"prompt# ")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(60), 128 + signal.SIGTERM)
            self.assertEqual(self.attributes(), before)

    def test_signals_are_passed_on(self):
        killed = threading.Event()
        answers = attach_answers(lambda connection: (connection.sendall(b"prompt# "), killed.wait(60)), 3)
        with ScriptedDaemon(answers) as daemon:
            daemon.answers["POST /containers/c1/kill"] = lambda connection, body: (
                connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n"), killed.set())
            process = self.start(daemon, "run", "-it", "base")
            self.read_until(b"prompt# ")
            process.send_signal(signal.SIGTERM)
            self.assertEqual(process.wait(60), 3)
            self.assertIn("/containers/c1/kill?signal=15", [request[1] for request in daemon.requests])


class ProgressTest(unittest.TestCase):
    MESSAGES = [{"status": "Pulling from x"},
                {"status": "Downloading", "id": "l1", "progressDetail": {"current": 5, "total": 10}},
                {"status": "Waiting", "id": "l2", "progressDetail": {}}, {"status": "Done", "id": "l1"},
                {"stream": "Step 1\n"}, {"aux": {"ID": "x"}}]

    def test_plain_lines_where_there_is_no_terminal(self):
        out, aux = io.StringIO(), []
        pydock.show_progress(self.MESSAGES, out, aux.append)
        self.assertEqual(out.getvalue(), "Pulling from x\nl2: Waiting\nl1: Done\nStep 1\n")
        self.assertEqual(aux, [{"ID": "x"}])

    def test_lines_in_place_on_a_terminal(self):
        out = io.StringIO()
        out.isatty = lambda: True
        pydock.show_progress(self.MESSAGES, out)
        self.assertIn("l1: Downloading [====", out.getvalue())
        self.assertIn("5B/10B", out.getvalue())
        self.assertIn("\x1b[2A\r\x1b[2Kl1: Done\x1b[2B", out.getvalue())

    def test_speed(self):
        out, times = io.StringIO(), iter((10.0, 12.0))
        out.isatty = lambda: True
        messages = [{"status": "Downloading", "id": "l1", "progressDetail": {"current": current, "total": 9 << 20}}
                    for current in (1000, 4001000)]
        with mock.patch.object(pydock.time, "monotonic", lambda: next(times)):
            pydock.show_progress(messages, out)
        first, second = out.getvalue().split("l1: ")[1:]
        self.assertNotIn("/s", first)
        self.assertIn("4.001MB/9.437MB  2MB/s", second)

    def test_an_error_ends_it(self):
        with self.assertRaises(pydock.Error) as caught:
            pydock.show_progress([{"error": "short", "errorDetail": {"message": "long", "code": 3}}], io.StringIO())
        self.assertEqual((str(caught.exception), caught.exception.code), ("long", 3))


########################################################################
# 23. Commands
########################################################################

COMMANDS_OF_2013 = (
    """attach build commit diff export history images import info insert inspect kill login logs port ps pull push
     restart rm rmi run search start stop tag top version wait""".split())


class FlagsTest(unittest.TestCase):
    def normalize(self, name, *words):
        command = pydock.COMMANDS[name]
        return pydock.normalize(command.options, words, command.interspersed)

    def test_flags_of_today(self):
        self.assertEqual(self.normalize("run", "-itp80:80", "--name", "x", "-m=1g", "base", "-x", "--rm"), (
            ["--interactive=true", "--tty=true", "--publish=80:80", "--name=x", "--memory=1g"], ["base", "-x", "--rm"]))
        self.assertEqual(self.normalize("run", "--rm=false", "--", "-base"), (["--rm=false"], ["-base"]))
        self.assertEqual(self.normalize("stop", "a", "-t", "-1", "b")[1], ["a", "b"])
        self.assertEqual(self.normalize("load", "-")[1], ["-"])

    def test_flags_of_2013(self):
        self.assertEqual(self.normalize("run", "-rm", "-volumes-from", "c", "-entrypoint=/x", "-dns", "1.1.1.1",
                                        "-e=A=b", "-b", "/a:/b", "base"), (
            ["--rm=true", "--volumes-from=c", "--entrypoint=/x", "--dns=1.1.1.1", "--env=A=b", "--volume=/a:/b"],
            ["base"]))
        self.assertEqual(self.normalize("run", "-rm=false", "base")[0], ["--rm=false"])
        self.assertEqual(self.normalize("ps", "-notrunc", "-sinceId", "x", "-beforeId=y", "-n", "3")[0],
                         ["--no-trunc=true", "--sinceId=x", "--beforeId=y", "--last=3"])
        self.assertEqual(self.normalize("commit", "-run", "{}", "-author", "me", "c", "repo", "tag"),
                         (["--run={}", "--author=me"], ["c", "repo", "tag"]))
        self.assertEqual(self.normalize("login", "-u", "a", "-p", "b", "-e", "c")[0],
                         ["--username=a", "--password=b", "--email=c"])
        self.assertEqual(self.normalize("images", "-viz", "-notrunc")[0], ["--viz=true", "--no-trunc=true"])
        self.assertEqual(self.normalize("pull", "-t", "12.10", "base"), (["--tag=12.10"], ["base"]))
        self.assertEqual(self.normalize("run", *"-n=false -c 2 -m 9 -u me -h name -cidfile f base".split())[0],
                         "--networking=false --cpu-shares=2 --memory=9 --user=me --hostname=name --cidfile=f".split())
        self.assertEqual(self.normalize("build", "-q", "-no-cache", "-rm", "-t", "a", ".")[0],
                         ["--quiet=true", "--no-cache=true", "--rm=true", "--tag=a"])

    def test_flags_of_the_daemon(self):
        for words, expected in (
                (["-D", "-d", "-b", "br", "-dns", "1.1.1.1", "-dns=8.8.8.8", "-g", "/x", "-p=/y", "-r",
                  "-api-enable-cors"],
                 {"debug": True, "daemon": True, "bridge": "br", "dns": ["1.1.1.1", "8.8.8.8"], "root": "/x",
                  "pidfile": "/y", "restart": True, "cors": True}),
                (["-H", "unix:///s", "-H=tcp://:4243", "-d=true", "-r=false"],
                 {"hosts": ["unix:///s", "tcp://:4243"], "daemon": True, "restart": False}),
                (["-mtu", "9", "--api-enable-cors=false", "--bridge=none", "-dD"],
                 {"mtu": 9, "cors": False, "bridge": "none", "daemon": True, "debug": True})):
            self.assertEqual(pydock.parse_daemon_options(words), expected)
        for words, sentence in ((["run"], "unknown argument: run: the daemon takes options alone"),
                                (["-x"], "unknown shorthand flag: 'x' in -x"),
                                (["-d", "-Dx"], "unknown shorthand flag: 'x' in -Dx"),
                                (["-D", "-"], "unknown argument: -"), (["--nosuch"], "unknown flag: --nosuch"),
                                (["-g"], "flag needs an argument: 'g' in -g"),
                                (["--icc=perhaps"], 'parsing "perhaps": invalid syntax')):
            with self.assertRaisesRegex(pydock.BadRequest, sentence):
                pydock.parse_daemon_options(words)

    def test_which_role(self):
        daemons = ("-d", "-D -d", "-dD", "-H unix:///x -dns 1.1.1.1 -d", "-dns=1.1.1.1 -d", "-d=true", "--daemon",
                   "-mtu 9 -d")
        clients = ("", "run -d base", "-d=false ps", "-H -d ps", "-D ps -d")
        for line, expected in [(line, True) for line in daemons] + [(line, False) for line in clients]:
            self.assertEqual(pydock.is_daemon(line.split()), expected, line)

    def test_attach_is_a_switch_or_names_a_stream(self):
        self.assertEqual(self.normalize("run", "-a", "stdin", "-a=stdout", "base"),
                         (["--attach=stdin", "--attach=stdout"], ["base"]))
        self.assertEqual(self.normalize("run", "-a", "base", "sh"), (["--attach=true"], ["base", "sh"]))

    def test_wrong_flags_are_told_in_dockers_words(self):
        for words, text in ((["--foo"], "unknown flag: --foo"), (["-Z"], "unknown shorthand flag: 'Z' in -Z"),
                            (["-iZ"], "unknown shorthand flag: 'Z' in -iZ"),
                            (["--name"], "flag needs an argument: --name"),
                            (["-p"], "flag needs an argument: 'p' in -p"),
                            (["-m", "x"], 'invalid argument "x" for "-m, --memory" flag: invalid size: \'x\''),
                            (["--cpus", "x"],
                             'invalid argument "x" for "--cpus" flag: failed to parse x as a rational number'),
                            (["--rm=maybe"], 'strconv.ParseBool: parsing "maybe": invalid syntax'),
                            (["--ulimit", "x"], "invalid ulimit argument: x"),
                            (["-e", ""], "invalid environment variable: "),
                            (["--mount", "foo"], "invalid field 'foo' must be a key=value pair"),
                            (["--mount", "type=bind"], "target is required"),
                            (["--link", "a:b:c"], "bad format for links: a:b:c"),
                            (["--device", "x"], "invalid device specification: x")):
            with self.subTest(words), self.assertRaises(pydock.CommandError) as caught:
                parsed_flags("run", *words)
            self.assertIn(text, str(caught.exception))
            self.assertIn("\n\nUsage:  pydock run [OPTIONS] IMAGE [COMMAND] [ARG...]\n\nRun 'pydock run --help'",
                          str(caught.exception))
            self.assertEqual(caught.exception.code, 125)

    def test_values_and_defaults(self):
        args, words = parsed_flags("run", "--cpus=1.5", "-m", "1.5g", "--memory-swap", "-1", "--health-interval",
                                   "1m30s", "base")
        self.assertEqual((args.cpus, args.memory, args.memory_swap, args.health_interval),
                         (1500000000, 1610612736, -1, 90 * 10 ** 9))
        self.assertEqual((args.sig_proxy, args.rm, args.name, args.publish, args.pull),
                         (True, False, None, [], "missing"))
        self.assertEqual(words, ["base"])

    def test_number_of_arguments(self):
        for name, count, text in (("rename", 1, "requires 2 arguments"), ("rm", 0, "requires at least 1 argument"),
                                  ("ps", 1, "accepts no arguments"), ("images", 2, "requires at most 1 argument"),
                                  ("port", 3, "requires at least 1 and at most 2 arguments"),
                                  ("exec", 1, "requires at least 2 arguments"), ("build", 0, "requires 1 argument")):
            with self.subTest(name), self.assertRaises(pydock.CommandError) as caught:
                pydock.check_count(name, pydock.COMMANDS[name], count)
            self.assertIn(f"pydock: 'pydock {name}' {text}\n", str(caught.exception))
            self.assertEqual(caught.exception.code, 1)
        for name, count in (("rename", 2), ("rm", 9), ("images", 0), ("run", 5)):
            pydock.check_count(name, pydock.COMMANDS[name], count)

    def test_every_command_of_2013_and_of_today_is_there(self):
        names = "create exec cp events load logout pause rename save stats unpause update mkimage".split()
        names += ["container ls", "image ls", "image rm", "network create", "volume prune", "system df"]
        for name in COMMANDS_OF_2013 + names:
            self.assertIn(name, pydock.COMMANDS)


class CreateRequestTest(unittest.TestCase):
    """The body of POST /containers/create that the options of `run` and `create` give."""

    def request(self, *words):
        args, words = parsed_flags("run", *words)
        return pydock.container_request(args, words[0], words[1:])

    def host(self, *words):
        return self.request(*(words + ("base",)))["HostConfig"]

    def test_nothing_is_sent_that_was_not_asked_for(self):
        self.assertEqual(self.request("base", "echo", "-n", "hi"), {
            "Image": "base", "Cmd": ["echo", "-n", "hi"], "AttachStdin": False, "AttachStdout": True,
            "AttachStderr": True, "StdinOnce": False, "HostConfig": {"NetworkMode": "default"}})

    def test_streams(self):
        def streams(*words):
            request = self.request(*(words + ("base",)))
            return [request.get(key) for key in ("AttachStdin", "AttachStdout", "AttachStderr", "OpenStdin",
                                                 "StdinOnce", "Tty")]
        self.assertEqual(streams("-it"), [True, True, True, True, True, True])
        self.assertEqual(streams("-d", "-i"), [False, False, False, True, False, None])
        self.assertEqual(streams("-a", "stdout"), [False, True, False, None, False, None])
        self.assertEqual(streams("-a"), [True, True, True, None, False, None])
        self.assertEqual(streams("-a=false"), [False, False, False, None, False, None])

    def test_config(self):
        os.environ["PYDOCK_TEST"] = "here"
        self.addCleanup(os.environ.pop, "PYDOCK_TEST")
        request = self.request("-h", "hn", "-u", "1:2", "-w", "/w", "-e", "A=b=c", "-e", "PYDOCK_TEST", "-e",
                               "PYDOCK_NONE", "-l", "k=v", "-l", "bare", "--entrypoint", "", "--stop-signal", "INT",
                               "--stop-timeout", "0", "-v", "/anon", "base")
        self.assertEqual({key: request[key] for key in ("Hostname", "User", "WorkingDir", "Env", "Labels", "Entrypoint",
                                                        "StopSignal", "StopTimeout", "Volumes")},
                         {"Hostname": "hn", "User": "1:2", "WorkingDir": "/w",
                          "Env": ["A=b=c", "PYDOCK_TEST=here", "PYDOCK_NONE"], "Labels": {"k": "v", "bare": ""},
                          "Entrypoint": [""], "StopSignal": "INT", "StopTimeout": 0, "Volumes": {"/anon": {}}})

    def test_environment_and_labels_from_files(self):
        with tempfile.NamedTemporaryFile("w") as f:
            f.write("# note\n\n  X=1\r\nY=a b\n")
            f.flush()
            request = self.request("--env-file", f.name, "--label-file", f.name, "-e", "X=2", "base")
        self.assertEqual((request["Env"], request["Labels"]), (["X=1", "Y=a b", "X=2"], {"X": "1", "Y": "a b"}))
        with self.assertRaisesRegex(pydock.BadRequest, "open /none: no such file or directory"):
            self.request("--env-file", "/none", "base")

    def test_host_config(self):
        self.assertEqual(self.host("--rm", "--privileged", "--read-only", "-P", "--init", "--cap-add", "A",
                                   "--cap-drop", "ALL", "--pids-limit", "-1", "--memory-swappiness", "0", "--shm-size",
                                   "64m", "--ulimit", "nofile=10:20", "--ulimit", "core=0", "--pid", "host", "--device",
                                   "/dev/null:/dev/x:r", "--tmpfs", "/t:size=1m", "--tmpfs", "/u", "--restart", "no",
                                   "--net", "host", "--volumes-from", "c", "--sysctl", "net.a=1", "--log-opt",
                                   "max-size=1m", "--link", "db", "--add-host", "h:::1", "--add-host", "g=1.2.3.4",
                                   "--device-read-bps", "/dev/sda:1m", "--dns-opt", "ndots:1"), {
            "AutoRemove": True, "Privileged": True, "ReadonlyRootfs": True, "PublishAllPorts": True, "Init": True,
            "CapAdd": ["A"], "CapDrop": ["ALL"], "PidsLimit": -1, "MemorySwappiness": 0, "ShmSize": 67108864,
            "PidMode": "host",
            "Ulimits": [{"Name": "nofile", "Soft": 10, "Hard": 20}, {"Name": "core", "Soft": 0, "Hard": 0}],
            "Devices": [{"PathOnHost": "/dev/null", "PathInContainer": "/dev/x", "CgroupPermissions": "r"}],
            "Tmpfs": {"/t": "size=1m", "/u": ""}, "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
            "NetworkMode": "host", "VolumesFrom": ["c"], "Sysctls": {"net.a": "1"},
            "LogConfig": {"Type": "", "Config": {"max-size": "1m"}}, "Links": ["db:db"],
            "ExtraHosts": ["h:::1", "g:1.2.3.4"], "BlkioDeviceReadBps": [{"Path": "/dev/sda", "Rate": 1 << 20}],
            "DnsOptions": ["ndots:1"]})

    def test_volumes(self):
        self.assertEqual(self.host("-v", "/a:/b:ro", "-v", "name:/c", "-v", "./d:/e")["Binds"],
                         ["/a:/b:ro", "name:/c", os.getcwd() + "/d:/e"])

    def test_mounts(self):
        self.assertEqual(self.host("--mount", "type=bind,src=/a,dst=/b,readonly,bind-propagation=rshared", "--mount",
                                   "source=v,target=/c,volume-opt=type=nfs,volume-label=a=b,ro=false", "--mount",
                                   '"type=tmpfs","destination=/d",tmpfs-size=1m,tmpfs-mode=700')["Mounts"], [
            {"Type": "bind", "Source": "/a", "Target": "/b", "ReadOnly": True,
             "BindOptions": {"Propagation": "rshared"}},
            {"Type": "volume", "Source": "v", "Target": "/c", "ReadOnly": False,
             "VolumeOptions": {"DriverConfig": {"Options": {"type": "nfs"}}, "Labels": {"a": "b"}}},
            {"Type": "tmpfs", "Target": "/d", "TmpfsOptions": {"SizeBytes": 1 << 20, "Mode": 0o700}}])

    def test_networks(self):
        self.assertEqual(self.request("--network", "n", "--network-alias", "a", "--ip", "1.2.3.4",
                                      "base")["NetworkingConfig"], {
            "EndpointsConfig": {"n": {"Aliases": ["a"], "IPAMConfig": {"IPv4Address": "1.2.3.4"}}}})
        self.assertEqual(self.request("--network", "name=n,alias=a,alias=b,driver-opt=k=v", "--network", "m",
                                      "base")["NetworkingConfig"], {
            "EndpointsConfig": {"n": {"Aliases": ["a", "b"], "DriverOpts": {"k": "v"}}, "m": {}}})
        self.assertNotIn("NetworkingConfig", self.request("--network", "n", "base"))
        self.assertEqual([self.host(*words)["NetworkMode"]
                          for words in ([], ["-n"], ["-n=false"], ["--networking=false"])],
                         ["default", "default", "none", "none"])
        with self.assertRaisesRegex(pydock.BadRequest, "conflicting options: --networking=false and --network"):
            self.host("-n=false", "--net", "host")

    def test_health(self):
        self.assertEqual(self.request("--health-cmd", "true", "--health-interval", "1s", "--health-retries", "2",
                                      "base")["Healthcheck"],
                         {"Test": ["CMD-SHELL", "true"], "Interval": 10 ** 9, "Retries": 2})
        self.assertEqual(self.request("--no-healthcheck", "base")["Healthcheck"], {"Test": ["NONE"]})

    def test_restart(self):
        self.assertEqual(self.host("--restart", "on-failure:3")["RestartPolicy"],
                         {"Name": "on-failure", "MaximumRetryCount": 3})
        for words in (["--restart", "on-failure:x"], ["--rm", "--restart", "always"]):
            with self.assertRaises(pydock.BadRequest):
                self.host(*words)

    def test_security_options(self):
        with tempfile.NamedTemporaryFile("w") as f:
            f.write('{"defaultAction": "SCMP_ACT_ALLOW"}')
            f.flush()
            host = self.host("--security-opt", "no-new-privileges", "--security-opt", "seccomp=" + f.name,
                             "--security-opt", "systempaths=unconfined")
        self.assertEqual(host["SecurityOpt"], ["no-new-privileges", 'seccomp={"defaultAction":"SCMP_ACT_ALLOW"}'])
        self.assertEqual((host["MaskedPaths"], host["ReadonlyPaths"]), ([], []))
        with self.assertRaisesRegex(pydock.BadRequest, "opening seccomp profile"):
            self.host("--security-opt", "seccomp=/none")


class CommitConfigTest(unittest.TestCase):
    def test_config_of_2013(self):
        err = io.TextIOWrapper(io.BytesIO())
        with contextlib.redirect_stderr(err):
            config = pydock.config_of_2013(
                '{"Cmd": ["cat", "/world"], "PortSpecs": ["22", ":80", "9:53/udp"], "User": "me", '
                                           '"Memory": 5, "Tty": false}')
        err.flush()
        self.assertEqual(config, {"Cmd": ["cat", "/world"], "User": "me",
                                  "ExposedPorts": {"22/tcp": {}, "80/tcp": {}, "53/udp": {}}})
        self.assertEqual(err.buffer.getvalue(), b"WARNING: an image does not keep Memory: say it to run\n")

    def test_invalid_configs_of_2013(self):
        for text, part in (("{", "as JSON: "), ("[]", "a JSON object"), ('{"PortSpecs": 3}', "a list of texts"),
                           ('{"PortSpecs": [22]}', "a list of texts"),
                           ('{"PortSpecs": ["x"]}', "Invalid port format: x")):
            with self.subTest(text), self.assertRaisesRegex(pydock.Error, part):
                pydock.config_of_2013(text)


def attach_answers(container, status, start=(204, b"")):
    """The answers of a ScriptedDaemon whose container c1 runs and ends with `status`. `container` is its output, or a
    function that plays the container on the attached connection."""
    ended = threading.Event()

    def attach(connection, body):
        connection.sendall(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        container(connection) if callable(container) else connection.sendall(container)
        ended.set()

    def wait(connection, body):
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        ended.wait(30)
        data = b'{"StatusCode":%d,"Error":null}' % status
        connection.sendall(b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data))
    return {"POST /containers/create": (201, b'{"Id":"c1","Warnings":["careful"]}'),
            "POST /containers/c1/attach": attach, "POST /containers/c1/wait": wait, "POST /containers/c1/start": start,
            "POST /containers/c1/resize": b""}


class Calls2013Test(unittest.TestCase):
    """Commands in the form of 2013, and the call of the API that each makes."""

    def test_calls(self):
        ports = {"NetworkSettings": {"Ports": {"53/udp": [{"HostIp": "0.0.0.0", "HostPort": "49153"}]}}}
        progress = b'{"status": "done"}\n'
        for words, request, answer, out in (
                ("insert base http://x/y /y", "POST /images/base/insert?url=http%3A%2F%2Fx%2Fy&path=%2Fy", progress,
                 "done\n"),
                ("pull -registry http://r.example:5000/ -t v1 a",
                 "POST /images/create?fromImage=r.example%3A5000%2Fa&tag=v1", progress, "done\nr.example:5000/a:v1\n"),
                ("push -registry r.example me/a", "POST /images/r.example/me/a/push?tag=latest", progress,
                 "Using default tag: latest\ndone\n"),
                ("import http://x/y me/a v2", "POST /images/create?fromSrc=http%3A%2F%2Fx%2Fy&repo=me%2Fa&tag=v2",
                 progress, "done\n"),
                ("port c 53/UDP", "GET /containers/c/json", ports, "0.0.0.0:49153\n"),
                ("tag -f base me/a v1", "POST /images/base/tag?repo=me%2Fa&tag=v1", (201, b""), "")):
            with self.subTest(words), ScriptedDaemon({request.partition("?")[0]: answer}) as daemon:
                self.assertEqual(daemon.run(*words.split()), (0, out, ""))
                method, target, _, prefix = daemon.requests[-1]
                self.assertEqual(f"{method} {urllib.parse.unquote(target)}", urllib.parse.unquote(request))
                self.assertEqual(prefix, "v1.3" if words.startswith("insert") else "v" + pydock.API_VERSION)


class ClientRunTest(unittest.TestCase):
    frame = staticmethod(DemultiplexerTest.frame)

    def test_run_attaches_waits_and_starts_in_this_order(self):
        answers = attach_answers(self.frame(1, b"out\n") + self.frame(2, b"err\n"), 7)
        with ScriptedDaemon(answers) as daemon:
            self.assertEqual(daemon.run("run", "--rm", "base", "x"), (7, "out\n", "WARNING: careful\nerr\n"))
            self.assertEqual([request[1] for request in daemon.requests], [
                "/containers/create", "/containers/c1/attach?stream=1&stdout=1&stderr=1",
                "/containers/c1/wait?condition=removed", "/containers/c1/start"])

    def test_stdin_goes_in_whole_and_is_closed(self):
        got, data = [], os.urandom(1 << 20)
        answers = attach_answers(lambda connection: got.extend(iter(lambda: connection.recv(1 << 16), b"")), 0)
        with ScriptedDaemon(answers) as daemon:
            self.assertEqual(daemon.run("run", "-i", "base", input=data)[0], 0)
        self.assertEqual(b"".join(got), data)

    def test_in_the_background(self):
        answers = attach_answers(b"", 0)
        with ScriptedDaemon(answers) as daemon:
            self.assertEqual(daemon.run("run", "-d", "base")[:2], (0, "c1\n"))
            self.assertEqual(len(daemon.requests), 2)

    def test_force_removal_forgives_what_is_not_there_and_no_other_failure(self):
        answers = {"DELETE /containers/busy": (409, b'{"message":"in use"}'),
                   "DELETE /containers/gone": (404, b'{"message":"No such container: gone"}')}
        with ScriptedDaemon(answers) as daemon:
            self.assertEqual(daemon.run("rm", "-f", "gone")[0], 0)
            self.assertEqual(daemon.run("rm", "-f", "busy", "gone")[0], 1)

    def test_exit_codes_of_a_start_that_fails(self):
        for message, code in (("exec: \\\"x\\\": executable file not found in $PATH", 127),
                              ("stat /x: no such file or directory", 127),
                              ("exec: \\\"/tmp\\\": permission denied", 126), ("something else", 125)):
            answers = attach_answers(b"", 0, (400, b'{"message":"%s"}' % message.encode()))
            with self.subTest(message), ScriptedDaemon(answers) as daemon:
                exit_code, _, text = daemon.run("run", "base")
                self.assertEqual(exit_code, code)
                self.assertIn("pydock: Error response from daemon: ", text)
                self.assertTrue(text.endswith("\n\nRun 'pydock run --help' for more information\n"))

    def test_what_the_client_itself_refuses_is_125(self):
        with ScriptedDaemon({}) as daemon:
            for words in (["--env-file", "/none"], ["-p", "x"], ["--foo"], ["--restart", "on-failure:x"],
                          ["--security-opt", "seccomp=/none"]):
                self.assertEqual(daemon.run("run", *words, "base")[0], 125)
            self.assertEqual(daemon.run("run", "-it", "base"), (1, "", "the input device is not a TTY\n"))
            self.assertEqual(daemon.requests, [])

    def test_a_missing_image_is_pulled(self):
        answers = attach_answers(b"", 0)
        with ScriptedDaemon(answers) as daemon:
            created = answers["POST /containers/create"]

            def pull(connection, body):
                answers["POST /containers/create"] = created
                chunked(b'{"status":"Pulling"}')(connection, body)
            answers.update({"POST /containers/create": (404, b'{"message":"No such image: base:latest"}'),
                            "POST /images/create": pull})
            self.assertEqual(daemon.run("run", "-d", "base"),
                             (0, "c1\n", "Unable to find image 'base:latest' locally\nPulling\nWARNING: careful\n"))
            self.assertEqual(daemon.requests[1][1], "/images/create?fromImage=base&tag=latest")

    def test_exec(self):
        answers = attach_answers(self.frame(1, b"hi\n"), 0)
        answers.update({"POST /containers/c/exec": {"Id": "e1"},
                        "POST /exec/e1/start": answers["POST /containers/c1/attach"],
                        "GET /exec/e1/json": {"ExitCode": 5, "Running": False}})
        with ScriptedDaemon(answers) as daemon:
            self.assertEqual(daemon.run("exec", "-e", "A=b", "c", "echo", "-n"), (5, "hi\n", ""))
            self.assertEqual(daemon.requests[0][2]["Cmd"], ["echo", "-n"])
            self.assertEqual(daemon.requests[1][2], {"Detach": False, "Tty": False})


class ListingTest(unittest.TestCase):
    CONTAINER = {"Id": "0123456789abcdef" * 4, "Names": ["/web", "/other/alias"], "Image": "base",
                 "ImageID": "sha256:" + "a" * 64, "Command": "sh -c 'a long command line'", "Created": 0, "Ports": [],
                 "Labels": {"k": "v"}, "State": "running", "Status": "Up 3 seconds", "SizeRw": 5, "SizeRootFs": 1984304,
                 "Mounts": [{"Type": "volume", "Name": "0123456789abcdefghi", "Driver": "local"}],
                 "NetworkSettings": {"Networks": {"bridge": {}}}}

    def ps(self, *words):
        with ScriptedDaemon({"GET /containers/json": [self.CONTAINER]}) as daemon:
            code, out, err = daemon.run("ps", *words)
            self.assertEqual((code, err), (0, ""))
            return out, daemon.requests[0][1]

    def test_columns(self):
        self.assertEqual(self.ps()[0],
                         "CONTAINER ID   IMAGE     COMMAND                  CREATED   STATUS         PORTS     NAMES\n"
                         "0123456789ab   base      \"sh -c 'a long comma\u2026\"   N/A       Up 3 seconds             "
                         "web\n")
        self.assertEqual(self.ps("-q"), ("0123456789ab\n", "/containers/json"))
        out, target = self.ps("-s", "--no-trunc")
        self.assertIn("5B (virtual 1.98MB)", out)
        self.assertIn(self.CONTAINER["Id"], out)
        self.assertIn("web,other/alias", out)
        self.assertEqual(target, "/containers/json?size=1")

    def test_what_is_asked_for(self):
        for words, query in ((["-a"], "?all=1"), (["-l"], "?limit=1"), (["-n", "3"], "?limit=3"),
                             (["--format", "{{.Size}}"], "?size=1"),
                             (["-f", "name=x", "-f", "label=a=b"],
                              "?filters=" + pydock.quote('{"name": ["x"], "label": ["a=b"]}', "")),
                             (["-sinceId", "x"], "?all=1&filters=" + pydock.quote('{"since": ["x"]}', ""))):
            self.assertEqual(self.ps(*words)[1], "/containers/json" + query)

    def test_formats(self):
        self.assertEqual(self.ps("--format", "{{.ID}}\\t{{.Names}}")[0], "0123456789ab\tweb\n")
        self.assertEqual(self.ps("--format", 'table {{.Names}}\\t{{.Label "k"}}\\t{{.Mounts}}')[0],
                         "NAMES     k         MOUNTS\nweb       v         0123456789abcd\u2026\n")
        self.assertEqual(json.loads(self.ps("--format", "json")[0])["Labels"], "k=v")
        with ScriptedDaemon({"GET /containers/json": [self.CONTAINER]}) as daemon:
            self.assertIn("failed to parse template: template: :1: unclosed action",
                          daemon.run("ps", "--format", "{{.ID")[2])
            self.assertIn("failed to execute template: can't evaluate field Foo",
                          daemon.run("ps", "--format", "{{.Foo}}")[2])

    def test_names_cannot_control_the_terminal(self):
        with ScriptedDaemon({"GET /containers/json": [dict(self.CONTAINER, Names=["/a\x1b[31m"])]}) as daemon:
            self.assertIn("a\\x1b[31m", daemon.run("ps")[1])

    def test_tabulate(self):
        self.assertEqual(pydock.tabulate(["A\tB\tC", "long cell here\t1\tx"]),
                         ["A                B         C", "long cell here   1         x"])
        self.assertEqual(pydock.tabulate([]), [])

    def test_images(self):
        images = [{"Id": "sha256:" + "b" * 64, "ParentId": "", "RepoTags": ["base:1", "localhost:5000/x:2"],
                   "RepoDigests": ["base@sha256:" + "c" * 64], "Created": 0, "Size": 1984304},
                  {"Id": "sha256:" + "d" * 64, "ParentId": "sha256:" + "b" * 64, "RepoTags": None, "RepoDigests": None,
                   "Created": 0, "Size": 5}]
        with ScriptedDaemon({"GET /images/json": images}) as daemon:
            self.assertEqual(daemon.run("images")[1], "REPOSITORY         TAG       IMAGE ID       CREATED   SIZE\n"
                             "base               1         bbbbbbbbbbbb   N/A       1.98MB\n"
                             "localhost:5000/x   2         bbbbbbbbbbbb   N/A       1.98MB\n"
                             "<none>             <none>    dddddddddddd   N/A       5B\n")
            self.assertEqual(daemon.run("images", "-q")[1], "bbbbbbbbbbbb\ndddddddddddd\n")
            self.assertIn("base               1         sha256:cccc", daemon.run("images", "--digests")[1])
            self.assertEqual(daemon.run("images", "--tree")[1],
                             "\u2514\u2500bbbbbbbbbbbb Size: 1.98MB Tags: base:1, localhost:5000/x:2\n"
                             "  \u2514\u2500dddddddddddd Size: 5B\n")
            graph = daemon.run("images", "-viz")[1]
            self.assertTrue(graph.startswith("digraph docker {\n") and ' "bbbbbbbbbbbb" -> "dddddddddddd"\n' in graph)

    def test_inspect_prints_what_it_found_and_says_what_it_did_not(self):
        with ScriptedDaemon({"GET /containers/a/json": {"Name": "/a"}, "GET /images/b/json": {"Id": "b"}}) as daemon:
            self.assertEqual(daemon.run("inspect", "a", "b", "c"),
                             (1, '[\n    {\n        "Name": "/a"\n    },\n    {\n        "Id": "b"\n    }\n]\n',
                              "Error: No such object: c\n"))
            self.assertEqual(daemon.run("inspect", "-f", "{{.Name}}", "a"), (0, "/a\n", ""))
            self.assertEqual(daemon.run("inspect", "--format", "{{foo}}", "a")[2],
                             'template parsing error: template: :1: function "foo" not defined\n')

    def test_many_names_are_reported_one_by_one(self):
        with ScriptedDaemon({"POST /containers/a/stop": (204, b""), "POST /containers/c/stop": (304, b"")}) as daemon:
            self.assertEqual(daemon.run("stop", "-t", "0", "a", "b", "c"),
                             (1, "a\nc\n", "Error response from daemon: No such thing\n"))
            self.assertIn("/containers/a/stop?t=0", [request[1] for request in daemon.requests])


class ContextTest(unittest.TestCase):
    def test_patterns(self):
        for pattern, matching, others in (
                ("a", ["a", "a/b"], ["b/a", "ab"]), ("/a/", ["a"], []), ("*.log", ["x.log"], ["d/x.log"]),
                ("**/*.log", ["x.log", "d/e/x.log"], ["x.log2"]), ("a/**", ["a/b", "a/b/c"], ["b"]),
                ("a?c", ["abc"], ["a/c"]), ("[ab]x", ["ax", "bx/y"], ["cx"]), ("a.b", ["a.b"], ["axb"]),
                ("**/x/**", ["x/y", "d/x/y"], ["x2/y"]), ("\\*", ["*"], ["a"])):
            rules = pydock.IgnoreRules(pattern)
            for path in matching:
                self.assertTrue(rules.rule_for(path), (pattern, path))
            for path in others:
                self.assertFalse(rules.rule_for(path), (pattern, path))

    def test_context(self):
        with tempfile.TemporaryDirectory() as folder:
            for name, text in (("Dockerfile", "FROM x"),
                               (".dockerignore", "# note\nd\n!d/keep\n**/*.log\nDockerfile\n"), ("d/keep", "1"),
                               ("d/drop", "2"), ("e/x.log", "3"), ("e/f", "4")):
                os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
                with open(os.path.join(folder, name), "w") as f:
                    f.write(text)
            parts = []
            pydock.build_context(folder, parts.append)
            with tarfile.open(fileobj=io.BytesIO(b"".join(parts))) as archive:
                self.assertEqual(sorted(archive.getnames()), [".dockerignore", "Dockerfile", "d", "d/keep", "e", "e/f"])

    def test_build_sends_it(self):
        with ScriptedDaemon({"POST /build": chunked(b'{"stream":"Step 1/1 : FROM base\\n"}',
                                                    b'{"aux":{"ID":"sha256:1"}}')}) as daemon:
            with open(os.path.join(daemon.folder, "Dockerfile"), "w") as f:
                f.write("FROM base\n")
            iid = os.path.join(daemon.folder, "iid")
            code, out, _ = daemon.run("build", "-t", "x:1", "--build-arg", "A=b", "--iidfile", iid, daemon.folder)
            self.assertEqual((code, out.splitlines()[-1]), (0, "Step 1/1 : FROM base"))
            with open(iid) as f:
                self.assertEqual(f.read(), "sha256:1")
            _, target, body, _ = daemon.requests[0]
            self.assertEqual(target,
                             "/build?t=x%3A1&buildargs=%7B%22A%22%3A%20%22b%22%7D&rm=1&dockerfile=Dockerfile")
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                self.assertIn("Dockerfile", archive.getnames())
            self.assertIn("path \"/none\" not found", daemon.run("build", "/none")[2])

    def test_a_dockerfile_from_stdin(self):
        with ScriptedDaemon({"POST /build": chunked(b'{"stream":"ok"}')}) as daemon:
            daemon.run("build", "-", input=b"FROM base\n")
            with tarfile.open(fileobj=io.BytesIO(daemon.requests[0][2])) as archive:
                self.assertEqual(archive.extractfile("Dockerfile").read(), b"FROM base\n")


class ClientCopyTest(unittest.TestCase):
    def test_where_a_copy_goes(self):
        for arguments, expected in (
                (("/t", True, True, "a/f", False), ("/t", "f")), (("/t", True, True, "a/d", True), ("/t", "d")),
                (("/t", True, True, "a/d/.", True), ("/t", "")), (("/t/x", False, False, "f", False), ("/t", "x")),
                (("/t/x/", False, False, "d", True), ("/t", "x")), (("/x", True, False, "f", False), ("/", "x")),
                (("x", False, False, "f", False), (".", "x"))):
            with self.subTest(arguments):
                self.assertEqual(pydock._destination(*arguments), expected)
        for arguments in (("/t/x/", False, False, "f", False), ("/t", True, False, "d", True)):
            with self.subTest(arguments), self.assertRaises(pydock.CommandError):
                pydock._destination(*arguments)

    def test_out_of_a_container(self):
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, kind, link in (("d", tarfile.DIRTYPE, ""), ("d/f", tarfile.REGTYPE, ""),
                                     ("d/g", tarfile.LNKTYPE, "d/f"), ("d/l", tarfile.SYMTYPE, "/etc"),
                                     ("d/l/evil", tarfile.REGTYPE, "")):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname, entry.mode = kind, link, 0o755
                tar.addfile(entry)
        path_stat = base64.b64encode(json.dumps({"name": "d", "mode": 1 << 31 | 0o755}).encode())

        def answer(connection, body):
            data = archive.getvalue()
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Docker-Container-Path-Stat: %b\r\nContent-Length: %d\r\n\r\n"
                               % (path_stat, len(data)) + data)
        with ScriptedDaemon({"GET /containers/c/archive": answer}) as daemon:
            target = os.path.join(daemon.folder, "new")
            daemon.run("cp", "c:/d", target)
            self.assertTrue(os.path.samefile(os.path.join(target, "f"), os.path.join(target, "g")))
            self.assertFalse(os.path.lexists("/etc/evil"))  # the client does not write through the symlink d/l
            self.assertIn("must specify at least one container source", daemon.run("cp", "a", "b")[2])

    def test_into_a_container(self):
        path_stat = base64.b64encode(json.dumps({"name": "t", "mode": 1 << 31 | 0o755, "linkTarget": ""}).encode())

        def stat(connection, body):
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Docker-Container-Path-Stat: %b\r\n\r\n" % path_stat)
        with ScriptedDaemon({"HEAD /containers/c/archive": stat, "PUT /containers/c/archive": b""}) as daemon:
            with open(os.path.join(daemon.folder, "file"), "w") as f:
                f.write("text")
            self.assertEqual(daemon.run("cp", os.path.join(daemon.folder, "file"), "c:/t"), (0, "", ""))
            method, target, body, _ = daemon.requests[-1]
            self.assertEqual((method, target), ("PUT", "/containers/c/archive?noOverwriteDirNonDir=1&path=%2Ft"))
            with tarfile.open(fileobj=io.BytesIO(body)) as archive:
                self.assertEqual(archive.extractfile("file").read(), b"text")
            self.assertIn("no such file or directory", daemon.run("cp", "/none", "c:/t")[2])


class ClientCredentialsTest(unittest.TestCase):
    def test_login_is_kept_used_and_forgotten(self):
        with ScriptedDaemon({"POST /auth": {"Status": "Login Succeeded", "IdentityToken": ""},
                             "POST /images/localhost:5000/x/push": chunked(
                b'{"status":"done"}')}) as daemon:
            config = os.path.join(daemon.folder, ".docker", "config.json")
            os.mkdir(os.path.dirname(config))
            with open(config, "w") as f:
                f.write('{"psFormat": "{{.ID}}", "auths": {"other": {"auth": "eDp5"}}}')
            code, out, _ = daemon.run("login", "-u", "me", "--password-stdin", "localhost:5000", input=b"secret\n")
            self.assertEqual((code, out), (0, "Login Succeeded\n"))
            with open(config) as f:
                self.assertEqual(json.load(f),
                                 {"psFormat": "{{.ID}}",
                                  "auths": {"other": {"auth": "eDp5"}, "localhost:5000": {"auth": "bWU6c2VjcmV0"}}})
            self.assertEqual(os.stat(config).st_mode & 0o777, 0o600)
            self.assertEqual(daemon.requests[0][2]["serveraddress"], "localhost:5000")
            self.assertEqual(daemon.run("push", "localhost:5000/x:1")[:2], (0, "done\n"))
            self.assertEqual(daemon.run("logout", "localhost:5000")[1],
                             "Removing login credentials for localhost:5000\n")
            self.assertEqual(daemon.run("logout", "localhost:5000")[1], "Not logged in to localhost:5000\n")
            with open(config) as f:
                self.assertEqual(list(json.load(f)["auths"]), ["other"])

    def test_what_a_config_holds(self):
        self.assertEqual(pydock.credentials({"auths": {"h": {"auth": "bWU6c2VjOnJldA=="}}}, "h"),
                         {"username": "me", "password": "sec:ret", "serveraddress": "h"})
        self.assertEqual(pydock.credentials({}, "h"), {})
        with self.assertRaisesRegex(pydock.CommandError, "damaged"):
            pydock.credentials({"auths": {"h": {"auth": "\u00e9"}}}, "h")


class HelpTest(unittest.TestCase):
    def client(self, *words):
        out, err = (io.TextIOWrapper(io.BytesIO()) for _ in range(2))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = pydock.client_main(list(words))
        out.flush()
        err.flush()
        return code, out.buffer.getvalue().decode(), err.buffer.getvalue().decode()

    def test_help_of_every_command(self):
        for name, command in pydock.COMMANDS.items():
            code, out, _ = self.client(*name.split(), "--help")
            self.assertEqual(code, 0)
            self.assertTrue(out.startswith(f"Usage:  pydock {name} "), out)
            for option in command.options:
                self.assertEqual(f"--{option.name}" in out.replace("\n", " ").split(),
                                 bool(option.help) and not option.same_as,
                                 (name, option.name))
                if option.same_as:
                    self.assertIn(option.same_as, [other.name for other in command.options])

    def test_layout(self):
        self.assertEqual(self.client("kill", "--help")[1],
                         "Usage:  pydock kill [OPTIONS] CONTAINER [CONTAINER...]\n\n"
                         "Kill running containers, or send them a signal\n\n"
                         "Aliases:\n  pydock kill, pydock container kill\n\nOptions:\n"
                         "  -s, --signal string   Signal to send to the container\n")

    def test_main_help_and_groups(self):
        code, out, _ = self.client("--help")
        self.assertEqual(code, 0)
        for text in ("Usage:  pydock [OPTIONS] COMMAND\n", "\nCommon Commands:\n  run         ",
                     "\nManagement Commands:\n", "\n  container   ", "\nGlobal Options:\n"):
            self.assertIn(text, out)
        self.assertEqual(self.client("volume"), self.client("volume", "--help"))
        self.assertIn("\n  prune     Remove unused volumes\n", self.client("help", "volume")[1])
        self.assertEqual(self.client("help", "ps"), self.client("ps", "--help"))

    def test_all_commands_in_the_layout_of_2013(self):
        code, out, _ = self.client()
        self.assertEqual((code, self.client("help")), (0, (0, out, "")))
        self.assertTrue(out.startswith("Usage: pydock [OPTIONS] COMMAND [arg...]\n\nCommands:\n"
                                       "    attach    Attach to a running container\n"
                                       "    build     Build an image from a Dockerfile\n"), out)
        listed = re.findall(r"^    (\S+) +\S", out, re.MULTILINE)
        self.assertEqual(set(COMMANDS_OF_2013) - set(listed), set())
        self.assertEqual(listed, sorted(listed))

    def test_flags_of_the_daemon(self):
        for word in ("-h", "-help"):
            result = run_program([sys.executable, PYDOCK, word])
            self.assertEqual((result.code, result.err), (0, ""), result)
            for line in ("Usage of pydock:", "  -D=false: Debug mode",
                         '  -b="": Attach containers to a pre-existing network bridge',
                         '  -dns="": Set custom dns servers',
                         '  -g="/var/lib/pydock": Path to graph storage base dir.'):
                self.assertIn(line, result.out.splitlines())

    def test_tables_of_the_readme(self):
        """Every flag, command and call of 2013 that the README names exists, and the README names all of them."""
        chapter = re.search(r"(?ms)^## As in 2013\n(.*?)^## ", read(README)).group(1)
        commands = dict(re.findall(r"^\| `([a-z]+)` \| (.*) \|$", chapter, re.MULTILINE))
        others = re.search(r"As they are: `(.*?)`", chapter).group(1).split()
        self.assertEqual(set(COMMANDS_OF_2013) - set(commands) - set(others), set())
        for name, forms in commands.items():
            flags = set(re.findall(r"`-([A-Za-z][\w-]*)", forms))
            known = {word for option in pydock.COMMANDS[name].options for word in (option.short, option.name)}
            self.assertEqual(flags - known, set(), name)
        daemon = re.findall(r"^\| `-([\w-]+)[ `]", chapter, re.MULTILINE)
        known = {name for option in pydock.read_options(pydock.DAEMON_OPTIONS) for name in (option.short, option.name)}
        self.assertEqual((len(daemon), set(daemon) - known), (9, set()))
        calls = [(method, path) for method, paths in re.findall(r"^\| (GET|POST|DELETE) (\S.*?) \|", chapter,
                                                                re.MULTILINE)
                 for path in paths.split(", ")]
        routes = {(verb, pattern) for verb, pattern, first, last, _ in pydock.ROUTES
                  if first <= (1, 3) <= last and verb != "OPTIONS"}
        named = {(verb, pattern) for verb, pattern in routes
                 for method, path in calls if verb == method and pattern.fullmatch(path)}
        self.assertEqual(routes - named, set())
        for method, path in calls:
            self.assertTrue([1 for verb, pattern in routes if verb == method and pattern.fullmatch(path)],
                            (method, path))

    def test_one_daemon_at_a_time(self):
        self.assertEqual(self.client("-H", "a", "-H", "b", "ps"),
                         (1, "", "Specify only one -H: a client talks to one daemon\n"))

    @unittest.skipUnless(os.path.exists(os.path.join(HERE, "README.md")), "needs README.md")
    def test_the_readme_knows_all_commands_and_flags_and_no_others(self):
        text = read(README)
        documented = set(re.findall(r"\w+", text.partition("## Commands")[2].partition("## The daemon")[0]))
        commands = {name.split()[-1] for name in pydock.COMMANDS}
        self.assertEqual(commands - documented - {"remove", "list", "insert"}, set())
        first = {name.split()[0] for name in pydock.COMMANDS} | {"help"}
        for block in re.findall(r"```\n(.*?)```", text, re.DOTALL):
            self.assertEqual(set(re.findall(r"(?:^|[;(|] ?)pydock ([a-z]+)", block, re.MULTILINE)) - first, set())
        flags = {flag for option in pydock.read_options(pydock.DAEMON_OPTIONS)
                 for flag in (f"-{option.short}", f"-{option.name}", f"--{option.name}")}
        options = text.partition("## The daemon's options")[2].partition("## ")[0]
        self.assertEqual(set(re.findall(r"[` ](--?[a-zA-Z][a-z-]*)", options)) - flags - {"-h"}, set())

    def test_what_is_unknown(self):
        self.assertEqual(self.client("foo"),
                         (1, "", "pydock: unknown command: pydock foo\n\nRun 'pydock --help' for more information\n"))
        self.assertEqual(self.client("volume", "foo"), (
            1, "", "pydock: unknown command: pydock volume foo\n\nRun 'pydock volume --help' for more information\n"))
        self.assertEqual(self.client("help", "foo"), (1, "", "unknown help topic: foo\n"))
        self.assertEqual(self.client("--foo")[0], 125)
        self.assertEqual(self.client("ps", "--foo"), (125, "", "unknown flag: --foo\n\nUsage:  pydock ps [OPTIONS]\n\n"
                                                               "Run 'pydock ps --help' for more information\n"))

    def test_version_flag(self):
        self.assertEqual(self.client("--version"), (0, f"Pydock version {pydock.VERSION}\n", ""))

    def test_completion(self):
        self.assertIn("complete -o default -F _pydock pydock\n", self.client("completion", "bash")[1])
        self.assertIn("\nrun\n", self.client("completion", "words")[1])
        self.assertEqual(self.client("completion", "words", "volume")[1],
                         "create\ninspect\nlist\nls\nprune\nremove\nrm\n")
        self.assertIn("--publish-all\n", self.client("completion", "words", "run")[1])

    def test_the_client_imports_nothing_heavy(self):
        with ScriptedDaemon({"GET /containers/json": []}) as daemon:
            program = (f"import sys, runpy; sys.argv = ['pydock', '-H', {daemon.path!r}, 'ps'];\n"
                       f"try: runpy.run_path({PYDOCK!r}, run_name='__main__')\n"
                       "except SystemExit: pass\nprint(*sys.modules, file=sys.stderr)")
            result = subprocess.run([sys.executable, "-I", "-S", "-c", program], stderr=subprocess.PIPE,
                                    stdout=subprocess.PIPE, timeout=60)
            loaded = result.stderr.decode().split()
        for name in ("email", "http.client", "http.server", "ssl", "tarfile", "subprocess", "ctypes", "urllib.parse",
                     "hashlib"):
            self.assertNotIn(name, loaded)


########################################################################
# 24. Main
########################################################################

def refused_start(*flags, **environment):
    """Start a daemon with a data root of its own, which must not succeed, and return what it prints on stderr."""
    folder = tempfile.mkdtemp(dir=SCRATCH)
    try:
        result = run_program([sys.executable, PYDOCK, "-d", "-g", folder + "/root", "-p", folder + "/pid", "-b", "none",
                              "--cgroup-parent", CGROUP_PARENT]
                             + list(flags) + ["-H", "unix://" + folder + "/socket"], timeout=10, **environment)
    finally:
        shutil.rmtree(folder)
    if result.code == 0 or "Traceback" in result.err:
        raise AssertionError(repr(result))
    return result.err


@needs_root
class StartTest(unittest.TestCase):
    def test_invalid_flags(self):
        for flags, part in ((["--nosuch"], "--nosuch"), (["-H", "ftp://x"], "unix:///PATH or tcp://HOST:PORT"),
                            (["-g", "/"], "cannot be /"), (["--mtu", "x"], "mtu"),
                            (["-H", "tcp://127.0.0.1:99999"], "99999"), (["-H", "tcp://127.0.0.1:x"], "127.0.0.1:x"),
                            (["--icc=perhaps"], "perhaps"), (["--host-root", "/nosuch/root"], "/nosuch/root")):
            with self.subTest(flags):
                self.assertIn(part, refused_start(*flags))

    def test_tcp_beyond_loopback_needs_certificates(self):
        self.assertIn("--tlsverify", refused_start("-H", "tcp://0.0.0.0:0"))
        self.assertIn("--tlscert", refused_start("-H", "tcp://0.0.0.0:0", "--tlsverify"))
        self.assertIn("nosuch.pem", refused_start("-H", "tcp://127.0.0.1:0", "--tls", "--tlscert", "nosuch.pem",
                                                  "--tlskey", "nosuch.pem"))

    def test_defaults_listen_on_no_port(self):
        daemon = Daemon("defaults").start()
        self.addCleanup(daemon.cleanup)
        inodes = {os.readlink(f"/proc/{daemon.process.pid}/fd/{fd}")
                  for fd in os.listdir(f"/proc/{daemon.process.pid}/fd")}
        listening = {f"socket:[{line.split()[9]}]" for line in read("/proc/net/tcp").splitlines()[1:]
                     if line.split()[3] == "0A"}
        self.assertFalse(inodes & listening)

    def test_a_stale_pid_file_and_a_stale_socket(self):
        victim = subprocess.Popen(["sleep", "600"])
        self.addCleanup(victim.wait)
        self.addCleanup(victim.kill)
        daemon = Daemon("stale")
        self.addCleanup(daemon.cleanup)
        write(daemon.pidfile, f"{victim.pid}\n")
        with socket.socket(socket.AF_UNIX) as old:
            old.bind(daemon.socket)
        daemon.start()
        self.assertEqual(read(daemon.pidfile), f"{daemon.process.pid}\n")
        self.assertIsNone(victim.poll())
        daemon.stop()
        self.assertFalse(os.path.exists(daemon.pidfile))

    def test_a_file_in_the_sockets_place(self):
        path = write(os.path.join(SCRATCH, "in-the-way"), "precious")
        self.addCleanup(os.unlink, path)
        self.assertIn("it is no socket", refused_start("-H", "unix://" + path))
        self.assertEqual(read(path), "precious")

    def test_the_environment_of_the_daemon_stays_outside(self):
        daemon = Daemon("secret").start(SECRET="hush")
        self.addCleanup(daemon.cleanup)
        container = daemon.api.run("sleep", "600", PidMode="host")
        self.assertNotIn("hush", daemon.api.execute(container, "sh", "-c",
                                                    "env; cat /proc/self/environ /proc/1/environ")[1])
        self.assertNotIn("SECRET", daemon.api.output("cat", "/proc/1/environ"))

    def test_modules_beside_it_are_not_imported(self):
        folder = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(shutil.rmtree, folder)
        shutil.copy(PYDOCK, folder)
        for name in ("json.py", "socket.py", "sitecustomize.py", "ctypes.py", "http.py", "tarfile.py", "encodings.py"):
            write(os.path.join(folder, name), f"open({folder + '/marker'!r}, 'w')\n")
        for words, code in ((["--help"], 0), (["-H", "unix:///nosuch/socket", "ps"], 1),
                            (["-d", "-g", folder + "/root", "-p", folder + "/pid", "-H", "tcp://0.0.0.0:0", "-b",
                              "none"], 1)):
            result = run_program([sys.executable, folder + "/pydock.py"] + words, cwd=folder, PYTHONPATH="")
            self.assertEqual(result.code, code, result)
        self.assertFalse(os.path.exists(folder + "/marker"))

    def test_tls(self):
        if not shutil.which("openssl"):
            self.skipTest("needs the program openssl")
        folder = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(shutil.rmtree, folder)
        # one certificate that is authority, server and client at once
        make_self_signed_certificate(folder + "/key.pem", folder + "/cert.pem", "IP:127.0.0.1",
                                     "keyUsage=keyCertSign,digitalSignature")
        flags = ["--tlsverify", "--tlscacert", folder + "/cert.pem", "--tlscert", folder + "/cert.pem", "--tlskey",
                 folder + "/key.pem"]
        address = ["-H", f"tcp://127.0.0.1:{free_port()}"]
        daemon = Daemon("tls", *address, *flags).start()
        self.addCleanup(daemon.cleanup)
        for program in CLIENT_COMMANDS:
            result = run_program(program + address + flags + ["run", "--rm", "-i", "base", "sh", "-c", "cat; exit 3"],
                                 input="over TLS")
            self.assertEqual((result.code, result.out), (3, "over TLS"), result)
        self.assertNotEqual(run_program([sys.executable, PYDOCK] + address + ["ps"]).code, 0)


def new_folder(test, prefix="tmp"):
    """A folder for one test."""
    path = tempfile.mkdtemp(dir=SCRATCH, prefix=prefix)
    test.addCleanup(shutil.rmtree, path)
    return path


class InstallTest(unittest.TestCase):
    """The installed command: a launcher, the source, and byte code of the sections that a client uses and of the
    others."""

    @classmethod
    def setUpClass(cls):
        cls.prefix = tempfile.mkdtemp(dir=SCRATCH)
        os.chmod(cls.prefix, 0o755)
        cls.addClassCleanup(shutil.rmtree, cls.prefix)

    def setUp(self):
        result = run_program([sys.executable, PYDOCK, "install", "--prefix", self.prefix], PYTHONPATH="")
        self.assertEqual((result.code, result.err), (0, ""), result)
        self.program, self.library = self.prefix + "/bin/pydock", self.prefix + "/lib/pydock"
        self.source = self.library + "/pydock.py"
        tag = sys.implementation.cache_tag
        self.byte_code = [f"{self.library}/client.{tag}", f"{self.library}/others.{tag}"]

    def run_installed(self, *words, **options):
        return run_program([self.program, *words], PYTHONPATH="", **options)

    def version(self):
        """What `--version` prints on stderr, after the check of its output."""
        result = self.run_installed("--version")
        self.assertEqual((result.code, result.out), (0, f"Pydock version {pydock.VERSION}\n"), result)
        return result.err

    def test_files(self):
        self.assertEqual(sorted(os.listdir(self.library)),
                         sorted(map(os.path.basename, self.byte_code + [self.source])))
        self.assertEqual(read(self.source), read(PYDOCK))
        self.assertEqual(self.version(), "")
        self.assertEqual({stat.S_IMODE(os.stat(path).st_mode) for path in self.byte_code + [self.source]}, {0o644})
        self.assertEqual(stat.S_IMODE(os.stat(self.program).st_mode), 0o755)

    def test_a_client_executes_only_its_sections(self):
        first_line = read(self.byte_code[1], "rb").partition(b"\n")[0]
        write(self.byte_code[1], first_line + b"\nno code object: not loaded by this command")
        result = self.run_installed("-H", "unix:///nosuch/socket", "ps")
        self.assertEqual(result.code, 1)
        self.assertIn("Is the daemon running? Start it with: sudo pydock -d", result.err)

    def test_byte_code_is_made_anew(self):
        def spoil(path):
            with open(path, "r+b") as file:
                file.write(b"30000f0")  # of another Python
        for change in (lambda: os.utime(self.source, (1, 1)), lambda: os.unlink(self.byte_code[0]),
                       lambda: os.unlink(self.byte_code[1]), lambda: spoil(self.byte_code[0]),
                       lambda: os.truncate(self.byte_code[0], 40), lambda: os.truncate(self.byte_code[0], 0)):
            change()
            self.assertEqual(self.version(), "")
            stamps = {read(path, "rb").partition(b"\n")[0] for path in self.byte_code}
            self.assertEqual(stamps, {b"%x %d %d" % (sys.hexversion, os.stat(self.source).st_mtime_ns,
                                                     os.path.getsize(self.source))})

    def test_a_renewal_that_was_interrupted_is_made_up_for(self):
        """Byte code of the other sections that does not belong to the source is noticed at the start, and not by the
        first command that needs it."""
        old = read(self.byte_code[1], "rb")
        os.utime(self.source, (5, 5))
        self.assertEqual(self.version(), "")
        write(self.byte_code[1], old)
        self.assertEqual(self.version(), "")
        self.assertNotEqual(read(self.byte_code[1], "rb"), old)
        self.assertIn("Usage of pydock:", self.run_installed("-h").out)

    def test_many_clients_make_byte_code_anew_at_once(self):
        os.utime(self.source, (7, 7))
        clients = [subprocess.Popen([self.program, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for _ in range(6)]
        self.assertEqual({client.communicate() for client in clients},
                         {(f"Pydock version {pydock.VERSION}\n".encode(), b"")})
        self.assertEqual(len(os.listdir(self.library)), 3)

    def test_the_umask_of_the_user_does_not_count(self):
        prefix = new_folder(self)
        result = run_program(["sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, PYDOCK, "install", "--prefix",
                              prefix])
        self.assertEqual(result.code, 0, result)
        self.assertEqual({stat.S_IMODE(os.stat(path).st_mode) for path in glob.glob(prefix + "/*/*")}, {0o755})
        self.assertEqual({stat.S_IMODE(os.stat(path).st_mode) for path in glob.glob(prefix + "/lib/pydock/*")}, {0o644})

    def test_closed_standard_streams(self):
        for redirection in ("<&-", ">&-", "2>&-", "<&- 2>&-", "<&- >&- 2>&-"):
            for program in (self.program, f"{sys.executable} {PYDOCK}"):
                result = run_program(["sh", "-c", f"{program} --version {redirection}; echo $?"])
                self.assertEqual((result.out.splitlines()[-1], result.err), ("0", ""), (program, redirection))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_output_that_cannot_be_written(self):
        for words in ("--version", "-h", "help"):
            result = run_program(["sh", "-c", f"{self.program} {words} >/dev/full"])
            self.assertEqual((result.code, result.err), (1, "No space left on device\n"), words)
        for words in ("-h", "help"):
            result = run_program(["bash", "-c", f"set -o pipefail; {self.program} {words} | true; echo $? >&2"])
            self.assertIn(result.err, ("141\n", "0\n"), words)  # 0: all was written before true had ended
        result = run_program(["sh", "-c", f"{self.program} nosuch 2>/dev/full"])
        self.assertEqual((result.code, result.err), (1, ""))

    def test_the_library_is_gone(self):
        os.rename(self.library, self.library + ".gone")
        self.addCleanup(shutil.rmtree, self.library + ".gone")
        result = self.run_installed("ps")
        self.assertEqual((result.code, result.out), (1, ""))
        self.assertEqual(result.err, f"pydock: {self.source}: No such file or directory: fetch pydock.py again and run "
                                     "`sudo python3 pydock.py install`\n")

    def test_prefixes(self):
        for prefix, sentence in (("/proc/nosuch", "/proc/nosuch"), ("relative", "use an absolute path"),
                                 (PYDOCK, f"Not a directory: {PYDOCK}/")):
            result = run_program([sys.executable, PYDOCK, "install", "--prefix", prefix])
            self.assertEqual((result.code, result.out), (1, ""), result)
            self.assertIn(sentence, result.err)
            self.assertEqual(result.err.count("\n"), 1, result)
        folder = new_folder(self)
        result = run_program([sys.executable, PYDOCK, "install", "--prefix", "/usr", "--destdir", folder])
        self.assertEqual(result.code, 0, result)
        self.assertIn("LIBRARY = os.fsdecode(b'/usr/lib/pydock')\n", read(folder + "/usr/bin/pydock"))

    @needs_program("make")
    def test_make_install(self):
        folder = new_folder(self)
        result = run_program(["make", "-C", HERE, "install", f"PYTHON={sys.executable}", f"PREFIX={folder}"])
        self.assertEqual(result.code, 0, result)
        self.assertEqual(sorted(os.listdir(folder)), ["bin", "lib"])
        self.assertEqual(run_program([folder + "/bin/pydock", "--version"]).out, f"Pydock version {pydock.VERSION}\n")

    def test_a_path_of_the_interpreter_with_a_blank(self):
        folder = new_folder(self, "with blank ")
        os.symlink(sys.executable, folder + "/python3")
        first_lines = pydock.interpreter_line(folder + "/python3")
        script = write(folder + "/script", first_lines + "\nimport sys\nprint(sys.flags.isolated, sys.argv[1:])\n")
        os.chmod(script, 0o755)
        self.assertEqual(run_program([script, "a b"]).out, "1 ['a b']\n")

    def test_all_that_a_client_calls_is_in_its_sections(self):
        """A name of another section is used only by commands that say so (all_sections), and below
        load_other_sections()."""
        tree, lines = ast.parse(read(PYDOCK)), read(PYDOCK).splitlines()
        title, section_of = "Prelude", {}
        for number, line in enumerate(lines, 1):
            match = re.match(r"# \d+\. (.+)$", line)
            title = match.group(1) if match and lines[number - 2].startswith("####") else title
            section_of[number] = title
        defined, uses = {}, {}
        for node in tree.body:
            for name in names_of(node):
                defined[name] = section_of[node.lineno]
                local = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                local |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
                uses.setdefault(name, set()).update({n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - local)
        # the roles that begin with load_other_sections()
        closed = {command.function.__name__ for command in pydock.COMMANDS.values() if command.all_sections}
        closed |= {"run_daemon", "daemon_usage", "start_daemon", "Daemon", "bind_listener", "execute_protected",
                   "read_only_file", "inherited_listeners", "_become_daemon", "_run_background", "serve"}
        todo = ["main"] + [command.function.__name__ for command in pydock.COMMANDS.values()]
        reached = set()
        while todo:
            name = todo.pop()
            if name not in reached and name not in closed and name in defined:
                reached.add(name)
                todo += uses[name]
        self.assertEqual({name: defined[name] for name in reached if defined[name] not in pydock.CLIENT_SECTIONS}, {})


@needs_root
class ProtectedInterpreterTest(unittest.TestCase):
    """CVE-2019-5736: what a container reaches as /proc/PID/exe of ours cannot be written, however we were started."""

    def is_protected(self, pid):
        return bool(os.statvfs(f"/proc/{pid}/exe").f_flag & os.ST_RDONLY)

    def test_whatever_the_program_is_called(self):
        folder = new_folder(self)
        for name in ("pydock", "pydock.py", "other.name"):
            program = shutil.copy(PYDOCK, os.path.join(folder, name))
            daemon = Daemon("called-" + name, image=False, program=program).start()
            self.addCleanup(daemon.cleanup)
            for pid in [daemon.process.pid, *descendants(daemon.process.pid)]:
                self.assertTrue(self.is_protected(pid), name)

    @needs_program("bash")
    def test_whatever_the_interpreter_is_called(self):
        daemon = Daemon("renamed", image=False)
        self.addCleanup(daemon.cleanup)
        daemon.command = functools.partial(lambda command: ["bash", "-c", 'exec -a foo "$@"', "bash"] + command(),
                                           daemon.command)
        daemon.start()
        self.assertTrue(self.is_protected(daemon.process.pid))

    def test_after_the_spawner_has_died(self):
        """The daemon executes itself anew: from the source, also where its folder is gone, and with its environment."""
        folder = new_folder(self)
        home = os.getcwd()
        os.chdir(folder)
        try:
            daemon = Daemon("reborn").start(HTTPS_PROXY="http://127.0.0.1:9")
        finally:
            os.chdir(home)
        self.addCleanup(daemon.cleanup)
        os.rename(folder, folder + ".gone")
        self.addCleanup(os.rename, folder + ".gone", folder)
        spawner = next(pid for pid, title in descendants(daemon.process.pid).items() if "spawner" in title)
        for path in glob.glob(daemon.root + "/pydock.*.pyc"):
            os.unlink(path)
        os.kill(spawner, signal.SIGKILL)
        eventually(lambda: any("spawner" in title for pid, title in descendants(daemon.process.pid).items()
                               if pid != spawner))
        eventually(lambda: daemon.api.get("/_ping").status == 200)
        answer = daemon.api.post("/images/create", fromImage="registry.example/x", tag="1")
        self.assertIn(b"connection refused", answer.body, "the daemon has forgotten its proxy: no such host")
        for pid in [daemon.process.pid, *descendants(daemon.process.pid)]:
            self.assertTrue(self.is_protected(pid))

    def test_a_daemon_that_cannot_be_protected_does_not_start(self):
        result = run_program([sys.executable, "-IS", PYDOCK, "-d", "-g", os.path.join(SCRATCH, "nowhere")],
                             PYDOCK_PROTECTED="1")
        self.assertEqual(result.code, 1)
        self.assertIn("CVE-2019-5736", result.err)
        self.assertFalse(os.path.exists(os.path.join(SCRATCH, "nowhere")))


class Command2013Test(DaemonCase):
    """The flags and forms of 2013 still work at pydock's command line; the output has today's columns."""

    def run_base(self, *words, code=0):
        return self.pydock("run", *words, code=code).out

    def test_run(self):
        cid = self.folder() + "/cid"
        self.assertEqual(self.run_base("-h", "name", "-e", "A=b", "-e=C=d", "-u", "daemon", "base", "sh", "-c",
                                       "hostname; id -un; echo $A$C"), "name\ndaemon\nbd\n")
        self.assertEqual(self.run_base("-cidfile", cid, "-v", "/data", "base", "sh", "-c", "echo kept > /data/f"), "")
        self.assertEqual(self.run_base("-volumes-from", read(cid), "base", "cat", "/data/f"), "kept\n")
        self.assertEqual(self.run_base("-entrypoint=/bin/echo", "base", "given"), "given\n")
        folder = self.folder(f="bound\n")
        self.assertEqual(self.run_base("-b", folder + ":/there", "base", "cat", "/there/f"), "bound\n")
        self.assertEqual(self.run_base("-n=false", "base", "ls", "/sys/class/net"), "lo\n")
        self.assertEqual(self.run_base("-n", "base", "ls", "/sys/class/net"), "eth0\nlo\n")
        self.assertEqual(self.run_base("-a", "stdout", "base", "sh", "-c", "echo out; echo err >&2"), "out\n")
        self.assertEqual(self.run_base("-a", "base", "echo", "all"), "all\n")
        self.assertIn("cannot specify both --attach and --detach",
                      self.pydock("run", "-d", "-a", "stdout", "base", code=1).err)
        limits = self.api.inspect(self.run_base("-d", "-m", "33554432", "-c", "77", "base",
                                                "true").strip())["HostConfig"]
        self.assertEqual((limits["Memory"], limits["CpuShares"]), (33554432, 77))

    def test_ports(self):
        own = free_port()
        container = self.run_base("-d", "-p", "8080", "-p", f":{own}", "-p", "53/udp", "base", "sleep", "600").strip()
        self.assertRegex(self.pydock("port", container, "8080").out, r"\A0\.0\.0\.0:49\d{3}\n")
        self.assertRegex(self.pydock("port", container, "53/UDP").out, r"\A0\.0\.0\.0:49\d{3}\n")
        self.assertIn(f"0.0.0.0:{own}\n", self.pydock("port", container, str(own)).out)
        self.assertEqual(self.pydock("port", container, "99", code=1).err,
                         f"Error: No public port '99' published for {container}\n")

    def test_ps(self):
        one, two, three = (self.run_base("-d", "base", "echo", "x" * 30).strip() for _ in range(3))
        for container in (one, two, three):
            self.pydock("wait", container)

        def ids(*words):
            return self.pydock("ps", "-q", "-notrunc", *words).out.split()
        self.assertEqual(ids(), [])
        self.assertEqual([ids("-a"), ids("-l"), ids("-n", "2"), ids("-n=-1")],
                         [[three, two, one], [three], [three, two], []])
        self.assertEqual([ids("-sinceId", one), ids("-beforeId=" + three), ids("-sinceId", one, "-beforeId", three)],
                         [[three, two], [two, one], [two]])
        self.assertIn(" 0B (virtual ", self.pydock("ps", "-l", "-s").out)
        self.assertIn(f'"echo {"x" * 30}"', self.pydock("ps", "-l", "-notrunc").out)

    def test_images(self):
        context = self.folder(Dockerfile="FROM base\nRUN echo one > /one\nCMD [\"cat\", \"/one\"]\n")
        self.pydock("build", "-q", "-no-cache", "-rm", "-t", "me/one", context)
        self.pydock("tag", "-f", "me/one", "me/two", "v2")
        self.assertEqual(*(self.pydock("images", "-q", "-notrunc", name).out for name in ("me/one", "me/two")))
        base, one = (self.api.ok("GET", f"/images/{name}/json")["Id"][7:19] for name in ("base", "me/one"))
        graph = self.pydock("images", "-viz").out
        self.assertTrue(graph.startswith("digraph docker {\n") and graph.endswith(" base [style=invisible]\n}\n"),
                        graph)
        self.assertIn(f' base -> "{base}" [style=invis]\n', graph)
        self.assertIn(f' "{one}" [label="{one}\\nme/one:latest\\nme/two:v2",shape=box,fillcolor="paleturquoise",',
                      graph)
        parents = dict(re.findall(r'^ "(\w+)" -> "(\w+)"$', graph, re.MULTILINE))
        self.assertEqual(parents[parents[base]], one)
        self.assertRegex(self.pydock("images", "-tree").out, fr"{base} Size: \S+ Tags: base:latest\n"
                         fr"(.*\n)?.*{one} Size: \S+ Tags: me/one:latest, me/two:v2")
        self.assertEqual(len(self.pydock("images", "-a").out.splitlines()),
                         1 + len(self.pydock("images").out.splitlines()))
        self.assertIn("echo one > /one", self.pydock("history", "-notrunc", "me/one").out)
        self.assertEqual(self.pydock("rmi", "me/two:v2").out, "Untagged: me/two:v2\n")

    def test_commit_import_insert_export(self):
        container = self.run_base("-d", "base", "sh", "-c", "echo made > /made").strip()
        self.pydock("wait", container)
        self.pydock("commit", "-m", "why", "-author", "me", "-run", '{"Cmd": ["cat", "/made"], "PortSpecs": ["80"]}',
                    container, "me/made", "v1")
        self.assertEqual(self.run_base("me/made:v1"), "made\n")
        image = self.api.ok("GET", "/images/me/made:v1/json")
        self.assertEqual((image["Author"], image["Comment"], image["Config"]["ExposedPorts"]),
                         ("me", "why", {"80/tcp": {}}))
        exported = self.pydock("export", container).raw
        files = Files({"/root.tar": (200, {}, exported)})
        self.addCleanup(files.close)
        self.pydock("import", files.url + "/root.tar", "me/root", "v2")
        self.assertEqual(self.run_base("me/root:v2", "cat", "/made"), "made\n")
        self.pydock("import", "-", "me/stdin", input=exported)
        made = self.pydock("insert", "me/root:v2", files.url + "/root.tar", "/kept.tar").out.split()[-1]
        self.assertEqual(self.run_base(made, "sh", "-c", "wc -c < /kept.tar").strip(), str(len(exported)))
        self.assertEqual(self.pydock("diff", container).out, "A /made\n")
        target = self.folder()
        self.pydock("cp", container + ":/made", target)
        self.assertEqual(read(target + "/made"), "made\n")

    def test_life(self):
        container = self.run_base("-d", "-i", "base", "cat").strip()
        self.assertEqual(self.pydock("top", container).out.split()[-1], "cat")
        for words in ("restart -t 0", "stop -t=0", "start", "kill"):
            self.assertEqual(self.pydock(*words.split(), container).out, container + "\n")
        self.assertEqual(self.pydock("wait", container).out, "137\n")
        self.assertIn(f'"ID": "{container}"', self.pydock("inspect", container).out.replace('"Id"', '"ID"'))
        self.assertIn("container kill " + container, self.pydock("events", "-since", "1h", "-until", "0s").out)
        self.assertEqual(self.pydock("rm", "-v", container).out, container + "\n")


class DaemonFlags2013Test(DaemonCase):
    """The daemon's flags -dns, -api-enable-cors and -H with a port. Every other test uses -b, -g and -p; -r and -D have
    tests of their own."""
    port = 0

    @classmethod
    def setUpClass(cls):
        cls.port = free_port()
        cls.flags = ("-dns", "192.0.2.53", "-api-enable-cors", "-H", f"tcp://127.0.0.1:{cls.port}")
        super().setUpClass()

    def test_servers_of_names(self):
        self.assertIn("nameserver 192.0.2.53\n", self.api.output("cat", "/etc/resolv.conf"))
        self.assertIn("nameserver 192.0.2.54\n",
                      self.pydock("run", "-dns", "192.0.2.54", "base", "cat", "/etc/resolv.conf").out)

    def test_answers_to_web_pages(self):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", "/version", headers={"Origin": "http://a.example"})
            answer = connection.getresponse()
            self.assertEqual((answer.status, answer.headers["Access-Control-Allow-Origin"]), (200, "*"))

    def test_a_client_by_its_port(self):
        for host in ("tcp://127.0.0.1:", "127.0.0.1:", ":", "tcp://:"):
            result = run_program([sys.executable, PYDOCK, f"-H={host}{self.port}", "images", "-q"])
            self.assertEqual((result.code, len(result.out)), (0, 13), result)


README = os.path.join(HERE, "README.md")


def readme_blocks(section):
    """The code blocks of a section of the README."""
    text = re.search(fr"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", read(README), re.DOTALL | re.MULTILINE).group(1)
    return re.findall(r"^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


class FreshMachine(unittest.TestCase):
    """pydock with all its default paths, in a mount and a network namespace where it has never run."""

    def fresh(self, body):
        """Run body() in a child where /var/lib, /var/log and /run are empty, and end the daemon that it has started. An
        exception in the child fails the test."""
        read_end, write_end = os.pipe()

        def child():
            os.close(read_end)
            try:
                pydock.unshare(pydock.NEWNS | pydock.NEWNET)
                with pydock.Netlink() as netlink:
                    netlink.set_link("lo", up=True)
                for path in ("/var/lib", "/var/log", os.path.realpath("/var/run")):
                    pydock.mount("tmpfs", path, "tmpfs")
                body()
            except BaseException:
                os.write(write_end, (traceback.format_exc() + self.log()).encode())
            finally:
                self.end_daemon()
        pid = pydock.fork(child)
        os.close(write_end)
        with open(read_end) as pipe:
            report = pipe.read()
        os.waitpid(pid, 0)
        if report:
            self.fail(report)

    @staticmethod
    def log():
        return read("/var/log/pydock.log") if os.path.exists("/var/log/pydock.log") else ""

    @staticmethod
    def end_daemon():
        """Remove all containers through the API, then end the daemon that the pid file names."""
        with contextlib.suppress(OSError, AssertionError):
            api = Api("/var/run/pydock.sock")
            for container in api.ok("GET", "/containers/json", all=1):
                api.delete("/containers/" + container["Id"], force=1)
            pid = int(read("/var/run/pydock.pid"))
            os.kill(pid, signal.SIGTERM)
            eventually(lambda: not is_alive(pid))

    def client(self, *words, **options):
        return run_program([sys.executable, PYDOCK] + list(words), **options)


@needs_root
class FreshMachineTest(FreshMachine):
    def test_hello_world_on_the_host_image(self):
        """The first command of the README, without a daemon: the client starts it."""
        def body():
            result = self.client("run", "--rm", "host", "echo", "Hello World")
            self.assertEqual((result.code, result.out), (0, "Hello World\n"), result)
            self.assertIn("/var/log/pydock.log", result.err)
            again = self.client("run", "--rm", "host", "sh", "-c", "ls /var/lib; cat /etc/hostname")
            self.assertEqual((again.code, again.err), (0, ""), again)
            self.assertNotIn("pydock\n", again.out.replace(os.uname().nodename, ""))
            self.assertEqual(stat.S_IMODE(os.stat("/var/run/pydock.sock").st_mode), 0o660)
        self.fresh(body)

    def test_walk_through_of_2013(self):
        """The commands of the document of 2013 (see SeedReplay), on the default bridge, with `python3 pydock.py` in
        place of `docker`."""
        def has(name):
            return shutil.which(name, path=pydock.DEFAULT_PATH) or shutil.which("busybox", path=pydock.DEFAULT_PATH)

        def body():
            daemon = subprocess.Popen([sys.executable, PYDOCK, "-d"], stdin=subprocess.DEVNULL,
                                      stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
            eventually(lambda: os.path.exists("/var/run/pydock.sock"), 30)
            self.assertEqual(self.client("mkimage", "base").code, 0)
            self.assertEqual(self.client("run", "base", "/bin/echo", "Hello", "World").out, "Hello World\n")
            names = [self.client("run", "base", "/bin/hostname").out.strip() for _ in range(2)]
            self.assertRegex(" ".join(names), "^[0-9a-f]{12} [0-9a-f]{12}$")
            self.assertNotEqual(*names)
            words, form = ("/sbin/ip", "addr"), r"inet 172\.16\.42\.(\d+)/24 brd 172\.16\.42\.255 scope global eth0"
            if not has("ip"):
                words, form = ("/bin/hostname", "-i"), r"^172\.16\.42\.(\d+)\s*$"
            addresses = [int(re.search(form, self.client("run", "base", *words).out).group(1)) for _ in range(3)]
            self.assertEqual(addresses, [addresses[0], addresses[0] + 1, addresses[0] + 2])
            terminal = Terminal([sys.executable, PYDOCK, "run", "-i", "-t", "base", "/bin/sh"])
            self.addCleanup(terminal.close)
            terminal.send("ps; exit 0\n")
            terminal.expect("sh\r\n" if has("ps") else "not found")
            self.assertEqual(terminal.wait(), 0)
            ident = self.client("run", "-i", "-t", "-d", "base", "/bin/sh").out.strip()
            listing = self.client("ps").out
            self.assertIn(ident[:12], listing)
            self.assertIn("/bin/sh", listing)
            self.assertTrue(any("monitor " + ident in title for _, _, title in processes().values()))
            terminal = Terminal([sys.executable, PYDOCK, "attach", ident[:12]])
            self.addCleanup(terminal.close)
            terminal.send("\n")
            terminal.expect("# ")
            terminal.send("echo still''here\n")
            terminal.expect("stillhere")
            terminal.send("\x10\x11")
            terminal.wait()
            self.assertEqual(self.client("inspect", "-f", "{{.State.Running}}", ident).out, "true\n")
            self.end_daemon()
            daemon.wait()
        self.fresh(body)

    @needs_program("busybox", "bash", "ip", "ps", "curl", "iptables")
    def test_readme(self):
        """All commands of the README in one script, except those that need a terminal: test_walk_through_of_2013 has
        those."""
        script = f'set -e; cd /var/lib; pydock() {{ {sys.executable} {PYDOCK} "$@"; }}\n'
        script += "curl() { for i in $(seq 200); do command curl -s $* && return; sleep 0.05; done; return 1; }\n"
        prepared = ("pydock mkimage busybox; pydock tag base base:1; "
                    "pydock commit $(pydock create base touch /x) base:2\n")
        for section, before in (("The walk-through of 2013", ""), ("Hosts without network", prepared),
                                ("Building", "")):
            for block in readme_blocks(section):
                lines = [line for line in block.split("\n")
                         if not re.match("sudo -s|alias |pydock (attach|run -i)", line)]
                script += before + "\n".join(lines) + "\n"

        def body():
            result = run_program(["bash", "-c", script + "\n".join(readme_blocks("What the host should have"))],
                                 timeout=120)
            self.assertEqual(result.code, 0, result)
            self.assertEqual((result.out.count("Hello World\n"), result.out.splitlines().count("Hello")), (3, 1),
                             result)
            self.assertRegex(result.out, r"DNAT .* tcp dpt:8080 to:172.16.42.\d+:80")
            self.assertIn("inet 172.16.42.", result.out)
            left = ("/var/lib/pydock", "/var/run/pydock.sock", "/var/run/pydock.pid")
            self.assertEqual([path for path in left if os.path.exists(path)], [])
        self.fresh(body)

    def test_an_installation_that_the_user_cannot_write_to(self):
        def body():
            python = sys.executable if os.stat(sys.executable).st_mode & 1 and is_open_to_all(sys.executable) else (
                "/usr/bin/python3")
            self.assertEqual(run_program([python, PYDOCK, "install", "--prefix", "/var/lib/installed"]).code, 0)
            byte_code = glob.glob("/var/lib/installed/lib/pydock/client.*")[0]
            os.unlink(byte_code)
            report, written = os.pipe()

            def nobody():
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                result = run_program(["/var/lib/installed/bin/pydock", "--version"], cwd="/", PYTHONPATH="")
                os.write(written, json.dumps([result.code, result.out, result.err]).encode())
            os.waitpid(pydock.fork(nobody), 0)
            os.close(written)
            with open(report) as pipe:
                code, out, err = json.load(pipe)
            self.assertEqual((code, out), (0, f"Pydock version {pydock.VERSION}\n"), err)
            self.assertRegex(err, "^running from source, which starts slowly: Permission denied: "
                                  r"/var/lib/installed/lib/pydock/others\.[a-z0-9.-]+\n$")
        self.fresh(body)

    def test_without_root(self):
        def body():
            shutil.copy(PYDOCK, "/var/lib/pydock.py")  # the user nobody may not be able to read the checkout
            read_end, write_end = os.pipe()

            def nobody():
                become_nobody()
                python = sys.executable if os.access(sys.executable, os.X_OK) else "/usr/bin/python3"
                result = run_program([python, "/var/lib/pydock.py", "ps"], cwd="/", PYTHONPATH="")
                os.write(write_end, f"{result.code} {result.err}".encode())
            os.waitpid(pydock.fork(nobody), 0)
            os.close(write_end)
            with open(read_end) as pipe:
                text = pipe.read()
            self.assertTrue(text.startswith("1 "), text)
            self.assertIn("pydock.py -d", text)
            self.assertNotIn("Traceback", text)
        self.fresh(body)


# -- the document of 2013, as typed ------------------------------------------------------------------------------------

# "The seed" is the document of 2013 from which this project has grown: what its author typed, and what docker printed.
# These substitutions take away what may differ before its text is compared with pydock's output: (pattern,
# replacement, whose text it is for: "seed", "ours" or "both").

SUBSTITUTIONS = tuple((re.compile(pattern, re.MULTILINE), becomes, whose) for pattern, becomes, whose in (
    (r"\x1b\[(\?2004[hl]|K)|\r", "", "both"),  # control sequences of today's bash
    (r"[ \t]+", " ", "both"), (r" $|^\n", "", "both"),
    (r"^WARNING: With the lxc driver .*\n?", "", "ours"),  # the warning that there is no job control
    # a misprint, and names of programs and sockets
    (r"Hellow", "Hello", "seed"), (r"/usr/local/bin/docker|\bdocker\b", "pydock", "seed"),
    (r"\bDOCKER\b", "PYDOCK", "seed"), (r"Build a container from", "Build an image from", "seed"),
    (r"tcp://127\.0\.0\.1:4243\]", "unix:///var/run/pydock.sock]", "seed"),
    # ids, ages, sizes, ports, addresses, pids
    (r"\b[0-9a-f]{64}\b|\b[0-9a-f]{12}\b", "ID", "both"),
    (r"\bUp (Less than a second|About an? \w+|\d+ \w+)", "Up AGE", "both"),
    (r"(Less than a second|About an? \w+|\d+ \w+) ago", "AGE ago", "both"),
    (r"\b\d[\d.]* ?[kMG]?B( \(virtual [^)]*\))?$|\b\d+ bytes$", "SIZE", "both"),
    (r"\b49\d{3}\b", "PORT", "both"), (r"\b172\.16\.42\.(?!0/|1\b|255\b)\d+", "172.16.42.N", "both"),
    # today's `ip` adds the index of a veth's peer to its name, and there is no queue
    (r"^\d+: eth0(@if\d+)?: <[A-Z_,-]+> mtu 1500 qdisc \w+ state \w+( group default)? qlen 1000$", "N: eth0: mtu 1500",
     "both"),
    # `ps aux` in a container, and the daemon's line in `ps aux`
    (r"^USER PID .* COMMAND$", "USER PID COMMAND", "both"),
    (r"^root (1|\d+) [\d.]+ [\d.]+ \d+ \d+ \S+ [A-Za-z+<]+ \S+ [\d:]+ ", r"root \1 ", "both"),
    (r"^root (?!1 )\d+ ", "root PID ", "both"),
    (r"(pydock -d).*", r"\1", "ours"),
    # `docker ps` of today: it adds NAMES, quotes, the address and the protocol of a port, and omits the image's tag
    (r"^CONTAINER ID (.*) NAMES$", r"ID \1", "ours"),
    (r'^(ID) (\S+) "([^"]*)" (.*) \w+_\w+$', r"\1 \2:latest \3 \4", "ours"),
    (r"\b0\.0\.0\.0:(PORT->\d+)/tcp(, \[::\]:PORT->\d+/tcp)?", r"\1", "ours"),
    (r"/usr/bin/nodejs /sr\S*", "/usr/bin/nodejs /sr...", "both"),
    (r"^REPOSITORY TAG IMAGE ID", "REPOSITORY TAG ID", "ours"),
    # `docker build` of today: it prints the number of steps and the removal of containers; another text for the context
    (r"^Uploading context SIZE", "Sending build context to the pydock daemon SIZE", "seed"),
    (r"^Step (\d+)/\d+ :", r"Step \1 :", "ours"),
    (r"^Removing intermediate container ID\n|^Successfully tagged .*\n", "", "ours"),
    # today's iptables and lsof; /etc/networks may have a name for 127.0.0.0
    (r"!(loopback|localhost)/8", "!127.0.0.0/8", "both"), (r"^(\w+) 0 -- ", r"\1 all -- ", "ours"),
    (r"^(\w+) 6 -- ", r"\1 tcp -- ", "ours"),
    (r"^(\S+) \d+ (?:\d+ \S+ )?root \d+u IPv4 \d+ 0t0 TCP", "PROGRAM root FD IPv4 TCP", "both"),
))


def normal(text, whose):
    """The lines of a text, "seed" or "ours", after SUBSTITUTIONS."""
    for pattern, becomes, side in SUBSTITUTIONS:
        text = pattern.sub(becomes, text) if side in (whose, "both") else text
    return text.strip("\n").split("\n")


STANDINS = {  # files of the image `base`, in place of those that the seed fetched from the network
    "apt-get": """#!/bin/sh
        case "$*" in
        update) mkdir -p /var/lib/apt/lists && echo lists > /var/lib/apt/lists/quantal ;;
        "install -q -y nodejs") cat /var/lib/apt/lists/quantal > /dev/null && cp /usr/share/nodejs /usr/bin/nodejs ;;
        *) exit 100 ;;
        esac
        """,
    "nodejs": f"#!{shutil.which('python3', path=pydock.DEFAULT_PATH)}\n" + r"""
        import http.server, re, sys
        with open(sys.argv[1]) as f:
            program = f.read()
        port = re.search(r"PORT = (\d+);", program).group(1)
        text = re.search(r"res\.end\('(.*)\\n'\)", program).group(1)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(text.encode() + b"\n")
        print("Running on port:" + port, flush=True)
        http.server.HTTPServer(("", int(port)), Handler).serve_forever()
        """,
    "bash.bashrc": r"""PS1='\u@\h:\w\$ '
        """,
    "Dockerfile": """FROM programs
        COPY apt-get /usr/bin/
        COPY nodejs /usr/share/
        COPY bash.bashrc /etc/
        """,
}
APP_JS = """var PORT = 8080;
var server = require('http').createServer(function(req, res){
  res.end('Hello World\\n');
});
server.listen(PORT)
console.log('Running on port:' + PORT);
"""
# The seed's Dockerfile, without its proxy, and with the ADD that the seed's build output shows: a path of the context.
DOCKERFILE_2013 = """FROM    base
RUN     apt-get update
RUN     apt-get install -q -y nodejs

ADD     . /src
EXPOSE  8080
CMD     ["/usr/bin/nodejs", "/src/app.js"]
"""


class SeedReplay:
    """Type the commands of the seed, line by line, on a machine where pydock has never run; after SUBSTITUTIONS the
    output must be what the seed shows. `docker` and `sudo` are scripts on the PATH. A subclass sets `flags` of the
    daemon, and `host_processes`, a pattern for the lines of the host's `ps` about a container."""
    flags, host_processes = "", ""

    def test_replay(self):
        self.folder = tempfile.mkdtemp(dir=SCRATCH)
        self.addCleanup(shutil.rmtree, self.folder)
        self.path = f"{self.folder}/bin:{pydock.DEFAULT_PATH}"
        write(self.folder + "/bin/docker", f'#!/bin/sh\nexec {sys.executable} {PYDOCK} "$@"\n', 0o755)
        write(self.folder + "/bin/sudo", '#!/bin/sh\nexec "$@"\n', 0o755)
        self.fresh(self._replay)

    def _replay(self):
        registry = RealRegistry(self.folder)
        daemon = subprocess.Popen(["sh", "-c", f"exec docker -d --registry-mirror=http://{registry.host} {self.flags}"],
                                  stdin=subprocess.DEVNULL, stderr=open("/var/log/pydock.log", "ab"),
                                  env=dict(ENVIRONMENT, PATH=self.path))
        try:
            eventually(lambda: os.path.exists("/var/run/pydock.sock"), 30)
            self._fill(registry)
            for part in ("first_commands", "shell", "background", "build", "curtain", "images", "usage"):
                getattr(self, "_" + part)()
        finally:
            self.end_daemon()
            daemon.wait()
            registry.close()

    def _fill(self, registry):
        """Push the image library/base to the registry with all tags that the seed lists, and remove it locally."""
        for name, text in STANDINS.items():
            write(f"{self.folder}/base/{name}", re.sub(r"^ {8}", "", text, flags=re.MULTILINE), 0o755)
        self.typed("docker mkimage programs bash sh echo hostname ip ps ls cat sleep mkdir cp python3")
        self.typed(f"docker build -q -t base {self.folder}/base")
        for tag in ("latest", "ubuntu-12.10", "ubuntu-quantal", "ubuntu-quantl"):
            name = f"{registry.host}/library/base:{tag}"
            self.typed(f"docker tag base {name} && docker push -q {name} && docker rmi {name}")
        self.typed("docker rmi base programs")
        self.assertEqual(self.typed("docker images -q -a").out, "")

    def typed(self, line, seed="", within=False, cwd=None):
        """Type a line, which must succeed, and compare its output with the seed's text, if there is one: see same."""
        result = run_program(["sh", "-c", line], PATH=self.path, cwd=cwd or self.folder)
        self.assertEqual((result.code, normal(result.err if "docker" in line else "", "ours")), (0, [""]), result)
        if seed:
            self.same(seed, result.out, within)
        return result

    def same(self, seed, ours, within=False):
        """Compare the seed's text with our output; `within`: the seed's lines must be in the output, in this order."""
        expected, actual = normal(seed, "seed"), normal(ours, "ours")
        if within:
            rest = iter(actual)
            for line in expected:
                self.assertIn(line, rest, f"{line!r} is missing, or not in its place, in {actual}")
        else:
            self.assertEqual(actual, expected)

    def _first_commands(self):
        self.typed("ps aux | grep 'docker -d\\|pydock -d'",
                   "root      3409  0.0  0.1 273064  5064 ?        Ssl  07:40   0:00 /usr/local/bin/docker -d",
                   within=True)
        self.typed("docker pull base")
        self.typed("docker run base /bin/echo Hello World", "Hellow World")
        names = [self.typed("docker run base /bin/hostname", seed).out for seed in ("550cf7ca6e98", "f2aa47f6ea1c")]
        self.assertNotEqual(*names)
        first = self.address()
        self.assertEqual([self.address(), self.address()], [first + 1, first + 2])

    def address(self):
        """Run a container and return the last number of its address."""
        out = self.typed("docker run base /sbin/ip addr | grep eth0", """
21: eth0: <NO-CARRIER,BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1500 qdisc pfifo_fast state DOWN qlen 1000
    inet 172.16.42.7/24 brd 172.16.42.255 scope global eth0
""").out
        return int(re.search(r"172\.16\.42\.(\d+)/", out).group(1))

    def terminal(self, line):
        terminal = Terminal(["sh", "-c", line], PATH=self.path, size=(24, 200))
        self.addCleanup(terminal.close)
        return terminal

    PROCESSES = """USER       PID %CPU %MEM    VSZ   RSS TTY      STAT START   TIME COMMAND
root         1  0.1  0.0  18056  1940 ?        S    04:23   0:00 /bin/bash
root        17  0.0  0.0  15528  1124 ?        R+   04:23   0:00 ps aux
"""

    def ask_for_processes(self, terminal, seed):
        """Wait for the prompt that the seed shows and type `ps aux`: the container sees only its own processes."""
        self.same(seed, terminal.expect("/# "))
        terminal.send("ps aux\n")
        # the echo of the typed line comes first, and twice if bash was not ready yet
        header = terminal.expect("COMMAND\r\n").splitlines()[-1]
        self.same(self.PROCESSES + seed, header + "\n" + terminal.expect("/# "))

    def _shell(self):
        terminal = self.terminal("docker run -i -t base /bin/bash")
        self.ask_for_processes(terminal, "root@b51e604d11b6:/#")
        terminal.send("exit\n")
        self.assertEqual(terminal.wait(), 0)

    def _background(self):
        ident = self.typed("sudo docker run -i -t -d base /bin/bash", "4774e1bbbd18").out.strip()
        self.typed("docker ps", """
ID                  IMAGE               COMMAND             CREATED              STATUS              PORTS
4774e1bbbd18        base:latest         /bin/bash           About a minute ago   Up About a minute
""")
        self.assertRegex(self.typed("ps auxww | grep bash; ps auxww | grep " + ident).out,
                         self.host_processes.replace("ID", ident))
        terminal = self.terminal("docker attach " + ident[:12])
        terminal.send("\n")
        self.ask_for_processes(terminal, "root@4774e1bbbd18:/#")
        terminal.send("\x10\x11")
        terminal.wait()
        self.same("4774e1bbbd18 base:latest /bin/bash AGE ago Up About a minute", self.typed("docker ps").out,
                  within=True)
        self.typed("docker stop -t 0 " + ident)

    def _build(self):
        app = self.folder + "/nodeapp"
        write(app + "/app.js", APP_JS)
        write(app + "/Dockerfile", DOCKERFILE_2013)
        self.typed("docker build -t yssk22/node-hello .", """
Uploading context 10240 bytes
Step 1 : FROM base
 ---> b750fe79269d
Step 2 : RUN apt-get update
 ---> Running in 9b336a266d7c
 ---> 64bcd9d40c26
Step 3 : RUN apt-get install -q -y nodejs
 ---> Running in 3554ed296982
 ---> aa27b6706638
Step 4 : ADD . /src
 ---> 659e961143c5
Step 5 : EXPOSE 8080
 ---> Running in b7af7365a58c
 ---> 5b6e9916cc39
Step 6 : CMD ["/usr/bin/nodejs", "/src/app.js"]
 ---> Running in fcfdd87a6b97
 ---> c01203ff6be0
Successfully built c01203ff6be0
""", cwd=app)
        self.typed("docker pull -a -q base")  # in 2013 `pull base` pulled all tags
        rows = normal("""
REPOSITORY          TAG                 ID                  CREATED              SIZE
base                latest              b750fe79269d        3 months ago         24.65 kB (virtual 180.1 MB)
base                ubuntu-12.10        b750fe79269d        3 months ago         24.65 kB (virtual 180.1 MB)
base                ubuntu-quantal      b750fe79269d        3 months ago         24.65 kB (virtual 180.1 MB)
base                ubuntu-quantl       b750fe79269d        3 months ago         24.65 kB (virtual 180.1 MB)
yssk22/node-hello   latest              c01203ff6be0        About a minute ago   12.29 kB (virtual 309.8 MB)
""", "seed")
        self.assertEqual(sorted(normal(self.typed("docker images").out, "ours")), sorted(rows))

    def _curtain(self):
        """The command needs -P: since 2013 a port that an image exposes is not published by itself any more."""
        ident = self.typed("docker run -d -P yssk22/node-hello", "923c56817dac").out.strip()
        listing = self.typed("docker ps", """
ID                  IMAGE                      COMMAND                CREATED             STATUS              PORTS
344d6d56fb46        yssk22/node-hello:latest   /usr/bin/nodejs /src   2 seconds ago       Up 1 seconds    49167->8080
""").out
        port = re.search(r":(49\d+)->8080", listing).group(1)
        eventually(lambda: "Running on port:8080" in self.typed("docker logs " + ident).out)
        self.typed(f"curl -s http://localhost:{port}/", "Hello World")
        self.typed("netstat -an | grep " + port,
                   "tcp        0      0 127.0.0.1:49167         0.0.0.0:*               LISTEN", within=True)
        self.typed("sudo lsof | grep " + port,
                   "docker    1362        root   16u     IPv4              18332      0t0        TCP "
                   "localhost:49167 (LISTEN)", within=True)
        self.typed("sudo iptables -t nat -L", """
Chain PREROUTING (policy ACCEPT)
target     prot opt source               destination
DOCKER     all  --  anywhere             anywhere             ADDRTYPE match dst-type LOCAL
Chain INPUT (policy ACCEPT)
target     prot opt source               destination
Chain OUTPUT (policy ACCEPT)
target     prot opt source               destination
DOCKER     all  --  anywhere            !127.0.0.0/8          ADDRTYPE match dst-type LOCAL
Chain POSTROUTING (policy ACCEPT)
target     prot opt source               destination
MASQUERADE  all  --  172.16.42.0/24      !172.16.42.0/24
Chain DOCKER (2 references)
target     prot opt source               destination
DNAT       tcp  --  anywhere             anywhere             tcp dpt:49153 to:172.16.42.6:8080
""", within=True)
        self.assertEqual(self.typed(f"docker port {ident} 8080").out.splitlines()[0], "0.0.0.0:" + port)
        self.typed("docker kill " + ident)

    def _images(self):
        """The commands commit, diff and history, as the seed describes them."""
        ident = self.typed("docker run -d base /bin/mkdir /made").out.strip()
        self.typed("docker wait " + ident)
        self.assertEqual(self.typed("docker diff " + ident).out, "A /made\n")
        self.typed(f"docker commit -m made -run '{{\"Cmd\": [\"/bin/ls\", \"-d\", \"/made\"]}}' {ident} me/made v1")
        self.assertEqual(self.typed("docker run me/made:v1").out, "/made\n")
        history = self.typed("docker history yssk22/node-hello").out.splitlines()
        for line, part in zip(history[1:], ("/usr/bin/nodejs", "EXPOSE", "ADD", "install -q -y nodejs",
                                            "apt-get update")):
            self.assertIn(part, line)

    def _usage(self):
        self.typed("docker -h", """
Usage of docker:
  -D=false: Debug mode
  -H=[tcp://127.0.0.1:4243]: tcp://host:port to bind/connect to or unix://path/to/socket to use
  -api-enable-cors=false: Enable CORS requests in the remote api.
  -b="": Attach containers to a pre-existing network bridge
  -d=false: Daemon mode
  -dns="": Set custom dns servers
  -g="/var/lib/docker": Path to graph storage base dir.
  -p="/var/run/docker.pid": File containing process PID
  -r=false: Restart previously running containers
""", within=True)
        for line in ("docker", "docker help"):
            self.typed(line, """
Usage: docker [OPTIONS] COMMAND [arg...]
Commands:
    attach    Attach to a running container
    build     Build a container from a Dockerfile
""", within=True)


@needs_root
@needs_program("docker-registry", "iptables", "netstat", "lsof", "curl")
class SeedTest(SeedReplay, FreshMachine):
    host_processes = r"(?s) /bin/bash\n.* pydock: monitor ID\n"


@needs_root
@needs_program("docker-registry", "iptables", "netstat", "lsof", "curl", "lxc-start")
class SeedByLxcTest(SeedReplay, FreshMachine):
    flags, host_processes = "--exec-driver lxc", r" lxc-start .*-n ID .*config\.lxc .*-- /bin/bash\n"


def names_of(node):
    """The names that a statement at the top of the module defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    return [name.id for target in getattr(node, "targets", ()) for name in ast.walk(target)
            if isinstance(name, ast.Name)]


########################################################################
# The source itself
########################################################################

class SourceTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.text = read(PYDOCK)
        cls.tree = ast.parse(cls.text)
        cls.lines = cls.text.splitlines()

    def calls(self):
        """(line, dotted name of the called function, node) of all calls in the source."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                parts, target = [], node.func
                while isinstance(target, ast.Attribute):
                    parts.append(target.attr)
                    target = target.value
                if isinstance(target, ast.Name):
                    yield node.lineno, ".".join(reversed(parts + [target.id])), node

    def function_of(self, line):
        """The name of the innermost function around a line, or None."""
        around = [f for f in ast.walk(self.tree) if isinstance(f, ast.FunctionDef) and f.lineno <= line <= f.end_lineno]
        return max(around, key=lambda f: f.lineno).name if around else None

    def test_one_fork(self):
        forks = [(name, self.function_of(line)) for line, name, _ in self.calls()
                 if name in ("os.fork", "os.forkpty", "pty.fork", "os.posix_spawn")]
        self.assertEqual(forks, [("os.fork", "fork")])

    def test_no_forbidden_calls(self):
        forbidden = {"eval", "exec", "os.system", "os.popen", "tempfile.mktemp", "pickle.load", "pickle.loads",
                     "marshal.loads", "os.chroot"}
        violations = [(line, name) for line, name, call in self.calls()
                      if name in forbidden or name.endswith(".extractall")
                      or any(k.arg == "shell" and not (isinstance(k.value, ast.Constant) and k.value.value is False)
                             for k in call.keywords)
                      or any(k.arg == "preexec_fn" for k in call.keywords)]
        self.assertEqual(violations, [])

    def test_only_the_standard_library(self):
        for node in ast.walk(self.tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in (name.split(".")[0] for name in names):
                spec = importlib.util.find_spec(name)
                if spec is None:
                    self.assertEqual(name, "compression", f"line {node.lineno}")  # a package since Python 3.14
                else:
                    self.assertNotIn("-packages", spec.origin or "", f"line {node.lineno}")

    def sections(self):
        """[(number, title, line of the banner)] of the sections."""
        sections = []
        for number, line in enumerate(self.lines, 1):
            match = re.match(r"# (\d+)\. (.+)$", line)
            if match and self.lines[number - 2].startswith("####") and self.lines[number].startswith("####"):
                sections.append((int(match.group(1)), match.group(2), number))
        return sections

    def test_sections_are_numbered_and_as_in_the_table_of_contents(self):
        sections = self.sections()
        self.assertEqual([number for number, _, _ in sections], list(range(1, len(sections) + 1)))
        contents = re.findall(r"^ +(\d+)\. (\S.*?)  ", ast.get_docstring(self.tree, clean=False), re.MULTILINE)
        self.assertEqual(contents, [(str(number), title) for number, title, _ in sections])

    def test_a_section_uses_only_what_stands_above(self):
        """Code that runs at import could not use a later section's names; functions do not use them either, so that the
        file can be read from top to bottom."""
        starts = [line for _, _, line in self.sections()]

        def section(line):
            return sum(start <= line for start in starts)
        defined = {}
        for node in self.tree.body:
            for name in names_of(node):
                defined.setdefault(name, section(node.lineno))
        wrong = []
        for top in self.tree.body:
            local = {n.id for n in ast.walk(top) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            local |= {a.arg for a in ast.walk(top) if isinstance(a, ast.arg)}
            for node in ast.walk(top):
                if (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in local
                        and defined.get(node.id, 0) > section(node.lineno)):
                    wrong.append(f"line {node.lineno}: {node.id} of section {defined[node.id]}")
        self.assertEqual(wrong, [])

    def test_texts_are_formatted_by_f_strings(self):
        wrong = [node.lineno for node in ast.walk(self.tree)
                 if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod)
                 and isinstance(node.left, (ast.Constant, ast.JoinedStr)) and not isinstance(
                     getattr(node.left, "value", ""), bytes)]
        self.assertEqual(wrong, [])

    def test_values_are_called_what_they_are(self):
        house_words = {"found", "there", "said", "kept", "wanted", "shown", "wish", "wishes", "here", "most",
                       "least", "told"}
        names = [(node.id, node.lineno) for node in ast.walk(self.tree)
                 if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        names += [(argument.arg, argument.lineno) for node in ast.walk(self.tree) if isinstance(node, ast.arguments)
                  for argument in node.args + node.kwonlyargs]
        self.assertEqual([name for name in names if name[0] in house_words or name[0].startswith("MOST_")], [])

    def test_a_name_that_another_section_uses_has_no_underscore(self):
        starts = [line for _, _, line in self.sections()]

        def section(line):
            return sum(start <= line for start in starts)
        defined = {name: section(node.lineno) for node in self.tree.body for name in names_of(node) if name[0] == "_"}
        uses = {(node.id, section(node.lineno)) for node in ast.walk(self.tree)
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in defined}
        self.assertEqual(sorted(name for name, where in uses if where != defined[name]), [])

    def test_tasks_that_are_asked_for_exist(self):
        """A child's work is asked for by the name of its function."""
        named = {node.args[0].value for _, name, node in self.calls() if re.search(r"spawner\.(run|begin)$", name)
                 and node.args and isinstance(node.args[0], ast.Constant)}
        self.assertGreater(len(named), 10)
        self.assertEqual(named - set(pydock.TASKS), set())

    def section_titles(self):
        """[(title of its section, node)] of the statements at the top of the module."""
        sections = self.sections()
        return [(next((title for _, title, line in reversed(sections) if line <= node.lineno), "Head"), node)
                for node in self.tree.body]

    def string_keys(self):
        """(title, "reads" or "writes", key, whether the dict is a spec for sure) of each use of a text as a dict's
        key."""
        def is_spec(node, title):
            while isinstance(node, ast.Subscript):  # also what a spec holds: spec["lxc"]["run"]
                node = node.value
            name = getattr(node, "id", getattr(node, "attr", ""))
            return name == "spec" or (name == "entry" and title in ("Sandbox", "LXC", "Monitor"))  # one of the mounts

        for title, top in self.section_titles():
            makes_spec = getattr(top, "name", "") in ("process_spec", "init_spec", "lxc_spec", "spec_mount")
            for node in ast.walk(top):
                if isinstance(node, ast.Subscript):
                    key = getattr(node.slice, "value", node.slice)  # Python 3.8 has an Index around the constant
                    how = "reads" if isinstance(node.ctx, ast.Load) else "writes"
                    yield title, how, getattr(key, "value", key), is_spec(node.value, title)
                elif isinstance(node, ast.Compare):  # "key" in spec
                    yield title, "reads", getattr(node.left, "value", None), is_spec(node.comparators[0], title)
                elif isinstance(node, ast.Dict):
                    for key in node.keys:
                        yield title, "writes", getattr(key, "value", None), makes_spec
                elif isinstance(node, ast.Call):
                    method = getattr(node.func, "attr", getattr(node.func, "id", ""))
                    if method in ("get", "pop") and node.args:
                        yield (title, "reads", getattr(node.args[0], "value", None),
                               is_spec(getattr(node.func, "value", None), title))
                    elif method in ("update", "dict"):
                        for keyword in node.keywords:
                            yield (title, "writes", keyword.arg,
                                   method == "update" and is_spec(getattr(node.func, "value", None), title))

    def test_the_table_of_the_spec(self):
        """SPEC_KEYS names every key of the spec, and the sections that write and read it are those that it names."""
        rows = [[cell.strip() for cell in line.split("|", 3)]
                for line in pydock.SPEC_KEYS.splitlines() if line.count("|") >= 3][1:]
        self.assertEqual(len({key for key, *_ in rows}), len(rows))
        table = {(title, how, key.rpartition(".")[2]) for key, writers, readers, _ in rows
                 for how, titles in (("writes", writers), ("reads", readers)) for title in titles.split(", ")}
        titles = {title for title, _, _ in table}
        self.assertEqual(titles - {title for _, title, _ in self.sections()}, set())
        uses = [use for use in self.string_keys() if use[0] in titles and isinstance(use[2], str)]
        self.assertEqual(sorted(table - {use[:3] for use in uses}), [], "rows that are not true")
        self.assertEqual(sorted({use[:3] for use in uses if use[3]} - table), [], "keys without a row")

    def test_names_are_defined_once(self):
        names = [name for node in self.tree.body for name in names_of(node)]
        self.assertEqual(sorted({name for name in names if names.count(name) > 1}), [])
        for top in self.tree.body:
            if isinstance(top, ast.ClassDef):
                methods = [node.name for node in top.body if isinstance(node, ast.FunctionDef) and not any(
                    isinstance(d, ast.Attribute) for d in node.decorator_list)]
                self.assertEqual(sorted({name for name in methods if methods.count(name) > 1}), [], top.name)

    def test_no_bare_except_and_no_exit_below_main(self):
        bare = [node.lineno for node in ast.walk(self.tree)
                if isinstance(node, ast.ExceptHandler) and node.type is None]
        self.assertEqual(bare, [])
        exits = [line for line, name, _ in self.calls() if name in ("sys.exit", "exit", "quit")
                 and self.function_of(line) is not None]
        self.assertEqual(exits, [])

    def test_lines_and_characters(self):
        for path, longest in ((PYDOCK, 120), (os.path.abspath(__file__), 120)):
            text = read(path)
            self.assertEqual([n for n, line in enumerate(text.splitlines(), 1)
                              if len(line) > longest or line != line.rstrip() or "\t" in line], [], path)
            self.assertTrue(text.endswith("\n") and not text.endswith("\n\n"))

    def test_it_compiles_as_python_3_8(self):
        for path in (PYDOCK, os.path.abspath(__file__)):
            ast.parse(read(path), path, feature_version=(3, 8))

    def test_functions_fit_on_a_screen(self):
        lengths = {f.name: f.end_lineno - f.lineno + 1 for f in ast.walk(self.tree) if isinstance(f, ast.FunctionDef)}
        self.assertEqual({name: length for name, length in lengths.items() if length > 75}, {})

    def test_what_the_client_imports(self):
        for words in (["run", "--rm", "x", "true"], ["ps"], ["exec", "x", "true"]):
            result = run_program([sys.executable, "-IS", "-X", "importtime", installed_program(), "-H",
                                  "unix:///nosuch/socket", *words])
            self.assertIn("Is the daemon running?", result.err)
            imported = {line.rpartition("|")[2].strip() for line in result.err.splitlines()
                        if line.startswith("import time:")}
            heavy = {"http", "tarfile", "ssl", "email", "ctypes", "subprocess", "hashlib", "asyncio", "logging"}
            self.assertEqual({name for name in imported if name.split(".")[0] in heavy}, set(), words)
            self.assertIn("json", imported, "the names of the modules are read from the output")

    def test_help_of_every_command(self):
        commands = ("run", "ps", "network create", "import", "mkimage")
        for words in [["--help"], ["-h"], ["help"]] + [name.split() + ["--help"] for name in commands]:
            result = run_program([installed_program()] + words)
            self.assertEqual((result.code, "sage" in result.out + result.err), (0, True), result)
        for name in pydock.COMMANDS:
            self.assertIn(name.split()[-1], pydock.command_help(name, pydock.COMMANDS[name]))


########################################################################
# A fresh machine (make vm)
########################################################################

# `python3 test_pydock.py vm` boots virtual machines that have only a minimal Debian and Python, with the program that
# BOX names (`box` explains itself), and runs the classes In... of this section inside these machines. CutTest cuts the
# power of a machine.
BOX = os.environ.get("BOX") or os.path.join(HERE, "..", "shared", "vm", "box")
# making the machines takes two minutes, so this folder keeps them for the next run
MACHINES = os.environ.get("MACHINES") or os.path.join(tempfile.gettempdir(), "vm")
LOG = "/var/log/pydock.log"
CGROUP = "/sys/fs/cgroup"


class MachineCase(unittest.TestCase):
    """Base of the tests that `make test` does not run."""


@unittest.skipUnless(os.path.exists(BOX), "needs the program `box` (BOX names it)")
@needs_root
class MachineTest(MachineCase):
    """Runs outside the machines: each test boots one machine."""

    @staticmethod
    def machine(name, *flags):
        """The folder of a machine, which is made if it does not exist yet."""
        folder = os.path.join(MACHINES, name)
        os.makedirs(MACHINES, mode=0o700, exist_ok=True)
        if os.lstat(MACHINES).st_uid or not os.path.isdir(MACHINES):
            raise AssertionError(f"{MACHINES} is not root's: name another folder with MACHINES")
        if not os.path.exists(os.path.join(folder, "initrd.gz")):
            made = run_program([sys.executable, BOX, "make", folder] + list(flags), timeout=900)
            assert made.code == 0, made
        return folder

    def boot(self, folder, *words, timeout=400):
        return run_program([sys.executable, BOX, "run", folder, "--timeout", str(timeout)] + list(words),
                           timeout=timeout + 60)

    def run_inside(self, folder, *classes):
        with tempfile.TemporaryDirectory(dir=SCRATCH) as put:
            for path in (PYDOCK, os.path.abspath(__file__)):
                shutil.copy(path, put)
            result = self.boot(folder, "--put", put, "--", "python3", os.path.basename(__file__), "inside", *classes)
        sys.stderr.write("\n" + result.out)
        self.assertEqual(result.code, 0, "see above" if "Ran" in result.out else result)

    def test_standard_machine(self):
        self.run_inside(self.machine("std"), "InStandardMachine")

    def test_lxc_machine(self):
        self.run_inside(self.machine("lxc", "--with", "python3,iproute2,nftables,curl,procps,lxc"), "InLxcMachine")

    def test_bare_machine(self):
        self.run_inside(self.machine("bare", "--with", "python3"), "InBareMachine", "InPoorMachine")


# -- inside ------------------------------------------------------------------------------------------------------------

class Inside(MachineCase):
    """Runs inside a machine, as root, with the daemon that the first command has started. The order of the tests does
    not matter."""

    def setUp(self):
        self.log_start = os.path.getsize(LOG)
        self.addCleanup(self._tidy)

    def _tidy(self):
        client = pydock.Client()
        for container in client.get("containers", "json", all=1):
            client.delete("containers", container["Id"], force=1, v=1)
        self.assertNotIn("Traceback", read(LOG)[self.log_start:])

    @staticmethod
    def argv(*words):
        return [installed_program()] + list(words)

    def pydock(self, *words, code=0, **options):
        result = run_program(self.argv(*words), **options)
        self.assertEqual(result.code, code, result)
        self.assertNotIn("Traceback", result.err)
        return result

    def inspect(self, name, template):
        return self.pydock("inspect", "--format", template, name).out.strip()

    @staticmethod
    def fetch(address, port):
        """The body of a web server's answer; "" where nobody answers."""
        return fetch(address, port, "/") or ""

    def web(self, name, *options):
        """Run a container with a web server on port 80 that answers with its name, and return its id."""
        script = ("import http.server as h, sys\nclass Handler(h.BaseHTTPRequestHandler):\n def do_GET(self):\n"
                  "  self.send_response(200); self.end_headers(); self.wfile.write(sys.argv[1].encode())\n"
                  "h.ThreadingHTTPServer(('', 80), Handler).serve_forever()")
        return self.pydock("run", "-d", "--name", name,
                           *(options + ("host", "python3", "-c", script, name))).out.strip()

    def restart_daemon(self):
        """Kill the daemon with SIGKILL; the next command starts another one."""
        os.kill(int(read("/var/run/pydock.pid")), signal.SIGKILL)
        eventually(lambda: run_program(self.argv("ps")).code == 0, 60)


def warnings_of(log):
    """The texts of the warnings in a daemon's log."""
    return [line.split(" warning ", 1)[1] for line in log.splitlines() if " warning " in line]


class AnyMachine:
    """The tests that every fresh machine must pass. `expected_warnings` has a part of each warning of the daemon."""
    expected_warnings = ()

    @classmethod
    def setUpClass(cls):
        with pydock.Netlink() as netlink:
            netlink.set_link("lo", up=True)  # a machine without `ip` has not done that
            netlink.add_address("lo", "192.0.2.7/32")
            netlink.run()
        cls.first = run_program([sys.executable, PYDOCK, "run", "--rm", "host", "echo", "Hello World"], timeout=180)
        cls.first_log = read(LOG)
        assert run_program(cls.argv("mkimage", "base"), timeout=180).code == 0

    def test_first_command(self):
        self.assertEqual((self.first.code, self.first.out), (0, "Hello World\n"), self.first)
        started, hint = self.first.err.splitlines()
        self.assertTrue(started.startswith("no daemon was running: one is started in the background"), self.first)
        self.assertIn("python3 pydock.py install", hint)
        self.assertIn(LOG, started)
        self.assertEqual(self.pydock("run", "--rm", "host", "echo", "Hello World").err, "")

    def test_warnings(self):
        """Each thing that is missing gives one clear warning, in the log and in `info`, and there are no others."""
        warnings = warnings_of(self.first_log)
        self.assertEqual(len(warnings), len(self.expected_warnings), warnings)
        for sentence, part in zip(warnings, self.expected_warnings):
            self.assertIn(part, sentence)
        self.assertEqual(json.loads(self.pydock("info", "--format", "{{json .Warnings}}").out) or [], warnings)

    def test_default_bridge(self):
        with pydock.Netlink() as netlink:
            self.assertIn("172.16.42.1", [a["address"] for a in netlink.addresses("pydock0")])
        first, second = (self.pydock("run", "-d", "base", "sleep", "1000").out.strip() for _ in range(2))
        a, b = (self.inspect(name, "{{.NetworkSettings.IPAddress}}") for name in (first, second))
        self.assertRegex(a, r"^172\.16\.42\.\d+$")
        self.assertEqual(int(b.split(".")[3]), int(a.split(".")[3]) + 1)

    def test_published_port(self):
        def answers():
            return [self.fetch(address, 8080) for address in ("127.0.0.1", "172.16.42.1", "192.0.2.7")]
        self.web("web", "-p", "8080:80")
        eventually(lambda: self.fetch("127.0.0.1", 8080) == "web", 60)
        self.assertEqual(answers(), ["web"] * 3)
        os.kill(int(read("/var/run/pydock.pid")), signal.SIGKILL)
        self.assertEqual(answers(), ["web"] * 3, "no daemon is needed")
        self.assertIn("0.0.0.0:8080->80/tcp", self.pydock("ps").out)
        self.assertEqual(answers(), ["web"] * 3)
        self.assertIn("8080", self.pydock("run", "--rm", "-p", "8080:80", "base", "true", code=125).err)
        self.pydock("rm", "-f", "web")
        self.assertEqual(answers(), [""] * 3)

    def test_memory_limit(self):
        script = ("print(open('/sys/fs/cgroup/memory.max').read().strip(), flush=True); bytearray(400 << 20); "
                  "print('not killed')")
        result = self.pydock("run", "--name", "hungry", "-m", "64m", "host", "python3", "-c", script, code=137)
        self.assertEqual((result.out, result.err), ("67108864\n", ""))
        self.assertEqual(self.inspect("hungry", "{{.State.OOMKilled}} {{.State.ExitCode}}"), "true 137")
        self.assertEqual(self.pydock("run", "--rm", "-m", "64m", "base", "echo", "enough").out, "enough\n")

    def test_pids_limit(self):
        script = ("import os, time\nn = 0\ntry:\n while n < 100:\n  if not os.fork(): time.sleep(100)\n  n += 1\n"
                  "except BlockingIOError: pass\nprint(n, open('/sys/fs/cgroup/pids.max').read())")
        self.assertEqual(self.pydock("run", "--rm", "--pids-limit", "9", "host", "python3", "-c", script).out.split(),
                         ["8", "9"])

    def test_networks_of_others(self):
        for mode, seen in (("none", ["lo"]), ("host", sorted(os.listdir("/sys/class/net")))):
            result = self.pydock("run", "--rm", "--net", mode, "host", "ls", "/sys/class/net")
            self.assertEqual((sorted(result.out.split()), result.err), (seen, ""))


class InStandardMachine(AnyMachine, Inside):
    """A machine with Linux 6.1, unified control groups, nftables, ip and curl, but without iptables."""

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        for line in ("netns add outside", "link add out0 type veth peer name out1 netns outside",
                     "address add 198.51.100.1/24 dev out0", "link set out0 up",
                     "-n outside address add 198.51.100.2/24 dev out1", "-n outside link set out1 up",
                     "-n outside link set lo up", "-n outside route add default via 198.51.100.1"):
            result = run_program(["ip"] + line.split())
            assert result.code == 0, result

    def test_drivers(self):
        form = "{{.Driver}} {{.CgroupVersion}} {{.MemoryLimit}} {{.PidsLimit}} {{.CPUSet}}"
        self.assertEqual(self.pydock("info", "--format", form).out, "overlay 2 true true true\n")
        self.assertIn("overlay ", read("/proc/modules"), "mount has loaded it by kmod")

    def test_cpu_limits(self):
        result = self.pydock("run", "--rm", "--cpus", "0.5", "--cpuset-cpus", "1", "-c", "512", "host", "sh", "-c",
                             "cd /sys/fs/cgroup; cat cpu.max cpuset.cpus cpu.weight; cat /proc/self/cgroup")
        quota, cpus, weight, group = result.out.splitlines()
        self.assertEqual((quota, cpus, group), ("50000 100000", "1", "0::/"))
        self.assertLess(int(weight), 100)

    def test_devices(self):
        """The control group's BPF program filters devices: a container can make a node of a disk, but not open it."""
        device = os.stat("/dev/vda").st_rdev
        script = f"mknod /disk b {os.major(device)} {os.minor(device)} && head -c 1 /disk >/dev/null"
        refused = self.pydock("run", "--rm", "host", "sh", "-c", script, code=1)
        self.assertIn("Operation not permitted", refused.err)
        self.pydock("run", "--rm", "--privileged", "host", "sh", "-c", "head -c 1 /dev/vda >/dev/null")
        self.pydock("run", "--rm", "--device", "/dev/vda:/dev/disk:r", "host", "sh", "-c",
                    "head -c 1 /dev/disk >/dev/null")
        self.pydock("run", "--rm", "--device", "/dev/vda:/dev/disk:r", "host", "sh", "-c", ": >>/dev/disk", code=2)
        self.pydock("run", "--rm", "host", "sh", "-c",
                    "head -c 9 /dev/urandom /dev/zero /dev/full >/dev/null && mknod /p p")

    def test_no_init_program(self):
        refused = self.pydock("run", "--init", "--rm", "base", "true", code=125)
        for name in ("docker-init", "tini", "catatonit", "dumb-init"):
            self.assertIn(name, refused.err)

    def test_pause(self):
        script = "import time\nn = 0\nwhile True:\n print(n, flush=True); n += 1; time.sleep(0.05)"
        ident = self.pydock("run", "-d", "--name", "ticker", "host", "python3", "-c", script).out.strip()
        eventually(lambda: self.pydock("logs", "ticker").out, 60)
        self.pydock("pause", "ticker")
        self.assertIn("(Paused)", self.pydock("ps").out)
        self.assertIn("frozen 1", read(f"{CGROUP}/pydock/{ident}/cgroup.events"))
        self.assertIn("is paused", self.pydock("exec", "ticker", "true", code=1).err)
        before = self.pydock("logs", "ticker").out
        self.assertEqual(self.pydock("logs", "ticker").out, before)
        self.pydock("unpause", "ticker")
        eventually(lambda: len(self.pydock("logs", "ticker").out) > len(before), 60)
        self.pydock("pause", "ticker")
        self.pydock("rm", "-f", "ticker")
        self.assertFalse(os.path.exists(f"{CGROUP}/pydock/{ident}"))

    def test_stats_and_exec(self):
        self.pydock("run", "-d", "--name", "sleeper", "-m", "100m", "base", "sleep", "1000")
        stats = self.pydock("stats", "--no-stream", "--format", "{{.Name}}\t{{.MemUsage}}\t{{.PIDs}}", "sleeper").out
        name, memory, pids = stats.strip().split("\t")
        self.assertEqual((name, memory.split(" / ")[1], pids), ("sleeper", "100MiB", "1"))
        self.assertNotEqual(memory.split(" / ")[0], "0B")
        self.assertEqual(self.pydock("exec", "sleeper", "sh", "-c", "echo out; exit 5", code=5).out, "out\n")
        self.assertIn("sleep 1000", self.pydock("top", "sleeper").out)

    def test_terminal(self):
        script = "stty size; tty; read line; echo got $line; exit 4"
        terminal = Terminal(self.argv("run", "-it", "--rm", "host", "sh", "-c", script), (33, 77))
        self.addCleanup(terminal.close)
        self.assertIn("33 77", terminal.expect("/dev/", 60))
        terminal.send("words\r")
        terminal.expect("got words", 60)
        self.assertEqual(terminal.wait(60), 4)
        self.assertEqual(terminal.attributes(), terminal.before)

    def test_images(self):
        """diff, commit, export and import of an image that mkimage has made without busybox."""
        script = "echo 1 >/new; rm /etc/group; echo $0; exit 3"
        self.assertEqual(self.pydock("run", "--name", "changed", "base", "sh", "-c", script, code=3).out, "sh\n")
        self.assertEqual(sorted(self.pydock("diff", "changed").out.splitlines()), ["A /new", "C /etc", "D /etc/group"])
        self.pydock("commit", "-m", "words", "changed", "made")
        self.assertEqual(self.pydock("run", "--rm", "made", "sh", "-c", "cat /new; test ! -e /etc/group").out, "1\n")
        archive = self.pydock("export", "changed").raw
        self.pydock("import", "-", "flat:1", input=gzip.compress(archive, 1))
        self.assertEqual(self.pydock("run", "--rm", "flat:1", "cat", "/new").out, "1\n")
        images = self.pydock("images", "--format", "{{.Repository}}:{{.Tag}}").out.split()
        self.assertEqual(sorted(images), ["base:latest", "flat:1", "made:latest"])
        self.pydock("rm", "changed")
        self.pydock("rmi", "made", "flat:1")

    def curl(self, url, *namespace):
        return run_program(list(namespace) + ["curl", "-s", "--max-time", "3", url]).out

    def test_rules(self):
        """Each rule is made by nft, and only once. From outside, a published port is redirected to its container, and
        nothing else reaches a container."""
        def rules():
            return run_program(["nft", "list", "ruleset"]).out
        outside, before = ("ip", "netns", "exec", "outside"), rules()
        self.web("web", "-p", "8082:80")
        address = self.inspect("web", "{{.NetworkSettings.IPAddress}}")
        eventually(lambda: self.curl("http://198.51.100.1:8082/", *outside) == "web", 60)
        text = rules()
        self.assertEqual(text.count(f"dnat to {address}:80"), 1, text)
        self.assertIn("masquerade", text)
        self.assertEqual(self.curl(f"http://{address}/", *outside), "", "only what is published comes in")
        self.assertEqual(self.pydock("run", "--rm", "host", "curl", "-s", "http://198.51.100.1:8082/").out, "web",
                         "hairpin")
        self.restart_daemon()
        self.assertEqual(rules(), text)
        run_program(["nft", "flush", "ruleset"])
        self.restart_daemon()
        self.assertEqual(rules(), text, "what somebody has flushed is back")
        self.assertEqual(self.curl("http://198.51.100.1:8082/", *outside), "web")
        self.pydock("rm", "-f", "web")
        self.assertEqual(rules(), before)

    def test_way_out(self):
        """Other machines see a container's connections come from the host's address."""
        script = ("import http.server as h\nclass Handler(h.BaseHTTPRequestHandler):\n def do_GET(self):\n"
                  "  self.send_response(200); self.end_headers(); self.wfile.write(self.client_address[0].encode())\n"
                  "h.HTTPServer(('', 9000), Handler).serve_forever()")
        server = subprocess.Popen(["ip", "netns", "exec", "outside", sys.executable, "-c", script],
                                  stderr=subprocess.DEVNULL)
        self.addCleanup(server.wait)
        self.addCleanup(server.kill)
        eventually(lambda: self.curl("http://198.51.100.2:9000/") == "198.51.100.1", 60)
        self.assertEqual(self.pydock("run", "--rm", "host", "curl", "-s", "http://198.51.100.2:9000/").out,
                         "198.51.100.1")


class InBareMachine(AnyMachine, Inside):
    """A machine with only Python: without ip, nft and curl."""
    expected_warnings = ("without iptables and nft",)

    def test_what_is_not_there(self):
        for name in ("ip", "nft", "iptables", "curl", "busybox"):
            self.assertIsNone(shutil.which(name, path=pydock.DEFAULT_PATH))


class InLxcMachine(AnyMachine, Inside):
    """A machine with LXC, unified control groups and a kernel whose pidfds do not tell the exit status."""

    @classmethod
    def setUpClass(cls):
        with open(LOG, "wb") as log:
            subprocess.Popen(cls.argv("-d", "--exec-driver", "lxc"), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(lambda: " serves " in read(LOG), 60)
        super().setUpClass()

    def test_first_command(self):
        self.assertEqual((self.first.code, self.first.out), (0, "Hello World\n"), self.first)
        self.assertEqual(self.inspect(self.pydock("create", "base", "true").out.strip(), "{{.HostConfig.Runtime}}"),
                         "lxc")

    def test_exit_codes(self):
        self.assertFalse(pydock.pidfds_tell_status())
        for script, code in (("exit 7", 7), ("kill -9 $$; sleep 9", 0), ("exec sleep 0", 0)):
            self.pydock("run", "--rm", "base", "sh", "-c", script, code=code)
        container = self.pydock("run", "-d", "base", "sleep", "1000").out.strip()
        self.pydock("kill", container)
        self.assertEqual(self.pydock("wait", container).out, "137\n")

    def test_control_groups(self):
        container = self.pydock("run", "-d", "--memory", "64m", "base", "sleep", "1000").out.strip()
        self.assertEqual(self.pydock("exec", container, "cat", "/proc/self/cgroup").out, "0::/\n")
        folder = os.path.join(CGROUP, "pydock", container)
        self.assertEqual(read(folder + "/cgroup.procs").split(), [self.inspect(container, "{{.State.Pid}}")])
        self.assertEqual(self.pydock("exec", container, "cat", "/sys/fs/cgroup/memory.max").out, "67108864\n")
        self.pydock("pause", container)
        self.assertEqual(read(folder + "/cgroup.freeze"), "1\n")
        self.pydock("unpause", container)
        self.pydock("rm", "-f", container)
        self.assertFalse(os.path.exists(folder))
        self.assertEqual(glob.glob(CGROUP + "/**/lxc*", recursive=True), [])


class InPoorMachine(Inside):
    """Runs in the same machine after InBareMachine, and takes away its kernel modules (overlay, bridge, veth) and its
    control groups before."""

    @classmethod
    def setUpClass(cls):
        pid = int(read("/var/run/pydock.pid"))
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: not is_alive(pid))
        with pydock.Netlink() as netlink:
            netlink.delete_link("pydock0")
        for module in ("overlay", "veth", "bridge"):
            result = run_program(["modprobe", "-r", module])
            assert result.code == 0, result
        os.rename("/lib/modules", "/lib/modules.gone")
        pydock.umount(CGROUP)
        os.truncate(LOG, 0)
        with open(LOG, "ab") as log:
            cls.daemon = subprocess.Popen([sys.executable, PYDOCK, "-d", "-g", "/var/lib/poor"],
                                          stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT)
        cls.addClassCleanup(cls.daemon.wait)
        cls.addClassCleanup(cls.daemon.terminate)
        eventually(lambda: "serves" in read(LOG) or cls.daemon.poll() is not None, 60)
        result = run_program(cls.argv("mkimage", "base"))
        assert result.code == 0, result

    def test_warnings(self):
        warnings = warnings_of(read(LOG))
        self.assertEqual(len(warnings), 3, warnings)
        for part in ("overlay cannot be mounted", "networks cannot be set up, only --net host and none work",
                     "no control groups can be written"):
            self.assertEqual(sum(part in sentence for sentence in warnings), 1, warnings)

    def test_runs_all_the_same(self):
        for mode in ("none", "host"):
            result = self.pydock("run", "--rm", "--net", mode, "base", "sh", "-c", "echo $$ >/x; cat /x")
            self.assertEqual((result.out, result.err), ("1\n", ""))

    def test_what_cannot_be_is_said(self):
        for sentence, *words in (("--net host", "run", "--rm", "base", "true"), ("bridge", "network", "create", "mine"),
                                 ("-g", "run", "--rm", "--net", "none", "host", "true")):
            self.assertIn(sentence, self.pydock(*words, code=125 if words[0] == "run" else 1).err)
        limited = self.pydock("run", "--rm", "--net", "none", "-m", "64m", "base", "echo", "all the same")
        self.assertEqual(limited.out, "all the same\n")
        self.assertEqual(len(limited.err.splitlines()), 1, limited)
        self.pydock("run", "-d", "--name", "sleeper", "--net", "none", "base", "sleep", "1000")
        self.assertIn("freezer", self.pydock("pause", "sleeper", code=1).err)
        self.pydock("stats", "--no-stream", "sleeper")
        self.pydock("exec", "sleeper", "true")


# -- power cuts --------------------------------------------------------------------------------------------------------

# The script of each boot. It starts the daemon on a data root whose socket, pid file and run folder are on the disk,
# too, and so are stale after a power cut. It prints the containers, images and volumes that the daemon knows ("found"),
# and then runs containers, commits and makes volumes until the power is cut. "did ..." is printed when a command has
# returned.

UNTIL_THE_CUT = r"""
cd /box
P="python3 -m pydock -H unix:///srv/pydock.sock"
now() { cut -d ' ' -f 1 /proc/uptime; }
echo "at begin $(now)"
test -e __pycache__ || { $P --version >/dev/null; sync; }
python3 -m pydock -d %(flags)s -g /srv/pydock -H unix:///srv/pydock.sock -p /srv/pydock.pid >>/srv/log 2>&1 &
daemon=$!
until $P version >/dev/null 2>&1; do kill -0 $daemon || { echo "bad: no daemon"; cat /srv/log; exit 1; }; done
test "$(cat /srv/pydock.pid)" = $daemon || echo "bad: wrong pid file"
find /srv/pydock/tmp -mindepth 1 | sed 's/^/bad: left /'
grep -e Traceback -e damaged -e 'left out' /srv/log | sed 's/^/bad: /'
python3 - <<end
import json, pydock
get = pydock.Client("unix:///srv/pydock.sock").get
containers = {c["Names"][0][1:]: get("containers", c["Id"], "json")["State"] for c in get("containers", "json", all=1)}
images = {t: len(get("images", t, "history")) for i in get("images", "json") for t in i["RepoTags"]}
print("found", json.dumps([containers, images, [v["Name"] for v in get("volumes")["Volumes"]]]))
end
echo "at found $(now)"
for i in %(images)s; do echo "content $i $($P run --rm $i cat /f)"; done
%(then)s
"""
FIRST = r"""
$P mkimage base && echo "did image base"
$P run -d --name always --restart always base sleep 100000 && echo "did always"
$P run -d --name stopped --restart unless-stopped base sleep 100000 && $P stop -t 0 stopped && echo "did stopped"
$P run -d --name plain base sleep 100000 && echo "did plain"
"""
WORK = r"""
for i in $(seq %(times)s); do
    n=%(boot)s-$i
    $P run --name r$n base sh -c "echo $n >/f; exit $((i %% 3))"; echo "did container r$n $?"
    $P commit r$n i$n >/dev/null && echo "did image i$n"
    $P volume create v$n >/dev/null && echo "did volume v$n"
done
echo "at end $(now)"
"""
OFF = "echo o >/proc/sysrq-trigger; sleep 100"  # switches the machine off at once, without a sync


class CutTest(MachineTest):
    """The power is cut while containers run and are committed. At the next boot everything that was finished exists,
    and nothing is left unfinished."""
    test_standard_machine = test_lxc_machine = test_bare_machine = None
    # When the power is cut: 1.0 is the time that the work of the first boot took. It does not matter if a cut comes
    # before or after the work.
    cuts = (0.9, 0.6, 1.3)

    def test_power_cuts(self):
        folder, done = self.machine("std"), []
        with tempfile.TemporaryDirectory(dir=SCRATCH) as put:
            shutil.copy(PYDOCK, put)
            disk = os.path.join(put, "disk")
            first = FIRST + WORK % {"boot": 0, "times": 1} + OFF
            times = self._boot(done, folder, "--put", put, "--keep", disk, "--", self._script(done, first))
            start, work = times["found"] - times["begin"], times["end"] - times["found"]
            for number, part in enumerate(self.cuts, 1):
                self._boot(done, folder, "--cut", f"{start + part * work:.1f}", "--disk", disk, "--",
                           self._script(done, WORK % {"boot": number, "times": 1000}, "-r" if number == 1 else ""),
                           plain="running" if number == 1 else "exited")
            self._boot(done, folder, "--disk", disk, "--", self._script(done, OFF), last=True)

    def _boot(self, done, *words, plain="exited", last=False):
        """Boot until the power is cut, check the state that the boot has found, and add the finished commands to
        `done`. Returns {mark: uptime in seconds} of the lines "at MARK UPTIME"."""
        result = self.boot(*words)
        self.assertEqual(result.code, 137, result)
        result.out = result.out.rpartition("\n")[0]  # the last line may have been cut off, too
        inventory = self._check(result, done, plain)
        if last:
            self.assertTrue(inventory, result)
        done += [line[4:] for line in result.out.splitlines() if line.startswith("did ")]
        lines = [line.split() for line in result.out.splitlines()]
        return {fields[1]: float(fields[2]) for fields in lines if fields[:1] == ["at"]}

    @staticmethod
    def _script(done, then, flags=""):
        images = [line.split()[1] for line in done if line.startswith("image i")]
        return UNTIL_THE_CUT % {"flags": flags, "images": " ".join(images[-1:]), "then": then}

    def _check(self, result, done, plain):
        """Compare the containers, images and volumes that a boot has printed with the commands that were finished
        before. Returns None if the power was cut before it printed them."""
        self.assertNotIn("bad: ", result.out, result)
        lines = {line.partition(" ")[0]: line.partition(" ")[2] for line in result.out.splitlines()}
        if "found" not in lines:
            return None
        inventory = containers, images, volumes = json.loads(lines["found"])
        for kind, *words in [line.split() for line in done]:
            if kind == "container":
                state = containers.get(words[0], {})
                self.assertEqual((state.get("Status"), state.get("ExitCode")), ("exited", int(words[1])),
                                 (words, state, result))
            elif kind == "image":
                self.assertIn(words[0] + ":latest", images, result)
            elif kind == "volume":
                self.assertIn(words[0], volumes, result)
            else:
                expected = {"always": "running", "stopped": "exited", "plain": plain}
                self.assertEqual(containers[kind]["Status"], expected[kind], (kind, result))
        if "content" in lines and "did " in result.out:  # otherwise the cut may have come while the content was read
            image, content = lines["content"].split()
            self.assertEqual(content, image[1:], result)
        return inventory


def run_machines(names=()):
    """`test_pydock.py vm [NAME...]`: run the tests of the machines and return the exit code."""
    loader = unittest.TestLoader()
    chosen = [loader.loadTestsFromName(name, sys.modules[__name__]) for name in names]
    suite = unittest.TestSuite(chosen or [loader.loadTestsFromTestCase(case) for case in (MachineTest, CutTest)])
    return 0 if unittest.TextTestRunner(verbosity=2).run(suite).wasSuccessful() else 1


def run_inside(names):
    """`test_pydock.py inside CLASS...`: run these classes inside a machine and return the exit code."""
    loader = unittest.TestLoader()
    suite = unittest.TestSuite(loader.loadTestsFromName(name, sys.modules[__name__]) for name in names)
    return 0 if unittest.TextTestRunner(sys.stdout, verbosity=2).run(suite).wasSuccessful() else 1


########################################################################
# Bench: `sudo make bench`
########################################################################

# This is no test: no measured time is a failure. All installed engines do the same work in turn; for each of them the
# median in milliseconds and its ratio to dockerd's median are printed. The machine should be idle.
ROUNDS = int(os.environ.get("ROUNDS", "10"))


class Engines:
    """The installed engines. `commands` is {name: command line of the engine's client}, to which a command such as
    `run ...` is added."""

    def __init__(self):
        self.folder, self.commands, self.processes = tempfile.mkdtemp(prefix="bench-", dir=SCRATCH), {}, []
        self.mounted = self._mount_file_system()
        self.root = os.path.join(self.folder, "image")
        os.mkdir(self.root)
        pydock.make_root(self.root)
        self.archive = os.path.join(self.folder, "image.tar")
        with tarfile.open(self.archive, "w") as tar:
            tar.add(self.root, ".")

    def _mount_file_system(self):
        """Mount a fresh file system at the folder, and return whether that worked. On a file system without a journal,
        earlier deletions slow down the creation of files for minutes."""
        disk = os.path.join(SCRATCH, "disk")
        with open(disk, "wb") as file:
            file.truncate(16 << 30)
        done = [run_program(words).code for words in (["mkfs.ext4", "-q", disk],
                                                      ["mount", "-o", "loop", disk, self.folder])]
        os.unlink(disk)
        return not any(done)

    def start(self):
        self.daemon = Daemon(root=os.path.join(self.folder, "pydock")).start()
        byte_code = os.path.join(self.folder, "byte-code")
        os.mkdir(byte_code)
        shutil.copy(PYDOCK, byte_code)
        run_program([sys.executable, "-c", "import py_compile; py_compile.compile('pydock.py')"], cwd=byte_code,
                    PYTHONPYCACHEPREFIX="")
        self.module_folder = byte_code
        host = "unix://" + self.daemon.socket
        if DOCKER:
            self.commands["docker CLI on pydock"] = [DOCKER, "-H", host]
        self.commands["pydock, installed"] = [installed_program(), "-H", host]
        self.commands["pydock, as a script"] = [sys.executable, PYDOCK, "-H", host]
        if DOCKER and shutil.which("dockerd", path=pydock.DEFAULT_PATH):
            self._start_dockerd()
        if shutil.which("podman", path=pydock.DEFAULT_PATH):
            write(os.path.join(self.folder, "config.json"), "{}")  # podman fails without this file in DOCKER_CONFIG
            self.commands["podman"] = ["env", "DOCKER_CONFIG=" + self.folder, "podman", "--runtime", "runc",
                                       "--cgroup-manager", "cgroupfs", "--root", os.path.join(self.folder, "podman"),
                                       "--runroot", os.path.join(SCRATCH, "p")]  # podman allows at most 50 characters
        for name, command in list(self.commands.items()):
            if name != "pydock, as a script":
                done = run_program(command + ["import", self.archive, "bench"], cwd=self.module_folder)
                if done.code:
                    print(f"{name} is left out: {done.err.strip().splitlines()[-1:]}")
                    del self.commands[name]

    def _start_dockerd(self):
        folder, bridge = os.path.join(self.folder, "dockerd"), "pdkbench0"
        os.mkdir(folder)
        run_program(["ip", "link", "add", bridge, "type", "bridge"])
        run_program(["ip", "addr", "add", "10.213.7.1/24", "dev", bridge])
        run_program(["ip", "link", "set", bridge, "up"])
        log = open(os.path.join(folder, "log"), "wb")
        self.processes.append(subprocess.Popen(
            ["dockerd", "--data-root", folder + "/data", "-H", f"unix://{folder}/docker.sock", "--exec-root",
             folder + "/exec", "--pidfile", folder + "/pid", "--bridge", bridge],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENVIRONMENT))
        eventually(lambda: os.path.exists(folder + "/docker.sock"), 60)
        self.commands["docker CLI on dockerd"] = [DOCKER, "-H", f"unix://{folder}/docker.sock"]

    def stop(self):
        for process in self.processes:
            process.terminate()
            process.wait(30)
        run_program(["ip", "link", "del", "pdkbench0"])
        if "podman" in self.commands:
            run_program(self.commands["podman"] + ["system", "reset", "-f"])
        self.daemon.cleanup()
        if self.mounted:
            pydock.umount(self.folder)
        shutil.rmtree(self.folder)

    def limits(self, name):
        return ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"] if name == "podman" else []

    def timed(self, name, words, **options):
        begin = time.perf_counter()
        done = run_program(self.commands[name] + words, cwd=self.module_folder, timeout=120, **options)
        if done.code:
            raise AssertionError(repr(done))
        return (time.perf_counter() - begin) * 1000


def print_table(title, times):
    """Print a line for each engine: the median of its times in milliseconds, and the ratio to dockerd's median."""
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items() if values}
    base = median.get("docker CLI on dockerd")
    print(f"\n{title} (median of {max(map(len, times.values()))})")
    for name, value in median.items():
        ratio = f"   {value / base:.2f} of dockerd's" if base else ""
        print(f"  {name:<26} {value:8.1f} ms{ratio}")


def bench_runs(engines):
    times = {name: [] for name in engines.commands}
    for _ in range(ROUNDS):
        for name in engines.commands:
            times[name].append(engines.timed(name, ["run", "--rm"] + engines.limits(name) + ["bench", "true"]))
    print_table("run --rm IMAGE true", times)
    parts = {"python3 -c pass": [sys.executable, "-c", "pass"],
             "import of the byte code": [sys.executable, "-c", "import pydock"],
             "compile of the source": [sys.executable, "-c", f"compile(open({PYDOCK!r}).read(), 'x', 'exec')"]}
    measured = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, argv in parts.items():
            begin = time.perf_counter()
            run_program(argv, cwd=engines.module_folder, PYTHONPYCACHEPREFIX="")
            measured[name].append((time.perf_counter() - begin) * 1000)
    print_table("parts of pydock's own client", measured)


def bench_exec(engines):
    times = {name: [] for name in engines.commands}
    for name in engines.commands:
        engines.timed(name, ["run", "-d", "--name", "bench-exec" + str(len(name))] + engines.limits(name)
                      + ["bench", "sleep", "1000"])
    for _ in range(ROUNDS):
        for name in engines.commands:
            times[name].append(engines.timed(name, ["exec", "bench-exec" + str(len(name)), "true"]))
    for name in engines.commands:
        engines.timed(name, ["rm", "-f", "bench-exec" + str(len(name))])
    print_table("exec CONTAINER true", times)


def bench_parallel(engines):
    names = [name for name in engines.commands if name.startswith("docker CLI")] or ["pydock, installed"]
    times = {name: [] for name in names}
    for _ in range(3):
        for name in names:
            begin = time.perf_counter()
            started = [subprocess.Popen(engines.commands[name] + ["run", "-d", "bench", "sleep", "1000"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=ENVIRONMENT,
                                        cwd=engines.module_folder)
                       for _ in range(20)]
            ids = [process.communicate()[0].decode().strip() for process in started]
            times[name].append((time.perf_counter() - begin) * 1000)
            engines.timed(name, ["rm", "-f"] + ids)
    print_table("20 starts in parallel", times)


def bench_builds(engines):
    """A build of FROM, 10 RUN and COPY of 2,000 files: first without the cache, then from the cache. The aims are a
    third and half of dockerd's time."""
    context = os.path.join(engines.folder, "context")
    for number in range(2000):
        write(f"{context}/src/{number % 40}/{number}", os.urandom(500) * (1 + number % 8))
    runs = "".join(f"RUN echo {number} > /made-{number}\n" for number in range(10))
    write(context + "/Dockerfile", "FROM bench\n" + runs + "COPY src /src\n")
    names = [name for name in engines.commands if name not in ("podman", "pydock, as a script")]
    cold, cached = {name: [] for name in names}, {name: [] for name in names}
    for _ in range(3):
        for name in names:
            words = ["build", "-q", "-t", "bench-build", context]
            cold[name].append(engines.timed(name, words[:1] + ["--no-cache"] + words[1:], DOCKER_BUILDKIT="0"))
            cached[name].append(engines.timed(name, words, DOCKER_BUILDKIT="0"))
    print_table("build: FROM, 10 RUN, COPY of 2,000 files", cold)
    print_table("the same build, from the cache", cached)


def bench_memory(engines):
    name = "pydock, installed"

    def measure():
        below = descendants(engines.daemon.process.pid)
        monitors = [pid for pid, title in below.items() if "monitor" in title]
        others = [engines.daemon.process.pid] + [pid for pid, title in below.items() if "spawner" in title]
        return sum(map(proportional_set_size, others)), sum(map(proportional_set_size, monitors)), len(monitors)
    before = measure()
    ids = [run_program(engines.commands[name] + ["run", "-d", "bench", "sleep", "1000"],
                       cwd=engines.module_folder).out.strip() for _ in range(20)]
    time.sleep(1)
    after = measure()
    engines.timed(name, ["rm", "-f"] + ids)
    print(f"\nmemory (proportional set size)\n  daemon and spawner         {before[0] / 1024:8.1f} MiB\n"
          f"  a monitor adds             {(sum(after[:2]) - sum(before[:2])) / 20 / 1024:8.2f} MiB")


class ImageFiles:
    """An image of 300 MB and 20,000 files in 4 layers, as archives in a folder: `docker` for `load`, `tree` for
    `import`, and `change`, 5,000 files for `cp`. The content is half as hard to compress as text; the names and sizes
    look like those of /usr."""
    files, size, layers = 20000, 300 << 20, 4

    def __init__(self, folder):
        self.random = random.Random(1)
        words = [self.random.getrandbits(8 * n).to_bytes(n, "little") for n in range(3, 12) for _ in range(200)]
        self.pool = b" ".join(self.random.choices(words, k=600000))
        self.docker, self.tree, self.change = (os.path.join(folder, name + ".tar")
                                               for name in ("docker", "tree", "change"))
        weights = [self.random.lognormvariate(0, 1.8) for _ in range(self.files)]
        sizes = [int(weight * self.size / sum(weights)) for weight in weights]
        with tarfile.open(self.tree, "w") as tree, tarfile.open(self.docker, "w") as docker:
            diff_ids = []
            for number in range(self.layers):
                data = io.BytesIO()
                with tarfile.open(fileobj=data, mode="w") as layer:
                    for index in range(number, self.files, self.layers):
                        self.add(f"usr/lib/l{number}/{index % 97}", f"file-{index}", sizes[index], layer, tree)
                diff_ids.append(sha256(data.getvalue()))
                self.put(f"{number}.tar", data.getvalue(), docker)
            config = {"architecture": pydock.ARCHITECTURE, "os": "linux", "config": {"Cmd": ["true"]},
                      "rootfs": {"type": "layers", "diff_ids": diff_ids}}
            self.put("config.json", json.dumps(config).encode(), docker)
            self.put("manifest.json", json.dumps([{"Config": "config.json", "RepoTags": ["images:1"], "Layers": [
                f"{number}.tar" for number in range(self.layers)]}]).encode(), docker)
        with tarfile.open(self.change, "w") as change:
            for index in range(5000):
                self.add(f"usr/new/{index % 50}", f"file-{index}", sizes[index], change)

    def put(self, name, data, *archives):
        member = tarfile.TarInfo(name)
        member.size, member.mtime = len(data), 1700000000
        for archive in archives:
            archive.addfile(member, io.BytesIO(data))

    def add(self, folder, name, size, *archives):
        start = self.random.randrange(len(self.pool) // 2)
        data = self.pool[start:start + size]
        while len(data) < size:
            data += self.pool[:size - len(data)]
        for archive in archives:
            if folder not in archive.__dict__.setdefault("folders", set()):
                archive.folders.add(folder)
                member = tarfile.TarInfo(folder)
                member.type, member.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(member)
        self.put(f"{folder}/{name}", data, *archives)


def bench_images(engines):
    """Images go in and out of dockerd by the docker CLI, and of pydock by its own. Each push goes to an empty
    registry."""
    files = ImageFiles(engines.folder)
    names = [name for name in ("pydock, installed", "docker CLI on dockerd") if name in engines.commands]
    times, watch = {}, MemoryWatch(engines.daemon)

    def timed(operation, name, *words, **options):
        os.sync()  # so that this engine does not wait until another engine's data has been written
        watch.doing = operation if name.startswith("pydock") else None
        milliseconds = engines.timed(name, list(words), **options)
        watch.doing = None
        times.setdefault(operation, {other: [] for other in names})[name].append(milliseconds)

    def round_of(name):
        registry = RealRegistry(engines.folder)
        remote, saved = registry.host + "/images:1", os.path.join(engines.folder, "saved.tar")
        try:
            timed("load -i FILE", name, "load", "-i", files.docker)
            engines.timed(name, ["tag", "images:1", remote])
            timed("push, layers to be compressed", name, "push", remote)
            timed("save -o FILE", name, "save", "-o", saved, "images:1")
            engines.timed(name, ["rmi", "images:1", remote])
            timed("pull", name, "pull", remote)
            timed("save -o FILE of what was pulled", name, "save", "-o", saved, remote)
            engines.timed(name, ["rmi", remote])
            timed("import FILE", name, "import", files.tree, "imported")
            engines.timed(name, ["rmi", "imported"])
            engines.timed(name, ["create", "--name", "images", "bench", "true"])
            with open(files.change, "rb") as change:
                engines.timed(name, ["cp", "-", "images:/"], input=change.read())
            timed("commit of 5,000 files", name, "commit", "images", "committed")
            engines.timed(name, ["rm", "images"])
            engines.timed(name, ["rmi", "committed"])
        finally:
            registry.close()
            shutil.rmtree(registry.storage)

    for _ in range(max(ROUNDS // 3, 1)):
        for name in names:
            round_of(name)
    watch.stop()
    for operation, each in times.items():
        print_table(operation if "5,000" in operation else f"{operation}: an image of 300 MB, 20,000 files, 4 layers",
                    each)
    print(f"\npeak of memory (proportional set size)\n  daemon, of all             {watch.daemon / 1024:8.1f} MiB")
    for operation, size in watch.total.items():
        print(f"  with spawner and helpers   {size / 1024:8.1f} MiB   {operation}")


BENCHES = {"run": bench_runs, "exec": bench_exec, "parallel": bench_parallel, "memory": bench_memory,
           "builds": bench_builds, "images": bench_images}


def bench(words):
    """`sudo make bench`: run all parts of BENCHES, or only those that `words` name."""
    engines = Engines()
    try:
        engines.start()
        for name in words or BENCHES:
            BENCHES[name](engines)
    finally:
        engines.stop()


########################################################################
# The run itself
########################################################################

class NothingIsLeft(unittest.TestCase):
    """The last test of every run."""

    def test_nothing_is_left(self):
        """No process, mount, interface, control group or file that a test or its daemon has made is left."""
        for name in list(SHARED):
            SHARED.pop(name).cleanup()
        eventually(lambda: not self.left_processes(), 5, lambda: f"processes are left: {self.left_processes()}")
        self.assertEqual([line for line in read("/proc/self/mountinfo").splitlines() if SCRATCH in line], [])
        with pydock.Netlink() as netlink:
            self.assertEqual([link["name"] for link in netlink.links() if re.match("pdk|veth|pydock", link["name"])],
                             [])
        eventually(lambda: not self.used_groups(), 5, lambda: f"control groups are in use: {self.used_groups()}")
        self.assertEqual(self.left_groups(), [])
        self.assertEqual([name for name in os.listdir(SCRATCH) if name not in KEPT_IN_SCRATCH], [])

    @staticmethod
    def left_processes():
        mine = {os.getpid()} | set(descendants(os.getpid()))
        return {pid: title for pid, title in descendants(OUTERMOST).items()
                if pid not in mine or title.startswith("pydock")}

    @staticmethod
    def used_groups():
        """The control groups with processes. A process leaves its group only some time after it has ended."""
        return [top for top, _, files in os.walk("/sys/fs/cgroup")
                if CGROUP_PARENT in top.split("/") and "cgroup.procs" in files
                and read(top + "/cgroup.procs").strip()]

    @staticmethod
    def left_groups():
        """The control groups that are left below CGROUP_PARENT. That group itself and its monitors' may stay until the
        end, and are removed here."""
        left = []
        for top, folders, _ in os.walk("/sys/fs/cgroup", topdown=False):
            if CGROUP_PARENT in top.split("/"):
                try:
                    os.rmdir(top)
                except OSError:
                    left.append(top)
                else:
                    left += [top] if os.path.basename(top) != CGROUP_PARENT and "monitors" not in top else []
        return left


KEPT_IN_SCRATCH = ("installed", "byte-code", "docker-config", ".docker", ".config", ".cache")


class CountingResult(unittest.TextTestResult):
    """Counts the tests that passed and measures each test's time; with CI=true a skipped test is a failure."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.passed, self.times, self.began = 0, [], 0

    def startTest(self, test):
        self.began = time.monotonic()
        super().startTest(test)

    def stopTest(self, test):
        super().stopTest(test)
        self.times.append((time.monotonic() - self.began, test.id()))

    def _exc_info_to_string(self, error, test):
        """Add the daemon's log of that test to the text of a failure."""
        text, case = super()._exc_info_to_string(error, test), getattr(test, "test_case", test)
        log = case.daemon.log_text(case.log_start) if hasattr(case, "log_start") else ""
        return f"{text}\nThe daemon's log:\n{log}" if log else text

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1

    def addSkip(self, test, reason):
        super().addSkip(test, reason)
        if os.environ.get("CI") == "true" and test.id().rpartition(".")[2] not in ALLOWED_IN_CI:
            self.failures.append((test, f"skipped, and in CI nothing may be: {reason}\n"))


class Runner(unittest.TextTestRunner):
    resultclass = CountingResult

    def run(self, test):
        if IS_ROOT:
            test.addTest(NothingIsLeft("test_nothing_is_left"))
        result = super().run(test)
        reasons = collections.Counter(reason for _, reason in result.skipped)
        out = self.stream
        if os.environ.get("TIMES"):
            slowest = sorted(result.times, reverse=True)[:int(os.environ["TIMES"])]
            out.writeln("slowest: " + ", ".join(f"{name.partition('.')[2]} {seconds:.1f} s"
                                                for seconds, name in slowest))
        for reason, count in sorted(reasons.items()):
            out.writeln(f"skipped, {count} times: {reason}")
        failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
        out.writeln(f"{result.passed} passed, {failed} failed, {len(result.skipped)} skipped")
        return result


def load_tests(loader, tests, pattern):
    """All test classes in the order in which they stand in this file, except those of machines, which `vm` runs, and
    the last test, which the runner adds."""
    order = {name: number for number, name in enumerate(globals())}
    suites = [(type(next(iter(suite))), suite) for suite in tests if suite.countTestCases()]
    ordered = [(order.get(case.__name__, 0), suite) for case, suite in suites
               if not issubclass(case, (NothingIsLeft, MachineCase))]
    return unittest.TestSuite(suite for _, suite in sorted(ordered, key=lambda pair: pair[0]))


def run_tests(words):
    tempfile.tempdir = SCRATCH  # the last test fails if a temporary file is left there
    program = unittest.main(module=__name__, argv=sys.argv[:1] + words, testRunner=Runner, exit=False,
                            warnings="ignore")
    return 0 if program.result.wasSuccessful() else 1


def run_bench(words):
    bench(words)
    return 0


def enter_namespaces():
    """Enter a new network and a new mount namespace, so that the tests do not touch the host's interfaces, firewall
    rules and mounts."""
    pydock.unshare(pydock.NEWNET | pydock.NEWNS)
    pydock.mount(None, "/", None, pydock.MS_REC | pydock.MS_PRIVATE)
    with pydock.Netlink() as netlink:
        netlink.set_link("lo", up=True)


# the first word of the command line names a role; any other word belongs to the command line of the tests
ROLES = {"vm": run_machines, "inside": run_inside, "bench": run_bench}


def run_role():
    """Do the work of the inner process and return its exit code."""
    role = ROLES.get("".join(sys.argv[1:2]))
    if IS_ROOT and role not in (run_inside, run_machines):  # making a machine fetches packages over the host's network
        enter_namespaces()
    return role(sys.argv[2:]) if role else run_tests(sys.argv[1:])


def main():
    """The outermost process: as an init does, it adopts and reaps the orphans of the inner process, which runs the
    tests. At the end it kills every process that is left. Returns the exit code."""
    pydock.prctl(pydock.PR_SET_CHILD_SUBREAPER, 1)
    child = os.fork()
    if not child:
        status = 1
        try:
            status = run_role()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(child, number))
    status = None
    while status is None:
        pid, code = os.wait()
        if pid == child:
            status = code
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


if __name__ == "__main__":
    sys.exit(main())

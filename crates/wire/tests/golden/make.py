#!/usr/bin/env python3
"""Makes the golden files of golden.toml again, with real QEMUs.

usage: make.py 10.0=qemu-system-x86_64 7.2='/opt/qemu-7.2/qemu-system-x86_64 -L /opt/qemu-7.2/share' [NAME...]

Nothing here shares code with the crate: it is a second witness of where the pages of a file are.
"""

import json
import os
import shlex
import struct
import subprocess
import sys
import tempfile
import tomllib

HERE = os.path.dirname(os.path.abspath(__file__))
PAGE = 4096
COMMON = ["-accel", "tcg", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]


class Guest:
    """A QEMU that answers on its standard input and output."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        json.loads(self.process.stdout.readline())
        self.run("qmp_capabilities")

    def run(self, name, **arguments):
        self.process.stdin.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        while True:
            answer = json.loads(self.process.stdout.readline())
            if "error" in answer:
                raise SystemExit(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def migrate(self, uri):
        self.run("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        self.run("migrate", uri=uri)
        while True:
            event = json.loads(self.process.stdout.readline())
            if event.get("event") == "MIGRATION":
                if event["data"]["status"] == "failed":
                    raise SystemExit("migration failed")
                if event["data"]["status"] == "completed":
                    return

    def quit(self):
        self.run("quit")
        self.process.wait()


def save(golden, command, directory):
    target = os.path.join(directory, golden["file"])
    args = [arg.replace("@RAM@", os.path.join(directory, "ram")) for arg in golden["args"]]
    guest = Guest(command + args + COMMON)
    capabilities = [{"capability": name, "state": True} for name in golden.get("capabilities", [])]
    if capabilities:
        guest.run("migrate-set-capabilities", capabilities=capabilities)
    guest.run("migrate-set-parameters", **{"max-bandwidth": 1 << 33} | golden.get("parameters", {}))
    if golden["how"] == "migrate file:":
        offset = golden.get("offset", 0)
        guest.migrate(f"file:{target},offset={offset:#x}" if offset else f"file:{target}")
    elif golden["how"] == "migrate exec:":
        guest.migrate(f"exec:cat > {target}")
    else:
        guest.run("xen-save-devices-state", filename=target, live=False)
    guest.quit()
    with open(target, "rb") as file:
        return file.read()


class Stream:
    def __init__(self, data, at):
        self.data, self.at = data, at

    def take(self, form):
        values = struct.unpack_from(">" + form, self.data, self.at)
        self.at += struct.calcsize(">" + form)
        return values[0]

    def name(self):
        length = self.take("B")
        self.at += length
        return self.data[self.at - length : self.at].decode()


def pages(data, start):
    """The ranges of the file that hold pages of RAM."""
    stream = Stream(data, start)
    assert stream.take("I") == 0x5145564D and stream.take("I") == 3
    if data[stream.at] != 7:
        return []  # device state alone
    stream.at = data.index(b"\x01", stream.at + 5 + data[stream.at + 4])
    while data[stream.at + 5 : stream.at + 9] != b"\x03ram":
        stream.at = data.index(b"\x01", stream.at + 1)
    mapped = b"mapped-ram" in data[start : stream.at]
    shared = b"x-ignore-shared" in data[start : stream.at]
    found, parts = [], False
    while True:
        kind = stream.take("B")
        if kind == 8:
            stream.at += 4
            continue
        if kind == 4 and not parts:
            # Saved early, and without a length.
            footer = b"\x7e" + data[stream.at : stream.at + 4]
            stream.at = data.index(footer, stream.at) + 5
            continue
        if kind not in (1, 2, 3):
            return found
        parts = kind > 1
        stream.at += 4 + (12 if kind == 1 else 0)
        while True:
            word = stream.take("Q")
            flags, total = word & 0x3FF, word & ~0x3FF
            if flags & 0x04:
                while total:
                    stream.name()
                    length = stream.take("Q")
                    total -= length
                    stream.at += 8 if shared else 0
                    if mapped:
                        stream.at += 20
                        place = stream.take("Q")
                        found.append((place, place + length))
                        stream.at = place + length
            elif flags & 0x0A:
                if not flags & 0x20:
                    stream.name()
                stream.at += 1 if flags & 0x02 else PAGE
                if flags & 0x08:
                    found.append((stream.at - PAGE, stream.at))
            elif flags == 0x10:
                break
            else:
                raise SystemExit(f"unexpected word {word:#x} at {stream.at - 8:#x}")
        assert stream.take("B") == 0x7E
        stream.at += 4


def write(path, data, dropped):
    kept, at = [], 0
    for start, end in sorted(dropped) + [(len(data), len(data))]:
        # The gap between a header and the pages behind it is a hole of the file; only what is not zero counts.
        piece = data[at:start]
        lead = len(piece) - len(piece.lstrip(b"\0"))
        used = len(piece.rstrip(b"\0"))
        if used > lead:
            kept.append((at + lead, at + used))
        at = end
    head = f"vmstate-golden 1\nlength {len(data)}\n"
    head += "".join(f"extent {start} {end - start}\n" for start, end in kept)
    with open(path, "wb") as file:
        file.write(head.encode() + b"\n" + b"".join(data[start:end] for start, end in kept))


def main():
    qemus = dict(arg.split("=", 1) for arg in sys.argv[1:] if "=" in arg)
    names = [arg for arg in sys.argv[1:] if "=" not in arg]
    with open(os.path.join(HERE, "golden.toml"), "rb") as file:
        table = tomllib.load(file)["golden"]
    for golden in table:
        if golden.get("qemu") not in qemus or (names and golden["file"] not in names):
            continue
        with tempfile.TemporaryDirectory(dir=os.environ.get("GOLDEN_TMPDIR", "/var/tmp")) as directory:
            data = save(golden, shlex.split(qemus[golden["qemu"]]), directory)
        path = os.path.join(HERE, golden["file"] + ".golden")
        write(path, data, pages(data, golden.get("offset", 0)))
        print(f"{golden['file']}: {len(data)} bytes, {os.path.getsize(path)} kept")


main()

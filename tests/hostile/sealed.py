"""Run commands of `toyllm` in a process that the system kills when it makes a socket for a network.

    python tests/hostile/sealed.py '[["params"], ["models"]]'

prints each command's exit code to stderr, and ends with 0 where all were 0. The lock is a seccomp filter: it is below Python, and holds
for every library and thread.
"""

import ctypes
import json
import os
import platform
import socket
import struct
import sys

LOAD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06  # of classic BPF: load a word, jump if equal, return
ALLOW, KILL = 0x7FFF0000, 0x80000000
NUMBER, ARCH, FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data, little-endian
SOCKET = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}  # audit's number of the processor, and socket(2)'s
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


def can_seal() -> bool:
    """Whether this system has the filter, and this file its numbers."""
    return sys.platform == "linux" and platform.machine() in SOCKET and os.path.exists("/proc/self/status")  # noqa: PTH110


def seal() -> None:
    """From now on, socket(AF_INET or AF_INET6, ...) kills this process with SIGSYS. Raises OSError."""
    arch, number = SOCKET[platform.machine()]
    families = (socket.AF_INET, socket.AF_INET6)
    program = [
        (LOAD, 0, 0, ARCH),
        (JUMP_EQUAL, 0, 5, arch),
        (LOAD, 0, 0, NUMBER),
        (JUMP_EQUAL, 0, 3, number),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_EQUAL, 2, 0, families[0]),
        (JUMP_EQUAL, 1, 0, families[1]),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, KILL),
    ]
    code = b"".join(struct.pack("<HBBI", *line) for line in program)
    lines = ctypes.create_string_buffer(code)
    head = struct.pack("HxxxxxxP", len(program), ctypes.addressof(lines))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(head), 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    seal()
    from toyllm.cli import output
    from toyllm.cli.main import run

    output.open_streams()
    codes = []
    for arguments in json.loads(sys.argv[1]):
        print("run", *arguments, file=sys.stderr, flush=True)
        codes.append(run(arguments))
        print("exit code", codes[-1], file=sys.stderr, flush=True)
    sys.exit(0 if codes == [0] * len(codes) else 1)

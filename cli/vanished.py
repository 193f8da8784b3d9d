"""A page of mapped weights that cannot be had: the file was cut short, or its disk failed, while kernels read it.

The system then sends SIGBUS, in the middle of whichever instruction wanted the page, in any thread. Python cannot handle that: its handlers
run between two of its own instructions, and the faulting one would be tried again for ever. So the handler is a few machine instructions
without Python, made by the compiler that the kernels use: write one line, end the process.
"""

import ctypes
import signal
from typing import Any

from .output import one_line

_kept: list[Any] = []  # the code, as long as the process lives


def end_in_words(model: str) -> None:
    """From now on SIGBUS ends this process with one line on stderr and exit code 1; for commands that run kernels."""
    from llvmlite import binding

    cause = "a page of the weights could not be read: a file became shorter, or its disk failed, while it was in use"
    line = f"error: {one_line(model)}: {cause}; download the model again\n".encode()
    if not _kept:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
    machine = binding.Target.from_default_triple().create_target_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(handler(line)), machine)
    engine.finalize_object()
    _kept.append(engine)
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGBUS, engine.get_function_address("end_in_words"))


def handler(line: bytes) -> str:
    """LLVM's assembly of void end_in_words(int): write(2, line, its length); _exit(1). Both are safe in a handler."""
    text = "".join(f"\\{byte:02x}" for byte in line)
    return f"""
        @line = private constant [{len(line)} x i8] c"{text}"
        declare i64 @write(i32, ptr, i64)
        declare void @_exit(i32)
        define void @end_in_words(i32 %signal) {{
            %written = call i64 @write(i32 2, ptr @line, i64 {len(line)})
            call void @_exit(i32 1)
            unreachable
        }}
    """

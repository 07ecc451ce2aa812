"""Compiles a CUDA source to PTX with NVRTC, which needs neither a card nor a driver: ptx.py LIBNVRTC SOURCE TARGET > PTX."""

import ctypes
import sys


def main(library, source, target):
    nvrtc = ctypes.CDLL(library)

    def check(status):
        if status != 0:
            nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
            raise SystemExit(f"{library}: {nvrtc.nvrtcGetErrorString(status).decode()}")

    def text(size_of, read):
        size = ctypes.c_size_t()
        check(size_of(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        check(read(program, buffer))
        return buffer.value.decode()

    program = ctypes.c_void_p()
    with open(source, "rb") as file:
        check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), file.read(), b"kernels.cu", 0, None, None))
    # Nothing may be joined, flushed to zero or approximated.
    options = [f"--gpu-architecture={target}", "--fmad=false", "--ftz=false", "--prec-div=true", "--std=c++14"]
    pointers = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), pointers)
    log = text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
    if log.strip():
        print(log, file=sys.stderr)
    check(status)
    print(text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX), end="")


main(*sys.argv[1:])

"""A model in a Python program, through ctypes: python3 spell.py DIRECTORY PROMPT...

DIRECTORY is what `moec build ../numerals --emit cdylib --name numerals -o DIRECTORY` wrote.
"""

import ctypes
import pathlib
import sys

GENERATE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32, ctypes.POINTER(ctypes.c_char), ctypes.c_size_t
)


class Model:
    """An opened model, with one session at a time."""

    def __init__(self, directory, name):
        directory = pathlib.Path(directory)
        self.library = ctypes.CDLL(str(directory / f"lib{name}.so"))
        self.library.moec_error_text.restype = ctypes.c_char_p
        descriptor = ctypes.byref(ctypes.c_char.in_dll(self.library, f"{name}_model"))
        self.handle = ctypes.c_void_p()
        weights = str(directory / f"{name}.weights").encode()
        self.call("moec_open", descriptor, weights, None, ctypes.byref(self.handle))

    def call(self, function, *arguments):
        """Calls a function of moec.h; an error is an exception with moec's sentence."""
        if getattr(self.library, function)(*arguments) != 0:
            raise RuntimeError(self.library.moec_error_text().decode())

    def tokenize(self, text):
        data = text.encode()
        count = ctypes.c_size_t()
        size = ctypes.c_size_t(len(data))
        self.call("moec_tokenize", self.handle, data, size, 1, None, ctypes.c_size_t(0), ctypes.byref(count))
        tokens = (ctypes.c_uint32 * count.value)()
        self.call("moec_tokenize", self.handle, data, size, 1, tokens, count, ctypes.byref(count))
        return tokens

    def generate(self, prompt, max_tokens=64):
        tokens = self.tokenize(prompt)
        pieces = []

        def take(user, token, text, size):
            pieces.append(ctypes.string_at(text, size))
            return 0

        session = ctypes.c_void_p()
        self.call("moec_session_new", self.handle, ctypes.byref(session))
        try:
            self.call("moec_feed", session, tokens, ctypes.c_size_t(len(tokens)))
            self.call("moec_generate", session, ctypes.c_size_t(max_tokens), GENERATE(take), None, None)
        finally:
            self.call("moec_session_free", session)
        return b"".join(pieces).decode()

    def close(self):
        self.call("moec_close", self.handle)


def main():
    model = Model(sys.argv[1], "numerals")
    for prompt in sys.argv[2:]:
        print(model.generate(prompt))
    model.close()


if __name__ == "__main__":
    main()

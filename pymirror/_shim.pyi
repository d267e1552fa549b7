"""The cffi module built from native/pymirror.h: see that header for what `lib` holds."""

from typing import Any

ffi: Any
lib: Any

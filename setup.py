"""Only what pyproject.toml cannot say: which cffi builder makes the extension."""

from setuptools import setup

setup(cffi_modules=["native/build_shim.py:ffi"])

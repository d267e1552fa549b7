"""The demonstration behind `pymirror demo`: a driver, a device and threads that change memory under them.

`Demo(options).run()` gives a Report. It is a user of the public API like any other; what it prints is the
command line's business (pymirror/cli/demo.py).
"""

from pymirror.demo.options import Options, Stop
from pymirror.demo.report import Report
from pymirror.demo.runner import Demo

__all__ = ["Demo", "Options", "Report", "Stop"]

"""The benchmarks, a module a subject. Importing one registers what it has."""

import importlib

SUBJECTS = ("fault", "mm", "notifier", "device", "dma", "dma_api", "pin", "iova", "migrate", "idle")


def load() -> None:
    for subject in SUBJECTS:
        importlib.import_module(f"{__name__}.{subject}")

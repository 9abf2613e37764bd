"""The command line: `semu`, one file per group of verbs.

It stands beside `semu_peft` and not in it: Python imports a package before any module in it, and `semu_peft` needs PEFT
and torch, for which `semu --help` and a Tab in the shell would wait seconds. What a verb needs it imports when it runs.
"""

from .app import app, main

__all__ = ["app", "main"]

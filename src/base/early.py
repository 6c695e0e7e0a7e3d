"""Imported before the slow imports of a script: until its main() runs, a signal ends it at once, silently.

A rank of `nohup torchrun` has to heed SIGHUP from here on. It would come through its imports, train, and be killed by
torchrun's agent with steps that are charged and not saved.
"""

import signal

from base.signals import URGENT, stays_ignored

for number in URGENT:
    if not stays_ignored(number):
        signal.signal(number, signal.SIG_DFL)
